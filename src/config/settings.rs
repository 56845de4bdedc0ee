//! Every setting with its value and where that came from, for the plan printed at start.

use std::any::TypeId;
use std::fmt;

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};

use crate::config::file::ConfigFile;

/// What set a value. Ordered by precedence, lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Nobody.
    Default,
    /// The config file.
    File,
    /// An environment variable.
    Environment,
    /// A flag on the command line.
    Flag,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Default => "default",
            Self::File => "file",
            Self::Environment => "environment",
            Self::Flag => "flag",
        })
    }
}

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its key in the file, which is its flag without the dashes.
    pub key: String,
    /// Its value as TOML; `None` if it is decided when the model is known, or secret.
    pub value: Option<String>,
    /// What set it.
    pub source: Source,
}

/// All settings, in the order of the help text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings(Vec<Setting>);

impl Settings {
    /// Reads the settings of a parsed command; `file` is what [`ConfigFile::apply`] was called on.
    pub fn collect(command: &Command, matches: &ArgMatches, file: Option<&ConfigFile>) -> Self {
        let settings = setting_args(command).map(|(key, arg)| {
            let id = arg.get_id().as_str();
            let negated = format!("no_{id}");
            let is_negated = command.get_arguments().any(|arg| arg.get_id() == negated.as_str())
                && matches.value_source(&negated) == Some(ValueSource::CommandLine);
            if is_negated {
                let value = Some("false".to_owned());
                return Setting { key: key.to_owned(), value, source: Source::Flag };
            }
            let source = match matches.value_source(id) {
                Some(ValueSource::CommandLine) => Source::Flag,
                Some(ValueSource::EnvVariable) => Source::Environment,
                Some(_) if file.is_some_and(|file| file.has(key)) => Source::File,
                _ => Source::Default,
            };
            let raw = matches.get_raw(id).into_iter().flatten();
            if Kind::of(arg) == Kind::Secret {
                return Setting { key: key.to_owned(), value: None, source };
            }
            let values: Vec<String> =
                raw.map(|value| to_toml(arg, &value.to_string_lossy())).collect();
            Setting { key: key.to_owned(), value: join(arg, &values), source }
        });
        Self(settings.collect())
    }

    /// The settings.
    pub fn iter(&self) -> impl Iterator<Item = &Setting> {
        self.0.iter()
    }

    /// What set `key`.
    pub fn source(&self, key: &str) -> Source {
        self.0.iter().find(|setting| setting.key == key).map_or(Source::Default, |s| s.source)
    }

    /// Replaces the default of a `key` nobody set by one that goes with the others.
    pub(crate) fn adjust(&mut self, key: &str, value: impl fmt::Display) {
        let is_open =
            |setting: &&mut Setting| setting.key == key && setting.source == Source::Default;
        for setting in self.0.iter_mut().filter(is_open) {
            setting.value = Some(value.to_string());
        }
    }

    /// Notes the value that was decided for a `key` nobody set.
    pub(crate) fn decide(&mut self, key: &str, value: impl fmt::Display) {
        for setting in self.0.iter_mut().filter(|setting| setting.key == key) {
            setting.value.get_or_insert_with(|| value.to_string());
        }
    }
}

/// As a config file that sets the same, with each value's source as a comment.
impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Setting { key, value, source } in &self.0 {
            let line = match value {
                Some(value) => format!("{key} = {value}"),
                None if *source == Source::Default => format!("# {key}: not set"),
                None => format!("# {key}: not shown"),
            };
            writeln!(f, "{line:<54} # {source}")?;
        }
        Ok(())
    }
}

/// The flags of a command that can also be set by environment and file, with their keys: those
/// that take a value, but for the file's own name.
pub(crate) fn setting_args(command: &Command) -> impl Iterator<Item = (&str, &Arg)> {
    let takes_value = |arg: &&Arg| arg.get_action().takes_values() && arg.get_id() != "config";
    command.get_arguments().filter(takes_value).filter_map(|arg| Some((arg.get_long()?, arg)))
}

/// How a value of a flag looks in TOML.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Boolean,
    Integer,
    String,
    /// A number or text, such as a size.
    Quantity,
    /// Text that is not shown.
    Secret,
}

impl Kind {
    pub(crate) fn of(arg: &Arg) -> Self {
        let id = arg.get_value_parser().type_id();
        let is = |type_id: TypeId| id == type_id;
        if is(TypeId::of::<bool>()) {
            Self::Boolean
        } else if is(TypeId::of::<u16>()) || is(TypeId::of::<u64>()) || is(TypeId::of::<usize>()) {
            Self::Integer
        } else if is(TypeId::of::<crate::config::ByteSize>()) {
            Self::Quantity
        } else if is(TypeId::of::<crate::config::SecretText>()) {
            Self::Secret
        } else {
            Self::String
        }
    }
}

fn to_toml(arg: &Arg, value: &str) -> String {
    match Kind::of(arg) {
        Kind::Boolean | Kind::Integer => value.to_owned(),
        Kind::String | Kind::Quantity | Kind::Secret => toml::Value::from(value).to_string(),
    }
}

fn join(arg: &Arg, values: &[String]) -> Option<String> {
    if is_repeatable(arg) {
        return Some(format!("[{}]", values.join(", ")));
    }
    values.first().cloned()
}

/// Whether a flag may be given several times.
pub(crate) fn is_repeatable(arg: &Arg) -> bool {
    matches!(arg.get_action(), clap::ArgAction::Append)
}
