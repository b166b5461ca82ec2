"""The calls that are compiled: production's own launch functions on tensors without memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.backends.triton import (
    COOPERATIVE,
    FUSED,
    LIBRARY,
    TWO_PASS,
    codec,
    configs,
    equation,
    experts,
)
from lora_kernels.core.call import (
    ExpertsNeeds,
    ExpertsOperands,
    ExpertsSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from lora_kernels.core.packed4bit import Packed4bit

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Call:
    """One `lora_linear`, or its backward, at a size where `configs` decides something else."""

    M: int
    dtype: torch.dtype = bf16
    adapter: torch.dtype = bf16
    R: int = 16
    strategy: str = TWO_PASS
    quant: str = ""  # "", "whole" blocks in whole words, or "odd" rows
    backward: bool = False
    options: bool = False  # gate, column scale, bias, dropout, z kept
    odd: bool = False  # K and N odd, so that nothing is aligned
    N: int = 4096

    def __str__(self) -> str:
        names = [f"M{self.M}", f"R{self.R}", str(self.dtype).removeprefix("torch.")]
        names += [f"N{self.N}"] if self.N != 4096 else []
        names += [f"A:{self.adapter}".replace("torch.", "")] if self.adapter != self.dtype else []
        names += [self.strategy.split()[0], "backward" if self.backward else "forward"]
        names += [f"codes:{self.quant}"] if self.quant else []
        names += [name for name in ("options", "odd") if getattr(self, name)]
        return " ".join(names)

    @property
    def aligned(self) -> bool:
        return not self.odd and self.quant != "odd"

    def run(self) -> None:
        odd = self.odd or self.quant == "odd"
        M, N, K, R = self.M, self.N - odd, 4096 - odd, self.R
        x, A, B = meta((M, K), self.dtype), meta((R, K), self.adapter), meta((N, R), self.adapter)
        weight = codes(N, K) if self.quant else meta((N, K), self.dtype)
        gate = meta((R,), f32) if self.options else None
        scale = meta((N,), f32) if self.options else None
        bias = meta((N,), self.dtype) if self.options else None
        p, rng = (0.1, meta((2,), torch.int64)) if self.options else (0.0, None)
        if not self.backward:
            operands = Operands(x, weight, A, B, gate, scale, bias, rng)
            spec = Spec(2.0, p, self.dtype, self.dtype, self.options)
            equation.lora_linear(operands, spec, self.strategy)
            return
        dy, z = meta((M, N), self.dtype), meta((M, N), self.dtype)
        equation.lora_linear_backward(
            dy,
            Operands(x, weight, A, B, gate, scale, None, rng),
            Saved(meta((M, R), f32), z if self.options else None),
            Spec(2.0, p, self.dtype, self.dtype),
            Needs(True, True, True, self.options, self.options, self.options),
            self.strategy,
        )


@dataclass(frozen=True)
class Experts:
    """One `lora_experts`, or its backward, of M rows and E experts."""

    M: int
    E: int = 8
    dtype: torch.dtype = bf16
    adapter: torch.dtype = bf16
    R: int = 16
    quant: str = ""
    backward: bool = False
    dropout: bool = False
    transposed: bool = False
    odd: bool = False

    def __str__(self) -> str:
        names = [f"experts M{self.M} E{self.E} R{self.R}", str(self.dtype).removeprefix("torch.")]
        names += [f"A:{self.adapter}".replace("torch.", "")] if self.adapter != self.dtype else []
        names += ["backward" if self.backward else "forward"]
        names += [f"codes:{self.quant}"] if self.quant else []
        flags = ("dropout", "transposed", "odd")
        return " ".join(names + [name for name in flags if getattr(self, name)])

    aligned = Call.aligned

    def run(self) -> None:
        (E, M, R), N = (self.E, self.M, self.R), 4096 if self.aligned else 4095
        x, y = meta((M, N), self.dtype), meta((M, N), self.dtype)
        A, B = meta((E, R, N), self.adapter), meta((E, N, R), self.adapter)
        weight = codes(E * N, N) if self.quant else meta((E, N, N), self.dtype)
        if isinstance(weight, Tensor) and self.transposed:
            weight = weight.mT
        p, rng = (0.1, meta((2,), torch.int64)) if self.dropout else (0.0, None)
        bias = None if self.backward else meta((E, N), self.dtype)
        operands = ExpertsOperands(x, weight, A, B, meta((E,), torch.int64), bias, rng)
        spec = ExpertsSpec(2.0, p, self.dtype, self.dtype, self.transposed)
        if not self.backward:
            experts.lora_experts(operands, spec, TWO_PASS)
            return
        needs = ExpertsNeeds(True, True, True, True)
        saved = Saved(meta((M, R), f32))
        experts.lora_experts_backward(y, operands, saved, spec, needs, TWO_PASS)


@dataclass(frozen=True)
class Norm:
    """One `dora_norm`."""

    dtype: torch.dtype = bf16
    adapter: torch.dtype = bf16
    R: int = 16
    quant: str = ""
    gate: bool = False
    odd: bool = False

    def __str__(self) -> str:
        names = [f"norm R{self.R}", str(self.dtype).removeprefix("torch.")]
        names += [f"A:{self.adapter}".replace("torch.", "")] if self.adapter != self.dtype else []
        names += [f"codes:{self.quant}"] if self.quant else []
        return " ".join(names + [name for name in ("gate", "odd") if getattr(self, name)])

    aligned = Call.aligned

    def run(self) -> None:
        N = K = 4096 if self.aligned else 4095
        weight = codes(N, K) if self.quant else meta((N, K), self.dtype)
        A, B = meta((self.R, K), self.adapter), meta((N, self.R), self.adapter)
        equation.dora_norm(weight, A, B, 2.0, meta((self.R,), f32) if self.gate else None)


@dataclass(frozen=True)
class Quantize:
    """One `quantize_4bit`."""

    dtype: torch.dtype = bf16
    blocksize: int = 64
    aligned: bool = True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"quantize {dtype} blocks of {self.blocksize}" + ("" if self.aligned else " odd")

    def run(self) -> None:
        N = 4096 if self.aligned else 4095
        thresholds, order = meta((15,), f32), meta((16,), torch.uint8)
        codec.quantize(meta((N, N), self.dtype), thresholds, order, self.blocksize)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def codes(N: int, K: int) -> Packed4bit:
    blocks = -(-N * K // 64)
    packed, absmax = (meta((n,), torch.uint8) for n in (-(-N * K // 2), blocks))
    sizes = (16, -(-blocks // 256), 256, 1)  # code, nested_absmax, nested_code, offset
    return Packed4bit(packed, absmax, *(meta((n,), f32) for n in sizes), 64, 256, "nf4")


# One config a kernel and target.
SLICE: list[Call | Experts | Norm | Quantize] = [
    Call(4096, strategy=FUSED),
    Call(1024, quant="whole"),
    Call(16, quant="whole"),
    Call(16, quant="whole", strategy=COOPERATIVE),
    Call(16, strategy=COOPERATIVE, N=14336),  # Llama-3-8B's: more programs than multiprocessors
    Call(4096, f32, f32),
    Call(4096, backward=True, options=True),
    Call(4096, strategy=LIBRARY, quant="whole"),
    Experts(8192),
    Experts(64, 64, quant="whole"),
    Experts(8192, backward=True, dropout=True),
    Norm(),
    Norm(quant="whole"),
    Quantize(),
]


def every_call() -> Iterator[Call | Experts | Norm | Quantize]:
    """Every branch of `configs`, every format, with options and without, aligned and odd."""
    yield from SLICE
    for M, dtype in itertools.product((1, 64, 256, 4096), (bf16, f32)):
        for strategy, backward in itertools.product((FUSED, TWO_PASS, LIBRARY), (False, True)):
            for quant in ("", "whole"):
                yield Call(M, dtype, dtype, 16, strategy, quant, backward)
    for dtype, quant, backward in itertools.product((bf16, f32), ("", "whole"), (False, True)):
        yield Call(16, dtype, dtype, 16, COOPERATIVE, quant, backward)
    for R in (64, 256):
        for strategy in (TWO_PASS, FUSED) if R <= configs.MAX_FUSED_RANK else (TWO_PASS,):
            yield Call(4096, R=R, strategy=strategy)
            yield Call(4096, R=R, strategy=strategy, backward=True)
    for strategy, quant in itertools.product((FUSED, TWO_PASS, LIBRARY), ("", "odd")):
        for backward in (False, True):
            yield Call(256, bf16, f32, 16, strategy, quant, backward, options=True)
            yield Call(256, f16, f16, 5, strategy, quant, backward, odd=True)
            yield Call(4096, bf16, bf16, 32, strategy, quant, backward, options=True)
    for M, backward in itertools.product((64, 512, 8192), (False, True)):
        yield Experts(M, backward=backward, transposed=True)
        yield Experts(M, dtype=f32, adapter=f32, backward=backward)
        for transposed in (False, True):
            yield Experts(M, quant="whole", backward=backward, transposed=transposed)
        yield Experts(M, 5, f16, f16, 5, "odd", backward, dropout=True)
    for backward in (False, True):
        yield Experts(8192, 8, bf16, f32, 64, "", backward, dropout=True)
        yield Experts(8192, 512, bf16, f32, 256, "", backward, dropout=True)
    for R, gate in itertools.product((5, 64, 256), (False, True)):
        for dtype, adapter in ((bf16, bf16), (bf16, f32), (f16, f16), (f32, f32)):
            yield Norm(dtype, adapter, R, gate=gate)
    for quant in ("whole", "odd"):
        yield Norm(bf16, f32, 16, quant, gate=True)
    yield Norm(odd=True)
    for dtype, blocksize in itertools.product((f32, bf16, f16), (32, 64, 4096)):
        yield Quantize(dtype, blocksize)
    yield Quantize(aligned=False)
