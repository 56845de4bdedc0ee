// Brings the tokens of each expert together, each expert's rows beginning at a block of GROUP_ROWS.
//
//   count_choices: counts[e]  = how many choices fell on expert e
//   place_choices: rows[r]    = the token whose activations row r holds, NO_ROW for rows between groups
//                  sources[c] = the row of choice c
//                  blocks[b]  = the expert of rows b * GROUP_ROWS and on, NO_EXPERT behind the last one
//
// Shapes: experts u32 [num_choices], the `num_chosen` choices of a token one after the other; counts u32
// [num_experts]; rows u32 [num_blocks * GROUP_ROWS]; sources u32 [num_choices]; blocks u32 [num_blocks]. The host
// gives room for the most blocks that there can be, so that it need not know the choices.
// Grid: a warp for each expert; warps of a block beyond the last expert do nothing.
//
// A warp reads all choices, 32 at a time, from the L2 cache: 16,384 in about 15 microseconds. Rows of an expert are in
// the order of tokens, without atomic operations.
#include "reduce.cuh"

namespace {

constexpr int GROUP_ROWS = 32;
constexpr uint32_t NO_ROW = 0xffffffffu;
constexpr uint32_t NO_EXPERT = 0xffffffffu;

__device__ __forceinline__ int expert_of_warp() {
    return blockIdx.x * (blockDim.x / WARP_SIZE) + threadIdx.x / WARP_SIZE;
}

// Which of 32 choices fell on the expert.
__device__ __forceinline__ unsigned choosers(const uint32_t* experts, int first, int num_choices, int expert) {
    const int choice = first + threadIdx.x % WARP_SIZE;
    return __ballot_sync(FULL_MASK, choice < num_choices && experts[choice] == uint32_t(expert));
}

}  // namespace

extern "C" __global__ void count_choices(const uint32_t* experts, uint32_t* counts, int num_choices, int num_experts) {
    const int expert = expert_of_warp();
    if (num_experts <= expert) {
        return;
    }
    int count = 0;
    for (int first = 0; first < num_choices; first += WARP_SIZE) {
        count += __popc(choosers(experts, first, num_choices, expert));
    }
    if (threadIdx.x % WARP_SIZE == 0) {
        counts[expert] = count;
    }
}
KERNEL(count_choices);

extern "C" __global__ void place_choices(
    const uint32_t* experts, const uint32_t* counts, uint32_t* rows, uint32_t* sources, uint32_t* blocks,
    int num_choices, int num_chosen, int num_experts, int num_blocks) {
    const int expert = expert_of_warp(), lane = threadIdx.x % WARP_SIZE;
    if (num_experts <= expert) {
        return;
    }
    int before = 0;
    for (int other = lane; other < expert; other += WARP_SIZE) {
        before += ceil_div(int(counts[other]), GROUP_ROWS);
    }
    const int first_block = warp_sum(before);
    const int end_block = first_block + ceil_div(int(counts[expert]), GROUP_ROWS);
    int row = first_block * GROUP_ROWS;
    for (int first = 0; first < num_choices; first += WARP_SIZE) {
        const unsigned mine = choosers(experts, first, num_choices, expert);
        if (mine >> lane & 1) {
            const int at = row + __popc(mine & ((1u << lane) - 1));
            rows[at] = (first + lane) / num_chosen;
            sources[first + lane] = at;
        }
        row += __popc(mine);
    }
    // What is behind the last expert's rows belongs to nobody.
    const int end_row = (expert == num_experts - 1 ? num_blocks : end_block) * GROUP_ROWS;
    for (int at = row + lane; at < end_row; at += WARP_SIZE) rows[at] = NO_ROW;
    for (int block = first_block + lane; block < end_row / GROUP_ROWS; block += WARP_SIZE) {
        blocks[block] = block < end_block ? expert : NO_EXPERT;
    }
}
KERNEL(place_choices);
