#include "vec_avx512bf16.h"

#define LK_AMX

#include "kernels_impl.h"
#include "codes_impl.h"
#include "streamed_impl.h"
#include "few_rows_impl.h"
#include "row_norm_impl.h"
#include "product_impl.h"
#include "amx_impl.h"
#include "amx_thin_impl.h"

namespace lora_kernels {
extern const Kernels kernels_amxbf16 = {shrink_tiles, expand_tiles, backward_pair_tiles,
                                        grad_a_tiles, quantize,     dequantize,
                                        few_rows,     row_norm,     product_of_tiles};
}
