#pragma once
// The CPU kernels, written once over the vector type that the including unit has chosen.
//
// Two inner loops do all multiplications:
//   dot    out[m, r] = sum_k X[m, k] A[r, k]        both operands contiguous along the sum
//   outer  acc[i, n] += sum_j P[i, j] Q[j, n]       Q contiguous along n, P broadcast
// P and dS are dots. The rank updates of y and dx, dB and dA are outer products. Sums are float32.
// 16-bit elements are widened as they are loaded.
#include <type_traits>

#include "../common/philox.h"

#if defined(__clang__)
#define LK_UNROLL _Pragma("unroll")
#define LK_ROLL _Pragma("nounroll")
#else
#define LK_UNROLL _Pragma("GCC unroll 16")
#define LK_ROLL _Pragma("GCC unroll 1")
#endif
// Unrolls a whole inner loop. The portable unit keeps it rolled, so that it compiles fast.
#ifdef LK_SMALL
#define LK_UNROLL_FAST LK_ROLL
#else
#define LK_UNROLL_FAST LK_UNROLL
#endif

namespace lora_kernels {
namespace {

constexpr int64_t VW = V * W;             // columns of an outer product
constexpr int64_t PANEL_COLUMNS = 128;    // columns of y whose Q is packed at once
constexpr int64_t EXPAND_ROWS = 96;       // rows of y that one task updates
constexpr int64_t RANK_BLOCK = 64;        // ranks summed in one chain
constexpr int64_t GRAD_A_COLUMNS = 64;    // columns of x in a task of dA: one mask word
constexpr int64_t GRAD_A_ROWS = 128;      // rows of x that stay in L1 for all ranks of dA
constexpr int64_t MAX_UNPACKED_ROWS = 2;  // most rows for which Q is read in place
constexpr int64_t PAIR_ROWS = 32;         // rows of dY that stay in L2 between dS and dB

LK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
LK_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
LK_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <typename F>
LK_INLINE void dispatch_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) f(float{});
  if (dtype == DType::bf16) f(bf16{});
  if (dtype == DType::f16) f(f16{});
}

// Calls f(chunk) for every chunk. Results do not depend on the number of threads.
template <typename F>
LK_INLINE void parallel_for(int threads, int64_t chunks, const F& f) {
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

// Calls f(thread, threads) on all threads at the same time, so that they can wait for one another.
template <typename F>
LK_INLINE void parallel_region(int threads, const F& f) {
  run_threads(
      threads,
      [](void* p, int thread, int threads) { (*static_cast<const F*>(p))(thread, threads); },
      const_cast<F*>(&f));
}

// Loads the first `valid` <= W elements; the other lanes are zero.
template <typename T>
LK_INLINE vf load_partial(const T* p, int valid) {
  return valid == W ? load(p) : load_n(p, valid);
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

LK_INLINE Philox make_philox(const Dropout& d) {
  const uint64_t seed = d.rng ? (uint64_t)d.rng[0] : 0, offset = d.rng ? (uint64_t)d.rng[1] : 0;
  return {(uint32_t)seed,   (uint32_t)(seed >> 32),
          (uint32_t)offset, (uint32_t)(offset >> 32),
          d.threshold,      d.rows};
}

// Bit j is set if dropout keeps element (m, k + j). k is a multiple of 64.
LK_INLINE uint64_t dropout_bits64(const Philox& generator, int64_t m, int64_t k) {
  uint64_t bits = 0;
  if (generator.rows) m = generator.rows[m];
  for (int v = 0; v < 16 / W; ++v) {
    vu c0 = lanes_from((uint32_t)(k / 4) + v * W), c1 = splat_u((uint32_t)m);
    vu c2 = splat_u(generator.offset0), c3 = splat_u(generator.offset1), hi0, lo0, hi1, lo1;
    uint32_t key0 = generator.key0, key1 = generator.key1;
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
    bits |=
        interleave_bits(compare_ge(c0, generator.threshold), compare_ge(c1, generator.threshold),
                        compare_ge(c2, generator.threshold), compare_ge(c3, generator.threshold))
        << (4 * W * v) % 64;
  }
  return bits;
}

// dst[i] = src[i] for i < count, zero where dropout drops the element; zeros up to padded_count. k
// is a multiple of 64, padded_count of W. generator: null without dropout.
template <typename From, typename To>
LK_INLINE void copy_masked(const From* src, To* dst, int64_t count, int64_t padded_count,
                           const Philox* generator, int64_t m, int64_t k) {
  uint64_t bits = ~0ull;
  for (int64_t i = 0; i < padded_count; i += W) {
    if (generator && i % 64 == 0) bits = dropout_bits64(*generator, m, k + i);
    const int64_t remaining = count - i;
    const vf v = remaining >= W  ? load(src + i)
                 : remaining > 0 ? load_n(src + i, (int)remaining)
                                 : zero();
    store(dst + i, generator ? mask_lanes(v, bits >> i % 64) : v);
  }
}

// Inner loops ----------------------------------------------------------------------------------

// Each span of K has a sum of its own: one chain over a long K would round more often than oneDNN's
// blocked GEMM does.
template <int I, typename TX, typename TA>
LK_INLINE void dot(const TX* const x[I], const TA* const a[4], int64_t K, float out[I][4]) {
  constexpr int64_t SPAN = 256 * W;
  int64_t k = 0;
  do {
    vf acc[I][4];
    LK_UNROLL for (int i = 0; i < I; ++i) LK_UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = zero();
    const bool is_first = k == 0;
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
      LK_UNROLL for (int j = 0; j < 4; ++j) out[i][j] =
          is_first ? partial[j] : out[i][j] + partial[j];
    }
  } while (k < K);
}

#ifdef LK_BF16_PAIRS  // the unit has a dot over pairs of bf16
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

// Stores the outer products in rows of c that lie ldc apart, or adds them unless is_first. Each
// block has a sum of its own: one chain over all rows would round more often than oneDNN's blocked
// GEMM does.
template <typename TQ>
LK_INLINE void accumulate_outer(const float* const p[4], int64_t stride_pj, int64_t J, const TQ* q,
                                int64_t stride_qj, float* c, int64_t ldc, bool is_first) {
  vf acc[4][V];
  LK_UNROLL for (int i = 0; i < 4; ++i) LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = zero();
  outer<4>(p, stride_pj, J, q, stride_qj, acc);
  LK_UNROLL for (int i = 0; i < 4; ++i) LK_UNROLL for (int v = 0; v < V; ++v) {
    float* dst = c + i * ldc + v * W;
    store(dst, is_first ? acc[i][v] : add(load(dst), acc[i][v]));
  }
}

// Words ----------------------------------------------------------------------------------------

// The 32-bit words that a sum runs over: bf16x2 if the unit has LK_BF16_PAIRS and both operands are
// bf16, else float.
#ifdef LK_BF16_PAIRS
template <typename T>
using WordOf = std::conditional_t<std::is_same_v<T, bf16>, bf16x2, float>;
#else
template <typename T>
using WordOf = float;
#endif
template <typename Word>
constexpr int64_t ELEMENTS = 1;  // in a word
template <>
constexpr int64_t ELEMENTS<bf16x2> = 2;

// Words summed in one chain. The rounding of a longer one shows in float32 results.
template <typename Word>
constexpr int64_t CHAIN = 160;
template <>
constexpr int64_t CHAIN<bf16x2> = 1024;

LK_INLINE vf word_fma(vf a, vf b, vf acc, float) { return fma(a, b, acc); }

// Loads `elements` elements, at most W words, and sets the remaining lanes to zero.
template <typename T>
LK_INLINE vf load_words(const T* p, int64_t elements, float) {
  return elements >= W ? load(p) : load_n(p, (int)elements);
}

// Packing --------------------------------------------------------------------------------------

template <typename T>
LK_INLINE float load_scalar(const T* p) {
  float lane[W];
  store(lane, load_n(p, 1));
  return lane[0];
}

LK_INLINE void transpose_4x4(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  typedef float v4 __attribute__((vector_size(16)));
  typedef int i4 __attribute__((vector_size(16)));
  v4 r[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], src + i * ld_src, 16);
#if defined(__clang__)
#define LK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i4{__VA_ARGS__})
#endif
  const v4 a = LK_SHUFFLE(r[0], r[1], 0, 4, 1, 5), b = LK_SHUFFLE(r[2], r[3], 0, 4, 1, 5),
           c = LK_SHUFFLE(r[0], r[1], 2, 6, 3, 7), d = LK_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  const v4 t[4] = {LK_SHUFFLE(a, b, 0, 1, 4, 5), LK_SHUFFLE(a, b, 2, 3, 6, 7),
                   LK_SHUFFLE(c, d, 0, 1, 4, 5), LK_SHUFFLE(c, d, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) __builtin_memcpy(dst + i * ld_dst, &t[i], 16);
#undef LK_SHUFFLE
}

// dst[r * ld + n] = alpha * gate[r] * c[n] * Q[r, n] in float32, for n in [n0, n0 + count). Zeros
// fill the ranks up to a multiple of 4 and the columns up to `width`. staging: [count up to 4, R up
// to W].
[[gnu::noinline]] void pack(const Matrix& q, int64_t R, int64_t n0, int64_t count, int64_t width,
                            float alpha, const float* gate, const float* c, float* dst, int64_t ld,
                            float* staging) {
  const int64_t R4 = round_up(R, 4);
  dispatch_dtype(q.dtype, [&](auto type) {
    using T = decltype(type);
    const T* base = static_cast<const T*>(q.data) + n0 * q.col_stride;
    if (q.col_stride == 1) {
      for (int64_t r = 0; r < R; ++r) {
        const vf factor = splat(gate ? alpha * gate[r] : alpha);
        for (int64_t n = 0; n < count; n += W) {
          const int valid = (int)min(W, count - n);
          const T* p = base + r * q.row_stride + n;
          store_n(dst + r * ld + n, mul(factor, valid == W ? load(p) : load_n(p, valid)), valid);
        }
      }
    } else {
      const int64_t lds = round_up(R4, W), count4 = round_up(count, 4);
      for (int64_t n = 0; n < count4; ++n)
        for (int64_t r = 0; r < lds; r += W) {
          const int valid = (int)max(0, min(W, R - r));
          vf v = zero();
          if (n < count && valid > 0) {
            const T* p = base + n * q.col_stride + r * q.row_stride;
            if (q.row_stride == 1) {
              v = valid == W ? load(p) : load_n(p, valid);
            } else {
              float lanes[W] = {};
              for (int i = 0; i < valid; ++i) lanes[i] = load_scalar(p + i * q.row_stride);
              v = load(lanes);
            }
          }
          const vf factor = gate ? mul(splat(alpha), load_n(gate + r, valid)) : splat(alpha);
          store(staging + n * lds + r, mul(factor, v));
        }
      // The last four columns may reach past `count`, with zeros. The loop below fills those after
      // them.
      for (int64_t n = 0; n < count4; n += 4)
        for (int64_t r = 0; r < R4; r += 4) {
          if (width - n >= 4) {
            transpose_4x4(staging + n * lds + r, lds, dst + r * ld + n, ld);
            continue;
          }
          float block[16];
          transpose_4x4(staging + n * lds + r, lds, block, 4);
          for (int64_t i = 0; i < 4; ++i)
            for (int64_t j = 0; j < width - n; ++j) dst[(r + i) * ld + n + j] = block[4 * i + j];
        }
    }
  });
  for (int64_t r = 0; r < R4; ++r) {
    if (c && r < R)
      for (int64_t n = 0; n < count; ++n) dst[r * ld + n] *= c[n0 + n];
    for (int64_t n = r < R ? count : 0; n < width; ++n) dst[r * ld + n] = 0.0f;
  }
}

LK_INLINE int64_t staging_floats(int64_t columns, int64_t R) {
  return round_up(columns, 4) * round_up(round_up(R, 4), W);
}

// shrink ---------------------------------------------------------------------------------------

// P for `count` <= DOT_ROWS rows from m on and the ranks [r0, r1). masked_x [DOT_ROWS, K up to 64]
// gets the rows after dropout; it is not used without dropout.
template <typename TX>
LK_INLINE void shrink_tile(const ShrinkArgs& a, int64_t m, int64_t count, int64_t r0, int64_t r1,
                           const Philox& generator, TX* masked_x) {
  const int64_t K64 = round_up(a.K, 64);
  const TX* rows[DOT_ROWS];
  for (int64_t i = 0; i < DOT_ROWS; ++i) {
    const int64_t row = m + min(i, count - 1);  // a short tile repeats its last row
    rows[i] = static_cast<const TX*>(a.x.data) + row * a.x.row_stride;
    if (a.dropout.rng && i < count)
      copy_masked(rows[i], masked_x + i * K64, a.K, K64, &generator, row, 0);
    if (a.dropout.rng) rows[i] = masked_x + min(i, count - 1) * K64;
  }
  dispatch_dtype(a.a.dtype, [&](auto type) {
    using TA = decltype(type);
    const TA* A = static_cast<const TA*>(a.a.data);
    for (int64_t r = r0; r < r1; r += 4) {
      const TA* ranks[4];
      for (int64_t j = 0; j < 4; ++j) ranks[j] = A + min(r + j, r1 - 1) * a.a.row_stride;
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

// P[M, R] = scale * (mask(X) A^T). A tile is DOT_ROWS rows of x by 4 ranks over all of K. With
// dropout the tile's masked rows are written to a buffer once and read for every rank. Reads x once
// from memory and A once a tile from a cache. Tested by tests/ops.
[[maybe_unused]] void shrink(const ShrinkArgs& a) {
  const int64_t tiles = (a.M + DOT_ROWS - 1) / DOT_ROWS, K64 = round_up(a.K, 64);
  const int64_t chunks = a.M * a.K * a.R < MIN_PARALLEL_WORK ? 1 : min(a.threads, tiles);
  if (!tiles) return;
  const Philox generator = make_philox(a.dropout);
  const int64_t buffer_bytes = a.dropout.rng ? DOT_ROWS * K64 * 4 : 0;
  Scratch scratch(chunks * buffer_bytes);
  dispatch_dtype(a.x.dtype, [&](auto type) {
    using TX = decltype(type);
    parallel_for(a.threads, chunks, [&](int64_t chunk) {
      TX* masked_x = reinterpret_cast<TX*>(static_cast<char*>(scratch.data) + chunk * buffer_bytes);
      const int64_t last = min(a.M, tiles * (chunk + 1) / chunks * DOT_ROWS);
      for (int64_t m = tiles * chunk / chunks * DOT_ROWS; m < last; m += DOT_ROWS)
        shrink_tile(a, m, min(DOT_ROWS, last - m), 0, a.R, generator, masked_x);
    });
  });
}

// expand ---------------------------------------------------------------------------------------

// acc = S Q for Y_ROWS rows of S and VW columns of a packed panel, whose rows lie ld apart.
LK_INLINE void rank_tile(const float* const s[Y_ROWS], int64_t R, const float* panel, int64_t ld,
                         vf acc[Y_ROWS][V]) {
  LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] =
      zero();
  outer<Y_ROWS>(s, 1, min(R, RANK_BLOCK), panel, ld, acc);
  for (int64_t r = RANK_BLOCK; r < R; r += RANK_BLOCK) {
    const float* s_block[Y_ROWS];
    vf block[Y_ROWS][V];
    LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) {
      s_block[i] = s[i] + r;
      LK_UNROLL for (int v = 0; v < V; ++v) block[i][v] = zero();
    }
    outer<Y_ROWS>(s_block, 1, min(R - r, RANK_BLOCK), panel + r * ld, ld, block);
    LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] =
        add(acc[i][v], block[i][v]);
  }
}

// Epilogue of a partial tile: y = c * sum + bias and z = sum, for `count` rows and the columns
// below n1. The function is not inlined, and reads its sums from memory. Inlined into each kernel,
// partial tiles were half of the code and two thirds of the compile time (benchmarks/NOTES.md).
template <typename T>
[[gnu::noinline]] void epilogue_edge(const ExpandArgs& a, int64_t m, int64_t count, int64_t n,
                                     int64_t n1, const float* sum, int64_t ld) {
  const auto store_partial = [](T* dst, vf v, int valid) {
    valid == W ? store(dst, v) : store_n(dst, v, valid);
  };
  LK_ROLL for (int64_t i = 0; i < count; ++i) {
    LK_ROLL for (int64_t column = n; column < n1; column += W) {
      const int valid = (int)min(W, n1 - column);
      vf u = load(sum + i * ld + column - n);
      if (a.z) store_partial(static_cast<T*>(a.z) + (m + i) * a.N + column, u, valid);
      if (a.c) u = mul(u, load_partial(a.c + column, valid));
      if (a.bias) u = add(u, load_partial(a.bias + column, valid));
      store_partial(static_cast<T*>(a.y) + (m + i) * a.ldy + column, u, valid);
    }
  }
}

// Epilogue of a tile whose first element is y[m, n]: y = c * (base + acc) + bias and z = base +
// acc. Stores `count` rows and the columns below n1. y and z round once each. base(i, v, valid)
// loads register v of row i of the base GEMM, with `valid` lanes inside the matrix.
template <typename T, typename Base>
LK_INLINE void epilogue_tile(const ExpandArgs& a, int64_t m, int64_t count, int64_t n, int64_t n1,
                             const vf acc[Y_ROWS][V], const Base& base) {
  if (count < Y_ROWS || n + VW > n1) {
    const int64_t end = min(n + VW, n1);
    float sum[Y_ROWS][VW];
    LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v)
        store(sum[i] + v * W, acc[i][v]);
    const int registers = (int)(end - n + W - 1) / W;
    LK_ROLL for (int i = 0; i < count; ++i) {
      LK_ROLL for (int v = 0; v < registers; ++v) {
        float* const partial = sum[i] + v * W;
        store(partial, add(base(i, v, (int)min(W, end - n - v * W)), load(partial)));
      }
    }
    epilogue_edge<T>(a, m, count, n, end, sum[0], VW);
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
      mask_lanes(acc[i][v], bits[i] >> (shift + v * W));
}

// Y = c * (Y + alpha * mask(S Q)) + bias in place. A task is PANEL_COLUMNS columns of Q, packed
// once in float32 with alpha inside, by EXPAND_ROWS rows of y. y and z round once, when they are
// stored. Reads and writes y once, reads S once a panel and Q once. Tested by tests/ops.
template <typename T>
LK_INLINE void expand_tile(const ExpandArgs& a, const Philox& generator, const float* panel,
                           int64_t n0, int64_t m0, int64_t m1) {
  const int64_t n1 = min(n0 + PANEL_COLUMNS, a.N);
  T* const y = static_cast<T*>(a.y);
  for (int64_t m = m0; m < m1; m += Y_ROWS) {
    const int64_t count = min(Y_ROWS, m1 - m);
    const float* s[Y_ROWS];
    for (int64_t i = 0; i < Y_ROWS; ++i) s[i] = a.s + (m + min(i, count - 1)) * a.lds;
    uint64_t bits[Y_ROWS] = {};
    for (int64_t n = n0; n < n1; n += VW) {
      if (a.dropout.rng && (n - n0) % 64 == 0)
        for (int64_t i = 0; i < count; ++i) bits[i] = dropout_bits64(generator, m + i, n);
      // The next rows come from L3. They lie too far apart for the hardware's prefetcher.
      if (m + 2 * Y_ROWS <= m1 && n + VW <= n1) LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) {
          const char* next = reinterpret_cast<const char*>(y + (m + Y_ROWS + i) * a.ldy + n);
          LK_UNROLL for (int line = 0; line < VW * (int)sizeof(T); line += 64)
              __builtin_prefetch(next + line, 1);
        }
      vf acc[Y_ROWS][V];
      rank_tile(s, a.R, panel + (n - n0), PANEL_COLUMNS, acc);
      if (a.dropout.rng) mask_tile(bits, (n - n0) % 64, acc);
      epilogue_tile<T>(a, m, count, n, n1, acc, [&](int i, int v, int valid) {
        return load_partial(y + (m + i) * a.ldy + n + v * W, valid);
      });
    }
  }
}

// True if packing Q would cost more than the update, as for one or two rows. Columns of Q that are
// contiguous along the ranks are dotted with S; otherwise S scales Q's rows, which are added.
LK_INLINE bool uses_unpacked_q(const ExpandArgs& a) {
  return a.M <= MAX_UNPACKED_ROWS && (a.q.row_stride == 1 || a.q.col_stride == 1) && !a.gate &&
         !a.dropout.rng;
}

// sums[m][j] = (S Q)[m, n + j] for all rows of S and n + j < n1.
template <typename TQ>
[[gnu::noinline]] void unpacked_rank_sums(const ExpandArgs& a, int64_t n, int64_t n1,
                                          float (*sums)[PANEL_COLUMNS]) {
  const TQ* const q = static_cast<const TQ*>(a.q.data);
  for (int64_t m = 0; m < a.M; ++m) {
    for (int64_t j = 0; a.q.row_stride != 1 && j < n1 - n; j += VW) {
      vf sum[V];
      LK_UNROLL for (int v = 0; v < V; ++v) sum[v] = zero();
      for (int64_t r = 0; r < a.R; ++r) {
        const vf s = splat(a.s[m * a.lds + r]);
        const TQ* row = q + r * a.q.row_stride + n + j;
        const int64_t remaining = n1 - n - j;
        LK_UNROLL for (int v = 0; v < V; ++v) sum[v] =
            fma(s, load_partial(row + v * W, (int)max(0, min(W, remaining - v * W))), sum[v]);
      }
      LK_UNROLL for (int v = 0; v < V; ++v) store(sums[m] + j + v * W, sum[v]);
    }
    if (a.q.row_stride != 1) continue;
    const float* const s[1] = {a.s + m * a.lds};
    for (int64_t j = 0; j < n1 - n; j += 4) {
      const TQ* columns[4];
      for (int64_t i = 0; i < 4; ++i) columns[i] = q + min(n + j + i, n1 - 1) * a.q.col_stride;
      dot<1>(s, columns, a.R, reinterpret_cast<float (*)[4]>(sums[m] + j));
    }
  }
}

// y = c * (base + alpha * S Q) + bias for the columns [n0, n1). base(m, n, valid) returns what the
// update is added to: `valid` elements of row m from column n on.
template <typename Base>
LK_INLINE void expand_unpacked(const ExpandArgs& a, int64_t n0, int64_t n1, const Base& base) {
  for (int64_t n = n0; n < n1; n += PANEL_COLUMNS) {
    const int64_t end = min(n + PANEL_COLUMNS, n1);
    float sums[MAX_UNPACKED_ROWS][PANEL_COLUMNS] = {};
    dispatch_dtype(a.q.dtype,
                   [&](auto type) { unpacked_rank_sums<decltype(type)>(a, n, end, sums); });
    for (int64_t m = 0; m < a.M; ++m)
      for (int64_t column = n; column < end; column += W) {
        float* const partial = sums[m] + (column - n);
        store(partial,
              add(base(m, column, (int)min(W, end - column)), mul(load(partial), splat(a.alpha))));
      }
    dispatch_dtype(a.dtype, [&](auto type) {
      epilogue_edge<decltype(type)>(a, 0, a.M, n, end, sums[0], PANEL_COLUMNS);
    });
  }
}

[[maybe_unused]] void expand(const ExpandArgs& a) {
  if (uses_unpacked_q(a)) {
    const int64_t tiles = (a.N + VW - 1) / VW;
    const int64_t chunks = a.M * a.N * a.R < MIN_PARALLEL_WORK ? 1 : min(a.threads, tiles);
    dispatch_dtype(a.dtype, [&](auto type) {
      const auto* const y = static_cast<const decltype(type)*>(a.y);
      parallel_for(a.threads, a.M ? chunks : 0, [&](int64_t chunk) {
        expand_unpacked(a, tiles * chunk / chunks * VW, min(a.N, tiles * (chunk + 1) / chunks * VW),
                        [&](int64_t m, int64_t n, int valid) {
                          return load_partial(y + m * a.ldy + n, valid);
                        });
      });
    });
    return;
  }
  const int64_t panels = (a.N + PANEL_COLUMNS - 1) / PANEL_COLUMNS,
                blocks = (a.M + EXPAND_ROWS - 1) / EXPAND_ROWS;
  const int64_t tasks = panels * blocks, R4 = round_up(a.R, 4);
  if (!tasks) return;
  const int64_t chunks = a.M * a.N * a.R < MIN_PARALLEL_WORK ? 1 : min(a.threads, tasks);
  const Philox generator = make_philox(a.dropout);
  const int64_t panel_floats = R4 * PANEL_COLUMNS, staging = staging_floats(PANEL_COLUMNS, a.R);
  Scratch scratch(chunks * (panel_floats + staging) * 4);
  dispatch_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(a.threads, chunks, [&](int64_t chunk) {
      float* panel = static_cast<float*>(scratch.data) + chunk * (panel_floats + staging);
      int64_t packed = -1;
      for (int64_t t = tasks * chunk / chunks; t < tasks * (chunk + 1) / chunks; ++t) {
        const int64_t n0 = t / blocks * PANEL_COLUMNS, m0 = t % blocks * EXPAND_ROWS;
        if (packed != n0)
          pack(a.q, a.R, n0, min(PANEL_COLUMNS, a.N - n0),
               round_up(min(PANEL_COLUMNS, a.N - n0), VW), a.alpha, a.gate, nullptr, panel,
               PANEL_COLUMNS, panel + panel_floats);
        packed = n0;
        const int64_t m1 = min(m0 + EXPAND_ROWS, a.M);
        expand_tile<T>(a, generator, panel, n0, m0, m1);
      }
    });
  });
}

// backward_pair --------------------------------------------------------------------------------

// Column sums of one block of dY, for the gradients of the bias and the column scale. A block has
// four partial sums: one chain over all rows would have a larger error than torch.sum.
template <typename T>
LK_INLINE void column_sums(const T* dy, int64_t ldy, const T* z, int64_t ldz, int64_t rows,
                           int64_t N, float* dc, float* dbias) {
  for (int64_t n = 0; n < N; n += W) {
    const int valid = (int)min(W, N - n);
    vf bias[4] = {zero(), zero(), zero(), zero()}, c[4] = {zero(), zero(), zero(), zero()};
    for (int64_t m = 0; m < rows; ++m) {
      const vf d = load_n(dy + m * ldy + n, valid);
      bias[m % 4] = add(bias[m % 4], d);
      if (dc) c[m % 4] = fma(d, load_n(z + m * ldz + n, valid), c[m % 4]);
    }
    const vf bias_sum = add(add(bias[0], bias[1]), add(bias[2], bias[3]));
    const vf c_sum = add(add(c[0], c[1]), add(c[2], c[3]));
    if (dbias) store_n(dbias + n, add(load_n(dbias + n, valid), bias_sum), valid);
    if (dc) store_n(dc + n, add(load_n(dc + n, valid), c_sum), valid);
  }
}

// dS = ds_scale * (dZ B) and dB = db_scale * (dZ^T S) * gate with dZ = c * dY, from one read of dY.
// 1. B^T is packed once, c inside.
// 2. Each chunk takes its rows of dY in blocks of PAIR_ROWS: first dS, as dots over N, then dB^T
//    [R, N] as outer products, with the block still in cache.
// 3. The chunks' partial dB^T are added in order, so that two runs have equal bits.
// dc and dbias are summed from the same blocks if requested. Tested by tests/ops.
template <typename T, typename TB>
LK_INLINE void backward_pair_rows(const BackwardPairArgs& a, const TB* bt, int64_t ld, int64_t m0,
                                  int64_t m1, float* partial, float* dc, float* dbias,
                                  float* tile) {
  const int64_t R4 = round_up(a.R, 4);
  const T* const dy = static_cast<const T*>(a.dy.data);
  for (int64_t block = m0; block < m1; block += PAIR_ROWS) {
    const int64_t end = min(block + PAIR_ROWS, m1), depth = end - block;
    const T* dy_block = dy + block * a.dy.row_stride;
    for (int64_t m = block; a.ds && m < end; m += DOT_ROWS) {
      const T* rows[DOT_ROWS];
      for (int64_t i = 0; i < DOT_ROWS; ++i) rows[i] = dy + min(m + i, end - 1) * a.dy.row_stride;
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
          copy_masked(dy_block + j * a.dy.row_stride + n, tile + j * VW, a.N - n, VW, nullptr, 0,
                      0);
      for (int64_t r = 0; r < R4; r += 4) {
        const float* s[4];
        for (int64_t i = 0; i < 4; ++i) s[i] = a.s + block * a.lds + min(r + i, a.R - 1);
        float* db_block = partial + r * ld + n;
        if (tail)
          accumulate_outer(s, a.lds, depth, tile, VW, db_block, ld, block == m0);
        else
          accumulate_outer(s, a.lds, depth, dy_block + n, a.dy.row_stride, db_block, ld,
                           block == m0);
      }
    }
    if (dc || dbias)
      column_sums(dy_block, a.dy.row_stride, static_cast<const T*>(a.z) + (dc ? block * a.N : 0),
                  a.N, depth, a.N, dc, dbias);
  }
}

// dB[n, r] = db_scale * gate[r] * c[n] * sum of the chunks' partial[r, n], for n0 <= n < n1 <= n0 +
// 64.
LK_INLINE void reduce_db(const BackwardPairArgs& a, const float* partials, int64_t chunks,
                         int64_t chunk_floats, int64_t ld, int64_t n0, int64_t n1, float* buffer) {
  const int64_t R4 = round_up(a.R, 4);
  float* const sums = buffer;            // [R4, 64]
  float* const rows = buffer + 64 * R4;  // [64, R4]
  for (int64_t r = 0; r < a.R; ++r)
    for (int64_t n = 0; n < 64; n += W) {
      vf sum = zero();
      for (int64_t chunk = 0; n0 + n < n1 && chunk < chunks; ++chunk)
        sum = add(sum, load(partials + chunk * chunk_floats + r * ld + n0 + n));
      store(sums + r * 64 + n, sum);
    }
  for (int64_t r = 0; r < R4; r += 4)
    for (int64_t n = 0; n < n1 - n0; n += 4)
      transpose_4x4(sums + r * 64 + n, 64, rows + n * R4 + r, R4);
  dispatch_dtype(a.db_dtype, [&](auto type) {
    using T = decltype(type);
    T* db = static_cast<T*>(a.db);
    for (int64_t n = n0; n < n1; ++n) {
      const vf scale = splat(a.c ? a.db_scale * a.c[n] : a.db_scale);
      for (int64_t r = 0; r < a.R; r += W) {
        const int valid = (int)min(W, a.R - r);
        vf v = mul(load_n(rows + (n - n0) * R4 + r, valid), scale);
        if (a.gate) v = mul(v, load_n(a.gate + r, valid));
        store_n(db + n * a.R + r, v, valid);
      }
    }
  });
}

// dst[n] = c[n] * mask(row 0 of x)[n] in float32; zeros from `count` up to a multiple of 64.
LK_INLINE void widen_row(const Matrix& x, int64_t count, const Dropout& dropout, const float* c,
                         float* dst) {
  const Philox generator = make_philox(dropout);
  dispatch_dtype(x.dtype, [&](auto type) {
    copy_masked(static_cast<const decltype(type)*>(x.data), dst, count, round_up(count, 64),
                dropout.rng ? &generator : nullptr, 0, 0);
  });
  for (int64_t n = 0; c && n < count; ++n) dst[n] *= c[n];
}

// Returns (dz B)[j] for `count` <= W ranks, the first of them at b. B is read in place, in four
// chains, so that no multiply-add waits for the one before it.
template <typename TB>
LK_INLINE vf gemv_ds(const float* dz, int64_t N, const TB* b, int64_t stride, int count) {
  constexpr int64_t SPAN = 1024;  // rows of B summed in one chain
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

// `backward_pair` for one row, without the packed B^T and the partial dB^T. Each is as large as B,
// and writing it would cost more than the multiplications of one row.
LK_INLINE void backward_pair_one_row(const BackwardPairArgs& a) {
  Scratch scratch(round_up(a.N, 64) * 4);
  float* const dz = static_cast<float*>(scratch.data);
  widen_row(a.dy, a.N, {}, a.c, dz);
  const bool is_serial = a.N * a.R < MIN_PARALLEL_WORK;
  if (a.ds)
    dispatch_dtype(a.b.dtype, [&](auto type) {
      const auto* b = static_cast<const decltype(type)*>(a.b.data);
      const int64_t vectors = (a.R + W - 1) / W, chunks = is_serial ? 1 : min(a.threads, vectors);
      parallel_for(a.threads, chunks, [&](int64_t chunk) {
        for (int64_t r = chunk * W; r < a.R; r += chunks * W) {
          const int count = (int)min(W, a.R - r);
          const vf sum = gemv_ds(dz, a.N, b + r, a.b.row_stride, count);
          store_n(a.ds + r, mul(sum, splat(a.ds_scale)), count);
        }
      });
    });
  if (a.db)
    dispatch_dtype(a.db_dtype, [&](auto type) {
      auto* db = static_cast<decltype(type)*>(a.db);
      const int64_t chunks = is_serial ? 1 : min(a.threads, a.N);
      parallel_for(a.threads, chunks, [&](int64_t chunk) {
        for (int64_t n = a.N * chunk / chunks; n < a.N * (chunk + 1) / chunks; ++n)
          for (int64_t r = 0; r < a.R; r += W) {
            const int count = (int)min(W, a.R - r);
            vf v = mul(mul(splat(dz[n]), load_n(a.s + r, count)), splat(a.db_scale));
            if (a.gate) v = mul(v, load_n(a.gate + r, count));
            store_n(db + n * a.R + r, v, count);
          }
      });
    });
  dispatch_dtype(a.dy.dtype, [&](auto type) {
    const auto* dy = static_cast<const decltype(type)*>(a.dy.data);
    const auto* z = static_cast<const decltype(type)*>(a.z);
    for (int64_t n = 0; n < a.N && (a.dc || a.dbias); ++n) {
      const float d = load_scalar(dy + n);
      if (a.dc) a.dc[n] = d * load_scalar(z + n);
      if (a.dbias) a.dbias[n] = d;
    }
  });
}

[[maybe_unused]] void backward_pair(const BackwardPairArgs& a) {
  if (a.M == 1 && a.b.col_stride == 1) return backward_pair_one_row(a);
  // Rows that lie a power of two apart would share a few of the cache's sets.
  const int64_t ld = round_up(a.N, 64) + 16, R4 = round_up(a.R, 4);
  const bool is_serial = a.M * a.N * a.R < MIN_PARALLEL_WORK;
  const int64_t chunks = is_serial ? 1 : max(1, min(a.threads, a.M / PAIR_ROWS));
  const int64_t blocks = ld / 64, pack_chunks = is_serial ? 1 : min(a.threads, blocks);
#ifdef LK_BF16_PAIRS
  const bool bf16_dot = a.dy.dtype == DType::bf16 && a.b.dtype == DType::bf16 && !a.c;
#else
  const bool bf16_dot = false;
#endif
  const int64_t bt_floats = a.ds ? R4 * ld : 0, partial_floats = a.db ? R4 * ld : 0;
  const int64_t sums = (a.dc ? ld : 0) + (a.dbias ? ld : 0), tile = PAIR_ROWS * VW;
  const int64_t chunk_floats = partial_floats + sums + tile;
  const int64_t pack_floats = max(64 * R4 * 2, staging_floats(64, a.R));
  Scratch scratch((bt_floats + chunks * chunk_floats + pack_chunks * pack_floats) * 4);
  float* const bt = static_cast<float*>(scratch.data);
  float* const partials = bt + bt_floats;
  float* const pack_scratch = partials + chunks * chunk_floats;

  if (a.ds)
    parallel_for(a.threads, pack_chunks, [&](int64_t t) {
      // B is [N, R]. Its strides change places, since Q is [R, N].
      const Matrix q{.data = a.b.data,
                     .dtype = a.b.dtype,
                     .row_stride = a.b.col_stride,
                     .col_stride = a.b.row_stride};
      for (int64_t i = blocks * t / pack_chunks; i < blocks * (t + 1) / pack_chunks; ++i) {
        const int64_t n0 = i * 64, count = min(64, a.N - n0);
        if (!bf16_dot) {
          pack(q, a.R, n0, count, 64, 1.0f, nullptr, a.c, bt + n0, ld,
               pack_scratch + t * pack_floats);
          continue;
        }
        const bf16* b = static_cast<const bf16*>(a.b.data);
        bf16* dst = reinterpret_cast<bf16*>(bt);
        for (int64_t r = 0; r < a.R; ++r)
          for (int64_t n = n0; n < n0 + count; ++n)
            dst[r * ld + n] = b[n * a.b.row_stride + r * a.b.col_stride];
      }
    });

  dispatch_dtype(a.dy.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(a.threads, chunks, [&](int64_t chunk) {
      float* partial = partials + chunk * chunk_floats;
      float* dc = a.dc ? partial + partial_floats : nullptr;
      float* dbias = a.dbias ? partial + partial_floats + (a.dc ? ld : 0) : nullptr;
      for (int64_t i = 0; i < sums; ++i) partial[partial_floats + i] = 0.0f;
      const int64_t m0 = a.M * chunk / chunks, m1 = a.M * (chunk + 1) / chunks;
      if (m0 == m1)  // M = 0
        for (int64_t i = 0; i < partial_floats; ++i) partial[i] = 0.0f;
      float* tail = partial + partial_floats + sums;
      if (bf16_dot)
        backward_pair_rows<T>(a, reinterpret_cast<const bf16*>(bt), ld, m0, m1, partial, dc, dbias,
                              tail);
      else
        backward_pair_rows<T>(a, bt, ld, m0, m1, partial, dc, dbias, tail);
    });
  });

  if (a.db)
    parallel_for(a.threads, pack_chunks, [&](int64_t t) {
      for (int64_t i = blocks * t / pack_chunks; i < blocks * (t + 1) / pack_chunks; ++i)
        reduce_db(a, partials, chunks, chunk_floats, ld, i * 64, min(i * 64 + 64, a.N),
                  pack_scratch + t * pack_floats);
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

// `grad_a` for one row of x. Each row of dA is written from end to end; `grad_a` would write
// GRAD_A_COLUMNS columns of every rank in turn.
LK_INLINE void grad_a_one_row(const GradAArgs& a) {
  Scratch scratch(round_up(a.K, 64) * 4);
  float* const x = static_cast<float*>(scratch.data);
  widen_row(a.x, a.K, a.dropout, nullptr, x);
  const int64_t chunks = a.K * a.R < MIN_PARALLEL_WORK ? 1 : min(a.threads, a.R);
  dispatch_dtype(a.da_dtype, [&](auto type) {
    auto* da = static_cast<decltype(type)*>(a.da);
    parallel_for(a.threads, chunks, [&](int64_t chunk) {
      for (int64_t r = a.R * chunk / chunks; r < a.R * (chunk + 1) / chunks; ++r)
        for (int64_t k = 0; k < a.K; k += W) {
          const vf v = mul(splat(a.d[r]), load(x + k));
          k + W <= a.K ? store(da + r * a.K + k, v) : store_n(da + r * a.K + k, v, (int)(a.K - k));
        }
    });
  });
}

// dA[R, K] = D^T mask(X). A task is GRAD_A_COLUMNS columns of x by 4 ranks. A thread's tasks share
// their columns, in blocks of GRAD_A_ROWS rows that stay in L1 for all of its ranks. No sum crosses
// threads. Sums in float32, rounded once to A's dtype. Tested by tests/ops.
[[maybe_unused]] void grad_a(const GradAArgs& a) {
  if (a.M == 1) return grad_a_one_row(a);
  const int64_t strips = (a.K + GRAD_A_COLUMNS - 1) / GRAD_A_COLUMNS, quads = (a.R + 3) / 4,
                tasks = strips * quads;
  const int64_t chunks = a.M * a.K * a.R < MIN_PARALLEL_WORK ? 1 : min(a.threads, tasks);
  const Philox generator = make_philox(a.dropout);
  const int64_t chunk_floats = (4 * quads + GRAD_A_ROWS) * GRAD_A_COLUMNS;
  Scratch scratch(chunks * chunk_floats * 4);
  dispatch_dtype(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x.data);
    parallel_for(a.threads, chunks, [&](int64_t chunk) {
      float* sums = static_cast<float*>(scratch.data) + chunk * chunk_floats;
      float* tile = sums + 4 * quads * GRAD_A_COLUMNS;
      const int64_t stop = tasks * (chunk + 1) / chunks;
      for (int64_t task = tasks * chunk / chunks, next; task < stop; task = next) {
        const int64_t k = task / quads * GRAD_A_COLUMNS, q0 = task % quads;
        const int64_t q1 = min(quads, q0 + stop - task), width = min(GRAD_A_COLUMNS, a.K - k);
        next = task + q1 - q0;
        for (int64_t i = 0; a.M == 0 && i < 4 * quads * GRAD_A_COLUMNS; ++i) sums[i] = 0.0f;
        for (int64_t m = 0; m < a.M; m += GRAD_A_ROWS) {
          const int64_t depth = min(GRAD_A_ROWS, a.M - m);
          const T* x_block = x + m * a.x.row_stride + k;
          const bool is_copied = a.dropout.rng || width < GRAD_A_COLUMNS;
          for (int64_t j = 0; is_copied && j < depth; ++j)
            copy_masked(x_block + j * a.x.row_stride, tile + j * GRAD_A_COLUMNS, width,
                        GRAD_A_COLUMNS, a.dropout.rng ? &generator : nullptr, m + j, k);
          for (int64_t q = q0; q < q1; ++q) {
            const float* d[4];
            for (int64_t i = 0; i < 4; ++i) d[i] = a.d + m * a.lds + min(4 * q + i, a.R - 1);
            float* da_block = sums + 4 * q * GRAD_A_COLUMNS;
            for (int64_t i = 0; i < GRAD_A_COLUMNS; i += VW) {
              if (is_copied)
                accumulate_outer(d, a.lds, depth, tile + i, GRAD_A_COLUMNS, da_block + i,
                                 GRAD_A_COLUMNS, m == 0);
              else
                accumulate_outer(d, a.lds, depth, x_block + i, a.x.row_stride, da_block + i,
                                 GRAD_A_COLUMNS, m == 0);
            }
          }
        }
        dispatch_dtype(a.da_dtype, [&](auto da_type) {
          using TA = decltype(da_type);
          for (int64_t r = 4 * q0; r < min(4 * q1, a.R); ++r)
            for (int64_t i = 0; i < width; i += W)
              store_n(static_cast<TA*>(a.da) + r * a.K + k + i, load(sums + r * GRAD_A_COLUMNS + i),
                      (int)min(W, width - i));
        });
      }
    });
  });
}

}  // namespace
}  // namespace lora_kernels
