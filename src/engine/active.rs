//! The requests that are being answered: who hears of which sequence, and since when.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::engine::event::{Event, FinishReason};
use crate::engine::handle::{RequestKey, Submission};
use crate::engine::seats::{Claim, Seats};
use crate::engine::snapshot::{SeqSnapshot, SequenceReport};
use crate::scheduler::{FairnessId, SeqEvent, SeqFinish, SeqId, SeqPhase};
use crate::telemetry::metrics::{self, AdaptedRequest};

/// One choice that has not ended.
#[derive(Debug)]
struct ActiveChoice {
    index: u32,
    last_token_at: Option<Instant>,
    num_output_tokens: usize,
}

#[derive(Debug)]
struct ActiveRequest {
    id: Arc<str>,
    events: UnboundedSender<Event>,
    choices: BTreeMap<SeqId, ActiveChoice>,
    client: FairnessId,
    deadline: Option<Instant>,
    /// Prompt tokens that wait; none once it has started.
    num_waiting_tokens: usize,
    num_prompt_tokens: usize,
    num_cached_tokens: usize,
    num_output_tokens: usize,
    /// Of its longest choice.
    longest_output: usize,
    n: u32,
    max_tokens: usize,
    submitted_at: Instant,
    started_at: Option<Instant>,
    first_token_at: Option<Instant>,
    last_token_at: Option<Instant>,
    adapted: Option<AdaptedRequest>,
}

/// Everything the engine thread still owes an answer.
#[derive(Debug)]
pub(super) struct ActiveRequests {
    requests: BTreeMap<RequestKey, ActiveRequest>,
    /// Those whose clients do not wait for ever, the most urgent first.
    deadlines: BTreeSet<(Instant, RequestKey)>,
    seats: Arc<Seats>,
}

impl ActiveRequests {
    pub(super) fn new(seats: Arc<Seats>) -> Self {
        Self { requests: BTreeMap::new(), deadlines: BTreeSet::new(), seats }
    }

    pub(super) fn add(&mut self, submission: &Submission) {
        let choice = |index| ActiveChoice { index, last_token_at: None, num_output_tokens: 0 };
        let choices = submission.sequences().map(|spec| (spec.id, choice(spec.choice))).collect();
        let adapter = submission.request.adapter.as_ref();
        let request = ActiveRequest {
            id: Arc::clone(&submission.request.id),
            events: submission.events.clone(),
            choices,
            client: submission.request.fairness_id.clone(),
            deadline: submission.request.deadline,
            num_waiting_tokens: submission.request.prompt.len(),
            num_prompt_tokens: submission.request.prompt.len(),
            num_cached_tokens: 0,
            num_output_tokens: 0,
            longest_output: 0,
            n: submission.request.n,
            max_tokens: submission.request.stop.max_tokens,
            submitted_at: submission.submitted_at,
            started_at: None,
            first_token_at: None,
            last_token_at: None,
            adapted: adapter.map(|adapter| AdaptedRequest::waiting(adapter.name())),
        };
        self.deadlines.extend(request.deadline.map(|deadline| (deadline, submission.key)));
        let previous = self.requests.insert(submission.key, request);
        assert!(previous.is_none(), "keys are unique");
    }

    /// Forgets a request.
    fn remove(&mut self, key: RequestKey) -> Option<ActiveRequest> {
        let request = self.requests.remove(&key)?;
        if let Some(deadline) = request.deadline {
            self.deadlines.remove(&(deadline, key));
        }
        self.seats.give_back(&request.claim(request.choices.len()));
        Some(request)
    }

    /// Ends the requests whose clients have stopped waiting. Returns their sequences.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<SeqId> {
        let mut orphans = Vec::new();
        while let Some(&(deadline, key)) = self.deadlines.first()
            && deadline <= now
        {
            metrics::request_expired();
            orphans.extend(self.end(key, FinishReason::Abort, Event::Expired, now));
        }
        orphans
    }

    /// Ends all choices of a request that are left. Returns their sequences.
    fn end(
        &mut self,
        key: RequestKey,
        reason: FinishReason,
        last: Event,
        now: Instant,
    ) -> Vec<SeqId> {
        let Some(request) = self.remove(key) else { return Vec::new() };
        for _ in &request.choices {
            metrics::request_finished(reason_label(reason));
        }
        request.send(last);
        request.record_end(now);
        request.choices.into_keys().collect()
    }

    /// A request's sequences have consecutive ids, and its key is the first of them.
    fn key_of(&self, id: SeqId) -> Option<RequestKey> {
        let (&key, request) = self.requests.range(..=RequestKey(id.0)).next_back()?;
        request.choices.contains_key(&id).then_some(key)
    }

    /// What is known of sequences, with the requests they belong to.
    pub(super) fn report(&self, sequences: &[SeqSnapshot], now: Instant) -> Vec<SequenceReport> {
        let report = |sequence: &SeqSnapshot| {
            let request = &self.requests[&self.key_of(sequence.id)?];
            Some(SequenceReport {
                request_id: Arc::clone(&request.id),
                client: request.client.clone(),
                choice: request.choices[&sequence.id].index,
                age: now - request.submitted_at,
                sequence: *sequence,
            })
        };
        sequences.iter().filter_map(report).collect()
    }

    /// Passes an event on. Returns sequences that nobody needs any more.
    pub(super) fn deliver(&mut self, event: SeqEvent, now: Instant) -> Vec<SeqId> {
        let (SeqEvent::Started { id, .. }
        | SeqEvent::PromptLogprobs(id, _)
        | SeqEvent::Pinned(id, _)
        | SeqEvent::Pooled(id, _)
        | SeqEvent::Token(id, _)
        | SeqEvent::Finished(id, _)
        | SeqEvent::Failed(id, _)) = event;
        let Some(key) = self.key_of(id) else { return Vec::new() };
        let request = self.requests.get_mut(&key).expect("the key was just found");
        match event {
            SeqEvent::Started { num_cached_tokens, .. } => {
                self.seats
                    .started(&request.client, std::mem::take(&mut request.num_waiting_tokens));
                request.start(num_cached_tokens, now);
            }
            SeqEvent::PromptLogprobs(_, logprobs) => request.send(Event::PromptLogprobs(logprobs)),
            SeqEvent::Pinned(_, num_tokens) => request.send(Event::Pinned { num_tokens }),
            SeqEvent::Pooled(_, embedding) => request.send(Event::Pooled(embedding)),
            SeqEvent::Token(_, token) => {
                let choice = request.record_token(id, now);
                request.send(Event::Token { choice, token });
            }
            SeqEvent::Finished(_, finish) => {
                let reason = match finish {
                    SeqFinish::Stop => FinishReason::Stop,
                    SeqFinish::Length => FinishReason::Length,
                };
                self.finish_sequence(key, id, reason, now);
            }
            SeqEvent::Failed(_, error) => return self.fail(key, &error.to_string(), now),
        }
        Vec::new()
    }

    fn finish_sequence(&mut self, key: RequestKey, id: SeqId, reason: FinishReason, now: Instant) {
        let Some(request) = self.requests.get_mut(&key) else { return };
        let Some(choice) = request.choices.remove(&id) else { return };
        metrics::request_finished(reason_label(reason));
        request.send(Event::Finished { choice: choice.index, reason });
        let is_complete = request.choices.is_empty();
        // Seats before the end of the stream: whoever sees the end may submit again.
        self.seats.give_back(&Claim { num_tokens: 0, ..request.claim(1) });
        if is_complete && let Some(request) = self.remove(key) {
            request.record_end(now);
        }
    }

    /// Ends a choice because its caller has all it wants. The sequence is then nobody's.
    pub(super) fn finish_choice(
        &mut self,
        key: RequestKey,
        choice: u32,
        now: Instant,
    ) -> Option<SeqId> {
        let request = self.requests.get(&key)?;
        let (&id, _) = request.choices.iter().find(|(_, active)| active.index == choice)?;
        self.finish_sequence(key, id, FinishReason::Stop, now);
        Some(id)
    }

    /// Forgets a request whose client left. Returns its sequences.
    pub(super) fn forget(&mut self, key: RequestKey) -> Vec<SeqId> {
        let Some(request) = self.remove(key) else { return Vec::new() };
        for _ in &request.choices {
            metrics::request_finished(reason_label(FinishReason::Abort));
        }
        request.choices.into_keys().collect()
    }

    /// Ends a request with an error. Returns its sequences.
    pub(super) fn fail(&mut self, key: RequestKey, reason: &str, now: Instant) -> Vec<SeqId> {
        if let Some(request) = self.requests.get(&key) {
            let client = request.client.as_deref();
            tracing::warn!(request_id = %request.id, client, reason, "request failed");
        }
        self.end(key, FinishReason::Error, Event::Failed(reason.to_owned()), now)
    }

    /// Ends the requests of these sequences with an error. Returns all their sequences.
    pub(super) fn fail_sequences(
        &mut self,
        ids: &[SeqId],
        reason: &str,
        now: Instant,
    ) -> Vec<SeqId> {
        let mut orphans = Vec::new();
        for &id in ids {
            if let Some(key) = self.key_of(id) {
                orphans.extend(self.fail(key, reason, now));
            }
        }
        orphans
    }

    /// Ends everything with an error.
    pub(super) fn fail_all(&mut self, reason: &str, now: Instant) {
        while let Some((&key, _)) = self.requests.first_key_value() {
            self.fail(key, reason, now);
        }
    }

    /// Ends everything with [`FinishReason::Abort`]. Returns all sequences.
    pub(super) fn abort_all(&mut self, now: Instant) -> Vec<SeqId> {
        let ids: Vec<_> = self
            .requests
            .iter()
            .flat_map(|(&key, request)| request.choices.keys().map(move |&id| (key, id)))
            .collect();
        for &(key, id) in &ids {
            self.finish_sequence(key, id, FinishReason::Abort, now);
        }
        ids.into_iter().map(|(_, id)| id).collect()
    }
}

impl ActiveRequest {
    /// What it holds, with so many of its choices.
    fn claim(&self, num_seqs: usize) -> Claim {
        Claim { client: self.client.clone(), num_seqs, num_tokens: self.num_waiting_tokens }
    }

    /// A client that has left is noticed by its `AbortRequest`, not here.
    fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }

    fn start(&mut self, num_cached_tokens: usize, now: Instant) {
        if self.started_at.is_none() {
            self.started_at = Some(now);
            if let Some(adapted) = &mut self.adapted {
                adapted.start();
            }
            self.num_cached_tokens = num_cached_tokens;
            let queue_time = now - self.submitted_at;
            metrics::request_started(self.num_prompt_tokens, num_cached_tokens, queue_time);
            self.send(Event::Started { num_cached_tokens });
        }
    }

    fn record_token(&mut self, id: SeqId, now: Instant) -> u32 {
        self.num_output_tokens += 1;
        self.last_token_at = Some(now);
        if self.first_token_at.is_none() {
            self.first_token_at = Some(now);
            let started_at = self.started_at.unwrap_or(self.submitted_at);
            metrics::first_token(now - self.submitted_at, now - started_at);
        }
        let choice = self.choices.get_mut(&id).expect("the sequence was just found");
        choice.num_output_tokens += 1;
        self.longest_output = self.longest_output.max(choice.num_output_tokens);
        if let Some(last) = choice.last_token_at.replace(now) {
            metrics::next_token(now - last);
        }
        metrics::generated_token();
        choice.index
    }

    fn record_end(&self, now: Instant) {
        let until_last_token = |from: Option<Instant>| {
            from.zip(self.last_token_at).map(|(from, last)| last - from).unwrap_or_default()
        };
        metrics::request_ended(&metrics::EndedRequest {
            latency: now - self.submitted_at,
            inference_time: until_last_token(self.started_at),
            decode_time: until_last_token(self.first_token_at),
            num_prompt_tokens: self.num_prompt_tokens,
            num_cached_tokens: self.num_cached_tokens,
            num_output_tokens: self.num_output_tokens,
            longest_output: self.longest_output,
            n: self.n,
            max_tokens: self.max_tokens,
        });
    }
}

/// vLLM's values of the label `finished_reason`.
fn reason_label(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Abort => "abort",
        FinishReason::Error => "error",
    }
}

/// Values of the label `phase`.
pub(super) fn phase_label(phase: SeqPhase) -> &'static str {
    match phase {
        SeqPhase::Waiting => "waiting",
        SeqPhase::Prefill => "prefill",
        SeqPhase::Decode => "decode",
    }
}
