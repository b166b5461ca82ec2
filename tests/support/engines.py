"""A test for each engine and case. `lora_kernels.oracle.case.engine` knows the engines' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch

import lora_kernels
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import AnyCase, Case
from lora_kernels.oracle.tolerance import Comparison
from tests.support.assertions import assert_close_derived

Pairs = list[tuple[str, Case]]
TURNS = 4


def pair_cases(backend: str, strategies: Iterable[str], these: Iterable[Case]) -> Pairs:
    """Pair each case with each strategy of a backend; a case's engines follow each other, so that
    its reference is computed once."""
    names = [f"{backend} {strategy}" for strategy in strategies]
    return [(name, case) for case in these for name in names]


def each(groups: Mapping[str, Pairs], device: str = "cpu") -> pytest.MarkDecorator:
    """Parametrize a test with `engine` and `case`; an id has group, case and engine."""
    params = [
        pytest.param(engine, replace(case, device=device), id=f"{group}-{case}-{engine}")
        for group, pairs in groups.items()
        for engine, case in pairs
    ]
    return pytest.mark.parametrize(("engine", "case"), params, indirect=["engine"])


def take_turns(
    these: Sequence[AnyCase], engines: Sequence[str], apart: str = ""
) -> list[tuple[AnyCase, str, bool]]:
    """Pair each case with each engine, and say which pairs `make test` leaves to `make proof`.

    An engine runs the first case of each dtypes, and of each value of each option and layout. Of
    the other cases, which have new sizes or combinations, it runs every fourth: which, its index
    and the case's decide.

    apart: a field on which the engines have no influence, and which counts like the sizes.

    >>> few, same, many = Case(1, 4, 4, 2), Case(2, 4, 4, 2), Case(2, 4, 4, 2, bias=True)
    >>> pairs = take_turns([few, same, many], ["a", "b", "c"])
    >>> [(case.M, case.bias, engine) for case, engine, left in pairs if left]
    [(2, False, 'a'), (2, False, 'b'), (2, False, 'c')]
    """
    pairs: list[tuple[AnyCase, str, bool]] = []
    met: set[tuple[object, ...]] = set()
    for i, case in enumerate(these):
        values = {n: v for n, v in vars(case).items() if n != apart and type(v) is not int}
        dtypes = [v for v in values.values() if v is None or isinstance(v, torch.dtype)]
        traits = {*values.items(), ("dtypes", *dtypes)}
        for j, engine in enumerate(engines):
            left = (i + j) % TURNS > 0 and all((engine, *trait) in met for trait in traits)
            if not left:
                met |= {(engine, *trait) for trait in traits}
            pairs.append((case, engine, left))
    return pairs


def assert_within(what: object, verdicts: Mapping[str, Comparison]) -> None:
    """Fail unless each output is as near to the float64 reference as `tolerance` says."""
    wrong = [f"{name} {verdict}" for name, verdict in verdicts.items() if not verdict.ok]
    _fail_for(what, wrong)


def assert_near(what: object, verdicts: Mapping[str, Comparison]) -> None:
    """`assert_within` of twice the limits, for drawn cases: of some hundred, one misses by chance
    a limit that four standard errors set for usual values."""
    assert_within(
        what,
        {
            name: replace(v, rms_limit=2 * v.rms_limit, max_limit=2 * v.max_limit)
            for name, v in verdicts.items()
        },
    )


def _fail_for(what: object, wrong: Sequence[str]) -> None:
    if wrong:
        pytest.fail("\n".join([str(what), *wrong]), pytrace=False)


def check(case: AnyCase, ways: Iterable[AbstractContextManager[None]] = ()) -> None:
    """Judge y and every gradient, in each of the ways where there are several."""
    for way in ways:
        with way:
            assert_within(case, cases.judge(case))
    if not ways:
        assert_within(case, cases.judge(case))


def check_norm(case: Case) -> None:
    """Judge `dora_norm`."""
    assert_within(case, cases.judge_norm(case))


def check_strided_vectors(case: Case) -> None:
    """Compare y and every gradient, with gaps in the gate, column scale and bias, and B transposed,
    with those of contiguous operands."""
    args = cases.inputs(case)
    want = cases.run(lora_kernels.lora_linear, args)
    for name in ("rank_gate", "column_scale", "bias"):
        every_second = torch.stack([args[name].detach(), torch.full_like(args[name], 9.0)], 1)
        strided = every_second[:, 0]
        assert not strided.is_contiguous()
        args[name] = strided.requires_grad_(args[name].requires_grad)
    B = args["lora_B"].detach().t().contiguous().t()
    args["lora_B"] = B.requires_grad_(args["lora_B"].requires_grad)
    got = cases.run(lora_kernels.lora_linear, args)
    assert_close_derived(got, want, layers=1)
