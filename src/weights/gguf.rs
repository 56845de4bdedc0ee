//! Reads model files in the GGUF format, versions 2 and 3.
//!
//! [`Gguf::open`] maps the file (or all files of a split model) and checks every count, length,
//! offset and name, so that what it returns can be used without further checks. Tensor bytes are
//! slices of the mapping: nothing is copied or dequantised here.
//!
//! **Invariant:** no file, however damaged or hostile, causes a panic or an allocation out of
//! proportion to its size; every refusal is one line that names the file.

mod error;
mod header;
mod metadata;
#[cfg(test)]
mod tests;
pub(crate) mod writer;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::GgmlDType;

pub use error::{GgufError, Problem, printable};
use header::Header;
pub use metadata::{ElementType, Metadata, Value};

use crate::device::MappedFile;
use error::shown;

/// More parts than any published model has.
const MAX_PARTS: u64 = 1024;

/// A model in one or several GGUF files, mapped and checked.
#[derive(Debug)]
pub struct Gguf {
    parts: Vec<Part>,
    version: u32,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
}

/// What a tensor is and where its bytes are.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// How its values are stored.
    pub dtype: GgmlDType,
    /// Its sizes, outermost dimension first: `[rows, columns]`.
    pub shape: Vec<usize>,
    /// How many bytes it has.
    pub num_bytes: usize,
    part: usize,
    range: Range<usize>,
}

/// The bytes of a tensor, for whoever keeps using them from the mapping.
#[derive(Clone, Debug)]
pub struct TensorBytes {
    file: Arc<MappedFile>,
    range: Range<usize>,
}

impl TensorBytes {
    /// Part `index` of as many equal ones.
    #[must_use]
    pub fn part(&self, index: usize, count: usize) -> Self {
        let len = self.range.len() / count;
        let start = self.range.start + index * len;
        Self { file: Arc::clone(&self.file), range: start..start + len }
    }
}

impl AsRef<[u8]> for TensorBytes {
    fn as_ref(&self) -> &[u8] {
        &self.file[self.range.clone()]
    }
}

#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: Arc<MappedFile>,
}

impl Gguf {
    /// Opens a file. One part of a split model (`…-00001-of-00003.gguf`) opens all its parts,
    /// which lie in the same directory.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let first_path = first_part(path);
        let (first, header) = open_part(&first_path)?;
        let mut gguf = Self {
            version: header.version,
            metadata: Metadata::new(header.entries, Arc::clone(&first.file), first_path.clone()),
            parts: Vec::new(),
            tensors: Vec::new(),
            index: HashMap::new(),
        };
        gguf.add_part(first, header.tensors)?;
        let num_parts = gguf.metadata.optional("split.count", Metadata::u64)?.unwrap_or(1);
        if 1 < num_parts {
            gguf.open_other_parts(&first_path, num_parts)?;
        }
        Ok(gguf)
    }

    /// The model's metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// What the file calls its quantisation, such as `Q4_K_M`; otherwise the type that most of
    /// its bytes have.
    pub fn quantization(&self) -> String {
        let stated = self.metadata.u32("general.file_type").ok().and_then(file_type_name);
        if let Some(stated) = stated {
            return stated.to_owned();
        }
        let mut num_bytes: HashMap<GgmlDType, usize> = HashMap::new();
        for tensor in &self.tensors {
            *num_bytes.entry(tensor.dtype).or_default() += tensor.num_bytes;
        }
        let largest = num_bytes.into_iter().max_by_key(|&(dtype, n)| (n, dtype_name(dtype)));
        largest.map_or("none", |(dtype, _)| dtype_name(dtype)).to_owned()
    }

    /// The files, in order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|part| part.path.as_path())
    }

    /// The size of all files.
    pub fn num_file_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.file.len()).sum()
    }

    /// All tensors in the files' order.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// Whether there is a tensor of this name.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// A tensor and its bytes in the mapping.
    pub fn tensor(&self, name: &str) -> Result<(&TensorInfo, &[u8]), GgufError> {
        let Some(&index) = self.index.get(name) else {
            let problem = Problem::MissingTensor(name.to_owned());
            return Err(GgufError::new(&self.parts[0].path, problem));
        };
        let info = &self.tensors[index];
        Ok((info, &self.parts[info.part].file[info.range.clone()]))
    }

    /// The same as a handle that keeps the mapping alive without this [`Gguf`].
    pub fn shared_tensor(&self, name: &str) -> Result<(&TensorInfo, TensorBytes), GgufError> {
        let (info, _) = self.tensor(name)?;
        let file = Arc::clone(&self.parts[info.part].file);
        Ok((info, TensorBytes { file, range: info.range.clone() }))
    }

    /// Gives back the memory of all pages read so far; reading on is possible, from the disk.
    pub fn release_pages(&self) {
        for part in &self.parts {
            part.file.release_pages();
        }
    }

    /// The same for one tensor, as soon as its bytes have been copied elsewhere.
    pub fn release_tensor(&self, info: &TensorInfo) {
        self.parts[info.part].file.release_range(info.range.clone());
    }

    fn open_other_parts(&mut self, first_path: &Path, num_parts: u64) -> Result<(), GgufError> {
        let split = |text: String| GgufError::new(first_path, Problem::Split(text));
        if MAX_PARTS < num_parts {
            return Err(split(format!("it claims to be split into {num_parts} parts")));
        }
        let count = num_parts as usize;
        let Some(name) = PartName::parse(first_path).filter(|name| name.count == count) else {
            return Err(split(format!(
                "it is part of a model in {count} parts, but is not named like \
                 `…-00001-of-{count:05}.gguf`"
            )));
        };
        if self.metadata.optional("split.no", Metadata::u64)?.is_some_and(|number| number != 0) {
            return Err(split("it is named as the first part, but is another one".to_owned()));
        }
        for number in 2..=count {
            let path = name.path(number);
            if !path.exists() {
                let problem = Problem::MissingPart { part: number, count, expected: path };
                return Err(GgufError::new(first_path, problem));
            }
            let (part, header) = open_part(&path)?;
            let wrong = |key: &str, expected: u64| {
                let mut entries = header.entries.iter();
                entries.any(|e| e.key == key && e.value != Value::Unsigned(expected))
            };
            if wrong("split.no", number as u64 - 1) || wrong("split.count", num_parts) {
                let text = format!("it does not say that it is part {number} of {count}");
                return Err(GgufError::new(&path, Problem::Split(text)));
            }
            self.add_part(part, header.tensors)?;
        }
        let expected = self.metadata.optional("split.tensors.count", Metadata::u64)?;
        let found = self.tensors.len() as u64;
        match expected {
            Some(expected) if expected != found => {
                Err(split(format!("the model has {expected} tensors, but its parts hold {found}")))
            }
            _ => Ok(()),
        }
    }

    fn add_part(&mut self, part: Part, tensors: Vec<header::TensorEntry>) -> Result<(), GgufError> {
        for tensor in tensors {
            let index = self.tensors.len();
            if self.index.insert(tensor.name.clone(), index).is_some() {
                let text = format!("tensor `{}` is in another part too", shown(&tensor.name));
                return Err(GgufError::new(&part.path, Problem::Split(text)));
            }
            self.tensors.push(TensorInfo {
                name: tensor.name,
                dtype: tensor.dtype,
                shape: tensor.shape,
                num_bytes: tensor.range.len(),
                part: self.parts.len(),
                range: tensor.range,
            });
        }
        self.parts.push(part);
        Ok(())
    }
}

fn open_part(path: &Path) -> Result<(Part, Header), GgufError> {
    let file = MappedFile::open(path).map_err(|error| GgufError::new(path, Problem::Io(error)))?;
    let header = Header::parse(&file).map_err(|problem| GgufError::new(path, problem))?;
    Ok((Part { path: path.to_path_buf(), file: Arc::new(file) }, header))
}

/// The name that ggml gives a type.
pub fn dtype_name(dtype: GgmlDType) -> &'static str {
    match dtype {
        GgmlDType::F32 => "F32",
        GgmlDType::F16 => "F16",
        GgmlDType::BF16 => "BF16",
        GgmlDType::Q4_0 => "Q4_0",
        GgmlDType::Q4_1 => "Q4_1",
        GgmlDType::Q5_0 => "Q5_0",
        GgmlDType::Q5_1 => "Q5_1",
        GgmlDType::Q8_0 => "Q8_0",
        GgmlDType::Q8_1 => "Q8_1",
        GgmlDType::Q2K => "Q2_K",
        GgmlDType::Q3K => "Q3_K",
        GgmlDType::Q4K => "Q4_K",
        GgmlDType::Q5K => "Q5_K",
        GgmlDType::Q6K => "Q6_K",
        GgmlDType::Q8K => "Q8_K",
    }
}

/// The name behind `general.file_type`.
fn file_type_name(number: u32) -> Option<&'static str> {
    Some(match number {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        32 => "BF16",
        _ => return None,
    })
}

/// The first part of the split model that a path belongs to, or the path itself.
pub fn first_part(path: &Path) -> PathBuf {
    match PartName::parse(path) {
        Some(name) if name.number != 1 => {
            let first = name.path(1);
            if first.exists() { first } else { path.to_path_buf() }
        }
        _ => path.to_path_buf(),
    }
}

/// The number of a path in its split model and how many parts that has, as its name says.
pub fn part_of(path: &Path) -> Option<(usize, usize)> {
    PartName::parse(path).map(|name| (name.number, name.count))
}

/// `stem-00001-of-00003.gguf`, taken apart.
struct PartName<'a> {
    directory: &'a Path,
    stem: &'a str,
    number: usize,
    count: usize,
}

impl<'a> PartName<'a> {
    fn parse(path: &'a Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = name.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let parse = |digits: &str| {
            let is_number = digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
            if is_number { digits.parse::<usize>().ok() } else { None }
        };
        let (number, count) = (parse(number)?, parse(count)?);
        let directory = path.parent().unwrap_or(Path::new(""));
        (1..=count).contains(&number).then_some(Self { directory, stem, number, count })
    }

    fn path(&self, number: usize) -> PathBuf {
        self.directory.join(format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.count))
    }
}
