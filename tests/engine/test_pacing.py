"""An even pace, and nobody kept waiting: in virtual time, on a device like two CPU cores."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.conversation import Turn
from engine.core import TokenEvent
from engine.simulation.simulated_engine import CoreSizes, SimulatedEngine, build_core
from engine.simulation.step_costs import StepCosts, cost_table
from engine.simulation.timed import TimedRunner, TimedTransfer
from engine.simulation.timeline import CopiesFirst
from engine.simulation.virtual_time import Agenda
from engine.step_budget import OLDEST_SHARE, Pacing
from engine.types import ConversationId, SamplingParams, Tenant, TurnId

COSTS = StepCosts(
    fixed_s=3e-3,
    weights_s=6e-3,
    token_s=3e-4,
    row_s=5e-4,
    kv_token_s=1e-6,
    pair_s=6e-8,
    load_s=2e-4,
    store_s=2e-4,
    copy_latency_s=1e-4,
    num_layers=12,
    overlaps=False,
)
CONTEXT = 8192
PACING = Pacing()
MAX_STEP_TOKENS = 512


@dataclass(eq=False, slots=True)
class Said:
    """A turn, and when its tokens came."""

    at_s: float
    token_s: list[float] = field(default_factory=list)
    then: Callable[[], None] | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.at_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


class Server:
    def __init__(
        self, pacing: Pacing | None = PACING, num_blocks: int = 2000, max_concurrent: int = 32
    ) -> None:
        self.agenda = Agenda()
        sizes = CoreSizes(
            num_blocks, max_step_tokens=MAX_STEP_TOKENS, max_concurrent=max_concurrent, pacing=pacing
        )
        self.core = build_core(
            sizes,
            cost_table(COSTS, 32, CONTEXT),
            TimedRunner(),
            TimedTransfer(),
            self.agenda,
            frozenset(),
            CONTEXT,
        )
        self.engine = SimulatedEngine(self.core, CopiesFirst(COSTS), self.agenda, 0, self._on_step)
        self._said: dict[Turn, Said] = {}
        self._num = 0

    def say(self, num_new: int, num_reply: int, then: Callable[[], None] | None = None) -> Said:
        """In a conversation of its own, whose tokens no other has.  `then` is called when it is answered."""
        self._num += 1
        conversation = self.core.new_conversation(ConversationId("c"), Tenant("a"))
        prompt = (self._num, *range(num_new - 1))
        turn = self.core.begin(
            conversation, TurnId("t"), prompt, SamplingParams(max_tokens=num_reply), seed=0
        )
        said = self._said[turn] = Said(self.agenda.now, then=then)
        self.engine.wake()
        return said

    def run_for(self, seconds: float) -> None:
        self.agenda.run_until(self.agenda.now + seconds)

    def run(self, until: "Said | None" = None) -> None:
        """Until nothing happens any more, or this turn has a token."""
        while not (until and until.token_s) and self.agenda.happen():
            pass

    def _on_step(self, events: "list[TokenEvent]") -> None:
        for event in events:
            said = self._said[event.turn]
            said.token_s.append(self.agenda.now)
            if event.finish_reason is not None and said.then is not None:
                self.agenda.after(0.0, said.then)


def step_s(rows: int, context: int, num_prompt: int = 0, position: int = 0) -> float:
    return (
        COSTS.fixed_s
        + max(COSTS.weights_s, (rows + num_prompt) * COSTS.token_s)
        + rows * (COSTS.row_s + context * COSTS.kv_token_s)
        + num_prompt * (position + num_prompt / 2) * COSTS.pair_s
    )


def decoding(server: Server, num: int = 8, reply: int = 600) -> list[Said]:
    """Conversations that have been decoding for a while."""
    rows = [server.say(100, reply) for _ in range(num)]
    server.run_for(1.0)
    assert all(len(said.token_s) > 10 for said in rows)
    return rows


def gaps_during(rows: list[Said], begun_s: float, ended_s: float) -> list[float]:
    return [
        b - a
        for said in rows
        for a, b in zip(said.token_s, said.token_s[1:], strict=False)
        if begun_s <= b <= ended_s
    ]


def test_a_long_prompt_does_not_stall_those_who_decode() -> None:
    server = Server()
    rows = decoding(server)
    before = gaps_during(rows, server.agenda.now - 0.5, server.agenda.now)
    long = server.say(4000, 2)
    server.run(until=long)
    gaps = gaps_during(rows, long.at_s, long.token_s[0])
    mean = sum(gaps) / len(gaps)
    assert max(gaps) <= 2 * mean
    least_s = step_s(0, 0, PACING.least, 4000) - step_s(0, 0)
    alone = sum(before) / len(before)
    assert max(gaps) <= 1.15 * max(PACING.ratio * alone, alone + least_s), "as long as the pace allows"


def test_without_pacing_it_does() -> None:
    server = Server(None)
    rows = decoding(server)
    before = gaps_during(rows, server.agenda.now - 0.5, server.agenda.now)
    long = server.say(4000, 2)
    server.run(until=long)
    assert max(gaps_during(rows, long.at_s, long.token_s[0])) > 8 * max(before)


def test_a_long_prompt_beside_those_who_decode_is_done_within_its_bound() -> None:
    server = Server()
    decoding(server, reply=3000)
    long = server.say(4000, 2)
    server.run(until=long)
    most_s = step_s(8, 4000, PACING.least, 4000)
    assert long.ttft_s <= (4000 / PACING.least + 2) * most_s


def test_a_long_prompt_alone_is_computed_in_the_largest_steps() -> None:
    server = Server()
    long = server.say(4000, 2)
    server.run()
    assert server.engine.num_steps == -(-4000 // MAX_STEP_TOKENS) + 1
    assert long.ttft_s < 4000 * (COSTS.token_s + 4000 / 2 * COSTS.pair_s) + 8 * 0.02


@pytest.mark.parametrize("num_decoding", [0, 8])
def test_a_short_turn_does_not_wait_for_a_long_one(num_decoding: int) -> None:
    server = Server()
    decoding(server, num_decoding, reply=3000)
    long = server.say(4000, 2)
    server.run_for(0.3)
    short = server.say(100, 2)
    server.run(until=short)
    num_steps = 1 + 1 + -(-100 // (PACING.least * 3 // 4))  # under way, the one that admits, and its chunks
    most_s = max(step_s(0, 0, MAX_STEP_TOKENS, 4000), step_s(8, 3000, PACING.least, 4000))
    assert short.ttft_s <= num_steps * most_s
    assert not long.token_s


def test_short_turns_without_end_do_not_starve_a_long_one() -> None:
    server = Server(max_concurrent=12)

    def again() -> None:
        if not long.token_s:
            server.say(100, 4, again)

    long = server.say(4000, 2)
    for _ in range(10):
        server.say(100, 4, again)
    server.run()
    most_s = 2 * step_s(12, 200) + step_s(0, 0, MAX_STEP_TOKENS, 4000) / 4
    assert long.ttft_s <= 4000 / (PACING.least / OLDEST_SHARE) * most_s
    assert len(server._said) > 100, "they kept coming"


def test_a_short_turn_in_the_queue_begins_beside_a_long_prompt_that_takes_all_of_a_step() -> None:
    server = Server(None)
    long = server.say(4000, 2)
    short = server.say(100, 2)
    server.run()
    assert short.ttft_s < long.ttft_s / 3


def test_the_even_pace_costs_little() -> None:
    """16 conversations at once, 6 turns of 100 new tokens and 64 of a reply each."""

    def played(pacing: Pacing | None) -> tuple[float, float, float]:
        server, said = Server(pacing), []

        def say(left: int) -> None:
            said.append(server.say(100, 64, partial(say, left - 1) if left > 1 else None))

        for _ in range(16):
            say(6)
        server.run()
        gaps = sorted(gap for one in said for gap in one.gaps_s)
        mean, p99 = sum(gaps) / len(gaps), gaps[int(0.99 * len(gaps))]
        return server.agenda.now, sum(one.ttft_s for one in said) / len(said), p99 / mean

    wall_s, ttft_s, spread = played(PACING)
    unpaced_wall_s, unpaced_ttft_s, unpaced_spread = played(None)
    assert spread <= 1.9 and unpaced_spread > 4
    assert wall_s <= 1.05 * unpaced_wall_s
    assert ttft_s <= 1.05 * unpaced_ttft_s


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 5), st.integers(8, 64), st.integers(1, 128))
def test_whatever_is_said_is_answered(seed: int, concurrent: int, num_blocks: int, least: int) -> None:
    rng, server = random.Random(seed), Server(Pacing(2.0, least), num_blocks, concurrent)
    context, said = (num_blocks - 1) * 32, []
    for _ in range(20):
        num_new = min(rng.choice((5, 40, 300, 1500)), context - 20)
        said.append((server.say(num_new, n := rng.randint(1, 20)), n))
        server.run_for(rng.expovariate(10.0))
    server.run()
    assert [len(one.token_s) for one, _ in said] == [n for _, n in said]
    server.core.manager.check()
