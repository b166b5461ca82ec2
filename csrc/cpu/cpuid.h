// Which instruction sets this processor offers, and which of our units may therefore run.
// Functions are only declared here: an inline one, compiled into the AVX-512 unit with that unit's
// flags, could be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

namespace lora_kernels {

// Each set contains the ones before it.
enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amxbf16 = 4 };

// The cpuid words that name the features which the units are compiled for, and the register state
// that the operating system saves on a context switch. All zero on other processors.
struct CpuFeatures {
  std::uint32_t leaf1_ecx = 0;
  std::uint32_t leaf7_ebx = 0;
  std::uint32_t leaf7_edx = 0;
  std::uint32_t leaf7_1_eax = 0;
  std::uint64_t xcr0 = 0;
};

CpuFeatures read_cpu_features();

// Returns the highest set whose features are all present and whose registers are all saved.
Isa isa_of(const CpuFeatures& features);

// Whether the processor has matrix registers for products of bf16, which the library uses.
bool has_amx_bf16(const CpuFeatures& features);

// Whether Intel made it, on whose processors its library multiplies float32 near their peak.
bool is_intel();

// isa_of(read_cpu_features()). Says nothing about whether the set's unit was compiled.
Isa detect_isa();

// Whether the unit of this set was compiled into the library.
bool isa_built(Isa isa);

}  // namespace lora_kernels
