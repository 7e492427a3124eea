"""The test of the project, on a real decoder: whatever happens to the KV of conversations (evicted, shared,
computed again in chunks, cancelled halfway), their token ids are those of a fresh run over the same history.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence

import pytest
import torch

from engine.conversation import Conversation, Turn
from engine.models.decoder import Decoder
from engine.scheduler import Step
from engine.types import FinishReason, SamplingParams, TurnId
from tests.engine.tiny_model import BLOCK_SIZE, Engine

TINY_POOL, BIG_POOL = 11, 64  # blocks; four conversations of up to nine never fit the tiny one together
CONTEXT = TINY_POOL - 2
SYSTEM = list(range(100, 100 + 2 * BLOCK_SIZE + 5))  # every conversation begins with it


def stateless_reply(decoder: Decoder, history: Sequence[int], like: Turn) -> list[int]:
    """A fresh engine with room for everything computes the history at once, then the reply."""
    engine = Engine(decoder, BIG_POOL, max_step_tokens=len(history), context_blocks=CONTEXT)
    turn = engine.core.begin(engine.open(()), TurnId("t"), history, like.sampling, like.seed)
    while turn.finish_reason is None:
        engine.core.step()
    return turn.reply_ids


class Histories:
    """Seeded random operations on four conversations; `disturb` is called between steps."""

    def __init__(
        self, decoder: Decoder, run_ahead: int, disturb: Callable[[Engine], None], num_host_blocks: int = 0
    ) -> None:
        self.decoder, self.run_ahead, self.disturb = decoder, run_ahead, disturb
        self.engine = Engine(decoder, TINY_POOL, 24, num_host_blocks, context_blocks=CONTEXT)
        self.random = random.Random(5)
        self.launched: deque[Step] = deque()
        self.histories: dict[Turn, list[int]] = {}  # at the beginning of the turn, its prompt included
        self.num_compared = 0

    def play(self, num_rounds: int) -> None:
        conversations = [self.engine.open(SYSTEM) for _ in range(4)]
        for round in range(num_rounds):
            which = self.random.randrange(4)
            if conversations[which].turn is None:
                conversations[which] = self.begin(conversations[which], seed=round)
            elif self.random.random() < 0.2:
                self.cancel(conversations[which], keep=self.random.random() < 0.5)
            self.steps(self.random.randrange(8))
        while self.launched or any(conversation.turn for conversation in conversations):
            self.steps(1)

    def begin(self, conversation: Conversation, seed: int) -> Conversation:
        prompt = [self.random.randrange(300) for _ in range(self.random.randrange(1, 40))]
        num_new = self.random.randrange(1, 20)
        if len(prompt) + num_new > self.engine.core.context_left(conversation):
            self.engine.core.forget(conversation)
            conversation = self.engine.open(SYSTEM)
        temperature = self.random.choice([0.0, 1.0])
        penalty = self.random.choice([None, None, 1.5])
        sampling = SamplingParams(temperature=temperature, max_tokens=num_new, repetition_penalty=penalty)
        first = self.change(conversation)
        history = [*conversation.tokens[:first], *prompt]
        turn = self.engine.core.begin(conversation, TurnId("t"), prompt, sampling, seed, first_token=first)
        self.histories[turn] = history
        return conversation

    def change(self, conversation: Conversation) -> int:
        """Rewinds the history, appends to it, or leaves it; returns where the next turn begins."""
        core, length = self.engine.core, len(conversation.tokens)
        point = self.random.randrange(length // 2, length + 1)
        what = self.random.random()
        if what < 0.1:
            core.rewind(conversation, conversation.tokens[:point])
        elif what < 0.2 and core.context_left(conversation) > 70:
            core.confirm(core.append(conversation, TurnId("a"), [7] * 10))
            core.compute_when_idle(conversation)
            self.steps(2)
        elif what < 0.4:
            return point
        return len(conversation.tokens)

    def cancel(self, conversation: Conversation, keep: bool) -> None:
        turn = conversation.turn
        assert turn is not None
        self.engine.core.finish(turn, FinishReason.CANCELLED, turn.num_generated if keep else None)
        if keep:
            self.engine.core.confirm(turn)

    def steps(self, times: int) -> None:
        core = self.engine.core
        for _ in range(times):
            self.engine.clock.now += 1.0
            self.disturb(self.engine)
            while len(self.launched) <= self.run_ahead and (step := core.plan()) is not None:
                self.launched.append(step)
            if self.launched:
                step = self.launched.popleft()
                for event in core.apply(step, core.execute(step)):
                    if event.finish_reason is not None:
                        self.compare(event.turn)
                self.engine.manager.check()

    def compare(self, turn: Turn) -> None:
        expected = stateless_reply(self.decoder, self.histories[turn], turn)
        assert turn.reply_ids == expected, "differs from a fresh run"
        self.engine.core.confirm(turn)
        self.num_compared += 1


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_token_ids_equal_a_fresh_run_whatever_happens_to_the_cache(decoder: Decoder, run_ahead: int) -> None:
    histories = Histories(decoder, run_ahead, disturb=lambda engine: None)
    histories.play(num_rounds=60)
    assert histories.num_compared > 15
    assert histories.engine.manager.statistics().num_evicted > 40
    usages = [turn.usage for turn in histories.histories if turn.usage is not None]
    assert sum(usage.recomputed_tokens for usage in usages) > 200
    assert sum(usage.cached_device_tokens for usage in usages) > 200


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_token_ids_equal_a_fresh_run_when_blocks_go_to_the_host_and_come_back(
    decoder: Decoder, run_ahead: int
) -> None:
    histories = Histories(decoder, run_ahead, disturb=lambda engine: None, num_host_blocks=9)
    histories.play(num_rounds=60)
    assert histories.num_compared > 15
    statistics = histories.engine.manager.statistics()
    assert statistics.num_stored > 40 and statistics.num_loaded > 20 and statistics.num_evicted > 10
    assert statistics.num_failed_copies == 0
    usages = [turn.usage for turn in histories.histories if turn.usage is not None]
    assert sum(usage.cached_host_tokens for usage in usages) > 200


def test_blocks_that_changed_on_the_host_are_computed_again(decoder: Decoder) -> None:
    def flip_a_byte_of_each(engine: Engine) -> None:
        engine.host.slab.view(torch.uint8)[..., 0] ^= 1

    histories = Histories(decoder, 0, disturb=flip_a_byte_of_each, num_host_blocks=9)
    histories.play(num_rounds=60)
    assert histories.num_compared > 15
    statistics = histories.engine.manager.statistics()
    assert statistics.num_failed_copies > 5 and statistics.num_stored > 10
    usages = [turn.usage for turn in histories.histories if turn.usage is not None]
    assert all(
        usage.prompt_tokens
        == usage.cached_device_tokens + usage.cached_host_tokens + usage.recomputed_tokens + usage.new_tokens
        for usage in usages
    )


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_one_overwritten_kv_block_is_noticed(decoder: Decoder, run_ahead: int) -> None:
    overwritten = []

    def overwrite_one(engine: Engine) -> None:
        active = [turn.conversation for turn in engine.core.scheduler.running if turn.num_generated == 1]
        if active and not overwritten and active[0].turn is not None and active[0].turn.max_new > 5:
            overwritten.append(int(engine.core.manager.slots(active[0].table, 64)[1]))
            engine.store.slab[:, overwritten[0]] *= -1

    with pytest.raises(AssertionError, match="differs from a fresh run"):
        Histories(decoder, run_ahead, overwrite_one).play(num_rounds=60)
    assert overwritten
