#include "layer.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "dispatch.h"

namespace lora_kernels {
namespace {

// dg[r] = scaling * sum_m dS * P where it is asked for; then dS becomes the gradient of mask(x)
// A^T.
void through_gate(const Layer& layer, const float* p, float* ds, float* dg) {
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

// y += alpha * mask((s * gate) q), with x w before it unless y holds that already.
void product_or_expand(const Matrix& x, int64_t K, const Matrix& w, const Codes4bit* codes,
                       bool k_inner, const ExpandArgs& update) {
  if (w.data || codes)
    kernels().product({x, w, codes, k_inner, K, update});
  else
    kernels().expand(update);
}

}  // namespace

void lora_linear(const Layer& l, const Forward& f) {
  const ShrinkArgs shrink{f.x, l.a, l.M, l.K, l.R, l.keep_scale, l.dropout, f.p, l.R, l.threads};
  const Matrix w{l.w.data, l.w.dtype, l.w.col, l.w.row}, q{l.b.data, l.b.dtype, l.b.col, l.b.row};
  const ExpandArgs update{f.y,      f.dtype, l.N,    l.M, l.N,
                          l.R,      f.p,     l.R,    q,   l.scaling,
                          l.gate,   l.c,     l.bias, f.z, Dropout{nullptr, 0},
                          l.threads};
  if (f.few_rows) {
    kernels().few_rows({f.xs, w, l.codes, shrink, update});
    return;
  }
  kernels().shrink(shrink);
  product_or_expand(f.xs, l.K, w, l.codes, true, update);
}

void lora_linear_backward(const Layer& l, const Backward& g) {
  const bool need_ds = g.dx || g.da || g.dg;
  std::unique_ptr<void, void (*)(void*)> scratch(
      need_ds ? scratch_alloc(l.M * l.R * static_cast<int64_t>(sizeof(float))) : nullptr,
      scratch_free);
  float* const ds = static_cast<float*>(scratch.get());
  if (need_ds || g.db || g.dc || g.dbias) {
    // The gate's gradient wants dS itself; without a gate it is scaled at once.
    const float ds_scale = l.gate ? 1.0f : l.scaling * l.keep_scale;
    kernels().backward_pair({g.dy, l.b, l.M, l.N, l.R, g.p, l.gate, l.c, g.z, ds_scale, l.scaling,
                             ds, l.R, g.db, l.b.dtype, g.dc, g.dbias, l.threads});
  }
  if (l.gate && need_ds) through_gate(l, g.p, ds, g.dg);
  if (g.da) kernels().grad_a({g.x, l.M, l.K, l.R, ds, l.R, l.dropout, g.da, l.a.dtype, l.threads});
  if (g.dx)
    product_or_expand(g.dz, l.N, l.w, l.codes, false,
                      {g.dx, g.x.dtype, l.K, l.M, l.K, l.R, ds, l.R, l.a, 1.0f, nullptr, nullptr,
                       nullptr, nullptr, l.dropout, l.threads});
}

// multi_lora_linear ------------------------------------------------------------------------------

namespace {

template <typename T>
T* rows_from(T* data, DType dtype, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data ? static_cast<Byte*>(data) + elements * (dtype == DType::f32 ? 4 : 2) : data;
}

Matrix rows_from(const Matrix& x, int64_t m) {
  return {rows_from(x.data, x.dtype, m * x.row), x.dtype, x.row, x.col};
}

Dropout rows_from(const Dropout& d, int64_t m) {
  return {d.rng, d.threshold, d.rows ? d.rows + m : nullptr};
}

// f(thread, threads) on every thread.
template <typename F>
void on_threads(int threads, const F& f) {
  run_threads(
      threads, [](void* p, int thread, int count) { (*static_cast<const F*>(p))(thread, count); },
      const_cast<F*>(&f));
}

// Whether the adapters are shared out among threads, in place of the threads among one's rows.
bool shared(const MultiLayer& l) {
  return l.threads > 1 && l.count >= 2 * l.threads && l.M * (l.K + l.N) * l.R >= SMALL;
}

// f(adapter, first row, one past the last, threads) until all rows of all adapters are done.
template <typename F>
void each_piece(const MultiLayer& l, const F& f) {
  if (!shared(l)) {
    for (int64_t i = 0; i < l.count; ++i)
      f(l.adapters[i], l.adapters[i].start, l.adapters[i].stop, l.threads);
    return;
  }
  on_threads(l.threads, [&](int thread, int threads) {
    const int64_t first = l.M * thread / threads, last = l.M * (thread + 1) / threads;
    for (int64_t i = 0; i < l.count; ++i) {
      const Adapter& d = l.adapters[i];
      const int64_t m0 = std::max(d.start, first), m1 = std::min(d.stop, last);
      if (m0 < m1) f(d, m0, m1, 1);
    }
  });
}

// f(adapter, threads), one thread an adapter where there are many: the largest go first, each to
// the thread that has fewest rows by then, so that no result depends on who is faster.
template <typename F>
void each_adapter(const MultiLayer& l, const F& f) {
  if (!shared(l)) {
    for (int64_t i = 0; i < l.count; ++i) f(l.adapters[i], l.threads);
    return;
  }
  std::vector<const Adapter*> order;
  for (int64_t i = 0; i < l.count; ++i) order.push_back(l.adapters + i);
  const auto rows = [](const Adapter* d) { return d->stop - d->start; };
  std::stable_sort(order.begin(), order.end(),
                   [&](const Adapter* a, const Adapter* b) { return rows(a) > rows(b); });
  on_threads(l.threads, [&](int thread, int threads) {
    std::vector<int64_t> load(static_cast<size_t>(threads));
    for (const Adapter* d : order) {
      const auto least = std::min_element(load.begin(), load.end());
      *least += rows(d);
      if (least - load.begin() == thread) f(*d, 1);
    }
  });
}

const Dropout kKeepAll{nullptr, 0};

}  // namespace

void multi_lora_linear(const MultiLayer& l, const Forward& f) {
  const Matrix w{l.w.data, l.w.dtype, l.w.col, l.w.row};
  const Matrix none{nullptr, l.w.dtype, 1, 1};  // no ranks: the base product and the bias
  const ExpandArgs base{f.y,  f.dtype, l.N,     l.M,     l.N,    0,       nullptr,  0,
                        none, 0.0f,    nullptr, nullptr, l.bias, nullptr, kKeepAll, l.threads};
  if (f.few_rows)
    kernels().few_rows(
        {f.xs, w, l.codes, {f.x, none, l.M, l.K, 0, 1.0f, kKeepAll, nullptr, 0, l.threads}, base});
  else if (w.data || l.codes)
    kernels().product({f.xs, w, l.codes, true, l.K, base});
  each_piece(l, [&](const Adapter& d, int64_t m0, int64_t m1, int threads) {
    float* const p = f.p + m0 * l.R;
    kernels().shrink({rows_from(f.x, m0), d.a, m1 - m0, l.K, d.R, l.keep_scale,
                      rows_from(l.dropout, m0), p, l.R, threads});
    kernels().expand({rows_from(f.y, f.dtype, m0 * l.N), f.dtype, l.N, m1 - m0, l.N, d.R, p, l.R,
                      Matrix{d.b.data, d.b.dtype, d.b.col, d.b.row}, d.scaling, nullptr, nullptr,
                      nullptr, nullptr, kKeepAll, threads});
  });
}

void multi_lora_linear_backward(const MultiLayer& l, const Backward& g) {
  std::unique_ptr<void, void (*)(void*)> scratch(
      scratch_alloc(l.M * l.R * static_cast<int64_t>(sizeof(float))), scratch_free);
  float* const all_ds = static_cast<float*>(scratch.get());
  each_adapter(l, [&](const Adapter& d, int threads) {
    const int64_t m = d.start, rows = d.stop - d.start;
    float* const ds = g.dx || d.da ? all_ds + m * l.R : nullptr;
    if (ds || d.db)
      kernels().backward_pair({rows_from(g.dy, m), d.b, rows, l.N, d.R, g.p + m * l.R, nullptr,
                               nullptr, nullptr, d.scaling * l.keep_scale, d.scaling, ds, l.R, d.db,
                               d.b.dtype, nullptr, nullptr, threads});
    if (d.da)
      kernels().grad_a({rows_from(g.x, m), rows, l.K, d.R, ds, l.R, rows_from(l.dropout, m), d.da,
                        d.a.dtype, threads});
  });
  if (!g.dx) return;
  if (l.w.data || l.codes) {
    const Matrix none{nullptr, l.w.dtype, 1, 1};
    kernels().product({g.dz, l.w, l.codes, false, l.N,
                       ExpandArgs{g.dx, g.x.dtype, l.K, l.M, l.K, 0, nullptr, 0, none, 0.0f,
                                  nullptr, nullptr, nullptr, nullptr, kKeepAll, l.threads}});
  }
  each_piece(l, [&](const Adapter& d, int64_t m0, int64_t m1, int threads) {
    kernels().expand({rows_from(g.dx, g.x.dtype, m0 * l.K), g.x.dtype, l.K, m1 - m0, l.K, d.R,
                      all_ds + m0 * l.R, l.R, d.a, 1.0f, nullptr, nullptr, nullptr, nullptr,
                      rows_from(l.dropout, m0), threads});
  });
}

}  // namespace lora_kernels
