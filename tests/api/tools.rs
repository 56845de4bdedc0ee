//! Goal: forced calls end, hold to what was declared and leave no scraps; a format for the answer
//! leaves room for calls.

use qwen_server::engine::EngineConfig;
use qwen_server::http::HttpLimits;
use serde_json::{Value, json};

use crate::api_fake::{FakeServer, chat, config, with};

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
