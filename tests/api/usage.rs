//! What is counted is what clients are told, to the token, and every request is counted once.

use std::path::PathBuf;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request};
use http_body_util::BodyExt;
use qwen_server::ledger::calendar::Hour;
use qwen_server::ledger::money::PriceList;
use qwen_server::ledger::{Counts, Ledger, Store};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api_fake::{FakeServer, MODEL, chat, with};
use crate::keys::all_routes;

const CHAT: &str = "/v1/chat/completions";

struct CountingServer {
    server: FakeServer,
    path: PathBuf,
    _folder: TempDir,
}

impl CountingServer {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.db");
        let mut server = FakeServer::start();
        server.state.ledger = Some(Ledger::open(&path).unwrap());
        Self { server, path, _folder: folder }
    }

    /// Everything that was counted, once all is written.
    fn counts(&self) -> Counts {
        self.counts_of("anonymous")
    }

    fn counts_of(&self, client: &str) -> Counts {
        self.server.state.ledger.as_ref().unwrap().close();
        let mut sum = Counts::default();
        let store = Store::open_existing(&self.path).unwrap();
        let add = |account: qwen_server::ledger::Account, counts| {
            assert_eq!((&*account.key, &*account.model), (client, MODEL));
            sum += counts;
        };
        store.read(Hour(0)..Hour::MAX, add).unwrap();
        sum
    }

    async fn stream(&self, path: &str, body: &Value) -> axum::response::Response<Body> {
        let request = Request::post(path).header("content-type", "application/json");
        self.server.send(request.body(body.to_string().into()).unwrap()).await
    }
}

/// The usage of an answer, however its protocol spells it.
fn told(usage: &Value) -> Counts {
    let number = |names: &[&str]| {
        let found = names.iter().find_map(|name| usage.pointer(name)?.as_u64());
        found.unwrap_or_default()
    };
    let cached_tokens = number(&[
        "/prompt_tokens_details/cached_tokens",
        "/input_tokens_details/cached_tokens",
        "/cache_read_input_tokens",
    ]);
    // Anthropic counts what was cached beside the input, others as a part of it.
    let beside = number(&["/cache_read_input_tokens", "/none"])
        + number(&["/cache_creation_input_tokens", "/none"]);
    Counts {
        requests: 1,
        errors: 0,
        prompt_tokens: number(&["/prompt_tokens", "/input_tokens", "/total_tokens"]) + beside,
        cached_tokens,
        completion_tokens: number(&["/completion_tokens", "/output_tokens"]),
    }
}

const REFUSED: Counts =
    Counts { requests: 1, errors: 1, prompt_tokens: 0, cached_tokens: 0, completion_tokens: 0 };

/// Sends request number `kind` of those that end without a surprise. Returns what the client knows.
async fn exchange(server: &FakeServer, kind: u64, text: &str) -> Counts {
    let ask = chat(text);
    let streamed = json!({"stream": true, "stream_options": {"include_usage": true}});
    let native = json!({"messages": ask["messages"]});
    let (path, body) = match kind {
        0 => (CHAT, ask),
        1 => (CHAT, with(chat("x"), json!({"n": 3, "max_tokens": 5}))),
        2 => ("/v1/completions", json!({"model": MODEL, "prompt": [text, "b"], "max_tokens": 4})),
        3 => ("/v1/embeddings", json!({"model": MODEL, "input": [text, "another"]})),
        4 => ("/v1/messages", with(ask, json!({"max_tokens": 9}))),
        5 => ("/v1/responses", json!({"model": MODEL, "input": format!("say:{text};")})),
        6 => (
            "/api/v1/services/aigc/text-generation/generation",
            json!({"model": MODEL, "input": native}),
        ),
        7 => {
            let chunks = server.post(CHAT, with(ask, streamed)).await.chunks();
            return told(&chunks.last().unwrap()["usage"]);
        }
        8 => {
            assert_eq!(server.post_text(CHAT, "{").await.status, 400);
            return REFUSED;
        }
        9 => {
            assert_eq!(server.post(CHAT, with(ask, json!({"model": "x"}))).await.status, 404);
            return REFUSED;
        }
        10 => {
            let answer = server.post("/v1/messages", with(ask, json!({"max_tokens": -1}))).await;
            assert_eq!(answer.status, 400);
            return REFUSED;
        }
        11 => {
            let long = with(ask, json!({"max_tokens": 100_000}));
            assert_eq!(server.post(CHAT, long).await.status, 400);
            return REFUSED;
        }
        // None of these computes anything.
        12 => {
            server.get("/v1/models").await.ok();
            server.post("/tokenize", json!({"model": MODEL, "prompt": text})).await.ok();
            server.post("/v1/chat/completions/render", ask).await.ok();
            return Counts::default();
        }
        _ => unreachable!(),
    };
    let mut answer = server.post(path, body).await.ok();
    let usage = answer["usage"].take();
    assert!(usage.is_object(), "{path}: {answer}");
    told(&usage)
}

/// Goal: the ledger's sums are the clients' sums. Method: a few hundred random requests of all
/// protocols, several at once, and every answer's own usage added up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_says_what_clients_were_told() {
    let counting = CountingServer::start();
    let mut random = 7_u64;
    let mut below = |limit: u64| {
        // Any sequence that repeats itself late will do: this is Knuth's.
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % limit
    };
    let mut expected = Counts::default();
    for _ in 0..60 {
        let requests = (0..6).map(|_| {
            let length = 1 + below(40) as usize;
            let kind = below(13);
            let text = "abcdefgh".repeat(5)[..length].to_owned();
            let server = &counting.server;
            async move { exchange(server, kind, &text).await }
        });
        for counts in futures_util::future::join_all(requests).await {
            expected += counts;
        }
    }
    assert!(100 < expected.requests && 0 < expected.cached_tokens, "{expected:?}");
    counting.server.wait_until_idle().await;
    assert_eq!(counting.counts(), expected);
}

/// Goal: a request that ends early is counted once, and never with less than its client saw; one
/// that fails is an error, one whose client leaves is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_end_early_are_counted_once() {
    let counting = CountingServer::start();
    let server = &counting.server;
    let endless = json!({"model": MODEL, "messages": [{"role": "user", "content": "for ever"}]});
    let stream = json!({"stream": true, "max_tokens": 400});
    let usage = json!({"stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let mut seen = Counts::default();
    for num_frames in 0..20 {
        let body = with(with(endless.clone(), stream.clone()), usage.clone());
        let mut response = counting.stream(CHAT, &body).await;
        for _ in 0..num_frames {
            let frame = response.body_mut().frame().await.unwrap().unwrap();
            let text = String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap();
            let data = text.rsplit("data: ").next().unwrap();
            let chunk: Value = serde_json::from_str(data.trim()).unwrap();
            if num_frames == 19 {
                seen = told(&chunk["usage"]);
            }
        }
        drop(response);
    }
    // Before there is an answer.
    let waiting = counting.stream(CHAT, &endless);
    let _ = tokio::time::timeout(Duration::from_millis(20), waiting).await;
    for fault in ["then:nan;", "then:error;"] {
        let messages = json!([{"role": "user", "content": format!("say:abc; {fault}")}]);
        let ask = json!({"model": MODEL, "messages": messages});
        assert_eq!(server.post(CHAT, ask.clone()).await.status, 500);
        let answer = server.post(CHAT, with(ask, stream.clone())).await;
        assert!(answer.text.contains("engine_failed"), "{}", answer.text);
    }
    // Before its body is looked at.
    let head = Request::post(CHAT).header("x-request-timeout", "never");
    let head = head.header("content-type", "application/json");
    let refused = server.send(head.body(endless.to_string().into()).unwrap()).await;
    assert_eq!(refused.status(), 400);
    server.wait_until_idle().await;
    let counts = counting.counts();
    assert_eq!((counts.requests, counts.errors), (26, 5));
    assert!(5 < seen.completion_tokens && seen.completion_tokens <= counts.completion_tokens);
    assert!(20 * seen.prompt_tokens <= counts.prompt_tokens);
}

#[tokio::test]
async fn operators_ask_over_http() {
    let mut counting = CountingServer::start();
    let prices = vec!["*=1,2".parse().unwrap()];
    counting.server.state.prices = PriceList { currency: "EUR".to_owned(), prices }.into();
    let told = exchange(&counting.server, 0, "hello").await;
    exchange(&counting.server, 8, "").await;
    assert_eq!(counting.counts().requests, 2);
    let server = &counting.server;
    let report = server.get("/admin/usage").await.ok();
    let line = &report["lines"][0];
    assert_eq!((&line["key"], &line["model"]), (&json!("anonymous"), &json!(MODEL)));
    assert_eq!((&line["requests"], &line["errors"]), (&json!(2), &json!(1)));
    assert_eq!(line["prompt_tokens"], told.prompt_tokens);
    assert_eq!(report["currency"], "EUR");
    assert_eq!(report["total"]["cost"], line["cost"]);
    assert_ne!(line["cost"], "0.000000");
    let csv = server.get("/admin/usage?by=month%2Ckey&since=1h&format=csv").await;
    assert_eq!(csv.header("content-type"), Some("text/csv; charset=utf-8"));
    assert!(csv.text.starts_with("month,key,requests,"), "{}", csv.text);
    assert_eq!(csv.text.lines().count(), 2);
    let old = server.get("/admin/usage?until=2020-01-01&since=2019-01-01").await.ok();
    assert_eq!(old["lines"], json!([]));
    for (query, param) in [
        ("since=yesterday", json!("since")),
        ("until=2020-01-01", json!("until")),
        ("by=colour", json!("by")),
        ("format=xml", json!("format")),
        ("sinse=1d", Value::Null),
    ] {
        let error = server.get(&format!("/admin/usage?{query}")).await.error(400);
        assert_eq!(error["param"], param, "{error}");
    }
    let error = FakeServer::start().get("/admin/usage").await.error(400);
    assert!(error["message"].as_str().unwrap().contains("--usage-ledger"), "{error}");
}

/// Goal: a request that its key's quota refuses counts as an error exactly if it was to be computed.
/// Method: on every path, what is counted of a refused request is compared with what is counted of
/// one that is let in and malformed.
#[tokio::test]
async fn what_computes_nothing_is_no_error_when_a_quota_refuses_it() {
    let paths: Vec<String> = all_routes()
        .into_iter()
        .filter(|(method, path)| method == Method::POST && !path.contains('?'))
        .map(|(_, path)| path)
        .collect();
    let mut computing = Vec::new();
    for path in &paths {
        let counted = async |limits: &str, status: Option<u16>| {
            let mut server = CountingServer::start();
            server.server.state.keys = FakeServer::with_keys(&[("ann", limits)]).state.keys;
            if status.is_some() {
                server.server.ask("ann", "/tokenize", json!({})).await.error(400);
            }
            let answer = server.server.ask("ann", path, json!(5)).await;
            assert!(status.is_none_or(|status| answer.status == status), "{path}: {answer:?}");
            server.counts_of("ann")
        };
        let refused = counted("requests_per_minute = 1", Some(429)).await;
        assert_eq!(refused, counted("", None).await, "{path}");
        assert!(refused == Counts::default() || refused == REFUSED, "{refused:?}");
        computing.extend((refused == REFUSED).then_some(path));
    }
    assert!(computing.len() < paths.len() && 9 <= computing.len(), "{computing:?}");
}
