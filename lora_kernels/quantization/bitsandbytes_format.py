"""The fields of a weight of bitsandbytes."""

from __future__ import annotations

from typing import Any

from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Params4bit


def fields(weight: Any) -> dict[str, Any]:
    """Return the fields of `QuantizedWeight` from a weight of bitsandbytes, sharing its tensors.

    weight: `Params4bit` or (tensor, QuantState).

    Raises the errors of `QuantizedWeight.from_bitsandbytes`.

    >>> import bitsandbytes, torch
    >>> found = fields(bitsandbytes.functional.quantize_4bit(torch.eye(64), quant_type="nf4"))
    >>> found["quant_type"], found["blocksize"], found["shape"]
    ('nf4', 64, torch.Size([64, 64]))
    """
    if isinstance(weight, Params4bit):
        packed, state = weight.data, weight.quant_state
        if state is None:
            raise ValueError(
                "weight: got a Params4bit without a quant_state, want a quantized one: moving its "
                "module to a device quantizes it"
            )
    elif isinstance(weight, tuple) and len(weight) == 2 and isinstance(weight[1], QuantState):
        packed, state = weight
    else:
        raise TypeError(
            f"weight: got {type(weight).__name__}, want a bitsandbytes Params4bit (a Linear4bit's "
            ".weight) or a pair (tensor, QuantState)"
        )
    # bitsandbytes keeps the second attribute when it undoes the repacking, which does not restore
    # the scales.
    if getattr(state, "packing_format_for_cpu", False) or hasattr(state, "original_qshape"):
        raise ValueError(
            "weight: got one that bitsandbytes has repacked for its CPU kernel, which rounds the "
            "scales to bfloat16 for good; want it as quantized: fuse or convert the model before "
            "its first eval forward"
        )
    found = {
        "packed": packed,
        "absmax": state.absmax,
        "code": state.code,
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "shape": state.shape,
        "dtype": state.dtype,
    }
    if state.nested:
        found["nested_absmax"] = state.state2.absmax
        found["nested_code"] = state.state2.code
        found["offset"] = state.offset
        found["nested_blocksize"] = state.state2.blocksize
    return found
