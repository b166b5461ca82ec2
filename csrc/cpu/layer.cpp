#include "layer.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "dispatch.h"

namespace lora_kernels {
namespace {

// dg[r] = scaling * sum_m dS * P, unless dg is null. ds holds dS before the call, and the gradient
// of mask(x) A^T after it, with or without dg.
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

// Computes the gradients except dx. ds [M, R] gets the gradient of mask(x) A^T, which dA and dx
// read. It may be null if dA, dx and dg are not needed.
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

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Null stays null.
template <typename T>
T* elements_from(T* data, DType dtype, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data ? static_cast<Byte*>(data) + elements * size_of(dtype) : data;
}

Matrix elements_from(const Matrix& m, int64_t elements) {
  return {.data = elements_from(m.data, m.dtype, elements),
          .dtype = m.dtype,
          .row_stride = m.row_stride,
          .col_stride = m.col_stride};
}

Matrix rows_from(const Matrix& x, int64_t m) { return elements_from(x, m * x.row_stride); }

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

// True if adapters are so many that each kernel runs on one thread, and threads take kernels of
// different rows or adapters. False if all threads run each adapter's kernels together.
bool has_many_adapters(const Layer& l, const std::vector<Adapter>& adapters) {
  const auto count = static_cast<int64_t>(adapters.size());
  return l.threads > 1 && count >= 2 * l.threads && l.M * (l.K + l.N) * l.R >= MIN_PARALLEL_WORK;
}

// Calls f(adapter, first row, one past the last, threads) for segments that cover all rows of all
// adapters.
template <typename F>
void for_each_segment(const Layer& l, const std::vector<Adapter>& adapters, const F& f) {
  if (!has_many_adapters(l, adapters)) {
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

// Calls f(item) for all items, each on one thread. The costliest item goes first, each to the
// thread with the least cost so far. All threads compute this same assignment, so no result depends
// on which thread is faster.
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
  if (!has_many_adapters(l, adapters)) {
    for (const Adapter& d : adapters) f(d, l.threads);
    return;
  }
  std::vector<const Adapter*> items;
  for (const Adapter& d : adapters) items.push_back(&d);
  distribute(
      l.threads, items, [](const Adapter* d) { return d->stop - d->start; },
      [&](const Adapter* d) { f(*d, 1); });
}

// The layer with its base alone: rank 0.
Layer without_adapter(Layer l) {
  l.R = 0;
  l.dropout = {};
  return l;
}

// A backward that computes dbias alone.
Backward bias_backward(const Backward& g) {
  return {.dy = g.dy, .dz = {}, .x = {}, .p = nullptr, .dbias = g.dbias};
}

// A layer of one adapter without the base, for the rows [m0, m1) of x.
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
  if (has_base(l) || f.few_rows || l.bias) lora_linear(without_adapter(l), f);
  for_each_segment(l, adapters, [&](const Adapter& d, int64_t m0, int64_t m1, int threads) {
    lora_linear(adapter_layer(l, d, m0, m1, threads), {.x = rows_from(f.x, m0),
                                                       .xs = {},
                                                       .few_rows = false,
                                                       .p = f.p + m0 * l.lds,
                                                       .y = elements_from(f.y, f.dtype, m0 * l.N),
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
                    .dx = elements_from(g.dx, g.x.dtype, m * l.K),
                    .da = d.da,
                    .db = d.db};
  };
  for_each_adapter(l, adapters, [&](const Adapter& d, int threads) {
    float* const ds = g.dx || d.da ? all_ds + d.start * l.lds : nullptr;
    adapter_gradients(adapter_layer(l, d, d.start, d.stop, threads), rows(d.start, d), ds);
  });
  if (g.dbias) adapter_gradients(without_adapter(l), bias_backward(g), nullptr);
  if (!g.dx) return;
  if (has_base(l)) input_gradient(without_adapter(l), g, nullptr);
  for_each_segment(l, adapters, [&](const Adapter& d, int64_t m0, int64_t m1, int threads) {
    input_gradient(adapter_layer(l, d, m0, m1, threads), rows(m0, d), all_ds + m0 * l.lds);
  });
}

// lora_experts -----------------------------------------------------------------------------------

namespace {

// The codes of a stack from `element` on, where an expert begins.
Codes codes_from(const Codes& stack, int64_t element) {
  Codes w = stack;
  const int64_t block = element >> w.log2_block;
  const int64_t each = w.has_shift ? 2 : 1;
  w.packed += w.kind == CodeKind::nibble ? element / 2 : element;
  w.N -= element / w.K;
  w.absmax = static_cast<const char*>(w.absmax) + block * each * scale_bytes(w);
  if (w.nested_absmax) w.nested_absmax += (block >> w.log2_nested) * each;
  return w;
}

// The first row of expert e; for e = count, one past the last row of all.
int64_t start_of(const Experts& x, int64_t e) { return e ? x.stops[e * x.tenants - 1] : 0; }

int64_t rows_of(const Experts& x, int64_t e) { return start_of(x, e + 1) - start_of(x, e); }

// An expert that has rows: its number, first row and number of rows.
struct Expert {
  int64_t e, start, rows;
};

// Experts [first, last).
struct Span {
  int64_t first, last;

  int64_t count() const { return last - first; }
};

// Calls f(expert, threads) for the experts of a span that have rows. An expert with more than half
// a thread's share of the work takes all threads; the others take one thread each.
template <typename F>
void for_each_expert(const Layer& l, const Experts& x, const Span& span, const F& f) {
  constexpr int64_t WEIGHT_ROWS = 16;  // rows that cost as much as reading a weight (an estimate)
  std::vector<Expert> small;
  std::vector<Expert> large;
  int64_t work = 0;
  for (int64_t e = span.first; e < span.last; ++e)
    if (const int64_t rows = rows_of(x, e)) {
      small.push_back({e, start_of(x, e), rows});
      work += rows + WEIGHT_ROWS;
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
                   Codes* codes, int threads) {
  Layer layer = l;
  layer.w = with_base ? elements_from(l.w, expert.e * x.w_stride) : Matrix{};
  if (with_base && l.codes) {
    *codes = codes_from(*l.codes, expert.e * x.w_stride);
    if (x.table_stride) codes->nested_code += expert.e * x.table_stride;
  }
  layer.codes = with_base && l.codes ? codes : nullptr;
  layer.M = expert.rows;
  layer.bias = l.bias ? l.bias + expert.e * x.bias_stride : nullptr;
  layer.dropout = rows_from(l.dropout, expert.start);
  layer.threads = threads;
  layer.transposed = x.transposed;
  return layer;
}

// The adapters of an expert's tenants that have rows. Their rows count from the expert's first.
// `index`: the expert's place in the stacks of A and B of `tenants`.
std::vector<Adapter> adapters_of(const Layer& l, const Experts& x,
                                 const std::vector<Tenant>& tenants, const Expert& expert,
                                 int64_t index) {
  std::vector<Adapter> adapters;
  int64_t start = 0;
  const int64_t* stop = x.stops + expert.e * x.tenants;
  for (const Tenant& t : tenants) {
    const int64_t end = *stop++ - expert.start;
    if (end > start)
      adapters.push_back({.start = start,
                          .stop = end,
                          .a = elements_from(t.a, index * t.a_stride),
                          .b = elements_from(t.b, index * t.b_stride),
                          .R = t.R,
                          .scaling = t.scaling,
                          .da = elements_from(t.da, t.a.dtype, index * t.R * l.K),
                          .db = elements_from(t.db, t.b.dtype, index * t.R * l.N)});
    start = end;
  }
  return adapters;
}

// The layer with this adapter.
Layer with_adapter(Layer l, const Adapter& d) {
  l.R = d.R;
  l.a = d.a;
  l.b = d.b;
  l.scaling = d.scaling;
  return l;
}

// Returns a0 b0 a1 b1 ... of the vectors' low halves, or of their high halves.
template <typename V>
V interleave(const V& a, const V& b, bool high) {
#if defined(__clang__)
#define LK_SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LK_SHUFFLE(...) __builtin_shuffle(a, b, V{__VA_ARGS__})
#endif
  if constexpr (sizeof(V) == 8 * sizeof(a[0]))
    return high ? LK_SHUFFLE(4, 12, 5, 13, 6, 14, 7, 15) : LK_SHUFFLE(0, 8, 1, 9, 2, 10, 3, 11);
  else
    return high ? LK_SHUFFLE(2, 6, 3, 7) : LK_SHUFFLE(0, 4, 1, 5);
#undef LK_SHUFFLE
}

// to[c * ld_to + r] = from[r * ld_from + c]. A block of COUNT x COUNT elements, where COUNT is a
// vector's, is transposed in registers. Any other block is shorter than COUNT on one side.
template <typename T>
void transpose_block(const T* from, int64_t ld_from, int64_t rows, int64_t columns, T* to,
                     int64_t ld_to) {
  typedef T Vector [[gnu::vector_size(16)]];
  constexpr int COUNT = 16 / sizeof(T), HALF = COUNT / 2;
  if (rows < COUNT || columns < COUNT) {
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < rows; ++r) to[c * ld_to + r] = from[r * ld_from + c];
    return;
  }
  Vector in[COUNT], out[COUNT];
  for (int r = 0; r < COUNT; ++r) std::memcpy(&in[r], from + r * ld_from, 16);
  // Interleaving the upper rows with the lower ones, once for each bit of an index, transposes.
  for (int step = 1; step < COUNT; step *= 2) {
    for (int r = 0; r < COUNT; ++r) out[r] = interleave(in[r / 2], in[HALF + r / 2], r % 2);
    std::memcpy(in, out, sizeof in);
  }
  for (int r = 0; r < COUNT; ++r) std::memcpy(to + r * ld_to, &in[r], 16);
}

void zero_rows(void* data, DType dtype, int64_t first, int64_t last, int64_t ld) {
  if (data && first < last)
    std::memset(static_cast<char*>(data) + first * ld * size_of(dtype), 0,
                static_cast<size_t>((last - first) * ld * size_of(dtype)));
}

// Divides the B [N * R, experts] of a span into blocks for `transpose_block`. Calls f(first element
// of N * R, first expert, elements, experts) for each.
//
// A block has up to COUNT experts. Unless `all_experts`, blocks in which no expert has rows are
// left out, and where a single expert has rows, it is the block. Blocks that share a cache line of
// B, or of its copy, follow one another closely.
template <typename T, typename F>
void for_blocks(const Layer& l, const Experts& x, const Span& span, int64_t size, bool all_experts,
                const F& f) {
  constexpr int64_t COUNT = 16 / sizeof(T);
  constexpr int64_t RUN = 128;  // elements that a thread takes in turn, for the prefetcher
  std::vector<Span> blocks;
  for (int64_t e = span.first; e < span.last; e += COUNT) {
    const Span block{e, std::min(e + COUNT, span.last)};
    int64_t busy = 0;
    for (int64_t i = block.first; i < block.last; ++i) busy += rows_of(x, i) > 0;
    if (all_experts || busy > 1) blocks.push_back(block);
    for (int64_t i = block.first; !all_experts && busy == 1 && i < block.last; ++i)
      if (rows_of(x, i)) blocks.push_back({i, i + 1});
  }
  const int64_t runs = (size + RUN - 1) / RUN;
  const int64_t work = static_cast<int64_t>(blocks.size()) * COUNT * size;
  parallel_region(work < MIN_PARALLEL_WORK ? 1 : l.threads, [&](int thread, int threads) {
    for (int64_t run = runs * thread / threads; run < runs * (thread + 1) / threads; ++run)
      for (const Span& block : blocks) {
        const int64_t step = block.count() == 1 ? RUN : COUNT;
        for (int64_t i = run * RUN; i < std::min(size, (run + 1) * RUN); i += step)
          f(i, block.first, std::min(step, size - i), block.count());
      }
  });
}

// True if the expert is B's innermost index, as PEFT stores it: [N, R, count].
bool is_interleaved(const Layer& l, const Tenant& t) {
  return l.N * t.R > 0 && t.b.row_stride != 1 && t.b.col_stride != 1;
}

// copy[e, N, R] = B, for the blocks of `for_blocks` in which experts of a span have rows.
template <typename T>
void gather_b(const Layer& l, const Experts& x, const Span& span, const Tenant& t, T* copy) {
  const T* const b = static_cast<const T*>(t.b.data);
  const int64_t size = l.N * t.R, step = t.b.col_stride;
  for_blocks<T>(l, x, span, size, false,
                [&](int64_t i, int64_t e, int64_t elements, int64_t count) {
                  transpose_block(b + i * step + e, step, elements, count,
                                  copy + (e - span.first) * size + i, size);
                });
}

// The gradient of B = copy[e, N, R], for all experts of a span.
template <typename T>
void scatter_db(const Layer& l, const Experts& x, const Span& span, const Tenant& t,
                const T* copy) {
  T* const db = static_cast<T*>(t.db);
  const int64_t size = l.N * t.R, step = t.b.col_stride;
  for_blocks<T>(l, x, span, size, true, [&](int64_t i, int64_t e, int64_t elements, int64_t count) {
    transpose_block(copy + (e - span.first) * size + i, size, count, elements, db + i * step + e,
                    step);
  });
}

// Divides all experts into spans. Calls f(span, tenants) for each, where the tenants' A, B and
// gradients begin at the span's first expert.
//
// An interleaved B is copied a span at a time, so that the copy stays in cache. The gradient of B
// overwrites the copy: a kernel reads an expert's B before it writes the gradient. A span has whole
// cache lines of experts, and at least four experts a thread.
template <typename F>
void for_spans(const Layer& l, const Experts& x, const std::vector<Tenant>& tenants, const F& f) {
  std::vector<Scratch> copies;
  int64_t step = x.count, busy = 0;  // one span if few have rows, as for a single token
  for (int64_t e = 0; e < x.count; ++e) busy += rows_of(x, e) > 0;
  for (const Tenant& t : tenants)
    if (is_interleaved(l, t) && busy > 32)
      step = std::min<int64_t>(x.count, 32 * ((l.threads + 7) / 8));
  for (const Tenant& t : tenants) {
    const int64_t bytes = is_interleaved(l, t) ? step * l.N * t.R * size_of(t.b.dtype) : 0;
    copies.emplace_back(bytes ? scratch_alloc(bytes) : nullptr, scratch_free);
  }
  for (int64_t first = 0; first < x.count; first += step) {
    const Span span{first, std::min(x.count, first + step)};
    std::vector<Tenant> span_tenants = tenants;
    for (size_t i = 0; i < span_tenants.size(); ++i) {
      Tenant& t = span_tenants[i];
      void* const copy = copies[i].get();
      t.a = elements_from(t.a, first * t.a_stride);
      t.da = elements_from(t.da, t.a.dtype, first * t.R * l.K);
      if (!copy) {
        t.b = elements_from(t.b, first * t.b_stride);
        t.db = elements_from(t.db, t.b.dtype, first * t.R * l.N);
        continue;
      }
      if (t.b.dtype == DType::f32)
        gather_b(l, x, span, t, static_cast<uint32_t*>(copy));
      else
        gather_b(l, x, span, t, static_cast<uint16_t*>(copy));
      t.b = {.data = copy, .dtype = t.b.dtype, .row_stride = t.R, .col_stride = 1};
      t.b_stride = l.N * t.R;
      if (t.db) t.db = copy;
    }
    f(span, span_tenants);
    for (size_t i = 0; i < span_tenants.size(); ++i) {
      const Tenant& t = tenants[i];
      if (!copies[i] || !t.db) continue;
      if (t.b.dtype == DType::f32)
        scatter_db(l, x, span, t, static_cast<const uint32_t*>(copies[i].get()));
      else
        scatter_db(l, x, span, t, static_cast<const uint16_t*>(copies[i].get()));
    }
  }
}

// Zeros the gradients of the adapters in a span that have no rows.
void zero_gradients(const Layer& l, const Experts& x, const Span& span,
                    const std::vector<Tenant>& tenants) {
  for (int64_t e = span.first; e < span.last; ++e) {
    int64_t start = start_of(x, e);
    const int64_t* stop = x.stops + e * x.tenants;
    for (const Tenant& t : tenants) {
      const int64_t index = e - span.first;
      if (*stop == start) {
        zero_rows(t.da, t.a.dtype, index, index + 1, t.R * l.K);
        zero_rows(t.db, t.b.dtype, index, index + 1, t.R * l.N);
      }
      start = *stop++;
    }
  }
}

}  // namespace

void lora_experts(const Layer& l, const Experts& x, const std::vector<Tenant>& tenants,
                  const Forward& f) {
  for_spans(l, x, tenants, [&](const Span& span, const std::vector<Tenant>& span_tenants) {
    for_each_expert(l, x, span, [&](const Expert& expert, int threads) {
      Codes codes;
      const bool few_rows = expert.rows <= x.few_rows;
      const Layer layer = expert_layer(l, x, expert, few_rows || x.has_base, &codes, threads);
      Forward forward = f;
      forward.x = rows_from(f.x, expert.start);
      forward.xs = rows_from(f.xs, expert.start);
      forward.few_rows = few_rows;
      forward.p = f.p + expert.start * l.lds;
      forward.y = elements_from(f.y, f.dtype, expert.start * l.N);
      const std::vector<Adapter> adapters =
          adapters_of(l, x, span_tenants, expert, expert.e - span.first);
      if (x.tenants == 1)
        lora_linear(with_adapter(layer, adapters[0]), forward);
      else
        multi_lora_linear(layer, adapters, forward);
    });
  });
  const int64_t last = start_of(x, x.count);
  zero_rows(f.y, f.dtype, last, l.M, l.N);
  zero_rows(f.p, DType::f32, last, l.M, l.lds);
}

void lora_experts_backward(const Layer& l, const Experts& x, const std::vector<Tenant>& tenants,
                           const Backward& g) {
  for_spans(l, x, tenants, [&](const Span& span, const std::vector<Tenant>& span_tenants) {
    for_each_expert(l, x, span, [&](const Expert& expert, int threads) {
      Codes codes;
      const Layer layer = expert_layer(l, x, expert, x.has_base, &codes, threads);
      Backward backward = g;
      backward.dy = rows_from(g.dy, expert.start);
      backward.dz = rows_from(g.dz, expert.start);
      backward.x = rows_from(g.x, expert.start);
      backward.p = g.p + expert.start * l.lds;
      backward.dx = elements_from(g.dx, g.x.dtype, expert.start * l.K);
      backward.dbias = g.dbias ? g.dbias + expert.e * l.N : nullptr;
      const std::vector<Adapter> adapters =
          adapters_of(l, x, span_tenants, expert, expert.e - span.first);
      if (x.tenants == 1) {
        backward.da = adapters[0].da;
        backward.db = adapters[0].db;
        lora_linear_backward(with_adapter(layer, adapters[0]), backward);
      } else {
        multi_lora_linear_backward(layer, adapters, backward);
      }
    });
    zero_gradients(l, x, span, span_tenants);
  });
  for (int64_t e = 0; e < x.count; ++e)
    if (!rows_of(x, e)) zero_rows(g.dbias, DType::f32, e, e + 1, l.N);
  zero_rows(g.dx, g.x.dtype, start_of(x, x.count), l.M, l.K);
}

}  // namespace lora_kernels
