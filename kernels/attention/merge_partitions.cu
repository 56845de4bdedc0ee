// Merges what paged_prefill found for parts of the keys of the same queries:
//
//   out = sum_s w_s partial_out_s / sum_s w_s sum_s,   w_s = 2^(maximum_s - max over s)
//
// out         [num_tokens, num_heads, HEAD_DIM] bf16
// partial_*   [num_slots, num_kv_heads, TILE_ROWS, HEAD_DIM] f32 and [.., TILE_ROWS, 2] (maximum, sum)
// merges      [num_merges]: a tile of queries and its slots, one after the other
// grid        (num_kv_heads, num_merges, TILE_ROWS / ROWS), THREADS threads
//
// Rows are queries times the `group` heads of a KV head, as in paged_prefill.
//
// Cost: 4 * HEAD_DIM bytes read per row and slot, 2 * HEAD_DIM written per row: bound by the L2 cache that
// paged_prefill has just filled.

#include "kernel.cuh"

namespace {

constexpr int TILE_ROWS = 128;
constexpr int ROWS = 16;
constexpr int THREADS = 128;

struct Merge {
    unsigned seq;
    unsigned first_query;
    unsigned first_slot;
    unsigned num_slots;
};

template <int HEAD_DIM>
__device__ __forceinline__ void merge_partitions(bf16* out, const float* partial_out, const float* partial_max_sum,
                                                 const Merge* merges, const unsigned* query_start_loc, unsigned group) {
    constexpr unsigned VECTORS = HEAD_DIM / 4;
    const Merge merge = merges[blockIdx.y];
    const unsigned num_kv_heads = gridDim.x;
    const unsigned first_token = query_start_loc[merge.seq] + merge.first_query;
    const unsigned num_queries = min(TILE_ROWS / group, query_start_loc[merge.seq + 1] - first_token);
    const unsigned end_row = min(num_queries * group, (blockIdx.z + 1) * ROWS);
    const unsigned column = threadIdx.x % VECTORS * 4;
    for (unsigned row = blockIdx.z * ROWS + threadIdx.x / VECTORS; row < end_row; row += THREADS / VECTORS) {
        const size_t first = (size_t(merge.first_slot) * num_kv_heads + blockIdx.x) * TILE_ROWS + row;
        const size_t step = size_t(num_kv_heads) * TILE_ROWS;
        float max = -INFINITY;
        for (unsigned slot = 0; slot < merge.num_slots; slot++) {
            max = fmaxf(max, partial_max_sum[(first + slot * step) * 2]);
        }
        float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float sum = 0.0f;
#pragma unroll 4
        for (unsigned slot = 0; slot < merge.num_slots; slot++) {
            const size_t index = first + slot * step;
            const float weight = exp2_approx(partial_max_sum[index * 2] - max);
            const float4 x = *reinterpret_cast<const float4*>(partial_out + index * HEAD_DIM + column);
            sum = fmaf(weight, partial_max_sum[index * 2 + 1], sum);
            values.x = fmaf(weight, x.x, values.x);
            values.y = fmaf(weight, x.y, values.y);
            values.z = fmaf(weight, x.z, values.z);
            values.w = fmaf(weight, x.w, values.w);
        }
        const float factor = 1.0f / sum;
        const unsigned query = row / group;
        const size_t head = (size_t(first_token + query) * num_kv_heads + blockIdx.x) * group + row - query * group;
        store_8(out + head * HEAD_DIM + column, make_uint2(pack_bf16x2(values.x * factor, values.y * factor),
                                                           pack_bf16x2(values.z * factor, values.w * factor)));
    }
}

}  // namespace

#define MERGE_PARTITIONS(name, head_dim)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        name(bf16* out, const float* partial_out, const float* partial_max_sum, const Merge* merges,               \
             const unsigned* query_start_loc, unsigned group) {                                                    \
        merge_partitions<head_dim>(out, partial_out, partial_max_sum, merges, query_start_loc, group);             \
    }                                                                                                              \
    KERNEL(name);

MERGE_PARTITIONS(merge_partitions_64, 64)
MERGE_PARTITIONS(merge_partitions_128, 128)
