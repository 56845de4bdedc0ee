//! The whole model on a card, or on the emulation of one: beside Hugging Face, and beside itself.

use super::*;

pub(super) const ON_GPU: Setup = Setup { place: Place::Gpu(Execution::Recorded), ..ROOMY };

/// Activations are rounded to `bf16` after every operation, which random narrow networks with
/// logits spread over ten feel; integer weights are multiplied as exactly as in `f32`.
const BF16_ACTIVATIONS: Tolerance = Tolerance { max: 0.4, mean: 0.05, margin: 0.3 };
/// Weights of more bits are rounded to `bf16` too.
pub(super) const BF16_WEIGHTS: Tolerance = Tolerance { max: 1.2, mean: 0.06, margin: 0.4 };
/// Of two experts that are nearly as likely rounding chooses the other one for some tokens.
const BF16_EXPERTS: Tolerance = Tolerance { max: 3.5, mean: 0.1, margin: 1.0 };

/// Its first layer looks at 20 tokens.
const SLIDING: &str = "hf-sliding-hd64";

pub(super) fn has_gpu() -> bool {
    Gpu::for_tests().is_some()
}

#[tokio::test]
async fn a_card_computes_what_hugging_face_does() {
    if !has_gpu() {
        return;
    }
    for (name, tolerance) in [
        ("f32-tied.gguf", BF16_WEIGHTS),
        ("bf16.gguf", BF16_ACTIVATIONS),
        ("q8_0-hd128.gguf", BF16_ACTIVATIONS),
        ("q4_0-gqa7.gguf", BF16_ACTIVATIONS),
        ("mixed.gguf", BF16_ACTIVATIONS),
        ("k-quants.gguf", BF16_ACTIVATIONS),
        ("qwen3-q8_0.gguf", BF16_ACTIVATIONS),
        ("qwen2moe-f16.gguf", BF16_EXPERTS),
        ("qwen3moe-mixed.gguf", BF16_EXPERTS),
        ("fp8-block", BF16_ACTIVATIONS),
        ("gptq-int4-act-order", BF16_ACTIVATIONS),
        (SLIDING, BF16_ACTIVATIONS),
        ("fp8-block-qwen3moe", BF16_EXPERTS),
    ] {
        compare_with_golden(name, tolerance, ON_GPU).await;
    }
}

/// Goal: replaying a recording is launching its kernels. Method: the same requests of one to eight
/// choices, with recordings and without; every step but the first two of each shape is a replay.
/// One request after the other: which prompts are computed together must not be chance here.
#[tokio::test]
async fn recorded_steps_give_the_bits_of_launched_ones() {
    if !has_gpu() {
        return;
    }
    let eager = Setup { place: Place::Gpu(Execution::Eager), ..ROOMY };
    for model in EQUALITY_MODELS.into_iter().chain([SLIDING]).map(tiny) {
        let (recorded, launched) = (start(&model, ON_GPU), start(&model, eager));
        for (n, prompt) in [1, 3, 8].into_iter().zip(prompts().iter().rev()) {
            let request = || Request { n, ..request(prompt, 12, sampled(1)) };
            let (found, expected) = (run(&recorded, request()), run(&launched, request()));
            assert_same("recorded", n as usize, &found.await, &expected.await);
        }
    }
}

/// Goal: a decode step gives a sequence the same bits in any company. Method: one prompt, so that
/// all choices begin with the same cache, and as many choices as there are draws of one sequence.
#[tokio::test]
async fn company_changes_no_bit_of_a_decode_step() {
    if !has_gpu() {
        return;
    }
    for model in EQUALITY_MODELS.into_iter().chain([SLIDING]).map(tiny) {
        let prompt = &prompts()[6];
        // The prefix is in the cache both times: the last token of a prompt alone is multiplied
        // by other kernels than a whole prompt.
        let primed = || async {
            let engine = start(&model, ON_GPU);
            run(&engine, request(prompt, 1, sampled(1))).await;
            engine
        };
        let alone = run(&primed().await, request(prompt, 24, sampled(1))).await;
        let engine = primed().await;
        let company = (0..7).map(|index| run(&engine, request(prompt, 24, sampled(index))));
        let together = futures_util::future::join_all(company).await;
        assert_same("in company", 1, &together[1], &alone);
    }
}

/// Goal: chunks, preemption and company change no more than rounding does. Method: greedy answers
/// with their log-probabilities, compared as long as the tokens are the same.
#[tokio::test]
async fn chunks_and_preemption_change_no_more_than_rounding() {
    if !has_gpu() {
        return;
    }
    let greedy = || SamplingParams { temperature: 0.0, logprobs: Some(5), ..sampled(0) };
    for name in EQUALITY_MODELS.into_iter().chain([SLIDING]) {
        // Rounding may send a token to another expert where two are nearly as likely.
        let limit = if name.contains("moe") { 1.0 } else { 0.1 };
        let model = tiny(name);
        let tight = 20 * block_bytes(&model, 8);
        let setups = [
            Setup { max_num_batched_tokens: 16, ..ON_GPU },
            Setup { block_size: 8, kv_cache_bytes: tight, ..ON_GPU },
        ];
        for setup in setups {
            let (engine, reference) = (start(&model, setup), start(&model, ON_GPU));
            let prompts = prompts();
            let runs = prompts.iter().map(|p| run(&engine, request(p, 24, greedy())));
            let found = futures_util::future::join_all(runs).await;
            for (prompt, found) in prompts.iter().zip(found) {
                let expected = run(&reference, request(prompt, 24, greedy())).await;
                compare_while_equal(&found, &expected, limit);
            }
        }
    }
}

/// Compares the five log-probabilities of each token up to the first token that differs. Returns of how
/// many.
pub(super) fn compare_while_equal(found: &Said, expected: &Said, limit: f32) -> usize {
    let steps = found.logprob_bits.chunks(5).zip(expected.logprob_bits.chunks(5));
    for (step, (ours, theirs)) in steps.enumerate() {
        for (ours, theirs) in ours.iter().zip(theirs) {
            let error = (f32::from_bits(*ours) - f32::from_bits(*theirs)).abs();
            assert!(error < limit, "step {step}: {error}");
        }
        if found.tokens[step] != expected.tokens[step] {
            return step;
        }
    }
    found.tokens.len()
}
