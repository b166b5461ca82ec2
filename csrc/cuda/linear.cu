// The layer for any strides, dtypes and sizes, in float32 on CUDA cores (FFMA): float32's own
// kernel, and the one for operands that the tensor core kernels do not take.
#include "kernels.h"
#include "operands.cuh"

namespace lora_kernels {
namespace gpu {
namespace {

constexpr int THREADS = 256;
constexpr int TILE = 64, DEPTH = 32;
constexpr int SPAN = 4;  // steps of DEPTH that are summed by themselves
constexpr int PITCH = TILE + 4;

LK_DEVICE float rounded(float value, int dtype) {
  if (dtype == BF16) return bf16_to_f32(f32_to_bf16(value));
  if (dtype == F16) return f16_to_f32(f32_to_f16(value));
  return value;
}

// Eight elements of a row of codes, from a multiple of eight on; zeros past the row's end.
LK_DEVICE void decode8(const Codes& c, int64_t n, int64_t k, float out[8]) {
  const int64_t at = n * c.K + k;
  if (c.vectors && k + 8 <= c.K) {
    const uint32_t word = ldg(reinterpret_cast<const uint32_t*>(c.packed + (at >> 1)));
    const float scale = scale_of(c, at >> c.log2_block);
    LK_UNROLL
    for (int e = 0; e < 8; ++e) out[e] = mul_rn(ldg(c.code + (word >> (4 * (e ^ 1)) & 15)), scale);
    return;
  }
  LK_UNROLL
  for (int e = 0; e < 8; ++e) out[e] = k + e < c.K ? decode(c, n, k + e) : 0.0f;
}

LK_DEVICE void store_across(uint32_t tile, int inner, int outer, const float v[8]) {
  LK_UNROLL
  for (int e = 0; e < 8; ++e) sts(tile + ((inner + e) * PITCH + outer) * 4, v[e]);
}
LK_DEVICE void store_along(uint32_t tile, int inner, int outer, const float v[8]) {
  LK_UNROLL
  for (int half = 0; half < 2; ++half) {
    Words4 w;
    LK_UNROLL
    for (int e = 0; e < 4; ++e) w.w[e] = f32_to_bits(v[4 * half + e]);
    sts(tile + (inner * PITCH + outer + 4 * half) * 4, w);
  }
}

LK_DEVICE void multiply(uint32_t xs, uint32_t ws, int m, int n, float acc[4][4]) {
  LK_UNROLL
  for (int k = 0; k < DEPTH; ++k) {
    const Words4 x = lds<Words4>(xs + (k * PITCH + m) * 4),
                 w = lds<Words4>(ws + (k * PITCH + n) * 4);
    LK_UNROLL
    for (int i = 0; i < 4; ++i) LK_UNROLL
    for (int j = 0; j < 4; ++j)
      acc[i][j] = fma_rn(bits_to_f32(x.w[i]), bits_to_f32(w.w[j]), acc[i][j]);
  }
}

// One chain over all of K would lose more than cuBLAS's blocked GEMM does.
LK_DEVICE void add_to(float total[4][4], float acc[4][4]) {
  LK_UNROLL
  for (int i = 0; i < 4; ++i) LK_UNROLL
  for (int j = 0; j < 4; ++j) {
    total[i][j] += acc[i][j];
    acc[i][j] = 0.0f;
  }
}

// y [M, N] = out_scale ⊙ (x·W + mask(S)·Q) + bias, z without out_scale and bias; a block makes 64
// by 64, each thread 4 by 4. Bytes: x and W once for each 64 columns and rows, P and Q too, y and z
// once. Flops 2·M·N·(K + R). Rounding points: x, W to `compute`; sums in float32; y and z once.
// Deterministic. Tested by tests/cuda_emulated/test_lora_linear.py.
LK_KERNEL LK_BOUNDS(THREADS, 2) linear_kernel(const LinearArgs a) {
  const uint32_t xs = shared_base(), ws = xs + DEPTH * PITCH * 4;
  const int64_t m0 = (int64_t)block_x() * TILE, n0 = (int64_t)block_y() * TILE;
  const int thread = thread_id(), m = thread / 16 * 4, n = thread % 16 * 4;
  float acc[4][4];
  LK_UNROLL
  for (int i = 0; i < 4; ++i) LK_UNROLL
  for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;

  LK_ONCE
  for (int64_t r0 = 0; r0 < a.R; r0 += DEPTH) {
    sync_block();
    for (int u = thread; u < TILE * DEPTH; u += THREADS) {
      const int row = u / DEPTH, r = u % DEPTH;
      float s = 0.0f;
      if (m0 + row < a.M && r0 + r < a.R) {
        s = ldg(a.p + (m0 + row) * a.R + r0 + r) * a.s_scale;
        if (a.gate.data) s *= load_at(a.gate.data, a.gate.dtype, r0 + r);
      }
      sts(xs + (r * PITCH + row) * 4, s);
    }
    for (int u = thread; u < TILE * DEPTH; u += THREADS) {
      const int r = a.transposed ? u / TILE : u % DEPTH,
                column = a.transposed ? u % TILE : u / DEPTH;
      const bool inside = n0 + column < a.N && r0 + r < a.R;
      sts(ws + (r * PITCH + column) * 4, inside ? load(a.q, r0 + r, n0 + column) : 0.0f);
    }
    sync_block();
    multiply(xs, ws, m, n, acc);
  }
  float total[4][4];
  LK_UNROLL
  for (int i = 0; i < 4; ++i) LK_UNROLL
  for (int j = 0; j < 4; ++j) total[i][j] = 0.0f;
  add_to(total, acc);
  if (a.mask.rng) LK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t kept = keep4(a.mask, m0 + m + i, n0 + n);
    LK_UNROLL
    for (int j = 0; j < 4; ++j)
      if (!(kept >> j & 1)) total[i][j] = 0.0f;
  }

  const int64_t depth = a.codes || a.dense ? a.K : 0;
  LK_ONCE
  for (int64_t k0 = 0; k0 < depth; k0 += DEPTH) {
    sync_block();
    {
      const int row = thread / 4, k = thread % 4 * 8;
      float v[8];
      LK_UNROLL
      for (int e = 0; e < 8; ++e) v[e] = 0.0f;
      if (m0 + row < a.M) load8(a.x, m0 + row, k0 + k, a.K, v);
      LK_UNROLL
      for (int e = 0; e < 8; ++e) v[e] = rounded(v[e], a.compute);
      store_across(xs, k, row, v);
    }
    // Along the weight's own rows: k inside of n, or n inside of k.
    const int outer = a.transposed ? thread / 8 : thread / 4;
    const int inner = a.transposed ? thread % 8 * 8 : thread % 4 * 8;
    const int64_t row = (a.transposed ? k0 : n0) + outer, column = (a.transposed ? n0 : k0) + inner;
    const int64_t rows = a.transposed ? a.K : a.N, columns = a.transposed ? a.N : a.K;
    float v[8];
    LK_UNROLL
    for (int e = 0; e < 8; ++e) v[e] = 0.0f;
    if (row < rows) {
      if (a.codes)
        decode8(a.c, row, column, v);
      else
        load8(a.w, row, column, columns, v);
    }
    LK_UNROLL
    for (int e = 0; e < 8; ++e) v[e] = rounded(v[e], a.compute);
    if (a.transposed)
      store_along(ws, outer, inner, v);
    else
      store_across(ws, inner, outer, v);
    sync_block();
    multiply(xs, ws, m, n, acc);
    if ((k0 / DEPTH + 1) % SPAN == 0 || k0 + DEPTH >= depth) add_to(total, acc);
  }

  LK_UNROLL
  for (int i = 0; i < 4; ++i) LK_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int64_t row = m0 + m + i, column = n0 + n + j;
    if (row >= a.M || column >= a.N) continue;
    float y = total[i][j];
    if (a.z) store_at(a.z, a.y_dtype, row * a.N + column, y);
    if (a.out_scale.data) y *= load_at(a.out_scale.data, a.out_scale.dtype, column);
    if (a.bias.data) y += load_at(a.bias.data, a.bias.dtype, column);
    store_at(a.y, a.y_dtype, row * a.N + column, y);
  }
}

}  // namespace

void linear(const LinearArgs& a, const Stream& stream) {
  const auto tiles = [](int64_t n) { return (unsigned)((n + TILE - 1) / TILE); };
  launch({.name = "linear",
          .x = tiles(a.M),
          .y = tiles(a.N),
          .threads = THREADS,
          .shared_bytes = 2 * DEPTH * PITCH * 4,
          .stream = stream},
         linear_kernel, a);
}

}  // namespace gpu
}  // namespace lora_kernels
