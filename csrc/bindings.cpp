// The bindings of the CPU kernels: they take addresses, sizes, strides in elements and a thread
// count. Each struct is a tuple of its fields. The caller, lora_kernels/backends/cpu/linear.py, is
// responsible for shapes and dtypes, which lora_kernels/ops has checked.
#include "bindings.h"

#include <new>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/fingerprint.h"

#ifdef __GLIBCXX__
// The containers of GCC 11 and newer call this function. The libstdc++ of older systems, on which a
// portable wheel runs, lacks it, so this library defines it.
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif

namespace lora_kernels {
namespace {

const char* const CODES_CAPSULE = "lora_kernels.Codes";

}  // namespace

namespace python {

template <>
const Codes* convert(const Value& from) {
  if (from.object == Py_None) return nullptr;
  if (!PyCapsule_IsValid(from.object, CODES_CAPSULE))
    fail(PyExc_TypeError, "%s: got %R, want what Codes returns", from.name, Py_TYPE(from.object));
  return static_cast<const Codes*>(PyCapsule_GetPointer(from.object, CODES_CAPSULE));
}

template <>
Matrix read(Arguments& in) {
  return {.data = in("data"),
          .dtype = in("dtype"),
          .row_stride = in("row"),
          .col_stride = in("column")};
}

template <>
Dropout read(Arguments& in) {
  return {.rng = in("rng"), .threshold = in("threshold"), .rows = in("rows")};
}

template <>
Codes read(Arguments& in) {
  Codes codes{.packed = in("packed"),
              .code = in("code"),
              .absmax = in("absmax"),
              .nested_code = in("nested_code"),
              .nested_absmax = in("nested_absmax"),
              .offset = in("offset"),
              .log2_block = log2_of(in("blocksize")),
              .log2_nested = log2_of(in("nested_blocksize")),
              .N = in("N"),
              .K = in("K")};
  codes.kind = kind_of(in("bits"), codes.code);
  const int64_t scale_bytes = in("scale_bytes");
  codes.scale_type = scale_bytes == 4   ? ScaleType::f32
                     : scale_bytes == 2 ? ScaleType::f16
                                        : ScaleType::u8;
  codes.has_shift = in("has_shift");
  return codes;
}

template <>
Layer read(Arguments& in) {
  Layer layer{.w = in("weight"),
              .codes = in("codes"),
              .M = in("M"),
              .K = in("K"),
              .N = in("N"),
              .R = in("R"),
              .lds = 0,
              .a = in("lora_A"),
              .b = in("lora_B"),
              .scaling = in("scaling"),
              .gate = in("rank_gate"),
              .c = in("column_scale"),
              .bias = in("bias"),
              .dropout = in("dropout"),
              .keep_scale = in("keep_scale"),
              .threads = in("threads")};
  layer.lds = layer.R;
  return layer;
}

template <>
Forward read(Arguments& in) {
  return {.x = in("x"),
          .xs = in("xs"),
          .few_rows = in("few_rows"),
          .p = in("p"),
          .y = in("y"),
          .dtype = in("y_dtype"),
          .z = in("z")};
}

template <>
Backward read(Arguments& in) {
  return {.dy = in("dy"),
          .dz = in("dz"),
          .x = in("x"),
          .p = in("p"),
          .z = in("z"),
          .dx = in("dx"),
          .da = in("dA"),
          .db = in("dB"),
          .dg = in("dg"),
          .dc = in("dc"),
          .dbias = in("dbias")};
}

template <>
Adapter read(Arguments& in) {
  return {.start = in("start"),
          .stop = in("stop"),
          .a = in("lora_A"),
          .b = in("lora_B"),
          .R = in("R"),
          .scaling = in("scaling"),
          .da = in("dA"),
          .db = in("dB")};
}

template <>
Experts read(Arguments& in) {
  return {.count = in("count"),
          .tenants = in("tenants"),
          .stops = in("stops"),
          .w_stride = in("weight_stride"),
          .table_stride = in("table_stride"),
          .bias_stride = in("bias_stride"),
          .transposed = in("transposed"),
          .few_rows = in("few_rows"),
          .has_base = in("has_base")};
}

template <>
Tenant read(Arguments& in) {
  return {.a = in("lora_A"),
          .b = in("lora_B"),
          .a_stride = in("lora_A_stride"),
          .b_stride = in("lora_B_stride"),
          .R = in("R"),
          .scaling = in("scaling"),
          .da = in("dA"),
          .db = in("dB")};
}

template <>
RowNormArgs read(Arguments& in) {
  return {.w = in("weight"),
          .codes = in("codes"),
          .a = in("lora_A"),
          .b = in("lora_B"),
          .gate = in("gate"),
          .N = in("N"),
          .K = in("K"),
          .R = in("R"),
          .scaling = in("scaling"),
          .norm = in("norm"),
          .threads = in("threads")};
}

}  // namespace python

namespace {

using namespace python;

Object codes_of(Arguments& in) {
  auto codes = std::make_unique<Codes>(read<Codes>(in));
  in.finish();
  return build_capsule(std::move(codes), CODES_CAPSULE);
}

// The entries raise RuntimeError for arguments with which a kernel would read invalid memory.

void require_memory(const char* name, const void* data, int64_t elements) {
  if (!data && elements > 0)
    throw std::runtime_error(std::string(name) + ": got null, want the address of " +
                             std::to_string(elements) + " elements");
}

void require_gemm(bool is_called) {
  if (is_called && !kernels().gemm)
    throw std::runtime_error(std::string("strategy: got fused, want another: ") +
                             isa_name(isa_in_use()) + " has no fused GEMM");
}

void require_adapter(const Matrix& a, const Matrix& b, int64_t N, int64_t K, int64_t R) {
  require_memory("lora_A", a.data, R * K);
  require_memory("lora_B", b.data, N * R);
}

// Without w and codes, y holds the base GEMM; in the backward dx does.
bool has_base(const Layer& l) { return l.w.data || l.codes; }

void require_rows(const Layer& l, const Forward& f) {
  require_memory("x", f.x.data, l.M * l.K);
  require_memory("y", f.y, l.M * l.N);
  require_memory("p", f.p, l.M * l.R);
  if (f.few_rows && !l.codes) require_memory("weight", l.w.data, l.N * l.K);
}

void require_rows(const Layer& l, const Backward& g) {
  require_memory("dy", g.dy.data, l.M * l.N);
  if (g.da) require_memory("x", g.x.data, l.M * l.K);
  if (g.db) require_memory("p", g.p, l.M * l.R);
}

bool runs_gemm(const Layer& l, const Forward& f) { return has_base(l) && !f.few_rows; }
bool runs_gemm(const Layer& l, const Backward& g) { return has_base(l) && g.dx; }

template <typename Direction>
void require(const Layer& l, const Direction& d) {
  require_rows(l, d);
  require_adapter(l.a, l.b, l.N, l.K, l.R);
  require_gemm(runs_gemm(l, d));
}

template <typename Direction>
void require(const Layer& l, const std::vector<Adapter>& adapters, const Direction& d) {
  require_rows(l, d);
  for (const Adapter& adapter : adapters)
    require_adapter(adapter.a, adapter.b, l.N, l.K, adapter.R);
  require_gemm(runs_gemm(l, d));
}

template <typename Direction>
void require(const Layer& l, const Experts& x, const std::vector<Tenant>& tenants,
             const Direction& d) {
  require_rows(l, d);
  for (const Tenant& t : tenants) require_adapter(t.a, t.b, l.N, l.K, t.R);
  if (static_cast<int64_t>(tenants.size()) != x.tenants)
    throw std::runtime_error("tenants: got " + std::to_string(tenants.size()) + ", want " +
                             std::to_string(x.tenants));
  require_memory("offsets", x.stops, x.count * x.tenants);
  require_gemm(x.has_base);
}

using Adapters = std::vector<Adapter>;
using Tenants = std::vector<Tenant>;

// Calls `function` after `require` has checked its arguments.
template <auto function, typename... T>
void checked(const T&... arguments) {
  require(arguments...);
  function(arguments...);
}

void row_norm(const RowNormArgs& args) {
  require_memory("weight", args.codes ? args.codes->packed : args.w.data, args.N * args.K);
  require_memory("lora_A", args.a.data, args.R * args.K);
  require_memory("lora_B", args.b.data, args.N * args.R);
  kernels().row_norm(args);
}

Object fingerprint_of(Arguments& in) {
  const void* const data = in("data");
  const int64_t bytes = in("bytes");
  const int threads = in("threads");
  in.finish();
  require_memory("data", data, bytes);
  uint64_t result;
  {
    WithoutGil released;
    result = fingerprint(data, bytes, threads);
  }
  return steal_reference(PyLong_FromUnsignedLongLong(result));
}

Object quantize(Arguments& in) {
  const QuantizeArgs args{.weight = in("weight"),
                          .dtype = in("dtype"),
                          .n = in("n"),
                          .log2_block = log2_of(in("blocksize")),
                          .thresholds = in("thresholds"),
                          .bin_codes = in("order"),
                          .min_scale = in("smallest"),
                          .packed = in("packed"),
                          .absmax = in("absmax"),
                          .threads = in("threads")};
  in.finish();
  require_memory("weight", args.weight, args.n);
  WithoutGil released;
  kernels().quantize(args);
  return nullptr;
}

Object dequantize(Arguments& in) {
  const Codes* const codes = in("codes");
  if (!codes) fail(PyExc_TypeError, "codes: got None, want what Codes returns");
  const DequantizeArgs args{.codes = *codes,
                            .n0 = in("n0"),
                            .rows = in("rows"),
                            .k0 = in("k0"),
                            .cols = in("columns"),
                            .out = in("to"),
                            .dtype = in("dtype"),
                            .ld = in("ld"),
                            .threads = in("threads")};
  in.finish();
  require_memory("weight", args.codes.packed, args.rows * args.cols);
  WithoutGil released;
  kernels().dequantize(args);
  return nullptr;
}

Object use_isa_named(Arguments& in) {
  const Value requested = in("isa");
  in.finish();
  const std::string name = convert<const char*>(requested);
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amxbf16}) {
    if (name != isa_name(isa)) continue;
    const Isa used = use_isa(isa);
    set_rules();
    return steal_reference(PyUnicode_FromString(isa_name(used)));
  }
  fail(PyExc_ValueError, "isa: got %R, want scalar, avx2, avx512, avx512bf16 or amxbf16",
       requested.object);
}

Object multiply_add(Arguments& in) {
  const DType dtype = in("dtype");
  const int64_t rounds = in("rounds");
  const int threads = in("threads");
  in.finish();
  double flops;
  {
    WithoutGil released;
    flops = kernels().multiply_add(dtype, rounds, threads);
  }
  return steal_reference(PyFloat_FromDouble(flops));
}

Object use_openmp_at(Arguments& in) {
  const uintptr_t parallel = in("parallel"), thread_num = in("thread_num"),
                  num_threads = in("num_threads");
  in.finish();
  use_openmp(parallel, thread_num, num_threads);
  return nullptr;
}

PyMethodDef methods[] = {
    method<use_isa_named>("use_isa", "Cap the instruction set; return the one now in use."),
    method<use_openmp_at>("use_openmp",
                          "Run on the thread pool of the OpenMP runtime with these addresses."),
    method<multiply_add>("multiply_add", "Multiply and add in registers; return the FLOPs."),
    method<codes_of>("Codes", "Return the addresses of a quantized weight."),
    method<quantize>("quantize"),
    method<dequantize>("dequantize"),
    method<row_norm>("row_norm"),
    method<fingerprint_of>("fingerprint", "Return a number of the bytes at an address."),
    method<checked<lora_linear, Layer, Forward>>("lora_linear"),
    method<checked<lora_linear_backward, Layer, Backward>>("lora_linear_backward"),
    method<checked<multi_lora_linear, Layer, Adapters, Forward>>("multi_lora_linear"),
    method<checked<multi_lora_linear_backward, Layer, Adapters, Backward>>(
        "multi_lora_linear_backward"),
    method<checked<lora_experts, Layer, Experts, Tenants, Forward>>("lora_experts"),
    method<checked<lora_experts_backward, Layer, Experts, Tenants, Backward>>(
        "lora_experts_backward"),
    method<direct_forward>("direct_forward", "Return a layer's y and what its backward reads."),
    method<direct_backward>("direct_backward", "Return the gradients of a layer."),
    method<set_up>("set_up", "Set PyTorch's classes and functions that the direct calls use."),
    method<strategy_on>("strategy",
                        "Return a call's strategy and the most rows for the GEMV kernel."),
    method<has_fused_dx>("is_dx_fused", "Return whether the fused kernel computes dx."),
    method<use_exchange>("use_exchange", "Look at tensors by DLPack's table of functions, or not."),
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = build_module_definition("_native", methods);

}  // namespace
}  // namespace lora_kernels

PyMODINIT_FUNC PyInit__native() {
  using namespace lora_kernels;
  using namespace lora_kernels::python;
  return guarded([] {
    Object module = steal_reference(PyModule_Create(&definition));
    check(PyModule_AddStringConstant(module.get(), "__version__", LORA_KERNELS_VERSION));
    check(PyModule_AddIntConstant(module.get(), "amx_bf16", has_amx_bf16(read_cpu_features())));
    check(PyModule_AddIntConstant(module.get(), "intel", is_intel()));
    check(PyModule_AddIntConstant(module.get(), "MIN_SPLIT_ROWS", MIN_SPLIT_ROWS));
    return module.release();
  });
}
