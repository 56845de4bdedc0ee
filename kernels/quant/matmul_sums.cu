// sums[k, t] = sum of x[t, RUN k .. RUN (k + 1)] for each scale group k, for the minima in matmul_large.
//
// Shapes: x bf16 [num_tokens, num_cols], sums f32 [num_groups, sum_stride]. Tokens beyond the last and columns beyond the
// last count as zero. A thread sums one group of one token, consecutive threads have consecutive tokens: reads
// 2 num_tokens num_cols bytes in pieces of 32 or 64, writes coalesced 4 num_tokens num_cols / RUN. At 4,096 tokens of
// 3,584 columns 33 MB, 8 microseconds on an H200.
#include "kernel.cuh"

template <int RUN>
__device__ __forceinline__ void matmul_sums(const bf16* x, float* sums, int num_tokens, int num_cols, int sum_stride) {
    const int token = blockIdx.x * blockDim.x + threadIdx.x, group = blockIdx.y;
    if (sum_stride <= token) return;
    float sum = 0.0f;
    if (token < num_tokens) {
        const bf16* const from = x + (long long)token * num_cols + group * RUN;
#pragma unroll
        for (int i = 0; i < RUN; i += 8) {
            if (group * RUN + i < num_cols) {
                const uint4 v = load_16(from + i);
                sum += (low_bf16(v.x) + high_bf16(v.x)) + (low_bf16(v.y) + high_bf16(v.y));
                sum += (low_bf16(v.z) + high_bf16(v.z)) + (low_bf16(v.w) + high_bf16(v.w));
            }
        }
    }
    sums[(long long)group * sum_stride + token] = sum;
}

#define SUMS(RUN)                                                                            \
    extern "C" __global__ void __launch_bounds__(128) matmul_sums_##RUN(                      \
        const bf16* x, float* sums, int num_tokens, int num_cols, int sum_stride) {          \
        matmul_sums<RUN>(x, sums, num_tokens, num_cols, sum_stride);                         \
    }                                                                                        \
    KERNEL(matmul_sums_##RUN);

SUMS(16)
SUMS(32)
