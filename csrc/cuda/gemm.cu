// The layer for up to a few hundred rows on tensor cores (mma.sync): bfloat16 and float16,
// dense weights and 4-bit codes, both of the weight's orientations.
#include "kernels.h"
#include "operands.cuh"

namespace lora_kernels {
namespace gpu {
namespace {

constexpr int THREADS = 128;
constexpr int BM = 64, BN = 128, BK = 64;  // a block's tile; a warp makes 32 by 64 of it
constexpr int STAGES = 3;
constexpr int X_BYTES = BM * BK * 2, W_BYTES = BN * BK * 2;
constexpr int TABLE_BYTES = 64;
constexpr int RANK_PITCH = 18;     // floats from one row of S or Q to the next
constexpr int OUT_PITCH = BN + 4;  // and of y
static_assert(BM * RANK_PITCH * 4 <= X_BYTES && BN * RANK_PITCH * 4 <= W_BYTES, "S and Q fit");
static_assert(BM * OUT_PITCH * 4 <= STAGES * X_BYTES + 2 * W_BYTES, "y fits");

template <bool BFloat16>
LK_DEVICE void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  if constexpr (BFloat16)
    mma_bf16(d, a, b);
  else
    mma_f16(d, a, b);
}

// Where 16 bytes of a row of 64 or 128 elements lie: eight rows' same chunks are in different
// banks.
template <int COLUMNS>
LK_DEVICE uint32_t chunk_at(int row, int chunk) {
  return row * (COLUMNS * 2) + (chunk ^ (row & 7)) * 16;
}

// ROWS by COLUMNS of a 16-bit matrix from [i0, j0] on, copied while others compute; zeros outside.
// A thread's chunks are one below the other, so that one address and one place serve for all.
template <int ROWS, int COLUMNS>
LK_DEVICE void fill(uint32_t to, const Matrix& m, int64_t i0, int64_t j0, int64_t rows,
                    int64_t columns) {
  constexpr int CHUNKS = COLUMNS / 8, APART = THREADS / CHUNKS;
  static_assert(APART % 8 == 0, "the same order of chunks in all of a thread's rows");
  const int row = thread_id() / CHUNKS, chunk = thread_id() % CHUNKS;
  const uint16_t* from = static_cast<const uint16_t*>(m.data) + (i0 + row) * m.row + j0 + chunk * 8;
  const int below = j0 + chunk * 8 < columns ? (int)min_of(rows - i0, (int64_t)ROWS) : 0;
  to += chunk_at<COLUMNS>(row, chunk);
  LK_UNROLL
  for (int i = 0; i < ROWS; i += APART)
    cp_async16(to + i * COLUMNS * 2, from + i * m.row, row + i < below ? 16 : 0);
}

// Two runs of 32 codes a thread, of the ROWS by COLUMNS that a step takes; a scale for each half of
// a run, since blocks may have 16 codes.
struct Raw {
  Words4 bytes[2];
  float scale[2][2];
};
template <int ROWS, int COLUMNS>
LK_DEVICE void fetch(Raw& raw, const Codes& c, int64_t i0, int64_t j0) {
  constexpr int RUNS = COLUMNS / 32;
  static_assert(ROWS * RUNS == 2 * THREADS, "two runs a thread");
  LK_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int u = thread_id() + i * THREADS;
    const int64_t row = i0 + u / RUNS, column = j0 + u % RUNS * 32, at = row * c.K + column;
    raw.scale[i][0] = raw.scale[i][1] = 0.0f;
    LK_UNROLL
    for (int e = 0; e < 4; ++e) raw.bytes[i].w[e] = 0;
    if (row < c.N && column < c.K) {
      raw.bytes[i] = ldg_stream(reinterpret_cast<const Words4*>(c.packed + (at >> 1)));
      const int64_t block = at >> c.log2_block;
      raw.scale[i][0] = raw.scale[i][1] = scale_of(c, block);
      if (c.log2_block == 4) raw.scale[i][1] = scale_of(c, block + 1);
    }
  }
}
// The table has 16 words in 16 banks, so that look-ups never wait for each other.
template <int COLUMNS, bool BFloat16>
LK_DEVICE void decode_into(uint32_t to, const Raw& raw, uint32_t table) {
  constexpr int RUNS = COLUMNS / 32;
  LK_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int u = thread_id() + i * THREADS, row = u / RUNS, run = u % RUNS;
    LK_UNROLL
    for (int j = 0; j < 4; ++j) {
      const uint32_t word = raw.bytes[i].w[j];
      Words4 out;
      LK_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float even = lds<float>(table + (word >> (8 * e + 4) & 15) * 4);
        const float odd = lds<float>(table + (word >> (8 * e) & 15) * 4);
        const float scale = raw.scale[i][j / 2], v0 = mul_rn(even, scale), v1 = mul_rn(odd, scale);
        out.w[e] = BFloat16 ? pack_bf16(v0, v1) : pack_f16(v0, v1);
      }
      sts(to + chunk_at<COLUMNS>(row, run * 4 + j), out);
    }
  }
}

// Two neighbours v = high + low, to 16 bits.
LK_DEVICE void split_pair(uint32_t at, uint32_t& high, uint32_t& low) {
  const float v0 = lds<float>(at), v1 = lds<float>(at + 4);
  high = pack_bf16(v0, v1);
  low = pack_bf16(v0 - bf16_to_f32((uint16_t)high), v1 - bf16_to_f32((uint16_t)(high >> 16)));
}

// The epilogue of one element: z, then y = out_scale · sum + bias.
LK_DEVICE void finish(const LinearArgs& a, int64_t at, int64_t n, float y) {
  if (a.z) store_at(a.z, a.y_dtype, at, y);
  if (a.out_scale.data) y *= load_at(a.out_scale.data, a.out_scale.dtype, n);
  if (a.bias.data) y += load_at(a.bias.data, a.bias.dtype, n);
  store_at(a.y, a.y_dtype, at, y);
}

// y [M, N] = out_scale ⊙ (x·W + S·Q) + bias, z without out_scale and bias, of 16-bit x and W. W is
// [N, K] as it is stored or, Transposed, [K, N]; codes are decoded into shared memory a step ahead.
// S·Q is where the sums start, of bfloat16's highs and lows, so that 16 bits of a float32 adapter
// count. Split-K: block z sums over K's z-th split and stores its partial sums; finish_kernel adds
// them in order. Bytes: x once for each 128 columns, W once for each 64 rows, P and Q with them, y
// and z once; with split-K 8·M·N·num_splits more. Flops 2·M·N·(K + 3·R). Rounding points: W to its
// 16 bits, S and Q to 16 bits, y and z once. Deterministic. Tested by
// tests/cuda_emulated/test_lora_linear.py.
template <bool BFloat16, bool FromCodes, bool Transposed>
LK_KERNEL LK_BOUNDS(THREADS, 2) gemm_kernel(const LinearArgs a) {
  const uint32_t xs = shared_base(), ws = xs + STAGES * X_BYTES;
  const uint32_t table = ws + (FromCodes ? 2 : STAGES) * W_BYTES;
  const int64_t m0 = (int64_t)block_x() * BM, n0 = (int64_t)block_y() * BN;
  const int64_t first = (int64_t)block_z() * a.k_per_split,
                end = min_of(a.K, first + a.k_per_split);
  const int steps = (int)((end - first + BK - 1) / BK);
  const int thread = thread_id(), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4, wm = warp / 2 * 32, wn = warp % 2 * 64;

  const auto fill_step = [&](int step) {
    const int64_t k = first + (int64_t)step * BK;
    const int stage = step % STAGES;
    fill<BM, BK>(xs + stage * X_BYTES, a.x, m0, k, a.M, end);
    if constexpr (!FromCodes) {
      if constexpr (Transposed)
        fill<BK, BN>(ws + stage * W_BYTES, a.w, k, n0, end, a.N);
      else
        fill<BN, BK>(ws + stage * W_BYTES, a.w, n0, k, a.N, end);
    }
  };
  Raw raw;
  const auto fetch_step = [&](int step) {
    if constexpr (FromCodes) {
      const int64_t k = first + (int64_t)step * BK;
      if constexpr (Transposed)
        fetch<BK, BN>(raw, a.c, k, n0);
      else
        fetch<BN, BK>(raw, a.c, n0, k);
    }
  };
  LK_UNROLL
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < steps) fill_step(s);
    cp_async_commit();
  }
  if constexpr (FromCodes) {
    if (thread < 16) sts(table + thread * 4, ldg(a.c.code + thread));
    fetch_step(0);
    sync_block();
  }

  float acc[2][8][4];
  LK_UNROLL
  for (int i = 0; i < 2; ++i) LK_UNROLL
  for (int j = 0; j < 8; ++j) LK_UNROLL
  for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;

  if (block_z() == 0) {
    // In the stages that are filled last: nothing is on its way there yet.
    const uint32_t ss = xs + (STAGES - 1) * X_BYTES;
    const uint32_t qs = ws + (FromCodes ? 1 : STAGES - 1) * W_BYTES;
    LK_ONCE
    for (int r0 = 0; r0 < a.R; r0 += 16) {
      sync_block();
      LK_ONCE
      for (int u = thread; u < BM * 16; u += THREADS) {
        const int m = u / 16, r = u % 16;
        float s = 0.0f;
        if (m0 + m < a.M && r0 + r < a.R) {
          s = ldg(a.p + (m0 + m) * a.R + r0 + r) * a.s_scale;
          if (a.gate.data) s *= load_at(a.gate.data, a.gate.dtype, r0 + r);
        }
        sts(ss + (m * RANK_PITCH + r) * 4, s);
      }
      LK_ONCE
      for (int u = thread; u < BN * 16; u += THREADS) {
        const int n = Transposed ? u % BN : u / 16, r = Transposed ? u / BN : u % 16;
        const bool inside = n0 + n < a.N && r0 + r < a.R;
        sts(qs + (n * RANK_PITCH + r) * 4, inside ? load(a.q, r0 + r, n0 + n) : 0.0f);
      }
      sync_block();
      uint32_t s_high[2][4], s_low[2][4];
      LK_UNROLL
      for (int i = 0; i < 2; ++i) LK_UNROLL
      for (int e = 0; e < 4; ++e)
        split_pair(ss + ((wm + i * 16 + g + e % 2 * 8) * RANK_PITCH + 2 * t + e / 2 * 8) * 4,
                   s_high[i][e], s_low[i][e]);
      LK_UNROLL
      for (int j = 0; j < 8; ++j) {
        uint32_t q_high[2], q_low[2];
        LK_UNROLL
        for (int e = 0; e < 2; ++e)
          split_pair(qs + ((wn + j * 8 + g) * RANK_PITCH + 2 * t + e * 8) * 4, q_high[e], q_low[e]);
        LK_UNROLL
        for (int i = 0; i < 2; ++i) {
          mma_bf16(acc[i][j], s_low[i], q_high);
          mma_bf16(acc[i][j], s_high[i], q_low);
          mma_bf16(acc[i][j], s_high[i], q_high);
        }
      }
    }
  }

  LK_ONCE
  for (int step = 0; step < steps; ++step) {
    const uint32_t x_tile = xs + step % STAGES * X_BYTES;
    const uint32_t w_tile = ws + (FromCodes ? step % 2 : step % STAGES) * W_BYTES;
    if constexpr (FromCodes) {
      decode_into<Transposed ? BN : BK, BFloat16>(w_tile, raw, table);
      if (step + 1 < steps) fetch_step(step + 1);
    }
    cp_async_wait<STAGES - 2>();
    sync_block();  // this step's tiles are there; those of the step before have been read
    if (step + STAGES - 1 < steps) fill_step(step + STAGES - 1);
    cp_async_commit();
    LK_UNROLL
    for (int k = 0; k < BK; k += 16) {
      uint32_t x[2][4], w[4][4];
      const int matrix = lane / 8, row = lane % 8;
      LK_UNROLL
      for (int i = 0; i < 2; ++i)
        ldmatrix_x4(x_tile + chunk_at<BK>(wm + i * 16 + matrix % 2 * 8 + row, k / 8 + matrix / 2),
                    x[i]);
      LK_UNROLL
      for (int j = 0; j < 4; ++j) {
        if constexpr (Transposed)
          ldmatrix_x4_trans(
              w_tile + chunk_at<BN>(k + matrix % 2 * 8 + row, (wn + j * 16) / 8 + matrix / 2),
              w[j]);
        else
          ldmatrix_x4(w_tile + chunk_at<BK>(wn + j * 16 + matrix / 2 * 8 + row, k / 8 + matrix % 2),
                      w[j]);
      }
      LK_UNROLL
      for (int i = 0; i < 2; ++i) LK_UNROLL
      for (int j = 0; j < 8; ++j) mma<BFloat16>(acc[i][j], x[i], w[j / 2] + j % 2 * 2);
    }
  }
  cp_async_wait<0>();
  sync_block();

  // Epilogue: through shared memory, so that stores are coalesced.
  LK_UNROLL
  for (int i = 0; i < 2; ++i) LK_UNROLL
  for (int j = 0; j < 8; ++j) LK_UNROLL
  for (int e = 0; e < 4; ++e)
    sts(xs + ((wm + i * 16 + g + e / 2 * 8) * OUT_PITCH + wn + j * 8 + 2 * t + e % 2) * 4,
        acc[i][j][e]);
  sync_block();
  LK_ONCE
  for (int u = thread; u < BM * BN; u += THREADS) {
    const int64_t m = m0 + u / BN, n = n0 + u % BN;
    if (m >= a.M || n >= a.N) continue;
    const float sum = lds<float>(xs + (u / BN * OUT_PITCH + u % BN) * 4);
    if (a.partials)
      stg(a.partials + (block_z() * a.M + m) * a.N + n, sum);
    else
      finish(a, m * a.N + n, n, sum);
  }
}

struct FinishArgs {
  LinearArgs linear;
  int num_splits;
};

// gemm_kernel's epilogue on the partial sums, added in order; a thread an element.
LK_KERNEL LK_BOUNDS(THREADS, 8) finish_kernel(const FinishArgs f) {
  const LinearArgs& a = f.linear;
  const int64_t at = (int64_t)block_x() * THREADS + thread_id(), n = at % a.N;
  if (at >= a.M * a.N) return;
  float sum = 0.0f;
  for (int split = 0; split < f.num_splits; ++split)
    sum += ldg(a.partials + split * a.M * a.N + at);
  finish(a, at, n, sum);
}

// Why the kernel cannot take it, or null.
const char* gemm_unsupported_reason(const LinearArgs& a) {
  if (a.compute == F32) return "float32 products need every bit, which tensor cores drop";
  if (a.x.dtype != a.compute || !a.x.vectors) return "x's rows are not whole and aligned 16 bytes";
  if (!a.codes && (a.w.dtype != a.compute || !a.w.vectors))
    return "the weight's rows are not whole and aligned 16 bytes";
  if (a.codes && !a.c.vectors) return "the weight's rows are not whole runs of 32 codes";
  if (a.codes && a.c.log2_block < 4) return "the weight's blocks have less than 16 codes";
  if (a.K % 8 || (a.transposed && a.N % 8)) return "a row is no multiple of 8 elements";
  return nullptr;
}

}  // namespace

void gemm(const LinearArgs& a, int num_splits, const Stream& stream) {
  refuse("gemm", gemm_unsupported_reason(a));
  void (*kernels[2][2][2])(LinearArgs) = {
      {{gemm_kernel<false, false, false>, gemm_kernel<false, false, true>},
       {gemm_kernel<false, true, false>, gemm_kernel<false, true, true>}},
      {{gemm_kernel<true, false, false>, gemm_kernel<true, false, true>},
       {gemm_kernel<true, true, false>, gemm_kernel<true, true, true>}}};
  const unsigned bytes =
      STAGES * X_BYTES + (a.codes ? 2 : STAGES) * W_BYTES + (a.codes ? TABLE_BYTES : 0);
  launch({.name = "gemm",
          .x = (unsigned)((a.M + BM - 1) / BM),
          .y = (unsigned)((a.N + BN - 1) / BN),
          .z = (unsigned)num_splits,
          .threads = THREADS,
          .shared_bytes = bytes,
          .stream = stream},
         kernels[a.compute == BF16][a.codes][a.transposed], a);
  if (num_splits > 1)
    launch({.name = "finish",
            .x = (unsigned)((a.M * a.N + THREADS - 1) / THREADS),
            .threads = THREADS,
            .stream = stream},
           finish_kernel, {.linear = a, .num_splits = num_splits});
}

}  // namespace gpu
}  // namespace lora_kernels
