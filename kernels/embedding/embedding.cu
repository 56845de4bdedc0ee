// Embedding: out[i] = table[ids[i]], dequantised on the way out.
//
// Shapes: table, num_rows rows of num_cols weights in one of the formats of GGUF files, byte for byte as in
// the file; ids u32 [num_ids]; out f32 [num_ids, num_cols]. A row whose id is not below num_rows becomes NaN.
//
// Every integer format is affine on short runs: weight = scale * (q - offset) - min. The operations are those
// of the CPU, each rounded on its own, so the results are equal to the last bit.
// Grid: (columns / blockDim.x, ids), a thread to a weight.
//
// Bytes per id: a row of the table and 4 * num_cols.
#include "kernel.cuh"

namespace {

__device__ __forceinline__ float read_f16(const uint8_t* bytes) {
    return to_float(f16{uint16_t(bytes[0] | bytes[1] << 8)});
}

__device__ __forceinline__ float affine(float scale, int q, float min) {
    return __fsub_rn(__fmul_rn(scale, float(q)), min);
}

// The first half of the integers in the low nibbles, the second in the high ones.
__device__ __forceinline__ int nibble(const uint8_t* bytes, int i, int half) {
    return i < half ? bytes[i] & 15 : bytes[i - half] >> 4;
}

// Each 32 bytes hold 64 integers.
__device__ __forceinline__ int chunked_nibble(const uint8_t* bytes, int i) {
    return nibble(bytes + i / 64 * 32, i % 64, 32);
}

// Each 32 bytes hold 128 integers, a round of 32 for each pair of bits.
__device__ __forceinline__ int bit_pair(const uint8_t* bytes, int i) {
    return bytes[i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32)) & 3;
}

__device__ __forceinline__ int bit(const uint8_t* bytes, int i) { return bytes[i / 8] >> (i % 8) & 1; }

// Eight scales and eight minima of six bits: the first four of each have a byte, whose two top bits belong
// to the last four.
__device__ __forceinline__ int six_bit_scale(const uint8_t* packed, int run) {
    return run < 4 ? packed[run] & 63 : (packed[run + 4] & 15) | packed[run - 4] >> 6 << 4;
}

__device__ __forceinline__ int six_bit_min(const uint8_t* packed, int run) {
    return run < 4 ? packed[run + 4] & 63 : packed[run + 4] >> 4 | packed[run] >> 6 << 4;
}

// A format tells how long a block is, in weights and in bytes, and finds weight `i` of a block.

struct F32 {
    static constexpr int LEN = 1, BYTES = 4;
    static __device__ __forceinline__ float weight(const uint8_t* block, int) {
        return *reinterpret_cast<const float*>(block);
    }
};

struct F16 {
    static constexpr int LEN = 1, BYTES = 2;
    static __device__ __forceinline__ float weight(const uint8_t* block, int) {
        return to_float(*reinterpret_cast<const f16*>(block));
    }
};

struct Bf16 {
    static constexpr int LEN = 1, BYTES = 2;
    static __device__ __forceinline__ float weight(const uint8_t* block, int) {
        return to_float(*reinterpret_cast<const bf16*>(block));
    }
};

struct Q4_0 {
    static constexpr int LEN = 32, BYTES = 18;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        return affine(read_f16(block), nibble(block + 2, i, 16) - 8, 0.0f);
    }
};

struct Q4_1 {
    static constexpr int LEN = 32, BYTES = 20;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        return affine(read_f16(block), nibble(block + 4, i, 16), -read_f16(block + 2));
    }
};

struct Q5_0 {
    static constexpr int LEN = 32, BYTES = 22;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        const int q = nibble(block + 6, i, 16) | bit(block + 2, i) << 4;
        return affine(read_f16(block), q - 16, 0.0f);
    }
};

struct Q5_1 {
    static constexpr int LEN = 32, BYTES = 24;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        const int q = nibble(block + 8, i, 16) | bit(block + 4, i) << 4;
        return affine(read_f16(block), q, -read_f16(block + 2));
    }
};

struct Q8_0 {
    static constexpr int LEN = 32, BYTES = 34;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        return affine(read_f16(block), int8_t(block[2 + i]), 0.0f);
    }
};

struct Q8_1 {
    static constexpr int LEN = 32, BYTES = 36;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        return affine(read_f16(block), int8_t(block[4 + i]), 0.0f);
    }
};

// [scales and minima 16][2-bit integers 64][d][dmin]
struct Q2K {
    static constexpr int LEN = 256, BYTES = 84;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        const int packed = block[i / 16];
        const float scale = __fmul_rn(read_f16(block + 80), float(packed & 15));
        return affine(scale, bit_pair(block + 16, i), __fmul_rn(read_f16(block + 82), float(packed >> 4)));
    }
};

// [third bits 32][2-bit integers 64][6-bit scales 12][d]; a set third bit means plus four.
struct Q3K {
    static constexpr int LEN = 256, BYTES = 110;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        const uint8_t* const packed = block + 96;
        const int run = i / 16;
        const int low = packed[run % 8] >> (run / 8 * 4) & 15;
        const int high = packed[8 + run % 4] >> (run / 4 * 2) & 3;
        const float scale = __fmul_rn(read_f16(block + 108), float((low | high << 4) - 32));
        const int q = bit_pair(block + 32, i) | (block[i % 32] >> (i / 32) & 1) << 2;
        return affine(scale, q - 4, 0.0f);
    }
};

// [d][dmin][6-bit scales and minima 12][nibbles 128]
struct Q4K {
    static constexpr int LEN = 256, BYTES = 144;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        const float scale = __fmul_rn(read_f16(block), float(six_bit_scale(block + 4, i / 32)));
        const float min = __fmul_rn(read_f16(block + 2), float(six_bit_min(block + 4, i / 32)));
        return affine(scale, chunked_nibble(block + 16, i), min);
    }
};

// [d][dmin][6-bit scales and minima 12][fifth bits 32][nibbles 128]
struct Q5K {
    static constexpr int LEN = 256, BYTES = 176;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        const float scale = __fmul_rn(read_f16(block), float(six_bit_scale(block + 4, i / 32)));
        const float min = __fmul_rn(read_f16(block + 2), float(six_bit_min(block + 4, i / 32)));
        const int fifth = block[16 + i % 32] >> (i / 32) & 1;
        return affine(scale, chunked_nibble(block + 48, i) | fifth << 4, min);
    }
};

// [nibbles 128][high bit pairs 64][scales 16][d]; each half of 128 weights takes 64 bytes of nibbles.
struct Q6K {
    static constexpr int LEN = 256, BYTES = 210;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        const float scale = __fmul_rn(read_f16(block + 208), float(int8_t(block[192 + i / 16])));
        const int low = nibble(block + i / 128 * 64, i % 128, 64);
        return affine(scale, (low | bit_pair(block + 128, i) << 4) - 32, 0.0f);
    }
};

// [d as f32][integers 256][sums, not needed here]
struct Q8K {
    static constexpr int LEN = 256, BYTES = 292;
    static __device__ __forceinline__ float weight(const uint8_t* block, int i) {
        return affine(*reinterpret_cast<const float*>(block), int8_t(block[4 + i]), 0.0f);
    }
};

template <typename Format>
__device__ __forceinline__ void embed(
    const uint8_t* table, const uint32_t* ids, float* out, int num_ids, unsigned num_rows, int num_cols) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (num_cols <= column) {
        return;
    }
    const size_t row_bytes = size_t(num_cols / Format::LEN) * Format::BYTES;
    const size_t offset = size_t(column / Format::LEN) * Format::BYTES;
    for (int i = blockIdx.y; i < num_ids; i += gridDim.y) {
        const uint32_t id = ids[i];
        out[size_t(i) * num_cols + column] =
            id < num_rows ? Format::weight(table + id * row_bytes + offset, column % Format::LEN)
                          : __uint_as_float(0x7fffffffu);
    }
}

}  // namespace

#define EMBEDDING(name, Format)                                                                            \
    extern "C" __global__ void name(                                                                       \
        const uint8_t* table, const uint32_t* ids, float* out, int num_ids, unsigned num_rows, int num_cols) { \
        embed<Format>(table, ids, out, num_ids, num_rows, num_cols);                                       \
    }                                                                                                      \
    KERNEL(name)

EMBEDDING(embedding_f32, F32);
EMBEDDING(embedding_f16, F16);
EMBEDDING(embedding_bf16, Bf16);
EMBEDDING(embedding_q4_0, Q4_0);
EMBEDDING(embedding_q4_1, Q4_1);
EMBEDDING(embedding_q5_0, Q5_0);
EMBEDDING(embedding_q5_1, Q5_1);
EMBEDDING(embedding_q8_0, Q8_0);
EMBEDDING(embedding_q8_1, Q8_1);
EMBEDDING(embedding_q2k, Q2K);
EMBEDDING(embedding_q3k, Q3K);
EMBEDDING(embedding_q4k, Q4K);
EMBEDDING(embedding_q5k, Q5K);
EMBEDDING(embedding_q6k, Q6K);
EMBEDDING(embedding_q8k, Q8K);
