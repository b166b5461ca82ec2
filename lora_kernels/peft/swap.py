"""`fuse` and `unfuse`: the class of PEFT's LoRA layers, swapped in place.

PEFT keeps doing everything else: state dict, saving, loading, merging, disabling, switching and
adding adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from peft.tuners import lora
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import nn

from .. import selection
from ..quantization.weight4bit import check_decoder
from . import foreign, traffic
from .adalora import FusedSVDLinear
from .base import is_linear4bit
from .eligibility import patched_reason, unfusable_reason
from .embedding import FusedEmbedding
from .experts import FusedParamWrapper
from .frozen import StreamedLinear
from .linear import Fused, FusedLinear, peft_class, set_class

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, linears: bool = False) -> Model:
    """Make the LoRA and AdaLoRA layers of a PEFT model compute with `lora_linear`, those over the
    experts of a mixture with `lora_experts_linear`, those over an embedding with one product for
    all their adapters; returns the model.

    Parameters, names and all else that PEFT does with them stay as they are. A layer that is of
    another kind, has a trainable base weight or a forward that someone replaced stays PEFT's own;
    `explain(model)` gives the reason. Layers that are added later need another `fuse`; a second
    one changes nothing else. The base, lora_A, lora_B and dropout modules of a fused layer are not
    called, so global module hooks (`register_module_forward_hook`) do not see them.

    linears: whether `nn.Linear` layers without an adapter, the output embedding for one, are to
    read their weight once for a few rows of x too, on a CPU and without gradients: the same sums
    as the library's in another order, rounded once.

    Raises TypeError for anything but a module, ValueError for a model without LoRA layers.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    >>> type(fuse(model).base_model.model[0]).__name__
    'FusedLinear'
    """
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without LoRA layers, want a PEFT model: "
            "peft.get_peft_model(model, config) adds them"
        )
    for _, layer, reason in layers:
        _give_back(layer.modules())  # type: ignore[attr-defined]
        if reason is None and not isinstance(layer, Fused):
            _check_decoder(layer)
            set_class(layer, _fused_class(layer))
    for linear in _plain_linears(model) if linears else ():
        set_class(linear, StreamedLinear)
    return model


def _check_decoder(layer: Any) -> None:
    """Compare bitsandbytes' kernels with ours on the device of a 4-bit weight on a GPU."""
    base = layer.get_base_layer()
    if is_linear4bit(base):
        check_decoder(base.weight.device)


def unfuse(model: Model) -> Model:
    """Give every layer back to PEFT; returns the model, which need not be fused.

    >>> unfuse(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    for _, layer, _ in lora_layers(model):
        if isinstance(layer, Fused):
            set_class(layer, peft_class(layer))
            for name in ("mixed_batch", "_norm", "_prepared", "_repacked", "merge_loss"):
                vars(layer).pop(name, None)
    _give_back(model.modules())
    return model


def _give_back(modules: Iterable[nn.Module]) -> None:
    """Make of each StreamedLinear what it was, for example where it has got an adapter since."""
    for module in modules:
        if type(module) is StreamedLinear:
            set_class(module, nn.Linear)
            vars(module).pop("_prepared", None)


def _plain_linears(model: nn.Module) -> Iterator[nn.Linear]:
    """Those that are called as modules: no part of a LoRA layer, nobody else's forward."""
    parts = {part for _, layer, _ in lora_layers(model) for part in layer.modules()}  # type: ignore[attr-defined]
    for module in model.modules():
        if type(module) is nn.Linear and module not in parts and patched_reason(module) is None:
            yield module


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer, str | None]]:
    """Each LoRA layer with its name and why `fuse` leaves it PEFT's own (None: it does not)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    uncalled: set[object] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            reason = _unfusable_reason(module)
            if module in uncalled:
                reason = "lora.MultiheadAttention reads its weights and never calls it"
            yield name, module, reason
        if isinstance(module, MultiheadAttention):
            uncalled.add(module.get_base_layer().out_proj)


def _unfusable_reason(layer: Any) -> str | None:
    fused_class = type(layer) if isinstance(layer, Fused) else _fused_class(layer)
    return unfusable_reason(layer, fused_class) or _excess_traffic(layer)


def _excess_traffic(layer: Any) -> str | None:
    """Return the reason if PEFT's layer moves fewer bytes than the fused one, eager on a GPU."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if (
        isinstance(layer, Fused)
        or weight is None
        or not selection.is_eager_on_gpu(weight.device.type)
    ):
        return None
    if weight.is_meta or not layer.active_adapters:
        return None
    return traffic.excess(layer, _fused_class(layer))


def _fused_class(layer: LoraLayer) -> Any:
    """The class that `fuse` gives the layer; None where it has none for it."""
    if type(layer) is lora.Linear:
        return FusedLinear
    if type(layer) is lora.Embedding:
        return FusedEmbedding
    if type(layer) is SVDLinear:
        return FusedSVDLinear
    if type(layer) is ParamWrapper:
        return FusedParamWrapper
    # Nobody imports bitsandbytes in order to ask.
    of = (type(layer).__module__, type(layer).__name__)
    if of == ("peft.tuners.lora.bnb", "Linear4bit"):
        from .linear4bit import FusedLinear4bit

        return FusedLinear4bit
    if of == ("peft.tuners.adalora.bnb", "SVDLinear4bit"):
        from .linear4bit import FusedSVDLinear4bit

        return FusedSVDLinear4bit
    return foreign.fused_class(type(layer))
