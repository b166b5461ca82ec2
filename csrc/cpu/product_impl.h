#pragma once
// The fused GEMM of the AVX-512 units: base GEMM, rank update and epilogue of a tile of y, while
// its sums are in registers. Follows codes_impl.h.
//
// The sum runs over words. 16-bit elements that the unit does not multiply in pairs are widened as
// W is packed and x is read. A 4-bit W is decoded one panel at a time, to bf16 for pairs and to
// float32 otherwise. It is never written to memory as a whole.

namespace lora_kernels {
namespace {

constexpr int64_t PANEL_WORDS = 1024;  // most words of the sum in a packed panel: 256 KB of L2
constexpr int64_t SHALLOW_PANEL_WORDS = 512;  // most in a shallow one, see `panel_words`
constexpr int64_t BLOCK_ROWS = 960;           // rows that share a packed panel: 240 KB of sums
constexpr int64_t TILE_FLOATS = Y_ROWS * VW;

template <typename Word>
LK_INLINE vf splat_word(const Word* p) {
  float word;
  __builtin_memcpy(&word, p, sizeof word);
  return splat(word);
}

// A packed panel holds word w of column n at w * word_stride + n / W * vector_stride + n % W.
//   GEMM of this file      word 0 of all VW columns, word 1 of all VW columns, ...
//   tiles of amx_impl.h    all words of the first W columns, all words of the next W columns, ...
struct PanelLayout {
  int64_t word_stride = VW, vector_stride = W;
};

// Stores W rows' even and odd elements along the sum: as one vector of pairs, or as two of floats.
LK_INLINE void store_words(float* dst, vf even, vf odd, float) {
  store(dst, even);
  store(dst + VW, odd);
}

// Stores 2 W columns in order, given the even ones apart from the odd ones.
LK_INLINE void store_columns(float* dst, int64_t vector_stride, const vf even[1], const vf odd[1],
                             float) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0),
                high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  store(dst, _mm512_permutex2var_ps(even[0], low, odd[0]));
  store(dst + vector_stride, _mm512_permutex2var_ps(even[0], high, odd[0]));
}

// Stores VW columns of words (a[n]), or of pairs (a[n], b[n]), for n < count; zeros after them. b
// may be null.
template <typename T>
LK_INLINE void pack_row(const T* a, const T*, int64_t count, float* dst, int64_t vector_stride,
                        float) {
  for (int64_t n = 0; n < VW; n += W)
    store(dst + n / W * vector_stride, n < count ? load_words(a + n, count - n, float{}) : zero());
}
#ifdef LK_BF16_PAIRS
LK_INLINE void pack_row(const bf16* a, const bf16* b, int64_t count, float* dst,
                        int64_t vector_stride, bf16x2) {
  for (int64_t n = 0; n < VW; n += 2 * W)
    interleave(a + n, b ? b + n : nullptr, max(0, count - n), dst + n / W * vector_stride,
               vector_stride);
}
#endif

// Packs W[k0 + k, n0 + n] for `depth` elements k and `count` columns n; zeros beyond both. Up to W
// - 1 words past the last are written.
template <typename Word, typename T>
LK_INLINE void pack_words(const Matrix& w, int64_t k0, int64_t depth, int64_t n0, int64_t count,
                          float* dst, const PanelLayout& layout) {
  constexpr int64_t E = ELEMENTS<Word>;
  const T* const src = static_cast<const T*>(w.data) + k0 * w.row_stride + n0 * w.col_stride;
  if (w.col_stride == 1) {
    for (int64_t k = 0; k < depth; k += E, dst += layout.word_stride) {
      const T* row = src + k * w.row_stride;
      pack_row(row, k + 1 < depth ? row + w.row_stride : nullptr, count, dst, layout.vector_stride,
               Word{});
    }
    return;
  }
  for (int64_t n = 0; n < VW; n += W)
    for (int64_t k = 0; k < depth; k += W * E) {
      vf r[W];
      const T* rows = src + n * w.col_stride + k;
      if (n + W <= count && k + W * E <= depth)
        LK_UNROLL for (int i = 0; i < W; ++i) r[i] =
            load_words(rows + i * w.col_stride, W * E, Word{});
      else
        LK_UNROLL for (int i = 0; i < W; ++i) r[i] =
            n + i < count ? load_words(rows + i * w.col_stride, depth - k, Word{}) : zero();
      transpose(r);
      float* const tile = dst + k / E * layout.word_stride + n / W * layout.vector_stride;
      LK_UNROLL for (int i = 0; i < W; ++i) store(tile + i * layout.word_stride, r[i]);
    }
}

// Packs W[n0 + n, k0 + k] of a 4-bit weight whose rows begin at a multiple of 8 elements.
// 1. Load 4 bytes, 8 codes, of each of 16 rows and transpose, so that a lane holds 8 codes of one
//    row.
// 2. Look these up two at a time and scale them.
// `scales` has room for one scale of each row and 8 elements; with a shift, for both of each block.
// prefetch_distance: bytes from these codes to those of the next panel.
template <typename Word, bool HasShift>
LK_INLINE void pack_codes_k(const Codes& w, int64_t k0, int64_t depth, int64_t n0, int64_t count,
                            float* dst, const PanelLayout& layout, float* scales,
                            int64_t prefetch_distance) {
  constexpr int64_t E = ELEMENTS<Word>;
  const Table t = load_table(w.code);
  const int64_t dwords = (depth + 7) / 8;
  // If rows are whole blocks, all rows change blocks at the same k; else a row may at every eighth
  // element.
  const int log2_step = is_block_aligned(w) ? w.log2_block : 3;
  const int64_t k_first = k0 >> log2_step, steps = ((k0 + depth - 1) >> log2_step) - k_first + 1;
  float* const shifts = scales + steps * VW;
  for (int64_t n = 0; n < VW; ++n)
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t block = ((n0 + n) * w.K + ((k_first + i) << log2_step)) >> w.log2_block;
      scales[i * VW + n] = n < count ? block_scale(w, block) : 0.0f;
      if (HasShift) shifts[i * VW + n] = n < count ? block_shift(w, block) : 0.0f;
    }
  for (int64_t j = 0; j < dwords; j += W)
    for (int64_t n = 0; n < VW; n += W) {
      vf r[W];
      const __mmask16 mask = tail_mask((int)min(W, dwords - j));
      const uint8_t* p = w.packed + ((n0 + n) * w.K + k0) / 2 + 4 * j;
      LK_UNROLL for (int i = 0; i < W; ++i)
          __builtin_prefetch(p + i * (w.K / 2) + prefetch_distance, 0, 2);
      LK_UNROLL for (int i = 0; i < W; ++i) r[i] =
          n + i < count ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(mask, p + i * (w.K / 2)))
                        : zero();
      transpose(r);
      LK_UNROLL for (int i = 0; i < W; ++i) {
        if (j + i >= dwords) break;
        const int64_t step = (((k0 + 8 * (j + i)) >> log2_step) - k_first) * VW + n;
        const vf scale = load(scales + step), shift = HasShift ? load(shifts + step) : zero();
        const __m512i codes = _mm512_castps_si512(r[i]);
        float* out = dst + (j + i) * 8 / E * layout.word_stride + n / W * layout.vector_stride;
        LK_UNROLL for (int b = 0; b < 4; ++b) {
          vf even = mul(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * b + 4), t), scale),
             odd = mul(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * b), t), scale);
          if (HasShift) {
            even = add(even, shift);
            odd = add(odd, shift);
          }
          store_words(out + 2 * b / E * layout.word_stride, even, odd, Word{});
        }
      }
    }
}

// Packs W[n0 + n, k0 + k] of a 4-bit weight with the sum along n: `depth` rows n and 64 columns.
// Reads all of them, without a bounds check.
template <typename Word, bool HasShift>
LK_INLINE void pack_codes_n(const Codes& w, int64_t n0, int64_t depth, int64_t k0, float* dst,
                            const PanelLayout& layout, int64_t prefetch_distance) {
  constexpr int64_t E = ELEMENTS<Word>;
  const Table t = load_table(w.code);
  for (int64_t n = 0; n < depth; n += E)
    for (int64_t k = 0; k < VW; k += 2 * W) {
      vf even[E], odd[E];
      LK_UNROLL for (int e = 0; e < E; ++e) {
        even[e] = odd[e] = zero();
        if (n + e >= depth) break;
        const int64_t i = (n0 + n + e) * w.K + k0 + k;
        __builtin_prefetch(w.packed + i / 2 + prefetch_distance, 0, 2);
        lookup_2w(t, w.packed + i / 2, even[e], odd[e]);
        const int64_t block = i >> w.log2_block;
        vf scale = splat(block_scale(w, block));
        vf shift = HasShift ? splat(block_shift(w, block)) : zero();
        if (w.log2_block == 4) {  // 32 elements span two blocks
          scale = _mm512_mask_mov_ps(scale, 0xff00, splat(block_scale(w, block + 1)));
          if (HasShift) shift = _mm512_mask_mov_ps(shift, 0xff00, splat(block_shift(w, block + 1)));
        }
        even[e] = mul(even[e], scale);
        odd[e] = mul(odd[e], scale);
        if (HasShift) {
          even[e] = add(even[e], shift);
          odd[e] = add(odd[e], shift);
        }
      }
      store_columns(dst + n / E * layout.word_stride + k / W * layout.vector_stride,
                    layout.vector_stride, even, odd, Word{});
    }
}

// pack_words for a quantized weight. `decoded` has room for a panel that is decoded before it is
// packed.
template <typename Word>
LK_INLINE void pack_codes(const Codes& w, bool is_transposed, int64_t k0, int64_t depth, int64_t n0,
                          int64_t count, float* dst, const PanelLayout& layout, float* decoded) {
  using E = std::conditional_t<ELEMENTS<Word> == 2, bf16, float>;
  E* const panel = reinterpret_cast<E*>(decoded);
  const Table t = load_table(w.code);
  const DType dtype = ELEMENTS<Word> == 2 ? DType::bf16 : DType::f32;
  const bool is_nibble = w.kind == CodeKind::nibble;
  // Elements from a row's first one here to its first in the next panel.
  const int64_t to_next = k0 + depth < w.K ? depth : VW * w.K - k0;
  if (is_nibble && is_transposed && w.K % 8 == 0) {
    const auto pack = w.has_shift ? pack_codes_k<Word, true> : pack_codes_k<Word, false>;
    pack(w, k0, depth, n0, count, dst, layout, decoded, to_next / 2);
  } else if (is_nibble && !is_transposed && w.K % (2 * W) == 0 && count == VW) {
    const auto pack = w.has_shift ? pack_codes_n<Word, true> : pack_codes_n<Word, false>;
    pack(w, k0, depth, n0, dst, layout, (k0 + depth < w.N ? depth * w.K : VW - k0 * w.K) / 2);
  } else if (is_transposed) {
    const int64_t ld = round_up(depth, 2 * W);
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* const p = w.packed + (((n0 + i) * w.K + k0 + to_next) >> is_nibble);
      for (int64_t j = 0; j < depth >> is_nibble; j += 64) __builtin_prefetch(p + j, 0, 2);
      decode_row(w, t, n0 + i, k0, depth, panel + i * ld);
    }
    pack_words<Word, E>({.data = panel, .dtype = dtype, .row_stride = 1, .col_stride = ld}, 0,
                        depth, 0, count, dst, layout);
  } else {
    for (int64_t i = 0; i < depth; ++i) decode_row(w, t, k0 + i, n0, count, panel + i * VW);
    pack_words<Word, E>({.data = panel, .dtype = dtype, .row_stride = VW, .col_stride = 1}, 0,
                        depth, 0, count, dst, layout);
  }
}

// The cache lines of W that pack_words will read next. They are prefetched one at a time while the
// current panel is multiplied.
struct PrefetchLines {
  const char* row;
  int64_t row_bytes, lines_per_row, count;  // lines: of a row, and in all
  int64_t next = 0, line_in_row = 0;        // lines prefetched: in all, and of this row

  void prefetch_next() {
    __builtin_prefetch(row + line_in_row * 64, 0, 2);
    ++next;
    if (++line_in_row < lines_per_row) return;
    line_in_row = 0;
    row += row_bytes;
  }
};

// The lines of the panel after the one at k and n0. That one is `depth` deep, and no panel deeper
// than max_depth.
template <typename T>
LK_INLINE PrefetchLines next_panel_lines(const GemmArgs& a, int64_t k, int64_t depth, int64_t n0,
                                         int64_t max_depth) {
  const Matrix& w = a.w;
  const bool is_same_columns = k + depth < a.K;
  if (a.codes || (!is_same_columns && n0 + VW >= a.update.N)) return {};
  const int64_t k0 = is_same_columns ? k + depth : 0, n = is_same_columns ? n0 : n0 + VW;
  const int64_t rows = min(max_depth, a.K - k0), columns = min(VW, a.update.N - n);
  const bool is_n_contiguous = w.col_stride == 1;
  const int64_t lines_per_row = ((is_n_contiguous ? columns : rows) * (int64_t)sizeof(T) + 63) / 64;
  return {static_cast<const char*>(w.data) +
              (k0 * w.row_stride + n * w.col_stride) * (int64_t)sizeof(T),
          (is_n_contiguous ? w.row_stride : w.col_stride) * (int64_t)sizeof(T), lines_per_row,
          lines_per_row * (is_n_contiguous ? rows : columns)};
}

// acc += x times a packed panel, over `words`. Prefetches the lines of W before `stop` at even
// distances: all at once they would wait for one another.
template <typename Word>
LK_INLINE void gemm_tile(const Word* const x[Y_ROWS], int64_t words, const float* panel,
                         PrefetchLines& lines, int64_t stop, vf acc[Y_ROWS][V]) {
  const int64_t run = max(1, words / (stop - lines.next + 1));
  for (int64_t k = 0; k < words;) {
    for (const int64_t end = min(words, k + run); k < end; ++k, panel += VW) {
      vf w[V];
      LK_UNROLL for (int v = 0; v < V; ++v) w[v] = load(panel + v * W);
      LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) {
        const vf b = splat_word(x[i] + k);
        LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = word_fma(b, w[v], acc[i][v], Word{});
      }
    }
    if (lines.next < stop) lines.prefetch_next();
  }
  while (lines.next < stop) lines.prefetch_next();
}

// Sets out[i] to a tile's rows of x: in place, or copied to `rows` as words, with zeros at the end.
template <typename Word, typename T>
LK_INLINE void load_x_words(const Matrix& x, int64_t m, int64_t count, int64_t k, int64_t depth,
                            float* rows, const Word* out[Y_ROWS]) {
  using E = std::conditional_t<ELEMENTS<Word> == 2, bf16, float>;
  const T* const src = static_cast<const T*>(x.data) + m * x.row_stride + k;
  for (int64_t i = 0; i < Y_ROWS; ++i) {
    const int64_t row = min(i, count - 1);  // a short tile repeats its last row
    if (std::is_same_v<T, E> && depth % ELEMENTS<Word> == 0) {
      out[i] = reinterpret_cast<const Word*>(src + row * x.row_stride);
      continue;
    }
    E* const dst = reinterpret_cast<E*>(rows + i * PANEL_WORDS);
    if (i == row)
      copy_masked(src + row * x.row_stride, dst, depth, round_up(depth, 2 * W), nullptr, 0, 0);
    out[i] = reinterpret_cast<const Word*>(rows + row * PANEL_WORDS);
  }
}

LK_INLINE void store_tile(float* dst, const vf acc[Y_ROWS][V]) {
  LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v)
      store(dst + i * VW + v * W, acc[i][v]);
}

// acc = mask(S Q) for `count` rows from m on and the columns from n0 on, whose Q is packed.
LK_INLINE void masked_rank_tile(const ExpandArgs& u, const Philox& generator, int64_t m,
                                int64_t count, int64_t n0, const float* q, vf acc[Y_ROWS][V]) {
  const float* s[Y_ROWS];
  for (int64_t i = 0; i < Y_ROWS; ++i) s[i] = u.s + (m + min(i, count - 1)) * u.lds;
  rank_tile(s, u.R, q, VW, acc);
  if (!u.dropout.rng) return;
  uint64_t bits[Y_ROWS];
  for (int64_t i = 0; i < Y_ROWS; ++i)
    bits[i] = dropout_bits64(generator, m + min(i, count - 1), n0);
  mask_tile(bits, 0, acc);
}

// y[m0 .. m1, n0 .. n0 + VW), one panel of `step` words of the sum after another. C holds the
// tiles' sums between panels. After the last panel they go to the epilogue in registers. Sums of
// pairs start from mask(S Q). For float32, mask(S Q) is a sum of its own: a chain that started from
// it would round more often than two separate GEMMs do.
template <typename Word, typename T>
LK_INLINE void gemm_block(const GemmArgs& a, const Philox& generator, int64_t m0, int64_t m1,
                          int64_t n0, int64_t step, const float* q, float* panel, float* rows,
                          float* C, float* decoded) {
  constexpr int64_t E = ELEMENTS<Word>;
  const ExpandArgs& u = a.update;
  const int64_t n1 = min(n0 + VW, u.N), tiles = (m1 - m0 + Y_ROWS - 1) / Y_ROWS;
  for (int64_t k = 0; k < a.K; k += step * E) {
    const int64_t depth = min(step * E, a.K - k), next = k + depth;
    if (a.codes)
      pack_codes<Word>(*a.codes, a.is_transposed, k, depth, n0, n1 - n0, panel, PanelLayout{},
                       decoded);
    else
      pack_words<Word, T>(a.w, k, depth, n0, n1 - n0, panel, PanelLayout{});
    PrefetchLines lines = next_panel_lines<T>(a, k, depth, n0, step * E);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = m0 + tile * Y_ROWS, count = min(Y_ROWS, m1 - m);
      float* const c = C + tile * TILE_FLOATS;
      const bool has_partial_sum = k || E == 1;  // in C
      const auto sum = [&](int i, int v, int = W) {
        return has_partial_sum ? load(c + i * VW + v * W) : zero();
      };
      vf acc[Y_ROWS][V];
      if (k == 0) {
        masked_rank_tile(u, generator, m, count, n0, q, acc);
        if (has_partial_sum) store_tile(c, acc);
      }
      if (has_partial_sum)
        LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] =
            zero();
      const Word* x[Y_ROWS];
      load_x_words<Word, T>(a.x, m, count, k, depth, rows, x);
      gemm_tile(x, (depth + E - 1) / E, panel, lines, lines.count * (tile + 1) / tiles, acc);
      if (next < a.K) {
        LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) LK_UNROLL for (int v = 0; v < V; ++v) acc[i][v] =
            add(sum(i, v), acc[i][v]);
        store_tile(c, acc);
        continue;
      }
      dispatch_dtype(u.dtype, [&](auto type) {
        epilogue_tile<decltype(type)>(u, m, count, n0, n1, acc, sum);
      });
    }
  }
}

// Returns the words of the sum in one panel. All panels are equally deep: a short last one would
// cost each tile a pass for little. Two cases keep panels shallow. Codes are slower to pack in deep
// ones. Rows of W that lie a multiple of a page apart share few sets of L2, where the lines of a
// deep panel would evict one another.
template <typename Word, typename T>
LK_INLINE int64_t panel_words(const GemmArgs& a) {
  const bool has_set_conflicts =
      a.w.col_stride == 1 && a.w.row_stride * (int64_t)sizeof(T) % 4096 == 0;
  const int64_t max_words =
      has_set_conflicts || a.codes ? min(CHAIN<Word>, SHALLOW_PANEL_WORDS) : CHAIN<Word>;
  const int64_t words = (a.K + ELEMENTS<Word> - 1) / ELEMENTS<Word>;
  const int64_t panels = (words + max_words - 1) / max_words;
  return round_up((words + panels - 1) / panels, MIN_BLOCKSIZE);  // whole vectors of codes
}

// Y = c * (X W + alpha * mask(S Q)) + bias.
// 1. A task is a tile of rows by VW columns. Tasks are ordered by columns.
// 2. A thread packs up to PANEL_WORDS words of its columns of W, and multiplies up to BLOCK_ROWS
//    rows of x by them.
// So x is read from L3 or memory once a panel, and W once a block of rows. Sums in float32: chains
// of up to CHAIN words, then the sum of these. y and z round once. Results do not depend on the
// number of threads. Tested by tests/ops.
template <typename Word, typename T>
LK_INLINE void gemm_of(const GemmArgs& a) {
  const ExpandArgs& u = a.update;
  constexpr int64_t block = BLOCK_ROWS / Y_ROWS;
  const int64_t panels = (u.N + VW - 1) / VW, tiles = (u.M + Y_ROWS - 1) / Y_ROWS;
  const int64_t tasks = panels * tiles;
  if (!tasks) return;
  const int64_t chunks = u.M * u.N * a.K < MIN_PARALLEL_WORK ? 1 : min(u.threads, tasks);
  const Philox generator = make_philox(u.dropout);
  const int64_t step = panel_words<Word, T>(a);
  const int64_t q_floats = round_up(u.R, 4) * VW, staging = round_up(staging_floats(VW, u.R), W);
  const int64_t c_floats = min(tiles, block) * TILE_FLOATS;
  const int64_t chunk_floats = q_floats + staging + PANEL_WORDS * VW + Y_ROWS * PANEL_WORDS +
                               c_floats + (a.codes ? PANEL_WORDS * VW : 0);
  Scratch scratch(chunks * chunk_floats * 4);
  parallel_for(u.threads, chunks, [&](int64_t chunk) {
    float* const q = static_cast<float*>(scratch.data) + chunk * chunk_floats;
    float* const panel = q + q_floats + staging;
    float* const rows = panel + PANEL_WORDS * VW;
    float* const C = rows + Y_ROWS * PANEL_WORDS;
    float* const decoded = C + c_floats;
    const int64_t stop = tasks * (chunk + 1) / chunks;
    for (int64_t task = tasks * chunk / chunks, packed = -1; task < stop;) {
      const int64_t n0 = task / tiles * VW, tile = task % tiles;
      const int64_t last = min(min(tiles, tile + block), tile + stop - task);
      if (packed != n0)
        pack(u.q, u.R, n0, min(VW, u.N - n0), VW, u.alpha, u.gate, nullptr, q, VW, q + q_floats);
      packed = n0;
      const int64_t m0 = tile * Y_ROWS, m1 = min(u.M, last * Y_ROWS);
      gemm_block<Word, T>(a, generator, m0, m1, n0, step, q, panel, rows, C, decoded);
      task += last - tile;
    }
  });
}

[[maybe_unused]] void gemm(const GemmArgs& a) {
  dispatch_dtype(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    gemm_of<WordOf<T>, T>(a);
  });
}

}  // namespace
}  // namespace lora_kernels
