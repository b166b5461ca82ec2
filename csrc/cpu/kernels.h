// The CPU kernels' interface: one table of functions per instruction set, plain arguments.
//
// No function is defined here: a function shared by units that are compiled with different
// instruction sets may be taken from any of them by the linker.
#pragma once
#include <cstdint>

namespace lora_kernels {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct Pair {  // two neighbours along a sum, which one instruction multiplies and adds
  bf16 first, second;
};

// A matrix whose columns are contiguous unless col says otherwise; strides in elements.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t row, col;
};

struct Dropout {
  const int64_t* rng;  // seed, offset; null: keep everything
  uint32_t threshold;
};

// P[M, R] = scale * (mask(X) A^T)
struct ShrinkArgs {
  Matrix x, a;
  int64_t M, K, R;
  float scale;
  Dropout dropout;
  float* p;
  int threads;
};

// Y[M, N] = c * (Y + alpha * mask((S * gate) Q)) + bias in place; Z, where given, gets the inner
// bracket. Q[r, n] has any strides: B^T in the forward, A in the backward. gate: [R] or null.
struct ExpandArgs {
  void* y;
  DType dtype;
  int64_t ldy;
  int64_t M, N, R;
  const float* s;
  Matrix q;
  float alpha;
  const float *gate, *c, *bias;
  void* z;
  Dropout dropout;
  int threads;
};

// Y[M, N] = c * (X W + alpha * mask((S * gate) Q)) + bias: as ExpandArgs, with the product in place
// of what Y held. W[k, n] has X's dtype and is contiguous along k (row 1) or along n (col 1).
struct ProductArgs {
  Matrix x, w;
  int64_t K;
  ExpandArgs update;
};

// dS[M, R] = ds_scale * (dZ B), dB[N, R] = db_scale * (dZ^T S) * gate, dc[N] = sum_m dY * Z,
// dbias[N] = sum_m dY, with dZ = c * dY; null outputs are not computed.
struct BackwardPairArgs {
  Matrix dy, b;
  int64_t M, N, R;
  const float *s, *gate, *c;
  const void* z;
  float ds_scale, db_scale;
  float* ds;
  void* db;
  DType db_dtype;
  float *dc, *dbias;
  int threads;
};

// dA[R, K] = D^T mask(X), D[M, R]
struct GradAArgs {
  Matrix x;
  int64_t M, K, R;
  const float* d;
  Dropout dropout;
  void* da;
  DType da_dtype;
  int threads;
};

struct Kernels {
  void (*shrink)(const ShrinkArgs&);
  void (*expand)(const ExpandArgs&);
  void (*backward_pair)(const BackwardPairArgs&);
  void (*grad_a)(const GradAArgs&);
  void (*product)(const ProductArgs&);  // null where the library's product is left to it
};

extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_avx512bf16;

// threads.cpp: run fn(context, thread, threads) on every thread of torch's own pool.
using ThreadFn = void (*)(void* context, int thread, int threads);
void run_threads(int threads, ThreadFn fn, void* context);
const char* use_torch_openmp();

// Scratch memory, 64-byte aligned; throws std::bad_alloc. Taken before threads start.
void* scratch_alloc(int64_t bytes);
void scratch_free(void* p);

}  // namespace lora_kernels
