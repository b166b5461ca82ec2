"""RankAllocator: the allocation of AdaLoRA's rank budget over a model (Zhang et al., 2023)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from .variants import AdaLoRALinear


class RankAllocator:
    """Prune the least important ranks of a model's `AdaLoRALinear` layers during training.

    The importance of a parameter w is the product of two moving averages: the sensitivity
    I = |w·∂w| (with beta1), and its absolute deviation from the first average (with beta2). A
    triplet's score is the sum of its E's importance and the mean importances of its row of A and
    its column of B. The rank budget of the model falls from all ranks to target_rank a layer:

        step < warmup           all
        step < total − final    target + (all − target)·(1 − progress)³, progress 0 to 1
        after that              target, and the masks no longer change

    Call `step()` after each backward, before the optimizer's step or after it (the paper's order).
    Every `interval` steps the masks are recomputed. A pruned rank gets no gradient, so its score
    decays and it seldom returns.

    Args:
        model: a model with at least one `AdaLoRALinear`.
        target_rank: mean rank of a layer from step total − final on, at least 1, at most r. With
            final = 0 even the last of `total` steps keeps more ranks.
        total: number of training steps.
        warmup: number of steps before pruning, at least 0.
        final: number of steps with the final masks, at least 0. warmup + final < total.
        interval: number of steps between two allocations.
        beta1, beta2: decay rates of the moving averages, in [0, 1).

    Raises ValueError that names the argument.

    >>> import torch
    >>> from lora_kernels.layers import AdaLoRALinear, RankAllocator
    >>> model = torch.nn.Sequential(*(AdaLoRALinear(16, 16, r=4) for _ in range(2)))
    >>> optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    >>> allocator = RankAllocator(model, target_rank=2, total=20, warmup=5, final=5)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     loss = model(torch.randn(8, 16)).square().mean() + 0.1 * allocator.penalty()
    ...     loss.backward()
    ...     optimizer.step()
    ...     kept = allocator.step()
    >>> kept, sum(layer.current_rank for layer in model)
    (4, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        target_rank: int,
        total: int,
        warmup: int = 0,
        final: int = 0,
        interval: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, AdaLoRALinear)]
        if not self.layers:
            raise ValueError("model: got none with an AdaLoRALinear, want at least one")
        min_rank = min(layer.r for layer in self.layers)
        if not 1 <= target_rank <= min_rank:
            raise ValueError(f"target_rank: got {target_rank}, want 1 to the layers' r, {min_rank}")
        for name, value in (("warmup", warmup), ("final", final)):
            if value < 0:
                raise ValueError(f"{name}: got {value}, want at least 0")
        if warmup + final >= total:
            raise ValueError(f"total: got {total}, want more than warmup + final, {warmup + final}")
        if interval < 1:
            raise ValueError(f"interval: got {interval}, want at least 1")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name}: got {beta}, want a number in [0, 1)")
        self.target, self.all = target_rank * len(self.layers), sum(m.r for m in self.layers)
        self.total, self.warmup, self.final, self.interval = total, warmup, final, interval
        self.beta1, self.beta2 = beta1, beta2
        self.steps = 0
        self._sensitivity: list[dict[str, Tensor]] = [{} for _ in self.layers]
        self._uncertainty: list[dict[str, Tensor]] = [{} for _ in self.layers]

    def budget(self, step: int) -> int:
        """Return the number of ranks that the model keeps at this step.

        >>> model = AdaLoRALinear(8, 8, r=8)
        >>> allocator = RankAllocator(model, target_rank=2, total=10, warmup=2, final=2)
        >>> [allocator.budget(step) for step in range(10)]
        [8, 8, 8, 6, 4, 3, 3, 3, 2, 2]
        """
        if step < self.warmup:
            return self.all
        if step >= self.total - self.final:
            return self.target
        remaining = 1 - (step - self.warmup) / (self.total - self.final - self.warmup)
        return self.target + math.ceil((self.all - self.target) * remaining**3)

    def penalty(self) -> Tensor:
        """Return the mean `orthogonality` of the layers, a regularization term for the loss."""
        return torch.stack([layer.orthogonality() for layer in self.layers]).mean()

    @torch.no_grad()
    def step(self) -> int:
        """Update the scores from the gradients, and recompute the masks if they are due.

        Returns the number of ranks that the model keeps. Raises RuntimeError if a layer has no
        gradient.
        """
        step, last_step = self.steps, self.total - self.final
        if step <= last_step:
            self._update_averages()
            is_due = (step - self.warmup) % self.interval == 0 or step == last_step
            if step >= self.warmup and is_due:
                self._allocate(self.budget(step))
        self.steps += 1
        return sum(layer.current_rank for layer in self.layers)

    def _update_averages(self) -> None:
        names = ("lora_A", "lora_B", "lora_E")
        for layer, name in itertools.product(self.layers, names):
            if layer.get_parameter(name).grad is None:
                raise RuntimeError(f"{name}: got no gradient, want step() after backward()")
        averages = zip(self.layers, self._sensitivity, self._uncertainty, strict=True)
        for layer, sensitivity, uncertainty in averages:
            for name in names:
                param = layer.get_parameter(name)
                assert param.grad is not None
                current = (param * param.grad).abs().float()
                if name not in sensitivity:
                    sensitivity[name] = torch.zeros_like(current)
                    uncertainty[name] = torch.zeros_like(current)
                sensitivity[name].lerp_(current, 1 - self.beta1)
                uncertainty[name].lerp_((current - sensitivity[name]).abs(), 1 - self.beta2)

    def scores(self) -> list[Tensor]:
        """Return the scores of the triplets after the last `step`, [r] for each layer."""
        scores = []
        for sensitivity, uncertainty in zip(self._sensitivity, self._uncertainty, strict=True):
            importance = {name: sensitivity[name] * uncertainty[name] for name in sensitivity}
            scores.append(
                importance["lora_E"]
                + importance["lora_A"].mean(dim=1)
                + importance["lora_B"].mean(dim=0)
            )
        return scores

    def _allocate(self, budget: int) -> None:
        scores = self.scores()
        flat_scores = torch.cat([score.cpu() for score in scores])
        masks = torch.zeros_like(flat_scores, dtype=torch.bool)
        masks[flat_scores.argsort(descending=True, stable=True)[:budget]] = True
        for layer, mask in zip(self.layers, masks.split([m.r for m in self.layers]), strict=True):
            layer.rank_mask.copy_(mask)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the allocator, for `torch.save` and `load_state_dict`."""
        return {
            "steps": self.steps,
            "sensitivity": self._sensitivity,
            "uncertainty": self._uncertainty,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`.

        Raises ValueError if a key is missing or the number of layers differs.
        """
        for key in ("steps", "sensitivity", "uncertainty"):
            if key not in state:
                raise ValueError(f"state: got no {key!r}, want what `state_dict` returned")
        if len(state["sensitivity"]) != len(self.layers):
            got = len(state["sensitivity"])
            raise ValueError(f"state: got {got} layers, want {len(self.layers)}")
        self.steps = state["steps"]
        self._sensitivity = self._copy_to_layers(state["sensitivity"])
        self._uncertainty = self._copy_to_layers(state["uncertainty"])

    def _copy_to_layers(self, averages: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return copies, which `step` changes in place, on the devices of the parameters."""
        return [
            {
                name: t.to(layer.get_parameter(name).device, copy=True)
                for name, t in layer_averages.items()
            }
            for layer, layer_averages in zip(self.layers, averages, strict=True)
        ]
