"""Random operations on the simulated engine: whatever happens, in whatever order, replies equal those of a
fresh stateless run, nothing is lost or owned twice, and every turn ends.
"""

import gc
import resource
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import product

import pytest

from engine.cache.block import BlockMove
from engine.simulation.contents import ContentLoading, ContentTransfer
from engine.simulation.random_operations import OperationSettings, RandomOperations, SimulationFailed

POLICIES = ("retention", "lru", "lru-tail")
# Blocks on the device, on the host, tokens in each: one tier alone; both tiny; a host that holds little, or
# nearly everything; so many blocks that room is made for several at once.
TIERS = ((11, 0, 4), (6, 5, 4), (11, 6, 4), (9, 30, 4), (130, 100, 1))
SETTINGS = [
    OperationSettings(policy=policy, run_ahead=run_ahead, blocks=blocks, host_blocks=host, block_size=size)
    for policy, run_ahead, (blocks, host, size) in product(POLICIES, (0, 1), TIERS)
]
SEEDS, OPERATIONS = 6, 600
EACH = pytest.mark.parametrize(
    "settings",
    SETTINGS,
    ids=lambda s: f"{s.policy}-ahead{s.run_ahead}-{s.blocks}+{s.host_blocks}",
)


def run(settings: OperationSettings) -> Counter[str]:
    simulation = RandomOperations(settings)
    simulation.run()
    return simulation.counts


def test_a_hundred_thousand_operations_are_done_in_every_build() -> None:
    assert len(SETTINGS) * SEEDS * OPERATIONS >= 100_000


@EACH
def test_replies_equal_a_stateless_run_whatever_is_done(settings: OperationSettings) -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEEDS):
        counts += run(replace(settings, seed=seed, operations=OPERATIONS))
    assert counts["num_compared"] > 400 and counts["num_cut_short"] > 200 and counts["num_suspended"] > 0
    if settings.host_blocks:
        assert counts["num_stored"] > 100 and counts["num_loaded"] > 30 and counts["num_failed_copies"] > 20
    else:
        assert counts["num_evicted"] > 100
    assert min(counts[name] for name in OPERATION_NAMES) > 0, f"never done: {counts}"


OPERATION_NAMES = (
    *("open", "say", "say again", "append", "cancel", "disconnect", "read slowly", "read on", "rewind"),
    *("fork", "forget", "delete", "drop", "fail copies", "slow copies", "refuse commits", "crash"),
)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@EACH
def test_replies_equal_a_stateless_run_in_a_long_soak(settings: OperationSettings) -> None:
    for seed in range(1000, 1030):
        run(replace(settings, seed=seed, operations=1000))


def test_a_run_is_a_function_of_its_settings() -> None:
    settings = OperationSettings(seed=3, operations=400, run_ahead=1)
    assert run(settings) == run(settings)
    assert run(settings) != run(replace(settings, seed=4))


class CutShort(RandomOperations):
    """Turns mostly come to nothing: cancelled, their readers gone, or lost in a crash."""

    def choices(self) -> list[tuple[Callable[[], bool], float]]:
        often = (self._cancel, self._disconnect, self._crash)
        return [(each, weight * (6 if each in often else 1)) for each, weight in super().choices()]


def test_ten_thousand_turns_cut_short_leave_nothing_behind() -> None:
    simulation = CutShort(OperationSettings(seed=5, blocks=9, host_blocks=8, check_every=20))

    def memory_after(num_cut_short: int) -> tuple[int, int]:
        """Python objects in use, arrays among them, and the most memory that was ever resident, in KiB, once
        so many were cut short and everybody has left.
        """
        while simulation.counts["num_cut_short"] < num_cut_short:
            simulation.operate(500)
        simulation.close()
        gc.collect()
        return sys.getallocatedblocks(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    blocks, kib = memory_after(1_000)
    more_blocks, more_kib = memory_after(11_000)
    assert more_blocks - blocks < 500 and more_kib - kib < 4_000
    assert simulation.counts["crash"] > 200


class LyingTransfer(ContentTransfer):
    """Says of no copy that it failed."""

    def store(self, moves: Sequence[BlockMove], overwritten: Collection[int] = ()) -> frozenset[BlockMove]:
        super().store(moves)
        return frozenset()

    def load(self, moves: Sequence[BlockMove]) -> ContentLoading:
        loading = super().load(moves)
        finish = loading.finish
        loading.finish = lambda: finish() & frozenset()  # type: ignore[method-assign]
        return loading


def failure(settings: OperationSettings) -> str:
    with pytest.raises(SimulationFailed) as failed:
        run(settings)
    return str(failed.value)


def test_a_copy_that_fails_silently_is_noticed_and_the_failure_says_how_to_show_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.simulation.checked_server.ContentTransfer", LyingTransfer)
    settings = OperationSettings(seed=1, operations=2000)
    message = failure(settings)
    assert "a stateless run" in message and settings.command in message
    assert "--seed 1 --operations 2000 --policy retention" in settings.command
    assert failure(settings) == message


def test_a_slot_that_is_given_back_to_nobody_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.cache.block_pool.BlockPool.give_back", lambda pool, slot: None)
    assert "slots owned" in failure(OperationSettings(operations=200))
