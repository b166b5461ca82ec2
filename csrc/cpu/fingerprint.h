#pragma once
#include <cstdint>

namespace lora_kernels {

// A number of the bytes and their order, with which a cache notices that a weight was written:
// version counters do not notice writes through `.data` and by FSDP2. A change of one 8-byte word
// always changes it; others leave it as it was with a probability of about 2^-64. It is the same
// for every number of threads. Reads the bytes once.
uint64_t fingerprint(const void* data, int64_t bytes, int threads);

}  // namespace lora_kernels
