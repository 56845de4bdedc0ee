//! Goal: forced calls end, hold to what was declared and leave no scraps; a format for the answer
//! leaves room for calls.

use std::sync::Arc;

use qwen_server::chat::model::Conventions;
use qwen_server::chat::tool_call::ToolCallFormat;
use qwen_server::engine::EngineConfig;
use qwen_server::http::HttpLimits;
use serde_json::{Value, json};

use crate::api_fake::{FakeServer, MODEL, chat, config, model, with};

const PATH: &str = "/v1/chat/completions";
const CALL: &str = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";

fn server() -> FakeServer {
    let config = EngineConfig { max_model_len: 4096, ..config() };
    FakeServer::with(&config, HttpLimits::default())
}

fn tool(name: &str, parameters: &Value) -> Value {
    json!({"type": "function", "function": {"name": name, "parameters": parameters}})
}

fn ask(said: &str, more: Value) -> Value {
    let now = tool("now", &json!({"type": "object", "properties": {}}));
    with(with(chat(said), json!({"tools": [now]})), more)
}

fn calls(choice: &Value) -> usize {
    choice["message"]["tool_calls"].as_array().map_or(0, Vec::len)
}

#[tokio::test]
async fn forced_calls_come_to_an_end() {
    let server = server();
    let endless = vec![CALL; 20].join("\n");
    let body = ask(&endless, json!({"tool_choice": "required", "ignore_eos": true}));
    let whole = server.post(PATH, body).await.ok();
    let choice = &whole["choices"][0];
    assert_eq!((calls(choice), choice["finish_reason"].as_str()), (8, Some("tool_calls")));
    assert_eq!(choice["message"]["content"], Value::Null);
}

#[tokio::test]
async fn a_forced_call_that_is_cut_leaves_no_scraps() {
    let server = server();
    let named = json!({"type": "function", "function": {"name": "now"}});
    for max_tokens in [1, 8, 12, 22, 30, 38, 43] {
        for choice in [json!("required"), named.clone()] {
            let more = json!({"tool_choice": choice, "max_tokens": max_tokens});
            let whole = server.post(PATH, ask(CALL, more.clone())).await.ok();
            let choice = &whole["choices"][0];
            assert_eq!(choice["finish_reason"], "length", "{whole}");
            assert!(choice["message"]["content"].as_str().is_none_or(str::is_empty), "{whole}");
            assert_eq!(whole["usage"]["completion_tokens"], max_tokens);
            let chunks = server.post(PATH, ask(CALL, with(more, json!({"stream": true})))).await;
            for chunk in chunks.chunks() {
                let content = &chunk["choices"][0]["delta"]["content"];
                assert!(content.as_str().is_none_or(str::is_empty), "{chunk}");
            }
        }
    }
}

#[tokio::test]
async fn a_format_leaves_room_for_calls() {
    let server = server();
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}},
                        "required": ["n"], "additionalProperties": false});
    let format = json!({"response_format": {"type": "json_schema", "json_schema": {
                            "name": "n", "schema": schema}}});
    for (said, num_calls) in [
        ("{\"n\":5}", 0),
        (CALL, 1),
        // An answer that was asked to be JSON is no call because it looks like one.
        ("{\"name\": \"now\", \"arguments\": {}}", 0),
    ] {
        let whole = server.post(PATH, ask(said, format.clone())).await.ok();
        let choice = &whole["choices"][0];
        assert_eq!(calls(choice), num_calls, "{whole}");
        let reason = if num_calls == 0 { "stop" } else { "tool_calls" };
        assert_eq!(choice["finish_reason"], reason, "{whole}");
        if num_calls == 0 {
            let text = choice["message"]["content"].as_str().unwrap();
            let value: Value = serde_json::from_str(text).unwrap();
            assert!(value["n"].is_number() && value.as_object().unwrap().len() == 1, "{whole}");
        } else {
            assert_eq!(choice["message"]["content"], Value::Null);
        }
    }
}

#[tokio::test]
async fn schemas_that_cannot_be_followed_are_named_where_they_matter() {
    let server = server();
    let bad = tool("bad", &json!({"properties": {"x": {"type": "array", "uniqueItems": true}}}));
    let place = "tools[1].function.parameters.properties.x.uniqueItems";
    let tools = |bad: &Value| json!({"tools": [tool("now", &json!({})), bad]});
    let mut strict = bad.clone();
    strict["function"]["strict"] = true.into();
    let named = json!({"type": "function", "function": {"name": "bad"}});
    for (bad, more) in
        [(&bad, json!({"tool_choice": "required"})), (&bad, json!({"tool_choice": named}))]
    {
        let body = with(with(chat("x"), tools(bad)), more);
        assert_eq!(server.post(PATH, body).await.error(400)["param"], place);
    }
    server.post(PATH, with(chat("x"), tools(&bad))).await.ok();
    // This vocabulary has no token for the tag, so nothing can be held to a call that may come.
    let may_call = server.post(PATH, with(chat("x"), tools(&strict))).await;
    assert_eq!(may_call.error(400)["param"], "tools");
    // The named tool is the only one that matters.
    let named = json!({"type": "function", "function": {"name": "now"}});
    let more = json!({"tool_choice": named});
    server.post(PATH, with(with(chat("x"), tools(&strict)), more)).await.ok();
}

// What a stop string cut is no call: clients would run it, or fail to read it.
#[tokio::test]
async fn a_call_that_a_stop_string_cuts_does_not_end_with_calls() {
    let server = server();
    let numbers = json!({"type": "object", "properties": {"n": {"type": "integer"}}});
    let said = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"n\": 1723}}\n</tool_call>";
    for choice in ["auto", "required"] {
        let more = json!({"tools": [tool("add", &numbers)], "tool_choice": choice, "stop": "72"});
        let body = with(chat(said), more.clone());
        let whole = server.post(PATH, body.clone()).await.ok();
        let found = &whole["choices"][0];
        assert_eq!(found["message"]["tool_calls"][0]["function"]["arguments"], "{\"n\": 1");
        assert_eq!(
            (&found["finish_reason"], &found["stop_reason"]),
            (&json!("stop"), &json!("72"))
        );
        let chunks = server.post(PATH, with(body, json!({"stream": true}))).await.chunks();
        assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
        let other = with(chat(said), with(more, json!({"stop": "never"})));
        assert_eq!(
            server.post(PATH, other).await.ok()["choices"][0]["finish_reason"],
            "tool_calls"
        );
    }
    let body = json!({"model": MODEL, "input": format!("say:{said};"), "stop": "72",
        "tools": [{"type": "function", "name": "add", "parameters": numbers}]});
    let response = server.post("/v1/responses", body).await.ok();
    assert_eq!(response["output"][0]["type"], "function_call");
    assert_eq!(response["output"][0]["status"], "incomplete");
    let body = json!({"model": MODEL, "max_tokens": 200, "stop_sequences": ["72"],
        "messages": chat(said)["messages"],
        "tools": [{"name": "add", "input_schema": numbers}]});
    let message = server.post("/v1/messages", body).await.ok();
    assert_eq!(message["content"][0]["input"], json!({}));
    assert_eq!(
        (&message["stop_reason"], &message["stop_sequence"]),
        (&json!("stop_sequence"), &json!("72"))
    );
}

#[tokio::test]
async fn calls_in_elements_can_be_forced() {
    let mut server = server();
    let conventions =
        Conventions { tool_calls: ToolCallFormat::QwenCoder, ..Conventions::default() };
    server.state.model = Arc::new(model(conventions));
    let schema = json!({
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    });
    let said = "Well.<tool_call>\n<function=weather>\n<parameter=city>\nNew \"York\"\n</parameter>\n\
                <parameter=days>\n3\n</parameter>\n</function>\n</tool_call>";
    let call = said.strip_prefix("Well.").unwrap();
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for (said, choice) in
        [(said, json!("auto")), (call, json!("auto")), (call, json!("required")), (call, named)]
    {
        let more = json!({"tools": [tool("weather", &schema)], "tool_choice": choice});
        let whole = server.post(PATH, with(chat(said), more)).await.ok();
        let found = &whole["choices"][0];
        assert_eq!(found["finish_reason"], "tool_calls", "{whole}");
        let arguments = found["message"]["tool_calls"][0]["function"]["arguments"].as_str();
        assert_eq!(arguments, Some("{\"city\": \"New \\\"York\\\"\", \"days\": 3}"));
    }
    // Whatever the model would say, it is a call.
    let more =
        json!({"tools": [tool("weather", &schema)], "tool_choice": "required", "max_tokens": 60});
    let whole = server.post(PATH, with(chat("no"), more)).await.ok();
    let call = &whole["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(call["name"], "weather", "{whole}");
    assert!(call["arguments"].as_str().unwrap().starts_with("{\"city\": \""), "{whole}");
    let strange =
        json!({"type": "object", "properties": {"at": {"type": "string", "format": "date"}}});
    let more = json!({"tools": [tool("when", &strange)], "tool_choice": "required"});
    let error = server.post(PATH, with(chat("no"), more)).await.error(400);
    assert_eq!(error["param"], "tools[0].function.parameters.properties.at.format");
}
