"""How fast pieces of KV go between pinned memory and the device: by size and way, in, out, and both."""

import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.cuda.copies import COPIERS, Copier, Pieces, RunCopier
from tools.gpu_suite.accuracy import require_equal
from tools.gpu_suite.sections import MISSED, PASSED, Context, Skip
from tools.gpu_suite.targets import SWAP_IN_GBPS

KIB = 1024
SIZES = [size * KIB for size in (4, 8, 16, 24, 28, 32, 64, 128, 256, 1024)]
TOTAL = 64 << 20  # bytes of one call, but for the smallest pieces
_MOST_PIECES = {"runs": 2048, "gather": 8192, "batch": 16384}
_REPEATS = 5
SWAP_IN = 256, 256 * KIB  # pieces: 64 tokens of one layer, K and V of 8 heads of 128 in bfloat16
IN, OUT = "in", "out"


class Link:
    """Memory on both sides, and a copier of each name for each direction, where it works here."""

    def __init__(self) -> None:
        from engine.cuda.device import TorchDevice

        self.device = TorchDevice(torch.device("cuda:0"))
        self.near = self.device.empty((2 * TOTAL,), torch.uint8)
        self.far = self.device.pinned((2 * TOTAL,), torch.uint8)
        self.far.random_()
        self.streams = {IN: self.device.loads, OUT: self.device.stores}
        self._copiers: dict[tuple[str, str], Copier] = {}

    def copier(self, name: str, direction: str) -> Copier:
        """Skip where there is none."""
        if (name, direction) not in self._copiers:
            sides = (self.near, self.far) if direction == IN else (self.far, self.near)
            try:
                self._copiers[name, direction] = COPIERS[name](self.device, *sides)
            except RuntimeError as error:
                raise Skip(str(error)) from None
        return self._copiers[name, direction]

    def gbps(self, name: str, pieces: Pieces, *directions: str) -> float:
        """All directions together; they begin at once and each has its own half of the memory."""
        device = self.device
        copiers = [self.copier(name, direction) for direction in directions]
        rates = []
        for _ in range(_REPEATS):
            torch.cuda.synchronize()
            begun, *ended = (device.event() for _ in range(1 + len(directions)))
            device.record(begun, device.compute)
            for direction in directions:
                device.wait(self.streams[direction], begun)
            for place, (copier, direction, end) in enumerate(zip(copiers, directions, ended, strict=True)):
                shift = place * TOTAL
                mine = Pieces(pieces.to + shift, pieces.source + shift, pieces.num_bytes)
                copier.copy(mine, self.streams[direction])
                device.record(end, self.streams[direction])
            for end in ended:
                device.synchronize(end)
            seconds = max(device.seconds_between(begun, end) for end in ended)
            rates.append(len(directions) * len(pieces.to) * pieces.num_bytes / seconds / 1e9)
            for event in (begun, *ended):
                device.recycle(event)
        return statistics.median(rates)


def run(context: Context) -> dict[str, Any]:
    link = Link()
    by_size: dict[str, dict[str, float]] = {}
    for name in COPIERS:
        for direction in (IN, OUT):
            for size in SIZES:
                context.case(
                    f"{name} {direction} {size // KIB} KiB",
                    lambda n=name, d=direction, s=size: _one_size(link, n, d, s, by_size),
                )
        context.case(f"{name} both at once, 256 KiB", lambda n=name: _both(link, n))
    context.case("swap-in of 256 pages of one layer, 8B shape", lambda: swap_in(link))
    return {"gbps": by_size}


def _one_size(
    link: Link, name: str, direction: str, size: int, by_size: dict[str, dict[str, float]]
) -> dict[str, Any]:
    gbps = round(link.gbps(name, scattered(size, _MOST_PIECES[name]), direction), 1)
    by_size.setdefault(f"{name} {direction}", {})[f"{size // KIB} KiB"] = gbps
    return {"gbps": gbps}


def _both(link: Link, name: str) -> dict[str, Any]:
    pieces = scattered(256 * KIB, _MOST_PIECES[name])
    return {"gbps": round(link.gbps(name, pieces, IN, OUT), 1)}


def swap_in(link: Link) -> dict[str, Any]:
    count, size = SWAP_IN
    gbps: dict[str, float] = {}
    for name in COPIERS:
        try:
            gbps[name] = round(link.gbps(name, scattered(size, count), IN), 1)
        except Skip:
            continue
    accept, good = SWAP_IN_GBPS
    best = max(gbps.values())
    return {
        "status": PASSED if best >= accept else MISSED,
        "gbps": best,
        "accept_gbps": accept,
        "good_gbps": good,
        "is_good": best >= good,
        "by": gbps,
    }


def scattered(size: int, most_pieces: int) -> Pieces:
    """Pieces in random places of TOTAL bytes, of which no two are neighbours on both sides but by chance."""
    places = TOTAL // size
    count = min(places, most_pieces)
    generator = np.random.default_rng(0)
    to, source = (generator.permutation(places)[:count].astype(np.int64) * size for _ in range(2))
    return Pieces(to, source, size)


def dry_run(context: Context) -> dict[str, Any]:
    from kernels.gpu.gather import copy_pieces
    from tools.gpu_suite.compiling import compile_what

    context.case("pieces, run by run", _copy_on_the_host)

    def launch(size: int) -> None:
        memory = torch.empty(2 * TOTAL, dtype=torch.uint8)
        pieces = scattered(size, 64)
        offsets = torch.from_numpy(pieces.to), torch.from_numpy(pieces.source)
        copy_pieces(memory, torch.empty_like(memory), *offsets, size)

    def launches() -> None:
        for size in SIZES:
            launch(size)

    context.case("compiles: copies", lambda: compile_what(launches, lambda: context.left_s))
    return {}


class _Host:
    """Copies at once."""

    def copy(self, to: Tensor, source: Tensor, stream: object) -> None:
        to.copy_(source)


def _copy_on_the_host() -> None:
    source = torch.randint(256, (TOTAL,), dtype=torch.uint8)
    for size, most in ((64 * KIB, 200), (1024 * KIB, 64)):
        to, expected = torch.zeros_like(source), torch.zeros_like(source)
        pieces = scattered(size, most)
        RunCopier(_Host(), to, source).copy(pieces, None)  # type: ignore[arg-type]
        for a, b in zip(pieces.to.tolist(), pieces.source.tolist(), strict=True):
            expected[a : a + size] = source[b : b + size]
        require_equal(to, expected, f"pieces of {size} bytes")
