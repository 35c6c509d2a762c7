// Whole numbers (integer codes of 2, 3, 4, 8 bits, a scale for each group). Lane l of a chunk of eight holds the codes of
// neighbouring columns; a right shift and a mask bring one code into each byte, and one instruction multiplies 32 of them
// by 32 bytes of the inputs and adds pairs (or fours), another adds those up: 6 instructions for 32 weights and inputs of
// two bytes, 4 for inputs of one. A lane's sums are of its own columns alone; at the end of a group they become float32 and
// are multiplied by the scale. Codes count from the middle of the grid, since the sums begin below zero; what zero points
// are off it is taken away once a group, as scale * (zero - middle) * (sum of the inputs).
#pragma once
#include "inputs.hpp"

namespace lorq {

// The codes of a position, a byte each; `part` 1 is the upper half of an 8-bit code.
template <int BITS>
inline I code_at(I v, int p, int part) {  // constants after unrolling
    constexpr uint32_t mask = (BITS == 8 ? 15 : (1 << BITS) - 1) * 0x01010101u;
    return both(shift_right(v, BITS == 8 ? 4 * part : BITS * p), spread_i(mask));
}

template <int BITS>
inline I load_chunk(const uint8_t* p) {
    if constexpr (BITS == 3) return load_threes(p);
    else return load_i(p);
}

// How groups lie in chunks: a unit is a group of whole chunks, or a chunk of several groups.
template <int BITS>
struct Units {
    int64_t count, chunks;  // of a row; chunks of a unit
    int groups;             // of a unit
    I which;                // of these, each lane's

    explicit Units(const Weight& w) {
        const int64_t lanes = w.group_size / Lane<BITS>::columns;  // of a group: 1, 2, 4, or whole chunks
        groups = lanes >= 8 ? 1 : int(8 / lanes);
        chunks = std::max<int64_t>(1, lanes / 8);
        count = (w.groups() + groups - 1) / groups;
        which = shift_right(load_i((const uint32_t[8]){0, 1, 2, 3, 4, 5, 6, 7}), lanes >= 8 ? 3 : lanes == 4 ? 2 : lanes == 2 ? 1 : 0);
    }
};

// The steps (scale * input step) of a row, for each lane of each unit, `pitch` apart; returns what its zero points take away.
template <int BITS>
inline float read_groups(const Weight& w, const Inputs& x, const Units<BITS>& units, int64_t row, int64_t pitch, float* steps) {
    const int64_t groups = w.groups();
    const int64_t word = row * BITS / 32;
    const int shift = int(row * BITS % 32);
    F taken = zero_f();
    for (int64_t g = 0; g < groups; g += 8) {
        uint16_t halves[8] = {};
        uint32_t zeros[8] = {}, more[8] = {};
        const size_t n = size_t(std::min<int64_t>(8, groups - g));
        F scale;
        I zero = zero_i();
        if (n == 8) {
            scale = load_half(w.scale + row * groups + g);
            if (w.zero) {
                zero = shift_right(load_i(w.zero + word * groups + g), shift);
                if (shift + BITS > 32) zero = either(zero, shift_left(load_i(w.zero + (word + 1) * groups + g), 32 - shift));
            }
        } else {
            std::memcpy(halves, w.scale + row * groups + g, n * 2);
            scale = load_half(halves);
            if (w.zero) {
                std::memcpy(zeros, w.zero + word * groups + g, n * 4);
                zero = shift_right(load_i(zeros), shift);
                if (shift + BITS > 32) {
                    std::memcpy(more, w.zero + (word + 1) * groups + g, n * 4);
                    zero = either(zero, shift_left(load_i(more), 32 - shift));
                }
            }
        }
        if (w.zero) {
            const F shift = add(to_float(both(zero, spread_i((1u << BITS) - 1))), spread_f(-float(1 << (BITS - 1))));
            taken = fma(times(scale, shift), load_f(&x.total[size_t(g)]), taken);
        }
        const F step = times(scale, load_f(&x.step[size_t(g)]));
        for (int i = 0; i < 8; i += units.groups, steps += pitch) store_f(steps, pick(step, plus(units.which, spread_i(uint32_t(i)))));
    }
    return sum(taken);
}

// Sums of one run of chunks, for a few rows: of each part of a code times each piece of an input. All loops over them are
// unrolled, so that they live in registers.
template <int BITS, int PIECES, int ROWS>
struct Sums {
    static constexpr int P = Lane<BITS>::positions, H = Lane<BITS>::parts;
    I acc[ROWS][H][PIECES];

    LORQ_INLINE void begin(const int32_t* start) {
        LORQ_UNROLL for (int r = 0; r < ROWS; ++r)
            LORQ_UNROLL for (int h = 0; h < H; ++h)
                LORQ_UNROLL for (int k = 0; k < PIECES; ++k) acc[r][h][k] = load_i(start + 8 * (h * PIECES + k));
    }

    // The chunk at `from` of each row.
    LORQ_INLINE void add(const uint8_t* const (&from)[ROWS], int64_t offset, const int8_t* pieces) {
        I v[ROWS];
        LORQ_UNROLL for (int r = 0; r < ROWS; ++r) v[r] = load_chunk<BITS>(from[r] + offset);
        LORQ_UNROLL for (int p = 0; p < P; ++p) {
            I part[PIECES];
            LORQ_UNROLL for (int k = 0; k < PIECES; ++k) part[k] = load_i(pieces + 32 * (p * PIECES + k));
            LORQ_UNROLL for (int r = 0; r < ROWS; ++r)
                LORQ_UNROLL for (int h = 0; h < H; ++h) {
                    const I code = code_at<BITS>(v[r], p, h);
                    LORQ_UNROLL for (int k = 0; k < PIECES; ++k) acc[r][h][k] = dot(acc[r][h][k], code, part[k]);
                }
        }
    }

    LORQ_INLINE F of(int r) const {
        I low = widen<0>(acc[r][0][0]);
        if constexpr (H == 2) low = plus(low, widen<4>(acc[r][1][0]));
        if constexpr (PIECES > 1) low = plus(low, widen<8>(acc[r][0][1]));
        if constexpr (PIECES > 1 && H == 2) low = plus(low, widen<12>(acc[r][1][1]));
        if constexpr (PIECES < 3) return to_float(low);
        I high = widen<0>(acc[r][0][PIECES - 1]);
        if constexpr (H == 2) high = plus(high, widen<4>(acc[r][1][PIECES - 1]));
        return fma(to_float(high), spread_f(65536.0f), to_float(low));
    }
};

template <int BITS, int PIECES, int ROWS>
void multiply_rows(const Weight& w, const Inputs& x, const Units<BITS>& units, int64_t row, float* steps, float* y) {
    constexpr int64_t P = Lane<BITS>::positions, H = Lane<BITS>::parts, SIZE = 8 * Lane<BITS>::bytes, REACH = BITS == 3 ? 28 : 32;
    const int64_t row_bytes = 4 * w.words, last_row = (w.out - row - ROWS + 1) * row_bytes;  // from the last of these rows to the end
    const int64_t chunks = (w.in + 8 * Lane<BITS>::columns - 1) / (8 * Lane<BITS>::columns);
    // Chunks that can be read in place. What follows a row in its last one meets inputs that are 0.
    const int64_t whole = last_row < REACH ? 0 : std::min(chunks, (last_row - REACH) / SIZE + 1);
    float taken[ROWS];
    F total[ROWS];
    const uint8_t* from[ROWS];
    LORQ_UNROLL for (int r = 0; r < ROWS; ++r) {
        taken[r] = read_groups<BITS>(w, x, units, row + r, 8 * ROWS, steps + 8 * r);
        total[r] = zero_f();
        from[r] = w.row(row + r);
    }
    const int32_t* start = x.start.data();
    const int8_t* pieces = x.pieces.data();
    for (int64_t c = 0, unit = 0; unit < units.count; ++unit, steps += 8 * ROWS)
        for (int64_t left = units.chunks; left > 0;) {
            Sums<BITS, PIECES, ROWS> sums;
            sums.begin(start);
            start += 8 * H * PIECES;
            int64_t n = std::min(left, Lane<BITS>::fit);
            left -= n;
            for (; n && c < whole; --n, ++c, pieces += 32 * P * PIECES) {
                // Rows are too short for the processor to see a stream in each.
                LORQ_UNROLL for (int r = 0; r < ROWS; ++r) prefetch(from[r] + ROWS * row_bytes + c * SIZE);
                sums.add(from, c * SIZE, pieces);
            }
            for (; n; --n, ++c, pieces += 32 * P * PIECES) {
                uint8_t rest[ROWS][32] = {};
                const uint8_t* copies[ROWS];
                for (int r = 0; r < ROWS; ++r) {
                    std::memcpy(rest[r], from[r] + c * SIZE, size_t(std::min(SIZE, row_bytes - c * SIZE)));
                    copies[r] = rest[r];
                }
                sums.add(copies, 0, pieces);
            }
            LORQ_UNROLL for (int r = 0; r < ROWS; ++r) total[r] = fma(sums.of(r), load_f(steps + 8 * r), total[r]);
        }
    LORQ_UNROLL for (int r = 0; r < ROWS; ++r) y[r] = sum(total[r]) - taken[r];
}

}  // namespace lorq
