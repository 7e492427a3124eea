"""A real `continuo serve` with the bundled model, a process of its own, and what clients hold against it."""

from pathlib import Path

from rpc.client import ContinuoClient
from tools.server_process import ServerProcess

GREEDY = {"temperature": 0.0, "ignore_eos": True}


async def start(data_dir: Path | str, *flags: object) -> ServerProcess:
    arguments = ("--listen", "127.0.0.1:0", "--data-dir", data_dir, "--threads", 1, *flags)
    return await ServerProcess.start(*map(str, arguments))


def resident_bytes(server: ServerProcess) -> int:
    """Anonymous memory: what is mapped from files, the system can take back."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


async def history(client: ContinuoClient, fresh: ContinuoClient, id: str) -> list[int]:
    """The tokens of a conversation.  Every reply in it is what `fresh`, a server that keeps nothing, says to
    the tokens before it; one that was cut short is the beginning of that.
    """
    tokens: list[int] = []
    for turn in (await client.get(id))[1]:
        tokens += turn.prompt_token_ids
        if reply := tuple(turn.reply_token_ids):
            whole = await fresh.generate(token_ids=tokens, max_tokens=len(reply), **GREEDY)
            assert reply == whole.token_ids, f"the reply behind {len(tokens)} tokens of {id} is another one"
        tokens += reply
    return tokens
