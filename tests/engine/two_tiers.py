"""A core over the fake model with a device and a host tier, tiny ones, and short ways to use it."""

from collections.abc import Iterable

from engine.cache.block_pool import BlockPool
from engine.cache.costs import CostTable
from engine.cache.eviction import Candidate
from engine.cache.manager import KVCacheManager
from engine.cache.policy import Policy, lru
from engine.cache.tiers import STORE_BELOW
from engine.conversation import Conversation, Turn, TurnState
from engine.core import EngineCore
from engine.scheduler import Scheduler, Step
from engine.types import ConversationId, SamplingParams, Tenant, TurnId, Usage
from tests.fakes import FakeClock, FakeRunner, FakeTransfer, stateless_reply

SIZE = 4
COSTS = CostTable({SIZE: 1.0, 64: 5.0}, load_s=0.1)


class TwoTiers:
    """A core over blocks of 4 tokens; turns run to their end, one after the other."""

    def __init__(
        self,
        num_slots: int = 16,
        num_host_slots: int = 16,
        policy: Policy = lru,
        costs: CostTable | None = COSTS,
        max_step_tokens: int = 64,
        pipelined: bool = True,
        max_concurrent: int = 4,
        store_below: float = STORE_BELOW,
    ) -> None:
        self.clock = FakeClock()
        self.runner = FakeRunner(num_slots, SIZE)
        self.transfer = FakeTransfer(self.runner, num_host_slots)
        host = BlockPool(num_host_slots)
        self.manager = KVCacheManager(
            *(BlockPool(num_slots), SIZE, policy, host, costs), pipelined=pipelined, store_below=store_below
        )
        scheduler = Scheduler(self.manager, max_step_tokens, max_concurrent)
        context = num_slots * SIZE
        self.core = EngineCore(
            self.manager, scheduler, self.runner, self.clock, frozenset(), context, self.transfer
        )

    def open(self) -> Conversation:
        return self.core.new_conversation(ConversationId("c"), Tenant("a"))

    def begin(self, conversation: Conversation, prompt: list[int], num_new: int = 1) -> Turn:
        return self.core.begin(conversation, TurnId("t"), prompt, SamplingParams(max_tokens=num_new), seed=0)

    def say(self, conversation: Conversation, prompt: list[int], num_new: int = 1) -> Usage:
        """A turn to its end, and whatever is stored thereafter; its reply is a fresh run's."""
        history = [*conversation.tokens, *prompt]
        turn = self.begin(conversation, prompt, num_new)
        self.settle(turn)
        assert turn.reply_ids == stateless_reply(history, num_new, frozenset())
        assert turn.usage is not None
        return turn.usage

    def settle(self, *turns: Turn) -> None:
        """Steps until none can be planned; by then these turns must have ended."""
        for _ in range(300):
            if self.step() is None and all(turn.state is TurnState.FINISHED for turn in turns):
                return
        raise AssertionError(f"not all of these end: {turns}")

    def step(self) -> Step | None:
        self.clock.now += 1.0
        step = self.core.plan()
        if step is not None:
            self.core.apply(step, self.core.execute(step))
            self.manager.check()
        return step

    def fill(self, token: int) -> Conversation:
        """A conversation that takes up the whole device tier."""
        conversation = self.open()
        self.say(conversation, [token] * ((self.manager.pool.num_slots - 1) * SIZE), num_new=2)
        return conversation

    def tell(self, first_token: int, num_blocks: int) -> Conversation:
        """A conversation that holds so many full blocks."""
        conversation = self.open()
        self.say(conversation, [first_token] * (num_blocks * SIZE))
        return conversation

    def states(self, conversation: Conversation) -> list[str]:
        return [residency.value for residency in self.manager.residency(conversation.table)]

    def host_valid(self, conversation: Conversation) -> list[int]:
        """Tokens on the host, of each block."""
        return self.manager.blocks.host_valid[conversation.table.blocks].tolist()

    def bring_to_host(self, conversation: Conversation, at: Iterable[int] | None = None) -> None:
        """Copies those of an idle conversation's blocks, all that hold KV by default, and frees their device
        slots.
        """
        tiers, table = self.manager.tiers, conversation.table
        held = (i for i, block in enumerate(table.blocks) if self.manager.blocks.num_valid[block])
        for i in list(held) if at is None else at:
            assert tiers._begin_store(
                Candidate(float("inf"), table[i], table.row, i), self.clock.now, leaves=True
            )
        self.step()

    def drop(self, conversation: Conversation, at: Iterable[int]) -> None:
        """Those of an idle conversation's blocks hold no KV any more."""
        for i in at:
            self.manager.tiers.free(conversation.table[i])
