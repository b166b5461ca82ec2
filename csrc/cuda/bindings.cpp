// Python's view of the CUDA kernels' launchers, and in the emulated build of the emulator: raw
// pointers, sizes, strides in elements, a device and a stream. Shapes and dtypes are the caller's
// business (lora_kernels/backends/cuda/launch.py). Types are local to the module, since _cuda and
// _emulator are built from this file and may be imported together.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "kernels.h"
#ifdef LORA_KERNELS_EMULATED
#include "../emulator/runtime.h"
#endif

namespace py = pybind11;
using namespace lora_kernels::gpu;

namespace {

using Pointer = std::uintptr_t;
template <typename T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

using MatrixTuple = std::tuple<Pointer, int, int64_t, int64_t, bool>;
using VectorTuple = std::tuple<Pointer, int>;
// packed, code, absmax, nested_code, nested_absmax, offset; block sizes as powers; N, K; vectors
using CodesTuple = std::tuple<Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, int, int,
                              int64_t, int64_t, bool>;
using DropoutTuple = std::tuple<Pointer, uint32_t>;
using WhereTuple = std::tuple<Pointer, int>;

Matrix matrix(const MatrixTuple& t) {
  const auto& [data, dtype, row, col, vectors] = t;
  return {as<const void>(data), dtype, row, col, vectors};
}
Vector vector(const VectorTuple& t) { return {as<const void>(std::get<0>(t)), std::get<1>(t)}; }
Codes codes(const CodesTuple& t) {
  const auto& [packed, code, absmax, nested_code, nested_absmax, offset, log2_block, log2_nested, N,
               K, vectors] = t;
  return {as<const uint8_t>(packed),
          as<const float>(code),
          as<const void>(absmax),
          as<const float>(nested_code),
          as<const float>(nested_absmax),
          as<const float>(offset),
          log2_block,
          log2_nested,
          N,
          K,
          vectors};
}
Dropout dropout(const DropoutTuple& t) {
  return {as<const int64_t>(std::get<0>(t)), std::get<1>(t)};
}
Where where(const WhereTuple& t) { return {std::get<0>(t), std::get<1>(t)}; }

LinearArgs linear_args(const MatrixTuple& x, int base, const MatrixTuple& w, const CodesTuple& c,
                       bool transposed, int compute, Pointer p, const MatrixTuple& q,
                       const VectorTuple& gate, float s_scale, const DropoutTuple& mask,
                       const VectorTuple& out_scale, const VectorTuple& bias, Pointer y, Pointer z,
                       int y_dtype, int64_t M, int64_t N, int64_t K, int64_t R) {
  return {matrix(x),
          base == 2,
          base == 1,
          matrix(w),
          codes(c),
          transposed,
          compute,
          as<const float>(p),
          matrix(q),
          vector(gate),
          s_scale,
          dropout(mask),
          vector(out_scale),
          vector(bias),
          as<void>(y),
          as<void>(z),
          y_dtype,
          M,
          N,
          K,
          R,
          nullptr,
          K};
}

// Other Python threads run while the driver takes a launch, or loads the image before the first
// one. The emulator is one thread's.
#ifdef LORA_KERNELS_EMULATED
using WithoutGil = py::call_guard<>;
#else
using WithoutGil = py::call_guard<py::gil_scoped_release>;
#endif

#ifdef LORA_KERNELS_EMULATED
namespace emulator = lora_kernels::emulator;

void allow(const std::vector<std::tuple<std::string, Pointer, int64_t>>& named) {
  std::vector<emulator::Range> ranges;
  for (const auto& [name, begin, bytes] : named)
    ranges.push_back({name, begin, begin + (Pointer)bytes});
  emulator::allow(std::move(ranges));
}

py::list traffic() {
  py::list list;
  for (const emulator::Traffic& t : emulator::traffic()) {
    py::dict ranges;
    for (const emulator::Range& r : t.ranges)
      ranges[r.name.c_str()] = py::make_tuple(r.read, r.written);
    list.append(py::make_tuple(t.kernel, ranges));
  }
  return list;
}
#endif

}  // namespace

PYBIND11_MODULE(LORA_KERNELS_MODULE, m) {
  const auto launcher = [&m](const char* name, auto function) {
    m.def(name, function, WithoutGil());
  };
  m.attr("__version__") = LORA_KERNELS_VERSION;
  m.attr("PAIR_ROWS") = PAIR_ROWS;
  m.attr("PAIR_MAX_RANK") = PAIR_MAX_RANK;
  launcher("probe", &probe);
  py::class_<LinearArgs>(m, "Linear", py::module_local()).def(py::init(&linear_args));
  launcher("linear", [](const LinearArgs& a, const WhereTuple& at) { linear(a, where(at)); });
  launcher("gemm",
           [](LinearArgs a, int splits, Pointer parts, int64_t k_share, const WhereTuple& at) {
             a.parts = as<float>(parts);
             a.k_share = k_share;
             gemm(a, splits, where(at));
           });
  py::class_<DecodeArgs>(m, "Decode", py::module_local())
      .def(py::init([](const LinearArgs& l, const MatrixTuple& a, const DropoutTuple& mask_in,
                       float p_scale, Pointer slots, Pointer p, Pointer flags, int64_t slot_share,
                       int slot_count) {
        DecodeArgs d{l,
                     matrix(a),
                     dropout(mask_in),
                     p_scale,
                     as<float>(slots),
                     as<float>(p),
                     as<int>(flags),
                     slot_share,
                     slot_count,
                     0,
                     false,
                     0};
        d.resident = decode_keeps_x(d);
        return d;
      }))
      .def_readonly("resident", &DecodeArgs::resident);
  launcher("decode", [](const DecodeArgs& a, bool cooperative, const WhereTuple& at) {
    return decode(a, cooperative, where(at));
  });
  launcher("thin", [](const MatrixTuple& v, const VectorTuple& v_scale, const DropoutTuple& mask,
                      bool over_rows, const MatrixTuple& y, Pointer out, int64_t I, int64_t J,
                      int64_t R, int64_t j_share, int slot_count, const WhereTuple& at) {
    thin({matrix(v), vector(v_scale), dropout(mask), over_rows, matrix(y), as<float>(out), I, J, R,
          j_share, slot_count},
         where(at));
  });
  launcher("pair", [](const MatrixTuple& v, const VectorTuple& v_scale, const MatrixTuple& b,
                      Pointer s, Pointer slots, Pointer parts, int64_t M, int64_t N, int64_t R,
                      int64_t n_share, int slot_count, int part_count, const WhereTuple& at) {
    pair({matrix(v), vector(v_scale), matrix(b), as<const float>(s), as<float>(slots),
          as<float>(parts), M, N, R, n_share, slot_count, part_count},
         where(at));
  });
  launcher("column_sums", [](const MatrixTuple& v, const MatrixTuple& z, Pointer parts, int64_t M,
                             int64_t N, int64_t m_share, int part_count, const WhereTuple& at) {
    column_sums({matrix(v), matrix(z), as<float>(parts), M, N, m_share, part_count}, where(at));
  });
  launcher("reduce", [](Pointer slots, const VectorTuple& gate, float scale, Pointer out, int dtype,
                        int64_t I, int64_t R, int64_t stride_i, int64_t stride_r, int slot_count,
                        const WhereTuple& at) {
    reduce({as<const float>(slots), vector(gate), scale, as<void>(out), dtype, I, R, stride_i,
            stride_r, slot_count},
           where(at));
  });
  launcher("row_norm", [](bool from_codes, const MatrixTuple& w, const CodesTuple& c,
                          const MatrixTuple& a, const MatrixTuple& b, const VectorTuple& gate,
                          float scaling, Pointer slots, int64_t N, int64_t K, int64_t R,
                          int64_t k_share, int slot_count, const WhereTuple& at) {
    row_norm({from_codes, matrix(w), codes(c), matrix(a), matrix(b), vector(gate), scaling,
              as<float>(slots), N, K, R, k_share, slot_count},
             where(at));
  });
  launcher("dequantize", [](const CodesTuple& c, Pointer w, int dtype, const WhereTuple& at) {
    dequantize({codes(c), as<void>(w), dtype}, where(at));
  });
  launcher("quantize", [](Pointer w, int dtype, Pointer thresholds, Pointer order, Pointer packed,
                          Pointer absmax, float smallest, int64_t n, int64_t blocksize,
                          const WhereTuple& at) {
    quantize({as<const void>(w), dtype, as<const float>(thresholds), as<const uint8_t>(order),
              as<uint8_t>(packed), as<float>(absmax), smallest, n, blocksize},
             where(at));
  });
#ifdef LORA_KERNELS_EMULATED
  m.def("set", [](uint64_t seed, int multiprocessors) {
    emulator::set_seed(seed);
    emulator::multiprocessors = multiprocessors;
  });
  m.def("allow", &allow);
  m.def("synchronize", &emulator::synchronize);
  m.def("traffic", &traffic);
  m.def("switches", &emulator::switches);
#endif
}
