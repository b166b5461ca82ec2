"""Quantizing and decoding by the CUDA kernels."""

from tests.support.codec import *  # noqa: F403
