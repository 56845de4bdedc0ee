//! Why there is no bundle, or why one is refused: always one line that says what to do.

use std::io;
use std::path::{Path, PathBuf};

use super::manifest::FORMAT_VERSION;

/// A bundle that cannot be made or used. Names from an archive appear escaped.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The operating system refused.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
    /// The archive cannot be read.
    #[error("cannot read the archive: {0}")]
    Read(#[source] io::Error),
    /// The archive cannot be written.
    #[error("cannot write the archive: {0}")]
    Write(#[source] io::Error),
    /// A file that is not what it was a moment ago.
    #[error("{} changed while it was read; try again when nothing writes to it", .0.display())]
    Changed(PathBuf),
    /// A name that does not fit, or would leave the directory.
    #[error("the file name `{}` cannot be packed: {problem}; rename it", name.escape_debug())]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The file is none of ours.
    #[error("this is no bundle ({0}); pass a file that `qwen-server bundle` wrote")]
    NotABundle(String),
    /// A version that this program does not know.
    #[error(
        "the bundle has format {0}, and this program knows formats up to {FORMAT_VERSION}; use the \
         program in it: tar -xf ARCHIVE qwen-server"
    )]
    Newer(u64),
    /// The archive ends too early.
    #[error("the archive ends early, {0}; copy it again")]
    Truncated(String),
    /// Bytes are not what they were.
    #[error("the archive is damaged: {0}; copy it again, and if that does not help make it anew")]
    Damaged(String),
    /// A member that is not what this program packs: nothing that happens to an archive by itself.
    #[error("the archive is not to be trusted: {0}; get it again from where it was made")]
    Hostile(String),
    /// A directory that something else is in.
    #[error("{} is not empty; name a directory that does not exist yet", .0.display())]
    NotEmpty(PathBuf),
    /// A directory that cannot be put in place in one step.
    #[error("{} {problem}; name a new directory inside of it", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// What an earlier attempt left.
    #[error("{} is left from an unbundle that was interrupted; remove it first", .0.display())]
    Leftover(PathBuf),
}

impl BundleError {
    /// Makes an error of one about a file.
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { what, path, source }
    }
}
