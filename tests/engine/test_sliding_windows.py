"""Models whose layers attend through sliding windows, on the real decoder: what lies before all that the
windows show stays dropped, and replies are those of a fresh run.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.cache.block import Residency
from engine.cache.block_pool import BlockPool
from engine.cache.costs import CostTable
from engine.cache.eviction import Candidate
from engine.cache.kv_store import HostStore, KVStore
from engine.cache.manager import KVCacheManager
from engine.cache.policy import lru
from engine.cache.transfer import SyncTransfer
from engine.conversation import Conversation
from engine.core import EngineCore
from engine.model_runner import ModelRunner
from engine.models import load_model
from engine.models.decoder import Decoder
from engine.models.layer_attention import reach
from engine.sampler import Sampler
from engine.scheduler import Scheduler
from engine.types import ConversationId, SamplingParams, Tenant, TurnId, Usage
from kernels import dispatch
from kernels.native.build import BuildError
from tests.engine.harness import check_sums
from tests.fakes import FakeClock
from tests.models.tiny_models import tiny_checkpoint

SIZE = 16
NUM_BLOCKS = 24
COSTS = CostTable({16: 1.0, 256: 2.0}, load_s=0.1)
ALL_WINDOWED = {"mistral": 41, "phi3": 40}


class Engine:
    """A core over a real decoder with room for everything: what leaves the tiers, the test gives up."""

    def __init__(self, decoder: Decoder, max_step_tokens: int = 30) -> None:
        c = decoder.config
        self.store = KVStore(c.num_layers, NUM_BLOCKS, c.num_kv_heads, SIZE, c.head_dim, torch.float32)
        self.host = HostStore(self.store, NUM_BLOCKS)
        self.store.slab.fill_(torch.nan)  # nothing may attend to what nobody wrote
        self.host.slab.fill_(torch.nan)
        self.manager = KVCacheManager(
            BlockPool(NUM_BLOCKS),
            SIZE,
            lru,
            BlockPool(NUM_BLOCKS),
            COSTS,
            pipelined=True,
            window=reach(c.layers),
        )
        runner = ModelRunner(decoder, self.store, Sampler(c.vocab_size, frozenset()), SIZE)
        scheduler = Scheduler(self.manager, max_step_tokens, max_concurrent=3)
        transfer = SyncTransfer(self.store, self.host)
        self.core = EngineCore(self.manager, scheduler, runner, FakeClock(), frozenset(), 350, transfer)

    def open(self) -> Conversation:
        return self.core.new_conversation(ConversationId("c"), Tenant("a"))

    def say(self, conversation: Conversation, prompt: list[int], num_new: int) -> tuple[list[int], Usage]:
        turn = self.core.begin(conversation, TurnId("t"), prompt, SamplingParams(max_tokens=num_new), seed=1)
        while turn.finish_reason is None:
            self.core.step()
            self.manager.check()
        self.core.confirm(turn)
        assert turn.usage is not None
        check_sums(turn.usage)
        return turn.reply_ids, turn.usage

    def lose(self, conversation: Conversation, blocks: list[int], to_host: list[int]) -> None:
        """Give up the KV of these blocks, or leave it on the host alone.  What a slot held is poison then."""
        tiers, columns, now = self.manager.tiers, self.manager.blocks, 1e9
        ids = conversation.table.blocks
        for at in to_host:
            if columns.num_valid[ids[at]] and columns.host_slot[ids[at]] == -1:
                tiers._begin_store(Candidate(1e9, ids.item(at), -1, 0), now, leaves=True)
        self.core.step()  # makes the copies
        for at in blocks:
            slot = columns.slot.item(ids[at])
            tiers.free(ids.item(at))
            self.store.slab[:, slot] = torch.nan


@pytest.fixture(scope="module", params=["mistral", "phi3", "qwen2 windowed", "gemma2", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("model")
    tiny_checkpoint(request.param, path, torch.float32)
    return request.param, path


@pytest.fixture(params=["native", "torch"])
def model(request: pytest.FixtureRequest, folder: tuple[str, Path]) -> Iterator[tuple[str, Decoder]]:
    try:
        with dispatch.use(request.param):
            yield folder[0], load_model(folder[1], torch.float32)
    except BuildError as error:
        pytest.skip(f"the native kernels cannot be built here: {error}")


def test_a_model_with_one_layer_that_sees_everything_has_no_window(model: tuple[str, Decoder]) -> None:
    name, decoder = model
    assert reach(decoder.config.layers) == ALL_WINDOWED.get(name)


def test_replies_equal_a_fresh_run_whatever_was_dropped(model: tuple[str, Decoder]) -> None:
    name, decoder = model
    chance = random.Random(3)
    unseen, recomputed = 0, 0
    for _ in range(8):
        engine = Engine(decoder)
        conversation = engine.open()
        history: list[int] = []
        for _ in range(5):
            num_blocks = len(conversation.table)
            odds = [chance.choice([0.05, 0.8 if 2 * at < num_blocks else 0.2]) for at in range(num_blocks)]
            lost = [at for at in range(num_blocks) if chance.random() < odds[at]]
            engine.lose(conversation, lost, to_host=[at for at in range(num_blocks) if chance.random() < 0.3])
            prompt = [chance.randrange(3, 300) for _ in range(chance.randrange(1, 70))]
            reply, usage = engine.say(conversation, prompt, num_new=6)
            history += prompt
            fresh = Engine(decoder, max_step_tokens=400)
            assert reply == fresh.say(fresh.open(), history, num_new=6)[0], "differs from a fresh run"
            history += reply
            unseen, recomputed = unseen + usage.unseen_tokens, recomputed + usage.recomputed_tokens
    assert recomputed > 200
    assert unseen > 200 if name in ALL_WINDOWED else unseen == 0


def test_holes_before_every_window_stay_dropped_and_take_no_slot(model: tuple[str, Decoder]) -> None:
    name, decoder = model
    engine = Engine(decoder)
    conversation = engine.open()
    reply, _ = engine.say(conversation, list(range(3, 208)), num_new=2)
    history = [*range(3, 208), *reply]  # and one token more, which makes 13 blocks
    engine.lose(conversation, [0, 1, 2, 3, 4, 5], to_host=[6, 7])
    num_free = engine.manager.pool.num_free
    num_missing = engine.manager.held.num_missing(conversation.table, len(history) + 1)
    assert num_missing == (0 if name in ALL_WINDOWED else 8)
    again, usage = engine.say(conversation, [9], num_new=1)
    states = engine.manager.residency(conversation.table)
    fresh = Engine(decoder)
    assert again == fresh.say(fresh.open(), [*history, 9], num_new=1)[0]
    if name in ALL_WINDOWED:
        assert states[:8] == [Residency.DROPPED] * 6 + [Residency.HOST] * 2
        assert engine.manager.pool.num_free == num_free
        assert (usage.recomputed_tokens, usage.cached_host_tokens) == (0, 0)
        assert (usage.unseen_tokens, usage.cached_device_tokens) == (8 * SIZE, len(history) - 1)
    else:
        assert Residency.DROPPED not in states[:13]
        assert usage.recomputed_tokens == 6 * SIZE and usage.cached_host_tokens == 2 * SIZE
        assert usage.unseen_tokens == 0


@pytest.mark.parametrize("folder", ["mistral"], indirect=True)
def test_a_hole_in_sight_is_computed_with_the_window_before_it(
    model: tuple[str, Decoder],
) -> None:
    engine = Engine(model[1])
    conversation = engine.open()
    engine.say(conversation, list(range(3, 210)), num_new=2)
    engine.lose(conversation, [0, 1, 2, 11], to_host=[9])
    _, usage = engine.say(conversation, [9], num_new=1)
    # Block 11 is seen from position 209; it sees from 136 on, which lies in block 8.
    assert usage.recomputed_tokens == SIZE and usage.evicted_tokens == SIZE
    assert usage.cached_host_tokens == SIZE and usage.unseen_tokens == 3 * SIZE
    states = engine.manager.residency(conversation.table)
    assert states[:3] == [Residency.DROPPED] * 3 and Residency.DROPPED not in states[3:]
