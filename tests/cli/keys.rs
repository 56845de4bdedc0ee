//! Keys from the command line to a running server.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use super::{assert_fails, command, run, stderr, stdout};

fn path_text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Makes a key and returns its secret.
fn add(file: &Path, args: &[&str]) -> String {
    let output = run(&[&["key", "add", "--file", path_text(file)], args].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let secret = stdout(&output).trim_end().to_owned();
    assert!(secret.starts_with("sk-qwen-") && secret.len() == 8 + 64, "{secret}");
    secret
}

#[test]
fn a_secret_is_shown_once_and_kept_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let secret = add(&file, &["ann", "--models", "qwen-*,x", "--tokens-per-minute", "5000"]);
    let other = add(&file, &["bob", "--role", "admin", "--expires", "90d", "--priority", "-10"]);
    assert_ne!(secret, other);
    let content = fs::read_to_string(&file).unwrap();
    let list = run(&["key", "list", "--file", path_text(&file)]);
    let table = stdout(&list);
    for text in [&content, &table] {
        assert!(!text.contains(&secret[8..]) && !text.contains("sk-qwen"), "{text}");
    }
    let digest = content.split("blake3:").nth(1).unwrap().split('"').next().unwrap();
    assert!(!table.contains(digest) && table.contains(&digest[..8]), "{table}");
    let row = |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(row("ann").contains("5000") && row("ann").contains("qwen-*,x"), "{table}");
    assert!(row("bob").contains("admin") && row("bob").contains("-10"), "{table}");
    assert!(row("ann").contains("never") && !row("bob").contains("never"), "{table}");

    let again = run(&["key", "add", "ann", "--file", path_text(&file)]);
    assert_fails(&again, "has a key `ann` already");
    assert_eq!(fs::read_to_string(&file).unwrap(), content);
    let output = run(&["key", "revoke", "ann", "--file", path_text(&file)]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!fs::read_to_string(&file).unwrap().contains("ann"));
    assert_fails(&run(&["key", "revoke", "ann", "--file", path_text(&file)]), "has no key `ann`");
    fs::write(&file, "[[key]]\nname = 5").unwrap();
    assert_fails(&run(&["key", "list", "--file", path_text(&file)]), "line 2: ");
    assert_fails(&run(&["key", "add", "x", "--file", path_text(&file)]), "line 2: ");
}

#[test]
fn a_key_file_may_be_named_without_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["ann", "bob"] {
        let output = command(&["key", "add", name]).current_dir(&folder).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let list = command(&["key", "list"]).current_dir(&folder).output().unwrap();
    assert_eq!(stdout(&list).lines().count(), 3);
}

const MODEL: &str = "models/tiny/mixed.gguf";

#[test]
fn a_server_is_not_opened_to_others_by_mistake() {
    let serve = |args: &[&str]| {
        let output = command(&["serve", "--model", MODEL, "--port", "0"]).args(args).output();
        output.unwrap()
    };
    for host in ["0.0.0.0", "::"] {
        let output = serve(&["--host", host]);
        assert_fails(&output, "nothing would ask them for a key");
        let text = stderr(&output);
        assert!(text.contains("--api-keys") && text.contains("--no-auth"), "{text}");
    }
    let output = serve(&["--admin-address", "0.0.0.0:0"]);
    assert_fails(&output, "nothing would ask them for a key");
    assert_fails(&serve(&["--api-keys", "/nonexistent/keys.toml"]), "cannot read key file");
    assert_fails(&serve(&["--api-key", "short"]), "at least 16 characters");
    assert_fails(&serve(&["--no-auth", "--api-keys", "x"]), "`--no-auth` does not go with keys");
    assert_fails(&serve(&["--tls-cert", "x"]), "`--tls-cert` needs `--tls-key`");
    assert_fails(&serve(&["--tls-cert", "/no", "--tls-key", "/no"]), "cannot read a private key");
}

#[test]
fn a_key_is_not_printed_with_the_other_settings() {
    let secret = "a-long-enough-secret";
    let output =
        command(&["serve", "--print-config"]).env("QWEN_SERVER_API_KEY", secret).output().unwrap();
    let text = stdout(&output);
    assert!(text.contains("# api-key: not shown") && !text.contains(secret), "{text}");
    for args in [["serve", "--help"], ["chat", "--help"]] {
        let output = command(&args).env("QWEN_SERVER_API_KEY", secret).output().unwrap();
        assert!(!stdout(&output).contains(secret));
    }
}

/// A server that is killed when the test is over.
struct Running {
    child: Child,
    address: String,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Running {
    fn start(args: &[&str]) -> Self {
        let mut command = command(&["serve", "--model", MODEL, "--port", "0", "--device", "cpu"]);
        command.args(["--kv-cache-memory", "1MiB"]).args(args).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let line = line_with(&mut stderr, "ready on http");
        let address = line.split("://").nth(1).unwrap().trim().to_owned();
        Self { child, address, stderr }
    }

    /// The status of an answer.
    fn ask(&self, secret: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let head = format!(
            "GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer \
             {secret}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text[9..12].to_owned()
    }

    fn hang_up(&self) {
        let id = self.child.id().to_string();
        let status = std::process::Command::new("kill").args(["-HUP", &id]).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn line_with(lines: &mut impl BufRead, what: &str) -> String {
    let mut all = String::new();
    loop {
        let mut line = String::new();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0, "no `{what}` in {all}");
        if line.contains(what) {
            return line;
        }
        all += &line;
    }
}

/// Goal: keys come and go while the server runs. Method: the real server; each change is waited
/// for by the line that tells of it.
#[test]
fn keys_come_and_go_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let ann = add(&file, &["ann"]);
    let mut server = Running::start(&["--api-keys", path_text(&file)]);
    assert_eq!((server.ask(&ann), server.ask("x")), ("200".to_owned(), "401".to_owned()));
    let bob = add(&file, &["bob"]);
    line_with(&mut server.stderr, "read again");
    assert_eq!((server.ask(&ann), server.ask(&bob)), ("200".to_owned(), "200".to_owned()));
    assert!(run(&["key", "revoke", "ann", "--file", path_text(&file)]).status.success());
    line_with(&mut server.stderr, "read again");
    assert_eq!((server.ask(&ann), server.ask(&bob)), ("401".to_owned(), "200".to_owned()));
    // What is broken is told of, at the signal too, and changes nothing.
    fs::write(&file, "[[key]]").unwrap();
    let line = line_with(&mut server.stderr, "cannot be read again");
    assert!(line.contains("line 1: missing field"), "{line}");
    server.hang_up();
    line_with(&mut server.stderr, "cannot be read again");
    assert_eq!(server.ask(&bob), "200");
}
