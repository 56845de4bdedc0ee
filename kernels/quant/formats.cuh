// Packed quantised weights, as src/ops/matmul/gpu/layout.rs writes them and the matmul kernels read them.
//
// A matrix is cut into row tiles of 16 rows, a row tile into tiles of 64 columns:
//   row tile  [tile 0][tile 1] ... [superscales of columns 0..256][of 256..512] ...
//   tile      [integers, 128 bytes for each bit][scales]
// Columns beyond the last have scales of zero, rows beyond the last too.
//
// Integers lie where the tensor cores want them. A tile is four products of 16 x 16; of product j a lane
// (g = lane / 4, t = lane % 4) holds A[g] and A[g + 8] at k = 2t, 2t + 1, 2t + 8, 2t + 9. As the order of k
// is free, these are four consecutive columns of the matrix, so that the activations of a lane are
// consecutive too, and come with one load:
//   formats with a scale for 32 columns   4 columns at 32 (j / 2) + 8t + 4 (j % 2)
//   formats with a scale for 16 columns   4 columns at 16 j + 4t
// A lane's 32 integers are 16 pairs, pair 4j + i being a[i] of product j. They fill one word for each bit:
// word w holds pairs F w .. F (w + 1), where F = 16 / BITS (rounded down) fields of BITS bits fit into each
// half word, the low half for the first of the pair. Field f is turned (in the 32-bit word) by BITS f from
// the top of the mantissa of a bf16, bits 7 - BITS to 6 of a half word; what is left over holds the last pairs:
//   3 and 5 bits   bit i of pair 15 is a bit of word i, just below field 0
//   6 bits         word w has four more bits at field 2: low bits of pair 12 + m in word {0, 2, 3, 5}[m],
//                  high bits in word {1, 1, 4, 4}[m], bits 0, 1 for even m and 2, 3 for odd m
//   8 bits         words 0 to 3 hold the low four bits as the 4-bit format does, 4 to 7 the high ones
//   floats         word 2j holds the four columns of product j in row g, 2j + 1 those in row g + 8: the first two in
//                  the lower bytes of the half words, the others in the upper
// In a tile the words 4i .. 4i + 4 of all lanes come first (16 bytes a lane), then a pair of words, then one.
//
// Unpacking: rotate, then one LOP3 keeps a field of both halves and sets the exponent of 2^BITS, which
// makes each half the bf16 number 2^BITS + q, exactly. That offset is taken off again exactly:
//   - for few tokens by products with a constant matrix, which start the sums of a scale group at
//     -(2^BITS + offset) * sum(x): the tensor cores have time to spare there, the integer units have not;
//   - for many by a packed addition, as an unpacked fragment then serves many products.
//
// Floats of 8 bits (E4M3) are bf16 numbers with fewer bits: sign, exponent and mantissa are shifted to their places, and
// one packed multiplication by 2^120 makes up for the difference of the biases, exactly, also of subnormal numbers.
#pragma once

#include "copy.cuh"
#include "mma.cuh"
#include "product.cuh"

namespace quant {

// Which scales there are, by the names of the CPU's src/ops/matmul/format.rs. Superscales are for 256 columns.
enum class Scales {
    HALF,           // tile [g][group of 32][row g, g + 8] f16
    HALF_MIN,       // tile [g][group of 32][row g, g + 8] {scale, minimum} f16
    SUPER_MIN,      // tile [g][group of 32][row g, g + 8] {scale, minimum} u8; super [g][row g, g + 8] the same in f16
    SUPER_HALVES,   // tile [g][group of 16][row g, g + 8] u8, 128 more than the scale; super [g][row g, g + 8] f16
    SUPER_NIBBLES,  // tile [g][group of 16][row g, g + 8] low nibble scale, high minimum; super as SUPER_MIN
    SINGLE,         // tile [g][row g, g + 8] f32; the weights are floats of 8 bits
};

constexpr int TILE_PRODUCTS = 4;
constexpr int SUPER_TILES = 4;

// bf16 of a power of two or another short number, in both halves of a word.
constexpr uint32_t both(uint32_t bits) { return bits << 16 | bits; }

constexpr uint32_t bf16_of_integer(int value) {
    const uint32_t magnitude = value < 0 ? -value : value;
    uint32_t exponent = 0;
    while (magnitude >> (exponent + 1) != 0) exponent++;
    const uint32_t mantissa = exponent < 8 ? magnitude << (7 - exponent) : magnitude >> (exponent - 7);
    return (value < 0 ? 0x8000u : 0u) | (exponent + 127) << 7 | (mantissa & 0x7f);
}

// Where in a tile of activations [token][64 columns] in shared memory the 16 bytes `piece` of a token lie:
// the loads of a warp below touch every bank once.
template <int RUN>
__device__ __forceinline__ int activation_piece(int token, int piece) {
    return RUN == 32 ? piece ^ ((token & 1) << 2) : piece ^ ((token & 3) << 1);
}

// The B fragments of a token from its 128 bytes in shared memory.
template <int RUN>
__device__ __forceinline__ void load_activations(
    uint32_t (&b)[TILE_PRODUCTS][2], const uint8_t* row, int token, int t) {
    if constexpr (RUN == 32) {
        for (int half = 0; half < 2; half++) {
            const uint4 v = load_16(row + activation_piece<32>(token, 4 * half + t) * 16);
            b[2 * half][0] = v.x, b[2 * half][1] = v.y;
            b[2 * half + 1][0] = v.z, b[2 * half + 1][1] = v.w;
        }
    } else {
        for (int j = 0; j < TILE_PRODUCTS; j++) {
            const uint2 v = load_8(row + activation_piece<16>(token, 2 * j + t / 2) * 16 + t % 2 * 8);
            b[j][0] = v.x, b[j][1] = v.y;
        }
    }
}

__device__ __forceinline__ uint32_t rotate(uint32_t word, int bits) {
    bits &= 31;
    return bits == 0 ? word : __funnelshift_r(word, word, bits);
}

// word & MASK | other
template <uint32_t MASK>
__device__ __forceinline__ uint32_t keep_or(uint32_t word, uint32_t other) { return lop3<0xea>(word, MASK, other); }

// Pair `index` as two numbers 2^BITS + q in bf16; `words` are as many as bits.
template <int BITS>
__device__ __forceinline__ uint32_t unpack_pair(const uint32_t* words, int index) {
    constexpr int FIELDS = 16 / BITS;
    constexpr uint32_t ONE = both(bf16_of_integer(1 << BITS));
    constexpr uint32_t MASK = both(((1u << BITS) - 1) << (7 - BITS));
    if (index < BITS * FIELDS) return keep_or<MASK>(rotate(words[index / FIELDS], index % FIELDS * BITS), ONE);
    if constexpr (BITS == 6) {
        const int m = index - 12;
        const uint32_t low = words[m == 0 ? 0 : m == 1 ? 2 : m == 2 ? 3 : 5];
        const uint32_t high = words[m < 2 ? 1 : 4];
        // Field 2 begins at bit 13: its four bits go to bits 1 to 4, the high pair to 5 and 6.
        return keep_or<0x00600060>(rotate(high, m % 2 == 0 ? 8 : 10), keep_or<0x001e001e>(rotate(low, 12), ONE));
    } else {
        uint32_t pair = ONE;
        for (int i = 0; i < BITS; i++) {
            // From the bit below field 0 to bit i of field 0.
            const uint32_t bit = words[i] << (i + 1);
            const uint32_t mask = both(1u << (7 - BITS + i));
            pair = (bit & mask) | pair;
        }
        return pair;
    }
}

// The floats in the upper bytes of both halves.
__device__ __forceinline__ uint32_t unpack_floats(uint32_t word) {
    constexpr uint32_t POWER = both((127 + 120) << 7);
    return mul_bf16x2(keep_or<0x07f007f0>(word >> 4, word & 0x80008000), POWER);
}

// The high nibbles of an 8-bit format as 256 + 16 q, whose mantissa is that of 16 + q.
__device__ __forceinline__ uint32_t unpack_high_pair(const uint32_t* words, int index) {
    constexpr uint32_t ONE = both(bf16_of_integer(256));
    return keep_or<0x00780078>(rotate(words[index / 4], index % 4 * 4), ONE);
}

template <int BITS_, Scales SCALES, int OFFSET>
struct Format {
    static constexpr int BITS = BITS_;
    static constexpr bool IS_DENSE = false;
    static constexpr bool IS_FLOAT = SCALES == Scales::SINGLE;
    static constexpr bool HAS_MIN =
        SCALES == Scales::HALF_MIN || SCALES == Scales::SUPER_MIN || SCALES == Scales::SUPER_NIBBLES;
    // Columns with one scale, and how many such groups and products of each a tile has.
    static constexpr int RUN = SCALES == Scales::SUPER_HALVES || SCALES == Scales::SUPER_NIBBLES ? 16 : 32;
    static constexpr int GROUPS = TILE_COLS / RUN;
    static constexpr int GROUP_PRODUCTS = RUN / 16;
    static constexpr int INTEGER_BYTES = TILE_ROWS * TILE_COLS * BITS / 8;
    static constexpr int TILE_BYTES = INTEGER_BYTES + (SCALES == Scales::HALF_MIN ? 128 : 64);
    static constexpr int SUPER_BYTES =
        SCALES == Scales::HALF || SCALES == Scales::HALF_MIN || IS_FLOAT ? 0 : SCALES == Scales::SUPER_HALVES ? 32 : 64;
    // In shared memory a tile is followed by its superscales.
    static constexpr int STAGE_BYTES = TILE_BYTES + SUPER_BYTES;
    // Added to what the unpacking yields, the integer minus its offset remains.
    static constexpr int BIAS = BITS == 8 ? -(256 + 16 + OFFSET) : -((1 << BITS) + OFFSET);

    __host__ __device__ static constexpr long long row_tile_bytes(int num_tiles) {
        return (long long)num_tiles * TILE_BYTES + ceil_div(num_tiles, SUPER_TILES) * SUPER_BYTES;
    }

    // The 16 bytes `piece` of a tile and its superscales.
    __device__ __forceinline__ static const uint8_t* source(const Product& p, int row_tile, int tile, int piece) {
        constexpr int PIECES = TILE_BYTES / 16;
        const uint8_t* const tiles = p.weights + row_tile * row_tile_bytes(p.num_tiles());
        if (SUPER_BYTES != 0 && PIECES <= piece) {
            const uint8_t* const supers = tiles + (long long)p.num_tiles() * TILE_BYTES;
            return supers + tile / SUPER_TILES * SUPER_BYTES + (piece - PIECES) * 16;
        }
        return tiles + (long long)tile * TILE_BYTES + piece * 16;
    }

    // From there to the same piece `num_tiles` further, a multiple of 4.
    __device__ __forceinline__ static unsigned step(int num_tiles, int piece) {
        return TILE_BYTES / 16 <= piece ? num_tiles / SUPER_TILES * SUPER_BYTES : num_tiles * TILE_BYTES;
    }

    // Issues the copy of piece `index` of the row tiles of a stage, which lie one after the other.
    __device__ __forceinline__ static void copy(
        uint8_t* stage, const uint8_t* from, const Product&, int, int, int index) {
        cp_async_16(stage + index * 16, from);
    }

    // What a lane needs of a tile.
    struct Fragment {
        uint32_t words[BITS];
        uint32_t scales[SCALES == Scales::HALF_MIN ? 4 : 2];
        uint32_t super[2];

        __device__ __forceinline__ void load(const uint8_t* tile, int lane) {
            int first = 0;
            const uint8_t* plane = tile;
            if constexpr (4 <= BITS) {
                for (; first + 4 <= BITS; first += 4, plane += 512) {
                    const uint4 v = load_16(plane + lane * 16);
                    words[first] = v.x, words[first + 1] = v.y, words[first + 2] = v.z, words[first + 3] = v.w;
                }
            }
            if constexpr (BITS % 4 / 2 == 1) {
                const uint2 v = load_8(plane + lane * 8);
                words[first] = v.x, words[first + 1] = v.y;
                first += 2, plane += 256;
            }
            if constexpr (BITS % 2 == 1) words[first] = *reinterpret_cast<const uint32_t*>(plane + lane * 4);
            load_scales(tile, lane / 4);
        }

        __device__ __forceinline__ void load_scales(const uint8_t* tile, int g) {
            const uint8_t* from = tile + INTEGER_BYTES;
            if constexpr (SCALES == Scales::HALF_MIN) {
                const uint4 v = load_16(from + g * 16);
                scales[0] = v.x, scales[1] = v.y, scales[2] = v.z, scales[3] = v.w;
            } else {
                const uint2 v = load_8(from + g * 8);
                scales[0] = v.x, scales[1] = v.y;
            }
            if constexpr (SUPER_BYTES == 64) {
                const uint2 v = load_8(tile + TILE_BYTES + g * 8);
                super[0] = v.x, super[1] = v.y;
            } else if constexpr (SUPER_BYTES == 32) {
                super[0] = *reinterpret_cast<const uint32_t*>(tile + TILE_BYTES + g * 4);
            }
        }

        // Scale of a group in row g (half 0) or g + 8 (half 1).
        __device__ __forceinline__ float scale(int group, int half) const {
            if constexpr (IS_FLOAT) {
                return __uint_as_float(scales[half]);
            } else if constexpr (SCALES == Scales::HALF) {
                return half == 0 ? low_f16(scales[group]) : high_f16(scales[group]);
            } else if constexpr (SCALES == Scales::HALF_MIN) {
                return low_f16(scales[2 * group + half]);
            } else if constexpr (SCALES == Scales::SUPER_MIN) {
                return times_byte<0>(low_f16(super[half]), scales[group], 2 * half);
            } else if constexpr (SCALES == Scales::SUPER_HALVES) {
                const float large = half == 0 ? low_f16(super[0]) : high_f16(super[0]);
                return times_byte<128>(large, scales[group / 2], 2 * (group % 2) + half);
            } else {
                return times_byte<0>(low_f16(super[half]), scales[group / 2] & 0x0f0f0f0f, 2 * (group % 2) + half);
            }
        }

        __device__ __forceinline__ float min(int group, int half) const {
            if constexpr (SCALES == Scales::HALF_MIN) {
                return high_f16(scales[2 * group + half]);
            } else if constexpr (SCALES == Scales::SUPER_MIN) {
                return times_byte<0>(high_f16(super[half]), scales[group], 2 * half + 1);
            } else {
                const uint32_t nibbles = scales[group / 2] >> 4 & 0x0f0f0f0f;
                return times_byte<0>(high_f16(super[half]), nibbles, 2 * (group % 2) + half);
            }
        }

        // large * (byte - OFFSET), exactly: a permutation makes the byte the float 2^15 + byte, and large, which
        // has eleven bits, times 2^15 + 128 needs twenty.
        template <int BYTE_OFFSET>
        __device__ __forceinline__ static float times_byte(float large, uint32_t bytes, int index) {
            const float shifted = __uint_as_float(__byte_perm(bytes, 0x47000000, 0x7404 | index << 4));
            return fmaf(large, shifted, large * -(32768.0f + BYTE_OFFSET));
        }

        // For all token tiles d += (q + 2^BITS) x, for 8 bits (q + 272) x, for floats q x, of product j.
        template <int NT>
        __device__ __forceinline__ void multiply_raw(
            float (&d)[NT][4], int j, const uint32_t (&b)[NT][TILE_PRODUCTS][2]) const {
            uint32_t a[4];
            if constexpr (IS_FLOAT) {
                unpack(a, j);
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) a[i] = unpack_pair<BITS == 8 ? 4 : BITS>(words, 4 * j + i);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) mma_m16n8k16_bf16(d[n], a, b[n][j]);
            if constexpr (BITS == 8 && !IS_FLOAT) {
#pragma unroll
                for (int i = 0; i < 4; i++) a[i] = unpack_high_pair(words + 4, 4 * j + i);
#pragma unroll
                for (int n = 0; n < NT; n++) mma_m16n8k16_bf16(d[n], a, b[n][j]);
            }
        }

        // The A fragment of product j with exact integers q - offset, or floats.
        __device__ __forceinline__ void unpack(uint32_t (&a)[4], int j) const {
            if constexpr (IS_FLOAT) {
                for (int half = 0; half < 2; half++) {
                    a[half] = unpack_floats(words[2 * j + half] << 8);
                    a[half + 2] = unpack_floats(words[2 * j + half]);
                }
                return;
            }
            constexpr uint32_t ONE = 0x3f803f80;
            for (int i = 0; i < 4; i++) {
                const uint32_t low = unpack_pair<BITS == 8 ? 4 : BITS>(words, 4 * j + i);
                if constexpr (BITS == 8) {
                    // Both steps are exact: multiples of 16 down to -144, then -128 to 127.
                    const uint32_t raw = unpack_high_pair(words + 4, 4 * j + i);
                    const uint32_t high = fma_bf16x2(raw, ONE, both(bf16_of_integer(BIAS)));
                    a[i] = fma_bf16x2(low, ONE, high);
                } else {
                    a[i] = fma_bf16x2(low, ONE, both(bf16_of_integer(BIAS)));
                }
            }
        }
    };
};

// Floats of 8 bits, then GGUF types.
using Fp8 = Format<8, Scales::SINGLE, 0>;
using Q4_0 = Format<4, Scales::HALF, 8>;
using Q4_1 = Format<4, Scales::HALF_MIN, 0>;
using Q5_0 = Format<5, Scales::HALF, 16>;
using Q5_1 = Format<5, Scales::HALF_MIN, 0>;
using Q8_0 = Format<8, Scales::HALF, 128>;
using Q2_K = Format<2, Scales::SUPER_NIBBLES, 0>;
using Q3_K = Format<3, Scales::SUPER_HALVES, 4>;
using Q4_K = Format<4, Scales::SUPER_MIN, 0>;
using Q5_K = Format<5, Scales::SUPER_MIN, 0>;
using Q6_K = Format<6, Scales::SUPER_HALVES, 32>;

}  // namespace quant
