//! Goal: a request leaves a trace that belongs to its client's, with the conventions' names and
//! nothing of what was said; a collector that is away costs nothing but the traces.
//!
//! Method: the real binary and a collector of a few lines. A span in protobuf holds its strings and
//! ids as they are, so they are looked for as bytes.
#![cfg(feature = "otel")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/served.rs"]
mod served;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use serde_json::json;

use crate::served::Served;

const CANARY: &str = "canary7f3a";
const TRACEPARENT: &str =
    "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n";

/// A collector. Everything that is sent to it comes out of the channel.
fn collector() -> (String, Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, received) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let sender = sender.clone();
            std::thread::spawn(move || receive(&stream.unwrap(), &sender));
        }
    });
    (endpoint, received)
}

fn receive(mut stream: &TcpStream, sender: &Sender<(String, Vec<u8>)>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let head = head.to_ascii_lowercase();
        let len = head.split_once("content-length:").unwrap().1.lines().next().unwrap().trim();
        let mut body = vec![0; len.parse().unwrap()];
        reader.read_exact(&mut body).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
        let _ = sender.send((head, body));
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

fn ask(server: &Served) {
    let messages = json!([{"role": "user", "content": CANARY}]);
    let body = json!({"model": "m", "messages": messages, "max_tokens": 4, "ignore_eos": true});
    let answer = server.send("POST", "/v1/chat/completions", TRACEPARENT, &body);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn a_request_leaves_a_trace() {
    let (endpoint, received) = collector();
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_SERVICE_NAME", "my-service"),
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
    ];
    let server = Served::start(&["--served-model-name", "m"], &variables);
    ask(&server);
    let (head, spans) = received.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(
        head.starts_with("post /v1/traces ") && head.contains("application/x-protobuf"),
        "{head}"
    );
    for part in [
        "my-service",
        "chat m",
        "queue",
        "prefill",
        "decode",
        "gen_ai.operation.name",
        "gen_ai.request.model",
        "gen_ai.usage.input_tokens",
        "gen_ai.usage.output_tokens",
        "gen_ai.response.finish_reasons",
        "length",
        "gen_ai.server.time_to_first_token",
        "/v1/chat/completions",
        "anonymous",
    ] {
        assert!(contains(&spans, part.as_bytes()), "no {part}");
    }
    let trace_id = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736_u128.to_be_bytes();
    let parent_id = 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes();
    assert!(contains(&spans, &trace_id) && contains(&spans, &parent_id));
    assert!(!contains(&spans, CANARY.as_bytes()));
    // What is left is sent at the end.
    ask(&server);
    let (status, _, _) = server.stop();
    assert!(status.success());
    assert!(received.recv_timeout(Duration::from_secs(5)).is_ok());
}

#[test]
fn a_dead_collector_costs_nothing_but_the_traces() {
    // It accepts and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let variables =
        [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "10")];
    let server = Served::start(&["--served-model-name", "m"], &variables);
    for _ in 0..20 {
        ask(&server);
    }
    let (status, took, lines) = server.stop();
    assert!(status.success());
    assert!(took < Duration::from_secs(6), "{took:?}");
    assert!(!lines.iter().any(|line| line.contains(CANARY)));
}
