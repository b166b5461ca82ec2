#pragma once
// DoRA's row norm: tiles of W + S A are computed in registers, squared and summed. Follows
// codes_impl.h.

namespace lora_kernels {
namespace {

constexpr int64_t NORM_COLUMNS = 512;       // of A packed at once: 32 KB at R = 16
constexpr int64_t NORM_ROWS = 16 * Y_ROWS;  // that share these columns of A

// total[i] += (W + S A)^2, lane by lane, over `count` columns of Y_ROWS rows.
template <typename T>
LK_INLINE void add_squares(const T* const w[Y_ROWS], const float* const s[Y_ROWS], int64_t R,
                           const float* panel, int64_t count, vf total[Y_ROWS]) {
  for (int64_t k = 0; k < count; k += VW) {
    vf acc[Y_ROWS][V];
    rank_tile(s, R, panel + k, NORM_COLUMNS, acc);
    LK_UNROLL for (int v = 0; v < V; ++v) {
      const int64_t valid = min(W, count - k - v * W);
      if (valid <= 0) break;  // beyond the panel's columns
      LK_UNROLL for (int i = 0; i < Y_ROWS; ++i) {
        const T* const src = w[i] + k + v * W;
        const vf sum = add(valid == W ? load(src) : load_n(src, (int)valid), acc[i][v]);
        total[i] = fma(sum, sum, total[i]);
      }
    }
  }
}

// norm[n] = sqrt(sum_k (W[n, k] + scaling * ((B * gate) A)[n, k])^2). Threads share the rows. A row
// is summed in float32 over NORM_COLUMNS elements, and these sums in double, whatever the number of
// threads. Reads W once and A once for NORM_ROWS rows; 2 N K R FLOPs. Tested by tests/ops.
void row_norm(const RowNormArgs& a) {
  const int64_t chunks =
      a.N * a.K * a.R < MIN_PARALLEL_WORK ? 1 : min(a.threads, (a.N + Y_ROWS - 1) / Y_ROWS);
  const int64_t panel_floats = round_up(a.R, 4) * NORM_COLUMNS;
  const int64_t staging = round_up(staging_floats(NORM_COLUMNS, a.R), W);
  const int64_t decoded_floats = a.codes ? Y_ROWS * NORM_COLUMNS : 0;
  const int64_t floats =
      panel_floats + staging + decoded_floats + NORM_ROWS * (round_up(a.R, 2) + 2);
  Scratch scratch(chunks * round_up(floats, 16) * 4);
  const float no_codebook[16] = {};
  const Table t = load_table(a.codes ? a.codes->code : no_codebook);
  dispatch_dtype(a.codes ? DType::f32 : a.w.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(a.threads, chunks, [&](int64_t chunk) {
      float* const panel = static_cast<float*>(scratch.data) + chunk * round_up(floats, 16);
      float* const decoded_rows = panel + panel_floats + staging;
      float* const s = decoded_rows + decoded_floats;  // scaling * B * gate of these rows
      double* const sums = reinterpret_cast<double*>(s + NORM_ROWS * round_up(a.R, 2));
      const int64_t stop = a.N * (chunk + 1) / chunks;
      for (int64_t n0 = a.N * chunk / chunks; n0 < stop; n0 += NORM_ROWS) {
        const int64_t rows = min(NORM_ROWS, stop - n0);
        dispatch_dtype(a.b.dtype, [&](auto b_type) {
          using TB = decltype(b_type);
          const TB* const b = static_cast<const TB*>(a.b.data);
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t r = 0; r < a.R; ++r)
              s[i * a.R + r] = a.scaling * (a.gate ? a.gate[r] : 1.0f) *
                               load_scalar(b + (n0 + i) * a.b.row_stride + r * a.b.col_stride);
        });
        for (int64_t i = 0; i < rows; ++i) sums[i] = 0.0;
        for (int64_t k = 0; k < a.K; k += NORM_COLUMNS) {
          const int64_t count = min(NORM_COLUMNS, a.K - k);
          pack(a.a, a.R, k, count, round_up(count, VW), 1.0f, nullptr, nullptr, panel, NORM_COLUMNS,
               panel + panel_floats);
          for (int64_t i = 0; i < rows; i += Y_ROWS) {
            const T* w[Y_ROWS];
            const float* s_rows[Y_ROWS];
            for (int64_t j = 0; j < Y_ROWS; ++j) {
              const int64_t row = min(i + j, rows - 1);  // a short tile repeats its last row
              s_rows[j] = s + row * a.R;
              if (a.codes) {
                decode_row(*a.codes, t, n0 + row, k, count, decoded_rows + j * NORM_COLUMNS);
                w[j] = reinterpret_cast<const T*>(decoded_rows + j * NORM_COLUMNS);
              } else {
                w[j] = static_cast<const T*>(a.w.data) + (n0 + row) * a.w.row_stride + k;
              }
            }
            vf total[Y_ROWS];
            LK_UNROLL for (int j = 0; j < Y_ROWS; ++j) total[j] = zero();
            add_squares(w, s_rows, a.R, panel, count, total);
            for (int64_t j = 0; j < Y_ROWS && i + j < rows; ++j) {
              float lanes[W];
              store(lanes, total[j]);
              for (int lane = 0; lane < W; ++lane) sums[i + j] += static_cast<double>(lanes[lane]);
            }
          }
        }
        for (int64_t i = 0; i < rows; ++i)
          a.norm[n0 + i] = static_cast<float>(__builtin_sqrt(sums[i]));
      }
    });
  });
}

}  // namespace
}  // namespace lora_kernels
