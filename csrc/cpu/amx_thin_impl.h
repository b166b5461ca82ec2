#pragma once
// The skinny GEMMs in AMX tiles: on AMX, those of kernels_impl.h would take longer than the base
// GEMM. x and dY are bf16. A float32 factor is split into two or three bf16 terms, which keep 16 or
// all 24 of its bits. Each SPAN of a sum is summed in a tile by itself and then added, as in
// kernels_impl.h; dots with one or two terms take four SPANs. Follows product_impl.h.

namespace lora_kernels {
namespace {

constexpr int64_t SPAN = 256;       // elements summed in a tile
constexpr int64_t TILED_ROWS = 64;  // rows of x in a task of dots: four tiles

LK_INLINE int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
LK_INLINE int terms_of(DType dtype) {
  return dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : 3;
}

// dots: out[m, r] = scale * sum_k mask(X)[m, k] * gate[k] * Q[k, r] ------------------------------

struct DotsArgs {
  Matrix x, q;
  const float* gate;  // [K] or null
  int64_t M, K, R;
  float scale;
  Dropout dropout;
  float* out;
  int64_t ld;
  int threads;
};

// sums [16 I, 16] = or, unless is_first, += I tiles of 16 rows of x, whose rows lie `ld` elements
// apart, times `steps` of Q's tiles.
template <int I>
LK_INLINE void dots_tiles(const bf16* x, int64_t ld, const float* q, int64_t steps, int terms,
                          float* c, float* sums, bool is_first) {
  _tile_zero(0);
  if constexpr (I > 1) _tile_zero(1);
  if constexpr (I > 2) _tile_zero(2);
  if constexpr (I > 3) _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, x += X_DEPTH, q += terms * TILE_WORDS) {
    _tile_loadd(5, q, LD_X);
    if (terms > 1) _tile_loadd(6, q + TILE_WORDS, LD_X);
    if (terms > 2) _tile_loadd(7, q + 2 * TILE_WORDS, LD_X);
#define LK_TILE(i)                               \
  if constexpr (I > i) {                         \
    _tile_loadd(4, x + i * X_ROWS * ld, ld * 2); \
    _tile_dpbf16ps(i, 4, 5);                     \
    if (terms > 1) _tile_dpbf16ps(i, 4, 6);      \
    if (terms > 2) _tile_dpbf16ps(i, 4, 7);      \
  }
    LK_TILE(0)
    LK_TILE(1)
    LK_TILE(2)
    LK_TILE(3)
#undef LK_TILE
  }
  _tile_stored(0, c, LD_X);
  if constexpr (I > 1) _tile_stored(1, c + TILE_WORDS, LD_X);
  if constexpr (I > 2) _tile_stored(2, c + 2 * TILE_WORDS, LD_X);
  if constexpr (I > 3) _tile_stored(3, c + 3 * TILE_WORDS, LD_X);
  for (int64_t i = 0; i < I * TILE_WORDS; i += W)
    store(sums + i, is_first ? load(c + i) : add(load(sums + i), load(c + i)));
}

// Q's tiles lie [rank block, step, term], each 16 pairs by 16 ranks. Reads X from memory once, and
// again for each 16 ranks from a cache; Q once a block of rows. Tested by tests/ops.
void dots(const DotsArgs& a) {
  const int64_t blocks = (a.R + 15) / 16, steps = x_tiles(a.K), K32 = steps * X_DEPTH;
  const int terms = a.gate && a.q.dtype == DType::bf16 ? 2 : terms_of(a.q.dtype);
  const bool is_serial = a.M * a.K * a.R < MIN_PARALLEL_WORK;
  const int64_t packs = (steps + 3) / 4,
                pack_chunks = is_serial ? 1 : min(a.threads, packs * blocks);
  // A block of rows is four tiles, or one if threads would have no work otherwise.
  const bool has_one_tile = a.M < TILED_ROWS * a.threads;
  const int64_t height = has_one_tile ? X_ROWS : TILED_ROWS,
                row_blocks = (a.M + height - 1) / height;
  const int64_t chunks = is_serial ? 1 : min(a.threads, row_blocks);
  const Philox generator = make_philox(a.dropout);
  const int64_t q_floats = blocks * steps * terms * TILE_WORDS, pack_depth = 4 * X_DEPTH;
  const int64_t pack_floats = pack_depth * 16 + staging_floats(16, pack_depth);
  const int64_t masked_x_floats = height * (K32 + 64) / 2,
                chunk_floats = masked_x_floats + 2 * 64 * 16;
  Scratch scratch((q_floats + pack_chunks * pack_floats + chunks * chunk_floats) * 4);
  float* const tiles = static_cast<float*>(scratch.data);
  float* const pack_scratch = tiles + q_floats;
  float* const rows = pack_scratch + pack_chunks * pack_floats;

  parallel_for(a.threads, pack_chunks, [&](int64_t t) {
    float* const panel_f32 = pack_scratch + t * pack_floats;
    for (int64_t i = packs * blocks * t / pack_chunks; i < packs * blocks * (t + 1) / pack_chunks;
         ++i) {
      const int64_t r0 = i / packs * 16, s0 = i % packs * 4, k0 = s0 * X_DEPTH;
      const int64_t depth = min(pack_depth, a.K - k0), s1 = min(s0 + 4, steps);
      const Matrix q{
          .data = static_cast<const char*>(a.q.data) + k0 * a.q.row_stride * bytes_of(a.q.dtype),
          .dtype = a.q.dtype,
          .row_stride = a.q.row_stride,
          .col_stride = a.q.col_stride};
      pack(q, depth, r0, min(16, a.R - r0), 16, 1.0f, a.gate ? a.gate + k0 : nullptr, nullptr,
           panel_f32, 16, panel_f32 + pack_depth * 16);
      for (int64_t k = round_up(depth, 4); k < (s1 - s0) * X_DEPTH; ++k)
        store(panel_f32 + k * 16, zero());
      for (int64_t pair = 0; pair < (s1 - s0) * 16; ++pair) {
        vf even = load(panel_f32 + pair * 32), odd = load(panel_f32 + pair * 32 + 16);
        float* dst =
            tiles + ((r0 / 16 * steps + s0 + pair / 16) * terms) * TILE_WORDS + pair % 16 * 16;
        for (int term = 0; term < terms; ++term, dst += TILE_WORDS) split_term(even, odd, dst);
      }
    }
  });

  const bf16* const x = static_cast<const bf16*>(a.x.data);
  const int64_t span = SPAN / X_DEPTH * (terms > 2 ? 1 : 4);
  parallel_for(a.threads, chunks, [&](int64_t chunk) {
    const Tiles registers;
    bf16* const masked_x = reinterpret_cast<bf16*>(rows + chunk * chunk_floats);
    float* const sums = rows + chunk * chunk_floats + masked_x_floats;
    float* const c = sums + 64 * 16;
    for (int64_t row_block = row_blocks * chunk / chunks;
         row_block < row_blocks * (chunk + 1) / chunks; ++row_block) {
      const int64_t m0 = row_block * height, count = min(height, a.M - m0);
      const bf16* src = x + m0 * a.x.row_stride;
      int64_t ld = a.x.row_stride;
      if (a.dropout.rng || count < height || a.K < K32) {
        ld = round_up(K32, 64);
        for (int64_t i = 0; i < height; ++i)
          copy_masked(src + min(i, count - 1) * a.x.row_stride, masked_x + i * ld,
                      i < count ? a.K : 0, ld, a.dropout.rng ? &generator : nullptr,
                      m0 + min(i, count - 1), 0);
        src = masked_x;
      }
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t s = 0; s < steps; s += span) {
          const float* const q = tiles + (block * steps + s) * terms * TILE_WORDS;
          const int64_t n = min(span, steps - s);
          if (has_one_tile)
            dots_tiles<1>(src + s * X_DEPTH, ld, q, n, terms, c, sums, s == 0);
          else
            dots_tiles<4>(src + s * X_DEPTH, ld, q, n, terms, c, sums, s == 0);
        }
        const int valid = (int)min(16, a.R - block * 16);
        for (int64_t i = 0; i < count; ++i)
          store_n(a.out + (m0 + i) * a.ld + block * 16, mul(load(sums + i * 16), splat(a.scale)),
                  valid);
      }
    }
  });
}

// outers: sums[r, n] = sum_m D[m, r] * mask(X)[m, n] ---------------------------------------------

struct OutersArgs {
  Matrix x;
  int64_t M, N, R;
  const float* d;
  int64_t ld_d;
  int terms;
  Dropout dropout;
  float* sums;  // [N / 64, R up to 16, 64]
  int threads;
};

// A thread has columns of its own, so that no sum crosses threads. Rows pass in blocks of SPAN. 64
// columns of a block are packed in pairs, which all ranks read from L2. consume(n0, n1) gets a
// thread's sums, 64 columns at a time. Reads X once. Tested by tests/ops.
template <typename Then>
LK_INLINE void outers(const OutersArgs& a, const Then& consume) {
  const int64_t blocks = (a.R + 15) / 16, steps = (a.M + 31) / 32, panels = (a.N + 63) / 64;
  const int64_t tile = X_TILE * a.terms, R16 = blocks * 16, R4 = round_up(a.R, 4);
  const bool is_serial = a.M * a.N * a.R < MIN_PARALLEL_WORK;
  const int64_t pack_chunks = is_serial ? 1 : min(a.threads, steps),
                chunks = is_serial ? 1 : min(a.threads, panels);
  const int64_t d_floats = steps * blocks * tile / 2;
  const int64_t pack_floats = R16 * 32 + staging_floats(32, R16);
  const int64_t pair_floats = SPAN / 2 * 64, chunk_floats = pair_floats + 16 * 64 + 64;
  Scratch scratch((d_floats + pack_chunks * pack_floats + chunks * chunk_floats) * 4);
  bf16* const tiles = static_cast<bf16*>(scratch.data);
  float* const pack_scratch = static_cast<float*>(scratch.data) + d_floats;
  float* const thread_buffers = pack_scratch + pack_chunks * pack_floats;
  const Philox generator = make_philox(a.dropout);

  parallel_for(a.threads, pack_chunks, [&](int64_t t) {
    float* const panel_f32 = pack_scratch + t * pack_floats;
    for (int64_t s = steps * t / pack_chunks; s < steps * (t + 1) / pack_chunks; ++s) {
      const Matrix q{.data = a.d,
                     .dtype = DType::f32,
                     .row_stride = 1,
                     .col_stride = a.ld_d};  // its rows are ranks
      pack(q, a.R, s * 32, min(32, a.M - s * 32), 32, 1.0f, nullptr, nullptr, panel_f32, 32,
           panel_f32 + R16 * 32);
      for (int64_t r = R4; r < R16; ++r)
        store(panel_f32 + r * 32, zero()), store(panel_f32 + r * 32 + 16, zero());
      for (int64_t r = 0; r < R16; ++r) {
        split_row(load(panel_f32 + r * 32), load(panel_f32 + r * 32 + 16), a.terms,
                  tiles + (s * blocks + r / 16) * tile + r % 16 * 32);
      }
    }
  });

  const bf16* const x = static_cast<const bf16*>(a.x.data);
  parallel_for(a.threads, chunks, [&](int64_t chunk) {
    const Tiles registers;
    float* const pairs = thread_buffers + chunk * chunk_floats;
    float* const c = pairs + pair_floats;
    bf16* const masked_x = reinterpret_cast<bf16*>(c + 16 * 64);  // two rows
    const int64_t first = panels * chunk / chunks, last = panels * (chunk + 1) / chunks;
    for (int64_t m0 = 0; m0 < steps * 32; m0 += SPAN)
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t n0 = panel * 64, count = min(64, a.N - n0);
        const int64_t depth = min(SPAN, steps * 32 - m0);
        for (int64_t j = 0; j < depth; j += 2) {
          const bf16* row[2] = {x, nullptr};
          const int64_t valid = m0 + j < a.M ? count : 0;
          for (int64_t i = 0; i < 2 && m0 + j + i < a.M; ++i) {
            row[i] = x + (m0 + j + i) * a.x.row_stride + n0;
            __builtin_prefetch(row[i] + 64, 0, 2), __builtin_prefetch(row[i] + 96, 0, 2);
            if (!a.dropout.rng) continue;
            copy_masked(row[i], masked_x + i * 64, count, 64, &generator, m0 + j + i, n0);
            row[i] = masked_x + i * 64;
          }
          float* const dst = pairs + j / 2 * 64;
          interleave(row[0], row[1], min(32, valid), dst);
          interleave(row[0] + 32, row[1] ? row[1] + 32 : nullptr, max(0, valid - 32), dst + 32);
        }
        for (int64_t block = 0; block < blocks; ++block) {
          const bf16* d = tiles + (m0 / 32 * blocks + block) * tile;
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
          for (int64_t s = 0; s < depth / 32; ++s, d += blocks * tile) {
            const float* const words = pairs + s * 16 * VW;
            _tile_loadd(4, d, LD_X);
            if (a.terms > 1) _tile_loadd(5, d + X_TILE, LD_X);
#define LK_TILES(u, v)                 \
  _tile_loadd(6, words + u * W, LD_C); \
  _tile_loadd(7, words + v * W, LD_C); \
  _tile_dpbf16ps(u, 4, 6);             \
  _tile_dpbf16ps(v, 4, 7);             \
  if (a.terms > 1) {                   \
    _tile_dpbf16ps(u, 5, 6);           \
    _tile_dpbf16ps(v, 5, 7);           \
  }
            LK_TILES(0, 1)
            LK_TILES(2, 3)
            if (a.terms > 2) {
              _tile_loadd(4, d + 2 * X_TILE, LD_X);
              _tile_dpbf16ps(2, 4, 6);
              _tile_dpbf16ps(3, 4, 7);
              _tile_loadd(6, words, LD_C);
              _tile_loadd(7, words + W, LD_C);
              _tile_dpbf16ps(0, 4, 6);
              _tile_dpbf16ps(1, 4, 7);
            }
#undef LK_TILES
          }
          store_sums(c, W, 2 * W, LD_C);
          for (int64_t r = 0; r < 16; ++r)
            for (int64_t n = 0; n < 64; n += W) {
              float* const dst = a.sums + (panel * R16 + block * 16 + r) * 64 + n;
              store(dst, m0 ? add(load(dst), load(c + r * 64 + n)) : load(c + r * 64 + n));
            }
        }
      }
    for (int64_t panel = first; panel < last; ++panel)
      consume(panel * 64, min(panel * 64 + 64, a.N));
  });
}

// The kernels -----------------------------------------------------------------------------------

LK_INLINE bool can_use_tiles(const Matrix& x, int64_t M, int64_t R) {
  return x.dtype == DType::bf16 && x.col_stride == 1 && M >= MIN_TILE_ROWS && R > 0;
}

// `shrink` with Q = A^T.
void shrink_tiles(const ShrinkArgs& a) {
  if (!can_use_tiles(a.x, a.M, a.R)) return kernels_avx512bf16.shrink(a);
  dots({.x = a.x,
        .q = {.data = a.a.data, .dtype = a.a.dtype, .row_stride = 1, .col_stride = a.a.row_stride},
        .gate = nullptr,
        .M = a.M,
        .K = a.K,
        .R = a.R,
        .scale = a.scale,
        .dropout = a.dropout,
        .out = a.p,
        .ld = a.lds,
        .threads = a.threads});
}

// `backward_pair`, but dS and dB read dY once each, since they divide it into other tiles. dc and
// dbias read it once more.
void backward_pair_tiles(const BackwardPairArgs& a) {
  if (!can_use_tiles(a.dy, a.M, a.R)) return kernels_avx512bf16.backward_pair(a);
  if (a.ds)
    dots({.x = a.dy,
          .q = a.b,
          .gate = a.c,
          .M = a.M,
          .K = a.N,
          .R = a.R,
          .scale = a.ds_scale,
          .dropout = {},
          .out = a.ds,
          .ld = a.lds,
          .threads = a.threads});
  if (a.db) {
    const int64_t ld = round_up(a.N, 64), R16 = round_up(a.R, 16);
    const int terms = a.db_dtype == DType::f32 ? 3 : 2;
    Scratch sums(R16 * ld * 4);
    float* const partials = static_cast<float*>(sums.data);
    outers({.x = a.dy,
            .M = a.M,
            .N = a.N,
            .R = a.R,
            .d = a.s,
            .ld_d = a.lds,
            .terms = terms,
            .dropout = {},
            .sums = partials,
            .threads = a.threads},
           [&](int64_t n0, int64_t n1) {
             Scratch block(64 * round_up(a.R, 4) * 2 * 4);
             reduce_db(a, partials + n0 * R16 - n0, 1, 0, 64, n0, n1,
                       static_cast<float*>(block.data));
           });
  }
  if (a.dc || a.dbias) {
    BackwardPairArgs sums_only = a;
    sums_only.ds = nullptr;
    sums_only.db = nullptr;
    kernels_avx512bf16.backward_pair(sums_only);
  }
}

// `grad_a` in tiles.
void grad_a_tiles(const GradAArgs& a) {
  if (!can_use_tiles(a.x, a.M, a.R)) return kernels_avx512bf16.grad_a(a);
  const int64_t ld = round_up(a.K, 64), R16 = round_up(a.R, 16);
  Scratch scratch(R16 * ld * 4);
  float* const sums = static_cast<float*>(scratch.data);
  const int terms = a.da_dtype == DType::f32 ? 3 : 2;
  outers({.x = a.x,
          .M = a.M,
          .N = a.K,
          .R = a.R,
          .d = a.d,
          .ld_d = a.lds,
          .terms = terms,
          .dropout = a.dropout,
          .sums = sums,
          .threads = a.threads},
         [&](int64_t k0, int64_t k1) {
           dispatch_dtype(a.da_dtype, [&](auto type) {
             using T = decltype(type);
             for (int64_t r = 0; r < a.R; ++r)
               for (int64_t k = k0; k < k1; k += W)
                 store_n(static_cast<T*>(a.da) + r * a.K + k,
                         load(sums + k0 * R16 + r * 64 + k - k0), (int)min(W, k1 - k));
           });
         });
}

// `expand` in tiles: 32 rows of y by 64 columns, along the rows as far as Q's tiles stay in L2.
void expand_tiles(const ExpandArgs& a) {
  if (a.dtype != DType::bf16 || a.M < MIN_TILE_ROWS || !a.R) return kernels_avx512bf16.expand(a);
  const int64_t blocks = (a.R + 15) / 16, R16 = blocks * 16;
  const int64_t groups = (a.M + 31) / 32, panels = (a.N + VW - 1) / VW;
  const bool is_serial = a.M * a.N * a.R < MIN_PARALLEL_WORK;
  const int64_t chunks = is_serial ? 1 : min(a.threads, groups),
                pack_chunks = is_serial ? 1 : min(a.threads, panels);
  const int terms = a.q.dtype == DType::bf16 ? 1 : 2;
  const Philox generator = make_philox(a.dropout);
  const int64_t q_floats = R16 * VW * terms, panels_in_l2 = max(1, (1 << 15) / q_floats);
  const int64_t pack_floats = R16 * VW + staging_floats(VW, a.R);
  const int64_t chunk_floats = 2 * blocks * TILE_WORDS + 2 * X_ROWS * VW;
  Scratch scratch((panels * q_floats + pack_chunks * pack_floats + chunks * chunk_floats) * 4);
  float* const q = static_cast<float*>(scratch.data);
  float* const pack_scratch = q + panels * q_floats;
  float* const thread_buffers = pack_scratch + pack_chunks * pack_floats;
  parallel_for(a.threads, pack_chunks, [&](int64_t t) {
    for (int64_t i = panels * t / pack_chunks; i < panels * (t + 1) / pack_chunks; ++i)
      pack_duplicated(a, i * VW, terms, pack_scratch + t * pack_floats, q + i * q_floats);
  });
  parallel_for(a.threads, chunks, [&](int64_t chunk) {
    const Tiles registers;
    float* const C = thread_buffers + chunk * chunk_floats;
    float* const s = C + 2 * X_ROWS * VW;
    bf16* const y = static_cast<bf16*>(a.y);
    for (int64_t i0 = 0; i0 < panels; i0 += panels_in_l2)
      for (int64_t group = groups * chunk / chunks; group < groups * (chunk + 1) / chunks;
           ++group) {
        const int64_t m0 = group * 2 * X_ROWS, m1 = min(m0 + 2 * X_ROWS, a.M);
        split_rows(a, m0, blocks, s);
        for (int64_t i = i0; i < min(i0 + panels_in_l2, panels); ++i) {
          const int64_t n = i * VW, n1 = min(n + VW, a.N);
          for (int64_t half = 0; half < VW; half += 2 * W) {
            load_sums(nullptr, 0, 0, 0, false);
            rank_2x2(s, q + i * q_floats + half, blocks, terms);
            store_sums(C + half, W, X_ROWS * VW, LD_C);
          }
          for (int64_t m = m0; m < m1; m += Y_ROWS) {
            const int64_t count = min(Y_ROWS, m1 - m);
            for (int64_t j = 0; j < count; ++j) {  // of the next columns
              __builtin_prefetch(y + (m + j) * a.ldy + n + VW, 1);
              __builtin_prefetch(y + (m + j) * a.ldy + n + VW + 32, 1);
            }
            vf acc[Y_ROWS][V];
            LK_UNROLL for (int j = 0; j < Y_ROWS; ++j) LK_UNROLL for (int v = 0; v < V; ++v)
                acc[j][v] = load(C + min(m - m0 + j, 31) * VW + v * W);
            if (a.dropout.rng) {
              uint64_t bits[Y_ROWS] = {};
              for (int64_t j = 0; j < count; ++j) bits[j] = dropout_bits64(generator, m + j, n);
              mask_tile(bits, 0, acc);
            }
            const auto load_y = [&](int j, int v, int valid) {
              const bf16* src = y + (m + j) * a.ldy + n + v * W;
              return valid == W ? load(src) : load_n(src, valid);
            };
            epilogue_tile<bf16>(a, m, count, n, n1, acc, load_y);
          }
        }
      }
  });
}

// `gemv` without pairs: Intel's processors take as long for a pair of bf16 as for two float32.
void gemv_widened(const GemvArgs& a) {
  GemvArgs widened = a;
  widened.allows_pairs = false;
  kernels_avx512bf16.gemv(widened);
}

}  // namespace
}  // namespace lora_kernels
