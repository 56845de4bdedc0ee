// First include of every kernel file. nvcc compiles it for the device; a host compiler takes the
// emulation instead, where the same file runs with a fiber for each thread.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

// An entry point is `extern "C" __global__ void name(...)`, followed by `KERNEL(name);`.
#define KERNEL(name) static_assert(true, #name)

// Declares `type* name`, the block's dynamic shared memory, aligned to 128 bytes.
#define DYNAMIC_SHARED(type, name)                             \
    extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[]; \
    type* const name = reinterpret_cast<type*>(dynamic_shared_bytes)

#else
#include "../emulation/emulation.h"
#endif

constexpr unsigned FULL_MASK = 0xffffffffu;
constexpr int WARP_SIZE = 32;

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

// 2^x to about 2 ulp; denormal results are zero.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// Any function of three words, bit by bit: LUT is that function of 0xf0, 0xcc and 0xaa.
template <int LUT>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(LUT));
    return result;
#else
    uint32_t result = 0;
    for (int i = 0; i < 8; i++) {
        if (LUT >> i & 1) {
            result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        }
    }
    return result;
#endif
}

// The same number, which the compiler keeps in a register instead of finding it anew each time.
__device__ __forceinline__ int kept(int value) {
#ifdef __CUDACC__
    asm("" : "+r"(value));
#endif
    return value;
}

// A barrier of its own (1 to 15) for some warps of a block: `num_threads` of them wait for each other.
__device__ __forceinline__ void named_barrier(int id, int num_threads) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(num_threads) : "memory");
#else
    emulation::block_barrier(id, num_threads);
#endif
}

#include "dtype.cuh"
