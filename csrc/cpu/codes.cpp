#include <cstring>

#include "layer.h"

namespace lora_kernels {
namespace {

float e4m3_value(int byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float magnitude = exponent ? static_cast<float>(8 + mantissa) * (1 << exponent) * 0x1p-10f
                                   : static_cast<float>(mantissa) * 0x1p-9f;
  return byte & 0x80 ? -magnitude : magnitude;
}

bool is_same(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

bool is_int8(const float* code) {
  for (int i = 0; i < 256; ++i)
    if (!is_same(code[i], static_cast<float>(static_cast<int8_t>(i)))) return false;
  return true;
}

bool is_e4m3(const float* code) {
  for (int i = 0; i < 256; ++i)
    if ((i & 0x7f) == 0x7f ? code[i] == code[i] : !is_same(code[i], e4m3_value(i))) return false;
  return true;
}

}  // namespace

CodeKind kind_of(int64_t bits, const float* code) {
  if (bits == 4) return CodeKind::nibble;
  return is_int8(code) ? CodeKind::int8 : is_e4m3(code) ? CodeKind::e4m3 : CodeKind::byte;
}

}  // namespace lora_kernels
