"""Blocks of one move, as their home keeps account of them."""

from dataclasses import dataclass
from enum import Enum

from engine.dist.entries import FetchBlocks, LoanId, RankId, RequestId, Tier


class State(Enum):
    ASKING = "asking"  # the gManager, who might lend
    RESERVING = "reserving"
    SENDING = "sending"
    COMMITTING = "committing"
    OWED = "owed"
    OVER = "over"  # here; the creditor may have to be told


@dataclass(eq=False, slots=True)
class Debt:
    request: RequestId
    conversation: str
    source: Tier  # of the blocks here, until they are owed
    slots: tuple[int, ...]
    tier: Tier  # there
    state: State
    candidates: list[RankId]  # to be asked after this one
    creditor: RankId | None = None
    loan: LoanId | None = None
    num_blocks: int = 0  # owed
    kept: int = 0  # as far as is known, the creditor keeps no more
    released: int = 0  # the creditor knows that no more are wanted
    keep: int = 0  # all others are wanted home
    wanted_until: float | None = None  # home; None: until the creditor takes them
    fetch: FetchBlocks | None = None  # in flight
    num_tries: int = 0
    repeat_at: float = 0.0

    @property
    def is_steady(self) -> bool:
        """Nothing is to be said or done by and by."""
        return self.state == State.OWED and self.released <= self.num_blocks <= self.keep
