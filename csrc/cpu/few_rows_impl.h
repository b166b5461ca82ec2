// The layer for a few rows of x on a 4-bit weight, whose codes are looked up in registers.

namespace lora_kernels {
namespace {

// In float32 ----------------------------------------------------------------------------------

// x as `dot` takes it: in every 2 W elements the even ones first; zeros follow the last.
template <typename T>
LK_INLINE void order(const T* from, int64_t K, float* to) {
  const int64_t ld = round_up(K, 2 * W);
  for (int64_t k = 0; k < ld; k += 2 * W) {
    float both[2 * W];
    copy_kept(from + k, both, K - k, 2 * W, nullptr, 0, 0);
    for (int64_t j = 0; j < W; ++j) {
      to[k + j] = both[2 * j];
      to[k + W + j] = both[2 * j + 1];
    }
  }
}

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

// The lanes of total[i] add up to x[i] · row n of the weight. scales: from that of its first
// element on; buffer: K up to 2 W floats.
template <int M>
LK_INLINE void dot_codes(const Codes4bit& w, Table t, int64_t n, const float* scales,
                         const float* x, int64_t ldx, float* buffer, vf total[M]) {
  LK_UNROLL for (int i = 0; i < M; ++i) total[i] = zero();
  const int64_t first = n * w.K, size = int64_t{1} << w.log2_block;
  const int64_t blocks = first % size == 0 && size % (2 * W) == 0 ? w.K / size : 0;
  constexpr int64_t USUAL = 64 / (2 * W);  // groups, known to the compiler
  if (size == 64)
    dot_blocks<M>(w.packed + first / 2, t, blocks, USUAL, scales, x, ldx, total);
  else
    dot_blocks<M>(w.packed + first / 2, t, blocks, size / (2 * W), scales, x, ldx, total);
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
}

#ifdef LK_BF16_PAIRS

// In pairs of bf16 ----------------------------------------------------------------------------
//
// 64 bytes of codes at a time. For one or two rows a code is looked up as the sum of two bf16,
// which keeps 17 of its bits, and scaled with the sum; for more it is scaled and rounded to bf16
// once for all rows. K is a multiple of 8, so that eight neighbours lie in one block.

constexpr int64_t EXACT_ROWS = 2;  // rows for which two products a code cost less than rounding it

template <int M>
LK_INLINE void dot_codes(const Codes4bit& w, const PairTables& t, int64_t n, const float* scales,
                         const bf16* x, int64_t ldx, float*, vf total[M]) {
  const int64_t first = n * w.K, size = int64_t{1} << w.log2_block, offset = first & (size - 1);
  const uint8_t* p = w.packed + first / 2;
  vf sum[M];
  LK_UNROLL for (int i = 0; i < M; ++i) sum[i] = zero();
  vu lanes = lane_blocks(offset, w.log2_block);
  const auto step = [&](int64_t k, vu codes, int filled) __attribute__((always_inline)) {
    __builtin_prefetch(p + k / 2 + AHEAD, 0, 3);
    if (size > CODES) lanes = lane_blocks((offset + k) & (size - 1), w.log2_block);
    const vf scale = pick(scales + ((offset + k) >> w.log2_block), lanes, filled);
    if (M <= EXACT_ROWS)
      dot_exactly<M>(codes, t, scale, x + k, ldx, sum);
    else
      dot_rounded<M>(codes, t, scale, x + k, ldx, sum);
  };
  int64_t k = 0;
  for (; k + CODES <= w.K; k += CODES) step(k, load_codes(p + k / 2, W), W);
  const int filled = (int)(w.K - k) / 8;
  if (filled) step(k, load_codes(p + k / 2, filled), filled);
  LK_UNROLL for (int i = 0; i < M; ++i) total[i] = sum[i];
}

#endif

// The layer -----------------------------------------------------------------------------------

// Rows of the weight whose scales are decoded together, some time before they are loaded in other
// widths than they were stored; and how many those are at most, W more being read.
LK_INLINE int64_t batch_rows(const Codes4bit& w) {
  return max(4, (int64_t{2048} << w.log2_block) / w.K / 4 * 4);
}
LK_INLINE int64_t batch_scales(const Codes4bit& w) {
  return (batch_rows(w) * w.K >> w.log2_block) + 2 + W;
}

// sums[(n - n0) * M + i] = x[i] · row n of the weight, for n0 <= n < n1; a few more are written.
template <int M, typename X, typename T>
LK_INLINE void dot_rows(const Codes4bit& w, const T& t, const X* x, int64_t ldx, int64_t n0,
                        int64_t n1, float* scales, float* buffer, float* sums) {
  constexpr int GROUP = M < 4 ? 4 / M : 1, SUMS = (GROUP * M + 3) / 4 * 4;
  for (int64_t batch = n0, end; batch < n1; batch = end) {
    end = min(n1, batch + batch_rows(w));
    const int64_t block = batch * w.K >> w.log2_block;
    scales_of(w, block, ((end * w.K - 1) >> w.log2_block) - block + 1, scales, 1);
    for (int64_t n = batch; n < end; n += GROUP, sums += GROUP * M) {
      vf total[SUMS];
      for (int g = 0; g < GROUP; ++g) {
        const int64_t row = min(n + g, end - 1);
        dot_codes<M>(w, t, row, scales + (row * w.K >> w.log2_block) - block, x, ldx, buffer,
                     total + g * M);
      }
      LK_UNROLL for (int i = GROUP * M; i < SUMS; ++i) total[i] = zero();
      LK_UNROLL for (int i = 0; i < SUMS; i += 4) sum_lanes(total + i, sums + i);
    }
  }
}

template <typename X, typename T>
LK_INLINE void dot_rows(int64_t M, const Codes4bit& w, const T& t, const X* x, int64_t ldx,
                        int64_t n0, int64_t n1, float* scales, float* buffer, float* sums) {
#define LK_ROWS(m) \
  if (M == m) dot_rows<m>(w, t, x, ldx, n0, n1, scales, buffer, sums);
  LK_ROWS(1) LK_ROWS(2) LK_ROWS(3) LK_ROWS(4) LK_ROWS(5) LK_ROWS(6) LK_ROWS(7) LK_ROWS(8)
#undef LK_ROWS
}

// y = c * (sums + S Q) + bias for the columns n0 <= n < n1, four of the M·(n1 - n0) at a time. s: M
// rows of R up to W, the rest zero.
LK_INLINE void finish_rows(const ExpandArgs& u, const float* s, int64_t n0, int64_t n1,
                           const float* sums) {
  with_type(u.q.dtype, [&](auto q_type) {
    with_type(u.dtype, [&](auto y_type) {
      using Q = decltype(q_type);
      using Y = decltype(y_type);
      const Q* q = static_cast<const Q*>(u.q.data) + n0 * u.q.col;
      int64_t m = 0, n = n0;
      for (int64_t left = (n1 - n0) * u.M; left > 0; left -= 4, sums += 4) {
        const int count = (int)min(4, left);
        vf total[4] = {zero(), zero(), zero(), zero()};
        int64_t at_m[4], at_n[4];
        for (int i = 0; i < count; ++i) {
          for (int64_t r = 0; r < u.R; r += W)
            total[i] = fma(load(s + m * round_up(u.R, W) + r),
                           load_strided(q + r * u.q.row, u.q.row, u.R - r), total[i]);
          at_m[i] = m, at_n[i] = n;
          if (++m == u.M) m = 0, ++n, q += u.q.col;
        }
        float lora[4];
        sum_lanes(total, lora);
        for (int i = 0; i < count; ++i) {
          float y = sums[i] + lora[i];
          if (u.z) store_n(static_cast<Y*>(u.z) + at_m[i] * u.N + at_n[i], splat(y), 1);
          if (u.c) y *= u.c[at_n[i]];
          if (u.bias) y += u.bias[at_n[i]];
          store_n(static_cast<Y*>(u.y) + at_m[i] * u.ldy + at_n[i], splat(y), 1);
        }
      }
    });
  });
}

// Threads take shares of P's ranks and then of the weight's rows, whose codes they stream; P is
// waited for when the sums are taken, and consumed last.
template <typename X, typename T>
LK_INLINE void few_rows_of(const FewRowsArgs& a, const T& tables, const X* x, int64_t ldx) {
  const ExpandArgs& u = a.update;
  const int64_t M = u.M, K = a.codes.K, R = u.R, ldr = round_up(R, W);
  const int64_t parts = M * u.N * K < SMALL ? 1 : min(u.threads, u.N);
  const int64_t scale_floats = batch_scales(a.codes), row_floats = round_up(K, 2 * W);
  const int64_t part_floats = round_up(scale_floats + row_floats + M * ldr, 16);
  // A part's sums lie behind those of the rows before it, with room for the few more that it
  // writes: so there is enough for fewer parts, with more rows each, than were asked for.
  Scratch scratch((parts * (part_floats + 4) + M * u.N) * 4);
  float* const all_sums = static_cast<float*>(scratch.data) + parts * part_floats;
  const bool masked = a.shrink.dropout.rng;
  if (masked) shrink(a.shrink);
  int arrived = 0;
  together((int)parts, [&](int64_t part, int64_t parts) {
    const int64_t n0 = u.N * part / parts, n1 = u.N * (part + 1) / parts;
    float* const scales = static_cast<float*>(scratch.data) + part * part_floats;
    float *const row = scales + scale_floats, *const s = row + row_floats,
                 *const sums = all_sums + n0 * M + part * 4;
    if (!masked)
      with_type(a.shrink.x.dtype, [&](auto type) {
        using TX = decltype(type);
        for (int64_t m = 0; m < M; m += DOT_ROWS)
          shrink_tile<TX>(a.shrink, m, min(DOT_ROWS, M - m), R * part / parts,
                          R * (part + 1) / parts, {}, nullptr);
      });
    arrive(&arrived);
    dot_rows(M, a.codes, tables, x, ldx, n0, n1, scales, row, sums);
    await(&arrived, (int)parts);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t r = 0; r < ldr; ++r)
        s[m * ldr + r] = r < R ? u.s[m * R + r] * (u.gate ? u.alpha * u.gate[r] : u.alpha) : 0.0f;
    finish_rows(u, s, n0, n1, sums);
  });
}

// P = scale * (mask(X) A^T); y[M, N] = c * (x W^T + (P * gate * alpha) Q) + bias for M <= FEW_ROWS.
// Sums in float32, y rounds once (z likewise); codes keep at least 17 bits until the sum, but for
// three rows of bf16 or more, where code times scale is rounded to bf16. Reads each packed byte
// once. Tested by tests/ops/test_lora_linear_4bit.py.
void few_rows(const FewRowsArgs& a) {
  const int64_t M = a.update.M, K = a.codes.K;
  if (!M) return;
#ifdef LK_BF16_PAIRS
  if (a.x.dtype == DType::bf16 && K % 8 == 0) {
    const int64_t ldx = round_up(K, CODES);
    Scratch scratch(M * ldx * 2);
    bf16* const x = static_cast<bf16*>(scratch.data);
    for (int64_t m = 0; m < M; ++m)
      order_words(static_cast<const bf16*>(a.x.data) + m * a.x.row, K, M <= EXACT_ROWS,
                  x + m * ldx);
    few_rows_of(a, pair_tables(a.codes.code), x, ldx);
    return;
  }
#endif
  const int64_t ldx = round_up(K, 2 * W);
  Scratch scratch(M * ldx * 4);
  float* const x = static_cast<float*>(scratch.data);
  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t m = 0; m < M; ++m)
      order(static_cast<const T*>(a.x.data) + m * a.x.row, K, x + m * ldx);
  });
  few_rows_of(a, table(a.codes.code), x, ldx);
}

}  // namespace
}  // namespace lora_kernels
