"""A chat: type, and read the reply as it comes.  Only what you type is sent, never the history.

python chat.py [HOST:PORT]
"""

import asyncio
import sys

from rpc.client import ContinuoClient, ContinuoError


async def main(address: str = "localhost:50051") -> None:
    async with ContinuoClient(address) as client:
        chat = await client.open("Be brief.", temperature=0.7)
        while text := await asyncio.to_thread(read):
            try:
                reply = chat.say(text)
                async for delta in reply:
                    print(delta.text, end="", flush=True)
                turn = await reply
            except ContinuoError as error:  # the conversation stands as before, and goes on
                print(f"[{error}]")
                continue
            usage = turn.usage
            print(f"\n[{usage.cached_device_tokens} of {usage.prompt_tokens} tokens were still in memory]")
        print(f"{chat.id} holds {chat.committed_tokens} tokens; client.resume({chat.id!r}) goes on with it")


def read() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


asyncio.run(main(*sys.argv[1:]))
