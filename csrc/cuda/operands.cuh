// How one element, or eight, of an operand is read: dense matrices of three dtypes, 4-bit codes.
#pragma once
#include "operands.h"
#include "ptx.cuh"

namespace lora_kernels {
namespace gpu {

LK_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
LK_DEVICE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Elements ---------------------------------------------------------------------------------------

LK_DEVICE float widen(uint16_t h, int dtype) {
  return dtype == BF16 ? bf16_to_f32(h) : f16_to_f32(h);
}

LK_DEVICE float load_at(const void* data, int dtype, int64_t at) {
  if (dtype == F32) return ldg(static_cast<const float*>(data) + at);
  return widen(ldg(static_cast<const uint16_t*>(data) + at), dtype);
}
LK_DEVICE float load(const Matrix& m, int64_t i, int64_t j) {
  return load_at(m.data, m.dtype, i * m.row + j * m.col);
}

LK_DEVICE void store_at(void* data, int dtype, int64_t at, float value) {
  if (dtype == F32)
    stg(static_cast<float*>(data) + at, value);
  else
    stg(static_cast<uint16_t*>(data) + at, dtype == BF16 ? f32_to_bf16(value) : f32_to_f16(value));
}

// Row i, elements j to j + 7, j a multiple of 8, of a matrix of whole vectors.
LK_DEVICE void load_vector8(const Matrix& m, int64_t i, int64_t j, float out[8]) {
  const int64_t at = i * m.row + j;
  if (m.dtype == F32) {
    LK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Words4 w =
          ldg(reinterpret_cast<const Words4*>(static_cast<const float*>(m.data) + at + 4 * half));
      LK_UNROLL
      for (int e = 0; e < 4; ++e) out[4 * half + e] = bits_to_f32(w.w[e]);
    }
    return;
  }
  const Words4 w = ldg(reinterpret_cast<const Words4*>(static_cast<const uint16_t*>(m.data) + at));
  LK_UNROLL
  for (int e = 0; e < 8; ++e) out[e] = widen((uint16_t)(w.w[e / 2] >> (e % 2 ? 16 : 0)), m.dtype);
}

// The same of any matrix; zeros from `columns` on.
LK_DEVICE void load8(const Matrix& m, int64_t i, int64_t j, int64_t columns, float out[8]) {
  if (m.vectors && j + 8 <= columns) return load_vector8(m, i, j, out);
  LK_UNROLL
  for (int e = 0; e < 8; ++e) out[e] = j + e < columns ? load(m, i, j + e) : 0.0f;
}

// 4-bit codes ------------------------------------------------------------------------------------

// A block's scale; bitsandbytes' nested one is rounded twice.
LK_DEVICE float scale_of(const Codes& c, int64_t block) {
  if (!c.nested_code) return ldg(static_cast<const float*>(c.absmax) + block);
  const uint8_t q = ldg(static_cast<const uint8_t*>(c.absmax) + block);
  if (!c.nested_absmax) return ldg(c.nested_code + q);
  return add_rn(mul_rn(ldg(c.nested_code + q), ldg(c.nested_absmax + (block >> c.log2_nested))),
                ldg(c.offset));
}

// Sums -------------------------------------------------------------------------------------------

LK_DEVICE float sum_of_warp(float value) {
  LK_UNROLL
  for (int mask = 16; mask > 0; mask >>= 1) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace gpu
}  // namespace lora_kernels
