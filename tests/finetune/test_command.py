"""The command from the arguments to the adapter that stock PEFT loads."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_kernels.cli import main
from lora_kernels.finetune.model import linears_4bit, load_base, parameter_bytes, rewrite_codes
from lora_kernels.finetune.trainer import read_metrics

RUN = ["--rank", "3", "--alpha", "8", "--dropout", "0.1", "--batch", "2", "--seq-len", "16"]
RUN += ["--lr", "0.01", "--prompt", "Line 7 says [the]", "--compare"]


def command(model_folder: Path, text: Path, out: Path, steps: int) -> list[str]:
    paths = ["--model", str(model_folder), "--data", str(text), "--out", str(out)]
    return ["finetune", *paths, *RUN, "--steps", str(steps)]


def logits_of_stock_peft(model_folder: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), str(adapter)
    )
    with torch.no_grad():
        return model(input_ids=torch.arange(16)[None]).logits


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_whole_run(dtype, model_folder, text, tmp_path: Path, capsys) -> None:
    run = command(model_folder, text, tmp_path, steps=6)
    run += ["--dtype", dtype, "--sgd-steps", "2", "--timed-steps", "2", "--peft-steps", "4"]
    assert main(run) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        r"trainable: 6,144 of [\d,]+ parameters \(\d+\.\d+%\), in 14 adapted layers",
        r"14 LoRA layers",
        r"gradients of 28 adapters \S+ ≤ 0.0001 ✓",
        r"control: dA doubled \S+ > 0.0001 seen",
        r"LoRA tax \(step / frozen\) 1.000 \d",
        r"fused: step 6/6 loss \d\.\d{4} \d+ tokens/s",
        r"prompt Line 7 says \[the\] before \S.* after \S",
        r"stock PEFT's over 4 steps, whose dropout masks",
        r"0\.0 MB beside the model's 0\.\d MB \(\d+\.\d+%\)",
        r"loaded again in stock PEFT: logits differ by at most \S+, the largest is \S+ ✓",
    ):
        assert re.search(words, shown), words
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert weights.stat().st_size < 30_000
    losses = (tmp_path / "metrics.jsonl").read_text()
    assert losses.count('"loss"') == 6
    stock = json.loads((tmp_path / "compare.json").read_text())["peft_losses"]
    assert len(stock) == 4
    assert stock[0] == pytest.approx(json.loads(losses.splitlines()[0])["loss"], rel=0.05)
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert "14 LoRA layers" in (tmp_path / "layers.txt").read_text()

    # The same command again finds all of it done.
    assert main(run) == 0
    shown = capsys.readouterr().out
    assert "all 6 steps are done" in shown
    assert "comparing" not in shown
    assert (tmp_path / "metrics.jsonl").read_text() == losses


def test_sigterm_leaves_a_checkpoint_that_loads_and_resumes(
    model_folder: Path, text: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    steps = 40
    once = [*command(model_folder, text, tmp_path / "once", steps), "--no-compare"]
    assert main(once) == 0
    capsys.readouterr()

    # The process signals itself as soon as the first steps are done.
    script = f"""
import os, signal, sys
from lora_kernels.cli import main
from lora_kernels.finetune.model import linears_4bit, load_base, parameter_bytes, rewrite_codes
import torch
step = torch.nn.utils.clip_grad_norm_
count = 0
def clip(*args, **kwargs):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*args, **kwargs)
torch.nn.utils.clip_grad_norm_ = clip
sys.exit(main({[*command(model_folder, text, tmp_path / "twice", steps), "--no-compare"]!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stdout.endswith(
        f"stopped after step 3 of {steps} and saved; the same command goes on from there\n"
    )
    checkpoint = tmp_path / "twice" / "checkpoint-3"
    assert logits_of_stock_peft(model_folder, checkpoint).isfinite().all()

    # Another learning rate is another run.
    again = [*command(model_folder, text, tmp_path / "twice", steps), "--no-compare"]
    assert main([*again, "--lr", "0.02", "--rank", "4"]) == 2
    assert "holds a run with another --rank, --lr; give the same" in capsys.readouterr().err

    assert main(again) == 0
    assert f"going on after step 3 of {steps}" in capsys.readouterr().out
    broken, unbroken = (
        [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("twice", "once")
    )
    assert len(unbroken) == steps
    assert broken == unbroken
    torch.testing.assert_close(
        logits_of_stock_peft(model_folder, tmp_path / "twice" / "adapter"),
        logits_of_stock_peft(model_folder, tmp_path / "once" / "adapter"),
        rtol=0,
        atol=0,
    )


def test_generate_goes_on_from_a_run(
    model_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --quant: the adapter of a 4-bit base, compared, trained, loaded again and decoded."""
    pytest.importorskip("bitsandbytes")
    run = command(model_folder, text, tmp_path, steps=4)
    run += ["--quant", "nf4", "--dtype", "bf16"]
    run += ["--sgd-steps", "2", "--timed-steps", "2", "--peft-steps", "2"]
    assert main(run) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        r"rank 3, bf16, nf4 by bitsandbytes",
        r"14 LoRA layers fused",
        r"gradients of 28 adapters \S+ ≤ 0.0001 ✓",
        r"updates in 2 SGD steps \S+ ≤ 0.001 ✓",
        r"bf16 gradients, off fp32 \S+ \S+ ×\d\.\d+ ≤ 1.25 ✓",
        r"ms a token, decoding \d+\.\d \d+\.\d \d+\.\d ×\d",
        r"loaded again in stock PEFT: logits differ by at most \S+, the largest is \S+ ✓",
    ):
        assert re.search(words, shown), words

    ask = ["generate", "--run", str(tmp_path), "--prompt", "Line 7", "--max-new-tokens", "6"]
    assert main([*ask, "--compare"]) == 0
    shown = capsys.readouterr().out
    assert "14 LoRA layers fused" in shown
    assert re.search(r"fused: 6 tokens; first token after \d+ ms, then \d+\.\d ms each", shown)
    assert "stock PEFT: 6 tokens, " in shown
    for dtype in ("fp32", "bf16"):
        once, again = (
            (main([*ask, "--dtype", dtype, "--temperature", "1.5"]), capsys.readouterr().out)
            for _ in range(2)
        )
        assert once[0] == 0
        assert once[1].partition("fused:")[0] == again[1].partition("fused:")[0]  # one seed
    other = ["generate", "--model", str(model_folder), "--prompt", "Line 7"]
    for wrong, words in (
        (["--adapter", str(tmp_path)], "holds no adapter_config.json"),
        ([], "--adapter is missing"),
        (["--run", str(model_folder)], "holds no run.json"),
        (["--run", str(tmp_path), "--temperature", "nan"], "--temperature: got nan"),
        (["--run", str(tmp_path), "--max-new-tokens", "0"], "--max-new-tokens: got 0"),
    ):
        assert main([*other, *wrong]) == 2
        assert words in capsys.readouterr().err


def test_dense_and_quantized_are_told_apart(base: torch.nn.Module, model_folder: Path) -> None:
    """A 4-bit base holds what bitsandbytes makes of its weights, and its bytes are counted."""
    bnb = pytest.importorskip("bitsandbytes")
    cpu = torch.device("cpu")
    quantized = load_base(model_folder, torch.float32, cpu, "fp4")
    layers = linears_4bit(quantized)
    assert len(layers) == 14
    assert linears_4bit(base) == []
    weight = base.get_submodule("model.layers.1.mlp.up_proj").weight
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="fp4", compress_statistics=True)
    got = quantized.get_submodule("model.layers.1.mlp.up_proj").weight
    assert torch.equal(got, packed)
    assert torch.equal(got.quant_state.absmax, state.absmax)
    dense = sum(base.get_submodule(n).weight.nbytes for n in names_of(quantized, layers))
    saved = parameter_bytes(base) - parameter_bytes(quantized)
    assert 0.8 < saved / dense < 0.875  # 4 bits of 32, scales and tables beside
    # The codes outlive a forward in eval mode, by default.
    for model in (quantized, rewrite_codes(copy.deepcopy(quantized), True)):
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(8)[None])
    assert torch.equal(got, packed)


def names_of(model: torch.nn.Module, modules: list[torch.nn.Module]) -> list[str]:
    return [name for name, m in model.named_modules() if any(m is wanted for wanted in modules)]
