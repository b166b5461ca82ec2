"""Exactly reversible merges, and merged weights as a stream.

PEFT's own merge computes every merged value. `ExactMerge` copies a layer's base before the merge.
At unmerge it copies the base back, where PEFT subtracts and so rounds. `merged_weights` lets PEFT
merge into copies of one layer's base at a time.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .base import missing_layers
from .linear import peft_class
from .mergeable import check_merge
from .sharded import (
    FLATTENED,
    find_flattened,
    is_absent,
    is_sharded,
    is_sharded_4bit,
    is_sharded_parameter,
    local_part,
    whole_parameters,
)

LOCATIONS = ("host", "device")
_METHODS = "merge", "unmerge", "unload_and_optionally_merge_module"
FSDP1 = "FullyShardedDataParallel"
WRAPPED = "_fsdp_wrapped_module", "_checkpoint_wrapped_module"  # in names of modules alone

Slot = tuple[nn.Module, str]  # a module, and the name of one of its direct parameters


def check_exact_merge(exact_merge: str | None) -> None:
    """Raise ValueError unless `exact_merge` is a valid argument of `fuse`."""
    if exact_merge is not None and exact_merge not in LOCATIONS:
        want = " or ".join(map(repr, LOCATIONS))
        raise ValueError(f"exact_merge: got {exact_merge!r}, want {want}, or None for no copies")


def check_layers(layers: Sequence[tuple[str, Any]], exact_merge: str | None) -> None:
    """Raise ValueError if the base of a layer cannot be copied, or was already merged into."""
    for name, layer in layers if exact_merge is not None else ():
        if (reason := _unkeepable_reason(layer)) is not None:
            raise ValueError(f"exact_merge: got {name}, {reason}, want layers whose base is kept")
        if layer.merged and (_exact(layer) is None or _exact(layer).originals is None):
            raise ValueError(
                f"exact_merge: {name} is merged already, so its base is not there to be kept: "
                "call model.unmerge_adapter() before"
            )
    if exact_merge is not None:
        deque(_tied_groups(layer for _, layer in layers), maxlen=0)


def set_exact_merges(
    layers: Iterable[Any], location: str | None, modules: Iterable[nn.Module] = ()
) -> None:
    """Let the merges of LoRA layers keep copies of their bases at `location`; None: no longer.

    A merged layer with a copy keeps the copy until it is unmerged.

    modules: all modules of the model. A module without an adapter may share a base's memory.
    """
    exact_merges = []
    for layer in layers:
        exact_merge = _exact(layer)
        if location is None:
            if exact_merge is not None and exact_merge.originals is None:
                exact_merge.remove()
            elif exact_merge is not None:
                exact_merge.location = None
            continue
        if exact_merge is None:
            exact_merge = ExactMerge(layer, location)
            vars(layer).update({name: getattr(exact_merge, name) for name in _METHODS})
            layer.exact_merge = exact_merge
        exact_merge.location = location
        exact_merges.append(exact_merge)
    slots = _slots_by_address(modules) if exact_merges else {}
    for exact_merge in exact_merges:
        exact_merge.tied = []
        exact_merge.modules = [
            module
            for base, name in written_parameters(exact_merge.layer)
            for module, _ in slots.get(_address(base._parameters[name]), ())
        ]
    for group in _tied_groups(exact_merge.layer for exact_merge in exact_merges):
        for layer in group:
            tied = _exact(layer).tied
            tied += [x for x in map(_exact, group) if x is not _exact(layer) and x not in tied]


def _exact(layer: Any) -> Any:
    return vars(layer).get("exact_merge")


def _unkeepable_reason(layer: Any) -> str | None:
    if isinstance(layer, MultiheadAttention):
        return "an nn.MultiheadAttention, which PEFT merges and unmerges in every forward"
    base = layer.get_base_layer()
    if not isinstance(layer, ParamWrapper) and base._parameters.get("weight") is None:
        return f"over a {type(base).__name__} without a weight that a merge writes"
    for module, name in written_parameters(layer):
        p: Any = module._parameters[name]
        if not (is_plain(p) or is_params4bit(p) or is_sharded_4bit(module, name)):
            kind = f"{type(p).__name__} of {p.dtype}"
            return f"over a {type(base).__name__}, whose {name} is a {kind}"
    return None


def written_parameters(layer: Any) -> list[Slot]:
    """Return the parameters that PEFT's merge of the layer writes or replaces.

    A merge over experts in 4 bits writes none, because PEFT adds to a decoded copy.
    """
    base = layer.get_base_layer()
    names = [layer.parameter_name] if isinstance(layer, ParamWrapper) else ["weight", "bias"]
    return [(base, name) for name in names if base._parameters.get(name) is not None]


def is_params4bit(p: object) -> bool:
    """Return True for a parameter that bitsandbytes has quantized to 4 bits."""
    return type(p).__name__ == "Params4bit" and getattr(p, "quant_state", None) is not None


def is_plain(p: Any) -> bool:
    """Return True for a floating parameter that is in no library's own format."""
    t = local_part(p)
    return type(t) in (nn.Parameter, Tensor) and t.is_floating_point()


class _Span(NamedTuple):
    """The memory of a parameter that a merge writes. number: of the layer, in their order."""

    device: str
    start: int
    end: int
    number: int
    layer: Any
    tensor: Tensor


def _tied_groups(layers: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield each group of layers whose bases share memory.

    Raises ValueError if bases overlap in memory without sharing all elements.
    """
    spans: list[_Span] = []
    for i, layer in enumerate(layers):
        for module, name in written_parameters(layer):
            t = local_part(module._parameters[name])
            last_index = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            if t.numel() and t.data_ptr():
                end = t.data_ptr() + (last_index + 1) * t.element_size()
                spans.append(_Span(str(t.device), t.data_ptr(), end, i, layer, t))
    group: list[_Span] = []
    for span in sorted(spans, key=lambda span: span[:4]):
        device, start, _, _, _, t = span
        if group and device == group[0].device and start < max(span.end for span in group):
            first = group[0].tensor
            if start != group[0].start or (t.shape, t.stride()) != (first.shape, first.stride()):
                raise ValueError(
                    f"exact_merge: got bases of shapes {list(first.shape)} and {list(t.shape)} "
                    "that overlap in memory, want the same elements or none"
                )
        else:
            if len(group) > 1:
                yield [span.layer for span in group]
            group = []
        group.append(span)
    if len(group) > 1:
        yield [span.layer for span in group]


class _WeakReference:
    """A weak reference whose copy or pickle refers to the copy of its object."""

    def __init__(self, referent: Any) -> None:
        self.__setstate__((referent,))

    def __call__(self) -> Any:
        return self._get()

    def __getstate__(self) -> tuple[Any]:
        return (self._get(),)

    def __setstate__(self, state: tuple[Any]) -> None:
        (referent,) = state
        self._get: Callable[[], Any] = lambda: None
        if referent is not None:
            self._get = weakref.ref(referent)


class ExactMerge:
    """PEFT's merge and unmerge of one layer, with a copy of the base.

    The methods are attributes of the layer, which PEFT's model and PEFT's forward call.

    Attributes:
        location: "host" or "device", of the copy; None: the layer drops this object once unmerged.
        originals: copies of the base's parameters before the merge; None while nothing is merged,
            and after a merged base was loaded.
        tied: the ExactMerge of each other layer whose base shares memory with this layer's.
        modules: the modules of the model with a parameter in the base's memory.
    """

    def __init__(self, layer: Any, location: str | None) -> None:
        self._layer = _WeakReference(layer)  # a strong reference would be a cycle
        self.location = location
        self.originals: list[_Dense | _FourBit | _FourBitShard] | None = None
        self.tied: list[ExactMerge] = []
        self.modules: list[nn.Module] = []
        self._caches: dict[str, Any] = {}
        self._handles: list[Any] = []  # of the hooks that notice a load
        self._is_delegating = False  # True while PEFT's methods run, which call each other

    @property
    def layer(self) -> Any:
        return self._layer()

    @property
    def nbytes(self) -> int:
        """The number of bytes of this layer's copies. Tied layers count shared copies too."""
        return sum(original.nbytes for original in self.originals or ())

    @property
    def is_merged(self) -> bool:
        layer = self.layer
        return layer is not None and bool(layer.merged)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Copy the base and merge as PEFT does.

        If PEFT's merge raises before an adapter counts as merged, the base is copied back.
        """
        layer, group = self.layer, (self, *self.tied)
        if self._is_delegating:
            return self._peft("merge", safe_merge, adapter_names)
        is_first = not any(exact_merge.is_merged for exact_merge in group)
        for exact_merge in group if is_first else ():
            exact_merge._free_copy()
        if not _has_any(layer, adapter_names):
            return self._peft("merge", safe_merge, adapter_names)
        has_copy = any(exact_merge.originals is not None for exact_merge in group)
        if self.originals is None and (is_first or has_copy):
            self._copy_base()
        try:
            self._peft("merge", safe_merge, adapter_names)
        except BaseException:
            if is_first and not layer.merged:
                self._restore()
            raise
        finally:
            if is_first and not layer.merged:
                self._free_copy()

    def unmerge(self) -> None:
        """Copy the base back and free the copy.

        Subtract as PEFT does instead if the merged base was loaded meanwhile, or while another
        layer is merged into the same tied base.
        """
        layer, group = self.layer, (self, *self.tied)
        if self._is_delegating:
            return self._peft("unmerge")
        is_last = layer.merged and not any(exact_merge.is_merged for exact_merge in self.tied)
        if is_last and self.originals is not None:
            for exact_merge in group:
                exact_merge._restore()
            layer.merged_adapters.clear()
            vars(layer).pop("merge_loss", None)
        else:
            self._peft("unmerge")
        for exact_merge in group if is_last else ():
            exact_merge._free_copy()
            if exact_merge.location is None:
                exact_merge.remove()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> Any:
        """Return the base, merged without a copy if `merge`. `merge_and_unload` calls this."""
        layer = self.layer
        peft_method = getattr(type(layer), "unload_and_optionally_merge_module", None)
        with as_peft(layer.modules()):
            if peft_method is not None:
                return peft_method(layer, merge, safe_merge, adapter_names)
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return layer.get_base_layer()

    def remove(self) -> None:
        """Restore PEFT's methods of the layer."""
        layer = self.layer
        for name in (*_METHODS, "exact_merge") if layer is not None else ():
            vars(layer).pop(name, None)

    def _peft(self, method: str, *args: Any) -> None:
        layer = self.layer
        with as_peft([layer]), ExitStack() as stack:
            if is_sharded(layer):
                stack.enter_context(whole_parameters(layer.modules(), written_parameters(layer)))
            getattr(type(layer), method)(layer, *args)

    def _copy_base(self) -> None:
        """Copy the base's parameters, and share the copies that a tied layer has made."""
        copies = [original for tied in self.tied for original in tied.originals or ()]
        originals = []
        for slot in written_parameters(self.layer):
            shared = next((original for original in copies if original.shares_memory(slot)), None)
            if shared is not None:
                originals.append(shared.for_slot(slot))
            else:
                originals.append(_copy_of(slot, self.location == "host"))
        self._caches = dict(getattr(self.layer, "_caches", {}))
        self.originals = originals
        modules = dict.fromkeys([*self.modules, *(original.slot[0] for original in originals)])
        hook = _LoadHook(self)
        self._handles = [module.register_load_state_dict_pre_hook(hook) for module in modules]

    def _restore(self) -> None:
        if self.originals is None:
            return
        for original in self.originals:
            original.restore()
        if hasattr(self.layer, "_caches"):  # PEFT's caches for its unmerge
            self.layer._caches = self._caches

    def _free_copy(self) -> None:
        self.forget_copy()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def forget_copy(self) -> None:
        """Free the copy, which is the base of no merged layer any more."""
        self.originals, self._caches = None, {}


class _LoadHook:
    """A `load_state_dict` pre-hook that frees the copies of a merged base that is loaded.

    The loaded values count as merged ones, as they do for PEFT. Restoring the copy would lose them.
    """

    def __init__(self, exact_merge: ExactMerge) -> None:
        self._exact_merge = _WeakReference(exact_merge)  # which refers to the module

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        exact_merge = self._exact_merge()
        if exact_merge is None or exact_merge.originals is None:
            return
        slots = [original.slot for original in exact_merge.originals]
        addresses = {_address(base._parameters[name]) for base, name in slots}
        if any(
            p is not None and prefix + name in state_dict and _address(p) in addresses
            for name, p in module._parameters.items()
        ):
            for each in (exact_merge, *exact_merge.tied):
                each.forget_copy()
            warnings.warn(
                "exact_merge: weights were loaded into a merged base. Unmerging subtracts the "
                "adapter's update from them and rounds, as PEFT does. Call model.unmerge_adapter() "
                "before load_state_dict to load a base without an adapter in it.",
                stacklevel=2,
            )


@contextmanager
def as_peft(modules: Iterable[Any]) -> Iterator[None]:
    """Let the layers among these modules merge and unmerge as PEFT does."""
    exact_merges = [x for x in map(_exact, modules) if x is not None and not x._is_delegating]
    try:
        for exact_merge in exact_merges:
            exact_merge._is_delegating = True
        yield
    finally:
        for exact_merge in exact_merges:
            exact_merge._is_delegating = False


def _has_any(layer: Any, adapter_names: Sequence[str] | None) -> bool:
    """Return True if a merge of these adapters, or of the active ones, changes the layer."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    return any(name in part for name in names for part in (layer.lora_A, layer.lora_embedding_A))


def _copy_of(slot: Slot, to_host: bool) -> _Dense | _FourBit | _FourBitShard:
    module, name = slot
    p: Any = module._parameters[name]
    shard = local_part(p)
    if is_params4bit(p) and shard is p:
        # PEFT's merge replaces packed bytes and never writes to them.
        device = torch.device("cpu") if to_host else p.device
        attributes = {key: value for key, value in vars(p).items() if key in _ATTRIBUTES}
        return _FourBit(
            slot, type(p), p.data.to(device), _copy_state(p.quant_state, device), attributes
        )
    t = shard.detach().as_subclass(Tensor)
    values = t.to("cpu", copy=True) if to_host else t.clone()
    if is_params4bit(p) or is_sharded_4bit(module, name):
        state: Any = p.quant_state if is_params4bit(p) else module.quant_state
        return _FourBitShard(slot, values, _copy_state(state, values.device))
    return _Dense(slot, values)


class _Dense(NamedTuple):
    """The values of a dense parameter."""

    slot: Slot
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def shares_memory(self, slot: Slot) -> bool:
        """Return True if the copied parameter and the slot's have the same memory and layout."""
        (module, name), (other_module, key) = self.slot, slot
        a, b = local_part(module._parameters[name]), local_part(other_module._parameters[key])
        if is_params4bit(b) or a.data_ptr() != b.data_ptr() or not a.numel():
            return False
        return bool(a.shape == b.shape and a.stride() == b.stride())

    def for_slot(self, slot: Slot) -> _Dense:
        return _Dense(slot, self.values)

    def restore(self) -> None:
        """Copy the values into the parameter, whatever its current device and dtype are."""
        module, name = self.slot
        p: Any = module._parameters[name]
        t = local_part(p).detach()
        if t.shape != self.values.shape:
            raise RuntimeError(
                f"exact_merge: got a base's {name} of shape {list(t.shape)}, want "
                f"{list(self.values.shape)}, which it had when an adapter was merged into it"
            )
        t.copy_(self.values)


_ATTRIBUTES = "blocksize", "compress_statistics", "quant_type", "quant_storage", "module"


class _FourBit(NamedTuple):
    """The class, packed bytes and scales of a bitsandbytes parameter."""

    slot: Slot
    cls: Any
    packed: Tensor
    state: Any
    attributes: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + _scales_nbytes(self.state)

    def shares_memory(self, slot: Slot) -> bool:
        module, name = slot
        p: Any = module._parameters[name]
        return is_params4bit(p) and p.data_ptr() == self.packed.data_ptr()

    def for_slot(self, slot: Slot) -> _FourBit:
        return self._replace(slot=slot)

    def restore(self) -> None:
        """Replace the parameter by one with the copied bytes, on the parameter's current device."""
        module, name = self.slot
        current: Any = module._parameters[name]
        state = _copy_state(self.state, current.device)
        kwargs = {"quant_state": state, "bnb_quantized": True, "requires_grad": False}
        p = self.cls(self.packed.to(current.device), **self.attributes, **kwargs)
        module._parameters[name] = p
        module.quant_state = state


class _FourBitShard(NamedTuple):
    """This rank's shard of the packed bytes of a bitsandbytes parameter, and the whole's scales."""

    slot: Slot
    values: Tensor
    state: Any

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + _scales_nbytes(self.state)

    def shares_memory(self, slot: Slot) -> bool:
        return _Dense(self.slot, self.values).shares_memory(slot)

    def for_slot(self, slot: Slot) -> _FourBitShard:
        return self._replace(slot=slot)

    def restore(self) -> None:
        _Dense(self.slot, self.values).restore()
        module, name = self.slot
        p: Any = module._parameters[name]
        state = _copy_state(self.state, local_part(p).device)
        if is_params4bit(p):
            p.quant_state = state
        vars(module)["quant_state"] = state


def _scales_nbytes(state: Any) -> int:
    nested_state = state.state2
    scales: list[Tensor] = [
        state.absmax,
        *([] if nested_state is None else [nested_state.absmax]),
    ]
    return sum(t.nbytes for t in scales)


def _copy_state(state: Any, device: torch.device) -> Any:
    """Return a copy of a `QuantState` whose tensors are on the device."""
    state = copy.copy(state)
    vars(state).pop("_lora_kernels", None)  # our decoder's view of the tensors
    if state.nested:
        state.state2 = copy.copy(state.state2)
    state.to(device)
    return state


def merged_weights(
    model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that PEFT's merge gives, one at a time, and leave the model unchanged.

    Use it for engines that take weights as a stream. The names and tensors are those of the state
    dict of `merge_and_unload()`: names are the base model's, the scales of 4-bit weights are
    entries too, and modules of `modules_to_save` replace the base's. PEFT merges into a copy of one
    layer's base at a time, or of a base that several layers share. A tensor that no adapter changes
    is the model's own, so do not write to it. The model may be fused or not. Merged adapters stay
    merged.

    FSDP2, ZeRO-3 or FSDP1 may shard the model. Then all ranks call this function and take all
    tensors, which are whole in each. FSDP2's and ZeRO-3's parameters are gathered for one layer at
    a time, and FSDP1's for a unit, which is copied.

    Args:
        model: a PEFT model with LoRA layers, on devices, and not offloaded. Under FSDP1 the
            outermost wrapper.
        adapter_names: the adapters to merge; None: the active ones.
        safe_merge: whether PEFT refuses NaN and infinity.

    Yields:
        A name, and a tensor that needs no gradient, in the base's dtype, on its device.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no LoRA layers, a weight is offloaded, a layer is an
            `nn.MultiheadAttention` or over a packed weight, the model is below FSDP1's outermost
            wrapper; or PEFT's merge raises it.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), LoraConfig(target_modules=["0"]))
    >>> {name: tuple(t.shape) for name, t in merged_weights(model)}
    {'0.weight': (4, 8), '0.bias': (4,)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    peft_model = peft_model_in(model)
    root = model if peft_model is None else peft_model.get_base_model()
    if not any(isinstance(module, LoraLayer) for module in root.modules()):
        raise missing_layers(model, "peft.get_peft_model(model, config) adds them")
    flattened = find_flattened(model)
    scopes = [] if flattened is None else _flattened_scopes(model)
    if flattened is not None and not scopes:
        raise ValueError(f"model: got {flattened}")
    check_merge(root, adapter_names, gathers=True)
    if not scopes:
        _check_copyable(root, "")
    for name, module in root.named_modules():
        tensors = module._parameters | module._buffers
        for key, t in tensors.items():
            if t is not None and t.is_meta and key not in module._non_persistent_buffers_set:
                raise ValueError(
                    f"model: got {name}.{key} offloaded, or on meta, want it on a device"
                )
    if scopes:
        return _flattened_weights(model, scopes, adapter_names, safe_merge)
    return _merged_weights(root, "", adapter_names, safe_merge)


def peft_model_in(model: nn.Module) -> PeftModel | None:
    """Return the `PeftModel` that modules without tensors may wrap, as DDP and FSDP do."""
    inner = model
    while not isinstance(inner, PeftModel):
        tensors = [*inner._parameters.values(), *inner._buffers.values()]
        is_wrapper = all(getattr(t, "_is_flat_param", False) for t in tensors)  # FSDP1's own
        if len(inner._modules) != 1 or not is_wrapper:
            return None
        (inner,) = inner.children()
    return inner


def is_below_fsdp1(model: nn.Module) -> bool:
    """Return True unless `model` is FSDP1's outermost wrapper, which alone can gather."""
    return type(model).__name__ != FSDP1 or getattr(model, "_is_root", None) is False


def _check_copyable(root: nn.Module, prefix: str) -> None:
    """Raise ValueError if PEFT cannot merge into a copy of a layer's base."""
    for name, module in root.named_modules(prefix=prefix):
        if isinstance(module, LoraLayer) and (reason := _uncopyable_reason(module)) is not None:
            raise ValueError(f"model: got {name}, {reason}")


def _uncopyable_reason(layer: Any) -> str | None:
    """Return why PEFT cannot merge into a copy of the layer's base, and the remedy."""
    if isinstance(layer, MultiheadAttention):
        return "an nn.MultiheadAttention, want other layers"
    base = layer.get_base_layer()
    weights: list[Any] = [base._parameters[n] for _, n in written_parameters(layer) if n != "bias"]
    # A model below FSDP1's outermost wrapper has no record of its state.
    if any(p.dim() < 2 and not is_absent(p) for p in weights) or not (weights or base.state_dict()):
        return f"whose base is {FLATTENED}"
    if not weights and isinstance(getattr(base, "weight", None), nn.Parameter):
        return f"whose base is wrapped in {type(base).__name__}, want it in no wrapper of its own"
    return None


class _Entry(NamedTuple):
    """What a key of the state dict belongs to.

    name: the key in the base model; None for entries that `merge_and_unload` drops: adapters, and
        the modules that `modules_to_save` replaces.
    layer: the outermost layer of PEFT above the tensor.
    base_key: the key in the base of that layer.
    slot: the parameter, if the tensor is one or belongs to one, as scales do.
    """

    name: str | None
    layer: Any = None
    base_key: str = ""
    slot: Slot | None = None


def _merged_weights(
    root: nn.Module, prefix: str, adapter_names: list[str] | None, safe_merge: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the merged weights of a part of the base model, whose names begin with `prefix`."""
    modules = list(root.modules())
    units = _units(modules)
    groups = _group_units(modules, units)
    state = root.state_dict()
    entries = {key: _locate(root, key) for key in state}
    # The names of the entries of parameters outside of PEFT's layers; the prefix of the others.
    names, prefixes = dict[Slot | None, list[str]](), dict[Any, str]()
    for entry in entries.values():
        if entry.name is None:
            continue
        name = prefix + entry.name
        if entry.layer is not None:
            prefixes[entry.layer] = name.removesuffix(entry.base_key)
        else:
            names.setdefault(entry.slot, []).append(name)
    yielded: set[str] = set()
    for key, t in state.items():
        entry = entries[key]
        if entry.name is None or (name := prefix + entry.name) in yielded:
            continue
        slot = entry.slot
        address = None if slot is None else _address(slot[0]._parameters[slot[1]])
        members, slots = groups.get(entry.layer) or groups.get(address) or ([], [])
        if not members:
            tensors = {name: t} if slot is None else _whole_tensors(slot, name, t)
        else:
            layers = [inner for member in members for inner in units[member]]
            gathered = [module for member in members for module in member.modules()]
            gathered += [module for module, _ in slots]
            tensors = {}
            with (
                whole_parameters(dict.fromkeys(gathered)),
                merged_copies(layers, slots, safe_merge, adapter_names),
            ):
                # The parameters of tied modules without an adapter belong to this group too.
                for module, n in slots:
                    p: Any = module._parameters[n]
                    tensors |= dict.fromkeys(names.get((module, n), ()), p.detach())
                for member in members:
                    merged = units[member][-1].base_layer.state_dict()
                    tensors |= {prefixes[member] + k: value for k, value in merged.items()}
                    del merged
                p = None
        yielded |= tensors.keys()
        for tied_name in list(tensors):
            t = tensors.pop(tied_name)
            yield tied_name, t
        del t


def _whole_tensors(slot: Slot, name: str, t: Tensor) -> dict[str, Tensor]:
    """Return the entries of a parameter that no merge changes, whole in each rank.

    name: its own in the base's state dict. t: its entry in the state dict of the sharded model.
    """
    module, key = slot
    if not is_sharded_parameter(module._parameters[key]):
        return {name: t}
    found: dict[str, Tensor] = {}
    with whole_parameters([module]):
        module._save_to_state_dict(found, "", keep_vars=False)
    prefix = name.removesuffix(key)
    return {prefix + k: v for k, v in found.items() if k == key or k.startswith(f"{key}.")}


# A module, its name in the base model, and those below it that are gathered by themselves.
Scope = tuple[nn.Module, str, list[nn.Module]]


def _flattened_scopes(model: nn.Module) -> list[Scope]:
    """Return FSDP1's units outside of PEFT's layers, the outermost first.

    Returns none if `model` is not the outermost unit.
    """
    peft_model = peft_model_in(model)
    if is_below_fsdp1(model):
        return []
    base = model if peft_model is None else peft_model.get_base_model()
    units: list[tuple[nn.Module, str]] = [(base, "")]
    inside: list[Any] = []
    for path, module in base.named_modules():
        is_inside = any(module is x for top in inside for x in top.modules())
        if is_inside:
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside.append(module)
        elif type(module).__name__ == FSDP1:
            parts = [part for part in path.split(".") if part not in WRAPPED]
            units.append((module, ".".join(parts) + "."))
    return [(unit, name, [m for m, _ in units if m is not unit]) for unit, name in units]


def _flattened_weights(
    model: nn.Module, scopes: Sequence[Scope], adapter_names: list[str] | None, safe_merge: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the merged weights of a model that FSDP1 shards, a unit at a time."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for i, (unit, prefix, others) in enumerate(scopes):
        outermost = unit if i else model
        with (
            _left_out(outermost, others),
            FullyShardedDataParallel.summon_full_params(outermost, writeback=False),
        ):
            _check_copyable(unit, prefix.rstrip("."))
            weights = _merged_weights(unit, prefix, adapter_names, safe_merge)
            # A unit's memory is freed when it is sharded again.
            tensors = {name: t.clone() for name, t in weights}
        for name in list(tensors):
            yield name, tensors.pop(name)


@contextmanager
def _left_out(root: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let `root` be without these modules, so that FSDP1 gathers only the rest."""
    removed = [
        (parent, name, child)
        for parent in root.modules()
        for name, child in parent._modules.items()
        if any(child is module for module in modules)
    ]
    try:
        for parent, name, _ in removed:
            parent._modules[name] = nn.Module()
        yield
    finally:
        for parent, name, child in removed:
            parent._modules[name] = child


def _units(modules: Iterable[nn.Module]) -> dict[Any, list[Any]]:
    """Return each layer of PEFT that is not nested -> this layer, and those nested in it."""
    units: dict[Any, list[Any]] = {}
    nested: set[Any] = set()
    for module in modules:
        if isinstance(module, BaseTunerLayer) and module not in nested:
            layers: list[Any] = [module]
            while isinstance(layers[-1].base_layer, BaseTunerLayer):
                layers.append(layers[-1].base_layer)
            nested.update(layers)
            units[module] = layers
    return units


def _group_units(
    modules: Iterable[nn.Module], units: dict[Any, list[Any]]
) -> dict[Any, tuple[list[Any], list[Slot]]]:
    """Return unit or address -> the units that are merged together, and all their parameters.

    Layers that share a base are merged into the same copy, one after another.
    """
    slots = _slots_by_address(modules)
    writes: dict[Any, set[Any]] = {}
    writers: dict[Any, list[Any]] = {}
    for unit, layers in units.items():
        written_slots = [slot for layer in layers for slot in written_parameters(layer)]
        writes[unit] = {_address(module._parameters[name]) for module, name in written_slots}
        for address in writes[unit]:
            writers.setdefault(address, []).append(unit)
    order = {unit: i for i, unit in enumerate(units)}
    groups: dict[Any, tuple[list[Any], list[Slot]]] = {}
    for unit in units:
        if unit in groups:
            continue
        members = [unit]
        for member in members:
            members += {x for a in writes[member] for x in writers[a]}.difference(members)
        addresses = set[Any]().union(*(writes[member] for member in members))
        members.sort(key=order.__getitem__)
        group = members, [slot for address in addresses for slot in slots[address]]
        groups |= dict.fromkeys([*members, *addresses], group)
    return groups


def _slots_by_address(modules: Iterable[nn.Module]) -> dict[Any, list[Slot]]:
    """Return address -> the parameters of these modules there."""
    slots: dict[Any, list[Slot]] = {}
    for module in modules:
        for name, p in module._parameters.items():
            if p is not None:
                slots.setdefault(_address(p), []).append((module, name))
    return slots


def _address(p: Any) -> Any:
    t = local_part(p)
    return (t.device, t.data_ptr()) if t.data_ptr() else id(p)  # 0: empty, or on meta


def _locate(root: nn.Module, key: str) -> _Entry:
    """Return what a key of the state dict belongs to."""
    module: Any = root
    name: list[str] = []
    layer: Any = None
    base_key = ""
    parts = key.split(".")
    while parts:
        part = parts.pop(0)
        module = _owner(module, part)
        if isinstance(module, BaseTunerLayer):
            if part != "base_layer":
                return _Entry(None)
            layer, base_key = layer or module, ".".join(parts)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            unloaded_path = _unloaded_path(module)
            if [part, *parts[: len(unloaded_path) - 1]] != unloaded_path:
                return _Entry(None)
            for expected in unloaded_path[1:]:
                module, part = module._modules[part], parts.pop(0)
                assert part == expected
        else:
            name.append(part)
        if part not in module._modules:
            slot = (module, part) if module._parameters.get(part) is not None else None
            return _Entry(".".join([*name, *parts]), layer, base_key, slot)
        module = module._modules[part]
    return _Entry(".".join(name), layer, base_key)


def _owner(module: nn.Module, part: str) -> nn.Module:
    """Return the module that has a child or tensor of this name: `module`, or one that it wraps.

    The wrappers of FSDP1 and of activation checkpointing are in no key of the state dict.
    """
    inner = module
    while not any(part in names for names in (inner._modules, inner._parameters, inner._buffers)):
        if len(inner._modules) != 1:
            return module
        (inner,) = inner.children()
    return inner


def _unloaded_path(wrapper: Any) -> list[str]:
    """Return the path below PEFT's wrapper to the module that remains after unloading."""
    if "token_adapter" in wrapper._modules:
        return ["token_adapter"]
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return ["modules_to_save", active[0]] if active else ["original_module"]


@contextmanager
def merged_copies(
    layers: Sequence[Any],
    slots: Sequence[Slot],
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
    dtype: torch.dtype | None = None,
    merge: Any = None,
) -> Iterator[None]:
    """Let PEFT merge these layers into copies of the parameters, and restore the originals at exit.

    Args:
        layers: the layers to merge, in their order in the model.
        slots: all parameters in the memory that the merges write.
        safe_merge, adapter_names: as of PEFT's `merge`.
        dtype: of the copies of dense parameters; None: the parameters' dtypes.
        merge: PEFT's method that merges; None: that of each layer's class.
    """
    originals = [(m, n, m._parameters[n], dict(vars(m._parameters[n]))) for m, n in slots]
    states = {m: vars(m)["quant_state"] for m, _ in slots if "quant_state" in vars(m)}
    copied_layers = [layer for layer in layers if not _is_copied_by_slots(layer)]
    bases = [layer.base_layer for layer in copied_layers]
    layer_states = [
        (layer, list(layer.merged_adapters), dict(getattr(layer, "_caches", {})))
        for layer in layers
    ]
    try:
        copies: dict[Any, Tensor] = {}
        replacements: dict[int, nn.Parameter] = {}
        for module, name, p, _ in originals:
            if not is_plain(p):
                continue
            assert p is not None
            if (key := _address(p)) not in copies:
                copies[key] = p.detach().to(dtype or p.dtype, copy=True)
            if id(p) not in replacements:  # tied parameters stay tied
                replacements[id(p)] = nn.Parameter(copies[key], requires_grad=False)
            module._parameters[name] = replacements[id(p)]
        del copies, replacements
        for layer, base in zip(copied_layers, bases, strict=True):
            layer.base_layer = copy.deepcopy(base)
        with torch.no_grad(), as_peft(layers):
            for layer in layers:
                (merge or peft_class(layer).merge)(layer, safe_merge, adapter_names)
        yield
    finally:
        for layer, base in zip(copied_layers, bases, strict=True):
            layer.base_layer = base
        for module, name, p, attributes in originals:
            module._parameters[name] = p
            vars(p).clear()
            vars(p).update(attributes)
        for module, state in states.items():
            module.quant_state = state
        for layer, merged, caches in layer_states:
            layer.merged_adapters[:] = merged
            if hasattr(layer, "_caches"):
                layer._caches = caches


def _is_copied_by_slots(layer: Any) -> bool:
    """Return True if PEFT's merge of the layer changes plain parameters, or replaces 4-bit ones."""
    if isinstance(layer.base_layer, BaseTunerLayer):
        return True
    parameters = [module._parameters[name] for module, name in written_parameters(layer)]
    return all(is_plain(p) or is_params4bit(p) for p in parameters)
