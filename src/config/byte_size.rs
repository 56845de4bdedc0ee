//! Amounts of memory as people write them.

use std::fmt;
use std::str::FromStr;

/// A number of bytes: `24MiB`, `4GiB`, `512MB`, `1.5GiB` or plain `1048576`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(u64);

/// The largest size that can be written; beyond any machine, and far from overflow.
const MAX: u64 = 1 << 50;

const UNITS: [(&str, u64); 10] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
    ("", 1),
];

impl ByteSize {
    /// A number of kibibytes.
    pub const fn kib(num: u64) -> Self {
        Self(num << 10)
    }

    /// A number of mebibytes.
    pub const fn mib(num: u64) -> Self {
        Self(num << 20)
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

/// The text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a size such as 24MiB, 4GiB, 512MB or a number of bytes, at most 1024TiB")]
pub struct ByteSizeError;

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, ByteSizeError> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim_start();
        let (_, factor) = UNITS
            .into_iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(unit))
            .ok_or(ByteSizeError)?;
        let bytes = match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(factor).ok_or(ByteSizeError)?,
            // Fractions of a byte mean nothing.
            Err(_) if factor == 1 => return Err(ByteSizeError),
            Err(_) => (number.parse::<f64>().map_err(|_| ByteSizeError)? * factor as f64) as u64,
        };
        if MAX < bytes {
            return Err(ByteSizeError);
        }
        Ok(Self(bytes))
    }
}

/// In the largest binary unit that leaves no remainder if that is short, else rounded to a tenth.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary = || UNITS.into_iter().take(4);
        let Some((name, factor)) = binary().find(|(_, factor)| *factor <= self.0) else {
            return write!(f, "{} B", self.0);
        };
        if self.0.is_multiple_of(factor) {
            return write!(f, "{} {name}", self.0 / factor);
        }
        write!(f, "{:.1} {name}", self.0 as f64 / factor as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_form() {
        let cases = [
            ("24MiB", 24 << 20),
            ("4GiB", 4 << 30),
            ("512MB", 512_000_000),
            ("1.5GiB", 3 << 29),
            ("1048576", 1 << 20),
            ("0", 0),
            ("7 kib", 7 << 10),
            (" 3gb ", 3_000_000_000),
            ("12B", 12),
            ("1TiB", 1 << 40),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest() {
        let bad = [
            "",
            "MiB",
            "-1",
            "1.5",
            "1.5B",
            "4G",
            "4 4MiB",
            "1e3",
            "nan",
            "inf",
            ".",
            "1..2MiB",
            "99999999999999999999",
            "99999999TiB",
            "2000TiB",
            "٣MiB",
            "4GiBx",
        ];
        for text in bad {
            assert_eq!(text.parse::<ByteSize>(), Err(ByteSizeError), "{text}");
        }
    }

    #[test]
    fn prints_in_readable_units() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (24 << 20, "24 MiB"),
            (3 << 29, "1.5 GiB"),
            (491_400_064, "468.6 MiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }
}
