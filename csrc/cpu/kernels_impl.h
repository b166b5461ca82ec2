#pragma once
// The CPU kernels, written once over the vector type that the including unit has chosen.
//
// Two inner loops carry everything:
//   dot    out[m, r] = sum_k X[m, k] A[r, k]        both operands contiguous along the sum
//   outer  acc[i, n] += sum_j P[i, j] Q[j, n]       Q contiguous along n, P broadcast
// shrink and dS are dots; the rank updates of y and dx, dB and dA are outer products. Sums are
// float32 throughout; 16-bit elements are widened on their way into a register.
#include <type_traits>

#include "../common/philox.h"

#if defined(__clang__)
#define LK_UNROLL _Pragma("unroll")
#define LK_ROLL _Pragma("nounroll")
#else
#define LK_UNROLL _Pragma("GCC unroll 16")
#define LK_ROLL _Pragma("GCC unroll 1")
#endif
// Copies of a whole inner loop: the portable unit keeps one of them, so that it compiles fast.
#ifdef LK_SMALL
#define LK_UNROLL_FAST LK_ROLL
#else
#define LK_UNROLL_FAST LK_UNROLL
#endif

namespace lora_kernels {
namespace {

constexpr int64_t VW = V * W;      // columns of an outer product
constexpr int64_t PANEL = 128;     // columns of y whose Q is packed at once
constexpr int64_t ROWS = 96;       // rows of y that one task updates
constexpr int64_t RANKS = 64;      // ranks summed in one chain before they are added to the rest
constexpr int64_t STRIP = 64;      // columns of x of one task of dA: a mask word
constexpr int64_t DEPTH = 128;     // rows of x that stay in L1 while dA's ranks pass over them
constexpr int64_t UNPACKED = 2;    // rows up to which the rank update of y reads B unpacked
constexpr int64_t PAIR_ROWS = 32;  // rows of dY that stay in L2 between dS and dB

LK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
LK_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
LK_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <typename F>
LK_INLINE void with_type(DType dtype, const F& f) {
  if (dtype == DType::f32) f(float{});
  if (dtype == DType::bf16) f(bf16{});
  if (dtype == DType::f16) f(f16{});
}

// f(chunk) for every chunk; which results arise does not depend on how many threads there are.
template <typename F>
LK_INLINE void parallel(int threads, int64_t chunks, const F& f) {
  struct Context {
    const F* f;
    int64_t chunks;
  } context{&f, chunks};
  run_threads((int)min(threads, chunks),
              [](void* p, int thread, int threads) {
                const Context& c = *static_cast<Context*>(p);
                for (int64_t i = thread; i < c.chunks; i += threads) (*c.f)(i);
              },
              &context);
}

// f(thread, threads) on as many threads as there are, all at the same time.
template <typename F>
LK_INLINE void together(int threads, const F& f) {
  run_threads(
      threads,
      [](void* p, int thread, int threads) { (*static_cast<const F*>(p))(thread, threads); },
      const_cast<F*>(&f));
}

// The first `rest` <= W elements, zeros after them.
template <typename T>
LK_INLINE vf some(const T* p, int rest) {
  return rest == W ? load(p) : load_n(p, rest);
}

struct Scratch {
  void* data;
  explicit Scratch(int64_t bytes) : data(bytes ? scratch_alloc(bytes) : nullptr) {}
  ~Scratch() {
    if (data) scratch_free(data);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// Dropout --------------------------------------------------------------------------------------

struct Philox {
  uint32_t key0, key1, offset0, offset1, threshold;
  const int64_t* rows;
};

LK_INLINE Philox philox(const Dropout& d) {
  const uint64_t seed = d.rng ? (uint64_t)d.rng[0] : 0, offset = d.rng ? (uint64_t)d.rng[1] : 0;
  return {(uint32_t)seed,   (uint32_t)(seed >> 32),
          (uint32_t)offset, (uint32_t)(offset >> 32),
          d.threshold,      d.rows};
}

// Bit j is set where element (m, k + j) is kept; k is a multiple of 64.
LK_INLINE uint64_t keep64(const Philox& p, int64_t m, int64_t k) {
  uint64_t bits = 0;
  if (p.rows) m = p.rows[m];
  for (int v = 0; v < 16 / W; ++v) {
    vu c0 = lanes_from((uint32_t)(k / 4) + v * W), c1 = splat_u((uint32_t)m);
    vu c2 = splat_u(p.offset0), c3 = splat_u(p.offset1), hi0, lo0, hi1, lo1;
    uint32_t key0 = p.key0, key1 = p.key1;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      mul_hi_lo(kPhiloxM0, c0, hi0, lo0);
      mul_hi_lo(kPhiloxM1, c2, hi1, lo1);
      c0 = xor3(hi1, c1, splat_u(key0));
      c1 = lo1;
      c2 = xor3(hi0, c3, splat_u(key1));
      c3 = lo0;
      key0 += kPhiloxW0;
      key1 += kPhiloxW1;
    }
    bits |= interleave(at_least(c0, p.threshold), at_least(c1, p.threshold),
                       at_least(c2, p.threshold), at_least(c3, p.threshold))
            << (4 * W * v) % 64;
  }
  return bits;
}

// to[0 .. n) = from[0 .. n), zero where dropped or past count. k, n: multiples of 64 and W.
template <typename From, typename To>
LK_INLINE void copy_kept(const From* from, To* to, int64_t count, int64_t n, const Philox* p,
                         int64_t m, int64_t k) {
  uint64_t bits = ~0ull;
  for (int64_t i = 0; i < n; i += W) {
    if (p && i % 64 == 0) bits = keep64(*p, m, k + i);
    const int64_t rest = count - i;
    const vf v = rest >= W ? load(from + i) : rest > 0 ? load_n(from + i, (int)rest) : zero();
    store(to + i, p ? keep(v, bits >> i % 64) : v);
  }
}

// Inner loops ----------------------------------------------------------------------------------

// A span's sum is taken by itself: one chain over a long K would lose more than oneDNN's
// blocked GEMM does.
template <int I, typename TX, typename TA>
LK_INLINE void dot(const TX* const x[I], const TA* const a[4], int64_t K, float out[I][4]) {
  constexpr int64_t SPAN = 256 * W;
  int64_t k = 0;
  do {
    vf acc[I][4];
    LK_UNROLL for (int i = 0; i < I; ++i) LK_UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = zero();
    const bool fresh = k == 0;
    for (const int64_t end = min(k + SPAN, K / W * W); k < end; k += W) {
      vf xv[I];
      LK_UNROLL for (int i = 0; i < I; ++i) xv[i] = load(x[i] + k);
      LK_UNROLL for (int j = 0; j < 4; ++j) {
        const vf av = load(a[j] + k);
        LK_UNROLL for (int i = 0; i < I; ++i) acc[i][j] = fma(xv[i], av, acc[i][j]);
      }
    }
    if (const int n = (int)(K - k); n && n < W) {
      LK_UNROLL for (int j = 0; j < 4; ++j) {
        const vf av = load_n(a[j] + k, n);
        LK_UNROLL for (int i = 0; i < I; ++i) acc[i][j] = fma(load_n(x[i] + k, n), av, acc[i][j]);
      }
      k = K;
    }
    LK_UNROLL for (int i = 0; i < I; ++i) {
      float partial[4];
      sum_lanes(acc[i], partial);
      LK_UNROLL for (int j = 0; j < 4; ++j) out[i][j] = fresh ? partial[j] : out[i][j] + partial[j];
    }
  } while (k < K);
}

#ifdef LK_BF16_PAIRS  // the unit brings a dot over pairs of bf16
template <int I>
LK_INLINE void dot(const bf16* const x[I], const bf16* const a[4], int64_t K, float out[I][4]) {
  dot_bf16<I>(x, a, K, out);
}
#endif

template <int I, typename TQ>
LK_INLINE void outer(const float* const p[I], int64_t stride_pj, int64_t J, const TQ* q,
                     int64_t stride_qj, vf acc[I][V]) {
  const float* row[I];
  LK_UNROLL for (int i = 0; i < I; ++i) row[i] = p[i];
  for (int64_t j = 0; j < J; ++j, q += stride_qj) {
    vf qv[V];
    LK_UNROLL for (int v = 0; v < V; ++v) qv[v] = load(q + v * W);
    LK_UNROLL for (int i = 0; i < I; ++i) {
      const vf b = splat(row[i][j * stride_pj]);
      LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = fma(b, qv[v], acc[i][v]);
    }
  }
}

// Stored in, or added to, rows of c that are ldc apart. A block's sum is taken by itself and then
// added: one chain over all rows would lose more than oneDNN's blocked GEMM does.
template <typename TQ>
LK_INLINE void outer_into(const float* const p[4], int64_t stride_pj, int64_t J, const TQ* q,
                          int64_t stride_qj, float* c, int64_t ldc, bool fresh) {
  vf acc[4][V];
  LK_UNROLL for (int i = 0; i < 4; ++i) LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = zero();
  outer<4>(p, stride_pj, J, q, stride_qj, acc);
  LK_UNROLL for (int i = 0; i < 4; ++i) LK_UNROLL for (int v = 0; v < V; ++v) {
    float* to = c + i * ldc + v * W;
    store(to, fresh ? acc[i][v] : add(load(to), acc[i][v]));
  }
}

// Words ----------------------------------------------------------------------------------------

// The words that a sum runs over: float32, or Pair if the unit has LK_BF16_PAIRS and both operands
// are bf16.
#ifdef LK_BF16_PAIRS
template <typename T>
using WordOf = std::conditional_t<std::is_same_v<T, bf16>, Pair, float>;
#else
template <typename T>
using WordOf = float;
#endif
template <typename Word>
constexpr int64_t ELEMENTS = 1;  // in a word
template <>
constexpr int64_t ELEMENTS<Pair> = 2;

// Words summed in one chain. Float32 results show a longer one's rounding.
template <typename Word>
constexpr int64_t CHAIN = 160;
template <>
constexpr int64_t CHAIN<Pair> = 1024;

LK_INLINE vf word_fma(vf a, vf b, vf acc, float) { return fma(a, b, acc); }

// Loads W words whose first `elements` elements exist.
template <typename T>
LK_INLINE vf load_words(const T* p, int64_t elements, float) {
  return elements >= W ? load(p) : load_n(p, (int)elements);
}

// Packing --------------------------------------------------------------------------------------

template <typename T>
LK_INLINE float widen_one(const T* p) {
  float lane[W];
  store(lane, load_n(p, 1));
  return lane[0];
}

LK_INLINE void transpose4(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  typedef float v4 __attribute__((vector_size(16)));
  typedef int i4 __attribute__((vector_size(16)));
  v4 r[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], from + i * ld_from, 16);
#if defined(__clang__)
#define LK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i4{__VA_ARGS__})
#endif
  const v4 a = LK_SHUFFLE(r[0], r[1], 0, 4, 1, 5), b = LK_SHUFFLE(r[2], r[3], 0, 4, 1, 5),
           c = LK_SHUFFLE(r[0], r[1], 2, 6, 3, 7), d = LK_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  const v4 t[4] = {LK_SHUFFLE(a, b, 0, 1, 4, 5), LK_SHUFFLE(a, b, 2, 3, 6, 7),
                   LK_SHUFFLE(c, d, 0, 1, 4, 5), LK_SHUFFLE(c, d, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * ld_to, &t[i], 16);
#undef LK_SHUFFLE
}

// to[r * ld + n] = alpha * gate[r] * c[n] * Q[r, n] for n in [n0, n0 + count), as float32; ranks up
// to a multiple of 4 and columns up to `width` are zero-filled. staging: [count up to 4, R up to
// W].
[[gnu::noinline]] void pack(const Matrix& q, int64_t R, int64_t n0, int64_t count, int64_t width,
                            float alpha, const float* gate, const float* c, float* to, int64_t ld,
                            float* staging) {
  const int64_t R4 = round_up(R, 4);
  with_type(q.dtype, [&](auto type) {
    using T = decltype(type);
    const T* base = static_cast<const T*>(q.data) + n0 * q.col;
    if (q.col == 1) {
      for (int64_t r = 0; r < R; ++r) {
        const vf factor = splat(gate ? alpha * gate[r] : alpha);
        for (int64_t n = 0; n < count; n += W) {
          const int rest = (int)min(W, count - n);
          const T* p = base + r * q.row + n;
          store_n(to + r * ld + n, mul(factor, rest == W ? load(p) : load_n(p, rest)), rest);
        }
      }
    } else {
      const int64_t lds = round_up(R4, W), count4 = round_up(count, 4);
      for (int64_t n = 0; n < count4; ++n)
        for (int64_t r = 0; r < lds; r += W) {
          const int rest = (int)max(0, min(W, R - r));
          vf v = zero();
          if (n < count && rest > 0) {
            const T* p = base + n * q.col + r * q.row;
            if (q.row == 1) {
              v = rest == W ? load(p) : load_n(p, rest);
            } else {
              float lanes[W] = {};
              for (int i = 0; i < rest; ++i) lanes[i] = widen_one(p + i * q.row);
              v = load(lanes);
            }
          }
          const vf factor = gate ? mul(splat(alpha), load_n(gate + r, rest)) : splat(alpha);
          store(staging + n * lds + r, mul(factor, v));
        }
      // Columns past count4 are the zero fill's; the last four may reach past count, with zeros.
      for (int64_t n = 0; n < count4; n += 4)
        for (int64_t r = 0; r < R4; r += 4) {
          if (width - n >= 4) {
            transpose4(staging + n * lds + r, lds, to + r * ld + n, ld);
            continue;
          }
          float block[16];
          transpose4(staging + n * lds + r, lds, block, 4);
          for (int64_t i = 0; i < 4; ++i)
            for (int64_t j = 0; j < width - n; ++j) to[(r + i) * ld + n + j] = block[4 * i + j];
        }
    }
  });
  for (int64_t r = 0; r < R4; ++r) {
    if (c && r < R)
      for (int64_t n = 0; n < count; ++n) to[r * ld + n] *= c[n0 + n];
    for (int64_t n = r < R ? count : 0; n < width; ++n) to[r * ld + n] = 0.0f;
  }
}

LK_INLINE int64_t staging_floats(int64_t columns, int64_t R) {
  return round_up(columns, 4) * round_up(round_up(R, 4), W);
}

// shrink ---------------------------------------------------------------------------------------

// P's `count` <= DOT_ROWS rows from m on and ranks from r0 to r1. kept: [DOT_ROWS, K up to 64], for
// masked rows of x; written where `mask`, read where there is dropout.
template <typename TX>
LK_INLINE void shrink_tile(const ShrinkArgs& a, int64_t m, int64_t count, int64_t r0, int64_t r1,
                           const Philox& generator, TX* kept) {
  const int64_t K64 = round_up(a.K, 64);
  const TX* rows[DOT_ROWS];
  for (int64_t i = 0; i < DOT_ROWS; ++i) {
    const int64_t row = m + min(i, count - 1);  // a short tile repeats its last row
    rows[i] = static_cast<const TX*>(a.x.data) + row * a.x.row;
    if (a.dropout.rng && i < count)
      copy_kept(rows[i], kept + i * K64, a.K, K64, &generator, row, 0);
    if (a.dropout.rng) rows[i] = kept + min(i, count - 1) * K64;
  }
  with_type(a.a.dtype, [&](auto type) {
    using TA = decltype(type);
    const TA* A = static_cast<const TA*>(a.a.data);
    for (int64_t r = r0; r < r1; r += 4) {
      const TA* ranks[4];
      for (int64_t j = 0; j < 4; ++j) ranks[j] = A + min(r + j, r1 - 1) * a.a.row;
      float out[DOT_ROWS][4];
      if (count == 1)
        dot<1>(rows, ranks, a.K, out);
      else
        dot<DOT_ROWS>(rows, ranks, a.K, out);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < min(4, r1 - r); ++j)
          a.p[(m + i) * a.lds + r + j] = out[i][j] * a.scale;
    }
  });
}

// P[M, R] = scale * (mask(X) A^T). Tiles of DOT_ROWS rows of x by 4 ranks over all of K; with
// dropout the tile's masked rows are written to a buffer of DOT_ROWS x K once and read for every
// rank. Reads x once from memory, A once a tile from cache. Tested by tests/ops.
[[maybe_unused]] void shrink(const ShrinkArgs& a) {
  const int64_t tiles = (a.M + DOT_ROWS - 1) / DOT_ROWS, K64 = round_up(a.K, 64);
  const int64_t chunks = a.M * a.K * a.R < SMALL ? 1 : min(a.threads, tiles);
  if (!tiles) return;
  const Philox generator = philox(a.dropout);
  const int64_t buffer_bytes = a.dropout.rng ? DOT_ROWS * K64 * 4 : 0;
  Scratch scratch(chunks * buffer_bytes);
  with_type(a.x.dtype, [&](auto type) {
    using TX = decltype(type);
    parallel(a.threads, chunks, [&](int64_t chunk) {
      TX* kept = reinterpret_cast<TX*>(static_cast<char*>(scratch.data) + chunk * buffer_bytes);
      const int64_t last = min(a.M, tiles * (chunk + 1) / chunks * DOT_ROWS);
      for (int64_t m = tiles * chunk / chunks * DOT_ROWS; m < last; m += DOT_ROWS)
        shrink_tile(a, m, min(DOT_ROWS, last - m), 0, a.R, generator, kept);
    });
  });
}

// expand ---------------------------------------------------------------------------------------

// acc = S Q for Y_ROWS rows of S and VW columns of a packed panel whose rows are ld apart.
LK_INLINE void rank_tile(const float* const s[Y_ROWS], int64_t R, const float* panel, int64_t ld,
                         vf acc[Y_ROWS][V]) {
  LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] =
      zero();
  outer<Y_ROWS>(s, 1, min(R, RANKS), panel, ld, acc);
  for (int64_t r = RANKS; r < R; r += RANKS) {
    const float* s_block[Y_ROWS];
    vf block[Y_ROWS][V];
    LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) {
      s_block[i] = s[i] + r;
      LK_UNROLL for (int v = 0; v < V; ++v) block[i][v] = zero();
    }
    outer<Y_ROWS>(s_block, 1, min(R - r, RANKS), panel + r * ld, ld, block);
    LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] =
        add(acc[i][v], block[i][v]);
  }
}

// Epilogue of a partial tile: y = c * sum + bias and z = sum, for `count` rows and the columns
// below n1. It is not inlined and reads its sums from memory: inlined into each kernel, partial
// tiles were half of the code and two thirds of its compile time (benchmarks/NOTES.md).
template <typename T>
[[gnu::noinline]] void finish_edge(const ExpandArgs& a, int64_t m, int64_t count, int64_t n,
                                   int64_t n1, const float* sum, int64_t ld) {
  const auto put = [](T* to, vf v, int rest) { rest == W ? store(to, v) : store_n(to, v, rest); };
  LK_ROLL for (int64_t i = 0; i < count; ++i) {
    LK_ROLL for (int64_t column = n; column < n1; column += W) {
      const int rest = (int)min(W, n1 - column);
      vf u = load(sum + i * ld + column - n);
      if (a.z) put(static_cast<T*>(a.z) + (m + i) * a.N + column, u, rest);
      if (a.c) u = mul(u, some(a.c + column, rest));
      if (a.bias) u = add(u, some(a.bias + column, rest));
      put(static_cast<T*>(a.y) + (m + i) * a.ldy + column, u, rest);
    }
  }
}

// y = c * (base + acc) + bias and z = base + acc for a tile whose first element is y[m, n]; only
// `count` rows and the columns below n1 exist. Each of y and z rounds once. base(i, v, rest) is
// the first `rest` lanes of what the rank update is added to, in register v of row i.
template <typename T, typename Base>
LK_INLINE void finish_tile(const ExpandArgs& a, int64_t m, int64_t count, int64_t n, int64_t n1,
                           const vf acc[Y_ROWS][V], const Base& base) {
  if (count < Y_ROWS || n + VW > n1) {
    const int64_t end = min(n + VW, n1);
    float sum[Y_ROWS][VW];
    LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v)
        store(sum[i] + v * W, acc[i][v]);
    const int registers = (int)(end - n + W - 1) / W;
    LK_ROLL for (int i = 0; i < count; ++i) {
      LK_ROLL for (int v = 0; v < registers; ++v) {
        float* const at = sum[i] + v * W;
        store(at, add(base(i, v, (int)min(W, end - n - v * W)), load(at)));
      }
    }
    finish_edge<T>(a, m, count, n, end, sum[0], VW);
    return;
  }
  vf u[Y_ROWS][V];
  LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v) u[i][v] =
      add(base(i, v, W), acc[i][v]);
  if (a.z)
    LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v)
        store(static_cast<T*>(a.z) + (m + i) * a.N + n + v * W, u[i][v]);
  if (a.c) LK_UNROLL for (int v = 0; v < V; ++v) {
      const vf c = load(a.c + n + v * W);
      LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) u[i][v] = mul(u[i][v], c);
    }
  if (a.bias) LK_UNROLL for (int v = 0; v < V; ++v) {
      const vf bias = load(a.bias + n + v * W);
      LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) u[i][v] = add(u[i][v], bias);
    }
  LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v)
      store(static_cast<T*>(a.y) + (m + i) * a.ldy + n + v * W, u[i][v]);
}

LK_INLINE void mask_tile(const uint64_t bits[Y_ROWS], int64_t shift, vf acc[Y_ROWS][V]) {
  LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] =
      keep(acc[i][v], bits[i] >> (shift + v * W));
}

// Y = c * (Y + alpha * mask(S Q)) + bias, y read and written once. A task is a panel of PANEL
// columns of Q, packed once in float32 with alpha inside, by ROWS rows of y. Rounds once, when y is
// stored (z likewise). Reads and writes y once, reads S once a panel, Q once. Tested by tests/ops.
template <typename T>
LK_INLINE void expand_tile(const ExpandArgs& a, const Philox& generator, const float* panel,
                           int64_t n0, int64_t m0, int64_t m1) {
  const int64_t n1 = min(n0 + PANEL, a.N);
  T* const y = static_cast<T*>(a.y);
  for (int64_t m = m0; m < m1; m += Y_ROWS) {
    const int64_t count = min(Y_ROWS, m1 - m);
    const float* s[Y_ROWS];
    for (int64_t i = 0; i < Y_ROWS; ++i) s[i] = a.s + (m + min(i, count - 1)) * a.lds;
    uint64_t bits[Y_ROWS] = {};
    for (int64_t n = n0; n < n1; n += VW) {
      if (a.dropout.rng && (n - n0) % 64 == 0)
        for (int64_t i = 0; i < count; ++i) bits[i] = keep64(generator, m + i, n);
      // The next rows come from L3, too far apart for the hardware's prefetcher.
      if (m + 2 * Y_ROWS <= m1 && n + VW <= n1) LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) {
          const char* next = reinterpret_cast<const char*>(y + (m + Y_ROWS + i) * a.ldy + n);
          LK_UNROLL for (int line = 0; line < VW * (int)sizeof(T); line += 64)
              __builtin_prefetch(next + line, 1);
        }
      vf acc[Y_ROWS][V];
      rank_tile(s, a.R, panel + (n - n0), PANEL, acc);
      if (a.dropout.rng) mask_tile(bits, (n - n0) % 64, acc);
      finish_tile<T>(a, m, count, n, n1, acc, [&](int i, int v, int rest) {
        return some(y + (m + i) * a.ldy + n + v * W, rest);
      });
    }
  }
}

// Whether packing Q costs more than the update, as for one or two rows. Q's columns, where they are
// contiguous along the ranks, are dotted with S; else its rows are added up.
LK_INLINE bool unpacked(const ExpandArgs& a) {
  return a.M <= UNPACKED && (a.q.row == 1 || a.q.col == 1) && !a.gate && !a.dropout.rng;
}

// sums[m][j] = row m of S times Q's column n + j, for all rows of S and n + j < n1.
template <typename TQ>
[[gnu::noinline]] void unpacked_sums(const ExpandArgs& a, int64_t n, int64_t n1,
                                     float (*sums)[PANEL]) {
  const TQ* const q = static_cast<const TQ*>(a.q.data);
  for (int64_t m = 0; m < a.M; ++m) {
    for (int64_t j = 0; a.q.row != 1 && j < n1 - n; j += VW) {
      vf sum[V];
      LK_UNROLL for (int v = 0; v < V; ++v) sum[v] = zero();
      for (int64_t r = 0; r < a.R; ++r) {
        const vf s = splat(a.s[m * a.lds + r]);
        const TQ* row = q + r * a.q.row + n + j;
        const int64_t rest = n1 - n - j;
        LK_UNROLL for (int v = 0; v < V; ++v) sum[v] =
            fma(s, some(row + v * W, (int)max(0, min(W, rest - v * W))), sum[v]);
      }
      LK_UNROLL for (int v = 0; v < V; ++v) store(sums[m] + j + v * W, sum[v]);
    }
    if (a.q.row != 1) continue;
    const float* const s[1] = {a.s + m * a.lds};
    for (int64_t j = 0; j < n1 - n; j += 4) {
      const TQ* columns[4];
      for (int64_t i = 0; i < 4; ++i) columns[i] = q + min(n + j + i, n1 - 1) * a.q.col;
      dot<1>(s, columns, a.R, reinterpret_cast<float (*)[4]>(sums[m] + j));
    }
  }
}

// y's columns from n0 to n1: c * (base + alpha * S Q) + bias. base(m, n, rest) is what the rank
// update is added to, `rest` elements of row m from column n on.
template <typename Base>
LK_INLINE void expand_unpacked(const ExpandArgs& a, int64_t n0, int64_t n1, const Base& base) {
  for (int64_t n = n0; n < n1; n += PANEL) {
    const int64_t end = min(n + PANEL, n1);
    float sums[UNPACKED][PANEL] = {};
    with_type(a.q.dtype, [&](auto type) { unpacked_sums<decltype(type)>(a, n, end, sums); });
    for (int64_t m = 0; m < a.M; ++m)
      for (int64_t column = n; column < end; column += W) {
        float* const at = sums[m] + (column - n);
        store(at, add(base(m, column, (int)min(W, end - column)), mul(load(at), splat(a.alpha))));
      }
    with_type(a.dtype,
              [&](auto type) { finish_edge<decltype(type)>(a, 0, a.M, n, end, sums[0], PANEL); });
  }
}

[[maybe_unused]] void expand(const ExpandArgs& a) {
  if (unpacked(a)) {
    const int64_t tiles = (a.N + VW - 1) / VW;
    const int64_t chunks = a.M * a.N * a.R < SMALL ? 1 : min(a.threads, tiles);
    with_type(a.dtype, [&](auto type) {
      const auto* const y = static_cast<const decltype(type)*>(a.y);
      parallel(a.threads, a.M ? chunks : 0, [&](int64_t chunk) {
        expand_unpacked(
            a, tiles * chunk / chunks * VW, min(a.N, tiles * (chunk + 1) / chunks * VW),
            [&](int64_t m, int64_t n, int rest) { return some(y + m * a.ldy + n, rest); });
      });
    });
    return;
  }
  const int64_t panels = (a.N + PANEL - 1) / PANEL, blocks = (a.M + ROWS - 1) / ROWS;
  const int64_t tasks = panels * blocks, R4 = round_up(a.R, 4);
  if (!tasks) return;
  const int64_t chunks = a.M * a.N * a.R < SMALL ? 1 : min(a.threads, tasks);
  const Philox generator = philox(a.dropout);
  const int64_t panel_floats = R4 * PANEL, staging = staging_floats(PANEL, a.R);
  Scratch scratch(chunks * (panel_floats + staging) * 4);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    parallel(a.threads, chunks, [&](int64_t chunk) {
      float* panel = static_cast<float*>(scratch.data) + chunk * (panel_floats + staging);
      int64_t packed = -1;
      for (int64_t t = tasks * chunk / chunks; t < tasks * (chunk + 1) / chunks; ++t) {
        const int64_t n0 = t / blocks * PANEL, m0 = t % blocks * ROWS;
        if (packed != n0)
          pack(a.q, a.R, n0, min(PANEL, a.N - n0), round_up(min(PANEL, a.N - n0), VW), a.alpha,
               a.gate, nullptr, panel, PANEL, panel + panel_floats);
        packed = n0;
        const int64_t m1 = min(m0 + ROWS, a.M);
        expand_tile<T>(a, generator, panel, n0, m0, m1);
      }
    });
  });
}

// backward_pair --------------------------------------------------------------------------------

// Column sums of one block of dY, where the bias or the column scale is trained. Four partial sums
// a block and one sum over blocks: a single one over all rows would err more than torch.sum.
template <typename T>
LK_INLINE void column_sums(const T* dy, int64_t ldy, const T* z, int64_t ldz, int64_t rows,
                           int64_t N, float* dc, float* dbias) {
  for (int64_t n = 0; n < N; n += W) {
    const int rest = (int)min(W, N - n);
    vf bias[4] = {zero(), zero(), zero(), zero()}, c[4] = {zero(), zero(), zero(), zero()};
    for (int64_t m = 0; m < rows; ++m) {
      const vf d = load_n(dy + m * ldy + n, rest);
      bias[m % 4] = add(bias[m % 4], d);
      if (dc) c[m % 4] = fma(d, load_n(z + m * ldz + n, rest), c[m % 4]);
    }
    const vf bias_sum = add(add(bias[0], bias[1]), add(bias[2], bias[3]));
    const vf c_sum = add(add(c[0], c[1]), add(c[2], c[3]));
    if (dbias) store_n(dbias + n, add(load_n(dbias + n, rest), bias_sum), rest);
    if (dc) store_n(dc + n, add(load_n(dc + n, rest), c_sum), rest);
  }
}

// dS = ds_scale * (dZ B) and dB = db_scale * (dZ^T S) * gate, dZ = c * dY, from one read of dY. B^T
// is packed once (c inside); each chunk of rows walks in blocks of PAIR_ROWS: dS as dots over N,
// then the same rows, now in cache, as outer products into the chunk's own dB^T [R, N]. The chunks'
// partial sums are added in order, so a run repeats bit for bit. dc and dbias ride along if
// requested. Tested by tests/ops.
template <typename T, typename TB>
LK_INLINE void pair_rows(const BackwardPairArgs& a, const TB* bt, int64_t ld, int64_t m0,
                         int64_t m1, float* partial, float* dc, float* dbias, float* tile) {
  const int64_t R4 = round_up(a.R, 4);
  const T* const dy = static_cast<const T*>(a.dy.data);
  for (int64_t block = m0; block < m1; block += PAIR_ROWS) {
    const int64_t end = min(block + PAIR_ROWS, m1), depth = end - block;
    const T* first = dy + block * a.dy.row;
    for (int64_t m = block; a.ds && m < end; m += DOT_ROWS) {
      const T* rows[DOT_ROWS];
      for (int64_t i = 0; i < DOT_ROWS; ++i) rows[i] = dy + min(m + i, end - 1) * a.dy.row;
      for (int64_t r = 0; r < a.R; r += 4) {
        const TB* ranks[4];
        for (int64_t j = 0; j < 4; ++j) ranks[j] = bt + min(r + j, a.R - 1) * ld;
        float out[DOT_ROWS][4];
        dot<DOT_ROWS>(rows, ranks, a.N, out);
        for (int64_t i = 0; i < min(DOT_ROWS, end - m); ++i)
          for (int64_t j = 0; j < min(4, a.R - r); ++j)
            a.ds[(m + i) * a.lds + r + j] = out[i][j] * a.ds_scale;
      }
    }
    for (int64_t n = 0; a.db && n < a.N; n += VW) {
      const bool tail = n + VW > a.N;
      if (tail)
        for (int64_t j = 0; j < depth; ++j)
          copy_kept(first + j * a.dy.row + n, tile + j * VW, a.N - n, VW, nullptr, 0, 0);
      for (int64_t r = 0; r < R4; r += 4) {
        const float* s[4];
        for (int64_t i = 0; i < 4; ++i) s[i] = a.s + block * a.lds + min(r + i, a.R - 1);
        float* to = partial + r * ld + n;
        if (tail)
          outer_into(s, a.lds, depth, tile, VW, to, ld, block == m0);
        else
          outer_into(s, a.lds, depth, first + n, a.dy.row, to, ld, block == m0);
      }
    }
    if (dc || dbias)
      column_sums(first, a.dy.row, static_cast<const T*>(a.z) + (dc ? block * a.N : 0), a.N, depth,
                  a.N, dc, dbias);
  }
}

// dB[n, r] = db_scale * gate[r] * c[n] * sum of the chunks' partial[r, n] for n0 <= n < n1, at most
// 64 of them.
LK_INLINE void reduce_db(const BackwardPairArgs& a, const float* partials, int64_t chunks,
                         int64_t chunk_floats, int64_t ld, int64_t n0, int64_t n1, float* block) {
  const int64_t R4 = round_up(a.R, 4);
  float* const sums = block;            // [R4, 64]
  float* const rows = block + 64 * R4;  // [64, R4]
  for (int64_t r = 0; r < a.R; ++r)
    for (int64_t n = 0; n < 64; n += W) {
      vf sum = zero();
      for (int64_t chunk = 0; n0 + n < n1 && chunk < chunks; ++chunk)
        sum = add(sum, load(partials + chunk * chunk_floats + r * ld + n0 + n));
      store(sums + r * 64 + n, sum);
    }
  for (int64_t r = 0; r < R4; r += 4)
    for (int64_t n = 0; n < n1 - n0; n += 4)
      transpose4(sums + r * 64 + n, 64, rows + n * R4 + r, R4);
  with_type(a.db_dtype, [&](auto type) {
    using T = decltype(type);
    T* db = static_cast<T*>(a.db);
    for (int64_t n = n0; n < n1; ++n) {
      const vf scale = splat(a.c ? a.db_scale * a.c[n] : a.db_scale);
      for (int64_t r = 0; r < a.R; r += W) {
        const int rest = (int)min(W, a.R - r);
        vf v = mul(load_n(rows + (n - n0) * R4 + r, rest), scale);
        if (a.gate) v = mul(v, load_n(a.gate + r, rest));
        store_n(db + n * a.R + r, v, rest);
      }
    }
  });
}

// to[n] = c * mask(row 0 of x) in float32, for n up to a multiple of 64; zeros past `count`.
LK_INLINE void widen_row(const Matrix& x, int64_t count, const Dropout& dropout, const float* c,
                         float* to) {
  const Philox generator = philox(dropout);
  with_type(x.dtype, [&](auto type) {
    copy_kept(static_cast<const decltype(type)*>(x.data), to, count, round_up(count, 64),
              dropout.rng ? &generator : nullptr, 0, 0);
  });
  for (int64_t n = 0; c && n < count; ++n) to[n] *= c[n];
}

// sum[j] = dz B for the `count` <= W ranks that begin at b. B's rows are read where they lie, in
// four chains, so that no multiply-add waits for the one before it.
template <typename TB>
LK_INLINE vf row_ds(const float* dz, int64_t N, const TB* b, int64_t stride, int count) {
  constexpr int64_t SPAN = 1024;  // rows of B summed before they are added to the rest
  vf total = zero();
  for (int64_t n = 0; n < N;) {
    vf acc[4] = {zero(), zero(), zero(), zero()};
    const int64_t end = min(n + SPAN, N);
    for (; n + 4 <= end; n += 4) LK_UNROLL for (int i = 0; i < 4; ++i) {
        const TB* row = b + (n + i) * stride;
        acc[i] = fma(splat(dz[n + i]), count == W ? load(row) : load_n(row, count), acc[i]);
      }
    for (; n < end; ++n) acc[0] = fma(splat(dz[n]), load_n(b + n * stride, count), acc[0]);
    total = add(total, add(add(acc[0], acc[1]), add(acc[2], acc[3])));
  }
  return total;
}

// As `backward_pair` for one row, without the packed B^T and the partial dB^T: each is as large as
// B, and writing it costs more than the products of one row.
LK_INLINE void backward_pair_of_row(const BackwardPairArgs& a) {
  Scratch scratch(round_up(a.N, 64) * 4);
  float* const dz = static_cast<float*>(scratch.data);
  widen_row(a.dy, a.N, {}, a.c, dz);
  const bool small = a.N * a.R < SMALL;
  if (a.ds)
    with_type(a.b.dtype, [&](auto type) {
      const auto* b = static_cast<const decltype(type)*>(a.b.data);
      const int64_t vectors = (a.R + W - 1) / W, chunks = small ? 1 : min(a.threads, vectors);
      parallel(a.threads, chunks, [&](int64_t chunk) {
        for (int64_t r = chunk * W; r < a.R; r += chunks * W) {
          const int count = (int)min(W, a.R - r);
          const vf sum = row_ds(dz, a.N, b + r, a.b.row, count);
          store_n(a.ds + r, mul(sum, splat(a.ds_scale)), count);
        }
      });
    });
  if (a.db)
    with_type(a.db_dtype, [&](auto type) {
      auto* db = static_cast<decltype(type)*>(a.db);
      const int64_t chunks = small ? 1 : min(a.threads, a.N);
      parallel(a.threads, chunks, [&](int64_t chunk) {
        for (int64_t n = a.N * chunk / chunks; n < a.N * (chunk + 1) / chunks; ++n)
          for (int64_t r = 0; r < a.R; r += W) {
            const int count = (int)min(W, a.R - r);
            vf v = mul(mul(splat(dz[n]), load_n(a.s + r, count)), splat(a.db_scale));
            if (a.gate) v = mul(v, load_n(a.gate + r, count));
            store_n(db + n * a.R + r, v, count);
          }
      });
    });
  with_type(a.dy.dtype, [&](auto type) {
    const auto* dy = static_cast<const decltype(type)*>(a.dy.data);
    const auto* z = static_cast<const decltype(type)*>(a.z);
    for (int64_t n = 0; n < a.N && (a.dc || a.dbias); ++n) {
      const float d = widen_one(dy + n);
      if (a.dc) a.dc[n] = d * widen_one(z + n);
      if (a.dbias) a.dbias[n] = d;
    }
  });
}

[[maybe_unused]] void backward_pair(const BackwardPairArgs& a) {
  if (a.M == 1 && a.b.col == 1) return backward_pair_of_row(a);
  // Rows that lie a power of two apart would share a few of the cache's sets.
  const int64_t ld = round_up(a.N, 64) + 16, R4 = round_up(a.R, 4);
  const bool small = a.M * a.N * a.R < SMALL;
  const int64_t chunks = small ? 1 : max(1, min(a.threads, a.M / PAIR_ROWS));
  const int64_t blocks = ld / 64, teams = small ? 1 : min(a.threads, blocks);
#ifdef LK_BF16_PAIRS
  const bool bf16_dot = a.dy.dtype == DType::bf16 && a.b.dtype == DType::bf16 && !a.c;
#else
  const bool bf16_dot = false;
#endif
  const int64_t bt_floats = a.ds ? R4 * ld : 0, partial_floats = a.db ? R4 * ld : 0;
  const int64_t sums = (a.dc ? ld : 0) + (a.dbias ? ld : 0), tile = PAIR_ROWS * VW;
  const int64_t chunk_floats = partial_floats + sums + tile;
  const int64_t team_floats = max(64 * R4 * 2, staging_floats(64, a.R));
  Scratch scratch((bt_floats + chunks * chunk_floats + teams * team_floats) * 4);
  float* const bt = static_cast<float*>(scratch.data);
  float* const partials = bt + bt_floats;
  float* const team = partials + chunks * chunk_floats;

  if (a.ds)
    parallel(a.threads, teams, [&](int64_t t) {
      // B is [N, R]; as Q[r, n] its strides change places.
      const Matrix q{.data = a.b.data, .dtype = a.b.dtype, .row = a.b.col, .col = a.b.row};
      for (int64_t i = blocks * t / teams; i < blocks * (t + 1) / teams; ++i) {
        const int64_t n0 = i * 64, count = min(64, a.N - n0);
        if (!bf16_dot) {
          pack(q, a.R, n0, count, 64, 1.0f, nullptr, a.c, bt + n0, ld, team + t * team_floats);
          continue;
        }
        const bf16* b = static_cast<const bf16*>(a.b.data);
        bf16* to = reinterpret_cast<bf16*>(bt);
        for (int64_t r = 0; r < a.R; ++r)
          for (int64_t n = n0; n < n0 + count; ++n) to[r * ld + n] = b[n * a.b.row + r * a.b.col];
      }
    });

  with_type(a.dy.dtype, [&](auto type) {
    using T = decltype(type);
    parallel(a.threads, chunks, [&](int64_t chunk) {
      float* partial = partials + chunk * chunk_floats;
      float* dc = a.dc ? partial + partial_floats : nullptr;
      float* dbias = a.dbias ? partial + partial_floats + (a.dc ? ld : 0) : nullptr;
      for (int64_t i = 0; i < sums; ++i) partial[partial_floats + i] = 0.0f;
      const int64_t m0 = a.M * chunk / chunks, m1 = a.M * (chunk + 1) / chunks;
      if (m0 == m1)  // M = 0
        for (int64_t i = 0; i < partial_floats; ++i) partial[i] = 0.0f;
      float* tail = partial + partial_floats + sums;
      if (bf16_dot)
        pair_rows<T>(a, reinterpret_cast<const bf16*>(bt), ld, m0, m1, partial, dc, dbias, tail);
      else
        pair_rows<T>(a, bt, ld, m0, m1, partial, dc, dbias, tail);
    });
  });

  if (a.db)
    parallel(a.threads, teams, [&](int64_t t) {
      for (int64_t i = blocks * t / teams; i < blocks * (t + 1) / teams; ++i)
        reduce_db(a, partials, chunks, chunk_floats, ld, i * 64, min(i * 64 + 64, a.N),
                  team + t * team_floats);
    });
  for (int64_t n = 0; (a.dc || a.dbias) && n < a.N; ++n) {
    float sum_c = 0.0f, sum_bias = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* partial = partials + chunk * chunk_floats + partial_floats;
      if (a.dc) sum_c += partial[n];
      if (a.dbias) sum_bias += partial[(a.dc ? ld : 0) + n];
    }
    if (a.dc) a.dc[n] = sum_c;
    if (a.dbias) a.dbias[n] = sum_bias;
  }
}

// grad_a ---------------------------------------------------------------------------------------

// As `grad_a` for one row of x: each row of dA is written from end to end. The strips of more rows
// would write STRIP columns of every rank in turn.
LK_INLINE void grad_a_of_row(const GradAArgs& a) {
  Scratch scratch(round_up(a.K, 64) * 4);
  float* const x = static_cast<float*>(scratch.data);
  widen_row(a.x, a.K, a.dropout, nullptr, x);
  const int64_t chunks = a.K * a.R < SMALL ? 1 : min(a.threads, a.R);
  with_type(a.da_dtype, [&](auto type) {
    auto* da = static_cast<decltype(type)*>(a.da);
    parallel(a.threads, chunks, [&](int64_t chunk) {
      for (int64_t r = a.R * chunk / chunks; r < a.R * (chunk + 1) / chunks; ++r)
        for (int64_t k = 0; k < a.K; k += W) {
          const vf v = mul(splat(a.d[r]), load(x + k));
          k + W <= a.K ? store(da + r * a.K + k, v) : store_n(da + r * a.K + k, v, (int)(a.K - k));
        }
    });
  });
}

// dA[R, K] = D^T mask(X). A task is STRIP columns of x by 4 ranks; a thread's tasks share their
// columns, which pass in blocks of DEPTH rows that stay in L1 for all of its ranks. No sum crosses
// threads. Sums in float32, rounded once to A's dtype. Tested by tests/ops.
[[maybe_unused]] void grad_a(const GradAArgs& a) {
  if (a.M == 1) return grad_a_of_row(a);
  const int64_t strips = (a.K + STRIP - 1) / STRIP, quads = (a.R + 3) / 4, tasks = strips * quads;
  const int64_t chunks = a.M * a.K * a.R < SMALL ? 1 : min(a.threads, tasks);
  const Philox generator = philox(a.dropout);
  const int64_t chunk_floats = (4 * quads + DEPTH) * STRIP;
  Scratch scratch(chunks * chunk_floats * 4);
  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x.data);
    parallel(a.threads, chunks, [&](int64_t chunk) {
      float* sums = static_cast<float*>(scratch.data) + chunk * chunk_floats;
      float* tile = sums + 4 * quads * STRIP;
      const int64_t stop = tasks * (chunk + 1) / chunks;
      for (int64_t task = tasks * chunk / chunks, next; task < stop; task = next) {
        const int64_t k = task / quads * STRIP, q0 = task % quads;
        const int64_t q1 = min(quads, q0 + stop - task), width = min(STRIP, a.K - k);
        next = task + q1 - q0;
        for (int64_t i = 0; a.M == 0 && i < 4 * quads * STRIP; ++i) sums[i] = 0.0f;
        for (int64_t m = 0; m < a.M; m += DEPTH) {
          const int64_t depth = min(DEPTH, a.M - m);
          const T* first = x + m * a.x.row + k;
          const bool copy = a.dropout.rng || width < STRIP;
          for (int64_t j = 0; copy && j < depth; ++j)
            copy_kept(first + j * a.x.row, tile + j * STRIP, width, STRIP,
                      a.dropout.rng ? &generator : nullptr, m + j, k);
          for (int64_t q = q0; q < q1; ++q) {
            const float* d[4];
            for (int64_t i = 0; i < 4; ++i) d[i] = a.d + m * a.lds + min(4 * q + i, a.R - 1);
            float* to = sums + 4 * q * STRIP;
            for (int64_t i = 0; i < STRIP; i += VW) {
              if (copy)
                outer_into(d, a.lds, depth, tile + i, STRIP, to + i, STRIP, m == 0);
              else
                outer_into(d, a.lds, depth, first + i, a.x.row, to + i, STRIP, m == 0);
            }
          }
        }
        with_type(a.da_dtype, [&](auto da_type) {
          using TA = decltype(da_type);
          for (int64_t r = 4 * q0; r < min(4 * q1, a.R); ++r)
            for (int64_t i = 0; i < width; i += W)
              store_n(static_cast<TA*>(a.da) + r * a.K + k + i, load(sums + r * STRIP + i),
                      (int)min(W, width - i));
        });
      }
    });
  });
}

}  // namespace
}  // namespace lora_kernels
