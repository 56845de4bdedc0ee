//! Two panels at a time, for instruction sets with many registers: each load of activations serves
//! two products.
//!
//! **Invariant:** the float operations for an output, and their order, are those of `kernel`.

use super::format::{BLOCK, Format, GROUP_BYTES, GROUPS};
use super::kernel::{MAX_WIDTH, PanelArgs, begin};
use super::simd::{LANES, Simd};

/// Tokens of a group of eight that [`pair`] computes at a time.
pub(super) const PAIR_WIDTH: usize = 4;

/// Four tokens of a group of eight, from `first` on.
///
/// # Safety
/// See [`super::kernel::PairKernel`].
#[inline(always)]
pub(super) unsafe fn pair<S: Simd, F: Format>(args: &PanelArgs, stride: usize, first: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let quants = [args.panel, args.panel.add(stride)];
        let quant_bytes = args.num_blocks * F::BITS * GROUP_BYTES;
        let mut sums = [[S::splat(0.0); 2]; PAIR_WIDTH];
        let mut t = 0;
        while t < PAIR_WIDTH {
            sums[t][0] = S::load_f32(args.start.cast::<f32>().add((first + t) * LANES));
            sums[t][1] = S::load_f32(args.start.add(1).cast::<f32>().add((first + t) * LANES));
            t += 1;
        }
        let mut block = 0;
        while block < args.num_blocks {
            let mut half = 0;
            while half < F::HALVES {
                let token = block * MAX_WIDTH + first;
                let x = args.x.add(token * BLOCK).cast::<i8>();
                let x_sums = args.x_sums.add((block * F::HALVES + half) * MAX_WIDTH + first);
                let dots = pair_dots::<S, F>(quants, (block, half), x, x_sums);
                let mut p = 0;
                while p < 2 {
                    let scales = quants[p].add(quant_bytes);
                    let scale = F::scale::<S>(scales, block, half);
                    let min = F::min::<S>(scales, block, half);
                    t = 0;
                    while t < PAIR_WIDTH {
                        let x_scale = S::splat(*args.x_scales.add(token + t));
                        let dot = S::to_floats(dots[t][p]);
                        sums[t][p] = S::mul_add(dot, S::mul(scale, x_scale), sums[t][p]);
                        if F::HAS_MIN {
                            let x_sum = S::splat(f32::from_bits(*x_sums.add(t) as u32));
                            sums[t][p] = S::mul_add(min, x_sum, sums[t][p]);
                        }
                        t += 1;
                    }
                    p += 1;
                }
                half += 1;
            }
            block += 1;
        }
        t = 0;
        while t < PAIR_WIDTH {
            S::store_f32(sums[t][0], args.sums.cast::<f32>().add((first + t) * LANES));
            S::store_f32(sums[t][1], args.sums.add(1).cast::<f32>().add((first + t) * LANES));
            t += 1;
        }
    }
}

/// The integer products of half a block.
///
/// # Safety
/// See [`super::kernel::PairKernel`]; `x` and `x_sums` point to the first of the tokens.
#[inline(always)]
unsafe fn pair_dots<S: Simd, F: Format>(
    quants: [*const u8; 2],
    (block, half): (usize, usize),
    x: *const i8,
    x_sums: *const i32,
) -> [[S::Ints; 2]; PAIR_WIDTH] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut dots = [[S::splat_int(0); 2]; PAIR_WIDTH];
        let mut t = 0;
        while t < PAIR_WIDTH {
            dots[t] = [begin::<S, F>(*x_sums.add(t)); 2];
            t += 1;
        }
        let mut g = half * GROUPS / F::HALVES;
        while g < (half + 1) * GROUPS / F::HALVES {
            let at = (block * GROUPS + g) * GROUP_BYTES;
            let first = S::load_bytes(quants[0].add(at));
            let second = S::load_bytes(quants[1].add(at));
            t = 0;
            while t < PAIR_WIDTH {
                let x = S::load_activations(x.add(t * BLOCK + 4 * g));
                dots[t] = [S::dot(dots[t][0], first, x), S::dot(dots[t][1], second, x)];
                t += 1;
            }
            g += 1;
        }
        dots
    }
}
