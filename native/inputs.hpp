// A token's input as the kernels read it: in whole numbers, laid out like the codes, and in float32.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "simd.hpp"
#include "weight.hpp"

namespace lorq {

// How codes of a width lie in a lane of 32 bits (24 at 3 and 6 bits): `positions` in each byte, of neighbouring columns. A code
// of 8 bits is multiplied in two parts of 4.
template <int BITS>
struct Lane {
    static constexpr int positions = BITS == 2 ? 4 : BITS >= 6 ? 1 : 2;
    static constexpr int parts = BITS == 8 ? 2 : 1;
    static constexpr int columns = 4 * positions;
    static constexpr bool of_24_bits = BITS == 3 || BITS == 6;
    static constexpr int bytes = of_24_bits ? 3 : 4;
    // Chunks whose sums of pairs fit 16 bits. They begin at -2^(bits-1) times the inputs, so that each pair moves them by
    // at most 2 * 2^(bits-1) * 128; the lower part of 8 bits begins at 0 and has 2 * 15 * 128.
    static constexpr int64_t fit = (BITS == 8 ? 8 : (1 << (8 - BITS)) - 1) / positions;
};

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

inline void store_values(void* p, int64_t i, const float* values, int64_t count, Type type) {
    if (type == Type::f32) std::memcpy(static_cast<float*>(p) + i, values, size_t(count) * 4);
    else if (type == Type::bf16) std::transform(values, values + count, static_cast<uint16_t*>(p) + i, to_bfloat);
    else std::transform(values, values + count, static_cast<uint16_t*>(p) + i, to_half);
}

inline void store_eight(void* p, int64_t i, F v, Type type) {
    if (type == Type::f32) store_f(static_cast<float*>(p) + i, v);
    else if (type == Type::bf16) store_bfloat(static_cast<uint16_t*>(p) + i, v);
    else store_half(static_cast<uint16_t*>(p) + i, v);
}

template <Type TYPE>
LORQ_INLINE F load_eight(const void* p, int64_t i) {
    if constexpr (TYPE == Type::f32) return load_f(static_cast<const float*>(p) + i);
    else if constexpr (TYPE == Type::f16) return load_half(static_cast<const uint16_t*>(p) + i);
    else if constexpr (TYPE == Type::bf16) return load_bfloat(static_cast<const uint16_t*>(p) + i);
    else if constexpr (TYPE == Type::i8) return load_bytes(static_cast<const int8_t*>(p) + i);
    else {
        float v[8];
        for (int k = 0; k < 8; ++k) v[k] = load_value(p, i + k, TYPE);
        return load_f(v);
    }
}

template <Type TYPE>
void read_row(const void* p, int64_t first, int64_t columns, float* to) {
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) store_f(to + i, load_eight<TYPE>(p, first + i));
    for (; i < columns; ++i) to[i] = load_value(p, first + i, TYPE);
}

template <Type TYPE>
float sum_row(const void* p, int64_t first, const float* x, int64_t columns) {
    F acc = zero_f(), other[3] = {zero_f(), zero_f(), zero_f()};  // sums that do not wait for each other
    int64_t i = 0;
    for (; i + 32 <= columns; i += 32) {
        acc = fma(load_eight<TYPE>(p, first + i), load_f(x + i), acc);
        LORQ_UNROLL for (int k = 0; k < 3; ++k)
            other[k] = fma(load_eight<TYPE>(p, first + i + 8 * (k + 1)), load_f(x + i + 8 * (k + 1)), other[k]);
    }
    if (columns >= 32) acc = add(add(acc, other[0]), add(other[1], other[2]));
    for (; i + 8 <= columns; i += 8) acc = fma(load_eight<TYPE>(p, first + i), load_f(x + i), acc);
    float rest = 0;
    for (; i < columns; ++i) rest += load_value(p, first + i, TYPE) * x[i];
    return sum(acc) + rest;
}

// What a function gives for a type that is known when it is compiled: `f` takes it as the type of its argument.
template <Type TYPE>
using Known = std::integral_constant<Type, TYPE>;

template <class Function>
LORQ_INLINE auto for_type(Type type, Function f) {
    switch (type) {
        case Type::f32: return f(Known<Type::f32>());
        case Type::f16: return f(Known<Type::f16>());
        case Type::bf16: return f(Known<Type::bf16>());
        case Type::i8: return f(Known<Type::i8>());
        default: return f(Known<Type::e4m3>());
    }
}

// Row `row` of a factor as float32, not scaled.
inline void read_row(const Factor& f, int64_t row, int64_t columns, float* to) {
    for_type(f.type, [&](auto type) { read_row<type.value>(f.data, row * columns, columns, to); });
}

// The sum of row `row` of a factor times x, not scaled.
inline float sum_row(const Factor& f, int64_t row, const float* x, int64_t columns) {
    return for_type(f.type, [&](auto type) { return sum_row<type.value>(f.data, row * columns, x, columns); });
}

// x = step * sum over p of 256^p piece_p, pieces being bytes with a sign: three of them keep 23 bits of the largest entry
// of a group, two keep 15, one keeps 7. With two and three the step is a power of two, so that dividing by it rounds nothing.
struct Inputs {
    std::vector<float> x;            // padded with zeros to whole chunks
    std::vector<int32_t> whole;      // x / step
    std::vector<int8_t> pieces;      // of each chunk and position: 32 bytes of each piece, in the order of the codes
    std::vector<int32_t> start;      // of each run of chunks, part and piece: where its sums begin
    std::vector<float> step, total;  // of each group; padded
};

template <int BITS, int PIECES>
void place(const Weight& w, Inputs& x) {
    constexpr int P = Lane<BITS>::positions, C = 8 * Lane<BITS>::columns;
    x.pieces.resize(size_t(PIECES) * x.whole.size());
    const int64_t chunks = (w.in + C - 1) / C;
    for (int64_t c = 0; c < chunks; ++c)
        for (int p = 0; p < P; ++p) {
            const int32_t* from = &x.whole[size_t(c * C + p)];
            int8_t* to = &x.pieces[size_t((c * P + p) * PIECES * 32)];
            for (int i = 0; i < 32; ++i) {
                int32_t rest = from[i * P];
                for (int k = 0; k + 1 < PIECES; ++k) {
                    const int8_t low = int8_t(rest & 255);
                    to[32 * k + i] = low;
                    rest = (rest - low) >> 8;
                }
                to[32 * (PIECES - 1) + i] = int8_t(rest);
            }
        }
}

// Where the sums over the chunks of each run begin: at -2^(bits-1) times the sum of a lane's inputs.
template <int BITS, int PIECES>
void begin_sums(const Weight& w, Inputs& x) {
    constexpr int P = Lane<BITS>::positions, H = Lane<BITS>::parts;
    const int64_t chunks = (w.in + 8 * Lane<BITS>::columns - 1) / (8 * Lane<BITS>::columns);
    const int64_t in_group = std::max<int64_t>(w.group_size / Lane<BITS>::columns / 8, 1);
    x.start.assign(size_t(8 * H * PIECES * chunks), 0);
    const I middle = spread_i(0x01010101u << (BITS == 8 ? 3 : BITS - 1));
    int32_t* to = x.start.data();
    for (int64_t c = 0; c < chunks; to += 8 * H * PIECES) {
        I sum[PIECES];
        for (I& s : sum) s = zero_i();
        const int64_t stop = std::min(c + std::min(in_group - c % in_group, Lane<BITS>::fit), chunks);
        for (; c < stop; ++c)
            for (int p = 0; p < P; ++p)
                for (int k = 0; k < PIECES; ++k) sum[k] = dot(sum[k], middle, load_i(&x.pieces[size_t(((c * P + p) * PIECES + k) * 32)]));
        for (int k = 0; k < PIECES; ++k) store_i(to + 8 * ((H - 1) * PIECES + k), negative(sum[k]));
    }
}

template <int BITS>
void place(const Weight& w, int pieces, Inputs& x) {
    if (pieces == 1) place<BITS, 1>(w, x), begin_sums<BITS, 1>(w, x);
    else if (pieces == 2) place<BITS, 2>(w, x), begin_sums<BITS, 2>(w, x);
    else place<BITS, 3>(w, x), begin_sums<BITS, 3>(w, x);
}

inline void place(const Weight& w, int pieces, Inputs& x) {
    if (w.bits == 2) place<2>(w, pieces, x);
    else if (w.bits == 3) place<3>(w, pieces, x);
    else if (w.bits == 4) place<4>(w, pieces, x);
    else if (w.bits == 6) place<6>(w, pieces, x);
    else place<8>(w, pieces, x);
}

// The step of a group whose largest entry is `most`; 0 where its inverse would not be finite.
inline float step_of(float most, int pieces) {
    if (most == 0.0f) return 1.0f;
    if (pieces == 1) return most < 1e-35f ? 0.0f : most / 127.0f;
    int exponent;
    if (std::frexp(most, &exponent) > 0.992f) ++exponent;  // the uppermost piece is at most 127
    exponent -= 8 * pieces - 1;
    return exponent < -120 ? 0.0f : std::ldexp(1.0f, exponent);
}

// All but the bytes in their order. False where an entry or a group's sum is not finite, or a whole group so small that its step's inverse would not be.
inline bool read_inputs(const Weight& w, const void* x, int64_t token, Type type, int pieces, Inputs& to) {
    const int64_t padded = (w.in + 127) / 128 * 128, groups = w.groups();
    to.x.assign(size_t(padded), 0.0f);
    read_row(Factor{x, type, nullptr}, token, w.in, to.x.data());
    F check = zero_f();
    for (int64_t i = 0; i < padded; i += 8) check = fma(load_f(&to.x[i]), zero_f(), check);
    if (!(sum(check) == 0.0f)) return false;
    if (!pieces) return true;
    to.whole.assign(size_t(padded), 0);
    to.step.assign(size_t(groups + 16), 0.0f);
    to.total.assign(size_t(groups + 16), 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
        const float* v = &to.x[g * w.group_size];
        F largest = zero_f(), total = zero_f();
        for (int64_t i = 0; i < w.group_size; i += 8) {
            largest = larger(largest, size(load_f(v + i)));
            total = add(total, load_f(v + i));
        }
        to.step[g] = step_of(most(largest), pieces);
        if (to.step[g] == 0.0f) return false;
        to.total[g] = sum(total);
        if (!std::isfinite(to.total[g])) return false;
        const F inverse = spread_f(1.0f / to.step[g]);
        for (int64_t i = 0; i < w.group_size; i += 8)
            store_i(&to.whole[g * w.group_size + i], nearest(times(load_f(v + i), inverse)));
    }
    return true;
}

}  // namespace lorq
