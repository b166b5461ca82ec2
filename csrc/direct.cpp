// One layer's forward and backward from its tensors (lora_kernels/ops/direct.py). Each call reads
// what it needs of them and keeps nothing. It returns None for what it does not compute, and the
// general way, lora_kernels/ops/linear.py, checks the arguments.
#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "bindings.h"

namespace lora_kernels {
namespace {

using namespace python;

// DLPack's C exchange API (version 1) returns pointer, dtype, shape and strides of a tensor in one
// call. PyTorch has it from 2.10 on; before, attributes say the same in a few microseconds.

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

const DlExchange* exchange = nullptr;

// Python objects, set once by `set_up`. They are never freed: Python ends before static objects do.
struct Objects {
  PyObject *tensor, *parameter;                           // classes
  PyObject *new_empty, *is_neg, *data_ptr, *stride, *to;  // methods of a tensor
  PyObject *library_linear, *library_dx, *num_threads;    // functions
  PyObject* dtypes[3];                                    // float32, bfloat16, float16
  PyObject* like_float32;                                 // an empty tensor
  PyObject *keys, *default_keys, *inference_keys;  // of dispatch: in force, and without observers
  PyObject* forward_ad;                            // the module's dictionary
  PyObject* codebooks;                             // quant_type -> float32 [16]
  PyObject *is_cpu, *dtype, *shape, *itemsize, *level;  // names of attributes
};
Objects python_objects{};
const Objects& py = python_objects;

// The choice of `plan` in backends/cpu/heuristics.py for one dtype of the base GEMM.
struct Rules {
  int64_t few_rows, few_rows_4bit, few_rows_of_large;  // the most rows of x for the GEMV
  int64_t library_rows, library_gemm, library_end;     // see `Rules` there
  bool has_fused;
};
std::array<Rules, 3> rules{};
int64_t large = 0, max_rank = 0;

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
    return {.data = data, .dtype = dtype, .row = strides[0], .col = strides[1]};
  }
  Matrix rows(int64_t columns) const {  // of a contiguous tensor
    return {.data = data, .dtype = dtype, .row = columns, .col = 1};
  }
};

bool is_same(PyObject* a, PyObject* b) {
  const int same = PyObject_RichCompareBool(a, b, Py_EQ);
  check(same);
  return same;
}

bool find_dtype(PyObject* dtype, DType& found) {
  for (int i = 0; i < 3; ++i)
    if (py.dtypes[i] == dtype) {
      found = static_cast<DType>(i);
      return true;
    }
  return false;
}

bool view_by_exchange(PyObject* tensor, View& to) {
  DlTensor t;
  if (exchange->look(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  constexpr int32_t cpu = 1;
  constexpr uint8_t ieee = 2, brain = 4;
  if (t.device_type != cpu || t.lanes != 1 || t.ndim > MAX_DIMS) return false;
  to.data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  to.ndim = t.ndim, to.bits = t.bits;
  std::copy_n(t.shape, t.ndim, to.shape.begin());
  std::copy_n(t.strides, t.ndim, to.strides.begin());
  to.is_float = (t.code == brain && t.bits == 16) || (t.code == ieee && t.bits <= 32);
  to.dtype = t.code == brain ? DType::bf16 : t.bits == 32 ? DType::f32 : DType::f16;
  return true;
}

bool view_by_attributes(PyObject* tensor, View& to) {
  if (steal_reference(PyObject_GetAttr(tensor, py.is_cpu)).get() != Py_True) return false;
  const Object address(PyObject_CallFunctionObjArgs(py.data_ptr, tensor, nullptr));
  if (!address) {  // a tensor without memory of its own, as one of a batch of gradients
    PyErr_Clear();
    return false;
  }
  to.data = Value{address.get(), "data_ptr"};
  const Object dtype = steal_reference(PyObject_GetAttr(tensor, py.dtype));
  to.is_float = find_dtype(dtype.get(), to.dtype);
  to.bits = 8 * static_cast<int64_t>(Value{
                    steal_reference(PyObject_GetAttr(dtype.get(), py.itemsize)).get(), "itemsize"});
  const Object shape = steal_reference(PyObject_GetAttr(tensor, py.shape)),
               strides = steal_reference(PyObject_CallFunctionObjArgs(py.stride, tensor, nullptr));
  Arguments sizes(shape.get()), steps(strides.get());
  if (sizes.size() > MAX_DIMS) return false;
  to.ndim = static_cast<int>(sizes.size());
  for (std::size_t i = 0; !sizes.done(); ++i)
    to.shape[i] = sizes("size"), to.strides[i] = steps("stride");
  return true;
}

bool view_address(PyObject* tensor, View& to) {
  return exchange ? view_by_exchange(tensor, to) : view_by_attributes(tensor, to);
}

// Reads a tensor on the CPU whose memory holds its values: not negated lazily, and not freed.
bool view_memory(PyObject* tensor, View& to) {
  if (!view_address(tensor, to)) return false;
  const Object negative(PyObject_CallFunctionObjArgs(py.is_neg, tensor, nullptr));
  if (!negative) PyErr_Clear();
  return negative && negative.get() == Py_False && (to.data || to.elements() == 0);
}

// The same of a tensor of exactly PyTorch's classes, in one of the kernels' dtypes.
bool view_floats(PyObject* tensor, View& to) {
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return (type == py.tensor || type == py.parameter) && view_memory(tensor, to) && to.is_float;
}

// Whether ops are observed: by a dispatch mode, a transform, tracing or forward-mode AD.
bool is_intercepted() {
  PyObject* const level = PyDict_GetItemWithError(py.forward_ad, py.level);
  if (!level || PyLong_AsLong(level) >= 0) {
    PyErr_Clear();
    return true;
  }
  const Object keys = steal_reference(PyObject_CallNoArgs(py.keys));
  return !is_same(keys.get(), py.default_keys) && !is_same(keys.get(), py.inference_keys);
}

// Reads the fields of `Packed4bit`; false if a tensor is not as a weight [N, K] has it.
bool read_codes(PyObject* given, int64_t N, int64_t K, Codes4bit& codes) {
  constexpr std::size_t count = 6;  // packed, absmax, code, nested_absmax, nested_code, offset
  Arguments in(given);
  if (in.size() != count + 3) return false;
  std::array<View, count> of;
  for (View& each : of) {
    PyObject* const tensor = in("tensor").object;
    if (tensor == Py_None) continue;
    if (!PyObject_TypeCheck(tensor, reinterpret_cast<PyTypeObject*>(py.tensor))) return false;
    if (!view_memory(tensor, each) || !each.is_contiguous()) return false;
  }
  const int64_t block = in("blocksize"), nested_block = in("nested_blocksize");
  PyObject* const standard = PyDict_GetItemWithError(py.codebooks, in("quant_type").object);
  View codebook;
  if (!standard || !view_memory(standard, codebook)) {
    PyErr_Clear();
    return false;
  }
  const auto has = [&](std::size_t i, int64_t bits, int64_t elements) {
    return of[i].data && of[i].bits == bits && of[i].elements() >= elements;
  };
  const auto is_power = [](int64_t n) { return n > 0 && (n & (n - 1)) == 0; };
  if (!is_power(block) || !is_power(nested_block)) return false;
  const int64_t blocks = (N * K + block - 1) / block;
  const bool nested = of[4].data, is_double = of[3].data;
  // quant_storage may give packed codes another dtype.
  if (!of[0].data || of[0].bits * of[0].elements() < (N * K + 1) / 2 * 8) return false;
  if (!has(1, nested ? 8 : 32, blocks) || !has(2, 32, 16)) return false;
  if (nested && !has(4, 32, 256)) return false;
  if (is_double &&
      !(nested && has(3, 32, (blocks + nested_block - 1) / nested_block) && has(5, 32, 1)))
    return false;
  const auto floats = [&](std::size_t i) { return static_cast<const float*>(of[i].data); };
  // bitsandbytes decodes by the type and ignores the stored codebook: they must agree.
  const float* const code = static_cast<const float*>(codebook.data);
  for (int i = 0; i < 16; ++i)
    if (!(std::abs(floats(2)[i] - code[i]) < 1e-6f)) return false;
  codes = {.packed = static_cast<const uint8_t*>(of[0].data),
           .code = code,
           .absmax = of[1].data,
           .nested_code = nested ? floats(4) : nullptr,
           .nested_absmax = is_double ? floats(3) : nullptr,
           .offset = is_double ? floats(5) : nullptr,
           .log2_block = log2_of(block),
           .log2_nested = log2_of(nested_block),
           .N = N,
           .K = K};
  return true;
}

enum class Strategy { gemv, fused, library };

// As `plan` in heuristics.py, for M rows of a weight [N, K].
Strategy choose_strategy(DType dtype, bool is_4bit, int64_t M, int64_t N, int64_t K) {
  const Rules& r = rules[static_cast<std::size_t>(dtype)];
  const int64_t size = N * K;
  if (M <= (!is_4bit ? r.few_rows : size >= large ? r.few_rows_of_large : r.few_rows_4bit))
    return Strategy::gemv;
  const int64_t first = std::max(r.library_rows, (r.library_gemm + size - 1) / size);
  const bool is_library = !is_4bit && M >= first && M < r.library_end;
  return r.has_fused && !is_library ? Strategy::fused : Strategy::library;
}

// A layer's operands as both directions read them.
struct Operands {
  PyObject *weight, *lora_A, *lora_B;
  PyObject* dtype;  // of the base GEMM over 4 bits; None: x's
  double scaling;
  PyObject* dropout;  // None, or (state or a function of x that draws it, threshold, keep_scale)

  Layer layer{};
  Codes4bit codes{};
  DType gemm_dtype{};
  Object rng;

  explicit Operands(Arguments& in)
      : weight(in("weight").object),
        lora_A(in("lora_A").object),
        lora_B(in("lora_B").object),
        dtype(in("dtype").object),
        scaling(in("scaling")),
        dropout(in("dropout").object) {}

  // False if the kernels do not take them as they are. A layer without lora_A has no adapter.
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

  // The strategy for M rows of x; false if the general way computes it.
  bool choose(Strategy& found) const {
    found = choose_strategy(gemm_dtype, layer.codes, layer.M, layer.N, layer.K);
    return found != Strategy::library || !layer.codes;  // which is decoded in panels
  }

  // Reads the dropout's state, and draws it from x first if it is a function.
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

  // x, or dy, in the dtype of the base GEMM. `owner` owns what the result points to.
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
  Object made = steal_reference(PyTuple_New(static_cast<Py_ssize_t>(sizes.size())));
  Py_ssize_t i = 0;
  for (const int64_t size : sizes)
    PyTuple_SetItem(made.get(), i++, steal_reference(PyLong_FromLongLong(size)).release());
  return made;
}

Object sizes_of(const View& like, int64_t last) {
  Object made = steal_reference(PyTuple_New(like.ndim));
  for (int i = 0; i < like.ndim; ++i) {
    const int64_t size = i + 1 < like.ndim ? like.shape[static_cast<std::size_t>(i)] : last;
    PyTuple_SetItem(made.get(), i, steal_reference(PyLong_FromLongLong(size)).release());
  }
  return made;
}

Object new_empty(PyObject* like, const Object& shape) {
  return steal_reference(PyObject_CallFunctionObjArgs(py.new_empty, like, shape.get(), nullptr));
}

template <typename T>
T* address(const Object& tensor) {
  View to;
  if (!view_address(tensor.get(), to) || !to.is_contiguous())
    fail(PyExc_RuntimeError, "result: got a tensor that is not contiguous memory on the CPU");
  return static_cast<T*>(to.data);
}

int threads_now() {
  return Value{steal_reference(PyObject_CallNoArgs(py.num_threads)).get(), "threads"};
}

PyObject* or_none(const Object& tensor) { return tensor ? tensor.get() : Py_None; }

}  // namespace

// x [..., K], operands, bias [N] or None, and whether P is kept -> y [..., N], or (y, P [M, R],
// the dropout's state or None), or None.
Object direct_forward(Arguments& in) {
  PyObject* const x = in("x").object;
  Operands operands(in);
  PyObject* const bias = in("bias").object;
  const bool keeps_p = in("keeps_p");
  in.finish();
  const auto none = [] { return new_reference(Py_None); };
  Layer& l = operands.layer;
  View rows, of_bias;
  Strategy strategy;
  if (!view_floats(x, rows) || rows.ndim == 0 || !rows.is_contiguous()) return none();
  if (!operands.read(rows.dtype) || rows.last() != l.K) return none();
  l.M = rows.elements() / l.K;
  if (l.M == 0 || !operands.choose(strategy)) return none();
  if (!l.R && strategy != Strategy::gemv) return none();
  if (bias != Py_None &&
      (!view_floats(bias, of_bias) || of_bias.ndim != 1 || of_bias.shape[0] != l.N))
    return none();
  if (is_intercepted()) return none();
  Object y, p, bias32, cast;  // which own what the kernels read and write
  if (bias != Py_None) {
    if (of_bias.dtype != DType::f32 || of_bias.strides[0] != 1) {
      bias32 = new_empty(py.like_float32, tuple_of({l.N}));
      const Object copy = steal_reference(PyUnicode_FromString("copy_"));
      steal_reference(PyObject_CallMethodObjArgs(bias32.get(), copy.get(), bias, nullptr));
      l.bias = address<const float>(bias32);
    } else {
      l.bias = static_cast<const float*>(of_bias.data);
    }
  }
  operands.read_dropout(x);
  Forward f{.x = rows.rows(l.K),
            .xs = operands.cast(x, rows, l.K, cast),
            .few_rows = strategy == Strategy::gemv,
            .p = nullptr,
            .y = nullptr,
            .dtype = rows.dtype};
  if (strategy == Strategy::library) {
    y = steal_reference(
        PyObject_CallFunctionObjArgs(py.library_linear, x, operands.weight, nullptr));
    l.w = {};
  } else {
    y = new_empty(x, sizes_of(rows, l.N));
  }
  f.y = address<void>(y);
  if (keeps_p) f.p = address<float>(p = new_empty(py.like_float32, tuple_of({l.M, l.R})));
  l.threads = threads_now();
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

// dy [..., N], operands, x [..., K] for dA or None, P [M, R] for dB or None, and which gradients
// are needed -> dx, dA, dB and dbias (float32), each or None; or None.
Object direct_backward(Arguments& in) {
  PyObject* const dy = in("dy").object;
  Operands operands(in);
  PyObject *const x = in("x").object, *const p = in("p").object;
  const bool need_x = in("need_x"), need_A = in("need_A"), need_B = in("need_B"),
             need_bias = in("need_bias");
  in.finish();
  const auto none = [] { return new_reference(Py_None); };
  Layer& l = operands.layer;
  View out, rows, ranks;
  Strategy strategy;
  if (!view_floats(dy, out) || out.ndim == 0 || !out.is_contiguous()) return none();
  if (!operands.read(out.dtype) || out.last() != l.N) return none();
  l.M = out.elements() / l.N;
  if (l.M == 0 || !operands.choose(strategy)) return none();
  if (need_A && (!view_floats(x, rows) || !rows.is_contiguous() || rows.dtype != out.dtype ||
                 rows.elements() != l.M * l.K))
    return none();
  if (need_B && (!view_floats(p, ranks) || !ranks.is_contiguous() || ranks.dtype != DType::f32 ||
                 ranks.elements() != l.M * l.R))
    return none();
  const Rules& r = rules[static_cast<std::size_t>(operands.gemm_dtype)];
  // A GEMM of one row reads W once in any order of its elements.
  const bool is_one_row = strategy == Strategy::gemv && l.M == 1 && !l.codes;
  const bool is_dx_fused = r.has_fused && strategy != Strategy::library && !is_one_row;
  if (need_x && !is_dx_fused && l.codes) return none();
  if (is_intercepted()) return none();
  operands.read_dropout(dy);
  Object dx, dA, dB, dbias, cast;
  Backward g{.dy = out.rows(l.N),
             .dz = need_x ? operands.cast(dy, out, l.N, cast) : out.rows(l.N),
             .x = {.data = rows.data, .dtype = out.dtype, .row = l.K, .col = 1},
             .p = static_cast<const float*>(ranks.data)};
  if (need_x && is_dx_fused) {
    dx = new_empty(dy, sizes_of(out, l.K));
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
  l.threads = threads_now();
  {
    WithoutGil released;
    lora_linear_backward(l, g);
  }
  return steal_reference(PyTuple_Pack(4, or_none(dx), or_none(dA), or_none(dB), or_none(dbias)));
}

// Classes, functions and a dictionary of PyTorch, in the order of Objects; the highest rank.
Object set_up(Arguments& in) {
  const auto own = [&](const char* name) { return Py_NewRef(in(name).object); };
  const auto intern = [](const char* name) {
    return steal_reference(PyUnicode_InternFromString(name)).release();
  };
  Objects& to = python_objects;
  to.tensor = own("Tensor"), to.parameter = own("Parameter");
  to.new_empty = own("new_empty"), to.is_neg = own("is_neg"), to.data_ptr = own("data_ptr");
  to.stride = own("stride"), to.to = own("to");
  to.library_linear = own("library_linear"), to.library_dx = own("library_dx"),
  to.num_threads = own("num_threads");
  for (PyObject*& dtype : to.dtypes) dtype = own("dtype");
  to.like_float32 = own("like_float32");
  to.keys = own("keys"), to.default_keys = own("default_keys");
  to.inference_keys = own("inference_keys"), to.forward_ad = own("forward_ad");
  to.codebooks = own("codebooks");
  max_rank = in("max_rank");
  in.finish();
  to.is_cpu = intern("is_cpu"), to.dtype = intern("dtype"), to.shape = intern("shape");
  to.itemsize = intern("itemsize"), to.level = intern("_current_level");
  return nullptr;
}

// The fields of `Rules` for float32, bfloat16 and float16, and the elements of a large weight.
Object set_rules(Arguments& in) {
  for (Rules& each : rules) {
    Arguments of = in.tuple("rules");
    each = {.few_rows = of("few_rows"),
            .few_rows_4bit = of("few_rows_4bit"),
            .few_rows_of_large = of("few_rows_of_large"),
            .library_rows = of("library_rows"),
            .library_gemm = of("library_gemm"),
            .library_end = of("library_end"),
            .has_fused = of("has_fused")};
    of.finish();
  }
  large = in("large");
  in.finish();
  return nullptr;
}

// dtype, whether the weight is 4-bit, M, N and K -> the strategy's name.
Object strategy_name(Arguments& in) {
  const DType dtype = in("dtype");
  const bool is_4bit = in("is_4bit");
  const int64_t M = in("M"), N = in("N"), K = in("K");
  in.finish();
  const char* const names[] = {"gemv", "fused", "library"};
  const auto found = static_cast<std::size_t>(choose_strategy(dtype, is_4bit, M, N, K));
  return steal_reference(PyUnicode_FromString(names[found]));
}

// Whether this class of tensors, None for none, has DLPack's table of functions; they are used.
Object use_exchange(Arguments& in) {
  PyObject* const cls = in("class").object;
  in.finish();
  const char* const name = "__dlpack_c_exchange_api__";
  exchange = nullptr;
  if (cls != Py_None && PyObject_HasAttrString(cls, name)) {
    const Object table = steal_reference(PyObject_GetAttrString(cls, name));
    const auto* const found =
        static_cast<const DlExchange*>(PyCapsule_GetPointer(table.get(), "dlpack_exchange_api"));
    if (!found) throw Raised{};
    if (found->major == 1 && found->look) exchange = found;
  }
  return new_reference(exchange ? Py_True : Py_False);
}

}  // namespace lora_kernels
