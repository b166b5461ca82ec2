// What a tensor core may make of a sum of products in float32.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <utility>

#include "runtime.h"

namespace lora_kernels {
namespace emulator {

constexpr int MMA_K = 16;

// The order of the products that the seed draws; 0 leaves it.
inline void order_products(uint64_t seed, int order[MMA_K]) {
  std::iota(order, order + MMA_K, 0);
  if (!seed) return;
  for (int i = MMA_K - 1; i > 0; --i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i], order[(seed >> 33) % (unsigned)(i + 1)]);
  }
}

// The float32 next to `exact` towards zero.
inline float truncate(double exact) {
  const float rounded = (float)exact;
  return std::fabs((double)rounded) > std::fabs(exact) ? std::nextafter(rounded, 0.0f) : rounded;
}

// sum + the count products, all aligned to the largest exponent among them: of each, and of what
// they add up to, the bits below are dropped.
inline float add_group(float sum, const float* products, int count, int extra_bits) {
  const auto exponent = [](float f) { return (int)(std::bit_cast<uint32_t>(f) >> 23 & 0xFF); };
  int top = std::max(1, exponent(sum));
  for (int i = 0; i < count; ++i) top = std::max(top, exponent(products[i]));
  const double units = std::ldexp(1.0, 127 + 23 + extra_bits - top);  // of the last bit, in 1
  int64_t total = (int64_t)(sum * units);
  for (int i = 0; i < count; ++i) total += (int64_t)(products[i] * units);
  return truncate((double)total / units);
}

// sum + Σ products, exact products of two 16-bit numbers.
inline float add_products(float sum, const float products[MMA_K], const Mma& how) {
  bool is_finite = std::isfinite(sum);
  for (int k = 0; k < MMA_K; ++k) is_finite = is_finite && std::isfinite(products[k]);
  if (!how.products || !is_finite) {
    for (int k = 0; k < MMA_K; ++k) sum += products[k];
    return sum;
  }
  int order[MMA_K];
  float ordered[MMA_K];
  order_products(how.seed, order);
  for (int k = 0; k < MMA_K; ++k) ordered[k] = products[order[k]];
  for (int k = 0; k < MMA_K; k += how.products)
    sum = add_group(sum, ordered + k, std::min(how.products, MMA_K - k), how.extra_bits);
  return sum;
}

}  // namespace emulator
}  // namespace lora_kernels
