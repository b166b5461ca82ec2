"""The order and the skinny GEMMs of a training step: measured on a card, and followed."""

import contextlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import qualification
from lora_kernels.backends import library, triton
from lora_kernels.backends.eager import blocks as eager
from lora_kernels.backends.eager import orders
from lora_kernels.bench import qualify as command
from lora_kernels.choice import choose as selection
from lora_kernels.choice import verdicts
from lora_kernels.choice.verdicts import Group, Point, Seconds, Verdict
from lora_kernels.core.call import Needs
from lora_kernels.core.record import Record
from lora_kernels.ops import blocks
from lora_kernels.oracle import tolerance
from lora_kernels.qualification import Claim, claims, plan
from tests.support import fake_card

bf16 = torch.bfloat16
BASE_FIRST = Group("eager", orders.BASE_FIRST, "bfloat16", "bfloat16", "order")
ON_CPU = -1  # `Tensor.get_device` of a CPU's tensor, for the emulated path


def skinny(name: str) -> Group:
    return Group("triton", name, "bfloat16", "bfloat16", "skinny")


def point(group: Group, rows: int, columns: int, inner: int, ratio: float) -> Point:
    """Our side takes `ratio` of the time of today's GEMMs."""
    ours, eager = Seconds(ratio, ratio / 4), Seconds(1.0, 0.25)
    rank = inner if group.weight == "skinny" else 16
    return Point(group, rows, columns, inner, rank, ours, eager, None, None)


def verdict_of(*points: Point) -> Verdict:
    groups = frozenset(point.group for point in points)
    return Verdict(fake_card.KEY, groups, points=[*points], date="2026")


# Which call takes what


def test_winner_of_a_call_is_that_of_the_nearest_point() -> None:
    sizes = {(1024, 4096, 4096): 0.9, (8192, 4096, 4096): 1.1, (8192, 14336, 4096): 0.97}
    verdict = verdict_of(*(point(BASE_FIRST, *size, ratio) for size, ratio in sizes.items()))
    is_winner = verdict.winners[orders.BASE_FIRST]
    calls = {(1024, 512, 512): True, (2048, 4096, 4096): True, (8192, 4096, 4096): False}
    calls |= {(8192, 16384, 4096): True, (65536, 4096, 4096): False}
    calls |= {(1023, 4096, 4096): False}  # fewer rows than were measured
    assert {size: is_winner(bf16, *size) for size in calls} == calls
    assert not is_winner(torch.float16, 1024, 4096, 4096)
    assert not is_winner(torch.float32, 1024, 4096, 4096)


@pytest.mark.parametrize(
    ("group", "limit"), [(BASE_FIRST, verdicts.KEEP_ORDER), (skinny("dA"), verdicts.KEEP_EAGER)]
)
def test_winner_is_faster_than_the_scatter_of_times(group: Group, limit: float) -> None:
    for ratio, wins in ((limit, True), (limit + 0.001, False)):
        verdict = verdict_of(point(group, 1024, 4096, 16, ratio))
        assert (group.strategy in verdict.winners) == wins


def test_skinny_kernel_is_not_used_above_the_measured_ranks() -> None:
    verdict = verdict_of(point(skinny("P"), 1024, 4096, 16, 0.5), point(BASE_FIRST, 1, 1, 1, 2.0))
    is_winner = verdict.winners["P"]
    assert is_winner(bf16, 1024, 4096, 16) and is_winner(bf16, 1024, 4096, 8)
    assert not is_winner(bf16, 1024, 4096, 17)
    assert [*verdict.winners] == ["P"]  # what won nowhere is not asked for


def test_group_that_failed_wins_nothing() -> None:
    points = [point(skinny("P"), 1024, 4096, 16, 0.5), point(skinny("dA"), 1024, 4096, 16, 0.5)]
    verdict = replace(verdict_of(*points), passed=frozenset({points[1].group}))
    assert not verdict.winners["P"](bf16, 1024, 4096, 16)
    assert verdict.winners["dA"](bf16, 1024, 4096, 16)


def test_points_timed_for_the_report_alone_win_nothing() -> None:
    groups = [BASE_FIRST._replace(strategy=name) for name in (plan.MM, plan.UPDATE)]
    assert not verdict_of(*(point(group, 1024, 4096, 4096, 0.1) for group in groups)).winners


def test_orders_are_no_measured_rows_of_a_layer_s_kernel() -> None:
    """Else every block of a training step would be given to `choose`."""
    few = Group("cuda", "cooperative", "bfloat16", "bfloat16", "dense")
    points = point(few, 16, 4096, 4096, 0.5), point(BASE_FIRST, 8192, 4096, 4096, 0.5)
    assert verdict_of(*points).max_rows == 16


def test_winners_follow_the_verdicts_of_the_process() -> None:
    verdict = verdict_of(point(BASE_FIRST, 1024, 4096, 4096, 0.5))
    verdicts.write(verdict)
    assert not orders.winners
    assert isinstance(verdicts.current(0), Verdict)  # which reads it
    assert [*orders.winners] == [orders.BASE_FIRST]
    for is_off in (True, False):
        verdicts.set_off(is_off)
        assert bool(orders.winners) != is_off
    verdicts.set_current(0, "not qualified")
    assert not orders.winners
    verdicts.set_current(0, verdict)
    verdicts.forget()
    assert not orders.winners


def test_verdict_with_orders_is_read_back_and_followed() -> None:
    verdict = verdict_of(
        point(BASE_FIRST, 1024, 4096, 4096, 0.5), point(skinny("dB"), 1024, 4096, 16, 0.5)
    )
    file = verdicts.write(verdict)
    found = verdicts.read(fake_card.KEY)
    assert isinstance(found, Verdict) and found.json() == verdict.json()
    assert [*found.winners] == [*verdict.winners] == [orders.BASE_FIRST, "dB"]
    data = json.loads(file.read_text())
    data["points"][0][2] = "4096"
    file.write_text(json.dumps(data))
    reason = str(verdicts.read(fake_card.KEY))
    assert "columns: got '4096', want a positive integer" in reason and str(file) in reason


@pytest.mark.parametrize(("ratio", "order"), [(0.5, "the base GEMM first"), (1.5, "the update")])
def test_reason_of_an_eager_choice_says_the_order(ratio: float, order: str) -> None:
    few = Group("cuda", "cooperative", "bfloat16", "bfloat16", "dense")
    points = [point(few, 16, 64, 64, 0.5), point(BASE_FIRST, 1024, 64, 64, ratio)]
    verdicts.set_current(0, verdict_of(*points))
    call = fake_card.problem(few, 2048, 64, 64)
    reason = selection.choose(call).reason
    assert reason.endswith(f"base first took {ratio:.2f} of update first's time at 1024×64×64")
    assert f"; {order}" in reason
    assert "update first" not in selection.choose(call._replace(a_dtype=torch.float32)).reason
    assert "update first" not in selection.choose(call._replace(rows=512)).reason


# What is measured


def claim_of(group: Group, name: str = "time", sizes: Any = ()) -> Claim:
    return Claim(group, name, 0, sizes)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> fake_card.FakeCard:
    """A card whose kernels are PyTorch's GEMMs, rounded once."""
    monkeypatch.delenv(fake_card.FAULTS, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "")  # which the card sets for its worker
    card = fake_card.FakeCard()
    monkeypatch.setattr(orders, "shrink", _shrink)
    monkeypatch.setattr(orders, "outer", _outer)
    return card


def _shrink(a: Tensor, small: Tensor, scale: float, out: Tensor) -> Tensor:
    return out.copy_(scale * (a.float() @ small.float().t()))


def _outer(s: Tensor, v: Tensor, scale: float, out: Tensor) -> Tensor:
    return out.copy_(scale * (s.float().t() @ v.float()))


SIZES = {"order": ((40, 24, 16),), "skinny": ((40, 24, 16),)}
GROUPS = list(dict.fromkeys(claim.group for claim in plan.list_orders()))


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_every_claim_of_an_order_holds(group: Group, in_process: Any) -> None:
    for name in [claim.name for claim in plan.list_orders() if claim.group == group]:
        sizes = SIZES[group.weight] if name == "time" else ()
        reason, points = claims.check(in_process, claim_of(group, name, sizes))
        assert reason is None
        read = [verdicts.read_point(json.loads(json.dumps([group, *each]))) for each in points]
        assert [(p.rows, p.columns, p.inner, p.rank) for p in read] == (
            [(40, 24, 16, 16)] if name == "time" else []
        )


@pytest.mark.parametrize("ratio", [0.5, 1.5])
@pytest.mark.parametrize("name", [orders.BASE_FIRST, *orders.SKINNY])
def test_the_clock_decides(
    name: str, ratio: float, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = Seconds(*(ratio * s for s in fake_card.EAGER_SECONDS[:2]))
    monkeypatch.setattr(fake_card, "SECONDS", seconds)
    (group,) = (group for group in GROUPS if group.strategy == name)
    _, points = claims.check(in_process, claim_of(group, sizes=SIZES[group.weight]))
    verdict = verdict_of(*(Point(group, *each) for each in points))
    assert ([*verdict.winners] == [name]) == (ratio < 1)


@pytest.mark.parametrize("claim", ["odd sizes", "time"])
@pytest.mark.parametrize("name", orders.SKINNY)
def test_wrong_kernel_never_wins(
    name: str, claim: str, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel, right in (("shrink", _shrink), ("outer", _outer)):
        monkeypatch.setattr(
            orders, kernel, lambda *args, right=right: right(*args).mul_(1 + 2.0**-6)
        )
    group = skinny(name)
    reason, points = claims.check(in_process, claim_of(group, claim, ((40, 24, 16),)))
    assert reason is not None and f"{name} MISS" in reason and not points
    failed = Verdict(fake_card.KEY, frozenset(), {group: reason})
    assert not failed.winners


@pytest.mark.parametrize("name", orders.SKINNY)
def test_kernel_that_writes_an_operand_or_other_bits_fails_memory(
    name: str, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = itertools.count()

    def write(right: Callable[..., Tensor], what: str, a: Tensor, b: Tensor, *args: Any) -> Tensor:
        found = right(a, b, *args)
        if what == "operand":
            a[0, 0] += 1
        elif next(count):
            found[0, 0] += 1
        return found

    for what, words in (("operand", "an operand was written"), ("bits", "has other bits")):
        for kernel, right in (("shrink", _shrink), ("outer", _outer)):
            wrong = lambda *args, right=right, what=what: write(right, what, *args)  # noqa: E731
            monkeypatch.setattr(orders, kernel, wrong)
        reason, _ = claims.check(in_process, claim_of(skinny(name), "memory"))
        assert words in str(reason)


@pytest.mark.skipif(triton.unavailable_reason() is not None, reason="Triton is not installed")
def test_orders_are_measured_in_a_worker_and_nothing_is_cached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels run in Triton's interpreter."""
    monkeypatch.setattr(qualification, "SILENCE", 300.0)
    listed = [
        claim._replace(sizes=((40, 24, 16),) if claim.sizes else ())
        for claim in plan.list_orders()
        if claim.name == "time"
    ]
    monkeypatch.setattr(qualification, "list_orders", lambda dtypes: listed)
    verdict = qualification.measure_orders(card=fake_card.NAME, budget_s=600)
    assert not verdict.failed and verdict.passed == {*GROUPS}
    assert {*verdict.winners} == {orders.BASE_FIRST, *orders.SKINNY}
    assert not list(verdicts.folder().glob("qualified-*")) and not orders.winners
    said = command.table(verdict).splitlines()
    used = {line.split()[2] for line in said if line.endswith(command.USED)}
    assert used == {*verdict.winners}


# A training step


class Ops(TorchDispatchMode):
    """Counts the ops, without their overloads."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


M, K, N, R = 96, 80, 72, 8


def layers_of(count: int, bias: bool) -> list[Record]:
    torch.manual_seed(0)
    draw = lambda *shape: (torch.randn(shape) / shape[-1] ** 0.5).to(bf16)  # noqa: E731
    return [
        Record(draw(N, K), draw(R, K), draw(N, R), draw(N) if bias else None, 2.0)
        for _ in range(count)
    ]


def step(layers: list[Record], x: Tensor, dys: list[Tensor]) -> dict[str, Tensor]:
    """y and the gradients of layers of one x, on the emulated GPU path."""
    found: dict[str, Tensor] = {}
    if len(layers) == 1:
        y, p, _ = eager.linear_output(x, layers[0])
        dx, dA, dB = eager.linear_backward(dys[0], x, p, layers[0], True, True, True)
        found = {"y": y, "dx": dx, "dA": dA, "dB": dB}  # type: ignore[dict-item]
        return found
    ys, ps = eager.linears(x, layers, True, True)
    every = (True,) * len(layers)
    needs = eager.BlockNeeds(True, every, every, (), ())
    grads = eager.linears_backward(dys, x, ps, layers, needs, True, bf16)
    assert grads.x is not None
    found["dx"] = grads.x
    for i, y in enumerate(ys):
        dA, dB = grads.lora_A[i], grads.lora_B[i]
        assert dA is not None and dB is not None
        found |= {f"y{i}": y, f"dA{i}": dA, f"dB{i}": dB}
    return found


def reference(layers: list[Record], x: Tensor, dys: list[Tensor]) -> dict[str, Tensor]:
    """The same in float64."""
    wide = [
        layer._replace(
            weight=layer.weight.double(),
            lora_A=layer.lora_A.double(),
            lora_B=layer.lora_B.double(),
            bias=None if layer.bias is None else layer.bias.double(),
        )
        for layer in layers
    ]
    return step(wide, x.double(), [dy.double() for dy in dys])


def inputs(count: int) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    return torch.randn(M, K).to(bf16), [torch.randn(M, N).to(bf16) for _ in range(count)]


def base_first() -> Verdict:
    return verdict_of(point(BASE_FIRST, M, N, K, 0.5))


@contextlib.contextmanager
def following(verdict: Verdict | str) -> Iterator[None]:
    verdicts.set_current(ON_CPU, verdict)
    try:
        with library.as_on_gpu():
            yield
    finally:
        verdicts.set_current(ON_CPU, "")


def require_within_limits(
    got: dict[str, Tensor], want: dict[str, Tensor], today: dict[str, Tensor]
) -> None:
    assert got.keys() == want.keys()
    for name, t in got.items():
        found = tolerance.compare(t, want[name], today[name], 2.0**-8, [K, M])
        assert found.ok, f"{name} {found}"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_step_takes_the_base_gemm_first_where_it_was_faster(count: int, bias: bool) -> None:
    layers, (x, dys) = layers_of(count, bias), inputs(count)
    with following("not qualified"), Ops() as today_ops:
        today = step(layers, x, dys)
    with following(base_first()), Ops() as ops:
        got = step(layers, x, dys)
    require_within_limits(got, reference(layers, x, dys), today)
    # Update first adds x·Wᵀ, base first adds P·Bᵀ; with a bias both begin with an addmm.
    assert ops.counts == today_ops.counts
    with following(base_first()):
        first = _first_addmm_(layers[:1], x, dys)
    with following("not qualified"):
        second = _first_addmm_(layers[:1], x, dys)
    assert (first, second) == ((R, N), (K, N))


def _first_addmm_(layers: list[Record], x: Tensor, dys: list[Tensor]) -> tuple[int, ...]:
    """The shape of the second factor of a forward's `addmm_`."""
    shapes: list[tuple[int, ...]] = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket is torch.ops.aten.addmm_:
                shapes.append(tuple(args[2].shape))
            return func(*args, **(kwargs or {}))

    with Shapes():
        step(layers, x, dys)
    return shapes[0]


def test_step_without_winners_has_today_s_bits() -> None:
    lost = verdict_of(*(point(group, M, N, K, 1.5) for group in GROUPS))
    for count in (1, 3):
        layers, (x, dys) = layers_of(count, False), inputs(count)
        with following("not qualified"):
            today = step(layers, x, dys)
        with following(lost), Ops() as ops:
            got = step(layers, x, dys)
        assert all(map(torch.equal, got.values(), today.values())) and ops.counts["mm"]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", orders.SKINNY)
def test_step_takes_a_skinny_kernel_where_it_was_faster(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    kernels = {"shrink": _shrink, "outer": _outer}
    for kernel, run in kernels.items():

        def note(*args: Any, kernel: str = kernel, run: Any = run) -> Tensor:
            taken.append(kernel)
            return run(*args)  # type: ignore[no-any-return]

        monkeypatch.setattr(orders, kernel, note)
    layers, (x, dys) = layers_of(count, False), inputs(count)
    with following("not qualified"):
        today = step(layers, x, dys)
    assert not taken
    points = [point(skinny(name), M, n, R * r, 0.5) for n in (N, K) for r in (1, 3)]
    with following(verdict_of(*points)):
        got = step(layers, x, dys)
    require_within_limits(got, reference(layers, x, dys), today)
    each = 1 if name in ("P", "dA") else count  # one GEMM for all A
    assert taken == ["shrink" if name in ("P", "dS") else "outer"] * each


@pytest.mark.parametrize("name", ["dS", "dA", "dB"])
def test_down_projection_of_a_gated_mlp_takes_a_skinny_kernel_where_it_was_faster(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    for kernel, run in (("shrink", _shrink), ("outer", _outer)):
        note = lambda *args, kernel=kernel, run=run: (taken.append(kernel), run(*args))[1]  # noqa: E731
        monkeypatch.setattr(orders, kernel, note)
    (layer,), (h, (dy,)) = layers_of(1, False), inputs(1)
    p = torch.randn(M, R).to(bf16)

    def grads() -> dict[str, Tensor]:
        needs = Needs(True, True, True)
        dg, du, others = eager.down_backward(
            dy, h.clone(), h.clone(), p, layer, needs, True, False, "silu", bf16
        )
        named = {"dg": dg, "du": du, "dA": others.lora_A, "dB": others.lora_B}
        return named  # type: ignore[return-value]

    with following("not qualified"):
        today = grads()
    assert not taken
    with following(verdict_of(*(point(skinny(name), M, n, R, 0.5) for n in (N, K)))):
        got = grads()
    assert taken == ["shrink" if name == "dS" else "outer"]
    for which, t in got.items():  # both round once; dg and du round dS before
        wide = today[which].double()
        assert (t.double() - wide).abs().max() <= 2.0**-6 * wide.abs().max(), which


def test_step_of_4_bit_codes_decodes_and_takes_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """`decoder.gemm` leaves many rows to a decoded weight."""
    layer, (x, dys) = layers_of(1, False)[0], inputs(1)
    monkeypatch.setattr(eager, "dense", lambda layer, dtype: layer.weight)
    with following(base_first()):
        assert _first_addmm_([layer], x, dys) == (R, N)


def opcodes(run: Callable[[], object]) -> int:
    """Python's opcodes that a call executes."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    run()  # fills the caches
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def test_verdict_adds_little_python_to_the_step_of_q_k_and_v() -> None:
    """Five percent where nothing or an order won, over the whole step with its Functions."""
    layers, (x, dys) = layers_of(3, False), inputs(3)
    x.requires_grad_()
    for layer in layers:
        layer.lora_A.requires_grad_()
        layer.lora_B.requires_grad_()

    def run() -> None:
        with selection.backend("eager"):
            block = blocks.plain_block(x, layers)
            assert block is not None
            ys = blocks.linears(x, block)
        # In this thread, which is traced: autograd runs the same backward.
        node: Any = ys[0].grad_fn
        with torch.no_grad():
            blocks.LinearsFunction.compute(node, node.saved_tensors, *dys)

    with following("not qualified"):
        without = opcodes(run)
    lost = verdict_of(*(point(group, M, N, K, 1.5) for group in GROUPS))
    with following(lost):
        assert opcodes(run) == without
    with following(base_first()):
        assert opcodes(run) <= 1.05 * without


def test_is_faster_asks_nothing_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = base_first()
    verdicts.set_current(0, verdict)
    for name in ("current_device", "get_device_properties", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: pytest.fail("asked"))
    t: Any = SimpleNamespace(get_device=lambda: 0, dtype=bf16, shape=(M, K))
    other: Any = SimpleNamespace(get_device=lambda: 1, dtype=bf16, shape=(M, K))
    assert orders.is_faster(orders.BASE_FIRST, t, torch.empty(N, R))
    assert not orders.is_faster(orders.BASE_FIRST, other, torch.empty(N, R))
    monkeypatch.setattr(Verdict, "_is_winner", lambda *args: pytest.fail("looked for again"))
    assert orders.is_faster(orders.BASE_FIRST, t, torch.empty(N, R))
