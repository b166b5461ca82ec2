"""`lora-kernels bench --end-to-end`: training steps and tokens of whole models, beside PEFT's.

A row is a model over one kind of base, in one mode:

- "step": forward, backward and AdamW of one batch;
- "step, checkpointed": the same with the activations of each layer computed again, and ours with
  `fuse(model, loss=True)`;
- "token": one token of `generate`, greedy, after a prompt of `PROMPT` tokens, and ours with
  `fuse(model, linears=True)`.

The models are the frozen one, PEFT's and ours. They share their frozen weights and take turns in
one process. The frozen one has no time of a checkpointed step, which would take a minute more each
round. LoRA of rank `RANK` is on all linear layers but the head, with float32 adapters, as PEFT
makes them. Steps over a 16-bit base run under autocast, as Trainer's with `bf16=True`. The first
layer's input needs a gradient in all of them, so that the frozen model computes each dx too.
A named model has random weights, because a time does not depend on them: nothing is downloaded.
Over a GGUF file ours reads its codes, and the others have the decoded weights.

The peak memory is that of a call in a process of its own, over what the process held before the
model was built: weights, activations, gradients and AdamW's state. On a CPU it is resident memory;
on a GPU it is what torch allocated, in the process of the times.

The error is the rms of the difference to PEFT's, relative to PEFT's: of all adapters' gradients in
the first step, or of the prompt's logits. A row whose error is above `LIMITS` has a ✗. `verify`
compares each kernel with float64.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.data_packages import SMOLLM2, folder_of
from ..core.quiet import silence_imports, silence_libraries
from ..core.weights import parameter_bytes, share
from ..oracle.case import dtype_name
from ..oracle.tolerance import rms_error
from . import memory, process_memory, timing
from .results import FROZEN, Facts, Row
from .table import Suite

RANK, PROMPT, TOKENS = 16, 128, 16
# Rounds of steps of a large model, which take 10 s each on two cores, and checkpointed a minute.
LARGE_ROUNDS, LONG_ROUNDS = 3, 2
# Of the relative rms to PEFT's. A gradient has passed about 20 roundings a layer, 640 in 32 layers,
# each of 0.42 u rms (`oracle.tolerance`). Two models that round in another order differ by
# √2 · √640 · 0.42 u = 15 u, which is 0.06 in bfloat16. In float32 a sum of many terms errs by 10 u:
# 1e-5. Doubled gradients of lora_A differ by 0.4 or more.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
BASES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}
GGUF = "gguf"  # a base that is a file's, in float32, in which a CPU is fastest
GGUF_16 = "gguf in bfloat16"
STEP, CHECKPOINTED, TOKEN = "step", "step, checkpointed", "token"
NAMES = (FROZEN, "peft", "ours")
# Their published configurations; both tie the head to the embedding.
SIZES: dict[str, dict[str, int]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Args:
        model: a key of SIZES, the folder of a transformers model, or a GGUF file.
        base: a key of BASES; of a file GGUF or GGUF_16.
        mode: STEP, CHECKPOINTED or TOKEN.
        batch, length: rows of a batch, and tokens of a row.
        one_thread: whether torch has one thread instead of all.
    """

    model: str
    base: str
    mode: str
    batch: int = 1
    length: int = 512
    one_thread: bool = False

    @property
    def dtype(self) -> torch.dtype:
        of_files = {GGUF: torch.float32, GGUF_16: torch.bfloat16}
        return (BASES | of_files)[self.base]


_SMALL, _LARGE = SIZES
_HALF = ("bfloat16", "nf4")
CPU_CELLS = (
    *(Cell(_SMALL, base, mode) for mode in (STEP, TOKEN) for base in BASES),
    *(Cell(_LARGE, base, STEP) for base in _HALF),
    *(Cell(_LARGE, base, CHECKPOINTED, length=2048) for base in _HALF),
    *(Cell(_SMALL, "bfloat16", mode, one_thread=True) for mode in (STEP, TOKEN)),
)
GPU_CELLS = (
    *(Cell(_LARGE, base, mode) for mode in (STEP, TOKEN) for base in _HALF),
    *(Cell(_LARGE, base, STEP, batch=4, length=2048) for base in _HALF),
    *(Cell(_LARGE, base, CHECKPOINTED, batch=4, length=2048) for base in _HALF),
)


def cells(model: str | None, device: str, quick: bool) -> Iterator[Cell]:
    """Yield the cells of a run: of NF4 if bitsandbytes is installed, of the demo's file if it is.

    model: a key of SIZES, whose cells are a part of the table; or a folder, which has a step, a
        checkpointed step and a token over each kind of base; or a GGUF file.
    quick: only a step and a token over bfloat16.
    """
    chosen = GPU_CELLS if device == "cuda" else CPU_CELLS
    if quick:
        base = GGUF if model and model.endswith(".gguf") else "bfloat16"
        chosen = tuple(Cell(model or _SMALL, base, mode) for mode in (STEP, TOKEN))
    elif model in SIZES:
        chosen = tuple(cell for cell in chosen if cell.model == model)
    elif model is not None:
        step = Cell(model, "", STEP)
        modes = step, replace(step, mode=CHECKPOINTED, length=2048), replace(step, mode=TOKEN)
        bases = (GGUF,) if model.endswith(".gguf") else tuple(BASES)
        chosen = tuple(replace(cell, base=base) for base in bases for cell in modes)
    elif device == "cpu":
        package, file = SMOLLM2
        if (folder := folder_of(package)) is not None:
            chosen += tuple(Cell(str(folder / file), GGUF, mode) for mode in (STEP, TOKEN))
    for cell in chosen:
        if cell.base != "nf4" or find_spec("bitsandbytes") is not None:
            yield cell


def load(cell: Cell, device: str) -> Any:
    """Return the frozen causal language model of a cell, in eval mode; a file's is packed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ..peft.quantize import quantize

    auto: Any = AutoModelForCausalLM
    if cell.base in (GGUF, GGUF_16):
        from ..integrations import load_gguf

        base = load_gguf(cell.model, dtype=cell.dtype).to(device)
    elif cell.model in SIZES:
        sizes: Any = SIZES[cell.model]
        config = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=True)
        with torch.device("meta"):
            base = auto.from_config(config, dtype=cell.dtype)
        base.to_empty(device=device).tie_weights()
        base.model.rotary_emb = type(base.model.rotary_emb)(config).to(device)  # not stored
        for p in base.parameters():
            _fill(p.data)
    else:
        base = auto.from_pretrained(cell.model, dtype=cell.dtype, local_files_only=True).to(device)
    if cell.base == "nf4":
        quantize(base, "nf4", cell.dtype, torch.device(device))
    return base.requires_grad_(False).eval()


def _fill(weight: Tensor) -> None:
    """Fill a matrix with a block of noise again and again, which takes less time than to draw it.

    The weights of a norm become 1.
    """
    if weight.dim() == 1:
        weight.fill_(1.0)
        return
    noise = 0.02 * torch.randn(1_000_003, dtype=weight.dtype, device=weight.device)
    for part in weight.view(-1).split(noise.numel()):
        part.copy_(noise[: part.numel()])


def build(cell: Cell, device: str, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """Return the models of these names, which share their frozen weights.

    For a token over 4 bits on a CPU, bitsandbytes' models have weights of their own, which it
    repacks for its fastest kernel. Of a GGUF file ours has the codes.
    """
    from ..peft import fuse
    from ..peft.packed import decode_packed, has_packed
    from ..peft.quantize import linears_4bit, rewrite_codes

    torch.manual_seed(0)
    base = plain = load(cell, device)
    if has_packed(base) and set(names) != {"ours"}:
        plain = decode_packed(share(base) if "ours" in names else base)
    models = {FROZEN: share(plain)} if FROZEN in names else {}
    is_token = cell.mode == TOKEN
    if "peft" in names:
        models["peft"] = _adapted(plain)
    if "ours" in names:
        alike = models.get("peft") if plain is base else None
        ours = _adapted(base) if alike is None else share(alike)
        models["ours"] = fuse(ours, linears=is_token, loss=cell.mode == CHECKPOINTED)
    if is_token and device == "cpu" and linears_4bit(base):
        for name in {FROZEN, "peft"} & models.keys():
            models[name] = rewrite_codes(copy.deepcopy(models[name]), True)
    return models


def _adapted(base: Any) -> Any:
    """Return PEFT's model of the base, with the same adapters in each call."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    peft = get_peft_model(base, config)
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01)
    return peft


class Step:
    """A training step of a model: a call is forward, backward and, with adapters, AdamW.

    The learning rate is 0, so that all steps compute the same. `result` is the adapters' gradients
    of the first step.
    """

    result: list[Tensor] | None = None

    def __init__(self, model: Any, cell: Cell, ids: Tensor) -> None:
        self.model, self.ids, self.dtype = model, ids, cell.dtype
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = None
        if self.trained:
            self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0, fused=True)
        model.train()
        model.enable_input_require_grads()
        if cell.mode == CHECKPOINTED:
            base = getattr(model, "get_base_model", lambda: model)()
            base.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def state_bytes(self) -> int:
        """The bytes of AdamW's state."""
        states = self.optimizer.state.values() if self.optimizer else ()
        return sum(t.nbytes for state in states for t in state.values())

    def make_state(self) -> None:
        """Make AdamW's state, by a step whose gradients are 0."""
        assert self.optimizer is not None
        for p in self.trained:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        autocast: Any = contextlib.nullcontext()
        if self.dtype is not torch.float32:
            autocast = torch.autocast(self.ids.device.type, self.dtype)
        with autocast:
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        if self.result is None:
            self.result = [p.grad.clone() for p in self.trained]
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class Tokens:
    """Greedy generation after a prompt: a call returns the median seconds of a token.

    The first token is not among them, because it is the prompt's. `result` is the logits of the
    prompt.
    """

    state_bytes = 0

    def __init__(self, model: Any, cell: Cell, ids: Tensor) -> None:
        self.model, self.ids = model.eval(), ids
        with torch.no_grad():
            self.result: list[Tensor] = [model(input_ids=ids).logits]

    def __call__(self) -> float:
        clock = timing.TokenClock()
        counts = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
        how: Any = {"do_sample": False, "pad_token_id": 0, "streamer": clock, **counts}
        self.model.generate(input_ids=self.ids, attention_mask=torch.ones_like(self.ids), **how)
        return statistics.median(clock.steps)


def call_of(model: Any, cell: Cell) -> Step | Tokens:
    """Return the call that is timed. A short model takes as many tokens as it has positions."""
    config = model.config
    length = getattr(config, "max_position_embeddings", cell.length)
    length = min(PROMPT, length - TOKENS) if cell.mode == TOKEN else min(cell.length, length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (cell.batch, length), generator=generator)
    return (Tokens if cell.mode == TOKEN else Step)(model, cell, ids.to(model.device))


def measure(cell: Cell, device: str, seconds: float) -> Row:
    """Return the row of a cell, with times, the error, and on a GPU the peaks."""
    models = build(cell, device)
    config = models["peft"].config
    if cell.mode == CHECKPOINTED:
        del models[FROZEN]
    calls: dict[str, Any] = {name: call_of(model, cell) for name, model in models.items()}
    key: dict[str, Any] = {"K": config.hidden_size, "N": config.vocab_size, "R": RANK}
    row = Row(what=f"model {Path(cell.model).name}", mode=cell.mode, **key)
    row.M = 1 if cell.mode == TOKEN else calls["ours"].ids.numel()
    row.dtype = dtype_name(cell.dtype)
    row.quant_type = {"nf4": "nf4", GGUF: "gguf", GGUF_16: "gguf"}.get(cell.base)
    if cell.one_thread:
        row.mode = f"{cell.mode}, one thread"
    with _threads(1 if cell.one_thread else torch.get_num_threads()):
        try:
            clock: Any = {"clock": _of_token} if cell.mode == TOKEN else {}
            rounds = LARGE_ROUNDS if cell.model == _LARGE else timing.FEWEST
            rounds = LONG_ROUNDS if cell.mode == CHECKPOINTED else rounds
            row.seconds = timing.interleave(
                calls, seconds=seconds, min_rounds=rounds, device=device, **clock
            )
            if device == "cuda":
                for name in NAMES[1:]:
                    held = parameter_bytes(models[name]) + calls[name].state_bytes
                    row.peak_bytes[name] = held + memory.peak(calls[name], device)
        except torch.OutOfMemoryError:
            row.misses = {"PEFT's beside ours": "out of memory"}  # other rows may fit
            torch.cuda.empty_cache()
            return row
    got, want = (join(calls[name].result) for name in ("ours", "peft"))
    error = rms_error(got, want)
    row.errors = {"ours": error}
    if not error <= LIMITS[cell.dtype]:  # NaN is not
        row.misses = {"ours": f"{error:.2g} from PEFT's, want at most {LIMITS[cell.dtype]:g}"}
    return row


def _of_token(call: Any, repeat: int) -> tuple[float, float]:
    return call(), 0.0


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Return all elements as one vector of float64."""
    return torch.cat([t.double().flatten() for t in tensors])


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_of(cell: Cell, name: str, threads: int) -> int | None:
    """Return the peak bytes of this process in a call of a model of NAMES, on a CPU.

    They are those above what the process held before. None if the system does not report them.
    """
    silence_imports()
    silence_libraries()
    import peft  # noqa: F401 # what is imported later would count

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    before = process_memory.reset_peak(cpu)
    if before is None:
        return None
    call = call_of(build(cell, "cpu", (name,))[name], cell)
    call.result = []  # keeps no gradients
    if isinstance(call, Step):
        call.make_state()
    process_memory.reset_peak(cpu)
    call()
    return process_memory.peak(cpu) - before


def peaks_of(cell: Cell) -> dict[str, int]:
    """Return the peak of PEFT's model and of ours, each in a new process.

    A process that is killed, for example because memory ran out, has none.
    """
    peaks, spawn = dict[str, int](), multiprocessing.get_context("spawn")
    for name in NAMES[1:]:
        with ProcessPoolExecutor(1, spawn) as pool, contextlib.suppress(BrokenProcessPool):
            peak = pool.submit(peak_of, cell, name, torch.get_num_threads()).result()
            if peak is not None:
                peaks[name] = peak
    return peaks


def rows(args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
    """Yield the row of each cell."""
    silence_libraries()
    for cell in cells(args.model, args.device, args.quick):
        row = measure(cell, args.device, args.seconds)
        if args.device == "cpu" and not cell.one_thread:  # whose memory is that of all threads
            row.peak_bytes = peaks_of(cell)
        yield row


def _head(args: argparse.Namespace, result: Any) -> Iterator[str]:
    if not args.quick and find_spec("bitsandbytes") is None:
        yield "no NF4: bitsandbytes is not installed"


SUITE = Suite(
    kind="model",
    option="end_to_end",
    unused="shapes rows ranks dtypes dropout baseline",
    rows=rows,
    head=_head,
)
