//! Builds the grammar that holds tool calls to what was declared.
//!
//! A call that must come is the whole output. One that may come is held to the tools from its
//! opening tag on, and other text stays free; beside a format for the answer the output is either
//! calls or the formatted answer. **Invariant:** where a call is forced, and where a tool is
//! `strict`, its schema is followed to the letter or refused by its place. A schema that cannot be
//! followed holds other calls to an object only, because nothing more was promised.

mod qwen_coder;

use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::Value;

use crate::chat::constraint::{Constraint, compile};
use crate::chat::model::ServedModel;
use crate::chat::prompt::PromptError;
use crate::chat::reasoning::{self, ReasoningStart};
use crate::chat::tool_call::{CLOSE_TAG, OPEN_TAG, ToolCallFormat};
use crate::chat::tools::{Demand, Tool, ToolUse};
use crate::grammar::schema::{any_object, prepare};
use crate::grammar::{Before, Grammar, Then, Trigger};
use crate::text::TokenId;

/// Most calls in a choice where calls are all it may hold: small models repeat themselves for as
/// long as they are let.
const MAX_FORCED_CALLS: u32 = 8;

/// The grammar for a request's tools; `None` if nothing can be promised, nor was. `answer` is the
/// schema of an answer that may come instead of calls.
pub(super) fn grammar(
    tools: &ToolUse,
    answer: Option<&Value>,
    reasoning: Option<ReasoningStart>,
    model: &ServedModel,
) -> Result<Option<Arc<Grammar>>, PromptError> {
    let is_forced = tools.demand == Demand::MustCall;
    let open = model.tokenizer.id_of(OPEN_TAG);
    let is_whole = is_forced || answer.is_some();
    if open.is_none() && !is_whole {
        let has_strict = tools.callable.iter().any(|tool| tool.is_strict);
        return if has_strict {
            Err(PromptError::invalid("tools", "calls of this model cannot be constrained"))
        } else {
            Ok(None)
        };
    }
    let answer = answer.and_then(|schema| prepare(schema).ok());
    let num_calls = tools.max_calls.min(MAX_FORCED_CALLS);
    let shape = match (tools.demand, &answer) {
        (Demand::MustCall, _) => Shape::Calls(num_calls),
        (Demand::MayCall, Some(answer)) => Shape::CallsOr(num_calls, answer),
        (Demand::MayCall, None) => Shape::Rest,
    };
    let grammar = compile_calls(tools, shape, model)?;
    let trigger = match (shape, open) {
        (Shape::Rest, Some(token)) => {
            // One within a thought is not the answer's call, so that may still come.
            let is_last = tools.max_calls == 1 && reasoning.is_none();
            let then = if is_last { Then::End } else { Then::Repeat };
            Some(Trigger { token, before: Before::MayEnd, then })
        }
        _ => behind_thought(reasoning, model),
    };
    Ok(Some(trigger.map_or(Arc::clone(&grammar), |trigger| Arc::new(grammar.after(trigger)))))
}

/// A grammar applies to the answer, not to the thought before it.
pub(super) fn behind_thought(
    reasoning: Option<ReasoningStart>,
    model: &ServedModel,
) -> Option<Trigger> {
    let token: TokenId = model.tokenizer.id_of(reasoning::CLOSE_TAG)?;
    let is_thinking = reasoning == Some(ReasoningStart::Inside);
    is_thinking.then_some(Trigger { token, before: Before::MustReach, then: Then::End })
}

/// What is constrained.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape<'a> {
    /// A call from behind its opening tag.
    Rest,
    /// At least one call, and at most as many.
    Calls(u32),
    /// The same, or an answer of this schema.
    CallsOr(u32, &'a Value),
}

fn compile_calls(
    tools: &ToolUse,
    shape: Shape<'_>,
    model: &ServedModel,
) -> Result<Arc<Grammar>, PromptError> {
    let is_lenient = |tool: &Tool| tools.demand == Demand::MayCall && !tool.is_strict;
    let format = model.conventions.tool_calls;
    let mut rules = Vec::with_capacity(tools.callable.len());
    for (index, tool) in tools.callable.iter().enumerate() {
        rules.push(match rule(format, index, tool) {
            Err(_) if is_lenient(tool) => free_rule(format, index, tool),
            rule => rule?,
        });
    }
    let build =
        |rules: &[String]| compile(&Constraint::Lark(lark(rules, shape, model)), "tools", model);
    let whole = build(&rules);
    if !matches!(whole, Err(PromptError::Invalid { .. })) {
        return whole;
    }
    // The tools one by one, to find the one to blame.
    let mut is_changed = false;
    for (index, (tool, rule)) in tools.callable.iter().zip(&mut rules).enumerate() {
        let alone = Constraint::Lark(format!("start: {}\n{rule}", rule_name(index)));
        match compile(&alone, &tool.param, model) {
            Err(PromptError::Invalid { .. }) if is_lenient(tool) => {
                *rule = free_rule(format, index, tool);
                is_changed = true;
            }
            checked => {
                checked?;
            }
        }
    }
    if is_changed { build(&rules) } else { whole }
}

fn rule_name(index: usize) -> String {
    format!("tool_{index}")
}

/// The rule of a call of this tool without its tags, if its schema can be followed.
fn rule(format: ToolCallFormat, index: usize, tool: &Tool) -> Result<String, PromptError> {
    match format {
        ToolCallFormat::Hermes => Ok(hermes_rule(index, tool, &schema(tool)?)),
        ToolCallFormat::QwenCoder => qwen_coder::rule(&rule_name(index), tool).map_err(|flaw| {
            PromptError::invalid(format!("{}{}", tool.param, flaw.part), flaw.message)
        }),
    }
}

/// The rule of a call of this tool with any arguments.
fn free_rule(format: ToolCallFormat, index: usize, tool: &Tool) -> String {
    match format {
        ToolCallFormat::Hermes => hermes_rule(index, tool, &any_object()),
        ToolCallFormat::QwenCoder => qwen_coder::free_rule(&rule_name(index), tool),
    }
}

fn hermes_rule(index: usize, tool: &Tool, schema: &Value) -> String {
    let name = rule_name(index);
    let head = format!("{{\"name\": {}, \"arguments\": ", Value::from(tool.name.as_str()));
    let head = Value::from(head);
    format!("{name}: {head} {name}_arguments \"}}\"\n{name}_arguments: %json {schema}\n")
}

/// The schema of a tool's arguments, if it can be followed.
fn schema(tool: &Tool) -> Result<Value, PromptError> {
    let mut wanted = tool.parameters.clone();
    if let Value::Object(schema) = &mut wanted {
        schema.entry("type").or_insert_with(|| "object".into());
        // Models that are free to invent members go on inventing.
        if schema.contains_key("properties") {
            schema.entry("additionalProperties").or_insert(Value::Bool(false));
        }
    }
    prepare(&wanted)
        .map_err(|flaw| PromptError::invalid(format!("{}{}", tool.param, flaw.part), flaw.message))
}

fn lark(rules: &[String], shape: Shape<'_>, model: &ServedModel) -> String {
    // Tags are tokens of their own if the model has them, else plain text.
    let tag = |tag: &str| match model.tokenizer.id_of(tag) {
        Some(_) => tag.to_owned(),
        None => Value::from(tag).to_string(),
    };
    let mut lark = match shape {
        Shape::Rest => "start: rest\n".to_owned(),
        Shape::Calls(_) => "start: calls\n".to_owned(),
        Shape::CallsOr(_, schema) => format!("start: calls | answer\nanswer: %json {schema}\n"),
    };
    if let Shape::Calls(num_calls) | Shape::CallsOr(num_calls, _) = shape {
        let more = match num_calls - 1 {
            0 => String::new(),
            num_more => format!(" (\"\\n\" call){{0,{num_more}}}"),
        };
        let _ = writeln!(lark, "calls: call{more}\ncall: {} rest", tag(OPEN_TAG));
    }
    let names: Vec<String> = (0..rules.len()).map(rule_name).collect();
    let _ = writeln!(lark, "rest: \"\\n\" object \"\\n\" {}", tag(CLOSE_TAG));
    let _ = writeln!(lark, "object: {}", names.join(" | "));
    lark.extend(rules.iter().map(String::as_str));
    lark
}

#[cfg(test)]
mod tests {
    //! Goal: exactly what was declared can be said. Method: a vocabulary of our own, and texts that
    //! are followed token by token.

    use serde_json::json;

    use super::*;
    use crate::chat::model::Conventions;
    use crate::engine::request::{GenerationDefaults, Pooling};
    use crate::grammar::{GrammarCompiler, GrammarMatcher};
    use crate::text::Tokenizer;

    fn model() -> ServedModel {
        let json = include_bytes!("../../models/qwen2.5/small_tokenizer.json");
        let tokenizer = Arc::new(Tokenizer::from_json(json).unwrap());
        let end = tokenizer.id_of("<|im_end|>").unwrap();
        ServedModel {
            name: "m".to_owned(),
            aliases: Vec::new(),
            root: String::new(),
            grammars: GrammarCompiler::new(Arc::clone(&tokenizer), &[end]),
            tokenizer,
            template: None,
            eos_token_ids: vec![end],
            fim: None,
            pooling: Pooling::Mean,
            embedding_size: 1,
            sampling_defaults: GenerationDefaults::default(),
            conventions: Conventions::default(),
        }
    }

    fn tool(name: &str, parameters: Value) -> Tool {
        let param = format!("{name}.parameters");
        Tool { name: name.to_owned(), parameters, param, is_strict: false }
    }

    fn tools(demand: Demand, max_calls: u32, callable: &[Tool]) -> ToolUse {
        ToolUse { definitions: Value::Null, callable: callable.into(), demand, max_calls }
    }

    fn add_and_now() -> [Tool; 2] {
        let number = json!({"$ref": "#/$defs/n"});
        let add = json!({
            "properties": {"n": number},
            "required": ["n"],
            "$defs": {"n": {"type": "integer"}},
        });
        [tool("add", add), tool("now", json!({"type": "object", "properties": {}}))]
    }

    /// Whether the whole output may be `text`.
    fn accepts(model: &ServedModel, grammar: &Arc<Grammar>, text: &str) -> bool {
        let mut matcher = GrammarMatcher::new(Arc::clone(grammar));
        for &token in &model.tokenizer.encode(text).unwrap() {
            if matcher.is_over() || matcher.accept(token).is_err() {
                return false;
            }
        }
        matcher.is_over() || matcher.accept(model.eos_token_ids[0]).is_ok()
    }

    fn call(name: &str, arguments: &str) -> String {
        let object = format!("{{\"name\": \"{name}\", \"arguments\": {arguments}}}");
        format!("<tool_call>\n{object}\n</tool_call>")
    }

    fn param(result: Result<Option<Arc<Grammar>>, PromptError>) -> String {
        match result {
            Err(PromptError::Invalid { param, .. }) => param,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn forced_calls_are_calls_of_the_tools_and_bounded() {
        let model = model();
        let (add, now) = (call("add", r#"{"n":1}"#), call("now", "{}"));
        let many = tools(Demand::MustCall, u32::MAX, &add_and_now());
        let one = tools(Demand::MustCall, 1, &add_and_now());
        let many = grammar(&many, None, None, &model).unwrap().unwrap();
        let one = grammar(&one, None, None, &model).unwrap().unwrap();
        let calls = |num: usize| vec![add.as_str(); num].join("\n");
        for (text, for_many, for_one) in [
            (calls(1), true, true),
            (now.clone(), true, true),
            (format!("{add}\n{now}"), true, false),
            (calls(8), true, false),
            (calls(9), false, false),
            (String::new(), false, false),
            (format!("{add}\n"), false, false),
            (format!("Well.\n{add}"), false, false),
            (call("add", r#"{"n":"1"}"#), false, false),
            (call("add", "{}"), false, false),
            (call("now", r#"{"invented":1}"#), false, false),
            (call("other", "{}"), false, false),
        ] {
            assert_eq!(accepts(&model, &many, &text), for_many, "{text}");
            assert_eq!(accepts(&model, &one, &text), for_one, "{text}");
        }
    }

    #[test]
    fn calls_that_may_come_are_held_from_their_tag_on() {
        let model = model();
        let free = tools(Demand::MayCall, u32::MAX, &add_and_now());
        let free = grammar(&free, None, None, &model).unwrap().unwrap();
        let add = call("add", r#"{"n":1}"#);
        for (text, is_accepted) in [
            ("Any text".to_owned(), true),
            (add.clone(), true),
            (format!("First {add} then\n{add}."), true),
            (format!("First {}", call("add", "{}")), false),
            ("<tool_call>text".to_owned(), false),
        ] {
            assert_eq!(accepts(&model, &free, &text), is_accepted, "{text}");
        }
    }

    #[test]
    fn a_call_in_a_thought_is_not_the_only_one() {
        let model = model();
        let one = tools(Demand::MayCall, 1, &add_and_now());
        let inside = grammar(&one, None, Some(ReasoningStart::Inside), &model).unwrap().unwrap();
        let plain = grammar(&one, None, None, &model).unwrap().unwrap();
        let text = format!("I could say {}.\n</think>\n\nNo.", call("now", "{}"));
        assert!(accepts(&model, &inside, &text));
        assert!(!accepts(&model, &plain, &text));
    }

    #[test]
    fn beside_a_format_the_output_is_calls_or_the_answer() {
        let model = model();
        let answer = json!({
            "properties": {"n": {"$ref": "#/$defs/n"}},
            "required": ["n"],
            "type": "object",
            "$defs": {"n": {"type": "string"}},
        });
        let either = tools(Demand::MayCall, u32::MAX, &add_and_now());
        let either = grammar(&either, Some(&answer), None, &model).unwrap().unwrap();
        let add = call("add", r#"{"n":1}"#);
        for (text, is_accepted) in [
            (r#"{"n": "1"}"#.to_owned(), true),
            (format!("{add}\n{add}"), true),
            (r#"{"n": 1}"#.to_owned(), false),
            (call("add", r#"{"n":"1"}"#), false),
            (format!("{{\"n\": \"1\"}}{add}"), false),
            ("text".to_owned(), false),
        ] {
            assert_eq!(accepts(&model, &either, &text), is_accepted, "{text}");
        }
    }

    #[test]
    fn a_schema_that_cannot_be_followed_is_named_or_was_never_promised() {
        let model = model();
        let [add, _] = add_and_now();
        let unknown = json!({"properties": {"x": {"not": {}}}});
        let size = json!({"type": "string", "minLength": 2, "maxLength": 1});
        let impossible = json!({"properties": {"x": size}, "required": ["x"]});
        for (schema, part) in [(unknown, ".properties.x.not"), (impossible, "")] {
            let named = format!("bad.parameters{part}");
            let bad = tool("bad", schema);
            let strict = Tool { is_strict: true, ..bad.clone() };
            let forced = tools(Demand::MustCall, 1, &[add.clone(), bad.clone()]);
            assert_eq!(param(grammar(&forced, None, None, &model)), named);
            let free = tools(Demand::MayCall, 1, &[add.clone(), strict]);
            assert_eq!(param(grammar(&free, None, None, &model)), named);
            let free = tools(Demand::MayCall, u32::MAX, &[add.clone(), bad]);
            let free = grammar(&free, None, None, &model).unwrap().unwrap();
            assert!(accepts(&model, &free, &call("bad", r#"{"x": [1]}"#)));
            assert!(!accepts(&model, &free, &call("bad", "[1]")));
            assert!(!accepts(&model, &free, &call("add", r#"{"n":"1"}"#)), "others still hold");
        }
    }

    fn coder() -> ServedModel {
        let mut model = model();
        model.conventions.tool_calls = ToolCallFormat::QwenCoder;
        model
    }

    fn coder_call(name: &str, parameters: &[(&str, &str)]) -> String {
        let parameters = parameters
            .iter()
            .map(|(name, value)| format!("<parameter={name}>\n{value}\n</parameter>\n"));
        let parameters = parameters.collect::<Vec<_>>().concat();
        format!("<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
    }

    fn search() -> Tool {
        let schema = json!({
            "type": "object",
            "description": "What is looked for.",
            "properties": {
                "query": {"type": "string"},
                "limit": {"$ref": "#/$defs/limit"},
                "kind": {"type": "string", "enum": ["file", "a \"b\"\n/c"]},
                "code": {"type": "string", "pattern": "^[A-Z]{2}-\\d+$"},
                "short": {"type": "string", "minLength": 1, "maxLength": 3},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["query"],
            "$defs": {"limit": {"type": "integer", "minimum": 1}},
        });
        tool("search", schema)
    }

    #[test]
    fn calls_in_elements_are_forced_by_their_schemas() {
        let model = coder();
        let one = tools(
            Demand::MustCall,
            1,
            &[search(), tool("now", json!({"type": "object", "properties": {}}))],
        );
        let one = grammar(&one, None, None, &model).unwrap().unwrap();
        let query = ("query", "any <b>text</b>\n\n中 </paramete> \"\\\"");
        for (parameters, is_accepted) in [
            (vec![query], true),
            (vec![("query", "")], true),
            (vec![("query", "\n\n")], true),
            (vec![query, ("limit", "12"), ("tags", "[\"a\", \"</parameter>\"]")], true),
            (vec![query, ("kind", "file"), ("code", "AB-7"), ("short", "日本語")], true),
            (vec![query, ("kind", "a \"b\"\n/c")], true),
            (vec![query, ("limit", "0")], false),
            (vec![query, ("limit", "many")], false),
            (vec![query, ("kind", "folder")], false),
            (vec![query, ("kind", "\"file\"")], false),
            (vec![query, ("code", "ab-7")], false),
            (vec![query, ("code", "xAB-7")], false),
            (vec![query, ("short", "")], false),
            (vec![query, ("short", "four")], false),
            (vec![query, ("tags", "[1]")], false),
            (vec![query, ("other", "x")], false),
            (vec![query, query], false),
            (vec![("query", "a</parameter>b")], false),
            (vec![], false),
        ] {
            let text = coder_call("search", &parameters);
            assert_eq!(accepts(&model, &one, &text), is_accepted, "{text}");
        }
        assert!(accepts(&model, &one, &coder_call("now", &[])));
        for wrong in ["Well.", "<tool_call>\n<function=other>\n</function>\n</tool_call>", ""] {
            assert!(!accepts(&model, &one, wrong), "{wrong}");
        }
    }

    #[test]
    fn calls_in_elements_that_may_come_are_held_if_their_schema_can_be() {
        let model = coder();
        let [add, now] = add_and_now();
        let free = tools(Demand::MayCall, u32::MAX, &[add.clone(), now]);
        let free = grammar(&free, None, None, &model).unwrap().unwrap();
        let good = coder_call("add", &[("n", "1")]);
        for (text, is_accepted) in [
            ("Any text".to_owned(), true),
            (format!("First {good} then\n{good}."), true),
            (coder_call("add", &[("n", "one")]), false),
            (coder_call("add", &[]), false),
        ] {
            assert_eq!(accepts(&model, &free, &text), is_accepted, "{text}");
        }
        let unlike = json!({"properties": {"x": {"type": "string", "format": "date"}}});
        let bad = tool("bad", unlike);
        let strict = Tool { is_strict: true, ..bad.clone() };
        for (demand, tool) in [(Demand::MustCall, &bad), (Demand::MayCall, &strict)] {
            let forced = tools(demand, 1, &[add.clone(), tool.clone()]);
            assert_eq!(
                param(grammar(&forced, None, None, &model)),
                "bad.parameters.properties.x.format"
            );
        }
        let free = tools(Demand::MayCall, u32::MAX, &[add, bad]);
        let free = grammar(&free, None, None, &model).unwrap().unwrap();
        assert!(accepts(&model, &free, &coder_call("bad", &[("x", "soon"), ("y", "[1")])));
        assert!(!accepts(&model, &free, &coder_call("add", &[("n", "one")])), "others still hold");
    }

    #[test]
    fn calls_in_elements_stand_beside_a_format() {
        let model = coder();
        let either = tools(Demand::MayCall, u32::MAX, &add_and_now());
        let answer = json!({"type": "object", "properties": {}, "additionalProperties": false});
        let either = grammar(&either, Some(&answer), None, &model).unwrap().unwrap();
        let add = coder_call("add", &[("n", "1")]);
        for (text, is_accepted) in
            [("{}", true), (&*add, true), (&*format!("{add}\n{add}"), true), ("text", false)]
        {
            assert_eq!(accepts(&model, &either, text), is_accepted, "{text}");
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(48))]

        // Goal: the grammar and the parser mean the same. What a call may hold is accepted as it
        // is written, and read as what was meant.
        #[test]
        fn what_is_written_in_elements_is_read_as_it_was_meant(
            query in "(\\PC|[\n<>/]|</para|</parameter)*",
            limit in 1..u32::MAX,
            short in "[a-z<é中🌀]{1,3}",
            tags in proptest::collection::vec("\\PC{0,8}", 0..3),
        ) {
            use crate::chat::answer::Pieces;
            use crate::chat::tool_call::{BareToolCalls, ToolCallParser, ToolReading};
            let model = coder();
            let one = tools(Demand::MustCall, 1, &[search()]);
            let one = grammar(&one, None, None, &model).unwrap().unwrap();
            let tags = Value::from(tags);
            let text = coder_call("search", &[
                ("query", &query),
                ("limit", &limit.to_string()),
                ("short", &short),
                ("tags", &tags.to_string()),
            ]);
            let is_clear = !query.contains("</parameter>");
            proptest::prop_assert_eq!(accepts(&model, &one, &text), is_clear);
            if is_clear {
                let reading = Arc::new(ToolReading {
                    format: ToolCallFormat::QwenCoder,
                    tools: [search()].into(),
                    bare: BareToolCalls::Text,
                    demand: Demand::MustCall,
                    max_calls: 1,
                    id_seed: "x".into(),
                });
                let mut parser = ToolCallParser::new(&reading, 0);
                let mut out = Pieces::default();
                parser.push(&text, &mut out);
                parser.finish(&mut out);
                let parts = out.tool_calls.iter().map(|part| part.arguments.as_str());
                let read: Value = serde_json::from_str(&parts.collect::<String>()).unwrap();
                let meant = json!({"query": query, "limit": limit, "short": short, "tags": tags});
                proptest::prop_assert_eq!(read, meant);
            }
        }
    }
}
