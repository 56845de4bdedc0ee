//! Bodies on DashScope's own paths: a success, or a 4xx in the shape that its clients read.

use std::time::Duration;

use qwen_server::engine::EngineConfig;
use qwen_server::http::HttpLimits;
use serde_json::Value;

use crate::api_fake::{FakeServer, config};
use crate::fuzzer::{fuzz, outcome};

/// The first byte of an input chooses one.
const PATHS: [&str; 5] = [
    "/api/v1/services/aigc/text-generation/generation",
    "/api/v1/services/aigc/multimodal-generation/generation",
    "/api/v1/services/embeddings/text-embedding/text-embedding",
    "/api/v1/tokenizer",
    "/compatible-mode/v1/chat/completions",
];
/// The byte of the first path.
const FIRST: u8 = b'!';
const MAX_TIME: Duration = Duration::from_secs(60);

const WORDS: [&str; 30] = [
    "\"model\": \"fake-model\", ",
    "\"model\": \"qwen-plus\", ",
    "\"input\": {\"prompt\": \"say:x;\"}, ",
    "\"input\": {\"messages\": [{\"role\": \"user\", \"content\": \"say:x;\"}]}, ",
    "\"content\": [{\"text\": \"a\"}, {\"image\": \"x\"}]",
    "\"parameters\": {\"max_tokens\": 3}, ",
    "\"result_format\": \"message\", ",
    "\"result_format\": \"text\", ",
    "\"incremental_output\": true, ",
    "\"enable_thinking\": true, ",
    "\"thinking_budget\": 1, ",
    "\"enable_search\": true, ",
    "\"repetition_penalty\": 1.1, ",
    "\"top_k\": -1, ",
    "\"seed\": -1, ",
    "\"stop\": [[1, 2]], ",
    "\"stop\": \"é\", ",
    "\"n\": 2, ",
    "\"tools\": [{\"type\": \"function\", \"function\": {\"name\": \"f\"}}], ",
    "\"tool_choice\": \"auto\", ",
    "\"response_format\": {\"type\": \"json_object\"}, ",
    "\"partial\": true, ",
    "\"texts\": [\"a\"], ",
    "\"dimension\": 2, ",
    "\"role\": \"assistant\"",
    "null",
    "-1",
    "18446744073709551616",
    "{}",
    "[]",
];

#[test]
fn native_bodies_are_answered_or_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = EngineConfig { max_model_len: 512, ..config() };
    let server = FakeServer::with(&config, HttpLimits::default());
    fuzz("native", &WORDS, |input, _| {
        let Some((first, body)) = input.split_first() else { return outcome(&"empty") };
        let path = PATHS[usize::from(first.wrapping_sub(FIRST)) % PATHS.len()];
        runtime.block_on(async {
            let answer = tokio::time::timeout(MAX_TIME, server.post_text(path, body.to_vec()));
            let answer = answer.await.unwrap_or_else(|_| panic!("{path} takes too long"));
            let status = answer.status.as_u16();
            if answer.header("content-type") == Some("text/event-stream") {
                return outcome(&(path, status, answer.text.matches("data:").count().min(9)));
            }
            let body = answer.json();
            if status == 200 {
                let end = &body["output"]["choices"][0]["finish_reason"];
                return outcome(&(path, end.to_string(), body["output"]["text"].is_string()));
            }
            assert!((400..500).contains(&status), "{path}: {}", answer.text);
            let error = if path.starts_with("/compatible") { &body["error"] } else { &body };
            assert!(error["message"].is_string() && error["code"].is_string(), "{path}: {body}");
            assert!(body["request_id"].is_string(), "{path}: {body}");
            let told: String = error["message"].as_str().map_or(String::new(), |message| {
                message.chars().filter(char::is_ascii_lowercase).take(24).collect()
            });
            outcome(&(path, status, Value::to_string(&error["code"]), told))
        })
    });
    runtime.block_on(server.wait_until_idle());
}
