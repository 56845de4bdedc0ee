// Quantised instances of the product in matmul_small.cuh: formats of GGUF and fp8; 1, 8 or 16 columns of
// tokens; 1, 2 or 4 row tiles at a time.
#include "matmul_small.cuh"

using namespace quant;

#define SMALL(format, NAME, COLUMNS, TILES)                                                                \
    extern "C" __global__ void __launch_bounds__(512, 1) matmul_small_##format##_n##COLUMNS##_r##TILES(   \
        const uint8_t* weights, const bf16* x, const float* bias, void* y, int num_tokens, int num_rows,  \
        int num_cols, int y_stride, int output) {                                                         \
        matmul_small<NAME, TILES, COLUMNS>(                                                               \
            {weights, x, bias, y, num_tokens, num_rows, num_cols, 0, y_stride, output});                  \
    }                                                                                                     \
    KERNEL(matmul_small_##format##_n##COLUMNS##_r##TILES);

#define SMALL_ALL(format, NAME)  \
    SMALL(format, NAME, 1, 1)    \
    SMALL(format, NAME, 1, 2)    \
    SMALL(format, NAME, 8, 1)    \
    SMALL(format, NAME, 8, 2)    \
    SMALL(format, NAME, 16, 1)   \
    SMALL(format, NAME, 16, 2)

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
SMALL_ALL(fp8, Fp8)

// Four tiles of 8-bit weights do not fit into the registers.
SMALL(q4_0, Q4_0, 1, 4)
SMALL(q4_1, Q4_1, 1, 4)
SMALL(q5_0, Q5_0, 1, 4)
SMALL(q5_1, Q5_1, 1, 4)
SMALL(q2_k, Q2_K, 1, 4)
SMALL(q3_k, Q3_K, 1, 4)
SMALL(q4_k, Q4_K, 1, 4)
SMALL(q5_k, Q5_K, 1, 4)
SMALL(q6_k, Q6_K, 1, 4)
