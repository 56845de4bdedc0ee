//! `qwen-server unbundle`: checks a bundle and installs it.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::bundle::{shell_word, summary};
use super::progress::bytes_bar;
use crate::bundle::{Manifest, install, unpack};
use crate::weights::gguf::printable;

const AFTER_HELP: &str = "\
Examples:
  qwen-server unbundle qwen.tar --verify           check it and write nothing
  qwen-server unbundle qwen.tar --to /opt/qwen     check it and install it";

/// Check and install what `qwen-server bundle` packed, without a network
///
/// Every SHA-256 is checked. An archive that is damaged, incomplete or holds anything else leaves
/// nothing behind. The digest that is printed last is that of the manifest, and so of everything:
/// if it is the one that `bundle` printed, these are the same files.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct UnbundleArgs {
    /// The archive
    #[arg(value_name = "ARCHIVE")]
    archive: PathBuf,

    /// Directory to install into; it must not exist yet, or be empty
    #[arg(long, value_name = "DIR", required_unless_present = "verify")]
    to: Option<PathBuf>,

    /// Only check the archive, and write nothing
    #[arg(long, conflicts_with = "to")]
    verify: bool,
}

/// Runs the command.
///
/// # Errors
/// If the archive is not a whole bundle, or the directory cannot be used.
pub fn run(args: &UnbundleArgs) -> Result<()> {
    let path = &args.archive;
    let cannot_read = || format!("cannot read {}", path.display());
    let mut archive = File::open(path).with_context(cannot_read)?;
    let num_bytes = archive.metadata().with_context(cannot_read)?.len();
    let action = if args.to.is_some() { "installing" } else { "checking" };
    let bar = bytes_bar(action, num_bytes);
    let mut advance = |num_bytes| bar.inc(num_bytes);
    let unpacked = match &args.to {
        Some(directory) => install(&mut archive, directory, &mut advance),
        None => unpack(&mut archive, None, &mut advance),
    };
    bar.finish_and_clear();
    let unpacked = unpacked.with_context(|| path.display().to_string())?;
    let manifest = &unpacked.manifest;
    let created = printable(&manifest.created);
    println!("{}: {}, of {created}, is whole", path.display(), summary(manifest));
    println!("manifest sha256 {}", unpacked.manifest_sha256);
    if let Some(directory) = &args.to {
        println!("{}", start_command(directory, manifest));
    }
    Ok(())
}

/// The command line that serves what was installed.
fn start_command(directory: &Path, manifest: &Manifest) -> String {
    // A path without a slash would be looked up among the system's programs.
    let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.to_path_buf());
    let word = |path: &str| shell_word(&directory.join(path).to_string_lossy());
    let program = manifest.program.path.as_deref().map_or("qwen-server".to_owned(), word);
    let model = word(&manifest.model.path);
    let name = shell_word(&printable(&manifest.model.name));
    format!("{program} serve --model {model} --served-model-name {name}")
}
