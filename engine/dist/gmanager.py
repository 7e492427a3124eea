"""The one who sees all ranks: DistKV-LLM's and Infinite-LLM's gManager, on rank 0.

All that it knows it has from heartbeats, so another one takes over by asking for full ones; meanwhile, and
without it, ranks serve on.  What it says is advice: the creditor's word counts, and a plan that has become
stale is refused there or finds nothing to move, and the next round plans anew.
"""

import random
from collections import defaultdict
from dataclasses import dataclass, field

from engine.dist.entries import (
    Candidates,
    CandidatesWanted,
    Effect,
    Heartbeat,
    HeartbeatSeen,
    Message,
    MoveOrder,
    Over,
    Plan,
    RankId,
    SettleOrder,
)
from engine.dist.ledger import Ledger
from engine.dist.outbox import Outbox
from engine.dist.performance import Performance
from engine.dist.placement import PlacementSettings, plan_moves
from engine.dist.settlement import Ring, settle


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """Seconds, where nothing else is said."""

    placement: PlacementSettings = field(default_factory=PlacementSettings)
    round_s: float = 2.0  # from plan to plan
    lost_after_s: float = 5.0  # without a heartbeat a rank's life counts as over
    settle_s: float = 10.0  # ranks that settle debts are left alone for so long
    least_settled: int | None = 8  # blocks of each debt in a ring; None: debts are not settled
    come_home_above: float = 0.5  # free share of a device with which its rank has its own blocks back


@dataclass(eq=False, slots=True)
class _Heard:
    """Of one rank, in its present life."""

    epoch: int
    at: float
    number: int = 0  # of its last heartbeat
    is_whole: bool = False  # its entries are known: no heartbeat is missing


class GManager:
    def __init__(
        self, term: int, performance: Performance, settings: RoundSettings, seed: int, now: float
    ) -> None:
        """`term`: greater than that of any gManager before."""
        self.ledger = Ledger()
        self.num_rings = self.num_moves = 0  # planned so far
        self._performance, self._settings = performance, settings
        self._outbox = Outbox(None, term)
        self._rng = random.Random(seed)
        self._heard: dict[RankId, _Heard] = {}
        self._living: dict[RankId, int] = {}  # the first epoch of each rank that is not over
        self._settling: dict[RankId, float] = {}  # until then
        self._num_plans = 0
        self._round_at = now + settings.round_s

    @property
    def is_whole(self) -> bool:
        """The map is known of every rank that is heard."""
        return all(heard.is_whole for heard in self._heard.values())

    def collect(self) -> list[Effect]:
        return self._outbox.collect()

    def receive(self, message: Message, now: float) -> None:
        match message.body:
            case Heartbeat() as heartbeat:
                self._hear(heartbeat, now)
            case CandidatesWanted() as wanted if message.sender is not None:
                ranks = self.ledger.candidates(message.sender, wanted.num_blocks, wanted.tier)
                self._outbox.say(message.sender, Candidates(wanted.request, ranks))

    def tick(self, now: float) -> None:
        lost = [rank for rank, heard in self._heard.items() if now - heard.at >= self._settings.lost_after_s]
        if lost:
            self._learn(Over(tuple((rank, self._heard[rank].epoch + 1) for rank in lost)))
            for rank in self._heard:
                self._outbox.say(rank, self._over())
        if now >= self._round_at:
            self._round_at = now + self._settings.round_s
            if self.is_whole:
                self._plan(now)

    # -- private

    def _hear(self, heartbeat: Heartbeat, now: float) -> None:
        rank, epoch = heartbeat.rank, heartbeat.epoch
        full_wanted = False
        self._learn(heartbeat.over)
        if epoch >= self._living.get(rank, 0):
            heard = self._meet(rank, epoch, now)
            for peer, peer_epoch in heartbeat.peers:
                if peer_epoch >= self._living.get(peer, 0):
                    self._meet(peer, peer_epoch, now)
            heard.at = now
            if heartbeat.number > heard.number:
                follows = heartbeat.is_full or heartbeat.number == heard.number + 1
                heard.is_whole = heartbeat.is_full or (heard.is_whole and follows)
                heard.number = heartbeat.number
                self.ledger.hear(heartbeat.state, heartbeat.entries, heartbeat.is_full)
            full_wanted = not heard.is_whole
        self._outbox.say(rank, HeartbeatSeen(full_wanted, self._over()))

    def _meet(self, rank: RankId, epoch: int, now: float) -> _Heard:
        """A rank that others name must be heard of as well, within the time that a heartbeat may take."""
        if rank not in self._heard or epoch > self._heard[rank].epoch:
            if rank in self._heard:
                self.ledger.lose(rank)
            self._heard[rank] = _Heard(epoch, now)
            self._living[rank] = epoch
        return self._heard[rank]

    def _learn(self, over: Over) -> None:
        """From ranks as well: a gManager before this one may have told them."""
        for rank, epoch in over.before:
            if epoch > self._living.get(rank, 0):
                self._living[rank] = epoch
                if rank in self._heard and self._heard[rank].epoch < epoch:
                    del self._heard[rank]
                    self.ledger.lose(rank)

    def _over(self) -> Over:
        return Over(tuple(sorted(self._living.items())))

    def _plan(self, now: float) -> None:
        """One round: debts are settled between some ranks, others move blocks."""
        self._settling = {rank: until for rank, until in self._settling.items() if until > now}
        settlements: dict[RankId, list[SettleOrder]] = defaultdict(list)
        for ring in self._rings():
            self.num_rings += 1
            for debtor, creditor in ring.edges:
                settlements[debtor].append(SettleOrder(debtor, creditor, ring.num_blocks))
                self._settling[debtor] = now + self._settings.settle_s
        for order in self._returns():
            settlements[order.debtor].append(order)
        moves: dict[RankId, list[MoveOrder]] = defaultdict(list)
        planned = plan_moves(self.ledger, self._performance, self._settings.placement, self._settling)
        for move in planned:
            self.num_moves += 1
            moves[move.order.source].append(move.order)
        self._num_plans += 1
        for rank in sorted({*moves, *settlements}):
            plan = Plan(self._outbox.epoch, self._num_plans, tuple(moves[rank]), tuple(settlements[rank]))
            self._outbox.say(rank, plan)

    def _returns(self) -> list[SettleOrder]:
        """Blocks for which there is room at home again."""
        orders = []
        room = {
            rank: state.device_free - int(self._settings.come_home_above * state.device_blocks)
            for rank, state in self.ledger.states.items()
            if not state.waiting and rank not in self._settling
        }
        for (debtor, creditor), num_blocks in sorted(self.ledger.debts.items()):
            returning = min(num_blocks, room.get(debtor, 0))
            if returning > 0:
                orders.append(SettleOrder(debtor, creditor, returning))
                room[debtor] -= returning
        return orders

    def _rings(self) -> list[Ring]:
        if self._settings.least_settled is None:
            return []
        debts = {
            (debtor, creditor): num_blocks
            for (debtor, creditor), num_blocks in self.ledger.debts.items()
            if debtor not in self._settling and creditor not in self._settling
        }
        return settle(debts, self._settings.least_settled, self._rng)
