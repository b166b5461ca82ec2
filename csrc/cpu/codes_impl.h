#pragma once
// 4-bit weights: decoding them, and the layer for a few rows of x. Follows kernels_impl.h.

namespace lora_kernels {
namespace {

constexpr int64_t AHEAD = 4096;  // bytes of codes asked for before they are needed
constexpr int64_t RUN = 16;      // elements from a multiple of which on lie in one block

// Two roundings where scales are nested; this file is compiled without contraction.
LK_INLINE float scale_of(const Codes4bit& w, int64_t block) {
  if (!w.nested_code) return static_cast<const float*>(w.absmax)[block];
  const float relative = w.nested_code[static_cast<const uint8_t*>(w.absmax)[block]];
  return relative * w.nested_absmax[block >> w.log2_nested] + w.offset;
}

// to[i * stride] = the scales of `count` blocks.
LK_INLINE void scales_of(const Codes4bit& w, int64_t block, int64_t count, float* to,
                         int64_t stride) {
  if (!w.nested_code) {
    for (int64_t i = 0; i < count; ++i)
      to[i * stride] = static_cast<const float*>(w.absmax)[block + i];
    return;
  }
  for (const int64_t end = block + count; block < end;) {  // runs of one nested scale
    const int64_t run = min(end, ((block >> w.log2_nested) + 1) << w.log2_nested) - block;
    const float scale = w.nested_absmax[block >> w.log2_nested];
    const uint8_t* const codes = static_cast<const uint8_t*>(w.absmax) + block;
    int64_t i = 0;
    for (; stride == 1 && i + W <= run; i += W)
      store(to + i, add(mul(gather(w.nested_code, codes + i), splat(scale)), splat(w.offset)));
    for (; i < run; ++i) {
      const float relative = w.nested_code[codes[i]] * scale;
      to[i * stride] = relative + w.offset;
    }
    block += run;
    to += run * stride;
  }
}

LK_INLINE float element(const Codes4bit& w, int64_t i) {
  const int byte = w.packed[i >> 1];
  return w.code[i & 1 ? byte & 15 : byte >> 4] * scale_of(w, i >> w.log2_block);
}

// f(k, vector, lanes) for the elements k of `count` from element `first` on, W at a time, times
// their scales; first is a multiple of RUN.
template <typename F>
LK_INLINE void each_vector(const Codes4bit& w, Table t, int64_t first, int64_t count, const F& f) {
  for (int64_t k = 0; k < count;) {
    const int64_t block = (first + k) >> w.log2_block;
    const int64_t end = min(count, ((block + 1) << w.log2_block) - first);
    const vf scale = splat(scale_of(w, block));
    for (; k + W <= end; k += W) f(k, mul(look_up(t, w.packed + (first + k) / 2), scale), W);
    if (k < end) {  // the weight's bytes may end here
      uint8_t bytes[W / 2] = {};
      __builtin_memcpy(bytes, w.packed + (first + k) / 2, (size_t)(end - k + 1) / 2);
      f(k, mul(look_up(t, bytes), scale), (int)(end - k));
      k = end;
    }
  }
}

// to[0 .. count) = row n's columns from k0 on.
template <typename T>
LK_INLINE void decode_row(const Codes4bit& w, Table t, int64_t n, int64_t k0, int64_t count,
                          T* to) {
  const int64_t first = n * w.K + k0;
  if (first % RUN == 0) {
    each_vector(w, t, first, count, [&](int64_t k, vf v, int lanes) {
      if (lanes == W) {
        store_exactly(to + k, v);
      } else {
        T some[W];
        store_exactly(some, v);
        __builtin_memcpy(to + k, some, (size_t)lanes * sizeof(T));
      }
    });
    return;
  }
  for (int64_t k = 0; k < count; k += W) {
    float lanes[W] = {};
    const int rest = (int)min(W, count - k);
    for (int i = 0; i < rest; ++i) lanes[i] = element(w, first + k + i);
    T some[W];
    store_exactly(some, load(lanes));
    __builtin_memcpy(to + k, some, (size_t)rest * sizeof(T));
  }
}

// quantize ------------------------------------------------------------------------------------

constexpr int64_t SOME = 32;  // elements whose codes are found together; every block is of these

LK_INLINE float largest_magnitude(const float* v, int64_t count) {
  uint32_t largest = 0;  // magnitudes are ordered as their bits are, which a compiler can use
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, v + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &largest, 4);
  return magnitude;
}

// SOME / 2 bytes of codes; v is scaled.
LK_INLINE void encode(const QuantizeArgs& a, const float* v, uint8_t* to) {
  int32_t above[SOME] = {};
  for (int t = 0; t < 15; ++t)
    for (int64_t i = 0; i < SOME; ++i) above[i] += v[i] > a.thresholds[t];
  for (int64_t i = 0; i < SOME; i += 2)
    to[i / 2] = (uint8_t)(a.order[above[i]] << 4 | a.order[above[i + 1]]);
}

// Bound by reading the weight: about 30 instructions for W elements. Exact: the bits of
// reference.quantize_4bit. Tested by tests/quantization.
void quantize(const QuantizeArgs& a) {
  const int64_t size = int64_t{1} << a.log2_block, blocks = (a.n + size - 1) / size;
  const int64_t chunks = a.n < SMALL ? 1 : min(blocks, int64_t{a.threads} * 4);
  Scratch scratch(chunks * size * 4);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    parallel(a.threads, chunks, [&](int64_t chunk) {
      float* const v = static_cast<float*>(scratch.data) + chunk * size;
      for (int64_t b = blocks * chunk / chunks; b < blocks * (chunk + 1) / chunks; ++b) {
        const int64_t first = b * size, count = min(size, a.n - first);
        copy_kept(static_cast<const T*>(a.weight) + first, v, count, size, nullptr, 0, 0);
        float absmax = largest_magnitude(v, count);
        const float scale = absmax < a.smallest ? a.smallest : absmax;  // NaN stays
        if (count == size) {
          const float reciprocal = 1.0f / scale;
          for (int64_t i = 0; i < size; ++i) v[i] *= reciprocal;
        } else {
          absmax = scale;
          for (int64_t i = 0; i < count; ++i) v[i] /= scale;
        }
        a.absmax[b] = absmax;
        uint8_t* const to = a.packed + first / 2;
        int64_t i = 0;
        for (; i + SOME <= count; i += SOME) encode(a, v + i, to + i / 2);
        if (i < count) {  // the weight's bytes end here
          uint8_t bytes[SOME / 2];
          encode(a, v + i, bytes);
          __builtin_memcpy(to + i / 2, bytes, (size_t)(count - i + 1) / 2);
        }
      }
    });
  });
}

// dequantize ----------------------------------------------------------------------------------

// Rows of the weight, each element rounded once to the output's dtype. Tested by
// tests/quantization.
void dequantize(const DequantizeArgs& a) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Table t = table(a.codes.code);
    const int64_t chunks = a.rows * a.cols < SMALL ? 1 : min(a.threads, a.rows);
    parallel(a.threads, chunks, [&](int64_t chunk) {
      for (int64_t i = a.rows * chunk / chunks; i < a.rows * (chunk + 1) / chunks; ++i)
        decode_row(a.codes, t, a.n0 + i, a.k0, a.cols, static_cast<T*>(a.to) + i * a.ld);
    });
  });
}

// few_rows ------------------------------------------------------------------------------------

// total[i] += x[i] · `blocks` whole blocks of a row, whose codes begin at p, of `groups` times 2 W
// elements. A block's codes are summed before its scale is applied.
template <int M>
LK_INLINE void dot_blocks(const uint8_t* p, Table t, int64_t blocks, int64_t groups,
                          const float* scales, const float* x, int64_t ldx, vf total[M]) {
  for (int64_t b = 0; b < blocks; ++b) {
    __builtin_prefetch(p + AHEAD, 0, 3);
    vf even[M], odd[M];
    LK_UNROLL for (int i = 0; i < M; ++i) even[i] = odd[i] = zero();
    for (int64_t g = 0; g < groups; ++g, p += W, x += 2 * W) {
      vf e, o;
      look_up_both(t, p, e, o);
      LK_UNROLL for (int i = 0; i < M; ++i) {
        even[i] = fma(load(x + i * ldx), e, even[i]);
        odd[i] = fma(load(x + i * ldx + W), o, odd[i]);
      }
    }
    const vf scale = splat(scales[b]);
    LK_UNROLL for (int i = 0; i < M; ++i) total[i] = fma(add(even[i], odd[i]), scale, total[i]);
  }
}

// sums[i] = x[i] · row n of the weight, for M rows of float32 in whose every 2 W elements the even
// ones come first; zeros follow the last. buffer: round_up(K, 2 W) floats.
template <int M>
LK_INLINE void dot_codes(const Codes4bit& w, Table t, int64_t n, const float* x, int64_t ldx,
                         float* buffer, float* sums) {
  vf total[M];
  LK_UNROLL for (int i = 0; i < M; ++i) total[i] = zero();
  const int64_t first = n * w.K, size = int64_t{1} << w.log2_block;
  const int64_t blocks = first % size == 0 && size % (2 * W) == 0 ? w.K / size : 0;
  scales_of(w, first / size, blocks, buffer, 1);
  constexpr int64_t USUAL = 64 / (2 * W);  // groups, known to the compiler
  if (size == 64)
    dot_blocks<M>(w.packed + first / 2, t, blocks, USUAL, buffer, x, ldx, total);
  else
    dot_blocks<M>(w.packed + first / 2, t, blocks, size / (2 * W), buffer, x, ldx, total);
  const int64_t k = blocks * size, rest = w.K - k;
  if (rest) {  // not of whole blocks: from the row decoded to memory
    decode_row(w, t, n, k, rest, buffer);
    for (int64_t j = rest; j < round_up(rest, 2 * W); ++j) buffer[j] = 0.0f;
    for (int64_t j = 0; j < rest; j += 2 * W) {
      float halves[2 * W];
      for (int64_t l = 0; l < 2 * W; ++l) halves[l % 2 * W + l / 2] = buffer[j + l];
      LK_UNROLL for (int i = 0; i < M; ++i) {
        const float* p = x + i * ldx + k + j;
        total[i] = fma(load(p), load(halves), fma(load(p + W), load(halves + W), total[i]));
      }
    }
  }
  LK_UNROLL for (int i = 0; i < M; ++i) {
    float lanes[4];
    const vf four[4] = {total[i], zero(), zero(), zero()};
    sum_lanes(four, lanes);
    sums[i] = lanes[0];
  }
}

template <int M>
LK_INLINE void few_rows_of(const FewRowsArgs& a, const float* x, int64_t ldx, const float* s,
                           int64_t n0, int64_t n1, float* row) {
  const ExpandArgs& u = a.update;
  const Table t = table(a.codes.code);
  for (int64_t n = n0; n < n1; ++n) {
    float sums[M], lora[M] = {};
    dot_codes<M>(a.codes, t, n, x, ldx, row, sums);
    with_type(u.q.dtype, [&](auto type) {
      using T = decltype(type);
      const T* q = static_cast<const T*>(u.q.data) + n * u.q.col;
      for (int64_t r = 0; r < u.R; ++r) {
        const float b = widen_one(q + r * u.q.row);
        for (int i = 0; i < M; ++i) lora[i] += s[i * u.R + r] * b;
      }
    });
    with_type(u.dtype, [&](auto type) {
      using T = decltype(type);
      for (int i = 0; i < M; ++i) {
        float y = sums[i] + lora[i];
        if (u.z) store_n(static_cast<T*>(u.z) + i * u.N + n, splat(y), 1);
        if (u.c) y *= u.c[n];
        if (u.bias) y += u.bias[n];
        store_n(static_cast<T*>(u.y) + i * u.ldy + n, splat(y), 1);
      }
    });
  }
}

// y[M, N] = c * (x W^T + (S * gate * alpha) Q) + bias for M <= FEW_ROWS. x is widened once; a
// thread takes a share of the weight's rows and streams their codes, one look-up for all rows of x;
// Q is consumed last. Sums in float32, scales applied to the codes, y rounds once (z likewise).
// Reads each packed byte once. Tested by tests/quantization.
void few_rows(const FewRowsArgs& a) {
  const ExpandArgs& u = a.update;
  const int64_t M = u.M, K = a.codes.K, ldx = round_up(K, 2 * W), s_floats = round_up(M * u.R, W);
  if (!M) return;
  const int64_t chunks = M * u.N * K < SMALL ? 1 : min(u.threads, u.N);
  Scratch scratch((M * ldx + s_floats + chunks * ldx) * 4);
  float* const x = static_cast<float*>(scratch.data);
  float* const s = x + M * ldx;
  float* const rows = s + s_floats;
  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t m = 0; m < M; ++m) {
      copy_kept(static_cast<const T*>(a.x.data) + m * a.x.row, rows, K, ldx, nullptr, 0, 0);
      float* to = x + m * ldx;
      for (int64_t k = 0; k < ldx; k += 2 * W)
        for (int64_t j = 0; j < W; ++j) {
          to[k + j] = rows[k + 2 * j];
          to[k + W + j] = rows[k + 2 * j + 1];
        }
    }
  });
  for (int64_t m = 0; m < M; ++m)
    for (int64_t r = 0; r < u.R; ++r)
      s[m * u.R + r] = u.s[m * u.R + r] * (u.gate ? u.alpha * u.gate[r] : u.alpha);
  parallel(u.threads, chunks, [&](int64_t chunk) {
    const int64_t n0 = u.N * chunk / chunks, n1 = u.N * (chunk + 1) / chunks;
    float* row = rows + chunk * ldx;
    if (M == 1) few_rows_of<1>(a, x, ldx, s, n0, n1, row);
    if (M == 2) few_rows_of<2>(a, x, ldx, s, n0, n1, row);
    if (M == 3) few_rows_of<3>(a, x, ldx, s, n0, n1, row);
    if (M == 4) few_rows_of<4>(a, x, ldx, s, n0, n1, row);
    if (M == 5) few_rows_of<5>(a, x, ldx, s, n0, n1, row);
    if (M == 6) few_rows_of<6>(a, x, ldx, s, n0, n1, row);
    if (M == 7) few_rows_of<7>(a, x, ldx, s, n0, n1, row);
    if (M == 8) few_rows_of<8>(a, x, ldx, s, n0, n1, row);
  });
}

}  // namespace
}  // namespace lora_kernels
