"""Gated MLPs, down(act(gate(x)) * up(x)), that run as one block on a GPU (see `ops.blocks`).

`fuse` recognizes a module by its children's names, and by the result of its class's forward on
stand-ins for the projections. Liger's forwards are recognized by identity, because their Triton
kernels cannot run on stand-ins. The module's own weights are not read, because offloading, FSDP and
ZeRO may have removed them. Replacing a child is noticed. After any other change of the module, call
`fuse` again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Hashable, Iterator
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends import workspace
from ..backends.eager.gated_mlp import ACTIVATIONS
from ..ops import blocks, context, tiles
from . import direct
from .linear import Fused, set_class
from .modules import hooks_of, is_conv1d, original_forward, patched_reason
from .sharded import is_dtensor
from .zero3 import hooks_gather, is_gathered_in_call

# The children's names of gate, up and down.
NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate", "up", "down"),
    ("w1", "w3", "w2"),
)
_MERGED = "gate_up_proj"  # Phi-3's gate and up
MIN_TILE_ROWS = 1024  # of "auto"; with fewer, GEMMs read the weights more often than they compute
# Modules of liger_kernel.transformers, their MLPs and the activation in each one's forward.
_LIGER = (
    ("swiglu", "LigerSwiGLUMLP", "silu"),
    ("swiglu", "LigerBlockSparseTop2MLP", "silu"),
    ("swiglu", "LigerHunyuanV1SwiGLUMLP", "silu"),
    ("swiglu", "LigerQwen3MoeSwiGLUMLP", "silu"),
    ("geglu", "LigerGEGLUMLP", "gelu_tanh"),
)


class Parts(NamedTuple):
    """The parts of a gated MLP.

    Args:
        gate, up, down: names of its projections.
        act: name of the child that is its activation; "" if none is.
        act_module: that child.
        activation: of `ACTIVATIONS`.
    """

    gate: str
    up: str
    down: str
    act: str
    act_module: nn.Module | None
    activation: str


class GatedMLP(nn.Module):
    """The mix-in by which `fuse` overrides the forward of a gated MLP. x [..., K] -> [..., N]."""

    original_class: Any  # the class that a subclass overrides
    original_forward: Any  # that class's forward when the module was recognized
    _parts: Parts
    # Liger's forward, if Liger had patched it into this instance.
    _liger_forward: Any = None
    _is_block: bool  # on a GPU
    _tile_rows: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs:
            x, rows = args[0], self._tile_rows
            if rows is not None and tile_reason(self, x) is None:
                return tiles.call(_Rows(self), x, rows, [*self.parameters()])
            y = _call(self, x)
            if y is not None:
                return y
        return self._own_forward(*args, **kwargs)

    def _own_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        liger = self._liger_forward
        y = super().forward(*args, **kwargs) if liger is None else liger(self, *args, **kwargs)
        return cast(Tensor, y)

    def __setattr__(self, name: str, value: Any) -> None:
        """Restore the class if down is no longer a fused layer, as after `merge_and_unload`."""
        super().__setattr__(name, value)
        if name == self._parts.down and not isinstance(value, Fused):
            _restore(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the overridden class, because this class is in no module."""
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return _rebuild, (self.original_class,), *state


def _rebuild(cls: Any) -> Any:
    fused = _fused_class(cls)
    return fused.__new__(fused)


@functools.cache
def _fused_class(cls: Hashable) -> Any:
    """Return the class that `fuse` gives a gated MLP of a class."""
    original: Any = cls
    fields = {"__module__": original.__module__, "__doc__": original.__doc__}
    fields |= {"original_class": original, "original_forward": original.forward}
    return type(f"Fused{original.__name__}", (GatedMLP, original), fields)


def _call(mlp: Any, x: Any) -> Tensor | None:
    """Return y; None if the module's own forward computes it."""
    block = _block(mlp, x)
    return None if block is None else blocks.gated_mlp(x, block)


def _block(mlp: Any, x: Any) -> blocks.Block | None:
    """Return the block that computes y; None if the module's own forward does."""
    layers = _layers(mlp)
    if not mlp._is_block or not blocks.can_run(x) or _state_reason(mlp, layers) is not None:
        return None
    block_and_states = direct.make_block(layers, x, mlp._parts.activation)
    return None if block_and_states is None else block_and_states[0]


class _Rows(NamedTuple):
    """A gated MLP as a `tiles.RowFunction`. `again` takes P of the down-projection, of a block."""

    mlp: Any

    def like(self, x: Tensor) -> tuple[int, torch.dtype]:
        block = _block(self.mlp, x)
        if block is not None:
            return blocks.gated_mlp_like(block)
        y = self.mlp._own_forward(x.reshape(-1, x.shape[-1])[:1].view(*[1] * (x.dim() - 1), -1))
        return y.shape[-1], y.dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        block = _block(self.mlp, x)
        if block is None:
            return self.mlp._own_forward(x), None
        return blocks.gated_mlp_forward(x, block)

    def again(self, x: Tensor, kept: Tensor | None) -> Tensor:
        block = None if kept is None else _block(self.mlp, x)
        if block is None or kept is None:
            return cast(Tensor, self.mlp._own_forward(x))
        return blocks.gated_mlp_again(x, block, kept)


def tile_reason(mlp: Any, x: Any) -> str | None:
    """Return why a call computes all rows of x at once, although tiles were asked for, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the call"
    if type(x) not in context.TENSOR_TYPES or x.dim() < 2:
        return f"x is a {type(x).__name__}, want a tensor of two dimensions or more"
    if x.shape[:-1].numel() <= mlp._tile_rows:
        return "x has no more rows than a tile"
    if (reason := context.unfused_context()) is not None:
        return reason
    if not x.is_cpu and workspace.is_capturing(x.device):
        return "a CUDA graph captures the call"
    return tile_state_reason(mlp)


def tile_state_reason(mlp: Any) -> str | None:
    """Return why the MLP's state makes its calls compute all rows at once, or None."""
    if _has_any_global_hook():
        return "a hook sits on all modules"
    for name, module in mlp.named_modules():
        if module is mlp:
            continue
        if any(hooks_of(module)) and not (is_gathered_in_call(mlp) and hooks_gather(module)):
            return f"{name}: a hook sits on it, which would see the tiles"
        if "forward" in module.__dict__ and patched_reason(module) is not None:
            return f"{name}: {patched_reason(module)}"
    for name, p in mlp.named_parameters():
        if is_dtensor(p):
            return f"{name} is sharded by itself: shard the decoder layer"
    return None


def _layers(mlp: Any) -> tuple[Any, Any, Any]:
    """Return the MLP's gate, up and down; None for one that was taken away."""
    parts, modules = mlp._parts, mlp._modules
    return modules.get(parts.gate), modules.get(parts.up), modules.get(parts.down)


def _state_reason(mlp: Any, layers: tuple[Any, Any, Any]) -> str | None:
    """Return why calling the MLP's modules may do more than a gated MLP computes."""
    cls, parts, modules = type(mlp), mlp._parts, mlp._modules
    if cls.original_class.forward is not cls.original_forward:
        return f"{cls.original_class.__name__}.forward was replaced"
    if _has_any_global_hook():
        return "a hook sits on all modules"
    act = modules.get(parts.act)
    if act is not parts.act_module:
        return f"its {parts.act} was replaced"
    if act is not None and direct.is_hooked(act):
        return f"{parts.act}: {patched_reason(act) or 'a hook sits on it'}"
    for layer in layers:
        if (reason := direct.member_reason(layer)) is not None:
            return f"{parts[layers.index(layer)]}: {reason}"
    return None


def block_reason(mlp: Any, device: torch.device, x_dtype: torch.dtype) -> str | None:
    """Return why the MLP's state makes it run its own forward for x on this device."""
    if (reason := patched_reason(mlp)) is not None:
        return f"{reason} after fuse(model): call it again"
    layers = _layers(mlp)
    if (reason := _state_reason(mlp, layers)) is not None:
        return reason
    for name, layer in zip(mlp._parts[:3], layers, strict=True):
        record = direct.read_in_block(layer, device, x_dtype)
        if isinstance(record, str):
            return f"{name}: {record}"
    return None


# MLPs in a model


def fuse_mlps(model: nn.Module, is_block: bool, rows: int | str | None) -> None:
    """Give each gated MLP of the model the class that runs it as one block, and in tiles of rows.

    rows: of a tile, as `fuse`'s `mlp_tile_rows`.
    """
    for _, module in _candidates(model):
        parts = recognize(module)
        if isinstance(parts, Parts):
            module._parts, module._is_block = parts, is_block
            if rows is not None:
                K = getattr(module, parts.gate).in_features
                module._tile_rows = max(K, MIN_TILE_ROWS) if rows == "auto" else rows
            instance_forward = getattr(vars(module).get("forward"), "__func__", None)
            if _liger_activation(instance_forward) is not None:
                module._liger_forward = instance_forward
                del vars(module)["forward"]
            cls: Any = type(module)
            set_class(module, _fused_class(cls))


def restore_mlps(model: nn.Module) -> None:
    """Undo `fuse_mlps`."""
    for module in model.modules():
        if isinstance(module, GatedMLP):
            _restore(module)


def _restore(mlp: GatedMLP) -> None:
    set_class(mlp, mlp.original_class)
    for name in ("_parts", "_is_block", "_tile_rows"):
        vars(mlp).pop(name, None)
    liger = vars(mlp).pop("_liger_forward", None)
    if liger is not None:
        vars(mlp).setdefault("forward", MethodType(liger, mlp))


def mlp_reasons(model: nn.Module) -> Iterator[tuple[str, Any, str | None]]:
    """Yield (name, module, reason) of each module that may be a gated MLP.

    The reason is why `fuse` leaves the module; None if `fuse` has given it a fused class.
    """
    for name, module in _candidates(model):
        reason: str | None = None
        if not isinstance(module, GatedMLP):
            parts = recognize(module)
            reason = parts if isinstance(parts, str) else "not fused: call fuse(model, blocks=True)"
            if any(map(is_gathered_in_call, module.modules())):
                reason = "DeepSpeed's ZeRO-3 gathers each of its layers for the layer's own call"
        yield name, module, reason


def _is_linear(module: Any) -> bool:
    return isinstance(module, (nn.Linear, LoraLayer)) or is_conv1d(module)


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules that have the linear layers of a gated MLP, one or more of them fused."""
    for name, module in model.named_modules():
        linears = [child for child in module._modules.values() if _is_linear(child)]
        is_gated = len(linears) == 3 or _MERGED in module._modules
        if is_gated and any(isinstance(child, Fused) for child in linears):
            yield name, module


def recognize(module: Any) -> Parts | str:
    """Return the parts of a gated MLP, or why the module is not recognized as one.

    The class's forward on stand-ins has to give `down(act(gate(x)) * up(x))`, bit for bit, in
    training and in eval mode, for inputs that saturate the activation and inputs that do not.
    """
    children = {name: child for name, child in module._modules.items() if child is not None}
    linears = {name for name, child in children.items() if _is_linear(child)}
    if _MERGED in linears:
        return "gate and up are one linear layer, which is not covered in this version"
    names = next((triple for triple in NAMES if set(triple) == linears), None)
    if names is None:
        known = ", or ".join(map(", ".join, NAMES))
        return f"its linear layers are {', '.join(sorted(linears))}, not {known}"
    for name in names:
        if not getattr(type(children[name]), "fits_blocks", False):
            return f"{name} is no fused LoRA layer"
    others = [name for name in children if name not in linears]
    if len(others) > 1:
        return f"it has modules beside its projections and one activation: {', '.join(others)}"
    act = others[0] if others else ""
    if act and any(True for _ in (*children[act].parameters(), *children[act].buffers())):
        return f"its {act} has parameters or buffers"
    if any(t is not None for t in (*module._parameters.values(), *module._buffers.values())):
        return "it has parameters or buffers of its own"
    forward = vars(module).get("forward", type(module).forward)
    activation = _liger_activation(getattr(forward, "__func__", forward))
    if activation is not None:
        return Parts(*names, "", None, activation)
    if (reason := patched_reason(module)) is not None:
        return reason
    if original_forward(type(module)) is None:
        return f"{type(module).__name__}.forward was replaced"
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        for activation in ACTIVATIONS:
            if all(_agrees(module, names, activation, mode) for mode in (False, True)):
                return Parts(*names, act, children.get(act), activation)
    return "its forward does not return down(act(gate(x)) * up(x)) of SiLU or GELU"


def _liger_activation(forward: Any) -> str | None:
    """Return the activation of one of Liger's forwards; None for any other function."""
    for file, name, activation in _LIGER:
        cls = getattr(sys.modules.get(f"liger_kernel.transformers.{file}"), name, None)
        if cls is not None and forward is original_forward(cls):
            return activation
    return None


def _agrees(module: Any, names: tuple[str, ...], activation: str, training: bool) -> bool:
    """Return True if the class's forward on stand-ins gives a gated MLP's result."""
    # Different weights, because with equal ones gate and up could change places.
    gate, up, down = _stand_in(6, 10, seed=0), _stand_in(6, 10, seed=1), _stand_in(10, 6, seed=2)
    shell = object.__new__(type(module))
    attributes = {name: value for name, value in vars(module).items() if name != "forward"}
    x = _sample(6, 2, 6)
    want = down(ACTIVATIONS[activation](gate(x)) * up(x))
    with contextlib.suppress(Exception):  # no copy, other sizes, other arguments
        # The activation has a training mode too.
        modules = {
            name: child and copy.deepcopy(child).train(training)
            for name, child in module._modules.items()
            if name not in names
        }
        modules.update(zip(names, (gate, up, down), strict=True))
        vars(shell).update(attributes, _modules=modules, training=training)
        y = type(module).forward(shell, x.clone())
        if isinstance(y, Tensor) and y.dtype is want.dtype:
            return torch.equal(y, want)
    return False


def _sample(*shape: int) -> Tensor:
    """Return float64 values of magnitudes up to 10³. The largest saturate an activation."""
    generator = torch.Generator().manual_seed(0)
    options: Any = {"dtype": torch.float64, "device": "cpu"}
    values = torch.randn(*shape, generator=generator, **options)
    return values * torch.logspace(-2, 3, shape[0], **options).view(-1, *[1] * (len(shape) - 1))


def _stand_in(K: int, N: int, seed: int) -> nn.Linear:
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, K, N, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for p in linear.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu"))
    return linear
