//! What a server that others reach owes to those who send too much, read too little, or come from
//! a web page.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Method, Request};
use qwen_server::http::{HttpLimits, Listeners, serve};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::api_fake::{FakeServer, MODEL, chat, config, with};
use crate::keys::all_routes;

async fn listen(server: &FakeServer) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, server.state.clone(), std::future::pending()));
    address
}

/// Goal: a client that does not read its stream costs nothing for long. Method: an answer that
/// fills every buffer on its way; then its end must be missing, because it was never generated.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_dropped_and_its_request_aborted() {
    let limits = HttpLimits { write_timeout: Duration::from_millis(200), ..HttpLimits::default() };
    let server = FakeServer::with(&config(), limits);
    let address = listen(&server).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    let endless = json!({
        "messages": [{"role": "user", "content": "go"}], "n": 4, "max_tokens": 3000,
        "logprobs": true, "top_logprobs": 20, "stream": true,
    });
    let body = with(chat("x"), endless).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    server.wait_until_running(4).await;
    server.wait_until_idle().await;
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text).await;
    assert!(10_000 < text.len());
    let text = String::from_utf8_lossy(&text);
    assert!(!text.contains("[DONE]") && !text.contains("\"length\""));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_of_requests_are_bounded_in_number_and_size() {
    let server = FakeServer::start();
    let address = listen(&server).await;
    let many = (0..101).map(|index| format!("x-{index}: y\r\n")).collect::<Vec<_>>().concat();
    let long = format!("x: {}\r\n", "y".repeat(200_000));
    let path = "x".repeat(200_000);
    for (path, headers, expected) in [
        ("health", many.as_str(), "431"),
        ("health", long.as_str(), "431"),
        (path.as_str(), "", "4"),
        ("health", "x: y\r\n", "200"),
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "GET /{path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\r\n"
        );
        let _ = stream.write_all(head.as_bytes()).await;
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text).await;
        let text = String::from_utf8_lossy(&text);
        assert!(text.starts_with(&format!("HTTP/1.1 {expected}")), "{headers:.20}: {text}");
    }
}

async fn from_page(server: &FakeServer, method: Method, origin: &str) -> axum::http::HeaderMap {
    let request = Request::builder()
        .method(method)
        .uri("/v1/models")
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,x-stainless-os")
        .header("authorization", "Bearer ann");
    let response = server.send(request.body(Body::empty()).unwrap()).await;
    if response.status().is_client_error() {
        assert!(!response.headers().contains_key("access-control-allow-headers"));
    }
    response.headers().clone()
}

#[tokio::test]
async fn pages_may_call_only_if_their_origin_was_named() {
    let mut server = FakeServer::with_keys(&[("ann", "requests_per_minute = 9")]);
    let page = "https://app.example.com";
    for method in [Method::OPTIONS, Method::GET] {
        let headers = from_page(&server, method, page).await;
        assert!(!headers.keys().any(|name| name.as_str().starts_with("access-control-")));
    }
    server.state.cors_origins = [HeaderValue::from_static(page)].into();
    // The question that browsers ask first has no key.
    let headers = from_page(&server, Method::OPTIONS, page).await;
    assert_eq!(headers["access-control-allow-origin"], page);
    assert_eq!(headers["access-control-allow-headers"], "authorization,x-stainless-os");
    assert!(headers["access-control-allow-methods"].to_str().unwrap().contains("DELETE"));
    assert!(!headers.contains_key("access-control-allow-credentials"));
    let headers = from_page(&server, Method::GET, page).await;
    assert_eq!(headers["access-control-allow-origin"], page);
    let exposed = headers["access-control-expose-headers"].to_str().unwrap();
    assert!(exposed.contains("x-ratelimit-remaining-requests"));
    for method in [Method::OPTIONS, Method::GET] {
        for origin in ["https://evil.example.com", "http://app.example.com", "null"] {
            let headers = from_page(&server, method.clone(), origin).await;
            let allowed = headers.get("access-control-allow-origin");
            assert!(allowed.is_none(), "{origin}: {allowed:?}");
        }
    }
    // A refusal must be readable for the page, too.
    let request = Request::post("/v1/completions").header("origin", page);
    let body = Body::from(json!({"model": MODEL, "prompt": "a"}).to_string());
    let response = server.send(request.body(body).unwrap()).await;
    assert_eq!(response.status(), 401);
    assert_eq!(response.headers()["access-control-allow-origin"], page);
    server.state.cors_origins = [HeaderValue::from_static("*")].into();
    let headers = from_page(&server, Method::GET, "https://any.example.com").await;
    assert_eq!(headers["access-control-allow-origin"], "*");
}

/// Sends a head, and returns all that comes back.
async fn answer_to(address: std::net::SocketAddr, head: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// Goal: a page whose name was made to point at this machine reaches nothing, where no key keeps it
/// out; who asks by a name that is this machine's own is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_keys_answers_only_to_names_of_its_own() {
    let mut server = FakeServer::start();
    server.state.allowed_hosts = ["model.lan".to_owned()].into();
    let address = listen(&server).await;
    let get = |target: &str, host: &str| {
        format!("GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")
    };
    for host in ["localhost", "a.localhost:8000", "127.0.0.1:8000", "[::1]:1", "Model.LAN:8000"] {
        let answer = answer_to(address, &get("/v1/models", host)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{host}: {answer}");
    }
    assert!(answer_to(address, "GET /health HTTP/1.0\r\n\r\n").await.starts_with("HTTP/1.0 200"));
    for (path, part) in [
        ("/v1/models", r#""code":"host_not_allowed""#),
        ("/health", r#""code":"host_not_allowed""#),
        ("/metrics", r#""code":"host_not_allowed""#),
        ("/nothing", r#""code":"host_not_allowed""#),
        ("/v1/messages", r#""type":"invalid_request_error""#),
        ("/api/v1/services/aigc/text-generation/generation", r#""code":"InvalidParameter""#),
    ] {
        for host in ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""] {
            let answer = answer_to(address, &get(path, host)).await;
            assert!(answer.starts_with("HTTP/1.1 421"), "{path} {host}: {answer}");
            assert!(answer.contains(part) && answer.contains("--allowed-host"), "{answer}");
        }
    }
    let answer = answer_to(address, &get("http://evil.example/v1/models", "localhost")).await;
    assert!(answer.starts_with("HTTP/1.1 421"), "{answer}");
}

/// Goal: where a key is asked for, any name will do; but for operators on this machine, who are asked
/// for none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_keys_any_name_will_do() {
    let server = FakeServer::with_keys(&[("ann", "")]);
    let clients = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let operators = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = [&clients, &operators].map(|listener| listener.local_addr().unwrap());
    let listeners = Listeners { clients, operators: Some(operators), tls: None };
    tokio::spawn(serve(listeners, server.state.clone(), std::future::pending()));
    let get = |path: &str, host: &str| {
        format!(
            "GET {path} HTTP/1.1\r\nhost: {host}\r\nx-api-key: ann\r\nconnection: close\r\n\r\n"
        )
    };
    let answer = answer_to(addresses[0], &get("/v1/models", "chat.example.com")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let answer = answer_to(addresses[1], &get("/metrics", "evil.example")).await;
    assert!(answer.starts_with("HTTP/1.1 421"), "{answer}");
    let answer = answer_to(addresses[1], &get("/metrics", "localhost")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// Goal: what a page may send without asking first makes nobody compute. Method: bodies with every
/// type that needs no leave, or none, on every path that takes one.
#[tokio::test]
async fn what_a_page_may_send_unasked_computes_nothing() {
    let server = FakeServer::start();
    let body = with(chat("x"), json!({"prompt": "x", "input": "x"})).to_string();
    let posts = all_routes().into_iter().filter(|(method, _)| method == Method::POST);
    for (_, path) in posts {
        for kind in
            ["", "text/plain", "text/plain;charset=UTF-8", "multipart/form-data; boundary=x"]
                .into_iter()
                .chain(["application/x-www-form-urlencoded", "text/json", "application/jsonx"])
        {
            let request = Request::post(&path).header("origin", "https://evil.example");
            let request =
                if kind.is_empty() { request } else { request.header("content-type", kind) };
            let response = server.send(request.body(Body::from(body.clone())).unwrap()).await;
            assert!(response.status().is_client_error(), "{path} {kind}: {}", response.status());
        }
    }
    assert_eq!(server.state.engine.stats().num_steps, 0);
}
