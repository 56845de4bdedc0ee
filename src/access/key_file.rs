//! The file of keys: TOML, one `[[key]]` each.
//!
//! Whoever edits it by hand finds his comments and his order again after `key add` and
//! `key revoke`. It is replaced whole, so that no reader ever sees half of it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, Value};

use super::key::{Digest, Key, KeyName, Role};
use super::quota::Limits;
use super::timestamp::Timestamp;
use crate::config::NamePattern;

/// Only the owner reads and writes it.
const MODE: u32 = 0o600;
const OTHERS: u32 = 0o077;

/// A key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It is not there, or not to be read or written.
    #[error("cannot {action} key file `{}`", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// It does not say what keys there are.
    #[error("key file `{}`, line {line}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// The line, counted from one.
        line: usize,
        /// What is wrong there.
        message: String,
    },
}

/// What is wrong with a text of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Flaw {
    line: usize,
    message: String,
}

/// The content of a key file.
#[derive(Clone, Debug, Default)]
pub struct KeyFile {
    keys: Vec<Key>,
    document: DocumentMut,
}

/// A key as the file spells it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: Spanned<KeyName>,
    digest: Spanned<Digest>,
    models: Option<Vec<NamePattern>>,
    requests_per_minute: Option<NonZeroU64>,
    tokens_per_minute: Option<NonZeroU64>,
    max_concurrent: Option<NonZeroU64>,
    #[serde(default)]
    priority: i64,
    #[serde(default)]
    role: Role,
    created: Option<Timestamp>,
    expires: Option<Timestamp>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entries {
    #[serde(default)]
    key: Vec<Entry>,
}

impl KeyFile {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// If it cannot be read, or says something that is not understood: a misspelt limit must not
    /// be no limit.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let text = fs::read_to_string(path).map_err(io_error("read", path))?;
        Self::parse(&text).map_err(|Flaw { line, message }| KeyFileError::Content {
            path: path.to_owned(),
            line,
            message,
        })
    }

    /// Reads the file at `path`, or begins one if there is none.
    pub fn read_or_new(path: &Path) -> Result<Self, KeyFileError> {
        match Self::read(path) {
            Err(KeyFileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            result => result,
        }
    }

    fn parse(text: &str) -> Result<Self, Flaw> {
        let line = |at: usize| 1 + text[..at.min(text.len())].matches('\n').count();
        let entries: Entries = toml::from_str(text).map_err(|error| {
            let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
            Flaw { line: line(error.span().map_or(0, |span| span.start)), message }
        })?;
        let mut keys: Vec<Key> = Vec::with_capacity(entries.key.len());
        for entry in entries.key {
            let (name, digest) = (entry.name.get_ref(), entry.digest.get_ref());
            if keys.iter().any(|key| key.name == *name) {
                let message = format!("there is another key `{name}`");
                return Err(Flaw { line: line(entry.name.span().start), message });
            }
            if let Some(same) = keys.iter().find(|key| key.digest == *digest) {
                let message = format!("`{}` has the same secret", same.name);
                return Err(Flaw { line: line(entry.digest.span().start), message });
            }
            keys.push(entry.into_key());
        }
        let document = text.parse().map_err(|error: toml_edit::TomlError| Flaw {
            line: line(error.span().map_or(0, |span| span.start)),
            message: error.to_string(),
        })?;
        Ok(Self { keys, document })
    }

    /// The keys, in the order of the file.
    pub fn keys(&self) -> &[Key] {
        &self.keys
    }

    /// The keys without what editing the file needs.
    pub fn into_keys(self) -> Vec<Key> {
        self.keys
    }

    /// Puts a key at the end; false if there is one of its name.
    pub fn add(&mut self, key: Key) -> bool {
        if self.keys.iter().any(|other| other.name == key.name) {
            return false;
        }
        let tables = self.document.entry("key").or_insert_with(|| ArrayOfTables::new().into());
        match tables {
            Item::ArrayOfTables(tables) => tables.push(table(&key)),
            // Written by hand in the other notation for lists of tables.
            other => {
                let mut tables = other.clone().into_array_of_tables().unwrap_or_default();
                tables.push(table(&key));
                *other = tables.into();
            }
        }
        self.keys.push(key);
        true
    }

    /// Takes a key out; false if there is none of its name.
    pub fn revoke(&mut self, name: &str) -> bool {
        let Some(index) = self.keys.iter().position(|key| key.name.as_str() == name) else {
            return false;
        };
        self.keys.remove(index);
        match self.document.get_mut("key") {
            Some(Item::ArrayOfTables(tables)) => drop(tables.remove(index)),
            Some(Item::Value(Value::Array(array))) => drop(array.remove(index)),
            _ => {}
        }
        true
    }

    /// Puts this in the place of the file at `path`, all at once.
    pub fn write(&self, path: &Path) -> Result<(), KeyFileError> {
        // The file behind a link is replaced, not the link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let new = path.with_file_name(name);
        let written = self
            .write_to(&new)
            .and_then(|file| keep_owner(&file, &path))
            .and_then(|()| fs::rename(&new, &path));
        written.map_err(io_error("write", &path)).inspect_err(|_| drop(fs::remove_file(&new)))
    }

    fn write_to(&self, path: &Path) -> io::Result<File> {
        let _ = fs::remove_file(path);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(path)?;
        file.write_all(self.document.to_string().as_bytes())?;
        file.sync_all().map(|()| file)
    }
}

/// Gives a file to whom the one at `path` belongs, or its folder: root edits the keys of a service.
fn keep_owner(file: &File, path: &Path) -> io::Result<()> {
    let owner = fs::metadata(path).or_else(|_| fs::metadata(folder(path)))?;
    if owner.uid() == file.metadata()?.uid() {
        return Ok(());
    }
    fchown(file, Some(owner.uid()), Some(owner.gid()))
}

/// Whether others than its owner may read or change the file at `path`.
pub fn is_open_to_others(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.mode() & OTHERS != 0)
}

/// Keeps other processes from changing files beside `path` until it is dropped.
pub fn lock(path: &Path) -> Result<File, KeyFileError> {
    let locked = File::open(folder(path)).and_then(|file| file.lock().map(|()| file));
    locked.map_err(io_error("lock the folder of", path))
}

/// Where a file is, be it named without its folder.
fn folder(path: &Path) -> &Path {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

impl Entry {
    fn into_key(self) -> Key {
        Key {
            name: self.name.into_inner(),
            digest: self.digest.into_inner(),
            models: self.models,
            limits: Limits {
                requests_per_minute: self.requests_per_minute,
                tokens_per_minute: self.tokens_per_minute,
                max_concurrent: self.max_concurrent,
            },
            priority: self.priority,
            role: self.role,
            created: self.created,
            expires: self.expires,
        }
    }
}

/// A key as the file spells it, without what is as it always is.
fn table(key: &Key) -> Table {
    let mut table = Table::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            table.insert(name, value.into());
        }
    };
    let number = |limit: Option<NonZeroU64>| {
        limit.map(|limit| i64::try_from(limit.get()).unwrap_or(i64::MAX).into())
    };
    let moment = |moment: Option<Timestamp>| {
        let text = moment?.to_string();
        let moment: toml_edit::Datetime = text.parse().expect("it is written as TOML wants it");
        Some(moment.into())
    };
    set("name", Some(key.name.as_str().into()));
    set("digest", Some(key.digest.to_string().into()));
    let models = key.models.as_ref();
    let models = models.map(|models| models.iter().map(NamePattern::as_str).collect());
    set("models", models.map(Value::Array));
    set("requests_per_minute", number(key.limits.requests_per_minute));
    set("tokens_per_minute", number(key.limits.tokens_per_minute));
    set("max_concurrent", number(key.limits.max_concurrent));
    set("priority", (key.priority != 0).then(|| key.priority.into()));
    set("role", (key.role != Role::default()).then(|| key.role.to_string().into()));
    set("created", moment(key.created));
    set("expires", moment(key.expires));
    table
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyFileError {
    let path = path.to_owned();
    move |source| KeyFileError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn digest(secret: &str) -> String {
        Digest::of(secret.as_bytes()).to_string()
    }

    fn flaw(text: &str) -> (usize, String) {
        let Flaw { line, message } = KeyFile::parse(text).unwrap_err();
        assert!(!message.contains('\n'), "{message}");
        (line, message)
    }

    fn key(name: &str) -> Key {
        Key {
            priority: 0,
            role: Role::Client,
            ..Key::unlimited(name.parse().unwrap(), Digest::of(name.as_bytes()))
        }
    }

    #[test]
    fn every_field_is_written_as_it_is_read() {
        let full = Key {
            models: Some(vec![NamePattern::new("qwen-*"), NamePattern::new("a\"b")]),
            limits: Limits {
                requests_per_minute: NonZeroU64::new(1),
                tokens_per_minute: NonZeroU64::new(2),
                max_concurrent: NonZeroU64::new(3),
            },
            priority: -5,
            role: Role::Admin,
            created: Some(Timestamp(1_000_000_000)),
            expires: Some(Timestamp(2_000_000_000)),
            ..key("full")
        };
        let none = Key { models: Some(Vec::new()), ..key("none") };
        let keys = [full, key("bare"), none];
        let mut file = KeyFile::default();
        for key in &keys {
            assert!(file.add(key.clone()));
            assert!(!file.add(key.clone()));
        }
        let again = KeyFile::parse(&file.document.to_string()).unwrap();
        assert_eq!(again.keys(), keys);
    }

    #[test]
    fn what_is_not_understood_names_its_line() {
        let (good, other) = (digest("a"), digest("b"));
        let entry = |more: &str| format!("[[key]]\nname = 'a'\ndigest = '{good}'\n{more}");
        let named = |text: &str, line, part: &str| {
            let (found, message) = flaw(text);
            assert_eq!(found, line, "{message}");
            assert!(message.contains(part), "{message}");
        };
        named(&entry("token_per_minute = 5"), 4, "unknown field `token_per_minute`");
        named(&entry("tokens_per_minute = 0"), 4, "nonzero");
        named(&entry("requests_per_minute = '5'"), 4, "invalid type");
        named(&entry("role = 'root'"), 4, "unknown variant `root`");
        named(&entry("expires = 2024-13-01"), 4, "");
        named(&entry("x ="), 4, "");
        named("\nkeys = []", 2, "unknown field `keys`");
        named("[[key]]\nname = 'a'", 1, "missing field `digest`");
        named(&entry("").replace("'a'", "'a b'"), 2, "a name is up to 64");
        named("[[key]]\nname = 'a'\ndigest = 'sk-x'", 3, "a digest is `blake3:`");
        let twice = format!("{}[[key]]\nname = 'a'\ndigest = '{other}'", entry(""));
        named(&twice, 5, "there is another key `a`");
        let same = format!("{}[[key]]\nname = 'b'\ndigest = '{good}'", entry(""));
        named(&same, 6, "`a` has the same secret");
    }

    #[test]
    fn editing_keeps_comments_and_order() {
        let text = format!(
            "# Ask Ann before you change this.\n\n[[key]]\nname = 'a' # the first\n\
             digest = '{}'\n\n# Nightly jobs.\n[[key]]\nname = 'b'\ndigest = '{}'\n",
            digest("a"),
            digest("b")
        );
        let mut file = KeyFile::parse(&text).unwrap();
        assert_eq!(file.document.to_string(), text);
        assert!(file.add(key("c")));
        let added = file.document.to_string();
        assert!(added.starts_with(&text), "{added}");
        assert!(file.revoke("b") && !file.revoke("b"));
        let left = file.document.to_string();
        assert!(left.contains("# Ask Ann") && left.contains("# the first"), "{left}");
        assert!(!left.contains("'b'"), "{left}");
        let names: Vec<String> =
            KeyFile::parse(&left).unwrap().keys().iter().map(|key| key.name.to_string()).collect();
        assert_eq!(names, ["a", "c"]);
    }

    #[test]
    fn lists_in_the_other_notation_can_be_edited_too() {
        let text = format!("key = [{{ name = 'a', digest = '{}' }}]\n", digest("a"));
        let mut file = KeyFile::parse(&text).unwrap();
        assert!(file.add(key("b")));
        assert_eq!(KeyFile::parse(&file.document.to_string()).unwrap().keys().len(), 2);
        let mut file = KeyFile::parse(&text).unwrap();
        assert!(file.revoke("a"));
        assert_eq!(KeyFile::parse(&file.document.to_string()).unwrap().keys(), []);
    }

    #[test]
    fn a_file_is_replaced_whole_and_only_its_owner_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("keys.toml"), folder.path().join("link.toml"));
        assert!(matches!(KeyFile::read(&path), Err(KeyFileError::Io { .. })));
        let mut file = KeyFile::read_or_new(&path).unwrap();
        file.add(key("a"));
        file.write(&path).unwrap();
        assert!(!is_open_to_others(&path));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(is_open_to_others(&path));
        symlink(&path, &link).unwrap();
        file.add(key("b"));
        file.write(&link).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(KeyFile::read(&path).unwrap().keys().len(), 2);
        assert!(!is_open_to_others(&path));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        let nowhere = folder.path().join("no/keys.toml");
        assert!(matches!(file.write(&nowhere), Err(KeyFileError::Io { .. })));
    }
}
