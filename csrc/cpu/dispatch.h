// The table of kernels in use.
#pragma once
#include "cpuid.h"
#include "kernels.h"

namespace lora_kernels {

const char* isa_name(Isa isa);

// Selects the best set that the processor supports, the library holds, and `cap` allows.
Isa use_isa(Isa cap);

const Kernels& kernels();

// The instruction set of the table in use.
Isa isa_in_use();

}  // namespace lora_kernels
