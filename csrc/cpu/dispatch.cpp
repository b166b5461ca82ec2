#include "dispatch.h"

namespace lora_kernels {
namespace {

const Kernels* current = &kernels_scalar;
Isa current_isa = Isa::scalar;

const Kernels* kernels_of(Isa isa) {
#if LORA_KERNELS_HAVE_AMXBF16
  if (isa == Isa::amxbf16) return &kernels_amxbf16;
#endif
#if LORA_KERNELS_HAVE_AVX512BF16
  if (isa == Isa::avx512bf16) return &kernels_avx512bf16;
#endif
#if LORA_KERNELS_HAVE_AVX512
  if (isa == Isa::avx512) return &kernels_avx512;
#endif
#if LORA_KERNELS_HAVE_AVX2
  if (isa == Isa::avx2) return &kernels_avx2;
#endif
  return &kernels_scalar;
}

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[] = {"scalar", "avx2", "avx512", "avx512bf16", "amxbf16"};
  return names[static_cast<int>(isa)];
}

Isa use_isa(Isa cap) {
  const Isa detected = detect_isa();
  int isa = static_cast<int>(cap < detected ? cap : detected);
  while (!isa_built(static_cast<Isa>(isa))) --isa;  // scalar is always built
  current_isa = static_cast<Isa>(isa);
  current = kernels_of(current_isa);
  return current_isa;
}

const Kernels& kernels() { return *current; }

Isa isa_in_use() { return current_isa; }

}  // namespace lora_kernels
