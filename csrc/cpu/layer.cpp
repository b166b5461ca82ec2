#include "layer.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "dispatch.h"

namespace lora_kernels {
namespace {

// dg[r] = scaling * sum_m dS * P, unless dg is null. Then ds becomes the gradient of mask(x) A^T.
void gate_backward(const Layer& layer, const float* p, float* ds, float* dg) {
  const int64_t M = layer.M, R = layer.R;
  std::vector<double> sums(static_cast<size_t>(R));
  for (int64_t m = 0; m < M; ++m)
    for (int64_t r = 0; r < R; ++r) {
      const int64_t i = m * R + r;
      sums[static_cast<size_t>(r)] += static_cast<double>(ds[i]) * static_cast<double>(p[i]);
      ds[i] *= layer.gate[r] * (layer.scaling * layer.keep_scale);
    }
  for (int64_t r = 0; dg && r < R; ++r)
    dg[r] = static_cast<float>(layer.scaling * sums[static_cast<size_t>(r)]);
}

Matrix transposed(const Matrix& m) {
  return {.data = m.data, .dtype = m.dtype, .row_stride = m.col_stride, .col_stride = m.row_stride};
}

bool has_base(const Layer& l) { return l.w.data || l.codes; }

// Computes the gradients except dx, which needs dS [M, R]: it is left in ds.
void adapter_gradients(const Layer& l, const Backward& g, float* ds) {
  if (ds || g.db || g.dc || g.dbias)
    kernels().backward_pair({.dy = g.dy,
                             .b = l.b,
                             .M = l.M,
                             .N = l.N,
                             .R = l.R,
                             .s = g.p,
                             .gate = l.gate,
                             .c = l.c,
                             .z = g.z,
                             // The gate's gradient needs dS itself. Without a gate, dS is scaled at
                             // once.
                             .ds_scale = l.gate ? 1.0f : l.scaling * l.keep_scale,
                             .db_scale = l.scaling,
                             .ds = ds,
                             .lds = l.lds,
                             .db = g.db,
                             .db_dtype = l.b.dtype,
                             .dc = g.dc,
                             .dbias = g.dbias,
                             .threads = l.threads});
  if (l.gate && ds) gate_backward(l, g.p, ds, g.dg);
  if (g.da)
    kernels().grad_a({.x = g.x,
                      .M = l.M,
                      .K = l.K,
                      .R = l.R,
                      .d = ds,
                      .lds = l.lds,
                      .dropout = l.dropout,
                      .da = g.da,
                      .da_dtype = l.a.dtype,
                      .threads = l.threads});
}

void input_gradient(const Layer& l, const Backward& g, const float* ds) {
  const ExpandArgs update{.y = g.dx,
                          .dtype = g.x.dtype,
                          .ldy = l.K,
                          .M = l.M,
                          .N = l.K,
                          .R = l.R,
                          .s = ds,
                          .lds = l.lds,
                          .q = l.a,
                          .alpha = 1.0f,
                          .dropout = l.dropout,
                          .threads = l.threads};
  if (has_base(l))
    kernels().gemm({.x = g.dz,
                    .w = l.w,
                    .codes = l.codes,
                    .is_transposed = l.transposed,
                    .K = l.N,
                    .update = update});
  else
    kernels().expand(update);
}

using Scratch = std::unique_ptr<void, void (*)(void*)>;

Scratch allocate_ds(const Layer& l, bool is_needed) {
  const int64_t bytes = l.M * l.lds * static_cast<int64_t>(sizeof(float));
  return {is_needed ? scratch_alloc(bytes) : nullptr, scratch_free};
}

}  // namespace

void lora_linear(const Layer& l, const Forward& f) {
  const Matrix w = transposed(l.w);
  const ShrinkArgs shrink{.x = f.x,
                          .a = l.a,
                          .M = l.M,
                          .K = l.K,
                          .R = l.R,
                          .scale = l.keep_scale,
                          .dropout = l.dropout,
                          .p = f.p,
                          .lds = l.lds,
                          .threads = l.threads};
  const ExpandArgs update{.y = f.y,
                          .dtype = f.dtype,
                          .ldy = l.N,
                          .M = l.M,
                          .N = l.N,
                          .R = l.R,
                          .s = f.p,
                          .lds = l.lds,
                          .q = transposed(l.b),
                          .alpha = l.scaling,
                          .gate = l.gate,
                          .c = l.c,
                          .bias = l.bias,
                          .z = f.z,
                          .threads = l.threads};
  if (f.few_rows) {
    kernels().gemv({.x = f.xs, .w = w, .codes = l.codes, .shrink = shrink, .update = update});
    return;
  }
  kernels().shrink(shrink);
  if (has_base(l))
    kernels().gemm({.x = f.xs,
                    .w = w,
                    .codes = l.codes,
                    .is_transposed = !l.transposed,
                    .K = l.K,
                    .update = update});
  else
    kernels().expand(update);
}

void lora_linear_backward(const Layer& l, const Backward& g) {
  const Scratch scratch = allocate_ds(l, g.dx || g.da || g.dg);
  float* const ds = static_cast<float*>(scratch.get());
  adapter_gradients(l, g, ds);
  if (g.dx) input_gradient(l, g, ds);
}

// multi_lora_linear ------------------------------------------------------------------------------

namespace {

template <typename T>
T* rows_from(T* data, DType dtype, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data ? static_cast<Byte*>(data) + elements * (dtype == DType::f32 ? 4 : 2) : data;
}

Matrix rows_from(const Matrix& x, int64_t m) {
  return {.data = rows_from(x.data, x.dtype, m * x.row_stride),
          .dtype = x.dtype,
          .row_stride = x.row_stride,
          .col_stride = x.col_stride};
}

Dropout rows_from(const Dropout& d, int64_t m) {
  return {.rng = d.rng, .threshold = d.threshold, .rows = d.rows ? d.rows + m : nullptr};
}

// Calls f(thread, threads) on every thread.
template <typename F>
void parallel_region(int threads, const F& f) {
  run_threads(
      threads, [](void* p, int thread, int count) { (*static_cast<const F*>(p))(thread, count); },
      const_cast<F*>(&f));
}

// True if threads divide the adapters; false if they divide each adapter's rows.
bool is_split_by_adapter(const Layer& l, const std::vector<Adapter>& adapters) {
  const auto count = static_cast<int64_t>(adapters.size());
  return l.threads > 1 && count >= 2 * l.threads && l.M * (l.K + l.N) * l.R >= MIN_PARALLEL_WORK;
}

// Calls f(adapter, first row, one past the last, threads) for segments that cover all rows of all
// adapters.
template <typename F>
void for_each_segment(const Layer& l, const std::vector<Adapter>& adapters, const F& f) {
  if (!is_split_by_adapter(l, adapters)) {
    for (const Adapter& d : adapters) f(d, d.start, d.stop, l.threads);
    return;
  }
  parallel_region(l.threads, [&](int thread, int threads) {
    const int64_t first = l.M * thread / threads, last = l.M * (thread + 1) / threads;
    for (const Adapter& d : adapters) {
      const int64_t m0 = std::max(d.start, first), m1 = std::min(d.stop, last);
      if (m0 < m1) f(d, m0, m1, 1);
    }
  });
}

// Calls f(item) for all items, each on one thread. Items go in order of cost to the thread with the
// least cost so far. So no result depends on which thread is faster.
template <typename T, typename Cost, typename F>
void distribute(int threads, std::vector<T> items, const Cost& cost, const F& f) {
  std::stable_sort(items.begin(), items.end(),
                   [&](const T& a, const T& b) { return cost(a) > cost(b); });
  parallel_region(threads, [&](int thread, int count) {
    std::vector<int64_t> load(static_cast<size_t>(count));
    for (const T& item : items) {
      const auto least = std::min_element(load.begin(), load.end());
      *least += cost(item);
      if (least - load.begin() == thread) f(item);
    }
  });
}

// Calls f(adapter, threads) for all adapters: on one thread each, if there are many.
template <typename F>
void for_each_adapter(const Layer& l, const std::vector<Adapter>& adapters, const F& f) {
  if (!is_split_by_adapter(l, adapters)) {
    for (const Adapter& d : adapters) f(d, l.threads);
    return;
  }
  std::vector<const Adapter*> items;
  for (const Adapter& d : adapters) items.push_back(&d);
  distribute(
      l.threads, items, [](const Adapter* d) { return d->stop - d->start; },
      [&](const Adapter* d) { f(*d, 1); });
}

// The layer's base GEMM.
Layer without_adapter(Layer l) {
  l.R = 0;
  l.dropout = {};
  return l;
}

// The layer of one adapter and the rows [m0, m1) of x, without the base.
Layer adapter_layer(const Layer& l, const Adapter& d, int64_t m0, int64_t m1, int threads) {
  return {.w = {},
          .codes = nullptr,
          .M = m1 - m0,
          .K = l.K,
          .N = l.N,
          .R = d.R,
          .lds = l.lds,
          .a = d.a,
          .b = d.b,
          .scaling = d.scaling,
          .dropout = rows_from(l.dropout, m0),
          .keep_scale = l.keep_scale,
          .threads = threads};
}

}  // namespace

void multi_lora_linear(const Layer& l, const std::vector<Adapter>& adapters, const Forward& f) {
  if (has_base(l) || f.few_rows) lora_linear(without_adapter(l), f);
  for_each_segment(l, adapters, [&](const Adapter& d, int64_t m0, int64_t m1, int threads) {
    lora_linear(adapter_layer(l, d, m0, m1, threads), {.x = rows_from(f.x, m0),
                                                       .xs = {},
                                                       .few_rows = false,
                                                       .p = f.p + m0 * l.lds,
                                                       .y = rows_from(f.y, f.dtype, m0 * l.N),
                                                       .dtype = f.dtype});
  });
}

void multi_lora_linear_backward(const Layer& l, const std::vector<Adapter>& adapters,
                                const Backward& g) {
  const Scratch scratch = allocate_ds(l, true);
  float* const all_ds = static_cast<float*>(scratch.get());
  const auto rows = [&](int64_t m, const Adapter& d) {
    return Backward{.dy = rows_from(g.dy, m),
                    .dz = {},
                    .x = rows_from(g.x, m),
                    .p = g.p + m * l.lds,
                    .dx = rows_from(g.dx, g.x.dtype, m * l.K),
                    .da = d.da,
                    .db = d.db};
  };
  for_each_adapter(l, adapters, [&](const Adapter& d, int threads) {
    float* const ds = g.dx || d.da ? all_ds + d.start * l.lds : nullptr;
    adapter_gradients(adapter_layer(l, d, d.start, d.stop, threads), rows(d.start, d), ds);
  });
  if (!g.dx) return;
  if (has_base(l)) input_gradient(without_adapter(l), g, nullptr);
  for_each_segment(l, adapters, [&](const Adapter& d, int64_t m0, int64_t m1, int threads) {
    input_gradient(adapter_layer(l, d, m0, m1, threads), rows(m0, d), all_ds + m0 * l.lds);
  });
}

// lora_experts -----------------------------------------------------------------------------------

namespace {

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

Matrix elements_from(const Matrix& m, int64_t elements) {
  return {.data = rows_from(m.data, m.dtype, elements),
          .dtype = m.dtype,
          .row_stride = m.row_stride,
          .col_stride = m.col_stride};
}

// The codes of a stack from `element` on, where an expert begins.
Codes4bit codes_from(const Codes4bit& stack, int64_t element) {
  Codes4bit w = stack;
  const int64_t block = element >> w.log2_block;
  w.packed += element / 2;
  if (w.nested_code) {
    w.absmax = static_cast<const uint8_t*>(w.absmax) + block;
    if (w.nested_absmax) w.nested_absmax += block >> w.log2_nested;
  } else {
    w.absmax = static_cast<const float*>(w.absmax) + block;
  }
  return w;
}

// Expert e, with the rows [start, start + rows) of x.
struct Expert {
  int64_t e, start, rows;
};

// Calls f(expert, threads) for the experts that have rows. An expert with more than half a thread's
// share of the work takes all threads; the others take one thread each.
template <typename F>
void for_each_expert(const Layer& l, const Experts& x, const F& f) {
  constexpr int64_t WEIGHT_ROWS = 16;  // rows that cost as much as reading a weight (an estimate)
  std::vector<Expert> small;
  std::vector<Expert> large;
  int64_t work = 0;
  for (int64_t e = 0, start = 0; e < x.count; start = x.stops[e++])
    if (x.stops[e] > start) {
      small.push_back({e, start, x.stops[e] - start});
      work += x.stops[e] - start + WEIGHT_ROWS;
    }
  const bool is_serial = l.threads == 1 || work * l.K * l.N < MIN_PARALLEL_WORK;
  if (!is_serial) {
    const auto is_small = [&](const Expert& expert) {
      return 2 * l.threads * (expert.rows + WEIGHT_ROWS) <= work;
    };
    const auto first_large = std::stable_partition(small.begin(), small.end(), is_small);
    large.assign(first_large, small.end());
    small.erase(first_large, small.end());
    for (const Expert& expert : large) f(expert, l.threads);
  }
  if (is_serial || small.size() < 2) {
    for (const Expert& expert : small) f(expert, is_serial ? 1 : l.threads);
    return;
  }
  distribute(
      l.threads, small, [](const Expert& expert) { return expert.rows + WEIGHT_ROWS; },
      [&](const Expert& expert) { f(expert, 1); });
}

// The layer of one expert. *codes gets the expert's codes, to which the layer points.
Layer expert_layer(const Layer& l, const Experts& x, const Expert& expert, bool with_base,
                   Codes4bit* codes, int threads) {
  Layer layer = l;
  layer.w = with_base ? elements_from(l.w, expert.e * x.w) : Matrix{};
  if (with_base && l.codes) {
    *codes = codes_from(*l.codes, expert.e * x.w);
    if (x.table) codes->nested_code += expert.e * x.table;
  }
  layer.codes = with_base && l.codes ? codes : nullptr;
  layer.M = expert.rows;
  layer.a = elements_from(l.a, expert.e * x.a);
  layer.b = elements_from(l.b, expert.e * x.b);
  layer.bias = l.bias ? l.bias + expert.e * x.bias : nullptr;
  layer.dropout = rows_from(l.dropout, expert.start);
  layer.threads = threads;
  layer.transposed = x.transposed;
  return layer;
}

// Copies B of the experts that have rows to dst[e, N, R], rows [first, last) of each. A cache line
// holds one element of several experts, so each block of lines is read once for all of them.
template <typename T>
void gather_rows(const Layer& l, const Experts& x, int64_t first, int64_t last, T* dst) {
  constexpr int64_t BLOCK_ELEMENTS = 128;  // with E = 128 in 16 bits their lines take 32 KB
  const T* const src = static_cast<const T*>(l.b.data);
  const int64_t step = std::max<int64_t>(1, BLOCK_ELEMENTS / l.R);
  for (int64_t n0 = first; n0 < last; n0 += step) {
    const int64_t n1 = std::min(last, n0 + step);
    for (int64_t e = 0, start = 0; e < x.count; start = x.stops[e++]) {
      if (x.stops[e] == start) continue;
      T* out = dst + (e * l.N + n0) * l.R;
      for (int64_t n = n0; n < n1; ++n)
        for (int64_t r = 0; r < l.R; ++r)
          *out++ = src[e * x.b + n * l.b.row_stride + r * l.b.col_stride];
    }
  }
}

// If neither of B's last two strides is 1, replaces B by a contiguous copy for the experts that
// have rows. In PEFT, the innermost index is the expert's. Returns the memory of the copy.
Scratch gather_b(Layer* l, Experts* x) {
  const int64_t size = l->N * l->R;
  if (!size || l->b.row_stride == 1 || l->b.col_stride == 1) return {nullptr, scratch_free};
  Scratch copy{scratch_alloc(x->count * size * size_of(l->b.dtype)), scratch_free};
  int64_t experts = 0;
  for (int64_t e = 0, start = 0; e < x->count; start = x->stops[e++])
    experts += x->stops[e] > start;
  parallel_region(experts * size < MIN_PARALLEL_WORK ? 1 : l->threads, [&](int thread, int count) {
    const int64_t first = l->N * thread / count, last = l->N * (thread + 1) / count;
    if (l->b.dtype == DType::f32)
      gather_rows(*l, *x, first, last, static_cast<uint32_t*>(copy.get()));
    else
      gather_rows(*l, *x, first, last, static_cast<uint16_t*>(copy.get()));
  });
  l->b = {.data = copy.get(), .dtype = l->b.dtype, .row_stride = l->R, .col_stride = 1};
  x->b = size;
  return copy;
}

void zero_rows(void* data, DType dtype, int64_t first, int64_t last, int64_t ld) {
  if (data && first < last)
    std::memset(static_cast<char*>(data) + first * ld * size_of(dtype), 0,
                static_cast<size_t>((last - first) * ld * size_of(dtype)));
}

}  // namespace

void lora_experts(Layer l, Experts x, const Forward& f) {
  const Scratch copy = gather_b(&l, &x);
  for_each_expert(l, x, [&](const Expert& expert, int threads) {
    Codes4bit codes;
    const bool few_rows = expert.rows <= x.few_rows;
    const Layer layer = expert_layer(l, x, expert, few_rows || x.has_base, &codes, threads);
    Forward forward = f;
    forward.x = rows_from(f.x, expert.start);
    forward.xs = rows_from(f.xs, expert.start);
    forward.few_rows = few_rows;
    forward.p = f.p + expert.start * l.lds;
    forward.y = rows_from(f.y, f.dtype, expert.start * l.N);
    lora_linear(layer, forward);
  });
  const int64_t last = x.stops[x.count - 1];
  zero_rows(f.y, f.dtype, last, l.M, l.N);
  zero_rows(f.p, DType::f32, last, l.M, l.lds);
}

void lora_experts_backward(Layer l, Experts x, const Backward& g) {
  const Scratch copy = gather_b(&l, &x);
  for_each_expert(l, x, [&](const Expert& expert, int threads) {
    Codes4bit codes;
    const Layer layer = expert_layer(l, x, expert, x.has_base, &codes, threads);
    Backward backward = g;
    backward.dy = rows_from(g.dy, expert.start);
    backward.dz = rows_from(g.dz, expert.start);
    backward.x = rows_from(g.x, expert.start);
    backward.p = g.p + expert.start * l.lds;
    backward.dx = rows_from(g.dx, g.x.dtype, expert.start * l.K);
    backward.da = rows_from(g.da, l.a.dtype, expert.e * x.da);
    backward.db = rows_from(g.db, l.b.dtype, expert.e * x.db);
    backward.dbias = g.dbias ? g.dbias + expert.e * l.N : nullptr;
    lora_linear_backward(layer, backward);
  });
  for (int64_t e = 0, start = 0; e < x.count; start = x.stops[e++])
    if (x.stops[e] == start) {
      zero_rows(g.da, l.a.dtype, e, e + 1, x.da);
      zero_rows(g.db, l.b.dtype, e, e + 1, x.db);
      zero_rows(g.dbias, DType::f32, e, e + 1, l.N);
    }
  zero_rows(g.dx, g.x.dtype, x.stops[x.count - 1], l.M, l.K);
}

}  // namespace lora_kernels
