"""How vLLM and llama.cpp are talked to.

Both are sent the whole history every turn, and find in it what they have kept.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from tools.peers.http import events
from tools.workload import Chat

SERVED_NAME = "model"  # under which vLLM serves, whatever the folder is called


class VllmClient:
    """`/v1/completions`.  The cache of prefixes belongs to the server; nothing is opened or closed there."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def open(self) -> Chat:
        return _VllmChat(self._port)

    async def close(self) -> None:
        pass


class _VllmChat:
    def __init__(self, port: int) -> None:
        self._port = port
        self._history: list[int] = []

    async def say(self, token_ids: Sequence[int], reply_tokens: int) -> AsyncIterator[list[int]]:
        self._history += token_ids
        body: dict[str, Any] = {
            "model": SERVED_NAME,
            "prompt": self._history,
            "max_tokens": reply_tokens,
            "min_tokens": reply_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "return_token_ids": True,
        }
        async with aclosing(events(self._port, "/v1/completions", body)) as reply:
            async for event in reply:
                for choice in event["choices"]:
                    ids = choice.get("token_ids") or []
                    self._history += ids
                    yield ids

    async def close(self) -> None:
        pass


class LlamaClient:
    """`/completion` of llama-server.  A conversation has a slot of its own, whose KV stays between turns."""

    def __init__(self, port: int, slots: int) -> None:
        self._port = port
        self._free = list(range(slots))

    async def open(self) -> Chat:
        return _LlamaChat(self._port, self._free)

    async def close(self) -> None:
        pass


class _LlamaChat:
    def __init__(self, port: int, free: list[int]) -> None:
        self._port = port
        self._free = free
        self._slot = free.pop()
        self._history: list[int] = []

    async def say(self, token_ids: Sequence[int], reply_tokens: int) -> AsyncIterator[list[int]]:
        self._history += token_ids
        body: dict[str, Any] = {
            "prompt": self._history,
            "n_predict": reply_tokens,
            "id_slot": self._slot,
            "cache_prompt": True,
            "ignore_eos": True,
            "samplers": ["top_k"],  # only the likeliest: the cheapest way to be greedy
            "top_k": 1,
            "stream": True,
            "return_tokens": True,
        }
        async with aclosing(events(self._port, "/completion", body)) as reply:
            async for event in reply:
                ids = event["tokens"]
                self._history += ids
                yield ids

    async def close(self) -> None:
        self._free.append(self._slot)
