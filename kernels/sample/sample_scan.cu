// The first pass over rows of logits: edits them and finds the best token of each chunk.
//
//   edited = logit, -inf where forbidden, + bias; divided (where positive, else multiplied) by the
//            repetition penalty where seen; - (frequency_penalty * count + presence_penalty) where
//            generated `count` times; -inf outside of the mask
//   chunk_best[row, chunk] = largest edited logit and the lowest token that has it, or BAD if a
//            logit is NaN or +inf, before the edits or before the mask
//   raw_best = the same of the unedited logits, for rows that want log-probabilities
//   keys[row, token] = the edited logit as an ordered integer, for rows that differ from the logits
//
// logits f32 [rows, num_cols]; inputs SampleRow [num_rows] and what they point to; keys u32
// [num_rows, num_cols rounded up to 4]; chunk_best and raw_best u64 [num_rows, chunks of 256];
// bin_counts u32 and bin_masses u64 [num_rows, 1024], which are set to zero for the next kernel.
// The inputs begin at a multiple of 16 bytes, a row of logits as well if num_cols divides by 4.
//
// Grid (tiles of 4096 tokens, num_rows), 512 threads, a warp for each chunk; dynamic shared memory
// 32 KiB. The edits are made in shared memory: every block reads its row's lists, 4 bytes a token
// of the history, and keeps what falls into its tile.
//
// Bytes: 4 * num_cols a row read (608 KB for 151,936 tokens, 0.14 us at 4.3 TB/s), the same written
// where the row is edited and not greedy. That is the floor of sampling: the other kernels read
// what the L2 cache still holds. Operations: about 10 a token.
#include "sample_row.cuh"

namespace {

// The ids of a lane's tokens in its chunk: four neighbours, and four more half a chunk later.
__device__ __forceinline__ int place(int i) {
    return int(threadIdx.x) % WARP_SIZE * 4 + i / 4 * (CHUNK / 2) + i % 4;
}

__device__ __forceinline__ void load_raw(const float* row, int first, int num_cols, float (&x)[PER_LANE]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int token = first + place(half * 4);
        if (num_cols % 4 == 0 && token < num_cols) {
            const float4 found = *reinterpret_cast<const float4*>(row + token);
            x[half * 4] = found.x, x[half * 4 + 1] = found.y;
            x[half * 4 + 2] = found.z, x[half * 4 + 3] = found.w;
            continue;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[half * 4 + i] = token + i < num_cols ? row[token + i] : -INFINITY;
        }
    }
}

// Changes the logits of a tile, which begins with token `first`.
__device__ void edit(const SampleRow& row, const unsigned* inputs, int first, float* values, unsigned* counts) {
    for (unsigned i = threadIdx.x; i < row.num_forbidden; i += blockDim.x) {
        const unsigned local = inputs[row.forbidden_start + i] - first;
        if (local < TILE) {
            values[local] = -INFINITY;
        }
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < row.num_biases; i += blockDim.x) {
        const unsigned local = inputs[row.bias_start + 2 * i] - first;
        if (local < TILE) {
            values[local] = __fadd_rn(values[local], __uint_as_float(inputs[row.bias_start + 2 * i + 1]));
        }
    }
    if (row.num_history == 0) {
        __syncthreads();
        return;
    }
    const unsigned seen = 0x80000000u;
    for (int i = threadIdx.x; i < TILE; i += blockDim.x) {
        counts[i] = 0;
    }
    __syncthreads();
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < row.num_history; i += blockDim.x) {
        const unsigned local = inputs[row.history_start + i] - first;
        if (local < TILE) {
            if (i < row.num_prompt) {
                atomicOr(&counts[local], seen);
            } else {
                atomicAdd(&counts[local], 1u);
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE; i += blockDim.x) {
        const unsigned count = counts[i] & ~seen;
        float x = values[i];
        if (counts[i] != 0 && row.repetition_penalty != 1.0f) {
            x = 0.0f < x ? __fdiv_rn(x, row.repetition_penalty) : __fmul_rn(x, row.repetition_penalty);
        }
        if (count != 0 && (row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f)) {
            x = __fsub_rn(x, __fadd_rn(__fmul_rn(row.frequency_penalty, float(count)), row.presence_penalty));
        }
        values[i] = x;
    }
    __syncthreads();
}

// Whether any of the chunk's logits is bad; the same for all lanes.
__device__ __forceinline__ bool any_bad(const float (&x)[PER_LANE]) {
    bool bad = false;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        bad |= is_bad(x[i]);
    }
    return __any_sync(FULL_MASK, bad);
}

__device__ __forceinline__ u64 best_of_chunk(const float (&x)[PER_LANE], int first, int num_cols) {
    u64 best = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int token = first + place(i);
        best = Larger()(best, token < num_cols ? ranked(to_key(x[i]), token) : 0);
    }
    return warp_reduce(best, Larger());
}

__device__ __forceinline__ void apply_mask(const unsigned* mask, int first, int num_cols, float (&x)[PER_LANE]) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int token = first + place(i);
        if (token < num_cols && (mask[token / 32] >> (token % 32) & 1) == 0) {
            x[i] = -INFINITY;
        }
    }
}

__device__ __forceinline__ void store_keys(unsigned* keys, int first, int num_cols, const float (&x)[PER_LANE]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int token = first + place(half * 4);
        unsigned key[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            key[i] = token + i < num_cols ? to_key(x[half * 4 + i]) : 0;
        }
        if (token < num_cols) {
            *reinterpret_cast<uint4*>(keys + token) = make_uint4(key[0], key[1], key[2], key[3]);
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512)
    sample_scan(const float* logits, const unsigned* inputs, unsigned* keys, u64* chunk_best, u64* raw_best,
                unsigned* bin_counts, u64* bin_masses, int num_cols) {
    DYNAMIC_SHARED(float, values);
    const int index = blockIdx.y;
    const SampleRow& row = reinterpret_cast<const SampleRow*>(inputs)[index];
    if (row.mode == IDLE) {
        return;
    }
    if (wants_histogram(row)) {
        for (int bin = blockIdx.x * blockDim.x + threadIdx.x; bin < NUM_BINS; bin += gridDim.x * blockDim.x) {
            bin_counts[index * NUM_BINS + bin] = 0;
            bin_masses[index * NUM_BINS + bin] = 0;
        }
    }
    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;
    const int chunk = blockIdx.x * CHUNKS_PER_TILE + warp;
    const int num_chunks = ceil_div(num_cols, CHUNK);
    const int first = chunk * CHUNK;
    float x[PER_LANE];
    load_raw(logits + size_t(row.logits_row) * num_cols, first, num_cols, x);
    bool bad = any_bad(x);
    if (row.num_top != NONE) {
        const u64 best = bad ? BAD : best_of_chunk(x, first, num_cols);
        if (lane == 0 && chunk < num_chunks) {
            raw_best[index * num_chunks + chunk] = best;
        }
    }
    if (has_edits(row)) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            values[warp * CHUNK + place(i)] = x[i];
        }
        __syncthreads();
        edit(row, inputs, blockIdx.x * TILE, values, reinterpret_cast<unsigned*>(values + TILE));
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            x[i] = values[warp * CHUNK + place(i)];
        }
        bad |= any_bad(x);
    }
    if (row.mask_start != NONE) {
        apply_mask(inputs + row.mask_start, first, num_cols, x);
    }
    const u64 best = bad ? BAD : best_of_chunk(x, first, num_cols);
    if (lane == 0 && chunk < num_chunks) {
        chunk_best[index * num_chunks + chunk] = best;
    }
    if (is_rewritten(row)) {
        store_keys(keys + index * key_stride(num_cols), first, num_cols, x);
    }
}
KERNEL(sample_scan);
