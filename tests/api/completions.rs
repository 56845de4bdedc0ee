//! `/v1/completions`: every form of prompt, echo, the legacy log-probabilities, and streams.

use std::sync::Arc;

use qwen_server::engine::EngineConfig;
use qwen_server::http::HttpLimits;
use serde_json::{Value, json};

use crate::api_fake::{FIM_PREFIX, FakeServer, IM_END, MODEL, config, with};

const PATH: &str = "/v1/completions";

fn completion(prompt: impl Into<Value>) -> Value {
    json!({"model": MODEL, "prompt": prompt.into()})
}

#[tokio::test]
async fn a_whole_answer_has_the_shape_clients_know() {
    let server = FakeServer::start();
    let mut body = server.post(PATH, completion("say:hello;")).await.ok();
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    body["id"] = Value::Null;
    body["created"] = Value::Null;
    assert_eq!(
        body,
        json!({
            "id": null, "object": "text_completion", "created": null, "model": MODEL,
            "choices": [{"index": 0, "text": "hello", "logprobs": null, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16,
                      "prompt_tokens_details": {"cached_tokens": 0},
                      "completion_tokens_details": {"reasoning_tokens": 0}},
        })
    );
}

#[tokio::test]
async fn sixteen_tokens_is_the_default() {
    let server = FakeServer::start();
    let body = server.post(PATH, completion("go")).await.ok();
    assert_eq!(body["choices"][0]["text"], "abcdefghijklmnop");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn prompts_come_as_text_and_as_tokens_alone_and_in_lists() {
    let server = FakeServer::start();
    let tokens: Vec<u8> = b"say:x;".to_vec();
    for prompt in [json!("say:x;"), json!(["say:x;"]), json!(tokens), json!([tokens])] {
        let body = server.post(PATH, completion(prompt)).await.ok();
        assert_eq!(body["choices"][0]["text"], "x");
    }
    let body = with(completion(json!(["say:one;", "say:two;"])), json!({"n": 2, "best_of": 2}));
    let body = server.post(PATH, body).await.ok();
    let texts: Vec<_> = body["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| (choice["index"].as_u64().unwrap(), choice["text"].as_str().unwrap()))
        .collect();
    assert_eq!(texts, [(0, "one"), (1, "one"), (2, "two"), (3, "two")]);
    assert_eq!(body["usage"]["prompt_tokens"], 16);
}

#[tokio::test]
async fn echo_repeats_the_prompt_with_its_logprobs() {
    let server = FakeServer::start();
    let more = json!({"echo": true, "logprobs": 1, "max_tokens": 2});
    let body = server.post(PATH, with(completion("é:go"), more)).await.ok();
    let choice = &body["choices"][0];
    assert_eq!(choice["text"], "é:goab");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["text_offset"], json!([0, 1, 1, 2, 3, 4, 5]));
    let values = json!([null, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5]);
    assert_eq!(logprobs["token_logprobs"], values);
    assert_eq!(logprobs["tokens"], json!(["\u{fffd}", "\u{fffd}", ":", "g", "o", "a", "b"]));
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][6], json!({"b": -0.5}));
    // A text is scored without generating anything.
    let more = json!({"echo": true, "logprobs": 0, "max_tokens": 0, "n": 2});
    let body = server.post(PATH, with(completion("abc"), more)).await.ok();
    for choice in body["choices"].as_array().unwrap() {
        assert_eq!(choice["text"], "abc");
        assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5, -0.5]));
        assert_eq!(choice["finish_reason"], "length");
    }
}

#[tokio::test]
async fn echoed_logprobs_are_as_many_as_asked_for() {
    let server = FakeServer::start();
    let more = json!({"echo": true, "logprobs": 1, "prompt_logprobs": 5, "max_tokens": 1});
    let body = server.post(PATH, with(completion("go"), more)).await.ok();
    let choice = &body["choices"][0];
    assert_eq!(choice["logprobs"]["top_logprobs"], json!([null, {"o": -0.5}, {"a": -0.5}]));
    assert_eq!(choice["prompt_logprobs"][1].as_object().unwrap().len(), 5);
}

#[tokio::test]
async fn logprobs_that_would_fill_the_memory_are_refused() {
    let config = EngineConfig { max_model_len: 8192, ..config() };
    let server = FakeServer::with(&config, HttpLimits::default());
    // 16 choices of 6000 tokens with 20 + 1 values each are just too many, however they come about.
    let long = "x".repeat(6000);
    let cases = [
        (json!({"prompt": "go", "logprobs": 20, "max_tokens": 6000}), "logprobs"),
        (json!({"prompt": long, "logprobs": 20, "max_tokens": 0, "echo": true}), "logprobs"),
        (json!({"prompt": long, "prompt_logprobs": 20, "max_tokens": 1}), "prompt_logprobs"),
    ];
    for (more, param) in cases {
        let more = with(more, json!({"n": 16}));
        let error = server.post(PATH, with(completion("go"), more)).await.error(400);
        assert_eq!(error["param"], param);
        assert!(error["message"].as_str().unwrap().contains("lower `n`"), "{error}");
    }
}

#[tokio::test]
async fn prompts_draw_differently_unless_a_seed_is_given() {
    let server = FakeServer::start();
    let prompts = completion(json!(["show the seed", "show the seed"]));
    let texts = async |more: Value| {
        let body = server.post(PATH, with(prompts.clone(), more)).await.ok();
        [0, 1].map(|index| body["choices"][index]["text"].as_str().unwrap().to_owned())
    };
    let [first, second] = texts(json!({"max_tokens": 1})).await;
    assert_ne!(first, second);
    let [first, second] = texts(json!({"max_tokens": 1, "seed": 7})).await;
    assert_eq!(first, second);
}

#[tokio::test]
async fn echoed_tokens_become_text() {
    let server = FakeServer::start();
    let more = json!({"echo": true, "max_tokens": 1, "return_token_ids": true});
    let body = server.post(PATH, with(completion(json!([[72, 105]])), more)).await.ok();
    assert_eq!(body["choices"][0]["text"], "Hia");
    assert_eq!(body["choices"][0]["prompt_token_ids"], json!([72, 105]));
    assert_eq!(body["choices"][0]["token_ids"], json!([97]));
}

#[tokio::test]
async fn streams_say_the_same() {
    let server = FakeServer::start();
    let body = with(
        completion(json!(["say:h\u{e9};", "go"])),
        json!({"echo": true, "logprobs": 2, "max_tokens": 4, "return_token_ids": true, "n": 2}),
    );
    let whole = server.post(PATH, body.clone()).await.ok();
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let mut chunks = server.post(PATH, with(body, options)).await.chunks();
    let last = chunks.pop().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let pieces: Vec<&Value> = chunks
            .iter()
            .inspect(|chunk| assert_eq!(chunk["usage"], Value::Null))
            .map(|chunk| &chunk["choices"][0])
            .filter(|piece| piece["index"] == index)
            .collect();
        let text: String = pieces.iter().map(|piece| piece["text"].as_str().unwrap()).collect();
        assert_eq!(choice["text"], text);
        assert_eq!(pieces[0]["prompt_token_ids"], choice["prompt_token_ids"]);
        assert_eq!(pieces.last().unwrap()["finish_reason"], choice["finish_reason"]);
        for path in
            ["/token_ids", "/logprobs/text_offset", "/logprobs/tokens", "/logprobs/top_logprobs"]
        {
            let items = pieces.iter().filter_map(|piece| piece.pointer(path)?.as_array()).flatten();
            assert_eq!(choice.pointer(path).unwrap(), &json!(items.collect::<Vec<_>>()), "{path}");
        }
    }
}

#[tokio::test]
async fn special_tokens_can_be_kept() {
    let server = FakeServer::start();
    let more = json!({"skip_special_tokens": false, "ignore_eos": true, "max_tokens": 3});
    let body = server.post(PATH, with(completion("say:ab;"), more)).await.ok();
    assert_eq!(body["choices"][0]["text"], "ab<|im_end|>");
    let more = json!({"stop_token_ids": [IM_END], "skip_special_tokens": false});
    let body = server.post(PATH, with(completion("say:ab;"), more)).await.ok();
    assert_eq!(body["choices"][0]["text"], "ab");
}

#[tokio::test]
async fn the_best_of_several_are_kept() {
    let server = FakeServer::start();
    let more = json!({"n": 2, "best_of": 5, "max_tokens": 3});
    let body = server.post(PATH, with(completion(json!(["go", "on"])), more)).await.ok();
    let choices = body["choices"].as_array().unwrap();
    // Equally likely candidates keep their order.
    let texts: Vec<_> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["abc", "bcd", "abc", "bcd"]);
    let indices: Vec<_> = choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert!(choices.iter().all(|choice| choice["logprobs"].is_null()), "nobody asked for them");
    assert_eq!(body["usage"]["completion_tokens"], 2 * 5 * 3);
    for more in [json!({"best_of": 2, "stream": true}), json!({"n": 3, "best_of": 2})] {
        let answer = server.post(PATH, with(completion("go"), more)).await;
        assert_eq!(answer.error(400)["param"], "best_of");
    }
}

#[tokio::test]
async fn a_suffix_asks_for_the_middle() {
    let server = FakeServer::start();
    let more = json!({"suffix": "}<|im_end|>", "return_token_ids": true, "max_tokens": 4});
    let body = server.post(PATH, with(completion("{<|im_start|>"), more.clone())).await.ok();
    let ids: Vec<u32> =
        serde_json::from_value(body["choices"][0]["prompt_token_ids"].clone()).unwrap();
    let text = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    // What looks like a special token is the client's text.
    let expected = [
        vec![FIM_PREFIX],
        text("{<|im_start|>"),
        vec![FIM_PREFIX + 1],
        text("}<|im_end|>"),
        vec![FIM_PREFIX + 2],
    ];
    assert_eq!(ids, expected.concat());
    let body = server.post(PATH, with(completion(json!([123])), more.clone())).await.ok();
    assert_eq!(body["choices"][0]["prompt_token_ids"][1], 123);
    let body = server.post(PATH, with(completion(""), more)).await.ok();
    assert_eq!(body["choices"][0]["finish_reason"], "length", "a file's first line can be missing");
    let answer =
        server.post(PATH, with(completion("a"), json!({"suffix": "b", "echo": true}))).await;
    assert_eq!(answer.error(400)["param"], "echo");
    let mut server = FakeServer::start();
    Arc::get_mut(&mut server.state.model).unwrap().fim = None;
    let answer = server.post(PATH, with(completion("a"), json!({"suffix": "b"}))).await;
    assert_eq!(answer.error(400)["param"], "suffix");
}

#[tokio::test]
async fn fim_completions_answer_like_chats() {
    let server = FakeServer::start();
    let ask = json!({"model": MODEL, "prompt": "say:mid;", "suffix": "end", "max_tokens": 20});
    let body = server.post("/v1/fim/completions", ask.clone()).await.ok();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["choices"][0]["message"]["content"], "mid");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let chunks = server
        .post("/v1/fim/completions", with(ask.clone(), json!({"stream": true})))
        .await
        .chunks();
    let text: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, "mid");
    let seeded = json!({"prompt": "show the seed", "random_seed": 3, "max_tokens": 1});
    let body = server.post("/v1/fim/completions", with(ask.clone(), seeded)).await.ok();
    assert_eq!(body["choices"][0]["message"]["content"], "d");
    let plain = json!({"suffix": null, "return_token_ids": true});
    let body = server.post("/v1/fim/completions", with(ask.clone(), plain)).await.ok();
    assert_eq!(body["prompt_token_ids"].as_array().unwrap().len(), 8, "a plain completion");
    let answer = server.post("/v1/fim/completions", with(ask, json!({"prompt": [1]}))).await;
    assert_eq!(answer.error(400)["param"], "prompt");
}

#[tokio::test]
async fn what_is_not_supported_is_refused_by_name() {
    let server = FakeServer::start();
    let cases = [
        ("best_of", json!(0)),
        ("best_of", json!(21)),
        ("logprobs", json!(21)),
        ("logprobs", json!(-1)),
        ("guided_json", json!(3)),
        ("response_format", json!("json_object")),
    ];
    for (param, value) in cases {
        let answer = server.post(PATH, with(completion("a"), json!({param: value}))).await;
        assert_eq!(answer.error(400)["param"], param);
    }
    let answer = server.post(PATH, completion(json!([]))).await;
    assert_eq!(answer.error(400)["param"], "prompt");
    let answer = server.post(PATH, completion(json!([[97], [97, 300]]))).await;
    assert_eq!(answer.error(400)["param"], "prompt[1][1]");
    let answer = server.post(PATH, completion(json!([[97], []]))).await;
    assert_eq!(answer.error(400)["param"], "prompt[1]");
}
