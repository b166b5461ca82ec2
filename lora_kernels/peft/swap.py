"""`fuse` and `unfuse`: swap the class of PEFT's LoRA layers in place.

PEFT still does everything else: the state dict, saving, loading, merging, disabling, switching and
adding adapters.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from peft.tuners import lora
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import nn

from .. import qualification
from ..choice import choose as selection
from ..choice import verdicts
from . import foreign
from .adalora import FusedSVDLinear
from .base import missing_layers
from .eligibility import is_base_trainable, replaced_reason
from .embedding import FusedEmbedding
from .experts import FusedParamWrapper, wrapper_reason
from .frozen import StreamedLinear
from .groups import add_groups, remove_groups
from .heavier import heavier_reason
from .linear import Fused, FusedLinear, peft_class, set_class
from .loss import fuse_losses, restore_losses
from .merge import check_exact_merge, check_layers, set_exact_merges
from .mergeable import refuse_merges
from .mlp import GatedMLP, fuse_mlps, restore_mlps
from .modules import is_conv1d, is_linear4bit, patched_reason
from .packed import pack_4bit_float
from .zero3 import gather_in_call, is_zero3, stop_gathering

Model = TypeVar("Model", bound=nn.Module)
QUALIFY = ("cached", "now", "off")
# Attributes that only fused layers have.
_ATTRIBUTES = "mixed_batch", "_norm", "merge_loss", "casts_adapters", "layer_name", "repacks_codes"
logger = logging.getLogger("lora_kernels")


def fuse(
    model: Model,
    linears: bool = False,
    loss: bool = False,
    qualify: str = "cached",
    blocks: bool = True,
    cast_adapters: bool = False,
    exact_merge: str | None = None,
    mlp_tile_rows: int | str | None = None,
) -> Model:
    """Fuse the LoRA layers of a PEFT model in place, and return the model.

    LoRA and AdaLoRA layers compute with `lora_linear`, layers over a mixture's experts with
    `lora_experts_linear`. Layers over an embedding run one GEMM for all active adapters.

    Parameters and their names do not change. A layer is left to PEFT if its kind is unsupported,
    its base weight is trainable or its forward was replaced; `explain(model)` gives the reason.
    Call `fuse` again after adding layers; fused layers do not change. A fused layer does not call
    its base, lora_A, lora_B and dropout modules, so global module hooks
    (`register_module_forward_hook`) do not see them.

    Bases of torchao in MXFP4 and NVFP4 are repacked once, and `unfuse` does not undo it. Bases of
    compressed-tensors need `keep_packed` before PEFT.

    Args:
        model: a PEFT model.
        linears: whether `nn.Linear` layers without an adapter, such as the output embedding, use
            the native GEMV for a few rows of x. It runs on CPUs, without gradients. It sums in
            another order than PyTorch and rounds once.
        loss: whether causal language models of transformers compute their training loss by
            `lora_linear_cross_entropy`, with an adapter on the head or without. In training with
            labels, `outputs.logits` is then None. `model` may be without LoRA layers.
        qualify: which kernels run on a GPU, in this process. "cached": those that
            `lora_kernels.qualify` found to be correct and faster on such a card. "now": the same,
            after qualifying each card of the model without a verdict (25 s, and compiling before).
            "off": none. All other calls run PyTorch's GEMMs, the eager backend. If a card cannot be
            qualified now, a warning is logged and the eager backend runs.
        blocks: whether several layers on a GPU run as one autograd Function, also in a model that
            is moved there after `fuse`. `explain` has a line for each block. Layers such as q, k
            and v are grouped if their module's forward calls each exactly once, as `self.name(x)`
            with the same bare name, outside of loops. The forward's source is needed. A write by
            `.data` to a later layer's tensor between two calls of one forward goes unnoticed. Gated
            MLPs, down(act(gate(x)) * up(x)), do not save act(gate(x)) * up(x) for the backward. If
            an MLP's activation changes, call `fuse` again, unless its child module was replaced.
        cast_adapters: whether float32 adapters beside more than 64 rows of a 16-bit x are rounded
            to x's dtype in each call on a GPU, as autocast rounds them. Parameters, their gradients
            and the optimizer's state stay float32. PEFT makes adapters float32 by default; without
            autocast their GEMMs take three 16-bit parts for each float32 operand. It holds for
            LoRA, DoRA and AdaLoRA over linear layers. On a CPU it changes nothing.
        exact_merge: where each layer keeps a copy of its base while an adapter is merged into it,
            "host" or "device"; None: nowhere. `unmerge_adapter` then copies the base back, bit for
            bit, even if the adapter has changed or is gone, and frees the copy. PEFT's unmerge
            subtracts ΔW, which rounds. Merged weights are PEFT's. A copy has the size of the base:
            2 bytes an element for bfloat16, the packed bytes and scales for 4 bits, once for tied
            weights. A copy does not follow `to()`. At unmerge the base gets the copy's values in
            its new dtype, on its new device. `merge_and_unload` makes no copy. Layers that are left
            to PEFT keep copies too. If `load_state_dict` loads a merged base, its copy is freed
            with a warning, and unmerging subtracts as PEFT does. Other writes to a merged base, by
            `.data` or an optimizer, are lost when it is unmerged.
        mlp_tile_rows: the largest number of rows of x that a gated MLP computes at a time. It then
            keeps x alone for the backward, which computes each tile's forward again; the gradients
            of its parameters add up in float32. "auto": the columns of x, so that gate(x) of a tile
            has as many elements as the gate's weight, and at least 1024. None: all rows at once. It
            is for long contexts, where an MLP's activations are the peak of memory, on GPUs and
            CPUs. MLPs are recognized as with `blocks`, which may be False. Each tile draws its own
            dropout masks. `explain` has a line for each MLP.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no LoRA or AdaLoRA layer, or with `loss` no causal language model;
            `qualify`, `exact_merge` or `mlp_tile_rows` has another value; with `exact_merge` a
            layer is already merged, or its base is in a format that cannot be copied, such as 8
            bits.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    >>> type(fuse(model).base_model.model[0]).__name__
    'FusedLinear'
    """
    check_qualify(qualify)
    check_exact_merge(exact_merge)
    check_tile_rows(mlp_tile_rows)
    for _, layer, _ in lora_layers(model):
        if not isinstance(layer, ParamWrapper):
            pack_4bit_float(layer.get_base_layer())
    layers = list(lora_layers(model))
    if not layers and not loss:
        raise missing_layers(model, "peft.get_peft_model(model, config) adds them")
    check_layers([(name, layer) for name, layer, _ in layers], exact_merge)
    set_exact_merges((layer for _, layer, _ in layers), exact_merge, model.modules())
    refuse_merges()
    for name, layer, reason in layers:
        _restore_linears(layer.modules())  # type: ignore[attr-defined]
        if reason is None and not isinstance(layer, Fused):
            set_class(layer, _fused_class(layer))
        if isinstance(layer, Fused):
            layer.layer_name = name
            _keep_codes(layer)
            vars(layer).pop("casts_adapters", None)
            if cast_adapters:
                layer.casts_adapters = True
    for linear in _plain_linears(model) if linears else ():
        set_class(linear, StreamedLinear)
    remove_groups(model)
    restore_mlps(model)
    is_partitioned = is_zero3(model)
    if is_partitioned:
        gather_in_call(fused_layers(model))
        blocks = False  # each layer is gathered for its own call
    if blocks:
        add_groups(model)
    if blocks or mlp_tile_rows is not None:
        fuse_mlps(model, blocks, mlp_tile_rows)
    if is_partitioned:  # once for all tiles
        gather_in_call(module for module in model.modules() if isinstance(module, GatedMLP))
    if loss:
        fuse_losses(model)
    _follow_verdicts(model, qualify)
    return model


def _keep_codes(layer: Any) -> None:
    """Forbid bitsandbytes to repack the base's codes in an eval forward of PEFT's on a CPU.

    Repacked codes lose their scales, so later gradients would be wrong. `unfuse` allows it again.
    """
    base = layer.base_layer
    if is_linear4bit(base) and "repacks_codes" not in vars(layer):
        layer.repacks_codes = base.support_avx512bf16_for_cpu
        base.support_avx512bf16_for_cpu = False


def check_qualify(qualify: str) -> None:
    """Raise ValueError unless `qualify` is a valid argument of `fuse`."""
    if qualify not in QUALIFY:
        want = ", ".join(map(repr, QUALIFY))
        raise ValueError(f"qualify: got {qualify!r}, want one of {want}")


def check_tile_rows(rows: object) -> None:
    """Raise ValueError unless `rows` is a valid `mlp_tile_rows` of `fuse`."""
    is_number = isinstance(rows, int) and not isinstance(rows, bool) and rows > 0
    if not (rows is None or rows == "auto" or is_number):
        raise ValueError(f'mlp_tile_rows: got {rows!r}, want a positive number, "auto" or None')


def _follow_verdicts(model: nn.Module, qualify: str) -> None:
    """Read or make the verdict on each GPU of the model; log each missing verdict once."""
    verdicts.set_off(qualify == "off")
    indices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    for index in sorted(indices) if qualify != "off" else ():
        verdict = verdicts.current(index)
        if isinstance(verdict, str) and qualify == "now":
            try:
                verdict = qualification.qualify(index)
            except RuntimeError as error:
                verdict = str(error)
                verdicts.set_current(index, verdict)
        if isinstance(verdict, str):
            _advise(verdict)


@functools.cache
def _advise(reason: str) -> None:
    logger.warning("our GPU kernels are off: %s", reason)


def unfuse(model: Model) -> Model:
    """Restore PEFT's class of every layer, and return the model, which need not be fused.

    >>> unfuse(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    for _, layer, _ in lora_layers(model):
        set_exact_merges([layer], None)
        if isinstance(layer, Fused):
            set_class(layer, peft_class(layer))
            if is_linear4bit(layer.base_layer) and "repacks_codes" in vars(layer):
                layer.base_layer.support_avx512bf16_for_cpu = layer.repacks_codes
            for name in _ATTRIBUTES:
                vars(layer).pop(name, None)
    remove_groups(model)
    restore_mlps(model)
    stop_gathering(model)
    _restore_linears(model.modules())
    restore_losses(model)
    return model


def _restore_linears(modules: Iterable[nn.Module]) -> None:
    """Make each StreamedLinear an `nn.Linear`, for example because an adapter was added to it."""
    for module in modules:
        if type(module) is StreamedLinear:
            set_class(module, nn.Linear)


def _plain_linears(model: nn.Module) -> Iterator[nn.Linear]:
    """Yield the `nn.Linear` layers outside of LoRA layers whose forward is PyTorch's."""
    lora_modules = {module for _, layer, _ in lora_layers(model) for module in layer.modules()}  # type: ignore[attr-defined]
    for module in model.modules():
        if (
            type(module) is nn.Linear
            and module not in lora_modules
            and patched_reason(module) is None
        ):
            yield module


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer, str | None]]:
    """Yield each LoRA layer's name, the layer, and the reason if `fuse` leaves it to PEFT."""
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


def fused_layers(model: nn.Module) -> list[Fused]:
    """Return the fused layers that are not inside another fused layer, such as inner wrappers."""
    layers = [module for module in model.modules() if isinstance(module, Fused)]
    nested = {module for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if layer not in nested]


def _unfusable_reason(layer: Any) -> str | None:
    fused_class = type(layer) if isinstance(layer, Fused) else _fused_class(layer)
    reason = _kind_reason(layer, fused_class)
    if reason is None and not isinstance(layer, Fused) and fused_class is not None:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is not None and selection.is_eager_on_gpu(weight.device.type):
            return heavier_reason(layer)
    return reason


def _kind_reason(layer: Any, fused_class: Any) -> str | None:
    """Return why `fuse` leaves the layer to PEFT, apart from `heavier_reason`.

    fused_class: the class that `fuse` gives such layers; None if it has none.
    """
    if isinstance(layer, ParamWrapper):
        return wrapper_reason(layer)
    if fused_class is None:
        return f"PEFT's {type(layer).__name__} is not covered in this version"
    # An embedding copies the attribute from a configuration for linear layers. SVDLinear4bit has no
    # such attribute.
    is_transposed = getattr(layer, "fan_in_fan_out", False) and not isinstance(
        layer, lora.Embedding
    )
    if is_transposed and not is_conv1d(layer.get_base_layer()):
        return "fan_in_fan_out beside a base that is not transformers' Conv1D"
    if is_base_trainable(layer):
        return "the base weight is trainable"
    return replaced_reason(fused_class) or patched_reason(layer)


def _fused_class(layer: LoraLayer) -> Any:
    """Return the class that `fuse` gives the layer; None if it has none."""
    if type(layer) is lora.Linear:
        return FusedLinear
    if type(layer) is lora.Embedding:
        return FusedEmbedding
    if type(layer) is SVDLinear:
        return FusedSVDLinear
    if type(layer) is ParamWrapper:
        return FusedParamWrapper
    # Comparing names avoids importing bitsandbytes.
    name = (type(layer).__module__, type(layer).__name__)
    if name == ("peft.tuners.lora.bnb", "Linear4bit"):
        from .linear4bit import FusedLinear4bit

        return FusedLinear4bit
    if name == ("peft.tuners.adalora.bnb", "SVDLinear4bit"):
        from .linear4bit import FusedSVDLinear4bit

        return FusedSVDLinear4bit
    return foreign.fused_class(type(layer))
