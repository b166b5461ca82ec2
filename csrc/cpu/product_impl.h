#pragma once
// The fused layer, for the AVX-512 units: base GEMM, rank update and epilogue of a
// tile of y while its sums are in registers. Follows codes_impl.h.
//
// The sum runs over words. Other 16-bit elements are widened as W is packed and x is read. A 4-bit
// W is decoded a panel at a time, to bf16 beside pairs and to float32 else, and never written to
// memory.

namespace lora_kernels {
namespace {

constexpr int64_t WORDS = 1024;      // of the sum in one packed panel at most: 256 KB of L2
constexpr int64_t SHALLOW = 512;     // where a deep one does not pay, see `depth_of`
constexpr int64_t BLOCK_ROWS = 960;  // that share a packed panel: 240 KB of sums
constexpr int64_t TILE = Y_ROWS * VW;

template <typename Word>
LK_INLINE vf splat_word(const Word* p) {
  float word;
  __builtin_memcpy(&word, p, sizeof word);
  return splat(word);
}

// Where a packed panel has word w of column n: w * ld + n / W * apart + n % W.
struct Layout {
  int64_t ld = VW, apart = W;
};

// A row's even and odd elements of a sum, for 16 rows: one row of pairs, or two of floats.
LK_INLINE void store_words(float* to, vf even, vf odd, float) {
  store(to, even);
  store(to + VW, odd);
}

// 2 W columns, the even ones apart from the odd, in order.
LK_INLINE void store_columns(float* to, int64_t apart, const vf even[1], const vf odd[1], float) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0),
                high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  store(to, _mm512_permutex2var_ps(even[0], low, odd[0]));
  store(to + apart, _mm512_permutex2var_ps(even[0], high, odd[0]));
}

// VW columns of `count` words (a[n]), or pairs (a[n], b[n]) where b may be null; zero beyond.
template <typename T>
LK_INLINE void pack_row(const T* a, const T*, int64_t count, float* to, int64_t apart, float) {
  for (int64_t n = 0; n < VW; n += W)
    store(to + n / W * apart, n < count ? load_words(a + n, count - n, float{}) : zero());
}
#ifdef LK_BF16_PAIRS
LK_INLINE void pack_row(const bf16* a, const bf16* b, int64_t count, float* to, int64_t apart,
                        Pair) {
  for (int64_t n = 0; n < VW; n += 2 * W)
    interleave(a + n, b ? b + n : nullptr, max(0, count - n), to + n / W * apart, apart);
}
#endif

// W[k0 + k, n0 + n] for `depth` elements k and `count` columns, zero beyond both; up to W - 1
// words past the last are written.
template <typename Word, typename T>
LK_INLINE void pack_words(const Matrix& w, int64_t k0, int64_t depth, int64_t n0, int64_t count,
                          float* to, const Layout& at) {
  constexpr int64_t E = ELEMENTS<Word>;
  const T* const from = static_cast<const T*>(w.data) + k0 * w.row + n0 * w.col;
  if (w.col == 1) {
    for (int64_t k = 0; k < depth; k += E, to += at.ld) {
      const T* row = from + k * w.row;
      pack_row(row, k + 1 < depth ? row + w.row : nullptr, count, to, at.apart, Word{});
    }
    return;
  }
  for (int64_t n = 0; n < VW; n += W)
    for (int64_t k = 0; k < depth; k += W * E) {
      vf r[W];
      const T* rows = from + n * w.col + k;
      if (n + W <= count && k + W * E <= depth)
        LK_UNROLL for (int i = 0; i < W; ++i) r[i] = load_words(rows + i * w.col, W * E, Word{});
      else
        LK_UNROLL for (int i = 0; i < W; ++i) r[i] =
            n + i < count ? load_words(rows + i * w.col, depth - k, Word{}) : zero();
      transpose(r);
      float* const tile = to + k / E * at.ld + n / W * at.apart;
      LK_UNROLL for (int i = 0; i < W; ++i) store(tile + i * at.ld, r[i]);
    }
}

// The same, W[n0 + n, k0 + k], of a 4-bit weight whose rows begin at a multiple of 8
// elements. 16 rows' bytes are transposed by fours, so that a lane holds 8 codes of one row, looked
// up two at a time. `scales` has room for one of each row and 8 elements. `ahead`: bytes from here
// to the codes of the next panel, which are prefetched meanwhile.
template <typename Word>
LK_INLINE void pack_codes_k(const Codes4bit& w, int64_t k0, int64_t depth, int64_t n0,
                            int64_t count, float* to, const Layout& at, float* scales,
                            int64_t ahead) {
  constexpr int64_t E = ELEMENTS<Word>;
  const Table t = table(w.code);
  const int64_t dwords = (depth + 7) / 8;
  // Where rows are of whole blocks they change blocks at the same k, else any may at every eighth.
  const int shift = w.K % (int64_t{1} << w.log2_block) == 0 ? w.log2_block : 3;
  const int64_t k_first = k0 >> shift, steps = ((k0 + depth - 1) >> shift) - k_first + 1;
  for (int64_t n = 0; n < VW; ++n)
    for (int64_t i = 0; i < steps; ++i)
      scales[i * VW + n] =
          n < count ? scale_of(w, ((n0 + n) * w.K + ((k_first + i) << shift)) >> w.log2_block)
                    : 0.0f;
  for (int64_t j = 0; j < dwords; j += W)
    for (int64_t n = 0; n < VW; n += W) {
      vf r[W];
      const __mmask16 mask = first((int)min(W, dwords - j));
      const uint8_t* p = w.packed + ((n0 + n) * w.K + k0) / 2 + 4 * j;
      LK_UNROLL for (int i = 0; i < W; ++i) __builtin_prefetch(p + i * (w.K / 2) + ahead, 0, 2);
      LK_UNROLL for (int i = 0; i < W; ++i) r[i] =
          n + i < count ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(mask, p + i * (w.K / 2)))
                        : zero();
      transpose(r);
      LK_UNROLL for (int i = 0; i < W; ++i) {
        if (j + i >= dwords) break;
        const vf scale = load(scales + (((k0 + 8 * (j + i)) >> shift) - k_first) * VW + n);
        const __m512i codes = _mm512_castps_si512(r[i]);
        float* out = to + (j + i) * 8 / E * at.ld + n / W * at.apart;
        LK_UNROLL for (int b = 0; b < 4; ++b) {
          const vf even = mul(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * b + 4), t), scale),
                   odd = mul(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * b), t), scale);
          store_words(out + 2 * b / E * at.ld, even, odd, Word{});
        }
      }
    }
}

// The same with the sum along W's rows: W[n0 + n, k0 + k] for `depth` rows n and 64 columns that
// all exist.
template <typename Word>
LK_INLINE void pack_codes_n(const Codes4bit& w, int64_t n0, int64_t depth, int64_t k0, float* to,
                            const Layout& at, int64_t ahead) {
  constexpr int64_t E = ELEMENTS<Word>;
  const Table t = table(w.code);
  for (int64_t n = 0; n < depth; n += E)
    for (int64_t k = 0; k < VW; k += 2 * W) {
      vf even[E], odd[E];
      LK_UNROLL for (int e = 0; e < E; ++e) {
        even[e] = odd[e] = zero();
        if (n + e >= depth) break;
        const int64_t i = (n0 + n + e) * w.K + k0 + k;
        __builtin_prefetch(w.packed + i / 2 + ahead, 0, 2);
        look_up_both(t, w.packed + i / 2, even[e], odd[e]);
        const int64_t block = i >> w.log2_block;
        vf scale = splat(scale_of(w, block));
        if (w.log2_block == 4)  // a lane of `even` and `odd` has two neighbours of 32 elements
          scale = _mm512_mask_mov_ps(scale, 0xff00, splat(scale_of(w, block + 1)));
        even[e] = mul(even[e], scale);
        odd[e] = mul(odd[e], scale);
      }
      store_columns(to + n / E * at.ld + k / W * at.apart, at.apart, even, odd, Word{});
    }
}

// pack_words of a 4-bit weight; `decoded` has room for a panel that is decoded before.
template <typename Word>
LK_INLINE void pack_codes(const Codes4bit& w, bool k_inner, int64_t k0, int64_t depth, int64_t n0,
                          int64_t count, float* to, const Layout& at, float* decoded) {
  using E = std::conditional_t<ELEMENTS<Word> == 2, bf16, float>;
  E* const panel = reinterpret_cast<E*>(decoded);
  const Table t = table(w.code);
  const DType dtype = ELEMENTS<Word> == 2 ? DType::bf16 : DType::f32;
  if (k_inner && w.K % 8 == 0) {
    pack_codes_k<Word>(w, k0, depth, n0, count, to, at, decoded,
                       (k0 + depth < w.K ? depth : VW * w.K - k0) / 2);
  } else if (!k_inner && w.K % (2 * W) == 0 && count == VW) {
    pack_codes_n<Word>(w, k0, depth, n0, to, at,
                       (k0 + depth < w.N ? depth * w.K : VW - k0 * w.K) / 2);
  } else if (k_inner) {
    const int64_t ld = round_up(depth, 2 * W);
    for (int64_t i = 0; i < count; ++i) decode_row(w, t, n0 + i, k0, depth, panel + i * ld);
    pack_words<Word, E>({.data = panel, .dtype = dtype, .row = 1, .col = ld}, 0, depth, 0, count,
                        to, at);
  } else {
    for (int64_t i = 0; i < depth; ++i) decode_row(w, t, k0 + i, n0, count, panel + i * VW);
    pack_words<Word, E>({.data = panel, .dtype = dtype, .row = VW, .col = 1}, 0, depth, 0, count,
                        to, at);
  }
}

// Cache lines of W that pack_words will read, prefetched one by one so that W comes while the panel
// before it is at work.
struct Lines {
  const char* row;
  int64_t stride, in_row, count;  // bytes from row to row, lines of a row, lines in all
  int64_t next = 0, in = 0;       // prefetched so far, and how many of this row's

  void ask() {
    __builtin_prefetch(row + in * 64, 0, 2);
    ++next;
    if (++in < in_row) return;
    in = 0;
    row += stride;
  }
};

// Those of the panel after the one at k and n0, which is `depth` deep and `full` at most.
template <typename T>
LK_INLINE Lines lines_after(const ProductArgs& a, int64_t k, int64_t depth, int64_t n0,
                            int64_t full) {
  const Matrix& w = a.w;
  const bool more = k + depth < a.K;  // of these columns
  if (a.codes || (!more && n0 + VW >= a.update.N)) return {};
  const int64_t k0 = more ? k + depth : 0, n = more ? n0 : n0 + VW;
  const int64_t rows = min(full, a.K - k0), columns = min(VW, a.update.N - n);
  const bool along_n = w.col == 1;
  const int64_t in_row = ((along_n ? columns : rows) * (int64_t)sizeof(T) + 63) / 64;
  return {static_cast<const char*>(w.data) + (k0 * w.row + n * w.col) * (int64_t)sizeof(T),
          (along_n ? w.row : w.col) * (int64_t)sizeof(T), in_row,
          in_row * (along_n ? rows : columns)};
}

// acc += the sum over `words` of x times a packed panel. Meanwhile asks for the lines of W before
// `stop`, at even distances: all at once they would wait for one another.
template <typename Word>
LK_INLINE void product_tile(const Word* const x[Y_ROWS], int64_t words, const float* panel,
                            Lines& ahead, int64_t stop, vf acc[Y_ROWS][V]) {
  const int64_t run = max(1, words / (stop - ahead.next + 1));
  for (int64_t k = 0; k < words;) {
    for (const int64_t end = min(words, k + run); k < end; ++k, panel += VW) {
      vf w[V];
      LK_UNROLL for (int v = 0; v < V; ++v) w[v] = load(panel + v * W);
      LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) {
        const vf b = splat_word(x[i] + k);
        LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = word_fma(b, w[v], acc[i][v], Word{});
      }
    }
    if (ahead.next < stop) ahead.ask();
  }
  while (ahead.next < stop) ahead.ask();
}

// Where a tile's rows of x are: in x itself, or copied to `rows` as words with zeros at the end.
template <typename Word, typename T>
LK_INLINE void words_of_x(const Matrix& x, int64_t m, int64_t count, int64_t k, int64_t depth,
                          float* rows, const Word* out[Y_ROWS]) {
  using E = std::conditional_t<ELEMENTS<Word> == 2, bf16, float>;
  const T* const from = static_cast<const T*>(x.data) + m * x.row + k;
  for (int64_t i = 0; i < Y_ROWS; ++i) {
    const int64_t row = min(i, count - 1);  // a short tile repeats its last row
    if (std::is_same_v<T, E> && depth % ELEMENTS<Word> == 0) {
      out[i] = reinterpret_cast<const Word*>(from + row * x.row);
      continue;
    }
    E* const to = reinterpret_cast<E*>(rows + i * WORDS);
    if (i == row) copy_kept(from + row * x.row, to, depth, round_up(depth, 2 * W), nullptr, 0, 0);
    out[i] = reinterpret_cast<const Word*>(rows + row * WORDS);
  }
}

LK_INLINE void store_tile(float* to, const vf acc[Y_ROWS][V]) {
  LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v)
      store(to + i * VW + v * W, acc[i][v]);
}

// acc = mask(S Q) for the `count` rows from m on and the columns from n0 on, whose Q is packed.
LK_INLINE void masked_rank_tile(const ExpandArgs& u, const Philox& generator, int64_t m,
                                int64_t count, int64_t n0, const float* q, vf acc[Y_ROWS][V]) {
  const float* s[Y_ROWS];
  for (int64_t i = 0; i < Y_ROWS; ++i) s[i] = u.s + (m + min(i, count - 1)) * u.lds;
  rank_tile(s, u.R, q, VW, acc);
  if (!u.dropout.rng) return;
  uint64_t bits[Y_ROWS];
  for (int64_t i = 0; i < Y_ROWS; ++i) bits[i] = keep64(generator, m + min(i, count - 1), n0);
  mask_tile(bits, 0, acc);
}

// Rows [m0, m1) by columns [n0, n0 + VW) of y, a panel of `step` words of the sum after another.
// C holds the tiles' sums between panels; after the last they go to the epilogue in registers.
// mask(S Q) is what pairs start from; of float32 it is a sum of its own, since a chain that starts
// from it would lose more than separate products do.
template <typename Word, typename T>
LK_INLINE void product_block(const ProductArgs& a, const Philox& generator, int64_t m0, int64_t m1,
                             int64_t n0, int64_t step, const float* q, float* panel, float* rows,
                             float* C, float* decoded) {
  constexpr int64_t E = ELEMENTS<Word>;
  const ExpandArgs& u = a.update;
  const int64_t n1 = min(n0 + VW, u.N), tiles = (m1 - m0 + Y_ROWS - 1) / Y_ROWS;
  for (int64_t k = 0; k < a.K; k += step * E) {
    const int64_t depth = min(step * E, a.K - k), next = k + depth;
    if (a.codes)
      pack_codes<Word>(*a.codes, a.k_inner, k, depth, n0, n1 - n0, panel, Layout{}, decoded);
    else
      pack_words<Word, T>(a.w, k, depth, n0, n1 - n0, panel, Layout{});
    Lines ahead = lines_after<T>(a, k, depth, n0, step * E);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = m0 + tile * Y_ROWS, count = min(Y_ROWS, m1 - m);
      float* const c = C + tile * TILE;
      const bool held = k || E == 1;  // whether C holds this tile's sum so far
      const auto sum = [&](int i, int v, int = W) {
        return held ? load(c + i * VW + v * W) : zero();
      };
      vf acc[Y_ROWS][V];
      if (k == 0) {
        masked_rank_tile(u, generator, m, count, n0, q, acc);
        if (held) store_tile(c, acc);
      }
      if (held)
        LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] =
            zero();
      const Word* x[Y_ROWS];
      words_of_x<Word, T>(a.x, m, count, k, depth, rows, x);
      product_tile(x, (depth + E - 1) / E, panel, ahead, ahead.count * (tile + 1) / tiles, acc);
      if (next < a.K) {
        LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] =
            add(sum(i, v), acc[i][v]);
        store_tile(c, acc);
        continue;
      }
      with_type(u.dtype,
                [&](auto type) { finish_tile<decltype(type)>(u, m, count, n0, n1, acc, sum); });
    }
  }
}

// Words of the sum in one panel, all panels of equal depth: a short last one would cost each tile a
// pass for little. Codes are slower to pack in deep ones. Rows of W that lie a multiple of a page
// apart share few sets of L2, where the lines of a deep one would push one another out.
template <typename Word, typename T>
LK_INLINE int64_t depth_of(const ProductArgs& a) {
  const bool clash = a.w.col == 1 && a.w.row * (int64_t)sizeof(T) % 4096 == 0;
  const int64_t most = clash || a.codes ? min(CHAIN<Word>, SHALLOW) : CHAIN<Word>;
  const int64_t words = (a.K + ELEMENTS<Word> - 1) / ELEMENTS<Word>;
  const int64_t panels = (words + most - 1) / most;
  return round_up((words + panels - 1) / panels, RUN);  // where codes are decoded at once
}

// Y = c * (X W + alpha * mask(S Q)) + bias. A task is a tile of rows by VW columns, in order of
// columns; a thread packs WORDS of W's columns at a time and passes its rows over them, so that
// x comes from L3 or memory once a panel and W once a block of rows. Sums in float32, each over
// up to CHAIN words and then over these; y rounds once (z likewise). No result depends on the
// number of threads. Tested by tests/ops.
template <typename Word, typename T>
LK_INLINE void product_of(const ProductArgs& a) {
  const ExpandArgs& u = a.update;
  constexpr int64_t block = BLOCK_ROWS / Y_ROWS;
  const int64_t panels = (u.N + VW - 1) / VW, tiles = (u.M + Y_ROWS - 1) / Y_ROWS;
  const int64_t tasks = panels * tiles;
  if (!tasks) return;
  const int64_t chunks = u.M * u.N * a.K < SMALL ? 1 : min(u.threads, tasks);
  const Philox generator = philox(u.dropout);
  const int64_t step = depth_of<Word, T>(a);
  const int64_t q_floats = round_up(u.R, 4) * VW, staging = round_up(staging_floats(VW, u.R), W);
  const int64_t c_floats = min(tiles, block) * TILE;
  const int64_t chunk_floats =
      q_floats + staging + WORDS * VW + Y_ROWS * WORDS + c_floats + (a.codes ? WORDS * VW : 0);
  Scratch scratch(chunks * chunk_floats * 4);
  parallel(u.threads, chunks, [&](int64_t chunk) {
    float* const q = static_cast<float*>(scratch.data) + chunk * chunk_floats;
    float* const panel = q + q_floats + staging;
    float* const rows = panel + WORDS * VW;
    float* const C = rows + Y_ROWS * WORDS;
    float* const decoded = C + c_floats;
    const int64_t stop = tasks * (chunk + 1) / chunks;
    for (int64_t task = tasks * chunk / chunks, packed = -1; task < stop;) {
      const int64_t n0 = task / tiles * VW, tile = task % tiles;
      const int64_t last = min(min(tiles, tile + block), tile + stop - task);
      if (packed != n0)
        pack(u.q, u.R, n0, min(VW, u.N - n0), VW, u.alpha, u.gate, nullptr, q, VW, q + q_floats);
      packed = n0;
      const int64_t m0 = tile * Y_ROWS, m1 = min(u.M, last * Y_ROWS);
      product_block<Word, T>(a, generator, m0, m1, n0, step, q, panel, rows, C, decoded);
      task += last - tile;
    }
  });
}

[[maybe_unused]] void product(const ProductArgs& a) {
  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    product_of<WordOf<T>, T>(a);
  });
}

}  // namespace
}  // namespace lora_kernels
