// The vector type of any processor: four floats in the compiler's own vector type.
#pragma once
#include <cstring>

#include "kernels.h"

#define LK_SMALL
#define LK_INLINE static inline __attribute__((always_inline))

namespace lora_kernels {
namespace {

constexpr int W = 4;         // floats in a vector
constexpr int DOT_ROWS = 2;  // 2 x 4 accumulators
constexpr int V = 2;         // vectors side by side in an outer product: 4 x 2 accumulators
constexpr int Y_ROWS = 4;    // rows of y updated together
typedef float vf __attribute__((vector_size(16)));

LK_INLINE vf splat(float a) { return vf{a, a, a, a}; }
LK_INLINE vf splat_pair(const float* p) { return vf{p[0], p[1], p[0], p[1]}; }
LK_INLINE vf zero() { return splat(0.0f); }
LK_INLINE vf add(vf a, vf b) { return a + b; }
LK_INLINE vf mul(vf a, vf b) { return a * b; }
LK_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // rounds twice

LK_INLINE uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
LK_INLINE float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

LK_INLINE float widen(float a) { return a; }
LK_INLINE float widen(bf16 a) { return float_of((uint32_t)a.bits << 16); }
LK_INLINE float widen(f16 a) {
  const uint32_t sign = (uint32_t)(a.bits & 0x8000) << 16, magnitude = a.bits & 0x7fffu;
  if (magnitude < 0x0400)
    return float_of(sign | bits_of((float)magnitude * 0x1p-24f));  // subnormal, zero
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return float_of(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

LK_INLINE void narrow(float& dst, float a) { dst = a; }
LK_INLINE void narrow(bf16& dst, float a) {  // to nearest, ties to even; a NaN stays a NaN
  const uint32_t u = bits_of(a);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  dst.bits = (uint16_t)((nan ? u | 0x00400000 : u + 0x7fff + (u >> 16 & 1)) >> 16);
}
LK_INLINE void narrow(f16& dst, float a) {
  const uint32_t u = bits_of(a), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00 | (magnitude >> 13 & 0x1ff);
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    h = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Below 2^-14, adding 0.5 leaves round(a * 2^24) in the low bits.
    h = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    h = (magnitude + 0xfff + (magnitude >> 13 & 1) - ((127u - 15u) << 23)) >> 13;
  }
  dst.bits = (uint16_t)(sign | h);
}

// The first n elements. The other lanes are loaded as zero and not stored. Loops that widen or
// round single elements are not inlined: inlined they were half of this unit.
template <typename T>
[[gnu::noinline]] vf load_n(const T* p, int n) {
  vf v = zero();
  for (int i = 0; i < n; ++i) v[i] = widen(p[i]);
  return v;
}
template <typename T>
[[gnu::noinline]] void store_n(T* p, vf v, int n) {
  for (int i = 0; i < n; ++i) narrow(p[i], v[i]);
}
LK_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LK_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
template <typename T>
[[gnu::noinline]] vf load(const T* p) {
  return vf{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <typename T>
[[gnu::noinline]] void store(T* p, vf v) {
  for (int i = 0; i < W; ++i) narrow(p[i], v[i]);
}

LK_INLINE vf mask_lanes(vf v, uint64_t bits) {
  for (int i = 0; i < W; ++i) v[i] = bits >> i & 1 ? v[i] : 0.0f;
  return v;
}

// out[i] = the sum of v[i]'s lanes, four vectors at once.
LK_INLINE void sum_lanes(const vf v[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
}

template <typename T>
LK_INLINE void store_ieee(T* p, vf v) {
  store(p, v);
}

// A codebook of 16 values, and the values of W codes in W/2 bytes, the even element in the high
// nibble.
using Table = const float*;
LK_INLINE Table load_table(const float* code) { return code; }
LK_INLINE vf lookup(Table t, const uint8_t* p) {
  return vf{t[p[0] >> 4], t[p[0] & 15], t[p[1] >> 4], t[p[1] & 15]};
}

// A codebook of 256 values, or null, and the values of 2 W codes.
using Table256 = const float*;
LK_INLINE Table256 load_table_256(const float* src) { return src; }
LK_INLINE void lookup_2w(Table256 t, const uint8_t* p, vf out[2]) {
  for (int i = 0; i < 2; ++i, p += W) out[i] = vf{t[p[0]], t[p[1]], t[p[2]], t[p[3]]};
}

// The values of W codes of 8 bits.
LK_INLINE vf load_int8(const uint8_t* p) {
  vf v;
  for (int i = 0; i < W; ++i) v[i] = (float)(int8_t)p[i];
  return v;
}
LK_INLINE vf load_e4m3(const uint8_t* p) {
  vf v;
  for (int i = 0; i < W; ++i) {
    const uint16_t magnitude = p[i] & 0x7f, half = (uint16_t)((p[i] & 0x80) << 8 | magnitude << 7);
    // As a float16 it is 2^8 times too small.
    v[i] = widen(f16{(uint16_t)(magnitude == 0x7f ? half | 0x7e00 : half)}) * 256.0f;
  }
  return v;
}
// The values of 2 W codes, 2^8 times too small. nan, zero before, is `is_set` after one of them was
// NaN, which its value is not.
using NanFlags = uint32_t;
LK_INLINE bool is_set(NanFlags nan) { return nan; }
LK_INLINE void load_2w_e4m3(const uint8_t* p, vf out[2], NanFlags& nan) {
  for (int j = 0; j < 2; ++j, p += W) {
    vf v;
    for (int i = 0; i < W; ++i) {
      nan |= (p[i] & 0x7f) == 0x7f;
      v[i] = widen(f16{(uint16_t)((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7)});
    }
    out[j] = v;
  }
}

typedef uint32_t vu __attribute__((vector_size(16)));
LK_INLINE vu splat_u(uint32_t a) { return vu{a, a, a, a}; }
LK_INLINE vu lanes_from(uint32_t a) { return vu{a, a + 1, a + 2, a + 3}; }
LK_INLINE vu xor3(vu a, vu b, vu c) { return a ^ b ^ c; }
LK_INLINE void mul_hi_lo(uint32_t m, vu b, vu& hi, vu& lo) {
  uint64_t product[W];
  for (int i = 0; i < W; ++i) product[i] = (uint64_t)m * b[i];
  hi = vu{(uint32_t)(product[0] >> 32), (uint32_t)(product[1] >> 32), (uint32_t)(product[2] >> 32),
          (uint32_t)(product[3] >> 32)};
  lo = vu{(uint32_t)product[0], (uint32_t)product[1], (uint32_t)product[2], (uint32_t)product[3]};
}
LK_INLINE uint64_t compare_ge(vu a, uint32_t threshold) {  // one bit a lane
  uint64_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= (uint64_t)(a[i] >= threshold) << i;
  return bits;
}
// Moves bit i of a, b, c, d to bits 4i, 4i + 1, 4i + 2, 4i + 3.
LK_INLINE uint64_t interleave_bits(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  uint64_t bits = 0;
  for (int i = 0; i < W; ++i)
    bits |= (a >> i & 1) << 4 * i | (b >> i & 1) << (4 * i + 1) | (c >> i & 1) << (4 * i + 2) |
            (d >> i & 1) << (4 * i + 3);
  return bits;
}

// The functions for few_rows_impl.h; vec_avx512.h describes them.
LK_INLINE vu load_codes(const uint8_t* p, int filled) {
  vu codes = splat_u(0);
  std::memcpy(&codes, p, 4 * (size_t)filled);
  return codes;
}
LK_INLINE vf lookup(Table t, vu codes, int j) {
  const vu index = codes >> 4 * (j ^ 1) & 15;
  return vf{t[index[0]], t[index[1]], t[index[2]], t[index[3]]};
}
LK_INLINE vu lane_blocks(int64_t offset, int log2_block) {
  vu blocks;
  for (int i = 0; i < W; ++i) blocks[i] = (uint32_t)((8 * i + offset) >> log2_block);
  return blocks;
}
LK_INLINE vf gather_scales(const float* scales, vu lanes, int filled) {
  vf v = zero();
  for (int i = 0; i < filled; ++i) v[i] = scales[lanes[i]];
  return v;
}

}  // namespace
}  // namespace lora_kernels
