//! Bodies of requests: a 4xx in the shape of the endpoint, or a success, and nothing else; in time,
//! and the server goes on.

use std::time::Duration;

use qwen_server::engine::EngineConfig;
use qwen_server::http::HttpLimits;
use serde_json::Value;

use crate::api_fake::{Answer, FakeServer, chat, config};
use crate::fuzzer::{fuzz, outcome};

/// The first byte of an input chooses one.
const PATHS: [&str; 13] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/fim/completions",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/responses/input_tokens",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/v1/responses/x/cancel",
];
/// More than any body may take on a busy machine: a grammar may be compiled for five seconds.
const MAX_TIME: Duration = Duration::from_secs(60);

const WORDS: [&str; 56] = [
    "\"model\": \"fake-model\", ",
    "\"messages\": [{\"role\": \"user\", \"content\": \"say:x;\"}], ",
    "\"role\": \"assistant\"",
    "\"role\": \"tool\"",
    "\"content\": [{\"type\": \"text\", \"text\": \"a\"}]",
    "\"type\": \"tool_result\", \"tool_use_id\": \"t\"",
    "\"type\": \"function_call_output\", \"call_id\": \"c\", \"output\": \"o\"",
    "\"type\": \"reasoning\", \"summary\": []",
    "\"input\": \"say:x;\", ",
    "\"prompt\": [[1, 2]], ",
    "\"max_tokens\": 3, ",
    "\"stream\": true, ",
    "\"n\": 2, ",
    "\"stop\": [\"é\"], ",
    "\"echo\": true, ",
    "\"logprobs\": 2, ",
    "\"best_of\": 2, ",
    "\"suffix\": \"b\", ",
    "\"tools\": [{\"type\": \"function\", \"function\": {\"name\": \"f\"}}], ",
    "\"tools\": [{\"name\": \"f\", \"input_schema\": {}}], ",
    "\"tool_choice\": \"required\", ",
    "\"tool_choice\": {\"type\": \"allowed_tools\", \"tools\": [{\"name\": \"f\"}]}, ",
    "\"strict\": true, ",
    "\"parallel_tool_calls\": false, ",
    "\"guided_json\": ",
    "\"guided_regex\": \"a{1,3}\", ",
    "\"guided_choice\": [\"a\"], ",
    "\"guided_grammar\": \"start: /a/\", ",
    "\"guided_grammar\": \"root ::= [a-é]\", ",
    "\"response_format\": {\"type\": \"json_object\"}, ",
    "\"structured_outputs\": {\"regex\": \"a\"}, ",
    "\"properties\": {\"a\": {\"type\": \"string\"}}",
    "\"$ref\": \"#/$defs/a\"",
    "\"$defs\": {\"a\": {\"$ref\": \"#\"}}",
    "\"pattern\": \"^é|b$\"",
    "\"enum\": [1, \"a\"]",
    "\"cache_control\": {\"type\": \"ephemeral\", \"ttl\": \"5é\"}, ",
    "\"prompt_cache_options\": {\"ttl\": \"5m\"}, ",
    "\"ttl\": \"5\u{434}\"",
    "\"thinking\": {\"type\": \"enabled\", \"budget_tokens\": 1}, ",
    "\"reasoning_effort\": \"low\", ",
    "\"continue_final_message\": true, ",
    "\"chat_template_kwargs\": {\"fail\": true}, ",
    "\"logit_bias\": {\"42\": -100}, ",
    "\"seed\": -1, ",
    "\"temperature\": 1e308, ",
    "\"prompt_logprobs\": 1, ",
    "\"previous_response_id\": \"resp_x\", ",
    "\"metadata\": {\"a\": \"b\"}, ",
    "\"strict_params\": true, ",
    "null",
    "true",
    "-1",
    "18446744073709551615",
    "{}",
    "[]",
];

/// The field that a refusal names, once its shape is checked.
fn refused(path: &str, answer: &Answer) -> String {
    let status = answer.status.as_u16();
    assert!((400..500).contains(&status), "{path}: {}", answer.text);
    if path.starts_with("/v1/messages") {
        let body = answer.json();
        assert_eq!(body["type"], "error", "{body}");
        assert!(body["error"]["message"].is_string(), "{body}");
        return body["error"]["type"].to_string();
    }
    let error = answer.error(status);
    error["param"].as_str().unwrap_or_default().chars().filter(|c| !c.is_ascii_digit()).collect()
}

#[test]
fn bodies_are_answered_or_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = EngineConfig { max_model_len: 512, ..config() };
    let server = FakeServer::with(&config, HttpLimits::default());
    fuzz("bodies", &WORDS, |input, _| {
        let Some((first, body)) = input.split_first() else { return outcome(&"empty") };
        let path = PATHS[usize::from(*first) % PATHS.len()];
        runtime.block_on(async {
            let answer = tokio::time::timeout(MAX_TIME, server.post_text(path, body.to_vec()));
            let answer = answer.await.unwrap_or_else(|_| panic!("{path} takes too long"));
            if answer.status != 200 {
                return outcome(&(path, answer.status.as_u16(), refused(path, &answer)));
            }
            // What is answered is JSON, all of it.
            let is_stream = answer.header("content-type") == Some("text/event-stream");
            let mut num_values = 0;
            for data in answer.text.lines().filter(|_| is_stream) {
                let Some(data) = data.strip_prefix("data: ").filter(|data| *data != "[DONE]")
                else {
                    continue;
                };
                let value: Value = serde_json::from_str(data).unwrap();
                assert!(value.get("error").is_none_or(Value::is_null), "{path}: {value}");
                num_values += 1;
            }
            let body = if is_stream { Value::Null } else { answer.json() };
            let end = &body["choices"][0]["finish_reason"];
            outcome(&(path, num_values.min(9), end.to_string(), body["stop_reason"].to_string()))
        })
    });
    let answer = runtime.block_on(server.post(PATHS[0], chat("still here"))).ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "still here");
    runtime.block_on(server.wait_until_idle());
}
