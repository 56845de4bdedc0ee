//! Builds the grammar that holds tool calls to what was declared.
//!
//! A call that must come is the whole output. One that may come is held to the tools from its
//! opening tag on, and other text stays free; beside a format for the answer the output is either
//! calls or the formatted answer. **Invariant:** where a call is forced, and where a tool is
//! `strict`, its schema is followed to the letter or refused by its place. A schema that cannot be
//! followed holds other calls to an object only, because nothing more was promised.

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
    if model.conventions.tool_calls != ToolCallFormat::Hermes || (open.is_none() && !is_whole) {
        // Where the format wins, there are no calls to be wrong.
        let has_strict = answer.is_none() && tools.callable.iter().any(|tool| tool.is_strict);
        let param = if is_forced { Some("tool_choice") } else { has_strict.then_some("tools") };
        return match param {
            Some(param) => {
                Err(PromptError::invalid(param, "calls of this model cannot be constrained"))
            }
            None => Ok(None),
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
            let then = if tools.max_calls == 1 { Then::End } else { Then::Repeat };
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
    let mut schemas = Vec::with_capacity(tools.callable.len());
    for tool in tools.callable.iter() {
        schemas.push(match schema(tool) {
            Err(_) if is_lenient(tool) => any_object(),
            schema => schema?,
        });
    }
    let build = |schemas: &[Value]| {
        let lark = lark(&tools.callable, schemas, shape, model);
        compile(&Constraint::Lark(lark), "tools", model)
    };
    let whole = build(&schemas);
    if !matches!(whole, Err(PromptError::Invalid { .. })) {
        return whole;
    }
    // The schemas one by one, to find the one to blame.
    let mut is_changed = false;
    for (tool, schema) in tools.callable.iter().zip(&mut schemas) {
        let alone = Constraint::Lark(format!("start: %json {schema}"));
        match compile(&alone, &tool.param, model) {
            Err(PromptError::Invalid { .. }) if is_lenient(tool) => {
                *schema = any_object();
                is_changed = true;
            }
            checked => {
                checked?;
            }
        }
    }
    if is_changed { build(&schemas) } else { whole }
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

fn lark(tools: &[Tool], schemas: &[Value], shape: Shape<'_>, model: &ServedModel) -> String {
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
    let names: Vec<String> = (0..tools.len()).map(|index| format!("tool_{index}")).collect();
    let _ = writeln!(lark, "rest: \"\\n\" object \"\\n\" {}", tag(CLOSE_TAG));
    let _ = writeln!(lark, "object: {}", names.join(" | "));
    for ((tool, schema), name) in tools.iter().zip(schemas).zip(&names) {
        let head = format!("{{\"name\": {}, \"arguments\": ", Value::from(tool.name.as_str()));
        let head = Value::from(head);
        let _ = writeln!(lark, "{name}: {head} {name}_arguments \"}}\"");
        let _ = writeln!(lark, "{name}_arguments: %json {schema}");
    }
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
            patterns: Vec::new(),
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

    #[test]
    fn models_that_write_calls_otherwise_promise_nothing() {
        let mut model = model();
        model.conventions.tool_calls = ToolCallFormat::QwenCoder;
        let forced = tools(Demand::MustCall, 1, &add_and_now());
        assert_eq!(param(grammar(&forced, None, None, &model)), "tool_choice");
        let [add, now] = add_and_now();
        let free = tools(Demand::MayCall, 1, &[add.clone(), now.clone()]);
        assert!(grammar(&free, None, None, &model).unwrap().is_none());
        let strict = tools(Demand::MayCall, 1, &[add, Tool { is_strict: true, ..now }]);
        assert_eq!(param(grammar(&strict, None, None, &model)), "tools");
        assert!(grammar(&strict, Some(&json!({})), None, &model).unwrap().is_none());
    }
}
