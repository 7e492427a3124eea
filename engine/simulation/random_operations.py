"""Whatever may happen to conversations, at random and in any order, on an engine that is too small for them.

Clients open, say, append, rewind, fork, read slowly, cancel and go away; conversations leave memory and come
back; copies fail or are slow; the log refuses turns; the process dies at any moment and goes on from the
log.  Every reply must equal that of a fresh stateless run, no block may be lost or owned twice, and every
turn must come to an end.  A run is a function of its settings.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial

from engine.batch import StepPlan
from engine.cache.costs import CostTable
from engine.conversation import Conversation, Turn, TurnState
from engine.core import TokenEvent
from engine.errors import InvariantError
from engine.simulation.contents import EOS_IDS, VOCAB, ContentRunner, ContentTransfer, stateless_reply
from engine.simulation.simulated_engine import CoreSizes, SimulatedEngine, build_core
from engine.simulation.virtual_time import Agenda
from engine.types import ConversationId, FinishReason, SamplingParams, Tenant, TurnId

MAX_CONVERSATIONS = 7
MAX_CONTEXT = 60
COMPUTE_S = {4: 1.0, 16: 1.5, 64: 4.0}
LOAD_S = (0.2, 0.9, 1.4)  # drawn: loading is the cheaper way nearly always, mostly, or for late blocks
SYSTEM = (5, 6, 7, 8, 9, 10, 11, 12, 13)  # full blocks of 4 and one token, which conversations share
COMMON = ((5,), (5, 6, 7), (5, 6, 7, 8))  # so that conversations become equal
COUNTED = ("num_stored", "num_loaded", "num_failed_copies", "num_evicted")
REST_EVERY = 200
"""After so many operations nothing new happens until every turn has ended."""


class SimulationFailed(Exception):
    """Says what is wrong, and the command that shows it again."""


@dataclass(frozen=True, slots=True)
class OperationSettings:
    """Of one run; the names are those of the command line's options."""

    seed: int = 0
    operations: int = 1000
    policy: str = "retention"
    run_ahead: int = 0
    blocks: int = 11
    host_blocks: int = 6
    block_size: int = 4
    check_every: int = 1  # steps between two checks of all of the cache's books

    @property
    def command(self) -> str:
        options = [f"--{field.name.replace('_', '-')} {getattr(self, field.name)}" for field in fields(self)]
        return "python -m tools.simulate " + " ".join(options)


@dataclass(eq=False, slots=True)
class _Flight:
    """A turn between its beginning and its place in the log."""

    turn: Turn
    before: list[int]  # the history
    start: list[int]  # what the reply follows, prompt included
    is_over: bool = False  # and on its way to the log


@dataclass(eq=False, slots=True)
class _Chat:
    id: ConversationId
    tenant: Tenant
    log: list[int]  # its tokens there
    live: Conversation | None = None  # None: not in memory
    flight: _Flight | None = None


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


class RandomOperations:
    """All public methods raise SimulationFailed.  `counts` says how often each operation was done, and what
    the engine counted.
    """

    def __init__(self, settings: OperationSettings) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self._rng = random.Random(repr(settings))
        rng, size = self._rng, settings.block_size
        self._costs = CostTable(COMPUTE_S, rng.choice(LOAD_S))
        self._sizes = CoreSizes(
            settings.blocks,
            settings.host_blocks,
            size,
            settings.policy,
            max_step_tokens=rng.choice((5, 7, 16, 40)),
            max_concurrent=rng.choice((2, 3, 5)),
            run_ahead=settings.run_ahead,
        )
        self._context = min((settings.blocks - 1) * size, MAX_CONTEXT)
        self._haste = rng.choice((0.3, 0.7, 1.5))  # operations in a second, which is about a step
        self._agenda = Agenda()
        self._chats: list[_Chat] = []
        self._refuses = 0  # of the next turns, by the log
        self._num_names = self.num_operations = 0
        self._operations, self._weights = zip(*self.choices(), strict=True)
        self._start()

    def run(self) -> None:
        self.operate(self.settings.operations)
        self.close()

    def operate(self, operations: int) -> None:
        """So many operations, and then a rest."""
        with self._telling_how_to_show_it():
            for number in range(1, operations + 1):
                self._operate()
                self.num_operations += 1
                self._agenda.run_until(self._agenda.now + self._rng.expovariate(self._haste))
                if number % REST_EVERY == 0 or number == operations:
                    self._rest()

    def close(self) -> None:
        """Every conversation leaves memory, and all slots of both tiers are free."""
        with self._telling_how_to_show_it():
            while (chat := self._in_memory()) is not None:
                self._core.forget(self._live(chat))
                chat.live = None
            self._core.manager.check()
            statistics = self._core.manager.statistics()
            free = (statistics.num_free, statistics.num_host_free)
            if free != (self.settings.blocks, self.settings.host_blocks):
                raise InvariantError(f"nobody is there, and {free} slots of device and host are free")
            self._add_up()

    @contextmanager
    def _telling_how_to_show_it(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise SimulationFailed(
                f"after {self.num_operations} operations: {error!r}\n"
                f"to show it again: {self.settings.command}"
            ) from error

    def _rest(self) -> None:
        """Let every turn come to its end, and see that nothing is held any more."""
        for chat in self._chats:
            if chat.flight is not None:
                chat.flight.turn.paused = False
        self._engine.wake()
        for _ in range(5_000):
            if not self._agenda.happen():
                break
        if stuck := [chat.id for chat in self._chats if chat.flight is not None]:
            raise InvariantError(f"the turns of {stuck} never end")
        manager = self._core.manager
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
        self._transfer = ContentTransfer(runner, sizes.num_host_blocks, rng)
        self._timeline = _TimesAtRandom(rng)
        self._core = build_core(
            sizes, self._costs, runner, self._transfer, self._agenda, EOS_IDS, self._context
        )
        self._engine = SimulatedEngine(
            self._core,
            self._timeline,
            self._agenda,
            sizes.run_ahead,
            self._on_step,
            lambda: rng.random() < 0.5,
        )

    def _crash(self) -> bool:
        """All KV, all conversations in memory and all turns that are not in the log are gone."""
        self._add_up()
        self._engine.crash()
        for chat in self._chats:
            self._cut_short(chat.flight is not None)
            chat.live = chat.flight = None
        self._start()
        return True

    def _add_up(self) -> None:
        """What the engine has counted since it was started."""
        statistics = self._core.manager.statistics()
        for name in COUNTED:
            self.counts[name] += getattr(statistics, name)
        self.counts["num_steps"] += self._engine.num_steps

    def _cut_short(self, by: int) -> None:
        self.counts["num_cut_short"] += by

    def _on_step(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            chat = next(c for c in self._chats if c.flight is not None and c.flight.turn is event.turn)
            if event.finish_reason is not None:
                self._conclude(chat)
            elif self._rng.random() < 0.02:  # a stop string was found
                self._end(chat, FinishReason.STOP_STRING, keep=True)
        self.counts["num_suspended"] += sum(
            chat.flight is not None
            and chat.flight.turn.state is TurnState.WAITING
            and chat.flight.turn.num_generated > 0
            for chat in self._chats
        )
        if self._engine.num_steps % self.settings.check_every == 0:
            self._core.manager.check()

    # -- turns

    def _begin(self, chat: _Chat, first: int, prompt: Sequence[int], sampling: SamplingParams) -> None:
        live = self._live(chat)
        before = list(live.tokens)
        turn = self._core.begin(live, TurnId("t"), prompt, sampling, seed=0, first_token=first)
        chat.flight = _Flight(turn, before, [*before[:first], *prompt])
        self._engine.wake()

    def _end(self, chat: _Chat, reason: FinishReason, keep: bool) -> None:
        """End the turn in flight now.  Of one that would replace others and has said nothing, nothing is
        kept.
        """
        flight = chat.flight
        assert flight is not None and chat.live is not None
        self._cut_short(reason is FinishReason.CANCELLED)
        num_said = flight.turn.num_generated
        keep = keep and bool(num_said or flight.turn.first_token == len(flight.before))
        self._core.finish(flight.turn, reason, num_said if keep else None)
        if keep:
            self._conclude(chat)
            return
        self._expect(chat.live, flight.before, "a discarded turn")
        chat.flight = None
        self._engine.wake()

    def _conclude(self, chat: _Chat) -> None:
        """The reply is complete: compare it, and commit it a little later."""
        flight, live = chat.flight, chat.live
        assert flight is not None and live is not None
        turn = flight.turn
        expected = stateless_reply(flight.start, turn.max_new)
        cut_short = turn.finish_reason in (FinishReason.CANCELLED, FinishReason.STOP_STRING)
        if turn.reply_ids != (expected[: turn.num_generated] if cut_short else expected):
            raise InvariantError(f"{chat.id} replied {turn.reply_ids}, a stateless run {expected}")
        self._expect(live, [*flight.start, *turn.reply_ids], "a turn")
        flight.is_over = True
        self.counts["num_compared"] += 1
        self._agenda.after(self._rng.expovariate(2.0), partial(self._commit, chat, flight))

    def _commit(self, chat: _Chat, flight: _Flight) -> None:
        if chat.flight is not flight or chat.live is None:
            return  # the process died before the log had it
        if self._refuses:
            self._refuses -= 1
            self._core.take_back(flight.turn)
            self._expect(chat.live, flight.before, "a turn that was taken back")
        else:
            self._core.confirm(flight.turn)
            chat.log = list(chat.live.tokens)
        chat.flight = None
        self._engine.wake()

    def _expect(self, live: Conversation, tokens: list[int], after: str) -> None:
        if list(live.tokens) != tokens or live.num_committed != len(tokens):
            raise InvariantError(
                f"after {after} {live.id} holds {list(live.tokens)}, {live.num_committed} of them committed, "
                f"not {tokens}"
            )

    # -- operations: each says whether it could be done now

    def choices(self) -> list[tuple[Callable[[], bool], float]]:
        """What may happen, and how likely it is."""
        return [
            (self._open, 6),
            (self._say, 30),
            (self._say_again, 6),
            (self._append, 6),
            (self._cancel, 7),
            (self._disconnect, 5),
            (self._read_slowly, 4),
            (self._read_on, 4),
            (self._rewind, 5),
            (self._fork, 4),
            (self._forget, 5),
            (self._delete, 4),
            (self._drop, 1),
            (self._fail_copies, 2),
            (self._slow_copies, 2),
            (self._refuse_commits, 2),
            (self._crash, 0.5),
        ]

    def _operate(self) -> None:
        while True:
            (operation,) = self._rng.choices(self._operations, self._weights)
            if operation():
                self.counts[operation.__name__.strip("_").replace("_", " ")] += 1
                return

    def _open(self) -> bool:
        if len(self._chats) == MAX_CONVERSATIONS:
            return False
        history = [*(SYSTEM if self._rng.random() < 0.6 else ()), *self._tokens()]
        self._add(Tenant(self._rng.choice("aab")), history[: self._context])
        return True

    def _say(self) -> bool:
        chat = self._idle()
        if chat is None or len(chat.log) + 2 > self._context:
            return False
        self._begin(chat, len(chat.log), self._tokens(self._context - len(chat.log) - 1), self._sampling())
        return True

    def _say_again(self) -> bool:
        """From somewhere in the history on: the same or another prompt."""
        chat = self._idle()
        if chat is None or not chat.log:
            return False
        first = self._somewhere(min(len(chat.log), self._context - 1))
        prompt = self._tokens(self._context - first - 1)
        if self._rng.random() < 0.5:
            prompt = chat.log[first : first + len(prompt)]
        self._begin(chat, first, prompt, self._sampling())
        return True

    def _append(self) -> bool:
        chat = self._idle()
        if chat is None or len(chat.log) == self._context:
            return False
        live = self._live(chat)
        prompt = self._tokens(self._context - len(chat.log))
        turn = self._core.append(live, TurnId("t"), prompt)
        self._core.compute_when_idle(live)
        chat.flight = _Flight(turn, list(chat.log), [*chat.log, *prompt], is_over=True)
        self._expect(live, chat.flight.start, "an append")
        self._agenda.after(self._rng.expovariate(2.0), partial(self._commit, chat, chat.flight))
        self._engine.wake()
        return True

    def _cancel(self) -> bool:
        chat = self._speaking()
        if chat is None:
            return False
        self._end(chat, FinishReason.CANCELLED, keep=self._rng.random() < 0.5)
        return True

    def _disconnect(self) -> bool:
        """The reader goes away; the turn ends if nobody has come back when its time of grace is over."""
        chat = self._speaking()
        if chat is None:
            return False
        flight = chat.flight
        assert flight is not None
        flight.turn.paused = False

        def if_still_speaking() -> None:
            if chat.flight is flight and not flight.is_over:
                self._end(chat, FinishReason.CANCELLED, keep=True)

        self._agenda.after(self._rng.expovariate(0.3), if_still_speaking)
        self._engine.wake()
        return True

    def _read_slowly(self) -> bool:
        chat = self._speaking()
        if chat is None or chat.flight is None:
            return False
        chat.flight.turn.paused = True
        return True

    def _read_on(self) -> bool:
        chat = self._speaking()
        if chat is None or chat.flight is None or not chat.flight.turn.paused:
            return False
        chat.flight.turn.paused = False
        self._engine.wake()
        return True

    def _rewind(self) -> bool:
        """To a point of the history, or to what stood there before a later turn replaced it."""
        chat = self._idle()
        if chat is None or not chat.log:
            return False
        kept = chat.log[: self._somewhere(len(chat.log))]
        if self._rng.random() < 0.3:
            kept = [*kept, *self._tokens()][: self._context]
        live = self._live(chat)
        self._core.rewind(live, kept)
        self._expect(live, kept, "a rewind")
        chat.log = kept
        self._engine.wake()
        return True

    def _fork(self) -> bool:
        if not self._chats or len(self._chats) == MAX_CONVERSATIONS:
            return False
        parent = self._rng.choice(self._chats)
        self._add(parent.tenant, parent.log[: self._rng.randint(0, len(parent.log))])
        return True

    def _forget(self) -> bool:
        """An idle conversation leaves memory; it comes back when it is needed."""
        chat = self._idle()
        if chat is None or chat.live is None:
            return False
        self._core.forget(chat.live)
        chat.live = None
        return True

    def _delete(self) -> bool:
        chat = self._rng.choice(self._chats) if len(self._chats) > 3 else None
        if chat is None or (chat.flight is not None and chat.flight.is_over):
            return False
        if chat.flight is not None:
            self._end(chat, FinishReason.CANCELLED, keep=False)
        if chat.live is not None:
            self._core.forget(chat.live)
        self._chats.remove(chat)
        return True

    def _drop(self) -> bool:
        """Give up an idle conversation's KV."""
        chat = self._idle()
        if chat is None or chat.live is None:
            return False
        self._core.manager.drop(chat.live.table)
        return True

    def _fail_copies(self) -> bool:
        self._transfer.num_to_fail = self._rng.randint(1, 3)
        return True

    def _slow_copies(self) -> bool:
        self._timeline.num_slow = self._rng.randint(1, 4)
        return True

    def _refuse_commits(self) -> bool:
        self._refuses = 1
        return True

    # -- private

    def _add(self, tenant: Tenant, log: list[int]) -> None:
        self._num_names += 1
        chat = _Chat(ConversationId(f"c{self._num_names}"), tenant, log)
        self._chats.append(chat)
        if self._rng.random() < 0.8:
            self._live(chat)

    def _live(self, chat: _Chat) -> Conversation:
        if chat.live is None:
            chat.live = self._core.new_conversation(chat.id, chat.tenant, chat.log)
        return chat.live

    def _in_memory(self) -> _Chat | None:
        return next((chat for chat in self._chats if chat.live is not None), None)

    def _idle(self) -> _Chat | None:
        return self._some(chat for chat in self._chats if chat.flight is None)

    def _speaking(self) -> _Chat | None:
        return self._some(chat for chat in self._chats if chat.flight is not None and not chat.flight.is_over)

    def _some(self, chats: Iterable[_Chat]) -> _Chat | None:
        listed = list(chats)
        return self._rng.choice(listed) if listed else None

    def _tokens(self, at_most: int = 9) -> list[int]:
        rng = self._rng
        if rng.random() < 0.4:
            return list(rng.choice(COMMON))[:at_most]
        return [rng.randrange(VOCAB) for _ in range(rng.randint(1, min(9, at_most)))]

    def _somewhere(self, num_tokens: int) -> int:
        """In a history of so many, often close to its end, where its last block is."""
        rng = self._rng
        return rng.randrange(max(0, num_tokens - 4) if rng.random() < 0.5 else 0, num_tokens)

    def _sampling(self) -> SamplingParams:
        """Penalties do not change what this model says, but the scheduler must wait for tokens."""
        penalty = 1.0 if self._rng.random() < 0.15 else 0.0
        return SamplingParams(max_tokens=self._rng.randint(1, 14), presence_penalty=penalty)
