//! Who may use the server, and over what.

use std::path::PathBuf;

use axum::http::HeaderValue;
use clap::{ArgAction, Args};

use crate::config::{AccessConfig, Address, Admission, ConfigError, SecretText, TlsConfig, access};

/// The shortest key that is not guessed.
const MIN_KEY_BYTES: usize = 16;

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Access")]
pub(super) struct AccessFlags {
    /// Let in only who has a key of this file
    ///
    /// `qwen-server key add` makes keys. The file is read again when it changes.
    #[arg(long, env = "QWEN_SERVER_API_KEYS", value_name = "FILE")]
    api_keys: Option<PathBuf>,

    /// Let in only who has this one key
    ///
    /// Better set by its variable: other users of the machine can read a command line.
    #[arg(long, env = "QWEN_SERVER_API_KEY", value_name = "KEY", hide = true)]
    api_key: Option<SecretText>,

    /// Let in everybody, from other machines too
    ///
    /// Without keys the server otherwise refuses to listen where other machines reach it.
    #[arg(long, env = "QWEN_SERVER_NO_AUTH", value_name = "BOOL")]
    #[arg(default_value_t = false, default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    no_auth: bool,

    /// Share the prefix cache only between requests of the same key
    ///
    /// Otherwise the time of an answer tells whether anybody has sent the same beginning lately.
    #[arg(long, env = "QWEN_SERVER_ISOLATE_PREFIX_CACHE", value_name = "BOOL")]
    #[arg(default_value_t = false, default_missing_value = "true")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    isolate_prefix_cache: bool,

    /// Answer /metrics and /admin at this address and nowhere else
    ///
    /// An address that only this machine reaches needs no key.
    #[arg(long, env = "QWEN_SERVER_ADMIN_ADDRESS", value_name = "HOST:PORT")]
    admin_address: Option<Address>,

    /// Answer requests for this name too, where no key is asked for [repeatable]
    ///
    /// A server that only this machine reaches otherwise answers to addresses, localhost and the name
    /// of --host alone: a page in a browser could make another name point here.
    #[arg(long, env = "QWEN_SERVER_ALLOWED_HOST", value_name = "NAME")]
    #[arg(action = ArgAction::Append, value_delimiter = ',', value_parser = access::host_name)]
    allowed_host: Vec<String>,

    /// Let pages of this origin call the server from a browser, `*` for any [repeatable]
    #[arg(long, env = "QWEN_SERVER_CORS_ORIGIN", value_name = "ORIGIN")]
    #[arg(action = ArgAction::Append, value_delimiter = ',', value_parser = access::origin)]
    cors_origin: Vec<HeaderValue>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Encryption")]
pub(super) struct TlsFlags {
    /// Certificate chain in PEM; with it the server speaks HTTPS
    ///
    /// The files of this group are read again when they change.
    #[arg(long = "tls-cert", id = "tls_cert", env = "QWEN_SERVER_TLS_CERT", value_name = "FILE")]
    cert: Option<PathBuf>,

    /// Private key of the certificate in PEM
    #[arg(long = "tls-key", id = "tls_key", env = "QWEN_SERVER_TLS_KEY", value_name = "FILE")]
    key: Option<PathBuf>,

    /// Let in only clients with a certificate of these authorities, in PEM
    #[arg(
        long = "tls-client-ca",
        id = "tls_client_ca",
        env = "QWEN_SERVER_TLS_CLIENT_CA",
        value_name = "FILE"
    )]
    client_ca: Option<PathBuf>,
}

impl AccessFlags {
    pub(super) fn into_config(self) -> Result<AccessConfig, ConfigError> {
        let admission = match (self.api_keys, self.api_key, self.no_auth) {
            (Some(_), Some(_), _) => return refuse("api-keys", "does not go with `--api-key`"),
            (None, None, false) => Admission::Local,
            (None, None, true) => Admission::Everybody,
            (_, _, true) => return refuse("no-auth", "does not go with keys"),
            (Some(file), None, false) => Admission::KeyFile(file),
            (None, Some(key), false) if key.reveal().len() < MIN_KEY_BYTES => {
                return refuse(
                    "api-key",
                    "must have at least 16 characters, so that nobody guesses it",
                );
            }
            (None, Some(key), false) => Admission::OneKey(key),
        };
        Ok(AccessConfig {
            admission,
            isolate_prefix_cache: self.isolate_prefix_cache,
            allowed_hosts: self.allowed_host,
            cors_origins: self.cors_origin,
            admin_address: self.admin_address,
        })
    }
}

impl TlsFlags {
    pub(super) fn into_config(self) -> Result<Option<TlsConfig>, ConfigError> {
        match (self.cert, self.key, self.client_ca) {
            (Some(cert), Some(key), client_ca) => Ok(Some(TlsConfig { cert, key, client_ca })),
            (None, None, None) => Ok(None),
            (Some(_), None, _) => refuse("tls-cert", "needs `--tls-key`"),
            (None, Some(_), _) => refuse("tls-key", "needs `--tls-cert`"),
            (None, None, Some(_)) => refuse("tls-client-ca", "needs `--tls-cert` and `--tls-key`"),
        }
    }
}

fn refuse<T>(key: &'static str, message: &str) -> Result<T, ConfigError> {
    Err(ConfigError::OutOfBounds { key, message: message.to_owned() })
}
