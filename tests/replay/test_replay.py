"""A replay launches what the call launches as it is written, on fresh memory, and no more."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.backends import cuda, replay, triton, workspace
from lora_kernels.backends.triton import FUSED
from lora_kernels.choice.verdicts import Group
from lora_kernels.core.call import Needs, Operands, Saved, Spec
from lora_kernels.core.device import DeviceInfo
from lora_kernels.qualification import claims
from lora_kernels.quantization import quantize_4bit
from tests.support.allocations import Allocations
from tests.support.emulator import emulator_unavailable_reason
from tests.support.fake_driver import STREAM, Log, cpu_as_gpu, fake_cuda, fake_triton
from tests.support.problems import bf16, f32

pytestmark = pytest.mark.skipif(triton.is_interpreted(), reason="the interpreter compiles nothing")
needs_triton = pytest.mark.skipif(
    triton.unavailable_reason() is not None, reason="Triton is not installed"
)


TWO_PASS = cuda.TWO_PASS


class Call(NamedTuple):
    """The arguments of a backend's function by its name, and how many tensors it returns."""

    function: str
    strategy: str
    M: int = 40
    dtype: torch.dtype = f32
    quant: bool = False
    options: bool = False
    need_gate: bool = False
    scaling: float = 2.0

    @property
    def results(self) -> int:
        if "backward" not in self.function:
            return 2 + self.options
        return 3 + (2 if self.options else 0)

    def args(self, seed: int = 0) -> tuple[Any, ...]:
        M, N, K, R = self.M, 64, 128, 8
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        weight: Any = draw(N, K)
        if self.quant:
            weight = quantize_4bit(weight, "nf4", 64).codes
        extra: tuple[Any, ...] = None, None, None
        if self.options:
            extra = draw(R, dtype=f32), draw(N, dtype=f32), draw(N)
        spec = Spec(self.scaling, 0.0, self.dtype, self.dtype, save_z=self.options)
        operands = Operands(draw(M, K), weight, draw(R, K), draw(N, R), *extra)
        if "backward" not in self.function:
            return operands, spec, self.strategy
        saved = Saved(draw(M, R, dtype=f32), draw(M, N) if self.options else None)
        needs = Needs(True, True, True, self.need_gate, self.options, self.options)
        return draw(M, N), operands._replace(bias=None), saved, spec, needs, self.strategy


FORWARD, BACKWARD = "lora_linear", "lora_linear_backward"
TRITON_CALLS = [
    Call(FORWARD, FUSED),
    Call(FORWARD, TWO_PASS, quant=True, options=True),
    Call(BACKWARD, FUSED, M=300, dtype=bf16),
    Call(BACKWARD, TWO_PASS, options=True),
]
CUDA_CALLS = [
    Call(FORWARD, cuda.COOPERATIVE, M=3, dtype=bf16, quant=True, options=True),
    Call(FORWARD, cuda.TWO_PASS, dtype=bf16, options=True),
    Call(FORWARD, cuda.TWO_PASS, quant=True, dtype=bf16),
    Call(BACKWARD, cuda.TWO_PASS, dtype=bf16),
    Call(BACKWARD, cuda.COOPERATIVE, M=3, quant=True, dtype=bf16),
]


def run(backend: Any, call: Call, seed: int = 0) -> tuple[tuple[Any, ...], Any]:
    """The arguments and the result."""
    args = call.args(seed)
    return args, getattr(backend, call.function)(*args)


def run_thrice(backend: Any, call: Call) -> None:
    """Run the call as written, record it, and replay it."""
    for _ in range(3):
        run(backend, call)


def is_replayed(log: Log, call: Callable[[], object]) -> bool:
    """Run the call; return whether it bound no arguments to a kernel."""
    bound = log.bound
    call()
    return log.bound == bound


def labelled(args: Any, result: Any, log: Log) -> list[Any]:
    """The launches, with the names of operands, results and temporaries for addresses."""
    tensors = [*replay.tensors_of(args)], [*replay.tensors_of(result)]
    names = {t.data_ptr(): f"operand {i}" for i, t in enumerate(tensors[0])}
    names |= {t.data_ptr(): f"result {i}" for i, t in enumerate(tensors[1])}
    names[workspace.flags(torch.device("cpu")).data_ptr()] = "flags"

    def label(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(label, value))
        if isinstance(value, Tensor):
            value = value.data_ptr()
        if type(value) is int and value >= 1 << 32:
            return names.setdefault(value, f"temporary {len(names)}")
        return value

    return [label(launch) for launch in log.launches]


@pytest.fixture
def log() -> Iterator[Log]:
    with fake_triton() as log:
        yield log


@needs_triton
@pytest.mark.parametrize("call", TRITON_CALLS, ids=str)
def test_triton_launches_as_written(log: Log, call: Call) -> None:
    """The third call binds no arguments, and allocates its results and one workspace."""
    want = labelled(*run(triton, call), log)
    assert want and all(stream == STREAM for _, _, stream, _ in want)
    run(triton, call, seed=1)
    for seed in (2, 3):
        log.launches.clear()
        args, bound = call.args(seed), log.bound
        with Allocations() as made:
            result = getattr(triton, call.function)(*args)
        assert labelled(args, result, log) == want
        assert log.bound == bound
        assert len(made.sizes) <= call.results + 1
        shapes = [(t.shape, t.dtype, t.stride()) for t in replay.tensors_of(result)]
        _, expected = run(triton, call._replace(scaling=3.0))
        assert shapes == [(t.shape, t.dtype, t.stride()) for t in replay.tensors_of(expected)]
        assert type(result) is type(expected)


@needs_triton
@pytest.mark.parametrize(
    "change",
    [{"M": 41}, {"dtype": torch.float16}, {"scaling": 1.5}, {"strategy": FUSED}, {"options": True}],
    ids=str,
)
def test_signature_of_another_call_is_another(log: Log, change: dict[str, Any]) -> None:
    call = Call(FORWARD, TWO_PASS)
    run_thrice(triton, call)
    log.launches.clear()
    args, result = run(triton, call._replace(**change))
    got = labelled(args, result, log)
    replay.forget()
    log.launches.clear()
    assert got and got == labelled(*run(triton, call._replace(**change)), log)


@needs_triton
@pytest.mark.parametrize("field", ["x", "weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("layout", ["strided", "unaligned", "narrow"])
def test_signature_has_strides_alignment_and_dtype(log: Log, field: str, layout: str) -> None:
    operands, *rest = Call(FORWARD, TWO_PASS).args()
    for _ in range(3):
        triton.lora_linear(operands, *rest)
    t = getattr(operands, field)
    other = t.repeat(1, 2)[:, : t.shape[1]]
    if layout == "unaligned":
        shift = 8 // t.element_size()  # Triton reads 16 bytes at once
        other = torch.cat([t.flatten()[:shift], t.flatten()])[shift:].view(t.shape)
    if layout == "narrow":
        other = t.to(bf16)
    operands = operands._replace(**{field: other})
    assert not is_replayed(log, lambda: triton.lora_linear(operands, *rest))


@needs_triton
def test_small_kernel_is_launched_as_written(log: Log) -> None:
    """Triton's interface alone: the kernel compiles with every version. Unused memory is spared."""
    import triton.language as tl

    from tests.replay.small_kernel import scaled

    xs = [torch.randn(5, 40) for _ in range(4)]
    want = None
    for i, x in enumerate(xs):
        log.launches.clear()
        bound = log.bound
        with Allocations() as made:
            y = scaled(x, "")
        got = labelled((x,), y, log)
        want = want or got
        assert got == want and got
        assert (log.bound > bound) is (i < 2)
        assert i < 2 or made.sizes == [x.numel()]
    ((name, grid, stream, args),) = want
    assert (name, grid, stream) == ("scale_kernel", (4, 1, 1), STREAM)
    assert args == ("operand 0", 40, 1, None, "result 0", 200, 2.0, tl.float32, 64)


@needs_triton
def test_temporaries_lie_apart_and_aligned(log: Log) -> None:
    """Also if the call itself frees one before it allocates the next at its address."""
    from tests.replay.small_kernel import scaled

    for _ in range(3):
        y = scaled(torch.randn(5, 40), "temporaries")
    first, second, result = (args[4] for *_, args in log.launches[-3:])
    assert second - first == 1024  # 820 bytes in whole 256
    assert result == y.data_ptr()


@needs_triton
def test_result_by_columns_is_so_again(log: Log) -> None:
    from tests.replay.small_kernel import scaled

    strides = {scaled(torch.randn(5, 40), "a result by columns").stride() for _ in range(4)}
    assert strides == {(1, 5)} and log.bound == 2


@needs_triton
def test_call_that_raises_leaves_no_recorder(log: Log) -> None:
    """Or it would note the launches of other functions."""
    from tests.replay.small_kernel import scaled

    for _ in range(2):
        with pytest.raises(RuntimeError, match="an error"):
            scaled(torch.randn(5, 40), "an error")
    assert replay.current_recorder() is None


@pytest.mark.parametrize("backend", [pytest.param(triton, marks=needs_triton), cuda], ids=str)
def test_replay_is_launched_on_the_stream_of_its_call(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_triton() if backend is triton else fake_cuda() as log:
        run_thrice(backend, Call(BACKWARD, TWO_PASS))
        log.launches.clear()
        monkeypatch.setattr(replay, "current_stream", lambda index: STREAM + 1)
        run(backend, Call(BACKWARD, TWO_PASS))
        assert {stream for _, _, stream, _ in log.launches} == {STREAM + 1}
        monkeypatch.undo()


def test_replay_takes_the_flags_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches at once would clear each other's."""
    call, other = Call(FORWARD, cuda.COOPERATIVE, M=1, dtype=bf16), torch.zeros(2).int()
    with fake_cuda() as log:
        run_thrice(cuda, call)
        log.launches.clear()
        monkeypatch.setattr(workspace, "flags", lambda device: other)
        run(cuda, call)
        assert str(other.data_ptr()) in str(log.launches)
        monkeypatch.undo()


@needs_triton
def test_replay_of_what_never_waits_takes_no_flags(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a captured graph they would be cleared in a node of their own."""
    run_thrice(triton, Call(FORWARD, FUSED))
    monkeypatch.delattr(workspace, "flags")
    run(triton, Call(FORWARD, FUSED))


@needs_triton
def test_signature_has_the_device(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled kernel is loaded into one GPU."""
    run_thrice(triton, Call(FORWARD, FUSED))
    monkeypatch.setattr(Tensor, "get_device", lambda t: 1)
    monkeypatch.setattr(replay, "is_current_device", lambda index: index == 1)
    monkeypatch.setattr(replay, "current_stream", lambda index: STREAM)
    assert not is_replayed(log, lambda: run(triton, Call(FORWARD, FUSED)))


def test_cuda_launches_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may be current."""
    with fake_cuda() as log:
        monkeypatch.setattr(Tensor, "get_device", lambda t: 1)
        monkeypatch.setattr(replay, "is_current_device", lambda index: index == 1)
        monkeypatch.setattr(replay, "current_stream", lambda index: {1: 9}[index])
        for _ in range(4):
            run(cuda, Call(BACKWARD, TWO_PASS))
        assert {stream for _, _, stream, _ in log.launches} == {9}
        monkeypatch.undo()


def test_stream_and_device_are_those_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(index: int = 1) -> Any:
        return SimpleNamespace(cuda_stream=10 + index)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    assert [replay.current_stream(i) for i in (0, 1)] == [10, 11]
    assert [replay.is_current_device(i) for i in (0, 1)] == [False, True]


def test_flags_are_of_one_stream_of_a_device_or_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that run at once never share them."""
    zeros, capturing = torch.zeros, False

    def flags(index: int, stream: int) -> Tensor:
        def current(device: torch.device | None = None) -> Any:
            return SimpleNamespace(cuda_stream=stream if device else 0)

        monkeypatch.setattr(torch.cuda, "current_stream", current)
        return workspace.flags(torch.device("cuda", index))

    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(workspace, "_flags", {})
    made = [flags(0, 1), flags(0, 2), flags(1, 1)]
    capturing = True
    made += [flags(0, 1), flags(0, 1)]
    capturing = False
    assert len({t.data_ptr() for t in made}) == 5
    assert all(t.shape == (2 + workspace.MAX_BLOCKS,) and t.dtype is torch.int32 for t in made)
    assert flags(0, 1) is made[0] and flags(1, 1) is made[2]


@needs_triton
@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("a result in place", "it calls aten.zero_.default"),
        ("a part as result", "a result is part of another tensor"),
        ("a part as operand", "a kernel gets part of an operand, or there is none"),
        ("no launch", "a kernel gets part of an operand, or there is none"),
    ],
)
def test_function_that_does_more_runs_as_written(
    log: Log, caplog: pytest.LogCaptureFixture, way: str, reason: str
) -> None:
    from tests.replay.small_kernel import scaled

    caplog.set_level(logging.INFO, "lora_kernels")
    for _ in range(3):
        scaled(torch.randn(5, 40), way)
    assert log.bound == (0 if way == "no launch" else 3)
    assert caplog.messages == [f"scaled is not replayed: {reason}"]


@needs_triton
def test_call_with_another_product_runs_as_written(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lora_kernels")
    call = Call(BACKWARD, TWO_PASS, need_gate=True)
    assert not any(is_replayed(log, lambda: run(triton, call)) for _ in range(3))
    (message,) = caplog.messages
    assert message.startswith("lora_linear_backward is not replayed: it calls aten.mul")


@needs_triton
def test_operands_that_share_memory_run_as_written(log: Log) -> None:
    """An address would belong to two operands."""
    operands, *rest = Call(FORWARD, TWO_PASS).args()
    shared = operands._replace(bias=operands.lora_B[:, 0].contiguous().clone())
    shared = shared._replace(column_scale=shared.bias)
    assert not any(is_replayed(log, lambda: triton.lora_linear(shared, *rest)) for _ in range(3))


@needs_triton
def test_unknown_triton_runs_as_written(
    log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lora_kernels.backends.triton import launch

    caplog.set_level(logging.INFO, "lora_kernels")
    launch.unreplayable_reason.cache_clear()
    monkeypatch.setattr(launch, "_LAUNCH", "kernel.run(grid_0, grid_1, grid_2, device, stream)")
    assert not any(is_replayed(log, lambda: run(triton, Call(FORWARD, FUSED))) for _ in range(3))
    launch.unreplayable_reason.cache_clear()
    assert "in a way not known here" in caplog.text


@needs_triton
@pytest.mark.parametrize("when", ["enter", "exit"])
def test_profilers_get_tensors(log: Log, when: str) -> None:
    from triton import knobs

    run_thrice(triton, Call(FORWARD, FUSED))
    seen: list[Any] = []
    hook = getattr(knobs.runtime, f"launch_{when}_hook")
    if hook is None:
        hooked: Any = mock.patch.object(knobs.runtime, f"launch_{when}_hook", seen.append)
    else:
        hooked = mock.patch.object(hook, "calls", [seen.append])
    log.launches.clear()
    with hooked:
        run(triton, Call(FORWARD, FUSED))
    assert isinstance(log.launches[0][3][0], Tensor)


@needs_triton
def test_nothing_is_launched_while_kernels_are_only_compiled(log: Log) -> None:
    from lora_kernels.backends.triton import launch

    run_thrice(triton, Call(FORWARD, FUSED))
    count = len(log.launches)
    with launch.compile_only(0, 1):
        run_thrice(triton, Call(FORWARD, FUSED))
    assert len(log.launches) == count
    replayed = [is_replayed(log, lambda: run(triton, Call(FORWARD, FUSED))) for _ in range(3)]
    assert len(log.launches) == count + 3 and replayed[-1]


@needs_triton
def test_parts_compile_each_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import JITFunction

    from lora_kernels.backends.triton import launch
    from tests.replay.small_kernel import CONFIG, scale

    found: list[tuple[torch.dtype, int]] = []

    def warmup(_: Any, *, y_ptr: Tensor, num_warps: int, **rest: Any) -> None:
        found.append((y_ptr.dtype, num_warps))

    def compile_part(part: int, parts: int) -> list[tuple[torch.dtype, int]]:
        found.clear()
        with launch.compile_only(part, parts):
            for dtype, warps in [*itertools.product((f32, bf16), (4, 8))] * 2:
                x, config = torch.ones(5, 40, dtype=dtype), replace(CONFIG, warps=warps)
                scale(x, torch.empty_like(x), config)
        return found.copy()

    monkeypatch.setattr(JITFunction, "warmup", warmup)
    whole = compile_part(0, 1)
    assert whole == [(f32, 4), (f32, 8), (bf16, 4), (bf16, 8)]
    parts = [compile_part(part, 3) for part in range(3)]
    assert [len(part) for part in parts] == [2, 1, 1] and {*itertools.chain(*parts)} == {*whole}


@needs_triton
def test_call_that_is_captured_is_not_recorded(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph gets flags of its own."""
    monkeypatch.setattr(workspace, "is_capturing", lambda device: True)
    run_thrice(triton, Call(FORWARD, FUSED))
    assert log.bound == 3
    monkeypatch.undo()


@needs_triton
def test_device_of_the_tensors_is_made_current(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    current, entered = -1, []

    class Device(nullcontext[None]):
        def __init__(self, index: int) -> None:
            entered.append(index)

        def __enter__(self) -> None:
            nonlocal current
            current = -1

    monkeypatch.setattr(replay, "is_current_device", lambda index: index == current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    run_thrice(triton, Call(FORWARD, FUSED))
    assert entered == []
    current = 0
    run(triton, Call(FORWARD, FUSED))
    assert entered == [-1]


@needs_triton
def test_signatures_are_bounded(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_SIGNATURES", 4)
    for M in range(20, 40):
        run(triton, Call(FORWARD, FUSED, M=M))
        assert max(map(len, replay._caches)) <= 4


@needs_triton
def test_threads_record_calls_of_their_own(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd runs the backward in another thread, while the forward of another layer runs."""
    from lora_kernels.backends.triton import launch

    run(triton, Call(FORWARD, FUSED))
    inside, outside = threading.Event(), threading.Event()
    original = launch.target

    def target(x: Tensor) -> DeviceInfo:
        if threading.current_thread() is thread:
            inside.set()
            outside.wait(60)
        return original(x)

    monkeypatch.setattr(launch, "target", target)
    thread = threading.Thread(target=run, args=(triton, Call(FORWARD, FUSED)))
    thread.start()
    inside.wait(60)
    assert replay.current_recorder() is None
    run(triton, Call(FORWARD, TWO_PASS))
    outside.set()
    thread.join()
    assert is_replayed(log, lambda: run(triton, Call(FORWARD, FUSED)))


# The CUDA kernels, which the emulator runs.


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Run the launches of replays in the emulator; the names of all launches."""
    if (reason := emulator_unavailable_reason()) is not None:
        pytest.skip(reason)
    from lora_kernels.backends.cuda import launch

    names: list[str] = []
    with cuda.emulate(7) as emulator, cpu_as_gpu() as patch:

        class Emulator:
            def __getattr__(self, name: str) -> Any:
                value = getattr(emulator, name)

                def call(args: Any, at: tuple[int, int]) -> Any:
                    names.append(name)
                    emulator.allow_ranges((("all", 0, 1 << 62),))
                    out = value(args, (at[0], 0))
                    emulator.synchronize()
                    return out

                return value if name.isupper() or name == "decode_plan" else call

        patch.setattr(launch, "module", Emulator)
        patch.setattr(launch, "is_emulated", lambda: False)
        yield names


def flags_are_clear() -> bool:
    return not workspace.flags(torch.device("cpu")).any()


@pytest.mark.parametrize("call", CUDA_CALLS, ids=str)
def test_cuda_results_are_those_of_the_call_as_written(emulated: list[str], call: Call) -> None:
    """Each call has other operands, and poisoned memory for what it allocates."""
    wants = []
    for seed in range(4):
        replay.forget()
        wants.append(run(cuda, call, seed)[1])
    count, launches = len(emulated), len(emulated) // 4
    replay.forget()
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
    try:
        for seed, want in enumerate(wants):
            with mock.patch.object(replay, "Recorder", side_effect=replay.Recorder) as made:
                _, got = run(cuda, call, seed)
            assert made.called == (seed == 1)
            assert flags_are_clear()
            assert_same(got, want)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(emulated) == count + 4 * launches


def assert_same(got: Any, want: Any) -> None:
    """Compare nested tuples: their classes, the tensors' bits, and what else is in them."""
    assert type(got) is type(want), (got, want)
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want) and got.dtype is want.dtype
    elif isinstance(want, tuple):
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    else:
        assert got == want


@pytest.mark.parametrize("with_options", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("strategy", "M"), [("cooperative", 3), ("two_pass", 40)])
def test_training_steps_by_replays_have_the_gradients_of_the_call_as_written(
    strategy: str, M: int, quantized: bool, with_options: bool, emulated: list[str]
) -> None:
    torch.manual_seed(0)
    N, K, R = 64, 128, 4
    W: Any = torch.randn(N, K, dtype=bf16)
    W = quantize_4bit(W) if quantized else W
    sizes = {"x": (M, K), "lora_A": (R, K), "lora_B": (N, R)}
    if with_options:
        sizes |= {"rank_gate": (R,), "column_scale": (N,), "bias": (N,)}
    args = {name: torch.randn(s, dtype=bf16).requires_grad_() for name, s in sizes.items()}
    dy = torch.randn(M, N, dtype=bf16)
    replay.forget()
    steps = []
    with (
        lora_kernels.backend("cuda", strategy),
        mock.patch.object(
            replay.Replay, "__call__", autospec=True, side_effect=replay.Replay.__call__
        ) as replayed,
    ):
        for _ in range(4):
            y = lora_kernels.lora_linear(weight=W, scaling=0.5, **args)
            steps.append((y.detach(), *torch.autograd.grad(y, list(args.values()), dy)))
    assert replayed.call_count >= 2  # a forward twice, at least
    for step in steps[1:]:
        assert_same(step, steps[0])


@pytest.mark.parametrize("call", CUDA_CALLS, ids=str)
def test_cuda_allocates_results_and_one_workspace(call: Call) -> None:
    with fake_cuda() as log:
        run(cuda, call)
        run(cuda, call)
        count = len(log.launches)
        args = call.args(2)
        with Allocations() as made:
            getattr(cuda, call.function)(*args)
        assert 0 < len(log.launches) - count == count // 2
        assert len(made.sizes) <= call.results + 1
        assert {stream for _, _, stream, _ in log.launches} == {STREAM}


def test_qualification_compares_a_replay(
    emulated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card: Any = SimpleNamespace(device="cpu", synchronize=lambda: None, repeats=10)
    card.whole, card.many = (208, 192), (70, 264, 64)
    group = Group("cuda", "two_pass", "bfloat16", "bfloat16", "4bit")
    assert claims.memory(card, group) is None
    original = replay.Replay.__call__

    def wrong(self: replay.Replay, tensors: list[Tensor]) -> Any:
        result = original(self, tensors)
        next(replay.tensors_of(result)).neg_()
        return result

    monkeypatch.setattr(replay.Replay, "__call__", wrong)
    assert claims.memory(card, group) == "y has other bits in a replay of its launches"
