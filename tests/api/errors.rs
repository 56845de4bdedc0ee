//! Every way to be refused: status, body in OpenAI's shape, the field's name.

use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use qwen_server::engine::EngineConfig;
use qwen_server::http::HttpLimits;
use serde_json::{Value, json};

use crate::api_fake::{Answer, FakeServer, MODEL, chat, config, with};

const PATH: &str = "/v1/chat/completions";

/// Each case: fields added to a good request, and the field the error must name.
async fn check_named(cases: &[(Value, &str)]) {
    let server = FakeServer::start();
    for (more, param) in cases {
        let error = server.post(PATH, with(chat("x"), more.clone())).await.error(400);
        assert_eq!(error["param"], *param, "{more} gave {error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(param.split(['[', '.']).next().unwrap()), "{message}");
    }
}

#[tokio::test]
async fn a_number_or_list_out_of_range_is_named() {
    check_named(&[
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": 1e300}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"top_k": -7}), "top_k"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"9999": 1}}), "logit_bias"),
        (json!({"logit_bias": {"5": 1000}}), "logit_bias"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"n": 0}), "n"),
        (json!({"n": 17}), "n"),
        (json!({"n": 9_999_999_999_999u64}), "n"),
        (json!({"stop": 5}), "stop"),
        (json!({"stop": [""]}), "stop"),
        (json!({"stop": vec!["x"; 200]}), "stop"),
        (json!({"stop": "x".repeat(5000)}), "stop"),
        (json!({"stop": vec!["x".repeat(200); 100]}), "stop"),
        (json!({"stop_token_ids": vec![1; 129]}), "stop_token_ids"),
        (json!({"stop_token_ids": [1, 300]}), "stop_token_ids[1]"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids[0]"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_completion_tokens": "9"}), "max_completion_tokens"),
        (json!({"min_tokens": 9, "max_tokens": 3}), "min_tokens"),
        (json!({"min_tokens": -9}), "min_tokens"),
        (json!({"top_logprobs": 21, "logprobs": true}), "top_logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"prompt_logprobs": 99}), "prompt_logprobs"),
        (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (
            json!({"stream": true, "stream_options": {"include_usage": 3}}),
            "stream_options.include_usage",
        ),
    ])
    .await;
}

#[tokio::test]
async fn what_is_not_supported_or_malformed_is_named() {
    check_named(&[
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {}}}),
            "response_format.json_schema.name",
        ),
        (json!({"guided_regex": 3}), "guided_regex"),
        (json!({"allowed_token_ids": [1]}), "allowed_token_ids"),
        (json!({"truncate_prompt_tokens": 5}), "truncate_prompt_tokens"),
        (json!({"chat_template": "x"}), "chat_template"),
        (json!({"documents": [{"text": "x"}]}), "documents"),
        (json!({"regex": "a+"}), "regex"),
        (json!({"ebnf": "root ::= 'a'"}), "ebnf"),
        (json!({"length_penalty": 0.5}), "length_penalty"),
        (json!({"stop_regex": "a+"}), "stop_regex"),
        (json!({"strict_params": true, "user": "u", "novelty": 1}), "novelty"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"cache_salt": ""}), "cache_salt"),
        (json!({"chat_template_kwargs": 4}), "chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"fail": true}}), "messages"),
        (json!({"tools": [{"type": "custom"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"tools": [{"type": "function", "function": {}}]}), "tools[0].function.name"),
        (json!({"functions": [{}]}), "functions[0].name"),
        (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools[0].function.name"),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "f"}}]}), "tools[1].function.name"),
        (json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}), "tools[0].function.parameters"),
        (json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}), "tools[0].function.parameters.type"),
        (json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": 1}}}]}), "tools[0].function.parameters.properties"),
        (json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"required": [1]}}}]}), "tools[0].function.parameters.required"),
        (json!({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}), "tools[0].function.strict"),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "sometimes"}), "tool_choice"),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "function"}}), "tool_choice.function.name"),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "custom"}}), "tool_choice"),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"name": "g"}]}}}), "tool_choice.allowed_tools.tools[0]"),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "allowed_tools", "mode": "never", "tools": [{"name": "f"}]}}), "tool_choice.mode"),
        (json!({"functions": [{"name": "f"}], "function_call": "required"}), "function_call"),
        (json!({"thinking_budget": -1}), "thinking_budget"),
        (json!({"reasoning_effort": "enormous"}), "reasoning_effort"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"model": 3}), "model"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": [{"role": "user", "content": 3}]}), "messages[0].content"),
        (json!({"messages": [{"role": "alien", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"content": "x"}]}), "messages[0].role"),
        (
            json!({"messages": [{"role": "user", "content": [
                {"type": "text", "text": "x"},
                {"type": "image_url", "image_url": {"url": "http://example.org/x.png"}},
            ]}]}),
            "messages[0].content[1]",
        ),
    ])
    .await;
}

#[tokio::test]
async fn a_missing_field_is_named() {
    let server = FakeServer::start();
    let error = server.post(PATH, json!({"model": MODEL})).await.error(400);
    assert_eq!(error["param"], "messages");
    let error = server.post(PATH, json!({"messages": []})).await.error(400);
    assert_eq!(error["param"], "model");
}

#[tokio::test]
async fn bodies_that_are_not_json_objects_are_refused() {
    let server = FakeServer::start();
    let bodies: [&[u8]; 9] = [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\"x\"",
        b"{\"model\": nan}",
        b"{\"model\": 1e999}",
        b"{\"model\": \"\\ud800\"}",
        b"\xff\xfe",
    ];
    for body in bodies {
        let error = server.post_text(PATH, body.to_vec()).await.error(400);
        assert_eq!(error["type"], "invalid_request_error");
    }
    let error = server.post_text(PATH, "{\n \"model\": oops}").await.error(400);
    assert!(error["message"].as_str().unwrap().contains("line 2 column"), "{error}");
    let deep = format!("{{\"model\": {}1{}}}", "[".repeat(2000), "]".repeat(2000));
    server.post_text(PATH, deep).await.error(400);
}

#[tokio::test]
async fn a_body_that_would_take_many_times_its_bytes_is_refused() {
    let server = FakeServer::start();
    let maps = format!("[{}0]", r#"{"":0},"#.repeat(200_000));
    for field in ["tools", "messages", "chat_template_kwargs"] {
        let body = format!(r#"{{"model":"{MODEL}","{field}":{maps}}}"#);
        let error = server.post_text(PATH, body).await.error(400);
        assert_eq!(error["param"], field);
        assert!(error["message"].as_str().unwrap().contains("at most 200000 values"), "{error}");
    }
    let call = json!({"function": {"name": "f", "arguments": maps}});
    let messages = json!([{"role": "assistant", "tool_calls": [call]}]);
    let error = server.post(PATH, with(chat("x"), json!({"messages": messages}))).await.error(400);
    assert_eq!(error["param"], "messages");
    let fields = r#""same":0,"#.repeat(2000);
    let body = format!(r#"{{{fields}"model":"{MODEL}"}}"#);
    let error = server.post_text(PATH, body).await.error(400);
    assert!(error["message"].as_str().unwrap().contains("1024 fields"), "{error}");
    // A field that nobody knows is never built, whatever it holds.
    let bodies = (0..16).map(|_| {
        let body = chat("still here").to_string();
        server.post_text(PATH, format!(r#"{},"x":{maps}}}"#, body.strip_suffix('}').unwrap()))
    });
    for answer in futures_util::future::join_all(bodies).await {
        assert_eq!(answer.ok()["choices"][0]["message"]["content"], "still here");
        assert_eq!(answer.header("x-ignored-params"), Some("x"));
    }
}

#[tokio::test]
async fn of_fields_with_one_name_the_last_counts() {
    let server = FakeServer::start();
    let body = chat("abc").to_string();
    let twice = r#""max_tokens":1,"x":2,"max_tokens":null,"max_tokens":2,"x":null"#;
    let body = format!("{},{twice}}}", body.strip_suffix('}').unwrap());
    let answer = server.post_text(PATH, body).await;
    assert_eq!(answer.ok()["choices"][0]["message"]["content"], "ab");
    assert_eq!(answer.header("x-ignored-params"), None);
}

#[tokio::test]
async fn what_is_not_here_is_404_and_what_is_not_allowed_405() {
    let server = FakeServer::start();
    let error = server.post(PATH, with(chat("x"), json!({"model": "gpt-9"}))).await.error(404);
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    assert_eq!(server.get("/v1/models/gpt-9").await.error(404)["code"], "model_not_found");
    server.get("/v1/nothing").await.error(404);
    server.get("/").await.error(404);
    server.get("/v1/models/%ff").await.error(404);
    let answer = server.get(PATH).await;
    answer.error(405);
    assert_eq!(answer.header("allow"), Some("POST"));
    let answer = server.post("/v1/models", json!({})).await;
    answer.error(405);
    assert_eq!(answer.header("allow"), Some("GET,HEAD"));
}

#[tokio::test]
async fn size_and_type_of_the_body_are_checked() {
    let limits = HttpLimits { max_body_bytes: 1000, ..HttpLimits::default() };
    let server = FakeServer::with(&config(), limits);
    server.post(PATH, chat(&"x".repeat(2000))).await.error(413);
    server.post(PATH, chat("x")).await.ok();
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"] {
        let request = Request::post(PATH).header("content-type", content_type);
        let request = request.body(Body::from(chat("x").to_string())).unwrap();
        assert_eq!(server.send(request).await.status(), 415);
    }
    let request = Request::post(PATH).header("content-type", "application/json; charset=utf-8");
    let request = request.body(Body::from(chat("x").to_string())).unwrap();
    assert_eq!(server.send(request).await.status(), 200);
}

#[tokio::test]
async fn nothing_is_begun_while_memory_is_short() {
    let mut server = FakeServer::start();
    server.state.is_memory_short = || true;
    for path in [PATH, "/tokenize", "/v1/embeddings"] {
        let answer = server.post(path, chat("x")).await;
        assert_eq!(answer.error(503)["code"], "memory_short");
        assert_eq!(answer.header("retry-after"), Some("5"));
    }
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.state.engine.stats().num_steps, 0);
}

#[tokio::test]
async fn what_exceeds_the_context_is_refused_with_the_numbers() {
    let server = FakeServer::start();
    let error = server.post(PATH, chat(&"x".repeat(600))).await.error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    assert_eq!(error["param"], "messages");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("512 tokens") && message.contains("624 tokens"), "{message}");
    let error = server.post(PATH, with(chat("x"), json!({"max_tokens": 500}))).await.error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    assert_eq!(error["param"], "max_tokens");
    let error =
        server.post(PATH, with(chat("x"), json!({"max_tokens": u64::MAX}))).await.error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    let body = json!({"model": MODEL, "prompt": "x".repeat(512)});
    let error = server.post("/v1/completions", body).await.error(400);
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("context_length_exceeded"), &json!("prompt"))
    );
    let body = json!({"model": MODEL, "prompt": "x".repeat(512 * 256 + 1)});
    let error = server.post("/v1/completions", body).await.error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    // The default asks for no more than is left.
    let body = json!({"model": MODEL, "prompt": "x".repeat(508)});
    let body = server.post("/v1/completions", body).await.ok();
    assert_eq!(body["usage"]["completion_tokens"], 4);
}

#[tokio::test]
async fn a_full_queue_is_an_answer() {
    let config = EngineConfig { max_num_seqs: 1, max_queue: 1, ..config() };
    // A stream that waits for its turn begins when a keep-alive is due.
    let limits = HttpLimits { keep_alive: Duration::from_millis(50), ..HttpLimits::default() };
    let server = FakeServer::with(&config, limits);
    let endless = json!({"model": MODEL, "prompt": "go", "max_tokens": 10_000, "stream": true});
    let post = || {
        let request = Request::post("/v1/completions").header("content-type", "application/json");
        request.body(Body::from(endless.to_string())).unwrap()
    };
    let first = server.send(post()).await;
    let second = server.send(post()).await;
    assert_eq!(
        (first.status(), second.status()),
        (200.try_into().unwrap(), 200.try_into().unwrap())
    );
    let third = server.post("/v1/completions", endless.clone()).await;
    assert_eq!(third.error(429)["code"], "engine_overloaded");
    assert!(0 < third.header("retry-after").unwrap().parse::<u64>().unwrap());
    server.wait_until_running(1).await;
    drop((first, second));
    server.wait_until_idle().await;
    server.post(PATH, chat("well")).await.ok();
}

#[tokio::test]
async fn what_the_queue_can_never_hold_is_not_worth_a_retry() {
    let config = EngineConfig { max_num_seqs: 2, max_queue: 4, ..config() };
    let server = FakeServer::with(&config, HttpLimits::default());
    let body = json!({"model": MODEL, "prompt": ["a", "b"], "n": 4});
    assert_eq!(server.post("/v1/completions", body).await.error(400)["param"], "prompt");
}

#[tokio::test]
async fn a_client_says_how_long_it_waits() {
    let config = EngineConfig { max_model_len: 8192, ..config() };
    let server = FakeServer::with(&config, HttpLimits::default());
    let send = |timeout: &str, body: &Value| {
        let request = Request::post("/v1/completions").header("x-request-timeout", timeout);
        let request = request.header("content-type", "application/json");
        server.send(request.body(Body::from(body.to_string())).unwrap())
    };
    let endless = json!({"model": MODEL, "prompt": "go", "max_tokens": 8000, "n": 8});
    for bad in ["soon", "-1", "0", "NaN", "inf", "1e9", ""] {
        let error = Answer::read(send(bad, &endless).await).await.error(400);
        assert_eq!(error["param"], "x-request-timeout", "{bad}");
    }
    let answer = Answer::read(send("0.02", &endless).await).await;
    assert_eq!(answer.error(504)["code"], "deadline_exceeded");
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    let streamed = with(endless.clone(), json!({"stream": true}));
    let text = Answer::read(send("0.05", &streamed).await).await.text;
    assert!(text.contains("deadline_exceeded") && !text.contains("[DONE]"), "{text}");
    server.wait_until_idle().await;
    let brief = json!({"model": MODEL, "prompt": "say:well;"});
    Answer::read(send("30.5", &brief).await).await.ok();
}

#[tokio::test]
async fn a_server_that_stops_says_so() {
    let server = FakeServer::start();
    server.state.engine.drain();
    let answer = server.post(PATH, chat("x")).await;
    assert_eq!(answer.error(503)["code"], "shutting_down");
    assert!(answer.header("retry-after").is_some());
    let ready = server.get("/health/ready").await;
    assert_eq!(ready.status, 503);
    assert!(ready.json()["reason"].is_string());
}

#[tokio::test]
async fn errors_echo_the_request_id() {
    let server = FakeServer::start();
    let request = Request::get("/nowhere").header("x-request-id", "mine-1");
    let response = server.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(response.headers()["x-request-id"], "mine-1");
    let bad = "x".repeat(200);
    let request = Request::get("/nowhere").header("x-request-id", &bad);
    let response = server.send(request.body(Body::empty()).unwrap()).await;
    assert_ne!(response.headers()["x-request-id"], bad.as_str());
    assert_eq!(Value::Null, server.get("/nowhere").await.error(404)["param"]);
}
