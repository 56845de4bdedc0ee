//! The published Qwen models: where their files are and how they want to be used.
//!
//! The data are the TOML files under `models/`, compiled in; `models/README.md` explains the
//! fields. Nothing here touches the network or the disk.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

/// The model that is served when none is named.
pub const DEFAULT_MODEL: &str = "qwen2.5-coder-0.5b-instruct:q4_k_m";

/// The quantisation that is taken when none is named.
pub const DEFAULT_QUANTIZATION: &str = "q4_k_m";

const FILES: [(&str, &str); 8] = [
    ("qwen2.5/instruct.toml", include_str!("../../models/qwen2.5/instruct.toml")),
    ("qwen2.5/coder-instruct.toml", include_str!("../../models/qwen2.5/coder-instruct.toml")),
    ("qwen2.5/math-instruct.toml", include_str!("../../models/qwen2.5/math-instruct.toml")),
    ("qwq/qwq-32b.toml", include_str!("../../models/qwq/qwq-32b.toml")),
    ("qwen1.5/experts.toml", include_str!("../../models/qwen1.5/experts.toml")),
    ("qwen2/experts.toml", include_str!("../../models/qwen2/experts.toml")),
    ("qwen3/dense.toml", include_str!("../../models/qwen3/dense.toml")),
    ("qwen3/experts.toml", include_str!("../../models/qwen3/experts.toml")),
];

/// All models known by name.
#[derive(Clone, Debug)]
pub struct Catalogue {
    entries: Vec<Entry>,
}

/// A model and what it shares with its family.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// The family's name.
    pub family: String,
    /// The architecture as GGUF files name it.
    pub architecture: String,
    /// How a conversation becomes text.
    pub prompt: Prompt,
    /// The model itself.
    #[serde(flatten)]
    pub model: Model,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Family {
    #[serde(rename = "family")]
    name: String,
    architecture: String,
    prompt: Prompt,
    #[serde(rename = "model")]
    models: Vec<Model>,
}

/// The chat format of a family.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// How turns are marked.
    pub format: PromptFormat,
    /// The system message that the template adds when a conversation has none.
    pub default_system: Option<String>,
    /// How tool calls are written.
    pub tool_calls: ToolCallFormat,
    /// Whether the model thinks aloud before it answers.
    pub reasoning: bool,
    /// Where this stands.
    pub source: String,
}

/// How turns are marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptFormat {
    /// `<|im_start|>role … <|im_end|>`.
    Chatml,
}

/// How tool calls are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolCallFormat {
    /// JSON between `<tool_call>` and `</tool_call>`.
    Hermes,
    /// Elements for function and parameters between these tags.
    Qwen3Coder,
}

/// What is known about one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// What `--model` takes; also the name it is served under.
    pub name: String,
    /// The name for people.
    pub title: String,
    /// Where the facts stand.
    pub source: String,
    /// The licence's name.
    pub license: String,
    /// All weights; a tied output layer counts once.
    pub num_parameters: u64,
    /// Layers.
    pub num_hidden_layers: u32,
    /// Width.
    pub hidden_size: u32,
    /// Width inside the MLP.
    pub intermediate_size: u32,
    /// Query heads.
    pub num_attention_heads: u32,
    /// Key and value heads.
    pub num_key_value_heads: u32,
    /// Width of a head, where it is not the width divided by the query heads.
    pub head_dim: Option<u32>,
    /// Present where the MLP is made of experts.
    pub experts: Option<Experts>,
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// Whether the embedding is also the output layer.
    pub tie_word_embeddings: bool,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Positions the model was trained for.
    pub context_length: u32,
    /// How positions can be stretched.
    pub yarn: Option<Yarn>,
    /// Default sampling.
    pub generation: Generation,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Releases other than GGUF.
    #[serde(rename = "release")]
    pub releases: Vec<Release>,
    /// The official GGUF release, if there is one.
    pub gguf: Option<GgufRelease>,
}

/// The experts of every layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// Experts to choose from.
    pub num_experts: u32,
    /// Experts of a token.
    pub num_experts_per_tok: u32,
    /// Width inside an expert.
    pub moe_intermediate_size: u32,
    /// Width inside the expert that every token goes to; zero if there is none.
    #[serde(default)]
    pub shared_expert_intermediate_size: u32,
}

/// YaRN scaling for longer contexts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Yarn {
    /// The scaling factor.
    pub factor: f64,
    /// The context reached with it.
    pub context_length: u32,
}

/// Default sampling of a release.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// Divides the logits.
    pub temperature: f32,
    /// Nucleus share.
    pub top_p: f32,
    /// Number of candidates.
    pub top_k: u32,
    /// Penalty on repetition.
    pub repetition_penalty: f32,
    /// Whether the values were compared with the release's own file.
    pub checked: bool,
}

/// A repository with weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// The format of its weights.
    pub format: ReleaseFormat,
    /// Its id on the hub.
    pub repo: String,
    /// Bits per weight.
    pub bits: u32,
}

/// The format of a repository's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReleaseFormat {
    /// Half precision.
    Safetensors,
    /// GPTQ.
    Gptq,
    /// AWQ.
    Awq,
}

/// A repository with GGUF files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GgufRelease {
    /// Its id on the hub.
    pub repo: String,
    /// The commit that the digests belong to, where known.
    pub revision: Option<String>,
    /// What the names of its files begin with, where that is not the model's name; the quantisation
    /// follows in capitals.
    pub stem: Option<String>,
    /// Its quantisations.
    pub files: Vec<GgufFile>,
}

/// One quantisation, in one or several files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GgufFile {
    /// Its name in lower case, as in the file's name.
    pub quantization: String,
    /// How many files.
    pub parts: usize,
    /// The size of all files.
    pub num_bytes: u64,
    /// How sure the names and the size are.
    pub evidence: Evidence,
    /// One digest per file, in lower-case hexadecimal; empty where not known.
    #[serde(default)]
    pub sha256: Vec<String>,
}

/// How sure a file's name and size are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Evidence {
    /// Name, size and digest stand in a public record of the release.
    Digest,
    /// Name and size were seen in a listing.
    Listing,
    /// The name was seen; the size is computed.
    Name,
    /// The name follows the release's scheme; the size is computed.
    Pattern,
}

/// A quantisation of a model.
#[derive(Clone, Copy, Debug)]
pub struct Selection<'a> {
    /// The model.
    pub entry: &'a Entry,
    /// Where its GGUF files are.
    pub release: &'a GgufRelease,
    /// The chosen quantisation.
    pub file: &'a GgufFile,
}

/// A name that picks nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// No such model.
    #[error("there is no model named `{name}`; {hint}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What to do.
        hint: String,
    },
    /// No such quantisation.
    #[error("`{name}` has no quantisation `{quantization}`; it has {available}")]
    Quantization {
        /// The model.
        name: String,
        /// What was asked for.
        quantization: String,
        /// What there is.
        available: String,
    },
    /// The model has no official GGUF release.
    #[error(
        "`{name}` has no official GGUF release; convert it or get a converted file, and pass it as \
         `--model PATH`"
    )]
    NoGguf {
        /// The model.
        name: String,
    },
}

impl Catalogue {
    /// The catalogue that the program was built with.
    pub fn builtin() -> Self {
        let families = FILES.iter().map(|(path, text)| {
            toml::from_str::<Family>(text)
                .unwrap_or_else(|error| panic!("models/{path} is compiled in and valid: {error}"))
        });
        let entries = families.flat_map(|family| {
            let Family { name, architecture, prompt, models } = family;
            models.into_iter().map(move |model| Entry {
                family: name.clone(),
                architecture: architecture.clone(),
                prompt: prompt.clone(),
                model,
            })
        });
        Self { entries: entries.collect() }
    }

    /// All models, families together, small ones first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The model of a name or of one of its hub ids, in any case; `:quantization` is ignored.
    pub fn find(&self, name: &str) -> Option<&Entry> {
        let (base, _) = split_name(name);
        self.entries.iter().find(|entry| entry.is_called(base))
    }

    /// The model whose official GGUF release has a file of this name.
    pub fn find_by_file(&self, file_name: &str) -> Option<Selection<'_>> {
        self.entries.iter().find_map(|entry| {
            let release = entry.model.gguf.as_ref()?;
            let file = release.files.iter().find(|file| {
                entry.model.file_names(file).iter().any(|n| n.eq_ignore_ascii_case(file_name))
            })?;
            Some(Selection { entry, release, file })
        })
    }

    /// The quantisation that `name[:quantization]` means.
    pub fn select(&self, name: &str) -> Result<Selection<'_>, SelectError> {
        let (base, quantization) = split_name(name);
        let entry = self.find(base).ok_or_else(|| self.unknown(base))?;
        entry.select(quantization.unwrap_or(DEFAULT_QUANTIZATION))
    }

    fn unknown(&self, name: &str) -> SelectError {
        let wanted = name.rsplit('/').next().unwrap_or(name).to_lowercase();
        // A beginning of a name means it more than any typing error does.
        let distance = |candidate: &str| {
            let is_beginning = 3 < wanted.len() && candidate.starts_with(&wanted);
            if is_beginning { 0 } else { edit_distance(candidate, &wanted) }
        };
        let names = self.entries.iter().map(|entry| entry.model.name.as_str());
        let hint = match names.min_by_key(|name| distance(name)) {
            Some(nearest) if distance(nearest) <= 1 + wanted.len() / 4 => {
                format!("did you mean `{nearest}`?")
            }
            _ => "`qwen-server models` lists the names; a path or a hub id works too".to_owned(),
        };
        SelectError::Unknown { name: name.to_owned(), hint }
    }
}

impl Entry {
    /// The quantisation of this name, in any case.
    pub fn select(&self, quantization: &str) -> Result<Selection<'_>, SelectError> {
        let name = self.model.name.clone();
        let Some(release) = &self.model.gguf else {
            return Err(SelectError::NoGguf { name });
        };
        let mut files = release.files.iter();
        match files.find(|file| file.quantization.eq_ignore_ascii_case(quantization)) {
            Some(file) => Ok(Selection { entry: self, release, file }),
            None => Err(SelectError::Quantization {
                name,
                quantization: quantization.to_owned(),
                available: joined(release.files.iter().map(|file| file.quantization.as_str())),
            }),
        }
    }

    fn is_called(&self, name: &str) -> bool {
        let model = &self.model;
        let repos = model.releases.iter().filter(|r| r.format == ReleaseFormat::Safetensors);
        name.eq_ignore_ascii_case(&model.name)
            || repos.map(|release| &release.repo).any(|repo| name.eq_ignore_ascii_case(repo))
            || model.gguf.as_ref().is_some_and(|gguf| name.eq_ignore_ascii_case(&gguf.repo))
    }
}

impl Model {
    /// Width of a head.
    pub fn values_per_head(&self) -> u32 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// The names of a quantisation's files.
    pub fn file_names(&self, file: &GgufFile) -> Vec<String> {
        let stem = match self.gguf.as_ref().and_then(|gguf| gguf.stem.as_ref()) {
            Some(stem) => format!("{stem}-{}", file.quantization.to_uppercase()),
            None => format!("{}-{}", self.name, file.quantization),
        };
        match file.parts {
            1 => vec![format!("{stem}.gguf")],
            parts => {
                (1..=parts).map(|part| format!("{stem}-{part:05}-of-{parts:05}.gguf")).collect()
            }
        }
    }
}

impl Selection<'_> {
    /// The names of the files.
    pub fn file_names(&self) -> Vec<String> {
        self.entry.model.file_names(self.file)
    }
}

/// Takes `name:quantization` apart.
pub fn split_name(name: &str) -> (&str, Option<&str>) {
    match name.rsplit_once(':') {
        Some((base, quantization)) if !quantization.is_empty() => (base, Some(quantization)),
        Some((base, _)) => (base, None),
        None => (name, None),
    }
}

fn joined<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

/// How many characters must be added, removed or replaced to make one text the other.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(100).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().take(100).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}
