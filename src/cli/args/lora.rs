//! Which adapters are served beside the model.

use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::at_least_one;
use crate::config::{LoraConfig, LoraModules};

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Adapters (LoRA)")]
pub(super) struct LoraFlags {
    /// Adapter to serve beside the model: a name for clients and a directory saved by PEFT [repeatable]
    ///
    /// Requests select it by its name as `model`. Several are separated by commas, on the command line
    /// by blanks too; vLLM's JSON with `name` and `path` works as well.
    #[arg(long, env = "QWEN_SERVER_LORA_MODULES", value_name = "NAME=PATH")]
    #[arg(action = ArgAction::Append, num_args = 1..)]
    lora_modules: Vec<LoraModules>,

    /// Let administrators load adapters from below this directory while the server runs
    ///
    /// Opens /v1/load_lora_adapter and /v1/unload_lora_adapter where /admin is answered.
    #[arg(long, env = "QWEN_SERVER_LORA_ROOT", value_name = "DIR")]
    lora_root: Option<PathBuf>,

    /// Most adapters in memory; with --lora-root the plan keeps memory for so many of the highest rank
    #[arg(long, env = "QWEN_SERVER_MAX_LORAS", value_name = "N")]
    #[arg(default_value_t = 8, value_parser = at_least_one(1024))]
    max_loras: usize,

    /// Highest rank of an adapter
    #[arg(long, env = "QWEN_SERVER_MAX_LORA_RANK", value_name = "RANK")]
    #[arg(default_value_t = 64, value_parser = at_least_one(1024))]
    max_lora_rank: usize,
}

impl LoraFlags {
    pub(super) fn into_config(self) -> LoraConfig {
        LoraConfig {
            modules: self.lora_modules.into_iter().flat_map(|modules| modules.0).collect(),
            root: self.lora_root,
            max_loras: self.max_loras,
            max_rank: self.max_lora_rank,
        }
    }
}
