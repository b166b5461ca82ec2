"""`fuse(model, cast_adapters=True)`: float32 adapters in x's dtype, on the path of a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_kernels
from lora_kernels.backends import library
from lora_kernels.backends.eager import blocks
from lora_kernels.backends.eager.products import MANY_ROWS
from lora_kernels.bench import baselines, counter
from lora_kernels.integrations import FuseCallback
from lora_kernels.peft import explain, fuse, linear, unfuse
from tests.support.assertions import assert_bitwise_equal
from tests.support.peft_models import in_float64, randomize

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
K, N, R, ALPHA = 64, 128, 5, 7
pytestmark = pytest.mark.usefixtures("gpu_path")


class Called(nn.Linear):
    """A base layer that is called as a module."""


class QKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, K), nn.Linear(K, 48), nn.Linear(K, 48)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


class UnusedQ(QKV):
    """q is computed with k and v, and its y has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        _, k, v = self.q(x), self.k(x), self.v(x)
        return torch.cat([k, v], -1)


class GLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(N, K)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


BASES = {
    "linear": lambda: nn.Linear(K, N),
    "called": lambda: Called(K, N),
    "qkv": QKV,
    "unused q": UnusedQ,
    "mlp": GLU,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"lora_dropout": 0.25},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
}


def stock(base: str, config: dict[str, Any] | None = None, dtype: torch.dtype = bf16) -> Any:
    """A PEFT model in 16 bits whose adapters are float32, as PEFT makes them."""
    torch.manual_seed(0)
    module = nn.Sequential(BASES[base]())
    targets = ["q", "k", "v", "gate", "up", "down", "0"]
    found = [
        t
        for t in targets
        if any(
            name.split(".")[-1] == t
            for name, m in module.named_modules()
            if isinstance(m, nn.Linear)
        )
    ]
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": found} | (config or {})
    model: Any = get_peft_model(module.to(dtype), LoraConfig(**settings))
    randomize(model)
    for p in model.parameters():
        p.data = p.data.to(f32 if p.requires_grad else dtype)
    return model.train()


def cast_model(model: Any, dtype: torch.dtype = bf16) -> Any:
    """The same with adapters in `dtype`, fused: what rounding them in each call has to equal."""
    found = copy.deepcopy(model)
    for name, p in found.named_parameters():
        if ("lora_A" in name or "lora_B" in name) and p.dim() == 2:
            p.data = p.data.to(dtype)
    return fuse(found)


def step(model: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    unused = ".q." if isinstance(model.base_model.model[0], UnusedQ) else "none"
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and unused not in n}
    torch.manual_seed(3)
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *named.values()], dy)
    return {"y": y.detach(), **dict(zip(["x", *named], grads, strict=True))}


def input_of(dtype: torch.dtype = bf16, rows: int = 70) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("base", BASES)
def test_few_rows_keep_float32_adapters(base) -> None:
    """Rounding the adapters would copy them, which is more than a copy of x."""
    model = stock(base)
    got, want = fuse(copy.deepcopy(model), cast_adapters=True), fuse(copy.deepcopy(model))
    for rows in (5, 70, 5, 64):  # also after a call with many
        found, wanted = step(got, input_of(bf16, rows)), step(want, input_of(bf16, rows))
        assert all(torch.equal(found[name], t) for name, t in wanted.items()) is (rows < 70)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_cast_adapters_compute_as_16_bit_adapters_do(dtype, base, config, rows=70) -> None:
    """Bit for bit, but for the gradients of A and B: float32 sums that nothing has rounded."""
    model = stock(base, CONFIGS[config], dtype)
    got = step(fuse(copy.deepcopy(model), cast_adapters=True), input_of(dtype, rows))
    want = step(cast_model(model, dtype), input_of(dtype, rows))
    assert got.keys() == want.keys()
    for name, t in want.items():
        is_factor = ("lora_A" in name or "lora_B" in name) and t.dim() == 2
        assert got[name].dtype is (f32 if is_factor else t.dtype), name
        if config == "dora":  # whose norm is that of the float32 adapter
            assert (got[name].float() - t.float()).norm() <= 2.0**-6 * t.float().norm(), name
        elif is_factor:
            difference = (got[name] - t.float()).norm()
            assert difference <= torch.finfo(dtype).eps * t.float().norm(), name
        else:
            assert torch.equal(got[name], t), name
    if base != "called" and config == "lora":
        factors = [t for t in got.values() if t.dtype is f32]
        assert not any(torch.equal(t.to(dtype).float(), t) for t in factors)


@pytest.mark.parametrize("base", [base for base in BASES if base != "called"])
def test_float32_gradients_are_close_to_float64(base) -> None:
    """A weight, x, P and dS in bfloat16, each rounded to 9 bits, give at most 2⁻⁶ of the norm."""
    model = stock(base)
    got = step(fuse(copy.deepcopy(model), cast_adapters=True), input_of())
    want = step(in_float64(model), input_of().double())
    for name, t in want.items():
        error = (got[name].double() - t).norm() / t.norm()
        assert error <= 2.0**-6, (name, float(error))
        is_factor = "lora_" in name
        assert not is_factor or not torch.equal(got[name].to(bf16).float(), got[name]), name


@pytest.mark.parametrize("wide", ["lora_A", "lora_B"])
@pytest.mark.parametrize("base", ["linear", "qkv", "mlp"])
def test_adapters_of_two_dtypes_are_cast(base, wide) -> None:
    model = stock(base)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(f32 if wide in name else bf16)
    got = step(fuse(copy.deepcopy(model), cast_adapters=True), input_of())
    want = step(in_float64(model), input_of().double())
    for name, t in want.items():
        error = (got[name].double() - t).norm() / t.norm()
        assert error <= 2.0**-6, (name, float(error))
        assert got[name].dtype is (f32 if wide in name else bf16), name


def test_cast_adapters_of_named_rows_compute_as_16_bit_adapters_do() -> None:
    model = stock("linear")
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=ALPHA, target_modules=["0"]))
    randomize(model, "other")
    model = model.eval()
    for name, p in model.named_parameters():
        p.data = p.data.to(f32 if "lora_" in name else bf16)
    x = torch.stack([input_of(rows=140)] * 2)
    got, want = fuse(copy.deepcopy(model), cast_adapters=True), cast_model(model)
    with torch.no_grad():
        found = [each(x, adapter_names=["default", "other"]) for each in (got, want)]
    assert torch.equal(*found)


@pytest.mark.parametrize("dropout", [0.0, 0.25])  # with dropout each has a call of its own
@pytest.mark.parametrize("base", ["linear", "called"])
def test_cast_adapters_of_two_active_adapters_compute_as_16_bit_adapters_do(base, dropout) -> None:
    config = {"lora_dropout": dropout}
    model = stock(base, config)
    other = LoraConfig(r=3, lora_alpha=ALPHA, target_modules=["0"], **config)
    model.add_adapter("other", other)
    randomize(model, "other")
    model.base_model.set_adapter(["default", "other"])
    for name, p in model.named_parameters():
        p.data = p.data.to(f32 if "lora_" in name else bf16)
    model.train()
    got = step(fuse(copy.deepcopy(model), cast_adapters=True), input_of())
    want = step(cast_model(model), input_of())
    assert sum("lora_" in name for name in want) == 4
    for name, t in want.items():
        assert torch.equal(got[name].to(t.dtype), t), name


def test_cast_dora_has_the_norm_of_its_float32_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's norm is of the parameters, which are not rounded."""
    found: list[Tensor] = []
    norm = linear.DoraNormCache.__call__

    def record(self: Any, weight: Any, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        found.extend([A, B])
        return norm(self, weight, A, B, scaling)

    monkeypatch.setattr(linear.DoraNormCache, "__call__", record)
    model = fuse(stock("linear", {"use_dora": True}), cast_adapters=True)
    model(input_of())
    layer = model.base_model.model[0]
    want = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    assert [t.dtype for t in found] == [f32, f32]
    assert all(map(torch.equal, found, want))


def test_cast_dora_rounds_its_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.dtype] = []
    call = linear.lora_linear

    def record(
        x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor, *args: Any, **kw: Any
    ) -> Any:
        found.extend([lora_A.dtype, lora_B.dtype])
        return call(x, weight, lora_A, lora_B, *args, **kw)

    monkeypatch.setattr(linear, "lora_linear", record)
    fuse(stock("linear", {"use_dora": True}), cast_adapters=True)(input_of())
    assert found == [bf16, bf16]


def test_cast_adalora_computes_as_16_bit_adapters_do() -> None:
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=R, lora_alpha=ALPHA, target_modules=["0"], total_step=10, tinit=1, tfinal=1
    )
    model: Any = get_peft_model(nn.Sequential(nn.Linear(K, N)).to(bf16), config)
    randomize(model)
    for p in model.parameters():
        p.data = p.data.to(f32 if p.requires_grad else bf16)
    got = step(fuse(copy.deepcopy(model), cast_adapters=True), input_of())
    want = step(cast_model(model), input_of())
    for name, t in want.items():
        assert torch.equal(got[name].to(t.dtype), t), name


def test_cast_adapters_over_4_bits_compute_as_16_bit_adapters_do() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = baselines.linear_4bit(nn.Linear(K, N).to(bf16), "nf4")
    model: Any = get_peft_model(nn.Sequential(base), LoraConfig(r=R, target_modules=["0"]))
    randomize(model)
    got = step(fuse(copy.deepcopy(model), cast_adapters=True), input_of())
    want = step(cast_model(model), input_of())
    for name, t in want.items():
        assert torch.equal(got[name].to(t.dtype), t), name


@pytest.mark.parametrize("base", BASES)
def test_cast_adapters_read_every_value(base) -> None:
    """A step of an optimizer, and a write that moves no version counter, are seen."""
    model = fuse(stock(base), cast_adapters=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.1, fused=True)
    for _ in range(2):
        model(input_of()).float().square().mean().backward()
        optimizer.step()
        want = cast_model(unfuse(copy.deepcopy(model)))
        assert_bitwise_equal(model(input_of()), want(input_of()))


@pytest.mark.parametrize("base", BASES)
def test_float32_and_autocast_are_left_as_they_are(base) -> None:
    """With x in float32 nothing is rounded; under autocast autocast rounds."""
    model = stock(base, dtype=f32)
    x = input_of(f32)
    got, want = fuse(copy.deepcopy(model), cast_adapters=True), fuse(copy.deepcopy(model))
    for name, t in step(want, x).items():
        assert torch.equal(step(got, x)[name], t), name
    with torch.autocast("cpu", bf16):
        found, wanted = step(got, x), step(want, x)
    for name, t in wanted.items():
        assert torch.equal(found[name], t), name


def test_cpu_keeps_float32_adapters() -> None:
    model = stock("linear")
    library.emulates_gpu = False  # `gpu_path` restores it
    with lora_kernels.backend("cpu"):
        got, want = fuse(copy.deepcopy(model), cast_adapters=True), fuse(copy.deepcopy(model))
        for name, t in step(want, input_of()).items():
            assert torch.equal(step(got, input_of())[name], t), name
        assert "rounded" not in str(explain(got))


def test_switch_holds_for_a_model_that_has_run_without_it() -> None:
    """Also for the calls that a layer has prepared."""
    model = fuse(stock("linear"))
    before = model(input_of())
    for _ in range(2):
        assert torch.equal(model(input_of()), before)
    want = cast_model(unfuse(copy.deepcopy(model)))(input_of())
    assert not torch.equal(want, before)
    fuse(model, cast_adapters=True)
    for _ in range(2):
        assert torch.equal(model(input_of()), want)
    fuse(model)
    for _ in range(2):
        assert torch.equal(model(input_of()), before)


def test_explain_says_that_adapters_are_rounded() -> None:
    model = fuse(stock("linear"), cast_adapters=True)
    (row,) = explain(model, x_dtype=bf16).rows
    assert "adapters are rounded to torch.bfloat16" in row.reason
    (row,) = explain(fuse(model), x_dtype=bf16).rows  # the last call decides
    assert "rounded" not in row.reason


def test_unfuse_and_copies_keep_the_switch_in_order() -> None:
    model = fuse(stock("linear"), cast_adapters=True)
    assert_bitwise_equal(copy.deepcopy(model)(input_of()), model(input_of()))
    layer = unfuse(model).base_model.model[0]
    assert "casts_adapters" not in vars(layer)


def test_fuse_callback_hands_the_switch_on() -> None:
    model = stock("linear")
    FuseCallback(cast_adapters=True).on_init_end(None, None, None, model=model)
    assert model.base_model.model[0].casts_adapters


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_step_of_a_cast_adapter_takes_few_kernels(base) -> None:
    """14 kernels of a layer's step with 8192 rows in place of 26; those of NF4 decode twice."""
    with torch.device("meta"):
        linear: Any = nn.Linear(4096, 4096, bias=False).to(bf16)
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
        linear = baselines.linear_4bit(linear, "nf4")
    model: Any = get_peft_model(nn.Sequential(linear), LoraConfig(r=16, target_modules=["0"]))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(f32)
    fuse(model.train(), cast_adapters=True)
    x = torch.empty(8192, 4096, dtype=bf16, device="meta", requires_grad=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

    def run() -> None:
        y = model(x)
        torch.autograd.grad(y, wanted, torch.empty_like(y))

    found = counter.count(run)
    kernels, megabytes = {"dense": (16, 900), "nf4": (22, 1000)}[base]
    assert found.kernels <= kernels and found.bytes <= megabytes * 1e6, found


@pytest.mark.parametrize("rows", [1, MANY_ROWS, MANY_ROWS + 1])
def test_explain_of_few_rows_does_not_say_that_adapters_are_rounded(rows: int) -> None:
    model = fuse(stock("linear"), cast_adapters=True)
    (row,) = explain(model, x_dtype=bf16, rows=rows).rows
    assert ("rounded" in row.reason) is (rows > MANY_ROWS)


def test_stacked_adapters_are_a_view_only_if_they_lie_one_below_the_other() -> None:
    memory = torch.arange(96.0).view(12, 8)
    other = memory.clone()
    first, second, third = memory.split([3, 4, 5])
    for parts, is_view in (
        ([first, second, third], True),
        ([second, third], True),
        ([first], True),
        ([first, third], False),
        ([second, first], False),
        ([first, first], False),
        ([first, other[3:7]], False),
        ([memory[:3, :4], memory[3:7, :4]], False),
        ([memory.t()[:2], memory.t()[2:4]], False),
        ([square.t() for square in torch.arange(8.0).view(2, 2, 2)], False),
    ):
        stacked = blocks.stack(parts)
        assert torch.equal(stacked, torch.cat(parts)), parts
        assert (stacked.data_ptr() == parts[0].data_ptr()) is is_view, parts
