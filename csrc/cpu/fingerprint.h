#pragma once
#include <cstdint>

namespace lora_kernels {

// Returns a hash of the bytes and their order. A cache notices by it that a weight was written:
// version counters miss writes through `.data` and by FSDP2. A change of one 8-byte word always
// changes the hash. Other changes leave it equal with a probability of about 2^-64. It does not
// depend on the number of threads. Reads the bytes once.
uint64_t fingerprint(const void* data, int64_t bytes, int threads);

}  // namespace lora_kernels
