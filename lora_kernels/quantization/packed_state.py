"""`pack_parameter`, and the entries of packed weights in a module's `state_dict`.

A module's `QuantizedTensor` is saved as plain tensors, so that safetensors and `torch.load` take
them:

    weight.packed, weight.absmax, …    the tensors of the `QuantizedWeight`
    weight.form                        uint8, JSON: the version of the entries, and other fields

`load_state_dict` copies them into a `QuantizedTensor` of the same form. Another form is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .tensor import FORMAT_VERSION, INNER, QuantizedTensor
from .weight import QuantizedWeight, parse_json

_FORM = "form"


def pack_parameter(
    module: nn.Module, name: str, weight: QuantizedWeight, is_transposed: bool = False
) -> None:
    """Replace a parameter of a module by a frozen packed weight, which `state_dict` saves.

    Other code that reads the parameter gets a temporary decoded copy; fused layers read the codes.
    The parameter's dtype, which is that of the decoded weight, is `weight.dtype`.

    Args:
        module: the module that has the parameter.
        name: the parameter's name, such as "weight".
        weight: of the parameter's shape, or of the transposed one.
        is_transposed: whether the parameter is [K, N], or [E, K, N], for a weight [N, K].

    Raises:
        TypeError: `weight` is no `QuantizedWeight`.
        ValueError: the module has no such parameter, or it has another shape; or the module is an
            `nn.MultiheadAttention`.

    >>> import torch
    >>> from lora_kernels.quantization import pack_parameter, quantize_4bit
    >>> linear = torch.nn.Linear(64, 128, bias=False)
    >>> pack_parameter(linear, "weight", quantize_4bit(linear.weight, "mxfp4"))
    >>> list(linear.state_dict())
    ['weight.packed', 'weight.absmax', 'weight.code', 'weight.nested_code', 'weight.form']
    """
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: got {type(weight).__name__}, want a QuantizedWeight")
    if isinstance(module, nn.MultiheadAttention):
        raise ValueError(
            "module: got an nn.MultiheadAttention, whose weights PEFT replaces in each forward, "
            "want another module"
        )
    if (current := module._parameters.get(name)) is None:
        want = ", ".join(module._parameters) or "none"
        raise ValueError(f"name: got {name!r}, want one of the module's parameters: {want}")
    tensor = build_parameter(weight, is_transposed)
    if tensor.shape != current.shape:
        raise ValueError(
            f"weight: got {list(tensor.shape)}, want {list(current.shape)}, the shape of {name}"
        )
    module._parameters[name] = tensor
    register_state_hooks(module)


def build_parameter(
    weight: QuantizedWeight, is_transposed: bool = False, dtype: torch.dtype | None = None
) -> nn.Parameter:
    """Return a frozen parameter of a packed weight, which shares its tables with no other weight.

    So each entry of a state dict is the weight's own memory, as PyTorch has it.

    dtype: of the parameter; None: the weight's.
    """
    tables = {"code": weight.code.clone()}
    if weight.nested_code is not None:
        tables["nested_code"] = weight.nested_code.clone()
    weight = dataclasses.replace(weight, **tables)  # type: ignore[arg-type]
    return nn.Parameter(QuantizedTensor(weight, is_transposed, dtype), requires_grad=False)


def register_state_hooks(module: nn.Module) -> None:
    """Let `state_dict` and `load_state_dict` of a module keep its `QuantizedTensor`s packed."""
    if _save not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_save)
        module.register_load_state_dict_pre_hook(_load)
    if find_spec("accelerate") is not None:
        _read_in_offloading()


def _read_in_offloading() -> None:
    """Let accelerate's hooks, which offload a state dict, find a packed weight by its name.

    This holds for the whole process.
    """
    from accelerate.utils.offload import PrefixedDataset  # type: ignore[import-untyped]

    original = PrefixedDataset.__getitem__
    if hasattr(original, "reads_packed"):
        return

    def get(self: Any, key: str) -> Any:
        try:
            return original(self, key)
        except KeyError:
            entries = {}
            for name in (_FORM, *INNER):
                with suppress(KeyError):
                    entries[f"{key}.{name}"] = original(self, f"{key}.{name}")
            if f"{key}.{_FORM}" not in entries:
                raise
        return tensor_from_entries(entries, key)

    get.reads_packed = True  # type: ignore[attr-defined]
    PrefixedDataset.__getitem__ = get


def _packed_parameters(module: nn.Module) -> Iterator[tuple[str, QuantizedTensor]]:
    for name, p in module._parameters.items():
        if isinstance(p, QuantizedTensor):
            yield name, p


def _save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Replace packed weights by their tensors. A hook of `state_dict`."""
    for name, p in _packed_parameters(module):
        if isinstance(state.get(prefix + name), QuantizedTensor):
            del state[prefix + name]
            state.update(entries_of(p, prefix + name))


def entries_of(tensor: QuantizedTensor, key: str) -> dict[str, Tensor]:
    """Return the entries of a packed weight, which share memory with it."""
    inner = tensor.inner_tensors() | {_FORM: tensor.form}
    return {f"{key}.{name}": t for name, t in inner.items()}


def _load(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    errors: list[str],
) -> None:
    """Replace the tensors of packed weights by the weights. A hook of `load_state_dict`."""
    for name, p in _packed_parameters(module):
        key = prefix + name
        parts = {k: state.pop(k) for k in list(state) if k.startswith(f"{key}.")}
        if not parts:
            if key not in state:
                missing_keys += entries_of(p, key)
            state.setdefault(key, p)
            continue
        try:
            if not isinstance(state.get(key, p), QuantizedTensor):
                raise ValueError(f"{key}: got it and {sorted(parts)}, want one of both")
            state[key] = tensor_from_entries(parts, key)
        except (TypeError, ValueError, NotImplementedError) as error:
            errors.append(str(error))
            state[key] = p  # no missing key besides


def tensor_from_entries(entries: dict[str, Any], key: str) -> QuantizedTensor:
    """Return the packed weight of `entries_of`.

    Raises TypeError or ValueError if the entries are incomplete, or of a later version.
    """
    inner = {k.removeprefix(f"{key}."): t for k, t in entries.items()}
    if _FORM not in inner:
        raise ValueError(f"{key}: got {sorted(entries)}, want {key}.{_FORM} beside them")
    form = parse_json(f"{key}.{_FORM}", inner.pop(_FORM))
    if (version := form.pop("version", None)) != FORMAT_VERSION:
        raise ValueError(
            f"{key}.{_FORM}: got version {version!r}, want {FORMAT_VERSION}: another release of "
            "lora_kernels wrote it"
        )
    try:
        is_transposed, shape = form.pop("is_transposed"), tuple(form.pop("shape"))
        dtype, of = (getattr(torch, form.pop(name)) for name in ("dtype", "of"))
        weight = QuantizedWeight(**inner, **form, shape=shape, dtype=of)
        if not (isinstance(is_transposed, bool) and isinstance(dtype, torch.dtype)):
            raise TypeError(f"got is_transposed {is_transposed!r} and dtype {dtype!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{key}: got entries of no packed weight, {error}") from error
    return QuantizedTensor(weight, is_transposed, dtype)
