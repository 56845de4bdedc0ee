// y[t, r] = sum_k x[t, k] w[r, k] (+ bias[r]) for 1 to 16 tokens, at the speed of memory.
//
// Shapes: x bf16 [num_tokens, num_cols], w packed as in formats.cuh or dense, y bf16 or f32 [num_tokens, rows].
//
// Bytes and operations. Each weight is read once: rows * cols * (2.7 to 8.5)/8 bytes, on an H200 (4.3 TB/s)
//   3584 x 3584    Q4_K  7.4 MB    1.7 us       37888 x 3584   Q4_K   78 MB    18 us
//   3584 x 18944   Q4_K   39 MB    9.1 us      152064 x 3584   Q6_K  447 MB   104 us
//   8192 x 29568   Q4_K  140 MB     33 us       59136 x 8192   Q4_K  280 MB    65 us
// Of that an SM takes 16.5 bytes a cycle at 1.98 GHz, a tile of Q4_K (592 bytes with its scales) in 36 cycles,
// in which it issues at most 143 warp instructions, 72 of them on the integer units. What a tile takes of these, of
// one token with TILES = 4 (2 where the rows are few) / of eight with TILES = 2 / of 16 with TILES = 2 (sm_90a):
//   Q4_0 61 (78) / 81 / 114    Q5_0 72 (87) / 95 / 120     Q8_0 - (114) / 120 / 151    Q2_K 123 (142) / 162 / 238
//   Q4_1 72 (86) / 98 / 134    Q5_1 83 (97) / 109 / 157    Q6_K 102 (112) / 126 / 173  Q3_K  92 (108) / 121 / 165
//   Q4_K 89 (105) / 116 / 159  Q5_K 99 (113) / 128 / 169
// of which a third is on the integer units: 28 (4 bits) to 56 (8 bits) to unpack 1024 weights.
// The activations are read from the L2 cache once for each TILES row tiles: 2 num_tokens bytes a column beside
// 9.5 TILES bytes of weights, so that from about eight tokens on that is what a matrix waits for.
//
// Work. A block takes groups of TILES row tiles, in steps of the grid. Its warps share k: warp w has tiles
// w, w + W, ... of a row tile, each with a ring of stages in shared memory of its own that cp.async fills, so that
// nothing in the loop waits for another warp, and that the next group's weights are on the way while the sums of
// this one are added up. The sums of the warps are added in the order of warps.
// How k is cut depends on W alone, which the host chooses by the shape of the matrix: the bits of a result depend
// neither on the other tokens, nor on TILES, nor on the grid. W is a multiple of 4, as superscales are for 4 tiles.
//
// The sum over one scale group is a chain of mma with integers as A (see formats.cuh), then acc += scale * sum
// in f32. Where a format has minima, acc -= minimum * sum(x), with sums by an mma whose A is all ones.
#pragma once

#include "dense.cuh"

namespace quant {

// COLUMNS of tokens are 1, 8 or 16. An mma has eight; of one token only the even columns are carried on.
template <class F, int TILES, int COLUMNS>
struct SmallSums {
    static constexpr int NT = ceil_div(COLUMNS, 8);
    static constexpr int STEP = COLUMNS == 1 ? 2 : 1;
    float sums[TILES][NT][4];

    __device__ __forceinline__ void clear() {
        for (int i = 0; i < TILES; i++)
            for (int n = 0; n < NT; n++)
                for (int c = 0; c < 4; c += STEP) sums[i][n][c] = 0.0f;
    }

    // [row tile][token tile][row g, g + 8][token 2t, 2t + 1][lane], or [row tile][row g, g + 8][g] of one token.
    __device__ __forceinline__ void put(float* to, int lane) const {
        constexpr int LANES = COLUMNS == 1 ? 8 : WARP_SIZE;
        if (COLUMNS == 1 && lane % 4 != 0) return;
        float* const of_lane = to + (COLUMNS == 1 ? lane / 4 : lane);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int c = 0; c < 4; c += STEP) of_lane[((i * NT + n) * 4 + c) / STEP * LANES] = sums[i][n][c];
            }
        }
    }

    // One stage: TILES weight tiles, then 128 bytes of each token.
    __device__ __forceinline__ void add_stage(const uint8_t* stage, int num_tokens, int lane) {
        const int g = lane / 4, t = lane % 4;
        uint32_t b[NT][TILE_PRODUCTS][2];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            // Columns beyond the last token repeat it; their sums are not used.
            const int token = ::min(8 * n + g, num_tokens - 1);
            load_activations<F::RUN>(b[n], stage + TILES * F::STAGE_BYTES + token * 128, token, t);
        }
        if constexpr (F::IS_DENSE) {
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                typename F::Fragment w;
                w.load(stage + i * F::STAGE_BYTES, lane);
#pragma unroll
                for (int j = 0; j < TILE_PRODUCTS; j++) {
                    uint32_t a[4];
                    w.unpack(a, j);
#pragma unroll
                    for (int n = 0; n < NT; n++) mma_m16n8k16_bf16(sums[i][n], a, b[n][j]);
                }
            }
        } else {
            add_quantised(stage, b, lane);
        }
    }

    __device__ __forceinline__ void add_quantised(
        const uint8_t* stage, const uint32_t (&b)[NT][TILE_PRODUCTS][2], int lane) {
        // Of tokens 2t and 2t + 1 the sum over each scale group, times BIAS where there is no minimum; the same in
        // both rows. Floats need none.
        constexpr uint32_t FACTOR = both(bf16_of_integer(F::HAS_MIN ? 1 : F::BIAS));
        const uint32_t factors[4] = {FACTOR, FACTOR, FACTOR, FACTOR};
        float x_sums[NT][F::GROUPS][4];
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int k = 0; k < F::GROUPS; k++) {
#pragma unroll
                for (int c = 0; c < 4; c++) x_sums[n][k][c] = 0.0f;
#pragma unroll
                for (int j = 0; j < F::GROUP_PRODUCTS && !F::IS_FLOAT; j++) {
                    mma_m16n8k16_bf16(x_sums[n][k], factors, b[n][k * F::GROUP_PRODUCTS + j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            typename F::Fragment w;
            w.load(stage + i * F::STAGE_BYTES, lane);
#pragma unroll
            for (int k = 0; k < F::GROUPS; k++) {
                const float scale[2] = {w.scale(k, 0), w.scale(k, 1)};
                float d[NT][4];
#pragma unroll
                for (int n = 0; n < NT; n++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        d[n][c] = F::HAS_MIN ? x_sums[n][k][c] * float(F::BIAS) : x_sums[n][k][c];
                    }
                }
#pragma unroll
                for (int j = 0; j < F::GROUP_PRODUCTS; j++) {
                    w.template multiply_raw<NT>(d, k * F::GROUP_PRODUCTS + j, b);
                }
#pragma unroll
                for (int n = 0; n < NT; n++) {
#pragma unroll
                    for (int c = 0; c < 4; c += STEP) {
                        float& sum = sums[i][n][c];
                        sum = fmaf(scale[c / 2], d[n][c], sum);
                        if constexpr (F::HAS_MIN) sum = fmaf(-w.min(k, c / 2), x_sums[n][k][c], sum);
                    }
                }
            }
        }
    }
};

// Floats that a warp puts into shared memory for each group: one token has them in a quarter of the lanes.
template <int TILES, int COLUMNS>
constexpr int SMALL_WARP_SUMS = TILES * (COLUMNS == 1 ? TILE_ROWS : ceil_div(COLUMNS, 8) * 4 * WARP_SIZE);

// How many stages a ring has, so that two blocks of eight warps fit into an SM, or one of 16, also of an A100, which
// has 163 KB: 10 KB a warp. Some 40 KB on the way to an SM are needed to keep memory busy.
template <class F, int TILES, int COLUMNS>
constexpr int small_stages() {
    const int free_bytes = 10240 - 2 * 4 * SMALL_WARP_SUMS<TILES, COLUMNS>;
    const int fitting = free_bytes / (TILES * F::STAGE_BYTES + COLUMNS * 128);
    return fitting < 2 ? 2 : 6 < fitting ? 6 : fitting;
}

// The copies of one warp into its ring. Every 16 bytes of a stage belong to one lane, whose source addresses grow
// by a fixed step from stage to stage, so that a copy takes three instructions.
template <class F, int TILES, int COLUMNS>
struct SmallPrefetch {
    static constexpr int STAGES = small_stages<F, TILES, COLUMNS>();
    // 16-byte pieces of the weights of a stage, and of one row tile of it.
    static constexpr int TILE_PIECES = F::STAGE_BYTES / 16, PIECES = TILES * TILE_PIECES;
    static constexpr int ROUNDS = ceil_div(PIECES, WARP_SIZE);

    const Product& p;
    const int num_tiles, num_groups, num_warps, warp, lane, stage_bytes;
    // Bytes from the ring to this lane's part of the activations of a stage, and tokens behind that of the lane.
    const int x_at, num_tokens_behind;
    // The ring is bytes first_at to end_at of shared memory; stage_at is the next stage.
    const int first_at, end_at;
    int group, tile, column, stage_at;
    uint8_t* const shared;
    const uint8_t* weights[ROUNDS];
    const bf16* x;

    __device__ __forceinline__ SmallPrefetch(const Product& product, uint8_t* shared_, int stage_bytes_)
        : p(product), num_tiles(p.num_tiles()), num_groups(ceil_div(p.num_row_tiles(), TILES)),
          num_warps(blockDim.x / WARP_SIZE), warp(threadIdx.x / WARP_SIZE), lane(threadIdx.x % WARP_SIZE),
          stage_bytes(stage_bytes_),
          x_at(kept(TILES * F::STAGE_BYTES + lane / 8 * 128 + activation_piece<F::RUN>(lane / 8, lane % 8) * 16)),
          num_tokens_behind(kept(p.num_tokens - lane / 8)), first_at(kept(warp * STAGES * stage_bytes)),
          end_at(kept(first_at + STAGES * stage_bytes)), group(blockIdx.x), tile(warp), stage_at(first_at),
          shared(shared_) {
        // A warp without a tile has no stages.
        if (num_tiles <= warp) group = num_groups;
        begin_group();
    }

    __device__ __forceinline__ void begin_group() {
        tile = warp;
        column = warp * TILE_COLS + lane % 8 * 8;
        x = p.x + (long long)(lane / 8) * p.num_cols + column;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int piece = lane + i * WARP_SIZE, row_tile = group * TILES + piece / TILE_PIECES;
            // A row tile beyond the last one is the last once more; nobody stores its sums.
            weights[i] = F::source(p, ::min(row_tile, p.num_row_tiles() - 1), warp, piece % TILE_PIECES);
        }
    }

    // The stage after the one that begins here.
    __device__ __forceinline__ int following(int at) const {
        at += stage_bytes;
        return at == end_at ? first_at : at;
    }

    // Fills the next stage, if there is one.
    __device__ __forceinline__ void next() {
        if (group < num_groups) {
            uint8_t* const stage = shared + stage_at;
#pragma unroll
            for (int i = 0; i < ROUNDS; i++) {
                const int piece = lane + i * WARP_SIZE;
                if ((i + 1) * WARP_SIZE <= PIECES || piece < PIECES) {
                    F::copy(stage, weights[i], p, group * TILES, tile, piece);
                }
                weights[i] += F::step(num_warps, piece % TILE_PIECES);
            }
            const bool valid = column < p.num_cols;
#pragma unroll
            for (int i = 0; i < ceil_div(COLUMNS, 4); i++) {
                if (4 * i < num_tokens_behind) {
                    cp_async_16(stage + x_at + i * 512, x + (long long)(4 * i) * p.num_cols, valid);
                }
            }
            x += num_warps * TILE_COLS;
            column += num_warps * TILE_COLS;
            stage_at = following(stage_at);
            tile += num_warps;
            if (num_tiles <= tile) {
                group += gridDim.x;
                begin_group();
            }
        }
        cp_async_commit();
    }
};

template <class F, int TILES, int COLUMNS>
__device__ __forceinline__ void matmul_small(const Product& p) {
    DYNAMIC_SHARED(uint8_t, shared);
    using Sums = SmallSums<F, TILES, COLUMNS>;
    constexpr int NT = Sums::NT, STAGES = small_stages<F, TILES, COLUMNS>();
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE, num_warps = blockDim.x / WARP_SIZE;
    const int num_tiles = p.num_tiles(), num_row_tiles = p.num_row_tiles();
    const int stage_bytes = TILES * F::STAGE_BYTES + p.num_tokens * 128;
    // Two sets of the sums of all warps, as one is still read while the next is written.
    constexpr int WARP_SUMS = SMALL_WARP_SUMS<TILES, COLUMNS>;
    float* const partial = reinterpret_cast<float*>(shared + num_warps * STAGES * stage_bytes);

    SmallPrefetch<F, TILES, COLUMNS> prefetch(p, shared, stage_bytes);
    for (int i = 0; i < STAGES - 1; i++) prefetch.next();

    Sums acc;
    int set = 0, stage_at = prefetch.first_at;
    for (int group = blockIdx.x; group < prefetch.num_groups; group += gridDim.x, set ^= 1) {
        acc.clear();
#pragma unroll 1
        for (int tile = warp; tile < num_tiles; tile += num_warps) {
            cp_async_wait<STAGES - 2>();
            // The copies of all lanes are there, and all have read the stage before, which is filled next.
            __syncwarp();
            prefetch.next();
            acc.add_stage(shared + stage_at, p.num_tokens, lane);
            stage_at = prefetch.following(stage_at);
        }
        float* const sums = partial + set * num_warps * WARP_SUMS;
        acc.put(sums + warp * WARP_SUMS, lane);
        __syncthreads();
        // A thread adds up two rows of one token.
        constexpr int LANES = COLUMNS == 1 ? 8 : WARP_SIZE;
        constexpr int TOKENS = COLUMNS == 1 ? 1 : 2;
        for (int task = threadIdx.x; task < TILES * NT * TOKENS * LANES; task += blockDim.x) {
            const int from = task % LANES, parity = task / LANES % TOKENS, part = task / LANES / TOKENS;
            const int g = COLUMNS == 1 ? from : from / 4;
            const int token = COLUMNS == 1 ? 0 : part % NT * 8 + from % 4 * 2 + parity;
            const int row_tile = group * TILES + part / NT;
            if (token < p.num_tokens && row_tile < num_row_tiles) {
                float low = 0.0f, high = 0.0f;
                for (int w = 0; w < num_warps; w++) {
                    const float* const of_warp = sums + w * WARP_SUMS + (part * 2 * TOKENS + parity) * LANES + from;
                    low += of_warp[0];
                    high += of_warp[TOKENS * LANES];
                }
                put_rows(p, token, row_tile, g, low, high);
            }
        }
    }
    cp_async_wait<0>();
}

}  // namespace quant
