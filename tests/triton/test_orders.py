"""The kernels that may take a training step's skinny GEMMs, beside float64."""

from typing import Any

import pytest
import torch

from lora_kernels.backends.eager import orders
from lora_kernels.choice.verdicts import Group
from lora_kernels.oracle import tolerance
from lora_kernels.qualification import claims, plan
from lora_kernels.qualification.plan import Claim
from tests.support.fake_card import FakeCard

bf16 = torch.bfloat16
SIZES = [(133, 203, 16), (70, 96, 8), (16, 64, 61), (1, 40, 3), (0, 40, 3)]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(bf16)


@pytest.mark.parametrize(("M", "n", "R"), SIZES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_shrink_writes_p_and_ds_rounded_once(M: int, n: int, R: int, transposed: bool) -> None:
    torch.manual_seed(0)
    a, small = draw(M, n), draw(n, R).t() if transposed else draw(R, n)
    whole = torch.full((M, 2 * R), 7.0, dtype=bf16)  # dS of a group is a slice
    got = orders.shrink(a, small, 0.5, whole[:, R:])
    assert got.data_ptr() == whole[:, R:].data_ptr() and (whole[:, :R] == 7).all()
    want = 0.5 * (a.double() @ small.double().t())
    eager = (0.5 * (a.float() @ small.float().t())).to(bf16)
    assert tolerance.compare(got, want, eager, 2.0**-8, [n]).ok


@pytest.mark.parametrize(("M", "n", "R"), SIZES, ids=str)
@pytest.mark.parametrize("is_slice", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_outer_writes_da_and_db_rounded_once(
    M: int, n: int, R: int, is_slice: bool, transposed: bool
) -> None:
    torch.manual_seed(0)
    s = draw(M, 2 * R)[:, R:] if is_slice else draw(M, R)
    v = draw(M, n)
    out = torch.empty(n, R, dtype=bf16).t() if transposed else torch.empty(R, n, dtype=bf16)
    got = orders.outer(s, v, 0.5, out)
    want = 0.5 * (s.double().t() @ v.double())
    eager = (0.5 * (s.float().t() @ v.float())).to(bf16)
    assert tolerance.compare(got, want, eager, 2.0**-8, [M]).ok


def test_kernels_write_float32_gradients_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cast adapter, whose gradient nothing has rounded."""
    torch.manual_seed(0)
    monkeypatch.setattr(orders, "winners", dict.fromkeys(orders.SKINNY, lambda *args: True))
    s, v = draw(133, 16), draw(133, 203)
    for got, want in (
        (orders.gradient_A(s, v, torch.float32), s.double().t() @ v.double()),
        (orders.gradient_B(v, s, 0.5, torch.float32), 0.5 * (v.double().t() @ s.double())),
    ):
        assert got.dtype is torch.float32
        assert (got - want).norm() <= 2.0**-16 * want.norm()


@pytest.mark.parametrize("name", ["odd sizes", "memory"])
@pytest.mark.parametrize("kind", orders.SKINNY)
def test_claim_of_a_skinny_kernel_holds(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card: Any = FakeCard()
    group = Group("triton", kind, "bfloat16", "bfloat16", "skinny")
    assert Claim(group, name, 0) in plan.list_orders()
    reason, _ = claims.check(card, Claim(group, name, 0))
    assert reason is None
