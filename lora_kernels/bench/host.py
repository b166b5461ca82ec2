"""`lora-kernels bench --host`: the host's time on the GPU path, ours beside PEFT's.

On a CPU this is an emulation of the host's part: CPU tensors take the GPU path with eager's ops, so
small that a GEMM takes about as long as its launch. Where Triton compiles, stub drivers take the
launches of its kernels and of bitsandbytes'. A time is the thread's CPU time, torch on one thread.
A driver's time is not in it. With `--device cuda` a time lasts until the launches have returned,
and the GPU's own is beside it.

A row is a layer, q/k/v, a gated MLP or transformers' Llama decoder layer, in one mode:

- "step": forward and backward, with the gradients of x and the adapters;
- "checkpointed": the same under `torch.utils.checkpoint` without reentrance;
- "no_grad": a forward without gradients;
- "one_row": the same, with one row of x.

Ours is `fuse` of a copy of PEFT's module, both in training mode without dropout. In eval mode
bitsandbytes packs 4-bit weights for its CPU kernels, which a GPU does not have. "unsloth" is
Unsloth's sequence of GEMMs (`peers`) called without a module: the floor. A ratio is that of the
minima. A row is measured again if ours takes more than `LIMIT` times PEFT's, and is lost if it does
so again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backends.library import as_on_gpu
from ..choice.choose import backend
from . import blocks, peers, stub_drivers, timing
from .blocks import Block, Cell, build_block
from .results import Facts, Row, environment, peers_table, under_load
from .table import Suite
from .timing import Parts, Timeable, Times

EMULATED = (
    "An emulation on a CPU of the host's part of the GPU path: thread CPU time of tiny CPU "
    "tensors, without a GPU or its driver."
)
STUBBED = "Stub drivers take the launches of Triton's kernels and of bitsandbytes'."
ROWS, RANK = 70, 8
ROUNDS, CALLS = 100, 5  # of a measurement, and calls of each in a round
LIMIT = 1.05  # of PEFT's time
DEVICE_ROUNDS = 9
# Cycles of a GPU that it waits while calls are launched: 10 ms at 2 GHz (estimate).
HELD_CYCLES = 20_000_000
MODES = {"step": ROWS, "checkpointed": ROWS, "no_grad": ROWS, "one_row": 1}
STEPS = ("step", "checkpointed")
DECODER = "decoder"
NAMES = ("layer", "qkv", "mlp", DECODER)
CELLS = (
    Cell("float32", torch.float32, torch.float32),
    *(cell for cell in blocks.CELLS if cell.autocast),
)

Measured = tuple[dict[str, Times], dict[str, Times]]  # the host's times, and a GPU's


def hidden(cell: Cell) -> int:
    """Return the hidden size. A row of a 4-bit weight is a block of 64, as in models."""
    return 64 if cell.base == "nf4" else 32


def block_of(name: str, K: int) -> Block:
    """Return the sizes of a block of NAMES; a decoder layer's are those of its q, k and v.

    >>> block_of("qkv", 32).Ns
    (32, 16, 16)
    """
    return Block(name, K, {"layer": (K,), "mlp": (2 * K, 2 * K)}.get(name, (K, K // 2, K // 2)))


def decoder_layer(cell: Cell, K: int, device: str) -> nn.Module:
    """Build transformers' Llama decoder layer with PEFT's layers, frozen except for the adapters.

    x [1, M, K], with M of MODES -> y. The position embeddings are there before, as in a model.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    sizes: Any = {"hidden_size": K, "intermediate_size": 2 * K}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    config._attn_implementation = "sdpa"
    layer: Any = cast(Any, LlamaDecoderLayer)(config, 0).to(device, cell.dtype)
    layer.requires_grad_(False)
    for parent in (layer.self_attn, layer.mlp):
        blocks.adapt_linears(parent, cell, RANK, device)
    return cast(nn.Module, layer)


def positions(cell: Cell, M: int, K: int, device: str) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of M positions for `decoder_layer`."""
    angles = torch.outer(torch.arange(M), 1e4 ** -torch.linspace(0, 1, K // 4)).repeat(1, 2)[None]
    return angles.cos().to(device, cell.dtype), angles.sin().to(device, cell.dtype)


def call_of(
    forward: Callable[[Tensor], Any], x: Tensor, adapters: Sequence[Tensor], mode: str, cell: Cell
) -> Timeable:
    """Return the call that is timed.

    adapters: their gradients and that of x are what a step computes.
    """
    autocast: Any = contextlib.nullcontext()
    if cell.autocast:
        autocast = torch.autocast(x.device.type, cell.dtype)

    def run_forward() -> Any:
        with autocast:
            if mode == "checkpointed":
                return checkpoint(forward, x, use_reentrant=False)
            return forward(x)

    if mode not in STEPS:
        return run_forward
    y = run_forward()
    generator = torch.Generator(x.device).manual_seed(0)  # all calls have the same dy
    dy = [
        torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=generator)
        for t in ([y] if isinstance(y, Tensor) else y)
    ]
    leaves = [x, *adapters]
    return lambda: torch.autograd.grad(run_forward(), leaves, dy)


def block_rows(name: str, cell: Cell, device: str) -> Iterator[Row]:
    """Yield the rows of a block and a kind of layer, one a mode."""
    from ..peft import fuse

    K = hidden(cell)
    block = block_of(name, K)
    is_decoder = name == DECODER
    peft = decoder_layer(cell, K, device) if is_decoder else build_block(block, cell, RANK, device)
    for parameter_name, parameter in peft.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=RANK**-0.5)
    modules: dict[str, Any] = {"ours": fuse(nn.Sequential(copy.deepcopy(peft)))[0], "peft": peft}
    trained = {n: [p for p in m.parameters() if p.requires_grad] for n, m in modules.items()}
    if not is_decoder:
        modules["unsloth"] = peers.fused(peers.UNSLOTH, name, peers.projections_of(peft))
        trained["unsloth"] = trained["peft"]
    for mode, M in MODES.items():
        x = torch.randn(*[1] * is_decoder, M, K, dtype=cell.dtype, device=device)
        x.requires_grad_(mode in STEPS)
        options: Any = {}
        if is_decoder:
            options["position_embeddings"] = positions(cell, M, K, device)
        with torch.set_grad_enabled(mode in STEPS):
            calls = {
                n: call_of(functools.partial(m, **options), x, trained[n], mode, cell)
                for n, m in modules.items()
            }
            key = Row(what=f"host {name}", dtype=cell.name, M=M, K=K, R=RANK, mode=mode)
            key.N = K if is_decoder else sum(block.Ns)
            row = measured(key, functools.partial(measure, calls, device))
        yield row


def measure(calls: dict[str, Timeable], device: str) -> Measured:
    """Time the calls in turns: the host, and a GPU if there is one."""
    on_gpu = device == "cuda"
    timed = functools.partial(timing.interleave, calls, seconds=math.inf)
    clock = _until_launched if on_gpu else _on_host
    host_times = timed(max_rounds=ROUNDS, repeat=CALLS, clock=clock)
    return host_times, timed(max_rounds=DEVICE_ROUNDS, clock=_on_device) if on_gpu else {}


def measured(key: Row, measure: Callable[[], Measured]) -> Row:
    """Return the row with its times; again measured, with the second, if ours is above LIMIT."""
    ratios = list[float]()
    while len(ratios) < 2 and (not ratios or ratios[0] > LIMIT):
        seconds, device_seconds = measure()
        ratios.append(seconds["ours"].minimum / seconds["peft"].minimum)
    text = " and ".join(f"{ratio:.3f}" for ratio in ratios)
    lost = {"ours": f"{text} times PEFT's, want at most {LIMIT}"} if min(ratios) > LIMIT else {}
    times: dict[str, Any] = {"seconds": seconds, "device_seconds": device_seconds}
    return replace(key, misses=lost, judged=["ours"], **times)


def _on_host(call: Timeable | Parts, repeat: int) -> tuple[float, float]:
    """Seconds that this thread computed, in which a CPU's backward runs too."""
    start = time.thread_time()
    for _ in range(repeat):
        call()
    return time.thread_time() - start, 0.0


def _until_launched(call: Timeable | Parts, repeat: int) -> tuple[float, float]:
    """Seconds until the calls have returned; a GPU's backward runs in a thread of its own."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return time.perf_counter() - start, 0.0


def _on_device(call: Timeable | Parts, repeat: int) -> tuple[float, float]:
    """Seconds that the GPU computes, which starts once all is launched."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(HELD_CYCLES)
    begin.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3, 0.0


@contextlib.contextmanager
def emulated(device: str) -> Iterator[None]:
    """Let CPU tensors take the GPU path, torch on one thread; a GPU's need nothing."""
    if device != "cpu":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with as_on_gpu(), backend("eager"):
            yield
    finally:
        torch.set_num_threads(threads)


def _has_stubs(device: str) -> bool:
    return device == "cpu" and stub_drivers.unavailable_reason() is None


def _stubbed(device: str) -> AbstractContextManager[Any]:
    return stub_drivers.stub_drivers() if _has_stubs(device) else contextlib.nullcontext()


def _measures(device: str) -> str:
    """Return what is timed on a CPU, in words."""
    return f"{EMULATED} {STUBBED}" if _has_stubs(device) else EMULATED


def cells() -> Iterator[Cell]:
    """Yield the kinds of layers, those of NF4 if bitsandbytes is installed."""
    for cell in CELLS:
        if cell.base != "nf4" or find_spec("bitsandbytes") is not None:
            yield cell


def rows(args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
    """Yield the rows of each block and kind of layer."""
    with emulated(args.device), _stubbed(args.device):
        for name, cell in itertools.product(NAMES, cells()):
            yield from block_rows(name, cell, args.device)


def provenance(args: argparse.Namespace) -> Facts:
    """Return the machine, the versions and what was timed."""
    facts = environment(args.device)
    if args.device == "cpu":
        facts |= {"backend": "eager", "threads": 1, "measures": _measures(args.device)}
    return facts


def summary(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each peer, and the numbers of rows that are lost or under load."""
    yield "ours over each peer, minima of the same row; below 1 ours is faster:"
    yield peers_table(rows)
    if lost := sum(bool(row.misses) for row in rows):
        yield f"{lost} of {len(rows)} rows take more than {LIMIT} times PEFT's time, twice"
    yield from under_load(rows)


def _head(args: argparse.Namespace, result: Any) -> Iterator[str]:
    if args.device == "cpu":
        yield _measures(args.device)


SUITE = Suite(
    kind="host",
    option="host",
    unused="shapes model rows ranks quick dtypes dropout seconds baseline",
    rows=rows,
    provenance=provenance,
    head=_head,
    summary=summary,
)
