//! Reads everything before the tensors' bytes: counts, metadata, tensor descriptions.
//!
//! **Invariant:** a number from the file is compared with a bound, and a length with what is left
//! of the file, before memory is asked for or an index is formed. What a [`Header`] says about
//! ranges therefore holds for the bytes it was read from.

use std::collections::HashSet;
use std::ops::Range;

use candle_core::quantized::GgmlDType;

use super::error::{Problem, shown};
use super::metadata::{ElementType, Entry, Value};

/// Bounds far above every published model and far below what would hurt.
const MAX_HEADER_BYTES: usize = 256 << 20;
const MAX_METADATA_ENTRIES: u64 = 1 << 16;
const MAX_KEY_BYTES: u64 = 1 << 16;
const MAX_ARRAY_LEN: u64 = 1 << 22;
const MAX_TENSORS: u64 = 1 << 20;
const MAX_DIMENSIONS: u32 = 4;
const MAX_ALIGNMENT: u64 = 1 << 20;

const DEFAULT_ALIGNMENT: u64 = 32;
/// The smallest encodings of an entry and of a tensor description, in bytes.
const MIN_ENTRY_BYTES: usize = 8 + 4 + 1;
const MIN_TENSOR_BYTES: usize = 8 + 4 + 8 + 4 + 8;

/// What stands before the tensors' bytes.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) entries: Vec<Entry>,
    pub(super) tensors: Vec<TensorEntry>,
}

/// One tensor of one file.
#[derive(Debug)]
pub(super) struct TensorEntry {
    pub(super) name: String,
    pub(super) dtype: GgmlDType,
    /// Outermost dimension first.
    pub(super) shape: Vec<usize>,
    /// Where its bytes are in the file.
    pub(super) range: Range<usize>,
}

impl Header {
    /// Reads and checks the header of a whole file's bytes.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Problem> {
        let mut reader = Reader { bytes, position: 0, len: bytes.len() };
        let version = read_version(&mut reader)?;
        let num_tensors = reader.u64("the number of tensors")?;
        let num_entries = reader.u64("the number of metadata entries")?;
        let num_entries =
            reader.count("the number of metadata entries", num_entries, MAX_METADATA_ENTRIES)?;
        reader.expect_room(num_entries, MIN_ENTRY_BYTES, "the metadata")?;
        let num_tensors = reader.count("the number of tensors", num_tensors, MAX_TENSORS)?;
        reader.expect_room(num_tensors, MIN_TENSOR_BYTES, "the tensor descriptions")?;

        let entries = read_entries(&mut reader, num_entries)?;
        let alignment = alignment(&entries)?;
        let descriptions = read_descriptions(&mut reader, num_tensors)?;
        let data_start = reader.position.next_multiple_of(alignment);
        let tensors = descriptions
            .into_iter()
            .map(|description| description.locate(data_start, alignment, bytes.len()))
            .collect::<Result<Vec<_>, _>>()?;
        check_overlaps(&tensors)?;
        Ok(Self { version, entries, tensors })
    }
}

fn read_version(reader: &mut Reader<'_>) -> Result<u32, Problem> {
    let start = &reader.bytes[..reader.len.min(4)];
    if start == b"FUGG" {
        return Err(Problem::BigEndian);
    }
    if start != b"GGUF" {
        let start = if start.is_empty() {
            "nothing: it is empty".to_owned()
        } else {
            format!("`{}`", start.escape_ascii())
        };
        return Err(Problem::NotGguf { start });
    }
    reader.position = 4;
    let version = reader.u32("the version")?;
    match version {
        2 | 3 => Ok(version),
        // A small number whose bytes are the other way round.
        _ if (1..=0xff).contains(&version.swap_bytes()) => Err(Problem::BigEndian),
        _ => Err(Problem::Version(version)),
    }
}

fn read_entries(reader: &mut Reader<'_>, count: usize) -> Result<Vec<Entry>, Problem> {
    let mut entries = Vec::with_capacity(count);
    let mut seen = HashSet::with_capacity(count);
    for index in 0..count {
        let key = reader.text(&format!("the key of metadata entry {index}"), MAX_KEY_BYTES)?;
        let what = format!("the value of `{}`", shown(key));
        if !seen.insert(key) {
            return Err(Problem::Malformed(format!("the key `{}` appears twice", shown(key))));
        }
        let value = read_value(reader, &what)?;
        entries.push(Entry { key: key.to_owned(), value });
    }
    Ok(entries)
}

fn read_value(reader: &mut Reader<'_>, what: &str) -> Result<Value, Problem> {
    const ARRAY: u32 = 9;
    let code = reader.u32(what)?;
    if code == ARRAY {
        return read_array(reader, what);
    }
    let element = ElementType::from_code(code)
        .ok_or_else(|| Problem::Malformed(format!("{what} has the unknown type {code}")))?;
    if element == ElementType::String {
        return Ok(Value::String(reader.text(what, MAX_HEADER_BYTES as u64)?.to_owned()));
    }
    let bytes = reader.take(element.size(), what)?;
    Value::from_scalar(element, bytes)
        .ok_or_else(|| Problem::Malformed(format!("{what} is neither true nor false")))
}

fn read_array(reader: &mut Reader<'_>, what: &str) -> Result<Value, Problem> {
    let code = reader.u32(what)?;
    let element = ElementType::from_code(code).ok_or_else(|| {
        Problem::Malformed(format!("{what} is an array of the unsupported type {code}"))
    })?;
    let len = reader.u64(what)?;
    let len = reader.count(&format!("the length of {what}"), len, MAX_ARRAY_LEN)?;
    reader.expect_room(len, element.size(), what)?;
    let start = reader.position;
    if element == ElementType::String {
        for _ in 0..len {
            reader.text(what, MAX_HEADER_BYTES as u64)?;
        }
    } else {
        let bytes = reader.take(len * element.size(), what)?;
        if element == ElementType::Bool && bytes.iter().any(|&byte| 1 < byte) {
            return Err(Problem::Malformed(format!("{what} is neither true nor false")));
        }
    }
    Ok(Value::Array { element, len, range: start..reader.position })
}

fn alignment(entries: &[Entry]) -> Result<usize, Problem> {
    const KEY: &str = "general.alignment";
    let Some(entry) = entries.iter().find(|entry| entry.key == KEY) else {
        return Ok(DEFAULT_ALIGNMENT as usize);
    };
    let Value::Unsigned(alignment) = entry.value else {
        return Err(Problem::Malformed(format!("`{KEY}` is not an unsigned number")));
    };
    // Eight is the format's own minimum, and what lets tensor bytes be viewed as numbers.
    if !alignment.is_power_of_two() || !(8..=MAX_ALIGNMENT).contains(&alignment) {
        return Err(Problem::Malformed(format!(
            "`{KEY}` is {alignment}, not a power of two from 8 to {MAX_ALIGNMENT}"
        )));
    }
    Ok(alignment as usize)
}

/// A tensor as the file describes it, before its place is known.
struct Description {
    name: String,
    dtype: GgmlDType,
    shape: Vec<usize>,
    num_bytes: usize,
    offset: u64,
}

impl Description {
    fn locate(
        self,
        data_start: usize,
        alignment: usize,
        file_len: usize,
    ) -> Result<TensorEntry, Problem> {
        if !self.offset.is_multiple_of(alignment as u64) {
            return Err(Problem::Malformed(format!(
                "tensor `{}` starts at offset {}, not a multiple of {alignment}",
                shown(&self.name),
                self.offset
            )));
        }
        let start = usize::try_from(self.offset).ok().and_then(|o| o.checked_add(data_start));
        let end = start.and_then(|start| start.checked_add(self.num_bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => Ok(TensorEntry {
                name: self.name,
                dtype: self.dtype,
                shape: self.shape,
                range: start..end,
            }),
            _ => Err(Problem::Truncated {
                what: format!("tensor `{}`", shown(&self.name)),
                len: file_len,
            }),
        }
    }
}

fn read_descriptions(reader: &mut Reader<'_>, count: usize) -> Result<Vec<Description>, Problem> {
    let mut descriptions = Vec::with_capacity(count);
    let mut seen = HashSet::with_capacity(count);
    for index in 0..count {
        let what = format!("the name of tensor {index}");
        let name = reader.text(&what, MAX_KEY_BYTES)?;
        if !seen.insert(name) {
            return Err(Problem::Malformed(format!("tensor `{}` appears twice", shown(name))));
        }
        descriptions.push(read_description(reader, name)?);
    }
    Ok(descriptions)
}

fn read_description(reader: &mut Reader<'_>, name: &str) -> Result<Description, Problem> {
    let what = format!("the description of tensor `{}`", shown(name));
    let malformed = |text: String| Problem::Malformed(format!("tensor `{}` {text}", shown(name)));
    let num_dimensions = reader.u32(&what)?;
    if num_dimensions == 0 || MAX_DIMENSIONS < num_dimensions {
        return Err(malformed(format!(
            "has {num_dimensions} dimensions, not 1 to {MAX_DIMENSIONS}"
        )));
    }
    let mut shape = Vec::with_capacity(num_dimensions as usize);
    let mut num_elements = Some(1_usize);
    for _ in 0..num_dimensions {
        let size = usize::try_from(reader.u64(&what)?).unwrap_or(usize::MAX);
        if size == 0 {
            return Err(malformed("has an empty dimension".to_owned()));
        }
        num_elements = num_elements.and_then(|n| n.checked_mul(size));
        shape.push(size);
    }
    let code = reader.u32(&what)?;
    let dtype = dtype_from_code(code)
        .ok_or_else(|| Problem::UnsupportedType { name: shown(name), dtype: dtype_name(code) })?;
    let row = shape[0];
    if !row.is_multiple_of(dtype.block_size()) {
        return Err(malformed(format!(
            "has rows of {row} values, not a multiple of {} as {dtype:?} needs",
            dtype.block_size()
        )));
    }
    let num_bytes = num_elements
        .and_then(|n| (n / dtype.block_size()).checked_mul(dtype.type_size()))
        .ok_or_else(|| malformed(format!("has the impossible shape {shape:?}")))?;
    shape.reverse();
    let offset = reader.u64(&what)?;
    Ok(Description { name: name.to_owned(), dtype, shape, num_bytes, offset })
}

fn check_overlaps(tensors: &[TensorEntry]) -> Result<(), Problem> {
    let mut order: Vec<&TensorEntry> = tensors.iter().collect();
    order.sort_unstable_by_key(|tensor| tensor.range.start);
    for pair in order.windows(2) {
        if pair[1].range.start < pair[0].range.end {
            return Err(Problem::Malformed(format!(
                "tensors `{}` and `{}` overlap",
                shown(&pair[0].name),
                shown(&pair[1].name)
            )));
        }
    }
    Ok(())
}

/// The type behind ggml's number, if candle reads it.
fn dtype_from_code(code: u32) -> Option<GgmlDType> {
    Some(match code {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        9 => GgmlDType::Q8_1,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        15 => GgmlDType::Q8K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// The number of a type in a file.
pub(super) fn code_of(dtype: GgmlDType) -> u32 {
    const CODES: std::ops::RangeInclusive<u32> = 0..=30;
    let mut codes = CODES.filter(|code| dtype_from_code(*code) == Some(dtype));
    codes.next().expect("every type has a number")
}

/// What ggml calls a type that cannot be read here.
fn dtype_name(code: u32) -> String {
    let name = match code {
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("number {code} (unknown)"),
    };
    name.to_owned()
}

/// Takes little-endian numbers and text off the front of the file.
struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
    len: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8], Problem> {
        let truncated = || Problem::Truncated { what: what.to_owned(), len: self.len };
        let end = self.position.checked_add(count).ok_or_else(truncated)?;
        if MAX_HEADER_BYTES < end && end <= self.len {
            return Err(Problem::TooLarge {
                what: format!("the header, up to {what},"),
                value: end as u64,
                limit: MAX_HEADER_BYTES as u64,
            });
        }
        let taken = self.bytes.get(self.position..end).ok_or_else(truncated)?;
        self.position = end;
        Ok(taken)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Problem> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes were taken")))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Problem> {
        let bytes = self.take(8, what)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes were taken")))
    }

    fn text(&mut self, what: &str, max_bytes: u64) -> Result<&'a str, Problem> {
        let len = self.u64(what)?;
        let remaining = (self.len - self.position) as u64;
        if remaining < len {
            return Err(Problem::Truncated { what: what.to_owned(), len: self.len });
        }
        let len = self.count(&format!("the length of {what}"), len, max_bytes)?;
        std::str::from_utf8(self.take(len, what)?)
            .map_err(|_| Problem::Malformed(format!("{what} is not valid UTF-8")))
    }

    #[expect(clippy::unused_self, reason = "reads as part of taking a number off the file")]
    fn count(&self, what: &str, value: u64, limit: u64) -> Result<usize, Problem> {
        if limit < value {
            return Err(Problem::TooLarge { what: what.to_owned(), value, limit });
        }
        Ok(value as usize)
    }

    /// Refuses counts that cannot fit into what is left of the file.
    fn expect_room(&self, count: usize, size: usize, what: &str) -> Result<(), Problem> {
        let remaining = self.len - self.position;
        if remaining / size < count {
            return Err(Problem::Truncated { what: what.to_owned(), len: self.len });
        }
        Ok(())
    }
}
