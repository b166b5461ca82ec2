"""Each mistake raises the right type, naming the argument, what it got and what it wants."""

import math

import pytest
import torch

from lora_kernels import lora_linear

M, K, N, R = 4, 6, 5, 3
GOOD = {
    "x": torch.randn(M, K),
    "weight": torch.randn(N, K),
    "lora_A": torch.randn(R, K),
    "lora_B": torch.randn(N, R),
    "bias": torch.randn(N),
    "rank_gate": torch.randn(R),
    "column_scale": torch.randn(N),
    "dropout_p": 0.1,
    "rng": torch.tensor([1, 2]),
}


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def meta(*shape):
    return torch.zeros(shape, device="meta")


def double(*shape):
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        # shapes
        ({"x": torch.randn(M, K + 1)}, ValueError, r"x: got shape \[4, 7\], want \[\.\.\., 6\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: got shape \[\], want \[\.\.\., 6\]"),
        ({"weight": torch.randn(K)}, ValueError, r"weight: got shape \[6\], want \[5, 6\]"),
        ({"weight": torch.randn(K, N)}, ValueError, r"weight: got shape \[6, 5\], want \[5, 6\]"),
        ({"lora_A": torch.randn(K)}, ValueError, r"lora_A: got shape \[6\], want \[R, K\]"),
        ({"lora_B": torch.randn(N)}, ValueError, r"lora_B: got shape \[5\], want \[N, R\]"),
        ({"lora_B": torch.randn(N, 2)}, ValueError, r"lora_B: got shape \[5, 2\], want \[N, 3\]"),
        ({"bias": torch.randn(N + 1)}, ValueError, r"bias: got shape \[6\], want \[5\]"),
        ({"bias": torch.randn(1, N)}, ValueError, r"bias: got shape \[1, 5\], want \[5\]"),
        ({"rank_gate": torch.randn(2)}, ValueError, r"rank_gate: got shape \[2\], want \[3\]"),
        ({"column_scale": torch.randn(1)}, ValueError, r"column_scale: .* \[1\], want \[5\]"),
        ({"rng": ints(3)}, ValueError, r"rng: got torch.int64 \[3\], want int64 \[2\]"),
        ({"rng": torch.ones(M, K) > 0}, ValueError, r"rng: .*; the argument of a mask is dropout"),
        (
            {"dropout_mask": torch.ones(M, K) > 0},
            ValueError,
            r"dropout_mask: .* beside rng",
        ),
        (
            {"rng": None, "dropout_mask": torch.ones(M, K)},
            ValueError,
            r"dropout_mask: got torch.float32 \[4, 6\], want torch.bool \[4, 6\]",
        ),
        ({"rng": None, "dropout_mask": 1}, TypeError, "dropout_mask: got int, want a tensor"),
        # rank 0
        (
            {"lora_A": torch.randn(0, K), "lora_B": torch.randn(N, 0), "rank_gate": None},
            ValueError,
            r"lora_A: got shape \[0, 6\], want \[R, K\], each at least 1",
        ),
        # dtypes
        ({"x": ints(M, K)}, TypeError, r"x: got torch.int64, want float32, bfloat16, float16 or"),
        ({"x": torch.zeros(M, K, dtype=torch.complex64)}, TypeError, r"x: got torch.complex64"),
        ({"weight": ints(N, K)}, TypeError, r"weight: got torch.int64, want float32"),
        ({"weight": torch.randn(N, K).bfloat16()}, TypeError, r"weight: .*bfloat16, want x's .*32"),
        ({"weight": double(N, K)}, TypeError, r"weight: got torch.float64 beside x in .*float32"),
        ({"lora_A": ints(R, K)}, TypeError, r"lora_A: got torch.int64, want float32"),
        ({"lora_A": double(R, K)}, TypeError, r"lora_A: got torch.float64 beside x in .*float32"),
        ({"lora_B": double(N, R)}, TypeError, r"lora_B: got torch.float64 beside x in .*float32"),
        ({"x": double(M, K)}, TypeError, r"lora_A: got torch.float32 beside x in torch.float64"),
        ({"bias": ints(N)}, TypeError, r"bias: got torch.int64, want a floating dtype"),
        ({"bias": double(N)}, TypeError, r"bias: got torch.float64, want .* torch.float32"),
        ({"rank_gate": double(R)}, TypeError, r"rank_gate: got torch.float64, want"),
        ({"column_scale": ints(N)}, TypeError, r"column_scale: got torch.int64, want"),
        ({"rng": torch.zeros(2)}, ValueError, r"rng: got torch.float32 \[2\], want int64 \[2\]"),
        # devices
        ({"weight": meta(N, K)}, ValueError, r"weight: got device meta, want x's device cpu"),
        ({"lora_A": meta(R, K)}, ValueError, r"lora_A: got device meta, want x's device cpu"),
        ({"x": meta(M, K)}, ValueError, r"lora_A: got device cpu, want x's device meta"),
        ({"lora_B": meta(N, R)}, ValueError, r"lora_B: got device meta, want x's device cpu"),
        ({"bias": meta(N)}, ValueError, r"bias: got device meta, want x's device cpu"),
        ({"rank_gate": meta(R)}, ValueError, r"rank_gate: got device meta, want x's device cpu"),
        ({"column_scale": meta(N)}, ValueError, r"column_scale: got device meta, want x's"),
        ({"rng": ints(2).to("meta")}, ValueError, r"rng: got device meta, want x's device cpu"),
        # a base that is to be trained
        (
            {"weight": torch.randn(N, K, requires_grad=True)},
            ValueError,
            r"weight: got requires_grad=True, want a frozen weight",
        ),
        # dropout
        ({"dropout_p": math.nan}, ValueError, r"dropout_p: got nan, want .* in \[0, 1\]"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p: got -0\.1, want .* in \[0, 1\]"),
        ({"dropout_p": 1.1}, ValueError, r"dropout_p: got 1\.1, want .* in \[0, 1\]"),
    ],
)
def test_lora_linear_of_bad_arguments_raises(change, error, message):
    lora_linear(**GOOD)
    state = torch.get_rng_state()
    with pytest.raises(error, match=f"^{message}"):
        lora_linear(**GOOD | change)
    assert torch.equal(torch.get_rng_state(), state)


def test_lora_linear_under_autocast_casts_the_weight_but_float64_raises():
    bfloat16 = GOOD | {"weight": GOOD["weight"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear(**bfloat16).dtype is torch.bfloat16
        with pytest.raises(TypeError, match=r"^weight: got torch.float64"):
            lora_linear(**GOOD | {"weight": double(N, K)})


@pytest.mark.parametrize("name", ["bias", "rank_gate", "column_scale"])
def test_lora_linear_of_float64_wants_float64_vectors(name):
    wide = {n: t.double() if n not in ("dropout_p", "rng") else t for n, t in GOOD.items()}
    assert lora_linear(**wide).dtype is torch.float64
    with pytest.raises(TypeError, match=rf"^{name}: got torch.float32, want .* x's torch.float64"):
        lora_linear(**wide | {name: GOOD[name]})


def test_lora_linear_without_gradients_takes_a_weight_that_trains():
    trains = GOOD | {"weight": GOOD["weight"].clone().requires_grad_()}
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert torch.equal(lora_linear(**trains), lora_linear(**GOOD))
