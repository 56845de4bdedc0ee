// Kernels with mistakes, one for each `mistake`; the tests of the emulation expect it to notice. With
// `mistake` zero all is well. Threads of a block come in two warps and pass values to their neighbours.

#include "kernel.cuh"

#include "copy.cuh"

namespace {

constexpr int NUM_THREADS = 64;

}  // namespace

// out[i] = x[i + 1], in a ring, through dynamic shared memory.
extern "C" __global__ void planted_shift(const float* x, float* out, int mistake) {
    DYNAMIC_SHARED(float, shared);
    const int i = threadIdx.x;
    shared[i] = x[i];
    if (mistake != 1) {
        __syncthreads();
    }
    out[blockIdx.x * NUM_THREADS + i] = shared[(i + 1) % NUM_THREADS];
    if (mistake == 2 && i == 0) {
        shared[NUM_THREADS] = 1.0f;
    }
}
KERNEL(planted_shift);

// The same through static shared memory.
extern "C" __global__ void planted_static_shift(const float* x, float* out, int mistake) {
    __shared__ float shared[NUM_THREADS];
    const int i = threadIdx.x;
    shared[i] = x[i];
    if (mistake != 1) {
        __syncthreads();
    }
    out[blockIdx.x * NUM_THREADS + i] = shared[(i + 1) % NUM_THREADS];
}
KERNEL(planted_static_shift);

// The same twice through one buffer, which must be read by all before it is written again.
extern "C" __global__ void planted_reuse(const float* x, float* out, int mistake) {
    DYNAMIC_SHARED(float, shared);
    const int i = threadIdx.x;
    float value = x[i];
    for (int round = 0; round < 2; round++) {
        shared[i] = value;
        __syncthreads();
        value = shared[(i + (round == 0 ? 34 : 31)) % NUM_THREADS];
        if (mistake != 1) {
            __syncthreads();
        }
    }
    out[blockIdx.x * NUM_THREADS + i] = value;
}
KERNEL(planted_reuse);

// The same through an asynchronous copy, behind a second one that is still under way.
extern "C" __global__ void planted_copy(const float* x, float* out, int mistake) {
    DYNAMIC_SHARED(float, shared);
    const int i = threadIdx.x;
    cp_async_4(shared + i, x + i);
    cp_async_commit();
    cp_async_4(shared + NUM_THREADS + i, x + i);
    cp_async_commit();
    if (mistake != 1) {
        cp_async_wait<1>();
    }
    if (mistake == 2) {
        // Into what others still wait to read.
        cp_async_4(shared + i, x + i);
    }
    __syncthreads();
    out[blockIdx.x * NUM_THREADS + i] = shared[(i + 1) % NUM_THREADS];
}
KERNEL(planted_copy);

// The same through registers, in a ring of each warp.
extern "C" __global__ void planted_exchange(const float* x, float* out, int mistake) {
    const int i = threadIdx.x, lane = i % WARP_SIZE;
    if (mistake == 1 && lane == 3) {
        return;
    }
    if (mistake == 2 && lane < 16) {
        __syncwarp();
    }
    if (mistake == 3 && lane < 16) {
        out[i] = __shfl_sync(0x0000ffffu, x[i], 20);
    }
    if (mistake == 4 && i < WARP_SIZE) {
        __syncthreads();
    }
    if (mistake == 5 && i == 40) {
        return;
    }
    if (mistake == 6 && i < WARP_SIZE) {
        named_barrier(1, NUM_THREADS);
    }
    if (mistake == 7 && i == 9) {
        out[i] = *(x - (ptrdiff_t(1) << 40));
    }
    if (mistake == 8 && i == 9) {
        out[i] = float(load_8(x + 1).x);
    }
    if (mistake == 9) {
        const float values[4] = {x[0], x[1], x[2], x[3]};
        out[i] = values[i];
    }
    out[blockIdx.x * NUM_THREADS + i] = __shfl_sync(FULL_MASK, x[i], (lane + 1) % WARP_SIZE);
    __syncthreads();
}
KERNEL(planted_exchange);
