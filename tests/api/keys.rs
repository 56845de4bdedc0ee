//! Who is let in, and to what.

use axum::body::Body;
use axum::http::{Method, Request};
use qwen_server::access::Digest;
use qwen_server::http::{KeyRing, PrefixSharing};
use serde_json::{Value, json};

use crate::api_fake::{Answer, FakeServer, MODEL, chat, with};

impl FakeServer {
    /// Sends with a key.
    pub(crate) async fn ask(&self, key: &str, path: &str, body: Value) -> Answer {
        let request = Request::post(path)
            .header("content-type", "application/json")
            .header("authorization", format!("Bearer {key}"));
        Answer::read(self.send(request.body(Body::from(body.to_string())).unwrap()).await).await
    }

    /// Any other method with a key.
    pub(crate) async fn look(&self, key: &str, method: Method, path: &str) -> Answer {
        let request = Request::builder().method(method).uri(path);
        let request = request.header("x-api-key", key).body(Body::empty()).unwrap();
        Answer::read(self.send(request).await).await
    }
}

/// Every path and method of the description, and some that nobody serves.
pub(crate) fn all_routes() -> Vec<(Method, String)> {
    let description: Value =
        serde_json::from_str(include_str!("../../src/http/openapi.json")).unwrap();
    let mut routes: Vec<(Method, String)> = description["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, item)| {
            let methods = item.as_object().unwrap().keys().filter(|key| *key != "servers");
            methods
                .map(|method| (method.to_uppercase().parse().unwrap(), path.replace("{id}", "x")))
        })
        .collect();
    let others = [
        "/metrics",
        "/admin/state",
        "/admin/usage",
        "/",
        "/nothing",
        "/health/",
        "/health/x",
        "/healthx",
        "//health",
        "/v1/../health",
        "/v1/health",
        "/%68ealth",
        "/invocations",
        "/v1",
        "/compatible-mode/v1/models",
        "/apps/anthropic/v1/messages",
        "/api/v1/tasks/1",
        "/health?x=/v1/models/../x",
    ];
    for path in others {
        routes.push((Method::GET, path.to_owned()));
        routes.push((Method::POST, path.to_owned()));
    }
    routes.push((Method::OPTIONS, "/v1/models".into()));
    routes.push((Method::HEAD, "/v1/models".into()));
    routes.push((Method::DELETE, "/v1/models".into()));
    routes
}

/// Goal: nobody gets in without a key, nor learns what there is. Method: every path that is
/// described and many that do not exist, with no key and with wrong ones.
#[tokio::test]
async fn every_route_but_health_asks_for_a_key() {
    let server = FakeServer::with_keys(&[("ann", "role = 'admin'")]);
    let mut num_open = 0;
    for (method, path) in all_routes() {
        let is_open =
            ["/health", "/health/live", "/health/ready"].contains(&path.split('?').next().unwrap());
        for key in ["", "an", "annn", "Ann", "sk-other", "blake3:", &Digest::of(b"ann").to_string()]
        {
            let answer = server.look(key, method.clone(), &path).await;
            if is_open {
                assert_ne!(answer.status, 401, "{method} {path}");
                num_open += 1;
                continue;
            }
            assert_eq!(answer.status, 401, "{method} {path} with `{key}`: {}", answer.text);
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
            assert!(!answer.text.contains(&path) || path == "/", "{}", answer.text);
        }
        let request = Request::builder().method(method.clone()).uri(&path);
        let answer = server.send(request.body(Body::empty()).unwrap()).await;
        assert_eq!(answer.status() == 401, !is_open, "{method} {path}");
        let answer = server.look("ann", method.clone(), &path).await;
        assert_ne!(answer.status, 401, "{method} {path}: {}", answer.text);
    }
    assert!(num_open != 0);
}

#[tokio::test]
async fn a_missing_key_is_told_in_each_protocols_words() {
    let server = FakeServer::with_keys(&[("ann", "")]);
    let error = server.get("/v1/models").await.error(401);
    assert_eq!(error["code"], "invalid_api_key");
    assert_eq!(error["type"], "invalid_request_error");
    assert!(error["message"].as_str().unwrap().contains("Bearer"));
    let answer = server.ask("bob", "/compatible-mode/v1/chat/completions", chat("x")).await;
    assert_eq!(answer.error(401)["code"], "invalid_api_key");
    assert!(answer.json()["request_id"].is_string());
    assert!(!answer.text.contains("bob"), "{}", answer.text);
    let native = "/api/v1/services/aigc/text-generation/generation";
    let answer = server.ask("bob", native, json!({})).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["code"]), (401, &json!("InvalidApiKey")));
    for path in ["/v1/messages", "/apps/anthropic/v1/messages"] {
        let answer = server.ask("bob", path, json!({})).await;
        assert_eq!(answer.status, 401);
        assert_eq!(answer.json()["error"]["type"], "authentication_error", "{}", answer.text);
    }
}

#[tokio::test]
async fn a_key_may_come_in_three_headers() {
    let server = FakeServer::with_keys(&[("ann", "")]);
    let status = async |headers: &[(&str, &str)]| {
        let mut request = Request::get("/v1/models");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        server.send(request.body(Body::empty()).unwrap()).await.status().as_u16()
    };
    for header in [
        ("authorization", "Bearer ann"),
        ("authorization", "bearer ann"),
        ("x-api-key", "ann"),
        ("api-key", "ann"),
    ] {
        assert_eq!(status(&[header]).await, 200, "{header:?}");
    }
    // Of several the first counts, right or wrong.
    assert_eq!(status(&[("api-key", "x"), ("authorization", "Bearer ann")]).await, 200);
    assert_eq!(status(&[("api-key", "ann"), ("authorization", "Bearer x")]).await, 401);
    assert_eq!(status(&[("api-key", "ann"), ("x-api-key", "x")]).await, 401);
    assert_eq!(status(&[("authorization", "Basic ann")]).await, 401);
}

#[tokio::test]
async fn a_key_uses_and_sees_only_its_models() {
    let server = FakeServer::with_keys(&[
        ("one", "models = ['org/*']"),
        ("hosted", "models = ['qwen-plus']"),
        ("none", "models = []"),
        ("all", ""),
    ]);
    let names = async |key: &str| {
        let list = server.look(key, Method::GET, "/v1/models").await.ok();
        let data = list["data"].as_array().unwrap().clone();
        data.into_iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names("all").await, [MODEL, "org/alias"]);
    assert_eq!(names("one").await, ["org/alias"]);
    assert!(names("none").await.is_empty());
    let list = server.look("one", Method::GET, "/api/v1/models").await.json();
    assert_eq!(list["output"]["total"], 1, "{list}");
    assert_eq!(server.look("one", Method::GET, "/v1/models/org/alias").await.status, 200);
    let refused = server.look("one", Method::GET, "/v1/models/fake-model").await.error(403);
    assert_eq!(refused["code"], "model_not_allowed");
    assert_eq!(refused["param"], "model");

    server
        .ask("hosted", "/v1/chat/completions", with(chat("a"), json!({"model": "qwen-plus"})))
        .await
        .ok();
    let bodies = [
        ("/v1/chat/completions", chat("a")),
        ("/v1/chat/completions/render", chat("a")),
        ("/v1/completions", json!({"model": MODEL, "prompt": "a"})),
        ("/v1/completions/render", json!({"model": MODEL, "prompt": "a"})),
        ("/v1/fim/completions", json!({"model": MODEL, "prompt": "a"})),
        ("/v1/embeddings", json!({"model": MODEL, "input": "a"})),
        ("/v1/responses", json!({"model": MODEL, "input": "a"})),
        ("/v1/responses/input_tokens", json!({"model": MODEL, "input": "a"})),
        ("/tokenize", json!({"model": MODEL, "prompt": "a"})),
        ("/tokenize", json!({"prompt": "a"})),
        ("/detokenize", json!({"model": MODEL, "tokens": [97]})),
    ];
    for (path, body) in bodies {
        for key in ["one", "hosted", "none"] {
            let error = server.ask(key, path, body.clone()).await.error(403);
            assert_eq!(error["code"], "model_not_allowed", "{key} {path}");
        }
        assert_ne!(server.ask("all", path, body).await.status, 403, "{path}");
    }
    // What does not exist is not told from what is not allowed.
    let missing = with(chat("a"), json!({"model": "gpt-9"}));
    server.ask("one", "/v1/chat/completions", missing.clone()).await.error(403);
    server.ask("all", "/v1/chat/completions", missing).await.error(404);
    let message =
        json!({"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]});
    for path in ["/v1/messages", "/v1/messages/count_tokens"] {
        let answer = server.ask("none", path, message.clone()).await;
        assert_eq!(answer.status, 403);
        assert_eq!(answer.json()["error"]["type"], "permission_error");
    }
    let body = json!({"model": MODEL, "input": {"prompt": "a"}});
    for path in ["services/aigc/text-generation/generation", "tokenizer"] {
        let answer = server.ask("none", &format!("/api/v1/{path}"), body.clone()).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["code"]), (403, &json!("AccessDenied")));
    }
}

#[tokio::test]
async fn only_admins_see_everybodys_requests() {
    let server = FakeServer::with_keys(&[("ann", "role = 'admin'"), ("bob", "")]);
    let error = server.look("bob", Method::GET, "/metrics").await.error(403);
    assert_eq!(error["code"], "insufficient_permissions");
    assert_eq!(server.look("ann", Method::GET, "/metrics").await.status, 200);
    assert_eq!(FakeServer::start().get("/metrics").await.status, 200);
}

#[tokio::test]
async fn a_stored_response_is_for_the_key_that_made_it() {
    let server = FakeServer::with_keys(&[("ann", ""), ("bob", "")]);
    let body = json!({"model": MODEL, "input": "say:secret;"});
    let response = server.ask("ann", "/v1/responses", body).await.ok();
    let id = response["id"].as_str().unwrap();
    let path = format!("/v1/responses/{id}");
    for (method, path) in [
        (Method::GET, path.clone()),
        (Method::DELETE, path.clone()),
        (Method::GET, format!("{path}/input_items")),
        (Method::POST, format!("{path}/cancel")),
    ] {
        let error = server.look("bob", method, &path).await.error(404);
        assert_eq!(error["code"], "response_not_found", "{path}");
    }
    let next = json!({"model": MODEL, "input": "say:more;", "previous_response_id": id});
    for path in ["/v1/responses", "/v1/responses/input_tokens"] {
        let error = server.ask("bob", path, next.clone()).await.error(400);
        assert_eq!(error["code"], "previous_response_not_found");
    }
    server.ask("ann", "/v1/responses", next).await.ok();
    assert!(server.look("ann", Method::GET, &path).await.text.contains("secret"));
    server.look("ann", Method::DELETE, &path).await.ok();
}

/// Goal: with isolation, no key learns from a cached prefix what another sent. Method: two keys
/// send the same prompt, with and without isolation, and count what was cached.
#[tokio::test]
async fn prefixes_can_be_kept_apart() {
    for (sharing, expected) in
        [(PrefixSharing::BetweenAll, true), (PrefixSharing::WithinKey, false)]
    {
        let mut server = FakeServer::with_keys(&[("ann", ""), ("bob", "")]);
        server.state.prefix_sharing = sharing;
        let cached = async |key: &str, salt: &str| {
            let body = json!({"model": MODEL, "prompt": "x".repeat(100), "max_tokens": 1});
            let body = if salt.is_empty() { body } else { with(body, json!({"cache_salt": salt})) };
            let answer = server.ask(key, "/v1/completions", body).await.ok();
            answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() != 0
        };
        assert!(!cached("ann", "").await);
        assert!(cached("ann", "").await);
        assert_eq!(cached("bob", "").await, expected);
        assert!(!cached("ann", "s").await);
        assert!(cached("ann", "s").await);
        assert_eq!(cached("bob", "s").await, expected);
    }
}

#[tokio::test]
async fn one_key_opens_everything() {
    let mut server = FakeServer::start();
    server.state.keys = Some(std::sync::Arc::new(KeyRing::only("a long enough secret")));
    server.get("/v1/models").await.error(401);
    server.ask("a long enough secret", "/v1/chat/completions", chat("hi")).await.ok();
    let metrics = server.look("a long enough secret", Method::GET, "/metrics").await;
    assert_eq!(metrics.status, 200);
}
