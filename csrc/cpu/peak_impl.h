#pragma once
// The peak of a unit's multiply-adds: independent chains of them in registers, without memory. It
// is the compute limit of a roofline.

namespace lora_kernels {
namespace {

constexpr int CHAINS = 12;  // latency of 4 to 6 cycles, two multiply-adds a cycle

// Applies `step` to each of the sums, *rounds times.
template <typename Step>
LK_INLINE void run_chains(const void* rounds, Step step) {
  vf sums[CHAINS];
  for (int i = 0; i < CHAINS; ++i) sums[i] = splat((float)i);
  for (int64_t remaining = *static_cast<const int64_t*>(rounds); remaining; --remaining)
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) sums[i] = step(sums[i]);
  for (int i = 0; i < CHAINS; ++i) {
    float out[W];
    store(out, sums[i]);
    asm volatile("" : : "r"(out) : "memory");  // keeps the stores
  }
}

void chains_of_fma(void* rounds, int, int) {
  const vf half = splat(0.5f), one = splat(1.0f);  // sums converge to 2
  run_chains(rounds, [=](vf sum) { return fma(sum, half, one); });
}

#ifdef __AMX_BF16__
constexpr int64_t PAIR_FLOPS = 4 * 2 * X_ROWS * X_DEPTH * W;  // a round
void chains_of_pairs(void* rounds, int, int) {
  const Tiles tiles;  // registers hold zeros
  for (int64_t remaining = *static_cast<const int64_t*>(rounds); remaining; --remaining) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}
#elif defined(__AVX512BF16__)
constexpr int64_t PAIR_FLOPS = CHAINS * 4 * W;
void chains_of_pairs(void* rounds, int, int) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  run_chains(rounds, [=](vf sum) { return _mm512_dpbf16_ps(sum, ones, ones); });
}
#else
constexpr int64_t PAIR_FLOPS = CHAINS * 2 * W;
constexpr ThreadFn chains_of_pairs = chains_of_fma;  // bfloat16 is multiplied as float32
#endif

// Runs `rounds` rounds of chains on each thread. Returns the FLOPs of all threads.
double multiply_add(DType dtype, int64_t rounds, int threads) {
  const bool pairs = dtype == DType::bf16;
  run_threads(threads, pairs ? chains_of_pairs : chains_of_fma, &rounds);
  return (double)(pairs ? PAIR_FLOPS : CHAINS * 2 * W) * (double)rounds * threads;
}

}  // namespace
}  // namespace lora_kernels
