"""A whole server over the parts of a GPU, on a virtual one: put together, warmed up, talked to."""

import asyncio
from dataclasses import replace

import pytest

from engine import loader
from engine.config import EngineConfig
from engine.cuda import parts
from engine.errors import ConfigError
from engine.loader import load_engine, profile_model
from rpc.client import ContinuoClient, Unavailable
from tests.cuda.virtual_device import VirtualDevice
from tests.engine.tiny_model import COSTS
from tests.rpc.conftest import running
from tools.arguments import BUNDLED_MODEL

NAMES = "Otto", "Bella", "Rex", "Luna"  # told apart, the conversations share no blocks
SAID = "My dog is called {}.", "I live in Rome.", "What is my dog called?", "Where do I live?"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """With room for one or two of the conversations below on the device, and for all of them on the host."""
    monkeypatch.setattr(loader, "with_device", lambda config: config)
    monkeypatch.setattr(parts, "TorchDevice", lambda torch_device: VirtualDevice(free_bytes=8 << 30))
    monkeypatch.setattr(parts, "gpu_machine", lambda: "a virtual GPU, beside a CPU")
    monkeypatch.setattr(parts, "gpu_kernels", lambda: "stand-ins")
    return EngineConfig(
        BUNDLED_MODEL,
        device="cuda",
        dtype="float32",
        block_size=16,
        device_kv_tokens=192,
        host_kv_tokens=2048,
        max_step_tokens=64,
        max_concurrent=3,
    )


async def talked(config: EngineConfig) -> tuple[list[str], int, tuple[str, ...]]:
    """What is answered to four conversations that take turns, the tokens that came from the host, and what
    the engine says of itself.
    """
    answers, from_host = [], 0
    async with (
        load_engine(config) as engine,
        running(engine) as server,
        ContinuoClient(server.address) as client,
    ):
        chats = [await client.open() for _ in range(4)]
        for text in SAID:
            for seed, chat in enumerate(chats):
                how = {"temperature": 0.0} if seed % 2 else {"temperature": 1.0, "seed": seed}
                turn = await chat.say(text.format(NAMES[seed]), max_tokens=12, ignore_eos=True, **how)
                answers.append(turn.text)
                from_host += turn.usage.cached_host_tokens
        return answers, from_host, engine.description


async def test_a_server_on_a_gpu_answers_as_one_on_a_cpu_while_kv_comes_and_goes(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_costs", lambda *_: (COSTS, "as told"))  # reloading is the cheaper way
    answers, from_host, description = await talked(config)
    on_cpu = replace(config, device="cpu", device_kv_tokens=4096, host_kv_tokens=0)
    assert answers == (await talked(on_cpu))[0]
    assert from_host > 100
    assert "device cuda, a virtual GPU | float32 | costs as told" in description[1]
    assert description[-1] == "attention: stand-ins"


def test_costs_of_a_gpu_are_measured_and_told_apart_from_those_of_a_cpu(config: EngineConfig) -> None:
    profile = profile_model(config, lambda position: None)
    assert (profile.subject.device, profile.subject.machine) == ("cuda", "a virtual GPU, beside a CPU")
    assert profile.costs.compute_s and profile.costs.load_s and min(profile.costs.load_s.values()) > 0


def test_a_tier_that_a_gpu_cannot_hold_is_refused_with_what_would_fit(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match="of 1,000,000,000 tokens takes .* left by the memory of"):
        load_engine(replace(config, device_kv_tokens=10**9))


async def test_a_kernel_that_fails_while_it_runs_ends_the_engine_and_every_stream_is_told(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel did wrong is told by whatever waits for the device next."""

    def fails(self: VirtualDevice, event: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async with (
        load_engine(config) as engine,
        running(engine) as server,
        ContinuoClient(server.address, retry=False) as client,
    ):
        chats = [await client.open() for _ in range(2)]
        monkeypatch.setattr(VirtualDevice, "synchronize", fails)
        for said in await asyncio.gather(*(chat.say("Hello") for chat in chats), return_exceptions=True):
            assert isinstance(said, Unavailable) and "the server ends: CUDA error: an illegal" in str(said)
        assert "illegal memory access" in str(await asyncio.wait_for(engine.wait_failed(), 5))
