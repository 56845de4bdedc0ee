//! `qwen-server usage`: who used how much, and what it costs, from the ledger of a server.

use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Result, bail};
use clap::Args;

use super::Hinted;
use super::args::UsageFlags;
use crate::ledger::Store;
use crate::ledger::money::PriceList;
use crate::ledger::report::{Format, QueryText, Report};

const AFTER_HELP: &str = "\
A server may be writing to the ledger meanwhile; the report lags behind by less than a second.
Hours, days and months are those of UTC, and requests belong to the hour in which they ended.

Examples:
  What every key used in November, with what it cost:
    qwen-server usage --usage-ledger usage.db --since 2026-11-01 --until 2026-12-01 --by key \\
        --price '*=0.15,0.60'

  The last week, day by day, for a spreadsheet:
    qwen-server usage --config qwen.toml --since 7d --by day,key,model --format csv";

/// The arguments of `usage`.
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct UsageArgs {
    #[command(flatten)]
    flags: UsageFlags,

    /// First hour to report: a date, a date with an hour such as 2026-11-21T05, or how long ago,
    /// such as 7d or 12h
    #[arg(long, value_name = "TIME", default_value = "30d")]
    since: String,

    /// First hour not to report any more, written the same way [default: all there is]
    #[arg(long, value_name = "TIME")]
    until: Option<String>,

    /// What lines tell apart: key, model, and one of hour, day and month, separated by commas
    #[arg(long, value_name = "NAMES", default_value = "key,model")]
    by: String,

    /// How the report looks: table, csv or json
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,

    /// Take the ledger and the prices from this config file of the server
    #[arg(long, env = "QWEN_SERVER_CONFIG", value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
}

/// Prints the report.
///
/// # Errors
/// If no ledger is named, it cannot be read, or a time means nothing.
pub fn run(args: &UsageArgs) -> Result<()> {
    let Some(path) = &args.flags.usage_ledger else {
        let message = "no usage ledger is named".to_owned();
        let hint = "pass `--ledger FILE`, the file that the server has as `--usage-ledger`";
        bail!(Hinted { message, hint: hint.to_owned() });
    };
    let (since, by) = (Some(args.since.clone()), Some(args.by.clone()));
    let query = QueryText { since, until: args.until.clone(), by }.parse(SystemTime::now());
    let query = query.map_err(|(name, message)| anyhow::anyhow!("`--{name}`: {message}"))?;
    let prices =
        PriceList { currency: args.flags.currency.clone(), prices: args.flags.price.clone() };
    print!("{}", Report::read(&Store::open_existing(path)?, query, &prices)?.render(args.format));
    Ok(())
}
