"""docs/decoding.md: tokens by the replays of a captured step are those of PEFT's model.

A graph is emulated: it records each operation of a step and repeats it on the same tensors, without
Python. The fused model takes the GPU path, and with a verdict the decoder, in CUDA's emulator.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_kernels.backends import cuda, library, workspace
from lora_kernels.choice import choose as selection
from lora_kernels.choice import verdicts
from lora_kernels.choice.verdicts import Group, Point, Seconds, Verdict
from lora_kernels.core import device
from lora_kernels.peft import fuse
from tests.support.emulator import emulator_unavailable_reason
from tests.support.gpus import H100
from tests.support.peft_models import add_lora, randomize

bnb = pytest.importorskip("bitsandbytes")
bf16 = torch.bfloat16
PAGE = Path(__file__).parents[2] / "docs" / "decoding.md"
COUNT = 6
# What waits for the device, or brings a value to the host: a capture of it fails.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "unique", "equal")


class Graph(TorchDispatchMode):
    """The operations of a captured step. The capture itself stands for the first replay."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in WAITS, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.done if self.replays > 1 else ():
            if func.is_view:
                continue
            found = func(*args, **kwargs)
            for to, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                if isinstance(to, Tensor) and to.data_ptr() != new.data_ptr():
                    to.copy_(new)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The emulated graphs that the page's function captures."""
    made: list[Graph] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        made.append(graph)
        with graph, pytest.MonkeyPatch.context() as patch:
            patch.setattr(workspace, "is_capturing", lambda device: True)
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


def model_of_nf4() -> Any:
    """A Llama whose linears are in NF4, with adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 61}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(bf16).eval()
    model.lm_head.weight.data.mul_(30)  # a token is chosen by more than rounding
    for name, linear in [*model.named_modules()]:
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            four = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, False, bf16, quant_type="nf4"
            )
            four.load_state_dict({"weight": linear.weight.detach()})
            four.support_avx512bf16_for_cpu = False
            model.set_submodule(name, four.to("cpu"))
    model.is_loaded_in_4bit = True
    found = add_lora(model, target_modules="all-linear", r=8, lora_alpha=16)
    randomize(found)
    return found.eval()


def qualified() -> Verdict:
    """The decoder passed, and takes a quarter of eager's time on the device, more on the host."""
    groups = [Group("cuda", "cooperative", "bfloat16", a, "4bit") for a in ("bfloat16", "float32")]
    ours, eager = Seconds(1e-5, 9e-5), Seconds(4e-5, 5e-5)
    points = [Point(g, M, 4096, 4096, 16, ours, eager, None, None) for g in groups for M in (1, 16)]
    return Verdict({}, frozenset(groups), {}, points)


@pytest.mark.skipif(emulator_unavailable_reason() is not None, reason="the emulator was not built")
@pytest.mark.parametrize("has_verdict", [False, True], ids=["eager", "decoder"])
def test_page_generates_the_tokens_of_peft(
    has_verdict: bool, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(
        r"```python\n(import torch\nfrom transformers.*?)```", PAGE.read_text(), re.S
    )
    page: dict[str, Any] = {}
    exec(code, page)
    stock = model_of_nf4()
    ids = torch.arange(3, 12)[None]
    logits: list[Tensor] = []
    want = ids
    with torch.no_grad():
        for _ in range(COUNT):
            logits.append(stock(want).logits[0, -1])
            want = torch.cat([want, logits[-1].argmax()[None, None]], 1)
    # A margin that rounding does not decide.
    assert all((t := step.float().topk(2).values)[0] - t[1] > 0.02 for step in logits)
    model = fuse(copy.deepcopy(stock))
    ran: list[str] = []
    choose = selection.choose

    def chosen(problem: Any, *args: Any) -> Any:
        found = choose(problem._replace(device_type="cuda", device_index=0), *args)
        ran.append(f"{found.backend} {workspace.is_capturing(torch.device('cuda'))}")
        return found

    monkeypatch.setattr(selection, "choose", chosen)
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "gpu", lambda index: H100)
    monkeypatch.setattr(cuda, "unsupported_device_reason", lambda *at: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(verdicts, "_current", {0: qualified() if has_verdict else "none"})
    selection._choose_by_verdict.cache_clear()
    with library.as_on_gpu(), cuda.emulate() if has_verdict else contextlib.nullcontext():
        got = page["generate"](model, ids, COUNT)
    assert got.tolist() == want[:, ids.shape[1] :].tolist()
    (graph,) = graphs
    assert graph.replays == COUNT - 2 and graph.done
    inside = {each for each in ran if each.endswith("True")}
    assert inside == {"cuda True" if has_verdict else "eager True"}
    assert "eager False" in ran  # the prompt; and a token outside, where the host's time counts
