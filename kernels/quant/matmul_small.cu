#include "matmul_small.cuh"

#define SMALL(format, NAME, tokens, NT, TILES, STAGES)                                                             \
    extern "C" __global__ void __launch_bounds__(512, 1) matmul_small_##format##_n##tokens##_r##TILES(             \
        const uint8_t* weights, const bf16* x, const float* bias, void* y, int num_tokens, int num_rows,           \
        int num_cols, int y_stride, int output) {                                                                  \
        matmul_small<NAME, TILES, NT, STAGES>({weights, x, bias, y, num_tokens, num_rows, num_cols, 0, y_stride, output}); \
    }                                                                                                              \
    KERNEL(matmul_small_##format##_n##tokens##_r##TILES);

#define SMALL_ALL(format, NAME)        \
    SMALL(format, NAME, 8, 1, 1, 6)    \
    SMALL(format, NAME, 8, 1, 2, 5)    \
    SMALL(format, NAME, 8, 1, 4, 4)    \
    SMALL(format, NAME, 16, 2, 2, 4)

SMALL_ALL(q4_0, Q4_0)
SMALL_ALL(q4_1, Q4_1)
SMALL_ALL(q5_0, Q5_0)
SMALL_ALL(q5_1, Q5_1)
SMALL_ALL(q8_0, Q8_0)
SMALL_ALL(q2_k, Q2_K)
SMALL_ALL(q3_k, Q3_K)
SMALL_ALL(q4_k, Q4_K)
SMALL_ALL(q5_k, Q5_K)
SMALL_ALL(q6_k, Q6_K)
