"""The fastest way is chosen for each direction, and what does not work is left out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.cache.kv_store import KVStore
from engine.cuda import calibration, copies
from engine.cuda.calibration import Calibration, Measurement, calibrated_transfer, choose, moves
from engine.cuda.copies import COPIERS, Pieces, PinnedStore, RunCopier, Tiers, coalesced
from engine.cuda.device import Device, Stream, TorchDevice
from tests.cuda.virtual_device import VirtualDevice

MIB = 1 << 20


def new_tiers(device: Device, num_blocks: int = 12, num_host_blocks: int = 16) -> Tiers:
    kv = KVStore(3, num_blocks, 2, 16, 8, torch.float32, device.empty)
    return Tiers(kv, PinnedStore(device, kv, num_host_blocks))


def measured(way: str, seconds: tuple[float, float], direction: str = "in") -> list[Measurement]:
    """In runs of 1 and of 4."""
    return [Measurement(way, direction, run, MIB, s) for run, s in zip((1, 4), seconds, strict=True)]  # type: ignore[arg-type]


def test_what_takes_the_least_time_over_short_and_long_runs_is_chosen() -> None:
    found = measured("batch", (1.0, 0.1)) + measured("runs", (0.7, 0.5)) + measured("gather", (1.0, 1.0))
    assert choose(found, "in") == "batch"


def test_each_direction_has_its_own_way() -> None:
    found = measured("batch", (1.0, 1.0)) + measured("runs", (2.0, 2.0))
    found += measured("batch", (3.0, 3.0), "out") + measured("runs", (2.0, 2.0), "out")
    assert (choose(found, "in"), choose(found, "out")) == ("batch", "runs")


def test_a_kernel_must_be_faster_by_more_than_what_it_takes_from_others() -> None:
    batch = measured("batch", (1.0, 1.0))
    assert choose(batch + measured("gather", (0.9, 0.9)), "in") == "batch"
    assert choose(batch + measured("gather", (0.5, 0.5)), "in") == "gather"


def test_as_many_bytes_count_the_same_in_every_run() -> None:
    long = Measurement("batch", "in", 4, 4 * MIB, 4.0)  # four times the bytes of the other
    assert choose([long, Measurement("runs", "in", 4, MIB, 1.1)], "in") == "batch"


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="no way of copying was measured out"):
        choose(measured("batch", (1.0, 1.0)), "out")


@pytest.mark.parametrize("run_length", [1, 4])
def test_blocks_lie_in_runs_of_the_length_that_is_measured(run_length: int) -> None:
    tiers = new_tiers(VirtualDevice())
    chosen = moves(12, run_length)
    assert len({move.device_slot for move in chosen}) == len({move.host_slot for move in chosen}) == 12
    runs = coalesced(tiers.loads(chosen, range(3)))
    assert set(runs.num_bytes.tolist()) == {run_length * tiers.piece_bytes}


def slow(seconds: float) -> Callable[[Device, Tensor, Tensor], RunCopier]:
    """As RunCopier, but so much slower on the clock that calibration looks at."""

    class Slow(RunCopier):
        def copy(self, pieces: Pieces, stream: Stream) -> None:
            super().copy(pieces, stream)
            Clock.now += seconds

    return Slow


class Clock:
    """Moves as copies tell it to."""

    now = 0.0

    @classmethod
    def perf_counter(cls) -> float:
        cls.now += 1e-6
        return cls.now


def test_the_fastest_that_works_carries_out_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {
        "batch": copies.BatchCopier,
        "a": slow(0.02),
        "b": slow(0.01),
    }  # without a driver, the first fails
    monkeypatch.setattr(copies, "batch_function", no_driver)
    monkeypatch.setattr(calibration, "COPIERS", ways)
    monkeypatch.setattr(calibration, "time", Clock)
    device = VirtualDevice()
    tiers = new_tiers(device)
    transfer, found = calibrated_transfer(device, tiers)
    assert (found.way_in, found.way_out) == ("b", "b")
    num_bytes = 12 * 3 * tiers.piece_bytes
    assert found.in_gbps == pytest.approx(num_bytes / 0.01 / 1e9, rel=0.01)
    assert found.both_gbps == pytest.approx(num_bytes / 0.02 / 1e9, rel=0.01)
    assert "in 0.0 GB/s (b)" in found.describe()
    assert not device.num_lent_events
    begun = Clock.now
    transfer.store(moves(12, 1))
    transfer.load([]).finish()
    assert Clock.now - begun == pytest.approx(0.01, rel=0.1)


def no_driver() -> None:
    raise RuntimeError("no CUDA driver that copies in batches")


def test_a_machine_on_which_nothing_can_be_copied_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "batch_function", no_driver)
    monkeypatch.setattr(calibration, "COPIERS", {"batch": copies.BatchCopier})
    device = VirtualDevice()
    with pytest.raises(RuntimeError, match="no CUDA driver"):
        calibrated_transfer(device, new_tiers(device))


@pytest.mark.parametrize("num_blocks", [(2, 1), (3, 9)])
def test_tiers_of_few_blocks_are_measured_with_what_they_have(
    num_blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "COPIERS", {"runs": RunCopier})
    device = VirtualDevice()
    _, found = calibrated_transfer(device, new_tiers(device, *num_blocks))
    assert found.in_gbps > 0 and found.out_gbps > 0 and found.both_gbps > 0


def test_people_are_told_both_directions() -> None:
    told = Calibration("batch", "gather", 51.25, 48.0, 83.4).describe()
    assert told == "copies in 51.2 GB/s (batch), out 48.0 GB/s (gather), both at once 83.4 GB/s"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_calibrated() -> None:
    device = TorchDevice(torch.device("cuda:0"))
    _, found = calibrated_transfer(device, new_tiers(device, 256, 256))
    assert {found.way_in, found.way_out} <= set(COPIERS)
    assert min(found.in_gbps, found.out_gbps, found.both_gbps) > 0
