// The CPU kernels' interface: one table of functions per instruction set, plain arguments.
//
// No function is defined here: a function shared by units that are compiled with different
// instruction sets may be taken from any of them by the linker.
#pragma once
#include <cstdint>

namespace lora_kernels {

constexpr int64_t SMALL = 1 << 16;  // multiply-adds below which a second thread costs more

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct bf16x2 {  // two neighbours along a sum, which one instruction multiplies and adds
  bf16 first, second;
};

// A matrix whose columns are contiguous unless col says otherwise; strides in elements.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t row, col;
};

// A 4-bit weight [N, K] in bitsandbytes' layout: codes packed along the flattened rows, the even
// element in the high nibble; one scale a block of `1 << log2_block` elements, 16 or more, which
// may straddle rows. Scales in 8 bits are nested_code[absmax[i]], or that * nested_absmax[i >>
// log2_nested] + offset, rounded twice.
struct Codes4bit {
  const uint8_t* packed;
  const float* code;                                  // [16]
  const void* absmax;                                 // float, or uint8 where there is nested_code
  const float *nested_code, *nested_absmax, *offset;  // [256] and [1], or null
  int log2_block, log2_nested;
  int64_t N, K;
};

struct Dropout {
  const int64_t* rng = nullptr;  // seed, offset; null: keep everything
  uint32_t threshold = 0;
  const int64_t* rows = nullptr;  // which row of the mask each row has; null: its own
};

// P[M, R] = scale * (mask(X) A^T); rows of P, S, dS and D lie lds elements apart, here and below.
struct ShrinkArgs {
  Matrix x, a;
  int64_t M, K, R;
  float scale;
  Dropout dropout;
  float* p;
  int64_t lds;
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
  int64_t lds;
  Matrix q;
  float alpha;
  const float *gate = nullptr, *c = nullptr, *bias = nullptr;
  void* z = nullptr;
  Dropout dropout = {};
  int threads;
};

// Y[M, N] = c * (X W + alpha * mask((S * gate) Q)) + bias: as ExpandArgs, with the product in place
// of what Y held. W[k, n] has X's dtype and is contiguous along k (row 1) or along n (col 1);
// given as codes, it is their transpose where k_inner (the forward), else the codes' own [N, K]
// (dx).
struct ProductArgs {
  Matrix x, w;
  const Codes4bit* codes;  // or null
  bool k_inner;
  int64_t K;
  ExpandArgs update;
};

// dS[M, R] = ds_scale * (dZ B), dB[N, R] = db_scale * (dZ^T S) * gate, dc[N] = sum_m dY * Z,
// dbias[N] = sum_m dY, with dZ = c * dY; null outputs are not computed.
struct BackwardPairArgs {
  Matrix dy, b;
  int64_t M, N, R;
  const float* s;
  const float *gate = nullptr, *c = nullptr;
  const void* z = nullptr;
  float ds_scale, db_scale;
  float* ds;
  int64_t lds;
  void* db;
  DType db_dtype;
  float *dc = nullptr, *dbias = nullptr;
  int threads;
};

// dA[R, K] = D^T mask(X), D[M, R]
struct GradAArgs {
  Matrix x;
  int64_t M, K, R;
  const float* d;
  int64_t lds;
  Dropout dropout;
  void* da;
  DType da_dtype;
  int threads;
};

// Codes and scales of a contiguous weight of n finite elements, in Codes4bit's layout: the element
// over its block's largest magnitude lies above `codes` of the 15 thresholds, and is coded as
// order[codes]. A whole block is multiplied by the reciprocal; a short last one is divided, its
// scale raised to the smallest one, which is what bitsandbytes does.
struct QuantizeArgs {
  const void* weight;
  DType dtype;
  int64_t n;
  int log2_block;
  const float* thresholds;  // [15], rising
  const uint8_t* order;     // [16]
  float smallest;           // scale
  uint8_t* packed;
  float* absmax;
  int threads;
};

// to[rows, cols] (rows ld apart) = the weight's rows from n0 and columns from k0 on, each element
// its code times its scale in float32, rounded once to dtype.
struct DequantizeArgs {
  Codes4bit codes;
  int64_t n0, rows, k0, cols;
  void* to;
  DType dtype;
  int64_t ld;
  int threads;
};

// The layer for a few rows of x: P by ShrinkArgs, then ExpandArgs' equation of it with X W^T in
// place of what Y held. Q is B^T. x is what the product takes, in its dtype; W[k, n] has that dtype
// too and is contiguous along k, or is given as codes, decoded in registers or the L1 cache.
struct FewRowsArgs {
  Matrix x, w;
  const Codes4bit* codes;  // or null
  ShrinkArgs shrink;
  ExpandArgs update;
  bool pairs = true;  // bf16 beside codes may be multiplied as pairs, where a unit has these
};

// norm[N] = the norms of the rows of W + scaling * (B * gate) A: W's rows contiguous, or codes.
struct RowNormArgs {
  Matrix w;
  const Codes4bit* codes;  // or null
  Matrix a, b;             // A [R, K], B [N, R]
  const float* gate;       // [R] or null
  int64_t N, K, R;
  float scaling;
  float* norm;
  int threads;
};

struct Kernels {
  void (*shrink)(const ShrinkArgs&);
  void (*expand)(const ExpandArgs&);
  void (*backward_pair)(const BackwardPairArgs&);
  void (*grad_a)(const GradAArgs&);
  void (*quantize)(const QuantizeArgs&);
  void (*dequantize)(const DequantizeArgs&);
  void (*few_rows)(const FewRowsArgs&);
  void (*row_norm)(const RowNormArgs&);
  void (*product)(const ProductArgs&);  // null if the unit has no GEMM of its own
  double (*multiply_add)(DType, int64_t rounds, int threads);  // see peak_impl.h
};

extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_avx512bf16,
    kernels_amxbf16;

// threads.cpp: run fn(context, thread, threads) on every thread of torch's own pool.
using ThreadFn = void (*)(void* context, int thread, int threads);
void run_threads(int threads, ThreadFn fn, void* context);
// Addresses of GOMP_parallel, omp_get_thread_num, omp_get_num_threads; without them all runs on one
// thread.
void use_openmp(uintptr_t parallel, uintptr_t thread_num, uintptr_t num_threads);
// Among threads of one run: count one more that has come so far; wait until `count` of them have.
void arrive(int* arrived);
void await(const int* arrived, int count);
// Adds count to *next and returns its value before; atomic among a run's threads.
int64_t fetch_add(int64_t* next, int64_t count);

// Scratch memory, 64-byte aligned; throws std::bad_alloc. Taken before threads start, but where
// each has adapters of its own (layer.cpp).
void* scratch_alloc(int64_t bytes);
void scratch_free(void* p);

}  // namespace lora_kernels
