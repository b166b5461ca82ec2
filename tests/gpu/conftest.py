"""What needs a GPU that the Triton kernels run on; elsewhere nothing here is collected."""

import torch

from lora_kernels.backends import triton

if triton.absence() is not None or triton.interpreted() or not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
