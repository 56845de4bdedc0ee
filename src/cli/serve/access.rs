//! Who is let in, decided before the model is loaded.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::access::key_file::is_open_to_others;
use crate::cli::Hinted;
use crate::config::{AccessConfig, Admission, Config, HttpConfig, TlsConfig};
use crate::http::{KeyRing, Tls, TlsFiles};

/// The keys, if there are any to be asked for.
pub(super) fn key_ring(config: &AccessConfig) -> Result<Option<Arc<KeyRing>>> {
    let ring = match &config.admission {
        Admission::Local | Admission::Everybody => return Ok(None),
        Admission::OneKey(secret) => KeyRing::only(secret.reveal()),
        Admission::KeyFile(path) => {
            let ring = KeyRing::open(path).context("cannot tell who may use this server")?;
            let file = path.display();
            if is_open_to_others(path) {
                tracing::warn!(%file, "others can read the key file: chmod 600 it");
            }
            if ring.is_empty() {
                tracing::warn!(%file, "there are no keys: nobody can use this server");
            }
            ring
        }
    };
    Ok(Some(Arc::new(ring)))
}

/// What encrypts connections, if anything is to.
pub(super) fn tls(config: &HttpConfig) -> Result<Option<Arc<Tls>>> {
    let Some(TlsConfig { cert, key, client_ca }) = config.tls.clone() else { return Ok(None) };
    if is_open_to_others(&key) {
        tracing::warn!(file = %key.display(), "others can read the private key: chmod 600 it");
    }
    let tls = Tls::open(TlsFiles { cert, key, client_ca }).context("cannot encrypt connections")?;
    Ok(Some(Arc::new(tls)))
}

/// The names this server goes by: those of its addresses, and those that were named.
pub(super) fn allowed_hosts(config: &Config) -> Arc<[String]> {
    let admin = config.access.admin_address.iter().map(|address| &address.host);
    let own = std::iter::once(&config.http.host).chain(admin).map(|host| host.to_ascii_lowercase());
    own.chain(config.access.allowed_hosts.iter().cloned()).collect()
}

/// An address that other machines reach is not opened to everybody by mistake.
pub(super) fn refuse_strangers(admission: &Admission, address: SocketAddr) -> Result<()> {
    if *admission != Admission::Local || address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    let message = format!("other machines reach {address}, and nothing would ask them for a key");
    let hint = "make keys with `qwen-server key add NAME --file keys.toml` and pass `--api-keys \
                keys.toml`, or pass `--no-auth` to let everybody in";
    Err(Hinted { message, hint: hint.to_owned() }.into())
}
