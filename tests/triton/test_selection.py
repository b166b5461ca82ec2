"""When the Triton backend runs, how it goes about it, and what is said where it cannot."""

from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.backends import cuda, triton
from lora_kernels.backends.triton import FUSED, configs, launch
from lora_kernels.choice import choose as selection
from lora_kernels.core import device
from lora_kernels.core.device import DeviceInfo
from lora_kernels.core.problem import Choice, Problem
from lora_kernels.quantization import quantize_4bit

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
A100, H100 = DeviceInfo("cuda", 80, 108, 163 << 10), DeviceInfo("cuda", 90, 132, 227 << 10)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> DeviceInfo:
    """A machine with Triton and an A100, as far as `selection` asks."""
    monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
    monkeypatch.setattr(triton, "is_interpreted", lambda: False)
    monkeypatch.setattr(configs, "gpu", lambda index: A100)
    monkeypatch.setattr(configs, "has_gpu", lambda: True)
    return A100


def choose(
    device: str = "cuda", dtype: torch.dtype = bf16, rank: int = 16, rows: int = 4096
) -> Choice:
    return selection.choose(Problem(device, dtype, dtype, dtype, dtype, rank, rows, columns=1024))


def test_choose_on_a_gpu_takes_triton_only_if_requested(gpu: DeviceInfo) -> None:
    assert choose().backend == "eager"
    with lora_kernels.backend("triton"):
        assert choose().backend == "triton"
    with lora_kernels.backend("triton", FUSED):
        assert choose().strategy == FUSED
    with pytest.raises(ValueError, match="'two_pass', want for backend 'triton' one of 'fused'"):
        lora_kernels.backend("triton", "two_pass")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"device": "cpu"}, "'cpu', want a GPU .* TRITON_INTERPRET=1"),
        ({"device": "meta"}, "'meta', want a GPU"),
        ({"rank": 257}, "rank 257 is above"),
        ({"rank": 65}, "rank 65 is above 64"),
        ({"dtype": f64}, "float64"),
    ],
    ids=str,
)
def test_choose_of_what_triton_lacks_raises(
    gpu: DeviceInfo, arguments: dict[str, object], word: str
) -> None:
    with lora_kernels.backend("triton"), pytest.raises(RuntimeError, match=word):
        choose(**arguments)


@pytest.mark.parametrize("strategy", [None, *triton.STRATEGIES])
def test_calls_that_triton_has_no_kernel_for_raise_with_the_reason(strategy: str | None) -> None:
    """In the forward, so that no backward is refused."""
    x, W, A, B = torch.ones(2, 8), torch.ones(4, 8), torch.ones(3, 8), torch.ones(4, 3)
    mask, offsets = torch.ones(2, 8, dtype=torch.bool), torch.tensor([2])
    calls: dict[str, tuple[str, Any]] = {
        "dropout": ("no dropout", lambda: lora_kernels.lora_linear(x, W, A, B, dropout_p=0.5)),
        "a mask": (
            "no dropout",
            lambda: lora_kernels.lora_linear(x, W, A, B, dropout_p=0.5, dropout_mask=mask),
        ),
        "adapters": (
            "take one adapter",
            lambda: lora_kernels.multi_lora_linear(x, W, [A], [B], torch.zeros(2).long()),
        ),
        "experts": (
            "no kernels for experts",
            lambda: lora_kernels.lora_experts_linear(x, W[None], A[None], B[None], offsets),
        ),
        "norm": ("no kernel for row norms", lambda: lora_kernels.dora_norm(W, A, B)),
    }
    for reason, call in calls.values():
        refused = rf"backend 'triton' was requested and cannot run here: .*{reason}"
        with lora_kernels.backend("triton", strategy), pytest.raises(RuntimeError, match=refused):
            call()


def test_choose_before_sm_80_is_eager_and_says_why(
    monkeypatch: pytest.MonkeyPatch, gpu: DeviceInfo
) -> None:
    t4 = DeviceInfo("cuda", 75, 40, 64 << 10, "T4", 16 << 30, 1.59e9, 0.32e12, 65e12, 8.1e12)
    monkeypatch.setattr(configs, "target", lambda device_type, index: t4)
    with lora_kernels.backend("triton"), pytest.raises(RuntimeError, match=r"sm_75, .*want sm_80"):
        choose()
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "gpu", lambda index: t4)
    monkeypatch.setattr(
        cuda,
        "unsupported_device_reason",
        lambda device_type, index: cuda.unsupported_capability_reason(75),
    )
    monkeypatch.setattr(selection.verdicts, "current", lambda index: "not qualified")
    for dtype, slow in ((torch.float16, False), (bf16, True)):
        choice = choose(dtype=dtype)
        assert choice.backend == "eager" and "sm_75" in choice.reason
        assert ("no bfloat16 either" in choice.reason) is slow
    for x, y in ((f32, bf16), (bf16, f32)):  # under autocast; of a float32 weight
        mixed = Problem("cuda", x, f32, f32, y, 16)
        assert "no bfloat16 either" in selection.choose(mixed).reason


def test_lora_linear_without_triton_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unavailable_reason", lambda: "Triton is not installed")
    with lora_kernels.backend("triton"), pytest.raises(RuntimeError, match="not installed"):
        lora_kernels.lora_linear(torch.ones(2, 3), None, torch.ones(1, 3), torch.ones(4, 1))


RTX_4090, MI300X = DeviceInfo("cuda", 89, 128, 99 << 10), DeviceInfo("hip", 0, 304, 64 << 10)


def test_block_of_ranks_is_a_power_of_two_up_to_64() -> None:
    assert [configs.block_of_ranks(r) for r in (1, 16, 17, 64, 256)] == [16, 16, 32, 64, 64]


@pytest.mark.parametrize("M", [1, 16, 100, 8192])
@pytest.mark.parametrize("K", [64, 4096, 14336])
def test_splits_of_any_sizes_cover_everything_once(K: int, M: int) -> None:
    config, per_split = configs.shrink(H100, M, K, 16, 2)
    num_splits = -(-K // per_split)
    assert per_split % config.block_k == 0
    assert (
        1 <= num_splits <= configs.MAX_SPLITS
        and (num_splits - 1) * per_split < K <= num_splits * per_split
    )
    config, per_split = configs.outer(H100, M, K, 16, 2)
    num_splits = -(-M // per_split)
    assert per_split % config.block_m == 0
    assert (num_splits - 1) * per_split < M <= num_splits * per_split


# Changing a size here changes what is compiled: tests/compile_only then counts its resources.
@pytest.mark.parametrize(
    ("target", "M", "itemsize", "codes", "rank", "in_registers", "scattered", "tiles"),
    [
        (H100, 16, 2, False, 16, False, False, (16, 64, 128, 4, 4)),
        (H100, 17, 2, False, 16, False, False, (64, 64, 64, 4, 4)),
        (H100, 64, 2, False, 16, False, False, (64, 64, 64, 4, 4)),
        (H100, 65, 2, False, 16, False, False, (128, 64, 64, 8, 3)),
        (H100, 65, 4, False, 16, False, False, (64, 64, 32, 4, 4)),
        (H100, 16, 4, False, 16, False, False, (16, 64, 32, 4, 4)),
        (H100, 256, 2, False, 16, False, False, (128, 64, 64, 8, 3)),
        (H100, 257, 2, False, 16, False, False, (128, 256, 64, 8, 3)),
        (H100, 257, 2, True, 16, False, False, (128, 128, 64, 8, 3)),
        (H100, 257, 2, False, 16, True, False, (128, 128, 64, 8, 3)),
        (A100, 257, 2, False, 16, False, False, (128, 128, 64, 8, 3)),
        (A100, 257, 2, False, 32, False, False, (128, 128, 64, 8, 3)),
        (A100, 257, 2, False, 33, False, False, (128, 64, 64, 8, 3)),
        (MI300X, 257, 2, False, 16, False, False, (128, 128, 64, 8, 1)),
        (MI300X, 257, 2, False, 16, True, False, (128, 64, 64, 8, 2)),
        (MI300X, 16, 2, False, 16, False, False, (16, 64, 128, 4, 2)),
        (RTX_4090, 257, 2, False, 16, False, False, (128, 128, 64, 8, 2)),
        (RTX_4090, 257, 2, False, 32, False, False, (128, 128, 64, 8, 2)),
        (RTX_4090, 16, 2, False, 16, False, False, (16, 64, 128, 4, 4)),
        (RTX_4090, 100, 4, False, 64, False, False, (64, 64, 32, 4, 4)),
        (H100, 16, 2, True, 16, False, True, (16, 64, 32, 4, 1)),
        (H100, 300, 2, True, 16, False, True, (64, 64, 32, 4, 1)),
    ],
)
def test_linear_tiles_are_those_that_were_compiled(
    target: DeviceInfo,
    M: int,
    itemsize: int,
    codes: bool,
    rank: int,
    in_registers: bool,
    scattered: bool,
    tiles: tuple[int, ...],
) -> None:
    found = configs.linear(target, M, itemsize, codes, rank, in_registers, scattered)
    assert found == configs.GemmTiles(*tiles)


@pytest.mark.parametrize(
    ("kernel", "target", "sizes", "tiles", "share"),
    [
        ("shrink", A100, (16, 4096, 16, 2), (16, 16, 64, 4, 4), 256),
        ("shrink", A100, (17, 4096, 16, 2), (64, 16, 64, 4, 4), 256),
        ("shrink", A100, (17, 4096, 65, 4), (64, 64, 32, 4, 4), 256),
        ("shrink", A100, (8192, 4096, 16, 2), (64, 16, 64, 4, 4), 4096),
        ("shrink", A100, (1, 512, 200, 2), (16, 64, 64, 4, 4), 256),
        ("shrink", H100, (5000, 14336, 20, 4), (64, 32, 32, 4, 4), 14336),
        ("outer", A100, (100, 4096, 16, 2), (64, 64, 16, 4, 3), 128),
        ("outer", A100, (9000, 4096, 33, 4), (32, 64, 64, 4, 3), 3008),
        ("outer", A100, (9000, 4096, 32, 4), (64, 64, 32, 4, 3), 3008),
        ("outer", A100, (9000, 300, 70, 2), (64, 64, 64, 4, 3), 448),
        ("outer", H100, (9000, 300, 64, 4), (32, 64, 64, 4, 3), 192),
    ],
)
def test_tiles_and_shares_of_other_kernels_are_those_that_were_compiled(
    kernel: str,
    target: DeviceInfo,
    sizes: tuple[int, ...],
    tiles: tuple[int, ...],
    share: int,
) -> None:
    config, split = getattr(configs, kernel)(target, *sizes)
    assert config == type(config)(*tiles) and split == share


def test_blocks_of_ranks_precision_and_shared_memory() -> None:
    assert [configs.precision(t) for t in (A100, MI300X)] == ["tf32x3", "ieee"]
    config = configs.GemmTiles(16, 64, 128, 4, 4)
    assert configs.shared_memory(config, 2, 0) == 4 * (16 + 64) * 128 * 2
    assert configs.shared_memory(config, 4, 16) == 4 * (16 + 64 + 16) * 128 * 4


@pytest.mark.parametrize(
    ("blocksize", "row", "shift", "target", "want"),
    [
        (64, 128, 0, A100, (6, True, True, True)),
        (64, 96, 0, A100, (6, False, True, True)),
        (32, 36, 0, A100, (5, False, False, True)),
        (128, 128, 2, A100, (7, True, False, True)),
        (128, 128, 4, MI300X, (7, True, True, False)),
    ],
)
def test_codes_arguments_say_how_rows_of_codes_are_read(
    blocksize: int,
    row: int,
    shift: int,
    target: DeviceInfo,
    want: tuple[int, bool, bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    codes = quantize_4bit(torch.ones(8, 128), "nf4", blocksize).codes
    moved = torch.cat([codes.packed[:shift], codes.packed])[shift:]
    found = launch.codes_arguments(codes._replace(packed=moved), row, target)
    assert tuple(found[name] for name in ("LOG2_BLOCK", "WHOLE", "WORDS", "ASM")) == want
    assert found["packed_ptr"] is moved and found["nested_absmax_ptr"] is codes.nested_absmax
    monkeypatch.setattr(launch, "is_interpreted", lambda: True)
    assert not launch.codes_arguments(codes, row, target)["ASM"]
    absent = launch.codes_arguments(None, row, target)
    assert absent.keys() == found.keys() and not any(absent.values())


def test_matrix_arguments_name_the_strides_by_their_dimensions() -> None:
    t = torch.empty(2, 3)
    found = launch.matrix_arguments("grad", t.t(), "rn")
    assert found.pop("grad_ptr").shape == (3, 2) and found == {"stride_gr": 1, "stride_gn": 3}
    absent = {"w_ptr": None, "stride_wk": None, "stride_wn": None}
    assert launch.matrix_arguments("w", None, "kn") == absent


def test_kinds_of_arguments_are_what_a_kernel_is_compiled_for() -> None:
    """A tensor counts by its dtype and alignment, a float by its type, another number by value."""
    t = torch.zeros(64)
    for one, other in ((t, t[8:]), (t[4:], t), (2.0, 5.0), (3, 3), (None, None)):
        assert launch._kind(one) == launch._kind(other)
    for other in (t[1:], t.half(), 2.0, 2, True, None):
        assert launch._kind(other) != launch._kind(t)
    assert launch._kind(2) != launch._kind(3) and launch._kind(2.0) == launch._kind(3.0)


def test_options_contract_no_fma() -> None:
    options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
    assert launch.options(configs.GemmTiles(16, 64, 64, 8, 3)) == options


@pytest.mark.parametrize("way", ["backend", "model"])
def test_choose_asks_for_the_properties_of_the_tensor_s_gpu(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine's cards may differ: the second one is too old."""
    old = DeviceInfo("cuda", 75, 40, 64 << 10, "T4")
    monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
    monkeypatch.setattr(triton, "is_interpreted", lambda: False)
    for module in (configs, device):
        monkeypatch.setattr(module, "gpu", lambda index: old if index == 1 else A100)
        monkeypatch.setattr(module, "has_gpu", lambda: True)
    for index in (0, 1):
        problem = Problem("cuda", bf16, bf16, bf16, bf16, 16, device_index=index)
        if way == "model":
            assert ("sm_75" in selection.choose(problem).reason) is (index == 1)
            continue
        with lora_kernels.backend("triton"):
            if index:
                with pytest.raises(RuntimeError, match="sm_75"):
                    selection.choose(problem)
            else:
                assert selection.choose(problem).backend == "triton"
