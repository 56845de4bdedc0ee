// Columns by index: out[t, i] = x[t, columns[i]].
//
// Shapes: x bf16 [num_tokens, num_source_cols]; columns u32 [n]; out bf16 [num_tokens, n]; row-major, n a multiple
// of 4.
// Grid: (packs of 4 columns / blockDim.x, tokens).
//
// Bytes per value: 2 read, somewhere in a row that the first-level cache holds; 2 written, and 4 of index.
#include "kernel.cuh"

extern "C" __global__ void gather_columns(
    const bf16* x, const uint32_t* columns, bf16* out, int num_tokens, int num_source_cols, int n) {
    constexpr int WIDTH = 4;
    const int first = int(blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (n <= first) {
        return;
    }
    const uint4 places = load_16(columns + first);
    for (int token = blockIdx.y; token < num_tokens; token += gridDim.y) {
        const bf16* const row = x + size_t(token) * num_source_cols;
        Pack<bf16, WIDTH> values;
        values[0] = row[places.x];
        values[1] = row[places.y];
        values[2] = row[places.z];
        values[3] = row[places.w];
        store_pack(out + size_t(token) * n + first, values);
    }
}
KERNEL(gather_columns);
