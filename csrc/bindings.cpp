// Python's view of the kernels: raw pointers, sizes, strides in elements and a thread count.
// Shapes and dtypes are the caller's business (lora_kernels/backends/cpu.py, after functional.py
// has checked them), but for a prepared call, which compares what it is given with what it was made
// for; the GIL is released while a kernel runs.
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

// Python's own calling protocol, for what each layer calls: pybind11 takes a microsecond longer.

template <typename T>
T argument(PyObject* from) {
  if (PyErr_Occurred()) return T{};  // of an argument before
  if constexpr (std::is_pointer_v<T>) {
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

// What f returns, its C++ exceptions made Python's.
template <typename F>
PyObject* guarded(const F& f) {
  try {
    return f();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  }
  return nullptr;
}

template <auto kernel>
PyObject* fast(PyObject*, PyObject* const* given, Py_ssize_t count) {
  constexpr std::size_t want = count_of(kernel);
  if (static_cast<std::size_t>(count) != want)
    return PyErr_Format(PyExc_TypeError, "got %zd arguments, want %zu", count, want);
  return guarded([&] {
    call(kernel, given, std::make_index_sequence<want>{});
    return Py_NewRef(Py_None);
  });
}

// Of a function that lives as long as the module, whose method definition does.
template <auto function>
py::object method(const char* name, int flags, const py::object& self = {}) {
  static PyMethodDef definition{
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), flags, nullptr};
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, self.ptr()));
}

template <auto kernel>
py::object fast_function(const char* name) {
  return method<fast<kernel>>(name, METH_FASTCALL);
}

// Whether `what` of `of` is still `want`; below 0: a Python error. Of a dictionary: what is under
// that key, itself, None where nothing is. Of another object: its attribute of that name, or what a
// function says of it, of nothing where it is None.
int still(PyObject* of, PyObject* what, PyObject* want) {
  if (PyDict_Check(of)) {
    PyObject* const value = PyDict_GetItemWithError(of, what);
    if (!value && PyErr_Occurred()) return -1;
    return (value ? value : Py_None) == want;
  }
  PyObject* const got = PyUnicode_Check(what) ? PyObject_GetAttr(of, what)
                        : of == Py_None       ? PyObject_CallNoArgs(what)
                                              : PyObject_CallOneArg(what, of);
  if (!got) return -1;
  const int same = PyObject_RichCompareBool(got, want, Py_EQ);
  Py_DECREF(got);
  return same;
}

// The same in each place of three tuples.
int still_all(PyObject* const* tuples) {
  const Py_ssize_t n = PyTuple_GET_SIZE(tuples[0]);
  if (PyTuple_GET_SIZE(tuples[1]) != n || PyTuple_GET_SIZE(tuples[2]) != n) {
    PyErr_SetString(PyExc_ValueError, "of, what and want: want one length");
    return -1;
  }
  int same = 1;
  for (Py_ssize_t i = 0; i < n && same > 0; ++i)
    same = still(PyTuple_GET_ITEM(tuples[0], i), PyTuple_GET_ITEM(tuples[1], i),
                 PyTuple_GET_ITEM(tuples[2], i));
  return same;
}

bool are_tuples(PyObject* const* given, int count) {
  return std::all_of(given, given + count, [](PyObject* o) { return PyTuple_Check(o); });
}

// Whether all is `still` as it was, and each of `empty` is empty.
PyObject* unchanged(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 4 || !are_tuples(given, 4))
    return PyErr_Format(PyExc_TypeError, "want the tuples of, what, want and empty");
  PyObject* const empty = given[3];
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(empty); ++i) {
    const Py_ssize_t size = PyObject_Size(PyTuple_GET_ITEM(empty, i));
    if (size < 0) return nullptr;
    if (size > 0) Py_RETURN_FALSE;
  }
  const int same = still_all(given);
  return same < 0 ? nullptr : PyBool_FromLong(same);
}

// What DLPack's table of functions (its interface for C, version 1) says of a tensor in one call;
// each look at an attribute runs code of its own, which has left the caches like all else.

struct DlTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DlExchange {
  uint32_t major, minor;
  const void *older, *allocator, *to_dlpack, *from_dlpack;
  int (*look)(void* tensor, DlTensor* out);
  const void* stream;
};

const DlExchange* exchange = nullptr;  // PyTorch's, from 2.10 on, of tensors of this class
PyTypeObject* tensor_class = nullptr;

// Whether this class of tensors has one; None has not.
bool use_exchange(const py::object& of) {
  const char* const name = "__dlpack_c_exchange_api__";
  exchange = nullptr;
  if (of.is_none() || !py::hasattr(of, name)) return false;
  const py::object capsule = of.attr(name);
  const void* const found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (!found) throw py::error_already_set();
  const auto* const table = static_cast<const DlExchange*>(found);
  tensor_class = reinterpret_cast<PyTypeObject*>(of.ptr());  // which lives as long as PyTorch
  if (table->major == 1 && table->look) exchange = table;
  return exchange;
}

// False, without a Python error, for what has no memory.
bool look(PyObject* tensor, DlTensor& to) {
  if (PyObject_TypeCheck(tensor, tensor_class) && exchange->look(tensor, &to) == 0) return true;
  PyErr_Clear();
  return false;
}

// Where a tensor lies, and as what: bytes that compare equal where nothing of that has changed.
PyObject* where(PyObject*, PyObject* tensor) {
  DlTensor t;
  if (!exchange || !look(tensor, t) || t.ndim > 4) Py_RETURN_NONE;
  int64_t all[4 + 2 * 4] = {reinterpret_cast<int64_t>(t.data), static_cast<int64_t>(t.byte_offset),
                            int64_t{t.device_type} << 32 | t.code << 8 | t.bits, t.ndim};
  std::copy_n(t.shape, t.ndim, all + 4);
  std::copy_n(t.strides, t.ndim, all + 4 + t.ndim);
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(all),
                                   (4 + 2 * t.ndim) * Py_ssize_t{sizeof(int64_t)});
}

// A layer without gate, column scale and dropout, everything but x and the bias bound.
struct Prepared {
  Layer layer;
  Codes4bit codes;  // which layer.codes points to, where it points anywhere
  DType x_dtype, dtype;
  int64_t few;           // the most rows of x, for which W is read once
  py::tuple what, want;  // of x, as `still` compares, where there is no `exchange`
  py::object columns;    // N
  py::object vector;     // (N,)
  py::object shape;      // the name of that attribute
  py::object data_ptr, new_empty, is_neg;  // functions of a tensor
  py::object cast, float32;                // of x to what the product takes, and of the bias
  py::object threads;                      // how many
};

py::object owned(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object call(const py::object& function, const py::object& a) {
  return owned(PyObject_CallOneArg(function.ptr(), a.ptr()));
}

py::object call(const py::object& function, const py::object& a, const py::object& b) {
  PyObject* const given[] = {a.ptr(), b.ptr()};
  return owned(PyObject_Vectorcall(function.ptr(), given, 2, nullptr));
}

template <typename T>
T number(const py::handle& from) {
  const T n = argument<T>(from.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return n;
}

bool yes(int same) {
  if (same < 0) throw py::error_already_set();
  return same > 0;
}

const Prepared& prepared_of(PyObject* self) {
  return *static_cast<const Prepared*>(PyCapsule_GetPointer(self, nullptr));
}

py::object borrowed(PyObject* object) { return py::reinterpret_borrow<py::object>(object); }

// Of a tensor whose memory is what it holds, contiguous on the CPU and in x's dtype: the shape.
bool shape_of(const Prepared& p, PyObject* tensor, std::vector<int64_t>& to) {
  if (!exchange) {
    for (std::size_t i = 0; i < p.what.size(); ++i)
      if (!yes(still(tensor, PyTuple_GET_ITEM(p.what.ptr(), static_cast<Py_ssize_t>(i)),
                     PyTuple_GET_ITEM(p.want.ptr(), static_cast<Py_ssize_t>(i)))))
        return false;
    const py::object shape = owned(PyObject_GetAttr(tensor, p.shape.ptr()));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(shape.ptr()); ++i)
      to.push_back(number<int64_t>(PyTuple_GET_ITEM(shape.ptr(), i)));
    return true;
  }
  DlTensor t;
  if (Py_TYPE(tensor) != tensor_class || !look(tensor, t)) return false;
  constexpr int32_t cpu = 1;
  constexpr uint8_t ieee = 2, brain = 4;
  if (t.device_type != cpu || t.lanes != 1 || t.code != (p.x_dtype == DType::bf16 ? brain : ieee) ||
      t.bits != (p.x_dtype == DType::f32 ? 32 : 16))
    return false;
  to.assign(t.shape, t.shape + t.ndim);
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != stride) return false;
    stride *= t.shape[i];
  }
  return t.data && call(p.is_neg, borrowed(tensor)).ptr() == Py_False;
}

// The rows of a tensor that has as many columns, and the shape of another that has `others`; no
// rows where it is not what the call was prepared for.
struct Given {
  int64_t rows = 0;
  py::object sizes;

  Given(const Prepared& p, PyObject* tensor, int64_t columns, const py::object& others) {
    std::vector<int64_t> shape;
    if (!shape_of(p, tensor, shape) || shape.empty() || shape.back() != columns) return;
    const auto last = static_cast<Py_ssize_t>(shape.size()) - 1;
    sizes = owned(PyTuple_New(last + 1));
    int64_t product = 1;
    for (Py_ssize_t i = 0; i < last; ++i) {
      product *= shape[static_cast<std::size_t>(i)];
      PyTuple_SET_ITEM(sizes.ptr(), i, PyLong_FromLongLong(shape[static_cast<std::size_t>(i)]));
    }
    PyTuple_SET_ITEM(sizes.ptr(), last, Py_NewRef(others.ptr()));
    rows = product;
  }
};

bool bias_fits(const Prepared& p, const py::object& bias) {
  return bias.is_none() || yes(still(bias.ptr(), p.shape.ptr(), p.vector.ptr()));
}

Pointer address(const Prepared& p, const py::object& tensor) {
  DlTensor t;
  if (exchange && look(tensor.ptr(), t)) return reinterpret_cast<Pointer>(t.data);
  return number<Pointer>(call(p.data_ptr, tensor));
}

template <typename T>
T* memory(const Prepared& p, const py::object& tensor) {
  return tensor.is_none() ? nullptr : as<T>(address(p, tensor));
}

Matrix rows_of(const Prepared& p, const py::object& tensor, DType dtype, int64_t columns) {
  return {memory<const void>(p, tensor), dtype, columns, 1};
}

py::object forward_of(const Prepared& p, const Given& given, const py::object& x,
                      const py::object& bias) {
  Layer l = p.layer;
  l.M = given.rows;
  l.threads = number<int>(owned(PyObject_CallNoArgs(p.threads.ptr())));
  const py::object b = bias.is_none() ? bias : call(p.float32, bias);
  const py::object xs = p.cast.is_none() ? x : call(p.cast, x);
  const py::object y = call(p.new_empty, x, given.sizes);
  l.bias = memory<const float>(p, b);
  const Matrix from = rows_of(p, x, p.x_dtype, l.K), multiplied = rows_of(p, xs, p.dtype, l.K);
  void* const result = memory<void>(p, y);
  {
    py::gil_scoped_release release;
    std::unique_ptr<void, void (*)(void*)> ranks(
        scratch_alloc(l.M * l.R * static_cast<int64_t>(sizeof(float))), scratch_free);
    lora_linear(
        l, {from, multiplied, true, static_cast<float*>(ranks.get()), result, p.x_dtype, nullptr});
  }
  return y;
}

// x [..., K], contiguous; bias [N] or None; and tuples for `still` -> y [..., N] of few rows, or
// None if anything is not as it was prepared for.
PyObject* prepared_forward(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  if (count != 5 || !are_tuples(given + 2, 3))
    return PyErr_Format(PyExc_TypeError, "want x, bias and the tuples of, what and want");
  return guarded([&]() -> PyObject* {
    const Prepared& p = prepared_of(self);
    const py::object x = borrowed(given[0]), bias = borrowed(given[1]);
    py::object y = py::none();
    if (yes(still_all(given + 2))) {
      const Given is(p, given[0], p.layer.K, p.columns);
      if (is.rows && is.rows <= p.few && bias_fits(p, bias)) y = forward_of(p, is, x, bias);
    }
    return y.release().ptr();
  });
}

py::object prepare(int64_t few, int64_t K, int64_t N, int64_t R, Pointer w, int64_t w_row,
                   int64_t w_col, const Codes4bit* codes, Pointer a, int a_dtype, int64_t a_row,
                   Pointer b, int b_dtype, int64_t b_row, int64_t b_col, float scaling, int x_dtype,
                   int dtype, const py::tuple& what, const py::tuple& want, const py::object& shape,
                   const py::object& data_ptr, const py::object& new_empty,
                   const py::object& is_neg, const py::object& cast, const py::object& float32,
                   const py::object& threads) {
  if (what.size() != want.size()) throw std::invalid_argument("what and want: want one length");
  auto prepared = std::make_unique<Prepared>(Prepared{{},
                                                      {},
                                                      static_cast<DType>(x_dtype),
                                                      static_cast<DType>(dtype),
                                                      few,
                                                      what,
                                                      want,
                                                      py::int_(N),
                                                      py::make_tuple(N),
                                                      shape,
                                                      data_ptr,
                                                      new_empty,
                                                      is_neg,
                                                      cast,
                                                      float32,
                                                      threads});
  Layer& layer = prepared->layer;
  layer.w = matrix(w, dtype, w_row, w_col);
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
  layer.keep_scale = 1;
  const py::capsule self(prepared.get(), [](void* p) { delete static_cast<Prepared*>(p); });
  prepared.release();
  return method<prepared_forward>("forward", METH_FASTCALL, self);
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
  m.def("prepare", prepare, "Return a function of x and bias: the forward of a layer.");
  m.def("use_exchange", use_exchange, "Look at tensors by DLPack's table of functions, or None.");
  m.attr("where") = method<where>("where", METH_O);
  m.attr("unchanged") = method<unchanged>("unchanged", METH_FASTCALL);
  m.def("quantize", quantize, release);
  m.def("dequantize", dequantize, release);
  m.def("row_norm", row_norm, release);
  m.attr("lora_linear") = fast_function<forward>("lora_linear");
  m.attr("lora_linear_backward") = fast_function<backward>("lora_linear_backward");
  m.def("multi_lora_linear", multi_forward, release);
  m.def("multi_lora_linear_backward", multi_backward, release);
}
