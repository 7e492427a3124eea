"""Whatever may happen to conversations, at random and in any order, on an engine that is too small for them.

Clients open, say, append, rewind, fork, read slowly, cancel and go away; conversations leave memory and come
back; copies fail or are slow; the log refuses turns; the process dies at any moment and goes on from the
log.  A run is a function of its settings.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from engine.cache.costs import CostTable
from engine.simulation.checked_server import Chat, CheckedServer
from engine.simulation.contents import VOCAB
from engine.simulation.simulated_engine import CoreSizes
from engine.step_budget import Pacing
from engine.types import ConversationId, FinishReason, SamplingParams, Tenant

MAX_CONVERSATIONS = 7
MAX_CONTEXT = 60
COMPUTE_S = {4: 1.0, 16: 1.5, 64: 4.0}
LOAD_S = (0.2, 0.9, 1.4)  # drawn: loading is the cheaper way nearly always, mostly, or for late blocks
SYSTEM = (5, 6, 7, 8, 9, 10, 11, 12, 13)  # full blocks of 4 and one token, which conversations share
COMMON = ((5,), (5, 6, 7), (5, 6, 7, 8))  # so that conversations become equal
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


class RandomOperations:
    """All public methods raise SimulationFailed.  `counts` says how often each operation was done, and what
    the engine counted.
    """

    def __init__(self, settings: OperationSettings) -> None:
        self.settings = settings
        self.num_operations = 0
        rng, size = random.Random(repr(settings)), settings.block_size
        costs = CostTable(COMPUTE_S, rng.choice(LOAD_S))
        sizes = CoreSizes(
            settings.blocks,
            settings.host_blocks,
            size,
            settings.policy,
            max_step_tokens=rng.choice((5, 7, 16, 40)),
            max_concurrent=rng.choice((2, 3, 5)),
            run_ahead=settings.run_ahead,
            pacing=rng.choice((None, Pacing(1.5, 1), Pacing(3.0, 4))),
        )
        self._haste = rng.choice((0.3, 0.7, 1.5))  # operations in a second, which is about a step
        context_tokens = min((settings.blocks - 1) * size, MAX_CONTEXT)
        self._server = CheckedServer(sizes, costs, context_tokens, rng, settings.check_every)
        self._rng = rng
        self._num_names = 0
        self._operations, self._weights = zip(*self.choices(), strict=True)

    @property
    def counts(self) -> Counter[str]:
        return self._server.counts

    def run(self) -> None:
        self.operate(self.settings.operations)
        self.close()

    def operate(self, operations: int) -> None:
        """So many operations, and then a rest."""
        with self._telling_how_to_show_it():
            for number in range(1, operations + 1):
                self._operate()
                self.num_operations += 1
                self._server.agenda.run_until(self._server.agenda.now + self._rng.expovariate(self._haste))
                if number % REST_EVERY == 0 or number == operations:
                    self._server.rest()

    def close(self) -> None:
        """Every conversation leaves memory, and all slots of both tiers are free."""
        with self._telling_how_to_show_it():
            self._server.close()

    @contextmanager
    def _telling_how_to_show_it(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise SimulationFailed(
                f"after {self.num_operations} operations: {error!r}\n"
                f"to show it again: {self.settings.command}"
            ) from error

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
        if len(self._server.chats) == MAX_CONVERSATIONS:
            return False
        history = [*(SYSTEM if self._rng.random() < 0.6 else ()), *self._tokens()]
        self._add(Tenant(self._rng.choice("aab")), history[: self._server.context_tokens])
        return True

    def _say(self) -> bool:
        chat = self._idle()
        if chat is None or len(chat.log) + 2 > self._server.context_tokens:
            return False
        self._server.begin(
            chat,
            len(chat.log),
            self._tokens(self._server.context_tokens - len(chat.log) - 1),
            self._sampling(),
        )
        return True

    def _say_again(self) -> bool:
        """From somewhere in the history on: the same or another prompt."""
        chat = self._idle()
        if chat is None or not chat.log:
            return False
        first = self._somewhere(min(len(chat.log), self._server.context_tokens - 1))
        prompt = self._tokens(self._server.context_tokens - first - 1)
        if self._rng.random() < 0.5:
            prompt = chat.log[first : first + len(prompt)]
        self._server.begin(chat, first, prompt, self._sampling())
        return True

    def _append(self) -> bool:
        chat = self._idle()
        if chat is None or len(chat.log) == self._server.context_tokens:
            return False
        self._server.append(chat, self._tokens(self._server.context_tokens - len(chat.log)))
        return True

    def _cancel(self) -> bool:
        chat = self._speaking()
        if chat is None:
            return False
        self._server.end(chat, FinishReason.CANCELLED, keep=self._rng.random() < 0.5)
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
                self._server.end(chat, FinishReason.CANCELLED, keep=True)

        self._server.agenda.after(self._rng.expovariate(0.3), if_still_speaking)
        self._server.engine.wake()
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
        self._server.engine.wake()
        return True

    def _rewind(self) -> bool:
        """To a point of the history, or to what stood there before a later turn replaced it."""
        chat = self._idle()
        if chat is None or not chat.log:
            return False
        kept = chat.log[: self._somewhere(len(chat.log))]
        if self._rng.random() < 0.3:
            kept = [*kept, *self._tokens()][: self._server.context_tokens]
        live = self._server.live(chat)
        self._server.core.rewind(live, kept)
        self._server.expect(live, kept, "a rewind")
        chat.log = kept
        self._server.engine.wake()
        return True

    def _fork(self) -> bool:
        if not self._server.chats or len(self._server.chats) == MAX_CONVERSATIONS:
            return False
        parent = self._rng.choice(self._server.chats)
        self._add(parent.tenant, parent.log[: self._rng.randint(0, len(parent.log))])
        return True

    def _forget(self) -> bool:
        """An idle conversation leaves memory; it comes back when it is needed."""
        chat = self._idle()
        if chat is None or chat.live is None:
            return False
        self._server.core.forget(chat.live)
        chat.live = None
        return True

    def _delete(self) -> bool:
        chat = self._rng.choice(self._server.chats) if len(self._server.chats) > 3 else None
        if chat is None or (chat.flight is not None and chat.flight.is_over):
            return False
        if chat.flight is not None:
            self._server.end(chat, FinishReason.CANCELLED, keep=False)
        if chat.live is not None:
            self._server.core.forget(chat.live)
        self._server.chats.remove(chat)
        return True

    def _drop(self) -> bool:
        """Give up an idle conversation's KV."""
        chat = self._idle()
        if chat is None or chat.live is None:
            return False
        self._server.core.manager.drop(chat.live.table)
        return True

    def _fail_copies(self) -> bool:
        self._server.transfer.num_to_fail = self._rng.randint(1, 3)
        return True

    def _slow_copies(self) -> bool:
        self._server.timeline.num_slow = self._rng.randint(1, 4)
        return True

    def _crash(self) -> bool:
        """The process dies, and another goes on from the log."""
        self._server.crash()
        return True

    def _refuse_commits(self) -> bool:
        self._server.refuses = 1
        return True

    # -- private

    def _add(self, tenant: Tenant, log: list[int]) -> None:
        self._num_names += 1
        chat = Chat(ConversationId(f"c{self._num_names}"), tenant, log)
        self._server.chats.append(chat)
        if self._rng.random() < 0.8:
            self._server.live(chat)

    def _idle(self) -> Chat | None:
        return self._some(chat for chat in self._server.chats if chat.flight is None)

    def _speaking(self) -> Chat | None:
        return self._some(
            chat for chat in self._server.chats if chat.flight is not None and not chat.flight.is_over
        )

    def _some(self, chats: Iterable[Chat]) -> Chat | None:
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
