"""No room on the disk, or a copy between the tiers that fails, under a whole engine: who is told what, who
goes on, and that nothing is lost.
"""

import asyncio
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.attachment import Attachment
from engine.errors import DataDirError
from engine.types import (
    ConversationId,
    Delta,
    ForkRequest,
    GenerateRequest,
    OpenRequest,
    Point,
    ResumeRequest,
    SamplingParams,
    TurnDone,
    UpdateRequest,
)
from tests.engine.harness import LOCAL, append_turn, expected, fake_engine, ids_turn, say, until
from tests.fakes import FakeTransfer

NO_ROOM = r"token log .*conversations\.db cannot be written: free space on its disk"


@contextmanager
def full_disk() -> Iterator[None]:
    """Nothing can be written behind the first KiB of any file, which is less than any transaction takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def failed(chat: Attachment, id: str, ids: list[int]) -> DataDirError:
    """Says something that cannot be committed."""
    with pytest.raises(DataDirError, match=NO_ROOM) as told:
        await say(chat, ids_turn(id, ids))
    return told.value


async def test_a_turn_that_finds_no_room_fails_and_succeeds_under_its_id_when_there_is_some(
    tmp_path: Path,
) -> None:
    engine, _, manager = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        prompt = list(range(40))
        first, _ = await say(chat, ids_turn("1", prompt))
        with full_disk():
            for _ in range(3):
                error = await failed(chat, "2", [3])
                assert error.retry_after_s is not None
                _, turns = await engine.get(LOCAL, chat.conversation_id)
                assert [list(turn.reply_ids) for turn in turns] == [first]
        second, done = await say(chat, ids_turn("2", [3]))
        assert second == expected([*prompt, *first, 3])
        assert done.usage.cached_device_tokens == 48, "whole blocks that were computed before are still here"
        assert engine.load().failed_turns == {"DATA_DIR_ERROR": 3}
        manager.check()
    engine, _, _ = fake_engine(tmp_path)
    async with engine:  # nor is anything lost behind it
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        assert [list(turn.reply_ids) for turn in turns] == [first, second]


async def test_a_long_reply_does_not_mind_a_disk_that_is_full_only_meanwhile(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        other = await engine.open(LOCAL, OpenRequest())
        await chat.turn(ids_turn("1", [1], max_tokens=400))
        events = chat.events()
        seen = 0
        with full_disk():
            await failed(other, "1", [2])
            async for event in events:
                seen += isinstance(event, Delta)
                if seen == 100:
                    break
        reply: list[int] = []
        async for event in events:
            if isinstance(event, TurnDone):
                reply = list((await engine.get(LOCAL, chat.conversation_id))[1][0].reply_ids)
                break
        assert reply == expected([1], 400)


async def test_what_needs_no_room_goes_on(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("c")))
        first, _ = await say(chat, ids_turn("1", [1, 2]))
        with full_disk():
            failing = asyncio.ensure_future(failed(chat, "2", [3]))
            request = GenerateRequest(
                token_ids=(5, 6), sampling=SamplingParams(max_tokens=12, ignore_eos=True)
            )
            events = [event async for event in engine.generate(LOCAL, request)]
            ids = [id for event in events if isinstance(event, Delta) for id in event.token_ids]
            assert ids == expected([5, 6])
            records, _ = await engine.list(LOCAL, {}, 10, None)
            assert [record.id for record in records] == ["c"]
            _, turns = await engine.get(LOCAL, ConversationId("c"))
            assert [list(turn.reply_ids) for turn in turns] == [first]
            resumed = await engine.resume(LOCAL, ResumeRequest(ConversationId("c")))  # it is in memory
            await failing if failing.done() else failing.cancel()
            assert resumed.committed_tokens == 2 + len(first)


async def test_opening_and_coming_back_find_no_room_and_leave_no_trace(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path, max_conversations=1)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("old")))
        first, _ = await say(chat, ids_turn("1", [1, 2]))
        await chat.close(delete=False)
        newer = await engine.open(LOCAL, OpenRequest(ConversationId("newer")))
        await newer.close(delete=False)
        await until(lambda: engine.load().conversations.idle <= 1)
        with full_disk():
            for _ in range(2):
                with pytest.raises(DataDirError, match=NO_ROOM):
                    await engine.open(LOCAL, OpenRequest(ConversationId("new")))
                with pytest.raises(DataDirError, match=NO_ROOM):
                    await engine.resume(LOCAL, ResumeRequest(ConversationId("old")))
        records, _ = await engine.list(LOCAL, {}, 10, None)
        assert {record.id for record in records} == {"old", "newer"}
        new = await engine.open(LOCAL, OpenRequest(ConversationId("new")))
        assert (await say(new, ids_turn("1", [7])))[0] == expected([7])
        old = await engine.resume(LOCAL, ResumeRequest(ConversationId("old")))
        assert (await say(old, ids_turn("2", [3])))[0] == expected([1, 2, *first, 3])


async def test_whatever_changes_a_conversation_changes_nothing_without_room(tmp_path: Path) -> None:
    engine, _, manager = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(labels={"a": "1"}))
        first, _ = await say(chat, ids_turn("1", [1, 2]))
        second, _ = await say(chat, ids_turn("2", [3]))
        before = await engine.get(LOCAL, chat.conversation_id)
        with full_disk():
            for change in (
                lambda: chat.rewind(Point(num_turns=1)),
                lambda: chat.update(UpdateRequest(SamplingParams(top_k=3), {"a": "2"})),
                lambda: engine.fork(LOCAL, ForkRequest(chat.conversation_id)),
                lambda: say(chat, append_turn("3", [4])),
                lambda: engine.delete(LOCAL, chat.conversation_id),
            ):
                with pytest.raises(DataDirError, match=NO_ROOM):
                    await change()
        assert await engine.get(LOCAL, chat.conversation_id) == before
        manager.check()
        history = [1, 2, *first, 3, *second]
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        assert (await say(chat, ids_turn("3", [4])))[0] == expected([*history, 4])


async def test_an_hour_without_room_fills_no_memory(tmp_path: Path) -> None:
    engine, _, manager = fake_engine(tmp_path)
    async with engine:
        chats = [await engine.open(LOCAL, OpenRequest()) for _ in range(4)]
        with full_disk():
            for number in range(50):
                await asyncio.gather(
                    *(failed(chat, f"{number}", [number, n]) for n, chat in enumerate(chats))
                )
                with pytest.raises(DataDirError):
                    await engine.open(LOCAL, OpenRequest())
        load = engine.load()
        assert load.failed_turns == {"DATA_DIR_ERROR": 200}
        assert (load.running_turns, load.waiting_turns, load.device.in_use_tokens) == (0, 0, 0)
        assert load.conversations.attached == len(chats)
        assert load.device.idle_tokens == 0, "what nobody can come back to is not kept"
        for n, chat in enumerate(chats):
            assert (await say(chat, ids_turn("0", [n])))[0] == expected([n])
        manager.check()


@pytest.mark.parametrize("num_to_fail", [1, 3, 1000])
async def test_copies_that_fail_midway_are_counted_and_change_no_reply(num_to_fail: int) -> None:
    """Three conversations that do not fit the device tier together: each turn pushes others out."""
    engine, _, manager = fake_engine(num_slots=10, num_host_slots=30, max_step_tokens=64)
    transfer = engine._core._transfer
    assert isinstance(transfer, FakeTransfer)
    async with engine:
        chats = [await engine.open(LOCAL, OpenRequest()) for _ in range(3)]
        histories: list[list[int]] = [[], [], []]
        for number in range(6):
            if number == 4:
                transfer.num_to_fail = num_to_fail
            for which, (chat, history) in enumerate(zip(chats, histories, strict=True)):
                prompt = [50 * which + n for n in range(9)]
                reply, _ = await say(chat, ids_turn(f"{number}", prompt))
                assert reply == expected([*history, *prompt])
                history += [*prompt, *reply]
                manager.check()
        await until(lambda: engine.load().device.in_use_tokens == 0)  # the last copies have ended
        load = engine.load()
        assert load.failed_copies == num_to_fail - transfer.num_to_fail > 0
        assert load.failed_turns == {}
        assert load.cached_host_tokens > 0
