//! What tokens cost, as operators write it.

use std::fmt;
use std::str::FromStr;

/// Digits behind the point that an amount may have.
const NUM_DECIMALS: usize = 6;

/// An amount of money in millionths of its currency, so that sums are exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Micros(pub u64);

impl FromStr for Micros {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let complaint = || {
            format!(
                "`{text}` is no amount: expected one such as 0.15, with at most {NUM_DECIMALS} digits behind the point"
            )
        };
        let (whole, part) = text.trim().split_once('.').unwrap_or((text.trim(), "0"));
        let is_plain =
            |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        if !is_plain(whole) || !is_plain(part) || NUM_DECIMALS < part.len() {
            return Err(complaint());
        }
        let digits = format!("{whole}{part:0<NUM_DECIMALS$}");
        digits.parse().map(Self).map_err(|_| complaint())
    }
}

/// Without zeros that say nothing.
impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:0NUM_DECIMALS$}", self.0 / 1_000_000, self.0 % 1_000_000);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

/// What a million tokens of a model cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Price {
    /// The model's name, or `*` for every model that has no price of its own.
    pub model: String,
    /// Tokens of prompts.
    pub input: Micros,
    /// Generated tokens.
    pub output: Micros,
    /// Tokens of prompts that were cached.
    pub cached: Micros,
}

impl FromStr for Price {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected MODEL=IN,OUT or MODEL=IN,OUT,CACHED, such as `*=0.15,0.60`";
        let (model, amounts) = text.rsplit_once('=').ok_or(expected)?;
        let amounts: Vec<Micros> = amounts.split(',').map(str::parse).collect::<Result<_, _>>()?;
        let (input, output, cached) = match amounts[..] {
            [input, output] => (input, output, input),
            [input, output, cached] => (input, output, cached),
            _ => return Err(expected.to_owned()),
        };
        let model = model.trim().to_owned();
        if model.is_empty() {
            Err(expected.to_owned())
        } else {
            Ok(Self { model, input, output, cached })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_exact() {
        for (text, micros) in [
            ("0", 0),
            ("0.1", 100_000),
            ("0.000001", 1),
            ("12.5", 12_500_000),
            (" 3 ", 3_000_000),
            ("18446744073709.551615", u64::MAX),
        ] {
            let amount: Micros = text.parse().unwrap();
            assert_eq!(amount.0, micros);
            assert_eq!(amount.to_string(), text.trim());
        }
        for text in ["", ".", "1.", ".5", "-1", "+1", "1e3", "0.0000001", "18446744073709.551616"] {
            let message = text.parse::<Micros>().expect_err(text);
            assert!(message.contains("such as 0.15"), "{message}");
        }
    }

    #[test]
    fn a_price_has_two_or_three_amounts() {
        let price: Price = "a=b=0.15,0.6".parse().unwrap();
        assert_eq!((price.model.as_str(), price.cached), ("a=b", Micros(150_000)));
        let price: Price = "*=1,2,0.5".parse().unwrap();
        assert_eq!((price.output, price.cached), (Micros(2_000_000), Micros(500_000)));
        for text in ["", "x", "x=", "x=1", "=1,2", "x=1,2,3,4", "x=1,two"] {
            assert!(text.parse::<Price>().is_err(), "{text}");
        }
    }
}
