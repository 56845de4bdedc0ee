//! Checks the tools of a request and what it wants of them.

mod fit;

use std::sync::Arc;

use serde_json::{Map, Value, json};

pub use fit::fits;

use crate::chat::prompt::PromptError;
use crate::openai::chat::ChatCompletionRequest;

/// More tools than any client sends; every one is in the prompt.
const MAX_TOOLS: usize = 512;
/// Longest name of a function.
const MAX_NAME_CHARS: usize = 128;

/// A tool that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// The function's name.
    pub name: String,
    /// The schema of its arguments, an object.
    pub parameters: Value,
    /// The field of the request that holds this schema.
    pub param: String,
    /// Whether arguments must keep to the schema.
    pub is_strict: bool,
}

/// Whether the model must call a tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// As it likes.
    MayCall,
    /// It must.
    MustCall,
}

/// What a request says about tools, checked.
#[derive(Clone, Debug)]
pub struct ToolUse {
    /// The definitions for the template.
    pub definitions: Value,
    /// The tools that may be called.
    pub callable: Arc<[Tool]>,
    /// Whether one must be.
    pub demand: Demand,
    /// Most calls in a choice.
    pub max_calls: u32,
}

impl ToolUse {
    /// Reads `tools` and `tool_choice`, or the older `functions` and `function_call`. `None` if the
    /// model is to know of no tools: a choice of `none` keeps them out of the prompt too, which is
    /// what keeps a model from calling one.
    pub fn read(request: &ChatCompletionRequest) -> Result<Option<Self>, PromptError> {
        let (definitions, tools) = match (&request.tools, &request.functions) {
            (Some(tools), _) => (without_marks(tools), read_tools(tools)?),
            (None, Some(functions)) => {
                let tools = read_all("functions", functions, read_function)?;
                let definition = |f: &Value| json!({"type": "function", "function": f});
                (functions.iter().map(definition).collect(), tools)
            }
            (None, None) => (Vec::new(), Vec::new()),
        };
        let is_legacy = request.tools.is_none() && request.functions.is_some();
        let choice = match (&request.tool_choice, &request.function_call) {
            (None | Some(Value::Null), choice) if request.tools.is_none() => {
                Choice::read("function_call", choice.as_ref())?
            }
            (choice, _) => Choice::read("tool_choice", choice.as_ref())?,
        };
        if choice.demand == Some(Demand::MustCall) && tools.is_empty() {
            return Err(PromptError::invalid(choice.param, "needs `tools`"));
        }
        let Some(demand) = choice.demand.filter(|_| !tools.is_empty()) else { return Ok(None) };
        let is_single = is_legacy || request.parallel_tool_calls == Some(false);
        Ok(Some(Self {
            definitions: definitions.into(),
            callable: choice.callable(tools)?,
            demand,
            max_calls: if is_single || choice.is_single { 1 } else { u32::MAX },
        }))
    }
}

/// The definitions as the model is to see them: what to keep in the cache is nothing to it.
fn without_marks(tools: &[Value]) -> Vec<Value> {
    const MARK: &str = "cache_control";
    let mut tools = tools.to_vec();
    for tool in tools.iter_mut().filter_map(Value::as_object_mut) {
        tool.shift_remove(MARK);
        if let Some(function) = tool.get_mut("function").and_then(Value::as_object_mut) {
            function.shift_remove(MARK);
        }
    }
    tools
}

/// Checks the definitions of tools.
pub fn read_tools(tools: &[Value]) -> Result<Vec<Tool>, PromptError> {
    read_all("tools", tools, |tool| {
        match tool.get("type").map(Value::as_str) {
            None | Some(Some("function")) => {}
            Some(_) => return Err(flaw(".type", "only tools of type `function` are supported")),
        }
        let function = tool.get("function").ok_or(flaw(".function", "is missing"))?;
        read_function(function)
            .map_err(|flaw| Flaw { path: format!(".function{}", flaw.path), ..flaw })
    })
}

/// Where in a definition something is wrong, and what.
struct Flaw {
    path: String,
    message: &'static str,
}

fn flaw(path: &str, message: &'static str) -> Flaw {
    Flaw { path: path.to_owned(), message }
}

fn read_all(
    param: &str,
    definitions: &[Value],
    read: impl Fn(&Value) -> Result<Tool, Flaw>,
) -> Result<Vec<Tool>, PromptError> {
    if MAX_TOOLS < definitions.len() {
        return Err(PromptError::invalid(
            param,
            format!("must hold at most {MAX_TOOLS} definitions, got {}", definitions.len()),
        ));
    }
    let mut tools: Vec<Tool> = Vec::new();
    for (index, definition) in definitions.iter().enumerate() {
        let mut tool = read(definition).map_err(|flaw| {
            PromptError::invalid(format!("{param}[{index}]{}", flaw.path), flaw.message)
        })?;
        let path = if param == "tools" { ".function" } else { "" };
        tool.param = format!("{param}[{index}]{path}.parameters");
        if tools.iter().any(|other| other.name == tool.name) {
            return Err(PromptError::invalid(
                format!("{param}[{index}]{path}.name"),
                format!("`{}` is defined twice", tool.name),
            ));
        }
        tools.push(tool);
    }
    Ok(tools)
}

fn read_function(function: &Value) -> Result<Tool, Flaw> {
    let object = function.as_object().ok_or(flaw("", "expected an object"))?;
    let name = match object.get("name").and_then(Value::as_str) {
        Some(name) if !name.is_empty() => name,
        _ => return Err(flaw(".name", "expected a string that is not empty")),
    };
    let is_plain = |c: char| c.is_alphanumeric() || "_-.:/".contains(c);
    if !name.chars().all(is_plain) || MAX_NAME_CHARS < name.chars().count() {
        return Err(flaw(
            ".name",
            "must be at most 128 letters, digits, `_`, `-`, `.`, `:` and `/`",
        ));
    }
    if !matches!(object.get("description"), None | Some(Value::Null | Value::String(_))) {
        return Err(flaw(".description", "expected a string"));
    }
    let is_strict = match object.get("strict") {
        None | Some(Value::Null) => false,
        Some(strict) => strict.as_bool().ok_or(flaw(".strict", "expected true or false"))?,
    };
    let parameters = match object.get("parameters") {
        None | Some(Value::Null) => json!({"type": "object", "properties": {}}),
        Some(Value::Object(schema)) => {
            check_parameters(schema)?;
            Value::Object(schema.clone())
        }
        Some(_) => return Err(flaw(".parameters", "expected a JSON schema, which is an object")),
    };
    Ok(Tool { name: name.to_owned(), parameters, param: String::new(), is_strict })
}

fn check_parameters(schema: &Map<String, Value>) -> Result<(), Flaw> {
    if schema.get("type").is_some_and(|kind| kind != "object") {
        return Err(flaw(".parameters.type", "must be `object`: arguments are an object"));
    }
    if !matches!(schema.get("properties"), None | Some(Value::Object(_))) {
        return Err(flaw(".parameters.properties", "expected an object"));
    }
    let is_list = |required: &Value| {
        required.as_array().is_some_and(|names| names.iter().all(Value::is_string))
    };
    if schema.get("required").is_some_and(|required| !is_list(required)) {
        return Err(flaw(".parameters.required", "expected a list of strings"));
    }
    Ok(())
}

/// What `tool_choice` or `function_call` says.
struct Choice {
    param: &'static str,
    /// `None` for no tools at all.
    demand: Option<Demand>,
    /// The only tools that may be called, and the fields that name them.
    names: Option<Vec<(String, String)>>,
    is_single: bool,
}

impl Choice {
    fn read(param: &'static str, choice: Option<&Value>) -> Result<Self, PromptError> {
        let plain = |demand| Ok(Self { param, demand, names: None, is_single: false });
        let choice = match choice {
            None | Some(Value::Null) => return plain(Some(Demand::MayCall)),
            Some(choice) => choice,
        };
        match (choice.as_str(), choice.get("type").and_then(Value::as_str)) {
            (Some("auto"), _) => plain(Some(Demand::MayCall)),
            (Some("none"), _) => plain(None),
            (Some("required" | "any"), _) if param == "tool_choice" => {
                plain(Some(Demand::MustCall))
            }
            (None, Some("allowed_tools")) if param == "tool_choice" => Self::allowed(choice),
            (None, Some("function")) if param == "tool_choice" => {
                Self::named(param, choice.get("function"), ".function")
            }
            (None, None) if param == "function_call" => Self::named(param, Some(choice), ""),
            _ => Err(PromptError::invalid(
                param,
                match param {
                    "tool_choice" => {
                        "expected `none`, `auto`, `required`, a function or `allowed_tools`"
                    }
                    _ => "expected `none`, `auto` or an object with a `name`",
                },
            )),
        }
    }

    fn named(
        param: &'static str,
        function: Option<&Value>,
        path: &str,
    ) -> Result<Self, PromptError> {
        let name = function.and_then(|function| function.get("name")).and_then(Value::as_str);
        let path = format!("{param}{path}.name");
        let name = name.ok_or_else(|| PromptError::invalid(&path, "expected a string"))?;
        let names = Some(vec![(name.to_owned(), path)]);
        Ok(Self { param, demand: Some(Demand::MustCall), names, is_single: true })
    }

    fn allowed(choice: &Value) -> Result<Self, PromptError> {
        let param = "tool_choice";
        // The schema has the fields beneath the type's name; some clients leave that level out.
        let (allowed, path) = match choice.get("allowed_tools") {
            Some(allowed) => (allowed, "tool_choice.allowed_tools"),
            None => (choice, param),
        };
        let demand = match allowed.get("mode").map(Value::as_str) {
            None | Some(Some("auto")) => Demand::MayCall,
            Some(Some("required")) => Demand::MustCall,
            Some(_) => {
                let path = format!("{path}.mode");
                return Err(PromptError::invalid(path, "expected `auto` or `required`"));
            }
        };
        let tools = allowed.get("tools").and_then(Value::as_array).filter(|all| !all.is_empty());
        let tools = tools.ok_or_else(|| {
            PromptError::invalid(format!("{path}.tools"), "expected a list that is not empty")
        })?;
        let names: Result<Vec<_>, PromptError> = tools
            .iter()
            .enumerate()
            .map(|(index, tool)| {
                let name = tool.get("function").unwrap_or(tool).get("name").and_then(Value::as_str);
                let path = format!("{path}.tools[{index}]");
                match name {
                    Some(name) => Ok((name.to_owned(), path)),
                    None => Err(PromptError::invalid(path, "expected a function with a `name`")),
                }
            })
            .collect();
        Ok(Self { param, demand: Some(demand), names: Some(names?), is_single: false })
    }

    fn callable(&self, tools: Vec<Tool>) -> Result<Arc<[Tool]>, PromptError> {
        let Some(names) = &self.names else { return Ok(tools.into()) };
        for (name, path) in names {
            if !tools.iter().any(|tool| tool.name == *name) {
                return Err(PromptError::invalid(path, format!("there is no tool `{name}`")));
            }
        }
        let is_named = |tool: &Tool| names.iter().any(|(name, _)| *name == tool.name);
        Ok(tools.into_iter().filter(is_named).collect())
    }
}
