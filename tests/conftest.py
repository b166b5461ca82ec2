"""A test is skipped for a reason of skips.txt or fails the run: a skip must not hide a failure."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.support")
import tests.support  # noqa: E402, F401  it shifts seeds, before a test module draws

_ALLOWED = [
    line.partition(" | ")[0]
    for line in (Path(__file__).parent / "skips.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
_unknown: dict[str, str] = {}


def pytest_collection_finish() -> None:
    _freeze()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and item.path != nextitem.path:
        _freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # some libraries report what is left of their objects at the exit


def _freeze() -> None:
    """Take all objects out of garbage collection: modules, and what they keep.

    torch, transformers and PEFT are millions of objects. A full collection took a second, and a
    step of transformers' Trainer asks for one.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _look_at(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _look_at(report)


def _look_at(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = str(reason).removeprefix("Skipped: ")
    if not reason.startswith(tuple(_ALLOWED)):
        _unknown[report.nodeid] = reason


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unknown and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, reason in _unknown.items():
        terminalreporter.write_line(f"skipped, and not for a reason of skips.txt: {name}: {reason}")


@pytest.fixture(params=["exchange", "attributes"])
def looks(request: pytest.FixtureRequest) -> Iterator[None]:
    """How prepared calls look at tensors: by DLPack's functions, where this PyTorch has them, or by
    attributes."""
    import torch

    from lora_kernels.backends.cpu import native

    if request.param == "exchange" or native.module is None or not native.exchange:
        yield
        return
    native.exchange = native.module.use_exchange(None)
    yield
    native.exchange = native.module.use_exchange(torch.Tensor)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of those that `lora_kernels.oracle.case.engine` knows, for the length of the test."""
    from lora_kernels.oracle import case

    with case.engine(request.param):
        yield request.param
