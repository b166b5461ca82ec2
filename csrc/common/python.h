// Helpers over Python's limited C API, so that one extension serves Python 3.10 and later:
// references, errors as exceptions, and arguments that become structs.
#pragma once
#include <Python.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <tuple>
#include <type_traits>
#include <vector>

namespace lora_kernels::python {

struct Raised {};  // thrown after Python's own error is set

template <typename... T>
[[noreturn]] void fail(PyObject* error, const char* format, T... values) {
  PyErr_Format(error, format, values...);
  throw Raised{};
}

// Throw Raised if a Python call returned an error status.
inline void check(int status) {
  if (status < 0) throw Raised{};
}

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Object = std::unique_ptr<PyObject, Release>;

// Take ownership of a new reference; throw Raised if it is null.
inline Object steal_reference(PyObject* object) {
  if (!object) throw Raised{};
  return Object(object);
}

inline Object new_reference(PyObject* object) { return Object(Py_NewRef(object)); }

template <typename... T>
Object call(const Object& function, T*... arguments) {
  return steal_reference(PyObject_CallFunctionObjArgs(function.get(), arguments..., nullptr));
}

// Wrap a C++ value in a PyCapsule that owns it. name: checked when the capsule is read.
template <typename T>
Object build_capsule(std::unique_ptr<T> value, const char* name) {
  Object made = steal_reference(PyCapsule_New(value.get(), name, [](PyObject* self) {
    delete static_cast<T*>(PyCapsule_GetPointer(self, PyCapsule_GetName(self)));
  }));
  value.release();
  return made;
}

class Arguments;

// Build a T from the items of a tuple, one item a field, in order. Specialized for each struct.
template <typename T>
T read(Arguments& in);

// One argument; converts implicitly to the type that it initializes.
struct Value {
  PyObject* object;
  const char* name;

  template <typename T>
  operator T() const;

  // Adds the name to an error of the conversion.
  [[noreturn]] void fail_conversion() const {
    if (PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_OverflowError)) {
      PyObject *error, *value, *traceback;
      PyErr_Fetch(&error, &value, &traceback);
      PyErr_Format(error, "%s: %S", name, value);
      Py_XDECREF(error);
      Py_XDECREF(value);
      Py_XDECREF(traceback);
    }
    throw Raised{};
  }
};

// The arguments of a call, or the items of a tuple, one after another.
class Arguments {
 public:
  Arguments(PyObject* const* given, Py_ssize_t count) : given_(given), count_(count) {}
  explicit Arguments(PyObject* tuple) : tuple_(tuple), count_(PyTuple_Size(tuple)) {}

  Value operator()(const char* name) {
    if (at_ == count_) fail(PyExc_TypeError, "got %zd values, want more: no %s", count_, name);
    return {item(at_++), name};
  }

  Arguments tuple(const char* name) {
    const Value value = (*this)(name);
    if (!PyTuple_Check(value.object))
      fail(PyExc_TypeError, "%s: got %R, want a tuple", name, Py_TYPE(value.object));
    return Arguments(value.object);
  }

  Py_ssize_t size() const { return count_; }
  bool done() const { return at_ == count_; }

  // Raise TypeError unless all arguments were read.
  void finish() const {
    if (!done()) fail(PyExc_TypeError, "got %zd values, want %zd", count_, at_);
  }

 private:
  PyObject* item(Py_ssize_t i) const { return tuple_ ? PyTuple_GetItem(tuple_, i) : given_[i]; }

  PyObject* const* given_ = nullptr;
  PyObject* tuple_ = nullptr;
  Py_ssize_t count_, at_ = 0;
};

template <typename T>
inline constexpr bool is_vector = false;
template <typename T>
inline constexpr bool is_vector<std::vector<T>> = true;

template <typename T>
T convert(const Value& from) {
  if constexpr (std::is_same_v<T, Object>) {
    return new_reference(from.object);
  } else if constexpr (std::is_same_v<T, const char*>) {
    const char* const text = PyUnicode_AsUTF8AndSize(from.object, nullptr);
    if (!text) from.fail_conversion();
    return text;
  } else if constexpr (std::is_pointer_v<T>) {
    const unsigned long long address = PyLong_AsUnsignedLongLong(from.object);
    if (address == ~0ull && PyErr_Occurred()) from.fail_conversion();
    return reinterpret_cast<T>(static_cast<uintptr_t>(address));
  } else if constexpr (std::is_same_v<T, bool>) {
    const int is_true = PyObject_IsTrue(from.object);
    check(is_true);
    return is_true;
  } else if constexpr (std::is_floating_point_v<T>) {
    const double value = PyFloat_AsDouble(from.object);
    if (value == -1.0 && PyErr_Occurred()) from.fail_conversion();
    return static_cast<T>(value);
  } else if constexpr (std::is_same_v<T, uint64_t> || std::is_same_v<T, uintptr_t>) {
    const unsigned long long value = PyLong_AsUnsignedLongLong(from.object);
    if (value == ~0ull && PyErr_Occurred()) from.fail_conversion();
    return static_cast<T>(value);
  } else if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) {
    const long long value = PyLong_AsLongLong(from.object);
    if (value == -1 && PyErr_Occurred()) from.fail_conversion();
    const T converted = static_cast<T>(value);
    if (static_cast<long long>(converted) != value)
      fail(PyExc_OverflowError, "%s: %lld does not fit", from.name, value);
    return converted;
  } else if (from.object == Py_None) {
    return {};
  } else if (!PyTuple_Check(from.object)) {
    fail(PyExc_TypeError, "%s: got %R, want a tuple", from.name, Py_TYPE(from.object));
  } else {
    Arguments items(from.object);
    try {
      if constexpr (is_vector<T>) {
        T all;
        while (!items.done()) all.push_back(items("item"));
        return all;
      } else {
        T value = read<T>(items);
        items.finish();
        return value;
      }
    } catch (const Raised&) {
      from.fail_conversion();
    }
  }
}

template <typename T>
Value::operator T() const {
  return convert<T>(*this);
}

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Returns f's result; a C++ exception becomes Python's.
template <typename F>
PyObject* guarded(const F& f) {
  try {
    return f();
  } catch (const Raised&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "unknown C++ exception");
  }
  return nullptr;
}

// Convert one argument for each parameter of f, and call f without the GIL; f returns void or bool.
template <typename Result, typename... T>
Object run(Result (*f)(T...), Arguments& in) {
  const std::tuple<std::remove_cvref_t<T>...> arguments{
      convert<std::remove_cvref_t<T>>(in("argument"))...};
  in.finish();
  if constexpr (std::is_void_v<Result>) {
    WithoutGil released;
    std::apply(f, arguments);
    return nullptr;
  } else {
    static_assert(std::is_same_v<Result, bool>);
    bool is_true;
    {
      WithoutGil released;
      is_true = std::apply(f, arguments);
    }
    return new_reference(is_true ? Py_True : Py_False);
  }
}

inline PyObject* release_or_none(Object object) {
  return object ? object.release() : Py_NewRef(Py_None);
}

// Adapt a C++ function to METH_FASTCALL. It takes (PyObject* self, Arguments&), or (Arguments&) and
// may return null for None, or plain values, which `run` converts.
template <auto function>
PyObject* entry(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  return guarded([&] {
    Arguments in(given, count);
    if constexpr (std::is_invocable_v<decltype(function), PyObject*, Arguments&>)
      return release_or_none(function(self, in));
    else if constexpr (!std::is_invocable_v<decltype(function), Arguments&>)
      return release_or_none(run(function, in));
    else
      return release_or_none(function(in));
  });
}

template <auto function>
PyMethodDef method(const char* name, const char* doc = nullptr) {
  const auto address = reinterpret_cast<void (*)()>(entry<function>);
  return {name, reinterpret_cast<PyCFunction>(address), METH_FASTCALL, doc};
}

// Build a module's definition. methods: ended by an empty one.
inline PyModuleDef build_module_definition(const char* name, PyMethodDef* methods) {
  return {PyModuleDef_HEAD_INIT, name, nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
}

}  // namespace lora_kernels::python
