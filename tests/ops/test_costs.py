"""The cost model for GPUs: properties that hold at any rates."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_kernels import costs, device, selection, verdicts
from lora_kernels.backends import triton
from lora_kernels.backends.triton import heuristics, measured
from lora_kernels.core.problem import Choice, Layout, Problem, Strategy
from lora_kernels.device import DeviceInfo
from tests.support.gpus import H100, RTX3090, SERVED, T4

every_gpu = pytest.mark.parametrize("gpu", SERVED, ids=lambda gpu: gpu.name)
N, K, R = 4096, 14336, 16


def predict(
    gpu: DeviceInfo, M: int, itemsize: int = 2, rank: int = R, **fields: Any
) -> list[costs.Cost]:
    """The costs of a call with M rows."""
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    problem = Problem("cuda", *(dtype,) * 4, rank, M, columns=N, inner=K, **fields)
    return costs.predict(gpu, problem)


def test_an_older_gpu_is_refused_with_its_reason() -> None:
    assert costs.unsupported_reason(T4) == "T4 is sm_75; the kernels are for sm_80 and newer"
    assert {cost.backend for cost in predict(T4, 1)} == {"eager"}
    assert all(costs.unsupported_reason(gpu) is None for gpu in SERVED)


@every_gpu
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_no_prediction_beats_the_hardware(gpu: DeviceInfo, itemsize: int, four_bit: bool) -> None:
    """No prediction grows smaller with more rows."""
    peak = gpu.tensor_flops if itemsize < 4 else max(gpu.fp32_flops, gpu.tensor_flops / 6)
    before: dict[tuple[str, str], float] = {}
    for M in (1, 8, 16, 17, 64, 128, 512, 4096):
        moved = N * K * (0.5 if four_bit else itemsize) + M * (N + K) * itemsize
        floor = max(moved / gpu.bandwidth, 2 * M * N * K / peak)
        for cost in predict(gpu, M, itemsize, four_bit=four_bit):
            assert cost.seconds > floor, cost
            key = (cost.backend, cost.strategy)
            assert cost.seconds >= before.get(key, 0.0), cost
            before[key] = cost.seconds


def choose(gpu: DeviceInfo, rank: int = R, inner: int = K, blocksize: int = 64) -> Choice | None:
    dtypes = (torch.bfloat16,) * 4
    problem = Problem("cuda", *dtypes, rank, 1, True, N, inner, layout=Layout(blocksize))
    return costs.choose_fastest(problem, gpu, {"triton": None, "cuda": None})


@pytest.mark.parametrize("odd", [{"inner": 14336 + 32}, {"blocksize": 32}], ids=str)
def test_a_kernel_is_expected_only_of_what_it_takes(odd: dict[str, int]) -> None:
    choice = choose(H100, **odd)  # type: ignore[arg-type]
    assert choice is not None and choice.strategy != Strategy.COOPERATIVE


def test_choose_fastest_of_what_the_model_leaves_is_none() -> None:
    for lacks in ("clock", "bandwidth", "tensor_flops"):
        assert choose(replace(H100, **{lacks: 0.0})) is None
    assert choose(replace(H100, kind="hip")) is None  # AMD's
    assert choose(T4) is None and choose(H100, rank=257) is None


def test_tuned_goes_before_the_model() -> None:
    target = DeviceInfo("cuda", 90, 132, 227 << 10)
    problem = Problem("cuda", *(torch.bfloat16,) * 4, R, 100, True, N, K)
    bf16 = torch.bfloat16
    key = measured.shape(target, 100, N, K, R, bf16, bf16, True)
    assert heuristics.choose_tuned(problem, target, None) is None
    rows = {
        (strategy, eager): measured.Measured(
            strategy, source="measured here", microseconds=95.0, eager_microseconds=eager
        )
        for strategy in (triton.TWO_PASS, triton.FUSED)
        for eager in (100.0, 99.0, None)
    }
    for eager in (99.0, None):  # not 5 % faster, or not known
        with measured.override_row(key, rows[triton.TWO_PASS, eager]):
            assert heuristics.choose_tuned(problem, target, None) is None
            assert heuristics.choose_tuned(problem, target) is not None  # Triton was requested
    with measured.override_row(key, rows[triton.TWO_PASS, 100.0]):
        found = heuristics.choose_tuned(problem, target, None)
        assert found == Choice("triton", triton.TWO_PASS, "measured here")
        cast = problem._replace(x_dtype=torch.float32)  # by autocast
        assert heuristics.choose_tuned(cast, target, None) == found
        assert heuristics.choose_tuned(problem._replace(dropout=True), target, None) is None


def test_names_decide_between_full_and_half_rate() -> None:
    """TFLOP/s of the data sheets: bfloat16, dense, summed in float32."""
    for capability, name, count, clock, want in (
        (86, "NVIDIA GeForce RTX 3090", 82, 1.695e9, 71e12),
        (86, "NVIDIA A10", 72, 1.695e9, 125e12),
        (86, "NVIDIA RTX A6000", 84, 1.8e9, 154.8e12),
        (89, "NVIDIA GeForce RTX 4090", 128, 2.52e9, 165.2e12),
        (89, "NVIDIA L40S", 142, 2.52e9, 362e12),
        (89, "NVIDIA L4", 58, 2.04e9, 121e12),
        (120, "NVIDIA GeForce RTX 5090", 170, 2.407e9, 209.5e12),
        (90, "NVIDIA H100 80GB HBM3", 132, 1.83e9, 989e12),
    ):
        tensor, _ = device._operations(capability, name)
        assert tensor * count * clock == pytest.approx(want, rel=0.02), name


ROUND = DeviceInfo("cuda", 90, 100, 227 << 10, "", 0, 2e9, 1e12, 500e12, 50e12)


@pytest.mark.parametrize(
    ("itemsize", "fields", "bitsandbytes", "microseconds"),
    [
        (
            2,
            {"rows": 300, "dropout": True},
            True,
            {
                "eager library memory": 73.13,
                "triton library launches from Python": 87.00,
                "cuda two_pass the GEMM": 93.46,
                "triton two_pass the GEMM": 117.48,
                "cuda two_pass_simt the GEMM": 717.92,
            },
        ),
        (
            2,
            {"rows": 2000, "four_bit": True},
            True,
            {
                "eager library the GEMM": 257.64,
                "triton library the GEMM": 268.76,
                "triton two_pass the GEMM": 446.55,
                "cuda two_pass the GEMM": 527.59,
                "cuda two_pass_simt the GEMM": 3968.07,
            },
        ),
        (
            2,
            {"rows": 7, "four_bit": True},
            True,
            {
                "cuda two_pass the GEMM": 29.72,
                "cuda cooperative memory": 31.43,
                "cuda overlapped memory": 32.93,
                "triton two_pass launches from Python": 87.00,
                "eager library decoding": 92.55,
                "triton library launches from Python": 117.00,
                "cuda two_pass_simt the GEMM": 255.62,
            },
        ),
        (
            4,
            {"rows": 70, "four_bit": True},
            True,
            {
                "triton two_pass the GEMM": 169.51,
                "triton library memory": 169.74,
                "eager library memory": 172.74,
                "cuda two_pass_simt the GEMM": 257.79,
            },
        ),
        (
            2,
            {"rows": 16, "four_bit": True},
            True,
            {
                "cuda two_pass the GEMM": 31.86,
                "cuda cooperative memory": 53.20,
                "cuda overlapped memory": 54.70,
                "triton two_pass launches from Python": 87.00,
                "eager library memory": 96.00,
                "triton library launches from Python": 117.00,
                "cuda two_pass_simt the GEMM": 255.72,
            },
        ),
        (
            4,
            {"rows": 7},
            True,
            {
                "eager library memory": 84.42,
                "triton library launches from Python": 87.00,
                "triton two_pass launches from Python": 87.00,
                "cuda two_pass_simt the GEMM": 245.30,
            },
        ),
        # PyTorch decodes in three kernels: they write and read an int32 a byte and two float32.
        (
            2,
            {"rows": 2000, "four_bit": True},
            False,
            {
                "triton library the GEMM": 268.76,
                "triton two_pass the GEMM": 446.55,
                "eager library the GEMM": 475.41,
                "cuda two_pass the GEMM": 527.59,
                "cuda two_pass_simt the GEMM": 3968.07,
            },
        ),
        # P of 256 ranks takes CUDA cores.
        (
            2,
            {"rows": 4096, "rank": 256},
            True,
            {
                "eager library the GEMM": 421.60,
                "triton library the GEMM": 447.51,
                "triton two_pass the GEMM": 507.52,
                "cuda two_pass the GEMM": 943.91,
                "cuda two_pass_simt the GEMM": 7875.13,
            },
        ),
    ],
    ids=str,
)
def test_predict_of_round_rates_is_the_sum_of_the_docstring(
    itemsize: int, fields: dict[str, Any], bitsandbytes: bool, microseconds: dict[str, float]
) -> None:
    """Numbers of the model itself: they change with it, and with nothing else."""
    dtypes = (torch.bfloat16 if itemsize == 2 else torch.float32,) * 4
    problem = Problem("cuda", *dtypes, **{"rank": 32} | fields, columns=3000, inner=5000)
    found = {
        f"{cost.backend} {cost.strategy} {cost.bottleneck}": cost.seconds * 1e6
        for cost in costs.predict(ROUND, problem, bitsandbytes)
    }
    assert found == pytest.approx(microseconds, rel=1e-3) and list(found) == list(microseconds)


def test_predict_counts_an_adapter_in_its_own_dtype() -> None:
    def seconds(adapter: torch.dtype) -> float:
        dtypes = torch.bfloat16, adapter, adapter, torch.bfloat16
        found = costs.predict(ROUND, Problem("cuda", *dtypes, 32, 300, columns=3000, inner=5000))
        return next(cost.seconds for cost in found if cost.backend == "eager")

    more = 2 * 32 * (3000 + 5000) / (0.85 * 1e12)  # bytes of an element, ranks, rows, bandwidth
    assert seconds(torch.float32) - seconds(torch.bfloat16) == pytest.approx(more, rel=1e-6)


CUDA, TRITON = {"cuda two_pass", "cuda two_pass_simt"}, {"triton two_pass"}
FEW, CUBLAS = {"cuda cooperative", "cuda overlapped"}, {"eager library", "triton library"}


def test_a_fitted_factor_slows_what_it_names_alone() -> None:
    """8 times slower rates of a GPU, at 2000 and at 16 rows of 4-bit weights."""
    for factor, many, few in (
        ("bandwidth", CUDA | TRITON | CUBLAS, CUDA | TRITON | CUBLAS | FEW),
        ("library", CUBLAS, set()),
        ("cuda", CUDA, CUDA | FEW),
        ("triton", TRITON, set()),
        ("decoding", CUDA | TRITON, CUDA | TRITON | FEW),
        ("latency", TRITON, FEW),
        ("launch", CUDA | TRITON | CUBLAS, CUDA | CUBLAS | FEW),
    ):
        slow = costs.Rates(**{factor: 8.0 if factor in ("latency", "launch") else 1 / 8})
        for rows, want in ((2000, many), (16, few)):
            problem = Problem("cuda", *(torch.bfloat16,) * 4, 32, rows, True, 3000, 5000)
            before, after = (
                {
                    f"{c.backend} {c.strategy}": c.seconds
                    for c in costs.predict(ROUND, problem, rates=r)
                }
                for r in (costs.Rates(), slow)
            )
            assert {name for name in before if after[name] > before[name]} == want, factor


def test_bitsandbytes_fuses_up_to_the_rows_of_its_tier() -> None:
    def rows(blocks: int, capability: int = 90, dtype: torch.dtype = torch.bfloat16) -> int:
        problem = Problem("cuda", *(dtype,) * 4, R, 1, True, 64 * blocks, K)
        return costs.bitsandbytes_rows(replace(ROUND, capability=capability), problem)

    assert [rows(blocks) for blocks in (300, 299, 1)] == [64, 48, 7]
    assert costs.decoding_rows(replace(ROUND, capability=86), N, K) == 128
    large = Problem("cuda", *(torch.bfloat16,) * 4, R, 1, True, 28672, 8192)
    tiers = {gpu.name: costs.bitsandbytes_rows(gpu, large) for gpu in SERVED}
    assert tiers == {"A100": 128, "RTX 4090": 256, "H100": 64, "B200": 32, "RTX 5090": 128}
    assert [rows(300, 87), rows(300, 90, torch.float32), rows(300, 100, torch.float32)] == [7, 7, 4]


@pytest.mark.parametrize(
    ("rows", "unavailable", "want"),
    [
        (1, {}, ("cuda", Strategy.COOPERATIVE)),
        (32, {}, ("cuda", Strategy.TWO_PASS)),
        (1, {"cuda": "not built"}, ("eager", Strategy.LIBRARY)),
    ],
    ids=str,
)
def test_choose_fastest_takes_a_backend_that_is_there(
    rows: int, unavailable: dict[str, str], want: tuple[str, str]
) -> None:
    problem = Problem("cuda", *(torch.bfloat16,) * 4, R, rows, True, N, K)
    choice = costs.choose_fastest(problem, H100, unavailable)
    assert choice is not None and (choice.backend, choice.strategy) == want
    assert ("of eager's" in choice.reason) is (choice.backend != "eager")
    with selection.backend("eager", Strategy.LIBRARY):
        assert selection.choose(problem).backend == "eager"


def test_choose_of_a_gpu_s_problem_without_a_gpu_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A FakeTensor has the device's name alone; no property is read."""
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setattr(device, "gpu", lambda index: pytest.fail("read"))
    monkeypatch.setattr(verdicts, "current", lambda index: pytest.fail("read"))
    problem = Problem("cuda", *(torch.bfloat16,) * 4, R, 1, True, N, K)
    assert selection.choose(problem).backend == "eager"


def properties(**others: Any) -> SimpleNamespace:
    """Properties of a GPU as torch gives them: rates in kHz, the bus in bits."""
    sizes: dict[str, Any] = {"multi_processor_count": 108, "total_memory": 80 << 30, "name": "A100"}
    sizes |= {"shared_memory_per_block_optin": 163 << 10, "memory_bus_width": 5120}
    sizes |= {"major": 8, "minor": 0, "clock_rate": 1_410_000, "memory_clock_rate": 1_593_000}
    return SimpleNamespace(**sizes | others)


@pytest.mark.parametrize(
    ("given", "hip", "want"),
    [
        (
            properties(),
            None,
            DeviceInfo(
                *("cuda", 80, 108, 163 << 10, "A100", 80 << 30, 1.41e9),
                *(2 * 1.593e9 * 640, 2048 * 1.41e9 * 108, 128 * 1.41e9 * 108),
            ),
        ),
        (properties(), "6.4", DeviceInfo("hip", 0, 108, 64 << 10, "A100", 80 << 30)),
        (
            properties(memory_bus_width=0),
            None,
            DeviceInfo(
                *("cuda", 80, 108, 163 << 10, "A100", 80 << 30, 1.41e9),
                *(0.0, 2048 * 1.41e9 * 108, 128 * 1.41e9 * 108),
            ),
        ),
    ],
    ids=["cuda", "hip", "no_bus"],
)
def test_gpu_is_what_torch_says_in_si_units(
    given: SimpleNamespace, hip: str | None, want: DeviceInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: given)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    device._gpu.cache_clear()
    try:
        assert device.gpu(1) == device.gpu(None) == want
        assert device._gpu.cache_info().currsize == 2  # of GPU 1 and of the current one, 5
    finally:
        device._gpu.cache_clear()


@pytest.mark.parametrize("gpu", [RTX3090, *SERVED], ids=lambda gpu: gpu.name)
def test_gpu_reaches_the_rates_of_its_data_sheet(
    gpu: DeviceInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the 2 % by which data sheets round, or state another clock."""
    major, minor = divmod(gpu.capability, 10)
    given = properties(
        major=major,
        minor=minor,
        clock_rate=gpu.clock / 1e3,
        multi_processor_count=gpu.multiprocessors,
        name=f"NVIDIA GeForce {gpu.name}" if gpu.name.startswith("RTX") else gpu.name,
    )
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: given)
    device._gpu.cache_clear()
    try:
        found = device.gpu(0)
    finally:
        device._gpu.cache_clear()
    assert found.tensor_flops == pytest.approx(gpu.tensor_flops, rel=0.02)
    assert found.fp32_flops == pytest.approx(gpu.fp32_flops, rel=0.02)
