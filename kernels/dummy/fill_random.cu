// Fills packed weights with random ones, where there is no file to take them from.
//
//   out[i] = sample[p] ^ (random(i, seed) & mask)    where p lies in the random part of a tile
//   out[i] = sample[p]                               elsewhere;   p = i % period
//
// `sample` is one period of properly packed weights: tiles of `tile` units, whose first `random` units are
// integers and whose rest are scales; from `tiles` units on come superscales. A unit is 16 bytes. `mask` says
// which bits may be turned: all of integers, sign and mantissa of bf16 values.
//
// Shapes: sample [period], out [num_units] units. Threads stride over the units.
// Bytes per unit: 16 written, the sample stays in the cache; about 60 operations.
#include "kernel.cuh"

namespace {

// Every bit of the result depends on every bit of the argument (Steele et al., 2014).
__device__ __forceinline__ uint64_t mixed(uint64_t value) {
    value += 0x9e3779b97f4a7c15ull;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
    return value ^ (value >> 31);
}

}  // namespace

extern "C" __global__ void fill_random(
    const uint4* sample,
    uint4* out,
    long long num_units,
    unsigned period,
    unsigned tiles,
    unsigned tile,
    unsigned random,
    unsigned mask,
    unsigned seed) {
    const long long stride = (long long)(gridDim.x) * blockDim.x;
    for (long long i = (long long)(blockIdx.x) * blockDim.x + threadIdx.x; i < num_units; i += stride) {
        const unsigned place = unsigned(i % period);
        uint4 unit = sample[place];
        if (place < tiles && place % tile < random) {
            const uint64_t low = mixed((uint64_t(seed) << 40) + 2 * uint64_t(i));
            const uint64_t high = mixed((uint64_t(seed) << 40) + 2 * uint64_t(i) + 1);
            unit.x ^= unsigned(low) & mask;
            unit.y ^= unsigned(low >> 32) & mask;
            unit.z ^= unsigned(high) & mask;
            unit.w ^= unsigned(high >> 32) & mask;
        }
        out[i] = unit;
    }
}
KERNEL(fill_random);
