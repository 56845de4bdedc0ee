//! A key: whom it names, what it opens and how much its holder may ask for.

use std::fmt::{self, Write};
use std::str::FromStr;
use std::sync::Arc;

use serde::Deserialize;

use super::quota::Limits;
use super::timestamp::Timestamp;
use crate::config::NamePattern;

/// What every secret made here begins with, so that scanners recognise one that leaked.
const SECRET_PREFIX: &str = "sk-qwen-";
/// Written before a digest, so that another algorithm can follow one day.
const ALGORITHM: &str = "blake3:";
const MAX_NAME_BYTES: usize = 64;

/// One entry of the key file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// What its holder is called in logs and accounts.
    pub name: KeyName,
    /// What its secret is compared with.
    pub digest: Digest,
    /// The models it may name; all of them if absent.
    pub models: Option<Vec<NamePattern>>,
    /// How much it may ask for.
    pub limits: Limits,
    /// The most urgent priority its requests may claim; lower is more urgent.
    pub priority: i64,
    /// What it is for.
    pub role: Role,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// When it stops working.
    pub expires: Option<Timestamp>,
}

impl Key {
    /// A key without limits, as for a server with one client.
    pub fn unlimited(name: KeyName, digest: Digest) -> Self {
        Self {
            name,
            digest,
            models: None,
            limits: Limits::default(),
            priority: i64::MIN,
            role: Role::Admin,
            created: None,
            expires: None,
        }
    }

    /// Whether its holder may use the model that goes by `name`.
    pub fn allows_model(&self, name: &str) -> bool {
        self.models
            .as_ref()
            .is_none_or(|patterns| patterns.iter().any(|pattern| pattern.matches(name)))
    }

    /// Whether it works no more.
    pub fn has_expired(&self, now: Timestamp) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

/// What a key is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Asking the model.
    #[default]
    Client,
    /// That, and what operators ask: `/metrics` and `/admin`.
    Admin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Client => "client",
            Self::Admin => "admin",
        })
    }
}

/// A name that can be part of a log line, a label and a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct KeyName(Arc<str>);

impl KeyName {
    /// The name as text that many may hold.
    pub fn as_arc(&self) -> &Arc<str> {
        &self.0
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for KeyName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@+".contains(&byte);
        if !(1..=MAX_NAME_BYTES).contains(&text.len()) || !text.bytes().all(is_plain) {
            let message = "a name is up to 64 letters, digits and any of `-_.@+`";
            return Err(message.to_owned());
        }
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for KeyName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// What is kept of a secret. Equality takes the same time wherever two digests differ.
///
/// A fast hash is enough, because secrets are random: nobody tries 2²⁵⁶ of them.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Digest(blake3::Hash);

impl Digest {
    /// The digest of `secret`.
    pub fn of(secret: &[u8]) -> Self {
        Self(blake3::hash(secret))
    }

    /// Its beginning: enough to tell two keys apart, too little to search for.
    pub fn beginning(&self) -> String {
        self.to_string().chars().take(ALGORITHM.len() + 8).collect()
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let hex = text.strip_prefix(ALGORITHM);
        let hash = hex.and_then(|hex| blake3::Hash::from_hex(hex).ok());
        hash.map(Self).ok_or_else(|| format!("a digest is `{ALGORITHM}` and 64 hexadecimal digits"))
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{ALGORITHM}{}", self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.beginning())
    }
}

/// The secret made of 256 random bits, as it is handed to its holder.
pub fn secret(random: &[u8; 32]) -> String {
    random.iter().fold(SECRET_PREFIX.to_owned(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_written_with_its_algorithm_and_read_back() {
        let digest = Digest::of(b"secret");
        let text = digest.to_string();
        assert_eq!(text.parse(), Ok(digest));
        assert_ne!(digest, Digest::of(b"Secret"));
        let hex = text.strip_prefix("blake3:").unwrap();
        for other in [hex.to_owned(), format!("sha256:{hex}"), format!("blake3:{}", &hex[1..])] {
            assert!(other.parse::<Digest>().is_err(), "{other}");
        }
        // Neither form shows enough to try secrets against.
        assert!(!format!("{digest:?}").contains(&hex[..16]));
        assert!(!digest.beginning().contains(&hex[..16]));
    }

    #[test]
    fn a_secret_holds_every_random_bit() {
        let mut random = [0; 32];
        random[31] = 1;
        let text = secret(&random);
        assert_eq!(text, format!("sk-qwen-{}01", "00".repeat(31)));
    }

    #[test]
    fn names_fit_into_a_log_line() {
        for name in ["team-a", "a.b@example+c_d", &"x".repeat(64)] {
            assert!(name.parse::<KeyName>().is_ok(), "{name}");
        }
        for name in ["", "a b", "a\nb", "ä", "a/b", "a\"", &"x".repeat(65)] {
            assert!(name.parse::<KeyName>().is_err(), "{name}");
        }
    }

    #[test]
    fn models_are_all_some_or_none() {
        let name: KeyName = "k".parse().unwrap();
        let mut key = Key::unlimited(name, Digest::of(b""));
        assert!(key.allows_model("anything"));
        key.models = Some(vec![NamePattern::new("qwen-*"), NamePattern::new("one")]);
        assert!(key.allows_model("qwen-plus") && key.allows_model("one"));
        assert!(!key.allows_model("two") && !key.allows_model("xqwen-plus"));
        key.models = Some(Vec::new());
        assert!(!key.allows_model("qwen-plus"));
    }

    #[test]
    fn a_key_works_until_it_expires() {
        let mut key = Key::unlimited("k".parse().unwrap(), Digest::of(b""));
        assert!(!key.has_expired(Timestamp(u64::MAX)));
        key.expires = Some(Timestamp(100));
        assert!(!key.has_expired(Timestamp(99)) && key.has_expired(Timestamp(100)));
    }
}
