"""Small PEFT models, and what the tests compare of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.peft import FusedLinear, fuse

# α ≠ r, r no power of two; sizes that no tile divides.
R, ALPHA = 5, 7
SIZES = (23, 41, 9)

# In float64, what is left of a difference between two orders of the same sums: fewer than 2**8
# terms in each, through a few layers, is well under 2**20 unit roundoffs. A scaling, a mask or a
# term left out moves these results by more than 2**-10.
FLOAT64_RTOL = 2.0**-33


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(SIZES[0], SIZES[1])
        self.down = nn.Linear(SIZES[1], SIZES[2], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


def add_lora(model: nn.Module, seed: int = 1, **config: Any) -> PeftModel:
    """The model with adapters whose B, and bias if any, are random as if they had been trained."""
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": ["up", "down"]} | config
    peft_model = get_peft_model(model, LoraConfig(**settings))
    randomize(peft_model, "default", seed)
    return peft_model


def randomize(model: nn.Module, adapter: str, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name and f".{adapter}" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))


# A transformers model's settings, and ids for it.
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
IDS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(6))


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> PeftModel:
    torch.manual_seed(seed)
    return add_lora(MLP().to(dtype), **config)


def pair(model: PeftModel) -> tuple[PeftModel, PeftModel]:
    """The model as it is, and a fused copy of it."""
    return model, fuse(copy.deepcopy(model))


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, SIZES[0], generator=generator, dtype=torch.float64).to(dtype)


def output(model: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of a transformers model the logits."""
    y = model(x, *args, **kwargs)
    return y if isinstance(y, Tensor) else y.logits


def results(model: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The output on x, and the gradient of x, unless x is ids, and of each trainable parameter, by
    name."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = output(model, x, *args, **kwargs)
    weights = ((torch.arange(y.numel()) % 7 - 3) / 4).to(y.dtype).view(y.shape)  # exact in any
    if not y.requires_grad:
        return {"y": y}
    wanted = {n: p for n, p in [("x", x), *model.named_parameters()] if p.requires_grad}
    grads = torch.autograd.grad((y * weights).sum(), list(wanted.values()), allow_unused=True)
    named = dict(zip(wanted, grads, strict=True))
    return {"y": y.detach()} | {n: g for n, g in named.items() if g is not None}


def assert_same(
    got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = FLOAT64_RTOL
) -> None:
    assert got.keys() == want.keys()
    for name, ref in want.items():
        assert got[name].dtype == ref.dtype, name
        error = (got[name] - ref).norm() / ref.norm().clamp_min(1e-30)
        assert error <= rtol, f"{name}: relative error {error:.3g}"


def fused_layers(model: nn.Module) -> list[FusedLinear]:
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


class OpCounter(TorchDispatchMode):
    """Counts lora_kernels' ops and matrix products by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        products = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mv", "dot", "einsum")
        if func.namespace == "lora_kernels" or name.removesuffix("_") in products:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_ops(call: Callable[[], Any]) -> dict[str, int]:
    with OpCounter() as counter:
        call()
    return dict(counter.counts)
