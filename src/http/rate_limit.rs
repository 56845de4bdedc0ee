//! What clients are told of their quota.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};

use crate::access::{Allowance, Resource};

/// The `x-ratelimit-*` headers of what is limited.
pub(super) fn rate_limit_headers(
    allowances: &[Allowance],
) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
    allowances.iter().flat_map(|allowance| {
        let [limit, remaining, reset] = names(allowance.resource).map(HeaderName::from_static);
        let short = short(allowance.reset);
        [
            (limit, HeaderValue::from(allowance.limit)),
            (remaining, HeaderValue::from(allowance.remaining)),
            (reset, HeaderValue::from_str(&short).expect("it is letters and digits")),
        ]
    })
}

fn names(resource: Resource) -> [&'static str; 3] {
    match resource {
        Resource::Requests | Resource::Seats => [
            "x-ratelimit-limit-requests",
            "x-ratelimit-remaining-requests",
            "x-ratelimit-reset-requests",
        ],
        Resource::Tokens => {
            ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"]
        }
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
