// What AVX-512 BF16 adds: products of pairs of bf16.
#pragma once
#include "vec_avx512.h"

#define LK_BF16_PAIRS

namespace lora_kernels {
namespace {

// dot for two bf16 operands: vdpbf16ps takes 32 of them and adds their exact products in float32
// (subnormal inputs count as zero), without widening either.
LK_INLINE void dot_bf16(const bf16* const x[DOT_ROWS], const bf16* const a[4], int64_t K,
                        float out[DOT_ROWS][4]) {
  __m512 acc[DOT_ROWS][4];
#pragma GCC unroll 8
  for (int i = 0; i < DOT_ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = zero();
  const auto step = [&](int64_t k, const auto& load_at) __attribute__((always_inline)) {
    __m512bh xv[DOT_ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < DOT_ROWS; ++i) xv[i] = load_at(x[i] + k);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512bh av = load_at(a[j] + k);
#pragma GCC unroll 8
      for (int i = 0; i < DOT_ROWS; ++i) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], xv[i], av);
    }
  };
  int64_t k = 0;
  for (; k + 32 <= K; k += 32)
    step(k, [](const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); });
  const __mmask32 rest = (1u << (K - k)) - 1;
  if (rest) step(k, [&](const bf16* p) { return (__m512bh)_mm512_maskz_loadu_epi16(rest, p); });
#pragma GCC unroll 8
  for (int i = 0; i < DOT_ROWS; ++i) sum_lanes(acc[i], out[i]);
}

// What product_impl.h wants for words of two bf16.
LK_INLINE vf word_fma(vf a, vf b, vf acc, Pair) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
LK_INLINE vf load_words(const bf16* p, int64_t elements, Pair) {
  if (elements >= 32) return _mm512_castsi512_ps(_mm512_loadu_si512(p));
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << elements) - 1, p));
}
LK_INLINE void store_words(float* to, vf even, vf odd, Pair) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  store(to, _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both)));
}
LK_INLINE void store_columns(float* to, const vf even[2], const vf odd[2], Pair) {
  const __m512i e = (__m512i)_mm512_cvtne2ps_pbh(even[1], even[0]),
                o = (__m512i)_mm512_cvtne2ps_pbh(odd[1], odd[0]);
  // Words of column c: e[c/2], e[16 + c/2] where c is even, else o[...], the 33rd element on.
  const __m512i low = _mm512_set_epi16(55, 39, 23, 7, 54, 38, 22, 6, 53, 37, 21, 5, 52, 36, 20, 4,
                                       51, 35, 19, 3, 50, 34, 18, 2, 49, 33, 17, 1, 48, 32, 16, 0),
                high = _mm512_add_epi16(low, _mm512_set1_epi16(8));
  store(to, _mm512_castsi512_ps(_mm512_permutex2var_epi16(e, low, o)));
  store(to + W, _mm512_castsi512_ps(_mm512_permutex2var_epi16(e, high, o)));
}
// to[0 .. 32) = the words (a[n], b[n]) for n < count <= 32, zero beyond; b may be null.
LK_INLINE void interleave(const bf16* a, const bf16* b, int64_t count, float* to) {
  const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0),
                high = _mm512_add_epi16(low, _mm512_set1_epi16(16)),
                av = _mm512_maskz_loadu_epi16(mask, a),
                bv = b ? _mm512_maskz_loadu_epi16(mask, b) : _mm512_setzero_si512();
  store(to, _mm512_castsi512_ps(_mm512_permutex2var_epi16(av, low, bv)));
  store(to + W, _mm512_castsi512_ps(_mm512_permutex2var_epi16(av, high, bv)));
}

}  // namespace
}  // namespace lora_kernels
