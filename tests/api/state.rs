//! `/admin/state`: what runs, waits and why, and what it says when the engine does not answer.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request, Response};
use qwen_server::chat::model::Conventions;
use qwen_server::engine::{EngineConfig, spawn};
use qwen_server::http::{AppState, HttpLimits};
use qwen_server::scheduler::step::{Runner, SchedulerOutput, SeqOutput, TokenMasks};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::api_fake::{FakeServer, MODEL, config, model};

/// A request that runs in the background until it is aborted: an answer begins with its first piece.
struct Begun(JoinHandle<Response<Body>>);

impl Drop for Begun {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Asks for an answer to `prompt`, and waits until the engine knows of it.
async fn begin(server: &FakeServer, id: &'static str, prompt: &str, more: &Value) -> Begun {
    begin_with_key("", server, (id, prompt), more).await
}

async fn begin_with_key(
    key: &str,
    server: &FakeServer,
    (id, prompt): (&'static str, &str),
    more: &Value,
) -> Begun {
    let mut body = json!({"model": MODEL, "prompt": prompt, "stream": true});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let request = Request::post("/v1/completions").header("content-type", "application/json");
    let request = request.header("x-api-key", key);
    let request = request.header("x-request-id", id).body(Body::from(body.to_string())).unwrap();
    let state = server.state.clone();
    let begun = Begun(tokio::spawn(async move { FakeServer { state }.send(request).await }));
    state_with(server, |all| all.iter().any(|sequence| sequence["request_id"] == id)).await;
    begun
}

/// The first state in which the sequences are as `is_wanted` says.
async fn state_with(server: &FakeServer, is_wanted: impl Fn(&[Value]) -> bool) -> Value {
    let mut seen = Vec::new();
    for _ in 0..1000 {
        let state = server.look("ops", Method::GET, "/admin/state").await.ok();
        if is_wanted(state["sequences"].as_array().unwrap()) {
            return state;
        }
        seen.push(state["sequences"].to_string());
    }
    seen.dedup();
    panic!("never so, but {:#?}", &seen[..seen.len().min(9)]);
}

fn waits_for(sequence: &Value, reason: &str) -> bool {
    sequence["phase"] == "waiting" && sequence["waits_for"].as_str().unwrap().starts_with(reason)
}

#[tokio::test]
async fn who_runs_and_who_waits_for_a_place_is_told() {
    let limits = HttpLimits::default();
    let config = EngineConfig { max_num_seqs: 1, max_model_len: 4096, ..config() };
    let server = FakeServer::with(&config, limits);
    let canary = "canary-5d1f";
    let first = begin(&server, "first", canary, &json!({"max_tokens": 4000})).await;
    let second = begin(&server, "second", canary, &json!({"max_tokens": 9, "priority": 3})).await;
    let is_wanted = |all: &[Value]| all.len() == 2 && all[0]["phase"] == "decode";
    let state = state_with(&server, is_wanted).await;
    let [runs, waits] = state["sequences"].as_array().unwrap().as_slice() else { panic!() };
    assert_eq!((&runs["request_id"], &waits["request_id"]), (&json!("first"), &json!("second")));
    assert_eq!((&runs["client"], &runs["choice"]), (&json!("anonymous"), &json!(0)));
    assert_eq!((&runs["prompt_tokens"], &runs["max_tokens"]), (&json!(11), &json!(4000)));
    assert!(0 < runs["generated_tokens"].as_u64().unwrap(), "{state}");
    assert!(0 < runs["blocks"].as_u64().unwrap() && runs["age_ms"].is_u64(), "{state}");
    assert!(waits_for(waits, "a sequence to end"), "{state}");
    assert_eq!((&waits["priority"], &waits["blocks"]), (&json!(3), &json!(0)));
    assert_eq!(state["queue"]["max_running"], 1);
    assert_eq!(state["health"]["live"], true);
    assert!(0.0 < state["cache"]["usage"].as_f64().unwrap(), "{state}");
    assert!(!state.to_string().contains("canary"), "{state}");
    drop((first, second));
    server.wait_until_idle().await;
    assert_eq!(server.get("/admin/state").await.ok()["sequences"], json!([]));
}

#[tokio::test]
async fn who_waits_for_blocks_or_a_prefix_is_told() {
    let config = EngineConfig { num_blocks: 128, max_num_batched_tokens: 2, ..config() };
    let server = FakeServer::with(&config, HttpLimits::default());
    let twins = begin(&server, "twins", &"a".repeat(1000), &json!({"max_tokens": 9, "n": 2})).await;
    let is_wanted = |all: &[Value]| all.len() == 2 && waits_for(&all[1], "another sequence");
    let state = state_with(&server, is_wanted).await;
    assert_eq!(state["sequences"][0]["phase"], "prefill", "{state}");
    drop(twins);
    server.wait_until_idle().await;

    let large = begin(&server, "large", &"b".repeat(1000), &json!({"max_tokens": 1000})).await;
    let other = begin(&server, "other", &"c".repeat(1500), &json!({"max_tokens": 9})).await;
    let last = begin(&server, "last", &"d".repeat(5), &json!({"max_tokens": 9})).await;
    let is_wanted = |all: &[Value]| {
        all.len() == 3 && waits_for(&all[1], "cache blocks") && waits_for(&all[2], "its turn")
    };
    state_with(&server, is_wanted).await;
    drop((large, other, last));
}

/// A device that computes for as long as the test wants.
struct Stuck(Receiver<()>);

impl Runner for Stuck {
    type Error = &'static str;

    fn launch(&mut self, _: &SchedulerOutput) -> Result<(), &'static str> {
        // Until the sender is gone.
        let _ = self.0.recv();
        Err("released")
    }

    fn sample(
        &mut self,
        _: &SchedulerOutput,
        _: &TokenMasks,
    ) -> Result<Vec<SeqOutput>, &'static str> {
        Err("never launched")
    }
}

#[tokio::test]
async fn an_engine_that_does_not_answer_is_explained() {
    let (loaded, loading) = channel::<()>();
    let (release, released) = channel();
    let mut released = Some(released);
    let (engine, _thread) = spawn(config(), move || {
        let _ = loading.recv();
        Ok(Stuck(released.take().ok_or("there is only one")?))
    });
    let state = AppState::new(engine, model(Conventions::default()), HttpLimits::default());
    let server = FakeServer { state };
    let answer = server.get("/admin/state").await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.json()["reason"], "the model is loading");
    drop(loaded);
    server.state.engine.ready().await.unwrap();

    let state = server.state.clone();
    let stuck = Begun(tokio::spawn(async move {
        let body = json!({"model": MODEL, "prompt": "x"}).to_string();
        let request = Request::post("/v1/completions").header("content-type", "application/json");
        FakeServer { state }.send(request.body(Body::from(body)).unwrap()).await
    }));
    while server.state.engine.step_running_for().is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let answer = server.get("/admin/state").await;
    assert_eq!(answer.status, 503);
    let body = answer.json();
    let reason = body["reason"].as_str().unwrap();
    assert!(reason.starts_with("the engine is busy with a step since "), "{body}");
    assert_eq!(body["sequences"], Value::Null);
    assert_eq!(body["queue"]["max_running"], 64, "the rest is told");
    drop((release, stuck));
}

/// Goal: a request is at most as urgent as its key allows, however it says so, and less if it asks.
#[tokio::test]
async fn nobody_is_more_urgent_than_the_key_allows() {
    let keys = [("slow", "priority = 5"), ("fast", "priority = -7"), ("ops", "role = 'admin'")];
    let config = EngineConfig { max_model_len: 4096, ..config() };
    let mut server = FakeServer::with(&config, HttpLimits::default());
    server.state.keys = FakeServer::with_keys(&keys).state.keys;
    let cases = [
        ("slow", json!({"priority": -100}), 5),
        ("slow", json!({"service_tier": "priority"}), 5),
        ("slow", json!({}), 5),
        ("slow", json!({"priority": 20}), 20),
        ("fast", json!({"priority": -100}), -7),
        ("fast", json!({"priority": -3}), -3),
        ("fast", json!({}), 0),
    ];
    for (key, asked, expected) in cases {
        let mut more = asked.clone();
        more["max_tokens"] = json!(4000);
        let begun = begin_with_key(key, &server, ("urgent", "x"), &more).await;
        let state = server.look("ops", Method::GET, "/admin/state").await.ok();
        let [sequence] = state["sequences"].as_array().unwrap().as_slice() else { panic!() };
        assert_eq!((&sequence["client"], &sequence["priority"]), (&json!(key), &json!(expected)));
        drop(begun);
        server.wait_until_idle().await;
    }
}
