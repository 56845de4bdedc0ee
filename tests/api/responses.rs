//! `/v1/responses`: items in, items and events out, and what is kept of them.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use qwen_server::chat::model::{Conventions, Reasoning};
use qwen_server::http::HttpLimits;
use serde_json::{Value, json};

use crate::api_fake::{Answer, FakeServer, MODEL, config, model, with};

const PATH: &str = "/v1/responses";
const CALL: &str = r#"Well.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>"#;

fn ask(text: &str) -> Value {
    json!({"model": MODEL, "input": format!("say:{text};")})
}

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    json!([{"type": "function", "name": "add", "parameters": parameters}])
}

fn thinking_server() -> FakeServer {
    let mut server = FakeServer::start();
    let conventions = Conventions { reasoning: Reasoning::InTags, ..Conventions::default() };
    server.state.model = Arc::new(model(conventions));
    server
}

async fn delete(server: &FakeServer, path: &str) -> (u16, Value) {
    let response = server.send(Request::delete(path).body(Body::empty()).unwrap()).await;
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap())
}

/// The response without what differs from request to request.
fn comparable(response: &Value) -> Value {
    let mut response = response.clone();
    for key in ["id", "created_at", "completed_at"] {
        response[key] = Value::Null;
    }
    for item in response["output"].as_array_mut().unwrap() {
        item["id"] = Value::Null;
        if item["type"] == "function_call" {
            item["call_id"] = Value::Null;
        }
    }
    response
}

/// Builds the output from the events, as clients do.
fn fold(events: &[Value]) -> Value {
    let mut output: Vec<Value> = Vec::new();
    for (index, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], index);
        let at = event["output_index"].as_u64().unwrap_or_default() as usize;
        let append = |text: &mut Value, more: &Value| {
            *text = format!("{}{}", text.as_str().unwrap(), more.as_str().unwrap()).into();
        };
        match event["type"].as_str().unwrap() {
            "response.output_item.added" => {
                assert_eq!(at, output.len());
                output.push(event["item"].clone());
            }
            "response.content_part.added" => {
                output[at]["content"].as_array_mut().unwrap().push(event["part"].clone());
            }
            "response.output_text.delta" => {
                let part = &mut output[at]["content"][0];
                append(&mut part["text"], &event["delta"]);
                let new = event["logprobs"].as_array().unwrap().clone();
                part["logprobs"].as_array_mut().unwrap().extend(new);
            }
            "response.reasoning_text.delta" => {
                append(&mut output[at]["content"][0]["text"], &event["delta"]);
            }
            "response.function_call_arguments.delta" => {
                append(&mut output[at]["arguments"], &event["delta"]);
            }
            "response.output_text.done" | "response.reasoning_text.done" => {
                assert_eq!(output[at]["content"][0]["text"], event["text"]);
                assert_eq!(output[at]["id"], event["item_id"]);
            }
            "response.function_call_arguments.done" => {
                assert_eq!(output[at]["arguments"], event["arguments"]);
            }
            "response.output_item.done" => {
                output[at]["status"] = event["item"]["status"].clone();
                assert_eq!(output[at], event["item"]);
            }
            _ => {}
        }
    }
    output.into()
}

#[tokio::test]
async fn a_response_has_the_full_shape() {
    let server = FakeServer::start();
    let more = json!({"instructions": "Be short.", "metadata": {"k": "v"}, "temperature": 0.5,
        "max_output_tokens": 50, "user": "u"});
    let response = server.post(PATH, with(ask("hello"), more)).await.ok();
    assert_eq!(response["object"], "response");
    assert_eq!(response["status"], "completed");
    assert!(response["id"].as_str().unwrap().starts_with("resp_"));
    assert!(response["created_at"].is_u64() && response["completed_at"].is_u64());
    let part = json!({"type": "output_text", "text": "hello", "annotations": [], "logprobs": []});
    let item = &response["output"][0];
    assert_eq!(item["type"], "message");
    assert_eq!(item["role"], "assistant");
    assert_eq!(item["status"], "completed");
    assert_eq!(item["content"], json!([part]));
    let usage = &response["usage"];
    assert_eq!(usage["output_tokens"], 6);
    assert_eq!(usage["output_tokens_details"], json!({"reasoning_tokens": 0}));
    assert_eq!(usage["input_tokens_details"]["cached_tokens"], 0);
    let total = usage["input_tokens"].as_u64().unwrap() + 6;
    assert_eq!(usage["total_tokens"], total);
    for (name, value) in [
        ("instructions", json!("Be short.")),
        ("metadata", json!({"k": "v"})),
        ("temperature", json!(0.5)),
        ("max_output_tokens", json!(50)),
        ("user", json!("u")),
        ("error", json!(null)),
        ("incomplete_details", json!(null)),
        ("parallel_tool_calls", json!(true)),
        ("previous_response_id", json!(null)),
        ("reasoning", json!({"effort": null, "summary": null})),
        ("store", json!(true)),
        ("text", json!({"format": {"type": "text"}})),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("truncation", json!("disabled")),
        ("background", json!(false)),
        ("model", json!(MODEL)),
    ] {
        assert_eq!(response.get(name), Some(&value), "{name}");
    }
}

#[tokio::test]
async fn events_come_in_order_and_add_up_to_the_whole_answer() {
    let server = thinking_server();
    let with_call = with(ask(CALL), json!({"tools": tools()}));
    let thought = format!("<think>Hmm. Well.</think>{CALL}");
    let thoughtful = with(ask(&thought), json!({"tools": tools()}));
    let logprobs = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let cut = json!({"max_output_tokens": 3});
    for body in [
        ask("hello"),
        ask(""),
        with_call,
        thoughtful,
        with(ask("hello"), logprobs),
        with(ask("hello"), cut.clone()),
        with(ask("<think>hello"), cut),
    ] {
        let whole = server.post(PATH, body.clone()).await.ok();
        let events = server.post(PATH, with(body.clone(), json!({"stream": true}))).await.events();
        let last = &events.last().unwrap()["response"];
        let mut expected = comparable(&whole);
        let mut streamed = comparable(last);
        // A second request finds the first one's blocks.
        expected["usage"]["input_tokens_details"] = Value::Null;
        streamed["usage"]["input_tokens_details"] = Value::Null;
        assert_eq!(streamed, expected, "{body}");
        assert_eq!(fold(&events), last["output"], "{body}");
    }
}

#[tokio::test]
async fn each_kind_of_item_has_its_events() {
    let server = thinking_server();
    let body = ask(&format!("<think>Hm</think>{CALL}"));
    let body = with(body, json!({"tools": tools(), "stream": true}));
    let events = server.post(PATH, body).await.events();
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    let kinds: Vec<&str> = kinds.iter().map(|kind| kind.trim_start_matches("response.")).collect();
    let text = |kind: &'static str| {
        [
            ["output_item.added", "content_part.added"],
            match kind {
                "reasoning_text" => ["reasoning_text.delta", "reasoning_text.done"],
                _ => ["output_text.delta", "output_text.done"],
            },
            ["content_part.done", "output_item.done"],
        ]
        .concat()
    };
    let call = vec![
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ];
    let expected = [
        vec!["created", "in_progress"],
        text("reasoning_text"),
        text("output_text"),
        call,
        vec!["completed"],
    ];
    assert_eq!(kinds, expected.concat());
    let usage = &events.last().unwrap()["response"]["usage"];
    assert!(0 < usage["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap());
}

#[tokio::test]
async fn what_is_cut_is_incomplete() {
    let server = FakeServer::start();
    let body = with(ask("hello"), json!({"max_output_tokens": 2}));
    let response = server.post(PATH, body.clone()).await.ok();
    assert_eq!(response["status"], "incomplete");
    assert_eq!(response["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(response["output"][0]["status"], "incomplete");
    assert_eq!(response["completed_at"], Value::Null);
    let events = server.post(PATH, with(body, json!({"stream": true}))).await.events();
    assert_eq!(events.last().unwrap()["type"], "response.incomplete");
}

#[tokio::test]
async fn calls_and_their_results_are_items() {
    let server = FakeServer::start();
    let body = with(ask(CALL), json!({"tools": tools()}));
    let response = server.post(PATH, body).await.ok();
    let call = &response["output"][1];
    assert_eq!(call["type"], "function_call");
    assert_eq!(call["name"], "add");
    assert_eq!(call["arguments"], r#"{"a": 1}"#);
    let input = json!([
        {"role": "user", "content": [{"type": "input_text", "text": "Add."}]},
        response["output"][0],
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "say:two;"},
    ]);
    let next = json!({"model": MODEL, "input": input, "tools": tools()});
    let response = server.post(PATH, next.clone()).await.ok();
    assert_eq!(response["output"][0]["content"][0]["text"], "two");
    let forced =
        json!({"tool_choice": {"type": "function", "name": "add"}, "max_output_tokens": 60});
    let response =
        server.post(PATH, with(with(ask(CALL), json!({"tools": tools()})), forced)).await;
    assert_eq!(response.ok()["output"][0]["type"], "function_call");
    let count = server.post("/v1/responses/input_tokens", next).await.ok();
    assert_eq!(count["object"], "response.input_tokens");
    assert!(50 < count["input_tokens"].as_u64().unwrap());
}

#[tokio::test]
async fn text_can_have_a_format() {
    let server = FakeServer::start();
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}},
        "required": ["a"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "name": "n", "schema": schema, "strict": true});
    let body = with(ask(r#"{"a":1}"#), json!({"text": {"format": format}}));
    let response = server.post(PATH, body).await.ok();
    assert_eq!(response["output"][0]["content"][0]["text"], r#"{"a":1}"#);
    assert_eq!(response["text"]["format"], format);
}

#[tokio::test]
async fn a_response_can_be_continued_read_and_deleted() {
    let server = FakeServer::start();
    let first = server.post(PATH, with(ask("one"), json!({"instructions": "Old."}))).await.ok();
    let id = first["id"].as_str().unwrap();
    let body = json!({"model": MODEL, "input": "And?", "previous_response_id": id});
    let second = server.post(PATH, body.clone()).await.ok();
    // The script is in the first question, so it was read again.
    assert_eq!(second["output"][0]["content"][0]["text"], "one");
    assert_eq!(second["previous_response_id"], id);
    let stored = server.get(&format!("{PATH}/{id}")).await;
    assert_eq!(stored.header("content-type"), Some("application/json"));
    assert_eq!(stored.ok(), first);
    let second_id = second["id"].as_str().unwrap();
    let path = format!("{PATH}/{second_id}/input_items");
    let items = server.get(&format!("{path}?order=asc")).await.ok();
    let text = |index: usize| items["data"][index]["content"][0]["text"].as_str().unwrap();
    assert_eq!((text(0), text(1), text(2)), ("say:one;", "one", "And?"));
    assert_eq!(items["has_more"], false);
    let page = server.get(&format!("{path}?limit=1")).await.ok();
    assert_eq!(page["data"][0], items["data"][2]);
    assert_eq!(page["has_more"], true);
    let after = page["last_id"].as_str().unwrap();
    let page = server.get(&format!("{path}?after={after}")).await.ok();
    assert_eq!(page["data"], json!([items["data"][1], items["data"][0]]));
    assert_eq!(server.get(&format!("{path}?limit=0")).await.error(400)["param"], "limit");
    let (status, deleted) = delete(&server, &format!("{PATH}/{id}")).await;
    assert_eq!((status, &deleted["deleted"]), (200, &json!(true)));
    assert_eq!(server.get(&format!("{PATH}/{id}")).await.error(404)["code"], "response_not_found");
    assert_eq!(delete(&server, &format!("{PATH}/{id}")).await.0, 404);
    server.get(&format!("{PATH}/%ff")).await.error(404);
    let gone = server.post(&format!("{PATH}/{id}/cancel"), json!({})).await.error(404);
    assert_eq!(
        (&gone["param"], &gone["code"]),
        (&json!("response_id"), &json!("response_not_found"))
    );
    let error = server.post(PATH, body).await.error(400);
    assert_eq!(error["code"], "previous_response_not_found");
    assert_eq!(error["param"], "previous_response_id");
    let more = json!({"model": MODEL, "input": "And?", "previous_response_id": second_id});
    assert_eq!(server.post(PATH, more).await.ok()["output"][0]["content"][0]["text"], "one");
}

#[tokio::test]
async fn what_must_not_be_kept_is_not() {
    let server = FakeServer::start();
    for more in [json!({"store": false}), json!({"store": false, "stream": true})] {
        let answer = server.post(PATH, with(ask("one"), more.clone())).await;
        let response = match more.get("stream") {
            None => answer.ok(),
            Some(_) => answer.events().last().unwrap()["response"].clone(),
        };
        assert_eq!(response["store"], false);
        let id = response["id"].as_str().unwrap();
        server.get(&format!("{PATH}/{id}")).await.error(404);
    }
    let streamed = server.post(PATH, with(ask("one"), json!({"stream": true}))).await.events();
    let id = streamed[0]["response"]["id"].as_str().unwrap();
    let stored = server.get(&format!("{PATH}/{id}")).await.ok();
    assert_eq!(stored, streamed.last().unwrap()["response"]);
    let short = HttpLimits { stored_response_lifetime: Duration::ZERO, ..HttpLimits::default() };
    let server = FakeServer::with(&config(), short);
    let id = server.post(PATH, ask("one")).await.ok()["id"].clone();
    server.get(&format!("{PATH}/{}", id.as_str().unwrap())).await.error(404);
}

#[tokio::test]
async fn every_flaw_is_named() {
    let server = FakeServer::start();
    let message = |content: Value| json!({"input": [{"role": "user", "content": content}]});
    let tool = |tool: Value| json!({"tools": [tool]});
    let format = |format: Value| json!({"text": {"format": format}});
    for (fields, param) in [
        (json!({"input": null}), "input"),
        (json!({"input": 5}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": ["text"]}), "input[0]"),
        (json!({"input": [{"content": "x"}]}), "input[0].role"),
        (json!({"input": [{"role": "robot", "content": "x"}]}), "input[0].role"),
        (json!({"input": [{"role": "user"}]}), "input[0].content"),
        (message(json!([{"type": "input_image", "image_url": "x"}])), "input[0].content[0].type"),
        (message(json!([{"type": "input_text"}])), "input[0].content[0].text"),
        (json!({"input": [{"type": "web_search_call"}]}), "input[0].type"),
        (json!({"input": [{"type": "function_call", "name": "f"}]}), "input[0].call_id"),
        (json!({"input": [{"type": "function_call_output", "call_id": "c"}]}), "input[0].output"),
        (json!({"instructions": 5}), "instructions"),
        (tool(json!({"type": "web_search"})), "tools[0].type"),
        (tool(json!({"type": "function"})), "tools[0].name"),
        (tool(json!({"type": "function", "name": "f", "parameters": 5})), "tools[0].parameters"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "function", "name": "no"}}),
            "tool_choice.name",
        ),
        (json!({"tools": tools(), "tool_choice": {"type": "file_search"}}), "tool_choice.type"),
        (json!({"tools": tools(), "tool_choice": "maybe"}), "tool_choice"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (format(json!({"type": "xml"})), "text.format.type"),
        (format(json!({"type": "json_schema", "name": "n"})), "text.format.schema"),
        (
            format(json!({"type": "json_schema", "name": "n", "schema": {"type": "no"}})),
            "text.format.schema",
        ),
        (json!({"text": {"verbosity": "much"}}), "text.verbosity"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"reasoning": {"effort": "huge"}}), "reasoning.effort"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"max_output_tokens": 100_000}), "max_output_tokens"),
        (json!({"temperature": 9}), "temperature"),
        (json!({"top_logprobs": 21}), "top_logprobs"),
        (json!({"include": ["everything"]}), "include[0]"),
        (json!({"metadata": {"k": 5}}), "metadata.k"),
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"background": true}), "background"),
        (json!({"conversation": "c"}), "conversation"),
        (json!({"prompt": {"id": "p"}}), "prompt"),
        (json!({"previous_response_id": "resp_none"}), "previous_response_id"),
        (json!({"store": "yes"}), "store"),
        (json!({"n": 2}), "n"),
        (json!({"max_tool_calls": 0}), "max_tool_calls"),
        (json!({"strict_params": true, "unknown": 1}), "unknown"),
    ] {
        let error = server.post(PATH, with(ask("x"), fields.clone())).await.error(400);
        assert_eq!(error["param"], param, "{fields}: {error}");
        assert!(
            error["message"].as_str().unwrap().contains(param.split('.').next().unwrap())
                || error["code"].is_string(),
            "{error}"
        );
    }
    let ignored = json!({"unknown": 1, "text": {"verbosity": "low"}, "reasoning": {"effort": "low"},
        "max_tool_calls": 3, "context_management": [{"type": "x"}]});
    let answer = server.post(PATH, with(ask("x"), ignored)).await;
    assert_eq!(
        answer.header("x-ignored-params"),
        Some("unknown,context_management,text.verbosity,max_tool_calls,reasoning")
    );
    answer.ok();
}

/// The last event of a response that failed, after checking what comes before it.
#[track_caller]
fn failed(answer: &Answer) -> Value {
    let events = answer.events();
    let (last, before) = events.split_last().unwrap();
    assert_eq!(last["type"], "response.failed", "{last}");
    let response = &last["response"];
    assert_eq!(response["status"], "failed");
    assert_eq!(response["error"]["code"], "server_error");
    assert!(response["error"]["message"].is_string());
    assert_eq!(response["incomplete_details"], Value::Null);
    assert!(response["completed_at"].is_null());
    assert_eq!(fold(&events), response["output"]);
    let is_end = |event: &Value| {
        let name = event["type"].as_str().unwrap();
        ["response.completed", "response.incomplete", "response.failed", "error"].contains(&name)
    };
    assert!(!before.iter().any(is_end));
    response.clone()
}

#[tokio::test]
async fn a_stream_that_fails_midway_says_so() {
    let server = FakeServer::start();
    let half = r#"Well.<tool_call>{"name": "add", "arguments": {"a": "#;
    for fault in ["then:nan;", "then:error;"] {
        for (text, kinds) in [("hello", vec!["message"]), (half, vec!["message", "function_call"])]
        {
            let input = format!("say:{text};{fault}");
            let body = json!({"model": MODEL, "input": input, "stream": true, "tools": tools()});
            let response = failed(&server.post(PATH, body).await);
            let output = response["output"].as_array().unwrap();
            let found: Vec<&str> =
                output.iter().map(|item| item["type"].as_str().unwrap()).collect();
            assert_eq!(found, kinds);
            // The last item is what was cut; those before it are whole.
            assert_eq!(output.last().unwrap()["status"], "incomplete");
            assert!(output.len() == 1 || output[0]["status"] == "completed");
            let path = format!("{PATH}/{}", response["id"].as_str().unwrap());
            assert_eq!(server.get(&path).await.ok(), response);
        }
        // Without a stream there is a status to say it with, and nothing is stored.
        let body = json!({"model": MODEL, "input": format!("say:hello;{fault}")});
        assert_eq!(server.post(PATH, body).await.error(500)["code"], "engine_failed");
    }
    let body = json!({"model": MODEL, "input": "say:;then:nan;", "stream": true});
    server.post(PATH, body).await.error(500);
    server.post(PATH, ask("x")).await.ok();
}

#[tokio::test]
async fn a_thought_that_fails_midway_is_an_incomplete_item() {
    let server = thinking_server();
    let body = json!({"model": MODEL, "input": "say:<think>hm;then:nan;", "stream": true});
    let response = failed(&server.post(PATH, body).await);
    assert_eq!(response["output"][0]["type"], "reasoning");
    assert_eq!(response["output"][0]["status"], "incomplete");
}

#[tokio::test]
async fn a_stream_that_the_server_cuts_says_so() {
    let server = FakeServer::with(&config(), HttpLimits::default());
    let abort = async {
        server.wait_until_running(1).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.state.engine.abort_all();
    };
    let body = json!({"model": MODEL, "input": "Go on.", "stream": true});
    let (answer, ()) = tokio::join!(server.post(PATH, body), abort);
    failed(&answer);
}

#[tokio::test]
async fn nothing_is_made_in_the_background() {
    let server = FakeServer::start();
    let body = with(ask("x"), json!({"background": true}));
    let error = server.post(PATH, body).await.error(400);
    assert_eq!(
        (&error["param"], &error["type"]),
        (&json!("background"), &json!("invalid_request_error"))
    );
    let response = server.post(PATH, with(ask("x"), json!({"background": false}))).await.ok();
    assert_eq!(response["background"], false);
    let path = format!("{PATH}/{}/cancel", response["id"].as_str().unwrap());
    // Official clients send no body, and no content type.
    let request = Request::post(&path).body(Body::empty()).unwrap();
    assert_eq!(server.send(request).await.status(), 400);
    let error = server.post(&path, json!({})).await.error(400);
    assert_eq!(
        (&error["param"], &error["type"]),
        (&json!("background"), &json!("invalid_request_error"))
    );
    server.get(&path).await.error(405);
    server.post(&format!("{PATH}/%ff/cancel"), json!({})).await.error(404);
}
