// Root-mean-square norm of rows, alone or behind the addition of a layer's output to the residual stream.
//
//   rms_norm       out = x / sqrt(mean(x^2) + eps) * weight
//   add_rms_norm   sum = x + residual;  out = sum / sqrt(mean(sum^2) + eps) * weight
//
// Shapes: x f32 [num_rows, n] (with an addition: bf16), residual and sum f32 [num_rows, n],
// weight f32 [n], out bf16 [num_rows, n]; row-major. `sum` may be the same memory as `residual`.
//
// One block per row; the row stays in registers between the two uses, eight neighbouring values to a pack.
// PACKS is the number of packs of a thread: n <= 8 * PACKS * blockDim.x. Rows whose length is no multiple
// of eight take the `_any` kernels, which read a row twice. The order of additions depends on n alone.
//
// Bytes per row: 6n + 4n weights (12n + 4n with an addition); about 5n operations.
#include "kernel.cuh"
#include "reduce.cuh"

namespace {

using Pack8 = Pack<float, 8>;

__device__ __forceinline__ Pack8 load_floats(const float* address) {
    const float4 low = *reinterpret_cast<const float4*>(address);
    const float4 high = *reinterpret_cast<const float4*>(address + 4);
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

__device__ __forceinline__ void store_floats(float* address, const Pack8& x) {
    *reinterpret_cast<float4*>(address) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4*>(address + 4) = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void add_bf16(Pack8& sum, const bf16* address) {
    const uint4 x = load_16(address);
    const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum[2 * i] += low_bf16(pairs[i]);
        sum[2 * i + 1] += high_bf16(pairs[i]);
    }
}

__device__ __forceinline__ float row_scale(float squares, int n, float eps) {
    __shared__ float scratch[WARP_SIZE];
    return rsqrtf(block_sum(squares, scratch) / float(n) + eps);
}

// `x` is nullptr where nothing is added, and then `sum` is not written.
template <int PACKS>
__device__ __forceinline__ void norm_row(
    const bf16* x, const float* residual, const float* weight, float* sum, bf16* out, int n, float eps) {
    const size_t row = size_t(blockIdx.x) * n;
    Pack8 values[PACKS];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        const int column = int(threadIdx.x + i * blockDim.x) * 8;
        if (column < n) {
            values[i] = load_floats(residual + row + column);
            if (x != nullptr) {
                add_bf16(values[i], x + row + column);
                store_floats(sum + row + column, values[i]);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                squares += values[i][j] * values[i][j];
            }
        }
    }
    const float scale = row_scale(squares, n, eps);
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        const int column = int(threadIdx.x + i * blockDim.x) * 8;
        if (column < n) {
            const Pack8 w = load_floats(weight + column);
            uint32_t pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float low = values[i][2 * j] * scale * w[2 * j];
                const float high = values[i][2 * j + 1] * scale * w[2 * j + 1];
                pairs[j] = pack_bf16x2(low, high);
            }
            store_16(out + row + column, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
        }
    }
}

__device__ __forceinline__ void norm_any_row(
    const bf16* x, const float* residual, const float* weight, float* sum, bf16* out, int n, float eps) {
    const size_t row = size_t(blockIdx.x) * n;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float value = residual[row + i];
        if (x != nullptr) {
            value += to_float(x[row + i]);
            sum[row + i] = value;
        }
        squares += value * value;
    }
    const float scale = row_scale(squares, n, eps);
    const float* const values = x != nullptr ? sum : residual;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        // Each thread reads what it has written itself.
        out[row + i] = to_bf16(values[row + i] * scale * weight[i]);
    }
}

}  // namespace

#define RMS_NORM(suffix, norm)                                                                         \
    extern "C" __global__ void __launch_bounds__(1024) rms_norm##suffix(                               \
        const float* x, const float* weight, bf16* out, int n, float eps) {                            \
        norm(nullptr, x, weight, nullptr, out, n, eps);                                                \
    }                                                                                                  \
    KERNEL(rms_norm##suffix);                                                                          \
    extern "C" __global__ void __launch_bounds__(1024) add_rms_norm##suffix(                           \
        const bf16* x, const float* residual, const float* weight, float* sum, bf16* out, int n, float eps) { \
        norm(x, residual, weight, sum, out, n, eps);                                                   \
    }                                                                                                  \
    KERNEL(add_rms_norm##suffix)

RMS_NORM(_1, norm_row<1>);
RMS_NORM(_2, norm_row<2>);
RMS_NORM(_4, norm_row<4>);
RMS_NORM(_any, norm_any_row);
