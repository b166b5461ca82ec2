#pragma once
// Products in the tile registers of AMX: eight of 16 rows by 64 bytes. A tile of x (16 rows, 32
// bf16 of the sum) times one of W (16 pairs, 16 columns) is added to 16 x 16 sums in float32 by one
// instruction; subnormals count as zero. A float32 is the sum of three bf16, of whose nine products
// the three smallest, under 2^-26 of the whole, are left out. Follows product_impl.h.

namespace lora_kernels {
namespace {

constexpr int64_t X_ROWS = 16, X_DEPTH = 32;      // of a tile of x
constexpr int64_t X_TILE = X_ROWS * X_DEPTH;      // elements
constexpr int64_t TILE_WORDS = 16 * 16;           // of four bytes: two of W's elements, or a sum
constexpr int LD_X = X_DEPTH * 2, LD_C = VW * 4;  // bytes from row to row
constexpr int64_t GROUP = 2 * X_ROWS;             // rows of x that are multiplied together
constexpr int64_t THIN_ROWS = 32;       // of x, from which on a tile of S is worth being filled
constexpr int64_t FLOAT_ROWS = 128;     // of x, from which on three bf16 beat float32
constexpr int64_t X_BYTES = 1 << 20;    // of x in tiles, which stay in L2
constexpr int64_t SUM_DEPTH = 1024;     // of them, where x is larger
constexpr int64_t L1_DEPTH = 640;       // of the sum while 32 columns of W stay in L1
constexpr int64_t TASK_COLUMNS = 4096;  // whose sums wait for the next SUM_DEPTH of x

// All eight registers at full size, for as long as it lives; then what was there before.
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

// v less the bf16 in the low halves of `words`; nothing of what is not finite, since infinity less
// itself would be no number.
LK_INLINE vf less(vf v, __m512i words) {
  const vf term = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  return _mm512_maskz_sub_ps((__mmask16)~_mm512_fpclass_ps_mask(term, 0x99), v, term);
}

// to[0 .. 16) = the words of even and odd rounded to bf16, which then are what that has left.
LK_INLINE void next_term(vf& even, vf& odd, float* to) {
  store_words(to, even, odd, Pair{});
  const __m512i words = _mm512_castps_si512(load(to));
  even = less(even, words);
  odd = less(odd, _mm512_srli_epi32(words, 16));
}

// A row of 32 elements in `terms` tiles, whose bf16 sum to it.
LK_INLINE void row_terms(vf first, vf second, int terms, bf16* to) {
  for (int term = 0; term < terms; ++term, to += X_TILE) {
    const __m256i one = narrow_bf16(first), two = narrow_bf16(second);
    _mm512_storeu_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(one), two, 1));
    first = less(first, _mm512_cvtepu16_epi32(one));
    second = less(second, _mm512_cvtepu16_epi32(two));
  }
}

// x [M, K] in tiles, one after another along K and then along M, which goes up to a multiple of
// `rows`; zeros beyond both. A float32 has three tiles, the bf16 whose sum it is.
LK_INLINE int64_t x_tiles(int64_t K) { return (K + X_DEPTH - 1) / X_DEPTH; }
LK_INLINE void pack_x_row(const bf16* from, int64_t count, bf16* to) {
  _mm512_storeu_si512(to,
                      _mm512_maskz_loadu_epi16(count >= X_DEPTH ? ~0u : (1u << count) - 1, from));
}
LK_INLINE void pack_x_row(const float* from, int64_t count, bf16* to) {
  row_terms(load_n(from, (int)min(W, count)), load_n(from + W, (int)max(0, min(W, count - W))), 3,
            to);
}
template <typename T>
LK_INLINE void pack_x(const T* x, int64_t ld, int64_t M, int64_t K, int64_t rows, bf16* to) {
  constexpr int64_t tiles = sizeof(T) == 4 ? 3 : 1;
  for (int64_t m = 0; m < round_up(M, rows); m += X_ROWS)
    for (int64_t k = 0; k < K; k += X_DEPTH, to += tiles * X_TILE)
      for (int64_t i = 0; i < X_ROWS; ++i)
        pack_x_row(x + min(m + i, M - 1) * ld + k, m + i < M ? min(X_DEPTH, K - k) : 0,
                   to + i * X_DEPTH);
}

// Registers 0 to 3 are the sums at c, c + right, c + next and c + next + right, whose rows are `ld`
// bytes apart; zero unless held.
LK_INLINE void load_sums(const float* c, int64_t right, int64_t next, int ld, bool held) {
  if (held) {
    _tile_loadd(0, c, ld);
    _tile_loadd(1, c + right, ld);
    _tile_loadd(2, c + next, ld);
    _tile_loadd(3, c + next + right, ld);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}
LK_INLINE void store_sums(float* c, int64_t right, int64_t next, int ld) {
  _tile_stored(0, c, ld);
  _tile_stored(1, c + right, ld);
  _tile_stored(2, c + next, ld);
  _tile_stored(3, c + next + right, ld);
}

// The rank update's factors: a word of S is a rank's two bf16, one of Q an element twice ---------

// S of 32 rows.
LK_INLINE void split_rows(const ExpandArgs& a, int64_t m0, int64_t blocks, float* to) {
  for (int64_t m = m0; m < m0 + GROUP; ++m)
    for (int64_t block = 0; block < blocks; ++block) {
      const int rest = m < a.M ? (int)min(16, a.R - block * 16) : 0;
      vf v = load_n(a.s + min(m, a.M - 1) * a.lds + block * 16, rest);
      v = mul(v, splat(a.alpha));
      if (a.gate) v = mul(v, load_n(a.gate + block * 16, rest));
      const __m512i high = _mm512_cvtepu16_epi32(narrow_bf16(v));
      const __m512i low = _mm512_cvtepu16_epi32(narrow_bf16(less(v, high)));
      store(to + ((m - m0) / X_ROWS * blocks + block) * TILE_WORDS + m % X_ROWS * 16,
            _mm512_castsi512_ps(_mm512_or_si512(high, _mm512_slli_epi32(low, 16))));
    }
}

// Q[0 .. R up to 16, n0 .. n0 + 64), term after term.
LK_INLINE void pack_twice(const ExpandArgs& a, int64_t n0, int terms, float* wide, float* to) {
  const int64_t R4 = round_up(a.R, 4), R16 = round_up(a.R, 16);
  pack(a.q, a.R, n0, min(VW, a.N - n0), VW, 1.0f, nullptr, nullptr, wide, VW, wide + R16 * VW);
  for (int64_t i = 0; i < R16 * VW; i += W) {
    vf left = i < R4 * VW ? load(wide + i) : zero();
    for (int term = 0; term < terms; ++term) {
      const __m512i word = _mm512_cvtepu16_epi32(narrow_bf16(left));
      store(to + term * R16 * VW + i,
            _mm512_castsi512_ps(_mm512_or_si512(word, _mm512_slli_epi32(word, 16))));
      left = less(left, word);
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

// The product ------------------------------------------------------------------------------------

// Registers 0 to 3 += two rows of tiles of x, `ld` elements apart, times two columns of W's tiles,
// `apart` words apart, all `steps` deep. W's come from L1, which x's, being read once, stay out of.
// Of three terms each the small products come first, so that the sum is rounded at its own size as
// often as one of float32.
template <int TERMS>
LK_INLINE void tiles_2x2(const bf16* x, int64_t ld, int64_t steps, const float* w, int64_t apart) {
#define LK_X(term)                                   \
  _tile_stream_loadd(4, xs + (term) * X_TILE, LD_X); \
  _tile_stream_loadd(5, xs + ld + (term) * X_TILE, LD_X);
#define LK_W(term)                                \
  _tile_loadd(6, ws + (term) * TILE_WORDS, LD_X); \
  _tile_loadd(7, ws + apart + (term) * TILE_WORDS, LD_X);
#define LK_PRODUCTS        \
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
      LK_PRODUCTS LK_W(1) LK_PRODUCTS LK_X(1) LK_PRODUCTS LK_W(0) LK_PRODUCTS LK_X(2) LK_PRODUCTS
    }
  xs = x;
  ws = w;
  for (int64_t s = 0; s < steps; ++s, xs += TERMS * X_TILE, ws += TERMS * TILE_WORDS) {
    LK_X(0) LK_W(0) LK_PRODUCTS
  }
#undef LK_X
#undef LK_W
#undef LK_PRODUCTS
}

// The same of one row of tiles of x and four columns of W's.
template <int TERMS>
LK_INLINE void tiles_1x4(const bf16* x, int64_t steps, const float* w, int64_t apart) {
#define LK_X(term) _tile_loadd(4, xs + (term) * X_TILE, LD_X);
#define LK_PRODUCTS(term)                                     \
  _tile_loadd(5, ws + (term) * TILE_WORDS, LD_X);             \
  _tile_loadd(6, ws + apart + (term) * TILE_WORDS, LD_X);     \
  _tile_dpbf16ps(0, 4, 5);                                    \
  _tile_dpbf16ps(1, 4, 6);                                    \
  _tile_loadd(5, ws + 2 * apart + (term) * TILE_WORDS, LD_X); \
  _tile_loadd(6, ws + 3 * apart + (term) * TILE_WORDS, LD_X); \
  _tile_dpbf16ps(2, 4, 5);                                    \
  _tile_dpbf16ps(3, 4, 6);
  const bf16* xs = x;
  const float* ws = w;
  if constexpr (TERMS == 3)
    for (int64_t s = 0; s < steps; ++s, xs += TERMS * X_TILE, ws += TERMS * TILE_WORDS) {
      LK_X(0)
      LK_PRODUCTS(2) LK_PRODUCTS(1) LK_X(1) LK_PRODUCTS(1) LK_PRODUCTS(0) LK_X(2) LK_PRODUCTS(0)
    }
  xs = x;
  ws = w;
  for (int64_t s = 0; s < steps; ++s, xs += TERMS * X_TILE, ws += TERMS * TILE_WORDS) {
    LK_X(0) LK_PRODUCTS(0)
  }
#undef LK_X
#undef LK_PRODUCTS
}

// Sums of a group of rows and VW columns lie in tiles, two a column of tiles.
constexpr int64_t SUMS = GROUP * VW, RIGHT = 2 * TILE_WORDS, BELOW = TILE_WORDS;
LK_INLINE float* sum_at(float* c, int64_t row, int64_t v) {
  return c + v * RIGHT + row / X_ROWS * BELOW + row % X_ROWS * W;
}

// Part of W: `depth` elements of the sum from k on, `wide` columns from n on. Laid out, a column
// of tiles has the whole depth before the next; zeros beyond both.
struct Slab {
  int64_t k, depth, n, wide;
};

// Whether the sum runs along W's rows, as dx's does.
LK_INLINE bool along_rows(const ProductArgs& a) { return a.codes ? !a.k_inner : a.w.col == 1; }

// A row of W at a time where the sum runs along them, for rows may lie pages apart.
LK_INLINE void lay(const ProductArgs& a, const Slab& slab, float* to, float* decoded) {
  const int64_t columns = min(slab.wide, a.update.N - slab.n);
  const int64_t step = along_rows(a) ? X_DEPTH : slab.depth;
  const Layout at{W, x_tiles(slab.depth) * TILE_WORDS};
  if (slab.depth % X_DEPTH)
    for (int64_t n = 0; n < slab.wide; n += W)
      for (int64_t i = at.apart - TILE_WORDS; i < at.apart; i += W)
        store(to + n / W * at.apart + i, zero());
  for (int64_t k = 0; k < slab.depth; k += step)
    for (int64_t n = 0; n < columns; n += VW) {
      const int64_t depth = min(step, slab.depth - k), count = min(VW, columns - n);
      float* const out = to + n / W * at.apart + k / 2 * W;
      if (a.codes)
        pack_codes<Pair>(*a.codes, a.k_inner, slab.k + k, depth, slab.n + n, count, out, at,
                         decoded);
      else
        pack_words<Pair, bf16>(a.w, slab.k + k, depth, slab.n + n, count, out, at);
    }
}

// The same of float32, in three tiles for each; `decoded` has room for PART more rows.
constexpr int64_t PART = 128;
LK_INLINE void lay_terms(const ProductArgs& a, const Slab& slab, float* to, float* decoded) {
  const int64_t columns = min(slab.wide, a.update.N - slab.n);
  const int64_t apart = x_tiles(slab.depth) * 3 * TILE_WORDS;
  const int64_t step = along_rows(a) ? X_DEPTH : PART;
  float* const wide = decoded + PART * VW;
  for (int64_t k = 0; k < slab.depth; k += step)
    for (int64_t n = 0; n < columns; n += VW) {
      const int64_t depth = min(step, slab.depth - k), count = min(VW, columns - n);
      if (a.codes)
        pack_codes<float>(*a.codes, a.k_inner, slab.k + k, depth, slab.n + n, count, wide, Layout{},
                          decoded);
      else
        pack_words<float, float>(a.w, slab.k + k, depth, slab.n + n, count, wide, Layout{});
      for (int64_t i = depth * VW; i < round_up(depth, X_DEPTH) * VW; i += W)
        store(wide + i, zero());
      for (int64_t v = 0; v < V; ++v) {
        float* const column = to + (n / W + v) * apart + k / X_DEPTH * 3 * TILE_WORDS;
        for (int64_t pair = 0; pair < x_tiles(depth) * 16; ++pair) {
          vf even = load(wide + 2 * pair * VW + v * W),
             odd = load(wide + (2 * pair + 1) * VW + v * W);
          float* const words = column + pair / 16 * 3 * TILE_WORDS + pair % 16 * W;
          for (int term = 0; term < 3; ++term) next_term(even, odd, words + term * TILE_WORDS);
        }
      }
    }
}

// How a product of elements of TERMS bf16 is cut: into tasks of `rows` of x by some panels of
// `wide` columns. A task passes over `depth` of the sum at a time.
template <int TERMS>
struct Cut {
  int64_t pauses, depth, rows, wide, slab_depth, panels, column_blocks, tasks, chunks;

  explicit Cut(const ProductArgs& a) {
    const ExpandArgs& u = a.update;
    const bool small = u.M * u.N * a.K < SMALL;
    const int64_t threads = small ? 1 : u.threads;
    const bool fits = round_up(u.M, GROUP) * round_up(a.K, 128) * 2 * TERMS <= X_BYTES;
    pauses = fits ? 1 : (a.K * TERMS + SUM_DEPTH - 1) / SUM_DEPTH;
    depth = round_up((a.K + pauses - 1) / pauses, 128);  // where codes are transposed at once
    slab_depth = min(depth, TERMS > 1 ? 384 : along_rows(a) ? 512 : 1024);
    wide = !along_rows(a) ? VW : TERMS > 1 || u.N < 2048 ? 2 * VW : 4 * VW;
    while (wide > VW && u.N < wide * threads) wide /= 2;
    panels = (u.N + wide - 1) / wide;
    // As few blocks of rows as fit, since each lays all of W; but every thread has a task, and
    // with several blocks all threads have as many.
    const int64_t most = max(GROUP, X_BYTES / (2 * TERMS * depth) / GROUP * GROUP);
    int64_t blocks = max((u.M + most - 1) / most, (threads + panels - 1) / panels);
    if (blocks > threads) blocks = round_up(blocks, threads);
    rows = round_up((u.M + blocks - 1) / blocks, GROUP);
    blocks = (u.M + rows - 1) / rows;
    column_blocks = (panels * wide + TASK_COLUMNS - 1) / TASK_COLUMNS;
    while (column_blocks < panels && blocks * column_blocks % threads) ++column_blocks;
    pauses = (a.K + depth - 1) / depth;
    tasks = blocks * column_blocks;
    chunks = min(threads, tasks);
  }
};

// As product_of, of bf16 (one term) or float32 (three). The rank update is made in tiles, ahead of
// the sum, but where y shows more of S's bits than its two terms have, or a tile would stay empty.
// Tested by tests/ops.
template <int TERMS>
struct TileProduct {
  using Element = std::conditional_t<TERMS == 3, float, bf16>;
  const ProductArgs& a;
  const ExpandArgs& u = a.update;
  const Cut<TERMS> cut{a};
  const bool tiled = TERMS == 1 && u.dtype == DType::bf16 && u.R && u.M >= THIN_ROWS;
  const bool masked = tiled && u.dropout.rng;
  const Philox generator = philox(u.dropout);
  const int64_t blocks = (u.R + 15) / 16, groups = cut.rows / GROUP, R16 = blocks * 16;
  const int terms = u.q.dtype == DType::bf16 ? 1 : 2;
  // Floats of each region of a thread's scratch memory.
  const int64_t x_floats = cut.rows * cut.depth / 2 * TERMS,
                w_floats = cut.slab_depth / 2 * cut.wide * TERMS;
  const int64_t q_floats = tiled ? R16 * VW * terms : round_up(u.R, 4) * VW;
  const int64_t all_q = cut.wide / VW * q_floats;
  const int64_t staging = R16 * VW + round_up(staging_floats(VW, u.R), W);
  const int64_t s_floats = 2 * blocks * TILE_WORDS, all_s = tiled ? groups * s_floats : 0;
  const int64_t panel_sums = cut.wide / VW * groups * SUMS;
  const int64_t waiting =
      cut.pauses > 1 ? (cut.panels + cut.column_blocks - 1) / cut.column_blocks : 1;
  const int64_t decoded_floats = TERMS == 3 ? 2 * PART * VW + SUMS
                                 : a.codes  ? cut.slab_depth * VW
                                            : 0;
  const int64_t chunk_floats =
      x_floats + w_floats + all_q + staging + all_s + waiting * panel_sums + decoded_floats;

  // S Q of a group by VW columns, kept where the mask says.
  void masked_sums(int64_t m, int64_t m1, int64_t n, const float* s, const float* q,
                   float* c) const {
    for (int64_t v = 0; v < V; v += 2) {
      load_sums(nullptr, 0, 0, 0, false);
      rank_2x2(s, q + v * W, blocks, terms);
      store_sums(sum_at(c, 0, v), RIGHT, BELOW, LD_X);
    }
    for (int64_t i = 0; i < min(GROUP, m1 - m); ++i) {
      const uint64_t bits = keep64(generator, m + i, n);
      for (int64_t v = 0; v < V; ++v)
        store(sum_at(c, i, v), keep(load(sum_at(c, i, v)), bits >> v * W));
    }
  }

  // Asks for the lines of y that a group's sums will go to, which are pages apart.
  void ask(int64_t m, int64_t m1, int64_t n) const {
    const int64_t bytes = u.dtype == DType::f32 ? 4 : 2;
    for (int64_t i = m; i < min(m1, m + GROUP); ++i)
      for (int64_t at = 0; at < VW * bytes; at += 64)
        __builtin_prefetch(static_cast<char*>(u.y) + (i * u.ldy + n) * bytes + at, 1);
  }

  // From a group's sums of VW columns to y.
  void finish(int64_t m, int64_t m1, int64_t n, const float* q, float* c) const {
    for (int64_t i = m; i < min(m1, m + GROUP); i += Y_ROWS) {
      const int64_t count = min(Y_ROWS, m1 - i), n1 = min(n + VW, u.N);
      vf acc[Y_ROWS][V];
      if (tiled)
        LK_UNROLL for (int j = 0; j < Y_ROWS; ++j) LK_UNROLL for (int v = 0; v < V; ++v) acc[j][v] =
            zero();
      else
        masked_rank_tile(u, generator, i, count, n, q, acc);
      const auto sum = [&](int j, int v, int = W) { return load(sum_at(c, i - m + j, v)); };
      with_type(u.dtype,
                [&](auto type) { finish_tile<decltype(type)>(u, i, count, n, n1, acc, sum); });
    }
  }

  // A panel of columns by rows [m0, m1): their sums over x's elements from k0 to k1, which follow
  // those in `sums`, and y where these are the last.
  void panel(int64_t m0, int64_t m1, int64_t k0, int64_t k1, int64_t n0, const bf16* x, float* w,
             float* q, float* narrow, const float* s, float* sums, float* decoded) const {
    const int64_t n1 = min(n0 + cut.wide, u.N), ld = x_tiles(k1 - k0) * TERMS * X_TILE;
    if (tiled ? k0 == 0 : k1 == a.K)
      for (int64_t n = n0; n < n1; n += VW) {
        float* const to = q + (n - n0) / VW * q_floats;
        if (tiled)
          pack_twice(u, n, terms, narrow, to);
        else
          pack(u.q, u.R, n, min(VW, u.N - n), VW, u.alpha, u.gate, nullptr, to, VW, narrow);
      }
    for (int64_t k = k0; k < k1; k += cut.slab_depth) {
      const Slab slab{k, min(cut.slab_depth, k1 - k), n0, cut.wide};
      if constexpr (TERMS == 3)
        lay_terms(a, slab, w, decoded);
      else
        lay(a, slab, w, decoded);
      const int64_t steps = x_tiles(slab.depth), apart = steps * TERMS * TILE_WORDS;
      const int64_t stages = (slab.depth * TERMS + L1_DEPTH - 1) / L1_DEPTH;
      for (int64_t stage = 0; stage < stages; ++stage) {
        const int64_t s0 = steps * stage / stages, s1 = steps * (stage + 1) / stages;
        const bool starts = k == 0 && s0 == 0, ends = k + slab.depth == a.K && s1 == steps;
        for (int64_t n = n0; n < n1; n += 2 * W)
          for (int64_t m = m0; m < m1; m += GROUP) {
            const int64_t group = (m - m0) / GROUP, column = (n - n0) / VW, half = n % VW;
            float* const c = sums + (column * groups + group) * SUMS;
            const float* const sm = s + group * s_floats;
            const float* const qn = q + column * q_floats;
            const bf16* const xm = x + 2 * group * ld + ((k - k0) / X_DEPTH + s0) * TERMS * X_TILE;
            const float* const wn = w + (n - n0) / W * apart + s0 * TERMS * TILE_WORDS;
            const bool wide_rows = tiled || m + X_ROWS < m1;
            if (starts && masked && !half) masked_sums(m, m1, n, sm, qn, c);
            // Sums of float32 are short and added by themselves.
            const bool held = TERMS == 1 && (!starts || masked);
            float* const cn = sum_at(TERMS == 1 ? c : decoded + 2 * PART * VW, 0, half / W);
            if (ends && !half) ask(m, m1, n);
            if (wide_rows) {
              load_sums(cn, RIGHT, BELOW, LD_X, held);
              if (tiled && !held) rank_2x2(sm, qn + half, blocks, terms);
              tiles_2x2<TERMS>(xm, ld, s1 - s0, wn, apart);
              store_sums(cn, RIGHT, BELOW, LD_X);
            } else if (!half) {
              load_sums(cn, RIGHT, 2 * RIGHT, LD_X, held);
              tiles_1x4<TERMS>(xm, s1 - s0, wn, apart);
              store_sums(cn, RIGHT, 2 * RIGHT, LD_X);
            }
            if (TERMS == 3 && (wide_rows || !half)) {
              float* const to = sum_at(c, 0, half / W);
              for (int64_t v = 0; v < (wide_rows ? 2 : 4); ++v)
                for (int64_t i = v * RIGHT; i < v * RIGHT + (wide_rows ? RIGHT : BELOW); i += W)
                  store(to + i, starts ? load(cn + i) : add(load(to + i), load(cn + i)));
            }
            if (ends && (half || n + 2 * W >= n1)) finish(m, m1, n - half, qn, c);
          }
      }
    }
  }

  void task(int64_t i, float* own) const {
    bf16* const x = reinterpret_cast<bf16*>(own);
    float* const w = own + x_floats;
    float* const q = w + w_floats;
    float* const narrow = q + all_q;
    float* const s = narrow + staging;
    float* const sums = s + all_s;
    float* const decoded = sums + waiting * panel_sums;
    const int64_t m0 = i / cut.column_blocks * cut.rows, m1 = min(u.M, m0 + cut.rows),
                  column_block = i % cut.column_blocks;
    const int64_t first = cut.panels * column_block / cut.column_blocks,
                  last = cut.panels * (column_block + 1) / cut.column_blocks;
    for (int64_t m = m0; tiled && m < m1; m += GROUP)
      split_rows(u, m, blocks, s + (m - m0) / GROUP * s_floats);
    for (int64_t k0 = 0; k0 < a.K; k0 += cut.depth) {
      const int64_t k1 = min(k0 + cut.depth, a.K);
      pack_x(static_cast<const Element*>(a.x.data) + m0 * a.x.row + k0, a.x.row, m1 - m0, k1 - k0,
             tiled ? GROUP : X_ROWS, x);
      for (int64_t p = first; p < last; ++p)
        panel(m0, m1, k0, k1, p * cut.wide, x, w, q, narrow, s,
              sums + (cut.pauses > 1 ? p - first : 0) * panel_sums, decoded);
    }
  }

  void run() const {
    Scratch scratch(cut.chunks * chunk_floats * 4);
    parallel(u.threads, cut.chunks, [&](int64_t chunk) {
      const Tiles registers;
      float* const own = static_cast<float*>(scratch.data) + chunk * chunk_floats;
      for (int64_t i = chunk; i < cut.tasks; i += cut.chunks) task(i, own);
    });
  }
};

void product_of_tiles(const ProductArgs& a) {
  if (!a.update.M || !a.update.N) return;
  if (a.x.dtype == DType::bf16)
    TileProduct<1>{a}.run();
  else if (a.x.dtype == DType::f32 && a.update.M >= FLOAT_ROWS)
    TileProduct<3>{a}.run();
  else
    kernels_avx512bf16.product(a);
}

}  // namespace
}  // namespace lora_kernels
