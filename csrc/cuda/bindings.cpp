// Python bindings of the CUDA launchers; in the emulated build, also of the emulator. A struct is
// passed as a tuple of its fields, a tensor as its address, a stream as its handle and device. The
// callers check shapes and dtypes: lora_kernels/backends/cuda/equation.py and launch.py.
#include "../common/python.h"
#include "kernels.h"
#ifdef LORA_KERNELS_EMULATED
#include "../emulator/runtime.h"
#define LORA_KERNELS_MODULE "_emulator"
#define LORA_KERNELS_INIT PyInit__emulator
#else
#define LORA_KERNELS_MODULE "_cuda"
#define LORA_KERNELS_INIT PyInit__cuda
#endif

namespace lora_kernels {
namespace {

using namespace gpu;

struct GemmArgs {
  LinearArgs linear;
  int num_splits;
  float* partials;
  int64_t k_per_split;
};

}  // namespace

namespace python {

template <>
Matrix read(Arguments& in) {
  return {.data = in("data"),
          .dtype = in("dtype"),
          .row = in("row"),
          .col = in("column"),
          .vectors = in("vectors")};
}

template <>
Vector read(Arguments& in) {
  return {.data = in("data"), .dtype = in("dtype")};
}

template <>
Codes read(Arguments& in) {
  return {.packed = in("packed"),
          .code = in("code"),
          .absmax = in("absmax"),
          .nested_code = in("nested_code"),
          .nested_absmax = in("nested_absmax"),
          .offset = in("offset"),
          .log2_block = in("log2_block"),
          .log2_nested = in("log2_nested"),
          .N = in("N"),
          .K = in("K"),
          .vectors = in("vectors")};
}

template <>
Stream read(Arguments& in) {
  return {.handle = in("stream"), .device = in("device")};
}

template <>
LinearArgs read(Arguments& in) {
  return {.x = in("x"),
          .codes = in.has(1),  // the next arguments are w and codes, one of them None
          .w = in("w"),
          .c = in("codes"),
          .transposed = in("transposed"),
          .compute = in("compute"),
          .p = in("p"),
          .q = in("q"),
          .gate = in("gate"),
          .s_scale = in("s_scale"),
          .out_scale = in("out_scale"),
          .bias = in("bias"),
          .y = in("y"),
          .z = in("z"),
          .y_dtype = in("y_dtype"),
          .M = in("M"),
          .N = in("N"),
          .K = in("K"),
          .R = in("R")};
}

template <>
GemmArgs read(Arguments& in) {
  return {.linear = in("linear"),
          .num_splits = in("num_splits"),
          .partials = in("partials"),
          .k_per_split = in("k_per_split")};
}

template <>
DecodeArgs read(Arguments& in) {
  DecodeArgs args{.linear = in("linear"),
                  .a = in("lora_A"),
                  .partials = in("partials"),
                  .p = in("p"),
                  .flags = in("flags"),
                  .k_per_split = in("k_per_split"),
                  .num_splits = in("num_splits")};
  args.resident = decode_keeps_x(args);
  return args;
}

template <>
ThinArgs read(Arguments& in) {
  return {.v = in("v"),
          .v_scale = in("v_scale"),
          .over_rows = in("over_rows"),
          .y = in("y"),
          .out = in("out"),
          .I = in("I"),
          .J = in("J"),
          .R = in("R"),
          .j_per_split = in("j_per_split"),
          .num_splits = in("num_splits")};
}

template <>
PairArgs read(Arguments& in) {
  return {.v = in("v"),
          .v_scale = in("v_scale"),
          .b = in("lora_B"),
          .s = in("s"),
          .ds_partials = in("ds_partials"),
          .db_partials = in("db_partials"),
          .M = in("M"),
          .N = in("N"),
          .R = in("R"),
          .n_per_split = in("n_per_split"),
          .num_splits = in("num_splits"),
          .num_row_tiles = in("num_row_tiles")};
}

template <>
SumsArgs read(Arguments& in) {
  return {.v = in("v"),
          .z = in("z"),
          .partials = in("partials"),
          .M = in("M"),
          .N = in("N"),
          .m_per_split = in("m_per_split"),
          .num_splits = in("num_splits")};
}

template <>
ReduceArgs read(Arguments& in) {
  return {.partials = in("partials"),
          .gate = in("gate"),
          .scale = in("scale"),
          .out = in("out"),
          .dtype = in("dtype"),
          .I = in("I"),
          .R = in("R"),
          .stride_i = in("stride_i"),
          .stride_r = in("stride_r"),
          .num_splits = in("num_splits")};
}

}  // namespace python

namespace {

using namespace python;

void call_gemm(const GemmArgs& g, const Stream& stream) {
  LinearArgs args = g.linear;
  args.partials = g.partials;
  args.k_per_split = g.k_per_split;
  gemm(args, g.num_splits, stream);
}

// True if x fits in shared memory; otherwise the main loop loads it tile by tile.
bool keeps_x(const DecodeArgs& args) { return args.resident; }

#ifdef LORA_KERNELS_EMULATED
void seed_scheduler(uint64_t seed, int multiprocessors) {
  emulator::set_seed(seed);
  emulator::multiprocessors = multiprocessors;
}

// Allow kernels to access these ranges alone. in: a tuple of (name, address, bytes).
Object allow_ranges(Arguments& in) {
  std::vector<emulator::Range> ranges;
  for (Arguments ranges_in = in.tuple("ranges"); !ranges_in.done();) {
    Arguments range = ranges_in.tuple("range");
    const char* const name = range("name");
    const uintptr_t begin = range("begin"), bytes = range("bytes");
    ranges.push_back({.name = name, .begin = begin, .end = begin + bytes});
  }
  emulator::allow(std::move(ranges));
  return nullptr;
}

// Return a list of kernels and what each has read and written, {name: (bytes read, written)}.
Object read_traffic(Arguments&) {
  Object list = steal_reference(PyList_New(0));
  for (const emulator::Traffic& t : emulator::traffic()) {
    Object ranges = steal_reference(PyDict_New());
    for (const emulator::Range& r : t.ranges) {
      const Object bytes = steal_reference(Py_BuildValue("LL", r.read, r.written));
      check(PyDict_SetItemString(ranges.get(), r.name.c_str(), bytes.get()));
    }
    const Object kernel = steal_reference(Py_BuildValue("sO", t.kernel.c_str(), ranges.get()));
    check(PyList_Append(list.get(), kernel.get()));
  }
  return list;
}

Object count_switches(Arguments&) {
  return steal_reference(PyLong_FromLongLong(emulator::switches()));
}
#endif

PyMethodDef methods[] = {
    method<probe>("probe"),
    method<call_gemm>("gemm"),
    method<keeps_x>("decode_keeps_x"),
    method<decode>("decode"),
    method<thin>("thin"),
    method<pair>("pair"),
    method<column_sums>("column_sums"),
    method<reduce>("reduce"),
#ifdef LORA_KERNELS_EMULATED
    method<seed_scheduler>("seed_scheduler"),
    method<allow_ranges>("allow_ranges"),
    method<emulator::synchronize>("synchronize"),
    method<read_traffic>("read_traffic"),
    method<count_switches>("count_switches"),
#endif
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = build_module_definition(LORA_KERNELS_MODULE, methods);

}  // namespace
}  // namespace lora_kernels

PyMODINIT_FUNC LORA_KERNELS_INIT() {
  using namespace lora_kernels;
  using namespace lora_kernels::python;
  return guarded([] {
    Object module = steal_reference(PyModule_Create(&definition));
    check(PyModule_AddStringConstant(module.get(), "__version__", LORA_KERNELS_VERSION));
    check(PyModule_AddIntConstant(module.get(), "PAIR_ROWS", gpu::PAIR_ROWS));
    check(PyModule_AddIntConstant(module.get(), "PAIR_MAX_RANK", gpu::PAIR_MAX_RANK));
    return module.release();
  });
}
