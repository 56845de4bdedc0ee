//! What was used, summed up as somebody asks: by key, model and time, with what it cost.

mod format;

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

pub use format::Format;

use super::calendar::Period;
use super::money::{Cost, PriceList};
use super::{Counts, Hour, LedgerError, Store};

/// How far back a report goes that is not told.
const DEFAULT_SINCE: &str = "30d";
const DEFAULT_BY: &str = "key,model";

/// What the lines of a report tell apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grouping {
    period: Option<Period>,
    key: bool,
    model: bool,
}

impl FromStr for Grouping {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut grouping = Self::default();
        for word in text.split(',').map(str::trim) {
            let period = match word {
                "key" => {
                    grouping.key = true;
                    continue;
                }
                "model" => {
                    grouping.model = true;
                    continue;
                }
                "hour" => Period::Hour,
                "day" => Period::Day,
                "month" => Period::Month,
                _ => {
                    return Err(format!("`{word}` is none of key, model, hour, day and month"));
                }
            };
            if grouping.period.replace(period).is_some_and(|other| other != period) {
                return Err("only one of hour, day and month is possible".to_owned());
            }
        }
        Ok(grouping)
    }
}

/// What a report is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    since: Hour,
    /// The first hour that does not belong.
    until: Option<Hour>,
    grouping: Grouping,
}

/// The same as it is typed; what is missing has a default.
#[derive(Clone, Debug, Default, serde::Deserialize)]
pub struct QueryText {
    /// The first hour: a date, or how long ago; 30 days if absent.
    pub since: Option<String>,
    /// The hour after the last; everything if absent.
    pub until: Option<String>,
    /// What lines tell apart; key and model if absent.
    pub by: Option<String>,
}

impl QueryText {
    /// What it means at a time.
    ///
    /// # Errors
    /// Names the field that means nothing, and says why.
    pub fn parse(&self, now: SystemTime) -> Result<Query, (&'static str, String)> {
        let now = Hour::of(now);
        let hour = |text: &str| Hour::parse(text, now);
        let since = hour(self.since.as_deref().unwrap_or(DEFAULT_SINCE));
        let since = since.map_err(|message| ("since", message))?;
        let until = self.until.as_deref().map(hour).transpose();
        let until = until.map_err(|message| ("until", message))?;
        let grouping = self.by.as_deref().unwrap_or(DEFAULT_BY).parse();
        let grouping = grouping.map_err(|message| ("by", message))?;
        if until.is_some_and(|until| until <= since) {
            return Err(("until", "is not after `since`".to_owned()));
        }
        Ok(Query { since, until, grouping })
    }
}

/// What tells a line of a report from others, in the order in which lines are sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct LineKey {
    period: Option<Hour>,
    key: Option<Arc<str>>,
    model: Option<Arc<str>>,
}

/// A sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    counts: Counts,
    cost: Cost,
}

/// A finished report.
#[derive(Clone, Debug)]
pub struct Report {
    query: Query,
    lines: BTreeMap<LineKey, Sum>,
    total: Sum,
    /// The currency, if anything has a price.
    currency: Option<String>,
    /// Models that were used and have no price, though others do.
    unpriced: BTreeSet<Arc<str>>,
}

impl Report {
    /// Sums up what the ledger says.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(store: &Store, query: Query, prices: &PriceList) -> Result<Self, LedgerError> {
        let Grouping { period: by_period, key: by_key, model: by_model } = query.grouping;
        let has_prices = !prices.prices.is_empty();
        let mut report = Self {
            query,
            lines: BTreeMap::new(),
            total: Sum::default(),
            currency: has_prices.then(|| prices.currency.clone()),
            unpriced: BTreeSet::new(),
        };
        // Without an end even the future counts: clocks are set back.
        store.read(query.since..query.until.unwrap_or(Hour::MAX), |account, counts| {
            let cost = prices.cost(&account.model, &counts);
            if has_prices && cost.is_none() {
                report.unpriced.insert(Arc::clone(&account.model));
            }
            let key = LineKey {
                period: by_period.map(|period| period.start(account.hour)),
                key: by_key.then_some(account.key),
                model: by_model.then_some(account.model),
            };
            for sum in [report.lines.entry(key).or_default(), &mut report.total] {
                sum.counts += counts;
                sum.cost += cost.unwrap_or_default();
            }
        })?;
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Account, Ledger};

    /// Two keys and two models on three days of two months.
    fn ledger(path: &std::path::Path) {
        let ledger = Ledger::open(path).unwrap();
        for (hour, key, model, prompt_tokens) in [
            ("2026-10-31T23", "alice", "small", 1_000_000),
            ("2026-11-01T00", "alice", "small", 200),
            ("2026-11-01T07", "alice", "large", 30),
            ("2026-11-01T07", "bob, \"jr\"", "small", 4),
            ("2026-11-02T07", "alice", "small", 5),
        ] {
            let hour = Hour::parse(hour, Hour(0)).unwrap();
            let counts = Counts { requests: 1, prompt_tokens, ..Counts::default() };
            let account = Account { hour, key: key.into(), model: model.into() };
            ledger.writer.add(account, counts);
        }
        ledger.close();
    }

    fn report(by: &str, (since, until): (&str, &str), prices: &[&str]) -> Report {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.db");
        ledger(&path);
        let text = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        let query = QueryText { since: text(since), until: text(until), by: text(by) };
        let now = std::time::UNIX_EPOCH
            + std::time::Duration::from_secs(
                Hour::parse("2026-11-03", Hour(0)).unwrap().unix_seconds(),
            );
        let prices = PriceList {
            currency: "EUR".to_owned(),
            prices: prices.iter().map(|price| price.parse().unwrap()).collect(),
        };
        let store = Store::open_existing(&path).unwrap();
        Report::read(&store, query.parse(now).unwrap(), &prices).unwrap()
    }

    fn csv(by: &str, range: (&str, &str)) -> Vec<String> {
        let text = report(by, range, &[]).render(Format::Csv);
        // Only what is told apart, requests and tokens.
        let fields = |line: &str| line.trim_end_matches(",0,0").to_owned();
        text.lines().skip(1).map(fields).collect()
    }

    #[test]
    fn lines_are_what_is_asked_for() {
        let all = ("2026-01-01", "");
        assert_eq!(
            csv("key,model", all),
            ["alice,large,1,0,30", "alice,small,3,0,1000205", "\"bob, \"\"jr\"\"\",small,1,0,4"]
        );
        assert_eq!(csv("month", all), ["2026-10,1,0,1000000", "2026-11,4,0,239"]);
        assert_eq!(csv("day,key", all).len(), 4);
        assert_eq!(csv("hour", all)[2], "2026-11-01T07:00Z,2,0,34");
        // `until` is the first hour that does not belong.
        assert_eq!(csv("key", ("2026-11-01", "2026-11-01T07")), ["alice,1,0,200"]);
        assert_eq!(csv("key", ("40h", "")), ["alice,1,0,5"]);
        assert_eq!(csv("", ("", "")).len(), 3);
    }

    #[test]
    fn costs_are_applied_when_somebody_asks() {
        let report = report("key", ("2026-01-01", ""), &["small=0.15,0.6"]);
        let json: serde_json::Value = serde_json::from_str(&report.render(Format::Json)).unwrap();
        assert_eq!(json["currency"], "EUR");
        assert_eq!(json["lines"][0]["key"], "alice");
        assert_eq!(json["lines"][0]["cost"], "0.150031");
        assert_eq!(json["lines"][1]["cost"], "0.000001");
        assert_eq!(json["total"]["cost"], "0.150031");
        assert_eq!(json["total"]["requests"], 5);
        assert_eq!(json["unpriced_models"], serde_json::json!(["large"]));
        assert_eq!(json["since"], "2026-01-01T00:00Z");
        assert_eq!(json["until"], serde_json::Value::Null);
    }

    #[test]
    fn a_table_is_for_people() {
        let table = report("key", ("2026-01-01", ""), &["small=0.15,0.6"]).render(Format::Table);
        let expected = "\
key        requests  errors  prompt_tokens  cached_tokens  completion_tokens  cost (EUR)
alice             4       0        1000235              0                  0    0.150031
bob, \"jr\"         1       0              4              0                  0    0.000001
total             5       0        1000239              0                  0    0.150031
no price: large
";
        assert_eq!(table, expected);
        let nothing = report("key", ("2026-12-01", ""), &[]).render(Format::Table);
        assert_eq!(nothing.lines().count(), 2, "{nothing}");
        assert!(!nothing.contains("cost"), "{nothing}");
    }

    #[test]
    fn what_means_nothing_is_named() {
        let now = SystemTime::UNIX_EPOCH;
        for (since, until, by, name) in [
            ("yesterday", "2026-01-01", "key", "since"),
            ("2026-01-01", "soon", "key", "until"),
            ("2026-01-02", "2026-01-02", "key", "until"),
            ("2026-01-01", "2026-01-02", "colour", "by"),
            ("2026-01-01", "2026-01-02", "day,hour", "by"),
            ("2026-01-01", "2026-01-02", "", "by"),
        ] {
            let text = |text: &str| Some(text.to_owned());
            let query = QueryText { since: text(since), until: text(until), by: text(by) };
            assert_eq!(query.parse(now).unwrap_err().0, name);
        }
        assert!("day,day,key".parse::<Grouping>().is_ok());
    }
}
