// The instruction sets of this processor, and the units that may therefore run. Functions are only
// declared here: the linker could keep the copy of an inline function that the AVX-512 unit was
// compiled with.
#pragma once

#include <cstdint>

namespace lora_kernels {

// Each set contains the ones before it.
enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amxbf16 = 4 };

// The cpuid words with the features that the units are compiled for, and the register state that
// the operating system saves on a context switch. All zero on other processors.
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

// True if the processor has AMX tiles for bf16, which oneDNN uses.
bool has_amx_bf16(const CpuFeatures& features);

// True if the processor is Intel's, on which MKL multiplies float32 near the peak.
bool is_intel();

// Returns isa_of(read_cpu_features()), whether or not the set's unit was compiled.
Isa detect_isa();

// True if the unit of this set was compiled into the library.
bool isa_built(Isa isa);

}  // namespace lora_kernels
