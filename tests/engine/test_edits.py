"""Penalties, biases, bad words and logprobs as a sampler applies them: against the definitions, one row and
one token at a time, and from one step to the next as a reply grows.
"""

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from engine.batch import RowParams, needs_history
from engine.edits import _Row
from engine.errors import InvariantError
from engine.sampler import Sampler
from engine.types import SamplingParams, TokenLogprobs

EOS = frozenset({0, 7})
VOCAB = 60
PENALTIES = SamplingParams(
    temperature=0.0, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.4, logprobs=20
)


@pytest.fixture
def sampler() -> Sampler:
    return Sampler(VOCAB, EOS)


def row(
    sampling: SamplingParams,
    history: Sequence[int] = (),
    num_prompt: int = 0,
    bad_word_ids: tuple[tuple[int, ...], ...] = (),
    seed: int = 1,
) -> RowParams:
    num_generated = len(history) - num_prompt
    tokens = array("i", history)
    return RowParams(sampling, seed, len(tokens), num_generated, tokens, num_prompt, bad_word_ids)


def edited_by_definition(logits: torch.Tensor, params: RowParams) -> list[float]:
    """logits [V], as the definitions read.  [V] in double precision"""
    sampling, history = params.sampling, list(params.history or ())
    reply = history[params.num_prompt :]
    values = logits.double().tolist()
    for token, bias in sampling.logit_bias or ():
        values[token] += bias
    for token in range(VOCAB):
        if token in history:
            penalty = sampling.repetition_penalty or 1.0
            values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
        values[token] -= (sampling.frequency_penalty or 0.0) * reply.count(token)
        values[token] -= (sampling.presence_penalty or 0.0) * (token in reply)
        if any((*reply, token)[-len(word) :] == word for word in params.bad_word_ids):
            values[token] = -math.inf
    if params.num_generated < (sampling.min_tokens or 0):
        for token in EOS:
            values[token] = -math.inf
    return values


def assert_is_what_the_definitions_say(found: TokenLogprobs, logits: torch.Tensor, params: RowParams) -> None:
    exact = torch.tensor(edited_by_definition(logits, params), dtype=torch.float64).log_softmax(-1)
    likeliest = sorted(range(VOCAB), key=lambda token: (-exact[token].item(), token))
    num = params.sampling.logprobs or 0
    expected = [token for token in likeliest[:num] if exact[token] > -math.inf]
    assert [token for token, _ in found.top] == expected
    assert [value for _, value in found.top] == pytest.approx(exact[expected].tolist(), abs=1e-5)
    assert found.logprob == pytest.approx(exact[found.token_id].item(), abs=1e-5)
    if not params.sampling.temperature:
        assert found.token_id == expected[0]


def some_rows(chance: random.Random) -> list[RowParams]:
    """Each has another set of features."""
    rows = []
    for _ in range(24):
        sampling = replace(
            SamplingParams(temperature=chance.choice([0.0, 0.7]), logprobs=chance.choice([1, 5, 20])),
            presence_penalty=chance.choice([None, 0.0, 0.8, -0.5]),
            frequency_penalty=chance.choice([None, 0.4, -0.2]),
            repetition_penalty=chance.choice([None, 1.0, 1.5, 0.7]),
            logit_bias=tuple((token, chance.uniform(-9, 9)) for token in chance.sample(range(VOCAB), 5)),
            min_tokens=chance.choice([None, 40]),
            bad_words=chance.choice([None, ("a", "b")]),
        )
        history = chance.choices(range(VOCAB), k=chance.randrange(50))
        words = (tuple(history[-2:]) + (5,), (9,), (8, 4), (history[-1] if history else 3, 11))
        num_prompt = chance.randrange(len(history) + 1)
        rows.append(
            row(sampling, history, num_prompt, words if sampling.bad_words else (), chance.randrange(9))
        )
    return rows


def test_any_mix_of_rows_is_edited_as_the_definitions_say(sampler: Sampler) -> None:
    rows = some_rows(random.Random(5))
    logits = 4 * torch.randn(len(rows), VOCAB)
    sampled, logprobs = sampler.sample(logits.clone(), dict(enumerate(rows)))
    for n, params in enumerate(rows):
        assert_is_what_the_definitions_say(logprobs[n], logits[n], params)
        assert logprobs[n].token_id == sampled[n]


def test_a_row_has_the_same_bits_alone_in_a_batch_and_after_a_restart(sampler: Sampler) -> None:
    """Alone is also after a restart: that sampler has seen no step before."""
    rows = some_rows(random.Random(6))
    logits = 4 * torch.randn(len(rows), VOCAB)
    together = sampler.sample(logits.clone(), dict(enumerate(rows)))
    order = list(range(len(rows)))
    random.Random(7).shuffle(order)
    shuffled = sampler.sample(logits[order].clone(), {n: rows[n] for n in order})
    for n, params in enumerate(rows):
        alone = Sampler(VOCAB, EOS).sample(logits[n : n + 1].clone(), {n: params})
        assert alone[0][n] == together[0][n] == shuffled[0][n]
        assert alone[1][n] == together[1][n] == shuffled[1][n]


def test_counts_that_are_kept_equal_counts_made_anew_as_replies_grow(sampler: Sampler) -> None:
    """Rows come, grow by one token or by several, rest for a while, and give their names to others."""
    chance = random.Random(8)
    words = ((1, 2), (3,), (4, 5, 6))
    sampling = replace(PENALTIES, bad_words=("x",))
    histories: dict[int, tuple[int, list[int]]] = {}
    num_continued = 0
    for _ in range(120):
        for name in range(4):
            if name not in histories or chance.random() < 0.05:
                histories[name] = (chance.randrange(9), chance.choices(range(8), k=chance.randrange(9, 30)))
            elif chance.random() < 0.1:
                histories[name][1][chance.randrange(len(histories[name][1]))] ^= 1
        present = [name for name in range(4) if chance.random() < 0.7]
        params = {name: row(sampling, histories[name][1], histories[name][0], words) for name in present}
        logits = torch.randn(len(present), VOCAB)
        _, logprobs = sampler.sample(logits.clone(), params)
        for at, (name, p) in enumerate(params.items()):
            assert_is_what_the_definitions_say(logprobs[name], logits[at], p)
            histories[name][1].extend(chance.choices(range(8), k=chance.choice([0, 1, 1, 1, 3])))
            num_continued += 1
    assert num_continued > 200


def test_only_new_tokens_are_counted_and_absent_rows_are_forgotten(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    count = _Row.count

    def spy(self: _Row, history: "array[int]", tokens: bytes) -> None:
        counted.append(len(history) - len(self._tokens) // history.itemsize)
        count(self, history, tokens)

    monkeypatch.setattr(_Row, "count", spy)

    def step(length: int, name: int = 1) -> None:
        sampler.sample(torch.randn(1, VOCAB), {name: row(PENALTIES, [5] * length, 10)})

    for length in (20, 21, 25, 25):
        step(length)
    step(24)  # does not continue what was counted
    assert counted == [20, 1, 4, 0, 24]
    for _ in range(4):
        step(20, name=2)
    step(25)
    assert counted[-1] == 1
    for _ in range(20):
        step(20, name=2)
    assert len(sampler._edits._rows) == 1
    step(26)
    assert counted[-1] == 26


def test_edits_come_before_logprobs_and_these_before_temperature_and_filters(sampler: Sampler) -> None:
    logits = torch.zeros(1, VOCAB)
    sampling = SamplingParams(temperature=50.0, top_k=1, logit_bias=((9, 2.0), (8, 1.0)), logprobs=2)
    sampled, logprobs = sampler.sample(logits, {4: row(sampling)})
    total = math.log(58 + math.exp(2) + math.exp(1))
    assert sampled == {4: 9}
    assert logprobs[4].logprob == pytest.approx(2 - total)
    assert [token for token, _ in logprobs[4].top] == [9, 8]
    assert [value for _, value in logprobs[4].top] == pytest.approx([2 - total, 1 - total])


def test_a_bias_is_added_before_penalties_divide(sampler: Sampler) -> None:
    sampling = SamplingParams(temperature=0.0, logit_bias=((9, 4.0),), repetition_penalty=2.0, logprobs=1)
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 1.5
    sampled, _ = sampler.sample(logits, {0: row(sampling, [9], 1)})
    assert sampled == {0: 9}
    assert logits[0, 9] == 2.0


@pytest.mark.parametrize(
    ("sampling", "touched"),
    [
        (SamplingParams(presence_penalty=50.0), [4]),
        (SamplingParams(frequency_penalty=50.0), [4]),
        (SamplingParams(repetition_penalty=50.0), [4, 5]),
    ],
)
def test_tokens_of_the_prompt_count_for_the_repetition_penalty_alone(
    sampler: Sampler, sampling: SamplingParams, touched: list[int]
) -> None:
    logits = torch.ones(1, VOCAB)
    sampler.sample(logits, {0: row(sampling, [4, 5, 4], 2)})
    assert (logits[0] != 1).nonzero()[:, 0].tolist() == touched


def test_a_history_without_tokens_penalises_nothing(sampler: Sampler) -> None:
    logits = torch.randn(1, VOCAB)
    before = logits.clone()
    sampler.sample(logits, {0: row(PENALTIES)})
    assert torch.equal(logits, before)


def test_a_bad_word_is_stopped_at_its_last_token_and_only_within_the_reply(sampler: Sampler) -> None:
    words = ((3,), (4, 5), (6, 4, 9))
    sampling = SamplingParams(temperature=0.0, bad_words=("x",))

    def banned(history: list[int], num_prompt: int) -> list[int]:
        logits = torch.zeros(1, VOCAB)
        sampler.sample(logits, {0: row(sampling, history, num_prompt, words)})
        return (logits[0] == -math.inf).nonzero()[:, 0].tolist()

    assert banned([], 0) == [3]
    assert banned([6, 4], 2) == [3]
    assert banned([6, 4], 1) == [3, 5]
    assert banned([6, 4], 0) == [3, 5, 9]
    assert banned([6, 4, 1], 0) == [3]


def test_bad_words_are_those_of_transformers_where_all_is_reply(sampler: Sampler) -> None:
    transformers = pytest.importorskip("transformers")
    words = ((3,), (4, 5), (6, 4, 9), (4, 4, 4, 8))
    processor = transformers.NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None)
    chance = random.Random(9)
    num_completed = 0
    for _ in range(60):
        history = chance.choices((4, 4, 6), k=chance.randrange(1, 6))
        logits = torch.randn(1, VOCAB)
        expected = processor(torch.tensor([history]), logits.clone())
        params = row(SamplingParams(temperature=0.0, bad_words=("x",)), history, 0, words)
        sampler.sample(logits, {0: params})
        assert torch.equal(logits, expected)
        num_completed += int(torch.isinf(logits).sum()) > 2
    assert num_completed > 5


def test_a_bias_does_not_bring_back_what_min_tokens_holds_back(sampler: Sampler) -> None:
    sampling = SamplingParams(temperature=0.0, logit_bias=((0, 100.0), (7, 90.0), (5, 9.0)), min_tokens=1)
    assert sampler.sample(torch.zeros(1, VOCAB), {0: row(sampling)})[0] == {0: 5}
    assert sampler.sample(torch.zeros(1, VOCAB), {0: row(sampling, [5], 0)})[0] == {0: 0}


def test_logprobs_come_for_rows_that_ask_and_name_no_token_that_cannot_be_chosen(sampler: Sampler) -> None:
    sampling = SamplingParams(temperature=0.0)
    logits = torch.full((3, VOCAB), -math.inf)
    logits[:, [8, 12]] = torch.tensor([1.0, 1.0])
    rows = {
        5: row(replace(sampling, logprobs=0)),
        9: row(sampling),
        2: row(replace(sampling, logprobs=3)),
    }
    sampled, logprobs = sampler.sample(logits, rows)
    assert sampled == {5: 8, 9: 8, 2: 8}
    assert list(logprobs) == [5, 2]
    half = pytest.approx(-math.log(2))
    assert (logprobs[5].token_id, logprobs[5].logprob, logprobs[5].top) == (8, half, ())
    assert (logprobs[2].token_id, logprobs[2].logprob) == (8, half)
    assert logprobs[2].top == ((8, half), (12, half))


def test_rows_that_ask_for_nothing_keep_their_logits_beside_those_that_do(sampler: Sampler) -> None:
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    sampler.sample(logits, {0: row(PENALTIES, [4, 5, 6], 1), 1: row(SamplingParams(temperature=1.0))})
    assert torch.equal(logits[1], before[1])
    assert (logits[0] != before[0]).sum() == 3


def test_a_history_that_is_not_all_there_is_a_bug(sampler: Sampler) -> None:
    whole = row(PENALTIES, [4, 5, 6], 1)
    for history, known in ((None, 0), (array("i", [4, 5]), 2), (array("i", [4, 5, 6, 7]), 4)):
        with pytest.raises(
            InvariantError, match=f"{known} tokens are known where the one at 3 is to be chosen"
        ):
            sampler.sample(torch.zeros(1, VOCAB), {0: whole._replace(history=history)})


@pytest.mark.parametrize(
    ("sampling", "needs"),
    [
        (SamplingParams(), False),
        (SamplingParams(presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0), False),
        (SamplingParams(logit_bias=((3, 1.0),), logprobs=5, min_tokens=9), False),
        (SamplingParams(presence_penalty=-0.1), True),
        (SamplingParams(frequency_penalty=0.1), True),
        (SamplingParams(repetition_penalty=0.9), True),
        (SamplingParams(bad_words=("x",)), True),
    ],
)
def test_histories_are_needed_by_penalties_and_bad_words(sampling: SamplingParams, needs: bool) -> None:
    assert needs_history(sampling) is needs
