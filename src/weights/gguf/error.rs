//! Why a GGUF file cannot be used: always one line, naming the file and what to do.

use std::io;
use std::path::{Path, PathBuf};

/// A GGUF file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct GgufError {
    /// The file at fault.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: Box<Problem>,
}

impl GgufError {
    /// Says which file a problem was found in.
    pub fn new(path: &Path, problem: Problem) -> Self {
        Self { path: path.to_path_buf(), problem: Box::new(problem) }
    }
}

/// What is wrong with a GGUF file.
///
/// Text from the file appears escaped and shortened, so that a message stays one line.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The operating system refused.
    #[error("cannot read the file: {0}; check the path and its permissions")]
    Io(io::Error),
    /// The magic number is missing.
    #[error(
        "not a GGUF file (it starts with {start}); pass a .gguf file, a directory that holds one, \
         or a name from `qwen-server models`"
    )]
    NotGguf {
        /// The first bytes, escaped.
        start: String,
    },
    /// The numbers are stored the other way round.
    #[error("a big-endian GGUF file; convert it to little-endian first")]
    BigEndian,
    /// Neither version 2 nor 3.
    #[error("GGUF version {0}, but versions 2 and 3 are supported; convert the model again")]
    Version(u32),
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
    /// A count or length beyond reason.
    #[error("{what} is {value}, at most {limit} is supported; the file is damaged or hostile")]
    TooLarge {
        /// Which number.
        what: String,
        /// The number.
        value: u64,
        /// The bound.
        limit: u64,
    },
    /// A rule of the format is broken.
    #[error("{0}; the file is damaged, download it again")]
    Malformed(String),
    /// A tensor in a format that cannot be read.
    #[error(
        "tensor `{name}` has type {dtype}, which is not supported; use a file quantised as Q4_K_M, \
         Q5_K_M, Q6_K, Q8_0, Q4_0 or F16"
    )]
    UnsupportedType {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// A metadata key is needed but absent.
    #[error("the metadata key `{0}` is missing; this is not a complete model file")]
    MissingKey(String),
    /// A metadata value of another type than needed.
    #[error(
        "the metadata key `{key}` is {found}, but {expected} is needed; convert the model again"
    )]
    WrongType {
        /// The key.
        key: String,
        /// What is needed.
        expected: &'static str,
        /// What the file has.
        found: String,
    },
    /// A tensor is needed but absent.
    #[error("the tensor `{0}` is missing; this is not a complete model file of this architecture")]
    MissingTensor(String),
    /// A part of a split model is absent.
    #[error(
        "part {part} of {count} of this split model is missing, expected at {}; put all parts into \
         one directory", expected.display()
    )]
    MissingPart {
        /// Which part, from one.
        part: usize,
        /// How many there are.
        count: usize,
        /// Where it should be.
        expected: PathBuf,
    },
    /// The parts do not belong together.
    #[error("{0}; put the parts of one release, with their names unchanged, into one directory")]
    Split(String),
}

/// Text from a file as it may appear in a message: escaped and short.
pub(crate) fn shown(text: &str) -> String {
    const MAX_CHARS: usize = 60;
    let start = text.char_indices().nth(MAX_CHARS).map_or(text, |(end, _)| &text[..end]);
    let mut shown = printable(start);
    if start.len() < text.len() {
        shown.push('…');
    }
    shown
}

/// Text from a file with everything escaped that could steer a terminal or break a line.
pub fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '"' | '\'' => printable.push(character),
            _ => printable.extend(character.escape_debug()),
        }
    }
    printable
}
