#include "dispatch.h"

namespace lora_kernels {
namespace {

const Kernels* in_use = &kernels_scalar;
Isa in_use_isa = Isa::scalar;

const Kernels* table(Isa isa) {
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
  const Isa offered = detect_isa();
  int isa = static_cast<int>(cap < offered ? cap : offered);
  while (!isa_built(static_cast<Isa>(isa))) --isa;  // scalar is always built
  in_use_isa = static_cast<Isa>(isa);
  in_use = table(in_use_isa);
  return in_use_isa;
}

const Kernels& kernels() { return *in_use; }

Isa isa_in_use() { return in_use_isa; }

}  // namespace lora_kernels
