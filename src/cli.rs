//! Turns a command line into a call and an exit code.
//!
//! One file per command; each has its arguments and a `run`. What goes to standard output is the
//! command's result, everything else goes to standard error.

pub mod args;
pub mod bench;
pub mod bundle;
pub mod chat;
pub mod complete;
pub mod inspect;
pub mod key;
pub mod models;
pub mod progress;
pub mod pull;
pub mod quantize;
pub mod serve;
pub mod unbundle;
pub mod usage;

mod client;
mod sse;
mod text_side;

use std::io;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{self, Config, ConfigFile, Settings, hub_env};
use crate::weights::hub::{Hub, HubConfig, HubError, Reason};
use crate::weights::resolve::{ResolveError, ResolvedModel, resolve};
use args::ServeArgs;

const AFTER_HELP: &str = "\
Examples:
  qwen-server serve                      serve the default model on http://127.0.0.1:8000
  qwen-server chat                       talk to it from another terminal

Every command explains its options: `qwen-server serve --help`";

#[derive(Debug, Parser)]
#[command(name = "qwen-server", version, about, after_help = AFTER_HELP)]
#[command(arg_required_else_help = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over HTTP with OpenAI-compatible endpoints
    Serve(Box<ServeArgs>),
    /// Download a model of the catalogue
    Pull(pull::PullArgs),
    /// List the models of the catalogue and what fits this machine
    Models(models::ModelsArgs),
    /// Chat with a running server
    Chat(chat::ChatArgs),
    /// Complete one prompt with a running server
    Complete(complete::CompleteArgs),
    /// Write a repository's weights into a GGUF file, in fewer bits
    Quantize(quantize::QuantizeArgs),
    /// Show what a model file contains
    Inspect(inspect::InspectArgs),
    /// Pack a model and this program for a machine without a network
    Bundle(bundle::BundleArgs),
    /// Check and install what `bundle` packed
    Unbundle(unbundle::UnbundleArgs),
    /// Make, list and revoke the keys of a server's clients
    Key(key::KeyArgs),
    /// Measure how fast a running server answers
    Bench(bench::BenchArgs),
    /// Tell who used how much, and what it costs
    Usage(usage::UsageArgs),
}

/// An error whose user can do something about it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Hinted {
    /// What went wrong.
    pub message: String,
    /// What to change.
    pub hint: String,
}

/// Runs the command that the process was started with.
///
/// # Errors
/// Whatever stopped the command. Unusable arguments end the process with exit code 2 instead.
pub fn run() -> Result<()> {
    match parse(command()).command {
        Command::Serve(args) => serve(&args),
        Command::Pull(args) => pull::run(args),
        Command::Models(args) => models::run(args),
        Command::Chat(args) => chat::run(&args),
        Command::Complete(args) => complete::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Bundle(args) => bundle::run(args),
        Command::Unbundle(args) => unbundle::run(&args),
        Command::Key(args) => key::run(args),
        Command::Bench(args) => bench::run(&args),
        Command::Usage(args) => usage(&args),
    }
}

/// The hub as the environment describes it.
pub(crate) fn hub_from_environment() -> Result<Hub, HubError> {
    let environment = hub_env::hub_environment();
    Hub::new(HubConfig {
        cache_dir: environment.cache_dir,
        endpoint: environment.endpoint,
        token: environment.token,
        offline: environment.offline,
        proxy: environment.proxy,
    })
}

/// Finds a model as `--model` does, but never fetches it.
fn find_here(model: &str) -> Result<ResolvedModel> {
    let mut config = hub_from_environment()?.config().clone();
    config.offline = true;
    match resolve(model, &Hub::new(config)?, &mut ()) {
        Err(ResolveError::Hub(HubError { reason: Reason::Offline { .. }, .. })) => {
            bail!("`{model}` is not on this machine; `qwen-server pull {model}` fetches it")
        }
        result => Ok(result?),
    }
}

/// Prints an error with its causes on one line, then what can be done about it.
pub fn report(error: &anyhow::Error) -> ExitCode {
    // `qwen-server models | head` is no error.
    let is_broken_pipe = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    if error.chain().filter_map(|cause| cause.downcast_ref()).any(is_broken_pipe) {
        return ExitCode::SUCCESS;
    }
    let chain = format!("{error:#}");
    eprintln!("error: {}", chain.split_whitespace().collect::<Vec<_>>().join(" "));
    for hinted in error.chain().filter_map(|cause| cause.downcast_ref::<Hinted>()) {
        eprintln!("hint: {}", hinted.hint);
    }
    ExitCode::FAILURE
}

fn command() -> clap::Command {
    Cli::command()
        .mut_subcommands(|command| command.mut_args(|arg| arg.hide_env_values(true)))
        .mut_subcommand("serve", |serve| {
            config::ignore_injected_port(serve, "port", "QWEN_SERVER_PORT")
        })
}

fn parse(command: clap::Command) -> Cli {
    let matches = command.get_matches();
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

fn serve(args: &ServeArgs) -> Result<()> {
    let print_config = args.print_config;
    let config = serve_config(args.config.as_deref())?;
    if print_config {
        print!("{}", config.settings);
        return Ok(());
    }
    serve::run(&config)
}

/// A config file's values are the defaults of the flags that `usage` shares with `serve`.
fn usage(args: &usage::UsageArgs) -> Result<()> {
    let Some(path) = args.config.as_deref() else { return usage::run(args) };
    let mut root = command();
    let file = read_file(path, &root)?;
    root = root.mut_subcommand("usage", |usage| file.apply(usage));
    match parse(root).command {
        Command::Usage(args) => usage::run(&args),
        _ => unreachable!("the command line has not changed"),
    }
}

/// What `serve --model MODEL` would do on a free port, with everything else as the environment says.
fn local_config(model: &str) -> Result<Config> {
    let root = command();
    let argv = ["qwen-server", "serve", "--model", model, "--host", "127.0.0.1", "--port", "0"];
    let matches = root.clone().try_get_matches_from(argv)?;
    let matches = matches.subcommand_matches("serve").expect("the command is `serve`");
    let settings = Settings::collect(serve_command(&root), matches, None);
    let mut config = ServeArgs::from_arg_matches(matches)?.into_config(settings)?;
    // Its only client is this process.
    config.access.admission = config::Admission::Local;
    config.access.admin_address = None;
    config.http.tls = None;
    Ok(config)
}

/// Puts flags, environment and file together. The command line is read again with the file's
/// values as defaults, so that precedence is decided in one place.
fn serve_config(file: Option<&Path>) -> Result<Config> {
    let mut root = command();
    let file = file.map(|path| read_file(path, &root)).transpose()?;
    if let Some(file) = &file {
        root = root.mut_subcommand("serve", |serve| file.apply(serve));
    }
    let matches = root.clone().get_matches();
    let Command::Serve(args) = parse(root.clone()).command else {
        unreachable!("the command line has not changed");
    };
    let matches = matches.subcommand_matches("serve").expect("the command is `serve`");
    let settings = Settings::collect(serve_command(&root), matches, file.as_ref());
    Ok(args.into_config(settings)?)
}

fn read_file(path: &Path, root: &clap::Command) -> Result<ConfigFile> {
    Ok(ConfigFile::read(path, serve_command(root))?)
}

fn serve_command(root: &clap::Command) -> &clap::Command {
    root.find_subcommand("serve").expect("`serve` is one of the commands")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        command().debug_assert();
    }

    /// A setting's flag, variable and key are one name in three spellings.
    #[test]
    fn every_flag_of_serve_is_a_variable_of_the_same_name() {
        let root = command();
        let command_line_only = [
            "no-bare-tool-calls",
            "no-dashscope-names",
            "no-enable-prefix-caching",
            "print-config",
            "help",
            "version",
        ];
        for arg in serve_command(&root).get_arguments() {
            let long = arg.get_long().expect("every argument of `serve` is a flag");
            let variable = arg.get_env().map(|name| name.to_string_lossy().into_owned());
            if command_line_only.contains(&long) {
                assert_eq!(variable, None);
                continue;
            }
            let expected = format!("QWEN_SERVER_{}", long.replace('-', "_").to_uppercase());
            assert_eq!(variable, Some(expected));
            assert_eq!(arg.get_id().as_str(), long.replace('-', "_"));
        }
    }
}
