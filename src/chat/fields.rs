//! Reads JSON objects field by field; what is wrong with one is said with its path.

use serde_json::{Map, Value};

use crate::chat::prompt::PromptError;

/// An object and where in the request it is.
#[derive(Clone, Debug)]
pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    /// The object `value` at `path`.
    pub(super) fn of(value: &'a Value, path: impl Into<String>) -> Result<Self, PromptError> {
        let path = path.into();
        match value {
            Value::Object(object) => Ok(Self { object, path }),
            _ => Err(PromptError::invalid(path, "expected an object")),
        }
    }

    pub(super) fn new(object: &'a Map<String, Value>, path: impl Into<String>) -> Self {
        Self { object, path: path.into() }
    }

    pub(super) fn path(&self) -> &str {
        &self.path
    }

    pub(super) fn path_of(&self, name: &str) -> String {
        format!("{}.{name}", self.path)
    }

    /// A field that is there and not null.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn invalid(&self, name: &str, flaw: impl std::fmt::Display) -> PromptError {
        PromptError::invalid(self.path_of(name), flaw)
    }

    pub(super) fn require(&self, name: &str) -> Result<&'a Value, PromptError> {
        self.get(name).ok_or_else(|| self.invalid(name, "is missing"))
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, PromptError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.invalid(name, "expected a string"))
    }

    pub(super) fn require_text(&self, name: &str) -> Result<&'a str, PromptError> {
        self.require(name)?;
        Ok(self.text(name)?.unwrap_or_default())
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, PromptError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.invalid(name, "expected true or false"))
    }

    pub(super) fn list(&self, name: &str) -> Result<Option<&'a [Value]>, PromptError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let list = value.as_array().map(Vec::as_slice);
        list.map(Some).ok_or_else(|| self.invalid(name, "expected a list"))
    }
}
