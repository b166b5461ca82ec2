// Compiled with -mavx2 -mfma -mf16c -mbmi2 (setup.py). vec_avx2.h comes first: the other headers
// use its names.
#include "vec_avx2.h"
#include "kernels_impl.h"
#include "codes_impl.h"
#include "streamed_impl.h"
#include "few_rows_impl.h"
#include "row_norm_impl.h"
#include "peak_impl.h"

namespace lora_kernels {
extern const Kernels kernels_avx2 = {shrink,   expand,      backward_pair, grad_a,
                                     quantize, dequantize,  gemv,          row_norm,
                                     nullptr,  multiply_add};  // no fused GEMM: torch.mm runs it
}
