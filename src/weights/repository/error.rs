//! Why a repository cannot be used: always one line, naming the file and what to do.

use std::io;
use std::path::{Path, PathBuf};

/// A repository, or one of its files, that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct RepositoryError {
    /// The file or directory at fault.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: Box<Problem>,
}

impl RepositoryError {
    /// Says which file a problem was found in.
    pub fn new(path: &Path, problem: Problem) -> Self {
        Self { path: path.to_path_buf(), problem: Box::new(problem) }
    }

    /// The operating system refused.
    pub(in crate::weights) fn io(path: &Path, error: &io::Error) -> Self {
        Self::new(path, Problem::Io(error.to_string()))
    }

    /// Something that other programs may run.
    pub fn unsupported(path: &Path, what: impl Into<String>) -> Self {
        Self::new(path, Problem::Unsupported(what.into()))
    }
}

/// What is wrong with a repository.
///
/// Text from a file appears escaped and shortened, so that a message stays one line.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The operating system refused.
    #[error("cannot read the file: {0}; check the path and its permissions")]
    Io(String),
    /// The file ends too early.
    #[error(
        "the file ends after {len} bytes, inside {what}; it is incomplete or damaged, download it \
         again"
    )]
    Truncated {
        /// What was being read.
        what: String,
        /// The file's length.
        len: usize,
    },
    /// A rule of the format is broken.
    #[error("{0}; the file is damaged, download it again")]
    Malformed(String),
    /// A tensor in a type that is not known.
    #[error("tensor `{tensor}` has the type {dtype}, which is not supported")]
    UnsupportedType {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
    },
    /// A tensor is needed but absent.
    #[error("the tensor `{0}` is missing; this is not a complete model of this architecture")]
    MissingTensor(String),
    /// The index names a file that is not there.
    #[error("its file {} is missing; put all files of the repository into one directory", expected.display())]
    MissingFile {
        /// Where it should be.
        expected: PathBuf,
    },
    /// There are no weights.
    #[error("it has no safetensors weights, expected {}", expected.display())]
    NoWeights {
        /// Where they could be.
        expected: PathBuf,
    },
    /// A setting that cannot be followed.
    #[error("{0} is not supported")]
    Unsupported(String),
    /// A value of a JSON file is missing or not what it must be.
    #[error("{0}")]
    Setting(String),
}
