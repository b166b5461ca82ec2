// The vector type of AVX2: one register of 8 floats, and its loads and stores of 16-bit elements.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

#define LK_INLINE static inline __attribute__((always_inline))

namespace lora_kernels {
namespace {

constexpr int W = 8;         // floats in a register
constexpr int DOT_ROWS = 3;  // 3 x 4 accumulators, 3 + 1 operands: 16 registers
constexpr int V = 2;         // registers side by side in an outer product: 4 x 2 accumulators
constexpr int Y_ROWS = 4;    // rows of y updated together
using vf = __m256;

LK_INLINE vf zero() { return _mm256_setzero_ps(); }
LK_INLINE vf splat(float a) { return _mm256_set1_ps(a); }
LK_INLINE vf splat_pair(const float* p) {  // p[0] and p[1] in turns
  double pair;
  __builtin_memcpy(&pair, p, 8);
  return _mm256_castpd_ps(_mm256_set1_pd(pair));
}
LK_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
LK_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
LK_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }

LK_INLINE __m128i narrow_bf16(vf v) {  // to nearest, ties to even; a NaN stays a NaN
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i s = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

LK_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
LK_INLINE vf load(const bf16* p) {
  const __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
}
LK_INLINE vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
LK_INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
LK_INLINE void store(bf16* p, vf v) { _mm_storeu_si128((__m128i*)p, narrow_bf16(v)); }
LK_INLINE void store(f16* p, vf v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// The first n < W elements. The other lanes are loaded as zero and not stored.
template <typename T>
LK_INLINE vf load_n(const T* p, int n) {
  T buffer[W] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <typename T>
LK_INLINE void store_n(T* p, vf v, int n) {
  T buffer[W];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

LK_INLINE vf mask_lanes(vf v, uint64_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)(bits & 0xff)), lane);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
}

// out[i] = the sum of v[i]'s lanes, four registers at once.
LK_INLINE void sum_lanes(const vf v[4], float* out) {
  const vf s = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

template <typename T>
LK_INLINE void store_ieee(T* p, vf v) {
  store(p, v);
}

// A codebook of 16 values, and the values of W codes in W/2 bytes, the even element in the high
// nibble.
struct Table {
  __m256 low, high;
};
LK_INLINE Table load_table(const float* code) {
  return {_mm256_loadu_ps(code), _mm256_loadu_ps(code + 8)};
}
LK_INLINE vf lookup(const Table& t, __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(t.low, index),  // reads three bits of an index
      high = _mm256_permutevar8x32_ps(t.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
LK_INLINE vf lookup(const Table& t, const uint8_t* p) {
  int word;
  std::memcpy(&word, p, 4);
  const __m128i b = _mm_cvtsi32_si128(word);
  const __m256i duplicated = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(b, b));
  return lookup(t, _mm256_srlv_epi32(duplicated, _mm256_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0)));
}
// A codebook of 256 values, or null, and the values of 2 W codes.
using Table256 = const float*;
LK_INLINE Table256 load_table_256(const float* src) { return src; }
LK_INLINE void lookup_2w(Table256 t, const uint8_t* p, vf out[2]) {
  for (int i = 0; i < 2; ++i)
    out[i] = _mm256_i32gather_ps(
        t, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + i * W))), 4);
}

// The values of W codes of 8 bits.
LK_INLINE vf load_int8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
LK_INLINE vf load_e4m3(const uint8_t* p) {
  const __m128i b = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)),
                magnitude = _mm_and_si128(b, _mm_set1_epi16(0x7f)),
                sign = _mm_slli_epi16(_mm_andnot_si128(_mm_set1_epi16(0x7f), b), 8),
                nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)),
                half = _mm_or_si128(sign, _mm_slli_epi16(magnitude, 7));
  // As a float16 it is 2^8 times too small.
  return _mm256_mul_ps(
      _mm256_cvtph_ps(_mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)))),
      _mm256_set1_ps(256.0f));
}

// The values of 2 W codes, 2^8 times too small. nan, zero before, is `is_set` after one of them was
// NaN, which its value is not.
using NanFlags = __m128i;
LK_INLINE bool is_set(NanFlags nan) { return _mm_movemask_epi8(nan); }
LK_INLINE void load_2w_e4m3(const uint8_t* p, vf out[2], NanFlags& nan) {
  const __m128i b = _mm_loadu_si128((const __m128i*)p);
  // A carry reaches bit 7 from seven ones.
  nan = _mm_or_si128(nan, _mm_xor_si128(b, _mm_add_epi8(b, _mm_set1_epi8(1))));
  // Sign extension leaves the sign in bits 7 to 15; as a float16 it is bit 15 alone.
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(b), 7),
                                        _mm256_set1_epi16((short)0xbf80));
  out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
  out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
}

using vu = __m256i;
LK_INLINE vu splat_u(uint32_t a) { return _mm256_set1_epi32((int)a); }
LK_INLINE vu lanes_from(uint32_t a) {
  return _mm256_add_epi32(splat_u(a), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LK_INLINE vu xor3(vu a, vu b, vu c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
LK_INLINE void mul_hi_lo(uint32_t m, vu b, vu& hi, vu& lo) {
  const __m256i mm = splat_u(m), even = _mm256_mul_epu32(b, mm),
                odd = _mm256_mul_epu32(_mm256_srli_epi64(b, 32), mm);
  hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
LK_INLINE uint64_t compare_ge(vu a, uint32_t threshold) {  // one bit a lane
  const __m256i is_ge = _mm256_cmpeq_epi32(_mm256_max_epu32(a, splat_u(threshold)), a);
  return (uint64_t)_mm256_movemask_ps(_mm256_castsi256_ps(is_ge));
}
// Moves bit i of a, b, c, d to bits 4i, 4i + 1, 4i + 2, 4i + 3.
LK_INLINE uint64_t interleave_bits(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  return _pdep_u64(a, 0x11111111u) | _pdep_u64(b, 0x22222222u) | _pdep_u64(c, 0x44444444u) |
         _pdep_u64(d, 0x88888888u);
}

// The functions for few_rows_impl.h; vec_avx512.h describes them.
LK_INLINE vu load_codes(const uint8_t* p, int filled) {
  if (filled == W) return _mm256_loadu_si256((const __m256i*)p);
  uint8_t bytes[4 * W] = {};
  std::memcpy(bytes, p, 4 * (size_t)filled);
  return _mm256_loadu_si256((const __m256i*)bytes);
}
LK_INLINE vf lookup(const Table& t, vu codes, int j) {
  return lookup(t, _mm256_srli_epi32(codes, 4 * (j ^ 1)));
}
LK_INLINE vu lane_blocks(int64_t offset, int log2_block) {
  const vu element =
      _mm256_add_epi32(_mm256_slli_epi32(lanes_from(0), 3), splat_u((uint32_t)offset));
  return _mm256_srl_epi32(element, _mm_cvtsi32_si128(log2_block));
}
LK_INLINE vf gather_scales(const float* scales, vu lanes, int filled) {
  const vf v = _mm256_permutevar8x32_ps(load(scales), lanes);
  return filled == W ? v : mask_lanes(v, (1u << filled) - 1);
}

}  // namespace
}  // namespace lora_kernels
