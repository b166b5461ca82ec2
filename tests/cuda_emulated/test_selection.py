"""The choice of a kernel for a GEMM, and the reason if it is not the fastest one."""

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_kernels import info, verify
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import COOPERATIVE, STRATEGIES, TWO_PASS, constraints, launch
from lora_kernels.backends.cuda import linear as cuda_linear
from lora_kernels.backends.launches import Plan, planned
from lora_kernels.choice import choose as selection
from lora_kernels.core import device
from lora_kernels.core.problem import NO_DROPOUT, Choice, Layout, Problem
from lora_kernels.layers import LoRALinear
from lora_kernels.oracle.case import Case
from lora_kernels.peft import explain, fuse
from lora_kernels.quantization import quantize_4bit
from lora_kernels.verify import OPTIONS

f32, bf16 = torch.float32, torch.bfloat16
ROWS, CODES = Layout(), Layout(64)
COLUMNS, OFF = Layout(columns=True), Layout(unsupported_reason="the weight's rows are not whole")


def choose(M: int, N: int, K: int, layout: Layout = ROWS, dtype: torch.dtype = bf16) -> Choice:
    return selection.choose(
        Problem("cpu", dtype, dtype, dtype, dtype, 16, M, layout.blocksize > 0, N, K, layout=layout)
    )


@pytest.mark.parametrize(
    ("M", "N", "K", "layout", "strategy", "words"),
    [
        (0, 64, 64, ROWS, COOPERATIVE, []),
        (16, 64, 64, ROWS, COOPERATIVE, []),
        (17, 64, 64, ROWS, TWO_PASS, []),
        (1, 64, 96, CODES, TWO_PASS, [f"not {COOPERATIVE!r}: K = 96 is no multiple of 64"]),
        (1, 64, 64, Layout(32), TWO_PASS, ["blocks of 32 codes are less than 64"]),
        (1, 64, 64, COLUMNS, TWO_PASS, ["the weight is stored as [K, N]"]),
    ],
    ids=str,
)
def test_choose_says_what_keeps_a_kernel_from_a_product(
    M: int, N: int, K: int, layout: Layout, strategy: str, words: list[str]
) -> None:
    choice = choose(M, N, K, layout)
    assert choice.strategy == strategy
    assert all(word in choice.reason for word in words), choice.reason
    assert words or choice.reason == "the cuda backend was requested"


NO_BASE = Layout(unsupported_reason=constraints.NO_BASE)
ROWS_OF_X, ROWS_OF_DY = "so that rows of x are not whole loads", "so that rows of dy are not whole"


@pytest.mark.parametrize("M", [0, 1, 99])
@pytest.mark.parametrize(
    ("N", "K", "layout", "dtype", "why"),
    [
        (64, 64, ROWS, f32, "float32 products need every bit, which tensor cores drop"),
        (64, 63, ROWS, bf16, f"K = 63 is no multiple of 8, {ROWS_OF_X}"),
        (64, 63, COLUMNS, bf16, f"K = 63 is no multiple of 8, {ROWS_OF_X}"),
        (65, 64, ROWS, bf16, f"N = 65 is no multiple of 8, {ROWS_OF_DY}"),
        (65, 64, CODES, bf16, f"N = 65 is no multiple of 8, {ROWS_OF_DY}"),
        (63, 64, COLUMNS, bf16, f"N = 63 is no multiple of 8, {ROWS_OF_DY}"),
        (64, 72, CODES, bf16, "K = 72 is no multiple of 32, so that rows are not whole runs"),
        (64, 64, OFF, bf16, "the weight's rows are not whole"),
        (1, 63, NO_BASE, f32, "there is no base GEMM"),
    ],
)
def test_choose_of_what_either_direction_cannot_run_raises(
    M: int, N: int, K: int, layout: Layout, dtype: torch.dtype, why: str
) -> None:
    with pytest.raises(RuntimeError) as raised:
        choose(M, N, K, layout, dtype)
    assert str(raised.value).startswith(f"backend 'cuda' was requested and cannot run here: {why}")


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_lora_linear_with_dropout_raises(strategy: str | None) -> None:
    """With the mask's state, with a mask, and with neither."""
    x, W = torch.ones(3, 64, dtype=bf16), torch.ones(8, 64, dtype=bf16)
    A, B = torch.ones(2, 64, dtype=bf16), torch.ones(8, 2, dtype=bf16)
    want = f"backend 'cuda' was requested and cannot run here: {NO_DROPOUT}"
    mask = torch.ones(3, 64, dtype=torch.bool)
    for dropout in ({}, {"rng": torch.tensor([1, 2])}, {"dropout_mask": mask}):
        with (
            lora_kernels.backend("cuda", strategy),
            pytest.raises(RuntimeError, match=re.escape(want)),
        ):
            lora_kernels.lora_linear(x, W, A, B, dropout_p=0.5, **dropout)
    assert not launch.traffic


def test_dora_norm_raises_and_4bit_weights_take_no_kernel() -> None:
    """Decoding and quantizing run as by the eager backend on the device."""
    W, A, B = torch.ones(8, 64), torch.ones(2, 64), torch.ones(8, 2)
    with pytest.raises(RuntimeError, match=r"'cuda' was requested .* no kernel for row norms"):
        lora_kernels.dora_norm(W, A, B)
    weight = quantize_4bit(W)
    with lora_kernels.backend("eager"):
        want, decoded = quantize_4bit(W), weight.dequantize(bf16)
    assert all(map(torch.equal, weight.codes[:3], want.codes[:3]))
    assert torch.equal(weight.dequantize(bf16), decoded) and not launch.traffic


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_requested_but_unsupported_raises(strategy: str) -> None:
    A, B = torch.ones(2, 63, dtype=bf16), torch.ones(8, 2, dtype=bf16)
    x, W = torch.ones(3, 63, dtype=bf16), torch.ones(8, 63, dtype=bf16)
    with (
        lora_kernels.backend("cuda", strategy),
        pytest.raises(RuntimeError, match=f"strategy '{strategy}' was requested .* K = 63"),
    ):
        lora_kernels.lora_linear(x, W, A, B)
    assert not launch.traffic


def test_layout_of_a_weight_says_how_it_lies() -> None:
    W = torch.zeros(16, 64, dtype=bf16)
    assert constraints.layout(W, bf16) == ROWS and constraints.layout(W.t(), bf16) == COLUMNS
    assert constraints.layout(None, bf16).unsupported_reason == constraints.NO_BASE
    for odd in (W.view(-1)[1:].as_strided((15, 64), (64, 1), 1), W[:, :63], W[:, ::2]):
        assert constraints.layout(odd, bf16).unsupported_reason == (
            None if odd.shape[1] == 63 else "the weight's rows are not whole and aligned 16 bytes"
        )
        assert constraints.layout(odd, f32).unsupported_reason is None  # it is converted, into rows
    codes = quantize_4bit(W, "nf4", 128).codes
    assert constraints.layout(codes, bf16) == Layout(128)
    off = torch.cat([codes.packed[:1], codes.packed])[1:]
    assert constraints.layout(codes._replace(packed=off), bf16).unsupported_reason is not None


@pytest.mark.parametrize("K", [64, 63])
def test_kernel_of_rows_that_fit_should_refuse_raises(
    K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraints, "unsupported_reason", lambda *args: None)
    A, B = torch.ones(2, K, dtype=bf16), torch.ones(8, 2, dtype=bf16)
    x, W = torch.ones(33, K, dtype=bf16), torch.ones(8, K, dtype=bf16)
    with lora_kernels.backend("cuda", TWO_PASS), torch.no_grad():
        if K % 8:
            with pytest.raises(RuntimeError, match="gemm: x's rows are not whole"):
                lora_kernels.lora_linear(x, W, A, B)
        else:
            lora_kernels.lora_linear(x, W, A, B)


@pytest.mark.parametrize(("quant_type", "size"), [("mxfp4", 32), ("nvfp4", 16)])
def test_decode_refuses_blocks_under_64_and_says_so(quant_type: str, size: int) -> None:
    weight = quantize_4bit(torch.ones(8, 64, dtype=bf16), quant_type)
    x, A, B = (torch.ones(*shape, dtype=bf16) for shape in ((3, 64), (2, 64), (8, 2)))
    want = f"cannot run here: blocks of {size} codes are less than 64"
    with lora_kernels.backend("cuda", COOPERATIVE), pytest.raises(RuntimeError, match=want):
        lora_kernels.lora_linear(x, weight, A, B)


def test_gemm_of_blocks_under_16_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads a scale for each half of a run of 32 codes."""
    monkeypatch.setattr(
        cuda_linear, "codes", lambda c, shape: launch.codes(c and c._replace(blocksize=8), shape)
    )
    weight = quantize_4bit(torch.ones(8, 64, dtype=bf16), "nvfp4")
    x, A, B = (torch.ones(*shape, dtype=bf16) for shape in ((33, 64), (2, 64), (8, 2)))
    with (
        lora_kernels.backend("cuda", TWO_PASS),
        torch.no_grad(),
        pytest.raises(RuntimeError, match="gemm: the weight's blocks have less than 16 codes"),
    ):
        lora_kernels.lora_linear(x, weight, A, B)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_verify_judges_each_option_that_the_backend_takes(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "Case", lambda *sizes, device, **fields: Case(*sizes, **fields))
    monkeypatch.setattr(verify, "CUDA_SHAPES", ((20, 72, 64, 61), (5, 72, 64, 40)))
    engine, dtypes = f"cuda {strategy}", (bf16, f32)
    lines = {name: verify.judge_option(verify.SHAPES, dtypes, name, engine) for name in OPTIONS}
    judged = {name: line[0]["ok"] for name, line in lines.items() if line is not None}
    want = ["plain", "bias", "gate", "column scale", "everything", "nf4"]
    # In blocks that cooperative does not take.
    want += ["fp4, all", "mxfp4", "nvfp4, all"] * (strategy == TWO_PASS)
    assert judged == dict.fromkeys(want, True)


def test_explain_says_the_kernel_of_each_layer() -> None:
    config = LoraConfig(target_modules=["0", "1", "2"], init_lora_weights=False)
    layers = nn.Linear(64, 72), nn.Linear(72, 64), Conv1D(64, 64)
    model = fuse(get_peft_model(nn.Sequential(*layers).to(bf16), config))
    even, other, columns = explain(model, x_dtype=bf16).rows
    assert even.strategy == f"1 and 16 rows: {COOPERATIVE}; 2048 rows: {TWO_PASS}"
    assert other.strategy == even.strategy and columns.strategy == TWO_PASS
    plain = nn.Sequential(LoRALinear(65, 64, dtype=bf16))
    with pytest.raises(RuntimeError, match=r"'cuda' was requested .* K = 65 is no multiple of 8"):
        explain(plain, x_dtype=bf16)


NO_IMAGE = "the driver says: no kernel image is available for execution on the device"


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A machine with a B300 whose driver takes no kernel of the build; which GPUs were probed."""
    found: list[int] = []

    def probe(index: int) -> None:
        found.append(index)
        raise RuntimeError(NO_IMAGE)

    monkeypatch.setattr(cuda, "_load", lambda name: (SimpleNamespace(probe=probe), None))
    monkeypatch.setattr(cuda, "_capability", lambda index: 103)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    card = device.DeviceInfo("cuda", 103, 148, 227 << 10, "B300", 270 << 30)
    monkeypatch.setattr(device, "gpus", lambda: [card])
    cuda._driver_reason.cache_clear()
    token = cuda.emulated.set(None)
    yield found
    cuda.emulated.reset(token)
    cuda._driver_reason.cache_clear()


def test_unsupported_device_reason_driver_refuses_gives_its_words_and_asks_once(
    probed: list[int],
) -> None:
    for _ in range(2):
        assert (
            cuda.unsupported_device_reason("cuda", 0)
            == f"GPU 0 cannot run this build's CUDA kernels: {NO_IMAGE}"
        )
        assert (cuda.unsupported_device_reason("cuda", None) or "").startswith(
            "GPU 1 "
        )  # the current one
    assert probed == [0, 1]


def test_select_driver_refuses_raises_before_a_launch(probed: list[int]) -> None:
    with lora_kernels.backend("cuda"), pytest.raises(RuntimeError, match=NO_IMAGE):
        selection.choose(Problem("cuda", *(bf16,) * 4, 16, 1, False, 64, 64, device_index=0))
    assert probed == [0]


def test_info_driver_refuses_says_why(probed: list[int]) -> None:
    row = info._cuda_backend()
    assert row["available"] is False and NO_IMAGE in row["reason"]


def test_unsupported_device_reason_is_the_first_that_holds(
    probed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line takes one reason away; the driver is asked last."""
    monkeypatch.setattr(cuda, "_load", lambda name: (None, "the CUDA kernels were not built"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "_capability", lambda index: 75 + index)

    def reason(device_type: str = "cuda") -> str:
        return cuda.unsupported_device_reason(device_type, 2) or ""

    assert reason() == "the CUDA kernels were not built"
    monkeypatch.setattr(cuda, "_load", lambda name: (SimpleNamespace(probe=probed.append), None))
    assert reason("xpu") == "no CUDA kernels for device type 'xpu'"
    assert reason() == "the CUDA kernels do not run on AMD's GPUs"
    monkeypatch.setattr(torch.version, "hip", None)
    assert reason() == "there is no GPU that torch can use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reason().startswith("sm_77 is older than sm_80") and not probed
    monkeypatch.setattr(cuda, "_capability", lambda index: 80)
    assert reason() == "" and probed == [2]


@pytest.mark.parametrize(
    ("name", "what"),
    [("_cuda", "the CUDA kernels {} version 0"), ("_emulator", "the emulator {} version 0")],
)
def test_load_of_another_version_or_a_broken_file_says_so(
    name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(module: str) -> None:
        raise ImportError("libcudart.so.12: cannot open")

    cuda._load.cache_clear()
    try:
        monkeypatch.setattr(cuda, "import_extension", broken)
        was = "was" if name == "_emulator" else "were"
        subject = what.split(" {}")[0]
        want = f"{subject} {was} not built (libcudart.so.12: cannot open)"
        assert cuda._load(name) == (None, want)
        cuda._load.cache_clear()
        old = SimpleNamespace(__version__="0")
        monkeypatch.setattr(cuda, "import_extension", lambda module: old)
        has = "has" if name == "_emulator" else "have"
        want = f"{what.format(has)}, not {lora_kernels.__version__}"
        assert cuda._load(name) == (None, want)
    finally:
        cuda._load.cache_clear()


def test_choose_of_another_device_in_the_emulator_raises() -> None:
    with pytest.raises(RuntimeError, match="the emulator takes no meta tensors"):
        selection.choose(Problem("meta", *(bf16,) * 4, 16))


def test_layout_of_a_weight_by_columns_goes_by_its_own_rows() -> None:
    """[64, 60] by columns has rows of 64 elements; [60, 64] by columns has rows of 60."""
    assert constraints.layout(torch.zeros(60, 64, dtype=bf16).t(), bf16) == COLUMNS
    odd = constraints.layout(torch.zeros(64, 60, dtype=bf16).t(), bf16)
    assert odd.columns and "not whole and aligned" in (odd.unsupported_reason or "")
    shifted = torch.zeros(64 * 64 + 1, dtype=bf16)[1:].view(64, 64)
    for weight in (shifted, shifted.t()):
        assert constraints.layout(weight, bf16).unsupported_reason is not None


@pytest.mark.parametrize(
    ("shape", "start", "vectors"),
    [((4, 8), 0, True), ((4, 8), 1, False), ((4, 12), 0, False), ((4, 16), 8, True)],
)
def test_matrix_is_read_in_vectors_from_aligned_whole_rows(
    shape: tuple[int, int], start: int, vectors: bool
) -> None:
    count = shape[0] * shape[1]
    t = torch.zeros(count + start, dtype=bf16)[start:].view(shape)
    assert launch.matrix(t)[4] is vectors  # type: ignore[index]
    assert launch.matrix(t.t())[4] is False  # type: ignore[index]

    @planned
    def rows(plan: Plan, t: Tensor, dtype: torch.dtype | None) -> Tensor:
        assert launch.matrix(t)[4] is vectors  # type: ignore[index]
        return launch.whole_rows(plan, t, dtype)

    assert (rows(t, None).data_ptr() == t.data_ptr()) is vectors
    assert torch.equal(rows(t, None), t)
    assert rows(t, torch.float16).dtype is torch.float16


def test_codes_are_read_in_runs_from_aligned_bytes() -> None:
    weight = quantize_4bit(torch.ones(4, 64), "nf4", 128).codes
    flat = quantize_4bit(torch.ones(4, 64), "nf4", 128, double_quant=False).codes
    *_, log2_block, log2_nested, rows, columns, whole = launch.codes(weight, (4, 64)) or ()
    assert (log2_block, log2_nested, rows, columns, whole) == (7, 8, 4, 64, True)
    operands = (launch.codes(flat, (4, 64)) or ())[2:6]
    assert [isinstance(each, int) and each == 0 for each in operands].count(True) == 3  # not nested
    assert (launch.codes(weight, (16, 16)) or (None,))[-1] is False
    off = torch.cat([weight.packed[:1], weight.packed])[1:]
    assert (launch.codes(weight._replace(packed=off), (4, 64)) or (None,))[-1] is False


@pytest.mark.parametrize("M", [0, 1, 16, 17])
def test_choose_of_a_forced_strategy_by_rows(M: int) -> None:
    problem = Problem("cpu", bf16, bf16, bf16, bf16, 16, M, False, 64, 64, layout=ROWS)
    with lora_kernels.backend("cuda", COOPERATIVE):
        if M == 17:
            with pytest.raises(RuntimeError, match="17 rows are more than 16"):
                selection.choose(problem)
        else:
            assert selection.choose(problem).strategy == COOPERATIVE
    with lora_kernels.backend("cuda", TWO_PASS):
        assert selection.choose(problem).strategy == TWO_PASS
