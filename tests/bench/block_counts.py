"""Counts of each block that `fuse` or the layers make: `python -m tests.bench.block_counts`.

It prints the cases that differ from block_counts.json; `--write` accepts them. Of each direction it
counts bytes read, bytes written, kernels, the peak, `held` and `left`. `left` is what is alive at
the end: of a forward y and what it saved, of a backward y and the gradients. `held` is the sum of
what is alive after each kernel, so that a tensor that lives for one more is seen. Then come the
bytes that the forward saves for the backward, x and parameters among them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_kernels.backends import checked
from lora_kernels.bench import counter
from lora_kernels.bench.blocks import Block, Cell, build_block, build_layer
from lora_kernels.layers import LoRAGatedMLP, LoRAGroup, LoRALinear
from lora_kernels.peft import fuse, modules, swap

FILE = Path(__file__).with_name("block_counts.json")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
K, NS = 128, (256, 64, 192)  # in-features, and out-features of q, k and v
DTYPES = {
    "bf16": Cell("", BF16, BF16),
    "bf16, fp32 adapters": Cell("", BF16, F32),
    "bf16, fp32 adapters, autocast": Cell("", BF16, F32, autocast=True),
    "fp16, fp32 adapters": Cell("", F16, F32),
    "fp32": Cell("", F32, F32),
    "NF4, bf16": Cell("", BF16, BF16, "nf4"),
    "NF4, fp32 adapters": Cell("", BF16, F32, "nf4"),
    "NF4, fp32 adapters, autocast": Cell("", BF16, F32, "nf4", autocast=True),
}
# Parts of the names of frozen parameters, and "x".
FROZEN = ("x", "lora_A", "lora_B", "lora_A and x", "lora_B and x", "lora_ and x")
FROZEN_OF = {
    "qkv": ("q_proj", "v_proj", "q_proj and k_proj and x", "q_proj and v_proj and x"),
    "mlp": ("gate", "up", "down", "lora_A and gate and up and x"),
}


class Case(NamedTuple):
    """A block and a call of it.

    Args:
        block: of BUILD.
        dtypes: of DTYPES.
        M, R: rows of x, and the rank.
        frozen: of FROZEN and FROZEN_OF, or "" for nothing.
        bias: whether the base layers have one, and lora_B of a base that is called.
        cast: `cast_adapters` of `fuse`.
        mode: "" for a training step, "kept" for one whose graph is kept, "no_grad".
        by: "torch" if PyTorch's ops compute act(g) ⊙ u.
        dora, dropout: whether a "layer" is DoRA's, and its dropout probability.
    """

    block: str
    dtypes: str = "bf16"
    M: int = 96
    R: int = 4
    frozen: str = ""
    bias: bool = False
    cast: bool = False
    mode: str = ""
    by: str = ""
    dora: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        default = self._field_defaults
        return " ".join(f"{n}={v}" for n, v in self._asdict().items() if v != default.get(n))


class Called(nn.Linear):
    """A base layer that is called, because it is no `nn.Linear`, with a fresh result."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


modules.FRESH[__name__] = ("Called",)


def _qkv(case: Case) -> nn.Module:
    return _fused(build_block(Block("qkv", K, NS), DTYPES[case.dtypes], case.R), case)


def _mlp(case: Case) -> nn.Module:
    return _fused(build_block(Block("mlp", K, (256, 256)), DTYPES[case.dtypes], case.R), case)


def _fused(module: nn.Module, case: Case) -> nn.Module:
    for layer in module.children():
        if case.bias and hasattr(layer, "base_layer"):
            base: Any = layer.base_layer
            base.bias = nn.Parameter(
                torch.empty(base.out_features, device="meta", dtype=DTYPES[case.dtypes].dtype)
            )
    fuse(nn.Sequential(module), cast_adapters=case.cast)
    return module


def _layer(case: Case) -> nn.Module:
    """A layer with fewer out-features than in-features, so that its largest tensors have x's."""
    cell = DTYPES[case.dtypes]._replace(dora=case.dora)
    layer = build_layer(cell, K, NS[1], case.R, case.dropout)
    with mock.patch.object(swap, "heavier_reason", lambda layer: None):
        return _fused(nn.Sequential(layer), case)


def _called(case: Case) -> nn.Module:
    cell = DTYPES[case.dtypes]
    base: Any = nn.Sequential(Called(K, NS[0], case.bias, device="meta", dtype=cell.dtype))
    settings: Any = {"r": case.R, "lora_alpha": 2 * case.R, "lora_bias": case.bias}
    model: Any = get_peft_model(base, LoraConfig(target_modules=["0"], **settings))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.empty(p.shape, device="meta", dtype=cell.adapter_dtype)
    return fuse(model.train(), cast_adapters=case.cast)


def _layers(case: Case) -> list[LoRALinear]:
    cell = DTYPES[case.dtypes]
    options: Any = {"dtype": cell.dtype, "lora_dtype": cell.adapter_dtype, "bias": case.bias}
    sizes = (K, 256), (K, 256), (256, K)
    return [LoRALinear(*each, case.R, device="meta", **options) for each in sizes]


def _group(case: Case) -> nn.Module:
    cell = DTYPES[case.dtypes]
    options: Any = {"dtype": cell.dtype, "lora_dtype": cell.adapter_dtype, "bias": case.bias}
    members = dict(zip("qkv", NS, strict=True))
    return LoRAGroup(K, members, case.R, targets=("q", "v"), device="meta", **options)


BUILD: dict[str, Callable[[Case], nn.Module]] = {
    "qkv": _qkv,
    "mlp": _mlp,
    "layer": _layer,
    "called": _called,
    "LoRAGatedMLP": lambda case: LoRAGatedMLP(*_layers(case)),
    "LoRAGroup": _group,
}


def cases() -> Iterator[Case]:
    for dtypes in DTYPES:
        yield Case("layer", dtypes, dropout=0.1)
        yield from (Case("layer", dtypes, dora=True, dropout=p) for p in (0.0, 0.1))
    for block in BUILD:
        is_ours = block.startswith("LoRA")
        for dtypes, cell in DTYPES.items():
            if cell.base == "dense" or not (is_ours or block == "called"):
                yield Case(block, dtypes)
        yield Case(block, "bf16, fp32 adapters", M=512, R=64)  # 8 rows for each rank
        yield Case(block, "bf16, fp32 adapters", M=513, R=64)
        yield Case(block, "bf16, fp32 adapters", M=8)
        yield from (Case(block, M=M) for M in (8, 64, 65))
        yield from (Case(block, bias=True, dtypes=dtypes) for dtypes in ("bf16", "fp32"))
        kind = "mlp" if "MLP" in block else block
        yield from (Case(block, frozen=frozen) for frozen in (*FROZEN, *FROZEN_OF.get(kind, ())))
        yield Case(block, mode="kept")
        yield from (Case(block, mode="no_grad", bias=bias) for bias in (False, True))
        if not is_ours:
            yield Case(block, "bf16, fp32 adapters", cast=True)
            yield Case(block, "bf16, fp32 adapters", cast=True, M=8)
        if kind == "mlp":
            yield from (Case(block, by="torch", mode=mode) for mode in ("", "kept", "no_grad"))
    yield Case("qkv", "NF4, bf16", bias=True)
    yield Case("mlp", "NF4, bf16", mode="kept", bias=True)


class _Counter(counter._Counter):
    held = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = len(self._log)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self._log) > before:
            self._poll()
            self.held += sum(self._allocated.values())
        return result

    def count(self, call: Callable[[], Any], found: list[int]) -> Any:
        """Return the result of the call, and append the six numbers to `found`."""
        self.held = 0
        result = self.run(call)
        held, given = self.held, self.traffic()
        self._poll()
        found += [*given[:4], held, sum(self._allocated.values())]  # without FLOPs
        return result


def count(case: Case) -> list[int]:
    """The numbers of the forward, of the backward if there is one, and the bytes that are saved."""
    module, cell = BUILD[case.block](case), DTYPES[case.dtypes]
    parts = case.frozen.split(" and ") if case.frozen else []
    x_needs = "x" not in parts and case.mode != "no_grad"
    for name, p in module.named_parameters():
        if any(part in name for part in parts if part != "x"):
            p.requires_grad_(False)
    wanted = [p for p in module.parameters() if p.requires_grad]

    def new_x() -> Tensor:
        return torch.empty(case.M, K, dtype=cell.dtype, device="meta").requires_grad_(x_needs)

    def call(x: Tensor) -> Any:
        with counter.autocast(cell.dtype) if cell.autocast else contextlib.nullcontext():
            return module(x)

    def step() -> list[int]:
        x = new_x()
        on, numbers = _Counter([]), list[int]()
        forward = functools.partial(call, x)
        with torch.set_grad_enabled(case.mode != "no_grad"):
            y = on.count(forward, numbers)
        ys = [each for each in ([y] if isinstance(y, Tensor) else y) if each.requires_grad]
        dys, leaves = [torch.empty_like(each) for each in ys], [*([x] if x_needs else []), *wanted]
        if ys and leaves:
            keep = case.mode == "kept"
            run = functools.partial(torch.autograd.grad, ys, leaves, dys, retain_graph=keep)
            on.count(run, numbers)
        return numbers

    kernels: Any = contextlib.nullcontext()
    if case.by:
        kernels = mock.patch.object(checked, "kernel_reason", lambda *args: "PyTorch's ops")
    with kernels:
        if (case.block, case.dtypes) not in _called_before:
            _called_before.add((case.block, case.dtypes))
            step()  # fills what the process caches
        with torch.set_grad_enabled(case.mode != "no_grad"):
            return [*step(), _count_saved(lambda: call(new_x()))]


def _count_saved(call: Callable[[], Any]) -> int:
    """Bytes of the distinct tensors that the call saves for its backward."""
    found: dict[Any, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        return found.setdefault((t.untyped_storage()._cdata, t.storage_offset(), t.shape), t)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), counter._NativeDropout():
        call()
    return sum(t.nbytes for t in found.values())


_called_before: set[tuple[str, str]] = set()


def read() -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(FILE.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.block_counts")
    parser.add_argument("--write", action="store_true", help="accept the counts of now")
    args = parser.parse_args()
    kept = read() if FILE.exists() else {}
    found = {str(case): count(case) for case in cases()}
    for name, numbers in found.items():
        if numbers != kept.get(name):
            print(name, kept.get(name), numbers, sep="\n    ")
    if args.write:
        lines = (f"{json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in found.items())
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
