//! The engine as async code sees it.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::Stream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::engine::door::Forecast;
use crate::engine::event::Event;
use crate::engine::grammars::Guidance;
use crate::engine::heartbeat::Heartbeat;
use crate::engine::request::Request;
use crate::engine::seats::{Claim, Seats};
use crate::engine::snapshot::SequenceReport;
use crate::engine::stats::{EngineLimits, EngineStats, Health, Lifecycle};
use crate::engine::thread;
use crate::scheduler::{SeqId, SequenceSpec};

/// Why a request was not accepted. Nothing was queued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full; try again later.
    #[error("the queue is full: {num_waiting} sequences are waiting")]
    Busy {
        /// Sequences in the queue.
        num_waiting: usize,
        /// When there may be room again.
        retry_after: Duration,
    },
    /// Its client would stop waiting before its turn comes, or its first token comes later than the
    /// server's target.
    #[error("the wait is {wait:?}, which is too long; {num_waiting} sequences are waiting")]
    TooLate {
        /// Sequences in the queue.
        num_waiting: usize,
        /// How long the queue takes.
        wait: Duration,
    },
    /// The prompt can never fit.
    #[error("the request needs {needed_tokens} tokens, the limit is {max_model_len}")]
    TooLong {
        /// The prompt and, unless only the prompt is wanted, one token more.
        needed_tokens: usize,
        /// The limit.
        max_model_len: usize,
    },
    /// The engine is shutting down.
    #[error("the server is shutting down")]
    Stopping,
    /// The engine has given up.
    #[error("the engine is dead: {reason}")]
    Dead {
        /// Why.
        reason: String,
    },
}

/// What the handle tells the engine thread.
///
/// The channel has no bound of its own: live sequences are bounded by [`Seats`], and each request
/// sends at most one abort, and each choice one more.
pub(super) enum Command {
    Add(Box<Submission>),
    /// The client left.
    AbortRequest(RequestKey),
    /// The caller has all it wants of a choice.
    FinishChoice(RequestKey, u32),
    /// End everything with an `Abort`.
    AbortAll,
    /// Tell what there is to do.
    Report(oneshot::Sender<Vec<SequenceReport>>),
    /// Look around: something outside the channel changed.
    Wake,
}

/// Identifies a live request; the id of its first sequence. Client-chosen ids need not be unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RequestKey(pub(super) u64);

/// A request on its way to the engine thread: `n` sequences and where to answer.
pub(super) struct Submission {
    pub(super) key: RequestKey,
    pub(super) request: Request,
    pub(super) submitted_at: Instant,
    pub(super) events: mpsc::UnboundedSender<Event>,
}

impl Submission {
    /// What it took at the door.
    pub(super) fn claim(&self) -> Claim {
        Claim::of(&self.request)
    }

    /// What every choice must keep to.
    pub(super) fn guidance(&self) -> Guidance<'_> {
        let Request { grammar, thinking, .. } = &self.request;
        Guidance { grammar: grammar.as_ref(), thinking: thinking.as_ref() }
    }

    /// The choices. They share their prompt through the prefix cache; only the first one reports
    /// the log-probabilities of the prompt and sets its pins.
    pub(super) fn sequences(&self) -> impl Iterator<Item = SequenceSpec> {
        let request = &self.request;
        (0..request.n).map(move |choice| SequenceSpec {
            id: SeqId(self.key.0 + u64::from(choice)),
            prompt: Arc::clone(&request.prompt),
            params: Arc::clone(&request.params),
            choice,
            max_tokens: request.stop.max_tokens,
            stop_token_ids: Arc::clone(&request.stop.stop_token_ids),
            prompt_logprobs: request.params.prompt_logprobs.filter(|_| choice == 0),
            cache_salt: request.cache_salt.clone(),
            priority: request.priority,
            fairness_id: request.fairness_id.clone(),
            pins: if choice == 0 { Arc::clone(&request.pins) } else { Arc::new([]) },
            pooling: request.pooling,
            is_guided: false,
            adapter: request.adapter.clone(),
        })
    }
}

/// Submits requests and observes the engine. Cheap to clone; no method blocks.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    pub(super) limits: EngineLimits,
    pub(super) commands: Sender<Command>,
    pub(super) seats: Arc<Seats>,
    pub(super) next_id: Arc<AtomicU64>,
    pub(super) stats: watch::Receiver<EngineStats>,
    pub(super) lifecycle: watch::Receiver<Lifecycle>,
    pub(super) heartbeat: Arc<Heartbeat>,
}

impl EngineHandle {
    /// Submits a request. Never waits: a full queue is an answer.
    pub fn generate(&self, request: Request) -> Result<EventStream, SubmitError> {
        assert!(0 < request.n && !request.prompt.is_empty(), "checked at the door");
        let max_model_len = self.limits.max_model_len;
        let needed_tokens = request.prompt.len() + usize::from(0 < request.stop.max_tokens);
        if max_model_len < needed_tokens {
            return Err(SubmitError::TooLong { needed_tokens, max_model_len });
        }
        if let Some(refusal) = self.refusal() {
            return Err(refusal);
        }
        let claim = Claim::of(&request);
        self.refuse_if_late(&request, &claim)?;
        if !self.seats.take(&claim, &self.limits) {
            let num_waiting = self.num_pending();
            let retry_after = self.stats().wait_per_token * request.prompt.len() as u32;
            return Err(SubmitError::Busy { num_waiting, retry_after });
        }
        if let Some(refusal) = self.refusal() {
            self.leave(&claim);
            return Err(refusal);
        }
        let key = RequestKey(self.next_id.fetch_add(claim.num_seqs as u64, Ordering::Relaxed));
        // Unbounded, because the engine must not wait for a client; a request's events are bounded
        // by its own `n * max_tokens` and the length of its prompt.
        let (events, receiver) = mpsc::unbounded_channel();
        let submission = Submission { key, request, submitted_at: thread::now(), events };
        let submission = Box::new(submission);
        if self.commands.send(Command::Add(submission)).is_err() {
            self.leave(&claim);
            return Err(self.refusal().unwrap_or(SubmitError::Stopping));
        }
        Ok(EventStream {
            key,
            commands: self.commands.clone(),
            events: receiver,
            ended_choices: BTreeSet::new(),
            is_over: false,
        })
    }

    /// Better refused at once than served too late.
    fn refuse_if_late(&self, request: &Request, claim: &Claim) -> Result<(), SubmitError> {
        let forecast = Forecast::of(claim, &self.seats, &self.stats(), &self.limits);
        let is_late = |target| forecast.is_later_than(target);
        let patience = request.deadline.map(|deadline| deadline - thread::now());
        if patience.is_some_and(is_late) || self.limits.target_ttft.is_some_and(is_late) {
            let (num_waiting, wait) = (self.num_pending(), forecast.wait);
            return Err(SubmitError::TooLate { num_waiting, wait });
        }
        Ok(())
    }

    /// Sequences that have no token yet, those included that the engine has not looked at.
    fn num_pending(&self) -> usize {
        let stats = self.stats();
        let num_served = (stats.num_running + stats.num_waiting).saturating_sub(stats.num_pending);
        self.seats.num_taken().saturating_sub(num_served)
    }

    fn refusal(&self) -> Option<SubmitError> {
        if let Lifecycle::Dead { reason } = &*self.lifecycle.borrow() {
            return Some(SubmitError::Dead { reason: reason.clone() });
        }
        self.seats.is_closed().then_some(SubmitError::Stopping)
    }

    /// Gives seats back, and lets the engine thread see that it may end.
    fn leave(&self, claim: &Claim) {
        self.seats.give_back(claim);
        self.wake();
    }

    fn wake(&self) {
        // Nobody listens when the engine has ended; then nobody needs to.
        let _ = self.commands.send(Command::Wake);
    }

    /// What a request may ask for.
    pub fn limits(&self) -> EngineLimits {
        self.limits
    }

    /// The state after the latest step.
    pub fn stats(&self) -> EngineStats {
        *self.stats.borrow()
    }

    /// Whether the engine does its work. Costs nothing and disturbs nothing.
    pub fn health(&self) -> Health {
        if let Lifecycle::Dead { reason } = &*self.lifecycle.borrow() {
            return Health::Dead { reason: reason.clone() };
        }
        match self.heartbeat.overdue() {
            Some(step) => Health::Stalled { running_for: step.running_for, phase: step.phase },
            None => Health::Alive,
        }
    }

    /// Every sequence, told by the engine thread between two steps: whoever asks must be prepared
    /// to give up. `None` when the engine has ended.
    pub async fn report(&self) -> Option<Vec<SequenceReport>> {
        let (sender, receiver) = oneshot::channel();
        self.commands.send(Command::Report(sender)).ok()?;
        receiver.await.ok()
    }

    /// How long the step has been running that runs now. Costs nothing and disturbs nothing.
    pub fn step_running_for(&self) -> Option<Duration> {
        self.heartbeat.running_for()
    }

    /// Whether the runner is built and requests are computed.
    pub fn is_ready(&self) -> bool {
        *self.lifecycle.borrow() == Lifecycle::Running && !self.seats.is_closed()
    }

    /// Whether the runner is still being built, for requests that may come in a while.
    pub fn is_loading(&self) -> bool {
        *self.lifecycle.borrow() == Lifecycle::Loading && !self.seats.is_closed()
    }

    /// Resolves when the runner is built, or tells why it could not be.
    pub async fn ready(&self) -> Result<(), String> {
        let mut lifecycle = self.lifecycle.clone();
        match lifecycle.wait_for(|state| *state != Lifecycle::Loading).await.as_deref() {
            Ok(Lifecycle::Dead { reason }) => Err(reason.clone()),
            Ok(_) => Ok(()),
            Err(_) => Err("the engine thread is gone".to_owned()),
        }
    }

    /// Refuses new requests from now on; everything accepted before is finished.
    pub fn drain(&self) {
        self.seats.close();
        self.wake();
    }

    /// Ends every request with [`FinishReason::Abort`](crate::engine::FinishReason::Abort): what
    /// is left when a drain has taken too long.
    pub fn abort_all(&self) {
        let _ = self.commands.send(Command::AbortAll);
    }

    /// Resolves when the engine thread has ended: drained, or dead.
    pub async fn stopped(&self) {
        let mut lifecycle = self.lifecycle.clone();
        // An error means that the engine thread is gone.
        let _ = lifecycle
            .wait_for(|state| matches!(state, Lifecycle::Ended | Lifecycle::Dead { .. }))
            .await;
    }
}

/// The events of one request. Dropping it aborts what is still running.
#[derive(Debug)]
pub struct EventStream {
    key: RequestKey,
    commands: Sender<Command>,
    events: mpsc::UnboundedReceiver<Event>,
    ended_choices: BTreeSet<u32>,
    is_over: bool,
}

impl EventStream {
    /// Ends one choice successfully: its caller has all it wants, for example because a stop string
    /// matched. Nothing more is reported of it; other choices go on.
    pub fn cancel_choice(&mut self, choice: u32) {
        if !self.is_over && self.ended_choices.insert(choice) {
            let _ = self.commands.send(Command::FinishChoice(self.key, choice));
        }
    }
}

impl EventStream {
    /// Tokens that were generated and that nobody has looked at. They are gone afterwards.
    pub fn num_unread_tokens(&mut self) -> usize {
        let mut num_tokens = 0;
        while let Ok(event) = self.events.try_recv() {
            let is_wanted = |choice: &u32| !self.ended_choices.contains(choice);
            num_tokens +=
                usize::from(matches!(&event, Event::Token { choice, .. } if is_wanted(choice)));
        }
        num_tokens
    }
}

impl Stream for EventStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        loop {
            let event = std::task::ready!(self.events.poll_recv(context));
            match &event {
                None | Some(Event::Failed(_) | Event::Expired) => self.is_over = true,
                Some(Event::Token { choice, .. }) if self.ended_choices.contains(choice) => {
                    continue;
                }
                Some(Event::Finished { choice, .. }) if !self.ended_choices.insert(*choice) => {
                    continue;
                }
                Some(_) => {}
            }
            return Poll::Ready(event);
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        // The engine ignores keys it has already forgotten.
        if !self.is_over {
            let _ = self.commands.send(Command::AbortRequest(self.key));
        }
    }
}
