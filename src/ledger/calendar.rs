//! Hours, days and months in UTC.
//!
//! Days are counted as in Howard Hinnant's "chrono-compatible low-level date algorithms": years
//! begin in March, so that a leap day is the last of its year.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const SECONDS_PER_HOUR: u64 = 3600;
const HOURS_PER_DAY: u64 = 24;
/// From 0000-03-01 to 1970-01-01.
const DAYS_TO_EPOCH: u64 = 719_468;
const DAYS_PER_ERA: u64 = 146_097;
/// Beyond this, what was typed is a mistake.
const MAX_YEAR: u64 = 9999;

/// An hour, counted from the beginning of 1970 in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hour(pub u64);

impl Hour {
    /// After everything that can be counted.
    pub const MAX: Self = Self(u64::MAX / SECONDS_PER_HOUR);

    /// The hour that a time belongs to; times before 1970, which no clock should show, to the first.
    pub fn of(time: SystemTime) -> Self {
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self(since_epoch.as_secs() / SECONDS_PER_HOUR)
    }

    /// Reads a date, `2026-11-21`, a date with an hour, `2026-11-21T05`, or how long before `now`,
    /// such as `7d` or `12h`.
    ///
    /// # Errors
    /// If it is none of these.
    pub fn parse(text: &str, now: Self) -> Result<Self, String> {
        parse_ago(text, now).or_else(|| parse_date(text)).ok_or_else(|| {
            format!("`{text}` is no time: expected a date such as 2026-11-21, a date with an hour such as 2026-11-21T05, or how long ago, such as 7d or 12h")
        })
    }

    /// The first hour of its day.
    #[must_use]
    pub fn day(self) -> Self {
        Self(self.0 - self.0 % HOURS_PER_DAY)
    }

    /// The first hour of its month.
    #[must_use]
    pub fn month(self) -> Self {
        let (.., day) = self.date();
        Self(self.day().0 - (day - 1) * HOURS_PER_DAY)
    }

    /// Seconds from the beginning of 1970 to the beginning of the hour.
    pub fn unix_seconds(self) -> u64 {
        self.0 * SECONDS_PER_HOUR
    }

    /// Year, month and day, the latter two counted from one.
    fn date(self) -> (u64, u64, u64) {
        let days = self.0 / HOURS_PER_DAY + DAYS_TO_EPOCH;
        let (era, day_of_era) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
        let leap_days = day_of_era / 1460 + day_of_era / 146_096;
        let year_of_era = (day_of_era + day_of_era / 36_524 - leap_days) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        (era * 400 + year_of_era + u64::from(month <= 2), month, day)
    }

    fn from_date(year: u64, month: u64, day: u64) -> Option<Self> {
        if !(1970..=MAX_YEAR).contains(&year) || !(1..=12).contains(&month) || day < 1 {
            return None;
        }
        let march_year = year - u64::from(month <= 2);
        let (era, year_of_era) = (march_year / 400, march_year % 400);
        let march_month = (month + 9) % 12;
        let day_of_year = (153 * march_month + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let hour = Self((era * DAYS_PER_ERA + day_of_era - DAYS_TO_EPOCH) * HOURS_PER_DAY);
        // A day that its month does not have comes back as another date.
        (hour.date() == (year, month, day)).then_some(hour)
    }
}

/// As `2026-11-21T05:00Z`.
impl fmt::Display for Hour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}T{:02}:00Z", Period::Day.name(*self), self.0 % HOURS_PER_DAY)
    }
}

/// How long the lines of a report are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    /// An hour.
    Hour,
    /// A day in UTC.
    Day,
    /// A month in UTC.
    Month,
}

impl Period {
    /// The first hour of the period that an hour belongs to.
    pub fn start(self, hour: Hour) -> Hour {
        match self {
            Self::Hour => hour,
            Self::Day => hour.day(),
            Self::Month => hour.month(),
        }
    }

    /// The period that an hour belongs to, in ISO 8601.
    pub fn name(self, hour: Hour) -> String {
        let (year, month, day) = hour.date();
        match self {
            Self::Hour => hour.to_string(),
            Self::Day => format!("{year:04}-{month:02}-{day:02}"),
            Self::Month => format!("{year:04}-{month:02}"),
        }
    }
}

/// So long before `now`.
fn parse_ago(text: &str, now: Hour) -> Option<Hour> {
    let (number, hours) = match text.strip_suffix('d') {
        Some(days) => (days, HOURS_PER_DAY),
        None => (text.strip_suffix('h')?, 1),
    };
    let hours = digits(number)?.checked_mul(hours)?;
    Some(Hour(now.0.saturating_sub(hours)))
}

fn parse_date(text: &str) -> Option<Hour> {
    let (date, hour) = text.split_once('T').unwrap_or((text, "00"));
    let mut parts = date.split('-').map(digits);
    let date = Hour::from_date(parts.next()??, parts.next()??, parts.next()??)?;
    let hour = hour.strip_suffix('Z').unwrap_or(hour);
    let hour = digits(hour.strip_suffix(":00").unwrap_or(hour))?;
    (parts.next().is_none() && hour < HOURS_PER_DAY).then_some(Hour(date.0 + hour))
}

/// Nothing but digits; `u64`'s own parser takes a plus sign.
fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hour(text: &str) -> Hour {
        Hour::parse(text, Hour(0)).unwrap()
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (text, seconds) in [
            ("1970-01-01", 0),
            ("1970-01-01T23", 82_800),
            ("2000-02-29", 951_782_400),
            ("2024-03-01", 1_709_251_200),
            ("2026-11-21T05:00Z", 1_795_237_200),
            ("2100-03-01", 4_107_542_400),
        ] {
            assert_eq!(hour(text).unix_seconds(), seconds, "{text}");
        }
    }

    /// Method: every day of 430 years, one after the other, against lengths of months.
    #[test]
    fn every_day_follows_the_day_before() {
        let mut expected = (1970, 1, 1);
        for day in 0..157_000 {
            let found = Hour(day * HOURS_PER_DAY + day % HOURS_PER_DAY);
            assert_eq!(found.date(), expected);
            let (year, month, day) = expected;
            assert_eq!(Hour::from_date(year, month, day), Some(found.day()));
            assert_eq!(Some(found.month()), Hour::from_date(year, month, 1));
            let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let num_days = match month {
                2 => 28 + u64::from(is_leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            expected = match (month, day) {
                (12, 31) => (year + 1, 1, 1),
                _ if day == num_days => (year, month + 1, 1),
                _ => (year, month, day + 1),
            };
        }
    }

    #[test]
    fn times_ago_are_counted_from_now() {
        let now = hour("2026-11-21T05");
        assert_eq!(Hour::parse("7d", now), Ok(hour("2026-11-14T05")));
        assert_eq!(Hour::parse("6h", now), Ok(hour("2026-11-20T23")));
        assert_eq!(Hour::parse("99999999d", now), Ok(Hour(0)));
        let bad = [
            "",
            "7",
            "d",
            "-7d",
            "+7d",
            "7w",
            "2026",
            "2026-13-01",
            "2026-02-29",
            "2026-11-31",
            "2026-11-00",
            "1969-12-31",
            "2026-11-21T24",
            "2026-11-21T05:30",
            "2026-11-21-1",
            "2026-11-+1",
            "18446744073709551615d",
            "99999-01-01",
        ];
        for text in bad {
            let message = Hour::parse(text, now).expect_err(text);
            assert!(message.contains("such as 2026-11-21"), "{message}");
        }
    }

    /// Goal: a clock that jumps, back behind its own epoch too, moves counts to other hours and
    /// breaks nothing.
    #[test]
    fn hours_come_from_any_time() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(Hour::of(at(3599)), Hour(0));
        assert_eq!(Hour::of(at(3600)), Hour(1));
        assert_eq!(Hour::of(UNIX_EPOCH - Duration::from_secs(1)), Hour(0));
        assert_eq!(Hour::of(at(1_795_239_000)).to_string(), "2026-11-21T05:00Z");
        assert_eq!(Period::Month.name(Hour::of(at(1_795_239_000))), "2026-11");
    }
}
