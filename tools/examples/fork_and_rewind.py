"""One history, several ways on: fork it, take turns back, ask for another reply.  Its KV cache is kept.

python fork_and_rewind.py [HOST:PORT]
"""

import asyncio
import sys

from rpc.client import Chat, ContinuoClient, Turn


async def main(address: str = "localhost:50051") -> None:
    async with ContinuoClient(address) as client:
        chat = await client.open("Be brief.", temperature=0.0)
        show("told", await chat.say("My cat is called Miso."))
        show("asked", await chat.say("What is my cat called?"))

        fork = await chat.fork(turns=1)  # a copy that knows the first turn; the KV cache is shared
        show("told the fork alone", await fork.say("My dog is called Bruno."))

        await chat.rewind(turns=1)  # the second turn is gone, as if it had never been asked
        await chat.append("I like long stories.")  # told without asking for a reply
        show("asked after that", await chat.say("What is my dog called?"))
        show("another reply", await chat.regenerate(temperature=1.0, seed=7))

        where("the first", chat)
        where("its fork", fork)
        await fork.close(delete=True)


def show(what: str, turn: Turn) -> None:
    reused, prompt = turn.usage.cached_device_tokens, turn.usage.prompt_tokens
    print(f"{what}: {turn.text}\n    {reused} of {prompt} tokens reused")


def where(name: str, chat: Chat) -> None:
    print(f"{name}: {chat.id}, {chat.committed_turns} turns, {chat.committed_tokens} tokens")


asyncio.run(main(*sys.argv[1:]))
