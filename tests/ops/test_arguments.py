"""Errors for an argument of a wrong type name it, its value and the wanted type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lora_kernels
from lora_kernels.backends.cpu import native
from lora_kernels.layers import LoRALinear
from lora_kernels.ops.norm import dora_norm

K, N, R = 6, 5, 2


def arguments() -> dict[str, Any]:
    tensors = {"x": (3, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R)}
    return {name: torch.ones(shape) for name, shape in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": [1.0]}, "x: got list, want a tensor"),
        ({"weight": "w"}, "weight: got str, want a tensor or a QuantizedWeight"),
        ({"lora_A": None}, "lora_A: got NoneType, want a tensor"),
        ({"lora_B": 1.0}, "lora_B: got float, want a tensor"),
        ({"bias": 0.0}, "bias: got float, want a tensor"),
        ({"rank_gate": [1.0, 1.0]}, "rank_gate: got list, want a tensor"),
        ({"column_scale": (1.0,)}, "column_scale: got tuple, want a tensor"),
        ({"scaling": "2"}, "scaling: got '2', want a number"),
        ({"scaling": True}, "scaling: got True, want a number"),
        ({"scaling": None}, "scaling: got None, want a number"),
        ({"dropout_p": "a"}, "dropout_p: got 'a', want a number"),
        ({"dropout_p": 0.5, "rng": 7}, "rng: got int, want a tensor"),
    ],
)
def test_lora_linear_of_no_tensor_or_number_raises(change: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=f"^{words}$"):
        lora_kernels.lora_linear(**{**arguments(), **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": 1}, "x: got int, want a tensor"),
        ({"lora_A": [None]}, r"lora_A\[0\]: got NoneType, want a tensor"),
        ({"index": [0, 0, 0]}, "index: got list, want a tensor of int64 or int32"),
        ({"scaling": "2"}, "scaling: got '2', want a number"),
        ({"scaling": ["2"]}, "scaling: got '2', want a number"),
    ],
)
def test_multi_lora_linear_of_no_tensor_or_number_raises(
    change: dict[str, Any], words: str
) -> None:
    given = arguments()
    given |= {name: [given[name]] for name in ("lora_A", "lora_B")}
    given["index"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=f"^{words}$"):
        lora_kernels.multi_lora_linear(**{**given, **change})


def operands(function: Any) -> dict[str, Any]:
    """Return the tensors of a valid call: vectors and indices too."""
    given = arguments()
    if function is lora_kernels.lora_linear:
        given |= {"bias": torch.ones(N), "rank_gate": torch.ones(R), "column_scale": torch.ones(N)}
    elif function is lora_kernels.multi_lora_linear:
        given |= {name: given[name][None] for name in ("lora_A", "lora_B")}
        given |= {"index": torch.zeros(3, dtype=torch.int64), "bias": torch.ones(N)}
    elif function is lora_kernels.lora_experts_linear:
        given |= {name: given[name][None] for name in ("weight", "lora_A", "lora_B")}
        given |= {"offsets": torch.tensor([3]), "bias": torch.ones(1, N)}
    elif function is lora_kernels.lora_linear_cross_entropy:
        given |= {"labels": torch.zeros(3, dtype=torch.int64), "bias": torch.ones(N)}
    else:
        del given["x"]
    return given


LAYOUTS: dict[str, Any] = {
    "torch.sparse_coo": torch.Tensor.to_sparse,
    "torch.sparse_csr": torch.Tensor.to_sparse_csr,
    "torch._mkldnn": torch.Tensor.to_mkldnn,
    "a nested tensor": lambda t: torch.nested.nested_tensor([t, t]),
    "a nested tensor ": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:.*(prototype|beta)")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "function",
    [
        lora_kernels.lora_linear,
        lora_kernels.multi_lora_linear,
        lora_kernels.lora_experts_linear,
        lora_kernels.lora_linear_cross_entropy,
        dora_norm,
    ],
)
def test_op_of_a_tensor_without_strides_raises(function: Any, layout: str) -> None:
    given = operands(function)
    function(**given)
    for name, t in given.items():
        if (layout == "torch.sparse_csr" and t.dim() < 2) or (
            layout == "torch._mkldnn" and t.dtype == torch.int64
        ):
            continue
        with pytest.raises(TypeError, match=f"^{name}: got {layout.strip()}, want a dense tensor"):
            function(**given | {name: LAYOUTS[layout](t)})


@pytest.mark.filterwarnings("ignore:.*(prototype|beta)")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [3, 100])
def test_layer_called_again_with_a_tensor_without_strides_raises(rows: int, layout: str) -> None:
    layer, x = LoRALinear(64, 64, 4).requires_grad_(False), torch.ones(rows, 64)
    layer(x), layer(x)  # the second call is a prepared one
    with pytest.raises(TypeError, match=f"^x: got {layout.strip()}, want a dense tensor"):
        layer(LAYOUTS[layout](x))


def test_dora_norm_names_what_it_has() -> None:
    given = {name: t for name, t in arguments().items() if name != "x"}
    with pytest.raises(ValueError, match="weight: got device meta, want lora_A's device cpu"):
        dora_norm(**{**given, "weight": given["weight"].to("meta")})
    with pytest.raises(TypeError, match=r"rank_gate: got torch.float64, want .* lora_A's"):
        dora_norm(**given, rank_gate=torch.ones(R, dtype=torch.float64))
    with pytest.raises(TypeError, match="scaling: got 'two', want a number"):
        dora_norm(**given, scaling="two")  # type: ignore[arg-type]


@pytest.mark.parametrize("scaling", [2, 2.0, np.float32(2), np.int64(2)], ids=type)
def test_lora_linear_of_any_number_as_scaling_is_the_same(scaling: Any) -> None:
    want = lora_kernels.lora_linear(**arguments(), scaling=2.0)
    assert torch.equal(lora_kernels.lora_linear(**arguments(), scaling=scaling), want)


@pytest.mark.parametrize("scaling", [2, [2.0], torch.tensor([2.0]), (np.float64(2),)], ids=type)
def test_multi_lora_linear_of_any_numbers_as_scaling_is_the_same(scaling: Any) -> None:
    given = arguments()
    given |= {name: [given[name]] for name in ("lora_A", "lora_B")}
    given["index"] = torch.zeros(3, dtype=torch.int64)
    want = lora_kernels.lora_linear(**arguments(), scaling=2.0)
    torch.testing.assert_close(lora_kernels.multi_lora_linear(**given, scaling=scaling), want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"p": 1.5}, r"p: got 1\.5, want a probability in \[0, 1\]"),
        ({"p": -0.5}, r"p: got -0\.5, want a probability in \[0, 1\]"),
        ({"p": float("nan")}, r"p: got nan, want a probability in \[0, 1\]"),
        ({"p": "0.5"}, "p: got '0.5', want a number"),
        ({"rng": [1, 2]}, "rng: got list, want a tensor"),
        ({"rng": torch.tensor([1])}, r"rng: got torch.int64 \[1\], want int64 \[2\]: seed and"),
        ({"rng": torch.tensor([1, 2, 3])}, r"rng: got torch.int64 \[3\], want int64 \[2\]"),
        ({"rng": torch.tensor([1, 2]).int()}, r"rng: got torch.int32 \[2\], want int64 \[2\]"),
    ],
)
def test_dropout_mask_of_no_state_or_probability_raises(change: dict[str, Any], words: str) -> None:
    given = {"rng": torch.tensor([1, 2]), "M": 2, "K": 3, "p": 0.5}
    with pytest.raises((TypeError, ValueError), match=words):
        lora_kernels.dropout_mask(**(given | change))


class Refuses:
    def __index__(self) -> int:
        raise ZeroDivisionError


EMPTY = (0, 0, 0, 1)  # a matrix
LAYER: tuple[Any, ...] = (
    *(None, None, 0, 0, 0, 0, EMPTY, EMPTY),
    *(1.0, 0, 0, 0, (0, 0, 0), 1.0, 1),
)
FORWARD: tuple[Any, ...] = (EMPTY, EMPTY, False, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("layer", "forward", "error", "words"),
    [
        ({}, {6: None}, TypeError, "z: .*(interpreted as an integer|integer is required)"),
        ({}, {3: -1}, OverflowError, "p: .*negative"),
        ({3: 2**63}, {}, OverflowError, "K: .*too (big|large)"),
        ({14: 2**40}, {}, OverflowError, "threads: 1099511627776 does not fit"),
        ({1: "codes"}, {}, TypeError, "codes: got .*str.*, want .*Codes"),
        ({8: "2"}, {}, TypeError, "scaling: must be real number"),
        ({6: (0, 0)}, {}, TypeError, "lora_A: got 2 values, want more: no row"),
        ({6: (0, 0, 0, 1, 0)}, {}, TypeError, "lora_A: got 5 values, want 4"),
        ({}, {0: [0, 0, 0, 1]}, TypeError, "x: got .*list.*, want a tuple"),
        ({}, {3: -1, 4: Refuses()}, OverflowError, "p: .*negative"),  # one error, the first
    ],
)
def test_native_call_of_bad_arguments_raises(
    layer: dict[int, Any], forward: dict[int, Any], error: type[Exception], words: str
) -> None:
    """The binding converts its arguments itself: no rows, no columns and no ranks."""
    assert native.module is not None
    native.module.lora_linear(LAYER, FORWARD)
    with pytest.raises(TypeError, match=r"^got 1 values, want more: no argument$"):
        native.module.lora_linear(LAYER)
    with pytest.raises(TypeError, match=r"^got 3 values, want 2$"):
        native.module.lora_linear(LAYER, FORWARD, 0)
    changed = (
        tuple(change.get(i, value) for i, value in enumerate(whole))
        for whole, change in ((LAYER, layer), (FORWARD, forward))
    )
    with pytest.raises(error, match=f"^argument: {words}"):
        native.module.lora_linear(*changed)


def test_exchange_is_of_torchs_tensors_alone() -> None:
    module = native.module
    assert module is not None
    for none in (None, int):
        assert not module.use_exchange(none)
    assert module.use_exchange(torch.Tensor) == native.exchange


@pytest.mark.usefixtures("looks")
def test_native_direct_calls_of_bad_arguments_raise_or_are_none() -> None:
    module = native.module
    assert module is not None
    x, W, A, B = torch.ones(3, 64), torch.eye(64), torch.ones(2, 64), torch.ones(64, 2)
    operands: tuple[Any, ...] = W, A, B, None, 2.0, None
    y = module.direct_forward(x, *operands, None, False)
    assert torch.equal(y, torch.full((3, 64), 1.0 + 2 * 2 * 64))
    _, p, rng = module.direct_forward(x.view(1, 3, 64), *operands, None, True)
    assert torch.equal(p, torch.full((3, 2), 64.0)) and rng is None
    others = [x.double(), x.to("meta"), x[:0], None, 1, x.to_sparse(), torch.ones(64, 3).t()]
    others += [*map(torch.ones, ((3, 63), ())), torch._efficientzerotensor((3, 64))]
    others += [torch.ones((1,) * 9 + (64,))]
    for other in others:
        assert module.direct_forward(other, *operands, None, True) is None
        assert module.direct_backward(other, *operands, x, p, True, True, True, True) is None
    with pytest.raises(TypeError, match="got 8 values, want more: no keeps_p"):
        module.direct_forward(x, *operands, None)
    with pytest.raises(TypeError, match="scaling: must be real number"):
        module.direct_forward(x, W, A, B, None, "2", None, None, False)
    with pytest.raises(ZeroDivisionError):
        drawn = (lambda x: 1 / 0, 1, 1.0)
        module.direct_forward(x, W, A, B, None, 2.0, drawn, None, False)
    with pytest.raises(ValueError, match=r"rng: want int64 \[2\]"):
        module.direct_forward(x, W, A, B, None, 2.0, (torch.ones(2), 1, 1.0), None, False)


def test_multi_lora_linear_index_of_another_shape_raises() -> None:
    """An index of as many elements as x has rows would pair rows with wrong adapters."""
    A, B, index = torch.ones(1, 2, 4), torch.ones(1, 5, 2), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"index: got shape \[3, 2\], want x's \[2, 3\]"):
        lora_kernels.multi_lora_linear(torch.ones(2, 3, 4), None, A, B, index)
