"""docs/several_adapters.md: tenants that train in one batch do what separate runs would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lora_kernels.peft import fuse, row_adapters
from tests.support.assertions import assert_close_derived
from tests.support.peft_models import llama, randomize

PAGE = Path(__file__).parents[2] / "docs" / "several_adapters.md"
TENANTS = ["law", "code", "bank", "mail"]
STEPS = 3
ROWS = [
    ["law", "code", "code", "bank", "mail", "law"],
    ["mail", "mail", "code", "law", "law", "code"],  # nothing of the bank
    ["bank", "law", "mail", "code", "bank", "bank"],
]
IDS = torch.randint(61, (STEPS, 6, 9), generator=torch.Generator().manual_seed(6))
IGNORED = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(7)) < 0.2
LABELS = IDS.masked_fill(IGNORED, -100)


def tenants_model() -> Any:
    """Adapters of several ranks, each with values of its own."""
    configs = [LoraConfig(r=3 + i, lora_alpha=4 + i, target_modules="all-linear") for i in range(4)]
    model = get_peft_model(llama(torch.float64), configs[0], adapter_name=TENANTS[0])
    for name, config in zip(TENANTS[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    for i, name in enumerate(TENANTS):
        randomize(model, name, 1 + i)
    for name, p in model.named_parameters():  # PEFT 0.17 has no set_requires_grad
        p.requires_grad_("lora_" in name)
    return model.train()


def parameters_of(model: nn.Module, tenant: str) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if f".{tenant}." in n}


def page(model: Any) -> Any:
    """The page's `step`, for this model in float64."""
    text = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[2]
    lines = text.split("parameters = ", 1)[1].split("\nids = ", 1)[0]
    # The losses, in the model's dtype.
    code = "parameters = " + lines.replace(".float()", "")
    scope: dict[str, Any] = {"model": model, "tenants": TENANTS}
    scope |= {"torch": torch, "cross_entropy": cross_entropy, "row_adapters": row_adapters}
    exec(compile(code, PAGE, "exec"), scope)
    return scope["step"]


def alone(tenant: str) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """A run of PEFT on a tenant's rows alone: the loss of each of its steps, then its adapter."""
    model = tenants_model()
    model.set_adapter(tenant)
    parameters = parameters_of(model, tenant)
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-4)
    for ids, labels, names in zip(IDS, LABELS, ROWS, strict=True):
        rows = [i for i, name in enumerate(names) if name == tenant]
        if rows:
            result = model(input_ids=ids[rows], labels=labels[rows], use_cache=False)
            logits = result.logits[:, :-1].flatten(0, 1)
            loss = cross_entropy(logits, labels[rows, 1:].flatten())
            assert result.loss.item() == pytest.approx(loss.item(), rel=1e-6)  # of float32 logits
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item(), {n: p.detach().clone() for n, p in parameters.items()}


@pytest.fixture(params=["cpu", "gpu path"])
def path(request: pytest.FixtureRequest) -> None:
    if request.param == "gpu path":
        request.getfixturevalue("gpu_path")


def test_tenants_in_one_batch_are_as_many_runs(path: None) -> None:
    """Losses, clipped gradients' updates and AdamW's moments, over steps that lack a tenant."""
    model = fuse(tenants_model())
    step = page(model)
    runs = {tenant: alone(tenant) for tenant in TENANTS}
    for ids, labels, names in zip(IDS, LABELS, ROWS, strict=True):
        losses = step(ids, labels, names)
        assert set(losses) == set(names)
        for tenant, loss in losses.items():
            want, adapter = next(runs[tenant])
            assert loss == pytest.approx(want, rel=1e-12), tenant
            got = parameters_of(model, tenant)
            assert len(got) == 28
            for name, p in adapter.items():
                # AdamW divides by a gradient's own size, which makes its roundings larger.
                assert (got[name] - p).norm() <= 1e-9 * p.norm(), name
    assert all(next(run, None) is None for run in runs.values())


@pytest.mark.parametrize("where", ["weights", "rows"])
def test_nan_of_a_tenant_stays_with_the_tenant(where: str, path: None) -> None:
    clean, spoiled = fuse(tenants_model()), fuse(tenants_model())
    steps = page(clean), page(spoiled)
    if where == "weights":
        broken = next(p for n, p in parameters_of(spoiled, "code").items() if "lora_B" in n)
        with torch.no_grad():
            broken[0, 0] = float("nan")
    else:
        rows = torch.tensor([name == "code" for name in ROWS[0]])

        def spoil(module: nn.Module, args: Any, result: Tensor) -> Tensor:
            return result.masked_fill(rows[:, None, None], float("nan"))

        spoiled.get_input_embeddings().register_forward_hook(spoil)
    for ids, labels in zip(IDS, LABELS, strict=True):
        want, got = (step(ids, labels, ROWS[0]) for step in steps)
        assert got["code"] != got["code"]
        for tenant in ("law", "bank", "mail"):
            assert got[tenant] == pytest.approx(want[tenant], rel=1e-12)
    for tenant in ("law", "bank", "mail"):
        assert_close_derived(
            dict(parameters_of(spoiled, tenant)), dict(parameters_of(clean, tenant)), layers=8
        )
    assert any(p.isnan().any() for p in parameters_of(spoiled, "code").values())
