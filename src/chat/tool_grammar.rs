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
    if model.conventions.tool_calls != ToolCallFormat::Hermes || (open.is_none() && !is_forced) {
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
