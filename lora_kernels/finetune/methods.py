"""The training methods that `lora-kernels compare` compares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A training method and its settings.

    With rank None there is no adapter: all parameters train, or with `frozen` the classifier alone.
    With an adapter the whole classifier trains too.
    """

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


# Each learning rate is the best of a few on a part of the training texts, with one seed. Adapters
# of r = 8 have half of it, because LoRA diverged with another seed.
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
