"""A function of rows, computed in tiles of rows. Only x is kept for the backward.

    y_t = f(x_t)        dx_t, dθ_t: the gradients of f(x_t)        dθ = Σ_t dθ_t

The backward computes the forward of each tile again, with autocast and the states of the random
number generators as they were. The gradients of the parameters add up in float32. So what f keeps
for its backward is there for one tile at a time.

The Function saves x before y is computed. A checkpoint that computes the forward again stops at its
last saved tensor, and so does not compute y again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.dtypes import stat_dtype, to_dtype
from . import context
from .autograd import differentiable_once

_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation: a parameter of an MLP that lora_kernels computes in tiles. Its backward computes "
    "the forward again"
)


class RowFunction(Protocol):
    """f: x [..., K] -> y [..., N]. A row of y depends on the same row of x alone."""

    def like(self, x: Tensor) -> tuple[int, torch.dtype]:
        """Return N and y's dtype for rows such as x's."""

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return y without a graph, and what `again` takes beside x."""

    def again(self, x: Tensor, kept: Any) -> Tensor:
        """Return y with a graph. Its values are not read."""


def tile_rows(M: int, rows: int) -> list[int]:
    """Return the rows of the fewest tiles of at most `rows` rows, which differ by one at most.

    >>> tile_rows(10, 4)
    [4, 3, 3]
    """
    n = max(-(-M // rows), 1)
    return [M // n + (i < M % n) for i in range(n)]


def call(f: RowFunction, x: Tensor, rows: int, parameters: Sequence[Tensor]) -> Tensor:
    """Return f(x) [..., N] for x [..., K], in tiles of at most `rows` rows.

    parameters: all that f reads.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or trained):
        return _compute(f, x, rows, [])
    kept: list[Any] = []
    state = _state(x.device)
    y: Tensor = _Tiles.apply(x, f, rows, state, parameters, kept, *trained)
    with torch.no_grad(), state.autocast():
        y.data = _compute(f, x.detach(), rows, kept)
    return y


def _split(x: Tensor, rows: int) -> Sequence[Tensor]:
    """Return the tiles of x [..., K]: [m, K] of a matrix, else [1, m, K]."""
    flat = x.reshape(-1, x.shape[-1])
    tiles = flat.split_with_sizes(tile_rows(flat.shape[0], rows))
    return tiles if x.dim() == 2 else [t[None] for t in tiles]


def _compute(f: RowFunction, x: Tensor, rows: int, kept: list[Any]) -> Tensor:
    """Return y. `kept` grows by what `again` takes of each tile."""
    ys: list[Tensor] = []
    start = 0
    for t in _split(x, rows):
        y_t, value = f.forward(t)
        kept.append(value)
        if not ys:
            ys = [y_t.new_empty(*x.shape[:-1], y_t.shape[-1])]
        stop = start + t.shape[-2]
        ys[0].view(-1, y_t.shape[-1])[start:stop] = y_t.view(-1, y_t.shape[-1])
        start = stop
    return ys[0]


class _State(NamedTuple):
    """What a forward depends on beside tensors.

    Args:
        device: of x.
        autocast_dtype: autocast's; None if it is disabled or x's device has none.
        generators: states of the random number generators, the CPU's and x's device's.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None
    generators: Sequence[Tensor]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Enable or disable autocast as in this state, without its cache of casts.

        A parameter whose cast was cached without a graph would have no gradient later.
        """
        kind, dtype = self.device.type, self.autocast_dtype
        if kind in context.WITHOUT_AUTOCAST:
            return context.NOTHING
        is_enabled = dtype is not None
        return torch.autocast(kind, dtype=dtype, enabled=is_enabled, cache_enabled=False)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Compute as in this state, and leave the generators as they are now."""
        found = _generators(self.device)
        _set_generators(self.device, self.generators)
        try:
            with self.autocast():
                yield
        finally:
            _set_generators(self.device, found)


def _state(device: torch.device) -> _State:
    kind = device.type
    is_enabled = kind not in context.WITHOUT_AUTOCAST and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_enabled else None
    return _State(device, dtype, _generators(device))


def _generators(device: torch.device) -> Sequence[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_generators(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [t._version for t in tensors if not t.is_inference()]


class _Tiles(torch.autograd.Function):
    """x [..., K] -> memory for y [..., N]. Saves x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: RowFunction,
        rows: int,
        state: _State,
        parameters: Sequence[Tensor],
        kept: list[Any],
        *trained: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.f, ctx.rows, ctx.state, ctx.kept, ctx.trained = f, rows, state, kept, trained
        ctx.parameters, ctx.versions = parameters, _versions(parameters)
        with state.restored():
            N, dtype = f.like(x)
        shape = *x.shape[:-1], N
        return x.new_empty_strided(shape, (0,) * len(shape), dtype=dtype)

    @staticmethod
    def compute(ctx: Any, saved: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), f, kept = saved, ctx.f, ctx.kept
        if ctx.versions != _versions(ctx.parameters):
            raise RuntimeError(_CHANGED)
        need_x, _, _, _, _, _, *needs = ctx.needs_input_grad
        wanted = [p for p, need in zip(ctx.trained, needs, strict=True) if need]
        tiles = _split(x, ctx.rows)
        dys = dy.reshape(-1, dy.shape[-1]).split_with_sizes([t.shape[-2] for t in tiles])
        # A batch of gradients is written to no other tensor.
        is_batched = context.is_batched(dy)
        dx = x.new_empty(x.shape) if need_x and not is_batched else None
        dxs: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(wanted)
        start = 0
        with ctx.state.restored(), torch.enable_grad():
            for t, dy_t, value in zip(tiles, dys, kept, strict=True):
                x_t = t.detach().requires_grad_(need_x)
                y_t = f.again(x_t, value)
                inputs = [x_t, *wanted] if need_x else wanted
                dy_t = dy_t.reshape(y_t.shape)
                grads = list(torch.autograd.grad(y_t, inputs, dy_t, allow_unused=True))
                del y_t
                with torch.no_grad():
                    if need_x:
                        dx_t = grads.pop(0).reshape(-1, x.shape[-1])
                        stop = start + dx_t.shape[0]
                        if dx is None:
                            dxs.append(dx_t)
                        else:
                            dx.view(-1, x.shape[-1])[start:stop] = dx_t
                        start = stop
                    _add(sums, grads)
        if dxs:
            dx = torch.cat(dxs).view(x.shape)
        of_wanted = iter(
            [g if g is None else to_dtype(g, p.dtype) for g, p in zip(sums, wanted, strict=True)]
        )
        return (
            dx,
            None,
            None,
            None,
            None,
            None,
            *[next(of_wanted) if need else None for need in needs],
        )

    backward = staticmethod(
        differentiable_once(compute.__func__, lambda ctx: ctx.trained)  # type: ignore[attr-defined]
    )


def _add(sums: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Add a tile's gradients to the sums."""
    for i, grad in enumerate(grads):
        if grad is not None:
            wide, total = to_dtype(grad, stat_dtype(grad.dtype)), sums[i]
            sums[i] = wide if total is None else total + wide
