"""What is no tensor, or no number, is named with what it is and what it should be."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

import lora_kernels
from lora_kernels.backends import cpu, native
from lora_kernels.functional import dora_norm

K, N, R = 6, 5, 2


def arguments() -> dict[str, Any]:
    tensors = {"x": (3, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R)}
    return {name: torch.ones(shape) for name, shape in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": [1.0]}, "x: got list, want a tensor"),
        ({"weight": "w"}, "weight: got str, want a tensor or a Weight4bit"),
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
def test_lora_linear(change: dict[str, Any], words: str) -> None:
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
def test_multi_lora_linear(change: dict[str, Any], words: str) -> None:
    given = arguments()
    given |= {name: [given[name]] for name in ("lora_A", "lora_B")}
    given["index"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=f"^{words}$"):
        lora_kernels.multi_lora_linear(**{**given, **change})


def test_dora_norm_names_what_it_has() -> None:
    given = {name: t for name, t in arguments().items() if name != "x"}
    with pytest.raises(ValueError, match="weight: got device meta, want lora_A's device cpu"):
        dora_norm(**{**given, "weight": given["weight"].to("meta")})
    with pytest.raises(TypeError, match=r"rank_gate: got torch.float64, want .* lora_A's"):
        dora_norm(**given, rank_gate=torch.ones(R, dtype=torch.float64))
    with pytest.raises(TypeError, match="scaling: got 'two', want a number"):
        dora_norm(**given, scaling="two")  # type: ignore[arg-type]


@pytest.mark.parametrize("scaling", [2, 2.0, np.float32(2), np.int64(2)], ids=type)
def test_numbers(scaling: Any) -> None:
    want = lora_kernels.lora_linear(**arguments(), scaling=2.0)
    assert torch.equal(lora_kernels.lora_linear(**arguments(), scaling=scaling), want)


@pytest.mark.parametrize("scaling", [2, [2.0], torch.tensor([2.0]), (np.float64(2),)], ids=type)
def test_numbers_of_several(scaling: Any) -> None:
    given = arguments()
    given |= {name: [given[name]] for name in ("lora_A", "lora_B")}
    given["index"] = torch.zeros(3, dtype=torch.int64)
    want = lora_kernels.lora_linear(**arguments(), scaling=2.0)
    torch.testing.assert_close(lora_kernels.multi_lora_linear(**given, scaling=scaling), want)


class Refuses:
    def __index__(self) -> int:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({33: None}, TypeError, "cannot be interpreted as an integer|an integer is required"),
        ({0: -1}, OverflowError, "negative"),
        ({6: 2**63}, OverflowError, "too (big|large)"),
        ({33: 2**40}, OverflowError, "1099511627776 does not fit its argument"),
        ({13: "codes"}, TypeError, "Codes4bit"),
        ({22: "2"}, TypeError, "must be real number"),
        ({0: -1, 1: Refuses()}, OverflowError, "negative"),  # one error, the first
    ],
)
def test_the_native_call(change: dict[int, Any], error: type[Exception], words: str) -> None:
    """Which converts its arguments itself: of no rows, no columns and no ranks."""
    assert native.module is not None
    numbers: list[Any] = [0] * 34
    numbers[13], numbers[14] = None, False
    native.module.lora_linear(*numbers)
    with pytest.raises(TypeError, match=r"^got 33 arguments, want 34$"):
        native.module.lora_linear(*numbers[1:])
    for place, got in change.items():
        numbers[place] = got
    with pytest.raises(error, match=words):
        native.module.lora_linear(*numbers)


def test_what_a_decoding_layer_looks_at() -> None:
    """`fetch` only asks for memory; `unchanged` compares what is said of objects."""
    assert native.module is not None
    places, fetch, unchanged = native.module.places, native.module.fetch, native.module.unchanged
    whole: dict[str, object] = {"a": 1, "none": None, "list": [1]}
    objects = torch.ones(2), torch.nn.Linear(1, 1).weight, whole, {}, [], None, ""
    addresses = 0, 1, torch.ones(2)._cdata, 2**64 - 1
    assert len(places(objects)) == 8 * (len(objects) + 3 * 2)  # and a dictionary's table
    assert places((whole,))[:8] == id(whole).to_bytes(8, sys.byteorder)
    assert len(places(addresses)) == 8 * 4 * len(addresses)
    for ask in (places(objects), places(addresses), b"", b"short"):
        assert fetch(ask) is None
    with pytest.raises(TypeError, match="places: want bytes"):
        fetch([whole])
    for beyond in (-1, 2**64):
        with pytest.raises(OverflowError):
            places((beyond,))

    one, x = whole["a"], torch.ones(2)
    assert unchanged((whole, whole, whole), ("a", "none", "absent"), (one, None, None), ({}, []))
    assert not unchanged((whole,), ("a",), (None,), ())
    assert not unchanged((whole,), ("absent",), (one,), ())
    assert not unchanged((whole,), ("list",), ([1],), ())  # another one
    assert not unchanged((), (), (), ({}, whole))
    assert unchanged((x, x, None), ("shape", len, lambda: "said"), ((2,), 2, "said"), ())
    for place in range(3):
        want = [(2,), 2, "said"]
        want[place] = "else"
        assert not unchanged((x, x, None), ("shape", len, lambda: "said"), tuple(want), ())
    for wrong in (((whole,), ("a",), (one,)), ([whole], ("a",), (one,), ())):
        with pytest.raises(TypeError, match="want the tuples of, what, want and empty"):
            unchanged(*wrong)
    for short in (((whole,), ("a",), (), ()), ((whole,), (), (one,), ())):
        with pytest.raises(ValueError, match="of, what and want: want one length"):
            unchanged(*short)
    with pytest.raises(AttributeError, match="absent"):
        unchanged((x,), ("absent",), (one,), ())
    with pytest.raises(TypeError, match="not callable"):
        unchanged((x,), (1,), (one,), ())
    with pytest.raises(TypeError, match="unhashable"):
        unchanged((whole,), ([],), (one,), ())
    with pytest.raises(TypeError, match="len"):
        unchanged((), (), (), (1,))


def test_where_a_tensor_lies() -> None:
    """One answer for one memory read in one way; none for what has none."""
    assert native.module is not None
    where = native.module.where
    x = torch.ones(4, 4)
    if not native.exchange:
        assert where(x) is None
        return
    assert where(x) == where(x) == where(x.view(4, 4)) == where(torch.nn.Parameter(x))
    others = (
        x.clone(), x[1:], x.t(), x[:2], x.view(2, 8), x.view(torch.int32), x[None], x[:, :2],
        x.view(-1), x.view(torch.bfloat16),
    )  # fmt: skip
    assert len({where(x), *map(where, others)}) == len(others) + 1
    assert where(x.to("meta")) is None and where(torch.ones(1, 1, 1, 1, 1)) is None
    assert where(torch.ones(2, 2).to_sparse()) is None
    assert where(1) is None and where(None) is None
    for none in (None, int):
        assert not native.module.use_exchange(none)
    assert where(x) is None
    native.module.use_exchange(torch.Tensor)
    assert where(x) is not None


@pytest.mark.usefixtures("looks")
def test_the_prepared_call() -> None:
    """For up to four rows of float32: anything else, and another fact, is for others to answer."""
    f32, (A, B) = torch.float32, (torch.ones(2, 64), torch.ones(64, 2))
    fact = {"is": True}
    rows = (4, 0, sys.maxsize, 0)
    call = cpu.Prepared(torch.eye(64), A, B, 2.0, f32, f32, rows, [(fact, "is", True)])
    x, y = torch.ones(3, 64), torch.full((3, 64), 1.0 + 2 * 2 * 64)
    assert torch.equal(call(x), y)  # type: ignore[arg-type]
    assert torch.equal(call(x.view(1, 3, 64), torch.arange(64.0)), y[None] + torch.arange(64.0))  # type: ignore[arg-type]
    others = (
        x.double(), x.to(torch.bfloat16), x.to("meta"), torch.nn.Parameter(x), x[:0],
        torch.ones(5, 64), torch.ones(3, 63), torch.ones(64, 3).t(), torch.tensor(1.0), None,
        torch._neg_view(x), torch._efficientzerotensor((3, 64)),
    )  # fmt: skip
    for other in others:
        assert call(other) is None  # type: ignore[arg-type]
    assert call(x, torch.ones(63)) is None
    fact["is"] = False
    assert call(x) is None

    fact["is"] = True
    assert not call.trains(x, None)  # no rows
    for method in (call._forward, call._trains):
        with pytest.raises(TypeError, match="want x, bias and the tuples of, what and want"):
            method(x, None, (), (), (), 1)
        with pytest.raises(ZeroDivisionError):
            method(x, None, (0,), (lambda zero: 1 / zero,), (1,))


def single_pass() -> bool:
    return native.isa in cpu.SINGLE_PASS_ISAS


@pytest.mark.skipif(not single_pass(), reason="the library makes the product")
@pytest.mark.usefixtures("looks")
def test_the_prepared_step() -> None:
    """For up to four rows as few; not 7 to 8, and of one no gradients."""
    f32, (A, B) = torch.float32, (torch.ones(2, 64), torch.ones(64, 2))
    W, fact = 3 * torch.eye(64), {"is": True}
    call = cpu.Prepared(W, A, B, 2.0, f32, f32, (4, 7, 9, 2), [(fact, "is", True)])
    for rows in (1, 2, 5, 6, 9, 40):
        x = torch.ones(rows, 64)
        assert call.trains(x, None) and call.trains(x.view(1, rows, 64), torch.ones(64))
        y, p = call.train(x.view(1, rows, 64), torch.arange(64.0))
        assert torch.equal(y[0], (3.0 + 2 * 2 * 64 + torch.arange(64.0)).expand(rows, 64))
        assert torch.equal(p, torch.full((rows, 2), 64.0))
        dy = torch.full((rows, 64), 0.5)
        facts = (fact,), ("is",), (True,)
        found = call.backward(dy, x, A, B, p, None, True, True, True, *facts)
        if rows == 1:
            assert found is None
            continue
        dx, dA, dB = found  # type: ignore[misc]
        # dS = 2 dY B = 64 of each rank.
        assert torch.equal(dx, torch.full((rows, 64), 1.5 + 128))  # type: ignore[arg-type]
        assert torch.equal(dA, torch.full((2, 64), 64.0 * rows))  # type: ignore[arg-type]
        assert torch.equal(dB, torch.full((64, 2), 64.0 * rows))  # type: ignore[arg-type]
        for wish in range(3):
            wishes = [i == wish for i in range(3)]
            one = call.backward(dy, x, A, B, p, None, *wishes, *facts)
            assert [g is not None for g in one] == wishes  # type: ignore[union-attr]
            assert torch.equal(one[wish], found[wish])  # type: ignore[index, arg-type]
        for wrong in (dy[1:], dy.t().contiguous().t(), dy.double(), dy[:, 1:], torch._neg_view(dy)):
            assert call.backward(wrong, x, A, B, p, None, True, True, True, *facts) is None
            assert call.backward(dy, wrong, A, B, p, None, True, True, True, *facts) is None
        assert (
            call.backward(dy, x, A, B, p, None, True, True, True, (fact,), ("is",), (1.5,)) is None
        )
    for rows in (0, 7, 8):
        assert not call.trains(torch.ones(rows, 64), None)
        x = dy = torch.ones(rows, 64)
        p = torch.ones(rows, 2)
        assert call.backward(dy, x, A, B, p, None, True, True, True, (), (), ()) is None
    fact["is"] = False
    assert not call.trains(torch.ones(2, 64), None)
    with pytest.raises(TypeError, match="want dy, x, A, B, P, rng, three wishes and the tuples"):
        call._backward(dy, x, A, B, p, None, True, True, True)
    with pytest.raises(TypeError, match="want x, bias and rng"):
        call._train(x, None)
    for wrong in ((torch.ones(7, 64), None), (torch.ones(2, 63), None), (x, torch.ones(63))):
        with pytest.raises(TypeError, match="x, bias: not what the call was prepared for"):
            call.train(*wrong)
    with pytest.raises(ZeroDivisionError):
        x, p, facts = torch.ones(2, 64), torch.ones(2, 2), ((0,), (lambda zero: 1 / zero,), (1,))
        call.backward(x, x, A, B, p, None, True, True, True, *facts)
