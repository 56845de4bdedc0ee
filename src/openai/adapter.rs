//! vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`.

use serde::Deserialize;

#[derive(Clone, Debug, Deserialize)]
pub struct LoadAdapterRequest {
    pub lora_name: String,
    pub lora_path: String,
    /// Whether one of the same name is replaced.
    pub load_inplace: Option<bool>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct UnloadAdapterRequest {
    pub lora_name: String,
}
