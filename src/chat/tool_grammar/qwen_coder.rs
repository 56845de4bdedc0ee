//! Rules of calls as Qwen3-Coder writes them: an element for the function, and in it one for each
//! argument. A string is plain text up to the closing tag, any other value is JSON.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use crate::chat::tools::Tool;
use crate::grammar::schema::{Flaw, prepare};
use crate::grammar::{search_pattern, text_pattern};

/// Most arguments of a call whose arguments may be anything.
const MAX_FREE_PARAMETERS: usize = 16;
/// Keywords that restrict nothing, or what is looked at anyway.
const HARMLESS: [&str; 12] = [
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "default",
    "definitions",
    "deprecated",
    "description",
    "examples",
    "required",
    "title",
    "type",
];
/// Keywords of strings that are followed in plain text.
const OF_TEXT: [&str; 5] = ["const", "enum", "maxLength", "minLength", "pattern"];
/// What no text of an argument holds: it would be read as its end.
const END: &str = "</parameter>";
const ANY_TEXT: &str = "/(?s:.*)/";

/// The rules of a call of `tool` without its tags; the first is called `name`.
///
/// Arguments come in the order of the schema, and no others than it names.
pub(super) fn rule(name: &str, tool: &Tool) -> Result<String, Flaw> {
    let empty = Map::new();
    let schema = tool.parameters.as_object().unwrap_or(&empty);
    for (keyword, value) in schema {
        let is_known = match keyword.as_str() {
            "properties" => true,
            "additionalProperties" => value.is_boolean(),
            keyword => HARMLESS.contains(&keyword),
        };
        if !is_known {
            return Err(unsupported(format!(".{keyword}")));
        }
    }
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
        return Ok(free_rule(name, tool));
    };
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .map(|names| names.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    if let Some(missing) = required.iter().find(|name| !properties.contains_key(**name)) {
        let message = format!("`{missing}` is not one of the `properties`");
        return Err(Flaw { part: ".required".to_owned(), message });
    }
    let mut head = format!("{name}: {}", quoted(&format!("<function={}>\n", tool.name)));
    let mut rules = String::new();
    for (index, (key, property)) in properties.iter().enumerate() {
        let part = format!(".properties.{key}");
        if key.is_empty() || key.contains(['>', '\n']) {
            let message = "a name like this cannot be written in a call of this model";
            return Err(Flaw { part, message: message.to_owned() });
        }
        let is_required = required.contains(&key.as_str());
        let _ = write!(head, " {name}_{index}{}", if is_required { "" } else { "?" });
        let open = quoted(&format!("<parameter={key}>\n"));
        let (value, definition) = if let Some(text) = text(property, &part)? {
            // One terminal with its end, or the end would be taken for text.
            let terminal = format!("{}_{index}", name.to_uppercase());
            (terminal.clone(), format!("{terminal}: {}\n", ended(&text)))
        } else {
            let json = json(property, schema, &part)?;
            let rule = format!("{name}_{index}_value");
            let end = quoted(&format!("\n{END}\n"));
            (format!("{rule} {end}"), format!("{rule}: %json {json}\n"))
        };
        let _ = write!(rules, "{name}_{index}: {open} {value}\n{definition}");
    }
    let _ = writeln!(head, " {}", quoted("</function>"));
    Ok(head + &rules)
}

/// The rules of a call with any arguments.
pub(super) fn free_rule(name: &str, tool: &Tool) -> String {
    let head = quoted(&format!("<function={}>\n", tool.name));
    let terminal = name.to_uppercase();
    format!(
        "{name}: {head} {name}_any{{0,{MAX_FREE_PARAMETERS}}} {}\n\
         {name}_any: \"<parameter=\" {terminal}_KEY {terminal}\n\
         {terminal}_KEY: /[^<>=\\s]{{1,64}}>\\n/\n\
         {terminal}: {}\n",
        quoted("</function>"),
        ended(ANY_TEXT),
    )
}

/// The pattern of a value that is plain text; `None` for one that is JSON.
fn text(property: &Value, part: &str) -> Result<Option<String>, Flaw> {
    let Some(schema) = property.as_object() else { return Ok(None) };
    if schema.get("type").and_then(Value::as_str) != Some("string") {
        return Ok(None);
    }
    // Refuses what the keywords may not hold.
    prepare(property).map_err(|flaw| Flaw { part: format!("{part}{}", flaw.part), ..flaw })?;
    let known = |keyword: &str| HARMLESS.contains(&keyword) || OF_TEXT.contains(&keyword);
    if let Some(other) = schema.keys().find(|keyword| !known(keyword)) {
        return Err(unsupported(format!("{part}.{other}")));
    }
    let mut all = Vec::new();
    let constants = schema.get("const").map(std::slice::from_ref);
    let listed = schema.get("enum").and_then(Value::as_array).map(Vec::as_slice);
    for values in [constants, listed].into_iter().flatten() {
        let texts: Vec<String> = values
            .iter()
            .filter_map(Value::as_str)
            .map(quoted)
            .filter(|text| *text != "\"\"")
            .collect();
        // The empty text is no literal.
        let has_empty = values.iter().any(|value| value == "");
        let empty = has_empty.then(|| "/(?s:.{0})/".to_owned());
        let texts: Vec<String> = texts.into_iter().chain(empty).collect();
        if texts.is_empty() {
            let message = "holds no string".to_owned();
            return Err(Flaw { part: part.to_owned(), message });
        }
        all.push(format!("({})", texts.join(" | ")));
    }
    let length = |keyword: &str| schema.get(keyword).and_then(Value::as_u64);
    if let (min, Some(max)) = (length("minLength").unwrap_or(0), length("maxLength")) {
        all.push(format!("/(?s:.){{{min},{max}}}/"));
    } else if let Some(min) = length("minLength") {
        all.push(format!("/(?s:.){{{min},}}/"));
    }
    if let Some(pattern) = schema.get("pattern").and_then(Value::as_str) {
        let pattern = search_pattern(pattern)
            .map_err(|message| Flaw { part: format!("{part}.pattern"), message })?;
        all.push(pattern);
    }
    if all.is_empty() {
        all.push(ANY_TEXT.to_owned());
    }
    Ok(Some(all.join(" & ")))
}

/// A text with its end, which it does not hold.
fn ended(text: &str) -> String {
    let holding_end = text_pattern(END);
    format!("(({text}) & ~{holding_end}) {}", quoted(&format!("\n{END}\n")))
}

/// The schema of a value that is JSON, with what it may refer to.
fn json(property: &Value, schema: &Map<String, Value>, part: &str) -> Result<Value, Flaw> {
    let mut wanted = property.clone();
    if let Value::Object(wanted) = &mut wanted {
        for name in ["$defs", "definitions"] {
            if let Some(definitions) = schema.get(name) {
                wanted.entry(name).or_insert_with(|| definitions.clone());
            }
        }
    }
    prepare(&wanted).map_err(|flaw| Flaw { part: format!("{part}{}", flaw.part), ..flaw })
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn unsupported(part: String) -> Flaw {
    let message = "is not supported: calls of this model could not follow it".to_owned();
    Flaw { part, message }
}
