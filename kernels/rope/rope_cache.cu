// Rotary position embedding of queries and keys, and the only writer of the paged KV cache.
//
// At position p, with half = head_dim / 2 and row p of the table (cosines of all pairs, then sines):
//   out[i]        = x[i] * cos_i - x[i + half] * sin_i
//   out[i + half] = x[i + half] * cos_i + x[i] * sin_i
// Queries come back rotated; keys are rotated and written to their slot, values written as they are.
//
// Shapes: qkv bf16 [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], per token all queries, all keys,
// all values; cos_sin f32 [max_positions, head_dim]; positions and slots u32 [num_tokens];
// q bf16 [num_tokens, num_heads * head_dim]; k_cache and v_cache bf16, f16 or e4m3
// [num_blocks, num_kv_heads, block_size, head_dim], slot = block * block_size + place in the block.
// A token with slot 0xffffffff pads the batch: nothing is written to the cache. Its position is one of the table.
//
// A thread takes WIDTH pairs of one head: 8, or 1 where head_dim is no multiple of 16.
// Grid: (threads of a token / blockDim.x, tokens). f16 and e4m3 saturate at their largest numbers. Keys and
// values are multiplied with their factor before they are rounded: 1 unless they have 8 bits.
//
// Bytes per token: 4 * (num_heads + 2 * num_kv_heads) * head_dim + 4 * head_dim; 3 operations per value.
#include "kernel.cuh"

namespace {

constexpr uint32_t NO_SLOT = 0xffffffffu;

struct Heads {
    int num_heads;
    int num_kv_heads;
    int head_dim;
    int block_size;
    float k_factor;
    float v_factor;
};

template <typename T>
__device__ __forceinline__ T to_cache(float x);
template <>
__device__ __forceinline__ bf16 to_cache<bf16>(float x) { return to_bf16(x); }
template <>
__device__ __forceinline__ f16 to_cache<f16>(float x) { return to_f16_saturated(x); }
template <>
__device__ __forceinline__ e4m3 to_cache<e4m3>(float x) { return to_e4m3_saturated(x); }

template <int WIDTH>
struct Pairs {
    float first[WIDTH];
    float second[WIDTH];
};

template <int WIDTH>
__device__ __forceinline__ void load_pairs(Pairs<WIDTH>& pairs, const bf16* address, int half) {
    const Pack<bf16, WIDTH> first = load_pack<WIDTH>(address);
    const Pack<bf16, WIDTH> second = load_pack<WIDTH>(address + half);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        pairs.first[i] = to_float(first[i]);
        pairs.second[i] = to_float(second[i]);
    }
}

template <int WIDTH>
__device__ __forceinline__ void rotate(Pairs<WIDTH>& pairs, const float* cos_sin, int half) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        const float cos = cos_sin[i], sin = cos_sin[half + i];
        const float first = pairs.first[i], second = pairs.second[i];
        pairs.first[i] = first * cos - second * sin;
        pairs.second[i] = second * cos + first * sin;
    }
}

template <typename T, int WIDTH>
__device__ __forceinline__ void store_pairs(T* address, const Pairs<WIDTH>& pairs, int half, float factor = 1.0f) {
    Pack<T, WIDTH> first, second;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        first[i] = to_cache<T>(pairs.first[i] * factor);
        second[i] = to_cache<T>(pairs.second[i] * factor);
    }
    store_pack(address, first);
    store_pack(address + half, second);
}

template <typename Cache, int WIDTH>
__device__ __forceinline__ void rope_cache(
    const bf16* qkv, const float* cos_sin, const uint32_t* positions, const uint32_t* slots, bf16* q,
    Cache* k_cache, Cache* v_cache, int num_tokens, Heads heads) {
    const int half = heads.head_dim / 2;
    const int num_all_heads = heads.num_heads + 2 * heads.num_kv_heads;
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int head = thread / (half / WIDTH);
    const int pair = thread % (half / WIDTH) * WIDTH;
    if (num_all_heads <= head) {
        return;
    }
    for (int token = blockIdx.y; token < num_tokens; token += gridDim.y) {
        const uint32_t slot = slots[token];
        if (heads.num_heads <= head && slot == NO_SLOT) {
            continue;
        }
        Pairs<WIDTH> pairs;
        load_pairs(pairs, qkv + (size_t(token) * num_all_heads + head) * heads.head_dim + pair, half);
        if (head < heads.num_heads + heads.num_kv_heads) {
            rotate(pairs, cos_sin + size_t(positions[token]) * heads.head_dim + pair, half);
        }
        if (head < heads.num_heads) {
            store_pairs(q + (size_t(token) * heads.num_heads + head) * heads.head_dim + pair, pairs, half);
        } else {
            const int from_first_key = head - heads.num_heads;
            const bool is_key = from_first_key < heads.num_kv_heads;
            const int kv_head = is_key ? from_first_key : from_first_key - heads.num_kv_heads;
            const size_t block = slot / heads.block_size, place = slot % heads.block_size;
            const size_t row = (block * heads.num_kv_heads + kv_head) * heads.block_size + place;
            store_pairs((is_key ? k_cache : v_cache) + row * heads.head_dim + pair, pairs, half,
                        is_key ? heads.k_factor : heads.v_factor);
        }
    }
}

}  // namespace

#define ROPE_CACHE(name, Cache, WIDTH)                                                                    \
    extern "C" __global__ void name(                                                                      \
        const bf16* qkv, const float* cos_sin, const uint32_t* positions, const uint32_t* slots, bf16* q, \
        Cache* k_cache, Cache* v_cache, int num_tokens, int num_heads, int num_kv_heads, int head_dim,    \
        int block_size, float k_factor, float v_factor) {                                                 \
        const Heads heads = {num_heads, num_kv_heads, head_dim, block_size, k_factor, v_factor};          \
        rope_cache<Cache, WIDTH>(qkv, cos_sin, positions, slots, q, k_cache, v_cache, num_tokens, heads); \
    }                                                                                                     \
    KERNEL(name)

ROPE_CACHE(rope_cache_bf16_8, bf16, 8);
ROPE_CACHE(rope_cache_bf16_1, bf16, 1);
ROPE_CACHE(rope_cache_f16_8, f16, 8);
ROPE_CACHE(rope_cache_f16_1, f16, 1);
ROPE_CACHE(rope_cache_e4m3_8, e4m3, 8);
ROPE_CACHE(rope_cache_e4m3_1, e4m3, 1);
