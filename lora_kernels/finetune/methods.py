"""The ways to train that `lora-kernels compare` sets side by side."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How a model is trained. rank None: without an adapter, all of it or, with `frozen`, the
    classifier alone. With an adapter the classifier trains too, whole."""

    title: str
    lr: float
    rank: int | None = None
    frozen: bool = False
    dora: bool = False
    adalora: bool = False
    quant: str | None = None
    lora_plus: float | None = None

    @property
    def alpha(self) -> int:
        return 2 * (self.rank or 0)


# Learning rates: the best of a few on a part of the training texts with one seed; for adapters of
# r = 8 half of that, since with LoRA another seed diverged.
METHODS = {
    "head": Method("classifier alone", 3e-2, frozen=True),
    "full": Method("full fine-tuning", 1e-4),
    "lora-8": Method("LoRA, r = 8", 1e-3, rank=8),
    "lora-16": Method("LoRA, r = 16", 1e-3, rank=16),
    "dora": Method("DoRA, r = 8", 1e-3, rank=8, dora=True),
    "qlora": Method("QLoRA (NF4), r = 8", 1e-3, rank=8, quant="nf4"),
    "adalora": Method("AdaLoRA, mean r = 8", 1e-2, rank=8, adalora=True),
    "lora-plus": Method("LoRA+, r = 8, ratio 16", 1.5e-4, rank=8, lora_plus=16.0),
}
