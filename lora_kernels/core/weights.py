"""The weights of a model: their bytes, and copies of a model that share them."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter


def share(model: nn.Module, frozen: bool = False) -> Any:
    """Copy the modules and trainable parameters of a model, and share its frozen weights.

    frozen: whether to share the trainable parameters too, frozen in the copy.
    """
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(t): t for t in tensors if not t.requires_grad}
    if frozen:
        memo |= {id(p): Parameter(p.detach(), False) for p in tensors if p.requires_grad}
    return copy.deepcopy(model, memo)


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and 4-bit scales; shared tensors count once."""
    tensors = (t for t in model.state_dict().values() if isinstance(t, Tensor))
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())
