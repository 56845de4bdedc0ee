// Log-probabilities of sampled rows, under the model's own distribution.
//
//   logprob(token) = logit - largest - ln(sum of exp(logit - largest)), of the unedited logits
//
// of the drawn token and of the `num_top` first in the order of sample_draw.
// Other arguments as sample_scan and sample_weigh have them; results SampleResult [num_rows], with
// `token` and `status` from sample_draw.
//
// Grid (num_rows), 256 threads, dynamic shared memory 8 bytes for each chunk. Rows that want no
// log-probabilities are left at once. A tournament: the best chunk's best token is taken, and the
// chunk is read again for its best token after that.
//
// Bytes: 16 for each chunk and 1 KB for each of the `num_top`. Bound by the latency of its rounds.
#include "sample_row.cuh"

namespace {

__device__ __forceinline__ float logprob_of(float logit, float max, double log_sum) {
    return float(double(logit) - double(max) - log_sum);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(CHUNK)
    sample_logprobs(const float* logits, const unsigned* inputs, const u64* raw_best, const u64* raw_masses,
                    SampleResult* results, int num_cols) {
    DYNAMIC_SHARED(u64, chunk_best);
    __shared__ u64 scratch[WARP_SIZE];
    const int index = blockIdx.x;
    const SampleRow& row = reinterpret_cast<const SampleRow*>(inputs)[index];
    SampleResult& result = results[index];
    if (row.mode == IDLE || row.num_top == NONE || result.status != 0) {
        return;
    }
    const float* const raw = logits + size_t(row.logits_row) * num_cols;
    const int num_chunks = ceil_div(num_cols, CHUNK);
    u64 best = 0;
    u64 mass = 0;
    for (int chunk = threadIdx.x; chunk < num_chunks; chunk += CHUNK) {
        chunk_best[chunk] = raw_best[index * num_chunks + chunk];
        best = Larger()(best, chunk_best[chunk]);
        mass += raw_masses[index * num_chunks + chunk];
    }
    const float max = from_key(rank_key(block_reduce(best, Larger(), u64(0), scratch)));
    const double log_sum = log(double(block_sum(mass, scratch)) / double(WEIGHT_ONE));
    if (threadIdx.x == 0) {
        const float logit = row.mode != SCORE || row.target < unsigned(num_cols) ? raw[result.token] : -INFINITY;
        result.logprob = logprob_of(logit, max, log_sum);
    }
    unsigned num_top = 0;
    while (num_top < min(row.num_top, unsigned(MAX_TOP))) {
        best = 0;
        for (int chunk = threadIdx.x; chunk < num_chunks; chunk += CHUNK) {
            best = Larger()(best, chunk_best[chunk]);
        }
        const u64 taken = block_reduce(best, Larger(), u64(0), scratch);
        if (taken == 0) {
            break;
        }
        if (threadIdx.x == 0) {
            result.top_ids[num_top] = rank_token(taken);
            result.top_logprobs[num_top] = logprob_of(from_key(rank_key(taken)), max, log_sum);
        }
        num_top++;
        const int chunk = rank_token(taken) / CHUNK;
        const int token = chunk * CHUNK + threadIdx.x;
        const u64 own = token < num_cols ? ranked(to_key(raw[token]), token) : 0;
        best = block_reduce(own < taken ? own : 0, Larger(), u64(0), scratch);
        if (threadIdx.x == 0) {
            chunk_best[chunk] = best;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        result.num_top = num_top;
    }
}
KERNEL(sample_logprobs);
