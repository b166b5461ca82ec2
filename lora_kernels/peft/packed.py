"""Quantized linear layers of other libraries, as `nn.Linear` over a `QuantizedTensor`.

`quantization/readers` knows the libraries. Each weight is repacked once, and the former tensors are
freed.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from ..quantization.packed_state import build_parameter, register_state_hooks
from ..quantization.readers import READERS, ROUNDS_X, compressed_tensors, library_of, read, torchao
from ..quantization.readers.form import Reading
from ..quantization.tensor import QuantizedTensor
from .mergeable import refuse_merges
from .modules import hooks_of, is_compressed_forward

Model = TypeVar("Model", bound=nn.Module)
SHOWN = 3  # layers of a warning
_DTYPES = torch.float32, torch.bfloat16, torch.float16
# Of the norm of y. Codes less zeros, weights and y in bfloat16 are rounded by 2^-9 each, 0.006 in
# all. Codes in another order, and zeros that are off by one, give more.
LARGEST_DIFFERENCE = 0.01


def keep_packed(model: Model, *, exact_x: bool = False) -> Model:
    """Let adapters train over other libraries' quantized linear layers, by our kernels.

    Call it on the loaded model, before PEFT and before the first forward. Each layer that a reader
    knows becomes an `nn.Linear` whose weight is a `QuantizedTensor`: GPTQ, AWQ, HQQ, torchao and
    compressed-tensors in 4 and 8 bits, as docs/bases.md lists them. The weights are repacked one by
    one, and neither decoded nor rounded. Fused layers read the codes in the kernels. Other code
    that reads a weight gets a temporary decoded copy, in the model's dtype. PEFT adapts the layers
    as it adapts any `nn.Linear`. Its merges into them raise before they change the first layer.

    A layer that cannot be read stays as it is, with a warning that has the reason. A module that
    would be replaced is called once before, with one row of x, and stays if its result is not that
    of the weight that was read.

    Args:
        exact_x: whether to read layers whose forward rounds x too: transformers' `FP8Linear` and
            bitsandbytes' 8 bits. x is then not rounded, and the results are those of an `nn.Linear`
            with the decoded weight instead of those of the library's forward.

    Returns:
        The model; the new layer if the model is a layer that was replaced.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no layer can be read. The message has the reasons.

    >>> from lora_kernels.peft import keep_packed
    >>> keep_packed(nn.Sequential(nn.Linear(32, 32)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: model: got no quantized linear layer that can be read, want one of ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    holder = nn.Module()
    holder.model = model
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, str] = {}
    for parent_name, parent in holder.named_modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, key))
            names.setdefault(id(child), f"{parent_name}.{key}".removeprefix("model.").lstrip("."))
    reasons, dtype = dict[str, str](), getattr(model, "dtype", None)
    dtype = dtype if dtype in _DTYPES else None
    for at, found in places.items():
        parent, key = found[0]
        layer = parent._modules[key]
        packed = None if layer is None else pack_layer(layer, dtype, exact_x)
        if isinstance(packed, str):
            reasons[names[at]] = packed
        elif packed is not None:
            for parent, key in found:
                parent._modules[key] = packed
    result: Any = holder.model
    is_any = any(_is_packed(module) for module in result.modules())
    shown = [f"{name} stays as it is: {reason}" for name, reason in reasons.items()]
    text = "; ".join(shown[:SHOWN]) + (f"; and {len(shown) - SHOWN} more" if shown[SHOWN:] else "")
    if not is_any:
        raise ValueError(
            "model: got no quantized linear layer that can be read, want one of "
            f"{', '.join(READERS)}, before a forward has decoded it" + f" ({text})" * bool(text)
        )
    if text:
        warnings.warn(f"keep_packed: {text}", stacklevel=2)
    for module in result.modules():
        hook = vars(module).get("ct_decompress_hook")
        if hook is None or any("quantization_scheme" in vars(child) for child in module.modules()):
            continue
        # No layer is left to decode, and the hook would give every module an offloading forward.
        hook.remove()
        del module.ct_decompress_hook
    return result  # type: ignore[no-any-return]


def decode_packed(model: Model) -> Model:
    """Replace all packed weights of a model by decoded ones, frozen, and return the model."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if isinstance(p, QuantizedTensor):
                module._parameters[name] = nn.Parameter(p.dequantize(), requires_grad=False)
    return model


def has_packed(model: nn.Module) -> bool:
    return packed_bytes(model) > 0


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of the packed weights of a model."""
    return sum(p.quantized.nbytes for p in model.parameters() if isinstance(p, QuantizedTensor))


def _is_packed(module: nn.Module) -> bool:
    return hasattr(module._parameters.get("weight"), "quantized")


def pack_layer(
    layer: nn.Module, dtype: torch.dtype | None = None, exact_x: bool = False
) -> nn.Module | str | None:
    """Return the layer with a `QuantizedTensor` for a weight; None if no reader knows it.

    An `nn.Linear` changes in place, and another module stays whole. A string says why a layer is
    not read, and is then unchanged.

    dtype: of the `QuantizedTensor`; None: the dtype to which the library decodes.
    """
    library = library_of(layer)
    if library is None:
        return None
    if any(hooks_of(layer)):
        return "a hook sits on it"
    forward = vars(layer).get("forward")
    if forward is not None and not is_compressed_forward(forward):
        return "its forward was replaced"
    found = read(layer)
    if not isinstance(found, Reading):
        return found
    if library in ROUNDS_X and not exact_x:
        return f"{library}: its forward rounds x too. exact_x=True reads the weight for an exact x"
    parameter = build_parameter(found.weight, dtype=dtype)
    if type(layer) is nn.Linear:
        for name in compressed_tensors.PARAMETERS:
            layer._parameters.pop(name, None)
        for name in compressed_tensors.ATTRIBUTES:
            vars(layer).pop(name, None)
        packed = layer
    else:
        N, K = found.weight.matrix_shape
        packed = nn.Linear(K, N, bias=False, device="meta").train(layer.training)
        if found.bias is not None:
            bias = found.bias.detach().to(parameter.dtype)
            packed.bias = nn.Parameter(bias, requires_grad=False)
    packed._parameters["weight"] = parameter
    if packed is not layer and library not in ROUNDS_X and (reason := _differs(layer, packed)):
        return reason
    register_state_hooks(packed)
    refuse_merges()
    return packed


def pack_4bit_float(base: nn.Module) -> None:
    """Pack a base that PEFT adapts and cannot merge into, and no other."""
    if torchao.matches(base) and torchao.is_4bit_float(base):
        pack_layer(base)


def _differs(layer: nn.Module, packed: Any) -> str | None:
    """Return why the layer does not compute x·Wᵀ + bias of the weight; None if it does."""
    # With a mean, so that a wrong zero point shows.
    x = torch.randn(1, packed.in_features, generator=torch.Generator().manual_seed(0)).abs()
    x = x.to(packed.weight.device, packed.weight.dtype)
    # gptqmodel compiles its decoder in the first call.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            want, y = packed(x).float(), layer(x).float()
        except Exception as error:  # whatever a kernel of the library raises
            return f"its forward raised {type(error).__name__}: {error}"
    difference = float((y - want).norm() / want.norm().clamp_min(1e-30))
    if difference <= LARGEST_DIFFERENCE:
        return None
    return (
        f"its forward differs from the weight that was read by {difference:.2g} of the norm: its "
        "codes have another layout, or it does more than a linear layer"
    )


def remedy(base: nn.Module) -> str:
    """Return a clause that names `keep_packed` if it could read a base that is called."""
    library = library_of(base)
    if library is None or _is_packed(base):
        return ""
    exact_x = ", exact_x=True" * (library in ROUNDS_X)
    return f"; keep_packed(model{exact_x}) before PEFT may let our kernels read it"


def quantizes_input(base: Any) -> bool:
    """Return True if compressed-tensors rounds x, without a gradient, or y of a linear layer."""
    return compressed_tensors.rounds_x(base)
