//! What a request becomes without running, prefixes to keep, and classes of urgency.

use serde_json::{Value, json};

use crate::api_fake::{FIM_PREFIX, FakeServer, MODEL, chat, with};

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_chat_is_rendered_as_it_would_be_sent() {
    let server = FakeServer::start();
    let more = json!({"stop": "!", "max_tokens": 5, "temperature": 0.5, "seed": 3, "priority": 2});
    let ask = with(chat("hi"), more);
    let rendered = server.post("/v1/chat/completions/render", ask.clone()).await.ok();
    let text = "<|im_start|>user\nsay:hi;<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(rendered["prompt"], text);
    assert_eq!(rendered["model"], MODEL);
    assert_eq!(rendered["priority"], 2);
    assert_eq!(rendered["features"], Value::Null);
    let sampling = &rendered["sampling_params"];
    assert_eq!(sampling["max_tokens"], 5);
    assert_eq!(sampling["temperature"], 0.5);
    assert_eq!(sampling["stop"], json!(["!"]));
    assert_eq!(sampling["seed"], 3);
    let body = server.post(CHAT, with(ask, json!({"return_token_ids": true}))).await.ok();
    assert_eq!(rendered["token_ids"], body["prompt_token_ids"]);
    let answer = server.post("/v1/chat/completions/render", json!({"model": MODEL})).await;
    assert_eq!(answer.error(400)["param"], "messages");
}

#[tokio::test]
async fn completions_are_rendered_one_by_one() {
    let server = FakeServer::start();
    let ask = json!({"model": MODEL, "prompt": ["a", "bc"], "suffix": "d"});
    let rendered = server.post("/v1/completions/render", ask).await.ok();
    let ids: Vec<Value> =
        rendered.as_array().unwrap().iter().map(|one| one["token_ids"].clone()).collect();
    let fim = |prefix: &[u32]| json!([&[FIM_PREFIX], prefix, &[259, 100, 260]].concat());
    assert_eq!(ids, [fim(&[97]), fim(&[98, 99])]);
    assert_eq!(rendered[0]["prompt"], "<|fim_prefix|>a<|fim_suffix|>d<|fim_middle|>");
    assert_eq!(rendered[1]["sampling_params"]["max_tokens"], 16);
}

/// A long system message with a mark behind it, and a short question.
fn marked(mark: &Value, question: &str) -> Value {
    let mut part = json!({"type": "text", "text": "r".repeat(100)});
    part.as_object_mut().unwrap().extend(mark.as_object().unwrap().clone());
    let messages = json!([
        {"role": "system", "content": [part]},
        {"role": "user", "content": format!("say:{question};")},
    ]);
    json!({"model": MODEL, "messages": messages})
}

#[tokio::test]
async fn marks_keep_the_prefix_and_usage_says_so() {
    let server = FakeServer::start();
    let marks = [
        json!({"cache_control": {"type": "ephemeral"}}),
        json!({"prompt_cache_breakpoint": {"mode": "explicit"}}),
    ];
    for mark in marks {
        let server = FakeServer::start();
        let first = server.post(CHAT, marked(&mark, "one")).await.ok();
        // `<|im_start|>system\n` and the text are 108 tokens, six blocks of 16.
        let details = &first["usage"]["prompt_tokens_details"];
        assert_eq!(details["cached_tokens"], 0);
        assert_eq!(details["cache_write_tokens"], 96);
        assert_eq!(details["cache_creation_input_tokens"], 96);
        let second = server.post(CHAT, marked(&mark, "two")).await.ok();
        let details = &second["usage"]["prompt_tokens_details"];
        assert_eq!(details["cached_tokens"], 112, "more is cached than is kept");
        assert_eq!(details["cache_write_tokens"], 0);
        assert_eq!(second["choices"][0]["message"]["content"], "two");
        server.wait_until_idle().await;
    }
    let whole = with(marked(&json!({}), "three"), json!({"prompt_cache_options": {"ttl": "1m"}}));
    let body = server.post(CHAT, whole).await.ok();
    let written = body["usage"]["prompt_tokens_details"]["cache_write_tokens"].as_u64().unwrap();
    assert!(96 < written, "up to the newest message: {written}");
    let body = server.post(CHAT, marked(&json!({}), "four")).await.ok();
    assert!(body["usage"]["prompt_tokens_details"].get("cache_write_tokens").is_none());
    let stream = json!({"stream": true, "stream_options": {"include_usage": true}});
    let mark = json!({"cache_control": {"type": "ephemeral"}});
    let chunks = server.post(CHAT, with(marked(&mark, "five"), stream)).await.chunks();
    let details = &chunks.last().unwrap()["usage"]["prompt_tokens_details"];
    assert!(details["cache_write_tokens"].is_u64());
}

#[tokio::test]
async fn what_is_not_a_mark_is_refused_by_name() {
    let server = FakeServer::start();
    let bad = marked(&json!({"cache_control": {"type": "eternal"}}), "x");
    let answer = server.post(CHAT, bad).await;
    assert_eq!(answer.error(400)["param"], "messages[0].content[0].cache_control.type");
    let options = json!({"prompt_cache_options": {"mode": "sometimes"}});
    let answer = server.post(CHAT, with(chat("x"), options)).await;
    assert_eq!(answer.error(400)["param"], "prompt_cache_options.mode");
}

#[tokio::test]
async fn classes_of_urgency_are_understood() {
    let server = FakeServer::start();
    for tier in ["auto", "default", "flex", "fast", "priority"] {
        let body = server.post(CHAT, with(chat("x"), json!({"service_tier": tier}))).await.ok();
        assert_eq!(body["service_tier"], "default");
    }
    assert!(server.post(CHAT, chat("x")).await.ok().get("service_tier").is_none());
    let answer = server.post(CHAT, with(chat("x"), json!({"service_tier": "golden"}))).await;
    assert_eq!(answer.error(400)["param"], "service_tier");
    server.post(CHAT, with(chat("x"), json!({"priority": -4000}))).await.ok();
    let answer = server.post(CHAT, with(chat("x"), json!({"priority": "high"}))).await;
    assert_eq!(answer.error(400)["param"], "priority");
}

#[tokio::test]
async fn what_only_others_can_do_is_refused_by_name() {
    let server = FakeServer::start();
    for (more, param) in [
        (json!({"web_search_options": {}}), "web_search_options"),
        (json!({"enable_search": true}), "enable_search"),
        (json!({"audio": {"voice": "a"}}), "audio"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
    ] {
        let answer = server.post(CHAT, with(chat("x"), more)).await;
        assert_eq!(answer.error(400)["param"], param);
    }
    let neutral = json!({"web_search_options": null, "enable_search": false});
    let answer = server.post(CHAT, with(chat("x"), neutral)).await;
    assert_eq!(answer.header("x-ignored-params"), None);
    let hints = json!({"prediction": {"type": "content", "content": "x"}, "verbosity": "low"});
    let answer = server.post(CHAT, with(chat("x"), hints)).await;
    assert_eq!(answer.header("x-ignored-params"), Some("prediction,verbosity"));
}

#[tokio::test]
async fn marks_on_tools_keep_the_prompt_up_to_there() {
    let control = json!({"type": "ephemeral"});
    let text = "t".repeat(100);
    let function = |name: &str| json!({"name": name, "description": text});
    let parameters = json!({"type": "object", "properties": {}});
    let plain = |name: &str| json!({"type": "function", "function": function(name)});
    // By OpenAI's clients on the tool or in it, and by Anthropic's.
    let marked = [with(plain("a"), json!({"cache_control": control})), {
        let mut tool = plain("a");
        tool["function"]["cache_control"] = control.clone();
        tool
    }];
    let mut written = Vec::new();
    for tool in marked {
        let server = FakeServer::start();
        let ask = |text: &str| with(chat(text), json!({"tools": [tool, plain("b")]}));
        let first = server.post(CHAT, ask("one")).await.ok();
        let details = &first["usage"]["prompt_tokens_details"];
        let num_kept = details["cache_write_tokens"].as_u64().unwrap();
        // `<tools>[`, the first definition and what the next has in common with any other.
        let end = json!([plain("a")]).to_string().len() + 7;
        assert!(num_kept as usize / 16 >= end / 16 && (num_kept as usize) < end + 80, "{first}");
        written.push(num_kept);
        let second = server.post(CHAT, ask("two")).await.ok();
        let details = &second["usage"]["prompt_tokens_details"];
        assert_eq!(details["cache_write_tokens"], 0);
        assert!(num_kept <= details["cached_tokens"].as_u64().unwrap());
        // The mark is nothing to the model.
        let path = "/v1/chat/completions/render";
        let rendered = server.post(path, ask("x")).await.ok();
        assert!(!rendered["prompt"].as_str().unwrap().contains("cache_control"), "{rendered}");
        // Tools that are not shown have no place in the prompt.
        let hidden = with(ask("three"), json!({"tool_choice": "none"}));
        assert_eq!(server.post(CHAT, hidden).await.status, 200);
    }
    assert_eq!(written[0], written[1]);
    let server = FakeServer::start();
    let tool = |control: &Value| json!({"name": "a", "description": text, "input_schema": parameters, "cache_control": control});
    let ask = |control: &Value| with(chat("x"), json!({"max_tokens": 9, "tools": [tool(control)]}));
    let answer = server.post("/v1/messages", ask(&control)).await;
    assert_eq!(answer.header("x-ignored-params"), None);
    assert!(96 < answer.ok()["usage"]["cache_creation_input_tokens"].as_u64().unwrap());
    let answer = server.post("/v1/messages", ask(&json!({"type": "eternal"}))).await;
    let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("`tools[0].cache_control.type`"), "{message}");
    let tool = json!({"type": "function", "name": "a", "cache_control": {"type": "eternal"}});
    let body = json!({"model": MODEL, "input": "x", "tools": [tool]});
    let error = server.post("/v1/responses", body).await.error(400);
    assert_eq!(error["param"], "tools[0].cache_control.type");
}
