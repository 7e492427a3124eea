"""Penalties agree with transformers where the definitions do, and with the definition one token at a time."""

import math

import pytest
import torch

from kernels.penalties import TokenLists, add_, ban_, penalize_counts_, penalize_repetition_

VOCAB = 50


def lists(tokens: dict[int, list[int]]) -> TokenLists:
    """By row of logits."""
    return TokenLists(
        rows=torch.tensor(list(tokens)),
        lengths=torch.tensor([len(ids) for ids in tokens.values()]),
        ids=torch.tensor([token for ids in tokens.values() for token in ids]),
    )


@pytest.mark.parametrize("penalty", [1.3, 0.4, 100.0, 1e30])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    logits = 4 * torch.randn(3, VOCAB)
    logits[0, :5] = torch.tensor([0.0, -0.0, -math.inf, 1e-30, -1e30])
    history = torch.randint(VOCAB, (3, 70))
    history[0, :5] = torch.arange(5)
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())
    distinct = {n: sorted(set(history[n].tolist())) for n in range(3)}
    penalize_repetition_(logits, lists(distinct), torch.full((3,), penalty))
    assert torch.equal(logits, expected)


def test_only_named_tokens_of_named_rows_change_by_that_rows_parameters() -> None:
    logits = torch.randn(4, VOCAB)
    before = logits.clone()
    tokens = lists({2: [7, 9], 0: [7]})
    counts = torch.tensor([1.0, 3.0, 2.0])
    penalize_counts_(
        logits, tokens, counts, presence=torch.tensor([0.5, -1.0]), frequency=torch.tensor([0.25, 2])
    )
    expected = before.clone()
    for row, token, amount in ((2, 7, 0.75), (2, 9, 1.25), (0, 7, 3.0)):
        expected[row, token] -= amount
    assert torch.equal(logits, expected)
    penalize_repetition_(logits, tokens, torch.tensor([2.0, 4.0]))
    for row, token, factor in ((2, 7, 2.0), (2, 9, 2.0), (0, 7, 4.0)):
        value = expected[row, token]
        expected[row, token] = value / factor if value > 0 else value * factor
    assert torch.equal(logits, expected)
    add_(logits, tokens, counts)
    ban_(logits, lists({3: [1, 1]}))
    expected[2, 7] += 1
    expected[2, 9] += 3
    expected[0, 7] += 2
    expected[3, 1] = -math.inf
    assert torch.equal(logits, expected)


def test_a_token_of_minus_infinity_stays_there() -> None:
    banned = torch.full((1, VOCAB), -math.inf)
    added, divided, counted = banned.clone(), banned.clone(), banned.clone()
    tokens = lists({0: [3, 4]})
    two = torch.tensor([2.0, 2.0])
    add_(added, tokens, 100 * two)
    penalize_repetition_(divided, tokens, two[:1] / 8)
    penalize_counts_(counted, tokens, two, presence=-two[:1], frequency=-two[:1])
    assert torch.equal(added, banned)
    assert torch.equal(divided, banned)
    assert torch.equal(counted, banned)
