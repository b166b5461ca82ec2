"""The update of a called base layer, in place on its result, on the path that a GPU takes."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.bench import counter
from lora_kernels.core.record import Record
from lora_kernels.ops import in_place
from lora_kernels.peft import explain, fuse, modules
from lora_kernels.peft.explain_rows import ADAPTER
from lora_kernels.peft.linear import Fused
from tests.support.peft_models import activate, randomize

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
K, N, R, ALPHA = 24, 40, 5, 7
pytestmark = pytest.mark.usefixtures("gpu_path")


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by whether the base layer's own result was overwritten, at each update."""
    found: list[bool] = []
    results: list[int] = []
    call, add = Fused._call_base, in_place.add_lora_linear_

    def record_call(*args: Any, **kwargs: Any) -> Any:
        y, is_fresh = call(*args, **kwargs)
        results.append(y.data_ptr())
        return y, is_fresh

    def record_add(y: Tensor, *args: Any) -> Tensor:
        found.append(y.data_ptr() == results[-1])
        return add(y, *args)

    monkeypatch.setattr(Fused, "_call_base", record_call)
    monkeypatch.setattr(in_place, "add_lora_linear_", record_add)
    return found


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bases of this file whose result is fresh."""
    names = [base.__name__ for base in (*FRESH, *NOT_WHOLE)]
    monkeypatch.setitem(modules.FRESH, __name__, (*names, "Marking", "Inference"))


class SavesResult(torch.autograd.Function):
    """tanh, whose backward reads its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return dy * (1 - y * y)


class Base(nn.Linear):
    """A base layer that is called, because it is no nn.Linear; subclasses change its result."""

    def forward(self, x: Tensor) -> Tensor:
        return self.change(super().forward(x))

    def change(self, y: Tensor) -> Tensor:
        return y


class Tanh(Base):  # PyTorch's own: TanhBackward saves the result
    def change(self, y: Tensor) -> Tensor:
        return torch.tanh(y)


class Sine(Base):  # saves its input
    def change(self, y: Tensor) -> Tensor:
        return torch.sin(y)


class Saving(Base):
    def change(self, y: Tensor) -> Tensor:
        return SavesResult.apply(y)


class Remembering(Base):  # the tensor itself
    def change(self, y: Tensor) -> Tensor:
        self.last = y
        return y


class Reshaped(Base):  # as GPTQ's, AWQ's and torchao's: the product of rows, as x is shaped
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])


class ViewsResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return dy @ weight, None


class Viewing(Base):  # as AWQ's: its Function reshapes
    def forward(self, x: Tensor) -> Tensor:
        return ViewsResult.apply(x, self.weight)


class Branching(Base):  # another graph reads the result
    def change(self, y: Tensor) -> Tensor:
        self.branch = torch.sin(y).sum()
        return y


class Part(Base):
    def change(self, y: Tensor) -> Tensor:
        return torch.cat([y, y], -1)[..., : y.shape[-1]]


class Row(Base):  # contiguous, and a part of a larger memory
    def change(self, y: Tensor) -> Tensor:
        return torch.stack([y, y])[1]


class Transposed(Base):
    def change(self, y: Tensor) -> Tensor:
        return y.transpose(0, -1).contiguous().transpose(0, -1)


class Expanded(Base):
    def change(self, y: Tensor) -> Tensor:
        return y.mean(0, keepdim=True).expand_as(y)


FRESH = (Base, Sine, Reshaped, Viewing)
NOT_WHOLE = (Part, Row, Transposed, Expanded)  # of a listed class, and still out of place
HELD = (Tanh, Saving, Remembering, Branching)


class Model(nn.Module):
    def __init__(self, base: type[nn.Linear], bias: bool = True) -> None:
        super().__init__()
        self.first, self.up = nn.Linear(K, K, dtype=f64), base(K, N, bias=bias, dtype=f64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.up(torch.sin(self.first(x))))


def pair(base: type[nn.Linear], config: Any = None, dtype: torch.dtype = f64) -> tuple[Any, Any]:
    torch.manual_seed(0)
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": ["up"]}
    model: Any = get_peft_model(Model(base), config or LoraConfig(**settings))
    randomize(model)
    model = model.to(dtype).train()
    fused = fuse(copy.deepcopy(model))
    (row,) = explain(fused).rows
    assert row.state == ADAPTER, row
    return model, fused


def layer(model: Any) -> Any:
    return model.base_model.model.up


def input_of(dtype: torch.dtype = f64, rows: int = 70) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, rows // 2, K, generator=generator, dtype=f64).to(dtype)


def step(model: Any, x: Tensor, call: Any = None, times: int = 1) -> dict[str, Tensor]:
    """y, dx and all gradients of the last of several backwards."""
    x = x.clone().requires_grad_()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(11)
    y = model(x) if call is None else call(model, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=f64).to(y.dtype)
    kept = y.detach().clone()
    leaves = {"x": x, **named}
    for _ in range(times):
        for t in leaves.values():
            t.grad = None
        y.backward(dy, retain_graph=times > 1)
    assert torch.equal(y, kept)
    return {"y": kept, **{name: t.grad for name, t in leaves.items()}}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], within: float) -> None:
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert got[name].dtype is exact.dtype and got[name].shape == exact.shape, name
        error = (got[name].double() - exact.double()).norm()
        assert error <= within * exact.double().norm(), (name, float(error / exact.norm()))


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": lambda model, x: model(x),
    "checkpointed": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "checkpointed, reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "layer checkpointed": lambda model, x: checkpointed_layer(model, x),
    "saved on the CPU": lambda model, x: saved_on_cpu(model, x),
}


def checkpointed_layer(model: Any, x: Tensor) -> Tensor:
    inner = model.base_model.model
    hidden = torch.sin(inner.first(x))
    return torch.sin(checkpoint(inner.up, hidden, use_reentrant=False))


def saved_on_cpu(model: Any, x: Tensor) -> Tensor:
    def copied(t: Tensor) -> Tensor:
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(copied, copied):
        return model(x)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("base", [*FRESH, *NOT_WHOLE, *HELD], ids=lambda base: base.__name__)
def test_update_of_any_base_has_pefts_gradients(base, call, added) -> None:
    stock, fused = pair(base)
    got = step(fused, input_of(), CALLS[call])
    assert_close(got, step(stock, input_of(), CALLS[call]), 1e-12)
    assert added, "the update ran elsewhere"
    if call == "plain":
        assert added == [base in FRESH]


@pytest.mark.parametrize("base", [*FRESH, *NOT_WHOLE, *HELD], ids=lambda base: base.__name__)
def test_second_backward_equals_the_first(base) -> None:
    stock, fused = pair(base)
    assert_close(step(fused, input_of(), times=2), step(stock, input_of()), 1e-12)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_result_that_a_base_remembers_keeps_its_bits(mode) -> None:
    stock, fused = pair(Remembering)
    with mode():
        for model in (stock, fused):
            model(input_of())
    assert torch.equal(layer(fused).base_layer.last, layer(stock).base_layer.last)


def test_graph_that_branches_off_the_result_has_its_gradients() -> None:
    stock, fused = pair(Branching)
    found = []
    for model in (fused, stock):
        x = input_of().requires_grad_()
        model(x)
        found.append({"x": torch.autograd.grad(layer(model).base_layer.branch, x)[0]})
    assert_close(*found, 1e-12)


def test_sum_can_be_changed_in_place_and_viewed() -> None:
    """PEFT's result is no view and no leaf, and a model's own code may change it."""
    stock, fused = pair(Reshaped)
    found = []
    for model in (fused, stock):
        x = input_of().requires_grad_()
        y = layer(model)(torch.sin(x))
        y += 1
        y[..., 3:7].mul_(2)
        y.view(-1).sin_()
        found.append({"x": torch.autograd.grad(y.sum(), x)[0]})
    assert_close(*found, 1e-12)


class Marked(Tensor):
    """A tensor of a class of its own, as another library's."""


class Marking(Base):
    def change(self, y: Tensor) -> Tensor:
        return y.as_subclass(Marked)


@pytest.mark.parametrize("grad", [False, True])
def test_result_of_another_class_is_added_to_by_its_own_ops(grad: bool, added: list[bool]) -> None:
    stock, fused = pair(Marking)
    with torch.set_grad_enabled(grad):
        got, want = (layer(model)(input_of()) for model in (fused, stock))
    assert type(got) is type(want) is Marked and not added
    assert not in_place.can_overwrite(torch.ones(2).as_subclass(Marked))
    assert_close({"y": got.as_subclass(Tensor)}, {"y": want.as_subclass(Tensor)}, 1e-12)


def test_version_of_an_overwritten_result_is_counted() -> None:
    """A holder that nothing counts, such as a C++ object, would be told by autograd."""
    y = torch.ones(70, N, dtype=f64, requires_grad=True) * 1
    version = y._version
    A, B = torch.ones(R, K, dtype=f64), torch.ones(N, R, dtype=f64)
    in_place.add_lora_linear_(y, torch.ones(70, K, dtype=f64), None, Record(None, A, B))
    assert y._version > version


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("base", [*FRESH, *NOT_WHOLE, *HELD], ids=lambda base: base.__name__)
def test_update_without_gradients_equals_pefts(base, mode, added) -> None:
    stock, fused = pair(base)
    with mode():
        got, want = fused(input_of()), stock(input_of())
    assert_close({"y": got}, {"y": want}, 1e-12)
    assert len(added) == 1


def test_result_of_another_mode_is_left() -> None:
    """A base that computes in inference mode: autograd refuses its result in place."""

    class Inference(Base):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                return super().forward(x)

    stock, fused = pair(Inference)
    with torch.no_grad():
        assert_close({"y": fused(input_of())}, {"y": stock(input_of())}, 1e-12)


CONFIGS: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.3},
    "lora_bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("rows", [6, 70])
@pytest.mark.parametrize("name", CONFIGS)
def test_update_of_any_configuration_has_pefts_gradients(name, rows, added) -> None:
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": ["up"]} | CONFIGS[name]
    stock, fused = pair(Base, LoraConfig(**settings))
    assert_close(step(fused, input_of(f64, rows)), step(stock, input_of(f64, rows)), 1e-12)
    assert added == [True]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", [6, 70])
def test_updates_of_several_adapters_have_pefts_gradients(rows, dropout, added) -> None:
    settings: Any = {"lora_alpha": ALPHA, "target_modules": ["up"], "lora_dropout": dropout}
    torch.manual_seed(0)
    stock: Any = get_peft_model(Model(Base), LoraConfig(r=R, **settings))
    stock.add_adapter("other", LoraConfig(r=3, **settings))
    stock.base_model.set_adapter(["default", "other"])
    for name in ("default", "other"):
        randomize(stock, name)
    stock = stock.to(f64).train()
    fused = fuse(copy.deepcopy(stock))
    assert_close(step(fused, input_of(f64, rows)), step(stock, input_of(f64, rows)), 1e-12)
    assert added[0] and len(added) == 1 + (rows == 6 or dropout > 0)


def test_update_of_adalora_has_pefts_gradients(added) -> None:
    config = AdaLoraConfig(
        init_r=R, lora_alpha=ALPHA, target_modules=["up"], total_step=10, tinit=1, tfinal=1
    )
    stock, fused = pair(Base, config)
    assert_close(step(fused, input_of()), step(stock, input_of()), 1e-12)
    assert added == [True]


def adalora_out_of_place(self: Any, x: Tensor) -> Tensor:
    """PEFT's forward adds to the base's result in place, whoever holds it."""
    A, B, E = (getattr(self, name)["default"] for name in ("lora_A", "lora_B", "lora_E"))
    factor = self.scaling["default"] / (self.ranknum["default"] + 1e-5)
    y: Tensor = self.base_layer(x) + (x @ (A * E).T @ B.T) * factor
    return y


@pytest.mark.parametrize("base", [*NOT_WHOLE, *HELD], ids=lambda base: base.__name__)
def test_update_of_adalora_leaves_a_result_that_its_base_holds(base, added) -> None:
    config = AdaLoraConfig(
        init_r=R, lora_alpha=ALPHA, target_modules=["up"], total_step=10, tinit=1, tfinal=1
    )
    stock, fused = pair(base, config)
    layer(stock).forward = MethodType(adalora_out_of_place, layer(stock))
    assert_close(step(fused, input_of()), step(stock, input_of()), 1e-12)
    assert added == [False]
    if base is Remembering:
        assert torch.equal(layer(fused).base_layer.last, layer(stock).base_layer.last)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "both"])
@pytest.mark.parametrize("needs_x", [False, True])
def test_update_with_frozen_factors_has_pefts_gradients(frozen, needs_x) -> None:
    stock, fused = pair(Base)
    found = []
    for model in (fused, stock):
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name and not (frozen == "both" or frozen in name))
        x = input_of().requires_grad_(needs_x)
        wanted = [p for p in (x, *model.parameters()) if p.requires_grad]
        if wanted:
            grads = torch.autograd.grad(model(x).square().sum(), wanted)
            found.append({str(i): t for i, t in enumerate(grads)})
    if found:
        assert_close(*found, 1e-12)


@pytest.mark.parametrize("adapter", [f32, bf16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_update_in_bfloat16_is_as_exact_as_pefts(adapter, autocast, added) -> None:
    exact, _ = pair(Sine)
    stock, fused = pair(Sine, dtype=bf16)
    for name, p in exact.named_parameters():
        for model in (stock, fused):
            own = dict(model.named_parameters())[name]
            own.data = p.detach().to(adapter if "lora_" in name else bf16)
    for name, p in exact.named_parameters():
        p.data = dict(stock.named_parameters())[name].detach().to(f64)

    def call(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", bf16, enabled=autocast):
            return model(x)

    x = input_of(bf16, 140)
    want = step(exact, x.to(f64))
    errors = []
    for model in (fused, stock):
        got = step(model, x, call)
        errors.append(
            {
                name: float((got[name].double() - t).norm() / t.norm())
                for name, t in want.items()
                if name in got
            }
        )
    assert added == [True]
    for name, error in errors[0].items():
        # One rounding of a result is 2⁻⁹ at most, whose rms is half of that.
        assert error <= 1.25 * errors[1][name] + 2.0**-10, (name, error, errors[1][name])


def test_result_in_another_dtype_is_pefts() -> None:
    """A base whose result is float32 for x in bfloat16."""

    class Wide(Base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float()

    stock, fused = pair(Wide, dtype=bf16)
    x = input_of(bf16)
    got, want = fused(x), stock(x)
    assert got.dtype is want.dtype is f32
    assert (got - want).norm() < 2.0**-7 * want.norm()


@pytest.mark.parametrize("is_kept", [False, True])
def test_result_in_a_narrower_dtype_is_pefts(is_kept: bool) -> None:
    """A base whose result is bfloat16 for any x, as kernels of 4-bit formats. If it keeps the
    result, the update goes to another tensor."""

    class Narrow(Base):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x).bfloat16()
            if is_kept:
                self.last = y
            return y

    stock, fused = pair(Narrow, dtype=f32)
    x = torch.sin(input_of(f32))
    got, want = layer(fused)(x), layer(stock)(x)
    assert got.dtype is want.dtype is bf16
    assert (got - want).float().norm() < 2.0**-7 * want.float().norm()


def test_update_of_few_rows_beside_a_float32_adapter_is_in_place(added) -> None:
    _, fused = pair(Base, dtype=bf16)
    for name, p in fused.named_parameters():
        if "lora_" in name:
            p.data = p.detach().float()
    fused(input_of(bf16, 6))
    assert added == [True]


def test_three_sgd_steps_equal_pefts() -> None:
    stock, fused = pair(Sine)
    for model in (stock, fused):
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_of()).square().mean().backward()
            optimizer.step()
    assert_close(step(fused, input_of()), step(stock, input_of()), 1e-11)


def test_update_differentiated_twice_raises_the_remedy() -> None:
    _, fused = pair(Base)
    x = input_of().requires_grad_()
    (dx,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


@pytest.mark.parametrize("base", FRESH, ids=lambda base: base.__name__)
def test_update_on_a_cpu_runs_the_cpu_kernels(base, added) -> None:
    stock, fused = pair(base)
    from lora_kernels.backends import library

    library.emulates_gpu = False  # `gpu_path` restores it
    assert_close(step(fused, input_of()), step(stock, input_of()), 1e-12)
    assert not added


def test_compiled_update_equals_pefts() -> None:
    stock, fused = pair(Base)
    compiled = torch.compile(layer(fused), backend="eager")
    x = input_of()
    assert_close({"y": compiled(x)}, {"y": layer(stock)(x)}, 1e-12)


def test_compiled_update_hands_the_arguments_on_to_the_base() -> None:
    class Scaled(Base):
        def forward(self, x: Tensor, shift: float = 0.0, *, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale + shift

    stock, fused = pair(Scaled)
    x = input_of()
    compiled = torch.compile(layer(fused), backend="eager")
    want = layer(stock)(x, 0.5, scale=3.0)
    for call in (compiled, layer(fused)):
        assert_close({"y": call(x, 0.5, scale=3.0)}, {"y": want}, 1e-12)


def test_update_moves_few_bytes() -> None:
    """353 MB and 3 kernels for 8192 rows of a 4096 × 4096 layer; the sum of two took 488 and 5."""
    model: Any = nn.Sequential(Base(4096, 4096, bias=False, device="meta", dtype=bf16))
    model = get_peft_model(model, LoraConfig(r=16, target_modules=["0"]))
    fused = fuse(model.to(device="meta", dtype=bf16)).train()
    x = torch.empty(8192, 4096, device="meta", dtype=bf16, requires_grad=True)
    traffic = counter.count(lambda: fused(x))
    assert traffic.kernels == 3 and traffic.bytes < 372e6
    y, wanted = fused(x), [x, *(p for p in fused.parameters() if p.requires_grad)]
    dy = torch.empty_like(y)
    traffic = counter.count(lambda: torch.autograd.grad(y, wanted, dy))
    assert traffic.kernels == 6 and traffic.bytes < 645e6, traffic  # dY is not copied


@pytest.mark.parametrize("base", [nn.Linear, Base])
def test_updates_of_three_adapters_with_dropout_copy_no_result(base) -> None:
    M, N, r = 8192, 4096, 16
    model: Any = nn.Sequential(base(N, N, bias=False, device="meta", dtype=bf16))
    config = LoraConfig(r=r, target_modules=["0"], lora_dropout=0.1)
    model = get_peft_model(model, config)
    for name in ("second", "third"):
        model.add_adapter(name, config)
    fused = activate(
        fuse(model.to(device="meta", dtype=bf16)).train(), "default", "second", "third"
    )
    x = torch.empty(M, N, device="meta", dtype=bf16, requires_grad=True)
    log: list[Any] = []
    counter.count(lambda: fused(x), log)
    size = 2 * M * N
    copies = [each for each in log if (each.read, each.written) == (size, size)]
    assert not copies, copies
    # Each adapter draws a mask of bytes, and reads x once and D(x) once; y is updated three times.
    assert sum(each.read + each.written for each in log) < (3 * 3.5 + 2 * 3 + 2 + 1) * size


# The tensors that the Function of an update saves and hands on


class NotesGradient(torch.autograd.Function):
    """A result that no one else holds, of a backward that notes where its gradient lies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[int]) -> Tensor:
        ctx.seen = seen
        return x @ x.new_ones(K, N)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(dy.data_ptr())
        return dy @ dy.new_ones(N, K), None


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("frozen", [(), ("A",), ("B",), ("A", "B")], ids="".join)
def test_update_saves_x_for_dA_and_p_for_dB_alone(frozen: tuple[str, ...], gated: bool) -> None:
    x, A, B = torch.randn(70, K), torch.randn(R, K), torch.randn(N, R)
    gate = torch.randn(R, requires_grad=True) if gated else None
    for name, t in (("A", A), ("B", B)):
        t.requires_grad_(name not in frozen)
    saved: list[Tensor] = []
    y = torch.ones(70, N)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        in_place.add_lora_linear_(y, x, None, Record(None, A, B, None, 2.0, rank_gate=gate))
    shapes = [t.shape for t in saved]
    assert ((70, K) in shapes) is ("A" not in frozen)
    assert ((70, R) in shapes) is ("B" not in frozen or gated)


def test_update_hands_dy_on_to_the_base_without_a_copy() -> None:
    seen: list[int] = []
    x = torch.randn(70, K, requires_grad=True)
    A, B = torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)
    record = Record(None, A, B, None, 2.0)
    y = in_place.add_lora_linear_(NotesGradient.apply(x, seen), x, None, record)
    dy = torch.randn(70, N)
    y.backward(dy)
    assert seen == [dy.data_ptr()]


def test_gradients_of_several_dy_at_once_equal_pefts() -> None:
    """`is_grads_batched=True`."""
    found = []
    for model in pair(Base):
        x = torch.randn(5, K, generator=torch.Generator().manual_seed(1), dtype=f64)
        x.requires_grad_()
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        y = model(x)
        dy = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(5), dtype=f64)
        found.append(torch.autograd.grad(y, leaves, dy, is_grads_batched=True))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_selectively_checkpointed_adapters_with_dropout_have_the_same_gradients() -> None:
    """The second adapter's update is not added to a result that the mode has saved."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        is_saved = op.name().startswith(("lora_kernels::", "aten::add"))
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    config = LoraConfig(r=R, target_modules=["0"], lora_dropout=0.3)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(K, N)), config)
    model.add_adapter("second", config)
    randomize(model), randomize(model, "second", 2)
    model.base_model.set_adapter(["default", "second"])
    fuse(model.double()).train()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    selective = partial(checkpoint, model, use_reentrant=False, context_fn=contexts)
    found = []
    for call in (model, selective):
        torch.manual_seed(3)
        x = torch.randn(80, K, dtype=f64, requires_grad=True)
        model.zero_grad()
        call(x).square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([t.clone() for t in (x.grad, *grads)])
    assert len(found[0]) == 5
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


class Mean(nn.Linear):
    """The same result for all rows, in one row."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0, keepdim=True)


@pytest.mark.parametrize("grad", [False, True])
def test_update_is_broadcast_over_a_result_with_fewer_rows(grad: bool) -> None:
    base = Mean(K, N)
    stock: Any = get_peft_model(nn.Sequential(base).double(), LoraConfig(r=R, target_modules=["0"]))
    randomize(stock)
    stock, fused = stock.double(), fuse(copy.deepcopy(stock).double())
    x = torch.randn(80, K, dtype=f64)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(fused(x), stock(x))


class ByColumns(nn.Linear):
    """A bfloat16 result that is stored by columns."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16().transpose(0, 1).contiguous().transpose(0, 1)


def test_second_update_of_a_result_by_columns_equals_pefts() -> None:
    config = LoraConfig(r=R, target_modules=["0"], lora_dropout=0.1)
    stock: Any = get_peft_model(nn.Sequential(ByColumns(K, N)), config)
    stock.add_adapter("second", config)
    randomize(stock), randomize(stock, "second", 2)
    stock.base_model.set_adapter(["default", "second"])
    fused, x, found = fuse(copy.deepcopy(stock)), torch.randn(10, 12, K), []
    for model in (stock, fused):
        torch.manual_seed(3)
        found.append(model.train()(x).float())
    # The base's result is rounded to 2⁻⁹ and the sum to 2⁻⁹ again, of numbers of order 1 and more.
    torch.testing.assert_close(*found, rtol=2.0**-7, atol=2.0**-7)


class Half(nn.Linear):
    """A bfloat16 result for any x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


@pytest.mark.parametrize("rows", [3, 80])
def test_update_of_adalora_has_the_dtype_of_its_base_s_result(rows: int) -> None:
    config = AdaLoraConfig(init_r=R, target_r=2, total_step=10, target_modules=["0"])
    stock: Any = get_peft_model(nn.Sequential(Half(K, N)), config)
    randomize(stock)
    fused, x = fuse(copy.deepcopy(stock)), torch.randn(rows, K)
    got, want = fused(x), stock(x)
    assert got.dtype is want.dtype is bf16
    # Two roundings to 2⁻⁹, of the base's result and of the sum, in ours and in PEFT's.
    torch.testing.assert_close(got, want, rtol=2.0**-7, atol=2.0**-7)


INSTALLED = [name for name in modules.FRESH if find_spec(name.partition(".")[0])]


@pytest.mark.parametrize("module", INSTALLED)
def test_listed_class_of_an_installed_library_exists(module: str) -> None:
    """Else the update over a class that its library renamed would go out of place in silence."""
    found = importlib.import_module(module)
    assert any(hasattr(found, name) for name in modules.FRESH[module])
