// What lanes of a warp do together: barriers, votes, shuffles, reductions, products of matrices.

#include <algorithm>
#include <cstring>
#include <string>

#include "fibers.h"

namespace emulation {
namespace {

template <typename Change>
void for_each_as(Warp& warp, unsigned mask, Change change) {
    for_each_lane(warp, mask, [&](int, Operands& operands) { change(operands); });
}

unsigned lanes_with(Warp& warp, unsigned mask) {
    unsigned result = 0;
    for_each_lane(warp, mask, [&](int lane, Operands& o) { result |= unsigned(o.value != 0) << lane; });
    return result;
}

const Exchange SYNC_WARP = {"__syncwarp", [](Warp&, unsigned) {}};

const Exchange BALLOT = {"__ballot_sync", [](Warp& warp, unsigned mask) {
    const unsigned lanes = lanes_with(warp, mask);
    for_each_as(warp, mask, [&](Operands& o) { o.value = lanes; });
}};

const Exchange ANY = {"__any_sync", [](Warp& warp, unsigned mask) {
    const unsigned lanes = lanes_with(warp, mask);
    for_each_as(warp, mask, [&](Operands& o) { o.value = lanes != 0; });
}};

const Exchange ALL = {"__all_sync", [](Warp& warp, unsigned mask) {
    const unsigned lanes = lanes_with(warp, mask);
    for_each_as(warp, mask, [&](Operands& o) { o.value = lanes == mask; });
}};

const Exchange MATCH_ANY = {"__match_any_sync", [](Warp& warp, unsigned mask) {
    uint64_t values[LANES];
    for_each_lane(warp, mask, [&](int lane, Operands& o) { values[lane] = o.value; });
    for_each_lane(warp, mask, [&](int, Operands& o) {
        const uint64_t value = o.value;
        o.value = 0;
        for (int i = 0; i < LANES; i++) {
            o.value |= uint64_t((mask >> i & 1) && values[i] == value) << i;
        }
    });
}};

template <Shuffle KIND>
int source_lane(int lane, unsigned operand, int width) {
    const int first = lane & ~(width - 1), last = lane | (width - 1);
    switch (KIND) {
        case Shuffle::INDEX: return first | int(operand & unsigned(width - 1));
        case Shuffle::UP: return int(operand) > lane - first ? lane : lane - int(operand);
        case Shuffle::DOWN: return int(operand) > last - lane ? lane : lane + int(operand);
        default: return (lane ^ int(operand)) > last ? lane : lane ^ int(operand);
    }
}

template <Shuffle KIND>
void complete_shuffle(Warp& warp, unsigned mask) {
    uint64_t values[LANES];
    for_each_lane(warp, mask, [&](int lane, Operands& o) { values[lane] = o.value; });
    for_each_lane(warp, mask, [&](int lane, Operands& o) {
        const int source = source_lane<KIND>(lane, o.operand, o.width);
        if (source < 0 || LANES <= source || !(mask >> source & 1)) {
            report(*warp.lanes[lane], "takes a value from lane " + std::to_string(source) + ", which is not in the mask");
            return;
        }
        o.value = values[source];
    });
}

const Exchange SHUFFLES[] = {
    {"__shfl_sync", complete_shuffle<Shuffle::INDEX>},
    {"__shfl_up_sync", complete_shuffle<Shuffle::UP>},
    {"__shfl_down_sync", complete_shuffle<Shuffle::DOWN>},
    {"__shfl_xor_sync", complete_shuffle<Shuffle::XOR>},
};

template <Reduce KIND>
unsigned combine(unsigned a, unsigned b) {
    switch (KIND) {
        case Reduce::ADD: return a + b;
        case Reduce::MIN: return std::min(a, b);
        case Reduce::MAX: return std::max(a, b);
        case Reduce::MIN_SIGNED: return unsigned(std::min(int(a), int(b)));
        case Reduce::MAX_SIGNED: return unsigned(std::max(int(a), int(b)));
        case Reduce::AND: return a & b;
        case Reduce::OR: return a | b;
        default: return a ^ b;
    }
}

template <Reduce KIND>
void complete_reduce(Warp& warp, unsigned mask) {
    unsigned result = unsigned(warp.lanes[__builtin_ctz(mask)]->operands->value);
    for_each_as(warp, mask & (mask - 1), [&](Operands& o) { result = combine<KIND>(result, unsigned(o.value)); });
    for_each_as(warp, mask, [&](Operands& o) { o.value = result; });
}

const Exchange REDUCTIONS[] = {
    {"__reduce_add_sync", complete_reduce<Reduce::ADD>},        {"__reduce_min_sync", complete_reduce<Reduce::MIN>},
    {"__reduce_max_sync", complete_reduce<Reduce::MAX>},        {"__reduce_min_sync", complete_reduce<Reduce::MIN_SIGNED>},
    {"__reduce_max_sync", complete_reduce<Reduce::MAX_SIGNED>}, {"__reduce_and_sync", complete_reduce<Reduce::AND>},
    {"__reduce_or_sync", complete_reduce<Reduce::OR>},          {"__reduce_xor_sync", complete_reduce<Reduce::XOR>},
};

uint16_t word_at(const uint32_t* words, int i) { return uint16_t(words[i / 2] >> (16 * (i % 2))); }

// The device's sums are those of exact products, rounded in an order and precision of its own.
template <float (*to_float)(uint16_t)>
void complete_mma_16(Warp& warp, unsigned mask) {
    double a[16][16], b[16][8];
    for_each_lane(warp, mask, [&](int lane, Operands& o) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t* const fragment_a = static_cast<const uint32_t*>(o.in[0]);
        const uint32_t* const fragment_b = static_cast<const uint32_t*>(o.in[1]);
        for (int i = 0; i < 8; i++) {
            a[g + (i / 2 % 2) * 8][2 * t + i % 2 + i / 4 * 8] = to_float(word_at(fragment_a, i));
        }
        for (int i = 0; i < 4; i++) {
            b[2 * t + i % 2 + i / 2 * 8][g] = to_float(word_at(fragment_b, i));
        }
    });
    double products[16][8] = {};
    for (int row = 0; row < 16; row++) {
        for (int k = 0; k < 16; k++) {
            for (int column = 0; column < 8; column++) {
                products[row][column] += a[row][k] * b[k][column];
            }
        }
    }
    for_each_lane(warp, mask, [&](int lane, Operands& o) {
        float* const d = static_cast<float*>(o.out);
        for (int i = 0; i < 4; i++) {
            d[i] = float(d[i] + products[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
        }
    });
}

void complete_mma_8(Warp& warp, unsigned mask) {
    int a[16][32], b[32][8];
    const auto byte_at = [](const uint32_t* words, int i) { return int(int8_t(words[i / 4] >> (8 * (i % 4)))); };
    for_each_lane(warp, mask, [&](int lane, Operands& o) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 16; i++) {
            a[g + (i / 4 % 2) * 8][4 * t + i % 4 + i / 8 * 16] = byte_at(static_cast<const uint32_t*>(o.in[0]), i);
        }
        for (int i = 0; i < 8; i++) {
            b[4 * t + i % 4 + i / 4 * 16][g] = byte_at(static_cast<const uint32_t*>(o.in[1]), i);
        }
    });
    for_each_lane(warp, mask, [&](int lane, Operands& o) {
        int* const d = static_cast<int*>(o.out);
        for (int i = 0; i < 4; i++) {
            unsigned sum = unsigned(d[i]);
            for (int k = 0; k < 32; k++) {
                sum += unsigned(a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2]);
            }
            d[i] = int(sum);
        }
    });
}

const Exchange MMA_BF16 = {"mma_m16n8k16_bf16", complete_mma_16<bf16_to_float>};
const Exchange MMA_F16 = {"mma_m16n8k16_f16", complete_mma_16<f16_to_float>};
const Exchange MMA_S8 = {"mma_m16n8k32_s8", complete_mma_8};

// `num_matrices` is in `operand`.
template <bool IS_TRANSPOSED>
void complete_ldmatrix(Warp& warp, unsigned mask) {
    uint16_t rows[LANES][8];
    const int num_matrices = int(warp.lanes[0]->operands->operand);
    for (int lane = 0; lane < 8 * num_matrices; lane++) {
        const void* const address = warp.lanes[lane]->operands->in[0];
        if (reinterpret_cast<uintptr_t>(address) % 16) {
            report(*warp.lanes[lane], "ldmatrix of a row that is not aligned to 16 bytes");
            return;
        }
        memcpy(rows[lane], address, 16);
    }
    for_each_lane(warp, mask, [&](int lane, Operands& o) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < num_matrices; i++) {
            const auto at = [&](int k) { return IS_TRANSPOSED ? rows[8 * i + k][g] : rows[8 * i + g][k]; };
            static_cast<uint32_t*>(o.out)[i] = at(2 * t) | uint32_t(at(2 * t + 1)) << 16;
        }
    });
}

const Exchange LDMATRIX = {"ldmatrix", complete_ldmatrix<false>};
const Exchange LDMATRIX_TRANS = {"ldmatrix.trans", complete_ldmatrix<true>};

uint64_t exchange_value(const Exchange& what, unsigned mask, uint64_t value) {
    Operands operands;
    operands.value = value;
    exchange(what, mask, operands);
    return operands.value;
}

void exchange_fragments(const Exchange& what, void* d, const void* a, const void* b) {
    Operands operands;
    operands.in[0] = a;
    operands.in[1] = b;
    operands.out = d;
    exchange(what, ~0u, operands);
}

void exchange_rows(const Exchange& what, uint32_t* r, int num_matrices, const void* row) {
    Operands operands;
    operands.operand = unsigned(num_matrices);
    operands.in[0] = row;
    operands.out = r;
    exchange(what, ~0u, operands);
}

}  // namespace

void warp_barrier(unsigned mask) { exchange_value(SYNC_WARP, mask, 0); }
unsigned ballot(unsigned mask, int predicate) { return unsigned(exchange_value(BALLOT, mask, predicate != 0)); }
int any(unsigned mask, int predicate) { return int(exchange_value(ANY, mask, predicate != 0)); }
int all(unsigned mask, int predicate) { return int(exchange_value(ALL, mask, predicate != 0)); }
unsigned match_any(unsigned mask, uint64_t value) { return unsigned(exchange_value(MATCH_ANY, mask, value)); }

unsigned reduce(Reduce kind, unsigned mask, unsigned value) {
    return unsigned(exchange_value(REDUCTIONS[int(kind)], mask, value));
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned operand, int width) {
    Operands operands;
    operands.value = value;
    operands.operand = operand;
    operands.width = width;
    exchange(SHUFFLES[int(kind)], mask, operands);
    return operands.value;
}

void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) { exchange_fragments(MMA_BF16, d, a, b); }
void mma_f16(float* d, const uint32_t* a, const uint32_t* b) { exchange_fragments(MMA_F16, d, a, b); }
void mma_s8(int* d, const uint32_t* a, const uint32_t* b) { exchange_fragments(MMA_S8, d, a, b); }

void ldmatrix(uint32_t* r, int num_matrices, const void* row) { exchange_rows(LDMATRIX, r, num_matrices, row); }
void ldmatrix_trans(uint32_t* r, int num_matrices, const void* row) {
    exchange_rows(LDMATRIX_TRANS, r, num_matrices, row);
}

}  // namespace emulation
