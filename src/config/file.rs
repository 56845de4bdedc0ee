//! The config file: TOML whose keys are the flags of `serve`.
//!
//! A file's values become the defaults of those flags, so that flags and environment win over them
//! and each value is parsed by the one parser its flag has.

use std::path::Path;

use clap::builder::Resettable;
use clap::{Arg, Command};

use crate::config::ConfigError;
use crate::config::settings::{Kind, is_repeatable, setting_args};

/// The values of a config file, checked one by one.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    key: String,
    values: Vec<String>,
}

impl ConfigFile {
    /// Reads the file at `path` for `command`.
    ///
    /// # Errors
    /// If the file is not readable or not TOML, or a key or value is none that `command` knows.
    pub fn read(path: &Path, command: &Command) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: name.clone(), source })?;
        Self::parse(&name, &text, command)
    }

    fn parse(path: &str, text: &str, command: &Command) -> Result<Self, ConfigError> {
        let path = path.to_owned();
        let table = text.parse::<toml::Table>().map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let line = 1 + text.bytes().take(start).filter(|&byte| byte == b'\n').count();
            ConfigError::Syntax { path: path.clone(), line, message: one_line(error.message()) }
        })?;
        let mut entries: Vec<Entry> = Vec::with_capacity(table.len());
        for (given, value) in table {
            let (given, value) = unfold_table(given, value);
            let key = given.replace('_', "-");
            let Some((_, arg)) = setting_args(command).find(|(long, _)| *long == key) else {
                let suggestion = suggestion(&key, command);
                return Err(ConfigError::UnknownKey { path, key: given, suggestion });
            };
            if entries.iter().any(|entry| entry.key == key) {
                return Err(ConfigError::RepeatedKey { path, key });
            }
            let values = match (is_repeatable(arg), value) {
                (true, toml::Value::Array(values)) => values,
                (_, value) => vec![value],
            };
            let values = values
                .iter()
                .map(|value| as_argument(arg, value))
                .collect::<Result<Vec<String>, _>>()
                .map_err(|(expected, found)| ConfigError::WrongType {
                    path: path.clone(),
                    key: given,
                    expected,
                    found,
                })?;
            try_values(command, &key, &values)
                .map_err(|message| ConfigError::BadValue { path: path.clone(), message })?;
            entries.push(Entry { key, values });
        }
        Ok(Self { entries })
    }

    /// The values that the file sets for `key`, as they would be typed.
    pub fn values(&self, key: &str) -> &[String] {
        let entry = self.entries.iter().find(|entry| entry.key == key);
        entry.map(|entry| entry.values.as_slice()).unwrap_or_default()
    }

    /// Whether the file sets `key`.
    pub fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|entry| entry.key == key)
    }

    /// The command with the file's values as defaults, as far as it has flags for them.
    pub fn apply(&self, mut command: Command) -> Command {
        for entry in self.entries.iter().filter(|entry| !entry.values.is_empty()) {
            if !setting_args(&command).any(|(long, _)| long == entry.key) {
                continue;
            }
            // Flags borrow their defaults for as long as the program runs; this is read once.
            let values = entry
                .values
                .iter()
                .map(|value| -> &'static str { Box::leak(value.clone().into_boxed_str()) });
            let id = entry.key.replace('-', "_");
            command = command.mut_arg(id, |arg| arg.default_values(values));
        }
        command
    }
}

/// The tables `[aliases]` and `[prices]` as the lists that the repeatable `--alias` and `--price` would
/// be.
fn unfold_table(key: String, value: toml::Value) -> (String, toml::Value) {
    let flag = match key.as_str() {
        "aliases" => "alias",
        "prices" => "price",
        _ => return (key, value),
    };
    let toml::Value::Table(table) = value else { return (key, value) };
    let entries = table.into_iter().map(|(name, value)| match value {
        toml::Value::String(value) => format!("{name}={value}").into(),
        // Refused for its type by the name of the flag.
        other => other,
    });
    (flag.to_owned(), toml::Value::Array(entries.collect()))
}

/// The value as it would be typed behind the flag, or the expected and the found type.
fn as_argument(arg: &Arg, value: &toml::Value) -> Result<String, (&'static str, &'static str)> {
    let expected = match Kind::of(arg) {
        Kind::Boolean => "true or false",
        Kind::Integer => "an integer",
        Kind::String | Kind::Secret => "a string",
        Kind::Quantity => "a string or an integer",
    };
    let found = match (value, Kind::of(arg)) {
        (toml::Value::String(text), Kind::String | Kind::Quantity | Kind::Secret) => {
            return Ok(text.clone());
        }
        (toml::Value::Integer(number), Kind::Integer | Kind::Quantity) => {
            return Ok(number.to_string());
        }
        (toml::Value::Boolean(value), Kind::Boolean) => return Ok(value.to_string()),
        (toml::Value::String(_), _) => "a string",
        (toml::Value::Integer(_), _) => "an integer",
        (toml::Value::Boolean(_), _) => "a boolean",
        (toml::Value::Float(_), _) => "a float",
        (toml::Value::Datetime(_), _) => "a date",
        (toml::Value::Array(_), _) => "an array",
        (toml::Value::Table(_), _) => "a table",
    };
    Err((expected, found))
}

/// Lets the flag's own parser look at the values, undisturbed by the environment.
fn try_values(command: &Command, key: &str, values: &[String]) -> Result<(), String> {
    let flags = values.iter().map(|value| format!("--{key}={value}"));
    command
        .clone()
        .no_binary_name(true)
        .mut_args(|arg| arg.env(Resettable::Reset))
        .try_get_matches_from(flags)
        .map(|_| ())
        .map_err(|error| {
            let text = error.to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            one_line(text.split("\n\nFor more information").next().unwrap_or(text))
        })
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What to write instead of an unknown key.
fn suggestion(key: &str, command: &Command) -> String {
    let mut near: Vec<(usize, &str)> = setting_args(command)
        .map(|(long, _)| (edit_distance(key, long), long))
        .filter(|&(distance, long)| distance <= 2 + long.len() / 6)
        .collect();
    near.sort_unstable();
    let quoted = |keys: Vec<&str>| {
        keys.into_iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
    };
    if near.is_empty() {
        let all = setting_args(command).map(|(long, _)| long).collect();
        return format!("the keys are {}", quoted(all));
    }
    let near = near.into_iter().take(3).map(|(_, long)| long).collect();
    format!("did you mean {}?", quoted(near))
}

/// How many letters to insert, delete or replace to get from one word to the other.
fn edit_distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut previous: Vec<usize> = (0..=to.len()).collect();
    for (row, from) in from.chars().enumerate() {
        let mut current = vec![row + 1];
        for (column, &to) in to.iter().enumerate() {
            let replaced = previous[column] + usize::from(from != to);
            let inserted = current[column] + 1;
            let deleted = previous[column + 1] + 1;
            current.push(replaced.min(inserted).min(deleted));
        }
        previous = current;
    }
    previous[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteSize, Settings, Source};
    use clap::builder::RangedU64ValueParser;
    use clap::{ArgAction, value_parser};

    fn command() -> Command {
        Command::new("serve").args([
            Arg::new("config").long("config").env("TEST_FILE_CONFIG"),
            Arg::new("host").long("host").env("TEST_FILE_HOST").default_value("127.0.0.1"),
            Arg::new("port").long("port").env("TEST_FILE_PORT").value_parser(value_parser!(u16)),
            Arg::new("max_num_seqs")
                .long("max-num-seqs")
                .env("TEST_FILE_MAX_NUM_SEQS")
                .default_value("64")
                .value_parser(RangedU64ValueParser::<usize>::new().range(1..=8192)),
            Arg::new("kv_cache_memory")
                .long("kv-cache-memory")
                .env("TEST_FILE_KV_CACHE_MEMORY")
                .value_parser(value_parser!(ByteSize)),
            Arg::new("model_alias")
                .long("model-alias")
                .env("TEST_FILE_MODEL_ALIAS")
                .action(ArgAction::Append),
            Arg::new("alias").long("alias").action(ArgAction::Append),
            Arg::new("price").long("price").action(ArgAction::Append),
            Arg::new("print_config").long("print-config").action(ArgAction::SetTrue),
        ])
    }

    fn error(text: &str) -> String {
        let error = ConfigFile::parse("x.toml", text, &command()).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let text = "max_num_seqs = 8\nport = 9\nkv-cache-memory = 4096\nmodel-alias = ['a', 'b']";
        let file = ConfigFile::parse("x.toml", text, &command()).unwrap();
        let command = file.apply(command());
        let matches = command.clone().get_matches_from(["serve", "--port", "10"]);
        assert_eq!(matches.get_one::<u16>("port"), Some(&10));
        assert_eq!(matches.get_one::<usize>("max_num_seqs"), Some(&8));
        assert_eq!(matches.get_one::<ByteSize>("kv_cache_memory"), Some(&ByteSize::kib(4)));
        let aliases: Vec<&String> = matches.get_many("model_alias").unwrap().collect();
        assert_eq!(aliases, ["a", "b"]);

        let settings = Settings::collect(&command, &matches, Some(&file));
        assert_eq!(settings.source("port"), Source::Flag);
        assert_eq!(settings.source("max-num-seqs"), Source::File);
        assert_eq!(settings.source("host"), Source::Default);
        // What is printed is a config file that means the same.
        let printed = settings.to_string();
        let again = ConfigFile::parse("y.toml", &printed, &super::tests::command()).unwrap();
        let matches = again.apply(super::tests::command()).get_matches_from(["serve"]);
        assert_eq!(matches.get_one::<u16>("port"), Some(&10));
        assert_eq!(matches.get_many::<String>("model_alias").unwrap().len(), 2);
    }

    #[test]
    fn a_table_of_aliases_is_a_list_of_them() {
        let text = "port = 9\n[aliases]\n\"qwen-*\" = 'mine'\nold = 'mine'";
        let file = ConfigFile::parse("x.toml", text, &command()).unwrap();
        let matches = file.apply(command()).get_matches_from(["serve"]);
        let aliases: Vec<&String> = matches.get_many("alias").unwrap().collect();
        assert_eq!(aliases, ["old=mine", "qwen-*=mine"]);
        let file = ConfigFile::parse("x.toml", "[prices]\n\"*\" = '0.1,0.2'", &command()).unwrap();
        assert_eq!(file.values("price"), ["*=0.1,0.2"]);
        let message = error("[aliases]\nx = 1");
        assert!(message.contains("`alias` must be a string, but is an integer"), "{message}");
    }

    #[test]
    fn unknown_keys_name_the_nearest() {
        assert_eq!(
            error("prot = 1"),
            "config file `x.toml`: unknown key `prot`; did you mean `port`?"
        );
        assert!(error("max-seqs = 1").contains("did you mean `max-num-seqs`?"));
        assert!(error("zebra = 1").contains("the keys are `host`, `port`, "));
        // Flags that only make sense on a command line are no keys.
        assert!(error("config = 'y.toml'").contains("unknown key `config`"));
        assert!(error("print-config = true").contains("unknown key"));
        assert!(error("[serve]\nport = 1").contains("unknown key `serve`"));
    }

    #[test]
    fn wrong_types_are_named() {
        let expect =
            |text, message| assert_eq!(error(text), format!("config file `x.toml`: {message}"));
        expect("port = '1'", "`port` must be an integer, but is a string");
        expect("host = 1", "`host` must be a string, but is an integer");
        expect("port = 1.5", "`port` must be an integer, but is a float");
        expect("port = [1]", "`port` must be an integer, but is an array");
        expect("model-alias = [1]", "`model-alias` must be a string, but is an integer");
        expect("[port]\nx = 1", "`port` must be an integer, but is a table");
        expect("max-num-seqs = 1\nmax_num_seqs = 2", "key `max-num-seqs` is set twice");
    }

    #[test]
    fn bad_values_and_syntax_are_named() {
        assert!(error("port = 70000").contains("invalid value '70000' for '--port"));
        assert!(error("max-num-seqs = 0").contains("0 is not in 1..=8192"));
        assert!(error("kv-cache-memory = '4G'").contains("expected a size such as"));
        assert!(error("port = 1\n\nhost = ").starts_with("config file `x.toml`, line 3: "));
        let missing = ConfigFile::read(Path::new("/nonexistent/x.toml"), &command()).unwrap_err();
        assert_eq!(missing.to_string(), "cannot read config file `/nonexistent/x.toml`");
    }
}
