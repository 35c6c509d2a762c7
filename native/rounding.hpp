// Rounding to integers in groups, errors passed on from a column to those that follow it in a block
// (src/lorq/core/rounding/gptq.py), the range of each group searched when its turn comes. Rows do not disturb each
// other: eight of them go through a block together, each in a lane.
#pragma once
#include <atomic>
#include <vector>

#include "parallel.hpp"
#include "simd.hpp"

namespace lorq {

struct IntegerBlock {
    const float* columns;  // (count, rows)
    const float* upper;    // (count, count): of the factor of the inverse Hessian
    const float* hessian;  // (count, count), of which the groups' own blocks are read; null where nothing is searched
    const float* shares;   // (trials,): of the full range, falling
    float* scale;          // (groups, rows): out, exact in float16; or given
    float* zero;           // (groups, rows): out, or given
    uint8_t* codes;        // (count, rows): out
    float* errors;         // (count, rows): out; what a column missed, over the diagonal of `upper`
    int64_t count, rows, group, trials;
    int bits;
    bool symmetric, saturate, given;
    std::atomic<int64_t> next{0};

    float top() const { return float((1 << bits) - 1); }
    float middle() const { return float(1 << (bits - 1)); }
};

constexpr int64_t INTEGER_ROWS = 8;       // in a register
constexpr float SMALLEST_SCALE = 0x1p-17f;  // as in src/lorq/core/half.py

struct Grid8 {
    F scale, zero;
};

inline F integer_code(F x, Grid8 grid, F top) {
    return to_float(nearest(smaller(larger(add(over(x, grid.scale), grid.zero), zero_f()), top)));
}

inline F integer_value(F code, Grid8 grid) { return times(minus(code, grid.zero), grid.scale); }

// As `IntGrid.span`.
inline Grid8 integer_span(const IntegerBlock& b, F low, F high) {
    low = smaller(low, zero_f());
    high = larger(high, zero_f());
    const F down = minus(zero_f(), low);
    const F step = b.symmetric ? over(larger(down, high), spread_f(std::max(b.middle() - 1, 1.0f)))
                               : over(minus(high, low), spread_f(b.top()));
    const F scale = round_half(larger(step, spread_f(SMALLEST_SCALE)));
    if (b.symmetric) return {scale, spread_f(b.middle())};
    return {scale, to_float(nearest(smaller(larger(over(down, scale), zero_f()), spread_f(b.top()))))};
}

// What N trials of a group cost, d H d^T each; `missed` is (group, trials, 8).
template <int N>
LORQ_INLINE void trial_costs(const float* hessian, int64_t stride, const float* missed, int64_t group, int64_t trials, F* costs) {
    LORQ_UNROLL
    for (int n = 0; n < N; ++n) costs[n] = zero_f();
    for (int64_t i = 0; i < group; ++i) {
        F twice[N];
        LORQ_UNROLL
        for (int n = 0; n < N; ++n) twice[n] = zero_f();
        for (int64_t j = i + 1; j < group; ++j) {
            const F h = spread_f(hessian[i * stride + j]);
            const float* own = missed + j * trials * INTEGER_ROWS;
            LORQ_UNROLL
            for (int n = 0; n < N; ++n) twice[n] = fma(h, load_f(own + n * INTEGER_ROWS), twice[n]);
        }
        const F h = spread_f(hessian[i * stride + i]);
        LORQ_UNROLL
        for (int n = 0; n < N; ++n) {
            const F d = load_f(missed + (i * trials + n) * INTEGER_ROWS);
            costs[n] = fma(d, fma(h, d, add(twice[n], twice[n])), costs[n]);
        }
    }
}

// The scale and zero point of a group: of its full range, or those that cost least, of equals the widest.
inline Grid8 integer_range(const IntegerBlock& b, int64_t at, const float* x, float* missed) {
    F low = load_f(x), high = low;
    for (int64_t i = 1; i < b.group; ++i) {
        const F v = load_f(x + i * INTEGER_ROWS);
        low = smaller(low, v);
        high = larger(high, v);
    }
    if (!b.hessian) return integer_span(b, low, high);
    const F reach = larger(minus(zero_f(), low), high), top = spread_f(b.top());
    std::vector<Grid8> tried(static_cast<size_t>(b.trials));
    for (int64_t t = 0; t < b.trials; ++t) {
        const F share = spread_f(b.shares[t]);
        const F limit = times(share, reach);
        tried[t] = b.saturate ? integer_span(b, larger(low, minus(zero_f(), limit)), smaller(high, limit))
                              : integer_span(b, times(share, low), times(share, high));
        for (int64_t i = 0; i < b.group; ++i) {
            const F v = load_f(x + i * INTEGER_ROWS);
            store_f(missed + (i * b.trials + t) * INTEGER_ROWS, minus(integer_value(integer_code(v, tried[t], top), tried[t]), v));
        }
    }
    alignas(32) float least[INTEGER_ROWS], cost[INTEGER_ROWS], scale[INTEGER_ROWS], zero[INTEGER_ROWS], own[INTEGER_ROWS];
    constexpr int TOGETHER = 5;
    const float* hessian = b.hessian + at * b.count + at;
    for (int64_t t = 0; t < b.trials;) {
        F costs[TOGETHER];
        const int64_t n = b.trials - t >= TOGETHER ? TOGETHER : 1;
        const float* from = missed + t * INTEGER_ROWS;
        if (n == TOGETHER) trial_costs<TOGETHER>(hessian, b.count, from, b.group, b.trials, costs);
        else trial_costs<1>(hessian, b.count, from, b.group, b.trials, costs);
        for (int64_t k = 0; k < n; ++k, ++t) {
            store_f(cost, costs[k]);
            for (int64_t r = 0; r < INTEGER_ROWS; ++r) {
                if (t && !(cost[r] < least[r])) continue;
                least[r] = cost[r];
                store_f(own, tried[t].scale);
                scale[r] = own[r];
                store_f(own, tried[t].zero);
                zero[r] = own[r];
            }
        }
    }
    return {load_f(scale), load_f(zero)};
}

// Eight rows, or the last ones, from `first` on; x is (count, 8), missed (group, trials, 8).
inline void integer_rows(const IntegerBlock& b, int64_t first, float* x, float* missed) {
    const int64_t n = std::min<int64_t>(INTEGER_ROWS, b.rows - first), bytes = n * int64_t(sizeof(float));
    for (int64_t i = 0; i < b.count; ++i) std::memcpy(x + i * INTEGER_ROWS, b.columns + i * b.rows + first, bytes);
    const F top = spread_f(b.top());
    alignas(32) float lanes[INTEGER_ROWS];
    const auto read = [&](const float* p) { std::memcpy(lanes, p, bytes); return load_f(lanes); };
    const auto write = [&](float* p, F v) { store_f(lanes, v); std::memcpy(p, lanes, bytes); };
    Grid8 grid{spread_f(1), zero_f()};
    for (int64_t i = 0; i < b.count; ++i) {
        if (i % b.group == 0) {
            std::fill(lanes, lanes + INTEGER_ROWS, 1.0f);
            float *scale = b.scale + i / b.group * b.rows + first, *zero = b.zero + i / b.group * b.rows + first;
            if (b.given) {
                grid.scale = read(scale);
                grid.zero = read(zero);
            } else {
                grid = integer_range(b, i, x + i * INTEGER_ROWS, missed);
                write(scale, grid.scale);
                write(zero, grid.zero);
            }
        }
        const float* upper = b.upper + i * b.count;
        const F v = load_f(x + i * INTEGER_ROWS), code = integer_code(v, grid, top);
        const F error = over(minus(v, integer_value(code, grid)), spread_f(upper[i]));
        write(b.errors + i * b.rows + first, error);
        store_f(lanes, code);
        for (int64_t r = 0; r < n; ++r) b.codes[i * b.rows + first + r] = uint8_t(lanes[r]);
        for (int64_t j = i + 1; j < b.count; ++j) {
            float* later = x + j * INTEGER_ROWS;
            store_f(later, fma(spread_f(-upper[j]), error, load_f(later)));
        }
    }
}

inline void encode_integers(IntegerBlock& b, int threads) {
    Team::run(Team::useful(threads, b.count * b.rows * 8), [](Team&, int, void* data) {
        IntegerBlock& b = *static_cast<IntegerBlock*>(data);
        std::vector<float> x(static_cast<size_t>(b.count * INTEGER_ROWS)), missed(static_cast<size_t>(b.given ? 0 : b.group * b.trials * INTEGER_ROWS));
        for (int64_t first; (first = b.next.fetch_add(INTEGER_ROWS)) < b.rows;) integer_rows(b, first, x.data(), missed.data());
    }, &b);
}

}  // namespace lorq
