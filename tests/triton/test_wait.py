"""`cooperative_kernel`, whose programs wait for each other, each a thread, one running at a time.

Triton's interpreter runs the programs of a grid one after another, so that the first would wait
forever; elsewhere in these tests they are two launches. Here the program that goes on is drawn from
a seed whenever one touches memory.
"""

import functools
import inspect
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton.language as tl  # noqa: F401 (the interpreter patches what a kernel's module has of it)
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

import lora_kernels
from lora_kernels.backends import workspace
from lora_kernels.backends.triton import COOPERATIVE, equation, launch
from lora_kernels.bench import case as cases
from lora_kernels.bench.case import Case

MEMORY = ("create_atomic_rmw", "create_masked_load", "create_masked_store")
MOST_SWITCHES = 20_000  # many times what these launches take: the rest waits for what never comes
PROGRAMS = 5


class Interleaved:
    """Run the programs of a grid, each in a thread of its own, one at a time."""

    def __init__(self, program: Callable[[], None], count: int, seed: int) -> None:
        self.program, self.left, self.random = program, list(range(count)), random.Random(seed)
        self.turns = [threading.Semaphore(0) for _ in range(count)]
        self.now, self.atomics, self.switches = 0, 0, 0
        self.ended: list[int] = []
        self.problem: BaseException | None = None

    def run(self) -> None:
        threads = [threading.Thread(target=self._run, args=(me,)) for me in self.left]
        for thread in threads:
            thread.start()
        self._give()
        for thread in threads:
            thread.join()
        if self.problem is not None:
            raise self.problem

    def switch(self, name: str) -> None:
        """Called by the program whose turn it is; returns when it is again."""
        self.switches += 1
        self.atomics += name == "create_atomic_rmw"
        if self.switches > MOST_SWITCHES:
            raise RuntimeError("programs wait forever")
        me = self.now
        self._give()
        self._take(me)

    def _run(self, me: int) -> None:
        try:
            self._take(me)
            self.program()
        except BaseException as problem:
            self.problem = self.problem or problem
        self.left.remove(me)
        self.ended.append(me)
        if self.left:
            self._give()

    def _give(self) -> None:
        self.turns[self.random.choice(self.left)].release()

    def _take(self, me: int) -> None:
        self.turns[me].acquire()
        self.now = me
        interpreter_builder.set_grid_idx(me, 0, 0)


def interleave(monkeypatch: pytest.MonkeyPatch, seed: int) -> list[Interleaved]:
    """Run waiting kernels interleaved from here on; return their launches."""
    made: list[Interleaved] = []
    alone = launch.run

    def run(kernel: Any, config: Any, *args: Any, grid: Any, device: Any, **meta: Any) -> None:
        if not meta.get("CONSUME"):
            alone(kernel, config, *args, grid=grid, device=device, **meta)
            return
        body = kernel.rewrite()

        @functools.wraps(body)
        def programs(**bound: Any) -> None:
            interpreter_builder.set_grid_dim(*grid, 1, 1)
            made.append(Interleaved(lambda: body(**bound), *grid, seed))
            with pytest.MonkeyPatch.context() as patch:
                for name in MEMORY:
                    patch.setattr(interpreter_builder, name, switching(made[-1], name))
                made[-1].run()

        programs.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(kernel.rewritten_fn, kernel.fn, programs)
            alone(kernel, config, *args, grid=(1,), device=device, **meta)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(equation, "is_interpreted", lambda: False)
    return made


def switching(launched: Interleaved, name: str) -> Callable[..., Any]:
    touch = getattr(interpreter_builder, name)

    def switch_and_touch(*args: Any, **kwargs: Any) -> Any:
        launched.switch(name)
        return touch(*args, **kwargs)

    return switch_and_touch


def step(quant: str) -> dict[str, Tensor]:
    """y and the gradients of a layer whose forward and dx have as many programs as PROGRAMS."""
    size = 64 * PROGRAMS
    args = cases.inputs(Case(5, size, size, 5, torch.float16, quant=quant, gate=True, bias=True))
    with lora_kernels.backend("triton", COOPERATIVE):
        return cases.run(lora_kernels.lora_linear, args)


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_cooperative_kernel_programs_wait_in_any_order_same_bits(
    quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, flags = step(quant), torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(workspace, "flags", lambda device: flags)
    ended, waited = set(), 0
    for seed in range(4):
        with pytest.MonkeyPatch.context() as patch:
            launches = interleave(patch, seed)
            got = step(quant)
        assert flags.tolist() == [0, 0]
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert len(launches) == 2  # y, dx
        ended |= {tuple(launched.ended) for launched in launches}
        for launched in launches:
            assert sorted(launched.ended) == list(range(PROGRAMS))
            waited += launched.atomics - 2 * PROGRAMS
    assert len(ended) > 4 and waited > 0


def test_cooperative_kernel_a_flag_never_raised_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = torch.tensor([-9, 0], dtype=torch.int32)
    monkeypatch.setattr(workspace, "flags", lambda device: flags)
    interleave(monkeypatch, 0)
    with pytest.raises(Exception, match="programs wait forever"):
        step("")
