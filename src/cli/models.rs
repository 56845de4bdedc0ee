//! `qwen-server models`: what can be served, what is here, and what fits.

use std::path::PathBuf;

use indicatif::HumanBytes;
use serde::Serialize;

use super::hub_from_environment;
use crate::device::host_memory;
use crate::weights::catalogue::{
    Catalogue, DEFAULT_MODEL, DEFAULT_QUANTIZATION, Entry, Model, Selection, split_name,
};
use crate::weights::hub::Hub;
use crate::weights::resolve::find_local;

/// What the program needs beside weights and KV cache.
pub(super) const WORKSPACE_BYTES: u64 = 300 << 20;
/// The context that must have room for a model to be said to fit.
const FITTING_CONTEXT: u64 = 4096;

/// List the models that can be served by name: sizes, contexts, what is downloaded, what fits.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelsArgs {
    /// Show only models whose name contains this.
    #[arg(value_name = "FILTER")]
    pub filter: Option<String>,

    /// Show every quantisation, not only q4_k_m and those on this machine.
    #[arg(long)]
    pub all: bool,

    /// Print JSON, with everything the catalogue knows.
    #[arg(long)]
    pub json: bool,
}

/// One line of the table.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    num_parameters: u64,
    context_length: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_context_length: Option<u32>,
    /// Missing where there is no official GGUF release.
    quantization: Option<String>,
    num_bytes: Option<u64>,
    memory_bytes: Option<u64>,
    fits: Option<bool>,
    path: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: ModelsArgs) -> anyhow::Result<()> {
    let hub = hub_from_environment()?;
    let catalogue = Catalogue::builtin();
    let total_bytes = host_memory::total_bytes();
    let filter = args.filter.unwrap_or_default().to_lowercase();
    let entries: Vec<&Entry> =
        catalogue.entries().iter().filter(|entry| entry.model.name.contains(&filter)).collect();
    anyhow::ensure!(!entries.is_empty(), "no model's name contains `{filter}`");
    let is_wanted = |row: &Row| {
        args.all
            || args.json
            || row.path.is_some()
            || row.quantization.as_deref().is_none_or(|name| name == DEFAULT_QUANTIZATION)
    };
    let rows: Vec<Row> =
        entries.iter().flat_map(|entry| rows(entry, &hub, total_bytes)).filter(is_wanted).collect();
    if args.json {
        let report = serde_json::json!({
            "default_model": DEFAULT_MODEL,
            "memory_bytes": total_bytes,
            "cache_dir": hub.config().cache_dir,
            "files": rows,
            "models": entries,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    print!("{}", table(&rows));
    println!();
    if let Some(total_bytes) = total_bytes {
        println!(
            "This machine has {} of memory; a model fits with {FITTING_CONTEXT} tokens of context.",
            HumanBytes(total_bytes)
        );
    }
    println!(
        "Contexts in brackets need YaRN. Downloads go to {}.",
        hub.config().cache_dir.display()
    );
    println!("Serve one with `qwen-server serve --model NAME`; the default is {DEFAULT_MODEL}.");
    Ok(())
}

fn rows(entry: &Entry, hub: &Hub, total_bytes: Option<u64>) -> Vec<Row> {
    let model = &entry.model;
    let row = |selection: Option<Selection<'_>>| {
        let num_bytes = selection.map(|selection| selection.file.num_bytes);
        let memory_bytes = num_bytes.map(|num_bytes| memory_bytes(model, num_bytes));
        Row {
            name: model.name.clone(),
            num_parameters: model.num_parameters,
            context_length: model.context_length,
            max_context_length: model.yarn.as_ref().map(|yarn| yarn.context_length),
            quantization: selection.map(|selection| selection.file.quantization.clone()),
            num_bytes,
            memory_bytes,
            fits: memory_bytes.zip(total_bytes).map(|(needed, total)| needed <= total),
            path: selection.and_then(|selection| find_local(selection, hub)),
        }
    };
    match &model.gguf {
        None => vec![row(None)],
        Some(release) => {
            let files = release.files.iter();
            files.map(|file| row(Some(Selection { entry, release, file }))).collect()
        }
    }
}

/// Weights, workspace, and keys and values in half precision for a short context.
fn memory_bytes(model: &Model, num_file_bytes: u64) -> u64 {
    let head_dim = u64::from(model.values_per_head());
    let kv_values = 2 * u64::from(model.num_hidden_layers * model.num_key_value_heads) * head_dim;
    num_file_bytes + WORKSPACE_BYTES + 2 * kv_values * FITTING_CONTEXT
}

fn table(rows: &[Row]) -> String {
    let (default_name, default_quantization) = split_name(DEFAULT_MODEL);
    let mut cells: Vec<[String; 7]> = vec![
        ["NAME", "PARAMETERS", "QUANTISATION", "FILE SIZE", "CONTEXT", "LOCAL", "FITS"]
            .map(str::to_owned),
    ];
    for row in rows {
        let is_default =
            row.name == default_name && row.quantization.as_deref() == default_quantization;
        let context = match row.max_context_length {
            Some(max) => format!("{} ({max})", row.context_length),
            None => row.context_length.to_string(),
        };
        cells.push([
            if is_default { format!("{} *", row.name) } else { row.name.clone() },
            billions(row.num_parameters),
            row.quantization.clone().unwrap_or_else(|| "no GGUF release".to_owned()),
            row.num_bytes.map_or_else(|| "-".to_owned(), |bytes| HumanBytes(bytes).to_string()),
            context,
            if row.path.is_some() { "yes" } else { "-" }.to_owned(),
            match row.fits {
                Some(true) => "yes",
                Some(false) => "no",
                None => "-",
            }
            .to_owned(),
        ]);
    }
    let widths: Vec<usize> = (0..7)
        .map(|column| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in &cells {
        let padded: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            // Numbers are compared by their ends, words by their beginnings.
            .map(|(column, (cell, &width))| match column {
                1 | 3 | 4 => format!("{cell:>width$}"),
                _ => format!("{cell:<width$}"),
            })
            .collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn billions(count: u64) -> String {
    format!("{:.2}B", count as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::hub::HubConfig;

    fn all_rows(total_bytes: u64) -> Vec<Row> {
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub::new(HubConfig {
            cache_dir: cache.path().to_path_buf(),
            endpoint: String::new(),
            token: None,
            offline: true,
            proxy: None,
        })
        .unwrap();
        let catalogue = Catalogue::builtin();
        catalogue.entries().iter().flat_map(|entry| rows(entry, &hub, Some(total_bytes))).collect()
    }

    /// Small machines hold small models; a missing release is a row too.
    #[test]
    fn what_fits_depends_on_memory() {
        let fitting = |total_bytes: u64| {
            all_rows(total_bytes).iter().filter(|row| row.fits == Some(true)).count()
        };
        assert_eq!(fitting(256 << 20), 0);
        assert!(10 < fitting(2 << 30));
        assert!(fitting(2 << 30) < fitting(16 << 30));
        let rows = all_rows(4 << 30);
        assert!(rows.iter().any(|row| row.quantization.is_none() && row.fits.is_none()));
        assert!(rows.iter().all(|row| row.path.is_none()));
    }

    #[test]
    fn the_table_is_aligned() {
        let text = table(&all_rows(4 << 30));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("NAME"));
        let column = lines[0].find("QUANTISATION").unwrap();
        assert!(lines[1..].iter().all(|line| !line[column..].starts_with(' ')));
        assert_eq!(text.matches(" * ").count(), 1);
        assert!(text.contains("32768 (131072)"));
    }
}
