//! `qwen-server key`: makes, lists and revokes the keys that a server asks its clients for.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use super::Hinted;
use crate::access::key::secret;
use crate::access::key_file::lock;
use crate::access::{Digest, Key, KeyFile, KeyName, Limits, Role, Timestamp};
use crate::config::NamePattern;

const SECONDS_PER_DAY: u64 = 24 * 60 * 60;

/// Make, list and revoke the keys of a server that runs with `--api-keys`.
///
/// The file holds no secrets, only what they are compared with. A running server notices changes
/// within a second.
#[derive(Clone, Debug, Args)]
pub struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Clone, Debug, Subcommand)]
enum KeyCommand {
    /// Make a key and print its secret, once
    Add(AddArgs),
    /// List the keys
    List(FileArgs),
    /// Take a key out, so that no further request gets in with it
    Revoke(RevokeArgs),
}

#[derive(Clone, Debug, Args)]
struct FileArgs {
    /// The key file
    #[arg(long, env = "QWEN_SERVER_API_KEYS", value_name = "FILE", default_value = "keys.toml")]
    file: PathBuf,
}

#[derive(Clone, Debug, Args)]
struct AddArgs {
    /// What its holder is called in logs and accounts
    #[arg(value_name = "NAME")]
    name: KeyName,

    #[command(flatten)]
    file: FileArgs,

    /// Models it may use, with `*` for any text [repeatable; default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    models: Vec<String>,

    /// Requests it may send per minute [default: no limit]
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<std::num::NonZeroU64>,

    /// Tokens of prompts and answers per minute [default: no limit]
    #[arg(long, value_name = "TOKENS")]
    tokens_per_minute: Option<std::num::NonZeroU64>,

    /// Requests it may have running or waiting at a time [default: no limit]
    #[arg(long, value_name = "N")]
    max_concurrent: Option<std::num::NonZeroU64>,

    /// The most urgent priority its requests may claim, from -100 (first) to 100
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    #[arg(value_parser = clap::value_parser!(i64).range(-100..=100))]
    priority: i64,

    /// When it stops working: a number of days such as 90d, or a date [default: never]
    #[arg(long, value_name = "DAYS|DATE")]
    expires: Option<Expiry>,

    /// `admin` also opens /metrics and /admin
    #[arg(long, value_enum, default_value_t = Role::Client)]
    role: Role,
}

#[derive(Clone, Debug, Args)]
struct RevokeArgs {
    /// The key's name
    #[arg(value_name = "NAME")]
    name: String,

    #[command(flatten)]
    file: FileArgs,
}

/// When a key ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expiry {
    /// This many days after it was made.
    Days(u64),
    /// Then.
    At(Timestamp),
}

impl FromStr for Expiry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let days = text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok());
        match days {
            Some(days) => Ok(Self::Days(days.into())),
            None => text
                .parse()
                .map(Self::At)
                .map_err(|_| "expected days such as `90d` or a date such as `2027-01-31`".into()),
        }
    }
}

/// Runs the command.
pub fn run(args: KeyArgs) -> Result<()> {
    match args.command {
        KeyCommand::Add(args) => add(args),
        KeyCommand::List(args) => list(&args.file),
        KeyCommand::Revoke(args) => revoke(&args),
    }
}

fn add(args: AddArgs) -> Result<()> {
    let path = args.file.file.clone();
    let _lock = lock(&path)?;
    let mut file = KeyFile::read_or_new(&path)?;
    let mut random = [0; 32];
    getrandom::fill(&mut random).context("the system has no random numbers")?;
    let secret = secret(&random);
    let name = args.name.to_string();
    if !file.add(args.into_key(Digest::of(secret.as_bytes()), now())) {
        let message = format!("`{}` has a key `{name}` already", path.display());
        let hint = format!("choose another name, or `qwen-server key revoke {name}` first");
        return Err(Hinted { message, hint }.into());
    }
    file.write(&path)?;
    eprintln!("`{name}` is in `{}`. Its secret is shown only here:", path.display());
    println!("{secret}");
    Ok(())
}

impl AddArgs {
    fn into_key(self, digest: Digest, now: Timestamp) -> Key {
        let expires = self.expires.map(|expiry| match expiry {
            Expiry::Days(days) => Timestamp(now.0 + days * SECONDS_PER_DAY),
            Expiry::At(moment) => moment,
        });
        let models: Vec<NamePattern> = self.models.into_iter().map(NamePattern::new).collect();
        Key {
            name: self.name,
            digest,
            models: Some(models).filter(|models| !models.is_empty()),
            limits: Limits {
                requests_per_minute: self.requests_per_minute,
                tokens_per_minute: self.tokens_per_minute,
                max_concurrent: self.max_concurrent,
            },
            priority: self.priority,
            role: self.role,
            created: Some(now),
            expires,
        }
    }
}

fn list(path: &Path) -> Result<()> {
    let file = KeyFile::read(path)?;
    let now = now();
    let row = |cells: [&str; 9]| {
        let [name, digest, role, requests, tokens, concurrent, priority, expires, models] = cells;
        println!(
            "{name:<20} {digest:<16} {role:<7} {requests:>8} {tokens:>9} {concurrent:>10} \
             {priority:>8}  {expires:<20}  {models}"
        );
    };
    row([
        "NAME",
        "DIGEST",
        "ROLE",
        "REQ/MIN",
        "TOK/MIN",
        "CONCURRENT",
        "PRIORITY",
        "EXPIRES",
        "MODELS",
    ]);
    for key in file.keys() {
        let limit = |limit: Option<std::num::NonZeroU64>| {
            limit.map_or_else(|| "-".to_owned(), |limit| limit.to_string())
        };
        let limits = &key.limits;
        let expires = match key.expires {
            Some(_) if key.has_expired(now) => "expired".to_owned(),
            Some(expires) => expires.to_string(),
            None => "never".to_owned(),
        };
        let models = match &key.models {
            None => "all".to_owned(),
            Some(models) if models.is_empty() => "none".to_owned(),
            Some(models) => models.iter().map(NamePattern::as_str).collect::<Vec<_>>().join(","),
        };
        row([
            key.name.as_str(),
            &key.digest.beginning(),
            &key.role.to_string(),
            &limit(limits.requests_per_minute),
            &limit(limits.tokens_per_minute),
            &limit(limits.max_concurrent),
            &key.priority.to_string(),
            &expires,
            &models,
        ]);
    }
    Ok(())
}

fn revoke(args: &RevokeArgs) -> Result<()> {
    let path = &args.file.file;
    let _lock = lock(path)?;
    let mut file = KeyFile::read(path)?;
    if !file.revoke(&args.name) {
        let message = format!("`{}` has no key `{}`", path.display(), args.name);
        let hint = "`qwen-server key list` shows the keys".to_owned();
        return Err(Hinted { message, hint }.into());
    }
    file.write(path)?;
    eprintln!("`{}` is revoked", args.name);
    Ok(())
}

fn now() -> Timestamp {
    Timestamp(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expiry_is_a_number_of_days_or_a_date() {
        assert_eq!("90d".parse(), Ok(Expiry::Days(90)));
        assert_eq!("1970-01-02".parse(), Ok(Expiry::At(Timestamp(86_400))));
        for text in ["", "d", "90", "-1d", "90h", "soon", "99999999999d"] {
            assert!(text.parse::<Expiry>().is_err(), "{text}");
        }
    }
}
