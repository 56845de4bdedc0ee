//! By which name a request asked for this server.
//!
//! A web page may make its own name point at this machine (DNS rebinding) and then call a server here
//! as if it were the page's own. Its requests carry the page's name, so a server that asks for no key
//! and is meant for this machine answers only to names that no page can have: addresses, `localhost`
//! and what the operator named.

use std::net::{Ipv4Addr, Ipv6Addr};

use axum::extract::{Request, State};
use axum::http::header::HOST;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::state::AppState;

/// Middleware before everything that answers.
pub(super) async fn with_known_host(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> Response {
    if state.checks_hosts {
        // Clients older than the header send none; browsers always do.
        let named = request.headers().get_all(HOST).iter().map(|value| value.to_str());
        let target = request.uri().authority().map(|authority| Ok(authority.as_str()));
        let is_known = |host: &str| is_known(host_of(host), &state.allowed_hosts);
        if !named.chain(target).all(|host| host.is_ok_and(is_known)) {
            return ApiError::UnknownHost.into_response();
        }
    }
    next.run(request).await
}

/// A `Host` without its port.
fn host_of(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    }
}

fn is_known(host: &str, allowed: &[String]) -> bool {
    let inside = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if inside.is_some_and(|address| address.parse::<Ipv6Addr>().is_ok()) {
        return true;
    }
    let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    name.parse::<Ipv4Addr>().is_ok()
        || name == "localhost"
        || name.ends_with(".localhost")
        || allowed.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_none_of_the_known_names() {
        let allowed = ["model.lan".to_owned()];
        let is_known = |host: &str| is_known(host_of(host), &allowed);
        for host in [
            "127.0.0.1",
            "127.0.0.1:8000",
            "192.168.1.7:1",
            "[::1]",
            "[::1]:8000",
            "localhost",
            "LocalHost:8000",
            "localhost.",
            "a.b.localhost:1",
            "model.lan",
            "MODEL.LAN:8000",
        ] {
            assert!(is_known(host), "{host}");
        }
        for host in [
            "",
            ":80",
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "evillocalhost",
            "127.0.0.1.evil.example",
            "model.lan.evil.example",
            "a.model.lan",
            "user@localhost",
            "[evil.example]",
            "::1",
            "127.0.0.1:80:80",
            "[::1",
        ] {
            assert!(!is_known(host), "{host}");
        }
    }
}
