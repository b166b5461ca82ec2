// The frame of the layer for a few rows of x: the weight's rows pass once, dotted unpacked with
// all of x's; and the dots of a dense weight. Follows kernels_impl.h.
//
// Several rows of the weight share what is loaded of x, one of each of STREAMS, into which a
// thread's rows are divided: in a stream they follow each other, so that the processor asks ahead.

namespace lora_kernels {
namespace {

constexpr int STREAMS = 4;       // as many as `sum_lanes` takes
constexpr int64_t AHEAD = 1024;  // bytes of a stream's codes prefetched before their turn
constexpr int PASS = 6;          // rows of x that share what is loaded of decoded or dense rows
constexpr int64_t BLOCK = 16;    // rows of each stream that a thread takes at a time
constexpr int64_t HELPED = 4;    // threads whose rows it takes, its own first

// Rows of a dense weight, or of one in memory, that are dotted side by side with M of x: nothing
// else wants registers than what is loaded.
template <int M>
constexpr int DENSE_SIDE_BY_SIDE = 8 * M <= 3 * W   ? 4
                                   : 4 * M <= 3 * W ? 2
                                                    : 1;

// M rows of x, taken in passes of nearly as many each, `most` at most.
struct Passes {
  int64_t M, fewer, longer;  // rows of a shorter pass, and of all those before it
  Passes(int64_t M, int64_t most) : M(M) {
    const int64_t passes = (M + most - 1) / most;
    fewer = M / passes;
    longer = M % passes * (fewer + 1);
  }
  // f(first row, rows) for all passes.
  template <typename F>
  [[gnu::always_inline]] void each(const F& f) const {
    for (int64_t m = 0, rows; m < M; m += rows) f(m, rows = fewer + (m < longer));
  }
};

// sums[i * lds + g * apart] += the sum of total[g][i]'s lanes, or = where it is the first.
template <int M>
LK_INLINE void add_sums(const vf total[STREAMS][M], bool first, int64_t apart, float* sums,
                        int64_t lds) {
  LK_UNROLL for (int i = 0; i < M; ++i) {
    const vf of_x[STREAMS] = {total[0][i], total[1][i], total[2][i], total[3][i]};
    float of_stream[STREAMS];
    sum_lanes(of_x, of_stream);
    for (int g = 0; g < (apart ? STREAMS : 1); ++g) {
      float& sum = sums[i * lds + g * apart];
      sum = first ? of_stream[g] : sum + of_stream[g];
    }
  }
}

// total[g][i] = lanes that add up to x[i] · w[g], for K elements.
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
        __builtin_prefetch(reinterpret_cast<const char*>(w[g] + k) + AHEAD, 0, 3);
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

// A dense weight, its elements multiplied as words, as `few_rows_of` takes one: the scratch memory
// and the tables that each thread needs, the first of a row's bytes, and dots(tables, n, end,
// apart, own, sums, lds): sums[m * lds + i + g * apart] = x[m] · row n + i + g * apart, for all n +
// i < end, all streams g and all rows m of x.
template <typename Word, typename T>
struct DenseRows {
  const Matrix &w, &x;
  int64_t K;
  Passes passes;
  int64_t floats = 0;
  struct None {};

  const T* row(int64_t n) const { return static_cast<const T*>(w.data) + n * w.col; }
  None tables() const { return {}; }

  template <int Rows>
  [[gnu::always_inline]] void dots_of(int64_t n, int64_t m, int64_t apart, float* sums,
                                      int64_t lds) const {
    constexpr int J = DENSE_SIDE_BY_SIDE<Rows>;
    const T* of_w[STREAMS];
    const T* of_x[Rows];
    for (int64_t g = 0; g < STREAMS; ++g) of_w[g] = row(n + g * apart);
    for (int64_t i = 0; i < Rows; ++i) of_x[i] = static_cast<const T*>(x.data) + (m + i) * x.row;
    vf total[STREAMS][Rows];
    for (int g = 0; g < STREAMS; g += J) dot_rows<J, Rows, Word>(of_w + g, of_x, K, total + g);
    add_sums<Rows>(total, true, apart, sums + m * lds, lds);
  }

  [[gnu::noinline]] void dots(const None&, int64_t n, int64_t end, int64_t apart, float*,
                              float* sums, int64_t lds) const {
    for (; n < end; ++n, ++sums)
      passes.each([&](int64_t m, int64_t rows) {
#define LK_ROWS(r) \
  if (rows == r) dots_of<r>(n, m, apart, sums, lds);
        LK_ROWS(1) LK_ROWS(2) LK_ROWS(3) LK_ROWS(4) LK_ROWS(5) LK_ROWS(6)
#undef LK_ROWS
      });
  }
};

// P's ranks from r0 to r1.
[[gnu::noinline]] void some_ranks(const ShrinkArgs& a, int64_t r0, int64_t r1) {
  with_type(a.x.dtype, [&](auto type) {
    for (int64_t m = 0; m < a.M; m += DOT_ROWS)
      shrink_tile<decltype(type)>(a, m, min(DOT_ROWS, a.M - m), r0, r1, {}, nullptr);
  });
}

// y's columns from n0 to n1 from their sums, row after row.
[[gnu::noinline]] void finish_rows(const ExpandArgs& u, int64_t n0, int64_t n1, const float* sums,
                                   float* panel, float* staging) {
  const int64_t rows = n1 - n0;
  const auto sums_of = [&](int64_t m, int64_t n, int rest) {
    return some(sums + m * rows + n - n0, rest);
  };
  if (unpacked(u)) {
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
      with_type(u.dtype, [&](auto type) {
        finish_tile<decltype(type)>(u, m, count, n, n1, acc, [&](int i, int v, int rest) {
          return sums_of(m + i, n + v * W, rest);
        });
      });
    }
  }
}

// Threads divide P's ranks and then the weight's rows, which they stream. At last they steal what
// is left of the next threads' rows: memory is not as fast for one as for another, and not for the
// same one each time. P is waited for with the sums, and consumed last.
template <typename Rows>
LK_INLINE void few_rows_of(const FewRowsArgs& a, const Rows& weight) {
  const ExpandArgs& u = a.update;
  const int64_t M = u.M, K = a.shrink.K, R = u.R;
  const int64_t threads = M * u.N * K < SMALL ? 1 : min(u.threads, u.N);
  const int64_t panel_floats = round_up(R, 4) * VW;
  const int64_t taken_floats = 16;  // a cache line for how many rows of each stream are taken
  const int64_t thread_floats =
      round_up(weight.floats + panel_floats + staging_floats(VW, R), 16) + taken_floats;
  // A thread's sums lie behind those of the rows before it: so there is room for fewer threads,
  // with more rows each, than requested.
  Scratch scratch((threads * thread_floats + M * u.N) * 4);
  float* const all_sums = static_cast<float*>(scratch.data) + threads * thread_floats;
  const auto taken_of = [&](int64_t thread) {
    return reinterpret_cast<int64_t*>(static_cast<float*>(scratch.data) + thread * thread_floats);
  };
  for (int64_t thread = 0; thread < threads; ++thread) *taken_of(thread) = 0;
  const bool masked = a.shrink.dropout.rng;
  if (masked) shrink(a.shrink);
  int arrived = 0;
  together((int)threads, [&](int64_t thread, int64_t threads) {
    const int64_t n0 = u.N * thread / threads, n1 = u.N * (thread + 1) / threads, rows = n1 - n0;
    float* const own = static_cast<float*>(scratch.data) + thread * thread_floats + taken_floats;
    float *const panel = own + weight.floats, *const staging = panel + panel_floats,
                 *const sums = all_sums + n0 * M;
    for (int64_t g = 0; g < STREAMS; ++g)
      for (int64_t i = 0; i < AHEAD; i += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(weight.row(n0 + g * (rows / STREAMS))) + i,
                           0, 3);
    if (!masked) some_ranks(a.shrink, R * thread / threads, R * (thread + 1) / threads);
    const auto tables = weight.tables();
    // Rows that are left over are taken STREAMS times each.
    weight.dots(tables, n1 - rows % STREAMS, n1, 0, own, sums + rows - rows % STREAMS, rows);
    for (int64_t turn = 0; turn < min(threads, HELPED); ++turn) {
      const int64_t of = (thread + turn) % threads;
      const int64_t n0 = u.N * of / threads, rows = u.N * (of + 1) / threads - n0;
      for (int64_t i, end = rows / STREAMS; (i = take(taken_of(of), BLOCK)) < end;)
        weight.dots(tables, n0 + i, n0 + min(i + BLOCK, end), end, own, all_sums + n0 * M + i,
                    rows);
    }
    arrive(&arrived);
    await(&arrived, (int)threads);
    finish_rows(u, n0, n1, sums, panel, staging);
  });
}

}  // namespace
}  // namespace lora_kernels
