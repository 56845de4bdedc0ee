//! Which web pages may call the server from a browser. Without an origin, none.

use std::time::Duration;

use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderName, HeaderValue, Method};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

/// How long a browser need not ask again.
const MAX_AGE: Duration = Duration::from_secs(60 * 60);
/// Answers' headers that pages may read.
const EXPOSED: [&str; 11] = [
    "x-request-id",
    "x-served-model",
    "x-ignored-params",
    "openai-processing-ms",
    "retry-after-ms",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
];

/// Lets pages of `origins` in, `*` for any. Cookies play no part here: a page has a key, or not.
pub(super) fn cors(origins: &[HeaderValue]) -> CorsLayer {
    let is_any = origins.iter().any(|origin| origin == "*");
    let allowed =
        if is_any { AllowOrigin::any() } else { AllowOrigin::list(origins.iter().cloned()) };
    let exposed = EXPOSED.map(HeaderName::from_static).into_iter().chain([RETRY_AFTER]);
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // Clients send headers of their own, and none of them grants anything but the key.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(exposed.collect::<Vec<_>>())
        .max_age(MAX_AGE)
}
