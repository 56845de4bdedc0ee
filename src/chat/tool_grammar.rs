//! Builds the grammar that holds tool calls to what was declared.
//!
//! A call that must come is the whole output. One that may come is held to the tools from its
//! opening tag on; other text stays free. **Invariant:** a tool that is `strict`, and one whose
//! call is forced, is followed to the letter of its schema or refused. A schema that cannot be
//! followed holds other calls to an object only, because nothing more was promised.

use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::chat::constraint::{Constraint, compile};
use crate::chat::model::ServedModel;
use crate::chat::prompt::PromptError;
use crate::chat::reasoning::{self, ReasoningStart};
use crate::chat::tool_call::{CLOSE_TAG, OPEN_TAG, ToolCallFormat};
use crate::chat::tools::{Demand, Tool, ToolUse};
use crate::grammar::schema::prepare;
use crate::grammar::{Before, Grammar, Then, Trigger};
use crate::text::TokenId;

/// The grammar for a request's tools; `None` if nothing can be promised, nor was.
pub(super) fn grammar(
    tools: &ToolUse,
    reasoning: Option<ReasoningStart>,
    model: &ServedModel,
) -> Result<Option<Arc<Grammar>>, PromptError> {
    let is_forced = tools.demand == Demand::MustCall;
    let has_strict = tools.callable.iter().any(|tool| tool.is_strict);
    let open = model.tokenizer.id_of(OPEN_TAG);
    if model.conventions.tool_calls != ToolCallFormat::Hermes || (open.is_none() && !is_forced) {
        let param = if is_forced { Some("tool_choice") } else { has_strict.then_some("tools") };
        return match param {
            Some(param) => {
                Err(PromptError::invalid(param, "calls of this model cannot be constrained"))
            }
            None => Ok(None),
        };
    }
    let schemas: Vec<Value> = tools.callable.iter().map(schema).collect::<Result<_, _>>()?;
    let shape = match (tools.demand, tools.max_calls) {
        (Demand::MayCall, _) => Shape::Rest,
        (Demand::MustCall, 1) => Shape::One,
        (Demand::MustCall, _) => Shape::Many,
    };
    let build = |schemas: &[Value]| {
        let lark = lark(&tools.callable, schemas, shape, model);
        compile(&Constraint::Lark(lark), "tools", model)
    };
    let grammar = match build(&schemas) {
        Err(PromptError::Invalid { .. }) if !has_strict => {
            let loose: Vec<Value> = schemas.iter().map(|_| any_object()).collect();
            build(&loose)?
        }
        built => built?,
    };
    let trigger = match (tools.demand, open) {
        (Demand::MayCall, Some(token)) => {
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// A call from behind its opening tag.
    Rest,
    /// One call.
    One,
    /// At least one.
    Many,
}

/// The schema of a tool's arguments as far as it can be followed.
fn schema(tool: &Tool) -> Result<Value, PromptError> {
    let mut wanted = tool.parameters.clone();
    if let Value::Object(schema) = &mut wanted {
        schema.entry("type").or_insert_with(|| "object".into());
        // Models that are free to invent members go on inventing.
        if schema.contains_key("properties") {
            schema.entry("additionalProperties").or_insert(Value::Bool(false));
        }
    }
    match prepare(&wanted) {
        Ok(prepared) => Ok(prepared),
        Err(flaw) if tool.is_strict => {
            Err(PromptError::invalid(format!("{}{}", tool.param, flaw.part), flaw.message))
        }
        Err(_) => Ok(any_object()),
    }
}

fn any_object() -> Value {
    prepare(&json!({"type": "object"})).unwrap_or_else(|_| json!({"type": "object"}))
}

fn lark(tools: &[Tool], schemas: &[Value], shape: Shape, model: &ServedModel) -> String {
    // Tags are tokens of their own if the model has them, else plain text.
    let tag = |tag: &str| match model.tokenizer.id_of(tag) {
        Some(_) => tag.to_owned(),
        None => Value::from(tag).to_string(),
    };
    let mut lark = match shape {
        Shape::Rest => "start: rest\n".to_owned(),
        Shape::One => "start: call\n".to_owned(),
        Shape::Many => "start: call (\"\\n\" call)*\n".to_owned(),
    };
    if shape != Shape::Rest {
        let _ = writeln!(lark, "call: {} rest", tag(OPEN_TAG));
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
