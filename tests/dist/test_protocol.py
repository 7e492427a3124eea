"""Whatever the network does and whoever dies: no block is owned twice, lost from the books, or used by those
who gave it away; and once messages arrive again, all agree and all that was begun has ended.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.dist.entries import RankId, Tier
from tests.dist.ranks import Ranks

NUM_RANKS = 4
RANKS = st.integers(0, NUM_RANKS - 1)
TIERS = st.sampled_from(Tier)
NAMES = st.sampled_from(["a", "b", "c"])
SIZES = st.integers(1, 5)
ANY = st.integers(0, 10_000)


class Protocol(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ranks = Ranks(NUM_RANKS)

    def manager(self, rank: int) -> Any:
        return self.ranks.ranks[RankId(rank)].manager

    def do(self, call: Callable[[], Any]) -> None:
        call()
        self.ranks.collect()

    # -- ranks

    @rule(rank=RANKS, name=NAMES, n=SIZES, tier=TIERS)
    def grow(self, rank, name, n, tier):
        self.ranks.grow(rank, name, n, tier)

    @rule(rank=RANKS, name=NAMES)
    def forget(self, rank, name):
        self.ranks.forget(rank, name)

    @rule(rank=RANKS, name=NAMES)
    def free_last(self, rank, name):
        if self.ranks.ranks[RankId(rank)].blocks.get(name):
            self.ranks.free_last(rank, name)

    @rule(rank=RANKS, name=NAMES, n=SIZES, source=TIERS, tier=TIERS)
    def borrow(self, rank, name, n, source, tier):
        self.do(lambda: self.manager(rank).borrow(name, n, source, tier, self.ranks.now))

    @rule(rank=RANKS, to=RANKS, name=NAMES, n=SIZES, source=TIERS, tier=TIERS)
    def move(self, rank, to, name, n, source, tier):
        self.do(lambda: self.manager(rank).move(name, n, source, RankId(to), tier, self.ranks.now))

    @rule(rank=RANKS, name=NAMES, n=SIZES)
    def bring_home(self, rank, name, n):
        self.do(lambda: self.manager(rank).bring_home(name, n, self.ranks.now))

    @rule(rank=RANKS, n=SIZES, tier=TIERS)
    def recall(self, rank, n, tier):
        self.do(lambda: self.manager(rank).recall(n, tier, self.ranks.now))

    @rule(rank=RANKS, waiting=st.integers(0, 3), batch=st.integers(1, 5))
    def compute(self, rank, waiting, batch):
        manager = self.manager(rank)
        manager.batch, manager.waiting, manager.waiting_blocks = batch, waiting, 2 * waiting

    # -- the network and the copies

    @precondition(lambda self: self.ranks.messages)
    @rule(which=ANY, again=st.booleans())
    def deliver(self, which, again):
        self.ranks.deliver(which % len(self.ranks.messages), again=again)

    @precondition(lambda self: self.ranks.messages)
    @rule(n=st.integers(1, 20))
    def deliver_in_order(self, n):
        for _ in range(min(n, len(self.ranks.messages))):
            self.ranks.deliver(0)

    @precondition(lambda self: self.ranks.messages)
    @rule(which=ANY)
    def lose_message(self, which):
        self.ranks.messages.pop(which % len(self.ranks.messages))

    @precondition(lambda self: self.ranks.copies)
    @rule(which=ANY)
    def begin_copy(self, which):
        self.ranks.begin_copy(self.ranks.copies[which % len(self.ranks.copies)])

    @precondition(lambda self: self.ranks.copies)
    @rule(which=ANY, ok=st.sampled_from([True, True, False]))
    def end_copy(self, which, ok):
        self.ranks.end_copy(self.ranks.copies[which % len(self.ranks.copies)], ok)

    @rule(seconds=st.sampled_from([0.1, 0.6, 2.5, 5.0]))
    def advance(self, seconds):
        self.ranks.advance(seconds)

    # -- faults

    @rule(rank=RANKS)
    def crash(self, rank):
        self.ranks.crash(rank)

    @rule(rank=RANKS)
    def cut_off(self, rank):
        self.ranks.cut.add(RankId(rank))

    @rule()
    def join_again(self):
        self.ranks.cut.clear()

    @rule(rank=RANKS, other=RANKS)
    def lose_rank(self, rank, other):
        if rank != other:
            self.do(lambda: self.manager(rank).lose(RankId(other), self.ranks.now))

    @rule()
    def crash_gmanager(self):
        self.ranks.crash_gmanager()

    @rule()
    def all_comes_to_rest(self):
        self.rest()

    def rest(self) -> None:
        for rank in range(NUM_RANKS):
            self.compute(rank, 0, 5)  # no new plans
        self.ranks.settle()
        self.ranks.check_agreement()

    @invariant()
    def books_are_right(self):
        self.ranks.check()

    def teardown(self) -> None:
        self.rest()
        self.ranks.check()


Protocol.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestProtocol = Protocol.TestCase


def run_at_random(seed: int, num_steps: int) -> Protocol:
    """The same rules, in long runs that hypothesis would not try."""
    rng, machine = random.Random(seed), Protocol()
    sizes = [1, 2, 3, 5]
    tiers = list(Tier)
    for _ in range(num_steps):
        rank, name = rng.randrange(NUM_RANKS), rng.choice("abc")
        what = rng.random()
        if what < 0.12:
            machine.grow(rank, name, rng.choice(sizes), rng.choice(tiers))
        elif what < 0.14:
            machine.forget(rank, name)
        elif what < 0.16:
            machine.free_last(rank, name)
        elif what < 0.20:
            machine.borrow(rank, name, rng.choice(sizes), rng.choice(tiers), rng.choice(tiers))
        elif what < 0.24:
            to = rng.randrange(NUM_RANKS)
            machine.move(rank, to, name, rng.choice(sizes), rng.choice(tiers), rng.choice(tiers))
        elif what < 0.26:
            machine.bring_home(rank, name, rng.choice(sizes))
        elif what < 0.28:
            machine.recall(rank, rng.choice(sizes), rng.choice(tiers))
        elif what < 0.31:
            machine.compute(rank, rng.randrange(4), rng.randrange(1, 6))
        elif what < 0.70 and machine.ranks.messages:
            for _ in range(min(len(machine.ranks.messages), rng.choice((1, 8)))):
                machine.deliver(rng.randrange(10_000) % len(machine.ranks.messages), rng.random() < 0.1)
        elif what < 0.73 and machine.ranks.messages:
            machine.lose_message(rng.randrange(10_000))
        elif what < 0.86 and machine.ranks.copies:
            if rng.random() < 0.3:
                machine.begin_copy(rng.randrange(10_000))
            else:
                machine.end_copy(rng.randrange(10_000), rng.random() < 0.8)
        elif what < 0.97:
            machine.advance(rng.choice([0.1, 0.1, 0.3, 0.6]))
        elif what < 0.972:
            machine.crash(rank)
        elif what < 0.975:
            machine.cut_off(rank)
        elif what < 0.985:
            machine.join_again()
        elif what < 0.987:
            machine.lose_rank(rank, rng.randrange(NUM_RANKS))
        elif what < 0.99:
            machine.crash_gmanager()
        elif what < 0.993:
            machine.rest()
        machine.books_are_right()
    machine.teardown()
    return machine


@pytest.mark.parametrize("seed", range(10))
def test_long_runs_keep_the_books(seed):
    machine = run_at_random(seed, 3000)
    assert machine.ranks.num_blocks > 100


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_long_runs_keep_the_books(seed):
    run_at_random(seed, 5000)
