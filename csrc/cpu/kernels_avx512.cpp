#include "vec_avx512.h"
#include "kernels_impl.h"
#include "codes_impl.h"
#include "streamed_impl.h"
#include "few_rows_impl.h"
#include "row_norm_impl.h"
#include "product_impl.h"
#include "peak_impl.h"

namespace lora_kernels {
extern const Kernels kernels_avx512 = {shrink,     expand, backward_pair, grad_a, quantize,
                                       dequantize, gemv,   row_norm,      gemm,   multiply_add};
}
