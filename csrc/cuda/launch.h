// What a launch is, for the GPU and for the emulator.
#pragma once
#include <cstdint>

namespace lora_kernels {
namespace gpu {

struct Stream {
  uintptr_t handle;  // a cudaStream_t
  int device;
};

struct Launch {
  const char* name;
  unsigned x, y = 1, z = 1;  // blocks
  unsigned threads;          // of a block
  unsigned shared_bytes = 0;
  Stream stream;
  bool cooperative = false;  // all blocks at the same time
};

}  // namespace gpu
}  // namespace lora_kernels
