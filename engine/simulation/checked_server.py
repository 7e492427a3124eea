"""An engine that is far too small, its conversations and their log: whatever clients do there is checked.

Every reply must equal that of a fresh stateless run over the same history, histories must be what was said,
no block may be lost or owned twice, every turn must come to an end, and nothing is held when nothing runs.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from engine.batch import StepPlan
from engine.cache.costs import CostTable
from engine.conversation import Conversation, Turn, TurnState
from engine.core import TokenEvent
from engine.errors import InvariantError
from engine.simulation.contents import EOS_IDS, ContentRunner, ContentTransfer, stateless_reply
from engine.simulation.simulated_engine import CoreSizes, SimulatedEngine, build_core
from engine.simulation.virtual_time import Agenda
from engine.types import ConversationId, FinishReason, SamplingParams, Tenant, TurnId

COUNTED = ("num_stored", "num_loaded", "num_failed_copies", "num_evicted")


@dataclass(eq=False, slots=True)
class Flight:
    """A turn between its beginning and its place in the log."""

    turn: Turn
    before: list[int]  # the history
    start: list[int]  # what the reply follows, prompt included
    is_over: bool = False  # and on its way to the log


@dataclass(eq=False, slots=True)
class Chat:
    id: ConversationId
    tenant: Tenant
    log: list[int]  # its tokens there
    live: Conversation | None = None  # None: not in memory
    flight: Flight | None = None


class _TimesAtRandom:
    """Steps take a second or so; now and then one with copies takes far longer."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._free_at = 0.0
        self.num_slow = 0  # of the next steps that copy

    def launch(self, plan: StepPlan, now: float) -> float:
        seconds = self._rng.uniform(0.3, 1.7)
        if self.num_slow and (plan.stores or plan.loads):
            self.num_slow -= 1
            seconds += self._rng.expovariate(0.1)
        self._free_at = max(self._free_at, now) + seconds
        return self._free_at


class CheckedServer:
    """Raises InvariantError wherever something is wrong.  `refuses` says how many of the next turns the log
    does not take.
    """

    def __init__(
        self,
        sizes: CoreSizes,
        costs: CostTable,
        context_tokens: int,
        rng: random.Random,
        check_every: int,
    ) -> None:
        """`check_every`: steps between two checks of the cache's books."""
        self.counts: Counter[str] = Counter()
        self.agenda = Agenda()
        self.chats: list[Chat] = []
        self.context_tokens = context_tokens
        self.refuses = 0
        self._rng, self._sizes, self._costs, self._check_every = rng, sizes, costs, check_every
        self._start()

    def live(self, chat: Chat) -> Conversation:
        """The conversation, brought back to memory if need be."""
        if chat.live is None:
            chat.live = self.core.new_conversation(chat.id, chat.tenant, chat.log)
        return chat.live

    def close(self) -> None:
        """Every conversation leaves memory, and all slots of both tiers are free.  No turn is in flight."""
        for chat in self.chats:
            if chat.live is not None:
                self.core.forget(chat.live)
                chat.live = None
        self.core.manager.check()
        statistics = self.core.manager.statistics()
        free = (statistics.num_free, statistics.num_host_free)
        if free != (self._sizes.num_blocks, self._sizes.num_host_blocks):
            raise InvariantError(f"nobody is there, and {free} slots of device and host are free")
        self._add_up()

    def rest(self) -> None:
        """Let every turn come to its end, and see that nothing is held any more."""
        for chat in self.chats:
            if chat.flight is not None:
                chat.flight.turn.paused = False
        self.engine.wake()
        for _ in range(5_000):
            if not self.agenda.happen():
                break
        if stuck := [chat.id for chat in self.chats if chat.flight is not None]:
            raise InvariantError(f"the turns of {stuck} never end")
        manager = self.core.manager
        manager.check()
        if manager.num_available != manager.pool.num_slots:
            raise InvariantError(
                f"nothing runs, and only {manager.num_available} of {manager.pool.num_slots} slots are "
                "free or can be made free"
            )

    # -- the engine's life

    def _start(self) -> None:
        rng = self._rng
        sizes = replace(self._sizes, pipelined=rng.random() < 0.7)
        runner = ContentRunner(sizes.num_blocks, sizes.block_size, rng)
        self.transfer = ContentTransfer(runner, sizes.num_host_blocks, rng)
        self.timeline = _TimesAtRandom(rng)
        self.core = build_core(
            sizes, self._costs, runner, self.transfer, self.agenda, EOS_IDS, self.context_tokens
        )
        self.engine = SimulatedEngine(
            self.core,
            self.timeline,
            self.agenda,
            sizes.run_ahead,
            self._on_step,
            lambda: rng.random() < 0.5,
        )

    def crash(self) -> None:
        """All KV, all conversations in memory and all turns that are not in the log are gone."""
        self._add_up()
        self.engine.crash()
        for chat in self.chats:
            self._cut_short(chat.flight is not None)
            chat.live = chat.flight = None
        self._start()

    def _add_up(self) -> None:
        """What the engine has counted since it was started."""
        statistics = self.core.manager.statistics()
        for name in COUNTED:
            self.counts[name] += getattr(statistics, name)
        self.counts["num_steps"] += self.engine.num_steps

    def _cut_short(self, by: int) -> None:
        self.counts["num_cut_short"] += by

    def _on_step(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            chat = next(c for c in self.chats if c.flight is not None and c.flight.turn is event.turn)
            if event.finish_reason is not None:
                self._conclude(chat)
            elif self._rng.random() < 0.02:  # a stop string was found
                self.end(chat, FinishReason.STOP_STRING, keep=True)
        self.counts["num_suspended"] += sum(
            chat.flight is not None
            and chat.flight.turn.state is TurnState.WAITING
            and chat.flight.turn.num_generated > 0
            for chat in self.chats
        )
        if self.engine.num_steps % self._check_every == 0:
            self.core.manager.check()

    # -- turns

    def begin(self, chat: Chat, first: int, prompt: Sequence[int], sampling: SamplingParams) -> None:
        live = self.live(chat)
        before = list(live.tokens)
        turn = self.core.begin(live, TurnId("t"), prompt, sampling, seed=0, first_token=first)
        chat.flight = Flight(turn, before, [*before[:first], *prompt])
        self.engine.wake()

    def append(self, chat: Chat, prompt: list[int]) -> None:
        """What is told without asking for a reply, and computed when nothing else is to be done."""
        live = self.live(chat)
        before = list(live.tokens)
        turn = self.core.append(live, TurnId("t"), prompt)
        self.core.compute_when_idle(live)
        chat.flight = Flight(turn, before, [*before, *prompt])
        self.expect(live, chat.flight.start, "an append")
        self._commit_later(chat, chat.flight)
        self.engine.wake()

    def end(self, chat: Chat, reason: FinishReason, keep: bool) -> None:
        """End the turn in flight now.  Of one that would replace others and has said nothing, nothing is
        kept.
        """
        flight = chat.flight
        assert flight is not None and chat.live is not None
        self._cut_short(reason is FinishReason.CANCELLED)
        num_said = flight.turn.num_generated
        keep = keep and bool(num_said or flight.turn.first_token == len(flight.before))
        self.core.finish(flight.turn, reason, num_said if keep else None)
        if keep:
            self._conclude(chat)
            return
        self.expect(chat.live, flight.before, "a discarded turn")
        chat.flight = None
        self.engine.wake()

    def _conclude(self, chat: Chat) -> None:
        """The reply is complete: compare it, and commit it a little later."""
        flight, live = chat.flight, chat.live
        assert flight is not None and live is not None
        turn = flight.turn
        expected = stateless_reply(flight.start, turn.max_new)
        cut_short = turn.finish_reason in (FinishReason.CANCELLED, FinishReason.STOP_STRING)
        if turn.reply_ids != (expected[: turn.num_generated] if cut_short else expected):
            raise InvariantError(f"{chat.id} replied {turn.reply_ids}, a stateless run {expected}")
        self.expect(live, [*flight.start, *turn.reply_ids], "a turn")
        self.counts["num_compared"] += 1
        self._commit_later(chat, flight)

    def _commit_later(self, chat: Chat, flight: Flight) -> None:
        flight.is_over = True
        self.agenda.after(self._rng.expovariate(2.0), partial(self._commit, chat, flight))

    def _commit(self, chat: Chat, flight: Flight) -> None:
        if chat.flight is not flight or chat.live is None:
            return  # the process died before the log had it
        if self.refuses:
            self.refuses -= 1
            self.core.take_back(flight.turn)
            self.expect(chat.live, flight.before, "a turn that was taken back")
        else:
            self.core.confirm(flight.turn)
            chat.log = list(chat.live.tokens)
        chat.flight = None
        self.engine.wake()

    def expect(self, live: Conversation, tokens: list[int], after: str) -> None:
        if list(live.tokens) != tokens or live.num_committed != len(tokens):
            raise InvariantError(
                f"after {after} {live.id} holds {list(live.tokens)}, {live.num_committed} of them committed, "
                f"not {tokens}"
            )
