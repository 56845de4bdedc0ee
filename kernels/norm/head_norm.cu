// Root-mean-square norm of the queries and keys of each token, head by head and in place.
//
//   x = x / sqrt(mean(x^2) + eps) * weight, the mean over the values of one head
//
// Shapes: qkv bf16 [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], per token all queries, all keys,
// all values, which stay as they are; q_weight and k_weight f32 [head_dim].
//
// One warp per head; lane l takes the values l, l + 32 and so on, twice. The order of additions depends on
// head_dim alone.
//
// Bytes per head: 4 * head_dim + 4 * head_dim weights; about 5 * head_dim operations.
#include "kernel.cuh"
#include "reduce.cuh"

extern "C" __global__ void head_norm(
    bf16* qkv, const float* q_weight, const float* k_weight, int num_tokens, int num_heads, int num_kv_heads,
    int head_dim, float eps) {
    const int warp = int((blockIdx.x * blockDim.x + threadIdx.x) / WARP_SIZE);
    const int lane = int(threadIdx.x % WARP_SIZE);
    const int num_normed = num_heads + num_kv_heads;
    const int token = warp / num_normed, head = warp % num_normed;
    if (num_tokens <= token) {
        return;
    }
    bf16* const x = qkv + (size_t(token) * (num_normed + num_kv_heads) + head) * head_dim;
    const float* const weight = head < num_heads ? q_weight : k_weight;
    float squares = 0.0f;
    for (int i = lane; i < head_dim; i += WARP_SIZE) {
        const float value = to_float(x[i]);
        squares += value * value;
    }
    const float scale = rsqrtf(warp_sum(squares) / float(head_dim) + eps);
    for (int i = lane; i < head_dim; i += WARP_SIZE) {
        // Each lane reads what it overwrites itself.
        x[i] = to_bf16(to_float(x[i]) * scale * weight[i]);
    }
}
KERNEL(head_norm);
