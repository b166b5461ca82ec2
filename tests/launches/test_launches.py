"""A plan launches in each call what its first one does, on fresh memory, and no more."""

from __future__ import annotations

import functools
import itertools
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
from lora_kernels.backends import cuda, decoder, launches, triton, workspace
from lora_kernels.backends.triton import FUSED
from lora_kernels.bench.stub_drivers import stub_launches
from lora_kernels.core.call import Needs, Operands, Saved, Spec
from lora_kernels.core.device import DeviceInfo
from lora_kernels.oracle import forms
from lora_kernels.quantization import QuantizedWeight, quantize_4bit
from tests.support.allocations import Allocations
from tests.support.emulator import emulator_unavailable_reason
from tests.support.fake_driver import STREAM, Log, fake_cuda, fake_triton
from tests.support.problems import bf16, f16, f32

pytestmark = pytest.mark.skipif(triton.is_interpreted(), reason="the interpreter compiles nothing")
needs_triton = pytest.mark.skipif(
    triton.unavailable_reason() is not None, reason="Triton is not installed"
)


class Call(NamedTuple):
    """The arguments of a backend's function by its name."""

    backend: Any
    function: str
    strategy: str
    M: int = 40
    dtype: torch.dtype = f32
    quant: bool = False
    options: bool = False
    need_gate: bool = False
    scaling: float = 2.0
    compute: torch.dtype | None = None  # of the base GEMM, under autocast

    def __str__(self) -> str:
        name = self.backend.__name__.rpartition(".")[2]
        return " ".join(map(str, (name, *self[1:])))

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
        compute = self.compute or self.dtype
        spec = Spec(self.scaling, 0.0, compute, compute, save_z=self.options)
        operands = Operands(draw(M, K), weight, draw(R, K), draw(N, R), *extra)
        if self.function == FORWARD:
            return operands, spec, self.strategy
        saved = Saved(draw(M, R, dtype=f32), draw(M, N) if self.options else None)
        needs = Needs(True, True, True, self.need_gate, self.options, self.options)
        return draw(M, N), operands._replace(bias=None), saved, spec, needs, self.strategy

    def run(self, seed: int = 0) -> tuple[tuple[Any, ...], Any]:
        """The arguments and the result."""
        args = self.args(seed)
        return args, getattr(self.backend, self.function)(*args)


FORWARD, BACKWARD = "lora_linear", "lora_linear_backward"
TRITON_CALLS = [
    Call(triton, FORWARD, FUSED),
    Call(triton, FORWARD, FUSED, quant=True, options=True),
    Call(triton, BACKWARD, FUSED, M=300, dtype=bf16),
    Call(triton, BACKWARD, FUSED, options=True, need_gate=True),
]
CUDA_CALLS = [
    Call(cuda, FORWARD, cuda.COOPERATIVE, M=3, dtype=bf16, quant=True, options=True),
    Call(cuda, FORWARD, cuda.COOPERATIVE, M=3, compute=bf16),
    Call(cuda, FORWARD, cuda.TWO_PASS, dtype=bf16, options=True),
    Call(cuda, FORWARD, cuda.TWO_PASS, quant=True, dtype=bf16),
    Call(cuda, BACKWARD, cuda.TWO_PASS, dtype=bf16),
    Call(cuda, BACKWARD, cuda.TWO_PASS, options=True, need_gate=True, dtype=bf16),
    Call(cuda, BACKWARD, cuda.COOPERATIVE, M=3, quant=True, dtype=bf16),
]
CALLS = [*(pytest.param(call, marks=needs_triton) for call in TRITON_CALLS), *CUDA_CALLS]
ONE = Call(triton, FORWARD, FUSED)
DECODED: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "nf4": lambda values: quantize_4bit(values, "nf4", double_quant=False),
    "nested nf4": lambda values: quantize_4bit(values, "nf4"),
    "mxfp4": lambda values: quantize_4bit(values, "mxfp4"),
    "nvfp4 of experts": lambda values: quantize_4bit(values, "nvfp4"),
    **{
        form: functools.partial(forms.build, quant=form)
        for form in ("int4-32-half-shift", "int4-16-nested-shift", "uint8-32-shift", "e4m3-32-half")
    },
}


def is_planned(log: Log, call: Callable[[], object]) -> bool:
    """Run the call; return whether it bound arguments to a kernel."""
    bound = log.bound
    call()
    return log.bound > bound


def tensors_of(value: Any) -> list[Tensor]:
    return launches.tensors_of((value,))


def labelled(args: Any, result: Any, log: Log) -> list[Any]:
    """The launches, with the names of operands, results and temporaries for addresses."""
    names = {t.data_ptr(): f"operand {i}" for i, t in enumerate(tensors_of(args))}
    names |= {t.data_ptr(): f"result {i}" for i, t in enumerate(tensors_of(result))}
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


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_calls_after_the_first_launch_the_same_and_bind_nothing(call: Call) -> None:
    with fake_triton() if call.backend is triton else fake_cuda() as log:
        want: Any = None
        for seed in range(4):
            log.launches.clear()
            args, bound = call.args(seed), log.bound
            with Allocations() as made:
                result = getattr(call.backend, call.function)(*args)
            shapes = [(t.shape, t.dtype, t.stride()) for t in tensors_of(result)]
            got = labelled(args, result, log), type(result), shapes, sorted(made.sizes)
            want = want or got
            assert got == want and got[0]
            assert seed == 0 or log.bound == bound
            assert {stream for _, _, stream, _ in log.launches} == {STREAM}


@needs_triton
@pytest.mark.parametrize("form", DECODED)
def test_decodings_after_the_first_launch_the_same_and_bind_nothing(form: str, log: Log) -> None:
    """Of each kind of scales; the interpreter runs what the compiler refuses."""
    from lora_kernels.backends.triton import codec

    want: Any = None
    for seed in range(3):
        weight = DECODED[form](
            torch.randn(3, 48, 64, generator=torch.Generator().manual_seed(seed))
        )
        bound = log.bound
        log.launches.clear()
        w = codec.dequantize(weight.codes, weight.matrix_shape, bf16)
        got = labelled(tuple(weight.codes), w, log), w.shape, w.dtype, w.stride()
        want = want or got
        assert got == want and len(log.launches) == 1
        assert seed == 0 or log.bound == bound


@needs_triton
@pytest.mark.parametrize("form", [*DECODED, "rows off their blocks"])
def test_check_of_a_decoder_compiles_the_kernel_that_runs_and_no_other(
    form: str, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    from lora_kernels.backends.triton import codec

    compiled: list[str] = []

    def note(*, key: Any, **_: Any) -> bool:
        compiled.append(str(key))
        return False

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    columns = 4304 if form == "rows off their blocks" else 1152  # of SigLIP's layers
    weight = DECODED.get(form, quantize_4bit)(torch.randn(3, 16, columns))
    kind = decoder.Decoding.of(weight.codes, columns)
    for dtype in (bf16, f32):
        codec.dequantize_kernel.device_caches.clear()
        compiled.clear()
        decoder.compare_decoder(kind, dtype, torch.device("cpu"))
        assert len(compiled) == 1
        codec.dequantize(weight.codes, weight.matrix_shape, dtype)
        assert len(compiled) == 1


@needs_triton
def test_decoding_of_codes_off_a_word_is_a_plan_of_its_own(log: Log) -> None:
    """Codes at a multiple of 4 bytes are read as words."""
    from lora_kernels.backends.triton import codec

    codes = quantize_4bit(torch.randn(48, 64), "nf4").codes
    planned = []
    for shift in (0, 1, 4, 0, 1, 4):
        packed = torch.empty(codes.packed.numel() + shift, dtype=torch.uint8)[shift:]
        assert packed.data_ptr() % 16 == shift
        args = codes._replace(packed=packed), (48, 64), bf16
        planned.append(is_planned(log, functools.partial(codec.dequantize, *args)))
        assert log.launches[-1][3][0] == packed.data_ptr()
    assert planned == [True] * 3 + [False] * 3


@needs_triton
@pytest.mark.parametrize(
    "change",
    [{"M": 41}, {"dtype": f16}, {"scaling": 1.5}, {"quant": True}, {"options": True}],
    ids=str,
)
def test_another_call_has_a_plan_of_its_own(log: Log, change: dict[str, Any]) -> None:
    ONE.run()
    other = ONE._replace(**change)
    log.launches.clear()
    got = labelled(*other.run(), log)
    launches.forget()
    log.launches.clear()
    assert got and got == labelled(*other.run(), log)


@needs_triton
@pytest.mark.parametrize("field", ["x", "weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("layout", ["strided", "unaligned", "narrow"])
def test_plan_is_of_strides_alignment_and_dtype(log: Log, field: str, layout: str) -> None:
    operands, *rest = ONE.args()
    triton.lora_linear(operands, *rest)
    t = getattr(operands, field)
    other = t.repeat(1, 2)[:, : t.shape[1]]
    if layout == "unaligned":
        shift = 8 // t.element_size()  # Triton reads 16 bytes at once
        other = torch.cat([t.flatten()[:shift], t.flatten()])[shift:].view(t.shape)
    if layout == "narrow":
        other = t.to(bf16)
    operands = operands._replace(**{field: other})
    assert is_planned(log, lambda: triton.lora_linear(operands, *rest))


@needs_triton
@pytest.mark.parametrize("shift", [0, 1, 2, 4])
def test_kernel_is_compiled_for_the_alignment_of_its_addresses(log: Log, shift: int) -> None:
    """As Triton itself would compile it for the tensor."""
    from tests.launches.small_kernel import scale, scaled

    x = torch.randn(205)[shift : shift + 200].view(5, 40)
    keys: list[str] = []
    from triton import knobs

    def note(*, key: Any, **_: Any) -> bool:
        keys.append(str(key))
        return False

    with mock.patch.object(knobs.runtime, "jit_cache_hook", note):
        scaled(x, "")
    launched, log.launches[:] = log.launches.copy(), []
    count = len(keys)
    y = torch.empty(5, 40)
    with mock.patch.object(knobs.runtime, "jit_cache_hook", note):
        scale(x, y)
    assert len(keys) == count  # in Triton's cache already
    ((name, *at, args),), ((other_name, *other_at, other),) = launched, log.launches
    assert (name, at) == (other_name, other_at) == ("scale_kernel", [(4, 1, 1), STREAM])
    assert args[0] == other[0].data_ptr() and other[4] is y
    assert args[1:4] + args[5:] == other[1:4] + other[5:] == (40, 1, None, *args[5:])


@needs_triton
def test_step_between_launches_and_parts_of_results(log: Log) -> None:
    from tests.launches.small_kernel import scaled

    for begin in (0, 2, 0):  # of x in its storage, which is no part of the plan
        x = torch.randn(7, 40)[begin : begin + 5]
        copy = scaled(x, "a step between")
        assert torch.equal(copy, x.t()) and log.launches[-1][3][0] == copy.data_ptr()
        (first, (columns, nothing)), said = scaled(x, "parts as results")
        address = log.launches[-1][3][4]
        assert first.data_ptr() == columns.data_ptr() == address
        assert (first.shape, columns.shape, columns.stride()) == ((40,), (40, 5), (1, 40))
        assert nothing is None and said == "said"


@pytest.mark.parametrize("backend", [pytest.param(triton, marks=needs_triton), cuda], ids=str)
def test_gradients_of_no_rows_are_zero_and_launch_nothing(backend: Any) -> None:
    strategy = FUSED if backend is triton else cuda.TWO_PASS
    call = Call(backend, BACKWARD, strategy, M=0, dtype=bf16, options=True, need_gate=True)
    with fake_triton() if backend is triton else fake_cuda() as log:
        torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
        try:
            for _ in range(2):
                dx, *grads = call.run()[1]
                assert dx.shape == (0, 128) and len(tensors_of(tuple(grads))) == 5
                assert not any(t.any() for t in tensors_of(tuple(grads)))
        finally:
            torch.use_deterministic_algorithms(False)
        assert not log.launches


@needs_triton
def test_planner_that_fails_is_asked_again(log: Log) -> None:
    from tests.launches.small_kernel import scaled

    for _ in range(2):
        with pytest.raises(RuntimeError, match="an error"):
            scaled(torch.randn(5, 40), "an error")
        with pytest.raises(AssertionError, match="a launch gets part of a tensor"):
            scaled(torch.randn(5, 40), "a part as operand")


@needs_triton
def test_operand_given_twice_is_two(log: Log) -> None:
    operands, *rest = ONE._replace(options=True).args()
    vector = torch.randn(64)
    for t in (vector, vector + 1):
        triton.lora_linear(operands._replace(column_scale=t, bias=t), *rest)
        assert log.launches[-1][3].count(t.data_ptr()) == 2
    both = operands._replace(column_scale=vector, bias=vector + 1)
    assert not is_planned(log, lambda: triton.lora_linear(both, *rest))
    assert log.launches[-1][3].count(vector.data_ptr()) == 1


@pytest.mark.parametrize("call", [pytest.param(ONE, marks=needs_triton), *CUDA_CALLS[:1]], ids=str)
def test_calls_on_two_streams_are_launched_on_their_own(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With flags of their own: two launches at once would clear each other's."""
    with fake_triton() if call.backend is triton else fake_cuda() as log:
        for stream in (STREAM, STREAM + 1, STREAM):
            flags = torch.zeros(2).int()
            log.launches.clear()
            monkeypatch.setattr(launches, "current_stream", lambda index, s=stream: s)
            monkeypatch.setattr(workspace, "flags", lambda device, flags=flags: flags)
            call.run()
            assert {stream for _, _, stream, _ in log.launches} == {stream}
            assert (str(flags.data_ptr()) in str(log.launches)) is (call.backend is cuda)
        monkeypatch.undo()


@needs_triton
def test_plan_of_what_never_waits_takes_no_flags(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a captured graph they would be cleared in a node of their own."""
    monkeypatch.delattr(workspace, "flags")
    ONE.run()


def test_launches_in_a_captured_graph_share_flags_of_the_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are filled once a graph. The plan is that of the calls before and after."""
    call, flags = CUDA_CALLS[0], workspace.flags
    with fake_cuda() as log:
        call.run()
        monkeypatch.setattr(workspace, "is_capturing", lambda device: True)
        monkeypatch.setattr(workspace, "flags", lambda device: flags(torch.device("cuda", 0)))
        stream = SimpleNamespace(cuda_stream=STREAM)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(workspace, "_captured_flags", {})
        made: list[Tensor] = []
        zeros = torch.zeros
        monkeypatch.setattr(
            torch, "zeros", lambda n, dtype, device: made.append(zeros(n, dtype=dtype)) or made[-1]
        )
        planned = mock.Mock(side_effect=AssertionError("planned again"))
        monkeypatch.setattr(launches.Plan, "__init__", planned)
        for capture in (3, 4):
            monkeypatch.setattr(workspace, "_capture_id", {STREAM: capture}.__getitem__)
            for _ in range(3):
                call.run(1)
                assert str(made[-1].data_ptr()) in str(log.launches[-1])
        assert len(made) == 2
        monkeypatch.undo()


@needs_triton
def test_calls_on_two_devices_have_plans_of_their_own(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled kernel is loaded into one GPU."""
    ONE.run()
    monkeypatch.setattr(Tensor, "get_device", lambda t: 1)
    monkeypatch.setattr(launches, "is_current_device", lambda index: index == 1)
    monkeypatch.setattr(launches, "current_stream", lambda index: {1: STREAM}[index])
    assert is_planned(log, ONE.run)
    assert not is_planned(log, ONE.run)


def test_cuda_launches_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may be current."""
    with fake_cuda() as log:
        monkeypatch.setattr(Tensor, "get_device", lambda t: 1)
        monkeypatch.setattr(launches, "is_current_device", lambda index: index == 1)
        monkeypatch.setattr(launches, "current_stream", lambda index: {1: 9}[index])
        for _ in range(2):
            CUDA_CALLS[4].run()
        assert {stream for _, _, stream, _ in log.launches} == {9}
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

    monkeypatch.setattr(launches, "is_current_device", lambda index: index == current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    ONE.run()
    assert entered == []
    current = 0
    ONE.run()
    assert entered == [-1]


def test_stream_and_device_are_those_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(index: int = 1) -> Any:
        return SimpleNamespace(cuda_stream=10 + index)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    assert [launches.current_stream(i) for i in (0, 1)] == [10, 11]
    assert [launches.is_current_device(i) for i in (0, 1)] == [False, True]


def test_flags_are_of_one_stream_of_a_device_and_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that run at once never share them."""
    zeros, capture = torch.zeros, 0

    def flags(index: int, stream: int) -> Tensor:
        def current(device: torch.device | None = None) -> Any:
            return SimpleNamespace(cuda_stream=stream if device else 0)

        monkeypatch.setattr(torch.cuda, "current_stream", current)
        return workspace.flags(torch.device("cuda", index))

    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capture > 0)
    monkeypatch.setattr(workspace, "_capture_id", lambda stream: capture)
    monkeypatch.setattr(workspace, "_flags", {})
    monkeypatch.setattr(workspace, "_captured_flags", {})
    places = (0, 1), (0, 2), (1, 1)
    made = [flags(*place) for place in places]
    for capture in (7, 8):  # noqa: B007  # the lambdas above read it
        made += [flags(*place) for place in places]
        assert all(flags(*place) is t for place, t in zip(places, made[-3:], strict=True))
    capture = 0
    assert len({t.data_ptr() for t in made}) == 9
    assert all(t.shape == (2 + workspace.MAX_BLOCKS,) and t.dtype is torch.int32 for t in made)
    assert all(not t.any() for t in made)
    assert all(flags(*place) is t for place, t in zip(places, made[:3], strict=True))


@needs_triton
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("when", ["enter", "exit"])
def test_profilers_hooks_are_called_at_each_launch(
    log: Log, when: str, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    from lora_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "is_known_launcher", lambda: is_known)
    want = labelled(*ONE.run(), log)
    hook = getattr(knobs.runtime, f"launch_{when}_hook")
    called: Any = mock.Mock()
    if hook is None:
        hooked: Any = mock.patch.object(knobs.runtime, f"launch_{when}_hook", called)
    else:
        hooked = mock.patch.object(hook, "calls", [called])
    for _ in range(2):
        log.launches.clear()
        with hooked:
            assert labelled(*ONE.run(), log) == want
            log.hooks[-1][when == "exit"](None)
        called.assert_called_once_with(None)
        called.reset_mock()
    log.launches.clear()
    assert labelled(*ONE.run(), log) == want


@needs_triton
@pytest.mark.parametrize(
    ("version", "want"),
    [("3.4.0", True), ("3.9.1+git5", True), ("3.10.0", False), ("4.0", False), (None, False)],
)
def test_known_launchers_are_those_of_the_versions_up_to_3_9(
    version: str | None, want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build under another name, such as pytorch-triton, has no version that we know."""
    from lora_kernels.backends.triton import launch

    monkeypatch.setattr(launch.device, "version", lambda distribution: version)
    assert launch.is_known_launcher.__wrapped__() is want


@needs_triton
def test_nothing_is_launched_while_kernels_are_only_compiled(log: Log) -> None:
    from lora_kernels.backends.triton import launch

    with pytest.raises(KeyboardInterrupt), launch.compile_only(0, 1):
        ONE.run()
        raise KeyboardInterrupt
    assert not log.launches
    ONE.run()
    assert len(log.launches) == 1


@needs_triton
def test_parts_compile_each_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import JITFunction

    from lora_kernels.backends.triton import launch
    from tests.launches.small_kernel import CONFIG, scale

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
def test_plans_are_bounded(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "MAX_PLANS", 4)
    for M in range(20, 40):
        ONE._replace(M=M).run()
        assert max(map(len, launches._caches)) <= 4


@needs_triton
def test_threads_launch_calls_of_their_own(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd runs the backward in another thread, while the forward of another layer runs."""
    from lora_kernels.backends.triton import launch

    want = labelled(*ONE.run(), log)
    launches.forget()
    inside, outside = threading.Event(), threading.Event()
    original = launch.target

    def target(device: torch.device) -> DeviceInfo:
        if threading.current_thread() is thread:
            inside.set()
            outside.wait(60)
        return original(device)

    monkeypatch.setattr(launch, "target", target)
    thread = threading.Thread(target=ONE.run, daemon=True)
    thread.start()
    assert inside.wait(60)  # in the midst of planning
    for seed in range(2):
        log.launches.clear()
        assert labelled(*ONE.run(seed), log) == want
    outside.set()
    thread.join(60)
    assert len(log.launches) == 2 and not is_planned(log, ONE.run)


# The CUDA kernels, which the emulator runs.


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Run the launches of plans in the emulator; the names of all launches."""
    if (reason := emulator_unavailable_reason()) is not None:
        pytest.skip(reason)
    from lora_kernels.backends.cuda import launch

    names: list[str] = []
    with cuda.emulate(7) as emulator, stub_launches(), pytest.MonkeyPatch.context() as patch:

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


@pytest.mark.parametrize("call", CUDA_CALLS, ids=str)
def test_cuda_results_of_a_plan_are_those_of_one_made_for_the_call(
    emulated: list[str], call: Call
) -> None:
    """Each call has other operands, and poisoned memory for what it allocates."""
    wants = []
    for seed in range(3):
        launches.forget()
        wants.append(call.run(seed)[1])
    count, each = len(emulated), len(emulated) // 3
    launches.forget()
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
    try:
        for seed, want in enumerate(wants):
            assert_same(call.run(seed)[1], want)
            assert not workspace.flags(torch.device("cpu")).any()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(emulated) == count + 3 * each


@pytest.mark.parametrize("with_options", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("strategy", "M"), [("cooperative", 3), ("two_pass", 40)])
def test_training_steps_by_plans_have_the_same_gradients(
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
    steps = []
    with lora_kernels.backend("cuda", strategy):
        for _ in range(3):
            y = lora_kernels.lora_linear(weight=W, scaling=0.5, **args)
            steps.append((y.detach(), *torch.autograd.grad(y, list(args.values()), dy)))
    assert emulated and max(map(len, launches._caches)) == 1
    for step in steps[1:]:
        assert_same(step, steps[0])
