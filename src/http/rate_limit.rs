//! What clients are told of their quota.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};

use super::state::unix_seconds;
use crate::access::{Allowance, Resource, Timestamp};

/// Whose names the headers have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// `x-ratelimit-*`, which OpenAI's clients know.
    OpenAi,
    /// `anthropic-ratelimit-*`.
    Anthropic,
}

/// The headers that tell what is left of what is limited.
pub(super) fn rate_limit_headers(
    allowances: &[Allowance],
    names: Names,
) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
    allowances.iter().flat_map(move |allowance| {
        let [limit, remaining, reset] = header_names(names, allowance.resource);
        let time = match names {
            Names::OpenAi => short(allowance.reset),
            Names::Anthropic => {
                let seconds = allowance.reset.as_nanos().div_ceil(1_000_000_000) as u64;
                Timestamp(unix_seconds().saturating_add(seconds)).to_string()
            }
        };
        let time = HeaderValue::from_str(&time).expect("it is letters, digits, dashes and colons");
        [
            (limit, HeaderValue::from(allowance.limit)),
            (remaining, HeaderValue::from(allowance.remaining)),
            (reset, time),
        ]
        .map(|(name, value)| (HeaderName::from_static(name), value))
    })
}

fn header_names(names: Names, resource: Resource) -> [&'static str; 3] {
    match (names, resource) {
        (Names::OpenAi, Resource::Tokens) => {
            ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"]
        }
        (Names::OpenAi, _) => [
            "x-ratelimit-limit-requests",
            "x-ratelimit-remaining-requests",
            "x-ratelimit-reset-requests",
        ],
        (Names::Anthropic, Resource::Tokens) => [
            "anthropic-ratelimit-tokens-limit",
            "anthropic-ratelimit-tokens-remaining",
            "anthropic-ratelimit-tokens-reset",
        ],
        (Names::Anthropic, _) => [
            "anthropic-ratelimit-requests-limit",
            "anthropic-ratelimit-requests-remaining",
            "anthropic-ratelimit-requests-reset",
        ],
    }
}

/// A time as these headers have it: `12ms`, `1.5s`, `6m0s`. Rounded up.
fn short(time: Duration) -> String {
    let millis = time.as_nanos().div_ceil(1_000_000);
    if millis < 1000 {
        return format!("{millis}ms");
    }
    let (minutes, millis) = (millis / 60_000, millis % 60_000);
    let seconds = format!("{}.{:03}", millis / 1000, millis % 1000);
    let seconds = seconds.trim_end_matches('0').trim_end_matches('.');
    if minutes == 0 { format!("{seconds}s") } else { format!("{minutes}m{seconds}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        for (millis, text) in [
            (0, "0ms"),
            (12, "12ms"),
            (1000, "1s"),
            (1500, "1.5s"),
            (10_000, "10s"),
            (59_999, "59.999s"),
            (60_000, "1m0s"),
            (361_040, "6m1.04s"),
        ] {
            assert_eq!(short(Duration::from_millis(millis)), text);
        }
        assert_eq!(short(Duration::from_nanos(1)), "1ms");
    }
}
