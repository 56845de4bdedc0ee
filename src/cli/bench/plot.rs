//! A measurement as a picture: three panels over the number of clients.

use std::fmt::Write;

use crate::cli::bench::report::{LevelReport, Percentiles, Report};

const PANEL_WIDTH: f64 = 340.0;
const PANEL_HEIGHT: f64 = 300.0;
const MARGIN_LEFT: f64 = 62.0;
const MARGIN_RIGHT: f64 = 14.0;
const MARGIN_TOP: f64 = 74.0;
const MARGIN_BOTTOM: f64 = 50.0;
const MAX_TICKS: f64 = 5.0;

/// Told apart by people who do not see red and green.
const COLOURS: [&str; 3] = ["#0072b2", "#e69f00", "#d55e00"];

struct Panel {
    title: &'static str,
    series: Vec<Series>,
}

struct Series {
    name: &'static str,
    values: Vec<f64>,
}

/// The report as an SVG document.
pub(crate) fn draw(report: &Report) -> String {
    let panels = panels(&report.levels);
    let clients: Vec<u64> = report.levels.iter().map(|level| level.concurrency).collect();
    let width = PANEL_WIDTH * panels.len() as f64;
    let mut svg = String::new();
    line(
        &mut svg,
        format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {PANEL_HEIGHT}\" \
         width=\"{width}\" height=\"{PANEL_HEIGHT}\" font-family=\"sans-serif\" font-size=\"11\">"
        ),
    );
    line(&mut svg, format_args!("<rect width=\"100%\" height=\"100%\" fill=\"white\"/>"));
    let title = format!(
        "{}: prompts of {} tokens, answers of {} tokens",
        report.model, report.prompt_tokens, report.output_tokens
    );
    line(
        &mut svg,
        format_args!(
            "<text x=\"{}\" y=\"22\" font-size=\"14\" font-weight=\"bold\" \
             text-anchor=\"middle\">{}</text>",
            width / 2.0,
            escape(&title)
        ),
    );
    for (index, panel) in panels.iter().enumerate() {
        let x = PANEL_WIDTH * index as f64;
        line(&mut svg, format_args!("<g transform=\"translate({x} 0)\">"));
        draw_panel(&mut svg, panel, &clients);
        line(&mut svg, format_args!("</g>"));
    }
    line(&mut svg, format_args!("</svg>"));
    svg
}

fn panels(levels: &[LevelReport]) -> [Panel; 3] {
    let percentiles = |of: fn(&LevelReport) -> Percentiles| {
        let series = |name, pick: fn(Percentiles) -> f64| Series {
            name,
            values: levels.iter().map(|level| pick(of(level))).collect(),
        };
        vec![series("p50", |p| p.p50), series("p90", |p| p.p90), series("p99", |p| p.p99)]
    };
    let throughput = levels.iter().map(|level| level.output_tokens_per_second).collect();
    [
        Panel {
            title: "Output tokens per second",
            series: vec![Series { name: "all clients", values: throughput }],
        },
        Panel { title: "Time to first token, ms", series: percentiles(|level| level.ttft_ms) },
        Panel {
            title: "Time between tokens, ms",
            series: percentiles(|level| level.inter_token_ms),
        },
    ]
}

fn draw_panel(svg: &mut String, panel: &Panel, clients: &[u64]) {
    let values = panel.series.iter().flat_map(|series| &series.values);
    let max = values.copied().fold(0.0, f64::max);
    let step = tick_step(max);
    let num_ticks = (max / step).ceil().max(1.0);
    let top = step * num_ticks;
    let (right, bottom) = (PANEL_WIDTH - MARGIN_RIGHT, PANEL_HEIGHT - MARGIN_BOTTOM);
    let y_at = |value: f64| bottom - (bottom - MARGIN_TOP) * value / top;
    // Levels stand side by side at equal distance: they are usually powers of two.
    let slot = (right - MARGIN_LEFT) / clients.len().max(1) as f64;
    let x_at = |index: usize| MARGIN_LEFT + slot * (index as f64 + 0.5);

    let centre = f64::midpoint(MARGIN_LEFT, right);
    text(svg, (centre, 46.0), "middle", panel.title);
    text(svg, (centre, PANEL_HEIGHT - 14.0), "middle", "clients at once");
    for tick in 0..=num_ticks as usize {
        let value = step * tick as f64;
        let y = y_at(value);
        line(svg, format_args!("<path d=\"M{MARGIN_LEFT} {y:.1}H{right}\" stroke=\"#dddddd\"/>"));
        text(svg, (MARGIN_LEFT - 6.0, y + 4.0), "end", &label(value, step));
    }
    for (index, num) in clients.iter().enumerate() {
        text(svg, (x_at(index), bottom + 18.0), "middle", &num.to_string());
    }
    for (number, (series, colour)) in panel.series.iter().zip(COLOURS).enumerate() {
        let points: Vec<(f64, f64)> =
            series.values.iter().enumerate().map(|(i, &v)| (x_at(i), y_at(v))).collect();
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        line(
            svg,
            format_args!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                path.join(" ")
            ),
        );
        for (x, y) in points {
            line(
                svg,
                format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"),
            );
        }
        let x = MARGIN_LEFT + 8.0 + 60.0 * number as f64;
        line(
            svg,
            format_args!("<rect x=\"{x}\" y=\"56\" width=\"10\" height=\"10\" fill=\"{colour}\"/>"),
        );
        text(svg, (x + 14.0, 65.0), "start", series.name);
    }
}

/// The distance of grid lines, 1, 2 or 5 times a power of ten, so that all values fit.
fn tick_step(max: f64) -> f64 {
    let least = if 0.0 < max && max.is_finite() { max / MAX_TICKS } else { 1.0 };
    let power = 10f64.powf(least.log10().floor());
    let fits = |factor: &f64| least <= factor * power;
    [1.0, 2.0, 5.0].into_iter().find(fits).unwrap_or(10.0) * power
}

fn label(value: f64, step: f64) -> String {
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    format!("{value:.decimals$}")
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, text: &str) {
    let text = escape(text);
    line(
        svg,
        format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"),
    );
}

fn line(svg: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(svg, "{text}").expect("a string takes all text");
}

fn escape(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control()).collect();
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn report(levels: Vec<LevelReport>) -> Report {
        Report {
            model: "a<b>&\"c\"".to_owned(),
            url: "http://127.0.0.1:8000".to_owned(),
            prompt_tokens: 128,
            output_tokens: 64,
            runs: 1,
            levels,
        }
    }

    fn level(concurrency: u64, tokens_per_second: f64) -> LevelReport {
        let mut level = LevelReport::new(concurrency, &[], Duration::ZERO);
        level.output_tokens_per_second = tokens_per_second;
        level.ttft_ms = Percentiles { mean: 3.0, p50: 2.0, p90: 5.0, p99: 1234.5 };
        level
    }

    /// Tags close in order, attributes are quoted, no number is NaN or infinite.
    fn assert_well_formed(svg: &str) {
        let mut open = Vec::new();
        let mut rest = svg.trim();
        while let Some(start) = rest.find('<') {
            let text = &rest[..start];
            assert!(!text.contains('>'), "{text}");
            let end = start + rest[start..].find('>').expect("tags end");
            let tag = &rest[start + 1..end];
            rest = &rest[end + 1..];
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            assert!(!tag.contains("NaN") && !tag.contains("inf"), "{tag}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(tag.split(' ').next().unwrap());
            }
        }
        assert!(open.is_empty() && rest.is_empty(), "{open:?} {rest}");
        for entity in svg.split('&').skip(1) {
            assert!(["amp;", "lt;", "gt;", "quot;"].iter().any(|e| entity.starts_with(e)));
        }
    }

    #[test]
    fn documents_are_well_formed() {
        let many = [1, 2, 4, 8, 16, 1024].map(|n| level(n, 33.3 * n as f64));
        for levels in [Vec::new(), vec![level(1, 0.0)], many.to_vec()] {
            let svg = draw(&report(levels));
            assert_well_formed(&svg);
            assert!(svg.contains("a&lt;b&gt;&amp;&quot;c&quot;"));
            assert!(svg.contains("clients at once") && svg.contains("Time to first token, ms"));
        }
    }

    #[test]
    fn ticks_are_round_and_reach_the_maximum() {
        for (max, step) in [(0.0, 1.0), (5.0, 1.0), (5.1, 2.0), (99.0, 20.0), (100.1, 50.0)] {
            assert_eq!(tick_step(max), step, "{max}");
        }
        assert_eq!(label(0.4, 0.2), "0.4");
        assert_eq!(label(400.0, 200.0), "400");
    }
}
