"""A rank as debtor: what it has brought to others, and what it is bringing there or home.

A debt is asked for, sent, committed and owed; from then on it only shrinks.  Until the creditor has said
that it keeps the blocks they are kept here, so whatever goes wrong before costs nothing but the copy.
"""

from collections.abc import Callable, Iterable
from itertools import islice

from engine.dist.debt import Debt, State
from engine.dist.entries import (
    BlocksHome,
    BlocksLost,
    BlocksMoved,
    Candidates,
    CandidatesWanted,
    Commit,
    Committed,
    FetchBlocks,
    LoanId,
    MoveFailed,
    RankId,
    Recall,
    Release,
    Released,
    RequestId,
    Reserve,
    Reserved,
    Revoked,
    SendBlocks,
    Tier,
)
from engine.dist.outbox import Outbox
from engine.dist.rblock_table import RBlockTable
from engine.dist.settings import LoanSettings


class Borrowing:
    def __init__(self, rank: RankId, table: RBlockTable, outbox: Outbox, settings: LoanSettings) -> None:
        self._rank = rank
        self._table, self._outbox, self._settings = table, outbox, settings
        self._requests: dict[RequestId, Debt] = {}  # asking or reserving
        self._loans: dict[LoanId, Debt] = {}
        self._by_conversation: dict[str, dict[Debt, None]] = {}
        self._unsteady: dict[Debt, None] = {}
        self._moving: dict[tuple[Tier, int], Debt] = {}  # slots here whose blocks are on their way
        self._num_requests = 0

    @property
    def num_owed(self) -> int:
        return sum(debt.num_blocks for debt in self._loans.values())

    @property
    def num_moving(self) -> int:
        return len(self._moving)

    @property
    def wants_room(self) -> bool:
        """Blocks are wanted home that nothing brings yet."""
        return any(debt.fetch is None and debt.num_blocks > debt.keep for debt in self._unsteady)

    # -- decisions

    def move(
        self,
        conversation: str,
        num_blocks: int,
        source: Tier,
        tier: Tier,
        candidates: Iterable[RankId] | None,
        now: float,
    ) -> int:
        """Begins to move the leading blocks in tier `source` here to `tier` at the first candidate that has
        room; None: the gManager is asked for candidates.  Returns how many.
        """
        held = self._table.slots(self._rank, conversation, source)
        staying = self.fetched_into(conversation, source)
        # On the device the newest one is still written to.
        newest = self._table.newest(self._rank, conversation, source) if source == Tier.DEVICE else None
        movable = (
            slot
            for slot in held
            if slot != newest and slot not in staying and (source, slot) not in self._moving
        )
        chosen = tuple(islice(movable, max(0, num_blocks)))
        if not chosen:
            return 0
        state = State.ASKING if candidates is None else State.RESERVING
        others = [rank for rank in candidates or () if rank != self._rank]
        debt = Debt(self._new_request(), conversation, source, chosen, tier, state, others)
        self._by_conversation.setdefault(conversation, {})[debt] = None
        self._moving.update(dict.fromkeys(((source, slot) for slot in chosen), debt))
        if state == State.ASKING:
            self._requests[debt.request] = debt
            self._say_again(debt, now)
        else:
            self._ask_next(debt, now)
        return len(chosen)

    def bring_home(
        self, creditor: RankId | None, conversation: str | None, num_blocks: int, now: float
    ) -> int:
        """Wants blocks back from that creditor, of that conversation (None: of any), as soon as there is room
        here and for `settle_s`.  The smallest debts first: they end whole.  Returns how many.
        """
        debts = [
            debt
            for debt in (self._loans.values() if conversation is None else self._of(conversation))
            if debt.state == State.OWED and creditor in (None, debt.creditor)
        ]
        wanted = num_blocks
        for debt in sorted(debts, key=lambda debt: debt.num_blocks):
            here = min(wanted, debt.keep, debt.num_blocks)
            if here > 0:
                debt.keep = min(debt.keep, debt.num_blocks) - here
                debt.wanted_until = now + self._settings.settle_s
                wanted -= here
                self._fetch(debt)
                self._note(debt)
        return num_blocks - wanted

    def forget(self, conversation: str, now: float) -> None:
        """Its blocks are wanted nowhere any more."""
        for debt in self._of(conversation):
            self._give_up(debt, now)

    def stop_moving(self, tier: Tier, slots: Iterable[int], now: float) -> None:
        """Those slots here are about to be freed."""
        for debt in {self._moving[tier, slot]: None for slot in slots if (tier, slot) in self._moving}:
            self._roll_back(debt, now)

    def fetched_into(self, conversation: str, tier: Tier) -> set[int]:
        """Slots here that are being written to."""
        fetches = (debt.fetch for debt in self._of(conversation))
        return {slot for fetch in fetches if fetch is not None and fetch.tier == tier for slot in fetch.slots}

    # -- messages

    def candidates(self, message: Candidates, now: float) -> None:
        debt = self._requests.get(message.request)
        if debt is not None and debt.state == State.ASKING:
            debt.candidates = [rank for rank in message.ranks if rank != self._rank]
            self._ask_next(debt, now)

    def reserved(self, message: Reserved, sender: RankId, now: float) -> None:
        debt = self._requests.get(message.request)
        if debt is None or debt.creditor != sender:
            if message.loan is not None and message.loan not in self._loans:
                self._outbox.say(sender, Release(message.loan, 0))  # it was asked for, and is wanted no more
        elif message.loan is None:
            self._ask_next(debt, now)
        else:
            del self._requests[debt.request]
            debt.loan, debt.state = message.loan, State.SENDING
            debt.kept = debt.released = len(debt.slots)
            self._loans[message.loan] = debt
            self._note(debt)
            self._outbox.do(SendBlocks(message.loan, debt.conversation, debt.source, debt.slots))

    def committed(self, message: Committed, now: float) -> None:
        debt = self._loans.get(message.loan)
        if debt is None:
            return
        if not message.ok:
            self._shrink(debt, 0, now)
            self._end(debt)
        elif debt.state == State.COMMITTING:
            self._stay(debt)
            debt.state, debt.num_blocks, debt.keep = State.OWED, len(debt.slots), len(debt.slots)
            self._table.free(self._rank, debt.conversation, debt.source, debt.slots)
            self._outbox.do(BlocksMoved(message.loan, debt.conversation, debt.source, debt.slots))
            self._note(debt)

    def released(self, message: Released, now: float) -> None:
        debt = self._loans.get(message.loan)
        if debt is not None:
            debt.released = min(debt.released, message.keep)
            self._shrink(debt, message.keep, now)
            if debt.kept == 0:
                self._end(debt)
            self._note(debt)

    def recall(self, message: Recall, sender: RankId, now: float) -> None:
        debt = self._loans.get(message.loan)
        if debt is None:
            self._outbox.say(sender, Release(message.loan, 0))
        elif debt.state == State.OWED:
            debt.keep, debt.wanted_until = min(debt.keep, message.keep), None
            self._fetch(debt)
            self._note(debt)
        elif debt.state != State.OVER:
            self._roll_back(debt, now)

    def revoked(self, message: Revoked, sender: RankId, now: float) -> None:
        debt = self._loans.get(message.loan)
        if debt is not None:
            self._shrink(debt, message.keep, now)
        self._outbox.say(sender, Release(message.loan, min(message.keep, debt.num_blocks if debt else 0)))

    # -- the copies

    def sent(self, loan: LoanId, ok: bool, now: float) -> None:
        debt = self._loans.get(loan)
        if debt is None or debt.state != State.SENDING:
            return
        if ok:
            debt.state = State.COMMITTING
            self._say_again(debt, now)
        else:
            self._roll_back(debt, now)

    def fetched(self, loan: LoanId, ok: bool, now: float) -> None:
        debt = self._loans[loan]
        fetch, debt.fetch = debt.fetch, None
        if fetch is None:
            return
        if ok and debt.state == State.OWED:
            debt.num_blocks = fetch.first
            self._outbox.do(BlocksHome(loan, debt.conversation, fetch.first, fetch.tier, fetch.slots))
        else:
            self._table.free(self._rank, debt.conversation, fetch.tier, fetch.slots)
            debt.keep = max(debt.keep, debt.num_blocks)  # the creditor, or the next settlement, asks again
        self._shrink(debt, debt.kept, now)
        self._fetch(debt)
        if debt.state == State.OWED and debt.num_blocks < debt.released:
            self._say_again(debt, now)
        self._note(debt)

    # -- time and ends

    def tick(self, now: float) -> None:
        for debt in list(self._unsteady):
            if debt.state == State.OWED and debt.wanted_until is not None and now >= debt.wanted_until:
                debt.keep, debt.wanted_until = debt.num_blocks, None
            self._fetch(debt)
            if now >= debt.repeat_at:
                self._say_again(debt, now)
            self._note(debt)

    def end(self, is_over: Callable[[RankId, int], bool], rejoining: bool, now: float) -> None:
        """The lives of creditors for which `is_over(rank, epoch)` have ended, and with them what they kept.
        `rejoining`: so has this rank's own, and with it all that it had asked for.
        """
        for debt in [debt for debts in self._by_conversation.values() for debt in debts]:
            if debt.loan is None:
                if rejoining:
                    self._roll_back(debt, now)
            elif rejoining or is_over(debt.loan.creditor, debt.loan.epoch):
                self._shrink(debt, 0, now)
                self._end(debt)

    def peers(self) -> dict[RankId, int]:
        return {loan.creditor: loan.epoch for loan in self._loans}

    def owed(self) -> dict[LoanId, int]:
        """Blocks, by loan, that are known to be there alone."""
        return {loan: debt.num_blocks for loan, debt in self._loans.items() if debt.num_blocks}

    # -- private

    def _of(self, conversation: str) -> list[Debt]:
        return list(self._by_conversation.get(conversation, ()))

    def _new_request(self) -> RequestId:
        self._num_requests += 1
        return RequestId(self._rank, self._outbox.epoch, self._num_requests)

    def _ask_next(self, debt: Debt, now: float) -> None:
        """Each candidate under a name of its own, so that a late answer is not taken for another's."""
        self._requests.pop(debt.request, None)
        if not debt.candidates:
            return self._roll_back(debt, now)
        debt.creditor, debt.state, debt.num_tries = debt.candidates.pop(0), State.RESERVING, 0
        debt.request = self._new_request()
        self._requests[debt.request] = debt
        self._say_again(debt, now)

    def _say_again(self, debt: Debt, now: float) -> None:
        """What is to be said until it is answered."""
        debt.repeat_at = now + self._settings.reply_s
        self._note(debt)
        if debt.state in (State.ASKING, State.RESERVING):
            debt.num_tries += 1
            if debt.num_tries > self._settings.max_tries:
                if debt.state == State.RESERVING:
                    self._ask_next(debt, now)
                else:
                    self._roll_back(debt, now)
            elif debt.creditor is None:
                self._outbox.say(None, CandidatesWanted(debt.request, len(debt.slots), debt.tier))
            else:
                reserve = Reserve(debt.request, debt.conversation, len(debt.slots), debt.tier)
                self._outbox.say(debt.creditor, reserve)
        elif debt.loan is not None:
            if debt.state == State.COMMITTING:
                self._outbox.say(debt.loan.creditor, Commit(debt.loan))
            elif debt.state in (State.OWED, State.OVER) and debt.num_blocks < debt.released:
                self._outbox.say(debt.loan.creditor, Release(debt.loan, debt.num_blocks))

    def _fetch(self, debt: Debt) -> None:
        """Brings home what is wanted and has room, from the end of the loan, the device first."""
        if debt.state != State.OWED or debt.fetch is not None or debt.loan is None:
            return
        wanted = debt.num_blocks - debt.keep
        tier = Tier.DEVICE if self._table.pools[Tier.DEVICE].num_free else Tier.HOST
        num_blocks = min(wanted, self._table.pools[tier].num_free)
        if num_blocks <= 0:
            return
        slots = self._table.allocate(self._rank, debt.conversation, num_blocks, tier, leading=True)
        if slots is not None:
            first = debt.num_blocks - num_blocks
            debt.fetch = FetchBlocks(debt.loan, debt.conversation, first, tier, slots)
            self._outbox.do(debt.fetch)

    def _shrink(self, debt: Debt, keep: int, now: float) -> None:
        """The creditor keeps no more than the first `keep`.  What is being fetched may still arrive."""
        debt.kept = min(debt.kept, keep)
        if debt.state in (State.SENDING, State.COMMITTING):
            if debt.kept < len(debt.slots):
                self._roll_back(debt, now)
        elif debt.state == State.OWED and debt.fetch is None and debt.kept < debt.num_blocks:
            lost = debt.num_blocks - debt.kept
            debt.num_blocks = debt.kept
            debt.keep = min(debt.keep, debt.num_blocks)
            if debt.loan is not None:
                self._outbox.do(BlocksLost(debt.loan, debt.conversation, debt.num_blocks, lost))
            self._note(debt)

    def _give_up(self, debt: Debt, now: float) -> None:
        if debt.state == State.OWED:
            debt.state, debt.num_blocks = State.OVER, 0
            self._say_again(debt, now)
        else:
            self._roll_back(debt, now)

    def _roll_back(self, debt: Debt, now: float) -> None:
        """Before it is owed: the blocks stay here, where they have been all along."""
        if debt.state in (State.OWED, State.OVER):
            return
        self._stay(debt)
        self._requests.pop(debt.request, None)
        self._outbox.do(MoveFailed(debt.conversation, len(debt.slots)))
        debt.state, debt.num_blocks = State.OVER, 0
        if debt.loan is None:
            self._drop(debt)
        else:
            self._say_again(debt, now)

    def _stay(self, debt: Debt) -> None:
        for slot in debt.slots:
            del self._moving[debt.source, slot]

    def _end(self, debt: Debt) -> None:
        """The creditor has nothing of it.  Slots that are being written to are freed when that has ended."""
        if debt.fetch is None:
            debt.state = State.OVER
        debt.released = 0
        self._note(debt)

    def _note(self, debt: Debt) -> None:
        """Keeps the lists: whom `tick` looks at, and whom nobody does any more."""
        if debt not in self._by_conversation.get(debt.conversation, ()):
            return
        over = debt.num_blocks == 0 and debt.released == 0 and debt.fetch is None
        if debt.loan is not None and over and debt.state in (State.OWED, State.OVER):
            self._drop(debt)
        elif debt.is_steady:
            self._unsteady.pop(debt, None)
        else:
            self._unsteady[debt] = None

    def _drop(self, debt: Debt) -> None:
        self._unsteady.pop(debt, None)
        debts = self._by_conversation[debt.conversation]
        del debts[debt]
        if not debts:
            del self._by_conversation[debt.conversation]
        if debt.loan is not None:
            del self._loans[debt.loan]
