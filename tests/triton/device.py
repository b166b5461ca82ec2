"""Where the kernels run: a GPU or, in Triton's interpreter, the CPU."""

from lora_kernels.backends import triton

DEVICE = "cpu" if triton.interpreted() else "cuda"
