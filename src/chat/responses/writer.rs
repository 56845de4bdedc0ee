//! Deltas become the output items of a response, and the events that tell of them.
//!
//! The whole answer is what remains when the events are left out, so the two cannot disagree.
//! **Invariant:** at most one item is open, and it is the last.

use std::sync::Arc;

use crate::chat::model::ServedModel;
use crate::chat::output::{Delta, ToolCallDelta};
use crate::engine::event::SampledToken;
use crate::openai::chat::ChatTokenLogprob;
use crate::openai::generation::{FinishReason, Usage};
use crate::openai::responses::{
    ContentPart, EventBody, IncompleteDetails, InputTokensDetails, OutputItem, OutputTokensDetails,
    RequestEcho, Response, ResponseError, ResponseUsage, Status, StreamEvent,
};

/// What a response begins with.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    /// Letters and digits of all ids.
    pub suffix: String,
    /// Seconds since the epoch.
    pub created_at: u64,
    /// The name that the client used.
    pub model: String,
}

/// Builds one response.
pub struct ResponseWriter {
    suffix: String,
    model: Arc<ServedModel>,
    response: Response,
    has_logprobs: bool,
    open: Option<ItemKind>,
    finish: Option<FinishReason>,
    sequence_number: u64,
    events: Vec<StreamEvent>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ItemKind {
    Reasoning,
    Message,
    Call,
}

impl ResponseWriter {
    /// A response without output. `has_logprobs` says whether its text comes with them.
    pub fn new(
        head: ResponseHead,
        echo: RequestEcho,
        model: Arc<ServedModel>,
        has_logprobs: bool,
    ) -> Self {
        let response = Response {
            id: format!("resp_{}", head.suffix),
            object: "response",
            created_at: head.created_at,
            completed_at: None,
            status: Status::InProgress,
            error: None,
            incomplete_details: None,
            model: head.model,
            output: Vec::new(),
            usage: None,
            echo,
        };
        Self {
            suffix: head.suffix,
            model,
            response,
            has_logprobs,
            open: None,
            finish: None,
            sequence_number: 0,
            events: Vec::new(),
        }
    }

    /// The response as it is.
    pub fn response(&self) -> &Response {
        &self.response
    }

    /// The response, when it is over.
    pub fn into_response(self) -> Response {
        self.response
    }

    /// The events since the last call.
    pub fn take_events(&mut self) -> Vec<StreamEvent> {
        std::mem::take(&mut self.events)
    }

    /// Says that the response exists.
    pub fn begin(&mut self) {
        self.tell_response("response.created");
        self.tell_response("response.in_progress");
    }

    /// Takes in a piece of the answer.
    pub fn push(&mut self, delta: Delta) {
        if !delta.reasoning.is_empty() {
            self.push_text(ItemKind::Reasoning, delta.reasoning, &[]);
        }
        if !delta.text.is_empty() {
            let tokens = delta.tokens.get(delta.num_reasoning_tokens..).unwrap_or_default();
            self.push_text(ItemKind::Message, delta.text, tokens);
        }
        for call in delta.tool_calls {
            self.push_call(call);
        }
        if let Some(finish) = delta.finish {
            self.finish = Some(finish.reason);
        }
    }

    /// Ends the response. `now` is in seconds since the epoch.
    pub fn end(&mut self, usage: &Usage, now: u64) {
        let is_cut = self.finish == Some(FinishReason::Length);
        let status = if is_cut { Status::Incomplete } else { Status::Completed };
        if self.response.output.is_empty() {
            self.open(ItemKind::Message);
        }
        // A call that is the end of the answer makes another reason than this one.
        let is_call_cut =
            self.open == Some(ItemKind::Call) && self.finish == Some(FinishReason::Stop);
        self.close(if is_call_cut { Status::Incomplete } else { status });
        self.response.status = status;
        self.response.usage = Some(response_usage(usage));
        if is_cut {
            self.response.incomplete_details =
                Some(IncompleteDetails { reason: "max_output_tokens" });
            self.tell_response("response.incomplete");
        } else {
            self.response.completed_at = Some(now);
            self.tell_response("response.completed");
        }
    }

    /// Ends the response because it cannot be finished.
    pub fn fail(&mut self, code: &'static str, message: String, usage: &Usage) {
        self.close(Status::Incomplete);
        self.response.status = Status::Failed;
        self.response.usage = Some(response_usage(usage));
        self.response.error = Some(ResponseError { code, message });
        self.tell_response("response.failed");
    }

    fn push_text(&mut self, kind: ItemKind, delta: String, tokens: &[SampledToken]) {
        if self.open != Some(kind) {
            self.close(Status::Completed);
            self.open(kind);
        }
        let new = self.has_logprobs.then(|| self.model.chat_logprobs(tokens).content);
        let new = new.unwrap_or_default();
        match self.response.output.last_mut().and_then(|item| part_mut(item)) {
            Some(ContentPart::OutputText { text, logprobs, .. }) => {
                text.push_str(&delta);
                logprobs.extend(new.iter().cloned());
            }
            Some(ContentPart::ReasoningText { text }) => text.push_str(&delta),
            None => {}
        }
        let (name, logprobs) = match kind {
            ItemKind::Reasoning => ("response.reasoning_text.delta", None),
            _ => ("response.output_text.delta", Some(new)),
        };
        let (item_id, output_index) = self.place();
        let content_index = 0;
        let body = EventBody::TextDelta { item_id, output_index, content_index, delta, logprobs };
        self.tell(name, body);
    }

    fn push_call(&mut self, call: ToolCallDelta) {
        if let Some(id) = call.id {
            self.close(Status::Completed);
            self.open(ItemKind::Call);
            if let Some(OutputItem::FunctionCall { call_id, name, .. }) =
                self.response.output.last_mut()
            {
                *call_id = id;
                *name = call.name.unwrap_or_default();
            }
            self.tell_item("response.output_item.added");
        }
        if call.arguments.is_empty() {
            return;
        }
        if let Some(OutputItem::FunctionCall { arguments, .. }) = self.response.output.last_mut() {
            arguments.push_str(&call.arguments);
        }
        let (item_id, output_index) = self.place();
        let body = EventBody::ArgumentsDelta { item_id, output_index, delta: call.arguments };
        self.tell("response.function_call_arguments.delta", body);
    }

    fn open(&mut self, kind: ItemKind) {
        self.open = Some(kind);
        let (suffix, index) = (&self.suffix, self.response.output.len());
        let id = |prefix: &str| format!("{prefix}_{suffix}o{index:03}");
        let status = Status::InProgress;
        let item = match kind {
            ItemKind::Reasoning => OutputItem::Reasoning {
                id: id("rs"),
                summary: Vec::new(),
                content: Vec::new(),
                status,
            },
            ItemKind::Message => OutputItem::Message {
                id: id("msg"),
                role: "assistant",
                status,
                content: Vec::new(),
            },
            ItemKind::Call => OutputItem::FunctionCall {
                id: id("fc"),
                call_id: String::new(),
                name: String::new(),
                arguments: String::new(),
                status,
            },
        };
        self.response.output.push(item);
        let part = match kind {
            ItemKind::Reasoning => ContentPart::ReasoningText { text: String::new() },
            ItemKind::Message => ContentPart::OutputText {
                text: String::new(),
                annotations: Vec::new(),
                logprobs: Vec::new(),
            },
            // Its name is told first.
            ItemKind::Call => return,
        };
        self.tell_item("response.output_item.added");
        self.tell_part("response.content_part.added", part.clone());
        if let Some(OutputItem::Message { content, .. } | OutputItem::Reasoning { content, .. }) =
            self.response.output.last_mut()
        {
            content.push(part);
        }
    }

    fn close(&mut self, new_status: Status) {
        if self.open.take().is_none() {
            return;
        }
        let (item_id, output_index) = self.place();
        let content_index = 0;
        let Some(item) = self.response.output.last_mut() else { return };
        let (OutputItem::Message { status, .. }
        | OutputItem::FunctionCall { status, .. }
        | OutputItem::Reasoning { status, .. }) = item;
        *status = new_status;
        if let OutputItem::FunctionCall { name, arguments, .. } = item {
            let (name, arguments) = (name.clone(), arguments.clone());
            let body = EventBody::ArgumentsDone { item_id, output_index, name, arguments };
            self.tell("response.function_call_arguments.done", body);
        } else if let Some(part) = part_mut(item).cloned() {
            let (name, text, logprobs) = done(&part);
            let body = EventBody::TextDone { item_id, output_index, content_index, text, logprobs };
            self.tell(name, body);
            self.tell_part("response.content_part.done", part);
        }
        self.tell_item("response.output_item.done");
    }

    /// The open item's id and index.
    fn place(&self) -> (String, usize) {
        let id = self.response.output.last().map_or("", |item| match item {
            OutputItem::Message { id, .. }
            | OutputItem::FunctionCall { id, .. }
            | OutputItem::Reasoning { id, .. } => id,
        });
        (id.to_owned(), self.response.output.len().saturating_sub(1))
    }

    fn tell_response(&mut self, kind: &'static str) {
        self.tell(kind, EventBody::Response { response: Box::new(self.response.clone()) });
    }

    fn tell_item(&mut self, kind: &'static str) {
        let output_index = self.response.output.len().saturating_sub(1);
        if let Some(item) = self.response.output.last().cloned() {
            self.tell(kind, EventBody::Item { output_index, item });
        }
    }

    fn tell_part(&mut self, kind: &'static str, part: ContentPart) {
        let (item_id, output_index) = self.place();
        self.tell(kind, EventBody::Part { item_id, output_index, content_index: 0, part });
    }

    fn tell(&mut self, kind: &'static str, body: EventBody) {
        let sequence_number = self.sequence_number;
        self.sequence_number += 1;
        self.events.push(StreamEvent { kind, sequence_number, body });
    }
}

fn part_mut(item: &mut OutputItem) -> Option<&mut ContentPart> {
    match item {
        OutputItem::Message { content, .. } | OutputItem::Reasoning { content, .. } => {
            content.last_mut()
        }
        OutputItem::FunctionCall { .. } => None,
    }
}

fn done(part: &ContentPart) -> (&'static str, String, Option<Vec<ChatTokenLogprob>>) {
    match part {
        ContentPart::OutputText { text, logprobs, .. } => {
            ("response.output_text.done", text.clone(), Some(logprobs.clone()))
        }
        ContentPart::ReasoningText { text } => ("response.reasoning_text.done", text.clone(), None),
    }
}

fn response_usage(usage: &Usage) -> ResponseUsage {
    let details = &usage.prompt_tokens_details;
    ResponseUsage {
        input_tokens: usage.prompt_tokens,
        input_tokens_details: InputTokensDetails {
            cached_tokens: details.cached_tokens,
            cache_write_tokens: details.cache_write_tokens.unwrap_or(0),
        },
        output_tokens: usage.completion_tokens,
        output_tokens_details: OutputTokensDetails {
            reasoning_tokens: usage.completion_tokens_details.reasoning_tokens,
        },
        total_tokens: usage.total_tokens,
    }
}
