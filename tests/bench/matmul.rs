//! Matrix products of Qwen2.5-0.5B beside the memory's bandwidth and candle's `QMatMul`.
//!
//! Run with `cargo bench --bench matmul`. `QWEN_BENCH_THREADS` sets the number of threads (default: all), words of the command line pick
//! the rows of the table. Each figure is the median of several runs; the weights rotate so that no cache holds them.

use std::borrow::Cow;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Tensor};
use qwen_server::device::threads::{ThreadPool, parallel_for};
use qwen_server::ops::matmul::{MatrixSource, PackedMatrix, matmul};

struct Case {
    name: &'static str,
    dtype: GgmlDType,
    num_cols: usize,
    num_rows: usize,
}

const CASES: [Case; 6] = [
    Case { name: "qkv", dtype: GgmlDType::Q5_0, num_cols: 896, num_rows: 1152 },
    Case { name: "o", dtype: GgmlDType::Q5_0, num_cols: 896, num_rows: 896 },
    Case { name: "gate_up", dtype: GgmlDType::Q5_0, num_cols: 896, num_rows: 9728 },
    Case { name: "down", dtype: GgmlDType::Q6K, num_cols: 4864, num_rows: 896 },
    Case { name: "down", dtype: GgmlDType::Q4K, num_cols: 4864, num_rows: 896 },
    Case { name: "head", dtype: GgmlDType::Q8_0, num_cols: 896, num_rows: 151_936 },
];

/// More than the last-level caches of the machines in question.
const WORKING_SET: usize = 256 << 20;

fn main() {
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let words: Vec<String> =
        std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let is_wanted = |words_of_case: &[&str]| {
        words.is_empty() || words.iter().any(|word| words_of_case.contains(&word.as_str()))
    };
    let with_candle = !words.iter().any(|word| word == "alone");
    let words: Vec<&String> = words.iter().filter(|word| *word != "alone").collect();
    let _ = &words;
    let pool = ThreadPool::new(num_threads);
    pool.install(|| {
        let bandwidth = read_bandwidth();
        println!("{num_threads} threads, reading {:.1} GB/s", bandwidth / 1e9);
        println!(
            "| matrix | format | tokens | ms | GB/s | of read | G MAC/s | candle ms | ratio |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
        for case in &CASES {
            let dtype = format!("{:?}", case.dtype);
            if is_wanted(&[case.name, &dtype, "alone"]) {
                run(case, bandwidth, with_candle);
            }
        }
    });
}

fn run(case: &Case, bandwidth: f64, with_candle: bool) {
    let data = random_blocks(case);
    let source = MatrixSource { dtype: case.dtype, data: &data, num_rows: case.num_rows };
    let num_copies = (WORKING_SET / data.len()).clamp(1, 64);
    let packed: Vec<_> = (0..num_copies)
        .map(|_| Arc::new(PackedMatrix::pack(&[source], case.num_cols).expect("a valid matrix")))
        .collect();
    let storage = QStorage::from_data(Cow::Borrowed(&data), &Device::Cpu, case.dtype);
    let theirs = QTensor::new(storage.expect("valid data"), (case.num_rows, case.num_cols));
    let theirs = QMatMul::from_qtensor(theirs.expect("a valid shape")).expect("a valid matrix");
    for num_tokens in [1usize, 8, 64, 512] {
        if case.name == "head" && 64 < num_tokens {
            continue;
        }
        let x = Tensor::randn(0f32, 1.0, (num_tokens, case.num_cols), &Device::Cpu);
        let x = x.expect("a valid shape");
        let mut turn = 0;
        let ours = median(|| {
            turn += 1;
            black_box(matmul(&x, &packed[turn % num_copies], None).expect("shapes fit"));
        });
        let theirs = with_candle.then(|| {
            median(|| {
                black_box(theirs.forward(&x).expect("shapes fit"));
            })
        });
        report(case, num_tokens, (ours, theirs), (packed[0].num_bytes(), bandwidth));
    }
}

fn report(
    case: &Case,
    num_tokens: usize,
    (ours, theirs): (Duration, Option<Duration>),
    (num_bytes, bandwidth): (usize, f64),
) {
    let seconds = ours.as_secs_f64();
    let rate = num_bytes as f64 / seconds;
    let macs = (num_tokens * case.num_rows * case.num_cols) as f64 / seconds;
    print!(
        "| {} | {:?} | {num_tokens} | {:.3} | {:.1} | {:.0} % | {:.0} |",
        case.name,
        case.dtype,
        seconds * 1e3,
        rate / 1e9,
        100.0 * rate / bandwidth,
        macs / 1e9,
    );
    match theirs.map(|theirs| theirs.as_secs_f64()) {
        Some(theirs) => println!(" {:.3} | {:.2} |", theirs * 1e3, theirs / seconds),
        None => println!(" - | - |"),
    }
}

/// Median of at least five runs and about half a second, after one to warm up.
fn median(mut work: impl FnMut()) -> Duration {
    work();
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || start.elapsed() < Duration::from_millis(500) {
        let before = Instant::now();
        work();
        times.push(before.elapsed());
    }
    times.sort();
    times[times.len() / 2]
}

/// Bytes a second that all threads together read from memory.
fn read_bandwidth() -> f64 {
    let words = vec![1u64; WORKING_SET / 8];
    let chunk = words.len() / 64;
    let time = median(|| {
        parallel_for(64, |task| {
            let sum: u64 = words[task * chunk..(task + 1) * chunk].iter().sum();
            black_box(sum);
        });
    });
    WORKING_SET as f64 / time.as_secs_f64()
}

/// Random bits with scales of about `0.001`.
fn random_blocks(case: &Case) -> Vec<u8> {
    let block_bytes = case.dtype.type_size();
    let num_blocks = case.num_rows * case.num_cols / case.dtype.block_size();
    let mut state = 1u64;
    let mut data: Vec<u8> = (0..num_blocks * block_bytes)
        .map(|_| {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    let scale = half::f16::from_f32(0.001).to_le_bytes();
    let at = if case.dtype == GgmlDType::Q6K { block_bytes - 2 } else { 0 };
    for block in data.chunks_exact_mut(block_bytes) {
        block[at..at + 2].copy_from_slice(&scale);
        if case.dtype == GgmlDType::Q4K {
            block[2..4].copy_from_slice(&scale);
        }
    }
    data
}
