"""Copies blocks between the tiers on streams of their own, while kernels run.

What a copy may rely on, for the cache manager sees to it: slots of a step that has not been collected are
handed out to nobody, but for device slots whose blocks leave in that very step or one after it.  So a copy
has nothing to wait for in the kernels that were launched before it and runs beside them; what has to be
ordered is copies with each other, and kernels behind copies.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.cache.block import BlockMove
from engine.cuda.copies import Copier, Tiers
from engine.cuda.device import Device, Event, Stream

LEAST_BYTES = 1 << 20
"""Layers are loaded together until a call copies so many.  Unmeasured."""


@dataclass(frozen=True, slots=True, eq=False)
class _Storing:
    """Stores that may not have ended: nothing else may be written to these device slots before `done`."""

    slots: frozenset[int]
    done: Event


class CudaTransfer:
    """A TransferEngine whose copies never fail.  One thread calls it.

    It must be called for every step that is launched while copies have not been collected, copies or not:
    the kernels of that step may write where something is stored from, or read what was loaded.
    """

    def __init__(
        self,
        device: Device,
        tiers: Tiers,
        *,
        storing: Copier,
        loading: Copier,
        least_bytes: int = LEAST_BYTES,
    ) -> None:
        """`storing` copies from the slab of the device to that of the host, `loading` back: as many layers
        at once as come to `least_bytes`.
        """
        self._device, self._tiers = device, tiers
        self._copy_out, self._copy_in = storing, loading
        self._least_bytes = least_bytes
        self._storing: list[_Storing] = []  # in order, not collected
        self._loading: list[CudaLoading] = []  # as well
        self._overwritten: frozenset[int] = frozenset()  # in the step that is being launched
        self._stored: list[_Storing] = []  # by it

    def store(self, moves: Sequence[BlockMove], overwritten: Collection[int] = ()) -> frozenset[BlockMove]:
        device = self._device
        for loading in self._loading:
            loading.wait_for_all()
        self._overwritten = frozenset(overwritten)
        if moves:
            layers = range(self._tiers.num_layers)
            self._copy_out.copy(self._tiers.stores(moves, layers), device.stores)
            stored = _Storing(frozenset(move.device_slot for move in moves), device.event())
            device.record(stored.done, device.stores)
            self._storing.append(stored)
            self._stored.append(stored)
        return frozenset()

    def load(self, moves: Sequence[BlockMove]) -> "CudaLoading":
        to = frozenset(move.device_slot for move in moves)
        self._wait_for_stores(self._device.loads, to)
        # Kernels do not write to what is loaded before they have waited for that.
        self._wait_for_stores(self._device.compute, self._overwritten - to)
        stored, self._stored = self._stored, []
        self._overwritten = frozenset()
        loading = CudaLoading(self, self._device, stored, self._load(moves))
        self._loading.append(loading)
        return loading

    def _load(self, moves: Sequence[BlockMove]) -> "_Layers":
        device, tiers = self._device, self._tiers
        if not moves:
            return _Layers(1, [])
        num_together = max(1, self._least_bytes // (len(moves) * tiers.piece_bytes))
        events = [device.event()]
        device.record(events[0], device.loads)
        for first in range(0, tiers.num_layers, num_together):
            layers = range(first, min(first + num_together, tiers.num_layers))
            self._copy_in.copy(tiers.loads(moves, layers), device.loads)
            events.append(device.event())
            device.record(events[-1], device.loads)
        return _Layers(num_together, events)

    def _wait_for_stores(self, stream: Stream, slots: frozenset[int]) -> None:
        """The stream goes on when nothing is stored from these slots any more."""
        for storing in reversed(self._storing):
            if storing.slots & slots:
                self._device.wait(stream, storing.done)  # and with it for those before
                return

    def collected(self, loading: "CudaLoading", stored: Sequence[_Storing]) -> None:
        """A step has ended, and with it these copies."""
        self._loading.remove(loading)
        for storing in stored:
            self._storing.remove(storing)


@dataclass(frozen=True, slots=True)
class _Layers:
    num_together: int
    events: list[Event]  # the beginning, and the end of each group of layers; none without loads


class CudaLoading:
    """The copies of one step.  `seconds` is what the loads took on their stream, known at the end."""

    def __init__(
        self, transfer: CudaTransfer, device: Device, stored: Sequence[_Storing], loaded: _Layers
    ) -> None:
        self._transfer, self._device = transfer, device
        self._stored, self._loaded = stored, loaded
        self._num_waited = 0  # groups of layers that the kernels wait for
        self.seconds = 0.0

    def wait_for(self, layer: int) -> None:
        """The kernels that are launched from now on find that layer, and those before it."""
        group, events = layer // self._loaded.num_together, self._loaded.events
        if group >= self._num_waited:
            self._device.wait(self._device.compute, events[group + 1])
            self._num_waited = group + 1

    def wait_for_all(self) -> None:
        """The same of every layer, if the step itself did not need them."""
        if self._num_waited < len(self._loaded.events) - 1:
            self._device.wait(self._device.compute, self._loaded.events[-1])
            self._num_waited = len(self._loaded.events) - 1

    def finish(self) -> frozenset[BlockMove]:
        device, events = self._device, self._loaded.events
        if events:
            device.synchronize(events[-1])
            self.seconds = device.seconds_between(events[0], events[-1])
        if self._stored:
            device.synchronize(self._stored[-1].done)
        self._transfer.collected(self, self._stored)
        for event in (*events, *(storing.done for storing in self._stored)):
            device.recycle(event)
        return frozenset()
