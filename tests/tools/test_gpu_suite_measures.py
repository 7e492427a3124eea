"""What the GPU suite does with a GPU, over stand-ins for one: times are judged, copies arrive, gaps found."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cuda.copies import RunCopier
from tests.cuda.virtual_device import VirtualDevice
from tools.gpu_suite import speeds, targets, throughput, transfers
from tools.gpu_suite.sections import Context
from tools.gpu_suite.timing import Time


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("speeds", True, time.monotonic() + 60, tmp_path / "records.jsonl")


def tiny(new: int, cached: int) -> targets.Attention:
    return targets.Attention("tiny", (new,) * 2, (cached,) * 2, (4, 2, 16), accept_us=5.0, good_us=4.0)


@pytest.mark.parametrize(("us", "status"), [(4.5, "passed"), (6.0, "missed")])
def test_what_is_timed_is_judged(
    context: Context, monkeypatch: pytest.MonkeyPatch, us: float, status: str
) -> None:
    def once(works: list[Any]) -> Time:
        works[-1]()
        return Time(us, 0.01, True)

    monkeypatch.setattr(speeds, "time_works", once)
    monkeypatch.setattr(speeds, "BEYOND_L2", 1e5)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cpu = torch.device("cpu")
    decode = speeds.time_attention(tiny(1, 40), {"matmul_tflops": 700.0}, cpu, context)
    assert (decode["status"], decode["is_good"]) == (status, False)
    assert decode["rivals_us"]["sdpa"] == us and "needs flashinfer" in decode["rivals_us"]["flashinfer"]
    assert "sdpa" not in speeds.time_attention(tiny(8, 40), {}, cpu, context)["rivals_us"]
    rope = targets.RowWise("rope", "rope_kv_write", 40, 16, accept_us=5.0, good_us=4.0)
    assert speeds.time_row_wise(rope, cpu)["status"] == status
    for kernel in ("add_rms_norm", "silu_mul"):
        assert speeds.time_row_wise(targets.RowWise(kernel, kernel, 4, 32), cpu)["accept_us"] is None


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> transfers.Link:
    """Between the host and itself."""
    monkeypatch.setattr("engine.cuda.device.TorchDevice", lambda _: VirtualDevice())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(transfers, "TOTAL", 4 << 20)
    monkeypatch.setattr(transfers, "_REPEATS", 2)
    monkeypatch.setattr(VirtualDevice, "seconds_between", lambda *_: 1e-3)
    return transfers.Link()


def test_copies_of_all_sizes_are_timed_and_arrive(
    link: transfers.Link, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "Link", lambda: link)
    monkeypatch.setattr(transfers, "COPIERS", {"runs": RunCopier})
    monkeypatch.setattr(transfers, "SWAP_IN", (8, 64 << 10))
    assert transfers.run(context)["gbps"]["runs in"]["64 KiB"] == pytest.approx(4.2, abs=0.1)
    cases = {record["case"]: record for record in context.written}
    assert cases["runs both at once, 256 KiB"]["gbps"] == pytest.approx(8.4, abs=0.1)
    assert cases["swap-in of 256 pages of one layer, 8B shape"]["status"] == "missed"
    assert {record["status"] for record in cases.values()} == {"passed", "missed"}
    half = slice(0, transfers.TOTAL)
    link.gbps("runs", transfers.scattered(1 << 20, 64), transfers.IN)  # all of it
    assert link.near[half].sort().values.equal(link.far[half].sort().values)


class At:
    """An event on a clock of milliseconds."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def elapsed_time(self, later: "At") -> float:
        return later.ms - self.ms


def test_the_gap_between_steps_is_from_the_end_of_one_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    figures = throughput.gaps([(At(10 * n), At(10 * n + 7)) for n in range(9)])  # type: ignore[misc]
    assert figures == {"replays": 9, "busy_ms": 7.0, "gap_ms": 3.0, "gap_ms_p90": 3.0}
    assert throughput.gaps([]) == {"replays": 0}
