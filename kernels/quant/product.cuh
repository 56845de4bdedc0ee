// A matrix product as all matmul kernels take it, and what is done with its results.
//
//   y[t, r] = sum_k x[t, k] w[r, k] + bias[r]
#pragma once

#include "kernel.cuh"

namespace quant {

constexpr int TILE_ROWS = 16;
constexpr int TILE_COLS = 64;

// The same number, which the compiler keeps in a register instead of finding it anew each time.
__device__ __forceinline__ int kept(int value) {
#ifdef __CUDACC__
    asm("" : "+r"(value));
#endif
    return value;
}

enum Output : int {
    STORE_BF16 = 0,
    STORE_F32 = 1,
    // Of each row tile rows 0 to 7 are gates, 8 to 15 the ups of the same features:
    // y[t, 8 tile + i] = silu(row i) * (row 8 + i), bf16.
    SILU_MUL = 2,
};

struct Product {
    const uint8_t* weights;
    const bf16* x;       // [num_tokens, num_cols], num_cols a multiple of 8
    const float* bias;   // [num_rows] or null
    void* y;             // rows of `y_stride` elements
    int num_tokens;
    int num_rows;        // of the weights, with SILU_MUL a multiple of 16
    int num_cols;        // of the activations
    int row_stride;      // elements between rows of dense weights
    int y_stride;        // with SILU_MUL also the number of features
    int output;

    __device__ __forceinline__ int num_tiles() const { return ceil_div(num_cols, TILE_COLS); }
    __device__ __forceinline__ int num_row_tiles() const { return ceil_div(num_rows, TILE_ROWS); }
};

// Puts the results of rows `row_tile * 16 + g` and `+ g + 8` for one token where they belong.
__device__ __forceinline__ void put_rows(const Product& p, int token, int row_tile, int g, float low, float high) {
    const int row = row_tile * TILE_ROWS + g;
    if (p.output == SILU_MUL) {
        const int feature = row_tile * (TILE_ROWS / 2) + g;
        if (feature < p.y_stride) {
            const float silu = low / (1.0f + __expf(-low));
            static_cast<bf16*>(p.y)[(long long)token * p.y_stride + feature] = to_bf16(silu * high);
        }
        return;
    }
    for (int half = 0; half < 2; half++) {
        const int r = row + 8 * half;
        if (r < p.num_rows) {
            const float value = (half == 0 ? low : high) + (p.bias != nullptr ? p.bias[r] : 0.0f);
            const long long at = (long long)token * p.y_stride + r;
            if (p.output == STORE_F32) {
                static_cast<float*>(p.y)[at] = value;
            } else {
                static_cast<bf16*>(p.y)[at] = to_bf16(value);
            }
        }
    }
}

}  // namespace quant
