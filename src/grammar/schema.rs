//! Looks through a JSON schema before llguidance does.
//!
//! llguidance follows most of JSON Schema and refuses most of the rest. This refuses, by the place
//! in the schema, what it would overlook: keywords that it takes for annotations, numbers that it
//! would round, references that never end, its own options in a client's schema. Keywords that no
//! draft knows are annotations by the standard, and pass.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

/// Most schemas within a schema, and values in its `enum`s.
const MAX_NODES: usize = 20_000;
/// Most steps of the search for something finite.
const MAX_STEPS: usize = 200_000;
/// Most schemas on the way to a part of a schema, with those that references lead to: what follows
/// them does so by recursion.
const MAX_DEPTH: usize = 512;
/// Whole numbers below this are exact as `f64`, which is how llguidance reads them.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

/// Between values at most one line break and one indentation, so that a model cannot go on with
/// spaces forever.
const WHITESPACE: &str = r"[ \t]{1,40}|\r?\n[ \t]{0,40}";

/// The key under which llguidance takes options from a schema.
const OPTIONS: &str = "x-guidance";

/// Keywords that restrict values in ways that cannot be followed.
const UNSUPPORTED: [&str; 21] = [
    "$dynamicAnchor",
    "$dynamicRef",
    "$recursiveAnchor",
    "$recursiveRef",
    "contains",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "disallow",
    "divisibleBy",
    "else",
    "extends",
    "if",
    "maxContains",
    "minContains",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    OPTIONS,
];

/// Keywords whose false value asks for nothing, while true cannot be followed.
const MUST_BE_FALSE: [&str; 2] = ["nullable", "uniqueItems"];

/// Keywords whose values are schemas by name.
const SCHEMA_MAPS: [&str; 4] = ["$defs", "definitions", "patternProperties", "properties"];
/// Keywords whose value is a list of schemas.
const SCHEMA_LISTS: [&str; 4] = ["allOf", "anyOf", "oneOf", "prefixItems"];
/// Keywords whose value is a schema; `items` may be a list too.
const SCHEMAS: [&str; 3] = ["additionalItems", "additionalProperties", "items"];
/// Keywords whose value is a number.
const NUMBERS: [&str; 5] =
    ["exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"];

/// What is wrong with a schema, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// The place, as in `.properties.name`; empty for the whole schema.
    pub part: String,
    /// What is wrong there.
    pub message: String,
}

/// The schema as llguidance is to see it; also what a Lark grammar may hold after `%json`.
///
/// # Errors
/// If it could not be followed to the letter.
pub fn prepare(schema: &Value) -> Result<Value, Flaw> {
    let mut prepared = match schema {
        Value::Bool(true) => Value::Object(Map::new()),
        Value::Bool(false) => return Err(flaw("", "no value is valid under `false`")),
        schema => schema.clone(),
    };
    let mut walk = Walk { num_nodes: 0, path: Vec::new() };
    walk.check(&mut prepared)?;
    let mut search = FiniteSearch { root: &prepared, pending: Vec::new(), depth: 0, num_steps: 0 };
    match search.is_finite(&prepared) {
        Some(true) => {}
        Some(false) => {
            return Err(flaw("", "every value that is valid under it would be infinite"));
        }
        None => return Err(flaw("", "its references are too entangled")),
    }
    if let Some(root) = prepared.as_object_mut() {
        // Drafts differ in what they know; all of it is understood together.
        root.remove("$schema");
        root.insert(OPTIONS.to_owned(), options());
    }
    Ok(prepared)
}

/// The schema of any object, prepared.
pub fn any_object() -> Value {
    json!({"type": "object", OPTIONS: options()})
}

fn options() -> Value {
    json!({"whitespace_pattern": WHITESPACE})
}

fn flaw(part: &str, message: impl Into<String>) -> Flaw {
    Flaw { part: part.to_owned(), message: message.into() }
}

struct Walk {
    num_nodes: usize,
    path: Vec<String>,
}

impl Walk {
    fn flaw(&self, message: impl Into<String>) -> Flaw {
        flaw(&self.path.concat(), message)
    }

    /// Does `work` one level deeper.
    fn within<T>(
        &mut self,
        step: String,
        work: impl FnOnce(&mut Self) -> Result<T, Flaw>,
    ) -> Result<T, Flaw> {
        self.path.push(step);
        let result = work(self);
        self.path.pop();
        result
    }

    fn count(&mut self) -> Result<(), Flaw> {
        self.num_nodes += 1;
        if self.num_nodes <= MAX_NODES {
            return Ok(());
        }
        Err(flaw("", format!("must hold at most {MAX_NODES} schemas and `enum` values")))
    }

    fn check(&mut self, schema: &mut Value) -> Result<(), Flaw> {
        self.count()?;
        let map = match schema {
            Value::Object(map) => map,
            Value::Bool(_) => return Ok(()),
            _ => return Err(self.flaw("must be a schema: an object or a boolean")),
        };
        for name in MUST_BE_FALSE {
            if map.get(name) == Some(&Value::Bool(false)) {
                map.shift_remove(name);
            }
        }
        for (name, value) in map.iter_mut() {
            self.within(format!(".{name}"), |walk| walk.check_keyword(name, value))?;
        }
        Ok(())
    }

    fn check_keyword(&mut self, name: &str, value: &mut Value) -> Result<(), Flaw> {
        if UNSUPPORTED.contains(&name) || MUST_BE_FALSE.contains(&name) {
            return Err(self.flaw("is not supported: it would not be followed"));
        }
        if SCHEMA_MAPS.contains(&name) {
            let Some(map) = value.as_object_mut() else {
                return Err(self.flaw("must be an object of schemas"));
            };
            for (key, schema) in map.iter_mut() {
                self.within(format!(".{key}"), |walk| walk.check(schema))?;
            }
        } else if SCHEMA_LISTS.contains(&name) || (name == "items" && value.is_array()) {
            let Some(list) = value.as_array_mut().filter(|list| !list.is_empty()) else {
                return Err(self.flaw("must be a list of schemas that is not empty"));
            };
            for (index, schema) in list.iter_mut().enumerate() {
                self.within(format!("[{index}]"), |walk| walk.check(schema))?;
            }
        } else if SCHEMAS.contains(&name) {
            self.check(value)?;
        } else if NUMBERS.contains(&name) || name == "const" {
            self.check_exact(value)?;
        } else if name == "enum" {
            let Some(list) = value.as_array().filter(|list| !list.is_empty()) else {
                return Err(self.flaw("must be a list that is not empty"));
            };
            for (index, value) in list.iter().enumerate() {
                self.within(format!("[{index}]"), |walk| walk.check_exact(value))?;
            }
        } else if name == "$ref" && !value.as_str().is_some_and(is_local) {
            return Err(self.flaw("must point into the same schema, as in `#/$defs/name`"));
        }
        Ok(())
    }

    /// Numbers are compared as `f64`.
    fn check_exact(&mut self, value: &Value) -> Result<(), Flaw> {
        self.count()?;
        match value {
            Value::Number(number) => {
                let is_exact = number.as_f64().is_some_and(|n| n.abs() < MAX_EXACT);
                if !number.is_f64() && !is_exact {
                    return Err(self.flaw("whole numbers from 2^53 on are not supported"));
                }
                Ok(())
            }
            Value::Array(items) => items.iter().try_for_each(|item| self.check_exact(item)),
            Value::Object(map) => map.values().try_for_each(|item| self.check_exact(item)),
            Value::Null | Value::Bool(_) | Value::String(_) => Ok(()),
        }
    }
}

/// References are followed literally, so what would need decoding is refused.
fn is_local(reference: &str) -> bool {
    (reference == "#" || reference.starts_with("#/")) && !reference.contains(['~', '%'])
}

/// Finds out whether some finite value may be valid: a list node that must hold a list node that
/// must hold a list node never ends.
struct FiniteSearch<'a> {
    root: &'a Value,
    /// References that are being followed.
    pending: Vec<&'a str>,
    depth: usize,
    num_steps: usize,
}

impl<'a> FiniteSearch<'a> {
    /// `None` when the search takes too long or goes too deep.
    fn is_finite(&mut self, schema: &'a Value) -> Option<bool> {
        self.num_steps += 1;
        if MAX_STEPS < self.num_steps || MAX_DEPTH <= self.depth {
            return None;
        }
        self.depth += 1;
        let is_finite = self.is_finite_within(schema);
        self.depth -= 1;
        is_finite
    }

    fn is_finite_within(&mut self, schema: &'a Value) -> Option<bool> {
        let Some(map) = schema.as_object() else { return Some(true) };
        if map.contains_key("const") || map.contains_key("enum") {
            return Some(true);
        }
        if let Some(reference) = map.get("$ref").and_then(Value::as_str)
            && !self.is_reference_finite(reference)?
        {
            return Some(false);
        }
        for part in list(map, "allOf") {
            if !self.is_finite(part)? {
                return Some(false);
            }
        }
        for name in ["anyOf", "oneOf"] {
            let mut is_any_finite = !map.contains_key(name);
            for option in list(map, name) {
                is_any_finite = is_any_finite || self.is_finite(option)?;
            }
            if !is_any_finite {
                return Some(false);
            }
        }
        self.is_own_type_finite(map)
    }

    fn is_reference_finite(&mut self, reference: &'a str) -> Option<bool> {
        if self.pending.contains(&reference) {
            return Some(false);
        }
        // One that leads nowhere is llguidance's to refuse.
        let Some(target) = resolve(self.root, reference) else { return Some(true) };
        self.pending.push(reference);
        let is_finite = self.is_finite(target);
        self.pending.pop();
        is_finite
    }

    fn is_own_type_finite(&mut self, map: &'a Map<String, Value>) -> Option<bool> {
        let types: BTreeSet<&str> = match map.get("type") {
            Some(Value::String(name)) => BTreeSet::from([name.as_str()]),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            _ => return Some(true),
        };
        if types.iter().any(|name| !["object", "array"].contains(name)) {
            return Some(true);
        }
        if types.contains("array") && self.is_array_finite(map)? {
            return Some(true);
        }
        if types.contains("object") && self.is_object_finite(map)? {
            return Some(true);
        }
        Some(types.is_empty())
    }

    fn is_array_finite(&mut self, map: &'a Map<String, Value>) -> Option<bool> {
        let min_items = map.get("minItems").and_then(Value::as_u64).unwrap_or(0) as usize;
        let positional = ["prefixItems", "items"].into_iter().flat_map(|name| list(map, name));
        let mut num_items = 0;
        for item in positional.take(min_items) {
            num_items += 1;
            if !self.is_finite(item)? {
                return Some(false);
            }
        }
        match map.get("items").or_else(|| map.get("additionalItems")) {
            Some(rest) if num_items < min_items => self.is_finite(rest),
            _ => Some(true),
        }
    }

    fn is_object_finite(&mut self, map: &'a Map<String, Value>) -> Option<bool> {
        let properties = map.get("properties").and_then(Value::as_object);
        for name in list(map, "required").iter().filter_map(Value::as_str) {
            if let Some(property) = properties.and_then(|properties| properties.get(name))
                && !self.is_finite(property)?
            {
                return Some(false);
            }
        }
        Some(true)
    }
}

fn list<'a>(map: &'a Map<String, Value>, name: &str) -> &'a [Value] {
    map.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn resolve<'a>(root: &'a Value, reference: &str) -> Option<&'a Value> {
    match reference.strip_prefix("#/") {
        None | Some("") => Some(root),
        Some(path) => path.split('/').try_fold(root, |value, segment| match value {
            Value::Array(items) => items.get(segment.parse::<usize>().ok()?),
            value => value.get(segment),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(schema: &Value) -> String {
        prepare(schema).unwrap_err().part
    }

    #[test]
    fn what_cannot_be_followed_is_named_by_its_place() {
        for (schema, expected) in [
            (
                json!({"properties": {"a": {"type": "array", "uniqueItems": true}}}),
                ".properties.a.uniqueItems",
            ),
            (json!({"anyOf": [{}, {"not": {}}]}), ".anyOf[1].not"),
            (json!({"items": {"if": {}}}), ".items.if"),
            (json!({"$defs": {"x": {"nullable": true}}}), ".$defs.x.nullable"),
            (json!({"enum": [1, [{"a": 9_007_199_254_740_993_u64}]]}), ".enum[1]"),
            (json!({"maximum": -9_007_199_254_740_993_i64}), ".maximum"),
            (json!({"properties": {"p": {"$ref": "https://example.com/x"}}}), ".properties.p.$ref"),
            (json!({"x-guidance": {"lenient": true}}), ".x-guidance"),
            (json!({"properties": {"a": 5}}), ".properties.a"),
            (json!({"properties": []}), ".properties"),
            (json!({"enum": []}), ".enum"),
            (json!({"anyOf": []}), ".anyOf"),
            (json!("string"), ""),
            (json!(false), ""),
        ] {
            assert_eq!(part(&schema), expected, "{schema}");
        }
    }

    #[test]
    fn neutral_values_annotations_and_data_pass() {
        let schema = json!({
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "title": "T",
            "discriminator": {"propertyName": "kind"},
            "properties": {
                "not": {"type": "string", "default": {"not": 1}, "nullable": false},
                "list": {"type": "array", "uniqueItems": false, "examples": [{"if": 1}]},
                "const": {"const": {"contains": 1}},
            },
        });
        let prepared = prepare(&schema).unwrap();
        assert!(prepared["properties"]["list"].get("uniqueItems").is_none());
        assert!(prepared.get("$schema").is_none());
        assert_eq!(prepared["x-guidance"]["whitespace_pattern"], WHITESPACE);
        assert!(prepare(&json!(true)).unwrap().is_object());
    }

    #[test]
    fn what_never_ends_is_refused() {
        let node = |required: Value| {
            json!({
                "$ref": "#/$defs/node",
                "$defs": {"node": {
                    "type": "object",
                    "properties": {"next": {"$ref": "#/$defs/node"}},
                    "required": required,
                }},
            })
        };
        assert!(prepare(&node(json!([]))).is_ok());
        assert!(prepare(&node(json!(["next"]))).is_err());
        assert!(prepare(&json!({"$ref": "#"})).is_err());
        let list = |min: u32| json!({"type": "array", "items": {"$ref": "#"}, "minItems": min});
        assert!(prepare(&list(0)).is_ok());
        assert!(prepare(&list(1)).is_err());
        let either = json!({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]});
        assert!(prepare(&either).is_ok());
        assert!(prepare(&json!({"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]})).is_err());
    }

    #[test]
    fn huge_schemas_are_refused() {
        let values: Vec<usize> = (0..=MAX_NODES).collect();
        assert!(prepare(&json!({"enum": values})).is_err());
        let doubling = (0..40).fold(json!({}), |mut defs, level| {
            let next = format!("#/$defs/d{}", level + 1);
            defs[format!("d{level}")] = json!({"allOf": [{"$ref": next}, {"$ref": next}]});
            defs
        });
        let flaw = prepare(&json!({"$ref": "#/$defs/d0", "$defs": doubling})).unwrap_err();
        assert!(flaw.message.contains("entangled"), "{flaw:?}");
    }
}
