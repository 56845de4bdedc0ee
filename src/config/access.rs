//! Who may use the server, and how others reach it safely.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use axum::http::HeaderValue;

/// Who may use the server.
#[derive(Clone, Debug)]
pub struct AccessConfig {
    /// Who is let in.
    pub admission: Admission,
    /// Whether the requests of different keys share the prefix cache.
    pub isolate_prefix_cache: bool,
    /// Names by which requests may ask for a server that this machine alone reaches.
    pub allowed_hosts: Vec<String>,
    /// Origins whose pages may call the server from a browser.
    pub cors_origins: Vec<HeaderValue>,
    /// Where operators ask, if not where clients do.
    pub admin_address: Option<Address>,
}

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Address or name.
    pub host: String,
    /// Port; zero takes a free one.
    pub port: u16,
}

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let (host, port) = text.rsplit_once(':').ok_or("expected HOST:PORT")?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        match port.parse() {
            Ok(port) if !host.is_empty() => Ok(Self { host: host.to_owned(), port }),
            _ => Err("expected HOST:PORT, such as 127.0.0.1:9000"),
        }
    }
}

/// Reads an origin as browsers send it: a scheme and a host, perhaps a port, and nothing behind.
///
/// # Errors
/// If no browser would send it, so that no page would ever be let in.
pub fn origin(text: &str) -> Result<HeaderValue, &'static str> {
    let flaw = "expected an origin such as https://app.example.com, or `*`";
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let is_host = |host: &str| {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
        !host.is_empty() && host.bytes().all(is_plain)
    };
    if text != "*" && !host.is_some_and(is_host) {
        return Err(flaw);
    }
    text.to_ascii_lowercase().parse().map_err(|_| flaw)
}

/// Reads the name of a host, without a port.
///
/// # Errors
/// If no host has it.
pub fn host_name(text: &str) -> Result<String, &'static str> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    let name = text.strip_suffix('.').unwrap_or(text);
    if name.is_empty() || !name.bytes().all(is_plain) {
        return Err("expected the name of a host, such as model.lan, without a port");
    }
    Ok(name.to_ascii_lowercase())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for (text, host, port) in
            [("127.0.0.1:9000", "127.0.0.1", 9000), ("[::1]:1", "::1", 1), ("a.b:0", "a.b", 0)]
        {
            assert_eq!(text.parse(), Ok(Address { host: host.to_owned(), port }));
        }
        for text in ["", "9000", ":9000", "a:", "a:70000", "a:b"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn origins_are_as_browsers_send_them() {
        for text in ["*", "https://a.example.com", "http://localhost:3000", "http://[::1]:3000"] {
            assert_eq!(origin(text).unwrap(), text);
        }
        assert_eq!(origin("https://A.example").unwrap(), "https://a.example");
        for text in
            ["", "a.example.com", "https://", "https://a/", "https://a/b", "null", "ftp://a"]
        {
            assert!(origin(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_of_hosts_have_no_port() {
        assert_eq!(host_name("Model.LAN.").unwrap(), "model.lan");
        for text in ["", ".", "a:80", "http://a", "a/b", "*", "a b"] {
            assert!(host_name(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_secret_is_not_shown() {
        let secret: SecretText = "sk-123".parse().unwrap();
        assert!(!format!("{secret:?}").contains("123"));
    }
}
