// Products of rows of activations with the weights of the expert that each row is for. All experts of a layer have
// matrices of one shape and format, `expert_bytes` apart.
//
//   matmul_experts_small: y[c] = x[c / per_row] w[experts[c]]^T for a few choices c, each on its own: the product of
//                         matmul_small.cuh for one token. Grid: (groups of row tiles, choices).
//   matmul_experts_large: y[r] = x[r] w[blocks[r / 32]]^T for rows that were brought together by expert: the product of
//                         matmul_large.cuh for 32 tokens. Grid: (blocks of 32 rows, blocks of 128 weight rows). A block
//                         of nobody's rows ends at once.
//
// Shapes: x bf16 [rows, num_cols], experts u32 [choices], blocks u32 [rows / 32], y bf16, rows of y_stride values. No
// biases. A result depends on its own row and on the shape of the matrix alone.
//
// Bytes: small reads the weights once for each choice, large once for each 32 rows of an expert, from the L2 cache
// where experts are shared. A step of one token of Qwen3-30B-A3B (8 of 128 experts, 2048 x 768, Q4_K) reads 8 * 2.65
// MB in each layer, 5 microseconds on an H200.
#include "matmul_large.cuh"
#include "matmul_small.cuh"

using namespace quant;

namespace {

constexpr uint32_t NO_EXPERT = 0xffffffffu;
constexpr int GROUP_ROWS = 32;

}  // namespace

#define EXPERTS(format, NAME, STAGES)                                                                         \
    extern "C" __global__ void __launch_bounds__(512, 1) matmul_experts_small_##format(                      \
        const uint8_t* weights, long long expert_bytes, const uint32_t* experts, const bf16* x, bf16* y,     \
        int per_row, int num_rows, int num_cols, int row_stride, int y_stride, int output) {                 \
        const int choice = blockIdx.y;                                                                       \
        matmul_small<NAME, 1, 1>(                                                                            \
            {weights + experts[choice] * expert_bytes, x + (long long)(choice / per_row) * num_cols, nullptr, \
             y + (long long)choice * y_stride, 1, num_rows, num_cols, row_stride, y_stride, output});        \
    }                                                                                                         \
    KERNEL(matmul_experts_small_##format);                                                                    \
    extern "C" __global__ void __launch_bounds__(LARGE_THREADS, LARGE_BLOCKS<GROUP_ROWS>)                    \
    matmul_experts_large_##format(                                                                            \
        const uint8_t* weights, long long expert_bytes, const uint32_t* blocks, const bf16* x, bf16* y,      \
        int num_x_rows, int num_rows, int num_cols, int row_stride, int y_stride, int output,                \
        const float* sums) {                                                                                  \
        const uint32_t expert = blocks[blockIdx.x];                                                           \
        if (expert == NO_EXPERT) return;                                                                      \
        matmul_large<NAME, GROUP_ROWS, 1, STAGES>(                                                            \
            {weights + expert * expert_bytes, x, nullptr, y, num_x_rows, num_rows, num_cols, row_stride,     \
             y_stride, output},                                                                               \
            {sums, nullptr, nullptr, num_x_rows, ceil_div(num_cols, TILE_COLS)});                             \
    }                                                                                                         \
    KERNEL(matmul_experts_large_##format);

EXPERTS(dense, Dense, 5)
EXPERTS(q4_0, Q4_0, 8)
EXPERTS(q4_1, Q4_1, 8)
EXPERTS(q5_0, Q5_0, 8)
EXPERTS(q5_1, Q5_1, 8)
EXPERTS(q8_0, Q8_0, 8)
EXPERTS(q2_k, Q2_K, 8)
EXPERTS(q3_k, Q3_K, 8)
EXPERTS(q4_k, Q4_K, 8)
EXPERTS(q5_k, Q5_K, 8)
EXPERTS(q6_k, Q6_K, 8)
EXPERTS(fp8, Fp8, 8)
