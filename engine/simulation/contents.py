"""A model whose replies depend on every KV entry that it attends to, so that a wrong cache changes the text.

It has two layers.  The KV of the first follows from token and position, that of the second from the KV of
the first at all positions so far, and the token that is chosen from the KV of the second at all positions.
All is arithmetic on 64 bits; a step is a few operations on arrays.
"""

import random
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.batch import Collect, StepPlan, StepResult, at_once
from engine.cache.block import BlockMove
from engine.errors import InvariantError

VOCAB = 4096
EOS_IDS = frozenset(range(VOCAB - 128, VOCAB))

_MASK = (1 << 64) - 1
_A, _B, _C, _D = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93, 0x27D4EB2F165667C5
_Words = NDArray[np.uint64]


def _mixed(a: int, b: int) -> int:
    x = (a * _A + b * _B + _C) & _MASK
    x ^= x >> 32
    return x * _D & _MASK


def _mixed_all(a: _Words, b: _Words) -> _Words:
    """The same for arrays, which wrap around by themselves."""
    x = a * np.uint64(_A) + b * np.uint64(_B) + np.uint64(_C)
    x ^= x >> np.uint64(32)
    return x * np.uint64(_D)


def _token(attended: int, position: int) -> int:
    return (_mixed(attended, position) >> 20) % VOCAB


def stateless_reply(history: Sequence[int], max_new: int) -> list[int]:
    """What a fresh run over `history` replies: nothing is cached, shared, copied or evicted here."""
    first = second = 0  # what has been attended to, by layer
    reply: list[int] = []
    for position in range(len(history) + max_new):
        if position >= len(history):
            reply.append(_token(second, position))
            if reply[-1] in EOS_IDS:
                break
        token = history[position] if position < len(history) else reply[-1]
        kv = _mixed(token, position)
        first = (first + _mixed(kv, position)) & _MASK
        kv = _mixed(first, kv)
        second = (second + _mixed(kv, position)) & _MASK
    return reply


class ContentRunner:
    """KV of both layers in `kv` [2, num_blocks * block_size]."""

    def __init__(self, num_blocks: int, block_size: int, rng: random.Random) -> None:
        self.kv = _garbage(num_blocks, block_size, rng)
        self._block_size = block_size
        self._offsets = np.arange(block_size)
        self._last: dict[int, int] = {}  # of the step before

    def launch(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> Collect:
        return at_once(self.run(plan, wait_for))

    def run(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> StepResult:
        segments, size = plan.segments, self._block_size
        ids = np.array(
            [id for s in segments for id in (s.token_ids or (self._last[s.row],))], dtype=np.uint64
        )
        num_blocks = np.array([len(s.slots) for s in segments])
        lengths = np.array([s.length for s in segments])
        slots = np.concatenate([s.slots for s in segments])
        if slots.min() < 0:
            raise InvariantError(f"step {plan.number} attends to a block without KV")
        # One row of all positions of all segments; a segment's begin at `starts`.
        places = (slots[:, None] * size + self._offsets).ravel()
        starts = np.cumsum(num_blocks * size) - num_blocks * size
        positions = (np.arange(len(places)) - np.repeat(starts, num_blocks * size)).astype(np.uint64)
        begins = starts + np.array([s.first for s in segments])
        new = np.arange(len(ids)) + np.repeat(begins - np.cumsum(lengths) + lengths, lengths)
        owners = np.repeat(starts, lengths)
        first, second = self.kv
        wait_for = wait_for or (lambda layer: None)
        wait_for(0)
        first[places[new]] = _mixed_all(ids, positions[new])
        attended = _attended(first[places], positions)
        wait_for(1)
        second[places[new]] = _mixed_all(attended[new + 1] - attended[owners], first[places[new]])
        attended = _attended(second[places], positions)
        self._last = {}
        for segment, start in zip(segments, starts.tolist(), strict=True):
            if segment.draw is not None:
                end = segment.first + segment.length
                seen = (int(attended[start + end]) - int(attended[start])) & _MASK
                self._last[segment.row] = _token(seen, end)
        return StepResult(self._last)


class ContentTransfer:
    """Copies blocks between a runner's KV and a host tier, in any order of the stores and then of the loads.
    The next `num_to_fail` copies fail and leave garbage behind.
    """

    def __init__(self, runner: ContentRunner, num_host_blocks: int, rng: random.Random) -> None:
        block_size = runner._block_size
        self._device = runner.kv.reshape(2, -1, block_size)
        self._host = _garbage(num_host_blocks, block_size, rng).reshape(2, -1, block_size)
        self._rng = rng
        self.num_to_fail = 0

    def store(self, moves: Sequence[BlockMove], overwritten: Collection[int] = ()) -> frozenset[BlockMove]:
        failed = self._failing(moves)
        for move in self._in_any_order(moves):
            kept = self._device[:, move.device_slot]
            self._host[:, move.host_slot] = ~kept if move in failed else kept
        return failed

    def load(self, moves: Sequence[BlockMove]) -> "ContentLoading":
        return ContentLoading(self, self._in_any_order(moves), self._failing(moves))

    def load_layer(self, layer: int, moves: Sequence[BlockMove], failed: frozenset[BlockMove]) -> None:
        for move in moves:
            kept = self._host[layer, move.host_slot]
            self._device[layer, move.device_slot] = ~kept if move in failed else kept

    def _in_any_order(self, moves: Sequence[BlockMove]) -> Sequence[BlockMove]:
        return self._rng.sample(moves, len(moves)) if len(moves) > 1 else moves

    def _failing(self, moves: Sequence[BlockMove]) -> frozenset[BlockMove]:
        failed = frozenset(self._in_any_order(moves)[: self.num_to_fail])
        self.num_to_fail -= len(failed)
        return failed


class ContentLoading:
    """A layer is there once it was waited for, not before."""

    seconds = 0.0

    def __init__(
        self, transfer: ContentTransfer, moves: Sequence[BlockMove], failed: frozenset[BlockMove]
    ) -> None:
        self._transfer, self._moves, self._failed = transfer, moves, failed
        self._num_loaded = 0  # layers

    def wait_for(self, layer: int) -> None:
        self._transfer.load_layer(layer, self._moves, self._failed)
        self._num_loaded = layer + 1

    def finish(self) -> frozenset[BlockMove]:
        for layer in range(self._num_loaded, 2):
            self.wait_for(layer)
        return self._failed


def _attended(kv: _Words, positions: _Words) -> _Words:
    """Sums of what all positions before each one of the row contribute, and of all of them."""
    sums = np.zeros(len(kv) + 1, np.uint64)
    np.cumsum(_mixed_all(kv, positions), out=sums[1:])
    return sums


def _garbage(num_blocks: int, block_size: int, rng: random.Random) -> _Words:
    words = np.frombuffer(rng.randbytes(16 * num_blocks * block_size), np.uint64)
    return words.reshape(2, -1).copy()
