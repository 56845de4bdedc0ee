//! Guesses of the tokens that come next, so that one step can draw several of them.
//!
//! A step computes guesses behind a sequence's last token and draws a token behind each, as if they
//! were true; [`SeqOutput::keep_verified`](super::step::SeqOutput::keep_verified) keeps what is drawn
//! up to the first guess that is not. Draws are functions of the logits, the seed and the position,
//! so what a sequence says is the same with guesses and without, whatever its temperature: guesses
//! change when tokens come, never which.
//!
//! A guess costs the computation of a token, so it is made where that pays: while it is expected to
//! yield more tokens for its time than the step does without it. How likely guesses come true is
//! observed for each sequence (`acceptance`), and how long steps take for all (`step_cost`).

use crate::scheduler::Scheduler;
use crate::scheduler::acceptance::Source;
use crate::scheduler::prompt_lookup::Match;
use crate::scheduler::sequence::Sequence;
use crate::scheduler::step::{ScheduledSeq, SchedulerOutput, UNDRAWN};
use crate::text::TokenId;

/// Most guesses behind one token.
pub const MAX_DRAFTS: usize = 16;

/// Matches of so many tokens are better than short ones, and these are good.
const MATCH: usize = 4;
const LONG_MATCH: usize = 12;

/// Who guesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drafter {
    /// The sequence itself: what followed the last tokens earlier.
    PromptLookup,
    /// A smaller model, which the runner asks: steps have [`UNDRAWN`] where its guesses will be.
    Model,
}

/// How the next tokens are guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpeculationConfig {
    /// Who guesses.
    pub drafter: Drafter,
    /// At most this many guesses of a sequence in a step, and at most [`MAX_DRAFTS`].
    pub max_drafts: usize,
}

/// A sequence of a step that may have guesses.
struct Candidate {
    /// Its place in the step.
    place: usize,
    source: Source,
    /// How likely each of the guesses is true, if those before it are.
    rate: f64,
    drafts: Vec<TokenId>,
    /// How many of them are taken.
    num_taken: usize,
}

impl Scheduler {
    /// Adds guesses to a step, as many as pay and as there is room for in the step and in the cache.
    pub(super) fn speculate(&mut self, output: &mut SchedulerOutput) {
        let Some(config) = self.config.speculation else { return };
        if self.suspect().is_some() {
            return;
        }
        self.name_tokens_before(output);
        let num_tokens: usize = output.scheduled.iter().map(|seq| seq.tokens.len()).sum();
        let cost = self.step_cost.line();
        let mut time = cost.of(num_tokens);
        // Tokens that the step is expected to draw.
        let mut yielded = output.scheduled.iter().filter(|seq| seq.sample.is_some()).count() as f64;
        let is_worthwhile =
            |chance: f64, time: f64, yielded: f64| yielded * cost.per_token < chance * time;

        let may_pay = |rate| is_worthwhile(rate, time, yielded);
        let mut candidates = self.candidates(output, config, may_pay);
        // The likeliest first; of one sequence that is the order of its guesses.
        let mut guesses: Vec<(f64, usize)> = Vec::new();
        for (index, candidate) in candidates.iter().enumerate() {
            let chances = (1..=candidate.drafts.len() as i32).map(|n| candidate.rate.powi(n));
            guesses.extend(chances.map(|chance| (chance, index)));
        }
        guesses.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for (chance, index) in
            guesses.into_iter().take(self.config.max_num_batched_tokens - num_tokens)
        {
            let is_late = self.step_cost.is_known()
                && self
                    .config
                    .target_itl
                    .is_some_and(|target| target.as_secs_f64() < time + cost.per_token);
            if is_late || !is_worthwhile(chance, time, yielded) {
                break;
            }
            candidates[index].num_taken += 1;
            time += cost.per_token;
            yielded += chance;
        }
        for candidate in candidates {
            self.add_drafts(&mut output.scheduled[candidate.place], candidate);
        }
    }

    /// The sequences that lack their last token alone and have guesses, where at least one of them
    /// may be worthwhile.
    fn candidates(
        &mut self,
        output: &SchedulerOutput,
        config: SpeculationConfig,
        is_worthwhile: impl Fn(f64) -> bool,
    ) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        let mut running = self.running.iter_mut();
        for (place, scheduled) in output.scheduled.iter().enumerate() {
            // Both are in the same order.
            let seq = running.find(|seq| seq.id() == scheduled.id).expect("who is scheduled runs");
            let is_decode = scheduled.tokens.len() == 1 && scheduled.sample.is_some();
            let max_drafts = config.max_drafts.min(MAX_DRAFTS).min(seq.max_drafts());
            if is_decode
                && 0 < max_drafts
                && let Some((source, drafts)) =
                    guess(seq, (config.drafter, max_drafts), &is_worthwhile)
            {
                let rate = seq.acceptance.rate(source);
                candidates.push(Candidate { place, source, rate, drafts, num_taken: 0 });
            }
        }
        candidates
    }

    /// Puts the guesses that are taken behind a sequence's last token, if there are slots for them.
    fn add_drafts(&mut self, scheduled: &mut ScheduledSeq, candidate: Candidate) {
        let Candidate { source, drafts, mut num_taken, .. } = candidate;
        let seq = self.running.iter_mut().find(|seq| seq.id() == scheduled.id);
        let seq = seq.expect("who is scheduled runs");
        // Nobody gives blocks back for a guess.
        if self.kv.allocate_slots(&mut seq.blocks, scheduled.end() + num_taken).is_err() {
            let num_slots = seq.blocks.table().blocks().len() * self.kv.block_size();
            num_taken = num_taken.min(num_slots - scheduled.end());
        }
        if num_taken == 0 {
            seq.acceptance.skip(source);
            return;
        }
        seq.acceptance.begin(source);
        scheduled.tokens.extend(&drafts[..num_taken]);
        scheduled.num_drafts = num_taken;
        scheduled.blocks = seq.blocks.table().clone();
    }

    /// Takes note which guesses came true, so many: their keys and values are the sequence's. The
    /// slots of the others are written again before anybody reads them.
    pub(super) fn accept_drafts(
        &mut self,
        index: usize,
        scheduled: &ScheduledSeq,
        num_accepted: usize,
    ) {
        let seq = &mut self.running[index];
        // Less, if it is over in their midst.
        let known_end = scheduled.start + scheduled.num_known();
        seq.num_computed_tokens = (known_end + num_accepted).min(seq.tokens.len());
        self.kv.publish_full_blocks(&mut seq.blocks, &seq.tokens, seq.num_computed_tokens);
        self.kv.trim(&mut seq.blocks, seq.num_computed_tokens);
        seq.acceptance.observe(scheduled.num_drafts, num_accepted);
        seq.is_drafter_behind = num_accepted == scheduled.num_drafts;
        // Those behind a token that ends the sequence are nobody's.
        let num_delivered = seq.num_computed_tokens - known_end;
        let stats = &mut self.stats.speculation;
        stats.num_drafts += 1;
        stats.num_draft_tokens += scheduled.num_drafts as u64;
        for count in &mut stats.num_accepted_per_position[..num_delivered] {
            *count += 1;
        }
    }

    /// A model that guesses has not computed its own last guess.
    fn name_tokens_before(&mut self, output: &mut SchedulerOutput) {
        let mut running = self.running.iter_mut();
        for scheduled in &mut output.scheduled {
            let seq = running.find(|seq| seq.id() == scheduled.id).expect("who is scheduled runs");
            if std::mem::take(&mut seq.is_drafter_behind) {
                scheduled.token_before = Some(seq.tokens[scheduled.start - 1]);
            }
        }
    }
}

/// Guesses of a sequence's next tokens, unless even the likeliest are not worthwhile.
fn guess(
    seq: &mut Sequence,
    (drafter, max_drafts): (Drafter, usize),
    is_worthwhile: &impl Fn(f64) -> bool,
) -> Option<(Source, Vec<TokenId>)> {
    let sources: &[Source] = match drafter {
        Drafter::Model => &[Source::Model],
        Drafter::PromptLookup => &[Source::ShortMatch, Source::Match, Source::LongMatch],
    };
    if !sources.iter().any(|&source| is_worthwhile(seq.acceptance.rate(source))) {
        for &source in sources {
            seq.acceptance.skip(source);
        }
        return None;
    }
    match drafter {
        Drafter::Model => Some((Source::Model, vec![UNDRAWN; max_drafts])),
        Drafter::PromptLookup => {
            let found = Match::find(&seq.tokens)?;
            let source = match found.len {
                ..MATCH => Source::ShortMatch,
                MATCH..LONG_MATCH => Source::Match,
                LONG_MATCH.. => Source::LongMatch,
            };
            Some((source, found.continuation(&seq.tokens, max_drafts)))
        }
    }
}
