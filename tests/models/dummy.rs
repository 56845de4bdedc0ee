//! Models of random weights: they are used like others, on every device.

use qwen_server::weights::catalogue::{Catalogue, Entry, Experts, Model};
use qwen_server::weights::dummy::{Quantization, write};

use super::*;

/// As small as every quantisation allows.
fn small_entry(architecture: &str) -> Entry {
    let catalogue = Catalogue::builtin();
    let is_wanted = |entry: &&Entry| entry.architecture == architecture;
    let entry = catalogue.entries().iter().find(is_wanted).unwrap().clone();
    let experts = |of: &Experts| Experts {
        num_experts: 4,
        num_experts_per_tok: 2,
        moe_intermediate_size: 256,
        shared_expert_intermediate_size: of.shared_expert_intermediate_size.min(256),
    };
    let model = Model {
        num_hidden_layers: 3,
        hidden_size: 256,
        intermediate_size: 200,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        vocab_size: 300,
        context_length: 512,
        experts: entry.model.experts.as_ref().map(experts),
        ..entry.model
    };
    Entry { model, ..entry }
}

async fn greedy(quantization: &str, place: Place, prompt: &[u32]) -> Said {
    greedy_of("qwen2", quantization, place, prompt).await
}

async fn greedy_of(architecture: &str, quantization: &str, place: Place, prompt: &[u32]) -> Said {
    let folder = tempfile::tempdir().unwrap();
    let quantization: Quantization = quantization.parse().unwrap();
    let file = write(&small_entry(architecture), quantization, folder.path()).unwrap();
    let setup = Setup { place, ..ROOMY };
    let planned = PlannedModel::open_dummy(file.path(), load_options(setup)).unwrap();
    drop(file);
    let params = SamplingParams { temperature: 0.0, logprobs: Some(5), ..sampled(0) };
    run(&start_planned(&planned, setup), request(prompt, 12, params)).await
}

fn logprobs(said: &Said) -> Vec<f32> {
    said.logprob_bits.iter().map(|bits| f32::from_bits(*bits)).collect()
}

/// Goal: made-up models run, prefer some tokens, and do so again. Method: each quantisation twice,
/// with prompts that share nothing.
#[tokio::test]
async fn dummies_of_every_quantisation_run() {
    for quantization in ["bf16", "f16", "q8_0", "q4_0", "q5_0", "q4_k_m", "q5_k_m", "q6_k"] {
        let said = greedy(quantization, Place::Cpu, &prompts()[4]).await;
        assert_eq!(said, greedy(quantization, Place::Cpu, &prompts()[4]).await);
        let logprobs = logprobs(&said);
        assert!(logprobs.iter().all(|logprob| logprob.is_finite()), "{quantization}");
        let spread = logprobs[0] - logprobs[4];
        assert!((0.01..10.0).contains(&spread), "{quantization}: {spread}");
        let other = greedy(quantization, Place::Cpu, &prompts()[5]).await;
        assert_ne!(said.logprob_bits, other.logprob_bits, "{quantization}");
    }
}

/// Goal: every architecture of the catalogue can be made up. Method: greedy tokens, twice.
#[tokio::test]
async fn dummies_of_every_architecture_run() {
    let catalogue = Catalogue::builtin();
    let mut architectures: Vec<_> = catalogue.entries().iter().map(|e| &e.architecture).collect();
    architectures.dedup();
    assert_eq!(architectures, ["qwen2", "qwen2moe", "qwen3", "qwen3moe"]);
    for architecture in architectures {
        let said = greedy_of(architecture, "q4_k_m", Place::Cpu, &prompts()[4]).await;
        let again = greedy_of(architecture, "q4_k_m", Place::Cpu, &prompts()[4]).await;
        assert_eq!(said, again, "{architecture}");
        let logprobs = logprobs(&said);
        assert!(logprobs.iter().all(|logprob| logprob.is_finite()), "{architecture}");
    }
}

/// Goal: a small dummy is the same model on every device. Method: log-probabilities as long as the
/// greedy tokens are the same.
#[tokio::test]
async fn a_small_dummy_is_the_same_on_a_card() {
    if Gpu::for_tests().is_none() {
        return;
    }
    for quantization in ["bf16", "q4_k_m"] {
        let prompt = &prompts()[4];
        let on_gpu = greedy(quantization, Place::Gpu(Execution::Recorded), prompt).await;
        let on_cpu = greedy(quantization, Place::Cpu, prompt).await;
        let steps = on_gpu.tokens.iter().zip(&on_cpu.tokens);
        let num_equal = steps.take_while(|(ours, theirs)| ours == theirs).count();
        let compared = 5 * (num_equal + 1).min(on_gpu.tokens.len());
        let pairs = logprobs(&on_gpu).into_iter().zip(logprobs(&on_cpu));
        for (ours, theirs) in pairs.take(compared) {
            assert!((ours - theirs).abs() < 0.1, "{quantization}: {ours} {theirs}");
        }
    }
}
