"""Where the time of steps went: by a clock of the test's own, and by a real one around a real engine."""

import asyncio
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.async_engine import AsyncEngine
from engine.batch import Segment, StepPlan
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelFolderError
from engine.loader import load_engine
from engine.step_profile import StepFile, StepRecorder
from engine.types import OpenRequest, Tenant, TurnDone
from kernels.marks import PARTS
from tests.engine.harness import ids_turn
from tests.tools.talking_models import write_endless_model

SLOTS = np.zeros(1, np.int32)


def a_plan(number: int, *lengths: int) -> StepPlan:
    return StepPlan(number, tuple(Segment(n, 0, (0,) * n, SLOTS, None) for n in lengths))


def lines_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_goes_to_the_part_that_is_marked_behind_it(tmp_path) -> None:
    clock = Clock()
    recorder = StepFile(tmp_path / "steps", clock)
    clock.now += 7  # the model loads, its costs are measured
    recorder.mark("linears")
    recorder.start()
    passing = {"idle": 2.0, "host": 0.25, "linears": 1.0, "attention": 0.5, "rest": 0.125, "sampling": 0.0625}
    for part, seconds in passing.items():
        clock.now += seconds
        recorder.mark(part)
    clock.now += 1.0
    recorder.mark("linears")
    clock.now += 0.25
    recorder.end(a_plan(1, 1, 1, 30))
    clock.now += 3.0
    recorder.end(a_plan(2))
    recorder.close()

    first, second = lines_of(tmp_path / "steps")
    counts = {"step": 1, "end_s": 112.1875, "tokens": 32, "segments": 3, "decode_rows": 2}
    assert first == {**counts, "seconds": 5.1875, **passing, "linears": 2.0, "host": 0.5, "copies": 0.0}
    assert second["seconds"] == second["host"] == 3.0
    assert (second["tokens"], second["segments"], second["end_s"]) == (0, 0, 115.1875)


def test_lines_are_written_some_at_once_and_when_there_is_nothing_to_do(tmp_path) -> None:
    recorder, path = StepFile(tmp_path / "steps"), tmp_path / "steps"
    for number in range(StepFile.TOGETHER - 1):
        recorder.end(a_plan(number, 1))
    assert not lines_of(path)
    recorder.end(a_plan(0, 1))
    assert len(lines_of(path)) == StepFile.TOGETHER
    recorder.end(a_plan(0, 1))
    recorder.pause()
    assert len(lines_of(path)) == StepFile.TOGETHER + 1
    recorder.end(a_plan(0, 1))
    recorder.close()
    assert len(lines_of(path)) == StepFile.TOGETHER + 2


def test_what_nobody_asked_for_leaves_nothing_behind() -> None:
    recorder, plan = StepRecorder(), a_plan(1, 1)

    def steps() -> int:
        for _ in range(1000):
            recorder.mark("linears")
            recorder.end(plan)
        return sys.getallocatedblocks()

    steps()
    before = sys.getallocatedblocks()
    assert steps() - before < 20
    assert not vars(recorder)


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_looked_at(tmp_path) -> None:
    for path, reason in ((tmp_path / "no" / "steps", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"no step profile can be written to {path}: {reason}"):
            load_engine(EngineConfig(model=tmp_path / "no model", step_profile=path))
    with pytest.raises(ModelFolderError):
        load_engine(EngineConfig(model=tmp_path / "no model", step_profile=tmp_path / "steps"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_profile_and_not_the_engine(caplog) -> None:
    recorder = StepFile(Path("/dev/full"))
    for number in range(3):
        recorder.end(a_plan(number, 1))
        recorder.pause()
    recorder.close()
    (record,) = caplog.records
    assert record.getMessage() == "the step profile /dev/full ends here: No space left on device"


async def converse(engine: AsyncEngine, pause_s: float) -> int:
    """Two turns with a pause between them.  The number of tokens that were computed for them."""
    chat = await engine.open(Tenant("a"), OpenRequest())
    num_tokens = 0
    events = chat.events()
    for name, prompt in (("one", range(40)), ("two", range(20))):
        await chat.turn(ids_turn(name, tuple(prompt)))
        async for event in events:
            if isinstance(event, TurnDone):
                break
        num_tokens += len(prompt) + 12
        await asyncio.sleep(pause_s)
    return num_tokens - 1  # the last token of all is known and not computed


@pytest.mark.parametrize("run_ahead", [0, 1])
async def test_parts_add_up_to_the_time_that_passed(tmp_path, run_ahead) -> None:
    model, path = write_endless_model(tmp_path / "model"), tmp_path / "steps"
    engine = load_engine(EngineConfig(model, dtype="float32", step_profile=path, run_ahead=run_ahead))
    began = time.monotonic()
    async with engine:
        num_tokens = await converse(engine, 0.2)
    lines = lines_of(path)
    assert sum(line["tokens"] for line in lines) >= num_tokens  # run-ahead may compute one in vain
    for line in lines:
        assert sum(line[part] for part in PARTS) == pytest.approx(line["seconds"], abs=1e-6)
        assert 0 < line["linears"] and 0 < line["attention"] and 0 < line["rest"] and 0 < line["sampling"]
        assert line["copies"] == 0
    assert sum(line["seconds"] for line in lines) == pytest.approx(lines[-1]["end_s"] - began, abs=0.02)
    assert 0.19 < sum(line["idle"] for line in lines[1:]) < 0.19 + time.monotonic() - began
    assert sum(line["idle"] > 0.1 for line in lines[1:]) == 1
    assert {line["decode_rows"] for line in lines} == {0, 1}
