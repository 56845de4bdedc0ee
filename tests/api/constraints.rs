//! Goal: what a request wants its output to look like holds on every path, or is refused by name.
//!
//! Method: the fake model says what it is told where the grammar lets it, and else the next
//! allowed byte.

use serde_json::{Value, json};

use crate::api_fake::{FakeServer, MODEL, chat, with};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": false,
    })
}

fn format(schema: &Value) -> Value {
    let named = json!({"name": "person", "schema": schema, "strict": true});
    json!({"response_format": {"type": "json_schema", "json_schema": named}})
}

fn content(answer: &Value, index: usize) -> &str {
    answer["choices"][index]["message"]["content"].as_str().unwrap()
}

#[tokio::test]
async fn the_model_chooses_where_the_grammar_lets_it() {
    let server = FakeServer::start();
    let told = chat(r#"{"name":"Ada","age":36}"#);
    let answer = server.post(CHAT, with(told, format(&person()))).await.ok();
    assert_eq!(content(&answer, 0), r#"{"name":"Ada","age":36}"#);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn every_choice_is_valid_whatever_the_model_wants() {
    let server = FakeServer::start();
    let more = json!({"n": 4, "max_tokens": 430, "temperature": 2, "ignore_eos": true,
                      "logit_bias": {"65": 100, "257": -100}, "min_tokens": 100});
    for text in ["no JSON at all", "}}}}", "{\"age\":1}", "zzzzzzzzzzzzzzzzzz"] {
        let request = with(with(chat(text), format(&person())), more.clone());
        let answer = server.post(CHAT, request).await.ok();
        for index in 0..4 {
            let value: Value = serde_json::from_str(content(&answer, index)).unwrap();
            assert!(value["name"].as_str().unwrap().chars().count() <= 5);
            assert!((0..=150).contains(&value["age"].as_i64().unwrap()));
            assert_eq!(value.as_object().unwrap().len(), 2);
            // A complete grammar ends the choice in spite of `ignore_eos` and `min_tokens`.
            assert_eq!(answer["choices"][index]["finish_reason"], "stop");
        }
    }
}

#[tokio::test]
async fn every_field_works_on_both_endpoints() {
    let server = FakeServer::start();
    for (fields, expected) in [
        (json!({"guided_choice": ["yes", "no"]}), "no"),
        (json!({"structured_outputs": {"choice": ["yes", "no"]}}), "no"),
        (json!({"guided_regex": "n[a-o]x{2}"}), "noxx"),
        (json!({"structured_outputs": {"regex": "^n[a-o]x{2}$"}}), "noxx"),
        (json!({"guided_grammar": "start: \"no\" x\nx: \"!\" | \"?\" x"}), "no!"),
        (json!({"guided_grammar": "root ::= \"no\" [!?]"}), "no!"),
        (json!({"guided_json": {"const": "no"}}), "\"no\""),
        (json!({"guided_json": "{\"const\": \"no\"}"}), "\"no\""),
    ] {
        let answer = server.post(CHAT, with(chat("no!"), fields.clone())).await.ok();
        assert_eq!(content(&answer, 0), expected, "{fields}");
        let completion = json!({"model": MODEL, "prompt": "say:no!;"});
        let answer = server.post(COMPLETIONS, with(completion, fields.clone())).await.ok();
        assert_eq!(answer["choices"][0]["text"], expected, "{fields}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{fields}");
    }
}

#[tokio::test]
async fn a_stream_a_fold_and_logprobs_say_the_same() {
    let server = FakeServer::start();
    let request = with(chat(r#"{"name":"Bo","age":7}"#), format(&person()));
    let whole = server.post(CHAT, request.clone()).await.ok();
    let streamed = with(request.clone(), json!({"stream": true}));
    let chunks = server.post(CHAT, streamed).await.chunks();
    let text: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, content(&whole, 0));
    // Every token is drawn when its log-probability is wanted.
    let scored = server.post(CHAT, with(request, json!({"logprobs": true}))).await.ok();
    assert_eq!(content(&scored, 0), text);
    let entries = scored["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len(), text.len());
    let num_tokens = whole["usage"]["completion_tokens"].as_u64().unwrap();
    assert_eq!(num_tokens, text.len() as u64);
}

#[tokio::test]
async fn reaching_max_tokens_inside_a_grammar_is_said() {
    let server = FakeServer::start();
    for max_tokens in 1..20 {
        let more = json!({"max_tokens": max_tokens});
        let request = with(with(chat(r#"{"name":"Bo","age":7}"#), format(&person())), more);
        let answer = server.post(CHAT, request).await.ok();
        assert_eq!(answer["choices"][0]["finish_reason"], "length", "{max_tokens}");
        assert_eq!(answer["usage"]["completion_tokens"], max_tokens);
        assert!(r#"{"name":"Bo","age":7}"#.starts_with(content(&answer, 0)));
    }
}

#[tokio::test]
async fn stop_strings_still_stop() {
    let server = FakeServer::start();
    let request = with(chat(r#"{"name":"Bo","age":7}"#), format(&person()));
    let answer = server.post(CHAT, with(request, json!({"stop": "\"age"}))).await.ok();
    assert_eq!(content(&answer, 0), r#"{"name":"Bo","#);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn unconstrained_neighbours_say_what_they_would_alone() {
    let server = FakeServer::start();
    let constrained = with(chat("zzzz"), format(&person()));
    let (valid, free) = tokio::join!(
        server.post(CHAT, constrained),
        server.post(CHAT, with(chat("free text"), json!({"n": 3}))),
    );
    assert!(serde_json::from_str::<Value>(content(&valid.ok(), 0)).is_ok());
    let free = free.ok();
    for index in 0..3 {
        assert_eq!(content(&free, index), "free text");
    }
    server.wait_until_idle().await;
}

#[tokio::test]
async fn bad_constraints_are_named_to_the_part() {
    let server = FakeServer::start();
    let schema = |schema: Value| format(&schema);
    let at = |path: &str| format!("response_format.json_schema.schema{path}");
    let of = |name: &str| name.to_owned();
    for (fields, param) in [
        (schema(json!({"type": "array", "uniqueItems": true})), at(".uniqueItems")),
        (schema(json!({"properties": {"a": {"not": {}}}})), at(".properties.a.not")),
        (schema(json!({"type": "string", "minLength": 2, "maxLength": 1})), at("")),
        (schema(json!({"$ref": "#/$defs/none"})), at("")),
        (schema(json!({"$ref": "#"})), at("")),
        (schema(json!({"type": "strin"})), at("")),
        (json!({"guided_json": {"enum": []}}), of("guided_json.enum")),
        (json!({"guided_json": "not JSON"}), of("guided_json")),
        (json!({"guided_regex": "("}), of("guided_regex")),
        (json!({"guided_regex": "(?=a)"}), of("guided_regex")),
        (json!({"guided_choice": []}), of("guided_choice")),
        (json!({"guided_choice": ["a", ""]}), of("guided_choice[1]")),
        (json!({"guided_grammar": "start: missing"}), of("guided_grammar")),
        (json!({"guided_whitespace_pattern": " "}), of("guided_whitespace_pattern")),
        (json!({"structured_outputs": {"json": {"if": {}}}}), of("structured_outputs.json.if")),
        (json!({"guided_regex": "a", "guided_json": {}}), of("guided_regex")),
    ] {
        let answer = server.post(CHAT, with(chat("a"), fields.clone())).await;
        assert_eq!(answer.error(400)["param"], param, "{fields}");
    }
}
