"""How ranks lend, and how long they wait for one another."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoanSettings:
    """Seconds, where nothing else is said."""

    max_lent_share: float = 0.5  # of a tier's slots: a rank that lends all of them starves itself
    reservation_s: float = 10.0  # for the blocks to arrive
    recall_s: float = 10.0  # for the debtor to bring home what the creditor wants back
    settle_s: float = 10.0  # for room at home, when debts are settled
    reply_s: float = 0.5  # then it is said again
    max_tries: int = 3  # of a request to lend, or for candidates: after them the blocks stay where they are
    heartbeat_s: float = 0.5
