//! Tool calls as answers carry them.

use serde::Serialize;

/// A call in a whole answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MessageToolCall {
    pub id: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub function: CalledFunction,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CalledFunction {
    pub name: String,
    /// JSON as the model wrote it.
    pub arguments: String,
}

/// A part of a call in a chunk. Only the first part of an index has `id`, `type` and a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ToolCallChunk {
    pub index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    pub function: FunctionChunk,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FunctionChunk {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub arguments: String,
}
