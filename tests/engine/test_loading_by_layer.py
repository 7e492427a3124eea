"""What a step loads arrives layer by layer while it computes, and no layer starts before its part is there
(Pensieve, 4.3.3): on a real decoder, whose device slots hold NaN until they are loaded.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import pytest
import torch

from engine.batch import Collect, StepPlan, StepResult
from engine.cache.block import BlockMove
from engine.cache.eviction import Candidate
from engine.cache.kv_store import HostStore, KVStore
from engine.cache.transfer import Loading, SyncTransfer, TransferEngine
from engine.conversation import Conversation, TurnState
from engine.core import Runner
from engine.models.decoder import Decoder
from engine.scheduler import Step
from engine.step_profile import StepRecorder
from engine.types import SamplingParams, TurnId
from kernels.marks import Part
from tests.engine.tiny_model import BLOCK_SIZE, CONFIG, Engine
from tests.engine.two_tiers import SIZE, TwoTiers
from tests.fakes import FakeRunner

NUM_LAYERS: int = CONFIG["num_hidden_layers"]
PROMPT = [(n * n * 7 + n) % 300 for n in range(3 * BLOCK_SIZE)]
NEW = [11, 250, 3]


class WatchedLoading:
    """Notes which layers are there when one is waited for: those before it."""

    def __init__(self, loading: Loading, store: KVStore, moves: Sequence[BlockMove]) -> None:
        self._loading, self._store = loading, store
        self._slots = [move.device_slot for move in moves]
        self.layers_there: list[list[int]] = []

    @property
    def seconds(self) -> float:
        return self._loading.seconds

    def wait_for(self, layer: int) -> None:
        self.layers_there.append([i for i in range(NUM_LAYERS) if self._is_there(i)])
        self._loading.wait_for(layer)
        assert self._is_there(layer)

    def _is_there(self, layer: int) -> bool:
        """Of every block at least the first token: the last may be partial."""
        return not self._store.layers[layer][self._slots, ..., 0, :].isnan().any()

    def finish(self) -> frozenset[BlockMove]:
        return self._loading.finish()


class WatchedTransfer:
    """Fills the slots of a load with NaN first."""

    def __init__(self, transfer: TransferEngine, store: KVStore) -> None:
        self._transfer, self._store = transfer, store
        self.loadings: list[WatchedLoading] = []

    def store(self, moves: Sequence[BlockMove], overwritten: Collection[int] = ()) -> frozenset[BlockMove]:
        return self._transfer.store(moves)

    def load(self, moves: Sequence[BlockMove]) -> WatchedLoading:
        self._store.slab[:, [move.device_slot for move in moves]] = torch.nan
        loading = WatchedLoading(self._transfer.load(moves), self._store, moves)
        if moves:
            self.loadings.append(loading)
        return loading


class HastyRunner:
    """Waits for nothing."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def launch(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> Collect:
        return self._runner.launch(plan)


def reply(engine: Engine, conversation: Conversation, prompt: Sequence[int]) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    turn = engine.core.begin(conversation, TurnId("t"), prompt, sampling, seed=0)
    while turn.state is not TurnState.FINISHED:
        engine.clock.now += 1.0
        engine.core.step()
    return turn.reply_ids


def come_back(decoder: Decoder, watch: Callable[[Engine], None]) -> tuple[list[int], Engine]:
    """A conversation whose every block is on the host says something."""
    engine = Engine(decoder, 12, max_step_tokens=100, num_host_blocks=12, pipelined=True)
    conversation = engine.open(())
    reply(engine, conversation, PROMPT)
    table = conversation.table
    for block in table.blocks.tolist():
        engine.manager.tiers._begin_store(Candidate(1e9, block, table.row, 0), engine.clock.now, leaves=True)
    engine.core.step()
    watch(engine)
    return reply(engine, conversation, NEW), engine


def fresh_reply(decoder: Decoder) -> list[int]:
    """The same conversation, with nothing ever moved."""
    engine = Engine(decoder, 12, max_step_tokens=100)
    conversation = engine.open(())
    reply(engine, conversation, PROMPT)
    return reply(engine, conversation, NEW)


def test_every_layer_waits_for_its_part_while_later_parts_are_still_on_their_way(decoder: Decoder) -> None:
    transfers: list[WatchedTransfer] = []

    def watch(engine: Engine) -> None:
        assert engine.transfer is not None
        transfers.append(WatchedTransfer(engine.transfer, engine.store))
        engine.core._transfer = transfers[0]

    replied, engine = come_back(decoder, watch)
    assert engine.manager.statistics().num_loaded == 4
    ((loading,),) = (transfer.loadings for transfer in transfers)
    assert loading.layers_there == [list(range(layer)) for layer in range(NUM_LAYERS)]
    assert replied == fresh_reply(decoder)


def test_a_layer_that_does_not_wait_is_noticed(decoder: Decoder) -> None:
    def hurry(engine: Engine) -> None:
        assert engine.transfer is not None
        engine.core._transfer = WatchedTransfer(engine.transfer, engine.store)
        engine.core._runner = HastyRunner(engine.core._runner)

    replied, _ = come_back(decoder, hurry)
    assert replied != fresh_reply(decoder)


def test_the_fake_model_waits_before_it_reads_and_notices_if_it_does_not() -> None:
    waited: list[int] = []

    class WaitingRunner(FakeRunner):
        def run(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> StepResult:
            def noted(layer: int) -> None:
                waited.append(layer)
                assert wait_for is not None
                wait_for(layer)

            return super().run(plan, noted if wait_for is not None else None)

    tiers = TwoTiers()
    runner = WaitingRunner(16, SIZE)
    runner.kv = tiers.runner.kv
    tiers.core._runner = runner
    conversation = tiers.tell(1, 5)
    tiers.bring_to_host(conversation)
    assert tiers.say(conversation, [9]).cached_host_tokens == 5 * SIZE
    assert waited == [0], "once, in the step that loads"
    tiers.bring_to_host(conversation)
    tiers.core._runner = HastyRunner(runner)
    with pytest.raises(AssertionError, match="attended before anything was written"):
        tiers.say(conversation, [8])


def test_what_nobody_waited_for_is_there_for_the_next_step_and_not_brought_again() -> None:
    device = KVStore(2, 4, 1, SIZE, 8, torch.float32)
    host = HostStore(device, 4)
    host.slab[1], device.slab[:, 2] = 7.0, 0.0
    transfer = SyncTransfer(device, host)
    loading = transfer.load([BlockMove(2, 1)])
    transfer.store([])
    assert (device.slab[:, 2] == 7.0).all()
    device.slab[:, 2] = 8.0  # by the kernels of the next step
    assert not loading.finish() and (device.slab[:, 2] == 8.0).all()


def test_the_copies_of_a_step_that_only_loads_are_told_as_its_own() -> None:
    told: list[str] = []

    class Telling(StepRecorder):
        def mark(self, part: Part, seconds: float | None = None) -> None:
            told.append(part)

        def end(self, plan: StepPlan) -> None:
            told.append(f"step {plan.number}")

    tiers = TwoTiers()
    tiers.core.recorder = Telling()
    plan = StepPlan(7, (), loads=(BlockMove(2, 1),))
    none = np.empty(0, np.int32)
    tiers.core.execute(Step(plan, (), none, ()))
    assert told == ["host", "copies", "copies", "step 7"], "begun, made, and over"
