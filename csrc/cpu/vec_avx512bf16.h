// What AVX-512 BF16 adds: multiplication of pairs of bf16.
#pragma once
#include "vec_avx512.h"

#define LK_BF16_PAIRS

namespace lora_kernels {
namespace {

// `dot` for two bf16 operands. vdpbf16ps multiplies 32 of them without widening and adds the exact
// products in float32. Subnormal inputs count as zero.
template <int I>
LK_INLINE void dot_bf16(const bf16* const x[I], const bf16* const a[4], int64_t K,
                        float out[I][4]) {
  __m512 acc[I][4];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = zero();
  const auto step = [&](int64_t k, const auto& load_at) __attribute__((always_inline)) {
    __m512bh xv[I];
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) xv[i] = load_at(x[i] + k);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512bh av = load_at(a[j] + k);
#pragma GCC unroll 8
      for (int i = 0; i < I; ++i) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], xv[i], av);
    }
  };
  int64_t k = 0;
  for (; k + 32 <= K; k += 32)
    step(k, [](const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); });
  const __mmask32 tail = (1u << (K - k)) - 1;
  if (tail) step(k, [&](const bf16* p) { return (__m512bh)_mm512_maskz_loadu_epi16(tail, p); });
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) sum_lanes(acc[i], out[i]);
}

// The functions for product_impl.h on words of two bf16.
LK_INLINE vf word_fma(vf a, vf b, vf acc, bf16x2) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
LK_INLINE vf load_words(const bf16* p, int64_t elements, bf16x2) {
  if (elements >= 32) return _mm512_castsi512_ps(_mm512_loadu_si512(p));
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << elements) - 1, p));
}
LK_INLINE void store_words(float* dst, vf even, vf odd, bf16x2) {
  const __m512i permutation =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  store(dst, _mm512_castsi512_ps(_mm512_permutexvar_epi16(permutation, pairs)));
}
LK_INLINE void store_columns(float* dst, int64_t vector_stride, const vf even[2], const vf odd[2],
                             bf16x2) {
  const __m512i e = (__m512i)_mm512_cvtne2ps_pbh(even[1], even[0]),
                o = (__m512i)_mm512_cvtne2ps_pbh(odd[1], odd[0]);
  // The words of an even column c are e[c/2] and e[16 + c/2]; those of an odd one come from o,
  // whose indices begin at 32.
  const __m512i low = _mm512_set_epi16(55, 39, 23, 7, 54, 38, 22, 6, 53, 37, 21, 5, 52, 36, 20, 4,
                                       51, 35, 19, 3, 50, 34, 18, 2, 49, 33, 17, 1, 48, 32, 16, 0),
                high = _mm512_add_epi16(low, _mm512_set1_epi16(8));
  store(dst, _mm512_castsi512_ps(_mm512_permutex2var_epi16(e, low, o)));
  store(dst + vector_stride, _mm512_castsi512_ps(_mm512_permutex2var_epi16(e, high, o)));
}
// Stores the words (a[n], b[n]) for n < count <= 32 and zeros after them; the last 16 lie
// vector_stride behind the first. b may be null.
LK_INLINE void interleave(const bf16* a, const bf16* b, int64_t count, float* dst,
                          int64_t vector_stride = W) {
  const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0),
                high = _mm512_add_epi16(low, _mm512_set1_epi16(16)),
                av = _mm512_maskz_loadu_epi16(mask, a),
                bv = b ? _mm512_maskz_loadu_epi16(mask, b) : _mm512_setzero_si512();
  store(dst, _mm512_castsi512_ps(_mm512_permutex2var_epi16(av, low, bv)));
  store(dst + vector_stride, _mm512_castsi512_ps(_mm512_permutex2var_epi16(av, high, bv)));
}

// The functions for few_rows_impl.h on bf16. For one or two rows of x, a code is looked up as the
// sum of two bf16, which keeps 17 of its bits; the sum is scaled. For more rows, a code is scaled
// and rounded to bf16 once for all rows.

// For up to these rows, two multiplications a code cost less than rounding it.
constexpr int MAX_HIGH_LOW_ROWS = 2;

// A codebook in float32, and as two bf16 whose sum has 17 bits of each value. The bf16 tables are
// stored twice, since the permutation reads five bits of an index.
struct Bf16x2Tables {
  vf values;
  vu high, low;
};
LK_INLINE Bf16x2Tables bf16x2_tables(const float* code) {
  const vf values = load(code);
  const __m256i high = (__m256i)_mm512_cvtneps_pbh(values),
                low = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(values, widen_bf16(high)));
  return {values, _mm512_broadcast_i64x4(high), _mm512_broadcast_i64x4(low)};
}
LK_INLINE Table values_of(const Bf16x2Tables& t) { return t.values; }

LK_INLINE __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// total[g][i] += scale[g] * (x[i] · codes[g]) for 128 elements. Word w of register j of x holds
// element 4w + (j ^ 1).
template <int J, int M>
LK_INLINE void dot_high_low(const vu codes[J], const Bf16x2Tables& t, const vf scale[J],
                            const bf16* x, vf total[J][M]) {
  vf high[J][M], low[J][M];
#pragma GCC unroll 4
  for (int g = 0; g < J; ++g)
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) high[g][i] = low[g][i] = zero();
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
    for (int g = 0; g < J; ++g) {
      const vu index = _mm512_srli_epi16(codes[g], 4 * j);  // the permutation reads five bits of it
      const __m512bh h = (__m512bh)_mm512_permutexvar_epi16(index, t.high),
                     l = (__m512bh)_mm512_permutexvar_epi16(index, t.low);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
        const __m512bh xv = load_pairs(x + 128 * i + 32 * j);
        high[g][i] = _mm512_dpbf16_ps(high[g][i], xv, h);
        low[g][i] = _mm512_dpbf16_ps(low[g][i], xv, l);
      }
    }
#pragma GCC unroll 4
  for (int g = 0; g < J; ++g)
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i)
      total[g][i] = fma(add(high[g][i], low[g][i]), scale[g], total[g][i]);
}

// The 32 values of register j, scaled and rounded.
LK_INLINE __m512i scaled_pairs(vu codes, const Bf16x2Tables& t, vf scale, int j) {
  return (__m512i)_mm512_cvtne2ps_pbh(mul(scale, lookup(t.values, codes, 2 * j + 1)),
                                      mul(scale, lookup(t.values, codes, 2 * j)));
}
LK_INLINE void decode_chunk(vu codes, const Bf16x2Tables& t, vf scale, bf16* dst) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) _mm512_storeu_si512(dst + 32 * j, scaled_pairs(codes, t, scale, j));
}

// total[g][i] += x[i] · (scale[g] * codes[g]) for 128 elements. If scaled codes are rounded, word w
// of register j of x holds
//   element 8w + 2j             for w < 16
//   element 8(w - 16) + 2j + 1  for w >= 16
template <int J, int M>
LK_INLINE void dot_chunk(const vu codes[J], const Bf16x2Tables& t, const vf scale[J], const bf16* x,
                         vf total[J][M]) {
  if constexpr (M <= MAX_HIGH_LOW_ROWS) {
    dot_high_low<J, M>(codes, t, scale, x, total);
    return;
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512bh wv[J];
#pragma GCC unroll 4
    for (int g = 0; g < J; ++g) wv[g] = (__m512bh)scaled_pairs(codes[g], t, scale[g], j);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const __m512bh xv = load_pairs(x + 128 * i + 32 * j);
#pragma GCC unroll 4
      for (int g = 0; g < J; ++g) total[g][i] = _mm512_dpbf16_ps(total[g][i], xv, wv[g]);
    }
  }
}

// Interleaves K elements for dot_high_low or dot_chunk: chunks of 128, `stride` apart; zeros up to
// a multiple of 128.
LK_INLINE void interleave_x_bf16(const bf16* src, int64_t K, bool is_high_low, bf16* dst,
                                 int64_t stride) {
  vu index[4];
  for (int j = 0; j < 4; ++j) {
    uint16_t words[32];
    for (int w = 0; w < 32; ++w)
      words[w] = (uint16_t)(is_high_low ? 4 * (w & 15) + (j ^ 1) : 8 * (w & 7) + 2 * j + (w >> 4));
    index[j] = _mm512_loadu_si512(words);
  }
  const __mmask32 second = is_high_low ? 0xFFFF0000 : 0xFF00FF00;  // words of the last 64 elements
  for (int64_t k = 0; k < K; k += 128, src += 128, dst += stride) {
    vu v[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t remaining = K - k - 32 * i;
      const __mmask32 mask = remaining >= 32 ? ~0u : remaining > 0 ? (1u << remaining) - 1 : 0;
      v[i] = _mm512_maskz_loadu_epi16(mask, src + 32 * i);
    }
    for (int j = 0; j < 4; ++j)
      _mm512_storeu_si512(dst + 32 * j, _mm512_mask_blend_epi16(
                                            second, _mm512_permutex2var_epi16(v[0], index[j], v[1]),
                                            _mm512_permutex2var_epi16(v[2], index[j], v[3])));
  }
}

}  // namespace
}  // namespace lora_kernels
