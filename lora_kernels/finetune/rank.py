"""Train the same adapter at each rank, and AdaLoRA beside them."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from ..core.weights import share
from ..peft import fuse
from .errors import UsageError
from .model import features, linear_layers
from .options import check_numbers, check_ranks
from .plots import draw_png
from .presets import Preset, add_lora_layers, find_preset, find_targets, peft_settings
from .trainer import DeadRunCheck, LoRATrainer, training_arguments

RANKS = (4, 8, 16, 32, 64)
WARMUP = 0.05  # share of the steps
CAVEAT = (
    "efficiency divides by the parameters, so it favours small ranks: the score seldom doubles "
    "where they do. Choose by the score, and by efficiency between equals"
)


@dataclass(frozen=True)
class RankRow:
    """The results of training at one rank.

    Attributes:
        score: higher is better.
        loss: on held-out data, in nats per token.
        parameters: the number of adapter parameters.
        seconds: of the training.
    """

    rank: int
    score: float
    loss: float
    parameters: int
    seconds: float

    @property
    def efficiency(self) -> float:
        """The score per million adapter parameters."""
        return self.score / self.parameters * 1e6


@dataclass(frozen=True)
class RankSearch:
    """The result of `find_optimal_rank`; `str()` is a table.

    Attributes:
        rows: one for each rank.
        base: the score of the model without an adapter.
        adalora: the row of AdaLoRA, with its mean rank, or None.
        allocation: the ranks that AdaLoRA left each layer, by name.
    """

    rows: list[RankRow]
    base: float
    adalora: RankRow | None = None
    allocation: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> RankRow:
        """The row with the highest score; among equals, that with the smallest rank."""
        return max(self.rows, key=lambda row: (row.score, -row.rank))

    @property
    def most_efficient(self) -> RankRow:
        return max(self.rows, key=lambda row: row.efficiency)

    def __str__(self) -> str:
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]

        def cells(row: RankRow) -> dict[str, str]:
            marks = {"best score": self.best, "most efficient": self.most_efficient}
            return {
                "rank": f"{row.rank} (AdaLoRA)" if row is self.adalora else str(row.rank),
                "score": f"{row.score:.4g}",
                "loss": f"{row.loss:.4f}",
                "parameters": f"{row.parameters:,}",
                "seconds": f"{row.seconds:.1f}",
                "score / 10⁶ parameters": f"{row.efficiency:.4g}",
                "": ", ".join(mark for mark, marked in marks.items() if marked is row),
            }

        table = pd.DataFrame([cells(row) for row in (*self.rows, self.adalora) if row])
        lines = [line.rstrip() for line in table.to_string(index=False).splitlines()]
        lines.append(f"without an adapter: {self.base:.4g}")
        if self.allocation:
            lines.append(f"AdaLoRA left {_by_kind(self.allocation)}")
        return "\n".join([*lines, CAVEAT])

    def as_dict(self) -> dict[str, Any]:
        """Return the contents of ranks.json: rows with their efficiency, marks, allocation."""
        rows, adalora = (
            [dataclasses.asdict(row) | {"efficiency": row.efficiency} for row in part if row]
            for part in (self.rows, [self.adalora])
        )
        marks = {"best": self.best.rank, "most_efficient": self.most_efficient.rank}
        found = {"rows": rows, "base": self.base, **marks, "adalora": (*adalora, None)[0]}
        return found | {"allocation": dict(self.allocation), "caveat": CAVEAT}


def _by_kind(allocation: Mapping[str, int]) -> str:
    """Return the mean rank of the layers with the same last name component.

    >>> _by_kind({"0.q_proj": 2, "1.q_proj": 4, "0.up_proj": 1})
    'q_proj 3.0 (2 to 4), up_proj 1.0 (1 to 1)'
    """
    import pandas as pd  # type: ignore[import-untyped, unused-ignore]

    kinds = pd.Series(allocation).groupby(lambda name: name.rpartition(".")[2], sort=False)
    return ", ".join(f"{kind} {r.mean():.1f} ({r.min()} to {r.max()})" for kind, r in kinds)


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
    **settings: Any,
) -> RankSearch:
    """Train an adapter of each rank on the same data, in the same order, from the same seed.

    All adapters have the preset's alpha / rank, hence the same scaling. Each is trained on a copy
    that shares the model's weights, and the model does not change.

    Args:
        model: a causal language model of transformers, dense or 4-bit, without adapters.
        train, val: `ChatData`.
        ranks: distinct ranks, each at least 1.
        preset, targets: as in `add_lora_layers`; the preset's rank is ignored.
        steps: optimizer steps for each rank.
        seed: of the adapters, the order of the data and dropout.
        adalora: whether to train PEFT's AdaLoRA too. It starts from 1.5 times the middle rank, and
            prunes ranks until their mean is the middle rank. Needs at least 10 steps.
        score: (PEFT model, held-out loss) -> a number, higher is better. None: exp(−loss), the
            geometric mean probability of the correct tokens.
        out: folder of Trainer's log for each rank, in trainer_state.json; None keeps none.
        tokenizer: provides the padding token.
        on_rank: called with each row.
        settings: other settings of `training_arguments`. The default of warmup_steps is 0.05.

    Raises UsageError that names the argument before anything is trained, and TrainingError that
    names the rank and the step if a run cannot learn any more.

    >>> from torch import nn
    >>> from lora_kernels.finetune.rank import find_optimal_rank
    >>> find_optimal_rank(nn.Linear(2, 2), [], [], ranks=(4, 4))
    Traceback (most recent call last):
    lora_kernels.finetune.UsageError: ranks: got (4, 4), want different ones, each at least 1
    """
    check_ranks(ranks)
    check_numbers({"steps": steps}, steps=10 if adalora else 1)
    if isinstance(model, PeftModel):
        raise UsageError("model: got a PEFT model, want the base: model.get_base_model()")
    for name, data in (("train", train), ("val", val)):
        if len(data) == 0:
            raise UsageError(f"{name}: got no row, want at least one")
    chosen = find_preset(preset)
    if targets:
        chosen = replace(chosen, targets=(targets,) if isinstance(targets, str) else tuple(targets))
    cpu = next(model.parameters()).device.type == "cpu"
    training = {"use_cpu": cpu, "warmup_steps": WARMUP} | settings
    training |= {"max_steps": steps, "seed": seed, "save_strategy": "no", "disable_tqdm": True}

    def preset_of_rank(rank: int) -> Preset:
        return replace(chosen, rank=rank, alpha=chosen.alpha / chosen.rank * rank)

    def add_adapter(rank: int) -> Any:
        return add_lora_layers(share(model, frozen=True), preset_of_rank(rank), seed=seed)

    def train_adapter(
        name: str, peft_model: Any, rank: int, most: int = steps, **more: Any
    ) -> RankRow:
        args = training_arguments(folder / name, **training)
        data = {"train_dataset": train, "eval_dataset": val, "processing_class": tokenizer}
        more["callbacks"] = [*more.get("callbacks", ()), DeadRunCheck(name)]
        trainer = LoRATrainer(peft_model, args, **data, **more)
        start = time.perf_counter()
        if most:
            trainer.train()
            trainer.save_state()
        seconds = time.perf_counter() - start
        with disable_penalty(peft_model):
            loss = trainer.evaluate()["eval_loss"]
        count = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
        value = math.exp(-loss) if score is None else float(score(peft_model, loss))
        return RankRow(rank, value, loss, count, seconds)

    with tempfile.TemporaryDirectory() as unnamed:
        folder = Path(unnamed if out is None else out)
        rows = []
        for rank in ranks:
            rows.append(train_adapter(f"rank-{rank}", add_adapter(rank), rank))
            on_rank(rows[-1])
        # A new adapter has B = 0, so this is the loss of the model without an adapter.
        found = RankSearch(rows, train_adapter("base", add_adapter(1), 1, most=0).score)
        if not adalora:
            return found
        rank = sorted(ranks)[len(ranks) // 2]
        ada = add_adalora(share(model, frozen=True), preset_of_rank(rank), steps, seed)
        row = train_adapter("adalora", ada, rank, callbacks=[Allocate()])
        allocation, layers = kept_ranks(ada), linear_layers(ada.get_base_model())
        kept = sum(r * (sum(features(layers[name])) + 1) for name, r in allocation.items())
        return replace(found, adalora=replace(row, parameters=max(1, kept)), allocation=allocation)


def add_adalora(model: Any, preset: Preset, steps: int, seed: int = 0, **config: Any) -> Any:
    """Add PEFT's AdaLoRA to `model` in place, fuse its layers, and return the PEFT model.

    After `steps` steps the mean rank of the layers is the preset's, if the trainer has the callback
    `Allocate`.

    config: other fields of `AdaLoraConfig`.
    """
    names, _ = find_targets(model, preset.targets)
    any_alpha: Any = preset.alpha
    schedule = {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 4, "deltaT": 1}
    adalora = AdaLoraConfig(
        init_r=math.ceil(1.5 * preset.rank),
        target_r=preset.rank,
        lora_alpha=any_alpha,
        lora_dropout=preset.dropout,
        target_modules=names,
        **peft_settings(model, names) | schedule | config,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, adalora)
    for name, p in peft_model.named_parameters():
        if ".ranknum." in name:  # a count, which PEFT leaves trainable on a 16-bit base
            p.requires_grad_(False)
    return fuse(peft_model)


class Allocate(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Update AdaLoRA's rank allocation before the optimizer step, while gradients exist."""

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step)


def kept_ranks(model: Any) -> dict[str, int]:
    """Return the number of ranks that AdaLoRA kept in each layer, by the layer's name."""
    (config,) = model.peft_config.values()
    return {
        name.partition(".lora_E")[0]: int(sum(map(bool, kept)))
        for name, kept in (config.rank_pattern or {}).items()
    }


@contextmanager
def disable_penalty(peft_model: Any) -> Iterator[None]:
    """Disable the orthogonality loss, which AdaLoRA adds in evaluation too."""
    tuner = peft_model.base_model
    tuner.forward = tuner.model.forward
    try:
        yield
    finally:
        del tuner.forward


def plot_ranks(file: Path, found: RankSearch, title: str) -> None:
    """Write a PNG of score and efficiency by rank, with the best ranks marked, and AdaLoRA."""
    rows = sorted(found.rows, key=lambda row: row.rank)
    ranks = [row.rank for row in rows]
    labels = {"score": "score, held out", "efficiency": "score per million parameters"}
    bests = {"score": found.best, "efficiency": found.most_efficient}
    with draw_png(file, (11, 5), ncols=2) as both:
        for axes, (name, label) in zip(both, labels.items(), strict=True):
            axes.plot(ranks, [getattr(row, name) for row in rows], "o-", label="LoRA")
            best, ada = bests[name], found.adalora
            style = {"markersize": 20, "label": f"best: rank {best.rank}", "zorder": 3}
            axes.plot(best.rank, getattr(best, name), "*", **style)
            if ada:
                style |= {"markersize": 9, "label": f"AdaLoRA, mean rank {ada.rank}"}
                axes.plot(ada.rank, getattr(ada, name), "D", **style)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, [str(rank) for rank in ranks])
            axes.minorticks_off()
            axes.set(xlabel="rank", ylabel=label)
        both[0].axhline(found.base, linestyle="--", color="#444444", label="no adapter")
        both[0].set_title(title)
        both[1].set_title("favours small ranks")
