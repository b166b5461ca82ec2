"""PEFT's layers over weights that only another library can read: its module does the base product.

Where a library is no dependency of the tests, a module of ours stands for its: PEFT's layer is the
real one, and sees of the base no more than that it can be called.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.gptq import SVDQuantLinear
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn

from lora_kernels.peft import explain, fuse, unfuse

pytest.importorskip("bitsandbytes")
from bitsandbytes.nn import Linear8bitLt

from .tiny import ALPHA, MLP, R, assert_same, batch, count_ops, randomize, results

f32, bf16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT, of `Packed`
# Float32 sums of at most 41 products in two orders, through two layers and back.
RTOL = 4 * 41 * 2.0**-24
# bitsandbytes quantizes x to 8 bits: what the adapter of the first layer changes in its last bit
# can move an element of the second's x by one of 127 steps.
STEP = 2.0**-7


class Packed(nn.Module):
    """Holds a weight as GPTQ's and its like do: no `weight`, a buffer that nobody else can read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.qweight, Tensor)
        return nn.functional.linear(x, self.qweight.to(x.dtype))


def packed(cls: type) -> nn.Module:
    """An MLP with PEFT's layer of that class twice."""
    torch.manual_seed(0)
    svd = cls is SVDQuantLinear
    config: Any = (AdaLoraConfig if svd else LoraConfig)(
        lora_alpha=ALPHA, target_modules=["up", "down"], **({"total_step": 10} if svd else {})
    )
    model = MLP()
    for name in ("up", "down"):
        base = Packed(getattr(model, name))
        rank = {"init_lora_weights": True} if svd else {}
        setattr(model, name, cls(base, "default", config=config, r=R, lora_alpha=ALPHA, **rank))
    randomize(model, "default")
    for p in model.parameters():
        p.requires_grad_(p.dim() == 2)
    return model


PACKED = [GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear, SVDQuantLinear]
every_class = pytest.mark.parametrize("cls", PACKED, ids=lambda cls: cls.__name__)


@every_class
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients(cls: type, training: bool) -> None:
    stock = packed(cls).train(training)
    fused = fuse(copy.deepcopy(stock))
    assert_same(results(fused, batch(f32)), results(stock, batch(f32)), RTOL)
    ops = count_ops(lambda: fused.up(batch(f32)))  # type: ignore[operator]
    assert ops.pop("lora_linear") == 1 and sum(ops.values()) == 1  # the base's own


@every_class
def test_the_base_is_called_and_that_is_said(cls: type) -> None:
    fused = fuse(packed(cls))
    for row in explain(fused).rows:
        assert row.state == "adapter only"
        assert row.reason.startswith("base layer: Packed is not exactly nn.Linear")
    with pytest.raises(RuntimeError, match="2 adapter only"):
        explain(fused).assert_fused()


@every_class
def test_twenty_steps_of_sgd(cls: type) -> None:
    ends = []
    for change in (fuse, lambda model: model):
        model = change(packed(cls))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(20):
            optimizer.zero_grad()
            model(batch(f32)).square().mean().backward()
            optimizer.step()
        ends.append(model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        # Of order 1, moved by 20 gradients of that order.
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=20 * RTOL)


@every_class
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copied_and_given_back(cls: type, clone: Callable[[Any], Any]) -> None:
    fused = fuse(packed(cls))
    other = clone(fused)
    assert type(other.up) is type(fused.up) and type(fused.up).__name__ == f"Fused{cls.__name__}"
    assert torch.equal(other(batch(f32)), fused(batch(f32)))
    assert type(unfuse(other).up) is cls


@pytest.mark.parametrize("state", ["disabled", "none active"])
def test_without_an_adapter(state: str) -> None:
    stock = packed(GPTQLoraLinear)
    fused = fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        for layer in (model.up, model.down):
            if state == "disabled":
                layer.enable_adapters(False)  # type: ignore[operator]
            else:
                layer.set_adapter([])  # type: ignore[operator]
    assert torch.equal(fused(batch(f32)), stock(batch(f32)))
    assert {row.state for row in explain(fused).rows} == {"not fused"}


# bitsandbytes' 8 bits: the library is here


def eight_bits(dtype: torch.dtype, ada: bool = False, **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    model: Any = MLP()
    for name in ("up", "down"):
        dense = getattr(model, name)
        base = Linear8bitLt(
            dense.in_features, dense.out_features, dense.bias is not None, has_fp16_weights=False
        )
        base.load_state_dict(dense.state_dict())
        setattr(model, name, base)
    model.to("cpu", dtype)  # which quantizes
    model.is_loaded_in_8bit = True  # as transformers marks what it has loaded
    kind: Any = AdaLoraConfig if ada else LoraConfig
    config = kind(
        lora_alpha=ALPHA, target_modules=["up", "down"],
        **({"total_step": 10, "init_r": R} if ada else {"r": R}), **settings,
    )  # fmt: skip
    peft_model = get_peft_model(model, config)
    randomize(peft_model, "default")
    return peft_model


@pytest.mark.parametrize("ada", [False, True])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_8_bits(dtype: torch.dtype, ada: bool, tmp_path: Path) -> None:
    stock, fused = eight_bits(dtype, ada), fuse(eight_bits(dtype, ada))
    rows = explain(fused).rows
    assert {row.state for row in rows} == {"adapter only"}
    assert all("Linear8bitLt is not exactly nn.Linear" in row.reason for row in rows)
    got, want = results(fused, batch(dtype)), results(stock, batch(dtype))
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).float().norm() / want[name].float().norm()
        assert error <= STEP, (name, error)
    for model, folder in ((stock, "stock"), (fused, "fused")):
        model.save_pretrained(tmp_path / folder)
    name = "adapter_model.safetensors"
    assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()


def test_8_bits_several_adapters_and_rows_that_name_them() -> None:
    stock, fused = eight_bits(f32), eight_bits(f32)
    for model in (stock, fused):
        model.add_adapter("second", LoraConfig(r=3, target_modules=["up"]))
        randomize(model, "second")
        model.eval()
    fuse(fused)
    x, names = batch(f32), ["default", "second", "__base__", "default"] * 9
    names = names[: len(x)]
    with torch.no_grad():
        for kwargs in ({}, {"adapter_names": names}):
            got, want = fused(x, **kwargs), stock(x, **kwargs)
            assert (got - want).norm() <= STEP * want.norm()
            for model in (stock, fused):
                model.base_model.set_adapter(["default", "second"])
