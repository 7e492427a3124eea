"""What ranks and the gManager tell one another, and what they ask of the copies between ranks.

All of it is frozen and made of integers and short strings, so that any transport can carry it.  Times are
seconds on the clock of whoever keeps them; none crosses the wire.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, NewType

RankId = NewType("RankId", int)


class Tier(IntEnum):
    DEVICE = 0
    HOST = 1


# -- names


class RequestId(NamedTuple):
    """A reservation as the debtor calls it.  Used once in the life of a cluster."""

    debtor: RankId
    epoch: int
    number: int


class LoanId(NamedTuple):
    """What a creditor grants, and the generation of its blocks: their slots may serve others later, never
    under this name.  A loan that its creditor does not know is over, and stays so.
    """

    creditor: RankId
    epoch: int
    number: int


class Slots(NamedTuple):
    """Of one tier of a rank, in order."""

    tier: Tier
    numbers: tuple[int, ...]


# -- the placement map (Infinite-LLM, request placement entries)


@dataclass(frozen=True, slots=True)
class PlacementEntry:
    """`rank` keeps so many blocks of a conversation.  Absolute, so the last one heard counts; none: 0."""

    conversation: str
    rank: RankId
    home: RankId
    num_blocks: int
    tier: Tier


@dataclass(frozen=True, slots=True)
class RankState:
    """A rank's word about itself, in blocks where nothing else is said."""

    rank: RankId
    node: int  # ranks of a node reach one another fast
    device_blocks: int
    device_free: int
    device_lendable: int  # of those that are free, as far as the cap on lending allows
    host_blocks: int
    host_free: int
    host_lendable: int
    lent: int  # both tiers, reservations included
    borrowed: int
    batch: int  # conversations that it computes in one step
    epoch: int  # of the rank's life: a later one knows nothing of loans before
    waiting: int = 0  # conversations that wait for device blocks
    waiting_blocks: int = 0  # that they need in all

    @property
    def device_used_share(self) -> float:
        return 1.0 - self.device_free / self.device_blocks if self.device_blocks else 1.0

    def lendable(self, tier: Tier) -> int:
        return self.device_lendable if tier == Tier.DEVICE else self.host_lendable


@dataclass(frozen=True, slots=True)
class Over:
    """Lives that have ended: (rank, epoch) for each rank whose epochs before this one are over.  A message by
    itself to a rank, from the gManager or from whoever hears of such an epoch.
    """

    before: tuple[tuple[RankId, int], ...]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Rank to gManager.  `entries` are those that changed since the heartbeat before, or all if `is_full`."""

    rank: RankId
    epoch: int
    number: int  # one more than the last one's
    state: RankState
    entries: tuple[PlacementEntry, ...]
    is_full: bool
    peers: tuple[tuple[RankId, int], ...] = ()  # whom it owes or lends to, and their epochs
    over: Over = Over(())  # as far as it knows


@dataclass(frozen=True, slots=True)
class HeartbeatSeen:
    """gManager to rank."""

    full_wanted: bool  # a heartbeat is missing
    over: Over


# -- orders and requests


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """Part of a plan: `source`, the conversation's home, moves blocks to rank `to` if that has room."""

    conversation: str
    num_blocks: int
    source: RankId
    to: RankId
    tier: Tier  # there


@dataclass(frozen=True, slots=True)
class SettleOrder:
    """Part of a plan: `debtor` brings home so many of the blocks that `creditor` keeps for it."""

    debtor: RankId
    creditor: RankId
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """gManager to rank: all its orders of one round.  A plan no later than the last one is ignored."""

    term: int  # of the gManager's life
    number: int
    moves: tuple[MoveOrder, ...]
    settlements: tuple[SettleOrder, ...]


@dataclass(frozen=True, slots=True)
class CandidatesWanted:
    """Rank to gManager: who could lend so many blocks?"""

    request: RequestId
    num_blocks: int
    tier: Tier


@dataclass(frozen=True, slots=True)
class Candidates:
    """gManager to rank: best first, at most three."""

    request: RequestId
    ranks: tuple[RankId, ...]


# -- debtor and creditor.  Whatever is lost is said again until it is answered; all of it may come twice, late
# and in any order


@dataclass(frozen=True, slots=True)
class Reserve:
    """Debtor: keep room (the papers' try_move_kvcache)."""

    request: RequestId
    conversation: str
    num_blocks: int
    tier: Tier


@dataclass(frozen=True, slots=True)
class Reserved:
    """Creditor: granted for a while, or refused (None)."""

    request: RequestId
    loan: LoanId | None


@dataclass(frozen=True, slots=True)
class Commit:
    """Debtor: all blocks have arrived."""

    loan: LoanId


@dataclass(frozen=True, slots=True)
class Committed:
    """Creditor: they are kept until they are given back; or the loan is over, if not `ok`."""

    loan: LoanId
    ok: bool


@dataclass(frozen=True, slots=True)
class Release:
    """Debtor: of the loan only the first `keep` blocks are still wanted."""

    loan: LoanId
    keep: int


@dataclass(frozen=True, slots=True)
class Released:
    """Creditor: no more than `keep` are kept now."""

    loan: LoanId
    keep: int


@dataclass(frozen=True, slots=True)
class Recall:
    """Creditor: it wants all but the first `keep` blocks back soon."""

    loan: LoanId
    keep: int


@dataclass(frozen=True, slots=True)
class Revoked:
    """Creditor: it took back all but the first `keep` blocks; what was in the others is gone."""

    loan: LoanId
    keep: int


Body = (
    Heartbeat
    | HeartbeatSeen
    | Over
    | Plan
    | CandidatesWanted
    | Candidates
    | Reserve
    | Reserved
    | Commit
    | Committed
    | Release
    | Released
    | Recall
    | Revoked
)


@dataclass(frozen=True, slots=True)
class Message:
    """`sender` and `to` are ranks, or None for the gManager.  `epoch` is the sender's (its term)."""

    sender: RankId | None
    epoch: int
    to: RankId | None
    body: Body


# -- what an rManager asks of its own rank


@dataclass(frozen=True, slots=True)
class SendBlocks:
    """Copy the KV in `slots` of `tier` here into the loan's blocks, in order.  Answer: RManager.sent."""

    loan: LoanId
    conversation: str
    tier: Tier
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FetchBlocks:
    """Copy the loan's blocks from the `first` on into `slots` of `tier` here.  Answer: RManager.fetched."""

    loan: LoanId
    conversation: str
    first: int
    tier: Tier
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksMoved:
    """What was in `slots` of `tier` here is now the loan's blocks, in order; the slots are free."""

    loan: LoanId
    conversation: str
    tier: Tier
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksHome:
    """The loan's blocks from the `first` on are now in `slots` of `tier` here, and no longer there."""

    loan: LoanId
    conversation: str
    first: int
    tier: Tier
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksLost:
    """The loan's blocks from the `first` on are nowhere: they count as dropped."""

    loan: LoanId
    conversation: str
    first: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class MoveFailed:
    """A move or an attempt to borrow came to nothing: all blocks are where they were."""

    conversation: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class RejoinWanted:
    """The others take this rank's `epoch` for over: go on under a new one, with RManager.rejoin."""

    epoch: int


Action = SendBlocks | FetchBlocks | BlocksMoved | BlocksHome | BlocksLost | MoveFailed | RejoinWanted
Effect = Message | Action
