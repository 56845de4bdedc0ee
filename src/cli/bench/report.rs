//! What a measurement found, as a table and as JSON.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::cli::bench::BenchArgs;
use crate::cli::bench::load::Outcome;

/// Everything that was measured, and how.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) model: String,
    pub(crate) url: String,
    /// Of each prompt, as asked for.
    pub(crate) prompt_tokens: u32,
    /// Of each answer, as asked for.
    pub(crate) output_tokens: u32,
    pub(crate) runs: u32,
    pub(crate) levels: Vec<LevelReport>,
}

/// What was measured with one number of clients.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LevelReport {
    pub(crate) concurrency: u64,
    pub(crate) num_requests: usize,
    pub(crate) num_failed: usize,
    pub(crate) first_failure: Option<String>,
    pub(crate) seconds: f64,
    /// As the server counted them.
    pub(crate) prompt_tokens: u64,
    pub(crate) output_tokens: u64,
    pub(crate) requests_per_second: f64,
    pub(crate) output_tokens_per_second: f64,
    /// Time to first token.
    pub(crate) ttft_ms: Percentiles,
    /// Between one event with tokens and the next.
    pub(crate) inter_token_ms: Percentiles,
    /// Whole answers.
    pub(crate) latency_ms: Percentiles,
}

/// Summary of a set of measurements; zero if there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
}

impl Report {
    pub(crate) fn new(args: &BenchArgs, model: String, levels: Vec<LevelReport>) -> Self {
        Self {
            model,
            url: args.server.url.clone(),
            prompt_tokens: args.prompt_tokens,
            output_tokens: args.output_tokens,
            runs: args.runs,
            levels,
        }
    }
}

impl LevelReport {
    pub(crate) fn new(concurrency: u64, outcomes: &[Outcome], elapsed: Duration) -> Self {
        let timings = || outcomes.iter().filter_map(|outcome| outcome.as_ref().ok());
        let output_tokens: u64 = timings().map(|timing| timing.output_tokens).sum();
        let seconds = elapsed.as_secs_f64();
        let per_second = |count: f64| if 0.0 < seconds { count / seconds } else { 0.0 };
        Self {
            concurrency,
            num_requests: outcomes.len(),
            num_failed: outcomes.len() - timings().count(),
            first_failure: outcomes.iter().find_map(|outcome| outcome.clone().err()),
            seconds,
            prompt_tokens: timings().map(|timing| timing.prompt_tokens).sum(),
            output_tokens,
            requests_per_second: per_second(timings().count() as f64),
            output_tokens_per_second: per_second(output_tokens as f64),
            ttft_ms: Percentiles::of(timings().map(|timing| timing.first_token)),
            inter_token_ms: Percentiles::of(timings().flat_map(|timing| timing.gaps.clone())),
            latency_ms: Percentiles::of(timings().map(|timing| timing.total)),
        }
    }
}

impl Percentiles {
    fn of(durations: impl Iterator<Item = Duration>) -> Self {
        let mut sorted: Vec<f64> = durations.map(|duration| duration.as_secs_f64() * 1e3).collect();
        if sorted.is_empty() {
            return Self::default();
        }
        sorted.sort_by(f64::total_cmp);
        Self {
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            p50: percentile(&sorted, 0.50),
            p90: percentile(&sorted, 0.90),
            p99: percentile(&sorted, 0.99),
        }
    }
}

/// The value below which `share` of the sorted values lie, between the two nearest ones.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    low + (high - low) * rank.fract()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, url, prompt_tokens, output_tokens, runs, levels } = self;
        let plural = if *runs == 1 { "run" } else { "runs" };
        writeln!(
            f,
            "{model} at {url}, prompts of {prompt_tokens} tokens, answers of \
                     {output_tokens}, {runs} {plural}"
        )?;
        writeln!(f)?;
        writeln!(
            f,
            "{:>7} {:>8} {:>6} | {:>8} {:>7} | {:^26} | {:^26}",
            "", "", "", "output", "", "first token, ms", "between tokens, ms"
        )?;
        writeln!(
            f,
            "{:>7} {:>8} {:>6} | {:>8} {:>7} | {:>8} {:>8} {:>8} | {:>8} {:>8} {:>8}",
            "clients",
            "requests",
            "failed",
            "tokens/s",
            "req/s",
            "p50",
            "p90",
            "p99",
            "p50",
            "p90",
            "p99"
        )?;
        for level in levels {
            let (first, between) = (level.ttft_ms, level.inter_token_ms);
            writeln!(
                f,
                "{:>7} {:>8} {:>6} | {:>8.1} {:>7.2} | {:>8.1} {:>8.1} {:>8.1} | {:>8.1} {:>8.1} \
                 {:>8.1}",
                level.concurrency,
                level.num_requests,
                level.num_failed,
                level.output_tokens_per_second,
                level.requests_per_second,
                first.p50,
                first.p90,
                first.p99,
                between.p50,
                between.p90,
                between.p99,
            )?;
        }
        for level in levels {
            if let Some(reason) = &level.first_failure {
                writeln!(f, "\n{} clients, first failure: {reason}", level.concurrency)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::load::Timing;

    #[test]
    fn percentiles_lie_between_the_nearest_values() {
        let sorted: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!(percentile(&sorted, 0.5), 50.0);
        assert_eq!(percentile(&sorted, 0.99), 99.0);
        assert_eq!(percentile(&[1.0, 2.0], 0.5), 1.5);
        assert_eq!(percentile(&[7.0], 0.99), 7.0);
        assert!((percentile(&[0.0, 10.0, 20.0], 0.9) - 18.0).abs() < 1e-9);
        assert_eq!(Percentiles::of(std::iter::empty()), Percentiles::default());
    }

    #[test]
    fn a_level_counts_failures_apart() {
        let timing = |ms| Timing {
            first_token: Duration::from_millis(ms),
            gaps: vec![Duration::from_millis(10); 3],
            total: Duration::from_millis(ms + 30),
            prompt_tokens: 5,
            output_tokens: 4,
        };
        let outcomes = [Ok(timing(100)), Err("broke".to_owned()), Ok(timing(300))];
        let level = LevelReport::new(2, &outcomes, Duration::from_secs(2));
        assert_eq!((level.num_requests, level.num_failed), (3, 1));
        assert_eq!(level.first_failure.as_deref(), Some("broke"));
        assert_eq!((level.prompt_tokens, level.output_tokens), (10, 8));
        assert_eq!(level.output_tokens_per_second, 4.0);
        assert_eq!(level.requests_per_second, 1.0);
        assert_eq!(level.ttft_ms.p50, 200.0);
        assert_eq!(level.inter_token_ms.p99, 10.0);
        assert_eq!(level.latency_ms.mean, 230.0);
    }
}
