//! How much a key may ask for, and what its holder is told.

use std::time::Duration;

use axum::http::Method;
use serde_json::{Value, json};

use crate::api_fake::{Answer, FakeServer, MODEL, chat};

const CHAT: &str = "/v1/chat/completions";

fn number(answer: &Answer, name: &str) -> u64 {
    let value = answer.header(name).unwrap_or_else(|| panic!("no {name}: {:?}", answer.headers));
    value.parse().unwrap()
}

/// `num_tokens` of prompt, and as many of answer.
fn completion(num_prompt: usize, num_answer: usize) -> Value {
    json!({"model": MODEL, "prompt": vec![120; num_prompt], "max_tokens": num_answer})
}

#[tokio::test]
async fn requests_are_counted_and_headers_say_so() {
    let server = FakeServer::with_keys(&[("ann", "requests_per_minute = 2"), ("bob", "")]);
    let first = server.ask("ann", CHAT, chat("a")).await;
    first.ok();
    assert_eq!(number(&first, "x-ratelimit-limit-requests"), 2);
    assert_eq!(number(&first, "x-ratelimit-remaining-requests"), 1);
    let reset = first.header("x-ratelimit-reset-requests").unwrap();
    assert!(reset == "30s" || reset.starts_with("29."), "{reset}");
    assert!(first.header("x-ratelimit-limit-tokens").is_none());
    // Work that is refused counts too: refusing is work.
    server.ask("ann", CHAT, json!({})).await.error(400);
    let refused = server.ask("ann", CHAT, chat("a")).await;
    let error = refused.error(429);
    assert_eq!(
        (&error["type"], &error["code"]),
        (&json!("requests"), &json!("rate_limit_exceeded"))
    );
    let (seconds, millis) = (number(&refused, "retry-after"), number(&refused, "retry-after-ms"));
    assert_eq!(seconds, millis.div_ceil(1000));
    assert!((25..=30).contains(&seconds), "{seconds}");
    assert_eq!(number(&refused, "x-ratelimit-remaining-requests"), 0);
    // Looking costs nothing, and others have their own.
    assert_eq!(server.look("ann", Method::GET, "/v1/models").await.status, 200);
    let other = server.ask("bob", CHAT, chat("a")).await;
    other.ok();
    assert!(other.header("x-ratelimit-limit-requests").is_none());
}

#[tokio::test]
async fn tokens_of_prompt_and_answer_are_counted() {
    let server = FakeServer::with_keys(&[("ann", "tokens_per_minute = 100")]);
    let first = server.ask("ann", "/v1/completions", completion(40, 20)).await;
    first.ok();
    // The prompt is taken when it is let in, the answer when it is over; headers come in between or
    // after, which makes no difference to a whole answer.
    let remaining = number(&first, "x-ratelimit-remaining-tokens");
    assert!((40..=41).contains(&remaining), "{remaining}");
    let second = server.ask("ann", "/v1/completions", completion(10, 50)).await;
    second.ok();
    assert_eq!(number(&second, "x-ratelimit-remaining-tokens"), 0);
    let refused = server.ask("ann", "/v1/completions", completion(10, 1)).await;
    let error = refused.error(429);
    assert_eq!((&error["type"], &error["code"]), (&json!("tokens"), &json!("rate_limit_exceeded")));
    // 20 are owed and 10 are needed, at 100 a minute.
    assert!((16..=18).contains(&number(&refused, "retry-after")), "{:?}", refused.headers);
    let never = server.ask("ann", "/v1/completions", completion(101, 1)).await;
    assert_eq!(never.error(400)["code"], "request_beyond_quota");
    assert!(never.header("retry-after").is_none());
    let embedding = json!({"model": MODEL, "input": "twelve words"});
    server.ask("ann", "/v1/embeddings", embedding).await.error(429);
}

#[tokio::test]
async fn a_stream_is_charged_when_it_is_over() {
    let server = FakeServer::with_keys(&[("ann", "tokens_per_minute = 100")]);
    let mut body = completion(40, 50);
    body["stream"] = json!(true);
    let streamed = server.ask("ann", "/v1/completions", body).await;
    assert_eq!(number(&streamed, "x-ratelimit-remaining-tokens"), 60);
    assert!(streamed.chunks().len() > 10);
    let refused = server.ask("ann", "/v1/completions", completion(20, 1)).await;
    assert_eq!(refused.error(429)["type"], "tokens");
}

#[tokio::test]
async fn what_is_not_computed_costs_no_tokens() {
    let server = FakeServer::with_keys(&[("ann", "tokens_per_minute = 1000")]);
    server.state.engine.drain();
    let answer = server.ask("ann", "/v1/completions", completion(400, 1)).await;
    answer.error(503);
    assert_eq!(number(&answer, "x-ratelimit-remaining-tokens"), 1000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_at_a_time_are_counted_until_their_end() {
    let server = FakeServer::with_keys(&[("ann", "max_concurrent = 2"), ("bob", "")]);
    let endless = json!({"model": MODEL, "prompt": "go", "max_tokens": 400, "stream": true});
    let start = async || {
        let request = axum::http::Request::post("/v1/completions")
            .header("content-type", "application/json")
            .header("api-key", "ann")
            .body(axum::body::Body::from(endless.to_string()));
        server.send(request.unwrap()).await
    };
    let (first, second) = (start().await, start().await);
    assert_eq!((first.status().as_u16(), second.status().as_u16()), (200, 200));
    let refused = server.ask("ann", CHAT, chat("a")).await;
    let error = refused.error(429);
    assert_eq!(
        (&error["type"], &error["code"]),
        (&json!("requests"), &json!("rate_limit_exceeded"))
    );
    assert_eq!(number(&refused, "retry-after"), 1);
    server.ask("bob", CHAT, chat("a")).await.ok();
    // One is read to its end, one is left.
    drop(second);
    let mut has_seat = false;
    for _ in 0..200 {
        has_seat = server.ask("ann", CHAT, chat("a")).await.status == 200;
        if has_seat {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(has_seat);
    Answer::read(first).await.chunks();
    server.wait_until_idle().await;
    // Refused requests leave no seat taken: all of them are free again.
    let (first, second) = (start().await, start().await);
    assert_eq!((first.status().as_u16(), second.status().as_u16()), (200, 200));
}

#[tokio::test]
async fn every_protocol_has_its_words_for_a_spent_quota() {
    let server = FakeServer::with_keys(&[
        ("few", "requests_per_minute = 1"),
        ("short", "tokens_per_minute = 60"),
    ]);
    server.ask("few", CHAT, json!({})).await.error(400);
    server.ask("short", "/v1/completions", completion(1, 200)).await.ok();
    let native = "/api/v1/services/aigc/text-generation/generation";
    let body = json!({"model": MODEL, "input": {"prompt": "a"}});
    let message =
        json!({"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]});
    for (key, code, compatible) in [
        ("few", "Throttling.RateQuota", "limit_requests"),
        ("short", "Throttling.AllocationQuota", "insufficient_quota"),
    ] {
        let answer = server.ask(key, native, body.clone()).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["code"]), (429, &json!(code)));
        number(&answer, "retry-after");
        let path = "/compatible-mode/v1/chat/completions";
        assert_eq!(server.ask(key, path, chat("a")).await.error(429)["code"], compatible);
        let answer = server.ask(key, "/v1/messages", message.clone()).await;
        assert_eq!(answer.status, 429);
        assert_eq!(answer.json()["error"]["type"], "rate_limit_error");
        let resource = if key == "few" { "requests" } else { "tokens" };
        let header = |what| answer.header(&format!("anthropic-ratelimit-{resource}-{what}"));
        assert_eq!(header("remaining"), Some("0"));
        assert!(header("limit").is_some() && header("reset").unwrap().ends_with('Z'));
        number(&answer, "retry-after");
    }
}
