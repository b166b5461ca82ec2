"""The cache of DoRA's norm on a CPU. Each call compares the norm's operands."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.cpu import native
from ..choice import choose as selection
from ..ops import context
from ..ops.norm import dora_norm
from ..quantization import QuantizedWeight


class DoraNormCache:
    """`dora_norm`, cached on a CPU without gradients until an operand changes.

    Every call compares the operands, because version counters miss writes. Fused optimizers,
    bitsandbytes, ZeRO, FSDP2 and `.data` change values without moving the counter. lora_A, lora_B
    and rank_gate are compared with copies, the base by `fingerprint`. On a GPU a comparison would
    synchronize the device, so nothing is cached there. The cache is empty in a copy or pickle of
    the layer.
    """

    def __init__(self) -> None:
        self._entry: tuple[tuple[object, ...], tuple[Tensor, ...], Tensor] | None = None

    def __call__(
        self,
        weight: Tensor | QuantizedWeight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        rank_gate: Tensor | None = None,
    ) -> Tensor:
        """Return the cached norm if no operand has changed, else compute `dora_norm`."""
        adapter = (lora_A, lora_B, *(() if rank_gate is None else (rank_gate,)))
        base = _fingerprints(weight, adapter)
        if base is None:
            self._entry = None
            return dora_norm(weight, lora_A, lora_B, scaling, rank_gate=rank_gate)
        key = (scaling, selection.forced_backend(), base, *(t.dtype for t in adapter))
        entry = self._entry
        if entry is None or entry[0] != key or not all(map(torch.equal, entry[1], adapter)):
            norm = dora_norm(weight, lora_A, lora_B, scaling, rank_gate=rank_gate)
            self._entry = entry = key, tuple(t.detach().clone() for t in adapter), norm
        return entry[2]

    def __reduce__(self) -> tuple[type[DoraNormCache], tuple[()]]:
        return DoraNormCache, ()


def _fingerprints(
    weight: Tensor | QuantizedWeight, adapter: tuple[Tensor, ...]
) -> tuple[object, ...] | None:
    """Return the fingerprints of the base's tensors; None if the norm must not be cached."""
    if (
        torch.is_grad_enabled()  # in training the adapter changes in every step
        or native.module is None
        or not adapter[0].is_cpu
        or selection.is_eager_on_gpu("cpu")
    ):
        return None
    base = (weight,) if isinstance(weight, Tensor) else tuple(weight._tensors().values())
    if not context.can_bypass_dispatcher(*base, *adapter):
        return None
    fingerprints = tuple(map(fingerprint, base))
    return None if None in fingerprints else fingerprints


def fingerprint(t: Tensor) -> tuple[object, ...] | None:
    """Return a value that changes if an element or the layout of `t`, on a CPU, changes.

    The elements are hashed to 64 bits by their position in memory, in one read. Returns None unless
    a matrix is contiguous, or its transpose.
    """
    if not (t.is_contiguous() or (t.dim() == 2 and t.t().is_contiguous())):
        return None
    assert native.module is not None
    elements = native.module.fingerprint(t.data_ptr(), t.nbytes, torch.get_num_threads())
    return t.shape, t.stride(), t.dtype, elements
