// Python's view of the kernels: raw pointers, sizes, strides in elements and a thread count.
// Shapes and dtypes are the caller's business (lora_kernels/backends/cpu.py, after functional.py
// has checked them); the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/layer.h"

namespace py = pybind11;
using namespace lora_kernels;

namespace {

using Pointer = std::uintptr_t;

template <typename T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

Matrix matrix(Pointer p, int dtype, int64_t row, int64_t col = 1) {
  return {as<const void>(p), static_cast<DType>(dtype), row, col};
}

Dropout dropout(Pointer rng, uint32_t threshold) { return {as<const int64_t>(rng), threshold}; }

void forward(Pointer x, int x_dtype, int64_t x_row, Pointer xs, int64_t xs_row, int64_t M,
             int64_t K, int64_t N, int64_t R, Pointer w, int64_t w_row, int64_t w_col, Pointer a,
             int a_dtype, int64_t a_row, Pointer b, int b_dtype, int64_t b_row, int64_t b_col,
             float scaling, float keep_scale, Pointer gate, Pointer c, Pointer bias, Pointer rng,
             uint32_t threshold, Pointer p, Pointer y, int y_dtype, Pointer z, int threads) {
  lora_linear(
      {matrix(w, y_dtype, w_row, w_col), matrix(a, a_dtype, a_row),
       matrix(b, b_dtype, b_row, b_col), M, K, N, R, scaling, keep_scale, as<const float>(gate),
       as<const float>(c), as<const float>(bias), dropout(rng, threshold), threads},
      {matrix(x, x_dtype, x_row), matrix(xs, y_dtype, xs_row), as<float>(p), as<void>(y),
       static_cast<DType>(y_dtype), as<void>(z)});
}

void backward(Pointer dy, int dtype, int64_t dy_row, Pointer dz, int64_t dz_row, Pointer x,
              int x_dtype, int64_t x_row, int64_t M, int64_t K, int64_t N, int64_t R, Pointer w,
              int64_t w_row, int64_t w_col, Pointer a, int a_dtype, int64_t a_row, Pointer b,
              int b_dtype, int64_t b_row, int64_t b_col, float scaling, float keep_scale,
              Pointer gate, Pointer c, Pointer rng, uint32_t threshold, Pointer p, Pointer z,
              Pointer dx, Pointer da, Pointer db, Pointer dg, Pointer dc, Pointer dbias,
              int threads) {
  lora_linear_backward(
      {matrix(w, dtype, w_row, w_col), matrix(a, a_dtype, a_row), matrix(b, b_dtype, b_row, b_col),
       M, K, N, R, scaling, keep_scale, as<const float>(gate), as<const float>(c), nullptr,
       dropout(rng, threshold), threads},
      {matrix(dy, dtype, dy_row), matrix(dz, dtype, dz_row), matrix(x, x_dtype, x_row),
       as<const float>(p), as<const void>(z), as<void>(dx), as<void>(da), as<void>(db),
       as<float>(dg), as<float>(dc), as<float>(dbias)});
}

const char* use_isa_named(const std::string& name) {
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512bf16})
    if (name == isa_name(isa)) return isa_name(use_isa(isa));
  throw std::invalid_argument("isa: got '" + name + "', want scalar, avx2, avx512 or avx512bf16");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native CPU kernels; see lora_kernels/backends/cpu.py";
  m.attr("__version__") = LORA_KERNELS_VERSION;
  m.attr("amx_bf16") = has_amx_bf16(read_cpu_features());
  m.def("use_isa", use_isa_named, "Cap the instruction set; returns the one now in use.");
  m.def("use_openmp", use_torch_openmp,
        "Run on the thread pool of the OpenMP runtime that torch carries; returns its file, or "
        "None where there is none and the kernels run on the calling thread.");
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("lora_linear", forward, release);
  m.def("lora_linear_backward", backward, release);
}
