"""Checks of the public functions' arguments, each error naming the argument, and their dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..choice import choose as selection
from ..quantization import QuantizedWeight
from . import context

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE_MASKS = (
    "where the eager backend draws masks with PyTorch's dropout kernel (torch.manual_seed repeats "
    "them); want a CPU's"
)


def base_dtype(
    device_type: str, x_dtype: torch.dtype, compute_dtype: torch.dtype | None = None
) -> torch.dtype:
    """Return the base GEMM's dtype: autocast's if enabled, else the requested dtype, else x's.

    >>> import torch
    >>> base_dtype("cpu", torch.float32)
    torch.float32
    """
    return context.autocast_dtype(device_type, x_dtype) or compute_dtype or x_dtype


def has_strides(t: Tensor) -> bool:
    return t.layout is torch.strided and not t.is_nested


def check_tensor(name: str, got: object, want: str = "a tensor") -> None:
    """Raise TypeError unless `got` is a tensor whose elements have an address and strides."""
    if not isinstance(got, Tensor):
        raise TypeError(f"{name}: got {type(got).__name__}, want {want}")
    if not has_strides(got):
        kind = "a nested tensor" if got.is_nested else got.layout
        raise TypeError(f"{name}: got {kind}, want a dense tensor (torch.strided)")


def check_integers(name: str, got: Tensor) -> None:
    check_tensor(name, got, want := "a tensor of int64 or int32")
    if got.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got {got.dtype}, want {want}")


def check_number(name: str, got: float) -> float:
    if type(got) is float:
        return got
    if isinstance(got, bool) or not isinstance(got, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: got {got!r}, want a number")
    return float(got)


def check_scaling(got: float | Sequence[float] | Tensor, count: int) -> tuple[float, ...]:
    """Return so many factors, from a number for all of them, or from as many."""
    values: Any = got
    if isinstance(values, Tensor) and values.dim() == 1:
        values = values.tolist()
    if isinstance(values, Sequence) and not isinstance(values, str):
        factors = tuple(check_number("scaling", factor) for factor in values)
    else:
        factors = (check_number("scaling", values),) * count
    if len(factors) != count:
        raise ValueError(f"scaling: got {len(factors)} numbers, want one, or {count}")
    return factors


def check_finite(name: str, got: float) -> float:
    got = check_number(name, got)
    if not math.isfinite(got):
        raise ValueError(f"{name}: got {got}, want a finite number")
    return got


def check_probability(name: str, got: float) -> float:
    value = check_number(name, got)
    if not 0.0 <= value <= 1.0:  # NaN fails this too
        raise ValueError(f"{name}: got {got}, want a probability in [0, 1]")
    return value


def matrix_shape(name: str, t: Tensor, want: str) -> tuple[int, int]:
    check_tensor(name, t)
    shape = t.shape  # a new object each time
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name}: got shape {list(t.shape)}, want {want}, each at least 1")
    rows, columns = shape
    return rows, columns


def check_dtypes(other: str, x_dtype: torch.dtype, **dtypes: torch.dtype) -> None:
    for name, got in dtypes.items():
        if got not in FLOATS:
            raise TypeError(f"{name}: got {got}, want float32, bfloat16, float16 or float64")
        if (got is torch.float64) != (x_dtype is torch.float64):
            raise TypeError(
                f"{name}: got {got} beside {other} in {x_dtype}; float64 goes with float64 alone"
            )


def check_weight(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    shape: tuple[int, ...],
    compute_dtype: torch.dtype | None,
    cast_dtype: torch.dtype | None,
) -> tuple[Tensor | None, tuple[Any, ...], torch.dtype]:
    """Check the weight; return it dense or as codes, and the dtype of the base GEMM.

    cast_dtype: as `context.autocast_dtype` returns it.
    """
    if isinstance(weight, QuantizedWeight):
        dtype = cast_dtype or compute_dtype or x.dtype
        _check_4bit(x, weight, shape, dtype)
        return None, tuple(weight.codes), dtype  # some Dynamos slice no NamedTuple
    if compute_dtype is not None:
        raise ValueError(f"compute_dtype: got {compute_dtype}, want None beside a dense weight")
    if weight is not None:
        check_tensor("weight", weight, "a tensor or a QuantizedWeight")
        if weight.dtype is not x.dtype or not (weight.is_cpu and x.is_cpu) or weight.requires_grad:
            _check_dense(x, weight)
        if weight.shape != shape:
            raise ValueError(
                f"weight: got shape {list(weight.shape)}, want {list(shape)} for lora_A and lora_B"
            )
    return weight, (), cast_dtype or x.dtype


def _check_dense(x: Tensor, weight: Tensor) -> None:
    check_dtypes("x", x.dtype, weight=weight.dtype)
    if (
        weight.dtype is not x.dtype
        and context.autocast_dtype(context.device_of(x)[0], x.dtype) is None
    ):
        raise TypeError(
            f"weight: got {weight.dtype}, want x's {x.dtype} (or autocast, which casts both)"
        )
    check_devices("x", x, weight=weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight: got requires_grad=True, want a frozen weight: its gradient is not computed "
            "here. Call weight.requires_grad_(False), or keep the layer unfused"
        )


def _check_4bit(
    x: Tensor, weight: QuantizedWeight, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if weight.shape != shape:
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, want {list(shape)} for lora_A and lora_B"
        )
    check_devices("x", x, weight=weight.packed)
    if x.dtype is torch.float64 or dtype not in FLOATS[:3]:
        name, got = ("x", x.dtype) if x.dtype is torch.float64 else ("compute_dtype", dtype)
        raise TypeError(
            f"{name}: got {got}, want float32, bfloat16 or float16 beside a 4-bit weight"
        )


def check_x_and_weight(x: Tensor, weight: Tensor | QuantizedWeight) -> None:
    """Check the types of x and the weight, and x's dtype."""
    check_tensor("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x: got {x.dtype}, want float32, bfloat16, float16 or float64")
    if not isinstance(weight, QuantizedWeight):
        check_tensor("weight", weight, "a tensor or a QuantizedWeight")


def check_both_or_none(lora_A: object, lora_B: object) -> None:
    if (lora_A is None) != (lora_B is None):
        name, got = ("lora_B", lora_B) if lora_A is not None else ("lora_A", lora_A)
        raise TypeError(f"{name}: got {got}, want a tensor, or None for both lora_A and lora_B")


def check_devices(other: str, x: Tensor, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, want {other}'s device {x.device}")


def check_vector(name: str, t: Tensor, size: int, x: Tensor, other: str = "x") -> None:
    check_tensor(name, t)
    if t.dim() != 1 or t.shape[0] != size:
        raise ValueError(f"{name}: got shape {list(t.shape)}, want [{size}]")
    if t.dtype not in FLOATS or (t.dtype is torch.float64) != (x.dtype is torch.float64):
        raise TypeError(
            f"{name}: got {t.dtype}, want a floating dtype that goes with {other}'s {x.dtype}"
        )
    check_devices(other, x, **{name: t})


def check_rng_state(rng: Tensor) -> None:
    """Raise TypeError or ValueError unless rng is the state of a dropout mask."""
    check_tensor("rng", rng)
    if rng.dtype is not torch.int64 or rng.shape != (2,):
        hint = "; the argument of a mask is dropout_mask" * (rng.dtype is torch.bool)
        raise ValueError(
            f"rng: got {rng.dtype} {list(rng.shape)}, want int64 [2]: seed and offset{hint}"
        )


def _check_rng(rng: Tensor, x: Tensor) -> None:
    check_rng_state(rng)
    check_devices("x", x, rng=rng)
    if selection.is_eager_on_gpu(context.device_of(x)[0]) and not x.is_meta:
        raise ValueError(f"rng: got the state of a mask on {rng.device}, {NATIVE_MASKS}")


def _check_mask(mask: Tensor, x: Tensor) -> None:
    check_tensor("dropout_mask", mask)
    check_devices("x", x, dropout_mask=mask)
    if mask.dtype is not torch.bool or mask.shape != x.shape:
        raise ValueError(
            f"dropout_mask: got {mask.dtype} {list(mask.shape)}, want torch.bool {list(x.shape)}, "
            "x's shape"
        )


def check_dropout(
    x: Tensor, dropout_p: float, rng: Tensor | None, mask: Tensor | None
) -> tuple[float, Tensor | None, Tensor | None]:
    """Return the checked probability, the state of the mask, and the mask.

    Both are None if dropout_p is 0 or if the op draws the mask. A state is drawn without gradients
    too, because checkpointing must replay the mask.
    """
    dropout_p = check_probability("dropout_p", dropout_p)
    if not dropout_p:
        return 0.0, None, None
    if rng is not None and mask is not None:
        raise ValueError("dropout_mask: got a mask beside rng, the state of one; want one of them")
    if mask is not None:
        _check_mask(mask, x)
        return dropout_p, None, mask
    if rng is not None:
        _check_rng(rng, x)
        return dropout_p, rng.contiguous(), None  # kernels read it by its address
    if not selection.is_eager_on_gpu(context.device_of(x)[0]):
        return dropout_p, draw_rng(x), None
    if copies_rows(x) and not torch.compiler.is_compiling():
        mask = torch.native_dropout(x.detach(), dropout_p, True)[1]
    return dropout_p, None, mask


def copies_rows(x: Tensor) -> bool:
    """Return True if x as rows may be a copy, in which PyTorch's dropout draws another mask.

    Its kernel draws in the order of the elements in memory.
    """
    return x.dim() > 2 and not x.is_contiguous()


def draw_rng(x: Tensor) -> Tensor:
    """Draw the state of a dropout mask from the default generator of x's device."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
