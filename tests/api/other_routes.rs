//! Models, tokens, health, version and metrics.

use serde_json::{Value, json};

use crate::api_fake::{FakeServer, IM_START, MODEL, with};

#[tokio::test]
async fn models_are_listed_with_their_context() {
    let server = FakeServer::start();
    let list = server.get("/v1/models").await.ok();
    assert_eq!(list["object"], "list");
    let names: Vec<_> = list["data"].as_array().unwrap().iter().map(|m| m["id"].clone()).collect();
    assert_eq!(names, [MODEL, "org/alias"]);
    let mut model = server.get("/v1/models/org/alias").await.ok();
    assert!(model["created"].is_u64());
    model["created"] = Value::Null;
    assert_eq!(
        model,
        json!({"id": "org/alias", "object": "model", "created": null, "owned_by": "qwen-server",
               "root": "/models/fake", "parent": null, "max_model_len": 512,
               "embedding_pooling": "mean"})
    );
}

#[tokio::test]
async fn text_becomes_tokens_and_back() {
    let server = FakeServer::start();
    let body = json!({"model": MODEL, "prompt": "é<|im_start|>", "return_token_strs": true});
    assert_eq!(
        server.post("/tokenize", body).await.ok(),
        json!({"count": 3, "max_model_len": 512, "tokens": [0xc3, 0xa9, IM_START],
               "token_strs": ["Ã", "©", "<|im_start|>"]})
    );
    let body = server.post("/tokenize", json!({"prompt": ""})).await.ok();
    assert_eq!((&body["count"], &body["token_strs"]), (&json!(0), &Value::Null));
    let body = server.post("/detokenize", json!({"tokens": [0xc3, 0xa9, IM_START]})).await.ok();
    assert_eq!(body, json!({"prompt": "é<|im_start|>"}));
}

#[tokio::test]
async fn a_conversation_becomes_the_tokens_of_its_prompt() {
    let server = FakeServer::start();
    let messages = json!([{"role": "user", "content": "x"}]);
    let count = async |more: Value| {
        let mut body = json!({"messages": messages});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/tokenize", body).await.ok()["count"].as_u64().unwrap()
    };
    let bare = count(json!({"add_generation_prompt": false})).await;
    assert_eq!(bare, 9);
    assert_eq!(count(json!({})).await, bare + 11);
    let tool = json!({"type": "function", "function": {"name": "f"}});
    assert!(bare + 11 < count(json!({"tools": [tool]})).await);
    let body = json!({"model": MODEL, "messages": messages, "max_tokens": 1});
    let usage = server.post("/v1/chat/completions", body).await.ok()["usage"].clone();
    assert_eq!(usage["prompt_tokens"], bare + 11);
}

#[tokio::test]
async fn token_requests_are_checked() {
    let server = FakeServer::start();
    let both = json!({"prompt": "x", "messages": []});
    assert_eq!(server.post("/tokenize", both).await.error(400)["param"], "messages");
    assert_eq!(server.post("/tokenize", json!({})).await.error(400)["param"], "prompt");
    let body = json!({"model": "other", "prompt": "x"});
    assert_eq!(server.post("/tokenize", body).await.error(404)["code"], "model_not_found");
    let answer = server.post("/detokenize", json!({"tokens": [1, 999]})).await;
    assert_eq!(answer.error(400)["param"], "tokens[1]");
    let answer = server.post("/detokenize", json!({"tokens": [1, "x"]})).await;
    assert_eq!(answer.error(400)["param"], "tokens[1]");
}

#[tokio::test]
async fn token_requests_do_not_swallow_what_they_do_not_know() {
    let server = FakeServer::start();
    for (path, body) in
        [("/tokenize", json!({"prompt": "x"})), ("/detokenize", json!({"tokens": [97]}))]
    {
        let answer = server.post(path, with(body.clone(), json!({"novelty": 1}))).await;
        answer.ok();
        assert_eq!(answer.header("x-ignored-params"), Some("novelty"));
        let strict = with(body.clone(), json!({"novelty": 1, "strict_params": true}));
        assert_eq!(server.post(path, strict).await.error(400)["param"], "novelty");
        let answer = server.post(path, with(body, json!({"chat_template": "{{ x }}"}))).await;
        assert_eq!(answer.error(400)["param"], "chat_template");
    }
}

#[tokio::test]
async fn probes_and_metrics_answer() {
    let server = FakeServer::start();
    server.state.engine.ready().await.unwrap();
    for path in ["/health", "/health/live", "/health/ready"] {
        assert_eq!(server.get(path).await.ok(), json!({"status": "ok"}));
    }
    assert_eq!(server.get("/version").await.ok()["version"], env!("CARGO_PKG_VERSION"));
    let metrics = server.get("/metrics").await;
    assert_eq!(metrics.status, 200);
    assert!(metrics.header("content-type").unwrap().starts_with("text/plain"));
}
