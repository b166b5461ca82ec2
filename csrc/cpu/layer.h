// The forward and the backward of layers: the kernels that one call runs, in order.
#pragma once
#include <vector>

#include "kernels.h"

namespace lora_kernels {

// y = c * (x W^T + ((mask(x) A^T) * gate) B^T * scaling * keep_scale) + bias. Rows or columns of w
// [N, K] are contiguous. If w.data and codes are null, y (in the backward dx) holds the base GEMM
// before the call.
// Returns the kind of codes of 4 or 8 bits whose values are `code`. The kernels convert those of 8
// bits that are numbers by themselves, and look up the others.
CodeKind kind_of(int64_t bits, const float* code);

struct Layer {
  Matrix w;
  const Codes* codes;  // a 4-bit w, or null
  int64_t M, K, N, R;
  int64_t lds;    // distance of P's rows, R or more
  Matrix a, b;    // a: [R, K] with contiguous rows; b: [N, R], any strides
  float scaling;  // alpha / r
  const float *gate = nullptr, *c = nullptr, *bias = nullptr;
  Dropout dropout;
  float keep_scale;  // 1 / (1 - p)
  int threads;
  bool transposed = false;  // the codes are [K, N]: W's transpose
};

// Outputs: P[M, R] = keep_scale * mask(x) A^T, y, and z, which is what c multiplies, unless null.
struct Forward {
  Matrix x, xs;   // xs: x in the base GEMM's dtype
  bool few_rows;  // GEMV: w is read once for all rows
  float* p;
  void* y;
  DType dtype;
  void* z = nullptr;
};

// Gradients whose pointers are null are not computed. dz is c * dy. z is the forward's.
struct Backward {
  Matrix dy, dz, x;
  const float* p;
  const void* z = nullptr;
  void *dx = nullptr, *da = nullptr, *db = nullptr;  // in x's, A's and B's dtypes
  float *dg = nullptr, *dc = nullptr, *dbias = nullptr;
};

void lora_linear(const Layer& layer, const Forward& f);
void lora_linear_backward(const Layer& layer, const Backward& g);

// One of several adapters, for the rows [start, stop) of x.
struct Adapter {
  int64_t start, stop;
  Matrix a, b;    // as in Layer
  int64_t R;      // its rank
  float scaling;  // alpha / r
  void *da, *db;  // their gradients, in their dtypes; not computed where null
};

// lora_linear with an adapter for each row of x that has one, without gate and c. layer.R is the
// largest rank; layer.a, b and scaling are not used. Without a base, y and dx hold the base GEMM
// before the call. A row of P holds as many ranks as its adapter has; the others are not read.
void multi_lora_linear(const Layer& layer, const std::vector<Adapter>& adapters, const Forward& f);

// Reads dy, dz, x and p of Backward and writes dx. The adapters' gradients are in `adapters`.
void multi_lora_linear_backward(const Layer& layer, const std::vector<Adapter>& adapters,
                                const Backward& g);

// Experts: rows of x sorted by expert, each expert with a weight of its own, and an expert's rows
// by tenant, each tenant with an adapter of its own in every expert. Of the layer w, codes and bias
// are the first expert's, M counts all rows, R is the largest rank; a, b, scaling, gate and c are
// not used.
struct Experts {
  int64_t count, tenants;
  const int64_t* stops;  // [count, tenants], one past each pair's last row, rising
  // from one expert to the next, in elements; table: nested_code's, 0 if experts share it
  int64_t w_stride, table_stride, bias_stride;
  bool transposed;   // as in Layer
  int64_t few_rows;  // an expert of no more rows takes few_rows in the forward; 0: none does
  bool has_base;     // else y and dx hold the base GEMM of the others
};

// The adapters of one tenant.
struct Tenant {
  Matrix a, b;  // the first expert's, as in Layer; b's rows or columns are contiguous,
                // or it is as PEFT stores it, [N, R, count], and its gradient too
  int64_t a_stride, b_stride;  // from one expert to the next, in elements
  int64_t R;                   // their rank
  float scaling;               // alpha / r
  void *da, *db;  // their gradients [count, R, K] and [count, N, R] or [N, R, count], in their
                  // dtypes; not computed where null
};

// As lora_linear for each expert with one tenant, else as multi_lora_linear. Rows of y and P after
// the last expert's are zeros. Codes must begin a block, and a block of nested scales, at each
// expert.
void lora_experts(const Layer& layer, const Experts& experts, const std::vector<Tenant>& tenants,
                  const Forward& f);

// As the backward for each expert. Zeros: the gradients of a pair without rows, and dx after the
// last expert's rows. dbias is [count, N].
void lora_experts_backward(const Layer& layer, const Experts& experts,
                           const std::vector<Tenant>& tenants, const Backward& g);

}  // namespace lora_kernels
