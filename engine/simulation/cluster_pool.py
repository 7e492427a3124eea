"""The memory of all ranks of a simulated cluster: rManagers, the gManager, and what they tell one another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from engine.dist.entries import Message, RankId
from engine.dist.gmanager import GManager, RoundSettings
from engine.dist.performance import Performance
from engine.dist.settings import LoanSettings
from engine.errors import InvariantError
from engine.simulation.cluster_lending import SharedMemory, manager_of
from engine.simulation.cluster_profiles import Instance
from engine.simulation.cluster_rank import BLOCK_SIZE, VirtualRank
from engine.simulation.network import Link, Network, partial_bytes, query_bytes
from engine.simulation.virtual_time import Agenda

CONTROL_S = 1e-3
"""Of a message between managers, beside the link's own latency: an assumption."""
ASKED_SHARE = 0.25
"""Of the time that a reservation lasts, for all that is on its way."""
PROFILED_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROFILED_LENGTHS = (1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class PoolSettings:
    loans: LoanSettings
    rounds: RoundSettings
    seed: int = 0


class Pool:
    def __init__(
        self,
        instance: Instance,
        num_blocks: int,
        nodes: Sequence[int],
        network: Network,
        link: Callable[[int, int], Link],
        agenda: Agenda,
        settings: PoolSettings,
    ) -> None:
        self.settings, self._agenda, self._link = settings, agenda, link
        self._ranks: Sequence[VirtualRank] = ()
        self.managers = [
            manager_of(rank, node, num_blocks, settings.loans) for rank, node in enumerate(nodes)
        ]
        block_s = network.between.seconds(BLOCK_SIZE * instance.shape.kv_bytes_per_token)
        most_asked = max(1, int(ASKED_SHARE * settings.loans.reservation_s / block_s))
        self.memories = [
            SharedMemory(
                manager,
                agenda,
                instance.shape.kv_bytes_per_token,
                partial(link, rank),
                lambda rank: self.managers[rank],
                self._post,
                partial(self._drop, rank),
                most_asked,
            )
            for rank, manager in enumerate(self.managers)
        ]
        self.lendable = int(settings.loans.max_lent_share * num_blocks)
        self.most_blocks = num_blocks + (len(nodes) - 1) * self.lendable
        performance = performance_of(instance, network.inside, network.between)
        self.gmanager = GManager(1, performance, settings.rounds, settings.seed, agenda.now)

    def memory(self, rank: int) -> SharedMemory:
        return self.memories[rank]

    def room_for(self, rank: int) -> int:
        """Blocks for a conversation of that rank, there and wherever others may lend."""
        return self.memories[rank].num_free + sum(
            max(0, min(memory.num_free, self.lendable - memory.num_lent))
            for other, memory in enumerate(self.memories)
            if other != rank
        )

    def start(self, ranks: Sequence[VirtualRank]) -> None:
        """Heartbeats, spread over their period."""
        self._ranks = ranks
        period_s = self.settings.loans.heartbeat_s
        for number in range(len(ranks)):
            self._agenda.after(period_s * number / len(ranks), partial(self._tick, number))

        self._agenda.after(period_s, self._plan)

    # -- private

    def _plan(self) -> None:
        self.gmanager.tick(self._agenda.now)
        self._carry_out()
        self._agenda.after(self.settings.loans.heartbeat_s, self._plan)

    def _carry_out(self) -> None:
        for effect in self.gmanager.collect():
            if not isinstance(effect, Message):
                raise InvariantError(f"the gManager moves nothing itself, and yet: {effect}")
            self._post(effect)

    def _tick(self, number: int) -> None:
        rank = self._ranks[number]
        waiting_blocks = sum(row.lacks(row.pending) for row in rank.queue)
        self.memories[number].tick(len(rank.rows), len(rank.queue), waiting_blocks)
        rank.wake()
        self._agenda.after(self.settings.loans.heartbeat_s, lambda: self._tick(number))

    def _drop(self, rank: int, conversation: int) -> None:
        self._ranks[rank].drop(conversation)

    def _post(self, message: Message) -> None:
        """The gManager lives on rank 0."""
        sender, to = message.sender or RankId(0), message.to or RankId(0)
        delay_s = CONTROL_S + self._link(sender, to).message_s if sender != to else 0.0
        self._agenda.after(delay_s, lambda: self._deliver(message))

    def _deliver(self, message: Message) -> None:
        if message.to is None:
            self.gmanager.receive(message, self._agenda.now)
            self._carry_out()
        else:
            self.memories[message.to].receive(message)
            self._ranks[message.to].wake()


def performance_of(instance: Instance, near: Link, far: Link) -> Performance:
    """Profiles of the simulated instance, as a rank would measure them."""
    costs, layers = instance.costs, instance.costs.num_layers
    work = 2.0 * instance.shape.body_values / layers

    def linear_s(batch: int) -> float:
        return (costs.fixed_s + max(costs.weights_s, batch * costs.token_s) + batch * costs.row_s) / layers

    bytes_per_token = query_bytes(instance.shape) + partial_bytes(instance.shape)
    return Performance(
        layers,
        work,
        {batch: batch * work / linear_s(batch) for batch in PROFILED_BATCHES},
        dict.fromkeys(PROFILED_LENGTHS, layers / costs.kv_token_s),
        *(2 * link.message_s + bytes_per_token / link.bytes_per_s for link in (near, far)),
    )
