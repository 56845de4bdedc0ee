// Causal attention of one or few queries per sequence over a paged cache: the step that generates.
//
//   out[i] = sum over p - window < j <= p of softmax_j(scale * q[i] . k[j]) * v[j],   p = seq_len - query_len + i
//
// q, out      [num_tokens, num_kv_heads * group, HEAD_DIM] bf16
// k, v        [num_blocks, num_kv_heads, block_size, HEAD_DIM] T (bf16, f16 or e4m3), block_size a multiple of
//             8; scale_log2 = scale * log2(e) and value_scale include what 8 bits are scaled by
// partial_*   [num_partials, num_heads, HEAD_DIM] f32 and [num_partials, num_heads, 2] (maximum, sum), where
//             num_partials is at least the sum of query_len * partitions over the sequences
// counters    [num_seqs, num_kv_heads, MAX_ROW_TILES], zero before and after
// window      at least 1; 2^31 - 1 for all keys
// grid        any number of blocks of THREADS threads
//
// Sequences with more than MAX_ROW_TILES * 16 rows (queries times `group` heads), without queries or
// with a seq_len of zero are left out; their outputs stay as they are.
//
// The work is cut into items of one sequence, partition of its keys, KV head and tile of 16 rows, which
// share one reading of the keys. A partition is 128 keys, or as many as make 32 partitions of those that
// any query sees: it depends on the sequence alone, so numbers do not depend on the batch. The grid does
// not depend on the lengths, as a captured graph needs it: each block counts the items of all sequences
// and takes those of its number, and the ones that lie gridDim.x further on.
//
//   keys of a sequence   [ not read: before the window of the first query | partition 0 | partition 1 | ... | last ]
//   of a partition       [w0|w1|w2|w3|w0|w1|w2|w3| ... ]   tiles of the warps, each with its own ring
//
// Partition 0 begins at a multiple of 8, at most 7 keys before the window; the last one ends with the
// sequence and may have so many more.
//
// No warp waits for another before the end of the partition. Then the warps' results are merged in
// shared memory; the block that completes the last partition of a sequence merges those of all.
//
// Cost: the keys and values of the window are read once, 4 * HEAD_DIM bytes per token and KV head (half of it in 8
// bits), and the partial outputs written and read, 8 * group * HEAD_DIM per partition (an eighth of it
// at most, and mostly within the L2 cache). 7B (4 KV heads of
// 128), 64 sequences of 2,048 tokens: 268 MB a layer, 62 us at 4.3 TB/s. 4 * group * HEAD_DIM operations per
// token and KV head, 7 per byte there: bound by memory. One short sequence is bound by latency: metadata,
// block table, keys, one after the other.

#include "pages.cuh"

namespace {

constexpr int NUM_WARPS = 4;
constexpr int THREADS = NUM_WARPS * WARP_SIZE;
constexpr int ROWS = 16;
constexpr int MAX_ROW_TILES = 4;
constexpr int STAGES = 2;
constexpr unsigned MIN_PARTITION = 128;
constexpr unsigned MAX_PARTITIONS = 32;
constexpr unsigned MAX_PARTITIONS_LOG2 = 5;

struct Args {
    bf16* out;
    const bf16* q;
    const void* k;
    const void* v;
    float* partial_out;
    float* partial_max_sum;
    unsigned* counters;
    const unsigned* query_start_loc;
    const unsigned* seq_lens;
    const unsigned* block_table;
    unsigned num_seqs;
    unsigned max_blocks_per_seq;
    unsigned num_kv_heads;
    unsigned group;
    unsigned block_size;
    unsigned window;
    float scale_log2;
    float value_scale;
};

template <typename T>
using Operand = typename Format<T>::Operand;

// How one sequence's work is cut.
struct Cut {
    unsigned first_key;  // that is read
    unsigned partition_len;
    unsigned num_partitions;  // zero: none of this kernel's work
    unsigned num_row_tiles;

    __device__ __forceinline__ Cut(unsigned query_len, unsigned seq_len, unsigned group, unsigned window) {
        constexpr unsigned LIMIT = MIN_PARTITION * MAX_PARTITIONS;
        const unsigned end_first = seq_len - query_len + 1;  // of what the first query sees
        const unsigned first_seen = seq_len != 0 && window < end_first ? end_first - window : 0;
        const unsigned num_seen = seq_len - first_seen;
        const unsigned times = num_seen == 0 ? 0 : (num_seen - 1) / LIMIT;
        first_key = first_seen / GRANULE * GRANULE;
        partition_len = MIN_PARTITION << (32 - __clz(int(times)));
        num_row_tiles = ceil_div(query_len * group, unsigned(ROWS));
        const bool is_ours = 0 < query_len && query_len <= MAX_ROW_TILES * ROWS && num_row_tiles <= MAX_ROW_TILES;
        num_partitions = is_ours ? ceil_div(num_seen, partition_len) : 0;
    }
    // Per KV head.
    __device__ __forceinline__ unsigned num_items() const { return num_partitions * num_row_tiles; }
    __device__ __forceinline__ unsigned num_partials(unsigned query_len) const {
        return 1 < num_partitions ? num_partitions * query_len : 0;
    }
};

// Fills `item_starts` and `partial_starts`, each [num_seqs + 1], with the sums over the sequences before.
__device__ __forceinline__ void count_items(unsigned* item_starts, unsigned* partial_starts, const Args& args) {
    __shared__ unsigned warp_sums[2][NUM_WARPS];
    const unsigned lane = threadIdx.x % WARP_SIZE;
    const unsigned warp = threadIdx.x / WARP_SIZE;
    const unsigned seqs_per_thread = ceil_div(args.num_seqs, unsigned(THREADS));
    const unsigned first = min(threadIdx.x * seqs_per_thread, args.num_seqs);
    const unsigned end = min(first + seqs_per_thread, args.num_seqs);
    unsigned items = 0;
    unsigned partials = 0;
    for (unsigned seq = first; seq < end; seq++) {
        const unsigned query_len = args.query_start_loc[seq + 1] - args.query_start_loc[seq];
        const Cut cut(query_len, args.seq_lens[seq], args.group, args.window);
        item_starts[seq] = items;
        partial_starts[seq] = partials;
        items += cut.num_items();
        partials += cut.num_partials(query_len);
    }
    unsigned items_through = items;
    unsigned partials_through = partials;
#pragma unroll
    for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
        const unsigned more_items = __shfl_up_sync(FULL_MASK, items_through, distance);
        const unsigned more_partials = __shfl_up_sync(FULL_MASK, partials_through, distance);
        items_through += distance <= int(lane) ? more_items : 0;
        partials_through += distance <= int(lane) ? more_partials : 0;
    }
    if (lane == WARP_SIZE - 1) {
        warp_sums[0][warp] = items_through;
        warp_sums[1][warp] = partials_through;
    }
    __syncthreads();
    for (unsigned i = 0; i < warp; i++) {
        items_through += warp_sums[0][i];
        partials_through += warp_sums[1][i];
    }
    for (unsigned seq = first; seq < end; seq++) {
        item_starts[seq] += items_through - items;
        partial_starts[seq] += partials_through - partials;
    }
    if (threadIdx.x == THREADS - 1) {
        item_starts[args.num_seqs] = items_through;
    }
    __syncthreads();
}

// The last sequence whose items start at or before `item`; those without items are passed over.
__device__ __forceinline__ unsigned find_sequence(const unsigned* item_starts, unsigned num_seqs, unsigned item) {
    unsigned low = 0;
    unsigned high = num_seqs;
    while (low + 1 < high) {
        const unsigned middle = (low + high) / 2;
        if (item_starts[middle] <= item) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// What one block does at a time.
struct Item {
    Pages pages;
    unsigned seq;
    unsigned row_tile;
    unsigned partition;
    unsigned num_partitions;
    unsigned first_key;
    unsigned end_key;
    unsigned first_row;   // of the sequence's rows
    unsigned num_rows;    // at most ROWS
    unsigned first_position;  // of the sequence's first query
    unsigned first_token;
    unsigned first_partial;
};

// A warp's copies of its tiles: tile n of the warp is tile n * NUM_WARPS + warp of the partition.
template <typename T, int HEAD_DIM>
struct Ring {
    static constexpr int ROW_BYTES = HEAD_DIM * sizeof(T);
    static constexpr int CHUNKS = ROW_BYTES / 16;
    static constexpr int KEYS = ROW_BYTES == 256 ? 16 : 32;
    static constexpr int GRANULES = KEYS / GRANULE;
    static constexpr int TILES_PER_LOOKUP = WARP_SIZE / GRANULES;
    static constexpr int TILE_BYTES = KEYS * ROW_BYTES;
    static constexpr int BYTES = STAGES * 2 * TILE_BYTES;
    static constexpr int ROWS_PER_PASS = WARP_SIZE / CHUNKS;

    unsigned char* stages;
    const unsigned char* k;
    const unsigned char* v;
    Pages pages;
    unsigned first_key;  // of the warp's first tile
    unsigned granule;    // lane i: granule i % GRANULES of tile i / GRANULES after the last lookup

    __device__ __forceinline__ unsigned key_of(unsigned n) const { return first_key + n * (NUM_WARPS * KEYS); }
    __device__ __forceinline__ unsigned char* keys(unsigned n) const { return stages + n % STAGES * 2 * TILE_BYTES; }
    __device__ __forceinline__ unsigned char* values(unsigned n) const { return keys(n) + TILE_BYTES; }

    // Starts the copy of tile n; to be called for every n in order, by the whole warp.
    __device__ __forceinline__ void copy(unsigned n, unsigned num_tiles) {
        const unsigned lane = threadIdx.x % WARP_SIZE;
        if (n < num_tiles) {
            if (n % TILES_PER_LOOKUP == 0) {
                granule = pages.granule(key_of(n + lane / GRANULES) + lane % GRANULES * GRANULE);
            }
            const unsigned row = lane / CHUNKS;
            const unsigned chunk = lane % CHUNKS;
            const unsigned key = key_of(n) + row;
            const unsigned lookup = n % TILES_PER_LOOKUP * GRANULES;
#pragma unroll
            for (int i = 0; i < GRANULES; i++) {
                const size_t from = __shfl_sync(FULL_MASK, granule, lookup + i);
                const size_t source = from * (GRANULE * ROW_BYTES) + row * ROW_BYTES + chunk * 16;
#pragma unroll
                for (int j = 0; j < GRANULE; j += ROWS_PER_PASS) {
                    const bool is_valid = key + i * GRANULE + j < pages.num_keys;
                    const unsigned target = tile_offset<ROW_BYTES>(i * GRANULE + j + row, chunk);
                    cp_async_16(keys(n) + target, k + source + j * ROW_BYTES, is_valid);
                    cp_async_16(values(n) + target, v + source + j * ROW_BYTES, is_valid);
                }
            }
        }
        cp_async_commit();
    }
};

// What a warp knows of the 16 rows. Lane l has of rows l / 4 and l / 4 + 8 the columns 2 (l % 4) and the
// next of every eight.
template <int HEAD_DIM>
struct State {
    float out[HEAD_DIM / 8][4];
    float max[2];  // of scores times scale_log2
    float sum[2];  // this lane's columns only
};

// Adds a tile of keys, the first one `first_key`, to the state. Row i sees keys from first_seen[i] to
// last_key[i]; all rows see those from `end_hiding` on, as far as first_seen is concerned.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void attend(State<HEAD_DIM>& state, const uint32_t (&q)[HEAD_DIM / 16][4],
                                       const unsigned char* k_tile, const unsigned char* v_tile, int first_key,
                                       const int (&first_seen)[2], int end_hiding, const int (&last_key)[2],
                                       float scale_log2) {
    constexpr int KEYS = Ring<T, HEAD_DIM>::KEYS;
    constexpr int ROW_BYTES = HEAD_DIM * sizeof(T);
    const unsigned lane = threadIdx.x % WARP_SIZE;
    float scores[KEYS / 8][4] = {};
    const unsigned k_lane = key_lane_offset<T, ROW_BYTES>(lane);
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 32; step++) {
#pragma unroll
        for (int pair = 0; pair < KEYS / 16; pair++) {
            uint32_t b[2][2][2];
            key_operands<T>(b, k_tile + pair * 16 * ROW_BYTES, k_lane, step);
#pragma unroll
            for (int depth = 0; depth < 2; depth++) {
                mma(scores[2 * pair], q[2 * step + depth], b[depth][0], Operand<T>());
                mma(scores[2 * pair + 1], q[2 * step + depth], b[depth][1], Operand<T>());
            }
        }
    }
    const int column = first_key + int(lane % LANES_PER_ROW) * 2;
    if (first_key < end_hiding) {
#pragma unroll
        for (int key_tile = 0; key_tile < KEYS / 8; key_tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& score = scores[key_tile][i];
                score = first_seen[i / 2] <= column + key_tile * 8 + i % 2 ? score : -INFINITY;
            }
        }
    }
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float max = state.max[half];
#pragma unroll
        for (int key_tile = 0; key_tile < KEYS / 8; key_tile++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = scores[key_tile][half * 2 + i];
                score = column + key_tile * 8 + i <= last_key[half] ? score * scale_log2 : -INFINITY;
                max = fmaxf(max, score);
            }
        }
        max = row_max(max);
        factors[half] = exp2_approx(state.max[half] - max);
        state.max[half] = max;
        float sum = 0.0f;
#pragma unroll
        for (int key_tile = 0; key_tile < KEYS / 8; key_tile++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = scores[key_tile][half * 2 + i];
                score = exp2_approx(score - max);
                sum += score;
            }
        }
        state.sum[half] = fmaf(state.sum[half], factors[half], sum);
    }
    if (__any_sync(FULL_MASK, factors[0] != 1.0f || factors[1] != 1.0f)) {
#pragma unroll
        for (int column_tile = 0; column_tile < HEAD_DIM / 8; column_tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                state.out[column_tile][i] *= factors[i / 2];
            }
        }
    }
    const unsigned v_lane = value_lane_offset<ROW_BYTES>(lane);
#pragma unroll
    for (int depth = 0; depth < KEYS / 16; depth++) {
        const float(&w)[4] = scores[2 * depth];
        const float(&next)[4] = scores[2 * depth + 1];
        const uint32_t a[4] = {pack_pair(w[0], w[1], Operand<T>()), pack_pair(w[2], w[3], Operand<T>()),
                               pack_pair(next[0], next[1], Operand<T>()), pack_pair(next[2], next[3], Operand<T>())};
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 32; step++) {
            uint32_t b[4][2];
            value_operands<T>(b, v_tile + depth * 16 * ROW_BYTES, v_lane, step);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mma(state.out[4 * step + i], a, b[i], Operand<T>());
            }
        }
    }
}

// The rows' queries as left operands. Rows behind the last are zero.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_queries(uint32_t (&q)[HEAD_DIM / 16][4], const Item& item, const Args& args) {
    const unsigned lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const unsigned row = lane / LANES_PER_ROW + half * 8;
        const unsigned query = (item.first_row + row) / args.group;
        const unsigned head = item.pages.kv_head * args.group + item.first_row + row - query * args.group;
        const size_t start = (size_t(item.first_token + query) * args.num_kv_heads * args.group + head) * HEAD_DIM;
        const bool is_valid = row < item.num_rows;
#pragma unroll
        for (int depth = 0; depth < HEAD_DIM / 16; depth++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const unsigned dim = depth * 16 + query_dim<T>(lane % LANES_PER_ROW, i);
                const uint32_t pair = is_valid ? *reinterpret_cast<const uint32_t*>(args.q + start + dim) : 0;
                q[depth][half + 2 * i] = query_pair(pair, Operand<T>());
            }
        }
    }
}

// Four floats that another block wrote during this launch.
__device__ __forceinline__ float4 load_fresh(const float* address) {
#ifdef __CUDACC__
    return __ldcg(reinterpret_cast<const float4*>(address));
#else
    return *reinterpret_cast<const float4*>(address);
#endif
}
__device__ __forceinline__ float2 load_fresh_pair(const float* address) {
#ifdef __CUDACC__
    return __ldcg(reinterpret_cast<const float2*>(address));
#else
    return *reinterpret_cast<const float2*>(address);
#endif
}

__device__ __forceinline__ void add_scaled(float4& sum, float factor, float4 x) {
    sum.x = fmaf(factor, x.x, sum.x);
    sum.y = fmaf(factor, x.y, sum.y);
    sum.z = fmaf(factor, x.z, sum.z);
    sum.w = fmaf(factor, x.w, sum.w);
}

__device__ __forceinline__ void store_output(bf16* address, float4 sum, float factor) {
    store_8(address, make_uint2(pack_bf16x2(sum.x * factor, sum.y * factor),
                                pack_bf16x2(sum.z * factor, sum.w * factor)));
}

// The number of a row's head in [num_tokens, num_heads], and of its partial result of a partition.
struct RowIndex {
    size_t head;
    size_t partial;       // of partition 0
    unsigned num_heads;  // from one partition to the next

    __device__ __forceinline__ RowIndex(const Item& item, const Args& args, unsigned row) {
        num_heads = args.num_kv_heads * args.group;
        const unsigned query = (item.first_row + row) / args.group;
        const unsigned in_token = item.pages.kv_head * args.group + item.first_row + row - query * args.group;
        head = size_t(item.first_token + query) * num_heads + in_token;
        partial = size_t(item.first_partial + query * item.num_partitions) * num_heads + in_token;
    }
};

// Merges the warps' states and writes the outputs, or the partial ones if there are other partitions.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void merge_warps(State<HEAD_DIM>& state, float* shared, const Item& item, const Args& args) {
    constexpr int STRIDE = HEAD_DIM + 8;  // spreads the rows over the banks
    constexpr int VECTORS = HEAD_DIM / 4;
    __shared__ float maxima[NUM_WARPS][ROWS];
    __shared__ float sums[NUM_WARPS][ROWS];
    const unsigned lane = threadIdx.x % WARP_SIZE;
    const unsigned warp = threadIdx.x / WARP_SIZE;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const unsigned row = lane / LANES_PER_ROW + half * 8;
        const float sum = row_sum(state.sum[half]);
        if (lane % LANES_PER_ROW == 0) {
            maxima[warp][row] = state.max[half];
            sums[warp][row] = sum;
        }
    }
    // Behind this barrier no warp needs its ring any more.
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const unsigned row = lane / LANES_PER_ROW + half * 8;
        if (row < item.num_rows) {
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; i++) {
                const ColumnPair pair = column_pair<T>(&state.out[i / 2 * 2], half, i % 2, lane % LANES_PER_ROW);
                float* const target = shared + (warp * ROWS + row) * STRIDE + i / 2 * 16 + pair.column;
                *reinterpret_cast<float2*>(target) = make_float2(pair.low, pair.high);
            }
        }
    }
    __syncthreads();
    const unsigned column = threadIdx.x % VECTORS * 4;
    for (unsigned row = threadIdx.x / VECTORS; row < item.num_rows; row += THREADS / VECTORS) {
        float max = maxima[0][row];
#pragma unroll
        for (int i = 1; i < NUM_WARPS; i++) {
            max = fmaxf(max, maxima[i][row]);
        }
        float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < NUM_WARPS; i++) {
            const float factor = exp2_approx(maxima[i][row] - max);
            sum = fmaf(factor, sums[i][row], sum);
            add_scaled(out, factor, *reinterpret_cast<float4*>(shared + (i * ROWS + row) * STRIDE + column));
        }
        const RowIndex index(item, args, row);
        if (item.num_partitions == 1) {
            store_output(args.out + index.head * HEAD_DIM + column, out, args.value_scale / sum);
            continue;
        }
        const size_t partial = index.partial + size_t(item.partition) * index.num_heads;
        *reinterpret_cast<float4*>(args.partial_out + partial * HEAD_DIM + column) = out;
        if (column == 0) {
            *reinterpret_cast<float2*>(args.partial_max_sum + partial * 2) = make_float2(max, sum);
        }
    }
}

// True for the block that comes last of those of a sequence's partitions; it sees what the others wrote.
__device__ __forceinline__ bool is_last_partition(const Item& item, const Args& args) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        // Also orders what the other threads wrote before the barrier.
        __threadfence();
        const unsigned counter = (item.seq * args.num_kv_heads + item.pages.kv_head) * MAX_ROW_TILES + item.row_tile;
        // Starts again at zero after the last.
        is_last = atomicInc(args.counters + counter, item.num_partitions - 1) == item.num_partitions - 1;
        __threadfence();
    }
    __syncthreads();
    return is_last;
}

// Merges the partial outputs of all partitions.
template <int HEAD_DIM>
__device__ __forceinline__ void merge_partitions(float* weights, const Item& item, const Args& args) {
    constexpr int VECTORS = HEAD_DIM / 4;
    const unsigned lane = threadIdx.x % WARP_SIZE;
    // A lane for each partition.
    for (unsigned row = threadIdx.x / WARP_SIZE; row < item.num_rows; row += NUM_WARPS) {
        const RowIndex index(item, args, row);
        float2 max_sum = make_float2(-INFINITY, 0.0f);
        if (lane < item.num_partitions) {
            max_sum = load_fresh_pair(args.partial_max_sum + (index.partial + size_t(lane) * index.num_heads) * 2);
        }
        float max = max_sum.x;
#pragma unroll
        for (int distance = WARP_SIZE / 2; 0 < distance; distance /= 2) {
            max = fmaxf(max, __shfl_xor_sync(FULL_MASK, max, distance));
        }
        const float factor = exp2_approx(max_sum.x - max);
        float sum = factor * max_sum.y;
#pragma unroll
        for (int distance = WARP_SIZE / 2; 0 < distance; distance /= 2) {
            sum += __shfl_xor_sync(FULL_MASK, sum, distance);
        }
        weights[row * WARP_SIZE + lane] = factor / sum;
    }
    __syncthreads();
    const unsigned column = threadIdx.x % VECTORS * 4;
    for (unsigned row = threadIdx.x / VECTORS; row < item.num_rows; row += THREADS / VECTORS) {
        const RowIndex index(item, args, row);
        const float* const source = args.partial_out + index.partial * HEAD_DIM + column;
        const size_t step = size_t(index.num_heads) * HEAD_DIM;
        float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (unsigned partition = 0; partition < item.num_partitions; partition++) {
            add_scaled(out, weights[row * WARP_SIZE + partition], load_fresh(source + partition * step));
        }
        store_output(args.out + index.head * HEAD_DIM + column, out, args.value_scale);
    }
    __syncthreads();
}

static_assert(MAX_PARTITIONS == WARP_SIZE && MAX_PARTITIONS == 1 << MAX_PARTITIONS_LOG2, "a lane each");

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void run_item(unsigned char* shared, const Item& item, const Args& args) {
    using WarpRing = Ring<T, HEAD_DIM>;
    const unsigned lane = threadIdx.x % WARP_SIZE;
    const unsigned warp = threadIdx.x / WARP_SIZE;
    const unsigned num_tiles_of_all = ceil_div(item.end_key - item.first_key, unsigned(WarpRing::KEYS));
    const unsigned num_tiles = (num_tiles_of_all + NUM_WARPS - 1 - warp) / NUM_WARPS;
    WarpRing ring = {shared + warp * WarpRing::BYTES,
                     static_cast<const unsigned char*>(args.k),
                     static_cast<const unsigned char*>(args.v),
                     item.pages,
                     item.first_key + warp * WarpRing::KEYS,
                     0};
#pragma unroll
    for (int n = 0; n < STAGES; n++) {
        ring.copy(n, num_tiles);
    }
    uint32_t q[HEAD_DIM / 16][4];
    load_queries<T, HEAD_DIM>(q, item, args);
    State<HEAD_DIM> state = {};
    int first_seen[2];
    int last_key[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Finite, so that a row without a key in this partition does no harm.
        state.max[half] = -1e30f;
        const unsigned row = item.first_row + lane / LANES_PER_ROW + half * 8;
        const unsigned position = item.first_position + row / args.group;
        first_seen[half] = int(position + 1) - int(args.window);
        last_key[half] = int(min(position, item.end_key - 1));
    }
    const unsigned last_row = item.first_row + item.num_rows - 1;
    const int end_hiding = int(item.first_position + last_row / args.group + 1) - int(args.window);
#pragma unroll 1
    for (unsigned n = 0; n < num_tiles; n++) {
        cp_async_wait<STAGES - 1>();
        __syncwarp();
        attend<T, HEAD_DIM>(state, q, ring.keys(n), ring.values(n), ring.key_of(n), first_seen, end_hiding,
                            last_key, args.scale_log2);
        __syncwarp();
        ring.copy(n + STAGES, num_tiles);
    }
    float* const merge_space = reinterpret_cast<float*>(shared);
    merge_warps<T, HEAD_DIM>(state, merge_space, item, args);
    if (1 < item.num_partitions && is_last_partition(item, args)) {
        merge_partitions<HEAD_DIM>(merge_space, item, args);
    }
    __syncthreads();
}

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void paged_decode(const Args& args) {
    DYNAMIC_SHARED(unsigned char, shared);
    unsigned* const item_starts = reinterpret_cast<unsigned*>(shared + NUM_WARPS * Ring<T, HEAD_DIM>::BYTES);
    unsigned* const partial_starts = item_starts + args.num_seqs + 1;
    count_items(item_starts, partial_starts, args);
    const unsigned num_items = item_starts[args.num_seqs] * args.num_kv_heads;
    for (unsigned i = blockIdx.x; i < num_items; i += gridDim.x) {
        const unsigned seq = find_sequence(item_starts, args.num_seqs, i / args.num_kv_heads);
        const unsigned in_seq = i / args.num_kv_heads - item_starts[seq];
        const unsigned query_start = args.query_start_loc[seq];
        const unsigned query_len = args.query_start_loc[seq + 1] - query_start;
        const unsigned seq_len = args.seq_lens[seq];
        const Cut cut(query_len, seq_len, args.group, args.window);
        Item item;
        item.seq = seq;
        item.row_tile = in_seq / cut.num_partitions;
        item.partition = in_seq % cut.num_partitions;
        item.num_partitions = cut.num_partitions;
        item.first_key = cut.first_key + item.partition * cut.partition_len;
        item.end_key = item.partition + 1 == cut.num_partitions ? seq_len : item.first_key + cut.partition_len;
        item.first_row = item.row_tile * ROWS;
        item.num_rows = min(query_len * args.group - item.first_row, unsigned(ROWS));
        item.first_position = seq_len - query_len;
        item.first_token = query_start;
        item.first_partial = partial_starts[seq];
        item.pages = {args.block_table + size_t(seq) * args.max_blocks_per_seq, item.end_key, args.block_size,
                      args.num_kv_heads, i % args.num_kv_heads};
        run_item<T, HEAD_DIM>(shared, item, args);
    }
}

}  // namespace

#define PAGED_DECODE(name, type, head_dim)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                       \
        name(bf16* out, const bf16* q, const void* k, const void* v, float* partial_out, float* partial_max_sum,   \
             unsigned* counters, const unsigned* query_start_loc, const unsigned* seq_lens,                        \
             const unsigned* block_table, unsigned num_seqs, unsigned max_blocks_per_seq, unsigned num_kv_heads,   \
             unsigned group, unsigned block_size, unsigned window, float scale_log2, float value_scale) {          \
        paged_decode<type, head_dim>({out, q, k, v, partial_out, partial_max_sum, counters, query_start_loc,       \
                                      seq_lens, block_table, num_seqs, max_blocks_per_seq, num_kv_heads, group,    \
                                      block_size, window, scale_log2 * Format<type>::DIVISOR,                      \
                                      value_scale * Format<type>::DIVISOR});                                       \
    }                                                                                                              \
    KERNEL(name);

PAGED_DECODE(paged_decode_bf16_64, bf16, 64)
PAGED_DECODE(paged_decode_bf16_128, bf16, 128)
PAGED_DECODE(paged_decode_f16_64, f16, 64)
PAGED_DECODE(paged_decode_f16_128, f16, 128)
PAGED_DECODE(paged_decode_e4m3_64, e4m3, 64)
PAGED_DECODE(paged_decode_e4m3_128, e4m3, 128)
