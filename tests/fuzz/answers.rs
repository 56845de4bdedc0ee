//! Answers of models: however a text is cut, it reads the same; nothing is lost; arguments are
//! whole no sooner than they are over.

use std::sync::Arc;

use qwen_server::chat::answer::{AnswerFormat, AnswerReader, Pieces};
use qwen_server::chat::reasoning::ReasoningStart;
use qwen_server::chat::tool_call::{BareToolCalls, ToolCallFormat, ToolReading};
use qwen_server::chat::tools::{Demand, Tool};
use serde_json::{Value, json};

use crate::fuzzer::{Random, fuzz, outcome};

const WORDS: [&str; 30] = [
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "<function=add>",
    "</function>",
    "<parameter=a>",
    "<parameter=text>\n",
    "\n</parameter>\n",
    "{\"name\": \"add\", \"arguments\": ",
    "{\"name\": \"now\"}",
    "{\"arguments\": {}, \"name\": \"now\"}",
    "\"arguments\": \"{}\"",
    "\"arguments\": null",
    "{\"a\": 1}",
    "```json\n",
    "```",
    "<think>",
    "</think>",
    "\n</think>\n\n",
    "null",
    "true",
    "-1.5e3",
    "\\u00e9",
    "\\\"",
    "\u{85}",
    "é",
    "中",
    "}}",
    "]]",
    ", ",
];

#[derive(Debug, Default, PartialEq)]
struct Folded {
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
    has_whole_calls: bool,
}

fn tools() -> Arc<[Tool]> {
    let tool = |name: &str, parameters: Value| Tool {
        name: name.to_owned(),
        parameters,
        param: String::new(),
        is_strict: false,
    };
    let add = json!({"type": "object", "properties": {
        "a": {"type": "integer"}, "text": {"type": "string"}, "any": {"anyOf": [{"type": "null"}, {"type": "string"}]},
    }});
    [tool("add", add), tool("now", json!({"type": "object"}))].into()
}

fn read<'a>(format: &AnswerFormat, pieces: impl Iterator<Item = &'a str>) -> Folded {
    let mut reader = AnswerReader::new(format, 0);
    let (mut folded, mut out) = (Folded::default(), Pieces::default());
    for piece in pieces {
        if reader.is_complete() {
            break;
        }
        reader.push(piece, &mut out);
        fold(&mut folded, std::mem::take(&mut out));
    }
    reader.finish(&mut out);
    fold(&mut folded, out);
    folded.has_whole_calls = reader.has_whole_calls();
    folded
}

fn fold(folded: &mut Folded, out: Pieces) {
    folded.reasoning.push_str(&out.reasoning);
    folded.content.push_str(&out.content);
    for part in out.tool_calls {
        let index = part.index as usize;
        assert_eq!(part.id.is_some(), index == folded.calls.len(), "only the first has an id");
        if let Some(name) = part.name {
            assert_eq!(part.arguments, "");
            folded.calls.push((name, String::new()));
        } else {
            let (_, arguments) = &mut folded.calls[index];
            let is_whole = serde_json::from_str::<Value>(arguments).is_ok();
            assert!(!is_whole, "`{arguments}` was whole before `{}`", part.arguments);
            arguments.push_str(&part.arguments);
        }
    }
}

/// The text in pieces.
fn split<'a>(text: &'a str, random: &mut Random) -> Vec<&'a str> {
    let mut rest = text;
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let mut end = (1 + random.below(20)).min(rest.len());
        while !rest.is_char_boundary(end) {
            end += 1;
        }
        let (piece, more) = rest.split_at(end);
        pieces.push(piece);
        rest = more;
    }
    pieces
}

#[test]
fn answers_read_the_same_however_they_are_cut() {
    let tools = tools();
    fuzz("answers", &WORDS, |input, random| {
        let text = String::from_utf8_lossy(input);
        // The length says which way of reading, so that an input alone repeats a failure.
        let ways = text.len();
        let reading = ToolReading {
            format: [ToolCallFormat::Hermes, ToolCallFormat::QwenCoder][ways % 2],
            tools: Arc::clone(&tools),
            bare: [BareToolCalls::Accepted, BareToolCalls::Text][ways / 2 % 2],
            demand: Demand::MayCall,
            max_calls: [u32::MAX, 1][ways / 4 % 2],
            id_seed: "fuzz".into(),
        };
        let starts = [None, None, Some(ReasoningStart::Before), Some(ReasoningStart::Inside)];
        let reasoning = starts[ways / 8 % 4];
        let format = AnswerFormat { reasoning, tools: Some(Arc::new(reading)) };
        let whole = read(&format, [&*text].into_iter());
        assert_eq!(read(&format, split(&text, random).into_iter()), whole, "in pieces");
        let chars = text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]);
        assert_eq!(read(&format, chars), whole, "in characters");
        if whole.calls.is_empty() && reasoning.is_none() {
            assert_eq!(whole.content, text, "text that is no call is content");
        }
        assert!(!whole.has_whole_calls || !whole.calls.is_empty());
        let is_json = |call: &(String, String)| serde_json::from_str::<Value>(&call.1).is_ok();
        let lengths = [whole.content.len(), whole.reasoning.len()].map(|len| len.min(3));
        let calls: Vec<bool> = whole.calls.iter().take(4).map(is_json).collect();
        outcome(&(ways % 32, lengths, calls, whole.has_whole_calls))
    });
}
