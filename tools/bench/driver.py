"""Holds the conversations of a population with a server, and notes when what came.

Time is that of a clock which is given: with that of a loop of virtual time, an hour is played in a moment.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from rpc._generated import continuo_pb2 as pb
from rpc.client import ContinuoError, Unavailable
from tools.bench.population import Member
from tools.bench.workload import Exchange, token_ids

FILLING = 4  # conversations whose histories are computed at once, before the clock starts
SAMPLE_S = 1.0
REFUSED_S = 1.0  # before the successor of a conversation that was refused


@dataclass(slots=True)
class TurnRecord:
    """One turn as the client saw it.  Times in seconds since the clock's start."""

    conversation: int
    turn: int
    due_s: float
    late_s: float = 0.0  # by how much the generator woke up after that
    sent_s: float = 0.0  # later than due where a conversation had to be opened or resumed first
    history_tokens: int = 0
    deltas: list[tuple[float, int]] = field(default_factory=list)  # when, and how many tokens; none is empty
    done_s: float | None = None
    failure: str = ""  # status and reason
    cancelled: bool = False
    resumed_s: float | None = None  # when the conversation was opened by its id for this turn
    cached_device_tokens: int = 0
    cached_host_tokens: int = 0
    recomputed_tokens: int = 0
    new_tokens: int = 0
    timing: pb.Timing = field(default_factory=pb.Timing)  # the server's

    @property
    def reply_tokens(self) -> int:
        return sum(count for _, count in self.deltas)


@dataclass(frozen=True, slots=True)
class Manner:
    """How a run goes, whatever is said."""

    seed: int
    warmup_s: float
    duration_s: float
    cancel_rate: float = 0.0  # share of turns that are cancelled midway
    resume_rate: float = 0.0  # share of turns before which the stream is closed and the conversation resumed


class Client(Protocol):
    """What is used of `rpc.client.ContinuoClient`."""

    @property
    def open(self) -> Callable[..., Awaitable[Any]]: ...
    async def resume(self, id: str) -> Any: ...
    async def load(self) -> pb.GetLoadResponse: ...


class People(Protocol):
    """What is used of a population."""

    def initial(self) -> list[Member]: ...
    def arrivals(self) -> Iterator[tuple[float, Member]]: ...
    def successor(self) -> Member | None: ...


@dataclass(slots=True)
class Sample:
    """The server once a second; counters since its start."""

    at_s: float
    live_tokens: int  # histories of all conversations that have not ended, by the client's count
    load: pb.GetLoadResponse


class Driver:
    """`fill`, then `run`; `records`, `samples` and `ids` grow meanwhile, and stand if the server is lost."""

    def __init__(
        self,
        client: Client,
        people: People,
        manner: Manner,
        vocabulary: int,
        clock: Callable[[], float] = time.perf_counter,  # a loop's own may have steps of a millisecond
    ) -> None:
        self.records: list[TurnRecord] = []
        self.samples: list[Sample] = []
        self.ids: list[str] = []
        self.live: dict[int, int] = {}  # number of a conversation -> tokens of its history
        self._client = client
        self._people = people
        self._manner = manner
        self._vocabulary = vocabulary
        self._clock = clock
        self._began_s = 0.0
        self._chats: dict[int, Any] = {}
        self._initial: list[Member] = []

    @property
    def now_s(self) -> float:
        """Since the clock's start."""
        return self._clock() - self._began_s

    async def fill(self, on_progress: Callable[[int, int], None]) -> None:
        """Opens the conversations that are there at the beginning, and has their histories computed."""
        self._initial = self._people.initial()
        waiting = iter(self._initial)
        num_filled = 0

        async def fill_some() -> None:
            nonlocal num_filled
            for member in waiting:
                self._chats[member.number] = await self._with_history(member)
                num_filled += 1
                on_progress(num_filled, len(self._initial))

        with _the_first_alone():
            async with asyncio.TaskGroup() as tasks:
                for _ in range(FILLING):
                    tasks.create_task(fill_some())

    async def run(self, can_sample: bool) -> None:
        """Until the measured time is over.  Raises Unavailable when the server is gone."""
        self._began_s = self._clock()
        all_s = self._manner.warmup_s + self._manner.duration_s
        with suppress(TimeoutError), _the_first_alone():
            async with asyncio.timeout(all_s), asyncio.TaskGroup() as tasks:
                for member in self._initial:
                    tasks.create_task(self._hold(member, member.due_s))
                tasks.create_task(self._receive(tasks))
                if can_sample:
                    tasks.create_task(self._sample())
                await asyncio.sleep(all_s)  # also if nobody comes

    async def _receive(self, tasks: asyncio.TaskGroup) -> None:
        for at_s, member in self._people.arrivals():
            await self._sleep_until(at_s)
            tasks.create_task(self._hold(member, at_s))

    async def _sample(self) -> None:
        number = 0
        while True:
            await self._sleep_until(number * SAMPLE_S)
            load = await self._client.load()
            self.samples.append(Sample(self.now_s, sum(self.live.values()), load))
            number += 1

    async def _hold(self, member: Member | None, due_s: float) -> None:
        """A conversation to its end; then, in a closed population, the next one."""
        while member is not None:
            is_served = await self._converse(member, due_s)
            member, due_s = self._people.successor(), self.now_s + (0.0 if is_served else REFUSED_S)

    async def _converse(self, member: Member, due_s: float) -> bool:
        """Whether its last turn was answered."""
        begun_s = due_s
        exchanges = member.script.exchanges
        chat = self._chats.pop(member.number, None)
        for turn in range(member.turn, len(exchanges)):
            if turn > member.turn:
                due_s = _due_s(exchanges[turn], begun_s, self.now_s)
            await self._sleep_until(due_s)
            draw = random.Random(f"turn {self._manner.seed} {member.number} {turn}")
            is_cancelled = draw.random() < self._manner.cancel_rate
            is_resumed = draw.random() < self._manner.resume_rate
            record = TurnRecord(member.number, turn, due_s, late_s=self.now_s - due_s)
            self.records.append(record)
            try:
                if chat is None:
                    chat = await self._open(member)
                elif is_resumed:
                    await chat.close()
                    record.resumed_s = self.now_s
                    chat = await self._client.resume(chat.id)
                await self._say(chat, member, turn, record, is_cancelled)
            except Unavailable:
                raise
            except ContinuoError as error:
                record.failure = f"{error.code.name} {error.reason}".strip()
            record.done_s = self.now_s
            if chat is None:
                return False
            self.live[member.number] = chat.committed_tokens
        await chat.close()  # it stays at the server: nobody says that he will not come back
        self.live.pop(member.number, None)
        return not record.failure

    async def _say(
        self, chat: Any, member: Member, turn: int, record: TurnRecord, is_cancelled: bool
    ) -> None:
        exchange = member.script.exchanges[turn]
        wanted = max(1, min(exchange.reply_tokens, chat.context_left - exchange.new_tokens))
        said = self._input(member, turn)
        received = 0
        record.sent_s = self.now_s
        reply = chat.say(**said, max_tokens=wanted)
        async for delta in reply:
            if not delta.token_ids:
                continue
            record.deltas.append((self.now_s, len(delta.token_ids)))
            received += len(delta.token_ids)
            if is_cancelled and not record.cancelled and 2 * received >= wanted:
                record.cancelled = True
                await chat.cancel()
        done = await reply
        usage: pb.Usage = done.usage
        record.history_tokens = usage.prompt_tokens - usage.new_tokens
        record.cached_device_tokens, record.cached_host_tokens = (
            usage.cached_device_tokens,
            usage.cached_host_tokens,
        )
        record.recomputed_tokens, record.new_tokens = usage.recomputed_tokens, usage.new_tokens
        record.timing = done.timing

    def _input(self, member: Member, turn: int) -> dict[str, Any]:
        exchange = member.script.exchanges[turn]
        if exchange.text:
            return {"text": exchange.text}
        return {"token_ids": self._ids(member, turn, exchange.new_tokens)}

    def _ids(self, member: Member, turn: int, count: int) -> list[int]:
        shared = min(member.script.shared_tokens, count) if turn == 0 else 0
        common = token_ids(self._manner.seed, 0, 0, shared, self._vocabulary)
        return common + token_ids(self._manner.seed, member.number, turn, count - shared, self._vocabulary)

    async def _open(self, member: Member, **history: Any) -> Any:
        chat = await self._client.open(ignore_eos=True, temperature=0.0, **history)
        self.ids.append(chat.id)
        return chat

    async def _with_history(self, member: Member) -> Any:
        """A conversation in the middle of its life: what was said before is known, and its KV computed."""
        before = member.script.exchanges[: member.turn]
        if not before:
            chat = await self._open(member)
        elif before[-1].text:
            history = [
                {"role": role, "content": content}
                for each in before[:-1]
                for role, content in (("user", each.text), ("assistant", each.reply_text))
            ]
            chat = await self._open(member, **({"history": history} if history else {}))
            await chat.say(before[-1].text, max_tokens=before[-1].reply_tokens)
        else:
            chat = await self._open(member)
            await chat.say(token_ids=self._ids(member, 0, max(1, member.history_tokens - 1)), max_tokens=1)
        self.live[member.number] = chat.committed_tokens
        return chat

    async def _sleep_until(self, at_s: float) -> None:
        """Yields once even if that time has passed."""
        await asyncio.sleep(max(0.0, at_s - self.now_s))


@contextmanager
def _the_first_alone() -> Iterator[None]:
    """Of a group of errors: the others are of the same kind, as all tasks talk to one server."""
    try:
        yield
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def _due_s(exchange: Exchange, begun_s: float, now_s: float) -> float:
    """A turn that is recorded with its time is said then, or when the reply before it has come."""
    return now_s + exchange.think_s if exchange.at_s is None else max(now_s, begun_s + exchange.at_s)
