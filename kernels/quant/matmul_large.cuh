// y[t, r] = sum_k x[t, k] w[r, k] (+ bias[r]) for many tokens, on tensor cores.
//
// Shapes: x bf16 [num_tokens, num_cols], w packed as in formats.cuh or dense, y bf16 or f32 [num_tokens, rows].
//
// Work. A block computes 128 rows for TOKENS tokens, over `split_tiles` tiles of 64 columns; blockIdx is (token
// block, row block, part of k). Eight warps: 8 / WARPS_N along the rows, WARPS_N along the tokens, so that a warp has
// WARPS_N row tiles of 16 rows and TOKENS / WARPS_N tokens. Weights (still packed) and activations come through a
// ring of STAGES stages of 64 columns that cp.async fills.
//
// Operations of a stage of a warp of 128 tokens: 64 mma, 128 FFMA to scale the sums of 32 columns in f32 (the integers
// stay exact, as in matmul_small), twice that with minima or a scale for 16 columns; in all 369 instructions for
// Q4_0, 388 for Q5_0, 463 for Q8_0, 581 for Q4_K, 584 for Q6_K (sm_90a). At the tensor cores' rate for mma.sync on
// Hopper, about 6 cycles each on a quarter of an SM, 64 mma take 390 cycles: what has no minima is bound by them, the
// rest by issue, at two thirds of that rate. Scaling the weights to bf16 before the product would save the FFMA, for
// an error as large as that of bf16 weights; not taken. With 64 tokens a stage has 32 mma and 259 (Q4_0) to 399
// (Q4_K) instructions, with 32 tokens 16 mma and 155 to 242.
//
// Bytes: weights once for each token block, activations once for each row block, from the L2 cache. Splitting k fills
// the SMs where there are few row blocks. How k is split is the host's choice by the kernel and the shape of the
// matrix. The parts are written to `partial` in f32, and the block that comes last (a counter for each output block,
// left at zero) adds them in the order of k: the result does not depend on which one that is.
//
// Minima take sum(x) of each scale group, which matmul_sums has put into `sums` [group][sum_stride tokens].
#pragma once

#include "dense.cuh"

namespace quant {

constexpr int LARGE_ROWS = 128;
constexpr int LARGE_THREADS = 256;
constexpr int LARGE_ROW_TILES = LARGE_ROWS / TILE_ROWS;

// Blocks on an SM. For many tokens one with twice the registers is better than two: a third fewer instructions.
template <int TOKENS>
constexpr int LARGE_BLOCKS = TOKENS == 32 ? 2 : 1;

struct LargeExtra {
    const float* sums;
    float* partial;
    unsigned* counters;
    int sum_stride;
    int split_tiles;
};

template <class F, int TOKENS>
struct LargeStage {
    static constexpr int WEIGHT_BYTES = LARGE_ROW_TILES * F::STAGE_BYTES;
    static constexpr int X_BYTES = TOKENS * TILE_COLS * 2;
    static constexpr int SUM_BYTES = F::HAS_MIN ? F::GROUPS * TOKENS * 4 : 0;
    static constexpr int BYTES = WEIGHT_BYTES + X_BYTES + SUM_BYTES;
};

// The copies of one thread, stage after stage: addresses grow by a fixed step.
template <class F, int TOKENS>
struct LargeCopy {
    using Stage = LargeStage<F, TOKENS>;
    // 16-byte pieces of the weights of a stage without superscales, and rounds of the block over them.
    static constexpr int TILE_PIECES = F::TILE_BYTES / 16, PIECES = LARGE_ROW_TILES * TILE_PIECES;
    static constexpr int ROUNDS = ceil_div(PIECES, LARGE_THREADS);
    static constexpr int SUPER_PIECES = F::SUPER_BYTES / 16;
    static constexpr int SUM_PIECES = Stage::SUM_BYTES / 16;

    const Product& p;
    const LargeExtra& extra;
    int tile;
    const int first_row_tile, num_tokens_behind;
    const uint8_t* weights[ROUNDS];
    const uint8_t* supers;
    const bf16* x;
    const float* sums;

    __device__ __forceinline__ LargeCopy(
        const Product& product, const LargeExtra& more, int row_tile, int first_token, int first_tile)
        : p(product), extra(more), tile(first_tile), first_row_tile(row_tile),
          num_tokens_behind(kept(p.num_tokens - first_token - int(threadIdx.x / 8))), supers(nullptr), sums(nullptr) {
        // Beyond the last row tile the last one once more; nobody stores its sums.
        const int last_row_tile = p.num_row_tiles() - 1;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int index = threadIdx.x + i * LARGE_THREADS;
            const int from = ::min(first_row_tile + index / TILE_PIECES, last_row_tile);
            weights[i] = F::source(p, from, tile, index % TILE_PIECES);
        }
        if constexpr (SUPER_PIECES != 0) {
            const int from = ::min(first_row_tile + int(threadIdx.x) / SUPER_PIECES, last_row_tile);
            supers = F::source(p, from, 0, TILE_PIECES + threadIdx.x % SUPER_PIECES);
        }
        x = p.x + (long long)(first_token + threadIdx.x / 8) * p.num_cols + tile * TILE_COLS + threadIdx.x % 8 * 8;
        if constexpr (F::HAS_MIN) {
            const int group = threadIdx.x / (TOKENS / 4), at = threadIdx.x % (TOKENS / 4) * 4;
            sums = extra.sums + (long long)(tile * F::GROUPS + group) * extra.sum_stride + first_token + at;
        }
    }

    // Fills a stage with the next tile column.
    __device__ __forceinline__ void next(uint8_t* stage) {
        const int thread = threadIdx.x;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int index = thread + i * LARGE_THREADS;
            if ((i + 1) * LARGE_THREADS <= PIECES || index < PIECES) {
                if constexpr (F::IS_DENSE) {
                    F::copy(stage, weights[i], p, first_row_tile, tile, index);
                } else {
                    cp_async_16(stage + index * 16 + index / TILE_PIECES * F::SUPER_BYTES, weights[i]);
                }
            }
            weights[i] += F::step(1, 0);
        }
        if constexpr (SUPER_PIECES != 0) {
            if (thread < LARGE_ROW_TILES * SUPER_PIECES) {
                uint8_t* const to = stage + thread / SUPER_PIECES * F::STAGE_BYTES + F::TILE_BYTES;
                cp_async_16(to + thread % SUPER_PIECES * 16, supers + unsigned(tile) / SUPER_TILES * F::SUPER_BYTES);
            }
        }
        const int x_piece = activation_piece<F::RUN>(thread / 8, thread % 8);
        uint8_t* const to = stage + Stage::WEIGHT_BYTES + thread / 8 * 128 + x_piece * 16;
        const bool valid = tile * TILE_COLS + thread % 8 * 8 < p.num_cols;
#pragma unroll
        for (int i = 0; i < TOKENS; i += LARGE_THREADS / 8) {
            cp_async_16(to + i * 128, x + (long long)i * p.num_cols, valid && i < num_tokens_behind);
        }
        x += TILE_COLS;
        if constexpr (SUM_PIECES != 0) {
            if (thread < SUM_PIECES) cp_async_16(stage + Stage::WEIGHT_BYTES + Stage::X_BYTES + thread * 16, sums);
            sums += F::GROUPS * extra.sum_stride;
        }
        tile++;
    }
};

template <class F, int TOKENS, int WARPS_N>
struct LargeSums {
    static constexpr int TILES = WARPS_N;
    static constexpr int NT = TOKENS / WARPS_N / 8;
    using Stage = LargeStage<F, TOKENS>;

    float sums[TILES][NT][4];

    // `row_tile` and `token` are the warp's first within the stage.
    __device__ __forceinline__ void add_stage(const uint8_t* stage, int row_tile, int token, int lane) {
        const int g = lane / 4, t = lane % 4;
        typename F::Fragment w[TILES];
#pragma unroll
        for (int i = 0; i < TILES; i++) w[i].load(stage + (row_tile + i) * F::STAGE_BYTES, lane);
        // The order of bytes depends on the token's lowest bits, which are those of g.
        const uint8_t* const x = stage + Stage::WEIGHT_BYTES + (token + g) * 128;
        const uint8_t* const all_sums = stage + Stage::WEIGHT_BYTES + Stage::X_BYTES;
        const float* const x_sums = reinterpret_cast<const float*>(all_sums) + token + 2 * t;
        constexpr int STEP = F::RUN == 32 ? 2 : 1;  // products that one load of activations serves
#pragma unroll
        for (int first = 0; first < TILE_PRODUCTS; first += STEP) {
            uint32_t a[TILES][STEP][4];
            float scale[TILES][2], min[TILES][2];
#pragma unroll
            for (int i = 0; i < TILES; i++) {
#pragma unroll
                for (int j = 0; j < STEP; j++) w[i].unpack(a[i][j], first + j);
                if constexpr (!F::IS_DENSE) {
                    scale[i][0] = w[i].scale(first / STEP, 0), scale[i][1] = w[i].scale(first / STEP, 1);
                    if constexpr (F::HAS_MIN) {
                        min[i][0] = w[i].min(first / STEP, 0), min[i][1] = w[i].min(first / STEP, 1);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint32_t b[STEP][2];
                load_some_activations(b, x + n * 8 * 128, first, g, t);
                float2 x_sum = {0.0f, 0.0f};
                if constexpr (F::HAS_MIN) {
                    x_sum = *reinterpret_cast<const float2*>(x_sums + first / STEP * TOKENS + n * 8);
                }
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    if constexpr (F::IS_DENSE) {
#pragma unroll
                        for (int j = 0; j < STEP; j++) mma_m16n8k16_bf16(sums[i][n], a[i][j], b[j]);
                    } else {
                        float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                        for (int j = 0; j < STEP; j++) mma_m16n8k16_bf16(d, a[i][j], b[j]);
#pragma unroll
                        for (int c = 0; c < 4; c++) {
                            float& sum = sums[i][n][c];
                            sum = fmaf(scale[i][c / 2], d[c], sum);
                            if constexpr (F::HAS_MIN) sum = fmaf(-min[i][c / 2], c % 2 == 0 ? x_sum.x : x_sum.y, sum);
                        }
                    }
                }
            }
        }
    }

    // The B fragments of products first .. first + STEP.
    template <int STEP>
    __device__ __forceinline__ static void load_some_activations(
        uint32_t (&b)[STEP][2], const uint8_t* row, int first, int g, int t) {
        if constexpr (STEP == 2) {
            const uint4 v = load_16(row + activation_piece<32>(g, 2 * first + t) * 16);
            b[0][0] = v.x, b[0][1] = v.y, b[1][0] = v.z, b[1][1] = v.w;
        } else {
            const uint2 v = load_8(row + activation_piece<16>(g, 2 * first + t / 2) * 16 + t % 2 * 8);
            b[0][0] = v.x, b[0][1] = v.y;
        }
    }

    // Adds up the parts of k. False in all blocks but the last one of an output block.
    __device__ __forceinline__ bool join(const LargeExtra& extra) {
        __shared__ bool is_last;
        constexpr int VALUES = TILES * NT * 4;
        float* const flat = &sums[0][0][0];
        const unsigned block = blockIdx.y * gridDim.x + blockIdx.x, num_blocks = gridDim.x * gridDim.y;
        const auto part = [&](unsigned z) {
            return extra.partial + (size_t(z) * num_blocks + block) * (VALUES * LARGE_THREADS) + threadIdx.x;
        };
#pragma unroll
        for (int i = 0; i < VALUES; i++) part(blockIdx.z)[i * LARGE_THREADS] = flat[i];
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) is_last = atomicAdd(extra.counters + block, 1u) == gridDim.z - 1;
        __syncthreads();
        if (!is_last) return false;
        __threadfence();
#pragma unroll
        for (int i = 0; i < VALUES; i++) flat[i] = __ldcg(part(0) + i * LARGE_THREADS);
        for (unsigned z = 1; z < gridDim.z; z++) {
#pragma unroll
            for (int i = 0; i < VALUES; i++) flat[i] += __ldcg(part(z) + i * LARGE_THREADS);
        }
        if (threadIdx.x == 0) extra.counters[block] = 0;
        return true;
    }
};

template <class F, int TOKENS, int WARPS_N, int STAGES>
__device__ __forceinline__ void matmul_large(const Product& p, const LargeExtra& extra) {
    DYNAMIC_SHARED(uint8_t, shared);
    using Stage = LargeStage<F, TOKENS>;
    using Sums = LargeSums<F, TOKENS, WARPS_N>;
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int first_row_tile = blockIdx.y * LARGE_ROW_TILES, first_token = blockIdx.x * TOKENS;
    const int first_tile = blockIdx.z * extra.split_tiles;
    const int num_tiles = ::min(p.num_tiles() - first_tile, extra.split_tiles);
    const int row_tile = warp / WARPS_N * WARPS_N, token = warp % WARPS_N * (TOKENS / WARPS_N);

    LargeCopy<F, TOKENS> copy(p, extra, first_row_tile, first_token, first_tile);
    int fill_at = 0, stage_at = 0;
    const auto following = [](int at) { return at == (STAGES - 1) * Stage::BYTES ? 0 : at + Stage::BYTES; };
    const auto fill = [&](int i) {
        if (i < num_tiles) {
            copy.next(shared + fill_at);
            fill_at = following(fill_at);
        }
        cp_async_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) fill(i);
    Sums acc;
#pragma unroll
    for (int i = 0; i < Sums::TILES; i++) {
#pragma unroll
        for (int n = 0; n < Sums::NT; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) acc.sums[i][n][c] = 0.0f;
        }
    }
#pragma unroll 1
    for (int i = 0; i < num_tiles; i++) {
        cp_async_wait<STAGES - 2>();
        // All copies are there, and all warps have read the stage before, which is filled next.
        __syncthreads();
        fill(i + STAGES - 1);
        acc.add_stage(shared + stage_at, row_tile, token, lane);
        stage_at = following(stage_at);
    }
    cp_async_wait<0>();

    if (1 < gridDim.z && !acc.join(extra)) return;
#pragma unroll
    for (int i = 0; i < Sums::TILES; i++) {
#pragma unroll
        for (int n = 0; n < Sums::NT; n++) {
#pragma unroll
            for (int parity = 0; parity < 2; parity++) {
                const int t = first_token + token + 8 * n + lane % 4 * 2 + parity, r = first_row_tile + row_tile + i;
                if (t < p.num_tokens && r < p.num_row_tiles()) {
                    put_rows(p, t, r, lane / 4, acc.sums[i][n][parity], acc.sums[i][n][parity + 2]);
                }
            }
        }
    }
}

}  // namespace quant
