"""`multi_lora_linear`: y and every gradient against the float64 reference; compilers; errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels import multi_lora_linear, reference
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.cpu import native
from lora_kernels.backends.rows import rows_of
from lora_kernels.choice import choose as selection
from lora_kernels.core.call import MultiOperands, MultiSpec
from lora_kernels.ops import multi
from lora_kernels.oracle.case import give_mask, inputs
from lora_kernels.oracle.multi_case import MultiCase
from tests.ops.engines import engines_in_turn, every_engine, every_thread_count
from tests.support.allocations import Results
from tests.support.assertions import assert_close_derived
from tests.support.engines import check
from tests.support.multi import of_formats, run

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def some_cases() -> list[MultiCase]:
    chosen = of_formats(65, [(3, 96), (7, 96), (70, 96)])
    chosen += [MultiCase(1, 65, 96, ranks=(16, 7), quant=quant) for quant in ("", "nf4-64")]
    for M in (5, 40):
        chosen += [
            MultiCase(M, 33, 63, rows="mixed", dtype=f16),
            MultiCase(M, 33, 63, rows="mixed", dtype=bf16, adapter_dtype=f32),
            MultiCase(M, 33, 63, rows="mixed", dtype=f32, quant="fp4-32"),
            MultiCase(M, 33, 63, rows="mixed", dtype=f32, base=False, bias=False),
            MultiCase(M, 33, 63, rows="mixed", dtype=bf16, base=False, dropout_p=0.1),
            MultiCase(M, 33, 63, dtype=bf16, quant="nf4-64-nested", values="nonnegative"),
            MultiCase(M, 33, 112, dtype=bf16, quant="nvfp4-16-nested"),
            MultiCase(M, 33, 63, ranks=(100, 3, 17), dtype=f32),
            *(MultiCase(M, 33, 63, rows="mixed", frozen=(name,)) for name in ("x", "lora_A")),
            MultiCase(M, 33, 63, rows="mixed", frozen=("lora_B", "bias"), dropout_p=0.1),
        ]
    return chosen


def without_dy(case: MultiCase) -> dict[str, Any]:
    args = inputs(case)
    del args["dy"]
    return args


@engines_in_turn(some_cases())
def test_multi_lora_linear_of_each_case_is_within_tolerance(case: MultiCase, engine: str) -> None:
    check(case)


MANY = MultiCase(150, 130, 200, ranks=(4, 16, 7, 1, 5, 33, 2, 8), rows="mixed", dropout_p=0.1)


@every_engine
@every_thread_count
@pytest.mark.parametrize("rows", ["grouped", "mixed"])
def test_multi_lora_linear_shared_among_threads_is_within_tolerance(
    rows: str, threads: int, engine: str
) -> None:
    """Enough of them that each is one thread's."""
    check(MultiCase(**{**vars(MANY), "rows": rows}))


@every_engine
def test_multi_lora_linear_again_has_the_same_bits(engine: str) -> None:
    args = inputs(MANY)
    first, second = run(multi_lora_linear, give_mask(args)), run(multi_lora_linear, give_mask(args))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_engine
def test_multi_lora_linear_of_rows_without_an_adapter_is_the_base(engine: str) -> None:
    """Exactly the base GEMM, and no gradient for an adapter."""
    args = inputs(MultiCase(8, 20, 30, bias=False, dropout_p=0.5))
    args["index"].fill_(-1)
    got = run(multi_lora_linear, give_mask(args))
    assert_close_derived(got["y"], args["x"].detach() @ args["weight"].T, layers=1)
    assert_close_derived(got["dx"].view_as(args["x"]), args["dy"] @ args["weight"], layers=1)
    assert not got["dA"].any() and not got["dB"].any()


@every_engine
@pytest.mark.parametrize("quant", ["", "nf4-64"])
def test_multi_lora_linear_of_no_rows_is_empty(quant: str, engine: str) -> None:
    got = run(multi_lora_linear, inputs(MultiCase(0, 20, 32, quant=quant)))
    assert got["y"].shape == (0, 20) and got["dx"].numel() == 0
    assert not got["dA"].any() and not got["dB"].any() and not got["dbias"].any()


@every_engine
def test_multi_lora_linear_of_one_tensor_of_adapters_is_the_same(engine: str) -> None:
    """[E, R, K] and [E, N, R]: the results of a list, the gradients in their shape."""
    args = inputs(MultiCase(12, 20, 30, ranks=(4, 4, 4), rows="mixed"))
    want = run(multi_lora_linear, give_mask(args))
    for name in ("lora_A", "lora_B"):
        args[name] = torch.stack([t.detach() for t in args[name]]).requires_grad_()
    got = run(multi_lora_linear, give_mask(args))
    assert all(torch.equal(got[name], want[name]) for name in want)


LAYOUTS_OF_X: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "3d": lambda t: t.view(3, 4, -1),
    "padded": lambda t: torch.nn.functional.pad(t, (2, 5))[:, 2:-5],
    "columns": lambda t: t.t().contiguous().t(),
    "3d_swapped": lambda t: t.view(4, 3, -1).transpose(0, 1).contiguous().transpose(0, 1),
}


@every_engine
@pytest.mark.parametrize("layout", LAYOUTS_OF_X)
def test_multi_lora_linear_of_x_in_any_layout_is_within_tolerance(layout: str, engine: str) -> None:
    view = LAYOUTS_OF_X[layout]
    args = inputs(MultiCase(12, 20, 30, rows="mixed", dropout_p=0.1))
    want = run(multi_lora_linear, give_mask(args))
    x, dy = view(args["x"].detach()), view(args["dy"])
    rest = {"x": x.requires_grad_(), "dy": dy, "index": args["index"].view(x.shape[:-1])}
    got = run(multi_lora_linear, give_mask({**args, **rest}))
    for name in want:
        torch.testing.assert_close(got[name].view_as(want[name]), want[name])


@pytest.mark.parametrize("names", [[0, 0, 1], [1, 1, 0], [-1, 0, -1, 1, -1], [2]])
def test_rows_of_rows_that_lie_together_leaves_them(names: list[int]) -> None:
    order, runs = rows_of(torch.tensor(names), 3)
    assert order is None
    for name, start, stop in runs:
        assert set(names[start:stop]) == {name}
    assert sum(stop - start for _, start, stop in runs) == sum(n >= 0 for n in names)


@every_engine
@pytest.mark.parametrize("names", [[2, 0, -1, 2], [0, 0, 2, -1]], ids=str)
def test_multi_lora_linear_of_an_index_of_sequences_is_that_of_their_rows(
    names: list[int], engine: str
) -> None:
    args = inputs(MultiCase(12, 20, 30, rows="mixed", dropout_p=0.1))
    x, dy = args["x"].detach().view(4, 3, -1).requires_grad_(), args["dy"].view(4, 3, -1)
    args |= {"x": x, "dy": dy}
    index = torch.tensor(names)
    want = run(multi_lora_linear, give_mask({**args, "index": index[:, None].expand(4, 3)}))
    got = run(multi_lora_linear, give_mask({**args, "index": index}))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_multi_lora_linear_passes_gradcheck() -> None:
    args = inputs(MultiCase(5, 4, 3, ranks=(2, 1, 3), rows="mixed", dropout_p=0.3))
    leaves = [
        t.detach().double().requires_grad_()
        for t in (args["x"], args["bias"], *args["lora_A"], *args["lora_B"])
    ]

    weight, index, scaling = args["weight"].double(), args["index"], args["scaling"]
    dropout: Any = {"dropout_p": 0.3, "rng": args["rng"]}

    def function(x: Any, bias: Any, *adapters: Any) -> Any:
        A, B = adapters[:3], adapters[3:]
        return multi_lora_linear(x, weight, A, B, index, scaling, bias, **dropout)

    torch.autograd.gradcheck(function, leaves)
    x, bias, *adapters = leaves
    A, B = adapters[:3], adapters[3:]
    want = reference.multi_lora_linear(x, weight, A, B, index, scaling, bias, **dropout)
    torch.testing.assert_close(function(*leaves), want)


@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=str)
def test_multi_lora_linear_passes_opcheck(dtype: torch.dtype) -> None:
    args = inputs(MultiCase(6, 5, 8, rows="mixed", dropout_p=0.1))
    x, weight, bias = (args[n].detach().to(dtype) for n in ("x", "weight", "bias"))
    A, B = ([t.detach().to(dtype) for t in args[n]] for n in ("lora_A", "lora_B"))
    operands, spec = (x, weight, A, B, args["index"]), (args["scaling"], 0.1, dtype, dtype)
    torch.library.opcheck(
        torch.ops.lora_kernels.multi_lora_linear.default,
        (*operands, bias, args["rng"], None, *spec),
    )
    p = torch.randn(6, 8, dtype=torch.promote_types(dtype, f32))
    dy = torch.randn(6, 5).to(dtype)
    for need in (True, False):
        needs = need, [True, need] * 2, [need] * 4, need
        backward = dy, p, *operands, None, args["rng"], None, *spec, *needs
        torch.library.opcheck(torch.ops.lora_kernels.multi_lora_linear_backward.default, backward)


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_multi_lora_linear_compiled_is_the_same(quant: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(multi_lora_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, M in enumerate((6, 9)):
        args = inputs(MultiCase(M, 20, 32, rows="mixed", quant=quant, dropout_p=0.1))
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = run(compiled, args)
        want = run(multi_lora_linear, give_mask(args))
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.skipif(native.module is None, reason="the native kernels are not built")
def test_multi_lora_linear_copies_no_adapter() -> None:
    """The kernels' backend makes nothing but y, P, and x and y in another order."""
    args = inputs(MultiCase(4, 512, 512, ranks=(16,) * 16, rows="mixed", dtype=bf16, bias=False))
    names = ("x", "weight", "lora_A", "lora_B", "index", "bias", "rng")
    operands = MultiOperands(*(args[name] for name in names))
    spec = MultiSpec(args["scaling"], args["dropout_p"], bf16, bf16)
    with torch.no_grad(), Results() as found:
        cpu.multi_lora_linear(operands, spec, cpu.LIBRARY)
    assert max(found.sizes) <= 4 * 512


SIZES = {"lora_A": [(r, 8) for r in (3, 5, 8, 1)], "lora_B": [(5, r) for r in (3, 5, 8, 1)]}


def second(name: str, *shape: int, **options: Any) -> dict[str, Any]:
    """Adapters whose second alone has another shape or other options."""
    tensors = [torch.ones(size) for size in SIZES[name]]
    tensors[1] = torch.ones(shape, **options)
    return {name: tensors}


def every(name: str, **options: Any) -> dict[str, Any]:
    return {name: [torch.ones(size, **options) for size in SIZES[name]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.tensor([0, 1, 4])}, r"index: got 4, want 0 to 3 for one of 4 adapters"),
        ({"index": torch.tensor([0, -2, 1])}, "index: got -2"),
        ({"index": torch.tensor([0, 1])}, r"index: got shape \[2\], want x's \[3\]"),
        ({"index": torch.zeros(3, 1).int()}, r"index: got shape \[3, 1\], want x's \[3\]"),
        ({"index": torch.tensor([0.0, 1, 2])}, "index: got torch.float32, want a tensor of int64"),
        ({"index": [0, 1, 2]}, "index: got list"),
        ({"lora_B": [torch.ones(5, 3)] * 3}, "lora_B: got 3 adapters, want 4"),
        ({"lora_B": [torch.ones(5, 3)] * 4}, r"lora_B\[1\]: got shape \[5, 3\], want \[5, 5\]"),
        ({"lora_A": []}, "lora_A: got no adapter"),
        ({"lora_A": torch.ones(3, 8)}, r"lora_A: got shape \[3, 8\], want \[E, R, K\]"),
        ({"scaling": torch.tensor(2.0)}, "scaling: got tensor"),
        ({"scaling": [1.0]}, "scaling: got 1 numbers, want one, or 4"),
        ({"dropout_p": 1.5}, "dropout_p: got 1.5"),
        ({"x": torch.ones(3, 7)}, r"x: got shape \[3, 7\], want \[..., 8\]"),
        ({"weight": torch.ones(4, 8)}, r"weight: got shape \[4, 8\], want \[5, 8\]"),
        ({"bias": torch.ones(4)}, r"bias: got shape \[4\], want \[5\]"),
        ({"bias": torch.ones(5, device="meta")}, "bias: got device meta, want x's device cpu"),
        ({"index": torch.zeros(3, device="meta").int()}, "index: got device meta, want x's"),
        ({"index": torch.zeros(3).short()}, "index: got torch.int16, want a tensor of int64"),
        ({"scaling": [1.0] * 5}, "scaling: got 5 numbers, want one, or 4"),
        ({"lora_B": [torch.ones(5, 3)] * 5}, "lora_B: got 5 adapters, want 4"),
        ({"lora_A": torch.ones(4, 0, 8)}, r"lora_A: got shape \[4, 0, 8\], want \[E, R, K\]"),
        ({"lora_A": [torch.ones(8)] * 4}, r"lora_A\[0\]: got shape \[8\], want \[R, K\]"),
        (second("lora_A", 5, 7), r"lora_A\[1\]: got shape \[5, 7\], want \[R, 8\]"),
        (second("lora_A", 5, 8, 1), r"lora_A\[1\]: got shape \[5, 8, 1\], want \[R, 8\]"),
        (second("lora_B", 4, 5), r"lora_B\[1\]: got shape \[4, 5\], want \[5, 5\]"),
        (second("lora_A", 5, 8, device="meta"), r"lora_A\[1\]: got device meta, want x's"),
        (second("lora_B", 5, 5, device="meta"), r"lora_B\[1\]: got device meta, want x's"),
        (second("lora_A", 5, 8, dtype=bf16), r"lora_A\[1\], lora_B\[1\]: got torch.bfloat16"),
        (second("lora_B", 5, 5, dtype=bf16), r"lora_A\[1\], lora_B\[1\]: got torch.float32, torc"),
        (every("lora_A", dtype=f64), "lora_A: got torch.float64 beside x in torch.float32"),
        (every("lora_B", dtype=f64), "lora_B: got torch.float64 beside x in torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_multi_lora_linear_of_bad_arguments_raises(change: dict[str, Any], message: str) -> None:
    args = without_dy(MultiCase(3, 5, 8))
    with pytest.raises((ValueError, TypeError), match=message):
        multi_lora_linear(**{**args, **change})


def test_multi_lora_linear_of_an_index_in_32_bits_is_the_same() -> None:
    args = without_dy(MultiCase(6, 5, 8, rows="mixed"))
    want = multi_lora_linear(**args)
    assert torch.equal(multi_lora_linear(**{**args, "index": args["index"].int()}), want)


@pytest.mark.skipif(native.module is None, reason="no native kernels")
@pytest.mark.parametrize("rows", ["grouped", "mixed"])
def test_multi_lora_linear_on_another_default_device_is_the_same(rows: str) -> None:
    args = inputs(MultiCase(7, 33, 63, rows=rows, dropout_p=0.1))
    want = run(multi_lora_linear, give_mask(args))
    with torch.device("meta"):
        got = run(multi_lora_linear, give_mask(args))
    assert want.keys() == got.keys()
    for name, t in want.items():
        assert torch.equal(got[name], t), name


def test_rows_around_one_without_an_adapter_are_one_run() -> None:
    assert rows_of(torch.tensor([0, -1, 0]), 1).runs == [(0, 1, 3)]


@pytest.mark.skipif(native.module is None, reason="the native kernels are not built")
def test_choose_multi_largest_rank_decides() -> None:
    """A rank above the kernels' is not theirs, whichever adapter has it."""
    A, B = ([torch.zeros(s) for s in sizes] for sizes in (((8, 64), (257, 64)), ((5, 8), (5, 257))))
    operands = MultiOperands(torch.zeros(3, 64), torch.zeros(5, 64), A, B, torch.zeros(3).long())
    choice = multi.choose(operands, MultiSpec([1.0, 1.0], 0.0, f32, f32))
    assert choice.backend == "eager" and "rank 257 is above" in choice.reason


# The results of adapter 1 that a NaN in one of its arguments reaches.
REACHED = {
    "lora_A": {"y", "dx", "dB"},
    "lora_B": {"y", "dx", "dA"},
    "x": {"y", "dA", "dB"},
    "dy": {"dx", "dA", "dB"},
}


@every_engine
@pytest.mark.parametrize("quant", ["", "nf4-64"])
@pytest.mark.parametrize("index", [[0, 1, -1, 2] * 3, [0] * 3 + [1] * 4 + [-1] * 2 + [2] * 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", REACHED)
def test_multi_lora_linear_of_nan_or_inf_in_one_adapter_spoils_its_rows_alone(
    name: str, value: float, index: list[int], quant: str, engine: str
) -> None:
    """y, dx, dA and dB of all others keep their bits."""
    ranks, N, K = (4, 5, 3), 20, 64
    args = inputs(MultiCase(len(index), N, K, ranks, "mixed", bias=False, quant=quant))
    args["index"], own = torch.tensor(index), torch.tensor(index) == 1
    want = run(multi_lora_linear, args)
    with torch.no_grad():
        if name in ("x", "dy"):
            args[name][own, 2] = value
        else:
            args[name][1][:, 2] = value
    got = run(multi_lora_linear, args)

    def split(results: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, ...]]:
        """Each result of adapter 1, and of all others."""
        found = {n: results[n].view(len(index), -1) for n in ("y", "dx")}
        parts = {n: (t[own], t[~own]) for n, t in found.items()}
        for n, width in (("dA", K), ("dB", N)):
            first, second, third = results[n].split([R * width for R in ranks])
            parts[n] = second, torch.cat([first, third])
        return parts

    before, after = split(want), split(got)
    for n, (of_one, of_others) in after.items():
        assert torch.equal(of_others, before[n][1]), n
        assert of_one.isfinite().all().item() == (n not in REACHED[name]), n


@pytest.mark.parametrize(
    ("backend", "strategy"),
    [(b, s) for b in ("triton", "cuda") for s in (None, *selection.STRATEGIES[b])],
)
def test_multi_lora_linear_by_a_forced_gpu_backend_raises(
    backend: str, strategy: str | None
) -> None:
    """In both directions, whatever device the tensors are on."""
    args = without_dy(MultiCase(3, 5, 8))
    names = ("x", "weight", "lora_A", "lora_B", "index")
    operands = *(args[name] for name in names), args["bias"], None, None
    spec = args["scaling"], 0.0, f32, f32
    match = f"backend '{backend}' was requested and cannot run here: the kernels for GPUs take one"
    with lora_kernels.backend(backend, strategy):
        with pytest.raises(RuntimeError, match=match):
            multi_lora_linear(**args)
        with pytest.raises(RuntimeError, match=match):
            needs = True, [True] * 4, [True] * 4, True
            p = torch.zeros(3, 8)
            torch.ops.lora_kernels.multi_lora_linear_backward.default(
                torch.zeros(3, 5), p, *operands, *spec, *needs
            )


@every_engine
def test_bias_wider_than_x_leaves_y_in_x_s_dtype(engine: str) -> None:
    args = without_dy(MultiCase(7, 33, 64, dtype=bf16, bias=True))
    narrow = multi_lora_linear(**give_mask(args))
    wide = multi_lora_linear(**give_mask(args | {"bias": args["bias"].detach().float()}))
    assert wide.dtype is narrow.dtype is bf16
    torch.testing.assert_close(wide, narrow, rtol=2**-7, atol=2**-7)  # an ulp: rounded once more
