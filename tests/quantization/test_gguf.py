"""GGUF's blocks as forms: the bits of gguf's own decoding, and their memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
import gguf

from lora_kernels.quantization.readers.gguf import BLOCKS, read
from tests.support.assertions import assert_bytes
from tests.support.gguf_files import random_blocks

# Bytes of a large weight over the file's: codes of 5 and 6 bits are kept in 8, of 2 and 3 in 4.
MOST = {kind: 1.1 for kind in BLOCKS} | dict.fromkeys(("Q5_0", "Q5_1", "Q5_K", "Q6_K"), 1.61)
MOST |= {"Q2_K": 2.02, "Q3_K": 1.36}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("is_noise", [False, True], ids=["near 1", "noise"])
def test_decoded_weight_has_the_bits_of_gguf(kind: str, is_noise: bool) -> None:
    """Of scales near 1, and of all bytes random, infinite scales among them."""
    rng = np.random.default_rng(7)
    rows = random_blocks(kind, 96, 1024, 1.0, rng)
    if is_noise:
        rows = rng.integers(0, 256, rows.shape, dtype=np.uint8)
    with np.errstate(all="ignore"):
        want = torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[kind]))
    weight = read(torch.from_numpy(rows), kind, torch.float32)
    got = weight.dequantize()
    # Not the bits of NaN, and zeros of either sign.
    assert_bytes({"w": got.nan_to_num() + 0.0}, {"w": want.nan_to_num() + 0.0})
    assert torch.equal(got.isnan(), want.isnan())
    assert weight.nbytes <= MOST[kind] * rows.nbytes + 3000  # the tables


def test_dtype_is_of_the_decoded_weight() -> None:
    rows = torch.from_numpy(random_blocks("Q4_K", 8, 256, 1.0, np.random.default_rng(0)))
    exact, rounded = (read(rows, "Q4_K", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(rounded.dequantize(), exact.dequantize().bfloat16())
