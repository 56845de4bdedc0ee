//! A report as text: for people, for spreadsheets, for programs.

use std::str::FromStr;

use serde_json::{Map, Value, json};

use super::{LineKey, Report, Sum};
use crate::ledger::calendar::Period;

/// Blanks between columns of a table.
const GAP: usize = 2;

/// How a report looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Aligned columns with a line of totals.
    Table,
    /// As in RFC 4180, without totals.
    Csv,
    /// One object with lines and totals.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "table" => Ok(Self::Table),
            "csv" => Ok(Self::Csv),
            "json" => Ok(Self::Json),
            _ => Err(format!("`{text}` is none of table, csv and json")),
        }
    }
}

impl Report {
    /// The report as text that ends with a line break.
    pub fn render(&self, format: Format) -> String {
        match format {
            Format::Table => self.table(),
            Format::Csv => self.csv(),
            Format::Json => self.json(),
        }
    }

    /// The names of what lines tell apart, in order.
    fn names(&self) -> Vec<&'static str> {
        let grouping = self.query.grouping;
        let period = grouping.period.map(|period| match period {
            Period::Hour => "hour",
            Period::Day => "day",
            Period::Month => "month",
        });
        let key = grouping.key.then_some("key");
        let model = grouping.model.then_some("model");
        [period, key, model].into_iter().flatten().collect()
    }

    /// The values under these names.
    fn values(&self, line: &LineKey) -> Vec<String> {
        let period = self.query.grouping.period.zip(line.period);
        let period = period.map(|(period, start)| period.name(start));
        let names = [&line.key, &line.model].map(|name| name.as_deref().map(str::to_owned));
        [period].into_iter().chain(names).flatten().collect()
    }

    fn sums(&self, sum: &Sum) -> Vec<(&'static str, Value)> {
        let counts = &sum.counts;
        let mut sums = vec![
            ("requests", counts.requests.into()),
            ("errors", counts.errors.into()),
            ("prompt_tokens", counts.prompt_tokens.into()),
            ("cached_tokens", counts.cached_tokens.into()),
            ("completion_tokens", counts.completion_tokens.into()),
        ];
        if self.currency.is_some() {
            sums.push(("cost", sum.cost.to_string().into()));
        }
        sums
    }

    fn sum_texts(&self, sum: &Sum) -> impl Iterator<Item = String> + use<> {
        let text = |value| if let Value::String(text) = value { text } else { value.to_string() };
        self.sums(sum).into_iter().map(move |(_, value)| text(value))
    }

    fn heading(&self) -> Vec<String> {
        let sums = self.sums(&self.total).into_iter().map(|(name, _)| name);
        self.names().into_iter().chain(sums).map(str::to_owned).collect()
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let row = |(key, sum)| self.values(key).into_iter().chain(self.sum_texts(sum)).collect();
        self.lines.iter().map(row).collect()
    }

    fn table(&self) -> String {
        let num_names = self.names().len();
        let mut heading = self.heading();
        if let (Some(currency), Some(cost)) = (&self.currency, heading.last_mut()) {
            *cost = format!("cost ({currency})");
        }
        let mut total = vec![String::new(); num_names];
        if let Some(first) = total.first_mut() {
            "total".clone_into(first);
        }
        total.extend(self.sum_texts(&self.total));
        let rows: Vec<Vec<String>> =
            [heading].into_iter().chain(self.rows()).chain([total]).collect();
        let width = |column: usize| {
            rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
        let mut text = String::new();
        for row in &rows {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
                // Names to the left, numbers to the right.
                if column < num_names {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            });
            let line = cells.collect::<Vec<_>>().join(&" ".repeat(GAP));
            text += line.trim_end();
            text.push('\n');
        }
        if !self.unpriced.is_empty() {
            let models: Vec<&str> = self.unpriced.iter().map(AsRef::as_ref).collect();
            text += "no price: ";
            text += &models.join(", ");
            text.push('\n');
        }
        text
    }

    fn csv(&self) -> String {
        let mut heading = self.heading();
        if let Some(currency) = &self.currency {
            heading.push("currency".to_owned());
            let rows = self.rows().into_iter().map(|mut row| {
                row.push(currency.clone());
                row
            });
            return csv_lines([heading].into_iter().chain(rows));
        }
        csv_lines([heading].into_iter().chain(self.rows()))
    }

    fn json(&self) -> String {
        let object = |key: Option<&LineKey>, sum: &Sum| {
            let values = key.map(|key| self.values(key)).unwrap_or_default();
            let names = self.names().into_iter().zip(values.into_iter().map(Value::String));
            let fields = names.chain(self.sums(sum));
            Value::Object(
                fields.map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>(),
            )
        };
        let lines = self.lines.iter().map(|(key, sum)| object(Some(key), sum));
        let until = self.query.until.map(|hour| hour.to_string());
        let report = json!({
            "since": self.query.since.to_string(),
            "until": until,
            "by": self.names(),
            "currency": self.currency,
            "lines": lines.collect::<Vec<_>>(),
            "total": object(None, &self.total),
            "unpriced_models": self.unpriced.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
        });
        format!("{report:#}\n")
    }
}

fn csv_lines(rows: impl Iterator<Item = Vec<String>>) -> String {
    let field = |text: String| {
        if text.contains([',', '"', '\n', '\r']) {
            format!("\"{}\"", text.replace('"', "\"\""))
        } else {
            text
        }
    };
    rows.map(|row| row.into_iter().map(field).collect::<Vec<_>>().join(",") + "\r\n").collect()
}
