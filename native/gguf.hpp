// The search for steps of GGUF's groups (src/lorq/core/rounding/gguf_fit.py): every trial rounds a group column by
// column, passing errors on inside it, and the cheapest one is kept.
#pragma once
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <vector>

#include "parallel.hpp"
#include "simd.hpp"

namespace lorq {

// Groups of columns, the weights of a column contiguous. A code stands for step level(code) - low.
struct GroupSearch {
    const float* weight;  // (groups, size, rows)
    const float* step;    // (groups, trials, rows)
    const float* low;     // (groups, trials, rows); null where nothing is subtracted
    const float* upper;   // (groups, size, size): of the factor of the inverse Hessian; null where no error is passed on
    const float* levels;  // (top + 1,): levels that are not evenly spaced, rising; null where level(c) = c - zero
    float* codes;         // (groups, size, rows): out, those of the cheapest trial, of equals the first
    int64_t* best;        // (groups, rows): out, which trial that is
    float* costs;         // (groups, rows): out, what it costs
    int64_t groups, size, trials, rows;
    int zero, top;
    std::atomic<int64_t> next{0};
};

constexpr int64_t GROUP_ROWS = 64;  // whose weights and codes of a group stay in the fastest cache

// Added and taken away again: to nearest, ties to even, of numbers below 2^22.
constexpr float TO_NEAREST = 12582912.0f;

// Buffers of one thread, (size, GROUP_ROWS) each.
struct GroupBuffers {
    explicit GroupBuffers(int64_t size) : weight(size * GROUP_ROWS), codes(size * GROUP_ROWS) {}
    std::vector<float> weight, codes;
};

// Codes of one column, what they stand for under a step of 1, and what it missed.
template <bool LEVELS>
LORQ_INLINE void round_column(const GroupSearch& s, const float* weight, const float* step, const float* low, float* codes,
                              float* error) {
    const float zero = float(s.zero), top = float(s.top);
    float wanted[GROUP_ROWS], level[GROUP_ROWS];
    for (int64_t r = 0; r < GROUP_ROWS; ++r) {
        const float q = (weight[r] + low[r]) / step[r];
        wanted[r] = q == q ? q : 0.0f;  // 0 / 0: any code will do
    }
    if (LEVELS) {
        std::fill(codes, codes + GROUP_ROWS, 0.0f);
        std::fill(level, level + GROUP_ROWS, s.levels[0]);
        for (int k = 0; k < s.top; ++k) {
            const float middle = (s.levels[k] + s.levels[k + 1]) / 2, further = s.levels[k + 1] - s.levels[k];
            for (int64_t r = 0; r < GROUP_ROWS; ++r) {
                codes[r] += wanted[r] > middle ? 1.0f : 0.0f;
                level[r] += wanted[r] > middle ? further : 0.0f;
            }
        }
    } else {
        for (int64_t r = 0; r < GROUP_ROWS; ++r) {
            float q = wanted[r] + zero;
            q = q > 0 ? q : 0.0f;
            q = q < top ? q : top;
            codes[r] = (q + TO_NEAREST) - TO_NEAREST;
            level[r] = codes[r] - zero;
        }
    }
    for (int64_t r = 0; r < GROUP_ROWS; ++r) error[r] = weight[r] - (level[r] * step[r] - low[r]);
}

// One trial of a group in GROUP_ROWS rows; what it costs is added to `costs`.
template <bool LEVELS>
void run_trial(const GroupSearch& s, const float* upper, const float* step, const float* low, GroupBuffers& b, float* costs) {
    float error[GROUP_ROWS];
    for (int64_t i = 0; i < s.size; ++i) {
        round_column<LEVELS>(s, &b.weight[i * GROUP_ROWS], step, low, &b.codes[i * GROUP_ROWS], error);
        if (upper) {
            const float diagonal = upper[i * s.size + i];
            for (int64_t r = 0; r < GROUP_ROWS; ++r) error[r] /= diagonal;
            for (int64_t j = i + 1; j < s.size; ++j) {
                float* later = &b.weight[j * GROUP_ROWS];
                const float factor = upper[i * s.size + j];
                for (int64_t r = 0; r < GROUP_ROWS; ++r) later[r] -= factor * error[r];
            }
        }
        for (int64_t r = 0; r < GROUP_ROWS; ++r) costs[r] += error[r] * error[r];
    }
}

template <bool LEVELS>
void search_rows(const GroupSearch& s, int64_t group, int64_t first, GroupBuffers& b) {
    const int64_t count = std::min(GROUP_ROWS, s.rows - first);
    const float* weight = s.weight + group * s.size * s.rows + first;
    float least[GROUP_ROWS], costs[GROUP_ROWS], step[GROUP_ROWS], low[GROUP_ROWS] = {};
    int64_t best[GROUP_ROWS] = {};
    std::fill(least, least + GROUP_ROWS, FLT_MAX);
    std::fill(step, step + GROUP_ROWS, 1.0f);  // rows that fill the last buffer
    for (int64_t t = 0; t < s.trials; ++t) {
        const int64_t at = (group * s.trials + t) * s.rows + first;
        std::copy_n(s.step + at, count, step);
        if (s.low) std::copy_n(s.low + at, count, low);
        for (int64_t i = 0; i < s.size; ++i) std::copy_n(weight + i * s.rows, count, &b.weight[i * GROUP_ROWS]);
        std::fill(costs, costs + GROUP_ROWS, 0.0f);
        run_trial<LEVELS>(s, s.upper ? s.upper + group * s.size * s.size : nullptr, step, low, b, costs);
        for (int64_t i = 0; i < s.size; ++i) {
            float* codes = s.codes + (group * s.size + i) * s.rows + first;
            const float* own = &b.codes[i * GROUP_ROWS];
            for (int64_t r = 0; r < count; ++r) codes[r] = t == 0 || costs[r] < least[r] ? own[r] : codes[r];
        }
        for (int64_t r = 0; r < GROUP_ROWS; ++r) {
            const bool better = t == 0 || costs[r] < least[r];
            best[r] = better ? t : best[r];
            least[r] = better ? costs[r] : least[r];
        }
    }
    std::copy_n(best, count, s.best + group * s.rows + first);
    std::copy_n(least, count, s.costs + group * s.rows + first);
}

inline void search_groups(GroupSearch& s, int threads) {
    Team::run(Team::useful(threads, s.groups * s.size * s.rows * s.trials), [](Team&, int, void* data) {
        GroupSearch& s = *static_cast<GroupSearch*>(data);
        GroupBuffers buffers(s.size);
        const int64_t each = (s.rows + GROUP_ROWS - 1) / GROUP_ROWS;
        for (int64_t n; (n = s.next.fetch_add(1)) < s.groups * each;) {
            const auto rows = s.levels ? search_rows<true> : search_rows<false>;
            rows(s, n / each, n % each * GROUP_ROWS, buffers);
        }
    }, &s);
}

}  // namespace lorq
