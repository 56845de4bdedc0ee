// The gated activation of SwiGLU: out = gate / (1 + e^-gate) * up.
//
// Shapes: gate_up bf16 [num_rows, 2 * n], per row all gates, then all ups, or (silu_mul_by_8) eight gates, then the
// eight ups of the same features, and so on; out bf16 [num_rows, n]; row-major. silu_mul_f32_by_8 takes sums in f32
// and gives the bits of the products that apply the activation themselves (`quant/product.cuh`).
// Grid: (packs of WIDTH values in a row / blockDim.x, rows). WIDTH is 8, or 1 where n is no multiple of 8, or 4 of f32.
//
// Bytes per value: 6, of f32 10; about 6 operations, one of them an exponential and one a division.
#include "kernel.cuh"

namespace {

__device__ __forceinline__ float silu_mul(float gate, float up) {
    return gate / (1.0f + __expf(-gate)) * up;
}

// Gates and ups alternate by `group` values.
template <int WIDTH, typename In>
__device__ __forceinline__ void silu_mul_rows(const In* gate_up, bf16* out, int num_rows, int n,
                                              int group) {
    const int column = int(blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (n <= column) {
        return;
    }
    for (int row = blockIdx.y; row < num_rows; row += gridDim.y) {
        const In* const gates = gate_up + size_t(row) * 2 * n + column + column / group * group;
        const Pack<In, WIDTH> gate = load_pack<WIDTH>(gates);
        const Pack<In, WIDTH> up = load_pack<WIDTH>(gates + group);
        Pack<bf16, WIDTH> result;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            result[i] = to_bf16(silu_mul(to_float(gate[i]), to_float(up[i])));
        }
        store_pack(out + size_t(row) * n + column, result);
    }
}

}  // namespace

extern "C" __global__ void silu_mul_8(const bf16* gate_up, bf16* out, int num_rows, int n) {
    silu_mul_rows<8>(gate_up, out, num_rows, n, n);
}
KERNEL(silu_mul_8);

extern "C" __global__ void silu_mul_1(const bf16* gate_up, bf16* out, int num_rows, int n) {
    silu_mul_rows<1>(gate_up, out, num_rows, n, n);
}
KERNEL(silu_mul_1);

extern "C" __global__ void silu_mul_by_8(const bf16* gate_up, bf16* out, int num_rows, int n) {
    silu_mul_rows<8>(gate_up, out, num_rows, n, 8);
}
KERNEL(silu_mul_by_8);

extern "C" __global__ void silu_mul_f32_by_8(const float* gate_up, bf16* out, int num_rows, int n) {
    silu_mul_rows<4>(gate_up, out, num_rows, n, 8);
}
KERNEL(silu_mul_f32_by_8);
