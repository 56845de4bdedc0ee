//! How fast a model can be expected to answer on this machine.
//!
//! One token of one answer reads every weight that takes part once, so it takes at least as long as
//! that; a prompt is computed many tokens at a time, and bound by multiplications. Both rates are
//! measured with random weights of the type that most of the model has. Attention is left out: the
//! numbers are those of short texts, and the most that can be expected.

use std::time::{Duration, Instant};

use candle_core::Result;
use candle_core::quantized::GgmlDType;
use serde::Serialize;

use super::TensorLine;
use crate::cli::serve::device::{Opened, open};
use crate::config::{DeviceChoice, available_threads};
use crate::device::Device;
use crate::device::threads::ThreadPool;
use crate::ops::matmul::{RandomSource, Stacking, Weights, instruction_set, matmul};
use crate::ops::row_format::RowFormat;
use crate::ops::tensor::Tensor;
use crate::weights::gguf::dtype_name;
use crate::weights::safetensors::ElementType;

/// Weights to measure with: more than the caches of a processor hold, or enough to keep a card busy
/// for longer than a launch takes.
const CPU_SAMPLE_BYTES: usize = 96 << 20;
const GPU_SAMPLE_BYTES: usize = 1 << 30;
/// Columns of the measured matrix, and tokens of the measured prompt.
const SAMPLE_COLS: usize = 4096;
const PROMPT_TOKENS: usize = 128;
/// How long each rate is measured at least.
const PATIENCE: Duration = Duration::from_millis(150);

/// What to expect.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ExpectedSpeed {
    /// What was measured, in words.
    pub(super) device: String,
    /// Tokens of one answer a second.
    pub(super) decode_tokens_per_second: f64,
    /// Tokens of a prompt a second.
    pub(super) prefill_tokens_per_second: f64,
}

/// What of a model takes part in a token.
#[derive(Clone, Copy, Debug, PartialEq)]
struct TokenWork {
    /// Bytes of weights.
    num_bytes: f64,
    /// Multiplications.
    num_products: f64,
}

/// Measures the machine; `experts` says how many of how many experts a token goes to. `None` for
/// formats that there are no random weights of.
///
/// # Errors
/// If the device fails.
pub(super) fn expect(
    tensors: &[TensorLine],
    experts: Option<(usize, usize)>,
) -> anyhow::Result<Option<ExpectedSpeed>> {
    let Some(format) = main_format(tensors) else { return Ok(None) };
    let work = token_work(tensors, experts);
    let Opened { device, .. } = open(DeviceChoice::Auto)?;
    let pool = ThreadPool::new(available_threads().get());
    let rates = pool.install(|| measure(format, &device))?;
    let device = match &device {
        Device::Cpu => format!("cpu, {} threads, {}", pool.num_threads(), instruction_set()),
        Device::Gpu(gpu) => gpu.properties().name.clone(),
    };
    Ok(Some(ExpectedSpeed {
        device,
        decode_tokens_per_second: rates.num_bytes / work.num_bytes,
        prefill_tokens_per_second: rates.num_products / work.num_products,
    }))
}

/// The format of most bytes of matrices.
fn main_format(tensors: &[TensorLine]) -> Option<RowFormat> {
    const IN_GGUF: [GgmlDType; 13] = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];
    let matrices = || tensors.iter().filter(|tensor| 1 < tensor.shape.len());
    let num_bytes = |format: &RowFormat| -> usize {
        let name = format.gguf().map_or(ElementType::F8E4M3.name(), dtype_name);
        matrices().filter(|tensor| tensor.dtype == name).map(|tensor| tensor.num_bytes).sum()
    };
    let all: usize = matrices().map(|tensor| tensor.num_bytes).sum();
    let known = || IN_GGUF.into_iter().map(RowFormat::from).chain([RowFormat::Fp8]);
    let found = known().max_by_key(num_bytes)?;
    // Packed integers of other formats are of no type known here.
    (all < known().map(|format| num_bytes(&format)).sum::<usize>() * 2).then_some(found)
}

/// An embedding is looked up, unless it is the output head too; of the experts a few take part.
fn token_work(tensors: &[TensorLine], experts: Option<(usize, usize)>) -> TokenWork {
    let has_head = tensors.iter().any(|t| ["output.weight", "lm_head.weight"].contains(&&*t.name));
    let mut work = TokenWork { num_bytes: 0.0, num_products: 0.0 };
    for tensor in tensors {
        let is_embedding =
            ["token_embd.weight", "model.embed_tokens.weight"].contains(&&*tensor.name);
        if is_embedding && has_head {
            continue;
        }
        let is_of_experts = tensor.name.contains("_exps.") || tensor.name.contains(".experts.");
        let share = match experts {
            Some((used, all)) if is_of_experts => used as f64 / all as f64,
            _ => 1.0,
        };
        work.num_bytes += tensor.num_bytes as f64 * share;
        work.num_products += tensor.num_parameters as f64 * share;
    }
    work
}

/// Bytes of weights and multiplications a second.
fn measure(format: RowFormat, device: &Device) -> Result<TokenWork> {
    let sample_bytes = match device {
        Device::Cpu => CPU_SAMPLE_BYTES,
        Device::Gpu(_) => GPU_SAMPLE_BYTES,
    };
    let row_bytes = format.row_bytes(SAMPLE_COLS)?;
    let num_rows = (sample_bytes / row_bytes).next_multiple_of(64);
    let source = RandomSource { format, num_rows, seed: 1 };
    let sample = [vec![source]];
    let weights = Weights::random_each(&sample, SAMPLE_COLS, Stacking::Below, device)?.remove(0);
    let seconds = |num_tokens: usize| -> Result<f64> {
        let x = Tensor::from_vec(
            vec![1.0; num_tokens * SAMPLE_COLS],
            (num_tokens, SAMPLE_COLS),
            device,
        )?;
        let run = || {
            let began = Instant::now();
            // Reading one row waits for a card.
            matmul(&x, &weights, None)?.narrow(0, 1)?.to_vec()?;
            Ok::<_, candle_core::Error>(began.elapsed())
        };
        // The first one touches memory that is new.
        run()?;
        let (began, mut best) = (Instant::now(), run()?);
        while began.elapsed() < PATIENCE {
            best = best.min(run()?);
        }
        Ok(best.as_secs_f64())
    };
    Ok(TokenWork {
        num_bytes: (num_rows * row_bytes) as f64 / seconds(1)?,
        num_products: (num_rows * SAMPLE_COLS * PROMPT_TOKENS) as f64 / seconds(PROMPT_TOKENS)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, dtype: &'static str, shape: &[usize], num_bytes: usize) -> TensorLine {
        let num_parameters = shape.iter().map(|&n| n as u64).product();
        TensorLine {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            num_bytes,
            num_parameters,
        }
    }

    #[test]
    fn only_what_takes_part_in_a_token_counts() {
        let mut tensors = vec![
            line("token_embd.weight", "Q8_0", &[100, 32], 3400),
            line("blk.0.attn_q.weight", "Q4_K", &[256, 256], 36_864),
            line("blk.0.ffn_up_exps.weight", "Q4_K", &[8, 256, 256], 294_912),
            line("blk.0.attn_norm.weight", "F32", &[256], 1024),
        ];
        let work = token_work(&tensors, Some((2, 8)));
        assert_eq!(work.num_bytes, 3400.0 + 36_864.0 + 294_912.0 / 4.0 + 1024.0);
        assert_eq!(work.num_products, 3200.0 + 65_536.0 * 3.0 + 256.0);
        tensors.push(line("output.weight", "Q8_0", &[100, 32], 3400));
        assert_eq!(token_work(&tensors, Some((2, 8))).num_bytes, work.num_bytes);
        assert_eq!(main_format(&tensors), Some(GgmlDType::Q4K.into()));
        tensors.push(line("packed", "I32", &[1 << 20], 4 << 20));
        tensors.push(line("packed", "I32", &[1 << 20, 1], 4 << 20));
        assert_eq!(main_format(&tensors), None);
    }

    #[test]
    fn this_machine_has_a_speed() {
        let tensors = [line("blk.0.attn_q.weight", "Q8_0", &[1000, 256], 1000 * 272)];
        let speed = expect(&tensors, None).unwrap().unwrap();
        for rate in [speed.decode_tokens_per_second, speed.prefill_tokens_per_second] {
            assert!(rate.is_finite() && 0.0 < rate, "{speed:?}");
        }
        assert!(expect(&[], None).unwrap().is_none());
    }
}
