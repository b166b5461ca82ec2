// The layer for a few rows of x, whose weight may be of 4-bit codes. Follows codes_impl.h and
// streamed_impl.h.
//
// CODES codes are looked up in registers at a time, eight neighbours, which one scale has, in each
// lane; up to CODED_PASS rows of x share a look-up. Many rows of x take codes that were decoded to
// memory, in pieces that stay in the L1 cache.

namespace lora_kernels {
namespace {

constexpr int64_t CODES = 8 * W;
constexpr int CODED_PASS = 8;                // rows of x that share a look-up
constexpr int64_t SLAB = 24576;              // bytes of x that stay in the L1 cache while rows pass
constexpr int64_t DECODED = 16384;           // bytes of decoded codes that stay there
constexpr int64_t CHAIN_CODES = 20 * CODES;  // in one chain before it is added to the rest

// Rows of x from which on codes are decoded to memory, where there are registers for the sums of 4
// rows by PASS.
constexpr bool DECODES = W == 16;
template <typename X>
constexpr int64_t DECODED_FROM = 9;
template <>
constexpr int64_t DECODED_FROM<float> = 8;

// Rows of the weight decoded side by side for M of x: their sums take half of the 2 W
// registers.
template <int M>
constexpr int SIDE_BY_SIDE = 4 * M <= W   ? 4
                             : 2 * M <= W ? 2
                                          : 1;

// In float32 ----------------------------------------------------------------------------------

constexpr int SCALED_LAST = 2;  // rows of x whose sums cost less to scale than the codes

// K elements as `dot_chunk` takes them, CODES at a time and `stride` apart: lane l of vector j is
// element 8 l + j. If K is no multiple of eight, the order is unchanged.
template <typename T>
LK_INLINE void order(const T* from, int64_t K, float* to, int64_t stride) {
  if (K % 8) {
    for (int64_t k = 0; k < K; k += CODES, to += stride)
      copy_kept(from + k, to, K - k, CODES, nullptr, 0, 0);
    return;
  }
  for (int64_t k = 0; k < K; k += CODES, to += stride) {
    float all[CODES];
    copy_kept(from + k, all, K - k, CODES, nullptr, 0, 0);
    for (int64_t l = 0; l < W; l += 4)
      for (int64_t j = 0; j < 8; j += 4) transpose4(all + 8 * l + j, 8, to + j * W + l, W);
  }
}

// to[0 .. CODES) = scale * codes, in that order
LK_INLINE void decode_chunk(vu codes, const Table& t, vf scale, float* to) {
  LK_UNROLL for (int j = 0; j < 8; ++j) store(to + j * W, mul(look_up(t, codes, j), scale));
}

// total[g][i] += x[i] · (scale[g] * codes[g]), x: CODES elements of each of M rows
template <int J, int M>
LK_INLINE void dot_chunk(const vu codes[J], const Table& t, const vf scale[J], const float* x,
                         vf total[J][M]) {
  constexpr bool last = M <= SCALED_LAST;
  vf chunk[J][M];
  LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) chunk[g][i] =
      last ? zero() : total[g][i];
  LK_UNROLL for (int j = 0; j < 8; ++j) {
    vf v[J];
    LK_UNROLL for (int g = 0; g < J; ++g) {
      v[g] = look_up(t, codes[g], j);
      if (!last) v[g] = mul(v[g], scale[g]);
    }
    LK_UNROLL for (int i = 0; i < M; ++i) {
      const vf xv = load(x + i * CODES + j * W);
      LK_UNROLL for (int g = 0; g < J; ++g) chunk[g][i] = fma(xv, v[g], chunk[g][i]);
    }
  }
  LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] =
      last ? fma(chunk[g][i], scale[g], total[g][i]) : chunk[g][i];
}

// The lanes of total[g][i] add up to the elements from k0 to k1 of x[i] times those of row `row + g
// * apart` of the weight. That of row's first element is the scale of element `start` behind
// `scales`, a block's first; `stride` behind those are the next row's. Whole: rows begin where
// blocks do.
template <int J, int M, bool Whole, typename X, typename T>
LK_INLINE void dot_codes(const Codes4bit& w, const T& t, int64_t row, int64_t apart,
                         const float* scales, int64_t stride, int64_t start, const X* x, int64_t k0,
                         int64_t k1, vf total[J][M]) {
  static_assert(Whole || J == 1);
  const int log2 = w.log2_block;
  const int64_t bytes = apart * w.K >> 1;
  const uint8_t* p = w.packed + ((row * w.K + k0) >> 1);
  const int64_t ahead = k1 - k0 < w.K ? w.K >> 1 : AHEAD;
  x += k0 * M;
  const vu aligned = lane_blocks(0, log2);
  vf sum[J][M];
  const auto step = [&](int64_t k, int filled) __attribute__((always_inline)) {
    const float* const s = scales + ((start + k) >> log2);
    const vu lanes = Whole ? aligned : lane_blocks((start + k) & ((int64_t{1} << log2) - 1), log2);
    vu codes[J];
    vf scale[J];
    LK_UNROLL for (int g = 0; g < J; ++g) {
      __builtin_prefetch(p + g * bytes + ahead, 0, 3);
      codes[g] = load_codes(p + g * bytes, filled);
      scale[g] = pick(s + g * stride, lanes, filled);
    }
    p += CODES / 2;
    dot_chunk<J, M>(codes, t, scale, x, sum);
    x += M * CODES;
  };
  LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] = zero();
  for (int64_t k = k0; k < k1;) {
    LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) sum[g][i] = zero();
    for (const int64_t end = min(k + CHAIN_CODES, k1 / CODES * CODES); k < end; k += CODES)
      step(k, W);
    if (k1 - k < CODES && k < k1) {
      step(k, (int)(k1 - k) / 8);
      k = k1;
    }
    LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] =
        add(total[g][i], sum[g][i]);
  }
}

// f(row, where its first CODES elements are, from there to its next) for all rows: of one pass,
// these lie together, then the next of each.
template <typename F>
LK_INLINE void each_row(const Passes& passes, int64_t ldx, const F& f) {
  passes.each([&](int64_t m, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) f(m + i, m * ldx + i * CODES, rows * CODES);
  });
}

// K in equal slabs, of whole CODES, that take no more than `most` bytes or little more.
LK_INLINE int64_t even_slab(int64_t K, int64_t bytes, int64_t most) {
  const int64_t slabs = (K * bytes + most - 1) / most;
  return round_up((K + slabs - 1) / slabs, CODES);
}

// The layer -----------------------------------------------------------------------------------

// Rows of a stream whose scales are decoded together, some time before they are loaded in other
// widths than they were stored; and how many those are at most, W more being read.
LK_INLINE int64_t batch_rows(const Codes4bit& w) {
  return max(1, (int64_t{512} << w.log2_block) / w.K);
}
LK_INLINE int64_t batch_scales(const Codes4bit& w) {
  return (batch_rows(w) * w.K >> w.log2_block) + 2 + W;
}

// How far behind the first element of row `first`'s first block the row begins that is `n` after
// it.
LK_INLINE int64_t start_of(const Codes4bit& w, int64_t first, int64_t n) {
  return n * w.K + (first * w.K & ((int64_t{1} << w.log2_block) - 1));
}

// sums[i * lds + n + g * apart - first] = x[i] · row n + g * apart of the weight, for first <= n <
// end and all streams g. scales: those of g's first block on, `stride` behind the last stream's.
template <int M, typename X, typename T>
LK_INLINE void dot_streams(const Codes4bit& w, const T& t, const X* x, int64_t first, int64_t end,
                           int64_t apart, const float* scales, int64_t stride, float* sums,
                           int64_t lds) {
  constexpr int J = SIDE_BY_SIDE<M>;
  const bool whole = w.K % (int64_t{1} << w.log2_block) == 0;
  const int64_t slab = even_slab(w.K, M * int64_t{sizeof(X)}, SLAB);
  for (int64_t k0 = 0; k0 < w.K; k0 += slab) {
    const int64_t k1 = min(k0 + slab, w.K);
    for (int64_t n = first; n < end; ++n) {
      vf total[STREAMS][M];
      if (whole) {
        LK_UNROLL_FAST for (int g = 0; g < STREAMS; g += J)
            dot_codes<J, M, true>(w, t, n + g * apart, apart, scales + g * stride, stride,
                                  start_of(w, first + g * apart, n - first), x, k0, k1, total + g);
      } else {
        for (int g = 0; g < STREAMS; ++g)
          dot_codes<1, M, false>(w, t, n + g * apart, apart, scales + g * stride, stride,
                                 start_of(w, first + g * apart, n - first), x, k0, k1, total + g);
      }
      add_sums<M>(total, !k0, apart, sums + n - first, lds);
    }
  }
}

template <typename X, typename T>
LK_INLINE void dot_streams(int64_t M, const Codes4bit& w, const T& t, const X* x, int64_t first,
                           int64_t end, int64_t apart, const float* scales, int64_t stride,
                           float* sums, int64_t lds) {
#define LK_ROWS(m) \
  if (M == m) dot_streams<m>(w, t, x, first, end, apart, scales, stride, sums, lds);
  LK_ROWS(1) LK_ROWS(2) LK_ROWS(3) LK_ROWS(4) LK_ROWS(5) LK_ROWS(6) LK_ROWS(7) LK_ROWS(8)
#undef LK_ROWS
}

// f(n, end, sums of n) for the rows from n to `stop` of each stream, as many at a time as scales
// are decoded of, `stride` apart.
template <typename F>
LK_INLINE void each_batch(const Codes4bit& w, const Table256& nested, int64_t n, int64_t stop,
                          int64_t apart, float* scales, int64_t stride, float* sums, const F& f) {
  for (int64_t end; n < stop; sums += end - n, n = end) {
    end = min(stop, n + batch_rows(w));
    for (int64_t g = 0; g < STREAMS; ++g) {
      const int64_t block = (n + g * apart) * w.K >> w.log2_block;
      const int64_t last = ((end + g * apart) * w.K - 1) >> w.log2_block;
      scales_of(w, nested, block, last - block + 1, scales + g * stride);
    }
    f(n, end, sums);
  }
}

// A 4-bit weight for `few_rows_of`, its codes dotted as they are looked up.
template <typename X, typename T>
struct CodedRows {
  const Codes4bit& w;
  const T& code;
  const X* x;
  int64_t ldx;
  Passes passes;
  int64_t stream_scales = batch_scales(w), floats = STREAMS * stream_scales;

  const uint8_t* row(int64_t n) const { return w.packed + (n * w.K >> 1); }
  Table256 tables() const { return table_256(w.nested_code); }

  [[gnu::noinline]] void dots(const Table256& nested, int64_t n, int64_t stop, int64_t apart,
                              float* scales, float* sums, int64_t lds) const {
    each_batch(w, nested, n, stop, apart, scales, stream_scales, sums,
               [&](int64_t n, int64_t end, float* sums) {
                 passes.each([&](int64_t m, int64_t rows) {
                   dot_streams(rows, w, code, x + m * ldx, n, end, apart, scales, stream_scales,
                               sums + m * lds, lds);
                 });
               });
  }
};

// to[0 .. ) = row `row`'s elements from k0 to k1, in the order of x's, with zeros up to a multiple
// of CODES. scales, start: as of dot_codes. Prefetches codes as far ahead as these reach.
template <bool Whole, typename X, typename T>
LK_INLINE void decode_slab(const Codes4bit& w, const T& t, int64_t row, const float* scales,
                           int64_t start, int64_t k0, int64_t k1, X* to) {
  const int log2 = w.log2_block;
  const uint8_t* p = w.packed + ((row * w.K + k0) >> 1);
  const int64_t ahead = (k1 - k0) >> 1;
  const vu aligned = lane_blocks(0, log2);
  const auto step = [&](int64_t k, int filled) __attribute__((always_inline)) {
    const vu lanes = Whole ? aligned : lane_blocks((start + k) & ((int64_t{1} << log2) - 1), log2);
    __builtin_prefetch(p + ahead, 0, 3);
    decode_chunk(load_codes(p, filled), t, pick(scales + ((start + k) >> log2), lanes, filled), to);
    p += CODES / 2;
    to += CODES;
  };
  int64_t k = k0;
  for (; k + CODES <= k1; k += CODES) step(k, W);
  if (k < k1) step(k, (int)(k1 - k) / 8);
}

// total[g][i] = lanes that add up to x[i] · w[g], for `count` elements, of CODES at a time.
template <int J, int M, typename Word, typename X>
LK_INLINE void dot_decoded(const X* w, int64_t ldw, const X* x, int64_t count, vf total[J][M]) {
  constexpr int64_t E = W * ELEMENTS<Word>;
  LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] = zero();
  for (int64_t k = 0; k < count; k += CODES, x += M * CODES)
    for (int64_t j = 0; j < CODES; j += E) {
      vf wv[J];
      LK_UNROLL for (int g = 0; g < J; ++g) wv[g] = load_words(w + g * ldw + k + j, E, Word{});
      LK_UNROLL for (int i = 0; i < M; ++i) {
        const vf xv = load_words(x + i * CODES + j, E, Word{});
        LK_UNROLL for (int g = 0; g < J; ++g) total[g][i] =
            word_fma(xv, wv[g], total[g][i], Word{});
      }
    }
}

// The same with codes that are decoded to memory a slab of one row of each stream at a time: for
// many rows of x, and for rows that are not of whole eights.
template <typename Word, typename X, typename T>
struct DecodedRows {
  const Codes4bit& w;
  const T& code;
  const X* x;
  int64_t ldx;
  Passes passes;
  int64_t slab = even_slab(w.K, STREAMS* int64_t{sizeof(X)}, DECODED);
  int64_t stream_scales = batch_scales(w), scale_floats = round_up(STREAMS * stream_scales, 16);
  int64_t floats = scale_floats + STREAMS * slab * int64_t{sizeof(X)} / 4;

  const uint8_t* row(int64_t n) const { return w.packed + (n * w.K >> 1); }
  Table256 tables() const { return table_256(w.nested_code); }

  // Elements k0 to k1 of row n and its neighbours in the other streams, `slab` apart.
  [[gnu::always_inline]] void decode(int64_t first, int64_t n, int64_t apart, const float* scales,
                                     int64_t k0, int64_t k1, X* to) const {
    const bool whole = w.K % (int64_t{1} << w.log2_block) == 0;
    for (int64_t g = 0; g < STREAMS; ++g, to += slab, scales += stream_scales) {
      const int64_t row = n + g * apart, start = start_of(w, first + g * apart, n - first);
      if constexpr (std::is_same_v<X, float>)
        if (w.K % 8) {
          decode_row(w, code, row, k0, k1 - k0, to);
          for (int64_t k = k1 - k0; k % CODES; ++k) to[k] = 0.0f;
          continue;
        }
      if (whole)
        decode_slab<true>(w, code, row, scales, start, k0, k1, to);
      else
        decode_slab<false>(w, code, row, scales, start, k0, k1, to);
    }
  }

  // sums[i * lds + g * apart] += x[i] · row g of `decoded`, or = where it is the first.
  template <int Rows>
  [[gnu::always_inline]] void add_dots(const X* decoded, const X* x, int64_t count, bool first,
                                       int64_t apart, float* sums, int64_t lds) const {
    constexpr int J = DENSE_SIDE_BY_SIDE<Rows>;
    vf total[STREAMS][Rows];
    for (int g = 0; g < STREAMS; g += J)
      dot_decoded<J, Rows, Word>(decoded + g * slab, slab, x, count, total + g);
    add_sums<Rows>(total, first, apart, sums, lds);
  }

  // Adds the sums of one row of each stream; `decoded` is the slab from k0 on.
  [[gnu::always_inline]] void add_slab(const X* decoded, int64_t k0, int64_t count, int64_t apart,
                                       float* sums, int64_t lds) const {
    passes.each([&](int64_t m, int64_t rows) {
      const X* const from = x + m * ldx + k0 * rows;
      float* const to = sums + m * lds;
#define LK_ROWS(r) \
  if (rows == r) add_dots<r>(decoded, from, count, !k0, apart, to, lds);
      LK_ROWS(1) LK_ROWS(2) LK_ROWS(3) LK_ROWS(4) LK_ROWS(5) LK_ROWS(6)
#undef LK_ROWS
    });
  }

  [[gnu::noinline]] void dots(const Table256& nested, int64_t n, int64_t stop, int64_t apart,
                              float* scales, float* sums, int64_t lds) const {
    X* const decoded = reinterpret_cast<X*>(scales + scale_floats);
    each_batch(w, nested, n, stop, apart, scales, stream_scales, sums,
               [&](int64_t first, int64_t end, float* sums) {
                 for (int64_t n = first; n < end; ++n, ++sums)
                   for (int64_t k0 = 0; k0 < w.K; k0 += slab) {
                     const int64_t k1 = min(k0 + slab, w.K);
                     decode(first, n, apart, scales, k0, k1, decoded);
                     add_slab(decoded, k0, k1 - k0, apart, sums, lds);
                   }
               });
  }
};

template <typename X>
LK_INLINE bool decodes(int64_t M, int64_t K) {
  return K % 8 || (DECODES && M >= DECODED_FROM<X>);
}
template <typename X>
LK_INLINE Passes coded_passes(int64_t M, int64_t K) {
  return {M, decodes<X>(M, K) ? PASS : CODED_PASS};
}

template <typename Word, typename X, typename T>
LK_INLINE void few_coded_rows(const FewRowsArgs& a, const T& code, const X* x, int64_t ldx,
                              const Passes& passes) {
  if (decodes<X>(passes.M, a.shrink.K))
    few_rows_of(a, DecodedRows<Word, X, T>{*a.codes, code, x, ldx, passes});
  else
    few_rows_of(a, CodedRows<X, T>{*a.codes, code, x, ldx, passes});
}

// P = scale * (mask(X) A^T); y[M, N] = c * (x W^T + (P * gate * alpha) Q) + bias for few rows.
// Sums in float32, y rounds once (z likewise); codes keep at least 17 bits until the sum, except
// for three rows of bf16 or more on avx512bf16, where code times scale is rounded to bf16. Reads
// each byte of the weight once from memory. Tested by tests/ops.
void few_rows(const FewRowsArgs& a) {
  const int64_t M = a.update.M, K = a.shrink.K;
  if (!M) return;
  if (!a.codes) {
    with_type(a.x.dtype, [&](auto type) {
      using T = decltype(type);
      few_rows_of(a, DenseRows<WordOf<T>, T>{a.w, a.x, K, {M, PASS}});
    });
    return;
  }
  const Codes4bit& codes = *a.codes;
  const int64_t ldx = round_up(K, CODES);
  Scratch scratch(M * ldx * 4);
#ifdef LK_BF16_PAIRS
  if (a.pairs && a.x.dtype == DType::bf16 && K % 8 == 0) {
    bf16* const x = static_cast<bf16*>(scratch.data);
    const Passes passes = coded_passes<bf16>(M, K);
    each_row(passes, ldx, [&](int64_t m, int64_t at, int64_t stride) {
      order_words(static_cast<const bf16*>(a.x.data) + m * a.x.row, K, M <= EXACT_ROWS, x + at,
                  stride);
    });
    few_coded_rows<Pair>(a, pair_tables(codes.code), x, ldx, passes);
    return;
  }
#endif
  float* const x = static_cast<float*>(scratch.data);
  const Passes passes = coded_passes<float>(M, K);
  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    each_row(passes, ldx, [&](int64_t m, int64_t at, int64_t stride) {
      order(static_cast<const T*>(a.x.data) + m * a.x.row, K, x + at, stride);
    });
  });
  few_coded_rows<float>(a, table(codes.code), x, ldx, passes);
}

}  // namespace
}  // namespace lora_kernels
