//! `qwen-server chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::client::{Client, ServerArgs};

const HELP: &str = "\
/new   forget the conversation and start another
/quit  leave (so does Ctrl-D)
/help  show this
Ctrl-C stops an answer; between answers it leaves.";

/// How soon Ctrl-C is noticed while the server is silent.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Pieces of an answer that may wait for a slow terminal.
const MAX_WAITING_PIECES: usize = 256;

/// The exit code of a program ended by Ctrl-C.
const INTERRUPTED: i32 = 130;

/// The arguments of `chat`.
#[derive(Clone, Debug, Args)]
pub struct ChatArgs {
    /// Instructions that every conversation starts with [default: the model's own]
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Randomness from 0 (always the likeliest token) to 2 [default: the model's]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,

    /// Cut answers after this many tokens [default: as long as the model's context allows]
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,

    #[command(flatten)]
    server: ServerArgs,
}

/// Chats until the user leaves.
///
/// # Errors
/// If there is no server, or the terminal fails.
pub fn run(args: &ChatArgs) -> Result<()> {
    let (client, model) = args.server.connect()?;
    let interrupts = Interrupts::install()?;
    let mut conversation = Conversation::new(args, model);
    let is_terminal = std::io::stdin().is_terminal();
    if is_terminal {
        eprintln!("Chatting with {}. /help lists the commands.", conversation.model);
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if is_terminal {
            eprint!("\n> ");
        }
        let Some(line) = lines.next() else {
            return Ok(());
        };
        match Input::parse(&line.context("cannot read from standard input")?) {
            Input::Nothing => {}
            Input::New => {
                conversation.forget();
                eprintln!("Forgotten.");
            }
            Input::Quit => return Ok(()),
            Input::Help => eprintln!("{HELP}"),
            Input::Unknown(command) => eprintln!("There is no {command}. {HELP}"),
            Input::Say(text) => {
                // The conversation outlives a failure; without a user there is no one to go on.
                match conversation.say(&text, &client, &interrupts) {
                    Err(error) if is_terminal => eprintln!("error: {error:#}"),
                    result => result?,
                }
            }
        }
    }
}

/// A line of the user.
#[derive(Debug, PartialEq, Eq)]
enum Input {
    Nothing,
    New,
    Quit,
    Help,
    Unknown(String),
    Say(String),
}

impl Input {
    fn parse(line: &str) -> Self {
        let line = line.trim();
        match line {
            "" => Self::Nothing,
            "/new" => Self::New,
            "/quit" | "/exit" => Self::Quit,
            "/help" => Self::Help,
            // A path or a comment is no command.
            _ if line.starts_with('/') && line[1..].chars().all(|c| c.is_ascii_lowercase()) => {
                Self::Unknown(line.to_owned())
            }
            _ => Self::Say(line.to_owned()),
        }
    }
}

/// What was said so far, and how the next answer is asked for.
struct Conversation {
    model: String,
    system: Option<String>,
    temperature: Option<f64>,
    max_tokens: Option<u32>,
    messages: Vec<Value>,
}

impl Conversation {
    fn new(args: &ChatArgs, model: String) -> Self {
        let mut conversation = Self {
            model,
            system: args.system.clone(),
            temperature: args.temperature,
            max_tokens: args.max_tokens,
            messages: Vec::new(),
        };
        conversation.forget();
        conversation
    }

    fn forget(&mut self) {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        self.messages = system.collect();
    }

    /// Sends a message and prints the answer as it comes. Both are remembered, also when the
    /// answer was stopped; after a failure neither is.
    fn say(&mut self, text: &str, client: &Client, interrupts: &Interrupts) -> Result<()> {
        let num_messages = self.messages.len();
        self.messages.push(json!({"role": "user", "content": text}));
        interrupts.start_answer();
        let answer = self.answer(client, interrupts);
        interrupts.end_answer();
        match answer {
            Ok(answer) => {
                self.messages.push(json!({"role": "assistant", "content": answer}));
                Ok(())
            }
            Err(error) => {
                self.messages.truncate(num_messages);
                Err(error)
            }
        }
    }

    fn answer(&self, client: &Client, interrupts: &Interrupts) -> Result<String> {
        let (sender, pieces) = mpsc::sync_channel(MAX_WAITING_PIECES);
        let (client, request) = (client.clone(), self.request());
        // Reading blocks while the server is silent; Ctrl-C must not wait for it. The thread ends
        // with the stream, or at the next piece after this side has left.
        thread::spawn(move || match client.stream("/v1/chat/completions", &request) {
            Ok(events) => {
                for event in events {
                    if sender.send(event).is_err() {
                        break;
                    }
                }
            }
            Err(error) => drop(sender.send(Err(error))),
        });
        let mut output = std::io::stdout().lock();
        let mut answer = String::new();
        loop {
            match pieces.recv_timeout(POLL_INTERVAL) {
                Ok(event) => {
                    if let Some(text) = event?["choices"][0]["delta"]["content"].as_str() {
                        answer.push_str(text);
                        output.write_all(text.as_bytes())?;
                        output.flush()?;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if interrupts.is_stopped() {
                output.write_all(" [stopped]".as_bytes())?;
                break;
            }
        }
        writeln!(output)?;
        Ok(answer)
    }

    fn request(&self) -> Value {
        let mut request = json!({"model": self.model, "messages": self.messages, "stream": true});
        if let Some(temperature) = self.temperature {
            request["temperature"] = temperature.into();
        }
        if let Some(max_tokens) = self.max_tokens {
            request["max_tokens"] = max_tokens.into();
        }
        request
    }
}

/// What Ctrl-C means at the moment.
struct Interrupts {
    state: Arc<InterruptState>,
}

#[derive(Default)]
struct InterruptState {
    is_answering: AtomicBool,
    is_stopped: AtomicBool,
}

impl Interrupts {
    fn install() -> Result<Self> {
        let state = Arc::new(InterruptState::default());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot listen for Ctrl-C")?;
        // From here on, not from when the thread gets to run, Ctrl-C does not end the program.
        let mut interrupts = {
            let _inside = runtime.enter();
            signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?
        };
        let of_thread = Arc::clone(&state);
        thread::spawn(move || {
            while runtime.block_on(interrupts.recv()).is_some() {
                if !of_thread.is_answering.load(Ordering::SeqCst) {
                    eprintln!();
                    process::exit(INTERRUPTED);
                }
                of_thread.is_stopped.store(true, Ordering::SeqCst);
            }
        });
        Ok(Self { state })
    }

    fn start_answer(&self) {
        self.state.is_stopped.store(false, Ordering::SeqCst);
        self.state.is_answering.store(true, Ordering::SeqCst);
    }

    fn end_answer(&self) {
        self.state.is_answering.store(false, Ordering::SeqCst);
    }

    fn is_stopped(&self) -> bool {
        self.state.is_stopped.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_messages() {
        let say = |text: &str| Input::Say(text.to_owned());
        assert_eq!(Input::parse("  "), Input::Nothing);
        assert_eq!(Input::parse("/new "), Input::New);
        assert_eq!(Input::parse("/quit"), Input::Quit);
        assert_eq!(Input::parse("/help"), Input::Help);
        assert_eq!(Input::parse("/nwe"), Input::Unknown("/nwe".to_owned()));
        assert_eq!(Input::parse("/usr/bin is what?"), say("/usr/bin is what?"));
        assert_eq!(Input::parse(" hello "), say("hello"));
    }
}
