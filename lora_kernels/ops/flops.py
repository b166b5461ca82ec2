"""FLOPs of the ops for `torch.utils.flop_counter.FlopCounterMode`, which sees no GEMM inside them.

Importing the counter takes a quarter of a second, so the formulas are registered by the first op
that is dispatched once the counter has been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from ..core.call import ExpertsNeeds, MultiNeeds, Needs

_COUNTER = "torch.utils.flop_counter"
_is_registered = False
Shape = Any  # of a tensor; None for None


def register_if_counted() -> None:
    """Register the formulas if the counter has been imported, also with counters that are active.

    >>> import torch.utils.flop_counter as flop_counter
    >>> from lora_kernels import lora_linear
    >>> x, W, A, B = torch.ones(2, 8), torch.ones(6, 8), torch.ones(3, 8), torch.ones(6, 3)
    >>> with flop_counter.FlopCounterMode(display=False) as counter:
    ...     y = lora_linear(x, W, A, B)
    >>> counter.get_total_flops() == 2 * 2 * (8 * 6 + 8 * 3 + 3 * 6)
    True
    """
    global _is_registered
    counter = sys.modules.get(_COUNTER)
    if _is_registered or counter is None or not hasattr(counter, "register_flop_formula"):
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    _is_registered = True
    for name, formula in FORMULAS.items():
        packet = getattr(torch.ops.lora_kernels, name)
        counter.register_flop_formula(packet)(formula)
        for mode in _get_current_dispatch_mode_stack():
            # A counter has copied the registry before.
            active = getattr(mode, "counter", mode)
            if isinstance(active, counter.FlopCounterMode):
                active.flop_registry[packet] = counter.flop_registry[packet]


def _flops(M: int, K: int, N: int, R: int, base: bool) -> int:
    """Return the FLOPs of y = x·Wᵀ + (x·Aᵀ)·Bᵀ, or without the base GEMM."""
    return 2 * M * (R * (K + N) + (K * N if base else 0))


def _rows(x: Shape) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return rows


def _backward_flops(M: int, K: int, N: int, R: int, base: bool, needs: tuple[bool, ...]) -> int:
    """Return the FLOPs of dS = dZ·B, dx = dZ·W + dS·A, dA = dSᵀ·x and dB = dZᵀ·S.

    needs: of x, A, B and the gate.
    """
    need_x, need_A, need_B, need_gate = needs
    flops = 2 * M * N * R if need_x or need_A or need_gate else 0
    if need_x:
        flops += 2 * M * K * (R + (N if base else 0))
    return flops + 2 * M * R * (K * need_A + N * need_B)


# The arguments are those of the schemas, with shapes in place of tensors.
# The fields of a 4-bit weight stand in place of a dense one.


def _linear(x: Shape, weight: Shape, A: Shape, B: Shape, *_: Any, **__: Any) -> int:
    return _flops(_rows(x), A[1], B[0], A[0], weight is not None)


def _linear_backward(*args: Any, **__: Any) -> int:
    x, weight, A, B, *others = args[3:]  # after dy and what the forward saved
    needs = Needs(*others[-len(Needs._fields) :])
    return _backward_flops(_rows(x), A[1], B[0], A[0], weight is not None, needs[:4])


def _multi(x: Shape, weight: Shape, As: Shape, Bs: Shape, *_: Any, **__: Any) -> int:
    # Which rows have which adapter is not in the shapes: an upper bound.
    R = max(A[0] for A in As)
    return _flops(_rows(x), x[-1], Bs[0][0], R, weight is not None)


def _multi_backward(*args: Any, **__: Any) -> int:
    x, weight, As, Bs, *others = args[2:]  # after dy and what the forward saved
    need = MultiNeeds(*others[-len(MultiNeeds._fields) :])
    needs, R = (need.x, any(need.lora_A), any(need.lora_B), False), max(A[0] for A in As)
    return _backward_flops(_rows(x), x[-1], Bs[0][0], R, weight is not None, needs)


def _experts(x: Shape, weight: Shape, As: Shape, Bs: Shape, *_: Any, **__: Any) -> int:
    # Of the low-rank update: W + s·B·A is computed only where that takes fewer. Which rows have
    # which tenant is not in the shapes: an upper bound.
    return _flops(x[0], x[1], Bs[0][1], max(A[1] for A in As), weight is not None)


def _experts_backward(*args: Any, **__: Any) -> int:
    x, weight, As, Bs, *others = args[2:]  # after dy and what the forward saved
    need = ExpertsNeeds(*others[-len(ExpertsNeeds._fields) :])
    needs, R = (need.x, any(need.lora_A), any(need.lora_B), False), max(A[1] for A in As)
    return _backward_flops(x[0], x[1], Bs[0][1], R, weight is not None, needs)


def _head_backward(x: Shape, A: Shape, B: Shape, needs: tuple[bool, ...]) -> int:
    """Return the FLOPs of the gradients, without the logits."""
    need_x, need_weight, need_A, need_B, _ = needs
    flops = _backward_flops(x[0], A[1], B[0], A[0], True, (need_x, need_A, need_B, False))
    return flops + (2 * x[0] * A[1] * B[0] if need_weight else 0)


def _cross_entropy(x: Shape, weight: Shape, A: Shape, B: Shape, *others: Any, **__: Any) -> int:
    return _linear(x, weight, A, B) + _head_backward(x, A, B, others[-5:])


def _log_probs_backward(*args: Any, **__: Any) -> int:
    x, weight, A, B, *others = args[5:]  # after the gradients and what the forward saved
    return _linear(x, weight, A, B) + _head_backward(x, A, B, tuple(others[-5:]))


def _dora_norm(weight: Shape, A: Shape, B: Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of ‖W + BgA‖ by W·Aᵀ, A·Aᵀ and B·(A·Aᵀ)."""
    R: int = A[0]
    K: int = A[1]
    N: int = B[0]
    return 2 * R * (N * K + R * K + N * R)


_DENSE: dict[str, tuple[Callable[..., int], int]] = {  # and the weight's place
    "lora_linear": (_linear, 1),
    "lora_linear_backward": (_linear_backward, 4),
    "multi_lora_linear": (_multi, 1),
    "multi_lora_linear_backward": (_multi_backward, 3),
    "lora_experts": (_experts, 1),
    "lora_experts_backward": (_experts_backward, 3),
    "lora_cross_entropy": (_cross_entropy, 1),
    "lora_log_probs": (_linear, 1),
    "lora_log_probs_backward": (_log_probs_backward, 6),
    "dora_norm": (_dora_norm, 0),
}


def _of_codes(formula: Callable[..., int], place: int) -> Callable[..., int]:
    """Return the formula for a weight that is passed as the nine fields of `Codes`."""

    def count(*args: Any, **kwargs: Any) -> int:
        return formula(*args[: place + 1], *args[place + 9 :], **kwargs)

    return count


FORMULAS: dict[str, Callable[..., int]] = {name: run for name, (run, _) in _DENSE.items()}
FORMULAS |= {f"{name}_quantized": _of_codes(*entry) for name, entry in _DENSE.items()}
