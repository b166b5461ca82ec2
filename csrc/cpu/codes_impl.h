#pragma once
// 4-bit weights: quantization and decoding. Follows kernels_impl.h.

namespace lora_kernels {
namespace {

constexpr int64_t MIN_BLOCKSIZE = 16;

// Nested scales are rounded twice: this file is compiled without contraction.
LK_INLINE float block_scale(const Codes& w, int64_t block) {
  if (!w.nested_code) return static_cast<const float*>(w.absmax)[block];
  const float relative = w.nested_code[static_cast<const uint8_t*>(w.absmax)[block]];
  if (!w.nested_absmax) return relative;
  return relative * w.nested_absmax[block >> w.log2_nested] + *w.offset;
}

// dst[i] = the scale of block `block` + i for i < count. t: nested_code, if there is one.
LK_INLINE void decode_scales(const Codes& w, const Table256& t, int64_t block, int64_t count,
                             float* dst) {
  if (!w.nested_code) {
    __builtin_memcpy(dst, static_cast<const float*>(w.absmax) + block, (size_t)count * sizeof *dst);
    return;
  }
  if (!w.nested_absmax) {
    const uint8_t* const codes = static_cast<const uint8_t*>(w.absmax) + block;
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
      vf v[2];
      lookup_2w(t, codes + i, v);
      store(dst + i, v[0]);
      store(dst + i + W, v[1]);
    }
    for (; i < count; ++i) dst[i] = w.nested_code[codes[i]];
    return;
  }
  const float offset = *w.offset;
  for (const int64_t end = block + count; block < end;) {  // blocks that share a nested scale
    const int64_t run = min(end, ((block >> w.log2_nested) + 1) << w.log2_nested) - block;
    const float scale = w.nested_absmax[block >> w.log2_nested];
    const uint8_t* const codes = static_cast<const uint8_t*>(w.absmax) + block;
    int64_t i = 0;
    for (; i + 2 * W <= run; i += 2 * W) {
      vf v[2];
      lookup_2w(t, codes + i, v);
      store(dst + i, add(mul(v[0], splat(scale)), splat(offset)));
      store(dst + i + W, add(mul(v[1], splat(scale)), splat(offset)));
    }
    for (; i < run; ++i) {
      const float relative = w.nested_code[codes[i]] * scale;
      dst[i] = relative + offset;
    }
    block += run;
    dst += run;
  }
}

LK_INLINE float decode_element(const Codes& w, int64_t i) {
  const int byte = w.packed[i >> 1];
  return w.code[i & 1 ? byte & 15 : byte >> 4] * block_scale(w, i >> w.log2_block);
}

// Calls f(k, values, lanes) for vectors of W scaled elements, the last perhaps shorter. Together
// they are elements [first, first + count) of the weight; k counts from `first`, a multiple of
// MIN_BLOCKSIZE.
template <typename F>
LK_INLINE void for_each_vector(const Codes& w, Table t, int64_t first, int64_t count,
                               const F& f) {
  for (int64_t k = 0; k < count;) {
    const int64_t block = (first + k) >> w.log2_block;
    const int64_t end = min(count, ((block + 1) << w.log2_block) - first);
    const vf scale = splat(block_scale(w, block));
    for (; k + W <= end; k += W) f(k, mul(lookup(t, w.packed + (first + k) / 2), scale), W);
    if (k < end) {  // the weight's bytes may end here
      uint8_t bytes[W / 2] = {};
      __builtin_memcpy(bytes, w.packed + (first + k) / 2, (size_t)(end - k + 1) / 2);
      f(k, mul(lookup(t, bytes), scale), (int)(end - k));
      k = end;
    }
  }
}

// dst[i] = W[n, k0 + i] for i < count.
template <typename T>
LK_INLINE void decode_row(const Codes& w, Table t, int64_t n, int64_t k0, int64_t count,
                          T* dst) {
  const int64_t first = n * w.K + k0;
  if (first % MIN_BLOCKSIZE == 0) {
    for_each_vector(w, t, first, count, [&](int64_t k, vf v, int lanes) {
      if (lanes == W) {
        store_ieee(dst + k, v);
      } else {
        T tail[W];
        store_ieee(tail, v);
        __builtin_memcpy(dst + k, tail, (size_t)lanes * sizeof(T));
      }
    });
    return;
  }
  for (int64_t k = 0; k < count; k += W) {
    float lanes[W] = {};
    const int valid = (int)min(W, count - k);
    for (int i = 0; i < valid; ++i) lanes[i] = decode_element(w, first + k + i);
    T tail[W];
    store_ieee(tail, load(lanes));
    __builtin_memcpy(dst + k, tail, (size_t)valid * sizeof(T));
  }
}

// quantize ------------------------------------------------------------------------------------

constexpr int64_t ENCODE_WIDTH = 32;  // elements encoded at once; divides NF4's block sizes

LK_INLINE float abs_max(const float* v, int64_t count) {
  uint32_t largest = 0;  // magnitudes compare as their bits do, which vectorizes
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

// packed = the codes of ENCODE_WIDTH scaled values, in ENCODE_WIDTH / 2 bytes.
LK_INLINE void encode(const QuantizeArgs& a, const float* values, uint8_t* packed) {
  int32_t bin[ENCODE_WIDTH] = {};
  for (int t = 0; t < 15; ++t)
    for (int64_t i = 0; i < ENCODE_WIDTH; ++i) bin[i] += values[i] > a.thresholds[t];
  for (int64_t i = 0; i < ENCODE_WIDTH; i += 2)
    packed[i / 2] = (uint8_t)(a.bin_codes[bin[i]] << 4 | a.bin_codes[bin[i + 1]]);
}

// Quantizes in about 30 instructions for W elements, so reading the weight is the bound. The bits
// are those of reference.quantize_4bit. Tested by tests/quantization.
[[maybe_unused]] void quantize(const QuantizeArgs& a) {
  const int64_t size = int64_t{1} << a.log2_block, blocks = (a.n + size - 1) / size;
  const int64_t chunks = a.n < MIN_PARALLEL_WORK ? 1 : min(blocks, int64_t{a.threads} * 4);
  Scratch scratch(chunks * size * 4);
  dispatch_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(a.threads, chunks, [&](int64_t chunk) {
      float* const values = static_cast<float*>(scratch.data) + chunk * size;
      for (int64_t b = blocks * chunk / chunks; b < blocks * (chunk + 1) / chunks; ++b) {
        const int64_t first = b * size, count = min(size, a.n - first);
        copy_masked(static_cast<const T*>(a.weight) + first, values, count, size, nullptr, 0, 0);
        float absmax = abs_max(values, count);
        const float scale = absmax < a.min_scale ? a.min_scale : absmax;  // NaN stays
        if (count == size) {
          const float reciprocal = 1.0f / scale;
          for (int64_t i = 0; i < size; ++i) values[i] *= reciprocal;
        } else {
          absmax = scale;
          for (int64_t i = 0; i < count; ++i) values[i] /= scale;
        }
        a.absmax[b] = absmax;
        uint8_t* const packed = a.packed + first / 2;
        int64_t i = 0;
        for (; i + ENCODE_WIDTH <= count; i += ENCODE_WIDTH) encode(a, values + i, packed + i / 2);
        if (i < count) {  // the weight's bytes end here
          uint8_t bytes[ENCODE_WIDTH / 2];
          encode(a, values + i, bytes);
          __builtin_memcpy(packed + i / 2, bytes, (size_t)(count - i + 1) / 2);
        }
      }
    });
  });
}

// dequantize ----------------------------------------------------------------------------------

// Decodes rows of the weight; each element rounds once, to the output's dtype. Tested by
// tests/quantization.
[[maybe_unused]] void dequantize(const DequantizeArgs& a) {
  dispatch_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Table t = load_table(a.codes.code);
    const int64_t chunks = a.rows * a.cols < MIN_PARALLEL_WORK ? 1 : min(a.threads, a.rows);
    parallel_for(a.threads, chunks, [&](int64_t chunk) {
      for (int64_t i = a.rows * chunk / chunks; i < a.rows * (chunk + 1) / chunks; ++i)
        decode_row(a.codes, t, a.n0 + i, a.k0, a.cols, static_cast<T*>(a.out) + i * a.ld);
    });
  });
}

}  // namespace
}  // namespace lora_kernels
