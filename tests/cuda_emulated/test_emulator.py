"""Counts of bank conflicts, sums of tensor cores and what cooperative launches need, by kernels and
products made for them."""

import subprocess
from pathlib import Path

import pytest

from tests.support.emulator import build_program

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "cuda/ptx.cuh"
using namespace lora_kernels;
using namespace lora_kernels::gpu;

struct Args {
  const char* op;
  int bytes, stride, pitch, lanes;  // lane i at stride · (i mod lanes) + pitch · (i / lanes)
  const void* from;
};

LK_KERNEL access_kernel(const Args a) {
  for (int at = thread_id() * 16; at < (64 << 10); at += 32 * 16) sts(at, Words4{});
  sync_block();
  const int lane = thread_id() % 32;
  const uint32_t at = lane % a.lanes * a.stride + lane / a.lanes * a.pitch;
  const std::string op = a.op;
  if (op == "lds" && a.bytes == 4) lds<float>(at);
  if (op == "lds" && a.bytes == 8) lds<uint64_t>(at);
  if (op == "lds" && a.bytes == 16) lds<Words4>(at);
  if (op == "sts") sts(at, 1.0f);
  if (op == "half" && lane < 16) lds<float>(at);
  if (op == "late") {
    if (lane % 2) lds<float>(1024 * (lane / 2));
    sync_block();
    lds<float>(at);
  }
  if (op == "cp_async") {
    cp_async16(at, a.from, 16);
    cp_async_commit();
    cp_async_wait<0>();
  }
  uint32_t r[4];
  if (op == "ldmatrix") ldmatrix_x4(at, r);
}

int main(int count, char** words) {
  const auto number = [&](int i) { return std::atoi(words[i]); };
  if (!std::strcmp(words[1], "mma")) {
    float products[16] = {};
    for (int i = 0; i < count - 6; ++i) products[i] = std::strtof(words[6 + i], nullptr);
    const emulator::Mma how{number(2), number(3), (uint64_t)number(4)};
    std::printf("%a", emulator::add_products(std::strtof(words[5], nullptr), products, how));
    return 0;
  }
  if (!std::strcmp(words[1], "cooperative")) {
    resident_blocks(access_kernel, number(2), number(3), number(4));
    try {
      launch({.name = "access", .x = (unsigned)number(5), .threads = 32, .shared_bytes = 4096,
              .stream = {0, 1}, .cooperative = true},
             access_kernel, Args{});
      std::printf("launched");
    } catch (const std::exception& error) {
      std::printf("%s", error.what());
    }
    return 0;
  }
  alignas(16) static float from[4];
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
  emulator::allow({{.name = "from", .begin = begin, .end = begin + sizeof from}});
  emulator::count_banks(true);
  launch({.name = "access", .x = 1, .threads = 32, .shared_bytes = 64 << 10, .stream = {0, 0}},
         access_kernel, Args{words[1], number(2), number(3), number(4), number(5), from});
  emulator::synchronize();
  const auto sites = emulator::bank_sites();
  const emulator::BankSite& fill = sites.front();
  if (fill.extra) std::printf("fill: %ld of %ld; ", (long)fill.extra, (long)fill.accesses);
  for (size_t i = 1; i < sites.size(); ++i)
    std::printf("%s%s %ld %ld", i > 1 ? ", " : "", sites[i].what, (long)sites[i].accesses,
                (long)sites[i].extra);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_program(PROGRAM, tmp_path_factory.mktemp("emulator"))


def printed_by(program: Path, *words: object) -> str:
    return subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, check=True
    ).stdout


# Bank conflicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "size", "stride", "pitch", "lanes", "want"),
    [
        ("lds", 4, 4, 0, 32, 0),
        ("lds", 4, 8, 0, 32, 1),
        ("lds", 4, 128, 0, 32, 31),
        ("lds", 4, 132, 0, 32, 0),  # padded
        ("lds", 4, 0, 0, 32, 0),  # a broadcast
        ("lds", 4, 0, 4, 4, 0),  # eight of them
        ("lds", 4, 0, 128, 16, 1),  # two words of one bank
        ("sts", 4, 8, 0, 32, 1),
        ("half", 4, 128, 0, 32, 15),  # half of the lanes
        ("late", 4, 4, 0, 32, 0),
        # 8 bytes a lane by half warps, 16 by quarters.
        ("lds", 8, 8, 0, 32, 0),
        ("lds", 8, 16, 0, 32, 2),
        ("lds", 8, 0, 128, 16, 0),
        ("lds", 16, 16, 0, 32, 0),
        ("lds", 16, 32, 0, 32, 4),
        ("lds", 16, 128, 0, 32, 28),
        ("lds", 16, 144, 0, 32, 0),  # rows of 128 bytes, padded by 16
        ("lds", 16, 0, 128, 8, 0),  # an address for each quarter
        ("ldmatrix", 16, 16, 0, 32, 0),
        ("ldmatrix", 16, 128, 0, 32, 28),
        ("ldmatrix", 16, 144, 0, 32, 0),
        ("cp_async", 16, 16, 0, 32, 0),
        ("cp_async", 16, 32, 0, 32, 4),
    ],
)
def test_bank_conflicts_of_an_access_are_counted(
    program: Path, op: str, size: int, stride: int, pitch: int, lanes: int, want: int
) -> None:
    """The wavefronts beyond 1, 2 or 4, which 4, 8 or 16 bytes a lane take."""
    got = printed_by(program, op, size, stride, pitch, lanes)
    if op == "late":  # a branch that half of the lanes took before
        assert got == f"lds 1 15, lds 1 {want}"
    else:
        assert got == f"{'lds' if op == 'half' else op} 1 {want}"


# Cooperative launches ----------------------------------------------------------------------------

OTHER = "access: the blocks of another launch were counted"


@pytest.mark.parametrize(
    ("device", "threads", "shared_bytes", "blocks", "want"),
    [
        (1, 32, 4096, 4, "launched"),
        (1, 32, 4096, 5, "access: too many blocks for a cooperative launch"),
        (0, 32, 4096, 4, OTHER),
        (1, 64, 4096, 4, OTHER),
        (1, 32, 0, 4, OTHER),
    ],
)
def test_cooperative_launch_counts_the_blocks_that_may_run_at_once(
    program: Path, device: int, threads: int, shared_bytes: int, blocks: int, want: str
) -> None:
    got = printed_by(program, "cooperative", device, threads, shared_bytes, blocks)
    assert got == want


# Tensor cores ------------------------------------------------------------------------------------

u = 2.0**-24  # half an ulp of 1


@pytest.mark.parametrize(
    ("how", "start", "products", "want"),
    [
        # One after another: to nearest, ties to even.
        ((0, 0, 0), 1.0, [u] * 16, 1.0),
        ((0, 0, 0), 1.0, [3 * u] * 2, 1 + 8 * u),
        # In groups: what is below the last bit of the largest goes, towards zero.
        ((4, 0, 0), 1.0, [u] * 16, 1.0),
        ((4, 0, 0), 1.0, [3 * u] * 2, 1 + 4 * u),
        ((4, 0, 0), -1.0, [-3 * u] * 2, -1 - 4 * u),
        ((4, 0, 0), 1.0, [-u] * 16, 1.0),
        ((8, 1, 0), 1.0, [u] * 16, 1 + 16 * u),
        ((8, 1, 0), 1.0, [u] * 11, 1 + 10 * u),  # 1 + 11 u, and the sum has 24 bits
        ((16, 1, 0), -1.0, [-u] * 11, -1 - 10 * u),
        ((8, 1, 0), 1.0, [0.75 * u] * 16, 1.0),
        ((16, 2, 0), 1.0, [0.75 * u] * 16, 1 + 8 * u),
        # The largest may be a product, and cancel.
        ((4, 0, 0), 1.0, [2.0**24, -(2.0**24)], 0.0),
        ((4, 1, 0), 1.0, [2.0**24, -(2.0**24)], 1.0),
        ((4, 0, 0), 1.0, [2.0**24, 0.0, 0.0, 0.0, -(2.0**24)], 0.0),
        ((4, 0, 0), 0.0, [0.0] * 16, 0.0),
        ((4, 0, 0), 2.0**-149, [2.0**-149], 2.0**-148),
        ((4, 0, 0), 1.0, [float("inf"), 1.0], float("inf")),
    ],
)
def test_tensor_core_drops_the_bits_below_the_largest_of_a_group(
    program: Path, how: tuple[int, int, int], start: float, products: list[float], want: float
) -> None:
    got = printed_by(program, "mma", *how, start.hex(), *(p.hex() for p in products))
    assert float.fromhex(got) == want


def test_tensor_core_with_another_seed_groups_other_products(program: Path) -> None:
    products = [2.0**12, *([2.0**-12] * 14), -(2.0**12)]
    sums = {
        printed_by(program, "mma", 4, 0, seed, (0.0).hex(), *(p.hex() for p in products))
        for seed in range(8)
    }
    assert len(sums) > 1
