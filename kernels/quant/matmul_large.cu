// Quantised instances of the product in matmul_large.cuh: formats of GGUF and fp8, 32, 64 or 128 tokens a block.
#include "matmul_large.cuh"

using namespace quant;

#define LARGE(format, NAME, TOKENS, WARPS_N, STAGES)                                                      \
    extern "C" __global__ void __launch_bounds__(LARGE_THREADS, LARGE_BLOCKS<TOKENS>)                     \
    matmul_large_##format##_n##TOKENS(                                                                    \
        const uint8_t* weights, const bf16* x, const float* bias, void* y, int num_tokens, int num_rows,  \
        int num_cols, int y_stride, int output, const float* sums, float* partial, unsigned* counters,    \
        int sum_stride, int split_tiles) {                                                                \
        matmul_large<NAME, TOKENS, WARPS_N, STAGES>(                                                      \
            {weights, x, bias, y, num_tokens, num_rows, num_cols, 0, y_stride, output},                   \
            {sums, partial, counters, sum_stride, split_tiles});                                          \
    }                                                                                                     \
    KERNEL(matmul_large_##format##_n##TOKENS);

#define LARGE_ALL(format, NAME)    \
    LARGE(format, NAME, 32, 1, 8)  \
    LARGE(format, NAME, 64, 2, 8)  \
    LARGE(format, NAME, 128, 2, 6)

LARGE_ALL(q4_0, Q4_0)
LARGE_ALL(q4_1, Q4_1)
LARGE_ALL(q5_0, Q5_0)
LARGE_ALL(q5_1, Q5_1)
LARGE_ALL(q8_0, Q8_0)
LARGE_ALL(q2_k, Q2_K)
LARGE_ALL(q3_k, Q3_K)
LARGE_ALL(q4_k, Q4_K)
LARGE_ALL(q5_k, Q5_K)
LARGE_ALL(q6_k, Q6_K)
LARGE_ALL(fp8, Fp8)
