"""Tests that need a GPU; none is collected without one, and test_cuda.py alone without Triton."""

import torch

from lora_kernels.backends import triton

if triton.is_interpreted() or not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
elif triton.unavailable_reason() is not None:
    collect_ignore_glob = ["test_[!c]*.py"]
