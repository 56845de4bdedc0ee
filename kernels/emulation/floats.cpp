// 16-bit floats as the device rounds them.

#include <cmath>
#include <cstring>

#include "fibers.h"

namespace emulation {

float bf16_to_float(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

float f16_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) {
        return mantissa ? NAN : sign * INFINITY;
    }
    return sign * (exponent ? ldexpf(float(mantissa + 1024), exponent - 25) : ldexpf(float(mantissa), -24));
}

uint16_t float_to_f16(float x) {
    if (x != x) {
        return 0x7fff;
    }
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const float magnitude = fabsf(x);
    if (65520.0f <= magnitude) {
        return sign | 0x7c00;
    }
    if (magnitude < 0x1p-14f) {
        // The default rounding mode is to nearest, ties to even.
        return uint16_t(sign | int(nearbyintf(magnitude * 0x1p24f)));
    }
    const uint32_t rebased = (bits & 0x7fffffff) - (112u << 23);
    return uint16_t(sign | ((rebased + 0xfff + (rebased >> 13 & 1)) >> 13));
}

uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

namespace {

// To float such that a second rounding to fewer bits gives what one rounding would: inexact sums get an
// odd last bit.
float round_to_odd(double x) {
    const float nearest = float(x);
    uint32_t bits;
    memcpy(&bits, &nearest, 4);
    if (double(nearest) == x || x != x || std::isinf(nearest) || bits & 1) {
        return nearest;
    }
    const bool is_too_large = std::fabs(double(nearest)) > std::fabs(x);
    bits = is_too_large ? bits - 1 : bits + 1;
    float odd;
    memcpy(&odd, &bits, 4);
    return odd;
}

}  // namespace

uint16_t fma_f16(uint16_t a, uint16_t b, uint16_t c) {
    return float_to_f16(round_to_odd(double(f16_to_float(a)) * f16_to_float(b) + f16_to_float(c)));
}

uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
    return float_to_bf16(round_to_odd(double(bf16_to_float(a)) * bf16_to_float(b) + bf16_to_float(c)));
}

}  // namespace emulation
