"""Ranks with memory that shows what it holds, copies that take time, and a network that does its worst."""

from dataclasses import dataclass, field

from engine.cache.block_pool import BlockPool
from engine.dist.entries import (
    BlocksHome,
    BlocksLost,
    BlocksMoved,
    Effect,
    FetchBlocks,
    LoanId,
    Message,
    MoveFailed,
    PlacementEntry,
    RankId,
    RejoinWanted,
    RequestId,
    Reserve,
    Reserved,
    SendBlocks,
    Slots,
    Tier,
)
from engine.dist.gmanager import GManager, RoundSettings
from engine.dist.performance import Performance
from engine.dist.placement import PlacementSettings
from engine.dist.rmanager import RManager
from engine.dist.settings import LoanSettings

LENDING = LoanSettings(
    max_lent_share=0.75,
    reservation_s=4.0,
    recall_s=4.0,
    settle_s=4.0,
    reply_s=0.5,
    max_tries=3,
    heartbeat_s=0.5,
)
ROUNDS = RoundSettings(
    placement=PlacementSettings(block_size=4, small_batch=4, roomy_share=0.9, most_used_share=1.0),
    round_s=1.0,
    lost_after_s=5.0,
    settle_s=4.0,
    least_settled=1,
)
PERFORMANCE = Performance(2, 1.0, {1: 10.0, 8: 60.0, 64: 200.0}, {1: 1e4, 1000: 1e5}, 1e-5, 1e-4)

Here = tuple[Tier, int]
There = tuple[LoanId, int]


@dataclass(eq=False)
class Rank:
    """A rank's life: what its manager says, what its slots hold, and where it believes its blocks to be."""

    manager: RManager
    memory: dict[Here, str] = field(default_factory=dict)
    blocks: dict[str, dict[str, Here | There]] = field(default_factory=dict)  # of its conversations
    num_lost: int = 0
    num_failed: int = 0

    def block_at(self, conversation: str, place: Here | There) -> str:
        (block,) = [name for name, at in self.blocks[conversation].items() if at == place]
        return block


@dataclass(eq=False)
class Copy:
    """On its way between two lives.  `held`: the creditor's slots, from when it has begun."""

    debtor: Rank
    creditor: Rank
    action: SendBlocks | FetchBlocks
    held: Slots | None = None
    content: list[str] | None = None


class Ranks:
    """All messages and copies wait until they are told to go on.  `check` may be called at any time."""

    def __init__(self, num_ranks: int, num_device: int = 8, num_host: int = 4, per_node: int = 2) -> None:
        self.now = 0.0
        self.sizes = (num_device, num_host)
        self.per_node = per_node
        self.messages: list[Message] = []
        self.copies: list[Copy] = []
        self.cut: set[RankId] = set()
        self.num_blocks = 0
        self.epochs = {RankId(rank): 0 for rank in range(num_ranks)}
        self.ranks = {rank: self._life(rank) for rank in self.epochs}
        self.term = 0
        self.gmanager = self._gmanager()

    # -- what ranks do

    def grow(self, rank: int, conversation: str, num_blocks: int, tier: Tier = Tier.DEVICE) -> bool:
        life = self.ranks[RankId(rank)]
        slots = life.manager.allocate(conversation, num_blocks, tier)
        for slot in slots or ():
            self.num_blocks += 1
            name = f"{conversation}#{self.num_blocks}"
            life.blocks.setdefault(conversation, {})[name] = (tier, slot)
            life.memory[tier, slot] = name
        self.collect()
        return slots is not None

    def forget(self, rank: int, conversation: str) -> None:
        life = self.ranks[RankId(rank)]
        life.manager.forget(conversation, self.now)
        life.blocks.pop(conversation, None)
        self.collect()

    def free_last(self, rank: int, conversation: str) -> None:
        life = self.ranks[RankId(rank)]
        name, place = list(life.blocks[conversation].items())[-1]
        if isinstance(place[0], Tier):
            del life.blocks[conversation][name]
            life.manager.free(conversation, place[0], [place[1]], self.now)
        self.collect()

    # -- the network

    def deliver(self, index: int, *, again: bool = False) -> None:
        message = self.messages[index] if again else self.messages.pop(index)
        if {message.sender, message.to} & self.cut:
            return
        if message.to is None:
            self.gmanager.receive(message, self.now)
        else:
            self.ranks[message.to].manager.receive(message, self.now)
        self.collect()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for life in self.ranks.values():
            life.manager.tick(self.now)
        self.gmanager.tick(self.now)
        self.collect()

    def begin_copy(self, copy: Copy) -> None:
        """The creditor holds the slots, and what is sent is read."""
        loan = copy.action.loan
        if copy.held is not None or not self._lives(copy.creditor) or not self._lives(copy.debtor):
            return
        copy.held = copy.creditor.manager.hold(loan)
        if copy.held is not None and isinstance(copy.action, SendBlocks):
            action = copy.action
            copy.content = [copy.debtor.memory.get((action.tier, slot), "") for slot in action.slots]

    def end_copy(self, copy: Copy, ok: bool) -> None:
        self.begin_copy(copy)
        self.copies.remove(copy)
        action, held = copy.action, copy.held
        ok = ok and held is not None and self._lives(copy.creditor) and self._lives(copy.debtor)
        ok = ok and not {copy.creditor.manager.rank, copy.debtor.manager.rank} & self.cut
        if held is not None and self._lives(copy.creditor):
            owners = copy.creditor.manager.table.owners()
            tier, numbers = held
            assert all(self._owns(owners, copy, tier, slot) for slot in numbers), "held, and given away"
            if isinstance(action, SendBlocks):
                content = copy.content if ok and copy.content else ["cut"] * len(numbers)
                for slot, block in zip(numbers, content, strict=True):
                    copy.creditor.memory[tier, slot] = block
            elif self._lives(copy.debtor):
                into = copy.debtor.manager.table.owners()
                assert all(self._owns(into, copy, action.tier, slot) for slot in action.slots)
                wanted = numbers[action.first : action.first + len(action.slots)]
                ok = ok and len(wanted) == len(action.slots)
                for slot, there in zip(action.slots, wanted, strict=False):
                    copy.debtor.memory[action.tier, slot] = copy.creditor.memory[tier, there]
            copy.creditor.manager.let_go(action.loan)
        if self._lives(copy.debtor):
            manager = copy.debtor.manager
            done = manager.sent if isinstance(action, SendBlocks) else manager.fetched
            done(action.loan, ok, self.now)
        self.collect()

    @staticmethod
    def _owns(owners: dict[Here, tuple[str, RankId, Tier]], copy: Copy, tier: Tier, slot: int) -> bool:
        return owners.get((tier, slot)) == (copy.action.conversation, copy.debtor.manager.rank, tier)

    # -- faults

    def crash(self, rank: int) -> None:
        """Its process ends, and another takes its place."""
        self.ranks[RankId(rank)] = self._life(RankId(rank))

    def crash_gmanager(self) -> None:
        self.gmanager = self._gmanager()

    # -- checks

    def settle(self, seconds: float = 30.0) -> None:
        """Nothing more is lost, and enough time passes for all that is begun to end."""
        self.cut.clear()
        end = self.now + seconds
        while self.now < end:
            self.flow()
            self.advance(0.25)
        self.flow()

    def flow(self) -> None:
        for _ in range(10_000):
            if self.messages:
                self.deliver(0)
            elif self.copies:
                self.end_copy(self.copies[0], True)
            else:
                return
        raise AssertionError("messages without end")

    def check(self) -> None:
        """Every slot is owned once or free, and what is used is what was meant."""
        for life in self.ranks.values():
            table = life.manager.table
            owners = table.owners()
            for tier, pool in table.pools.items():
                names = {(home, name) for name, home, at in owners.values() if at == tier}
                owned = sum(len(table.slots(home, name, tier)) for home, name in names)
                assert owned == sum(1 for t, _ in owners if t == tier), "a slot is owned twice"
                assert owned + pool.num_free == pool.num_slots, "a slot is lost"
                rank = life.manager.rank
                lent = sum(1 for (t, _), owner in owners.items() if t == tier and owner[1] != rank)
                assert lent == table.num_lent[tier] <= LENDING.max_lent_share * pool.num_slots
            for conversation in life.blocks:
                for block in life.blocks[conversation]:
                    self.check_use(life, conversation, block)

    def check_use(self, life: Rank, conversation: str, block: str) -> bool:
        """Attends to a block.  False: who kept it says that it is gone."""
        place = life.blocks[conversation][block]
        if not isinstance(place, tuple) or isinstance(place[0], Tier):
            assert life.memory[place] == block
            return True
        loan, index = place
        creditor = self.ranks[loan.creditor]
        held = creditor.manager.hold(loan)
        if held is None:
            return False
        creditor.manager.let_go(loan)
        if index >= len(held.numbers):
            return False
        assert creditor.memory[held.tier, held.numbers[index]] == block
        return True

    def check_agreement(self) -> None:
        """After `settle`: both sides of every loan, the map and the debts say the same."""
        owed: dict[LoanId, int] = {}
        for life in self.ranks.values():
            owed.update(life.manager.owed())
        granted: dict[LoanId, int] = {}
        for life in self.ranks.values():
            granted.update(life.manager.granted())
        assert owed == granted
        assert not any(life.manager.num_moving for life in self.ranks.values())
        for life in self.ranks.values():
            for conversation in life.blocks:
                assert all(self.check_use(life, conversation, block) for block in life.blocks[conversation])
        assert self.gmanager.is_whole
        assert self.gmanager.ledger.placement() == self.placement()
        debts: dict[tuple[RankId, RankId], int] = {}
        for entry in self.placement():
            if entry.home != entry.rank:
                debts[entry.home, entry.rank] = debts.get((entry.home, entry.rank), 0) + entry.num_blocks
        assert self.gmanager.ledger.debts == debts

    def placement(self) -> set[PlacementEntry]:
        return {entry for life in self.ranks.values() for entry in life.manager.table.entries()}

    def collect(self) -> None:
        for effect in self.gmanager.collect():
            assert isinstance(effect, Message)
            self.messages.append(effect)
        for life in self.ranks.values():
            while effects := life.manager.collect():
                for effect in effects:
                    self._take(life, effect)

    # -- private

    def _take(self, life: Rank, effect: Effect) -> None:
        match effect:
            case Message():
                self.messages.append(effect)
            case SendBlocks() | FetchBlocks():
                self.copies.append(Copy(life, self.ranks[effect.loan.creditor], effect))
            case BlocksMoved(loan, conversation, tier, slots):
                for index, slot in enumerate(slots):
                    block = life.block_at(conversation, (tier, slot))
                    life.blocks[conversation][block] = (loan, index)
            case BlocksHome(loan, conversation, first, tier, slots):
                for index, slot in enumerate(slots, first):
                    block = life.block_at(conversation, (loan, index))
                    life.blocks[conversation][block] = (tier, slot)
            case BlocksLost(loan, conversation, first, num_blocks):
                for index in range(first, first + num_blocks):
                    del life.blocks[conversation][life.block_at(conversation, (loan, index))]
                life.num_lost += num_blocks
            case MoveFailed():
                life.num_failed += 1
            case RejoinWanted():
                rank = life.manager.rank
                self.epochs[rank] += 1
                life.manager.rejoin(self.epochs[rank], self.now)

    def _lives(self, life: Rank) -> bool:
        return self.ranks[life.manager.rank] is life

    def _life(self, rank: RankId) -> Rank:
        self.epochs[rank] += 1
        device, host = (BlockPool(size) for size in self.sizes)
        manager = RManager(rank, rank // self.per_node, self.epochs[rank], device, host, LENDING)
        return Rank(manager)

    def _gmanager(self) -> GManager:
        self.term += 1
        return GManager(self.term, PERFORMANCE, ROUNDS, self.term, self.now)


def lender(num_device: int = 8) -> RManager:
    manager = RManager(RankId(0), 0, 1, BlockPool(num_device), BlockPool(4), LENDING)
    manager.tick(0.0)
    manager.collect()
    return manager


def ask(manager: RManager, debtor: int, number: int, num_blocks: int, now: float = 0.0) -> LoanId | None:
    """What it answers; it must say nothing else."""
    reserve = Reserve(RequestId(RankId(debtor), 1, number), "far", num_blocks, Tier.DEVICE)
    manager.receive(Message(RankId(debtor), 1, RankId(0), reserve), now)
    (answer,) = manager.collect()
    assert isinstance(answer, Message) and isinstance(answer.body, Reserved)
    assert answer.to == debtor and answer.body.request == reserve.request
    return answer.body.loan


def free_of(ranks: Ranks, rank: int, tier: Tier = Tier.DEVICE) -> int:
    return ranks.ranks[RankId(rank)].manager.table.pools[tier].num_free


def lent(ranks: Ranks, num_blocks: int = 3, rank: int = 0, to: int = 1) -> None:
    """Rank `rank` keeps so many blocks of its conversation "a" at `to`."""
    ranks.grow(rank, "a", num_blocks + 1)
    ranks.ranks[RankId(rank)].manager.move("a", num_blocks, Tier.DEVICE, RankId(to), Tier.DEVICE, ranks.now)
    ranks.collect()
    ranks.flow()
    assert sum(ranks.ranks[RankId(rank)].manager.owed().values()) == num_blocks


def bodies(ranks: Ranks, kind: type) -> list[Message]:
    return [message for message in ranks.messages if isinstance(message.body, kind)]
