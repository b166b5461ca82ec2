"""Users meet a verdict in `fuse`, `info`, checkpoints, the command and choices."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels import cli, costs, info, qualification, selection, verdicts
from lora_kernels.bench import qualify as command
from lora_kernels.device import DeviceInfo
from lora_kernels.integrations.trainer import FuseCallback, VerdictLog
from lora_kernels.peft import fuse, swap
from lora_kernels.qualification import Claim
from lora_kernels.verdicts import Group, Point, Seconds, Verdict
from tests.support import fake_card

GROUP = Group("cuda", "cooperative", "bfloat16", "bfloat16", "4bit")
OTHER = GROUP._replace(weight="dense")
TIMES = Seconds(1e-5, 3e-6), Seconds(4e-5, 2e-6)
POINTS = [Point(GROUP, 1, 4096, 4096, 16, *TIMES, None, None)]
VERDICT = Verdict(
    fake_card.KEY, frozenset({GROUP}), {OTHER: "memory: no"}, POINTS, {}, "2026-01-02T03:04"
)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A PEFT model on the CPU, one of whose parameters says that it is on GPU 0."""
    found = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(found, "parameters", lambda *args: iter([on_gpu]))
    swap._advise.cache_clear()
    return found


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "lora_kernels"]


def test_fuse_on_an_unqualified_card_advises_once(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    fuse(fuse(model))
    assert warnings_of(caplog) == [
        f"our GPU kernels are off: not qualified on this card: {verdicts.ADVICE}"
    ]


def test_fuse_on_a_qualified_card_says_nothing(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    verdicts.write(VERDICT)
    fuse(model)
    assert not warnings_of(caplog) and verdicts.digests() == {"cuda:0": VERDICT.digest}


def test_fuse_off_keeps_the_process_on_eager(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    verdicts.set_current(0, VERDICT)
    fuse(model, qualify="off")
    assert selection.choose(GROUP.problem(1, 4096, 4096)).backend == "eager"
    assert verdicts.digests() == {"cuda:0": "none"} and not warnings_of(caplog)
    fuse(model)
    assert selection.choose(GROUP.problem(1, 4096, 4096)).backend == "cuda"


def test_fuse_now_qualifies_an_unqualified_card_alone(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def qualify(index: int) -> Verdict:
        asked.append(index)
        verdicts.set_current(index, VERDICT)
        return VERDICT

    monkeypatch.setattr(qualification, "qualify", qualify)
    fuse(model)
    assert not asked
    fuse(fuse(model, qualify="now"), qualify="now")
    assert asked == [0]


def test_fuse_now_of_a_card_that_cannot_be_qualified_warns_and_runs_eager(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def qualify(index: int) -> Verdict:
        raise RuntimeError("qualify: 12 MiB of the card's memory are free; nothing was cached")

    monkeypatch.setattr(qualification, "qualify", qualify)
    fuse(model, qualify="now")
    assert "12 MiB of the card's memory are free" in warnings_of(caplog)[0]
    choice = selection.choose(GROUP.problem(1, 4096, 4096))
    assert choice.backend == "eager" and "12 MiB" in choice.reason


def test_fuse_of_another_word_raises_before_it_fuses(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="qualify: got 'always', want one of 'cached', 'now'"):
        fuse(model, qualify="always")
    assert type(model.base_model.model[0]).__name__ == "Linear"


@pytest.mark.parametrize(
    ("saved", "step", "main", "warns"),
    [
        ("none", 2, True, True),
        ("same", 2, True, False),
        ("none", 0, True, False),
        ("none", 2, False, False),
        (None, 2, True, False),
    ],
)
def test_resumed_run_that_follows_another_verdict_is_told(
    saved: str | None, step: int, main: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    verdicts.set_current(0, VERDICT)
    callback = VerdictLog()
    now = callback.state()
    assert now["attributes"]["verdicts"] == {"cuda:0": VERDICT.digest}
    before: dict[str, Any] = {"args": {}, "attributes": {"verdicts": {"cuda:0": "none"}}}
    kept = {} if saved is None else {"VerdictLog": now if saved == "same" else before}
    state = SimpleNamespace(stateful_callbacks=kept, global_step=step, is_world_process_zero=main)
    callback.on_train_begin(None, state, None)
    said = warnings_of(caplog)
    assert len(said) == warns
    if warns:
        assert said[0].endswith(f"{{'cuda:0': 'none'}}, now {{'cuda:0': '{VERDICT.digest}'}}")


def test_resumed_run_is_fused_as_asked_and_told_too(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints keep the state of a callback under the name of its own class."""
    verdicts.set_current(0, VERDICT)
    kept = {"FuseCallback": {"attributes": {"verdicts": {"cuda:0": "none"}}}}
    state = SimpleNamespace(stateful_callbacks=kept, global_step=2, is_world_process_zero=True)
    with pytest.raises(ValueError, match="qualify: got 'always'"):
        FuseCallback(qualify="always").on_train_begin(None, state, None, model=model)
    FuseCallback().on_train_begin(None, state, None, model=model)
    assert type(model.base_model.model[0]).__name__ != "Linear"
    assert VERDICT.digest in warnings_of(caplog)[-1]


def test_info_says_the_verdict_of_each_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card = DeviceInfo("cuda", 90, 132, 227 << 10, "H100", 80 << 30)
    monkeypatch.setattr("lora_kernels.device.gpus", lambda: [card, card])
    assert f"SMs, 80 GiB; not qualified on this card: {verdicts.ADVICE}" in info.report(info.info())
    verdicts.set_current(0, VERDICT)
    first, second = (gpu["qualification"] for gpu in info.info()["gpus"])
    assert first == "qualified on 2026-01-02: 1 of 2 groups of calls pass"
    assert second.startswith("not qualified on this card")


def test_command_prints_a_line_for_each_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(qualification, "qualify", lambda *args, **options: VERDICT)
    assert cli.main(["qualify"]) == 1  # a group failed
    printed = capsys.readouterr().out
    row = r" +1 +10\.0 / 40\.0 +3\.0 / 2\.0 +0\.25\n"
    assert re.search(f"✓ {GROUP} {row}", printed)
    assert f"✗ {OTHER}  memory: no" in printed
    assert "1 of 2 groups pass" in printed and str(verdicts.file_of(fake_card.KEY)) in printed
    assert cli.main(["qualify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(VERDICT.json()))


def test_command_that_cannot_start_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def qualify(*args: object, **options: object) -> Verdict:
        raise RuntimeError("qualify: another process is qualifying; nothing was cached")

    monkeypatch.setattr(qualification, "qualify", qualify)
    assert cli.main(["qualify"]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "lora-kernels qualify: another process is qualifying; nothing was cached"


def test_command_of_a_card_that_is_not_there_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_kernels.device.gpu", lambda index: pytest.fail("read"))
    assert cli.main(["qualify", "--device", "7"]) == 2
    said = "lora-kernels qualify: device: got cuda:7, want a CUDA device of the 1 there are\n"
    assert capsys.readouterr().out == said


def test_command_passes_its_options_on_and_prints_each_claim(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def qualify(index: int | None, *, report: Any, **options: Any) -> Verdict:
        given.update(options, index=index)
        report(Claim(GROUP, "graph", 2), None)
        report(Claim(OTHER, "memory", 1), "y has NaN")
        return Verdict(fake_card.KEY, frozenset({GROUP}))

    monkeypatch.setattr(qualification, "qualify", qualify)
    argv = ["qualify", "--device", "0", "--dtypes", "float16", "--budget", "3"]
    assert cli.main(argv) == 0  # every group passed
    assert given == {"index": 0, "dtypes": ["float16"], "budget_s": 3.0}
    printed = capsys.readouterr().out.splitlines()
    assert f"✓ {GROUP}: graph" in printed and f"✗ {OTHER}: memory: y has NaN" in printed
    cli.main([*argv, "--json"])
    assert json.loads(capsys.readouterr().out)["failed"] == []  # JSON alone


def test_table_has_the_times_of_each_group_s_own_rows() -> None:
    one, half = Seconds(1e-6, 1e-6), Seconds(0.5e-6, 0.25e-6)
    events = Seconds(0.2e-6, 0.1e-6, is_captured=False)
    times = [(GROUP, 8, half, half), (GROUP, 1, one, None), (OTHER, 32, events, None)]
    points = [Point(group, M, 1, 1, 16, y, one, step, step and one) for group, M, y, step in times]
    third = OTHER._replace(dtype="float16")  # which was not timed
    said = command.table(Verdict(fake_card.KEY, frozenset({GROUP, OTHER, third}), points=points))
    cells = {line[2:].strip(): None for line in said.splitlines()}
    rows = [" ".join(line.split()) for line in cells]
    assert "M device, µs host, µs over eager's step's" in rows
    assert f"{GROUP} 1 1.0 / 1.0 1.0 / 1.0 1.00" in rows
    assert f"{GROUP} 8 0.5 / 1.0 0.2 / 1.0 0.50 0.50" in rows
    assert f"{OTHER} 32 0.2 / 1.0* 0.1 / 1.0 0.20" in rows and str(third) in rows
    assert "not captured in a graph: timed in a busy stream" in rows
    captured = [point for point in points if point.group == GROUP]
    found = command.table(Verdict(fake_card.KEY, frozenset({GROUP}), points=captured))
    assert command.EVENTS not in found


def test_command_forgets(capsys: pytest.CaptureFixture[str]) -> None:
    file = verdicts.write(VERDICT)
    assert cli.main(["qualify", "--forget"]) == 0
    assert capsys.readouterr().out == f"removed {file}\n" and not file.exists()


def test_plan_has_the_claims_of_each_kind_of_kernel() -> None:
    def groups_of(name: str, gpu: DeviceInfo | None = None) -> set[str]:
        return {str(c.group) for c in qualification.plan(gpu=gpu) if c.name == name}

    groups = groups_of("time")
    assert len(groups) == 12 and all("bfloat16" in group for group in groups)
    words = {"two streams": "cooperative"}
    words |= {"autocast": "bfloat16 bfloat16", "memory": "", "odd sizes": "", "graph": ""}
    for name, word in words.items():
        assert groups_of(name) == {group for group in groups if word in group}
    tiers = [claim.tier for claim in qualification.plan()]
    assert tiers == sorted(tiers) and set(tiers) == {1, 2, 3}
    here = {group for group in groups if "cooperative" in group or "two_pass" in group}
    here -= {group for group in here if "two_pass" in group and "dense" in group}
    assert groups_of("time", command.SHEETS["H100"]) == here


def test_dry_run_keeps_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 25 s cold are expected, and 9 s warm on the card with the most claims."""
    for gpu in command.SHEETS.values():
        claims = qualification.plan(gpu=gpu)
        compilations = command.count_compilations(gpu, claims)
        has_triton = any(claim.group.backend == "triton" for claim in claims)
        assert (compilations > 0) == (has_triton and not command.triton.is_interpreted())
        assert command.seconds(claims, compilations) <= 25
        assert command.seconds(claims, 0) <= 9, gpu
    assert "H100, sm_90: " in command.dry_run(["bfloat16"])


def test_dry_run_as_json_holds_the_groups_of_each_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "count_compilations", lambda gpu, wanted: 3)
    assert cli.main(["qualify", "--dry-run", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert [card["name"] for card in cards] == list(command.SHEETS)
    for card in cards:
        claims = qualification.plan(["bfloat16"], command.SHEETS[card["name"]])
        assert {*card["groups"]} == {str(claim.group) for claim in claims}
        assert sum(map(len, card["groups"].values())) == len(claims)
        assert card["compilations"] == 3 and 0 < card["warm_s"] < card["cold_s"]


def measure(gpu: DeviceInfo, rates: costs.Rates, bitsandbytes: bool = True) -> list[Point]:
    """The points that a card with these rates would give, by the model."""
    points = []
    for group in (GROUP, OTHER, GROUP._replace(strategy="two_pass")):
        for rows in (1, 16) if group.strategy == "cooperative" else (32, 128):
            problem = group.problem(rows, 8192, 2048, 32)
            predicted = costs.predict(gpu, problem, bitsandbytes, rates)
            found = {c[:2]: c.seconds for c in predicted}
            ours, eager = found[group.backend, group.strategy], found["eager", "library"]
            forward, eager = Seconds(ours, 0.0), Seconds(0.0, eager)
            points.append(Point(group, rows, 8192, 2048, 32, forward, eager, None, None))
    return points


def test_fit_finds_the_rates_of_a_card(card: DeviceInfo) -> None:
    """The fitted model predicts points that it has not seen."""
    true = costs.Rates(bandwidth=0.7, host=1.6, latency=1.5)
    fitted = costs.Rates(**costs.fit(measure(card, true, False), card, False))
    for rows, four_bit in ((4, True), (8, False), (64, True)):
        problem = GROUP.problem(rows, 14336, 4096)._replace(four_bit=four_bit)
        want, got, before = (
            {c[:2]: c.seconds for c in costs.predict(card, problem, True, rates)}
            for rates in (true, fitted, costs.Rates())
        )
        for which in (("eager", "library"), ("cuda", "cooperative")):
            if which in want:
                assert abs(got[which] / want[which] - 1) < 0.1, (rows, which)
        assert max(abs(before[k] / want[k] - 1) for k in want) > 0.2


def test_fit_of_points_as_predicted_changes_nothing(card: DeviceInfo) -> None:
    assert costs.fit([], card) == {}
    for decodes in (True, False):
        points = measure(card, costs.Rates(), decodes)
        fitted = costs.fit(points, card, decodes)
        assert fitted == dict.fromkeys(vars(costs.Rates()), 1.0)
    slow = [p._replace(eager_forward=Seconds(3 * p.eager_forward.host, 0.0)) for p in points]
    assert costs.fit(slow, card) != fitted  # eager's times count too
    for unknown in (replace(card, clock=0.0), replace(card, capability=75)):
        assert costs.fit(POINTS, unknown) == {}


def test_choice_follows_the_fitted_rates(card: DeviceInfo) -> None:
    """Kernels that are three times slower on the card than expected are not taken."""
    slow = {name: value / 4 for name, value in vars(costs.Rates()).items() if name == "decoding"}
    verdict = Verdict(fake_card.KEY, frozenset({GROUP}), rates=slow | {"latency": 8.0})
    problem = GROUP.problem(8, 4096, 4096)
    for found, backend in ((verdict, "eager"), (Verdict({}, frozenset({GROUP})), "cuda")):
        choice = costs.choose_fastest(problem, card, {"triton": None, "cuda": None}, found)
        assert choice is not None and choice.backend == backend


def test_fit_keeps_factors_within_their_bounds(card: DeviceInfo) -> None:
    """Times that no card has are not explained by rates that no card has."""
    long = Seconds(1e-2, 0.0)
    slow = [point._replace(forward=long, eager_forward=long) for point in POINTS]
    fitted = costs.fit(slow, card)
    assert min(fitted.values()) >= 1 / 8 and max(fitted.values()) <= 8
    assert max(fitted.values()) == 8  # it does try
