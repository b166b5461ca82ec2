// The interface of the CPU kernels: a table of functions for each instruction set, with plain
// arguments.
//
// No function is defined here. The units are compiled for different instruction sets, and the
// linker may take a function that they share from any of them.
#pragma once
#include <cstdint>

namespace lora_kernels {

constexpr int64_t MIN_PARALLEL_WORK = 1 << 16;  // multiply-adds; below, one thread is faster
constexpr int64_t MIN_SPLIT_ROWS = 128;  // of x; from here on AMX multiplies float32 as three bf16

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Two neighbours along a sum, which one instruction multiplies and adds.
struct bf16x2 {
  bf16 first, second;
};

// Strides are in elements. Columns are contiguous (col_stride 1) unless said otherwise.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t row_stride, col_stride;
};

enum class ScaleType : int { f32, f16, u8 };

// How a code stands for a value.
enum class CodeKind : int {
  nibble,  // 4 bits, an index of code[16]; the even element in the high nibble
  int8,    // 8 bits, the value itself
  e4m3,    // 8 bits, a float8 without infinities
  byte,    // 8 bits, an index of code[256]
};

// A quantized weight [N, K]. Codes are packed along the flattened rows. An element is
//   value(code) * scale           or, with a shift, value(code) * scale + shift, rounded twice
// Each block of 1 << log2_block elements, 16 or more, has a scale. Only blocks of nibbles without a
// shift may straddle rows. The scale of block i is one of
//   absmax[i]                                           in float32 or float16
//   nested_code[absmax[i]]                              without nested_absmax
//   nested_code[absmax[i]] * nested_absmax[i >> log2_nested], rounded; with offset, + it, rounded
// With a shift absmax and nested_absmax are arrays of pairs: of a scale and a shift.
struct Codes {
  const uint8_t* packed;
  const float* code;                                  // [16], or [256] of 8 bits
  const void* absmax;                                 // of scale_type; u8 with nested_code
  const float *nested_code, *nested_absmax, *offset;  // [256] and [1], or null
  int log2_block, log2_nested;
  int64_t N, K;
  CodeKind kind = CodeKind::nibble;
  ScaleType scale_type = ScaleType::f32;
  bool has_shift = false;
};

// Returns whether no block straddles two rows.
inline bool is_block_aligned(const Codes& w) { return w.K % (int64_t{1} << w.log2_block) == 0; }

// The bytes of a scale or a shift.
inline int64_t scale_bytes(const Codes& w) {
  return w.scale_type == ScaleType::f32 ? 4 : w.scale_type == ScaleType::f16 ? 2 : 1;
}

struct Dropout {
  const int64_t* rng = nullptr;  // seed, offset; null: no dropout
  uint32_t threshold = 0;
  const int64_t* rows = nullptr;  // row of the mask of each row; null: the same row
};

// P[M, R] = scale * (mask(X) A^T). Here and below, rows of P, S, dS and D lie lds elements apart.
struct ShrinkArgs {
  Matrix x, a;
  int64_t M, K, R;
  float scale;
  Dropout dropout;
  float* p;
  int64_t lds;
  int threads;
};

// Y[M, N] = c * (Y + alpha * mask((S * gate) Q)) + bias in place. Z gets what c multiplies, unless
// it is null. Q[r, n] has any strides: it is B^T in the forward, A in the backward. gate: [R] or
// null.
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

// Y[M, N] = c * (X W + alpha * mask((S * gate) Q)) + bias, with the other arguments of ExpandArgs.
// W[k, n] has X's dtype, and is contiguous along k (row_stride 1) or along n (col_stride 1). A
// 4-bit W is given as codes: W is their transpose if is_transposed (the forward), else W is stored
// as codes (dx).
struct GemmArgs {
  Matrix x, w;
  const Codes* codes;  // or null
  bool is_transposed;
  int64_t K;
  ExpandArgs update;
};

// dS[M, R] = ds_scale * (dZ B), dB[N, R] = db_scale * (dZ^T S) * gate, dc[N] = sum_m dY * Z and
// dbias[N] = sum_m dY, with dZ = c * dY. Null outputs are not computed.
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

// Quantizes n finite elements of a contiguous weight to Codes's layout. The scale of a block is
// its largest magnitude. An element divided by it lies above `bin` of the 15 thresholds and gets
// the code bin_codes[bin]. As in bitsandbytes, whole blocks are multiplied by the reciprocal of the
// scale. A short last block is divided, and its scale is min_scale or more.
struct QuantizeArgs {
  const void* weight;
  DType dtype;
  int64_t n;
  int log2_block;
  const float* thresholds;   // [15], rising
  const uint8_t* bin_codes;  // [16]
  float min_scale;
  uint8_t* packed;
  float* absmax;
  int threads;
};

// out[i, j] = W[n0 + i, k0 + j] for `rows` rows, ld elements apart, of `cols` columns. An element
// is its code times its scale in float32, rounded once to dtype.
struct DequantizeArgs {
  Codes codes;
  int64_t n0, rows, k0, cols;
  void* out;
  DType dtype;
  int64_t ld;
  int threads;
};

// The layer for a few rows of x: P by ShrinkArgs, then Y = c * (X W + alpha * mask((P * gate) Q)) +
// bias with Q = B^T. x and W[k, n] have the dtype of the base GEMM. W is contiguous along k, or is
// given as codes, which are decoded in registers or in the L1 cache.
struct GemvArgs {
  Matrix x, w;
  const Codes* codes;  // or null
  ShrinkArgs shrink;
  ExpandArgs update;
  bool allows_pairs = true;  // of bf16, for x with codes, if the unit has them
};

// norm[n] = the norm of row n of W + scaling * (B * gate) A. W has contiguous rows, or is given as
// codes.
struct RowNormArgs {
  Matrix w;
  const Codes* codes;  // or null
  Matrix a, b;         // A [R, K], B [N, R]
  const float* gate;   // [R] or null
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
  void (*gemv)(const GemvArgs&);
  void (*row_norm)(const RowNormArgs&);
  void (*gemm)(const GemmArgs&);  // null if the unit has no GEMM of its own
  double (*multiply_add)(DType, int64_t rounds, int threads);  // see peak_impl.h
};

extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_avx512bf16,
    kernels_amxbf16;

// Runs fn(context, thread, threads) on the threads of torch's pool. In threads.cpp, as all below.
using ThreadFn = void (*)(void* context, int thread, int threads);
void run_threads(int threads, ThreadFn fn, void* context);
// Sets the addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads. Until then
// everything runs on one thread.
void use_openmp(uintptr_t parallel, uintptr_t thread_num, uintptr_t num_threads);
// A barrier among the threads of one run: `arrive` counts a thread, `await` waits until `count`
// threads have arrived.
void arrive(int* arrived);
void await(const int* arrived, int count);
// Adds `count` to *next, atomically among the threads of a run, and returns the value before.
int64_t fetch_add(int64_t* next, int64_t count);

// Scratch memory, aligned to 64 bytes; throws std::bad_alloc. It is allocated before threads start,
// except by threads that run adapters of their own (layer.cpp).
void* scratch_alloc(int64_t bytes);
void scratch_free(void* p);

}  // namespace lora_kernels
