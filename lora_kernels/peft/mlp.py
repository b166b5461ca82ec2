"""Gated MLPs, down(act(gate(x)) * up(x)), whose down-projection `fuse` has taken.

On a GPU their forward keeps no h = act(gate(x)) * up(x) for the backward, see `gated_mlp`. A module
is recognized by the result of its class's forward on stand-ins for the projections: small float64
linears. Its own weights are not read, because offloading, FSDP and ZeRO may have taken them, and a
forward may change them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends.eager import gated_mlp as eager_mlp
from ..backends.library import is_on_gpu_path
from ..ops import context
from ..ops.gated_mlp import Hidden, gated_mlp
from ..ops.siblings import is_eager
from .adalora import FusedSVD
from .adapters import adapters_of, casts_adapters, dropout_p, lora_bias, weight_of
from .base import readable_weight
from .eligibility import unreadable_reason
from .linear import Fused, set_class
from .modules import hooks_of, is_conv1d, is_linear4bit, library_forward, patched_reason
from .plan import plan_linear
from .siblings import owner_of
from .zero3 import is_gathered_in_call


class Parts(NamedTuple):
    """The names of a gated MLP's projections, and its activation.

    Args:
        gate, up, down: names of submodules.
        act: name of the attribute that has the activation.
        function: the activation, a module or a function.
        activation: of `eager_mlp.ACTIVATIONS`.
        is_up_first: whether up is called before gate. Dropout draws its masks in that order.
        settings: a module, by name ("" for the MLP, or its activation), the name of one of its
            other attributes, which its forward may read, and the value. "config.size" is the name
            of an attribute of the object `config`, if the forward's code has it.
        attributes: names of the MLP's own attributes, and of those that no forward reads.
    """

    gate: str
    up: str
    down: str
    act: str
    function: Any
    activation: str
    is_up_first: bool = False
    settings: tuple[tuple[str, str, Any], ...] = ()
    attributes: frozenset[str] = frozenset()


class GatedMLP(nn.Module):
    """The mix-in by which `fuse` overrides the forward of a gated MLP.

    x [..., K] -> [..., N]. The projections of gate and up are called as modules.
    """

    own_class: Any  # the class that a subclass overrides
    own_forward: Any  # its forward when it was recognized
    _parts: Parts

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            x = args[0]
            if is_on_gpu_path(context.device_of(x)[0]) and _call_reason(self, x) is None:
                return _run(self, x)
        return cast(Tensor, super().forward(*args, **kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        """Restore the class without a fused down-projection, as `merge_and_unload` leaves it."""
        super().__setattr__(name, value)
        if name == self._parts.down and not isinstance(value, Fused):
            _restore(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the overridden class, since this one has no name to be found by."""
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return _rebuild, (self.own_class,), *state


def _rebuild(cls: Any) -> Any:
    found = _fused_class(cls)
    return found.__new__(found)


@functools.cache
def _fused_class(cls: Hashable) -> Any:
    """Return the class that `fuse` gives a gated MLP of a class."""
    own: Any = cls
    fields = {"__module__": own.__module__, "__doc__": own.__doc__}
    fields |= {"own_class": own, "own_forward": own.forward}
    return type(f"Fused{own.__name__}", (GatedMLP, own), fields)


def fuse_mlps(model: nn.Module) -> None:
    """Give each gated MLP of the model the class that runs it as one block."""
    for _, module in _candidates(model):
        if isinstance(module, GatedMLP):
            _restore(module)  # its settings may have changed
        found = recognize(module)
        if isinstance(found, Parts):
            module._parts = found
            cls: Any = type(module)
            set_class(module, _fused_class(cls))


def restore_mlps(model: nn.Module) -> None:
    """Undo `fuse_mlps`."""
    for module in model.modules():
        if isinstance(module, GatedMLP):
            _restore(module)


def _restore(mlp: GatedMLP) -> None:
    set_class(mlp, mlp.own_class)
    del vars(mlp)["_parts"]


def mlp_reasons(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield the name of each module that may be a gated MLP, the module, and why `fuse` leaves it.

    None if `fuse` has taken it.
    """
    for name, module in _candidates(model):
        found: Parts | str
        if any(map(is_gathered_in_call, module.modules())):
            found = "DeepSpeed's ZeRO-3 gathers each of its layers for the layer's own call"
        else:
            found = module._parts if isinstance(module, GatedMLP) else recognize(module)
        if isinstance(found, Parts) and not isinstance(module, GatedMLP):
            found = "not fused: call fuse(model)"
        yield name, module, found if isinstance(found, str) else None


def _is_linear(module: Any) -> bool:
    return isinstance(module, (nn.Linear, LoraLayer)) or is_conv1d(module)


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules that have the linear layers of a gated MLP, one or more of them fused."""
    for name, module in model.named_modules():
        linears = [each for each in module._modules.values() if _is_linear(each)]
        has_projections = len(linears) == 3 or _has_merged_gate(linears)
        is_fused = any(isinstance(each, Fused) for each in linears)
        if has_projections and is_fused:
            yield name, module


def _has_merged_gate(linears: Sequence[Any]) -> bool:
    """Return True for two linear layers that may be Phi-3's, whose gate and up are one."""
    widths = [
        (getattr(each, "in_features", 0), getattr(each, "out_features", 0)) for each in linears
    ]
    return len(widths) == 2 and any(a[1] == 2 * b[0] > 0 for a, b in (widths, widths[::-1]))


def recognize(module: Any) -> Parts | str:
    """Return the parts of a gated MLP, or why the module is not recognized as one.

    Its class's forward on stand-ins gives `down(act(gate(x)) * up(x))`, bit for bit, in training
    and in eval mode, and whether the activation saturates or not.
    """
    linears = [name for name, each in module._modules.items() if _is_linear(each)]
    attributes = {**module._modules, **vars(module)}.items()
    others = {
        name: each
        for name, each in attributes
        if name not in linears and callable(each) and name != "forward" and name[0] != "_"
    }
    if len(linears) == 2:
        return "gate and up are one linear layer, which is not covered in this version"
    if len(linears) != 3 or len(others) != 1:
        return (
            f"not a gated MLP: {len(linears)} linear layers and {len(others)} other modules and "
            "functions, want 3 and an activation"
        )
    if any(
        each is not None
        for name, each in module._modules.items()
        if name not in (*linears, *others)
    ):
        return "not a gated MLP: it has another module of its own"
    if any(isinstance(each, Tensor) for each in vars(module).values()):
        return "not a gated MLP: it has a tensor of its own"
    if any(t is not None for t in (*module._parameters.values(), *module._buffers.values())):
        return "not a gated MLP: it has parameters or buffers of its own"
    ((act, function),) = others.items()
    if isinstance(function, nn.Module):
        if any(True for _ in (*function.parameters(), *function.buffers())):
            return f"its activation {act} has parameters or buffers"
        if function._modules:
            return f"its activation {act} has modules of its own"
    if library_forward(type(module)) is None:
        return f"{type(module).__name__}.forward was replaced"
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        activation = _find_activation(function)
        if activation is None:
            return f"its activation {act} is not SiLU or GELU, by erf or by tanh"
        for gate, up, down in itertools.permutations(linears):
            parts = Parts(gate, up, down, act, function, activation)
            orders = [_call_order(module, parts, training) for training in (False, True)]
            if orders[0] and orders[0] == orders[1]:
                return parts._replace(
                    is_up_first=orders[0][0] == up,
                    settings=tuple(_settings(module, act)),
                    attributes=frozenset(vars(module)) | _NO_SETTINGS,
                )
    return "not a gated MLP: its result is not down(act(gate(x)) * up(x))"


# Attributes that torch, accelerate, transformers and this package set; a forward reads none.
_NO_SETTINGS = {*vars(nn.Module()), "forward", "_old_forward", "_hf_hook", "_is_hf_initialized"}
_NO_SETTINGS |= {"_parts", "_siblings"}


def _settings(mlp: nn.Module, act: str) -> Iterator[tuple[str, str, Any]]:
    for path in ("", act):
        module = mlp._modules.get(path) if path else mlp
        if module is None:
            continue
        for name, value in vars(module).items():
            if name in _NO_SETTINGS or (module is mlp and name == act):
                continue
            yield path, name, _copy_containers(value)
            if hasattr(value, "__dict__") and not callable(value):  # a configuration
                code = getattr(type(module).forward, "__code__", None)
                for each in () if code is None else code.co_names:
                    found = getattr(value, each, _MISSING)
                    if found is not _MISSING and not callable(found):
                        yield path, f"{name}.{each}", _copy_containers(found)


def _copy_containers(value: Any) -> Any:
    """Return a copy of a container and of those in it, so that changes in place are noticed.

    The class stays, which `_is_same_setting` compares. Everything else is returned as it is.
    """
    if isinstance(value, (dict, list, set)):
        found: Any = copy.copy(value)
        if isinstance(value, dict):
            found.update({key: _copy_containers(each) for key, each in value.items()})
        elif isinstance(value, list):
            found[:] = map(_copy_containers, value)
        return found
    return tuple(map(_copy_containers, value)) if type(value) is tuple else value


_MISSING = object()


def _setting(module: Any, name: str) -> Any:
    """Return the setting of that name as it is now."""
    first, _, rest = name.partition(".")
    value = vars(module).get(first, _MISSING)
    return getattr(value, rest, _MISSING) if rest else value


def _sample(*shape: int) -> Tensor:
    """Return float64 values of all magnitudes; an activation saturates for the largest."""
    generator = torch.Generator().manual_seed(0)
    options: Any = {"dtype": torch.float64, "device": "cpu"}
    values = torch.randn(*shape, generator=generator, **options)
    return values * torch.logspace(-2, 3, shape[0], **options).view(-1, *[1] * (len(shape) - 1))


def _find_activation(function: Any) -> str | None:
    """Return the name of the function in `eager_mlp.ACTIVATIONS` that has the same results.

    In few bits too, where the same formula by several ops rounds more often.
    """
    samples = [_sample(12, 20).to(dtype) for dtype in (torch.float64, torch.bfloat16)]
    modes = [function]
    if isinstance(function, nn.Module):  # it may drop elements in training
        modes = [copy.copy(function), copy.copy(function)]
        for training, mode in enumerate(modes):
            vars(mode)["training"] = bool(training)
    for name, known in eager_mlp.ACTIVATIONS.items():
        with contextlib.suppress(Exception):
            if all(_is_same(mode(x.clone()), known(x)) for mode in modes for x in samples):
                return name
    return None


def _call_order(module: Any, parts: Parts, training: bool) -> list[str]:
    """Return the projections in the order in which the module's forward calls stand-ins for them.

    Empty if the result is not that of a gated MLP of these parts.
    """
    # Each with weights of its own, or gate and up could change places.
    gate, up, down = _stand_in(6, 10, seed=0), _stand_in(6, 10, seed=1), _stand_in(10, 6, seed=2)
    stand_ins = {parts.gate: gate, parts.up: up, parts.down: down}
    copy = object.__new__(type(module))
    own = {name: each for name, each in vars(module).items() if name != "forward"}
    modules = {**module._modules, **stand_ins}
    vars(copy).update(own, _modules=modules, training=training)
    x, called = _sample(6, 2, 6), list[str]()
    want = down(parts.function(gate(x)) * up(x))
    for name, stand_in in stand_ins.items():
        stand_in.register_forward_pre_hook(lambda *args, name=name: called.append(name))
    try:
        found = type(module).forward(copy, x.clone())
    except Exception:  # other sizes, other arguments
        return []
    return called if len(called) == 3 and _is_same(found, want) else []


def _stand_in(K: int, N: int, seed: int) -> nn.Linear:
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, K, N, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for p in linear.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu"))
    return linear


def _is_same(found: Any, want: Tensor) -> bool:
    return isinstance(found, Tensor) and found.dtype is want.dtype and torch.equal(found, want)


# A call


def _call_reason(mlp: Any, x: Tensor) -> str | None:
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}"
    return block_reason(mlp, x.device, x.dtype)


def block_reason(mlp: Any, device: torch.device, x_dtype: torch.dtype) -> str | None:
    """Return why the MLP runs its own forward for x on this device, which is a GPU's."""
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if (reason := context.unfused_context()) is not None:
        return reason
    if device.type != "meta" and context.is_intercepted():  # on meta the counter looks
        return "a mode sees each op, and may replay it, as selective checkpointing does"
    if mlp.own_class.forward is not type(mlp).own_forward:
        return f"{mlp.own_class.__name__}.forward was replaced"
    parts, modules = mlp._parts, mlp._modules
    if modules.get(parts.act, vars(mlp).get(parts.act)) is not parts.function:
        return f"its {parts.act} was replaced"
    for name in vars(mlp).keys() - parts.attributes:
        if hasattr(mlp.own_class, name):  # which its forward read before
            return f"its {name} has changed since fuse"
    known = parts.gate, parts.up, parts.down, parts.act
    for own in (modules, mlp._parameters, mlp._buffers):
        for name, each in own.items():
            if each is not None and name not in known:
                return f"its {name} has changed since fuse"
    for path, name, value in parts.settings:
        if not _is_same_setting(_setting(modules.get(path) if path else mlp, name), value):
            return f"its {'.'.join(filter(None, (path, name)))} has changed since fuse"
    if _has_any_global_hook():
        return "a hook sits on all modules"
    if _has_hooks(mlp):
        return "a hook sits on it or on one of its parts"
    for name in ("", parts.gate, parts.up, parts.act):
        module = modules.get(name) if name else mlp
        if module is not None and (reason := patched_reason(module)):
            return f"{name}: {reason}" if name else reason
    reason = _down_reason(modules[parts.down], device, x_dtype)
    return None if reason is None else f"{parts.down}: {reason}"


def _is_same_setting(a: Any, b: Any) -> bool:
    """Return True for the same object, equal numbers or strings, or containers of such."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_same_setting(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_is_same_setting, a, b))
    return isinstance(a, (int, float, str, set)) and bool(a == b)


def _has_hooks(module: nn.Module) -> bool:
    """Return True for a hook on the module or on one inside of it, beside those of `Siblings`.

    `modules()` takes longer.
    """
    for hooks in hooks_of(module):
        if hooks and any(owner_of(hook) is None for hook in hooks.values()):
            return True
    return any(_has_hooks(each) for each in module._modules.values() if each is not None)


def _down_reason(down: Any, device: torch.device, x_dtype: torch.dtype) -> str | None:
    """Return why a down-projection is called as a module."""
    if not isinstance(down, Fused) or isinstance(down, FusedSVD):
        return f"a {type(down).__name__} is not a fused LoRA layer"
    if (reason := patched_reason(down)) is not None:
        return reason
    adapters, reason, base_reason, is_dora = plan_linear(down, device, x_dtype)
    if reason is not None:
        return reason
    if len(adapters) > 1:
        return "several active adapters"
    ((name, _, _, scaling, dropout, diag, is_alora),) = adapters
    if is_dora or diag is not None or is_alora:
        return f"adapter {name!r} is a variant of LoRA"
    if isinstance(scaling, Tensor):
        return f"adapter {name!r} is prepared for hot-swapping"
    if dropout_p(dropout):
        return f"adapter {name!r} has dropout"
    return None if base_reason is None else f"base layer: {base_reason}"


def _run(mlp: Any, x: Tensor) -> Tensor:
    """Run an MLP that has no `block_reason`."""
    parts, modules = mlp._parts, mlp._modules
    gate, up, down = modules[parts.gate], modules[parts.up], modules[parts.down]
    if parts.is_up_first:
        u = up(x)
        g = gate(x)
    else:
        g = gate(x)
        u = up(x)
    is_plain = type(g) is type(u) is Tensor and g.shape == u.shape and g.dtype is u.dtype
    if not is_plain or g.device != x.device or u.device != x.device:
        y: Tensor = down(parts.function(g) * u)
        return y
    if not torch.is_grad_enabled():
        y = down(eager_mlp.gated(g.contiguous(), u.contiguous(), parts.activation))
        return y
    base: Any = down.base_layer
    (adapter,) = adapters_of(down)
    A, B, scaling = weight_of(adapter.lora_A), weight_of(adapter.lora_B), float(adapter.scaling)
    if casts_adapters(down, g.device.type, g.dtype, g.shape[:-1].numel()):
        A, B = A.to(g.dtype), B.to(g.dtype)
    weight, compute_dtype = readable_weight(base, g)
    if not is_eager(g, weight, A, B, compute_dtype):
        y = down(parts.function(g) * u)
        return y
    if down.mixed_batch is not None:  # of a call before
        down.mixed_batch = None
    bias, own = base._parameters["bias"], lora_bias([adapter])
    bias = bias if own is None else own if bias is None else bias + own
    is_private = _makes_its_result(gate, x.device) and _makes_its_result(up, x.device)
    hidden = Hidden(g, u, parts.activation, is_private)
    y = gated_mlp(hidden, weight, A, B, scaling, bias, compute_dtype)
    # bitsandbytes returns h's dtype, under autocast too.
    return y.to(g.dtype) if is_linear4bit(base) else y


def _makes_its_result(module: Any, device: torch.device) -> bool:
    """Return True if nothing else holds the result of the module, which has no hooks.

    The modules of other libraries may save theirs for the backward.
    """
    if isinstance(module, LoraLayer) and not isinstance(module, Fused):
        return False
    return unreadable_reason(module._modules.get("base_layer", module), device) is None
