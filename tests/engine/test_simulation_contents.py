"""The model of the simulated engine: what it says depends on all KV it attends to, and on nothing else."""

import random

import numpy as np
import pytest

from engine.batch import RowParams, Segment, StepPlan
from engine.cache.block import BlockMove
from engine.errors import InvariantError
from engine.simulation.contents import ContentRunner, ContentTransfer, stateless_reply
from engine.types import SamplingParams

SIZE = 4
HISTORY = list(range(100, 111))
SLOTS = (5, 2, 7, 0)  # of 16 tokens


def runner(seed: int = 0) -> ContentRunner:
    return ContentRunner(8, SIZE, random.Random(seed))


def segment(first: int, ids: list[int] | None, row: int = 1, *, draws: bool = False) -> Segment:
    end = first + (1 if ids is None else len(ids))
    draw = RowParams(SamplingParams(), 0, end, 0) if draws else None
    return Segment(row, first, None if ids is None else tuple(ids), SLOTS[: -(-end // SIZE)], draw)


def step(model: ContentRunner, *segments: Segment) -> dict[int, int]:
    return model.run(StepPlan(1, segments)).sampled


def replied(model: ContentRunner, num_tokens: int) -> list[int]:
    """The next tokens of a history that is known but for its last token."""
    reply = [step(model, segment(10, HISTORY[10:], draws=True))[1]]
    while len(reply) < num_tokens:
        reply.append(step(model, segment(10 + len(reply), None, draws=True))[1])
    return reply


@pytest.mark.parametrize("cuts", [(), (4,), (3, 7), (1, 2, 3, 4, 5, 6, 7, 8, 9)])
def test_a_reply_is_the_same_however_its_history_is_cut_into_segments(cuts: tuple[int, ...]) -> None:
    ends = [*cuts, 10]
    parts = [segment(first, HISTORY[first:end]) for first, end in zip([0, *cuts], ends, strict=True)]
    together, one_by_one = runner(1), runner(2)
    step(together, *parts)
    for part in parts:
        step(one_by_one, part)
    assert replied(together, 5) == replied(one_by_one, 5) == stateless_reply(HISTORY, 5)[:5]


def test_a_reply_depends_on_every_word_of_kv() -> None:
    model = runner()
    step(model, segment(0, HISTORY[:10]))
    kept, expected = model.kv.copy(), replied(model, 3)
    for layer in (0, 1):
        for position in range(10):
            model.kv[:] = kept
            model.kv[layer, SLOTS[position // SIZE] * SIZE + position % SIZE] ^= np.uint64(1)
            assert replied(model, 3) != expected, f"{layer=} {position=}"


def test_a_reply_depends_on_the_order_of_its_history() -> None:
    history = HISTORY.copy()
    history[2], history[3] = history[3], history[2]
    assert stateless_reply(history, 3) != stateless_reply(HISTORY, 3)


def test_attending_to_a_hole_is_an_error() -> None:
    hole = Segment(1, 4, (1, 2), (5, -1), None)
    with pytest.raises(InvariantError, match="a block without KV"):
        step(runner(), hole)


def test_copies_bring_back_what_they_took_away_unless_they_fail() -> None:
    model = runner()
    step(model, segment(0, HISTORY[:10]))
    expected = replied(model, 3)
    transfer = ContentTransfer(model, 4, random.Random(0))
    away = [BlockMove(slot, i) for i, slot in enumerate(SLOTS[:3])]
    assert transfer.store(away) == frozenset()
    kept = model.kv.copy()
    model.kv[:] = 0
    assert transfer.load(away).finish() == frozenset()
    assert replied(model, 3) == expected
    transfer.num_to_fail = 2
    model.kv[:] = kept
    failed = transfer.load(away).finish()
    assert len(failed) == 2 and transfer.num_to_fail == 0
    assert replied(model, 3) != expected
