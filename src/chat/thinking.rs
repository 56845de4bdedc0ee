//! Reads how much a request wants the model to think, under the names that clients use.

use serde_json::{Map, Value};

use crate::chat::model::Reasoning;
use crate::chat::prompt::PromptError;
use crate::chat::reasoning::{self, ReasoningStart};
use crate::engine::request::ThinkingBudget;
use crate::openai::chat::ChatCompletionRequest;
use crate::text::Tokenizer;

/// What templates of models that think call their switch.
const SWITCH: &str = "enable_thinking";
/// What templates that can keep earlier thoughts in the prompt call that switch.
pub(super) const PRESERVE: &str = "preserve_thinking";

/// How much the model may think.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Thinking {
    /// Whether it thinks at all; `None` leaves that to the template.
    pub(super) is_enabled: Option<bool>,
    /// Whether thoughts of earlier answers stay in the prompt; `None` leaves that to the template.
    pub(super) preserves: Option<bool>,
    /// Most tokens of thought.
    pub(super) budget: Option<usize>,
    /// The field that says so.
    budget_param: &'static str,
    /// Fields that have no effect because the model does not think.
    pub(super) ignored: Vec<&'static str>,
}

impl Thinking {
    /// Reads and checks the fields.
    pub(super) fn read(
        request: &ChatCompletionRequest,
        reasoning: Reasoning,
    ) -> Result<Self, PromptError> {
        let effort = match (&request.reasoning_effort, &request.reasoning) {
            (Some(effort), _) => Some(("reasoning_effort", effort)),
            (None, Some(options)) => {
                options.effort.as_ref().map(|effort| ("reasoning.effort", effort))
            }
            (None, None) => None,
        };
        let budget_param = match (request.thinking_budget, effort) {
            (None, Some((param, _))) => param,
            _ => "thinking_budget",
        };
        let effort = effort.map(|(param, effort)| Effort::read(param, effort)).transpose()?;
        let budget = match request.thinking_budget {
            Some(budget) if budget < 0 => {
                return Err(PromptError::invalid("thinking_budget", "must not be negative"));
            }
            budget => budget.map(|budget| budget as usize),
        };
        if reasoning == Reasoning::No {
            let given = [
                (SWITCH, request.enable_thinking.is_some()),
                (PRESERVE, request.preserve_thinking == Some(true)),
                ("thinking_budget", budget.is_some()),
                ("reasoning_effort", request.reasoning_effort.is_some()),
                ("reasoning", request.reasoning.is_some()),
            ];
            let ignored = given.into_iter().filter(|(_, is_given)| *is_given);
            let ignored = ignored.map(|(name, _)| name).collect();
            return Ok(Self { ignored, ..Self::default() });
        }
        let of_template = request
            .chat_template_kwargs
            .as_ref()
            .and_then(|kwargs| kwargs.get(SWITCH).and_then(Value::as_bool));
        let is_enabled = request.enable_thinking.or(of_template);
        Ok(Self {
            is_enabled: is_enabled.or(effort.map(|effort| effort != Effort(Some(0)))),
            preserves: request.preserve_thinking,
            budget: budget.or(effort.and_then(|Effort(budget)| budget)),
            budget_param,
            ignored: Vec::new(),
        })
    }

    /// Tells the template.
    pub(super) fn add_to(&self, variables: &mut Map<String, Value>) {
        let is_enabled = if self.is_off() { Some(false) } else { self.is_enabled };
        if let Some(is_enabled) = is_enabled {
            variables.insert(SWITCH.to_owned(), is_enabled.into());
        }
        if let Some(preserves) = self.preserves {
            variables.insert(PRESERVE.to_owned(), preserves.into());
        }
    }

    /// Whether the template's thought must be ended before it begins.
    pub(super) fn is_off(&self) -> bool {
        self.is_enabled == Some(false) || self.budget == Some(0)
    }

    /// What the engine is to enforce on a text that begins at `start`.
    pub(super) fn limit(
        &self,
        start: Option<ReasoningStart>,
        tokenizer: &Tokenizer,
    ) -> Result<Option<ThinkingBudget>, PromptError> {
        let (Some(num_tokens), Some(start)) = (self.budget, start) else { return Ok(None) };
        let unlimited = || {
            let flaw = "the thoughts of this model cannot be limited: it has no tokens around them";
            PromptError::invalid(self.budget_param, flaw)
        };
        let open = match start {
            ReasoningStart::Before => {
                Some(tokenizer.id_of(reasoning::OPEN_TAG).ok_or_else(unlimited)?)
            }
            ReasoningStart::Inside => None,
        };
        let close = tokenizer.id_of(reasoning::CLOSE_TAG).ok_or_else(unlimited)?;
        let end = tokenizer.encode(reasoning::END);
        let end = end.map_err(|error| PromptError::Encode(error.to_string()))?;
        Ok(Some(ThinkingBudget { num_tokens, open, close, end: end.into() }))
    }
}

/// An effort as the tokens of thought it is worth; `None` for as many as the model likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Effort(Option<usize>);

impl Effort {
    fn read(param: &str, effort: &str) -> Result<Self, PromptError> {
        match effort {
            "none" => Ok(Self(Some(0))),
            "minimal" => Ok(Self(Some(256))),
            "low" => Ok(Self(Some(1024))),
            "medium" => Ok(Self(Some(4096))),
            "high" => Ok(Self(Some(16_384))),
            "xhigh" | "max" => Ok(Self(None)),
            _ => Err(PromptError::invalid(
                param,
                "expected `none`, `minimal`, `low`, `medium`, `high`, `xhigh` or `max`",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(fields: &Value, reasoning: Reasoning) -> Result<Thinking, PromptError> {
        let mut body = json!({"model": "m", "messages": []});
        for (name, value) in fields.as_object().unwrap() {
            body[name] = value.clone();
        }
        Thinking::read(&serde_json::from_value(body).unwrap(), reasoning)
    }

    #[test]
    fn every_name_is_understood() {
        for (fields, is_enabled, budget) in [
            (json!({}), None, None),
            (json!({"enable_thinking": false}), Some(false), None),
            (json!({"chat_template_kwargs": {"enable_thinking": true}}), Some(true), None),
            (json!({"thinking_budget": 7, "reasoning_effort": "low"}), Some(true), Some(7)),
            (json!({"reasoning": {"effort": "minimal"}}), Some(true), Some(256)),
            (json!({"reasoning_effort": "none"}), Some(false), Some(0)),
            (json!({"reasoning_effort": "max"}), Some(true), None),
        ] {
            let thinking = read(&fields, Reasoning::InTags).unwrap();
            assert_eq!((thinking.is_enabled, thinking.budget), (is_enabled, budget), "{fields}");
            assert!(thinking.ignored.is_empty());
        }
    }

    #[test]
    fn a_budget_needs_a_token_that_ends_thoughts() {
        let json = include_bytes!("../../models/qwen2.5/small_tokenizer.json");
        let tokenizer = Tokenizer::from_json(json).unwrap();
        for (fields, param) in [
            (json!({"thinking_budget": 5, "reasoning_effort": "low"}), "thinking_budget"),
            (json!({"reasoning_effort": "low"}), "reasoning_effort"),
            (json!({"reasoning": {"effort": "low"}}), "reasoning.effort"),
        ] {
            let thinking = read(&fields, Reasoning::InTags).unwrap();
            match thinking.limit(Some(ReasoningStart::Inside), &tokenizer) {
                Err(PromptError::Invalid { param: named, .. }) => assert_eq!(named, param),
                other => panic!("{fields}: {other:?}"),
            }
            assert_eq!(thinking.limit(None, &tokenizer).unwrap(), None);
        }
        let unlimited = read(&json!({"reasoning_effort": "max"}), Reasoning::InTags).unwrap();
        assert_eq!(unlimited.limit(Some(ReasoningStart::Inside), &tokenizer).unwrap(), None);
    }

    #[test]
    fn a_model_that_does_not_think_ignores_them_but_not_wrong_values() {
        let fields =
            json!({"enable_thinking": true, "thinking_budget": 1, "reasoning_effort": "low"});
        let thinking = read(&fields, Reasoning::No).unwrap();
        assert_eq!(thinking.ignored, ["enable_thinking", "thinking_budget", "reasoning_effort"]);
        for fields in [json!({"thinking_budget": -1}), json!({"reasoning_effort": "huge"})] {
            assert!(read(&fields, Reasoning::No).is_err(), "{fields}");
        }
    }
}
