// The device as a host compiler sees it: a kernel file that includes kernel.cuh becomes functions
// `emulate_<kernel>` which run every thread of a block as a fiber.
//
// Compiled by build.rs, which says with which options and why.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

extern "C" {

// One launch. The first thing that goes wrong is written to `error` as a text that ends in zero; a text
// of no length means that the launch went well.
struct EmulatedLaunch {
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared_bytes;
    char* error;
    size_t error_len;
};

// How many threads of the host run blocks; one unless set.
__attribute__((visibility("default"))) void emulate_set_num_threads(unsigned num_threads);

// Another order of threads and blocks. Races that one order hides show in another.
__attribute__((visibility("default"))) void emulate_set_order(unsigned order);
}

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

constexpr size_t STACK_BYTES = 128 << 10;
constexpr int LANES = 32;

struct Block;
struct Warp;

// What a thread is, as its own code sees it; it lies at the lowest address of its stack.
struct Thread {
    uint3 index;
    uint3 block_index;
    dim3 block_dim;
    dim3 grid_dim;
    unsigned char* dynamic_shared;
    unsigned lane;
};

// Stacks are aligned to their size, so the stack pointer tells the thread.
inline Thread& this_thread() {
#if defined(__x86_64__)
    uintptr_t stack_pointer;
    asm("movq %%rsp, %0" : "=r"(stack_pointer));
#else
    const uintptr_t stack_pointer = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
#endif
    return *reinterpret_cast<Thread*>(stack_pointer & ~uintptr_t(STACK_BYTES - 1));
}

using Entry = void (*)(void** args);

void launch(const EmulatedLaunch& launch, const char* kernel, Entry entry, void** args);

template <typename... Params, size_t... INDEX>
void call(void (*kernel)(Params...), void** args, std::index_sequence<INDEX...>) {
    kernel(*static_cast<std::remove_const_t<Params>*>(args[INDEX])...);
}

template <typename... Params>
void call(void (*kernel)(Params...), void** args) {
    call(kernel, args, std::index_sequence_for<Params...>());
}

[[noreturn]] void fail(const char* text);

enum class Vote { SYNC, AND, OR, COUNT };
enum class Shuffle { INDEX, UP, DOWN, XOR };
enum class Reduce { ADD, MIN, MAX, MIN_SIGNED, MAX_SIGNED, AND, OR, XOR };

int block_vote(Vote vote, int predicate);
void block_barrier(int id, int num_threads);
void warp_barrier(unsigned mask);
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned operand, int width);
unsigned ballot(unsigned mask, int predicate);
int any(unsigned mask, int predicate);
int all(unsigned mask, int predicate);
unsigned match_any(unsigned mask, uint64_t value);
unsigned reduce(Reduce kind, unsigned mask, unsigned value);
unsigned active_mask();

void mma_bf16(float* d, const uint32_t* a, const uint32_t* b);
void mma_f16(float* d, const uint32_t* a, const uint32_t* b);
void mma_s8(int* d, const uint32_t* a, const uint32_t* b);
void ldmatrix(uint32_t* r, int num_matrices, const void* row);
void ldmatrix_trans(uint32_t* r, int num_matrices, const void* row);

void cp_async(void* shared, const void* global, unsigned num_bytes, bool valid);
void cp_async_commit();
void cp_async_wait(unsigned num_pending);

float f16_to_float(uint16_t bits);
uint16_t float_to_f16(float x);
uint16_t float_to_bf16(float x);
uint16_t fma_f16(uint16_t a, uint16_t b, uint16_t c);
uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c);

}  // namespace emulation

#define KERNEL(name)                                                                              \
    extern "C" __attribute__((visibility("default"))) void emulate_##name(const EmulatedLaunch*,  \
                                                                          void**);                \
    extern "C" void emulate_##name(const EmulatedLaunch* launch, void** args) {                   \
        emulation::launch(*launch, #name, [](void** args) { emulation::call(name, args); }, args); \
    }                                                                                             \
    static_assert(true, #name)

#define DYNAMIC_SHARED(type, name) \
    type* const name = reinterpret_cast<type*>(emulation::this_thread().dynamic_shared)

#include "cuda_names.h"
