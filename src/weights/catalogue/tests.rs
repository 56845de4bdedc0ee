//! Goal: the data files parse, agree with themselves, and names find what users mean.

use std::collections::HashSet;

use super::*;

#[test]
fn entries_are_consistent() {
    let catalogue = Catalogue::builtin();
    assert_eq!(catalogue.entries().len(), 7 + 6 + 3 + 1 + 1 + 1 + 6 + 2);
    let mut names = HashSet::new();
    let mut digests = HashSet::new();
    for entry in catalogue.entries() {
        let model = &entry.model;
        assert_eq!(model.name, model.name.to_lowercase());
        assert!(names.insert(model.name.clone()), "{} appears twice", model.name);
        assert_eq!(model.eos_token_ids, [151_645, 151_643]);
        assert!(model.num_attention_heads.is_multiple_of(model.num_key_value_heads));
        assert!(matches!(model.values_per_head(), 64 | 128));
        let is_derived = model.head_dim.is_none();
        assert!(!is_derived || model.hidden_size.is_multiple_of(model.num_attention_heads));
        assert_eq!(model.num_parameters, num_parameters(entry), "{}", model.name);
        if let Some(yarn) = &model.yarn {
            assert_eq!(
                yarn.factor * f64::from(model.context_length),
                f64::from(yarn.context_length)
            );
        }
        assert!((0.0..=2.0).contains(&model.generation.temperature));
        assert!((0.0..=1.0).contains(&model.generation.top_p));
        assert!((1.0..=1.2).contains(&model.generation.repetition_penalty));
        for release in &model.releases {
            assert!(release.repo.to_lowercase().starts_with(&format!("qwen/{}", model.name)));
        }
        for file in model.gguf.iter().flat_map(|gguf| &gguf.files) {
            check_file(model, file);
            assert!(file.sha256.iter().all(|digest| digests.insert(digest.clone())));
        }
    }
}

fn check_file(model: &Model, file: &GgufFile) {
    let name = format!("{}:{}", model.name, file.quantization);
    let bits_per_weight = file.num_bytes as f64 * 8.0 / model.num_parameters as f64;
    // Small models store a tied embedding twice and keep more of it in high precision.
    let bounds = match file.quantization.as_str() {
        "q2_k" => 2.5..7.0,
        "q3_k_m" => 3.5..7.2,
        "q4_0" => 4.3..7.2,
        "q4_k_m" => 4.5..8.2,
        "q5_0" | "q5_k_m" => 5.4..8.8,
        "q6_k" => 6.4..11.0,
        "q8_0" => 8.4..11.5,
        "fp16" => 16.0..21.0,
        other => panic!("{name} has the unknown quantisation {other}"),
    };
    assert!(bounds.contains(&bits_per_weight), "{name} has {bits_per_weight} bits per weight");
    let names = model.file_names(file);
    assert_eq!(names.len(), file.parts);
    assert!(1 <= file.parts);
    assert_eq!(file.evidence == Evidence::Digest, !file.sha256.is_empty(), "{name}");
    assert!(file.sha256.is_empty() || file.sha256.len() == file.parts, "{name}");
    for digest in &file.sha256 {
        assert_eq!(digest.len(), 64);
        assert!(digest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
    }
}

/// Counted from the shapes: embedding, attention with biases or norms of heads, MLP or experts with
/// their router and the shared one with its gate, norms, output layer.
fn num_parameters(entry: &Entry) -> u64 {
    let model = &entry.model;
    let hidden = u64::from(model.hidden_size);
    let head_dim = u64::from(model.values_per_head());
    let query = head_dim * u64::from(model.num_attention_heads);
    let kv = head_dim * u64::from(model.num_key_value_heads);
    let extras =
        if entry.architecture.starts_with("qwen2") { query + 2 * kv } else { 2 * head_dim };
    let attention = 2 * hidden * query + 2 * hidden * kv + extras;
    let mlp = match &model.experts {
        None => 3 * hidden * u64::from(model.intermediate_size),
        Some(experts) => {
            let one = 3 * hidden * u64::from(experts.moe_intermediate_size) + hidden;
            let shared = match u64::from(experts.shared_expert_intermediate_size) {
                0 => 0,
                width => 3 * hidden * width + hidden,
            };
            u64::from(experts.num_experts) * one + shared
        }
    };
    let embeddings = if model.tie_word_embeddings { 1 } else { 2 };
    embeddings * u64::from(model.vocab_size) * hidden
        + hidden
        + u64::from(model.num_hidden_layers) * (attention + mlp + 2 * hidden)
}

#[test]
fn names_are_found() {
    let catalogue = Catalogue::builtin();
    let selection = catalogue.select(DEFAULT_MODEL).unwrap();
    assert_eq!(selection.release.repo, "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF");
    assert_eq!(selection.file_names(), ["qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"]);
    assert_eq!(selection.file.num_bytes, 491_400_064);
    for name in [
        "qwen2.5-coder-0.5b-instruct",
        "Qwen2.5-Coder-0.5B-Instruct",
        "QWEN2.5-CODER-0.5B-INSTRUCT:Q4_K_M",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "qwen/qwen2.5-coder-0.5b-instruct-gguf:q4_k_m",
        "qwen2.5-coder-0.5b-instruct:",
    ] {
        assert_eq!(catalogue.select(name).unwrap().file, selection.file, "{name}");
    }
    let split = catalogue.select("qwen2.5-7b-instruct").unwrap();
    assert_eq!(
        split.file_names(),
        [
            "qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf",
            "qwen2.5-7b-instruct-q4_k_m-00002-of-00002.gguf"
        ]
    );
    let qwen3 = catalogue.select("Qwen/Qwen3-8B").unwrap();
    assert_eq!(qwen3.file_names(), ["Qwen3-8B-Q4_K_M.gguf"]);
    let by_file = catalogue.find_by_file("Qwen2.5-7B-Instruct-Q4_K_M-00002-of-00002.gguf").unwrap();
    assert_eq!(by_file.entry.model.name, "qwen2.5-7b-instruct");
    assert!(catalogue.find_by_file("model.gguf").is_none());
}

#[test]
fn wrong_names_are_explained() {
    let catalogue = Catalogue::builtin();
    let message = |name: &str| catalogue.select(name).unwrap_err().to_string();
    assert!(message("qwen2.5-coder-0.5b").contains("did you mean `qwen2.5-coder-0.5b-instruct`?"));
    assert!(message("llama").contains("`qwen-server models` lists"));
    assert!(message("qwen2.5-0.5b-instruct:q9").contains("it has q2_k, q3_k_m, q4_0, q4_k_m"));
    assert!(message("qwen2.5-math-7b-instruct").contains("no official GGUF release"));
}

#[test]
fn unknown_fields_are_refused() {
    let text = FILES[0].1;
    assert!(toml::from_str::<Family>(&format!("surprise = 1\n{text}")).is_err());
    assert!(toml::from_str::<Family>(&text.replacen("title =", "titel =", 1)).is_err());
}
