// A token's input as the kernels read it: in whole numbers, laid out like the codes, and in float32.
#pragma once
#include <algorithm>
#include <vector>

#include "simd.hpp"
#include "weight.hpp"

namespace lorq {

// How codes of a width lie in a lane: `positions` in each 16-bit half, the high half having the later columns.
template <int BITS>
struct Lane {
    static constexpr int positions = BITS == 2 ? 8 : BITS == 8 ? 2 : 4;
    static constexpr int columns = 2 * positions;
    static constexpr int bytes = BITS == 3 ? 3 : 4;
    // Chunks whose sums fit 31 bits: all positions of both halves, the largest code, 2^15.
    static constexpr int64_t fit = (int64_t(1) << 31) / (int64_t(2 * positions) * ((1 << BITS) - 1) << 15) - 1;
};

// Chunks that are summed before a scale is applied: a group's, or fewer where they would not fit, or one of several groups.
template <int BITS>
int64_t summed_chunks(int64_t group_size, int64_t left_in_group) {
    return std::min(group_size / Lane<BITS>::columns >= 8 ? left_in_group : 1, Lane<BITS>::fit);
}

inline float load_value(const void* p, int64_t i, Type type) {
    switch (type) {
        case Type::f32: return static_cast<const float*>(p)[i];
        case Type::bf16: return from_bfloat(static_cast<const uint16_t*>(p)[i]);
        case Type::f16: return from_half(static_cast<const uint16_t*>(p)[i]);
        case Type::i8: return static_cast<const int8_t*>(p)[i];
        default: {  // e4m3: 4 bits of exponent, bias 7, no infinity
            const uint8_t b = static_cast<const uint8_t*>(p)[i];
            const int exponent = b >> 3 & 15, mantissa = b & 7;
            if ((b & 0x7f) == 0x7f) return NAN;
            const float m = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
            return b & 0x80 ? -m : m;
        }
    }
}

inline void store_value(void* p, int64_t i, float value, Type type) {
    if (type == Type::f32) static_cast<float*>(p)[i] = value;
    else static_cast<uint16_t*>(p)[i] = type == Type::bf16 ? to_bfloat(value) : to_half(value);
}

inline F load_eight(const void* p, int64_t i, Type type) {
    if (type == Type::f32) return load_f(static_cast<const float*>(p) + i);
    if (type == Type::f16) return load_half(static_cast<const uint16_t*>(p) + i);
    if (type == Type::bf16) return load_bfloat(static_cast<const uint16_t*>(p) + i);
    if (type == Type::i8) return load_bytes(static_cast<const int8_t*>(p) + i);
    float v[8];
    for (int k = 0; k < 8; ++k) v[k] = load_value(p, i + k, type);
    return load_f(v);
}

// Row `row` of a factor as float32, not scaled.
inline void read_row(const Factor& f, int64_t row, int64_t columns, float* to) {
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) store_f(to + i, load_eight(f.data, row * columns + i, f.type));
    for (; i < columns; ++i) to[i] = load_value(f.data, row * columns + i, f.type);
}

inline float dot_row(const Factor& f, int64_t row, const float* x, int64_t columns) {
    F acc = zero_f();
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) acc = fma(load_eight(f.data, row * columns + i, f.type), load_f(x + i), acc);
    float rest = 0;
    for (; i < columns; ++i) rest += load_value(f.data, row * columns + i, f.type) * x[i];
    return sum(acc) + rest;
}

// x = step (high + low 2^-15) within 2^-31 of the group's largest entry, or within 2^-16 without `low`. The step is a
// power of two, so that dividing by it rounds nothing.
struct Inputs {
    std::vector<float> x;            // padded with zeros to whole chunks
    std::vector<int16_t> high, low;  // in the order of the codes' positions
    std::vector<int32_t> high_start, low_start;  // what makes codes c sum up as c - 2^(bits-1), for each run of chunks
    std::vector<float> step, total;  // of each group; padded
    std::vector<float> mixed;        // x times each row of the scale's right factor
    std::vector<int32_t> whole, rest;  // high and low in the order of the columns
};

template <int BITS>
void place(const int32_t* from, int64_t in, int16_t* to) {
    constexpr int P = Lane<BITS>::positions, C = Lane<BITS>::columns;
    const int64_t chunks = (in + 8 * C - 1) / (8 * C);
    for (int64_t c = 0; c < chunks; ++c, to += 16 * P)
        for (int l = 0; l < 8; ++l, from += C)
            for (int p = 0; p < P; ++p) {
                to[16 * p + 2 * l] = int16_t(from[p]);
                to[16 * p + 2 * l + 1] = int16_t(from[P + p]);
            }
}

// Where the sums over the chunks of each run begin: at -2^(bits-1) times the sum of a lane's inputs.
template <int BITS>
void begin_sums(const Weight& w, const std::vector<int16_t>& placed, std::vector<int32_t>& to) {
    constexpr int P = Lane<BITS>::positions;
    constexpr uint32_t middle = uint16_t(-(1 << (BITS - 1)));
    const int64_t chunks = (w.in + 8 * Lane<BITS>::columns - 1) / (8 * Lane<BITS>::columns);
    const int64_t in_group = std::max<int64_t>(w.group_size / Lane<BITS>::columns / 8, 1);
    to.resize(size_t(8 * chunks));
    int64_t run = 0;
    for (int64_t c = 0; c < chunks; ++run) {
        I sum = zero_i();
        const int64_t stop = std::min(c + summed_chunks<BITS>(w.group_size, in_group - c % in_group), chunks);
        for (; c < stop; ++c)
            for (int p = 0; p < P; ++p) sum = dot(sum, spread_i(middle | middle << 16), load_i(&placed[size_t((c * P + p) * 16)]));
        store_i(&to[size_t(8 * run)], sum);
    }
}

template <int BITS>
void place_all(const Weight& w, const std::vector<int32_t>& from, std::vector<int16_t>& to, std::vector<int32_t>& start) {
    to.resize(from.size());
    place<BITS>(from.data(), w.in, to.data());
    begin_sums<BITS>(w, to, start);
}

inline void place(const Weight& w, const std::vector<int32_t>& from, std::vector<int16_t>& to, std::vector<int32_t>& start) {
    if (w.bits == 2) place_all<2>(w, from, to, start);
    else if (w.bits == 3) place_all<3>(w, from, to, start);
    else if (w.bits == 4) place_all<4>(w, from, to, start);
    else place_all<8>(w, from, to, start);
}

// False where an entry is not finite, or a whole group so small that its step's inverse would not be.
inline bool read_inputs(const Weight& w, const void* x, int64_t token, Type type, bool whole, bool exact, Inputs& to) {
    const int64_t padded = (w.in + 127) / 128 * 128, groups = w.groups();
    to.x.assign(padded, 0.0f);
    read_row(Factor{x, type, nullptr}, token, w.in, to.x.data());
    F check = zero_f();
    for (int64_t i = 0; i < padded; i += 8) check = fma(load_f(&to.x[i]), zero_f(), check);
    if (!(sum(check) == 0.0f)) return false;
    if (!whole) return true;
    to.whole.assign(padded, 0);
    if (exact) to.rest.assign(padded, 0);
    to.step.assign(groups + 16, 0.0f);
    to.total.assign(groups + 16, 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
        const float* v = &to.x[g * w.group_size];
        F largest = zero_f(), total = zero_f();
        for (int64_t i = 0; i < w.group_size; i += 8) {
            largest = larger(largest, size(load_f(v + i)));
            total = add(total, load_f(v + i));
        }
        int exponent;
        std::frexp(most(largest), &exponent);  // the largest is below 2^exponent
        exponent -= 15;
        if (exponent < -120) {
            if (most(largest) > 0) return false;
            exponent = 0;
        }
        to.step[g] = std::ldexp(1.0f, exponent);
        to.total[g] = sum(total);
        const F inverse = spread_f(std::ldexp(1.0f, -exponent)), top = spread_f(32767.0f);
        for (int64_t i = 0; i < w.group_size; i += 8) {
            const F scaled = times(load_f(v + i), inverse);
            const I whole_part = nearest(smaller(scaled, top));
            store_i(&to.whole[g * w.group_size + i], whole_part);
            if (!exact) continue;
            const F rest = times(minus(scaled, to_float(whole_part)), spread_f(32768.0f));
            store_i(&to.rest[g * w.group_size + i], nearest(smaller(rest, top)));
        }
    }
    place(w, to.whole, to.high, to.high_start);
    if (exact) place(w, to.rest, to.low, to.low_start);
    return true;
}

}  // namespace lorq
