// Eight lanes of 32 bits: the little of an instruction set that the kernels need, with AVX2 (and AVX-512 with VNNI on
// top, which has two rows in a register), or as plain loops that a compiler may turn into what the machine has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#define LORQ_512
#endif
#endif

#ifdef __GNUC__
#define LORQ_INLINE __attribute__((always_inline)) inline
#define LORQ_UNROLL _Pragma("GCC unroll 8")
#else
#define LORQ_INLINE inline
#define LORQ_UNROLL
#endif

namespace lorq {

inline void prefetch(const void* p) {
#ifdef __GNUC__
    __builtin_prefetch(p);
#else
    (void)p;
#endif
}

inline float from_half(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
    uint32_t bits;
    if (magnitude >= 0x7c00) {
        bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    } else {  // exact: float16's numbers are float32's, moved by 2^112
        float value;
        bits = magnitude << 13;
        std::memcpy(&value, &bits, 4);
        value *= 5.192296858534828e33f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float from_bfloat(uint16_t b) {
    const uint32_t bits = uint32_t(b) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // NaN stays one
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);                 // to nearest, ties to even
}

inline uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
    if (bits < 0x38800000) {                       // subnormal: whole multiples of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        return sign | uint16_t(std::nearbyint(magnitude * 16777216.0f));
    }
    return sign | uint16_t((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}

#ifdef __AVX2__
using I = __m256i;
using F = __m256;
inline I zero_i() { return _mm256_setzero_si256(); }
inline F zero_f() { return _mm256_setzero_ps(); }
inline I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline F load_f(const float* p) { return _mm256_loadu_ps(p); }
inline void store_f(float* p, F v) { _mm256_storeu_ps(p, v); }
inline I spread_i(uint32_t v) { return _mm256_set1_epi32(int(v)); }
inline F spread_f(float v) { return _mm256_set1_ps(v); }
template <int N>
inline I shift_right(I v) { return _mm256_srli_epi32(v, N); }
inline I shift_right(I v, int n) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(n)); }
inline I shift_left(I v, int n) { return _mm256_sll_epi32(v, _mm_cvtsi32_si128(n)); }
inline I shift_each(I v, I n) { return _mm256_srlv_epi32(v, n); }
inline I both(I a, I b) { return _mm256_and_si256(a, b); }
inline I either(I a, I b) { return _mm256_or_si256(a, b); }
inline F to_float(I v) { return _mm256_cvtepi32_ps(v); }
inline I nearest(F v) { return _mm256_cvtps_epi32(v); }
inline void store_i(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline F larger(F a, F b) { return _mm256_max_ps(a, b); }
inline F smaller(F a, F b) { return _mm256_min_ps(a, b); }
inline F size(F v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
inline F minus(F a, F b) { return _mm256_sub_ps(a, b); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F times(F a, F b) { return _mm256_mul_ps(a, b); }
inline F over(F a, F b) { return _mm256_div_ps(a, b); }
inline F round_half(F v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, 0)); }  // to what float16 holds
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// acc + products of bytes without a sign by bytes with one, summed over neighbours: pairs in 16 bits, or fours in 32.
inline I dot(I acc, I a, I b) {
#ifdef LORQ_512
    return _mm256_dpbusd_epi32(acc, a, b);
#else
    acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(a, b));
    __asm__("" : "+x"(acc));  // or gcc makes a tree of the sums, for which there are not registers enough
    return acc;
#endif
}
// 2^N times such a sum, in lanes of 32 bits.
template <int N>
inline I widen(I acc) {
#ifdef LORQ_512
    return _mm256_slli_epi32(acc, N);
#else
    return _mm256_madd_epi16(acc, _mm256_set1_epi16(1 << N));
#endif
}
inline I negative(I acc) {
#ifdef LORQ_512
    return _mm256_sub_epi32(_mm256_setzero_si256(), acc);
#else
    return _mm256_sub_epi16(_mm256_setzero_si256(), acc);
#endif
}
inline I plus(I a, I b) { return _mm256_add_epi32(a, b); }
inline F pick(F v, I lanes) { return _mm256_permutevar8x32_ps(v, lanes); }  // low three bits of each lane
inline F pick16(F low, F high, I lanes) {                                  // low four bits
    return _mm256_blendv_ps(pick(low, lanes), pick(high, lanes), _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28)));
}
inline F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
#ifdef LORQ_512
// The first n of eight, zeros for the others.
inline I load_i(const uint32_t* p, int n, const uint32_t*) { return _mm256_maskz_loadu_epi32(__mmask8((1 << n) - 1), p); }
inline F load_half(const uint16_t* p, int n, const uint16_t*) {
    return _mm256_cvtph_ps(_mm_maskz_loadu_epi16(__mmask8((1 << n) - 1), p));
}
#endif
inline F load_bfloat(const uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline void store_half(uint16_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bfloat(uint16_t* p, F v) {  // as to_bfloat
    const I bits = _mm256_castps_si256(v), odd = both(shift_right<16>(bits), spread_i(1));
    const I rounded = shift_right<16>(plus(plus(bits, spread_i(0x7fff)), odd));
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I all = _mm256_blendv_epi8(rounded, either(shift_right<16>(bits), spread_i(0x40)), nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
inline I load_uhalves(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F load_bytes(const int8_t* p) {
    return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline I load_ubytes(const void* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }
inline float most(F v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// 24 bytes of 3-bit codes, twelve at the beginning of each half; reads 28 bytes.
inline I load_threes(const uint8_t* p) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 12)), 1);
}
#define LORQ_ORDER_OF_THREES _mm_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11)
// Two of them to each byte, in its lower six bits: twelve bits in the upper part of each half of a lane, then six to each byte.
inline I spread_threes(I v) {
    const I order = _mm256_broadcastsi128_si256(LORQ_ORDER_OF_THREES);
    const I twelve = _mm256_mullo_epi16(_mm256_shuffle_epi8(v, order), _mm256_set1_epi32(0x00010010));
    return either(both(shift_right<4>(twelve), spread_i(0x003f003f)), both(shift_right<2>(twelve), spread_i(0x3f003f00)));
}
#else
struct I { uint32_t v[8]; };
struct F { float v[8]; };
#define LORQ_EACH for (int i = 0; i < 8; ++i)
inline I zero_i() { return I{}; }
inline F zero_f() { return F{}; }
inline I load_i(const void* p) { I r; std::memcpy(r.v, p, 32); return r; }
inline F load_f(const float* p) { F r; std::memcpy(r.v, p, 32); return r; }
inline void store_f(float* p, F v) { std::memcpy(p, v.v, 32); }
inline I spread_i(uint32_t v) { I r; LORQ_EACH r.v[i] = v; return r; }
inline F spread_f(float v) { F r; LORQ_EACH r.v[i] = v; return r; }
inline I shift_right(I v, int n) { LORQ_EACH v.v[i] >>= n; return v; }
template <int N>
inline I shift_right(I v) { return shift_right(v, N); }
inline I shift_left(I v, int n) { LORQ_EACH v.v[i] <<= n; return v; }
inline I shift_each(I v, I n) { LORQ_EACH v.v[i] >>= n.v[i]; return v; }
inline I both(I a, I b) { LORQ_EACH a.v[i] &= b.v[i]; return a; }
inline I either(I a, I b) { LORQ_EACH a.v[i] |= b.v[i]; return a; }
inline F to_float(I v) { F r; LORQ_EACH r.v[i] = float(int32_t(v.v[i])); return r; }
inline I nearest(F v) { I r; LORQ_EACH r.v[i] = uint32_t(int32_t(std::nearbyint(v.v[i]))); return r; }
inline void store_i(int32_t* p, I v) { std::memcpy(p, v.v, 32); }
inline F larger(F a, F b) { LORQ_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline F smaller(F a, F b) { LORQ_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
inline F size(F v) { LORQ_EACH v.v[i] = std::fabs(v.v[i]); return v; }
inline F minus(F a, F b) { LORQ_EACH a.v[i] -= b.v[i]; return a; }
inline F add(F a, F b) { LORQ_EACH a.v[i] += b.v[i]; return a; }
inline F times(F a, F b) { LORQ_EACH a.v[i] *= b.v[i]; return a; }
inline F over(F a, F b) { LORQ_EACH a.v[i] /= b.v[i]; return a; }
inline F round_half(F v) { LORQ_EACH v.v[i] = from_half(to_half(v.v[i])); return v; }
inline F fma(F a, F b, F c) { LORQ_EACH c.v[i] += a.v[i] * b.v[i]; return c; }
inline I dot(I acc, I a, I b) {
    LORQ_EACH for (int k = 0; k < 32; k += 8) acc.v[i] += uint32_t(int32_t(uint8_t(a.v[i] >> k)) * int8_t(b.v[i] >> k));
    return acc;
}
template <int N>
inline I widen(I acc) { return shift_left(acc, N); }
inline I negative(I acc) { LORQ_EACH acc.v[i] = 0 - acc.v[i]; return acc; }
inline I plus(I a, I b) { LORQ_EACH a.v[i] += b.v[i]; return a; }
inline F pick(F v, I lanes) { F r; LORQ_EACH r.v[i] = v.v[lanes.v[i] & 7]; return r; }
inline F pick16(F low, F high, I lanes) {
    F r;
    LORQ_EACH r.v[i] = (lanes.v[i] & 8 ? high : low).v[lanes.v[i] & 7];
    return r;
}
inline F load_half(const uint16_t* p) { F r; LORQ_EACH r.v[i] = from_half(p[i]); return r; }
inline F load_bfloat(const uint16_t* p) { F r; LORQ_EACH r.v[i] = from_bfloat(p[i]); return r; }
inline void store_half(uint16_t* p, F v) { LORQ_EACH p[i] = to_half(v.v[i]); }
inline void store_bfloat(uint16_t* p, F v) { LORQ_EACH p[i] = to_bfloat(v.v[i]); }
inline I load_uhalves(const uint16_t* p) { I r; LORQ_EACH r.v[i] = p[i]; return r; }
inline F load_bytes(const int8_t* p) { F r; LORQ_EACH r.v[i] = float(p[i]); return r; }
inline I load_ubytes(const void* p) { I r; LORQ_EACH r.v[i] = static_cast<const uint8_t*>(p)[i]; return r; }
inline float most(F v) {
    float m = v.v[0];
    for (int i = 1; i < 8; ++i) m = v.v[i] > m ? v.v[i] : m;
    return m;
}
inline float sum(F v) {  // in the order of the vector form
    float s[4];
    for (int i = 0; i < 4; ++i) s[i] = v.v[i] + v.v[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}
inline I load_threes(const uint8_t* p) {
    I r;
    LORQ_EACH r.v[i] = p[3 * i] | uint32_t(p[3 * i + 1]) << 8 | uint32_t(p[3 * i + 2]) << 16;
    return r;
}
inline I spread_threes(I v) {
    LORQ_EACH {
        const uint32_t b = v.v[i];
        v.v[i] = (b & 0x3f) | (b & 0xfc0) << 2 | (b & 0x3f000) << 4 | (b & 0xfc0000) << 6;
    }
    return v;
}
#endif

#ifndef LORQ_512
// The first n of eight; the others are whatever follows, or zeros where nothing does.
inline I load_i(const uint32_t* p, int n, const uint32_t* end) {
    if (end - p >= 8) return load_i(p);
    uint32_t some[8] = {};
    for (int i = 0; i < n; ++i) some[i] = p[i];
    return load_i(some);
}
inline F load_half(const uint16_t* p, int n, const uint16_t* end) {
    if (end - p >= 8) return load_half(p);
    uint16_t some[8] = {};
    for (int i = 0; i < n; ++i) some[i] = p[i];
    return load_half(some);
}
#endif

// The lanes of SIDE rows in one register: two where a register has 512 bits, else one.
#ifdef LORQ_512
constexpr int SIDE = 2;
using Wide = __m512i;
using WideF = __m512;
inline Wide beside(const I (&rows)[2]) { return _mm512_inserti64x4(_mm512_castsi256_si512(rows[0]), rows[1], 1); }
inline WideF beside(const F (&rows)[2]) {
    return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(rows[0])), _mm256_castps_pd(rows[1]), 1));
}
inline F row_of(WideF v, int row) {
    return row ? _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)) : _mm512_castps512_ps256(v);
}
inline Wide each_row(const void* p) { return _mm512_broadcast_i64x4(load_i(p)); }
inline WideF each_row(const float* p) { return _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(load_f(p)))); }
inline Wide each_row(uint32_t v) { return _mm512_set1_epi32(int(v)); }
inline WideF zero_rows() { return _mm512_setzero_ps(); }
inline Wide shift_each(Wide v, Wide n) { return _mm512_srlv_epi32(v, n); }
inline WideF pick16(F low, F high, Wide lanes) { return _mm512_permutexvar_ps(lanes, beside({low, high})); }
inline WideF times(WideF a, WideF b) { return _mm512_mul_ps(a, b); }
template <int N>
inline Wide shift_right(Wide v) { return _mm512_srli_epi32(v, N); }
inline Wide both(Wide a, Wide b) { return _mm512_and_si512(a, b); }
inline Wide plus(Wide a, Wide b) { return _mm512_add_epi32(a, b); }
inline WideF to_float(Wide v) { return _mm512_cvtepi32_ps(v); }
inline WideF times(WideF a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
inline WideF add(WideF a, WideF b) { return _mm512_add_ps(a, b); }
inline WideF fma(WideF a, WideF b, WideF c) { return _mm512_fmadd_ps(a, b, c); }
inline Wide dot(Wide acc, Wide a, Wide b) { return _mm512_dpbusd_epi32(acc, a, b); }
template <int N>
inline Wide widen(Wide acc) { return _mm512_slli_epi32(acc, N); }
#ifdef __AVX512VBMI__
// Two of them to each byte, in its lower six bits; above these lies what is masked off later.
inline Wide spread_threes(Wide v) {
    alignas(64) static constexpr auto order = [] {  // the 24 bits of two lanes to the beginnings of theirs
        struct { uint8_t at[64]; } o{};
        for (int i = 0; i < 64; ++i) o.at[i] = uint8_t(i / 32 * 32 + i % 32 / 16 * 16 + i % 16 / 4 * 3 + (i % 4 < 3 ? i % 4 : 0));
        return o;
    }();
    const Wide lanes = _mm512_permutexvar_epi8(_mm512_load_si512(order.at), v);
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x322c2620120c0600), lanes);
}
#else
inline Wide spread_threes(Wide v) {
    const Wide order = _mm512_broadcast_i32x4(LORQ_ORDER_OF_THREES);
    const Wide twelve = _mm512_mullo_epi16(_mm512_shuffle_epi8(v, order), _mm512_set1_epi32(0x00010010));
    // The bits of the mask from the first, the others from the second; what lies above six bits is masked off later.
    return _mm512_ternarylogic_epi32(each_row(0x00ff00ffu), shift_right<4>(twelve), shift_right<2>(twelve), 0xca);
}
#endif
#else
constexpr int SIDE = 1;
using Wide = I;
using WideF = F;
inline Wide beside(const I (&rows)[1]) { return rows[0]; }
inline WideF beside(const F (&rows)[1]) { return rows[0]; }
inline F row_of(WideF v, int) { return v; }
inline Wide each_row(const void* p) { return load_i(p); }
inline WideF each_row(const float* p) { return load_f(p); }
inline Wide each_row(uint32_t v) { return spread_i(v); }
inline WideF zero_rows() { return zero_f(); }
inline WideF times(WideF a, float b) { return times(a, spread_f(b)); }
#endif

}  // namespace lorq
