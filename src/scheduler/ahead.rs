//! The step after the one under way, before its tokens are known. On a device that computes by itself
//! it begins at once, and the processor's work happens meanwhile.
//!
//! What a drawn token changes comes later: who draws again, under which mask and penalties, is
//! settled when the token is known. A sequence that turns out to be over was computed in vain once:
//! one place of its cache is written, which nobody reads before it is written again.

use crate::scheduler::Scheduler;
use crate::scheduler::step::SchedulerOutput;

impl Scheduler {
    /// The next step, if it follows from the one under way whatever that draws: every running
    /// sequence draws a token in it and goes on with that one alone, nobody can come in, and there
    /// are blocks for all. Sequences that certainly end are left out.
    pub fn schedule_ahead(&mut self, under_way: &SchedulerOutput) -> Option<SchedulerOutput> {
        // Guesses follow from the tokens, so they must be known.
        let is_foreseeable = self.config.speculation.is_none() && self.suspect().is_none();
        if !is_foreseeable || !self.is_closed() {
            return None;
        }
        let mut scheduled = under_way.scheduled.iter().enumerate();
        let mut going_on = Vec::new();
        let mut num_missing_blocks = 0;
        for (index, seq) in self.running.iter().enumerate() {
            // Both are in the same order; under way are also some that were aborted since.
            let (drawn_by, current) = scheduled.find(|(_, current)| current.id == seq.id())?;
            current.sample.as_ref()?;
            if !seq.ends_with_next_token() {
                let needed = self.kv.blocks_for(seq.tokens.len() + 1);
                num_missing_blocks += needed - seq.blocks.table().blocks().len();
                going_on.push((index, drawn_by));
            }
        }
        if going_on.is_empty() || self.kv.num_free_blocks() < num_missing_blocks {
            return None;
        }
        let mut output = SchedulerOutput::default();
        for (index, drawn_by) in going_on {
            let seq = &mut self.running[index];
            let end = seq.tokens.len() + 1;
            self.kv.allocate_slots(&mut seq.blocks, end).expect("there are blocks for all");
            seq.last_scheduled_step = self.num_steps + 1;
            output.scheduled.push(seq.schedule_undrawn(drawn_by));
        }
        self.charge(&output);
        Some(output)
    }

    /// Whether no sequence of the queue can run before another one ends: there is none, or no place
    /// and nobody who could have to give one up.
    fn is_closed(&self) -> bool {
        let is_full = self.running.len() == self.config.max_num_seqs;
        self.waiting.is_empty() || (is_full && !self.shares.has_rivals())
    }

    /// Completes a step that began early, now that the step before is recorded: with its tokens, and
    /// who draws another one. Returns false if it was in vain, because all its sequences are over.
    pub fn settle(&mut self, step: &mut SchedulerOutput) -> bool {
        // Whoever runs is part of it, in the same order.
        let mut running = self.running.iter().peekable();
        let mut is_wanted = false;
        for scheduled in &mut step.scheduled {
            let Some(seq) = running.next_if(|seq| seq.id() == scheduled.id) else { continue };
            scheduled.tokens[0] = seq.tokens[scheduled.start];
            // Others have tokens that were forced behind the drawn one, and compute them first.
            let is_next = scheduled.end() == seq.tokens.len();
            scheduled.sample = is_next.then(|| seq.sample_request());
            is_wanted = true;
        }
        assert!(running.next().is_none(), "nobody is left out of a step that began early");
        self.num_steps += u64::from(is_wanted);
        is_wanted
    }
}
