//! `qwen-server pull`: gets a model onto this machine.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use indicatif::HumanBytes;

use super::hub_from_environment;
use super::progress::DownloadProgress;
use crate::weights::catalogue::{Catalogue, DEFAULT_MODEL};
use crate::weights::checkpoint::Checkpoint;
use crate::weights::hub::{Hub, RemoteFile};
use crate::weights::resolve::resolve;

/// Download a model from the Hugging Face hub, or a mirror, into its usual cache.
///
/// An interrupted download goes on where it ended. The SHA-256 of what arrives is checked before
/// it gets its name. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to
/// other Hugging Face tools.
#[derive(Clone, Debug, clap::Args)]
pub struct PullArgs {
    /// What to fetch: a name from `qwen-server models`, with `:QUANTISATION` for another one than
    /// q4_k_m, or a hub id `Org/Name[:QUANTISATION, FILE.gguf or safetensors]`.
    #[arg(value_name = "MODEL", default_value = DEFAULT_MODEL)]
    pub model: String,

    /// Do not download: take this file, check it, and put it where a download would put it.
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: PullArgs) -> anyhow::Result<()> {
    let hub = hub_from_environment()?;
    let PullArgs { model, from } = args;
    let path = if let Some(source) = from {
        install(&model, &source, &hub)?
    } else {
        ensure!(!Path::new(&model).exists(), "`{model}` is a path, and on this machine already");
        resolve(&model, &hub, &mut DownloadProgress::new())?.path
    };
    let checkpoint = Checkpoint::open(&path)?;
    println!(
        "{model} is ready: {}, {} at {}",
        checkpoint.quantization(),
        HumanBytes(checkpoint.num_file_bytes()),
        path.display()
    );
    Ok(())
}

/// Puts a file from elsewhere into the cache, as the catalogue's file of the same digest.
fn install(model: &str, source: &Path, hub: &Hub) -> anyhow::Result<PathBuf> {
    let catalogue = Catalogue::builtin();
    let selection = catalogue.select(model)?;
    let names = selection.file_names();
    let source_name = source.file_name().map(|name| name.to_string_lossy().to_lowercase());
    let index = match names.len() {
        1 => 0,
        _ => names
            .iter()
            .position(|name| Some(name) == source_name.as_ref())
            .with_context(|| format!("`{model}` is in several files: {}", names.join(", ")))?,
    };
    let sha256 = selection.file.sha256.get(index).map(String::as_str);
    ensure!(
        sha256.is_some(),
        "the SHA-256 of `{model}` is not known, so the file cannot be checked; pass its path to \
         --model instead"
    );
    let file = RemoteFile { repo: &selection.release.repo, name: &names[index], sha256 };
    let revision = selection.release.revision.as_deref().unwrap_or("local");
    Ok(hub.install(file, revision, source)?)
}
