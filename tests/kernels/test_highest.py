"""The highest tokens are a prefix of the row sorted, whatever ties; logprobs follow the definition."""

import math

import pytest
import torch
from torch import Tensor

from kernels.highest import highest
from kernels.logprobs import logprobs


def by_sorting(row: Tensor) -> list[int]:
    return sorted(range(len(row)), key=lambda token: (-row[token].item(), token))


@pytest.mark.parametrize("num", [1, 5, 60, 299, 300])
@pytest.mark.parametrize("kind", ["distinct", "rounded", "equal", "mostly -inf", "signed zeros", "huge"])
def test_the_highest_are_a_prefix_of_the_sorted_row(kind: str, num: int) -> None:
    logits = 3 * torch.randn(5, 300)
    if kind == "rounded":
        logits = logits.round()
    if kind == "equal":
        logits[:] = -7.0
    if kind == "mostly -inf":
        logits[:, 4:] = -math.inf
    if kind == "signed zeros":
        logits = torch.tensor([0.0, -0.0]).repeat(5, 150)
    if kind == "huge":
        logits = logits.sign() * torch.finfo(torch.float32).max
    before = logits.clone()
    listed = highest(logits, num)
    values, ids = listed.values, listed.ids
    assert torch.equal(logits, before)
    for n, row in enumerate(logits):
        expected = [token for token in by_sorting(row) if row[token] > -math.inf]
        count = int((values[n] > -math.inf).sum())
        assert count >= min(num, len(expected))
        assert ids[n, :count].tolist() == expected[:count]
        assert torch.equal(values[n, :count], row[expected[:count]])


def test_a_row_lists_the_same_in_any_batch() -> None:
    logits = torch.randn(20, 1000).round(decimals=1)
    logits[::3] = 0.0
    together = highest(logits, 30)
    for n in range(20):
        alone = highest(logits[n : n + 1], 30)
        count = alone.values.shape[1]
        assert torch.equal(alone.values[0], together.values[n, :count])
        assert torch.equal(alone.ids[0], together.ids[n, :count])
        assert torch.all(together.values[n, count:] == -math.inf)


@pytest.mark.parametrize("vocab", [21, 3000])
@pytest.mark.parametrize("num", [0, 1, 20])
def test_logprobs_are_the_logarithm_of_the_softmax(vocab: int, num: int) -> None:
    logits = 5 * torch.randn(9, vocab)
    logits[1] += 1000
    logits[2, 3:] = -math.inf
    chosen = torch.tensor([0, 1, 2] * 3)
    of_chosen, top, ids = logprobs(logits, chosen, num)
    exact = logits.double().log_softmax(-1)
    assert torch.allclose(of_chosen, exact.gather(1, chosen[:, None])[:, 0], atol=1e-6, rtol=0)
    assert top.shape == ids.shape == (9, num)
    for n in range(9):
        finite = min(num, 3) if n == 2 else num
        assert ids[n, :finite].tolist() == by_sorting(logits[n])[:finite]
        assert torch.allclose(top[n, :finite], exact[n, ids[n, :finite]], atol=1e-6, rtol=0)
        assert torch.all(top[n, finite:] == -math.inf)


def test_logprobs_of_a_row_have_the_same_bits_in_any_batch() -> None:
    logits = 3 * torch.randn(40, 4999)
    chosen = torch.randint(4999, (40,))
    together = logprobs(logits, chosen, 7)
    for n in range(40):
        alone = logprobs(logits[n : n + 1].clone(), chosen[n : n + 1], 7)
        assert all(torch.equal(a[0], b[n]) for a, b in zip(alone, together, strict=True))


def test_logprobs_from_a_longer_list_are_the_same() -> None:
    logits = 3 * torch.randn(12, 3000)
    logits[::4, 3:] = -math.inf
    chosen = torch.zeros(12, dtype=torch.int64)
    found, from_list = (logprobs(logits, chosen, 7, listed) for listed in (None, highest(logits, 60)))
    finite = found[1] > -math.inf
    assert torch.equal(finite, from_list[1] > -math.inf)
    assert torch.equal(found[0], from_list[0])
    assert all(torch.equal(a[finite], b[finite]) for a, b in zip(found[1:], from_list[1:], strict=True))


@pytest.mark.parametrize("num", [0, 1, 7])
def test_a_row_of_nan_lists_nothing_and_harms_no_other(num: int) -> None:
    logits = torch.randn(3, 300)
    chosen = torch.tensor([0, 1, 2])
    expected = logprobs(logits, chosen, num)
    logits[1] = math.nan
    found = logprobs(logits, chosen, num)
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(found, expected, strict=True))
    assert found[0][1].isnan()
    alone = highest(logits[1:2], 7)
    assert alone.values.shape == alone.ids.shape == (1, 1)
    assert alone.values[0, 0] == -math.inf
    assert logprobs(logits[1:2], chosen[:1], num)[1].shape == (1, num)
