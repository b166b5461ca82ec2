// The forward and the backward of one layer, called with its tensors by lora_kernels/ops/direct.py.
// A call reads what it needs and keeps nothing. It returns None for what it does not compute.
// lora_kernels/ops/linear.py then checks the arguments and computes it.
#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/rules.h"

namespace lora_kernels {
namespace {

using namespace python;

// DLPack's C exchange API (version 1) returns the pointer, dtype, shape and strides of a tensor in
// one call. PyTorch has it from 2.10 on. For older versions, attributes are read, which takes a few
// microseconds.

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
  const void *prev_api, *managed_tensor_allocator, *managed_tensor_from_py_object_no_sync,
      *managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* tensor, DlTensor* out);
  const void* current_work_stream;
};

const DlExchange* exchange = nullptr;

// Python objects, set once by `set_up`. They are never freed: Python ends before static objects do.
struct Objects {
  PyObject *tensor, *parameter;                           // classes
  PyObject *new_empty, *is_neg, *data_ptr, *stride, *to;  // methods of a tensor
  PyObject *library_linear, *library_dx, *num_threads;    // functions
  PyObject* dtypes[3];                                    // float32, bfloat16, float16
  PyObject* like_float32;                                 // an empty tensor
  PyObject* dispatch_keys;                                // function: the keys in force
  PyObject *default_keys, *inference_keys;                // keys if no op is intercepted
  PyObject* forward_ad;                                   // dictionary of the module
  PyObject* codebooks;                                    // quant_type -> float32 [16]
  PyObject *is_cpu, *dtype, *shape, *itemsize, *level;    // names of attributes
};
Objects python_objects{};
const Objects& py = python_objects;

std::array<Rules, 3> rules{};  // of each DType on this processor, for the instruction set in use
bool has_gemm = false;         // whether this set has a fused kernel
int64_t max_rank = 0;

constexpr int MAX_DIMS = 8;

struct View {
  void* data = nullptr;
  int ndim = 0;
  std::array<int64_t, MAX_DIMS> shape{}, strides{};
  int64_t bits = 0;  // of an element
  bool is_float = false;
  DType dtype{};  // if is_float

  int64_t elements() const {
    int64_t product = 1;
    for (int i = 0; i < ndim; ++i) product *= shape[static_cast<std::size_t>(i)];
    return product;
  }
  int64_t last() const { return shape[static_cast<std::size_t>(ndim - 1)]; }
  bool is_contiguous() const {
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      const auto d = static_cast<std::size_t>(i);
      if (shape[d] != 1 && strides[d] != stride) return false;
      stride *= shape[d];
    }
    return true;
  }
  Matrix matrix() const {
    return {.data = data, .dtype = dtype, .row_stride = strides[0], .col_stride = strides[1]};
  }
  Matrix rows(int64_t columns) const {  // of a contiguous tensor
    return {.data = data, .dtype = dtype, .row_stride = columns, .col_stride = 1};
  }
};

bool is_same(PyObject* a, PyObject* b) {
  const int same = PyObject_RichCompareBool(a, b, Py_EQ);
  check(same);
  return same;
}

bool find_dtype(PyObject* dtype, DType& result) {
  for (int i = 0; i < 3; ++i)
    if (py.dtypes[i] == dtype) {
      result = static_cast<DType>(i);
      return true;
    }
  return false;
}

bool view_by_exchange(PyObject* tensor, View& view) {
  DlTensor t;
  if (exchange->dltensor_from_py_object_no_sync(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  constexpr int32_t cpu = 1;
  constexpr uint8_t ieee = 2, brain = 4;
  if (t.device_type != cpu || t.lanes != 1 || t.ndim > MAX_DIMS) return false;
  view.data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  view.ndim = t.ndim, view.bits = t.bits;
  std::copy_n(t.shape, t.ndim, view.shape.begin());
  std::copy_n(t.strides, t.ndim, view.strides.begin());
  view.is_float = (t.code == brain && t.bits == 16) || (t.code == ieee && t.bits <= 32);
  view.dtype = t.code == brain ? DType::bf16 : t.bits == 32 ? DType::f32 : DType::f16;
  return true;
}

bool view_by_attributes(PyObject* tensor, View& view) {
  if (steal_reference(PyObject_GetAttr(tensor, py.is_cpu)).get() != Py_True) return false;
  const Object address(PyObject_CallFunctionObjArgs(py.data_ptr, tensor, nullptr));
  if (!address) {  // no memory of its own, such as a batched gradient
    PyErr_Clear();
    return false;
  }
  view.data = Value{address.get(), "data_ptr"};
  const Object dtype = steal_reference(PyObject_GetAttr(tensor, py.dtype));
  view.is_float = find_dtype(dtype.get(), view.dtype);
  view.bits =
      8 * static_cast<int64_t>(
              Value{steal_reference(PyObject_GetAttr(dtype.get(), py.itemsize)).get(), "itemsize"});
  const Object shape = steal_reference(PyObject_GetAttr(tensor, py.shape)),
               strides = steal_reference(PyObject_CallFunctionObjArgs(py.stride, tensor, nullptr));
  Arguments sizes(shape.get()), steps(strides.get());
  if (sizes.size() > MAX_DIMS) return false;
  view.ndim = static_cast<int>(sizes.size());
  for (std::size_t i = 0; !sizes.done(); ++i)
    view.shape[i] = sizes("size"), view.strides[i] = steps("stride");
  return true;
}

bool view_address(PyObject* tensor, View& view) {
  return exchange ? view_by_exchange(tensor, view) : view_by_attributes(tensor, view);
}

// Reads a tensor on the CPU. Returns false if its memory does not hold its values: the tensor is
// negated lazily, or its memory is freed.
bool view_memory(PyObject* tensor, View& view) {
  if (!view_address(tensor, view)) return false;
  const Object negative(PyObject_CallFunctionObjArgs(py.is_neg, tensor, nullptr));
  if (!negative) PyErr_Clear();
  return negative && negative.get() == Py_False && (view.data || view.elements() == 0);
}

// view_memory for a tensor of exactly PyTorch's classes and in one of the kernels' dtypes.
bool view_floats(PyObject* tensor, View& view) {
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return (type == py.tensor || type == py.parameter) && view_memory(tensor, view) && view.is_float;
}

// True if ops are intercepted by a dispatch mode, a transform, tracing or forward-mode AD.
bool is_intercepted() {
  PyObject* const level = PyDict_GetItemWithError(py.forward_ad, py.level);
  if (!level || PyLong_AsLong(level) >= 0) {
    PyErr_Clear();
    return true;
  }
  const Object keys = steal_reference(PyObject_CallNoArgs(py.dispatch_keys));
  return !is_same(keys.get(), py.default_keys) && !is_same(keys.get(), py.inference_keys);
}

// Reads the fields of `Codes`. Returns false if a tensor does not fit a weight [N, K].
bool read_codes(PyObject* packed, int64_t N, int64_t K, Codes& codes) {
  constexpr std::size_t count = 6;  // packed, absmax, code, nested_absmax, nested_code, offset
  Arguments in(packed);
  if (in.size() != count + 3) return false;
  std::array<View, count> views;
  for (View& view : views) {
    PyObject* const tensor = in("tensor").object;
    if (tensor == Py_None) continue;
    if (!PyObject_TypeCheck(tensor, reinterpret_cast<PyTypeObject*>(py.tensor))) return false;
    if (!view_memory(tensor, view) || !view.is_contiguous()) return false;
  }
  const int64_t blocksize = in("blocksize"), nested_blocksize = in("nested_blocksize");
  // bitsandbytes decodes by quant_type and ignores the stored codebook, so the two must agree.
  PyObject* const codebook_tensor = PyDict_GetItemWithError(py.codebooks, in("quant_type").object);
  View codebook = views[2];
  if (codebook_tensor && !view_memory(codebook_tensor, codebook)) return false;
  if (!codebook_tensor && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  const auto has_elements = [&](std::size_t i, int64_t bits, int64_t elements) {
    return views[i].data && views[i].bits == bits && views[i].elements() >= elements;
  };
  const auto is_power_of_2 = [](int64_t n) { return n > 0 && (n & (n - 1)) == 0; };
  if (!is_power_of_2(blocksize) || !is_power_of_2(nested_blocksize)) return false;
  const int64_t blocks = (N * K + blocksize - 1) / blocksize;
  const int64_t bits = views[2].elements() == 256 ? 8 : 4;
  const bool has_shift = views[1].ndim == 2;
  const int64_t each = has_shift ? 2 : 1;
  const bool is_nested = views[4].data, is_double_quantized = views[3].data;
  const bool is_half = views[1].is_float && views[1].dtype == DType::f16;
  if ((bits == 8 || has_shift) && (K % blocksize || blocksize < 16)) return false;
  // quant_storage may give packed codes another dtype.
  if (!views[0].data || views[0].bits * views[0].elements() < (N * K * bits + 7) / 8 * 8)
    return false;
  if (!has_elements(1, is_nested ? 8 : is_half ? 16 : 32, blocks * each)) return false;
  if (!has_elements(2, 32, bits == 8 ? 256 : 16)) return false;
  if (is_nested && !has_elements(4, 32, 256)) return false;
  if (is_double_quantized &&
      !(is_nested &&
        has_elements(3, 32, (blocks + nested_blocksize - 1) / nested_blocksize * each)))
    return false;
  if (views[5].data && !(is_double_quantized && !has_shift && has_elements(5, 32, 1))) return false;
  const auto floats_of = [&](std::size_t i) { return static_cast<const float*>(views[i].data); };
  const float* const code = static_cast<const float*>(codebook.data);
  for (int i = 0; codebook_tensor && i < 16; ++i)
    if (!(std::abs(floats_of(2)[i] - code[i]) < 1e-6f)) return false;
  codes = {.packed = static_cast<const uint8_t*>(views[0].data),
           .code = code,
           .absmax = views[1].data,
           .nested_code = is_nested ? floats_of(4) : nullptr,
           .nested_absmax = is_double_quantized ? floats_of(3) : nullptr,
           .offset = floats_of(5),
           .log2_block = log2_of(blocksize),
           .log2_nested = log2_of(nested_blocksize),
           .N = N,
           .K = K,
           .kind = kind_of(bits, code),
           .scale_type = is_nested ? ScaleType::u8
                         : is_half ? ScaleType::f16
                                   : ScaleType::f32,
           .has_shift = has_shift};
  return true;
}

// The operands that both directions read.
struct Operands {
  PyObject *weight, *lora_A, *lora_B;
  PyObject* dtype;  // of the base GEMM of a 4-bit weight; None: x's
  double scaling;
  PyObject* dropout;  // None or (state or function of x that draws it, threshold, keep_scale)

  Layer layer{};
  Codes codes{};
  DType gemm_dtype{};
  Object rng;

  explicit Operands(Arguments& in)
      : weight(in("weight").object),
        lora_A(in("lora_A").object),
        lora_B(in("lora_B").object),
        dtype(in("dtype").object),
        scaling(in("scaling")),
        dropout(in("dropout").object) {}

  // Returns false if the kernels do not take the operands as they are. A layer without lora_A has
  // no adapter.
  bool read(DType x_dtype) {
    View w, a, b;
    const bool is_dense = !PyTuple_Check(weight);
    if (is_dense && (!view_floats(weight, w) || w.ndim != 2 || w.strides[1] != 1)) return false;
    gemm_dtype = x_dtype;
    if (dtype != Py_None && !find_dtype(dtype, gemm_dtype)) return false;
    if (lora_A == Py_None) {
      if (!is_dense) return false;
      layer.N = w.shape[0], layer.K = w.shape[1];
      layer.a = layer.b = w.matrix();  // with R = 0 no element is read
    } else {
      if (!view_floats(lora_A, a) || !view_floats(lora_B, b) || a.ndim != 2 || b.ndim != 2)
        return false;
      layer.R = a.shape[0], layer.K = a.shape[1], layer.N = b.shape[0];
      if (layer.R < 1 || layer.R > max_rank || b.shape[1] != layer.R) return false;
      if (a.strides[1] != 1 || a.strides[0] < layer.K) return false;
      layer.a = a.matrix(), layer.b = b.matrix();
    }
    if (layer.N < 1 || layer.K < 1) return false;
    if (is_dense) {
      if (w.dtype != gemm_dtype || w.shape[0] != layer.N || w.shape[1] != layer.K) return false;
      layer.w = w.matrix();
    } else {
      if (!read_codes(weight, layer.N, layer.K, codes)) return false;
      layer.codes = &codes;
    }
    layer.lds = layer.R;
    layer.scaling = static_cast<float>(scaling);
    layer.keep_scale = 1.0f;
    return true;
  }

  // Sets the strategy for M rows of x. Returns false if lora_kernels/ops/linear.py computes it.
  bool choose(Strategy& result) const {
    const Rules& r = rules[static_cast<std::size_t>(gemm_dtype)];
    result = choose_strategy(r, layer.codes, false, layer.M, layer.N, layer.K);
    return result != Strategy::library || !layer.codes;  // Python decodes codes in panels
  }

  // Reads the dropout's state. If the state is a function, x is passed to it first to draw one.
  void read_dropout(PyObject* x) {
    if (dropout == Py_None) return;
    PyObject* const state = PyTuple_GetItem(dropout, 0);
    PyObject* const threshold = PyTuple_GetItem(dropout, 1);
    PyObject* const keep_scale = PyTuple_GetItem(dropout, 2);
    if (!state || !threshold || !keep_scale) throw Raised{};
    rng = PyCallable_Check(state) ? steal_reference(PyObject_CallFunctionObjArgs(state, x, nullptr))
                                  : new_reference(state);
    View view;
    if (!view_memory(rng.get(), view) || view.bits != 64 || view.elements() != 2)
      fail(PyExc_ValueError, "rng: want int64 [2]");
    layer.dropout.rng = static_cast<const int64_t*>(view.data);
    layer.dropout.threshold = Value{threshold, "threshold"};
    layer.keep_scale = Value{keep_scale, "keep_scale"};
  }

  // Returns x, or dy, in the dtype of the base GEMM. `owner` owns the memory of a cast.
  Matrix cast(PyObject* rows, const View& view, int64_t columns, Object& owner) const {
    if (view.dtype == gemm_dtype) return view.rows(columns);
    owner = steal_reference(PyObject_CallFunctionObjArgs(py.to, rows, dtype, nullptr));
    View other;
    if (!view_floats(owner.get(), other) || !other.is_contiguous())
      fail(PyExc_RuntimeError, "x: got a cast that is not contiguous");
    return other.rows(columns);
  }
};

Object tuple_of(std::initializer_list<int64_t> sizes) {
  Object tuple = steal_reference(PyTuple_New(static_cast<Py_ssize_t>(sizes.size())));
  Py_ssize_t i = 0;
  for (const int64_t size : sizes)
    PyTuple_SetItem(tuple.get(), i++, steal_reference(PyLong_FromLongLong(size)).release());
  return tuple;
}

Object sizes_of(const View& like, int64_t last) {
  Object tuple = steal_reference(PyTuple_New(like.ndim));
  for (int i = 0; i < like.ndim; ++i) {
    const int64_t size = i + 1 < like.ndim ? like.shape[static_cast<std::size_t>(i)] : last;
    PyTuple_SetItem(tuple.get(), i, steal_reference(PyLong_FromLongLong(size)).release());
  }
  return tuple;
}

Object new_empty(PyObject* like, const Object& shape) {
  return steal_reference(PyObject_CallFunctionObjArgs(py.new_empty, like, shape.get(), nullptr));
}

template <typename T>
T* address(const Object& tensor) {
  View view;
  if (!view_address(tensor.get(), view) || !view.is_contiguous())
    fail(PyExc_RuntimeError, "result: got a tensor that is not contiguous memory on the CPU");
  return static_cast<T*>(view.data);
}

int num_threads() {
  return Value{steal_reference(PyObject_CallNoArgs(py.num_threads)).get(), "threads"};
}

PyObject* or_none(const Object& tensor) { return tensor ? tensor.get() : Py_None; }

}  // namespace

// Takes x [..., K], operands, bias [N] or None, and whether P is kept. Returns y [..., N]; or (y, P
// [M, R], the dropout's state or None); or None.
Object direct_forward(Arguments& in) {
  PyObject* const x = in("x").object;
  Operands operands(in);
  PyObject* const bias = in("bias").object;
  const bool keeps_p = in("keeps_p");
  in.finish();
  const auto none = [] { return new_reference(Py_None); };
  Layer& l = operands.layer;
  View x_view, bias_view;
  Strategy strategy;
  if (!view_floats(x, x_view) || x_view.ndim == 0 || !x_view.is_contiguous()) return none();
  if (!operands.read(x_view.dtype) || x_view.last() != l.K) return none();
  l.M = x_view.elements() / l.K;
  if (l.M == 0 || !operands.choose(strategy)) return none();
  const bool is_gemv = strategy == Strategy::gemv || strategy == Strategy::gemv_quantized;
  if (!l.R && !is_gemv) return none();
  if (bias != Py_None &&
      (!view_floats(bias, bias_view) || bias_view.ndim != 1 || bias_view.shape[0] != l.N))
    return none();
  if (is_intercepted()) return none();
  Object y, p, bias32, cast;  // own the memory of the kernels' operands
  if (bias != Py_None) {
    if (bias_view.dtype != DType::f32 || bias_view.strides[0] != 1) {
      bias32 = new_empty(py.like_float32, tuple_of({l.N}));
      const Object copy = steal_reference(PyUnicode_FromString("copy_"));
      steal_reference(PyObject_CallMethodObjArgs(bias32.get(), copy.get(), bias, nullptr));
      l.bias = address<const float>(bias32);
    } else {
      l.bias = static_cast<const float*>(bias_view.data);
    }
  }
  operands.read_dropout(x);
  Forward f{.x = x_view.rows(l.K),
            .xs = operands.cast(x, x_view, l.K, cast),
            .few_rows = is_gemv,
            .p = nullptr,
            .y = nullptr,
            .dtype = x_view.dtype};
  if (strategy == Strategy::library) {
    y = steal_reference(
        PyObject_CallFunctionObjArgs(py.library_linear, x, operands.weight, nullptr));
    l.w = {};
  } else {
    y = new_empty(x, sizes_of(x_view, l.N));
  }
  f.y = address<void>(y);
  if (keeps_p) f.p = address<float>(p = new_empty(py.like_float32, tuple_of({l.M, l.R})));
  l.threads = num_threads();
  {
    WithoutGil released;
    const std::unique_ptr<void, void (*)(void*)> ranks(
        p ? nullptr : scratch_alloc(l.M * l.R * static_cast<int64_t>(sizeof(float))), scratch_free);
    if (!p) f.p = static_cast<float*>(ranks.get());
    lora_linear(l, f);
  }
  return p ? steal_reference(PyTuple_Pack(3, y.get(), p.get(), or_none(operands.rng)))
           : std::move(y);
}

// Takes dy [..., N], operands, x [..., K] for dA or None, P [M, R] for dB or None, and which
// gradients are needed. Returns (dx, dA, dB, dbias in float32), each perhaps None; or None.
Object direct_backward(Arguments& in) {
  PyObject* const dy = in("dy").object;
  Operands operands(in);
  PyObject *const x = in("x").object, *const p = in("p").object;
  const bool need_x = in("need_x"), need_A = in("need_A"), need_B = in("need_B"),
             need_bias = in("need_bias");
  in.finish();
  const auto none = [] { return new_reference(Py_None); };
  Layer& l = operands.layer;
  View dy_view, x_view, p_view;
  Strategy strategy;
  if (!view_floats(dy, dy_view) || dy_view.ndim == 0 || !dy_view.is_contiguous()) return none();
  if (!operands.read(dy_view.dtype) || dy_view.last() != l.N) return none();
  l.M = dy_view.elements() / l.N;
  if (l.M == 0 || !operands.choose(strategy)) return none();
  if (need_A && (!view_floats(x, x_view) || !x_view.is_contiguous() ||
                 x_view.dtype != dy_view.dtype || x_view.elements() != l.M * l.K))
    return none();
  if (need_B && (!view_floats(p, p_view) || !p_view.is_contiguous() || p_view.dtype != DType::f32 ||
                 p_view.elements() != l.M * l.R))
    return none();
  const bool fuses_dx = is_dx_fused(has_gemm, strategy, l.M);
  if (need_x && !fuses_dx && l.codes) return none();
  if (is_intercepted()) return none();
  operands.read_dropout(dy);
  Object dx, dA, dB, dbias, cast;
  Backward g{.dy = dy_view.rows(l.N),
             .dz = need_x ? operands.cast(dy, dy_view, l.N, cast) : dy_view.rows(l.N),
             .x = {.data = x_view.data, .dtype = dy_view.dtype, .row_stride = l.K, .col_stride = 1},
             .p = static_cast<const float*>(p_view.data)};
  if (need_x && fuses_dx) {
    dx = new_empty(dy, sizes_of(dy_view, l.K));
  } else {
    if (need_x)
      dx = steal_reference(
          PyObject_CallFunctionObjArgs(py.library_dx, dy, operands.weight, nullptr));
    l.w = {}, l.codes = nullptr;
  }
  if (need_x) g.dx = address<void>(dx);
  if (need_A) g.da = address<void>(dA = new_empty(operands.lora_A, tuple_of({l.R, l.K})));
  if (need_B) g.db = address<void>(dB = new_empty(operands.lora_B, tuple_of({l.N, l.R})));
  if (need_bias) g.dbias = address<float>(dbias = new_empty(py.like_float32, tuple_of({l.N})));
  l.threads = num_threads();
  {
    WithoutGil released;
    lora_linear_backward(l, g);
  }
  return steal_reference(PyTuple_Pack(4, or_none(dx), or_none(dA), or_none(dB), or_none(dbias)));
}

// Takes PyTorch's objects in the order of `Objects`, and the highest rank.
Object set_up(Arguments& in) {
  const auto reference_to = [&](const char* name) { return Py_NewRef(in(name).object); };
  const auto intern = [](const char* name) {
    return steal_reference(PyUnicode_InternFromString(name)).release();
  };
  Objects& objects = python_objects;
  objects.tensor = reference_to("Tensor"), objects.parameter = reference_to("Parameter");
  objects.new_empty = reference_to("new_empty"), objects.is_neg = reference_to("is_neg"),
  objects.data_ptr = reference_to("data_ptr");
  objects.stride = reference_to("stride"), objects.to = reference_to("to");
  objects.library_linear = reference_to("library_linear"),
  objects.library_dx = reference_to("library_dx"),
  objects.num_threads = reference_to("num_threads");
  for (PyObject*& dtype : objects.dtypes) dtype = reference_to("dtype");
  objects.like_float32 = reference_to("like_float32");
  objects.dispatch_keys = reference_to("keys"), objects.default_keys = reference_to("default_keys");
  objects.inference_keys = reference_to("inference_keys"),
  objects.forward_ad = reference_to("forward_ad");
  objects.codebooks = reference_to("codebooks");
  max_rank = in("max_rank");
  in.finish();
  objects.is_cpu = intern("is_cpu"), objects.dtype = intern("dtype"),
  objects.shape = intern("shape");
  objects.itemsize = intern("itemsize"), objects.level = intern("_current_level");
  return nullptr;
}

void set_rules() {
  const Processor here{isa_in_use(), has_amx_bf16(read_cpu_features()), is_intel()};
  for (std::size_t i = 0; i < rules.size(); ++i) rules[i] = rules_of(here, static_cast<DType>(i));
  has_gemm = kernels().gemm;
}

// Takes a processor's fields, the dtype of the base GEMM, whether the weight is 4-bit, whether it
// is stored as [K, N], M, N and K. Returns the number of the strategy, and the most rows of x for
// the GEMV kernel.
Object strategy_on(Arguments& in) {
  const Processor processor{.isa = in("isa"), .has_amx = in("has_amx"), .is_intel = in("is_intel")};
  const DType dtype = in("dtype");
  const bool is_quantized = in("is_quantized"), is_columns = in("is_columns");
  const int64_t M = in("M"), N = in("N"), K = in("K");
  in.finish();
  const Rules r = rules_of(processor, dtype);
  const Strategy strategy = choose_strategy(r, is_quantized, is_columns, M, N, K);
  return tuple_of({static_cast<int64_t>(strategy), few_rows(r, is_quantized, is_columns, N * K)});
}

// Takes the number of the strategy and M. Returns whether the fused kernel computes dx.
Object has_fused_dx(Arguments& in) {
  const Strategy strategy = in("strategy");
  const int64_t M = in("M");
  in.finish();
  return new_reference(is_dx_fused(has_gemm, strategy, M) ? Py_True : Py_False);
}

// Uses DLPack's exchange API of this class of tensors; None: uses attributes. Returns whether there
// is one.
Object use_exchange(Arguments& in) {
  PyObject* const cls = in("class").object;
  in.finish();
  const char* const name = "__dlpack_c_exchange_api__";
  exchange = nullptr;
  if (cls != Py_None && PyObject_HasAttrString(cls, name)) {
    const Object table = steal_reference(PyObject_GetAttrString(cls, name));
    const auto* const api =
        static_cast<const DlExchange*>(PyCapsule_GetPointer(table.get(), "dlpack_exchange_api"));
    if (!api) throw Raised{};
    if (api->major == 1 && api->dltensor_from_py_object_no_sync) exchange = api;
  }
  return new_reference(exchange ? Py_True : Py_False);
}

}  // namespace lora_kernels
