"""The kernels of csrc/cpu."""
