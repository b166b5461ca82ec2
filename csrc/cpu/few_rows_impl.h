// GEMV over a quantized weight. Follows codes_impl.h and streamed_impl.h.
//
// Up to CODED_PASS_ROWS rows of x share nibbles that are looked up in registers, a chunk of
// CHUNK_CODES at a time. Each lane holds eight neighbouring codes, which share a scale. More rows
// of x, and codes of 8 bits, take codes that were decoded to memory, in slabs that stay in the L1
// cache. A shift is added in the decoded values; beside values in registers it leaves the loop, as
// shift * (the sum of x over the block).
//
// x is interleaved like the nibbles. In a chunk, lane l of vector j holds element 8 l + j:
//   vector 0    0   8  16  24 ...
//   vector 1    1   9  17  25 ...
//   ...
//   vector 7    7  15  23  31 ...
// For codes of 8 bits, and if K is no multiple of eight, elements keep their order. Chunks of the
// rows of one pass alternate: chunk 0 of each row, then chunk 1 of each row, ...

namespace lora_kernels {
namespace {

constexpr int64_t CHUNK_CODES = 8 * W;
constexpr int CODED_PASS_ROWS = 8;                 // rows of x that share a look-up
constexpr int64_t X_SLAB_BYTES = 24576;            // of x, which stay in L1 for all rows of W
constexpr int64_t DECODED_SLAB_BYTES = 16384;      // of decoded codes, which stay in L1
constexpr int64_t CHAIN_CODES = 20 * CHUNK_CODES;  // codes summed in one chain

// Least rows of x for which codes are decoded to memory. Without AVX-512 the sums of 4 by PASS_ROWS
// rows would not fit into the registers.
constexpr bool HAS_DECODED_PATH = W == 16;
template <typename X>
constexpr int64_t MIN_DECODED_ROWS = 9;
template <>
constexpr int64_t MIN_DECODED_ROWS<float> = 8;

// Rows of the weight decoded at once for M rows of x: their sums take half of the 2 W registers.
template <int M>
constexpr int CODED_TILE_ROWS = 4 * M <= W   ? 4
                                : 2 * M <= W ? 2
                                             : 1;

// In float32 ----------------------------------------------------------------------------------

constexpr int MAX_SUM_SCALED_ROWS = 2;  // for which scaling sums is cheaper than scaling codes

// Copies K elements of x in their order, one chunk every `stride` elements.
template <typename T, typename X>
LK_INLINE void copy_x(const T* src, int64_t K, X* dst, int64_t stride) {
  for (int64_t k = 0; k < K; k += CHUNK_CODES, dst += stride)
    copy_masked(src + k, dst, K - k, CHUNK_CODES, nullptr, 0, 0);
}

// Interleaves K elements of x, a multiple of eight, one chunk every `stride` elements.
template <typename T>
LK_INLINE void interleave_x(const T* src, int64_t K, float* dst, int64_t stride) {
  for (int64_t k = 0; k < K; k += CHUNK_CODES, dst += stride) {
    float chunk[CHUNK_CODES];
    copy_masked(src + k, chunk, K - k, CHUNK_CODES, nullptr, 0, 0);
    for (int64_t l = 0; l < W; l += 4)
      for (int64_t j = 0; j < 8; j += 4) transpose_4x4(chunk + 8 * l + j, 8, dst + j * W + l, W);
  }
}

// dst = scale * codes for one chunk, interleaved.
LK_INLINE void decode_chunk(vu codes, const Table& t, vf scale, float* dst) {
  LK_UNROLL for (int j = 0; j < 8; ++j) store(dst + j * W, mul(lookup(t, codes, j), scale));
}

// total[g][i] += x[i] · (scale[g] * codes[g]) for one chunk of each of M rows of x.
template <int J, int M>
LK_INLINE void dot_chunk(const vu codes[J], const Table& t, const vf scale[J], const float* x,
                         vf total[J][M]) {
  constexpr bool scales_sums = M <= MAX_SUM_SCALED_ROWS;
  vf chunk[J][M];
  LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) chunk[g][i] =
      scales_sums ? zero() : total[g][i];
  LK_UNROLL for (int j = 0; j < 8; ++j) {
    vf v[J];
    LK_UNROLL for (int g = 0; g < J; ++g) {
      v[g] = lookup(t, codes[g], j);
      if (!scales_sums) v[g] = mul(v[g], scale[g]);
    }
    LK_UNROLL for (int i = 0; i < M; ++i) {
      const vf xv = load(x + i * CHUNK_CODES + j * W);
      LK_UNROLL for (int g = 0; g < J; ++g) chunk[g][i] = fma(xv, v[g], chunk[g][i]);
    }
  }
  LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] =
      scales_sums ? fma(chunk[g][i], scale[g], total[g][i]) : chunk[g][i];
}

// The lanes of total[g][i] sum to x[i] · W[row + g * stream_stride] over the elements [k0, k1).
// scales: of the blocks from the one in which the batch of rows begins; those of the next stream
// lie scale_stride behind. offset: from the first element of that block to that of the row.
// BlockAligned: rows begin with a block. Only then may scales be pairs with shifts, which are left
// out.
template <int J, int M, bool BlockAligned, typename X, typename T>
LK_INLINE void dot_codes(const Codes& w, const T& t, int64_t row, int64_t stream_stride,
                         const float* scales, int64_t scale_stride, int64_t offset, const X* x,
                         int64_t k0, int64_t k1, vf total[J][M]) {
  static_assert(BlockAligned || J == 1);
  const int log2_block = w.log2_block;
  const int64_t stream_bytes = stream_stride * w.K >> 1;
  const uint8_t* p = w.packed + ((row * w.K + k0) >> 1);
  const int64_t prefetch_distance = k1 - k0 < w.K ? w.K >> 1 : PREFETCH_BYTES;
  x += k0 * M;
  const int pair = BlockAligned && w.has_shift;
  vu aligned = lane_blocks(0, log2_block);
  if (pair) aligned += aligned;  // small numbers, in lanes of any width
  vf sum[J][M];
  const auto step = [&](int64_t k, int filled) __attribute__((always_inline)) {
    const float* const s = scales + (((offset + k) >> log2_block) << pair);
    const vu lanes = BlockAligned
                         ? aligned
                         : lane_blocks((offset + k) & ((int64_t{1} << log2_block) - 1), log2_block);
    vu codes[J];
    vf scale[J];
    LK_UNROLL for (int g = 0; g < J; ++g) {
      __builtin_prefetch(p + g * stream_bytes + prefetch_distance, 0, 3);
      codes[g] = load_codes(p + g * stream_bytes, filled);
      scale[g] = gather_scales(s + g * scale_stride, lanes, filled);
    }
    p += CHUNK_CODES / 2;
    dot_chunk<J, M>(codes, t, scale, x, sum);
    x += M * CHUNK_CODES;
  };
  LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] = zero();
  for (int64_t k = k0; k < k1;) {
    LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) sum[g][i] = zero();
    for (const int64_t end = min(k + CHAIN_CODES, k1 / CHUNK_CODES * CHUNK_CODES); k < end;
         k += CHUNK_CODES)
      step(k, W);
    if (k1 - k < CHUNK_CODES && k < k1) {
      step(k, (int)(k1 - k) / 8);
      k = k1;
    }
    LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] =
        add(total[g][i], sum[g][i]);
  }
}

// Calls f(row, where its first chunk lies, the distance of its chunks) for all rows of x.
template <typename F>
LK_INLINE void for_each_row(const Passes& passes, int64_t ldx, const F& f) {
  passes.for_each([&](int64_t m, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) f(m + i, m * ldx + i * CHUNK_CODES, rows * CHUNK_CODES);
  });
}

// Returns the size of equal slabs of K, a multiple of CHUNK_CODES, that take about max_bytes or
// less.
LK_INLINE int64_t balanced_slab(int64_t K, int64_t bytes, int64_t max_bytes) {
  const int64_t slabs = (K * bytes + max_bytes - 1) / max_bytes;
  return round_up((K + slabs - 1) / slabs, CHUNK_CODES);
}

// dst[2 i] and dst[2 i + 1] = `centre` times the sum of x over block i, and that sum: what a
// block's scale and shift are multiplied by.
template <typename T>
[[gnu::noinline]] void block_sums(const T* x, int64_t K, int log2_block, float centre, float* dst) {
  for (int64_t k = 0, size = int64_t{1} << log2_block; k < K; k += size) {
    vf sum[STREAMS] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < size; i += W) sum[0] = add(sum[0], load(x + k + i));
    float sums[STREAMS];
    sum_lanes(sum, sums);
    *dst++ = centre * sums[0];
    *dst++ = sums[0];
  }
}

// total[g][i] += pairs of row g times x_sums of row i, element by element. Rows of pairs lie
// `stride` apart, those of sums `count`.
template <int M>
LK_INLINE void add_shifts(const float* pairs, int64_t stride, const float* x_sums, int64_t count,
                          vf total[STREAMS][M]) {
  for (int i = 0; i < M; ++i, x_sums += count) {
    vf sum[STREAMS];
    LK_UNROLL for (int g = 0; g < STREAMS; ++g) sum[g] = total[g][i];
    int64_t b = 0;
    for (; b + W <= count; b += W) {
      const vf x_sum = load(x_sums + b);
      LK_UNROLL for (int g = 0; g < STREAMS; ++g) sum[g] =
          fma(x_sum, load(pairs + g * stride + b), sum[g]);
    }
    if (const int valid = (int)(count - b)) {
      const vf x_sum = load_n(x_sums + b, valid);
      LK_UNROLL for (int g = 0; g < STREAMS; ++g) sum[g] =
          fma(x_sum, load_n(pairs + g * stride + b, valid), sum[g]);
    }
    LK_UNROLL for (int g = 0; g < STREAMS; ++g) total[g][i] = sum[g];
  }
}

// The layer -----------------------------------------------------------------------------------

// Rows of a stream whose scales are decoded in one batch. A batch separates the stores of scales
// from their loads, whose other width would prevent store forwarding. The number of scales includes
// W that are loaded past the end.
LK_INLINE int64_t batch_rows(const Codes& w) {
  return max(1, (int64_t{256} << w.log2_block) / w.K);
}
LK_INLINE int64_t batch_scales(const Codes& w) {
  return ((batch_rows(w) * w.K >> w.log2_block) + 2) * (w.has_shift ? 2 : 1) + W;
}

// Returns the distance from the first element of the block in which row `first` begins to that of
// row first + n.
LK_INLINE int64_t offset_in_block(const Codes& w, int64_t first, int64_t n) {
  return n * w.K + (first * w.K & ((int64_t{1} << w.log2_block) - 1));
}

// The scales of a batch of rows: those of stream g lie g * stride behind.
struct Scales {
  const float* first;
  int64_t stride;
  const float* of(int64_t g) const { return first + g * stride; }
};

// sums[i * lds + n + g * stream_stride - first] = x[i] · W[n + g * stream_stride] for first <= n <
// end and all streams g. scales: from the block in which row first + g * stream_stride begins.
template <int M, typename X, typename T>
LK_INLINE void dot_streams(const Codes& w, const T& t, const X* x, const float* x_sums,
                           int64_t first, int64_t end, int64_t stream_stride, const Scales& scales,
                           float* sums, int64_t lds) {
  constexpr int J = CODED_TILE_ROWS<M>;
  const bool is_aligned = is_block_aligned(w);
  const int64_t slab = balanced_slab(w.K, M * int64_t{sizeof(X)}, X_SLAB_BYTES);
  for (int64_t k0 = 0; k0 < w.K; k0 += slab) {
    const int64_t k1 = min(k0 + slab, w.K);
    for (int64_t n = first; n < end; ++n) {
      vf total[STREAMS][M];
      if (is_aligned) {
        LK_UNROLL_FAST for (int g = 0; g < STREAMS; g += J) dot_codes<J, M, true>(
            w, t, n + g * stream_stride, stream_stride, scales.of(g), scales.stride,
            offset_in_block(w, first + g * stream_stride, n - first), x, k0, k1, total + g);
        if (w.has_shift && !k0) {
          const int64_t count = 2 * (w.K >> w.log2_block);
          add_shifts<M>(scales.first + (n - first) * count, scales.stride, x_sums, count, total);
        }
      } else {
        for (int g = 0; g < STREAMS; ++g)
          dot_codes<1, M, false>(
              w, t, n + g * stream_stride, stream_stride, scales.of(g), scales.stride,
              offset_in_block(w, first + g * stream_stride, n - first), x, k0, k1, total + g);
      }
      store_sums<M>(total, !k0, stream_stride, sums + n - first, lds);
    }
  }
}

template <typename X, typename T>
LK_INLINE void dot_streams(int64_t M, const Codes& w, const T& t, const X* x, const float* x_sums,
                           int64_t first, int64_t end, int64_t stream_stride, const Scales& scales,
                           float* sums, int64_t lds) {
#define LK_ROWS(m) \
  if (M == m) dot_streams<m>(w, t, x, x_sums, first, end, stream_stride, scales, sums, lds);
  LK_ROWS(1) LK_ROWS(2) LK_ROWS(3) LK_ROWS(4) LK_ROWS(5) LK_ROWS(6) LK_ROWS(7) LK_ROWS(8)
#undef LK_ROWS
}

// Calls f(n, end, scales, sums of row n) for batches of the rows [n, stop) of each stream. Scales
// are decoded to `buffer`. Those in float32 are read in place, unless blocks straddle rows or the W
// floats behind a batch lie past the last scale.
template <typename F>
LK_INLINE void for_each_batch(const Codes& w, const Table256& nested, int64_t n, int64_t stop,
                              int64_t stream_stride, float* buffer, float* sums, const F& f) {
  const int64_t each = w.has_shift ? 2 : 1, block_bytes = scale_bytes(w) * each;
  const int64_t all = (w.N * w.K >> w.log2_block) * each, row_scales = (w.K >> w.log2_block) * each;
  for (int64_t end; n < stop; sums += end - n, n = end) {
    end = min(stop, n + batch_rows(w));
    const bool is_in_place = w.scale_type == ScaleType::f32 && is_block_aligned(w) &&
                             (end + (STREAMS - 1) * stream_stride) * row_scales + W <= all;
    for (int64_t g = 0; g < STREAMS; ++g) {
      const int64_t block = (n + g * stream_stride) * w.K >> w.log2_block;
      const int64_t last = ((end + g * stream_stride) * w.K - 1) >> w.log2_block;
      if (!is_in_place)
        decode_scales(w, nested, block, last - block + 1, buffer + g * batch_scales(w));
      // Prefetch the next batch's scales into L2. So many lines would fill L1's miss buffers.
      const char* const next = static_cast<const char*>(w.absmax) + (last + 1) * block_bytes;
      for (int64_t i = 0; i < (last - block + 1) * block_bytes; i += 64)
        __builtin_prefetch(next + i, 0, 2);
    }
    const float* const in_place = static_cast<const float*>(w.absmax) + n * row_scales;
    const Scales scales = is_in_place ? Scales{in_place, stream_stride * row_scales}
                                      : Scales{buffer, batch_scales(w)};
    f(n, end, scales, sums);
  }
}

// A 4-bit weight for `gemv_streams` whose codes are looked up in registers. x_sums: of
// `block_sums`, for each row of x.
template <typename X, typename T>
struct CodedRows {
  const Codes& w;
  const T& code;
  const X* x;
  int64_t ldx;
  Passes passes;
  const float* x_sums;
  int64_t scratch_floats = STREAMS * batch_scales(w);

  const uint8_t* row(int64_t n) const { return w.packed + (n * w.K >> 1); }
  Table256 tables() const { return load_table_256(w.nested_code); }

  [[gnu::noinline]] void dots(const Table256& nested, int64_t n, int64_t stop,
                              int64_t stream_stride, float* buffer, float* sums,
                              int64_t lds) const {
    for_each_batch(w, nested, n, stop, stream_stride, buffer, sums,
                   [&](int64_t n, int64_t end, const Scales& scales, float* sums) {
                     passes.for_each([&](int64_t m, int64_t rows) {
                       dot_streams(rows, w, code, x + m * ldx,
                                   x_sums + 2 * m * (w.K >> w.log2_block), n, end, stream_stride,
                                   scales, sums + m * lds, lds);
                     });
                   });
  }
};

// A weight of 8 bits for `gemv_streams` whose codes are converted in registers. x and x_sums: as in
// CodedRows, with elements in their order.
template <typename Values>
struct ByteRows {
  const Codes& w;
  const float* x;
  int64_t ldx;
  Passes passes;
  const float* x_sums;
  int64_t scratch_floats = STREAMS * batch_scales(w);

  const uint8_t* row(int64_t n) const { return w.packed + n * w.K; }
  Table256 tables() const { return load_table_256(w.nested_code); }

  // sums[i * lds + g * stream_stride] = x[i] · row n + g * stream_stride of the weight.
  template <int M>
  [[gnu::always_inline]] void dot_row(int64_t n, int64_t stream_stride, const Scales& scales,
                                      const float* x_rows, const float* row_sums, float* sums,
                                      int64_t lds) const {
    const int log2_block = w.log2_block, pair = w.has_shift;
    const Values values{w.packed};
    const int64_t first = n * w.K, stream_elements = stream_stride * w.K;
    NanFlags nan[STREAMS] = {};
    vf total[STREAMS][M];
    LK_UNROLL for (int g = 0; g < STREAMS; ++g) LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] =
        zero();
    if (pair) {
      const int64_t count = 2 * (w.K >> log2_block);
      add_shifts<M>(scales.first, scales.stride, row_sums, count, total);
    }
    for (int64_t k0 = 0; k0 < w.K; k0 += CHAIN_CODES) {
      vf sum[STREAMS][M];
      LK_UNROLL for (int g = 0; g < STREAMS; ++g) LK_UNROLL for (int i = 0; i < M; ++i) sum[g][i] =
          zero();
      const int64_t k1 = min(k0 + CHAIN_CODES, w.K);
      const auto x_at = [&](int64_t k) {
        return x_rows + k / CHUNK_CODES * (M * CHUNK_CODES) + k % CHUNK_CODES;
      };
      const auto scale_at = [&](int g, int64_t k) {
        return splat(scales.of(g)[(k >> log2_block) << pair]);
      };
      // Adds one vector of codes, scaled.
      const auto add_vector = [&](int64_t k,
                                  const vf code[STREAMS]) __attribute__((always_inline)) {
        vf v[STREAMS];
        LK_UNROLL for (int g = 0; g < STREAMS; ++g) v[g] = mul(code[g], scale_at(g, k));
        LK_UNROLL for (int i = 0; i < M; ++i) {
          const vf xv = load(x_at(k) + i * CHUNK_CODES);
          LK_UNROLL for (int g = 0; g < STREAMS; ++g) sum[g][i] = fma(xv, v[g], sum[g][i]);
        }
      };
      // Adds two vectors of codes that share a scale, which multiplies their sum.
      const auto add_pair = [&](int64_t k,
                                const vf code[2][STREAMS]) __attribute__((always_inline)) {
        LK_UNROLL for (int i = 0; i < M; ++i) {
          const float* const xk = x_at(k) + i * CHUNK_CODES;
          const vf x0 = load(xk), x1 = load(xk + W);
          LK_UNROLL for (int g = 0; g < STREAMS; ++g) sum[g][i] =
              fma(fma(x1, code[1][g], mul(x0, code[0][g])), scale_at(g, k), sum[g][i]);
        }
      };
      const auto add_pairs = [&](int64_t k, auto shares_scale) __attribute__((always_inline)) {
        for (; k + 2 * W <= k1; k += 2 * W) {
          vf code[2][STREAMS];
          LK_UNROLL for (int g = 0; g < STREAMS; ++g) {
            __builtin_prefetch(w.packed + first + g * stream_elements + k + PREFETCH_BYTES, 0, 3);
            vf v[2];
            values.pair(first + g * stream_elements + k, v, nan[g]);
            LK_UNROLL for (int j = 0; j < 2; ++j) code[j][g] = v[j];
          }
          if constexpr (shares_scale) {
            add_pair(k, code);
          } else {
            LK_UNROLL for (int j = 0; j < 2; ++j) add_vector(k + j * W, code[j]);
          }
        }
        return k;
      };
      constexpr bool scales_sums = M <= MAX_SUM_SCALED_ROWS;
      int64_t k = scales_sums && 1 << log2_block >= 2 * W
                      ? add_pairs(k0, std::bool_constant<scales_sums>{})
                      : add_pairs(k0, std::false_type{});
      for (; k < k1; k += W) {  // a last block of 16 elements
        vf code[STREAMS];
        LK_UNROLL for (int g = 0; g < STREAMS; ++g) code[g] =
            mul(values(first + g * stream_elements + k), splat(1.0f / Values::FACTOR));
        add_vector(k, code);
      }
      LK_UNROLL for (int g = 0; g < STREAMS; ++g) LK_UNROLL for (int i = 0; i < M; ++i)
          total[g][i] = fma(sum[g][i], splat(Values::FACTOR), total[g][i]);
    }
    LK_UNROLL for (int g = 0; g < STREAMS; ++g) if (is_set(nan[g]))
        LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] = splat(__builtin_nanf(""));
    store_sums<M>(total, true, stream_stride, sums, lds);
  }

  [[gnu::noinline]] void dots(const Table256& nested, int64_t n, int64_t stop,
                              int64_t stream_stride, float* buffer, float* sums,
                              int64_t lds) const {
    const int64_t blocks = w.K >> w.log2_block, count = w.has_shift ? 2 * blocks : blocks;
    for_each_batch(w, nested, n, stop, stream_stride, buffer, sums,
                   [&](int64_t first, int64_t end, const Scales& scales, float* sums) {
                     for (int64_t n = first; n < end; ++n, ++sums)
                       passes.for_each([&](int64_t m, int64_t rows) {
#define LK_ROWS(r)                                                                                 \
  if (rows == r)                                                                                   \
    dot_row<r>(n, stream_stride, {scales.of(0) + (n - first) * count, scales.stride}, x + m * ldx, \
               x_sums + 2 * m * blocks, sums + m * lds, lds);
                         LK_ROWS(1) LK_ROWS(2) LK_ROWS(3) LK_ROWS(4)
#undef LK_ROWS
                       });
                   });
  }
};

// dst = W[row, k0 .. k1) of 8 bits or with a shift, with zeros up to a multiple of CHUNK_CODES.
// scales: of the row's blocks, with a shift in pairs. K is a multiple of the blocks' size.
template <typename X>
[[gnu::noinline]] void decode_slab_in_order(const Codes& w, Table t, int64_t row,
                                            const float* scales, int64_t k0, int64_t k1, X* dst) {
  const int64_t row_bytes = w.kind == CodeKind::nibble ? w.K / 2 : w.K;
  const char* const next = reinterpret_cast<const char*>(w.packed + row * row_bytes) +
                           k1 * row_bytes / w.K;  // the bytes of the next slab
  X* const end = dst + round_up(k1 - k0, CHUNK_CODES);
  dispatch_codes(w, t, [&](const auto& values, auto has_shift) {
    for (int64_t k = k0; k < k1; k += W, dst += W) {
      const float* const s = scales + ((k >> w.log2_block) << (has_shift ? 1 : 0));
      __builtin_prefetch(next + (k - k0), 0, 3);
      const vf product = mul(values(row * w.K + k), splat(s[0]));
      store(dst, has_shift ? add(product, splat(s[1])) : product);
    }
  });
  for (; dst < end; dst += W) store(dst, zero());
}

// dst = W[row, k0 .. k1), interleaved, with zeros up to a multiple of CHUNK_CODES. scales and
// offset: as in dot_codes.
template <bool BlockAligned, typename X, typename T>
LK_INLINE void decode_slab(const Codes& w, const T& t, int64_t row, const float* scales,
                           int64_t offset, int64_t k0, int64_t k1, X* dst) {
  const int log2_block = w.log2_block;
  const uint8_t* p = w.packed + ((row * w.K + k0) >> 1);
  const int64_t prefetch_distance = (k1 - k0) >> 1;
  const vu aligned = lane_blocks(0, log2_block);
  const auto step = [&](int64_t k, int filled) __attribute__((always_inline)) {
    const vu lanes = BlockAligned
                         ? aligned
                         : lane_blocks((offset + k) & ((int64_t{1} << log2_block) - 1), log2_block);
    __builtin_prefetch(p + prefetch_distance, 0, 3);
    decode_chunk(load_codes(p, filled), t,
                 gather_scales(scales + ((offset + k) >> log2_block), lanes, filled), dst);
    p += CHUNK_CODES / 2;
    dst += CHUNK_CODES;
  };
  int64_t k = k0;
  for (; k + CHUNK_CODES <= k1; k += CHUNK_CODES) step(k, W);
  if (k < k1) step(k, (int)(k1 - k) / 8);
}

// The lanes of total[g][i] sum to x[i] · w[g] over `count` elements, in chunks.
template <int J, int M, typename Word, typename X>
LK_INLINE void dot_decoded(const X* w, int64_t ldw, const X* x, int64_t count, vf total[J][M]) {
  constexpr int64_t E = W * ELEMENTS<Word>;
  LK_UNROLL for (int g = 0; g < J; ++g) LK_UNROLL for (int i = 0; i < M; ++i) total[g][i] = zero();
  for (int64_t k = 0; k < count; k += CHUNK_CODES, x += M * CHUNK_CODES)
    for (int64_t j = 0; j < CHUNK_CODES; j += E) {
      vf wv[J];
      LK_UNROLL for (int g = 0; g < J; ++g) wv[g] = load_words(w + g * ldw + k + j, E, Word{});
      LK_UNROLL for (int i = 0; i < M; ++i) {
        const vf xv = load_words(x + i * CHUNK_CODES + j, E, Word{});
        LK_UNROLL for (int g = 0; g < J; ++g) total[g][i] =
            word_fma(xv, wv[g], total[g][i], Word{});
      }
    }
}

LK_INLINE Table values_of(const Table& t) { return t; }

// Returns whether the elements of x and of decoded rows keep their order.
LK_INLINE bool is_in_order(const Codes& w, bool is_decoded) {
  return w.K % 8 || (is_decoded && (w.kind != CodeKind::nibble || w.has_shift));
}

// A weight for `gemv_streams` whose codes are decoded to memory, a slab of one row of each stream
// at a time. It serves many rows of x, codes of 8 bits, and any K that is no multiple of eight.
template <typename Word, typename X, typename T>
struct DecodedRows {
  const Codes& w;
  const T& code;
  const X* x;
  int64_t ldx;
  Passes passes;
  int64_t slab = balanced_slab(w.K, STREAMS* int64_t{sizeof(X)}, DECODED_SLAB_BYTES);
  int64_t scale_floats = round_up(STREAMS * batch_scales(w), 16);
  int64_t scratch_floats = scale_floats + STREAMS * slab * int64_t{sizeof(X)} / 4;

  const uint8_t* row(int64_t n) const { return w.packed + (n * w.K >> 1); }
  Table256 tables() const { return load_table_256(w.nested_code); }

  // dst = the elements [k0, k1) of row n and its counterparts in the other streams, `slab` apart.
  [[gnu::always_inline]] void decode(int64_t first, int64_t n, int64_t stream_stride,
                                     const Scales& scales, int64_t k0, int64_t k1, X* dst) const {
    for (int64_t g = 0; g < STREAMS; ++g, dst += slab) {
      const int64_t row = n + g * stream_stride,
                    offset = offset_in_block(w, first + g * stream_stride, n - first);
      if constexpr (std::is_same_v<X, float>)
        if (w.K % 8) {
          decode_row(w, code, row, k0, k1 - k0, dst);
          for (int64_t k = k1 - k0; k % CHUNK_CODES; ++k) dst[k] = 0.0f;
          continue;
        }
      if (is_in_order(w, true)) {
        const int64_t each = w.has_shift ? 2 : 1, blocks = w.K >> w.log2_block;
        decode_slab_in_order(w, values_of(code), row, scales.of(g) + (n - first) * blocks * each,
                             k0, k1, dst);
        continue;
      }
      if (is_block_aligned(w))
        decode_slab<true>(w, code, row, scales.of(g), offset, k0, k1, dst);
      else
        decode_slab<false>(w, code, row, scales.of(g), offset, k0, k1, dst);
    }
  }

  // sums[i * lds + g * stream_stride] = or, unless is_first, += x[i] · row g of `decoded`.
  template <int Rows>
  [[gnu::always_inline]] void add_dots(const X* decoded, const X* x, int64_t count, bool is_first,
                                       int64_t stream_stride, float* sums, int64_t lds) const {
    constexpr int J = DENSE_TILE_ROWS<Rows>;
    vf total[STREAMS][Rows];
    for (int g = 0; g < STREAMS; g += J)
      dot_decoded<J, Rows, Word>(decoded + g * slab, slab, x, count, total + g);
    store_sums<Rows>(total, is_first, stream_stride, sums, lds);
  }

  // Adds one slab's part to the sums of one row of each stream. `decoded` begins at element k0.
  [[gnu::always_inline]] void add_slab(const X* decoded, int64_t k0, int64_t count,
                                       int64_t stream_stride, float* sums, int64_t lds) const {
    passes.for_each([&](int64_t m, int64_t rows) {
      const X* const src = x + m * ldx + k0 * rows;
      float* const dst = sums + m * lds;
#define LK_ROWS(r) \
  if (rows == r) add_dots<r>(decoded, src, count, !k0, stream_stride, dst, lds);
      LK_ROWS(1) LK_ROWS(2) LK_ROWS(3) LK_ROWS(4) LK_ROWS(5) LK_ROWS(6)
#undef LK_ROWS
    });
  }

  [[gnu::noinline]] void dots(const Table256& nested, int64_t n, int64_t stop,
                              int64_t stream_stride, float* buffer, float* sums,
                              int64_t lds) const {
    X* const decoded = reinterpret_cast<X*>(buffer + scale_floats);
    for_each_batch(w, nested, n, stop, stream_stride, buffer, sums,
                   [&](int64_t first, int64_t end, const Scales& scales, float* sums) {
                     for (int64_t n = first; n < end; ++n, ++sums)
                       for (int64_t k0 = 0; k0 < w.K; k0 += slab) {
                         const int64_t k1 = min(k0 + slab, w.K);
                         decode(first, n, stream_stride, scales, k0, k1, decoded);
                         add_slab(decoded, k0, k1 - k0, stream_stride, sums, lds);
                       }
                   });
  }
};

// Rows of x that share codes of 8 bits that are converted in registers.
constexpr int64_t BYTE_PASS_ROWS = 4;

LK_INLINE bool converts_bytes(const Codes& w, int64_t M) {
  return M <= BYTE_PASS_ROWS && (w.kind == CodeKind::int8 || w.kind == CodeKind::e4m3);
}
template <typename X>
LK_INLINE bool uses_decoded_path(const Codes& w, int64_t M) {
  return w.K % 8 || w.kind != CodeKind::nibble || (HAS_DECODED_PATH && M >= MIN_DECODED_ROWS<X>);
}
template <typename X>
LK_INLINE Passes coded_passes(const Codes& w, int64_t M) {
  return {M, uses_decoded_path<X>(w, M) ? PASS_ROWS : CODED_PASS_ROWS};
}

template <typename Word, typename X, typename T>
LK_INLINE void gemv_coded(const GemvArgs& a, const T& code, const X* x, int64_t ldx,
                          const Passes& passes, const float* x_sums) {
  if (uses_decoded_path<X>(*a.codes, passes.M))
    gemv_streams(a, DecodedRows<Word, X, T>{*a.codes, code, x, ldx, passes});
  else
    gemv_streams(a, CodedRows<X, T>{*a.codes, code, x, ldx, passes, x_sums});
}

// A codebook of 16 integers less their middle, for nibbles whose shift leaves the loop; other
// codebooks as they are. Rounded to bf16 together with their scale, codes of 0 to 15 would lose
// twice what codes of -8 to 7 do, and their sum would cancel that of the shifts.
struct Centred {
  float code[16], centre;

  Centred(const Codes& w, bool is_decoded) {
    bool is_integer = w.has_shift && !is_decoded;
    for (int i = 0; i < 16; ++i) is_integer = is_integer && w.code[i] == __builtin_rintf(w.code[i]);
    centre = is_integer ? __builtin_rintf((w.code[0] + w.code[15]) / 2) : 0.0f;
    for (int i = 0; i < 16; ++i) code[i] = w.code[i] - centre;
  }
};

// P = scale * (mask(X) A^T); y[M, N] = c * (x W^T + (P * gate * alpha) Q) + bias for few rows. Sums
// in float32; y and z round once. Codes keep at least 17 bits until the sum, with one exception:
// for three rows of bf16 or more on avx512bf16, code times scale is rounded to bf16, or, for codes
// that are decoded to memory, with the shift. Reads each byte of the weight once from memory.
// Tested by tests/ops.
void gemv(const GemvArgs& a) {
  const int64_t M = a.update.M, K = a.shrink.K;
  if (!M) return;
  if (!a.codes) {
    dispatch_dtype(a.x.dtype, [&](auto type) {
      using T = decltype(type);
      gemv_streams(a, DenseRows<WordOf<T>, T>{a.w, a.x, K, {M, PASS_ROWS}});
    });
    return;
  }
  const Codes& codes = *a.codes;
  const int64_t ldx = round_up(K, CHUNK_CODES), blocks = K >> codes.log2_block;
  Scratch scratch((M * ldx + (codes.has_shift ? 2 * M * blocks : 0)) * 4);
  float* const x_sums = static_cast<float*>(scratch.data) + M * ldx;
  const auto sum_blocks = [&](float centre) {
    if (!codes.has_shift) return;
    dispatch_dtype(a.x.dtype, [&](auto type) {
      for (int64_t m = 0; m < M; ++m)
        block_sums(static_cast<const decltype(type)*>(a.x.data) + m * a.x.row_stride, K,
                   codes.log2_block, centre, x_sums + 2 * m * blocks);
    });
  };
  if (converts_bytes(codes, M)) {
    float* const x = static_cast<float*>(scratch.data);
    const Passes passes{M, BYTE_PASS_ROWS};
    sum_blocks(0.0f);
    dispatch_dtype(a.x.dtype, [&](auto type) {
      for_each_row(passes, ldx, [&](int64_t m, int64_t offset, int64_t stride) {
        copy_x(static_cast<const decltype(type)*>(a.x.data) + m * a.x.row_stride, K, x + offset,
               stride);
      });
    });
    if (codes.kind == CodeKind::int8)
      gemv_streams(a, ByteRows<Int8s>{codes, x, ldx, passes, x_sums});
    else
      gemv_streams(a, ByteRows<E4m3s>{codes, x, ldx, passes, x_sums});
    return;
  }
#ifdef LK_BF16_PAIRS
  // A pair of decoded codes of 8 bits rounds them with their scale.
  const bool rounds_codes = codes.kind == CodeKind::nibble || M > MAX_HIGH_LOW_ROWS;
  if (a.allows_pairs && a.x.dtype == DType::bf16 && K % 8 == 0 && rounds_codes) {
    bf16* const x = static_cast<bf16*>(scratch.data);
    const Passes passes = coded_passes<bf16>(codes, M);
    const bool is_decoded = uses_decoded_path<bf16>(codes, M);
    for_each_row(passes, ldx, [&](int64_t m, int64_t offset, int64_t stride) {
      const bf16* const src = static_cast<const bf16*>(a.x.data) + m * a.x.row_stride;
      if (is_in_order(codes, is_decoded))
        copy_x(src, K, x + offset, stride);
      else
        interleave_x_bf16(src, K, M <= MAX_HIGH_LOW_ROWS, x + offset, stride);
    });
    const Centred table(codes, is_decoded);
    sum_blocks(table.centre);
    gemv_coded<bf16x2>(a, bf16x2_tables(table.code), x, ldx, passes, x_sums);
    return;
  }
#endif
  float* const x = static_cast<float*>(scratch.data);
  const Passes passes = coded_passes<float>(codes, M);
  const bool is_decoded = uses_decoded_path<float>(codes, M);
  dispatch_dtype(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_row(passes, ldx, [&](int64_t m, int64_t offset, int64_t stride) {
      const T* const src = static_cast<const T*>(a.x.data) + m * a.x.row_stride;
      if (is_in_order(codes, is_decoded))
        copy_x(src, K, x + offset, stride);
      else
        interleave_x(src, K, x + offset, stride);
    });
  });
  const Centred table(codes, is_decoded);
  sum_blocks(table.centre);
  gemv_coded<float>(a, load_table(table.code), x, ldx, passes, x_sums);
}

}  // namespace
}  // namespace lora_kernels
