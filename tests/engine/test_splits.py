"""Equality over every split of a history: each of its blocks dropped, on the host or on the device when a new
turn comes, with KV that was really moved.  The reply's tokens are those of a fresh run over the same history,
and its logprobs the same within noise.
"""

from collections import deque
from collections.abc import Sequence
from itertools import product

import pytest
import torch

from engine.cache.block import NO_SLOT, Residency
from engine.cache.eviction import Candidate
from engine.conversation import Conversation, Turn, TurnState
from engine.core import TokenEvent
from engine.models.decoder import Decoder
from engine.scheduler import Step
from engine.types import SamplingParams, TokenLogprobs, TurnId
from tests.engine.tiny_model import BLOCK_SIZE, Engine

PROMPT = [(n * n * 7 + n) % 300 for n in range(4 * BLOCK_SIZE + 4)]
NUM_REPLIED = 4  # KV of all but the last: four full blocks and 7 tokens
NEW, NEW_TO_FORK = [11, 250, 3], [90, 4]
NUM_NEW = 6
SAMPLING = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, logprobs=5)
PLACES = {"d": Residency.DROPPED, "h": Residency.HOST, "g": Residency.DEVICE, "b": Residency.BOTH}

SOME = "ggggg hhhhh ddddd bbbbb dhgdh ddhhg hgdhg gdgdg hdhdh gghhd dgggg ggggh hhddg dbhgb".split()
EVERY = ["".join(split) for split in product("dhg", repeat=5)]

Said = list[tuple[int, TokenLogprobs]]


class History:
    """A conversation of four and a half blocks, on tiers that have room for it twice."""

    def __init__(self, decoder: Decoder, split: str, run_ahead: int, pipelined: bool) -> None:
        budget = (24, 200)[split.count("d") % 2]  # tokens a step: holes in pieces, or at once
        self.engine = Engine(decoder, 24, budget, num_host_blocks=24, pipelined=pipelined)
        self.split, self.run_ahead = split, run_ahead
        self.launched: deque[Step] = deque()
        self.said: dict[Turn, Said] = {}
        self.num_computed = 0  # positions
        self.was_suspended = False
        self.conversation = self.engine.open(())
        self.run(self.begin(self.conversation, PROMPT, SamplingParams(max_tokens=NUM_REPLIED)))
        self.num_held = len(self.conversation.tokens) - 1
        assert self.num_held == 4 * BLOCK_SIZE + 7

    def begin(
        self, conversation: Conversation, prompt: Sequence[int], sampling: SamplingParams = SAMPLING
    ) -> Turn:
        turn = self.engine.core.begin(conversation, TurnId("t"), prompt, sampling, seed=0)
        self.said[turn] = []
        return turn

    def put(self, split: str) -> None:
        """Bring every block of the conversation to its place; what no block holds is poisoned."""
        manager, table = self.engine.manager, self.conversation.table
        tiers = manager.tiers
        for place, block in zip(split, table.blocks.tolist(), strict=False):
            if place in "hb":
                now, leaves = self.engine.clock.now, place == "h"
                assert tiers._begin_store(Candidate(1e9, block, table.row, 0), now, leaves)
        self.settle()
        for place, block in zip(split, table.blocks.tolist(), strict=False):
            if place == "d":
                tiers.free(block)
            elif place == "g":
                tiers._free_host_slot(block)
        manager.check()
        assert manager.residency(table)[: len(split)] == [PLACES[place] for place in split]
        self.poison()

    def poison(self) -> None:
        blocks, store, host = self.engine.manager.blocks, self.engine.store, self.engine.host
        for slots, poison in (
            (blocks.slot, lambda free: store.slab[:, free].fill_(torch.nan)),
            (blocks.host_slot, lambda free: host.slab[free].fill_(torch.nan)),
        ):
            owned = set(slots[slots != NO_SLOT].tolist())
            for free in set(range(24)) - owned:
                poison(free)

    def settle(self) -> None:
        """Steps until none can be planned: copies, here."""
        while self.step():
            pass

    def step(self, plans: bool = True) -> bool:
        core = self.engine.core
        self.engine.clock.now += 1.0
        while plans and len(self.launched) <= self.run_ahead and (step := core.plan()) is not None:
            self.launched.append(step)
        if not self.launched:
            return False
        step = self.launched.popleft()
        self.num_computed += step.plan.num_tokens
        for event in core.apply(step, core.execute(step)):
            self.note(event)
        self.engine.manager.check()
        return True

    def note(self, event: TokenEvent) -> None:
        if event.logprobs is not None:
            self.said[event.turn].append((event.token_id, event.logprobs))

    def run(self, *turns: Turn) -> None:
        while any(turn.state is not TurnState.FINISHED for turn in turns):
            assert self.step(), "a turn waits and nothing is planned"

    def suspend(self, turn: Turn) -> None:
        """In the middle of its reply, with whatever was launched meanwhile; then its blocks part again."""
        while turn.num_generated < NUM_NEW // 2:
            self.step()
        self.engine.core.scheduler._suspend(turn, self.engine.clock.now)
        self.was_suspended = True
        while self.launched:
            self.step(plans=False)
        assert turn.state is TurnState.WAITING and turn.num_generated < NUM_NEW
        turn.paused = True  # or the next step would take it up again
        self.put(self.split[::-1])
        turn.paused = False


def fresh(decoder: Decoder, history: Sequence[int]) -> Said:
    """What a fresh engine with room for everything says, having computed the history at once."""
    engine = Engine(decoder, 24, max_step_tokens=len(history))
    turn = engine.core.begin(engine.open(()), TurnId("t"), history, SAMPLING, 0)
    said: Said = []
    while turn.state is not TurnState.FINISHED:
        for event in engine.core.step() or ():
            assert event.logprobs is not None
            said.append((event.token_id, event.logprobs))
    return said


def assert_equal(said: Said, expected: Said, split: str) -> None:
    assert [id for id, _ in said] == [id for id, _ in expected], split
    assert len(said) == NUM_NEW
    for (_, found), (_, wanted) in zip(said, expected, strict=True):
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-4), split
        assert [value for _, value in found.top] == pytest.approx(
            [value for _, value in wanted.top], abs=1e-4
        ), split


def check_splits(splits: Sequence[str], decoder: Decoder, how: str, run_ahead: int, pipelined: bool) -> None:
    expected: dict[str, Said] = {}
    for split in splits:
        history = History(decoder, split, run_ahead, pipelined)
        tokens = list(history.conversation.tokens)
        if not expected:
            expected = {"": fresh(decoder, [*tokens, *NEW]), "fork": fresh(decoder, [*tokens, *NEW_TO_FORK])}
        history.put(split)
        history.num_computed = 0
        if how == "forked first":
            fork = history.engine.open(tokens)
            turns = [history.begin(fork, NEW_TO_FORK), history.begin(history.conversation, NEW)]
            history.run(*turns)
            assert_equal(history.said[turns[0]], expected["fork"], split)
        else:
            turns = [history.begin(history.conversation, NEW)]
            if how == "suspended in the middle":
                history.suspend(turns[0])
            history.run(*turns)
        assert_equal(history.said[turns[-1]], expected[""], split)
        check_usage(turns, history, split)
        statistics = history.engine.manager.statistics()
        times = 2 if how == "suspended in the middle" else 1
        assert statistics.num_loaded >= times * split.count("h") and not statistics.num_failed_copies


def check_usage(turns: Sequence[Turn], history: History, split: str) -> None:
    """Every token was found where its block was."""
    lengths = [BLOCK_SIZE] * 4 + [history.num_held - 4 * BLOCK_SIZE]
    held = {place: sum(n for at, n in zip(split, lengths, strict=True) if at == place) for place in PLACES}
    usage = turns[-1].usage
    assert usage is not None
    if len(turns) == 1:  # else the fork has brought back what they share
        found = (usage.cached_device_tokens, usage.cached_host_tokens, usage.recomputed_tokens)
        assert found == (held["g"] + held["b"], held["h"], held["d"]), split
        num_new = 1 + len(NEW) + NUM_NEW - 1  # the reply before, the prompt, and all of the reply but its end
        if not history.was_suspended:
            assert history.num_computed == held["d"] + num_new, split


HOW = pytest.mark.parametrize("how", ["run to the end", "suspended in the middle", "forked first"])
RUN_AHEAD = pytest.mark.parametrize("run_ahead", [0, 1])
PIPELINED = pytest.mark.parametrize("pipelined", [True, False], ids=["pipelined", "verified"])


@HOW
@RUN_AHEAD
@PIPELINED
def test_some_splits_of_a_history_are_answered_as_by_a_fresh_run(
    decoder: Decoder, how: str, run_ahead: int, pipelined: bool
) -> None:
    check_splits(SOME, decoder, how, run_ahead, pipelined)


@pytest.mark.heavy
@HOW
@RUN_AHEAD
@PIPELINED
def test_every_split_of_a_history_is_answered_as_by_a_fresh_run(
    decoder: Decoder, how: str, run_ahead: int, pipelined: bool
) -> None:
    check_splits(EVERY, decoder, how, run_ahead, pipelined)


def test_one_block_that_changed_on_the_host_is_noticed(decoder: Decoder) -> None:
    history = History(decoder, "hhggd", run_ahead=0, pipelined=True)
    expected = fresh(decoder, [*history.conversation.tokens, *NEW])
    history.put("hhggd")
    host_slot = history.engine.manager.blocks.host_slot[history.conversation.table[1]]
    history.engine.host.slab[host_slot] *= -1
    turn = history.begin(history.conversation, NEW)
    history.run(turn)
    with pytest.raises(AssertionError):
        assert_equal(history.said[turn], expected, "hhggd")
