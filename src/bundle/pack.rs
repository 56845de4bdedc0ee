//! Writes a bundle.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use super::manifest::{File, path_problem};
use super::tar::{BLOCK_BYTES, Member, padding};
use super::{
    Advance, BundleError, CHUNK_BYTES, MANIFEST, MANIFEST_DIGEST, Manifest, digest_line, hex,
};

/// A digest that is not known yet.
const UNKNOWN: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// A file to be packed.
#[derive(Clone, Debug)]
pub struct Source {
    /// The file on this machine.
    pub file: PathBuf,
    /// What it is called in the bundle.
    pub path: String,
}

/// Writes a bundle of these files, at the beginning of an empty `output`, and gives the digest of
/// its manifest. `manifest.files` is filled in here.
///
/// # Errors
/// If a file cannot be read, changes meanwhile, or has a name that cannot be packed; if the output
/// cannot be written. What was written until then is no bundle.
pub fn pack(
    output: &mut (impl Write + Seek),
    manifest: &mut Manifest,
    sources: &[Source],
    advance: Advance<'_>,
) -> Result<String, BundleError> {
    let members = sources.iter().map(|source| describe(source, manifest));
    let members = members.collect::<Result<Vec<Member>, _>>()?;
    let file = |member: &Member| File {
        path: member.path.clone(),
        num_bytes: member.num_bytes,
        sha256: UNKNOWN.to_owned(),
    };
    manifest.files = members.iter().map(file).collect();
    let modified = members.iter().map(|member| member.modified).max().unwrap_or(0);
    write_text(output, MANIFEST, &text(manifest), modified)?;
    for ((source, member), file) in sources.iter().zip(&members).zip(&mut manifest.files) {
        write_header(output, member)?;
        file.sha256 = copy(output, source, member.num_bytes, advance)?;
    }
    let text = text(manifest);
    let digest = hex(Sha256::new_with_prefix(text.as_bytes()));
    write_text(output, MANIFEST_DIGEST, &digest_line(&digest), modified)?;
    output.write_all(&[0; 2 * BLOCK_BYTES]).map_err(BundleError::Write)?;
    output.seek(SeekFrom::Start(0)).map_err(BundleError::Write)?;
    write_text(output, MANIFEST, &text, modified)?;
    output.flush().map_err(BundleError::Write)?;
    Ok(digest)
}

fn text(manifest: &Manifest) -> String {
    let text = serde_json::to_string_pretty(manifest).expect("a manifest has only texts as keys");
    text + "\n"
}

fn describe(source: &Source, manifest: &Manifest) -> Result<Member, BundleError> {
    if let Some(problem) = path_problem(&source.path) {
        return Err(BundleError::Name { name: source.path.clone(), problem });
    }
    let metadata = fs::metadata(&source.file).map_err(BundleError::io("read", &source.file))?;
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let is_program = manifest.program.path.as_ref() == Some(&source.path);
    Ok(Member {
        path: source.path.clone(),
        num_bytes: metadata.len(),
        mode: if is_program { 0o755 } else { 0o644 },
        modified: modified.map_or(0, |time| time.as_secs()),
    })
}

/// Copies a file that must have this size, and gives its digest.
fn copy(
    output: &mut impl Write,
    source: &Source,
    num_bytes: u64,
    advance: Advance<'_>,
) -> Result<String, BundleError> {
    let unreadable = || BundleError::io("read", &source.file);
    // One byte more than there should be tells whether the file has grown.
    let mut file = fs::File::open(&source.file).map_err(unreadable())?.take(num_bytes + 1);
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut num_bytes_done = 0;
    loop {
        let len = file.read(&mut chunk).map_err(unreadable())?;
        num_bytes_done += len as u64;
        if num_bytes < num_bytes_done || (len == 0 && num_bytes_done < num_bytes) {
            return Err(BundleError::Changed(source.file.clone()));
        }
        if len == 0 {
            break;
        }
        hasher.update(&chunk[..len]);
        output.write_all(&chunk[..len]).map_err(BundleError::Write)?;
        advance(len as u64);
    }
    output.write_all(&vec![0; padding(num_bytes)]).map_err(BundleError::Write)?;
    Ok(hex(hasher))
}

fn write_text(
    output: &mut impl Write,
    path: &str,
    text: &str,
    modified: u64,
) -> Result<(), BundleError> {
    let num_bytes = text.len() as u64;
    write_header(output, &Member { path: path.to_owned(), num_bytes, mode: 0o644, modified })?;
    output.write_all(text.as_bytes()).map_err(BundleError::Write)?;
    output.write_all(&vec![0; padding(num_bytes)]).map_err(BundleError::Write)
}

fn write_header(output: &mut impl Write, member: &Member) -> Result<(), BundleError> {
    let too_long =
        || BundleError::Name { name: member.path.clone(), problem: "it is longer than 100 bytes" };
    let header = member.header().ok_or_else(too_long)?;
    output.write_all(&header).map_err(BundleError::Write)
}
