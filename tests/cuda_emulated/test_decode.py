"""The decoder's launch over a seeded draw of calls and of launches.

Of integers every sum is one of less than 25 bits: y, z and P are exact in any order of additions.
The bytes that a launch reads and stores are those of its model. Other numbers are the same bits
in any order of threads, and as near to the float64 result as their roundings allow.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.backends import cuda, workspace
from lora_kernels.backends.cuda import COOPERATIVE, launch
from lora_kernels.backends.cuda import linear as equation
from lora_kernels.core.call import Operands, Spec
from lora_kernels.core.codes import Codes
from tests.support.problems import bf16, f16, f32

DTYPES = (f32, bf16, f16)
ROWS, RANKS_OF_A_WARP, ROWS_OF_A_SHARE, RANKS_OF_A_SHARE, BLOCK = 16, 2, 4, 16, 64
ROOM = 80 << 10  # bytes of shared memory, beyond which x is not kept there
CALLS = 8  # of a test, all with the same flags
MAX_BLOCKS = 20  # of a call


def up(a: int, b: int) -> int:
    return -(-a // b)


@dataclass
class Call:
    """A call, what is in its way, and what it must return."""

    operands: Operands
    spec: Spec
    places: int  # of blocks at once
    max_blocks: int
    splits: tuple[int, int]  # the least of K, the most of them
    weight: Tensor  # in float64
    seed: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        (M, K), (N, R) = self.operands.x.shape, self.operands.lora_B.shape
        return M, N, K, R

    @property
    def codes(self) -> Codes | None:
        return self.operands.weight if isinstance(self.operands.weight, Codes) else None

    def __str__(self) -> str:
        M, N, K, R = self.sizes
        c = self.codes
        form = f"codes {c.blocksize} {c.nested_blocksize}" if c else "dense"
        given = ", ".join(
            f"{name} {t.dtype} {t.stride()}"
            for name, t in self.operands._asdict().items()
            if isinstance(t, Tensor)
        )
        return (
            f"seed {self.seed}: M {M} N {N} K {K} R {R}, {form}, {given}, {self.spec}, "
            f"places {self.places}, blocks {self.max_blocks}, splits {self.splits}"
        )


class Draw:
    """Draws calls; the same for a seed. dtype: of normal numbers in place of integers."""

    def __init__(self, seed: int, dtype: torch.dtype | None = None) -> None:
        self.seed, self.dtype, self.of = seed, dtype, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def maybe(self, value: Any, odds: float = 0.5) -> Any:
        return value if self.of.random() < odds else None

    def numbers(self, *shape: int, most: int = 2, density: float = 1.0) -> Tensor:
        if self.dtype is not None:  # what each of the dtypes holds
            t = torch.randn(shape, generator=self.generator).clamp(-4, 4)
            return (t * 64).round() / 64
        t = torch.randint(-most, most + 1, shape, generator=self.generator)
        return t * (torch.rand(shape, generator=self.generator) < density)

    def rows(self, t: Tensor, whole: bool = False) -> Tensor:
        """Lay out a matrix with gaps, which are NaN; whole: rows stay aligned."""
        layouts = ["rows", "padded", "inside"] + ([] if whole else ["off", "columns", "wide"])
        layout, gap = self.of.choice(layouts), 16 // t.element_size()
        if layout == "columns":
            return t.t().contiguous().t()
        before, after = {
            "rows": (0, 0),
            "padded": (0, gap * self.of.choice([1, 3])),
            "inside": (2 * gap, gap),
            "off": (1, 2 * gap - 1),
            "wide": (0, 3),
        }[layout]
        wide = torch.nn.functional.pad(t, (before, after), value=float("nan"))
        return wide[:, before : before + t.shape[1]]

    def vector(self, n: int) -> Tensor | None:
        """Ones and twos of either sign, or nothing."""
        if self.maybe(True) is None:
            return None
        t = torch.tensor([-2.0, -1.0, 1.0, 2.0])[torch.randint(4, (n,), generator=self.generator)]
        t = t.to(self.of.choice(DTYPES))
        return t if self.maybe(True, 0.7) else torch.stack([t, torch.full_like(t, 9.0)], 1)[:, 0]

    def codes(self, N: int, K: int, dtype: torch.dtype) -> tuple[Codes, Tensor]:
        """A weight of codes that one number of the dtype cannot hold, and its values."""
        most = 1023 if dtype is bf16 else 4095
        code = torch.tensor(self.of.sample(range(-most, most + 1, 2), 16), dtype=f32)
        if self.dtype is not None:
            code = torch.randn(16, generator=self.generator)
        picked = torch.randint(16, (N * K,), generator=self.generator)
        blocksize = self.of.choice([64, 64, 128, 256, 1024])
        blocks = up(N * K, blocksize)
        packed = (picked[0::2] * 16 + picked[1::2]).to(torch.uint8)
        nested_blocksize, nested_absmax, nested_code, offset = 0, None, None, None
        absmax = torch.randint(1, 5, (blocks,), generator=self.generator).to(f32)
        scales = absmax
        if self.maybe(True):
            nested_blocksize = self.of.choice([1, 2, 8, 64, 256])
            absmax = torch.randint(256, (blocks,), generator=self.generator).to(torch.uint8)
            nested_code = torch.randint(-1, 2, (256,), generator=self.generator).to(f32)
            groups = up(blocks, nested_blocksize)
            nested_absmax = torch.randint(1, 3, (groups,), generator=self.generator).to(f32)
            offset = torch.tensor(float(self.of.choice([-1, 1, 2])))
            each = nested_absmax.repeat_interleave(nested_blocksize)[:blocks]
            scales = nested_code[absmax.long()] * each + offset
        nested = nested_absmax, nested_code, offset
        c = Codes(packed, absmax, code, *nested, blocksize, nested_blocksize, "nf4")
        values = code[picked].double() * scales.repeat_interleave(blocksize)[: N * K].double()
        return c, values.view(N, K)

    def call(self) -> Call:
        is_quantized, dtype = (
            self.maybe(True) is not None,
            self.dtype or self.of.choice([bf16, f16]),
        )
        M = self.of.choice([1, 2, 3, 4, 5, 7, 8, 8, 9, 12, 13, 16])
        depth = 1024 if M <= 8 else 256  # of a unit, where x is kept and where it is not
        step = 64 if is_quantized else 8
        K = self.of.choice([step, 3 * step, 256, depth, depth, 2 * depth, 3 * depth])
        K = max(step, K + step * self.of.choice([-1, 0, 0, 1]))
        N = 8 * self.of.choice([1, 2, 3, 4, 5, 8, 9])
        if K <= 512 and self.maybe(True):
            N *= self.of.choice([2, 3])
        R = self.of.choice([1, 2, 3, 5, 8, 15, 16, 17, 33])
        x_dtype, A_dtype, B_dtype = (self.of.choice([dtype, dtype, *DTYPES]) for _ in range(3))
        x = self.numbers(M, K, density=0.2).to(x_dtype)
        if is_quantized:
            weight, values = self.codes(N, K, dtype)
        else:
            w_dtype = self.of.choice([dtype, dtype, *DTYPES])
            dense = self.numbers(N, K, most=3)
            weight, values = self.rows(dense.to(w_dtype), whole=True), dense.double()
        x = x[:1].expand(M, K) if self.maybe(True, 0.1) else self.rows(x)
        A = self.rows(self.numbers(R, K).to(A_dtype))
        B = self.rows(self.numbers(N, R).to(B_dtype))
        vectors = self.vector(R), self.vector(N), self.vector(N)
        y_dtype, save_z = self.of.choice([f32, f32, bf16, f16]), self.maybe(True) is not None
        return Call(
            Operands(x, weight, A, B, *vectors),
            Spec(self.of.choice([0.5, 1.0, 2.0]), 0.0, dtype, y_dtype, save_z),
            self.of.choice([1, 2, 3, 4, 5, 7, 9]),
            self.of.choice([1, 2, 3, 6, 8, MAX_BLOCKS, MAX_BLOCKS]),
            (self.of.choice([40, 128, 256, 256, 512]), self.of.choice([1, 2, 5, 16])),
            values,
            self.seed,
        )


def answers(call: Call, is_exact: bool = True) -> dict[str, Tensor]:
    """Return y, z and P in float64; is_exact: float32 holds every sum on the way to them."""
    x, _, A, B, gate, scale, bias, *_ = (
        t.double() if isinstance(t, Tensor) else t for t in call.operands
    )
    g = call.spec.scaling * (1.0 if gate is None else gate)
    p, z = x @ A.t(), x @ call.weight.t() + ((x @ A.t()) * g) @ B.t()
    y = z if scale is None else z * scale
    y = y if bias is None else y + bias
    bound = x.abs() @ call.weight.abs().t() + (x.abs() @ A.abs().t()) * 4 @ B.abs().t()
    assert not is_exact or 2 * bound.max() + 2 < 2**24, "choose smaller values"
    return {"p": p, "z": z, "y": y}


def is_kept(call: Call) -> bool:
    """Return True if x and all else fit in the shared memory of a block."""
    M, _, K, R = call.sizes
    table = 32 << 10 if call.codes else 0
    rest = (32 << 10) + 8 * 8 * 20 * 4 + 16 + up(4 * M * R, 16) * 16
    return M <= 8 and table + rest + up(K, 128) * 128 * 2 * M <= ROOM


def bytes_of(call: Call) -> tuple[dict[str, tuple[int, int]], int]:
    """Return the bytes read and stored of each operand, and the floats of tile_partials."""
    (M, N, K, R), kept, c, o = call.sizes, is_kept(call), call.codes, call.operands
    rows, depth = (16, 1024) if kept else (64, 256)
    tiles, parts = up(N, rows), up(K, depth)
    blocks = min(call.places, call.max_blocks)
    stripe = max(up(tiles * parts, blocks), min(parts, 4 if c else 2))
    grid = up(tiles * parts, stripe)
    ends = [(t * parts // stripe, ((t + 1) * parts - 1) // stripe) for t in range(tiles)]
    shared = [(t, to - begin + 1) for t, (begin, to) in enumerate(ends) if begin != to]
    least, most = call.splits
    steps = up(K, least)
    splits = up(K, up(steps, min(most, steps)) * least)
    size_of_x, of_p = o.x.element_size(), up(R, RANKS_OF_A_WARP) * M
    is_rounded = not kept and o.x.dtype is not call.spec.dtype
    of_x = grid * M if kept else tiles * 4 * 8 * up(M, 8)
    size = call.spec.y_dtype.itemsize
    found = {
        "x": ((of_p if is_rounded else of_p + of_x) * K * size_of_x, 0),
        "a": (up(M, ROWS_OF_A_SHARE) * R * K * o.lora_A.element_size(), 0),
        "q": (M * N * R * o.lora_B.element_size(), 0),
        "partials": (grid * splits * M * R * 4, splits * M * R * 4),
        "p": (0, M * R * 4),
        "y": (0, M * N * size),
    }
    if is_rounded:
        found["rounded"] = (of_x * K * 2, 0)
    if c is None:
        found["w"] = (N * K * 2, 0)
    else:
        scales = N * K // BLOCK
        found["packed"] = (N * K // 2, 0)
        found["code"] = (grid * 256 * 16 * 2 * 4, 0)
        found["absmax"] = (scales * c.absmax.element_size(), 0)
        if c.nested_absmax is not None:
            found["nested_code"] = found["nested_absmax"] = (scales * 4, 0)
            found["offset"] = (grid * 256 * 4, 0)
    for name, t, count in (
        ("gate", o.rank_gate, grid * M * R),
        ("out_scale", o.column_scale, M * N),
        ("bias", o.bias, M * N),
    ):
        if t is not None:
            found[name] = (count * t.element_size(), 0)
    if call.spec.save_z:
        found["z"] = (0, M * N * size)
    if shared:
        read = sum(count * min(rows, N - t * rows) for t, count in shared)
        stored = sum(count * rows for _, count in shared)
        found["tile_partials"] = (read * M * 4, stored * M * 4)
    return found, 2 * min(call.max_blocks, tiles * parts) * rows * M * (parts > 1)


Results = dict[str, Tensor]


def run(call: Call, flags: Tensor, patch: pytest.MonkeyPatch, seed: int | None = None) -> Results:
    """Return y, P and z of the call in an order of its own, and of tile_partials the shape."""
    found: Results = {"tile_partials": torch.empty(0)}
    original = launch.emulate

    def noted(name: str, touched: Results, args: Any) -> None:
        if (t := touched.get("tile_partials")) is not None:
            found["tile_partials"] = t
        original(name, touched, args)

    seed = call.seed if seed is None else seed
    with patch.context() as patch, cuda.emulate(seed, call.places):
        patch.setattr(workspace, "MAX_BLOCKS", call.max_blocks)
        patch.setattr(workspace, "flags", lambda device: flags[: 2 + call.max_blocks])
        patch.setattr(equation, "_SPLIT", call.splits[0])
        patch.setattr(equation, "_MAX_PUBLISHERS", call.splits[1])
        patch.setattr(launch, "emulate", noted)
        launch.traffic.clear()
        y, (p, z, _) = equation.lora_linear(call.operands, call.spec, COOPERATIVE)
    assert not flags.any(), call
    assert (z is not None) == call.spec.save_z
    return found | {"y": y, "p": p} | ({} if z is None else {"z": z})


def new_flags() -> Tensor:
    return torch.zeros(2 + MAX_BLOCKS, dtype=torch.int32)


@pytest.mark.parametrize(
    "seed", [*range(24), *(pytest.param(s, marks=pytest.mark.proof) for s in range(24, 200))]
)
def test_decode_of_drawn_integers_is_exact_and_moves_what_it_says(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = new_flags()
    for i in range(CALLS):
        call = Draw(seed * CALLS + i).call()
        got, want = run(call, flags, monkeypatch), answers(call)
        for name in got.keys() & want.keys():
            dtype = f32 if name == "p" else call.spec.y_dtype
            assert got[name].dtype is dtype, f"{name}: {call}"
            assert torch.equal(got[name], want[name].to(f32).to(dtype)), f"{name}: {call}"
        ((kernel, moved),) = launch.traffic
        bytes_, floats = bytes_of(call)
        assert kernel == "decode"
        moved = {name: each for name, each in moved.items() if name != "flags" and any(each)}
        assert moved == bytes_, call
        assert got["tile_partials"].shape == (floats,), call


@pytest.mark.parametrize("M", [1, 9])  # kept, and loaded by tiles
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
@pytest.mark.parametrize("is_quantized", [False, True])
def test_p_of_float32_rows_is_not_rounded(is_quantized: bool, dtype: torch.dtype, M: int) -> None:
    """Integers of 13 bits, where a product takes 8 or 11."""
    K, draw = 1024, Draw(0)
    x = torch.randint(-4095, 4096, (M, K), generator=draw.generator).to(f32)
    A, B = draw.numbers(5, K, most=1).to(f32), draw.numbers(16, 5).to(dtype)
    W = draw.codes(16, K, dtype)[0] if is_quantized else draw.numbers(16, K).to(dtype)
    spec = Spec(1.0, 0.0, dtype, f32, False)
    _, (p, *_) = equation.lora_linear(Operands(x, W, A, B, None, None, None), spec, COOPERATIVE)
    assert torch.equal(p.double(), x.double() @ A.double().t())
    assert (x.to(dtype).double() @ A.double().t() - p).any()


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_decode_of_drawn_numbers_in_any_order_has_the_same_bits_within_its_roundings(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P sums 8 products of each 256 in a lane, then lanes and splits; y half of K in a warp."""
    flags, u = new_flags(), 2.0**-24
    for seed in range(10):
        call = Draw(seed, dtype).call()
        first, *others = (run(call, flags, monkeypatch, order) for order in range(3))
        for other in others:
            for name in first.keys() - {"tile_partials"}:
                assert torch.equal(first[name], other[name]), f"{name}: {call}"
        exact, (*_, K, R) = answers(call, is_exact=False), call.sizes
        x, a, b = (call.operands[i].double().abs() for i in (0, 2, 3))
        p = x @ a.t()
        error = (first["p"] - exact["p"]).abs()
        assert (error <= (8 * up(K, 256) + 5 + 16) * u * p).all(), call
        of_codes = 0.0 if call.codes is None else 2.0**-16 if dtype is bf16 else 2.0**-21
        base, g = x @ call.weight.abs().t(), call.operands.rank_gate
        g = call.spec.scaling * (1.0 if g is None else g.double().abs())
        bound = (of_codes + (K / 2 + 20) * u) * base
        bound += (8 * up(K, 256) + 21 + R + 3) * u * (p * g) @ b.t()
        for name, factor in (("z", None), ("y", call.operands.column_scale)):
            if name not in first:
                continue
            f = 1.0 if factor is None else factor.double().abs()
            of_y = {f32: 2.0**-24, f16: 2.0**-11, bf16: 2.0**-8}[call.spec.y_dtype]
            limit = bound * f + (of_y + 2 * u) * exact[name].abs() + 2 * u * 2 + 2.0**-24
            error = (first[name].double() - exact[name]).abs()
            assert (error <= limit * 1.01).all(), f"{name}: {call}"


def test_decode_of_an_infinite_row_leaves_the_others_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row of x reaches its row of y, a row of W its column."""
    flags, of = new_flags(), random.Random(0)
    for seed in range(20):
        call = Draw(seed).call()
        M, N, K, _ = call.sizes
        m, n, k = of.randrange(M), of.randrange(N), of.randrange(K)
        want = answers(call)["y"].to(f32).to(call.spec.y_dtype)
        o, c, rows, columns = call.operands, call.codes, {m}, set(range(N))
        if seed % 2 and c is not None and c.nested_absmax is None:
            block = (n * K + k) // c.blocksize
            c.absmax[block] = float("inf")
            columns = {at // K for at in range(block * c.blocksize, (block + 1) * c.blocksize)}
            rows = set(range(M))
        elif seed % 2 and isinstance(o.weight, Tensor):
            o.weight[n, k], rows, columns = float("inf"), set(range(M)), {n}
        elif o.x.stride(0):
            o.x[m, k] = float("inf")
        else:
            o.x[0, k], rows = float("inf"), set(range(M))
        got = run(call, flags, monkeypatch)["y"]
        hit = torch.zeros(M, N, dtype=torch.bool)
        hit[[[i] for i in rows], [j for j in columns if j < N]] = True
        assert torch.equal(got[~hit], want[~hit]), call
        assert not got[hit].isfinite().all(), call
