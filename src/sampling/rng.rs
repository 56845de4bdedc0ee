//! Random numbers without state: each is a function of a key and a counter, so a draw does not
//! depend on which draws came before it or run beside it.
//!
//! The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
//! SC 2011).

const NUM_ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// A number in `[0, 1)` for the token at `position` of a request's `choice`.
pub fn uniform(seed: u64, choice: u32, position: usize) -> f64 {
    let position = position as u64;
    let counter = [position as u32, (position >> 32) as u32, choice, 0];
    let [low, high, ..] = philox(counter, [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(high) << 32 | u64::from(low);
    // The 53 highest bits fill a mantissa exactly.
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..NUM_ROUNDS {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key[0] = key[0].wrapping_add(KEY_STEPS[0]);
        key[1] = key[1].wrapping_add(KEY_STEPS[1]);
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with the generator.
    #[test]
    fn matches_the_published_answers() {
        let zeros = philox([0; 4], [0; 2]);
        assert_eq!(zeros, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = philox([u32::MAX; 4], [u32::MAX; 2]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
        );
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn every_part_of_the_counter_matters() {
        let base = uniform(1, 0, 0);
        assert_ne!(base, uniform(2, 0, 0));
        assert_ne!(base, uniform(1 + (1 << 32), 0, 0));
        assert_ne!(base, uniform(1, 1, 0));
        assert_ne!(base, uniform(1, 0, 1));
        assert_eq!(base, uniform(1, 0, 0));
    }

    /// Chi-square over 64 cells, for consecutive positions and for consecutive seeds.
    #[test]
    fn draws_are_uniform() {
        let along_positions = (0..100_000).map(|i| uniform(42, 0, i));
        let along_seeds = (0..100_000).map(|i| uniform(i, 3, 7));
        for draws in [along_positions.collect::<Vec<_>>(), along_seeds.collect()] {
            let mut cells = [0.0f64; 64];
            for draw in draws {
                assert!((0.0..1.0).contains(&draw));
                cells[(draw * 64.0) as usize] += 1.0;
            }
            let expected = 100_000.0 / 64.0;
            let chi2: f64 = cells.iter().map(|c| (c - expected).powi(2) / expected).sum();
            // 63 degrees of freedom: exceeded once in 10^5.
            assert!(chi2 < 120.0, "{chi2}");
        }
    }
}
