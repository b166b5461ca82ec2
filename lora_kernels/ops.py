"""The registered ops: schema, fake (shape) implementation and hand-over to a backend.

All ops are functional and take x with any leading dimensions; backends see them flattened to M
rows, but for `lora_linear` on the CPU, which takes them as they are. The choice of a backend is
made in here, so a compiler never sees which one it named.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports Dynamo at once
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import select
from .backends import cpu, cuda, eager, triton
from .backends.cuda import fit
from .backends.cuda.fit import Layout
from .backends.rows import like_rows_of
from .quantization.codes import Codes

_LIB = torch.library.Library("lora_kernels", "DEF")
_BACKENDS: dict[str, Any] = {"eager": eager, "cpu": cpu, "triton": triton, "cuda": cuda}

# A weight is one tensor, or the fields of `Codes`.
_WEIGHTS = {
    "": "Tensor? weight",
    "_4bit": "Tensor packed, Tensor absmax, Tensor code, Tensor? nested_absmax, "
    "Tensor? nested_code, Tensor? offset, int blocksize, int nested_blocksize, str quant_type",
}
_SCHEMAS = {
    "lora_linear": "(Tensor x, {weight}, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor? rank_gate, Tensor? column_scale, Tensor? bias, float dropout_p, Tensor? rng, "
    "ScalarType dtype, ScalarType y_dtype, bool save_z) "
    "-> (Tensor y, Tensor p, Tensor z, Tensor mask)",
    "lora_linear_backward": "(Tensor dy, Tensor x, {weight}, Tensor lora_A, Tensor lora_B, "
    "Tensor p, Tensor? z, float scaling, Tensor? rank_gate, Tensor? column_scale, "
    "float dropout_p, Tensor? rng, ScalarType dtype, bool need_x, bool need_A, bool need_B, "
    "bool need_gate, bool need_column_scale, bool need_bias) "
    "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dg, Tensor dc, Tensor dbias)",
    "multi_lora_linear": "(Tensor x, {weight}, Tensor[] lora_A, Tensor[] lora_B, Tensor index, "
    "float[] scaling, Tensor? bias, float dropout_p, Tensor? rng, ScalarType dtype, "
    "ScalarType y_dtype) -> (Tensor y, Tensor p, Tensor mask)",
    "multi_lora_linear_backward": "(Tensor dy, Tensor x, {weight}, Tensor[] lora_A, "
    "Tensor[] lora_B, Tensor index, Tensor p, float[] scaling, float dropout_p, Tensor? rng, "
    "ScalarType dtype, bool need_x, bool[] need_A, bool[] need_B, bool need_bias) "
    "-> (Tensor dx, Tensor[] dA, Tensor[] dB, Tensor dbias)",
    "dora_norm": "({weight}, Tensor lora_A, Tensor lora_B, float scaling, Tensor? rank_gate, "
    "Tensor? row_squares=None) -> Tensor",
}


_NOTHING = contextlib.nullcontext()


def device_of(t: Tensor) -> tuple[str, int | None]:
    """The type of its device, and a GPU's index. With caches that a product has swept, to ask a
    device for its name takes as long as a small kernel."""
    if t.is_cpu:
        return "cpu", None
    return t.device.type, t.device.index


def autocast(device_type: str) -> bool:
    """Whether it is on there. On a CPU none is as a rule, which no name has to be read for; of MPS
    and others the short question knows nothing."""
    if device_type == "cpu" and not torch._C._is_any_autocast_enabled():
        return False
    return torch.is_autocast_enabled(device_type)


def _no_autocast(t: Tensor) -> contextlib.AbstractContextManager[None]:
    """Autocast off inside an op: its dtypes are its arguments' business."""
    device_type, _ = device_of(t)
    if not autocast(device_type):
        return _NOTHING
    return torch.autocast(device_type, enabled=False)


def layout(device_type: str, weight: Tensor | Codes | None, dtype: torch.dtype) -> Layout | None:
    """What `select` is told of a weight in a product in `dtype`; None where no backend minds."""
    if device_type != "cpu" or cuda.emulated():
        return fit.layout(weight, dtype)
    if not isinstance(weight, Tensor) or weight.stride(1) == 1 or weight.stride(0) != 1:
        return None
    return _COLUMNS


_COLUMNS = fit.Layout(columns=True)


def choose(
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dtype: torch.dtype,
    rng: Tensor | None,
    dropout_p: float = 0.0,
) -> select.Choice:
    """What computes both directions of a layer."""
    if _takes_mask(rng, dropout_p):
        return select.choose_for_mask()
    (device_type, index), (R, K), (N, _) = device_of(x), lora_A.shape, lora_B.shape
    return select.lora_linear(
        device_type, x.dtype, lora_A.dtype, lora_B.dtype, dtype, R, x.numel() // K,
        isinstance(weight, Codes), N, K, rng is not None, index,
        layout(device_type, weight, dtype),
    )  # fmt: skip


def _takes_mask(rng: Tensor | None, dropout_p: float) -> bool:
    """Return True if the op gets its dropout mask or draws one; False for the state of a mask."""
    return dropout_p > 0 if rng is None else rng.dtype is torch.bool


def _rows(rng: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a mask of x's shape as rows [M, K], and the state of a mask unchanged."""
    if rng is None or rng.dtype is torch.int64:
        return rng
    return rng.reshape(-1, x.shape[-1])


def lora_linear_direct(
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    y_dtype: torch.dtype,
    save_z: bool,
    choice: select.Choice | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, P, z or None, and the mask that was drawn or None."""
    choice = choice or choose(x, weight, lora_A, lora_B, dtype, rng, dropout_p)
    rest = (
        weight, lora_A, lora_B, scaling, rank_gate, column_scale, bias, dropout_p, rng, dtype,
        y_dtype, save_z, choice.strategy,
    )  # fmt: skip
    with _no_autocast(x):
        if choice.backend == "cpu":
            return *cpu.lora_linear(x, *rest), None
        y, p, z, *mask = _BACKENDS[choice.backend].lora_linear(
            x.reshape(-1, x.shape[-1]), *rest[:8], _rows(rng, x), *rest[9:]
        )
    return like_rows_of(x, y), p, z, mask[0] if mask else None


def _lora_linear_fake(
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    y_dtype: torch.dtype,
    save_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, (N, R) = x.numel() // x.shape[-1], lora_B.shape
    y = x.new_empty(*x.shape[:-1], N, dtype=y_dtype)
    p = x.new_empty(M, R, dtype=eager.stat_dtype(dtype))
    z = x.new_empty((M, N) if save_z else (0,), dtype=y_dtype)
    return y, p, z, _mask_fake(x, dropout_p, rng)


def _mask_fake(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor:
    shape = (x.numel() // x.shape[-1], x.shape[-1]) if dropout_p and rng is None else (0,)
    return x.new_empty(shape, dtype=torch.bool)


def rank_product(
    x: Tensor, lora_A: Tensor, dropout_p: float, rng: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """P = D(x)·Aᵀ [M, R]: `lora_linear`'s, of a layer with one column and no base. The same bits as
    with a base on the CPU; Triton's strategies, one of which is chosen for that layer, add in
    other orders."""
    call = lora_linear_direct if plain(x, lora_A) else lora_linear
    column = lora_A.new_zeros(1, lora_A.shape[0])
    p: Tensor = call(
        x, None, lora_A, column, 1.0, None, None, None, dropout_p, rng, dtype, x.dtype, False
    )[1]
    return p


Prepared = cpu.Prepared  # of the one backend that has such a thing
Fact = cpu.Fact
_NO_STEP = (0, sys.maxsize, 0)  # whatever the rows


def prepare(
    x_dtype: torch.dtype,
    weight: Tensor | Codes,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    rows: int,
    facts: Sequence[Fact],
) -> Prepared | None:
    """`lora_linear_direct` for up to `rows` rows of x, no more than `select.few_rows`, y in x's
    dtype, with its pointers and sizes bound, where the backend chosen for them has such a thing.

    facts: see `cpu.Prepared`."""
    four_bit = isinstance(weight, Codes)
    choice = select.lora_linear(
        lora_A.device.type, x_dtype, lora_A.dtype, lora_B.dtype, dtype, lora_A.shape[0], 1,
        four_bit, layout=layout("cpu", weight, dtype),
    )  # fmt: skip
    if choice.backend != "cpu" or choice.strategy not in cpu.OF_FEW_ROWS:
        return None
    return Prepared(weight, lora_A, lora_B, scaling, x_dtype, dtype, (rows, *_NO_STEP), facts)


def prepare_step(
    weight: Tensor | Codes,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    few: int,
    facts: Sequence[Fact],
    dropout_p: float,
) -> tuple[Prepared, tuple[select.Choice, select.Choice]] | None:
    """`lora_linear_direct` and its backward likewise, for x in `dtype`, where the backend has such
    a thing for more rows than `few`, which are `select.few_rows`; and the choices for those and for
    more."""
    if select.strategy_asked():  # which may be for this many rows alone
        return None
    (R, K), (N, _), four_bit = lora_A.shape, lora_B.shape, isinstance(weight, Codes)
    large = range(0) if four_bit else select.large_products(dtype, N * K)
    many = few + 1 if few + 1 not in large else large.stop
    few_choice, choice = (
        select.lora_linear(
            "cpu", dtype, lora_A.dtype, lora_B.dtype, dtype, R, rows, four_bit, N, K,
            dropout_p > 0, None, layout("cpu", weight, dtype),
        )
        for rows in (few, many)
    )  # fmt: skip
    if choice.backend != "cpu" or not cpu.trains(choice.strategy):
        return None
    rows = (few, large.start, large.stop, 1 if four_bit else 2)  # of one, dx is the library's
    return (
        Prepared(weight, lora_A, lora_B, scaling, dtype, dtype, rows, facts, dropout_p),
        (few_choice, choice),
    )


def lora_linear_backward_direct(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Tensor,
    lora_B: Tensor,
    p: Tensor,
    z: Tensor | None,
    scaling: float,
    rank_gate: Tensor | None,
    column_scale: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_gate: bool,
    need_column_scale: bool,
    need_bias: bool,
    choice: select.Choice | None = None,
) -> tuple[Tensor | None, ...]:
    choice = choice or choose(x, weight, lora_A, lora_B, dtype, rng, dropout_p)
    x2, dy2 = x, dy
    if not (choice.backend == "cpu" or x.dim() == 2):
        x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    with _no_autocast(x):
        dx, *rest = _BACKENDS[choice.backend].lora_linear_backward(
            dy2, x2, weight, lora_A, lora_B, p, z, scaling, rank_gate, column_scale, dropout_p,
            _rows(rng, x), dtype, need_x, need_A, need_B, need_gate, need_column_scale, need_bias,
            choice.strategy,
        )  # fmt: skip
    return (dx if dx is None or dx.dim() == x.dim() else dx.view(x.shape)), *rest


def _lora_linear_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Tensor,
    lora_B: Tensor,
    p: Tensor,
    z: Tensor | None,
    scaling: float,
    rank_gate: Tensor | None,
    column_scale: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_gate: bool,
    need_column_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (N, R), stat = lora_B.shape, p.dtype

    def like(need: bool, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return x.new_empty(shape if need else (0,), dtype=dtype)

    return (
        like(need_x, tuple(x.shape), x.dtype),
        like(need_A, tuple(lora_A.shape), lora_A.dtype),
        like(need_B, tuple(lora_B.shape), lora_B.dtype),
        like(need_gate, (R,), stat),
        like(need_column_scale, (N,), stat),
        like(need_bias, (N,), stat),
    )


def choose_multi(
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    dtype: torch.dtype,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> select.Choice:
    if _takes_mask(rng, dropout_p):
        return select.choose_for_mask()
    (device_type, device_index), K = device_of(x), x.shape[-1]
    return select.multi_lora_linear(
        device_type, x.dtype, lora_A[0].dtype, lora_B[0].dtype, dtype,
        max(A.shape[0] for A in lora_A), x.numel() // K, isinstance(weight, Codes),
        lora_B[0].shape[0], K, device_index, layout(device_type, weight, dtype),
    )  # fmt: skip


def multi_lora_linear_direct(
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    index: Tensor,
    scaling: Sequence[float],
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    y_dtype: torch.dtype,
    choice: select.Choice | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, P, and the mask that was drawn or None."""
    x2 = x.reshape(-1, x.shape[-1])
    choice = choice or choose_multi(x, weight, lora_A, lora_B, dtype, rng, dropout_p)
    with _no_autocast(x):
        y, p, *mask = _BACKENDS[choice.backend].multi_lora_linear(
            x2, weight, lora_A, lora_B, index.reshape(-1), scaling, bias, dropout_p, _rows(rng, x),
            dtype, y_dtype, choice.strategy,
        )  # fmt: skip
    return like_rows_of(x, y), p, mask[0] if mask else None


def _multi_lora_linear_fake(
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    index: Tensor,
    scaling: Sequence[float],
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    M, R = x.numel() // x.shape[-1], max(A.shape[0] for A in lora_A)
    y = x.new_empty(*x.shape[:-1], lora_B[0].shape[0], dtype=y_dtype)
    p = x.new_empty(M, R, dtype=eager.stat_dtype(dtype))
    return y, p, _mask_fake(x, dropout_p, rng)


def multi_lora_linear_backward_direct(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    index: Tensor,
    p: Tensor,
    scaling: Sequence[float],
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    need_x: bool,
    need_A: Sequence[bool],
    need_B: Sequence[bool],
    need_bias: bool,
    choice: select.Choice | None = None,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None]:
    x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    choice = choice or choose_multi(x, weight, lora_A, lora_B, dtype, rng, dropout_p)
    with _no_autocast(x):
        dx, dA, dB, dbias = _BACKENDS[choice.backend].multi_lora_linear_backward(
            dy2, x2, weight, lora_A, lora_B, index.reshape(-1), p, scaling, dropout_p,
            _rows(rng, x), dtype, need_x, need_A, need_B, need_bias, choice.strategy,
        )  # fmt: skip
    return None if dx is None else dx.view(x.shape), dA, dB, dbias


def _multi_lora_linear_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    index: Tensor,
    p: Tensor,
    scaling: Sequence[float],
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    need_x: bool,
    need_A: Sequence[bool],
    need_B: Sequence[bool],
    need_bias: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    def like(need: bool, t: Tensor) -> Tensor:
        return t.new_empty(t.shape if need else (0,))

    return (
        like(need_x, x),
        [like(need, A) for need, A in zip(need_A, lora_A, strict=True)],
        [like(need, B) for need, B in zip(need_B, lora_B, strict=True)],
        x.new_empty(lora_B[0].shape[0] if need_bias else 0, dtype=p.dtype),
    )


def dora_norm_direct(
    weight: Tensor | Codes | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
    row_squares: Tensor | None = None,
) -> Tensor:
    """row_squares: ‖W‖² of each row, which the eager backend takes if it is at hand."""
    assert weight is not None
    device_type, index = device_of(lora_A)
    weight_dtype = torch.float32 if isinstance(weight, Codes) else weight.dtype
    choice = select.dora_norm(
        device_type, weight_dtype, lora_A.dtype, lora_B.dtype, lora_A.shape[0], index
    )
    norm: Tensor
    with _no_autocast(lora_A):
        args = (weight, lora_A, lora_B, scaling, rank_gate)
        if choice.backend == "eager":
            return eager.dora_norm(*args, row_squares)
        norm = _BACKENDS[choice.backend].dora_norm(*args)
    return norm


def _dora_norm_fake(
    weight: Tensor | Codes | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
    row_squares: Tensor | None = None,
) -> Tensor:
    return lora_A.new_empty(lora_B.shape[0], dtype=eager.stat_dtype(lora_A.dtype))


# The registered ops are these functions with an empty tensor for what was not asked for: a schema
# has no optional results. The functions themselves are for calls that are plain.


def _lora_linear(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, p, z, mask = lora_linear_direct(x, *rest)
    return y, p, y.new_empty(0) if z is None else z, _or_empty(mask, x)


def _multi_lora_linear(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, p, mask = multi_lora_linear_direct(x, *rest)
    return y, p, _or_empty(mask, x)


def _or_empty(mask: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.bool) if mask is None else mask


def _lora_linear_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    lora_A, lora_B, p = rest[1], rest[2], rest[3]
    grads = lora_linear_backward_direct(dy, x, *rest)
    dtypes = (x.dtype, lora_A.dtype, lora_B.dtype, p.dtype, p.dtype, p.dtype)
    return tuple(
        x.new_empty(0, dtype=dtype) if grad is None else grad
        for grad, dtype in zip(grads, dtypes, strict=True)
    )


def _multi_lora_linear_backward(
    dy: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    lora_A, lora_B, p = rest[1], rest[2], rest[4]
    dx, dA, dB, dbias = multi_lora_linear_backward_direct(dy, x, *rest)

    def or_nothing(grad: Tensor | None, dtype: torch.dtype) -> Tensor:
        return x.new_empty(0, dtype=dtype) if grad is None else grad

    return (
        or_nothing(dx, x.dtype),
        [or_nothing(grad, A.dtype) for grad, A in zip(dA, lora_A, strict=True)],
        [or_nothing(grad, B.dtype) for grad, B in zip(dB, lora_B, strict=True)],
        or_nothing(dbias, p.dtype),
    )


# Those of 4-bit weights are the same functions of `Codes`.
_FIELDS = len(Codes._fields)


def _with_codes(function: Callable[..., Any], before: int) -> Callable[..., Any]:
    """`function` with its weight, which follows `before` arguments, as the fields of `Codes`."""

    def unpacked(*args: Any) -> Any:
        after = before + _FIELDS
        return function(*args[:before], Codes(*args[before:after]), *args[after:])

    return unpacked


# Op name -> its implementation, for `measure.traffic`, which counts the kernels inside an op.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}

for _name, _impl, _fake, _before in (
    ("lora_linear", _lora_linear, _lora_linear_fake, 1),
    ("lora_linear_backward", _lora_linear_backward, _lora_linear_backward_fake, 2),
    ("multi_lora_linear", _multi_lora_linear, _multi_lora_linear_fake, 1),
    (
        "multi_lora_linear_backward",
        _multi_lora_linear_backward,
        _multi_lora_linear_backward_fake,
        2,
    ),
    ("dora_norm", dora_norm_direct, _dora_norm_fake, 0),
):
    for _suffix, _weight in _WEIGHTS.items():
        _name_of = f"{_name}{_suffix}"
        # A forward may draw a dropout mask.
        _tags = () if _before != 1 else (torch.Tag.nondeterministic_seeded,)
        _LIB.define(_name_of + _SCHEMAS[_name].format(weight=_weight), tags=_tags)
        _call: Any = _impl
        _shapes: Any = _fake
        if _suffix:
            _call, _shapes = _with_codes(_impl, _before), _with_codes(_fake, _before)
        IMPLEMENTATIONS[_name_of] = _call
        # Dynamo, which follows a backward into the op, would part the native call from the memory
        # that its pointers lead to.
        # The autograd Functions give the gradients; autograd must not record what the op calls.
        _LIB.impl(_name_of, _disable_dynamo(torch.no_grad()(_call)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"lora_kernels::{_name_of}", _shapes, lib=_LIB)

lora_linear = torch.ops.lora_kernels.lora_linear.default
lora_linear_backward = torch.ops.lora_kernels.lora_linear_backward.default
dora_norm = torch.ops.lora_kernels.dora_norm.default
dora_norm_4bit = torch.ops.lora_kernels.dora_norm_4bit.default
lora_linear_4bit = torch.ops.lora_kernels.lora_linear_4bit.default
multi_lora_linear = torch.ops.lora_kernels.multi_lora_linear.default
multi_lora_linear_backward = torch.ops.lora_kernels.multi_lora_linear_backward.default
multi_lora_linear_4bit = torch.ops.lora_kernels.multi_lora_linear_4bit.default
multi_lora_linear_backward_4bit = torch.ops.lora_kernels.multi_lora_linear_backward_4bit.default
lora_linear_backward_4bit = torch.ops.lora_kernels.lora_linear_backward_4bit.default
_PLAIN = (Tensor, torch.nn.Parameter)
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def watched() -> bool:
    """Whether a compiler or `torch.jit.trace` is tracing, a dispatch mode is active, or tensors may
    carry tangents or a batch dimension that Python does not see."""
    return (
        is_compiling()
        or _get_tracing_state() is not None
        or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


# The same as facts, which are looked at without Python's interpreter.
UNWATCHED: tuple[Fact, ...] = (
    (vars(torch.compiler), "_is_compiling_flag", False)
    if "_is_compiling_flag" in vars(torch.compiler)
    else (None, is_compiling, False),
    (None, _get_tracing_state, None),
    (_PRE_DISPATCH, _dispatch_tls_is_dispatch_key_included, False),
    (None, _len_torch_dispatch_stack, 0),
    (None, _are_functorch_transforms_active, False),
    (vars(forward_ad), "_current_level", -1),
)


def plain(*tensors: Tensor | None) -> bool:
    """Whether nobody could tell an op from its implementation: nobody watches, the tensors, all on
    one device, are no subclasses and not meta, and the first is what its memory holds.

    The dispatcher's way into Python and back costs 8 µs with warm caches, and 100 µs right after
    a large product has swept them.
    """
    if watched():
        return False
    for t in tensors:
        if t is not None and type(t) not in _PLAIN:
            return False
    first = tensors[0]
    return first is None or not (first.is_meta or first.is_neg() or first._is_zerotensor())


def batched(dy: Tensor) -> bool:
    """Whether it is of `autograd.grad(..., is_grads_batched=True)`, whose tensors look plain and
    have no memory."""
    return torch._C._functorch.is_legacy_batchedtensor(dy)
