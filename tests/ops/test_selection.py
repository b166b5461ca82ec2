"""The choice of a backend, and the errors if it cannot run."""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels
from lora_kernels.backends.cpu import heuristics, native
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.choice import choose as selection
from lora_kernels.choice import verdicts
from lora_kernels.core import device
from lora_kernels.core.problem import Choice, Layout, Problem, Strategy
from lora_kernels.ops import experts, linear, multi
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case, inputs
from lora_kernels.oracle.experts_case import ExpertsCase
from lora_kernels.oracle.multi_case import MultiCase
from tests.support.engines import check

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
needs_native = pytest.mark.skipif(native.module is None, reason="the native kernels were not built")


def choose(device: str = "cpu", dtype: torch.dtype = f32, rank: int = 8) -> Choice:
    return selection.choose(Problem(device, dtype, dtype, dtype, dtype, rank))


@needs_native
def test_choose_on_each_instruction_set_takes_the_kernels() -> None:
    assert choose(rank=256).backend == "cpu"
    before = native.isa
    try:
        for isa in (name for name in cases.engines() if name in native.ISAS):
            native.use_isa(isa)
            assert choose().backend == "cpu"
            assert choose().reason.split(";")[0].endswith(isa)
    finally:
        native.use_isa(before)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"rank": 257}, "257"), ({"dtype": f64}, "float64"), ({"device": "meta"}, "meta")],
    ids=str,
)
@needs_native
def test_choose_of_what_kernels_lack_is_eager_and_says_why(
    arguments: dict[str, object], word: str
) -> None:
    choice = choose(**arguments)
    assert choice.backend == "eager"
    assert word in choice.reason
    with lora_kernels.backend("cpu"), pytest.raises(RuntimeError, match=word):
        choose(**arguments)


class Processor(NamedTuple):
    isa: str
    amx: bool = False
    intel: bool = False


@pytest.fixture
def choose_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The choice on a processor for a problem of a dtype and rank 8; other fields by name."""

    def choose_on(on: Processor, dtype: torch.dtype, **fields: Any) -> Choice:
        values = {"isa": on.isa, "amx_bf16": on.amx, "intel": on.intel}
        for name, value in values.items():
            monkeypatch.setattr(native, name, value)
        return selection.choose(Problem("cpu", dtype, dtype, dtype, dtype, 8, **fields))

    return choose_on


FEW, FEW_QUANTIZED, FUSED, LIBRARY = cpu.GEMV, cpu.GEMV_QUANTIZED, cpu.FUSED, cpu.LIBRARY
AMX = Processor("amxbf16", amx=True, intel=True)
INTEL = Processor("avx512", intel=True)
BESIDE_AMX = Processor("avx512bf16", amx=True)  # oneDNN's, which this build lacks
CODES = {"is_quantized": True}


def sizes(columns: int, inner: int, **fields: Any) -> dict[str, Any]:
    return {"columns": columns, "inner": inner, **fields}


@needs_native
@pytest.mark.parametrize(
    ("on", "dtype", "fields", "strategies"),
    [
        (Processor("scalar"), f32, {}, {1: FEW, 5: LIBRARY}),
        (Processor("scalar"), bf16, {}, {1: LIBRARY}),
        (Processor("scalar"), bf16, CODES, {1: FEW_QUANTIZED, 9: LIBRARY}),
        (Processor("avx2"), f32, {}, {1: FEW, 33: LIBRARY}),
        (Processor("avx2"), bf16, CODES, {1: FEW_QUANTIZED, 33: LIBRARY}),
        (Processor("avx512"), f32, {}, {1: FEW, 17: FUSED}),
        (Processor("avx512"), bf16, {}, {1: FEW, 17: FUSED}),
        (Processor("avx512bf16"), f32, {}, {1: FEW, 17: FUSED}),
        (Processor("avx512bf16"), bf16, {}, {1: FEW, 17: FUSED}),
        (Processor("avx512bf16"), bf16, CODES, {1: FEW_QUANTIZED, 33: FUSED}),
        (BESIDE_AMX, f32, {}, {1: FEW, 17: FUSED}),
        (BESIDE_AMX, bf16, {}, {1: FEW, 17: LIBRARY}),
        (BESIDE_AMX, bf16, CODES, {1: FEW_QUANTIZED, 33: LIBRARY}),
        (Processor("amxbf16", amx=True), f32, {}, {1: FEW, 17: FUSED}),
        # AVX-512 decodes more rows of large weights as they are read: of 2²⁴ elements and more.
        (Processor("avx512bf16"), f32, sizes(4095, 4096, **CODES), {1: FEW_QUANTIZED, 17: FUSED}),
        (Processor("avx512bf16"), f32, sizes(2048, 8192, **CODES), {1: FEW_QUANTIZED, 33: FUSED}),
        (Processor("avx512"), f32, sizes(4096, 4096, **CODES), {1: FEW_QUANTIZED, 33: FUSED}),
        # Large float32 GEMMs on Intel are MKL's.
        (INTEL, f32, sizes(1000, 1000), {1: FEW, 17: FUSED, 280: LIBRARY}),
        (INTEL, f32, sizes(2000, 1000), {1: FEW, 17: FUSED, 140: LIBRARY}),
        (INTEL, f32, sizes(1000, 2000), {1: FEW, 17: FUSED, 140: LIBRARY}),
        (INTEL, f32, sizes(20_000, 7000), {1: FEW, 17: LIBRARY}),
        (INTEL, f32, sizes(1000, 1000, **CODES), {1: FEW_QUANTIZED, 17: FUSED}),
        (INTEL, bf16, sizes(1000, 1000), {1: FEW, 17: FUSED}),
        # Those beside AMX oneDNN's, float32 up to 127 rows.
        (AMX, bf16, sizes(20_000, 10_000), {1: FEW, 7: FUSED, 513: LIBRARY}),
        (AMX, bf16, sizes(10_000, 1000), {1: FEW, 7: FUSED, 1000: LIBRARY}),
        (AMX, bf16, sizes(10_000, 1000, **CODES), {1: FEW_QUANTIZED, 7: FUSED}),
        (AMX, f32, sizes(10_000, 1000), {1: FEW, 17: FUSED, 28: LIBRARY, 128: FUSED}),
        (AMX, f32, sizes(20_000, 7000), {1: FEW, 17: LIBRARY, 128: FUSED}),
        (AMX, f32, sizes(1000, 1000), {1: FEW, 17: FUSED}),
        (AMX, f32, sizes(4096, 4096, **CODES), {1: FEW_QUANTIZED, 12: FUSED}),
        # A weight of columns is not streamed.
        (Processor("avx512"), f32, {"layout": Layout(columns=True)}, {1: LIBRARY, 2: FUSED}),
        (Processor("avx2"), f32, {"layout": Layout(columns=True)}, {1: LIBRARY}),
    ],
    ids=str,
)
def test_choose_starts_each_strategy_at_its_row(
    choose_on: Any,
    on: Processor,
    dtype: torch.dtype,
    fields: dict[str, Any],
    strategies: dict[int, str],
) -> None:
    choose_on(on, dtype)  # on that processor from here on
    problem = Problem("cpu", dtype, dtype, dtype, dtype, 8, **fields)
    is_fused, last = on.isa in cpu.FUSED_ISAS, 1 << 17
    for first, strategy in reversed(strategies.items()):
        choice = selection.choose(problem._replace(rows=first))
        assert choice.strategy == selection.choose(problem._replace(rows=last)).strategy == strategy
        last = first - 1
        library = strategy == LIBRARY and is_fused and first > 1
        said = {
            "the library multiplies with AMX": library and on is BESIDE_AMX,
            "base GEMMs run in MKL or oneDNN": library and on is not BESIDE_AMX,
            "float32 as three bfloat16": "amx" in on.isa and dtype is f32 and first > 1,
        }
        assert {words: words in choice.reason for words in said} == said


@needs_native
def test_choose_on_another_processor_is_its_own(
    choose_on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No choice is kept beyond a change of the processor alone."""
    fields = sizes(1000, 1000, rows=300)
    for on, dtype, strategy in (
        (INTEL, f32, LIBRARY),
        (Processor("avx512"), f32, FUSED),
        (INTEL, f32, LIBRARY),
        (Processor("avx512", amx=True), bf16, LIBRARY),
        (Processor("avx512"), bf16, FUSED),
        (Processor("avx2"), f32, LIBRARY),
        (Processor("avx512"), f32, FUSED),
    ):
        assert choose_on(on, dtype, **fields).strategy == strategy
    monkeypatch.setattr(native, "reason", "not built")
    problem = Problem("cpu", f32, f32, f32, f32, 8, **fields)
    assert selection.choose(problem) == Choice("eager", LIBRARY, "not built")


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_choose_of_the_cpu_s_kernels_for_another_device_raises(device: str) -> None:
    """The reason is the device, not why the eager backend runs there."""
    problem, words = (
        Problem(device, f32, f32, f32, f32, 8),
        f"no kernels for device type {device!r}",
    )
    functions = (selection.choose, selection.choose_experts, selection.choose_norm)
    for function, eager in zip(functions, (LIBRARY, LIBRARY, Strategy.PANELS), strict=True):
        with lora_kernels.backend("cpu"), pytest.raises(RuntimeError, match=words):
            function(problem)
        assert (function(problem).backend, function(problem).strategy) == ("eager", eager)


@needs_native
@pytest.mark.parametrize("strategy", [None, *selection.STRATEGIES["cpu"]], ids=str)
def test_choose_experts_of_a_forced_strategy_takes_or_refuses_it(
    strategy: Strategy | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem("cpu", f32, f32, f32, f32, 8, is_quantized=True)
    for isa, own in (("avx512", FUSED), ("avx2", LIBRARY)):
        monkeypatch.setattr(native, "isa", isa)
        with lora_kernels.backend("cpu", strategy):
            if strategy in cpu.GEMVS:
                with pytest.raises(RuntimeError, match="want 'fused' or 'library'"):
                    selection.choose_experts(problem)
            elif strategy == FUSED != own:
                with pytest.raises(RuntimeError, match=r"want one of .* which is avx2"):
                    selection.choose_experts(problem)
            else:
                choice = selection.choose_experts(problem)
                assert (choice.backend, choice.strategy) == ("cpu", strategy or own)


def test_choose_of_a_gpu_s_problem_without_a_gpu_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A FakeTensor has the device's name alone; no property is read."""
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setattr(device, "gpu", lambda index: pytest.fail("read"))
    monkeypatch.setattr(verdicts, "current", lambda index: pytest.fail("read"))
    problem = Problem("cuda", *(bf16,) * 4, 16, 1, True, 64, 64)
    assert selection.choose(problem).backend == "eager"


def test_layout_of_a_cpu_s_weight_is_columns_or_nothing() -> None:
    W = torch.zeros(6, 8)
    assert selection.layout_of("cpu", W.t(), f32) == Layout(columns=True)
    for other in (W, W[:, :5], W[:, ::2], W.t()[::2], W[:1], None):
        assert selection.layout_of("cpu", other, f32) is None


@needs_native
def test_choose_of_a_forced_strategy_takes_or_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with lora_kernels.backend("cpu", cpu.LIBRARY):
        assert selection.choose(Problem("cpu", f32, f32, f32, f32, 8, 999)).strategy == cpu.LIBRARY
    with pytest.raises(ValueError, match="'two passes'"), lora_kernels.backend("cpu", "two passes"):
        pass
    monkeypatch.setattr(native, "isa", "avx2")
    with lora_kernels.backend("cpu", cpu.FUSED), pytest.raises(RuntimeError, match="avx2"):
        choose()
    with lora_kernels.backend("cpu", cpu.GEMV):
        assert selection.choose(Problem("cpu", f32, f32, f32, f32, 8, 32)).strategy == cpu.GEMV
        with pytest.raises(RuntimeError, match="at most 32 rows"):
            selection.choose(Problem("cpu", f32, f32, f32, f32, 8, 33))
        with pytest.raises(RuntimeError, match="want a dense weight"):
            selection.choose(Problem("cpu", f32, f32, f32, f32, 8, 1, True))
        columns = Problem("cpu", f32, f32, f32, f32, 8, 1, layout=Layout(columns=True))
        with pytest.raises(RuntimeError, match="rows are contiguous"):
            selection.choose(columns)
    with (
        lora_kernels.backend("cpu", cpu.GEMV_QUANTIZED),
        pytest.raises(RuntimeError, match="quantized"),
    ):
        choose()


def test_lora_linear_of_a_rank_above_the_kernels_is_within_tolerance() -> None:
    check(Case(33, 65, 63, 257, gate=True))


@needs_native
def test_backend_of_nested_contexts_is_the_inner_one() -> None:
    with lora_kernels.backend("eager"):
        assert choose().backend == "eager"
        assert "requested" in choose().reason
        with lora_kernels.backend("cpu"):  # the inner one wins
            assert choose().backend == "cpu"
        assert choose().backend == "eager"
    with pytest.raises(ValueError, match="tritn"):  # at the call, not where it is entered
        lora_kernels.backend("tritn")


@pytest.mark.parametrize("compiling", [False, True])
def test_forced_backend_ends_with_its_context(
    compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an error. Compiled functions read it from a global, eager ones of their thread."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    before = selection.forced_backend()
    with lora_kernels.backend("eager"):
        with pytest.raises(KeyError), lora_kernels.backend("cpu"):
            assert selection.forced_backend() == "cpu"
            raise KeyError
        assert selection.forced_backend() == "eager"
    assert selection.forced_backend() == before


@pytest.mark.parametrize(("value", "said"), [("eager", "eager\n"), ("tritn", "got 'tritn'")])
def test_forced_backend_follows_the_environment(value: str, said: str) -> None:
    code = "from lora_kernels.choice.choose import forced_backend as f; print(f())"
    environment = {**os.environ, "LORA_KERNELS_BACKEND": value}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert said in done.stdout + done.stderr


def test_choose_without_the_extension_is_eager_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "reason", "not built: no compiler")
    assert choose() == Choice("eager", choose().strategy, "not built: no compiler")
    args = inputs(Case(3, 5, 7, 2))
    args.pop("dy")
    with lora_kernels.backend("cpu"), pytest.raises(RuntimeError, match="no compiler"):
        lora_kernels.lora_linear(**args)


class RecordedBackend:
    """A backend that says when it is called."""

    def __init__(self, name: str, module: Any, taken: list[str]) -> None:
        self.name, self.module, self.taken = name, module, taken

    def __getattr__(self, op: str) -> Callable[..., Any]:
        direction = "backward" if op.endswith("backward") else "forward"

        def call(*args: Any) -> Any:
            self.taken.append(f"{self.name} {direction}")
            return getattr(self.module, op)(*args)

        return call


def observe(dispatched: bool) -> contextlib.AbstractContextManager[Any]:
    """A mode that ops are dispatched under, if `dispatched`."""
    return FlopCounterMode(display=False) if dispatched else contextlib.nullcontext()


def backward_elsewhere(
    forward: Callable[[], torch.Tensor],
    leaves: list[torch.Tensor],
    dy: torch.Tensor,
    dispatched: str,
) -> tuple[list[str], list[torch.Tensor]]:
    """Forward by the eager backend; backward outside of the `with`, in another thread, as a GPU's
    is. `dispatched` names the directions that run by the dispatcher, or "compiled" for both.
    Returns what was called, and the gradients."""
    taken: list[str] = []
    got: list[torch.Tensor] = []

    def backward() -> None:
        with observe("backward" in dispatched):
            got.extend(torch.autograd.grad(y, leaves, dy))

    with pytest.MonkeyPatch.context() as patch:
        for backends in (linear.BACKENDS, multi.BACKENDS, experts.BACKENDS):
            for name, module in list(backends.items()):
                patch.setitem(backends, name, RecordedBackend(name, module, taken))
        with lora_kernels.backend("eager"), observe("forward" in dispatched):
            run = forward
            if dispatched == "compiled":
                torch.compiler.reset()
                run = torch.compile(forward, backend="aot_eager", fullgraph=True)
            y = run()
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    return taken, got


direct_or_dispatched = pytest.mark.parametrize(
    "dispatched", [False, True], ids=["alone", "under a mode"]
)


CALLS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], dict[str, Any]]]] = {
    "lora_linear": (lora_kernels.lora_linear, lambda: inputs(Case(5, 9, 7, 3))),
    "recompute": (
        lora_kernels.lora_linear,
        lambda: inputs(Case(5, 9, 7, 3)) | {"recompute": True},
    ),
    "multi_lora_linear": (
        lora_kernels.multi_lora_linear,
        lambda: inputs(MultiCase(9, 7, 5, rows="mixed", dropout_p=0.5)),
    ),
    "lora_experts_linear": (
        lora_kernels.lora_experts_linear,
        lambda: inputs(ExpertsCase((2, 3), 9, 7, 3)),
    ),
}


@pytest.mark.parametrize("dispatched", ["", "backward", "forward", "forward, backward", "compiled"])
@pytest.mark.parametrize("name", CALLS)
def test_backward_in_another_thread_follows_its_forward(name: str, dispatched: str) -> None:
    function, make = CALLS[name]
    args = make()
    dy = args.pop("dy")
    adapters = (args[n] if isinstance(args[n], list) else [args[n]] for n in ("lora_A", "lora_B"))
    leaves = [args["x"], *itertools.chain(*adapters)]
    want = torch.autograd.grad(function(**args), leaves, dy)
    taken, got = backward_elsewhere(lambda: function(**args), leaves, dy, dispatched)
    assert taken == ["eager forward"] * (1 + (name == "recompute")) + ["eager backward"]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@needs_native
@direct_or_dispatched
def test_lora_linear_backward_outside_keeps_the_strategy(
    monkeypatch: pytest.MonkeyPatch, dispatched: bool
) -> None:
    """The backward takes the strategy of the forward, not one for its own rows."""
    taken: list[str] = []
    monkeypatch.setattr(
        cpu, "lora_linear_backward", lambda *args: taken.append(args[5]) or kept(*args)
    )
    args = inputs(Case(40, 9, 7, 3))
    dy = args.pop("dy")
    with lora_kernels.backend("cpu", cpu.LIBRARY):
        y = lora_kernels.lora_linear(**args, recompute=True)
    with FlopCounterMode(display=False) if dispatched else contextlib.nullcontext():
        torch.autograd.grad(y, args["x"], dy)
    assert taken == [cpu.LIBRARY]


kept = cpu.lora_linear_backward


@needs_native
@direct_or_dispatched
def test_lora_linear_recomputes_p_by_the_backend_alone(dispatched: bool) -> None:
    """P has no base GEMM, so the strategy of 4-bit weights cannot run there."""
    args = inputs(Case(2, 32, 64, 3, quant="nf4-64"))
    dy = args.pop("dy")
    with lora_kernels.backend("cpu", cpu.GEMV_QUANTIZED):
        y = lora_kernels.lora_linear(**args, recompute=True)
        (want,) = torch.autograd.grad(lora_kernels.lora_linear(**args), args["lora_B"], dy)
    with FlopCounterMode(display=False) if dispatched else contextlib.nullcontext():
        assert torch.equal(torch.autograd.grad(y, args["lora_B"], dy)[0], want)


@needs_native
def test_fused_kernel_computes_dx_of_every_strategy_but_the_librarys_and_one_dense_row() -> None:
    want = {
        FUSED: [True, True],
        LIBRARY: [False, False],
        FEW: [False, True],
        FEW_QUANTIZED: [True] * 2,
    }
    for isa in (name for name in cases.engines() if name in native.ISAS):
        with cases.engine(isa):
            found = {s: [cpu._is_dx_fused(s, M) for M in (1, 2)] for s in cpu.STRATEGIES}
        if isa in cpu.FUSED_ISAS:
            assert found == want
        else:
            assert not any(itertools.chain(*found.values()))


@needs_native
@pytest.mark.parametrize("is_quantized", [False, True])
def test_few_rows_of_each_instruction_set_is_positive_and_of_another_raises(
    is_quantized: bool,
) -> None:
    """0 would leave its GEMV kernels unused in silence."""
    for isa in native.ISAS:
        assert heuristics.few_rows(torch.float32, is_quantized, 0, isa=isa) > 0
    with pytest.raises(ValueError, match="avx1024"):
        heuristics.few_rows(torch.float32, is_quantized, 0, isa="avx1024")
