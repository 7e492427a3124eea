"""Which blocks should lie elsewhere, so that all ranks together are faster (Infinite-LLM, greedy placement).

A rank that long requests crowd computes small batches, in which the weights are read for few tokens.  Blocks
that it gives away make room for requests that wait; whoever takes them attends to them, which costs it
little while it has room to spare.  Every conversation in the map counts as one that is being computed.
"""

import heapq
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.dist.entries import MoveOrder, RankId, RankState, Tier
from engine.dist.ledger import Ledger
from engine.dist.performance import Performance

NUM_SIZES = 32
"""Sizes of a move that are compared, beside those at which one more waiting request fits."""


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    block_size: int = 32
    small_batch: int = 16  # a rank with a smaller one may give blocks away
    roomy_share: float = 0.7  # a rank that uses less of its device may take some
    most_used_share: float = 0.9  # and no more than to this
    moves_per_rank: int = 4  # in a round, the longest requests first


@dataclass(frozen=True, slots=True)
class PlannedMove:
    order: MoveOrder
    gain: float  # tokens per second of both ranks, by the model; positive


@dataclass(eq=False, slots=True)
class _Load:
    """A rank as the plan leaves it."""

    state: RankState
    free: int
    lendable: int
    batch: float
    here_s: float  # attention, per layer
    elsewhere_s: float  # that it waits for
    waiting: float
    need: float  # blocks of one that waits


def plan_moves(
    ledger: Ledger,
    performance: Performance,
    settings: PlacementSettings,
    frozen: Container[RankId] = (),
) -> list[PlannedMove]:
    """Moves of a round, best rank to help first; none of them with ranks that are `frozen`."""
    loads = {rank: load for rank, load in _loads(ledger, performance, settings).items() if rank not in frozen}
    debtors = sorted(
        (load for load in loads.values() if load.waiting > 0 and load.batch < settings.small_batch),
        key=lambda load: (load.batch, load.state.rank),
    )
    roomy = [
        load for load in loads.values() if load.waiting == 0 and _used_share(load) < settings.roomy_share
    ]
    moves: list[PlannedMove] = []
    for debtor in debtors:
        if not roomy:
            break
        rank = debtor.state.rank
        own = (
            (num_blocks, conversation)
            for (conversation, home, tier), num_blocks in ledger.held(rank).items()
            if home == rank and tier == Tier.DEVICE
        )
        for num_blocks, conversation in heapq.nlargest(settings.moves_per_rank, own):
            creditor = max(roomy, key=lambda load: (load.lendable, -load.state.rank))
            kept = int((1.0 - settings.most_used_share) * creditor.state.device_blocks)
            room = min(creditor.lendable, creditor.free - kept)
            move = _best_move(debtor, creditor, conversation, num_blocks, room, performance, settings)
            if move is None:
                break
            moves.append(move)
    return moves


def _best_move(
    debtor: _Load,
    creditor: _Load,
    conversation: str,
    num_blocks: int,
    room: int,
    performance: Performance,
    settings: PlacementSettings,
) -> PlannedMove | None:
    """The number of leading blocks with the greatest gain, and the loads as they are after it; or None."""
    most = min(num_blocks - 1, room)  # the last block is written to, and stays
    if most < 1:
        return None
    size, need = settings.block_size, max(1.0, debtor.need)
    fit_anyway = min(debtor.free // need, debtor.waiting)
    joiners = np.arange(fit_anyway + 1, min(debtor.waiting, fit_anyway + NUM_SIZES) + 1)
    fitting = np.ceil(joiners * need - debtor.free)
    sizes: Any = np.concatenate((np.linspace(1, most, NUM_SIZES), fitting))
    sizes = np.unique(np.clip(sizes, 1, most).astype(np.int64))
    exchange_s = performance.exchange_s(is_near=debtor.state.node == creditor.state.node)
    moved_s = performance.attention_s(sizes * size)
    joining = np.minimum(np.floor((sizes + debtor.free) / need), debtor.waiting) - fit_anyway
    rest_s = performance.attention_s((num_blocks - sizes) * size)
    here_s = debtor.here_s - performance.attention_s(num_blocks * size) + rest_s
    here_s = here_s + joining * performance.attention_s(need * size)
    elsewhere_s = np.maximum(debtor.elsewhere_s, moved_s + exchange_s)
    rate = performance.tokens_per_s
    gains = (
        rate(debtor.batch + joining, here_s, elsewhere_s)
        - rate(debtor.batch, debtor.here_s, debtor.elsewhere_s)
        + rate(creditor.batch, creditor.here_s + moved_s, creditor.elsewhere_s)
        - rate(creditor.batch, creditor.here_s, creditor.elsewhere_s)
    )
    best = int(np.argmax(gains))
    gain, moved = float(gains[best]), int(sizes[best])
    if not gain > 0:
        return None
    joined = float(joining[best])
    debtor.here_s, debtor.elsewhere_s = float(here_s[best]), float(elsewhere_s[best])
    debtor.batch, debtor.waiting = debtor.batch + joined, debtor.waiting - joined
    debtor.free += moved - int(joined * need)
    creditor.here_s += float(moved_s[best])
    creditor.free -= moved
    creditor.lendable -= moved
    order = MoveOrder(conversation, moved, debtor.state.rank, creditor.state.rank, Tier.DEVICE)
    return PlannedMove(order, gain)


def _loads(ledger: Ledger, performance: Performance, settings: PlacementSettings) -> dict[RankId, _Load]:
    loads: dict[RankId, _Load] = {}
    for rank, state in ledger.states.items():
        need = state.waiting_blocks / state.waiting if state.waiting else 0.0
        free, lendable = state.device_free, state.device_lendable
        loads[rank] = _Load(state, free, lendable, state.batch, 0.0, 0.0, state.waiting, need)
    for rank, load in loads.items():
        held = ledger.held(rank)
        lent = {home: 0.0 for _, home, _ in held if home != rank}
        lengths = np.fromiter((n for key, n in held.items() if key[2] == Tier.DEVICE), np.float64)
        load.here_s = float(performance.attention_s(lengths * settings.block_size).sum())
        if lent:
            for (_, home, tier), num_blocks in held.items():
                if home != rank and tier == Tier.DEVICE:
                    lent[home] += float(performance.attention_s(num_blocks * settings.block_size))
        for home, seconds in lent.items():
            if home in loads:
                seconds += performance.exchange_s(is_near=loads[home].state.node == load.state.node)
                loads[home].elsewhere_s = max(loads[home].elsewhere_s, seconds)
    return loads


def _used_share(load: _Load) -> float:
    return 1.0 - load.free / load.state.device_blocks if load.state.device_blocks else 1.0
