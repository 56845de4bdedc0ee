//! Reads files of tensors in the safetensors format.
//!
//! A file is the length of its header, the header as JSON, and the tensors' bytes without gaps. See
//! <https://github.com/huggingface/safetensors>, section "Format".
//!
//! **Invariant:** no file, however damaged or hostile, causes a panic or an allocation out of
//! proportion to its size; every refusal is one line that names the file.

mod header;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};

use super::repository::RepositoryError;
use super::tensor_bytes::TensorBytes;
use crate::device::MappedFile;

/// How the numbers of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ElementType {
    /// Eight bits that are zero or one.
    Bool,
    /// An unsigned byte.
    U8,
    /// A signed byte.
    I8,
    /// Two exponent bits more than `F8E4M3`, one of precision less.
    F8E5M2,
    /// Four bits of exponent and three of mantissa, without infinities.
    F8E4M3,
    /// 16 bits, signed.
    I16,
    /// 16 bits, unsigned.
    U16,
    /// IEEE half precision.
    F16,
    /// The upper half of an `F32`.
    BF16,
    /// 32 bits, signed.
    I32,
    /// 32 bits, unsigned.
    U32,
    /// IEEE single precision.
    F32,
    /// 64 bits, signed.
    I64,
    /// 64 bits, unsigned.
    U64,
    /// IEEE double precision.
    F64,
}

impl ElementType {
    const ALL: [(Self, &'static str, usize); 15] = [
        (Self::Bool, "BOOL", 1),
        (Self::U8, "U8", 1),
        (Self::I8, "I8", 1),
        (Self::F8E5M2, "F8_E5M2", 1),
        (Self::F8E4M3, "F8_E4M3", 1),
        (Self::I16, "I16", 2),
        (Self::U16, "U16", 2),
        (Self::F16, "F16", 2),
        (Self::BF16, "BF16", 2),
        (Self::I32, "I32", 4),
        (Self::U32, "U32", 4),
        (Self::F32, "F32", 4),
        (Self::I64, "I64", 8),
        (Self::U64, "U64", 8),
        (Self::F64, "F64", 8),
    ];

    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, known, _)| *known == name).map(|(kind, ..)| kind)
    }

    fn entry(self) -> (Self, &'static str, usize) {
        let mut all = Self::ALL.into_iter();
        all.find(|(kind, ..)| *kind == self).expect("every type is in the table")
    }

    /// What the format calls it.
    pub fn name(self) -> &'static str {
        self.entry().1
    }

    /// The values of floats; nothing for other types.
    pub(super) fn to_f32(self, bytes: &[u8]) -> Option<Vec<f32>> {
        fn values<const N: usize>(bytes: &[u8], value: fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.as_chunks::<N>().0.iter().map(|bytes| value(*bytes)).collect()
        }
        Some(match self {
            Self::F32 => values(bytes, f32::from_le_bytes),
            Self::F16 => values(bytes, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Self::BF16 => values(bytes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            _ => return None,
        })
    }

    /// Bytes of one number.
    pub fn num_bytes(self) -> usize {
        self.entry().2
    }
}

/// What a tensor is and where its bytes are.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// How its values are stored.
    pub dtype: ElementType,
    /// Its sizes, outermost dimension first; none for a single number.
    pub shape: Vec<usize>,
    range: Range<usize>,
}

impl TensorInfo {
    /// How many bytes it has.
    pub fn num_bytes(&self) -> usize {
        self.range.len()
    }

    /// How many values it has.
    pub fn num_values(&self) -> usize {
        self.range.len() / self.dtype.num_bytes()
    }
}

/// One file, mapped and checked.
#[derive(Debug)]
pub struct Safetensors {
    path: PathBuf,
    file: Arc<MappedFile>,
    tensors: Vec<TensorInfo>,
}

impl Safetensors {
    /// Maps a file and checks its header.
    pub fn open(path: &Path) -> Result<Self, RepositoryError> {
        let file = MappedFile::open(path).map_err(|error| RepositoryError::io(path, &error))?;
        let tensors =
            header::parse(&file).map_err(|problem| RepositoryError::new(path, problem))?;
        Ok(Self { path: path.to_path_buf(), file: Arc::new(file), tensors })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length.
    pub fn num_bytes(&self) -> usize {
        self.file.len()
    }

    /// All tensors, by where they lie.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The bytes of one of this file's tensors.
    pub fn bytes(&self, tensor: &TensorInfo) -> TensorBytes {
        TensorBytes::mapped(Arc::clone(&self.file), tensor.range.clone())
    }

    /// Gives back the memory of all pages read so far; reading on is possible, from the disk.
    pub fn release_pages(&self) {
        self.file.release_pages();
    }
}
