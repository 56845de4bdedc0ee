// Dense bf16 instances of the products in matmul_small.cuh and matmul_large.cuh.
//
// w is [num_rows, row_stride] in bf16, row-major, row_stride a multiple of 8. Each weight is read once for up to
// 16 tokens: 7B has 14.1 GB of them, 3.3 ms on an H200 at 4.3 TB/s. A tile of 16 x 64 is 2 KiB and takes no unpacking.
// Large products of the driver backend go to cuBLASLt; the large instances are their twin where there is none.
#include "matmul_large.cuh"
#include "matmul_small.cuh"

using namespace quant;

#define DENSE_SMALL(COLUMNS, TILES)                                                                           \
    extern "C" __global__ void __launch_bounds__(512, 1) matmul_dense_small_n##COLUMNS##_r##TILES(            \
        const uint8_t* weights, const bf16* x, const float* bias, void* y, int num_tokens, int num_rows,      \
        int num_cols, int row_stride, int y_stride, int output) {                                             \
        matmul_small<Dense, TILES, COLUMNS>(                                                                  \
            {weights, x, bias, y, num_tokens, num_rows, num_cols, row_stride, y_stride, output});             \
    }                                                                                                         \
    KERNEL(matmul_dense_small_n##COLUMNS##_r##TILES);

DENSE_SMALL(1, 1)
DENSE_SMALL(1, 2)
DENSE_SMALL(8, 1)
DENSE_SMALL(8, 2)
DENSE_SMALL(16, 1)
DENSE_SMALL(16, 2)

#define DENSE_LARGE(TOKENS, WARPS_N, STAGES)                                                                  \
    extern "C" __global__ void __launch_bounds__(LARGE_THREADS, LARGE_BLOCKS<TOKENS>) matmul_dense_large_n##TOKENS(              \
        const uint8_t* weights, const bf16* x, const float* bias, void* y, int num_tokens, int num_rows,      \
        int num_cols, int row_stride, int y_stride, int output, float* partial, unsigned* counters,           \
        int split_tiles) {                                                                                    \
        matmul_large<Dense, TOKENS, WARPS_N, STAGES>(                                                         \
            {weights, x, bias, y, num_tokens, num_rows, num_cols, row_stride, y_stride, output},              \
            {nullptr, partial, counters, 0, split_tiles});                                                    \
    }                                                                                                         \
    KERNEL(matmul_dense_large_n##TOKENS);

DENSE_LARGE(32, 1, 5)
DENSE_LARGE(64, 2, 6)
DENSE_LARGE(128, 2, 5)
