// The quantized linear on a CPU. A module is compiled from this for each instruction set: one library for all of them
// would share the inline functions of the standard library, compiled for whichever set the linker took.
#pragma once
#include "codebooks.hpp"
#include "integer.hpp"
#include "parallel.hpp"

namespace lorq {

// z = (right x) times both factors' scales: what is left to do is the left factor.
struct Projection {
    Factor right, left;
    int rank;
    const Inputs* x;
    int64_t width;
    float* z;
};

// One input of a weight, and where its output goes.
struct Pair {
    const Inputs* x;
    const float* z;      // what the right factor makes of it; null without a low-rank part
    const float* mixed;  // what the scale's right factor makes of it; null without one
    void* y;
};

// A weight and its pairs, first .. first + count - 1 of a call's.
struct Product {
    Weight w;
    int64_t first, count;
};

struct Call {
    Type type;   // of the outputs
    int pieces;  // bytes of each input; 0 for products in floating point
    std::vector<Projection> projections;
    std::vector<Pair> pairs;
    std::vector<Product> products;

    int64_t blocks() const {
        int64_t n = 0;
        for (const Product& p : products) n += (p.w.out + BLOCK - 1) / BLOCK;
        return n;
    }
    int64_t weights() const {
        int64_t n = 0;
        for (const Product& p : products) n += p.count * p.w.out * p.w.in;
        return n;
    }
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
void whole_block(int pieces, const Weight& w, const Pair& p, int64_t row, int64_t count, float* steps, float* y) {
    if (pieces == 1) whole_block<BITS, 1>(w, *p.x, p.z, row, count, steps, y);
    else if (pieces == 2) whole_block<BITS, 2>(w, *p.x, p.z, row, count, steps, y);
    else whole_block<BITS, 3>(w, *p.x, p.z, row, count, steps, y);
}

inline void multiply_block(int pieces, const Weight& w, const Tables& t, Planes& planes, const Pair& p, int64_t row, int64_t count,
                           float* scratch, float* y) {
    if (pieces && w.vector == 1) {
        if (w.bits == 2) return whole_block<2>(pieces, w, p, row, count, scratch, y);
        if (w.bits == 3) return whole_block<3>(pieces, w, p, row, count, scratch, y);
        if (w.bits == 4) return whole_block<4>(pieces, w, p, row, count, scratch, y);
        if (w.bits == 6) return whole_block<6>(pieces, w, p, row, count, scratch, y);
        return whole_block<8>(pieces, w, p, row, count, scratch, y);
    }
    if (w.scale_rank) multiply_scaled_rows(w, t, p.mixed, row, count, scratch, y);
    else if (pieces) multiply_vectors(pieces, w, planes, *p.x, row, count, y);
    else for (int64_t r = 0; r < count; ++r)
        y[r] = w.vector == 1   ? multiply_row<1>(w, t, *p.x, row + r)
               : w.vector == 2 ? multiply_row<2>(w, t, *p.x, row + r)
               : w.vector == 4 ? multiply_row<4>(w, t, *p.x, row + r)
                               : multiply_row<8>(w, t, *p.x, row + r);
    for (int64_t r = 0; w.rank && r < count; ++r) y[r] += sum_row(w.left, row + r, p.z, w.rank);
}

// The ranks of all projections, shared between the threads.
inline void project(const std::vector<Projection>& projections, const Team& team, int thread) {
    int64_t total = 0, begin, end, before = 0;
    for (const Projection& p : projections) total += p.rank;
    team.share(total, 1, thread, begin, end);
    for (const Projection& p : projections) {
        for (int64_t k = std::max<int64_t>(begin - before, 0); k < std::min<int64_t>(end - before, p.rank); ++k) {
            p.z[k] = sum_row(p.right, k, p.x->x.data(), p.width);
            if (p.right.scale) p.z[k] *= from_half(p.right.scale[k]);
            if (p.left.scale) p.z[k] *= from_half(p.left.scale[k]);
        }
        before += p.rank;
    }
}

inline void multiply_job(Team& team, int thread, void* data) {
    const Call& c = *static_cast<const Call*>(data);
    if (!c.projections.empty()) {
        project(c.projections, team, thread);
        team.wait();
    }
    int64_t begin, end, before = 0;
    team.share(c.blocks(), 1, thread, begin, end);
    std::vector<float> scratch;
    for (const Product& product : c.products) {
        const Weight& w = product.w;
        const int64_t blocks = (w.out + BLOCK - 1) / BLOCK;
        const int64_t first = std::max<int64_t>(begin - before, 0), last = std::min(end - before, blocks);
        before += blocks;
        if (first >= last) continue;
        const Tables tables(w);
        Planes planes;
        scratch.resize(size_t(std::max<int64_t>(MOST_ROWS * (w.groups() + 16), (BLOCK + 1) * w.scale_rank)));
        for (int64_t row = first * BLOCK; row < std::min(last * BLOCK, w.out); row += BLOCK) {
            const int64_t count = std::min(BLOCK, w.out - row);
            for (int64_t i = product.first; i < product.first + product.count; ++i) {
                float y[BLOCK];
                multiply_block(c.pieces, w, tables, planes, c.pairs[i], row, count, scratch.data(), y);
                store_values(c.pairs[i].y, row, y, count, c.type);
            }
        }
    }
}

// Bytes of each input that a product takes; 0 for floating point. `pieces` is for whole numbers; vectors of a codebook keep
// as many as the inputs have.
inline int pieces_of(const Weight& w, Type type, int pieces) {
    if (w.whole_numbers()) return pieces;
    return looked_up(w) ? type == Type::f32 ? 3 : 2 : 0;
}

// The inputs of several tokens as weights of one format read them, kept from call to call: making room costs as much as a
// small layer. Null where they are not finite or all but zero: whole numbers cannot carry that.
inline const std::vector<Inputs>* read_tokens(const Weight& w, const void* x, int64_t tokens, Type type, int pieces) {
    static thread_local std::vector<Inputs> inputs;
    if (int64_t(inputs.size()) < tokens) inputs.resize(size_t(tokens));
    Weight as_read = w;
    if (w.vector > 1 && pieces) as_read.group_size = columns_of_chunk(w);  // a step for each chunk
    for (int64_t token = 0; token < tokens; ++token) {
        if (!read_inputs(as_read, x, token, type, pieces, inputs[token])) return nullptr;
        if (pieces && w.vector > 1) place_vectors(w, pieces, inputs[token]);
        else if (pieces) place(w, pieces, inputs[token]);
    }
    return &inputs;
}

inline void* entry(void* y, int64_t i, Type type) { return static_cast<char*>(y) + i * (type == Type::f32 ? 4 : 2); }

// y = W x for tokens (tokens, in) -> (tokens, out). False, with y unfinished, where `read_tokens` has nothing. `pieces`
// bytes are kept of each input, where codes are whole numbers.
inline bool multiply(const Weight& w, const void* x, void* y, int64_t tokens, Type type, int pieces, int threads) {
    pieces = pieces_of(w, type, pieces);
    const std::vector<Inputs>* inputs = read_tokens(w, x, tokens, type, pieces);
    if (!inputs) return false;
    Call call{type, pieces, {}, {}, {{w, 0, tokens}}};
    std::vector<float> z(size_t(tokens * w.rank));
    std::vector<std::vector<float>> mixed(w.scale_rank ? size_t(tokens) : 0);
    for (int64_t token = 0; token < tokens; ++token) {
        const Inputs* own = &(*inputs)[token];
        if (w.rank) call.projections.push_back({w.right, w.left, w.rank, own, w.in, &z[token * w.rank]});
        if (w.scale_rank) mix(w, own->x.data(), mixed[token]);
        call.pairs.push_back({own, z.data() + token * w.rank, w.scale_rank ? mixed[token].data() : nullptr, entry(y, token * w.out, type)});
    }
    Team::run(Team::useful(threads, call.weights()), multiply_job, &call);
    return true;
}

// The factors that experts share: expert e adds left_j (right_i x) of its cell (i, j).
struct Shared {
    Factor left, right;  // (grid columns, out, rank), (grid rows, rank, in), their scales (grid columns or rows, rank)
    int rank = 0;        // 0: none
    int64_t rows = 0, columns = 0;   // of the grid
    const int16_t* cells = nullptr;  // (experts, 2)

    bool has(int64_t e) const { return cells[2 * e] >= 0 && cells[2 * e] < rows && cells[2 * e + 1] >= 0 && cells[2 * e + 1] < columns; }
};

// Each token's pairs lie one after the other, `places` of them: pair p is token p / places times the weight of expert[p].
// `w` is the first of the experts' weights, which lie one after the other. Outputs of pairs without an expert become 0.
// False, with y unfinished, where `read_tokens` has nothing, or an expert lies outside the grid.
inline bool multiply_experts(const Weight& w, int64_t experts, const int64_t* expert, const void* x, void* y, int64_t tokens,
                             int64_t places, Type type, int pieces, const Shared& shared, int threads) {
    pieces = pieces_of(w, type, pieces);
    const std::vector<Inputs>* inputs = read_tokens(w, x, tokens, type, pieces);
    if (!inputs) return false;
    std::vector<int64_t> order;
    for (int64_t p = 0; p < tokens * places; ++p) {
        if (expert[p] >= 0 && expert[p] < experts) order.push_back(p);
        else std::memset(entry(y, p * w.out, type), 0, size_t(w.out) * (type == Type::f32 ? 4 : 2));
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return expert[a] < expert[b]; });
    Call call{type, pieces, {}, {}, {}};
    std::vector<float> z(order.size() * size_t(shared.rank));
    for (size_t i = 0; i < order.size(); ++i) {
        const int64_t p = order[i], e = expert[p];
        const Inputs* own = &(*inputs)[p / places];
        if (i == 0 || expert[order[i - 1]] != e) call.products.push_back({w.expert(e), int64_t(i), 0});
        Product& product = call.products.back();
        if (shared.rank) {
            if (!shared.has(e)) return false;
            const int64_t row = shared.cells[2 * e], column = shared.cells[2 * e + 1], rank = shared.rank;
            product.w.rank = shared.rank;
            product.w.left = shared.left.from(column * w.out * rank, column * rank);
            const Factor right = shared.right.from(row * rank * w.in, row * rank);
            call.projections.push_back({right, product.w.left, shared.rank, own, w.in, &z[i * size_t(rank)]});
        }
        ++product.count;
        call.pairs.push_back({own, z.data() + i * size_t(shared.rank), nullptr, entry(y, p * w.out, type)});
    }
    Team::run(Team::useful(threads, call.weights()), multiply_job, &call);
    return true;
}

struct Decoding {
    const Weight& w;
    void* to;
    int64_t first, count;
    Type type;
    std::vector<float> mixed;

    LORQ_INLINE void store(int64_t i, int64_t j, F value) const { store_eight(to, i * w.in + j, value, type); }
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
    for (; i < last; i += SIDE, left += SIDE * w.scale_rank) {
        WideF scale[N];
        const uint8_t* rows[SIDE];
        rows_from(w, d.first + i, last - i, rows);
        scales_of<N>(left, w.scale_rank, w.scale_rank, &d.mixed[size_t(j * w.scale_rank)], scale);
        LORQ_UNROLL for (int n = 0; n < N; ++n) {
            const WideF values = times(side_values(w, t, rows, j + 8 * n), scale[n]);
            for (int s = 0; s < SIDE && i + s < last; ++s) d.store(i + s, j + 8 * n, row_of(values, s));
        }
    }
}

inline void decode_job(Team& team, int thread, void* data) {
    const Decoding& d = *static_cast<Decoding*>(data);
    const Weight& w = d.w;
    const Tables tables(w);
    std::vector<float> left(size_t((BLOCK + 1) * w.scale_rank));
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
