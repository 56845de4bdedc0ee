// Causal attention of many queries per sequence over a paged cache: prompts, chunks of prompts, and
// batches that mix them.
//
//   out[i] = sum over p - window < j <= p of softmax_j(scale * q[i] . k[j]) * v[j],   p = seq_len - query_len + i
//
// q, out      [num_tokens, num_kv_heads * group, HEAD_DIM] bf16
// k, v        [num_blocks, num_kv_heads, block_size, HEAD_DIM] T (bf16, f16 or e4m3), block_size a multiple of
//             8; scale_log2 = scale * log2(e) and value_scale include what 8 bits are scaled by
// tiles       [num_tiles], each the work of one block per KV head
// partial_*   [num_slots, num_kv_heads, ROWS, HEAD_DIM] f32 and [.., ROWS, 2] (maximum, sum)
// window      at least 1; 2^31 - 1 for all keys
// grid        (num_kv_heads, num_tiles), THREADS threads, shared memory for the tiles of q, k and v in 16 bits
//             and, behind them, for copies of k and v in 8 bits
//
// A block takes ROWS rows, which are the queries from `first query` on times the `group` query heads of
// its KV head, so that all of them share one reading of the keys. It goes over the keys in tiles of KEYS
// with a running maximum and sum per row. The scores and their exponentials stay in registers: the
// accumulator of the first product has the layout that the second wants for its left operand.
//
//   warp w, 32 rows             keys ->  0      64     128
//     rows 32w .. 32w + 31   queries    [######][######][##/   ]    # visible, / compared key by key
//
// With a window the tiles begin where that of the first query does, and the first of them are compared
// key by key too.
//
// The copy of v runs during q k^T, that of the next k during softmax and p v. A tile with a slot covers
// only some of the keys its queries see, and writes what merge_partitions needs: few queries behind many
// keys would leave most of the device idle otherwise.
//
// Cost: 4 * HEAD_DIM operations per (query head, query, visible key): for n new tokens of n
// 2 * num_heads * HEAD_DIM * n^2. 4,096 tokens, 28 heads of 128: 120 Gop a layer, 0.15 ms at 790 TFLOP/s,
// 0.39 ms at the 312 of an A100. Bytes: q and out once, keys once per tile of queries, from the L2 cache, a
// byte per 128 operations. So it is bound by the tensor cores.

#include "pages.cuh"

namespace {

constexpr int ROWS = 128;
constexpr int KEYS = 64;
constexpr int NUM_WARPS = 4;
constexpr int THREADS = NUM_WARPS * WARP_SIZE;
constexpr int WARP_ROWS = ROWS / NUM_WARPS;
constexpr int ROW_TILES = WARP_ROWS / 16;
constexpr int KEY_TILES = KEYS / 8;
constexpr float LOWEST = -1e30f;  // below every score; finite, so that rows without a key so far do no harm
constexpr unsigned NO_SLOT = 0xffffffffu;

struct Tile {
    unsigned seq;
    unsigned first_query;
    unsigned first_key;  // a multiple of KEYS
    unsigned end_key;    // at most what the last query sees
    unsigned slot;       // NO_SLOT if the tile covers all keys that its queries see
};

struct Args {
    bf16* out;
    const bf16* q;
    const void* k;
    const void* v;
    const Tile* tiles;
    float* partial_out;
    float* partial_max_sum;
    const unsigned* query_start_loc;
    const unsigned* seq_lens;
    const unsigned* block_table;
    unsigned max_blocks_per_seq;
    unsigned group;
    unsigned block_size;
    unsigned window;
    float scale_log2;
    float value_scale;
};

template <typename T>
using Operand = typename Format<T>::Operand;

// What a thread copies of KEYS rows: CHUNKS_PER_THREAD chunks of 16 bytes, ROWS_PER_PASS rows apart.
template <int ROW_BYTES>
struct Share {
    static constexpr int CHUNKS = ROW_BYTES / 16;
    static constexpr int ROWS_PER_PASS = THREADS / CHUNKS;
    static constexpr int CHUNKS_PER_THREAD = KEYS / ROWS_PER_PASS;
};

// Starts the copy of KEYS rows to a tile, or, of numbers in 8 bits, to where widen_tile takes them from.
// Lane i knows granule i % 8 of the tile.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void copy_tile(unsigned char* tile, unsigned char* staging, const void* cache,
                                          unsigned granule, int num_valid) {
    constexpr int ROW_BYTES = HEAD_DIM * sizeof(T);
    using Mine = Share<ROW_BYTES>;
    const unsigned row = threadIdx.x / Mine::CHUNKS;
    const unsigned chunk = threadIdx.x % Mine::CHUNKS;
    const uint4* const source = static_cast<const uint4*>(cache) + row % GRANULE * Mine::CHUNKS + chunk;
    unsigned char* target = staging + threadIdx.x * 16;
    if constexpr (sizeof(T) == 2) {
        target = tile + tile_offset<ROW_BYTES>(row, chunk);
    }
#pragma unroll
    for (int i = 0; i < Mine::CHUNKS_PER_THREAD; i++) {
        const int first = i * Mine::ROWS_PER_PASS;
        const unsigned from = __shfl_sync(FULL_MASK, granule, first / GRANULE + row / GRANULE);
        cp_async_16(target + i * (sizeof(T) == 2 ? Mine::ROWS_PER_PASS * ROW_BYTES : THREADS * 16), source + size_t(from) * (GRANULE * Mine::CHUNKS), first + int(row) < num_valid);
    }
}

// Once a thread's copies are there, makes them a tile of 16-bit numbers.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void widen_tile(unsigned char* tile, const unsigned char* staging) {
    if constexpr (sizeof(T) == 1) {
        using Mine = Share<HEAD_DIM>;
        const unsigned row = threadIdx.x / Mine::CHUNKS;
        const unsigned chunk = threadIdx.x % Mine::CHUNKS;
#pragma unroll
        for (int i = 0; i < Mine::CHUNKS_PER_THREAD; i++) {
            const uint4 x = load_16(staging + (i * THREADS + threadIdx.x) * 16);
            unsigned char* const rows = tile + i * Mine::ROWS_PER_PASS * HEAD_DIM * 2;
            store_16(rows + tile_offset<HEAD_DIM * 2>(row, 2 * chunk),
                     make_uint4(widen_pair<0, 1>(x.x), widen_pair<2, 3>(x.x), widen_pair<0, 1>(x.y),
                                widen_pair<2, 3>(x.y)));
            store_16(rows + tile_offset<HEAD_DIM * 2>(row, 2 * chunk + 1),
                     make_uint4(widen_pair<0, 1>(x.z), widen_pair<2, 3>(x.z), widen_pair<0, 1>(x.w),
                                widen_pair<2, 3>(x.w)));
        }
    }
}

// Where row `row` of a block's queries lies, in values from its first one.
template <int HEAD_DIM>
__device__ __forceinline__ size_t row_offset(unsigned row, RowDivider divider, unsigned other_heads) {
    return size_t(row + divider.query(row) * other_heads) * HEAD_DIM;
}

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_queries(unsigned char* tile, const bf16* q, unsigned num_rows, RowDivider divider,
                                             unsigned other_heads) {
    constexpr int CHUNKS = HEAD_DIM / 8;
    constexpr int ROWS_PER_PASS = THREADS / CHUNKS;
    const unsigned chunk = threadIdx.x % CHUNKS;
#pragma unroll 8
    for (unsigned row = threadIdx.x / CHUNKS; row < ROWS; row += ROWS_PER_PASS) {
        uint4 values = {0, 0, 0, 0};
        if (row < num_rows) {
            values = load_16(q + row_offset<HEAD_DIM>(row, divider, other_heads) + chunk * 8);
        }
        values = {query_pair(values.x, Operand<T>()), query_pair(values.y, Operand<T>()),
                  query_pair(values.z, Operand<T>()), query_pair(values.w, Operand<T>())};
        store_16(tile + tile_offset<HEAD_DIM * 2>(row, chunk), values);
    }
}

// The state of a warp's rows. Lane l has of rows l / 4 and l / 4 + 8 of each row tile the columns
// 2 (l % 4) and the next of every eight.
template <int HEAD_DIM>
struct State {
    float out[ROW_TILES][HEAD_DIM / 8][4];
    float max[ROW_TILES][2];  // of scores times scale_log2
    float sum[ROW_TILES][2];  // this lane's columns only
};

// scores = q k^T, unscaled.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void multiply_queries(float (&scores)[ROW_TILES][KEY_TILES][4], const unsigned char* q_tile,
                                                 const unsigned char* k_tile) {
    const unsigned lane = threadIdx.x % WARP_SIZE;
    const unsigned warp = threadIdx.x / WARP_SIZE;
    const unsigned q_lane = tile_offset<HEAD_DIM * 2>(warp * WARP_ROWS + lane % 16, lane / 16);
    const unsigned k_lane = tile_offset<HEAD_DIM * 2>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
#pragma unroll
        for (int key_tile = 0; key_tile < KEY_TILES; key_tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[row_tile][key_tile][i] = 0.0f;
            }
        }
    }
#pragma unroll
    for (int depth = 0; depth < HEAD_DIM / 16; depth++) {
        uint32_t a[ROW_TILES][4];
#pragma unroll
        for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
            ldmatrix_x4(a[row_tile], q_tile + (q_lane ^ depth << 5) + row_tile * 16 * HEAD_DIM * 2);
        }
#pragma unroll
        for (int pair = 0; pair < KEY_TILES / 2; pair++) {
            uint32_t r[4];
            ldmatrix_x4(r, k_tile + (k_lane ^ depth << 5) + pair * 16 * HEAD_DIM * 2);
            const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
                    mma(scores[row_tile][2 * pair + half], a[row_tile], b[half], Operand<T>());
                }
            }
        }
    }
}

// Hides the keys of which `hides(key, own)` says so, `own` being the key at the row's own position; both count from
// `first_key`, which counts from the block's first query's position.
template <class Hides>
__device__ __forceinline__ void mask(
    float (&scores)[ROW_TILES][KEY_TILES][4], int first_key, RowDivider divider, Hides hides) {
    const unsigned lane = threadIdx.x % WARP_SIZE;
    const unsigned first_row = threadIdx.x / WARP_SIZE * WARP_ROWS + lane / LANES_PER_ROW;
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = divider.query(first_row + row_tile * 16 + half * 8);
            // Less the lane's first key, so that its keys are constants.
            const int own = query - first_key - int(lane % LANES_PER_ROW) * 2;
#pragma unroll
            for (int key_tile = 0; key_tile < KEY_TILES; key_tile++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& score = scores[row_tile][key_tile][half * 2 + i];
                    score = hides(key_tile * 8 + i, own) ? -INFINITY : score;
                }
            }
        }
    }
}

// Scores to weights relative to the rows' maxima, which are brought up to date with the sums and outputs.
template <int HEAD_DIM>
__device__ __forceinline__ void softmax(float (&scores)[ROW_TILES][KEY_TILES][4], State<HEAD_DIM>& state,
                                        float scale_log2) {
    float factors[ROW_TILES][2];
    bool changes = false;
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float max = fmaxf(scores[row_tile][0][half * 2], scores[row_tile][0][half * 2 + 1]);
#pragma unroll
            for (int key_tile = 1; key_tile < KEY_TILES; key_tile++) {
                max = fmaxf(max, fmaxf(scores[row_tile][key_tile][half * 2], scores[row_tile][key_tile][half * 2 + 1]));
            }
            const float old_max = state.max[row_tile][half];
            const float new_max = fmaxf(old_max, row_max(max) * scale_log2);
            state.max[row_tile][half] = new_max;
            const float factor = exp2_approx(old_max - new_max);
            changes |= factor != 1.0f;
            factors[row_tile][half] = factor;
        }
    }
    if (__any_sync(FULL_MASK, changes)) {
#pragma unroll
        for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int column_tile = 0; column_tile < HEAD_DIM / 8; column_tile++) {
                    state.out[row_tile][column_tile][i] *= factors[row_tile][i / 2];
                }
            }
            state.sum[row_tile][0] *= factors[row_tile][0];
            state.sum[row_tile][1] *= factors[row_tile][1];
        }
    }
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int key_tile = 0; key_tile < KEY_TILES; key_tile++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& score = scores[row_tile][key_tile][half * 2 + i];
                    score = exp2_approx(fmaf(score, scale_log2, -state.max[row_tile][half]));
                    state.sum[row_tile][half] += score;
                }
            }
        }
    }
}

// out += weights v
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void multiply_values(State<HEAD_DIM>& state,
                                                const float (&weights)[ROW_TILES][KEY_TILES][4],
                                                const unsigned char* v_tile) {
    const unsigned lane = threadIdx.x % WARP_SIZE;
    const unsigned v_lane = tile_offset<HEAD_DIM * 2>(lane % 16, lane / 16);
#pragma unroll
    for (int depth = 0; depth < KEYS / 16; depth++) {
        uint32_t a[ROW_TILES][4];
#pragma unroll
        for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
            const float(&w)[KEY_TILES][4] = weights[row_tile];
            a[row_tile][0] = pack_pair(w[2 * depth][0], w[2 * depth][1], Operand<T>());
            a[row_tile][1] = pack_pair(w[2 * depth][2], w[2 * depth][3], Operand<T>());
            a[row_tile][2] = pack_pair(w[2 * depth + 1][0], w[2 * depth + 1][1], Operand<T>());
            a[row_tile][3] = pack_pair(w[2 * depth + 1][2], w[2 * depth + 1][3], Operand<T>());
        }
#pragma unroll
        for (int pair = 0; pair < HEAD_DIM / 16; pair++) {
            uint32_t r[4];
            ldmatrix_x4_trans(r, v_tile + (v_lane ^ pair << 5) + depth * 16 * HEAD_DIM * 2);
            const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
                    mma(state.out[row_tile][2 * pair + half], a[row_tile], b[half], Operand<T>());
                }
            }
        }
    }
}

// Writes a warp's rows through its own rows of the tile of queries, so that 16 bytes go out at a time.
template <int HEAD_DIM>
__device__ __forceinline__ void store_outputs(bf16* out, State<HEAD_DIM>& state, unsigned char* tile,
                                              unsigned num_rows, RowDivider divider, unsigned other_heads,
                                              float value_scale) {
    constexpr int CHUNKS = HEAD_DIM / 8;
    const unsigned lane = threadIdx.x % WARP_SIZE;
    const unsigned first_row = threadIdx.x / WARP_SIZE * WARP_ROWS;
    __syncwarp();
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned row = first_row + row_tile * 16 + half * 8 + lane / LANES_PER_ROW;
            const float factor = value_scale / row_sum(state.sum[row_tile][half]);
#pragma unroll
            for (int column_tile = 0; column_tile < CHUNKS; column_tile++) {
                const float* const values = &state.out[row_tile][column_tile][half * 2];
                const uint32_t pair = pack_bf16x2(values[0] * factor, values[1] * factor);
                const unsigned offset = tile_offset<HEAD_DIM * 2>(row, column_tile) + lane % LANES_PER_ROW * 4;
                *reinterpret_cast<uint32_t*>(tile + offset) = pair;
            }
        }
    }
    __syncwarp();
    const unsigned chunk = lane % CHUNKS;
#pragma unroll 4
    for (unsigned i = lane / CHUNKS; i < WARP_ROWS; i += WARP_SIZE / CHUNKS) {
        const unsigned row = first_row + i;
        if (row < num_rows) {
            const uint4 values = load_16(tile + tile_offset<HEAD_DIM * 2>(row, chunk));
            store_16(out + row_offset<HEAD_DIM>(row, divider, other_heads) + chunk * 8, values);
        }
    }
}

// Writes a warp's rows as they are, for the merge with those of other keys.
template <int HEAD_DIM>
__device__ __forceinline__ void store_partials(float* out, float* max_sum, State<HEAD_DIM>& state, unsigned num_rows,
                                               float value_scale) {
    const unsigned lane = threadIdx.x % WARP_SIZE;
    const unsigned first_row = threadIdx.x / WARP_SIZE * WARP_ROWS + lane / LANES_PER_ROW;
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned row = first_row + row_tile * 16 + half * 8;
            const float sum = row_sum(state.sum[row_tile][half]);
            if (num_rows <= row) {
                continue;
            }
            if (lane % LANES_PER_ROW == 0) {
                max_sum[row * 2] = state.max[row_tile][half];
                max_sum[row * 2 + 1] = sum;
            }
#pragma unroll
            for (int column_tile = 0; column_tile < HEAD_DIM / 8; column_tile++) {
                const float* const values = &state.out[row_tile][column_tile][half * 2];
                float2* const target =
                    reinterpret_cast<float2*>(out + row * HEAD_DIM + column_tile * 8 + lane % LANES_PER_ROW * 2);
                *target = make_float2(values[0] * value_scale, values[1] * value_scale);
            }
        }
    }
}

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void paged_prefill(const Args& args) {
    DYNAMIC_SHARED(unsigned char, q_tile);
    unsigned char* const k_tile = q_tile + ROWS * HEAD_DIM * 2;
    unsigned char* const v_tile = k_tile + KEYS * HEAD_DIM * 2;
    unsigned char* const k_staging = v_tile + KEYS * HEAD_DIM * 2;  // in 8 bits only
    unsigned char* const v_staging = k_staging + KEYS * HEAD_DIM;

    const unsigned num_kv_heads = gridDim.x;
    const unsigned kv_head = blockIdx.x;
    const Tile tile = args.tiles[blockIdx.y];
    const unsigned query_start = args.query_start_loc[tile.seq];
    const unsigned query_len = args.query_start_loc[tile.seq + 1] - query_start;
    const unsigned group = args.group;
    const RowDivider divider(group);
    const unsigned num_queries = min(ROWS / group, query_len - tile.first_query);
    const unsigned num_rows = num_queries * group;
    const unsigned other_heads = (num_kv_heads - 1) * group;
    const size_t first_row = (size_t(query_start + tile.first_query) * num_kv_heads + kv_head) * group;
    const int first_position = args.seq_lens[tile.seq] - query_len + tile.first_query;
    const int window = int(args.window);
    const int first_key = tile.first_key;
    const unsigned end_key = tile.end_key;
    const Pages pages = {args.block_table + size_t(tile.seq) * args.max_blocks_per_seq, end_key, args.block_size,
                         num_kv_heads, kv_head};

    const unsigned lane = threadIdx.x % WARP_SIZE;
    const unsigned warp_row = threadIdx.x / WARP_SIZE * WARP_ROWS;

    unsigned granule = pages.granule(first_key + lane % 8 * GRANULE);
    copy_tile<T, HEAD_DIM>(k_tile, k_staging, args.k, granule, end_key - first_key);
    cp_async_commit();
    load_queries<T, HEAD_DIM>(q_tile, args.q + first_row * HEAD_DIM, num_rows, divider, other_heads);

    State<HEAD_DIM> state;
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            state.max[row_tile][half] = LOWEST;
            state.sum[row_tile][half] = 0.0f;
        }
#pragma unroll
        for (int column_tile = 0; column_tile < HEAD_DIM / 8; column_tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                state.out[row_tile][column_tile][i] = 0.0f;
            }
        }
    }

    for (int key = first_key; key < int(end_key); key += KEYS) {
        cp_async_wait<0>();
        widen_tile<T, HEAD_DIM>(k_tile, k_staging);
        __syncthreads();
        copy_tile<T, HEAD_DIM>(v_tile, v_staging, args.v, granule, end_key - key);
        cp_async_commit();
        granule = pages.granule(key + KEYS + lane % 8 * GRANULE);
        const int last_query = divider.query(warp_row + WARP_ROWS - 1);
        const bool is_visible = warp_row < num_rows && key - first_position <= last_query;
        float scores[ROW_TILES][KEY_TILES][4];
        if (is_visible) {
            multiply_queries<T, HEAD_DIM>(scores, q_tile, k_tile);
        }
        cp_async_wait<0>();
        widen_tile<T, HEAD_DIM>(v_tile, v_staging);
        __syncthreads();
        if (key + KEYS < int(end_key)) {
            copy_tile<T, HEAD_DIM>(k_tile, k_staging, args.k, granule, end_key - key - KEYS);
        }
        cp_async_commit();
        if (is_visible) {
            if (int(divider.query(warp_row)) < key - first_position + KEYS - 1) {
                mask(scores, key - first_position, divider, [](int key, int own) { return own < key; });
            }
            if (key - first_position <= last_query - window) {
                const auto is_before = [window](int key, int own) { return key <= own - window; };
                mask(scores, key - first_position, divider, is_before);
            }
            softmax(scores, state, args.scale_log2);
            multiply_values<T, HEAD_DIM>(state, scores, v_tile);
        }
    }

    if (tile.slot == NO_SLOT) {
        store_outputs(args.out + first_row * HEAD_DIM, state, q_tile, num_rows, divider, other_heads,
                      args.value_scale);
    } else {
        const size_t row = (size_t(tile.slot) * num_kv_heads + kv_head) * ROWS;
        store_partials(args.partial_out + row * HEAD_DIM, args.partial_max_sum + row * 2, state, num_rows,
                       args.value_scale);
    }
}

}  // namespace

#define PAGED_PREFILL(name, type, head_dim)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, head_dim == 128 ? 2 : 3)                                  \
        name(bf16* out, const bf16* q, const void* k, const void* v, const Tile* tiles, float* partial_out,         \
             float* partial_max_sum, const unsigned* query_start_loc, const unsigned* seq_lens,                     \
             const unsigned* block_table, unsigned max_blocks_per_seq, unsigned group, unsigned block_size,         \
             unsigned window, float scale_log2, float value_scale) {                                                \
        paged_prefill<type, head_dim>({out, q, k, v, tiles, partial_out, partial_max_sum, query_start_loc,          \
                                       seq_lens, block_table, max_blocks_per_seq, group, block_size, window,        \
                                       scale_log2 * Format<type>::DIVISOR, value_scale * Format<type>::DIVISOR});   \
    }                                                                                                               \
    KERNEL(name);

PAGED_PREFILL(paged_prefill_bf16_64, bf16, 64)
PAGED_PREFILL(paged_prefill_bf16_128, bf16, 128)
PAGED_PREFILL(paged_prefill_f16_64, f16, 64)
PAGED_PREFILL(paged_prefill_f16_128, f16, 128)
PAGED_PREFILL(paged_prefill_e4m3_64, e4m3, 64)
PAGED_PREFILL(paged_prefill_e4m3_128, e4m3, 128)
