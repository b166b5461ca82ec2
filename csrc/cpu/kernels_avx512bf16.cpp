#include "vec_avx512bf16.h"
#include "kernels_impl.h"
#include "codes_impl.h"
#include "streamed_impl.h"
#include "few_rows_impl.h"
#include "product_impl.h"
#include "peak_impl.h"

namespace lora_kernels {
namespace {

// These kernels round nothing to bf16 except a decoded weight. It keeps its subnormals, which this
// unit's instructions would flush.
void quantize_as_avx512(const QuantizeArgs& a) { kernels_avx512.quantize(a); }
void dequantize_as_avx512(const DequantizeArgs& a) { kernels_avx512.dequantize(a); }
void row_norm_as_avx512(const RowNormArgs& a) { kernels_avx512.row_norm(a); }

}  // namespace

extern const Kernels kernels_avx512bf16 = {shrink,
                                           expand,
                                           backward_pair,
                                           grad_a,
                                           quantize_as_avx512,
                                           dequantize_as_avx512,
                                           gemv,
                                           row_norm_as_avx512,
                                           gemm,
                                           multiply_add};
}  // namespace lora_kernels
