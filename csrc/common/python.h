// Python's limited C API: references, errors as exceptions, and arguments that become structs. Of
// that API alone, so that one extension serves every Python from 3.10 on.
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

// A status of Python's.
inline void check(int status) {
  if (status < 0) throw Raised{};
}

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Object = std::unique_ptr<PyObject, Release>;

// The new reference that a function of Python's returned, or its error.
inline Object owned(PyObject* object) {
  if (!object) throw Raised{};
  return Object(object);
}

inline Object borrowed(PyObject* object) { return Object(Py_NewRef(object)); }

template <typename... T>
Object call(const Object& function, T*... arguments) {
  return owned(PyObject_CallFunctionObjArgs(function.get(), arguments..., nullptr));
}

// An object that owns a value of C++, under a name that tells it from others.
template <typename T>
Object capsule(std::unique_ptr<T> value, const char* name) {
  Object made = owned(PyCapsule_New(value.get(), name, [](PyObject* self) {
    delete static_cast<T*>(PyCapsule_GetPointer(self, PyCapsule_GetName(self)));
  }));
  value.release();
  return made;
}

class Arguments;

// A struct from the items of a tuple, one for each field in their order; for each struct its own.
template <typename T>
T read(Arguments& in);

// One argument, which becomes what it initializes.
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

  // Whether the argument so many after the next one is not None.
  bool has(Py_ssize_t ahead) const { return at_ + ahead < count_ && item(at_ + ahead) != Py_None; }

  Arguments tuple(const char* name) {
    const Value value = (*this)(name);
    if (!PyTuple_Check(value.object))
      fail(PyExc_TypeError, "%s: got %R, want a tuple", name, Py_TYPE(value.object));
    return Arguments(value.object);
  }

  Py_ssize_t size() const { return count_; }
  bool done() const { return at_ == count_; }

  // After the last one.
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
    return borrowed(from.object);
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

// Other Python threads run while this lives. The emulator is one thread's.
class WithoutGil {
#ifdef LORA_KERNELS_EMULATED
 public:
  WithoutGil() {}
#else
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
#endif
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
  }
  return nullptr;
}

// Calls f with one argument for each of its parameters, without Python; it returns nothing or a
// bool.
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
    bool is_true;
    {
      WithoutGil released;
      is_true = std::apply(f, arguments);
    }
    return borrowed(is_true ? Py_True : Py_False);
  }
}

inline PyObject* or_none(Object object) { return object ? object.release() : Py_NewRef(Py_None); }

// A function as Python calls it: of a capsule and Arguments; one to `run`; or of Arguments, which
// may return null for None.
template <auto function>
PyObject* entry(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  return guarded([&] {
    Arguments in(given, count);
    if constexpr (std::is_invocable_v<decltype(function), PyObject*, Arguments&>)
      return or_none(function(self, in));
    else if constexpr (!std::is_invocable_v<decltype(function), Arguments&>)
      return or_none(run(function, in));
    else
      return or_none(function(in));
  });
}

template <auto function>
PyMethodDef method(const char* name, const char* doc = nullptr) {
  const auto address = reinterpret_cast<void (*)()>(entry<function>);
  return {name, reinterpret_cast<PyCFunction>(address), METH_FASTCALL, doc};
}

// A module of such functions, ended by {}.
inline PyModuleDef module_of(const char* name, PyMethodDef* methods) {
  return {PyModuleDef_HEAD_INIT, name, nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
}

}  // namespace lora_kernels::python
