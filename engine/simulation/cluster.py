"""Ranks that serve one list of requests under virtual time: alone, as one, or with what others lend."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from engine.dist.gmanager import RoundSettings
from engine.dist.placement import PlacementSettings
from engine.dist.settings import LoanSettings
from engine.simulation.cluster_memory import Memory, OwnMemory
from engine.simulation.cluster_pool import Pool, PoolSettings
from engine.simulation.cluster_profiles import Setup
from engine.simulation.cluster_rank import BLOCK_SIZE, WATERMARK, Row, Scheduling, VirtualRank
from engine.simulation.cluster_workload import Request
from engine.simulation.network import Link, Network
from engine.simulation.virtual_time import Agenda

SYSTEMS = {
    "isolated": "instances that know nothing of one another",
    "single": "one instance over all GPUs, tensor parallel",
    "v1": "instances that borrow when they run out of memory, and settle debts (DistKV-LLM)",
    "v2": "instances whose KV is placed by the performance model (Infinite-LLM)",
}

SAMPLED_EVERY_S = 1.0
EVENTS_TOGETHER = 64  # between looks at whether all is done
MAX_LENT_SHARE = 1.0
"""Of a rank's blocks.  A cap is for those who lend; candidates for a loan are chosen without regard to it."""
RESERVATION_S = 60.0
"""For blocks to arrive, of which a rank that decodes moves half a one in each step."""
HEARTBEAT_S = 1.0
"""No source has the papers' period; steps of a simulated rank are taken 32 at a time, in about a second."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    setup: Setup
    network: Network
    num_instances: int
    system: str  # of SYSTEMS
    scheduling: Scheduling = field(default_factory=Scheduling)
    max_lent_share: float = MAX_LENT_SHARE
    settles: bool = True  # debts, with v1
    seed: int = 0

    @property
    def pool(self) -> PoolSettings:
        """v1 borrows and settles debts and plans no moves, v2 the other way round."""
        loans = LoanSettings(
            max_lent_share=self.max_lent_share, reservation_s=RESERVATION_S, heartbeat_s=HEARTBEAT_S
        )
        if self.system == "v1":
            least = RoundSettings().least_settled if self.settles else None
            rounds = RoundSettings(PlacementSettings(small_batch=0), least_settled=least)
        else:
            rounds = RoundSettings(least_settled=None)
        return PoolSettings(loans, rounds, self.seed)


@dataclass(slots=True)
class Figures:
    """What a run came to.  Tokens are generated ones."""

    system: str
    num_instances: int
    requests: int
    refused: int  # longer than the memory that they can ever have
    unfinished: int  # when the time was up
    tokens: int
    seconds: float  # until the last one that was served ended
    tokens_per_s: float
    preempted: int
    lost: int  # of those, because a creditor took back what it had lent
    steps: int
    busy_share: float
    mean_batch: float
    messages: int  # of attention
    wire_bytes: int
    silent_ranks: int  # that posted none
    remote_share: float  # of all blocks in use, in the mean over time
    moves_failed: int
    wall_s: float


class Cluster:
    """`num_instances` of them, or one over as many GPUs.  Requests go to instances in turn."""

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings, self.agenda = settings, Agenda()
        setup, system = settings.setup, settings.system
        self.num_ranks = 1 if system == "single" else settings.num_instances
        num_gpus = setup.gpus_per_instance * settings.num_instances // self.num_ranks
        self.instance = setup.instance(settings.network, num_gpus)
        self.num_blocks = self.instance.kv_tokens // BLOCK_SIZE
        per_node = settings.network.gpus_per_node // setup.gpus_per_instance
        self._nodes = [rank // per_node for rank in range(self.num_ranks)]
        self.pool: Pool | None = None
        if system in ("v1", "v2"):
            self.pool = Pool(
                self.instance,
                self.num_blocks,
                self._nodes,
                settings.network,
                self.link,
                self.agenda,
                settings.pool,
            )
        # Which requests begin before there is room at their home: with v1 all that do not find it, with v2
        # those that never will.
        self.most_at_home = self.num_blocks - int(WATERMARK * self.num_blocks)
        short_above = {"v1": 0.0, "v2": float(self.most_at_home)}.get(system, math.inf)
        self.ranks = [
            VirtualRank(
                number,
                self.instance,
                self._memory(number),
                self.agenda,
                settings.scheduling,
                partial(self.link, number),
                self._admits,
                short_above,
            )
            for number in range(self.num_ranks)
        ]
        for rank in self.ranks:
            rank.serve = self._serve
        self._short: list[Row] = []  # began without room at home, and may not have all of it yet
        self._next_short: int | None = None  # the request that later ones leave their room to
        self._remote_shares: list[float] = []

    def link(self, rank: int, other: int) -> Link:
        return self.settings.network.link(self._nodes[rank], self._nodes[other])

    def can_ever_serve(self, request: Request) -> bool:
        blocks = -(-request.tokens // BLOCK_SIZE)
        most = self.pool.most_blocks if self.pool else self.num_blocks
        return blocks <= most - int(WATERMARK * most) - 1

    def run(self, requests: Sequence[Request], limit_s: float = math.inf) -> Figures:
        """Until all that can be served are; or until then."""
        begun = time.perf_counter()
        served = [request for request in requests if self.can_ever_serve(request)]
        for request in served:
            rank = self.ranks[request.number % self.num_ranks]
            self.agenda.at(request.at_s, partial(self._arrive, rank, request))
        if self.pool is not None:
            self.pool.start(self.ranks)
            self._sample()
        agenda, is_going_on = self.agenda, True
        while is_going_on and agenda.now <= limit_s and self._num_finished() < len(served):
            for _ in range(EVENTS_TOGETHER):
                is_going_on = agenda.happen()
        return self._figures(requests, len(served), time.perf_counter() - begun)

    # -- private

    def _num_finished(self) -> int:
        return sum(rank.counters.finished for rank in self.ranks)

    def _memory(self, rank: int) -> Memory:
        return self.pool.memory(rank) if self.pool else OwnMemory(self.num_blocks)

    @staticmethod
    def _arrive(rank: VirtualRank, request: Request) -> None:
        rank.offer(request)
        rank.wake()

    def _serve(self, rank: int, seconds: float) -> float:
        return self.ranks[rank].serving(seconds)

    def _admits(self, row: Row, num_blocks: int, begins_short: bool) -> bool:
        """First come, first served over the whole cluster for those that are longer than any rank's memory:
        until the first of them begins, nobody that came later does.
        """
        if self.pool is None:
            return True
        number = row.request.number
        if self._next_short is not None and number > self._next_short:
            return False
        if begins_short or self._short:
            self._short = [each for each in self._short if each.is_running and each.pending > 1]
            promised = sum(each.lacks(each.pending) for each in self._short)
            spare = int(WATERMARK * self.pool.most_blocks)
            if self.pool.room_for(number % self.num_ranks) - promised - spare < num_blocks:
                if num_blocks > self.most_at_home:
                    self._next_short = number
                return False
        if number == self._next_short:
            self._next_short = None
        if begins_short:
            self._short.append(row)
        return True

    def _sample(self) -> None:
        """Of how many blocks in use are on another rank than their home."""
        if self.pool is not None:
            used = sum(memory.num_blocks - memory.num_free for memory in self.pool.memories)
            if used:
                self._remote_shares.append(sum(each.num_remote for each in self.pool.memories) / used)
            self.agenda.after(SAMPLED_EVERY_S, self._sample)

    def _figures(self, requests: Sequence[Request], num_served: int, wall_s: float) -> Figures:
        counters = [rank.counters for rank in self.ranks]
        unfinished = num_served - self._num_finished()
        seconds = self.agenda.now if unfinished else max(each.ended_s for each in counters)
        tokens = sum(each.generated for each in counters)
        steps = sum(each.steps for each in counters)
        return Figures(
            system=self.settings.system,
            num_instances=self.settings.num_instances,
            requests=len(requests),
            refused=len(requests) - num_served,
            unfinished=unfinished,
            tokens=tokens,
            seconds=seconds,
            tokens_per_s=tokens / seconds if seconds else 0.0,
            preempted=sum(each.preempted for each in counters),
            lost=sum(each.lost for each in counters),
            steps=steps,
            busy_share=sum(each.busy_s for each in counters) / (self.num_ranks * seconds) if seconds else 0.0,
            mean_batch=tokens / steps if steps else 0.0,
            messages=sum(each.messages for each in counters),
            wire_bytes=sum(each.wire_bytes for each in counters),
            silent_ranks=sum(each.messages == 0 for each in counters),
            remote_share=sum(self._remote_shares) / max(1, len(self._remote_shares)),
            moves_failed=sum(each.num_refused for each in self.pool.memories) if self.pool else 0,
            wall_s=wall_s,
        )
