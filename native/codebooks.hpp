// Vector codebooks by products of bytes, where one instruction looks up 64 bytes (AVX-512 with VBMI). What a code stands
// for is looked up one place of its vector after the other, 64 codes at once, and multiplied by the inputs of that place,
// as whole numbers are (integer.hpp). Entries have a sign, the products want none: they count from -128, and so do the
// sums begin. Elsewhere, and for other shapes, codebooks are decoded to floating point (floating.hpp).
#pragma once
#include "floating.hpp"

namespace lorq {

constexpr int64_t LOOKED_UP = 64;  // codes at once

// Codes of a chunk, all under one scale and one codebook: as many as fit and begin at whole bytes; 0 where none do.
inline int64_t codes_of_chunk(const Weight& w) {
    const int64_t run = scale_run(w) / w.vector;
    for (int64_t codes = std::min(LOOKED_UP, run) / 4 * 4; codes; codes -= 4)
        if (run % codes == 0) return codes;
    return 0;
}
inline int64_t columns_of_chunk(const Weight& w) { return codes_of_chunk(w) * w.vector; }

// Whether a weight is multiplied so.
inline bool looked_up(const Weight& w) {
#ifdef __AVX512VBMI__
    const int width = w.bits * w.vector;
    if (!(w.vector == 2 && (width == 6 || width == 8)) && !(w.vector == 4 && width == 8)) return false;
    return codes_of_chunk(w) && w.codebook_rows % BLOCK == 0;
#else
    (void)w;
    return false;
#endif
}

// Whether inputs meet a weight as bytes.
inline bool by_bytes(const Weight& w) { return w.whole_numbers() || looked_up(w); }

#ifdef __AVX512VBMI__

// The codebooks of a row of tiles: of each tile and place the bytes of all entries, counted from -128.
class Planes {
   public:
    int64_t codes = 0;  // of a chunk

    const uint8_t* of(const Weight& w, int64_t row) {
        if (!codes) codes = codes_of_chunk(w);
        const int64_t tile_row = row / w.codebook_rows;
        if (tile_row != have_) fill(w, tile_row);
        have_ = tile_row;
        return bytes_.data();
    }

   private:
    int64_t have_ = -1;
    std::vector<uint8_t> bytes_;

    // One byte of each entry; there are 64 entries at least.
    template <int VECTOR>
    static void pick_bytes(const int8_t* from, int place, int64_t entries, uint8_t* to) {
        const __m128i shift = _mm_cvtsi32_si128(8 * place);
        for (int64_t e = 0; e < entries; e += 64 / VECTOR) {
            const __m512i v = _mm512_xor_si512(_mm512_loadu_si512(from + e * VECTOR), _mm512_set1_epi8(-128));
            if constexpr (VECTOR == 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + e), _mm512_cvtepi16_epi8(_mm512_srl_epi16(v, shift)));
            else _mm_storeu_si128(reinterpret_cast<__m128i*>(to + e), _mm512_cvtepi32_epi8(_mm512_srl_epi32(v, shift)));
        }
    }

    void fill(const Weight& w, int64_t tile_row) {
        const int64_t entries = int64_t(1) << (w.bits * w.vector), tiles = w.in / w.codebook_columns;
        const int8_t* from = w.codebook + tile_row * tiles * entries * w.vector;
        bytes_.resize(size_t(tiles * entries * w.vector));
        uint8_t* to = bytes_.data();
        for (int64_t tile = 0; tile < tiles; ++tile, from += entries * w.vector)
            for (int v = 0; v < w.vector; ++v, to += entries) {
                if (w.vector == 2) pick_bytes<2>(from, v, entries, to);
                else pick_bytes<4>(from, v, entries, to);
            }
    }
};

// Bytes of each chunk, place and piece in the order of the codes, and of each chunk and piece where its sums begin.
inline void place_vectors(const Weight& w, int pieces, Inputs& x) {
    const int64_t codes = codes_of_chunk(w), chunks = w.in / (codes * w.vector);
    x.pieces.assign(size_t(chunks * w.vector * pieces * LOOKED_UP), 0);
    x.start.assign(size_t(chunks * pieces * 16), 0);
    for (int64_t c = 0; c < chunks; ++c)
        for (int64_t j = 0; j < codes; ++j)
            for (int v = 0; v < w.vector; ++v) {
                int32_t rest = x.whole[size_t((c * codes + j) * w.vector + v)];
                for (int k = 0; k < pieces; ++k) {
                    const int8_t low = k + 1 < pieces ? int8_t(rest & 255) : int8_t(rest);
                    x.pieces[size_t(((c * w.vector + v) * pieces + k) * LOOKED_UP + j)] = low;
                    x.start[size_t((c * pieces + k) * 16 + j / 4)] -= 128 * low;
                    rest = (rest - low) >> 8;
                }
            }
}

// 64 codes, a byte each; above those of 6 bits are others'. Nothing past `bytes` is read.
template <int WIDTH>
LORQ_INLINE __m512i load_codes(const uint8_t* from, __mmask64 bytes) {
    const __m512i v = _mm512_maskz_loadu_epi8(bytes, from);
    if constexpr (WIDTH == 8) return v;
    alignas(64) static const struct Order {  // eight codes are six bytes, to the lower ones of 64 bits
        uint8_t at[64];
        constexpr Order() : at() {
            for (int i = 0; i < 64; ++i) at[i] = uint8_t(i / 8 * 6 + (i % 8 < 6 ? i % 8 : 0));
        }
    } order;
    const __m512i lanes = _mm512_permutexvar_epi8(_mm512_load_si512(order.at), v);
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2a241e18120c0600), lanes);
}

// What 64 codes stand for in one place of their vector.
template <int WIDTH>
LORQ_INLINE __m512i look_up(const uint8_t* plane, __m512i codes) {
    const auto quarter = [&](int i) { return _mm512_loadu_si512(plane + 64 * i); };
    if constexpr (WIDTH == 6) return _mm512_permutexvar_epi8(codes, quarter(0));
    const __m512i low = _mm512_permutex2var_epi8(quarter(0), codes, quarter(1));
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(codes), _mm512_permutex2var_epi8(quarter(2), codes, quarter(3)));
}

// ROWS rows from `row` on, all of one row of tiles.
template <int VECTOR, int WIDTH, int PIECES, int ROWS>
void multiply_vectors(const Weight& w, int64_t codes, const uint8_t* planes, const Inputs& x, int64_t row, float* y) {
    const int64_t columns = codes * VECTOR, bytes = codes * WIDTH / 8, row_bytes = 4 * w.words;
    const int64_t chunks = w.in / columns, of_tile = w.codebook_columns / columns, of_group = w.group_size / columns;
    const __mmask64 mask = bytes == 64 ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1;
    const uint16_t* tile_scale = w.codebook_scale + row / w.codebook_rows * (w.in / w.codebook_columns);
    const uint8_t* from = w.row(row);
    __m512 total[ROWS];
    float scale[ROWS], tile = 0;
    LORQ_UNROLL for (int r = 0; r < ROWS; ++r) total[r] = _mm512_setzero_ps(), scale[r] = 0;
    const int8_t* pieces = x.pieces.data();
    const int32_t* start = x.start.data();
    planes -= VECTOR << WIDTH;
    for (int64_t c = 0, in_tile = 0, in_group = 0, group = 0; c < chunks; ++c, from += bytes) {
        if (in_tile == 0) planes += VECTOR << WIDTH, tile = from_half(*tile_scale++), in_tile = of_tile;
        if (in_group == 0) {
            for (int r = 0; r < ROWS; ++r) scale[r] = from_half(w.scale[(row + r) * w.groups() + group]);
            ++group, in_group = of_group;
        }
        --in_tile, --in_group;
        LORQ_UNROLL for (int r = 0; r < ROWS; ++r) {
            prefetch(from + (ROWS + r) * row_bytes);
            const __m512i code = load_codes<WIDTH>(from + r * row_bytes, mask);
            __m512i acc[PIECES];
            LORQ_UNROLL for (int k = 0; k < PIECES; ++k) acc[k] = _mm512_loadu_si512(start + 16 * k);
            LORQ_UNROLL for (int v = 0; v < VECTOR; ++v) {
                const __m512i entry = look_up<WIDTH>(planes + (v << WIDTH), code);
                LORQ_UNROLL for (int k = 0; k < PIECES; ++k)
                    acc[k] = _mm512_dpbusd_epi32(acc[k], entry, _mm512_loadu_si512(pieces + LOOKED_UP * (v * PIECES + k)));
            }
            __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[0], _mm512_slli_epi32(acc[1], 8)));
            if constexpr (PIECES > 2) value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[2]), _mm512_set1_ps(65536.0f), value);
            total[r] = _mm512_fmadd_ps(value, _mm512_set1_ps(scale[r] * tile * x.step[size_t(c)]), total[r]);
        }
        pieces += VECTOR * PIECES * LOOKED_UP;
        start += 16 * PIECES;
    }
    LORQ_UNROLL for (int r = 0; r < ROWS; ++r) y[r] = _mm512_reduce_add_ps(total[r]);
}

template <int VECTOR, int WIDTH, int PIECES>
void vectors_block(const Weight& w, int64_t codes, const uint8_t* planes, const Inputs& x, int64_t row, int64_t count, float* y) {
    constexpr int64_t ROWS = 4;  // rows of tiles are whole blocks
    for (int64_t r = 0; r < count; r += ROWS) multiply_vectors<VECTOR, WIDTH, PIECES, ROWS>(w, codes, planes, x, row + r, y + r);
}

template <int VECTOR, int WIDTH>
void vectors_block(int pieces, const Weight& w, Planes& planes, const Inputs& x, int64_t row, int64_t count, float* y) {
    const uint8_t* own = planes.of(w, row);
    if (pieces == 2) vectors_block<VECTOR, WIDTH, 2>(w, planes.codes, own, x, row, count, y);
    else vectors_block<VECTOR, WIDTH, 3>(w, planes.codes, own, x, row, count, y);
}

inline void multiply_vectors(int pieces, const Weight& w, Planes& planes, const Inputs& x, int64_t row, int64_t count, float* y) {
    if (w.vector == 4) vectors_block<4, 8>(pieces, w, planes, x, row, count, y);
    else if (w.bits == 3) vectors_block<2, 6>(pieces, w, planes, x, row, count, y);
    else vectors_block<2, 8>(pieces, w, planes, x, row, count, y);
}

#else

struct Planes {};
inline void place_vectors(const Weight&, int, Inputs&) {}
inline void multiply_vectors(int, const Weight&, Planes&, const Inputs&, int64_t, int64_t, float*) {}

#endif

}  // namespace lorq
