"""The public functions: check arguments, and call the autograd Functions.

Without gradients they call the ops' implementations directly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.library import is_on_gpu_path
from ..choice import choose as selection
from ..core.call import ExpertsOperands, ExpertsSpec, MultiSpec, Operands, Spec
from ..core.packed4bit import PACKED4BIT_TENSORS, Packed4bit
from ..oracle import reference
from ..quantization import Weight4bit
from . import registry as ops
from .arguments import (
    FLOATS,
    NATIVE_MASKS,
    autocast_dtype,
    check_both_or_none,
    check_devices,
    check_dropout,
    check_dtypes,
    check_number,
    check_vector,
    check_weight,
    check_x_and_weight,
    matrix_shape,
    tensor_error,
)
from .autograd import (
    ExpertsOptions,
    LoRAExpertsFunction,
    LoRALinearFunction,
    MultiLoRALinearFunction,
    MultiOptions,
    Options,
)


def lora_linear(
    x: Tensor,
    weight: Tensor | Weight4bit | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    rank_gate: Tensor | None = None,
    column_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> Tensor:
    """Apply a frozen linear layer with a low-rank adapter:

        y = c ⊙ (x·Wᵀ + ((D(x)·Aᵀ) ⊙ g)·Bᵀ) + bias,    g = scaling · rank_gate

    Args:
        x: [..., K], float32, bfloat16, float16 or float64. Any strides, any M including 0.
        weight: [N, K], frozen, in x's dtype unless autocast is on. A `Weight4bit` is decoded inside
            the GEMM. None: no base GEMM, y is the low-rank update alone.
        lora_A: [R, K], float32, bfloat16 or float16, independent of x's dtype; float64 only if all
            tensors are. The adapter is not cast to x's dtype, and GEMMs accumulate in float32.
        lora_B: [N, R], as lora_A.
        scaling: alpha / r.
        bias: [N] or None, added after the column scale.
        rank_gate: [R] or None, multiplies `scaling` for each rank (AdaLoRA, hierarchical LoRA).
        column_scale: [N] or None (DoRA).
        dropout_p: probability in [0, 1] of zeroing an element of x on the adapter's branch.
        rng: int64[2], seed and offset of the dropout mask (see `dropout_mask`), or the mask itself,
            bool of x's shape, True for kept elements. If it is None and dropout_p > 0, the default
            generator of x's device draws a state. On a GPU that runs the eager backend, PyTorch's
            dropout kernel draws the mask.
        compute_dtype: of the base GEMM with a 4-bit weight without autocast: float32, bfloat16 or
            float16 (`Linear4bit.compute_dtype`). None: x's dtype.
        recompute: whether the backward recomputes D(x)·Aᵀ [M, R] instead of saving it.

    Returns:
        y [..., N], in autocast's dtype if autocast is enabled for x's device, else in x's.
        Differentiable once in x, lora_A, lora_B, rank_gate, column_scale and bias.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.
        RuntimeError: a forced backend cannot run here.

    >>> import torch, lora_kernels
    >>> x, W, A, B = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
    >>> lora_kernels.lora_linear(x, W, A, B, scaling=0.5)
    tensor([[2.5000, 2.5000, 2.5000],
            [2.5000, 2.5000, 2.5000]])
    """
    if not isinstance(x, Tensor):
        raise tensor_error("x", x)
    R, K = matrix_shape("lora_A", lora_A, "[R, K]")
    N, ranks = matrix_shape("lora_B", lora_B, "[N, R]")
    x_dtype, a_dtype, b_dtype = x.dtype, lora_A.dtype, lora_B.dtype
    device_type, _ = ops.device_of(x)
    cast_dtype = autocast_dtype(device_type, x_dtype)
    y_dtype = cast_dtype or x_dtype
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"x: got shape {list(x.shape)}, want [..., {K}] for lora_A {list(lora_A.shape)}"
        )
    if ranks != R:
        raise ValueError(f"lora_B: got shape {list(lora_B.shape)}, want [N, {R}] for rank {R}")
    if x_dtype not in FLOATS:
        raise TypeError(f"x: got {x_dtype}, want float32, bfloat16, float16 or float64")
    if not (x_dtype is a_dtype is b_dtype):
        check_dtypes("x", x_dtype, lora_A=a_dtype, lora_B=b_dtype)
    if not (x.is_cpu and lora_A.is_cpu and lora_B.is_cpu):
        check_devices("x", x, lora_A=lora_A, lora_B=lora_B)
    weight, codes, dtype = check_weight(x, weight, (N, K), compute_dtype, cast_dtype)
    if bias is not None:
        check_vector("bias", bias, N, x)
    if rank_gate is not None:
        check_vector("rank_gate", rank_gate, R, x)
    if column_scale is not None:
        check_vector("column_scale", column_scale, N, x)
    if cast_dtype and is_on_gpu_path(device_type):  # a CPU's kernels keep the adapter's bits
        x, lora_A, lora_B = (t.to(y_dtype) for t in (x, lora_A, lora_B))
        weight = weight.to(y_dtype) if isinstance(weight, Tensor) else weight
    if dropout_p or rng is not None:
        dropout_p, rng = check_dropout(x, dropout_p, rng)
    scaling, dropout_p = check_number("scaling", scaling), float(dropout_p)
    spec = Spec(scaling, dropout_p, dtype, y_dtype)
    frozen = codes[:PACKED4BIT_TENSORS] or (weight,)
    if not torch.is_grad_enabled() and ops.can_bypass_dispatcher(x, frozen[0], lora_A, lora_B):
        base = Packed4bit(*codes) if codes else weight
        operands = Operands(x, base, lora_A, lora_B, rank_gate, column_scale, bias, rng)
        return ops.lora_linear_direct(operands, spec)[0]
    options = Options(spec, recompute, codes[PACKED4BIT_TENSORS:])
    ops.refuse_context()
    return LoRALinearFunction.apply(  # type: ignore[no-any-return]
        x, lora_A, lora_B, rank_gate, column_scale, bias, options, rng, *frozen
    )


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | Weight4bit | None,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    index: Tensor,
    scaling: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Apply a frozen linear layer with one of E adapters, or none, for each row of x:

        y_m = W·x_m + scaling_e · B_e·(A_e·D(x)_m) + bias,    e = index_m

    One base GEMM serves all rows. On a CPU and in the eager backend no adapter is copied:
    contiguous rows of one adapter, such as those of a sequence, are read in place, and other rows
    are sorted by adapter. Triton's and CUDA's kernels take all adapters as one whose ranks are
    theirs: there a NaN or an infinity in an adapter's lora_B reaches every row.

    Args:
        x: [..., K], as in `lora_linear`.
        weight: [N, K], a `Weight4bit`, or None for the low-rank update alone.
        lora_A: [E, R, K], or E tensors [R_e, K] of any ranks and one dtype.
        lora_B: [E, N, R], or E tensors [N, R_e] of one dtype.
        index: integers of x's leading shape [...]: 0 to E - 1, or -1 for no adapter.
        scaling: alpha / r, one number for all adapters or one for each.
        bias, dropout_p, rng, compute_dtype: as in `lora_linear`. The dropout mask does not depend
            on the adapters.

    Returns:
        y [..., N], in autocast's dtype if autocast is enabled for x's device, else in x's.
        Differentiable once in x, lora_A, lora_B and bias. The gradients of an adapter without rows
        are zero.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.
        RuntimeError: a forced backend cannot run here.

    >>> import torch, lora_kernels
    >>> x, W, A, B = torch.ones(3, 2), torch.eye(2), torch.ones(2, 1, 2), torch.ones(2, 2, 1)
    >>> lora_kernels.multi_lora_linear(x, W, A, B, torch.tensor([0, 1, -1]), scaling=[0.5, 2.0])
    tensor([[2., 2.],
            [5., 5.],
            [1., 1.]])
    """
    if not isinstance(x, Tensor):
        raise tensor_error("x", x)
    As, Bs = _adapters("lora_A", lora_A, "[E, R, K]"), _adapters("lora_B", lora_B, "[E, N, R]")
    E, device = len(As), x.device
    if len(Bs) != E:
        raise ValueError(f"lora_B: got {len(Bs)} adapters, want {E}, as many as of lora_A")
    device_type, _ = ops.device_of(x)
    cast_dtype = autocast_dtype(device_type, x.dtype)
    y_dtype = cast_dtype or x.dtype
    K, N = As[0].shape[1], Bs[0].shape[0]
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"x: got shape {list(x.shape)}, want [..., {K}] for lora_A {list(As[0].shape)}"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"x: got {x.dtype}, want float32, bfloat16, float16 or float64")
    a_dtype, b_dtype = As[0].dtype, Bs[0].dtype
    for e, (A, B) in enumerate(zip(As, Bs, strict=True)):
        if A.dim() != 2 or A.shape[1] != K:
            raise ValueError(f"lora_A[{e}]: got shape {list(A.shape)}, want [R, {K}]")
        if B.shape != (N, A.shape[0]):
            raise ValueError(f"lora_B[{e}]: got shape {list(B.shape)}, want [{N}, {A.shape[0]}]")
        if A.dtype is not a_dtype or B.dtype is not b_dtype:
            raise TypeError(
                f"lora_A[{e}], lora_B[{e}]: got {A.dtype}, {B.dtype}, want {a_dtype}, {b_dtype}, "
                "as the first have"
            )
        if A.device != device or B.device != device:
            check_devices("x", x, **{f"lora_A[{e}]": A, f"lora_B[{e}]": B})
    check_dtypes("x", x.dtype, lora_A=a_dtype, lora_B=b_dtype)
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index: got {got}, want a tensor of int64 or int32")
    if index.shape != x.shape[:-1]:
        raise ValueError(f"index: got shape {list(index.shape)}, want x's {list(x.shape[:-1])}")
    check_devices("x", x, index=index)
    if isinstance(scaling, (Sequence, Tensor)) and not isinstance(scaling, str):
        given = scaling.tolist() if isinstance(scaling, Tensor) else scaling
        factors = tuple(check_number("scaling", factor) for factor in given)
    else:
        factors = (check_number("scaling", scaling),) * E
    if len(factors) != E:
        raise ValueError(f"scaling: got {len(factors)} numbers, want one, or {E}")
    weight, codes, dtype = check_weight(x, weight, (N, K), compute_dtype, cast_dtype)
    if bias is not None:
        check_vector("bias", bias, N, x)
    if cast_dtype and is_on_gpu_path(device_type):  # a CPU's kernels keep the adapter's bits
        x, *both = (t.to(y_dtype) for t in (x, *As, *Bs))
        As, Bs = both[:E], both[E:]
        weight = weight.to(y_dtype) if isinstance(weight, Tensor) else weight
    dropout_p, rng = check_dropout(x, dropout_p, rng)
    options = MultiOptions(
        MultiSpec(factors, dropout_p, dtype, y_dtype), codes[PACKED4BIT_TENSORS:]
    )
    ops.refuse_context()
    return MultiLoRALinearFunction.apply(  # type: ignore[no-any-return]
        x, weight, index, bias, rng, options, *As, *Bs, *codes[:PACKED4BIT_TENSORS]
    )


def lora_experts_linear(
    x: Tensor,
    weight: Tensor | Weight4bit,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    offsets: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    is_transposed: bool = False,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Apply each expert's frozen linear layer and adapter, for rows sorted by expert:

        y_m = W_e·x_m + scaling · B_e·(A_e·D(x)_m) + bias_e,    offsets[e-1] <= m < offsets[e]

    Neither direction allocates a tensor of the weights' size, and W + scaling·B·A is not computed.

    Args:
        x: [M, K], float32, bfloat16, float16 or float64.
        weight: [E, N, K], frozen, with any strides, in x's dtype unless autocast is on; or a
            `Weight4bit` of that shape.
        lora_A: [E, R, K]. None, like lora_B: no adapters.
        lora_B: [E, N, R], any strides. PEFT's weights [N, R·E] are
            `weight.view(N, R, E).permute(2, 0, 1)`.
        offsets: int32 or int64 [E], ascending: one past each expert's last row, as in
            `torch.nn.functional.grouped_mm`. Rows from offsets[-1] on belong to no expert, and y
            is zero. The values are checked on the CPU alone, because reading them would synchronize
            a GPU.
        scaling: alpha / r.
        bias: [E, N] or None.
        is_transposed: whether `weight` is [E, K, N].
        dropout_p, rng, compute_dtype: as in `lora_linear`. The mask's rows are those of x.

    Returns:
        y [M, N], in autocast's dtype if autocast is enabled for x's device, else in x's.
        Differentiable once in x, lora_A, lora_B and bias. The gradients of an expert without rows
        are zero.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.
        RuntimeError: a forced backend cannot run here.

    >>> import torch, lora_kernels
    >>> x, W, A, B = torch.ones(3, 2), torch.ones(2, 1, 2), torch.ones(2, 1, 2), torch.ones(2, 1, 1)
    >>> lora_kernels.lora_experts_linear(x, W, A, B, torch.tensor([0, 2]), scaling=0.5).tolist()
    [[3.0], [3.0], [0.0]]
    """
    check_x_and_weight(x, weight)
    if len(weight.shape) != 3 or 0 in weight.shape:
        want = "[E, K, N]" if is_transposed else "[E, N, K]"
        raise ValueError(f"weight: got shape {list(weight.shape)}, want {want}, each at least 1")
    E, N, K = weight.shape
    N, K = (K, N) if is_transposed else (N, K)
    if x.dim() != 2 or x.shape[1] != K:
        raise ValueError(
            f"x: got shape {list(x.shape)}, want [M, {K}] for weight {list(weight.shape)}"
            + " and is_transposed=True" * is_transposed
        )
    check_both_or_none(lora_A, lora_B)
    if lora_A is None or lora_B is None:
        lora_A, lora_B = x.new_empty(E, 0, K), x.new_empty(E, N, 0)
    else:
        _check_experts_adapter(x, lora_A, lora_B, (E, N, K))
    _check_offsets(offsets, E, x)
    device_type, _ = ops.device_of(x)
    cast_dtype = autocast_dtype(device_type, x.dtype)
    y_dtype = cast_dtype or x.dtype
    shape = tuple(weight.shape)
    base, codes, dtype = check_weight(x, weight, shape, compute_dtype, cast_dtype)
    if base is not None and is_transposed:
        base = base.mT
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise tensor_error("bias", bias)
        if bias.shape != (E, N):
            raise ValueError(f"bias: got shape {list(bias.shape)}, want [{E}, {N}]")
        check_dtypes("x", x.dtype, bias=bias.dtype)
        check_devices("x", x, bias=bias)
    if cast_dtype and is_on_gpu_path(device_type):
        x, lora_A, lora_B = (t.to(y_dtype) for t in (x, lora_A, lora_B))
        base = None if base is None else base.to(y_dtype)
    dropout_p, rng = check_dropout(x, dropout_p, rng)
    spec = ExpertsSpec(
        check_number("scaling", scaling), dropout_p, dtype, y_dtype, bool(is_transposed)
    )
    frozen = codes[:PACKED4BIT_TENSORS] or (base,)
    if not torch.is_grad_enabled() and ops.can_bypass_dispatcher(
        x, frozen[0], lora_A, lora_B, offsets
    ):
        held = Packed4bit(*codes) if codes else base
        operands = ExpertsOperands(x, held, lora_A, lora_B, offsets, bias, rng)
        return ops.lora_experts_direct(operands, spec)[0]
    options = ExpertsOptions(spec, codes[PACKED4BIT_TENSORS:])
    ops.refuse_context()
    return LoRAExpertsFunction.apply(  # type: ignore[no-any-return]
        x, lora_A, lora_B, bias, offsets, options, rng, *frozen
    )


def _check_experts_adapter(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, sizes: tuple[int, int, int]
) -> None:
    E, N, K = sizes
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(t, Tensor):
            raise tensor_error(name, t)
    if lora_A.dim() != 3 or lora_A.shape[::2] != (E, K) or lora_A.shape[1] < 1:
        raise ValueError(
            f"lora_A: got shape {list(lora_A.shape)}, want [{E}, R, {K}] with R at least 1"
        )
    if lora_B.shape != (E, N, lora_A.shape[1]):
        want = f"[{E}, {N}, {lora_A.shape[1]}]"
        raise ValueError(f"lora_B: got shape {list(lora_B.shape)}, want {want}")
    check_dtypes("x", x.dtype, lora_A=lora_A.dtype, lora_B=lora_B.dtype)
    check_devices("x", x, lora_A=lora_A, lora_B=lora_B)


def _check_offsets(offsets: Tensor, experts: int, x: Tensor) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int64, torch.int32):
        got = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"offsets: got {got}, want a tensor of int64 or int32")
    if offsets.shape != (experts,):
        raise ValueError(f"offsets: got shape {list(offsets.shape)}, want [{experts}]")
    check_devices("x", x, offsets=offsets)
    if not ops.can_bypass_dispatcher(offsets) or not offsets.is_cpu:
        return  # a traced tensor has no values, and reading a GPU's would synchronize
    before = 0
    for e, stop in enumerate(offsets.tolist()):
        if not before <= stop <= x.shape[0]:
            raise ValueError(
                f"offsets[{e}]: got {stop}, want {before} to {x.shape[0]}: rising, up to x's rows"
            )
        before = stop


def _adapters(name: str, tensors: Tensor | Sequence[Tensor], want: str) -> list[Tensor]:
    """Return E matrices, from a tensor of three dimensions or a sequence."""
    if isinstance(tensors, Tensor):
        if tensors.dim() != 3 or tensors.numel() == 0:
            raise ValueError(
                f"{name}: got shape {list(tensors.shape)}, want {want}, each at least 1, or a "
                "sequence of matrices"
            )
        return list(tensors.unbind())
    if not tensors:
        raise ValueError(f"{name}: got no adapter, want at least 1")
    for e, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise tensor_error(f"{name}[{e}]", t)
    matrix_shape(f"{name}[0]", tensors[0], want.replace("E, ", ""))
    return list(tensors)


def dropout_mask(rng: Tensor, M: int, K: int, p: float) -> Tensor:
    """Return the dropout mask of a state, bool [M, K], True for kept elements.

    The CPU, Triton and CUDA backends apply the same mask, independent of tiles and threads. Its
    words are those of Philox4x32-10 with key = seed and
    counter = (k >> 2, m, offset_lo, offset_hi). Element (m, k) has word k & 3, and is kept if
    word >= round(p·2³²).

    rng: int64[2], seed and offset.

    Raises RuntimeError on a GPU that runs the eager backend, because PyTorch's dropout kernel draws
    its masks.

    >>> mask = dropout_mask(torch.tensor([1, 2]), 64, 64, p=0.25)
    >>> mask.shape, 0.7 < mask.double().mean().item() < 0.8
    (torch.Size([64, 64]), True)
    """
    device_type = rng.device.type
    if selection.is_eager_on_gpu(device_type):
        raise RuntimeError(f"dropout_mask: rng is on {rng.device}, {NATIVE_MASKS}")
    return reference.dropout_mask(rng, M, K, p)


@torch.no_grad()
def dora_norm(
    weight: Tensor | Weight4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    rank_gate: Tensor | None = None,
) -> Tensor:
    """Return the norm of each row of W + (B ⊙ g)·A, g = scaling · rank_gate.

    DoRA's column scale is magnitude / norm. The norm is a constant: it has no gradient. The sum is
    not stored.

    Args:
        weight: [N, K], float32, bfloat16, float16 or float64, or a `Weight4bit`.
        lora_A: [R, K], float64 only if all tensors are.
        lora_B: [N, R], as lora_A.
        scaling: alpha / r.
        rank_gate: [R] or None.

    Returns:
        float32 [N]; float64 for float64.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.
        RuntimeError: a forced backend cannot run here.

    >>> import torch
    >>> from lora_kernels.ops.functional import dora_norm
    >>> dora_norm(torch.eye(2), torch.ones(1, 2), torch.tensor([[1.0], [0.0]]), scaling=2.0)
    tensor([3.6056, 1.0000])
    """
    R, K = matrix_shape("lora_A", lora_A, "[R, K]")
    N, _ = matrix_shape("lora_B", lora_B, "[N, R]")
    if lora_B.shape[1] != R:
        raise ValueError(f"lora_B: got shape {list(lora_B.shape)}, want [N, {R}] for rank {R}")
    if not isinstance(weight, (Tensor, Weight4bit)):
        got = type(weight).__name__
        raise TypeError(f"weight: got {got}, want a tensor or a Weight4bit")
    if tuple(weight.shape) != (N, K):
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, want [{N}, {K}] for lora_A "
            f"{list(lora_A.shape)} and lora_B {list(lora_B.shape)}"
        )
    held = weight.packed if isinstance(weight, Weight4bit) else weight
    check_devices("lora_A", lora_A, weight=held, lora_B=lora_B)
    dtypes = {"lora_A": lora_A.dtype, "lora_B": lora_B.dtype}
    check_dtypes("lora_A", lora_A.dtype, **dtypes)
    if isinstance(weight, Weight4bit):
        if lora_A.dtype is torch.float64:
            raise TypeError(
                f"lora_A: got {lora_A.dtype}, want float32, bfloat16 or float16 beside a 4-bit "
                "weight"
            )
    else:
        check_dtypes("lora_A", lora_A.dtype, weight=weight.dtype)
    if rank_gate is not None:
        check_vector("rank_gate", rank_gate, R, lora_A, "lora_A")
    rest = (lora_A, lora_B, check_number("scaling", scaling), rank_gate)
    base = weight.codes if isinstance(weight, Weight4bit) else weight
    if ops.can_bypass_dispatcher(held, lora_A, lora_B):
        return ops.dora_norm_direct(base, *rest)
    norm: Tensor
    if isinstance(base, Tensor):
        norm = ops.dora_norm(base, *rest)
    else:
        norm = ops.dora_norm_4bit(*base, *rest)
    return norm
