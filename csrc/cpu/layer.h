// The forward and the backward of layers: the kernels that one call runs, in order.
#pragma once
#include <vector>

#include "kernels.h"

namespace lora_kernels {

// y = c * (x W^T + ((mask(x) A^T) * gate) B^T * scaling * keep_scale) + bias. Rows or columns of w
// [N, K] are contiguous. If w.data and codes are null, y (in the backward dx) holds the base GEMM
// before the call.
struct Layer {
  Matrix w;
  const Codes4bit* codes;  // a 4-bit w, or null
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
// largest rank; layer.a, b and scaling are not used. Without a base, y holds the base GEMM and the
// bias before the call, and dx the base GEMM. A row of P holds as many ranks as its adapter has;
// the others are not read.
void multi_lora_linear(const Layer& layer, const std::vector<Adapter>& adapters, const Forward& f);

// Reads dy, dz, x and p of Backward and writes dx. The adapters' gradients are in `adapters`.
void multi_lora_linear_backward(const Layer& layer, const std::vector<Adapter>& adapters,
                                const Backward& g);

// Experts: rows of x sorted by expert, each expert with a weight and an adapter of its own. Of the
// layer w, codes, a, b and bias are the first expert's, M counts all rows; gate and c are not used.
struct Experts {
  int64_t count;
  const int64_t* stops;          // [count], one past each expert's last row, rising
  int64_t w, table, a, b, bias;  // from one expert to the next, in elements; table: nested_code's
  int64_t da, db;                // the same of the gradients, which are contiguous
  bool transposed;               // as in Layer
  int64_t few_rows;  // an expert of no more rows takes few_rows in the forward; 0: none does
  bool has_base;     // else y and dx hold the base GEMM of the others
};

// As lora_linear for each expert. Rows of y and P after the last expert's are zeros. Codes must
// begin a block, and a block of nested scales, at each expert. B of any strides: that of the
// experts with rows is copied if it is not contiguous.
void lora_experts(Layer layer, Experts experts, const Forward& f);

// As lora_linear_backward for each expert. Zeros: the gradients of an expert without rows, and dx
// after the last expert's rows. dbias is [count, N].
void lora_experts_backward(Layer layer, Experts experts, const Backward& g);

}  // namespace lora_kernels
