// What a token's experts made of it, added up by weight in ascending order of experts:
//
//   combine_experts: out[t] = sum over i of weights[t, i] * made[source(t, i)]
//   add_gated:       out[t] = x[t] + y[t] / (1 + e^-gates[t])
//
// Shapes: weights f32 [num_tokens, num_chosen]; sources u32 of the same shape, or null where the rows of `made` are the
// choices in their order; made, x, y, out bf16, rows of n values; gates f32 [num_tokens].
// Grid: (n / blockDim.x, tokens). Sums are f32, rounded once.
//
// Bytes per value of the result: 2 num_chosen + 2, or 6.
#include "kernel.cuh"

extern "C" __global__ void combine_experts(
    const bf16* made, const float* weights, const uint32_t* sources, bf16* out, int num_tokens, int num_chosen,
    int n) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (n <= column) {
        return;
    }
    for (int token = blockIdx.y; token < num_tokens; token += gridDim.y) {
        float sum = 0.0f;
        for (int i = 0; i < num_chosen; i++) {
            const size_t choice = size_t(token) * num_chosen + i;
            const size_t row = sources == nullptr ? choice : sources[choice];
            sum += weights[choice] * to_float(made[row * n + column]);
        }
        out[size_t(token) * n + column] = to_bf16(sum);
    }
}
KERNEL(combine_experts);

extern "C" __global__ void add_gated(
    const bf16* x, const float* gates, const bf16* y, bf16* out, int num_tokens, int n) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (n <= column) {
        return;
    }
    for (int token = blockIdx.y; token < num_tokens; token += gridDim.y) {
        const float gate = 1.0f / (1.0f + expf(-gates[token]));
        const size_t at = size_t(token) * n + column;
        out[at] = to_bf16(to_float(x[at]) + gate * to_float(y[at]));
    }
}
KERNEL(add_gated);
