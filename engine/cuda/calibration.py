"""Which way of copying is the fastest between this host and this GPU, for this model's blocks: found at the
start, in a few tens of milliseconds, for it changes with the driver, the link and the size of a piece.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from engine.cache.block import BlockMove
from engine.cuda.copies import CHUNK, COPIERS, Copier, Pieces, Tiers
from engine.cuda.device import Device, Stream
from engine.cuda.transfer import CudaTransfer

Direction = Literal["in", "out"]

NUM_BYTES = 8 << 20
"""Copied at once, if the tiers hold so many."""
RUN_LENGTHS = 1, 4
"""Blocks that lie side by side on both tiers."""
REPEATS = 3
KERNEL_HANDICAP = 1.3
"""A kernel that copies keeps multiprocessors from the model.  Unmeasured here; with others' engines it cost a
whole server 5 to 30 percent.
"""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The least time, from the call until the last byte was there."""

    way: str  # a key of COPIERS
    direction: Direction
    run_length: int
    num_bytes: int
    seconds: float

    @property
    def gbps(self) -> float:
        return self.num_bytes / self.seconds / 1e9


@dataclass(frozen=True, slots=True)
class Calibration:
    """The ways that were chosen and what they reach, in GB/s (10^9 bytes), with blocks scattered over both
    tiers.
    """

    way_in: str
    way_out: str
    in_gbps: float
    out_gbps: float
    both_gbps: float  # together, while both run

    def describe(self) -> str:
        """For people."""
        return (
            f"copies in {self.in_gbps:.1f} GB/s ({self.way_in}), out {self.out_gbps:.1f} GB/s "
            f"({self.way_out}), both at once {self.both_gbps:.1f} GB/s"
        )


def choose(measurements: Iterable[Measurement], direction: Direction) -> str:
    """The way that takes the least time for the same bytes in short and in long runs.  ValueError if nothing
    was measured.
    """
    seconds: dict[str, float] = {}
    for one in measurements:
        if one.direction == direction:
            handicap = KERNEL_HANDICAP if one.way == "gather" else 1.0
            seconds[one.way] = seconds.get(one.way, 0.0) + handicap * one.seconds / one.num_bytes
    if not seconds:
        raise ValueError(f"no way of copying was measured {direction}")
    return min(seconds, key=lambda way: seconds[way])


def calibrated_transfer(device: Device, tiers: Tiers) -> tuple[CudaTransfer, Calibration]:
    """With the ways of copying that are the fastest.  The tiers hold nothing of worth afterwards.

    Raises what the last way raised if none works.
    """
    copiers = _Copiers(device, tiers)
    found = [one for direction in _DIRECTIONS for one in copiers.measure(direction)]
    way_in, way_out = choose(found, "in"), choose(found, "out")
    copy_in, copy_out = copiers.by_name["in"][way_in], copiers.by_name["out"][way_out]
    scattered = {(one.way, one.direction): one.gbps for one in found if one.run_length == RUN_LENGTHS[0]}
    calibration = Calibration(
        way_in,
        way_out,
        scattered[way_in, "in"],
        scattered[way_out, "out"],
        copiers.both_gbps(copy_in, copy_out),
    )
    for one in found:
        _logger.debug("%s %s in runs of %d: %.1f GB/s", one.way, one.direction, one.run_length, one.gbps)
    return CudaTransfer(device, tiers, storing=copy_out, loading=copy_in), calibration


def moves(num_blocks: int, run_length: int) -> list[BlockMove]:
    """Of `num_blocks` blocks at most: runs that are ascending on one tier and descending on the other, so
    that no two of them meet.
    """
    num_runs = num_blocks // run_length
    return [
        BlockMove(run * run_length + i, (num_runs - 1 - run) * run_length + i)
        for run in range(num_runs)
        for i in range(run_length)
    ]


_DIRECTIONS: tuple[Direction, ...] = ("in", "out")
_Work = tuple[Copier, Direction, Pieces]


class _Copiers:
    def __init__(self, device: Device, tiers: Tiers) -> None:
        self._device, self._tiers = device, tiers
        self.by_name: dict[Direction, dict[str, Copier]] = {"in": {}, "out": {}}

    def measure(self, direction: Direction) -> Iterator[Measurement]:
        """Every way that works here."""
        tiers, failure = self._tiers, None
        to, source = (tiers.device, tiers.host) if direction == "in" else (tiers.host, tiers.device)
        for way, new in COPIERS.items():
            try:
                copier = new(self._device, to, source)
                self._seconds((copier, direction, self._pieces(direction, 1)))  # a kernel is compiled, say
            except (RuntimeError, ValueError) as error:
                _logger.info("copies %s by %s are left out: %s", direction, way, error)
                failure = error
                continue
            self.by_name[direction][way] = copier
            for run_length in RUN_LENGTHS:
                pieces = self._pieces(direction, run_length)
                if size := len(pieces.to) * pieces.num_bytes:
                    seconds = min(self._seconds((copier, direction, pieces)) for _ in range(REPEATS))
                    yield Measurement(way, direction, run_length, size, seconds)
        if failure is not None and not self.by_name[direction]:
            raise failure

    def both_gbps(self, copy_in: Copier, copy_out: Copier) -> float:
        """Each with blocks of its own."""
        chosen = self._moves(1)
        half, layers = len(chosen) // 2, self._layers(len(chosen))
        inward = self._tiers.loads(chosen[:half] or chosen, layers)
        outward = self._tiers.stores(chosen[half:], layers)
        works: list[_Work] = [(copy_in, "in", inward), (copy_out, "out", outward)]
        num_bytes = (len(inward.to) + len(outward.to)) * self._tiers.piece_bytes
        return num_bytes / min(self._seconds(*works) for _ in range(REPEATS)) / 1e9

    def _moves(self, run_length: int) -> list[BlockMove]:
        tiers = self._tiers
        num_blocks = len(tiers.device) // (tiers.num_layers * tiers.piece_bytes)
        num_host_blocks = len(tiers.host) // (tiers.num_layers * tiers.piece_bytes)
        wanted = max(CHUNK, NUM_BYTES // tiers.piece_bytes)  # all of one layer, if there are so many
        return moves(min(num_blocks, num_host_blocks, wanted), run_length)

    def _layers(self, num_moves: int) -> range:
        """As many as it takes."""
        tiers = self._tiers
        return range(min(tiers.num_layers, max(1, NUM_BYTES // (max(1, num_moves) * tiers.piece_bytes))))

    def _pieces(self, direction: Direction, run_length: int) -> Pieces:
        chosen = self._moves(run_length)
        of = self._tiers.loads if direction == "in" else self._tiers.stores
        return of(chosen, self._layers(len(chosen)))

    def _seconds(self, *works: _Work) -> float:
        """Until all of it is done."""
        device = self._device
        streams: dict[Direction, Stream] = {"in": device.loads, "out": device.stores}
        ends = [device.event() for _ in works]
        begun = time.perf_counter()
        for (copier, direction, pieces), end in zip(works, ends, strict=True):
            copier.copy(pieces, streams[direction])
            device.record(end, streams[direction])
        for end in ends:
            device.synchronize(end)
        seconds = time.perf_counter() - begun
        for end in ends:
            device.recycle(end)
        return seconds
