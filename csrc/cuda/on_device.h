// The CUDA runtime's errors as exceptions, and the device that is current. Host code alone.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace lora_kernels {
namespace gpu {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes the device current for as long as this lives. Where it is current already nothing is set:
// to set a device makes a context on it, which takes memory.
class OnDevice {
 public:
  OnDevice(int device, const char* what) {
    int current = 0;
    check(cudaGetDevice(&current), what);
    if (current == device) return;
    check(cudaSetDevice(device), what);
    before_ = current;
  }
  ~OnDevice() {
    if (before_ != NONE) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  static constexpr int NONE = -1;
  int before_ = NONE;  // to be set back
};

}  // namespace gpu
}  // namespace lora_kernels
