"""PyTorch's kernels in an order that moves few bytes: every op, on every device."""
