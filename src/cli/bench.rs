//! `qwen-server bench`: how fast a server answers, at several numbers of clients.
//!
//! Every prompt is made of random tokens, so that a prefix cache does not help, and every answer
//! has the same length, because the end-of-sequence token is ignored.

mod load;
mod plot;
mod prompts;
mod report;

use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::client::ServerArgs;
use crate::cli::serve::LocalServer;
use load::{Load, Outcome};
use prompts::Prompts;
use report::{LevelReport, Report};

const AFTER_HELP: &str = "\
Examples:
  qwen-server bench
  qwen-server bench --direct ./qwen2.5-7b-instruct-q4_k_m.gguf
  qwen-server bench --concurrency 1,8,32 --prompt-tokens 1024 --json out.json --plot out.svg";

/// More clients than this measure the client.
const MAX_CONCURRENCY: u64 = 1024;

/// The arguments of `bench`.
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct BenchArgs {
    /// Numbers of clients to measure with, separated by commas
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,4,16")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=MAX_CONCURRENCY))]
    concurrency: Vec<u64>,

    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    prompt_tokens: u32,

    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 128)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    output_tokens: u32,

    /// Requests per number of clients and run [default: twice the number of clients, at least 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    requests: Option<u32>,

    /// How often to repeat everything; the results are pooled
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,

    /// Makes the same prompts again [default: differs from run to run]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw the figures as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    /// Measure this model in a server of this process, instead of a running server
    ///
    /// Takes what `serve --model` takes; other settings come from the environment variables of
    /// `serve`.
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["url", "model"])]
    direct: Option<String>,

    #[command(flatten)]
    server: ServerArgs,
}

impl BenchArgs {
    fn num_requests(&self, concurrency: u64) -> usize {
        let default = || (2 * concurrency).max(4) as usize;
        self.requests.map_or_else(default, |num| num as usize)
    }
}

/// Measures, prints a table and writes the files asked for.
///
/// # Errors
/// If there is no server, no request at all succeeds, or a file cannot be written.
pub fn run(args: &BenchArgs) -> Result<()> {
    let local = args.direct.as_deref().map(start_local).transpose()?;
    let (client, model) = match &local {
        Some(local) => {
            ServerArgs { url: local.url.clone(), model: None, api_key: None }.connect()?
        }
        None => args.server.connect()?,
    };
    let seed = args.seed.unwrap_or_else(crate::config::arbitrary_seed);
    let prompts = Prompts::prepare(&client, &model, (seed, args.prompt_tokens as usize))?;
    let load = Load {
        client,
        model: model.clone(),
        prompts,
        output_tokens: args.output_tokens,
        num_sent: AtomicU32::new(0),
    };
    let warm_up = ProgressBar::new_spinner().with_message("warming up");
    warm_up.enable_steady_tick(Duration::from_millis(100));
    load.request().context("the first request failed")?;
    warm_up.finish_and_clear();

    let levels = measure(args, &load)?;
    let report = Report::new(args, model, levels);
    print!("{report}");
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report).context("cannot write JSON")? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))?;
    }
    if let Some(path) = &args.plot {
        std::fs::write(path, plot::draw(&report))
            .with_context(|| format!("cannot write `{}`", path.display()))?;
    }
    Ok(())
}

fn start_local(model: &str) -> Result<LocalServer> {
    LocalServer::start(&super::local_config(model)?)
}

fn measure(args: &BenchArgs, load: &Load) -> Result<Vec<LevelReport>> {
    let num_requests: usize = args.concurrency.iter().map(|&level| args.num_requests(level)).sum();
    let progress = progress_bar(num_requests as u64 * u64::from(args.runs));
    let mut pooled: Vec<(Vec<Outcome>, Duration)> =
        args.concurrency.iter().map(|_| (Vec::new(), Duration::ZERO)).collect();
    for _ in 0..args.runs {
        for (&concurrency, (outcomes, elapsed)) in args.concurrency.iter().zip(&mut pooled) {
            progress.set_message(format!("{concurrency} clients"));
            let num_requests = args.num_requests(concurrency);
            let (new, took) = load.run(concurrency as usize, num_requests, &progress);
            outcomes.extend(new);
            *elapsed += took;
        }
    }
    progress.finish_and_clear();
    let levels: Vec<LevelReport> = args
        .concurrency
        .iter()
        .zip(&pooled)
        .map(|(&concurrency, (outcomes, elapsed))| {
            LevelReport::new(concurrency, outcomes, *elapsed)
        })
        .collect();
    if levels.iter().all(|level| level.num_requests == level.num_failed) {
        let reason = levels.into_iter().find_map(|level| level.first_failure);
        bail!("every request failed: {}", reason.unwrap_or_default());
    }
    Ok(levels)
}

fn progress_bar(num_requests: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg:>12} [{wide_bar}] {pos}/{len} requests, {elapsed} elapsed, {eta} left",
    );
    let bar = ProgressBar::with_draw_target(Some(num_requests), ProgressDrawTarget::stderr());
    bar.with_style(style.expect("the template is correct"))
}
