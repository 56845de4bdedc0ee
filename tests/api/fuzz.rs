//! Whatever comes as a body is answered with a 4xx in OpenAI's shape or a proper success, never
//! with a 5xx, and the server goes on.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::api_fake::{FakeServer, MODEL, chat};

const PATHS: [&str; 8] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/fim/completions",
    "/v1/embeddings",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/tokenize",
    "/detokenize",
];

const NATIVE_PATHS: [&str; 3] = [
    "/api/v1/services/aigc/text-generation/generation",
    "/api/v1/services/embeddings/text-embedding/text-embedding",
    "/api/v1/tokenizer",
];

const FIELDS: [&str; 40] = [
    "input",
    "encoding_format",
    "dimensions",
    "priority",
    "service_tier",
    "prompt_cache_options",
    "model",
    "messages",
    "prompt",
    "tokens",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "best_of",
    "stop",
    "stop_token_ids",
    "seed",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "logit_bias",
    "stream",
    "stream_options",
    "tools",
    "tool_choice",
    "functions",
    "response_format",
    "echo",
    "suffix",
    "min_tokens",
    "ignore_eos",
    "cache_salt",
    "chat_template_kwargs",
    "continue_final_message",
    "repetition_penalty",
    "return_token_ids",
];

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-3i64..300).prop_map(Value::from),
        "\\PC{0,20}".prop_map(Value::from),
        prop::sample::select(vec![
            "user",
            "system",
            "text",
            "auto",
            "function",
            "<|im_end|>",
            MODEL
        ])
        .prop_map(Value::from),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    leaf().prop_recursive(4, 24, 5, |inner| {
        let keys = prop::sample::select(vec![
            "role",
            "content",
            "type",
            "text",
            "function",
            "name",
            "arguments",
            "tool_calls",
            "cache_control",
            "prompt_cache_breakpoint",
            "ttl",
            "mode",
            "id",
            "include_usage",
            "42",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((keys, inner), 0..5).prop_map(|entries| {
                let entries = entries.into_iter().map(|(key, value)| (key.to_owned(), value));
                Value::from(entries.collect::<Map<_, _>>())
            }),
        ]
    })
}

/// A body with some fields of the right kind, so that it gets past the first checks.
fn body() -> impl Strategy<Value = Value> {
    let fields = prop::collection::vec((prop::sample::select(FIELDS.to_vec()), value()), 1..6);
    (fields, any::<[bool; 3]>()).prop_map(|(fields, [model, messages, prompt])| {
        let mut body = json!({"max_tokens": 3});
        for (name, value) in fields {
            body[name] = value;
        }
        if model {
            body["model"] = MODEL.into();
        }
        if messages {
            body["messages"] = chat("hi")["messages"].clone();
        }
        if prompt {
            body["prompt"] = "hi".into();
        }
        body
    })
}

/// The same as the body, the input and the parameters of a native request.
async fn check_native(server: &FakeServer, body: &[u8]) {
    let mut requests = vec![body.to_vec()];
    if let Ok(value) = serde_json::from_slice::<Value>(body) {
        let prompt = json!({"prompt": "say:hi;"});
        let wrapped = [
            json!({"model": MODEL, "input": value, "parameters": {"max_tokens": 3}}),
            json!({"model": MODEL, "input": prompt, "parameters": value}),
        ];
        requests.extend(wrapped.map(|request| request.to_string().into_bytes()));
    }
    for path in NATIVE_PATHS {
        for request in &requests {
            let answer = server.post_text(path, request.clone()).await;
            if answer.status != 200 {
                assert!(answer.status.is_client_error(), "{}: {request:?}", answer.text);
                let body = answer.json();
                assert!(["code", "message", "request_id"].iter().all(|key| body[key].is_string()));
            }
        }
    }
}

fn check(bodies: &[Vec<u8>]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let server = FakeServer::start();
        for body in bodies {
            for path in PATHS {
                let answer = server.post_text(path, body.clone()).await;
                if answer.status != 200 {
                    assert!(answer.status.is_client_error(), "{}: {body:?}", answer.text);
                    answer.error(answer.status.as_u16());
                }
            }
        }
        for body in bodies {
            check_native(&server, body).await;
        }
        let answer = server.post(PATHS[0], chat("still here")).await.ok();
        assert_eq!(answer["choices"][0]["message"]["content"], "still here");
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn garbage_is_refused(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..4096), 8)
    ) {
        check(&bodies);
    }

    #[test]
    fn wrong_types_and_huge_numbers_are_refused(bodies in prop::collection::vec(body(), 32)) {
        let bodies = bodies.iter().map(|body| body.to_string().into_bytes());
        let bodies: Vec<Vec<u8>> = bodies.collect();
        check(&bodies);
    }

    #[test]
    fn valid_requests_with_bytes_changed_do_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 32)
    ) {
        let valid = chat("hi").to_string().into_bytes();
        let bodies: Vec<Vec<u8>> = changes.iter().map(|(index, byte)| {
            let mut body = valid.clone();
            body[index.index(valid.len())] = *byte;
            body
        }).collect();
        check(&bodies);
    }
}

#[test]
fn deep_nesting_is_refused() {
    let nest = |open: &str, close: &str, depth: usize| {
        format!("{{\"messages\":{}{}}}", open.repeat(depth), close.repeat(depth)).into_bytes()
    };
    let bodies: Vec<Vec<u8>> = [100, 126, 127, 128, 1000, 100_000]
        .into_iter()
        .flat_map(|depth| {
            [nest("[", "]", depth), nest("[", "", depth), nest("{\"a\":", "}", depth)]
        })
        .collect();
    check(&bodies);
}

#[test]
fn deep_values_that_are_passed_on_do_no_harm() {
    let deep = format!("{}1{}", "[".repeat(120), "]".repeat(120));
    let deep: Value = serde_json::from_str(&deep).unwrap();
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": deep}});
    let call = json!({"function": {"name": "f", "arguments": deep}});
    let bodies = [
        json!({"tools": [tool], "model": MODEL, "messages": chat("x")["messages"]}),
        json!({"chat_template_kwargs": {"x": deep}, "messages": chat("x")["messages"]}),
        json!({"messages": [{"role": "assistant", "tool_calls": [call]}]}),
    ];
    check(&bodies.map(|body| body.to_string().into_bytes()));
}
