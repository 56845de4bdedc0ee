// 16-bit floats, pairs of them in a 32-bit word (the lower half first), and vector loads and stores.
#pragma once

#include "kernel.cuh"

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

// Sign, 4 bits of exponent with a bias of 7, 3 bits of mantissa; no infinities, 0x7f is a NaN.
struct e4m3 {
    uint8_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

__device__ __forceinline__ float to_float(f16 x) {
#ifdef __CUDACC__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    return emulation::f16_to_float(x.bits);
#endif
}

// Rounds to nearest, ties to even; a NaN becomes 0x7fff.
__device__ __forceinline__ bf16 to_bf16(float x) {
#ifdef __CUDACC__
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return {bits};
#else
    return {emulation::float_to_bf16(x)};
#endif
}

// Rounds to nearest, ties to even; too large becomes infinite, a NaN 0x7fff.
__device__ __forceinline__ f16 to_f16(float x) {
#ifdef __CUDACC__
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return {bits};
#else
    return {emulation::float_to_f16(x)};
#endif
}

// As to_f16, but the largest finite number instead of infinity.
__device__ __forceinline__ f16 to_f16_saturated(float x) {
    return x != x ? to_f16(x) : to_f16(fminf(fmaxf(x, -65504.0f), 65504.0f));
}

// Rounds to nearest, ties to even; what is too large becomes the largest number, 448, a NaN 0x7f. In
// integers, because cards before 8.9 have no instruction for it.
__device__ __forceinline__ e4m3 to_e4m3_saturated(float x) {
    const uint32_t word = __float_as_uint(x);
    const uint32_t sign = word >> 24 & 0x80;
    const float magnitude = __uint_as_float(word & 0x7fffffff);
    if (magnitude != magnitude) {
        return {0x7f};
    }
    if (magnitude < 0.015625f) {
        // Multiples of 2^-9, the unit in the last place of 2^14.
        return {uint8_t(sign | (__float_as_uint(magnitude + 16384.0f) & 0xf))};
    }
    const uint32_t rounded = __float_as_uint(fminf(magnitude, 448.0f)) + 0x7ffff + (word >> 20 & 1);
    return {uint8_t(sign | ((rounded >> 20) - ((127 - 7) << 3)))};
}

// Converts to the named type: from_float<bf16>(x).
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return to_bf16(x); }
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) { return to_f16(x); }

__device__ __forceinline__ uint32_t pack(bf16 low, bf16 high) { return low.bits | uint32_t(high.bits) << 16; }
__device__ __forceinline__ uint32_t pack(f16 low, f16 high) { return low.bits | uint32_t(high.bits) << 16; }

__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
#ifdef __CUDACC__
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return pack(to_bf16(low), to_bf16(high));
#endif
}

__device__ __forceinline__ uint32_t pack_f16x2(float low, float high) {
#ifdef __CUDACC__
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return pack(to_f16(low), to_f16(high));
#endif
}

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float low_f16(uint32_t pair) { return to_float(f16{uint16_t(pair)}); }
__device__ __forceinline__ float high_f16(uint32_t pair) { return to_float(f16{uint16_t(pair >> 16)}); }

// a * b + c of both halves, rounded once each.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return emulation::fma_bf16(a, b, c) | uint32_t(emulation::fma_bf16(a >> 16, b >> 16, c >> 16)) << 16;
#endif
}

__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return emulation::fma_f16(a, b, c) | uint32_t(emulation::fma_f16(a >> 16, b >> 16, c >> 16)) << 16;
#endif
}

__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, b, 0x80008000u); }
__device__ __forceinline__ uint32_t sub_bf16x2(uint32_t a, uint32_t b) {
    return fma_bf16x2(b, 0xbf80bf80u, a);
}
__device__ __forceinline__ uint32_t mul_f16x2(uint32_t a, uint32_t b) { return fma_f16x2(a, b, 0x80008000u); }
__device__ __forceinline__ uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    return fma_f16x2(b, 0xbc00bc00u, a);
}

// Loads and stores of 16 and 8 aligned bytes.
__device__ __forceinline__ uint4 load_16(const void* address) { return *static_cast<const uint4*>(address); }
__device__ __forceinline__ uint2 load_8(const void* address) { return *static_cast<const uint2*>(address); }
__device__ __forceinline__ void store_16(void* address, uint4 value) { *static_cast<uint4*>(address) = value; }
__device__ __forceinline__ void store_8(void* address, uint2 value) { *static_cast<uint2*>(address) = value; }

// 16 aligned bytes of global memory that no one writes during the launch, and that are read only once:
// they do not displace others from the L1 cache.
__device__ __forceinline__ uint4 load_16_once(const void* address) {
#ifdef __CUDACC__
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
#else
    return load_16(address);
#endif
}

// N values of T from one aligned load of N * sizeof(T) = 4, 8 or 16 bytes, and the reverse.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T values[N];
    __device__ __forceinline__ T& operator[](int i) { return values[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* address) {
    return *reinterpret_cast<const Pack<T, N>*>(address);
}

template <int N, typename T>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(address) = pack;
}
