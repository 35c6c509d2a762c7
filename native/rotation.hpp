// Into the basis of a weight and back (lorq.basis): channels in another order, then Walsh-Hadamard transforms of blocks.
// Sums are float32 and rounded once; a block of size n takes log2(n) additions an entry instead of n products.
#pragma once
#include "inputs.hpp"
#include "parallel.hpp"

namespace lorq {

struct Rotation {
    const void *x, *permutation;  // (tokens, in); in whole numbers of `index_bytes`, or null
    void* y;
    int64_t tokens, in, block, skip;
    Type type;
    int index_bytes;
    bool inverse;

    int64_t channel(int64_t j) const {
        if (index_bytes == 2) return static_cast<const int16_t*>(permutation)[j];
        if (index_bytes == 4) return static_cast<const int32_t*>(permutation)[j];
        return static_cast<const int64_t*>(permutation)[j];
    }
};

// The transform of n values over sqrt(n), n a power of two.
inline void hadamard(float* v, int64_t n) {
    for (int64_t half = 1; half < std::min<int64_t>(8, n); half *= 2)
        for (int64_t i = 0; i < n; i += 2 * half)
            for (int64_t j = i; j < i + half; ++j) {
                const float a = v[j], b = v[j + half];
                v[j] = a + b, v[j + half] = a - b;
            }
    for (int64_t half = 8; half < n; half *= 2)
        for (int64_t i = 0; i < n; i += 2 * half)
            for (int64_t j = i; j < i + half; j += 8) {
                const F a = load_f(v + j), b = load_f(v + j + half);
                store_f(v + j, add(a, b)), store_f(v + j + half, minus(a, b));
            }
    const float size = 1.0f / std::sqrt(float(n));
    for (int64_t i = 0; i < n; ++i) v[i] *= size;
}

inline void rotate_job(Team& team, int thread, void* data) {
    const Rotation& r = *static_cast<Rotation*>(data);
    std::vector<float> here(size_t(r.in)), there(r.permutation ? size_t(r.in) : 0);
    int64_t first, last;
    team.share(r.tokens, 1, thread, first, last);
    for (int64_t token = first; token < last; ++token) {
        read_row(Factor{r.x, r.type, nullptr}, token, r.in, here.data());
        if (r.permutation && !r.inverse) {
            for (int64_t j = 0; j < r.in; ++j) there[size_t(j)] = here[size_t(r.channel(j))];
            here.swap(there);
        }
        for (int64_t j = r.skip; r.block && j < r.in; j += r.block) hadamard(&here[size_t(j)], r.block);
        if (r.permutation && r.inverse) {
            for (int64_t j = 0; j < r.in; ++j) there[size_t(r.channel(j))] = here[size_t(j)];
            here.swap(there);
        }
        for (int64_t j = 0; j < r.in; ++j) store_value(r.y, token * r.in + j, here[size_t(j)], r.type);
    }
}

// False, with y untouched, where the permutation names a channel that is not there.
inline bool rotate(Rotation r, int threads) {
    for (int64_t j = 0; r.permutation && j < r.in; ++j)
        if (r.channel(j) < 0 || r.channel(j) >= r.in) return false;
    Team::run(Team::useful(threads, r.tokens * r.in), rotate_job, &r);
    return true;
}

}  // namespace lorq
