"""Users meet a verdict in `fuse`, `info`, checkpoints, the command and choices."""

import itertools
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels import cli, info, qualification
from lora_kernels.backends import triton
from lora_kernels.bench import qualify as command
from lora_kernels.choice import choose as selection
from lora_kernels.choice import verdicts
from lora_kernels.choice.verdicts import Group, Point, Seconds, Verdict
from lora_kernels.core.device import DeviceInfo
from lora_kernels.integrations.trainer import FuseCallback, VerdictLog
from lora_kernels.peft import fuse, swap
from lora_kernels.qualification import Claim, compiling
from lora_kernels.qualification.plan import CANDIDATES
from tests.support import fake_card

GROUP = Group("cuda", "cooperative", "bfloat16", "bfloat16", "4bit")
OTHER = GROUP._replace(weight="dense")
TIMES = Seconds(1e-5, 3e-6), Seconds(4e-5, 2e-6)
POINTS = [Point(GROUP, 1, 4096, 4096, 16, *TIMES, None, None)]
VERDICT = Verdict(
    fake_card.KEY, frozenset({GROUP}), {OTHER: "memory: no"}, POINTS, "2026-01-02T03:04"
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
    assert selection.choose(fake_card.problem(GROUP, 1, 4096, 4096)).backend == "eager"
    assert verdicts.digests() == {"cuda:0": "none"} and not warnings_of(caplog)
    fuse(model)
    assert selection.choose(fake_card.problem(GROUP, 1, 4096, 4096)).backend == "cuda"


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
    choice = selection.choose(fake_card.problem(GROUP, 1, 4096, 4096))
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
    monkeypatch.setattr("lora_kernels.core.device.gpus", lambda: [card, card])
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
    row = r" +1 +4096×4096 +10\.0 / 40\.0 +3\.0 / 2\.0 +0\.25\n"
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
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "lora-kernels qualify: another process is qualifying; nothing was cached"


def test_command_of_a_card_that_is_not_there_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_kernels.core.device.gpu", lambda index: pytest.fail("read"))
    assert cli.main(["qualify", "--device", "7"]) == 2
    said = "lora-kernels qualify: device: got cuda:7, want a CUDA device of the 1 there are\n"
    assert capsys.readouterr().err == said


def test_command_passes_its_options_on_and_prints_each_claim(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def qualify(index: int | None, *, report: Any, **options: Any) -> Verdict:
        given.update(options, index=index)
        if report is not None:  # without --json
            report(Claim(GROUP, "graph", 2), None)
            report(Claim(OTHER, "memory", 1), "y has NaN")
        return Verdict(fake_card.KEY, frozenset({GROUP}))

    monkeypatch.setattr(qualification, "qualify", qualify)
    argv = ["qualify", "--device", "0", "--dtypes", "float16", "--budget", "3"]
    claims = [Claim(GROUP, "graph", 2), Claim(OTHER, "memory", 1)]
    monkeypatch.setattr(command, "list_claims", lambda dtypes: claims[:1])
    assert cli.main(argv) == 0  # every group passed
    assert given == {"index": 0, "dtypes": ["float16"], "budget_s": 3.0}
    printed = capsys.readouterr().out.splitlines()
    assert f"✓ {GROUP}: graph" in printed and f"✗ {OTHER}: memory: y has NaN" in printed
    monkeypatch.setattr(command, "list_claims", lambda dtypes: claims)
    assert cli.main([*argv, "--json"]) == 1  # one was left
    out, err = capsys.readouterr()
    assert json.loads(out)["failed"] == []  # JSON alone
    assert err == f"– {OTHER}  not checked: give it more --budget\n"


def test_table_has_the_times_of_each_point() -> None:
    one, half = Seconds(1e-6, 1e-6), Seconds(0.5e-6, 0.25e-6)
    events = Seconds(0.2e-6, 0.1e-6, is_captured=False)
    times = [(GROUP, 8, half, half), (GROUP, 1, one, None), (OTHER, 32, events, None)]
    points = [Point(group, M, 3, 2, 16, y, one, step, step and one) for group, M, y, step in times]
    third = OTHER._replace(dtype="float16")  # which was not timed
    said = command.table(Verdict(fake_card.KEY, frozenset({GROUP, OTHER, third}), points=points))
    cells = {line[2:].strip(): None for line in said.splitlines()}
    rows = [" ".join(line.split()) for line in cells]
    assert "M N×K device, µs host, µs over eager's step's" in rows
    assert f"{GROUP} 1 3×2 1.0 / 1.0 1.0 / 1.0 1.00" in rows
    assert f"{GROUP} 8 3×2 0.5 / 1.0 0.2 / 1.0 0.50 0.50" in rows
    assert f"{OTHER} 32 3×2 0.2 / 1.0* 0.1 / 1.0 0.20" in rows and str(third) in rows
    assert "not captured in a graph: timed in a busy stream" in rows
    library = [points[1]._replace(eager_forward=events)]  # whose call cannot be captured
    found = command.table(Verdict(fake_card.KEY, frozenset({GROUP}), points=library))
    assert "1.0 / 0.2* " in found and "not captured in a graph" in found
    captured = [point for point in points if point.group == GROUP]
    found = command.table(Verdict(fake_card.KEY, frozenset({GROUP}), points=captured))
    assert command.EVENTS not in found


def test_command_forgets(capsys: pytest.CaptureFixture[str]) -> None:
    file = verdicts.write(VERDICT)
    assert cli.main(["qualify", "--forget"]) == 0
    assert capsys.readouterr().out == f"removed {file}\n" and not file.exists()


def test_list_claims_has_the_claims_of_each_kind_of_kernel() -> None:
    def groups_of(name: str) -> set[str]:
        claims = [c for c in qualification.list_claims() if c.group.weight not in verdicts.ORDERS]
        return {str(c.group) for c in claims if c.name == name}

    groups = groups_of("time")
    assert len(groups) == 2 * len(CANDIDATES)
    for dtypes in (("bfloat16",), ("float16",), ("bfloat16", "float16")):
        claims = qualification.list_claims(dtypes)
        listed = [claim.group for claim in claims]
        orders = qualification.list_orders(dtypes)
        assert [claim for claim in claims if claim.group.weight in verdicts.ORDERS] == orders
        assert {(group.dtype, group.adapter) for group in listed} == {
            (dtype, a) for dtype in dtypes for a in (dtype, "float32")
        }
    words = {"two streams": "cooperative", "memory": "", "odd sizes": "", "graph": ""}
    for name, word in words.items():
        assert groups_of(name) == {group for group in groups if word in group}
    assert groups_of("autocast") == {group for group in groups if "float32" not in group}
    tiers = [claim.tier for claim in qualification.list_claims()]
    assert tiers == sorted(tiers) and set(tiers) == {0, 1, 2}


def test_list_claims_names_each_strategy_at_sizes_that_it_takes() -> None:
    """Each strategy may be chosen; the largest M are the kernels', and none is above 128."""
    assert {(c.backend, c.strategy) for c in CANDIDATES} == {
        (backend, strategy)
        for backend in ("cuda", "triton")
        for strategy in selection.STRATEGIES[backend]
    }
    claims = qualification.list_claims()
    assert all(bool(claim.sizes) == (claim.name == "time") for claim in claims)
    for backend, strategy, weight, rows, bound in CANDIDATES:
        assert rows[-1] <= 128 and "%" in bound
        group = Group(backend, strategy, "float16", "float32", weight)
        heuristics = selection._heuristics(backend)
        for M, (N, K) in itertools.product(rows, ((4096, 4096), (14336, 4096))):
            problem = fake_card.problem(group, M, N, K)
            assert heuristics.unsupported_reason(problem, strategy) is None
    claims = qualification.list_claims(["float16"], [(64, 128)])
    sizes = {c.sizes for c in claims if c.sizes and c.group.weight not in verdicts.ORDERS}
    assert {size[1:] for each in sizes for size in each} == {(64, 128)}


def test_dry_run_keeps_its_time() -> None:
    """A third of the budget is expected for a dtype, and compiling is counted."""
    for dtypes in (("bfloat16",), ("bfloat16", "float16")):
        for card in command.dry_run_json(dtypes):
            assert (card["compilations"] > 0) != triton.is_interpreted()
            assert [*card["compiling_s"]] == [2, 4, 16]
            assert card["checking_s"] <= len(dtypes) * qualification.BUDGET / 3


def test_dry_run_prints_the_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "count", lambda claims, gpu: 3)
    said = command.dry_run(["bfloat16"])
    assert "100 timed points" in said and "compiling is for 2, 4, 16 processors" in said
    assert "H100, sm_90: 3 compilations in 3.9, 3.5, 3.1 s, then 7.5 s of 25" in said
    assert f"cuda cooperative 4bit: 1, 16; {CANDIDATES[0].bound}" in said


def test_dry_run_as_json_holds_the_groups_and_points_of_each_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "count", lambda claims, gpu: 3)
    assert cli.main(["qualify", "--dry-run", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert [card["name"] for card in cards] == list(command.SHEETS)
    claims = qualification.list_claims()
    for card in cards:
        assert {*card["groups"]} == {*card["points"]} == {str(claim.group) for claim in claims}
        assert sum(map(len, card["groups"].values())) == len(claims)
        assert sum(map(len, card["points"].values())) == sum(len(c.sizes) for c in claims)
        assert card["compilations"] == 3 and 0 < card["checking_s"] < qualification.BUDGET
