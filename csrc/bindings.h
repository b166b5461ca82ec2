// What bindings.cpp and fastpath.cpp read and define for each other.
#pragma once
#include "common/python.h"
#include "cpu/layer.h"

namespace lora_kernels {

namespace python {
template <>
Layer read(Arguments& in);  // what `_pack_layer` in lora_kernels/backends/cpu/linear.py returns
}  // namespace python

// fastpath.cpp -----------------------------------------------------------------------------------

// few, x's dtype, the base GEMM's, functions of a tensor, guards of x, and a layer of any M and
// threads -> the layer's forward as a function of x, bias and guards.
python::Object prepare(python::Arguments& in);
// Whether this class of tensors, None for none, has DLPack's table of functions; they are used.
python::Object use_exchange(python::Arguments& in);
// A tensor -> bytes that compare equal while address, dtype, shape and strides are the same.
python::Object where(python::Arguments& in);
// Whether all guards hold and each of `empty` is empty.
python::Object unchanged(python::Arguments& in);

}  // namespace lora_kernels
