#include "cpuid.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// setup.py defines these. A set whose unit was not compiled is 0.
#ifndef LORA_KERNELS_HAVE_AVX2
#define LORA_KERNELS_HAVE_AVX2 0
#endif
#ifndef LORA_KERNELS_HAVE_AVX512
#define LORA_KERNELS_HAVE_AVX512 0
#endif
#ifndef LORA_KERNELS_HAVE_AVX512BF16
#define LORA_KERNELS_HAVE_AVX512BF16 0
#endif
#ifndef LORA_KERNELS_HAVE_AMXBF16
#define LORA_KERNELS_HAVE_AMXBF16 0
#endif

namespace lora_kernels {
namespace {

constexpr std::uint32_t bit(int n) { return std::uint32_t{1} << n; }

// cpuid leaf 1, ecx
constexpr std::uint32_t kFma = bit(12), kOsxsave = bit(27), kAvx = bit(28), kF16c = bit(29);
// cpuid leaf 7, sub-leaf 0, ebx
constexpr std::uint32_t kAvx2 = bit(5), kBmi2 = bit(8), kAvx512f = bit(16), kAvx512dq = bit(17),
                        kAvx512bw = bit(30), kAvx512vl = bit(31);
// cpuid leaf 7, sub-leaf 0, edx
constexpr std::uint32_t kAmxBf16 = bit(22), kAmxTile = bit(24);
// cpuid leaf 7, sub-leaf 1, eax
constexpr std::uint32_t kAvx512bf16 = bit(5);
// xcr0: xmm and ymm; for AVX-512 also the mask registers, the upper halves of zmm0-15, and zmm16-31
constexpr std::uint64_t kYmmState = bit(1) | bit(2);
constexpr std::uint64_t kZmmState = kYmmState | bit(5) | bit(6) | bit(7);
constexpr std::uint64_t kTileState = bit(17) | bit(18);

template <typename T>
bool has_all(T word, T mask) {
  return (word & mask) == mask;
}

// Linux grants the tile registers on request, once for all threads of a process.
bool request_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

CpuFeatures read_cpu_features() {
  CpuFeatures features;
#if defined(__x86_64__)
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) features.leaf1_ecx = ecx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    features.leaf7_ebx = ebx;
    features.leaf7_edx = edx;
    const std::uint32_t last_subleaf = eax;
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
      features.leaf7_1_eax = eax;
    }
  }
  // xgetbv faults unless the system has enabled xsave. The intrinsic would need -mxsave.
  if (has_all(features.leaf1_ecx, kOsxsave)) {
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    features.xcr0 = (std::uint64_t{high} << 32) | low;
  }
#endif
  return features;
}

bool is_intel() {
#if defined(__x86_64__)
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  // "GenuineIntel"
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == 0x756E6547 && edx == 0x49656E69 &&
         ecx == 0x6C65746E;
#else
  return false;
#endif
}

Isa isa_of(const CpuFeatures& features) {
  // These lists mirror setup.py's flags: every feature that a unit is compiled for is required.
  if (!has_all(features.leaf1_ecx, kOsxsave | kAvx | kFma | kF16c) ||
      !has_all(features.leaf7_ebx, kAvx2 | kBmi2) || !has_all(features.xcr0, kYmmState)) {
    return Isa::scalar;
  }
  if (!has_all(features.leaf7_ebx, kAvx512f | kAvx512bw | kAvx512dq | kAvx512vl) ||
      !has_all(features.xcr0, kZmmState)) {
    return Isa::avx2;
  }
  if (!has_all(features.leaf7_1_eax, kAvx512bf16)) return Isa::avx512;
  return has_amx_bf16(features) ? Isa::amxbf16 : Isa::avx512bf16;
}

bool has_amx_bf16(const CpuFeatures& features) {
  return has_all(features.leaf7_edx, kAmxBf16 | kAmxTile) && has_all(features.xcr0, kTileState);
}

Isa detect_isa() {
  const Isa isa = isa_of(read_cpu_features());
  return isa == Isa::amxbf16 && !request_tiles() ? Isa::avx512bf16 : isa;
}

bool isa_built(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return LORA_KERNELS_HAVE_AVX2;
    case Isa::avx512:
      return LORA_KERNELS_HAVE_AVX512;
    case Isa::avx512bf16:
      return LORA_KERNELS_HAVE_AVX512BF16;
    case Isa::amxbf16:
      return LORA_KERNELS_HAVE_AMXBF16;
  }
  return false;
}

}  // namespace lora_kernels
