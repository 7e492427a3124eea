"""What is said: conversations as scripts of lengths and pauses, drawn from a seed.

A workload is a pool of scripts; a run draws conversations from it, each with token ids of its own.  Two pools
are made here, after published statistics; those that are read from files are made in `tools.bench.files`.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

POOL = 1000  # scripts; what is said about a pool's means is exact, as conversations are drawn from it evenly


@dataclass(frozen=True, slots=True)
class Exchange:
    """One turn: what the client says, and how long the reply shall be.  Lengths in tokens."""

    new_tokens: int
    reply_tokens: int
    think_s: float = 0.0  # since the end of the reply before; 0 for the first turn
    text: str = ""  # is said instead of random token ids
    reply_text: str = ""  # of the data: only its length is asked for
    at_s: float | None = None  # since the conversation's first turn, instead of a think time


@dataclass(frozen=True, slots=True)
class Script:
    """One conversation.  `shared_tokens` at its beginning are the same in every conversation."""

    exchanges: tuple[Exchange, ...]
    shared_tokens: int = 0

    @property
    def life_s(self) -> float:
        """How long it is thought about, all in all: its life but for the time that replies take."""
        return sum(exchange.think_s for exchange in self.exchanges)

    def tokens_before(self, turn: int) -> int:
        """Length of the history that `turn` (from 0) finds."""
        return sum(each.new_tokens + each.reply_tokens for each in self.exchanges[:turn])

    def within(self, context_tokens: int) -> "Script":
        """Without the turns that would not fit; empty if not even the first does."""
        used = 0
        for number, exchange in enumerate(self.exchanges):
            used += exchange.new_tokens + exchange.reply_tokens
            if used > context_tokens:
                return replace(self, exchanges=self.exchanges[:number])
        return self

    def paced(self, factor: float) -> "Script":
        """With all pauses longer by `factor`."""
        return replace(
            self,
            exchanges=tuple(
                replace(
                    each,
                    think_s=factor * each.think_s,
                    at_s=None if each.at_s is None else factor * each.at_s,
                )
                for each in self.exchanges
            ),
        )


@dataclass(frozen=True, slots=True)
class Lengths:
    """Means of a chat data set, as Pensieve's evaluation gives them (its table 2)."""

    turns: float
    new_tokens: float
    reply_tokens: float


CHATS = {"sharegpt": Lengths(5.56, 37.77, 204.58), "ultrachat": Lengths(3.86, 51.78, 257.81)}
NEW_SPREAD, REPLY_SPREAD = 1.0, 0.8


def chat_pool(lengths: Lengths, seed: int, scale: float, think_s: float) -> list[Script]:
    """Pensieve's setting: people who chat.

    Turns per conversation are geometric (each may be the last), new and reply tokens per turn lognormal with
    the spreads (of the logarithm) above, think times exponential; all with the given means, all independent.
    """
    draw = random.Random(f"chat {seed}")
    scripts = []
    for _ in range(POOL):
        turns = 1 + int(math.log(1.0 - draw.random()) / math.log(1.0 - 1.0 / lengths.turns))
        scripts.append(
            Script(
                tuple(
                    Exchange(
                        _tokens(draw, lengths.new_tokens, NEW_SPREAD, scale),
                        _tokens(draw, lengths.reply_tokens, REPLY_SPREAD, scale),
                        draw.expovariate(1.0 / think_s) if turn else 0.0,
                    )
                    for turn in range(turns)
                )
            )
        )
    return scripts


AGENT_TURNS, AGENT_TURNS_SPREAD = 33.0, 0.6
AGENT_FIRST, AGENT_NEW, AGENT_REPLY = 12_000.0, 1_550.0, 500.0
AGENT_IDLE_S, AGENT_IDLE_SPREAD = 5.2, 1.183


def agent_pool(seed: int, scale: float) -> list[Script]:
    """Coding agents: many turns, long tool outputs, short pauses with a long tail.

    After what vLLM and Mooncake published of Codex traces (May 2026): a median of 33 turns, prompts that grow
    from 12,000 to 80,000 tokens, 131 prompt tokens for one of output, and pauses of 5.2 s in the median,
    81.4 s at the 99th percentile.  Everything is lognormal: turns by their median (4 to 200 of them), the
    first prompt, new tokens per later turn and replies by the means above, which lead to these prompts, and
    pauses by the spread that leads from the one percentile to the other.
    """
    draw = random.Random(f"agent {seed}")
    scripts = []
    for _ in range(POOL):
        turns = min(max(round(AGENT_TURNS * math.exp(draw.gauss(0.0, AGENT_TURNS_SPREAD))), 4), 200)
        first = Exchange(_tokens(draw, AGENT_FIRST, 0.3, scale), _tokens(draw, AGENT_REPLY, 0.8, scale))
        later = (
            Exchange(
                _tokens(draw, AGENT_NEW, 1.2, scale),
                _tokens(draw, AGENT_REPLY, 0.8, scale),
                AGENT_IDLE_S * math.exp(draw.gauss(0.0, AGENT_IDLE_SPREAD)),
            )
            for _ in range(turns - 1)
        )
        scripts.append(Script((first, *later)))
    return scripts


def mean_turns(pool: Sequence[Script]) -> float:
    return sum(len(script.exchanges) for script in pool) / len(pool)


def mean_life_s(pool: Sequence[Script]) -> float:
    return sum(script.life_s for script in pool) / len(pool)


def mean_think_s(pool: Sequence[Script]) -> float:
    """Of all turns but the first; 0 if there are none."""
    pauses = sum(len(script.exchanges) - 1 for script in pool)
    return sum(script.life_s for script in pool) / pauses if pauses else 0.0


def token_ids(seed: int, conversation: int, turn: int, count: int, vocabulary: int) -> list[int]:
    """Random ids, the same for the same arguments."""
    return random.Random(f"{seed} {conversation} {turn}").choices(
        range(min(10, vocabulary - 1), vocabulary), k=count
    )


def _tokens(draw: random.Random, mean: float, spread: float, scale: float) -> int:
    """A lognormal length with this mean, times `scale`; at least 1."""
    return max(1, round(scale * draw.lognormvariate(math.log(mean) - spread**2 / 2, spread)))
