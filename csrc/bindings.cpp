// Python's view of the kernels: raw pointers, sizes, strides in elements and a thread count.
// Shapes and dtypes are the caller's business (lora_kernels/backends/cpu.py, after functional.py
// has checked them); the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

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

Dropout dropout(Pointer rng, uint32_t threshold, Pointer rows = 0) {
  return {as<const int64_t>(rng), threshold, as<const int64_t>(rows)};
}

void forward(Pointer x, int x_dtype, int64_t x_row, Pointer xs, int dtype, int64_t xs_row,
             int64_t M, int64_t K, int64_t N, int64_t R, Pointer w, int64_t w_row, int64_t w_col,
             const Codes4bit* codes, bool few_rows, Pointer a, int a_dtype, int64_t a_row,
             Pointer b, int b_dtype, int64_t b_row, int64_t b_col, float scaling, float keep_scale,
             Pointer gate, Pointer c, Pointer bias, Pointer rng, uint32_t threshold, Pointer p,
             Pointer y, int y_dtype, Pointer z, int threads) {
  lora_linear(
      {matrix(w, dtype, w_row, w_col), matrix(a, a_dtype, a_row), matrix(b, b_dtype, b_row, b_col),
       codes, M, K, N, R, scaling, keep_scale, as<const float>(gate), as<const float>(c),
       as<const float>(bias), dropout(rng, threshold), threads},
      {matrix(x, x_dtype, x_row), matrix(xs, dtype, xs_row), few_rows, as<float>(p), as<void>(y),
       static_cast<DType>(y_dtype), as<void>(z)});
}

void backward(Pointer dy, int dy_dtype, int64_t dy_row, Pointer dz, int dtype, int64_t dz_row,
              Pointer x, int x_dtype, int64_t x_row, int64_t M, int64_t K, int64_t N, int64_t R,
              Pointer w, int64_t w_row, int64_t w_col, const Codes4bit* codes, Pointer a,
              int a_dtype, int64_t a_row, Pointer b, int b_dtype, int64_t b_row, int64_t b_col,
              float scaling, float keep_scale, Pointer gate, Pointer c, Pointer rng,
              uint32_t threshold, Pointer p, Pointer z, Pointer dx, Pointer da, Pointer db,
              Pointer dg, Pointer dc, Pointer dbias, int threads) {
  lora_linear_backward(
      {matrix(w, dtype, w_row, w_col), matrix(a, a_dtype, a_row), matrix(b, b_dtype, b_row, b_col),
       codes, M, K, N, R, scaling, keep_scale, as<const float>(gate), as<const float>(c), nullptr,
       dropout(rng, threshold), threads},
      {matrix(dy, dy_dtype, dy_row), matrix(dz, dtype, dz_row), matrix(x, x_dtype, x_row),
       as<const float>(p), as<const void>(z), as<void>(dx), as<void>(da), as<void>(db),
       as<float>(dg), as<float>(dc), as<float>(dbias)});
}

// start, stop, R, scaling; A and its row stride; B and its strides; dA, dB
using AdapterTuple = std::tuple<int64_t, int64_t, int64_t, float, Pointer, int64_t, Pointer,
                                int64_t, int64_t, Pointer, Pointer>;

std::vector<Adapter> adapters_of(const std::vector<AdapterTuple>& tuples, int a_dtype,
                                 int b_dtype) {
  std::vector<Adapter> adapters;
  for (const auto& [start, stop, R, scaling, a, a_row, b, b_row, b_col, da, db] : tuples)
    adapters.push_back({start, stop, matrix(a, a_dtype, a_row), matrix(b, b_dtype, b_row, b_col), R,
                        scaling, as<void>(da), as<void>(db)});
  return adapters;
}

void multi_forward(Pointer x, int x_dtype, int64_t x_row, Pointer xs, int dtype, int64_t xs_row,
                   int64_t M, int64_t K, int64_t N, int64_t R, Pointer w, int64_t w_row,
                   int64_t w_col, const Codes4bit* codes, bool few_rows,
                   const std::vector<AdapterTuple>& tuples, int a_dtype, int b_dtype,
                   float keep_scale, Pointer bias, Pointer rng, uint32_t threshold, Pointer rows,
                   Pointer p, Pointer y, int y_dtype, int threads) {
  const std::vector<Adapter> adapters = adapters_of(tuples, a_dtype, b_dtype);
  multi_lora_linear({matrix(w, dtype, w_row, w_col), codes, M, K, N, R, adapters.data(),
                     static_cast<int64_t>(adapters.size()), keep_scale, as<const float>(bias),
                     dropout(rng, threshold, rows), threads},
                    {matrix(x, x_dtype, x_row), matrix(xs, dtype, xs_row), few_rows, as<float>(p),
                     as<void>(y), static_cast<DType>(y_dtype), nullptr});
}

void multi_backward(Pointer dy, int dy_dtype, int64_t dy_row, Pointer dz, int dtype, int64_t dz_row,
                    Pointer x, int x_dtype, int64_t x_row, int64_t M, int64_t K, int64_t N,
                    int64_t R, Pointer w, int64_t w_row, int64_t w_col, const Codes4bit* codes,
                    const std::vector<AdapterTuple>& tuples, int a_dtype, int b_dtype,
                    float keep_scale, Pointer rng, uint32_t threshold, Pointer rows, Pointer p,
                    Pointer dx, int threads) {
  const std::vector<Adapter> adapters = adapters_of(tuples, a_dtype, b_dtype);
  multi_lora_linear_backward(
      {matrix(w, dtype, w_row, w_col), codes, M, K, N, R, adapters.data(),
       static_cast<int64_t>(adapters.size()), keep_scale, nullptr, dropout(rng, threshold, rows),
       threads},
      {matrix(dy, dy_dtype, dy_row), matrix(dz, dtype, dz_row), matrix(x, x_dtype, x_row),
       as<const float>(p), nullptr, as<void>(dx), nullptr, nullptr, nullptr, nullptr, nullptr});
}

int log2_of(int64_t power) {
  int n = 0;
  while (int64_t{1} << n < power) ++n;
  return n;
}

Codes4bit codes_4bit(Pointer packed, Pointer code, Pointer absmax, Pointer nested_code,
                     Pointer nested_absmax, Pointer offset, int64_t block, int64_t nested_block,
                     int64_t N, int64_t K) {
  return {as<const uint8_t>(packed),
          as<const float>(code),
          as<const void>(absmax),
          as<const float>(nested_code),
          as<const float>(nested_absmax),
          as<const float>(offset),
          log2_of(block),
          log2_of(nested_block),
          N,
          K};
}

void quantize(Pointer weight, int dtype, int64_t n, int64_t block, Pointer thresholds,
              Pointer order, float smallest, Pointer packed, Pointer absmax, int threads) {
  kernels().quantize({as<const void>(weight), static_cast<DType>(dtype), n, log2_of(block),
                      as<const float>(thresholds), as<const uint8_t>(order), smallest,
                      as<uint8_t>(packed), as<float>(absmax), threads});
}

void dequantize(const Codes4bit& codes, int64_t n0, int64_t rows, int64_t k0, int64_t cols,
                Pointer to, int dtype, int64_t ld, int threads) {
  kernels().dequantize(
      {codes, n0, rows, k0, cols, as<void>(to), static_cast<DType>(dtype), ld, threads});
}

void row_norm(Pointer w, int w_dtype, int64_t w_row, const Codes4bit* codes, Pointer a, int a_dtype,
              int64_t a_row, Pointer b, int b_dtype, int64_t b_row, int64_t b_col, Pointer gate,
              int64_t N, int64_t K, int64_t R, float scaling, Pointer norm, int threads) {
  kernels().row_norm({matrix(w, w_dtype, w_row), codes, matrix(a, a_dtype, a_row),
                      matrix(b, b_dtype, b_row, b_col), as<const float>(gate), N, K, R, scaling,
                      as<float>(norm), threads});
}

// A layer's forward without gradients, dropout, gate and column scale: all but x and the bias is
// bound once.
struct Prepared {
  Layer layer;
  Codes4bit codes;  // which layer.codes points to, where it points anywhere
  DType x_dtype, dtype;
};

// x and, in the dtype of the base product, xs: [M, K], contiguous. y [M, N] in x's; without codes
// it holds the base product.
void prepared_forward(const Prepared* self, Pointer x, Pointer xs, int64_t M, Pointer bias,
                      Pointer y, int threads) {
  Layer l = self->layer;
  std::unique_ptr<void, void (*)(void*)> p(
      scratch_alloc(M * l.R * static_cast<int64_t>(sizeof(float))), scratch_free);
  l.M = M;
  l.bias = as<const float>(bias);
  l.threads = threads;
  lora_linear(l, {{as<const void>(x), self->x_dtype, l.K, 1},
                  {as<const void>(xs), self->dtype, l.K, 1},
                  l.codes != nullptr,
                  static_cast<float*>(p.get()),
                  as<void>(y),
                  self->x_dtype,
                  nullptr});
}

// Python's own calling protocol, for what each layer calls: pybind11 takes a microsecond longer.

template <typename T>
T argument(PyObject* from) {
  if (PyErr_Occurred()) return T{};  // of an argument before
  if constexpr (std::is_same_v<T, const Prepared*>) {
    return static_cast<T>(PyCapsule_GetPointer(from, nullptr));
  } else if constexpr (std::is_pointer_v<T>) {
    return from == Py_None ? nullptr : py::handle(from).cast<T>();
  } else if constexpr (std::is_same_v<T, bool>) {
    return PyObject_IsTrue(from) > 0;
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(PyFloat_AsDouble(from));
  } else if constexpr (std::is_same_v<T, Pointer>) {
    return PyLong_AsUnsignedLongLong(from);
  } else {
    const long long number = PyLong_AsLongLong(from);
    if (number != static_cast<long long>(static_cast<T>(number)))
      PyErr_Format(PyExc_OverflowError, "%lld does not fit its argument", number);
    return static_cast<T>(number);
  }
}

template <typename... Args, std::size_t... I>
void call(void (*kernel)(Args...), PyObject* const* from, std::index_sequence<I...>) {
  const std::tuple<Args...> args{argument<Args>(from[I])...};
  if (PyErr_Occurred()) throw py::error_already_set();
  py::gil_scoped_release release;
  std::apply(kernel, args);
}

template <typename... Args>
constexpr std::size_t count_of(void (*)(Args...)) {
  return sizeof...(Args);
}

// `self`, where a function has one, is the kernel's first argument.
template <auto kernel>
PyObject* fast(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  constexpr std::size_t want = count_of(kernel);
  const std::size_t bound = self ? 1 : 0;
  if (static_cast<std::size_t>(count) + bound != want)
    return PyErr_Format(PyExc_TypeError, "got %zd arguments, want %zu", count, want - bound);
  PyObject* from[want];
  from[0] = self;
  std::copy(given, given + count, from + bound);
  try {
    call(kernel, from, std::make_index_sequence<want>{});
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_TypeError, "%s", error.what());
  }
  Py_RETURN_NONE;
}

// Of a function that lives as long as the module, whose method definition does.
template <auto function>
py::object method(const char* name, int flags, const py::object& self = {}) {
  static PyMethodDef definition{
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), flags, nullptr};
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, self.ptr()));
}

template <auto kernel>
py::object fast_function(const char* name, const py::object& self = {}) {
  return method<fast<kernel>>(name, METH_FASTCALL, self);
}

// While a model decodes, its weights sweep what a layer looks at out of the caches between two
// calls. `fetch` asks for all of it at once, so that the trips to memory overlap with each other
// and with what Python does meanwhile: of each object, of a dictionary's table, and of whatever the
// two words behind another object's header point to, which is where a tensor's object has its
// tensor. Asking is no access: an address may be wrong.
PyObject* fetch(PyObject*, PyObject* objects) {
  if (!PyTuple_Check(objects)) return PyErr_Format(PyExc_TypeError, "objects: want a tuple");
  const auto ask = [](const void* from, int lines) {
    for (int line = 0; line < lines; ++line)
      __builtin_prefetch(static_cast<const char*>(from) + 64 * line);
  };
  const Py_ssize_t n = PyTuple_GET_SIZE(objects);
  for (Py_ssize_t i = 0; i < n; ++i) ask(PyTuple_GET_ITEM(objects, i), 1);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* object = PyTuple_GET_ITEM(objects, i);
    const auto* words = reinterpret_cast<const void* const*>(object + 1);
    if (PyDict_Check(object)) {
      ask(reinterpret_cast<const PyDictObject*>(object)->ma_keys, 3);
    } else if (Py_TYPE(object)->tp_basicsize >=
               static_cast<Py_ssize_t>(sizeof(PyObject) + 2 * sizeof(void*))) {
      ask(words[0], 1);
      ask(words[1], 4);
    }
  }
  Py_RETURN_NONE;
}

// Whether each dictionary still has its value (None: no entry) under its key, and each of `empty`
// is empty.
PyObject* unchanged(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 4 || !std::all_of(given, given + 4, [](PyObject* o) { return PyTuple_Check(o); }))
    return PyErr_Format(PyExc_TypeError, "want the tuples dicts, keys, values and empty");
  PyObject *dicts = given[0], *keys = given[1], *values = given[2], *empty = given[3];
  const Py_ssize_t n = PyTuple_GET_SIZE(dicts);
  if (PyTuple_GET_SIZE(keys) != n || PyTuple_GET_SIZE(values) != n)
    return PyErr_Format(PyExc_ValueError, "dicts, keys and values: want one length");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(empty); ++i) {
    const Py_ssize_t size = PyObject_Size(PyTuple_GET_ITEM(empty, i));
    if (size < 0) return nullptr;
    if (size > 0) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* dict = PyTuple_GET_ITEM(dicts, i);
    if (!PyDict_Check(dict)) return PyErr_Format(PyExc_TypeError, "dicts: want dictionaries");
    const PyObject* value = PyDict_GetItemWithError(dict, PyTuple_GET_ITEM(keys, i));
    if (value == nullptr && PyErr_Occurred()) return nullptr;
    if ((value ? value : Py_None) != PyTuple_GET_ITEM(values, i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

py::object prepare(int64_t K, int64_t N, int64_t R, const Codes4bit* codes, Pointer a, int a_dtype,
                   int64_t a_row, Pointer b, int b_dtype, int64_t b_row, int64_t b_col,
                   float scaling, int x_dtype, int dtype) {
  auto prepared = std::make_unique<Prepared>();
  Layer& layer = prepared->layer;
  layer.a = matrix(a, a_dtype, a_row);
  layer.b = matrix(b, b_dtype, b_row, b_col);
  if (codes) {
    prepared->codes = *codes;
    layer.codes = &prepared->codes;
  }
  layer.K = K;
  layer.N = N;
  layer.R = R;
  layer.scaling = scaling;
  layer.keep_scale = 1.0f;
  prepared->x_dtype = static_cast<DType>(x_dtype);
  prepared->dtype = static_cast<DType>(dtype);
  const py::capsule self(prepared.get(), [](void* p) { delete static_cast<Prepared*>(p); });
  prepared.release();
  return fast_function<prepared_forward>("prepared", self);
}

const char* use_isa_named(const std::string& name) {
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amxbf16})
    if (name == isa_name(isa)) return isa_name(use_isa(isa));
  throw std::invalid_argument("isa: got '" + name +
                              "', want scalar, avx2, avx512, avx512bf16 or amxbf16");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native CPU kernels; see lora_kernels/backends/cpu.py";
  m.attr("__version__") = LORA_KERNELS_VERSION;
  m.attr("amx_bf16") = has_amx_bf16(read_cpu_features());
  m.attr("intel") = is_intel();
  m.def("use_isa", use_isa_named, "Cap the instruction set; returns the one now in use.");
  m.def("use_openmp", use_torch_openmp,
        "Run on the thread pool of the OpenMP runtime that torch carries; returns its file, or "
        "None where there is none and the kernels run on the calling thread.");
  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<Codes4bit>(m, "Codes4bit").def(py::init(&codes_4bit));
  m.def("prepare", prepare, "Its result: (x, xs, M, bias, y, threads) -> None.");
  m.attr("fetch") = method<fetch>("fetch", METH_O);
  m.attr("unchanged") = method<unchanged>("unchanged", METH_FASTCALL);
  m.def("quantize", quantize, release);
  m.def("dequantize", dequantize, release);
  m.def("row_norm", row_norm, release);
  m.attr("lora_linear") = fast_function<forward>("lora_linear");
  m.attr("lora_linear_backward") = fast_function<backward>("lora_linear_backward");
  m.def("multi_lora_linear", multi_forward, release);
  m.def("multi_lora_linear_backward", multi_backward, release);
}
