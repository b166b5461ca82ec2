// Philox4x32-10 (Salmon et al., SC'11): the constants of the CPU kernels' dropout mask.
// Element (m, k) of x takes word k & 3 of the block with counter (k >> 2, m, offset_lo, offset_hi)
// and key (seed_lo, seed_hi); it is kept where that word >= threshold = round(p * 2^32).
#pragma once
#include <cstdint>

namespace lora_kernels {
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
}  // namespace lora_kernels
