//! Why a file could not be fetched, and what to do instead.

use std::io;
use std::path::{Path, PathBuf};

/// Something that the hub was needed for did not work.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {reason}")]
pub struct HubError {
    /// What was to be done.
    pub what: String,
    /// Why it could not be.
    pub reason: Reason,
}

const ALTERNATIVES: &str = "set HF_ENDPOINT to a mirror, or copy the file to this machine and pass \
                            its path: `--model PATH`";

/// Why something did not work.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// The network may not be used.
    #[error(
        "HF_HUB_OFFLINE is set and it is not in the cache {}; unset it, set HF_HOME to another \
         cache, or pass a path: `--model PATH`", cache_dir.display()
    )]
    Offline {
        /// The cache that was searched.
        cache_dir: PathBuf,
    },
    /// No connection.
    #[error("{endpoint} cannot be reached ({cause}); {ALTERNATIVES}")]
    Unreachable {
        /// The address that was tried.
        endpoint: String,
        /// What the network said.
        cause: String,
    },
    /// The connection breaks again and again.
    #[error(
        "the download broke off repeatedly ({cause}); run it again to go on where it ended, or \
         {ALTERNATIVES}"
    )]
    Interrupted {
        /// What the network said.
        cause: String,
    },
    /// The repository needs consent.
    #[error(
        "`{repo}` is gated; accept its licence on its page, then set HF_TOKEN to a token of your \
         account"
    )]
    Gated {
        /// The repository.
        repo: String,
    },
    /// The repository does not exist, or not for this user.
    #[error(
        "`{repo}` does not exist or is private; check the name, or set HF_TOKEN to {}",
        if *has_token { "a token that may read it" } else { "a token of your account" }
    )]
    Unauthorized {
        /// The repository.
        repo: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// The repository is there, the file is not.
    #[error("there is no such file (404); {}", available_hint(available))]
    NoSuchFile {
        /// The GGUF files of the repository.
        available: Vec<String>,
    },
    /// Nothing is there.
    #[error("{endpoint} does not have it (404); check the name, or {ALTERNATIVES}")]
    NotFound {
        /// The address that was asked.
        endpoint: String,
    },
    /// Another refusal.
    #[error("{endpoint} answered with status {status}; try again later, or {ALTERNATIVES}")]
    Status {
        /// The address that was asked.
        endpoint: String,
        /// Its answer.
        status: u16,
    },
    /// Not what a hub answers.
    #[error("the answer makes no sense: {0}; is HF_ENDPOINT the address of a hub?")]
    BadAnswer(String),
    /// The hub has another file than expected.
    #[error(
        "the hub serves another file than this program knows (SHA-256 {served}, expected {known}); \
         if the release was updated, ask for the file itself: `Org/Name:FILE.gguf`"
    )]
    OtherFile {
        /// The expected digest.
        known: String,
        /// The hub's digest.
        served: String,
    },
    /// The bytes are not the expected ones.
    #[error(
        "the bytes have the SHA-256 {found}, expected {expected}; they were damaged or tampered \
         with and were discarded, try again"
    )]
    Digest {
        /// What they should have.
        expected: String,
        /// What they have.
        found: String,
    },
    /// The file is longer than it should be.
    #[error("more bytes arrived than the {expected} announced; they were discarded, try again")]
    TooLong {
        /// The announced size.
        expected: u64,
    },
    /// A name that cannot be a repository or file.
    #[error("that is not a repository `Org/Name` and a file in it")]
    BadName,
    /// A proxy that cannot be used.
    #[error("the proxy `{0}` is not supported; HTTPS_PROXY takes `http://host:port`")]
    BadProxy(String),
    /// The disk refused.
    #[error(
        "cannot write {}: {source}; check permissions and free space, or set HF_HOME to another \
         place", path.display()
    )]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Reason {
    pub(super) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Write { path, source }
    }

    pub(super) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Read { path, source }
    }
}

fn available_hint(available: &[String]) -> String {
    const SHOWN: usize = 12;
    if available.is_empty() {
        return "the repository holds no .gguf files, look for one whose name ends in -GGUF"
            .to_owned();
    }
    let more = available.len().saturating_sub(SHOWN);
    let shown = available.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if more == 0 { format!("it has {shown}") } else { format!("it has {shown} and {more} more") }
}
