"""A simulated rank's memory in the hands of its rManager: messages and copies take time, decisions do not."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.cache.block_pool import BlockPool
from engine.dist.entries import (
    Action,
    BlocksHome,
    BlocksLost,
    BlocksMoved,
    FetchBlocks,
    LoanId,
    Message,
    MoveFailed,
    RankId,
    SendBlocks,
    Tier,
)
from engine.dist.rmanager import RManager
from engine.dist.settings import LoanSettings
from engine.errors import InvariantError
from engine.simulation.cluster_memory import NOWHERE
from engine.simulation.cluster_rank import BLOCK_SIZE
from engine.simulation.network import Link
from engine.simulation.virtual_time import Agenda

BORROWED_TOGETHER, LEAST_TOGETHER = 128, 8
"""Blocks in one request to lend, at most; half of them after each that all refused."""
REFUSED_S = 1.0
"""Nobody is asked for room for so long after nobody had any."""


@dataclass(slots=True)
class _Copy:
    order: SendBlocks | FetchBlocks
    left: float  # blocks


class SharedMemory:
    """`post` carries messages; `drop` hears of conversations whose KV is lost; `wake` of room that came."""

    can_borrow = True

    def __init__(
        self,
        manager: RManager,
        agenda: Agenda,
        kv_bytes_per_token: float,
        link_to: Callable[[int], Link],
        creditor: Callable[[RankId], RManager],
        post: Callable[[Message], None],
        drop: Callable[[int], None],
        most_asked: int,
    ) -> None:
        """`most_asked`: blocks that the network carries before what is reserved for them is over."""
        self.manager = manager
        self.num_blocks = manager.table.pools[Tier.DEVICE].num_slots
        self.num_refused = 0
        self._agenda, self._kv_bytes, self._link_to = agenda, kv_bytes_per_token, link_to
        self._creditor, self._post, self._drop = creditor, post, drop
        self._most_asked = most_asked
        self._remote: dict[int, dict[int, int]] = {}
        self._copies: deque[_Copy] = deque()
        self._num_asked = 0  # blocks that are on their way out because room was asked for
        self._refused_until = 0.0
        self._together = BORROWED_TOGETHER

    # -- Memory

    @property
    def num_free(self) -> int:
        return self.manager.table.pools[Tier.DEVICE].num_free

    @property
    def num_moving(self) -> int:
        return sum(len(copy.order.slots) for copy in self._copies)

    def grow(self, conversation: int, num_blocks: int) -> bool:
        return self.manager.allocate(str(conversation), num_blocks, Tier.DEVICE) is not None

    def remote(self, conversation: int) -> Mapping[int, int]:
        return self._remote.get(conversation, NOWHERE)

    def release(self, conversation: int) -> None:
        self.manager.forget(str(conversation), self._agenda.now)
        self._remote.pop(conversation, None)
        self.carry_on()

    def ask_for_room(self, conversation: int, num_blocks: int) -> bool:
        now = self._agenda.now
        if self._num_asked < min(num_blocks, self._most_asked) and now >= self._refused_until:
            wanted = min(num_blocks, self._most_asked) - self._num_asked
            wanted = min(wanted, self._together)
            self._num_asked += self.manager.borrow(str(conversation), wanted, Tier.DEVICE, Tier.DEVICE, now)
        self.carry_on()
        return self._num_asked > 0

    def recall(self, num_blocks: int) -> None:
        self.manager.recall(num_blocks, Tier.DEVICE, self._agenda.now)
        self.carry_on()

    def bring_home(self, num_blocks: int) -> None:
        for conversation in list(self._remote):
            if num_blocks <= 0:
                break
            num_blocks -= self.manager.bring_home(str(conversation), num_blocks, self._agenda.now)
        self.carry_on()

    def move(self, num_tokens: float, seconds: float) -> None:
        """In the order in which it was asked for; what goes out and what comes in share the way."""
        while self._copies and num_tokens > 0 and seconds > 0:
            copy = self._copies[0]
            rate = self._link_to(copy.order.loan.creditor).bytes_per_s / self._kv_bytes  # tokens/s
            moved = min(num_tokens, seconds * rate, copy.left * BLOCK_SIZE)
            num_tokens -= moved
            seconds -= moved / rate
            copy.left -= moved / BLOCK_SIZE
            if copy.left > 1e-9:
                break
            self._copies.popleft()
            self._arrived(copy.order)
        self.carry_on()

    # -- others

    @property
    def num_lent(self) -> int:
        return self.manager.table.num_lent[Tier.DEVICE]

    @property
    def num_remote(self) -> int:
        return sum(sum(there.values()) for there in self._remote.values())

    def receive(self, message: Message) -> None:
        self.manager.receive(message, self._agenda.now)
        self.carry_on()

    def tick(self, batch: int, waiting: int, waiting_blocks: int) -> None:
        manager = self.manager
        manager.batch, manager.waiting, manager.waiting_blocks = batch, waiting, waiting_blocks
        self.manager.tick(self._agenda.now)
        self.carry_on()

    def carry_on(self) -> None:
        """With what the manager wants to be said and done."""
        while effects := self.manager.collect():
            for effect in effects:
                if isinstance(effect, Message):
                    self._post(effect)
                else:
                    self._do(effect)

    # -- private

    def _do(self, action: Action) -> None:
        match action:
            case SendBlocks() | FetchBlocks():
                self._copies.append(_Copy(action, len(action.slots)))
            case BlocksMoved(loan, conversation, _, slots):
                self._count(conversation, loan, len(slots))
                self._together = BORROWED_TOGETHER
                self._num_asked = max(0, self._num_asked - len(slots))
            case BlocksHome(loan, conversation, _, _, slots):
                self._count(conversation, loan, -len(slots))
            case BlocksLost(loan, conversation, _, num_blocks):
                self._count(conversation, loan, -num_blocks)
                self._agenda.after(0.0, lambda: self._drop(int(conversation)))
            case MoveFailed(_, num_blocks):
                self._num_asked = max(0, self._num_asked - num_blocks)
                self._refused_until = self._agenda.now + REFUSED_S
                self._together = max(LEAST_TOGETHER, self._together // 2)
                self.num_refused += 1
            case _:
                raise InvariantError(f"nothing is lost here, and yet: {action}")

    def _count(self, conversation: str, loan: LoanId, change: int) -> None:
        there = self._remote.setdefault(int(conversation), {})
        there[loan.creditor] = there.get(loan.creditor, 0) + change
        if there[loan.creditor] <= 0:
            del there[loan.creditor]
        if not there:
            del self._remote[int(conversation)]

    def _arrived(self, order: SendBlocks | FetchBlocks) -> None:
        loan, now = order.loan, self._agenda.now
        creditor = self._creditor(loan.creditor)
        ok = creditor.hold(loan) is not None
        if ok:
            creditor.let_go(loan)
        if isinstance(order, SendBlocks):
            self.manager.sent(loan, ok, now)
        else:
            self.manager.fetched(loan, ok, now)


def manager_of(rank: int, node: int, num_blocks: int, settings: LoanSettings) -> RManager:
    return RManager(RankId(rank), node, 1, BlockPool(num_blocks), BlockPool(0), settings)
