//! Vocabularies: they make a tokenizer that can encode and decode anything, or are refused.

use qwen_server::text::{SpecialTokens, TokenId, Tokenizer, TokenizerSpec};

use crate::fuzzer::{fuzz, outcome};

const WORDS: [&str; 16] = [
    "qwen2\n",
    " a",
    " b",
    " ab",
    "\na b",
    " 1",
    " 3",
    " 4",
    " 5",
    " -1",
    " [PAD0]",
    " <|im_end|>",
    " Ġ",
    " é",
    "\"merges\": [[\"a\", \"b\"]]",
    "\"vocab\": {\"a\": 0}",
];
const TEXTS: [&str; 4] = ["", "ab ba<|im_end|>", "é\u{301} 中\r\n\t 12", "<think>\u{0}\u{10ffff}"];

/// Four lines: the kind, tokens, merges (two words each) and types.
fn spec(text: &str) -> TokenizerSpec {
    let mut lines = text.split('\n');
    let mut words = || {
        let line = lines.next().unwrap_or_default();
        line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect::<Vec<_>>()
    };
    let pre = words().concat();
    let tokens = words();
    let merges = words().chunks(2).map(|pair| pair.join(" ")).collect();
    let types: Vec<i32> = words().iter().filter_map(|word| word.parse().ok()).collect();
    // Mostly as many as there should be, so that more than the number is looked at.
    let token_types = match types.len() % 7 {
        6 => types,
        _ => (0..tokens.len()).map(|i| types.get(i).copied().unwrap_or(1)).collect(),
    };
    TokenizerSpec { tokens, merges, token_types, pre }
}

#[test]
fn vocabularies_are_usable_or_refused() {
    fuzz("tokenizers", &WORDS, |input, _| {
        let text = String::from_utf8_lossy(input);
        let built = if text.starts_with('{') {
            Tokenizer::from_json(input)
        } else {
            Tokenizer::from_spec(spec(&text))
        };
        let tokenizer = match built {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                let told = error.to_string();
                let told: String = told.chars().filter(char::is_ascii_lowercase).take(40).collect();
                return outcome(&told);
            }
        };
        let mut lengths = Vec::new();
        for text in TEXTS.iter().copied().chain([&*text]) {
            let ids = tokenizer.encode(text).unwrap();
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()), "{ids:?}");
            let shown = tokenizer.decode(&ids, SpecialTokens::Keep);
            lengths.push((ids.len().min(9), shown.len().min(9)));
        }
        let all: Vec<TokenId> = (0..tokenizer.vocab_size() as TokenId + 2).collect();
        tokenizer.decode(&all, SpecialTokens::Keep);
        outcome(&(tokenizer.vocab_size().min(9), lengths))
    });
}
