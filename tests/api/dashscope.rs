//! DashScope's native endpoints, byte for byte where clients compare bytes, and its other paths.

use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use qwen_server::engine::EngineConfig;
use qwen_server::http::HttpLimits;
use serde_json::{Value, json};

use crate::api_fake::{Answer, FakeServer, MODEL, chat, config, with};

const TEXT: &str = "/api/v1/services/aigc/text-generation/generation";
const MULTIMODAL: &str = "/api/v1/services/aigc/multimodal-generation/generation";
const EMBEDDING: &str = "/api/v1/services/embeddings/text-embedding/text-embedding";
const TOKENIZER: &str = "/api/v1/tokenizer";
const CALL: &str = r#"Well.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>"#;

/// A request whose answer is `text`.
#[expect(clippy::needless_pass_by_value, reason = "callers pass a `json!` as it is")]
fn ask(text: &str, parameters: Value) -> Value {
    let messages = json!([{"role": "user", "content": format!("say:{text};")}]);
    json!({"model": MODEL, "input": {"messages": messages}, "parameters": parameters})
}

fn message(parameters: Value) -> Value {
    with(json!({"result_format": "message"}), parameters)
}

fn increments(parameters: Value) -> Value {
    with(json!({"result_format": "message", "incremental_output": true}), parameters)
}

fn tools() -> Value {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    json!([{"type": "function", "function": {"name": "add", "parameters": schema}}])
}

async fn post_with(
    server: &FakeServer,
    path: &str,
    headers: &[(&str, &str)],
    body: &Value,
) -> Answer {
    let mut request = Request::post(path).header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = server.send(request.body(Body::from(body.to_string())).unwrap()).await;
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    Answer { status: parts.status, headers: parts.headers, text }
}

async fn stream(server: &FakeServer, path: &str, body: &Value) -> Answer {
    let headers = [("x-dashscope-sse", "enable"), ("x-request-id", "r-1")];
    let answer = post_with(server, path, &headers, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.header("content-type"), Some("text/event-stream;charset=UTF-8"));
    answer
}

/// The data of each frame, after checking what surrounds it.
#[track_caller]
fn frames(answer: &Answer) -> Vec<Value> {
    let text = answer.text.strip_suffix("\n\n").expect("frames end with an empty line");
    let frames = (1..).zip(text.split("\n\n")).map(|(id, frame)| {
        let head = format!("id:{id}\nevent:result\n:HTTP_STATUS/200\ndata:");
        serde_json::from_str(frame.strip_prefix(&head).unwrap_or_else(|| panic!("{frame}")))
            .unwrap()
    });
    frames.collect()
}

#[track_caller]
fn error(answer: &Answer, status: u16, code: &str) -> String {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
    let body = answer.json();
    let names: Vec<&String> = body.as_object().unwrap().keys().collect();
    assert_eq!(names, ["code", "message", "request_id"]);
    assert_eq!(body["code"], code, "{body}");
    assert_eq!(body["request_id"].as_str(), answer.header("x-request-id"));
    body["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn frames_of_messages_are_exact() {
    let server = FakeServer::start();
    let body = ask("hi", increments(json!({})));
    let usage = |output: u32| {
        format!(
            "\"usage\":{{\"total_tokens\":{},\"output_tokens\":{output},\"input_tokens\":26,\
             \"output_tokens_details\":{{\"reasoning_tokens\":0}},\
             \"prompt_tokens_details\":{{\"cached_tokens\":0}}}},\"request_id\":\"r-1\"",
            26 + output
        )
    };
    let frame = |id: u32, content: &str, output: u32, reason: &str| {
        format!(
            "id:{id}\nevent:result\n:HTTP_STATUS/200\ndata:{{\"output\":{{\"choices\":[{{\
             \"message\":{{\"content\":\"{content}\",\"reasoning_content\":\"\",\
             \"role\":\"assistant\"}},\"finish_reason\":\"{reason}\"}}]}},{}}}\n\n",
            usage(output)
        )
    };
    let expected = [frame(1, "h", 1, "null"), frame(2, "i", 2, "null"), frame(3, "", 3, "stop")];
    assert_eq!(stream(&server, TEXT, &body).await.text, expected.concat());
}

#[tokio::test]
async fn frames_of_texts_are_exact_in_both_ways() {
    let usage = |output: u32| {
        format!(
            "\"usage\":{{\"total_tokens\":{},\"output_tokens\":{output},\"input_tokens\":26,\
             \"output_tokens_details\":{{\"reasoning_tokens\":0}},\
             \"prompt_tokens_details\":{{\"cached_tokens\":0}}}},\"request_id\":\"r-1\"",
            26 + output
        )
    };
    let frame = |id: u32, text: &str, output: u32, reason: &str| {
        format!(
            "id:{id}\nevent:result\n:HTTP_STATUS/200\ndata:{{\"output\":{{\
             \"finish_reason\":\"{reason}\",\"text\":\"{text}\"}},{}}}\n\n",
            usage(output)
        )
    };
    for (incremental, texts) in [(true, ["h", "i", ""]), (false, ["h", "hi", "hi"])] {
        let server = FakeServer::start();
        let prompt = json!({"prompt": "say:hi;"});
        let body = json!({"model": MODEL, "input": prompt,
            "parameters": {"incremental_output": incremental}});
        let expected = [
            frame(1, texts[0], 1, "null"),
            frame(2, texts[1], 2, "null"),
            frame(3, texts[2], 3, "stop"),
        ];
        assert_eq!(stream(&server, TEXT, &body).await.text, expected.concat());
    }
}

#[tokio::test]
async fn frames_of_calls_carry_the_id_once() {
    let server = FakeServer::start();
    let body = ask(CALL, increments(json!({"tools": tools()})));
    let answer = stream(&server, TEXT, &body).await;
    let data = frames(&answer);
    let choices: Vec<&Value> = data.iter().map(|frame| &frame["output"]["choices"][0]).collect();
    assert!(choices.iter().all(|choice| choice["index"] == 0));
    let calls: Vec<&Value> =
        choices.iter().filter_map(|choice| choice["message"]["tool_calls"].get(0)).collect();
    let id = calls[0]["id"].as_str().unwrap();
    assert!(id.starts_with("call_"));
    let first = format!(
        "{{\"message\":{{\"content\":\"\",\"reasoning_content\":\"\",\"tool_calls\":[{{\"index\":0,\
         \"id\":\"{id}\",\"type\":\"function\",\"function\":{{\"name\":\"add\",\"arguments\":\"\"}}\
         }}],\"role\":\"assistant\"}},\"index\":0,\"finish_reason\":\"null\"}}"
    );
    let later = "{\"message\":{\"content\":\"\",\"reasoning_content\":\"\",\"tool_calls\":[{\
                 \"index\":0,\"id\":\"\",\"type\":\"function\",\"function\":{\"arguments\":\"{\"}\
                 }],\"role\":\"assistant\"},\"index\":0,\"finish_reason\":\"null\"}";
    let end = "{\"message\":{\"content\":\"\",\"reasoning_content\":\"\",\"role\":\"assistant\"},\
               \"index\":0,\"finish_reason\":\"tool_calls\"}";
    assert!(answer.text.contains(&first), "{}", answer.text);
    assert!(answer.text.contains(later), "{}", answer.text);
    assert!(answer.text.contains(end), "{}", answer.text);
    let joined: String =
        calls.iter().map(|call| call["function"]["arguments"].as_str().unwrap()).collect();
    assert_eq!(joined, "{\"a\": 1}");
    assert!(
        calls[1..].iter().all(|call| call["id"] == "" && call["function"].get("name").is_none())
    );
}

#[tokio::test]
async fn multimodal_content_is_made_of_parts() {
    let server = FakeServer::start();
    let part = json!([{"text": "say:hi;"}]);
    let body = json!({"model": MODEL, "input": {"messages": [{"role": "user", "content": part}]},
        "parameters": {"incremental_output": true}});
    let data = frames(&stream(&server, MULTIMODAL, &body).await);
    let contents: Vec<&Value> =
        data.iter().map(|frame| &frame["output"]["choices"][0]["message"]["content"]).collect();
    assert_eq!(contents, [&json!([{"text": "h"}]), &json!([{"text": "i"}]), &json!([])]);
    let whole = server.post(MULTIMODAL, body).await.ok();
    assert_eq!(whole["output"]["choices"][0]["message"]["content"], json!([{"text": "hi"}]));
}

/// What clients make of increments.
fn fold(frames: &[Value], num_choices: usize) -> Value {
    let mut texts = vec![(String::new(), String::new()); num_choices];
    let mut calls: Vec<Value> = Vec::new();
    let mut reasons = vec![Value::Null; num_choices];
    for frame in frames {
        for choice in frame["output"]["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap_or(0) as usize;
            let message = &choice["message"];
            texts[index].0.push_str(message["content"].as_str().unwrap());
            texts[index].1.push_str(message["reasoning_content"].as_str().unwrap());
            for call in message["tool_calls"].as_array().into_iter().flatten() {
                if call["id"] == "" {
                    let last = calls.last_mut().unwrap();
                    let arguments = last["function"]["arguments"].as_str().unwrap().to_owned();
                    let more = call["function"]["arguments"].as_str().unwrap();
                    last["function"]["arguments"] = (arguments + more).into();
                } else {
                    calls.push(call.clone());
                }
            }
            reasons[index] = choice["finish_reason"].clone();
        }
    }
    json!({"texts": texts, "calls": without_ids(&calls.into()), "reasons": reasons,
        "usage": frames.last().unwrap()["usage"]["output_tokens"]})
}

fn without_ids(calls: &Value) -> Value {
    let mut calls = calls.clone();
    for call in calls.as_array_mut().unwrap() {
        call["id"] = Value::Null;
    }
    calls
}

/// The same of a whole answer, or of a frame with everything so far.
fn summary(answer: &Value) -> Value {
    let choices = answer["output"]["choices"].as_array().unwrap();
    let text = |key: &str, choice: &Value| choice["message"][key].as_str().unwrap().to_owned();
    let texts: Vec<(String, String)> = choices
        .iter()
        .map(|choice| (text("content", choice), text("reasoning_content", choice)))
        .collect();
    let calls = choices.iter().filter_map(|choice| choice["message"]["tool_calls"].as_array());
    let calls: Vec<Value> = calls.flatten().cloned().collect();
    let reasons: Vec<&Value> = choices.iter().map(|choice| &choice["finish_reason"]).collect();
    json!({"texts": texts, "calls": without_ids(&calls.into()), "reasons": reasons,
        "usage": answer["usage"]["output_tokens"]})
}

#[tokio::test]
async fn both_kinds_of_streams_end_as_the_whole_answer() {
    let server = FakeServer::thinking(&config());
    let thought = format!("<think>Hmm.</think>{CALL}");
    for (text, parameters) in [
        ("hello", json!({})),
        ("", json!({})),
        ("hello", json!({"max_tokens": 2})),
        ("hello", json!({"stop": "ll"})),
        ("hello", json!({"stop": [[108, 108]]})),
        ("<think>Hmm.</think>Yes.", json!({})),
        (&thought, json!({"tools": tools()})),
        ("hello", json!({"tools": tools(), "tool_choice": "required", "max_tokens": 60})),
    ] {
        let whole = server.post(TEXT, ask(text, message(parameters.clone()))).await.ok();
        let body = ask(text, increments(parameters.clone()));
        let data = frames(&stream(&server, TEXT, &body).await);
        assert_eq!(fold(&data, 1), summary(&whole), "{text} {parameters}");
        let so_far = ask(text, message(parameters.clone()));
        let data = frames(&stream(&server, TEXT, &so_far).await);
        assert_eq!(summary(data.last().unwrap()), summary(&whole), "{text} {parameters}");
        let reasons = data.iter().map(|frame| &frame["output"]["choices"][0]["finish_reason"]);
        assert!(reasons.rev().skip(1).all(|reason| reason == "null"));
    }
}

#[tokio::test]
async fn several_choices_and_log_probabilities_have_their_places() {
    let server = FakeServer::start();
    let parameters = json!({"n": 2, "max_tokens": 3, "logprobs": true, "top_logprobs": 1});
    let messages = json!([{"role": "user", "content": "go on"}]);
    let body = |parameters: Value| json!({"model": MODEL, "input": {"messages": messages}, "parameters": parameters});
    // They ask for a message without naming it.
    let whole = server.post(TEXT, body(parameters.clone())).await.ok();
    assert_eq!(summary(&whole)["texts"], json!([["abc", ""], ["bcd", ""]]));
    let entries = whole["output"]["choices"][1]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries[0]["token"], "b");
    assert_eq!(entries.len(), 3);
    let data = frames(&stream(&server, TEXT, &body(increments(parameters))).await);
    assert_eq!(fold(&data, 2), summary(&whole));
    let streamed: usize = data
        .iter()
        .filter_map(|frame| frame["output"]["choices"][0]["logprobs"]["content"].as_array())
        .map(Vec::len)
        .sum();
    assert_eq!(streamed, 6);
    let refused = server.post(TEXT, ask("x", json!({"n": 2, "result_format": "text"}))).await;
    assert!(error(&refused, 400, "InvalidParameter").contains("`parameters.result_format`"));
}

#[tokio::test]
async fn sequences_of_tokens_stop_an_answer() {
    let server = FakeServer::start();
    let id = |text: &str| -> Vec<u32> { text.bytes().map(u32::from).collect() };
    for (stop, expected) in [
        (json!([id("ll")]), "he"),
        (json!(id("ll")), "he"),
        (json!([id("lx"), id("o w"), id("rld")]), "hell"),
        (json!([[u32::from(b' ')]]), "hello"),
        (json!([id("xyz")]), "hello world"),
        (json!([]), "hello world"),
    ] {
        let answer = server.post(TEXT, ask("hello world", json!({"stop": stop}))).await.ok();
        assert_eq!(answer["output"]["text"], expected, "{stop}");
        assert_eq!(answer["output"]["finish_reason"], "stop");
    }
    server.wait_until_idle().await;
    // The other endpoints understand lists of sequences too.
    let body = with(chat("hello"), json!({"stop": [id("ll")]}));
    let answer = server.post("/compatible-mode/v1/chat/completions", body).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "he");
}

#[tokio::test]
async fn prompts_may_have_a_history_or_be_raw() {
    let server = FakeServer::start();
    let input = json!({"prompt": "Go on.", "history": [{"user": "say:yes;", "bot": "ok"}]});
    let body = json!({"model": MODEL, "input": input});
    assert_eq!(server.post(TEXT, body).await.ok()["output"]["text"], "yes");
    let raw = json!({"model": MODEL, "input": {"prompt": "say:raw;"},
        "parameters": {"use_raw_prompt": true}});
    let answer = server.post(TEXT, raw).await.ok();
    assert_eq!(answer["output"]["text"], "raw");
    assert_eq!(answer["usage"]["input_tokens"], 8);
}

#[tokio::test]
async fn a_partial_message_is_continued() {
    let server = FakeServer::start();
    let messages = json!([{"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "say:more; Well", "partial": true}]);
    let count = async |path: &str, body: Value| server.post(path, body).await.ok()["usage"].clone();
    let body = json!({"model": MODEL, "input": {"messages": messages}});
    let native = count(TEXT, body).await;
    let compatible = json!({"model": MODEL, "messages": messages});
    let compatible = count("/compatible-mode/v1/chat/completions", compatible).await;
    let continued = json!({"model": MODEL, "messages": messages, "continue_final_message": true});
    let continued = count("/v1/chat/completions", continued).await;
    assert_eq!(native["input_tokens"], continued["prompt_tokens"]);
    assert_eq!(compatible["prompt_tokens"], continued["prompt_tokens"]);
}

#[tokio::test]
async fn marks_keep_a_prefix_and_say_so() {
    let server = FakeServer::start();
    let part = json!([{"text": "r".repeat(100), "cache_control": {"type": "ephemeral"}}]);
    let body = |text: &str| {
        json!({"model": MODEL, "input": {"messages": [{"role": "system", "content": part},
            {"role": "user", "content": format!("say:{text};")}]}})
    };
    let first = server.post(TEXT, body("one")).await.ok()["usage"].clone();
    assert_eq!(
        first["prompt_tokens_details"],
        json!({"cached_tokens": 0, "cache_creation_input_tokens": 96})
    );
    let second = server.post(TEXT, body("two")).await.ok()["usage"].clone();
    assert_eq!(
        second["prompt_tokens_details"],
        json!({"cached_tokens": 112, "cache_creation_input_tokens": 0})
    );
}

#[tokio::test]
async fn calls_in_the_text_pass_through_without_tools() {
    let server = FakeServer::start();
    let answer = server.post(TEXT, ask(CALL, message(json!({})))).await.ok();
    let message = &answer["output"]["choices"][0]["message"];
    assert_eq!(message["content"], CALL);
    assert_eq!(message.get("tool_calls"), None);
    assert_eq!(message["reasoning_content"], "");
}

#[tokio::test]
async fn thoughts_are_apart_and_counted() {
    let server = FakeServer::thinking(&config());
    let body = ask("<think>Hmm</think>Yes", json!({"thinking_budget": 100}));
    // Models that think answer with messages unless told otherwise.
    let answer = server.post(TEXT, body).await.ok();
    let message = &answer["output"]["choices"][0]["message"];
    assert_eq!(
        (&message["content"], &message["reasoning_content"]),
        (&json!("Yes"), &json!("Hmm"))
    );
    assert!(0 < answer["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap());
    let body = ask("<think>Hmm</think>Yes", json!({"result_format": "text"}));
    let output = server.post(TEXT, body).await.ok()["output"].clone();
    assert_eq!(output, json!({"finish_reason": "stop", "text": "Yes", "reasoning_content": "Hmm"}));
}

#[tokio::test]
async fn what_has_no_effect_is_named() {
    let server = FakeServer::start();
    let parameters = json!({"enable_safety_check": true, "preserve_thinking": true,
        "enable_search": false, "search_options": {"forced_search": true}, "top_k": 1000,
        "tool_stream": true, "plugins": {}, "stream": true});
    let body = with(ask("x", parameters), json!({"task": "t"}));
    let headers =
        [("X-DashScope-DataInspection", "{\"input\":\"cip\"}"), ("X-DashScope-Async", "")];
    let answer = post_with(&server, TEXT, &headers, &body).await;
    answer.ok();
    let ignored = "X-DashScope-DataInspection,task,parameters.enable_safety_check,\
                   parameters.search_options,parameters.stream,parameters.preserve_thinking";
    assert_eq!(answer.header("x-ignored-params"), Some(ignored));
    let strict = ask("x", json!({"enable_safety_check": true, "strict_params": true}));
    let message = error(&server.post(TEXT, strict).await, 400, "InvalidParameter");
    assert!(message.starts_with("`parameters.enable_safety_check`"), "{message}");
}

#[tokio::test]
async fn what_only_the_hosted_service_has_is_refused_with_advice() {
    let server = FakeServer::start();
    for (parameters, advice) in [
        (json!({"enable_search": true}), "offer a tool"),
        (json!({"enable_code_interpreter": true}), "offer a tool"),
        (json!({"translation_options": {"target_lang": "English"}}), "say in a message"),
        (json!({"skill": ["ppt"]}), "offer what they do as tools"),
        (json!({"plugins": {"ocr": {}}}), "offer what they do as tools"),
    ] {
        let answer = server.post(TEXT, ask("x", parameters.clone())).await;
        let message = error(&answer, 400, "InvalidParameter");
        let (name, _) = parameters.as_object().unwrap().iter().next().unwrap();
        assert!(message.starts_with(&format!("`parameters.{name}`")), "{message}");
        assert!(message.contains(advice), "{message}");
    }
    for name in ["X-DashScope-Async", "X-DashScope-EncryptionKey", "X-DashScope-Plugin"] {
        let answer = post_with(&server, TEXT, &[(name, "enable")], &ask("x", json!({}))).await;
        let message = error(&answer, 400, "InvalidParameter");
        assert!(message.starts_with(&format!("`{name}`")), "{message}");
    }
    for path in [
        "/api/v1/services/rerank/text-rerank/text-rerank",
        "/api/v1/tasks/x/cancel",
        "/api/v1/files",
        "/api/v1/services/aigc/text2image/image-synthesis",
    ] {
        let message = error(&server.post(path, json!({})).await, 400, "UnsupportedOperation");
        assert!(message.contains(' '), "{message}");
    }
    error(&server.get("/api/v1/tasks/x").await, 400, "UnsupportedOperation");
    for path in ["/compatible-api/v1/reranks", "/compatible-mode/v1/batches", "/v1/files"] {
        let error = server.post(path, json!({})).await.error(400);
        assert!(error["message"].as_str().unwrap().contains("here"), "{error}");
    }
}

/// Wrong values of parameters.
fn malformed_parameters() -> Vec<(&'static str, Vec<Value>)> {
    vec![
        ("result_format", vec![json!("xml"), json!(1)]),
        ("incremental_output", vec![json!("yes"), json!(1)]),
        ("temperature", vec![json!(-0.1), json!(2.1), json!("warm")]),
        ("top_p", vec![json!(0), json!(1.1), json!("x")]),
        ("top_k", vec![json!(-2), json!(0.5), json!({})]),
        ("repetition_penalty", vec![json!(0), json!(2.5)]),
        ("presence_penalty", vec![json!(-2.1), json!(2.1)]),
        ("seed", vec![json!("x"), json!(0.5)]),
        ("max_tokens", vec![json!(0), json!(-1), json!("x"), json!(100_000)]),
        ("max_completion_tokens", vec![json!(0), json!(-1), json!(100_000)]),
        ("n", vec![json!(0), json!(1000), json!("1")]),
        (
            "stop",
            vec![json!(1), json!(""), json!([""]), json!([[]]), json!([[9999]]), json!([9999])],
        ),
        ("stop", vec![json!(["a", 1]), json!([-1]), json!({})]),
        ("logprobs", vec![json!(1)]),
        ("top_logprobs", vec![json!(3), json!(-1), json!(21)]),
        ("tools", vec![json!("x"), json!([1]), json!([{"type": "web_search"}])]),
        ("tools", vec![json!([{"type": "function", "function": {"name": ""}}])]),
        ("tool_choice", vec![json!("x"), json!("required"), json!(1)]),
        ("response_format", vec![json!("json"), json!({}), json!({"type": "xml"})]),
        ("enable_thinking", vec![json!("x")]),
        ("thinking_budget", vec![json!(-1), json!("x")]),
        ("preserve_thinking", vec![json!(1)]),
        ("reasoning_effort", vec![json!("x"), json!(1)]),
        ("use_raw_prompt", vec![json!(true), json!("x")]),
        ("chat_template_kwargs", vec![json!(1)]),
        ("guided_regex", vec![json!("(")]),
        ("echo", vec![json!(true)]),
        ("best_of", vec![json!(3)]),
        ("cache_salt", vec![json!("")]),
        ("strict_params", vec![json!("x")]),
    ]
}

#[tokio::test]
async fn every_malformed_request_names_its_parameter() {
    let server = FakeServer::start();
    let mut complaints = Vec::new();
    let mut check = |answer: &Answer, param: &str, what: &Value| {
        let message = error(answer, 400, "InvalidParameter");
        let named = message.split('`').nth(1).unwrap_or_default();
        let is_named = named
            .strip_prefix(param)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
        if !is_named && !message.contains(&format!("`{param}`")) {
            complaints.push(format!("{param}={what}: {message}"));
        }
    };
    for (name, values) in malformed_parameters() {
        for value in values {
            let answer = server.post(TEXT, ask("x", json!({name: value}))).await;
            let param = format!("parameters.{name}");
            check(&answer, &param, &value);
        }
    }
    let image = json!([{"image": "https://localhost/x.png"}]);
    for (input, param) in [
        (json!(5), "input"),
        (json!([]), "input"),
        (json!({}), "input"),
        (json!({"messages": []}), "input.messages"),
        (json!({"messages": 5}), "input.messages"),
        (json!({"messages": [5]}), "input.messages[0]"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), "input.messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "input.messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"a": 1}]}]}),
            "input.messages[0].content[0]",
        ),
        (
            json!({"messages": [{"role": "user", "content": image}]}),
            "input.messages[0].content[0].image",
        ),
        (
            json!({"messages": [{"role": "user", "content": "x", "partial": true}]}),
            "input.messages[0].partial",
        ),
        (
            json!({"messages": [{"role": "user", "content": "x", "cache_control": {}}]}),
            "input.messages[0].cache_control.type",
        ),
        (json!({"prompt": ""}), "input.prompt"),
        (json!({"prompt": 5}), "input.prompt"),
        (json!({"prompt": "x", "messages": []}), "input.prompt"),
        (json!({"prompt": "x", "history": [{"user": "x"}]}), "input.history[0].bot"),
        (json!({"messages": [{"role": "user", "content": "x"}], "history": []}), "input.history"),
    ] {
        let answer = server.post(TEXT, json!({"model": MODEL, "input": input})).await;
        check(&answer, param, &input);
    }
    for parameters in [json!(5), json!([])] {
        check(&server.post(TEXT, ask("x", parameters.clone())).await, "parameters", &parameters);
    }
    for (input, parameters, param) in [
        (json!({"texts": 5}), json!({}), "input.texts"),
        (json!({}), json!({}), "input.texts"),
        (json!({"texts": []}), json!({}), "input.texts"),
        (json!({"texts": [""]}), json!({}), "input.texts"),
        (json!({"texts": ["x"]}), json!({"dimension": 7}), "parameters.dimension"),
        (json!({"texts": ["x"]}), json!({"output_type": "sparse"}), "parameters.output_type"),
    ] {
        let body = json!({"model": MODEL, "input": input, "parameters": parameters});
        check(&server.post(EMBEDDING, body).await, param, &input);
    }
    check(&server.post(TOKENIZER, json!({"model": MODEL, "input": {}})).await, "input", &json!({}));
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[tokio::test]
async fn errors_have_the_native_codes() {
    let server = FakeServer::start();
    let unknown = with(ask("x", json!({})), json!({"model": "gpt-4o"}));
    error(&server.post(TEXT, unknown).await, 404, "ModelNotFound");
    for model in [json!(null), json!("")] {
        let body = with(ask("x", json!({})), json!({"model": model}));
        error(&server.post(TEXT, body).await, 400, "BadRequest.EmptyModel");
    }
    error(&server.post(TEXT, json!({"model": MODEL})).await, 400, "BadRequest.EmptyInput");
    error(&server.post_text(TEXT, "{").await, 400, "InvalidParameter");
    error(&server.post_text(TEXT, "[]").await, 400, "InvalidParameter");
    error(&server.get(TEXT).await, 405, "UnsupportedOperation");
    let request = Request::post(TEXT).header("content-type", "text/plain").body(Body::empty());
    let response = server.send(request.unwrap()).await;
    assert_eq!(response.status(), 415);
    for input in [
        json!({"prompt": "x".repeat(600)}),
        json!({"messages": [{"role": "user", "content": "x".repeat(600)}]}),
    ] {
        let answer = server.post(TEXT, json!({"model": MODEL, "input": input})).await;
        let message = error(&answer, 400, "InvalidParameter");
        assert!(message.starts_with("Range of input length should be [1, 511]"), "{message}");
        assert!(message.contains("maximum context length"), "{message}");
    }
    let limits = HttpLimits { max_body_bytes: 10, ..HttpLimits::default() };
    let server = FakeServer::with(&config(), limits);
    error(&server.post(TEXT, ask("x", json!({}))).await, 413, "BadRequest.TooLarge");
}

#[tokio::test]
async fn a_full_queue_is_throttling() {
    let config = EngineConfig { max_num_seqs: 1, max_queue: 1, ..config() };
    // A stream that waits for its turn begins when a keep-alive is due.
    let limits = HttpLimits { keep_alive: Duration::from_millis(50), ..HttpLimits::default() };
    let server = FakeServer::with(&config, limits);
    let endless = json!({"model": MODEL, "input": {"prompt": "go"},
        "parameters": {"max_tokens": 10_000}});
    let post = || {
        let request = Request::post(TEXT).header("content-type", "application/json");
        let request = request.header("x-dashscope-sse", "enable");
        request.body(Body::from(endless.to_string())).unwrap()
    };
    let (_first, mut second) = (server.send(post()).await, server.send(post()).await);
    let waiting = second.body_mut().frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(&waiting[..], b":keep-alive\n\n");
    let third = server.post(TEXT, endless.clone()).await;
    error(&third, 429, "Throttling");
    assert!(third.header("retry-after").is_some());
}

#[tokio::test]
async fn an_error_midway_is_an_event() {
    let server = FakeServer::start();
    let body = json!({"model": MODEL, "input": {"prompt": "go on"},
        "parameters": {"incremental_output": true, "max_tokens": 480}});
    let request = Request::post(TEXT)
        .header("content-type", "application/json")
        .header("accept", "text/event-stream")
        .header("x-request-id", "r-1");
    let response = server.send(request.body(Body::from(body.to_string())).unwrap()).await;
    assert_eq!(response.status(), 200);
    server.state.engine.abort_all();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    let last = text.trim_end_matches('\n').rsplit("\n\n").next().unwrap();
    let (id, rest) = last.split_once('\n').unwrap();
    assert!(id.strip_prefix("id:").unwrap().parse::<u32>().unwrap() > 1);
    assert_eq!(
        rest,
        "event:error\n:HTTP_STATUS/503\ndata:{\"code\":\"ServiceUnavailable\",\
         \"message\":\"the server is shutting down\",\"request_id\":\"r-1\"}"
    );
    assert!(!text.contains("[DONE]"));
}

#[tokio::test]
async fn hosted_names_are_answered_and_the_server_says_which_model_it_was() {
    let server = FakeServer::start();
    for name in ["qwen-turbo", "qwen-plus-2025-01-25", "qwen-max-latest", "qwen2.5-72b-instruct"] {
        let answer = server.post(TEXT, with(ask("hi", json!({})), json!({"model": name}))).await;
        assert_eq!(answer.ok()["output"]["text"], "hi");
        assert_eq!(answer.header("x-served-model"), Some(MODEL));
        let compatible = with(chat("hi"), json!({"model": name}));
        let answer = server.post("/compatible-mode/v1/chat/completions", compatible).await;
        assert_eq!(answer.ok()["model"], name);
        assert_eq!(answer.header("x-served-model"), Some(MODEL));
        let model = server.get(&format!("/compatible-mode/v1/models/{name}")).await.ok();
        assert_eq!((&model["id"], &model["root"]), (&json!(name), &json!("/models/fake")));
    }
    // They are answered, but not offered.
    let listed = server.get("/compatible-mode/v1/models").await.ok();
    assert_eq!(listed["data"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn other_protocols_have_their_paths_and_errors() {
    let server = FakeServer::start();
    for base in ["/compatible-mode", "/compatible-api", "/api/v2/apps/protocols/compatible-mode"] {
        let body = json!({"model": "qwen-plus", "input": "say:hi;", "store": false});
        let answer = server.post(&format!("{base}/v1/responses"), body).await.ok();
        assert_eq!(answer["output"][0]["content"][0]["text"], "hi");
        let embedded = json!({"model": MODEL, "input": "x"});
        server.post(&format!("{base}/v1/embeddings"), embedded).await.ok();
        let path = format!("{base}/v1/chat/completions");
        for (more, status, code) in [
            (json!({"model": "nobody"}), 404, "model_not_found"),
            (json!({"top_p": 7}), 400, "invalid_parameter_error"),
            (json!({"messages": []}), 400, "invalid_parameter_error"),
        ] {
            let answer = server.post(&path, with(chat("x"), more)).await;
            assert_eq!(answer.error(status)["code"], code);
            assert_eq!(answer.json()["request_id"].as_str(), answer.header("x-request-id"));
        }
        let long = json!({"messages": [{"role": "user", "content": "x".repeat(600)}]});
        let error = server.post(&path, with(chat("x"), long)).await.error(400);
        assert_eq!(error["code"], "invalid_parameter_error");
        assert!(error["message"].as_str().unwrap().starts_with("Range of input length"));
        assert_eq!(server.get(&format!("{base}/v1/none")).await.error(404)["code"], "not_found");
    }
    let body = with(chat("hi"), json!({"max_tokens": 9}));
    let message = server.post("/apps/anthropic/v1/messages", body.clone()).await.ok();
    assert_eq!(message["content"][0]["text"], "hi");
    let refused = server.post("/apps/anthropic/v1/messages", with(body, json!({"top_p": 7}))).await;
    assert_eq!(refused.json()["error"]["type"], "invalid_request_error");
    // Without DashScope's paths, codes are those of before.
    let answer = server.post("/v1/chat/completions", with(chat("x"), json!({"top_p": 7}))).await;
    assert_eq!(answer.error(400)["code"], Value::Null);
    assert_eq!(answer.json().get("request_id"), None);
}

#[tokio::test]
async fn tokens_vectors_and_models_have_the_native_shapes() {
    let server = FakeServer::start();
    let headers = [("x-request-id", "r-1")];
    let body = json!({"model": "qwen-max", "input": {"prompt": "ab"}, "parameters": {"seed": 1}});
    let answer = post_with(&server, TOKENIZER, &headers, &body).await;
    assert_eq!(
        answer.text,
        "{\"output\":{\"token_ids\":[97,98],\"tokens\":[\"a\",\"b\"]},\
         \"usage\":{\"input_tokens\":2},\"request_id\":\"r-1\"}"
    );
    assert_eq!(answer.header("x-ignored-params"), Some("parameters.seed"));
    let messages =
        json!([{"role": "user", "content": "a"}, {"role": "user", "content": [{"text": "b"}]}]);
    let body = json!({"model": MODEL, "input": {"messages": messages}});
    let answer = server.post(TOKENIZER, body).await.ok();
    assert_eq!(answer["output"]["token_ids"], json!([97, 98]));
    let body = json!({"model": MODEL, "input": {"texts": ["a", "bc"]},
        "parameters": {"text_type": "query"}});
    let answer = post_with(&server, EMBEDDING, &headers, &body).await;
    let embeddings = answer.ok()["output"]["embeddings"].clone();
    assert_eq!(embeddings[1]["text_index"], 1);
    assert_eq!(embeddings[0]["embedding"].as_array().unwrap().len(), 2);
    assert!(answer.text.ends_with("\"usage\":{\"total_tokens\":3},\"request_id\":\"r-1\"}"));
    let one = json!({"model": MODEL, "input": {"texts": "a"}});
    assert_eq!(
        server.post(EMBEDDING, one).await.ok()["output"]["embeddings"][0]["embedding"],
        embeddings[0]["embedding"]
    );
    let page = server.get("/api/v1/models?page_no=2&page_size=1").await.ok();
    let page = &page["output"];
    assert_eq!(
        (&page["total"], &page["page_no"], &page["page_size"]),
        (&json!(2), &json!(2), &json!(1))
    );
    assert_eq!(page["models"][0]["model"], "org/alias");
    let one = server.get("/api/v1/models?model=org%2Falias&page_no=1&page_size=1").await.ok();
    assert_eq!(one["output"]["models"][0]["model"], "org/alias");
    let none = server.get("/api/v1/models?model=nobody").await.ok();
    assert_eq!(none["output"]["models"], json!([]));
    error(&server.get("/api/v1/models?page_no=0").await, 400, "InvalidParameter");
}
