//! Our runner against candle's own quantised Qwen2, same file, same threads, same run.
//!
//! `cargo bench --bench peer_candle -- MODEL.gguf [RUNS]` alternates the two, and prints the
//! median, minimum and maximum of each rate and their ratio.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_qwen2::ModelWeights;
use qwen_server::config::Execution;
use qwen_server::device::Device as ModelDevice;
use qwen_server::kv::{BlockId, BlockTable};
use qwen_server::ops::kv_cache::KvDtype;
use qwen_server::runner::load::{LoadOptions, PlannedModel};
use qwen_server::runner::{DraftedRunner, ModelRunner};
use qwen_server::sampling::SamplingParams;
use qwen_server::scheduler::SeqId;
use qwen_server::scheduler::step::{
    Runner, SampleRequest, ScheduledSeq, SchedulerOutput, TokenMasks,
};

const BLOCK_SIZE: usize = 16;
const DECODE_TOKENS: usize = 64;
const PREFILL_TOKENS: [usize; 2] = [32, 512];

/// Tokens a second: decoding after a short prompt, then prefill of each length.
type Rates = [f64; 1 + PREFILL_TOKENS.len()];

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    let Some(path) = args.next().map(PathBuf::from) else {
        println!("no model given, nothing measured: cargo bench --bench peer_candle -- MODEL.gguf");
        return Ok(());
    };
    let runs: usize = args.next().map_or(Ok(5), |runs| runs.parse())?;
    let mut ours = load_ours(&path)?;
    let mut theirs = load_candle(&path)?;
    measure_ours(&mut ours)?;
    let mut rates: [Vec<Rates>; 2] = [Vec::new(), Vec::new()];
    for run in 0..runs {
        rates[0].push(measure_ours(&mut ours)?);
        rates[1].push(measure_candle(&mut theirs)?);
        eprintln!("run {} of {runs} done", run + 1);
    }
    let rows = ["decode", "prefill 32", "prefill 512"];
    println!("{} threads; tokens/s: median (min - max)", num_threads());
    for (index, row) in rows.iter().enumerate() {
        let [ours, candle] = [0, 1].map(|side| spread(&rates[side], index));
        println!(
            "{row:12} ours {:8.1} ({:.1} - {:.1})   candle {:8.1} ({:.1} - {:.1})   ratio {:.2}",
            ours[1],
            ours[0],
            ours[2],
            candle[1],
            candle[0],
            candle[2],
            ours[1] / candle[1]
        );
    }
    Ok(())
}

fn num_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn spread(rates: &[Rates], index: usize) -> [f64; 3] {
    let mut values: Vec<f64> = rates.iter().map(|rates| rates[index]).collect();
    values.sort_by(f64::total_cmp);
    [values[0], values[values.len() / 2], values[values.len() - 1]]
}

fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| 1000 + i * 37 % 50_000).collect()
}

fn load_ours(path: &Path) -> anyhow::Result<DraftedRunner<ModelRunner>> {
    let options = LoadOptions {
        device: ModelDevice::Cpu,
        gpu_memory_utilization: 0.9,
        execution: Execution::Eager,
        kv_cache_bytes: Some(64 << 20),
        kv_cache_dtype: KvDtype::F16,
        max_model_len: None,
        rope_scaling: qwen_server::config::RopeScalingChoice::Auto,
        block_size: BLOCK_SIZE,
        max_num_seqs: 1,
        max_num_batched_tokens: 512,
        num_threads: num_threads(),
        adapters: (0, 0),
    };
    PlannedModel::open(path, options)?.load(|_| {})
}

fn step_ours(
    runner: &mut DraftedRunner<ModelRunner>,
    start: usize,
    tokens: Vec<u32>,
) -> anyhow::Result<u32> {
    let num_blocks = (start + tokens.len()).div_ceil(BLOCK_SIZE) as u32;
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let step = SchedulerOutput {
        scheduled: vec![ScheduledSeq {
            id: SeqId(0),
            start,
            tokens,
            blocks: (0..num_blocks).map(BlockId).collect::<BlockTable>(),
            sample: Some(SampleRequest {
                params: Arc::new(greedy),
                choice: 0,
                num_output_tokens: 0,
                forbidden: Vec::new(),
                history: None,
            }),
            prompt_logprobs: None,
            pool: None,
            num_drafts: 0,
            token_before: None,
            adapter: None,
            drawn_by: None,
            rope_start: 0,
        }],
        preempted: Vec::new(),
    };
    runner.launch(&step)?;
    let mut outputs = runner.sample(&step, &TokenMasks::new())?;
    let sampled = outputs.remove(0).sampled.expect("a sample was asked for")?;
    Ok(sampled.id)
}

fn measure_ours(runner: &mut DraftedRunner<ModelRunner>) -> anyhow::Result<Rates> {
    let mut rates = Rates::default();
    for (index, &len) in PREFILL_TOKENS.iter().enumerate() {
        let start = Instant::now();
        step_ours(runner, 0, prompt(len))?;
        rates[1 + index] = len as f64 / start.elapsed().as_secs_f64();
    }
    let mut token = step_ours(runner, 0, prompt(32))?;
    let start = Instant::now();
    for position in 32..32 + DECODE_TOKENS {
        token = step_ours(runner, position, vec![token])?;
    }
    rates[0] = DECODE_TOKENS as f64 / start.elapsed().as_secs_f64();
    Ok(rates)
}

fn load_candle(path: &Path) -> anyhow::Result<ModelWeights> {
    let mut file = std::fs::File::open(path)?;
    let content = gguf_file::Content::read(&mut file)?;
    Ok(ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?)
}

fn step_candle(model: &mut ModelWeights, start: usize, tokens: &[u32]) -> anyhow::Result<u32> {
    let input = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
    let logits = model.forward(&input, start)?.squeeze(0)?;
    Ok(logits.argmax(0)?.to_scalar::<u32>()?)
}

fn measure_candle(model: &mut ModelWeights) -> anyhow::Result<Rates> {
    let mut rates = Rates::default();
    for (index, &len) in PREFILL_TOKENS.iter().enumerate() {
        model.clear_kv_cache();
        let start = Instant::now();
        step_candle(model, 0, &prompt(len))?;
        rates[1 + index] = len as f64 / start.elapsed().as_secs_f64();
    }
    model.clear_kv_cache();
    let mut token = step_candle(model, 0, &prompt(32))?;
    let start = Instant::now();
    for position in 32..32 + DECODE_TOKENS {
        token = step_candle(model, position, &[token])?;
    }
    rates[0] = DECODE_TOKENS as f64 / start.elapsed().as_secs_f64();
    Ok(rates)
}
