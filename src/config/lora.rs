//! Adapters that are served beside the model.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

/// Which adapters there are, and how many more there may be.
#[derive(Clone, Debug)]
pub struct LoraConfig {
    /// Those that are loaded at the start.
    pub modules: Vec<LoraModule>,
    /// Where administrators may load others from while the server runs; nowhere if absent.
    pub root: Option<PathBuf>,
    /// Most adapters in memory.
    pub max_loras: usize,
    /// Highest rank of one.
    pub max_rank: usize,
}

impl LoraConfig {
    /// Whether there are adapters, or may be.
    pub fn is_on(&self) -> bool {
        !self.modules.is_empty() || self.root.is_some()
    }

    /// Adapters to keep memory for. One more than may be listed where they can be replaced: the new
    /// one is there before the old one is gone.
    pub fn num_reserved(&self) -> usize {
        match self.root {
            Some(_) => self.max_loras + 1,
            None => self.modules.len(),
        }
    }
}

/// One adapter.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraModule {
    /// What clients call it.
    pub name: String,
    /// Its directory.
    pub path: PathBuf,
    /// A name of the model it is for, if that was said.
    #[serde(default)]
    pub base_model_name: Option<String>,
}

/// What stands behind one `--lora-modules`: `NAME=PATH`, several of them separated by commas, or
/// vLLM's JSON for one or a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraModules(pub Vec<LoraModule>);

impl FromStr for LoraModules {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let modules = match text.chars().next() {
            Some('{') => serde_json::from_str(text).map(|module| vec![module]),
            Some('[') => serde_json::from_str(text),
            _ => return text.split(',').map(module).collect::<Result<_, _>>().map(Self),
        };
        let modules: Vec<LoraModule> =
            modules.map_err(|error| format!("this JSON describes no adapter: {error}"))?;
        modules.iter().try_for_each(|module| check_name(&module.name))?;
        Ok(Self(modules))
    }
}

fn module(text: &str) -> Result<LoraModule, String> {
    let (name, path) =
        text.split_once('=').ok_or("expected NAME=PATH, such as `sql=/adapters/sql`")?;
    let (name, path) = (name.trim(), path.trim());
    check_name(name)?;
    if path.is_empty() {
        return Err(format!("`{name}=` has no path"));
    }
    Ok(LoraModule { name: name.to_owned(), path: path.into(), base_model_name: None })
}

/// The longest name of an adapter.
const MAX_NAME_CHARS: usize = 256;

/// Refuses what cannot be told apart in lists and headers.
///
/// # Errors
/// Says what a name must be.
pub fn check_name(name: &str) -> Result<(), String> {
    let is_fine = |c: char| c.is_ascii_graphic() && c != ',';
    if name.is_empty() || MAX_NAME_CHARS < name.len() || !name.chars().all(is_fine) {
        return Err(format!(
            "an adapter's name has 1 to {MAX_NAME_CHARS} letters, digits and signs of ASCII, and no \
             comma or blank"
        ));
    }
    Ok(())
}

impl fmt::Display for LoraModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, LoraModule { name, path, .. }) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{name}={}", path.display())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_in_three_ways() {
        let module = |name: &str, path: &str, base: Option<&str>| LoraModule {
            name: name.into(),
            path: path.into(),
            base_model_name: base.map(str::to_owned),
        };
        for (text, expected) in [
            ("a=/x", vec![module("a", "/x", None)]),
            (" a = x=y , org/b=z ", vec![module("a", "x=y", None), module("org/b", "z", None)]),
            (r#"{"name": "a", "path": "x"}"#, vec![module("a", "x", None)]),
            (
                r#"{"name": "a", "path": "x,y", "base_model_name": "m"}"#,
                vec![module("a", "x,y", Some("m"))],
            ),
            (
                r#"[{"name": "a", "path": "x"}, {"name": "b", "path": "y"}]"#,
                vec![module("a", "x", None), module("b", "y", None)],
            ),
        ] {
            let modules: LoraModules = text.parse().unwrap();
            assert_eq!(modules.0, expected);
        }
        assert_eq!("a=x,b=y".parse::<LoraModules>().unwrap().to_string(), "a=x,b=y");
        for text in [
            "",
            "a",
            "=x",
            "a=",
            "a b=x",
            "a=x,",
            "{}",
            r#"{"name": "a"}"#,
            r#"{"name": "", "path": "x"}"#,
            r#"{"name": "a", "path": "x", "rank": 3}"#,
            r#"{"name": "ä", "path": "x"}"#,
        ] {
            assert!(text.parse::<LoraModules>().is_err(), "{text}");
        }
    }
}
