// Functions shared by bindings.cpp and direct.cpp.
#pragma once
#include "common/python.h"
#include "cpu/layer.h"

namespace lora_kernels {

namespace python {
template <>
Layer read(Arguments& in);  // what `_pack_layer` in lora_kernels/backends/cpu/linear.py returns
}  // namespace python

inline int log2_of(int64_t power) {
  int n = 0;
  while (int64_t{1} << n < power) ++n;
  return n;
}

// direct.cpp --------------------------------------------------------------------------------------

python::Object direct_forward(python::Arguments& in);
python::Object direct_backward(python::Arguments& in);
python::Object set_up(python::Arguments& in);
python::Object strategy_on(python::Arguments& in);
python::Object has_fused_dx(python::Arguments& in);
python::Object use_exchange(python::Arguments& in);
void set_rules();  // of the instruction set in use

}  // namespace lora_kernels
