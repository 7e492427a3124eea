"""Turns that are cancelled, whose stream breaks, or whose server is killed: they leave nothing behind in a
real server with tiny tiers, and change nothing.
"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rpc.client import Cancelled, Chat, ContinuoClient, ContinuoError, Reply, Turn, Unavailable
from tests.rpc.real_server import GREEDY, history, resident_bytes, start
from tools.server_process import ServerProcess

TIERS = ("--device-kv-tokens", 1024, "--host-kv-tokens", 1536)  # the conversations come to several times that
MAX_STEP = 32  # tokens
MAX_REPLY = 24
FATES = ("done", "cancelled", "discarded", "disconnected")
NUM_BUSY = 6  # conversations that say something at the same time
GROWTH = 4 << 20  # bytes that a server may grow by after it has seen a few turns of every kind


@dataclass
class Crowd:
    """Conversations that somebody has with one server after another; counts what became of their turns."""

    choose: random.Random
    fates: Counter[str] = field(default_factory=Counter)
    cut_off: dict[str, tuple[str, str]] = field(default_factory=dict)  # turn id and text of those left alone

    async def say_all(self, server: ServerProcess, ids: list[str], is_first: bool = False) -> None:
        """Everybody says something, a few at a time."""
        for first in range(0, len(ids), NUM_BUSY):
            await asyncio.gather(*(self.say(server, id, is_first) for id in ids[first : first + NUM_BUSY]))

    async def say(self, server: ServerProcess, id: str, is_first: bool) -> None:
        """One turn that comes to some end.  Who is disconnected hears at the next visit what came of it."""
        fate, number = self.choose.choice(FATES), self.fates.total()
        text = f"My {self.choose.choice(('cat', 'dog', 'sister'))} number {number} is called Miso."
        async with ContinuoClient(server.address, retry=False) as client:
            chat = await (client.open(id=id, system="Be brief.") if is_first else self.come_back(client, id))
            num_tokens = 200 if fate == "disconnected" else MAX_REPLY
            reply = chat.say(text, turn_id=f"t-{number}", max_tokens=num_tokens, **GREEDY)
            self.fates[fate] += 1
            await anext(reply)
            if fate == "disconnected":
                self.cut_off[id] = f"t-{number}", text
                return
            if fate != "done":
                await chat.cancel(discard=fate == "discarded")
            try:
                await reply
            except Cancelled:
                assert fate == "discarded"

    async def come_back(self, client: ContinuoClient, id: str) -> Chat:
        chat = await client.resume(id)
        if id in self.cut_off:
            turn_id, text = self.cut_off.pop(id)
            await chat.say(text, turn_id=turn_id, max_tokens=200, **GREEDY)
        if chat.context_left < 600:
            await chat.rewind(turns=chat.committed_turns // 2)
        return chat

    async def be_killed(self, server: ServerProcess, ids: list[str]) -> None:
        """The server dies while it answers these."""
        async with ContinuoClient(server.address, retry=False) as client:
            chats = [await self.come_back(client, id) for id in ids]
            replies = [chat.say("Tell me a story.", max_tokens=500, **GREEDY) for chat in chats]
            await asyncio.gather(*(anext(reply) for reply in replies))
            await server.kill()
            ended = await asyncio.gather(*map(outcome, replies))
            assert all(isinstance(error, Unavailable) for error in ended), ended
        self.fates["killed"] += len(ids)


async def outcome(reply: Reply) -> Turn | ContinuoError:
    try:
        return await reply
    except ContinuoError as error:
        return error


async def warm_up(client: ContinuoClient) -> None:
    """Steps of every size: the matrix library keeps what it has prepared for each."""
    for num_tokens in range(1, MAX_STEP + 1):
        await client.generate(token_ids=[5] * num_tokens, max_tokens=2, **GREEDY)
    await client.generate(token_ids=[5] * 900, max_tokens=20, **GREEDY)


async def settled(client: ContinuoClient) -> None:
    """Turns whose stream has broken end by themselves, and so do the last copies."""
    async with asyncio.timeout(30):
        while True:
            load = await client.load()
            if not (
                load.running_turns
                or load.waiting_turns
                or load.device.in_use_tokens
                or load.host.in_use_tokens
            ):
                break
            await asyncio.sleep(0.1)
    for tier in (load.device, load.host):
        assert tier.total_tokens == tier.idle_tokens + tier.free_tokens


@pytest.mark.parametrize(
    ("num_kills", "num_rounds", "num_conversations"),
    [
        pytest.param(1, 4, 9, id="60-turns"),
        pytest.param(10, 10, 12, id="300-turns", marks=pytest.mark.heavy),
    ],
)
async def test_turns_that_end_in_any_way_leak_no_block_and_no_memory_and_lose_nothing(
    tmp_path: Path, num_kills: int, num_rounds: int, num_conversations: int
) -> None:
    crowd = Crowd(random.Random(num_kills))
    ids = [f"chat-{n}" for n in range(num_conversations)]
    for number in range(num_kills):
        server = await start(tmp_path / "state", *TIERS)
        async with server:
            await crowd.say_all(server, ids, is_first=number == 0)
            await crowd.be_killed(server, crowd.choose.sample(ids, NUM_BUSY))

    server = await start(tmp_path / "state", *TIERS, "--max-step-tokens", MAX_STEP)
    reference = await start("none", "--stateless")
    async with (
        server,
        reference,
        ContinuoClient(server.address, retry=False) as client,
        ContinuoClient(reference.address) as fresh,
    ):
        await warm_up(client)
        await crowd.say_all(server, ids)
        memory = resident_bytes(server)
        for _ in range(num_rounds):
            await crowd.say_all(server, ids)
        await settled(client)
        assert resident_bytes(server) <= memory + GROWTH
        load = await client.load()
        assert load.evicted_tokens + load.restart_tokens > 0 < load.loaded_blocks, (
            "too much memory to be a test"
        )

        for id in ids:
            chat = await crowd.come_back(client, id)
            last = await chat.say("What is my cat called?", max_tokens=MAX_REPLY, **GREEDY)
            tokens = await history(client, fresh, id)
            assert len(tokens) == chat.committed_tokens and tuple(tokens[-MAX_REPLY:]) == last.token_ids
            await chat.close(delete=True)
        await settled(client)
        load = await client.load()
        assert (load.device.free_tokens, load.host.free_tokens) == (1024, 1536), "nobody is there any more"
        assert load.conversations.idle + load.conversations.attached == 0
        server.check()
    assert crowd.fates.keys() == {*FATES, "killed"} and crowd.fates.total() >= 60
