// The second pass over rows of logits, for those of which many tokens may be drawn: sums of weights.
//
//   weight = exp((edited - largest) / temperature) in fixed point, for tokens that min-p keeps
//   chunk_masses[row, chunk] = sum of the chunk's weights, for rows that are drawn from whole
//   bin_counts, bin_masses[row, bin] = number and weight of the tokens whose distance from the
//            largest logit is in the bin, for rows with top-k or top-p
//   raw_masses[row, chunk] = sum of exp(logit - largest) of the unedited logits, for rows that want
//            log-probabilities
//
// logits, inputs, keys, chunk_best and raw_best as sample_scan has them; chunk_masses and raw_masses
// u64 [num_rows, chunks of 256]; bin_counts u32 and bin_masses u64 [num_rows, 1024], zero before.
//
// Grid (tiles of 4096 tokens, num_rows), 512 threads, a warp for each chunk; dynamic shared memory
// 12 KiB. Rows that are greedy or have a small top-k are left at once.
//
// Bytes: 4 * num_cols a row (608 KB for 151,936 tokens), which the L2 cache holds for up to about 60
// rows, and 8 bytes for each chunk. Operations: about 30 a token. Sums of integers do not depend on
// the order of the atomics.
#include "sample_row.cuh"

namespace {

__device__ __forceinline__ void load_chunk(const RowView& view, int first, unsigned (&key)[PER_LANE]) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        unsigned found[4];
        view.load(first + half * (CHUNK / 2) + lane * 4, found);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            key[half * 4 + i] = found[i];
        }
    }
}

// The sum of a chunk's weights, for all lanes.
__device__ __forceinline__ u64 chunk_mass(const unsigned (&key)[PER_LANE], unsigned lowest, float max, float scale) {
    u64 mass = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        mass += lowest <= key[i] ? weight_of(from_key(key[i]), max, scale) : 0;
    }
    return warp_sum(mass);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512)
    sample_weigh(const float* logits, const unsigned* inputs, const unsigned* keys, const u64* chunk_best,
                 const u64* raw_best, u64* chunk_masses, u64* raw_masses, unsigned* bin_counts, u64* bin_masses,
                 int num_cols) {
    DYNAMIC_SHARED(u64, masses);
    unsigned* const counts = reinterpret_cast<unsigned*>(masses + NUM_BINS);
    __shared__ u64 scratch[WARP_SIZE];
    const int index = blockIdx.y;
    const SampleRow& row = reinterpret_cast<const SampleRow*>(inputs)[index];
    const int lane = threadIdx.x % WARP_SIZE;
    const int num_chunks = ceil_div(num_cols, CHUNK);
    const int chunk = blockIdx.x * CHUNKS_PER_TILE + threadIdx.x / WARP_SIZE;
    unsigned key[PER_LANE];
    if (row.mode != IDLE && row.num_top != NONE) {
        const u64 best = best_of_row(raw_best + index * num_chunks, num_chunks, scratch);
        if (is_drawable(best) && chunk < num_chunks) {
            load_chunk(raw_view(logits, row, num_cols), chunk * CHUNK, key);
            const u64 mass = chunk_mass(key, LOWEST_KEY, from_key(rank_key(best)), 1.0f);
            if (lane == 0) {
                raw_masses[index * num_chunks + chunk] = mass;
            }
        }
    }
    if (!is_wide(row)) {
        return;
    }
    const u64 best = best_of_row(chunk_best + index * num_chunks, num_chunks, scratch);
    if (!is_drawable(best)) {
        return;
    }
    const float max = from_key(rank_key(best));
    const unsigned lowest = to_key(__fadd_rn(max, row.min_p_offset));
    load_chunk(drawn_view(logits, keys, row, index, num_cols), chunk * CHUNK, key);
    if (!wants_filter(row)) {
        const u64 mass = chunk_mass(key, lowest, max, row.scale);
        if (lane == 0 && chunk < num_chunks) {
            chunk_masses[index * num_chunks + chunk] = mass;
        }
        return;
    }
    for (int bin = threadIdx.x; bin < NUM_BINS; bin += blockDim.x) {
        counts[bin] = 0;
        masses[bin] = 0;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const float x = from_key(key[i]);
        const int bin = lowest <= key[i] ? bin_of(x, max, row.scale) : NUM_BINS - 1;
        if (bin < NUM_BINS - 1) {
            atomicAdd(&counts[bin], 1u);
            atomicAdd(&masses[bin], weight_of(x, max, row.scale));
        }
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < NUM_BINS; bin += blockDim.x) {
        if (counts[bin] != 0) {
            atomicAdd(&bin_counts[index * NUM_BINS + bin], counts[bin]);
            atomicAdd(&bin_masses[index * NUM_BINS + bin], masses[bin]);
        }
    }
}
KERNEL(sample_weigh);
