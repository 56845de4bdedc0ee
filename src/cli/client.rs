//! A blocking client of a running server, for the commands that talk to one.

use std::io::Read;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::Value;

use crate::cli::Hinted;
use crate::cli::sse::SseParser;
use crate::config::SecretText;

/// How long to wait for a connection. Answers may take as long as they need.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest part of an error response that is read.
const MAX_ERROR_BYTES: u64 = 64 << 10;

/// Which server to talk to.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServerArgs {
    /// Where the server listens
    #[arg(long, env = "QWEN_SERVER_URL", default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,

    /// Model to ask for [default: the first one the server names]
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,

    /// The key to show, if the server asks for one; better set by its variable
    #[arg(long, env = "QWEN_SERVER_API_KEY", value_name = "KEY")]
    pub(crate) api_key: Option<SecretText>,
}

impl ServerArgs {
    /// A client, and the model to ask for.
    pub(crate) fn connect(&self) -> Result<(Client, String)> {
        let client = Client::new(&self.url, self.api_key.as_ref());
        let models = client.get("/v1/models")?;
        let model = match &self.model {
            Some(model) => model.clone(),
            None => models["data"][0]["id"]
                .as_str()
                .with_context(|| format!("{} serves no model", self.url))?
                .to_owned(),
        };
        Ok((client, model))
    }
}

/// A connection pool to one server.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    base: String,
    key: Option<SecretText>,
    agent: ureq::Agent,
}

impl Client {
    pub(crate) fn new(url: &str, key: Option<&SecretText>) -> Self {
        let base = url.trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        let base = if base.contains("://") { base.to_owned() } else { format!("http://{base}") };
        // One connection per thread of a measurement is kept.
        let agent = ureq::AgentBuilder::new()
            .timeout_connect(CONNECT_TIMEOUT)
            .max_idle_connections_per_host(1024)
            .build();
        Self { base, key: key.cloned(), agent }
    }

    pub(crate) fn get(&self, path: &str) -> Result<Value> {
        let response = self.request("GET", path).call();
        self.json(path, response)
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let response = self.request("POST", path).send_json(body);
        self.json(path, response)
    }

    /// Posts a request with `stream: true`.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Result<Events> {
        let response = self.request("POST", path).send_json(body);
        let response = response.map_err(|error| self.explain(path, error))?;
        Ok(Events {
            reader: response.into_reader(),
            parser: SseParser::default(),
            ready: Vec::new().into_iter(),
            is_done: false,
        })
    }

    fn request(&self, method: &str, path: &str) -> ureq::Request {
        let request = self.agent.request(method, &self.url(path));
        match &self.key {
            Some(key) => request.set("authorization", &format!("Bearer {}", key.reveal())),
            None => request,
        }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    fn json(&self, path: &str, response: Result<ureq::Response, ureq::Error>) -> Result<Value> {
        let response = response.map_err(|error| self.explain(path, error))?;
        response.into_json().with_context(|| format!("{}{path} did not answer JSON", self.base))
    }

    fn explain(&self, path: &str, error: ureq::Error) -> anyhow::Error {
        match error {
            ureq::Error::Status(status, response) => {
                let mut body = String::new();
                let read = response.into_reader().take(MAX_ERROR_BYTES).read_to_string(&mut body);
                let message = read.ok().and_then(|_| error_message(&body));
                let message = message.unwrap_or_else(|| format!("status {status}"));
                anyhow!(StatusError { status })
                    .context(format!("{}{path} refused: {message}", self.base))
            }
            ureq::Error::Transport(transport) => {
                let is_unreachable = matches!(
                    transport.kind(),
                    ureq::ErrorKind::ConnectionFailed | ureq::ErrorKind::Dns
                );
                if is_unreachable {
                    return anyhow!(Hinted {
                        message: format!("no server answers at {}", self.base),
                        hint: "start one with `qwen-server serve`, or name another with --url"
                            .to_owned(),
                    });
                }
                anyhow!("cannot talk to {}{path}: {transport}", self.base)
            }
        }
    }
}

/// The status of a refusal, at the end of the error's chain.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("HTTP status {status}")]
pub(crate) struct StatusError {
    pub(crate) status: u16,
}

fn error_message(body: &str) -> Option<String> {
    let body: Value = serde_json::from_str(body).ok()?;
    Some(body["error"]["message"].as_str()?.to_owned())
}

/// The events of a streamed answer, as they arrive. Ends after `[DONE]`; anything else is an error.
pub(crate) struct Events {
    reader: Box<dyn Read + Send + Sync>,
    parser: SseParser,
    ready: std::vec::IntoIter<String>,
    is_done: bool,
}

impl Iterator for Events {
    type Item = Result<Value>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_done {
            return None;
        }
        let event = self.next_event().transpose();
        self.is_done = !matches!(event, Some(Ok(_)));
        event
    }
}

impl Events {
    fn next_event(&mut self) -> Result<Option<Value>> {
        let data = loop {
            if let Some(data) = self.ready.next() {
                break data;
            }
            let mut buffer = [0; 16 << 10];
            let num_read = self.reader.read(&mut buffer).context("the connection broke")?;
            if num_read == 0 {
                bail!("the server closed the connection before the answer was complete");
            }
            let mut events = Vec::new();
            self.parser.push(&buffer[..num_read], &mut events)?;
            self.ready = events.into_iter();
        };
        if data.starts_with("[DONE]") {
            // Reading to the end of the response makes its connection usable again.
            let _ = self.reader.read(&mut [0; 16]);
            return Ok(None);
        }
        let event: Value = serde_json::from_str(&data)
            .with_context(|| format!("the server sent an event that is not JSON: {data}"))?;
        if let Some(message) = event["error"]["message"].as_str() {
            bail!("the server gave up: {message}");
        }
        Ok(Some(event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_as_people_write_them() {
        for url in ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "h:1"] {
            assert_eq!(Client::new(url, None).url("/v1/models"), "http://h:1/v1/models");
        }
    }

    fn events(stream: &'static str) -> Vec<Result<Value>> {
        let events = Events {
            reader: Box::new(stream.as_bytes()),
            parser: SseParser::default(),
            ready: Vec::new().into_iter(),
            is_done: false,
        };
        events.collect()
    }

    #[test]
    fn a_stream_ends_with_done_or_an_error() {
        let complete = events("data: {\"x\":1}\n\ndata: {\"x\":2}\n\ndata: [DONE]\n\n");
        assert_eq!(complete.len(), 2);
        assert_eq!(complete[1].as_ref().unwrap()["x"], 2);
        for (stream, message) in [
            ("data: {\"x\":1}\n\n", "before the answer was complete"),
            ("data: {}\n\ndata: {\"error\":{\"message\":\"boom\"}}\n\ndata: {}\n\n", "boom"),
            ("data: {}\n\ndata: no\n\n", "not JSON"),
        ] {
            let events = events(stream);
            assert_eq!(events.len(), 2);
            let error = events[1].as_ref().unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
    }
}
