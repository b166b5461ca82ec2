"""The eager backend's path on a GPU, on CPU tensors: dropout's masks, parts, decoding, waiting."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels import lora_linear, reference
from lora_kernels.backends import decoder, library
from lora_kernels.backends.eager import products
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.bench import counter
from lora_kernels.choice import choose as selection
from lora_kernels.core import coding
from lora_kernels.ops import registry
from lora_kernels.ops.norm import dora_norm
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case
from lora_kernels.quantization import quantize_4bit
from tests.support.engines import check, check_norm
from tests.support.functions import call, every_function
from tests.support.problems import FULL, bf16, f16, f32, with_rank

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def gpu_path() -> Iterator[None]:
    with cases.engine("eager-gpu"):
        yield


@pytest.fixture(params=["few rows by PyTorch", "few rows by bitsandbytes"])
def few_rows_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """What multiplies few rows by 4-bit weights on the CPU."""
    before = dict(decoder.bitsandbytes_reasons)
    if request.param.endswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        for quant_type in ("nf4", "fp4"):
            decoder.bitsandbytes_reasons.pop(("cpu", None, quant_type), None)
            assert decoder.bitsandbytes_reason(CPU, quant_type) is None
    else:
        for quant_type in ("nf4", "fp4"):
            decoder.bitsandbytes_reasons["cpu", None, quant_type] = "the test says so"
    yield request.param
    decoder.bitsandbytes_reasons.clear()
    decoder.bitsandbytes_reasons.update(before)


def layer_args(M: int = 12, dtype: torch.dtype = f32, **options: Any) -> dict[str, Any]:
    args = cases.inputs(Case(M, 33, 64, 5, dtype, **options))
    args.pop("dy")
    return args | {"rng": None}


@contextlib.contextmanager
def requested(backend: str | None) -> Iterator[None]:
    token = selection.forced.current.set(selection.Forced(backend))
    try:
        yield
    finally:
        selection.forced.current.reset(token)


def via_dispatcher(dispatched: bool) -> contextlib.AbstractContextManager[Any]:
    return _Dispatched() if dispatched else contextlib.nullcontext()


@pytest.mark.parametrize("forced", ["eager", None])  # None: the mask decides
@pytest.mark.parametrize("dispatched", [True, False], ids=["dispatched", "direct"])
@pytest.mark.parametrize("K", [16, 15])  # 15: each expert by itself
@every_function
def test_dropout_mask_forward_and_backward_agree(
    function: str, K: int, forced: str | None, dispatched: bool
) -> None:
    """With A, B and s = 1 the adapter copies D(x); dx shows the same elements kept."""
    x = torch.ones(300, K, requires_grad=True)
    eye, zero = torch.eye(K), torch.zeros(K, K)
    torch.manual_seed(0)
    with requested(forced), via_dispatcher(dispatched):
        y = call(function, x, zero, eye, eye.clone(), dropout_p=0.25)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        with torch.no_grad():
            torch.manual_seed(0)
            again, later = (
                call(function, x, zero, eye, eye.clone(), dropout_p=0.25) for _ in range(2)
            )
    assert torch.equal(dx, y.detach()) and torch.equal(again, y.detach())
    assert not torch.equal(later, again)
    kept = (y != 0).double().mean().item()
    # 4500 draws: the share kept is within five standard deviations, 5 · √(0.25 · 0.75 / 4500).
    assert abs(kept - 0.75) < 0.0323
    assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 1 / 0.75))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_dropout_checkpointed_replays_the_mask(use_reentrant: bool, recompute: bool) -> None:
    args = layer_args(dropout_p=0.5)
    x = args.pop("x")

    def run(x: Tensor) -> Tensor:
        return lora_linear(x, **args, recompute=recompute).square()

    leaves = [x, args["lora_A"], args["lora_B"]]
    torch.manual_seed(5)
    want = torch.autograd.grad(run(x).sum(), leaves)
    torch.manual_seed(5)
    y = checkpoint(run, x, use_reentrant=use_reentrant)
    if use_reentrant:  # which supports backward() alone
        for leaf in leaves:
            leaf.grad = None
        y.sum().backward()
        got = [leaf.grad for leaf in leaves]
    else:
        got = list(torch.autograd.grad(y.sum(), leaves))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dispatched", [True, False], ids=["dispatched", "direct"])
def test_dropout_recomputed_p_is_of_the_same_mask(dispatched: bool) -> None:
    args = layer_args(dropout_p=0.5)
    leaves = [args[name] for name in ("x", "lora_A", "lora_B")]
    found = []
    for recompute in (False, True):
        torch.manual_seed(5)
        with via_dispatcher(dispatched):
            y = lora_linear(**args, recompute=recompute)
            found.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_compiled_uses_one_mask(checkpointed: bool) -> None:
    """In a whole graph, x = 1 and A, B unit matrices, forward and backward keep the same."""
    eye, zero = torch.eye(16), torch.zeros(16, 16)

    def run(x: Tensor) -> Tensor:
        return lora_linear(x, zero, eye, eye.clone(), dropout_p=0.5)

    def call(x: Tensor) -> Tensor:
        return checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.ones(40, 16, requires_grad=True)
        y = compiled(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(dx, y.detach()) and 0 < (y == 0).double().mean().item() < 1


def test_ops_with_a_drawn_mask_pass_opcheck() -> None:
    args = layer_args(dropout_p=0.5)
    x, W, A, B = (args[n].detach() for n in ("x", "weight", "lora_A", "lora_B"))
    rest = (*[None] * 5, 1.5, 0.5, f32, f32, False)
    utils = ("test_schema", "test_faketensor")  # values differ from call to call
    for shape in ((12, 64), (3, 4, 64)):
        torch.library.opcheck(
            torch.ops.lora_kernels.lora_linear.default,
            (x.view(shape), W, A, B, *rest),
            test_utils=utils,
        )
    index = torch.zeros(12, dtype=torch.int64)
    args = x, W, [A], [B], index, *[None] * 3, [1.5], 0.5, f32, f32
    torch.library.opcheck(torch.ops.lora_kernels.multi_lora_linear.default, args, test_utils=utils)
    for name in ("lora_linear", "multi_lora_linear", "lora_linear_backward", "dora_norm"):
        for each in (name, f"{name}_quantized"):
            op = getattr(torch.ops.lora_kernels, each).default
            draws = torch.Tag.nondeterministic_seeded in op.tags
            assert draws is name.endswith("lora_linear"), op


def test_rng_state_is_refused_and_says_why() -> None:
    state = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"rng: got the state of a mask.*torch.manual_seed"):
        lora_linear(**layer_args(dropout_p=0.5) | {"rng": state})
    with pytest.raises(RuntimeError, match=r"dropout_mask: rng is on cpu.*dropout kernel"):
        lora_kernels.dropout_mask(state, 4, 4, 0.5)


@pytest.mark.parametrize("shape", [(3, 3), (64, 12), (768,), (12, 64, 1), (3, 4, 64)], ids=str)
def test_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """x is [12, 64]; the last four masks have as many elements."""
    mask = torch.ones(shape, dtype=torch.bool)
    got = re.escape(str(list(shape)))
    with pytest.raises(ValueError, match=rf"dropout_mask: got torch.bool {got}.*\[12, 64\]"):
        lora_linear(**layer_args(dropout_p=0.5) | {"dropout_mask": mask})


@pytest.mark.parametrize(
    ("backend", "want"),
    [(None, True), ("eager", True), ("cpu", False), ("triton", False), ("cuda", False)],
)
def test_is_eager_on_gpu_follows_the_forced_backend(backend: str | None, want: bool) -> None:
    with requested(backend):
        assert selection.is_eager_on_gpu("cuda") is want


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("cpu", "its kernels take no dropout_mask, but rng"),
        ("triton", "the kernels for GPUs have no dropout"),
        ("cuda", "the kernels for GPUs have no dropout"),
    ],
)
def test_mask_beside_another_backend_is_refused(backend: str, reason: str) -> None:
    args = layer_args(dropout_p=0.5)
    with lora_kernels.backend(backend), pytest.raises(RuntimeError, match=reason):
        lora_linear(**args | {"dropout_mask": torch.ones(12, 64, dtype=torch.bool)})


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def many_rows(
    dtype: torch.dtype, lora_A: float = 1, lora_B: float = 1, **options: Any
) -> dict[str, Any]:
    """x in 16 bits with a float32 adapter, A and B times a factor: they are taken in parts."""
    args = cases.inputs(Case(70, 40, 64, 8, dtype, f32, **options))
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        args[name] = (args[name].detach() * factor).requires_grad_()
    return args


@pytest.mark.parametrize("size", [1e-5, 1e-3, 30.0])
def test_float16_beside_float32_adapters_keeps_small_and_large_B(size: float) -> None:
    """Halves of B itself would be 1.7e-3 off at 1e-5; of 256·B they are not."""
    args = many_rows(f16, lora_B=size)
    want, got = cases.oracle(args), cases.run(lora_linear, args)
    # dA sums over dS = dY·B. Parts of 256·B hold B to 2⁻²⁵/256 (half of float16's smallest step),
    # against B's rms of size/√R: 3.3e-5 at 1e-5; and never better than 2⁻²².
    assert relative(got["dA"], want["dA"]) < max(2**-25 / 256 / (size / 8**0.5), 2**-21)
    assert relative(got["dB"], want["dB"]) < 2**-21


def test_float16_update_of_small_float32_adapters_keeps_its_bits() -> None:
    """y = s·P·Bᵀ and dx = s·dS·A of adapters of 3e-6, the other factor large: numbers that float16
    holds to 2⁻¹¹. Halves of the adapter itself would be off by 5e-3."""
    only: dict[str, Any] = {"base": False, "scaling": 1.0}
    small_B = many_rows(f16, lora_A=300, lora_B=1e-5, **only)
    small_A = many_rows(f16, lora_A=3e-5, lora_B=100, **only)
    for name, changed in (("y", small_B), ("dx", small_A)):
        want, got = cases.oracle(changed), cases.run(lora_linear, changed)
        assert relative(got[name], want[name]) < 2**-10, name


def test_float16_gradients_of_a_large_scaling_are_finite() -> None:
    args = many_rows(f16, scaling=300.0)
    want, got = cases.oracle(args), cases.run(lora_linear, args)
    for name in ("dA", "dB"):
        assert relative(got[name], want[name]) < 2**-20, name


def test_float16_column_scale_gradient_does_not_overflow() -> None:
    """Products dY ⊙ z of 9e4 are made in float32."""
    x = torch.full((80, 16), 300.0, dtype=f16)
    A, B = torch.zeros(2, 16, dtype=f16), torch.zeros(16, 2, dtype=f16)
    c = torch.ones(16, requires_grad=True)
    y = lora_linear(x, torch.eye(16, dtype=f16), A, B, column_scale=c)
    (dc,) = torch.autograd.grad(y, c, torch.full_like(y, 300.0))
    assert torch.equal(dc, torch.full((16,), 80 * 9e4))


def test_column_scale_gradient_of_float16_holds_two_panels() -> None:
    dy, z = (torch.empty(8192, 4096, dtype=f16, device="meta") for _ in range(2))
    found = counter.count(lambda: products.column_dot(dy, z, f32))
    # A panel's dY and its product with z, in float32; [N] beside them.
    assert found.peak <= 2 * products.PANEL + 4 * 4 * 4096


def test_zero_B_beside_float16_gives_no_gradient_of_A() -> None:
    """Every adapter starts so. dS is 0, so its factor for parts is one of a clamped maximum."""
    args = many_rows(f16, lora_B=0)
    want, got = cases.oracle(args), cases.run(lora_linear, args)
    assert torch.equal(got["dA"], torch.zeros_like(got["dA"]))
    assert relative(got["dB"], want["dB"]) < 2**-20


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_parts_without_their_low_halves_would_be_seen(dtype: torch.dtype) -> None:
    """dA and dB are nearer to the reference than a 16-bit adapter could be, by far."""
    args = many_rows(dtype)
    want, got = cases.oracle(args), cases.run(lora_linear, args)
    for name in ("dA", "dB"):
        assert relative(got[name], want[name]) < torch.finfo(dtype).eps / 64


def test_upcast_rows_decide_between_copies_and_parts() -> None:
    x, A = torch.zeros(65, 16, dtype=bf16), torch.zeros(4, 16)
    with products.upcast_rows(64, 8):
        assert products.is_in_parts(x, A) and not products.is_in_parts(x[:64], A)
        assert not products.is_in_parts(x, torch.zeros(9, 16))  # 8 rows a rank: 72
        assert not products.is_in_parts(x, A.to(bf16)) and not products.is_in_parts(x.float(), A)


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("quant", ["nf4-64-nested", "fp4-32"])
@pytest.mark.parametrize("M", [3, 70])
@pytest.mark.parametrize("few_rows_by", ["few rows by bitsandbytes"], indirect=True)
def test_4bit_against_the_reference(
    M: int, quant: str, dtype: torch.dtype, few_rows_by: str
) -> None:
    """PyTorch's decoding is covered by the tests of every engine."""
    for options in ({}, {"gate": True, "bias": True, "dropout_p": 0.1}, {"column_scale": True}):
        for adapter in {dtype, f32}:
            for K in (256, 160):  # 160: rows that end inside a block of 64
                case = Case(M, 70, K, 5, dtype, adapter, quant=quant, **options)
                check(with_rank(case))


def test_4bit_compute_dtype_beside_float32_x(few_rows_by: str) -> None:
    """x reaches a Linear4bit in float32 after `prepare_model_for_kbit_training`."""
    for M in (3, 70):
        case = Case(M, 70, 128, 5, f32, quant="nf4-64-nested", compute=bf16, bias=True)
        check(case)


@pytest.mark.parametrize("few_rows_by", ["few rows by bitsandbytes"], indirect=True)
@pytest.mark.parametrize(
    ("M", "K", "taken"), [(3, 192, True), (3, 160, False), (0, 192, False)], ids=str
)
def test_gemm_4bit_takes_whole_blocks_and_at_least_a_row(
    M: int, K: int, taken: bool, few_rows_by: str
) -> None:
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        pytest.skip("bitsandbytes is older than 0.50, without gemm_4bit")
    weight = quantize_4bit(torch.randn(32, K), "nf4", 64)
    y = decoder.gemm(weight.codes, torch.randn(M, K), 32, None)
    assert (y is not None) is taken


def test_gemm_4bit_gets_what_bitsandbytes_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous rows, codes in a column, an offset without dimensions, and a bias in x's dtype."""
    pytest.importorskip("bitsandbytes")
    codes, bias = quantize_4bit(torch.randn(32, 192)).codes, torch.randn(32)
    assert codes.offset is not None
    x, given = torch.randn(3, 384)[:, ::2].to(bf16)[:, :192], {}

    def gemm(
        x: Tensor, packed: Tensor, shape: Any, absmax: Tensor, *form: Any, **rest: Any
    ) -> None:
        given.update(x=x, packed=packed, shape=shape, absmax=absmax, form=form, **rest)

    monkeypatch.setattr(torch.ops, "bitsandbytes", SimpleNamespace(gemm_4bit=gemm))
    other, apart = codes._replace(offset=codes.offset.view(1)), x.t().contiguous().t()
    assert decoder.bitsandbytes_gemm(other, apart, 32, bias) is None
    assert given["x"].is_contiguous() and torch.equal(given["x"], x)
    assert given["packed"].shape == (32 * 192 // 2, 1) and given["shape"] == (32, 192)
    assert given["absmax"] is codes.nested_absmax and given["absmax_8bit"] is codes.absmax
    assert given["absmax_offset"].dim() == 0 and given["absmax_code"] is codes.nested_code
    assert given["bias"].dtype is bf16 and given["form"] == (64, "nf4")


# bitsandbytes' CPU ops are torch.compile functions, which would recompile for each shape and dtype.
@torch.compiler.set_stance("force_eager")
def test_decode_bits_equal_the_reference(few_rows_by: str) -> None:
    for quant, blocksize in (("nf4", 64), ("fp4", 32), ("nf4", 4096)):
        for shape in ((64, 64), (5, 13), (33, 65)):
            weight = quantize_4bit(torch.randn(shape), quant, blocksize)
            fields = weight.packed, weight.scales(), weight.code, blocksize, shape
            for dtype in (f32, bf16, f16, torch.float64):
                want = coding.dequantize(*fields, dtype)
                assert torch.equal(decoder.dense(weight.codes, shape, dtype), want)


class _Dispatched(TorchDispatchMode):
    """Sends calls through the dispatcher, and looks inside the ops of this package."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lora_kernels":
            with self, torch.no_grad():
                name = func._schema.name.partition("::")[2]
                return registry.IMPLEMENTATIONS[name](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _NoHostReads(_Dispatched):
    """Fails where an op of a layer would make the host wait for a GPU."""

    WAITING = ("item", "local_scalar_dense", "nonzero", "unique", "is_nonzero", "equal")
    WAITING += ("masked_select",)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2].lstrip("_")
        assert not name.startswith(self.WAITING), name
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
@pytest.mark.parametrize("M", [2, 70])
def test_forward_and_backward_never_wait_for_the_device(
    M: int, quant: str, few_rows_by: str
) -> None:
    W, A, B = torch.randn(40, 300), torch.randn(4, 300), torch.randn(40, 4)
    weight: Any = quantize_4bit(W) if quant else W.to(bf16)
    with _NoHostReads():
        dora_norm(weight, A, B, 0.5)
    for dtype, adapter in ((bf16, bf16), (bf16, f32), (f16, f32), (f32, f32)):
        for options in ({"dropout_p": 0.1}, FULL):
            args = cases.inputs(Case(M, 70, 64, 5, dtype, adapter, quant=quant, **options))
            dy = args.pop("dy")
            args["rng"] = None
            wanted = [t for t in args.values() if isinstance(t, Tensor) and t.requires_grad]
            with _NoHostReads():
                y = lora_linear(**args)
                torch.autograd.grad(y, wanted, dy)


def test_no_host_reads_notices_one() -> None:
    with pytest.raises(AssertionError, match="local_scalar_dense"), _NoHostReads():
        torch.ones(1).item()


@pytest.mark.parametrize("dtypes", [(f32, f32), (bf16, f32), (bf16, bf16), (f16, f32)], ids=str)
@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_dora_norm_from_products(quant: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for gate in (False, True):
        check_norm(Case(0, 70, 300, 5, *dtypes, quant=quant, gate=gate))


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_dora_norm_of_rows_along_the_adapter(dtype: torch.dtype) -> None:
    """W·Aᵀ is then as large as it can be, and the low part of a float32 A counts."""
    torch.manual_seed(0)
    A = torch.randn(3, 300) / 300**0.5
    W = (torch.randn(70, 3) @ A).to(dtype)
    B = torch.randn(70, 3)
    want = reference.dora_norm(W.double(), A.double(), B.double(), 0.5)
    got = dora_norm(W, A, B, 0.5)
    # Squares, products and their sum in float32, and A in two parts, 2⁻¹⁷/√K: a few roundings of
    # the largest term, which is at most (‖W‖ + ‖s·B·A‖)²; without A's low part 2⁻⁹/√K of it.
    largest = (W.double().norm(dim=1) + (0.5 * B.double() @ A.double()).norm(dim=1)) ** 2
    assert ((got.double() ** 2 - want**2).abs() <= 2.0**-21 * largest).all()


def test_dora_layer_sees_a_changed_base() -> None:
    """Nothing is kept from step to step, whether or not a write counts a version."""
    from lora_kernels.layers import DoRALinear

    linear = torch.nn.Linear(300, 40, bias=False)
    layer, x = DoRALinear.from_linear(linear, r=4), torch.randn(3, 300)
    for change in (
        lambda: None,
        lambda: layer.weight.mul_(2.0),
        lambda: layer.weight.data.mul_(2.0),
        lambda: setattr(layer, "weight", torch.nn.Parameter(torch.randn(40, 300), False)),
    ):
        with torch.no_grad():
            change()
        y = layer(x)  # with gradients, as in training
        scale = layer.magnitude / layer.weight.norm(dim=1)
        torch.testing.assert_close(y, (x @ layer.weight.t()) * scale)
    assert layer._cache.norm._entry is None


def test_dora_layer_sees_changed_4bit_codes() -> None:
    """The codes alone change, not the scales."""
    from lora_kernels.layers import QDoRALinear

    layer, x = QDoRALinear(320, 40, r=4), torch.randn(3, 320)
    layer(x)
    layer.weight.data[:] = layer.weight.data.flip(0)
    W = layer.quantized.dequantize(torch.float32)
    torch.testing.assert_close(layer(x), (x @ W.t()) * (layer.magnitude / W.norm(dim=1)))


def test_dora_layer_compiled_whole_is_the_same() -> None:
    from lora_kernels.layers import DoRALinear

    layer, x = DoRALinear.from_linear(torch.nn.Linear(300, 40), r=4), torch.randn(3, 300)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_dora_layer_in_inference_mode_and_back() -> None:
    """Weights made there have no version; a training step follows an evaluation there."""
    from lora_kernels.layers import DoRALinear

    linear = torch.nn.Linear(300, 40, bias=False)
    x = torch.randn(3, 300)
    with torch.inference_mode():
        inside = DoRALinear.from_linear(torch.nn.Linear(300, 40), r=4)
        assert inside(x).shape == (3, 40) and inside(x).shape == (3, 40)
    layer = DoRALinear.from_linear(linear, r=4)
    with torch.inference_mode():
        want = layer(x)
    layer(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(layer(x).detach(), want.clone())


@pytest.mark.parametrize("wide", [2, 3], ids=["lora_A", "lora_B"])
@pytest.mark.parametrize("K", [64, 63])  # 63: each expert by itself
@every_function
def test_autocast_rounds_the_adapters_of_each_function(function: str, K: int, wide: int) -> None:
    torch.manual_seed(0)
    tensors = torch.randn(6, K), torch.randn(32, K) / 8, torch.randn(8, K) / 8, torch.randn(32, 8)
    rounded = list(tensors)
    rounded[wide] = rounded[wide].to(bf16).float()
    with torch.autocast("cpu", bf16):
        got, want = (call(function, *given) for given in (tensors, rounded))
    assert got.dtype is bf16 and torch.equal(got, want)


@every_function
def test_without_autocast_adapters_keep_their_bits(function: str) -> None:
    torch.manual_seed(0)
    K = 63  # each expert by itself: a grouped GEMM rounds the adapter
    x, W = torch.randn(6, K, dtype=bf16), torch.zeros(32, K, dtype=bf16)
    adapter = torch.randn(8, K) / 8, torch.randn(32, 8)
    rounded = (t.to(bf16).float() for t in adapter)
    assert not torch.equal(call(function, x, W, *adapter), call(function, x, W, *rounded))


def test_seam_leaves_other_cpu_tensors_alone() -> None:
    assert library.is_on_gpu_path("cpu")
    with contextlib.suppress(ValueError), as_on_gpu():
        raise ValueError
    assert library.is_on_gpu_path("cpu") and library.is_on_gpu_path("meta")


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = sys.modules["peft"] = None
import torch, lora_kernels
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.layers import QLoRALinear
from lora_kernels.backends import decoder
layer = QLoRALinear.from_linear(torch.nn.Linear(64, 32), r=4, dropout=0.1)
x = torch.randn(5, 64, requires_grad=True)
with as_on_gpu(), lora_kernels.backend("eager"):
    layer(x).sum().backward()
    print(x.grad.shape, decoder.decoded_by(x.device, layer.quantized.codes, 64, x.dtype))
"""


def test_without_bitsandbytes_pytorch_decodes() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([5, 64]) PyTorch decodes in three kernels: no Triton")
    assert "; no GEMM of few rows decodes inside: bitsandbytes is not installed" in done.stdout


@pytest.mark.parametrize(("hip", "has"), [(None, True), ("6.4", False)])
def test_out_dtype_of_cuda_but_not_of_rocm(
    hip: str | None, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    on_a_gpu: Any = SimpleNamespace(is_cuda=True, is_meta=False, is_cpu=False)
    assert library.has_out_dtype(on_a_gpu) is has
