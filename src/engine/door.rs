//! Whether who comes now gets a first token in time. Pure.

use std::time::Duration;

use crate::engine::seats::{Claim, Seats};
use crate::engine::stats::{EngineLimits, EngineStats};

/// The part of the target that the expected wait may take. What is expected is a mean, a step that
/// has begun is waited for, and half of those who are promised exactly the target would be late.
const PART_OF_TARGET: f64 = 0.6;

/// What a request has before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Forecast {
    /// How long it takes until its prompt is read.
    pub(super) wait: Duration,
    /// Whether it is others who make it wait: who is alone gets what there is.
    pub(super) has_others: bool,
}

impl Forecast {
    /// From what the engine said last, and who came since.
    pub(super) fn of(
        claim: &Claim,
        seats: &Seats,
        stats: &EngineStats,
        limits: &EngineLimits,
    ) -> Self {
        let num_unseen_tokens =
            seats.num_waiting_tokens().saturating_sub(stats.num_unstarted_tokens);
        // Clients take turns, so not all that waits comes before.
        let num_started = stats.num_tokens_ahead.saturating_sub(stats.num_unstarted_tokens);
        let num_before = (stats.num_tokens_ahead + num_unseen_tokens)
            .min(num_started + seats.num_tokens_before(claim));
        let until_read = stats.wait_per_token.saturating_mul(to_u32(num_before + claim.num_tokens));

        let num_seen = stats.num_running + stats.num_waiting;
        let num_waiting = stats.num_waiting + seats.num_taken().saturating_sub(num_seen);
        let num_waiting = seats.num_seqs_before(claim, num_waiting);
        // If it is the blocks that are taken, there are fewer places.
        let num_places = if stats.is_full { stats.num_running } else { limits.max_num_seqs };
        let num_lacking = (stats.num_running + num_waiting + 1).saturating_sub(num_places);
        let until_begun = stats.wait_per_place.saturating_mul(to_u32(num_lacking));
        Self { wait: until_read.max(until_begun), has_others: 0 < num_before || 0 < num_lacking }
    }

    /// Whether the first token would come later than it should.
    pub(super) fn is_later_than(&self, target: Duration) -> bool {
        self.has_others && target.mul_f64(PART_OF_TARGET) <= self.wait
    }
}

fn to_u32(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Goal: who is let in gets a first token within the target, however many come; and the machine is
/// as busy as without a target. Method: the scheduler and the door as they are, on a machine that
/// takes a time for every token, with a clock that is only counted.
#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;
    use crate::engine::pace::Pace;
    use crate::engine::thread::EngineConfig;
    use crate::scheduler::step::{SampledToken, SeqOutput};
    use crate::scheduler::{Priority, Scheduler, SeqEvent, SeqId, SequenceSpec};

    const TARGET: Duration = Duration::from_secs(3);

    /// What comes, and what a machine is like.
    #[derive(Clone, Copy, Debug)]
    struct Load {
        seconds: f64,
        requests_per_second: f64,
        prompt_tokens: (usize, usize),
        output_tokens: (usize, usize),
        ms_per_step: f64,
        ms_per_token: f64,
        has_target: bool,
        /// One request that comes in the fifth second.
        giant_tokens: Option<usize>,
    }

    /// What came of it.
    #[derive(Debug, Default)]
    struct Outcome {
        num_refused: usize,
        num_finished: usize,
        /// In seconds, sorted.
        first_tokens: Vec<f64>,
    }

    impl Outcome {
        fn quantile(&self, part: f64) -> f64 {
            self.first_tokens[(part * (self.first_tokens.len() - 1) as f64) as usize]
        }
    }

    /// Evenly spread numbers below one.
    struct Chance(u64);

    impl Chance {
        fn next(&mut self) -> f64 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 11) as f64 / (1_u64 << 53) as f64
        }

        fn between(&mut self, (least, most): (usize, usize)) -> usize {
            least + (self.next() * (most + 1 - least) as f64) as usize
        }
    }

    struct World {
        load: Load,
        limits: EngineLimits,
        scheduler: Scheduler,
        seats: Seats,
        pace: Pace,
        stats: EngineStats,
        chance: Chance,
        now: f64,
        next_arrival: f64,
        num_arrived: u64,
        arrived: BTreeMap<SeqId, (f64, Claim)>,
        /// Who came while a step ran, and was let in.
        unseen: Vec<SequenceSpec>,
        outcome: Outcome,
    }

    impl World {
        fn new(load: Load, seed: u64) -> Self {
            let target_ttft = load.has_target.then_some(TARGET);
            let config = EngineConfig { target_ttft, ..EngineConfig::default() };
            let full_step =
                load.ms_per_step + load.ms_per_token * config.max_num_batched_tokens as f64;
            let per_token = full_step / config.max_num_batched_tokens as f64;
            Self {
                load,
                limits: config.limits(),
                scheduler: config.scheduler(),
                seats: Seats::default(),
                pace: Pace::expecting(Duration::from_secs_f64(per_token / 1e3)),
                stats: EngineStats::default(),
                chance: Chance(seed),
                now: 0.0,
                next_arrival: 0.0,
                num_arrived: 0,
                arrived: BTreeMap::new(),
                unseen: Vec::new(),
                outcome: Outcome::default(),
            }
        }

        fn run(mut self) -> Outcome {
            self.publish();
            while self.now < self.load.seconds || !self.arrived.is_empty() {
                self.receive();
                for spec in std::mem::take(&mut self.unseen) {
                    self.scheduler.add(spec).expect("it fits");
                }
                self.scheduler.advance_to(Duration::from_secs_f64(self.now));
                if self.scheduler.is_idle() {
                    self.now = self.next_arrival.max(self.now);
                    continue;
                }
                self.step();
            }
            self.outcome.first_tokens.sort_by(f64::total_cmp);
            self.outcome
        }

        /// Everybody who has come until now, at the door.
        fn receive(&mut self) {
            while self.next_arrival <= self.now.min(self.load.seconds) {
                self.num_arrived += 1;
                let giant = self.load.giant_tokens.filter(|_| 5.0 < self.next_arrival);
                let num_tokens = match giant {
                    Some(giant) => giant,
                    None => self.chance.between(self.load.prompt_tokens),
                };
                self.load.giant_tokens = self.load.giant_tokens.xor(giant);
                let max_tokens = self.chance.between(self.load.output_tokens);
                let claim = Claim { client: None, num_seqs: 1, num_tokens };
                let forecast = Forecast::of(&claim, &self.seats, &self.stats, &self.limits);
                let is_late = self.limits.target_ttft.is_some_and(|t| forecast.is_later_than(t));
                if is_late || !self.seats.take(&claim, &self.limits) {
                    self.outcome.num_refused += 1;
                } else {
                    let id = SeqId(self.num_arrived);
                    let prompt: Arc<[u32]> = std::iter::repeat_n(id.0 as u32, num_tokens).collect();
                    self.unseen.push(spec(id, prompt, max_tokens));
                    self.arrived.insert(id, (self.next_arrival, claim));
                }
                self.next_arrival +=
                    -self.chance.next().max(1e-9).ln() / self.load.requests_per_second;
            }
        }

        fn step(&mut self) {
            let before = self.scheduler.stats();
            let step = self.scheduler.schedule();
            let num_tokens: usize = step.scheduled.iter().map(|seq| seq.tokens.len()).sum();
            let took = (self.load.ms_per_step + self.load.ms_per_token * num_tokens as f64) / 1e3;
            self.now += took;
            // Who comes meanwhile knows what was known when it began.
            self.receive();
            let outputs = step.scheduled.iter().map(|seq| SeqOutput {
                sampled: seq.sample.is_some().then_some(Ok(SampledToken { id: 1, logprobs: None })),
                ..SeqOutput::default()
            });
            let events = self.scheduler.update(&step, outputs.collect());
            self.pace.observe(&before, &self.scheduler.stats(), Duration::from_secs_f64(took));
            self.publish();
            for event in &events {
                self.hear(event);
            }
        }

        fn publish(&mut self) {
            let stats = self.scheduler.stats();
            self.stats = EngineStats {
                num_running: stats.num_running,
                num_waiting: stats.num_waiting,
                is_full: stats.is_full,
                num_tokens_ahead: stats.num_tokens_ahead,
                num_unstarted_tokens: stats.num_unstarted_tokens,
                wait_per_token: self.pace.wait_per_token(),
                wait_per_place: self.pace.wait_per_place(stats.num_running),
                ..EngineStats::default()
            };
        }

        fn hear(&mut self, event: &SeqEvent) {
            match *event {
                SeqEvent::Started { id, .. } => {
                    let claim = &mut self.arrived.get_mut(&id).expect("known").1;
                    self.seats.started(&claim.client, std::mem::take(&mut claim.num_tokens));
                }
                SeqEvent::Token(id, _) => {
                    let arrived = &mut self.arrived.get_mut(&id).expect("known").0;
                    if !arrived.is_nan() {
                        self.outcome
                            .first_tokens
                            .push(self.now - std::mem::replace(arrived, f64::NAN));
                    }
                }
                SeqEvent::Finished(id, _) => {
                    let (_, claim) = self.arrived.remove(&id).expect("known");
                    self.seats.give_back(&claim);
                    self.outcome.num_finished += usize::from(self.now < self.load.seconds);
                }
                _ => {}
            }
        }
    }

    fn spec(id: SeqId, prompt: Arc<[u32]>, max_tokens: usize) -> SequenceSpec {
        SequenceSpec {
            id,
            prompt,
            params: Arc::default(),
            choice: 0,
            max_tokens,
            stop_token_ids: Arc::new([]),
            prompt_logprobs: None,
            cache_salt: None,
            priority: Priority::default(),
            fairness_id: None,
            pins: Arc::new([]),
            pooling: None,
            is_guided: false,
            adapter: None,
        }
    }

    const OVERLOAD: Load = Load {
        seconds: 35.0,
        requests_per_second: 60.0,
        prompt_tokens: (50, 340),
        output_tokens: (8, 48),
        ms_per_step: 30.0,
        ms_per_token: 2.0,
        has_target: true,
        giant_tokens: None,
    };

    /// With the target and, to compare, without.
    fn outcomes(load: Load, seed: u64) -> [Outcome; 2] {
        [true, false].map(|has_target| World::new(Load { has_target, ..load }, seed).run())
    }

    #[test]
    fn first_tokens_come_in_time_however_many_want_them() {
        let minutes = Load { seconds: 120.0, ..OVERLOAD };
        let fast = Load { ms_per_token: 0.05, requests_per_second: 500.0, ..OVERLOAD };
        let mixed = Load { prompt_tokens: (20, 1000), ..OVERLOAD };
        for seed in 1..4 {
            for load in [OVERLOAD, minutes, fast, mixed] {
                let [kept, free] = outcomes(load, seed);
                let (p99, target) = (kept.quantile(0.99), TARGET.as_secs_f64());
                assert!(p99 <= target, "{load:?}: {p99} s");
                assert!(2.0 * target < free.quantile(0.5), "there is no overload");
                // It reads no prompts in vain, so that there is more time for answers.
                assert!(0.95 * free.num_finished as f64 <= kept.num_finished as f64, "{load:?}");
                assert!(0.5 * target < kept.quantile(0.5), "it could have let in more");
            }
        }
    }

    /// Goal: what is scarce may be places too, whose time is known only when the first are over.
    #[test]
    fn places_are_waited_for_too() {
        for seed in 1..4 {
            let load = Load { output_tokens: (100, 300), seconds: 120.0, ..OVERLOAD };
            let [kept, free] = outcomes(load, seed);
            let (p95, target) = (kept.quantile(0.95), TARGET.as_secs_f64());
            assert!(p95 <= target && kept.quantile(1.0) < 2.0 * target, "{p95} s");
            assert!(0.95 * free.num_finished as f64 <= kept.num_finished as f64);
        }
    }

    #[test]
    fn places_lack_only_where_all_are_taken() {
        let limits = EngineConfig { max_num_seqs: 8, ..EngineConfig::default() }.limits();
        let seats = Seats::default();
        let claim = Claim { client: None, num_seqs: 1, num_tokens: 1 };
        assert!((0..6).all(|_| seats.take(&claim, &limits)));
        let wait = |num_running, num_waiting, is_full| {
            let wait_per_place = Duration::from_secs(1);
            let stats = EngineStats {
                num_running,
                num_waiting,
                is_full,
                wait_per_place,
                ..EngineStats::default()
            };
            Forecast::of(&claim, &seats, &stats, &limits).wait.as_secs()
        };
        assert_eq!(wait(2, 4, false), 0, "four wait for a prefix that two compute");
        assert_eq!(wait(2, 4, true), 5, "they wait for blocks");
        assert_eq!(wait(2, 0, false), 0, "four have just come");
        assert_eq!(wait(6, 4, false), 3, "eight places for ten, and one more");
    }

    /// Goal: a prompt that takes longer than the target by itself is read, and others pass it until
    /// it has waited for as long as it takes to read.
    #[test]
    fn a_giant_is_no_reason_to_refuse_everybody() {
        let calm = Load { requests_per_second: 0.5, seconds: 120.0, ..OVERLOAD };
        for seed in 1..4 {
            let [kept, _] = outcomes(calm, seed);
            assert!(kept.num_refused <= 1, "a calm server refuses nobody: {}", kept.num_refused);
            let [kept, free] = outcomes(Load { giant_tokens: Some(20_000), ..calm }, seed);
            assert!(kept.num_refused <= 20, "{} of 60", kept.num_refused);
            assert!(10.0 * TARGET.as_secs_f64() < kept.quantile(1.0), "the giant itself");
            assert!(kept.quantile(0.95) < TARGET.as_secs_f64(), "everybody else");
            assert!(free.num_refused == 0);
        }
    }
}
