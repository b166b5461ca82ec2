"""`dropout_mask`, the mask that an op applies for a state."""

from __future__ import annotations

from torch import Tensor

from ..choice import choose as selection
from ..core import dropout
from .arguments import NATIVE_MASKS, check_probability, check_rng_state


def dropout_mask(rng: Tensor, M: int, K: int, p: float) -> Tensor:
    """Return the dropout mask of a state, bool [M, K], True for kept elements.

    The CPU's kernels apply it, independent of tiles and threads. Its words are those of
    Philox4x32-10 with key = seed and counter = (k >> 2, m, offset_lo, offset_hi). Element (m, k)
    has word k & 3, and is kept if word >= round(p·2³²).

    Args:
        rng: int64[2], seed and offset.
        p: probability in [0, 1] of dropping an element.

    Raises ValueError or TypeError for another rng or p. Raises RuntimeError on a GPU that runs the
    eager backend, because PyTorch's dropout kernel draws its masks.

    >>> import torch
    >>> from lora_kernels import dropout_mask
    >>> mask = dropout_mask(torch.tensor([1, 2]), 64, 64, p=0.25)
    >>> mask.shape, 0.7 < mask.double().mean().item() < 0.8
    (torch.Size([64, 64]), True)
    """
    p = check_probability("p", p)
    check_rng_state(rng)
    device_type = rng.device.type
    if selection.is_eager_on_gpu(device_type):
        raise RuntimeError(f"dropout_mask: rng is on {rng.device}, {NATIVE_MASKS}")
    return dropout.dropout_mask(rng, M, K, p)
