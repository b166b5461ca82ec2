#pragma once
// Quantized weights: decoding, and quantization to 4 bits. Follows kernels_impl.h.

namespace lora_kernels {
namespace {

constexpr int64_t MIN_BLOCKSIZE = 16;

// Scales, shifts and elements are rounded after each operation: this file is compiled without
// contraction.

// Element i of the scales; with a shift of their pairs.
LK_INLINE float scale_at(const Codes& w, int64_t i) {
  if (w.scale_type == ScaleType::f32) return static_cast<const float*>(w.absmax)[i];
  if (w.scale_type == ScaleType::f16) return load_scalar(static_cast<const f16*>(w.absmax) + i);
  const float relative = w.nested_code[static_cast<const uint8_t*>(w.absmax)[i]];
  if (!w.nested_absmax) return relative;
  const int64_t block = w.has_shift ? i >> 1 : i, nested = block >> w.log2_nested;
  const float scale = relative * w.nested_absmax[w.has_shift ? 2 * nested + (i & 1) : nested];
  return w.offset ? scale + *w.offset : scale;
}
LK_INLINE float block_scale(const Codes& w, int64_t block) {
  return scale_at(w, w.has_shift ? 2 * block : block);
}
LK_INLINE float block_shift(const Codes& w, int64_t block) { return scale_at(w, 2 * block + 1); }

// dst[i - first] = element i of the scales for first <= i < end, of scales in bytes. t:
// nested_code.
LK_INLINE void decode_byte_scales(const Codes& w, const Table256& t, int64_t first, int64_t end,
                                  float* dst) {
  // Local copies, because a vector store may alias the fields of w, which would be loaded again.
  const uint8_t* const bytes = static_cast<const uint8_t*>(w.absmax);
  const float* const nested = w.nested_absmax;
  const int each = w.has_shift ? 2 : 1, log2_group = w.log2_nested + w.has_shift;
  const int64_t all = (w.N * w.K >> w.log2_block) * each;
  const bool has_offset = w.offset;
  const vf offset = splat(has_offset ? *w.offset : 0.0f);
  const auto factors = [&](int64_t i) __attribute__((always_inline)) {  // of elements i to i + W
    const int64_t group = i >> log2_group;
    if (group == (i + W - 1) >> log2_group)
      return each == 2 ? splat_pair(nested + 2 * group) : splat(nested[group]);
    float lanes[W];
    for (int l = 0; l < W; ++l) lanes[l] = nested[((i + l) >> log2_group) * each + (i + l) % each];
    return load(lanes);
  };
  int64_t i = first;
  // lookup_2w reads 2 W bytes. Scalar code decodes what is left where that is past the end.
  for (int64_t count; (count = min(2, (end - i) / W)) && i + 2 * W <= all; i += count * W) {
    vf v[2];
    lookup_2w(t, bytes + i, v);
    for (int j = 0; j < count; ++j, dst += W) {
      vf scale = v[j];
      if (nested) scale = mul(scale, factors(i + j * W));
      store(dst, has_offset ? add(scale, offset) : scale);
    }
  }
  for (; i < end; ++i) *dst++ = scale_at(w, i);
}

// dst[i] = the scale of block `block` + i for i < count, or with a shift dst[2 i] and dst[2 i + 1]
// its scale and its shift. t: nested_code, if there is one.
LK_INLINE void decode_scales(const Codes& w, const Table256& t, int64_t block, int64_t count,
                             float* dst) {
  const int each = w.has_shift ? 2 : 1;
  block *= each;
  count *= each;
  if (w.scale_type == ScaleType::f32) {
    __builtin_memcpy(dst, static_cast<const float*>(w.absmax) + block, (size_t)count * sizeof *dst);
  } else if (w.scale_type == ScaleType::f16) {
    const f16* const src = static_cast<const f16*>(w.absmax) + block;
    int64_t i = 0;
    for (; i + W <= count; i += W) store(dst + i, load(src + i));
    for (; i < count; ++i) dst[i] = load_scalar(src + i);
  } else {
    decode_byte_scales(w, t, block, block + count, dst);
  }
}

LK_INLINE float code_value(const Codes& w, int64_t i) {
  if (w.kind != CodeKind::nibble) return w.code[w.packed[i]];
  const int byte = w.packed[i >> 1];
  return w.code[i & 1 ? byte & 15 : byte >> 4];
}
LK_INLINE float decode_element(const Codes& w, int64_t i) {
  const int64_t block = i >> w.log2_block;
  const float product = code_value(w, i) * block_scale(w, block);
  return w.has_shift ? product + block_shift(w, block) : product;
}

// The values of W codes from element i on, a multiple of W.
struct Nibbles {
  const uint8_t* packed;
  Table t;
  [[gnu::always_inline]] vf operator()(int64_t i) const { return lookup(t, packed + i / 2); }
};
// pair: the values of elements i to i + 2 W over FACTOR; nan as in load_2w_e4m3.
struct Int8s {
  static constexpr float FACTOR = 1.0f;
  const uint8_t* packed;
  [[gnu::always_inline]] vf operator()(int64_t i) const { return load_int8(packed + i); }
  [[gnu::always_inline]] void pair(int64_t i, vf out[2], NanFlags&) const {
    out[0] = load_int8(packed + i);
    out[1] = load_int8(packed + i + W);
  }
};
struct E4m3s {
  static constexpr float FACTOR = 256.0f;
  const uint8_t* packed;
  [[gnu::always_inline]] vf operator()(int64_t i) const { return load_e4m3(packed + i); }
  [[gnu::always_inline]] void pair(int64_t i, vf out[2], NanFlags& nan) const {
    load_2w_e4m3(packed + i, out, nan);
  }
};
struct Bytes {
  const uint8_t* packed;
  const float* code;
  [[gnu::always_inline]] vf operator()(int64_t i) const {
    float lanes[W];
    for (int j = 0; j < W; ++j) lanes[j] = code[packed[i + j]];
    return load(lanes);
  }
};

// Calls f(values, has_shift), a function for the kind of codes and a constant.
template <typename F>
LK_INLINE void dispatch_codes(const Codes& w, Table t, const F& f) {
  const auto dispatch_shift = [&](const auto& values) {
    w.has_shift ? f(values, std::true_type{}) : f(values, std::false_type{});
  };
  if (w.kind == CodeKind::nibble) dispatch_shift(Nibbles{w.packed, t});
  if (w.kind == CodeKind::int8) dispatch_shift(Int8s{w.packed});
  if (w.kind == CodeKind::e4m3) dispatch_shift(E4m3s{w.packed});
  if (w.kind == CodeKind::byte) dispatch_shift(Bytes{w.packed, w.code});
}

// dst[i] = element `first` + i of the weight for i < count. `first` is a multiple of MIN_BLOCKSIZE.
template <bool HasShift, typename T, typename Values>
LK_INLINE void decode_vectors(const Codes& w, const Values& values, int64_t first, int64_t count,
                              T* dst) {
  for (int64_t k = 0; k < count;) {
    const int64_t block = (first + k) >> w.log2_block;
    const int64_t end = min(count, ((block + 1) << w.log2_block) - first);
    const vf scale = splat(block_scale(w, block));
    const vf shift = splat(HasShift ? block_shift(w, block) : 0.0f);
    for (; k + W <= end; k += W) {
      const vf product = mul(values(first + k), scale);
      store_ieee(dst + k, HasShift ? add(product, shift) : product);
    }
    if (k < end) {  // the weight's bytes may end here
      T tail[W];
      float lanes[W] = {};
      for (int64_t i = k; i < end; ++i) lanes[i - k] = code_value(w, first + i);
      const vf product = mul(load(lanes), scale);
      store_ieee(tail, HasShift ? add(product, shift) : product);
      __builtin_memcpy(dst + k, tail, (size_t)(end - k) * sizeof(T));
      k = end;
    }
  }
}

// dst[i] = W[n, k0 + i] for i < count.
template <typename T>
[[gnu::noinline]] void decode_row(const Codes& w, Table t, int64_t n, int64_t k0, int64_t count,
                                  T* dst) {
  const int64_t first = n * w.K + k0;
  if (first % MIN_BLOCKSIZE == 0) {
    dispatch_codes(w, t, [&](const auto& values, auto has_shift) {
      decode_vectors<decltype(has_shift)::value>(w, values, first, count, dst);
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
