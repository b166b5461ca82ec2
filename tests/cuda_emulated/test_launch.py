"""How launches follow each other, what the emulator refuses, and when the backend is forced."""

import importlib.util
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.backends import cuda, workspace
from lora_kernels.backends.cuda import COOPERATIVE, STRATEGIES, TWO_PASS, launch
from lora_kernels.backends.cuda import linear as equation
from lora_kernels.backends.launches import Plan, planned
from lora_kernels.core.call import Operands, Spec
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case
from tests.support.allocations import Allocations
from tests.support.emulator import deferred_launches, emulated_stream

f32, bf16 = torch.float32, torch.bfloat16


def few_rows(seed: int = 0) -> dict[str, Any]:
    args = cases.inputs(Case(5, 80, 512, 5, bf16, seed=seed))
    args.pop("dy")
    return args


def forward(args: dict[str, Any], strategy: str = COOPERATIVE) -> torch.Tensor:
    with lora_kernels.backend("cuda", strategy), torch.no_grad():
        return lora_kernels.lora_linear(**args)


def test_flags_serve_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(workspace, "flags", lambda device: flags)
    first, second = few_rows(), few_rows(1)
    alone = [forward(first), forward(second)]
    assert flags.tolist() == [0, 0]
    assert torch.equal(forward(first), alone[0]) and torch.equal(forward(second), alone[1])


@pytest.mark.parametrize(("M", "N", "K"), [(1, 72, 2304), (3, 40, 3136), (11, 136, 1088)], ids=str)
def test_flags_of_tiles_that_blocks_share_serve_again(
    M: int, N: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = torch.zeros(2 + workspace.MAX_BLOCKS, dtype=torch.int32)
    monkeypatch.setattr(workspace, "flags", lambda device: flags)
    args = cases.inputs(Case(M, N, K, 5, bf16))
    args.pop("dy")
    first = forward(args)
    assert launch.traffic[-1][1]["tile_partials"][1] and not flags.any()
    assert torch.equal(forward(args), first)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_streams_at_once_have_the_same_bits(strategy: str) -> None:
    """Each with flags and partial sums of its own."""
    inputs = few_rows(), few_rows(1)
    alone = [forward(args, strategy) for args in inputs]
    multiprocessors = 12  # enough for two cooperative grids
    with cuda.emulate(3, multiprocessors), deferred_launches():
        got = []
        for number, args in enumerate(inputs):
            with emulated_stream(number):
                got.append(forward(args, strategy))
    assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))


@pytest.mark.parametrize("places", [1, 2])
def test_splits_of_p_more_than_places_have_the_same_bits(places: int) -> None:
    """A block publishes several of the three."""
    args = cases.inputs(Case(5, 80, 640, 5, bf16))
    args.pop("dy")
    want = forward(args)
    with cuda.emulate(0, places):
        launch.traffic.clear()
        assert torch.equal(forward(args), want)
    ((kernel, bytes_),) = launch.traffic
    assert kernel == "decode" and bytes_["partials"][1] == 3 * 5 * 5 * 4


def test_flag_that_is_never_raised_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        workspace,
        "flags",
        lambda device: torch.full((2 + workspace.MAX_BLOCKS,), -9, dtype=torch.int32),
    )
    with pytest.raises(RuntimeError, match=r"decode, block \(\d, 0, 0\), thread 0: waits forever"):
        forward(few_rows())


def test_memory_outside_of_a_tensor_raises() -> None:
    args = few_rows()
    x, W, A, B = (args[name].detach() for name in ("x", "weight", "lora_A", "lora_B"))

    @planned
    def decode(plan: Plan, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        N = W.shape[0]
        linear = equation._Linear(plan, x, W, B.t(), plan.empty(5, N, dtype=bf16), bf16, 1.0)
        linear.shape = (5, N, *linear.shape[2:])
        return equation._decode(plan, linear, A)

    decode(x, W, A, B)
    with pytest.raises(RuntimeError, match="reads 2 bytes of global memory 2 bytes past q"):
        decode(x, W, A, B[:-1])  # one row less than W has


@pytest.mark.parametrize("strategy", [COOPERATIVE, TWO_PASS])
@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_lora_linear_makes_p_and_y_alone(quant: str, strategy: str) -> None:
    """No tensor has M×N, M×K or N×K elements: P, its partial sums, flags, and y."""
    M, N, K, R = 12, 160, 128, 5
    args = cases.inputs(Case(M, N, K, R, bf16, quant=quant, gate=True, bias=True))
    weight = args["weight"].codes if quant else args["weight"]
    with Allocations() as allocations:
        A, B, gate, bias = (args[name] for name in ("lora_A", "lora_B", "rank_gate", "bias"))
        operands = Operands(args["x"].detach(), weight, A, B, gate, None, bias)
        equation.lora_linear(operands, Spec(2.0, 0.0, bf16, bf16), strategy)
    sizes = sorted(size for size in allocations.sizes if size != 2 + workspace.MAX_BLOCKS)  # flags
    assert sizes[-2:] == [M * R, M * N]


def test_lora_linear_outside_of_the_emulator_raises() -> None:
    token = cuda.emulated.set(None)
    try:
        with pytest.raises(RuntimeError, match="backend 'cuda' was requested and cannot run here"):
            forward(few_rows())
    finally:
        cuda.emulated.reset(token)


@pytest.mark.parametrize(
    ("capability", "why"),
    [
        (75, "sm_75 is older than sm_80"),
        (80, None),
        (89, None),
        (90, None),
        (100, None),
        (120, None),
    ],
)
def test_unsupported_capability_reason_names_gpus_before_sm_80(
    capability: int, why: str | None
) -> None:
    found = cuda.unsupported_capability_reason(capability)
    assert found is None if why is None else why in (found or "")


@pytest.mark.parametrize("first", ["_cuda", "_emulator"])
def test_extensions_of_one_source_import_in_one_process(first: str) -> None:
    """Both register the same C++ types, each for itself; `_cuda` is there where nvcc built it."""
    names = sorted(("_cuda", "_emulator"), key=lambda name: name != first)
    built = [name for name in names if importlib.util.find_spec(f"lora_kernels.{name}")]
    code = "; ".join(f"import lora_kernels.{name}" for name in built)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert built and done.returncode == 0, done.stderr


def test_unsigned_argument_keeps_64_bits_and_takes_no_negative_number() -> None:
    from lora_kernels import _emulator  # type: ignore[attr-defined]

    with cuda.emulate(seed=2**64 - 1):
        pass
    with pytest.raises(TypeError, match=r"seed_scheduler\(\): incompatible function arguments"):
        _emulator.seed_scheduler(-1, 1)


_MATRIX, _VECTOR = (0, 0, 0, 1, False), (0, 0)
_THIN = {
    "v": _MATRIX, "v_scale": None, "over_rows": False, "y": _MATRIX, "out": 0,
    "I": 0, "J": 0, "R": 0, "j_per_split": 1, "num_splits": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": (0, 0, 0, 1)}, "y: got 4 values, want 5"),
        ({"y": [0, 0, 0, 1, False]}, "y: got list, want a tuple"),
        ({"v": (0, 2**31, 0, 1, False)}, "v: dtype: got 2147483648, want int"),
        ({"v": (-1, 0, 0, 1, False)}, "v: data: got -1, want unsigned long"),
        ({"v_scale": (0.5, 0)}, "v_scale: data: got float, want unsigned long"),
        ({"over_rows": object()}, "over_rows: got object, want bool"),
        ({"num_splits": "one"}, "num_splits: got str, want int"),
    ],
)
def test_bad_field_of_a_struct_raises_with_its_path(changed: dict[str, Any], message: str) -> None:
    from lora_kernels import _emulator  # type: ignore[attr-defined]

    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        _emulator.thin(tuple((_THIN | changed).values()), (0, 0))


def test_bindings_have_signatures_and_a_docstring_of_their_structs() -> None:
    from lora_kernels import _emulator  # type: ignore[attr-defined]

    assert _emulator.thin.__doc__.startswith("thin(args: Thin, stream: Stream) -> None")
    assert "Matrix: (data, dtype, row, column, vectors)\n" in _emulator.__doc__
    assert f"Thin: ({', '.join(_THIN)})\n" in _emulator.__doc__
    with pytest.raises(TypeError, match=r"thin\(\): incompatible function arguments"):
        _emulator.thin(None)
