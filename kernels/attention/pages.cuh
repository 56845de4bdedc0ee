// What the kernels of paged attention share: where keys lie, how a tile of them lies in shared memory,
// and how it gets from there to the tensor cores, by the cache's type.
#pragma once

#include "copy.cuh"
#include "kernel.cuh"
#include "mma.cuh"

constexpr int LANES_PER_ROW = 4;  // of an mma accumulator
constexpr int GRANULE = 8;        // keys; every block is a whole number of them

// How numbers of a cache are multiplied. What the tensor cores get is the number divided by DIVISOR.
template <typename T>
struct Format {
    using Operand = T;
    static constexpr float DIVISOR = 1.0f;
};
template <>
struct Format<e4m3> {
    using Operand = f16;
    static constexpr float DIVISOR = 256.0f;
};

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
    mma_m16n8k16_bf16(d, a, b);
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
    mma_m16n8k16_f16(d, a, b);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, bf16) { return pack_bf16x2(low, high); }
__device__ __forceinline__ uint32_t pack_pair(float low, float high, f16) { return pack_f16x2(low, high); }

// Two values of a query, which comes in bf16, in another type.
__device__ __forceinline__ uint32_t query_pair(uint32_t pair, bf16) { return pair; }
__device__ __forceinline__ uint32_t query_pair(uint32_t pair, f16) {
    return pack_f16x2(low_bf16(pair), high_bf16(pair));
}

// Two bytes of a word as numbers of 8 bits, divided by 256: the exponents of both types then agree.
template <unsigned LOW, unsigned HIGH>
__device__ __forceinline__ uint32_t widen_pair(uint32_t word) {
    const uint32_t shifted = __byte_perm(word, 0, 0x0404 | LOW << 4 | HIGH << 12);
    return (shifted & 0x80008000u) | (shifted >> 1 & 0x3f803f80u);
}

// A tile in shared memory has rows of ROW_BYTES. Their 16-byte chunks are permuted so that the eight
// rows an ldmatrix phase reads lie in different banks. Offsets are in bytes; chunks beside each other
// at even numbers stay so up to their order, and `offset ^ i << 5` is the offset 2 i chunks further on.
template <int ROW_BYTES>
__device__ __forceinline__ unsigned tile_offset(unsigned row, unsigned chunk) {
    static_assert(ROW_BYTES == 64 || ROW_BYTES % 128 == 0, "rows that the permutation is made for");
    return row * ROW_BYTES + ((chunk ^ (128 <= ROW_BYTES ? row & 7 : row >> 1 & 3)) << 4);
}

// Queries go along the keys' dimensions in the order in which key_operands has them. In 8 bits a word
// of four dimensions becomes two of two: of every 16 dimensions, 4t and 4t + 1 stand where 2t and
// 2t + 1 would be, 4t + 2 and 4t + 3 where 2t + 8 and 2t + 9 would be.
template <typename T>
__device__ __forceinline__ unsigned query_dim(unsigned t, unsigned half) {
    return sizeof(T) == 1 ? 4 * t + 2 * half : 2 * t + 8 * half;
}

// Right operands for 16 keys and 32 dimensions, the ones from 32 * `step` on: b[depth][keys / 8].
// `lane_offset` is that of key_lane_offset.
template <typename T, int ROW_BYTES>
__device__ __forceinline__ unsigned key_lane_offset(unsigned lane) {
    return sizeof(T) == 1 ? tile_offset<ROW_BYTES>(lane % 16, lane / 16)
                          : tile_offset<ROW_BYTES>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
template <typename T>
__device__ __forceinline__ void key_operands(uint32_t (&b)[2][2][2], const unsigned char* tile, unsigned lane_offset,
                                             unsigned step) {
    uint32_t r[4];
    if constexpr (sizeof(T) == 1) {
        ldmatrix_x4(r, tile + (lane_offset ^ step << 5));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            b[i / 2][i % 2][0] = widen_pair<0, 1>(r[i]);
            b[i / 2][i % 2][1] = widen_pair<2, 3>(r[i]);
        }
    } else {
#pragma unroll
        for (int depth = 0; depth < 2; depth++) {
            ldmatrix_x4(r, tile + (lane_offset ^ (2 * step + depth) << 5));
            b[depth][0][0] = r[0];
            b[depth][0][1] = r[1];
            b[depth][1][0] = r[2];
            b[depth][1][1] = r[3];
        }
    }
}

// Right operands for 16 keys and 32 columns, the ones from 32 * `step` on: b[columns / 8]. In 8 bits the
// even columns of every 16 come first, then the odd ones.
template <int ROW_BYTES>
__device__ __forceinline__ unsigned value_lane_offset(unsigned lane) {
    return tile_offset<ROW_BYTES>(lane % 16, lane / 16);
}
template <typename T>
__device__ __forceinline__ void value_operands(uint32_t (&b)[4][2], const unsigned char* tile, unsigned lane_offset,
                                               unsigned step) {
    uint32_t r[4];
    if constexpr (sizeof(T) == 1) {
        ldmatrix_x4_trans(r, tile + (lane_offset ^ step << 5));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            b[i / 2 * 2][i % 2] = widen_pair<0, 2>(r[i]);
            b[i / 2 * 2 + 1][i % 2] = widen_pair<1, 3>(r[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            ldmatrix_x4_trans(r, tile + (lane_offset ^ (2 * step + i) << 5));
            b[2 * i][0] = r[0];
            b[2 * i][1] = r[1];
            b[2 * i + 1][0] = r[2];
            b[2 * i + 1][1] = r[3];
        }
    }
}

// Two results side by side of a row, and their column among 16: `tiles` are two accumulators of
// value_operands' columns, `half` says which of the two rows, `pair` which of the lane's two pairs.
struct ColumnPair {
    float low;
    float high;
    unsigned column;
};
template <typename T>
__device__ __forceinline__ ColumnPair column_pair(const float (*tiles)[4], int half, int pair, unsigned t) {
    if constexpr (sizeof(T) == 1) {
        return {tiles[0][half * 2 + pair], tiles[1][half * 2 + pair], 4 * t + 2 * pair};
    }
    return {tiles[pair][half * 2], tiles[pair][half * 2 + 1], 2 * t + 8 * pair};
}

// The keys of one sequence and KV head.
struct Pages {
    const unsigned* blocks;  // the sequence's row of the block table
    unsigned num_keys;       // that exist
    unsigned block_size;
    unsigned num_kv_heads;
    unsigned kv_head;

    // Which 8 consecutive rows of the cache hold the keys from `key` on, a multiple of 8.
    __device__ __forceinline__ unsigned granule(unsigned key) const {
        if (num_keys <= key) {
            return 0;
        }
        const unsigned block = key / block_size;
        const unsigned first_slot = key - block * block_size;
        return (blocks[block] * num_kv_heads + kv_head) * (block_size / GRANULE) + first_slot / GRANULE;
    }
};

// Query heads of one KV head lie side by side: row r of a sequence's queries belongs to query r / group.
// Exact for r < 512 and group <= 128.
struct RowDivider {
    unsigned factor;

    __device__ __forceinline__ explicit RowDivider(unsigned group) : factor(65536 / group + 1) {}
    __device__ __forceinline__ unsigned query(unsigned row) const { return row * factor >> 16; }
};

// Row maximum, or sum, over the four lanes that hold the row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(FULL_MASK, x, 1);
    return x + __shfl_xor_sync(FULL_MASK, x, 2);
}
