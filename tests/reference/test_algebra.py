"""The reference against algebra that it is not written in, in float64.

Bounds: a float64 sum of n products is wrong by at most n·u times the same sum of absolute values,
u = 2^-53, and both sides of a comparison are such sums (Higham, Accuracy and Stability, 3.1).
`magnitude` is that sum of absolute values; 8 more roundings stand for the factors beside the sums.
"""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.core.dropout import dropout_mask
from lora_kernels.oracle import reference
from lora_kernels.oracle.reference import lora_linear

EXAMPLES = settings(max_examples=40, derandomize=True, deadline=None, database=None)
U = 2.0**-53


def assert_near(got, want, terms, magnitude):
    assert got.shape == want.shape
    assert ((got - want).abs() <= 2 * (terms + 8) * U * magnitude).all()


@st.composite
def tensors(draw, shape, seed):
    """Normal numbers in one of several layouts: dense, transposed, strided, offset, expanded."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    layout = draw(st.sampled_from(["dense", "transposed", "strided", "offset", "expanded"]))
    if layout == "transposed":
        return randn(*shape[::-1]).permute(*range(len(shape))[::-1])
    if layout == "strided":
        return randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "offset":
        return randn(*shape[:-1], shape[-1] + 3)[..., 2:-1]
    if layout == "expanded":
        return randn(*[1] * (len(shape) - 1), shape[-1]).expand(*shape)
    return randn(*shape)


@st.composite
def cases(draw):
    K, N, R = (draw(st.integers(1, high)) for high in (9, 7, 5))
    rows = draw(st.lists(st.integers(0, 4), max_size=3))
    seed = draw(st.integers(0, 2**31))
    optional = st.booleans()
    return {
        "x": draw(tensors((*rows, K), seed)),
        "weight": draw(tensors((N, K), seed + 1)),
        "lora_A": draw(tensors((R, K), seed + 2)),
        "lora_B": draw(tensors((N, R), seed + 3)),
        "scaling": draw(st.sampled_from([1.0, 0.3, -2.5])),
        "bias": draw(tensors((N,), seed + 4)) if draw(optional) else None,
        "rank_gate": draw(tensors((R,), seed + 5)) if draw(optional) else None,
        "column_scale": draw(tensors((N,), seed + 6)) if draw(optional) else None,
        "dropout_p": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "rng": torch.tensor([seed, -seed]),
    }


def absolute(case):
    return {k: abs(v) if isinstance(v, (torch.Tensor, float)) else v for k, v in case.items()} | {
        "rng": case["rng"]
    }


def parts(case):
    """x [M, K], its dropout factors [M, K], g [R] and c [N], whatever was left out."""
    x, p = case["x"].reshape(-1, case["x"].shape[-1]), case["dropout_p"]
    factors = dropout_mask(case["rng"], *x.shape, p).double() * (0.0 if p == 1 else 1 / (1 - p))
    N, R = case["lora_B"].shape
    gate = case["rank_gate"] if case["rank_gate"] is not None else x.new_ones(R)
    scale = case["column_scale"] if case["column_scale"] is not None else x.new_ones(N)
    return x, factors, case["scaling"] * gate, scale


@EXAMPLES
@given(cases())
def test_lora_linear_is_that_of_the_merged_weight(case):
    x, factors, gate, scale = parts(case)
    adapter = torch.einsum("nr,r,rk->nk", case["lora_B"], gate, case["lora_A"])
    want = scale * (
        torch.einsum("mk,nk->mn", x, case["weight"])
        + torch.einsum("mk,nk->mn", factors * x, adapter)
    )
    if case["bias"] is not None:
        want = want + case["bias"]
    y = lora_linear(**case)
    assert y.shape == (*case["x"].shape[:-1], case["weight"].shape[0])
    terms = x.shape[1] + gate.shape[0]
    magnitude = lora_linear(**absolute(case))
    assert_near(y, want.view(y.shape), terms, magnitude)


def gradients_by_hand(case, dy):
    """Compute the ops' backward term by term."""
    x, factors, gate, scale = parts(case)
    A, B = case["lora_A"], case["lora_B"]
    P = (factors * x) @ A.T
    dZ = scale * dy
    dS = dZ @ B
    dXA = dS * gate
    z = x @ case["weight"].T + (P * gate) @ B.T
    return {
        "x": (dZ @ case["weight"] + factors * (dXA @ A)).view(case["x"].shape),
        "lora_A": dXA.T @ (factors * x),
        "lora_B": dZ.T @ (P * gate),
        "bias": dy.sum(0),
        "rank_gate": case["scaling"] * (dS * P).sum(0),
        "column_scale": (dy * z).sum(0),
    }


@EXAMPLES
@given(cases())
def test_lora_linear_gradients_are_those_by_hand(case):
    leaves = {
        key: case[key].detach().clone().requires_grad_()
        for key in ("x", "lora_A", "lora_B", "bias", "rank_gate", "column_scale")
        if case[key] is not None
    }
    y = lora_linear(**case | leaves)
    N, R = case["lora_B"].shape
    M, K = math.prod(y.shape[:-1]), case["x"].shape[-1]
    dy = torch.linspace(-1, 2, M * N, dtype=torch.float64).view(M, N)
    grads = torch.autograd.grad(y, leaves.values(), dy.view(y.shape))
    want, magnitude = gradients_by_hand(case, dy), gradients_by_hand(absolute(case), dy.abs())
    for key, grad in zip(leaves, grads, strict=True):
        assert_near(grad, want[key], M + N + K + R, magnitude[key])


@EXAMPLES
@given(cases(), st.integers(1, 4))
def test_adapters_stack_along_the_rank(case, split):
    """Two adapters are one of the summed rank whose gate carries each one's scaling."""
    R = case["lora_A"].shape[0]
    split = min(split, R)
    case |= {"rank_gate": None, "column_scale": None, "bias": None}
    first, second = (
        case | {"lora_A": case["lora_A"][ranks], "lora_B": case["lora_B"][:, ranks]}
        for ranks in (slice(split), slice(split, R))
    )
    first["scaling"], second["scaling"] = 0.7, -1.3
    second["weight"] = torch.zeros_like(case["weight"])
    gate = torch.tensor([0.7] * split + [-1.3] * (R - split), dtype=torch.float64)
    both = case | {"scaling": 1.0, "rank_gate": gate}
    y, want = lora_linear(**both), lora_linear(**first) + lora_linear(**second)
    assert_near(y, want, case["x"].shape[-1] + R, lora_linear(**absolute(both)))


@EXAMPLES
@given(cases())
def test_column_scale_scales_rows_of_both_weights(case):
    case["column_scale"] = scale = torch.linspace(-2, 3, len(case["weight"]), dtype=torch.float64)
    folded = case | {
        "column_scale": None,
        "weight": scale[:, None] * case["weight"],
        "lora_B": scale[:, None] * case["lora_B"],
    }
    terms = case["x"].shape[-1] + case["lora_A"].shape[0]
    magnitude = lora_linear(**absolute(case))
    assert_near(lora_linear(**case), lora_linear(**folded), terms, magnitude)


@EXAMPLES
@given(cases())
def test_a_zero_b_leaves_the_base_bit_for_bit(case):
    case |= {"lora_B": torch.zeros_like(case["lora_B"]), "column_scale": None, "bias": None}
    assert torch.equal(lora_linear(**case), case["x"] @ case["weight"].T)


def test_infinity_in_one_lora_A_stays_in_its_own_rows() -> None:
    x, weight, index = torch.ones(3, 4), torch.eye(4), torch.tensor([0, 1, -1])
    A, B = [torch.ones(2, 4) for _ in range(2)], [torch.ones(4, 2) for _ in range(2)]
    A[1][0, 0] = torch.inf
    y = reference.multi_lora_linear(x, weight, A, B, index, [1.0, 1.0])
    assert y[:, 0].tolist() == [9.0, torch.inf, 1.0]
    stacks = torch.eye(4).repeat(2, 1, 1), torch.stack(A), torch.stack(B)
    y = reference.lora_experts_linear(x, *stacks, torch.tensor([1, 2]))
    assert y[:, 0].tolist() == [9.0, torch.inf, 0.0]
