"""Native kernels write all of their outputs, nothing else, and read the values of operands."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.backends.cpu import native
from lora_kernels.core.call import ExpertsOperands, MultiOperands, Operands
from lora_kernels.layers import LoRALinear
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import AnyCase, Case
from lora_kernels.oracle.experts_case import ExpertsCase
from lora_kernels.oracle.multi_case import MultiCase
from lora_kernels.quantization import quantize_4bit
from tests.ops.engines import every_native_engine, every_thread_count

GUARD = 64  # elements: the longest vector of the narrowest dtype, twice over
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """`new_empty` hands out the middle of a larger buffer of NaN; the buffers' ends are listed."""
    ends: list[Tensor] = []

    def new_empty(like: Tensor, *shape: object, dtype: torch.dtype | None = None) -> Tensor:
        want = plain(like, *shape, dtype=dtype)
        buffer = torch.full((want.numel() + 2 * GUARD,), float("nan"), dtype=want.dtype)
        ends.extend((buffer[:GUARD], buffer[-GUARD:]))
        return buffer[GUARD:-GUARD].view(want.shape)

    plain: Callable[..., Tensor] = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    yield ends


@every_native_engine
@every_thread_count
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (7, 65, 63, 5), (33, 17, 31, 16), (130, 100, 257, 64)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_written_whole_and_nothing_else(
    dtype: torch.dtype, shape: tuple[int, ...], guarded: list[Tensor], threads: int, engine: str
) -> None:
    case = Case(*shape, dtype, gate=True, column_scale=True, bias=True, dropout_p=0.1)
    results = cases.run(lora_kernels.lora_linear, cases.inputs(case))
    assert guarded
    for name, result in results.items():
        assert not result.isnan().any(), name
    for end in guarded:
        assert end.isnan().all()


@every_native_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_among_nan_give_the_same_bits(dtype: torch.dtype, engine: str) -> None:
    """NaN before, after and between the rows of each matrix reaches no result."""
    args = cases.inputs(Case(7, 65, 63, 5, dtype, dropout_p=0.1))

    def surrounded(t: Tensor) -> Tensor:
        wide = torch.full((t.shape[0] + 2, t.shape[1] + 2 * GUARD), float("nan"), dtype=t.dtype)
        wide[1:-1, GUARD:-GUARD] = t.detach()
        return wide[1:-1, GUARD:-GUARD].requires_grad_(t.requires_grad)

    names = ("x", "weight", "lora_A", "lora_B", "dy")
    results = cases.run(lora_kernels.lora_linear, args)
    among_nan = {**args, **{name: surrounded(args[name]) for name in names}}
    for name, result in cases.run(lora_kernels.lora_linear, among_nan).items():
        assert torch.equal(result, results[name]), name


def every_operand(*rows: int) -> pytest.MarkDecorator:
    """Parametrize with a case of each op and one of its floating operands or the gradient of y."""
    params = []
    for M in rows:
        ops: list[tuple[AnyCase, tuple[str, ...]]] = [
            (Case(M, 33, 65, 5, gate=True, column_scale=True, bias=True), Operands._fields),
            (Case(M, 128, 64, 5, quant="nf4-64"), ("x", "lora_A", "lora_B")),
            (MultiCase(M, 33, 65), MultiOperands._fields),
            (ExpertsCase((M, 0, M), 33, 65, 5), ExpertsOperands._fields),
        ]
        for case, names in ops:
            args = cases.inputs(case)
            for name in (*names, "dy"):
                value = args.get(name)
                first = value[0] if isinstance(value, list) else value
                if isinstance(first, Tensor) and first.is_floating_point():
                    params.append(pytest.param(case, name, id=f"{case}-{name}"))
    return pytest.mark.parametrize(("case", "name"), params)


def replace(args: dict[str, Any], name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return the arguments with a changed copy of one; of a list of tensors the last changes."""

    def changed(t: Tensor) -> Tensor:
        return change(t.detach().clone()).requires_grad_(t.requires_grad)

    value = args[name]
    new = [*value[:-1], changed(value[-1])] if isinstance(value, list) else changed(value)
    return {**args, name: new}


def lazily_negated(t: Tensor) -> Tensor:
    """Return t as PyTorch returns `z.conj().imag`: its memory holds -t."""
    return t.neg()._neg_view()


@every_operand(1, 4, 100)
def test_operand_negated_lazily_gives_the_results_of_its_values(case: Any, name: str) -> None:
    args = cases.inputs(case)
    other = replace(args, name, lazily_negated)
    assert cases._list(other[name])[-1].is_neg()
    want, got = cases.run(case.op, args), cases.run(case.op, other)
    assert all(torch.equal(got[key], want[key]) for key in want)  # of the same kernels
    if name != "dy":
        with torch.no_grad():
            del other["dy"]
            assert torch.equal(case.op(**other), want["y"])


def test_dora_norm_and_4bit_codes_of_a_lazily_negated_tensor_are_those_of_its_values() -> None:
    W, A, B, gate = torch.randn(64, 128), torch.randn(5, 128), torch.randn(64, 5), torch.rand(5)
    want = lora_kernels.dora_norm(W, A, B, 2.0, rank_gate=gate)
    for i in range(4):
        given = [lazily_negated(t) if i == j else t for j, t in enumerate((W, A, B, gate))]
        assert torch.equal(lora_kernels.dora_norm(*given[:3], 2.0, rank_gate=given[3]), want)
    codes = quantize_4bit(W).codes
    assert torch.equal(quantize_4bit(lazily_negated(W)).codes.packed, codes.packed)


def test_layer_whose_adapter_is_negated_in_place_has_its_new_values() -> None:
    """`.data` gives a parameter the negative bit at the same address."""
    layer, x = LoRALinear(64, 32, r=4), torch.randint(-4, 5, (2, 64)).float()
    for p in layer.parameters():
        p.data.copy_(torch.randint(-4, 5, p.shape))  # sums are exact
    base = torch.nn.functional.linear(x, layer.weight)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = layer(x)
            layer.lora_A.data = layer.lora_A.data._neg_view()
            assert torch.equal(layer(x), 2 * base - y)
            layer.lora_A.data = layer.lora_A.data.resolve_neg().neg()


@every_operand(4)
def test_operand_whose_memory_was_freed_raises_its_name(case: Any, name: str) -> None:
    def freed(t: Tensor) -> Tensor:
        t.untyped_storage().resize_(0)
        return t

    args = replace(cases.inputs(case), name, freed)
    index = "" if not isinstance(args[name], list) else rf"\[{len(args[name]) - 1}\]"
    with pytest.raises(RuntimeError, match=rf"^{name}{index}: got a tensor .* whose memory was fr"):
        cases.run(case.op, args)
    if name == "dy":
        return
    del args["dy"]
    with torch.no_grad(), pytest.raises(RuntimeError, match=rf"^{name}{index}: got a tensor"):
        case.op(**args)


def test_native_call_of_freed_memory_or_a_missing_kernel_raises() -> None:
    """Callers below the ops' checks get an error of the same kind, and no segmentation fault."""
    native_module, isa = native.module, native.isa
    assert native_module is not None and isa is not None
    x, W, A, B = torch.ones(3, 8), torch.ones(6, 8), torch.ones(2, 8), torch.ones(6, 2)
    y, p = torch.empty(3, 6), torch.empty(3, 2)

    def call(**changes: int) -> None:
        at = {"x": x.data_ptr(), "A": A.data_ptr(), "B": B.data_ptr(), "y": y.data_ptr()} | changes
        rows, sizes = (at["x"], 0, 8, 1), (3, 8, 6, 2)
        adapter = (at["A"], 0, 8, 1), (at["B"], 0, 2, 1), 1.0
        layer = (W.data_ptr(), 0, 8, 1), None, *sizes, *adapter, 0, 0, 0, (0, 0, 0), 1.0, 1
        native_module.lora_linear(layer, (rows, rows, False, p.data_ptr(), at["y"], 0, 0))

    try:
        native.use_isa("avx2")
        with pytest.raises(RuntimeError, match=r"^strategy: got fused, want another: \w+ has no"):
            call()
    finally:
        native.use_isa(isa)
    for name, words in {"x": "x", "A": "lora_A", "B": "lora_B", "y": "y"}.items():
        with pytest.raises(RuntimeError, match=f"^{words}: got null, want the address of"):
            call(**{name: 0})
