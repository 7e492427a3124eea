"""The engines that are compared: how each is started, with what, and how it is talked to.

Every engine has room for 32 conversations of 2,112 tokens at once, computes in bfloat16 on all
cores, and runs with the settings that were measured to be its best on a CPU.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rpc.client import ContinuoClient, ContinuoError
from tools.peers.clients import SERVED_NAME, LlamaClient, VllmClient
from tools.peers.http import PeerError
from tools.workload import Client, OverGrpc, WorkloadFailed, opened, say

ROOT = Path(__file__).resolve().parents[2]
SLOTS = 32
SLOT_TOKENS = 2304  # what a conversation of the longest workload needs, and some
KV_TOKENS = 98_304  # of Continuo, which keeps some free: less than vLLM has of llama-160m
VLLM_KV_GIB = {"llama-160m": 4, "qwen2.5-0.5b": 2}
START_S = 400.0  # the slowest compiles for minutes when it starts for the first time
END_S = 20.0
NAMES = ("continuo", "stateless", "vllm", "llama.cpp")
PEERS = ("vllm", "llama.cpp")


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start an engine, and how to talk to it when it runs."""

    name: str
    command: tuple[str, ...]
    client: Callable[[], Client]
    port: int
    environment: dict[str, str] = field(default_factory=dict)

    def told(self) -> str:
        """The command line as it would be typed in the checkout, the environment before it."""
        words = [*(f"{name}={value}" for name, value in self.environment.items()), *self.command]
        return " ".join(words).replace(f"{ROOT}/", "")


def launch(name: str, shape: str, model: Path, peers: Path, port: int) -> Launch:
    """`name` is one of NAMES; `model` is a folder of `shape`, `peers` what `setup` has made."""
    cores = os.cpu_count() or 1
    if name == "vllm":
        return Launch(
            name,
            (
                *(str(peers / "vllm/bin/python"), "-m", "vllm.entrypoints.openai.api_server"),
                *("--model", str(model), "--served-model-name", SERVED_NAME, "--host", "127.0.0.1"),
                *("--port", str(port), "--dtype", "auto", "--max-model-len", "4096"),
                *("--max-num-seqs", str(SLOTS), "--generation-config", "vllm"),
                *("--enable-prefix-caching", "--block-size", "32"),
            ),
            lambda: VllmClient(port),
            port,
            {
                "VLLM_CPU_KVCACHE_SPACE": str(VLLM_KV_GIB[shape]),
                "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
                "LD_PRELOAD": str(peers / "vllm/lib/libiomp5.so"),
                "VLLM_CACHE_ROOT": str(peers / "vllm-cache"),
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            },
        )
    if name == "llama.cpp":
        return Launch(
            name,
            (
                *(str(peers / "llama-build/bin/llama-server"), "-m", str(peers / f"{shape}.gguf")),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("-np", str(SLOTS), "-c", str(SLOTS * SLOT_TOKENS), "-t", str(cores), "-tb", str(cores)),
                *("-ngl", "0", "-fa", "auto", "--no-kv-unified", "--cache-ram", "0"),
                *("-ctk", "f16", "-ctv", "f16"),
            ),
            lambda: LlamaClient(port, SLOTS),
            port,
        )
    address = f"127.0.0.1:{port}"
    return Launch(
        name,
        (
            *(sys.executable, "-m", "tools.cli", "serve", str(model), "--listen", address),
            *("--data-dir", "none", "--dtype", "bfloat16", "--device-kv-tokens", str(KV_TOKENS)),
            *(["--stateless"] if name == "stateless" else []),
        ),
        lambda: OverGrpc(ContinuoClient(address, retry=False)),
        port,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EngineFailed(Exception):
    """An engine's server did not start."""


class Running:
    """An engine's server, all of whose processes end with `stop`.  Made by `start`."""

    def __init__(self, launched: Launch, process: asyncio.subprocess.Process) -> None:
        self.name = launched.name
        self._process = process
        self.client = launched.client()
        self.start_s = 0.0

    @classmethod
    async def start(cls, launched: Launch) -> Self:
        """Returns when a token was served; `start_s` says after how long.  Raises EngineFailed."""
        with tempfile.TemporaryFile() as log:
            begun = time.perf_counter()
            process = await asyncio.create_subprocess_exec(
                *launched.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**_clean_environment(), **launched.environment},
                start_new_session=True,
            )
            server = cls(launched, process)
            try:
                await asyncio.wait_for(server._first_token(launched.port), START_S)
            except BaseException as error:
                await server.stop()
                if not isinstance(error, TimeoutError | EngineFailed):
                    raise
                log.seek(0)
                said = log.read().decode(errors="replace").splitlines()[-12:]
                raise EngineFailed("\n".join([f"{launched.name} does not serve:", *said])) from error
            server.start_s = time.perf_counter() - begun
            return server

    @property
    def pid(self) -> int:
        return self._process.pid

    async def stop(self) -> None:
        await self.client.close()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), END_S)
        self._signal(signal.SIGKILL)  # whatever it has left behind
        await self._process.wait()

    async def _first_token(self, port: int) -> None:
        while not _answers(port):
            self._check()
            await asyncio.sleep(0.01)
        while True:
            self._check()
            try:
                async with opened(self.client) as chat:
                    await say(chat, [11, 12, 13], 1)
                return
            except (PeerError, OSError, ContinuoError, WorkloadFailed):  # still loading
                await asyncio.sleep(0.05)

    def _check(self) -> None:
        if self._process.returncode is not None:
            raise EngineFailed(self.name)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _clean_environment() -> dict[str, str]:
    """Ours without what would change how many threads compute and how they wait."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "KMP_", "GOMP_", "VLLM_", "LD_PRELOAD", "PYTHONPATH"))
    }
