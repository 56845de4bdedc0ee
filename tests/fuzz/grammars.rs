//! Constraints: they compile in time or are refused, and what their masks allow can be followed to
//! an end.

use std::sync::Arc;

use qwen_server::grammar::{CompileError, Constraint, GrammarCompiler, GrammarMatcher};
use qwen_server::text::TokenId;
use serde_json::Value;

use crate::api_fake::{IM_END, VOCAB_SIZE, tokenizer};
use crate::fuzzer::{Random, fuzz, outcome};

/// Tokens of an output that is followed.
const MAX_TOKENS: usize = 48;

const WORDS: [&str; 44] = [
    "{\"type\": \"string\"}",
    "{\"type\": [\"integer\", \"null\"]}",
    "\"properties\": {\"a\": ",
    "\"required\": [\"a\"], ",
    "\"additionalProperties\": false, ",
    "\"items\": ",
    "\"prefixItems\": [",
    "\"minItems\": 2, ",
    "\"maxItems\": 3, ",
    "\"anyOf\": [",
    "\"oneOf\": [",
    "\"allOf\": [",
    "\"enum\": [1, \"é\"]",
    "\"const\": null",
    "\"pattern\": \"a|b\"",
    "\"format\": \"date-time\"",
    "\"minLength\": 1, ",
    "\"maxLength\": 1000000, ",
    "\"minimum\": -1.5, ",
    "\"multipleOf\": 0.1, ",
    "\"$ref\": \"#\"",
    "\"$defs\": {\"t\": ",
    "\"not\": {}",
    "true",
    "false",
    "[a-z]",
    "{0,1000}",
    "(?:",
    "(?i)",
    "\\p{L}",
    "\\b",
    "^",
    "$",
    "|",
    ".*",
    "start: ",
    "root ::= ",
    "/x{1,5}/",
    "%ignore",
    "\"a\"",
    "\n",
    "[^a]",
    "é",
    "+",
];

fn constraint(input: &str) -> Option<Constraint> {
    let mut chars = input.chars();
    let kind = chars.next()?;
    let text = chars.as_str();
    Some(match kind {
        '0' => Constraint::Json(serde_json::from_str::<Value>(text).ok()?),
        '1' => Constraint::Regex(text.to_owned()),
        '2' => Constraint::Choice(text.split('\n').map(str::to_owned).collect()),
        _ => Constraint::Grammar(text.to_owned()),
    })
}

/// Draws what is allowed. Tells how many tokens came, and whether that was an end.
fn follow(mut matcher: GrammarMatcher, random: &mut Random) -> (usize, bool) {
    for len in 0..MAX_TOKENS {
        if matcher.is_over() {
            return (len, true);
        }
        let mask = matcher.mask().unwrap();
        let allowed = |id: &TokenId| mask.as_ref().is_none_or(|mask| mask.allows(*id));
        let allowed: Vec<TokenId> = (0..VOCAB_SIZE as TokenId).filter(allowed).collect();
        assert!(!allowed.is_empty(), "nothing may follow {len} tokens");
        let token = allowed[random.below(allowed.len())];
        if token == IM_END {
            return (len, true);
        }
        matcher.accept(token).unwrap();
    }
    (MAX_TOKENS, false)
}

#[test]
fn constraints_are_followed_or_refused() {
    let compiler = GrammarCompiler::new(Arc::new(tokenizer()), &[IM_END]);
    fuzz("grammars", &WORDS, |input, random| {
        let text = String::from_utf8_lossy(input);
        let Some(constraint) = constraint(&text) else { return outcome(&"no constraint") };
        let kind = text.chars().next();
        match compiler.compile(&constraint) {
            Ok(grammar) => {
                let (len, is_over) = follow(GrammarMatcher::new(grammar), random);
                outcome(&(kind, len / 4, is_over))
            }
            Err(CompileError::Busy) => panic!("nobody else compiles"),
            Err(CompileError::Invalid { part, message }) => {
                let told = message.chars().filter(char::is_ascii_lowercase).take(30);
                outcome(&(kind, told.collect::<String>(), part.len().min(9)))
            }
        }
    });
}
