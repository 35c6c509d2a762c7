// The quantized linear on a CPU. A module is compiled from this for each instruction set: one library for all of them
// would share the inline functions of the standard library, compiled for whichever set the linker took.
//
// Whole numbers (integer codes of 2, 3, 4, 8 bits, a scale for each group). Lane l of a chunk of eight holds the codes of
// neighbouring columns; a right shift and a mask bring one code into each byte, and one instruction multiplies 32 of them
// by 32 bytes of the inputs and adds pairs (or fours), another adds those up: 6 instructions for 32 weights and inputs of
// two bytes, 4 for inputs of one. A lane's sums are of its own columns alone; at the end of a group they become float32 and
// are multiplied by the scale. Codes count from the middle of the grid, since the sums begin below zero; what zero points
// are off it is taken away once a group, as scale * (zero - middle) * (sum of the inputs).
//
// Floating point (fixed levels, scales of low rank, vector codebooks): eight neighbouring columns at a time are decoded
// to float32 and multiplied by the inputs.
#pragma once
#include "inputs.hpp"
#include "parallel.hpp"

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

// ---- eight columns at a time in floating point ------------------------------------------------------------------

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

// What the codes of eight columns of a row stand for, before the scale.
inline F eight_values(const Weight& w, const Tables& t, int64_t row, int64_t column) {
    if (w.vector > 1) {
        const uint32_t word = eight_bits(w.row(row), column, w.bits);
        const int width = w.bits * w.vector;
        const int64_t tile = row / w.codebook_rows * (w.in / w.codebook_columns) + column / w.codebook_columns;
        const int8_t* entries = w.codebook + (tile << width) * w.vector;
        int8_t values[8];
        for (int k = 0; k < 8 / w.vector; ++k) {
            const uint32_t code = word >> (k * width) & ((1u << width) - 1);
            if (w.vector == 4) std::memcpy(values + 4 * k, entries + 4 * code, 4);
            else if (w.vector == 2) std::memcpy(values + 2 * k, entries + 2 * code, 2);
            else std::memcpy(values, entries + 8 * code, 8);
        }
        return load_bytes(values);
    }
    if (w.bits == 8) return add(to_float(load_ubytes(w.row(row) + column)), spread_f(-128.0f));
    const I codes = shift_each(spread_i(eight_bits(w.row(row), column, w.bits)), t.steps);
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

// Columns over which a row's scale is one number.
inline int64_t scale_run(const Weight& w) {
    return w.vector > 1 ? common_divisor(w.group_size, w.codebook_columns) : w.group_size;
}

inline float multiply_row(const Weight& w, const Tables& t, const Inputs& x, int64_t row) {
    F total = zero_f();
    const int64_t run = scale_run(w);
    for (int64_t start = 0; start < w.in; start += run) {
        F part = zero_f();
        for (int64_t j = start; j < start + run; j += 8) part = fma(eight_values(w, t, row, j), load_f(&x.x[j]), part);
        total = fma(part, spread_f(scale_at(w, row, start)), total);
    }
    return sum(total);
}

// Rows whose scale is a product: sum over j of level_j sum over k of left_k (right_kj x_j), the inner one first.
template <int ROWS>
void multiply_scaled_rows(const Weight& w, const Tables& t, const Inputs& x, int64_t row, float* left, float* y) {
    F total[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        total[r] = zero_f();
        read_row(w.scale_left, row + r, w.scale_rank, left + r * w.scale_rank);
    }
    for (int64_t j = 0; j < w.in; j += 8) {
        F scaled[ROWS];
        for (int r = 0; r < ROWS; ++r) scaled[r] = zero_f();
        for (int k = 0; k < w.scale_rank; ++k) {
            const F mixed = load_f(&x.mixed[j * w.scale_rank + 8 * k]);
            for (int r = 0; r < ROWS; ++r) scaled[r] = fma(spread_f(left[r * w.scale_rank + k]), mixed, scaled[r]);
        }
        for (int r = 0; r < ROWS; ++r) total[r] = fma(eight_values(w, t, row + r, j), scaled[r], total[r]);
    }
    for (int r = 0; r < ROWS; ++r) y[r] = sum(total[r]);
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

// ---- one call -----------------------------------------------------------------------------------------------------

struct Call {
    const Weight& w;
    void* y;
    Type type;
    int pieces;  // bytes of each input; 0 for products in floating point
    std::vector<Inputs>& inputs;
    int64_t tokens;
    std::vector<float> z;  // (tokens, rank): what the right factor makes of the inputs
};

template <int BITS, int PIECES>
void whole_block(const Weight& w, const Inputs& x, int64_t row, int64_t count, float* steps, float* y) {
    constexpr int ROWS = BITS == 8 || PIECES == 3 ? 2 : 4;
    const Units<BITS> units(w);
    int64_t r = 0;
    for (; r + ROWS <= count; r += ROWS) multiply_rows<BITS, PIECES, ROWS>(w, x, units, row + r, steps, y + r);
    for (; r < count; ++r) multiply_rows<BITS, PIECES, 1>(w, x, units, row + r, steps, y + r);
}

template <int BITS>
void whole_block(const Call& c, const Inputs& x, int64_t row, int64_t count, float* steps, float* y) {
    if (c.pieces == 1) whole_block<BITS, 1>(c.w, x, row, count, steps, y);
    else if (c.pieces == 2) whole_block<BITS, 2>(c.w, x, row, count, steps, y);
    else whole_block<BITS, 3>(c.w, x, row, count, steps, y);
}

inline void multiply_block(const Call& c, const Tables& t, const Inputs& x, int64_t row, int64_t count, float* scratch, float* y) {
    const Weight& w = c.w;
    if (c.pieces) {
        if (w.bits == 2) whole_block<2>(c, x, row, count, scratch, y);
        else if (w.bits == 3) whole_block<3>(c, x, row, count, scratch, y);
        else if (w.bits == 4) whole_block<4>(c, x, row, count, scratch, y);
        else whole_block<8>(c, x, row, count, scratch, y);
    } else if (w.scale_rank) {
        int64_t r = 0;
        for (; r + 4 <= count; r += 4) multiply_scaled_rows<4>(w, t, x, row + r, scratch, y + r);
        for (; r < count; ++r) multiply_scaled_rows<1>(w, t, x, row + r, scratch, y + r);
    } else {
        for (int64_t r = 0; r < count; ++r) y[r] = multiply_row(w, t, x, row + r);
    }
}

constexpr int64_t BLOCK = 16;  // rows that a thread takes at once

inline void multiply_job(Team& team, int thread, void* data) {
    Call& c = *static_cast<Call*>(data);
    const Weight& w = c.w;
    const int64_t tokens = c.tokens;
    int64_t first, last;
    if (w.rank) {
        team.share(w.rank, 1, thread, first, last);
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t k = first; k < last; ++k) {
                float z = dot_row(w.right, k, c.inputs[token].x.data(), w.in);
                if (w.right.scale) z *= from_half(w.right.scale[k]);
                if (w.left.scale) z *= from_half(w.left.scale[k]);
                c.z[token * w.rank + k] = z;
            }
        team.wait();
    }
    const Tables tables(w);
    std::vector<float> scratch(size_t(4 * std::max<int64_t>(w.whole_scratch(), w.scale_rank)));
    team.share(w.out, BLOCK, thread, first, last);
    for (int64_t row = first; row < last; row += BLOCK) {
        const int64_t count = std::min(BLOCK, last - row);
        for (int64_t token = 0; token < tokens; ++token) {
            float y[BLOCK];
            multiply_block(c, tables, c.inputs[token], row, count, scratch.data(), y);
            for (int64_t r = 0; r < count; ++r) {
                if (w.rank) y[r] += dot_row(w.left, row + r, &c.z[token * w.rank], w.rank);
                store_value(c.y, token * w.out + row + r, y[r], c.type);
            }
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
};

inline void decode_job(Team& team, int thread, void* data) {
    const Decoding& d = *static_cast<Decoding*>(data);
    const Weight& w = d.w;
    const Tables tables(w);
    const int64_t run = w.scale_rank ? w.in : scale_run(w);
    std::vector<float> left(size_t(w.scale_rank));
    int64_t begin, end;
    team.share(d.count, 1, thread, begin, end);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = d.first + i;
        if (w.scale_rank) read_row(w.scale_left, row, w.scale_rank, left.data());
        for (int64_t start = 0; start < w.in; start += run) {
            F scale = zero_f(), shift = zero_f();
            if (!w.scale_rank) scale = spread_f(scale_at(w, row, start));
            if (w.zero) {  // values are codes less the middle
                const int64_t bit = row * w.bits, groups = w.groups(), g = start / w.group_size;
                uint64_t two = w.zero[bit / 32 * groups + g];
                if (bit % 32 + w.bits > 32) two |= uint64_t(w.zero[(bit / 32 + 1) * groups + g]) << 32;
                shift = spread_f(float(1 << (w.bits - 1)) - float(two >> bit % 32 & ((1u << w.bits) - 1)));
            }
            for (int64_t j = start; j < start + run; j += 8) {
                if (w.scale_rank) {
                    scale = zero_f();
                    for (int k = 0; k < w.scale_rank; ++k)
                        scale = fma(spread_f(left[k]), load_f(&d.mixed[j * w.scale_rank + 8 * k]), scale);
                }
                const F value = times(add(eight_values(w, tables, row, j), shift), scale);
                if (d.type == Type::f32) {
                    store_f(static_cast<float*>(d.to) + i * w.in + j, value);
                } else {
                    float v[8];
                    store_f(v, value);
                    for (int k = 0; k < 8; ++k) store_value(d.to, i * w.in + j + k, v[k], d.type);
                }
            }
        }
    }
}

// decode(codes, scale) of rows first .. first + count - 1, (count, in).
inline void decode(const Weight& w, void* to, int64_t first, int64_t count, Type type, int threads) {
    Decoding d{w, to, first, count, type, {}};
    if (w.scale_rank) mix(w, nullptr, d.mixed);
    Team::run(Team::useful(threads, count * w.in), decode_job, &d);
}

}  // namespace lorq
