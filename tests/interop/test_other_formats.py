"""PEFT's layers over weights that only another library can read: its module does the base GEMM.

Where a library is no dependency of the tests, a module of ours stands for its: PEFT's layer is the
real one, and sees of the base no more than that it can be called.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from importlib.util import find_spec
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

from lora_kernels.oracle import tolerance
from lora_kernels.peft import explain, foreign, fuse, unfuse
from lora_kernels.peft.adalora import FusedSVD
from lora_kernels.peft.explain_rows import ADAPTER, PEFT
from lora_kernels.peft.linear import Fused

pytest.importorskip("bitsandbytes")
from bitsandbytes.nn import Linear8bitLt

from tests.support.assertions import assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import (
    ALPHA,
    MLP,
    R,
    activate,
    add_adapter,
    assert_same_files,
    assert_trains_alike,
    batch,
    count_ops,
    randomize,
    results,
)

f32, bf16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT, of `Packed`
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
        return nn.functional.linear(x, self.qweight.to(x.dtype))


def packed(cls: type) -> Any:
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
def test_fused_layer_calls_the_base_and_trains_as_peft_s(cls: type) -> None:
    stock, fused, x = packed(cls), fuse(packed(cls)), batch(f32)
    assert_close_derived(results(fused.eval(), x), results(stock.eval(), x))
    ops = count_ops(lambda: fused.up(x))
    assert ops.pop("lora_linear") == 1 and sum(ops.values()) == 1  # the base's own
    for row in explain(fused).rows:
        assert row.state == ADAPTER
        assert row.reason.startswith("base layer: Packed is not exactly nn.Linear")
    with pytest.raises(RuntimeError, match=f"2 {ADAPTER}"):
        explain(fused).assert_fused()
    stock.train(), fused.train()
    assert_trains_alike(fused, stock, lambda model, step: model(x), steps=20)


@every_class
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copied_and_given_back(cls: type, clone: Callable[[Any], Any]) -> None:
    fused = fuse(packed(cls))
    other = clone(fused)
    assert type(other.up) is type(fused.up) and type(fused.up).__name__ == f"Fused{cls.__name__}"
    assert_bitwise_equal(other(batch(f32)), fused(batch(f32)))
    assert type(unfuse(other).up) is cls


@pytest.mark.parametrize("state", ["disabled", "none active"])
def test_layer_without_an_adapter_is_the_base(state: str) -> None:
    stock = packed(GPTQLoraLinear)
    fused = fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        for layer in (model.up, model.down):
            if state == "disabled":
                layer.enable_adapters(False)
            else:
                layer.set_adapter([])
    assert_bitwise_equal(fused(batch(f32)), stock(batch(f32)))
    assert {row.state for row in explain(fused).rows} == {PEFT}


# bitsandbytes' 8 bits: the library is here


def eight_bits(dtype: torch.dtype, ada: bool = False, **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    model: Any = MLP()
    for name in ("up", "down"):
        dense = getattr(model, name)
        sizes = dense.in_features, dense.out_features, dense.bias is not None
        base = Linear8bitLt(*sizes, has_fp16_weights=False)
        base.load_state_dict(dense.state_dict())
        setattr(model, name, base)
    model.to("cpu", dtype)  # which quantizes
    model.is_loaded_in_8bit = True  # as transformers marks what it has loaded
    kind: Any = AdaLoraConfig if ada else LoraConfig
    rank = {"total_step": 10, "init_r": R} if ada else {"r": R}
    config = kind(lora_alpha=ALPHA, target_modules=["up", "down"], **rank, **settings)
    peft_model = get_peft_model(model, config)
    randomize(peft_model, "default")
    return peft_model


@pytest.mark.parametrize("ada", [False, True])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_8_bits_equal_peft_and_save_the_same(dtype: torch.dtype, ada: bool, tmp_path: Path) -> None:
    stock, fused = eight_bits(dtype, ada), fuse(eight_bits(dtype, ada))
    rows = explain(fused).rows
    assert {row.state for row in rows} == {ADAPTER}
    assert all("Linear8bitLt is not exactly nn.Linear" in row.reason for row in rows)
    got, want = results(fused, batch(dtype)), results(stock, batch(dtype))
    if ada:  # PEFT's result is float32, ours x's dtype
        assert got["y"].dtype is dtype and want["y"].dtype is f32
        got["y"] = got["y"].float()
    # Each of two layers rounds to the dtype too, in bfloat16 almost a step.
    assert_close_derived(got, want, STEP + 2 * tolerance.unit_roundoff(dtype))
    assert_same_files(stock, fused, tmp_path)


def test_8_bits_with_several_adapters_and_rows_that_name_them_equal_peft() -> None:
    stock, fused = eight_bits(f32), eight_bits(f32)
    for model in (stock, fused):
        add_adapter(model, r=3, target_modules={"up"})
        model.eval()
    fuse(fused)
    x, names = batch(f32), ["default", "second", "__base__", "default"] * 9
    names = names[: len(x)]
    with torch.no_grad():
        for kwargs in ({}, {"adapter_names": names}):
            assert_close_derived(fused(x, **kwargs), stock(x, **kwargs), STEP)
            for model in (stock, fused):
                activate(model, "default", "second")


@pytest.mark.parametrize("name", foreign._MODULES)
def test_class_of_peft_is_known_by_its_name_and_module(name: str) -> None:
    """The class itself may need a library that is not here."""
    module = foreign._MODULES[name]
    spec = find_spec(module)  # None in an older PEFT
    if spec is not None and spec.origin is not None:
        assert re.search(rf"^ *class {name}\(", Path(spec.origin).read_text(), re.MULTILINE)
    here, elsewhere = (
        type(name, (nn.Linear,), {"__module__": each, "forward": nn.Linear.forward})
        for each in (module, "another.library")
    )
    found = foreign.fused_class(here)
    assert found.__mro__[1] is (FusedSVD if name.startswith("SVD") else Fused)
    assert found.__mro__[found.__mro__.index(Fused) + 1] is here and found.peft_class is here
    assert (found.__module__, found.__name__) == (foreign.__name__, f"Fused{name}")
    assert foreign.fused_class(here) is found and foreign.fused_class(elsewhere) is None


@pytest.mark.parametrize("name", ["GPTQLoraLinear", "FusedLinear", "other"])
def test_other_names_of_the_module_are_no_classes(name: str) -> None:
    with pytest.raises(AttributeError, match=f"^module {foreign.__name__!r} has no attribute"):
        getattr(foreign, name)
    assert foreign.FusedGPTQLoraLinear.peft_class is GPTQLoraLinear
