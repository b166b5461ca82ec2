"""`lora-kernels bench --quant nf4`: the layer over a quantized base, others' and a dense one.

Decoding, a forward without gradients, for M rows of x, and a training step for the largest M. Cold
rotates over as many weights as exceed the last-level cache, warm repeats one. Ours is a
`QLoRALinear`; bitsandbytes' layer is under PEFT's; to the dense GEMM, PyTorch's own calls add LoRA:
`F.linear(x, W) + s·B(Ax)`. Beside a format that bitsandbytes lacks are ours over nested NF4, PEFT's
layer over the decoded weight, and PEFT's over the layer of a library that has about the format, if
it is installed. The reference reads the float32 decode, eager the
decoded weight, and for the dense GEMM the weight itself.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import QLoRALinear
from ..oracle import forms, reference, tolerance
from ..oracle.case import kernels
from ..quantization import codebooks
from ..quantization.codebooks import BITSANDBYTES_TYPES
from . import baselines, models, timing
from .baselines import Forward
from .results import DECODED, NESTED_NF4, Facts, Row
from .table import Call, Entry, Suite, Tolerance, timed

SHAPES = ((4096, 4096), (4096, 14336), (576, 1536))  # K, N
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
RANK, SCALING = 16, 2.0


def entries_of(
    K: int, N: int, counts: list[int], dtype: str, quant_type: str, device: str
) -> Iterator[Entry]:
    """Yield an entry for each number of rows; the last has steps too, with a cold cache."""
    torch.manual_seed(0)
    options: Any = {"dtype": getattr(torch, dtype), "device": device}
    A = nn.Parameter(torch.randn(RANK, K).div_(K**0.5).to(**options))
    B = nn.Parameter(torch.randn(N, RANK).div_(RANK**0.5).to(**options))
    count = max(2, min(64, timing.cold_bytes(device) // (N * K // 2)))
    dense = [nn.Linear(K, N, bias=False, **options) for _ in range(min(4, count))]
    for linear in dense:
        nn.init.normal_(linear.weight, std=K**-0.5).requires_grad_(False)
    linears = [dense[i % len(dense)] for i in range(count)]
    ours = [_ours(linear, quant_type, A, B) for linear in linears]
    weight = ours[0].quantized
    decoded = weight.dequantize(options["dtype"])
    decoded_f32 = nf4_f32 = library_weight = weight.dequantize(torch.float32)

    def eager(weight: Tensor, x: Tensor) -> Tensor:
        args = {"lora_A": A, "lora_B": B, "scaling": SCALING}
        return baselines.eager(args)(x, weight, **args)

    layers: dict[str, list[Forward]] = {"ours": [*ours]}
    if device != "cpu":
        layers["ours"] = [partial(_by_kernels, device, layer) for layer in ours]
    if quant_type not in BITSANDBYTES_TYPES:
        nf4 = [_ours(linear, "nf4", A, B) for linear in linears]
        layers[NESTED_NF4] = [*nf4]
        nf4_f32 = nf4[0].quantized.dequantize(torch.float32)
        if find_spec("peft"):
            weights = [layer.quantized.dequantize(options["dtype"]) for layer in ours[: len(dense)]]
            layers[DECODED] = [_peft_of_decoded(weight, A, B) for weight in weights]
            library = library_of(quant_type, device)
            if library is not None:
                of_library = [_peft_of_library(each, quant_type, A, B) for each in linears]
                layers[f"PEFT, {library}"] = [peft for peft, _ in of_library]
                library_weight = of_library[0][1]
    elif device == "cpu" or all(map(find_spec, ("bitsandbytes", "peft"))):
        for mode in ("eval", "train"):
            pefts = (_peft(linear, quant_type, A, B) for linear in linears)
            layers[f"bitsandbytes, {mode}"] = [peft.train(mode == "train") for peft in pefts]
    layers["dense"] = [partial(eager, linear.weight) for linear in dense]
    stream = [layer.weight.view(torch.int64).sum for layer in ours]  # little more is done
    existing = [A, B, *(t for layer in ours for t in (*layer.parameters(), *layer.buffers()))]
    existing += [linear.weight for linear in dense]

    for M in counts:
        x, dy = torch.randn(M, K).to(**options).requires_grad_(), torch.randn(M, N).to(**options)
        calls = {
            name: Call(
                forwards=[partial(forward, x) for forward in forwards],
                leaves=[] if name == "bitsandbytes, eval" else [x, A, B],
                dy=dy,
                existing=existing,
            )
            for name, forwards in layers.items()
        }
        x64, A64, B64 = (t.detach().double() for t in (x, A, B))
        weights_of = {"dense": dense[0].weight, NESTED_NF4: nf4_f32, DECODED: decoded}
        weights_of |= dict.fromkeys(("PEFT, hqq", "PEFT, torchao"), library_weight)
        want = {
            name: reference.lora_linear(
                x64, weights_of.get(name, decoded_f32).detach().double(), A64, B64, SCALING
            )
            for name in layers
        }
        y4 = want["ours"]
        limit = Tolerance(tolerance.rms_error(eager(decoded, x), y4), x.dtype, (K,))
        for name, call in calls.items():
            call.check = partial(limit.check, call.forwards[0], want[name])
        calls["stream"] = Call(forwards=stream)
        modes = [("decoding", "cold"), ("decoding", "warm")]
        yield Entry(
            key=Row(dtype=dtype, quant_type=quant_type, M=M, K=K, N=N, R=RANK),
            calls=calls,
            modes=[*modes, ("step", "cold")] if counts[-1] == M else modes,
            device=device,
        )


def _ours(linear: nn.Linear, quant_type: str, A: nn.Parameter, B: nn.Parameter) -> QLoRALinear:
    if forms.is_form(quant_type):
        weight = forms.build(linear.weight, quant_type)
        layer = QLoRALinear.from_quantized(weight, RANK, SCALING * RANK)
    else:
        layer = QLoRALinear.from_linear(linear, RANK, SCALING * RANK, quant_type=quant_type)
    layer.lora_A, layer.lora_B = A, B
    return layer.eval()


def _peft(linear: nn.Linear, quant_type: str, A: Tensor, B: Tensor) -> Any:
    """PEFT's layer over bitsandbytes', with the shared adapter."""
    layer = baselines.peft_layer(baselines.linear_4bit(linear, quant_type), [RANK], SCALING)
    baselines.set_adapter(layer, A, B)
    return layer


def _peft_of_decoded(weight: Tensor, A: Tensor, B: Tensor) -> Any:
    """PEFT's layer over a dense weight, with the shared adapter."""
    args = {"weight": weight, "lora_A": A, "lora_B": B, "bias": None}
    return baselines.build_layer(args | {"scaling": SCALING, "dropout_p": 0.0})


def library_of(quant_type: str, device: str) -> str | None:
    """Return the library that has about the form, and is installed: hqq or torchao."""
    if not forms.is_form(quant_type) or device != "cpu":
        return None
    name = "hqq" if "shift" in quant_type and quant_type.startswith("int4") else "torchao"
    has_it = name == "hqq" or quant_type.startswith("int8")
    return name if has_it and find_spec(name) else None


def _peft_of_library(linear: nn.Linear, quant_type: str, A: Tensor, B: Tensor) -> Any:
    """Return PEFT's layer over a library's, and the weight that the library decodes."""
    dtype, group = linear.weight.dtype, int(quant_type.split("-")[1])
    if library_of(quant_type, "cpu") == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # type: ignore[import-not-found]

        config = BaseQuantizeConfig(nbits=4, group_size=group, axis=1)
        options: Any = {"compute_dtype": dtype, "device": "cpu", "del_orig": False}
        base = HQQLinear(linear, config, **options)
        weight = base.dequantize()
    else:
        from torchao.quantization import (  # type: ignore[import-not-found]
            Int8WeightOnlyConfig,
            PerGroup,
            quantize_,
        )

        net: Any = nn.Sequential(copy.deepcopy(linear))
        quantize_(net, Int8WeightOnlyConfig(granularity=PerGroup(group)))
        base, weight = net[0], net[0].weight.dequantize()
    layer = baselines.peft_layer(base, [RANK], SCALING)
    baselines.set_adapter(layer, A, B)
    return layer, weight.float()


def format_name(text: str) -> str:
    """Return the name of a format or form; ValueError for another, as argparse wants it.

    >>> format_name("int8-32-half")
    'int8-32-half'
    """
    if text not in codebooks.QUANT_TYPES and not forms.is_name(text):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, want {', '.join(codebooks.QUANT_TYPES)}, or a form: codes "
            f"({', '.join(forms.CODES)}), a block size, 'half' or 'nested', and 'shift', such as "
            "int4-128-half-shift"
        )
    return text


def _by_kernels(device: str, layer: QLoRALinear, x: Tensor) -> Tensor:
    with kernels(device):
        return layer(x)  # type: ignore[no-any-return]


def entries(args: argparse.Namespace, facts: Facts) -> Iterator[Entry]:
    """Yield the layers over a 4-bit base."""
    requested = models.requested_shapes(args) or []
    shapes = list(dict.fromkeys((K, N) for _, K, N in requested)) or SHAPES
    counts = sorted({M for M, _, _ in requested}) or list(ROWS)
    for dtype, (K, N) in itertools.product(args.dtypes, shapes):
        yield from entries_of(K, N, counts, dtype, args.quant, args.device)


SUITE = Suite(kind="4-bit", option="quant", unused="ranks dropout baseline", rows=timed(entries))
