"""Small real classes behind the engine's interfaces: a clock that tests move, and a model whose replies
depend on every KV entry it reads, so that a wrong cache changes the text."""

import functools
from collections.abc import Callable, Collection, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.batch import Collect, StepPlan, StepResult, at_once
from engine.cache.block import BlockMove
from engine.text.tokenizer import Tokenizer

VOCAB = 97
EOS = 0
POISON = -1  # must not even be read
GARBAGE = -2


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_800_000_000.0 + self.now


def _mix(a: int, b: int) -> int:
    return (a * 6364136223846793005 + b * 1442695040888963407 + 1) % (2**61 - 1)


def choose(values: Sequence[int], vocab: int = VOCAB) -> int:
    """The token that follows a history whose KV entries are `values`, one per position."""
    state = 7
    for value in values:
        state = _mix(state, value)
    return (state >> 17) % vocab


def stateless_reply(
    history: Sequence[int],
    num_tokens: int,
    eos_ids: frozenset[int] = frozenset({EOS}),
    vocab: int = VOCAB,
    window: int | None = None,
) -> list[int]:
    """What a fresh run over `history` replies: nothing is cached, shared or evicted here."""
    values: list[int] = []
    for position, token in enumerate(history):
        values.append(_mix(_mix(token, position), _before(values, window)))
    reply: list[int] = []
    while len(reply) < num_tokens and not (reply and reply[-1] in eos_ids):
        reply.append(choose(values if window is None else values[-window:], vocab))
        values.append(_mix(_mix(reply[-1], len(values)), _before(values, window)))
    return reply


def _before(values: Sequence[int], window: int | None) -> int:
    """What a position takes from the entries before it: the last one, or all that its window shows."""
    if window is None:
        return values[-1] if values else 0
    return functools.reduce(_mix, values[-window + 1 :], 0) if window > 1 else 0


class FakeRunner:
    """Keeps one integer per token slot.  The entry of a position mixes token, position and the entry before
    it, read through the block table, as the KV of a deep layer depends on all that came before.  With a
    `window` it mixes those that the window shows, and nothing before is read."""

    def __init__(
        self, num_slots: int, block_size: int, vocab: int = VOCAB, window: int | None = None
    ) -> None:
        self.kv = np.full((num_slots, block_size), POISON, dtype=np.int64)
        self.block_size = block_size
        self.vocab = vocab
        self.window = window
        self.num_computed = 0
        self._last: dict[int, int] = {}

    def launch(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> Collect:
        return at_once(self.run(plan, wait_for))

    def run(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> StepResult:
        sampled = {}
        if wait_for is not None:
            wait_for(0)  # it has one layer
        for segment in plan.segments:
            ids = (self._last[segment.row],) if segment.token_ids is None else segment.token_ids
            for position, token in enumerate(ids, segment.first):
                before = _before(self._seen(segment.slots, position), self.window)
                slot, offset = segment.slots[position // self.block_size], position % self.block_size
                self.kv[slot, offset] = _mix(_mix(token, position), before)
            self.num_computed += len(ids)
            if segment.draw is not None:
                end = segment.draw.position
                first = 0 if self.window is None else max(0, end - self.window)
                values = [self._read(segment.slots, position) for position in range(first, end)]
                sampled[segment.row] = choose(values, self.vocab)
        self._last.update(sampled)
        return StepResult(sampled)

    def _seen(self, slots: Sequence[int], position: int) -> list[int]:
        """The entries that `position` takes from."""
        first = max(0, position - (1 if self.window is None else self.window - 1))
        return [self._read(slots, before) for before in range(first, position)]

    def _read(self, slots: Sequence[int], position: int) -> int:
        value = int(self.kv[slots[position // self.block_size], position % self.block_size])
        assert slots[position // self.block_size] >= 0, (
            f"position {position} was attended while its block is a hole"
        )
        assert value != POISON, f"position {position} was attended before anything was written there"
        return value


class FakeTransfer:
    """Copies between a fake runner's memory and a host tier.  What a failed copy leaves behind is worth
    nothing; a step may read what a failed load left, which it learns at the end.
    """

    def __init__(self, runner: FakeRunner, num_host_slots: int) -> None:
        self.kv = np.full((num_host_slots, runner.block_size), POISON, dtype=np.int64)
        self._device = runner.kv
        self.num_to_fail = 0  # of the next copies
        self._loading: FakeLoading | None = None  # the last

    def store(self, moves: Sequence[BlockMove], overwritten: Collection[int] = ()) -> frozenset[BlockMove]:
        if self._loading is not None:
            self._loading.finish()
        for move in moves:
            self.kv[move.host_slot] = self._device[move.device_slot]
        return self._fail(moves, lambda move: self.kv[move.host_slot])

    def load(self, moves: Sequence[BlockMove]) -> "FakeLoading":
        self._loading = FakeLoading(self, moves)
        return self._loading

    def load_now(self, moves: Sequence[BlockMove]) -> frozenset[BlockMove]:
        for move in moves:
            self._device[move.device_slot] = self.kv[move.host_slot]
        return self._fail(moves, lambda move: self._device[move.device_slot], GARBAGE)

    def _fail(
        self, moves: Sequence[BlockMove], written: Callable[[BlockMove], np.ndarray], value: int = POISON
    ) -> frozenset[BlockMove]:
        assert all(min(move) >= 0 for move in moves), f"a copy from or to nowhere: {moves}"
        failed = moves[: self.num_to_fail]
        self.num_to_fail -= len(failed)
        for move in failed:
            written(move)[:] = value
        return frozenset(failed)


class FakeLoading:
    """Nothing is there before it is waited for."""

    def __init__(self, transfer: FakeTransfer, moves: Sequence[BlockMove]) -> None:
        self._transfer, self._moves = transfer, moves
        self._failed: frozenset[BlockMove] | None = None
        self.seconds = 0.0
        for move in moves:
            transfer._device[move.device_slot] = POISON

    def wait_for(self, layer: int) -> None:
        self._failed = self._transfer.load_now(self._moves)

    def finish(self) -> frozenset[BlockMove]:
        if self._failed is None:
            self.wait_for(0)
        assert self._failed is not None
        return self._failed


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


RETELLING_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message.content }}", "{{ '~' if message.role == 'assistant' else '' }}{{ message.content }}"
)
"""Marks past replies, so that no reply stands in the past as it was sampled."""

MARKED_TEMPLATE = CHAT_TEMPLATE + "{# <think> </think> #}"
"""Knows the marks of reasoning."""


@functools.cache
def byte_tokenizer(template: str = CHAT_TEMPLATE) -> Tokenizer:
    """Every byte is a token; `<|im_end|>` ends a reply."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: id for id, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    if template == MARKED_TEMPLATE:
        backend.add_tokens(["<think>", "</think>"])
    return Tokenizer(backend.to_str(), {"eos_token": "<|im_end|>"}, template)
