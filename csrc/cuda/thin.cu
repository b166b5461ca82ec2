// Skinny GEMMs with R columns on one side: P = x·Aᵀ, dS = dZ·B, dB = dZᵀ·S, dA = dXAᵀ·x.
// In float32 on CUDA cores (FFMA), which are the limit at 64 ranks: see the bounds in KERNELS.md.
#include "kernels.h"
#include "operands.cuh"

namespace lora_kernels {
namespace gpu {
namespace {

constexpr int THREADS = 128;
constexpr int TILE_I = 64, TILE_J = 32;
constexpr int PITCH_I = TILE_I + 4;  // floats from one j to the next

LK_DEVICE void lds4(uint32_t at, float out[4]) {
  const Words4 w = lds<Words4>(at);
  LK_UNROLL
  for (int e = 0; e < 4; ++e) out[e] = bits_to_f32(w.w[e]);
}
LK_DEVICE void sts4(uint32_t at, const float in[4]) {
  Words4 w;
  LK_UNROLL
  for (int e = 0; e < 4; ++e) w.w[e] = f32_to_bits(in[e]);
  sts(at, w);
}

// Eight elements of v, scaled.
LK_DEVICE void load_v(const Matrix& v, const Vector& scale, int64_t row, int64_t column,
                      int64_t columns, float out[8]) {
  load8(v, row, column, columns, out);
  if (scale.data) LK_UNROLL
  for (int e = 0; e < 8; ++e)
    if (column + e < columns) out[e] *= load_at(scale.data, scale.dtype, column + e);
}

// A tile's sum is taken by itself and then added: one chain over all would lose more than
// cuBLAS's blocked GEMM does.
template <int TR>
LK_DEVICE void clear(float sums[4][TR]) {
  LK_UNROLL
  for (int i = 0; i < 4; ++i) LK_UNROLL
  for (int r = 0; r < TR; ++r) sums[i][r] = 0.0f;
}
template <int TR>
LK_DEVICE void add_to(float total[4][TR], const float sums[4][TR]) {
  LK_UNROLL
  for (int i = 0; i < 4; ++i) LK_UNROLL
  for (int r = 0; r < TR; ++r) total[i][r] += sums[i][r];
}

// out[split, i, r] = Σ_j v(i, j) y(r, j) over the split's j, v(i, j) = v[i, j] or, over its rows,
// v[j, i]. A block makes 64 i by 8 TR ranks; each thread 4 by TR.
// Bytes: v once for each 8 TR ranks, y once for each 64 i, out once. Flops 2·I·J·R. Deterministic.
// Rounding points: none but float32. Tested by tests/cuda_emulated/test_lora_linear.py.
template <int TR>
LK_KERNEL LK_BOUNDS(THREADS, 3) thin_kernel(const ThinArgs a) {
  constexpr int TILE_R = 8 * TR, PITCH_R = TILE_R + 4;
  const uint32_t vs = shared_base(), ys = vs + TILE_J * PITCH_I * 4;
  const int64_t i0 = (int64_t)block_x() * TILE_I, r0 = (int64_t)block_y() * TILE_R;
  const int64_t first = (int64_t)block_z() * a.j_per_split,
                end = min_of(a.J, first + a.j_per_split);
  const int thread = thread_id(), ti = thread % 16 * 4, tr = thread / 16 * TR;
  float acc[4][TR];
  clear(acc);

  LK_ONCE
  for (int64_t j0 = first; j0 < end; j0 += TILE_J) {
    sync_block();  // the tiles of the step before have been read
    LK_UNROLL
    for (int u = thread; u < TILE_I * TILE_J / 8; u += THREADS) {
      float x[8];
      LK_UNROLL
      for (int e = 0; e < 8; ++e) x[e] = 0.0f;
      if (a.over_rows) {
        const int j = u / (TILE_I / 8), i = u % (TILE_I / 8) * 8;
        if (j0 + j < end) load_v(a.v, a.v_scale, j0 + j, i0 + i, a.I, x);
        sts4(vs + (j * PITCH_I + i) * 4, x);
        sts4(vs + (j * PITCH_I + i + 4) * 4, x + 4);
      } else {
        const int i = u / (TILE_J / 8), j = u % (TILE_J / 8) * 8;
        if (i0 + i < a.I) load_v(a.v, a.v_scale, i0 + i, j0 + j, end, x);
        LK_UNROLL
        for (int e = 0; e < 8; ++e) sts(vs + ((j + e) * PITCH_I + i) * 4, x[e]);
      }
    }
    for (int u = thread; u < TILE_R * TILE_J; u += THREADS) {
      const int j = a.over_rows ? u / TILE_R : u % TILE_J;
      const int r = a.over_rows ? u % TILE_R : u / TILE_J;
      const bool inside = r0 + r < a.R && j0 + j < end;
      sts(ys + (j * PITCH_R + r) * 4, inside ? load(a.y, r0 + r, j0 + j) : 0.0f);
    }
    sync_block();
    float partial[4][TR];
    clear(partial);
    LK_UNROLL
    for (int j = 0; j < TILE_J; ++j) {
      float v[4], y[TR];
      lds4(vs + (j * PITCH_I + ti) * 4, v);
      if constexpr (TR % 4 == 0) {
        LK_UNROLL
        for (int r = 0; r < TR; r += 4) lds4(ys + (j * PITCH_R + tr + r) * 4, y + r);
      } else {
        LK_UNROLL
        for (int r = 0; r < TR; ++r) y[r] = lds<float>(ys + (j * PITCH_R + tr + r) * 4);
      }
      LK_UNROLL
      for (int i = 0; i < 4; ++i) LK_UNROLL
      for (int r = 0; r < TR; ++r) partial[i][r] = fma_rn(v[i], y[r], partial[i][r]);
    }
    add_to(acc, partial);
  }
  float* out = a.out + (int64_t)block_z() * a.I * a.R;
  LK_UNROLL
  for (int i = 0; i < 4; ++i) LK_UNROLL
  for (int r = 0; r < TR; ++r)
    if (i0 + ti + i < a.I && r0 + tr + r < a.R)
      stg(out + (i0 + ti + i) * a.R + r0 + tr + r, acc[i][r]);
}

constexpr int PAIR_COLUMNS = 64;
constexpr int PITCH = PAIR_COLUMNS + 4;

// One read of v for both of its products: ds_partials[split] = (v ⊙ c)·b over the split's
// columns, and db_partials[tile] = (v ⊙ c)ᵀ·s over the tile's rows. A block computes 64 rows of
// ds_partials[split], and the split's columns of db_partials[tile]. A thread computes 4 rows by 2
// ranks of the one, 4 columns by 2 ranks of the other, for each of up to RC times 16 ranks.
// Bytes: v once, b and s once for each 64 rows and split, the partial sums. Flops 4·M·N·R.
// Deterministic. Tested by tests/cuda_emulated/test_lora_linear.py.
template <int RC>
LK_KERNEL LK_BOUNDS(THREADS, 3) pair_kernel(const PairArgs a) {
  constexpr int RANKS = 16 * RC, PITCH_R = RANKS + 4;
  const uint32_t vs = shared_base();               // [64 m][PITCH]
  const uint32_t bs = vs + PAIR_ROWS * PITCH * 4;  // [RANKS][PITCH]: n inside
  const uint32_t ss = bs + RANKS * PITCH * 4;      // [64 m][PITCH_R]
  const int64_t m0 = (int64_t)block_x() * PAIR_ROWS;
  const int64_t first = (int64_t)block_y() * a.n_per_split,
                end = min_of(a.N, first + a.n_per_split);
  const int thread = thread_id(), group = thread / 8 * 4, ranks = thread % 8 * 2;
  float ds[RC][4][2];
  LK_UNROLL
  for (int c = 0; c < RC; ++c) clear(ds[c]);
  for (int u = thread; u < PAIR_ROWS * RANKS; u += THREADS) {
    const int m = u / RANKS, r = u % RANKS;
    const bool inside = m0 + m < a.M && r < a.R;
    sts(ss + (m * PITCH_R + r) * 4, inside ? ldg(a.s + (m0 + m) * a.R + r) : 0.0f);
  }
  LK_ONCE
  for (int64_t n0 = first; n0 < end; n0 += PAIR_COLUMNS) {
    sync_block();
    for (int u = thread; u < PAIR_ROWS * PAIR_COLUMNS / 8; u += THREADS) {
      const int m = u / (PAIR_COLUMNS / 8), n = u % (PAIR_COLUMNS / 8) * 8;
      float v[8];
      LK_UNROLL
      for (int e = 0; e < 8; ++e) v[e] = 0.0f;
      if (m0 + m < a.M) load_v(a.v, a.v_scale, m0 + m, n0 + n, end, v);
      sts4(vs + (m * PITCH + n) * 4, v);
      sts4(vs + (m * PITCH + n + 4) * 4, v + 4);
    }
    for (int u = thread; u < RANKS * PAIR_COLUMNS; u += THREADS) {
      const int n = u / RANKS, r = u % RANKS;
      const bool inside = n0 + n < end && r < a.R;
      sts(bs + (r * PITCH + n) * 4, inside ? load(a.b, n0 + n, r) : 0.0f);
    }
    sync_block();
    LK_UNROLL
    for (int c = 0; c < RC; ++c) {
      float partial[4][2];
      clear(partial);
      LK_ONCE
      for (int n = 0; n < PAIR_COLUMNS; n += 4) {
        float b[2][4];
        LK_UNROLL
        for (int r = 0; r < 2; ++r) lds4(bs + ((16 * c + ranks + r) * PITCH + n) * 4, b[r]);
        LK_UNROLL
        for (int i = 0; i < 4; ++i) {
          float v[4];
          lds4(vs + ((group + i) * PITCH + n) * 4, v);
          LK_UNROLL
          for (int r = 0; r < 2; ++r) LK_UNROLL
          for (int e = 0; e < 4; ++e) partial[i][r] = fma_rn(v[e], b[r][e], partial[i][r]);
        }
      }
      add_to(ds[c], partial);
      float db[4][2];
      clear(db);
      LK_ONCE
      for (int m = 0; m < PAIR_ROWS; ++m) {
        float v[4], s[2];
        lds4(vs + (m * PITCH + group) * 4, v);
        LK_UNROLL
        for (int r = 0; r < 2; ++r) s[r] = lds<float>(ss + (m * PITCH_R + 16 * c + ranks + r) * 4);
        LK_UNROLL
        for (int i = 0; i < 4; ++i) LK_UNROLL
        for (int r = 0; r < 2; ++r) db[i][r] = fma_rn(v[i], s[r], db[i][r]);
      }
      float* db_out = a.db_partials + (int64_t)block_x() * a.N * a.R;
      LK_UNROLL
      for (int i = 0; i < 4; ++i) LK_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int64_t n = n0 + group + i, rank = 16 * c + ranks + r;
        if (n < end && rank < a.R) stg(db_out + n * a.R + rank, db[i][r]);
      }
    }
  }
  float* ds_out = a.ds_partials + (int64_t)block_y() * a.M * a.R;
  LK_UNROLL
  for (int c = 0; c < RC; ++c) LK_UNROLL
  for (int i = 0; i < 4; ++i) LK_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int64_t m = m0 + group + i, rank = 16 * c + ranks + r;
    if (m < a.M && rank < a.R) stg(ds_out + m * a.R + rank, ds[c][i][r]);
  }
}

// partials[split, n, :] = Σ v, Σ v ⊙ z over the split's rows; a thread a column. v, z are read
// once.
LK_KERNEL LK_BOUNDS(THREADS, 8) sums_kernel(const SumsArgs a) {
  const int64_t n = (int64_t)block_x() * THREADS + thread_id();
  const int64_t first = (int64_t)block_y() * a.m_per_split,
                end = min_of(a.M, first + a.m_per_split);
  if (n >= a.N) return;
  float sum = 0.0f, sum_z = 0.0f;
  for (int64_t m = first; m < end; ++m) {
    const float v = load(a.v, m, n);
    sum += v;
    if (a.z.data) sum_z = fma_rn(v, load(a.z, m, n), sum_z);
  }
  float* out = a.partials + ((int64_t)block_y() * a.N + n) * 2;
  stg(out, sum);
  stg(out + 1, sum_z);
}

// out(i, r) = scale · gate[r] · Σ partials, added in order; a thread an element.
LK_KERNEL LK_BOUNDS(THREADS, 8) reduce_kernel(const ReduceArgs a) {
  const int64_t at = (int64_t)block_x() * THREADS + thread_id();
  if (at >= a.I * a.R) return;
  float sum = 0.0f;
  for (int split = 0; split < a.num_splits; ++split)
    sum += ldg(a.partials + split * a.I * a.R + at);
  const int64_t i = at / a.R, r = at % a.R;
  sum *= a.scale;
  if (a.gate.data) sum *= load_at(a.gate.data, a.gate.dtype, r);
  store_at(a.out, a.dtype, i * a.stride_i + r * a.stride_r, sum);
}

unsigned tiles(int64_t n, int64_t tile) { return (unsigned)((n + tile - 1) / tile); }

}  // namespace

void thin(const ThinArgs& a, const Stream& stream) {
  const bool wide = a.R > 16;
  const int tile_r = wide ? 64 : 16;
  launch({.name = "thin",
          .x = tiles(a.I, TILE_I),
          .y = tiles(a.R, tile_r),
          .z = (unsigned)a.num_splits,
          .threads = THREADS,
          .shared_bytes = (unsigned)(TILE_J * (PITCH_I + tile_r + 4) * 4),
          .stream = stream},
         wide ? thin_kernel<8> : thin_kernel<2>, a);
}

void pair(const PairArgs& a, const Stream& stream) {
  const bool wide = a.R > 16;
  const int ranks = wide ? 64 : 16;
  const unsigned bytes = (PAIR_ROWS * PITCH + ranks * PITCH + PAIR_ROWS * (ranks + 4)) * 4;
  launch({.name = "pair",
          .x = (unsigned)a.num_row_tiles,
          .y = (unsigned)a.num_splits,
          .threads = THREADS,
          .shared_bytes = bytes,
          .stream = stream},
         wide ? pair_kernel<4> : pair_kernel<1>, a);
}

void column_sums(const SumsArgs& a, const Stream& stream) {
  launch({.name = "sums",
          .x = tiles(a.N, THREADS),
          .y = (unsigned)a.num_splits,
          .threads = THREADS,
          .stream = stream},
         sums_kernel, a);
}

void reduce(const ReduceArgs& a, const Stream& stream) {
  launch({.name = "reduce", .x = tiles(a.I * a.R, THREADS), .threads = THREADS, .stream = stream},
         reduce_kernel, a);
}

void probe(int device) { require_image(reduce_kernel, device, "the driver says"); }

unsigned long long capture_id(uintptr_t stream) { return capture_of(stream); }

}  // namespace gpu
}  // namespace lora_kernels
