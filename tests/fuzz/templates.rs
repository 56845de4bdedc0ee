//! Chat templates: whatever a conversation or a template holds, rendering ends with a text or an
//! error, the same each time.

use qwen_server::chat::template::{ChatTemplate, RenderOptions, TemplateTokens};
use serde_json::Value;

use crate::fuzzer::{fuzz, outcome};

const QWEN25: &str = include_str!("../../models/qwen2.5/chat_template.jinja");
/// Divides a template from its conversation; without one the template is Qwen2.5's.
const DIVIDER: &str = "\n====\n";

const WORDS: [&str; 45] = [
    "%",
    "{% ",
    " %}",
    "{{ ",
    " }}",
    "{%- for message in messages %}",
    "{% endfor %}",
    "{% if tools %}",
    "{% else %}",
    "{% endif %}",
    "{% set ns = namespace(x=0) %}",
    "{% set x = ",
    "{% macro m(a) %}",
    "{% endmacro %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% break %}",
    "messages[0]['content']",
    "messages[::-1]",
    "[-1]",
    "[1:]",
    "loop.index0",
    "message.role",
    "message.content",
    " | tojson",
    " | tojson(indent=2)",
    " | trim",
    " | length",
    " | items",
    " | join(',')",
    ".split('</think>')",
    ".strip('\\n')",
    ".startswith('a')",
    ".replace('a', '')",
    ".format(1)",
    "strftime_now('%d %é %')",
    "raise_exception('no')",
    " is defined",
    " is string",
    "\"content\": ",
    "\"role\": \"tool\"",
    "\"tool_calls\": [{\"function\": {\"name\": \"f\", \"arguments\": {}}}]",
    "null",
    "\\ud83d",
    "中",
];

#[test]
fn conversations_are_rendered_or_refused() {
    let tokens = || TemplateTokens { bos_token: None, eos_token: Some("<|im_end|>".into()) };
    let qwen25 = ChatTemplate::new(QWEN25, tokens()).unwrap();
    fuzz("templates", &WORDS, |input, _| {
        let text = String::from_utf8_lossy(input);
        let (source, conversation) = match text.split_once(DIVIDER) {
            Some((source, conversation)) => (Some(source), conversation),
            None => (None, &*text),
        };
        let own = source.map(|source| ChatTemplate::new(source, tokens()));
        let template = match &own {
            None => &qwen25,
            Some(Ok(template)) => template,
            Some(Err(error)) => return outcome(&format!("{error:?}").len()),
        };
        let Ok(conversation) = serde_json::from_str::<Value>(conversation) else {
            return outcome(&"no conversation");
        };
        let options = RenderOptions {
            add_generation_prompt: conversation["generate"] == true,
            continue_final_message: conversation["continue"] == true,
            extra: conversation["extra"].as_object().cloned().unwrap_or_default(),
        };
        let tools = conversation.get("tools");
        let render = || template.render(&conversation["messages"], tools, &options);
        match (render(), render()) {
            (Ok(first), Ok(second)) => {
                assert_eq!(first, second);
                outcome(&(source.is_some(), first.len() / 8))
            }
            // What else a name could have meant is listed in no order.
            (Err(first), Err(_)) => outcome(&(source.is_some(), first.to_string().len() / 8)),
            (first, second) => panic!("{first:?}, but then {second:?}"),
        }
    });
}
