// Asynchronous copies from global to shared memory. What a thread has copied can be read by that thread
// behind cp_async_wait, by others behind a barrier after it. Where `valid` is false the destination
// becomes zero and the source is not read.
#pragma once

#include "kernel.cuh"

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
#else
    emulation::cp_async(shared, global, 16, valid);
#endif
}

__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid = true) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :
                 : "r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global), "r"(valid ? 8 : 0)
                 : "memory");
#else
    emulation::cp_async(shared, global, 8, valid);
#endif
}

__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid = true) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global), "r"(valid ? 4 : 0)
                 : "memory");
#else
    emulation::cp_async(shared, global, 4, valid);
#endif
}

// Ends a group: the copies since the one before.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" : : : "memory");
#else
    emulation::cp_async_commit();
#endif
}

// Waits for all groups of this thread but the newest NUM_PENDING.
template <int NUM_PENDING>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" : : "n"(NUM_PENDING) : "memory");
#else
    emulation::cp_async_wait(NUM_PENDING);
#endif
}
