"""Small PEFT models of every kind of layer, and what the tests compare of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_kernels.peft import FusedLinear, fuse, unfuse
from lora_kernels.quantization import QuantizedWeight

from .assertions import assert_bitwise_equal, assert_close_derived

f64, f32 = torch.float64, torch.float32

# α ≠ r, r no power of two; sizes that no tile divides.
R, ALPHA = 5, 7
SIZES = (23, 41, 9)
# Multiples of 64: on a CPU, bitsandbytes' own kernel is wrong where a block straddles rows.
SIZES_4BIT = (64, 192, 128)
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


# Base models


class MLP(nn.Module):
    """Two layers of a kind: `linear` is called as nn.Linear is."""

    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear, sizes: Any = SIZES) -> None:
        super().__init__()
        self.up: Any = linear(sizes[0], sizes[1])
        self.down: Any = linear(sizes[1], sizes[2], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Tokens(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(SIZES[1], SIZES[0], **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.tokens(x, *args, **kwargs)


def conv1d(K: int, N: int, bias: bool = True) -> Conv1D:
    """GPT-2's layer, which has a bias in any case, not at its start."""
    layer = Conv1D(N, K)
    nn.init.normal_(layer.weight, std=0.2)
    nn.init.normal_(layer.bias)
    return layer


def llama(dtype: torch.dtype = f64, **settings: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY | settings)).to(dtype)


def gpt2(dtype: torch.dtype = f64, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": TINY["vocab_size"], "n_layer": 2, "n_head": 2, "n_embd": 24}
    return GPT2LMHeadModel(GPT2Config(**sizes, n_positions=32, **settings)).to(dtype)


def four_bit(dtype: torch.dtype = f32, **settings: Any) -> MLP:
    """Over bitsandbytes' 4-bit layers, quantized on the CPU."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    blocksize = settings.pop("blocksize", None)
    linear = partial(Linear4bit, **{"quant_type": "nf4"} | settings)
    model = MLP(linear, SIZES_4BIT).to(dtype)
    for weight in model.parameters():
        if blocksize is not None and isinstance(weight, Params4bit):
            weight.blocksize = blocksize
    return model.to("cpu")


# PEFT models


def randomize(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """Fill an adapter as if it had been trained, magnitudes with numbers above 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name and f".{adapter}" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
                if "magnitude" in name:
                    p.abs_().add_(1)


def add_lora(model: nn.Module, seed: int = 1, **config: Any) -> PeftModel:
    """The model with adapters whose B, and bias if any, are random as if they had been trained."""
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": ["up", "down"]} | config
    peft_model = get_peft_model(model, LoraConfig(**settings))
    randomize(peft_model, "default", seed)
    return peft_model


def add_adapter(model: Any, name: str = "second", seed: int = 5, **changes: Any) -> None:
    """Add an inactive adapter with the default one's configuration and the changes."""
    config = copy.deepcopy(model.peft_config["default"])
    for key, value in changes.items():
        setattr(config, key, value)
    model.add_adapter(name, config)
    randomize(model, name, seed)


def activate(model: Any, *names: str) -> Any:
    """The model with these adapters active."""
    model.base_model.set_adapter([*names])
    return model


def mlp(dtype: torch.dtype = f64, seed: int = 0, linear: Any = nn.Linear, **config: Any) -> Any:
    torch.manual_seed(seed)
    return add_lora(MLP(linear).to(dtype), **config)


def conv1d_mlp(dtype: torch.dtype = f64, **config: Any) -> Any:
    return mlp(dtype, linear=conv1d, fan_in_fan_out=True, **config)


def dora_mlp(dtype: torch.dtype = f64, **config: Any) -> Any:
    return mlp(dtype, use_dora=True, **config)


def skip_without_kasa() -> None:
    if not hasattr(peft, "KasaConfig"):
        pytest.skip("PEFT is older than 0.21, without KaSA")


def kasa_mlp(dtype: torch.dtype = f64, **config: Any) -> Any:
    return mlp(dtype, kasa_config=peft.KasaConfig(), **config)


def mica_mlp(dtype: torch.dtype = f32, **config: Any) -> Any:
    """lora_B is frozen."""
    return mlp(dtype, init_lora_weights="mica", **config)


def adalora_config(**settings: Any) -> AdaLoraConfig:
    schedule = {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}
    defaults = {"init_r": R, "target_r": 2, "lora_alpha": ALPHA, "target_modules": ["up", "down"]}
    return AdaLoraConfig(**defaults | schedule | settings)


def adalora_mlp(dtype: torch.dtype = f64, base: nn.Module | None = None, **settings: Any) -> Any:
    """With E, A and B random, as if they had been trained."""
    torch.manual_seed(0)
    model = get_peft_model((base or MLP()).to(dtype), adalora_config(**settings))
    randomize(model)
    return model


def embedding_model(dtype: torch.dtype = f64, base: Any = None, **config: Any) -> Any:
    torch.manual_seed(0)
    return add_lora(Tokens(**base or {}).to(dtype), target_modules=["tokens"], **config)


def four_bit_mlp(loaded: bool = False, config: Any = None, **settings: Any) -> Any:
    """loaded: PEFT takes the model for one that transformers has loaded in 4 bits."""
    model = four_bit(**settings)
    if loaded:
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return add_lora(model, init_lora_weights=False, **config or {})


def several_adapters(model: Any, *changes: dict[str, Any]) -> Any:
    """The model with adapters "second" and "third" beside its own, all active, of other ranks and
    scalings. changes: to the configuration of each."""
    is_ada = isinstance(model.peft_config["default"], AdaLoraConfig)
    ranks = {"init_r": 3, "inference_mode": True} if is_ada else {"r": 3}  # AdaLoRA trains one
    names = ("second", "third")[: len(changes)]
    for name, change in zip(names, changes, strict=True):
        add_adapter(model, name, **{"lora_alpha": 4} | ranks | change)
    return activate(model, "default", *names)


def two_adapters(model: Any, **changes: Any) -> Any:
    return several_adapters(model, changes)


def moe(r: int = 8, **config: Any) -> Any:
    """A mixture of 4 experts in each of 2 layers, with an untrained adapter on all of them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = MixtralForCausalLM(
        MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    )
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = {"r": r, "lora_alpha": 12, "target_modules": ["q_proj"], "target_parameters": both}
    return get_peft_model(base, LoraConfig(**settings | config))


def train_moe(model: Any, steps: int = 20) -> Any:
    """The model after some steps on sequences that count by twos."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        start = torch.randint(3, 32, (4, 1), generator=torch.Generator().manual_seed(step))
        ids = (start + 2 * torch.arange(17)) % 61 + 3
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.zero_grad()
    return model


def pair(model: Any) -> tuple[Any, Any]:
    """The model as it is, and a fused copy of it."""
    return model, fuse(copy.deepcopy(model))


def in_float64(model: Any) -> Any:
    """An unfused float64 copy of the model, over the weights that 4-bit codes stand for."""
    exact = unfuse(copy.deepcopy(model))
    for name, layer in list(exact.named_modules()):
        if type(getattr(layer, "_parameters", {}).get("weight")).__name__ == "Params4bit":
            dense = nn.Linear(layer.in_features, layer.out_features)
            decoded = QuantizedWeight.from_bitsandbytes(layer.weight).dequantize(f32)
            dense.weight, dense.bias = nn.Parameter(decoded, False), layer.bias
            exact.set_submodule(name, dense)
    return exact.double()


# Inputs


def batch(dtype: torch.dtype = f64, width: int = SIZES[0]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, width, generator=generator, dtype=f64).to(dtype)


def token_ids(*shape: int) -> Tensor:
    """Indices of `Tokens`, with repetitions, and a padding_idx of 3 among them."""
    x = torch.randint(SIZES[1], shape, generator=torch.Generator().manual_seed(2))
    x.view(-1)[: x.numel() // 4] = 3
    return x


# Results of models


def output(model: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run the model; return the logits of a transformers model."""
    y = model(x, *args, **kwargs)
    return y if isinstance(y, Tensor) else y.logits


def results(model: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The output on x, and the gradient of x, unless x is ids, and of each trainable parameter, by
    name; of a compiled model, by its own names."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = output(model, x, *args, **kwargs)
    weights = ((torch.arange(y.numel()) % 7 - 3) / 4).to(y.dtype).view(y.shape)  # exact in any
    if not y.requires_grad:
        return {"y": y}
    wanted = {n: p for n, p in [("x", x), *model.named_parameters()] if p.requires_grad}
    grads = torch.autograd.grad((y * weights).sum(), list(wanted.values()), allow_unused=True)
    named = {n.removeprefix("_orig_mod."): g for n, g in zip(wanted, grads, strict=True)}
    return {"y": y.detach()} | {n: g for n, g in named.items() if g is not None}


def seeded_results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(4)
    return results(model, x)


def loss_and_gradients(model: nn.Module, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Compute a language model's loss and gradients, by name."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = {
        n.removeprefix("_orig_mod."): p.grad.clone()
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    return {"loss": loss.detach()} | grads


def permute_weights(models: Any, generator: Any) -> None:
    """Permute the elements of each weight that is not 4-bit, in all models alike.

    One model's roundings depend on its weights far more than on the batch.
    """
    of_models = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for name, p in of_models[0].items():
            if p.is_floating_point():
                order = torch.randperm(p.numel(), generator=generator)
                for parameters in of_models:
                    same = parameters[name]
                    same.copy_(same.flatten()[order].view(p.shape))


SGD = partial(torch.optim.SGD, lr=0.05)


def train(
    model: Any,
    forward: Callable[[Any, int], Tensor],
    steps: int = 5,
    optimizer: Callable[..., torch.optim.Optimizer] = SGD,
) -> dict[str, Tensor]:
    """Each step's output, loss and gradients, and each parameter's update by all steps.

    forward: of the model and the step's number; a scalar is the loss itself.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    moving, found = optimizer(list(parameters.values())), {}
    for step in range(steps):
        torch.manual_seed(step)
        moving.zero_grad()
        y = forward(model, step)
        loss = y if y.dim() == 0 else (y - 1).square().mean()
        loss.backward()
        found |= {f"y {step}": y.detach(), f"loss {step}": loss.detach()}
        for name, p in parameters.items():
            if p.grad is not None:
                found[f"{name}.grad {step}"] = p.grad.clone()
        moving.step()
        if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
            model.base_model.update_and_allocate(step)
    updates = {f"{n} update": p.detach() - before[n] for n, p in parameters.items()}
    return found | updates


def assert_trains_alike(
    fused: Any,
    stock: Any,
    forward: Callable[[Any, int], Tensor],
    rtol: float | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs, losses, every gradient and every update are stock's; return the fused model's.

    Each step starts where the last one has led, and adds two layers' errors to its own.
    """
    got, want = train(fused, forward, **options), train(stock, forward, **options)
    updates = {name: t.norm() for name, t in want.items() if name.endswith(" update")}
    assert updates and max(updates.values()) > 0.001
    trained = {name.rpartition(".grad ")[0] for name in want if ".grad " in name}
    assert all(updates[f"{name} update"] > 0 for name in trained)
    assert_close_derived(got, want, rtol, layers=2 * options.get("steps", 5))
    return got


def assert_same_files(stock: Any, fused: Any, folder: Path, **options: Any) -> None:
    """Both have the same state under the same keys in one order, and save the same bytes."""
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert_bitwise_equal(fused.state_dict(), stock.state_dict())
    files = []
    for name, model in (("stock", stock), ("fused", fused)):
        model.save_pretrained(folder / name, **options)
        files.append((folder / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def fused_layers(model: nn.Module) -> list[FusedLinear]:
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


# Dropout: PEFT's masks and ours differ, so PEFT's layer is given ours.


class Masked(nn.Module):
    """Dropout with the mask that `lora_linear` makes of this rng."""

    def __init__(self, rng: Tensor, p: float) -> None:
        super().__init__()
        self.rng, self.p = rng, p

    def forward(self, x: Tensor) -> Tensor:
        M, K = x.numel() // x.shape[-1], x.shape[-1]
        mask = lora_kernels.dropout_mask(self.rng, M, K, self.p)
        return x * mask.view(x.shape) / (1 - self.p)


def draw_rng() -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)


def set_masks(stock: Any, dropouts: dict[str, float], seed: int = 4) -> None:
    """Give a stock MLP's adapters the masks that a fused one draws in a call from this seed."""
    torch.manual_seed(seed)
    for layer in (stock.base_model.model.up, stock.base_model.model.down):
        for adapter, p in dropouts.items():
            layer.lora_dropout[adapter] = Masked(draw_rng(), p)


# Which path runs


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


def base_bytes(model: Any) -> dict[str, Tensor]:
    """Copies of what is no adapter's, by the names of the base's state dict."""
    found = {}
    for name, t in model.get_base_model().state_dict().items():
        if ".lora_" not in name and not name.startswith("lora_"):
            found[name.replace(".base_layer", "")] = t.detach().clone()
    return found
