//! What usage costs. Exact: sums are integers, and only what is shown is rounded.

use std::fmt;
use std::ops::AddAssign;

use crate::config::{Micros, Price};
use crate::ledger::Counts;

/// Prices are per so many tokens.
const TOKENS_PER_PRICE: u128 = 1_000_000;
/// Digits behind the point that are shown.
const NUM_DECIMALS: usize = 6;
const MICROS_PER_UNIT: u128 = 1_000_000;

/// What every model costs, in one currency.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PriceList {
    /// The name of the currency, such as `EUR`.
    pub currency: String,
    /// The prices. The first that names a model counts, before `*`.
    pub prices: Vec<Price>,
}

impl PriceList {
    /// What counts of a model cost; `None` if it has no price.
    pub fn cost(&self, model: &str, counts: &Counts) -> Option<Cost> {
        let named = |name: &str| self.prices.iter().find(|price| price.model == name);
        let price = named(model).or_else(|| named("*"))?;
        let cached_tokens = counts.cached_tokens.min(counts.prompt_tokens);
        let parts = [
            (counts.prompt_tokens - cached_tokens, price.input),
            (cached_tokens, price.cached),
            (counts.completion_tokens, price.output),
        ];
        let product = |(tokens, price): (u64, Micros)| u128::from(tokens) * u128::from(price.0);
        Some(Cost(parts.into_iter().map(product).sum()))
    }
}

/// An amount of money, in millionths of the millionth of its currency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cost(u128);

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.0 = self.0.saturating_add(other.0);
    }
}

/// With six digits behind the point, half a unit of the last rounded up.
impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.saturating_add(TOKENS_PER_PRICE / 2) / TOKENS_PER_PRICE;
        write!(f, "{}.{:0NUM_DECIMALS$}", micros / MICROS_PER_UNIT, micros % MICROS_PER_UNIT)
    }
}

/// As text, because readers of JSON make floating-point numbers of numbers.
impl serde::Serialize for Cost {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(prices: &[&str]) -> PriceList {
        let prices = prices.iter().map(|price| price.parse().unwrap()).collect();
        PriceList { currency: "EUR".to_owned(), prices }
    }

    fn tokens(prompt_tokens: u64, cached_tokens: u64, completion_tokens: u64) -> Counts {
        Counts { prompt_tokens, cached_tokens, completion_tokens, ..Counts::default() }
    }

    #[test]
    fn each_kind_of_token_has_its_price() {
        let list = list(&["a=0.15,0.6,0.05", "*=1,2"]);
        let cost = |model: &str, counts| list.cost(model, &counts).unwrap().to_string();
        assert_eq!(cost("a", tokens(1_000_000, 0, 0)), "0.150000");
        assert_eq!(cost("a", tokens(1_000_000, 1_000_000, 0)), "0.050000");
        assert_eq!(cost("a", tokens(1_000_000, 400_000, 2_000_000)), "1.310000");
        // Without a price of their own, cached tokens cost what others do.
        assert_eq!(cost("b", tokens(3, 2, 1)), "0.000005");
        assert_eq!(cost("b", Counts::default()), "0.000000");
        assert!(super::tests::list(&["a=1,1"]).cost("b", &Counts::default()).is_none());
    }

    /// Goal: no cent is lost by adding up. Method: ten million times a tenth of a millionth, which
    /// floats miss and which rounding each time would make zero.
    #[test]
    fn sums_are_exact() {
        let list = list(&["a=0.1,0"]);
        let one = list.cost("a", &tokens(1, 0, 0)).unwrap();
        assert_eq!(one.to_string(), "0.000000");
        let mut sum = Cost::default();
        for _ in 0..10_000_000 {
            sum += one;
        }
        assert_eq!(sum.to_string(), "1.000000");
        let most = list.cost("a", &tokens(u64::MAX, 0, 0)).unwrap();
        assert_eq!(most.to_string(), "1844674407370.955162");
    }
}
