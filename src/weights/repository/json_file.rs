//! A JSON file of a repository, read value by value with errors that name file and key.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::{Problem, RepositoryError};
use crate::weights::gguf::shown;

/// The largest file that is read into memory; a tokenizer has about 10 MB.
const MAX_BYTES: u64 = 256 << 20;
/// The largest description; what is parsed takes many times as much memory.
const MAX_SMALL_BYTES: u64 = 1 << 20;

/// An object in a file.
#[derive(Clone, Debug)]
pub struct JsonFile {
    path: PathBuf,
    value: Value,
}

/// The bytes of a file that is not weights.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, RepositoryError> {
    let io = |error| RepositoryError::io(path, &error);
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() || MAX_BYTES < metadata.len() {
        let problem = Problem::Malformed("not a regular file of at most 256 MiB".to_owned());
        return Err(RepositoryError::new(path, problem));
    }
    std::fs::read(path).map_err(io)
}

impl JsonFile {
    /// Reads a file that describes something small.
    pub fn open_small(path: &Path) -> Result<Self, RepositoryError> {
        let is_small = path.metadata().is_ok_and(|metadata| metadata.len() <= MAX_SMALL_BYTES);
        if path.exists() && !is_small {
            let problem = Problem::Malformed("it has more than 1 MiB".to_owned());
            return Err(RepositoryError::new(path, problem));
        }
        Self::open(path)
    }

    /// Reads a file.
    pub fn open(path: &Path) -> Result<Self, RepositoryError> {
        let bytes = read(path)?;
        let path = path.to_path_buf();
        match serde_json::from_slice(&bytes) {
            Ok(value @ Value::Object(_)) => Ok(Self { path, value }),
            Ok(_) => {
                let problem = Problem::Malformed("it is not a JSON object".to_owned());
                Err(RepositoryError::new(&path, problem))
            }
            Err(error) => {
                let problem = Problem::Malformed(format!("it is not JSON: {error}"));
                Err(RepositoryError::new(&path, problem))
            }
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole object.
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// An object in this one, which errors go on to call by this file's name.
    pub fn object(&self, key: &str) -> Result<Option<Self>, RepositoryError> {
        match &self.value[key] {
            Value::Null => Ok(None),
            value @ Value::Object(_) => {
                Ok(Some(Self { path: self.path.clone(), value: value.clone() }))
            }
            other => Err(self.wrong(key, "an object", other)),
        }
    }

    /// A whole number that must be there.
    pub fn size(&self, key: &str) -> Result<usize, RepositoryError> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    /// A whole number, if there is one.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>, RepositoryError> {
        self.get(key, "a whole number below 2^32", |value| {
            value.as_u64().and_then(|number| u32::try_from(number).ok()).map(|n| n as usize)
        })
    }

    /// A whole number that may be negative, if there is one.
    pub fn optional_i64(&self, key: &str) -> Result<Option<i64>, RepositoryError> {
        self.get(key, "a whole number", Value::as_i64)
    }

    /// A number that must be there.
    pub fn f32(&self, key: &str) -> Result<f32, RepositoryError> {
        self.optional_f32(key)?.ok_or_else(|| self.missing(key))
    }

    /// A number, if there is one.
    pub fn optional_f32(&self, key: &str) -> Result<Option<f32>, RepositoryError> {
        self.get(key, "a number", |value| value.as_f64().map(|number| number as f32))
    }

    /// A number in double precision, if there is one.
    pub fn optional_f64(&self, key: &str) -> Result<Option<f64>, RepositoryError> {
        self.get(key, "a number", Value::as_f64)
    }

    /// Yes or no, if either is said.
    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>, RepositoryError> {
        self.get(key, "true or false", Value::as_bool)
    }

    /// Text that must be there.
    pub fn str(&self, key: &str) -> Result<&str, RepositoryError> {
        self.optional_str(key)?.ok_or_else(|| self.missing(key))
    }

    /// Text, if there is any.
    pub fn optional_str(&self, key: &str) -> Result<Option<&str>, RepositoryError> {
        self.get(key, "a text", Value::as_str)
    }

    /// A refusal of what this file asks for.
    pub fn unsupported(&self, what: impl Display) -> RepositoryError {
        RepositoryError::unsupported(&self.path, what.to_string())
    }

    /// An error in this file's content, given as what goes after "it".
    pub fn complaint(&self, what: &str) -> RepositoryError {
        RepositoryError::new(&self.path, Problem::Malformed(format!("it {what}")))
    }

    /// A value of null counts as absent, as it does where such files are written.
    fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, RepositoryError> {
        match &self.value[key] {
            Value::Null => Ok(None),
            value => convert(value).map(Some).ok_or_else(|| self.wrong(key, expected, value)),
        }
    }

    fn missing(&self, key: &str) -> RepositoryError {
        let text = format!("`{key}` is missing; this is not a complete model");
        RepositoryError::new(&self.path, Problem::Setting(text))
    }

    fn wrong(&self, key: &str, expected: &str, found: &Value) -> RepositoryError {
        let text = format!("`{key}` is {}, but must be {expected}", shown(&found.to_string()));
        RepositoryError::new(&self.path, Problem::Setting(text))
    }
}
