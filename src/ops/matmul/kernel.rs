//! The inner loops, written once over instruction set, format and number of tokens.
//!
//! **Invariant:** each output is accumulated over the blocks of its row in ascending order with the
//! same float operations, whatever the instruction set, the number of tokens, and whether the panel
//! was unpacked before.

use std::ops::Range;

use candle_core::quantized::GgmlDType;

use super::RowFormat;
use super::format::{
    BLOCK, Format, GROUP_BYTES, GROUPS, Half, HalfMin, SuperHalves, SuperMin, SuperNibbles,
    Unpacked, load_groups, unpacked_min_at, unpacked_scale_at,
};
use super::fp8;
#[cfg(target_arch = "x86_64")]
use super::pair::{PAIR_WIDTH, pair};
#[cfg(target_arch = "x86_64")]
use super::simd::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::simd::avx512::Avx512;
use super::simd::portable::Portable;
use super::simd::{Isa, LANES, Simd};

/// The most tokens that a kernel computes at a time.
pub(super) const MAX_WIDTH: usize = 8;

/// What a kernel writes: sixteen rows of each token.
pub(super) type Tile = [[f32; LANES]; MAX_WIDTH];

/// A panel and the activations of a group of tokens, as many as the kernel is for.
#[derive(Clone, Copy)]
pub(super) struct PanelArgs {
    /// Integers and then scales, or floats `[column][row]`.
    pub(super) panel: *const u8,
    /// Bytes to the next panel of the matrix.
    pub(super) panel_bytes: usize,
    /// Blocks of 32 columns, or columns in the dense case.
    pub(super) num_blocks: usize,
    /// `[block][token][32]` integers, or `[column][token]` floats in the dense case.
    pub(super) x: *const u8,
    /// `[block][token]`.
    pub(super) x_scales: *const f32,
    /// `[block][half][token]`: negative sums of the integers, or the same times the scale as `f32`
    /// for formats with a minimum.
    pub(super) x_sums: *const i32,
    /// What the products are added to: zeros, or what earlier blocks gave.
    pub(super) start: *const Tile,
    /// Where the sums go; may be where they start.
    pub(super) sums: *mut Tile,
}

/// Adds up the products of one panel.
///
/// # Safety
/// The processor has the kernel's instruction set, and the pointers of the arguments are valid for
/// the format and the number of tokens.
pub(super) type PanelKernel = unsafe fn(&PanelArgs);

/// Adds up the products of two panels of integers, that of the arguments and one that lies so many
/// bytes behind. The second one's tiles follow the first one's.
///
/// # Safety
/// As for [`PanelKernel`].
pub(super) type PairKernel = unsafe fn(&PanelArgs, usize);

/// Expands the integers and scales of some blocks of a panel that has so many.
///
/// # Safety
/// As for [`PanelKernel`]; there is room for [`super::format::max_unpacked_bytes`], aligned to
/// `f32`.
pub(super) type UnpackKernel = unsafe fn(*const u8, usize, Range<usize>, *mut u8);

/// The code for one format on one instruction set.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    /// For groups of 1, 2, 4 and 8 tokens.
    pub(super) by_width: [PanelKernel; 4],
    /// Nothing for floats.
    pub(super) unpacking: Option<Unpacking>,
}

/// The way that pays for many tokens: expand once, then use bytes.
#[derive(Clone, Copy)]
pub(super) struct Unpacking {
    pub(super) unpack: UnpackKernel,
    pub(super) by_width: [PanelKernel; 4],
    /// For two panels and a group of 8 tokens, where there are registers enough.
    pub(super) pair: Option<PairKernel>,
}

impl Kernels {
    pub(super) fn new(isa: Isa, format: RowFormat) -> Self {
        let dtype = match format {
            RowFormat::Gguf(dtype) => dtype,
            RowFormat::Fp8 => return Self { by_width: fp8::by_width(isa), unpacking: None },
        };
        match dtype {
            GgmlDType::F32 => dense::<F32>(isa),
            GgmlDType::F16 => dense::<F16>(isa),
            GgmlDType::BF16 => dense::<Bf16>(isa),
            GgmlDType::Q4_0 => quantized::<Half<4, 3>>(isa),
            GgmlDType::Q4_1 => quantized::<HalfMin<4>>(isa),
            GgmlDType::Q5_0 => quantized::<Half<5, 4>>(isa),
            GgmlDType::Q5_1 => quantized::<HalfMin<5>>(isa),
            GgmlDType::Q8_0 | GgmlDType::Q8_1 => quantized::<Half<8, 7>>(isa),
            GgmlDType::Q2K => quantized::<SuperNibbles<2>>(isa),
            GgmlDType::Q3K => quantized::<SuperHalves<3, 2>>(isa),
            GgmlDType::Q4K => quantized::<SuperMin<4>>(isa),
            GgmlDType::Q5K => quantized::<SuperMin<5>>(isa),
            GgmlDType::Q6K => quantized::<SuperHalves<6, 5>>(isa),
            GgmlDType::Q8K => quantized::<Unpacked<1, 7, false>>(isa),
        }
    }
}

fn quantized<F: Format>(isa: Isa) -> Kernels {
    Kernels {
        by_width: quantized_by_width::<F>(isa),
        unpacking: Some(Unpacking {
            unpack: match isa {
                Isa::Portable => unpack::<Portable, F>,
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 | Isa::AvxVnni => unpack_avx2::<F>,
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unpack_avx512::<F>,
            },
            by_width: quantized_by_width::<F::Unpacked>(isa),
            pair: match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => Some(pair_avx512::<F::Unpacked>),
                _ => None,
            },
        }),
    }
}

fn quantized_by_width<F: Format>(isa: Isa) -> [PanelKernel; 4] {
    match isa {
        Isa::Portable => [
            panel::<Portable, F, 1>,
            panel::<Portable, F, 2>,
            panel::<Portable, F, 4>,
            panel::<Portable, F, 8>,
        ],
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            [panel_avx2::<F, 1>, panel_avx2::<F, 2>, panel_avx2::<F, 4>, panel_avx2::<F, 8>]
        }
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => [
            panel_avx_vnni::<F, 1>,
            panel_avx_vnni::<F, 2>,
            panel_avx_vnni::<F, 4>,
            panel_avx_vnni::<F, 8>,
        ],
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            [panel_avx512::<F, 1>, panel_avx512::<F, 2>, panel_avx512::<F, 4>, panel_avx512::<F, 8>]
        }
    }
}

fn dense<E: Element>(isa: Isa) -> Kernels {
    let by_width: [PanelKernel; 4] = match isa {
        Isa::Portable => [
            dense_panel::<Portable, E, 1>,
            dense_panel::<Portable, E, 2>,
            dense_panel::<Portable, E, 4>,
            dense_panel::<Portable, E, 8>,
        ],
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => {
            [dense_avx2::<E, 1>, dense_avx2::<E, 2>, dense_avx2::<E, 4>, dense_avx2::<E, 8>]
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            [dense_avx512::<E, 1>, dense_avx512::<E, 2>, dense_avx512::<E, 4>, dense_avx512::<E, 8>]
        }
    };
    Kernels { by_width, unpacking: None }
}

/// # Safety
/// See [`PanelKernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn panel_avx2<F: Format, const T: usize>(args: &PanelArgs) {
    // SAFETY: the caller's promise.
    unsafe { panel::<Avx2<false>, F, T>(args) };
}

/// # Safety
/// See [`PanelKernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn panel_avx_vnni<F: Format, const T: usize>(args: &PanelArgs) {
    // SAFETY: the caller's promise.
    unsafe { panel::<Avx2<true>, F, T>(args) };
}

/// # Safety
/// See [`PanelKernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn panel_avx512<F: Format, const T: usize>(args: &PanelArgs) {
    // SAFETY: the caller's promise.
    unsafe { panel::<Avx512, F, T>(args) };
}

/// # Safety
/// See [`UnpackKernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack_avx2<F: Format>(
    from: *const u8,
    num_blocks: usize,
    blocks: Range<usize>,
    to: *mut u8,
) {
    // SAFETY: the caller's promise.
    unsafe { unpack::<Avx2<false>, F>(from, num_blocks, blocks, to) };
}

/// # Safety
/// See [`UnpackKernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn unpack_avx512<F: Format>(
    from: *const u8,
    num_blocks: usize,
    blocks: Range<usize>,
    to: *mut u8,
) {
    // SAFETY: the caller's promise.
    unsafe { unpack::<Avx512, F>(from, num_blocks, blocks, to) };
}

/// # Safety
/// See [`PanelKernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dense_avx2<E: Element, const T: usize>(args: &PanelArgs) {
    // SAFETY: the caller's promise.
    unsafe { dense_panel::<Avx2<false>, E, T>(args) };
}

/// # Safety
/// See [`PanelKernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dense_avx512<E: Element, const T: usize>(args: &PanelArgs) {
    // SAFETY: the caller's promise.
    unsafe { dense_panel::<Avx512, E, T>(args) };
}

/// # Safety
/// See [`PairKernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn pair_avx512<F: Format>(args: &PanelArgs, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        pair::<Avx512, F>(args, stride, 0);
        pair::<Avx512, F>(args, stride, PAIR_WIDTH);
    }
}

/// How far ahead of the weights in use to ask for the next ones. Hardware alone reaches a third of
/// this bandwidth: while the arithmetic of a block fills the processor's window, it sees too few
/// addresses.
const PREFETCH_BYTES: usize = 4096;

/// Integer weights. Loops count with `while` and use no closures: those would be compiled without
/// the instruction set.
///
/// # Safety
/// See [`PanelKernel`].
#[inline(always)]
unsafe fn panel<S: Simd, F: Format, const T: usize>(args: &PanelArgs) {
    let quants = args.panel;
    // SAFETY: the caller's promise: `num_blocks` blocks of integers, then their scales; activations
    // as described.
    unsafe {
        let scales = quants.add(args.num_blocks * F::BITS * GROUP_BYTES);
        let mut sums = load_tile::<S, T>(args.start);
        let mut block = 0;
        while block < args.num_blocks {
            let from = quants.add(block * F::BITS * GROUP_BYTES);
            prefetch_block::<S, F>(quants, block);
            if F::IS_STREAMED {
                // The scales stand behind the integers, where no earlier prefetch has been. Those
                // of the next panel are asked for now.
                let next = scales.wrapping_add(args.panel_bytes);
                S::prefetch(next.wrapping_add(block * (F::BLOCK_BYTES - F::BITS * GROUP_BYTES)));
            }
            let groups = load_block::<S, F>(from);
            let mut half = 0;
            while half < F::HALVES {
                let scale = F::scale::<S>(scales, block, half);
                let min = F::min::<S>(scales, block, half);
                let mut t = 0;
                while t < T {
                    let x = args.x.add((block * T + t) * BLOCK).cast::<i8>();
                    let x_scale = S::splat(*args.x_scales.add(block * T + t));
                    let x_sum = *args.x_sums.add((block * F::HALVES + half) * T + t);
                    let dot = S::to_floats(dot::<S, F>(&groups, x, half, x_sum));
                    sums[t] = S::mul_add(dot, S::mul(scale, x_scale), sums[t]);
                    if F::HAS_MIN {
                        let x_sum = S::splat(f32::from_bits(x_sum as u32));
                        sums[t] = S::mul_add(min, x_sum, sums[t]);
                    }
                    t += 1;
                }
                half += 1;
            }
            block += 1;
        }
        store_tile::<S, T>(sums, args.sums);
    }
}

/// # Safety
/// As for [`Simd`]; there is a tile.
#[inline(always)]
pub(super) unsafe fn load_tile<S: Simd, const T: usize>(tile: *const Tile) -> [S::Floats; T] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [S::splat(0.0); T];
        let mut t = 0;
        while t < T {
            sums[t] = S::load_f32(tile.cast::<f32>().add(t * LANES));
            t += 1;
        }
        sums
    }
}

/// # Safety
/// As for [`load_tile`].
#[inline(always)]
pub(super) unsafe fn store_tile<S: Simd, const T: usize>(sums: [S::Floats; T], tile: *mut Tile) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut t = 0;
        while t < T {
            S::store_f32(sums[t], tile.cast::<f32>().add(t * LANES));
            t += 1;
        }
    }
}

/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn prefetch_block<S: Simd, F: Format>(panel: *const u8, block: usize) {
    if !F::IS_STREAMED {
        return;
    }
    let ahead = panel.wrapping_add(block * F::BLOCK_BYTES + PREFETCH_BYTES);
    let mut at = 0;
    while at < F::BLOCK_BYTES {
        // SAFETY: the caller's promise.
        unsafe { S::prefetch(ahead.wrapping_add(at)) };
        at += 64;
    }
}

/// # Safety
/// See [`load_groups`].
#[inline(always)]
unsafe fn load_block<S: Simd, F: Format>(from: *const u8) -> [S::Bytes; GROUPS] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut groups = load_groups_of::<S, F>(from);
        if F::OFFSET_LOG2 == 7 {
            let mut g = 0;
            while g < GROUPS {
                groups[g] = S::widen(groups[g]);
                g += 1;
            }
        }
        groups
    }
}

/// # Safety
/// See [`load_groups`].
#[inline(always)]
unsafe fn load_groups_of<S: Simd, F: Format>(from: *const u8) -> [S::Bytes; GROUPS] {
    // SAFETY: the caller's promise.
    unsafe {
        match F::BITS {
            2 => load_groups::<S, 2>(from),
            3 => load_groups::<S, 3>(from),
            4 => load_groups::<S, 4>(from),
            5 => load_groups::<S, 5>(from),
            6 => load_groups::<S, 6>(from),
            _ => load_groups::<S, 8>(from),
        }
    }
}

/// The integer products of one block, or half of it, and one token, the offset taken into account.
///
/// # Safety
/// See [`PanelKernel`]; `x` points to the 32 integers of the block.
#[inline(always)]
unsafe fn dot<S: Simd, F: Format>(
    groups: &[S::Bytes; GROUPS],
    x: *const i8,
    half: usize,
    x_sum: i32,
) -> S::Ints {
    // SAFETY: the caller's promise.
    unsafe {
        let is_wide = F::OFFSET_LOG2 == 7;
        let mut dot = begin::<S, F>(x_sum);
        let mut g = half * GROUPS / F::HALVES;
        while g < (half + 1) * GROUPS / F::HALVES {
            let x = S::load_activations(x.add(4 * g));
            dot = if is_wide { S::dot_wide(dot, groups[g], x) } else { S::dot(dot, groups[g], x) };
            g += 1;
        }
        dot
    }
}

/// Where the integer products begin.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(super) unsafe fn begin<S: Simd, F: Format>(x_sum: i32) -> S::Ints {
    // SAFETY: the caller's promise.
    unsafe {
        if F::OFFSET_LOG2 == 7 {
            S::begin_wide(x_sum)
        } else if F::HAS_MIN {
            S::splat_int(0)
        } else {
            S::splat_int(x_sum)
        }
    }
}

/// # Safety
/// See [`UnpackKernel`].
#[inline(always)]
unsafe fn unpack<S: Simd, F: Format>(
    from: *const u8,
    num_blocks: usize,
    blocks: Range<usize>,
    to: *mut u8,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let scales = from.add(num_blocks * F::BITS * GROUP_BYTES);
        let scales_to = to.add(blocks.len() * GROUPS * GROUP_BYTES).cast::<f32>();
        let mut block = blocks.start;
        while block < blocks.end {
            prefetch_block::<S, F>(from, block);
            let groups = load_groups_of::<S, F>(from.add(block * F::BITS * GROUP_BYTES));
            let block_to = block - blocks.start;
            let mut g = 0;
            while g < GROUPS {
                S::store_bytes(groups[g], to.add((block_to * GROUPS + g) * GROUP_BYTES));
                g += 1;
            }
            let mut half = 0;
            while half < F::HALVES {
                let scale_at = unpacked_scale_at::<F>(block_to, half);
                S::store_f32(F::scale::<S>(scales, block, half), scales_to.add(scale_at));
                if F::HAS_MIN {
                    let min_at = unpacked_min_at::<F>(block_to, half);
                    S::store_f32(F::min::<S>(scales, block, half), scales_to.add(min_at));
                }
                half += 1;
            }
            block += 1;
        }
    }
}

/// A float format of weights.
trait Element {
    const BYTES: usize;

    /// # Safety
    /// As for [`Simd`]; sixteen elements can be read.
    unsafe fn load<S: Simd>(from: *const u8) -> S::Floats;
}

struct F32;
struct F16;
struct Bf16;

impl Element for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe { S::load_f32(from.cast()) }
    }
}

impl Element for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe { S::load_f16(from) }
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::Floats {
        // SAFETY: the trait's contract.
        unsafe { S::load_bf16(from) }
    }
}

/// # Safety
/// See [`PanelKernel`].
#[inline(always)]
unsafe fn dense_panel<S: Simd, E: Element, const T: usize>(args: &PanelArgs) {
    let x = args.x.cast::<f32>();
    // SAFETY: the caller's promise: `num_blocks` columns of sixteen weights and `T` activations.
    unsafe {
        let mut sums = load_tile::<S, T>(args.start);
        let mut column = 0;
        while column < args.num_blocks {
            let weights = E::load::<S>(args.panel.add(column * LANES * E::BYTES));
            let mut t = 0;
            while t < T {
                sums[t] = S::mul_add(weights, S::splat(*x.add(column * T + t)), sums[t]);
                t += 1;
            }
            column += 1;
        }
        store_tile::<S, T>(sums, args.sums);
    }
}
