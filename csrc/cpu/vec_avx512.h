// The vector type of AVX-512: one register of 16 floats, and its loads and stores of 16-bit
// elements.
#pragma once
#include <immintrin.h>

#include "kernels.h"

#define LK_INLINE static inline __attribute__((always_inline))

namespace lora_kernels {
namespace {

constexpr int W = 16;        // floats in a register
constexpr int DOT_ROWS = 6;  // 6 x 4 accumulators, 4 + 1 operands: 29 of 32 registers
constexpr int V = 4;         // registers side by side in an outer product: 4 x 4 accumulators
constexpr int Y_ROWS = 6;    // rows of y updated together
using vf = __m512;
using vu = __m512i;

LK_INLINE vf zero() { return _mm512_setzero_ps(); }
LK_INLINE vf splat(float a) { return _mm512_set1_ps(a); }
LK_INLINE vf splat_pair(const float* p) {  // p[0] and p[1] in turns
  double pair;
  __builtin_memcpy(&pair, p, 8);
  return _mm512_castpd_ps(_mm512_set1_pd(pair));
}
LK_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
LK_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
LK_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }

LK_INLINE vf widen_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
// To nearest, ties to even; a NaN stays a NaN.
LK_INLINE __m256i narrow_bf16_ieee(vf v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
#ifdef __AVX512BF16__
LK_INLINE __m256i narrow_bf16(vf v) { return (__m256i)_mm512_cvtneps_pbh(v); }  // subnormals to 0
#else
LK_INLINE __m256i narrow_bf16(vf v) { return narrow_bf16_ieee(v); }
#endif

LK_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
LK_INLINE vf load(const bf16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
LK_INLINE vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
LK_INLINE void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
LK_INLINE void store(bf16* p, vf v) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(v)); }
LK_INLINE void store(f16* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// Keeps subnormals, which a decoded weight may have.
template <typename T>
LK_INLINE void store_ieee(T* p, vf v) {
  store(p, v);
}
LK_INLINE void store_ieee(bf16* p, vf v) { _mm256_storeu_si256((__m256i*)p, narrow_bf16_ieee(v)); }

// The first n < W elements. The other lanes are loaded as zero and not stored.
LK_INLINE __mmask16 tail_mask(int n) { return (__mmask16)((1u << n) - 1); }
LK_INLINE vf load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(tail_mask(n), p); }
LK_INLINE vf load_n(const bf16* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(tail_mask(n), p));
}
LK_INLINE vf load_n(const f16* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(tail_mask(n), p));
}
LK_INLINE void store_n(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, tail_mask(n), v); }
LK_INLINE void store_n(bf16* p, vf v, int n) {
  _mm256_mask_storeu_epi16(p, tail_mask(n), narrow_bf16(v));
}
LK_INLINE void store_n(f16* p, vf v, int n) {
  _mm256_mask_storeu_epi16(p, tail_mask(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

LK_INLINE vf mask_lanes(vf v, uint64_t bits) { return _mm512_maskz_mov_ps((__mmask16)bits, v); }

// out[i] = the sum of v[i]'s lanes, four registers at once.
LK_INLINE void sum_lanes(const vf v[4], float* out) {
  const vf t = add(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const vf u = add(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const vf s = add(_mm512_shuffle_ps(t, u, 0x44), _mm512_shuffle_ps(t, u, 0xEE));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

// A codebook of 16 values, and the values of W codes in W/2 bytes, the even element in the high
// nibble.
using Table = __m512;
LK_INLINE Table load_table(const float* code) { return _mm512_loadu_ps(code); }
LK_INLINE vf lookup(Table t, const uint8_t* p) {
  const __m128i b = _mm_loadl_epi64((const __m128i*)p);
  const __m512i duplicated = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(b, b));
  const __m512i shift = _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(duplicated, shift),
                               t);  // reads four bits of an index
}
// The values of the 2 W codes in W bytes, even and odd elements apart.
LK_INLINE void lookup_2w(Table t, const uint8_t* p, vf& even, vf& odd) {
  const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  even = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), t);
  odd = _mm512_permutexvar_ps(b, t);
}

// A codebook of 256 values, or null, stored as low and high 16-bit words, and the values of 2 W
// codes. On AMD family 25 a gather would take four times as long.
struct Table256 {
  alignas(64) uint16_t low[256], high[256];
};
LK_INLINE Table256 load_table_256(const float* src) {
  Table256 t;
  for (int i = 0; src && i < 256; i += W) {
    const vu v = _mm512_castps_si512(_mm512_loadu_ps(src + i));
    _mm256_storeu_si256((__m256i*)(t.low + i), _mm512_cvtepi32_epi16(v));
    _mm256_storeu_si256((__m256i*)(t.high + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)));
  }
  return t;
}
LK_INLINE vu lookup_words(const uint16_t* t, vu index, __mmask32 bit6, __mmask32 bit7) {
  vu quarter[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    quarter[i] = _mm512_permutex2var_epi16(_mm512_loadu_si512(t + 64 * i), index,
                                           _mm512_loadu_si512(t + 64 * i + 32));
  return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, quarter[0], quarter[1]),
                                 _mm512_mask_blend_epi16(bit6, quarter[2], quarter[3]));
}
LK_INLINE void lookup_2w(const Table256& t, const uint8_t* p, vf out[2]) {
  const vu words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p)),
           // unpacklo and unpackhi join words within 128 bits. This order makes their results
           // contiguous.
      index = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), words);
  const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64)),
                  bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
  const vu low = lookup_words(t.low, index, bit6, bit7),
           high = lookup_words(t.high, index, bit6, bit7);
  out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
  out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
}

// The values of W codes of 8 bits.
LK_INLINE vf load_int8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
LK_INLINE vf load_e4m3(const uint8_t* p) {
  const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)),
                shifted = _mm256_slli_epi16(b, 7),  // the sign in bit 14
      sign = _mm256_and_si256(shifted, _mm256_set1_epi16(0x4000)),
                half = _mm256_add_epi16(shifted, sign), mask = _mm256_set1_epi16(0x7f);
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(b, mask), mask);
  // As a float16 it is 2^8 times too small.
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00))),
                       _mm512_set1_ps(256.0f));
}

// The values of 2 W codes, 2^8 times too small. nan, zero before, is `is_set` after one of them was
// NaN, which its value is not.
using NanFlags = __m256i;
LK_INLINE bool is_set(NanFlags nan) { return _mm256_movemask_epi8(nan); }
LK_INLINE void load_2w_e4m3(const uint8_t* p, vf out[2], NanFlags& nan) {
  const __m256i b = _mm256_loadu_si256((const __m256i*)p);
  // nan | (b ^ (b + 1)): a carry reaches bit 7 from seven ones.
  nan = _mm256_ternarylogic_epi32(nan, b, _mm256_add_epi8(b, _mm256_set1_epi8(1)), 0xF6);
  // Sign extension leaves the sign in bits 7 to 15; as a float16 it is bit 15 alone.
  const __m512i half = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(b), 7),
                                        _mm512_set1_epi16((short)0xbf80));
  out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
  out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}

// r[i][j] = r[j][i]
LK_INLINE void transpose(vf r[W]) {
  vf t[W];
  __m512d u[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
      u[i + 2 * j] = _mm512_unpacklo_pd(a, b);
      u[i + 2 * j + 1] = _mm512_unpackhi_pd(a, b);
    }
  // u[4g + c], lane l of four: column 4l + c of rows 4g ... 4g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512d a = _mm512_shuffle_f64x2(u[c], u[4 + c], 0x88),
                  b = _mm512_shuffle_f64x2(u[8 + c], u[12 + c], 0x88),
                  d = _mm512_shuffle_f64x2(u[c], u[4 + c], 0xDD),
                  e = _mm512_shuffle_f64x2(u[8 + c], u[12 + c], 0xDD);
    r[c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(a, b, 0x88));
    r[4 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(d, e, 0x88));
    r[8 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(a, b, 0xDD));
    r[12 + c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(d, e, 0xDD));
  }
}

LK_INLINE vu splat_u(uint32_t a) { return _mm512_set1_epi32((int)a); }
LK_INLINE vu lanes_from(uint32_t a) {
  return _mm512_add_epi32(splat_u(a),
                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
LK_INLINE vu xor3(vu a, vu b, vu c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
LK_INLINE void mul_hi_lo(uint32_t m, vu b, vu& hi, vu& lo) {
  const __m512i mm = splat_u(m), even = _mm512_mul_epu32(b, mm),
                odd = _mm512_mul_epu32(_mm512_srli_epi64(b, 32), mm);
  hi = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
  lo = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
}
LK_INLINE uint64_t compare_ge(vu a, uint32_t threshold) {  // one bit a lane
  return _mm512_cmpge_epu32_mask(a, splat_u(threshold));
}
// Moves bit i of a, b, c, d to bits 4i, 4i + 1, 4i + 2, 4i + 3.
LK_INLINE uint64_t interleave_bits(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  return _pdep_u64(a, 0x1111111111111111u) | _pdep_u64(b, 0x2222222222222222u) |
         _pdep_u64(c, 0x4444444444444444u) | _pdep_u64(d, 0x8888888888888888u);
}

// The functions for few_rows_impl.h. A lane holds eight neighbouring 4-bit codes.
//
// load_codes     `filled` lanes of codes; the remaining lanes are zero
// lookup         the values of code j of each lane
// lane_blocks    each lane's block, counted from that of lane 0, `offset` elements after whose
//                beginning lane 0 begins
// gather_scales  the scales of these blocks; zeros from lane `filled` on
LK_INLINE vu load_codes(const uint8_t* p, int filled) {
  return filled == W ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(tail_mask(filled), p);
}
LK_INLINE vf lookup(const Table& t, vu codes, int j) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * (j ^ 1)), t);
}
LK_INLINE vu lane_blocks(int64_t offset, int log2_block) {
  const vu element =
      _mm512_add_epi32(_mm512_slli_epi32(lanes_from(0), 3), splat_u((uint32_t)offset));
  return _mm512_srl_epi32(element, _mm_cvtsi32_si128(log2_block));
}
LK_INLINE vf gather_scales(const float* scales, vu lanes, int filled) {
  return _mm512_maskz_permutexvar_ps(tail_mask(filled), lanes, load(scales));
}

}  // namespace
}  // namespace lora_kernels
