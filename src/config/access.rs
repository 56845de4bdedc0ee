//! Who may use the server, and how others reach it safely.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Who may use the server.
#[derive(Clone, Debug)]
pub struct AccessConfig {
    /// Who is let in.
    pub admission: Admission,
    /// Whether the requests of different keys share the prefix cache.
    pub isolate_prefix_cache: bool,
    /// Origins whose pages may call the server from a browser.
    pub cors_origins: Vec<String>,
    /// Where operators ask, if not where clients do.
    pub admin_address: Option<String>,
}

/// Who is let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Who has a key of this file.
    KeyFile(PathBuf),
    /// Who knows this key.
    OneKey(SecretText),
    /// Everybody on this machine.
    Local,
    /// Everybody.
    Everybody,
}

/// Text that is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretText(String);

impl SecretText {
    /// The text, for what it is meant for.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl FromStr for SecretText {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(not shown)")
    }
}

/// Files of an encrypted address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// The server's certificate and those between it and an authority, as PEM.
    pub cert: PathBuf,
    /// Its private key, as PEM.
    pub key: PathBuf,
    /// The authorities of clients' certificates, as PEM; clients need none if absent.
    pub client_ca: Option<PathBuf>,
}
