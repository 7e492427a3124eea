"""The sampler reads resolved parameters, holds back what would end a reply too early, and knows the end."""

from collections.abc import Sequence

import pytest
import torch

from engine.batch import RowParams
from engine.errors import InvalidRequest
from engine.sampler import Sampler
from engine.stopping import stop_reason
from engine.types import FinishReason, SamplingParams

EOS = frozenset({0, 7})
VOCAB = 12
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def sampler() -> Sampler:
    return Sampler(VOCAB, EOS)


def row(
    params: SamplingParams = GREEDY, seed: int = 1, position: int = 0, num_generated: int = 0
) -> RowParams:
    return RowParams(params, seed, position, num_generated)


def choose(sampler: Sampler, logits: torch.Tensor, rows: Sequence[RowParams]) -> list[int]:
    """The tokens of rows named 0, 1, 2 ..."""
    sampled, _ = sampler.sample(logits, dict(enumerate(rows)))
    return list(sampled.values())


def falling_from(first: int) -> torch.Tensor:
    """Logits whose greedy choice is `first`, then the next id, and so on around.  [VOCAB]"""
    return -torch.arange(VOCAB).roll(first).float()


def test_rows_of_all_kinds_share_a_call(sampler: Sampler) -> None:
    logits = torch.stack([falling_from(3), falling_from(5), falling_from(9)])
    cold = SamplingParams(temperature=1e-6, top_p=0.9)
    one = SamplingParams(temperature=5.0, top_k=1)
    assert choose(sampler, logits, [row(), row(cold), row(one)]) == [3, 5, 9]
    assert choose(sampler, logits, [row(), row(), row(SamplingParams())]) == [3, 5, 9]


def test_a_drawn_token_is_a_function_of_seed_and_position(sampler: Sampler) -> None:
    hot = SamplingParams(temperature=100.0)
    logits = torch.randn(1, VOCAB)

    def reply(seed: int) -> list[int]:
        return [choose(sampler, logits, [row(hot, seed=seed, position=at)])[0] for at in range(40)]

    assert reply(1) == reply(1) != reply(2)
    together = choose(
        sampler, logits.expand(41, -1), [row(), *(row(hot, seed=1, position=at) for at in range(40))]
    )
    assert together[1:] == reply(1)
    assert len(set(reply(1))) > 5


def test_a_row_gets_the_same_whatever_its_batch_mates_ask_for() -> None:
    """They share one list of the highest tokens, as long as the most demanding row needs."""
    sampler = Sampler(3000, EOS)
    asked = [
        SamplingParams(temperature=0.9, top_k=5, logprobs=2),
        SamplingParams(temperature=0.9, logprobs=20),
        SamplingParams(temperature=0.0, top_k=200, logprobs=0),
        SamplingParams(temperature=1.5, top_k=200, top_p=0.8),
        SamplingParams(temperature=1.5, top_k=2000, min_p=0.001, logprobs=3),
        SamplingParams(temperature=1.5, top_p=0.3, logprobs=1),
        SamplingParams(),
    ]
    rows = [row(params, seed=n) for n, params in enumerate(asked)]
    logits = torch.randn(len(rows), 3000).round(decimals=1)
    together, logprobs = sampler.sample(logits.clone(), dict(enumerate(rows)))
    assert list(logprobs) == [0, 1, 2, 4, 5]
    for n, alone in enumerate(rows):
        sampled, of_alone = sampler.sample(logits[n : n + 1].clone(), {n: alone})
        assert sampled == {n: together[n]}
        assert of_alone.get(n) == logprobs.get(n)


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_nothing_stops_a_reply_before_min_tokens(sampler: Sampler, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, min_tokens=2, stop_token_ids=(8,))
    logits = falling_from(7).repeat(3, 1)
    ids = choose(sampler, logits, [row(params, num_generated=n) for n in range(3)])
    assert ids == [9, 9, 7]  # 7 is eos, 8 a stop token
    assert torch.equal(logits[2], falling_from(7))


def test_logits_made_in_inference_mode_can_be_masked(sampler: Sampler) -> None:
    with torch.inference_mode():
        logits = falling_from(7)[None].clone()
    assert choose(sampler, logits, [row(SamplingParams(min_tokens=1, temperature=1e-6, top_p=0.9))]) == [8]


def test_an_eos_that_is_ignored_is_not_held_back(sampler: Sampler) -> None:
    params = SamplingParams(temperature=0.0, min_tokens=2, ignore_eos=True, stop_token_ids=(8,))
    assert choose(sampler, falling_from(7)[None], [row(params)]) == [7]
    assert choose(sampler, falling_from(8)[None], [row(params)]) == [9]


def test_logits_stay_untouched_where_nothing_is_held_back(sampler: Sampler) -> None:
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    choose(
        sampler,
        logits,
        [row(SamplingParams(min_tokens=2), num_generated=2), row(SamplingParams(temperature=1.0))],
    )
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("token", "num_generated", "params", "reason"),
    [
        (3, 1, SamplingParams(), None),
        (7, 1, SamplingParams(), FinishReason.STOP_TOKEN),
        (7, 1, SamplingParams(ignore_eos=True), None),
        (3, 1, SamplingParams(stop_token_ids=(3, 4)), FinishReason.STOP_TOKEN),
        (7, 1, SamplingParams(ignore_eos=True, stop_token_ids=(7,)), FinishReason.STOP_TOKEN),
        (3, 4, SamplingParams(max_tokens=5), None),
        (3, 5, SamplingParams(max_tokens=5), FinishReason.LENGTH),
        (7, 5, SamplingParams(max_tokens=5), FinishReason.STOP_TOKEN),
    ],
)
def test_a_reply_ends_for_the_reason_that_applies_first(
    token: int, num_generated: int, params: SamplingParams, reason: FinishReason | None
) -> None:
    assert stop_reason(token, num_generated, params, EOS) is reason


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(stop_token_ids=(3, 12)), "stop_token_ids holds 12; this model's tokens are 0 to 11"),
        (SamplingParams(stop_token_ids=(-1,)), "stop_token_ids holds -1; this model's tokens are 0 to 11"),
        (
            SamplingParams(logit_bias=((3, 1.0), (12, 1.0))),
            "logit_bias names 12; this model's tokens are 0 to 11",
        ),
        (SamplingParams(logit_bias=((-1, 1.0),)), "logit_bias names -1; this model's tokens are 0 to 11"),
        (
            SamplingParams(logit_bias=((3, 1.0), (4, 1.0), (3, 2.0))),
            "logit_bias names token 3 more than once; give it one bias",
        ),
        (SamplingParams(logprobs=13), "logprobs is 13; this model has 12 tokens"),
        (SamplingParams(min_tokens=9, max_tokens=8), "min_tokens is 9 and max_tokens 8; lower min_tokens"),
        (
            SamplingParams(min_tokens=1, stop_token_ids=tuple(range(1, 12))),
            "every token stops the reply, so min_tokens 1 cannot be met",
        ),
    ],
)
def test_parameters_that_cannot_work_are_refused_with_values(
    sampler: Sampler, params: SamplingParams, message: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        sampler.check(params)
    assert str(refused.value) == message


def test_parameters_that_work_pass_the_check(sampler: Sampler) -> None:
    sampler.check(SamplingParams())
    sampler.check(SamplingParams(min_tokens=8, max_tokens=8, stop_token_ids=(0, 11)))
    sampler.check(SamplingParams(stop_token_ids=tuple(range(12))))
    sampler.check(SamplingParams(logit_bias=((0, -100.0), (11, 100.0)), logprobs=12))
    sampler.check(SamplingParams(), bad_word_ids=[(token,) for token in range(11)])
    sampler.check(SamplingParams(min_tokens=1), bad_word_ids=[(11, token) for token in range(11)])


def test_bad_words_that_could_leave_no_token_are_refused(sampler: Sampler) -> None:
    with pytest.raises(InvalidRequest) as refused:
        sampler.check(SamplingParams(), bad_word_ids=[(3, token) for token in range(12)])
    assert str(refused.value) == "every token ends one of the bad_words; leave some of them out"
    others = [(token,) for token in range(12) if token not in EOS]
    sampler.check(SamplingParams(), others)
    with pytest.raises(InvalidRequest) as refused:
        sampler.check(SamplingParams(min_tokens=2), others)
    assert str(refused.value) == (
        "every token ends one of the bad_words, or stops the reply before min_tokens 2; "
        "leave some of them out"
    )
