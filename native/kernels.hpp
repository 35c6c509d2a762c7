// The quantized linear on a CPU. A module is compiled from this for each instruction set: one library for all of them
// would share the inline functions of the standard library, compiled for whichever set the linker took.
#pragma once
#include "floating.hpp"
#include "integer.hpp"
#include "parallel.hpp"

namespace lorq {

struct Call {
    const Weight& w;
    void* y;
    Type type;
    int pieces;  // bytes of each input; 0 for products in floating point
    std::vector<Inputs>& inputs;
    int64_t tokens;
    std::vector<float> z;  // (tokens, rank): what the right factor makes of the inputs
};

constexpr int MOST_ROWS = 8;  // of integer codes that are multiplied together

template <int BITS, int PIECES>
void whole_block(const Weight& w, const Inputs& x, const float* z, int64_t row, int64_t count, float* steps, float* y) {
    constexpr int ROWS = SIDE * (BITS == 8 || PIECES == 3 ? 2 : 4);
    static_assert(ROWS <= MOST_ROWS);
    const Units<BITS> units(w);
    int64_t r = 0;
    for (; r + ROWS <= count; r += ROWS) multiply_rows<BITS, PIECES, ROWS>(w, x, z, units, row + r, 1, 0, steps, y + r);
    if (r == count) return;
    const int64_t back = ROWS - (count - r);  // rows before, once more
    if (row + r >= back) return multiply_rows<BITS, PIECES, ROWS>(w, x, z, units, row + r - back, 1, back, steps, y + r - back);
    for (; r < count; ++r) multiply_rows<BITS, PIECES, ROWS>(w, x, z, units, row + r, 0, ROWS - 1, steps, y + r - ROWS + 1);
}

template <int BITS>
void whole_block(const Call& c, const Inputs& x, const float* z, int64_t row, int64_t count, float* steps, float* y) {
    if (c.pieces == 1) whole_block<BITS, 1>(c.w, x, z, row, count, steps, y);
    else if (c.pieces == 2) whole_block<BITS, 2>(c.w, x, z, row, count, steps, y);
    else whole_block<BITS, 3>(c.w, x, z, row, count, steps, y);
}

inline void multiply_block(const Call& c, const Tables& t, const Inputs& x, const float* z, int64_t row, int64_t count, float* scratch, float* y) {
    const Weight& w = c.w;
    if (c.pieces) {
        if (w.bits == 2) whole_block<2>(c, x, z, row, count, scratch, y);
        else if (w.bits == 3) whole_block<3>(c, x, z, row, count, scratch, y);
        else if (w.bits == 4) whole_block<4>(c, x, z, row, count, scratch, y);
        else whole_block<8>(c, x, z, row, count, scratch, y);
    } else if (w.scale_rank) {
        multiply_scaled_rows(w, t, x, row, count, scratch, y);
    } else {
        for (int64_t r = 0; r < count; ++r)
            y[r] = w.vector == 1   ? multiply_row<1>(w, t, x, row + r)
                   : w.vector == 2 ? multiply_row<2>(w, t, x, row + r)
                   : w.vector == 4 ? multiply_row<4>(w, t, x, row + r)
                                   : multiply_row<8>(w, t, x, row + r);
    }
}

inline void multiply_job(Team& team, int thread, void* data) {
    Call& c = *static_cast<Call*>(data);
    const Weight& w = c.w;
    const int64_t tokens = c.tokens;
    int64_t first, last;
    if (w.rank) {
        team.share(w.rank, 1, thread, first, last);
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t k = first; k < last; ++k) {
                float z = sum_row(w.right, k, c.inputs[token].x.data(), w.in, zero_f());
                if (w.right.scale) z *= from_half(w.right.scale[k]);
                if (w.left.scale) z *= from_half(w.left.scale[k]);
                c.z[token * w.rank + k] = z;
            }
        team.wait();
    }
    const Tables tables(w);
    std::vector<float> scratch(size_t(std::max<int64_t>(MOST_ROWS * (w.groups() + 16), BLOCK * w.scale_rank)));
    team.share(w.out, BLOCK, thread, first, last);
    for (int64_t row = first; row < last; row += BLOCK) {
        const int64_t count = std::min(BLOCK, last - row);
        for (int64_t token = 0; token < tokens; ++token) {
            float y[BLOCK];
            const float* z = c.z.data() + token * w.rank;
            multiply_block(c, tables, c.inputs[token], z, row, count, scratch.data(), y);
            for (int64_t r = 0; w.rank && !c.pieces && r < count; ++r) y[r] += sum_row(w.left, row + r, z, w.rank, zero_f());
            store_values(c.y, token * w.out + row, y, count, c.type);
        }
    }
}

// y = W x for tokens (tokens, in) -> (tokens, out). False, with y unfinished, where inputs are not finite or all but
// zero: whole numbers cannot carry that. `pieces` bytes are kept of each input, where codes are whole numbers.
inline bool multiply(const Weight& w, const void* x, void* y, int64_t tokens, Type type, int pieces, int threads) {
    if (!w.whole_numbers()) pieces = 0;
    static thread_local std::vector<Inputs> inputs;  // kept from call to call: making room costs as much as a small layer
    if (int64_t(inputs.size()) < tokens) inputs.resize(size_t(tokens));
    Call call{w, y, type, pieces, inputs, tokens, std::vector<float>(size_t(tokens * w.rank))};
    for (int64_t token = 0; token < tokens; ++token) {
        Inputs& own = call.inputs[token];
        if (!read_inputs(w, x, token, type, pieces, own)) return false;
        if (w.scale_rank) mix(w, own.x.data(), own.mixed);
    }
    Team::run(Team::useful(threads, tokens * w.out * w.in), multiply_job, &call);
    return true;
}

struct Decoding {
    const Weight& w;
    void* to;
    int64_t first, count;
    Type type;
    std::vector<float> mixed;

    LORQ_INLINE void store(int64_t i, int64_t j, F value) const {
        if (type == Type::f32) return store_f(static_cast<float*>(to) + i * w.in + j, value);
        float v[8];
        store_f(v, value);
        for (int k = 0; k < 8; ++k) store_value(to, i * w.in + j + k, v[k], type);
    }
};

// Row i of those asked for, a run of one scale after the other.
template <int VECTOR>
void decode_row(const Decoding& d, const Tables& t, int64_t i) {
    const Weight& w = d.w;
    const int64_t row = d.first + i, run = scale_run(w);
    for (int64_t start = 0; start < w.in; start += run) {
        const F scale = spread_f(scale_at(w, row, start));
        const int8_t* entries = entries_at(w, row, start);
        F shift = zero_f();
        if (w.zero) {  // values are codes less the middle
            const int64_t bit = row * w.bits, groups = w.groups(), g = start / w.group_size;
            uint64_t two = w.zero[bit / 32 * groups + g];
            if (bit % 32 + w.bits > 32) two |= uint64_t(w.zero[(bit / 32 + 1) * groups + g]) << 32;
            shift = spread_f(float(1 << (w.bits - 1)) - float(two >> bit % 32 & ((1u << w.bits) - 1)));
        }
        for (int64_t j = start; j < start + run; j += 8)
            d.store(i, j, times(add(eight_values<VECTOR>(w, t, w.row(row), entries, j), shift), scale));
    }
}

// 8 N columns of rows i .. last - 1 whose scale is a product.
template <int N>
void decode_scaled(const Decoding& d, const Tables& t, const float* left, int64_t i, int64_t last, int64_t j) {
    const Weight& w = d.w;
    for (; i < last; ++i, left += w.scale_rank) {
        F scale[N];
        scales_of<N>(left, w.scale_rank, &d.mixed[size_t(j * w.scale_rank)], scale);
        LORQ_UNROLL for (int n = 0; n < N; ++n)
            d.store(i, j + 8 * n, times(eight_values<1>(w, t, w.row(d.first + i), nullptr, j + 8 * n), scale[n]));
    }
}

inline void decode_job(Team& team, int thread, void* data) {
    const Decoding& d = *static_cast<Decoding*>(data);
    const Weight& w = d.w;
    const Tables tables(w);
    std::vector<float> left(size_t(BLOCK * w.scale_rank));
    int64_t begin, end;
    team.share(d.count, w.scale_rank ? BLOCK : 1, thread, begin, end);
    for (int64_t i = begin; i < end && w.scale_rank; i += BLOCK) {
        const int64_t last = std::min(i + BLOCK, end);
        for (int64_t r = i; r < last; ++r) read_row(w.scale_left, d.first + r, w.scale_rank, &left[size_t((r - i) * w.scale_rank)]);
        int64_t j = 0;
        for (; j + 64 <= w.in; j += 64) decode_scaled<8>(d, tables, left.data(), i, last, j);
        for (; j < w.in; j += 8) decode_scaled<1>(d, tables, left.data(), i, last, j);
    }
    for (int64_t i = begin; i < end && !w.scale_rank; ++i) {
        if (w.vector == 1) decode_row<1>(d, tables, i);
        else if (w.vector == 2) decode_row<2>(d, tables, i);
        else if (w.vector == 4) decode_row<4>(d, tables, i);
        else decode_row<8>(d, tables, i);
    }
}

// decode(codes, scale) of rows first .. first + count - 1, (count, in).
inline void decode(const Weight& w, void* to, int64_t first, int64_t count, Type type, int threads) {
    Decoding d{w, to, first, count, type, {}};
    if (w.scale_rank) mix(w, nullptr, d.mixed);
    Team::run(Team::useful(threads, count * w.in), decode_job, &d);
}

}  // namespace lorq
