"""Random histories of clients: open, turn, append, regenerate, rewind, fork, update, read a little, cancel,
disconnect, resume, crash and restart, under memory pressure.  What clients were told is what the log holds,
and every reply equals that of a fresh stateless run.
"""

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine.attachment import Attachment
from engine.errors import ContextOverflow, TurnCancelled
from engine.types import (
    ConversationId,
    Delta,
    FinishReason,
    ForkRequest,
    OpenRequest,
    Point,
    RegenerateRequest,
    ResumeRequest,
    SamplingParams,
    Standing,
    StateChanged,
    Tenant,
    TurnAccepted,
    TurnDone,
    TurnFailed,
    TurnId,
    TurnRequest,
    UpdateRequest,
)
from tests.engine.harness import VOCAB, check_sums, fake_engine
from tests.fakes import stateless_reply

TENANT = Tenant("local")
NUM_SLOTS = 9  # blocks of 16 tokens: a few conversations at most stay resident
CONTEXT = (NUM_SLOTS - 1) * 16


@dataclass(frozen=True)
class Told:
    """A committed turn."""

    id: TurnId
    prompt: list[int]
    reply: list[int]
    is_append: bool = False


@dataclass(eq=False)
class Client:
    """What one client knows of its conversation."""

    id: ConversationId
    attachment: Attachment | None
    turns: list[Told] = field(default_factory=list)  # committed, as told
    seq: int = 0
    pending: TurnRequest | RegenerateRequest | None = None  # sent; neither done nor failed as far as it knows
    shown: list[int] = field(default_factory=list)  # of the reply
    num_sent: int = 0
    default_tokens: int = 7  # of a reply

    @property
    def history(self) -> list[int]:
        return [token for turn in self.turns for token in (*turn.prompt, *turn.reply)]

    def next_id(self) -> TurnId:
        self.num_sent += 1
        return TurnId(f"t{self.num_sent}")

    def cut(self, num_tokens: int) -> list[Told]:
        """The turns that a rewind or a fork at that token leaves."""
        left, kept = num_tokens, []
        for turn in self.turns:
            if not left:
                break
            prompt = turn.prompt[:left]
            reply = turn.reply[: left - len(prompt)]
            was_cut = len(prompt) < len(turn.prompt)
            kept.append(Told(turn.id, prompt, reply, is_append=turn.is_append or was_cut))
            left -= len(prompt) + len(reply)
        return kept


class Histories:
    """Plays a script of (operation, number, number).  The numbers choose among what is possible when its turn
    comes, and what is impossible then is skipped: threads decide how far replies have got, so a script cannot
    know.
    """

    def __init__(self, folder: Path, run_ahead: int, num_host_slots: int) -> None:
        self.folder = folder
        self.num_host_slots = num_host_slots
        self.run_ahead = run_ahead
        self.clients: list[Client] = []

    async def play(self, script: Sequence[tuple[str, int, int]]) -> None:
        await self.start()
        for operation, which, how in script:
            await getattr(self, operation)(which, how)
            self.manager.check()
        await self.settle()
        await self.engine.__aexit__()

    async def start(self) -> None:
        self.engine, _, self.manager = fake_engine(
            self.folder,
            num_slots=NUM_SLOTS,
            num_host_slots=self.num_host_slots,
            max_step_tokens=24,
            max_concurrent=3,
            max_conversations=3,
            run_ahead=self.run_ahead,
        )
        await self.engine.__aenter__()

    async def open(self, which: int, how: int) -> None:
        if len(self.clients) < 5:
            sampling = SamplingParams(max_tokens=7, ignore_eos=True)
            attachment = await self.engine.open(TENANT, OpenRequest(sampling=sampling))
            self.clients.append(Client(attachment.conversation_id, attachment))

    async def turn(self, which: int, how: int) -> None:
        for client in self.free(which):
            sampling = SamplingParams(max_tokens=1 + how % 25 if how % 4 else None)
            client.pending = TurnRequest(client.next_id(), token_ids=some_ids(how), sampling=sampling)
            await self.send(client)

    async def append(self, which: int, how: int) -> None:
        for client in self.free(which):
            client.pending = TurnRequest(client.next_id(), token_ids=some_ids(how), wants_reply=False)
            await self.send(client)

    async def regenerate(self, which: int, how: int) -> None:
        for client in self.free(which):
            with_reply = [turn for turn in client.turns if not turn.is_append]
            if with_reply:
                replaces = with_reply[how % len(with_reply)].id
                is_last = replaces == client.turns[-1].id and how % 2
                sampling = SamplingParams(max_tokens=1 + how % 23)
                client.pending = RegenerateRequest(client.next_id(), None if is_last else replaces, sampling)
                await self.send(client)

    async def rewind(self, which: int, how: int) -> None:
        for client in self.free(which):
            assert client.attachment is not None
            if how % 3:
                at = Point(num_tokens=how % (len(client.history) + 1))
                kept = client.cut(at.num_tokens or 0)
            else:
                at = Point(num_turns=how % (len(client.turns) + 1))
                kept = client.turns[: at.num_turns]
            for _ in range(1 + how % 2):
                standing = await client.attachment.rewind(at)
                client.turns = kept
                assert standing == Standing(len(client.history), len(kept), CONTEXT - len(client.history))

    async def fork(self, which: int, how: int) -> None:
        for client in self.one_of(which, lambda c: not c.pending):
            if len(self.clients) < 5:
                num_tokens = how % (len(client.history) + 1)
                id = ConversationId(f"fork-{len(self.clients)}") if how % 2 else None
                request = ForkRequest(client.id, id, Point(num_tokens=num_tokens))
                record = await self.engine.fork(TENANT, request)
                if id is not None:
                    assert await self.engine.fork(TENANT, request) == record
                fork = Client(record.id, None, client.cut(num_tokens), num_sent=client.num_sent)
                fork.default_tokens = client.default_tokens
                self.clients.append(fork)

    async def update(self, which: int, how: int) -> None:
        for client in self.free(which):
            assert client.attachment is not None
            client.default_tokens = 1 + how % 9
            sampling = SamplingParams(max_tokens=client.default_tokens, ignore_eos=True)
            await client.attachment.update(UpdateRequest(sampling))

    async def send(self, client: Client) -> None:
        assert client.attachment is not None and client.pending is not None
        try:
            if isinstance(client.pending, RegenerateRequest):
                await client.attachment.regenerate(client.pending)
            else:
                await client.attachment.turn(client.pending)
        except ContextOverflow:
            client.pending = None

    async def read_a_little(self, which: int, how: int) -> None:
        for client in self.one_of(which, lambda c: c.attachment and c.pending):
            await self.read(client, 1 + how % 6)

    async def read_to_the_end(self, which: int, how: int) -> None:
        for client in self.one_of(which, lambda c: c.attachment and c.pending):
            await self.read(client, None)

    async def cancel(self, which: int, how: int) -> None:
        for client in self.one_of(which, lambda c: c.attachment and c.pending):
            assert client.attachment is not None and client.pending is not None
            await client.attachment.cancel(client.pending.turn_id, keep=bool(how % 2))
            await self.read(client, None)

    async def disconnect(self, which: int, how: int) -> None:
        for client in self.one_of(which, lambda c: c.attachment):
            assert client.attachment is not None
            client.attachment.detach()
            client.attachment = None

    async def resume(self, which: int, how: int) -> None:
        """Also takes over from itself.  A turn that the server does not know is sent again under its id."""
        for client in self.one_of(which, lambda c: True):
            client.attachment = await self.engine.resume(
                TENANT, ResumeRequest(client.id, after_seq=client.seq)
            )
            if client.pending is not None:
                await self.send(client)

    async def restart(self, which: int, how: int) -> None:
        """The log is all that is left; a commit that was under way may or may not have made it."""
        await self.engine.__aexit__()
        for client in self.clients:
            client.attachment = None
        await self.start()

    async def settle(self) -> None:
        """Everybody comes back and hears the end of their turn; the log holds what they were told."""
        for number, client in enumerate(self.clients):
            await self.resume(number, 0)
            if client.pending is not None:
                await self.read(client, None)
            record, turns = await self.engine.get(TENANT, client.id)
            assert [(t.id, t.prompt, t.reply) for t in client.turns] == [
                (t.turn_id, list(t.prompt_ids), list(t.reply_ids)) for t in turns
            ]
            assert (record.num_turns, record.num_tokens) == (len(turns), len(client.history))
            assert [turn.first_token for turn in turns] == list(
                accumulate((len(t.prompt) + len(t.reply) for t in client.turns[:-1]), initial=0)
            )[: len(turns)]
        self.manager.check()

    def free(self, which: int) -> list[Client]:
        return self.one_of(which, lambda c: c.attachment and not c.pending)

    def one_of(self, which: int, possible: Callable[[Client], object]) -> list[Client]:
        clients = [client for client in self.clients if possible(client)]
        return [clients[which % len(clients)]] if clients else []

    async def read(self, client: Client, count: int | None) -> None:
        """Take in `count` events, or all until the pending turn is over."""
        assert client.attachment is not None
        async with asyncio.timeout(20):
            async for event in client.attachment.events():
                assert isinstance(event, TurnAccepted | StateChanged | Delta | TurnDone | TurnFailed)
                if client.pending is None or event.turn_id != client.pending.turn_id:
                    continue  # a turn that was sent again just when it ended is told twice
                assert event.seq > client.seq, "events came twice or out of order"
                client.seq = event.seq
                if isinstance(event, StateChanged) and event.found is not None:
                    check_sums(event.found)
                if isinstance(event, TurnAccepted) and event.restarted:
                    client.shown = []
                if isinstance(event, Delta):
                    assert event.offset <= len(client.shown), "a part of the reply is missing"
                    client.shown[event.offset :] = event.token_ids
                elif isinstance(event, TurnDone):
                    self.take_in(client, event)
                elif isinstance(event, TurnFailed):
                    assert isinstance(event.error, TurnCancelled)
                    client.pending, client.shown = None, []
                count = None if count is None else count - 1
                if client.pending is None or count == 0:
                    return

    def take_in(self, client: Client, done: TurnDone) -> None:
        assert client.pending is not None and done.turn_id == client.pending.turn_id
        request, before, is_append = client.pending, client.turns, False
        if isinstance(request, RegenerateRequest):
            ids = [turn.id for turn in client.turns]
            number = ids.index(request.replaces) if request.replaces is not None else len(ids) - 1
            before, prompt = client.turns[:number], client.turns[number].prompt
        else:
            prompt, is_append = list(request.token_ids), not request.wants_reply
        client.turns = [*before, Told(done.turn_id, prompt, [])]
        wanted = 0 if is_append else request.sampling.max_tokens or client.default_tokens
        expected = stateless_reply(client.history, wanted, frozenset(), VOCAB)
        assert client.shown == expected[: len(client.shown)]
        if done.finish_reason is FinishReason.LENGTH:
            assert len(client.shown) == wanted
        assert (done.finish_reason is FinishReason.APPENDED) is is_append
        client.turns[-1] = Told(done.turn_id, prompt, client.shown, is_append)
        assert done.committed_tokens == len(client.history)
        check_sums(done.usage)
        timing = done.timing
        parts = (timing.queue_s, timing.recompute_s, timing.prefill_s)  # copies overlap with the queue
        assert min(parts) >= 0 and sum(parts) <= timing.ttft_s + 1e-6 <= timing.total_s + 2e-6
        client.pending, client.shown = None, []


def some_ids(how: int) -> tuple[int, ...]:
    return tuple((how * 7 + i) % 200 for i in range(1 + how % 31))


OPERATIONS = (
    *("open", "turn", "turn", "read_a_little", "read_to_the_end", "read_to_the_end"),
    *("append", "regenerate", "rewind", "fork", "update"),
    *("cancel", "disconnect", "resume", "restart"),
)
HOST_SLOTS = st.sampled_from([0, 5, 40])
NUMBERS = st.integers(0, 1000)
SCRIPTS = st.lists(st.tuples(st.sampled_from(OPERATIONS), NUMBERS, NUMBERS), min_size=10, max_size=50)


def play(script: Sequence[tuple[str, int, int]], run_ahead: int, num_host_slots: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(Histories(Path(folder), run_ahead, num_host_slots).play(script))


SETTINGS = settings(
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # threads interleave as they like: shrinking would chase ghosts
    suppress_health_check=list(HealthCheck),
)


@given(SCRIPTS, st.integers(0, 1), HOST_SLOTS)
@settings(SETTINGS, max_examples=100)
def test_what_clients_were_told_is_what_is_kept(
    script: list[tuple[str, int, int]], run_ahead: int, num_host_slots: int
) -> None:
    play(script, run_ahead, num_host_slots)


@pytest.mark.heavy
@given(SCRIPTS, st.integers(0, 1), HOST_SLOTS)
@settings(SETTINGS, max_examples=800)
def test_what_clients_were_told_is_what_is_kept_over_many_histories(
    script: list[tuple[str, int, int]], run_ahead: int, num_host_slots: int
) -> None:
    play(script, run_ahead, num_host_slots)
