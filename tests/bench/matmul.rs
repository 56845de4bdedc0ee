//! Matrix products of Qwen2.5-0.5B beside the memory's bandwidth and candle's `QMatMul`.
//!
//! Run with `cargo bench --bench matmul`; names of matrices or formats and numbers of tokens after
//! `--` pick rows of the table, `alone` leaves candle out. Each figure is the median of several
//! runs with minimum and maximum. Both sides go over several copies of the weights in turn, so that
//! no cache holds them.

use std::borrow::Cow;
use std::fmt::{self, Display, Formatter};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Tensor};
use qwen_server::device::memory::keep_freed_memory;
use qwen_server::device::threads::{ThreadPool, parallel_for};
use qwen_server::ops::matmul::{MatrixSource, PackedMatrix, Weights, matmul};
use qwen_server::ops::random_rows::random_rows;
use qwen_server::ops::row_format::RowFormat;
use qwen_server::ops::tensor::Tensor as Activations;

struct Case {
    name: &'static str,
    format: RowFormat,
    num_cols: usize,
    num_rows: usize,
}

const CASES: [Case; 8] = [
    Case { name: "qkv", format: RowFormat::Gguf(GgmlDType::Q5_0), num_cols: 896, num_rows: 1152 },
    Case { name: "o", format: RowFormat::Gguf(GgmlDType::Q5_0), num_cols: 896, num_rows: 896 },
    Case {
        name: "gate_up",
        format: RowFormat::Gguf(GgmlDType::Q5_0),
        num_cols: 896,
        num_rows: 9728,
    },
    Case { name: "down", format: RowFormat::Gguf(GgmlDType::Q6K), num_cols: 4864, num_rows: 896 },
    Case { name: "down", format: RowFormat::Gguf(GgmlDType::Q4K), num_cols: 4864, num_rows: 896 },
    Case {
        name: "head",
        format: RowFormat::Gguf(GgmlDType::Q8_0),
        num_cols: 896,
        num_rows: 151_936,
    },
    Case { name: "gate_up", format: RowFormat::Fp8, num_cols: 896, num_rows: 9728 },
    Case {
        name: "gate_up",
        format: RowFormat::Gguf(GgmlDType::F16),
        num_cols: 896,
        num_rows: 9728,
    },
];

/// More than the last-level caches of the machines in question.
const WORKING_SET: usize = 256 << 20;

fn main() {
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let words: Vec<String> =
        std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let (alone, words): (Vec<_>, Vec<_>) = words.into_iter().partition(|word| word == "alone");
    let (counts, words): (Vec<_>, Vec<_>) =
        words.into_iter().partition(|word| word.parse::<usize>().is_ok());
    let mut counts: Vec<usize> = counts.iter().filter_map(|word| word.parse().ok()).collect();
    if counts.is_empty() {
        counts = vec![1, 8, 64, 512];
    }
    keep_freed_memory();
    let pool = ThreadPool::new(num_threads);
    pool.install(|| {
        let bandwidth = read_bandwidth();
        println!("{num_threads} threads, reading {:.1} GB/s", bandwidth / 1e9);
        println!(
            "| matrix | format | tokens | ms (min, max) | GB/s | of read | G MAC/s | candle | ratio |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
        for case in &CASES {
            let format = case.format.to_string();
            if words.is_empty() || words.iter().any(|word| *word == case.name || *word == format) {
                run(case, bandwidth, &counts, alone.is_empty());
            }
        }
    });
}

fn run(case: &Case, bandwidth: f64, counts: &[usize], with_candle: bool) {
    let shape = (case.num_rows, case.num_cols);
    let data = random_rows(case.format, shape, 1).expect("whole blocks");
    let source = MatrixSource { format: case.format, data: &data, num_rows: case.num_rows };
    let num_copies = (WORKING_SET / data.len()).clamp(1, 64);
    let packed: Vec<_> = (0..num_copies)
        .map(|_| {
            let packed = PackedMatrix::pack(&[source], case.num_cols).expect("a valid matrix");
            Weights::Cpu(Arc::new(packed))
        })
        .collect();
    let packing = times(|_| {
        let packed = PackedMatrix::pack(&[source], case.num_cols);
        black_box(packed.expect("a valid matrix"));
    });
    println!("| {} | {} | packing | {packing} | | | | | |", case.name, case.format);
    let of_candle = case.format.gguf().filter(|_| with_candle);
    let candles: Vec<_> = of_candle
        .iter()
        .flat_map(|dtype| (0..num_copies).map(|_| candle_matrix(*dtype, shape, &data)))
        .collect();
    for &num_tokens in counts {
        if case.name == "head" && 64 < num_tokens {
            continue;
        }
        let x = Tensor::randn(0f32, 1.0, (num_tokens, case.num_cols), &Device::Cpu);
        let x = x.expect("a valid shape");
        let activations = Activations::Cpu(x.clone());
        let ours = times(|turn| {
            black_box(matmul(&activations, &packed[turn % num_copies], None).expect("shapes fit"));
        });
        let candle = of_candle.map(|_| {
            times(|turn| {
                black_box(candles[turn % num_copies].forward(&x).expect("shapes fit"));
            })
        });
        let num_bytes = packed[0].num_bytes();
        let seconds = ours.median.as_secs_f64();
        let rate = num_bytes as f64 / seconds;
        let macs = (num_tokens * case.num_rows * case.num_cols) as f64 / seconds;
        print!(
            "| {} | {} | {num_tokens} | {ours} | {:.1} | {:.0} % | {:.0} |",
            case.name,
            case.format,
            rate / 1e9,
            100.0 * rate / bandwidth,
            macs / 1e9,
        );
        match candle {
            Some(candle) => {
                println!(" {candle} | {:.2} |", candle.median.as_secs_f64() / seconds);
            }
            None => println!(" - | - |"),
        }
    }
}

fn candle_matrix(dtype: GgmlDType, shape: (usize, usize), data: &[u8]) -> QMatMul {
    let storage = QStorage::from_data(Cow::Borrowed(data), &Device::Cpu, dtype);
    let tensor = QTensor::new(storage.expect("valid data"), shape);
    QMatMul::from_qtensor(tensor.expect("a valid shape")).expect("a valid matrix")
}

struct Times {
    median: Duration,
    min: Duration,
    max: Duration,
}

impl Display for Times {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let [median, min, max] =
            [self.median, self.min, self.max].map(|time| time.as_secs_f64() * 1e3);
        write!(f, "{median:.3} ({min:.3}, {max:.3})")
    }
}

/// At least five runs and about half a second, after one to warm up.
fn times(mut work: impl FnMut(usize)) -> Times {
    work(0);
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || start.elapsed() < Duration::from_millis(500) {
        let before = Instant::now();
        work(times.len() + 1);
        times.push(before.elapsed());
    }
    times.sort();
    Times { median: times[times.len() / 2], min: times[0], max: times[times.len() - 1] }
}

/// Bytes a second that all threads together read from memory.
fn read_bandwidth() -> f64 {
    let words = vec![1u64; WORKING_SET / 8];
    let chunk = words.len() / 64;
    let time = times(|_| {
        parallel_for(64, |task| {
            let sum: u64 = words[task * chunk..(task + 1) * chunk].iter().sum();
            black_box(sum);
        });
    });
    WORKING_SET as f64 / time.median.as_secs_f64()
}
