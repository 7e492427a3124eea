"""A conversation and its turn, as the scheduler and the engine see them.

`tokens` is the whole history: what is committed, and behind it what the turn in flight has added.  A turn
begins by appending its prompt and ends by being committed (its tokens stay) or discarded (they are cut off
again).
"""

from array import array
from dataclasses import dataclass, field
from enum import Enum

from engine.cache.block import BlockTable
from engine.errors import InvariantError
from engine.types import ConversationId, FinishReason, SamplingParams, Tenant, TurnId, Usage


class TurnState(Enum):
    WAITING = "waiting"  # in the queue, or suspended for lack of memory
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Turn:
    """One user message and its reply, while it is computed."""

    id: TurnId
    row: int  # unique in the process
    conversation: "Conversation"
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams  # fully resolved
    seed: int
    max_new: int  # tokens: what the caller asked for, bounded by the context
    arrived_s: float
    state: TurnState = TurnState.WAITING
    reply_ids: list[int] = field(default_factory=list)
    num_pending: int = 0  # sampled by launched steps, not yet known
    caught_up: bool = False  # the last step planned for it reached its end, so it decodes
    paused: bool = False  # its reader is slow
    usage: Usage | None = None  # known once it runs
    started_s: float | None = None
    first_token_s: float | None = None
    finish_reason: FinishReason | None = None

    @property
    def num_generated(self) -> int:
        return len(self.reply_ids)

    @property
    def may_compute(self) -> bool:
        """Whether another step can be planned: not while the last token it may have is still pending."""
        return not self.paused and self.num_generated + self.num_pending < self.max_new


@dataclass(eq=False, slots=True)
class Conversation:
    id: ConversationId
    tenant: Tenant
    table: BlockTable
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    num_committed: int = 0
    num_computed: int = 0  # of the first tokens: those that were computed before the turn in flight, ever
    turn: Turn | None = None

    def begin(self, turn: Turn) -> None:
        if self.turn is not None:
            raise InvariantError(f"conversation {self.id} already has turn {self.turn.id} in flight")
        self.turn = turn
        self.tokens.extend(array("i", turn.prompt_ids))  # twice as fast as from the tuple itself

    def end(self, num_reply_kept: int | None) -> None:
        """The turn in flight is over.  Its prompt and `num_reply_kept` tokens stay; None cuts off the whole
        turn.
        """
        if self.turn is None:
            raise InvariantError(f"conversation {self.id} has no turn to end")
        if num_reply_kept is not None:
            self.num_committed += len(self.turn.prompt_ids) + num_reply_kept
        self.turn = None
        self.cut(self.num_committed)

    def cut(self, num_tokens: int) -> None:
        """Forget everything from token `num_tokens` on."""
        del self.tokens[num_tokens:]
        self.num_committed = min(self.num_committed, num_tokens)
        self.num_computed = min(self.num_computed, num_tokens)
