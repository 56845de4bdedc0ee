//! Goal: the description tells the truth. Method: every route answers in every way it can, and
//! each answer is held to the schema given for it; what the schema does not name must not be there.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use qwen_server::chat::model::{Conventions, Reasoning};
use qwen_server::http::HttpLimits;
use qwen_server::ledger::Ledger;
use serde_json::{Map, Value, json};

use crate::adapters;
use crate::api_fake::{FakeServer, MODEL, chat, config, model, with};

const CALL: &str = r#"Well.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>"#;

/// What schemas of the description may say. Another word would go unchecked.
const KEYWORDS: [&str; 19] = [
    "$ref",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "default",
    "description",
    "enum",
    "exclusiveMinimum",
    "items",
    "maxItems",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "oneOf",
    "properties",
    "required",
];

type Checked = Result<(), String>;

struct Description(Value);

/// Whether members that a schema does not name are flaws.
#[derive(Clone, Copy, PartialEq)]
enum Others {
    Allowed,
    Flawed,
}

impl Description {
    fn resolve<'a>(&'a self, value: &'a Value) -> &'a Value {
        match value["$ref"].as_str() {
            Some(name) => self.0.pointer(&name[1..]).unwrap_or_else(|| panic!("no {name}")),
            None => value,
        }
    }

    /// Holds `value` to `schema`.
    fn check(&self, schema: &Value, value: &Value, others: Others) -> Checked {
        let schema = self.resolve(schema);
        let keywords = schema.as_object().ok_or("a schema is an object")?;
        for keyword in keywords.keys() {
            let is_known = keyword == "type" || KEYWORDS.contains(&keyword.as_str());
            assert!(is_known, "check `{keyword}` here, too: {schema}");
        }
        self.check_alternatives(keywords, value, others)?;
        check_scalar(keywords, value)?;
        if let (Some(items), Value::Array(values)) = (keywords.get("items"), value) {
            for (index, value) in values.iter().enumerate() {
                self.check(items, value, others).map_err(|flaw| format!("[{index}]{flaw}"))?;
            }
        }
        let Value::Object(members) = value else { return Ok(()) };
        let required = schema["required"].as_array().into_iter().flatten();
        if let Some(name) =
            required.map(|name| name.as_str().unwrap()).find(|name| !members.contains_key(*name))
        {
            return Err(format!(" lacks `{name}`"));
        }
        let no_properties = Map::new();
        let properties = schema["properties"].as_object().unwrap_or(&no_properties);
        for (name, value) in members {
            let at = |flaw: String| format!(".{name}{flaw}");
            match (properties.get(name), keywords.get("additionalProperties")) {
                (Some(property), _) => self.check(property, value, others).map_err(at)?,
                (None, Some(schema)) if schema.is_object() => {
                    self.check(schema, value, others).map_err(at)?;
                }
                (None, Some(Value::Bool(false))) => return Err(at(" is forbidden".into())),
                (None, None) if !properties.is_empty() && others == Others::Flawed => {
                    return Err(at(" is not described".into()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check_alternatives(
        &self,
        keywords: &Map<String, Value>,
        value: &Value,
        others: Others,
    ) -> Checked {
        let list = |name: &str| keywords.get(name).and_then(Value::as_array);
        for part in list("allOf").into_iter().flatten() {
            // Each names only some of the members.
            self.check(part, value, Others::Allowed)?;
        }
        for name in ["anyOf", "oneOf"] {
            let Some(alternatives) = list(name) else { continue };
            let results: Vec<Checked> =
                alternatives.iter().map(|schema| self.check(schema, value, others)).collect();
            let num_met = results.iter().filter(|result| result.is_ok()).count();
            if num_met == 0 || (name == "oneOf" && num_met != 1) {
                let flaws: Vec<String> = results.into_iter().filter_map(Result::err).collect();
                return Err(format!(" meets {num_met} of {name} ({})", flaws.join(" | ")));
            }
        }
        Ok(())
    }
}

/// What a schema says of a value without looking into it.
fn check_scalar(schema: &Map<String, Value>, value: &Value) -> Checked {
    let types: Vec<&str> = match schema.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(names) => {
            names.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
        }
        None => Vec::new(),
    };
    let is_of = |name: &&str| match *name {
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "null" => value.is_null(),
        other => panic!("`{other}` is no type"),
    };
    let number = |name: &str| schema.get(name).and_then(Value::as_f64);
    let length = match value {
        Value::Array(items) => Some((items.len(), "minItems", "maxItems")),
        Value::String(text) => Some((text.chars().count(), "minLength", "maxLength")),
        _ => None,
    };
    let is_sized = length.is_none_or(|(length, min, max)| {
        number(min).is_none_or(|min| min <= length as f64)
            && number(max).is_none_or(|max| length as f64 <= max)
    });
    let is_in_range = value.as_f64().is_none_or(|value| {
        number("minimum").is_none_or(|min| min <= value)
            && number("maximum").is_none_or(|max| value <= max)
            && number("exclusiveMinimum").is_none_or(|min| min < value)
    });
    let is_sound = (types.is_empty() || types.iter().any(is_of))
        && schema.get("const").is_none_or(|constant| constant == value)
        && schema.get("enum").is_none_or(|all| all.as_array().unwrap().contains(value))
        && is_sized
        && is_in_range;
    if is_sound { Ok(()) } else { Err(format!(" is {value}, which is not {schema:?}")) }
}

/// Answers and what the description says of them.
struct Auditor {
    description: Description,
    seen: BTreeSet<String>,
    /// What the `accept` header says.
    accept: &'static str,
    /// What follows the path.
    query: &'static str,
}

impl Auditor {
    /// Sends a request, which is accepted, and holds it and the answer to the description.
    async fn exchange(
        &mut self,
        server: &FakeServer,
        route: (&str, &str),
        id: &str,
        body: Value,
    ) -> Value {
        let requested = &self.description.0["paths"][route.1][route.0]["requestBody"];
        let requested = &requested["content"]["application/json"]["schema"];
        if requested.is_object() {
            let checked = self.description.check(requested, &body, Others::Allowed);
            checked.unwrap_or_else(|flaw| panic!("{route:?}: the request{flaw}: {body}"));
        }
        let (status, answer) = self.answer(server, route, id, body).await;
        assert_eq!(status, 200, "{route:?}: {answer}");
        answer
    }

    /// Sends a request and holds the answer to the description.
    async fn answer(
        &mut self,
        server: &FakeServer,
        (method, path): (&str, &str),
        id: &str,
        body: Value,
    ) -> (u16, Value) {
        let request = Request::builder()
            .method(&*method.to_uppercase())
            .uri(path.replace("{id}", id) + self.query);
        let request =
            request.header("content-type", "application/json").header("accept", self.accept);
        let sent = if method == "post" { body.to_string() } else { String::new() };
        let response = server.send(request.body(Body::from(sent)).unwrap()).await;
        let status = response.status().as_u16();
        let media = response.headers()["content-type"].to_str().unwrap();
        let media = media.split(';').next().unwrap().to_owned();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let operation = &self.description.0["paths"][path][method];
        assert!(operation.is_object(), "{method} {path} is not described");
        let class = format!("{}XX", status / 100);
        let classes = [status.to_string(), class];
        let class = classes.iter().find(|class| operation["responses"][class.as_str()].is_object());
        let class = class.unwrap_or_else(|| panic!("{method} {path} answers {status}: {text}"));
        let described = self.description.resolve(&operation["responses"][class.as_str()]);
        let schema = &described["content"][&media]["schema"];
        assert!(schema.is_object(), "{method} {path} answers {status} as {media}");
        let values: Vec<Value> = match media.as_str() {
            "application/json" => vec![serde_json::from_str(&text).unwrap()],
            "text/event-stream" => {
                let lines =
                    text.lines().filter_map(|line| line.strip_prefix("data:")).map(str::trim_start);
                lines
                    .filter(|data| *data != "[DONE]")
                    .map(|data| serde_json::from_str(data).unwrap())
                    .collect()
            }
            _ => vec![text.clone().into()],
        };
        for value in &values {
            let checked = self.description.check(schema, value, Others::Flawed);
            checked.unwrap_or_else(|flaw| panic!("{method} {path} {status}:{flaw}: {value}"));
        }
        self.seen.insert(format!("{method} {path} {class} {media}"));
        (status, values.last().cloned().unwrap_or_default())
    }

    /// Every kind of answer that is described, but those that only a broken server gives.
    fn described(&self) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        for (path, operations) in self.description.0["paths"].as_object().unwrap() {
            let is_operation = |(key, _): &(&String, &Value)| *key != "servers";
            for (method, operation) in operations.as_object().unwrap().iter().filter(is_operation) {
                for (class, response) in operation["responses"].as_object().unwrap() {
                    let content = &self.description.resolve(response)["content"];
                    for media in content.as_object().unwrap().keys() {
                        all.insert(format!("{method} {path} {class} {media}"));
                    }
                }
            }
        }
        all.retain(|line| !line.contains("5XX") && !line.contains("503"));
        all
    }
}

fn parameters() -> Value {
    json!({"type": "object", "properties": {"a": {"type": "integer"}}})
}

fn chats() -> Vec<Value> {
    let function = json!({"name": "add", "parameters": parameters()});
    let tool =
        json!({"type": "function", "function": function, "cache_control": {"type": "ephemeral"}});
    let everything = json!({
        "n": 2, "logprobs": true, "top_logprobs": 2, "return_token_ids": true, "seed": 1,
        "service_tier": "flex", "stop": ["never"], "max_completion_tokens": 20,
    });
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}});
    let history = json!({"messages": [
        {"role": "user", "content": "say:x;"},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "1", "cache_control": {"type": "ephemeral"}}]},
    ]});
    vec![
        chat("hello"),
        with(chat("hello"), everything),
        with(chat(CALL), json!({"tools": [tool]})),
        with(chat(CALL), json!({"functions": [function]})),
        with(chat("{}"), json!({"response_format": format, "max_tokens": 8})),
        with(chat("x"), history),
        with(chat("x"), json!({"max_tokens": 1, "stop": "x"})),
    ]
}

async fn generating(auditor: &mut Auditor, server: &FakeServer, thinking: &FakeServer) {
    let stream = json!({"stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let route = ("post", "/v1/chat/completions");
    for body in chats() {
        for server in [server, thinking] {
            auditor.exchange(server, route, "", body.clone()).await;
            auditor.exchange(server, route, "", with(body.clone(), stream.clone())).await;
        }
        auditor.exchange(server, ("post", "/v1/chat/completions/render"), "", body).await;
    }
    auditor.exchange(server, route, "", with(chat("x"), json!({"prompt_logprobs": 1}))).await;
    auditor.exchange(thinking, route, "", chat("<think>hm</think>hello")).await;
    let failing =
        json!({"messages": [{"role": "user", "content": "say:abc;then:nan;"}], "stream": true});
    let last = auditor.exchange(server, route, "", with(chat("x"), failing)).await;
    assert!(last["error"].is_object(), "{last}");

    let complete = json!({"model": MODEL, "prompt": ["say:ab;", "say:cd;"], "max_tokens": 5});
    let more = json!({"logprobs": 2, "echo": true, "n": 2, "return_token_ids": true});
    let fill_in = json!({"model": MODEL, "prompt": "a", "suffix": "b", "max_tokens": 3});
    for path in ["/v1/completions", "/v1/completions/render"] {
        auditor.exchange(server, ("post", path), "", complete.clone()).await;
        auditor.exchange(server, ("post", path), "", with(complete.clone(), more.clone())).await;
    }
    let route = ("post", "/v1/completions");
    auditor.exchange(server, route, "", with(with(complete.clone(), more), stream.clone())).await;
    auditor.exchange(server, route, "", with(complete, json!({"prompt_logprobs": 1}))).await;
    auditor.exchange(server, ("post", "/v1/fim/completions"), "", fill_in.clone()).await;
    auditor.exchange(server, ("post", "/v1/fim/completions"), "", with(fill_in, stream)).await;
    for format in ["float", "base64"] {
        let body = json!({"model": MODEL, "input": ["a", "b"], "encoding_format": format});
        auditor.exchange(server, ("post", "/v1/embeddings"), "", body).await;
    }
}

async fn responding(auditor: &mut Auditor, server: &FakeServer, thinking: &FakeServer) {
    let ask = |text: &str| json!({"model": MODEL, "input": format!("say:{text};")});
    let tool = json!({"type": "function", "name": "add", "parameters": parameters()});
    let route = ("post", "/v1/responses");
    let mut id = Value::Null;
    for body in [
        ask("hello"),
        with(
            ask("hello"),
            json!({"top_logprobs": 2, "instructions": "i", "metadata": {"a": "b"}, "user": "u",
            "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}, "max_tool_calls": 3}),
        ),
        with(ask("hello"), json!({"max_output_tokens": 2})),
        with(ask(CALL), json!({"tools": [tool], "tool_choice": "auto", "prompt_cache_key": "k"})),
        with(
            ask("x"),
            json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": "say:x;"}]}]}),
        ),
    ] {
        id = auditor.exchange(server, route, "", body.clone()).await["id"].clone();
        auditor.exchange(server, route, "", with(body.clone(), json!({"stream": true}))).await;
        auditor.exchange(server, ("post", "/v1/responses/input_tokens"), "", body).await;
    }
    let thought = ask("<think>hm</think>hello");
    auditor.exchange(thinking, route, "", thought.clone()).await;
    auditor.exchange(thinking, route, "", with(thought, json!({"stream": true}))).await;
    for fault in ["then:nan;", "then:error;"] {
        let failing = json!({"model": MODEL, "input": format!("say:abc;{fault}"), "stream": true});
        let last = auditor.exchange(server, route, "", failing).await;
        assert_eq!(last["type"], "response.failed", "{fault} {last}");
    }
    let id = id.as_str().unwrap();
    auditor.exchange(server, ("get", "/v1/responses/{id}"), id, Value::Null).await;
    auditor.exchange(server, ("get", "/v1/responses/{id}/input_items"), id, Value::Null).await;
    auditor.exchange(server, ("delete", "/v1/responses/{id}"), id, Value::Null).await;
}

async fn messaging(auditor: &mut Auditor, server: &FakeServer, thinking: &FakeServer) {
    let ask = |text: &str| with(chat(text), json!({"max_tokens": 80}));
    let tool = json!({"name": "add", "input_schema": parameters(), "cache_control": {"type": "ephemeral"}});
    let route = ("post", "/v1/messages");
    for (server, body) in [
        (server, ask("hello")),
        (server, with(ask(CALL), json!({"tools": [tool]}))),
        (server, with(ask("hello"), json!({"max_tokens": 2}))),
        (server, with(ask("hello"), json!({"stop_sequences": ["l"], "system": "s"}))),
        (thinking, ask("<think>hm</think>hello")),
    ] {
        auditor.exchange(server, route, "", body.clone()).await;
        auditor.exchange(server, route, "", with(body.clone(), json!({"stream": true}))).await;
        auditor.exchange(server, ("post", "/v1/messages/count_tokens"), "", body).await;
    }
    let failing =
        json!({"messages": [{"role": "user", "content": "say:abc;then:nan;"}], "stream": true});
    let last = auditor.exchange(server, route, "", with(ask("x"), failing)).await;
    assert_eq!(last["type"], "error");
}

/// DashScope's own endpoints.
async fn native(auditor: &mut Auditor, server: &FakeServer, thinking: &FakeServer) {
    let say =
        |text: &str| json!({"messages": [{"role": "user", "content": format!("say:{text};")}]});
    let ask = |input: Value, parameters: Value| json!({"model": MODEL, "input": input, "parameters": parameters});
    let tools =
        json!([{"type": "function", "function": {"name": "add", "parameters": parameters()}}]);
    let generate = "/api/v1/services/aigc/text-generation/generation";
    let multimodal = "/api/v1/services/aigc/multimodal-generation/generation";
    for accept in ["*/*", "text/event-stream"] {
        auditor.accept = accept;
        for (server, path, input, parameters) in [
            (server, generate, say("hello"), json!({"result_format": "message", "logprobs": true})),
            (server, generate, json!({"prompt": "say:hello;"}), json!({"result_format": "text"})),
            (server, generate, say(CALL), json!({"tools": tools, "result_format": "message"})),
            (thinking, generate, say("<think>hm</think>hello"), json!({})),
            (server, multimodal, say("hello"), json!({})),
        ] {
            auditor.exchange(server, ("post", path), "", ask(input, parameters)).await;
        }
    }
    auditor.accept = "*/*";
    let texts = json!({"model": MODEL, "input": {"texts": ["a", "b"]}});
    let embed = "/api/v1/services/embeddings/text-embedding/text-embedding";
    auditor.exchange(server, ("post", embed), "", texts).await;
    let tokenize =
        json!({"model": MODEL, "input": {"messages": [{"role": "user", "content": "a"}]}});
    auditor.exchange(server, ("post", "/api/v1/tokenizer"), "", tokenize).await;
    let models = ("get", "/api/v1/models");
    auditor.exchange(server, models, "", Value::Null).await;
    auditor.query = "?page_no=none";
    assert_eq!(auditor.answer(server, models, "", Value::Null).await.0, 400);
    auditor.query = "";
}

#[tokio::test]
async fn every_answer_is_what_is_described() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = FakeServer::with(&config(), HttpLimits::default());
    server.state.ledger = Some(Ledger::open(&folder.path().join("usage.db")).unwrap());
    let mut thinking = FakeServer::with(&config(), HttpLimits::default());
    let conventions = Conventions { reasoning: Reasoning::InTags, ..Conventions::default() };
    thinking.state.model = Arc::new(model(conventions));
    let description = Description(server.get("/openapi.json").await.ok());
    let mut auditor = Auditor { description, seen: BTreeSet::new(), accept: "*/*", query: "" };
    generating(&mut auditor, &server, &thinking).await;
    responding(&mut auditor, &server, &thinking).await;
    messaging(&mut auditor, &server, &thinking).await;
    native(&mut auditor, &server, &thinking).await;
    let tokens = json!({"model": MODEL, "tokens": [97]});
    auditor.exchange(&server, ("post", "/detokenize"), "", tokens).await;
    for more in [json!({"return_token_strs": true}), json!({})] {
        let body = with(json!({"model": MODEL, "prompt": "a"}), more);
        auditor.exchange(&server, ("post", "/tokenize"), "", body).await;
    }
    let plain = [
        "/v1/models",
        "/health",
        "/health/live",
        "/health/ready",
        "/version",
        "/metrics",
        "/admin/state",
        "/openapi.json",
        "/docs",
    ];
    for path in plain {
        auditor.exchange(&server, ("get", path), "", Value::Null).await;
    }
    auditor.exchange(&server, ("get", "/v1/models/{id}"), MODEL, Value::Null).await;
    let usage = ("get", "/admin/usage");
    for query in ["", "?by=day%2Ckey", "?format=csv", "?format=table"] {
        auditor.query = query;
        auditor.exchange(&server, usage, "", Value::Null).await;
    }
    auditor.query = "?by=colour";
    assert_eq!(auditor.answer(&server, usage, "", Value::Null).await.0, 400);
    auditor.query = "";
    adapters::described(&mut server, folder.path());
    for (path, body) in [
        ("/v1/load_lora_adapter", json!({"lora_name": "sql", "lora_path": "sql"})),
        ("/v1/unload_lora_adapter", json!({"lora_name": "sql"})),
    ] {
        auditor.exchange(&server, ("post", path), "", body).await;
    }
    // Whatever can be refused is refused once.
    let described = auditor.described();
    for line in described.iter().filter(|line| line.contains("4XX")) {
        let (method, rest) = line.split_once(' ').unwrap();
        let path = rest.split(' ').next().unwrap();
        let body = json!({"model": "none"});
        auditor.answer(&server, (method, path), "none", body).await;
    }
    let asking = FakeServer::with_keys(&[]);
    for line in described.iter().filter(|line| line.contains(" 401 ")) {
        let (method, rest) = line.split_once(' ').unwrap();
        let path = rest.split(' ').next().unwrap();
        assert_eq!(auditor.answer(&asking, (method, path), "x", Value::Null).await.0, 401);
    }
    let missing: Vec<&String> = described.difference(&auditor.seen).collect();
    assert!(missing.is_empty(), "never seen: {missing:#?}");
}

#[tokio::test]
async fn an_answer_that_is_not_as_described_would_be_noticed() {
    let server = FakeServer::start();
    let description = Description(server.get("/openapi.json").await.ok());
    let schema = json!({"$ref": "#/components/schemas/ChatCompletion"});
    let sound = server.post("/v1/chat/completions", chat("x")).await.ok();
    let check = |value: &Value| description.check(&schema, value, Others::Flawed);
    check(&sound).unwrap();
    for (path, value) in [
        ("/id", json!(5)),
        ("/object", json!("chat")),
        ("/choices/0/finish_reason", json!("done")),
        ("/choices/0/message", json!({})),
        ("/choices/0/message/tool_calls", json!([])),
        ("/usage/invented", json!(1)),
    ] {
        let mut broken = sound.clone();
        let (parent, name) = path.rsplit_once('/').unwrap();
        broken.pointer_mut(parent).unwrap()[name] = value;
        check(&broken).unwrap_err();
    }
}

/// A request's body with a pattern.
type MakeBody<'a> = &'a dyn Fn(&str) -> Value;

// A grammar takes long to compile, and whoever compiles it on a worker keeps all others waiting.
#[tokio::test]
async fn a_grammar_is_never_compiled_where_others_wait() {
    let server = FakeServer::with(&config(), HttpLimits::default());
    let tool = |pattern: &str| {
        let parameters =
            json!({"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}});
        let function = json!({"name": "f", "strict": true, "parameters": parameters});
        with(chat("x"), json!({"tools": [{"type": "function", "function": function}]}))
    };
    let guided = |pattern: &str| with(chat("x"), json!({"guided_regex": pattern}));
    let complete = |pattern: &str| json!({"model": MODEL, "prompt": "x", "guided_regex": pattern});
    let (chats, texts) = ("/v1/chat/completions/render", "/v1/completions/render");
    let cases: [(&str, MakeBody<'_>); 3] = [(chats, &tool), (chats, &guided), (texts, &complete)];
    for (index, (path, body)) in cases.into_iter().enumerate() {
        let mut others_ran = false;
        // A compilation may happen to be done before anybody looks, but not always.
        for attempt in 0..50 {
            let pattern = format!("(a{{{}}}){{500}}", 1000 + 100 * index + attempt);
            others_ran = others_ran || has_waited(server.post(path, body(&pattern))).await;
        }
        assert!(others_ran, "{path}: nobody else could run");
    }
}

/// Whether others could run before a future was done.
async fn has_waited<T>(future: impl Future<Output = T>) -> bool {
    use std::sync::atomic::{AtomicBool, Ordering};
    let others_ran = AtomicBool::new(false);
    let first = async {
        future.await;
        others_ran.load(Ordering::SeqCst)
    };
    // Polled second: too late, if the first is never pending.
    let second = async { others_ran.store(true, Ordering::SeqCst) };
    tokio::join!(first, second).0
}
