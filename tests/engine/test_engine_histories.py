"""Random histories of clients: open, turn, read a little, cancel, disconnect, resume, crash and restart,
under memory pressure.  What clients were told is what the log holds, and every reply equals that of a fresh
stateless run.
"""

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    OpenRequest,
    ResumeRequest,
    SamplingParams,
    Tenant,
    TurnAccepted,
    TurnDone,
    TurnFailed,
    TurnId,
    TurnRequest,
)
from tests.engine.harness import VOCAB, fake_engine
from tests.fakes import stateless_reply

TENANT = Tenant("local")
NUM_SLOTS = 9  # blocks of 16 tokens: a few conversations at most stay resident


@dataclass(eq=False)
class Client:
    """What one client knows of its conversation."""

    id: ConversationId
    attachment: Attachment | None
    history: list[int] = field(default_factory=list)  # committed, as told
    seq: int = 0
    pending: TurnRequest | None = None  # sent, and neither done nor failed as far as the client knows
    shown: list[int] = field(default_factory=list)  # of the reply
    num_turns: int = 0


class Histories:
    """Plays a script of (operation, number, number).  The numbers choose among what is possible when its turn
    comes, and what is impossible then is skipped: threads decide how far replies have got, so a script cannot
    know.
    """

    def __init__(self, folder: Path, run_ahead: int) -> None:
        self.folder = folder
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
            max_step_tokens=24,
            max_concurrent=3,
            max_conversations=3,
            run_ahead=self.run_ahead,
        )
        await self.engine.__aenter__()

    async def open(self, which: int, how: int) -> None:
        if len(self.clients) < 5:
            attachment = await self.engine.open(TENANT, OpenRequest())
            self.clients.append(Client(attachment.conversation_id, attachment))

    async def turn(self, which: int, how: int) -> None:
        for client in self.one_of(which, lambda c: c.attachment and not c.pending):
            sampling = SamplingParams(max_tokens=1 + how % 25, ignore_eos=True)
            prompt = tuple((how * 7 + i) % 200 for i in range(1 + how % 31))
            client.pending = TurnRequest(TurnId(f"{client.num_turns}"), token_ids=prompt, sampling=sampling)
            client.num_turns += 1
            await self.send(client)

    async def send(self, client: Client) -> None:
        assert client.attachment is not None and client.pending is not None
        try:
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
            _, turns = await self.engine.get(TENANT, client.id)
            assert client.history == [id for turn in turns for id in (*turn.prompt_ids, *turn.reply_ids)]
        self.manager.check()

    def one_of(self, which: int, possible: Callable[[Client], object]) -> list[Client]:
        clients = [client for client in self.clients if possible(client)]
        return [clients[which % len(clients)]] if clients else []

    async def read(self, client: Client, count: int | None) -> None:
        """Take in `count` events, or all until the pending turn is over."""
        assert client.attachment is not None
        async with asyncio.timeout(20):
            async for event in client.attachment.events():
                assert isinstance(event, TurnAccepted | Delta | TurnDone | TurnFailed)
                if client.pending is None or event.turn_id != client.pending.turn_id:
                    continue  # a turn that was sent again just when it ended is told twice
                assert event.seq > client.seq, "events came twice or out of order"
                client.seq = event.seq
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
        history = [*client.history, *client.pending.token_ids]
        wanted = client.pending.sampling.max_tokens or 0
        assert client.shown == stateless_reply(history, wanted, frozenset(), VOCAB)[: len(client.shown)]
        if done.finish_reason is FinishReason.LENGTH:
            assert len(client.shown) == wanted
        client.history = history + client.shown
        assert done.committed_tokens == len(client.history)
        client.pending, client.shown = None, []


OPERATIONS = (
    *("open", "turn", "turn", "read_a_little", "read_to_the_end"),
    *("cancel", "disconnect", "resume", "restart"),
)
NUMBERS = st.integers(0, 1000)
SCRIPTS = st.lists(st.tuples(st.sampled_from(OPERATIONS), NUMBERS, NUMBERS), min_size=10, max_size=50)


def play(script: Sequence[tuple[str, int, int]], run_ahead: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(Histories(Path(folder), run_ahead).play(script))


SETTINGS = settings(
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # threads interleave as they like: shrinking would chase ghosts
    suppress_health_check=list(HealthCheck),
)


@given(SCRIPTS, st.integers(0, 1))
@settings(SETTINGS, max_examples=150)
def test_what_clients_were_told_is_what_is_kept(script: list[tuple[str, int, int]], run_ahead: int) -> None:
    play(script, run_ahead)


@pytest.mark.heavy
@given(SCRIPTS, st.integers(0, 1))
@settings(SETTINGS, max_examples=800)
def test_what_clients_were_told_is_what_is_kept_over_many_histories(
    script: list[tuple[str, int, int]], run_ahead: int
) -> None:
    play(script, run_ahead)
