//! What grammars cost at the vocabulary of a real model: the index of its tokens, compiling, and a
//! mask per token. `QWEN_SERVER_TEST_MODEL` names the GGUF file.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use qwen_server::grammar::{Constraint, GrammarCompiler, GrammarMatcher};
use qwen_server::text::{Tokenizer, TokenizerSpec};
use qwen_server::weights::gguf::{Gguf, Metadata};
use serde_json::{Value, json};

fn main() -> anyhow::Result<()> {
    let path =
        std::env::var("QWEN_SERVER_TEST_MODEL").context("QWEN_SERVER_TEST_MODEL is unset")?;
    let gguf = Gguf::open(Path::new(&path))?;
    let metadata: &Metadata = gguf.metadata();
    let tokenizer = Arc::new(Tokenizer::from_spec(TokenizerSpec {
        tokens: metadata.strings("tokenizer.ggml.tokens")?,
        merges: metadata.strings("tokenizer.ggml.merges")?,
        token_types: metadata.i32s("tokenizer.ggml.token_type")?,
        pre: metadata.str("tokenizer.ggml.pre")?.to_owned(),
    })?);
    let end = tokenizer.id_of("<|im_end|>").context("no end")?;
    let compiler = GrammarCompiler::new(Arc::clone(&tokenizer), &[end]);
    let before = resident_bytes()?;
    let started = Instant::now();
    compiler.compile(&Constraint::JsonObject)?;
    println!(
        "index of {} tokens: {:?}, {} MiB",
        tokenizer.vocab_size(),
        started.elapsed(),
        resident_bytes()?.saturating_sub(before) >> 20
    );
    let samples = [
        (
            "any JSON",
            Constraint::Json(json!({})),
            r#"{"name": "Ada Lovelace", "tags": [1, 2.5, "x y z"], "note": "a longer piece of text"}"#,
        ),
        (
            "schema",
            Constraint::Json(schema()),
            r#"{"name": "Ada Lovelace", "year": 1815, "tags": ["maths", "engines"]}"#,
        ),
        (
            "letters",
            Constraint::Regex("[a-zA-Z ,.]{2000}".into()),
            "The story of a number that nobody had counted, told by itself.",
        ),
        (
            "regex",
            Constraint::Regex(r"\d{4}-\d{2}-\d{2} .{0,60}".into()),
            "1815-12-10 the birthday of Ada Lovelace",
        ),
    ];
    for (name, constraint, text) in samples {
        let started = Instant::now();
        let grammar = compiler.compile(&constraint)?;
        let compiled = started.elapsed();
        let tokens = tokenizer.encode_plain(text)?;
        for round in ["cold", "warm"] {
            let mut matcher = GrammarMatcher::new(Arc::clone(&grammar));
            let mut times = Vec::new();
            let started = Instant::now();
            for &token in &tokens {
                let began = Instant::now();
                let mask = matcher.mask()?.context("no mask")?;
                times.push(began.elapsed());
                if !mask.allows(token) {
                    println!("{name}: stopped at token {}", times.len());
                    break;
                }
                matcher.accept(token)?;
            }
            let total = started.elapsed();
            times.sort();
            println!(
                "{name}: compiled in {compiled:?}; {round}: {} tokens, {:?} each, median mask {:?}, longest {:?}",
                times.len(),
                total / times.len() as u32,
                times[times.len() / 2],
                times.last().copied().unwrap_or(Duration::ZERO),
            );
        }
    }
    Ok(())
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "year": {"type": "integer", "minimum": 0, "maximum": 3000},
            "tags": {"type": "array", "items": {"enum": ["maths", "engines", "poetry"]}},
        },
        "required": ["name", "year", "tags"],
        "additionalProperties": false,
    })
}

fn resident_bytes() -> anyhow::Result<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages = statm.split(' ').nth(1).context("no second number")?;
    Ok(pages.parse::<usize>()? * 4096)
}
