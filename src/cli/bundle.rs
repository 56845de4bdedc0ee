//! `qwen-server bundle`: a model and this program in one file, for machines without a network.

use std::fs::{self, File};
use std::io::{BufWriter, IntoInnerError};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use indicatif::HumanBytes;

use super::progress::bytes_bar;
use super::{Hinted, find_here};
use crate::access::Timestamp;
use crate::bundle::manifest::{FORMAT_VERSION, License, Model, Program};
use crate::bundle::{Manifest, Source, pack};
use crate::config::{self, DEFAULT_MODEL};
use crate::models::{ModelConfig, registry};
use crate::weights::checkpoint::{self, Checkpoint};
use crate::weights::gguf::{Gguf, printable};
use crate::weights::repository::{Repository, is_repository_file};
use crate::weights::resolve::ResolvedModel;

/// What the program is called in a bundle.
const PROGRAM: &str = "qwen-server";
/// The directory of the model's files in a bundle.
const MODEL: &str = "model";

const AFTER_HELP: &str = "\
Examples:
  On a machine with a network:
    qwen-server pull qwen2.5-7b-instruct
    qwen-server bundle --model qwen2.5-7b-instruct qwen.tar

  On one without, which has nothing yet:
    tar -xf qwen.tar qwen-server
    ./qwen-server unbundle qwen.tar --to /opt/qwen";

/// Pack a model and this program into one file, for a machine without a network
///
/// The file is a tar archive: a manifest with the size and SHA-256 of everything and the licences of
/// model and program, this program, and the model's files. `qwen-server unbundle` checks and
/// installs it. Nothing is downloaded: the model must be on this machine.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct BundleArgs {
    /// Model to pack, as `serve --model` takes it: a name that was pulled, a file or a directory
    #[arg(long, env = "QWEN_SERVER_MODEL", default_value = DEFAULT_MODEL)]
    model: String,

    /// The archive to write; it must not exist yet
    #[arg(value_name = "OUT.tar")]
    output: PathBuf,

    /// Leave the program out: the other machine has it, or needs one that was built for it
    #[arg(long)]
    without_binary: bool,

    /// Replace the archive if it exists
    #[arg(long)]
    force: bool,
}

/// Runs the command.
///
/// # Errors
/// If there is no such model, not all of it is here, or the archive cannot be written; nothing is
/// left of it then.
pub fn run(args: BundleArgs) -> Result<()> {
    let BundleArgs { model, output, without_binary, force } = args;
    refuse_existing(&output, force)?;
    let resolved = find_here(&model)?;
    let checkpoint = Checkpoint::open(&resolved.path)?;
    registry::check_architecture(&ModelConfig::architecture_of(&checkpoint)?)?;
    let (model, mut sources) = describe(&resolved, &checkpoint)?;
    // Its pages are read once more, in order.
    drop(checkpoint);
    if !without_binary {
        let file = config::own_program().context("cannot find this program's own file")?;
        sources.insert(0, Source { file, path: PROGRAM.to_owned() });
    }
    refuse_source(&output, &sources)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let mut manifest = Manifest {
        format_version: FORMAT_VERSION,
        created: Timestamp(now).to_string(),
        program: Program {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            license: env!("CARGO_PKG_LICENSE").to_owned(),
            path: (!without_binary).then(|| PROGRAM.to_owned()),
        },
        model,
        files: Vec::new(),
    };
    let digest = write(&output, &mut manifest, &sources, force)?;
    report(&output, &manifest, &digest);
    Ok(())
}

fn report(output: &Path, manifest: &Manifest, digest: &str) {
    let num_bytes = manifest.files.iter().map(|file| file.num_bytes).sum();
    println!("{}: {}, {}", output.display(), summary(manifest), HumanBytes(num_bytes));
    println!("manifest sha256 {digest}");
    if manifest.model.license.summary().is_none() {
        eprintln!("the model's files do not tell its licence; find out before you pass it on");
    }
    let name = shell_word(&output.file_name().unwrap_or_default().to_string_lossy());
    let program = if manifest.program.path.is_some() {
        eprintln!("on the other machine:\n  tar -xf {name} {PROGRAM}");
        "./qwen-server"
    } else {
        eprintln!("on the other machine:");
        "qwen-server"
    };
    eprintln!("  {program} unbundle {name} --to DIRECTORY");
}

/// What a bundle holds, in a few words.
pub(super) fn summary(manifest: &Manifest) -> String {
    let Manifest { model, program, .. } = manifest;
    let license = model.license.summary().unwrap_or_else(|| "licence unknown".to_owned());
    let program = match program.path {
        Some(_) => format!("with qwen-server {}", printable(&program.version)),
        None => "without the program".to_owned(),
    };
    let (name, quantization) = (printable(&model.name), printable(&model.quantization));
    format!("{name} {quantization} ({}), {program}", printable(&license))
}

/// A text as one word of a shell's command line.
pub(super) fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+:@%=,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn refuse_existing(output: &Path, force: bool) -> Result<()> {
    let path = output.display();
    ensure!(!output.is_dir(), "{path} is a directory; name a file in it, such as bundle.tar");
    if output.exists() && !force {
        let message = format!("{path} exists already");
        let hint = "name another file, or replace it with --force".to_owned();
        return Err(Hinted { message, hint }.into());
    }
    Ok(())
}

/// An archive must not take the place of what is in it.
fn refuse_source(output: &Path, sources: &[Source]) -> Result<()> {
    let Ok(path) = output.canonicalize() else { return Ok(()) };
    let is_same = |source: &Source| source.file.canonicalize().is_ok_and(|file| file == path);
    ensure!(
        !sources.iter().any(is_same),
        "{} is one of the files to be packed; name another file",
        output.display()
    );
    Ok(())
}

/// The model and its files: all that are read when it is served.
fn describe(resolved: &ResolvedModel, checkpoint: &Checkpoint) -> Result<(Model, Vec<Source>)> {
    let mut license = License {
        catalogue: resolved.entry.as_ref().map(|entry| entry.model.license.clone()),
        ..License::default()
    };
    let (path, sources) = match checkpoint.source() {
        checkpoint::Source::Gguf(gguf) => {
            let stated = |key| gguf.metadata().str(key).ok().map(str::to_owned);
            license.stated = stated("general.license");
            license.stated_name = stated("general.license.name");
            license.stated_link = stated("general.license.link");
            gguf_files(gguf)?
        }
        checkpoint::Source::Repository(repository) => {
            let last = resolved.name.rsplit('/').next().unwrap_or_default();
            let folder = format!("{MODEL}/{last}");
            let sources = repository_files(repository, &folder)?;
            let is_license = |source: &&Source| is_license(&source.path[folder.len() + 1..]);
            let paths = sources.iter().filter(is_license).map(|source| source.path.clone());
            license.files = paths.collect();
            (folder, sources)
        }
    };
    let quantization = checkpoint.quantization();
    Ok((Model { name: resolved.name.clone(), quantization, path, license }, sources))
}

/// The first part's path in the bundle, and all parts.
fn gguf_files(gguf: &Gguf) -> Result<(String, Vec<Source>)> {
    let source = |file: &Path| {
        let name = file.file_name().and_then(|name| name.to_str());
        let name = name.with_context(|| format!("the name of {} is not UTF-8", file.display()))?;
        Ok(Source { file: file.to_path_buf(), path: format!("{MODEL}/{name}") })
    };
    let sources = gguf.paths().map(source).collect::<Result<Vec<Source>>>()?;
    Ok((sources[0].path.clone(), sources))
}

/// What `pull` would fetch of a repository, without weights that nothing refers to, and licences.
fn repository_files(repository: &Repository, folder: &str) -> Result<Vec<Source>> {
    let directory = repository.directory();
    let mut sources = Vec::new();
    for entry in fs::read_dir(directory)? {
        let file = entry?.path();
        let Some(name) = file.file_name().and_then(|name| name.to_str()) else { continue };
        let is_weights = name.ends_with(".safetensors");
        let is_read = is_repository_file(name) && !is_weights
            || repository.paths().any(|path| path == file)
            || is_license(name);
        if is_read && file.is_file() {
            let path = format!("{folder}/{name}");
            sources.push(Source { file, path });
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(sources)
}

fn is_license(name: &str) -> bool {
    let name = name.to_lowercase();
    ["license", "licence", "notice", "copying"].iter().any(|start| name.starts_with(start))
}

/// Writes the archive beside its place, and moves it there when it is on the disk.
fn write(
    output: &Path,
    manifest: &mut Manifest,
    sources: &[Source],
    force: bool,
) -> Result<String> {
    let mut partial = output.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = write_all(&partial, manifest, sources).and_then(|digest| {
        // Somebody else may have been faster.
        refuse_existing(output, force)?;
        fs::rename(&partial, output)?;
        Ok(digest)
    });
    if written.is_err() {
        // Best effort: what is left is named as incomplete.
        let _ = fs::remove_file(&partial);
    }
    written
}

fn write_all(partial: &Path, manifest: &mut Manifest, sources: &[Source]) -> Result<String> {
    let sizes = sources.iter().map(|source| fs::metadata(&source.file).map_or(0, |m| m.len()));
    let bar = bytes_bar("packing", sizes.sum());
    let file =
        File::create(partial).with_context(|| format!("cannot write {}", partial.display()))?;
    let mut file = BufWriter::new(file);
    let digest = pack(&mut file, manifest, sources, &mut |num_bytes| bar.inc(num_bytes))?;
    file.into_inner().map_err(IntoInnerError::into_error)?.sync_all()?;
    bar.finish_and_clear();
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(shell_word("/opt/qwen-2.5/a_b"), "/opt/qwen-2.5/a_b");
        assert_eq!(shell_word("a b"), "'a b'");
        assert_eq!(shell_word("a';rm x;'"), r"'a'\'';rm x;'\'''");
        assert_eq!(shell_word("$HOME"), "'$HOME'");
        assert_eq!(shell_word(""), "''");
    }
}
