//! The header of a safetensors file: lengths, offsets, types and shapes, each checked.

use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{ElementType, TensorInfo};
use crate::weights::gguf::shown;
use crate::weights::repository::Problem;

/// The format's own bound.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const MAX_DIMENSIONS: usize = 8;
const LENGTH_BYTES: usize = 8;

/// A tensor as the header describes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    dtype: String,
    shape: Vec<u64>,
    /// Begin and end, counted from the end of the header.
    data_offsets: (u64, u64),
}

/// The header with every name as often as it occurs: an ordinary map would keep one of two.
struct Header(Vec<(String, Description)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Reads and checks the header of a whole file's bytes. Gives the tensors by where they lie.
pub(super) fn parse(file: &[u8]) -> Result<Vec<TensorInfo>, Problem> {
    let truncated = |what: &str| Problem::Truncated { what: what.to_owned(), len: file.len() };
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(truncated("the length of the header"));
    };
    let length = u64::from_le_bytes(*length);
    if MAX_HEADER_BYTES < length {
        return Err(Problem::Malformed(format!(
            "not a safetensors file: its header would have {length} bytes"
        )));
    }
    let Some((header, data)) = rest.split_at_checked(length as usize) else {
        return Err(truncated("the header"));
    };
    let Header(descriptions) = serde_json::from_slice(header)
        .map_err(|error| Problem::Malformed(format!("its header cannot be read: {error}")))?;
    let mut seen = HashSet::with_capacity(descriptions.len());
    let mut tensors = Vec::with_capacity(descriptions.len());
    let data_start = file.len() - data.len();
    for (name, description) in &descriptions {
        if !seen.insert(name.as_str()) {
            return Err(Problem::Malformed(format!("tensor `{}` appears twice", shown(name))));
        }
        tensors.push(locate(name, description, data_start, file.len())?);
    }
    tensors.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    check_order(&tensors, data_start, file.len())?;
    Ok(tensors)
}

fn locate(
    name: &str,
    description: &Description,
    data_start: usize,
    file_len: usize,
) -> Result<TensorInfo, Problem> {
    let malformed = |text: String| Problem::Malformed(format!("tensor `{}` {text}", shown(name)));
    let Description { dtype, shape, data_offsets: (begin, end) } = description;
    let dtype = ElementType::from_name(dtype)
        .ok_or_else(|| Problem::UnsupportedType { tensor: shown(name), dtype: shown(dtype) })?;
    if MAX_DIMENSIONS < shape.len() {
        return Err(malformed(format!("has {} dimensions", shape.len())));
    }
    let num_bytes = shape
        .iter()
        .try_fold(dtype.num_bytes() as u64, |product, &size| product.checked_mul(size))
        .ok_or_else(|| malformed(format!("has the impossible shape {shape:?}")))?;
    if end.checked_sub(*begin) != Some(num_bytes) {
        return Err(malformed(format!(
            "lies at {begin} to {end}, but {shape:?} {} values are {num_bytes} bytes",
            dtype.name()
        )));
    }
    if ((file_len - data_start) as u64) < *end {
        let what = format!("tensor `{}`", shown(name));
        return Err(Problem::Truncated { what, len: file_len });
    }
    Ok(TensorInfo {
        name: name.to_owned(),
        dtype,
        shape: shape.iter().map(|&size| size as usize).collect(),
        range: data_start + *begin as usize..data_start + *end as usize,
    })
}

/// The format allows no gaps and no overlaps, so that nothing can hide in a file.
fn check_order(tensors: &[TensorInfo], data_start: usize, file_len: usize) -> Result<(), Problem> {
    let mut end = data_start;
    let mut before = "";
    for tensor in tensors {
        let name = shown(&tensor.name);
        if tensor.range.start < end {
            let before = shown(before);
            return Err(Problem::Malformed(format!("tensors `{before}` and `{name}` overlap")));
        }
        if end < tensor.range.start {
            return Err(Problem::Malformed(format!("there is a gap before tensor `{name}`")));
        }
        end = tensor.range.end;
        before = &tensor.name;
    }
    if end < file_len {
        let num_bytes = file_len - end;
        return Err(Problem::Malformed(format!("{num_bytes} bytes belong to no tensor")));
    }
    Ok(())
}
