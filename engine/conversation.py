"""A conversation and its turn, as the scheduler and the engine see them.

`tokens` is the whole history: what is committed, and behind it what the turn in flight has added.  A turn
begins by appending its prompt and ends by being committed (its tokens stay) or discarded (they are cut off
again).  A turn may also begin before the end of the history.  What lies behind is then set aside, with the
table that names its blocks, until the turn is committed, or put back if it comes to nothing.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from engine.cache.block_table import BlockTable
from engine.computed import Computed, Miss
from engine.errors import InvariantError
from engine.types import ConversationId, FinishReason, SamplingParams, Tenant, TurnId, Usage


class TurnState(Enum):
    WAITING = "waiting"  # in the queue, or suspended for lack of memory
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Aside:
    """A conversation as it was before a turn that begins before its end."""

    tokens: "array[int]"
    table: BlockTable  # evictable, but not forgotten
    computed: Computed


@dataclass(eq=False, slots=True)
class Turn:
    """One user message and its reply, while it is computed."""

    id: TurnId
    row: int  # unique in the process
    conversation: "Conversation"
    first_token: int  # position in the history
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams  # fully resolved
    seed: int
    max_new: int  # tokens: what the caller asked for, bounded by the context
    arrived_s: float
    bad_word_ids: tuple[tuple[int, ...], ...] = ()  # what the reply must not contain
    needs_history: bool = False  # all tokens must be known before the next one is chosen
    aside: Aside | None = None
    state: TurnState = TurnState.WAITING
    reply_ids: list[int] = field(default_factory=list)
    num_pending: int = 0  # sampled by launched steps, not yet known
    caught_up: bool = False  # the last step planned for it reached its end, so it decodes
    paused: bool = False  # its reader is slow
    usage: Usage | None = None  # known once it runs
    num_known: int = 0  # of its first tokens: computed before it began to run
    started_s: float | None = None
    first_token_s: float | None = None
    reload_s: float = 0.0  # as in `Timing`, so far
    recompute_s: float = 0.0
    prefill_s: float = 0.0
    finish_reason: FinishReason | None = None

    @property
    def num_generated(self) -> int:
        return len(self.reply_ids)

    @property
    def first_reply_token(self) -> int:
        return self.first_token + len(self.prompt_ids)

    @property
    def may_compute(self) -> bool:
        """Whether another step can be planned: not while the last token it may have is still pending, or any
        token that the choice of the next one must know.
        """
        waits = self.num_pending and self.needs_history
        return not self.paused and not waits and self.num_generated + self.num_pending < self.max_new


@dataclass(eq=False, slots=True)
class Conversation:
    id: ConversationId
    tenant: Tenant
    table: BlockTable
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    num_committed: int = 0
    computed: Computed = field(default_factory=Computed)  # before the turn in flight, ever
    turn: Turn | None = None

    def begin(self, turn: Turn) -> None:
        """Append the prompt.  The history ends where it belongs: the rest was set aside."""
        if self.turn is not None:
            raise InvariantError(f"conversation {self.id} already has turn {self.turn.id} in flight")
        if turn.first_token != len(self.tokens):
            raise InvariantError(f"turn {turn.id} begins at {turn.first_token}, {self.id} ends elsewhere")
        self.turn = turn
        self.tokens.extend(array("i", turn.prompt_ids))  # twice as fast as from the tuple itself

    def end(self, num_reply_kept: int) -> None:
        """The turn in flight is over.  Its prompt and `num_reply_kept` tokens stay."""
        if self.turn is None:
            raise InvariantError(f"conversation {self.id} has no turn to end")
        self.num_committed = self.turn.first_reply_token + num_reply_kept
        self.turn = None
        self.cut(self.num_committed)
        if num_reply_kept:
            self._expect_last()

    def extend(self, tokens: Iterable[int], num_computed: int, why: Miss) -> None:
        """Append tokens that are committed.  `num_computed` of the history then were computed once; `why`
        their KV is not here.
        """
        self.tokens.extend(array("i", tokens))
        self.num_committed = len(self.tokens)
        self.computed.add(num_computed, why)
        self._expect_last()

    def cut(self, num_tokens: int) -> None:
        """Forget everything from token `num_tokens` on."""
        del self.tokens[num_tokens:]
        self.num_committed = min(self.num_committed, num_tokens)
        self.computed.cut(num_tokens)

    def set_aside(
        self, first_token: int, table: BlockTable, prompt_ids: Sequence[int], block_size: int
    ) -> Aside:
        """Go on from token `first_token` with `prompt_ids`, over another table; `put_back` undoes it.

        So far as the prompt repeats what stood there, it counts as computed before.
        """
        aside = Aside(self.tokens, self.table, self.computed)
        num_same = first_token + common_length(prompt_ids, self.tokens[first_token:])
        self.tokens, self.table = self.tokens[:first_token], table
        self.num_committed = first_token
        self.computed = aside.computed.copy()
        self.computed.cut(num_same)
        self.computed.lose(num_same - num_same % block_size)
        return aside

    def put_back(self, aside: Aside, first_token: int) -> BlockTable:
        """Stand as before the turn at `first_token`.  Returns the table that nobody needs any more."""
        spare = self.table
        num_here = min(self.computed.num_here, first_token)  # the turn may have computed some of the history
        self.tokens, self.table, self.computed = aside.tokens, aside.table, aside.computed
        self.num_committed = len(self.tokens)
        self.computed.compute(num_here)
        return spare

    def _expect_last(self) -> None:
        """The last token was chosen; it is computed with the next turn."""
        if self.computed.num_tokens == len(self.tokens) - 1:
            self.computed.add(len(self.tokens), Miss.NEW)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with alike."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), shorter)
