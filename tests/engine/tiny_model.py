"""A core over a real decoder, small enough to run a history in milliseconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cache.block_pool import BlockPool
from engine.cache.costs import CostTable
from engine.cache.kv_store import HostStore, KVStore
from engine.cache.manager import KVCacheManager
from engine.cache.policy import retention
from engine.cache.transfer import SyncTransfer
from engine.conversation import Conversation
from engine.core import EngineCore
from engine.model_runner import ModelRunner
from engine.models.decoder import Decoder
from engine.sampler import Sampler
from engine.scheduler import Scheduler
from engine.types import ConversationId, Tenant
from tests.fakes import FakeClock
from tools import random_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
BLOCK_SIZE = 16
COSTS = CostTable({16: 1.0, 256: 2.0}, load_s=0.1)


def write_model(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:  # weights so large that attention decides what is said
        patch.setattr(random_model, "_SPREAD", 0.3)
        random_model.write_random_model(folder, CONFIG, torch.float32)


class Engine:
    """Every slot holds NaN until it is written to: nothing may attend to what nobody wrote."""

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        max_step_tokens: int,
        num_host_blocks: int = 0,
        context_blocks: int | None = None,
        *,
        pipelined: bool = False,
    ) -> None:
        """`pipelined`: what is loaded is attended to in the same step, and not verified before."""
        c = decoder.config
        self.store = KVStore(c.num_layers, num_blocks, c.num_kv_heads, BLOCK_SIZE, c.head_dim, torch.float32)
        self.store.slab.fill_(torch.nan)
        runner = ModelRunner(decoder, self.store, Sampler(c.vocab_size, frozenset()), BLOCK_SIZE)
        host = BlockPool(num_host_blocks)
        self.manager = KVCacheManager(
            BlockPool(num_blocks), BLOCK_SIZE, retention(COSTS), host, COSTS, pipelined=pipelined
        )
        self.transfer = None
        if num_host_blocks:
            self.host = HostStore(self.store, num_host_blocks)
            self.host.slab.fill_(torch.nan)
            self.transfer = SyncTransfer(self.store, self.host, verify=not pipelined)
        self.clock = FakeClock()
        scheduler = Scheduler(self.manager, max_step_tokens, max_concurrent=3)
        context = (context_blocks or num_blocks) * BLOCK_SIZE
        self.core = EngineCore(
            self.manager, scheduler, runner, self.clock, frozenset(), context, self.transfer
        )

    def open(self, history: Sequence[int]) -> Conversation:
        return self.core.new_conversation(ConversationId("c"), Tenant("a"), history)
