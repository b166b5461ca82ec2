"""When the Triton backend runs, how it goes about it, and what is said where it cannot."""

from dataclasses import replace

import pytest
import torch

import lora_kernels
from lora_kernels import device, selection
from lora_kernels.backends import cuda, triton
from lora_kernels.backends.triton import FUSED, LIBRARY, TWO_PASS, configs, launch
from lora_kernels.core.problem import Choice, Problem
from lora_kernels.device import DeviceInfo

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
    with lora_kernels.backend("triton", TWO_PASS):
        assert choose().strategy == TWO_PASS


def choose_experts(device: str = "cuda", dtype: torch.dtype = bf16, rank: int = 16) -> Choice:
    return selection.choose_experts(Problem(device, dtype, dtype, dtype, dtype, rank))


def test_choose_experts_on_a_gpu_takes_triton_only_if_requested(gpu: DeviceInfo) -> None:
    assert choose_experts().backend == "eager"
    for strategy in (None, TWO_PASS):
        with lora_kernels.backend("triton", strategy):
            choice = choose_experts()
        assert (choice.backend, choice.strategy) == ("triton", TWO_PASS)


def test_choose_experts_of_another_strategy_raises(gpu: DeviceInfo) -> None:
    with (
        lora_kernels.backend("triton", FUSED),
        pytest.raises(RuntimeError, match=r"'fused' was requested .* want 'two_pass'"),
    ):
        choose_experts()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"device": "cpu"}, "'cpu', want a GPU"),
        ({"rank": 257}, "rank 257 is above"),
        ({"dtype": f64}, "float64"),
    ],
    ids=str,
)
def test_choose_experts_of_what_triton_lacks_raises(
    gpu: DeviceInfo, arguments: dict[str, object], word: str
) -> None:
    with lora_kernels.backend("triton"), pytest.raises(RuntimeError, match=word):
        choose_experts(**arguments)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"device": "cpu"}, "'cpu', want a GPU .* TRITON_INTERPRET=1"),
        ({"device": "meta"}, "'meta', want a GPU"),
        ({"rank": 257}, "rank 257 is above"),
        ({"dtype": f64}, "float64"),
    ],
    ids=str,
)
def test_choose_of_what_triton_lacks_raises(
    gpu: DeviceInfo, arguments: dict[str, object], word: str
) -> None:
    with lora_kernels.backend("triton"), pytest.raises(RuntimeError, match=word):
        choose(**arguments)


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
    for dtype, slow in ((torch.float16, False), (bf16, True)):
        choice = choose(dtype=dtype)
        assert choice.backend == "eager" and "sm_75" in choice.reason
        assert ("no bfloat16 either" in choice.reason) is slow


def test_lora_linear_without_triton_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unavailable_reason", lambda: "Triton is not installed")
    with lora_kernels.backend("triton"), pytest.raises(RuntimeError, match="not installed"):
        lora_kernels.lora_linear(torch.ones(2, 3), None, torch.ones(1, 3), torch.ones(4, 1))


def test_choose_of_fused_above_its_ranks_raises(gpu: DeviceInfo) -> None:
    with lora_kernels.backend("triton", FUSED), pytest.raises(RuntimeError, match="above 64"):
        choose(rank=65)


# benchmarks/KERNELS.md has this list: Llama-3-8B's k and v, gate and up, q and o, down.
@pytest.mark.parametrize(
    ("target", "columns", "rank", "four_bit", "strategy"),
    [
        (A100, 1024, 16, False, FUSED),
        (A100, 4096, 16, False, TWO_PASS),
        (A100, 14336, 16, False, TWO_PASS),
        (A100, 1024, 16, True, FUSED),
        (H100, 1024, 16, False, FUSED),
        (H100, 2048, 16, False, FUSED),
        (H100, 1024, 64, False, TWO_PASS),
        (H100, 4096, 16, False, TWO_PASS),
        (H100, 1024, 16, True, FUSED),
    ],
)
def test_strategy_of_named_shapes_is_the_documents(
    target: DeviceInfo, columns: int, rank: int, four_bit: bool, strategy: str
) -> None:
    for rows in (1024, 512):
        chosen, why = configs.strategy(target, rows, columns, rank, 2, four_bit, dropout=False)
        assert chosen == strategy, why


def test_choose_beside_a_float32_adapter_is_split(gpu: DeviceInfo) -> None:
    """Its tiles are smaller, so that P in each of them costs more."""
    with lora_kernels.backend("triton"):
        args = ("cuda", bf16, bf16, bf16, bf16, 16, 4096)
        assert selection.choose(Problem(*args, columns=1024)).strategy == FUSED
        wide = selection.choose(Problem("cuda", bf16, f32, f32, bf16, 16, 4096, columns=1024))
    assert wide.strategy == TWO_PASS and "25.0%" in wide.reason


@pytest.mark.parametrize(
    ("rows", "rank", "four_bit", "dropout", "strategy"),
    [
        (16, 16, False, False, TWO_PASS),
        (4096, 16, False, True, TWO_PASS),
        (4096, 65, False, False, TWO_PASS),
        (1025, 16, True, False, LIBRARY),
        (1024, 16, True, False, FUSED),
    ],
)
def test_strategy_of_rows_ranks_and_options_is_the_fastest(
    rows: int, rank: int, four_bit: bool, dropout: bool, strategy: str
) -> None:
    assert configs.strategy(H100, rows, 1024, rank, 2, four_bit, dropout)[0] == strategy


RTX_3090, RTX_4090 = DeviceInfo("cuda", 86, 82, 99 << 10), DeviceInfo("cuda", 89, 128, 99 << 10)
L40S, RTX_5090 = DeviceInfo("cuda", 89, 142, 99 << 10), DeviceInfo("cuda", 120, 170, 99 << 10)
MI300X = DeviceInfo("hip", 0, 304, 64 << 10)


@pytest.mark.parametrize(
    ("target", "shared", "registers", "warps", "each"),
    [
        (H100, 61440, 72, 4, 3),  # 61,440 and 1,024 of 233,472 bytes
        (A100, 61440, 72, 4, 2),
        (RTX_4090, 61440, 72, 4, 1),
        (RTX_4090, 50176, 72, 4, 2),  # the most that goes twice
        (RTX_4090, 50177, 72, 4, 1),  # rounded up to 128
        (RTX_4090, 99 << 10, 72, 4, 1),
        (H100, 0, 128, 4, 4),  # of each partition's 16,384 registers 4,096 a warp
        (H100, 0, 129, 4, 3),
        (H100, 0, 168, 8, 1),  # three warps of a partition, two of them one program's
        (H100, 0, 255, 4, 2),
        (H100, 0, 72, 1, 7),  # one warp is four, as far as partitions go
        (RTX_4090, 0, 32, 4, 12),  # 1,536 threads
        (RTX_4090, 0, 16, 1, 16),  # programs
    ],
)
def test_count_co_resident_is_cuda_s_occupancy(
    target: DeviceInfo, shared: int, registers: int, warps: int, each: int
) -> None:
    most = configs.count_co_resident(target, shared, registers, warps)
    assert most == each * target.multiprocessors


# Tiles of 64 columns in bfloat16 take 20,480 bytes for each stage but the last, as compiled.
@pytest.mark.parametrize(
    ("target", "columns", "stages"),
    [
        (RTX_4090, 8192, 4),
        (RTX_4090, 8193, 3),
        (RTX_4090, 14336, 3),
        (RTX_4090, 16384, 3),
        (RTX_4090, 16385, 2),
        (RTX_4090, 4 * 8192, 2),
        (RTX_4090, 4 * 8192 + 1, None),
        (RTX_3090, 5249, 3),
        (RTX_3090, 10496, 3),
        (RTX_3090, 14336, 2),
        (L40S, 9089, 3),
        (L40S, 18176, 3),
        (RTX_5090, 10881, 3),
        (RTX_5090, 21760, 3),
        (H100, 25344, 4),
        (H100, 25345, 3),
        (A100, 13824, 4),
        (A100, 13825, 3),
        (MI300X, 19456, 4),
        (MI300X, 19457, None),
    ],
)
def test_waiting_programs_are_as_many_as_the_compiled_kernel_allows(
    target: DeviceInfo, columns: int, stages: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def resources(kernel: object, config: configs.GemmTiles, *_: object, **__: object) -> object:
        compiled.append(config.stages)
        return 20480 * max(config.stages - 1, 1), 72

    monkeypatch.setattr(launch, "read_resources", resources)
    monkeypatch.setattr(launch, "_resources", {})
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    config, programs = configs.linear(RTX_4090, 1, 2, False, 0), -(-columns // 64)
    for _ in range(2):
        found = launch.choose_stages(
            programs, target, None, config, torch.device("meta"), torch.ones(1), 2.0, X=True
        )
        assert found == (None if stages is None else replace(config, stages=stages))
    assert len(compiled) == len(set(compiled))  # each once


def test_cooperative_takes_few_rows_and_one_block_of_ranks() -> None:
    config = configs.linear(H100, 1, 2, True, 0)
    assert configs.cooperative(16, 4096, 4096, 64, config)
    assert not configs.cooperative(17, 4096, 4096, 16, config)
    assert not configs.cooperative(1, 4096, 4096, 65, config)


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
    linear = configs.linear(H100, M, 2, False, 0)
    per_split = configs.cooperative(M, 4096, K, 16, linear)
    assert (per_split > 0) == (M <= 16)
    if per_split:
        num_splits = -(-K // per_split)
        assert (
            per_split % linear.block_k == 0
            and (num_splits - 1) * per_split < K <= num_splits * per_split
        )
        assert num_splits <= configs.MAX_SPLITS
    config, per_split = configs.outer(H100, M, K, 16, 2)
    num_splits = -(-M // per_split)
    assert per_split % config.block_m == 0
    assert (num_splits - 1) * per_split < M <= num_splits * per_split


def test_choose_stages_compiles_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's cards may differ."""
    asked: list[torch.device] = []

    def resources(
        kernel: object, config: configs.GemmTiles, device: torch.device, *_: object, **__: object
    ) -> tuple[int, int]:
        asked.append(device)
        return 0, 255 if device.index else 32

    monkeypatch.setattr(launch, "read_resources", resources)
    monkeypatch.setattr(launch, "_resources", {})
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    config = configs.linear(RTX_4090, 1, 2, False, 0)
    programs = 3 * RTX_4090.multiprocessors
    devices = [torch.device("cuda", index) for index in (0, 1)]
    found = [launch.choose_stages(programs, RTX_4090, None, config, d) for d in devices]
    assert found == [config, None] and set(asked) == set(devices)
