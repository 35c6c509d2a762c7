// Lanes of 16 bits, as many as a register has: what trellis codes need of an instruction set (simd.hpp has lanes of 32).
#pragma once
#include "simd.hpp"

namespace lorq {

#ifdef LORQ_512
using H = __m512i;
inline H load_h(const void* p) { return _mm512_loadu_si512(p); }
inline void store_h(void* p, H v) { _mm512_storeu_si512(p, v); }
inline H spread_h(uint16_t v) { return _mm512_set1_epi16(short(v)); }
inline H add_h(H a, H b) { return _mm512_add_epi16(a, b); }
inline H lower_product(H a, H b) { return _mm512_mullo_epi16(a, b); }
inline H upper_product(H a, H b) { return _mm512_mulhi_epu16(a, b); }
// The sum of each lane's bytes; `ones` has a 1 in every byte.
inline H sum_bytes(H v, H ones) { return _mm512_maddubs_epi16(v, ones); }
// `length` bits, which `mask` tells, that end at bit 16 - SHIFT of `lower`; the first of them lie in `upper`.
template <int SHIFT>
inline H bits_of(H upper, H lower, H mask) {
    if constexpr (SHIFT == 16) return _mm512_and_si512(lower, mask);
#ifdef __AVX512VBMI2__
    else return _mm512_and_si512(_mm512_shldi_epi16(upper, lower, SHIFT), mask);
#else
    else return _mm512_ternarylogic_epi32(_mm512_slli_epi16(upper, SHIFT), _mm512_srli_epi16(lower, 16 - SHIFT), mask, 0xa8);
#endif
}
// acc + the products of lanes with a sign, summed over pairs.
inline Wide dot_h(Wide acc, H a, H b) {
    acc = _mm512_dpwssd_epi32(acc, a, b);
    __asm__("" : "+v"(acc));  // or gcc moves the sums between registers
    return acc;
}
inline Wide load_wide(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_wide(int32_t* p, Wide v) { _mm512_storeu_si512(p, v); }
inline float sum_wide(WideF v) { return sum(_mm256_add_ps(row_of(v, 0), row_of(v, 1))); }
#elif defined(__AVX2__)
using H = __m256i;
inline H load_h(const void* p) { return load_i(p); }
inline void store_h(void* p, H v) { _mm256_storeu_si256(static_cast<H*>(p), v); }
inline H spread_h(uint16_t v) { return _mm256_set1_epi16(short(v)); }
inline H add_h(H a, H b) { return _mm256_add_epi16(a, b); }
inline H lower_product(H a, H b) { return _mm256_mullo_epi16(a, b); }
inline H upper_product(H a, H b) { return _mm256_mulhi_epu16(a, b); }
inline H sum_bytes(H v, H ones) { return _mm256_maddubs_epi16(v, ones); }
template <int SHIFT>
inline H bits_of(H upper, H lower, H mask) {
    if constexpr (SHIFT == 16) return both(lower, mask);
    else return both(either(_mm256_slli_epi16(upper, SHIFT), _mm256_srli_epi16(lower, 16 - SHIFT)), mask);
}
inline Wide dot_h(Wide acc, H a, H b) { return plus(acc, _mm256_madd_epi16(a, b)); }
#else
struct H { uint16_t v[16]; };
#define LORQ_EACH_HALF for (int i = 0; i < 16; ++i)
inline H load_h(const void* p) { H r; std::memcpy(r.v, p, 32); return r; }
inline void store_h(void* p, H v) { std::memcpy(p, v.v, 32); }
inline H spread_h(uint16_t v) { H r; LORQ_EACH_HALF r.v[i] = v; return r; }
inline H add_h(H a, H b) { LORQ_EACH_HALF a.v[i] = uint16_t(a.v[i] + b.v[i]); return a; }
inline H lower_product(H a, H b) { LORQ_EACH_HALF a.v[i] = uint16_t(uint32_t(a.v[i]) * b.v[i]); return a; }
inline H upper_product(H a, H b) { LORQ_EACH_HALF a.v[i] = uint16_t(uint32_t(a.v[i]) * b.v[i] >> 16); return a; }
inline H sum_bytes(H v, H) { LORQ_EACH_HALF v.v[i] = uint16_t((v.v[i] & 255) + (v.v[i] >> 8)); return v; }
template <int SHIFT>
inline H bits_of(H upper, H lower, H mask) {
    LORQ_EACH_HALF lower.v[i] = uint16_t((uint32_t(upper.v[i]) << SHIFT | uint32_t(lower.v[i]) >> (16 - SHIFT)) & mask.v[i]);
    return lower;
}
inline Wide dot_h(Wide acc, H a, H b) {
    LORQ_EACH for (int k = 0; k < 2; ++k)
        acc.v[i] += uint32_t(int32_t(int16_t(a.v[2 * i + k])) * int16_t(b.v[2 * i + k]));
    return acc;
}
#endif
#ifndef LORQ_512
inline Wide load_wide(const int32_t* p) { return load_i(p); }
inline void store_wide(int32_t* p, Wide v) { store_i(p, v); }
inline float sum_wide(WideF v) { return sum(v); }
#endif
constexpr int HALVES = int(sizeof(H) / 2);

}  // namespace lorq
