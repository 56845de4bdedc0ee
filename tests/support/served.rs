//! The real binary with a tiny model, as a child process, and a client of few words.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// A running server. It is killed when dropped.
pub(crate) struct Served {
    child: Child,
    address: String,
    lines: Receiver<String>,
    /// Lines of the log that were read already.
    seen: Vec<String>,
}

impl Served {
    /// Starts `serve` with `args` and `variables`, and waits until it is ready.
    pub(crate) fn start(args: &[&str], variables: &[(&str, &str)]) -> Self {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/mixed.gguf");
        let mut child = Command::new(env!("CARGO_BIN_EXE_qwen-server"))
            .env_clear()
            .envs(variables.iter().copied())
            .args(["serve", "--port", "0", "--device", "cpu", "--log-format", "json"])
            .args(["--threads", "1", "--kv-cache-memory", "4MiB", "--model"])
            .arg(model)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|l| sender.send(l))
        });
        let mut served = Self { child, address: String::new(), lines, seen: Vec::new() };
        let ready = served.wait_for(|line| line.contains("ready on http://"));
        let address = ready.split_once("http://").unwrap().1;
        let end = address.find(|c: char| c != ':' && c != '.' && !c.is_ascii_digit());
        address[..end.unwrap_or(address.len())].clone_into(&mut served.address);
        served
    }

    /// The first line of the log, from the beginning, that is as wanted.
    pub(crate) fn wait_for(&mut self, is_wanted: impl Fn(&str) -> bool) -> String {
        if let Some(line) = self.seen.iter().find(|line| is_wanted(line)) {
            return line.clone();
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            let line = line.unwrap_or_else(|_| panic!("no such line in {:#?}", self.seen));
            self.seen.push(line.clone());
            if is_wanted(&line) {
                return line;
            }
        }
    }

    /// The whole answer to a request.
    pub(crate) fn send(&self, method: &str, path: &str, headers: &str, body: &Value) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Tells it to stop, and waits until it has. Returns how it ended, after how long, and its log.
    pub(crate) fn stop(mut self) -> (ExitStatus, Duration, Vec<String>) {
        let began = Instant::now();
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").arg(pid).status().unwrap().success());
        let status = self.child.wait().unwrap();
        let took = began.elapsed();
        let mut lines = std::mem::take(&mut self.seen);
        lines.extend(self.lines.iter());
        (status, took, lines)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
