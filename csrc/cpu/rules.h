// The strategy of a call: measured numbers, and the choice by them. direct.cpp alone includes this
// header; lora_kernels/backends/cpu/heuristics.py asks it there.
#pragma once
#include <cstddef>
#include <iterator>
#include <limits>

#include "cpuid.h"
#include "kernels.h"

namespace lora_kernels {

// In the order of STRATEGIES in lora_kernels/backends/cpu/linear.py, which describes them.
enum class Strategy : int { fused, library, gemv, gemv_quantized };

struct Processor {
  Isa isa;       // of the kernels
  bool has_amx;  // whether oneDNN's bfloat16 GEMMs run on AMX tiles
  bool is_intel;
};

// When torch.mm runs a dense base GEMM in place of the fused kernel. In float32 on Intel, MKL is
// faster from M * N * K = MKL_GEMM on; with AMX the fused kernel takes over again at
// MIN_SPLIT_ROWS. In bfloat16 with AMX, oneDNN is faster from M * N * K = AMX_GEMM on and above
// AMX_ROWS rows. Measured on 2 threads of Intel family 6, AMX on model 167 (benchmarks/NOTES.md).
constexpr int64_t MKL_GEMM = 280'000'000;
constexpr int64_t AMX_GEMM = 10'000'000'000, AMX_ROWS = 512;
// The most rows of x for which the GEMV kernel reads the weight once, for each Isa: dense, and
// 4-bit codes decoded in registers or the L1 cache. Measured on AMD families 25 and 26, and with
// AMX on Intel family 6 (benchmarks/NOTES.md). AVX-512 takes more rows of weights of LARGE elements
// in 4 bits. Beside AMX bfloat16 has its tiles; without vector instructions widening 16 bits costs
// more than multiplying.
constexpr int64_t FEW_ROWS[] = {4, 32, 16, 16, 16};
constexpr int64_t FEW_ROWS_QUANTIZED[] = {8, 32, 16, 16, 11};
constexpr int64_t FEW_ROWS_BESIDE_AMX = 6;
constexpr int64_t LARGE = 1 << 24, FEW_ROWS_OF_LARGE = 32;
constexpr int64_t ALL_ROWS = std::numeric_limits<int64_t>::max();
constexpr std::size_t ISAS = static_cast<std::size_t>(Isa::amxbf16) + 1;
static_assert(std::size(FEW_ROWS) == ISAS && std::size(FEW_ROWS_QUANTIZED) == ISAS);

// How the rows of x are divided among strategies, for one dtype of the base GEMM.
struct Rules {
  // The most rows for the GEMV kernel: dense, 4-bit, and 4-bit with LARGE elements.
  int64_t few_rows, few_rows_quantized, few_rows_of_large;
  // torch.mm runs a dense base GEMM of at least so many rows and multiply-adds, and of fewer rows
  // than the last.
  int64_t library_rows, library_gemm, library_end;
  bool has_fused;  // whether a fused kernel runs the other rows
};

inline Rules rules_of(const Processor& processor, DType dtype) {
  const Isa isa = processor.isa;
  const bool is_amx = isa == Isa::amxbf16, is_bf16 = dtype == DType::bf16;
  int64_t few = FEW_ROWS[static_cast<std::size_t>(isa)];
  int64_t few_quantized = FEW_ROWS_QUANTIZED[static_cast<std::size_t>(isa)];
  if (isa == Isa::scalar && dtype != DType::f32) few = 0;
  if (is_amx && is_bf16) few = few_quantized = FEW_ROWS_BESIDE_AMX;
  const bool takes_large = isa == Isa::avx512 || isa == Isa::avx512bf16;
  // oneDNN has AMX and these kernels do not: torch.mm runs every bfloat16 GEMM.
  const bool lacks_amx = processor.has_amx && is_bf16 && !is_amx;
  Rules r{.few_rows = few,
          .few_rows_quantized = few_quantized,
          .few_rows_of_large = takes_large ? FEW_ROWS_OF_LARGE : few_quantized,
          .library_rows = ALL_ROWS,
          .library_gemm = 0,
          .library_end = ALL_ROWS,
          .has_fused = isa >= Isa::avx512 && !lacks_amx};
  if (processor.is_intel && dtype == DType::f32) {
    r.library_rows = 0, r.library_gemm = MKL_GEMM;
    if (is_amx) r.library_end = MIN_SPLIT_ROWS;
  } else if (is_amx && is_bf16) {
    r.library_rows = AMX_ROWS + 1, r.library_gemm = AMX_GEMM;
  }
  return r;
}

// The most rows of x for the GEMV kernel. size: elements of the weight. is_columns: the weight is
// stored as [K, N]; torch.mm then runs the GEMV, for one row.
inline int64_t few_rows(const Rules& r, bool is_quantized, bool is_columns, int64_t size) {
  if (is_columns) return 1;
  if (!is_quantized) return r.few_rows;
  return size >= LARGE ? r.few_rows_of_large : r.few_rows_quantized;
}

// The strategy for M rows of x and a weight [N, K].
inline Strategy choose_strategy(const Rules& r, bool is_quantized, bool is_columns, int64_t M,
                                int64_t N, int64_t K) {
  const int64_t size = N * K;
  if (M <= few_rows(r, is_quantized, is_columns, size))
    return is_columns     ? Strategy::library
           : is_quantized ? Strategy::gemv_quantized
                          : Strategy::gemv;
  const bool is_library =
      !is_quantized && M >= r.library_rows && M < r.library_end && M * size >= r.library_gemm;
  return r.has_fused && !is_library ? Strategy::fused : Strategy::library;
}

// True if the fused kernel computes dx. has_gemm: whether there is one. A GEMM of one row reads a
// dense W once, in whatever order W is stored, so the library computes that.
inline bool is_dx_fused(bool has_gemm, Strategy strategy, int64_t M) {
  return has_gemm && strategy != Strategy::library && !(strategy == Strategy::gemv && M == 1);
}

}  // namespace lora_kernels
