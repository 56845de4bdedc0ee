//! Goal: a repository and a GGUF file of the same weights are the same model, of every architecture
//! and with stretched positions.
//!
//! Method: the tensors of a GGUF checkpoint are written as safetensors under their Hugging Face names,
//! beside a `config.json` as transformers writes it; sampled answers must have the same bits.

use serde_json::{Value, json};

use super::*;

/// The Hugging Face name of a GGUF tensor. Where it holds the matrices of all experts, their number
/// goes where `*` is.
fn hugging_face_name(name: &str) -> String {
    let parts = name.split('.').collect::<Vec<_>>();
    let ["blk", layer, part, kind] = parts[..] else {
        return match name {
            "token_embd.weight" => "model.embed_tokens.weight",
            "output_norm.weight" => "model.norm.weight",
            _ => "lm_head.weight",
        }
        .to_owned();
    };
    let part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        "ffn_gate_inp" => "mlp.gate",
        "ffn_gate_inp_shexp" => "mlp.shared_expert_gate",
        "ffn_gate_shexp" => "mlp.shared_expert.gate_proj",
        "ffn_up_shexp" => "mlp.shared_expert.up_proj",
        "ffn_down_shexp" => "mlp.shared_expert.down_proj",
        "ffn_gate_exps" => "mlp.experts.*.gate_proj",
        "ffn_up_exps" => "mlp.experts.*.up_proj",
        "ffn_down_exps" => "mlp.experts.*.down_proj",
        other => panic!("what is {other}?"),
    };
    format!("model.layers.{layer}.{part}.{kind}")
}

/// The tensors of a file of floats, as one file of safetensors.
fn safetensors(gguf: &Gguf) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let infos: Vec<_> = gguf.tensors().cloned().collect();
    for info in infos {
        let (name, (_, bytes)) = (hugging_face_name(&info.name), gguf.tensor(&info.name).unwrap());
        let dtype = format!("{:?}", info.dtype);
        let is_stack = name.contains('*');
        let shape = if is_stack { &info.shape[1..] } else { &info.shape[..] };
        let shape =
            if name.contains("shared_expert_gate") { vec![1, shape[0]] } else { shape.to_vec() };
        let count = if is_stack { info.shape[0] } else { 1 };
        for (index, bytes) in bytes.chunks_exact(bytes.len() / count).enumerate() {
            let name = name.replace('*', &index.to_string());
            let offsets = [data.len(), data.len() + bytes.len()];
            header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
            data.extend_from_slice(bytes);
        }
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// What transformers writes of a model like this GGUF file.
fn config_json(gguf: &Gguf, more: &Value) -> Value {
    let metadata = gguf.metadata();
    let architecture = metadata.str("general.architecture").unwrap();
    let size = |key: &str| metadata.u32(&format!("{architecture}.{key}")).ok();
    let mut config = json!({
        "hidden_size": size("embedding_length"),
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": size("attention.head_count"),
        "num_key_value_heads": size("attention.head_count_kv"),
        "head_dim": size("attention.key_length"),
        "max_position_embeddings": size("context_length"),
        "vocab_size": 288,
        "rms_norm_eps": 1e-6,
        "rope_theta": metadata.f32(&format!("{architecture}.rope.freq_base")).unwrap(),
        "tie_word_embeddings": !gguf.has_tensor("output.weight"),
        "num_experts": size("expert_count"),
        "num_experts_per_tok": size("expert_used_count"),
        "moe_intermediate_size": size("expert_feed_forward_length"),
        "shared_expert_intermediate_size": size("expert_shared_feed_forward_length"),
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

fn repository(name: &str, more: &Value) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let gguf = Gguf::open(&tiny(name)).unwrap();
    std::fs::write(directory.path().join("model.safetensors"), safetensors(&gguf)).unwrap();
    let config = config_json(&gguf, more).to_string();
    std::fs::write(directory.path().join("config.json"), config).unwrap();
    directory
}

#[tokio::test]
async fn a_repository_gives_the_bits_of_a_gguf_file() {
    // Long enough that its positions are stretched, where they can be.
    let prompt = &prompts()[6];
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
    let newer = json!({
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
    });
    for (name, more) in [
        ("qwen3-f16.gguf", json!({"model_type": "qwen3"})),
        ("qwen2moe-f16.gguf", json!({"model_type": "qwen2_moe", "norm_topk_prob": false})),
        ("qwen3moe-f16.gguf", json!({"model_type": "qwen3_moe", "norm_topk_prob": true})),
        (
            "yarn.gguf",
            json!({"model_type": "qwen2", "max_position_embeddings": 64, "rope_scaling": yarn}),
        ),
        ("yarn.gguf", json!({"model_type": "qwen2", "rope_theta": null, "rope_parameters": newer})),
    ] {
        let directory = repository(name, &more);
        let said = alone(directory.path(), 6, prompt).await;
        assert_same(name, 6, &said, &alone(&tiny(name), 6, prompt).await);
    }
}

/// Goal: what the file says of normalisation counts. Method: the other way gives other numbers.
#[tokio::test]
async fn a_file_may_say_how_experts_are_weighed() {
    let other = json!({"model_type": "qwen3_moe", "norm_topk_prob": false});
    let directory = repository("qwen3moe-f16.gguf", &other);
    let said = alone(directory.path(), 6, &prompts()[6]).await;
    let usual = alone(&tiny("qwen3moe-f16.gguf"), 6, &prompts()[6]).await;
    assert_ne!(said.logprob_bits, usual.logprob_bits);
}

/// Goal: short texts are computed as if nothing was stretched. Method: the same file with and
/// without its YaRN, below the trained positions and above, with `max_tokens` on both sides.
#[tokio::test]
async fn only_texts_that_may_outgrow_the_trained_positions_are_stretched() {
    let model = tiny("yarn.gguf");
    let plain = || {
        let options = LoadOptions { rope_scaling: RopeScalingChoice::None, ..load_options(ROOMY) };
        start_planned(&PlannedModel::open(&model, options).unwrap(), ROOMY)
    };
    let prompt = &prompts()[4];
    assert_eq!(prompt.len(), 40);
    for (max_tokens, is_stretched) in [(1, false), (24, false), (25, true)] {
        let stretched = run(&start(&model, ROOMY), request(prompt, max_tokens, sampled(4))).await;
        let plain = run(&plain(), request(prompt, max_tokens, sampled(4))).await;
        let is_same = stretched.logprob_bits == plain.logprob_bits;
        assert_eq!(!is_same, is_stretched, "{max_tokens} tokens");
    }
}

/// Goal: the two kinds share no blocks. Method: one after the other on one engine, beside fresh runs.
#[tokio::test]
async fn stretched_and_plain_texts_share_no_blocks() {
    let model = tiny("yarn.gguf");
    let engine = start(&model, ROOMY);
    let prompt = &prompts()[4];
    for max_tokens in [10, 60, 10, 60] {
        let said = run(&engine, request(prompt, max_tokens, sampled(4))).await;
        let fresh = run(&start(&model, ROOMY), request(prompt, max_tokens, sampled(4))).await;
        assert_same("one after the other", 4, &said, &fresh);
    }
}
