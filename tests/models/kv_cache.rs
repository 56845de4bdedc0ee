//! Caches of 8 bits on the CPU: the same equalities as with 16, and answers close to theirs.

use super::*;

/// e4m3 rounds every number to 6 %.
const COARSE: Tolerance = Tolerance { max: 5.0, mean: 0.3, margin: 1.0 };

const TYPES: [KvDtype; 2] = [KvDtype::Fp8, KvDtype::Q8_0];

/// Goal: who is in the batch, how a prompt is cut and whether its blocks were cached change no bit.
/// Method: each prompt alone, then all at once under four setups, each twice, so that the second
/// time all prefixes are in the cache.
#[tokio::test]
async fn company_chunks_and_cached_blocks_of_8_bits_change_no_bit() {
    for (name, dtype) in [
        ("mixed.gguf", KvDtype::Fp8),
        ("mixed.gguf", KvDtype::Q8_0),
        ("qwen3moe-mixed.gguf", KvDtype::Q8_0),
    ] {
        let (model, roomy) = (tiny(name), Setup { kv_cache_dtype: dtype, ..ROOMY });
        let mut expected = Vec::new();
        for (index, prompt) in prompts().iter().enumerate() {
            expected.push(run(&start(&model, roomy), request(prompt, 24, sampled(index))).await);
        }
        let bytes_per_block =
            PlannedModel::open(&model, load_options(roomy)).unwrap().plan.block_bytes / 4;
        let setups = [
            ("batched", roomy),
            ("chunked", Setup { max_num_batched_tokens: 7, ..roomy }),
            ("threads", Setup { num_threads: 3, ..roomy }),
            ("preempted", Setup { block_size: 4, kv_cache_bytes: 36 * bytes_per_block, ..roomy }),
        ];
        for (context, setup) in setups {
            let engine = start(&model, setup);
            for _ in 0..2 {
                for (index, said) in together(&engine).await.iter().enumerate() {
                    assert_same(&format!("{dtype:?} {context}"), index, said, &expected[index]);
                }
            }
        }
    }
}

/// Random narrow networks feel rounding more than trained ones do: logits are spread over ten.
/// Rounding to 8 bits costs as much as activations of 8 bits do, e4m3 several times that.
#[tokio::test]
async fn a_cache_of_8_bits_gives_about_what_hugging_face_does() {
    for name in ["f32-untied.gguf", "bf16.gguf"] {
        for (kv_cache_dtype, tolerance) in [(KvDtype::Q8_0, QUANTISED), (KvDtype::Fp8, COARSE)] {
            compare_with_golden(name, tolerance, Setup { kv_cache_dtype, ..ROOMY }).await;
        }
    }
}

#[test]
fn the_plan_counts_what_a_row_takes() {
    let block_bytes = |kv_cache_dtype| {
        let options = load_options(Setup { kv_cache_dtype, ..ROOMY });
        PlannedModel::open(&tiny("mixed.gguf"), options).unwrap().plan.block_bytes
    };
    // Two layers of one head of 64; 16 tokens.
    assert_eq!(block_bytes(KvDtype::F16), 16 * 2 * 2 * 64 * 2);
    assert_eq!(TYPES.map(block_bytes), [16 * 2 * 2 * 64, 16 * 2 * 2 * 2 * 34]);
}

#[test]
fn a_card_refuses_what_it_has_no_kernels_for() {
    if Gpu::for_tests().is_none() {
        return;
    }
    for kv_cache_dtype in [KvDtype::Q8_0, KvDtype::F32] {
        let place = Place::Gpu(Execution::Eager);
        let options = load_options(Setup { kv_cache_dtype, place, ..ROOMY });
        let error = PlannedModel::open(&tiny("mixed.gguf"), options).err().unwrap().to_string();
        assert!(error.contains("not supported on a GPU; use"), "{error}");
    }
}
