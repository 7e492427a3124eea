"""Whole engines on a GPU: their tokens are the CPU's, whatever becomes of the KV, and no step waits for the
device.
"""

import asyncio
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.types import OpenRequest, SamplingParams, TurnId, TurnRequest
from tests.gpu.histories import SYSTEM, TENANT, Played, heard, load, play

pytestmark = pytest.mark.gpu
SMALL = {"device_kv_tokens": 448}  # a few of five conversations; the longest one fits


def played(folder: Path, device: str, seed: int = 0, **settings: object) -> Played:
    async def run() -> Played:
        async with load(folder, device, **settings) as engine:
            return await play(engine, seed)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def expected(folder: Path) -> Played:
    """What the CPU says, with room for everything and nothing kept."""
    return played(folder, "cpu", stateless=True)


def test_tokens_are_those_of_the_cpu(folder: Path, device: str, expected: Played) -> None:
    assert len(expected.replies) > 25
    assert played(folder, device).replies == expected.replies


def test_tokens_are_the_same_when_blocks_are_dropped_and_computed_again(
    folder: Path, device: str, expected: Played
) -> None:
    found = played(folder, device, **SMALL)
    assert found.replies == expected.replies
    assert found.total("evicted_tokens") > 100


@pytest.mark.parametrize("block_size", [16, 32])
def test_tokens_are_the_same_when_blocks_go_to_the_host_and_come_back(
    folder: Path, device: str, expected: Played, block_size: int
) -> None:
    found = played(folder, device, **SMALL, host_kv_tokens=4096, block_size=block_size)
    assert found.replies == expected.replies
    assert found.total("cached_host_tokens") > 100


def test_tokens_are_the_same_under_another_policy(folder: Path, device: str, expected: Played) -> None:
    found = played(folder, device, **SMALL, host_kv_tokens=4096, policy="lru")
    assert found.replies == expected.replies
    assert found.total("cached_host_tokens") > 100


def test_no_step_waits_for_the_device(folder: Path, device: str, is_virtual: bool, expected: Played) -> None:
    if is_virtual:
        pytest.skip("only CUDA can tell")

    async def run() -> Played:
        async with load(folder, device, **SMALL, host_kv_tokens=4096) as engine:
            await play(engine, 1, conversations=2, turns=2)
            with waits_forbidden():
                return await play(engine, 0)

    assert asyncio.run(run()).replies == expected.replies


@contextmanager
def waits_forbidden() -> Iterator[None]:
    """In the body, a copy or a call that waits for the device without saying so raises."""
    with warnings.catch_warnings():  # of its being a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_draw_does_not_depend_on_who_else_draws(folder: Path, device: str) -> None:
    def drawn(seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=0.9, top_k=40 * (seed % 2), top_p=0.95, seed=seed, max_tokens=24, ignore_eos=True
        )

    async def run() -> tuple[list[list[int]], list[list[int]]]:
        async with load(folder, device) as engine:

            async def say(seed: int) -> list[int]:
                chat = await engine.open(TENANT, OpenRequest())
                await chat.turn(TurnRequest(TurnId("t"), token_ids=(*SYSTEM, seed), sampling=drawn(seed)))
                return (await heard(chat))[0]

            together = await asyncio.gather(*(say(seed) for seed in range(6)))
            return together, [await say(seed) for seed in range(6)]

    together, alone = asyncio.run(run())
    assert together == alone
    assert len({tuple(reply) for reply in alone}) > 4


def test_a_cancelled_reply_leaves_no_trace(folder: Path, device: str) -> None:
    """It is cancelled while a step that continues it is under way."""

    async def run() -> tuple[list[int], list[int]]:
        async with load(folder, device) as engine:

            async def reply(cancelled: bool) -> list[int]:
                chat = await engine.open(TENANT, OpenRequest())
                if cancelled:
                    sampling = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
                    await chat.turn(TurnRequest(TurnId("a"), token_ids=SYSTEM, sampling=sampling))
                    await asyncio.sleep(0.02)
                    await chat.cancel(TurnId("a"), keep=False)
                    with pytest.raises(Exception, match="cancel"):
                        await heard(chat)
                sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
                await chat.turn(TurnRequest(TurnId("b"), token_ids=(*SYSTEM, 7), sampling=sampling))
                return (await heard(chat))[0]

            return await reply(False), await reply(True)

    straight, after = asyncio.run(run())
    assert straight == after


def test_more_kv_than_there_is_memory_is_refused_with_sizes_that_fit(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=r"tokens|GiB"):
        load(folder, device, device_kv_tokens=10**12)
