//! Goal: a thought ends when its budget is used up, whatever else the request asks for.
//!
//! Method: the fake model would think on for ever; what it says is told by position, so that the
//! tokens that end a thought take the places of as many of its own.

use qwen_server::engine::EngineConfig;
use serde_json::{Value, json};

use crate::api_fake::{FakeServer, chat, config, with};

const PATH: &str = "/v1/chat/completions";

/// A thought that the prompt opens, of three tokens and four of the end.
const INSIDE: &str = "abc....answer";
/// One that the model opens.
const BEFORE: &str = "<think>abc....answer";

fn ask(said: &str, more: Value) -> Value {
    let kwargs = json!({"open_thought": said == INSIDE});
    let fields = json!({"thinking_budget": 3, "chat_template_kwargs": kwargs});
    with(with(chat(said), fields), more)
}

fn server() -> FakeServer {
    FakeServer::thinking(&EngineConfig { max_model_len: 2048, ..config() })
}

#[track_caller]
fn check(choice: &Value, reasoning: &str, content: &str) {
    let message = &choice["message"];
    assert_eq!(message["reasoning_content"], reasoning, "{choice}");
    assert_eq!(message["content"], content, "{choice}");
    assert_eq!(choice["finish_reason"], "stop", "{choice}");
}

#[tokio::test]
async fn a_thought_ends_with_its_budget_in_every_choice() {
    let server = server();
    for said in [INSIDE, BEFORE] {
        let whole = server.post(PATH, ask(said, json!({"n": 3}))).await.ok();
        for index in 0..3 {
            check(&whole["choices"][index], "abc", "answer");
        }
        // Three of the thought and two up to its closing tag.
        let details = &whole["usage"]["completion_tokens_details"];
        assert_eq!(details["reasoning_tokens"], 3 * 5, "{whole}");
    }
}

#[tokio::test]
async fn every_token_is_scored_when_scores_are_wanted() {
    let server = server();
    for said in [INSIDE, BEFORE] {
        let scored = server.post(PATH, ask(said, json!({"logprobs": true}))).await.ok();
        check(&scored["choices"][0], "abc", "answer");
    }
}

#[tokio::test]
async fn a_thought_within_its_budget_and_one_without_any_are_left_alone() {
    let server = server();
    for (said, more, reasoning) in [
        ("<think>ab</think>answer", json!({}), "ab"),
        ("<think>abc....</think>answer", json!({"thinking_budget": null}), "abc...."),
        ("<think>abc....</think>answer", json!({"thinking_budget": 8}), "abc...."),
        (
            "<think>abc....</think>answer",
            json!({"thinking_budget": null, "reasoning_effort": "low"}),
            "abc....",
        ),
    ] {
        let whole = server.post(PATH, ask(said, more)).await.ok();
        check(&whole["choices"][0], reasoning, "answer");
    }
    let whole = server.post(PATH, ask("no thought, but <think>", json!({}))).await.ok();
    assert_eq!(whole["choices"][0]["message"]["content"], "no thought, but <think>");
    let whole = server.post(PATH, ask(INSIDE, json!({"thinking_budget": 0}))).await.ok();
    assert_eq!(whole["choices"][0]["message"]["content"], INSIDE, "the prompt has ended it");
}

#[tokio::test]
async fn a_grammar_begins_behind_the_thought_that_was_ended() {
    let server = server();
    let said = "abc..maybe";
    let kwargs = json!({"chat_template_kwargs": {"open_thought": true}, "n": 2});
    for more in [kwargs.clone(), with(kwargs, json!({"logprobs": true}))] {
        let regex = with(more, json!({"guided_regex": "ma[x-z]be!{3}"}));
        let whole = server.post(PATH, ask(said, regex)).await.ok();
        for index in 0..2 {
            check(&whole["choices"][index], "abc", "maybe!!!");
        }
    }
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let forced = json!({
        "tools": [tool], "tool_choice": "required", "parallel_tool_calls": false,
        "chat_template_kwargs": {"open_thought": true},
    });
    let whole = server.post(PATH, ask("abc", forced)).await.ok();
    let message = &whole["choices"][0]["message"];
    assert_eq!(message["reasoning_content"], "abc", "{whole}");
    assert_eq!(message["content"], Value::Null);
    let arguments = message["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Value>(arguments).unwrap(), json!({}));
}

#[tokio::test]
async fn recomputed_choices_think_no_longer() {
    // Room for one choice and little else: preemption is certain.
    let server = FakeServer::thinking(&EngineConfig {
        num_blocks: 60,
        block_size: 4,
        max_model_len: 240,
        ..config()
    });
    let tail = "0123456789".repeat(7);
    let said = format!("<think>abc....{tail}");
    let whole = server.post(PATH, ask(&said, json!({"n": 4}))).await.ok();
    for index in 0..4 {
        check(&whole["choices"][index], "abc", &tail);
    }
    assert!(0 < server.state.engine.stats().num_preemptions);
    server.wait_until_idle().await;
}
