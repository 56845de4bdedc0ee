//! Shows downloads: a bar on a terminal, a line now and then elsewhere; and what else goes through
//! large files: a bar, or nothing.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::weights::hub::Progress;

/// How often a line is printed where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Progress of downloads on standard error.
pub enum DownloadProgress {
    /// A bar that is redrawn.
    Bar(ProgressBar),
    /// Lines for logs.
    Lines(Lines),
}

/// What lines are made of.
pub struct Lines {
    file_name: String,
    num_bytes: u64,
    num_bytes_done: u64,
    /// Bytes that were there at the start; they say nothing about speed.
    num_bytes_before: u64,
    started: Instant,
    printed: Instant,
}

impl DownloadProgress {
    /// Chooses by what standard error is.
    pub fn new() -> Self {
        if stderr().is_terminal() {
            Self::Bar(ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()))
        } else {
            let now = Instant::now();
            Self::Lines(Lines {
                file_name: String::new(),
                num_bytes: 0,
                num_bytes_done: 0,
                num_bytes_before: 0,
                started: now,
                printed: now,
            })
        }
    }
}

impl Default for DownloadProgress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for DownloadProgress {
    fn start(&mut self, file_name: &str, num_bytes: u64, num_bytes_done: u64) {
        match self {
            Self::Bar(bar) => {
                *bar = ProgressBar::with_draw_target(Some(num_bytes), ProgressDrawTarget::stderr());
                bar.set_style(bar_style());
                bar.set_message(file_name.to_owned());
                bar.set_position(num_bytes_done);
                bar.reset_eta();
            }
            Self::Lines(lines) => {
                let now = Instant::now();
                *lines = Lines {
                    file_name: file_name.to_owned(),
                    num_bytes,
                    num_bytes_done,
                    num_bytes_before: num_bytes_done,
                    started: now,
                    printed: now,
                };
                eprintln!("{}", lines.first_line());
            }
        }
    }

    fn advance(&mut self, num_bytes: u64) {
        match self {
            Self::Bar(bar) => bar.inc(num_bytes),
            Self::Lines(lines) => {
                lines.num_bytes_done += num_bytes;
                if LINE_INTERVAL <= lines.printed.elapsed() {
                    lines.printed = Instant::now();
                    eprintln!("{}", lines.line(lines.started.elapsed()));
                }
            }
        }
    }

    fn note(&mut self, text: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Self::Lines(_) => eprintln!("{text}"),
        }
    }

    fn finish(&mut self) {
        match self {
            Self::Bar(bar) => bar.finish(),
            Self::Lines(lines) => {
                let took = HumanDuration(lines.started.elapsed());
                eprintln!(
                    "{}: complete and checked, {} in {took}",
                    lines.file_name,
                    HumanBytes(lines.num_bytes_done)
                );
            }
        }
    }
}

impl Lines {
    fn first_line(&self) -> String {
        let size = HumanBytes(self.num_bytes);
        match self.num_bytes_done {
            0 => format!("{}: fetching {size}", self.file_name),
            done => format!("{}: fetching {size}, {} are here", self.file_name, HumanBytes(done)),
        }
    }

    fn line(&self, elapsed: Duration) -> String {
        let received = (self.num_bytes_done - self.num_bytes_before) as f64;
        let speed = received / elapsed.as_secs_f64().max(1e-3);
        let left = self.num_bytes.saturating_sub(self.num_bytes_done) as f64;
        let percent = 100.0 * self.num_bytes_done as f64 / self.num_bytes.max(1) as f64;
        format!(
            "{}: {percent:.0}%, {} of {}, {}/s, {} left",
            self.file_name,
            HumanBytes(self.num_bytes_done),
            HumanBytes(self.num_bytes),
            HumanBytes(speed as u64),
            HumanDuration(Duration::from_secs_f64((left / speed.max(1.0)).min(1e9)))
        )
    }
}

/// A bar of bytes on a terminal, nothing elsewhere.
pub(super) fn bytes_bar(action: &'static str, num_bytes: u64) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(num_bytes), ProgressDrawTarget::stderr());
    bar.set_style(bar_style());
    bar.set_message(action);
    bar
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template(
        "{msg}\n{wide_bar} {percent:>3}%  {bytes} of {total_bytes}  {bytes_per_sec}  {eta} left",
    )
    .expect("the template is valid")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Speed and time left count only what arrived since the start.
    #[test]
    fn lines_say_how_far_and_how_fast() {
        let now = Instant::now();
        let mut lines = Lines {
            file_name: "m.gguf".to_owned(),
            num_bytes: 100 << 20,
            num_bytes_done: 40 << 20,
            num_bytes_before: 40 << 20,
            started: now,
            printed: now,
        };
        assert_eq!(lines.first_line(), "m.gguf: fetching 100.00 MiB, 40.00 MiB are here");
        lines.num_bytes_done = 60 << 20;
        assert_eq!(
            lines.line(Duration::from_secs(10)),
            "m.gguf: 60%, 60.00 MiB of 100.00 MiB, 2.00 MiB/s, 20 seconds left"
        );
    }
}
