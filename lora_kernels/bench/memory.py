"""`lora-kernels bench --memory`: bytes that a layer holds from its forward to its backward.

`torch.autograd.graph.saved_tensors_hooks` counts them, each storage once and whole, without those
of parameters and buffers. Ours is PEFT's layer after `fuse`, the peer the same layer before, in
training mode with PEFT's float32 adapters. The minimum is

    x [M, K] + P [M, R] in float32 + 16 bytes of dropout state + z [M, N] where c trains

with z in x's dtype. DoRA and AdaLoRA, whose c and g are PyTorch's expressions of their parameters,
also hold a few vectors of N or R elements: 'over' in the table is the excess over the minimum.
SmolLM2-135M, with random weights, shows a whole step. The figures are counted on a CPU. They depend
on versions and not on the machine, except that on a GPU PyTorch's dropout keeps a smaller mask.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..oracle.case import dtype_name
from . import baselines
from .results import Facts, Row, Suite

SIZES = (512, 2048, 2048)  # M, K, N
RANK, DROPOUT = 16, 0.1
VARIANTS: dict[str, dict[str, Any]] = {  # options of `peft_layer`
    "plain": {},
    "dropout": {"lora_dropout": DROPOUT},
    "DoRA": {"use_dora": True},
    "gate": {"adalora": True},  # AdaLoRA's, whose E trains
}
DTYPES = (torch.float32, torch.bfloat16)
TOKENS = (2, 64)  # batch and length of a Llama's step
SMOLLM2 = {  # SmolLM2-135M
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def held(
    call: Callable[[], object], module: nn.Module | None = None, there: Iterable[Tensor] = ()
) -> dict[str, int]:
    """Return the bytes that `call` holds for its backward, by "[shape] dtype".

    The parameters and buffers of the module do not count, nor do the tensors in `there`.

    >>> x = torch.ones(4, 8, requires_grad=True)
    >>> held(lambda: (x * x).exp())  # x, and the result of exp
    {'[4, 8] float32': 256}
    """
    if module is not None:
        there = [*there, *module.parameters(), *module.buffers()]
    tensors: dict[str, int] = {}
    for t in saved(call, there).values():
        name = f"{list(t.shape)} {dtype_name(t.dtype)}"
        tensors[name] = tensors.get(name, 0) + t.untyped_storage().nbytes()
    return dict(sorted(tensors.items(), key=lambda item: -item[1]))


def saved(call: Callable[[], object], there: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return a tensor of each storage that autograd saves, by address, without those in `there`.

    The graph must be alive at the end, so `call` returns its output. Tensors that a Function keeps
    as attributes of its context do not count; this package's Functions keep none.
    """
    known, kept = set(map(_address, there)), dict[int, Tensor]()

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().nbytes() and _address(t) not in known:
            kept.setdefault(_address(t), t)  # alive, so that no other takes its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    del result
    return kept


def peak(call: Callable[[], object], device: str = "cpu") -> int:
    """Return the peak bytes of tensors during `call`, without those from before it.

    On a CPU, PyTorch's profiler counts; it does not see a library's own allocations.

    >>> a = torch.ones(1000)
    >>> peak(lambda: a + (a + 1))  # two results alive
    8000
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with (
        _silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        result = call()
    del result
    found = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]"]
    # Sorted by time alone, a stable sort keeps the order of simultaneous changes.
    totals = itertools.accumulate(size for _, size in sorted(changes, key=lambda c: c[0]))
    return max(totals, default=0)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence stderr, to which torch 2.15's profiler writes two lines at any KINETO_LOG_LEVEL."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def minimum(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, *, dropout: bool = False, z: bool = False
) -> int:
    """Return the bytes of x, P in float32, the dropout state, and z if the column scale trains.

    >>> minimum(512, 2048, 2048, 16, torch.float32, dropout=True) == 4 * 512 * (2048 + 16) + 16
    True
    """
    return M * K * dtype.itemsize + 4 * M * R + 16 * dropout + M * N * dtype.itemsize * z


def stock(variant: str, dtype: torch.dtype, sizes: tuple[int, int, int], R: int) -> nn.Module:
    """Build PEFT's layer of one of VARIANTS over a linear of that dtype, in training mode."""
    base, options = nn.Linear(*sizes[1:], bias=False, dtype=dtype), VARIANTS[variant]
    layer: nn.Module = baselines.peft_layer(base, [R], adapter_dtype=torch.float32, **options)
    return layer


def layer_row(
    variant: str, dtype: torch.dtype, sizes: tuple[int, int, int] = SIZES, R: int = RANK
) -> Row:
    """Count the bytes of ours and of PEFT's layer. sizes: M, K, N."""
    from ..peft import fuse

    theirs = stock(variant, dtype, sizes, R)
    layers = {"ours": fuse(nn.Sequential(copy.deepcopy(theirs)))[0], "peft": theirs}
    M, K, N = sizes
    x = torch.randn(M, K).to(dtype).requires_grad_()
    row = Row(what=variant, dtype=dtype_name(dtype), M=M, K=K, N=N, R=R)
    row.minimum = minimum(M, K, N, R, dtype, dropout=variant == "dropout", z=variant == "DoRA")
    row.tensors = {name: held(partial(layer, x), layer) for name, layer in layers.items()}
    row.bytes = {name: sum(each.values()) for name, each in row.tensors.items()}
    return row


def step_row(dtype: torch.dtype, sizes: Mapping[str, Any] = SMOLLM2) -> Row:
    """Count the bytes that a Llama with LoRA on all linears holds for its backward.

    The minimum is the sum of three: what the frozen model holds for the gradients of its
    activations; the other inputs of its linear layers (those of q, k and v are one tensor); P in
    float32 and the dropout state of each layer.

    sizes: of transformers' LlamaConfig; the weights are random.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..peft import fuse

    torch.manual_seed(0)
    config: Any = LlamaConfig(**sizes, tie_word_embeddings=True)
    config._attn_implementation = "eager"
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=DROPOUT, target_modules="all-linear"
    )
    llama: Any = LlamaForCausalLM(config)
    llama.to(dtype)
    ids = torch.randint(config.vocab_size, TOKENS)
    what = "SmolLM2's step" if sizes is SMOLLM2 else "Llama's step"
    K = config.hidden_size
    row = Row(what=what, dtype=dtype_name(dtype), M=ids.numel(), K=K, N=K, R=RANK)
    row.minimum = _least(llama, ids)
    model: Any = get_peft_model(llama, lora).train()
    forward = partial(model, input_ids=ids, labels=ids)
    peft = sum(held(forward, model).values())
    fuse(model)
    row.bytes = {"ours": sum(held(forward, model).values()), "peft": peft}
    return row


def _least(llama: Any, ids: Tensor) -> int:
    """Return the minimum of `step_row`, from a model without adapters."""
    llama.requires_grad_(False)
    inputs: dict[int, Tensor] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        inputs.setdefault(_address(args[0]), args[0])
        if not y.requires_grad:  # gradients begin where the first adapters are
            y.requires_grad_()

    layers = [m for m in llama.model.modules() if isinstance(m, nn.Linear)]
    handles = [layer.register_forward_hook(look) for layer in layers]
    there = [*llama.parameters(), *llama.buffers()]
    kept = saved(partial(llama, input_ids=ids, labels=ids), there)
    for handle in handles:
        handle.remove()
    adapters = len(layers) * (4 * ids.numel() * RANK + 16)
    return adapters + sum(t.untyped_storage().nbytes() for t in (kept | inputs).values())


class Memory(Suite):
    """Bytes held for the backward."""

    kind, option = "memory", "memory"
    unused = "device shapes model rows ranks quick dtypes dropout seconds baseline"
    libraries = ("torch", "peft", "transformers")

    def rows(self, args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
        """Yield layers, and steps if transformers is installed."""
        for dtype, variant in itertools.product(DTYPES, VARIANTS):
            yield layer_row(variant, dtype)
        if find_spec("transformers") is not None:
            yield from map(step_row, DTYPES)

    def line(self, row: Row) -> str:
        ours, peft, least = row.bytes["ours"], row.bytes["peft"], row.minimum or 0
        return (
            f"{row.identity}: ours {ours:,} bytes, PEFT's {peft:,} ({peft / ours:.2f} times ours), "
            f"minimum {least:,}, over {ours - least:,}"
        )
