//! `/v1/embeddings`: every form of input, both encodings, and company.

use qwen_server::engine::EngineConfig;
use qwen_server::http::HttpLimits;
use serde_json::{Value, json};

use crate::api_fake::{FakeServer, MODEL, chat, config, with};

const PATH: &str = "/v1/embeddings";

fn input(input: impl Into<Value>) -> Value {
    json!({"model": MODEL, "input": input.into()})
}

/// The fake model's vector of a text: the mean of its bytes, and one.
fn expected(text: &str) -> Vec<f32> {
    let mean = (text.bytes().map(f64::from).sum::<f64>() / text.len() as f64) as f32;
    let length = (f64::from(mean) * f64::from(mean) + 1.0).sqrt();
    vec![(f64::from(mean) / length) as f32, (1.0 / length) as f32]
}

fn vectors(body: &Value) -> Vec<Vec<f32>> {
    let data = body["data"].as_array().unwrap();
    for (index, entry) in data.iter().enumerate() {
        assert_eq!(entry["index"], index);
        assert_eq!(entry["object"], "embedding");
    }
    data.iter().map(|entry| serde_json::from_value(entry["embedding"].clone()).unwrap()).collect()
}

#[tokio::test]
async fn inputs_come_as_text_and_as_tokens_alone_and_in_lists() {
    let server = FakeServer::start();
    let tokens: Vec<u8> = b"abc".to_vec();
    for one in [json!("abc"), json!(["abc"]), json!(tokens), json!([tokens])] {
        let answer = server.post(PATH, input(one)).await;
        assert_eq!(answer.header("x-embedding-pooling"), Some("mean"));
        let body = answer.ok();
        assert_eq!(body["object"], "list");
        assert_eq!(body["model"], MODEL);
        assert_eq!(body["usage"], json!({"prompt_tokens": 3, "total_tokens": 3}));
        assert_eq!(vectors(&body), [expected("abc")]);
    }
    let texts: Vec<String> = (1..70).map(|len| "wxyz".repeat(len)).collect();
    let body = server.post(PATH, input(texts.clone())).await.ok();
    let all: Vec<_> = texts.iter().map(|text| expected(text)).collect();
    assert_eq!(vectors(&body), all, "in order, whoever was done first");
    server.wait_until_idle().await;
    let card = server.get("/v1/models").await.ok();
    assert_eq!(card["data"][0]["embedding_pooling"], "mean");
}

#[tokio::test]
async fn base64_is_the_same_numbers() {
    let server = FakeServer::start();
    let base64 = with(input("abc"), json!({"encoding_format": "base64", "dimensions": 2}));
    let body = server.post(PATH, base64).await.ok();
    let bytes: Vec<u8> = expected("abc").iter().flat_map(|value| value.to_le_bytes()).collect();
    let text = body["data"][0]["embedding"].as_str().unwrap();
    assert_eq!(text.len(), 12, "{text}");
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits = |byte: u8| alphabet.find(char::from(byte)).unwrap() as u32;
    let triples = text.trim_end_matches('=').as_bytes().chunks(4).flat_map(|chunk| {
        let word = chunk.iter().fold(0, |word, byte| word << 6 | bits(*byte));
        let word = word << (6 * (4 - chunk.len()));
        word.to_be_bytes()[1..chunk.len()].to_vec()
    });
    assert_eq!(triples.collect::<Vec<_>>(), bytes);
}

#[tokio::test]
async fn what_cannot_be_embedded_is_refused_by_name() {
    let server = FakeServer::start();
    let cases = [
        (json!({"input": ""}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [[97], []]}), "input[1]"),
        (json!({"input": [97, 300]}), "input[1]"),
        (json!({"input": {"text": "a"}}), "input"),
        (json!({"input": vec!["a"; 2049]}), "input"),
        (json!({"input": "a".repeat(513)}), "input"),
        (json!({"dimensions": 1}), "dimensions"),
        (json!({"encoding_format": "int8"}), "encoding_format"),
        (json!({"service_tier": "golden"}), "service_tier"),
        (json!({"truncate_prompt_tokens": 3}), "truncate_prompt_tokens"),
    ];
    for (more, param) in cases {
        let answer = server.post(PATH, with(input("a"), more)).await;
        assert_eq!(answer.error(400)["param"], param);
    }
    let answer = server.post(PATH, with(input("a"), json!({"model": "other"}))).await;
    assert_eq!(answer.error(404)["code"], "model_not_found");
    let answer = server.post(PATH, with(input("a"), json!({"user": "u", "colour": 1}))).await;
    assert_eq!(answer.header("x-ignored-params"), Some("colour"));
}

#[tokio::test]
async fn company_and_a_small_cache_change_nothing() {
    let small = EngineConfig { max_model_len: 512, num_blocks: 34, ..config() };
    let server = FakeServer::with(&small, HttpLimits::default());
    let texts: Vec<String> = (0..20).map(|i| "the same beginning ".repeat(i % 7 + 1)).collect();
    let all: Vec<_> = texts.iter().map(|text| expected(text)).collect();
    let (embedded, said) = tokio::join!(
        server.post(PATH, input(texts)),
        server.post("/v1/chat/completions", chat("hello")),
    );
    assert_eq!(vectors(&embedded.ok()), all);
    assert_eq!(said.ok()["choices"][0]["message"]["content"], "hello");
    server.wait_until_idle().await;
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_inputs_back() {
    let server = FakeServer::start();
    let texts: Vec<String> = (0..400).map(|i| format!("{i} {}", "x".repeat(400))).collect();
    let request = server.post(PATH, input(texts));
    let left = tokio::time::timeout(std::time::Duration::from_millis(20), request).await;
    assert!(left.is_err(), "the answer came before the client could leave");
    server.wait_until_idle().await;
}
