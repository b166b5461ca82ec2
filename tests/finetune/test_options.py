"""The ranges and rules of options, and what they become in transformers' arguments."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from shlex import split
from typing import Any

import pytest

from lora_kernels.cli import main
from lora_kernels.finetune import UsageError, command
from lora_kernels.finetune.options import (
    CompareOptions,
    GenerateOptions,
    Options,
    RankOptions,
    check_numbers,
    check_out,
    fill_in_run,
)
from lora_kernels.finetune.trainer import training_arguments

NAN, INF = math.nan, math.inf
COUNTS = "rank batch per_device_train_batch_size gradient_accumulation_steps steps max_steps"
COUNTS += " eval_steps save_steps save_total_limit patience seeds"
RANGES: dict[str, tuple[list[float], list[float]]] = {  # allowed, refused
    **dict.fromkeys(split(f"{COUNTS} max_new_tokens"), ([1], [0, -1])),
    **dict.fromkeys(("max_length",), ([2], [1])),
    **dict.fromkeys(
        split("alpha lr learning_rate num_train_epochs lora_plus_ratio"),
        ([1e-9, 1e9], [0.0, -1.0, INF, NAN]),
    ),
    **dict.fromkeys(
        split("weight_decay max_grad_norm temperature warmup_steps"),
        ([0.0, 1e9], [-1e-9, INF, NAN]),
    ),
    **dict.fromkeys(split("eval_share dropout"), ([0.0, 0.999], [1.0, -1e-9, NAN])),
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_at_the_ends_of_their_ranges(name: str) -> None:
    allowed, refused = RANGES[name]
    for value in (None, *allowed):
        check_numbers({name: value})
    for value in refused:
        with pytest.raises(UsageError, match=f"^{name}: got {value}, want "):
            check_numbers({name: value})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"alpha": 0}, "alpha: got 0, want at least 1"),
        ({"lora_plus": -1.0}, "lora_plus: got -1.0, want a positive number"),
        ({"max_steps": 2, "num_train_epochs": 1.0}, "num_train_epochs: want no --max-steps"),
        ({"init": "orthogonal", "rank": 3}, "rank: got 3, want an even one for --init orthogonal"),
        ({"eval_steps": 2}, "eval_steps: needs held-out data; give --eval-share too"),
        ({"patience": 2}, "patience: needs held-out data; give --eval-share too"),
        ({"patience": 2, "eval_share": 0.5}, "a multiple of --eval-steps, which is 0"),
        (
            {"patience": 2, "eval_share": 0.5, "eval_steps": 3, "save_steps": 4},
            "patience: got --save-steps 4, want a multiple of --eval-steps, which is 3",
        ),
        ({"report_to": ["tensorbord"]}, "report_to: got tensorbord, want some of tensorboard, "),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        Options(**given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"init": "orthogonal", "rank": 6},
        {"init": "orthogonal"},
        {"init": "gaussian", "rank": 3},
        {"patience": 2, "eval_share": 0.5, "eval_steps": 2, "save_steps": 4},
        {"lora_plus": 0.0},
    ],
)
def test_options_that_go_together(given: dict[str, Any]) -> None:
    Options(**given)


def test_training_of_options_has_steps_or_epochs_and_evaluates_as_it_saves() -> None:
    def training(**given: Any) -> dict[str, Any]:
        return Options(**given).training

    assert training()["max_steps"] == 200
    assert training(max_steps=7)["max_steps"] == 7
    epochs = training(num_train_epochs=2.0)
    assert epochs["num_train_epochs"] == 2.0 and epochs["max_steps"] is None
    assert training()["eval_steps"] is None
    assert training(save_steps=7, eval_share=0.5)["eval_steps"] == 7
    assert training(save_steps=7, eval_share=0.5, eval_steps=3)["eval_steps"] == 3
    assert training(trainer={"adam_beta2": 0.9})["adam_beta2"] == 0.9
    assert [Options(data=[Path("a.txt"), Path(name)]).has_json for name in ("b", "b.jsonl")] == [
        False,
        True,
    ]
    assert Options(data=[Path("a.json")]).has_json


def test_options_of_other_commands() -> None:
    known: Any = {"model": Path("m"), "data": [Path("d")]}
    for given, words in (
        ({"steps": 9}, "steps: got 9, want at least 10, or --no-adalora"),
        ({"examples": 1}, "examples: got 1, want at least 2, or 0 for all"),
        ({"examples": -1}, "examples: got -1"),
        ({"ranks": [4, 4]}, r"ranks: got \(4, 4\), want different ones"),
    ):
        with pytest.raises(UsageError, match=words):
            RankOptions(**known | given)
    RankOptions(**known, steps=10, examples=2)
    RankOptions(**known, steps=1, adalora=False)
    CompareOptions(max_length=1, lr=["full=1e-5"])
    with pytest.raises(UsageError, match="max_length: got 0, want at least 1"):
        CompareOptions(max_length=0)
    with pytest.raises(UsageError, match="prompt: got none"):
        GenerateOptions(model=Path("m"), adapter=Path("a"))
    with pytest.raises(UsageError, match="--model is missing; give it, or --run"):
        GenerateOptions(adapter=Path("a"), prompt="p")
    GenerateOptions(model=Path("m"), prompt="p")
    with pytest.raises(UsageError, match="compare: needs an adapter"):
        GenerateOptions(model=Path("m"), prompt="p", compare=True)


def test_what_is_given_goes_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"model": "m", "dtype": "bf16"}')
    found = fill_in_run({"run": tmp_path, "adapter": Path("mine")}, "quant_dtype")
    assert found["model"] == Path("m") and found["quant_dtype"] == "bf16"
    assert found["quant"] is None and found["adapter"] == Path("mine")
    given = {"dtype": "fp32"}
    assert fill_in_run(given) is given
    for text in ('{"model": "m"}', '{"model": 3, "dtype": "bf16"}', "[]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UsageError, match=r"run\.json names no model and dtype"):
            fill_in_run({"run": tmp_path})


def test_training_arguments_are_those_that_are_documented() -> None:
    args = training_arguments("out", use_cpu=True)
    assert (args.max_steps, args.num_train_epochs) == (-1, 1.0)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (2e-4, 0.0, 1.0)
    assert args.per_device_train_batch_size == args.per_device_eval_batch_size == 4
    assert (args.save_steps, args.save_total_limit, args.seed) == (50, 2, 0)
    assert args.lr_scheduler_type == "cosine" and args.get_warmup_steps(100) == 0
    assert (args.logging_steps, args.logging_nan_inf_filter, args.report_to) == (1, False, [])
    assert args.eval_strategy == "no" and not args.bf16 and "adamw" in args.optim
    given: dict[str, Any] = {"max_steps": 100, "warmup_steps": 0.25, "eval_steps": 5}
    given |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 3}
    args = training_arguments("out", use_cpu=True, **given)
    assert args.lr_scheduler_type == "constant_with_warmup" and args.get_warmup_steps(100) == 25
    assert args.max_steps == 100 and args.per_device_eval_batch_size == 3
    assert args.eval_strategy == "steps" and args.eval_steps == 5
    assert training_arguments("out", use_cpu=True, warmup_steps=7).get_warmup_steps(100) == 7
    plain = training_arguments("out", use_cpu=True, lr_scheduler_type="constant", save_steps=9)
    assert plain.lr_scheduler_type == "constant" and plain.save_steps == 9
    with pytest.raises(UsageError, match="lr_scheduler_type: got 'cosin', want one of linear, "):
        training_arguments("out", lr_scheduler_type="cosin")


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]


def test_help_fits_two_screens_and_names_each_option_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    shown = capsys.readouterr().out
    body = shown.partition("example:")[0]
    assert len(shown.splitlines()) <= 100
    assert max(map(len, body.splitlines())) <= 80
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for name in options_of(parser):
        assert len(re.findall(rf"^ +(?:\S.*, )?{name}\b(?!-)", body, re.MULTILINE)) == 1, name
    with pytest.raises(SystemExit):
        main(["finetune", "--help-all"])
    everything = capsys.readouterr().out
    assert everything.startswith(body[:500])
    for name in ("--adam-beta2", "--lr-scheduler-kwargs", "--max-grad-norm", "--deepspeed"):
        assert everything.count(f"  {name} ") == 1 and name not in shown
    assert everything.count("  --learning-rate ") == 1


def test_trainer_s_other_options_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    words = split("--adam-beta2 0.95 --rnak 3 --neftune_noise_alpha 5")
    given, rest = command.parse_rest(words, parser)
    assert given == {"adam_beta2": 0.95, "neftune_noise_alpha": 5.0} and rest == ["--rnak", "3"]
    with pytest.raises(SystemExit):
        main(split("finetune --rnak 3"))
    assert capsys.readouterr().err.endswith("no option --rnak; did you mean --rank?\n")
    with pytest.raises(SystemExit):
        main(split("finetune --adam-beta2 x"))
    assert "finetune: argument --adam-beta2: invalid float" in capsys.readouterr().err


def test_check_out_below_a_file_is_refused_and_a_new_folder_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_out(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    out = tmp_path / "file" / "run"
    with pytest.raises(UsageError, match=rf"out: {out} cannot be written: Not a dir.*; give a fol"):
        check_out(out)
