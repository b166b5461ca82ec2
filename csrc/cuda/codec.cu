// The 4-bit format by itself, and DoRA's row norm over it.
#include "kernels.h"
#include "operands.cuh"

namespace lora_kernels {
namespace gpu {
namespace {

constexpr int THREADS = 128;
constexpr int NORM_ROWS = 8, NORM_COLUMNS = 2;  // a thread's columns, THREADS apart

// w [N, K] = code × scale, both levels of quantization at once; a thread eight elements.
// Bytes: codes, scales, w. Rounding points: a nested scale twice, code × scale, w.
// Tested by tests/cuda_emulated/test_exact.py, bit for bit.
LK_KERNEL LK_BOUNDS(THREADS, 8) dequantize_kernel(const DequantizeArgs a) {
  const int64_t n = a.c.N * a.c.K, at = ((int64_t)block_x() * THREADS + thread_id()) * 8;
  if (at >= n) return;
  float w[8];
  if (at + 8 <= n && a.c.vectors) {
    const uint32_t word = ldg(reinterpret_cast<const uint32_t*>(a.c.packed + at / 2));
    const float scale = scale_of(a.c, at >> a.c.log2_block);
    LK_UNROLL
    for (int e = 0; e < 8; ++e) w[e] = mul_rn(ldg(a.c.code + (word >> (4 * (e ^ 1)) & 15)), scale);
  } else {
    LK_UNROLL
    for (int e = 0; e < 8; ++e) w[e] = at + e < n ? decode(a.c, 0, at + e) : 0.0f;
  }
  if (a.dtype != F32 && at + 8 <= n) {  // new memory is aligned
    Words4 out;
    LK_UNROLL
    for (int e = 0; e < 4; ++e)
      out.w[e] =
          a.dtype == BF16 ? pack_bf16(w[2 * e], w[2 * e + 1]) : pack_f16(w[2 * e], w[2 * e + 1]);
    stg(reinterpret_cast<Words4*>(static_cast<uint16_t*>(a.w) + at), out);
    return;
  }
  LK_UNROLL
  for (int e = 0; e < 8; ++e)
    if (at + e < n) store_at(a.w, a.dtype, at + e, w[e]);
}

LK_DEVICE float max_of_warp(float value) {
  LK_UNROLL
  for (int mask = 16; mask > 0; mask >>= 1) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// packed and absmax of n elements one after another; a warp a block.
// A short last block is divided by its scale, whole ones are multiplied by its reciprocal; a scale
// is NaN where an element is. Bytes: w once (again from cache), codes, scales. Tested by
// tests/cuda_emulated/test_exact.py, bit for bit.
LK_KERNEL LK_BOUNDS(THREADS, 8) quantize_kernel(const QuantizeArgs a) {
  const int lane = thread_id() % 32;
  const int64_t block = (int64_t)block_x() * (THREADS / 32) + thread_id() / 32;
  const int64_t first = block * a.blocksize, end = min_of(a.n, first + a.blocksize);
  if (first >= a.n) return;
  float largest = 0.0f, nans = 0.0f;
  for (int64_t i = first + lane; i < end; i += 32) {
    const float w = load_at(a.w, a.dtype, i), size = w < 0.0f ? -w : w;
    if (size > largest) largest = size;
    if (w != w) nans += 1.0f;
  }
  largest = max_of_warp(largest);
  if (sum_of_warp(nans) > 0.0f) largest = bits_to_f32(0x7FC00000u);
  const bool is_short = first + a.blocksize > a.n;
  const float divisor = largest > a.smallest ? largest : largest != largest ? largest : a.smallest;
  if (lane == 0) stg(a.absmax + block, is_short ? divisor : largest);
  const float reciprocal = div_rn(1.0f, divisor);
  for (int64_t i = first + 2 * lane; i < end; i += 64) {
    uint32_t byte = 0;
    LK_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float w = i + e < end ? load_at(a.w, a.dtype, i + e) : 0.0f;
      float scaled = is_short ? div_rn(w, divisor) : mul_rn(w, reciprocal);
      if (scaled > 1.0f) scaled = 1.0f;
      if (scaled < -1.0f) scaled = -1.0f;
      int below = 0;
      LK_UNROLL
      for (int level = 0; level < 15; ++level) below += scaled > ldg(a.thresholds + level);
      // An element past the end is packed as zero.
      byte |= (uint32_t)ldg(a.order + below) << (e ? 0 : 4);
    }
    stg(a.packed + i / 2, (uint8_t)byte);
  }
}

// partials[split, n] = Σ_k (w + scaling · (b ⊙ gate)·a)² over the split's columns, by itself for
// each of eight rows; the update is made in registers and nowhere else.
// Bytes: w once, a once for each eight rows, b. Flops 2·N·K·R. Rounding points: none but float32.
// Deterministic. Tested by tests/cuda_emulated/test_dora_norm.py.
LK_KERNEL LK_BOUNDS(THREADS, 4) norm_kernel(const NormArgs a) {
  const uint32_t bs = shared_base(), sums = bs + NORM_ROWS * (uint32_t)a.R * 4;
  const int thread = thread_id(), R = (int)a.R;
  const int64_t n0 = (int64_t)block_x() * NORM_ROWS;
  const int64_t first = (int64_t)block_y() * a.k_per_split,
                end = min_of(a.K, first + a.k_per_split);
  for (int u = thread; u < NORM_ROWS * R; u += THREADS) {
    const int row = u % NORM_ROWS, r = u / NORM_ROWS;
    float b = n0 + row < a.N ? load(a.b, n0 + row, r) : 0.0f;
    if (a.gate.data) b *= load_at(a.gate.data, a.gate.dtype, r);
    sts(bs + (r * NORM_ROWS + row) * 4, b);
  }
  sync_block();
  float total[NORM_ROWS];
  LK_UNROLL
  for (int i = 0; i < NORM_ROWS; ++i) total[i] = 0.0f;
  LK_ONCE
  for (int64_t k0 = first + thread; k0 < end; k0 += THREADS * NORM_COLUMNS) {
    float update[NORM_ROWS][NORM_COLUMNS];
    LK_UNROLL
    for (int i = 0; i < NORM_ROWS; ++i) LK_UNROLL
    for (int j = 0; j < NORM_COLUMNS; ++j) update[i][j] = 0.0f;
    for (int r = 0; r < R; ++r) {
      const Words4 low = lds<Words4>(bs + r * NORM_ROWS * 4),
                   high = lds<Words4>(bs + r * NORM_ROWS * 4 + 16);
      LK_UNROLL
      for (int j = 0; j < NORM_COLUMNS; ++j) {
        const int64_t k = k0 + j * THREADS;
        const float v = k < end ? load(a.a, r, k) : 0.0f;
        LK_UNROLL
        for (int i = 0; i < NORM_ROWS; ++i)
          update[i][j] = fma_rn(bits_to_f32(i < 4 ? low.w[i] : high.w[i - 4]), v, update[i][j]);
      }
    }
    LK_UNROLL
    for (int j = 0; j < NORM_COLUMNS; ++j) {
      const int64_t k = k0 + j * THREADS;
      LK_UNROLL
      for (int i = 0; i < NORM_ROWS; ++i) {
        if (k >= end || n0 + i >= a.N) continue;
        const float w = a.codes ? decode(a.c, n0 + i, k) : load(a.w, n0 + i, k);
        const float sum = fma_rn(update[i][j], a.scaling, w);
        total[i] = fma_rn(sum, sum, total[i]);
      }
    }
  }
  LK_UNROLL
  for (int i = 0; i < NORM_ROWS; ++i) {
    const float sum = sum_of_warp(total[i]);
    if (thread % 32 == 0) sts(sums + (thread / 32 * NORM_ROWS + i) * 4, sum);
  }
  sync_block();
  if (thread < NORM_ROWS && n0 + thread < a.N) {
    float sum = 0.0f;
    LK_UNROLL
    for (int warp = 0; warp < THREADS / 32; ++warp)
      sum += lds<float>(sums + (warp * NORM_ROWS + thread) * 4);
    stg(a.partials + block_y() * a.N + n0 + thread, sum);
  }
}

unsigned blocks(int64_t n, int64_t each) { return (unsigned)((n + each - 1) / each); }

}  // namespace

void dequantize(const DequantizeArgs& a, const Stream& stream) {
  launch({.name = "dequantize",
          .x = blocks(a.c.N * a.c.K, THREADS * 8),
          .threads = THREADS,
          .stream = stream},
         dequantize_kernel, a);
}

void probe(int device) { require_image(dequantize_kernel, device, "the driver says"); }

void quantize(const QuantizeArgs& a, const Stream& stream) {
  const int64_t count = (a.n + a.blocksize - 1) / a.blocksize;
  launch(
      {.name = "quantize", .x = blocks(count, THREADS / 32), .threads = THREADS, .stream = stream},
      quantize_kernel, a);
}

void row_norm(const NormArgs& a, const Stream& stream) {
  launch({.name = "norm",
          .x = blocks(a.N, NORM_ROWS),
          .y = (unsigned)a.num_splits,
          .threads = THREADS,
          .shared_bytes = (unsigned)(NORM_ROWS * a.R * 4 + THREADS / 32 * NORM_ROWS * 4),
          .stream = stream},
         norm_kernel, a);
}

}  // namespace gpu
}  // namespace lora_kernels
