"""The device that the kernels run on: a GPU or, in Triton's interpreter, the CPU."""

from lora_kernels.oracle.case import triton_device

DEVICE = triton_device()
