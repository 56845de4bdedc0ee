//! Routes against those of the processor; products with an expert's weights against the ordinary
//! product with that expert's matrix, which has tests of its own.

use candle_core::quantized::GgmlDType;

use super::super::CpuRoutes;
use super::*;
use crate::ops::gguf_blocks::tests::{Random, random_blocks};
use crate::ops::matmul::{MatrixSource, Stacking};
use crate::ops::row_format::RowFormat;
use crate::ops::row_format::tests::random_rows;
use crate::ops::tensor::{Device, Tensor};

const NUM_EXPERTS: usize = 7;
const NUM_CHOSEN: usize = 3;

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.float()).collect()
}

fn words(buffer: &DeviceBuffer) -> Vec<u32> {
    bytemuck::pod_collect_to_vec(&buffer.download().unwrap())
}

/// Routes of a card, and the processor's for the same logits.
fn routes(
    gpu: &Gpu,
    logits: &[f32],
    num_experts: usize,
    (num_chosen, normalised): (usize, bool),
) -> (GpuRoutes, CpuRoutes) {
    let shape = (logits.len() / num_experts, num_experts);
    let on_card = GpuTensor::from_slice(gpu, logits, DType::F32, shape).unwrap();
    let on_cpu = Tensor::from_vec(logits.to_vec(), shape, &Device::Cpu).unwrap();
    (
        choose(&on_card, num_chosen, normalised).unwrap(),
        CpuRoutes::choose(&on_cpu, num_chosen, normalised).unwrap(),
    )
}

#[test]
fn a_card_chooses_the_experts_that_the_processor_does() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for (num_experts, num_chosen) in [(2, 1), (6, 2), (8, 8), (60, 4), (128, 8), (130, 32)] {
        for normalised in [false, true] {
            let mut logits = random(5 * num_experts, 7);
            // Equal ones, zeros of both signs, and extremes.
            logits[..num_experts].fill(0.5);
            logits[num_experts] = -0.0;
            logits[2 * num_experts - 1] = 0.0;
            logits[3 * num_experts - 1] = 1e30;
            logits[4 * num_experts - 1] = f32::NEG_INFINITY;
            let (found, expected) = routes(&gpu, &logits, num_experts, (num_chosen, normalised));
            let weights: Vec<f32> =
                bytemuck::pod_collect_to_vec(&found.weights.download().unwrap());
            let found = words(&found.experts).into_iter().zip(weights);
            for ((expert, weight), choice) in found.zip(&expected.choices) {
                assert_eq!(expert as usize, choice.expert, "{num_chosen} of {num_experts}");
                let error = (weight - choice.weight).abs();
                assert!(error <= 2e-6 * choice.weight, "{weight}, not {}", choice.weight);
            }
        }
    }
    let logits = GpuTensor::from_slice(&gpu, &[0.0; 40], DType::F32, (1, 40)).unwrap();
    assert!(choose(&logits, 33, true).is_err());
}

#[test]
fn rows_of_an_expert_stand_together_in_the_order_of_tokens() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for num_tokens in [17, 40, 100] {
        // The last expert but one is nobody's.
        let mut logits = random(num_tokens * NUM_EXPERTS, 3);
        logits.chunks_mut(NUM_EXPERTS).for_each(|row| row[NUM_EXPERTS - 2] = -9.0);
        let (found, expected) = routes(&gpu, &logits, NUM_EXPERTS, (NUM_CHOSEN, true));
        let groups = found.groups.unwrap();
        let (rows, blocks) = (words(&groups.rows), words(&groups.blocks));
        assert_eq!(rows.len(), max_group_rows(num_tokens * NUM_CHOSEN, NUM_EXPERTS));
        let mut at = 0;
        let by_expert = expected.tokens_by_expert();
        assert!(by_expert[NUM_EXPERTS - 2].is_empty());
        for (expert, tokens) in by_expert.iter().enumerate() {
            let end = at + tokens.len().next_multiple_of(GROUP_ROWS);
            assert_eq!(&rows[at..at + tokens.len()], tokens.as_slice());
            assert!(rows[at + tokens.len()..end].iter().all(|row| *row == u32::MAX));
            assert!(blocks[at / 32..end / 32].iter().all(|of| *of as usize == expert));
            at = end;
        }
        assert!(rows[at..].iter().chain(&blocks[at / 32..]).all(|rest| *rest == u32::MAX));
        for (choice, source) in words(&groups.sources).into_iter().enumerate() {
            assert_eq!(rows[source as usize] as usize, choice / NUM_CHOSEN);
            assert_eq!(blocks[source as usize / 32] as usize, expected.choices[choice].expert);
        }
    }
}

/// Matrices of all experts, of the same sources.
fn experts(
    gpu: &Gpu,
    formats: &[RowFormat],
    (num_rows, num_cols): (usize, usize),
    stacking: Stacking,
) -> Vec<GpuMatrix> {
    let blocks: Vec<Vec<_>> = (0..NUM_EXPERTS)
        .map(|expert| {
            let rows = |(seed, format): (u64, &RowFormat)| {
                random_rows(*format, (num_rows, num_cols), seed * 100 + expert as u64)
            };
            (1..).zip(formats).map(rows).collect()
        })
        .collect();
    let source = |(data, format): (_, &RowFormat)| MatrixSource { format: *format, data, num_rows };
    let sources: Vec<Vec<_>> = blocks
        .iter()
        .map(|blocks: &Vec<Vec<u8>>| {
            blocks.iter().map(Vec::as_slice).zip(formats).map(source).collect()
        })
        .collect();
    GpuMatrix::pack_each(gpu, &sources, num_cols, stacking).unwrap()
}

/// Half a unit of `bf16`, for sums in another order; gates make it two.
fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(0.0_f32, |size, value| size.max(value.abs()));
    for (found, expected) in found.iter().zip(expected) {
        let tolerance = expected.abs() / 64.0 + size * 1e-4;
        assert!((found - expected).abs() <= tolerance, "{what}: {found}, not {expected}");
    }
}

#[test]
fn each_row_meets_the_weights_of_its_expert() {
    use GgmlDType::{BF16, F16, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    let Some(gpu) = Gpu::for_tests() else { return };
    let in_gguf = [
        [Q4_0, Q4_0],
        [Q4_1, Q4_1],
        [Q5_0, Q5_0],
        [Q5_1, Q5_1],
        [Q8_0, Q8_0],
        [Q2K, Q2K],
        [Q3K, Q3K],
        [Q4K, Q4K],
        [Q5K, Q5K],
        [Q6K, Q6K],
        [BF16, F16],
        [BF16, BF16],
        [Q4_0, Q8_0],
    ];
    let in_gguf = in_gguf.map(|both| both.map(RowFormat::from));
    for formats in in_gguf.into_iter().chain([[RowFormat::Fp8; 2]]) {
        // Neither rows nor, of small blocks, columns are whole tiles.
        let shape = (40, if formats[0].block_len() == 256 { 512 } else { 160 });
        let matrices = experts(&gpu, &formats, shape, Stacking::Gated);
        for num_tokens in [1, 5, 16, 17, 45] {
            let what = format!("{formats:?}, {num_tokens} tokens");
            let logits = random(num_tokens * NUM_EXPERTS, 11);
            let (routes, expected) = routes(&gpu, &logits, NUM_EXPERTS, (NUM_CHOSEN, false));
            let x = random(num_tokens * shape.1, 5);
            let x = GpuTensor::from_slice(&gpu, &x, DType::BF16, (num_tokens, shape.1)).unwrap();
            let made = routes.spread(&x).unwrap().gated_matmul(&matrices[0]).unwrap();
            let sources = routes.groups.as_ref().map(|groups| words(&groups.sources));
            for (choice, to) in expected.choices.iter().enumerate() {
                let own = matrices[to.expert].gated_matmul(&x.narrow(choice / NUM_CHOSEN, 1));
                let row = sources.as_ref().map_or(choice, |sources| sources[choice] as usize);
                let found = made.rows.narrow(row, 1).to_vec().unwrap();
                assert_close(&found, &own.unwrap().to_vec().unwrap(), &what);
            }
        }
    }
}

/// Goal: the sum is the processor's. Method: the same rows of results on both.
#[test]
fn outputs_are_added_by_weight() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for num_tokens in [3, 20] {
        let logits = random(num_tokens * NUM_EXPERTS, 2);
        let (routes, expected) = routes(&gpu, &logits, NUM_EXPERTS, (NUM_CHOSEN, true));
        let x = random(num_tokens * 12, 9);
        let x = GpuTensor::from_slice(&gpu, &x, DType::BF16, (num_tokens, 12)).unwrap();
        // Every expert gives back what it gets.
        let rows = if routes.groups.is_some() {
            routes.spread(&x).unwrap().rows
        } else {
            let tokens = (0..num_tokens as u32).flat_map(|token| [token; NUM_CHOSEN]);
            let tokens: Vec<u32> = tokens.collect();
            let buffer = gpu.alloc_from(bytemuck::cast_slice(&tokens)).unwrap();
            gather_by_card(&x, &buffer, tokens.len()).unwrap()
        };
        let order = RowOrder::Groups { blocks: gpu.alloc(0).unwrap() };
        let found = routes.combine(&GpuRows { rows, order }).unwrap().to_vec().unwrap();
        assert_close(&found, &x.to_vec().unwrap(), "weights that sum up to one");
        assert_eq!(expected.choices.len(), num_tokens * NUM_CHOSEN);
    }
}

#[test]
fn company_of_few_changes_no_bit() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let gate_up = experts(&gpu, &[GgmlDType::Q4K.into(); 2], (256, 256), Stacking::Gated);
    let down = experts(&gpu, &[GgmlDType::Q6K.into()], (24, 256), Stacking::Below);
    let (logits, x) = (random(16 * NUM_EXPERTS, 4), random(16 * 256, 6));
    let run = |tokens: std::ops::Range<usize>| {
        let logits = &logits[tokens.start * NUM_EXPERTS..tokens.end * NUM_EXPERTS];
        let (routes, _) = routes(&gpu, logits, NUM_EXPERTS, (NUM_CHOSEN, true));
        let x = &x[tokens.start * 256..tokens.end * 256];
        let x = GpuTensor::from_slice(&gpu, x, DType::BF16, (tokens.len(), 256)).unwrap();
        let gated = routes.spread(&x).unwrap().gated_matmul(&gate_up[0]).unwrap();
        routes.combine(&gated.matmul(&down[0]).unwrap()).unwrap().to_vec().unwrap()
    };
    let together = run(0..16);
    for token in 0..16 {
        assert_eq!(run(token..token + 1), together[token * 24..(token + 1) * 24], "token {token}");
    }
}

#[test]
fn experts_in_different_formats_are_refused() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let data = random_blocks(GgmlDType::Q8_0, 64, 1);
    let source =
        |dtype: GgmlDType, data| vec![MatrixSource { format: dtype.into(), data, num_rows: 1 }];
    let halves = [0_u8; 128];
    let sources = [source(GgmlDType::Q8_0, &data), source(GgmlDType::F16, &halves)];
    assert!(GpuMatrix::pack_each(&gpu, &sources, 64, Stacking::Below).is_err());
    assert!(GpuMatrix::pack_each(&gpu, &sources[..1], 64, Stacking::Below).is_ok());
}

#[test]
fn gates_open_as_on_the_processor() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let values = random(3 * 8, 1);
    let tensor = |values: &[f32], dtype, num_cols| {
        GpuTensor::from_slice(&gpu, values, dtype, (3, num_cols)).unwrap()
    };
    let (x, y) = (tensor(&values, DType::BF16, 8), tensor(&random(24, 2), DType::BF16, 8));
    let gates = tensor(&[0.3, -200.0, 90.0], DType::F32, 1);
    let on_cpu = |tensor: &GpuTensor| {
        let shape = (tensor.num_rows, tensor.num_cols);
        Tensor::from_vec(tensor.to_vec().unwrap(), shape, &Device::Cpu).unwrap()
    };
    let expected = super::super::add_gated(&on_cpu(&x), &on_cpu(&gates), &on_cpu(&y)).unwrap();
    let found = add_gated(&x, &gates, &y).unwrap().to_vec().unwrap();
    assert_close(&found, &expected.to_vec().unwrap(), "gates");
    assert!(add_gated(&x, &y, &y).is_err());
}
