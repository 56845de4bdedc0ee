// What the sampling kernels share: how a row is described, cut up, ordered and weighed.
//
// All of it is made so that a row's result depends on nothing but that row: logits are compared as
// integers, and weights are integers too (fixed point), whose sum is the same in any order.
#pragma once

#include "kernel.cuh"
#include "reduce.cuh"

using u64 = unsigned long long;

// A chunk is what one warp reads at once, a tile what one block of the first kernels reads.
constexpr int CHUNK = 256;
constexpr int CHUNKS_PER_TILE = 16;
constexpr int TILE = CHUNK * CHUNKS_PER_TILE;
constexpr int PER_LANE = CHUNK / WARP_SIZE;
// The most chunks of a row, so that one block has a thread for each.
constexpr int MAX_CHUNKS = 1024;

// Bins of a histogram. Those over a whole row are 1/32 nat wide, from the largest logit downwards;
// in the last one weights are zero, and it is not counted.
constexpr int NUM_BINS = 1024;
constexpr float BINS_PER_NAT = 32.0f;

// Up to here the chunks' largest logits bound the k-th largest logit well enough.
constexpr unsigned SMALL_TOP_K = 128;

constexpr unsigned GREEDY = 0;
constexpr unsigned DRAW = 1;
// Takes the given token, for its log-probability.
constexpr unsigned SCORE = 2;
// Computes nothing.
constexpr unsigned IDLE = 3;

constexpr unsigned NONE = 0xffffffffu;

// What a row wants, 32 words; `src/ops/sample/packing.rs` writes it. Starts are in words from the
// begin of the inputs, which these descriptions open.
struct SampleRow {
    unsigned mode;
    // The row of logits.
    unsigned logits_row;
    // 1 / temperature.
    float scale;
    // temperature * ln(min_p): tokens that are further from the largest logit are dropped.
    float min_p_offset;
    // Zero keeps all.
    unsigned top_k;
    // One keeps all.
    float top_p;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    unsigned seed[2];
    unsigned choice;
    unsigned position[2];
    // Token ids.
    unsigned forbidden_start, num_forbidden;
    // Pairs of a token id and a float, each token once.
    unsigned bias_start, num_biases;
    // Token ids, the prompt's first.
    unsigned history_start, num_history, num_prompt;
    // Bits, a word for 32 tokens and for the whole row; NONE allows all.
    unsigned mask_start;
    // NONE wants no log-probabilities.
    unsigned num_top;
    // The token to score.
    unsigned target;
    unsigned unused[8];
};
static_assert(sizeof(SampleRow) == 128, "the host writes 32 words");

constexpr int MAX_TOP = 20;

// What a row got, 44 words.
struct SampleResult {
    unsigned token;
    // Zero, or one if the row has a logit that is NaN or +inf, or no token that may be drawn.
    unsigned status;
    float logprob;
    unsigned num_top;
    unsigned top_ids[MAX_TOP];
    float top_logprobs[MAX_TOP];
};
static_assert(sizeof(SampleResult) == 176, "the host reads 44 words");

__device__ __forceinline__ bool has_edits(const SampleRow& row) {
    return (row.num_forbidden | row.num_biases | row.num_history) != 0;
}

// Whether the row that is drawn from differs from the model's; it is then in the buffer of keys.
__device__ __forceinline__ bool is_rewritten(const SampleRow& row) {
    return row.mode == DRAW && (has_edits(row) || row.mask_start != NONE);
}

__device__ __forceinline__ bool wants_filter(const SampleRow& row) {
    return row.mode == DRAW && (row.top_k != 0 || row.top_p < 1.0f);
}

// Whether the row's weights are summed by all of its blocks.
__device__ __forceinline__ bool is_wide(const SampleRow& row) {
    return row.mode == DRAW && (row.top_k == 0 || SMALL_TOP_K < row.top_k);
}

__device__ __forceinline__ bool wants_histogram(const SampleRow& row) { return wants_filter(row) && is_wide(row); }

// NaN or +inf.
__device__ __forceinline__ bool is_bad(float x) { return !(x < INFINITY); }

// An integer in the order of the floats. Both zeros have the same.
__device__ __forceinline__ unsigned to_key(float x) {
    const unsigned bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits ^ (unsigned(int(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float from_key(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The key of -inf. Places outside of the row have key zero.
constexpr unsigned LOWEST_KEY = 0x007fffffu;

// The best of a chunk or a row: its largest key and the lowest token that has it. All ones mean
// that there is a bad logit.
constexpr u64 BAD = ~u64(0);

__device__ __forceinline__ u64 ranked(unsigned key, unsigned token) { return u64(key) << 32 | ~token; }
__device__ __forceinline__ unsigned rank_key(u64 rank) { return unsigned(rank >> 32); }
__device__ __forceinline__ unsigned rank_token(u64 rank) { return ~unsigned(rank); }

__device__ __forceinline__ bool is_drawable(u64 best) { return best != BAD && LOWEST_KEY < rank_key(best); }

struct Larger {
    __device__ __forceinline__ u64 operator()(u64 a, u64 b) const { return a < b ? b : a; }
};

// e^x for x <= 0, with the operations and so the bits of the CPU's.
__device__ __forceinline__ float exp_of(float x) {
    const float lowest = -87.0f;
    const float round = 12582912.0f;
    const float clamped = lowest < x ? x : lowest;
    const float shifted = __fadd_rn(__fmul_rn(clamped, 1.44269504088896341f), round);
    const float power = __fsub_rn(shifted, round);
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(power, 0.6933594f)), __fmul_rn(power, -2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    const float mantissa = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
    const float value = __uint_as_float(__float_as_uint(mantissa) + (__float_as_uint(shifted) << 23));
    return lowest < x ? value : 0.0f;
}

// The largest token of a row weighs this much: 2^18 such weights fit into 64 bits.
constexpr float WEIGHT_ONE = 35184372088832.0f;

// exp((x - max) * scale) in fixed point.
__device__ __forceinline__ u64 weight_of(float x, float max, float scale) {
    return u64(__fadd_rn(__fmul_rn(exp_of(__fmul_rn(__fsub_rn(x, max), scale)), WEIGHT_ONE), 0.5f));
}

// The bin over a whole row; never falls where x falls.
__device__ __forceinline__ int bin_of(float x, float max, float scale) {
    const float bin = __fmul_rn(__fmul_rn(__fsub_rn(max, x), scale), BINS_PER_NAT);
    return int(fminf(bin, float(NUM_BINS - 1)));
}

// Logits as the model made them, or keys as the first kernel rewrote them.
struct RowView {
    const float* logits;
    // Null where the model's logits are drawn from.
    const unsigned* keys;
    int num_cols;

    // The keys of tokens `first ..+ 4`; `first` is a multiple of four.
    __device__ __forceinline__ void load(int first, unsigned (&result)[4]) const {
        if (num_cols <= first) {
            result[0] = result[1] = result[2] = result[3] = 0;
        } else if (keys != nullptr) {
            const uint4 found = *reinterpret_cast<const uint4*>(keys + first);
            result[0] = found.x, result[1] = found.y, result[2] = found.z, result[3] = found.w;
        } else if (num_cols % 4 == 0) {
            const float4 found = *reinterpret_cast<const float4*>(logits + first);
            result[0] = to_key(found.x), result[1] = to_key(found.y);
            result[2] = to_key(found.z), result[3] = to_key(found.w);
        } else {
            for (int i = 0; i < 4; i++) {
                result[i] = first + i < num_cols ? to_key(logits[first + i]) : 0;
            }
        }
    }
};

// Keys of a row lie this far apart.
__device__ __forceinline__ size_t key_stride(int num_cols) { return size_t(ceil_div(num_cols, 4)) * 4; }

__device__ __forceinline__ RowView raw_view(const float* logits, const SampleRow& row, int num_cols) {
    return {logits + size_t(row.logits_row) * num_cols, nullptr, num_cols};
}

__device__ __forceinline__ RowView drawn_view(const float* logits, const unsigned* keys, const SampleRow& row,
                                              int index, int num_cols) {
    RowView view = raw_view(logits, row, num_cols);
    view.keys = is_rewritten(row) ? keys + index * key_stride(num_cols) : nullptr;
    return view;
}

// The best of a row from the bests of its chunks; for all threads of a block.
__device__ __forceinline__ u64 best_of_row(const u64* chunk_best, int num_chunks, u64* scratch) {
    u64 best = 0;
    for (int chunk = threadIdx.x; chunk < num_chunks; chunk += blockDim.x) {
        best = Larger()(best, chunk_best[chunk]);
    }
    return block_reduce(best, Larger(), u64(0), scratch);
}
