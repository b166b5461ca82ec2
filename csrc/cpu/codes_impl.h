#pragma once
// 4-bit weights: quantizing and decoding them. Follows kernels_impl.h.

namespace lora_kernels {
namespace {

constexpr int64_t RUN = 16;  // elements that lie in one block if the first is at a multiple of RUN

// Two roundings where scales are nested twice; this file is compiled without contraction.
LK_INLINE float scale_of(const Codes4bit& w, int64_t block) {
  if (!w.nested_code) return static_cast<const float*>(w.absmax)[block];
  const float relative = w.nested_code[static_cast<const uint8_t*>(w.absmax)[block]];
  if (!w.nested_absmax) return relative;
  return relative * w.nested_absmax[block >> w.log2_nested] + *w.offset;
}

// to[0 .. count) = the scales of blocks; t: of nested_code, where there is one.
LK_INLINE void scales_of(const Codes4bit& w, const Table256& t, int64_t block, int64_t count,
                         float* to) {
  if (!w.nested_code) {
    __builtin_memcpy(to, static_cast<const float*>(w.absmax) + block, (size_t)count * sizeof *to);
    return;
  }
  if (!w.nested_absmax) {
    const uint8_t* const codes = static_cast<const uint8_t*>(w.absmax) + block;
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
      vf v[2];
      look_up_both(t, codes + i, v);
      store(to + i, v[0]);
      store(to + i + W, v[1]);
    }
    for (; i < count; ++i) to[i] = w.nested_code[codes[i]];
    return;
  }
  const float offset = *w.offset;
  for (const int64_t end = block + count; block < end;) {  // runs of one nested scale
    const int64_t run = min(end, ((block >> w.log2_nested) + 1) << w.log2_nested) - block;
    const float scale = w.nested_absmax[block >> w.log2_nested];
    const uint8_t* const codes = static_cast<const uint8_t*>(w.absmax) + block;
    int64_t i = 0;
    for (; i + 2 * W <= run; i += 2 * W) {
      vf v[2];
      look_up_both(t, codes + i, v);
      store(to + i, add(mul(v[0], splat(scale)), splat(offset)));
      store(to + i + W, add(mul(v[1], splat(scale)), splat(offset)));
    }
    for (; i < run; ++i) {
      const float relative = w.nested_code[codes[i]] * scale;
      to[i] = relative + offset;
    }
    block += run;
    to += run;
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

constexpr int64_t SOME = 32;  // elements whose codes are found together; NF4's blocks are of these

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
[[maybe_unused]] void quantize(const QuantizeArgs& a) {
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
[[maybe_unused]] void dequantize(const DequantizeArgs& a) {
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

}  // namespace
}  // namespace lora_kernels
