//! `qwen-server complete`: one prompt in, its continuation out.

use std::io::{IsTerminal, Read, Write};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::cli::client::ServerArgs;

const AFTER_HELP: &str = "\
Examples:
  qwen-server complete 'def fibonacci(n):' --max-tokens 100
  git diff | qwen-server complete --temperature 0.2";

/// The arguments of `complete`.
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CompleteArgs {
    /// Text to continue, without any chat template [default: standard input]
    prompt: Option<String>,

    /// Stop after this many tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: u32,

    /// Randomness from 0 (always the likeliest token) to 2 [default: the model's]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,

    /// Draw from the likeliest tokens that make up this share [default: the model's]
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,

    /// Same seed, same text
    #[arg(long, value_name = "N")]
    seed: Option<i64>,

    /// Stop before this text [repeatable]
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    #[command(flatten)]
    server: ServerArgs,
}

/// Streams the continuation to standard output.
///
/// # Errors
/// If there is no prompt or no server, or the answer breaks off.
pub fn run(args: CompleteArgs) -> Result<()> {
    let (client, model) = args.server.connect()?;
    let prompt = match args.prompt {
        Some(prompt) => prompt,
        None => read_prompt()?,
    };
    let mut body = json!({
        "model": model,
        "prompt": prompt,
        "max_tokens": args.max_tokens,
        "stream": true,
    });
    let optional = [
        ("temperature", args.temperature.map(Value::from)),
        ("top_p", args.top_p.map(Value::from)),
        ("seed", args.seed.map(Value::from)),
        ("stop", (!args.stop.is_empty()).then(|| Value::from(args.stop))),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            body[name] = value;
        }
    }
    let mut output = std::io::stdout().lock();
    for event in client.stream("/v1/completions", &body)? {
        if let Some(text) = event?["choices"][0]["text"].as_str() {
            output.write_all(text.as_bytes())?;
            output.flush()?;
        }
    }
    writeln!(output)?;
    Ok(())
}

fn read_prompt() -> Result<String> {
    let mut input = std::io::stdin();
    if input.is_terminal() {
        eprintln!("Reading the prompt from the terminal; end it with Ctrl-D.");
    }
    let mut prompt = String::new();
    input.read_to_string(&mut prompt).context("cannot read the prompt from standard input")?;
    if prompt.is_empty() {
        bail!("there is no prompt: give one as an argument or on standard input");
    }
    Ok(prompt)
}
