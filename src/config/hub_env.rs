//! What the environment says about the model hub, read once at start.
//!
//! The variables are those of other Hugging Face tools: `HF_HOME`, `HF_HUB_CACHE` (and its older
//! name `HUGGINGFACE_HUB_CACHE`), `HF_ENDPOINT`, `HF_TOKEN` (and `HUGGING_FACE_HUB_TOKEN`),
//! `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`; and of other network programs: `HTTPS_PROXY`, `HTTP_PROXY`,
//! `ALL_PROXY`, `NO_PROXY` in either case.

use std::path::PathBuf;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// What the environment says about the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubEnvironment {
    /// Where downloaded files are kept.
    pub cache_dir: PathBuf,
    /// The hub's address.
    pub endpoint: String,
    /// Who is asking.
    pub token: Option<String>,
    /// Whether only the cache may be used.
    pub offline: bool,
    /// The proxy to go through.
    pub proxy: Option<String>,
}

/// Reads the process's environment.
pub fn hub_environment() -> HubEnvironment {
    hub_environment_from(|name| std::env::var(name).ok())
}

/// The same from any source of variables.
pub fn hub_environment_from(variable: impl Fn(&str) -> Option<String>) -> HubEnvironment {
    let get = |names: &[&str]| {
        names.iter().find_map(|name| variable(name).filter(|value| !value.trim().is_empty()))
    };
    let home = get(&["HF_HOME"]).map_or_else(
        || match get(&["XDG_CACHE_HOME"]) {
            Some(cache) => PathBuf::from(cache).join("huggingface"),
            None => PathBuf::from(get(&["HOME"]).unwrap_or_default()).join(".cache/huggingface"),
        },
        PathBuf::from,
    );
    let cache_dir = get(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
        .map_or_else(|| home.join("hub"), PathBuf::from);
    let endpoint = get(&["HF_ENDPOINT"]).unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
    let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
    let token_path = get(&["HF_TOKEN_PATH"]).map_or_else(|| home.join("token"), PathBuf::from);
    let token = get(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
        .or_else(|| std::fs::read_to_string(token_path).ok())
        .map(|token| token.trim().to_owned())
        .filter(|token| !token.is_empty());
    let offline = get(&["HF_HUB_OFFLINE"]).is_some_and(|value| is_true(&value));
    let proxy = if is_exempt(&endpoint, get(&["NO_PROXY", "no_proxy"]).as_deref()) {
        None
    } else if endpoint.starts_with("https:") {
        get(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
    } else {
        get(&["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
    };
    HubEnvironment { cache_dir, endpoint, token, offline, proxy }
}

fn is_true(value: &str) -> bool {
    matches!(value.trim().to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")
}

/// Whether `NO_PROXY` (a comma-separated list of hosts and domains) covers the endpoint's host.
fn is_exempt(endpoint: &str, no_proxy: Option<&str>) -> bool {
    let host = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    let host = host.split(['/', ':']).next().unwrap_or(host);
    no_proxy.into_iter().flat_map(|list| list.split(',')).map(str::trim).any(|pattern| {
        let domain = pattern.trim_start_matches('.');
        pattern == "*"
            || (!domain.is_empty() && (host == domain || host.ends_with(&format!(".{domain}"))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> HubEnvironment {
        hub_environment_from(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn defaults_are_those_of_other_tools() {
        let environment = read(&[("HOME", "/nobody")]);
        assert_eq!(environment.cache_dir, PathBuf::from("/nobody/.cache/huggingface/hub"));
        assert_eq!(environment.endpoint, DEFAULT_ENDPOINT);
        assert_eq!(
            (environment.token, environment.offline, environment.proxy),
            (None, false, None)
        );
    }

    #[test]
    fn variables_are_honoured() {
        let environment = read(&[
            ("HF_HOME", "/data/hf"),
            ("HF_ENDPOINT", "http://mirror.example/"),
            ("HUGGING_FACE_HUB_TOKEN", " secret\n"),
            ("HF_HUB_OFFLINE", "1"),
            ("HTTP_PROXY", "http://proxy:3128"),
            ("NO_PROXY", "localhost, .other.example"),
        ]);
        assert_eq!(environment.cache_dir, PathBuf::from("/data/hf/hub"));
        assert_eq!(environment.endpoint, "http://mirror.example");
        assert_eq!(environment.token.as_deref(), Some("secret"));
        assert!(environment.offline);
        assert_eq!(environment.proxy.as_deref(), Some("http://proxy:3128"));
        assert_eq!(
            read(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")]).cache_dir,
            PathBuf::from("/c")
        );
        assert!(!read(&[("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn proxies_can_be_exempted() {
        let proxied = |endpoint: &str, no_proxy: &str| {
            let variables =
                [("HF_ENDPOINT", endpoint), ("ALL_PROXY", "proxy"), ("NO_PROXY", no_proxy)];
            read(&variables).proxy.is_some()
        };
        assert!(proxied("https://a.example", ""));
        assert!(proxied("https://a.example", "b.example"));
        assert!(!proxied("https://a.example", "example"));
        assert!(!proxied("http://127.0.0.1:80", "127.0.0.1"));
        assert!(!proxied("https://a.example", "*"));
    }
}
