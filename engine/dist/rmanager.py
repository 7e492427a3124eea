"""A rank's part in lending memory: DistKV-LLM's and Infinite-LLM's rManager."""

from collections.abc import Iterable

from engine.dist.borrowing import Borrowing
from engine.dist.entries import (
    Candidates,
    Commit,
    Committed,
    Effect,
    Heartbeat,
    HeartbeatSeen,
    LoanId,
    Message,
    Over,
    Plan,
    RankId,
    RankState,
    Recall,
    RejoinWanted,
    Release,
    Released,
    Reserve,
    Reserved,
    Revoked,
    Slots,
    Tier,
)
from engine.dist.lending import Lending
from engine.dist.outbox import Outbox
from engine.dist.rblock_table import Pool, RBlockTable
from engine.dist.settings import LoanSettings


class RManager:
    """Lends this rank's blocks and borrows others'.

    Everything happens in calls: decisions of this rank, messages, ends of copies, and `tick`, as often as
    the shortest of its times asks for.  What follows from a call is in `collect`: messages to be delivered,
    be it late, twice, in any order or not at all, and actions for this rank.  Every SendBlocks and every
    FetchBlocks is answered once, by `sent` or `fetched`, however it ended.

    Slots of this rank's own conversations are taken here too, from the same pools; one that is shared
    counts for whoever took it.
    """

    def __init__(
        self, rank: RankId, node: int, epoch: int, device: Pool, host: Pool, settings: LoanSettings
    ) -> None:
        """`epoch`: greater than that of any life of this rank before."""
        self.rank, self.node = rank, node
        self.batch = self.waiting = self.waiting_blocks = 0  # as in RankState, told by the scheduler
        self.table = RBlockTable(rank, device, host)
        self._settings = settings
        self._outbox = Outbox(rank, epoch)
        self._lending = Lending(rank, self.table, self._outbox, settings)
        self._borrowing = Borrowing(rank, self.table, self._outbox, settings)
        self._living: dict[RankId, int] = {}  # the first epoch of each rank that is not known to be over
        self._num_heartbeats = 0
        self._heartbeat_at = 0.0
        self._is_full_due = True
        self._last_plan = (-1, -1)

    @property
    def epoch(self) -> int:
        return self._outbox.epoch

    def collect(self) -> list[Effect]:
        return self._outbox.collect()

    # -- this rank's own conversations

    def allocate(self, conversation: str, num_blocks: int, tier: Tier) -> tuple[int, ...] | None:
        """All of the slots, or None: then `recall` or `borrow` may help, after a while."""
        return self.table.allocate(self.rank, conversation, num_blocks, tier)

    def free(self, conversation: str, tier: Tier, slots: Iterable[int], now: float) -> None:
        """A move that they are part of comes to nothing."""
        slots = tuple(slots)
        self._borrowing.stop_moving(tier, slots, now)
        self.table.free(self.rank, conversation, tier, slots)

    def forget(self, conversation: str, now: float) -> None:
        """Frees all of its blocks, here and elsewhere."""
        self._borrowing.forget(conversation, now)
        for tier in Tier:
            held, fetched = self.table.slots(self.rank, conversation, tier), self._borrowing.fetched_into
            self.free(conversation, tier, held - fetched(conversation, tier), now)

    def borrow(self, conversation: str, num_blocks: int, source: Tier, tier: Tier, now: float) -> int:
        """Moves its leading blocks from tier `source` to `tier` of a rank that the gManager knows to have
        room.  Returns how many, if all goes well; then BlocksMoved follows, or else MoveFailed.
        """
        return self._borrowing.move(conversation, num_blocks, source, tier, None, now)

    def move(
        self, conversation: str, num_blocks: int, source: Tier, to: RankId, tier: Tier, now: float
    ) -> int:
        """As `borrow`, to a rank that is known."""
        return self._borrowing.move(conversation, num_blocks, source, tier, (to,), now)

    def bring_home(self, conversation: str, num_blocks: int, now: float) -> int:
        """Wants blocks back as soon as there is room.  Returns how many; BlocksHome follows."""
        return self._borrowing.bring_home(None, conversation, num_blocks, now)

    def recall(self, num_blocks: int, tier: Tier, now: float) -> int:
        """Wants lent blocks back for own work.  Returns how many will be free, soon."""
        return self._lending.recall(num_blocks, tier, now)

    def owed(self) -> dict[LoanId, int]:
        """This rank's blocks that are elsewhere, by loan."""
        return self._borrowing.owed()

    @property
    def num_moving(self) -> int:
        """Blocks here that are on their way to others, or about to be."""
        return self._borrowing.num_moving

    def granted(self) -> dict[LoanId, int]:
        """Others' blocks that are here or expected, by loan."""
        return self._lending.granted()

    # -- copies between ranks

    def sent(self, loan: LoanId, ok: bool, now: float) -> None:
        """The end of SendBlocks.  `ok`: the creditor has all of it."""
        self._borrowing.sent(loan, ok, now)

    def fetched(self, loan: LoanId, ok: bool, now: float) -> None:
        """The end of FetchBlocks: nothing is written to its slots any more."""
        self._borrowing.fetched(loan, ok, now)

    def hold(self, loan: LoanId) -> Slots | None:
        """As a creditor: the loan's slots, which serve nobody else until `let_go`; None if it is over.  To be
        asked before every copy to or from them and every step that attends to them.
        """
        return self._lending.hold(loan)

    def let_go(self, loan: LoanId) -> None:
        self._lending.let_go(loan)

    # -- others

    def receive(self, message: Message, now: float) -> None:
        body, sender = message.body, message.sender
        if sender is None:
            self._obey(message, now)
            return
        if message.epoch < self._living.get(sender, 0):
            self._outbox.say(sender, Over(((sender, self._living[sender]),)))
            return
        self._learn(((sender, message.epoch),), now)
        match body:
            case Reserve():
                # What becomes free while own blocks wait to come home is theirs.
                self._lending.reserve(body, now, not self._borrowing.wants_room)
            case Commit():
                self._lending.commit(body, sender)
            case Release():
                self._lending.release(body, sender)
            case Reserved():
                self._borrowing.reserved(body, sender, now)
            case Committed():
                self._borrowing.committed(body, now)
            case Released():
                self._borrowing.released(body, now)
            case Recall():
                self._borrowing.recall(body, sender, now)
            case Revoked():
                self._borrowing.revoked(body, sender, now)
            case Over():
                self._learn(body.before, now)

    def lose(self, rank: RankId, now: float) -> None:
        """Its life is over, as its transport has seen: its blocks here are free, those there are dropped."""
        epochs = [peers[rank] for peers in self._peers() if rank in peers]
        if epochs:
            self._learn(((rank, max(epochs) + 1),), now)

    def rejoin(self, epoch: int, now: float) -> None:
        """Goes on as a new life of this rank: nothing lent, nothing owed, own blocks here as they were."""
        self._outbox.epoch = epoch
        self._borrowing.end(lambda rank, epoch: False, True, now)
        self._lending.end(lambda rank, epoch: True)
        self._is_full_due, self._heartbeat_at = True, now

    def tick(self, now: float) -> None:
        self._lending.tick(now)
        self._borrowing.tick(now)
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + self._settings.heartbeat_s
            self._num_heartbeats += 1
            self._outbox.say(None, self._heartbeat())

    def state(self) -> RankState:
        device, host = self.table.pools[Tier.DEVICE], self.table.pools[Tier.HOST]
        return RankState(
            self.rank,
            self.node,
            device.num_slots,
            device.num_free,
            self._lending.lendable(Tier.DEVICE),
            host.num_slots,
            host.num_free,
            self._lending.lendable(Tier.HOST),
            sum(self.table.num_lent.values()),
            self._borrowing.num_owed,
            self.batch,
            self.epoch,
            self.waiting,
            self.waiting_blocks,
        )

    # -- private

    def _obey(self, message: Message, now: float) -> None:
        """What the gManager says.  Without it all goes on but new plans."""
        match message.body:
            case HeartbeatSeen() as seen:
                if seen.full_wanted:
                    self._is_full_due, self._heartbeat_at = True, now
                self._learn(seen.over.before, now)
            case Over() as over:
                self._learn(over.before, now)
            case Candidates() as candidates:
                self._borrowing.candidates(candidates, now)
            case Plan() as plan if (plan.term, plan.number) > self._last_plan:
                self._last_plan = (plan.term, plan.number)
                self._carry_out(plan, now)

    def _carry_out(self, plan: Plan, now: float) -> None:
        for settle in plan.settlements:
            self._borrowing.bring_home(settle.creditor, None, settle.num_blocks, now)
        for order in plan.moves:
            # The plan may be late: what is not here any more is not moved.
            for source in Tier:
                if self.move(order.conversation, order.num_blocks, source, order.to, order.tier, now):
                    break

    def _learn(self, before: Iterable[tuple[RankId, int]], now: float) -> None:
        """Lives that are over."""
        news = [(rank, epoch) for rank, epoch in before if epoch > self._living.get(rank, 0)]
        if not news:
            return
        self._living.update(news)
        if self._living.pop(self.rank, 0) > self.epoch:
            self._outbox.do(RejoinWanted(self.epoch))

        def is_over(rank: RankId, epoch: int) -> bool:
            return epoch < self._living.get(rank, 0)

        self._lending.end(is_over)
        self._borrowing.end(is_over, False, now)

    def _heartbeat(self) -> Heartbeat:
        is_full, self._is_full_due = self._is_full_due, False
        changes = self.table.take_changes()
        entries = self.table.entries() if is_full else changes
        lending, borrowing = self._peers()
        peers = tuple(sorted({**lending, **borrowing}.items()))
        over = Over(tuple(sorted(self._living.items())))
        state, number = self.state(), self._num_heartbeats
        return Heartbeat(self.rank, self.epoch, number, state, entries, is_full, peers, over)

    def _peers(self) -> tuple[dict[RankId, int], dict[RankId, int]]:
        return self._lending.peers(), self._borrowing.peers()
