"""The version of the package and of its compiled kernels."""

__version__ = "0.1.0"
