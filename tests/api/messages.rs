//! Anthropic's `/v1/messages`.

use std::sync::Arc;
use std::time::Duration;

use qwen_server::chat::model::{Conventions, Reasoning};
use qwen_server::http::HttpLimits;
use serde_json::{Map, Value, json};

use crate::api_fake::{Answer, FakeServer, MODEL, config, model, with};

const PATH: &str = "/v1/messages";
const CALL: &str = r#"Well.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>"#;

fn ask(text: &str) -> Value {
    let messages = json!([{"role": "user", "content": format!("say:{text};")}]);
    json!({"model": MODEL, "max_tokens": 200, "messages": messages})
}

fn tools() -> Value {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    json!([{"name": "add", "input_schema": schema}])
}

fn thinking_server() -> FakeServer {
    let mut server = FakeServer::start();
    let conventions = Conventions { reasoning: Reasoning::InTags, ..Conventions::default() };
    server.state.model = Arc::new(model(conventions));
    server
}

#[track_caller]
fn error(answer: &Answer, status: u16, kind: &str) -> String {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
    let body = answer.json();
    assert_eq!(body["type"], "error", "{body}");
    assert_eq!(body["error"]["type"], kind, "{body}");
    assert_eq!(body["request_id"].as_str(), answer.header("request-id"));
    assert_eq!(answer.header("request-id"), answer.header("x-request-id"));
    body["error"]["message"].as_str().unwrap().to_owned()
}

/// Builds the message from the events, as clients do.
fn fold(events: &[Value]) -> Value {
    let mut message = events[0]["message"].clone();
    let mut input = String::new();
    for event in &events[1..] {
        let content = message["content"].as_array_mut().unwrap();
        let index = event["index"].as_u64().unwrap_or_default() as usize;
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert_eq!(index, content.len());
                content.push(event["content_block"].clone());
            }
            "content_block_delta" => {
                let delta = &event["delta"];
                let key = match delta["type"].as_str().unwrap() {
                    "text_delta" => "text",
                    "thinking_delta" => "thinking",
                    "input_json_delta" => {
                        input.push_str(delta["partial_json"].as_str().unwrap());
                        continue;
                    }
                    other => panic!("{other}"),
                };
                let text = content[index][key].as_str().unwrap();
                content[index][key] = format!("{text}{}", delta[key].as_str().unwrap()).into();
            }
            "content_block_stop" if !input.is_empty() => {
                content[index]["input"] = serde_json::from_str(&input).unwrap_or(json!({}));
                input.clear();
            }
            "message_delta" => {
                message["stop_reason"] = event["delta"]["stop_reason"].clone();
                message["stop_sequence"] = event["delta"]["stop_sequence"].clone();
                message["usage"] = event["usage"].clone();
            }
            "content_block_stop" | "ping" | "message_stop" => {}
            other => panic!("{other}"),
        }
    }
    message
}

/// The message without what differs from request to request.
fn comparable(message: &Value) -> Value {
    let mut message = message.clone();
    message["id"] = Value::Null;
    message["usage"] = message["usage"]["output_tokens"].clone();
    for block in message["content"].as_array_mut().unwrap() {
        if block["type"] == "tool_use" {
            block["id"] = Value::Null;
        }
    }
    message
}

#[tokio::test]
async fn a_message_has_the_full_shape() {
    let server = FakeServer::start();
    let answer = server.post(PATH, with(ask("hello"), json!({"system": "Be short."}))).await;
    assert!(answer.header("request-id").is_some());
    let message = answer.ok();
    assert!(message["id"].as_str().unwrap().starts_with("msg_"));
    assert_eq!(message["type"], "message");
    assert_eq!(message["role"], "assistant");
    assert_eq!(message["model"], MODEL);
    assert_eq!(message["content"], json!([{"type": "text", "text": "hello"}]));
    assert_eq!(message["stop_reason"], "end_turn");
    assert_eq!(message["stop_sequence"], Value::Null);
    let usage = message["usage"].as_object().unwrap();
    let names: Vec<&String> = usage.keys().collect();
    let expected =
        ["input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"];
    assert_eq!(names, expected);
    assert_eq!(usage["output_tokens"], 6);
    let counted = with(ask("hello"), json!({"system": [{"type": "text", "text": "Be short."}]}));
    let count = server.post("/v1/messages/count_tokens", counted).await.ok();
    assert_eq!(count, json!({"input_tokens": usage["input_tokens"]}));
}

#[tokio::test]
async fn events_add_up_to_the_whole_message() {
    let server = thinking_server();
    let thought = format!("<think>Hmm.</think>{CALL}");
    for body in [
        ask("hello"),
        ask(""),
        with(ask(&thought), json!({"tools": tools()})),
        with(ask("hello"), json!({"max_tokens": 2})),
        with(ask("hello"), json!({"stop_sequences": ["ll"]})),
        with(ask("hello"), json!({"tools": tools(), "tool_choice": {"type": "any"}})),
    ] {
        let whole = server.post(PATH, body.clone()).await.ok();
        let events = server.post(PATH, with(body.clone(), json!({"stream": true}))).await.events();
        assert_eq!(events[0]["type"], "message_start");
        assert_eq!(events.last().unwrap()["type"], "message_stop");
        assert_eq!(comparable(&fold(&events)), comparable(&whole), "{body}");
    }
}

#[tokio::test]
async fn blocks_follow_each_other() {
    let server = thinking_server();
    let body = with(ask(&format!("<think>Hm</think>{CALL}")), json!({"tools": tools()}));
    let message = server.post(PATH, body.clone()).await.ok();
    let content = &message["content"];
    assert_eq!(content[0], json!({"type": "thinking", "thinking": "Hm", "signature": ""}));
    assert_eq!(content[1], json!({"type": "text", "text": "Well."}));
    assert_eq!(content[2]["type"], "tool_use");
    assert_eq!(content[2]["name"], "add");
    assert_eq!(content[2]["input"], json!({"a": 1}));
    assert!(content[2]["id"].as_str().unwrap().starts_with("toolu_"));
    assert_eq!(message["stop_reason"], "tool_use");
    let events = server.post(PATH, with(body, json!({"stream": true}))).await.events();
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    let block = ["content_block_start", "content_block_delta", "content_block_stop"];
    let expected: Vec<&str> = ["message_start", "ping"]
        .into_iter()
        .chain(block)
        .chain(block)
        .chain(block)
        .chain(["message_delta", "message_stop"])
        .collect();
    assert_eq!(kinds, expected);
}

#[tokio::test]
async fn the_end_has_its_reason() {
    let server = FakeServer::start();
    let cut = server.post(PATH, with(ask("hello"), json!({"max_tokens": 2}))).await.ok();
    assert_eq!(cut["stop_reason"], "max_tokens");
    let stopped = with(ask("hello"), json!({"stop_sequences": ["l"]}));
    let stopped = server.post(PATH, stopped).await.ok();
    assert_eq!(stopped["stop_reason"], "stop_sequence");
    assert_eq!(stopped["stop_sequence"], "l");
    assert_eq!(stopped["content"][0]["text"], "he");
}

#[tokio::test]
async fn a_conversation_with_results_of_tools_is_read() {
    let server = FakeServer::start();
    let messages = json!([
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"},
            {"type": "text", "text": "Well."},
            {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1",
                "content": [{"type": "text", "text": "say:two;"}]},
            {"type": "text", "text": "So?"},
        ]},
    ]);
    let body = json!({"model": MODEL, "max_tokens": 20, "messages": messages, "tools": tools()});
    let message = server.post(PATH, body).await.ok();
    assert_eq!(message["content"][0]["text"], "two");
}

#[tokio::test]
async fn marks_keep_a_prefix() {
    let server = FakeServer::start();
    let system = json!([{"type": "text", "text": "r".repeat(100),
        "cache_control": {"type": "ephemeral"}}]);
    let first = server.post(PATH, with(ask("one"), json!({"system": system}))).await.ok();
    assert_eq!(first["usage"]["cache_creation_input_tokens"], 96);
    assert_eq!(first["usage"]["cache_read_input_tokens"], 0);
    let second = server.post(PATH, with(ask("two"), json!({"system": system}))).await.ok();
    assert_eq!(second["usage"]["cache_read_input_tokens"], 112);
    let sum = |message: &Value| -> u64 {
        let usage: &Map<String, Value> = message["usage"].as_object().unwrap();
        usage
            .iter()
            .filter(|(name, _)| *name != "output_tokens")
            .map(|(_, n)| n.as_u64().unwrap())
            .sum()
    };
    assert_eq!(sum(&first), sum(&second));
}

#[tokio::test]
async fn every_flaw_is_named() {
    let server = FakeServer::start();
    let message = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let image = json!({"type": "image", "source": {}});
    let result = json!({"type": "tool_result", "tool_use_id": "t", "content": [image]});
    let tool = |tool: Value| json!({"tools": [tool]});
    let mark = json!({"type": "text", "text": "a", "cache_control": {"type": "for ever"}});
    for (fields, param) in [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": "many"}), "max_tokens"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (message(json!([])), "messages[0].content"),
        (message(json!([image])), "messages[0].content[0].type"),
        (message(json!([result])), "messages[0].content[0].content[0].type"),
        (message(json!([{"type": "text"}])), "messages[0].content[0].text"),
        (message(json!([mark])), "messages[0].content[0].cache_control.type"),
        (message(json!([{"type": "tool_result"}])), "messages[0].content[0].tool_use_id"),
        (json!({"system": 5}), "system"),
        (json!({"system": [image]}), "system[0].type"),
        (json!({"system": [mark]}), "system[0].cache_control.type"),
        (json!({"stop_sequences": "x"}), "stop_sequences"),
        (json!({"stop_sequences": [""]}), "stop_sequences"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_k": -7}), "top_k"),
        (tool(json!({"name": "f"})), "tools[0].input_schema"),
        (tool(json!({"name": "", "input_schema": {}})), "tools[0].name"),
        (tool(json!({"name": "f", "input_schema": 5})), "tools[0].input_schema"),
        (tool(json!({"type": "web_search_20250305", "name": "w"})), "tools[0].type"),
        (json!({"tools": tools(), "tool_choice": {"type": "maybe"}}), "tool_choice.type"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "tool", "name": "no"}}),
            "tool_choice.name",
        ),
        (json!({"tool_choice": {"type": "any"}}), "tool_choice"),
        (json!({"thinking": {"type": "enabled"}}), "thinking.budget_tokens"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 200}}), "thinking.budget_tokens"),
        (json!({"thinking": {"type": "deep"}}), "thinking.type"),
        (json!({"metadata": {"user_id": 5}}), "metadata.user_id"),
        (
            json!({"output_config": {"format": {"type": "json_schema", "schema": {"type": "no"}}}}),
            "output_config.format.schema",
        ),
        (json!({"mcp_servers": [{"name": "m"}]}), "mcp_servers"),
        (json!({"service_tier": "gold"}), "service_tier"),
    ] {
        let answer = server.post(PATH, with(ask("x"), fields.clone())).await;
        let message = error(&answer, 400, "invalid_request_error");
        assert!(message.starts_with(&format!("`{param}`")), "{fields}: {message}");
    }
    let ignored = json!({"unknown": 1, "thinking": {"type": "enabled", "budget_tokens": 100}});
    let answer = server.post(PATH, with(ask("x"), ignored)).await;
    assert_eq!(answer.header("x-ignored-params"), Some("unknown,thinking,thinking.budget_tokens"));
}

#[tokio::test]
async fn errors_have_anthropics_shape_whoever_made_them() {
    let server = FakeServer::start();
    let unknown = server.post(PATH, with(ask("x"), json!({"model": "none"}))).await;
    error(&unknown, 404, "not_found_error");
    error(&server.get("/v1/messages/none").await, 404, "not_found_error");
    error(&server.get(PATH).await, 405, "invalid_request_error");
    error(&server.post_text(PATH, "{").await, 400, "invalid_request_error");
    let long = json!({"system": "x".repeat(600)});
    let message =
        error(&server.post(PATH, with(ask("x"), long)).await, 400, "invalid_request_error");
    assert!(message.contains("maximum context length"), "{message}");
    let limits = HttpLimits { max_body_bytes: 10, ..HttpLimits::default() };
    let server = FakeServer::with(&config(), limits);
    error(&server.post(PATH, ask("x")).await, 413, "request_too_large");
    server.post("/v1/messagesx", ask("x")).await.error(404);
}

#[tokio::test]
async fn a_stream_that_fails_midway_says_so() {
    let server = FakeServer::start();
    let half = r#"Well.<tool_call>{"name": "add", "arguments": {"a": "#;
    for fault in ["then:nan;", "then:error;"] {
        for (text, num_blocks) in [("hello", 1), (half, 2)] {
            let content = format!("say:{text};{fault}");
            let more = json!({
                "messages": [{"role": "user", "content": content}],
                "stream": true,
                "tools": tools(),
            });
            let events = server.post(PATH, with(ask(""), more)).await.events();
            let types: Vec<&str> =
                events.iter().map(|event| event["type"].as_str().unwrap()).collect();
            assert_eq!(types[0], "message_start");
            let num_deltas = types.iter().filter(|kind| **kind == "content_block_delta").count();
            assert!(0 < num_deltas, "{types:?}");
            let num_begun = types.iter().filter(|kind| **kind == "content_block_start").count();
            assert_eq!(num_begun, num_blocks, "{types:?}");
            let (last, before) = events.split_last().unwrap();
            let error = last["error"].as_object().unwrap();
            assert_eq!(last["type"], "error");
            assert_eq!(error["type"], "api_error");
            assert_eq!(error.keys().collect::<Vec<_>>(), ["type", "message"], "{last}");
            // A message that failed never ends as if it had not.
            assert!(before.iter().all(|event| event["type"] != "message_stop"
                && event["type"] != "message_delta"
                && event["type"] != "error"));
        }
    }
    // A failure before the first piece has a status of its own, and the server goes on.
    let more = json!({"messages": [{"role": "user", "content": "say:;then:nan;"}], "stream": true});
    error(&server.post(PATH, with(ask(""), more)).await, 500, "api_error");
    server.post(PATH, ask("x")).await.ok();
}

#[tokio::test]
async fn a_stream_that_the_server_cuts_says_so() {
    let server = FakeServer::with(&config(), HttpLimits::default());
    let abort = async {
        server.wait_until_running(1).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.state.engine.abort_all();
    };
    let messages = json!([{"role": "user", "content": "Go on."}]);
    let body = json!({"model": MODEL, "messages": messages, "max_tokens": 3000, "stream": true});
    let (answer, ()) = tokio::join!(server.post(PATH, body), abort);
    let events = answer.events();
    assert_eq!(events[0]["type"], "message_start");
    let last = events.last().unwrap();
    assert_eq!(
        (&last["type"], &last["error"]["type"]),
        (&json!("error"), &json!("overloaded_error"))
    );
}
