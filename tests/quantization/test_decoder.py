"""The GEMM of few rows over 4-bit weights on a GPU: the first call checks bitsandbytes'.

CPU tensors take the GPU path.
"""

import itertools
import sys
from contextlib import ExitStack

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels
from lora_kernels import lora_linear
from lora_kernels.backends import decoder, workspace
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.bench import counter
from lora_kernels.bench.blocks import Cell, build_layer
from lora_kernels.choice.verdicts import Group
from lora_kernels.layers import QLoRALinear
from lora_kernels.layers.quantized import _quantize_on_meta
from lora_kernels.peft import fuse
from lora_kernels.qualification import timing
from lora_kernels.quantization import quantize_4bit
from tests.support import fake_card

bitsandbytes = pytest.importorskip("bitsandbytes")
bf16 = torch.bfloat16
GROUP = Group("cuda", "two_pass", "bfloat16", "bfloat16", "4bit")


@pytest.fixture(autouse=True)
def no_reasons(monkeypatch):
    """bitsandbytes was not checked on any device yet."""
    monkeypatch.setattr(decoder, "bitsandbytes_reasons", reasons := {})
    return reasons


def linear4bit():
    base = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=bf16)
    weight = torch.randn(64, 128, dtype=bf16)
    base.weight = bitsandbytes.nn.Params4bit(weight, False, quant_type="nf4")
    return base.to("cpu")


def adapted(base):
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = True
    return get_peft_model(model, LoraConfig(r=3, target_modules=["0"]))


def call_of_op():
    """`lora_linear` on a plain `QuantizedWeight`."""
    weight = quantize_4bit(torch.randn(64, 128, dtype=bf16))
    A, B = torch.ones(3, 128, dtype=bf16), torch.ones(64, 3, dtype=bf16)
    return lambda x: lora_linear(x, weight, A, B)


def call_of_layer():
    return QLoRALinear(128, 64, r=3, dtype=bf16)


def call_of_model_fused_on_a_gpu():
    with as_on_gpu():
        return fuse(adapted(linear4bit()))


def call_of_model_fused_before_it_moved():
    """Fuse on a CPU, which asks for no decoder; then move, as `.cuda()` does."""
    return fuse(adapted(linear4bit()))


def call_of_worker():
    """A timed call of `qualify`'s worker, by the eager backend that it times."""
    card = fake_card.FakeCard.__new__(fake_card.FakeCard)
    timed = timing.Timed(card, GROUP, 2, 64, 128)
    return lambda x: timed.forward(0)


ENTRIES = {
    name.removeprefix("call_of_"): make
    for name, make in list(globals().items())
    if name.startswith("call_of_")
}


@pytest.fixture
def x():
    return torch.randn(2, 128, dtype=bf16)


@pytest.mark.parametrize("entry", ENTRIES)
def test_first_4bit_call_on_a_gpu_has_checked_bitsandbytes(entry, x, no_reasons):
    call = ENTRIES[entry]()
    no_reasons.clear()
    with as_on_gpu(), lora_kernels.backend("eager"):
        call(x)
    assert no_reasons == {("cpu", None, "nf4"): None}


RECORDED = {
    "capture": lambda patch: patch.setattr(workspace, "is_capturing", lambda device: True),
    "compile": lambda patch: patch.setattr(torch.compiler, "is_compiling", lambda: True),
}
ALONE = ("op", "layer", "model_fused_before_it_moved")
CALLS = [*itertools.product(ALONE, ("capture", "compile"))]


def decoder_of(x):
    return decoder.decoded_by(x.device, quantize_4bit(torch.ones(2, 128)).codes, 128, bf16)


@pytest.mark.parametrize(("entry", "recorded"), CALLS)
def test_bitsandbytes_is_not_checked_while_a_call_is_recorded(
    entry, recorded, x, no_reasons, monkeypatch
):
    """The unchecked decoder runs and the reason says so; the next call checks."""
    call, asked = ENTRIES[entry](), []
    no_reasons.clear()
    compare = decoder.compare_bitsandbytes
    monkeypatch.setattr(
        decoder, "compare_bitsandbytes", lambda *args: asked.append(args) or compare(*args)
    )
    with as_on_gpu(), lora_kernels.backend("eager"):
        with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
            patch.enter_context = stack.enter_context
            RECORDED[recorded](patch)
            if recorded != "compile":  # which the package's functions follow too
                call(x)
            assert decoder.UNCHECKED in decoder_of(x)
        assert not asked and not no_reasons
        call(x)
        assert asked == [("nf4", x.device)]
        assert "few rows" not in decoder_of(x)
        call(x)
        assert len(asked) == 1


def test_check_of_bitsandbytes_has_nothing_of_the_caller_s_in_force(x, no_reasons):
    call = call_of_op()
    on_gpu, autocast = lora_kernels.backend("eager"), torch.autocast("cpu", bf16)
    with as_on_gpu(), on_gpu, autocast, torch.inference_mode(), torch.device("meta"):
        call(x)
    assert no_reasons == {("cpu", None, "nf4"): None}
    no_reasons.clear()
    with as_on_gpu(), lora_kernels.backend("triton"):  # which cannot take the sample
        assert decoder.bitsandbytes_reason(x.device) is None


def test_check_of_bitsandbytes_that_raises_is_made_again(x, no_reasons, monkeypatch):
    def compare(quant_type, device):
        raise MemoryError

    call = call_of_op()
    with as_on_gpu(), lora_kernels.backend("eager"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(decoder, "compare_bitsandbytes", compare)
            call(x)
        assert not no_reasons
        call(x)
    assert no_reasons == {("cpu", None, "nf4"): None}


def test_bitsandbytes_reason_of_a_cpu_asks_nothing(no_reasons):
    assert decoder.bitsandbytes_reason(torch.device("cpu")) is not None
    assert not no_reasons


def test_bitsandbytes_reason_of_meta_imports_nothing(no_reasons, monkeypatch):
    meta = torch.device("meta")
    monkeypatch.setattr(
        sys, "modules", {k: m for k, m in sys.modules.items() if k != "bitsandbytes"}
    )
    assert decoder.bitsandbytes_reason(meta) == decoder.UNCHECKED
    assert not no_reasons
    monkeypatch.undo()
    assert decoder.bitsandbytes_reason(meta) is None


def test_bitsandbytes_reason_is_of_one_gpu(no_reasons, monkeypatch):
    """A device without an index is the current one."""
    asked = []

    def compare(quant_type, device):
        asked.append((quant_type, device))
        return "no kernel image" if device.index else None

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(decoder, "compare_bitsandbytes", compare)
    for index in (1, None, 0, 1):
        device = torch.device("cuda") if index is None else torch.device("cuda", index)
        found = decoder.bitsandbytes_reason(device)
        assert found == (None if index == 0 else "no kernel image")
    assert asked == [("nf4", torch.device("cuda", 1)), ("nf4", torch.device("cuda", 0))]


def test_bitsandbytes_reason_is_of_one_type(no_reasons, monkeypatch):
    """A difference in FP4 leaves NF4, and the formats that bitsandbytes lacks ask nothing."""
    wrong = {"fp4": "a code of fp4 differs"}
    monkeypatch.setattr(decoder, "compare_bitsandbytes", lambda kind, device: wrong.get(kind))
    cpu = torch.device("cpu")
    with as_on_gpu():
        assert decoder.bitsandbytes_reason(cpu, "nf4") is None
        assert decoder.bitsandbytes_reason(cpu, "fp4") == "a code of fp4 differs"
        for kind in ("mxfp4", "nvfp4"):
            said = f"bitsandbytes has no {kind.upper()}"
            assert decoder.bitsandbytes_reason(cpu, kind) == said
            codes = quantize_4bit(torch.ones(2, 64), kind).codes
            assert "bitsandbytes" not in decoder.decoded_by(cpu, codes, 64, bf16)
    assert set(no_reasons) == {("cpu", None, "nf4"), ("cpu", None, "fp4")}


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_formats_that_bitsandbytes_lacks_never_reach_its_ops(kind, no_reasons, monkeypatch):
    """Linear layers and stacks of experts, of few rows and many."""

    def fail(*args):
        raise AssertionError("bitsandbytes was called")

    monkeypatch.setattr(decoder, "bitsandbytes_gemm", fail)
    weight = quantize_4bit(torch.randn(64, 128, dtype=bf16), kind)
    A, B = (torch.ones(*shape, dtype=bf16) for shape in ((3, 128), (64, 3)))
    with as_on_gpu(), lora_kernels.backend("eager"):
        for M in (1, 40):
            x = torch.randn(M, 128, dtype=bf16, requires_grad=True)
            lora_linear(x, weight, A, B).sum().backward()
        decoder.with_plain_scales(weight.codes)
    assert not no_reasons


@pytest.mark.parametrize("M", [1, 128])
def test_eager_of_the_worker_moves_no_more_than_peft_s_layer(M, monkeypatch):
    """Counted on meta, where bitsandbytes' ops stand for those of a GPU: kernels qualify against
    what PEFT's users have."""
    monkeypatch.setattr(timing, "quantize_4bit", _quantize_on_meta)
    card = fake_card.FakeCard.__new__(fake_card.FakeCard)
    card.device = "meta"
    timed = timing.Timed(card, GROUP, M, 4096, 4096)
    with lora_kernels.backend("eager"):
        ours = counter.count(lambda: timed.forward(0))
    layer, x = build_layer(Cell("NF4", bf16, bf16, "nf4"), 4096, 4096, timing.RANK), timed.leaves[0]
    with torch.no_grad():
        peft = counter.count(lambda: layer(x))
    assert ours.bytes <= peft.bytes and ours.kernels <= peft.kernels
