#include "vec_scalar.h"
#include "kernels_impl.h"
#include "codes_impl.h"
#include "streamed_impl.h"
#include "few_rows_impl.h"
#include "row_norm_impl.h"
#include "peak_impl.h"

namespace lora_kernels {
extern const Kernels kernels_scalar = {shrink,     expand, backward_pair, grad_a,  quantize,
                                       dequantize, gemv,   row_norm,      nullptr, multiply_add};
}
