//! Goal: calls come out as they are written, whatever is not one stays text, and how the text is
//! cut does not matter.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn reading(format: ToolCallFormat, bare: BareToolCalls, max_calls: u32) -> Arc<ToolReading> {
    let demand = Demand::MayCall;
    let tool = |name: &str, parameters: Value| Tool {
        name: name.to_owned(),
        parameters,
        param: String::new(),
        is_strict: false,
    };
    let weather = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "tags": {"type": ["array", "null"]},
        },
        "required": ["city"],
    });
    let tools = [tool("weather", weather), tool("now", json!({"type": "object"}))].into();
    Arc::new(ToolReading { format, tools, bare, demand, max_calls, id_seed: "test".into() })
}

/// Content and calls, folded as clients do.
#[derive(Debug, PartialEq)]
struct Folded {
    content: String,
    calls: Vec<(String, String)>,
}

fn read(reading: &Arc<ToolReading>, pieces: &[&str]) -> Folded {
    let mut parser = ToolCallParser::new(reading, 0);
    let mut out = Pieces::default();
    let mut folded = Folded { content: String::new(), calls: Vec::new() };
    for piece in pieces {
        parser.push(piece, &mut out);
        fold(&mut folded, &mut out);
    }
    parser.finish(&mut out);
    fold(&mut folded, &mut out);
    folded
}

fn fold(folded: &mut Folded, out: &mut Pieces) {
    let Pieces { content, tool_calls, .. } = std::mem::take(out);
    folded.content.push_str(&content);
    for part in tool_calls {
        let index = part.index as usize;
        assert_eq!(part.id.is_some(), index == folded.calls.len(), "only the first has an id");
        assert_eq!(part.id.is_some(), part.name.is_some());
        if let Some(name) = part.name {
            assert_eq!(part.arguments, "");
            folded.calls.push((name, String::new()));
        } else {
            assert_eq!(index + 1, folded.calls.len(), "calls come one after the other");
            let arguments = &mut folded.calls[index].1;
            let is_whole = |text: &str| serde_json::from_str::<Value>(text).is_ok();
            assert!(!is_whole(arguments), "`{arguments}` was whole before `{}`", part.arguments);
            arguments.push_str(&part.arguments);
        }
    }
}

fn folded(content: &str, calls: &[(&str, &str)]) -> Folded {
    let calls = calls.iter().map(|(name, arguments)| ((*name).into(), (*arguments).into()));
    Folded { content: content.to_owned(), calls: calls.collect() }
}

fn hermes(text: &str) -> Folded {
    read(&reading(ToolCallFormat::Hermes, BareToolCalls::Accepted, u32::MAX), &[text])
}

fn qwen_coder(text: &str) -> Folded {
    read(&reading(ToolCallFormat::QwenCoder, BareToolCalls::Accepted, u32::MAX), &[text])
}

#[test]
fn hermes_calls_come_out_byte_for_byte() {
    let one = r#"{"city":  "Pa\"r}is", "x": [{}, "]"]}"#;
    let text = format!(
        "Let me see. \n<tool_call>\n{{\"name\": \"weather\", \"arguments\": {one}}}\n</tool_call>\n\
         <tool_call>{{\"arguments\":{{}} , \"name\":\"now\"}}</tool_call>\n"
    );
    assert_eq!(hermes(&text), folded("Let me see.", &[("weather", one), ("now", "{}")]));
}

#[test]
fn calls_that_models_get_slightly_wrong_are_still_calls() {
    let cases = [
        // A brace too few, too many, no closing tag, arguments in a string, null or left out.
        r#"<tool_call>{"name": "now", "arguments": {}</tool_call>"#,
        r#"<tool_call>{"name": "now", "arguments": {}}}}</tool_call>"#,
        r#"<tool_call>{"name": "now", "arguments": {}}"#,
        r#"<tool_call>{"name": "now", "arguments": {}"#,
        r#"<tool_call>{"name": "now", "arguments": "{}"}</tool_call>"#,
        r#"<tool_call>{"name": "now", "arguments": null}</tool_call>"#,
        r#"<tool_call>{"name": "now"}</tool_call>"#,
        r#"<tool_call>{"id": [1, "}"], "name": "now", "arguments": {}, "x": 1}</tool_call>"#,
    ];
    for text in cases {
        assert_eq!(hermes(text), folded("", &[("now", "{}")]), "{text}");
    }
    let twice = "<tool_call>{\"name\":\"now\"}\n<tool_call>{\"name\":\"now\"}</tool_call> done";
    assert_eq!(hermes(twice), folded(" done", &[("now", "{}"), ("now", "{}")]));
}

#[test]
fn what_only_looks_like_a_call_stays_text() {
    let cases = [
        "a <tool_call> b",
        " <tool_call>\n{\"name\": \"unknown\", \"arguments\": {}}\n</tool_call>\n",
        "<tool_call>{\"name\": \"now\", \"arguments\": [1]}</tool_call>",
        "<tool_call>{\"name\": 1}</tool_call>",
        "<tool_call>{}</tool_call>",
        "<tool_call>{\"name\": \"no",
        "<tool_cal",
        "</tool_call>\n",
        " \n ",
        "{\"name\": \"now\", \"arguments\": {}} and more",
        "Here: {\"name\": \"now\", \"arguments\": {}}",
        "{\"name\": \"weather\", \"arguments\": {}}",
        "{\"name\": \"weather\", \"arguments\": {\"city\": 1}}",
        "{\"name\": \"now\"}",
        "`中文`\n",
        "`\u{fffd}``json\n{\"name\": \"now\", \"arguments\": {}}\n```",
        "{\"name\": \"now\", \"arguments\": {}, \"other\": 1}",
        "{\"name\": \"now\", \"arguments\": {",
        "```python\n{\"name\": \"now\", \"arguments\": {}}\n```",
        "```json\n```",
        "```json\n{\"name\": \"now\", \"arguments\": {}}\n``` there",
        "",
    ];
    for text in cases {
        assert_eq!(hermes(text), folded(text, &[]), "{text}");
    }
    let nested = "<tool_call> no <tool_call>{\"name\":\"now\"}</tool_call>";
    assert_eq!(hermes(nested), folded("<tool_call> no", &[("now", "{}")]));
}

#[test]
fn an_answer_that_is_only_an_object_is_a_call() {
    let call = r#"{"name": "weather", "arguments": {"city": "Paris"}}"#;
    let arguments = r#"{"city": "Paris"}"#;
    for text in [
        call.to_owned(),
        format!(" \n{call}\n"),
        format!("```json\n{call}\n```"),
        format!("```\n{call}\n```\n"),
        format!("```JSON\n{call}"),
    ] {
        assert_eq!(hermes(&text), folded("", &[("weather", arguments)]), "{text}");
        let as_text = reading(ToolCallFormat::Hermes, BareToolCalls::Text, u32::MAX);
        assert_eq!(read(&as_text, &[&text]), folded(&text, &[]), "{text}");
    }
    let two = format!("{call}\n{call}");
    assert_eq!(hermes(&two), folded("", &[("weather", arguments), ("weather", arguments)]));
}

#[test]
fn text_is_held_back_only_while_it_may_be_a_call() {
    let accepted = reading(ToolCallFormat::Hermes, BareToolCalls::Accepted, u32::MAX);
    for (text, shown) in [
        ("He", "He"),
        ("{\"na", ""),
        ("{\"nam\": ", "{\"nam\":"),
        ("{\"name\": \"other\"", "{\"name\": \"other\""),
        ("`x", "`x"),
        ("```rust\n", "```rust"),
        ("a <tool", "a"),
        ("a <tools", "a <tools"),
    ] {
        let mut parser = ToolCallParser::new(&accepted, 0);
        let mut out = Pieces::default();
        parser.push(text, &mut out);
        assert_eq!(out.content, shown, "{text}");
    }
}

#[test]
fn arguments_are_passed_on_as_they_come() {
    let reading = reading(ToolCallFormat::Hermes, BareToolCalls::Accepted, u32::MAX);
    let mut parser = ToolCallParser::new(&reading, 0);
    let mut push = |text: &str| {
        let mut out = Pieces::default();
        parser.push(text, &mut out);
        let parts = out.tool_calls.into_iter();
        parts.map(|part| part.name.unwrap_or(part.arguments)).collect::<Vec<_>>()
    };
    assert_eq!(push("<tool_call>\n{\"name\": \"weather\", \"argu"), [""; 0]);
    assert_eq!(push("ments\": {\"ci"), ["weather", "{\"ci"]);
    assert_eq!(push("ty\": \"P"), ["ty\": \"P"]);
    assert_eq!(push("\"}"), ["\"}"]);
    assert_eq!(push("}\n</tool_call>"), [""; 0]);
}

#[test]
fn one_call_is_enough_when_no_more_are_wanted() {
    let one = reading(ToolCallFormat::Hermes, BareToolCalls::Accepted, 1);
    let call = "<tool_call>{\"name\":\"now\",\"arguments\":{}}</tool_call>";
    let mut parser = ToolCallParser::new(&one, 0);
    let mut out = Pieces::default();
    parser.push(call, &mut out);
    assert!(parser.is_complete());
    assert_eq!(read(&one, &[call, call, "text"]), folded("", &[("now", "{}")]));
}

#[test]
fn what_is_left_of_a_forced_call_is_no_content() {
    let free = reading(ToolCallFormat::Hermes, BareToolCalls::Accepted, u32::MAX);
    let forced = Arc::new(ToolReading { demand: Demand::MustCall, ..(*free).clone() });
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let is_named = "<tool_call>\n{\"name\": \"now\", \"arguments\": {".len();
    for num_bytes in 0..=call.len() {
        let read = read(&forced, &[&call[..num_bytes]]);
        assert_eq!(read.content, "");
        assert_eq!(read.calls.len(), usize::from(is_named <= num_bytes), "{num_bytes}");
    }
    let second = format!("{call}\n<tool_call>\n{{\"na");
    assert_eq!(read(&forced, &[&second]), folded("", &[("now", "{}")]));
}

#[test]
fn ids_are_long_and_differ() {
    let id = call_id("request", 0, 0);
    assert!(id.starts_with("call_") && id.len() == 29, "{id}");
    assert!(id[5..].chars().all(|c| c.is_ascii_alphanumeric()));
    assert_eq!(id, call_id("request", 0, 0));
    for other in [call_id("request", 0, 1), call_id("request", 1, 0), call_id("other", 0, 0)] {
        assert_ne!(id, other);
    }
}

#[test]
fn qwen_coder_values_become_what_the_schema_says() {
    let text = "Sure.\n<tool_call>\n<function=weather>\n<parameter=city>\nNew \"York\"\n<b>\n\
                </parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=tags>\n[\"a\", 1]\n\
                </parameter>\n<parameter=other>\n7\n</parameter>\n</function>\n</tool_call>\n\
                <function=now>\n</function>";
    let arguments = r#"{"city": "New \"York\"\n<b>", "days": 3, "tags": ["a", 1], "other": "7"}"#;
    assert_eq!(qwen_coder(text), folded("Sure.", &[("weather", arguments), ("now", "{}")]));
}

#[test]
fn qwen_coder_text_stays_text_and_cut_calls_stay_cut() {
    for text in [
        "<tool_call> x",
        "<tool_call>\n<function=unknown>\n</function>\n</tool_call>",
        "<function=weather",
        "<function=a b\nc>",
        "<tool_call>\n<func",
    ] {
        assert_eq!(qwen_coder(text), folded(text, &[]), "{text}");
    }
    let start = "<tool_call><function=weather><parameter=";
    let cut = |rest: &str| qwen_coder(&format!("{start}{rest}")).calls[0].1.clone();
    assert_eq!(cut("ci"), "");
    assert_eq!(cut("city>\nPar</para"), "{\"city\": \"Par</para");
    assert_eq!(cut("days>\n12"), "{\"days\": 12");
    assert_eq!(cut("days>soon</parameter> what"), "{\"days\": \"soon\"}");
    assert_eq!(cut("tags>None</parameter></tool_call>"), "{\"tags\": null}");
}

/// Text dense in what matters to the parsers.
fn text() -> impl Strategy<Value = Vec<String>> {
    let words: Vec<&str> = vec![
        "<tool_call>",
        "</tool_call>",
        "<tool_call>\n",
        "<function=weather>",
        "<function=",
        "<parameter=city>",
        "<parameter=days>\n",
        "\n</parameter>",
        "</function>",
        "{\"name\": \"weather\", \"arguments\": ",
        "{\"name\": \"now\"",
        ", \"arguments\": {",
        "{\"city\": \"x\"}",
        "{\"city\": \"中\\\"}",
        "}",
        "}}",
        "{",
        "\"",
        "\\",
        "[",
        "]",
        ",",
        "\n",
        " ",
        "```json\n",
        "```",
        "null",
        "12",
        "<",
        "</",
        "name",
        "text",
        "é",
    ];
    prop::collection::vec(
        prop_oneof![
            4 => prop::sample::select(words).prop_map(str::to_owned),
            1 => "[<>{}\"\\\\a-c/_=`\n 中]{0,5}",
        ],
        0..14,
    )
}

proptest! {
    // Goal: any split gives the same calls and content. That no beginning of arguments is whole
    // JSON, and that ids come first, is checked while folding.
    #[test]
    fn any_split_reads_the_same(
        pieces in text(),
        is_coder in any::<bool>(),
        is_bare in any::<bool>(),
        max_calls in prop_oneof![Just(1), Just(u32::MAX)],
    ) {
        let format = if is_coder { ToolCallFormat::QwenCoder } else { ToolCallFormat::Hermes };
        let bare = if is_bare { BareToolCalls::Accepted } else { BareToolCalls::Text };
        let reading = reading(format, bare, max_calls);
        let text = pieces.concat();
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let chars: Vec<String> = text.chars().map(String::from).collect();
        let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
        let whole = read(&reading, &[&text]);
        prop_assert_eq!(&read(&reading, &pieces), &whole);
        prop_assert_eq!(&read(&reading, &chars), &whole);
        if whole.calls.is_empty() {
            prop_assert_eq!(&whole.content, &text);
        }
    }

    // Goal: nothing is lost: content and arguments are pieces of the text, in order.
    #[test]
    fn content_and_arguments_are_pieces_of_the_text(pieces in text()) {
        let reading = reading(ToolCallFormat::Hermes, BareToolCalls::Text, u32::MAX);
        let text = pieces.concat();
        let read = read(&reading, &[&text]);
        let mut rest = text.chars();
        for c in read.content.chars() {
            prop_assert!(rest.any(|other| other == c), "`{}` of `{text}`", read.content);
        }
        for (_, arguments) in &read.calls {
            let is_source = text.contains(arguments.as_str()) || arguments == "{}";
            prop_assert!(is_source, "`{arguments}` of `{text}`");
        }
    }

    // Goal: calls written by the template's rules are read back whole, whatever is in them.
    #[test]
    fn written_calls_are_read_back(
        values in prop::collection::vec(("[a-z]{1,4}", any::<String>()), 0..4),
        lead in "[a-z .]{0,10}",
        num_calls in 1..4usize,
        cut in 1..9usize,
    ) {
        let members = values.into_iter().map(|(key, value)| (key, Value::from(value)));
        let arguments = Value::Object(members.collect()).to_string();
        let call = format!(
            "\n<tool_call>\n{{\"name\": \"now\", \"arguments\": {arguments}}}\n</tool_call>"
        );
        let text = format!("{lead}{}", call.repeat(num_calls));
        let chars: Vec<char> = text.chars().collect();
        let pieces: Vec<String> = chars.chunks(cut).map(String::from_iter).collect();
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let reading = reading(ToolCallFormat::Hermes, BareToolCalls::Accepted, u32::MAX);
        let read = read(&reading, &pieces);
        prop_assert_eq!(read.content, lead.trim_end());
        let expected = vec![("now".to_owned(), arguments); num_calls];
        prop_assert_eq!(read.calls, expected);
    }
}
