//! Over a real socket: what only a connection can show.

use std::io::ErrorKind;
use std::time::Duration;

use qwen_server::http::{HttpLimits, serve};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::api_fake::{FakeServer, MODEL, chat, config};

struct Listening {
    fake: FakeServer,
    address: std::net::SocketAddr,
    stop: oneshot::Sender<()>,
    server: JoinHandle<std::io::Result<()>>,
}

async fn listen(limits: HttpLimits) -> Listening {
    let fake = FakeServer::with(&config(), limits);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let shutdown = async {
        let _ = stopped.await;
    };
    let server = tokio::spawn(serve(listener, fake.state.clone(), shutdown));
    Listening { fake, address, stop, server }
}

impl Listening {
    async fn send(&self, path: &str, body: &Value) -> TcpStream {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        write(&stream, &(head + &body)).await;
        stream
    }

    async fn get(&self, path: &str) -> String {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        write(&stream, &head).await;
        let mut text = String::new();
        while let Some(piece) = read(&stream).await {
            text.push_str(&piece);
        }
        text
    }
}

async fn write(stream: &TcpStream, text: &str) {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        stream.writable().await.unwrap();
        match stream.try_write(rest) {
            Ok(len) => rest = &rest[len..],
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
}

/// What has arrived; `None` when the server has closed the connection.
async fn read(stream: &TcpStream) -> Option<String> {
    let mut buffer = [0; 4096];
    loop {
        stream.readable().await.unwrap();
        match stream.try_read(&mut buffer) {
            Ok(0) => return None,
            Ok(len) => return Some(String::from_utf8_lossy(&buffer[..len]).into_owned()),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
}

async fn read_until(stream: &TcpStream, what: &str) -> String {
    let mut text = String::new();
    while !text.contains(what) {
        let piece = read(stream).await;
        text.push_str(&piece.unwrap_or_else(|| panic!("closed before `{what}`: {text}")));
    }
    text
}

fn endless(stream: bool) -> Value {
    json!({"model": MODEL, "prompt": "go", "max_tokens": 12_000, "stream": stream})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_frees_its_sequences() {
    let server = listen(HttpLimits::default()).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        let stream = server.send("/v1/completions", &endless(true)).await;
        read_until(&stream, "data: ").await;
        streams.push(stream);
    }
    for _ in 0..4 {
        streams.push(server.send("/v1/completions", &endless(false)).await);
    }
    server.fake.wait_until_running(8).await;
    // Half of them leave with a reset, the others politely.
    for (index, stream) in streams.into_iter().enumerate() {
        if index % 2 == 0 {
            stream.set_zero_linger().unwrap();
        }
        drop(stream);
    }
    server.fake.wait_until_idle().await;
    server.fake.post("/v1/chat/completions", chat("fine")).await.ok();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_stream_gets_comments() {
    let limits = HttpLimits { keep_alive: Duration::from_micros(50), ..HttpLimits::default() };
    let server = listen(limits).await;
    let stream = server.send("/v1/completions", &endless(true)).await;
    let text = read_until(&stream, "keep-alive").await;
    assert!(text.contains("\n: keep-alive\n\n"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_finishes_what_runs_and_answers_probes_meanwhile() {
    let server = listen(HttpLimits::default()).await;
    let body = json!({"model": MODEL, "prompt": "go", "max_tokens": 3000, "stream": true});
    let stream = server.send("/v1/completions", &body).await;
    read_until(&stream, "data: ").await;
    server.stop.send(()).unwrap();
    while !server.fake.get("/health/ready").await.text.contains("shutting down") {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let address = server.address;
    let probe = Listening { stop: oneshot::channel().0, ..server };
    assert!(probe.get("/health/ready").await.starts_with("HTTP/1.1 503"));
    assert!(probe.get("/health/live").await.starts_with("HTTP/1.1 200"));
    let refused = probe.send("/v1/completions", &endless(true)).await;
    let refusal = read_until(&refused, "shutting_down").await;
    assert!(refusal.starts_with("HTTP/1.1 503") && refusal.contains("retry-after"), "{refusal}");
    drop(refused);
    let rest = read_until(&stream, "[DONE]").await;
    assert!(rest.contains("\"finish_reason\":\"length\""));
    drop(stream);
    probe.server.await.unwrap().unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_finish_in_time_is_aborted_with_an_error_event() {
    let limits = HttpLimits { drain_timeout: Duration::from_millis(20), ..HttpLimits::default() };
    let server = listen(limits).await;
    let stream = server.send("/v1/completions", &endless(true)).await;
    read_until(&stream, "data: ").await;
    server.stop.send(()).unwrap();
    let rest = read_until(&stream, "\"error\":").await;
    assert!(rest.contains("shutting_down"), "{rest}");
    assert!(!rest.contains("[DONE]"));
    drop(stream);
    server.server.await.unwrap().unwrap();
}
