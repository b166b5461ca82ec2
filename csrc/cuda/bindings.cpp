// Python bindings of the CUDA launchers; in the emulated build, also of the emulator. A struct is
// passed as a tuple of its fields, or None for zeros; a tensor as its address; a stream as its
// handle and device. The callers check shapes and dtypes: lora_kernels/backends/cuda/linear.py
// and launch.py.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#ifdef LORA_KERNELS_EMULATED
#include "../emulator/runtime.h"
#define LORA_KERNELS_MODULE _emulator
#else
#define LORA_KERNELS_MODULE _cuda
#endif

namespace py = pybind11;

namespace lora_kernels {
namespace {

using namespace gpu;

struct GemmArgs {
  LinearArgs linear;
  int num_splits;
  float* partials;
  int64_t k_per_split;
};

// The fields of a struct in the order of its tuple. Specialized for each struct.
template <typename T>
struct Fields {};

template <typename Struct, typename Member>
struct Field {
  const char* name;
  Member Struct::* member;
};
template <typename Struct, typename Member>
Field(const char*, Member Struct::*) -> Field<Struct, Member>;

#define NAME(T) static constexpr auto name = py::detail::const_name(#T)

template <>
struct Fields<Matrix> {
  NAME(Matrix);
  static constexpr std::tuple list{Field{"data", &Matrix::data}, Field{"dtype", &Matrix::dtype},
                                   Field{"row", &Matrix::row}, Field{"column", &Matrix::col},
                                   Field{"vectors", &Matrix::vectors}};
};

template <>
struct Fields<Vector> {
  NAME(Vector);
  static constexpr std::tuple list{Field{"data", &Vector::data}, Field{"dtype", &Vector::dtype}};
};

template <>
struct Fields<Codes> {
  NAME(Codes);
  static constexpr std::tuple list{
      Field{"packed", &Codes::packed},
      Field{"code", &Codes::code},
      Field{"absmax", &Codes::absmax},
      Field{"nested_code", &Codes::nested_code},
      Field{"nested_absmax", &Codes::nested_absmax},
      Field{"offset", &Codes::offset},
      Field{"log2_block", &Codes::log2_block},
      Field{"log2_nested", &Codes::log2_nested},
      Field{"N", &Codes::N},
      Field{"K", &Codes::K},
      Field{"vectors", &Codes::vectors},
  };
};

template <>
struct Fields<Stream> {
  NAME(Stream);
  static constexpr std::tuple list{Field{"handle", &Stream::handle},
                                   Field{"device", &Stream::device}};
};

template <>
struct Fields<LinearArgs> {
  NAME(Linear);
  static constexpr std::tuple list{
      Field{"x", &LinearArgs::x},
      Field{"w", &LinearArgs::w},
      Field{"codes", &LinearArgs::c},
      Field{"transposed", &LinearArgs::transposed},
      Field{"compute", &LinearArgs::compute},
      Field{"p", &LinearArgs::p},
      Field{"q", &LinearArgs::q},
      Field{"gate", &LinearArgs::gate},
      Field{"s_scale", &LinearArgs::s_scale},
      Field{"out_scale", &LinearArgs::out_scale},
      Field{"bias", &LinearArgs::bias},
      Field{"y", &LinearArgs::y},
      Field{"z", &LinearArgs::z},
      Field{"y_dtype", &LinearArgs::y_dtype},
      Field{"M", &LinearArgs::M},
      Field{"N", &LinearArgs::N},
      Field{"K", &LinearArgs::K},
      Field{"R", &LinearArgs::R},
  };
};

template <>
struct Fields<GemmArgs> {
  NAME(Gemm);
  static constexpr std::tuple list{
      Field{"linear", &GemmArgs::linear}, Field{"num_splits", &GemmArgs::num_splits},
      Field{"partials", &GemmArgs::partials}, Field{"k_per_split", &GemmArgs::k_per_split}};
};

template <>
struct Fields<DecodeArgs> {
  NAME(Decode);
  static constexpr std::tuple list{
      Field{"linear", &DecodeArgs::linear},
      Field{"x", &DecodeArgs::x},
      Field{"lora_A", &DecodeArgs::a},
      Field{"partials", &DecodeArgs::partials},
      Field{"p", &DecodeArgs::p},
      Field{"flags", &DecodeArgs::flags},
      Field{"k_per_split", &DecodeArgs::k_per_split},
      Field{"num_splits", &DecodeArgs::num_splits},
      Field{"tile_partials", &DecodeArgs::tile_partials},
      Field{"max_blocks", &DecodeArgs::max_blocks},
  };
};

template <>
struct Fields<ThinArgs> {
  NAME(Thin);
  static constexpr std::tuple list{
      Field{"v", &ThinArgs::v},
      Field{"v_scale", &ThinArgs::v_scale},
      Field{"over_rows", &ThinArgs::over_rows},
      Field{"y", &ThinArgs::y},
      Field{"out", &ThinArgs::out},
      Field{"I", &ThinArgs::I},
      Field{"J", &ThinArgs::J},
      Field{"R", &ThinArgs::R},
      Field{"j_per_split", &ThinArgs::j_per_split},
      Field{"num_splits", &ThinArgs::num_splits},
  };
};

template <>
struct Fields<PairArgs> {
  NAME(Pair);
  static constexpr std::tuple list{
      Field{"v", &PairArgs::v},
      Field{"v_scale", &PairArgs::v_scale},
      Field{"lora_B", &PairArgs::b},
      Field{"s", &PairArgs::s},
      Field{"ds_partials", &PairArgs::ds_partials},
      Field{"db_partials", &PairArgs::db_partials},
      Field{"M", &PairArgs::M},
      Field{"N", &PairArgs::N},
      Field{"R", &PairArgs::R},
      Field{"n_per_split", &PairArgs::n_per_split},
      Field{"num_splits", &PairArgs::num_splits},
      Field{"num_row_tiles", &PairArgs::num_row_tiles},
  };
};

template <>
struct Fields<SumsArgs> {
  NAME(Sums);
  static constexpr std::tuple list{
      Field{"v", &SumsArgs::v},
      Field{"z", &SumsArgs::z},
      Field{"partials", &SumsArgs::partials},
      Field{"M", &SumsArgs::M},
      Field{"N", &SumsArgs::N},
      Field{"m_per_split", &SumsArgs::m_per_split},
      Field{"num_splits", &SumsArgs::num_splits},
  };
};

template <>
struct Fields<ReduceArgs> {
  NAME(Reduce);
  static constexpr std::tuple list{
      Field{"partials", &ReduceArgs::partials},
      Field{"gate", &ReduceArgs::gate},
      Field{"scale", &ReduceArgs::scale},
      Field{"out", &ReduceArgs::out},
      Field{"dtype", &ReduceArgs::dtype},
      Field{"I", &ReduceArgs::I},
      Field{"R", &ReduceArgs::R},
      Field{"stride_i", &ReduceArgs::stride_i},
      Field{"stride_r", &ReduceArgs::stride_r},
      Field{"num_splits", &ReduceArgs::num_splits},
  };
};

#undef NAME

template <typename T>
concept Struct = requires { Fields<T>::list; };

template <typename T>
void read(T& to, py::handle from);

template <typename T>
void read_field(T& to, PyObject* from, const char* name) {
  try {
    read(to, from);
  } catch (const py::type_error& error) {
    throw py::type_error(std::string(name) + ": " + error.what());
  }
}

inline std::string type_of(py::handle from) { return Py_TYPE(from.ptr())->tp_name; }

// Throws py::type_error for a value of another type or out of range.
template <typename T>
void read(T& to, py::handle from) {
  if constexpr (std::is_pointer_v<T>) {
    uintptr_t address;
    read(address, from);
    to = reinterpret_cast<T>(address);
  } else if constexpr (!Struct<T>) {
    py::detail::make_caster<T> caster;
    if (!caster.load(from, true)) {
      const bool is_number = PyLong_Check(from.ptr()) && !std::is_same_v<T, bool>;
      const std::string what = is_number ? py::repr(from).cast<std::string>() : type_of(from);
      throw py::type_error("got " + what + ", want " + py::type_id<T>());
    }
    to = py::detail::cast_op<T>(caster);
  } else if (from.is_none()) {
    to = T{};
  } else {
    constexpr size_t count = std::tuple_size_v<decltype(Fields<T>::list)>;
    if (!PyTuple_Check(from.ptr())) throw py::type_error("got " + type_of(from) + ", want a tuple");
    if (static_cast<size_t>(PyTuple_GET_SIZE(from.ptr())) != count)
      throw py::type_error("got " + std::to_string(PyTuple_GET_SIZE(from.ptr())) +
                           " values, want " + std::to_string(count));
    [&]<size_t... i>(std::index_sequence<i...>) {
      (read_field(to.*std::get<i>(Fields<T>::list).member, PyTuple_GET_ITEM(from.ptr(), i),
                  std::get<i>(Fields<T>::list).name),
       ...);
    }(std::make_index_sequence<count>());
    if constexpr (std::is_same_v<T, LinearArgs>) to.codes = to.c.packed != nullptr;
    if constexpr (std::is_same_v<T, DecodeArgs>) to.resident = decode_keeps_x(to);
  }
}

// A line "Matrix: (data, dtype, …)" for the module's docstring.
template <Struct T>
std::string describe() {
  std::string line = std::string(Fields<T>::name.text) + ": (";
  std::apply([&](const auto&... field) { ((line += std::string(field.name) + ", "), ...); },
             Fields<T>::list);
  return line.substr(0, line.size() - 2) + ")\n";
}

template <typename... T>
std::string describe_all() {
  return (describe<T>() + ...);
}

}  // namespace
}  // namespace lora_kernels

namespace pybind11::detail {

template <lora_kernels::Struct T>
struct type_caster<T> {
  PYBIND11_TYPE_CASTER(T, lora_kernels::Fields<T>::name);

  bool load(handle from, bool) {
    lora_kernels::read(value, from);
    return true;
  }
};

}  // namespace pybind11::detail

namespace lora_kernels {
namespace {

void call_gemm(const GemmArgs& g, const Stream& stream) {
  LinearArgs args = g.linear;
  args.partials = g.partials;
  args.k_per_split = g.k_per_split;
  gemm(args, g.num_splits, stream);
}

py::tuple decode_plan(const DecodeArgs& args) {
  return py::make_tuple(args.resident, decode_partials(args));
}

#ifdef LORA_KERNELS_EMULATED
using KeepOrReleaseGil = py::call_guard<>;  // the emulator is not thread-safe

void seed_scheduler(uint64_t seed, int multiprocessors) {
  emulator::set_seed(seed);
  emulator::multiprocessors = multiprocessors;
}

// Allow kernels to access these ranges alone. ranges: of (name, address, bytes).
void allow_ranges(const py::tuple& ranges) {
  std::vector<emulator::Range> allowed;
  for (const py::handle each : ranges) {
    const py::tuple range = py::reinterpret_borrow<py::tuple>(each);
    const uintptr_t begin = range[1].cast<uintptr_t>();
    allowed.push_back({.name = range[0].cast<std::string>(),
                       .begin = begin,
                       .end = begin + range[2].cast<uintptr_t>()});
  }
  emulator::allow(std::move(allowed));
}

py::list read_traffic() {
  py::list kernels;
  for (const emulator::Traffic& t : emulator::traffic()) {
    py::dict ranges;
    for (const emulator::Range& r : t.ranges)
      ranges[py::str(r.name)] = py::make_tuple(r.read, r.written);
    kernels.append(py::make_tuple(t.kernel, ranges));
  }
  return kernels;
}

py::list read_banks() {
  py::list sites;
  for (const emulator::BankSite& s : emulator::bank_sites())
    sites.append(py::make_tuple(s.kernel, s.what, s.file, s.line, s.accesses, s.extra, s.worst));
  return sites;
}

void set_mma(int products, int extra_bits, uint64_t seed) {
  emulator::set_mma({.products = products, .extra_bits = extra_bits, .seed = seed});
}
#else
using KeepOrReleaseGil = py::call_guard<py::gil_scoped_release>;
#endif

}  // namespace

PYBIND11_MODULE(LORA_KERNELS_MODULE, m) {
  m.doc() = "Launchers of the CUDA kernels. A struct is a tuple of its fields:\n\n" +
            describe_all<Matrix, Vector, Codes, Stream, LinearArgs, GemmArgs, DecodeArgs, ThinArgs,
                         PairArgs, SumsArgs, ReduceArgs>();
  m.attr("__version__") = LORA_KERNELS_VERSION;
  m.attr("PAIR_ROWS") = PAIR_ROWS;
  m.attr("PAIR_MAX_RANK") = PAIR_MAX_RANK;

  const auto launcher = [&m](const char* name, auto function) {
    m.def(name, function, py::arg("args"), py::arg("stream"), KeepOrReleaseGil());
  };
  launcher("gemm", call_gemm);
  launcher("decode", decode);
  launcher("thin", thin);
  launcher("pair", pair);
  launcher("column_sums", column_sums);
  launcher("reduce", reduce);
  m.def("probe", probe, py::arg("device"), KeepOrReleaseGil(),
        "Raise RuntimeError with the driver's error if the device cannot run this build.");
  m.def("capture_id", capture_id, py::arg("stream"), KeepOrReleaseGil(),
        "Return the number of the CUDA graph capture that the stream is in, 0 for none.");
  m.def(
      "decode_plan", decode_plan, py::arg("args"),
      "Return whether decode keeps x in shared memory, else it loads x tile by tile, and how many "
      "floats tile_partials must have.");

#ifdef LORA_KERNELS_EMULATED
  m.def("seed_scheduler", seed_scheduler, py::arg("seed"), py::arg("multiprocessors"));
  m.def("allow_ranges", allow_ranges, py::arg("ranges"),
        "Allow kernels to access these ranges alone, each of (name, address, bytes).");
  m.def("synchronize", emulator::synchronize);
  m.def("read_traffic", read_traffic,
        "Return the kernels and what each has moved: (kernel, {name: (bytes read, written)}).");
  m.def("count_switches", emulator::switches, "Return the switches between fibers so far.");
  m.def("count_banks", emulator::count_banks, py::arg("on"),
        "Count the wavefronts of accesses to shared memory from zero, or stop.");
  m.def("read_banks", read_banks,
        "Return what each site has counted: (kernel, instruction, file, line, accesses, extra "
        "wavefronts, the most of one access).");
  m.def("set_mma", set_mma, py::arg("products"), py::arg("extra_bits"), py::arg("seed") = 0,
        "Let mma add products in groups of this size, truncated; 0 for one after another.");
#endif
}

}  // namespace lora_kernels
