// What the parts of the emulation know of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "emulation.h"

namespace emulation {

// As any float type a NaN.
constexpr unsigned char POISON = 0xff;

#if defined(__x86_64__)
// The stack pointer; everything else lies on the stack.
using Context = void*;
#else
using Context = ucontext_t;
#endif

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    unsigned num_bytes;
    bool valid;
};

// What a lane brings to an exchange with others, and what it takes home.
struct Operands {
    uint64_t value = 0;
    unsigned operand = 0;
    int width = LANES;
    const void* in[2] = {};
    void* out = nullptr;
};

struct Exchange {
    const char* name;
    // Computes the results of all lanes of the mask.
    void (*complete)(Warp& warp, unsigned mask);
};

struct Fiber : Thread {
    uint64_t canary;
    unsigned shared_bytes;
    Context context;
    Block* block;
    Warp* warp;
    // What the fiber waits for: an exchange with lanes of its warp, or a barrier.
    const Exchange* exchange;
    unsigned mask;
    int barrier;
    Operands* operands;
    // Ends of committed groups in `copies`.
    std::vector<size_t> groups;
    std::vector<Copy> copies;
};

struct Warp {
    Fiber* lanes[LANES];
    unsigned present;
    unsigned ready;
    unsigned waiting;
};

inline Fiber& this_fiber() { return static_cast<Fiber&>(this_thread()); }

// What goes wrong is the result of the launch; the block is given up.
void report(const Fiber& fiber, const std::string& text);
[[noreturn]] void fail(Fiber& fiber, const std::string& text);

// Waits until all lanes of the mask have brought their operands; the last one computes for all.
void exchange(const Exchange& what, unsigned mask, Operands& operands);

// Calls `change` with the operands of each lane.
template <typename Change>
void for_each_lane(Warp& warp, unsigned mask, Change change) {
    for (; mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        change(lane, *warp.lanes[lane]->operands);
    }
}

float bf16_to_float(uint16_t bits);

}  // namespace emulation
