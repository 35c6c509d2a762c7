// Products on heap blocks of exactly their size, for the sanitizers to watch; their values against plain loops.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "gguf.hpp"
#include "kernels.hpp"
#include "rotation.hpp"
#include "rounding.hpp"
#include "trellis_product.hpp"

using namespace lorq;

static std::mt19937 source(0);
static uint32_t any() { return source(); }
static float small() { return float(any() % 2001) / 1000.0f - 1.0f; }
static uint16_t half(float v) { return to_half(v); }

template <class T, class Make>
std::vector<T> filled(size_t n, Make make) {
    std::vector<T> v;
    v.reserve(n);  // a block of exactly n
    for (size_t i = 0; i < n; ++i) v.push_back(make());
    return v;
}

static int64_t words_of(int64_t n, int bits) { return (n * bits + 31) / 32; }

static uint32_t code_of(const std::vector<uint32_t>& words, int64_t first, int64_t i, int bits) {
    uint32_t code = 0;
    for (int b = 0; b < bits; ++b) code |= (words[size_t(first + (i * bits + b) / 32)] >> ((i * bits + b) % 32) & 1) << b;
    return code;
}

static int checked = 0;

static void check(const Weight& w, int64_t tokens, int threads, double tolerance) {
    const auto x = filled<float>(size_t(tokens * w.in), small);
    std::vector<float> y(size_t(tokens * w.out)), dense(size_t(w.out * w.in));
    for (int pieces : {1, 2, 3})  // the last is compared
        if (!multiply(w, x.data(), y.data(), tokens, Type::f32, pieces, threads)) std::abort();
    decode(w, dense.data(), 0, w.out, Type::f32, threads);
    std::vector<uint16_t> halves(size_t(w.in));
    decode(w, halves.data(), w.out - 1, 1, Type::bf16, 1);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t o = 0; o < w.out; ++o) {
            double expected = 0, size = 0;
            for (int64_t i = 0; i < w.in; ++i) {
                expected += double(dense[size_t(o * w.in + i)]) * x[size_t(t * w.in + i)];
                size += std::fabs(double(dense[size_t(o * w.in + i)]));
            }
            if (std::fabs(expected - y[size_t(t * w.out + o)]) > tolerance * (size + 1e-3)) {
                std::fprintf(stderr, "bits %d out %ld in %ld group %ld: %g, not %g\n", w.bits, long(w.out), long(w.in),
                             long(w.group_size), double(y[size_t(t * w.out + o)]), expected);
                std::exit(1);
            }
        }
    ++checked;
}

// Three experts on a grid of 2 x 2, the last of four pairs without one.
static void check_experts(int bits, int vector, int threads) {
    const int64_t out = 10, in = 64, group = vector > 1 ? in : 32, rank = 11, expert[] = {2, 0, 1, 3};
    const int16_t cells[] = {0, 1, 1, 1, 1, 0};
    const auto packed = filled<uint32_t>(size_t(3 * out * words_of(in, bits)), any);
    const auto scale = filled<uint16_t>(size_t(3 * out * (in / group)), [] { return half(small()); });
    const auto zero = filled<uint32_t>(size_t(3 * words_of(out, bits) * (in / group)), any);
    const auto codebook = filled<int8_t>(vector > 1 ? size_t(3 * 2 * 2 * vector) << (bits * vector) : 0, [] { return int8_t(any()); });
    const auto tile_scale = filled<uint16_t>(12, [] { return half(0.01f); });
    const auto left = filled<int8_t>(size_t(2 * out * rank), [] { return int8_t(any()); });
    const auto right = filled<int8_t>(size_t(2 * rank * in), [] { return int8_t(any()); });
    const auto scales = filled<uint16_t>(size_t(2 * rank), [] { return half(0.01f * small()); });
    const auto x = filled<float>(size_t(2 * in), small);
    std::vector<float> y(size_t(4 * out)), dense(size_t(out * in));
    Weight w;
    w.out = out, w.in = in, w.bits = bits, w.vector = vector, w.words = words_of(in, bits), w.group_size = group;
    w.packed = packed.data(), w.scale = scale.data();
    if (vector == 1) w.zero = zero.data();
    else w.codebook = codebook.data(), w.codebook_scale = tile_scale.data(), w.codebook_rows = 5, w.codebook_columns = 32;
    const Shared shared{{left.data(), Type::i8, scales.data()}, {right.data(), Type::i8, scales.data()}, int(rank), 2, 2, cells};
    if (!multiply_experts(w, 3, expert, x.data(), y.data(), 2, 2, Type::f32, 3, shared, threads)) std::abort();
    for (int p = 0; p < 4; ++p) {
        const int64_t e = expert[p];
        if (e < 3) decode(w.expert(e), dense.data(), 0, out, Type::f32, 1);
        for (int64_t o = 0; o < out; ++o) {
            double expected = 0;
            for (int64_t i = 0; i < in && e < 3; ++i) {
                double weight = dense[size_t(o * in + i)];
                for (int64_t k = 0; k < rank; ++k) {
                    const int64_t l = cells[2 * e + 1] * rank + k, r = cells[2 * e] * rank + k;
                    weight += double(left[size_t((cells[2 * e + 1] * out + o) * rank + k)]) * from_half(scales[size_t(l)]) *
                              right[size_t(r * in + i)] * from_half(scales[size_t(r)]);
                }
                expected += weight * x[size_t(p / 2 * in + i)];
            }
            if (std::fabs(expected - y[size_t(p * out + o)]) > 1e-4 * (1 + std::fabs(expected))) {
                std::fprintf(stderr, "expert %ld: %g, not %g\n", long(e), double(y[size_t(p * out + o)]), expected);
                std::exit(1);
            }
        }
    }
    ++checked;
}

// Bit `at` of the ring of a sequence's strings (docs/format.md).
static uint32_t bit_of(const std::vector<uint16_t>& packed, int bits, int64_t in, int64_t column, int64_t first_tile, int64_t ring, int64_t at) {
    const int64_t size = 16 * bits, wrapped = (at + ring * size) % (ring * size);
    const int64_t tile = first_tile + wrapped / size, n = wrapped % size;
    return packed[size_t((tile * bits + n / 16) * in + column)] >> (15 - n % 16) & 1;
}

// Trellis codes, window by window and bit by bit.
static void check_trellis(int bits, int window, int64_t out, int64_t in, int64_t length, int threads) {
    const int64_t tiles = (out + 15) / 16, tokens = 3, rank = 3;
    const auto packed = filled<uint16_t>(size_t(tiles * bits * in), [] { return uint16_t(any()); });
    const auto scale = filled<uint16_t>(size_t(out), [] { return half(0.01f * small()); });
    const auto left = filled<int8_t>(size_t(out * rank), [] { return int8_t(any()); });
    const auto right = filled<int8_t>(size_t(rank * in), [] { return int8_t(any()); });
    const auto scales = filled<uint16_t>(size_t(rank), [] { return half(0.002f); });
    const auto x = filled<float>(size_t(tokens * in), small);
    TrellisWeight w{out, in, bits, window, length, packed.data(), scale.data(), {left.data(), Type::i8, scales.data()},
                    {right.data(), Type::i8, scales.data()}, int(rank)};
    std::vector<float> dense(size_t(out * in)), y(size_t(tokens * out));
    std::vector<uint16_t> halves(x.size(), half(0.5f)), half_y(y.size());
    decode(w, dense.data(), 0, out, Type::f32, threads);
    if (!multiply(w, x.data(), y.data(), tokens, Type::f32, threads)) std::abort();
    if (!multiply(w, halves.data(), half_y.data(), tokens, Type::f16, threads)) std::abort();
    for (int64_t o = 0; o < out; ++o)
        for (int64_t i = 0; i < in; ++i) {
            const int64_t row = o % length, ring = length / 16;
            uint32_t n = 0;
            for (int64_t at = (row + 1) * bits - window; at < (row + 1) * bits; ++at)
                n = n << 1 | bit_of(packed, bits, in, i, (o - row) / 16, ring, at);
            n *= 0xC49087BF;
            const int sum = int((n & 255) + (n >> 8 & 255) + (n >> 16 & 255) + (n >> 24)) - 510;
            if (dense[size_t(o * in + i)] != from_half(scale[size_t(o)]) * float(sum) / 128) std::fprintf(stderr, "trellis\n"), std::exit(1);
        }
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t o = 0; o < out; ++o) {
            double expected = 0;
            for (int64_t i = 0; i < in; ++i) {
                double weight = dense[size_t(o * in + i)];
                for (int64_t k = 0; k < rank; ++k)
                    weight += double(left[size_t(o * rank + k)]) * right[size_t(k * in + i)] * std::pow(double(from_half(half(0.002f))), 2);
                expected += weight * x[size_t(t * in + i)];
            }
            if (std::fabs(expected - y[size_t(t * out + o)]) > 1e-5 * (1 + std::fabs(expected)))
                std::fprintf(stderr, "trellis: %g, not %g\n", double(y[size_t(t * out + o)]), expected), std::exit(1);
        }
    ++checked;
}

// Integers in groups under a diagonal factor of 2: nothing is passed on, and what a column missed is known.
static void check_rounding(int bits, int64_t rows, int64_t count, int64_t group, int64_t trials, bool given, int threads) {
    const auto columns = filled<float>(size_t(count * rows), small), shares = filled<float>(size_t(trials), [] { return 0.9f; });
    std::vector<float> upper(size_t(count * count)), hessian(size_t(count * count), 0.25f);
    for (int64_t i = 0; i < count; ++i) upper[size_t(i * count + i)] = 2.0f, hessian[size_t(i * count + i)] = 1.0f;
    const int64_t groups = (count + group - 1) / group;
    std::vector<float> scale(size_t(groups * rows), 0.5f), zero(size_t(groups * rows), 1.0f), errors(size_t(count * rows));
    std::vector<uint8_t> codes(size_t(count * rows));
    IntegerBlock b{columns.data(), upper.data(), trials ? hessian.data() : nullptr, shares.data(), scale.data(), zero.data(),
                   codes.data(), errors.data(), count, rows, group, trials, bits, bits == 3, bits == 8, given};
    encode_integers(b, threads);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t r = 0; r < rows; ++r) {
            const size_t at = size_t(i * rows + r), own = size_t(i / group * rows + r);
            const float missed = (columns[at] - (float(codes[at]) - zero[own]) * scale[own]) / 2.0f;
            if (codes[at] >> bits || std::fabs(missed - errors[at]) > 1e-6f) std::fprintf(stderr, "rounding\n"), std::exit(1);
        }
    ++checked;
}

int main() {
    for (int bits : {1, 3, 8})
        for (int64_t rows : {1, 7, 8, 19})
            for (int64_t trials : {0, 1, 7, 10})
                for (int threads : {1, 3}) {
                    for (const auto& [count, group] : {std::pair<int64_t, int64_t>{12, 4}, {128, 128}, {96, 96}})
                        check_rounding(bits, rows, count, group, trials, false, threads);
                    check_rounding(bits, rows, 12, 256, 0, true, threads);
                }
    for (int bits = 1; bits <= 6; ++bits)
        for (int window : {bits + 4, 12, 16})
            for (const auto& [out, in, length] : {std::array<int64_t, 3>{16, 32, 16}, {37, 77, 48}, {64, 530, 32}, {5, 3, 16}})
                for (int threads : {1, 3})
                    if (length * bits >= window) check_trellis(bits, window, out, in, length, threads);
    for (int threads : {1, 3})
        for (const auto& [bits, vector] : {std::pair{4, 1}, std::pair{3, 1}, std::pair{2, 4}}) check_experts(bits, vector, threads);
    const int64_t shapes[][3] = {{1, 64, 32}, {7, 96, 32}, {5, 576, 64}, {17, 128, 128}, {33, 64, 64}, {3, 160, 32}, {18, 256, 128}};
    for (int bits : {2, 3, 4, 6, 8})
        for (const auto& [out, in, group] : shapes)
            for (bool symmetric : {false, true})
                for (int threads : {1, 3}) {
                    const auto packed = filled<uint32_t>(size_t(out * words_of(in, bits)), any);
                    const auto scale = filled<uint16_t>(size_t(out * (in / group)), [] { return half(0.01f); });
                    const auto zero = filled<uint32_t>(size_t(words_of(out, bits) * (in / group)), any);
                    Weight w;
                    w.out = out, w.in = in, w.bits = bits, w.words = words_of(in, bits), w.group_size = group;
                    w.packed = packed.data(), w.scale = scale.data(), w.zero = symmetric ? nullptr : zero.data();
                    // The decoded matrix against the layout's definition, code by code.
                    std::vector<float> dense(size_t(out * in));
                    decode(w, dense.data(), 0, out, Type::f32, threads);
                    for (int64_t o = 0; o < out; ++o)
                        for (int64_t i = 0; i < in; ++i) {
                            int64_t z = 1 << (bits - 1);
                            if (!symmetric) {
                                std::vector<uint32_t> column;
                                for (int64_t k = 0; k < words_of(out, bits); ++k) column.push_back(zero[size_t(k * (in / group) + i / group)]);
                                z = code_of(column, 0, o, bits);
                            }
                            const float expected = float(int64_t(code_of(packed, o * w.words, i, bits)) - z) * from_half(half(0.01f));
                            if (std::fabs(expected - dense[size_t(o * in + i)]) > 1e-6f) return std::fprintf(stderr, "decode\n"), 1;
                        }
                    check(w, 2, threads, 1e-6);
                    const auto left = filled<int8_t>(size_t(out * 3), [] { return int8_t(any()); });
                    const auto right = filled<int8_t>(size_t(3 * in), [] { return int8_t(0); });
                    const auto scales = filled<uint16_t>(3, [] { return half(0.5f); });
                    w.left = {left.data(), Type::i8, scales.data()}, w.right = {right.data(), Type::i8, scales.data()}, w.rank = 3;
                    check(w, 1, threads, 1e-6);
                }
    for (int bits : {2, 3, 4}) {  // levels, with groups and with scales of low rank
        const int64_t out = 7, in = 72;
        const auto packed = filled<uint32_t>(size_t(out * words_of(in, bits)), any);
        const auto levels = filled<float>(size_t(1) << bits, small);
        const auto scale = filled<uint16_t>(size_t(out * 3), [] { return half(small()); });
        Weight w;
        w.out = out, w.in = in, w.bits = bits, w.words = words_of(in, bits), w.group_size = 24;
        w.packed = packed.data(), w.levels = levels.data(), w.scale = scale.data();
        check(w, 2, 2, 1e-6);
        const auto left = filled<uint16_t>(size_t(out * 5), [] { return half(small()); });
        const auto right = filled<uint16_t>(size_t(5 * in), [] { return half(small()); });
        w.scale = nullptr, w.group_size = in, w.scale_rank = 5;
        w.scale_left = {left.data(), Type::f16, nullptr}, w.scale_right = {right.data(), Type::f16, nullptr};
        check(w, 2, 2, 3e-6);
    }
    for (const auto& [bits, vector] : {std::pair{2, 4}, std::pair{3, 2}, std::pair{1, 8}}) {
        const int64_t out = 6, in = 80;
        const auto packed = filled<uint32_t>(size_t(out * words_of(in, bits)), any);
        const auto codebook = filled<int8_t>(size_t(3 * 5 * vector) << (bits * vector), [] { return int8_t(any()); });
        const auto tile_scale = filled<uint16_t>(15, [] { return half(0.01f); });
        const auto scale = filled<uint16_t>(size_t(out), [] { return half(small()); });
        Weight w;
        w.out = out, w.in = in, w.bits = bits, w.vector = vector, w.words = words_of(in, bits), w.group_size = in;
        w.packed = packed.data(), w.scale = scale.data(), w.codebook = codebook.data(), w.codebook_scale = tile_scale.data();
        w.codebook_rows = 2, w.codebook_columns = 16;
        check(w, 2, 2, 1e-6);
    }
    // Looked up at once where there is an instruction for it: chunks of 64 codes, and of fewer.
    for (const auto& [bits, vector, columns, group] :
         {std::array<int, 4>{3, 2, 256, 768}, {3, 2, 24, 48}, {3, 2, 192, 768}, {4, 2, 128, 384}, {2, 4, 256, 256}, {2, 4, 48, 96}, {2, 4, 16, 768}}) {
        const int64_t out = 48, in = 768, tiles = out / 16 * (in / columns);
        const auto packed = filled<uint32_t>(size_t(out * words_of(in, bits)), any);
        const auto codebook = filled<int8_t>(size_t(tiles * vector) << (bits * vector), [] { return int8_t(any()); });
        const auto tile_scale = filled<uint16_t>(size_t(tiles), [] { return half(small()); });
        const auto scale = filled<uint16_t>(size_t(out * (in / group)), [] { return half(0.01f * small()); });
        const auto left = filled<int8_t>(size_t(out * 3), [] { return int8_t(any()); });
        const auto right = filled<int8_t>(size_t(3 * in), [] { return int8_t(0); });
        const auto scales = filled<uint16_t>(3, [] { return half(0.5f); });
        Weight w;
        w.out = out, w.in = in, w.bits = bits, w.vector = vector, w.words = words_of(in, bits), w.group_size = group;
        w.packed = packed.data(), w.scale = scale.data(), w.codebook = codebook.data(), w.codebook_scale = tile_scale.data();
        w.codebook_rows = 16, w.codebook_columns = columns;
#ifdef __AVX512VBMI__
        if (!looked_up(w)) return std::fprintf(stderr, "not looked up\n"), 1;
#endif
        check(w, 2, 3, 1e-6);
        w.left = {left.data(), Type::i8, scales.data()}, w.right = {right.data(), Type::i8, scales.data()}, w.rank = 3;
        check(w, 1, 1, 1e-6);
    }
    for (const auto& [in, block, skip] : {std::array<int64_t, 3>{12, 4, 0}, {40, 8, 16}, {320, 256, 64}, {7, 0, 0}}) {
        const auto x = filled<float>(size_t(3 * in), small);
        std::vector<int16_t> order(size_t(in), 0);
        for (int64_t j = 0; j < in; ++j) order[size_t(j)] = int16_t(in - 1 - j);
        std::vector<float> y(x.size()), back(x.size());
        if (!rotate({x.data(), order.data(), y.data(), 3, in, block, skip, Type::f32, 2, false}, 2)) std::abort();
        if (!rotate({y.data(), order.data(), back.data(), 3, in, block, skip, Type::f32, 2, true}, 2)) std::abort();
        for (size_t i = 0; i < x.size(); ++i)
            if (std::fabs(x[i] - back[i]) > 1e-5f) return std::fprintf(stderr, "rotate\n"), 1;
    }
    for (const int64_t rows : {1, 64, 70})  // steps of groups, with levels and without
        for (const bool uneven : {false, true}) {
            const int64_t groups = 2, size = 3, trials = 4;
            const auto weight = filled<float>(size_t(groups * size * rows), small);
            const auto step = filled<float>(size_t(groups * trials * rows), [] { return 0.1f + std::fabs(small()); });
            const auto low = filled<float>(step.size(), small), upper = filled<float>(size_t(groups * size * size), [] { return 1.0f; });
            const std::vector<float> levels{-2, -1, 0, 3};
            std::vector<float> codes(weight.size()), costs(size_t(groups * rows));
            std::vector<int64_t> best(costs.size());
            GroupSearch s{weight.data(), step.data(), low.data(), upper.data(), uneven ? levels.data() : nullptr, codes.data(),
                          best.data(), costs.data(), groups, size, trials, rows, 2, 3};
            search_groups(s, 2);
            for (const float code : codes)
                if (!(code >= 0 && code <= 3)) return std::fprintf(stderr, "steps\n"), 1;
            for (const int64_t trial : best)
                if (trial < 0 || trial >= trials) return std::fprintf(stderr, "trials\n"), 1;
        }
    std::printf("%d products checked\n", checked);
}
