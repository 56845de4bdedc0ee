//! Goal: the dashboard and the alert rules ask for nothing that the server does not say.
//!
//! Method: read every expression far enough to know which series it names with which labels, and
//! look them up in `/metrics` of a server that has answered, refused and failed something.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[allow(dead_code, reason = "the other tests use the rest")]
#[path = "support/api_fake.rs"]
mod api_fake;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use qwen_server::telemetry::metrics;
use serde_json::{Value, json};

use crate::api_fake::{FakeServer, MODEL, chat, with};

/// What Prometheus adds by itself.
const LABELS_OF_SCRAPES: [&str; 2] = ["instance", "job"];
const SERIES_OF_SCRAPES: [&str; 1] = ["up"];
/// What may stand before a bracket or begin a list of labels.
const FUNCTIONS: [&str; 14] = [
    "sum",
    "min",
    "max",
    "rate",
    "increase",
    "changes",
    "deriv",
    "topk",
    "histogram_quantile",
    "min_over_time",
    "label_values",
    "by",
    "and",
    "or",
];

/// The labels of every series.
type Series = BTreeMap<String, BTreeSet<String>>;

/// A series that an expression names, with the labels it must have.
#[derive(Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Selector {
    name: String,
    labels: BTreeSet<String>,
}

/// The series of an expression, and the labels that it sorts by; or what is wrong with it.
fn read(expression: &str) -> Result<(BTreeSet<Selector>, BTreeSet<String>), String> {
    let (mut selectors, mut grouped) = (BTreeSet::new(), BTreeSet::new());
    let mut open = Vec::new();
    let mut rest = expression;
    let mut is_grouping = false;
    while let Some(first) = rest.chars().next() {
        if first.is_ascii_alphabetic() || first == '_' {
            let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
            let (word, after) = split_where(rest, |c| !is_name(c));
            rest = after;
            if open.last() == Some(&'[') {
                continue;
            }
            if FUNCTIONS.contains(&word) {
                is_grouping = word == "by";
            } else if open.last() == Some(&'g') {
                grouped.insert(word.to_owned());
            } else {
                let mut selector = Selector { name: word.to_owned(), ..Selector::default() };
                if let Some(inside) = rest.strip_prefix('{') {
                    let (labels, after) = inside.split_once('}').ok_or("`{` is never closed")?;
                    selector.labels = matched_labels(labels)?;
                    rest = after;
                }
                selectors.insert(selector);
            }
            continue;
        }
        let mut chars = rest.chars();
        match chars.next() {
            Some('(') => open.push(if std::mem::take(&mut is_grouping) { 'g' } else { '(' }),
            Some('[') => open.push('['),
            Some(')') if matches!(open.pop(), Some('(' | 'g')) => {}
            Some(']') if open.pop() == Some('[') => {}
            Some(close @ (')' | ']')) => return Err(format!("`{close}` closes nothing")),
            Some(c) if " \n,.+-*/<>=$0123456789".contains(c) => {
                if c == '$' {
                    // A variable of the dashboard, as a duration.
                    let (_, after) =
                        split_where(chars.as_str(), |c| !c.is_ascii_alphanumeric() && c != '_');
                    chars = after.chars();
                }
            }
            other => return Err(format!("what is {other:?}?")),
        }
        rest = chars.as_str();
    }
    if open.is_empty() { Ok((selectors, grouped)) } else { Err(format!("{open:?} stay open")) }
}

fn split_where(text: &str, is_end: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(is_end).unwrap_or(text.len()))
}

fn matched_labels(labels: &str) -> Result<BTreeSet<String>, String> {
    let matched = labels.split("\", ").map(|matcher| {
        let (label, value) = split_where(matcher, |c| !c.is_ascii_alphanumeric() && c != '_');
        let operators = ["=~\"", "!~\"", "!=\"", "=\""];
        let is_matcher = operators.iter().any(|operator| value.starts_with(operator));
        if is_matcher { Ok(label.to_owned()) } else { Err(format!("`{matcher}` matches nothing")) }
    });
    matched.collect()
}

/// What is wrong with an expression, given what there is.
fn complaints(expression: &str, series: &Series) -> Vec<String> {
    let (selectors, grouped) = match read(expression) {
        Ok(read) => read,
        Err(flaw) => return vec![format!("{flaw} in {expression}")],
    };
    let mut complaints = Vec::new();
    let mut known: BTreeSet<&str> = LABELS_OF_SCRAPES.into();
    for selector in &selectors {
        let name = selector.name.as_str();
        if SERIES_OF_SCRAPES.contains(&name) {
            continue;
        }
        let Some(labels) = series.get(name) else {
            complaints.push(format!("there is no {name}, in {expression}"));
            continue;
        };
        let has = |label: &str| labels.contains(label) || LABELS_OF_SCRAPES.contains(&label);
        known.extend(labels.iter().map(String::as_str));
        for label in selector.labels.iter().filter(|label| !has(label)) {
            complaints.push(format!("{name} has no label {label}, in {expression}"));
        }
    }
    for label in grouped.iter().filter(|label| !known.contains(label.as_str())) {
        complaints.push(format!("nothing has the label {label}, in {expression}"));
    }
    complaints
}

fn read_file(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// Every expression of the dashboard, and the legends beside them.
fn dashboard() -> Vec<(String, String)> {
    let dashboard: Value =
        serde_json::from_str(&read_file("deploy/grafana/qwen-server.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    targets.map(|target| (text(&target["expr"]), text(&target["legendFormat"]))).collect()
}

/// Every expression of the alert rules. The file keeps to a form that needs no reader of YAML:
/// `expr:` on one line, or folded into deeper lines behind `>-`.
fn alerts() -> Vec<String> {
    let text = read_file("deploy/prometheus/alerts.yml");
    let mut expressions: Vec<String> = Vec::new();
    let mut is_folded = false;
    for line in text.lines() {
        if let Some(expression) = line.strip_prefix("        expr: ") {
            is_folded = expression == ">-";
            expressions.push(if is_folded { String::new() } else { expression.to_owned() });
        } else if is_folded && line.starts_with("          ") {
            let expression = expressions.last_mut().unwrap();
            expression.push(' ');
            expression.push_str(line.trim());
        } else {
            is_folded = false;
        }
    }
    assert_eq!(expressions.len(), text.matches("expr:").count());
    assert_eq!(expressions.len(), text.matches("- alert: ").count());
    expressions
}

fn series(text: &str) -> Series {
    let mut series = Series::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (name, rest) = split_where(line, |c| c == '{' || c == ' ');
        let labels = rest.strip_prefix('{').map_or("", |rest| rest.rsplit_once('}').unwrap().0);
        let names = labels.split("\",").filter_map(|label| label.split_once('='));
        let names = names.map(|(name, _)| name.to_owned());
        series.entry(name.to_owned()).or_default().extend(names);
    }
    series
}

async fn series_of_a_busy_server() -> Series {
    metrics::install("test");
    let server = FakeServer::start();
    server.post("/v1/chat/completions", chat("hello")).await.ok();
    let formatted = with(chat("{}"), json!({"response_format": {"type": "json_object"}}));
    server.post("/v1/chat/completions", formatted).await.ok();
    server.post("/v1/chat/completions", json!({"model": MODEL})).await.error(400);
    server.wait_until_idle().await;
    series(&server.get("/metrics").await.text)
}

#[tokio::test]
async fn every_expression_finds_what_it_asks_for() {
    let series = series_of_a_busy_server().await;
    let (dashboard, alerts) = (dashboard(), alerts());
    assert!(30 < dashboard.len() && 10 < alerts.len());
    let expressions = dashboard.iter().map(|(expression, _)| expression).chain(&alerts);
    let wrong: Vec<String> =
        expressions.flat_map(|expression| complaints(expression, &series)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    // A legend names labels that the expression keeps.
    for (expression, legend) in &dashboard {
        let (_, grouped) = read(expression).unwrap();
        let named = legend.split("{{").skip(1).map(|rest| rest.split_once("}}").unwrap().0);
        for label in named {
            assert!(grouped.contains(label), "{label} of {legend} is gone in {expression}");
        }
    }
}

/// Goal: the test above can fail.
#[test]
fn what_is_wrong_would_be_noticed() {
    let series = series("a_total{model_name=\"m\",code=\"x,y\"} 1\nb_bucket{le=\"+Inf\"} 0\nc 1\n");
    let sound = [
        "a_total",
        "rate(a_total{code=\"x\", instance=~\"$i\"}[5m]) > 0.5",
        "histogram_quantile(0.99, sum by (le) (rate(b_bucket[$__rate_interval])))",
        "up{job=\"x\"} == 0 and c / a_total",
    ];
    for expression in sound {
        assert_eq!(complaints(expression, &series), [""; 0], "{expression}");
    }
    let unsound = [
        ("no_such_total", "there is no no_such_total"),
        ("a_total{kind=\"x\"}", "has no label kind"),
        ("sum by (kind) (a_total)", "nothing has the label kind"),
        ("sum(a_total", "stay open"),
        ("a_total)", "closes nothing"),
        ("a_total{code}", "matches nothing"),
        ("rate(a_total[5m)", "closes nothing"),
        ("a_total{code=\"x\"", "never closed"),
        ("a_total; c", "what is"),
    ];
    for (expression, complaint) in unsound {
        let all = complaints(expression, &series).join("\n");
        assert!(all.contains(complaint), "{expression}: {all}");
    }
}
