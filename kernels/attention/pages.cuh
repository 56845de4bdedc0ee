// What the kernels of paged attention share: where keys lie, how a tile of them lies in shared memory,
// and the tensor-core product by the cache's type.
#pragma once

#include "copy.cuh"
#include "kernel.cuh"
#include "mma.cuh"

constexpr int LANES_PER_ROW = 4;  // of an mma accumulator
constexpr int GRANULE = 8;        // keys; every block is a whole number of them

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16_bf16(d, a, b);
}
template <>
__device__ __forceinline__ void mma<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16_f16(d, a, b);
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<bf16>(float low, float high) {
    return pack_bf16x2(low, high);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<f16>(float low, float high) {
    return pack_f16x2(low, high);
}

// Two values of a query, which comes in bf16, in the cache's type.
template <typename T>
__device__ __forceinline__ uint32_t query_pair(uint32_t pair);
template <>
__device__ __forceinline__ uint32_t query_pair<bf16>(uint32_t pair) {
    return pair;
}
template <>
__device__ __forceinline__ uint32_t query_pair<f16>(uint32_t pair) {
    return pack_f16x2(low_bf16(pair), high_bf16(pair));
}

// A tile in shared memory has rows of HEAD_DIM values. The 16-byte chunks of a row are permuted so that
// the eight rows an ldmatrix phase reads lie in different banks. Offsets are in bytes.
template <int HEAD_DIM>
__device__ __forceinline__ unsigned tile_offset(unsigned row, unsigned chunk) {
    return row * (HEAD_DIM * 2) + ((chunk ^ (row & 7)) << 4);
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
