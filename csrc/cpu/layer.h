// One call a direction: which kernels a layer's forward and backward run, in which order.
#pragma once
#include "kernels.h"

namespace lora_kernels {

// y = c * (x W^T + ((mask(x) A^T) * gate) B^T * scaling * keep_scale) + bias. w [N, K] is
// contiguous one way or the other; where w.data is null, y (in the backward dx) holds the base
// product already.
struct Layer {
  Matrix w, a, b;          // a: [R, K] with contiguous rows; b: [N, R], any strides
  const Codes4bit* codes;  // w as codes, or null
  int64_t M, K, N, R;
  float scaling, keep_scale;     // alpha / r, 1 / (1 - p)
  const float *gate, *c, *bias;  // or null
  Dropout dropout;
  int threads;
};

// P[M, R] = keep_scale * mask(x) A^T, y, and where z is given the bracket that c multiplies.
struct Forward {
  Matrix x, xs;   // xs: x in the dtype of the base product
  bool few_rows;  // of x, for which w is read once
  float* p;
  void* y;
  DType dtype;
  void* z;
};

// Gradients whose pointers are null are not computed. dz is c * dy; z as kept by the forward.
struct Backward {
  Matrix dy, dz, x;
  const float* p;
  const void* z;
  void *dx, *da, *db;  // in x's, A's and B's dtypes
  float *dg, *dc, *dbias;
};

void lora_linear(const Layer& layer, const Forward& f);
void lora_linear_backward(const Layer& layer, const Backward& g);

// One of several adapters, and the rows [start, stop) of x that are its own.
struct Adapter {
  int64_t start, stop;
  Matrix a, b;  // a: [R, K] with contiguous rows; b: [N, R], any strides
  int64_t R;
  float scaling;  // alpha / r
  void *da, *db;  // their gradients, in their dtypes; not computed where null
};

// y = x W^T + bias, and on the rows of each adapter + (mask(x) A^T) B^T * scaling * keep_scale. No
// row has two adapters, some may have none. Where w.data and codes are null, y holds the base
// product and the bias, in the backward dx the base product.
struct MultiLayer {
  Matrix w;
  const Codes4bit* codes;
  int64_t M, K, N, R;  // R: the largest
  const Adapter* adapters;
  int64_t count;  // of adapters
  float keep_scale;
  const float* bias;  // or null
  Dropout dropout;
  int threads;
};

// Rows of P [M, R] hold an adapter's ranks and nothing that is read after them.
void multi_lora_linear(const MultiLayer& layer, const Forward& f);

// Of Backward dy, dz, x, p and dx; the adapters' gradients are where Adapter says.
void multi_lora_linear_backward(const MultiLayer& layer, const Backward& g);

}  // namespace lora_kernels
