// Sums and maxima over a warp and over a block. The order of additions depends on the number of
// threads alone, and every thread gets the same result.
#pragma once

#include "kernel.cuh"

struct Sum {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

struct Max {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
    __device__ __forceinline__ int operator()(int a, int b) const { return a < b ? b : a; }
    __device__ __forceinline__ unsigned operator()(unsigned a, unsigned b) const { return a < b ? b : a; }
};

struct Min {
    __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
    __device__ __forceinline__ int operator()(int a, int b) const { return b < a ? b : a; }
    __device__ __forceinline__ unsigned operator()(unsigned a, unsigned b) const { return b < a ? b : a; }
};

// Over groups of WIDTH neighbouring lanes; all 32 lanes take part.
template <int WIDTH = WARP_SIZE, typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
    for (int distance = WIDTH / 2; 0 < distance; distance /= 2) {
        value = op(value, __shfl_xor_sync(FULL_MASK, value, distance));
    }
    return value;
}

template <int WIDTH = WARP_SIZE, typename T>
__device__ __forceinline__ T warp_sum(T value) { return warp_reduce<WIDTH>(value, Sum()); }

template <int WIDTH = WARP_SIZE, typename T>
__device__ __forceinline__ T warp_max(T value) { return warp_reduce<WIDTH>(value, Max()); }

// Over all threads of a one-dimensional block of whole warps. `scratch` holds 32 values in shared
// memory, which may be used again afterwards. `neutral` does not change the other operand of `op`.
template <typename T, typename Op>
__device__ __forceinline__ T block_reduce(T value, Op op, T neutral, T* scratch) {
    const int lane = threadIdx.x % WARP_SIZE;
    const int num_warps = blockDim.x / WARP_SIZE;
    value = warp_reduce(value, op);
    if (num_warps == 1) {
        return value;
    }
    if (lane == 0) {
        scratch[threadIdx.x / WARP_SIZE] = value;
    }
    __syncthreads();
    value = warp_reduce(lane < num_warps ? scratch[lane] : neutral, op);
    __syncthreads();
    return value;
}

template <typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) { return block_reduce(value, Sum(), T(0), scratch); }

__device__ __forceinline__ float block_max(float value, float* scratch) {
    return block_reduce(value, Max(), -INFINITY, scratch);
}
