//! The key-value part of a GGUF file, with getters that name the key when something is wrong.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::error::{GgufError, Problem, shown};
use crate::device::MappedFile;

/// A metadata value. Numbers are widened; arrays stay in the file until asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// A 32- or 64-bit float.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// Text.
    String(String),
    /// Values of one type.
    Array {
        /// Their type.
        element: ElementType,
        /// How many.
        len: usize,
        /// Where they are in the file.
        range: Range<usize>,
    },
}

/// The type of a scalar in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// 8 bits, unsigned.
    U8,
    /// 8 bits, signed.
    I8,
    /// 16 bits, unsigned.
    U16,
    /// 16 bits, signed.
    I16,
    /// 32 bits, unsigned.
    U32,
    /// 32 bits, signed.
    I32,
    /// 32-bit float.
    F32,
    /// One byte, zero or one.
    Bool,
    /// Length and UTF-8 bytes.
    String,
    /// 64 bits, unsigned.
    U64,
    /// 64 bits, signed.
    I64,
    /// 64-bit float.
    F64,
}

impl ElementType {
    pub(super) fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::String,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// Bytes per value; for a string the bytes of its length.
    pub(super) fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::String | Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        })
    }
}

impl Value {
    /// Reads a scalar from its bytes, which are as many as its type has. A boolean that is
    /// neither zero nor one, and strings, give nothing.
    pub(super) fn from_scalar(element: ElementType, bytes: &[u8]) -> Option<Self> {
        let mut wide = [0_u8; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(wide);
        Some(match element {
            ElementType::U8 | ElementType::U16 | ElementType::U32 | ElementType::U64 => {
                Self::Unsigned(unsigned)
            }
            ElementType::I8 => Self::Signed((unsigned as i8).into()),
            ElementType::I16 => Self::Signed((unsigned as i16).into()),
            ElementType::I32 => Self::Signed((unsigned as i32).into()),
            ElementType::I64 => Self::Signed(unsigned as i64),
            ElementType::F32 => Self::Float(f32::from_bits(unsigned as u32).into()),
            ElementType::F64 => Self::Float(f64::from_bits(unsigned)),
            ElementType::Bool if unsigned <= 1 => Self::Bool(unsigned == 1),
            ElementType::Bool | ElementType::String => return None,
        })
    }

    fn kind(&self) -> String {
        match self {
            Self::Unsigned(value) => format!("the number {value}"),
            Self::Signed(value) => format!("the number {value}"),
            Self::Float(value) => format!("the number {value}"),
            Self::Bool(value) => format!("{value}"),
            Self::String(_) => "a string".to_owned(),
            Self::Array { element, len, .. } => format!("an array of {len} {element}"),
        }
    }
}

/// Short and on one line; arrays show their length only.
impl fmt::Display for Value {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsigned(value) => write!(formatter, "{value}"),
            Self::Signed(value) => write!(formatter, "{value}"),
            // A 32-bit float prints with its own shortest digits.
            Self::Float(value) if f64::from(*value as f32) == *value => {
                write!(formatter, "{}", *value as f32)
            }
            Self::Float(value) => write!(formatter, "{value}"),
            Self::Bool(value) => write!(formatter, "{value}"),
            Self::String(value) => write!(formatter, "\"{}\"", shown(value)),
            Self::Array { element, len, .. } => write!(formatter, "[{len} × {element}]"),
        }
    }
}

/// A key and its value.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) value: Value,
}

/// The metadata of a model, from its first file.
#[derive(Debug)]
pub struct Metadata {
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
    file: Arc<MappedFile>,
    path: PathBuf,
}

impl Metadata {
    pub(super) fn new(entries: Vec<Entry>, file: Arc<MappedFile>, path: PathBuf) -> Self {
        let index = entries.iter().enumerate().map(|(i, e)| (e.key.clone(), i)).collect();
        Self { entries, index, file, path }
    }

    /// All keys and values in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|entry| (entry.key.as_str(), &entry.value))
    }

    /// The value of a key, if it is there.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&index| &self.entries[index].value)
    }

    /// Whether the key is there.
    pub fn contains(&self, key: &str) -> bool {
        self.index.contains_key(key)
    }

    /// What a getter returns, or nothing when the key is absent. A value of the wrong type is
    /// still an error: `metadata.optional("qwen2.rope.scaling.factor", Metadata::f32)`.
    pub fn optional<'a, T>(
        &'a self,
        key: &str,
        getter: impl FnOnce(&'a Self, &str) -> Result<T, GgufError>,
    ) -> Result<Option<T>, GgufError> {
        if self.contains(key) { getter(self, key).map(Some) } else { Ok(None) }
    }

    /// A number that fits 32 bits.
    pub fn u32(&self, key: &str) -> Result<u32, GgufError> {
        u32::try_from(self.u64(key)?).map_err(|_| self.wrong_type(key, "a number below 2^32"))
    }

    /// A number that is not negative.
    pub fn u64(&self, key: &str) -> Result<u64, GgufError> {
        match *self.required(key)? {
            Value::Unsigned(value) => Ok(value),
            Value::Signed(value) if 0 <= value => Ok(value as u64),
            _ => Err(self.wrong_type(key, "a whole number that is not negative")),
        }
    }

    /// A number, rounded to 32-bit precision.
    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        match *self.required(key)? {
            Value::Float(value) => Ok(value as f32),
            Value::Unsigned(value) => Ok(value as f32),
            Value::Signed(value) => Ok(value as f32),
            _ => Err(self.wrong_type(key, "a number")),
        }
    }

    /// True or false.
    pub fn bool(&self, key: &str) -> Result<bool, GgufError> {
        match *self.required(key)? {
            Value::Bool(value) => Ok(value),
            _ => Err(self.wrong_type(key, "true or false")),
        }
    }

    /// Text.
    pub fn str(&self, key: &str) -> Result<&str, GgufError> {
        match self.required(key)? {
            Value::String(value) => Ok(value),
            _ => Err(self.wrong_type(key, "a string")),
        }
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Vec<String>, GgufError> {
        const EXPECTED: &str = "an array of strings";
        let (element, len, mut bytes) = self.array(key, EXPECTED)?;
        if element != ElementType::String {
            return Err(self.wrong_type(key, EXPECTED));
        }
        let mut strings = Vec::with_capacity(len);
        for _ in 0..len {
            let (text_len, rest) = bytes.split_at(8);
            let text_len = u64::from_le_bytes(text_len.try_into().expect("eight bytes were split"));
            let (text, rest) = rest.split_at(text_len as usize);
            let text = std::str::from_utf8(text).map_err(|_| self.wrong_type(key, EXPECTED))?;
            strings.push(text.to_owned());
            bytes = rest;
        }
        Ok(strings)
    }

    /// An array of whole numbers that fit 32 bits with sign.
    pub fn i32s(&self, key: &str) -> Result<Vec<i32>, GgufError> {
        const EXPECTED: &str = "an array of whole numbers below 2^31";
        self.scalars(key, EXPECTED, |value| match value {
            Value::Unsigned(value) => i32::try_from(value).ok(),
            Value::Signed(value) => i32::try_from(value).ok(),
            _ => None,
        })
    }

    /// An array of whole numbers from zero that fit 32 bits.
    pub fn u32s(&self, key: &str) -> Result<Vec<u32>, GgufError> {
        const EXPECTED: &str = "an array of whole numbers from zero below 2^32";
        self.scalars(key, EXPECTED, |value| match value {
            Value::Unsigned(value) => u32::try_from(value).ok(),
            Value::Signed(value) => u32::try_from(value).ok(),
            _ => None,
        })
    }

    /// An array of numbers, rounded to 32-bit precision.
    pub fn f32s(&self, key: &str) -> Result<Vec<f32>, GgufError> {
        const EXPECTED: &str = "an array of numbers";
        self.scalars(key, EXPECTED, |value| match value {
            Value::Float(value) => Some(value as f32),
            Value::Unsigned(value) => Some(value as f32),
            Value::Signed(value) => Some(value as f32),
            _ => None,
        })
    }

    /// An array of true and false, which some files write as ones and zeros.
    pub fn bools(&self, key: &str) -> Result<Vec<bool>, GgufError> {
        const EXPECTED: &str = "an array of true and false";
        self.scalars(key, EXPECTED, |value| match value {
            Value::Bool(value) => Some(value),
            Value::Unsigned(value @ 0..=1) => Some(value == 1),
            Value::Signed(value @ 0..=1) => Some(value == 1),
            _ => None,
        })
    }

    fn scalars<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(Value) -> Option<T>,
    ) -> Result<Vec<T>, GgufError> {
        let (element, _, bytes) = self.array(key, expected)?;
        if element == ElementType::String {
            return Err(self.wrong_type(key, expected));
        }
        bytes
            .chunks_exact(element.size())
            .map(|chunk| Value::from_scalar(element, chunk).and_then(&convert))
            .collect::<Option<Vec<T>>>()
            .ok_or_else(|| self.wrong_type(key, expected))
    }

    fn array(
        &self,
        key: &str,
        expected: &'static str,
    ) -> Result<(ElementType, usize, &[u8]), GgufError> {
        match self.required(key)? {
            Value::Array { element, len, range } => Ok((*element, *len, &self.file[range.clone()])),
            _ => Err(self.wrong_type(key, expected)),
        }
    }

    fn required(&self, key: &str) -> Result<&Value, GgufError> {
        self.get(key).ok_or_else(|| GgufError::new(&self.path, Problem::MissingKey(key.to_owned())))
    }

    fn wrong_type(&self, key: &str, expected: &'static str) -> GgufError {
        let found = self.get(key).map_or_else(|| "absent".to_owned(), Value::kind);
        GgufError::new(&self.path, Problem::WrongType { key: key.to_owned(), expected, found })
    }
}
