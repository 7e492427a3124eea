"""Random histories with tiny pools: whatever happens to the cache, replies equal those of a fresh stateless
run.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.cache.block_pool import BlockPool
from engine.cache.manager import KVCacheManager
from engine.cache.policy import lru
from engine.conversation import Conversation, Turn, TurnState
from engine.core import EngineCore
from engine.errors import ContextOverflow
from engine.scheduler import Scheduler, Step
from engine.types import ConversationId, FinishReason, SamplingParams, Tenant, TurnId
from tests.fakes import EOS, VOCAB, FakeClock, FakeRunner, stateless_reply

NUM_SLOTS, BLOCK_SIZE, CONTEXT = 11, 4, 40
SYSTEM = [5, 6, 7, 8, 9, 10, 11, 12, 13]  # two full blocks and one token, which conversations share
ANY = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9)
TOKENS = ANY | st.sampled_from(
    [[5], [5, 6, 7], [5, 6, 7, 8]]
)  # few of them, so that conversations become equal


class Histories(RuleBasedStateMachine):
    """Open, turn, pause, cancel, discard, leave memory, come back: steps run with or without one step of
    run-ahead.
    """

    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.runner = FakeRunner(NUM_SLOTS, BLOCK_SIZE)
        self.manager = KVCacheManager(BlockPool(NUM_SLOTS), BLOCK_SIZE, lru)
        self.core = EngineCore(
            self.manager, Scheduler(self.manager, 7, 3), self.runner, self.clock, frozenset({EOS}), CONTEXT
        )
        self.conversations: list[Conversation] = []
        self.launched: deque[Step] = deque()
        self.started: dict[Turn, list[int]] = {}  # history at the turn's beginning, prompt included

    def some(self, data: st.DataObject) -> Conversation:
        return data.draw(st.sampled_from(self.conversations))

    @rule(shares=st.booleans(), tenant=st.sampled_from(["a", "b"]), tokens=TOKENS)
    def open(self, shares: bool, tenant: str, tokens: list[int]) -> None:
        history = SYSTEM + tokens if shares else tokens
        if len(self.conversations) < 5:
            name = ConversationId(f"c{len(self.conversations)}")
            self.conversations.append(self.core.new_conversation(name, Tenant(tenant), history))

    @precondition(lambda self: self.conversations)
    @rule(data=st.data(), prompt=TOKENS, num_new=st.integers(1, 20))
    def turn(self, data: st.DataObject, prompt: list[int], num_new: int) -> None:
        conversation = self.some(data)
        if conversation.turn is not None:
            return
        history = [*conversation.tokens, *prompt]
        try:
            turn = self.core.begin(
                conversation, TurnId("t"), prompt, SamplingParams(max_tokens=num_new), seed=0
            )
        except ContextOverflow:
            assert len(history) + 1 > CONTEXT
            assert list(conversation.tokens) == history[: -len(prompt)]
        else:
            self.started[turn] = history

    @rule()
    def run_dry(self) -> None:
        for _ in range(30):
            self.step(1)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.clock.now += 1.0
            while len(self.launched) <= self.depth and (step := self.core.plan()) is not None:
                self.launched.append(step)
            if self.launched:
                self.apply_one()

    def apply_one(self) -> None:
        step = self.launched.popleft()
        for event in self.core.apply(step, self.core.execute(step)):
            if event.finish_reason is not None:
                self.expect_stateless_equal(event.turn)

    def expect_stateless_equal(self, turn: Turn) -> None:
        expected = stateless_reply(self.started[turn], turn.max_new)
        assert turn.reply_ids == expected[: turn.num_generated]
        if turn.finish_reason is not FinishReason.CANCELLED:
            assert turn.num_generated == len(expected)
        assert list(turn.conversation.tokens) == self.started[turn] + turn.reply_ids

    @precondition(lambda self: any(c.turn for c in self.conversations))
    @rule(data=st.data(), paused=st.booleans())
    def pause_or_go_on(self, data: st.DataObject, paused: bool) -> None:
        turn = data.draw(st.sampled_from([c for c in self.conversations if c.turn])).turn
        assert turn is not None
        turn.paused = paused

    @precondition(lambda self: any(c.turn for c in self.conversations))
    @rule(data=st.data(), keep=st.booleans())
    def cancel(self, data: st.DataObject, keep: bool) -> None:
        conversation = data.draw(st.sampled_from([c for c in self.conversations if c.turn]))
        turn, committed = conversation.turn, conversation.num_committed
        assert turn is not None
        self.core.finish(turn, FinishReason.CANCELLED, turn.num_generated if keep else None)
        if keep:
            self.expect_stateless_equal(turn)
        else:
            assert list(conversation.tokens) == self.started[turn][:committed]

    @precondition(
        lambda self: len(self.conversations) > 3 and any(c.turn is None for c in self.conversations)
    )
    @rule(data=st.data(), come_back=st.booleans())
    def leave_memory(self, data: st.DataObject, come_back: bool) -> None:
        conversation = data.draw(st.sampled_from([c for c in self.conversations if c.turn is None]))
        self.core.forget(conversation)
        self.conversations.remove(conversation)
        if come_back:
            self.conversations.append(
                self.core.new_conversation(conversation.id, conversation.tenant, conversation.tokens)
            )

    @invariant()
    def blocks_owned_are_blocks_accounted(self) -> None:
        self.manager.check()

    @invariant()
    def idle_conversations_own_nothing_unevictable(self) -> None:
        for conversation in self.conversations:
            if conversation.turn is None or conversation.turn.state is TurnState.WAITING:
                for block in conversation.table.blocks:
                    assert block.num_active or block.num_pins or block.evictable or block.slot == -1

    def teardown(self) -> None:
        """Every turn comes to an end: no deadlock, whatever was suspended or evicted.  Those whose readers
        are slow keep nobody waiting."""
        self.end_turns(lambda turn: not turn.paused)
        for conversation in self.conversations:
            if conversation.turn is not None:
                conversation.turn.paused = False
        self.end_turns(lambda turn: True)

    def end_turns(self, concerned: Callable[[Turn], bool]) -> None:
        for _ in range(2_000):
            if not self.launched and not any(c.turn and concerned(c.turn) for c in self.conversations):
                return
            self.step(1)
            self.manager.check()
        pytest.fail(f"turns never end: {[c.turn for c in self.conversations]}")


class HistoriesAheadByOne(Histories):
    depth = 1


class OverwrittenBlock(Histories):
    """One KV entry that some later turn must read is overwritten behind the manager's back."""

    @precondition(
        lambda self: any(c.turn is None and self.manager.num_cached(c.table, 99) for c in self.conversations)
    )
    @rule(data=st.data())
    def overwrite(self, data: st.DataObject) -> None:
        cached = [c for c in self.conversations if c.turn is None and self.manager.num_cached(c.table, 99)]
        for block in data.draw(st.sampled_from(cached)).table.blocks:
            if block.num_valid:
                self.runner.kv[block.slot, 0] ^= 1
                return


def run(machine: Any, examples: int, derandomize: bool = True) -> None:
    phases = (Phase.explicit, Phase.generate) if machine is OverwrittenBlock else tuple(Phase)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=60,
            deadline=None,
            derandomize=derandomize,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("machine", [Histories, HistoriesAheadByOne])
def test_replies_equal_a_stateless_run_whatever_happens_to_the_cache(machine: type[Histories]) -> None:
    run(machine, examples=120)


@pytest.mark.heavy
@pytest.mark.parametrize("machine", [Histories, HistoriesAheadByOne])
def test_replies_equal_a_stateless_run_over_many_random_histories(machine: type[Histories]) -> None:
    run(machine, examples=2_000, derandomize=False)


def test_one_overwritten_block_is_noticed() -> None:
    with pytest.raises(AssertionError):
        run(OverwrittenBlock, examples=200)
