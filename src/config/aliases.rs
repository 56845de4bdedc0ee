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

/// A name in which `*` stands for any text, none included.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(transparent)]
pub struct NamePattern(String);

impl NamePattern {
    /// The pattern written as `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The pattern as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `name` is one of the names meant.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = name.strip_prefix(first) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        // The first place that fits leaves the most for the parts behind.
        for part in parts {
            match rest.split_once(part) {
                Some((_, behind)) => rest = behind,
                None => return false,
            }
        }
        rest.ends_with(last)
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

    #[test]
    fn a_star_is_any_text() {
        let matches = |pattern, name| NamePattern::new(pattern).matches(name);
        for (pattern, name) in [
            ("a", "a"),
            ("*", ""),
            ("*", "x"),
            ("a*", "a"),
            ("a*", "abc"),
            ("a*c", "abbc"),
            ("a*b*c", "aXbYbZc"),
            ("a**c", "ac"),
            ("qwen2.5-*-instruct", "qwen2.5-7b-instruct"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("a", "ab"),
            ("a", ""),
            ("a*", "ba"),
            ("a*a", "a"),
            ("a*b*c", "acb"),
            ("a*b*b", "ab"),
            ("qwen2.5-*-instruct", "qwen2.5-instruct"),
            ("qwen2.5-*-instruct", "qwen2.5-7b"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }
}
