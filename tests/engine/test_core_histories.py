"""Random histories with tiny pools: whatever happens to the cache, replies equal those of a fresh stateless
run.
"""

from collections import Counter, deque
from collections.abc import Callable
from typing import Any, ClassVar

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
from engine.cache.costs import CostTable
from engine.cache.eviction import Way, may_go
from engine.cache.manager import KVCacheManager
from engine.cache.policy import lru, lru_tail, retention
from engine.conversation import Conversation, Turn, TurnState
from engine.core import EngineCore
from engine.errors import ContextOverflow
from engine.scheduler import Scheduler, Step
from engine.types import ConversationId, FinishReason, RunState, SamplingParams, Tenant, TurnId, Usage
from tests.engine.harness import check_sums
from tests.fakes import EOS, POISON, VOCAB, FakeClock, FakeRunner, FakeTransfer, stateless_reply

BLOCK_SIZE = 4
COSTS = CostTable({4: 1.0, 16: 1.5, 64: 4.0}, load_s=0.4)
SYSTEM = [5, 6, 7, 8, 9, 10, 11, 12, 13]  # two full blocks and one token, which conversations share
ANY = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9)
TOKENS = ANY | st.sampled_from(
    [[5], [5, 6, 7], [5, 6, 7, 8]]
)  # few of them, so that conversations become equal


class Histories(RuleBasedStateMachine):
    """Open, turn, append, regenerate, rewind, fork, pause, cancel, discard, commits that fail, leave memory,
    come back: steps run with or without one step of run-ahead.
    """

    depth = 0
    num_slots, num_host_slots = 11, 0
    context = 40
    policy = lru
    pipelined = True
    window: int | None = None
    seen: ClassVar[Counter[str]] = Counter()  # over all histories

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.runner = FakeRunner(self.num_slots, BLOCK_SIZE, window=self.window)
        self.transfer = FakeTransfer(self.runner, self.num_host_slots)
        host = BlockPool(self.num_host_slots)
        self.manager = KVCacheManager(
            BlockPool(self.num_slots),
            BLOCK_SIZE,
            self.policy,
            host,
            COSTS,
            pipelined=self.pipelined,
            window=self.window,
        )
        self.core = EngineCore(
            self.manager,
            Scheduler(self.manager, 7, 3),
            self.runner,
            self.clock,
            frozenset({EOS}),
            self.context,
            self.transfer,
        )
        self.conversations: list[Conversation] = []
        self.launched: deque[Step] = deque()
        self.before: dict[Turn, list[int]] = {}  # history before the turn
        self.started: dict[Turn, list[int]] = {}  # history at the turn's beginning, prompt included
        self.commits = True  # False: the log will refuse the next turn that ends
        self.runs: dict[Turn, bool] = {}  # as its states tell
        self.core.scheduler.on_state = self.state_changed

    def state_changed(self, turn: Turn, state: RunState, found: Usage | None) -> None:
        assert self.runs.get(turn, False) is not (state is RunState.RUNNING), "the same was told twice"
        assert turn.paused is (state is RunState.PAUSED)
        self.runs[turn] = state is RunState.RUNNING
        assert (found is not None) is self.runs[turn]
        if found is not None:
            check_sums(found)
            self.seen["unseen_tokens"] += found.unseen_tokens
            assert found.prompt_tokens == len(turn.conversation.tokens)
        self.seen[state.name] += 1

    def num_kept(self, conversation: Conversation, num_tokens: int) -> int:
        """Of the first tokens, on either tier."""
        table = conversation.table
        return self.manager.held.num_cached(table, num_tokens) + self.manager.held.num_reloadable(
            table, num_tokens
        )

    def some(self, data: st.DataObject) -> Conversation:
        return data.draw(st.sampled_from(self.conversations))

    @rule(shares=st.booleans(), tenant=st.sampled_from(["a", "b"]), tokens=TOKENS)
    def open(self, shares: bool, tenant: str, tokens: list[int]) -> None:
        history = SYSTEM + tokens if shares else tokens
        if len(self.conversations) < 5:
            name = ConversationId(f"c{len(self.conversations)}")
            self.conversations.append(self.core.new_conversation(name, Tenant(tenant), history))

    @precondition(lambda self: self.conversations)
    @rule(data=st.data(), prompt=TOKENS, num_new=st.integers(1, 20), again=st.booleans(), knows=st.booleans())
    def turn(self, data: st.DataObject, prompt: list[int], num_new: int, again: bool, knows: bool) -> None:
        """A turn at the end of the history, or before it; one that repeats what stands there, or another."""
        conversation = self.some(data)
        if conversation.turn is not None:
            return
        before = list(conversation.tokens)
        first = data.draw(st.integers(0, len(before))) if again else len(before)
        if again and first < len(before) and data.draw(st.booleans()):
            prompt = before[first : first + len(prompt)]
        penalty = 1.0 if knows else 0.0  # the fake model does not care; the scheduler must wait for tokens
        sampling = SamplingParams(max_tokens=num_new, presence_penalty=penalty)
        try:
            turn = self.core.begin(conversation, TurnId("t"), prompt, sampling, seed=0, first_token=first)
        except ContextOverflow:
            assert first + len(prompt) + 1 > self.context
            assert list(conversation.tokens) == before
        else:
            self.before[turn], self.started[turn] = before, before[:first] + prompt

    @precondition(lambda self: self.conversations)
    @rule(data=st.data(), prompt=TOKENS, again=st.booleans(), commits=st.booleans())
    def append(self, data: st.DataObject, prompt: list[int], again: bool, commits: bool) -> None:
        conversation = self.some(data)
        if conversation.turn is not None:
            return
        before = list(conversation.tokens)
        first = data.draw(st.integers(0, len(before))) if again else len(before)
        try:
            turn = self.core.append(conversation, TurnId("t"), prompt, first_token=first)
        except ContextOverflow:
            assert first + len(prompt) > self.context
        else:
            assert list(conversation.tokens) == before[:first] + prompt
            self.core.compute_when_idle(conversation)
            self.before[turn], self.commits = before, commits
            self.commit(turn)

    @precondition(lambda self: any(c.turn is None for c in self.conversations))
    @rule(data=st.data(), brings_back=st.booleans(), tokens=TOKENS)
    def rewind(self, data: st.DataObject, brings_back: bool, tokens: list[int]) -> None:
        """To a point of the history, or to one that a later turn had replaced the end of."""
        conversation = data.draw(st.sampled_from([c for c in self.conversations if c.turn is None]))
        kept = conversation.tokens[: data.draw(st.integers(0, len(conversation.tokens)))]
        num_cached = self.num_kept(conversation, len(kept))
        if brings_back and len(kept) + len(tokens) <= self.context:
            kept.extend(tokens)
        self.core.rewind(conversation, kept)
        assert conversation.tokens == kept and conversation.num_committed == len(kept)
        assert conversation.computed.num_tokens <= len(kept)
        lost = num_cached - self.num_kept(conversation, len(kept))
        assert lost < BLOCK_SIZE, "more KV was given up than the last block's"

    @precondition(lambda self: self.conversations and len(self.conversations) < 5)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self.some(data)
        at = data.draw(st.integers(0, parent.num_committed))
        slots, num_free = self.manager.slots(parent.table, at), self.manager.pool.num_free
        fork = self.core.new_conversation(ConversationId("fork"), parent.tenant, parent.tokens[:at])
        full = at // BLOCK_SIZE
        shared = self.manager.slots(fork.table, at)[:full]
        assert shared.tolist() == slots[:full].tolist(), "a full block is not shared"
        assert self.manager.pool.num_free == num_free, "KV was copied"
        self.conversations.append(fork)

    @rule()
    def run_dry(self) -> None:
        for _ in range(30):
            self.step(1)

    @rule(times=st.integers(1, 6), commits=st.booleans())
    def step(self, times: int, commits: bool = True) -> None:
        self.commits = commits
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
                assert event.turn.usage is not None
                check_sums(event.turn.usage)
                self.commit(event.turn)

    def commit(self, turn: Turn) -> None:
        if self.commits:
            self.core.confirm(turn)
        else:
            self.core.take_back(turn)
            assert list(turn.conversation.tokens) == self.before[turn]
        self.commits = True

    def expect_stateless_equal(self, turn: Turn) -> None:
        expected = stateless_reply(self.started[turn], turn.max_new, window=self.window)
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
        turn = conversation.turn
        assert turn is not None
        self.core.finish(turn, FinishReason.CANCELLED, turn.num_generated if keep else None)
        if keep:
            self.expect_stateless_equal(turn)
            self.commit(turn)
        else:
            assert list(conversation.tokens) == self.before[turn]

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
    def no_history_counts_more_computed_than_known(self) -> None:
        for conversation in self.conversations:
            assert 0 <= conversation.computed.num_tokens <= len(conversation.tokens)
            assert conversation.table.num_tokens == len(conversation.tokens)

    @invariant()
    def idle_conversations_own_nothing_unevictable(self) -> None:
        for conversation in self.conversations:
            if conversation.turn is None or conversation.turn.state is TurnState.WAITING:
                blocks, ids = self.manager.blocks, conversation.table.blocks
                others = (blocks.num_active[ids] > 0) | (
                    blocks.last_step[ids] > self.manager.tiers.idle.settled
                )
                assert (
                    others | may_go(blocks, ids, Way.OFF_DEVICE, 1 << 60) | (blocks.slot[ids] == -1)
                ).all()

    def teardown(self) -> None:
        self.end_all_turns()
        statistics = self.manager.statistics()
        for what in ("num_stored", "num_loaded", "num_failed_copies", "num_evicted"):
            self.seen[what] += getattr(statistics, what)

    def end_all_turns(self) -> None:
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


class HistoriesOnTwoTiers(Histories):
    """Blocks leave for the host, come back, or are dropped from there; copies fail."""

    num_slots, num_host_slots = 6, 5
    context = 20
    policy = retention(COSTS)

    @rule()
    def fail_a_copy(self) -> None:
        self.transfer.num_to_fail = 1

    @rule(token=st.integers(1, VOCAB - 1))
    def come_back_one_after_the_other(self, token: int) -> None:
        for conversation in self.conversations:
            if conversation.turn is None and len(conversation.tokens) < self.context - 2:
                before = list(conversation.tokens)
                sampling = SamplingParams(max_tokens=2)
                turn = self.core.begin(conversation, TurnId("t"), [token], sampling, seed=0)
                self.before[turn], self.started[turn] = before, [*before, token]
                self.run_dry()


class HistoriesOnTwoTiersAheadByOne(HistoriesOnTwoTiers):
    depth = 1


class HistoriesWithoutPipelining(HistoriesOnTwoTiersAheadByOne):
    pipelined = False


class HistoriesOnABigHost(HistoriesOnTwoTiers):
    num_host_slots = 30
    policy = lru


class HistoriesEvictedFromTheTail(HistoriesOnTwoTiersAheadByOne):
    policy = lru_tail


class HistoriesThroughAWindow(HistoriesOnTwoTiersAheadByOne):
    """What lies before the window of what is computed stays dropped."""

    window = 5
    context = 24
    num_slots, num_host_slots = 7, 3


class HistoriesThroughAWindowWithoutHost(HistoriesThroughAWindow):
    num_host_slots = 0
    policy = lru


class HistoriesThroughAWindowWithoutPipelining(HistoriesThroughAWindow):
    pipelined = False
    window = 6


class OverwrittenHostBlock(HistoriesOnABigHost):
    """The same in the host tier."""

    @precondition(lambda self: (self.transfer.kv != POISON).any())
    @rule(data=st.data())
    def overwrite(self, data: st.DataObject) -> None:
        self.transfer.kv[self.transfer.kv != POISON] ^= 1


class OverwrittenBlock(Histories):
    """One KV entry that some later turn must read is overwritten behind the manager's back."""

    @precondition(
        lambda self: any(
            c.turn is None and self.manager.held.num_cached(c.table, 99) for c in self.conversations
        )
    )
    @rule(data=st.data())
    def overwrite(self, data: st.DataObject) -> None:
        cached = [
            c for c in self.conversations if c.turn is None and self.manager.held.num_cached(c.table, 99)
        ]
        blocks = self.manager.blocks
        for block in data.draw(st.sampled_from(cached)).table.blocks:
            if blocks.num_valid[block]:
                self.runner.kv[blocks.slot[block], 0] ^= 1
                return


def run(machine: Any, examples: int, derandomize: bool = True) -> None:
    phases = (Phase.explicit, Phase.generate) if "Overwritten" in machine.__name__ else tuple(Phase)
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


MACHINES = [
    Histories,
    HistoriesAheadByOne,
    HistoriesOnTwoTiers,
    HistoriesOnTwoTiersAheadByOne,
    HistoriesWithoutPipelining,
    HistoriesOnABigHost,
    HistoriesEvictedFromTheTail,
    HistoriesThroughAWindow,
    HistoriesThroughAWindowWithoutHost,
    HistoriesThroughAWindowWithoutPipelining,
]


@pytest.mark.parametrize("machine", MACHINES)
def test_replies_equal_a_stateless_run_whatever_happens_to_the_cache(machine: type[Histories]) -> None:
    machine.seen.clear()
    run(machine, examples=100)
    assert (machine.seen["unseen_tokens"] > 50) is (machine.window is not None)
    if machine.num_host_slots:
        assert machine.seen["num_stored"] > 100 and machine.seen["num_loaded"] > 30
        assert machine.seen["num_failed_copies"] > 20
    else:
        assert machine.seen["num_evicted"] > 20


@pytest.mark.heavy
@pytest.mark.parametrize("machine", MACHINES)
def test_replies_equal_a_stateless_run_over_many_random_histories(machine: type[Histories]) -> None:
    run(machine, examples=1_000, derandomize=False)


@pytest.mark.parametrize("machine", [OverwrittenBlock, OverwrittenHostBlock])
def test_one_overwritten_block_is_noticed(machine: type[Histories]) -> None:
    with pytest.raises(AssertionError):
        run(machine, examples=200)
