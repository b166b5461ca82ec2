#include "layer.h"

#include <memory>
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
  const ShrinkArgs shrink{f.x, l.a, l.M, l.K, l.R, l.keep_scale, l.dropout, f.p, l.threads};
  const Matrix w{l.w.data, l.w.dtype, l.w.col, l.w.row}, q{l.b.data, l.b.dtype, l.b.col, l.b.row};
  const ExpandArgs update{f.y,      f.dtype,   l.N,    l.M, l.N,    l.R, f.p,
                          q,        l.scaling, l.gate, l.c, l.bias, f.z, Dropout{nullptr, 0},
                          l.threads};
  if (f.few_rows) {
    kernels().few_rows({f.xs, *l.codes, shrink, update});
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
                             ds, g.db, l.b.dtype, g.dc, g.dbias, l.threads});
  }
  if (l.gate && need_ds) through_gate(l, g.p, ds, g.dg);
  if (g.da) kernels().grad_a({g.x, l.M, l.K, l.R, ds, l.dropout, g.da, l.a.dtype, l.threads});
  if (g.dx)
    product_or_expand(g.dz, l.N, l.w, l.codes, false,
                      {g.dx, g.x.dtype, l.K, l.M, l.K, l.R, ds, l.a, 1.0f, nullptr, nullptr,
                       nullptr, nullptr, l.dropout, l.threads});
}

}  // namespace lora_kernels
