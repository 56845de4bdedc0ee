//! Names that clients send for a model that is called something else here.

use std::fmt;
use std::str::FromStr;

/// The text models that DashScope hosts, with their snapshots: clients that come from there go on
/// sending these names.
pub const DASHSCOPE_NAMES: [&str; 26] = [
    "qwen-turbo",
    "qwen-turbo-*",
    "qwen-plus",
    "qwen-plus-*",
    "qwen-max",
    "qwen-max-*",
    "qwen-long",
    "qwen-long-*",
    "qwen-flash",
    "qwen-flash-*",
    "qwen-coder-plus*",
    "qwen-coder-turbo*",
    "qwq-plus*",
    "qwen1.5-*-chat",
    "qwen2-*-instruct",
    "qwen2.5-*-instruct",
    "qwen2.5-*-instruct-*",
    "qwen3-max*",
    "qwen3-coder-plus*",
    "qwen3-coder-flash*",
    "qwen3.5-plus*",
    "qwen3.5-flash*",
    "qwen3.6-plus*",
    "qwen3.6-flash*",
    "qwen3.7-plus*",
    "qwen3.7-max*",
];

/// A name, in which `*` stands for any text, and the model that answers to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alias {
    /// What clients send.
    pub name: String,
    /// The model, by a name it has here.
    pub model: String,
}

impl FromStr for Alias {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, model) =
            text.rsplit_once('=').ok_or("expected NAME=MODEL, such as `qwen-*=my-model`")?;
        let (name, model) = (name.trim(), model.trim());
        if name.is_empty() || model.is_empty() {
            return Err("neither side of `=` may be empty".to_owned());
        }
        Ok(Self { name: name.to_owned(), model: model.to_owned() })
    }
}

impl fmt::Display for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_has_two_sides() {
        let alias: Alias = "a=b/c=x".parse().unwrap();
        assert_eq!((alias.name.as_str(), alias.model.as_str()), ("a=b/c", "x"));
        assert_eq!(alias.to_string(), "a=b/c=x");
        for text in ["", "x", "=x", "x=", " = "] {
            assert!(text.parse::<Alias>().is_err(), "{text}");
        }
    }
}
