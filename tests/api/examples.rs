//! Goal: OpenAI's own examples work here. Method: each request is sent as it is published, but for
//! the model and what the fake model is to say, and each answer is compared with the published one
//! by names and types; what OpenAI's description requires must be there.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use qwen_server::http::HttpLimits;
use serde_json::{Value, json};

use crate::api_fake::{FakeServer, MODEL, config};

const EXAMPLES: &str = include_str!("openai_examples.json");

/// What asks for something that a server of text models does not have, and the field that says so.
const REFUSED: [(&str, &str, &str); 5] = [
    ("post /v1/chat/completions", "Image input", "messages[0].content[1]"),
    ("post /v1/responses", "Image input", "input[0].content[1].type"),
    ("post /v1/responses", "File input", "input[0].content[1].type"),
    ("post /v1/responses", "Web search", "tools[0].type"),
    ("post /v1/responses", "File search", "tools[0].type"),
];

/// Fields of the examples that are not required and that answers here do not have: what they tell
/// of is never done, or done by nobody else.
const ABSENT: [&str; 8] = [
    "accepted_prediction_tokens",
    "annotations",
    "audio_tokens",
    "obfuscation",
    "rejected_prediction_tokens",
    "service_tier",
    "shutdown_date",
    "system_fingerprint",
];

struct Spec(Value);

impl Spec {
    fn read() -> Self {
        Self(serde_json::from_str(EXAMPLES).unwrap())
    }

    fn examples(&self) -> &[Value] {
        self.0["examples"].as_array().unwrap()
    }

    /// Checks that all that is required is in `value` and in what it holds.
    fn check_required(&self, route: &str, value: &Value) {
        let places = self.0["required"][route].as_object().unwrap_or_else(|| panic!("{route}"));
        for (place, names) in places {
            for object in at(value, place) {
                check_names(names, object, &format!("{route} {place}"));
            }
        }
        self.check_required_by_type(value);
    }

    /// Items, parts and events are told by their types.
    fn check_required_by_type(&self, value: &Value) {
        let kind = value["type"].as_str().unwrap_or_default();
        // A client's own message is not an output.
        let kind = if value["role"] == "user" { "" } else { kind };
        check_names(&self.0["required_by_type"][kind], value, kind);
        match value {
            Value::Object(members) => {
                for value in members.values() {
                    self.check_required_by_type(value);
                }
            }
            Value::Array(items) => {
                for value in items {
                    self.check_required_by_type(value);
                }
            }
            _ => {}
        }
    }
}

fn check_names(names: &Value, object: &Value, place: &str) {
    for name in names.as_array().into_iter().flatten() {
        let name = name.as_str().unwrap();
        assert!(object.get(name).is_some(), "{place}: no `{name}` in {object}");
    }
}

/// The objects at a place such as `.choices[].message`.
fn at<'a>(value: &'a Value, place: &str) -> Vec<&'a Value> {
    let mut found = vec![value];
    for step in place.split('.').filter(|step| !step.is_empty()) {
        let name = step.trim_end_matches("[]");
        found = found.into_iter().filter_map(|value| value.get(name)).collect();
        if step.ends_with("[]") {
            found = found.into_iter().filter_map(Value::as_array).flatten().collect();
        }
    }
    found.into_iter().filter(|value| value.is_object()).collect()
}

/// Checks that `ours` has the names and types of `example`.
fn check_like(example: &Value, ours: &Value, place: &str) {
    match (example, ours) {
        (Value::Null, _) | (_, Value::Null) => {}
        (Value::Object(example), Value::Object(members)) => {
            for (name, value) in example {
                let place = format!("{place}.{name}");
                match members.get(name) {
                    Some(ours) => check_like(value, ours, &place),
                    None => assert!(ABSENT.contains(&name.as_str()), "{place} is missing"),
                }
            }
        }
        (Value::Array(example), Value::Array(items)) => {
            if let (Some(example), Some(first)) = (example.first(), items.first()) {
                check_like(example, first, &format!("{place}[0]"));
            }
        }
        _ => {
            let kinds = [example, ours].map(std::mem::discriminant);
            assert_eq!(kinds[0], kinds[1], "{place}: {ours} instead of {example}");
        }
    }
}

/// What the fake model is to say so that the answer is like the example's.
fn said(example: &Value) -> String {
    let call = |name: &Value, arguments: &Value| {
        let arguments: Value = serde_json::from_str(arguments.as_str().unwrap()).unwrap();
        let call = json!({"name": name, "arguments": arguments});
        format!("<tool_call>\n{call}\n</tool_call>")
    };
    let response = &example["response"];
    let function = &response["choices"][0]["message"]["tool_calls"][0]["function"];
    let item = &response["output"][0];
    if function.is_object() {
        call(&function["name"], &function["arguments"])
    } else if item["type"] == "function_call" {
        call(&item["name"], &item["arguments"])
    } else {
        "Hello there".to_owned()
    }
}

/// The example's request for this server.
fn request(example: &Value) -> Value {
    let mut body = example["request"].clone();
    body["model"] = MODEL.into();
    let text = format!("say:{};", said(example));
    if let Some(messages) = body["messages"].as_array_mut() {
        let content = &mut messages.last_mut().unwrap()["content"];
        match content.as_array_mut() {
            Some(parts) => parts[0]["text"] = text.into(),
            None => *content = text.into(),
        }
    } else if body["prompt"].is_string() {
        body["prompt"] = text.into();
    } else if body["input"].is_string() {
        body["input"] = text.into();
    }
    body
}

/// The types of events, each once, in order.
fn kinds(events: &[Value]) -> Vec<&str> {
    let mut kinds: Vec<&str> =
        events.iter().map(|event| event["type"].as_str().unwrap_or_default()).collect();
    kinds.dedup();
    kinds
}

async fn send(server: &FakeServer, method: &str, path: &str) -> Value {
    let request = Request::builder().method(&*method.to_uppercase()).uri(path);
    let response = server.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(response.status(), 200, "{method} {path}");
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    serde_json::from_slice(&bytes).unwrap()
}

#[tokio::test]
async fn published_examples_work_or_are_refused_by_name() {
    let server = FakeServer::with(&config(), HttpLimits::default());
    let spec = Spec::read();
    let mut num_refused = 0;
    for example in spec.examples().iter().filter(|example| example["request"].is_object()) {
        let (route, title) = (example["route"].as_str().unwrap(), &example["title"]);
        let path = route.strip_prefix("post ").unwrap();
        let answer = server.post(path, request(example)).await;
        let refused = REFUSED.iter().find(|(known, name, _)| *known == route && *name == title);
        if let Some((_, _, param)) = refused {
            assert_eq!(answer.error(400)["param"], *param, "{title}");
            num_refused += 1;
            continue;
        }
        println!("{route}: {title}");
        let Some(events) = example["events"].as_array() else {
            let ours = answer.ok();
            spec.check_required(route, &ours);
            check_like(&example["response"], &ours, title.as_str().unwrap());
            continue;
        };
        if path == "/v1/responses" {
            let ours = answer.events();
            assert_eq!(kinds(&ours), kinds(events));
            for example in events {
                let like = ours.iter().find(|event| event["type"] == example["type"]).unwrap();
                spec.check_required_by_type(like);
                check_like(example, like, example["type"].as_str().unwrap());
            }
        } else {
            let ours = answer.chunks();
            for chunk in &ours {
                spec.check_required(&format!("chunk of {route}"), chunk);
            }
            for example in [events.first(), events.last()].into_iter().flatten() {
                let is_end = |chunk: &Value| !chunk["choices"][0]["finish_reason"].is_null();
                let like = ours.iter().find(|chunk| is_end(chunk) == is_end(example)).unwrap();
                check_like(example, like, route);
            }
        }
    }
    assert_eq!(num_refused, REFUSED.len());
}

#[tokio::test]
async fn what_is_read_back_is_like_the_published_examples() {
    let server = FakeServer::with(&config(), HttpLimits::default());
    let spec = Spec::read();
    let body = json!({"model": MODEL, "input": "say:Hello there;"});
    let made = server.post("/v1/responses", body).await.ok();
    let mut seen = BTreeSet::new();
    for example in spec.examples().iter().filter(|example| !example["request"].is_object()) {
        let route = example["route"].as_str().unwrap();
        let (method, path) = route.split_once(' ').unwrap();
        if method == "delete" {
            continue;
        }
        let path = path.replace("{model}", MODEL);
        let path = path.replace("{response_id}", made["id"].as_str().unwrap());
        let ours = send(&server, method, &path).await;
        spec.check_required(route, &ours);
        check_like(&example["response"], &ours, route);
        seen.insert(route);
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
    let example = spec
        .examples()
        .iter()
        .find(|example| example["route"].as_str().unwrap().starts_with("delete"));
    let path = format!("/v1/responses/{}", made["id"].as_str().unwrap());
    check_like(&example.unwrap()["response"], &send(&server, "delete", &path).await, "delete");
}
