//! Goal: adapters compute what PEFT computes, for whoever asked for them and nobody else.
//!
//! Method: adapters as PEFT saved them with its logits and greedy tokens; sequences of several adapters
//! and of none in one engine, compared bit for bit with each alone; and copies of a sound adapter with
//! one thing changed.

use std::collections::BTreeMap;
use std::sync::Weak;

use qwen_server::models::lora::LoraWeights;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

const EXACT_CACHE: Setup = Setup { kv_cache_dtype: KvDtype::F32, ..ROOMY };

/// Adapters and the repository that each is for.
const ADAPTERS: [(&str, &str); 5] = [
    ("lora-qwen2-all", "hf-sharded"),
    ("lora-qwen2-patterns", "hf-sharded"),
    ("lora-qwen3-all", "hf-qwen3"),
    ("lora-qwen3-layer", "hf-qwen3"),
    ("lora-qwen2moe", "hf-qwen2moe"),
];

/// Two adapters of a model that have different projections, and what quantised weights are like.
pub(super) const MIXED: [(&str, [&str; 2]); 2] = [
    ("hf-sharded", ["lora-qwen2-all", "lora-qwen2-patterns"]),
    ("hf-qwen3", ["lora-qwen3-layer", "lora-qwen3-all"]),
];

fn load(directory: &Path, model: &Path) -> anyhow::Result<Arc<LoraWeights>> {
    PlannedModel::open(model, load_options(ROOMY)).unwrap().load_adapter(directory)
}

fn adapter(directory: &Path, model: &Path) -> Adapter {
    Adapter::new("adapter", load(directory, model).unwrap())
}

#[tokio::test]
async fn peft_computes_the_same() {
    for (name, base) in ADAPTERS {
        let engine = start(&tiny(base), EXACT_CACHE);
        let adapter = adapter(&tiny(name), &tiny(base));
        compare_adapted((&engine, Some(&adapter)), name, DENSE).await;
        // The same engine still computes the model itself.
        compare_engine(&engine, base, DENSE).await;
    }
}

/// Random matrices for every projection of a dense model, as PEFT would save them.
pub(super) fn random_adapter(model: &Path, rank: usize) -> TempDir {
    let config = PlannedModel::open(model, load_options(ROOMY)).unwrap().config;
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let heads = config.num_attention_heads * config.head_dim;
    let kv_heads = config.num_key_value_heads * config.head_dim;
    let mut tensors = Tensors::default();
    let mut state = rank as u32;
    let mut value = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    for layer in 0..config.num_hidden_layers {
        for (module, rows, columns) in [
            ("self_attn.q_proj", heads, hidden),
            ("self_attn.k_proj", kv_heads, hidden),
            ("self_attn.v_proj", kv_heads, hidden),
            ("self_attn.o_proj", hidden, heads),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ] {
            for (half, shape) in [("A", [rank, columns]), ("B", [rows, rank])] {
                let name =
                    format!("base_model.model.model.layers.{layer}.{module}.lora_{half}.weight");
                let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| value()).collect();
                tensors.0.insert(
                    name,
                    ("F32".into(), shape.into(), bytemuck::pod_collect_to_vec(&values)),
                );
            }
        }
    }
    let directory = tempfile::tempdir().unwrap();
    tensors.write(directory.path());
    let config = json!({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"});
    std::fs::write(directory.path().join("adapter_config.json"), config.to_string()).unwrap();
    directory
}

/// Every prompt with the adapter whose turn it is; every third one with none.
async fn together_adapted(engine: &EngineHandle, adapters: &[Adapter; 2]) -> Vec<Said> {
    let prompts = prompts();
    let runs = prompts.iter().enumerate().map(|(index, prompt)| {
        let adapter = adapters.get(index % 3).cloned();
        run(engine, Request { adapter, ..request(prompt, 24, sampled(index)) })
    });
    futures_util::future::join_all(runs).await
}

async fn company_changes_no_bit(model: &Path, adapters: &[Adapter; 2]) {
    let mut expected = Vec::new();
    for (index, prompt) in prompts().iter().enumerate() {
        let adapter = adapters.get(index % 3).cloned();
        let is_adapted = adapter.is_some();
        let asked = Request { adapter, ..request(prompt, 24, sampled(index)) };
        let said = run(&start(model, ROOMY), asked).await;
        let plain = alone(model, index, prompt).await;
        assert_eq!(said.logprob_bits != plain.logprob_bits, is_adapted, "prompt {index}");
        expected.push(said);
    }
    let bytes_per_block = block_bytes(model, 4);
    for (context, setup) in [
        ("batched", ROOMY),
        ("chunked", Setup { max_num_batched_tokens: 7, ..ROOMY }),
        ("threads", Setup { num_threads: 3, ..ROOMY }),
        ("preempted", Setup { block_size: 4, kv_cache_bytes: 36 * bytes_per_block, ..ROOMY }),
    ] {
        let engine = start(model, setup);
        for (index, said) in together_adapted(&engine, adapters).await.iter().enumerate() {
            assert_same(context, index, said, &expected[index]);
        }
        if context == "preempted" {
            assert!(0 < engine.stats().num_preemptions, "the setup preempts nothing");
        }
    }
}

#[tokio::test]
async fn company_of_other_adapters_changes_no_bit() {
    for (base, names) in MIXED {
        let adapters = names.map(|name| adapter(&tiny(name), &tiny(base)));
        company_changes_no_bit(&tiny(base), &adapters).await;
    }
    // Beside quantised weights, whose activations are quantised too.
    for base in ["mixed.gguf", "qwen3-q8_0.gguf"] {
        let directories = [5, 16].map(|rank| random_adapter(&tiny(base), rank));
        let adapters = [0, 1].map(|i| adapter(directories[i].path(), &tiny(base)));
        company_changes_no_bit(&tiny(base), &adapters).await;
    }
}

/// Goal: guesses change no bit of what an adapter says, though a draft model has none. Method: guesses
/// by looking up and by a model of other shapes, beside a sequence without an adapter.
#[tokio::test]
async fn guesses_go_together_with_adapters() {
    let (base, draft) = (tiny("mixed.gguf"), tiny("f32-tied.gguf"));
    let made = random_adapter(&base, 5);
    let adapter = adapter(made.path(), &base);
    let both = async |engine: &EngineHandle| {
        let asked = |adapter| Request { adapter, ..request(&prompts()[4], 40, sampled(0)) };
        let (adapted, plain) = (asked(Some(adapter.clone())), asked(None));
        tokio::join!(run(engine, adapted), run(engine, plain))
    };
    let expected = both(&start(&base, ROOMY)).await;
    for (drafter, draft) in [(Drafter::PromptLookup, None), (Drafter::Model, Some(&draft))] {
        let open = |path: &PathBuf| Checkpoint::open(path).unwrap();
        let options = load_options(ROOMY);
        let planned = PlannedModel::plan_with_draft(open(&base), draft.map(open), options).unwrap();
        let config = SpeculationConfig { drafter, max_drafts: 5 };
        let found = both(&start_speculating(&planned, ROOMY, Some(config))).await;
        assert_eq!(found, expected, "{drafter:?}");
    }
}

/// Goal: keys and values are shared by those who have the same load of the same adapter, and by nobody
/// else. Method: one prompt, asked again and again.
#[tokio::test]
async fn prefixes_are_shared_within_a_load_only() {
    let (base, names) = MIXED[0];
    let engine = start(&tiny(base), ROOMY);
    let [one, other] = names.map(|name| adapter(&tiny(name), &tiny(base)));
    let reloaded = adapter(&tiny(names[0]), &tiny(base));
    let prompt = &prompts()[6];
    let ask = async |adapter: Option<&Adapter>| {
        let adapter = adapter.cloned();
        run(&engine, Request { adapter, ..request(prompt, 24, sampled(6)) }).await
    };
    let mut fresh = Vec::new();
    for adapter in [None, Some(&one), Some(&other), Some(&reloaded)] {
        let said = ask(adapter).await;
        assert_eq!(said.num_cached_tokens, 0, "{adapter:?}");
        fresh.push(said);
    }
    assert_same("reloaded", 6, &fresh[3], &fresh[1]);
    for (adapter, fresh) in
        [None, Some(&one), Some(&other), Some(&reloaded)].into_iter().zip(&fresh)
    {
        let again = ask(adapter).await;
        assert_eq!(again.num_cached_tokens, 96, "{adapter:?}");
        assert_same("cached", 6, &again, fresh);
    }
}

/// Goal: who took an adapter keeps it, and its memory goes with the last of them. Method: forget it in
/// the middle of an answer.
#[tokio::test]
async fn an_adapter_lives_as_long_as_its_requests() {
    let (base, names) = MIXED[0];
    let engine = start(&tiny(base), ROOMY);
    let weights = load(&tiny(names[0]), &tiny(base)).unwrap();
    let left: Weak<LoraWeights> = Arc::downgrade(&weights);
    let adapter = Adapter::new("adapter", weights);
    let asked =
        Request { adapter: Some(adapter.clone()), ..request(&prompts()[4], 300, sampled(4)) };
    let expected = run(&engine, asked.clone()).await;
    let mut events = engine.generate(asked).unwrap();
    assert!(matches!(events.next().await, Some(Event::Started { .. })));
    drop(adapter);
    assert!(left.upgrade().is_some(), "the request has it");
    let mut tokens = Vec::new();
    while let Some(event) = events.next().await {
        if let Event::Token { token, .. } = event {
            tokens.push(token.id);
        }
    }
    assert_eq!(tokens, expected.tokens);
    for _ in 0..1000 {
        if left.upgrade().is_none() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("nobody has it, but it is still there");
}

#[tokio::test]
async fn embeddings_are_of_the_adapter() {
    let (base, names) = MIXED[1];
    let engine = start(&tiny(base), ROOMY);
    let adapters = names.map(|name| adapter(&tiny(name), &tiny(base)));
    let mut found = Vec::new();
    for adapter in [None, Some(&adapters[0]), Some(&adapters[1])] {
        let asked = request(&prompts()[4], 0, SamplingParams::default());
        let asked = Request { adapter: adapter.cloned(), pooling: Some(Pooling::Mean), ..asked };
        let mut events = engine.generate(asked).unwrap();
        while let Some(event) = events.next().await {
            if let Event::Pooled(vector) = event {
                assert!(!found.contains(&vector));
                found.push(vector);
            }
        }
    }
    assert_eq!(found.len(), 3);
}

/// The tensors of a safetensors file: type, shape and bytes of each.
#[derive(Default)]
struct Tensors(BTreeMap<String, (String, Vec<usize>, Vec<u8>)>);

impl Tensors {
    fn read(directory: &Path) -> Self {
        let bytes = std::fs::read(directory.join("adapter_model.safetensors")).unwrap();
        let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let header: BTreeMap<String, Value> = serde_json::from_slice(header).unwrap();
        let tensor = |(name, value): (String, Value)| {
            let at = |i: usize| value["data_offsets"][i].as_u64().unwrap() as usize;
            let shape = value["shape"].as_array().unwrap().iter();
            let shape = shape.map(|size| size.as_u64().unwrap() as usize).collect();
            let dtype = value["dtype"].as_str().unwrap().to_owned();
            (name, (dtype, shape, data[at(0)..at(1)].to_vec()))
        };
        let entries = header.into_iter().filter(|(name, _)| name != "__metadata__");
        Self(entries.map(tensor).collect())
    }

    fn write(&self, directory: &Path) {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, (dtype, shape, bytes)) in &self.0 {
            let offsets = [data.len(), data.len() + bytes.len()];
            data.extend(bytes);
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            header.insert(name.clone(), entry);
        }
        let header = Value::Object(header).to_string();
        let length = (header.len() as u64).to_le_bytes();
        let file = [&length, header.as_bytes(), &data].concat();
        std::fs::write(directory.join("adapter_model.safetensors"), file).unwrap();
    }
}

fn copy(name: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(tiny(name).join(file), directory.path().join(file)).unwrap();
    }
    directory
}

/// What is said against an adapter: one line.
fn refusal(directory: &Path, model: &str) -> String {
    let message = format!("{:#}", load(directory, &tiny(model)).expect_err("it is accepted"));
    assert!(!message.contains('\n') && message.len() < 600, "{message}");
    message
}

#[test]
fn a_configuration_that_is_not_followed_is_refused_by_name() {
    for (changes, part) in [
        (json!({"peft_type": "IA3"}), "`peft_type` is `IA3`, only `LORA`"),
        (json!({"peft_type": null}), "`peft_type` is missing"),
        (json!({"bias": "all"}), "`bias` is `all`"),
        (json!({"use_dora": true}), "`use_dora` asks for DoRA"),
        (json!({"modules_to_save": ["lm_head"]}), "`modules_to_save`"),
        (json!({"fan_in_fan_out": true}), "`fan_in_fan_out`"),
        (json!({"lora_bias": true}), "`lora_bias`"),
        (json!({"layer_replication": [[0, 2]]}), "`layer_replication`"),
        (json!({"trainable_token_indices": [1]}), "`trainable_token_indices`"),
        (json!({"target_parameters": ["mlp.experts.gate_up_proj"]}), "`target_parameters`"),
        (json!({"alora_invocation_tokens": [1]}), "`alora_invocation_tokens`"),
        (json!({"use_qalora": true}), "`use_qalora`"),
        (json!({"init_lora_weights": "pissa"}), "`init_lora_weights` is `pissa`"),
        (json!({"r": 0}), "`r` must be from 1"),
        (json!({"r": -1}), "`r` is -1"),
        (json!({"r": 1 << 20}), "`r` must be from 1"),
        (json!({"r": 5}), "which are not of rank 5"),
        (json!({"lora_alpha": "big"}), "`lora_alpha` is \"big\""),
        (json!({"lora_alpha": null}), "`lora_alpha` a number"),
        (json!({"lora_alpha": 1e300}), "`lora_alpha` 1e300 is too large"),
        (json!({"rank_pattern": {"q_proj|k_proj": 4}}), "regular expressions are not supported"),
        (json!({"rank_pattern": {"q_proj": 0.5}}), "which is no rank"),
        (json!({"alpha_pattern": {"q_proj": 4, "self_attn.q_proj": 5}}), "several values"),
        (json!({"target_modules": ["q_proj", "lm_head"]}), "`target_modules` has `lm_head`"),
        (json!({"target_modules": ["q_proj"]}), "is not named by `target_modules`"),
        (json!({"target_modules": 3}), "neither list nor text"),
        (json!({"layers_to_transform": [0]}), "`layers_to_transform`"),
        (json!({"layers_to_transform": "all"}), "no list of layers"),
    ] {
        let directory = copy("lora-qwen2-all");
        let path = directory.path().join("adapter_config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        std::fs::write(&path, config.to_string()).unwrap();
        let message = refusal(directory.path(), "hf-sharded");
        assert!(message.contains(part), "{part}: {message}");
    }
}

/// Goal: every defect of the tensors is found before anything is computed with them.
#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    type Change = fn(&mut Tensors);
    let changes: [(Change, &str); 16] = [
        (|t| drop(t.0.remove(A)), "has a `lora_B` but no `lora_A`"),
        (|t| drop(t.0.remove(B)), "has a `lora_A` but no `lora_B`"),
        (
            |t| {
                t.0.remove(A);
                t.0.remove(B);
            },
            "is named by `target_modules`, but has no tensors",
        ),
        (|t| t.0.clear(), "it has no tensors"),
        (|t| t.0.get_mut(A).unwrap().0 = "I32".into(), "has the type I32"),
        (|t| t.0.get_mut(A).unwrap().1 = vec![64, 4], "which are not of rank 4"),
        (|t| t.0.get_mut(A).unwrap().1 = vec![4, 8, 8], "which are not of rank 4"),
        (|t| t.0.get_mut(A).unwrap().1 = vec![256], "which are not of rank 4"),
        (
            |t| t.0.get_mut(A).unwrap().2[4..8].copy_from_slice(&f32::NAN.to_le_bytes()),
            "not finite",
        ),
        (
            |t| t.0.get_mut(B).unwrap().2[0..4].copy_from_slice(&f32::INFINITY.to_le_bytes()),
            "not finite",
        ),
        (|t| rename(t, "layers.0", "layers.2"), "which has 2 layers"),
        (|t| rename(t, "layers.0", "layers.00"), "is no projection of a layer"),
        (
            |t| rename(t, "model.layers.0.self_attn.q_proj", "lm_head"),
            "output head are not supported",
        ),
        (|t| rename(t, "layers.0.self_attn.q_proj", "layers.0.mlp.gate"), "cannot be adapted here"),
        (|t| rename(t, "base_model.model.model", "model"), "PEFT has not saved it"),
        (|t| rename(t, "lora_A.weight", "lora_magnitude_vector.weight"), "is of DoRA"),
    ];
    for (change, part) in changes {
        let directory = copy("lora-qwen2-all");
        let mut tensors = Tensors::read(directory.path());
        change(&mut tensors);
        tensors.write(directory.path());
        let message = refusal(directory.path(), "hf-sharded");
        assert!(message.contains(part), "{part}: {message}");
    }
}

fn rename(tensors: &mut Tensors, from: &str, to: &str) {
    let renamed = std::mem::take(&mut tensors.0).into_iter();
    tensors.0 = renamed.map(|(name, tensor)| (name.replace(from, to), tensor)).collect();
}

#[test]
fn damaged_and_foreign_adapters_are_refused_in_one_line() {
    // Of another model.
    let message = refusal(&tiny("lora-qwen3-all"), "hf-sharded");
    assert!(message.contains("it was made for another model"), "{message}");
    // Of experts.
    let moe = copy("lora-qwen2-all");
    let message = refusal(moe.path(), "hf-qwen2moe");
    assert!(message.contains("belongs to experts"), "{message}");
    // A rank above the limit.
    let options = LoadOptions { adapters: (1, 3), ..load_options(ROOMY) };
    let planned = PlannedModel::open(&tiny("hf-sharded"), options).unwrap();
    let error = planned.load_adapter(&tiny("lora-qwen2-all")).unwrap_err().to_string();
    assert!(error.contains("has rank 4, which is above `--max-lora-rank 3`"), "{error}");
    // Files that are not there, or not what they should be.
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path(), "hf-sharded").contains("adapter_config.json"));
    let damaged = copy("lora-qwen2-all");
    let config = damaged.path().join("adapter_config.json");
    let weights = damaged.path().join("adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    for (content, part) in [
        (&b"\xff\xff\xff\xff\xff\xff\xff\xff"[..], "its header would have"),
        (b"\xff\xff\xff\x04\0\0\0\0{}", "inside the header"),
        (&bytes[..bytes.len() - 1], "inside tensor"),
        (b"", "inside the length of the header"),
    ] {
        std::fs::write(&weights, content).unwrap();
        let message = refusal(damaged.path(), "hf-sharded");
        assert!(message.contains(part), "{part}: {message}");
    }
    std::fs::write(&config, "[]").unwrap();
    assert!(refusal(damaged.path(), "hf-sharded").contains("it is not a JSON object"));
    std::fs::remove_file(&weights).unwrap();
    std::fs::write(&config, json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1}).to_string())
        .unwrap();
    assert!(refusal(damaged.path(), "hf-sharded").contains("adapter_model.safetensors"));
}
