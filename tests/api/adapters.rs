//! Adapters: which requests get one, who may load and unload them, and what becomes of their requests.
//!
//! Method: an adapter of the fake model is a directory with a text, in which every told answer then
//! ends.

use std::any::Any;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use qwen_server::http::{AdapterError, Adapters, AdminRoutes, LoadedAdapter};
use qwen_server::ledger::calendar::Hour;
use qwen_server::ledger::{Account, Counts, Ledger, Store};
use qwen_server::telemetry::metrics;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api_fake::{FakeServer, MODEL, chat, with};

/// Weights that were loaded, as long as somebody has them.
type Loaded = Arc<Mutex<Vec<Weak<dyn Any + Send + Sync>>>>;

/// Makes adapters whose text is in a file of their directory.
fn adapters(max: usize, loaded: &Loaded) -> Adapters {
    let loaded = Arc::clone(loaded);
    Adapters::new(max, move |directory: &Path| {
        let text = std::fs::read_to_string(directory.join("says"));
        let text = text.map_err(|error| format!("{}: {error}", directory.display()))?;
        let num_bytes = text.len();
        let weights: Arc<dyn Any + Send + Sync> = Arc::new(text);
        loaded.lock().unwrap().push(Arc::downgrade(&weights));
        Ok(LoadedAdapter { weights, num_bytes })
    })
    .beside(|name| [MODEL, "org/alias"].contains(&name))
}

fn write(root: &Path, name: &str) {
    std::fs::create_dir(root.join(name)).unwrap();
    std::fs::write(root.join(name).join("says"), format!(" as {name}")).unwrap();
}

/// Directories `sql`, `poet` and `law`, of which the first is loaded, and room for two.
fn root() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for name in ["sql", "poet", "law"] {
        write(root.path(), name);
    }
    root
}

fn put(server: &mut FakeServer, root: &Path, loaded: &Loaded) {
    let adapters = adapters(2, loaded).below(root).unwrap();
    adapters.add("sql", &root.join("sql")).unwrap();
    server.state.adapters = Arc::new(adapters);
}

fn start() -> (FakeServer, TempDir, Loaded) {
    let (root, loaded, mut server) = (root(), Loaded::default(), FakeServer::start());
    put(&mut server, root.path(), &loaded);
    (server, root, loaded)
}

/// Lets a server load `sql` from below `root`.
pub(crate) fn described(server: &mut FakeServer, root: &Path) {
    write(root, "sql");
    server.state.adapters = Arc::new(adapters(2, &Loaded::default()).below(root).unwrap());
}

fn named(model: &str, text: &str) -> Value {
    with(chat(text), json!({"model": model}))
}

async fn says(server: &FakeServer, model: &str) -> Value {
    let answer = server.post("/v1/chat/completions", named(model, "hello")).await.ok();
    answer["choices"][0]["message"]["content"].clone()
}

async fn load(server: &FakeServer, name: &str, path: &str) -> crate::api_fake::Answer {
    let body = json!({"lora_name": name, "lora_path": path});
    server.post("/v1/load_lora_adapter", body).await
}

#[tokio::test]
async fn every_protocol_selects_adapters_by_the_models_name() {
    let (server, _root, _loaded) = start();
    let messages = json!([{"role": "user", "content": "say:hello;"}]);
    let native =
        json!({"input": {"messages": messages}, "parameters": {"result_format": "message"}});
    for (path, body, place) in [
        ("/v1/chat/completions", json!({"messages": messages}), "/choices/0/message/content"),
        ("/v1/completions", json!({"prompt": "say:hello;"}), "/choices/0/text"),
        ("/v1/responses", json!({"input": "say:hello;"}), "/output/0/content/0/text"),
        ("/v1/messages", json!({"messages": messages, "max_tokens": 50}), "/content/0/text"),
        (
            "/api/v1/services/aigc/text-generation/generation",
            native.clone(),
            "/output/choices/0/message/content",
        ),
        (
            "/api/v1/services/aigc/multimodal-generation/generation",
            native,
            "/output/choices/0/message/content/0/text",
        ),
        (
            "/compatible-mode/v1/chat/completions",
            json!({"messages": messages}),
            "/choices/0/message/content",
        ),
    ] {
        for (model, served, text) in
            [("sql", "sql", "hello as sql"), (MODEL, MODEL, "hello"), ("org/alias", MODEL, "hello")]
        {
            let answer = server.post(path, with(body.clone(), json!({"model": model}))).await;
            assert_eq!(answer.header("x-served-model"), Some(served), "{path}");
            let answer = answer.ok();
            assert_eq!(answer.pointer(place), Some(&json!(text)), "{path}: {answer}");
            if !path.starts_with("/api/") {
                assert_eq!(answer["model"], model, "{path}");
            }
        }
        let answer = server.post(path, with(body, json!({"model": "poet"}))).await;
        assert_eq!(answer.status, 404, "{path}: {}", answer.text);
    }
    let stream = with(named("sql", "hello"), json!({"stream": true}));
    let chunks = server.post("/v1/chat/completions", stream).await.chunks();
    let text: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, "hello as sql");
    // Every choice has it, not only the first.
    let several = with(named("sql", "hello"), json!({"n": 3}));
    let choices = server.post("/v1/chat/completions", several).await.ok()["choices"].clone();
    let said = |choice: &Value| choice["message"]["content"] == "hello as sql";
    assert_eq!(choices.as_array().unwrap().iter().filter(|choice| said(choice)).count(), 3);
    let embedding = async |model: &str| {
        let body = json!({"model": model, "input": "abc"});
        server.post("/v1/embeddings", body).await.ok()["data"][0]["embedding"].clone()
    };
    assert_ne!(embedding("sql").await, embedding(MODEL).await);
    // What computes nothing takes the name too.
    for path in ["/tokenize", "/v1/completions/render"] {
        server.post(path, json!({"model": "sql", "prompt": "a"})).await.ok();
        server.post(path, json!({"model": "poet", "prompt": "a"})).await.error(404);
    }
}

#[tokio::test]
async fn adapters_are_listed_behind_their_model() {
    let (server, root, _loaded) = start();
    let list = server.get("/v1/models").await.ok();
    let listed: Vec<_> =
        list["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(listed, [MODEL, "org/alias", "sql"]);
    let sql = &list["data"][2];
    let path = root.path().canonicalize().unwrap().join("sql").display().to_string();
    assert_eq!((&sql["parent"], &sql["root"]), (&json!(MODEL), &json!(path)));
    assert_eq!(list["data"][0]["parent"], Value::Null);
    assert_eq!(&server.get("/v1/models/sql").await.ok(), sql);
    server.get("/v1/models/poet").await.error(404);
    let native = server.get("/api/v1/models").await.ok();
    assert_eq!(native["output"]["total"], 3);
    assert_eq!(server.get("/api/v1/models?model=sql").await.ok()["output"]["total"], 1);
    assert_eq!(server.get("/api/v1/models?model=poet").await.ok()["output"]["total"], 0);
}

#[tokio::test]
async fn adapters_come_and_go_while_the_server_runs() {
    let (server, root, _loaded) = start();
    let answer = load(&server, "verse", "poet").await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.text, "Success: LoRA adapter 'verse' added successfully.");
    assert_eq!(says(&server, "verse").await, "hello as poet");
    // Another text in its place, by the whole path.
    let path = root.path().join("law").display().to_string();
    let body = json!({"lora_name": "verse", "lora_path": path, "load_inplace": true});
    assert_eq!(server.post("/v1/load_lora_adapter", body).await.status, 200);
    assert_eq!(says(&server, "verse").await, "hello as law");
    let body = json!({"lora_name": "verse"});
    let answer = server.post("/v1/unload_lora_adapter", body.clone()).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.text, "Success: LoRA adapter 'verse' removed successfully.");
    let error = server.post("/v1/chat/completions", named("verse", "hello")).await.error(404);
    assert_eq!(error["code"], "model_not_found");
    let error = server.post("/v1/unload_lora_adapter", body).await.error(404);
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("adapter_not_found"), &json!("lora_name"))
    );
    assert_eq!(says(&server, "sql").await, "hello as sql");
}

#[tokio::test]
async fn what_cannot_be_loaded_is_refused_by_name() {
    let (server, root, _loaded) = start();
    let elsewhere = tempfile::tempdir().unwrap();
    write(elsewhere.path(), "secret");
    let secret = elsewhere.path().join("secret").display().to_string();
    std::os::unix::fs::symlink(&secret, root.path().join("link")).unwrap();
    std::fs::create_dir(root.path().join("linked")).unwrap();
    let file = elsewhere.path().join("secret/says");
    let linked = root.path().join("linked/adapter_model.safetensors");
    std::os::unix::fs::symlink(file, linked).unwrap();
    std::fs::create_dir(root.path().join("empty")).unwrap();
    let up = format!("{}/../x", root.path().display());
    for (name, path, status, param, part) in [
        ("sql", "poet", 400, "lora_name", "set `load_inplace`"),
        (MODEL, "poet", 400, "lora_name", "is a name of the model"),
        ("org/alias", "poet", 400, "lora_name", "is a name of the model"),
        ("", "poet", 400, "lora_name", "name has 1 to 256"),
        ("a,b", "poet", 400, "lora_name", "name has 1 to 256"),
        ("new", &secret, 400, "lora_path", "below the server's `--lora-root`"),
        ("new", "/nowhere", 400, "lora_path", "below the server's `--lora-root`"),
        ("new", "../secret", 400, "lora_path", "below the server's `--lora-root`"),
        ("new", "poet/../poet", 400, "lora_path", "below the server's `--lora-root`"),
        ("new", &up, 400, "lora_path", "below the server's `--lora-root`"),
        ("new", "", 400, "lora_path", "below the server's `--lora-root`"),
        ("new", "link", 400, "lora_path", "below the server's `--lora-root`"),
        ("new", "linked", 400, "lora_path", "below the server's `--lora-root`"),
        ("new", "nothing", 404, "lora_path", "there is no `nothing`"),
        ("new", "sql/says", 404, "lora_path", "there is no `sql/says`"),
        ("new", "empty", 400, "lora_path", "No such file"),
    ] {
        let error = load(&server, name, path).await.error(status);
        assert_eq!(error["param"], param, "{name} {path}: {error}");
        assert!(error["message"].as_str().unwrap().contains(part), "{name} {path}: {error}");
    }
    for (path, body) in [
        ("/v1/load_lora_adapter", json!({"lora_name": "x"})),
        ("/v1/load_lora_adapter", json!({"lora_path": "poet"})),
        ("/v1/load_lora_adapter", json!({"lora_name": "x", "lora_path": 3})),
        ("/v1/unload_lora_adapter", json!({})),
    ] {
        let error = server.post(path, body).await.error(400);
        assert!(error["message"].as_str().unwrap().contains("lora_"), "{error}");
    }
    // Nothing came of any of it.
    assert_eq!(server.get("/v1/models").await.ok()["data"].as_array().unwrap().len(), 3);
    assert_eq!(load(&server, "verse", "poet").await.status, 200);
    let error = load(&server, "third", "law").await.error(400);
    assert!(error["message"].as_str().unwrap().contains("`--max-loras 2`"), "{error}");
}

#[tokio::test]
async fn without_a_root_nothing_changes_while_the_server_runs() {
    let (mut server, root) = (FakeServer::start(), root());
    let plain = adapters(2, &Loaded::default());
    plain.add("sql", &root.path().join("sql")).unwrap();
    assert_eq!(plain.add("sql", root.path()), Err(AdapterError::Taken("sql".to_owned())));
    server.state.adapters = Arc::new(plain);
    for answer in [
        load(&server, "poet", "poet").await,
        server.post("/v1/unload_lora_adapter", json!({"lora_name": "sql"})).await,
        load(&FakeServer::start(), "poet", "poet").await,
    ] {
        let error = answer.error(400);
        assert_eq!(error["code"], "unsupported_operation");
        assert!(error["message"].as_str().unwrap().contains("--lora-root"), "{error}");
    }
    assert_eq!(says(&server, "sql").await, "hello as sql");
}

#[tokio::test]
async fn only_administrators_change_adapters() {
    let keys = [("ann", ""), ("ops", "role = 'admin'"), ("tom", "models = ['fake-*']")];
    let (root, mut server) = (root(), FakeServer::with_keys(&keys));
    put(&mut server, root.path(), &Loaded::default());
    let body = json!({"lora_name": "poet", "lora_path": "poet"});
    let error = server.ask("ann", "/v1/load_lora_adapter", body.clone()).await.error(403);
    assert_eq!(error["code"], "insufficient_permissions");
    server.ask("ann", "/v1/unload_lora_adapter", json!({"lora_name": "sql"})).await.error(403);
    server.post("/v1/load_lora_adapter", body.clone()).await.error(401);
    assert_eq!(server.ask("ops", "/v1/load_lora_adapter", body.clone()).await.status, 200);
    // Keys that name models name adapters too.
    let chats = "/v1/chat/completions";
    server.ask("ann", chats, named("poet", "x")).await.ok();
    let error = server.ask("tom", chats, named("poet", "x")).await.error(403);
    assert_eq!(error["code"], "model_not_allowed");
    server.ask("tom", chats, named(MODEL, "x")).await.ok();
    // Where operators have an address of their own, clients find nothing here.
    server.state.admin_routes = AdminRoutes::Apart;
    server.ask("ops", "/v1/load_lora_adapter", body).await.error(404);
}

/// Goal: who has an adapter keeps it; nobody else gets it; its memory goes with the last of them, and
/// until then it counts.
#[tokio::test]
async fn unloading_disturbs_no_request() {
    let (server, _root, loaded) = start();
    let long = "z".repeat(180);
    let stream = with(named("sql", &long), json!({"stream": true}));
    let request = Request::post("/v1/chat/completions").header("content-type", "application/json");
    let response = server.send(request.body(Body::from(stream.to_string())).unwrap()).await;
    server.wait_until_running(1).await;
    assert_eq!(load(&server, "poet", "poet").await.status, 200);
    let unloaded = server.post("/v1/unload_lora_adapter", json!({"lora_name": "sql"})).await;
    assert_eq!(unloaded.status, 200);
    server.post("/v1/chat/completions", named("sql", "x")).await.error(404);
    // Listed are fewer than may be, but the unloaded one is still in memory.
    let busy = load(&server, "law", "law").await;
    assert_eq!(busy.error(503)["code"], "adapters_in_use");
    assert!(busy.header("retry-after").unwrap().parse::<u32>().is_ok());
    let text = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(text.to_vec()).unwrap();
    let said: String = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok())
        .filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned()))
        .collect();
    assert_eq!(said, format!("{long} as sql"));
    server.wait_until_idle().await;
    let is_gone = || loaded.lock().unwrap()[0].upgrade().is_none();
    for _ in 0..1000 {
        if is_gone() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(is_gone(), "nobody has it, but it is still there");
    assert_eq!(load(&server, "law", "law").await.status, 200);
}

#[tokio::test]
async fn usage_is_counted_by_adapter() {
    let (mut server, root) = (FakeServer::start(), root());
    put(&mut server, root.path(), &Loaded::default());
    let file = root.path().join("usage.db");
    server.state.ledger = Some(Ledger::open(&file).unwrap());
    for model in ["sql", MODEL, "sql", "nobody"] {
        server.post("/v1/chat/completions", named(model, "hello")).await;
    }
    server.state.ledger.take().unwrap().close();
    let mut counted = Vec::new();
    let add = |account: Account, counts: Counts| {
        counted.push((account.model.to_string(), counts.requests));
    };
    Store::open_existing(&file).unwrap().read(Hour(0)..Hour::MAX, add).unwrap();
    counted.sort();
    assert_eq!(counted, [(MODEL.to_owned(), 2), ("sql".to_owned(), 2)]);
}

#[tokio::test]
async fn metrics_tell_which_adapters_are_in_use() {
    metrics::install("test");
    let (mut server, root) = (FakeServer::start(), root());
    let adapters = adapters(3, &Loaded::default());
    // A name that no other test uses: metrics are those of the process.
    adapters.add("metric\"s", &root.path().join("sql")).unwrap();
    server.state.adapters = Arc::new(adapters);
    let is_running = async || {
        let text = server.get("/metrics").await.text;
        let mut lines = text.lines().filter(|line| line.starts_with("vllm:lora_requests_info{"));
        let line = lines.next().expect("the gauge").to_owned();
        assert_eq!(lines.next(), None, "one series, whatever runs");
        let (_, running) = line.split_once("running_lora_adapters=\"").unwrap();
        running.contains("metric\\\"s")
    };
    assert!(!is_running().await);
    let stream = with(named("metric\"s", &"z".repeat(300)), json!({"stream": true}));
    let request = Request::post("/v1/chat/completions").header("content-type", "application/json");
    let response = server.send(request.body(Body::from(stream.to_string())).unwrap()).await;
    server.wait_until_running(1).await;
    assert!(is_running().await);
    drop(response);
    server.wait_until_idle().await;
    assert!(!is_running().await);
}
