//! What a server that others reach owes to those who send too much, read too little, or come from
//! a web page.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Method, Request};
use qwen_server::http::{HttpLimits, serve};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::api_fake::{FakeServer, MODEL, chat, config, with};

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
        "POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n\
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
        let head =
            format!("GET /{path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}\r\n");
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
