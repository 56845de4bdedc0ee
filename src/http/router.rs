//! Every route, and the layers around them.

use std::any::Any;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use super::access_log::with_access_log;
use super::admin;
use super::aliases;
use super::anthropic_errors::with_anthropic_errors;
use super::auth::{with_admin_key, with_key};
use super::cors::cors;
use super::dashscope_errors::with_dashscope_errors;
use super::error::ApiError;
use super::hosts::with_known_host;
use super::meter::metered;
use super::models::Chosen;
use super::request_id::with_request_id;
use super::state::{AdminRoutes, AppState};
use super::{
    chat, completions, dashscope, embeddings, fim, health, messages, models, openapi, render,
    responses, tokenize,
};

/// The whole server as one service.
pub fn router(state: AppState) -> Router {
    let routes = Router::new()
        .merge(computing_routes(&state))
        .route("/v1/chat/completions/render", post(render::chat))
        .route("/v1/completions/render", post(render::completion))
        .route("/v1/responses/input_tokens", post(responses::count_input))
        .route("/v1/responses/{id}", get(responses::retrieve).delete(responses::delete))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/responses/{id}/input_items", get(responses::input_items))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(health::ready))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/version", get(health::version))
        .route("/openapi.json", get(openapi::description))
        .route("/docs", get(openapi::page))
        .route("/api/v1/tokenizer", post(dashscope::tokenize))
        .route("/api/v1/models", get(dashscope::models))
        .layer(middleware::from_fn_with_state(state.clone(), with_served_model));
    let routes = match state.admin_routes {
        AdminRoutes::Beside => routes.merge(admin_routes(&state)),
        AdminRoutes::Apart => routes,
    };
    // Paths are looked up behind this.
    let resolve = middleware::map_request(async |request| aliases::resolve(request));
    let cors = (!state.cors_origins.is_empty()).then(|| cors(&state.cors_origins));
    let routes = Router::new().fallback_service(guarded(routes, state)).layer(resolve);
    match cors {
        // Outermost: a browser's first question shows no key.
        Some(cors) => routes.layer(cors),
        None => routes,
    }
}

/// What operators ask, as a service of its own.
pub(super) fn admin_router(state: AppState) -> Router {
    let routes = Router::new()
        .route("/health", get(health::ready))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/version", get(health::version))
        .merge(admin_routes(&state));
    guarded(routes, state)
}

fn admin_routes(state: &AppState) -> Router<AppState> {
    admin::routes().route_layer(middleware::from_fn_with_state(state.clone(), with_admin_key))
}

/// Lets in who has a key. Without one, nobody learns which paths there are.
fn guarded(routes: Router<AppState>, state: AppState) -> Router {
    let max_body_bytes = state.limits.max_body_bytes;
    let max_input_tokens = state.engine.limits().max_model_len.saturating_sub(1);
    let routes = routes
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(state.clone(), with_key))
        .layer(middleware::from_fn_with_state(state.clone(), with_known_host))
        .with_state(state);
    layered(routes, max_body_bytes, max_input_tokens)
}

/// The paths that make the model compute.
const COMPUTING: [&str; 9] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/fim/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/api/v1/services/aigc/text-generation/generation",
    "/api/v1/services/aigc/multimodal-generation/generation",
    "/api/v1/services/embeddings/text-embedding/text-embedding",
];

/// Whether a request for `path` is to be computed, for those who see it before it is routed.
pub(super) fn is_computing(path: &str) -> bool {
    COMPUTING.contains(&path)
}

/// Every route that makes the model compute.
fn computing_routes(state: &AppState) -> Router<AppState> {
    Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/fim/completions", post(fim::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/responses", post(responses::create))
        .route("/v1/messages", post(messages::create))
        .route("/api/v1/services/aigc/text-generation/generation", post(dashscope::text))
        .route("/api/v1/services/aigc/multimodal-generation/generation", post(dashscope::media))
        .route("/api/v1/services/embeddings/text-embedding/text-embedding", post(dashscope::embed))
        .route_layer(middleware::from_fn_with_state(state.clone(), metered))
}

/// Names the model that served, which may be called something else in the answer.
async fn with_served_model(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    let chosen = Chosen::default();
    request.extensions_mut().insert(chosen.clone());
    let is_post = request.method() == Method::POST;
    let mut response = next.run(request).await;
    if is_post
        && response.status().is_success()
        && let Ok(name) = HeaderValue::from_str(&chosen.served_name(&state))
    {
        response.headers_mut().insert(HeaderName::from_static("x-served-model"), name);
    }
    response
}

/// Makes every answer of `routes` one that clients understand.
fn layered(routes: Router, max_body_bytes: usize, max_input_tokens: usize) -> Router {
    // The last layer is the outermost: an id also for what panics or has no route.
    routes
        .layer(DefaultBodyLimit::max(max_body_bytes))
        .layer(CatchPanicLayer::custom(on_panic))
        .layer(middleware::from_fn(with_anthropic_errors))
        .layer(middleware::from_fn_with_state(max_input_tokens, with_dashscope_errors))
        .layer(middleware::from_fn(with_access_log))
        .layer(middleware::from_fn(with_request_id))
}

async fn not_found(request: Request) -> ApiError {
    let path = request.uri().path();
    match dashscope::refusal(path) {
        Some(advice) => ApiError::Unsupported(advice),
        None => ApiError::NotFound(path.to_owned()),
    }
}

async fn method_not_allowed(request: Request) -> ApiError {
    ApiError::MethodNotAllowed(request.method().to_string())
}

#[expect(clippy::needless_pass_by_value, reason = "the layer's signature")]
fn on_panic(panic: Box<dyn Any + Send>) -> Response {
    let reason = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("unknown");
    tracing::error!(reason, "a handler panicked");
    ApiError::Internal.into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::StatusCode;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;
    use crate::openai::error::ErrorBody;

    #[tokio::test]
    async fn a_panic_is_an_error_like_any_other() {
        async fn panicking() -> &'static str {
            panic!("secret detail")
        }
        let routes = layered(Router::new().route("/", get(panicking)), 0, 0);
        let response = routes.oneshot(Request::new(Body::empty())).await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert!(response.headers().contains_key("x-request-id"));
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let body: ErrorBody = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(body.error.code.as_deref(), Some("internal_error"));
        assert!(!body.error.message.contains("secret"));
    }
}
