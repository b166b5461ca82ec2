"""The head's loss and log-probabilities against the float64 reference; compilers; errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from random import Random
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lora_kernels
from lora_kernels import lora_linear, lora_linear_cross_entropy, lora_linear_log_probs, reference
from lora_kernels.backends.cpu import native
from lora_kernels.backends.eager import head
from lora_kernels.bench import counter
from lora_kernels.core import call
from lora_kernels.core.codes import Codes
from lora_kernels.ops import head as head_op
from lora_kernels.ops import linear, registry
from lora_kernels.oracle import case as cases
from lora_kernels.oracle import head_case
from lora_kernels.oracle.case import EAGERS, STATISTICS, inputs, judge, oracle, run
from lora_kernels.oracle.head_case import HeadCase
from tests.ops.engines import engines_in_turn, every_engine
from tests.support.allocations import Casts, Results
from tests.support.assertions import assert_as_exact
from tests.support.engines import assert_near, assert_within

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SMALL = HeadCase(23, 65, 40, 5, chunk_rows=5)  # V, K and the chunks are off every tile
KINDS = ("mean", "sum", "none", "log_probs")
GRADIENTS = {"x": "dx", "weight": "dW", "lora_A": "dA", "lora_B": "dB", "bias": "dbias"}


def some_cases() -> list[HeadCase]:
    found = []
    for dtype, of in itertools.product((f32, bf16, f16), KINDS):
        case = replace(SMALL, dtype=dtype, of=of)
        found += [
            case,
            replace(case, adapter_dtype=f32, bias=False, logit_softcap=3.0, logit_scale=0.75),
            replace(
                case, trained_weight=True, label_smoothing=0.1, temperature=0.7, logit_scale=1.5
            ),
        ]
    for of in KINDS:
        case = replace(SMALL, of=of)
        found += [
            replace(case, quant="nf4-64-nested", K=64, dtype=bf16, adapter_dtype=f32),
            replace(case, adapter=False, trained_weight=True, logit_softcap=5.0),
            replace(case, adapter=False, quant="nf4-64", K=64, bias=False),
            replace(case, quant="nvfp4-16-nested", K=80, dtype=bf16),
            replace(case, ignored=0.0, chunk_rows=None),
            replace(case, autocast=bf16, trained_weight=True),
            replace(case, V=2, label_smoothing=0.3),
            *(replace(case, frozen=(name,)) for name in ("x", "lora_A", "lora_B", "bias")),
            replace(case, frozen=("x", "lora_A", "lora_B", "bias"), trained_weight=True),
        ]
    return found


def argument_names(op: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.lora_kernels, op).default._schema.arguments]


@engines_in_turn(some_cases(), apart="of")
def test_head_of_each_case_is_within_tolerance(case: HeadCase, engine: str) -> None:
    assert_within(case, judge(case))


@pytest.mark.parametrize("engine", EAGERS, indirect=True)
@pytest.mark.parametrize("of", KINDS)
@pytest.mark.parametrize("quant", ["", "fp4-32"])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_head_with_dropout_is_within_tolerance(
    ignored: float, quant: str, of: str, engine: str
) -> None:
    case = replace(SMALL, of=of, K=64, dropout_p=0.25, temperature=1.5, ignored=ignored)
    assert_within(case, judge(replace(case, quant=quant, trained_weight=not quant)))


def test_case_hands_each_field_to_the_function_and_to_its_gradients() -> None:
    """Otherwise the tolerances above would judge less than their cases say."""
    fields = {"temperature": 0.7, "logit_scale": 0.75, "logit_softcap": 3.0, "dropout_p": 0.25}
    case = replace(SMALL, of="log_probs", trained_weight=True, **fields)
    args = inputs(case)
    assert {name: args[name] for name in fields} == fields
    first = run(HeadCase.op, args)
    assert set(first) == {*STATISTICS, *GRADIENTS.values()}
    args["dy"][1].zero_()  # the entropy's
    second = run(HeadCase.op, args)
    assert all(not torch.equal(first[n], second[n]) for n in GRADIENTS.values())
    assert {u for u, _ in case.allowances().values()} == {2.0**-24}


def test_head_with_dropout_of_a_forced_cpu_backend_raises() -> None:
    """The eager backend alone takes the rows of a mask."""
    args = arguments(replace(SMALL, dropout_p=0.25))
    with lora_kernels.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was requested"):
        lora_linear_cross_entropy(**args)


def test_losses_of_a_vocabulary_of_one_are_zero() -> None:
    args = arguments(replace(SMALL, V=1, of="none"))
    args["bias"] = None
    assert not lora_linear_cross_entropy(**args).any()


def arguments(case: HeadCase) -> dict[str, Any]:
    args = inputs(case)
    del args["dy"]
    return args


@every_engine
@pytest.mark.parametrize("of", KINDS)
@pytest.mark.parametrize("M", [0, 6])
def test_head_of_ignored_rows_alone_has_zero_gradients(M: int, of: str, engine: str) -> None:
    """PyTorch's mean over no rows is NaN, beside gradients of zero."""
    case = replace(SMALL, M=M, of=of, ignored=1.0, trained_weight=True)
    args = inputs(case)
    assert bool((args["labels"] == head_case.IGNORED).all())
    got, want = run(HeadCase.op, args), run(head_case.plain_pytorch, args)
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in want.items()}
    assert not any(t.any() for t in got.values())
    if of in ("mean", "sum"):
        loss = HeadCase.op(**arguments(case))
        assert loss.isnan() if of == "mean" else loss == 0


def test_head_takes_leading_dimensions_and_int32_labels() -> None:
    args = arguments(replace(SMALL, M=24, of="none"))
    want = lora_linear_cross_entropy(**args)
    args["x"], labels = args["x"].view(2, 3, 4, -1), args["labels"].view(2, 3, 4)
    got = lora_linear_cross_entropy(**{**args, "labels": labels.to(torch.int32)})
    assert got.shape == (2, 3, 4) and torch.equal(got.flatten(), want)


def test_log_probs_top1_is_the_first_largest_logit() -> None:
    x = torch.tensor([[1.0, 1.0], [3.0, 3.0], [1.0, 1.0]])  # the second row has the largest of all
    weight, labels = torch.tensor([[1.0, 0], [2, 0], [2, 0], [0, 0]]), torch.tensor([1, 2, -100])
    found = lora_linear_log_probs(x, weight, None, None, labels)
    assert found.is_top1 is not None and found.is_top1.tolist() == [True, False, False]
    assert found.mean_logits is None and found.log_sum_sq_probs is None
    *_, is_top1 = reference.lora_linear_log_probs(x, weight, None, None, labels)
    assert is_top1.tolist() == [True, False, False]


def test_losses_of_large_logits_are_finite() -> None:
    """exp(1000) overflows, and log(exp(-1000)) underflows."""
    x, weight = torch.tensor([[1000.0], [1000.0]], requires_grad=True), torch.tensor([[1.0], [-1]])
    labels = torch.tensor([0, 1])
    loss = lora_linear_cross_entropy(x, weight, None, None, labels, reduction="none")
    assert loss.tolist() == [0.0, 2000.0]
    assert lora_linear_log_probs(x, weight, None, None, labels).log_probs.tolist() == [0.0, -2000.0]
    for reduction in ("none", "sum"):
        loss = lora_linear_cross_entropy(x, weight, None, None, labels, reduction=reduction)
        assert loss.sum() == 2000.0
        (dx,) = torch.autograd.grad(loss.sum(), x)
        assert dx.flatten().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("of", KINDS)
def test_gradcheck_of_head_passes(of: str) -> None:
    case = HeadCase(5, 7, 4, 2, of, f64, dropout_p=0.25, trained_weight=True, chunk_rows=2)
    case = replace(case, label_smoothing=0.1, temperature=0.6, logit_softcap=2.0, logit_scale=1.5)
    args = arguments(case)
    names = [name for name in GRADIENTS if args[name].requires_grad]

    def run_with(*tensors: Tensor) -> Any:
        found = HeadCase.op(**{**args, **dict(zip(names, tensors, strict=True))})
        return found if isinstance(found, Tensor) else found[:2]

    assert torch.autograd.gradcheck(run_with, [args[name] for name in names])


@pytest.mark.parametrize("of", KINDS)
def test_head_differentiated_again_gives_the_same_and_twice_raises(of: str) -> None:
    args = arguments(replace(SMALL, of=of))
    found = HeadCase.op(**args)
    y = found if isinstance(found, Tensor) else found[0]
    dy = torch.ones_like(y).requires_grad_()
    first, second = (torch.autograd.grad(y, args["x"], dy, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    (dx,) = torch.autograd.grad(y, args["x"], dy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("quant", "of"),
    [
        pytest.param(quant, of, marks=[pytest.mark.proof] if (i + j) % 2 else [])
        for i, quant in enumerate(("", "nf4-64"))
        for j, of in enumerate(KINDS)
    ],
)
def test_head_compiled_whole_has_the_same_bits(quant: str, of: str) -> None:
    case = replace(SMALL, of=of, K=64, quant=quant, dropout_p=0.25, trained_weight=not quant)
    args = inputs(case)
    want = run(HeadCase.op, args)
    compiled = torch.compile(HeadCase.op, fullgraph=True, backend="aot_eager", dynamic=True)
    got = run(compiled, args)
    assert all(torch.equal(got[name], want[name]) for name in want)


def op_arguments(case: HeadCase, name: str) -> tuple[Any, ...]:
    args = arguments(case)
    weight = args["weight"]
    base = tuple(weight.codes) if case.quant else (weight,)
    x, A, B, bias = (args[n].detach() for n in ("x", "lora_A", "lora_B", "bias"))
    spec = call.HeadSpec(1.25, 0.25, x.dtype, x.dtype, 0.9, 3.0, 1.2, 0.1, head_case.IGNORED, 5)
    operands = x, *base, A, B, args["labels"], bias, args["rng"], None, *spec
    if name == "lora_log_probs":
        return *operands, True, False, True, True
    needs = True, not case.quant, not case.quant, True, True
    rows = torch.rand(5, x.shape[0]).unbind() if name == "lora_log_probs_backward" else ()
    return *rows, *operands, *needs


OPS = ("lora_cross_entropy", "lora_log_probs", "lora_log_probs_backward")


@pytest.mark.parametrize(("quant", "dtype"), [("", f32), ("nf4-64", bf16)], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_head_ops_passes(name: str, quant: str, dtype: torch.dtype) -> None:
    args = op_arguments(replace(SMALL, K=64, quant=quant, dtype=dtype, dropout_p=0.25), name)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    op = getattr(torch.ops.lora_kernels, name + "_quantized" * bool(quant)).default
    torch.library.opcheck(op, args, test_utils=checks)


@pytest.mark.parametrize("name", OPS)
def test_head_makes_no_tensor_larger_than_a_chunk(name: str) -> None:
    V, K, rows = 3000, 4, 5
    args = op_arguments(HeadCase(64, V, K, 2, ignored=0.0, dropout_p=0.25), name)
    with Results() as found:
        registry.IMPLEMENTATIONS[name](*args)
    assert max(found.bytes) == rows * V * 4


@pytest.mark.parametrize("name", OPS)
def test_chunks_of_the_default_number_of_rows_fit_in_its_bytes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number comes from the vocabulary, and from the limit of a CPU."""
    monkeypatch.setattr(head, "CHUNK_BYTES", limit := 1 << 18)
    monkeypatch.setattr(head, "FEWEST_ROWS", 1)
    args = op_arguments(HeadCase(64, 3000, 4, 2, ignored=0.0, dropout_p=0.25), name)
    at = argument_names(name).index("chunk_rows")
    with Results() as found:
        registry.IMPLEMENTATIONS[name](*args[:at], 0, *args[at + 1 :])
    assert limit / 2 < max(found.bytes) <= limit


@pytest.mark.parametrize(("backend", "dropout_p"), [("eager", 0.0), ("cpu", 0.0), (None, 0.25)])
@pytest.mark.parametrize("name", OPS)
def test_eager_head_decodes_a_4bit_weight_once(
    name: str, backend: str | None, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each of the five chunks. Kernels that read codes get no dense copy."""
    decoded: list[Any] = []
    dense = head_op.decoder.dense

    def note(weight: Codes, shape: tuple[int, int], *args: Any, **kwargs: Any) -> Tensor:
        if not kwargs:  # of a panel
            decoded.append(shape)
        return dense(weight, shape, *args, **kwargs)

    monkeypatch.setattr(head_op.decoder, "dense", note)
    case = replace(SMALL, K=64, quant="nf4-64", dropout_p=dropout_p)
    args = list(op_arguments(case, name))
    at = argument_names(name + "_quantized").index("dropout_p")
    args[at] = dropout_p
    if backend == "cpu" and native.module is None:
        pytest.skip("no native kernels")
    with lora_kernels.backend(backend) if backend else nullcontext():
        registry.IMPLEMENTATIONS[name + "_quantized"](*args)
    assert decoded == [(65, 64)] * (backend != "cpu")  # with dropout the eager backend runs


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("name", OPS)
def test_head_under_autocast_casts_the_weight_once(name: str, backend: str) -> None:
    """Not once for each of the five chunks."""
    if backend == "cpu" and native.module is None:
        pytest.skip("no native kernels")
    args = list(op_arguments(replace(SMALL, ignored=0.0), name))
    names = argument_names(name)
    args[names.index("dropout_p")] = 0.0
    for dtype in ("dtype", "y_dtype"):
        args[names.index(dtype)] = bf16
    with lora_kernels.backend(backend), Casts() as casts:
        registry.IMPLEMENTATIONS[name](*args)
    assert casts.sizes.count(SMALL.V * SMALL.K) == 1


@pytest.mark.parametrize("of", KINDS)
def test_head_s_step_under_autocast_casts_the_weight_once_on_a_gpu(of: str) -> None:
    """A step's bytes, counted on meta: forward and backward take one copy of the weight."""
    case = HeadCase(64, 300, 40, 5, of=of, chunk_rows=16)
    args = {
        name: t.detach().to("meta").requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for name, t in arguments(case).items()
    }
    args["weight"].requires_grad_(False)
    log: list[counter.Kernel] = []
    with counter.autocast(bf16):
        y = []
        counter.count(lambda: y.append(HeadCase.op(**args)), log)
    loss = y[0].log_probs if of == "log_probs" else y[0]
    counter.count(lambda: loss.sum().backward(), log)
    read, written = 4 * case.V * case.K, 2 * case.V * case.K
    casts = [k for k in log if "_to_copy" in k.op and (k.read, k.written) == (read, written)]
    assert len(casts) == 1
    assert sum(".mm." in k.op or ".addmm" in k.op for k in log) > 4  # one a chunk, at least


@pytest.mark.parametrize(
    ("reason", "gigabytes", "kernels", "peak"),
    [(None, 36.8, 132, 351.1), ("PyTorch's ops", 93.9, 468, 469.8)],
    ids=["Triton's kernel", "PyTorch's ops"],
)
def test_step_of_a_large_head_moves_few_bytes(
    reason: str | None, gigabytes: float, kernels: int, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: 8192 rows of Llama's head. docs/head.md has these numbers."""
    monkeypatch.setattr(head, "kernel_reasons", {("meta", None): reason})
    M, K, V, R = 8192, 4096, 128256, 16
    sizes = {"x": (M, K), "weight": (V, K), "lora_A": (R, K), "lora_B": (V, R)}
    args = {name: torch.empty(size, dtype=bf16, device="meta") for name, size in sizes.items()}
    trained = [args[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    labels = torch.zeros(M, dtype=torch.int64, device="meta")
    count = counter._Counter([])
    loss = count.run(lambda: lora_linear_cross_entropy(**args, labels=labels, scaling=2.0))
    forward = count.traffic()
    count.run(lambda: torch.autograd.grad(loss, trained))
    backward = count.traffic()
    assert gigabytes - 1 < (forward.bytes + backward.bytes) / 1e9 <= gigabytes
    assert forward.kernels + backward.kernels <= kernels
    assert max(forward.peak, backward.peak) / 1e6 <= peak


@pytest.mark.parametrize("of", KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("outputs", [(), ("entropy",)])
def test_one_chunk_of_a_head_is_alive_at_a_time(
    outputs: tuple[str, ...], dtype: torch.dtype, softcap: float | None, of: str
) -> None:
    """Four chunks have the peak of one."""
    M, V, K = 16, 4096, 8
    x, W = (torch.empty(n, K, dtype=dtype, device="meta").requires_grad_() for n in (M, V))
    labels = torch.zeros(M, dtype=torch.int64, device="meta")

    def peaks(rows: int) -> list[float]:
        count, args = counter._Counter([]), (x[:rows], W.detach(), None, None, labels[:rows])
        options: Any = {"logit_softcap": softcap, "chunk_rows": 4}
        if of == "log_probs":
            found = count.run(lambda: lora_linear_log_probs(*args, **options, outputs=outputs))
            y = sum(t.sum() for t in (found.log_probs, found.entropy) if t is not None)
        else:
            y = count.run(lambda: lora_linear_cross_entropy(*args, **options, reduction=of)).sum()
        forward = count.traffic()
        count.run(lambda: torch.autograd.grad(y, x))
        return [forward.peak, count.traffic().peak]

    row = 4 * V  # bytes
    for one, four in zip(peaks(4), peaks(16), strict=True):
        assert four < one + row and one < (5 if softcap else 4) * 4 * row


def test_chunk_rows_default_is_a_number_of_bytes() -> None:
    for on_gpu, limit in ((False, head.CHUNK_BYTES), (True, head.CHUNK_BYTES_ON_GPU)):
        rows = head.chunk_rows(20_000, on_gpu)
        assert rows * 20_000 * 4 <= limit < (rows + 1) * 20_000 * 4
        assert head.chunk_rows(10**9, on_gpu) == head.FEWEST_ROWS


def test_forced_backend_of_log_probs_forward_runs_its_backward() -> None:
    case = replace(SMALL, of="log_probs", dtype=bf16)
    args = arguments(case)
    results = []
    for outside in (False, True):
        with lora_kernels.backend("eager"):
            found = HeadCase.op(**args)
            if not outside:
                results.append(torch.autograd.grad(found[0].sum(), args["x"])[0])
        if outside:
            results.append(torch.autograd.grad(found[0].sum(), args["x"])[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("of", ["none", "log_probs"])
def test_head_that_a_forced_backend_began_is_decoded_once_in_its_backward(
    of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(replace(SMALL, K=64, quant="nf4-64", of=of))
    with lora_kernels.backend("eager"):
        found = HeadCase.op(**args)
    decoded: list[Any] = []
    dense = head_op.decoder.dense
    monkeypatch.setattr(
        head_op.decoder, "dense", lambda *given: decoded.append(given[1]) or dense(*given)
    )
    torch.autograd.grad((found[0] if of == "log_probs" else found).sum(), args["x"])
    assert decoded == [(65, 64)]


@pytest.mark.parametrize("of", KINDS)
def test_4bit_head_is_decoded_to_the_compute_dtype(
    of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(replace(SMALL, K=64, quant="nf4-64", of=of, dtype=bf16))
    decoded: list[torch.dtype] = []
    dense = head_op.decoder.dense
    monkeypatch.setattr(
        head_op.decoder, "dense", lambda *given: decoded.append(given[2]) or dense(*given)
    )
    with lora_kernels.backend("eager"):
        HeadCase.op(**args, compute_dtype=f32)
    assert decoded == [f32]


BAD: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "x: got shape [23, 41]": ({"x": torch.randn(23, 41)}, ValueError),
    "x: got torch.int64": ({"x": torch.ones(23, 40, dtype=torch.int64)}, TypeError),
    "weight: got NoneType": ({"weight": None}, TypeError),
    "x: got shape []": ({"x": torch.tensor(1.0)}, ValueError),
    "weight: got shape [65]": ({"weight": torch.ones(65)}, ValueError),
    "weight: got shape [0, 40]": ({"weight": torch.ones(0, 40)}, ValueError),
    "weight: got torch.bfloat16": ({"weight": torch.ones(65, 40).bfloat16()}, TypeError),
    "lora_B: got None, want a tensor, or None for both": ({"lora_B": None}, TypeError),
    "lora_A: got None, want a tensor, or None for both": ({"lora_A": None}, TypeError),
    "lora_A: got device meta": ({"lora_A": torch.ones(5, 40, device="meta")}, ValueError),
    "lora_B: got torch.float64": ({"lora_B": torch.ones(65, 5, dtype=f64)}, TypeError),
    "lora_A: got shape [5, 39]": ({"lora_A": torch.ones(5, 39)}, ValueError),
    "lora_B: got shape [65, 4], want [65, 5]": ({"lora_B": torch.ones(65, 4)}, ValueError),
    "labels: got torch.float32": ({"labels": torch.ones(23)}, TypeError),
    "labels: got shape [22]": ({"labels": torch.ones(22, dtype=torch.int64)}, ValueError),
    "labels: got 65, want 0 to 64, or -7": ({"labels": torch.arange(43, 66)}, ValueError),
    "labels: got -100, want 0 to 64": ({"labels": torch.full((23,), -100)}, ValueError),
    "labels: got device meta": (
        {"labels": torch.ones(23, dtype=torch.int64, device="meta")},
        ValueError,
    ),
    "bias: got shape [64]": ({"bias": torch.ones(64)}, ValueError),
    "chunk_rows: got 0": ({"chunk_rows": 0}, ValueError),
    "chunk_rows: got '5'": ({"chunk_rows": "5"}, ValueError),
    "logit_softcap: got -1": ({"logit_softcap": -1.0}, ValueError),
    "logit_softcap: got 0.0": ({"logit_softcap": 0.0}, ValueError),
    "logit_softcap: got nan": ({"logit_softcap": float("nan")}, ValueError),
    "logit_scale: got 'a'": ({"logit_scale": "a"}, TypeError),
    "scaling: got None": ({"scaling": None}, TypeError),
    "dropout_p: got 2": ({"dropout_p": 2.0}, ValueError),
}
BAD_LOSS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "reduction: got 'median', want one of mean, sum, none": ({"reduction": "median"}, ValueError),
    "label_smoothing: got 1.5": ({"label_smoothing": 1.5}, ValueError),
    "label_smoothing: got nan": ({"label_smoothing": float("nan")}, ValueError),
}
BAD_LOG_PROBS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "temperature: got 0.0": ({"temperature": 0.0}, ValueError),
    "temperature: got nan": ({"temperature": float("nan")}, ValueError),
    "outputs: got 'logits', want some of entropy": ({"outputs": ("logits",)}, ValueError),
}


@pytest.mark.parametrize("message", [*BAD, *BAD_LOSS])
def test_cross_entropy_of_a_bad_argument_names_it(message: str) -> None:
    changed, error = (BAD | BAD_LOSS)[message]
    with pytest.raises(error) as raised:
        lora_linear_cross_entropy(**{**arguments(SMALL), **changed})
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("message", [*BAD, *BAD_LOG_PROBS])
def test_log_probs_of_a_bad_argument_names_it(message: str) -> None:
    changed, error = (BAD | BAD_LOG_PROBS)[message]
    with pytest.raises(error) as raised:
        lora_linear_log_probs(**{**arguments(replace(SMALL, of="log_probs")), **changed})
    assert str(raised.value).startswith(message)


def test_label_smoothing_of_one_is_pytorchs() -> None:
    """The label counts for nothing beside the mean of all."""
    case = replace(SMALL, label_smoothing=1.0, ignored=0.0)
    got, want = (run(f, inputs(case)) for f in (HeadCase.op, head_case.plain_pytorch))
    for name in want:  # float32 sums of 65 terms in another order
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", [(), ("entropy", "mean_logits", "log_sum_sq_probs")])
def test_statistics_without_a_gradient_require_none(outputs: tuple[str, ...]) -> None:
    """An objective of them raises; it does not train nothing in silence."""
    found = lora_linear_log_probs(
        **{**arguments(replace(SMALL, of="log_probs")), "outputs": outputs}
    )
    trained = {n for n, t in found._asdict().items() if t is not None and t.requires_grad}
    assert trained == {"log_probs", *outputs[:1]}


def test_loss_without_grad_mode_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(SMALL)
    want = lora_linear_cross_entropy(**args)
    monkeypatch.setattr(linear, "lora_linear_backward_undispatched", None)
    with torch.no_grad():
        got = lora_linear_cross_entropy(**args)
    assert torch.equal(got, want)
    with pytest.raises(TypeError):
        lora_linear_cross_entropy(**args)


@pytest.mark.parametrize("engine", EAGERS, indirect=True)
@pytest.mark.parametrize("name", OPS)
def test_head_ops_have_the_same_bits_within_autocast(name: str, engine: str) -> None:
    """A backward may be called inside the context, as reentrant checkpoints do."""
    args = op_arguments(replace(SMALL, dtype=bf16, dropout_p=0.25), name)
    op = getattr(torch.ops.lora_kernels, name).default
    want = op(*args)
    with torch.autocast("cpu", bf16):
        got = op(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True) if b.numel())


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("of", ["sum", "log_probs"])
def test_gradients_of_small_probabilities_survive_float16(of: str, is_autocast: bool) -> None:
    """exp(-15) is 3e-7, where float16 has steps of 6e-8."""
    x = torch.tensor([[1.0, 0.0]], dtype=f32 if is_autocast else f16, requires_grad=True)
    weight = torch.tensor([[15.0, 0.0], [0.0, 256.0], [0.0, 512.0]], dtype=x.dtype)
    args = x, weight, None, None, torch.tensor([0])
    with torch.autocast("cpu", f16, enabled=is_autocast):
        if of == "sum":
            y = lora_linear_cross_entropy(*args, reduction="sum")
        else:
            y = -lora_linear_log_probs(*args).log_probs
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[0, 1].item() == pytest.approx(3 * 256 * math.exp(-15), rel=2e-3)  # 4 roundings


@pytest.mark.parametrize("of", ["mean", "log_probs"])
def test_compute_dtype_of_head_is_that_of_lora_linear(of: str) -> None:
    """The base GEMM alone is in bfloat16: logits are not rounded to it."""
    args = arguments(replace(SMALL, K=64, quant="nf4-64", of=of, ignored=0.0))
    names = "weight", "lora_A", "lora_B", "scaling", "bias"
    # As many rows a call as the head takes: for few rows a kernel keeps more bits of a code.
    chunks = args["x"].split(args["chunk_rows"])
    y = torch.cat([lora_linear(x, *(args[n] for n in names), compute_dtype=bf16) for x in chunks])
    want = F.cross_entropy(y, args["labels"], reduction="none")
    found = HeadCase.op(**args, compute_dtype=bf16)
    got, want = (-found[0], want) if of == "log_probs" else (found, want.mean())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (dx,), (wanted,) = (torch.autograd.grad(t.sum(), args["x"]) for t in (got, want))
    assert (dx - wanted).norm() < 2**-7 * wanted.norm()


def test_gradients_of_log_probs_times_zero_are_zero_in_float16() -> None:
    x = torch.ones(2, 3, dtype=f16, requires_grad=True)
    weight = torch.eye(4, 3, dtype=f16)
    found = lora_linear_log_probs(x, weight, None, None, torch.tensor([0, 1]))
    (dx,) = torch.autograd.grad(found.log_probs.sum() * 0, x)
    assert dx.isfinite().all() and not dx.any()


def test_reference_cross_entropy_is_pytorchs() -> None:
    case = HeadCase(9, 13, 6, 2, dtype=f64, label_smoothing=0.2)
    args = arguments(case)
    del args["chunk_rows"]
    got = reference.lora_linear_cross_entropy(**args)
    logits = reference.lora_linear(
        *(args[n] for n in ("x", "weight", "lora_A", "lora_B", "scaling", "bias"))
    )
    want = F.cross_entropy(
        logits, args["labels"], ignore_index=head_case.IGNORED, label_smoothing=0.2
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", EAGERS, indirect=True)
def test_head_takes_a_mask_in_x_s_three_dimensions(engine: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=generator)
    W, A, B = (torch.randn(s, generator=generator) for s in ((11, 8), (2, 8), (11, 2)))
    mask = torch.rand(2, 3, 8, generator=generator) > 0.5
    labels = torch.tensor([[1, -100, 3], [4, 5, 0]])
    options: Any = {"reduction": "none", "chunk_rows": 2, "dropout_p": 0.5}
    whole = lora_linear_cross_entropy(x, W, A, B, labels, dropout_mask=mask, **options)
    flat = lora_linear_cross_entropy(
        x.view(6, 8), W, A, B, labels.view(6), dropout_mask=mask.view(6, 8), **options
    )
    assert torch.equal(whole.view(6), flat)
    dropped = F.linear(x, W) + F.linear(F.linear(x * mask * 2, A), B)
    want = F.cross_entropy(dropped.view(6, 11), labels.view(6), reduction="none")
    torch.testing.assert_close(flat, want)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(
    ("of", "scale"),
    [
        *itertools.product(("loss", "log_probs"), (1.0, 300.0, -300.0)),
        ("log_probs of a low temperature", 300.0),
    ],
)
def test_float16_gradients_of_many_rows_and_large_scales_are_finite(
    of: str, scale: float, backend: str
) -> None:
    """A chunk's sum for dA and dB, and a logit's gradient, exceed float16 before the mean."""
    generator = torch.Generator().manual_seed(0)
    M, V, K, R = 2048, 64, 32, 8
    x, W, A, B = (
        torch.randn(shape, generator=generator) * size
        for shape, size in (((M, K), 1.0), ((V, K), 0.05), ((R, K), K**-0.5), ((V, R), 0.3))
    )
    labels = torch.zeros(M, dtype=torch.int64)  # so that the rows' gradients add up

    def grads(dtype: torch.dtype) -> tuple[Tensor, ...]:
        tensors = [t.to(dtype).requires_grad_() for t in (x + 1, A / scale, B)]
        args = tensors[0], (W / scale).to(dtype), *tensors[1:], labels
        if of == "loss":
            loss = lora_linear_cross_entropy(*args, logit_scale=scale)
        else:
            of_z = {"logit_scale": scale} if of == "log_probs" else {"temperature": 1 / scale}
            loss = -lora_linear_log_probs(*args, **of_z, outputs=()).log_probs.mean()
        return torch.autograd.grad(loss, tensors)

    with lora_kernels.backend(backend):
        found = grads(f16)
    for got, want in zip(found, grads(torch.float64), strict=True):
        assert got.isfinite().all()
        assert (got.double() - want).norm() <= 2**-7 * want.norm()


def test_gradients_of_small_probabilities_times_small_gradients_survive_float16() -> None:
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[15.0, 0.0], [0.0, 256.0], [0.0, 512.0]])
    with torch.autocast("cpu", f16):
        y = -lora_linear_log_probs(x, weight, None, None, torch.tensor([0])).log_probs
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0**-12))
    assert dx[0, 1].item() == pytest.approx(2.0**-12 * 3 * 256 * math.exp(-15), rel=2e-3)


@every_engine
@pytest.mark.parametrize("of", KINDS)
@pytest.mark.parametrize("size", [2.0**12, 2.0**14])
@pytest.mark.parametrize("dtype", [f16, f32], ids=["float16", "autocast"])
def test_float16_head_with_a_large_gradient_of_x_is_as_exact_as_pytorchs(
    dtype: torch.dtype, size: float, of: str, engine: str
) -> None:
    """dx is of the weight's size: 650 or 2,600, where 65,504 is the largest float16."""
    case = replace(SMALL, of=of, dtype=dtype, autocast=f16 if dtype is f32 else None)
    args = inputs(case)
    for name, factor in (("weight", size), ("lora_A", size), ("x", 1 / size)):
        args[name] = (args[name].detach() * factor).requires_grad_(name != "weight")
    got, peer = (run(op, args, case.autocast) for op in (case.op, case.eager))
    names = "dx", "dA", "dB", "dbias"
    assert all(peer[name].isfinite().all() and got[name].isfinite().all() for name in names)
    assert peer["dx"].abs().max() > size / 64  # of 16 rows' mean, times 1.75
    ref = oracle(args, case.equation)
    assert_as_exact(*({name: found[name] for name in names} for found in (got, ref, peer)))


@pytest.mark.parametrize("quant", ["nf4-64-nested", "fp4-32", "mxfp4-32", "nvfp4-16-nested"])
def test_extrema_of_a_4bit_weight_bound_its_elements(quant: str) -> None:
    """A block's scale times the largest code is at most twice its largest element."""
    weight = inputs(replace(SMALL, K=64, quant=quant, dtype=f16))["weight"]
    low, high = head._extrema(weight.codes)
    dense = weight.dequantize(f32)
    assert low <= dense.min() and dense.max() <= high <= 2 * dense.abs().max()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_float16_gradient_of_a_mean_is_finite_where_that_of_the_sum_is_not(backend: str) -> None:
    """The sum's is 0.9 · 120,000, where 65,504 is the largest float16."""
    x = torch.tensor([[-math.log(9) / 120_000, 0.0]] * 4, dtype=f16, requires_grad=True)
    weight = torch.tensor([[60_000.0, 0.0], [-60_000.0, 0.0]], dtype=f16)
    with lora_kernels.backend(backend):
        loss = lora_linear_cross_entropy(x, weight, None, None, torch.zeros(4, dtype=torch.int64))
    (dx,) = torch.autograd.grad(loss, x)
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(
        F.cross_entropy(wide @ weight.double().t(), torch.zeros(4, dtype=torch.int64)), wide
    )
    # Logits of 1.1 and their gradients, rounded to float16: an error of 2⁻¹² · 2 · 1.1 of them.
    torch.testing.assert_close(dx.double(), want, rtol=2.0**-9, atol=0)


def entropy_of_large_weights(x: Tensor, cast: Callable[[Tensor], Tensor]) -> Tensor:
    """Half the sum of its |dz| is 6: above 1, which that of a loss is at most."""
    weight = torch.zeros(1024, 2, dtype=f16)
    weight[:, 0] = -300
    weight[0] = torch.tensor([300, 6.93])
    if x.dtype is not f16:
        log_probs = (x @ cast(weight).t()).log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum()
    labels = torch.zeros(1, dtype=torch.int64)
    found = lora_linear_log_probs(x, weight, None, None, labels, outputs=("entropy",))
    return cast(found.entropy.sum())


def loss_of_negative_scaling(x: Tensor, cast: Callable[[Tensor], Tensor]) -> Tensor:
    """The adapter's part of dx has the sign of the weight's."""
    weight = torch.zeros(64, 2, dtype=f16)
    weight[:, 0] = -300
    weight[0, 0] = 300
    lora_A, lora_B = torch.tensor([[200.0, 0.0]], dtype=f16), torch.full((64, 1), 1.5, dtype=f16)
    lora_B[0] = -1.5
    labels = torch.zeros(1, dtype=torch.int64)
    if x.dtype is f16:
        return cast(lora_linear_cross_entropy(x, weight, lora_A, lora_B, labels, -1.0))
    z = x @ cast(weight).t() - (x @ cast(lora_A).t()) @ cast(lora_B).t()
    return F.cross_entropy(z, labels)


def loss_of_capped_logits(x: Tensor, cast: Callable[[Tensor], Tensor]) -> Tensor:
    """A cap's slopes leave a sum of dz that is not 0, over weights of one sign."""
    weight, bias = torch.full((64, 2), 600, dtype=f16), torch.zeros(64, dtype=f16)
    bias[0] = -30
    labels = torch.zeros(1, dtype=torch.int64)
    if x.dtype is f16:
        caps = {"bias": bias, "logit_softcap": 3.0}
        return cast(lora_linear_cross_entropy(x, weight, None, None, labels, **caps))
    z = 3 * torch.tanh((x @ cast(weight).t() + cast(bias)) / 3)
    return F.cross_entropy(z, labels)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(
    ("of", "x"),
    [
        (entropy_of_large_weights, (0.0, 1.0)),
        (loss_of_negative_scaling, (0.0, 1.0)),
        (loss_of_capped_logits, (0.0, 0.0)),
    ],
)
def test_float16_gradient_of_x_near_its_bound_is_finite(
    of: Any, x: tuple[float, ...], backend: str
) -> None:
    narrow = torch.tensor([x], dtype=f16, requires_grad=True)
    wide = narrow.detach().double().requires_grad_()
    with lora_kernels.backend(backend):
        (dx,) = torch.autograd.grad(of(narrow, lambda t: t), narrow)
    (want,) = torch.autograd.grad(of(wide, Tensor.double), wide)
    # Logits below 8 are rounded by 2⁻⁹, so probabilities by 2⁻⁸ of themselves; dz and dx by 2⁻¹¹.
    torch.testing.assert_close(dx.double(), want, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("dtype", [f16, bf16, f32], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("outputs", [(), ("entropy",)])
def test_gradient_that_an_ignored_row_gets_counts_for_nothing(
    outputs: tuple[str, ...], bad: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, generator=generator).to(dtype).requires_grad_()
    W = (torch.randn(40, 16, generator=generator) / 4).to(dtype)
    labels = torch.tensor([1, -100, 3, 4])

    def grad(of_ignored: float) -> Tensor:
        found = lora_linear_log_probs(x, W, None, None, labels, outputs=outputs)
        dy = torch.tensor([1.0, of_ignored, -2.0, 0.5])
        given = [y for y in (found.log_probs, found.entropy) if y is not None]
        return torch.autograd.grad(given, x, [dy.to(y.dtype) for y in given])[0]

    assert torch.equal(grad(bad), grad(0.0))


@pytest.mark.parametrize("dtype", [torch.float64, f32, bf16], ids=str)
@pytest.mark.parametrize("M", [0, 3])
def test_loss_of_ignored_rows_alone_has_the_dtype_of_any_loss(M: int, dtype: torch.dtype) -> None:
    shapes = (3, 8), (5, 8), (2, 8), (5, 2)
    x, *others = (torch.randn(shape, dtype=dtype) for shape in shapes)
    labels, ignored = torch.tensor([1, 2, 3]), torch.full((M,), -100)
    want = lora_linear_cross_entropy(x, *others, labels, reduction="sum").dtype
    for reduction in ("sum", "mean"):
        got = lora_linear_cross_entropy(x[:M], *others, ignored, reduction=reduction)
        assert got.dtype == want


@pytest.mark.parametrize("chunk_rows", [1, 8, None])
def test_gradient_of_a_float32_weight_under_autocast_is_summed_in_float32(
    chunk_rows: int | None,
) -> None:
    M, V, K = 64, 4, 16
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(128, 256, (M, K), generator=generator).float()  # whole in bfloat16
    W, labels = (
        torch.zeros(V, K, requires_grad=True),
        torch.randint(0, V, (M,), generator=generator),
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = lora_linear_cross_entropy(
            x, W, None, None, labels, reduction="sum", chunk_rows=chunk_rows
        )
    dz = torch.full((M, V), 0.25)  # exact, as -0.75 is
    dz[torch.arange(M), labels] -= 1
    assert torch.equal(torch.autograd.grad(loss, W)[0], dz.t() @ x)


@pytest.mark.parametrize("share", [0.0, 1e-3])
def test_entropy_alone_in_float16_has_finite_gradients(share: float) -> None:
    """The factor that keeps small probabilities must not overflow by the entropy's gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, generator=generator).half().requires_grad_()
    W = torch.randn(40, 16, generator=generator).half() / 4
    labels = torch.arange(4)

    def grad(t: Tensor, weight: Tensor) -> Tensor:
        found = lora_linear_log_probs(t, weight, None, None, labels)
        assert found.entropy is not None
        objective = found.entropy.sum() + share * found.log_probs.sum()
        return torch.autograd.grad(objective, t)[0]

    got = grad(x, W)
    want = grad(x.detach().double().requires_grad_(), W.double())
    assert got.isfinite().all()
    assert (got.double() - want).norm() <= 2**-8 * want.norm()  # several roundings to float16


# Classes of calls


def draw_case(random: Random) -> HeadCase:
    """Draw a case of options that are rarely combined."""
    of = random.choice(KINDS)
    # Sizes that need few seeds each: `tolerance` pools results of few elements.
    M = random.choice((1, 9, 12, 23) if of in ("mean", "sum") else (40, 65))
    dtype = random.choice((f32, bf16, f16, f16))
    quant = random.choice(("", "", "", "nf4-64-nested", "fp4-32"))
    is_trained = not quant and random.random() < 0.5
    names = [*GRADIENTS]
    frozen = random.sample(names, random.choice((0, 0, 1, 2, 4)))
    return HeadCase(
        M=M,
        V=random.choice((65, 130, 257)),
        K=64 if quant else random.choice((17, 40)),
        R=random.choice((5, 8)),
        of=of,
        dtype=dtype,
        adapter_dtype=random.choice((None, f32)),
        autocast=random.choice((None, bf16, f16)) if dtype is f32 else None,
        adapter=random.random() < 0.8,
        bias=random.random() < 0.7,
        ignored=random.choice((0.0, 0.3, 0.6)) if M > 1 else 0.0,
        label_smoothing=random.choice((0.0, 0.1, 0.5)),
        logit_softcap=random.choice((None, 1.0, 5.0)),
        logit_scale=random.choice((0.3, 1.0, 1.7, 4.0)),
        temperature=random.choice((0.6, 1.0, 1.5)),
        chunk_rows=random.choice((None, 1, 4, 5, M, M + 3)),
        quant=quant,
        dropout_p=random.choice((0.0, 0.0, 0.25, 0.5)),
        frozen=tuple(sorted(frozen)),
        trained_weight=is_trained,
        seed=random.getrandbits(20),
    )


def with_views(random: Random) -> Callable[..., Any]:
    """Return the case's function of views with gaps, in three dimensions, of labels in 32 bits."""
    has_gaps, is_3d, is_turned = (random.random() < 0.5 for _ in range(3))

    def call(**args: Any) -> Any:
        x, labels = args["x"], args["labels"]
        if has_gaps:
            x = F.pad(x, (3, 2))[:, 3:-2]
            labels = torch.stack([labels, labels - 9], 1)[:, 0].int()
        if is_turned:
            for name in ("weight", "lora_A", "lora_B"):
                if isinstance(args[name], Tensor):
                    args[name] = args[name].t().contiguous().t()
        if is_3d:
            x, labels = x.unflatten(0, (-1, 1)), labels[:, None]
            if (mask := args.get("dropout_mask")) is not None:
                args["dropout_mask"] = mask.unflatten(0, (-1, 1))
        found = HeadCase.op(**args | {"x": x, "labels": labels})
        if isinstance(found, Tensor):
            assert found.shape in ((), labels.shape)
            return found.flatten() if found.dim() else found
        assert {t.shape for t in found if t is not None} == {labels.shape}
        return tuple(t.flatten() for t in found if t is not None)

    return call


@pytest.mark.parametrize("seed", range(6))
def test_head_of_drawn_options_is_within_tolerance(seed: int) -> None:
    random = Random(seed)
    for _ in range(4):
        case, engine = draw_case(random), random.choice((*EAGERS, None))
        with cases.engine(engine) if engine else nullcontext():
            assert_near((case, engine), judge(case, with_views(random)))


@pytest.mark.parametrize("exponent", [-40, -9, 5, 30])
def test_gradients_of_drawn_options_are_proportional_bit_for_bit(exponent: int) -> None:
    """Powers of two have no rounding, unless a 16-bit gradient's exponent is too small."""
    random, met = Random(100 + exponent), 0
    for _ in range(10):
        case = draw_case(random)
        wide = f32 if case.dtype is f16 else case.dtype
        case = replace(case, dtype=wide, adapter_dtype=f32 if wide is f32 else case.adapter_dtype)
        autocast = case.autocast or random.choice((None, f16)) if wide is f32 else None
        args = inputs(case)
        want = run(HeadCase.op, args, autocast)
        dy = args["dy"]
        more = [t * 2.0**exponent for t in dy] if isinstance(dy, list) else dy * 2.0**exponent
        got = run(HeadCase.op, args | {"dy": more}, autocast)
        for name in want:
            factor = 2.0**exponent if name in GRADIENTS.values() else 1.0
            assert torch.equal(got[name], want[name] * factor), (case, name)
            met += want[name].any().item() and factor != 1.0
    assert met > 10


@pytest.mark.parametrize("outputs", list(itertools.product((False, True), repeat=4)), ids=str)
def test_statistics_are_the_same_whichever_are_requested(outputs: tuple[bool, ...]) -> None:
    names = call.HeadOutputs._fields
    random = Random(str(outputs))
    for dtype in (f32, f16):
        case = replace(draw_case(random), of="log_probs", dtype=dtype, autocast=None)
        args = arguments(replace(case, M=12, ignored=0.3))
        wanted = [name for name, is_given in zip(names, outputs, strict=True) if is_given]
        random.shuffle(wanted)
        every, some = (HeadCase.op(**args | {"outputs": each}) for each in (names, wanted))
        for name, got, want in zip(some._fields, some, every, strict=True):
            assert (got is not None) is (name in ("log_probs", *wanted))
            assert got is None or torch.equal(got, want)
        assert every.is_top1.dtype is torch.bool and every.log_probs.dtype is f32
        assert not any(t[args["labels"] == head_case.IGNORED].any() for t in every)


@pytest.mark.parametrize("of", KINDS)
def test_chunks_are_the_fewest_and_nearly_equal(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row that counts is in one of them, in both directions, and no other row is."""
    met: list[Tensor] = []
    chosen = linear.lora_linear_undispatched

    def note(operands: call.Operands, *args: Any) -> Any:
        met.append(operands.x)
        return chosen(operands, *args)

    monkeypatch.setattr(linear, "lora_linear_undispatched", note)
    for M, rows, ignored in itertools.product((1, 6, 7, 9), (1, 2, 3, 4, 20), (0, 1, 4)):
        args = arguments(HeadCase(M, 5, 4, 2, of=of, chunk_rows=rows, ignored=0.0))
        args["labels"][M // 2 : M // 2 + ignored] = head_case.IGNORED
        kept = args["x"].detach()[args["labels"] != head_case.IGNORED]
        met.clear()
        found = HeadCase.op(**args)
        (found if isinstance(found, Tensor) else found[0]).sum().backward()
        count = -(-kept.shape[0] // rows)
        assert len(met) == count * (2 if of in ("none", "log_probs") else 1)
        assert torch.equal(torch.cat([kept[:0], *met[:count]]), kept)
        sizes = {len(x) for x in met}
        assert not sizes or (max(sizes) <= rows and max(sizes) - min(sizes) <= 1)


@pytest.mark.parametrize("of", KINDS)
def test_mask_that_pytorchs_kernel_draws_is_that_of_both_directions(of: str) -> None:
    args = inputs(replace(SMALL, of=of, dropout_p=0.25)) | {"rng": None}
    with cases.engine("eager-gpu"):
        torch.manual_seed(5)
        got = run(HeadCase.op, args)
        torch.manual_seed(5)
        mask = torch.native_dropout(args["x"].detach(), 0.25, True)[1]
        want = run(HeadCase.op, args | {"dropout_mask": mask})
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("autocast", [None, bf16, f16])
def test_chunks_of_the_loss_are_those_of_the_logits_dtype(
    autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[torch.dtype] = []
    monkeypatch.setattr(head, "loss_rows", lambda V, device, dtype: met.append(dtype) or 128)
    with torch.autocast("cpu", autocast or bf16, enabled=autocast is not None):
        lora_linear_cross_entropy(**arguments(SMALL))
    assert met == [autocast or f32]


@pytest.mark.parametrize("dtype", [f64, f32, bf16, f16], ids=str)
@pytest.mark.parametrize("outputs", [(), ("entropy",)])
def test_words_of_a_bias_of_minus_infinity_are_as_if_absent(
    outputs: tuple[str, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 16, generator=generator).to(dtype) for n in (5, 40))
    bias, labels = torch.zeros(40, dtype=dtype), torch.arange(5)
    bias[30:] = -math.inf

    def results(words: int, function: Any) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, bias[:words])]
        args = leaves[0], W[:words], None, None, labels
        log_probs, entropy, *_ = function(*args, bias=leaves[1])
        assert entropy is not None
        y = [log_probs, entropy] if outputs else [log_probs]
        grads = torch.autograd.grad(sum(t.sum() for t in y), leaves)
        return [*y, grads[0], grads[1][:30]]

    for function in (lora_linear_log_probs, reference.lora_linear_log_probs):
        for got, want in zip(results(40, function), results(30, function), strict=True):
            assert got.isfinite().all()
            eps = torch.finfo(torch.float32 if got.dtype is f64 else got.dtype).eps
            torch.testing.assert_close(got, want, rtol=8 * eps, atol=8 * eps)


def test_gradients_of_log_probs_or_of_the_entropy_alone_are_those_beside_zeros() -> None:
    args = arguments(replace(SMALL, of="log_probs", trained_weight=True))
    trained = [args[name] for name in GRADIENTS]
    found = lora_linear_log_probs(**args)
    y = torch.stack([found.log_probs, cast(Tensor, found.entropy)])
    for i, alone in enumerate((found.log_probs, found.entropy)):
        got = torch.autograd.grad(cast(Tensor, alone).sum(), trained, retain_graph=True)
        factors = torch.eye(2)[i, :, None]
        want = torch.autograd.grad((factors * y).sum(), trained, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2.0**-18, atol=2.0**-18)
    without = lora_linear_log_probs(**args | {"outputs": ()})
    want = torch.autograd.grad(without.log_probs.sum(), trained)
    got = torch.autograd.grad(found.log_probs.sum(), trained)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
