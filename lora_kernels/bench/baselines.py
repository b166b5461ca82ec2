"""The baselines of `bench`: plain PyTorch's calls, and the layers of PEFT and bitsandbytes.

A candidate is built from the arguments of `lora_linear`, then called with them repeatedly.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import device as devices

Baseline = Callable[..., Tensor]
Forward = Callable[[Tensor], Any]  # of a layer


class AddmmLoRA(torch.autograd.Function):
    """The fastest form in PyTorch's own calls: `addmm_` adds the low-rank updates in place.

    x, S and the parameters are saved, and nothing else.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        s = torch.mm(x, lora_A.t()).mul_(scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, s)
        ctx.scaling = scaling
        return torch.mm(x, weight.t()).addmm_(s, lora_B.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, s = ctx.saved_tensors
        ds = torch.mm(dy, lora_B).mul_(ctx.scaling)
        dx = torch.mm(dy, weight).addmm_(ds, lora_A)
        return dx, None, torch.mm(ds.t(), x), torch.mm(dy.t(), s), None


def frozen(args: dict[str, Any]) -> Baseline:
    return lambda x, weight, **others: F.linear(x, weight)


def addmm(args: dict[str, Any]) -> Baseline:
    def call(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, **others: Any) -> Tensor:
        y: Tensor = AddmmLoRA.apply(x, weight, lora_A, lora_B, others["scaling"])
        return y

    return call


def eager(args: dict[str, Any]) -> Baseline:
    def call(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, **others: Any) -> Tensor:
        p, scaling = others.get("dropout_p"), float(others["scaling"])
        dropped = F.dropout(x, p) if p else x
        return F.linear(x, weight) + F.linear(F.linear(dropped, lora_A), lora_B) * scaling

    return call


def compiled(args: dict[str, Any]) -> Baseline:
    return compile_static(eager(args))


def compile_static(function: Callable[..., Tensor]) -> Baseline:
    """Compile a function for each shape by itself, without Inductor's cache on disk.

    The cache's key lacks the vector width: after a process with ATEN_CPU_CAPABILITY=avx2, another
    stores 16 floats where the code means 8, past the end of a tensor (torch 2.15).
    """
    compiled: Baseline = torch.compile(function, dynamic=False, options={"fx_graph_cache": False})
    return compiled


def no_compiler(device: str) -> str | None:
    """Return why torch.compile is no candidate, or None if it is one."""
    if device == "cuda":
        return None if devices.version("triton") else "torch.compile needs Triton on a GPU"
    return None if devices.compiler() else "torch.compile needs a C++ compiler"


def peft(args: dict[str, Any]) -> Baseline:
    """Build PEFT's layer in training mode, which holds these tensors themselves."""
    layer = build_layer(args)
    return lambda x, **others: layer(x)


def build_layer(args: dict[str, Any], quant_type: str = "") -> Any:
    """Build PEFT's layer over the arguments of `lora_linear`, which become its own tensors.

    quant_type: of bitsandbytes' layer as the base; a dense one if empty.
    """
    N, K = args["weight"].shape
    base: Any = nn.Linear(K, N, bias=False, device="meta")
    base.weight = nn.Parameter(args["weight"], requires_grad=False)
    if args["bias"] is not None:
        base.bias = nn.Parameter(args["bias"].detach().clone())
    if quant_type:
        base = linear_4bit(base, quant_type)
    layer = peft_layer(base, [len(args["lora_A"])], args["scaling"], lora_dropout=args["dropout_p"])
    set_adapter(layer, args["lora_A"], args["lora_B"])
    return layer


def set_weight(linear: nn.Module, weight: Tensor) -> None:
    """Replace the layer's weight by the tensor itself."""
    del linear.weight  # a parameter, which a plain tensor cannot replace
    linear.weight = weight


def set_adapter(layer: Any, A: Tensor, B: Tensor, name: str = "default") -> None:
    """Replace lora_A and lora_B of PEFT's layer by these tensors themselves."""
    set_weight(layer.lora_A[name], A)
    set_weight(layer.lora_B[name], B)


def adapter_names(count: int) -> list[str]:
    """Return the names of `peft_layer`'s adapters: default, a1, a2..."""
    return ["default", *(f"a{i}" for i in range(1, count))]


def peft_layer(
    base: nn.Module,
    ranks: Sequence[int],
    scaling: float = 2.0,
    *,
    adapter_dtype: torch.dtype | None = None,
    adalora: bool = False,
    **options: Any,
) -> Any:
    """Build PEFT's layer over a frozen base, in training mode with an active adapter of each rank.

    adapter_dtype: None for the base's dtype.
    options: of `LoraConfig`.
    """
    from peft import AdaLoraConfig, LoraConfig, inject_adapter_in_model

    model: Any = nn.Sequential(base).requires_grad_(False)
    quantized = hasattr(getattr(base, "weight", None), "quant_state")
    model.is_loaded_in_4bit = quantized  # as transformers marks a model
    for name, rank in zip(adapter_names(len(ranks)), ranks, strict=True):
        common = {"lora_alpha": scaling * rank, "target_modules": ["0"], **options}
        config: Any = (
            AdaLoraConfig(init_r=rank, target_r=rank, total_step=10, **common)
            if adalora
            else LoraConfig(r=rank, **common)
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of several
            model = inject_adapter_in_model(config, model, name)
    layer: Any = model[0]
    layer.set_adapter(adapter_names(len(ranks)))
    for name, child in layer.named_children():
        if name.startswith(("lora_", "ranknum")) and adapter_dtype is not None:
            # For a layer on meta, PEFT creates some of these on the CPU.
            child.to(device=base.weight.device, dtype=adapter_dtype)
    return layer.train()


def make_code_of_scales() -> None:
    """Make the code that bitsandbytes keeps for all nested scales, which would be on meta if the
    first weight is."""
    import bitsandbytes

    functional: Any = bitsandbytes.functional
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())


def linear_4bit(linear: nn.Linear, quant_type: str) -> nn.Module:
    """Quantize a dense layer to bitsandbytes' on the same device, meta too, with nested scales."""
    import bitsandbytes

    bnb: Any = bitsandbytes
    weight = linear.weight.detach()
    N, K = weight.shape
    base = bnb.nn.Linear4bit(K, N, False, weight.dtype, quant_type=quant_type, device=weight.device)
    options = {"blocksize": 64, "compress_statistics": True, "quant_type": quant_type}
    make_code_of_scales()
    codes, state = bnb.functional.quantize_4bit(weight, **options)
    options |= {"quant_state": state, "bnb_quantized": True, "module": base}
    base.weight = bnb.nn.Params4bit(codes, requires_grad=False, **options)
    base.quant_state, base.bias = state, linear.bias
    return base  # type: ignore[no-any-return]


def cycle_through(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a function that makes one of the calls at a time, in turn."""
    cycle = itertools.cycle(calls)
    return lambda: next(cycle)()
