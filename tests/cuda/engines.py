"""Whole cores over the runner of either device, and conversations of several turns through them."""

from collections import deque
from collections.abc import Sequence

import torch

from engine.batch import Collect
from engine.cache.block_pool import BlockPool
from engine.cache.kv_store import KVStore
from engine.cache.manager import KVCacheManager
from engine.cache.policy import lru
from engine.cache.transfer import TransferEngine
from engine.conversation import Conversation, Turn
from engine.core import EngineCore, Runner
from engine.cuda.copies import PinnedStore, RunCopier, Tiers
from engine.cuda.runner import CudaRunner
from engine.cuda.sampler import DeviceSampler
from engine.cuda.transfer import CudaTransfer
from engine.model_runner import ModelRunner
from engine.models.decoder import Decoder
from engine.sampler import Sampler
from engine.scheduler import Scheduler, Step
from engine.types import ConversationId, SamplingParams, Tenant, TurnId
from tests.cuda.virtual_device import VirtualDevice
from tests.engine.tiny_model import BLOCK_SIZE, COSTS
from tests.fakes import FakeClock

NUM_BLOCKS, CONTEXT_BLOCKS, MAX_STEP_TOKENS, MAX_CONCURRENT = 24, 8, 40, 3


def new_store(decoder: Decoder, num_blocks: int) -> KVStore:
    """Every slot holds NaN until it is written to."""
    c = decoder.config
    store = KVStore(c.num_layers, num_blocks, c.num_kv_heads, BLOCK_SIZE, c.head_dim, torch.float32)
    store.slab.fill_(torch.nan)
    return store


def cpu_core(decoder: Decoder) -> EngineCore:
    """With more memory than it needs."""
    store = new_store(decoder, NUM_BLOCKS)
    sampler = Sampler(decoder.config.vocab_size, frozenset())
    manager = KVCacheManager(BlockPool(NUM_BLOCKS), BLOCK_SIZE, lru)
    return _core(manager, ModelRunner(decoder, store, sampler, BLOCK_SIZE))


def cuda_core(
    decoder: Decoder, *, warm: bool = False, num_blocks: int = NUM_BLOCKS, num_host_blocks: int = 0
) -> EngineCore:
    """On a virtual device.  Not `warm`: without graphs."""
    device, store = VirtualDevice(), new_store(decoder, num_blocks)
    runner = CudaRunner(
        device,
        decoder,
        store,
        DeviceSampler(device, decoder.config.vocab_size, frozenset()),
        BLOCK_SIZE,
        MAX_STEP_TOKENS,
        MAX_CONCURRENT,
        CONTEXT_BLOCKS,
    )
    if warm:
        runner.warm_up()
    host = BlockPool(num_host_blocks)
    manager = KVCacheManager(BlockPool(num_blocks), BLOCK_SIZE, lru, host, COSTS, pipelined=True)
    if not num_host_blocks:
        return _core(manager, runner)
    tiers = Tiers(store, PinnedStore(device, store, num_host_blocks))
    out, back = RunCopier(device, tiers.host, tiers.device), RunCopier(device, tiers.device, tiers.host)
    return _core(manager, runner, CudaTransfer(device, tiers, storing=out, loading=back, least_bytes=1))


def _core(manager: KVCacheManager, runner: Runner, transfer: TransferEngine | None = None) -> EngineCore:
    scheduler = Scheduler(manager, MAX_STEP_TOKENS, MAX_CONCURRENT)
    context = CONTEXT_BLOCKS * BLOCK_SIZE
    return EngineCore(manager, scheduler, runner, FakeClock(), frozenset(), context, transfer)


def run(core: EngineCore, run_ahead: int) -> None:
    """Until there is nothing to do, with so many steps launched before the oldest is collected."""
    launched: deque[tuple[Step, Collect]] = deque()
    while True:
        step = core.plan()
        if step is not None:
            launched.append((step, core.launch(step)))
        if launched and (step is None or len(launched) > run_ahead):
            step, collect = launched.popleft()
            core.apply(step, collect())
        elif step is None:
            return


def begin(
    core: EngineCore, conversation: Conversation, prompt: Sequence[int], sampling: SamplingParams
) -> Turn:
    return core.begin(conversation, TurnId("t"), prompt, sampling, seed=len(prompt))


def replies(
    core: EngineCore, run_ahead: int, num_conversations: int, num_turns: int, sampling: SamplingParams
) -> list[list[int]]:
    """Of all turns: every conversation has one at a time, the first of which are longer than a step."""
    every = [core.new_conversation(ConversationId(str(n)), Tenant("a")) for n in range(num_conversations)]
    turns: list[Turn] = []
    for number in range(num_turns):
        for at, conversation in enumerate(every):
            length = 50 if at == number == 0 else 7 + 3 * at
            prompt = [(31 * number + 57 * at + 13 * n) % 320 for n in range(length)]
            turns.append(begin(core, conversation, prompt, sampling))
        run(core, run_ahead)
    return [turn.reply_ids for turn in turns]
