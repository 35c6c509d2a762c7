// Products with trellis codes (docs/format.md). Lanes are columns. A strip of 16 rows is decoded to whole numbers of 16
// bits, which stay in the first-level cache: a window is a shift of two neighbouring words and a mask, its value the sum
// of the four bytes of a product. Each token's inputs, whole numbers of 16 bits too, are multiplied by the strip. Values
// count from 0; what they are off, the sums begin at.
#pragma once
#include <utility>

#include "halves.hpp"
#include "kernels.hpp"

namespace lorq {

constexpr int TILE = 16;            // rows whose codes are one string a column
constexpr int64_t STRIP = 512;      // columns; a step of the inputs serves as many
constexpr int MIDDLE = 510;         // the value that stands for 0
constexpr float UNIT = 1.0f / 128;  // of values
constexpr float GUARD = 0x1p-24f;   // of sums, which must not overflow where outputs do not
constexpr uint32_t MULTIPLIER = 0xC49087BF;
// Sums in 32 bits of a strip: each lane has STRIP / HALVES pairs of products of at most MIDDLE by 2^15.
static_assert(STRIP / HALVES * 2 * MIDDLE <= (1 << 16));

struct TrellisWeight {
    int64_t out = 0, in = 0;
    int bits = 0, window = 0;
    int64_t length = 0;                // rows of a sequence, whole tiles
    const uint16_t* packed = nullptr;  // (tiles, bits, in)
    const uint16_t* scale = nullptr;   // (out,) float16
    Factor left, right;                // (out, rank), (rank, in)
    int rank = 0;

    int64_t tiles() const { return (out + TILE - 1) / TILE; }

    // Word k of each column's string in a tile; -1 is the last of the tile before, in the ring of its sequence.
    const uint16_t* word(int64_t tile, int k) const {
        if (k < 0) {
            const int64_t tiles = length / TILE;
            tile += tile % tiles ? -1 : tiles - 1;
            k += bits;
        }
        return packed + (tile * bits + k) * in;
    }
};

struct ValuesOf {
    H mask, low, high, ones;
    explicit ValuesOf(int window)
        : mask(spread_h(uint16_t((1u << window) - 1))), low(spread_h(MULTIPLIER & 0xffff)), high(spread_h(MULTIPLIER >> 16)),
          ones(spread_h(0x0101)) {}

    LORQ_INLINE H operator()(H window) const {
        const H lower = lower_product(window, low), upper = add_h(upper_product(window, low), lower_product(window, high));
        return add_h(sum_bytes(lower, ones), sum_bytes(upper, ones));
    }
};

template <int BITS, int T>
LORQ_INLINE H window_of(const H (&words)[BITS + 1], H mask) {
    constexpr int end = (T + 1) * BITS, word = (end - 1) / 16;
    return bits_of<end - 16 * word>(words[word], words[word + 1], mask);
}

template <int BITS, int... T>
LORQ_INLINE void decode_chunk(const H (&words)[BITS + 1], const ValuesOf& values, uint16_t* to, std::integer_sequence<int, T...>) {
    (store_h(to + T * STRIP, values(window_of<BITS, T>(words, values.mask))), ...);
}

// Columns first .. first + count - 1 of a tile, STRIP apart; room for whole chunks is written.
template <int BITS>
void decode_strip(const TrellisWeight& w, int64_t tile, int64_t first, int64_t count, uint16_t* to) {
    const ValuesOf values(w.window);  // in registers: what is written to might be another's
    constexpr auto rows = std::make_integer_sequence<int, TILE>();
    const uint16_t* from[BITS + 1];
    for (int k = 0; k <= BITS; ++k) from[k] = w.word(tile, k - 1) + first;
    for (int64_t j = 0; j < count; j += HALVES) {
        H words[BITS + 1];
        if (j + HALVES <= count) {
            LORQ_UNROLL for (int k = 0; k <= BITS; ++k) words[k] = load_h(from[k] + j);
        } else {
            for (int k = 0; k <= BITS; ++k) {
                uint16_t some[HALVES] = {};
                std::memcpy(some, from[k] + j, size_t(count - j) * 2);
                words[k] = load_h(some);
            }
        }
        decode_chunk<BITS>(words, values, to + j, rows);
    }
}

// x = step * sum over p of 2^(16 p) piece_p, with a step for each strip that is a power of two: one piece keeps 15 bits of
// a strip's largest entry, two keep 31.
struct StripInputs {
    Inputs plain;                 // in float32, padded with zeros to whole strips
    std::vector<int16_t> pieces;  // of each piece, all columns
    std::vector<int32_t> start;   // of each piece and strip, a register: -MIDDLE times the sum of each lane's inputs
    std::vector<float> step;      // of each strip
};

inline int64_t strips_of(int64_t columns) { return (columns + STRIP - 1) / STRIP; }

// False where an entry is not finite, or a whole strip so small that its step's inverse would not be.
inline bool read_strips(const void* x, int64_t token, int64_t columns, Type type, int pieces, StripInputs& to) {
    const int64_t strips = strips_of(columns), padded = strips * STRIP;
    to.plain.x.assign(size_t(padded), 0.0f);
    read_row(Factor{x, type, nullptr}, token, columns, to.plain.x.data());
    to.pieces.resize(size_t(pieces * padded));
    to.start.resize(size_t(pieces * strips * HALVES / 2));
    to.step.resize(size_t(strips));
    for (int64_t s = 0; s < strips; ++s) {
        const float* v = &to.plain.x[size_t(s * STRIP)];
        F largest = zero_f(), check = zero_f();
        for (int64_t i = 0; i < STRIP; i += 8) {
            largest = larger(largest, size(load_f(v + i)));
            check = fma(load_f(v + i), zero_f(), check);
        }
        to.step[s] = step_of(most(largest), 2 * pieces);
        if (!(sum(check) == 0.0f) || to.step[s] == 0.0f) return false;
        const F inverse = spread_f(1.0f / to.step[s]);
        for (int64_t i = 0; i < STRIP; i += 8) {
            int32_t whole[8];
            store_i(whole, nearest(times(load_f(v + i), inverse)));
            for (int p = 0; p < pieces; ++p)
                for (int k = 0; k < 8; ++k) {
                    const int16_t low = int16_t(whole[k] & 0xffff);
                    to.pieces[size_t(p * padded + s * STRIP + i + k)] = low;
                    whole[k] = int32_t((int64_t(whole[k]) - low) >> 16);
                }
        }
        for (int p = 0; p < pieces; ++p) {
            Wide begin = each_row(0u);
            for (int64_t i = 0; i < STRIP; i += HALVES)
                begin = dot_h(begin, spread_h(uint16_t(-MIDDLE)), load_h(&to.pieces[size_t(p * padded + s * STRIP + i)]));
            store_wide(&to.start[size_t((p * strips + s) * HALVES / 2)], begin);
        }
    }
    return true;
}

struct TrellisCall {
    const TrellisWeight& w;
    Type type;
    int pieces;
    const std::vector<StripInputs>& inputs;
    int64_t tokens;
    std::vector<Projection> projections;
    void* y;
};

// sums + a strip times strip s of an input.
inline void add_products(const uint16_t* strip, const StripInputs& x, int pieces, int64_t s, int64_t count, WideF* sums) {
    constexpr int ROWS = 8;
    const int64_t strips = int64_t(x.step.size());
    float step = x.step[size_t(s)] * GUARD;
    for (int p = 0; p < pieces; ++p, step *= 65536.0f) {
        const int16_t* values = &x.pieces[size_t((p * strips + s) * STRIP)];
        const Wide start = load_wide(&x.start[size_t((p * strips + s) * HALVES / 2)]);
        for (int r = 0; r < TILE; r += ROWS) {
            Wide acc[ROWS];
            LORQ_UNROLL for (int k = 0; k < ROWS; ++k) acc[k] = start;
            for (int64_t j = 0; j < count; j += HALVES) {
                const H v = load_h(values + j);
                LORQ_UNROLL for (int k = 0; k < ROWS; ++k) acc[k] = dot_h(acc[k], load_h(strip + (r + k) * STRIP + j), v);
            }
            LORQ_UNROLL for (int k = 0; k < ROWS; ++k) sums[r + k] = add(sums[r + k], times(to_float(acc[k]), step));
        }
    }
}

template <int BITS>
void trellis_multiply_job(Team& team, int thread, void* data) {
    const TrellisCall& c = *static_cast<const TrellisCall*>(data);
    const TrellisWeight& w = c.w;
    if (!c.projections.empty()) {
        project(c.projections, team, thread);
        team.wait();
    }
    std::vector<WideF> sums(size_t(c.tokens * TILE));
    alignas(64) uint16_t strip[TILE * STRIP];
    int64_t begin, end;
    team.share(w.tiles(), 1, thread, begin, end);
    for (int64_t tile = begin; tile < end; ++tile) {
        std::fill(sums.begin(), sums.end(), zero_rows());
        for (int64_t s = 0; s < strips_of(w.in); ++s) {
            const int64_t count = std::min(STRIP, w.in - s * STRIP);
            decode_strip<BITS>(w, tile, s * STRIP, count, strip);
            for (int64_t t = 0; t < c.tokens; ++t) add_products(strip, c.inputs[size_t(t)], c.pieces, s, count, &sums[size_t(t * TILE)]);
        }
        const int64_t row = tile * TILE, count = std::min<int64_t>(TILE, w.out - row);
        for (int64_t t = 0; t < c.tokens; ++t) {
            float y[TILE];
            for (int64_t r = 0; r < count; ++r) {
                y[r] = sum_wide(sums[size_t(t * TILE + r)]) * (UNIT / GUARD * from_half(w.scale[row + r]));
                if (w.rank) y[r] += sum_row(w.left, row + r, c.projections[size_t(t)].z, w.rank);
            }
            store_values(c.y, t * w.out + row, y, count, c.type);
        }
    }
}

// y = W x for tokens (tokens, in) -> (tokens, out). False, with y unfinished, where `read_strips` is.
inline bool multiply(const TrellisWeight& w, const void* x, void* y, int64_t tokens, Type type, int threads) {
    static constexpr Job jobs[] = {trellis_multiply_job<1>, trellis_multiply_job<2>, trellis_multiply_job<3>,
                                   trellis_multiply_job<4>, trellis_multiply_job<5>, trellis_multiply_job<6>};
    static thread_local std::vector<StripInputs> kept;  // making room costs as much as a small layer
    std::vector<StripInputs>& inputs = kept;
    const int pieces = type == Type::f32 ? 2 : 1;
    if (int64_t(inputs.size()) < tokens) inputs.resize(size_t(tokens));
    for (int64_t t = 0; t < tokens; ++t)
        if (!read_strips(x, t, w.in, type, pieces, inputs[size_t(t)])) return false;
    TrellisCall call{w, type, pieces, inputs, tokens, {}, y};
    std::vector<float> z(size_t(tokens * w.rank));
    for (int64_t t = 0; t < tokens && w.rank; ++t)
        call.projections.push_back({w.right, w.left, w.rank, &inputs[size_t(t)].plain, w.in, &z[size_t(t * w.rank)]});
    Team::run(Team::useful(threads, tokens * w.out * w.in), jobs[w.bits - 1], &call);
    return true;
}

struct TrellisDecoding {
    const TrellisWeight& w;
    void* to;
    int64_t first, count;
    Type type;
};

template <int BITS>
void trellis_decode_job(Team& team, int thread, void* data) {
    const TrellisDecoding& d = *static_cast<const TrellisDecoding*>(data);
    const TrellisWeight& w = d.w;
    alignas(64) uint16_t strip[TILE * STRIP];
    int64_t begin, end;
    team.share(d.count, TILE, thread, begin, end);
    for (int64_t i = begin; i < end; i += TILE)
        for (int64_t j = 0; j < w.in; j += STRIP) {
            const int64_t count = std::min(STRIP, w.in - j);
            decode_strip<BITS>(w, (d.first + i) / TILE, j, count, strip);
            for (int64_t r = 0; r < std::min<int64_t>(TILE, end - i); ++r) {
                const float step = UNIT * from_half(w.scale[d.first + i + r]);
                const F scale = spread_f(step), off = spread_f(-MIDDLE * step);
                const uint16_t* from = strip + r * STRIP;
                const int64_t to = (i + r) * w.in + j;
                int64_t k = 0;
                // Exact: a value has ten bits, a scale eleven.
                for (; k + 8 <= count; k += 8) store_eight(d.to, to + k, fma(to_float(load_uhalves(from + k)), scale, off), d.type);
                for (; k < count; ++k) store_value(d.to, to + k, float(int(from[k]) - MIDDLE) * step, d.type);
            }
        }
}

// scale * value of rows first .. first + count - 1, (count, in); the first of them begins a tile.
inline void decode(const TrellisWeight& w, void* to, int64_t first, int64_t count, Type type, int threads) {
    static constexpr Job jobs[] = {trellis_decode_job<1>, trellis_decode_job<2>, trellis_decode_job<3>,
                                   trellis_decode_job<4>, trellis_decode_job<5>, trellis_decode_job<6>};
    TrellisDecoding d{w, to, first, count, type};
    Team::run(Team::useful(threads, count * w.in), jobs[w.bits - 1], &d);
}

}  // namespace lorq
