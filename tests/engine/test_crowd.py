"""Everything at once: several clients fight for the same few conversations, each doing what it likes.

None of them knows what the others do, so most of what they ask for is refused, taken over or cancelled.
What must hold whatever happens: nobody gets an error that is not written for callers, nothing hangs, memory
and token log agree in the end, no KV leaks, and every reply is what its history makes it.
"""

import asyncio
import random
from pathlib import Path

import pytest

from engine.async_engine import AsyncEngine
from engine.attachment import Attachment
from engine.errors import EngineError
from engine.history import tokens_of
from engine.types import (
    ConversationId,
    FinishReason,
    ForkRequest,
    OpenRequest,
    Point,
    ResumeRequest,
    SamplingParams,
    TurnDone,
    TurnFailed,
    TurnId,
    TurnRecord,
    UpdateRequest,
)
from tests.engine.harness import LOCAL, again, append_turn, expected, fake_engine, ids_turn, say, text_turn

NAMES = [ConversationId(name) for name in ("a", "b", "c")]
NUM_CLIENTS = 4
NUM_OPERATIONS = 60


class Client:
    def __init__(self, engine: AsyncEngine, number: int, chance: random.Random) -> None:
        self.engine, self.number, self.chance = engine, number, chance
        self.chat: Attachment | None = None
        self.num_turns = 0
        self.num_done = 0

    async def live(self) -> None:
        for _ in range(NUM_OPERATIONS):
            try:
                await self.do_something()
            except EngineError:
                self.chat = None if self.chance.random() < 0.5 else self.chat
            await asyncio.sleep(self.chance.choice([0, 0, 0.001, 0.003]))
        if self.chat is not None:
            self.chat.detach()

    async def do_something(self) -> None:
        chance, chat = self.chance, self.chat
        if chat is None or chance.random() < 0.1:
            self.chat = await self.engine.resume(LOCAL, ResumeRequest(chance.choice(NAMES)))
            return
        turn_id = f"{self.number}-{self.num_turns}"
        self.num_turns += 1
        match chance.randrange(10):
            case 0:
                await chat.turn(append_turn(turn_id, self.some_ids()))
            case 1 | 2:
                await chat.turn(ids_turn(turn_id, self.some_ids(), max_tokens=chance.randrange(1, 40)))
            case 3:
                await chat.turn(text_turn(turn_id, "hello", max_tokens=chance.randrange(1, 40)))
            case 4:
                replaces = chance.choice([None, *chat._live.turns])
                await chat.regenerate(again(turn_id, replaces, max_tokens=chance.randrange(1, 40)))
            case 5:
                await chat.rewind(Point(num_tokens=chance.randrange(40)))
            case 6:
                fork = await self.engine.fork(LOCAL, ForkRequest(chat.conversation_id))
                if chance.random() < 0.5:
                    await self.engine.delete(LOCAL, fork.id)
            case 7:
                await chat.update(UpdateRequest(SamplingParams(top_k=chance.randrange(9))))
            case 8:
                flight = chat._live.flight
                if flight is not None:
                    await chat.cancel(flight.turn_id, keep=chance.random() < 0.5)
            case 9:
                chat.detach()
                self.chat = None
                return
        if chance.random() < 0.7:
            await self.read(chat)

    async def read(self, chat: Attachment) -> None:
        """To the end of a turn, or as long as patience lasts."""
        try:
            async with asyncio.timeout(self.chance.choice([0.002, 0.05])):
                async for event in chat.events():
                    if isinstance(event, TurnDone | TurnFailed):
                        self.num_done += isinstance(event, TurnDone)
                        return
        except TimeoutError:
            pass

    def some_ids(self) -> list[int]:
        return [self.chance.randrange(256) for _ in range(self.chance.randrange(1, 40))]


def wrong_replies(turns: list[TurnRecord]) -> list[TurnId]:
    """Turns whose reply is not the beginning of what the model says to their history."""
    wrong = []
    for number, turn in enumerate(turns):
        before = tokens_of(turns[:number])[: turn.first_token]
        if list(turn.reply_ids) != expected([*before, *turn.prompt_ids], len(turn.reply_ids)):
            wrong.append(turn.turn_id)
    return wrong


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("seed", range(4))
async def test_clients_that_fight_leave_memory_and_log_in_agreement(
    seed: int, run_ahead: int, tmp_path: Path
) -> None:
    engine, runner, manager = fake_engine(
        tmp_path, num_slots=24, run_ahead=run_ahead, max_step_tokens=16, disconnect_grace_s=0.01
    )
    async with engine:
        for name in NAMES:
            (await engine.open(LOCAL, OpenRequest(name))).detach()
        clients = [Client(engine, n, random.Random(100 * seed + n)) for n in range(NUM_CLIENTS)]
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(client.live())
        assert sum(client.num_done for client in clients) > 0
        chats = [await engine.resume(LOCAL, ResumeRequest(name)) for name in NAMES]
        for chat in chats:
            async with asyncio.timeout(5):
                await chat.close(delete=False)  # once its turn is over
        await asyncio.sleep(0.01)
        manager.check()
        assert manager.statistics().num_evictable + manager.pool.num_free == 24, "nothing is held"
        records, _ = await engine.list(LOCAL, {}, 500, None)
        for record in records:
            _, turns = await engine.get(LOCAL, record.id)
            tokens = tokens_of(turns)
            assert not wrong_replies(turns)
            assert len(tokens) == record.num_tokens and len(turns) == record.num_turns
            live = engine._registry.get(record.id)
            if live is not None:
                assert live.core.tokens == tokens and list(live.turns) == [turn.turn_id for turn in turns]
                assert live.core.num_committed == len(tokens) and live.record.sampling == record.sampling
            for turn in turns:
                assert turn.reply_ids or turn.finish_reason in (FinishReason.APPENDED, FinishReason.CANCELLED)
        for name in NAMES:
            chat = await engine.resume(LOCAL, ResumeRequest(name))
            await chat.rewind(Point(num_turns=chat.committed_turns // 2))
            history = list(chat._live.core.tokens)
            reply, _ = await say(chat, ids_turn("last", [1, 2, 3]))
            assert reply == expected([*history, 1, 2, 3])
        for record in records:
            await engine.delete(LOCAL, record.id)
        manager.check()
        assert manager.pool.num_free == 24 and not len(engine._registry)
