// Whole numbers (integer codes of 2, 3, 4, 6, 8 bits, a scale for each group). Lane l of a chunk of eight holds the codes of
// neighbouring columns; a right shift and a mask bring one code into each byte, and one instruction multiplies 32 of them
// (64 of two rows, where a register has 512 bits) by 32 bytes of the inputs and adds pairs or fours. A lane's sums are of
// its own columns alone; at the end of a group they become float32 and are multiplied by the scale. Codes count from the
// middle of the grid, since the sums begin below zero; what zero points are off it is taken away once a group, as
// scale * (zero - middle) * (sum of the inputs).
#pragma once
#include "inputs.hpp"

namespace lorq {

// The codes of a position, a byte each; `part` 1 is the upper half of an 8-bit code.
template <int BITS, int P, int PART>
LORQ_INLINE Wide code_at(Wide v) {
    constexpr uint32_t mask = (BITS == 8 ? 15 : (1 << BITS) - 1) * 0x01010101u;
    constexpr int by = BITS == 8 ? 4 * PART : BITS * P;
    if constexpr (by == 0) return both(v, each_row(mask));
    else return both(shift_right<by>(v), each_row(mask));
}

// A chunk of SIDE rows.
template <int BITS>
LORQ_INLINE Wide load_chunk(const uint8_t* from, int64_t row_bytes) {
    I parts[SIDE];
    LORQ_UNROLL for (int s = 0; s < SIDE; ++s) parts[s] = Lane<BITS>::of_24_bits ? load_threes(from + s * row_bytes) : load_i(from + s * row_bytes);
    const Wide v = beside(parts);
    if constexpr (Lane<BITS>::of_24_bits) return spread_threes(v);  // two codes of 3 bits to a byte, or one of 6
    else return v;
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

    // The steps of a unit in each lane of SIDE rows, whose own lie `pitch` apart.
    LORQ_INLINE WideF lanes(const float* steps, int64_t pitch, int64_t unit) const {
        F parts[SIDE];
        LORQ_UNROLL for (int s = 0; s < SIDE; ++s)
            parts[s] = groups == 1 ? spread_f(steps[s * pitch + unit]) : pick(load_f(steps + s * pitch + unit * groups), which);
        return beside(parts);
    }
};

// scale * input step of each group of a row; returns what its zero points take away.
template <int BITS>
inline float read_groups(const Weight& w, const Inputs& x, int64_t row, float* steps) {
    const int64_t groups = w.groups();
    const int64_t word = row * BITS / 32;
    const int shift = int(row * BITS % 32);
    const uint32_t* end = w.zero + (w.out * BITS + 31) / 32 * groups;
    F taken = zero_f();
    for (int64_t g = 0; g < groups; g += 8) {
        const int n = int(std::min<int64_t>(8, groups - g));
        const F scale = load_half(w.scale + row * groups + g, n, w.scale + w.out * groups);
        store_f(steps + g, times(scale, load_f(&x.step[size_t(g)])));
        if (!w.zero) continue;
        I zero = shift_right(load_i(w.zero + word * groups + g, n, end), shift);
        if (shift + BITS > 32) zero = either(zero, shift_left(load_i(w.zero + (word + 1) * groups + g, n, end), 32 - shift));
        const F off = add(to_float(both(zero, spread_i((1u << BITS) - 1))), spread_f(-float(1 << (BITS - 1))));
        taken = fma(times(scale, off), load_f(&x.total[size_t(g)]), taken);
    }
    return w.zero ? sum(taken) : 0.0f;
}

// Sums of one run of chunks, for a few rows: of each part of a code times each piece of an input. All loops over them are
// unrolled, so that they live in registers.
template <int BITS, int PIECES, int ROWS>
struct Sums {
    static constexpr int P = Lane<BITS>::positions, H = Lane<BITS>::parts, R = ROWS / SIDE;
    Wide acc[R][H][PIECES];

    LORQ_INLINE void begin(const int32_t* start) {
        LORQ_UNROLL for (int r = 0; r < R; ++r)
            LORQ_UNROLL for (int h = 0; h < H; ++h)
                LORQ_UNROLL for (int k = 0; k < PIECES; ++k) acc[r][h][k] = each_row(start + 8 * (h * PIECES + k));
    }

    // A chunk of each row.
    LORQ_INLINE void add(const uint8_t* from, int64_t row_bytes, const int8_t* pieces) {
        Wide v[R];
        LORQ_UNROLL for (int r = 0; r < R; ++r) v[r] = load_chunk<BITS>(from + SIDE * r * row_bytes, row_bytes);
        at<0>(v, pieces);
        if constexpr (P > 1) at<1>(v, pieces + 32 * PIECES);
        if constexpr (P > 2) at<2>(v, pieces + 64 * PIECES), at<3>(v, pieces + 96 * PIECES);
    }

    template <int POSITION>
    LORQ_INLINE void at(const Wide (&v)[R], const int8_t* pieces) {
        Wide part[PIECES];
        LORQ_UNROLL for (int k = 0; k < PIECES; ++k) part[k] = each_row(pieces + 32 * k);
        LORQ_UNROLL for (int r = 0; r < R; ++r) {
            const Wide code = code_at<BITS, POSITION, 0>(v[r]);
            LORQ_UNROLL for (int k = 0; k < PIECES; ++k) acc[r][0][k] = dot(acc[r][0][k], code, part[k]);
            if constexpr (H == 2) {
                const Wide upper = code_at<BITS, POSITION, 1>(v[r]);
                LORQ_UNROLL for (int k = 0; k < PIECES; ++k) acc[r][H - 1][k] = dot(acc[r][H - 1][k], upper, part[k]);
            }
        }
    }

    LORQ_INLINE WideF of(int r) const {
        Wide low = widen<0>(acc[r][0][0]);
        if constexpr (H == 2) low = plus(low, widen<4>(acc[r][1][0]));
        if constexpr (PIECES > 1) low = plus(low, widen<8>(acc[r][0][1]));
        if constexpr (PIECES > 1 && H == 2) low = plus(low, widen<12>(acc[r][1][1]));
        if constexpr (PIECES < 3) return to_float(low);
        Wide high = widen<0>(acc[r][0][PIECES - 1]);
        if constexpr (H == 2) high = plus(high, widen<4>(acc[r][1][PIECES - 1]));
        return lorq::add(times(to_float(high), 65536.0f), to_float(low));
    }
};

// The left factor's rows times z, added to the lanes of each row; what is left of a rank that is no multiple of eight
// is taken from what zero points take away.
template <Type TYPE, int ROWS>
void add_left(const Weight& w, const float* z, int64_t row, int64_t stride, WideF (&total)[ROWS / SIDE], float (&taken)[ROWS]) {
    int64_t k = 0;
    for (; k + 8 <= w.rank; k += 8) {
        const WideF part = each_row(z + k);
        LORQ_UNROLL for (int r = 0; r < ROWS / SIDE; ++r) {
            F parts[SIDE];
            LORQ_UNROLL for (int s = 0; s < SIDE; ++s)
                parts[s] = load_eight<TYPE>(w.left.data, (row + stride * (SIDE * r + s)) * w.rank + k);
            total[r] = fma(beside(parts), part, total[r]);
        }
    }
    for (; k < w.rank; ++k)
        for (int r = 0; r < ROWS; ++r) taken[r] -= load_value(w.left.data, (row + stride * r) * w.rank + k, TYPE) * z[k];
}

// Rows row, row + stride, ... of which those from `first` on go into y; a stride of 0 is one row, ROWS times. `z` is what the
// right factor makes of the inputs: the left factor's rows are added to the lanes before these are summed.
template <int BITS, int PIECES, int ROWS>
void multiply_rows(const Weight& w, const Inputs& x, const float* z, const Units<BITS>& units, int64_t row, int64_t stride,
                   int64_t first, float* steps, float* y) {
    constexpr int64_t P = Lane<BITS>::positions, H = Lane<BITS>::parts, SIZE = 8 * Lane<BITS>::bytes, REACH = Lane<BITS>::of_24_bits ? 28 : 32;
    const int64_t row_bytes = 4 * w.words, pitch = w.groups() + 16;
    const int64_t last_row = (w.out - row - stride * (ROWS - 1)) * row_bytes;  // from there to the end
    const int64_t chunks = (w.in + 8 * Lane<BITS>::columns - 1) / (8 * Lane<BITS>::columns);
    // Chunks that can be read in place. What follows a row in its last one meets inputs that are 0.
    const int64_t whole = last_row < REACH ? 0 : std::min(chunks, (last_row - REACH) / SIZE + 1);
    const uint8_t* from = w.row(row);
    float taken[ROWS];
    WideF total[ROWS / SIDE];
    for (int r = 0; r < ROWS; ++r) taken[r] = read_groups<BITS>(w, x, row + stride * r, steps + r * pitch);
    LORQ_UNROLL for (int r = 0; r < ROWS / SIDE; ++r) total[r] = zero_rows();
    const int32_t* start = x.start.data();
    const int8_t* pieces = x.pieces.data();
    for (int64_t c = 0, unit = 0; unit < units.count; ++unit)
        for (int64_t left = units.chunks; left > 0;) {
            Sums<BITS, PIECES, ROWS> sums;
            sums.begin(start);
            start += 8 * H * PIECES;
            int64_t n = std::min(left, Lane<BITS>::fit);
            left -= n;
            for (; n && c < whole; --n, ++c, pieces += 32 * P * PIECES) {
                // Rows are too short for the processor to see a stream in each. A line has two chunks: every other row.
                const uint8_t* ahead = from + (ROWS + (c & 1)) * row_bytes + (c & ~int64_t(1)) * SIZE;
                LORQ_UNROLL for (int r = 0; r < ROWS; r += 2) prefetch(ahead + r * row_bytes);
                sums.add(from + c * SIZE, stride * row_bytes, pieces);
            }
            for (; n; --n, ++c, pieces += 32 * P * PIECES) {
                uint8_t rest[ROWS][32] = {};
                for (int r = 0; r < ROWS; ++r)
                    std::memcpy(rest[r], from + stride * r * row_bytes + c * SIZE, size_t(std::min(SIZE, row_bytes - c * SIZE)));
                sums.add(rest[0], 32, pieces);
            }
            LORQ_UNROLL for (int r = 0; r < ROWS / SIDE; ++r)
                total[r] = fma(sums.of(r), units.lanes(steps + SIDE * r * pitch, pitch, unit), total[r]);
        }
    if (w.rank) for_type(w.left.type, [&](auto type) { add_left<type.value, ROWS>(w, z, row, stride, total, taken); });
    LORQ_UNROLL for (int r = 0; r < ROWS; ++r)
        if (r >= first) y[r] = sum(row_of(total[r / SIDE], r % SIDE)) - taken[r];
}

}  // namespace lorq
