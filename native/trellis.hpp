// The encoder of trellis codes (src/lorq/core/rounding/trellis.py): Viterbi's search down the rows of a column, and
// GPTQ's feedback from a column to those that follow it in a block.
#pragma once
#include <atomic>
#include <cfloat>
#include <cstring>

#include "parallel.hpp"
#include "simd.hpp"

namespace lorq {

// A block of columns, each contiguous. Rows are cut into sequences of `length`, whose codes depend on nothing outside.
struct TrellisBlock {
    float* columns;       // (count, rows): what is to be rounded; each becomes what it was when its turn came
    const float* scale;   // (rows,)
    const float* upper;   // (count, count): of the factor of the inverse Hessian
    const float* values;  // (2^window,): what a window stands for under a scale of 1
    uint8_t* codes;       // (count, rows): out
    float* errors;        // (count, rows): out; what a column missed, over the diagonal of `upper`
    int64_t count, rows, length;
    int bits, window;
    std::atomic<int64_t> next{0};
};

#ifdef LORQ_512
constexpr int STATES = 16;  // in a register
using Costs = __m512;
inline Costs load_costs(const float* p) { return _mm512_loadu_ps(p); }
inline void store_costs(float* p, Costs v) { _mm512_storeu_ps(p, v); }
inline Costs spread_costs(float v) { return _mm512_set1_ps(v); }
inline Costs least(Costs a, Costs b) { return _mm512_min_ps(a, b); }
inline Costs missed(Costs target, Costs scale, Costs value) { return _mm512_fnmadd_ps(scale, value, target); }
inline Costs plus_square(Costs d, Costs cost) { return _mm512_fmadd_ps(d, d, cost); }
// Lane i has p[i >> BITS].
template <int BITS>
inline Costs spread_costs(const float* p) {
    if (BITS >= 4) return _mm512_set1_ps(*p);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(lane, BITS), _mm512_loadu_ps(p));
}
#else
constexpr int STATES = 8;
using Costs = F;
inline Costs load_costs(const float* p) { return load_f(p); }
inline void store_costs(float* p, Costs v) { store_f(p, v); }
inline Costs spread_costs(float v) { return spread_f(v); }
inline Costs least(Costs a, Costs b) { return smaller(a, b); }
#ifdef __AVX2__
inline Costs missed(Costs target, Costs scale, Costs value) { return _mm256_fnmadd_ps(scale, value, target); }
#else
inline Costs missed(Costs target, Costs scale, Costs value) { return minus(target, times(scale, value)); }
#endif
inline Costs plus_square(Costs d, Costs cost) { return fma(d, d, cost); }
template <int BITS>
inline Costs spread_costs(const float* p) {
    if (BITS >= 3) return spread_f(*p);
    alignas(32) static constexpr uint32_t lane[2][8] = {{0, 0, 1, 1, 2, 2, 3, 3}, {0, 0, 0, 0, 1, 1, 1, 1}};
    return pick(load_f(p), load_i(lane[BITS - 1]));
}
#endif

// The search in one sequence: targets, scales and values as in TrellisBlock.
//
// A state is a window: the last `window` bits of the codes so far. costs[t][g] is the least cost of the rows before t
// that ends in any window whose lower window - BITS bits are g; those bits and the next code are the next window. No way
// back is stored: it is found again from the costs.
template <int BITS>
class Search {
   public:
    Search(const float* values, int window, int64_t rows)
        : values_(values), groups_(int64_t(1) << (window - BITS)), costs_((rows + 1) * groups_ + STATES) {}

    // From every state, or from one whose lower bits are `start`.
    void begin(int64_t start) {
        std::fill(costs_.begin(), costs_.begin() + groups_, start < 0 ? 0.0f : FLT_MAX / 4);
        if (start >= 0) costs_[start] = 0;
    }

    void step(int64_t t, float target, float scale) {
        const float *from = &costs_[t * groups_];
        float *to = &costs_[(t + 1) * groups_];
        const Costs x = spread_costs(target), s = spread_costs(scale);
        constexpr int SIDE_BY_SIDE = 2;
        if (groups_ % (SIDE_BY_SIDE * STATES) == 0) {
            for (int64_t g = 0; g < groups_; g += SIDE_BY_SIDE * STATES) reach<SIDE_BY_SIDE>(from, to, g, x, s);
        } else {
            for (int64_t g = 0; g < groups_; g += STATES) reach<1>(from, to, g, x, s);
        }
    }

    int64_t cheapest(int64_t t) const {
        const float* last = &costs_[t * groups_];
        return std::min_element(last, last + groups_) - last;
    }

    // The window after row t - 1 of the cheapest way to `lower`, its lower bits; of equals, the lowest.
    int64_t back(int64_t t, int64_t lower, float target, float scale) const {
        const float* from = &costs_[(t - 1) * groups_];
        // A cost is not negative: its bits are in its order, and the number of its window decides after them. The least
        // of whole numbers takes no branch, which nothing could predict.
        uint64_t ways[1 << BITS];
        LORQ_UNROLL
        for (int64_t h = 0; h < (1 << BITS); ++h) {
            const int64_t state = h * groups_ + lower;
            const float d = target - scale * values_[state], cost = from[state >> BITS] + d * d;
            uint32_t bits;
            std::memcpy(&bits, &cost, 4);
            ways[h] = (uint64_t(bits) << 32) | uint64_t(h);
        }
        LORQ_UNROLL
        for (int half = (1 << BITS) / 2; half > 0; half /= 2)
            LORQ_UNROLL
            for (int h = 0; h < half; ++h) ways[h] = std::min(ways[h], ways[h + half]);
        return int64_t(uint32_t(ways[0])) * groups_ + lower;
    }

   private:
    template <int N>
    LORQ_INLINE void reach(const float* from, float* to, int64_t g, Costs x, Costs s) const {
        Costs least_of[N];
        LORQ_UNROLL
        for (int n = 0; n < N; ++n) least_of[n] = spread_costs(FLT_MAX);
        for (int64_t h = 0; h < (1 << BITS); ++h) {
            LORQ_UNROLL
            for (int n = 0; n < N; ++n) {
                const int64_t state = h * groups_ + g + n * STATES;
                const Costs d = missed(x, s, load_costs(values_ + state));
                least_of[n] = least(least_of[n], plus_square(d, spread_costs<BITS>(from + (state >> BITS))));
            }
        }
        LORQ_UNROLL
        for (int n = 0; n < N; ++n) store_costs(to + g + n * STATES, least_of[n]);
    }

    const float* values_;
    const int64_t groups_;
    std::vector<float> costs_;
};

// Codes of one sequence, whose first windows reach around to its last codes (tail-biting). What the windows have in
// common at the seam is taken from a search of its own, of `around` rows on both sides of it.
template <int BITS>
void encode_sequence(Search<BITS>& search, const float* values, int window, const float* targets, const float* scale,
                     int64_t length, uint8_t* codes, float* decoded) {
    const int64_t lower_bits = (int64_t(1) << (window - BITS)) - 1;
    const int64_t around = std::min<int64_t>(length, 12 + 2 * window / BITS);
    const auto row = [&](int64_t t) { return (t + length - around) % length; };
    search.begin(-1);
    for (int64_t t = 0; t < 2 * around; ++t) search.step(t, targets[row(t)], scale[row(t)]);
    int64_t lower = search.cheapest(2 * around);
    for (int64_t t = 2 * around; t > around; --t) lower = search.back(t, lower, targets[row(t - 1)], scale[row(t - 1)]) >> BITS;
    search.begin(lower);
    for (int64_t t = 0; t < length; ++t) search.step(t, targets[t], scale[t]);
    for (int64_t t = length; t > 0; --t) {
        const int64_t state = search.back(t, lower, targets[t - 1], scale[t - 1]);
        codes[t - 1] = uint8_t(state & ((1 << BITS) - 1));
        decoded[t - 1] = scale[t - 1] * values[state];
        lower = (state >> BITS) & lower_bits;
    }
}

template <int BITS>
void trellis_job(Team&, int, void* data) {
    TrellisBlock& b = *static_cast<TrellisBlock*>(data);
    const int64_t around = std::min<int64_t>(b.length, 12 + 2 * b.window / BITS);
    Search<BITS> search(b.values, b.window, std::max(b.length, 2 * around));
    std::vector<float> decoded(b.length);
    for (int64_t first; (first = b.next.fetch_add(1) * b.length) < b.rows;) {
        for (int64_t i = 0; i < b.count; ++i) {
            float* column = b.columns + i * b.rows + first;
            float* error = b.errors + i * b.rows + first;
            encode_sequence(search, b.values, b.window, column, b.scale + first, b.length, b.codes + i * b.rows + first,
                            decoded.data());
            const float* upper = b.upper + i * b.count;
            for (int64_t r = 0; r < b.length; ++r) error[r] = (column[r] - decoded[r]) / upper[i];
            for (int64_t j = i + 1; j < b.count; ++j) {
                float* later = b.columns + j * b.rows + first;
                const float factor = upper[j];
                for (int64_t r = 0; r < b.length; ++r) later[r] -= factor * error[r];
            }
        }
    }
}

inline void encode_trellis(TrellisBlock& b, int threads) {
    static constexpr Job jobs[] = {trellis_job<1>, trellis_job<2>, trellis_job<3>, trellis_job<4>, trellis_job<5>, trellis_job<6>};
    Team::run(int(std::min<int64_t>(threads, b.rows / b.length)), jobs[b.bits - 1], &b);
}

}  // namespace lorq
