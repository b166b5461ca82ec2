"""Which rank is enough: the same training for each, and AdaLoRA's allocation beside them."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..peft import fuse
from . import UsageError
from .model import features, linear_layers, share
from .presets import Preset, add_lora_layers, chosen_layers, find_preset
from .trainer import LoRATrainer, training_arguments

RANKS = (4, 8, 16, 32, 64)
WARMUP = 0.05  # of the steps
CAVEAT = (
    "efficiency divides by the parameters, so it favours small ranks: the score seldom doubles "
    "where they do. Choose by the score, and by efficiency between equals"
)


@dataclass(frozen=True)
class RankRow:
    """One training. score: higher is better; loss: held out, nats per token; efficiency: score per
    million adapter parameters; seconds: of the training."""

    rank: int
    score: float
    loss: float
    parameters: int
    seconds: float

    @property
    def efficiency(self) -> float:
        return self.score / self.parameters * 1e6


@dataclass(frozen=True)
class RankSearch:
    """What `find_optimal_rank` found; `str()` is a table.

    rows: one a rank. base: the model's own score, without an adapter. adalora: the row of AdaLoRA,
    with its mean rank, where it was trained, and allocation: the ranks that it left each layer.
    """

    rows: list[RankRow]
    base: float
    adalora: RankRow | None = None
    allocation: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> RankRow:
        """The highest score, of equals the smallest rank."""
        return max(self.rows, key=lambda row: (row.score, -row.rank))

    @property
    def most_efficient(self) -> RankRow:
        return max(self.rows, key=lambda row: row.efficiency)

    def __str__(self) -> str:
        head = ("rank", "score", "loss", "parameters", "seconds", "score / 10⁶ parameters", "")
        table: list[tuple[str, ...]] = [head]
        for row in self.rows:
            marks = ["best score"] * (row is self.best)
            marks += ["most efficient"] * (row is self.most_efficient)
            table.append((str(row.rank), *_cells(row), ", ".join(marks)))
        if self.adalora:
            table.append((f"{self.adalora.rank} (AdaLoRA)", *_cells(self.adalora), ""))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.rjust, row[:-1], widths)) + f"  {row[-1]}" for row in table]
        lines = [line.rstrip() for line in lines] + [f"without an adapter: {self.base:.4f}"]
        if self.allocation:
            lines.append(f"AdaLoRA left {_by_kind(self.allocation)}")
        return "\n".join([*lines, CAVEAT])

    def as_dict(self) -> dict[str, Any]:
        """For json: rows with their efficiency, marks, allocation."""

        def row(r: RankRow) -> dict[str, Any]:
            return dataclasses.asdict(r) | {"efficiency": r.efficiency}

        return {
            "rows": [row(r) for r in self.rows],
            "base": self.base,
            "best": self.best.rank,
            "most_efficient": self.most_efficient.rank,
            "adalora": row(self.adalora) if self.adalora else None,
            "allocation": dict(self.allocation),
            "caveat": CAVEAT,
        }


def _cells(row: RankRow) -> tuple[str, ...]:
    return (
        f"{row.score:.4f}",
        f"{row.loss:.4f}",
        f"{row.parameters:,}",
        f"{row.seconds:.1f}",
        f"{row.efficiency:.4f}",
    )


def _by_kind(allocation: Mapping[str, int]) -> str:
    """The mean rank of the layers of each name.

    >>> _by_kind({"0.q_proj": 2, "1.q_proj": 4, "0.up_proj": 1})
    'q_proj 3.0 (2 to 4), up_proj 1.0 (1 to 1)'
    """
    kinds: dict[str, list[int]] = {}
    for name, rank in allocation.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(rank)
    return ", ".join(
        f"{kind} {sum(r) / len(r):.1f} ({min(r)} to {max(r)})" for kind, r in kinds.items()
    )


def find_optimal_rank(
    model: Any,
    train: Any,
    val: Any,
    ranks: Sequence[int] = RANKS,
    *,
    preset: str | Preset = "chat",
    targets: str | Sequence[str] | None = None,
    steps: int = 100,
    seed: int = 0,
    adalora: bool = True,
    score: Callable[[Any, float], float] | None = None,
    out: str | Path | None = None,
    tokenizer: Any = None,
    on_rank: Callable[[RankRow], None] = lambda row: None,
    **training: Any,
) -> RankSearch:
    """Train an adapter of each rank on the same data, in the same order, from the same seed.

    alpha / rank is the preset's for each, so that the adapters' scale is one. Each is trained on a
    copy that shares the model's weights; the model itself is left as it was, bit for bit.

    Args:
        model: transformers' causal language model, dense or 4-bit, without adapters.
        train, val: `ChatData`.
        ranks: different ones, each at least 1.
        preset, targets: as `add_lora_layers`'; the preset's rank is not used.
        steps: optimizer steps for each rank.
        adalora: train PEFT's AdaLoRA too, which starts from 1.5 times the middle rank and takes
            ranks from layers until that is their mean; needs at least 10 steps.
        score: (PEFT model, held-out loss) -> a number, higher is better. None: exp(−loss), the
            geometric mean of the right tokens' probabilities.
        out: folder of metrics.jsonl and curves.png, one a rank; None keeps none.
        tokenizer: whose padding token is used.
        on_rank: gets each row as it is done.
        training: settings of `training_arguments`; warmup is 0.05 if not given.

    Raises UsageError, naming the argument, before anything is trained.

    >>> from lora_kernels.finetune.rank import find_optimal_rank
    >>> find_optimal_rank(nn.Linear(2, 2), [], [], ranks=(4, 4))
    Traceback (most recent call last):
    lora_kernels.finetune.UsageError: ranks: got (4, 4), want different ones, each at least 1
    """
    ranks = tuple(ranks)
    if not ranks or len(set(ranks)) < len(ranks) or min(ranks) < 1:
        raise UsageError(f"ranks: got {ranks}, want different ones, each at least 1")
    if steps < (least := 10 if adalora else 1):
        raise UsageError(f"steps: got {steps}, want at least {least}")
    if isinstance(model, PeftModel):
        raise UsageError("model: got a PEFT model, want the base: model.get_base_model()")
    for name, data in (("train", train), ("val", val)):
        if len(data) == 0:
            raise UsageError(f"{name}: got no row, want at least one")
    chosen = find_preset(preset)
    alpha = chosen.alpha / chosen.rank
    cpu = next(model.parameters()).device.type == "cpu"
    training = {"cpu": cpu, "warmup": WARMUP} | training
    training |= {"steps": steps, "seed": seed, "save_strategy": "no"}

    with left_alone(model), tempfile.TemporaryDirectory() as unnamed:
        folder = Path(unnamed if out is None else out)

        def done(name: str, peft_model: Any, rank: int, callbacks: Sequence[Any] = ()) -> RankRow:
            args = training_arguments(folder / name, **training)
            trainer = LoRATrainer(
                peft_model, args, train_dataset=train, eval_dataset=val,
                processing_class=tokenizer, callbacks=callbacks,
            )  # fmt: skip
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            with without_penalty(peft_model):
                loss = trainer.evaluate()["eval_loss"]
            if not math.isfinite(loss):
                raise UsageError(f"{name}: the held-out loss is {loss}; give a lower lr")
            count = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
            return RankRow(rank, value(peft_model, loss), loss, count, seconds)

        def value(peft_model: Any, loss: float) -> float:
            return math.exp(-loss) if score is None else float(score(peft_model, loss))

        def adapted(rank: int) -> Any:
            return add_lora_layers(
                share(model, trainable=True), preset, rank=rank, alpha=alpha * rank,
                targets=targets, seed=seed,
            )  # fmt: skip

        rows = []
        for rank in ranks:
            rows.append(done(f"rank-{rank}", adapted(rank), rank))
            on_rank(rows[-1])

        # B = 0 in a new adapter: the model's own loss, by the same trainer.
        new = adapted(1)
        args = training_arguments(folder / "base", **training)
        before = LoRATrainer(
            new, args, train_dataset=train, eval_dataset=val, processing_class=tokenizer
        ).evaluate()["eval_loss"]
        found = RankSearch(rows, value(new, before))
        if adalora:
            target = sorted(ranks)[len(ranks) // 2]
            ada = add_adalora(
                share(model, trainable=True), targets or chosen.targets, target, alpha * target,
                chosen.dropout, steps, seed,
            )  # fmt: skip
            row = done("adalora", ada, target, [Allocate()])
            allocation = allocated(ada)
            layers = linear_layers(ada.get_base_model())
            kept = sum(
                rank * (sum(features(layers[name])) + 1) for name, rank in allocation.items()
            )
            row = dataclasses.replace(row, parameters=max(1, kept))
            found = dataclasses.replace(found, adalora=row, allocation=allocation)
        return found


def add_adalora(
    model: Any, targets: str | Sequence[str], rank: int, alpha: float, dropout: float, steps: int,
    seed: int = 0, **config: Any,
) -> Any:  # fmt: skip
    """PEFT's AdaLoRA on `model` in place, fused, that ends with `rank` as the mean of the layers'
    after `steps` steps; returns the PEFT model. `Allocate` has to be among the callbacks. config:
    of `AdaLoraConfig`, by its names."""
    names, adapted, _ = chosen_layers(model, targets)
    any_alpha: Any = alpha
    if hasattr(model, "generate"):
        config.setdefault("task_type", "CAUSAL_LM")
    adalora = AdaLoraConfig(
        init_r=math.ceil(1.5 * rank), target_r=rank, lora_alpha=any_alpha, lora_dropout=dropout,
        target_modules=names, total_step=steps, tinit=steps // 10, tfinal=steps // 4, deltaT=1,
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in adapted),
        **config,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, adalora)
    for name, p in peft_model.named_parameters():
        if ".ranknum." in name:  # a count, which PEFT leaves trainable over a 16-bit base
            p.requires_grad_(False)
    return fuse(peft_model)


class Allocate(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Has AdaLoRA take ranks, while the gradients of a step are there."""

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step)


def allocated(model: Any) -> dict[str, int]:
    """The ranks that AdaLoRA kept in each layer, by the layer's name."""
    (config,) = model.peft_config.values()
    return {
        name.partition(".lora_E")[0]: int(sum(map(bool, kept)))
        for name, kept in (config.rank_pattern or {}).items()
    }


@contextmanager
def without_penalty(peft_model: Any) -> Iterator[None]:
    """The loss as it is: AdaLoRA adds that of its orthogonality, in evaluations too."""
    tuner = peft_model.base_model
    tuner.forward = tuner.model.forward
    try:
        yield
    finally:
        del tuner.forward


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """What training on a copy that shares the weights changes of the model is put back: which
    parameters train, and the mode."""
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    training = model.training
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(trained[name])
            p.grad = None
        model.train(training)


def plot_ranks(file: Path, found: RankSearch, title: str) -> None:
    """Write a PNG: score and efficiency by rank, the best of each marked, AdaLoRA beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    rows = sorted(found.rows, key=lambda row: row.rank)
    ranks = [row.rank for row in rows]
    figure.suptitle(title, fontsize=15)
    for axes, name, label, best in zip(
        figure.subplots(1, 2),
        ("score", "efficiency"),
        ("score, held out", "score per million parameters\n(favours small ranks)"),
        (found.best, found.most_efficient),
        strict=True,
    ):
        axes.plot(ranks, [getattr(row, name) for row in rows], "o-", color="#1f77b4", label="LoRA")
        axes.plot(
            best.rank, getattr(best, name), "*", color="#d95f02", markersize=20,
            label=f"best: rank {best.rank}", zorder=3,
        )  # fmt: skip
        if found.adalora:
            axes.plot(
                found.adalora.rank, getattr(found.adalora, name), "D", color="#1b9e77",
                markersize=9, label=f"AdaLoRA, mean rank {found.adalora.rank}", zorder=3,
            )  # fmt: skip
        if name == "score":
            axes.axhline(found.base, linestyle="--", color="#444444", label="no adapter")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
        axes.set_xlabel("rank", fontsize=13)
        axes.set_ylabel(label, fontsize=13)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=11)
    partial = file.with_name(f".{file.name}")
    figure.savefig(partial, format="png")
    partial.replace(file)
