//! Chat templates against Hugging Face transformers, byte for byte.
//!
//! Method: goldens under `models/qwen2.5`, written by `scripts/gen_template_goldens.py`.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use qwen_server::chat::template::{ChatTemplate, RenderOptions, TemplateTokens};
use serde::Deserialize;
use serde_json::Value;

const QWEN25: &str = include_str!("../models/qwen2.5/chat_template.jinja");

#[derive(Deserialize)]
struct Golden {
    #[serde(default)]
    name: String,
    messages: Value,
    tools: Option<Value>,
    #[serde(default = "yes")]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
    /// Absent where transformers refuses the conversation.
    text: Option<String>,
}

fn yes() -> bool {
    true
}

fn tokens() -> TemplateTokens {
    TemplateTokens { bos_token: None, eos_token: Some("<|im_end|>".to_owned()) }
}

fn check(golden: &Golden, template: &ChatTemplate) -> Result<(), String> {
    let options = RenderOptions {
        add_generation_prompt: golden.add_generation_prompt,
        continue_final_message: golden.continue_final_message,
        ..Default::default()
    };
    let rendered = template.render(&golden.messages, golden.tools.as_ref(), &options);
    match (&golden.text, rendered) {
        (Some(expected), Ok(text)) if text == *expected => Ok(()),
        (None, Err(_)) => Ok(()),
        (expected, rendered) => Err(format!(
            "{} ({}):\nexpected {expected:?}\nrendered {rendered:?}\n",
            golden.name, golden.add_generation_prompt
        )),
    }
}

fn check_all(json: &str) {
    let goldens: Vec<Golden> = serde_json::from_str(json).unwrap();
    let template = ChatTemplate::new(QWEN25, tokens()).unwrap();
    let failures: Vec<String> =
        goldens.iter().filter_map(|golden| check(golden, &template).err()).collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), goldens.len(), failures.concat());
}

#[test]
fn conversations_equal_the_reference() {
    check_all(include_str!("../models/qwen2.5/chat_templates.json"));
}

#[test]
fn tools_odd_orders_and_continued_messages_equal_transformers() {
    check_all(include_str!("../models/qwen2.5/template_goldens.json"));
}

#[derive(Deserialize)]
struct Expression {
    template: String,
    messages: Value,
    text: Option<String>,
}

// Goal: what any template can observe behaves as under transformers.
#[test]
fn expressions_equal_transformers() {
    let json = include_str!("../models/qwen2.5/template_expressions.json");
    let expressions: Vec<Expression> = serde_json::from_str(json).unwrap();
    let mut failures = Vec::new();
    for Expression { template, messages, text } in expressions {
        let rendered = ChatTemplate::new(&template, tokens())
            .and_then(|template| template.render(&messages, None, &RenderOptions::default()));
        if rendered.as_ref().ok() != text.as_ref() {
            failures.push(format!("{template}\nexpected {text:?}\nrendered {rendered:?}\n"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.concat());
}
