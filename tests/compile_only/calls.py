"""The calls that are compiled: production's own launch functions on tensors without memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.backends.triton import FUSED, codec, configs, elementwise, launch
from lora_kernels.backends.triton import linear as equation
from lora_kernels.core.call import Needs, Operands, Saved, Spec
from lora_kernels.core.codes import Codes

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Call:
    """One `lora_linear`, or its backward, at a size where `configs` decides something else."""

    M: int
    dtype: torch.dtype = bf16
    adapter: torch.dtype = bf16
    R: int = 16
    quant: str = ""  # "", "whole" blocks in whole words, or "odd" rows
    backward: bool = False
    frozen: bool = False  # x, so that dS is computed alone
    options: bool = False  # gate, column scale, bias, z kept
    odd: bool = False  # K and N odd, so that nothing is aligned
    base: bool = True  # whether there is a weight

    def __str__(self) -> str:
        names = [f"M{self.M}", f"R{self.R}", str(self.dtype).removeprefix("torch.")]
        names += [f"A:{self.adapter}".replace("torch.", "")] if self.adapter != self.dtype else []
        names += [FUSED, "backward" if self.backward else "forward"]
        names += [f"codes:{self.quant}"] if self.quant else []
        names += [] if self.base else ["no base"]
        names += [name for name in ("frozen", "options", "odd") if getattr(self, name)]
        return " ".join(names)

    @property
    def aligned(self) -> bool:
        return not self.odd and self.quant != "odd"

    def run(self) -> None:
        odd = self.odd or self.quant == "odd"
        M, N, K, R = self.M, 4096 - odd, 4096 - odd, self.R
        x, A, B = meta((M, K), self.dtype), meta((R, K), self.adapter), meta((N, R), self.adapter)
        weight = codes(N, K) if self.quant else meta((N, K), self.dtype) if self.base else None
        gate = meta((R,), f32) if self.options else None
        scale = meta((N,), f32) if self.options else None
        bias = meta((N,), self.dtype) if self.options else None
        if not self.backward:
            operands = Operands(x, weight, A, B, gate, scale, bias)
            spec = Spec(2.0, 0.0, self.dtype, self.dtype, self.options)
            equation.lora_linear(operands, spec, FUSED)
            return
        dy, z = meta((M, N), self.dtype), meta((M, N), self.dtype)
        equation.lora_linear_backward(
            dy,
            Operands(x, weight, A, B, gate, scale),
            Saved(meta((M, R), f32), z if self.options else None),
            Spec(2.0, 0.0, self.dtype, self.dtype),
            Needs(not self.frozen, True, True, self.options, self.options, self.options),
            FUSED,
        )


@dataclass(frozen=True)
class Dequantize:
    """One `dequantize`, to this dtype."""

    dtype: torch.dtype = bf16
    aligned: bool = True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"dequantize {dtype} codes:{'whole' if self.aligned else 'odd'}"

    def run(self) -> None:
        N = 4096 if self.aligned else 4095
        codec.dequantize(codes(N, N), (N, N), self.dtype)


@dataclass(frozen=True)
class Gated:
    """h of a gated MLP, and its backward."""

    activation: str = "silu"
    dtype: torch.dtype = bf16
    aligned: bool = True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"gated {self.activation} {dtype}{'' if self.aligned else ' odd'}"

    def run(self) -> None:
        g = meta((4096 if self.aligned else 4095, 4096 if self.aligned else 4095), self.dtype)
        elementwise.gated(g, g, self.activation)
        elementwise.gated_backward(*[g] * 6, self.activation)


@dataclass(frozen=True)
class GatedUpdate:
    """h of a gated MLP whose kernels add the updates, its backward, and the sum of partial sums."""

    R: int = 16
    activation: str = "silu"
    dtype: torch.dtype = bf16
    M: int = 4096
    aligned: bool = True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"gated update M{self.M} R{self.R} {self.activation} {dtype}"
        return text + ("" if self.aligned else " odd")

    def run(self) -> None:
        M, N, R, dtype = self.M, 14336 - (not self.aligned), self.R, self.dtype
        target = launch.target(torch.device("meta"))
        if target.kind != "cuda":  # whose GEMMs add the updates
            return
        g, P, B = meta((M, N), dtype), meta((M, 2 * R), dtype), meta((N, R), dtype)
        updates = *P.split(R, 1), B, B
        elementwise.gated_update(g, g, *updates, 2.0, 2.0, self.activation)
        ds, A = meta((M, R), dtype), meta((R, N), dtype)
        _, rows, has_sums = configs.gated_update_backward(target, M, N, dtype.itemsize, R)
        partials = meta((-(-M // rows), 3 * R, N), f32) if has_sums else None
        out = g, g, None if has_sums else g, partials
        elementwise.gated_update_backward(g, g, g, *updates, ds, A, 2.0, 2.0, self.activation, *out)
        if partials is not None:
            elementwise.gated_gradients(partials, A, B, B)


@dataclass(frozen=True)
class Loss:
    """The loss of a head, with its gradient."""

    dtype: torch.dtype = bf16
    aligned: bool = True
    options: bool = False  # cap and label smoothing

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"loss {dtype}{' options' * self.options}{'' if self.aligned else ' odd'}"

    def run(self) -> None:
        y = meta((512, 128256 if self.aligned else 50257), self.dtype)
        cap, smoothing = (30.0, 0.1) if self.options else (0.0, 0.0)
        labels = meta((512,), torch.int64)
        elementwise.cross_entropy(y, labels, 1.0, cap, 1.0, smoothing, True)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def codes(N: int, K: int) -> Codes:
    blocks = -(-N * K // 64)
    packed, absmax = (meta((n,), torch.uint8) for n in (-(-N * K // 2), blocks))
    sizes = (16, -(-blocks // 256), 256, 1)  # code, nested_absmax, nested_code, offset
    return Codes(packed, absmax, *(meta((n,), f32) for n in sizes), 64, 256, "nf4")


AnyCall = Call | Dequantize | Gated | GatedUpdate | Loss

# One config a kernel and target; those that qualification may choose.
SLICE: list[AnyCall] = [
    Call(16),
    Call(16, quant="whole"),
    Call(128, quant="whole"),
    Call(4096),
    Call(4096, f32, f32),
    Call(4096, backward=True, options=True),
    Call(4096, backward=True, frozen=True),
    Dequantize(),
    Gated(),
    GatedUpdate(),
    Loss(),
]


def every_call() -> Iterator[AnyCall]:
    """Every branch of `configs`, every format, with options and without, aligned and odd."""
    yield from SLICE
    for M, dtype in itertools.product((1, 64, 256, 4096), (bf16, f32)):
        for backward, quant in itertools.product((False, True), ("", "whole")):
            yield Call(M, dtype, dtype, 16, quant, backward)
        yield Call(M, dtype, dtype, backward=True, frozen=True)
    for backward in (False, True):
        yield Call(4096, R=configs.MAX_RANK, backward=backward)
        for quant in ("", "odd"):
            yield Call(256, bf16, f32, 16, quant, backward, options=True)
            yield Call(256, f16, f16, 5, quant, backward, odd=True)
            yield Call(4096, bf16, bf16, 32, quant, backward, options=True)
    yield Call(4096, bf16, bf16, configs.MAX_RANK, backward=True, frozen=True)
    for dtype in (bf16, f32):
        yield Call(4096, dtype, dtype, base=False, options=True)
    yield Dequantize(f32, aligned=False)
    for activation, dtype in itertools.product(elementwise.ACTIVATIONS, (bf16, f32)):
        yield Gated(activation, dtype)
        yield Gated(activation, dtype, aligned=False)
    for activation in elementwise.ACTIVATIONS:
        yield GatedUpdate(activation=activation)
        for R in (32, configs.MAX_RANK):
            yield GatedUpdate(R, activation)
        for R in (16, 32):
            yield GatedUpdate(R, activation, f32)
    for R in (1, 8, 24):
        yield GatedUpdate(R)
        yield GatedUpdate(R, M=1, aligned=False)
    for dtype in (bf16, f32):
        yield Loss(dtype, options=True)
        yield Loss(dtype, aligned=False)
