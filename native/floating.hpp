// Floating point (fixed levels, scales of low rank, vector codebooks): eight neighbouring columns at a time are decoded
// to float32 and multiplied by the inputs.
#pragma once
#include "inputs.hpp"

namespace lorq {

struct Tables {  // levels of up to 16 codes; with fewer than eight they repeat, so that no index needs a mask
    F low, high;
    I steps;  // by which eight codes in one word are shifted
    explicit Tables(const Weight& w) {
        uint32_t shifts[8];
        for (int i = 0; i < 8; ++i) shifts[i] = uint32_t(w.bits * i % 32);
        steps = load_i(shifts);
        float t[16] = {};
        for (int i = 0; i < 16 && w.bits <= 4; ++i) {
            const int code = i % (1 << w.bits);
            t[i] = w.levels ? w.levels[code] : float(code - (1 << (w.bits - 1)));
        }
        low = load_f(t);
        high = load_f(t + 8);
    }
};

// The bits of eight codes of at most four bits, or of as many bits of wider ones. The sizes are constants, so that no
// function is called for so little.
inline uint32_t eight_bits(const uint8_t* row, int64_t column, int bits) {
    const uint8_t* p = row + column / 8 * bits;
    uint32_t word = 0;
    if (bits == 4) std::memcpy(&word, p, 4);
    else if (bits == 2) std::memcpy(&word, p, 2);
    else if (bits == 1) word = *p;
    else word = p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16;
    return word;
}

// Where the entries of a weight's codebook begin.
inline const int8_t* entries_at(const Weight& w, int64_t row, int64_t column) {
    if (w.vector == 1) return nullptr;
    const int64_t tile = row / w.codebook_rows * (w.in / w.codebook_columns) + column / w.codebook_columns;
    return w.codebook + (tile << (w.bits * w.vector)) * w.vector;
}

// What the codes of eight columns of a row stand for, before the scale. VECTOR weights share a code.
template <int VECTOR>
LORQ_INLINE F eight_values(const Weight& w, const Tables& t, const uint8_t* codes_of_row, const int8_t* entries, int64_t column) {
    if constexpr (VECTOR > 1) {
        const uint32_t word = eight_bits(codes_of_row, column, w.bits);
        const int width = w.bits * VECTOR;
        int8_t values[8];
        LORQ_UNROLL for (int k = 0; k < 8 / VECTOR; ++k)
            std::memcpy(values + VECTOR * k, entries + VECTOR * int64_t(word >> (k * width) & ((1u << width) - 1)), VECTOR);
        return load_bytes(values);
    }
    if (w.bits == 8) return add(to_float(load_ubytes(codes_of_row + column)), spread_f(-128.0f));
    if (w.bits == 6) {
        uint64_t word = 0;
        uint8_t codes[8];
        std::memcpy(&word, codes_of_row + column / 8 * 6, 6);
        LORQ_UNROLL for (int k = 0; k < 8; ++k) codes[k] = uint8_t(word >> 6 * k & 63);
        return add(to_float(load_ubytes(codes)), spread_f(-32.0f));
    }
    const I codes = shift_each(spread_i(eight_bits(codes_of_row, column, w.bits)), t.steps);
    if (w.bits == 4) return pick16(t.low, t.high, codes);
    return pick(t.low, codes);
}

inline float scale_at(const Weight& w, int64_t row, int64_t column) {
    const float scale = from_half(w.scale[row * w.groups() + column / w.group_size]);
    if (w.vector == 1) return scale;
    const int64_t tile = row / w.codebook_rows * (w.in / w.codebook_columns) + column / w.codebook_columns;
    return scale * from_half(w.codebook_scale[tile]);
}

inline int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

// Columns over which a row's scale is one number and its codebook one.
inline int64_t scale_run(const Weight& w) {
    return w.vector > 1 ? common_divisor(w.group_size, w.codebook_columns) : w.group_size;
}

template <int VECTOR>
float multiply_row(const Weight& w, const Tables& t, const Inputs& x, int64_t row) {
    F total = zero_f();
    const int64_t run = scale_run(w);
    for (int64_t start = 0; start < w.in; start += run) {
        F part = zero_f();
        const int8_t* entries = entries_at(w, row, start);
        for (int64_t j = start; j < start + run; j += 8)
            part = fma(eight_values<VECTOR>(w, t, w.row(row), entries, j), load_f(&x.x[size_t(j)]), part);
        total = fma(part, spread_f(scale_at(w, row, start)), total);
    }
    return sum(total);
}

// `eight_values` of single codes of SIDE rows.
LORQ_INLINE WideF side_values(const Weight& w, const Tables& t, const uint8_t* const (&rows)[SIDE], int64_t column) {
    if (w.bits == 8) {
        F values[SIDE];
        LORQ_UNROLL for (int s = 0; s < SIDE; ++s) values[s] = eight_values<1>(w, t, rows[s], nullptr, column);
        return beside(values);
    }
    I words[SIDE], steps[SIDE];
    LORQ_UNROLL for (int s = 0; s < SIDE; ++s) words[s] = spread_i(eight_bits(rows[s], column, w.bits)), steps[s] = t.steps;
    return pick16(t.low, t.high, shift_each(beside(words), beside(steps)));
}

// Scales of 8 N columns of SIDE rows, sum over k of left_k right_kj, where `mixed` has the right factor as `mix` lays it
// out. The rows of `left` lie `pitch` apart.
template <int N>
LORQ_INLINE void scales_of(const float* left, int64_t pitch, int rank, const float* mixed, WideF (&to)[N]) {
    LORQ_UNROLL for (int n = 0; n < N; ++n) to[n] = zero_rows();
    for (int k = 0; k < rank; ++k) {
        F own[SIDE];
        LORQ_UNROLL for (int s = 0; s < SIDE; ++s) own[s] = spread_f(left[s * pitch + k]);
        const WideF l = beside(own);
        LORQ_UNROLL for (int n = 0; n < N; ++n) to[n] = fma(l, each_row(mixed + 8 * (int64_t(n) * rank + k)), to[n]);
    }
}

// SIDE rows from one on; a row alone is there SIDE times.
LORQ_INLINE void rows_from(const Weight& w, int64_t row, int64_t count, const uint8_t* (&rows)[SIDE]) {
    LORQ_UNROLL for (int s = 0; s < SIDE; ++s) rows[s] = w.row(row + std::min<int64_t>(s, count - 1));
}

// 8 N columns of rows whose scale is a product: sum over j of level_j sum over k of left_k (right_kj x_j), the inner one
// first. All rows of a block take the same columns before the next, so that those stay in the first-level cache.
template <int N>
void add_scaled(const Weight& w, const Tables& t, const float* mixed, int64_t j, int64_t row, int64_t count, const float* left, WideF* total) {
    for (int64_t r = 0; r < count; r += SIDE) {
        WideF scaled[N];
        const uint8_t* rows[SIDE];
        rows_from(w, row + r, count - r, rows);
        scales_of<N>(left + r * w.scale_rank, w.scale_rank, w.scale_rank, mixed + j * w.scale_rank, scaled);
        LORQ_UNROLL for (int n = 0; n < N; ++n)
            total[r / SIDE] = fma(side_values(w, t, rows, j + 8 * n), scaled[n], total[r / SIDE]);
    }
}

constexpr int64_t BLOCK = 16;  // rows that a thread takes at once

// `left` has room for one row more than BLOCK.
inline void multiply_scaled_rows(const Weight& w, const Tables& t, const float* mixed, int64_t row, int64_t count, float* left, float* y) {
    WideF total[BLOCK / SIDE];
    for (WideF& sums : total) sums = zero_rows();
    for (int64_t r = 0; r < count; ++r) read_row(w.scale_left, row + r, w.scale_rank, left + r * w.scale_rank);
    int64_t j = 0;
    for (; j + 64 <= w.in; j += 64) add_scaled<8>(w, t, mixed, j, row, count, left, total);
    for (; j < w.in; j += 8) add_scaled<1>(w, t, mixed, j, row, count, left, total);
    for (int64_t r = 0; r < count; ++r) y[r] = sum(row_of(total[r / SIDE], r % SIDE));
}

// The right factor of the scale times x (or alone), eight columns of each rank next to each other.
inline void mix(const Weight& w, const float* x, std::vector<float>& to) {
    std::vector<float> right(size_t(w.in));
    to.resize(size_t(w.in * w.scale_rank));
    for (int k = 0; k < w.scale_rank; ++k) {
        read_row(w.scale_right, k, w.in, right.data());
        for (int64_t j = 0; j < w.in; j += 8) {
            const F part = load_f(&right[j]);
            store_f(&to[j * w.scale_rank + 8 * k], x ? times(part, load_f(x + j)) : part);
        }
    }
}

}  // namespace lorq
