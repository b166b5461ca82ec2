"""Quantizing and decoding by Triton's kernels."""

from tests.support.codec import *  # noqa: F403
