//! Reads a body's top level without ever holding it as a tree.
//!
//! A tree of JSON takes up to a hundred times the bytes it was parsed from. So a first pass only
//! counts, and fields nobody knows are never built; the typed passes read the bytes again.

use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error as _, IgnoredAny, IntoDeserializer,
    MapAccess, SeqAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::error::Category;

use super::error::ApiError;

/// More top-level fields than any client sends.
const MAX_FIELDS: usize = 1024;
/// Most values within a field that is kept as JSON: each may cost half a kilobyte.
const MAX_JSON_VALUES: usize = 200_000;
/// Most strings, tokens or lists in a field that holds text or tokens.
const MAX_LIST_VALUES: usize = 2_000_000;
/// Fields that are kept as JSON, all or in part.
const JSON_FIELDS: [&str; 19] = [
    "messages",
    "text",
    "reasoning",
    "metadata",
    "system",
    "thinking",
    "output_config",
    "cache_control",
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "chat_template_kwargs",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
];

/// The top level of a body that is a JSON object.
pub(super) struct Body<'a> {
    bytes: &'a [u8],
    fields: Vec<Field>,
    /// The names that the types read so far know.
    known: Vec<&'static str>,
}

/// A field of the top level, without its value.
pub(super) struct Field {
    pub(super) name: String,
    pub(super) is_null: bool,
    /// Whether the value asks for nothing: null, false, or anything empty.
    pub(super) is_neutral: bool,
    num_values: usize,
}

impl<'a> Body<'a> {
    /// Checks that `bytes` are one JSON object of tolerable size.
    pub(super) fn scan(bytes: &'a [u8]) -> Result<Self, ApiError> {
        let fields: Fields = serde_json::from_slice(bytes).map_err(|error| {
            let message = match error.classify() {
                Category::Data => error.to_string(),
                _ => format!("the body is not valid JSON: {error}"),
            };
            ApiError::Invalid { message, param: None }
        })?;
        let body = Self { bytes, fields: fields.0, known: Vec::new() };
        for field in &body.fields {
            let is_json = JSON_FIELDS.contains(&field.name.as_str());
            check_num_values(field, if is_json { MAX_JSON_VALUES } else { MAX_LIST_VALUES })?;
        }
        Ok(body)
    }

    /// Checks a field that only some endpoints keep as JSON.
    pub(super) fn check_json(&self, name: &str) -> Result<(), ApiError> {
        let mut fields = self.fields.iter().filter(|field| field.name == name);
        fields.try_for_each(|field| check_num_values(field, MAX_JSON_VALUES))
    }

    /// Reads the fields that `T` knows. Of several with one name the last counts.
    pub(super) fn read<T: DeserializeOwned>(&mut self) -> Result<T, ApiError> {
        let mut json = serde_json::Deserializer::from_slice(self.bytes);
        let object = KnownFields { inner: &mut json, fields: &self.fields, known: &mut self.known };
        serde_path_to_error::deserialize(object).map_err(|error| {
            let path = error.path().to_string();
            let message = error.inner().to_string();
            let path = match (path.as_str(), missing_field(&message)) {
                (".", Some(field)) => field.to_owned(),
                (path, Some(field)) => format!("{path}.{field}"),
                (path, None) => path.to_owned(),
            };
            ApiError::Invalid { message: format!("`{path}`: {message}"), param: Some(path) }
        })
    }

    /// The names that the types read so far know.
    #[cfg(test)]
    pub(super) fn known(&self) -> &[&'static str] {
        &self.known
    }

    /// The fields that no type read so far knows.
    pub(super) fn unknown(&self) -> impl Iterator<Item = &Field> {
        let is_known = |field: &Field| self.known.contains(&field.name.as_str());
        let fields = self.fields.iter().enumerate();
        fields
            .filter(move |(index, field)| is_last(&self.fields, *index) && !is_known(field))
            .map(|(_, field)| field)
    }
}

fn check_num_values(field: &Field, max: usize) -> Result<(), ApiError> {
    if field.num_values <= max {
        return Ok(());
    }
    let (name, count) = (&field.name, field.num_values);
    let message = format!("`{name}`: must hold at most {max} values in all, got {count}");
    Err(ApiError::Invalid { message, param: Some(name.clone()) })
}

fn is_last(fields: &[Field], index: usize) -> bool {
    fields[index + 1..].iter().all(|later| later.name != fields[index].name)
}

/// serde reports a missing field at its parent.
fn missing_field(message: &str) -> Option<&str> {
    message.strip_prefix("missing field `")?.split('`').next()
}

struct Fields(Vec<Field>);

impl<'de> serde::Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("the body to be a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Vec::new();
        while let Some(name) = map.next_key()? {
            if fields.len() == MAX_FIELDS {
                return Err(A::Error::custom(format!(
                    "the body has more than {MAX_FIELDS} fields"
                )));
            }
            let shape: Shape = map.next_value()?;
            fields.push(Field {
                name,
                is_null: shape.is_null,
                is_neutral: shape.is_neutral,
                num_values: shape.num_values,
            });
        }
        Ok(Fields(fields))
    }
}

/// What the first pass keeps of a value.
struct Shape {
    is_null: bool,
    is_neutral: bool,
    num_values: usize,
}

impl Shape {
    fn leaf(is_neutral: bool) -> Self {
        Self { is_null: false, is_neutral, num_values: 1 }
    }

    fn container(num_inner: usize) -> Self {
        Self { is_null: false, is_neutral: num_inner == 0, num_values: 1 + num_inner }
    }
}

impl<'de> serde::Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Shape;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("any JSON")
    }

    fn visit_unit<E>(self) -> Result<Shape, E> {
        Ok(Shape { is_null: true, is_neutral: true, num_values: 1 })
    }

    fn visit_bool<E>(self, value: bool) -> Result<Shape, E> {
        Ok(Shape::leaf(!value))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Shape, E> {
        Ok(Shape::leaf(false))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Shape, E> {
        Ok(Shape::leaf(false))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Shape, E> {
        Ok(Shape::leaf(false))
    }

    fn visit_str<E>(self, value: &str) -> Result<Shape, E> {
        Ok(Shape::leaf(value.is_empty()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
        let mut num_inner = 0;
        while let Some(shape) = seq.next_element::<Shape>()? {
            num_inner += shape.num_values;
        }
        Ok(Shape::container(num_inner))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shape, A::Error> {
        let mut num_inner = 0;
        while let Some((_, shape)) = map.next_entry::<IgnoredAny, Shape>()? {
            num_inner += shape.num_values;
        }
        Ok(Shape::container(num_inner))
    }
}

/// The body as an object of only those fields that the type being read knows.
struct KnownFields<'a, D> {
    inner: D,
    fields: &'a [Field],
    known: &'a mut Vec<&'static str>,
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for KnownFields<'_, D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, D::Error> {
        Err(D::Error::custom("only a struct says which fields it knows"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.known.extend(names);
        self.inner.deserialize_map(KnownVisitor { visitor, fields: self.fields, names })
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

struct KnownVisitor<'a, V> {
    visitor: V,
    fields: &'a [Field],
    names: &'static [&'static str],
}

impl<'de, V: Visitor<'de>> Visitor<'de> for KnownVisitor<'_, V> {
    type Value = V::Value;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.visitor.expecting(formatter)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        let Self { visitor, fields, names } = self;
        visitor.visit_map(KnownMap { map, fields, names, index: 0 })
    }
}

struct KnownMap<'a, A> {
    map: A,
    fields: &'a [Field],
    names: &'static [&'static str],
    /// How many fields were passed.
    index: usize,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for KnownMap<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        while self.map.next_key::<IgnoredAny>()?.is_some() {
            let (index, name) = (self.index, self.fields[self.index].name.as_str());
            self.index += 1;
            if self.names.contains(&name) && is_last(self.fields, index) {
                return seed.deserialize(name.into_deserializer()).map(Some);
            }
            self.map.next_value::<IgnoredAny>()?;
        }
        Ok(None)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}
