//! Reads what a request wants its output to look like: OpenAI's `response_format`, and vLLM's
//! `structured_outputs` and `guided_*`.
//!
//! **Invariant:** a constraint that was asked for is compiled or refused with the field's name.
//! `strict` changes nothing: a schema is always followed to the letter.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::chat::model::ServedModel;
use crate::chat::prompt::PromptError;
use crate::grammar::{CompileError, Grammar};
use crate::openai::generation::GenerationFields;

pub use crate::grammar::Constraint;

/// Longest name of a schema, by OpenAI's schema.
const MAX_NAME_CHARS: usize = 64;

/// A constraint and the field that asked for it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Asked {
    pub(super) param: String,
    pub(super) constraint: Constraint,
}

/// Whether a request needs a grammar, which may take long to compile.
pub fn is_asked_for(fields: &GenerationFields) -> bool {
    let all = [
        &fields.response_format,
        &fields.structured_outputs,
        &fields.guided_json,
        &fields.guided_regex,
        &fields.guided_choice,
        &fields.guided_grammar,
    ];
    all.into_iter().any(|field| field.as_ref().is_some_and(|value| !value.is_null()))
}

/// The grammar of a constraint that the field `param` asks for. Blocks while it is compiled.
pub(super) fn compile(
    constraint: &Constraint,
    param: &str,
    model: &ServedModel,
) -> Result<Arc<Grammar>, PromptError> {
    model.grammars.compile(constraint).map_err(|error| match error {
        CompileError::Invalid { part, message } => {
            PromptError::invalid(format!("{param}{part}"), message)
        }
        CompileError::Busy => PromptError::Busy,
    })
}

/// The one constraint of a request, if it has any.
pub(super) fn constraint(fields: &GenerationFields) -> Result<Option<Asked>, PromptError> {
    let mut asked = Vec::new();
    asked.extend(response_format(fields.response_format.as_ref())?);
    if let Some(value) = given(fields.structured_outputs.as_ref()) {
        asked.extend(structured_outputs(value)?);
    }
    for (name, value) in [
        ("json", &fields.guided_json),
        ("regex", &fields.guided_regex),
        ("choice", &fields.guided_choice),
        ("grammar", &fields.guided_grammar),
    ] {
        if let Some(value) = given(value.as_ref()) {
            asked.push(by_name(name, value, format!("guided_{name}"))?);
        }
    }
    only(asked)
}

fn only(mut asked: Vec<Asked>) -> Result<Option<Asked>, PromptError> {
    if let [first, second, ..] = &asked[..] {
        let flaw = format!("cannot be combined with `{}`", first.param);
        return Err(PromptError::invalid(second.param.clone(), flaw));
    }
    Ok(asked.pop())
}

fn given(value: Option<&Value>) -> Option<&Value> {
    value.filter(|value| !value.is_null())
}

fn response_format(value: Option<&Value>) -> Result<Option<Asked>, PromptError> {
    const PARAM: &str = "response_format";
    let Some(value) = given(value) else { return Ok(None) };
    let map = object(value, PARAM)?;
    let kind = map.get("type").and_then(Value::as_str).ok_or_else(|| {
        PromptError::invalid(format!("{PARAM}.type"), "is required and must be a string")
    })?;
    let known: &[&str] = match kind {
        "text" | "json_object" => &["type"],
        "json_schema" => &["type", "json_schema"],
        _ => {
            return Err(PromptError::invalid(
                format!("{PARAM}.type"),
                format!(
                    "`{}` is not supported: use `text`, `json_object` or `json_schema`",
                    kind.chars().take(MAX_NAME_CHARS).collect::<String>()
                ),
            ));
        }
    };
    refuse_unknown(map, known, PARAM)?;
    match kind {
        "json_object" => {
            Ok(Some(Asked { param: PARAM.to_owned(), constraint: Constraint::JsonObject }))
        }
        "json_schema" => Ok(Some(json_schema(map.get("json_schema"))?)),
        _ => Ok(None),
    }
}

fn json_schema(value: Option<&Value>) -> Result<Asked, PromptError> {
    const PARAM: &str = "response_format.json_schema";
    let value = given(value).ok_or_else(|| PromptError::invalid(PARAM, "is required"))?;
    let map = object(value, PARAM)?;
    refuse_unknown(map, &["name", "description", "schema", "strict"], PARAM)?;
    let is_named = |name: &str| {
        !name.is_empty()
            && name.len() <= MAX_NAME_CHARS
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
    };
    if !map.get("name").and_then(Value::as_str).is_some_and(is_named) {
        let flaw = "is required: 1 to 64 letters, digits, underscores and dashes";
        return Err(PromptError::invalid(format!("{PARAM}.name"), flaw));
    }
    if given(map.get("description")).is_some_and(|value| !value.is_string()) {
        return Err(PromptError::invalid(format!("{PARAM}.description"), "must be a string"));
    }
    if given(map.get("strict")).is_some_and(|value| !value.is_boolean()) {
        return Err(PromptError::invalid(format!("{PARAM}.strict"), "must be a boolean"));
    }
    let param = format!("{PARAM}.schema");
    let Some(schema) = given(map.get("schema")) else {
        return Err(PromptError::invalid(param, "is required; `{}` allows any JSON value"));
    };
    if !schema.is_object() {
        return Err(PromptError::invalid(param, "must be an object"));
    }
    Ok(Asked { param, constraint: Constraint::Json(schema.clone()) })
}

fn structured_outputs(value: &Value) -> Result<Option<Asked>, PromptError> {
    const PARAM: &str = "structured_outputs";
    let mut asked = Vec::new();
    for (name, value) in object(value, PARAM)? {
        let param = format!("{PARAM}.{name}");
        match (name.as_str(), value) {
            ("json" | "regex" | "choice" | "grammar", value) if !value.is_null() => {
                asked.push(by_name(name, value, param)?);
            }
            ("json_object", Value::Bool(true)) => {
                asked.push(Asked { param, constraint: Constraint::JsonObject });
            }
            // Nothing is asked for. There is no other engine to fall back to, either.
            (_, Value::Null)
            | ("disable_fallback", Value::Bool(_))
            | (
                "json_object" | "disable_any_whitespace" | "disable_additional_properties",
                Value::Bool(false),
            ) => {}
            ("json_object", _) => return Err(PromptError::invalid(param, "must be a boolean")),
            _ => return Err(PromptError::invalid(param, "is not supported by this version")),
        }
    }
    only(asked)
}

fn by_name(name: &str, value: &Value, param: String) -> Result<Asked, PromptError> {
    let constraint = match (name, value) {
        ("json", Value::String(text)) => {
            let schema = serde_json::from_str(text).map_err(|error| {
                PromptError::invalid(param.clone(), format!("is not JSON: {error}"))
            })?;
            Constraint::Json(schema)
        }
        ("json", schema) => Constraint::Json(schema.clone()),
        ("regex", Value::String(regex)) => Constraint::Regex(regex.clone()),
        ("grammar", Value::String(grammar)) => Constraint::Grammar(grammar.clone()),
        ("choice", Value::Array(choices)) => {
            let text = |(index, choice): (usize, &Value)| {
                choice.as_str().map(str::to_owned).ok_or_else(|| {
                    PromptError::invalid(format!("{param}[{index}]"), "must be a string")
                })
            };
            let choices: Result<_, _> = choices.iter().enumerate().map(text).collect();
            Constraint::Choice(choices?)
        }
        ("choice", _) => return Err(PromptError::invalid(param, "must be a list of strings")),
        _ => return Err(PromptError::invalid(param, "must be a string")),
    };
    Ok(Asked { param, constraint })
}

fn object<'a>(value: &'a Value, param: &str) -> Result<&'a Map<String, Value>, PromptError> {
    value.as_object().ok_or_else(|| PromptError::invalid(param, "must be an object"))
}

/// A key that is not understood may well be a constraint.
fn refuse_unknown(
    map: &Map<String, Value>,
    known: &[&str],
    param: &str,
) -> Result<(), PromptError> {
    match map.iter().find(|(name, value)| !value.is_null() && !known.contains(&name.as_str())) {
        None => Ok(()),
        Some((name, _)) => {
            Err(PromptError::invalid(format!("{param}.{name}"), "is not supported here"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(fields: Value) -> Result<Option<Asked>, PromptError> {
        constraint(&serde_json::from_value(fields).unwrap())
    }

    #[test]
    fn every_field_becomes_its_constraint() {
        let schema = json!({"type": "string"});
        let named = json!({"name": "n", "schema": schema, "strict": true, "description": null});
        for (fields, param, expected) in [
            (
                json!({"response_format": {"type": "json_object"}}),
                "response_format",
                Constraint::JsonObject,
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": named}}),
                "response_format.json_schema.schema",
                Constraint::Json(schema.clone()),
            ),
            (json!({"guided_json": schema}), "guided_json", Constraint::Json(schema.clone())),
            (
                json!({"guided_json": schema.to_string()}),
                "guided_json",
                Constraint::Json(schema.clone()),
            ),
            (json!({"guided_json": {}}), "guided_json", Constraint::Json(json!({}))),
            (json!({"guided_regex": "a+"}), "guided_regex", Constraint::Regex("a+".into())),
            (
                json!({"guided_choice": ["a"]}),
                "guided_choice",
                Constraint::Choice(vec!["a".into()]),
            ),
            (
                json!({"guided_grammar": "start: x"}),
                "guided_grammar",
                Constraint::Grammar("start: x".into()),
            ),
            (
                json!({"structured_outputs": {"regex": "b", "json": null}}),
                "structured_outputs.regex",
                Constraint::Regex("b".into()),
            ),
            (
                json!({"structured_outputs": {"json_object": true}}),
                "structured_outputs.json_object",
                Constraint::JsonObject,
            ),
        ] {
            let asked = read(fields.clone()).unwrap().unwrap();
            assert_eq!(asked, Asked { param: param.to_owned(), constraint: expected }, "{fields}");
        }
        for nothing in [
            json!({}),
            json!({"response_format": {"type": "text"}, "guided_json": null}),
            json!({"structured_outputs": {"json_object": false, "regex": null, "disable_fallback": true}}),
        ] {
            assert_eq!(read(nothing).unwrap(), None);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let format = |format: Value| json!({"response_format": format});
        let schema = |schema: Value| format(json!({"type": "json_schema", "json_schema": schema}));
        for (fields, expected) in [
            (format(json!("json_object")), "response_format"),
            (format(json!({})), "response_format.type"),
            (format(json!({"type": "structural_tag"})), "response_format.type"),
            (format(json!({"type": "json_object", "schema": {}})), "response_format.schema"),
            (format(json!({"type": "json_schema"})), "response_format.json_schema"),
            (schema(json!({"schema": {}})), "response_format.json_schema.name"),
            (schema(json!({"name": "a b", "schema": {}})), "response_format.json_schema.name"),
            (schema(json!({"name": "n"})), "response_format.json_schema.schema"),
            (schema(json!({"name": "n", "schema": true})), "response_format.json_schema.schema"),
            (
                schema(json!({"name": "n", "schema": {}, "strict": 1})),
                "response_format.json_schema.strict",
            ),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_regex": 5}), "guided_regex"),
            (json!({"guided_choice": "a"}), "guided_choice"),
            (json!({"guided_choice": ["a", 1]}), "guided_choice[1]"),
            (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice"),
            (json!({"response_format": {"type": "json_object"}, "guided_json": {}}), "guided_json"),
            (
                json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}),
                "structured_outputs.choice",
            ),
            (
                json!({"structured_outputs": {"structural_tag": "{}"}}),
                "structured_outputs.structural_tag",
            ),
            (
                json!({"structured_outputs": {"whitespace_pattern": " "}}),
                "structured_outputs.whitespace_pattern",
            ),
            (json!({"structured_outputs": {"shape": 1}}), "structured_outputs.shape"),
            (json!({"structured_outputs": []}), "structured_outputs"),
        ] {
            match read(fields.clone()) {
                Err(PromptError::Invalid { param, .. }) => assert_eq!(param, expected, "{fields}"),
                other => panic!("{fields}: {other:?}"),
            }
        }
    }
}
