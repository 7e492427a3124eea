"""A real server whose disk fills up and is given room again, as its clients see it."""

import asyncio
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rpc.client import Chat, ContinuoClient, Turn, Unavailable
from tests.rpc.real_server import GREEDY, history, resident_bytes, start
from tools.server_process import ServerProcess


@contextmanager
def full_disk(server: ServerProcess) -> Iterator[None]:
    """The server can write nothing behind the first KiB of any file: less than any transaction takes."""
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (soft, hard))


async def ask(chat: Chat, number: int) -> Turn:
    return await chat.say(
        f"My cat number {number} is called Miso.", turn_id=f"t-{number}", max_tokens=8, **GREEDY
    )


async def test_a_server_outlives_a_full_disk_and_its_conversations_lose_nothing(tmp_path) -> None:
    reference = await start("none", "--stateless")
    server = await start(tmp_path / "state", "--device-kv-tokens", 1024, "--host-kv-tokens", 1024)
    async with (
        reference,
        ContinuoClient(reference.address) as fresh,
        server,
        ContinuoClient(server.address, retry=False) as client,
    ):
        chats = [await client.open(id=f"chat-{n}", system="Be brief.") for n in range(3)]
        before = [await ask(chat, 0) for chat in chats]
        with full_disk(server):
            with pytest.raises(Unavailable, match="cannot be written: free space on its disk") as told:
                await ask(chats[0], 1)
            assert told.value.reason == "DATA_DIR_ERROR" and told.value.retry_after_s is not None
            with pytest.raises(Unavailable, match="free space on its disk"):
                await client.open(id="another")

            assert len((await client.generate("The cat", max_tokens=5, **GREEDY)).token_ids) == 5
            assert {each.conversation_id async for each in client.list()} == {chat.id for chat in chats}
            stored = [(await client.get(chat.id))[1] for chat in chats]
            assert [len(turns) for turns in stored] == [1, 1, 1]

            memory = None
            for number in range(60):
                failures = await asyncio.gather(*(ask(chat, 1) for chat in chats), return_exceptions=True)
                assert all(isinstance(failure, Unavailable) for failure in failures), failures
                if number == 20:
                    memory = resident_bytes(server)
            assert memory is not None and resident_bytes(server) < memory + (4 << 20)
            load = await client.load()
            assert (load.running_turns, load.waiting_turns, load.device.in_use_tokens) == (0, 0, 0)
            server.check()

        after = [await ask(chat, 1) for chat in chats]  # under the turn ids that failed
        assert [turn.committed_tokens for turn in after] > [turn.committed_tokens for turn in before]
        await client.open(id="another")
        await server.kill()
        server = await start(tmp_path / "state")
        async with server, ContinuoClient(server.address) as client:
            for chat in chats:
                again = await client.resume(chat.id)
                assert again.committed_turns == 2
                await ask(again, 2)
                assert len(await history(client, fresh, chat.id)) == again.committed_tokens


async def test_a_client_that_retries_waits_until_there_is_room(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("rpc.client.PAUSES_S", (0.05,) * 200)
    server = await start(tmp_path / "state", "--policy", "lru")
    async with server, ContinuoClient(server.address, jitter=lambda: 0.0) as client:
        chat = await client.open()
        with full_disk(server):
            asking = asyncio.ensure_future(ask(chat, 0))
            while not (await client.load()).failed_turns:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            assert not asking.done()
        assert len((await asyncio.wait_for(asking, 20)).token_ids) == 8
        assert chat.committed_turns == 1
