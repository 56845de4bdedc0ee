//! Clients that send requests side by side and note when tokens arrive.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use serde_json::json;

use crate::cli::bench::prompts::Prompts;
use crate::cli::client::Client;

/// What to send, and where to.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) client: Client,
    pub(crate) model: String,
    pub(crate) prompts: Prompts,
    pub(crate) output_tokens: u32,
    /// How many prompts were used; none is sent twice.
    pub(crate) num_sent: AtomicU32,
}

/// How a request went, or why it failed.
pub(crate) type Outcome = Result<Timing, String>;

/// When the tokens of an answer arrived.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Timing {
    /// From sending the request to the first token.
    pub(crate) first_token: Duration,
    /// Between one event with tokens and the next.
    pub(crate) gaps: Vec<Duration>,
    /// From sending the request to the end of the answer.
    pub(crate) total: Duration,
    /// As the server counts them.
    pub(crate) prompt_tokens: u64,
    /// As the server counts them.
    pub(crate) output_tokens: u64,
}

impl Load {
    /// Sends `num_requests`, at most `concurrency` at once. Returns how they went and how long it
    /// took altogether.
    pub(crate) fn run(
        &self,
        concurrency: usize,
        num_requests: usize,
        progress: &ProgressBar,
    ) -> (Vec<Outcome>, Duration) {
        let num_taken = AtomicUsize::new(0);
        let start = Instant::now();
        let client = || {
            let mut outcomes = Vec::new();
            while num_taken.fetch_add(1, Ordering::Relaxed) < num_requests {
                outcomes.push(self.request().map_err(|error| format!("{error:#}")));
                progress.inc(1);
            }
            outcomes
        };
        let outcomes = thread::scope(|scope| {
            let clients: Vec<_> = (0..concurrency).map(|_| scope.spawn(client)).collect();
            let join = |client: thread::ScopedJoinHandle<'_, Vec<Outcome>>| {
                client.join().expect("clients return their errors")
            };
            clients.into_iter().flat_map(join).collect()
        });
        (outcomes, start.elapsed())
    }

    /// Sends one request and reads its answer.
    pub(crate) fn request(&self) -> Result<Timing> {
        let number = self.num_sent.fetch_add(1, Ordering::Relaxed);
        let body = json!({
            "model": self.model,
            "prompt": self.prompts.prompt(number),
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let start = Instant::now();
        let mut arrivals = Vec::with_capacity(self.output_tokens as usize);
        let mut usage = None;
        for event in self.client.stream("/v1/completions", &body)? {
            let event = event?;
            let arrival = start.elapsed();
            let choice = &event["choices"][0];
            // The event that only says why the answer ended carries no token.
            let has_text = choice["text"].as_str().is_some_and(|text| !text.is_empty());
            if has_text || (choice.is_object() && choice["finish_reason"].is_null()) {
                arrivals.push(arrival);
            }
            if event["usage"].is_object() {
                usage = Some(event["usage"].clone());
            }
        }
        let total = start.elapsed();
        let usage = usage.context("the server sent no usage")?;
        let count = |name: &str| usage[name].as_u64().with_context(|| format!("no `{name}`"));
        Ok(Timing {
            first_token: *arrivals.first().context("the answer has no tokens")?,
            gaps: arrivals.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).collect(),
            total,
            prompt_tokens: count("prompt_tokens")?,
            output_tokens: count("completion_tokens")?,
        })
    }
}
