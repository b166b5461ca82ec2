// Python's view of the kernels: raw pointers, sizes, strides in elements and a thread count.
// Shapes and dtypes are the caller's business (lora_kernels/backends/cpu.py, after functional.py
// has checked them); the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"

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

void shrink(Pointer x, int x_dtype, int64_t ldx, int64_t M, int64_t K, Pointer a, int a_dtype,
            int64_t lda, int64_t R, float scale, Pointer rng, uint32_t threshold, Pointer p,
            int threads) {
  kernels().shrink({matrix(x, x_dtype, ldx), matrix(a, a_dtype, lda), M, K, R, scale,
                    dropout(rng, threshold), as<float>(p), threads});
}

void expand(Pointer y, int dtype, int64_t ldy, int64_t M, int64_t N, Pointer s, int64_t R,
            Pointer q, int q_dtype, int64_t q_row, int64_t q_col, float alpha, Pointer c,
            Pointer bias, Pointer z, Pointer rng, uint32_t threshold, int threads) {
  kernels().expand({as<void>(y), static_cast<DType>(dtype), ldy, M, N, R, as<const float>(s),
                    matrix(q, q_dtype, q_row, q_col), alpha, as<const float>(c),
                    as<const float>(bias), as<void>(z), dropout(rng, threshold), threads});
}

void backward_pair(Pointer dy, int dtype, int64_t ldy, int64_t M, int64_t N, Pointer b, int b_dtype,
                   int64_t b_row, int64_t b_col, int64_t R, Pointer s, Pointer c, Pointer z,
                   float ds_scale, float db_scale, Pointer ds, Pointer db, int db_dtype, Pointer dc,
                   Pointer dbias, int threads) {
  kernels().backward_pair({matrix(dy, dtype, ldy), matrix(b, b_dtype, b_row, b_col), M, N, R,
                           as<const float>(s), as<const float>(c), as<const void>(z), ds_scale,
                           db_scale, as<float>(ds), as<void>(db), static_cast<DType>(db_dtype),
                           as<float>(dc), as<float>(dbias), threads});
}

void grad_a(Pointer x, int dtype, int64_t ldx, int64_t M, int64_t K, Pointer d, int64_t R,
            Pointer rng, uint32_t threshold, Pointer da, int da_dtype, int threads) {
  kernels().grad_a({matrix(x, dtype, ldx), M, K, R, as<const float>(d), dropout(rng, threshold),
                    as<void>(da), static_cast<DType>(da_dtype), threads});
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
  m.def("use_isa", use_isa_named, "Cap the instruction set; returns the one now in use.");
  m.def("use_openmp", use_torch_openmp,
        "Run on the thread pool of the OpenMP runtime that torch carries; returns its file, or "
        "None where there is none and the kernels run on the calling thread.");
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("shrink", shrink, release);
  m.def("expand", expand, release);
  m.def("backward_pair", backward_pair, release);
  m.def("grad_a", grad_a, release);
}
