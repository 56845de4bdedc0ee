//! Bytes on a socket: whatever comes, every answer is one of HTTP, none is a 5xx, the connection
//! ends in time and the server goes on.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use qwen_server::http::{HttpLimits, serve};
use tokio::net::TcpListener;

use crate::api_fake::{FakeServer, config};
use crate::fuzzer::{fuzz, outcome};

const MAX_TIME: Duration = Duration::from_secs(30);

const WORDS: [&str; 30] = [
    "GET ",
    "POST ",
    "HEAD ",
    "OPTIONS ",
    "BREW ",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "/v1/models",
    "/v1/models/%2e%2e",
    "/v1/responses/%00",
    "/health",
    "/tokenize",
    "*",
    "?a=%",
    " HTTP/1.1\r\n",
    " HTTP/1.0\r\n",
    "host: a\r\n",
    "\r\n\r\n",
    "\n",
    "content-length: 5\r\n",
    "content-length: -1\r\n",
    "content-length: 18446744073709551616\r\n",
    "transfer-encoding: chunked\r\n",
    "transfer-encoding: gzip, chunked\r\n",
    "5\r\nabcde\r\n",
    "0\r\n\r\n",
    "connection: close\r\n",
    "connection: upgrade\r\nupgrade: h2c\r\n",
    "expect: 100-continue\r\n",
    "content-type: application/json\r\n",
    "x-request-id: é\r\n",
];

/// What the server answers until it closes.
fn answers(address: std::net::SocketAddr, input: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(MAX_TIME)).unwrap();
    // The server may have closed already.
    let _ = stream.write_all(input);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answers = Vec::new();
    match stream.read_to_end(&mut answers) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("never closed"),
        _ => answers,
    }
}

#[test]
fn bytes_on_a_socket_are_answered_or_refused() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let limits = HttpLimits { header_timeout: Duration::from_secs(5), ..HttpLimits::default() };
    let mut server = FakeServer::with(&config(), limits);
    server.state.allowed_hosts = ["a".to_owned()].into();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(serve(listener, server.state.clone(), std::future::pending()));
    fuzz("heads", &WORDS, |input, _| {
        let answers = answers(address, input);
        let text = String::from_utf8_lossy(&answers);
        if answers.is_empty() {
            return outcome(&"closed");
        }
        let statuses: Vec<u16> = text
            .split("HTTP/1.")
            .skip(1)
            .filter_map(|answer| answer.split(' ').nth(1)?.parse().ok())
            .collect();
        assert!(text.starts_with("HTTP/1.") && !statuses.is_empty(), "{text}");
        assert!(statuses.iter().all(|status| *status < 500), "{text}");
        outcome(&statuses)
    });
    // Who says that nothing will follow may count as gone before the answer; this client waits.
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(MAX_TIME)).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
    let mut sound = Vec::new();
    stream.read_to_end(&mut sound).unwrap();
    assert!(sound.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&sound));
}
