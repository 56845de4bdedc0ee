//! A moment, as the key file writes it.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use toml::value::{Datetime, Offset, Time};

const SECONDS_PER_DAY: i64 = 24 * 60 * 60;

/// A second of Universal Time, counted from 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "Datetime")]
pub struct Timestamp(pub u64);

impl TryFrom<Datetime> for Timestamp {
    type Error = String;

    /// A time without a zone is Universal Time, a day without a time its beginning.
    fn try_from(datetime: Datetime) -> Result<Self, String> {
        let date = datetime.date.ok_or("a time needs a date before it")?;
        let days = days_since_epoch(date.year.into(), date.month.into(), date.day.into());
        let time = datetime.time.map_or(0, |Time { hour, minute, second, .. }| {
            i64::from(hour) * 3600 + i64::from(minute) * 60 + i64::from(second.unwrap_or(0))
        });
        let offset = match datetime.offset {
            Some(Offset::Custom { minutes }) => i64::from(minutes) * 60,
            Some(Offset::Z) | None => 0,
        };
        let seconds = days * SECONDS_PER_DAY + time - offset;
        u64::try_from(seconds).map(Self).map_err(|_| "a time before 1970".to_owned())
    }
}

impl FromStr for Timestamp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let datetime: Datetime =
            text.parse().map_err(|_| "expected a date such as 2027-01-31".to_owned())?;
        datetime.try_into()
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0 as i64;
        let (year, month, day) = date(seconds.div_euclid(SECONDS_PER_DAY));
        let second = seconds.rem_euclid(SECONDS_PER_DAY);
        let (hour, minute) = (second / 3600, second / 60 % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
    }
}

/// Days from 1970-01-01 to a day of the Gregorian calendar. Years are counted from March, so that
/// the leap day is the last of one; 400 of them are 146,097 days.
fn days_since_epoch(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = (month + 9) % 12;
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// Year, month and day. The inverse of [`days_since_epoch`].
fn date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_and_written() {
        for (text, seconds, again) in [
            ("1970-01-01", 0, "1970-01-01T00:00:00Z"),
            ("2000-02-29T12:00:01Z", 951_825_601, "2000-02-29T12:00:01Z"),
            ("2024-03-01", 1_709_251_200, "2024-03-01T00:00:00Z"),
            ("2026-11-21T16:00:00+02:00", 1_795_269_600, "2026-11-21T14:00:00Z"),
            ("2100-12-31 23:59:59", 4_133_980_799, "2100-12-31T23:59:59Z"),
        ] {
            let moment: Timestamp = text.parse().unwrap();
            assert_eq!((moment, moment.to_string().as_str()), (Timestamp(seconds), again));
        }
        for text in ["", "90d", "2024-02-30", "2023-02-29", "12:00:00", "1969-12-31"] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }

    #[test]
    fn every_day_is_the_one_after_the_day_before() {
        let mut before = date(-1);
        for days in 0..200_000 {
            let (year, month, day) = date(days);
            assert_eq!(days_since_epoch(year, month, day), days);
            let is_next = match before {
                (y, m, d) if m == month => (year, day) == (y, d + 1),
                (y, 12, 31) => (year, month, day) == (y + 1, 1, 1),
                (y, m, d) => 28 <= d && (year, month, day) == (y, m + 1, 1),
            };
            assert!(is_next, "{before:?} and {:?}", (year, month, day));
            before = (year, month, day);
        }
    }
}
