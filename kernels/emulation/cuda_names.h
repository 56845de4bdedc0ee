// Names that nvcc knows without any include.
#pragma once

#include <math.h>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
// Poisoned before every block, like dynamic shared memory.
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
// Empty, because the standard library writes __attribute__((__noinline__)).
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (::emulation::this_thread().index)
#define blockIdx (::emulation::this_thread().block_index)
#define blockDim (::emulation::this_thread().block_dim)
#define gridDim (::emulation::this_thread().grid_dim)
constexpr int warpSize = 32;

#define EMULATED_VECTORS(type, name, align2, align4)                                     \
    struct name##2 { alignas(align2) type x; type y; };                                  \
    struct name##4 { alignas(align4) type x; type y, z, w; };                            \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                     \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTORS(unsigned, uint, 8, 16)
EMULATED_VECTORS(float, float, 8, 16)
EMULATED_VECTORS(int, int, 8, 16)
EMULATED_VECTORS(short, short, 4, 8)
EMULATED_VECTORS(unsigned short, ushort, 4, 8)
EMULATED_VECTORS(signed char, char, 2, 4)
EMULATED_VECTORS(unsigned char, uchar, 2, 4)
EMULATED_VECTORS(double, double, 16, 16)
EMULATED_VECTORS(long long, longlong, 16, 16)
EMULATED_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef EMULATED_VECTORS
struct float3 { float x, y, z; };
struct int3 { int x, y, z; };
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// Barriers and exchange between threads.
inline void __syncthreads() { emulation::block_vote(emulation::Vote::SYNC, 0); }
inline int __syncthreads_and(int predicate) { return emulation::block_vote(emulation::Vote::AND, predicate); }
inline int __syncthreads_or(int predicate) { return emulation::block_vote(emulation::Vote::OR, predicate); }
inline int __syncthreads_count(int predicate) { return emulation::block_vote(emulation::Vote::COUNT, predicate); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::warp_barrier(mask); }
inline unsigned __activemask() { return emulation::active_mask(); }
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulation::ballot(mask, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return emulation::any(mask, predicate); }
inline int __all_sync(unsigned mask, int predicate) { return emulation::all(mask, predicate); }

namespace emulation {
template <typename T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "lanes exchange values of 32 or 64 bits");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <typename T>
T shuffle_value(Shuffle kind, unsigned mask, T value, unsigned operand, int width) {
    const uint64_t bits = shuffle(kind, mask, to_bits(value), operand, width);
    T result;
    memcpy(&result, &bits, sizeof(T));
    return result;
}
}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    return emulation::shuffle_value(emulation::Shuffle::INDEX, mask, value, lane, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return emulation::shuffle_value(emulation::Shuffle::UP, mask, value, delta, width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return emulation::shuffle_value(emulation::Shuffle::DOWN, mask, value, delta, width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    return emulation::shuffle_value(emulation::Shuffle::XOR, mask, value, lanes, width);
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) { return emulation::match_any(mask, emulation::to_bits(value)); }

#define EMULATED_REDUCE(name, kind, kind_signed)                                        \
    inline unsigned name(unsigned mask, unsigned value) {                               \
        return emulation::reduce(emulation::Reduce::kind, mask, value);                 \
    }                                                                                   \
    inline int name(unsigned mask, int value) {                                         \
        return int(emulation::reduce(emulation::Reduce::kind_signed, mask, unsigned(value))); \
    }
EMULATED_REDUCE(__reduce_add_sync, ADD, ADD)
EMULATED_REDUCE(__reduce_min_sync, MIN, MIN_SIGNED)
EMULATED_REDUCE(__reduce_max_sync, MAX, MAX_SIGNED)
EMULATED_REDUCE(__reduce_and_sync, AND, AND)
EMULATED_REDUCE(__reduce_or_sync, OR, OR)
EMULATED_REDUCE(__reduce_xor_sync, XOR, XOR)
#undef EMULATED_REDUCE

// Memory.
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { emulation::fail("__trap was called"); }

template <typename T> T __ldg(const T* address) { return *address; }
template <typename T> T __ldcg(const T* address) { return *address; }
template <typename T> T __ldcs(const T* address) { return *address; }
template <typename T> T __ldca(const T* address) { return *address; }
template <typename T> void __stcg(T* address, T value) { *address = value; }
template <typename T> void __stcs(T* address, T value) { *address = value; }
template <typename T> void __stwt(T* address, T value) { *address = value; }

namespace emulation {
// Replaces the value by what `change` makes of it, and gives the old one.
template <typename T, typename Change>
T atomic_update(T* address, Change change) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics work on 32 or 64 bits");
    Bits* const word = reinterpret_cast<Bits*>(address);
    Bits old_bits = __atomic_load_n(word, __ATOMIC_RELAXED), new_bits;
    T old_value;
    do {
        memcpy(&old_value, &old_bits, sizeof(T));
        const T new_value = change(old_value);
        memcpy(&new_bits, &new_value, sizeof(T));
    } while (!__atomic_compare_exchange_n(word, &old_bits, new_bits, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return old_value;
}

template <typename T>
struct Same {
    using Type = T;
};
// A parameter that does not take part in finding T.
template <typename T>
using Value = typename Same<T>::Type;
}  // namespace emulation

template <typename T> T atomicAdd(T* p, emulation::Value<T> v) { return emulation::atomic_update(p, [v](T x) { return T(x + v); }); }
template <typename T> T atomicSub(T* p, emulation::Value<T> v) { return emulation::atomic_update(p, [v](T x) { return T(x - v); }); }
template <typename T> T atomicMax(T* p, emulation::Value<T> v) { return emulation::atomic_update(p, [v](T x) { return x < v ? v : x; }); }
template <typename T> T atomicMin(T* p, emulation::Value<T> v) { return emulation::atomic_update(p, [v](T x) { return v < x ? v : x; }); }
template <typename T> T atomicOr(T* p, emulation::Value<T> v) { return emulation::atomic_update(p, [v](T x) { return T(x | v); }); }
template <typename T> T atomicAnd(T* p, emulation::Value<T> v) { return emulation::atomic_update(p, [v](T x) { return T(x & v); }); }
template <typename T> T atomicXor(T* p, emulation::Value<T> v) { return emulation::atomic_update(p, [v](T x) { return T(x ^ v); }); }
template <typename T> T atomicExch(T* p, emulation::Value<T> v) { return emulation::atomic_update(p, [v](T) { return v; }); }
template <typename T> T atomicCAS(T* p, emulation::Value<T> expected, emulation::Value<T> v) {
    return emulation::atomic_update(p, [expected, v](T x) { return x == expected ? v : x; });
}
// Counts up to `limit`, then starts again at zero.
inline unsigned atomicInc(unsigned* p, unsigned limit) {
    return emulation::atomic_update(p, [limit](unsigned x) { return limit <= x ? 0 : x + 1; });
}

// Bits and integers.
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int i = 0; i < 32; i++) result |= (x >> i & 1) << (31 - i);
    return result;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = a | uint64_t(b) << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned choice = selector >> (4 * i) & 15;
        unsigned byte = unsigned(bytes >> (8 * (choice & 7))) & 0xff;
        if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int(int8_t(a >> (8 * i))) * int8_t(b >> (8 * i));
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += unsigned(uint8_t(a >> (8 * i))) * uint8_t(b >> (8 * i));
    return c;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __vsubss4(int a, int b) {
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const int difference = int(int8_t(a >> (8 * i))) - int8_t(b >> (8 * i));
        result |= unsigned(uint8_t(difference < -128 ? -128 : 127 < difference ? 127 : difference)) << (8 * i);
    }
    return int(result);
}
inline unsigned __vsub4(unsigned a, unsigned b) {
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (((a >> (8 * i)) - (b >> (8 * i))) & 0xff) << (8 * i);
    return result;
}
inline unsigned __vadd4(unsigned a, unsigned b) {
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (((a >> (8 * i)) + (b >> (8 * i))) & 0xff) << (8 * i);
    return result;
}

#define EMULATED_MIN_MAX(type)                                     \
    constexpr type min(type a, type b) { return b < a ? b : a; }   \
    constexpr type max(type a, type b) { return a < b ? b : a; }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(long)
EMULATED_MIN_MAX(unsigned long)
EMULATED_MIN_MAX(long long)
EMULATED_MIN_MAX(unsigned long long)
#undef EMULATED_MIN_MAX
constexpr unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
constexpr unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
constexpr unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
constexpr unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// Floats.
namespace emulation {
template <typename To, typename From>
To cast_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "types of one size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// As the device converts: out of range saturates, NaN becomes zero.
template <typename Int>
Int to_int(double x, Int lowest, Int highest) {
    return x != x ? 0 : x <= double(lowest) ? lowest : double(highest) <= x ? highest : Int(x);
}
}  // namespace emulation

inline unsigned __float_as_uint(float x) { return emulation::cast_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulation::cast_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation::cast_bits<float>(x); }
inline float __int_as_float(int x) { return emulation::cast_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::cast_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::cast_bits<double>(x); }
inline int __float2int_rn(float x) { return emulation::to_int<int>(rint(double(x)), INT32_MIN, INT32_MAX); }
inline int __float2int_rz(float x) { return emulation::to_int<int>(trunc(double(x)), INT32_MIN, INT32_MAX); }
inline int __float2int_rd(float x) { return emulation::to_int<int>(floor(double(x)), INT32_MIN, INT32_MAX); }
inline int __float2int_ru(float x) { return emulation::to_int<int>(ceil(double(x)), INT32_MIN, INT32_MAX); }
inline unsigned __float2uint_rn(float x) { return emulation::to_int<unsigned>(rint(double(x)), 0, UINT32_MAX); }
inline unsigned __float2uint_rz(float x) { return emulation::to_int<unsigned>(trunc(double(x)), 0, UINT32_MAX); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
// The C library has functions of these names.
#define __expf(x) expf(x)
#define __exp10f(x) float(pow(10.0, double(x)))
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
inline float rsqrtf(float x) { return float(1.0 / sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
