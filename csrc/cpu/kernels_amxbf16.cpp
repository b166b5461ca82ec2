#include "vec_avx512bf16.h"
#include "kernels_impl.h"
#include "codes_impl.h"
#include "product_impl.h"
#include "amx_impl.h"
#include "amx_thin_impl.h"
#include "peak_impl.h"

namespace lora_kernels {
namespace {

// These kernels use no tiles, so they are the AVX-512 unit's.
void quantize_as_avx512(const QuantizeArgs& a) { kernels_avx512.quantize(a); }
void dequantize_as_avx512(const DequantizeArgs& a) { kernels_avx512.dequantize(a); }
void row_norm_as_avx512(const RowNormArgs& a) { kernels_avx512.row_norm(a); }

}  // namespace

extern const Kernels kernels_amxbf16 = {
    shrink_tiles,         expand_tiles, backward_pair_tiles, grad_a_tiles, quantize_as_avx512,
    dequantize_as_avx512, gemv_widened, row_norm_as_avx512,  gemm_tiles,   multiply_add};
}  // namespace lora_kernels
