//! Some two hundred malformed requests: each is refused and the answer names the field.

use serde_json::{Value, json};

use crate::api_fake::{FakeServer, MODEL, with};

/// A path, a good request for it, and the values that its fields must not have.
type Endpoint = (&'static str, Value, Vec<(&'static str, Vec<Value>)>);

/// Wrong values of the fields that all generating endpoints share.
fn shared() -> Vec<(&'static str, Vec<Value>)> {
    vec![
        ("model", vec![json!(1), json!(["x"]), json!(null)]),
        ("n", vec![json!(0), json!(-1), json!(1.5), json!("1"), json!(1000)]),
        ("best_of", vec![json!(0), json!(99), json!("x")]),
        ("temperature", vec![json!(-0.1), json!(2.1), json!("warm"), json!([0])]),
        ("top_p", vec![json!(0), json!(1.1), json!("x")]),
        ("top_k", vec![json!(-2), json!(0.5), json!({})]),
        ("min_p", vec![json!(-0.1), json!(1.1), json!("x")]),
        ("repetition_penalty", vec![json!(0), json!(2.5), json!("x")]),
        ("presence_penalty", vec![json!(-2.1), json!(2.1), json!(true)]),
        ("frequency_penalty", vec![json!(-2.1), json!(2.1), json!("x")]),
        ("logit_bias", vec![json!([1]), json!({"a": 1}), json!({"1": 101}), json!({"1": "x"})]),
        ("seed", vec![json!("x"), json!(0.5)]),
        ("stop", vec![json!(1), json!([1]), json!(""), json!(["a", ""])]),
        ("stop_token_ids", vec![json!([-1]), json!([9999]), json!("x"), json!(["x"])]),
        ("include_stop_str_in_output", vec![json!(1)]),
        ("ignore_eos", vec![json!("no")]),
        ("min_tokens", vec![json!(-1), json!("x")]),
        ("skip_special_tokens", vec![json!("x")]),
        ("prompt_logprobs", vec![json!(-1), json!(21), json!("x")]),
        ("return_token_ids", vec![json!(3)]),
        ("cache_salt", vec![json!(""), json!(1)]),
        ("response_format", vec![json!("json"), json!({}), json!({"type": "xml"})]),
        ("guided_regex", vec![json!("("), json!(1)]),
        ("guided_choice", vec![json!([]), json!("x"), json!([1])]),
        ("guided_grammar", vec![json!(1), json!("start: nothing")]),
        ("priority", vec![json!("x"), json!(0.5)]),
        ("service_tier", vec![json!("gold"), json!(1)]),
        ("stream", vec![json!("x"), json!(1)]),
        ("stream_options", vec![json!({}), json!("x")]),
        ("strict_params", vec![json!("x")]),
        ("max_tokens", vec![json!(-1), json!("x"), json!(1.5)]),
    ]
}

fn endpoints() -> Vec<Endpoint> {
    let messages = json!([{"role": "user", "content": "x"}]);
    let chat = vec![
        ("messages", vec![json!(null), json!([]), json!({}), json!([1]), json!([{}])]),
        (
            "messages",
            vec![json!([{"role": "x", "content": "x"}]), json!([{"role": "user", "content": 1}])],
        ),
        ("top_logprobs", vec![json!(-1), json!(21), json!("x")]),
        (
            "tools",
            vec![json!("x"), json!([1]), json!([{"type": "x"}]), json!([{"type": "function"}])],
        ),
        ("tool_choice", vec![json!("x"), json!("required"), json!(1)]),
        ("thinking_budget", vec![json!(-1), json!("x")]),
        ("reasoning_effort", vec![json!("x"), json!(1)]),
    ];
    let inputs = vec![json!(null), json!(""), json!([]), json!([[]]), json!({}), json!([9999])];
    let embedding = vec![
        ("model", vec![json!(1), json!(null)]),
        ("input", inputs),
        ("encoding_format", vec![json!("int8"), json!(1)]),
        ("dimensions", vec![json!(0), json!(7), json!("x")]),
        ("service_tier", vec![json!("gold"), json!(1)]),
        ("strict_params", vec![json!(1)]),
    ];
    let tokenize = vec![
        ("model", vec![json!(1)]),
        ("prompt", vec![json!(1), json!(["x"]), json!({})]),
        ("return_token_strs", vec![json!("x")]),
        ("add_generation_prompt", vec![json!("x")]),
        ("strict_params", vec![json!(1)]),
    ];
    let tokens =
        vec![json!(null), json!("x"), json!([-1]), json!([9999]), json!(["x"]), json!([0.5])];
    let prompt = json!({"model": MODEL, "prompt": "x"});
    let prompts = vec![json!(null), json!(1), json!({}), json!([]), json!([9999]), json!([[]])];
    vec![
        (
            "/v1/chat/completions",
            json!({"model": MODEL, "messages": messages}),
            [shared(), chat].concat(),
        ),
        ("/v1/completions", prompt.clone(), [shared(), vec![("prompt", prompts)]].concat()),
        (
            "/v1/fim/completions",
            prompt,
            [shared(), vec![("prompt", vec![json!(null), json!(1)])]].concat(),
        ),
        ("/v1/embeddings", json!({"model": MODEL, "input": "x"}), embedding),
        ("/tokenize", json!({"prompt": "x"}), tokenize),
        (
            "/detokenize",
            json!({"tokens": [97]}),
            vec![("tokens", tokens), ("model", vec![json!(1)])],
        ),
    ]
}

#[tokio::test]
async fn every_malformed_request_is_refused_by_the_name_of_its_field() {
    let server = FakeServer::start();
    let mut complaints = Vec::new();
    let mut count = 0;
    for (path, good, fields) in endpoints() {
        for (field, values) in fields {
            for value in values {
                count += 1;
                let answer = server.post(path, with(good.clone(), json!({field: value}))).await;
                let param = if answer.status.is_client_error() { answer.json() } else { json!({}) };
                let param = param["error"]["param"].as_str().unwrap_or_default().to_owned();
                if param.split(['.', '[']).next() != Some(field) {
                    complaints.push(format!("{path} {field}={value}: {} {param:?}", answer.status));
                }
            }
        }
    }
    assert!(200 <= count, "{count}");
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
