#pragma once
// The skinny GEMMs in AMX tiles; those of kernels_impl.h would take longer than the base GEMM
// does on AMX. x and dY are bf16; a factor in float32 is the sum of two or
// three bf16, which keep 16 or all 24 of its bits. A tile's sum over SPAN elements (four times that
// where dots have one or two terms) is taken by itself and then added, as kernels_impl.h does.
// Follows product_impl.h.

namespace lora_kernels {
namespace {

constexpr int64_t SPAN = 256;       // elements of a sum
constexpr int64_t TILED_ROWS = 64;  // of x in dots: four tiles

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

// I tiles of 16 rows of x, `ld` elements apart, times `steps` of Q's tiles, added to sums [16 I,
// 16].
template <int I>
LK_INLINE void dots_tiles(const bf16* x, int64_t ld, const float* q, int64_t steps, int terms,
                          float* c, float* sums, bool fresh) {
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
    store(sums + i, fresh ? load(c + i) : add(load(sums + i), load(c + i)));
}

// Q's tiles lie [rank block, step, term], 16 pairs by 16 ranks each. Reads X from memory once, and
// again for each 16 ranks from a cache; Q once a block of rows. Tested by tests/ops.
void dots(const DotsArgs& a) {
  const int64_t blocks = (a.R + 15) / 16, steps = x_tiles(a.K), K32 = steps * X_DEPTH;
  const int terms = a.gate && a.q.dtype == DType::bf16 ? 2 : terms_of(a.q.dtype);
  const bool small = a.M * a.K * a.R < SMALL;
  const int64_t packs = (steps + 3) / 4, teams = small ? 1 : min(a.threads, packs * blocks);
  // Blocks of four tiles of rows, or of one where threads would have nothing to do.
  const bool few = a.M < TILED_ROWS * a.threads;
  const int64_t height = few ? X_ROWS : TILED_ROWS, row_blocks = (a.M + height - 1) / height;
  const int64_t chunks = small ? 1 : min(a.threads, row_blocks);
  const Philox generator = philox(a.dropout);
  const int64_t q_floats = blocks * steps * terms * TILE_WORDS, pack_depth = 4 * X_DEPTH;
  const int64_t team_floats = pack_depth * 16 + staging_floats(16, pack_depth);
  const int64_t kept_floats = height * (K32 + 64) / 2, chunk_floats = kept_floats + 2 * 64 * 16;
  Scratch scratch((q_floats + teams * team_floats + chunks * chunk_floats) * 4);
  float* const tiles = static_cast<float*>(scratch.data);
  float* const team = tiles + q_floats;
  float* const rows = team + teams * team_floats;

  parallel(a.threads, teams, [&](int64_t t) {
    float* const wide = team + t * team_floats;
    for (int64_t i = packs * blocks * t / teams; i < packs * blocks * (t + 1) / teams; ++i) {
      const int64_t r0 = i / packs * 16, s0 = i % packs * 4, k0 = s0 * X_DEPTH;
      const int64_t depth = min(pack_depth, a.K - k0), s1 = min(s0 + 4, steps);
      const Matrix q{
          .data = static_cast<const char*>(a.q.data) + k0 * a.q.row * bytes_of(a.q.dtype),
          .dtype = a.q.dtype,
          .row = a.q.row,
          .col = a.q.col};
      pack(q, depth, r0, min(16, a.R - r0), 16, 1.0f, a.gate ? a.gate + k0 : nullptr, nullptr, wide,
           16, wide + pack_depth * 16);
      for (int64_t k = round_up(depth, 4); k < (s1 - s0) * X_DEPTH; ++k)
        store(wide + k * 16, zero());
      for (int64_t pair = 0; pair < (s1 - s0) * 16; ++pair) {
        vf even = load(wide + pair * 32), odd = load(wide + pair * 32 + 16);
        float* to =
            tiles + ((r0 / 16 * steps + s0 + pair / 16) * terms) * TILE_WORDS + pair % 16 * 16;
        for (int term = 0; term < terms; ++term, to += TILE_WORDS) next_term(even, odd, to);
      }
    }
  });

  const bf16* const x = static_cast<const bf16*>(a.x.data);
  const int64_t span = SPAN / X_DEPTH * (terms > 2 ? 1 : 4);
  parallel(a.threads, chunks, [&](int64_t chunk) {
    const Tiles registers;
    bf16* const kept = reinterpret_cast<bf16*>(rows + chunk * chunk_floats);
    float* const sums = rows + chunk * chunk_floats + kept_floats;
    float* const c = sums + 64 * 16;
    for (int64_t row_block = row_blocks * chunk / chunks;
         row_block < row_blocks * (chunk + 1) / chunks; ++row_block) {
      const int64_t m0 = row_block * height, count = min(height, a.M - m0);
      const bf16* from = x + m0 * a.x.row;
      int64_t ld = a.x.row;
      if (a.dropout.rng || count < height || a.K < K32) {
        ld = round_up(K32, 64);
        for (int64_t i = 0; i < height; ++i)
          copy_kept(from + min(i, count - 1) * a.x.row, kept + i * ld, i < count ? a.K : 0, ld,
                    a.dropout.rng ? &generator : nullptr, m0 + min(i, count - 1), 0);
        from = kept;
      }
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t s = 0; s < steps; s += span) {
          const float* const q = tiles + (block * steps + s) * terms * TILE_WORDS;
          const int64_t n = min(span, steps - s);
          if (few)
            dots_tiles<1>(from + s * X_DEPTH, ld, q, n, terms, c, sums, s == 0);
          else
            dots_tiles<4>(from + s * X_DEPTH, ld, q, n, terms, c, sums, s == 0);
        }
        const int rest = (int)min(16, a.R - block * 16);
        for (int64_t i = 0; i < count; ++i)
          store_n(a.out + (m0 + i) * a.ld + block * 16, mul(load(sums + i * 16), splat(a.scale)),
                  rest);
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

// A thread has its own columns, so that no sum crosses threads; rows pass in blocks of SPAN.
// 64 columns of a block are laid in pairs, from L2, for all ranks. then(n0, n1) has a thread's sums
// of 64 columns at a time. Reads X once. Tested by tests/ops.
template <typename Then>
LK_INLINE void outers(const OutersArgs& a, const Then& then) {
  const int64_t blocks = (a.R + 15) / 16, steps = (a.M + 31) / 32, panels = (a.N + 63) / 64;
  const int64_t tile = X_TILE * a.terms, R16 = blocks * 16, R4 = round_up(a.R, 4);
  const bool small = a.M * a.N * a.R < SMALL;
  const int64_t teams = small ? 1 : min(a.threads, steps),
                chunks = small ? 1 : min(a.threads, panels);
  const int64_t d_floats = steps * blocks * tile / 2;
  const int64_t team_floats = R16 * 32 + staging_floats(32, R16);
  const int64_t pair_floats = SPAN / 2 * 64, chunk_floats = pair_floats + 16 * 64 + 64;
  Scratch scratch((d_floats + teams * team_floats + chunks * chunk_floats) * 4);
  bf16* const tiles = static_cast<bf16*>(scratch.data);
  float* const team = static_cast<float*>(scratch.data) + d_floats;
  float* const own = team + teams * team_floats;
  const Philox generator = philox(a.dropout);

  parallel(a.threads, teams, [&](int64_t t) {
    float* const wide = team + t * team_floats;
    for (int64_t s = steps * t / teams; s < steps * (t + 1) / teams; ++s) {
      const Matrix q{
          .data = a.d, .dtype = DType::f32, .row = 1, .col = a.ld_d};  // its rows are ranks
      pack(q, a.R, s * 32, min(32, a.M - s * 32), 32, 1.0f, nullptr, nullptr, wide, 32,
           wide + R16 * 32);
      for (int64_t r = R4; r < R16; ++r)
        store(wide + r * 32, zero()), store(wide + r * 32 + 16, zero());
      for (int64_t r = 0; r < R16; ++r) {
        row_terms(load(wide + r * 32), load(wide + r * 32 + 16), a.terms,
                  tiles + (s * blocks + r / 16) * tile + r % 16 * 32);
      }
    }
  });

  const bf16* const x = static_cast<const bf16*>(a.x.data);
  parallel(a.threads, chunks, [&](int64_t chunk) {
    const Tiles registers;
    float* const pairs = own + chunk * chunk_floats;
    float* const c = pairs + pair_floats;
    bf16* const kept = reinterpret_cast<bf16*>(c + 16 * 64);  // two rows
    const int64_t first = panels * chunk / chunks, last = panels * (chunk + 1) / chunks;
    for (int64_t m0 = 0; m0 < steps * 32; m0 += SPAN)
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t n0 = panel * 64, count = min(64, a.N - n0);
        const int64_t depth = min(SPAN, steps * 32 - m0);
        for (int64_t j = 0; j < depth; j += 2) {
          const bf16* row[2] = {x, nullptr};
          const int64_t left = m0 + j < a.M ? count : 0;
          for (int64_t i = 0; i < 2 && m0 + j + i < a.M; ++i) {
            row[i] = x + (m0 + j + i) * a.x.row + n0;
            __builtin_prefetch(row[i] + 64, 0, 2), __builtin_prefetch(row[i] + 96, 0, 2);
            if (!a.dropout.rng) continue;
            copy_kept(row[i], kept + i * 64, count, 64, &generator, m0 + j + i, n0);
            row[i] = kept + i * 64;
          }
          float* const to = pairs + j / 2 * 64;
          interleave(row[0], row[1], min(32, left), to);
          interleave(row[0] + 32, row[1] ? row[1] + 32 : nullptr, max(0, left - 32), to + 32);
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
              float* const to = a.sums + (panel * R16 + block * 16 + r) * 64 + n;
              store(to, m0 ? add(load(to), load(c + r * 64 + n)) : load(c + r * 64 + n));
            }
        }
      }
    for (int64_t panel = first; panel < last; ++panel) then(panel * 64, min(panel * 64 + 64, a.N));
  });
}

// The kernels -----------------------------------------------------------------------------------

LK_INLINE bool for_tiles(const Matrix& x, int64_t M, int64_t R) {
  return x.dtype == DType::bf16 && x.col == 1 && M >= THIN_ROWS && R > 0;
}

// As `shrink`; Q = Aᵀ.
void shrink_tiles(const ShrinkArgs& a) {
  if (!for_tiles(a.x, a.M, a.R)) return kernels_avx512bf16.shrink(a);
  dots({.x = a.x,
        .q = {.data = a.a.data, .dtype = a.a.dtype, .row = 1, .col = a.a.row},
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

// As `backward_pair`, but dY is read once for dS, once for dB, which have other columns and rows of
// it, and once more where the bias or the column scale trains.
void backward_pair_tiles(const BackwardPairArgs& a) {
  if (!for_tiles(a.dy, a.M, a.R)) return kernels_avx512bf16.backward_pair(a);
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
    BackwardPairArgs rest = a;
    rest.ds = nullptr;
    rest.db = nullptr;
    kernels_avx512bf16.backward_pair(rest);
  }
}

// As `grad_a`.
void grad_a_tiles(const GradAArgs& a) {
  if (!for_tiles(a.x, a.M, a.R)) return kernels_avx512bf16.grad_a(a);
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
           with_type(a.da_dtype, [&](auto type) {
             using T = decltype(type);
             for (int64_t r = 0; r < a.R; ++r)
               for (int64_t k = k0; k < k1; k += W)
                 store_n(static_cast<T*>(a.da) + r * a.K + k,
                         load(sums + k0 * R16 + r * 64 + k - k0), (int)min(W, k1 - k));
           });
         });
}

// As `expand`, by 32 rows of y and 64 columns, along y's rows as far as Q's tiles stay in L2.
void expand_tiles(const ExpandArgs& a) {
  if (a.dtype != DType::bf16 || a.M < THIN_ROWS || !a.R) return kernels_avx512bf16.expand(a);
  const int64_t blocks = (a.R + 15) / 16, R16 = blocks * 16;
  const int64_t groups = (a.M + 31) / 32, panels = (a.N + VW - 1) / VW;
  const bool small = a.M * a.N * a.R < SMALL;
  const int64_t chunks = small ? 1 : min(a.threads, groups),
                teams = small ? 1 : min(a.threads, panels);
  const int terms = a.q.dtype == DType::bf16 ? 1 : 2;
  const Philox generator = philox(a.dropout);
  const int64_t q_floats = R16 * VW * terms, together = max(1, (1 << 15) / q_floats);
  const int64_t team_floats = R16 * VW + staging_floats(VW, a.R);
  const int64_t chunk_floats = 2 * blocks * TILE_WORDS + 2 * X_ROWS * VW;
  Scratch scratch((panels * q_floats + teams * team_floats + chunks * chunk_floats) * 4);
  float* const q = static_cast<float*>(scratch.data);
  float* const team = q + panels * q_floats;
  float* const own = team + teams * team_floats;
  parallel(a.threads, teams, [&](int64_t t) {
    for (int64_t i = panels * t / teams; i < panels * (t + 1) / teams; ++i)
      pack_twice(a, i * VW, terms, team + t * team_floats, q + i * q_floats);
  });
  parallel(a.threads, chunks, [&](int64_t chunk) {
    const Tiles registers;
    float* const C = own + chunk * chunk_floats;
    float* const s = C + 2 * X_ROWS * VW;
    bf16* const y = static_cast<bf16*>(a.y);
    for (int64_t i0 = 0; i0 < panels; i0 += together)
      for (int64_t group = groups * chunk / chunks; group < groups * (chunk + 1) / chunks;
           ++group) {
        const int64_t m0 = group * 2 * X_ROWS, m1 = min(m0 + 2 * X_ROWS, a.M);
        split_rows(a, m0, blocks, s);
        for (int64_t i = i0; i < min(i0 + together, panels); ++i) {
          const int64_t n = i * VW, n1 = min(n + VW, a.N);
          for (int64_t half = 0; half < VW; half += 2 * W) {
            load_sums(nullptr, 0, 0, 0, false);
            rank_2x2(s, q + i * q_floats + half, blocks, terms);
            store_sums(C + half, W, X_ROWS * VW, LD_C);
          }
          for (int64_t m = m0; m < m1; m += Y_ROWS) {
            const int64_t count = min(Y_ROWS, m1 - m);
            for (int64_t j = 0; j < count; ++j) {  // the same rows' next columns
              __builtin_prefetch(y + (m + j) * a.ldy + n + VW, 1);
              __builtin_prefetch(y + (m + j) * a.ldy + n + VW + 32, 1);
            }
            vf acc[Y_ROWS][V];
            LK_UNROLL for (int j = 0; j < Y_ROWS; ++j) LK_UNROLL for (int v = 0; v < V; ++v)
                acc[j][v] = load(C + min(m - m0 + j, 31) * VW + v * W);
            if (a.dropout.rng) {
              uint64_t bits[Y_ROWS] = {};
              for (int64_t j = 0; j < count; ++j) bits[j] = keep64(generator, m + j, n);
              mask_tile(bits, 0, acc);
            }
            const auto held = [&](int j, int v, int rest) {
              const bf16* from = y + (m + j) * a.ldy + n + v * W;
              return rest == W ? load(from) : load_n(from, rest);
            };
            finish_tile<bf16>(a, m, count, n, n1, acc, held);
          }
        }
      }
  });
}

// As `few_rows`. Intel's processors take as long for a pair of bf16 as for two elements of float32.
void few_rows_widened(const FewRowsArgs& a) {
  FewRowsArgs widened = a;
  widened.pairs = false;
  kernels_avx512bf16.few_rows(widened);
}

}  // namespace
}  // namespace lora_kernels
