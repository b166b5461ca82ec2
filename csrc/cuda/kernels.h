// The CUDA kernels' launchers: raw pointers and sizes in, nothing allocated, nothing waited for.
// Each kernel's comment says what it computes, reads and writes.
#pragma once
#include <stdexcept>
#include <string>

#include "launch.h"
#include "operands.h"

namespace lora_kernels {
namespace gpu {

// why: null where the kernel takes it. Python asks backends/cuda/constraints.py first.
inline void refuse(const char* kernel, const char* why) {
  if (why) throw std::runtime_error(std::string(kernel) + ": " + why);
}

// gemm.cu, decode.cu: y = out_scale ⊙ (x·W + S·Q) + bias -----------------------------------------

struct LinearArgs {
  Matrix x;    // [M, K]
  bool codes;  // whether the weight is c or w
  Matrix w;    // as it is stored: [N, K], or where `transposed` [K, N]
  Codes c;     // the same
  bool transposed;
  int compute;             // the dtype to which x and W are rounded
  const float* p;          // [M, R]
  Matrix q;                // [R, N]
  Vector gate;             // [R]
  float s_scale;           // S = p ⊙ gate · s_scale
  Vector out_scale, bias;  // [N]
  void *y, *z;             // [M, N]; z: before out_scale, or null
  int y_dtype;
  int64_t M, N, K, R;
  float* partials = nullptr;  // gemm with num_splits > 1: [num_splits, M, N]
  int64_t k_per_split = 0;    // gemm
};
void gemm(const LinearArgs&, int num_splits, const Stream&);

struct DecodeArgs {
  LinearArgs linear;  // p is written here; M <= 16; x is in the product's dtype or resident
  Matrix x;           // [M, K], not rounded: P is its product
  Matrix a;           // [R, K]
  float* partials;    // [num_splits, M, R]
  float* p;           // [M, R]
  int* flags;         // 2 + max_blocks, zero before and after
  int64_t k_per_split;
  int num_splits;
  float* tile_partials;   // decode_partials()
  int max_blocks;         // of the launch, at most
  bool resident = false;  // x is kept in shared memory
  // By `decode`: tiles of y, units of a tile and of a block, shares of P.
  int tiles = 0, parts = 0, stripe = 0, num_shares = 0;
};
bool decode_keeps_x(const DecodeArgs&);      // whether it would fit there
int64_t decode_partials(const DecodeArgs&);  // how many tile_partials it may need
void decode(const DecodeArgs&, const Stream&);

// thin.cu ----------------------------------------------------------------------------------------

struct ThinArgs {
  Matrix v;        // [rows, columns]
  Vector v_scale;  // [columns]
  bool over_rows;  // out[i, r] = Σ_j v[j, i] y[r, j], else Σ_j v[i, j] y[r, j]
  Matrix y;        // [R, J]
  float* out;      // [num_splits, I, R]
  int64_t I, J, R, j_per_split;
  int num_splits;
};
void thin(const ThinArgs&, const Stream&);

struct PairArgs {
  Matrix v;            // [M, N]
  Vector v_scale;      // [N]
  Matrix b;            // [N, R]
  const float* s;      // [M, R]
  float* ds_partials;  // [num_splits, M, R]: (v ⊙ v_scale)·b
  float* db_partials;  // [num_row_tiles, N, R]: (v ⊙ v_scale)ᵀ·s
  int64_t M, N, R, n_per_split;
  int num_splits, num_row_tiles;
};
constexpr int64_t PAIR_MAX_RANK = 64;
constexpr int PAIR_ROWS = 64;
void pair(const PairArgs&, const Stream&);

struct SumsArgs {
  Matrix v;         // [M, N]
  Matrix z;         // [M, N], or null
  float* partials;  // [num_splits, N, 2]: Σ v and Σ v ⊙ z
  int64_t M, N, m_per_split;
  int num_splits;
};
void column_sums(const SumsArgs&, const Stream&);

struct ReduceArgs {
  const float* partials;  // [num_splits, I, R]
  Vector gate;            // [R]
  float scale;
  void* out;  // at i * stride_i + r * stride_r: scale · gate[r] · Σ partials
  int dtype;
  int64_t I, R, stride_i, stride_r;
  int num_splits;
};
void reduce(const ReduceArgs&, const Stream&);

// Throws the driver's error if the device cannot run this build. Launches nothing: it queries one
// kernel's attributes, since all kernels have the same targets.
void probe(int device);

// The number of the CUDA graph capture that the stream is in, 0 for none.
unsigned long long capture_id(uintptr_t stream);

}  // namespace gpu
}  // namespace lora_kernels
