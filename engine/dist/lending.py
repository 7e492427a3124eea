"""A rank as creditor: what it has granted to others.

A loan is reserved, then lent, and from then on only shrinks, from its end, until it is over.  Each reply
says how things are after the request, so that requests may come twice, late or in any order; a loan's name
never comes back.  Nothing here can borrow: a request that finds no room is refused (DistKV-LLM).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.dist.entries import (
    Commit,
    Committed,
    LoanId,
    RankId,
    Recall,
    Release,
    Released,
    RequestId,
    Reserve,
    Reserved,
    Revoked,
    Slots,
    Tier,
)
from engine.dist.outbox import Outbox
from engine.dist.rblock_table import RBlockTable
from engine.dist.settings import LoanSettings
from engine.errors import InvariantError


@dataclass(eq=False, slots=True)
class _Loan:
    loan: LoanId
    request: RequestId
    conversation: str
    tier: Tier
    slots: list[int]
    until: float | None  # reserved until then, or recalled until then; None: neither
    is_lent: bool = False
    keep: int = 0  # of the slots, when it is recalled
    num_holds: int = 0
    leaving: list[int] = field(default_factory=list)  # slots that wait for the end of a hold
    repeat_at: float = 0.0  # when Recall is said again


class Lending:
    def __init__(self, rank: RankId, table: RBlockTable, outbox: Outbox, settings: LoanSettings) -> None:
        self._rank = rank
        self._table, self._outbox, self._settings = table, outbox, settings
        self._loans: dict[LoanId, _Loan] = {}
        self._by_request: dict[RequestId, _Loan] = {}
        self._timed: dict[LoanId, _Loan] = {}  # those with `until`
        self._revoked: dict[LoanId, tuple[RequestId, int, float]] = {}  # not yet answered; keep, repeat at
        self._num_granted = 0

    # -- messages

    def reserve(self, message: Reserve, now: float, may_grant: bool) -> None:
        """First come, first served."""
        request, n, tier = message.request, message.num_blocks, message.tier
        loan = self._by_request.get(request)
        if loan is None and may_grant and 0 < n <= self.room(tier):
            slots = self._table.allocate(request.debtor, message.conversation, n, tier)
            if slots is None:
                raise InvariantError(f"no room for {n} blocks, and there was")
            self._num_granted += 1
            name = LoanId(self._rank, self._outbox.epoch, self._num_granted)
            until = now + self._settings.reservation_s
            loan = _Loan(name, request, message.conversation, tier, list(slots), until)
            self._loans[name] = self._by_request[request] = self._timed[name] = loan
        self._outbox.say(request.debtor, Reserved(request, loan.loan if loan else None))

    def commit(self, message: Commit, sender: RankId) -> None:
        loan = self._of(message.loan, sender)
        if loan is not None and not loan.is_lent:
            loan.is_lent, loan.until = True, None
            del self._timed[loan.loan]
        self._outbox.say(sender, Committed(message.loan, loan is not None))

    def release(self, message: Release, sender: RankId) -> None:
        loan = self._of(message.loan, sender)
        kept = 0
        if loan is not None:
            self._shrink(loan, message.keep)
            kept = len(loan.slots)
        if message.loan in self._revoked and message.keep <= self._revoked[message.loan][1]:
            del self._revoked[message.loan]
        self._outbox.say(sender, Released(message.loan, kept))

    # -- decisions

    def room(self, tier: Tier) -> int:
        """Blocks that may be granted to others now: none while some are wanted back."""
        if any(loan.is_lent and loan.tier == tier for loan in self._timed.values()):
            return 0
        return self.lendable(tier)

    def lendable(self, tier: Tier) -> int:
        """Free blocks within the cap."""
        pool = self._table.pools[tier]
        cap = int(self._settings.max_lent_share * pool.num_slots)
        return max(0, min(pool.num_free, cap - self._table.num_lent[tier]))

    def recall(self, num_blocks: int, tier: Tier, now: float) -> int:
        """Wants blocks back for this rank's own work, the youngest loans first.  Returns how many will be
        free after `recall_s` at the latest, those of earlier calls included.
        """
        coming = sum(len(loan.slots) - loan.keep for loan in self._timed.values() if self._is_due(loan, tier))
        for loan in reversed(self._loans.values()):
            wanted = num_blocks - coming
            if wanted <= 0:
                break
            if loan.tier != tier or not loan.is_lent:
                continue
            had = loan.keep if loan.until is not None else len(loan.slots)
            loan.keep = max(0, had - wanted)
            if had > loan.keep:
                coming += had - loan.keep
                if loan.until is None:
                    loan.until = now + self._settings.recall_s
                    self._timed[loan.loan] = loan
                self._say_recall(loan, now)
        return coming

    def tick(self, now: float) -> None:
        for loan in list(self._timed.values()):
            if loan.until is None:
                raise InvariantError(f"{loan} waits for nothing")
            if now >= loan.until:
                if loan.is_lent:
                    self._revoke(loan, now)
                else:
                    self._shrink(loan, 0)  # nobody was told that its blocks are in use
            elif loan.is_lent and now >= loan.repeat_at:
                self._say_recall(loan, now)
        for name, (request, keep, repeat_at) in self._revoked.items():
            if now >= repeat_at:
                self._revoked[name] = (request, keep, now + self._settings.reply_s)
                self._outbox.say(request.debtor, Revoked(name, keep))

    def end(self, is_over: Callable[[RankId, int], bool]) -> None:
        """The lives of debtors for which `is_over(rank, epoch)` have ended, and with them their loans."""
        for loan in list(self._loans.values()):
            if is_over(loan.request.debtor, loan.request.epoch):
                self._shrink(loan, 0)
        for name, (request, _, _) in list(self._revoked.items()):
            if is_over(request.debtor, request.epoch):
                del self._revoked[name]

    # -- the copies

    def hold(self, loan: LoanId) -> Slots | None:
        """The slots of a loan, for reading or writing until `let_go`, whatever becomes of the loan until
        then; or None: it is over, and what is in its slots now is not its own.
        """
        held = self._loans.get(loan)
        if held is None or not held.slots:
            return None
        held.num_holds += 1
        return Slots(held.tier, tuple(held.slots))

    def let_go(self, loan: LoanId) -> None:
        held = self._loans[loan]
        held.num_holds -= 1
        self._free_leaving(held)

    def granted(self) -> dict[LoanId, int]:
        """Blocks, by loan."""
        return {name: len(loan.slots) for name, loan in self._loans.items() if loan.slots}

    def peers(self) -> dict[RankId, int]:
        return {loan.request.debtor: loan.request.epoch for loan in self._loans.values()}

    # -- private

    def _of(self, name: LoanId, sender: RankId) -> _Loan | None:
        loan = self._loans.get(name)
        return loan if loan is not None and loan.slots and loan.request.debtor == sender else None

    @staticmethod
    def _is_due(loan: _Loan, tier: Tier) -> bool:
        return loan.is_lent and loan.tier == tier

    def _say_recall(self, loan: _Loan, now: float) -> None:
        loan.repeat_at = now + self._settings.reply_s
        self._outbox.say(loan.request.debtor, Recall(loan.loan, loan.keep))

    def _revoke(self, loan: _Loan, now: float) -> None:
        self._revoked[loan.loan] = (loan.request, loan.keep, now + self._settings.reply_s)
        self._outbox.say(loan.request.debtor, Revoked(loan.loan, loan.keep))
        self._shrink(loan, loan.keep)

    def _shrink(self, loan: _Loan, keep: int) -> None:
        keep = max(0, keep)
        loan.leaving += loan.slots[keep:]
        del loan.slots[keep:]
        loan.keep = min(loan.keep, len(loan.slots))
        if not loan.slots or (loan.is_lent and len(loan.slots) <= loan.keep):
            loan.until = None
            self._timed.pop(loan.loan, None)
        if not loan.slots:
            self._by_request.pop(loan.request, None)
        self._free_leaving(loan)

    def _free_leaving(self, loan: _Loan) -> None:
        if loan.num_holds:
            return
        if loan.leaving:
            self._table.free(loan.request.debtor, loan.conversation, loan.tier, loan.leaving)
            loan.leaving = []
        if not loan.slots:
            self._loans.pop(loan.loan, None)
