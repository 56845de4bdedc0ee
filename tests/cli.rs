//! Drives the binary as a user does: help, arguments, exit codes, configuration, and the commands
//! that talk to a server, against a small one that answers from a script.

#![allow(clippy::unwrap_used, reason = "a test answers errors by failing")]

#[path = "cli/bundle.rs"]
mod bundle;
#[path = "cli/keys.rs"]
mod keys;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen-server"));
    // Nothing of the developer's own environment may matter.
    command.env_clear().args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Goal: a model of the catalogue is measured without its file. Method: the whole way, from the
/// server's start to a report; and what cannot be made up is refused.
#[test]
fn random_weights_need_no_file() {
    let bench = |model: &str| {
        let args = ["--concurrency", "1", "--requests", "1", "--prompt-tokens", "5"];
        command(&["bench", "--direct", model, "--output-tokens", "2"])
            .args(args)
            .env("QWEN_SERVER_LOAD_FORMAT", "dummy")
            .env("QWEN_SERVER_DEVICE", "cpu")
            .env("QWEN_SERVER_KV_CACHE_MEMORY", "32MiB")
            .output()
            .unwrap()
    };
    let output = bench("qwen2.5-0.5b-instruct:q4_0");
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("RANDOM") && text.contains("noise"), "{text}");
    assert!(stdout(&output).starts_with("qwen2.5-0.5b-instruct at "), "{}", stdout(&output));

    let output = bench("qwen2.5-0.5b-instruct:q2_k");
    assert_fails(&output, "have no quantisation `q2_k`");
    assert_fails(&bench("gpt-2"), "knows no model `gpt-2`");
}

/// Fails with the message on one line and nothing on standard output.
fn assert_fails(output: &Output, message: &str) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("error: ") && text.contains(message), "{text}");
    let is_explained = |line: &str| line.starts_with("hint: ");
    assert!(text.lines().skip(1).all(is_explained), "{text}");
    assert_eq!(stdout(output), "");
}

mod arguments {
    use super::*;

    #[test]
    fn every_command_explains_itself() {
        let output = run(&["--help"]);
        assert_eq!(output.status.code(), Some(0));
        let commands = [
            "serve", "pull", "models", "chat", "complete", "inspect", "bundle", "unbundle", "key",
            "bench", "usage",
        ];
        for name in commands {
            assert!(stdout(&output).contains(&format!("\n  {name} ")), "{name}");
            for flag in ["-h", "--help"] {
                let help = run(&[name, flag]);
                assert_eq!(help.status.code(), Some(0));
                assert!(stdout(&help).contains(&format!("Usage: qwen-server {name}")), "{name}");
                assert_eq!(stderr(&help), "");
            }
        }
    }

    #[test]
    fn help_of_serve_groups_its_flags_and_names_their_defaults() {
        let help = stdout(&run(&["serve", "--help"]));
        let parts = [
            "\nModel:\n",
            "\nNetwork:\n",
            "\nAccess:\n",
            "\nEncryption:\n",
            "\nComputing:\n",
            "\nKV cache:\n",
            "\nLogging:\n",
            "\nUsage:\n",
            "--max-num-seqs <N>",
            "[env: QWEN_SERVER_MAX_NUM_SEQS]",
            "[default: qwen2.5-coder-0.5b-instruct]",
            "[default: 127.0.0.1]",
            "[default: 8000]",
            "[default: 64]",
            "[default: 256]",
            "[default: 16]",
            "- json: One JSON object a line",
            "Examples:\n",
        ];
        for part in parts {
            assert!(help.contains(part), "{part} is missing in\n{help}");
        }
    }

    #[test]
    fn version_is_the_packages() {
        let output = run(&["--version"]);
        assert_eq!(stdout(&output), concat!("qwen-server ", env!("CARGO_PKG_VERSION"), "\n"));
    }

    #[test]
    fn unusable_arguments_exit_with_2() {
        let cases: [(&[&str], &str); 11] = [
            (&[], "Usage: qwen-server <COMMAND>"),
            (&["sevre"], "unrecognized subcommand 'sevre'"),
            (&["serve", "--prot", "1"], "unexpected argument '--prot'"),
            (&["serve", "--port", "70000"], "invalid value '70000' for '--port <PORT>'"),
            (&["serve", "--alias", "x"], "expected NAME=MODEL"),
            (&["serve", "--max-num-seqs", "0"], "0 is not in 1..=8192"),
            (&["serve", "--kv-cache-memory", "4G"], "expected a size such as 24MiB"),
            (&["serve", "--device", "gpu"], "expected auto, cpu or cuda:N"),
            (&["serve", "--kv-cache-dtype", "q8"], "[possible values: f16, bf16, f32, fp8, q8_0]"),
            (&["bench", "--concurrency", "0"], "0 is not in 1..=1024"),
            (&["complete", "x", "--max-tokens", "x"], "'x' for '--max-tokens <N>'"),
        ];
        for (args, message) in cases {
            let output = run(args);
            assert_eq!(output.status.code(), Some(2), "{args:?}");
            assert!(stderr(&output).contains(message), "{args:?}: {}", stderr(&output));
        }
    }

    #[test]
    fn an_unusable_variable_names_its_flag() {
        let output = command(&["serve", "--print-config"])
            .env("QWEN_SERVER_MAX_NUM_SEQS", "many")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("invalid value 'many' for '--max-num-seqs <N>'"));
    }

    #[test]
    fn values_that_do_not_go_together_are_refused() {
        let cases: [(&[&str], &str); 6] = [
            (&["--block-size", "24"], "`--block-size` must be a power of two, but is 24"),
            (
                &["--max-num-seqs", "600", "--max-num-batched-tokens", "256"],
                "`--max-num-batched-tokens` must be at least `--max-num-seqs` (600), but is 256",
            ),
            (&["--kv-cache-memory", "1KiB"], "`--kv-cache-memory` must be at least 1 MiB"),
            (&["--max-body-size", "1"], "`--max-body-size` must be at least 1 KiB, but is 1 B"),
            (&["--model-alias", "a,,b"], "`--model-alias` must not be empty"),
            (&["--model", " "], "`--model` must not be empty"),
        ];
        for (args, message) in cases {
            let output = run(&[&["serve", "--print-config"], args].concat());
            assert_fails(&output, message);
        }
    }
}

mod configuration {
    use super::*;

    /// The value and source of a setting as `serve --print-config` shows them.
    fn setting(output: &Output, key: &str) -> (String, String) {
        assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
        let text = stdout(output);
        let line = text.lines().find(|line| line.starts_with(&format!("{key} = ")));
        let line = line.unwrap_or_else(|| panic!("no {key} in\n{text}"));
        let (setting, source) = line.rsplit_once(" # ").unwrap();
        let value = setting.split_once(" = ").unwrap().1.trim();
        (value.to_owned(), source.to_owned())
    }

    fn assert_setting(output: &Output, key: &str, value: &str, source: &str) {
        assert_eq!(setting(output, key), (value.to_owned(), source.to_owned()), "{key}");
    }

    #[test]
    fn a_flag_wins_over_the_environment_over_the_file_over_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("server.toml");
        let text = "max-num-seqs = 3\nport = 9001\nlog_format = \"json\"\nserved-model-name = \
                    [\"a\", \"b\"]\nenable_prefix_caching = false\nkv-cache-memory = \"24MiB\"\n[aliases]\n\"qwen-*\" = \"a\"\n";
        std::fs::write(&file, text).unwrap();
        let output = command(&["serve", "--print-config", "--config"])
            .arg(&file)
            .args(["--port", "9003", "--no-enable-prefix-caching"])
            .env("QWEN_SERVER_PORT", "9002")
            .env("QWEN_SERVER_MAX_NUM_SEQS", "4")
            .env("QWEN_SERVER_MODEL_ALIAS", "x,y")
            .output()
            .unwrap();
        assert_setting(&output, "port", "9003", "flag");
        assert_setting(&output, "max-num-seqs", "4", "environment");
        assert_setting(&output, "model-alias", "[\"x\", \"y\"]", "environment");
        assert_setting(&output, "alias", "[\"qwen-*=a\"]", "file");
        assert_setting(&output, "log-format", "\"json\"", "file");
        assert_setting(&output, "served-model-name", "[\"a\", \"b\"]", "file");
        assert_setting(&output, "kv-cache-memory", "\"24MiB\"", "file");
        assert_setting(&output, "enable-prefix-caching", "false", "flag");
        assert_setting(&output, "host", "\"127.0.0.1\"", "default");
        assert_setting(&output, "block-size", "16", "default");
    }

    #[test]
    fn the_file_can_be_named_by_the_environment_and_what_is_printed_is_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("server.toml");
        let first = run(&["serve", "--print-config", "--seed", "5", "--model-alias", "é\"\\"]);
        std::fs::write(&file, stdout(&first)).unwrap();
        let second = command(&["serve", "--print-config"])
            .env("QWEN_SERVER_CONFIG", &file)
            .output()
            .unwrap();
        for key in ["model", "port", "seed", "threads", "model-alias", "enable-prefix-caching"] {
            let (value, _) = setting(&first, key);
            assert_setting(&second, key, &value, "file");
        }
    }

    #[test]
    fn a_default_gives_way_to_the_limit_that_was_set() {
        let more_sequences = run(&["serve", "--print-config", "--max-num-seqs", "512"]);
        assert_setting(&more_sequences, "max-num-batched-tokens", "512", "default");
        let fewer_tokens = run(&["serve", "--print-config", "--max-num-batched-tokens", "32"]);
        assert_setting(&fewer_tokens, "max-num-seqs", "32", "default");
        assert_setting(&fewer_tokens, "max-prefill-tokens-while-decoding", "96", "default");
    }

    #[test]
    fn prefix_caching_can_be_switched_either_way() {
        let cases: [(&[&str], &str, &str); 4] = [
            (&[], "true", "default"),
            (&["--enable-prefix-caching"], "true", "flag"),
            (&["--enable-prefix-caching=false"], "false", "flag"),
            (&["--no-enable-prefix-caching", "--enable-prefix-caching"], "true", "flag"),
        ];
        for (args, value, source) in cases {
            let output = run(&[&["serve", "--print-config"], args].concat());
            assert_setting(&output, "enable-prefix-caching", value, source);
        }
        let output = command(&["serve", "--print-config"])
            .env("QWEN_SERVER_ENABLE_PREFIX_CACHING", "false")
            .output()
            .unwrap();
        assert_setting(&output, "enable-prefix-caching", "false", "environment");
    }

    #[test]
    fn a_wrong_file_is_one_line_naming_the_place() {
        let cases = [
            ("prot = 1", "unknown key `prot`; did you mean `port`"),
            ("max_seqs = 1", "unknown key `max_seqs`; "),
            ("port = \"x\"", "`port` must be an integer, but is a string"),
            ("port = 70000", "invalid value '70000' for '--port <PORT>'"),
            ("log-level = \"loud\"", "invalid value 'loud' for '--log-level <LEVEL>'"),
            ("port = 1\nport = 2", "line 2: duplicate key"),
            ("port", "line 1: "),
            ("block-size = 24", "`--block-size` must be a power of two"),
        ];
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("server.toml");
        for (text, message) in cases {
            std::fs::write(&file, text).unwrap();
            let output = command(&["serve", "--print-config", "--config"]).arg(&file).output();
            assert_fails(&output.unwrap(), message);
        }
        let output = run(&["serve", "--config", "/nonexistent/server.toml"]);
        assert_fails(&output, "cannot read config file `/nonexistent/server.toml`: No such file");
    }

    /// Kubernetes sets this variable beside a service of the same name.
    #[test]
    fn an_address_injected_as_port_is_ignored() {
        let output = command(&["serve", "--print-config"])
            .env("QWEN_SERVER_PORT", "tcp://10.0.0.1:8000")
            .output()
            .unwrap();
        assert_setting(&output, "port", "8000", "default");
    }
}

/// A server that says what it was told to, and remembers what it was asked.
struct FakeServer {
    url: String,
    requests: Arc<Mutex<Vec<(String, Value)>>>,
}

impl FakeServer {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let log = Arc::clone(&log);
                thread::spawn(move || answer(stream.unwrap(), &log));
            }
        });
        Self { url, requests }
    }

    fn requests(&self, path: &str) -> Vec<Value> {
        let requests = self.requests.lock().unwrap();
        requests.iter().filter(|(p, _)| p == path).map(|(_, body)| body.clone()).collect()
    }
}

fn answer(stream: TcpStream, log: &Mutex<Vec<(String, Value)>>) {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).unwrap_or(0) == 0 {
            return;
        }
    }
    let header = |name: &str| {
        head.lines().find_map(|line| {
            Some(line.split_once(": ")?.1.to_owned())
                .filter(|_| line.to_ascii_lowercase().starts_with(name))
        })
    };
    let mut body = vec![0; header("content-length").map_or(0, |len| len.parse().unwrap())];
    reader.read_exact(&mut body).unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let path = head.split(' ').nth(1).unwrap().to_owned();
    let (status, kind, text) = respond(&path, &body);
    log.lock().unwrap().push((path, body));
    let stalls = text.contains("stall");
    let mut stream = reader.into_inner();
    // Cut anywhere: clients must not depend on what arrives together.
    let text = if stalls { text.replace("data: [DONE]\n\n", "") } else { text };
    let head = format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n");
    for piece in (head + &text).as_bytes().chunks(7) {
        if stream.write_all(piece).is_err() {
            return;
        }
    }
    if stalls {
        // Until the client leaves.
        let _ = stream.read(&mut [0]);
    }
}

fn respond(path: &str, body: &Value) -> (&'static str, &'static str, String) {
    let ok = |body: Value| ("200 OK", "application/json", body.to_string());
    let sse = |events: Vec<Value>| {
        let events: Vec<String> = events.iter().map(|event| format!("data: {event}\n\n")).collect();
        let events = events.concat();
        ("200 OK", "text/event-stream", format!(": keep-alive\n\n{events}data: [DONE]\n\n"))
    };
    match path {
        "/v1/models" => ok(json!({"data": [{"id": "first"}, {"id": "second"}]})),
        "/tokenize" => ok(json!({"tokens": [10, 11, 12, 13, 14, 15, 16, 17], "count": 8})),
        "/v1/completions" if body["prompt"] == "refuse" => {
            let error = json!({"error": {"message": "no\nthanks", "code": null}});
            ("400 Bad Request", "application/json", error.to_string())
        }
        "/v1/completions" if body["prompt"] == "break" => {
            ("200 OK", "text/event-stream", "data: {\"choices\":[]}\n\n".to_owned())
        }
        "/v1/completions" => {
            let num_tokens = body["max_tokens"].as_u64().unwrap();
            let text = |i| json!({"choices": [{"text": format!("é{i} "), "finish_reason": null}]});
            let mut events: Vec<Value> = (0..num_tokens).map(text).collect();
            events.push(json!({"choices": [{"text": "", "finish_reason": "length"}]}));
            let num_prompt_tokens = body["prompt"].as_array().map_or(1, Vec::len);
            let usage =
                json!({"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens});
            events.push(json!({"choices": [], "usage": usage}));
            sse(events)
        }
        "/v1/chat/completions" => {
            let messages = body["messages"].as_array().unwrap();
            let last = messages.last().unwrap()["content"].as_str().unwrap();
            let text = |text: &str| json!({"choices": [{"delta": {"content": text}}]});
            sse(vec![text(""), text(&messages.len().to_string()), text(":"), text(last)])
        }
        _ => ("404 Not Found", "application/json", json!({"error": {"message": "?"}}).to_string()),
    }
}

mod clients {
    use super::*;

    #[test]
    fn without_a_server_the_error_says_how_to_start_one() {
        // A port that was free a moment ago.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let url = format!("http://127.0.0.1:{port}");
        for args in [&["chat"][..], &["complete", "x"], &["bench"]] {
            let output = run(&[args, &["--url", &url]].concat());
            assert_fails(&output, &format!("no server answers at {url}"));
            assert!(stderr(&output).contains("hint: start one with `qwen-server serve`"));
        }
    }

    #[test]
    fn complete_streams_the_continuation() {
        let server = FakeServer::start();
        let args = ["complete", "hello", "--max-tokens", "3", "--temperature", "0", "--stop", "X"];
        let output = run(&[&args[..], &["--url", &server.url]].concat());
        assert_eq!(stdout(&output), "é0 é1 é2 \n", "{}", stderr(&output));
        let expected = json!({"model": "first", "prompt": "hello", "max_tokens": 3, "stream": true,
                              "temperature": 0.0, "stop": ["X"]});
        assert_eq!(server.requests("/v1/completions"), [expected]);
    }

    #[test]
    fn complete_reads_the_prompt_from_standard_input() {
        let server = FakeServer::start();
        let mut child = command(&["complete", "--model", "second"])
            .env("QWEN_SERVER_URL", &server.url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all("from\na pipe".as_bytes()).unwrap();
        assert!(child.wait_with_output().unwrap().status.success());
        let request = &server.requests("/v1/completions")[0];
        assert_eq!(
            (&request["prompt"], &request["model"]),
            (&json!("from\na pipe"), &json!("second"))
        );
        assert_fails(&run(&["complete", "--url", &server.url]), "there is no prompt");
    }

    #[test]
    fn refusals_and_broken_answers_are_errors() {
        let server = FakeServer::start();
        let output = run(&["complete", "refuse", "--url", &server.url]);
        assert_fails(&output, "/v1/completions refused: no thanks: HTTP status 400");
        let output = run(&["complete", "break", "--url", &server.url]);
        assert_fails(&output, "before the answer was complete");
    }

    #[test]
    fn chat_remembers_until_told_otherwise() {
        let server = FakeServer::start();
        let mut child = command(&["chat", "--system", "Be brief.", "--url", &server.url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let input = "one\n\ntwo\n/nwe\n/new\nthree\n/quit\nfour\n";
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        // System prompt, then alternating; the counts are of all messages sent.
        assert_eq!(stdout(&output), "2:one\n4:two\n2:three\n");
        assert!(stderr(&output).contains("There is no /nwe."));
        let second = &server.requests("/v1/chat/completions")[1];
        let expected = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "2:one"},
            {"role": "user", "content": "two"},
        ]);
        assert_eq!(second["messages"], expected);
    }

    /// Ctrl-C during an answer, while the server is silent, stops that answer only.
    #[test]
    fn an_interrupted_answer_is_stopped_and_the_chat_goes_on() {
        let server = FakeServer::start();
        let mut child = command(&["chat", "--url", &server.url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let mut output = child.stdout.take().unwrap();
        input.write_all(b"stall\n").unwrap();
        let mut begun = [0; "1:stall".len()];
        output.read_exact(&mut begun).unwrap();
        assert_eq!(&begun, b"1:stall");
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        input.write_all(b"go on\n").unwrap();
        drop(input);
        let mut rest = String::new();
        output.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, " [stopped]\n3:go on\n");
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn bench_measures_every_level_and_writes_its_files() {
        let server = FakeServer::start();
        let dir = tempfile::tempdir().unwrap();
        let (json_file, svg_file) = (dir.path().join("out.json"), dir.path().join("out.svg"));
        let output = command(&["bench", "--url", &server.url, "--concurrency", "1,3"])
            .args(["--prompt-tokens", "20", "--output-tokens", "5", "--requests", "6"])
            .args(["--runs", "2", "--json"])
            .arg(&json_file)
            .arg("--plot")
            .arg(&svg_file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let table = stdout(&output);
        assert!(table.starts_with("first at http://127.0.0.1:"), "{table}");
        assert_eq!(table.lines().count(), 6, "{table}");

        let report: Value = serde_json::from_slice(&std::fs::read(json_file).unwrap()).unwrap();
        for (level, concurrency) in report["levels"].as_array().unwrap().iter().zip([1, 3]) {
            assert_eq!(level["concurrency"], concurrency);
            assert_eq!((&level["num_requests"], &level["num_failed"]), (&json!(12), &json!(0)));
            assert_eq!(level["prompt_tokens"], 12 * 20);
            assert_eq!(level["output_tokens"], 12 * 5);
            assert!(level["ttft_ms"]["p50"].as_f64().unwrap() > 0.0);
        }
        assert!(std::fs::read_to_string(svg_file).unwrap().ends_with("</svg>\n"));

        // One request to warm up, and no prompt twice.
        let requests = server.requests("/v1/completions");
        assert_eq!(requests.len(), 1 + 24);
        let mut prompts: Vec<String> = requests.iter().map(|r| r["prompt"].to_string()).collect();
        prompts.sort();
        prompts.dedup();
        assert_eq!(prompts.len(), 25);
        assert!(requests.iter().all(|r| r["ignore_eos"] == true && r["max_tokens"] == 5));
    }
}

mod usage {
    use qwen_server::ledger::{Counts, Ledger};

    use super::*;

    #[test]
    fn the_config_file_of_the_server_names_ledger_and_prices() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.db");
        let ledger = Ledger::open(&path).unwrap();
        let counts = Counts { requests: 1, prompt_tokens: 2_000_000, ..Counts::default() };
        ledger.record(std::time::SystemTime::now(), ("alice".into(), "m".into()), counts);
        ledger.close();
        let config = folder.path().join("qwen.toml");
        let text = format!(
            "port = 9\nusage-ledger = {path:?}\ncurrency = 'EUR'\n[prices]\nm = '0.15,0.6'\n"
        );
        std::fs::write(&config, text).unwrap();
        let report = |more: &[&str]| {
            let config = config.to_str().unwrap();
            stdout(&run(&[&["usage", "--config", config, "--by", "key"], more].concat()))
        };
        let table = report(&[]);
        assert!(table.contains("cost (EUR)") && table.contains(" 0.300000\n"), "{table}");
        // A flag wins over the file.
        assert!(report(&["--currency", "CNY"]).contains("cost (CNY)"));
        assert!(report(&["--since", "2020-01-01", "--until", "2020-01-02"]).contains("total"));
    }

    #[test]
    fn what_cannot_be_reported_is_one_line() {
        let output = run(&["usage"]);
        assert_fails(&output, "no usage ledger is named");
        assert!(stderr(&output).contains("hint: pass `--ledger FILE`"));
        assert_fails(&run(&["usage", "--ledger", "none.db"]), "there is no usage ledger `none.db`");
        let output = run(&["usage", "--ledger", "none.db", "--since", "yesterday"]);
        assert_fails(&output, "`--since`: `yesterday` is no time");
    }
}
