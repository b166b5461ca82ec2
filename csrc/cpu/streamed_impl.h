// GEMV: the layer for a few rows of x. Each row of the weight is read once from memory, where it
// lies, and dotted with all rows of x. This file holds the loop over the weight, and the dots of a
// dense weight. Follows kernels_impl.h.
//
// A thread divides its rows of the weight into STREAMS contiguous parts:
//   stream 0    row n,              n + 1, ...
//   stream 1    row n + stride,     n + stride + 1, ...
//   stream 2    row n + 2 stride,   ...
//   stream 3    row n + 3 stride,   ...
// It takes a row of each stream at a time. These rows share the loads of x, and each stream is
// contiguous, which the hardware's prefetcher follows.

namespace lora_kernels {
namespace {

constexpr int STREAMS = 4;                // as many as `sum_lanes` adds at once
constexpr int64_t PREFETCH_BYTES = 1024;  // prefetch distance in a stream
constexpr int PASS_ROWS = 6;              // rows of x that share loads of dense or decoded rows
constexpr int64_t STOLEN_ROWS = 16;       // rows of each stream taken from a queue at a time
constexpr int64_t VICTIMS = 4;            // threads whose queues a thread visits, its own first

// Rows of a dense or decoded weight that are dotted at once with M rows of x: as many as leave
// their sums in three quarters of the 2 W vector registers (an AVX unit's). Loads need the others.
template <int M>
constexpr int DENSE_TILE_ROWS = 8 * M <= 3 * W   ? 4
                                : 4 * M <= 3 * W ? 2
                                                 : 1;

// Divides M rows of x into passes of max_rows at most, whose sizes differ by one at most.
struct Passes {
  int64_t M, short_pass, short_begin;  // rows of a shorter pass; the first row of these
  Passes(int64_t M, int64_t max_rows) : M(M) {
    const int64_t passes = (M + max_rows - 1) / max_rows;
    short_pass = M / passes;
    short_begin = M % passes * (short_pass + 1);
  }
  // Calls f(first row, rows) for all passes.
  template <typename F>
  [[gnu::always_inline]] void for_each(const F& f) const {
    for (int64_t m = 0, rows; m < M; m += rows) f(m, rows = short_pass + (m < short_begin));
  }
};

// Stores the sum of the lanes of total[g][i] in sums[i * lds + g * stream_stride], or adds it there
// unless is_first. With a stream_stride of 0, stream 0 alone is stored.
template <int M>
LK_INLINE void store_sums(const vf total[STREAMS][M], bool is_first, int64_t stream_stride,
                          float* sums, int64_t lds) {
  LK_UNROLL for (int i = 0; i < M; ++i) {
    const vf x_sums[STREAMS] = {total[0][i], total[1][i], total[2][i], total[3][i]};
    float stream_sums[STREAMS];
    sum_lanes(x_sums, stream_sums);
    for (int g = 0; g < (stream_stride ? STREAMS : 1); ++g) {
      float& sum = sums[i * lds + g * stream_stride];
      sum = is_first ? stream_sums[g] : sum + stream_sums[g];
    }
  }
}

// The lanes of total[g][i] sum to x[i] · w[g] over K elements.
template <int J, int M, typename Word, typename T>
LK_INLINE void dot_rows(const T* const w[J], const T* const x[M], int64_t K, vf total[J][M]) {
  constexpr int64_t E = W * ELEMENTS<Word>;
  LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] = zero();
  for (int64_t k = 0; k < K;) {
    vf sum[J][M];
    LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) sum[g][i] = zero();
    const auto step = [&](int64_t count) __attribute__((always_inline)) {
      vf wv[J];
      LK_UNROLL for (int g = 0; g < J; ++g) {
        __builtin_prefetch(reinterpret_cast<const char*>(w[g] + k) + PREFETCH_BYTES, 0, 3);
        wv[g] = load_words(w[g] + k, count, Word{});
      }
      LK_UNROLL for (int i = 0; i < M; ++i) {
        const vf xv = load_words(x[i] + k, count, Word{});
        LK_UNROLL for (int g = 0; g < J; ++g) sum[g][i] = word_fma(xv, wv[g], sum[g][i], Word{});
      }
    };
    for (const int64_t end = min(k + CHAIN<Word> * E, K / E * E); k < end; k += E) step(E);
    if (K - k < E && k < K) {
      step(K - k);
      k = K;
    }
    LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] =
        add(total[g][i], sum[g][i]);
  }
}

// A dense weight for `gemv_streams`, which needs these members of each kind of rows:
//
// scratch_floats  size of a thread's scratch memory, which is `buffer` below
// row(n)          the address of row n, for the first prefetch
// tables()        look-up tables, made once a thread
// dots(tables, n, end, stream_stride, buffer, sums, lds)
//                 sums[m * lds + i + g * stream_stride] = x[m] · row (n + i + g * stream_stride),
//                 for n + i < end, all streams g and all rows m of x
template <typename Word, typename T>
struct DenseRows {
  const Matrix &w, &x;
  int64_t K;
  Passes passes;
  int64_t scratch_floats = 0;
  struct NoTables {};

  const T* row(int64_t n) const { return static_cast<const T*>(w.data) + n * w.col_stride; }
  NoTables tables() const { return {}; }

  template <int Rows>
  [[gnu::always_inline]] void dot_pass(int64_t n, int64_t m, int64_t stream_stride, float* sums,
                                       int64_t lds) const {
    constexpr int J = DENSE_TILE_ROWS<Rows>;
    const T* w_rows[STREAMS];
    const T* x_rows[Rows];
    for (int64_t g = 0; g < STREAMS; ++g) w_rows[g] = row(n + g * stream_stride);
    for (int64_t i = 0; i < Rows; ++i)
      x_rows[i] = static_cast<const T*>(x.data) + (m + i) * x.row_stride;
    vf total[STREAMS][Rows];
    for (int g = 0; g < STREAMS; g += J) dot_rows<J, Rows, Word>(w_rows + g, x_rows, K, total + g);
    store_sums<Rows>(total, true, stream_stride, sums + m * lds, lds);
  }

  [[gnu::noinline]] void dots(const NoTables&, int64_t n, int64_t end, int64_t stream_stride,
                              float*, float* sums, int64_t lds) const {
    for (; n < end; ++n, ++sums)
      passes.for_each([&](int64_t m, int64_t rows) {
#define LK_ROWS(r) \
  if (rows == r) dot_pass<r>(n, m, stream_stride, sums, lds);
        LK_ROWS(1) LK_ROWS(2) LK_ROWS(3) LK_ROWS(4) LK_ROWS(5) LK_ROWS(6)
#undef LK_ROWS
      });
  }
};

// Computes P for the ranks [r0, r1).
[[gnu::noinline]] void shrink_ranks(const ShrinkArgs& a, int64_t r0, int64_t r1) {
  dispatch_dtype(a.x.dtype, [&](auto type) {
    for (int64_t m = 0; m < a.M; m += DOT_ROWS)
      shrink_tile<decltype(type)>(a, m, min(DOT_ROWS, a.M - m), r0, r1, {}, nullptr);
  });
}

// Computes y for the columns [n0, n1), which are rows of the weight, from the base GEMM's sums.
[[gnu::noinline]] void epilogue_columns(const ExpandArgs& u, int64_t n0, int64_t n1,
                                        const float* sums, float* panel, float* staging) {
  const int64_t columns = n1 - n0;
  const auto sums_of = [&](int64_t m, int64_t n, int valid) {
    return load_partial(sums + m * columns + n - n0, valid);
  };
  if (uses_unpacked_q(u)) {
    expand_unpacked(u, n0, n1, sums_of);
    return;
  }
  for (int64_t n = n0; n < n1; n += VW) {
    pack(u.q, u.R, n, min(VW, n1 - n), VW, u.alpha, u.gate, nullptr, panel, VW, staging);
    for (int64_t m = 0; m < u.M; m += Y_ROWS) {
      const int64_t count = min(Y_ROWS, u.M - m);
      const float* s[Y_ROWS];
      for (int64_t i = 0; i < Y_ROWS; ++i) s[i] = u.s + (m + min(i, count - 1)) * u.lds;
      vf acc[Y_ROWS][V];
      rank_tile(s, u.R, panel, VW, acc);
      dispatch_dtype(u.dtype, [&](auto type) {
        epilogue_tile<decltype(type)>(u, m, count, n, n1, acc, [&](int i, int v, int valid) {
          return sums_of(m + i, n + v * W, valid);
        });
      });
    }
  }
}

// The GEMV over one kind of weight.
// 1. Threads divide P's ranks. With dropout, `shrink` computes P before.
// 2. Threads divide the weight's rows. A thread that has finished its own steals rows from the next
//    threads, because memory is slower for some threads than for others, and not always for the
//    same ones.
// 3. After a barrier, each thread runs the epilogue of its own columns, which reads all of P.
template <typename Rows>
LK_INLINE void gemv_streams(const GemvArgs& a, const Rows& weight) {
  const ExpandArgs& u = a.update;
  const int64_t M = u.M, K = a.shrink.K, R = u.R;
  const int64_t threads = M * u.N * K < MIN_PARALLEL_WORK ? 1 : min(u.threads, u.N);
  const int64_t panel_floats = round_up(R, 4) * VW;
  const int64_t counter_floats =
      16;  // a cache line, which holds the next row of the thread's queue
  const int64_t thread_floats =
      round_up(weight.scratch_floats + panel_floats + staging_floats(VW, R), 16) + counter_floats;
  // The place of a sum depends on its row of the weight, and not on the number of threads. So the
  // memory suffices if fewer threads run than requested.
  Scratch scratch((threads * thread_floats + M * u.N) * 4);
  float* const all_sums = static_cast<float*>(scratch.data) + threads * thread_floats;
  const auto next_row_of = [&](int64_t thread) {
    return reinterpret_cast<int64_t*>(static_cast<float*>(scratch.data) + thread * thread_floats);
  };
  for (int64_t thread = 0; thread < threads; ++thread) *next_row_of(thread) = 0;
  const bool has_dropout = a.shrink.dropout.rng;
  if (has_dropout) shrink(a.shrink);
  int arrived = 0;
  parallel_region((int)threads, [&](int64_t thread, int64_t threads) {
    const int64_t n0 = u.N * thread / threads, n1 = u.N * (thread + 1) / threads, rows = n1 - n0;
    float* const buffer =
        static_cast<float*>(scratch.data) + thread * thread_floats + counter_floats;
    float *const panel = buffer + weight.scratch_floats, *const staging = panel + panel_floats,
                 *const sums = all_sums + n0 * M;
    for (int64_t g = 0; g < STREAMS; ++g)
      for (int64_t i = 0; i < PREFETCH_BYTES; i += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(weight.row(n0 + g * (rows / STREAMS))) + i,
                           0, 3);
    if (!has_dropout) shrink_ranks(a.shrink, R * thread / threads, R * (thread + 1) / threads);
    const auto tables = weight.tables();
    // The remaining rows, one at a time. With a stride of 0 all streams are the same row.
    weight.dots(tables, n1 - rows % STREAMS, n1, 0, buffer, sums + rows - rows % STREAMS, rows);
    for (int64_t i_victim = 0; i_victim < min(threads, VICTIMS); ++i_victim) {
      const int64_t victim = (thread + i_victim) % threads;
      const int64_t first = u.N * victim / threads, count = u.N * (victim + 1) / threads - first;
      for (int64_t i, end = count / STREAMS;
           (i = fetch_add(next_row_of(victim), STOLEN_ROWS)) < end;)
        weight.dots(tables, first + i, first + min(i + STOLEN_ROWS, end), end, buffer,
                    all_sums + first * M + i, count);
    }
    arrive(&arrived);
    await(&arrived, (int)threads);
    epilogue_columns(u, n0, n1, sums, panel, staging);
  });
}

}  // namespace
}  // namespace lora_kernels
