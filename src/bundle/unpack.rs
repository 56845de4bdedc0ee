//! Reads a bundle and checks all of it.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::manifest::{File, path_problem};
use super::tar::{BLOCK_BYTES, Block, Flaw, Member, padding};
use super::{
    Advance, BundleError, CHUNK_BYTES, MANIFEST, MANIFEST_DIGEST, Manifest, digest_line, hex,
};

/// More than the manifest of any model takes.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// A bundle that was read to its end and found whole.
#[derive(Debug)]
pub struct Unpacked {
    /// What is in it.
    pub manifest: Manifest,
    /// The digest of its manifest, and so of everything.
    pub manifest_sha256: String,
}

/// Reads a bundle, checks every digest, and writes its files into an empty directory, if one is
/// given.
///
/// # Errors
/// If anything is not as it was packed. The directory then holds what came before.
pub fn unpack(
    archive: &mut impl Read,
    to: Option<&Path>,
    advance: Advance<'_>,
) -> Result<Unpacked, BundleError> {
    let mut reader = Reader { archive, advance };
    let text = reader.manifest_text()?;
    let manifest = Manifest::parse(&text)?;
    let manifest_sha256 = hex(Sha256::new_with_prefix(&text));
    if let Some(directory) = to {
        write(&directory.join(MANIFEST), &text)?;
    }
    for (index, file) in manifest.files.iter().enumerate() {
        reader.expect(&file.path, file.num_bytes, &manifest, index)?;
        match to {
            Some(directory) => reader.write_file(file, &manifest, directory)?,
            None => reader.copy(file, &mut io::sink()).map_err(CopyError::into_reading)?,
        }
    }
    let line = digest_line(&manifest_sha256);
    reader.expect(MANIFEST_DIGEST, line.len() as u64, &manifest, manifest.files.len())?;
    if reader.text(MANIFEST_DIGEST, line.len() as u64)? != line.as_bytes() {
        return Err(BundleError::Damaged(format!("{MANIFEST} is not what was written")));
    }
    reader.expect_end(&manifest)?;
    Ok(Unpacked { manifest, manifest_sha256 })
}

struct Reader<'a, R> {
    archive: &'a mut R,
    advance: Advance<'a>,
}

/// Which side of a copy failed.
enum CopyError {
    Reading(BundleError),
    Writing(io::Error),
}

impl CopyError {
    /// Of a copy to where nothing can fail.
    fn into_reading(self) -> BundleError {
        match self {
            Self::Reading(error) => error,
            Self::Writing(error) => BundleError::Read(error),
        }
    }
}

impl<R: Read> Reader<'_, R> {
    fn manifest_text(&mut self) -> Result<Vec<u8>, BundleError> {
        let no_bundle = |why: &str| BundleError::NotABundle(why.to_owned());
        match self.header("at its beginning") {
            Ok(Some(member)) if member.path == MANIFEST => {
                if MAX_MANIFEST_BYTES < member.num_bytes {
                    return Err(BundleError::Damaged(format!("{MANIFEST} is too large")));
                }
                self.text(MANIFEST, member.num_bytes)
            }
            Err(BundleError::Read(error)) => Err(BundleError::Read(error)),
            Ok(_) => Err(no_bundle("it does not begin with manifest.json")),
            Err(_) => Err(no_bundle("it does not begin as a tar archive")),
        }
    }

    /// Reads a header that must be this one. The manifest and `num_files_seen` tell what is wrong
    /// with another one.
    fn expect(
        &mut self,
        path: &str,
        num_bytes: u64,
        manifest: &Manifest,
        num_files_seen: usize,
    ) -> Result<(), BundleError> {
        let missing = || BundleError::Damaged(format!("`{}` is missing", path.escape_debug()));
        let member = self.header(&format!("before `{}`", path.escape_debug()))?;
        let member = member.ok_or_else(missing)?;
        if member.path != path {
            return Err(intruder(&member.path, manifest, num_files_seen).unwrap_or_else(missing));
        }
        if member.num_bytes != num_bytes {
            let path = path.escape_debug();
            return Err(BundleError::Damaged(format!("`{path}` has another size")));
        }
        Ok(())
    }

    fn expect_end(&mut self, manifest: &Manifest) -> Result<(), BundleError> {
        if let Some(member) = self.header("before its end")? {
            let error = intruder(&member.path, manifest, manifest.files.len());
            let twice = || BundleError::Hostile(format!("`{}` is there twice", member.path));
            return Err(error.unwrap_or_else(twice));
        }
        self.zeros(BLOCK_BYTES, "at its end")?;
        let mut rest = [0; BLOCK_BYTES];
        loop {
            match self.archive.read(&mut rest).map_err(BundleError::Read)? {
                0 => return Ok(()),
                len if rest[..len].iter().all(|&byte| byte == 0) => {}
                _ => return Err(BundleError::Damaged("something is behind its end".to_owned())),
            }
        }
    }

    /// Reads the next header; none at the end of the archive.
    fn header(&mut self, place: &str) -> Result<Option<Member>, BundleError> {
        let mut block: Block = [0; BLOCK_BYTES];
        self.fill(&mut block, place)?;
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        Member::parse(&block).map(Some).map_err(|flaw| match flaw {
            Flaw::Unreadable => BundleError::Damaged(format!("an unreadable header {place}")),
            Flaw::NotAFile { path, kind } => {
                BundleError::Hostile(format!("`{}` is {kind}", path.escape_debug()))
            }
        })
    }

    fn write_file(
        &mut self,
        file: &File,
        manifest: &Manifest,
        directory: &Path,
    ) -> Result<(), BundleError> {
        let path = directory.join(&file.path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(BundleError::io("make", parent))?;
        }
        let cannot_write = || BundleError::io("write", &path);
        let mut output = fs::File::create_new(&path).map_err(cannot_write())?;
        self.copy(file, &mut output).map_err(|error| match error {
            CopyError::Reading(error) => error,
            CopyError::Writing(error) => cannot_write()(error),
        })?;
        if manifest.program.path.as_ref() == Some(&file.path) {
            let mode = fs::Permissions::from_mode(0o755);
            output.set_permissions(mode).map_err(cannot_write())?;
        }
        output.sync_all().map_err(cannot_write())
    }

    /// Copies a file's bytes, which must have its digest.
    fn copy(&mut self, file: &File, output: &mut impl Write) -> Result<(), CopyError> {
        let path = file.path.escape_debug();
        let place = format!("inside `{path}`");
        let mut hasher = Sha256::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut num_bytes_left = file.num_bytes;
        while num_bytes_left != 0 {
            let len = num_bytes_left.min(CHUNK_BYTES as u64) as usize;
            self.fill(&mut chunk[..len], &place).map_err(CopyError::Reading)?;
            hasher.update(&chunk[..len]);
            output.write_all(&chunk[..len]).map_err(CopyError::Writing)?;
            num_bytes_left -= len as u64;
            (self.advance)(len as u64);
        }
        if hex(hasher) != file.sha256 {
            let text = format!("`{path}` does not have its SHA-256");
            return Err(CopyError::Reading(BundleError::Damaged(text)));
        }
        self.zeros(padding(file.num_bytes), &place).map_err(CopyError::Reading)
    }

    fn text(&mut self, path: &str, num_bytes: u64) -> Result<Vec<u8>, BundleError> {
        let place = format!("inside `{path}`");
        let mut text = vec![0; num_bytes as usize];
        self.fill(&mut text, &place)?;
        self.zeros(padding(num_bytes), &place)?;
        Ok(text)
    }

    /// Reads bytes that must be zero.
    fn zeros(&mut self, len: usize, place: &str) -> Result<(), BundleError> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes, place)?;
        if bytes.iter().any(|&byte| byte != 0) {
            return Err(BundleError::Damaged(format!("bytes that should be zero {place}")));
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8], place: &str) -> Result<(), BundleError> {
        self.archive.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => BundleError::Truncated(place.to_owned()),
            _ => BundleError::Read(error),
        })
    }
}

/// What is wrong with a member that is not the expected one; nothing if it should come later.
fn intruder(path: &str, manifest: &Manifest, num_files_seen: usize) -> Option<BundleError> {
    let shown = path.escape_debug();
    if let Some(problem) = path_problem(path) {
        return Some(BundleError::Hostile(format!("it has a file `{shown}`, which {problem}")));
    }
    match manifest.files.iter().position(|file| file.path == path) {
        Some(index) if index < num_files_seen => {
            Some(BundleError::Hostile(format!("`{shown}` is there twice")))
        }
        Some(_) => None,
        None if path == MANIFEST => Some(BundleError::Hostile(format!("`{shown}` is there twice"))),
        None if path == MANIFEST_DIGEST => None,
        None => Some(BundleError::Hostile(format!("its manifest does not name `{shown}`"))),
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), BundleError> {
    let mut file = fs::File::create_new(path).map_err(BundleError::io("write", path))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    written.map_err(BundleError::io("write", path))
}
