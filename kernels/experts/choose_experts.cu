// Which experts a token goes to: softmax over the router's logits, the most likely few, in ascending order.
//
//   chosen  = the `num_chosen` largest logits, of equal ones the first
//   weights = e^(logit - max) / sum, over the chosen if `normalised`, else over all experts
//
// Shapes: logits f32 [num_tokens, num_experts]; experts u32 and weights f32 [num_tokens, num_chosen], at most 32 of a
// token. Logits are ordered as IEEE 754's totalOrder does, so that whatever they are, as many different experts
// are chosen.
// Grid: a warp for each token; warps of a block beyond the last token do nothing.
//
// Each choice is one pass over the logits, which the L1 cache holds: 9 of 128 experts are 36 loads of a lane, some
// microseconds, whatever the number of tokens.
#include "reduce.cuh"

namespace {

// Larger for larger logits.
__device__ __forceinline__ uint32_t ordered(float logit) {
    const uint32_t bits = __float_as_uint(logit);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

struct Best {
    uint32_t key;
    int expert;  // num_experts if there is none
};

__device__ __forceinline__ bool comes_before(Best a, Best b) {
    return b.key < a.key || (a.key == b.key && a.expert < b.expert);
}

// The best expert after `last` in the order of choice.
__device__ __forceinline__ Best next_best(const float* logits, int num_experts, Best last, bool is_first, int lane) {
    Best best = {0, num_experts};
    for (int expert = lane; expert < num_experts; expert += WARP_SIZE) {
        const Best candidate = {ordered(logits[expert]), expert};
        if ((is_first || comes_before(last, candidate)) &&
            (best.expert == num_experts || comes_before(candidate, best))) {
            best = candidate;
        }
    }
#pragma unroll
    for (int distance = WARP_SIZE / 2; 0 < distance; distance /= 2) {
        const Best other = {__shfl_xor_sync(FULL_MASK, best.key, distance),
                            __shfl_xor_sync(FULL_MASK, best.expert, distance)};
        if (other.expert != num_experts && (best.expert == num_experts || comes_before(other, best))) {
            best = other;
        }
    }
    return best;
}

}  // namespace

extern "C" __global__ void choose_experts(
    const float* logits, uint32_t* experts, float* weights, int num_tokens, int num_experts, int num_chosen,
    int normalised) {
    const int lane = threadIdx.x % WARP_SIZE;
    const int token = blockIdx.x * (blockDim.x / WARP_SIZE) + threadIdx.x / WARP_SIZE;
    if (num_tokens <= token) {
        return;
    }
    const float* const row = logits + size_t(token) * num_experts;
    // Lane i keeps the i-th choice.
    Best last = {0, num_experts};
    int mine = num_experts;
    float max = 0.0f;
    for (int i = 0; i < num_chosen; i++) {
        last = next_best(row, num_experts, last, i == 0, lane);
        if (i == 0) max = row[last.expert];
        if (i == lane) mine = last.expert;
    }
    const bool is_choice = lane < num_chosen;
    const float weight = is_choice ? expf(row[mine] - max) : 0.0f;
    float part = weight;
    if (!normalised) {
        part = 0.0f;
        for (int expert = lane; expert < num_experts; expert += WARP_SIZE) part += expf(row[expert] - max);
    }
    const float total = warp_sum(part);
    int place = 0;
    for (int i = 0; i < num_chosen; i++) {
        place += __shfl_sync(FULL_MASK, mine, i) < mine;
    }
    if (is_choice) {
        experts[size_t(token) * num_chosen + place] = mine;
        weights[size_t(token) * num_chosen + place] = weight / total;
    }
}
KERNEL(choose_experts);
