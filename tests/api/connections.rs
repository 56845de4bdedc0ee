//! What a server owes to clients that stall or leave, and to those that come before or after the
//! engine.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use qwen_server::engine::{EngineConfig, EngineHandle, spawn};
use qwen_server::http::{AppState, HttpLimits, serve};
use qwen_server::scheduler::step::{Runner, SchedulerOutput, SeqOutput, TokenMasks};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::api_fake::{FakeServer, MODEL, chat, config, with};

struct Listening {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    server: JoinHandle<std::io::Result<()>>,
}

async fn listen(state: &AppState) -> Listening {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let shutdown = async {
        let _ = stopped.await;
    };
    let server = tokio::spawn(serve(listener, state.clone(), shutdown));
    Listening { address, stop, server }
}

impl Listening {
    fn write(&self, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }
}

fn post(path: &str, body: &str, num_bytes: usize) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {num_bytes}\r\n\r\n{body}"
    )
}

fn read_to_end(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    String::from_utf8(bytes).unwrap()
}

/// A runner that fails every step.
struct BrokenRunner;

impl Runner for BrokenRunner {
    type Error = String;

    fn launch(&mut self, _: &SchedulerOutput) -> Result<(), String> {
        Err("out of order".to_owned())
    }

    fn sample(&mut self, _: &SchedulerOutput, _: &TokenMasks) -> Result<Vec<SeqOutput>, String> {
        unreachable!("nothing was launched")
    }
}

fn broken_engine(max_failed_steps: u32) -> EngineHandle {
    let config = EngineConfig { max_failed_steps, ..config() };
    let (engine, _thread) = spawn(config, || Ok(BrokenRunner));
    while !engine.is_ready() {
        std::thread::yield_now();
    }
    engine
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_ends_with_its_engine() {
    let mut fake = FakeServer::start();
    fake.state.engine = broken_engine(1);
    let server = listen(&fake.state).await;
    fake.post("/v1/chat/completions", chat("x")).await.error(500);
    server.server.await.unwrap().unwrap();
    assert!(TcpStream::connect(server.address).is_err());
    drop(server.stop);
}

#[tokio::test]
async fn a_stream_that_fails_before_its_first_byte_has_a_status() {
    let mut fake = FakeServer::start();
    fake.state.engine = broken_engine(9);
    let body = with(chat("x"), json!({"stream": true}));
    let error = fake.post("/v1/chat/completions", body).await.error(500);
    assert_eq!(error["code"], "engine_failed");
}

#[tokio::test]
async fn a_loading_model_is_a_reason_to_come_back() {
    let mut fake = FakeServer::start();
    let (loaded, wait) = mpsc::channel();
    let make_runner = move || {
        let _: Result<(), _> = wait.recv();
        Ok(BrokenRunner)
    };
    let (engine, _thread) = spawn(config(), make_runner);
    fake.state.engine = engine;
    for stream in [false, true] {
        let body = with(chat("x"), json!({"stream": stream}));
        let answer = fake.post("/v1/chat/completions", body).await;
        assert_eq!(answer.error(503)["code"], "loading");
        assert!(answer.header("retry-after").is_some());
    }
    drop(loaded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_sent_request_does_not_stretch_shutdown() {
    let limits = HttpLimits { drain_timeout: Duration::from_secs(300), ..HttpLimits::default() };
    let fake = FakeServer::with(&config(), limits);
    let server = listen(&fake.state).await;
    let head = server.write("POST /v1/completions HTTP/1.1\r\nhost");
    let body = server.write(&post("/v1/completions", "{", 100));
    let began = Instant::now();
    server.stop.send(()).unwrap();
    server.server.await.unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    drop((head, body));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_does_not_arrive_is_given_up() {
    let limits = HttpLimits {
        header_timeout: Duration::from_millis(100),
        body_timeout: Duration::from_millis(100),
        ..HttpLimits::default()
    };
    let fake = FakeServer::with(&config(), limits);
    let server = listen(&fake.state).await;
    let head = read_to_end(server.write("POST /v1/completions HTTP/1.1\r\nhost"));
    assert!(head.is_empty() || head.starts_with("HTTP/1.1 408"), "{head}");
    let body = read_to_end(server.write(&post("/v1/completions", "{", 100)));
    assert!(body.starts_with("HTTP/1.1 408") && body.contains("body_timeout"), "{body}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_the_bound_wait() {
    let limits = HttpLimits { max_connections: 1, ..HttpLimits::default() };
    let fake = FakeServer::with(&config(), limits);
    let server = listen(&fake.state).await;
    let get = "GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    let first = server.write("GET");
    let mut second = server.write(get);
    second.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    drop(first);
    second.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert!(read_to_end(second).starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_is_noticed_behind_bytes_after_the_body() {
    let fake = FakeServer::with(&config(), HttpLimits::default());
    let server = listen(&fake.state).await;
    let body: Value = json!({"model": MODEL, "prompt": "go", "max_tokens": 16_000});
    let body = body.to_string();
    for trailing in ["\r\n", "GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"] {
        let request = post("/v1/completions", &body, body.len()) + trailing;
        let stream = server.write(&request);
        fake.wait_until_running(1).await;
        let began = Instant::now();
        drop(stream);
        fake.wait_until_idle().await;
        // The answer itself takes more than three seconds.
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelined_requests_are_answered_in_order() {
    let fake = FakeServer::start();
    let server = listen(&fake.state).await;
    let body = chat("hello").to_string();
    let mut stream = server.write(
        &(post("/v1/chat/completions", &body, body.len())
            + "GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"),
    );
    stream.flush().unwrap();
    let text = read_to_end(stream);
    assert!(text.contains("hello"), "{text}");
    assert_eq!(text.matches("HTTP/1.1 200").count(), 2, "{text}");
}

#[tokio::test]
async fn seeds_count_up_for_requests_without_one() {
    let fake = FakeServer::start();
    let first = fake.state.next_seed.load(std::sync::atomic::Ordering::Relaxed);
    for _ in 0..3 {
        fake.post("/v1/chat/completions", chat("x")).await.ok();
    }
    let next = fake.state.next_seed.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(next, first + 3);
}
