//! `/v1/chat/completions`: shapes of whole answers and of streams, and that both say the same.

use proptest::prelude::*;
use serde_json::{Value, json};

use qwen_server::engine::EngineConfig;
use qwen_server::http::HttpLimits;

use crate::api_fake::{Answer, FakeServer, IM_END, IM_START, MODEL, chat, config, with};

const PATH: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_whole_answer_has_the_shape_clients_know() {
    let server = FakeServer::start();
    let answer = server.post(PATH, chat("hello")).await;
    let mut body = answer.ok();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(1_700_000_000 < body["created"].as_u64().unwrap());
    body["id"] = Value::Null;
    body["created"] = Value::Null;
    let prompt_tokens = body["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(
        body,
        json!({
            "id": null, "object": "chat.completion", "created": null, "model": MODEL,
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": "hello", "refusal": null},
                "logprobs": null, "finish_reason": "stop", "stop_reason": null,
            }],
            "usage": {
                "prompt_tokens": prompt_tokens, "completion_tokens": 6,
                "total_tokens": prompt_tokens + 6, "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        })
    );
    assert!(answer.header("openai-processing-ms").unwrap().parse::<u64>().is_ok());
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("x-ignored-params"), None);
}

#[tokio::test]
async fn a_stream_is_framed_byte_by_byte_as_clients_expect() {
    let server = FakeServer::start();
    let body = with(chat("hi"), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let answer = server.post(PATH, body).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    assert_eq!(answer.header("cache-control"), Some("no-cache"));
    assert_eq!(answer.header("x-accel-buffering"), Some("no"));
    let first = &answer.chunks()[0];
    let head = format!(
        concat!(
            r#"data: {{"id":{},"object":"chat.completion.chunk","created":{},"#,
            r#""model":"fake-model","choices":["#
        ),
        first["id"], first["created"]
    );
    let chunk = |delta: &str, reason: &str| {
        let choice =
            format!(r#"{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}"#);
        format!("{head}{choice}],\"usage\":null}}\n\n")
    };
    let usage = concat!(
        r#"{"prompt_tokens":26,"completion_tokens":3,"total_tokens":29,"#,
        r#""prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}}"#
    );
    let expected = [
        chunk(r#"{"role":"assistant","content":""}"#, "null"),
        chunk(r#"{"content":"h"}"#, "null"),
        chunk(r#"{"content":"i"}"#, "null"),
        chunk("{}", "\"stop\""),
        format!("{head}],\"usage\":{usage}}}\n\n"),
        "data: [DONE]\n\n".to_owned(),
    ];
    assert_eq!(answer.text, expected.concat());
}

#[tokio::test]
async fn without_include_usage_no_chunk_mentions_it() {
    let server = FakeServer::start();
    let answer = server.post(PATH, with(chat("hi"), json!({"stream": true}))).await;
    assert!(!answer.text.contains("usage"));
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = with(chat("hi"), json!({"stream": true, "stream_options": options}));
    let counts: Vec<u64> = server
        .post(PATH, body)
        .await
        .chunks()
        .iter()
        .map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(counts, [0, 1, 2, 3, 3]);
}

#[tokio::test]
async fn no_chunk_carries_half_a_character() {
    let server = FakeServer::start();
    let answer = server.post(PATH, with(chat("é你🦀"), json!({"stream": true}))).await;
    let contents: Vec<Value> = answer
        .chunks()
        .iter()
        .map(|chunk| chunk["choices"][0]["delta"]["content"].clone())
        .collect();
    assert_eq!(contents, [json!(""), json!("é"), json!("你"), json!("🦀"), Value::Null]);
}

#[tokio::test]
async fn a_stop_string_is_never_shown_and_frees_the_sequence() {
    let server = FakeServer::start();
    let body = with(chat("one STOP two"), json!({"stop": ["nothing", "STOP"]}));
    let whole = server.post(PATH, body.clone()).await.ok();
    assert_eq!(whole["choices"][0]["message"]["content"], "one ");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert_eq!(whole["choices"][0]["stop_reason"], "STOP");
    let streamed = server.post(PATH, with(body.clone(), json!({"stream": true}))).await;
    let pieces: Vec<String> = streamed
        .chunks()
        .iter()
        .filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned()))
        .collect();
    assert_eq!(pieces.concat(), "one ");
    let included = with(body, json!({"include_stop_str_in_output": true}));
    let whole = server.post(PATH, included).await.ok();
    assert_eq!(whole["choices"][0]["message"]["content"], "one STOP");
    server.wait_until_idle().await;
}

#[tokio::test]
async fn text_held_back_as_a_possible_stop_string_comes_at_the_end() {
    let server = FakeServer::start();
    let answer = server.post(PATH, with(chat("one ST"), json!({"stop": "STOP"}))).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "one ST");
    assert_eq!(answer["choices"][0]["stop_reason"], Value::Null);
}

#[tokio::test]
async fn stop_tokens_end_a_choice_without_their_text() {
    let server = FakeServer::start();
    let body = with(chat("abc"), json!({"stop_token_ids": [98]}));
    let choice = server.post(PATH, body).await.ok()["choices"][0].clone();
    assert_eq!(choice["message"]["content"], "a");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["stop_reason"], 98);
    let body = with(chat("ab"), json!({"ignore_eos": true, "max_tokens": 5}));
    let choice = server.post(PATH, body).await.ok()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "length");
    let body = with(chat("ab"), json!({"min_tokens": 5, "max_tokens": 20}));
    let body = server.post(PATH, body).await.ok();
    assert_eq!(body["choices"][0]["message"]["content"], "abxxx");
}

#[tokio::test]
async fn max_completion_tokens_wins_and_the_default_is_what_is_left() {
    let server = FakeServer::start();
    let body = with(chat("abcdefgh"), json!({"max_tokens": 2, "max_completion_tokens": 3}));
    let choice = server.post(PATH, body).await.ok()["choices"][0].clone();
    assert_eq!(choice["message"]["content"], "abc");
    assert_eq!(choice["finish_reason"], "length");
    let endless = json!({"model": MODEL, "messages": [{"role": "user", "content": "go"}]});
    let body = server.post(PATH, endless).await.ok();
    assert_eq!(body["usage"]["total_tokens"], 512);
    assert_eq!(body["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn choices_are_told_apart_by_index() {
    let server = FakeServer::start();
    let go = json!({"model": MODEL, "messages": [{"role": "user", "content": "go"}],
                    "n": 3, "max_tokens": 3});
    let whole = server.post(PATH, go.clone()).await.ok();
    let texts: Vec<_> = whole["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["message"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["abc", "bcd", "cde"]);
    assert_eq!(whole["usage"]["completion_tokens"], 9);
    let chunks = server.post(PATH, with(go, json!({"stream": true}))).await.chunks();
    let roles = chunks.iter().filter(|chunk| chunk["choices"][0]["delta"]["role"] == "assistant");
    assert_eq!(roles.count(), 3);
    assert_eq!(contents_by_index(&chunks, 3), texts);
}

#[tokio::test]
async fn logprobs_come_with_their_tokens() {
    let server = FakeServer::start();
    let body = with(chat("é"), json!({"logprobs": true, "top_logprobs": 2}));
    let whole = server.post(PATH, body.clone()).await.ok();
    let content = whole["choices"][0]["logprobs"]["content"].clone();
    assert_eq!(content.as_array().unwrap().len(), 3);
    assert_eq!(content[0]["bytes"], json!([0xc3]));
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(content[2]["token"], "<|im_end|>");
    let chunks = server.post(PATH, with(body, json!({"stream": true}))).await.chunks();
    let sizes: Vec<_> = chunks
        .iter()
        .map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().map(Vec::len))
        .collect();
    assert_eq!(sizes, [None, Some(2), Some(1)]);
    let body = with(chat("a"), json!({"logprobs": true}));
    let whole = server.post(PATH, body).await.ok();
    assert_eq!(whole["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn token_ids_and_prompt_logprobs_are_returned_when_asked_for() {
    let server = FakeServer::start();
    let body = with(chat("ab"), json!({"return_token_ids": true, "prompt_logprobs": 1}));
    let whole = server.post(PATH, body).await.ok();
    assert_eq!(whole["choices"][0]["token_ids"], json!([97, 98, IM_END]));
    let prompt = whole["prompt_token_ids"].as_array().unwrap();
    assert_eq!(prompt[0], IM_START);
    let logprobs = whole["prompt_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), prompt.len());
    assert_eq!(logprobs[0], Value::Null);
    assert_eq!(logprobs[1], json!({"117": {"logprob": -0.5, "rank": 1, "decoded_token": "u"}}));
    let body = with(chat("ab"), json!({"return_token_ids": true, "stream": true}));
    let chunks = server.post(PATH, body).await.chunks();
    assert_eq!(chunks[0]["prompt_token_ids"], whole["prompt_token_ids"]);
    assert_eq!(chunks[1]["choices"][0]["token_ids"], json!([97]));
    assert_eq!(chunks[3]["choices"][0]["token_ids"], json!([IM_END]));
}

#[tokio::test]
async fn a_repeated_prompt_reports_cached_tokens() {
    let server = FakeServer::start();
    server.post(PATH, chat("again and again")).await.ok();
    let usage = server.post(PATH, chat("again and again")).await.ok()["usage"].clone();
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() % 16, 0);
    assert_ne!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    let salted = with(chat("again and again"), json!({"cache_salt": "mine"}));
    let usage = server.post(PATH, salted).await.ok()["usage"].clone();
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
}

#[tokio::test]
async fn messages_of_every_kind_reach_the_template() {
    let server = FakeServer::start();
    let messages = json!([
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function",
            "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "assistant", "tool_calls": [{"id": "c2", "type": "function",
            "function": {"name": "f", "arguments": "not json"}}]},
    ]);
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {}}});
    let answer =
        server.post("/tokenize", json!({"messages": messages, "tools": [tool]})).await.ok();
    let prompt = server.post("/detokenize", json!({"tokens": answer["tokens"]})).await.ok();
    let prompt = prompt["prompt"].as_str().unwrap();
    let compact: String = prompt.chars().filter(|c| *c != ' ').collect();
    assert!(compact.contains("<|im_start|>system\nbekind<|im_end|>"), "{prompt}");
    assert!(prompt.contains("<|im_start|>user\na\nb<|im_end|>"), "{prompt}");
    assert!(compact.contains(r#""arguments":{"x":1}"#), "{prompt}");
    assert!(compact.contains(r#""arguments":"notjson""#), "{prompt}");
    assert!(prompt.contains("<|im_start|>tool\n42<|im_end|>"), "{prompt}");
    assert!(prompt.ends_with("<|im_start|>assistant\n"), "{prompt}");
}

#[tokio::test]
async fn a_call_that_must_come_comes() {
    let server = FakeServer::start();
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    for choice in [json!("auto"), json!("none"), Value::Null] {
        let body = with(chat("x"), json!({"tools": tools, "tool_choice": choice}));
        server.post(PATH, body).await.ok();
    }
    let body = with(chat("x"), json!({"functions": [{"name": "f"}], "function_call": "auto"}));
    server.post(PATH, body).await.ok();
    let named = json!({"type": "function", "function": {"name": "f"}});
    let allowed = json!({"type": "allowed_tools",
                         "allowed_tools": {"mode": "required", "tools": [named]}});
    for choice in [json!("required"), named, allowed] {
        let more = json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": false});
        let whole = server.post(PATH, with(chat("no"), more)).await.ok();
        let choice = &whole["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
        assert_eq!(choice["message"]["tool_calls"][0]["function"]["name"], "f");
        let arguments = &choice["message"]["tool_calls"][0]["function"]["arguments"];
        let arguments: Value = serde_json::from_str(arguments.as_str().unwrap()).unwrap();
        assert_eq!(arguments, json!({}));
    }
}

#[tokio::test]
async fn the_final_message_can_be_continued() {
    let server = FakeServer::start();
    let messages =
        json!([{"role": "user", "content": "say:x;"}, {"role": "assistant", "content": "pre"}]);
    let body =
        json!({"model": MODEL, "messages": messages, "continue_final_message": true, "echo": true});
    let whole = server.post(PATH, body.clone()).await.ok();
    assert_eq!(whole["choices"][0]["message"]["content"], "prex");
    let chunks = server.post(PATH, with(body.clone(), json!({"stream": true}))).await.chunks();
    assert_eq!(contents_by_index(&chunks, 1), ["prex"]);
    let both = with(body, json!({"add_generation_prompt": true}));
    assert_eq!(server.post(PATH, both).await.error(400)["param"], "continue_final_message");
}

#[tokio::test]
async fn what_has_no_effect_is_named_in_a_header() {
    let server = FakeServer::start();
    let more = json!({"user": "u", "reasoning_effort": "low", "novelty": 1, "nothing": null});
    let answer = server.post(PATH, with(chat("a"), more.clone())).await;
    answer.ok();
    assert_eq!(answer.header("x-ignored-params"), Some("reasoning_effort,novelty"));
    let streamed = with(with(chat("a"), more), json!({"stream": true}));
    let answer = server.post(PATH, streamed).await;
    assert_eq!(answer.header("x-ignored-params"), Some("reasoning_effort,novelty"));
}

#[tokio::test]
async fn a_neutral_value_asks_for_nothing() {
    let server = FakeServer::start();
    let more = json!({"guided_json": null, "use_beam_search": false, "documents": [],
                      "structured_outputs": {}, "chat_template": "", "strict_params": true});
    let answer = server.post(PATH, with(chat("a"), more)).await;
    answer.ok();
    assert_eq!(answer.header("x-ignored-params"), None);
}

#[tokio::test]
async fn a_name_too_long_for_the_header_hides_no_other() {
    let server = FakeServer::start();
    let more = json!({"first": 1, "x".repeat(600): 1, "last": 1});
    let answer = server.post(PATH, with(chat("a"), more)).await;
    assert_eq!(answer.header("x-ignored-params"), Some("first,last"));
}

fn contents_by_index(chunks: &[Value], n: usize) -> Vec<String> {
    let mut contents = vec![String::new(); n];
    for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        let content = choice["delta"]["content"].as_str().unwrap_or_default();
        contents[choice["index"].as_u64().unwrap() as usize].push_str(content);
    }
    contents
}

/// The answer that the chunks of a stream add up to.
fn refold(answer: &Answer, n: usize) -> Value {
    let chunks = answer.chunks();
    let mut choices: Vec<Value> = contents_by_index(&chunks, n)
        .into_iter()
        .map(|content| json!({"content": content, "logprobs": [], "token_ids": []}))
        .collect();
    let mut usage = Value::Null;
    for chunk in &chunks {
        for piece in chunk["choices"].as_array().unwrap() {
            let choice = &mut choices[piece["index"].as_u64().unwrap() as usize];
            for (from, to) in [("/logprobs/content", "logprobs"), ("/token_ids", "token_ids")] {
                let items = piece.pointer(from).and_then(Value::as_array).cloned();
                choice[to].as_array_mut().unwrap().extend(items.unwrap_or_default());
            }
            if !piece["finish_reason"].is_null() {
                choice["finish_reason"] = piece["finish_reason"].clone();
                choice["stop_reason"] = piece["stop_reason"].clone();
            }
        }
        usage = chunk["usage"].clone();
    }
    json!({"choices": choices, "usage": usage})
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_chunks_of_a_stream_add_up_to_the_whole_answer(
        text in "[ab<é你🦀 ]{0,12}",
        stop in proptest::collection::vec("[ab<é你 ]{1,3}", 0..3),
        n in 1usize..4,
        max_tokens in 1usize..30,
        include in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let server = FakeServer::start();
            let body = with(chat(&text), json!({
                "stop": stop, "n": n, "max_tokens": max_tokens, "logprobs": true,
                "return_token_ids": true, "include_stop_str_in_output": include,
                // A salt of its own, so that both report the same number of cached tokens.
                "cache_salt": "whole",
            }));
            let whole = server.post(PATH, body.clone()).await.ok();
            let streamed = with(body, json!({
                "stream": true, "stream_options": {"include_usage": true}, "cache_salt": "stream",
            }));
            let folded = refold(&server.post(PATH, streamed).await, n);
            let choices: Vec<Value> = whole["choices"].as_array().unwrap().iter().map(|choice| {
                json!({
                    "content": choice["message"]["content"],
                    "logprobs": choice["logprobs"]["content"],
                    "token_ids": choice["token_ids"],
                    "finish_reason": choice["finish_reason"],
                    "stop_reason": choice["stop_reason"],
                })
            }).collect();
            assert_eq!(folded["choices"], json!(choices));
            for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
                assert_eq!(folded["usage"][key], whole["usage"][key]);
            }
            server.wait_until_idle().await;
        });
    }
}

const WEATHER: &str = r#"{"name": "weather", "arguments": {"city": "Par\"is"}}"#;
const ARGUMENTS: &str = r#"{"city": "Par\"is"}"#;

fn long_server() -> FakeServer {
    let config = EngineConfig { max_model_len: 2048, ..config() };
    FakeServer::with(&config, HttpLimits::default())
}

fn with_tools(said: &str, more: Value) -> Value {
    let parameters = json!({
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    });
    let tool =
        json!({"type": "function", "function": {"name": "weather", "parameters": parameters}});
    with(with(chat(said), json!({"tools": [tool], "max_tokens": 300})), more)
}

#[tokio::test]
async fn a_call_is_answered_as_one_and_streams_to_the_same() {
    let server = long_server();
    for said in [
        format!("Hm. \n<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>"),
        format!("```json\n{WEATHER}\n```"),
    ] {
        let whole = server.post(PATH, with_tools(&said, json!({}))).await.ok();
        let choice = &whole["choices"][0];
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
        assert_eq!(calls[0]["function"], json!({"name": "weather", "arguments": ARGUMENTS}));
        assert_eq!(calls[0]["type"], "function");
        assert!(calls[0]["id"].as_str().unwrap().starts_with("call_"));
        let is_alone = said.starts_with('`');
        let content = if is_alone { Value::Null } else { json!("Hm.") };
        assert_eq!(choice["message"]["content"], content);
        assert_eq!(calls.len(), if is_alone { 1 } else { 2 });

        let body = with_tools(&said, json!({"stream": true}));
        let chunks = server.post(PATH, body).await.chunks();
        let mut streamed: Vec<[String; 3]> = Vec::new();
        for chunk in &chunks {
            for part in chunk["choices"][0]["delta"]["tool_calls"].as_array().into_iter().flatten()
            {
                let arguments = part["function"]["arguments"].as_str().unwrap();
                if let Some(id) = part["id"].as_str() {
                    assert_eq!(arguments, "");
                    let name = part["function"]["name"].as_str().unwrap();
                    streamed.push([id.to_owned(), name.to_owned(), String::new()]);
                }
                streamed[part["index"].as_u64().unwrap() as usize][2].push_str(arguments);
            }
        }
        assert_eq!(streamed.len(), calls.len());
        for [_, name, arguments] in &streamed {
            assert_eq!((name.as_str(), arguments.as_str()), ("weather", ARGUMENTS));
        }
        let last = &chunks.last().unwrap()["choices"][0];
        assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("tool_calls")));
    }
}

#[tokio::test]
async fn what_is_no_call_stays_text() {
    let server = long_server();
    let said = format!("<tool_call>\n{WEATHER}\n</tool_call>");
    for (said, more) in [
        (said.clone(), json!({"tools": null})),
        (said.clone(), json!({"tool_choice": "none"})),
        (said.replace("weather", "other"), json!({})),
        (format!("{WEATHER} it is"), json!({})),
    ] {
        let whole = server.post(PATH, with_tools(&said, more)).await.ok();
        let choice = &whole["choices"][0];
        assert_eq!(choice["message"]["content"], said, "{whole}");
        assert_eq!(choice["message"].get("tool_calls"), None);
        assert_eq!(choice["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn one_call_ends_the_answer_when_calls_may_not_be_parallel() {
    let server = long_server();
    let said = format!("<tool_call>\n{WEATHER}\n</tool_call>").repeat(2);
    let body = with_tools(&said, json!({"parallel_tool_calls": false}));
    let whole = server.post(PATH, body).await.ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 1);
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(whole["usage"]["completion_tokens"], said.len() / 2);
    server.wait_until_idle().await;
}

#[tokio::test]
async fn a_call_that_is_cut_keeps_what_was_said_and_its_length() {
    let server = long_server();
    let said = format!("<tool_call>\n{WEATHER}\n</tool_call>");
    let body = with_tools(&said, json!({"max_tokens": 55}));
    let whole = server.post(PATH, body).await.ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "length", "{whole}");
    let arguments = choice["message"]["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
    assert!(ARGUMENTS.starts_with(arguments) && !arguments.is_empty(), "{arguments}");
}

#[tokio::test]
async fn functions_are_answered_as_functions() {
    let server = long_server();
    let said = format!("<tool_call>\n{WEATHER}\n</tool_call>");
    let body = with(chat(&said), json!({"functions": [{"name": "weather"}], "max_tokens": 300}));
    let whole = server.post(PATH, body.clone()).await.ok();
    let choice = &whole["choices"][0];
    let call = json!({"name": "weather", "arguments": ARGUMENTS});
    assert_eq!(choice["message"]["function_call"], call);
    assert_eq!(choice["message"].get("tool_calls"), None);
    assert_eq!(choice["finish_reason"], "function_call");
    let chunks = server.post(PATH, with(body, json!({"stream": true}))).await.chunks();
    let parts = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]["function_call"]);
    let parts: Vec<&Value> = parts.filter(|part| !part.is_null()).collect();
    assert_eq!(parts[0], &json!({"name": "weather", "arguments": ""}));
    let arguments: String = parts.iter().map(|part| part["arguments"].as_str().unwrap()).collect();
    assert_eq!(arguments, ARGUMENTS);
}

#[tokio::test]
async fn thinking_is_ignored_aloud_by_a_model_that_does_not_think() {
    let server = long_server();
    let body = with(chat("<think>x</think>"), json!({"enable_thinking": true, "max_tokens": 99}));
    let answer = server.post(PATH, body.clone()).await;
    assert_eq!(answer.header("x-ignored-params"), Some("enable_thinking"));
    let whole = answer.ok();
    assert_eq!(whole["choices"][0]["message"]["content"], "<think>x</think>");
    assert_eq!(whole["usage"]["completion_tokens_details"]["reasoning_tokens"], 0);
    let strict = with(body, json!({"strict_params": true}));
    assert_eq!(server.post(PATH, strict).await.error(400)["param"], "enable_thinking");
}
