//! Whether a value is what a JSON schema asks for, as far as it can be said simply.

use serde_json::{Map, Value};

/// Deeper values are not looked at.
const MAX_DEPTH: usize = 32;

/// Whether `value` fits `schema`. Knows types, enumerations, constants, members, items and
/// alternatives; whatever else a schema says is taken to be met.
pub fn fits(value: &Value, schema: &Value) -> bool {
    fits_at(value, schema, MAX_DEPTH)
}

fn fits_at(value: &Value, schema: &Value, depth: usize) -> bool {
    let Some(schema) = schema.as_object().filter(|_| 0 < depth) else {
        return schema.as_bool() != Some(false);
    };
    let has_type = match schema.get("type") {
        Some(Value::String(name)) => is_of_type(value, name),
        Some(Value::Array(names)) => {
            names.iter().filter_map(Value::as_str).any(|name| is_of_type(value, name))
        }
        _ => true,
    };
    let listed = schema.get("enum").and_then(Value::as_array);
    let is_listed = listed.is_none_or(|values| values.contains(value));
    let is_constant = schema.get("const").is_none_or(|constant| constant == value);
    has_type
        && is_listed
        && is_constant
        && fits_alternatives(value, schema, depth)
        && match value {
            Value::Object(members) => fits_members(members, schema, depth),
            Value::Array(items) => schema
                .get("items")
                .is_none_or(|schema| items.iter().all(|item| fits_at(item, schema, depth - 1))),
            _ => true,
        }
}

fn is_of_type(value: &Value, name: &str) -> bool {
    match name {
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64() || is_whole(value),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "null" => value.is_null(),
        _ => true,
    }
}

fn is_whole(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number.fract() == 0.0)
}

fn fits_alternatives(value: &Value, schema: &Map<String, Value>, depth: usize) -> bool {
    let alternatives = |key| schema.get(key).and_then(Value::as_array);
    let fits_one = |key| {
        alternatives(key)
            .is_none_or(|all| all.iter().any(|schema| fits_at(value, schema, depth - 1)))
    };
    let fits_all = alternatives("allOf")
        .is_none_or(|all| all.iter().all(|schema| fits_at(value, schema, depth - 1)));
    fits_one("anyOf") && fits_one("oneOf") && fits_all
}

fn fits_members(members: &Map<String, Value>, schema: &Map<String, Value>, depth: usize) -> bool {
    let required = schema.get("required").and_then(Value::as_array).into_iter().flatten();
    let has_all = required.filter_map(Value::as_str).all(|name| members.contains_key(name));
    let properties = schema.get("properties").and_then(Value::as_object);
    let others = schema.get("additionalProperties");
    has_all
        && members.iter().all(|(name, value)| {
            let own = properties.and_then(|properties| properties.get(name));
            own.or(others).is_none_or(|schema| fits_at(value, schema, depth - 1))
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_schema_says_of_members_is_checked() {
        let schema = json!({
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": ["integer", "null"]},
                "unit": {"enum": ["C", "F"]},
                "tags": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"const": 1}]}},
            },
            "required": ["city"],
            "additionalProperties": false,
        });
        let good = [
            json!({"city": "Paris"}),
            json!({"city": "", "days": null, "unit": "C", "tags": ["a", 1]}),
            json!({"city": "", "days": 2.0}),
        ];
        let bad = [
            json!({}),
            json!([]),
            json!({"city": 1}),
            json!({"city": "", "days": 2.5}),
            json!({"city": "", "unit": "K"}),
            json!({"city": "", "tags": [2]}),
            json!({"city": "", "more": 1}),
        ];
        assert!(good.iter().all(|value| fits(value, &schema)));
        assert!(bad.iter().all(|value| !fits(value, &schema)));
    }
}
