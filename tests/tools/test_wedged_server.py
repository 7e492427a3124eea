"""A real server process with a step that never ends: health says so, callers hear why, the process ends."""

import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rpc.client import ContinuoClient, Unavailable
from tests.tools.conftest import ROOT

WEDGED = """
import sys, threading
from engine.model_runner import ModelRunner
from tools.cli import main
ModelRunner.run = lambda self, plan, wait_for=None: threading.Event().wait()
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def wedged_server(talking_model, environment, tmp_path):
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            (sys.executable, "-c", WEDGED, "serve", talking_model, "--listen", "127.0.0.1:0")
            + ("--data-dir", "none", "--step-timeout", "0.5")
            + ("--policy", "lru"),  # needs no step before the first turn
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    yield process
    process.kill()
    process.communicate()


async def test_a_server_whose_step_is_stuck_stops_serving_says_so_and_exits_with_one(
    wedged_server, tmp_path
) -> None:
    address = wedged_server.stdout.readline().removeprefix("listening on ").strip()
    async with grpc.aio.insecure_channel(address) as channel, ContinuoClient(address, retry=False) as client:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        chat = await client.open()
        with pytest.raises(Unavailable, match="made no progress for 0.5 s") as failure:
            await chat.say("Are you there?")
        assert failure.value.reason == "ENGINE_STOPPED"
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert wedged_server.wait(timeout=20) == 1
    said = (tmp_path / "stderr").read_text()
    assert "critical: the engine has failed; the server ends" in said
    assert "made no progress for 0.5 s" in said
    assert "Are you there?" not in said
