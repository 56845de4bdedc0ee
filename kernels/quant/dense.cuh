// Dense bf16 weights, row-major as in a file, in the place of a packed format (see formats.cuh).
//
// Rows are `row_stride` elements apart, a multiple of 8. A lane's A fragment is four consecutive columns in
// the same order as that of formats with a scale for 32 columns. In shared memory a tile is 16 rows of 128
// bytes, permuted like activations.
#pragma once

#include "formats.cuh"

namespace quant {

struct Dense {
    static constexpr bool IS_DENSE = true;
    static constexpr bool HAS_MIN = false;
    static constexpr int RUN = 32;
    static constexpr int GROUPS = 1;
    static constexpr int GROUP_PRODUCTS = TILE_PRODUCTS;
    static constexpr int TILE_BYTES = TILE_ROWS * TILE_COLS * 2;
    static constexpr int SUPER_BYTES = 0;
    static constexpr int STAGE_BYTES = TILE_BYTES;

    __device__ __forceinline__ static const uint8_t* source(const Product& p, int row_tile, int tile, int piece) {
        const long long row = row_tile * TILE_ROWS + piece / 8;
        return p.weights + (row * p.row_stride + tile * TILE_COLS + piece % 8 * 8) * 2;
    }

    __device__ __forceinline__ static unsigned step(int num_tiles, int) { return num_tiles * TILE_COLS * 2; }

    __device__ __forceinline__ static void copy(
        uint8_t* stage, const uint8_t* from, const Product& p, int first_row_tile, int tile, int index) {
        const int row = index / 8, piece = index % 8;
        const bool valid = first_row_tile * TILE_ROWS + row < p.num_rows && tile * TILE_COLS + piece * 8 < p.row_stride;
        cp_async_16(stage + row * 128 + activation_piece<32>(row, piece) * 16, from, valid);
    }

    struct Fragment {
        uint32_t rows[2][TILE_PRODUCTS][2];

        __device__ __forceinline__ void load(const uint8_t* tile, int lane) {
            const int g = lane / 4, t = lane % 4;
            load_activations<32>(rows[0], tile + g * 128, g, t);
            load_activations<32>(rows[1], tile + (g + 8) * 128, g, t);
        }

        __device__ __forceinline__ void unpack(uint32_t (&a)[4], int j) const {
            a[0] = rows[0][j][0], a[1] = rows[1][j][0], a[2] = rows[0][j][1], a[3] = rows[1][j][1];
        }
    };
};

}  // namespace quant
