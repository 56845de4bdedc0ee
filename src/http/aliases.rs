//! The paths under which DashScope has other protocols, as the paths these have here.
//!
//! Runs before routing, so that whatever is below `/v1` has its aliases without being named again.

use axum::extract::Request;
use axum::http::Uri;
use axum::http::uri::PathAndQuery;

/// OpenAI's endpoints.
pub(super) const COMPATIBLE: [&str; 3] =
    ["/compatible-mode/v1/", "/compatible-api/v1/", "/api/v2/apps/protocols/compatible-mode/v1/"];
/// Anthropic's.
pub(super) const ANTHROPIC: &str = "/apps/anthropic/v1/messages";
/// What is DashScope's own.
const NATIVE: &str = "/api/v1/";

/// How a client of DashScope expects errors to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// As on the native paths.
    Native,
    /// As on the paths that are compatible with OpenAI's.
    Compatible,
}

/// The request as the routes know it.
pub(super) fn resolve(mut request: Request) -> Request {
    let path = request.uri().path();
    if path.starts_with(NATIVE) {
        request.extensions_mut().insert(Dialect::Native);
        return request;
    }
    let rest = COMPATIBLE.iter().find_map(|prefix| path.strip_prefix(prefix));
    let (dialect, path) = match rest {
        Some(rest) => (Some(Dialect::Compatible), format!("/v1/{rest}")),
        None => match path.strip_prefix(ANTHROPIC) {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => {
                (None, format!("/v1/messages{rest}"))
            }
            _ => return request,
        },
    };
    let path_and_query = match request.uri().query() {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = PathAndQuery::try_from(path_and_query).ok();
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
        if let Some(dialect) = dialect {
            request.extensions_mut().insert(dialect);
        }
    }
    request
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    #[test]
    fn other_protocols_are_found_below_v1() {
        let compatible = Some(Dialect::Compatible);
        for (from, to, dialect) in [
            ("/compatible-mode/v1/chat/completions", "/v1/chat/completions", compatible),
            ("/compatible-mode/v1/models?a=b", "/v1/models?a=b", compatible),
            ("/compatible-api/v1/reranks", "/v1/reranks", compatible),
            (
                "/api/v2/apps/protocols/compatible-mode/v1/responses/x",
                "/v1/responses/x",
                compatible,
            ),
            ("/apps/anthropic/v1/messages", "/v1/messages", None),
            ("/apps/anthropic/v1/messages/count_tokens", "/v1/messages/count_tokens", None),
            ("/apps/anthropic/v1/messagesx", "/apps/anthropic/v1/messagesx", None),
            ("/apps/anthropic/v1/models", "/apps/anthropic/v1/models", None),
            ("/api/v1/models", "/api/v1/models", Some(Dialect::Native)),
            ("/v1/models", "/v1/models", None),
            ("/compatible-mode", "/compatible-mode", None),
        ] {
            let request = resolve(Request::get(from).body(Body::empty()).unwrap());
            assert_eq!(request.uri(), to, "{from}");
            assert_eq!(request.extensions().get::<Dialect>().copied(), dialect, "{from}");
        }
    }
}
