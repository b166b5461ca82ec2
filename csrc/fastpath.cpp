// Guards, and a layer's forward with everything but x and the bias bound: what decoding calls for
// each token (lora_kernels/layers/cache.py).
#include <algorithm>
#include <vector>

#include "bindings.h"

namespace lora_kernels {
namespace {

using namespace python;

bool is_equal(PyObject* value, PyObject* expected) {
  const int equal = PyObject_RichCompareBool(value, expected, Py_EQ);
  if (equal < 0) throw Raised{};
  return equal;
}

// As `Guard` in lora_kernels/core/call.py says.
bool holds(PyObject* target, PyObject* key, PyObject* expected) {
  if (PyDict_Check(target)) {
    PyObject* const value = PyDict_GetItemWithError(target, key);
    if (!value && PyErr_Occurred()) throw Raised{};
    return (value ? value : Py_None) == expected;
  }
  const Object value =
      steal_reference(PyUnicode_Check(key) ? PyObject_GetAttr(target, key)
                      : target == Py_None  ? PyObject_CallNoArgs(key)
                                           : PyObject_CallFunctionObjArgs(key, target, nullptr));
  return is_equal(value.get(), expected);
}

// Of three tuples: all targets, all keys and all expected values.
bool all_hold(Arguments& in) {
  Arguments targets = in.tuple("targets"), keys = in.tuple("keys"), expected = in.tuple("expected");
  if (targets.size() != keys.size() || targets.size() != expected.size())
    fail(PyExc_ValueError, "targets, keys and expected: want one length");
  while (!targets.done())
    if (!holds(targets("target").object, keys("key").object, expected("expected").object))
      return false;
  return true;
}

// DLPack's C exchange API (version 1) returns pointer, dtype, shape and strides of a tensor in one
// call. Reading the Python attributes instead runs several functions that miss the cold cache.

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

// False, without a Python error, for what has no memory.
bool look(PyObject* tensor, DlTensor& to) {
  if (PyObject_TypeCheck(tensor, tensor_class) && exchange->look(tensor, &to) == 0) return true;
  PyErr_Clear();
  return false;
}

// A layer without gate, column scale and dropout.
struct Prepared {
  int64_t few;  // the most rows of x
  DType x_dtype, dtype;
  Object data_ptr, new_empty, is_neg;  // functions of a tensor
  Object cast, float32;                // of x for the base GEMM, or None, and of the bias
  Object new_ranks;                    // of x and M: memory for P [M, R]
  Object threads;                      // how many
  Object keys, expected;               // as guards of x, where there is no `exchange`
  Layer layer;
  Codes4bit codes = {};                              // which layer.codes points to
  Object columns = {}, bias_shape = {}, shape = {};  // N, (N,), "shape"
};

const char* const PREPARED = "lora_kernels.Prepared";

// The shape of x if it is contiguous, on the CPU, in its dtype and what its memory holds, else {}.
std::vector<int64_t> shape_of(const Prepared& p, PyObject* x) {
  if (!exchange) {
    Arguments keys(p.keys.get()), expected(p.expected.get());
    while (!keys.done())
      if (!holds(x, keys("key").object, expected("expected").object)) return {};
    const Object sizes = steal_reference(PyObject_GetAttr(x, p.shape.get()));
    return Value{sizes.get(), "shape"};
  }
  DlTensor t;
  if (Py_TYPE(x) != tensor_class || !look(x, t)) return {};
  constexpr int32_t cpu = 1;
  constexpr uint8_t ieee = 2, brain = 4;
  if (t.device_type != cpu || t.lanes != 1 || t.code != (p.x_dtype == DType::bf16 ? brain : ieee) ||
      t.bits != (p.x_dtype == DType::f32 ? 32 : 16))
    return {};
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != stride) return {};
    stride *= t.shape[i];
  }
  if (call(p.is_neg, x).get() != Py_False) return {};
  return {t.shape, t.shape + t.ndim};
}

template <typename T>
T* memory(const Prepared& p, const Object& tensor) {
  DlTensor t;
  if (exchange && look(tensor.get(), t)) return static_cast<T*>(t.data);
  return Value{call(p.data_ptr, tensor.get()).get(), "data_ptr"};
}

Matrix rows_of(const Prepared& p, const Object& tensor, DType dtype) {
  return {.data = memory<const void>(p, tensor), .dtype = dtype, .row = p.layer.K, .col = 1};
}

// [*shape[:-1], N]
Object sizes_of(const Prepared& p, const std::vector<int64_t>& shape) {
  const auto last = static_cast<Py_ssize_t>(shape.size()) - 1;
  Object sizes = steal_reference(PyTuple_New(last + 1));
  for (Py_ssize_t i = 0; i <= last; ++i) {
    Object size = i < last
                      ? steal_reference(PyLong_FromLongLong(shape[static_cast<std::size_t>(i)]))
                      : new_reference(p.columns.get());
    PyTuple_SetItem(sizes.get(), i, size.release());
  }
  return sizes;
}

// x [..., K], contiguous; bias [N] or None; whether P is kept; and guards -> y [..., N] of few
// rows, or (y, P [M, R]), or None if anything is not as it was prepared for.
Object prepared_forward(PyObject* self, Arguments& in) {
  const auto& p = *static_cast<const Prepared*>(PyCapsule_GetPointer(self, PREPARED));
  const Object x = in("x"), bias = in("bias");
  const bool keeps_p = in("keeps_p");
  const bool hold = all_hold(in);
  in.finish();
  if (!hold) return new_reference(Py_None);
  const std::vector<int64_t> shape = shape_of(p, x.get());
  if (shape.empty() || shape.back() != p.layer.K) return new_reference(Py_None);
  Layer l = p.layer;
  l.M = 1;
  for (std::size_t i = 0; i + 1 < shape.size(); ++i) l.M *= shape[i];
  if (l.M == 0 || l.M > p.few) return new_reference(Py_None);
  const bool has_bias = bias.get() != Py_None;
  if (has_bias && !holds(bias.get(), p.shape.get(), p.bias_shape.get()))
    return new_reference(Py_None);
  const Matrix rows = rows_of(p, x, p.x_dtype);
  if (!rows.data) return new_reference(Py_None);  // zeros that take no memory
  Object bias32, cast;                            // which own what the kernel reads
  if (has_bias) l.bias = memory<const float>(p, bias32 = call(p.float32, bias.get()));
  if (p.cast.get() != Py_None) cast = call(p.cast, x.get());
  Object y = call(p.new_empty, x.get(), sizes_of(p, shape).get()), kept;
  if (keeps_p) kept = call(p.new_ranks, x.get(), steal_reference(PyLong_FromLongLong(l.M)).get());
  Forward f{.x = rows,
            .xs = cast ? rows_of(p, cast, p.dtype) : rows,
            .few_rows = true,
            .p = kept ? memory<float>(p, kept) : nullptr,
            .y = memory<void>(p, y),
            .dtype = p.x_dtype};
  l.threads = Value{call(p.threads).get(), "threads"};
  {
    WithoutGil released;
    const std::unique_ptr<void, void (*)(void*)> ranks(
        kept ? nullptr : scratch_alloc(l.M * l.R * static_cast<int64_t>(sizeof(float))),
        scratch_free);
    if (!kept) f.p = static_cast<float*>(ranks.get());
    lora_linear(l, f);
  }
  return kept ? steal_reference(PyTuple_Pack(2, y.get(), kept.get())) : std::move(y);
}

}  // namespace

Object prepare(Arguments& in) {
  auto prepared = std::make_unique<Prepared>(Prepared{.few = in("few"),
                                                      .x_dtype = in("x_dtype"),
                                                      .dtype = in("dtype"),
                                                      .data_ptr = in("data_ptr"),
                                                      .new_empty = in("new_empty"),
                                                      .is_neg = in("is_neg"),
                                                      .cast = in("cast"),
                                                      .float32 = in("float32"),
                                                      .new_ranks = in("new_ranks"),
                                                      .threads = in("threads"),
                                                      .keys = in("keys"),
                                                      .expected = in("expected"),
                                                      .layer = in("layer")});
  in.finish();
  Layer& layer = prepared->layer;
  if (layer.codes) {
    prepared->codes = *layer.codes;
    layer.codes = &prepared->codes;
  }
  prepared->columns = steal_reference(PyLong_FromLongLong(layer.N));
  prepared->bias_shape = steal_reference(PyTuple_Pack(1, prepared->columns.get()));
  prepared->shape = steal_reference(PyUnicode_InternFromString("shape"));
  static PyMethodDef definition = method<prepared_forward>("forward");
  return steal_reference(
      PyCFunction_New(&definition, build_capsule(std::move(prepared), PREPARED).get()));
}

Object use_exchange(Arguments& in) {
  const Object of = in("class");
  in.finish();
  const char* const name = "__dlpack_c_exchange_api__";
  exchange = nullptr;
  if (of.get() != Py_None && PyObject_HasAttrString(of.get(), name)) {
    const Object table = steal_reference(PyObject_GetAttrString(of.get(), name));
    const auto* const found =
        static_cast<const DlExchange*>(PyCapsule_GetPointer(table.get(), "dlpack_exchange_api"));
    if (!found) throw Raised{};
    tensor_class = reinterpret_cast<PyTypeObject*>(of.get());  // which lives as long as PyTorch
    if (found->major == 1 && found->look) exchange = found;
  }
  return new_reference(exchange ? Py_True : Py_False);
}

Object where(Arguments& in) {
  PyObject* const tensor = in("tensor").object;
  in.finish();
  DlTensor t;
  if (!exchange || !look(tensor, t) || t.ndim > 4) return new_reference(Py_None);
  int64_t all[4 + 2 * 4] = {reinterpret_cast<int64_t>(t.data), static_cast<int64_t>(t.byte_offset),
                            int64_t{t.device_type} << 32 | t.code << 8 | t.bits, t.ndim};
  std::copy_n(t.shape, t.ndim, all + 4);
  std::copy_n(t.strides, t.ndim, all + 4 + t.ndim);
  return steal_reference(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(all),
                                                   (4 + 2 * t.ndim) * Py_ssize_t{sizeof(int64_t)}));
}

Object unchanged(Arguments& in) {
  bool same = all_hold(in);
  for (Arguments empty = in.tuple("empty"); same && !empty.done();) {
    const Py_ssize_t size = PyObject_Size(empty("empty").object);
    if (size < 0) throw Raised{};
    same = size == 0;
  }
  in.finish();
  return new_reference(same ? Py_True : Py_False);
}

}  // namespace lora_kernels
