"""Histories copied, over the fake model."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import (
    AlreadyExists,
    Draining,
    InvalidRequest,
    NotFound,
)
from engine.types import (
    ConversationId,
    ForkRequest,
    OpenRequest,
    Point,
    ResumeRequest,
    Tenant,
    TurnId,
)
from tests.engine.harness import (
    BLOCK_SIZE,
    LOCAL,
    again,
    expected,
    fake_engine,
    ids_turn,
    read,
    say,
    talked,
    until_done,
)


@pytest.mark.parametrize("place", [None, 0, 9, 16, 22, 27, 32, 33, 66])
async def test_a_fork_shares_every_full_block_and_goes_its_own_way(place: int | None, tmp_path: Path) -> None:
    engine, runner, manager = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(labels={"app": "test"}))
        whole = await talked(chat)
        history = whole[:place]
        before, free = runner.num_computed, manager.pool.num_free
        at = None if place is None else Point(num_tokens=place)
        record = await engine.fork(LOCAL, ForkRequest(chat.conversation_id, at=at))
        assert (record.parent, record.forked_at, record.num_tokens) == (
            chat.conversation_id,
            len(history),
            len(history),
        )
        assert record.labels == {"app": "test"}
        fork = await engine.resume(LOCAL, ResumeRequest(record.id, record.resume_token))
        assert (fork.committed_tokens, fork.committed_turns) == (len(history), -(-len(history) // 22))
        assert (runner.num_computed, manager.pool.num_free) == (before, free), "no KV is made or copied"
        ids, done = await say(fork, ids_turn("x", [7, 8]))
        assert ids == expected([*history, 7, 8])
        assert runner.num_computed - before <= BLOCK_SIZE - 1 + 2 + 11
        assert done.usage.recomputed_tokens <= BLOCK_SIZE - 1
        ids, _ = await say(chat, ids_turn("x", [9]))
        assert ids == expected([*whole, 9])
        manager.check()
        await engine.delete(LOCAL, chat.conversation_id)
        assert (await engine.get(LOCAL, record.id))[0].num_tokens == len(history) + 14
        more, _ = await say(fork, ids_turn("y", [3]))
        assert more == expected([*history, 7, 8, *expected([*history, 7, 8]), 3])


async def test_a_fork_with_an_id_of_ones_own_is_safe_to_repeat() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await talked(chat)
        request = ForkRequest(
            chat.conversation_id, ConversationId("other"), Point(num_turns=2), labels={"a": "b"}
        )
        first = await engine.fork(LOCAL, request)
        assert first.labels == {"a": "b"}
        assert await engine.fork(LOCAL, request) == first
        for changed in (replace(request, at=None), replace(request, new_id=ConversationId("mine"))):
            with pytest.raises(AlreadyExists, match="conversation id .* is taken; choose another or none"):
                await engine.fork(LOCAL, changed)
        with pytest.raises(InvalidRequest, match="conversation id '' has 0 characters; use 1 to 128 print"):
            await engine.fork(LOCAL, replace(request, new_id=ConversationId("")))
        for tenant, id in ((Tenant("stranger"), "mine"), (LOCAL, "nobody")):
            with pytest.raises(
                NotFound, match=f"there is no conversation {id}; open a new one or list yours"
            ):
                await engine.fork(tenant, ForkRequest(ConversationId(id)))
        await engine.drain(0)
        with pytest.raises(Draining):
            await engine.fork(LOCAL, request)


async def test_a_fork_is_of_what_is_committed_while_a_turn_is_in_flight() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        history = await talked(chat)
        await chat.regenerate(again("x", "1", max_tokens=900))
        await read(chat, 3)
        record = await engine.fork(LOCAL, ForkRequest(chat.conversation_id))
        await chat.cancel(TurnId("x"), keep=True)
        fork = await engine.resume(LOCAL, ResumeRequest(record.id))
        assert (await say(fork, ids_turn("x", [1])))[0] == expected([*history, 1])


async def test_numbers_of_events_go_on_behind_those_of_the_turns_a_fork_began_with() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        first, told = await say(chat, ids_turn("0", [1, 2]))
        record = await engine.fork(LOCAL, ForkRequest(chat.conversation_id))
        fork = await engine.resume(LOCAL, ResumeRequest(record.id, after_seq=0))
        assert await until_done(fork) == (first, told)
        _, done = await say(fork, ids_turn("1", [3]))
        assert done.seq > told.seq


async def test_forking_what_is_not_in_use_does_not_fill_memory() -> None:
    engine, _, _ = fake_engine(max_conversations=2)
    async with engine:
        for number in range(5):
            chat = await engine.open(LOCAL, OpenRequest(ConversationId(str(number))))
            await say(chat, ids_turn("1", [number]))
            chat.detach()
        for number in range(5):
            record = await engine.fork(LOCAL, ForkRequest(ConversationId(str(number))))
            assert record.num_tokens == 13 and len(engine._registry) <= 2
