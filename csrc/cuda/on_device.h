// The CUDA runtime's errors as exceptions, the device that is current, and what it is asked of a
// kernel once, since each call takes microseconds. Host code alone.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

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

// Lets the kernel take so many bytes of shared memory on the current device. The limit only rises:
// the driver keeps one for a kernel, whose launches take different sizes.
inline void allow_shared(const void* kernel, int device, unsigned bytes, const char* what) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int>, unsigned> limits;
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned& limit = limits.try_emplace({kernel, device}, 48u << 10).first->second;
  if (bytes <= limit) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
        what);
  limit = bytes;
}

// How many of the kernel's blocks run at the same time on the device.
inline int resident_blocks(const void* kernel, int device, int threads, unsigned shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, unsigned>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, device, threads, shared_bytes);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  OnDevice on(device, "occupancy");
  allow_shared(kernel, device, shared_bytes, "occupancy");
  int blocks = 0, multiprocessors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
        "occupancy");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "occupancy");
  return known[key] = blocks * multiprocessors;
}

// The driver's number of the capture that the stream is in, 0 for none. No other capture of the
// process gets the number.
inline unsigned long long capture_of(uintptr_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(stream), &status, &id), "capture");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

}  // namespace gpu
}  // namespace lora_kernels
