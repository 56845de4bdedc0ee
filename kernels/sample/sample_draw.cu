// The last pass over rows of logits: filters, and draws a token.
//
//   order   = largest edited logit first, then lowest token
//   kept    = tokens with logit >= largest + temperature * ln(min_p), the first top_k of them, and of
//             these the first whose weights reach top_p of their sum
//   token   = the first, in order of tokens, with share * (sum of kept weights) < sum of the kept
//             weights up to it; share = philox(seed; position, choice) in [0, 1)
//   greedy  : the first token of the order
//
// Arguments as sample_scan and sample_weigh have them; results SampleResult [num_rows], of which
// `token` and `status` are written.
//
// Grid (num_rows), 1024 threads, dynamic shared memory sizeof(Shared), 23 KiB.
//
// A small top-k is bounded by the bests of the chunks: k of them reach the k-th largest of them. The
// tokens that reach that key are mostly few, are listed, and each is compared with the others.
// Otherwise the last kept token is found digit by digit: the tokens whose keys may be the cut's are
// counted and weighed in 1024 bins, one of which holds the cut and is divided again, until it is one
// key. Then some of the tokens with that key are kept, lowest first. The first digit comes from
// sample_weigh. Only chunks whose best token reaches the lowest key in question are read.
//
// Bytes: 8 for each chunk (4.8 KB for 151,936 tokens) where greedy, 1 KB more where drawn from the
// whole row, about 30 KB for a top-k of 20, and otherwise up to seven times the chunks with a token
// near the cut. One block does it, bound by latency.
#include "sample_row.cuh"

namespace {

constexpr int NUM_THREADS = 1024;
constexpr int NUM_WARPS = NUM_THREADS / WARP_SIZE;
static_assert(NUM_BINS == NUM_THREADS && MAX_CHUNKS == NUM_THREADS, "a thread for each bin and chunk");

// So many tokens are compared with each other instead of counted.
constexpr unsigned MAX_LISTED = 256;

enum class Measure { NUMBER, MASS };

// A range of keys, in which the last kept token is, and what lies above it.
struct Cut {
    unsigned low, high;
    unsigned num_above;
    u64 mass_above;
    // How many tokens are in the range.
    unsigned num;
};

struct Shared {
    u64 best[MAX_CHUNKS];
    u64 masses[NUM_BINS];
    unsigned counts[NUM_BINS];
    u64 scratch[NUM_WARPS];
    // Of the selected bin.
    Cut selected;
    unsigned bin;
    unsigned first_keys[2];
    // Of the chunk that is drawn from.
    u64 left;
    unsigned chunk;
    // The best tokens, in any order.
    unsigned num_listed;
    u64 listed[MAX_LISTED];
};
static_assert(sizeof(Shared) <= 23 * 1024, "the host gives 23 KiB");

// All that is known of a row, the same for all threads.
struct Row {
    RowView view;
    int num_chunks;
    float max;
    float scale;
    unsigned best_key;
    // Tokens with lower keys are not kept.
    unsigned lowest;

    __device__ __forceinline__ u64 weight(unsigned key) const { return weight_of(from_key(key), max, scale); }
};

// Sums over the threads up to this one, and over all.
__device__ u64 block_scan(u64 value, u64* scratch, u64& total) {
    const int lane = threadIdx.x % WARP_SIZE;
    const int warp = threadIdx.x / WARP_SIZE;
#pragma unroll
    for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
        const u64 other = __shfl_up_sync(FULL_MASK, value, distance);
        value += distance <= lane ? other : 0;
    }
    if (lane == WARP_SIZE - 1) {
        scratch[warp] = value;
    }
    __syncthreads();
    const u64 of_warp = scratch[lane];
    const u64 before = warp_sum(lane < warp ? of_warp : 0);
    total = warp_sum(of_warp);
    __syncthreads();
    return before + value;
}

// Counts and weighs the tokens of `cut` in bins of 2^shift keys, from the highest down.
__device__ void count_bins(Shared& shared, const Row& row, const Cut& cut, int shift) {
    const int lane = threadIdx.x % WARP_SIZE;
    shared.counts[threadIdx.x] = 0;
    shared.masses[threadIdx.x] = 0;
    __syncthreads();
    for (int chunk = threadIdx.x / WARP_SIZE; chunk < row.num_chunks; chunk += NUM_WARPS) {
        if (rank_key(shared.best[chunk]) < cut.low) {
            continue;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned key[4];
            row.view.load(chunk * CHUNK + half * (CHUNK / 2) + lane * 4, key);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (cut.low <= key[i] && key[i] <= cut.high) {
                    const unsigned bin = (cut.high - key[i]) >> shift;
                    atomicAdd(&shared.counts[bin], 1u);
                    atomicAdd(&shared.masses[bin], row.weight(key[i]));
                }
            }
        }
    }
    __syncthreads();
}

// Finds the bin in which the number or the mass of the tokens from the largest on reaches `wanted`,
// and enters it in `cut` but for its keys. If all of them do not reach it, they are all above `cut`.
template <Measure MEASURE>
__device__ bool select_bin(Shared& shared, Cut& cut, u64 wanted, unsigned& bin) {
    const unsigned num = shared.counts[threadIdx.x];
    const u64 mass = shared.masses[threadIdx.x];
    u64 num_total, mass_total;
    const u64 num_through = cut.num_above + block_scan(num, shared.scratch, num_total);
    const u64 mass_through = cut.mass_above + block_scan(mass, shared.scratch, mass_total);
    const u64 through = MEASURE == Measure::MASS ? mass_through : num_through;
    const u64 own = MEASURE == Measure::MASS ? mass : num;
    if (wanted <= through && through - own < wanted) {
        shared.selected = {0, 0, unsigned(num_through) - num, mass_through - mass, num};
        shared.bin = threadIdx.x;
    }
    __syncthreads();
    const u64 all = MEASURE == Measure::MASS ? cut.mass_above + mass_total : cut.num_above + num_total;
    if (all < wanted) {
        cut.num_above += unsigned(num_total);
        cut.mass_above += mass_total;
        return false;
    }
    cut.num_above = shared.selected.num_above;
    cut.mass_above = shared.selected.mass_above;
    cut.num = shared.selected.num;
    bin = shared.bin;
    return true;
}

// Narrows `cut` to one key.
template <Measure MEASURE>
__device__ bool find_key(Shared& shared, const Row& row, Cut& cut, u64 wanted) {
    while (true) {
        const int shift = max(0, 22 - __clz(int(cut.high - cut.low)));
        count_bins(shared, row, cut, shift);
        unsigned bin;
        if (!select_bin<MEASURE>(shared, cut, wanted, bin)) {
            return false;
        }
        const unsigned width = (1u << shift) - 1;
        cut.high -= bin << shift;
        cut.low = width < cut.high - cut.low ? cut.high - width : cut.low;
        if (shift == 0) {
            return true;
        }
    }
}

// The lowest key in a bin over the whole row, or in one before it.
__device__ unsigned first_key_of(const Row& row, int bin) {
    unsigned low = LOWEST_KEY;
    unsigned high = row.best_key;
    while (low < high) {
        const unsigned middle = low + (high - low) / 2;
        if (bin_of(from_key(middle), row.max, row.scale) <= bin) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// Sets the keys of `cut` to those of a bin over the whole row.
__device__ void enter_bin(Shared& shared, const Row& row, Cut& cut, int bin) {
    if (threadIdx.x < 2) {
        shared.first_keys[threadIdx.x] = first_key_of(row, bin - int(threadIdx.x));
    }
    __syncthreads();
    cut.low = max(row.lowest, shared.first_keys[0]);
    cut.high = bin == 0 ? row.best_key : shared.first_keys[1] - 1;
    __syncthreads();
}

// Narrows `cut` to a bin of the row's histogram.
template <Measure MEASURE>
__device__ bool find_bin(Shared& shared, const Row& row, Cut& cut, u64 wanted, const unsigned* bin_counts,
                         const u64* bin_masses) {
    shared.counts[threadIdx.x] = bin_counts[threadIdx.x];
    shared.masses[threadIdx.x] = bin_masses[threadIdx.x];
    unsigned bin;
    if (!select_bin<MEASURE>(shared, cut, wanted, bin)) {
        return false;
    }
    enter_bin(shared, row, cut, bin);
    return true;
}

// A key that the k-th largest is not below: k chunks reach the k-th largest of their bests. Tokens
// below the last bin have no weight.
__device__ unsigned bound_top_k(Shared& shared, const Row& row, unsigned k) {
    shared.counts[threadIdx.x] = 0;
    shared.masses[threadIdx.x] = 0;
    __syncthreads();
    const unsigned key = rank_key(shared.best[threadIdx.x]);
    if (row.lowest <= key) {
        const int bin = bin_of(from_key(key), row.max, row.scale);
        if (bin < NUM_BINS - 1) {
            atomicAdd(&shared.counts[bin], 1u);
        }
    }
    __syncthreads();
    Cut cut = {row.lowest, row.best_key, 0, 0, 0};
    unsigned bin;
    if (!select_bin<Measure::NUMBER>(shared, cut, k, bin)) {
        bin = NUM_BINS - 2;
    }
    enter_bin(shared, row, cut, bin);
    return cut.low;
}

// Philox4x32-10, with the CPU's counter: 53 random bits above 11 zeros.
__device__ u64 random_bits(const SampleRow& params) {
    unsigned counter[4] = {params.position[0], params.position[1], params.choice, 0};
    unsigned key[2] = {params.seed[0], params.seed[1]};
    for (int round = 0; round < 10; round++) {
        const u64 first = u64(0xd2511f53u) * counter[0];
        const u64 second = u64(0xcd9e8d57u) * counter[2];
        const unsigned next[4] = {unsigned(second >> 32) ^ counter[1] ^ key[0], unsigned(second),
                                  unsigned(first >> 32) ^ counter[3] ^ key[1], unsigned(first)};
        for (int i = 0; i < 4; i++) {
            counter[i] = next[i];
        }
        key[0] += 0x9e3779b9u;
        key[1] += 0xbb67ae85u;
    }
    return (u64(counter[1]) << 32 | counter[0]) & ~u64(0x7ff);
}

// The mass at which top-p ends.
__device__ __forceinline__ u64 share_of(float top_p, u64 total) {
    const u64 share = u64(ceil(double(top_p) * double(total)));
    return max(u64(1), min(share, total));
}

// Lists the tokens whose keys are not below `low`, as far as there is room, and gives their number.
__device__ unsigned list_tokens(Shared& shared, const Row& row, unsigned low) {
    const int lane = threadIdx.x % WARP_SIZE;
    if (threadIdx.x == 0) {
        shared.num_listed = 0;
    }
    __syncthreads();
    for (int chunk = threadIdx.x / WARP_SIZE; chunk < row.num_chunks; chunk += NUM_WARPS) {
        if (rank_key(shared.best[chunk]) < low) {
            continue;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int first = chunk * CHUNK + half * (CHUNK / 2) + lane * 4;
            unsigned key[4];
            row.view.load(first, key);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (low <= key[i]) {
                    const unsigned slot = atomicAdd(&shared.num_listed, 1u);
                    if (slot < MAX_LISTED) {
                        shared.listed[slot] = ranked(key[i], first + i);
                    }
                }
            }
        }
    }
    __syncthreads();
    return shared.num_listed;
}

// Draws from the listed tokens with a thread for each, by comparing every two of them.
__device__ void draw_from_list(Shared& shared, const Row& row, const SampleRow& params, unsigned num,
                               SampleResult& result) {
    // Sorted and weighed; the bins are not in use.
    u64* const sorted = shared.masses;
    u64* const weights = shared.masses + MAX_LISTED;
    const unsigned index = threadIdx.x;
    if (index < num) {
        const u64 own = shared.listed[index];
        unsigned place = 0;
        for (unsigned i = 0; i < num; i++) {
            place += own < shared.listed[i];
        }
        sorted[place] = own;
    }
    __syncthreads();
    const u64 weight = index < min(num, params.top_k) ? row.weight(rank_key(sorted[index])) : 0;
    if (index < num) {
        weights[index] = weight;
    }
    u64 total;
    const u64 through = block_scan(weight, shared.scratch, total);
    const u64 wanted = params.top_p < 1.0f ? share_of(params.top_p, total) : total;
    if (through - weight < wanted && wanted <= through) {
        shared.left = through;
        shared.num_listed = index + 1;
    }
    __syncthreads();
    const u64 left = __umul64hi(random_bits(params), shared.left);
    if (index < shared.num_listed) {
        const unsigned token = rank_token(sorted[index]);
        u64 before = 0;
        for (unsigned i = 0; i < shared.num_listed; i++) {
            before += rank_token(sorted[i]) < token ? weights[i] : 0;
        }
        if (before <= left && left < before + weight) {
            result.token = token;
            result.status = 0;
        }
    }
}

// The last kept key and how many tokens that have it are kept.
struct Last {
    unsigned key;
    unsigned num;
    // Whether more tokens have it.
    bool is_split;
};

// The last kept token has no key below `low`.
__device__ Last find_last(Shared& shared, const Row& row, const SampleRow& params, unsigned low,
                          const unsigned* bin_counts, const u64* bin_masses) {
    const bool has_bins = is_wide(params);
    const Cut whole = {low, row.best_key, 0, 0, 0};
    Cut cut = whole;
    Last last = {low, NONE, false};
    u64 total = 0;
    if (params.top_k != 0) {
        bool is_found = true;
        if (has_bins) {
            is_found = find_bin<Measure::NUMBER>(shared, row, cut, params.top_k, bin_counts, bin_masses);
        }
        is_found = is_found && find_key<Measure::NUMBER>(shared, row, cut, params.top_k);
        total = cut.mass_above;
        if (is_found) {
            last = {cut.high, params.top_k - cut.num_above, params.top_k - cut.num_above < cut.num};
            total += last.num * row.weight(cut.high);
        }
    } else {
        block_scan(bin_masses[threadIdx.x], shared.scratch, total);
    }
    if (params.top_p < 1.0f) {
        const u64 wanted = share_of(params.top_p, total);
        cut = whole;
        cut.low = last.key;
        if (has_bins) {
            find_bin<Measure::MASS>(shared, row, cut, wanted, bin_counts, bin_masses);
        }
        find_key<Measure::MASS>(shared, row, cut, wanted);
        const u64 weight = row.weight(cut.high);
        const unsigned num = unsigned((wanted - cut.mass_above + weight - 1) / weight);
        last = {cut.high, num, num < cut.num};
    }
    return last;
}

// Leaves the kept mass of every chunk in `masses`, and in `counts` how many tokens with the last key
// are kept.
__device__ void weigh_chunks(Shared& shared, const Row& row, const Last& last) {
    const int lane = threadIdx.x % WARP_SIZE;
    shared.counts[threadIdx.x] = 0;
    shared.masses[threadIdx.x] = 0;
    __syncthreads();
    for (int chunk = threadIdx.x / WARP_SIZE; chunk < row.num_chunks; chunk += NUM_WARPS) {
        if (rank_key(shared.best[chunk]) < last.key) {
            continue;
        }
        u64 mass = 0;
        unsigned num = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned key[4];
            row.view.load(chunk * CHUNK + half * (CHUNK / 2) + lane * 4, key);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mass += last.key < key[i] ? row.weight(key[i]) : 0;
                num += key[i] == last.key;
            }
        }
        mass = warp_sum(mass);
        num = warp_sum(num);
        if (lane == 0) {
            shared.masses[chunk] = mass;
            shared.counts[chunk] = num;
        }
    }
    __syncthreads();
    unsigned num = shared.counts[threadIdx.x];
    if (last.is_split) {
        u64 total;
        const unsigned before = unsigned(block_scan(num, shared.scratch, total)) - num;
        num = before < last.num ? min(num, last.num - before) : 0;
    }
    shared.counts[threadIdx.x] = num;
    shared.masses[threadIdx.x] += num * row.weight(last.key);
}

// Draws from the chunk where `left` of its mass comes before the drawn token; for one warp.
__device__ void draw_from_chunk(const Shared& shared, const Row& row, unsigned last_key, SampleResult& result) {
    const int lane = threadIdx.x % WARP_SIZE;
    const int first = shared.chunk * CHUNK + lane * PER_LANE;
    unsigned key[PER_LANE];
    unsigned num_last = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        unsigned found[4];
        row.view.load(first + half * 4, found);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            key[half * 4 + i] = found[i];
            num_last += found[i] == last_key;
        }
    }
    unsigned rank = num_last;
#pragma unroll
    for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
        const unsigned other = __shfl_up_sync(FULL_MASK, rank, distance);
        rank += distance <= lane ? other : 0;
    }
    rank -= num_last;
    const unsigned num_kept = shared.counts[shared.chunk];
    u64 weights[PER_LANE];
    u64 mass = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const bool is_last = key[i] == last_key;
        const bool is_kept = last_key < key[i] || (is_last && rank < num_kept);
        rank += is_last;
        weights[i] = is_kept ? row.weight(key[i]) : 0;
        mass += weights[i];
    }
    u64 through = mass;
#pragma unroll
    for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
        const u64 other = __shfl_up_sync(FULL_MASK, through, distance);
        through += distance <= lane ? other : 0;
    }
    if (through - mass <= shared.left && shared.left < through) {
        u64 left = shared.left - (through - mass);
        bool is_drawn = false;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            if (!is_drawn && left < weights[i]) {
                result.token = first + i;
                is_drawn = true;
            }
            left -= weights[i];
        }
        result.status = 0;
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    sample_draw(const float* logits, const unsigned* inputs, const unsigned* keys, const u64* chunk_best,
                const u64* chunk_masses, const unsigned* bin_counts, const u64* bin_masses, SampleResult* results,
                int num_cols) {
    DYNAMIC_SHARED(Shared, shared_bytes);
    Shared& shared = *shared_bytes;
    const int index = blockIdx.x;
    const SampleRow& params = reinterpret_cast<const SampleRow*>(inputs)[index];
    if (params.mode == IDLE) {
        return;
    }
    const int num_chunks = ceil_div(num_cols, CHUNK);
    const bool is_chunk = int(threadIdx.x) < num_chunks;
    const u64 own = is_chunk ? chunk_best[index * num_chunks + threadIdx.x] : 0;
    shared.best[threadIdx.x] = own;
    const u64 best = block_reduce(own, Larger(), u64(0), shared.scratch);
    SampleResult& result = results[index];
    if (!is_drawable(best) || params.mode != DRAW) {
        if (threadIdx.x == 0) {
            result.token = params.mode == SCORE ? params.target : rank_token(best);
            result.status = is_drawable(best) ? 0 : 1;
        }
        return;
    }
    Row row = {drawn_view(logits, keys, params, index, num_cols), num_chunks, from_key(rank_key(best)), params.scale,
               rank_key(best), 0};
    row.lowest = to_key(__fadd_rn(row.max, params.min_p_offset));
    Last last = {row.lowest, NONE, false};
    if (wants_filter(params)) {
        unsigned low = row.lowest;
        if (!is_wide(params)) {
            low = bound_top_k(shared, row, params.top_k);
            const unsigned num = list_tokens(shared, row, low);
            if (num <= MAX_LISTED) {
                draw_from_list(shared, row, params, num, result);
                return;
            }
        }
        last = find_last(shared, row, params, low, bin_counts + index * NUM_BINS, bin_masses + index * NUM_BINS);
        weigh_chunks(shared, row, last);
    } else {
        shared.masses[threadIdx.x] = is_chunk ? chunk_masses[index * num_chunks + threadIdx.x] : 0;
        shared.counts[threadIdx.x] = NONE;
    }
    u64 total;
    const u64 mass = shared.masses[threadIdx.x];
    const u64 through = block_scan(mass, shared.scratch, total);
    const u64 left = __umul64hi(random_bits(params), total);
    if (through - mass <= left && left < through) {
        shared.left = left - (through - mass);
        shared.chunk = threadIdx.x;
    }
    __syncthreads();
    if (threadIdx.x < WARP_SIZE) {
        draw_from_chunk(shared, row, last.key, result);
    }
}
KERNEL(sample_draw);
