#pragma once
// The fused GEMM in the tile registers of AMX: eight registers of 16 rows by 64 bytes. Follows
// product_impl.h.
//
// One instruction multiplies a tile of x (16 rows, 32 bf16 of the sum) by a tile of W (16 pairs, 16
// columns) and adds to 16 x 16 sums in float32. Subnormals count as zero. A float32 is split into
// three bf16 terms, whose sum it is. Of the nine products of two such elements the three smallest,
// under 2^-26 of the whole, are left out.

namespace lora_kernels {
namespace {

constexpr int64_t X_ROWS = 16, X_DEPTH = 32;      // in a tile of x
constexpr int64_t X_TILE = X_ROWS * X_DEPTH;      // elements
constexpr int64_t TILE_WORDS = 16 * 16;           // words of a tile: pairs of W's elements, or sums
constexpr int LD_X = X_DEPTH * 2, LD_C = VW * 4;  // bytes from row to row
constexpr int64_t GROUP_ROWS = 2 * X_ROWS;        // rows of x that are multiplied together
constexpr int64_t MIN_TILE_ROWS = 32;             // least rows of x that fill a tile of S
constexpr int64_t X_L2_BYTES = 1 << 20;           // of x in tiles, which stay in L2
constexpr int64_t SUM_DEPTH = 1024;     // elements of the sum in X_L2_BYTES if x is larger
constexpr int64_t L1_DEPTH = 640;       // elements of the sum for which 32 columns of W stay in L1
constexpr int64_t TASK_COLUMNS = 4096;  // columns whose sums wait for the next SUM_DEPTH

// Configures all eight registers at full size; restores the configuration before it at the end.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(before_);
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64, "the processor's layout");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_loadconfig(before_); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// Returns v minus the bf16 in the low halves of `terms`; zero where a term is not finite, since
// infinity minus infinity is NaN.
LK_INLINE vf residual(vf v, __m512i terms) {
  const vf term = _mm512_castsi512_ps(_mm512_slli_epi32(terms, 16));
  return _mm512_maskz_sub_ps((__mmask16)~_mm512_fpclass_ps_mask(term, 0x99), v, term);
}

// dst = words of `even` and `odd` rounded to bf16; `even` and `odd` keep the residuals.
LK_INLINE void split_term(vf& even, vf& odd, float* dst) {
  store_words(dst, even, odd, bf16x2{});
  const __m512i terms = _mm512_castps_si512(load(dst));
  even = residual(even, terms);
  odd = residual(odd, _mm512_srli_epi32(terms, 16));
}

// Splits a row of 32 elements into `terms` tiles, whose bf16 sum to it.
LK_INLINE void split_row(vf first, vf second, int terms, bf16* dst) {
  for (int term = 0; term < terms; ++term, dst += X_TILE) {
    const __m256i first_bf16 = narrow_bf16(first), second_bf16 = narrow_bf16(second);
    _mm512_storeu_si512(dst,
                        _mm512_inserti64x4(_mm512_castsi256_si512(first_bf16), second_bf16, 1));
    first = residual(first, _mm512_cvtepu16_epi32(first_bf16));
    second = residual(second, _mm512_cvtepu16_epi32(second_bf16));
  }
}

// Packs x [M, K] into tiles, in order of K and then of M; zeros beyond both. M is rounded up to a
// multiple of `rows`. A float32 has three tiles, one a term.
LK_INLINE int64_t x_tiles(int64_t K) { return (K + X_DEPTH - 1) / X_DEPTH; }
LK_INLINE void pack_x_row(const bf16* src, int64_t count, bf16* dst) {
  _mm512_storeu_si512(dst,
                      _mm512_maskz_loadu_epi16(count >= X_DEPTH ? ~0u : (1u << count) - 1, src));
}
LK_INLINE void pack_x_row(const float* src, int64_t count, bf16* dst) {
  split_row(load_n(src, (int)min(W, count)), load_n(src + W, (int)max(0, min(W, count - W))), 3,
            dst);
}
template <typename T>
LK_INLINE void pack_x(const T* x, int64_t ld, int64_t M, int64_t K, int64_t rows, bf16* dst) {
  constexpr int64_t tiles = sizeof(T) == 4 ? 3 : 1;
  for (int64_t m = 0; m < round_up(M, rows); m += X_ROWS)
    for (int64_t k = 0; k < K; k += X_DEPTH, dst += tiles * X_TILE)
      for (int64_t i = 0; i < X_ROWS; ++i)
        pack_x_row(x + min(m + i, M - 1) * ld + k, m + i < M ? min(X_DEPTH, K - k) : 0,
                   dst + i * X_DEPTH);
}

// Registers 0 to 3 are a 2 x 2 group of tiles of sums, or 1 x 4 if row_stride is 2 column_stride.
// `ld`: bytes between rows.
//   register 0  c                 register 1  c + column_stride
//   register 2  c + row_stride    register 3  c + row_stride + column_stride
// They start from zero unless `accumulates`.
LK_INLINE void load_sums(const float* c, int64_t column_stride, int64_t row_stride, int ld,
                         bool accumulates) {
  if (accumulates) {
    _tile_loadd(0, c, ld);
    _tile_loadd(1, c + column_stride, ld);
    _tile_loadd(2, c + row_stride, ld);
    _tile_loadd(3, c + row_stride + column_stride, ld);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}
LK_INLINE void store_sums(float* c, int64_t column_stride, int64_t row_stride, int ld) {
  _tile_stored(0, c, ld);
  _tile_stored(1, c + column_stride, ld);
  _tile_stored(2, c + row_stride, ld);
  _tile_stored(3, c + row_stride + column_stride, ld);
}

// The rank update's factors ----------------------------------------------------------------------

// A word of S is the two bf16 terms of an element; a word of Q is one bf16 twice.

// Packs S of 32 rows.
LK_INLINE void split_rows(const ExpandArgs& a, int64_t m0, int64_t blocks, float* dst) {
  for (int64_t m = m0; m < m0 + GROUP_ROWS; ++m)
    for (int64_t block = 0; block < blocks; ++block) {
      const int valid = m < a.M ? (int)min(16, a.R - block * 16) : 0;
      vf v = load_n(a.s + min(m, a.M - 1) * a.lds + block * 16, valid);
      v = mul(v, splat(a.alpha));
      if (a.gate) v = mul(v, load_n(a.gate + block * 16, valid));
      const __m512i high = _mm512_cvtepu16_epi32(narrow_bf16(v));
      const __m512i low = _mm512_cvtepu16_epi32(narrow_bf16(residual(v, high)));
      store(dst + ((m - m0) / X_ROWS * blocks + block) * TILE_WORDS + m % X_ROWS * 16,
            _mm512_castsi512_ps(_mm512_or_si512(high, _mm512_slli_epi32(low, 16))));
    }
}

// Packs Q[0 .. R up to 16, n0 .. n0 + 64), one term after another.
LK_INLINE void pack_duplicated(const ExpandArgs& a, int64_t n0, int terms, float* panel,
                               float* dst) {
  const int64_t R4 = round_up(a.R, 4), R16 = round_up(a.R, 16);
  pack(a.q, a.R, n0, min(VW, a.N - n0), VW, 1.0f, nullptr, nullptr, panel, VW, panel + R16 * VW);
  for (int64_t i = 0; i < R16 * VW; i += W) {
    vf remainder = i < R4 * VW ? load(panel + i) : zero();
    for (int term = 0; term < terms; ++term) {
      const __m512i word = _mm512_cvtepu16_epi32(narrow_bf16(remainder));
      store(dst + term * R16 * VW + i,
            _mm512_castsi512_ps(_mm512_or_si512(word, _mm512_slli_epi32(word, 16))));
      remainder = residual(remainder, word);
    }
  }
}

// Registers 0 to 3 += S of 32 rows times 32 columns of Q.
LK_INLINE void rank_2x2(const float* s, const float* q, int64_t blocks, int terms) {
  for (int64_t block = 0; block < blocks; ++block) {
    _tile_loadd(4, s + block * TILE_WORDS, LD_X);
    _tile_loadd(5, s + (block + blocks) * TILE_WORDS, LD_X);
    for (int term = 0; term < terms; ++term) {
      const float* const words = q + (term * blocks + block) * 16 * VW;
      _tile_loadd(6, words, LD_C);
      _tile_loadd(7, words + W, LD_C);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// The GEMM ---------------------------------------------------------------------------------------

// Registers 0 to 3 += two rows of tiles of x, x_stride elements apart, times two columns of W's
// tiles, w_stride words apart, over `steps` tiles. W's tiles come from L1; x's bypass it, since
// they are read once. Of three terms, the small products are added first, so that the sum is
// rounded at full size as often as a float32 sum.
template <int TERMS>
LK_INLINE void tiles_2x2(const bf16* x, int64_t x_stride, int64_t steps, const float* w,
                         int64_t w_stride) {
#define LK_X(term)                                   \
  _tile_stream_loadd(4, xs + (term) * X_TILE, LD_X); \
  _tile_stream_loadd(5, xs + x_stride + (term) * X_TILE, LD_X);
#define LK_W(term)                                \
  _tile_loadd(6, ws + (term) * TILE_WORDS, LD_X); \
  _tile_loadd(7, ws + w_stride + (term) * TILE_WORDS, LD_X);
#define LK_MULTIPLY        \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7);
  const bf16* xs = x;
  const float* ws = w;
  if constexpr (TERMS == 3)
    for (int64_t s = 0; s < steps; ++s, xs += TERMS * X_TILE, ws += TERMS * TILE_WORDS) {
      LK_X(0)
      LK_W(2)
      LK_MULTIPLY LK_W(1) LK_MULTIPLY LK_X(1) LK_MULTIPLY LK_W(0) LK_MULTIPLY LK_X(2) LK_MULTIPLY
    }
  xs = x;
  ws = w;
  for (int64_t s = 0; s < steps; ++s, xs += TERMS * X_TILE, ws += TERMS * TILE_WORDS) {
    LK_X(0) LK_W(0) LK_MULTIPLY
  }
#undef LK_X
#undef LK_W
#undef LK_MULTIPLY
}

// tiles_2x2 for one row of tiles of x and four columns of W's tiles.
template <int TERMS>
LK_INLINE void tiles_1x4(const bf16* x, int64_t steps, const float* w, int64_t w_stride) {
#define LK_X(term) _tile_loadd(4, xs + (term) * X_TILE, LD_X);
#define LK_MULTIPLY(term)                                        \
  _tile_loadd(5, ws + (term) * TILE_WORDS, LD_X);                \
  _tile_loadd(6, ws + w_stride + (term) * TILE_WORDS, LD_X);     \
  _tile_dpbf16ps(0, 4, 5);                                       \
  _tile_dpbf16ps(1, 4, 6);                                       \
  _tile_loadd(5, ws + 2 * w_stride + (term) * TILE_WORDS, LD_X); \
  _tile_loadd(6, ws + 3 * w_stride + (term) * TILE_WORDS, LD_X); \
  _tile_dpbf16ps(2, 4, 5);                                       \
  _tile_dpbf16ps(3, 4, 6);
  const bf16* xs = x;
  const float* ws = w;
  if constexpr (TERMS == 3)
    for (int64_t s = 0; s < steps; ++s, xs += TERMS * X_TILE, ws += TERMS * TILE_WORDS) {
      LK_X(0)
      LK_MULTIPLY(2) LK_MULTIPLY(1) LK_X(1) LK_MULTIPLY(1) LK_MULTIPLY(0) LK_X(2) LK_MULTIPLY(0)
    }
  xs = x;
  ws = w;
  for (int64_t s = 0; s < steps; ++s, xs += TERMS * X_TILE, ws += TERMS * TILE_WORDS) {
    LK_X(0) LK_MULTIPLY(0)
  }
#undef LK_X
#undef LK_MULTIPLY
}

// Sums of a group of rows and VW columns, in this order of tiles:
//                 columns 0 ..  16 ..  32 ..  48 ..
//   rows 0 ..             0      2      4      6
//   rows 16 ..            1      3      5      7
constexpr int64_t SUMS = GROUP_ROWS * VW, RIGHT = 2 * TILE_WORDS, BELOW = TILE_WORDS;
LK_INLINE float* sum_at(float* c, int64_t row, int64_t v) {
  return c + v * RIGHT + row / X_ROWS * BELOW + row % X_ROWS * W;
}

// A slab of W: the elements [k, k + depth) of the sum by the columns [n, n + width). It is packed
// into columns of tiles of the whole depth, one after another; zeros beyond both.
struct Slab {
  int64_t k, depth, n, width;
};

// True if W is contiguous along its columns n, as for dx.
LK_INLINE bool is_n_contiguous(const GemmArgs& a) {
  return a.codes ? !a.is_transposed : a.w.col_stride == 1;
}

// Packs a slab of W. If W is contiguous along n, one row of tiles at a time, since rows may lie
// pages apart.
LK_INLINE void pack_slab(const GemmArgs& a, const Slab& slab, float* dst, float* decoded) {
  const int64_t columns = min(slab.width, a.update.N - slab.n);
  const int64_t step = is_n_contiguous(a) ? X_DEPTH : slab.depth;
  const PanelLayout layout{W, x_tiles(slab.depth) * TILE_WORDS};
  if (slab.depth % X_DEPTH)
    for (int64_t n = 0; n < slab.width; n += W)
      for (int64_t i = layout.vector_stride - TILE_WORDS; i < layout.vector_stride; i += W)
        store(dst + n / W * layout.vector_stride + i, zero());
  for (int64_t k = 0; k < slab.depth; k += step)
    for (int64_t n = 0; n < columns; n += VW) {
      const int64_t depth = min(step, slab.depth - k), count = min(VW, columns - n);
      float* const panel = dst + n / W * layout.vector_stride + k / 2 * W;
      if (a.codes)
        pack_codes<bf16x2>(*a.codes, a.is_transposed, slab.k + k, depth, slab.n + n, count, panel,
                           layout, decoded);
      else
        pack_words<bf16x2, bf16>(a.w, slab.k + k, depth, slab.n + n, count, panel, layout);
    }
}

// pack_slab for float32, whose elements have three tiles. `decoded` has room for SPLIT_DEPTH more
// rows.
constexpr int64_t SPLIT_DEPTH = 128;
LK_INLINE void pack_slab_terms(const GemmArgs& a, const Slab& slab, float* dst, float* decoded) {
  const int64_t columns = min(slab.width, a.update.N - slab.n);
  const int64_t w_stride = x_tiles(slab.depth) * 3 * TILE_WORDS;
  const int64_t step = is_n_contiguous(a) ? X_DEPTH : SPLIT_DEPTH;
  float* const panel = decoded + SPLIT_DEPTH * VW;
  for (int64_t k = 0; k < slab.depth; k += step)
    for (int64_t n = 0; n < columns; n += VW) {
      const int64_t depth = min(step, slab.depth - k), count = min(VW, columns - n);
      if (a.codes)
        pack_codes<float>(*a.codes, a.is_transposed, slab.k + k, depth, slab.n + n, count, panel,
                          PanelLayout{}, decoded);
      else
        pack_words<float, float>(a.w, slab.k + k, depth, slab.n + n, count, panel, PanelLayout{});
      for (int64_t i = depth * VW; i < round_up(depth, X_DEPTH) * VW; i += W)
        store(panel + i, zero());
      for (int64_t v = 0; v < V; ++v) {
        float* const column = dst + (n / W + v) * w_stride + k / X_DEPTH * 3 * TILE_WORDS;
        for (int64_t pair = 0; pair < x_tiles(depth) * 16; ++pair) {
          vf even = load(panel + 2 * pair * VW + v * W),
             odd = load(panel + (2 * pair + 1) * VW + v * W);
          float* const words = column + pair / 16 * 3 * TILE_WORDS + pair % 16 * W;
          for (int term = 0; term < 3; ++term) split_term(even, odd, words + term * TILE_WORDS);
        }
      }
    }
}

// The blocking of a GEMM whose elements have TERMS bf16: a task is `rows` of x by some panels of
// `width` columns. It passes over `depth` elements of the sum at a time.
template <int TERMS>
struct Blocking {
  int64_t depth_blocks, depth, rows, width, slab_depth, panels, column_blocks, tasks, chunks;

  explicit Blocking(const GemmArgs& a) {
    const ExpandArgs& u = a.update;
    const bool is_serial = u.M * u.N * a.K < MIN_PARALLEL_WORK;
    const int64_t threads = is_serial ? 1 : u.threads;
    const bool fits = round_up(u.M, GROUP_ROWS) * round_up(a.K, 128) * 2 * TERMS <= X_L2_BYTES;
    depth_blocks = fits ? 1 : (a.K * TERMS + SUM_DEPTH - 1) / SUM_DEPTH;
    // Codes are transposed 128 at a time.
    depth = round_up((a.K + depth_blocks - 1) / depth_blocks, 128);
    slab_depth = min(depth, TERMS > 1 ? 384 : is_n_contiguous(a) ? 512 : 1024);
    width = !is_n_contiguous(a) ? VW : TERMS > 1 || u.N < 2048 ? 2 * VW : 4 * VW;
    while (width > VW && u.N < width * threads) width /= 2;
    panels = (u.N + width - 1) / width;
    // Each block of rows packs all of W, so there are as few as fit. But every thread has a task,
    // and with several blocks all threads have equally many.
    const int64_t max_rows =
        max(GROUP_ROWS, X_L2_BYTES / (2 * TERMS * depth) / GROUP_ROWS * GROUP_ROWS);
    int64_t blocks = max((u.M + max_rows - 1) / max_rows, (threads + panels - 1) / panels);
    if (blocks > threads) blocks = round_up(blocks, threads);
    rows = round_up((u.M + blocks - 1) / blocks, GROUP_ROWS);
    blocks = (u.M + rows - 1) / rows;
    column_blocks = (panels * width + TASK_COLUMNS - 1) / TASK_COLUMNS;
    while (column_blocks < panels && blocks * column_blocks % threads) ++column_blocks;
    depth_blocks = (a.K + depth - 1) / depth;
    tasks = blocks * column_blocks;
    chunks = min(threads, tasks);
  }
};

// gemm_of for bf16 (one term) or float32 (three). The rank update runs in tiles before the base
// GEMM, with two exceptions: y in float32 would show that S has two terms only, and few rows of x
// would leave tiles empty. Tested by tests/ops.
template <int TERMS>
struct TileGemm {
  using Element = std::conditional_t<TERMS == 3, float, bf16>;
  const GemmArgs& a;
  const ExpandArgs& u = a.update;
  const Blocking<TERMS> blocking{a};
  const bool is_rank_tiled = TERMS == 1 && u.dtype == DType::bf16 && u.R && u.M >= MIN_TILE_ROWS;
  const bool has_dropout = is_rank_tiled && u.dropout.rng;
  const Philox generator = make_philox(u.dropout);
  const int64_t blocks = (u.R + 15) / 16, groups = blocking.rows / GROUP_ROWS, R16 = blocks * 16;
  const int terms = u.q.dtype == DType::bf16 ? 1 : 2;
  // Floats of each region of a thread's scratch memory.
  const int64_t x_floats = blocking.rows * blocking.depth / 2 * TERMS,
                w_floats = blocking.slab_depth / 2 * blocking.width * TERMS;
  const int64_t q_floats = is_rank_tiled ? R16 * VW * terms : round_up(u.R, 4) * VW;
  const int64_t panel_q_floats = blocking.width / VW * q_floats;
  const int64_t staging_size = R16 * VW + round_up(staging_floats(VW, u.R), W);
  const int64_t s_floats = 2 * blocks * TILE_WORDS,
                all_s_floats = is_rank_tiled ? groups * s_floats : 0;
  const int64_t panel_sums = blocking.width / VW * groups * SUMS;
  const int64_t waiting_panels =
      blocking.depth_blocks > 1
          ? (blocking.panels + blocking.column_blocks - 1) / blocking.column_blocks
          : 1;
  const int64_t decoded_floats = TERMS == 3 ? 2 * SPLIT_DEPTH * VW + SUMS
                                 : a.codes  ? blocking.slab_depth * VW
                                            : 0;
  const int64_t chunk_floats = x_floats + w_floats + panel_q_floats + staging_size + all_s_floats +
                               waiting_panels * panel_sums + decoded_floats;

  // c = mask(S Q) for a group of rows by VW columns.
  void masked_sums(int64_t m, int64_t m1, int64_t n, const float* s, const float* q,
                   float* c) const {
    for (int64_t v = 0; v < V; v += 2) {
      load_sums(nullptr, 0, 0, 0, false);
      rank_2x2(s, q + v * W, blocks, terms);
      store_sums(sum_at(c, 0, v), RIGHT, BELOW, LD_X);
    }
    for (int64_t i = 0; i < min(GROUP_ROWS, m1 - m); ++i) {
      const uint64_t bits = dropout_bits64(generator, m + i, n);
      for (int64_t v = 0; v < V; ++v)
        store(sum_at(c, i, v), mask_lanes(load(sum_at(c, i, v)), bits >> v * W));
    }
  }

  // Prefetches the lines of y that a group's sums will be written to; they lie pages apart.
  void prefetch_y(int64_t m, int64_t m1, int64_t n) const {
    const int64_t bytes = u.dtype == DType::f32 ? 4 : 2;
    for (int64_t i = m; i < min(m1, m + GROUP_ROWS); ++i)
      for (int64_t byte = 0; byte < VW * bytes; byte += 64)
        __builtin_prefetch(static_cast<char*>(u.y) + (i * u.ldy + n) * bytes + byte, 1);
  }

  // Writes a group's sums of VW columns to y.
  void epilogue(int64_t m, int64_t m1, int64_t n, const float* q, float* c) const {
    for (int64_t i = m; i < min(m1, m + GROUP_ROWS); i += Y_ROWS) {
      const int64_t count = min(Y_ROWS, m1 - i), n1 = min(n + VW, u.N);
      vf acc[Y_ROWS][V];
      if (is_rank_tiled)
        LK_UNROLL for (int j = 0; j < Y_ROWS; ++j) LK_UNROLL for (int v = 0; v < V; ++v) acc[j][v] =
            zero();
      else
        masked_rank_tile(u, generator, i, count, n, q, acc);
      const auto sum = [&](int j, int v, int = W) { return load(sum_at(c, i - m + j, v)); };
      dispatch_dtype(
          u.dtype, [&](auto type) { epilogue_tile<decltype(type)>(u, i, count, n, n1, acc, sum); });
    }
  }

  // Adds x[m0 .. m1, k0 .. k1) times a panel of columns to `sums`. Writes y after the last k.
  void run_panel(int64_t m0, int64_t m1, int64_t k0, int64_t k1, int64_t n0, const bf16* x,
                 float* w, float* q, float* staging, const float* s, float* sums,
                 float* decoded) const {
    const int64_t n1 = min(n0 + blocking.width, u.N), ld = x_tiles(k1 - k0) * TERMS * X_TILE;
    if (is_rank_tiled ? k0 == 0 : k1 == a.K)
      for (int64_t n = n0; n < n1; n += VW) {
        float* const dst = q + (n - n0) / VW * q_floats;
        if (is_rank_tiled)
          pack_duplicated(u, n, terms, staging, dst);
        else
          pack(u.q, u.R, n, min(VW, u.N - n), VW, u.alpha, u.gate, nullptr, dst, VW, staging);
      }
    for (int64_t k = k0; k < k1; k += blocking.slab_depth) {
      const Slab slab{k, min(blocking.slab_depth, k1 - k), n0, blocking.width};
      if constexpr (TERMS == 3)
        pack_slab_terms(a, slab, w, decoded);
      else
        pack_slab(a, slab, w, decoded);
      const int64_t steps = x_tiles(slab.depth), w_stride = steps * TERMS * TILE_WORDS;
      const int64_t stages = (slab.depth * TERMS + L1_DEPTH - 1) / L1_DEPTH;
      for (int64_t stage = 0; stage < stages; ++stage) {
        const int64_t s0 = steps * stage / stages, s1 = steps * (stage + 1) / stages;
        const bool is_first = k == 0 && s0 == 0, is_last = k + slab.depth == a.K && s1 == steps;
        for (int64_t n = n0; n < n1; n += 2 * W)
          for (int64_t m = m0; m < m1; m += GROUP_ROWS) {
            const int64_t group = (m - m0) / GROUP_ROWS, column = (n - n0) / VW, half = n % VW;
            float* const c = sums + (column * groups + group) * SUMS;
            const float* const s_group = s + group * s_floats;
            const float* const q_panel = q + column * q_floats;
            const bf16* const x_group =
                x + 2 * group * ld + ((k - k0) / X_DEPTH + s0) * TERMS * X_TILE;
            const float* const w_column = w + (n - n0) / W * w_stride + s0 * TERMS * TILE_WORDS;
            const bool is_full_group = is_rank_tiled || m + X_ROWS < m1;
            if (is_first && has_dropout && !half) masked_sums(m, m1, n, s_group, q_panel, c);
            // Sums of float32 are short chains, added to `c` afterwards.
            const bool accumulates = TERMS == 1 && (!is_first || has_dropout);
            float* const sum_tile =
                sum_at(TERMS == 1 ? c : decoded + 2 * SPLIT_DEPTH * VW, 0, half / W);
            if (is_last && !half) prefetch_y(m, m1, n);
            if (is_full_group) {
              load_sums(sum_tile, RIGHT, BELOW, LD_X, accumulates);
              if (is_rank_tiled && !accumulates) rank_2x2(s_group, q_panel + half, blocks, terms);
              tiles_2x2<TERMS>(x_group, ld, s1 - s0, w_column, w_stride);
              store_sums(sum_tile, RIGHT, BELOW, LD_X);
            } else if (!half) {
              load_sums(sum_tile, RIGHT, 2 * RIGHT, LD_X, accumulates);
              tiles_1x4<TERMS>(x_group, s1 - s0, w_column, w_stride);
              store_sums(sum_tile, RIGHT, 2 * RIGHT, LD_X);
            }
            if (TERMS == 3 && (is_full_group || !half)) {
              float* const dst = sum_at(c, 0, half / W);
              for (int64_t v = 0; v < (is_full_group ? 2 : 4); ++v)
                for (int64_t i = v * RIGHT; i < v * RIGHT + (is_full_group ? RIGHT : BELOW); i += W)
                  store(dst + i,
                        is_first ? load(sum_tile + i) : add(load(dst + i), load(sum_tile + i)));
            }
            if (is_last && (half || n + 2 * W >= n1)) epilogue(m, m1, n - half, q_panel, c);
          }
      }
    }
  }

  void run_task(int64_t i, float* buffer) const {
    bf16* const x = reinterpret_cast<bf16*>(buffer);
    float* const w = buffer + x_floats;
    float* const q = w + w_floats;
    float* const staging = q + panel_q_floats;
    float* const s = staging + staging_size;
    float* const sums = s + all_s_floats;
    float* const decoded = sums + waiting_panels * panel_sums;
    const int64_t m0 = i / blocking.column_blocks * blocking.rows,
                  m1 = min(u.M, m0 + blocking.rows), column_block = i % blocking.column_blocks;
    const int64_t first = blocking.panels * column_block / blocking.column_blocks,
                  last = blocking.panels * (column_block + 1) / blocking.column_blocks;
    for (int64_t m = m0; is_rank_tiled && m < m1; m += GROUP_ROWS)
      split_rows(u, m, blocks, s + (m - m0) / GROUP_ROWS * s_floats);
    for (int64_t k0 = 0; k0 < a.K; k0 += blocking.depth) {
      const int64_t k1 = min(k0 + blocking.depth, a.K);
      pack_x(static_cast<const Element*>(a.x.data) + m0 * a.x.row_stride + k0, a.x.row_stride,
             m1 - m0, k1 - k0, is_rank_tiled ? GROUP_ROWS : X_ROWS, x);
      for (int64_t p = first; p < last; ++p)
        run_panel(m0, m1, k0, k1, p * blocking.width, x, w, q, staging, s,
                  sums + (blocking.depth_blocks > 1 ? p - first : 0) * panel_sums, decoded);
    }
  }

  void run() const {
    Scratch scratch(blocking.chunks * chunk_floats * 4);
    parallel_for(u.threads, blocking.chunks, [&](int64_t chunk) {
      const Tiles registers;
      float* const buffer = static_cast<float*>(scratch.data) + chunk * chunk_floats;
      for (int64_t i = chunk; i < blocking.tasks; i += blocking.chunks) run_task(i, buffer);
    });
  }
};

void gemm_tiles(const GemmArgs& a) {
  if (!a.update.M || !a.update.N) return;
  if (a.x.dtype == DType::bf16)
    TileGemm<1>{a}.run();
  else if (a.x.dtype == DType::f32 && a.update.M >= MIN_SPLIT_ROWS)
    TileGemm<3>{a}.run();
  else
    kernels_avx512bf16.gemm(a);
}

}  // namespace
}  // namespace lora_kernels
