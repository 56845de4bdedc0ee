//! Messages of a conversation, as requests carry them.

use serde::Deserialize;
use serde_json::Value;

#[derive(Clone, Debug, Deserialize)]
pub struct ChatMessage {
    pub role: Role,
    pub content: Option<Content>,
    pub name: Option<String>,
    pub tool_calls: Option<Vec<ToolCall>>,
    pub tool_call_id: Option<String>,
    pub function_call: Option<FunctionCall>,
    pub reasoning_content: Option<String>,
    /// As DashScope has it: the message is the beginning of the answer.
    pub partial: Option<bool>,
    /// As some clients put it on a message instead of a part.
    pub cache_control: Option<Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
    Function,
}

/// Parts stay JSON here: which kinds are understood is decided where they are read.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of content parts")]
pub enum Content {
    Text(String),
    Parts(Vec<Value>),
}

#[derive(Clone, Debug, Deserialize)]
pub struct ToolCall {
    pub id: Option<String>,
    pub function: FunctionCall,
}

#[derive(Clone, Debug, Deserialize)]
pub struct FunctionCall {
    pub name: String,
    /// A string of JSON by the schema; some clients send the object itself.
    pub arguments: Option<Value>,
}
