//! Chat templates: the model's own Jinja text, rendered as Hugging Face transformers renders it.
//!
//! A prompt that differs in one space is a different prompt to the model, so everything a template
//! can observe follows `apply_chat_template`: block trimming, the `tojson` format, lenient
//! undefined values, Python's methods and spelling of values, `raise_exception`, `strftime_now`,
//! loop controls and `{% generation %}`. What minijinja cannot do, such as `'%s' % x`, is an error,
//! never other text. **Invariant:** rendering ends, whatever the template: it runs on fuel.

mod json;
mod python;
mod strftime;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior, Value};
use serde_json::Map;
use thiserror::Error;

const NAME: &str = "chat_template";

/// Instructions one rendering may take. Some hundred per message suffice; this many take seconds.
const FUEL: u64 = 20_000_000;

/// Stands at the end of the message to continue, to find that place again in the rendered text. The
/// space is part of it: it is gone if the template trims the message.
const END_OF_MESSAGE: &str = "\u{f8ff}end of the message to continue\u{f8ff} ";

/// Why a template cannot be used, or what it objected to.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// The template is not valid.
    #[error("the chat template has an error")]
    Syntax(#[source] minijinja::Error),
    /// The template called `raise_exception`: the conversation is not one the model supports.
    #[error("the chat template refuses the conversation: {0}")]
    Raised(String),
    /// The template cannot be rendered with this conversation.
    #[error("the chat template cannot render the conversation")]
    Render(#[source] minijinja::Error),
    /// The template brings its interpreter into a state that it does not expect.
    #[error("the chat template cannot be run; it may be damaged")]
    Broken,
    /// The template does not come to an end.
    #[error("the chat template takes too many steps")]
    OutOfFuel,
    /// Continuing the final message and beginning another exclude each other.
    #[error("`continue_final_message` and `add_generation_prompt` exclude each other")]
    ContinueAndGenerate,
    /// The final message is missing or has no text.
    #[error("there is no final message with text to continue")]
    NothingToContinue,
    /// The template does not show the final message as it is.
    #[error("the chat template does not keep the final message, so it cannot be continued")]
    FinalMessageLost,
}

/// The tokens a template may name.
#[derive(Clone, Debug, Default)]
pub struct TemplateTokens {
    /// Text of the beginning-of-sequence token, if the model has one.
    pub bos_token: Option<String>,
    /// Text of the end-of-sequence token, if the model has one.
    pub eos_token: Option<String>,
}

/// What one rendering is for.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// End with the beginning of an assistant's message.
    pub add_generation_prompt: bool,
    /// End inside the final message, right after its text.
    pub continue_final_message: bool,
    /// Further variables for the template, as `enable_thinking`.
    pub extra: Map<String, serde_json::Value>,
}

/// A parsed chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: TemplateTokens,
}

impl ChatTemplate {
    /// Parses the Jinja text `source`.
    pub fn new(source: &str, tokens: TemplateTokens) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(TemplateError::Syntax)?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        python::install(&mut environment);
        environment.set_fuel(Some(FUEL));
        environment.add_filter("tojson", json::tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, replace_generation_tags(source))
            .map_err(TemplateError::Syntax)?;
        Ok(Self { environment, tokens })
    }

    /// The prompt for `messages`, an array of messages, and `tools`, an array of tool definitions.
    pub fn render(
        &self,
        messages: &serde_json::Value,
        tools: Option<&serde_json::Value>,
        options: &RenderOptions,
    ) -> Result<String, TemplateError> {
        if !options.continue_final_message {
            return self.render_messages(messages, tools, options);
        }
        if options.add_generation_prompt {
            return Err(TemplateError::ContinueAndGenerate);
        }
        let mut marked = messages.clone();
        let content = marked
            .as_array_mut()
            .and_then(|messages| messages.last_mut())
            .and_then(|message| message.get_mut("content"));
        let Some(serde_json::Value::String(content)) = content else {
            return Err(TemplateError::NothingToContinue);
        };
        let final_text = content.trim().to_owned();
        content.push_str(END_OF_MESSAGE);
        let rendered = self.render_messages(&marked, tools, options)?;
        cut_after_message(&rendered, &final_text).ok_or(TemplateError::FinalMessageLost)
    }

    /// Whether the template can be told anything by a variable of this name.
    pub fn reads(&self, variable: &str) -> bool {
        let template = self.environment.get_template(NAME);
        template.is_ok_and(|template| template.undeclared_variables(false).contains(variable))
    }

    fn render_messages(
        &self,
        messages: &serde_json::Value,
        tools: Option<&serde_json::Value>,
        options: &RenderOptions,
    ) -> Result<String, TemplateError> {
        let mut variables: Vec<(&str, Value)> =
            options.extra.iter().map(|(name, value)| (name.as_str(), to_value(value))).collect();
        let tokens = [("bos_token", &self.tokens.bos_token), ("eos_token", &self.tokens.eos_token)];
        for (name, token) in tokens {
            variables.extend(token.as_ref().map(|token| (name, Value::from(token.as_str()))));
        }
        variables.push(("messages", to_value(messages)));
        variables.push(("tools", tools.map_or(Value::from(()), to_value)));
        variables.push(("documents", Value::from(())));
        variables.push(("add_generation_prompt", options.add_generation_prompt.into()));
        let context = Value::from_pairs(variables);
        let template = self.environment.get_template(NAME).map_err(TemplateError::Syntax)?;
        // The interpreter has places that odd templates bring to a panic.
        let render = AssertUnwindSafe(|| template.render(context));
        let rendered = catch_unwind(render).map_err(|_| TemplateError::Broken)?;
        rendered.map_err(classify)
    }
}

fn to_value(value: &serde_json::Value) -> Value {
    Value::from(Serde(value))
}

/// The message that a template passed to `raise_exception`.
#[derive(Debug, Error)]
#[error("{0}")]
struct RaisedException(String);

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(RaisedException(message)))
}

/// The current time, in UTC, as Python's `strftime` would write it.
fn strftime_now(format: &str) -> String {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    strftime::format_utc(format, since_epoch.as_secs())
}

fn classify(error: minijinja::Error) -> TemplateError {
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::OutOfFuel;
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(RaisedException(message)) = current.downcast_ref() {
            return TemplateError::Raised(message.clone());
        }
        cause = current.source();
    }
    TemplateError::Render(error)
}

/// Everything of `rendered` up to the end of the message that carries the marker.
fn cut_after_message(rendered: &str, final_text: &str) -> Option<String> {
    let marker = END_OF_MESSAGE.trim_end();
    let end = rendered.rfind(marker)?;
    if !rendered.contains(final_text) {
        return None;
    }
    let text = &rendered[..end];
    let is_trimmed = !rendered[end..].starts_with(END_OF_MESSAGE);
    Some(if is_trimmed { text.trim_end() } else { text }.to_owned())
}

/// `source` with `{% generation %}` and `{% endgeneration %}`, which mark the assistant's text for
/// training, replaced by a condition that always holds: the text inside stays, and so does the
/// trimming of blank space around the tags.
fn replace_generation_tags(source: &str) -> String {
    let mut replaced = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        replaced.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inside = &tag[..end];
        let name = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        match name {
            "generation" => replaced.push_str(&inside.replace(name, "if true")),
            "endgeneration" => replaced.push_str(&inside.replace(name, "endif")),
            _ => replaced.push_str(inside),
        }
        rest = &tag[end..];
    }
    replaced.push_str(rest);
    replaced
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: &serde_json::Value) -> Result<String, TemplateError> {
        let template = ChatTemplate::new(source, TemplateTokens::default())?;
        template.render(messages, None, &RenderOptions::default())
    }

    fn expression(source: &str) -> String {
        render(source, &json!([{"role": "user", "content": "Hi"}])).unwrap()
    }

    #[test]
    fn values_are_spelled_as_in_python() {
        assert_eq!(expression("{{ none }} {{ true }} {{ False }}"), "None True False");
        assert_eq!(expression("{{ messages[0].tool_calls }}|{{ nothing }}"), "|");
        assert_eq!(expression("{{ messages[0].tool_calls is defined }}"), "False");
        assert_eq!(expression("{{ tools }} {{ add_generation_prompt }}"), "None False");
        assert_eq!(
            expression("{{ [1, 'a', none, true, 1.5, {'k': \"it's\"}] }}"),
            r#"[1, 'a', None, True, 1.5, {'k': "it's"}]"#
        );
    }

    #[test]
    fn generation_tags_leave_their_text_and_trimming() {
        let source = "a\n  {% generation %}\nb {%- endgeneration -%}  c{% generation %}d";
        let replaced = replace_generation_tags(source);
        assert_eq!(replaced, "a\n  {% if true %}\nb {%- endif -%}  c{% if true %}d");
        assert_eq!(expression("a\n  {% generation %}\nb {%- endgeneration -%}  c"), "a\nbc");
        assert_eq!(replace_generation_tags("é {% x"), "é {% x");
    }

    #[test]
    fn an_exception_of_the_template_keeps_its_message() {
        let error = render("{{ raise_exception('roles alternate') }}", &json!([]));
        let Err(TemplateError::Raised(message)) = error else { panic!("{error:?}") };
        assert_eq!(message, "roles alternate");
        let nested = "{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}";
        assert!(matches!(render(nested, &json!([])), Err(TemplateError::Raised(_))));
    }

    #[test]
    fn a_hostile_template_is_stopped() {
        let endless = "{% for a in range(100000) %}{% for b in range(100000) %}{{ a }}{% endfor %}\
                       {% endfor %}";
        assert!(matches!(render(endless, &json!([])), Err(TemplateError::OutOfFuel)));
        let recursive = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
        assert!(matches!(render(recursive, &json!([])), Err(TemplateError::Render(_))));
        assert!(matches!(render("{% if %}", &json!([])), Err(TemplateError::Syntax(_))));
    }

    #[test]
    fn missing_attributes_of_undefined_values_are_errors() {
        assert!(matches!(render("{{ nothing.x }}", &json!([])), Err(TemplateError::Render(_))));
        let missing_content = "{{ 'a' + messages[0].content }}";
        assert!(render(missing_content, &json!([{"content": null}])).is_err());
        assert!(render(missing_content, &json!([{}])).is_err());
    }

    #[test]
    fn python_methods_loop_controls_and_tokens_work() {
        assert_eq!(expression("{{ ' a,b '.strip().split(',')[-1].upper() }}"), "B");
        assert_eq!(expression("{{ messages[::-1][0].get('name', 'x') }}"), "x");
        assert_eq!(
            expression(
                "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}\
                 {% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
            ),
            "023"
        );
        let tokens = TemplateTokens { bos_token: None, eos_token: Some("<|im_end|>".into()) };
        let template =
            ChatTemplate::new("{{ bos_token }}{{ eos_token }}{{ mode }}", tokens).unwrap();
        let mut options = RenderOptions::default();
        options.extra.insert("mode".into(), json!("m"));
        assert_eq!(template.render(&json!([]), None, &options).unwrap(), "<|im_end|>m");
    }

    fn continued(source: &str, content: &serde_json::Value) -> Result<String, TemplateError> {
        let template = ChatTemplate::new(source, TemplateTokens::default())?;
        let options = RenderOptions { continue_final_message: true, ..Default::default() };
        template.render(&json!([{"content": content}]), None, &options)
    }

    #[test]
    fn a_continued_message_ends_right_after_its_text() {
        let keeping = "<{{ messages[-1].content }}>\n";
        assert_eq!(continued(keeping, &json!("ab ")).unwrap(), "<ab ");
        assert_eq!(continued(keeping, &json!("")).unwrap(), "<");
        let trimming = "<{{ messages[-1].content | trim }}>\n";
        assert_eq!(continued(trimming, &json!("ab ")).unwrap(), "<ab");
    }

    #[test]
    fn what_cannot_be_continued_is_an_error() {
        let lost = continued("<{{ messages[-1].content[0] }}>", &json!("ab"));
        assert!(matches!(lost, Err(TemplateError::FinalMessageLost)));
        let null = continued("{{ messages[-1].content }}", &json!(null));
        assert!(matches!(null, Err(TemplateError::NothingToContinue)));
        let template = ChatTemplate::new("", TemplateTokens::default()).unwrap();
        let both = RenderOptions {
            add_generation_prompt: true,
            continue_final_message: true,
            ..Default::default()
        };
        let error = template.render(&json!([]), None, &both);
        assert!(matches!(error, Err(TemplateError::ContinueAndGenerate)));
    }
}
