//! The `tojson` filter as Hugging Face transformers defines it: Python's `json.dumps`, which unlike
//! Jinja's own filter escapes nothing for HTML.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// A value nested deeper than this is refused before it exhausts the stack.
const MAX_DEPTH: usize = 256;

/// `value` as JSON text. Knows the keyword arguments `indent`, `ensure_ascii`, `separators` and
/// `sort_keys` of Python's `json.dumps`.
#[allow(clippy::needless_pass_by_value, reason = "the signature of a filter")]
pub(super) fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    let indent = match indent {
        Some(indent) if !indent.is_none() => Some(indent_unit(&indent)?),
        _ => None,
    };
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("separators must be a pair of strings")),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let mut writer = Writer {
        out: String::new(),
        indent,
        item_separator,
        key_separator,
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        depth: 0,
    };
    kwargs.assert_all_used()?;
    writer.value(value)?;
    Ok(Value::from(writer.out))
}

fn indent_unit(indent: &Value) -> Result<String, Error> {
    match (indent.as_str(), indent.as_i64()) {
        (Some(unit), _) => Ok(unit.to_owned()),
        (None, Some(width)) if width <= 64 => Ok(" ".repeat(width.max(0) as usize)),
        _ => Err(invalid("indent must be a small number or a string")),
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

struct Writer {
    out: String,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
    depth: usize,
}

impl Writer {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value)?,
            ValueKind::Map => self.map(value)?,
            kind => return Err(invalid(format!("a value of type {kind} has no JSON form"))),
        }
        Ok(())
    }

    fn list(&mut self, value: &Value) -> Result<(), Error> {
        let items: Vec<Value> = value.try_iter()?.collect();
        if items.is_empty() {
            self.out.push_str("[]");
            return Ok(());
        }
        self.open('[')?;
        for (index, item) in items.iter().enumerate() {
            self.begin_item(index);
            self.value(item)?;
        }
        self.close(']');
        Ok(())
    }

    fn map(&mut self, value: &Value) -> Result<(), Error> {
        let mut entries = Vec::new();
        for key in value.try_iter()? {
            let item = value.get_item(&key)?;
            entries.push((key_text(&key)?, item));
        }
        if self.sort_keys {
            entries.sort_by(|left, right| left.0.cmp(&right.0));
        }
        if entries.is_empty() {
            self.out.push_str("{}");
            return Ok(());
        }
        self.open('{')?;
        for (index, (key, item)) in entries.iter().enumerate() {
            self.begin_item(index);
            self.string(key);
            self.out.push_str(&self.key_separator);
            self.value(item)?;
        }
        self.close('}');
        Ok(())
    }

    fn open(&mut self, bracket: char) -> Result<(), Error> {
        self.depth += 1;
        if MAX_DEPTH < self.depth {
            return Err(invalid("the value is nested too deeply"));
        }
        self.out.push(bracket);
        Ok(())
    }

    fn close(&mut self, bracket: char) {
        self.depth -= 1;
        self.break_line();
        self.out.push(bracket);
    }

    fn begin_item(&mut self, index: usize) {
        if 0 < index {
            self.out.push_str(&self.item_separator);
        }
        self.break_line();
    }

    fn break_line(&mut self) {
        if let Some(unit) = &self.indent {
            self.out.push('\n');
            for _ in 0..self.depth {
                self.out.push_str(unit);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\0'..='\u{1f}' => self.escape(character),
                _ if self.ensure_ascii && '\u{7e}' < character && character != '\u{7f}' => {
                    self.escape(character);
                }
                _ => self.out.push(character),
            }
        }
        self.out.push('"');
    }

    fn escape(&mut self, character: char) {
        for unit in character.encode_utf16(&mut [0; 2]) {
            write!(self.out, "\\u{unit:04x}").expect("writing to a string cannot fail");
        }
    }
}

/// Python turns other keys into text; a key that is a container it refuses.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => number(key),
        kind => Err(invalid(format!("a key of type {kind} has no JSON form"))),
    }
}

/// A number in Python's spelling.
pub(super) fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    f64::try_from(value.clone()).map(float)
}

/// The shortest digits that read back as `number`, in Python's notation: plain from 1e-4 up to
/// below 1e16, otherwise with an exponent of at least two digits.
fn float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number < 0.0 { "-Infinity" } else { "Infinity" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let (mantissa, exponent) =
        scientific.split_once('e').expect("`{:e}` always writes an exponent");
    let exponent: i32 = exponent.parse().expect("`{:e}` writes a small integer exponent");
    if number == 0.0 || (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use minijinja::Environment;
    use minijinja::value::Serde;
    use serde_json::json;

    use super::*;

    fn render(expression: &str, x: &serde_json::Value) -> String {
        let mut environment = Environment::new();
        environment.add_filter("tojson", tojson);
        let template = environment.template_from_str(expression).unwrap();
        template.render(Value::from_pairs([("x", Value::from(Serde(x)))])).unwrap()
    }

    // Goal: byte-equal to Python's `json.dumps(x, ensure_ascii=False)`, whose output stands here.
    #[test]
    fn follows_python() {
        let cases = [
            (json!({"b": [1, {"a": null}], "a": true}), r#"{"b": [1, {"a": null}], "a": true}"#),
            (json!("<a href='x'>&\"\\/</a>"), r#""<a href='x'>&\"\\/</a>""#),
            (json!("中\u{7f}é🎉\u{2028}"), "\"中\u{7f}é🎉\u{2028}\""),
            (json!("\n\r\t\u{8}\u{c}\u{1}\u{1f}"), r#""\n\r\t\b\f\u0001\u001f""#),
            (json!([[], {}, ""]), r#"[[], {}, ""]"#),
            (json!([0, -1, 18_446_744_073_709_551_615_u64]), "[0, -1, 18446744073709551615]"),
        ];
        for (value, expected) in cases {
            assert_eq!(render("{{ x | tojson }}", &value), expected);
        }
    }

    #[test]
    fn floats_follow_python() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5e-4, "-0.00025"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (123_456_789.125, "123456789.125"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e22, "1.25e+22"),
            (1e-300, "1e-300"),
            (f64::INFINITY, "Infinity"),
            (f64::NEG_INFINITY, "-Infinity"),
            (f64::NAN, "NaN"),
        ];
        for (number, expected) in cases {
            assert_eq!(float(number), expected);
        }
    }

    #[test]
    fn arguments_follow_python() {
        let value = json!({"b": [1, {}], "a": "é🎉"});
        assert_eq!(
            render("{{ x | tojson(indent=2) }}", &value),
            "{\n  \"b\": [\n    1,\n    {}\n  ],\n  \"a\": \"é🎉\"\n}"
        );
        assert_eq!(
            render("{{ x | tojson(sort_keys=true, separators=(',', ':')) }}", &value),
            r#"{"a":"é🎉","b":[1,{}]}"#
        );
        assert_eq!(
            render("{{ x.a | tojson(ensure_ascii=true, indent=none) }}", &value),
            r#""\u00e9\ud83c\udf89""#
        );
    }

    #[test]
    fn what_has_no_json_form_is_an_error() {
        let mut environment = Environment::new();
        environment.add_filter("tojson", tojson);
        for source in
            ["{{ nothing | tojson }}", "{{ 1 | tojson(indent=1000) }}", "{{ 1 | tojson(x=1) }}"]
        {
            assert!(environment.render_str(source, ()).is_err(), "{source}");
        }
    }
}
