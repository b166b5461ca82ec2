"""Philox against its published answers, the mask's layout, and the mask's statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.core.dropout import dropout_mask, dropout_scale, dropout_threshold, philox4x32

# Random123 1.14, tests/kat_vectors: rounds, counter, key, answer.
KNOWN_ANSWERS = """
7  00000000 00000000 00000000 00000000  00000000 00000000  5f6fb709 0d893f64 4f121f81 4f730a48
7  ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  5207ddc2 45165e59 4d8ee751 8c52f662
7  243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""
WORDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("line", KNOWN_ANSWERS.split("\n")[1:-1])
def test_philox_has_the_published_answers(line):
    rounds, *words = line.split()
    numbers = [torch.tensor(int(word, 16)) for word in words]
    answer = philox4x32(numbers[:4], numbers[4:6], int(rounds))
    assert [word.item() for word in answer] == [word.item() for word in numbers[6:]]


def philox_integers(counter, key, rounds=10):
    """The same function on Python's own integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS))
def test_philox_on_any_words_is_that_of_integers(counter, key):
    got = philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [word.item() for word in got] == philox_integers(counter, key)


@pytest.mark.parametrize("seed", [0, -1, 0x0123456789ABCDEF, -(2**63)])
@pytest.mark.parametrize("offset", [0, -1, 0x0FEDCBA987654321, 2**63 - 1])
def test_dropout_mask_has_the_documented_layout(seed, offset):
    """Element (m, k) is word k & 3 of counter (k >> 2, m, offset) under key seed."""
    M, K, p = 3, 11, 0.3
    mask = dropout_mask(torch.tensor([seed, offset]), M, K, p)
    assert mask.shape == (M, K) and mask.dtype is torch.bool
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for m in range(M):
        for k in range(K):
            counter = (k >> 2, m, offset % 2**32, (offset >> 32) % 2**32)
            assert mask[m, k].item() == (philox_integers(counter, key)[k & 3] >= round(p * 2**32))


def test_dropout_mask_indices_are_global():
    rng = torch.tensor([1, 2])
    large = dropout_mask(rng, 9, 21, 0.5)
    assert torch.equal(dropout_mask(rng, 4, 6, 0.5), large[:4, :6])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_dropout_mask_of_no_elements_is_empty(shape):
    assert dropout_mask(torch.tensor([1, 2]), *shape, 0.5).shape == shape


def test_dropout_at_the_ends_of_the_range_keeps_all_or_nothing():
    rng = torch.tensor([1, 2])
    assert dropout_mask(rng, 64, 64, 0.0).all()
    assert not dropout_mask(rng, 64, 64, 1.0).any()
    assert (dropout_threshold(0.0), dropout_threshold(0.5)) == (0, 2**31)
    assert dropout_threshold(1.0) == 2**32 - 1  # still a 32-bit word
    assert (dropout_scale(0.0), dropout_scale(0.75), dropout_scale(1.0)) == (1, 4, 0)


def test_dropout_mask_of_a_larger_p_drops_more():
    rng = torch.tensor([1, 2])
    masks = [dropout_mask(rng, 64, 64, p) for p in (0.1, 0.4, 0.8)]
    assert (masks[0] >= masks[1]).all() and (masks[1] >= masks[2]).all()


# Statistics of M·K coins that fall with probability p. A fair generator leaves each of the normal
# statistics below outside five standard deviations once in 1.7 million times.
M, K, SIGMAS = 256, 1024, 5


@pytest.mark.parametrize("seed", [0, 1, -2])
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_dropout_mask_rates_are_fair(p, seed):
    dropped = ~dropout_mask(torch.tensor([seed, 3]), M, K, p)
    n, variance = M * K, p * (1 - p)
    assert abs(dropped.sum().item() - n * p) <= SIGMAS * math.sqrt(n * variance)
    # Sums of columns and of rows, squared and added: chi-squared of `count` degrees of freedom,
    # whose mean is `count`; its variance is that of count squared binomials.
    for axis, size, count in ((0, M, K), (1, K, M)):
        deviation = dropped.sum(axis).double() - size * p
        chi2 = (deviation.square() / (size * variance)).sum().item()
        kurtosis = 3 + (1 - 6 * variance) / (size * variance)
        assert abs(chi2 - count) <= SIGMAS * math.sqrt(count * (kurtosis - 1))


def correlation(a, b, p):
    """Correlate two masks with known rate; for independent ones the deviation is 1/√n."""
    keep = 1 - p
    products = (a.double() - keep) * (b.double() - keep)
    return products.mean().item() / (p * keep) * math.sqrt(a.numel())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(p):
    mask = dropout_mask(torch.tensor([5, 6]), M, K, p)
    for lag in (1, 2, 3, 4, 8):  # within one block of four words and across
        assert abs(correlation(mask[:, lag:], mask[:, :-lag], p)) <= SIGMAS
        assert abs(correlation(mask[lag:], mask[:-lag], p)) <= SIGMAS
    assert abs(correlation(mask[:, :M], mask[:, :M].T, p)) <= SIGMAS * math.sqrt(2)  # pairs twice


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("other", [(6, 6), (5, 7), (5 + 2**32, 6), (5, 6 + 2**32), (6, 5), (-5, 6)])
def test_states_are_independent(other, p):
    mask, another = (dropout_mask(torch.tensor(rng), M, K, p) for rng in ((5, 6), other))
    assert abs(correlation(mask, another, p)) <= SIGMAS
