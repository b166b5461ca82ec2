"""With gradients a layer prepares its next step: the same bits, and given up for all that
matters."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels.backends import cpu, native
from lora_kernels.layers import LoRALinear, QLoRALinear
from lora_kernels.prepared import Latest, Step

from . import test_decoding as decoding

pytestmark = [
    pytest.mark.skipif(
        native.module is None or native.isa not in cpu.SINGLE_PASS_ISAS,
        reason="the library makes the product",
    ),
    pytest.mark.usefixtures("looks"),
]

K, N = decoding.K, decoding.N
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
ROWS = [1, 2, 5, 17, 40]


def make(kind: type[LoRALinear], dtype: torch.dtype = f32, **options: Any) -> LoRALinear:
    torch.manual_seed(0)
    layer = kind(K, N, r=4, dtype=dtype, **options)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.fixture(params=[LoRALinear, QLoRALinear])
def layer(request: pytest.FixtureRequest) -> LoRALinear:
    return make(request.param, bias=True)


def x(rows: int = 40, dtype: torch.dtype = f32) -> Tensor:
    of = torch.Generator().manual_seed(3)
    return torch.randn(rows, K, generator=of).to(dtype).requires_grad_()


def step(layer: LoRALinear, x: Tensor, dy: Tensor | None = None) -> list[Tensor | None]:
    """y and the gradients of x and of the parameters."""
    layer.zero_grad()
    x.grad = None
    y = layer(x)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    y.backward(dy)
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def the_long_way(layer: LoRALinear, x: Tensor, dy: Tensor | None = None) -> list[Tensor | None]:
    layer._latest = Latest()
    return step(layer, x, dy)


def equal(some: list[Tensor | None], others: list[Tensor | None]) -> bool:
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(some, others, strict=True)
    )


Answers = dict[str, list[bool]]


@contextmanager
def watched() -> Iterator[Answers]:
    """Whether each prepared call had an answer."""
    answers: Answers = {"forward": [], "backward": []}
    forward, backward = Step.__call__, Step.backward

    def watched_forward(self: Step, *args: Any) -> Any:
        found = forward(self, *args)
        answers["forward"].append(found is not None)
        return found

    def watched_backward(self: Step, *args: Any) -> Any:
        found = backward(self, *args)
        answers["backward"].append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", watched_forward)
        patch.setattr(Step, "backward", watched_backward)
        yield answers


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_the_same_bits(kind: type[LoRALinear], dtype: torch.dtype, rows: int) -> None:
    """Of y and of every gradient, which those of other values are not."""
    layer = make(kind, dtype)
    want = the_long_way(layer, x(rows, dtype))
    gradients = rows > 1 or kind is QLoRALinear  # of one row beside a dense weight by the library
    for shape in ((rows, K), (1, rows, K), (rows, 1, K)):
        given = x(rows, dtype).detach().view(shape).requires_grad_()
        with watched() as answers:
            found = step(layer, given)
        assert answers == {"forward": [True], "backward": [gradients]}
        y, dx, *others = found
        assert y is not None and y.shape == (*shape[:-1], N)
        assert dx is not None and dx.shape == shape
        assert equal([y.view(rows, N), dx.view(rows, K), *others], want)
        assert sum(grad is not None for grad in others) == 2
    with torch.no_grad():
        layer.lora_A.mul_(2), layer.lora_B.add_(1)
    with watched() as answers:
        again = step(layer, x(rows, dtype))
    assert answers["forward"] == [True]
    assert equal(again, the_long_way(layer, x(rows, dtype))) and not equal(again, want)


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B"])
def test_only_what_is_wanted(layer: LoRALinear, wanted: str) -> None:
    layer.requires_grad_(False)
    given = x().detach().requires_grad_(wanted == "x")
    if wanted != "x":
        getattr(layer, wanted).requires_grad_()
    want = the_long_way(layer, given)
    with watched() as answers:
        assert equal(step(layer, given), want)
    assert answers == {"forward": [True], "backward": [True]}
    assert sum(grad is not None for grad in want) == 2


def test_the_gradient_of_a_bias(layer: LoRALinear) -> None:
    assert layer.bias is not None
    layer.bias.requires_grad_()
    want = the_long_way(layer, x())
    with watched() as answers:
        assert equal(step(layer, x()), want)
    assert answers == {"forward": [True], "backward": []}
    assert layer.bias.grad is not None


@pytest.mark.parametrize("change", decoding.CHANGES, ids=lambda change: change.__name__)
def test_what_changes_is_seen(layer: LoRALinear, change: Callable[[LoRALinear], None]) -> None:
    layer.eval()  # in which a merged one may be called
    before = step(layer, x())
    assert equal(step(layer, x()), before)
    with torch.no_grad():
        change(layer)
    got = step(layer, x())
    assert equal(got, the_long_way(layer, x()))
    assert got[0] is not None and before[0] is not None and not torch.equal(got[0], before[0])


def test_what_changes_between_forward_and_backward_is_seen() -> None:
    """Where autograd does not: through `.data`."""
    for change in (decoding.new_data, decoding.new_weight_data):
        layer, fresh = make(LoRALinear), make(LoRALinear)
        step(layer, x())
        results = []
        for each in (layer, fresh):
            given = x()
            y = each(given)
            change(each)
            with watched() as answers:
                y.backward(torch.ones_like(y))
            results.append(given.grad)
            assert answers["backward"] == ([False] if each is layer else [])
        assert torch.equal(*results)  # type: ignore[arg-type]


def test_an_adapter_that_changed_in_place_is_an_error(layer: LoRALinear) -> None:
    step(layer, x())
    y = layer(x())
    with torch.no_grad():
        layer.lora_A.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_weight_that_is_to_be_trained_is_an_error() -> None:
    layer = make(LoRALinear)
    step(layer, x())
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight: got requires_grad=True"):
        layer(x())


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (torch.ones(3, K - 1), ValueError), (torch.ones(3, K, dtype=torch.int32), TypeError),
        (torch.tensor(1.0), ValueError), (torch.ones(3, K, dtype=torch.float64), TypeError),
        (torch.ones(3, K, device="meta"), ValueError),
    ],
)  # fmt: skip
def test_a_wrong_x_is_an_error(layer: LoRALinear, wrong: Tensor, error: type[Exception]) -> None:
    step(layer, x())
    with pytest.raises(error, match=r"^(x|lora_[AB]|weight): got"):
        layer(wrong)


def test_a_wrong_bias_is_an_error(layer: LoRALinear) -> None:
    step(layer, x())
    layer.bias = nn.Parameter(torch.ones(N - 1))
    with pytest.raises(ValueError, match="bias"):
        layer(x())


def test_others_answer(layer: LoRALinear) -> None:
    """What it is not prepared for: the long way, with the same results."""
    step(layer, x())
    dy = torch.randn(40, N, generator=torch.Generator().manual_seed(4))
    strided = torch.empty(40, 2 * K)[:, :K].copy_(x().detach()).requires_grad_()
    with watched() as answers:
        found = step(layer, strided, dy)
        assert answers == {"forward": [False], "backward": []}
        assert equal(found, the_long_way(layer, x(), dy))
    step(layer, x())
    for other in (dy[:1].expand(40, N), dy.t().contiguous().t()):
        with watched() as answers:
            found = step(layer, x(), other)
            assert answers == {"forward": [True], "backward": [False]}
        assert equal(found, the_long_way(layer, x(), other))
        step(layer, x())
    layer(x()[:0]).sum().backward()
    want = step(layer, x())[0]
    with torch.no_grad():
        assert torch.equal(layer(x()), want)  # type: ignore[arg-type]


def test_another_backend_is_seen(layer: LoRALinear) -> None:
    step(layer, x())
    with lora_kernels.backend("eager"):
        with watched() as answers:
            found = step(layer, x())
        assert answers == {"forward": [False], "backward": []}
        assert equal(found, the_long_way(layer, x()))
    step(layer, x())
    # In between, the backward is the forward's all the same.
    want, given = step(layer, x()), x()
    dy = torch.randn(40, N, generator=torch.Generator().manual_seed(4))
    layer.zero_grad()
    y = layer(given)
    with lora_kernels.backend("eager"), watched() as answers:
        y.backward(dy)
    assert answers["backward"] == [False]
    assert equal([y, given.grad, *(parameter.grad for parameter in layer.parameters())], want)


def test_another_instruction_set_is_seen(layer: LoRALinear) -> None:
    assert native.isa is not None
    step(layer, x())
    was = native.isa
    try:
        y = layer(given := x())
        native.use_isa("avx2")
        with watched() as answers:
            y.sum().backward()
            want = the_long_way(layer, x(), torch.ones(40, N))
        assert answers["backward"] == [False]
        torch.testing.assert_close(given.grad, want[1])
    finally:
        native.use_isa(was)


def test_autocast_is_seen(layer: LoRALinear) -> None:
    step(layer, x())
    with torch.autocast("cpu", dtype=bf16), watched() as answers:
        assert layer(x()).dtype is bf16
    assert answers["forward"] == [False]


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_dropout(kind: type[LoRALinear]) -> None:
    """A new mask each time, from as many numbers of the generator as the long way takes."""
    layer = make(kind, dropout=0.3)
    torch.manual_seed(7)
    want = [the_long_way(layer, x()) for _ in range(3)]
    step(layer, x())
    torch.manual_seed(7)
    with watched() as answers:
        found = [step(layer, x()) for _ in range(3)]
    assert answers == {"forward": [True] * 3, "backward": [True] * 3}
    assert all(map(equal, found, want))
    assert not torch.equal(found[0][0], found[1][0])  # type: ignore[arg-type]
    layer.dropout = 0.6
    torch.manual_seed(7)
    other = step(layer, x())
    torch.manual_seed(7)
    assert equal(other, the_long_way(layer, x())) and not equal(other, want[0])
    for call in (lambda: step(layer.eval(), x()), lambda: step(layer.train(), x())):
        torch.manual_seed(7)
        found, seen = call(), torch.randint(100, ())
        torch.manual_seed(7)
        assert equal(found, the_long_way(layer, x())) and torch.equal(seen, torch.randint(100, ()))
    with torch.no_grad(), watched() as answers:
        assert not torch.equal(layer(x()), layer(x()))
    assert not answers["forward"]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(layer: LoRALinear, reentrant: bool, dropout: float) -> None:
    """Whichever pass is a prepared step: the same mask."""
    layer.dropout = dropout
    step(layer, x())
    torch.manual_seed(7)
    want = step(layer, x())
    layer.zero_grad()
    given = x()
    dy = torch.randn(40, N, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(7)
    with watched() as answers:
        y = checkpoint(layer, given, use_reentrant=reentrant)
        y.backward(dy)
    assert answers == {"forward": [True], "backward": [True]}
    assert equal([y, given.grad, *(parameter.grad for parameter in layer.parameters())], want)


def test_what_saved_tensors_come_back_as(layer: LoRALinear) -> None:
    """Of copies the backward is the long one; moved to the CPU they are these again."""
    want = step(layer, x())
    dy = torch.randn(40, N, generator=torch.Generator().manual_seed(4))
    copies = saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    for hooks, taken in ((copies, False), (save_on_cpu(), True)):
        with watched() as answers, hooks:
            found = step(layer, x(), dy)
        assert answers == {"forward": [True], "backward": [taken]}, hooks
        assert equal(found, want)


def test_a_batch_of_gradients(layer: LoRALinear) -> None:
    step(layer, x())
    given, dys = x(), torch.randn(3, 40, N, generator=torch.Generator().manual_seed(5))
    y = layer(given)
    found = torch.autograd.grad(y, given, dys, is_grads_batched=True)[0]
    for dy, dx in zip(dys, found, strict=True):
        torch.testing.assert_close(dx, the_long_way(layer, x(), dy)[1])


def test_differentiable_once(layer: LoRALinear) -> None:
    step(layer, x())
    y = layer(given := x())
    (dx,) = torch.autograd.grad(y.sum(), given, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_hooks_see_the_graph(layer: LoRALinear) -> None:
    step(layer, x())
    seen = []
    y = layer(given := x())
    given.register_hook(seen.append)
    y.backward(torch.ones_like(y))
    assert len(seen) == 1 and torch.equal(seen[0], given.grad)  # type: ignore[arg-type]


def test_nothing_is_kept_in_memory(layer: LoRALinear) -> None:
    gc.disable()  # so that no cycle is
    try:
        step(layer, x())
        step(layer, x())
        assert layer._latest._calls is not None and layer._latest._calls._step is not None
        held = weakref.ref(layer._latest._calls._step._call), weakref.ref(layer.lora_A)
        given = x()
        saved = weakref.ref(given)
        del given
        assert saved() is None
        layer.lora_A = nn.Parameter(layer.lora_A.detach() * 2)
        layer(x())
        assert held[0]() is None and held[1]() is None
        alive = weakref.ref(layer.lora_B)
        layer.__dict__.clear()
        assert alive() is None
    finally:
        gc.enable()


def test_the_graph_of_an_adapter_is_let_go(layer: LoRALinear) -> None:
    """Of one that is computed for the call, which its graph keeps in memory."""
    leaf = torch.ones_like(layer.lora_A, requires_grad=True)
    made = 2 * leaf
    for _ in range(2):
        torch.func.functional_call(layer, {"lora_A": made}, x())
    gone = weakref.ref(made)
    del made
    assert gone() is None


def test_a_strategy_that_is_asked_for_by_name() -> None:
    """It is taken for few rows too, where a step has another."""
    layer = make(LoRALinear)
    with lora_kernels.backend("cpu", strategy=cpu.SINGLE_PASS), watched() as answers:
        for _ in range(2):
            step(layer, x(5))
    assert not answers["forward"]


def test_copies_start_anew(layer: LoRALinear) -> None:
    want = step(layer, x())
    step(layer, x())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            layer.lora_B.mul_(2)
        assert equal(step(other, x()), want)
        with torch.no_grad():
            layer.lora_B.div_(2)


@pytest.mark.parametrize("why", ["moves", "strided", "autocast"])
def test_what_is_in_vain_is_given_up(
    layer: LoRALinear, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an adapter whose shards each step gathers, of an x that never fits, under autocast."""
    given = torch.randn(40, 2 * K)[:, ::2] if why == "strided" else x().detach()
    made, whole = [], Step.of

    def counted(*args: Any) -> Step | None:
        made.append(whole(*args))
        return made[-1]

    monkeypatch.setattr(Step, "of", counted)
    results = []
    for _ in range(12):
        if why == "moves":
            layer.lora_A.data = layer.lora_A.data.clone()
        with torch.autocast("cpu", bf16, enabled=why == "autocast"):
            results.append(layer(given))
    assert len(made) == 8 and (made[0] is None) == (why == "autocast")
    assert all(torch.equal(y, results[0]) for y in results)
