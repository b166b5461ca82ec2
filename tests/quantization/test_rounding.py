"""Rounding to a format's values: the nearest, a random one, or the best for a layer's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.quantization import QuantizedWeight, quantize_4bit, round_weight
from lora_kernels.quantization.readers.gguf import BLOCKS, read, replace_codes
from lora_kernels.quantization.rounding import ROUNDINGS, gram_matrix, unpack_codes, with_codes

N, K = 24, 256
BASES = ["bfloat16", "float16", "nf4", "fp4", "nf4 nested", *BLOCKS]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(kind: str, seed: int = 0) -> Tensor:
    """Blocks whose scales in float16 are near 0.01, of both signs."""
    elements, nbytes, *_ = BLOCKS[kind]
    rows = torch.randint(0, 256, (N, K // elements, nbytes), generator=rng(seed)).byte()
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()}.get(kind, (0, 2)):
        half = torch.empty(N, K // elements).uniform_(0.005, 0.01, generator=rng(seed + at)).half()
        is_shift = kind in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS") and at
        if not is_shift:
            half[::2] *= -1
            rows[..., at : at + 2] = half.unsqueeze(-1).view(torch.uint8)
    if kind == "MXFP4":
        rows[..., 0] = 120
    return rows.reshape(N, -1)


def make_base(name: str) -> tuple[Tensor | QuantizedWeight, Tensor, torch.dtype]:
    """Return a base, its values in float32, and a dtype."""
    weight = torch.randn(N, K, generator=rng(1)) * 0.05
    if name in ("bfloat16", "float16"):
        dtype = getattr(torch, name)
        return weight.to(dtype).float(), weight.to(dtype).float(), dtype
    if name in BLOCKS:
        base = read(random_rows(name), name, torch.float32)
    else:
        base = quantize_4bit(weight, name.split()[0], double_quant="nested" in name)
    return base, base.dequantize(torch.float32), torch.float32


def values(rounded: Tensor | QuantizedWeight) -> Tensor:
    return (rounded if isinstance(rounded, Tensor) else rounded.dequantize()).float()


def all_values(base: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The values that each place can have, [levels, N, K], float32."""
    if isinstance(base, QuantizedWeight):
        used = unpack_codes(base).unique()
        each = [with_codes(base, code.expand(N, K)).dequantize(torch.float32) for code in used]
        return torch.stack(each).sort(0).values
    down, up = (torch.full((N, K), t, dtype=dtype) for t in (-torch.inf, torch.inf))
    at = base.to(dtype)
    around = [at]
    for end in (down, up):
        step = at
        for _ in range(3):
            step = torch.nextafter(step, end) if dtype is torch.bfloat16 else _next(step, end)
            around.append(step)
    return torch.stack(around).float().sort(0).values


def _next(t: Tensor, end: Tensor) -> Tensor:
    bits = t.view(torch.int16)
    return (bits + torch.where((end > 0) == (t > 0), 1, -1).short()).view(t.dtype)


def correlated(count: int = 512) -> Tensor:
    """Inputs with a few strong directions, as activations have."""
    mix = torch.randn(8, K, generator=rng(2))
    few = torch.randn(count, 8, generator=rng(3)) @ mix
    return few + 0.1 * torch.randn(count, K, generator=rng(4))


def update_of(scale: float, levels: Tensor) -> Tensor:
    """An update of rank 4 in units of the mean distance of two values."""
    B, A = torch.randn(N, 4, generator=rng(5)), torch.randn(4, K, generator=rng(6))
    step = levels.diff(dim=0).abs().mean()
    return scale * step * B @ A / 2


@pytest.mark.parametrize("name", BASES)
def test_nearest_and_the_two_neighbours(name: str) -> None:
    base, start, dtype = make_base(name)
    levels = all_values(base, dtype)
    target = (start + update_of(0.3, levels)).clamp(levels[0], levels[-1])
    distance = (levels - target).abs()
    near = values(round_weight(target, base, dtype, "nearest"))
    # (t - shift) / scale has four roundings of float32, so a tie may fall to either side.
    tie = 2.0**-22 * (target.abs() + levels.abs().amax(0))
    assert ((near - target).abs() <= distance.amin(0) + tie).all()
    draws = [
        values(round_weight(target, base, dtype, "stochastic", generator=rng(i))) for i in (1, 2)
    ]
    below = torch.where(levels <= target, levels, -torch.inf).amax(0)
    above = torch.where(levels >= target, levels, torch.inf).amin(0)
    for drawn in draws:
        off = torch.minimum((drawn - below).abs(), (drawn - above).abs())
        assert (off <= tie).all()
    assert not torch.equal(*draws)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "nf4", "Q4_1", "Q6_K"])
def test_the_mean_of_stochastic_rounding_is_the_number(name: str) -> None:
    base, start, dtype = make_base(name)
    levels = all_values(base, dtype)
    target = (start + update_of(0.3, levels)).clamp(levels[0], levels[-1])
    generator, total, count = rng(), torch.zeros(N, K, dtype=torch.float64), 400
    for _ in range(count):
        total += values(round_weight(target, base, dtype, "stochastic", generator=generator))
    gap = levels.diff(dim=0).abs().amax(0)
    # Of N·K means the largest is within 5 standard errors: 6 of a million normal numbers are not.
    assert ((total / count - target).abs() <= 5 * gap / 2 / count**0.5).all()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("how", ROUNDINGS)
def test_the_base_s_bytes_where_the_update_is_zero(name: str, how: str) -> None:
    base, start, dtype = make_base(name)
    update = update_of(0.5, all_values(base, dtype))
    update[::3] = 0  # rows
    update[1, :100] = 0
    gram = gram_matrix(correlated())
    rounded = round_weight(start + update, base, dtype, how, gram, rng())
    is_kept = start + update == start
    assert is_kept[::3].all()
    if isinstance(base, QuantizedWeight):
        assert isinstance(rounded, QuantizedWeight)
        assert torch.equal(unpack_codes(rounded)[is_kept], unpack_codes(base)[is_kept])
        same = round_weight(start, base, dtype, how, gram, rng())
        assert torch.equal(same.packed, base.packed)
        for field in ("absmax", "code", "nested_absmax", "offset"):
            assert getattr(rounded, field) is getattr(base, field)
    else:
        assert torch.equal(values(rounded)[is_kept], start[is_kept])
        assert rounded.dtype is dtype


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.5])
@pytest.mark.parametrize("name", BASES)
def test_the_output_error_falls(name: str, scale: float) -> None:
    """Beside nearest and stochastic rounding, in each row of the weight, in float64."""
    base, start, dtype = make_base(name)
    target = start + update_of(scale, all_values(base, dtype))
    x = correlated()
    errors = {}
    for how in ROUNDINGS:
        rounded = values(round_weight(target, base, dtype, how, gram_matrix(x), rng()))
        errors[how] = ((rounded - target).double() @ x.double().t()).square().sum(1)
    # The damping adds a hundredth of the mean square of x for each element.
    extra = 0.01 * x.square().mean().double() * len(x) * (0.1 * target.abs().max()) ** 2 * K
    assert (errors["error"] <= errors["nearest"] * 1.02 + extra).all()
    assert errors["error"].sum() < 0.6 * errors["nearest"].sum()
    assert errors["error"].sum() < 0.2 * errors["stochastic"].sum()


def test_sweeps_reach_a_point_that_no_change_of_one_value_improves() -> None:
    base, start, dtype = make_base("Q4_1")
    levels = all_values(base, dtype)
    target = start + update_of(0.3, levels)
    x = correlated()
    gram = gram_matrix(x).double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    off = (
        values(round_weight(target, base, dtype, "error", gram_matrix(x), rng())) - target
    ).double()
    at = (off @ gram * off).sum(1)
    better = 0
    for k in range(K):
        steps = levels[:, :, k].double() - target[:, k].double() - off[:, k]
        change = 2 * steps * (off @ gram[:, k]) + steps**2 * gram[k, k]
        better += int((change.amin(0) < -1e-6 * at).sum())
    assert better < 0.1 * N * K  # three sweeps do not end all


def test_many_layers_keep_more_of_the_update() -> None:
    """The update's part of the error counts once for each: rows start from random values."""
    base, start, dtype = make_base("nf4")
    update = update_of(0.3, all_values(base, dtype))
    gram = gram_matrix(correlated())
    lost = []
    for layers in (1, 10**6):
        rounded = values(round_weight(start + update, base, dtype, "error", gram, rng(), layers))
        off = (rounded - start - update).double()
        lost.append(((off @ gram.double()) * update).sum(1) / ((update @ gram) * update).sum(1))
    assert lost[1].abs().mean() < 0.8 * lost[0].abs().mean()


def test_a_diagonal_matrix_leaves_the_nearest_values() -> None:
    base, start, dtype = make_base("nf4")
    target = start + update_of(0.4, all_values(base, dtype))
    near = round_weight(target, base, dtype, "nearest")
    for gram in (torch.diag(torch.rand(K, generator=rng())), torch.zeros(K, K)):
        rounded = round_weight(target, base, dtype, "error", gram, rng())
        assert torch.equal(values(rounded), values(near))


def test_a_singular_matrix_is_damped() -> None:
    base, start, dtype = make_base("bfloat16")
    x = torch.ones(3, K)
    target = start + update_of(0.3, all_values(base, dtype))
    rounded = values(round_weight(target, base, dtype, "error", gram_matrix(x), rng()))
    nearest = values(round_weight(target, base, dtype, "nearest"))
    want = target.sum(1)
    assert (rounded.sum(1) - want).norm() < 0.1 * (nearest.sum(1) - want).norm()


@pytest.mark.parametrize(
    "how, name", [("stochastic", "bfloat16"), ("stochastic", "nf4"), ("error", "Q8_0")]
)
def test_equal_seeds_give_equal_results(name: str, how: str) -> None:
    base, start, dtype = make_base(name)
    target = start + update_of(0.7, all_values(base, dtype))
    gram = gram_matrix(correlated())
    how_many = {"layers": 1000}  # so that rows take the random start
    found = [
        values(round_weight(target, base, dtype, how, gram, rng(i), **how_many)) for i in (1, 1, 2)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_blocks_whose_scale_is_zero_keep_their_codes_values() -> None:
    rows = random_rows("Q4_1")
    rows[:, :2] = 0  # the first block's scale
    base = read(rows, "Q4_1", torch.float32)
    start = base.dequantize()
    target = start + 0.01
    for how in ROUNDINGS:
        rounded = values(round_weight(target, base, torch.float32, how, torch.eye(K), rng()))
        assert rounded.isfinite().all()
        assert torch.equal(rounded[:, :32], start[:, :32])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"how": "best"}, "how: got 'best', want one of nearest, stochastic, error"),
        ({"gram": None}, "gram: got none, want the Gram matrix"),
        ({"gram": torch.eye(3)}, r"gram: got shape \[3, 3\], want \[256, 256\]"),
        ({"gram": torch.full((K, K), torch.nan)}, "gram: got NaN or infinity"),
        ({"target": torch.full((N, K), torch.inf)}, "target: got NaN or infinity"),
        ({"target": torch.zeros(K, N)}, r"target: got shape \[256, 24\], want \[24, 256\]"),
    ],
)
def test_errors(changes: dict[str, Any], words: str) -> None:
    base, start, dtype = make_base("nf4")
    given = {"target": start, "base": base, "dtype": dtype, "how": "error", "gram": torch.eye(K)}
    with pytest.raises(ValueError, match=words):
        round_weight(**given | changes)


@pytest.mark.parametrize("kind", BLOCKS)
def test_codes_are_written_back_into_blocks(kind: str) -> None:
    """The bytes of scales stay; other codes of the type replace those of the rows."""
    rows, others = random_rows(kind), random_rows(kind, seed=9)
    q, other = (unpack_codes(read(r, kind, torch.float32)) for r in (rows, others))
    changed = replace_codes(rows, kind, other)
    assert torch.equal(unpack_codes(read(changed, kind, torch.float32)), other)
    assert torch.equal(replace_codes(changed, kind, q), rows)
