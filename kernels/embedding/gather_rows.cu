// Rows by index: out[i] = x[indices[i]], as they are or rounded from f32 to bf16.
//
// Shapes: x f32 or bf16 [num_source_rows, n]; indices u32 [num_rows]; out f32 or bf16 [num_rows, n];
// row-major. The index 0xffffffff stands for a row of zeros.
// Grid: (packs of WIDTH values in a row / blockDim.x, rows). WIDTH is 4, or 1 where n is no multiple of 4.
//
// Bytes per value: once read, once written.
#include "kernel.cuh"

namespace {

constexpr uint32_t NO_ROW = 0xffffffffu;

template <typename In, typename Out, int WIDTH>
__device__ __forceinline__ void gather_rows(
    const In* x, const uint32_t* indices, Out* out, int num_rows, int n) {
    const int column = int(blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (n <= column) {
        return;
    }
    for (int row = blockIdx.y; row < num_rows; row += gridDim.y) {
        const uint32_t index = indices[row];
        Pack<In, WIDTH> values = {};
        if (index != NO_ROW) {
            values = load_pack<WIDTH>(x + size_t(index) * n + column);
        }
        Pack<Out, WIDTH> results;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            results[i] = from_float<Out>(to_float(values[i]));
        }
        store_pack(out + size_t(row) * n + column, results);
    }
}

}  // namespace

#define GATHER_ROWS(name, In, Out, WIDTH)                                          \
    extern "C" __global__ void name(                                               \
        const In* x, const uint32_t* indices, Out* out, int num_rows, int n) {     \
        gather_rows<In, Out, WIDTH>(x, indices, out, num_rows, n);                 \
    }                                                                              \
    KERNEL(name)

GATHER_ROWS(gather_rows_f32_4, float, float, 4);
GATHER_ROWS(gather_rows_f32_1, float, float, 1);
GATHER_ROWS(gather_rows_bf16_4, bf16, bf16, 4);
GATHER_ROWS(gather_rows_bf16_1, bf16, bf16, 1);
GATHER_ROWS(gather_rows_f32_to_bf16_4, float, bf16, 4);
GATHER_ROWS(gather_rows_f32_to_bf16_1, float, bf16, 1);
