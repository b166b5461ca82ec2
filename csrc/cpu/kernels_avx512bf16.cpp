#include "vec_avx512.h"

#define LK_DOT_BF16

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
  for (int64_t k = 0; k < K; k += 32) {
    const __mmask32 mask = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
    __m512bh xv[DOT_ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < DOT_ROWS; ++i) xv[i] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[i] + k);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512bh av = (__m512bh)_mm512_maskz_loadu_epi16(mask, a[j] + k);
#pragma GCC unroll 8
      for (int i = 0; i < DOT_ROWS; ++i) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], xv[i], av);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < DOT_ROWS; ++i) sum_lanes(acc[i], out[i]);
}

}  // namespace
}  // namespace lora_kernels

#include "kernels_impl.h"

namespace lora_kernels {
extern const Kernels kernels_avx512bf16 = {shrink, expand, backward_pair, grad_a};
}
