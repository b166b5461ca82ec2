"""The direct call of a fused layer has the planned call's bits, and reads every change."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

import lora_kernels
from lora_kernels.backends.cpu import native
from lora_kernels.backends.cpu.linear import FUSED_ISAS
from lora_kernels.ops import direct
from lora_kernels.peft import fuse
from lora_kernels.quantization import quantize_4bit
from tests.support.models import general_way, watch_direct_calls
from tests.support.peft_models import add_adapter, add_lora, count_ops

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.skipif(native.module is None, reason="no native kernels")

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
K, N = 128, 192


class Net(nn.Module):
    def __init__(self, four_bit: bool) -> None:
        super().__init__()
        linear = bnb.nn.Linear4bit if four_bit else nn.Linear
        self.up = linear(K, N, **({"quant_type": "nf4"} if four_bit else {}))


@pytest.fixture(params=[False, True], ids=["dense", "nf4"])
def layer(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    net = Net(request.param).to("cpu")
    net.is_loaded_in_4bit = request.param  # type: ignore[assignment]  # as transformers says it
    model = add_lora(net, target_modules=["up"])
    add_adapter(model, "other")
    layer: Any = fuse(model).eval().base_model.model.up
    with torch.no_grad():
        for adapter in ("default", "other"):
            nn.init.normal_(layer.lora_B[adapter].weight)
    layer.base_layer.support_avx512bf16_for_cpu = False  # bitsandbytes keeps its scales
    return layer


def is_dense(layer: Any) -> bool:
    return not isinstance(layer.base_layer.weight, bnb.nn.Params4bit)


def row(rows: int = 1) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(3))


def decode(layer: Any, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        y: Tensor = layer(row() if x is None else x)
    return y


def is_direct(call: Callable[[], object]) -> bool:
    """Return whether the call of a layer was direct."""
    with pytest.MonkeyPatch.context() as patch:
        answers = watch_direct_calls(patch)
        call()
    return bool(answers) and answers[-1] is not None


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
def test_decoding_gives_the_same_bits(layer: Any, dtype: torch.dtype, rows: int) -> None:
    if is_dense(layer) and dtype is not f32:
        layer.base_layer.to(dtype)
    x = row(rows).to(dtype).view(rows, 1, K)
    with general_way():
        first = decode(layer, x)
    assert first.shape == (rows, 1, N)
    decode(layer, x)  # sets the compute_dtype of a Linear4bit
    assert is_direct(lambda: decode(layer, x))
    assert torch.equal(decode(layer, x), first)
    with torch.inference_mode():
        assert torch.equal(layer(x), first)
    with torch.no_grad(), lora_kernels.backend("cpu"):
        assert torch.equal(layer(x), first)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class LinearSubclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced_forward(layer: Any) -> None:
    linear = layer.lora_B["default"]
    linear.forward = MethodType(lambda self, x: 3 * nn.functional.linear(x, self.weight), linear)


def replaced_base(layer: Any) -> None:
    layer.base_layer = copy.deepcopy(layer.base_layer)
    layer.base_layer.bias.data += 1


def new_weight_tensor(layer: Any) -> None:
    data = layer.base_layer.weight.data.clone()
    data.view(-1)[:8] = data.view(-1)[8:16]
    layer.base_layer.weight.data = data


def new_parameter(layer: Any) -> None:
    linear = layer.lora_A["default"]
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def new_data(layer: Any) -> None:
    weight = layer.lora_B["default"].weight
    weight.data = weight.data * 2


def lower_rank(layer: Any) -> None:
    """In the same memory."""
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data, B.data = A.data[:2], B.data[:, :2]


def double_adapter(layer: Any) -> None:
    layer.lora_A["default"].double(), layer.lora_B["default"].double()
    in_place(layer)


def in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(2)


def bias_in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.base_layer.bias.add_(1)


def other_adapters(layer: Any) -> None:
    layer.lora_A = copy.deepcopy(layer.lora_A)
    layer.lora_A["default"].weight.data *= 2


def other_parts(*path: str) -> Callable[[Any], None]:
    """Replace lora_B, or one adapter's part, by another one with twice the weight."""

    def change(layer: Any) -> None:
        place, name = layer, path[-1]
        for each in path[:-1]:
            place = getattr(place, each)
        other = copy.deepcopy(place[name] if isinstance(place, nn.ModuleDict) else layer.lora_B)
        for weight in other.parameters():
            weight.data *= 2
        place.__setitem__(name, other) if place is not layer else setattr(layer, name, other)

    return change


class Tripled(LoraVariant):
    """A variant of LoRA that does something else."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None: ...

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        return 3 * result


def biased_adapter(layer: Any) -> None:
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(N), requires_grad=False)


def parametrized_bias(layer: Any) -> None:
    nn.utils.parametrize.register_parametrization(layer.base_layer, "bias", Doubled())


def other_class(layer: Any) -> None:
    if is_dense(layer):
        layer.base_layer.__class__ = LinearSubclass
    else:
        in_place(layer)


def other_scales(layer: Any) -> None:
    state = layer.base_layer.weight.quant_state
    state.absmax = state.absmax.flip(0).clone()


def other_state(layer: Any) -> None:
    layer.base_layer.weight.quant_state = copy.deepcopy(layer.base_layer.weight.quant_state)
    layer.base_layer.weight.quant_state.absmax *= 2


def hook_on(part: str, hook: Callable[..., Tensor]) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        module = getattr(layer, part)
        module = module if part == "base_layer" else module["default"]
        module.register_forward_hook(hook)

    return change


def hooks_replaced(part: str) -> Callable[[Any], None]:
    """Replace the dictionary of hooks, as code does that clears them."""

    def change(layer: Any) -> None:
        module = getattr(layer, part)
        module = module if part == "base_layer" else module["default"]
        module._forward_hooks = OrderedDict()
        module.register_forward_hook(lambda _m, _x, y: y * 2)

    return change


def class_of(part: str, cls: type) -> Callable[[Any], None]:
    return lambda layer: setattr(getattr(layer, part)["default"], "__class__", cls)


def replaced_parameters(layer: Any) -> None:
    linear = layer.lora_A["default"]
    linear._parameters = dict(linear._parameters, weight=nn.Parameter(2 * linear.weight.detach()))


def replaced_entry(layer: Any) -> None:
    other = copy.deepcopy(layer.lora_B["default"])
    other.weight.data *= 2
    layer.lora_B._modules = dict(layer.lora_B._modules, default=other)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hooks_replaced": hooks_replaced("base_layer"),
    "hooks_of_lora_A_replaced": hooks_replaced("lora_A"),
    "hooks_of_dropout_replaced": hooks_replaced("lora_dropout"),
    "other_class_of_lora_A": class_of("lora_A", LinearSubclass),
    "other_class_of_lora_B": class_of("lora_B", LinearSubclass),
    "other_class_of_dropout": class_of("lora_dropout", Doubled),
    "variants_replaced": lambda layer: setattr(layer, "lora_variant", {"default": Tripled()}),
    "replaced_parameters": replaced_parameters,
    "replaced_entry": replaced_entry,
    "hooked": hook_on("base_layer", lambda _m, _x, y: y + 1),
    "hooked_adapter": hook_on("lora_A", lambda _m, _x, y: y * 2),
    "replaced_forward": replaced_forward,
    "replaced_base": replaced_base,
    "new_weight_tensor": new_weight_tensor,
    "new_parameter": new_parameter,
    "new_data": new_data,
    "lower_rank": lower_rank,
    "other_dtype": lambda layer: layer.lora_A["default"].to(bf16),
    "double_adapter": double_adapter,
    "in_place": in_place,
    "bias_in_place": bias_in_place,
    "no_bias": lambda layer: setattr(layer.base_layer, "bias", None),
    "scaled": lambda layer: layer.scaling.update(default=3.5),
    "scaled_by_peft": lambda layer: layer.set_scale("default", 3.0),
    "other_adapter": lambda layer: layer.set_adapter("other"),
    "both_adapters": lambda layer: layer.set_adapter(["default", "other"]),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "other_adapters": other_adapters,
    "other_lora_B": other_parts("lora_B"),
    "other_part_of_lora_A": other_parts("lora_A", "default"),
    "other_part_of_lora_B": other_parts("lora_B", "default"),
    "variant": lambda layer: layer.lora_variant.update(default=Tripled()),
    "biased_adapter": biased_adapter,
    "hooked_dropout": hook_on("lora_dropout", lambda _m, _x, y: y * 2),
    "replaced_dropout": lambda layer: setattr(
        layer.lora_dropout["default"], "forward", lambda x: 2 * x
    ),
    "parametrized_bias": parametrized_bias,
    "other_class": other_class,
}
CHANGES_OF_TRAINING: dict[str, Callable[[Any], Any]] = {
    "trainable_base": lambda layer: layer.base_layer.weight.requires_grad_(),
    "dropout": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.5)}),
    "less_dropout": lambda layer: setattr(layer.lora_dropout["default"], "p", 0.25),
    "other_dropouts": lambda layer: setattr(
        layer, "lora_dropout", nn.ModuleDict({"default": nn.Dropout(0.5), "other": nn.Identity()})
    ),
}


def of_state(name: str, scale: Any, nested: bool = False, in_data: bool = False) -> Any:
    """Replace a tensor of the quantization state, or its `.data`."""

    def change(layer: Any) -> None:
        state = layer.base_layer.weight.quant_state
        place = state.state2 if nested else state
        t = getattr(place, name)
        if in_data:
            t.data = t.data.clone() * scale
        else:
            setattr(place, name, t * scale)

    return change


CHANGES_OF_4_BITS: dict[str, Callable[[Any], Any]] = {
    "other_offset": of_state("offset", 3.0),
    "other_offset_data": of_state("offset", 3.0, in_data=True),
    "other_scales_of_scales": of_state("absmax", 3.0, nested=True),
    "other_scales_of_scales_data": of_state("absmax", 3.0, nested=True, in_data=True),
    "other_code_of_scales": of_state("code", 3.0, nested=True),
    "other_code": of_state("code", -1.0),
    "other_code_data": of_state("code", -1.0, in_data=True),
    "other_scales": other_scales,
    "other_scales_in_place": lambda layer: layer.base_layer.weight.quant_state.absmax.mul_(2),
    "other_state": other_state,
    "other_compute_dtype": lambda layer: setattr(layer.base_layer, "compute_dtype", bf16),
}
ALL_CHANGES = CHANGES | CHANGES_OF_TRAINING | CHANGES_OF_4_BITS


def assert_followed(layer: Any, change: Callable[[Any], Any], call: Callable[[Any], Any]) -> None:
    """After the change the call has another result: the planned call's."""
    before = call(layer)
    change(layer)
    with general_way():
        want = call(copy.deepcopy(layer))
    assert not all(map(is_equal, want, before))
    assert all(map(is_equal, call(layer), want))


def is_equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
@pytest.mark.parametrize("change", CHANGES | CHANGES_OF_4_BITS)
def test_decoding_notices_a_change(layer: Any, change: str) -> None:
    decode(layer)
    assert is_direct(lambda: decode(layer))
    noop = change in CHANGES_OF_4_BITS and is_dense(layer)
    assert_followed(layer, ALL_CHANGES["in_place" if noop else change], lambda each: [decode(each)])


def train(layer: Any) -> list[Tensor | None]:
    """y, dx, and the gradients of both adapters and of the base, None if there is none."""
    x = row(3).requires_grad_()
    adapters = (linear for d in (layer.lora_A, layer.lora_B) for linear in d.values())
    leaves = [x, *(linear.weight for linear in adapters), layer.base_layer.weight]
    torch.manual_seed(1)
    y = layer(x)
    trained = [t for t in leaves if t.requires_grad]
    found = iter(torch.autograd.grad(y, trained, torch.ones_like(y), allow_unused=True))
    return [y.detach(), *(next(found) if t.requires_grad else None for t in leaves)]


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
@pytest.mark.parametrize("change", ALL_CHANGES)
def test_training_notices_a_change(layer: Any, change: str) -> None:
    noop = change in CHANGES_OF_4_BITS if is_dense(layer) else change == "trainable_base"
    layer.train()
    if change == "less_dropout":
        ALL_CHANGES["dropout"](layer)
    train(layer)
    assert is_direct(lambda: train(layer))
    assert_followed(layer, ALL_CHANGES["in_place" if noop else change], train)


def test_what_surrounds_a_training_call_is_noticed(layer: Any) -> None:
    """Rows with adapters of their own, autocast, a compiler; and what PEFT does for these."""
    layer.train()
    x = row(3)
    plain = train(layer)
    assert is_direct(lambda: layer(x))
    mixed = layer(x, adapter_names=["other", "default", "__base__"])
    assert not is_direct(lambda: layer(x, adapter_names=["default"] * 3))
    assert not torch.equal(mixed, layer(x))
    assert all(map(is_equal, train(layer), plain))
    with torch.autocast("cpu", bf16):
        got = layer(x)
        with general_way():
            assert got.dtype is layer(x).dtype and torch.equal(got, layer(x))
    if not is_dense(layer):
        for dtype in (bf16, torch.float64):  # the latter by PEFT, for its adapters are float32
            train(layer)
            got = layer(x.to(dtype))
            with general_way():
                assert got.dtype is dtype and torch.equal(got, layer(x.to(dtype)))
    replica = copy.copy(layer)  # as DataParallel makes them
    replica._modules = dict(layer._modules, base_layer=copy.deepcopy(layer.base_layer))
    replica.base_layer.bias.data += 1
    assert not torch.equal(replica(x), layer(x))


def test_decoding_notices_a_patched_class(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = decode(layer)
    assert torch.equal(decode(layer), before)
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
    assert not torch.equal(decode(layer), before)
    monkeypatch.undo()
    assert torch.equal(decode(layer), before)


def test_decoding_notices_a_compute_dtype_that_is_to_be_settled_again(layer: Any) -> None:
    base = layer.base_layer
    base.compute_dtype, base.compute_type_is_set = bf16, True
    before = decode(layer)
    assert torch.equal(decode(layer), before)
    base.compute_type_is_set = False  # the next x settles it
    after = decode(layer)
    assert torch.equal(after, before) is is_dense(layer)
    assert is_dense(layer) or base.compute_dtype is f32


@pytest.mark.parametrize("way", ["later", "in_place"])
def test_decoding_notices_an_active_adapter_more(layer: Any, way: str) -> None:
    """An adapter gets its weights, or joins the list of active ones in place."""
    lora_A = layer.lora_A["other"]
    layer.set_adapter(["default", "other"] if way == "later" else ["default"])
    if way == "later":
        del layer.lora_A["other"]
    alone = decode(layer)
    assert torch.equal(decode(layer), alone)
    if way == "later":
        layer.lora_A["other"] = lora_A
    else:
        layer._active_adapter.append("other")
    both = decode(layer)
    assert not torch.equal(both, alone) and torch.equal(decode(layer), both)


def test_computed_parameters_go_from_memory(layer: Any) -> None:
    """Everything that their graph holds goes too."""
    A = layer.lora_A["default"].weight.detach() * nn.Parameter(torch.ones(()))
    y = torch.func.functional_call(layer, {"lora_A.default.weight": A}, (row(3),))
    gone = weakref.ref(A)
    del A, y
    gc.collect()
    assert gone() is None


def test_layer_goes_from_memory_at_once(layer: Any) -> None:
    """A call leaves no reference to the layer; collecting cycles may take long."""
    part = copy.deepcopy(layer)
    decode(part), train(part)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(part.base_layer)
        del part
        assert gone() is None
    finally:
        gc.enable()


def test_what_surrounds_a_call_is_noticed(layer: Any) -> None:
    x = row()
    y = decode(layer, x)
    assert is_direct(lambda: decode(layer, x))
    assert is_direct(lambda: layer(x)) and layer(x).requires_grad
    with torch.autocast("cpu", bf16):
        assert not is_direct(lambda: decode(layer, x))
    with lora_kernels.backend("eager"):
        assert not is_direct(lambda: decode(layer, x))
    assert count_ops(lambda: decode(layer, x)).keys() & {"lora_linear", "lora_linear_quantized"}
    layer.lora_dropout["default"] = nn.Dropout(0.5)
    assert is_direct(lambda: decode(layer, x)) and not torch.equal(decode(layer, x), y)
    layer.lora_dropout["default"].eval()
    wide = torch.randn(1, 2 * K)[:, ::2]
    others = [row()[:0], wide, x.double()]
    others += [x.to(bf16)] if is_dense(layer) else []
    for other in others:
        assert not is_direct(lambda x=other: _try(layer, x))
    many = [row(40)] if is_dense(layer) or native.isa in FUSED_ISAS else []
    for other in (*many, nn.Parameter(x)):
        assert is_direct(lambda x=other: decode(layer, x))
    assert is_direct(lambda: decode(layer, x)) and torch.equal(decode(layer, x), y)


def _try(layer: Any, x: Tensor) -> None:
    try:
        decode(layer, x)
    except (RuntimeError, TypeError):  # a dtype that does not go with the dense base
        assert x.dtype is not f32


def test_layer_keeps_nothing_of_a_call(layer: Any) -> None:
    state = vars(layer).copy()
    decode(layer), train(layer)
    assert vars(layer).keys() == state.keys()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute_dtype", [None, bf16], ids=str)
@pytest.mark.parametrize("rows", [1, 100])
def test_direct_call_of_4bit_codes_reads_each_of_their_tensors(
    rows: int, compute_dtype: torch.dtype | None, nested: bool
) -> None:
    if rows > 8 and native.isa not in FUSED_ISAS:
        pytest.skip("the library makes the product")
    weight = quantize_4bit(torch.randn(N, K), double_quant=nested)
    A, B, bias = torch.randn(5, K), torch.randn(5, N).t(), torch.randn(N).to(bf16)
    x = row(rows)
    read = [t for t in weight.codes[:6] if t is not None and t is not weight.code]
    for t in read:
        t.copy_(t.flip(0) if t.dim() and t.numel() > 1 else t * 3)
        want = lora_kernels.lora_linear(x, weight, A, B, 1.5, bias, compute_dtype=compute_dtype)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                got = direct.call(x, weight.codes, A, B, bias, 1.5, 0.0, compute_dtype)
            assert got is not None and torch.equal(got, want)
    weight.code.neg_()  # which is the type's, or the weight is not bitsandbytes'
    assert direct.call(x, weight.codes, A, B, bias, 1.5, 0.0, compute_dtype) is None


def _ranks_of_B(layer: Any) -> None:
    B = layer.lora_B["default"].weight
    B.data = B.data[:, :2]


def _rows_of_B(layer: Any) -> None:
    B = layer.lora_B["default"].weight
    B.data = B.data[:7]


def _columns_of_A(layer: Any) -> None:
    A = layer.lora_A["default"].weight
    A.data = A.data[:, :7]


def _length_of_the_bias(layer: Any) -> None:
    layer.base_layer.bias.data = layer.base_layer.bias.data[:7]


def _dtype_of_the_bias(layer: Any) -> None:
    layer.base_layer.bias.data = layer.base_layer.bias.data.double()


def _columns_of_the_weight(layer: Any) -> None:
    W = layer.base_layer.weight
    W.data = W.data[:, :7]


def _device_of_the_bias(layer: Any) -> None:
    bias = layer.base_layer.bias.detach().to("meta")
    layer.base_layer.bias = nn.Parameter(bias, requires_grad=False)


def _device_of_A(layer: Any) -> None:
    layer.lora_A["default"].to("meta")


WRONG = (
    *(_ranks_of_B, _rows_of_B, _columns_of_A, _length_of_the_bias, _dtype_of_the_bias),
    *(_columns_of_the_weight, _device_of_A, _device_of_the_bias),
)


def outcome(layer: Any, rows: int) -> str:
    try:
        return f"a result of {list(layer(row(rows)).shape)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_tensor_of_another_layout_raises_as_in_a_planned_call(
    layer: Any, wrong: Callable[[Any], None], grad: bool, rows: int
) -> None:
    """Kernels read by address: what `.data` put into a parameter is checked in each call."""
    if wrong is _columns_of_the_weight and not is_dense(layer):
        return
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            layer(row(rows))
        wrong(layer)
        got = outcome(layer, rows)
        with general_way():
            want = outcome(layer, rows)
    assert got == want
    assert wrong is _device_of_A or "a result" not in want  # that call is PEFT's
