"""The command line: what it says of itself, and of what cannot be done."""

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lora_kernels
from lora_kernels import cli, info
from lora_kernels.backends import cuda, triton
from lora_kernels.backends.cpu import native
from lora_kernels.core import device
from lora_kernels.finetune import TrainingError, UsageError

ALL = "info, verify, bench, qualify, finetune, rank-search, compare, merge, export, check, generate"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = int(stop.code or 0)
    return (status, *capsys.readouterr())


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for name in cli.COMMANDS:
        assert f"    {name}" in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_listed_command_exists(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, _ = run(capsys, name, "--help")
    assert status == 0
    assert out.startswith(f"usage: lora-kernels {name}")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(cli.COMMANDS[name][0]).add_arguments(parser)
    assert parser.description
    for action in parser._actions:
        assert action.help, action.option_strings
        assert not any("_" in option for option in action.option_strings)


def test_option_with_an_underscore_is_accepted_and_shown_once() -> None:
    """Scripts of transformers spell it so."""
    pytest.importorskip("transformers")
    parser = argparse.ArgumentParser()
    importlib.import_module("lora_kernels.finetune.command").add_arguments(parser)
    for spelling in ("--eval-share", "--eval_share"):
        assert parser.parse_args([spelling, "0.5"]).eval_share == 0.5
    assert "--eval_share" not in parser.format_help()


def without_torch(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run Python where Ctrl-C arrives while torch is imported."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), str(Path(lora_kernels.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("how", ["module", "script"])
def test_interrupt_while_the_package_is_imported_is_one_line(how: str, tmp_path: Path) -> None:
    script = tmp_path / "lora-kernels"
    script.write_text("from lora_kernels.cli import main; main()")
    argv = [str(script)] if how == "script" else ["-m", "lora_kernels"]
    done = without_torch(tmp_path, *argv, "info")
    assert (done.returncode, done.stderr) == (130, "\nlora-kernels: interrupted\n")


def test_interrupt_of_an_import_outside_of_the_command_is_raised(tmp_path: Path) -> None:
    assert "KeyboardInterrupt" in without_torch(tmp_path, "-c", "import lora_kernels").stderr


def test_warnings_of_libraries_at_their_import_are_not_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """bitsandbytes logs below its name; DeepSpeed sets its logger's level and handler."""
    cli.main(["info"])
    capsys.readouterr()
    handler = logging.StreamHandler()
    for name in ("bitsandbytes.backends.cpu.ops", "DeepSpeed"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.warning("%s warns", name)
        logger.error("%s fails", name)
        logger.removeHandler(handler)
    said = "bitsandbytes.backends.cpu.ops fails\nDeepSpeed fails\n"
    assert capsys.readouterr().err == said


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"lora-kernels {lora_kernels.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["finetun"], "lora-kernels: no command 'finetun'; did you mean 'finetune'?\n"),
        (["xyz"], f"no command 'xyz'; want one of {ALL}\n"),
        ([], f"no command given; want one of {ALL}\n"),
        (
            ["finetune", "--rnak", "4"],
            "lora-kernels finetune: no option --rnak; did you mean --rank?\n",
        ),
        (["rank-search", "--model", "m", "--data", "d", "--rank-s"], "; did you mean --ranks?\n"),
        (["merge", "--out", "o", "--quat=nf4"], "no option --quat; did you mean --quant?\n"),
        (["merge", "--hello", "o"], "no option --hello; see --help\n"),
        (["info", "more"], "info: got 'more', which belongs to no option; see --help\n"),
    ],
)
def test_a_wrong_command_or_option_is_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    if "finetune" in argv or len(argv) > 2:
        pytest.importorskip("peft")
    status, out, err = run(capsys, *argv)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.endswith(message)


def test_name_option_of_an_argument_in_an_error_names_the_option() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-length")
    assert cli.name_option("max_length: got 1: bad", parser) == "--max-length: got 1: bad"
    for other in ("rank: got 0", "no colon", "--max-length: got 1"):
        assert cli.name_option(other, parser) == other


@pytest.mark.parametrize("where", ["import", "run"])
def test_a_missing_library_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    where: str,
) -> None:
    missing = "import not_installed.part"
    (tmp_path / "needs_much.py").write_text(
        f"{missing if where == 'import' else ''}\n"
        f"def add_arguments(parser): pass\n"
        f"def run(args):\n    {missing}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "needs_much", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "info", ("needs_much", "finetune", "help"))
    assert run(capsys, "info") == (
        2,
        "",
        f"lora-kernels info: needs not_installed: {device.install_command('finetune')}\n",
    )


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UsageError("rank: got 0"), 2, "lora-kernels info: rank: got 0\n"),
        (TrainingError("step 3: no"), 1, "lora-kernels info: step 3: no\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            1,
            "lora-kernels info: CUDA out of memory. Tried to allocate 2.00 GiB\n",
        ),
        (KeyboardInterrupt(), 130, "\nlora-kernels info: interrupted\n"),
        (OSError(28, "No space left"), 1, "lora-kernels info: [Errno 28] No space left\n"),
        (OSError("one\nand more"), 1, "lora-kernels info: one\n"),
        (None, 3, ""),
    ],
)
def test_what_stops_a_command_is_a_line_and_a_status(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None,
    status: int,
    said: str,
) -> None:
    def stop(args: argparse.Namespace) -> int:
        if error is not None:
            raise error
        return 3

    monkeypatch.setattr(info, "run", stop)
    assert cli.main(["info"]) == status
    assert capsys.readouterr().err == said


def test_a_broken_import_of_our_own_is_no_missing_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "info", ("lora_kernels.no_such_module", "bench", "help"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["info"])


def test_info_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info")
    assert status == 0
    for name in ("eager", "cpu", "triton", "cuda"):
        assert f"\n  {name} " in out
    facts = json.loads(run(capsys, "info", "--json")[1])
    assert facts == info.info()
    assert (facts["cpu"]["isa"], facts["cpu"]["torch_threads"]) == (native.isa, native.threaded)
    for name in ("triton", "peft", "transformers", "bitsandbytes"):
        assert facts["versions"][name] == device.version(name)
    assert f"  compiler     {device.compiler() or 'none found'}\n" in out
    assert info.report(facts) + "\n" == out


def test_info_says_how_to_add_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "reason", "they were not built")
    monkeypatch.setattr(device, "compiler", lambda: None)
    text = info.report(info.info())
    assert "  cpu      no  they were not built\n" in text
    assert "to add it: install a C++ compiler (apt install g++" in text
    assert "LORA_KERNELS_NATIVE=1 pip install" in text
    monkeypatch.setattr(device, "compiler", lambda: "/usr/bin/c++")
    assert "install a C++ compiler" not in info.report(info.info())


def test_gpus_are_shown_with_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = device.DeviceInfo("cuda", 90, 132, 227 << 10, "H100", 80 * 2**30)
    monkeypatch.setattr(device, "gpus", lambda: [gpu])
    text = info.report(info.info())
    assert (
        "  GPU 0        H100, capability 9.0, 132 SMs, 80 GiB; not qualified on this card" in text
    )
    assert "none that torch can use" not in text
    old = device.DeviceInfo("cuda", 75, 40, 64 << 10, "T4", 16 * 2**30)
    monkeypatch.setattr(device, "gpus", lambda: [old])
    backend = info.info()["backends"]["triton"]
    assert not backend["available"] and "sm_75" in backend["reason"]


CHECKOUT = str(Path(lora_kernels.__file__).parents[1])
ORIGINS = {
    "no file": (None, CHECKOUT, f"'{CHECKOUT}[x]'"),
    "wheel": ({"url": "file:///a.whl"}, "file:///a.whl", "'lora-kernels[x] @ file:///a.whl'"),
    "folder": ({"url": "file:///a", "dir_info": {}}, "file:///a", "'lora-kernels[x] @ file:///a'"),
    "editable": (
        {"url": "file:///a", "dir_info": {"editable": True}},
        "-e file:///a",
        "-e 'file:///a[x]'",
    ),
    "git": (
        {"url": "https://a/b", "vcs_info": {"vcs": "git"}},
        "git+https://a/b",
        "'lora-kernels[x] @ git+https://a/b'",
    ),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_origin_names_where_the_package_came_from(
    origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name alone may be anyone's on an index."""
    given, want, with_extra = ORIGINS[origin]
    text = None if given is None else json.dumps(given)
    held = SimpleNamespace(read_text=lambda name: text)
    monkeypatch.setattr(device.importlib.metadata, "distribution", lambda name: held)
    assert device.origin() == want
    assert device.install_command("x") == f"pip install {with_extra}"
    if given is None:

        def missing(name: str) -> None:
            raise device.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(device.importlib.metadata, "distribution", missing)
        assert device.origin() == want
        monkeypatch.setattr(device, "__file__", "/site-packages/lora_kernels/device.py")
        assert device.install_command("x") == "pip install '.[x]'"


def test_no_hint_names_an_unpublished_package() -> None:
    root = Path(CHECKOUT)
    files = [*root.glob("lora_kernels/**/*.py"), *root.glob("benchmarks/*.py")]
    named = [file.name for file in files if "install 'lora-kernels" in file.read_text("utf-8")]
    assert named == []


A100 = device.DeviceInfo("cuda", 80, 108, 163 << 10, "A100", 80 * 2**30)
T4 = device.DeviceInfo("cuda", 75, 40, 64 << 10, "T4", 16 * 2**30)


@pytest.mark.parametrize(
    ("missing", "interpreted", "gpus", "available", "reason"),
    [
        ("Triton 3.6.0 does not compile", False, [A100], False, "Triton 3.6.0 does not compile"),
        (None, True, [], True, "in Triton's interpreter, on the CPU"),
        (None, False, [], False, "no GPU; TRITON_INTERPRET=1"),
        (None, False, [T4], False, "sm_75"),
        (
            None,
            False,
            [T4, A100],
            True,
            "for calls that qualified on the card",
        ),  # one of them is enough
    ],
)
def test_info_says_where_triton_runs(
    missing: str | None,
    interpreted: bool,
    gpus: list[device.DeviceInfo],
    available: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "unavailable_reason", lambda: missing)
    monkeypatch.setattr(triton, "is_interpreted", lambda: interpreted)
    monkeypatch.setattr(device, "gpus", lambda: gpus)
    row = info._triton_backend()
    assert row["available"] is available and reason in row["reason"]
    assert row["add"] == ("pip install --upgrade triton" if missing else None)


@pytest.mark.parametrize(
    ("missing", "reasons", "available", "reason"),
    [
        ("not built", [None], False, "not built"),
        ("not built", [], False, "no GPU, and not built"),
        (None, [], False, "the kernels are built, and qualified on no GPU: there is none"),
        (None, ["sm_75 is older"], False, "sm_75 is older"),
        (None, ["sm_75 is older", None], True, "for calls that qualified on the card"),
    ],
)
@pytest.mark.parametrize("nvcc", [None, "/usr/bin/nvcc"])
def test_info_says_where_cuda_runs(
    nvcc: str | None,
    missing: str | None,
    reasons: list[str | None],
    available: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: missing)
    monkeypatch.setattr(cuda, "unsupported_device_reason", lambda kind, index: reasons[index])
    monkeypatch.setattr(device, "gpus", lambda: [A100] * len(reasons))
    monkeypatch.setattr(device, "nvcc", lambda: nvcc)
    row = info._cuda_backend()
    assert row["available"] is available and reason in row["reason"]
    if missing and reasons:
        assert ("install CUDA's nvcc" in row["add"]) is (nvcc is None)
        assert "LORA_KERNELS_CUDA=1 pip install --force-reinstall" in row["add"]
    else:
        assert row["add"] is None


def test_info_does_not_advise_to_build_for_a_card_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: "not built")
    monkeypatch.setattr(device, "gpus", lambda: [T4])
    row = info._cuda_backend()
    assert "sm_75 is older than sm_80" in row["reason"] and row["add"] is None
    monkeypatch.setattr(device, "gpus", lambda: [T4, A100])
    assert info._cuda_backend()["reason"] == "not built"


def test_compilers_are_those_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment goes first; then the names that setup.py tries, in its order."""
    found = {"g++", "clang++", "ccache", "/b/bin/nvcc", "/usr/local/cuda/bin/nvcc"}
    monkeypatch.setattr(device.shutil, "which", lambda name: name if name in found else None)
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert (device.compiler(), device.nvcc()) == ("g++", "/usr/local/cuda/bin/nvcc")
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    monkeypatch.setenv("CUDA_HOME", "/a")
    monkeypatch.setenv("CUDA_PATH", "/b")
    assert (device.compiler(), device.nvcc()) == ("ccache", "/b/bin/nvcc")
    found |= {"/a/bin/nvcc", "nvcc"}
    assert device.nvcc() == "/a/bin/nvcc"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH")
    assert device.nvcc() == "nvcc"
    monkeypatch.setenv("CXX", "absent")
    assert device.compiler() is None


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "lora_kernels.cli", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"BrokenPipe" not in process.stderr.read()
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.3.1", "Triton 3.3.1 does not compile our kernels, want 3.4 or newer"),
        ("3.4.0", None),
        ("3.10.1", None),
        ("4.0", None),
        (None, None),
    ],
)
def test_triton_that_is_too_old_is_refused(
    version: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(device, "version", lambda name: version)
    assert triton.unavailable_reason.__wrapped__() == reason
