// What an adapter adds to some rows of a product: y[rows[i], column(c)] += scale * added[i, c], with
// column(c) = first_column + c / run * stride + c % run.
//
// Shapes: y bf16 or f32 [num_tokens, width], in place; added f32 [num_rows, num_columns]; rows u32 [num_rows], each
// row at most once; row-major. A plain range of columns is one run; of gates and ups that alternate by eight the
// gates are runs of 8 from column 0, the ups from column 8, both 16 apart.
// Grid: (packs of WIDTH values in a row of added / blockDim.x, rows). WIDTH is 4, or 1 where a length or a beginning
// is no multiple of 4.
//
// A bf16 value is rounded once, after the addition. Bytes per value: 8 with bf16, 12 with f32.
#include "kernel.cuh"

namespace {

struct Columns {
    int count;  // of a row of added
    int width;  // of a row of y
    int first;
    int run;
    int stride;
};

template <typename Y, int WIDTH>
__device__ __forceinline__ void add_scaled(
    Y* y, const float* added, const uint32_t* rows, int num_rows, Columns columns, float scale) {
    const int column = int(blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (columns.count <= column) {
        return;
    }
    const int place = columns.first + column / columns.run * columns.stride + column % columns.run;
    for (int row = blockIdx.y; row < num_rows; row += gridDim.y) {
        Y* const to = y + size_t(rows[row]) * columns.width + place;
        Pack<Y, WIDTH> values = load_pack<WIDTH>(to);
        const Pack<float, WIDTH> terms = load_pack<WIDTH>(added + size_t(row) * columns.count + column);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            values[i] = from_float<Y>(to_float(values[i]) + scale * terms[i]);
        }
        store_pack(to, values);
    }
}

}  // namespace

#define ADD_SCALED(name, Y, WIDTH)                                                                    \
    extern "C" __global__ void name(Y* y, const float* added, const uint32_t* rows, int num_rows,     \
                                    int count, int width, int first, int run, int stride,             \
                                    float scale) {                                                    \
        add_scaled<Y, WIDTH>(y, added, rows, num_rows, {count, width, first, run, stride}, scale);    \
    }                                                                                                 \
    KERNEL(name)

ADD_SCALED(add_scaled_bf16_4, bf16, 4);
ADD_SCALED(add_scaled_bf16_1, bf16, 1);
ADD_SCALED(add_scaled_f32_4, float, 4);
ADD_SCALED(add_scaled_f32_1, float, 1);
