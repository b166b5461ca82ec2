// What kernels are handed: dense matrices of three dtypes, and 4-bit codes. No CUDA in it.
#pragma once
#include <cstdint>

namespace lora_kernels {
namespace gpu {

enum DType : int { F32, BF16, F16 };

struct Matrix {
  const void* data;
  int dtype;
  int64_t row, col;  // strides in elements
  // Whether eight neighbours of a row, from a multiple of eight on, lie together and aligned.
  bool vectors;
};

// Elements n K + k of a flat weight [N, K]; the even one in a byte's high half.
struct Codes {
  const uint8_t* packed;
  const float* code;   // 16 values
  const void* absmax;  // float32, or uint8 where nested
  const float* nested_code;
  const float* nested_absmax;
  const float* offset;
  int log2_block, log2_nested;
  int64_t N, K;
  bool vectors;  // K a multiple of 32 and the bytes aligned to 16: a row is whole loads
};

struct Vector {
  const void* data;  // null: ones, or zeros
  int dtype;
};

}  // namespace gpu
}  // namespace lora_kernels
