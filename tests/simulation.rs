//! Goal: no schedule, cache hit, eviction, preemption, abort or device failure may ever change what
//! a sequence says, and nobody waits for ever.
//!
//! Method: `ShadowRunner` keeps a fake KV memory with one number per slot. Like a real key or value,
//! the number depends on its token *and on everything before it*: it mixes the token with the
//! predecessor's number, read through the block table. Tokens and log-probabilities are hashes of
//! all numbers of the sequence, again read through the block table. So a stale, missing or wrongly
//! shared slot changes the output. The oracle is the same recurrence over the tokens alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use qwen_server::engine::core::{EngineCore, Guidance, PROBE, StepError};
use qwen_server::kv::{HashKey, KvCacheManager, Pin};
use qwen_server::sampling::SamplingParams;
use qwen_server::scheduler::step::{
    Continuation, NonFiniteLogits, Pooling, Runner, SampleError, SampleRequest, SampledToken,
    ScheduledSeq, SchedulerOutput, SeqOutput, TokenLogprobs, TokenMasks, UNDRAWN,
};
use qwen_server::scheduler::{
    Drafter, Priority, Scheduler, SchedulerConfig, SeqEvent, SeqFinish, SeqId, SequenceSpec,
    SpeculationConfig,
};
use qwen_server::text::TokenId;

const VOCAB_SIZE: u32 = 24;
const STOP_TOKENS: [TokenId; 2] = [3, 4];
const KEY: HashKey = HashKey([9; 32]);
type Salt = Option<&'static str>;

// The recurrence, and what it says without any paging.

fn mix(before: u32, token: TokenId) -> u32 {
    (before ^ token).wrapping_mul(0x9E37_79B1).rotate_left(7).wrapping_add(1)
}

fn fold(values: impl Iterator<Item = u32>) -> u32 {
    values.fold(17, mix)
}

fn values(tokens: &[TokenId]) -> impl Iterator<Item = u32> {
    tokens.iter().scan(0, |before, &token| {
        *before = mix(*before, token);
        Some(*before)
    })
}

fn draw(context: u32, choice: u32, num_output_tokens: usize, forbidden: &[TokenId]) -> TokenId {
    let counter = mix(choice, num_output_tokens as u32);
    let first = mix(context, counter);
    let mut candidates = (0..VOCAB_SIZE).map(|i| first.wrapping_add(i) % VOCAB_SIZE);
    candidates.find(|token| !forbidden.contains(token)).expect("not everything is forbidden")
}

/// What a grammar would add to a token: often nothing, sometimes several tokens, rarely the end.
fn continuation(context: u32, token: TokenId) -> Continuation {
    let hash = mix(mix(context, token), 99);
    let num_forced = if hash.is_multiple_of(4) { 1 + hash / 4 % 9 } else { 0 };
    let forced = (0..num_forced).map(|i| mix(hash, i) % VOCAB_SIZE).collect();
    Continuation { forced, is_complete: (hash / 64).is_multiple_of(23) }
}

fn logprob(context: u32, target: TokenId) -> f32 {
    (mix(context, target) % 1000) as f32
}

#[derive(Clone, Debug)]
struct Arrival {
    step: usize,
    prompt: Vec<TokenId>,
    n: u32,
    max_tokens: usize,
    min_tokens: usize,
    stops: bool,
    /// Its drawn tokens have continuations.
    forces: bool,
    penalised: bool,
    prompt_logprobs: bool,
    salt: Salt,
    /// The logits after so many generated tokens are not finite.
    broken_after: Option<usize>,
    abort_after: Option<usize>,
    priority: i64,
    client: Option<&'static str>,
    /// A step in which this many of its tokens are known breaks the runner.
    poison_after: Option<usize>,
    pin: Option<Pin>,
    pooling: Option<Pooling>,
}

impl Arrival {
    fn simple(step: usize, prompt: Vec<TokenId>, max_tokens: usize) -> Self {
        Self {
            step,
            prompt,
            n: 1,
            max_tokens,
            min_tokens: 0,
            stops: false,
            forces: false,
            penalised: false,
            prompt_logprobs: false,
            salt: None,
            broken_after: None,
            abort_after: None,
            priority: 0,
            client: None,
            poison_after: None,
            pin: None,
            pooling: None,
        }
    }

    fn spec(&self, index: usize, choice: u32) -> SequenceSpec {
        let params = SamplingParams {
            min_tokens: self.min_tokens,
            presence_penalty: if self.penalised { 1.0 } else { 0.0 },
            ..SamplingParams::default()
        };
        SequenceSpec {
            id: seq_id(index, choice),
            prompt: self.prompt.as_slice().into(),
            params: Arc::new(params),
            choice,
            max_tokens: self.max_tokens(),
            stop_token_ids: if self.stops { STOP_TOKENS.into() } else { [].into() },
            prompt_logprobs: (self.prompt_logprobs && choice == 0).then_some(0),
            cache_salt: self.salt.map(Into::into),
            priority: Priority::new(self.priority),
            fairness_id: self.client.map(Into::into),
            pins: self.pin.filter(|_| choice == 0).into_iter().collect(),
            pooling: self.pooling,
            is_guided: self.forces,
            adapter: None,
        }
    }

    /// An embedding generates nothing.
    fn max_tokens(&self) -> usize {
        if self.pooling.is_some() { 0 } else { self.max_tokens }
    }

    /// What the choice says when it is alone in the world.
    fn expected(&self, choice: u32, max_model_len: usize) -> Told {
        let mut tokens = self.prompt.clone();
        let mut told = Told::default();
        if self.prompt_logprobs && choice == 0 {
            let contexts = (1..tokens.len()).map(|end| (fold(values(&tokens[..end])), tokens[end]));
            told.prompt_logprobs =
                contexts.map(|(c, target)| (target, logprob(c, target))).collect();
        }
        told.embedding = self.pooling.map(|pooling| {
            let states = values(&tokens).map(f64::from);
            let (sum, count) = match pooling {
                Pooling::Mean => (states.sum::<f64>(), tokens.len() as f64),
                Pooling::Last => (states.last().expect("a prompt has a token"), 1.0),
            };
            vec![(sum / count) as f32]
        });
        told.end = Some(loop {
            if told.tokens.len() == self.max_tokens() || tokens.len() == max_model_len {
                break End::Length;
            }
            if self.broken_after == Some(told.tokens.len()) {
                break End::Failed;
            }
            let is_forbidden = self.stops && told.tokens.len() < self.min_tokens;
            let forbidden: &[_] = if is_forbidden { &STOP_TOKENS } else { &[] };
            let context = fold(values(&tokens));
            let token = draw(context, choice, told.tokens.len(), forbidden);
            let next =
                if self.forces { continuation(context, token) } else { Continuation::default() };
            let mut is_cut = false;
            let mut is_stopped = false;
            for token in std::iter::once(token).chain(next.forced) {
                is_cut = told.tokens.len() == self.max_tokens || tokens.len() == max_model_len;
                if is_cut || is_stopped {
                    break;
                }
                tokens.push(token);
                told.tokens.push(token);
                is_stopped = self.stops && STOP_TOKENS.contains(&token);
            }
            if is_stopped || (next.is_complete && !is_cut) {
                break End::Stop;
            }
        });
        told
    }
}

fn seq_id(index: usize, choice: u32) -> SeqId {
    SeqId(index as u64 * 16 + u64::from(choice))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Stop,
    Length,
    Failed,
    Aborted,
    Lost,
}

/// What a client heard.
#[derive(Clone, Debug, Default, PartialEq)]
struct Told {
    tokens: Vec<TokenId>,
    prompt_logprobs: Vec<(TokenId, f32)>,
    num_cached_tokens: Option<usize>,
    embedding: Option<Vec<f32>>,
    num_pinned_tokens: Option<usize>,
    end: Option<End>,
}

// The fake device.

#[derive(Default)]
struct ShadowRunner {
    slots: Vec<u32>,
    /// The salt of the sequence that wrote each slot.
    owners: Vec<Option<(Salt, usize)>>,
    salts: BTreeMap<SeqId, Salt>,
    broken_after: BTreeMap<SeqId, usize>,
    poison_after: BTreeMap<SeqId, usize>,
    forcing: BTreeSet<SeqId>,
    block_size: usize,
    /// Steps that fail and leave garbage everywhere.
    failing_steps: BTreeSet<usize>,
    /// Steps begin before the tokens are known that the step before draws.
    runs_ahead: bool,
    /// Fills in the guesses of a step: mostly true ones.
    drafts: bool,
    /// The launched step with its guesses.
    filled: Option<SchedulerOutput>,
    num_ahead: usize,
    num_steps: usize,
    num_computed_tokens: usize,
}

impl ShadowRunner {
    fn read(&self, seq: &ScheduledSeq, position: usize) -> u32 {
        let slot = seq.blocks.slot(position, self.block_size);
        let owner = Some((self.salts[&seq.id], seq.rope_start));
        assert_eq!(self.owners[slot], owner, "read across salts, or keys rotated in another way");
        self.slots[slot]
    }

    /// What a device would not notice until much later.
    fn check_preconditions(&self, output: &SchedulerOutput) {
        let mut written = BTreeSet::new();
        let mut seen = BTreeSet::new();
        for seq in &output.scheduled {
            assert!(!seq.tokens.is_empty(), "no logits without a token");
            assert!(!output.preempted.contains(&seq.id));
            assert!(seen.insert(seq.id), "scheduled twice");
            assert_eq!(seq.blocks.blocks().len(), seq.end().div_ceil(self.block_size));
            for i in seq.start..seq.end() {
                let slot = seq.blocks.slot(i, self.block_size);
                assert!(written.insert(slot), "two sequences write slot {slot} in one step");
            }
        }
    }

    /// What a draft model would guess behind the first `end` tokens.
    fn guess(&self, seq: &ScheduledSeq, end: usize) -> TokenId {
        let context = fold((0..end).map(|i| self.read(seq, i)));
        let num_known = seq.start + seq.num_known();
        let request = seq.sample.as_ref().expect("who is guessed about draws");
        let request = request.after(&vec![0; end - num_known]);
        let token = draw(context, request.choice, request.num_output_tokens, &request.forbidden);
        let is_wrong = mix(context, 5).is_multiple_of(4);
        if is_wrong { (token + 1) % VOCAB_SIZE } else { token }
    }

    /// Draws behind the first `end` tokens.
    fn sampled(
        &self,
        seq: &ScheduledSeq,
        request: &SampleRequest,
        end: usize,
    ) -> Result<(SampledToken, Continuation), SampleError> {
        if self.broken_after.get(&seq.id).is_some_and(|&n| n == request.num_output_tokens) {
            return Err(NonFiniteLogits.into());
        }
        assert_eq!(request.history.is_some(), request.params.needs_history());
        if let Some(history) = &request.history {
            assert_eq!(history.tokens.len(), end);
            assert_eq!(history.num_prompt_tokens, end - request.num_output_tokens);
            let last = values(&history.tokens).last();
            assert_eq!(last, Some(self.read(seq, end - 1)), "a wrong history");
        }
        let context = fold((0..end).map(|i| self.read(seq, i)));
        let id = draw(context, request.choice, request.num_output_tokens, &request.forbidden);
        let is_forcing = self.forcing.contains(&seq.id);
        let next = if is_forcing { continuation(context, id) } else { Continuation::default() };
        Ok((SampledToken { id, logprobs: None }, next))
    }

    fn prompt_logprobs(&self, seq: &ScheduledSeq) -> Vec<TokenLogprobs> {
        let targets = seq.prompt_logprobs.iter().flat_map(|wanted| &wanted.targets);
        let score = |(i, &token)| {
            let context = fold((0..=i).map(|position| self.read(seq, position)));
            TokenLogprobs { token, logprob: logprob(context, token), top: Vec::new() }
        };
        (seq.start..).zip(targets).map(score).collect()
    }
}

impl Runner for ShadowRunner {
    type Error = &'static str;

    fn launch(&mut self, output: &SchedulerOutput) -> Result<(), &'static str> {
        if output.scheduled[0].id == PROBE {
            return Ok(());
        }
        self.check_preconditions(output);
        self.num_steps += 1;
        self.num_ahead += usize::from(output.is_begun());
        let is_poison = |seq: &ScheduledSeq| {
            self.poison_after.get(&seq.id).is_some_and(|&after| after < seq.end())
        };
        if output.scheduled.iter().any(is_poison) {
            self.slots.fill(0xDEAD);
            assert!(self.num_steps.is_multiple_of(2), "poisoned");
            return Err("poisoned");
        }
        if self.failing_steps.contains(&self.num_steps) {
            self.slots.fill(0xDEAD);
            return Err("planned");
        }
        let mut filled = output.clone();
        for seq in &mut filled.scheduled {
            if let Some(token) = seq.token_before {
                let before = if seq.start == 1 { 0 } else { self.read(seq, seq.start - 2) };
                assert_eq!(mix(before, token), self.read(seq, seq.start - 1), "another token");
            }
            for i in seq.start..seq.end() {
                let row = i - seq.start;
                if self.drafts && seq.num_known() <= row {
                    assert_eq!(seq.tokens[row], UNDRAWN);
                    seq.tokens[row] = self.guess(seq, i);
                }
                let before = if i == 0 { 0 } else { self.read(seq, i - 1) };
                let slot = seq.blocks.slot(i, self.block_size);
                self.slots[slot] = mix(before, seq.tokens[row]);
                self.owners[slot] = Some((self.salts[&seq.id], seq.rope_start));
                self.num_computed_tokens += 1;
            }
        }
        self.filled = Some(filled);
        Ok(())
    }

    fn sample(
        &mut self,
        output: &SchedulerOutput,
        masks: &TokenMasks,
    ) -> Result<Vec<SeqOutput>, &'static str> {
        assert!(masks.is_empty(), "nobody has a grammar");
        if output.scheduled[0].id == PROBE {
            let token = SampledToken { id: 0, logprobs: None };
            return Ok(vec![SeqOutput { sampled: Some(Ok(token)), ..SeqOutput::default() }]);
        }
        // Only the guesses were not known before.
        let filled = self.filled.take().expect("launched");
        let scheduled = output.scheduled.iter().zip(&filled.scheduled);
        let outputs = scheduled.map(|(asked, seq)| {
            let mut drawn = SeqOutput::default();
            for num_drafts in 0..=seq.num_drafts {
                let Some(request) = &asked.sample else { break };
                let request = request.after(&seq.drafts()[..num_drafts]);
                let end = seq.start + seq.num_known() + num_drafts;
                let result = self.sampled(seq, &request, end);
                let (draw, continuation) = match result {
                    Ok((token, continuation)) => (Ok(token), continuation),
                    Err(error) => (Err(error), Continuation::default()),
                };
                drawn.push_draw(draw);
                drawn.continuation = continuation;
            }
            drawn.keep_verified(seq);
            SeqOutput {
                prompt_logprobs: self.prompt_logprobs(seq),
                pooled: seq.pool.as_ref().map(|pool| {
                    let sum = pool.sum.first().copied().unwrap_or(0.0);
                    let positions = pool.rows.clone().map(|row| seq.start + row);
                    let states = positions.map(|position| f64::from(self.read(seq, position)));
                    vec![states.fold(sum, |sum, state| sum + state)]
                }),
                ..drawn
            }
        });
        Ok(outputs.collect())
    }

    fn is_asynchronous(&self) -> bool {
        self.runs_ahead
    }
}

// The world: arrivals, steps, and what everybody hears.

#[derive(Clone, Debug)]
struct Shape {
    num_blocks: u32,
    block_size: usize,
    config: SchedulerConfig,
    failing_steps: BTreeSet<usize>,
    runs_ahead: bool,
}

impl Shape {
    /// A machine with room for everything.
    fn roomy() -> Self {
        let config = SchedulerConfig {
            max_num_seqs: 16,
            max_num_batched_tokens: 32,
            max_prefill_tokens_while_decoding: 8,
            prefill_ageing_tokens_per_step: 4,
            steps_per_priority: 5,
            fairness_patience_steps: 8,
            target_itl: None,
            target_ttft: None,
            max_model_len: 4096,
            stretched_beyond: None,
            speculation: None,
        };
        let failing_steps = BTreeSet::new();
        Self { num_blocks: 2048, block_size: 4, config, failing_steps, runs_ahead: false }
    }
}

struct World<'a> {
    arrivals: &'a [Arrival],
    engine: EngineCore<ShadowRunner>,
    told: BTreeMap<SeqId, Told>,
    /// Accepted and not over yet, with their order.
    live: BTreeMap<SeqId, (usize, usize)>,
    steps_per_priority: usize,
    max_num_batched_tokens: usize,
    step: usize,
}

impl<'a> World<'a> {
    fn new(arrivals: &'a [Arrival], shape: &Shape) -> Self {
        let kv = KvCacheManager::new(shape.num_blocks, shape.block_size, KEY);
        let num_slots = shape.num_blocks as usize * shape.block_size;
        let runner = ShadowRunner {
            slots: vec![0; num_slots],
            owners: vec![None; num_slots],
            block_size: shape.block_size,
            failing_steps: shape.failing_steps.clone(),
            runs_ahead: shape.runs_ahead,
            drafts: shape.config.speculation.is_some_and(|how| how.drafter == Drafter::Model),
            ..ShadowRunner::default()
        };
        let mut runner = runner;
        for (index, arrival) in arrivals.iter().enumerate() {
            for choice in 0..arrival.n {
                let id = seq_id(index, choice);
                runner.salts.insert(id, arrival.salt);
                if arrival.forces {
                    runner.forcing.insert(id);
                }
                runner.poison_after.extend(arrival.poison_after.map(|after| (id, after)));
                runner.broken_after.extend(arrival.broken_after.map(|after| (id, after)));
            }
        }
        let steps_per_priority = shape.config.steps_per_priority as usize;
        let engine = EngineCore::new(Scheduler::new(shape.config, kv), runner);
        Self {
            arrivals,
            engine,
            told: BTreeMap::new(),
            live: BTreeMap::new(),
            step: 0,
            steps_per_priority,
            max_num_batched_tokens: shape.config.max_num_batched_tokens,
        }
    }

    fn arrive_and_abort(&mut self) {
        for (index, arrival) in self.arrivals.iter().enumerate() {
            for choice in 0..arrival.n {
                let id = seq_id(index, choice);
                let is_accepted = arrival.step == self.step
                    && self.engine.add(arrival.spec(index, choice), Guidance::default()).is_ok();
                if is_accepted {
                    let delay = (arrival.priority + 100) as usize * self.steps_per_priority;
                    self.live.insert(id, (self.step + delay, self.told.len()));
                    self.told.insert(id, Told::default());
                }
                let is_aborted = arrival.abort_after.map(|after| arrival.step + after);
                if is_aborted == Some(self.step) && self.live.remove(&id).is_some() {
                    assert!(self.engine.abort(id).is_some());
                    self.told.get_mut(&id).expect("known").end = Some(End::Aborted);
                }
            }
        }
    }

    /// One step; returns what was scheduled.
    fn tick(&mut self) -> SchedulerOutput {
        self.arrive_and_abort();
        self.engine.advance_to(Duration::from_secs(self.step as u64));
        self.engine.scheduler().check_invariants();
        let output = self.engine.schedule();
        let order = |id: &SeqId| self.live[id];
        // What began early may hold sequences that were over before it was finished.
        let live = output.scheduled.iter().filter(|seq| self.live.contains_key(&seq.id));
        assert!(output.is_begun() || live.clone().count() == output.scheduled.len());
        let oldest = live.map(|seq| order(&seq.id)).min();
        if !self.engine.scheduler().is_idle() {
            assert!(oldest.is_some(), "a step without progress");
        }
        let num_tokens: usize = output.scheduled.iter().map(|seq| seq.tokens.len()).sum();
        assert!(num_tokens <= self.max_num_batched_tokens, "{num_tokens} tokens in a step");
        let suspect = self.engine.scheduler().suspect();
        if let Some(suspect) = suspect {
            let alone: Vec<_> = output.scheduled.iter().map(|seq| seq.id).collect();
            assert_eq!(alone, [suspect], "a suspect runs alone");
        } else if let Some(preempted) = output.preempted.iter().map(order).min() {
            assert!(oldest < Some(preempted), "the oldest was preempted");
        }
        let outcome = self.engine.execute(&output);
        self.engine.scheduler().check_invariants();
        outcome.events.into_iter().for_each(|event| self.hear(event));
        if let Some(failed) = outcome.failed {
            // The engine contains panics, also those of this test's assertions.
            let is_planned = match &failed.error {
                StepError::Runner(reason) => reason == "planned" || reason == "poisoned",
                StepError::Panicked(reason) => reason.starts_with("poisoned"),
                StepError::Protocol(_) => false,
            };
            assert!(is_planned, "{}", failed.error);
            assert!(failed.is_runner_sound);
            assert_eq!(failed.culprit.is_some(), suspect.is_some(), "only who fails alone is lost");
            failed.culprit.into_iter().for_each(|id| self.end(id, End::Lost));
        }
        self.step += 1;
        output
    }

    fn hear(&mut self, event: SeqEvent) {
        match event {
            SeqEvent::Started { id, num_cached_tokens } => {
                let told = self.told.get_mut(&id).expect("known");
                assert_eq!(told.num_cached_tokens.replace(num_cached_tokens), None);
            }
            SeqEvent::PromptLogprobs(id, scored) => {
                let scored = scored.into_iter().map(|entry| (entry.token, entry.logprob));
                self.told.get_mut(&id).expect("known").prompt_logprobs.extend(scored);
            }
            SeqEvent::Pooled(id, embedding) => {
                let told = self.told.get_mut(&id).expect("known");
                assert_eq!(told.embedding.replace(embedding), None);
            }
            SeqEvent::Pinned(id, num_tokens) => {
                let told = self.told.get_mut(&id).expect("known");
                assert!(told.tokens.is_empty(), "told before the first token");
                assert_eq!(told.num_pinned_tokens.replace(num_tokens), None);
            }
            SeqEvent::Token(id, token) => {
                assert!(self.live.contains_key(&id));
                let told = self.told.get_mut(&id).expect("known");
                assert!(told.num_cached_tokens.is_some(), "started before its first token");
                told.tokens.push(token.id);
            }
            SeqEvent::Finished(id, SeqFinish::Stop) => self.end(id, End::Stop),
            SeqEvent::Finished(id, SeqFinish::Length) => self.end(id, End::Length),
            SeqEvent::Failed(id, _) => self.end(id, End::Failed),
        }
    }

    fn end(&mut self, id: SeqId, end: End) {
        assert!(self.live.remove(&id).is_some(), "ended twice");
        let previous = self.told.get_mut(&id).expect("known").end.replace(end);
        assert_eq!(previous, None);
    }

    /// Until everybody has arrived and ended. The bound is what a machine needs that computes one
    /// token per step and starts everybody anew after each end of another.
    fn run(&mut self) {
        let last = self.arrivals.iter().map(|arrival| arrival.step).max().unwrap_or(0);
        let sizes = self.arrivals.iter().map(|a| a.n as usize * (a.prompt.len() + a.max_tokens));
        let bound = last + 20 + sizes.sum::<usize>() * 2;
        while self.step <= last || !self.live.is_empty() {
            self.tick();
            assert!(self.step <= bound, "no progress");
        }
        assert!(self.engine.scheduler().is_idle());
        assert_eq!(self.engine.scheduler().kv().num_held_blocks(), 0);
    }
}

fn run(arrivals: &[Arrival], shape: &Shape) -> BTreeMap<SeqId, Told> {
    let mut world = World::new(arrivals, shape);
    world.run();
    world.told
}

fn pin() -> impl Strategy<Value = Pin> {
    (0..40_usize, 1..20_u64)
        .prop_map(|(num_tokens, ttl)| Pin { num_tokens, ttl: Duration::from_secs(ttl) })
}

fn pooling() -> impl Strategy<Value = Pooling> {
    prop::sample::select(vec![Pooling::Mean, Pooling::Last])
}

fn arrival() -> impl Strategy<Value = Arrival> {
    // A tiny alphabet makes shared prefixes common.
    let prompt = prop::collection::vec(0..2_u32, 1..40);
    let salt = prop::sample::select(vec![None, None, Some(""), Some("tenant")]);
    let rare = || prop::bool::weighted(0.2);
    let client = prop::sample::select(vec![None, Some("a"), Some("a"), Some("b"), Some("c")]);
    (
        (0..20_usize, prompt, 1..4_u32, 0..12_usize),
        (0..6_usize, any::<bool>(), any::<bool>(), rare(), rare(), salt),
        prop::option::weighted(0.1, 0..6_usize),
        prop::option::weighted(0.2, 0..10_usize),
        (-3..4_i64, prop::option::weighted(0.3, pin()), prop::option::weighted(0.2, pooling())),
        (client, prop::option::weighted(0.05, 0..20_usize)),
    )
        .prop_map(|(what, how, broken_after, abort_after, (priority, pin, pooling), who)| {
            let (client, poison_after) = who;
            let (step, prompt, n, max_tokens) = what;
            let (min_tokens, stops, forces, penalised, prompt_logprobs, salt) = how;
            // Hidden states and logits of one prompt are never wanted at once.
            let prompt_logprobs = prompt_logprobs && pooling.is_none();
            Arrival {
                step,
                prompt,
                n,
                max_tokens,
                min_tokens,
                stops,
                forces,
                penalised,
                prompt_logprobs,
                salt,
                broken_after,
                abort_after,
                priority,
                client,
                poison_after,
                pin,
                pooling,
            }
        })
}

fn speculation() -> impl Strategy<Value = SpeculationConfig> {
    let drafter = prop::sample::select(vec![Drafter::PromptLookup, Drafter::Model]);
    (drafter, 1..9_usize)
        .prop_map(|(drafter, max_drafts)| SpeculationConfig { drafter, max_drafts })
}

fn shape() -> impl Strategy<Value = Shape> {
    let ages = (0..9_usize, 0..6_u64, 0..12_u64);
    let how = (any::<bool>(), prop::option::of(speculation()));
    let config = (1..6_usize, 2..32_usize, 1..16_usize, ages, 8..60_usize, how).prop_map(
        |(max_num_seqs, max_num_batched_tokens, cap, ages, max_model_len, how)| {
            let (has_target, speculation) = how;
            let (prefill_ageing_tokens_per_step, steps_per_priority, fairness_patience_steps) =
                ages;
            SchedulerConfig {
                max_num_seqs,
                max_num_batched_tokens,
                max_prefill_tokens_while_decoding: cap,
                prefill_ageing_tokens_per_step,
                steps_per_priority,
                fairness_patience_steps,
                target_itl: None,
                target_ttft: has_target.then_some(Duration::from_secs(6)),
                max_model_len,
                // Half of the sequences, more or less.
                stretched_beyond: Some(max_model_len / 3),
                speculation,
            }
        },
    );
    let failing_steps = prop::collection::btree_set(1..60_usize, 0..3);
    (4..40_u32, 1..9_usize, config, failing_steps, any::<bool>()).prop_map(
        |(num_blocks, block_size, config, failing_steps, runs_ahead)| Shape {
            num_blocks,
            block_size,
            config,
            failing_steps,
            runs_ahead,
        },
    )
}

/// How many random schedules are tried; at night more.
fn num_schedules() -> u32 {
    std::env::var("QWEN_SERVER_SCHEDULES").map_or(5000, |text| text.parse().expect("a number"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(num_schedules()))]

    #[test]
    fn scheduling_never_changes_the_output(
        arrivals in prop::collection::vec(arrival(), 1..12),
        shape in shape(),
    ) {
        let told = run(&arrivals, &shape);
        for (index, arrival) in arrivals.iter().enumerate() {
            for choice in 0..arrival.n {
                let Some(told) = told.get(&seq_id(index, choice)) else { continue };
                let expected = arrival.expected(choice, shape.config.max_model_len);
                prop_assert!(expected.tokens.starts_with(&told.tokens));
                prop_assert!(expected.prompt_logprobs.starts_with(&told.prompt_logprobs));
                let is_poisoned =
                    arrival.poison_after.is_some_and(|after| after < arrival.prompt.len() + expected.tokens.len());
                prop_assert!(told.end != Some(End::Lost) || is_poisoned || !shape.failing_steps.is_empty());
                if !matches!(told.end, Some(End::Aborted | End::Lost)) {
                    prop_assert_eq!(told.end, expected.end);
                    prop_assert_eq!(&told.tokens, &expected.tokens);
                    prop_assert_eq!(&told.embedding, &expected.embedding);
                    let is_pinned = arrival.pin.is_some() && choice == 0;
                    let is_told = told.num_pinned_tokens.is_some();
                    prop_assert!(is_told == is_pinned || told.end == Some(End::Failed));
                    // The scores of the step that failed are lost with it.
                    if told.end != Some(End::Failed) {
                        prop_assert_eq!(&told.prompt_logprobs, &expected.prompt_logprobs);
                    }
                }
            }
        }
        // Deterministic: the same calls give the same decisions.
        prop_assert_eq!(told, run(&arrivals, &shape));
    }

    /// Goal: identical prompts that arrive together are computed once, as far as blocks are full.
    /// Method: count computed tokens on a machine with enough room.
    #[test]
    fn a_shared_prefix_is_computed_once(
        len in 1..60_usize,
        num_requests in 1..4_usize,
        n in 1..4_u32,
        block_size in 1..9_usize,
        max_num_batched_tokens in 2..40_usize,
        cap in 1..16_usize,
    ) {
        let prompt: Vec<_> = (0..len as u32).map(|i| mix(0, i) % VOCAB_SIZE).collect();
        let arrival = Arrival { n, ..Arrival::simple(0, prompt, 1) };
        let mut shape = Shape { block_size, ..Shape::roomy() };
        shape.config.max_num_batched_tokens = max_num_batched_tokens;
        shape.config.max_prefill_tokens_while_decoding = cap;
        let arrivals = vec![arrival; num_requests];
        let mut world = World::new(&arrivals, &shape);
        world.run();
        let num_sharable = (len - 1) / block_size * block_size;
        let num_seqs = num_requests * n as usize;
        let expected = num_sharable + num_seqs * (len - num_sharable);
        prop_assert_eq!(world.engine.runner().num_computed_tokens, expected);
        for (id, told) in &world.told {
            let cached = if *id == seq_id(0, 0) { 0 } else { num_sharable };
            prop_assert_eq!(told.num_cached_tokens, Some(cached));
        }
    }

    /// Goal: whoever waits for a prefix goes on when the sequence that computes it disappears, and
    /// no block is computed twice even then. Method: abort the leader after every possible step.
    #[test]
    fn an_aborted_leader_holds_nobody_back(len in 2..60_usize, after in 0..12_usize) {
        let prompt: Vec<_> = (0..len as u32).collect();
        let leader = Arrival { abort_after: Some(after), ..Arrival::simple(0, prompt.clone(), 9) };
        let mut shape = Shape::roomy();
        shape.config.max_num_batched_tokens = 8;
        let arrivals = [leader, Arrival::simple(0, prompt.clone(), 3), Arrival::simple(0, prompt, 3)];
        let mut world = World::new(&arrivals, &shape);
        world.run();
        for (index, arrival) in arrivals.iter().enumerate().skip(1) {
            let told = &world.told[&seq_id(index, 0)];
            prop_assert_eq!(&told.tokens, &arrival.expected(0, 4096).tokens);
        }
        // Partial blocks at worst: of the leader, and per follower the tail and what it generates.
        let most = len + 4 + 9 + 2 * (4 + 2);
        prop_assert!(world.engine.runner().num_computed_tokens <= most);
    }
}

/// Goal: a long prompt never makes a running stream miss a step, and takes no more than its share.
/// Method: look at every step between the long prompt's arrival and its first token.
#[test]
fn a_long_prompt_does_not_starve_running_streams() {
    let mut arrivals: Vec<_> =
        (0..6).map(|i| Arrival::simple(0, vec![i, i + 1, i + 2], 400)).collect();
    arrivals.push(Arrival::simple(5, (0..1000).collect(), 1));
    let long = seq_id(6, 0);
    let mut world = World::new(&arrivals, &Shape::roomy());
    let mut num_prompt_steps = 0;
    while world.told.get(&long).is_none_or(|told| told.end.is_none()) {
        let output = world.tick();
        if 5 < world.step {
            let (prompts, decodes): (Vec<_>, Vec<_>) =
                output.scheduled.iter().partition(|seq| seq.id == long);
            assert_eq!(decodes.len(), 6, "a stream missed step {}", world.step);
            assert!(prompts.iter().all(|seq| seq.tokens.len() <= 8));
            num_prompt_steps += 1;
        }
    }
    assert_eq!(num_prompt_steps, 1000_usize.div_ceil(8));
}

/// Goal: a short prompt overtakes a long one, but an endless stream of short ones cannot keep the
/// long one from finishing. Method: a machine that short prompts keep busy all by themselves; the
/// ageing rule says how many of them may pass.
#[test]
fn a_long_prompt_ages() {
    let (num_long, ageing, budget) = (400_u32, 4, 16);
    let mut shape = Shape::roomy();
    shape.config.max_num_batched_tokens = budget;
    shape.config.max_prefill_tokens_while_decoding = budget;
    shape.config.prefill_ageing_tokens_per_step = ageing;
    let long = seq_id(1, 0);
    // The first one is the oldest, so the long one gets nothing out of courtesy.
    let mut arrivals = vec![Arrival::simple(0, vec![7], 1000)];
    arrivals.push(Arrival::simple(0, (0..num_long).collect(), 1));
    let short =
        |i: u32| Arrival::simple(1 + i as usize, (0..15).map(|k| k + 1000 * i).collect(), 1);
    arrivals.extend((1..600).map(short));
    let mut world = World::new(&arrivals, &shape);
    while world.told.get(&long).is_none_or(|told| told.end.is_none()) {
        world.tick();
        assert!(world.step < 250, "starved");
    }
    let overtaken = world.told.values().filter(|told| told.end.is_some()).count();
    assert!(20 < overtaken, "short prompts go first: {overtaken}");
    let may_overtake = num_long as usize / ageing;
    let own_steps = (num_long as usize).div_ceil(budget - 1);
    assert!(world.step <= may_overtake + 2 * own_steps + 10, "{}", world.step);
}

/// Goal: who waits for a prefix does not hold up others. Method: three arrive together, two alike.
#[test]
fn others_overtake_who_waits_for_a_prefix() {
    let like = Arrival::simple(0, (0..100).collect(), 1);
    let arrivals = [like.clone(), like, Arrival::simple(0, vec![5; 3], 1)];
    let mut world = World::new(&arrivals, &Shape::roomy());
    let scheduled: Vec<_> = world.tick().scheduled.iter().map(|seq| seq.id).collect();
    assert_eq!(scheduled, [seq_id(0, 0), seq_id(2, 0)]);
}

/// Goal: what made logits infinite is never shared. Method: send the same prompt again.
#[test]
fn a_failed_sequence_leaves_nothing_in_the_cache() {
    let prompt: Vec<_> = (0..20).collect();
    let broken = Arrival { broken_after: Some(2), ..Arrival::simple(0, prompt.clone(), 5) };
    let arrivals = [broken, Arrival::simple(30, prompt.clone(), 5), Arrival::simple(60, prompt, 5)];
    let told = run(&arrivals, &Shape::roomy());
    assert_eq!(told[&seq_id(0, 0)].end, Some(End::Failed));
    assert_eq!(told[&seq_id(1, 0)].num_cached_tokens, Some(0));
    assert_eq!(told[&seq_id(2, 0)].num_cached_tokens, Some(16));
}

/// Goal: prompts whose log-probabilities are wanted are computed in full, others are not.
#[test]
fn prompt_logprobs_skip_the_cache() {
    let prompt: Vec<_> = (0..20).collect();
    let first = Arrival::simple(0, prompt.clone(), 1);
    let scored = Arrival { prompt_logprobs: true, n: 2, ..Arrival::simple(9, prompt.clone(), 0) };
    let told = run(&[first, scored, Arrival::simple(20, prompt, 1)], &Shape::roomy());
    assert_eq!(told[&seq_id(1, 0)].num_cached_tokens, Some(0));
    assert_eq!(told[&seq_id(1, 0)].prompt_logprobs.len(), 19);
    assert!(told[&seq_id(1, 0)].tokens.is_empty());
    assert_eq!(told[&seq_id(1, 1)].num_cached_tokens, Some(16));
    assert_eq!(told[&seq_id(2, 0)].num_cached_tokens, Some(16));
}

/// Goal: what can never fit is refused at once; what just fits runs.
#[test]
fn refuses_what_never_fits() {
    let mut shape = Shape { num_blocks: 4, ..Shape::roomy() };
    let told =
        run(&[Arrival::simple(0, vec![1; 10], 7), Arrival::simple(0, vec![1; 10], 8)], &shape);
    assert_eq!(told.len(), 1);
    assert_eq!(told[&seq_id(0, 0)].tokens.len(), 7);
    shape.config.max_model_len = 12;
    let fitting = [Arrival::simple(0, vec![1; 12], 0), Arrival::simple(0, vec![1; 11], 9)];
    let told = run(&fitting, &shape);
    assert_eq!(told[&seq_id(0, 0)].end, Some(End::Length));
    assert_eq!(told[&seq_id(1, 0)].tokens.len(), 1);
    assert!(run(&[Arrival::simple(0, vec![1; 12], 1)], &shape).is_empty());
}

/// Goal: the urgent go first, and nobody starves for them. Method: one sequence runs at a time; an
/// endless stream of urgent ones arrives beside one that can wait.
#[test]
fn the_urgent_overtake_for_a_while() {
    let mut shape = Shape::roomy();
    shape.config.max_num_seqs = 1;
    let with = |step, priority| {
        let prompt = vec![step as u32 + 7; 3];
        Arrival { priority, ..Arrival::simple(step, prompt, 2) }
    };
    let mut arrivals = vec![with(0, 0), with(0, 2), with(0, 0), with(1, -1)];
    arrivals.extend((2..200).map(|step| with(step, -1)));
    let mut world = World::new(&arrivals, &shape);
    let mut ended = Vec::new();
    while !ended.contains(&1) {
        world.tick();
        let is_over = |index: &usize| world.told[&seq_id(*index, 0)].end.is_some();
        let known = (0..arrivals.len()).filter(|i| world.told.contains_key(&seq_id(*i, 0)));
        let new: Vec<_> = known.filter(is_over).filter(|i| !ended.contains(i)).collect();
        ended.extend(new);
        assert!(world.step < 100, "starved");
    }
    let place = |index: usize| ended.iter().position(|&other| other == index);
    assert_eq!(place(0), Some(0), "who runs already is not interrupted");
    assert!(place(3) < place(2) && place(2) < place(1), "by priority: {ended:?}");
    // Fifteen steps of advantage, two steps each.
    assert!(place(1) > Some(6), "{ended:?}");
}

/// Goal: a pinned beginning survives what would evict it, until its time is over. Method: fill the
/// cache with other content before the same prompt comes again.
#[test]
fn a_pin_keeps_a_beginning_for_its_time() {
    let prompt: Vec<TokenId> = (0..20).collect();
    let shape = Shape { num_blocks: 40, ..Shape::roomy() };
    let ttl = Duration::from_secs(50);
    let cached = |pin: Option<Pin>, at: usize| {
        let mut arrivals = vec![Arrival { pin, ..Arrival::simple(0, prompt.clone(), 1) }];
        let other = |i: usize| Arrival::simple(5 + 6 * i, vec![100 + i as u32; 60], 1);
        arrivals.extend((0..5).map(other));
        arrivals.push(Arrival::simple(at, prompt.clone(), 1));
        let told = run(&arrivals, &shape);
        let first = told[&seq_id(0, 0)].num_pinned_tokens;
        (first, told[&seq_id(6, 0)].num_cached_tokens)
    };
    assert_eq!(cached(None, 40), (None, Some(0)));
    assert_eq!(cached(Some(Pin { num_tokens: 18, ttl }), 40), (Some(16), Some(16)));
    assert_eq!(cached(Some(Pin { num_tokens: 10, ttl }), 40), (Some(8), Some(8)));
    let brief = Duration::from_secs(4);
    assert_eq!(cached(Some(Pin { num_tokens: 18, ttl: brief }), 40), (Some(16), Some(0)));
}

/// Goal: each use renews a pin; pins take a share of the cache and no more, and refuse nobody work.
#[test]
fn pins_are_renewed_bounded_and_give_way() {
    let prompt: Vec<TokenId> = (0..20).collect();
    let shape = Shape { num_blocks: 40, ..Shape::roomy() };
    let pin = Pin { num_tokens: 20, ttl: Duration::from_secs(20) };
    let first = Arrival { pin: Some(pin), ..Arrival::simple(0, prompt.clone(), 1) };
    let mut arrivals = vec![first, Arrival::simple(15, prompt.clone(), 1)];
    arrivals.extend((0..3).map(|i| Arrival::simple(17 + 5 * i, vec![100 + i as u32; 60], 1)));
    arrivals.push(Arrival::simple(32, prompt.clone(), 1));
    let told = run(&arrivals, &shape);
    assert_eq!(told[&seq_id(5, 0)].num_cached_tokens, Some(16));

    let large = Pin { num_tokens: 100, ttl: Duration::from_secs(1000) };
    let greedy = Arrival { pin: Some(large), ..Arrival::simple(0, vec![9; 100], 1) };
    let told = run(&[greedy, Arrival::simple(20, vec![8; 150], 8)], &shape);
    assert_eq!(told[&seq_id(0, 0)].num_pinned_tokens, Some(40), "a quarter of 40 blocks of four");
    assert_eq!(told[&seq_id(1, 0)].tokens.len(), 8);
}

/// Goal: a request that breaks every step it is part of is found among others, which notice nothing.
#[test]
fn only_the_poisoned_is_lost() {
    let mut arrivals: Vec<_> = (0..8)
        .map(|i| Arrival::simple(i % 3, (0..10).map(|k| k * 7 + i as u32).collect(), 20))
        .collect();
    arrivals[3].poison_after = Some(14);
    arrivals[5].poison_after = Some(2);
    let told = run(&arrivals, &Shape::roomy());
    for (index, arrival) in arrivals.iter().enumerate() {
        let told = &told[&seq_id(index, 0)];
        let expected = arrival.expected(0, 4096);
        if arrival.poison_after.is_some() {
            assert_eq!(told.end, Some(End::Lost), "{index}");
            assert!(expected.tokens.starts_with(&told.tokens));
        } else {
            assert_eq!((told.end, &told.tokens), (expected.end, &expected.tokens), "{index}");
        }
    }
    assert_eq!(told[&seq_id(3, 0)].tokens.len(), 5, "it was good for so many");
}

/// The steps at which the sequences of a client ended.
fn ends_of(world: &mut World<'_>, client: &str, num_steps: usize) -> Vec<usize> {
    let mut ends: Vec<usize> = Vec::new();
    while world.step < num_steps {
        world.tick();
        let is_over = |id: &SeqId| world.told.get(id).is_some_and(|told| told.end.is_some());
        let own = (0..world.arrivals.len()).filter(|i| world.arrivals[*i].client == Some(client));
        let num_over = own.filter(|i| is_over(&seq_id(*i, 0))).count();
        ends.extend(std::iter::repeat_n(world.step, num_over - ends.len()));
    }
    ends
}

/// Goal: a client that floods the queue does not keep another one waiting, and two that flood it get
/// the same. Method: four places; one client sends a hundred sequences at once.
#[test]
fn clients_share_the_engine() {
    let mut shape = Shape::roomy();
    shape.config.max_num_seqs = 4;
    let prompt = |i: u32| (0..3).map(|k| 1000 + 10 * i + k).collect();
    let from = |client: &'static str, step, i, num: usize| Arrival {
        client: Some(client),
        ..Arrival::simple(step, prompt(i), num)
    };
    let flood = || (0..100).map(|i| from("a", 0, i, 10));

    let mut arrivals: Vec<_> = flood().collect();
    arrivals.extend((0..10).map(|i| from("b", 20 + 20 * i as usize, 200 + i, 10)));
    let ends = ends_of(&mut World::new(&arrivals, &shape), "b", 250);
    assert_eq!(ends.len(), 10);
    for (i, end) in ends.iter().enumerate() {
        let took = end - (20 + 20 * i);
        assert!(took <= 10 + 11, "its own steps, and at most another's: {took}");
    }

    // A hundred long ones hold every place for long: one of them has to go.
    let mut arrivals: Vec<_> = (0..8).map(|i| from("a", 0, i, 500)).collect();
    arrivals.push(from("b", 20, 200, 10));
    let ends = ends_of(&mut World::new(&arrivals, &shape), "b", 60);
    assert!(ends.iter().all(|end| *end <= 20 + 10 + 8 + 2), "patience is eight steps: {ends:?}");
    assert_eq!(ends.len(), 1);

    let mut arrivals: Vec<_> = flood().collect();
    arrivals.extend((0..100).map(|i| from("b", 30, 200 + i, 10)));
    let mut world = World::new(&arrivals, &shape);
    let before = ends_of(&mut world, "a", 40).len();
    let mut world_b = World::new(&arrivals, &shape);
    let b = ends_of(&mut world_b, "b", 240).len();
    let a = ends_of(&mut world, "a", 240).len() - before;
    assert!(a.abs_diff(b) <= 6, "{a} and {b}");
}

/// Goal: steps begin early whenever nothing can change what they are, and only then. Method: counts.
#[test]
fn steps_begin_early_where_they_can() {
    let count = |arrivals: &[Arrival], max_num_seqs: usize| {
        let roomy = Shape::roomy();
        let config = SchedulerConfig { max_num_seqs, ..roomy.config };
        let mut world = World::new(arrivals, &Shape { runs_ahead: true, config, ..roomy });
        world.run();
        let runner = world.engine.runner();
        (runner.num_ahead, runner.num_steps)
    };
    let stream = || Arrival::simple(0, vec![1, 0, 1], 20);
    assert_eq!(count(&[stream()], 4), (19, 20), "all but the prompt");
    // The second one waits for a place, and comes in when the first one is over.
    assert_eq!(count(&[stream(), stream()], 1), (38, 40));
    let other = Arrival { client: Some("b"), ..stream() };
    let num_ahead = count(&[stream(), other], 1).0;
    assert!(num_ahead < 22, "{num_ahead} steps began while another client waited");
    let scored = Arrival { prompt: vec![1; 90], prompt_logprobs: true, ..stream() };
    assert_eq!(count(&[scored], 4), (19, 22), "no piece of a prompt begins early");
}

/// Goal: guesses that come true save steps, and are counted. Method: the same stream with and
/// without; and one that repeats its prompt, where looking it up is enough.
#[test]
fn guesses_save_steps() {
    let run = |arrival: &Arrival, speculation| {
        let roomy = Shape::roomy();
        let config = SchedulerConfig { speculation, ..roomy.config };
        let arrivals = [arrival.clone()];
        let mut world = World::new(&arrivals, &Shape { config, ..roomy });
        world.run();
        assert_eq!(world.told[&seq_id(0, 0)].tokens, arrival.expected(0, 4096).tokens);
        let stats = world.engine.scheduler().stats().speculation;
        (world.engine.runner().num_steps, stats)
    };
    let stream = Arrival::simple(0, vec![1, 0, 1], 200);
    let by_model = SpeculationConfig { drafter: Drafter::Model, max_drafts: 4 };
    let (num_plain_steps, none) = run(&stream, None);
    assert_eq!((num_plain_steps, none.num_drafts), (200, 0));
    let (num_steps, stats) = run(&stream, Some(by_model));
    assert!(num_steps < 120, "three of four guesses are true: {num_steps}");
    let num_accepted: u64 = stats.num_accepted_per_position.iter().sum();
    assert_eq!(num_steps as u64 + num_accepted, 200, "every step draws one token more");
    assert!(num_accepted <= stats.num_draft_tokens && stats.num_drafts < 200);
    assert!(stats.num_accepted_per_position.is_sorted_by(|a, b| b <= a));

    // A few tokens recur by chance.
    let by_lookup = SpeculationConfig { drafter: Drafter::PromptLookup, max_drafts: 4 };
    let (num_steps, stats) = run(&stream, Some(by_lookup));
    assert!(num_steps <= 200 && 0 < stats.num_drafts, "{num_steps} {stats:?}");
}
