#pragma once
// Products of bf16 in the tile registers of AMX: eight of 16 rows by 64 bytes. A tile of x (16
// rows, 32 elements of the sum) times one of a packed panel (16 pairs, 16 columns) is added to 16 x
// 16 sums in float32 by one instruction; subnormals count as zero. Part of product_impl.h, whose
// panels it takes as they are.

namespace lora_kernels {
namespace {

constexpr int64_t X_ROWS = 16, X_DEPTH = 32;      // of a tile of x
constexpr int64_t X_TILE = X_ROWS * X_DEPTH;      // elements
constexpr int64_t B_ROWS = X_DEPTH / 2;           // words of the sum in a tile of a panel
constexpr int LD_X = X_DEPTH * 2, LD_C = VW * 4;  // bytes from row to row

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

// x [M, K] in tiles, one after another along K and then along M; zeros beyond both.
LK_INLINE int64_t x_tiles(int64_t K) { return (K + X_DEPTH - 1) / X_DEPTH; }
LK_INLINE void pack_x(const Matrix& x, int64_t M, int64_t K, int threads, bf16* to) {
  const int64_t blocks = (M + X_ROWS - 1) / X_ROWS, steps = x_tiles(K);
  const int64_t tasks = blocks * steps, chunks = tasks < 64 ? 1 : min(tasks, threads);
  parallel(threads, chunks, [&](int64_t chunk) {
    for (int64_t t = tasks * chunk / chunks; t < tasks * (chunk + 1) / chunks; ++t) {
      const int64_t m = t / steps * X_ROWS, k = t % steps * X_DEPTH;
      const int64_t depth = min(X_DEPTH, K - k);
      const __mmask32 mask = depth == X_DEPTH ? ~0u : (1u << depth) - 1;
      const bf16* from = static_cast<const bf16*>(x.data) + m * x.row + k;
      bf16* tile = to + t * X_TILE;
      for (int64_t i = 0; i < X_ROWS; ++i, from += x.row, tile += X_DEPTH)
        _mm512_storeu_si512(
            tile, m + i < M ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512());
    }
  });
}

// Registers 0 to 3 are the sums at c, c + right, c + next and c + next + right; zero unless held.
LK_INLINE void load_sums(const float* c, int64_t right, int64_t next, bool held) {
  if (held) {
    _tile_loadd(0, c, LD_C);
    _tile_loadd(1, c + right, LD_C);
    _tile_loadd(2, c + next, LD_C);
    _tile_loadd(3, c + next + right, LD_C);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}
LK_INLINE void store_sums(float* c, int64_t right, int64_t next) {
  _tile_stored(0, c, LD_C);
  _tile_stored(1, c + right, LD_C);
  _tile_stored(2, c + next, LD_C);
  _tile_stored(3, c + next + right, LD_C);
}

// C[32, 32] (+)= two rows of tiles of x, `ld` elements apart, times half a panel.
LK_INLINE void tiles_2x2(const bf16* x, int64_t ld, int64_t steps, const float* panel, float* c,
                         bool held) {
  load_sums(c, W, X_ROWS * VW, held);
  for (int64_t s = 0; s < steps; ++s, x += X_TILE, panel += B_ROWS * VW) {
    _tile_loadd(4, x, LD_X);
    _tile_loadd(6, panel, LD_C);
    _tile_loadd(7, panel + W, LD_C);
    _tile_loadd(5, x + ld, LD_X);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_sums(c, W, X_ROWS * VW);
}

// C[16, 64] (+)= one row of tiles of x times a panel.
LK_INLINE void tiles_1x4(const bf16* x, int64_t steps, const float* panel, float* c, bool held) {
  load_sums(c, W, 2 * W, held);
  for (int64_t s = 0; s < steps; ++s, x += X_TILE, panel += B_ROWS * VW) {
    _tile_loadd(4, x, LD_X);
    _tile_loadd(5, panel, LD_C);
    _tile_loadd(6, panel + W, LD_C);
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, panel + 2 * W, LD_C);
    _tile_loadd(6, panel + 3 * W, LD_C);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 6);
  }
  store_sums(c, W, 2 * W);
}

// product_block for pairs. x: a.x in tiles. C[m - m0, 0 .. VW) holds the sums, to which the rank
// update is added at the end.
LK_INLINE void tiles_block(const ProductArgs& a, const Philox& generator, int64_t m0, int64_t m1,
                           int64_t n0, int64_t step, const float* q, float* panel, const bf16* x,
                           float* C, float* decoded) {
  const ExpandArgs& u = a.update;
  const int64_t n1 = min(n0 + VW, u.N), ld = x_tiles(a.K) * X_TILE;
  const int64_t groups = (m1 - m0 + 2 * X_ROWS - 1) / (2 * X_ROWS);
  for (int64_t k = 0; k < a.K; k += 2 * step) {
    const int64_t depth = min(2 * step, a.K - k), words = (depth + 1) / 2;
    const int64_t steps = (words + B_ROWS - 1) / B_ROWS;
    for (int64_t i = words / B_ROWS * B_ROWS * VW; i < steps * B_ROWS * VW; i += W)
      store(panel + i, zero());
    if (a.codes)
      pack_codes<Pair>(*a.codes, a.k_inner, k, depth, n0, n1 - n0, panel, decoded);
    else
      pack_words<Pair, bf16>(a.w, k, depth, n0, n1 - n0, panel);
    const bf16* const xk = x + m0 / X_ROWS * ld + k / X_DEPTH * X_TILE;
    Lines ahead = lines_after<bf16>(a, k, depth, n0, 2 * step);
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t group = 0; group < groups; ++group) {
        const bf16* const rows = xk + 2 * group * ld;
        float* const c = C + 2 * group * X_ROWS * VW;
        if (m0 + (2 * group + 1) * X_ROWS < m1)
          tiles_2x2(rows, ld, steps, panel + 2 * W * half, c + 2 * W * half, k > 0);
        else if (!half)
          tiles_1x4(rows, steps, panel, c, k > 0);
        for (const int64_t stop = ahead.count * (half * groups + group + 1) / (2 * groups);
             ahead.next < stop;)
          ahead.ask();
      }
  }
  const bool plain = !(u.z || u.c || u.bias);
  for (int64_t m = m0; m < m1; m += Y_ROWS) {
    const int64_t count = min(Y_ROWS, m1 - m);
    vf acc[Y_ROWS][V];
    masked_rank_tile(u, generator, m, count, n0, q, acc);
    const float* const c = C + (m - m0) * VW;
    const auto sum = [&](int i, int v, int = W) { return load(c + i * VW + v * W); };
    with_type(u.dtype, [&](auto type) {
      using TY = decltype(type);
      if (plain)
        finish_tile<TY, true>(u, m, count, n0, n1, acc, sum);
      else
        finish_tile<TY, false>(u, m, count, n0, n1, acc, sum);
    });
  }
}

}  // namespace
}  // namespace lora_kernels
