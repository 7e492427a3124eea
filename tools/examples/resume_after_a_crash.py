"""A server dies by kill -9 in the middle of a reply; the loop that reads it goes on with the next server.

python resume_after_a_crash.py [MODEL]     # starts both servers itself
"""

import asyncio
import subprocess
import sys
import tempfile

from rpc.client import ContinuoClient

ADDRESS = "127.0.0.1:50077"


def serve(data_dir: str, *model: str) -> "subprocess.Popen[str]":
    options = ["--listen", ADDRESS, "--data-dir", data_dir, "--log-level", "warning", "--until-eof"]
    command = [sys.executable, "-m", "tools.cli", "serve", *model, *options]  # `continuo serve ...`
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if server.stdout is None or not server.stdout.readline():  # "listening on HOST:PORT"
        sys.exit("the server did not start")
    return server


async def main(data_dir: str, *model: str) -> None:
    servers = [serve(data_dir, *model)]
    async with ContinuoClient(ADDRESS) as client:
        chat = await client.open("Be brief.", temperature=0.0, max_tokens=20)
        await chat.say("My cat is called Miso.")
        async for delta in chat.say("What is my cat called?"):
            print("\n[again]" * delta.restarted, delta.text, sep="", end="", flush=True)
            if len(servers) == 1:
                servers[0].kill()
                servers.append(await asyncio.to_thread(serve, data_dir, *model))
        print(f"\n{chat.id}: {chat.committed_turns} turns are on disk")
    servers[-1].terminate()


with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(folder, *sys.argv[1:]))
