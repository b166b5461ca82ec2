"""The ops as compilers see them: schemas, fake implementations, graphs without a break."""

import pytest
import torch

from lora_kernels import lora_linear, multi_lora_linear
from lora_kernels.quantization import quantize_4bit
from tests.autograd.cases import OPTIONS, K, N, R, make_case, require_grad

DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.proof)]
OPERANDS = ("x", "weight", "lora_A", "lora_B", "rank_gate", "column_scale")


@pytest.mark.parametrize("save_z", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_lora_linear_passes_opcheck(option, dtype, save_z):
    c = make_case(option, dtype, x_shape=(2, 3, K))
    operands = [c[name] for name in (*OPERANDS, "bias", "rng")]
    spec = c["scaling"], c["dropout_p"], dtype, dtype, save_z
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear.default, (*operands, None, *spec))


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_lora_linear_backward_passes_opcheck(option, dtype, need):
    c = make_case(option, dtype, x_shape=(2, 3, K))
    stat = torch.promote_types(dtype, torch.float32)
    dy, z = torch.randn(2, 3, N).to(dtype), torch.randn(6, N).to(dtype)
    first, dropout = (dy, torch.randn(6, R).to(stat), z), (c["rng"], None)
    options = [c["scaling"], c["dropout_p"], dtype, dtype, False]
    needs = [True, need, need, *(need and c[name] is not None for name in OPERANDS[4:]), need]
    operands = [c[name] for name in OPERANDS]
    torch.library.opcheck(
        torch.ops.lora_kernels.lora_linear_backward.default,
        (*first, *operands, None, *dropout, *options, *needs),
    )


def outputs(function, case):
    """y and all gradients, as double so that they can be subtracted."""
    leaves = require_grad(case)
    y = function(**case)
    grads = torch.autograd.grad(y.square().sum(), leaves.values())
    return [t.detach().double() for t in (y, *grads)]


def check(backend_name, option, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(lora_linear, fullgraph=True, dynamic=True, backend=backend_name)
    # A second shape, and none that the first compilation could have specialized on.
    for i, x_shape in enumerate([(6, K), (9, K)]):
        case = make_case(option, dtype, x_shape)
        want = outputs(lora_linear, case)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = outputs(compiled, make_case(option, dtype, x_shape))
        # The same op runs in both: only y² and its sum may be ordered differently around it.
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max()


@pytest.mark.parametrize(
    "option",
    [
        pytest.param(o, marks=[pytest.mark.proof] if o in ("bias", "gate", "column_scale") else [])
        for o in OPTIONS  # "all" has these
    ],
)
def test_compiled_by_aot_eager_is_the_same(option):
    check("aot_eager", option, torch.float32)


def test_compiled_by_inductor_is_the_same():
    check("inductor", "all", torch.bfloat16)


@pytest.mark.parametrize("autocast_inside", [False, True])
def test_compiled_under_autocast_is_the_same(autocast_inside):
    torch._dynamo.reset()

    def function(**case):
        with torch.autocast("cpu", torch.bfloat16):
            return lora_linear(**case)

    case = make_case("all", torch.float32)
    leaves = require_grad(case)
    want = function(**case)
    want_grads = torch.autograd.grad(want.float().square().sum(), leaves.values())
    if autocast_inside:
        y = torch.compile(function, fullgraph=True, backend="aot_eager")(**case)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")(**case)
    grads = torch.autograd.grad(y.float().square().sum(), leaves.values())
    assert y.dtype is torch.bfloat16
    for a, b in zip([y, *grads], [want, *want_grads], strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("kind", ["dense", "4-bit", "several adapters"])
def test_backward_inside_a_compiled_function_is_the_same(kind):
    """y comes from outside: Dynamo follows the engine into the Function, and must not into the op,
    whose pointers it would part from their memory; dy is expanded, so that it has none of its own.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, W, A, B = (torch.randn(s) for s in ((5, 64), (48, 64), (3, 64), (48, 3)))
    leaves = [t.requires_grad_() for t in (x, A, B)]

    def forward():
        if kind == "several adapters":
            return multi_lora_linear(x, W, [A], [B], torch.arange(5) % 2 - 1)
        return lora_linear(x, quantize_4bit(W) if kind == "4-bit" else W, A, B)

    want = torch.autograd.grad(forward().sum(), leaves)
    torch.compile(lambda y: y.sum().backward(), backend="aot_eager")(forward())
    for leaf, grad in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
