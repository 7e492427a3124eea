"""What the cache manager costs with ten thousand idle conversations and 64 running turns.

    python -m tools.bench_cache [--conversations 10000] [--running 64] [--steps 2000]

No model: steps take no time and sample the same token, so that what is measured is the planning.  Idle
conversations hold 1,280 tokens each, 40 blocks.  The device tier holds a quarter of these blocks and the host
tier half, so that the rest has been dropped.  Running turns have histories of 2,048 tokens and say 200 each;
when one ends, an idle conversation goes on, with its blocks wherever they are.  Times are the thread's own:
other work on the machine shows less.  `choose_us` is of each block that is stored ahead of time or leaves a
tier, from choosing it to having it done.  Memory is what Python's allocators and numpy hold for the idle
conversations, all that the engine knows of them but their token ids.
"""

import argparse
import asyncio
import gc
import random
import time
import tracemalloc
from array import array
from collections.abc import Iterator
from typing import Any

from engine.cache.block_pool import BlockPool
from engine.cache.costs import CostTable
from engine.cache.eviction import Candidate, Ranking
from engine.cache.manager import KVCacheManager
from engine.cache.policy import retention
from engine.cache.tiers import Tiers
from engine.conversation import Conversation
from engine.core import EngineCore
from engine.loader import SystemClock
from engine.registry import Registry
from engine.scheduler import Scheduler
from engine.simulation.timed import TimedRunner, TimedTransfer
from engine.token_log import TokenLog
from engine.types import (
    ConversationId,
    ConversationRecord,
    FinishReason,
    Message,
    SamplingParams,
    Tenant,
    Timing,
    TurnId,
    TurnRecord,
    Usage,
)
from tools.measure import median, percentile, write_result

TENANT = Tenant("bench")
SIZE = 32
TOKEN_BYTES = array("i").itemsize
IDLE_TOKENS, RUNNING_TOKENS, REPLY = 1280, 2048, 200
COSTS = CostTable({128: 0.016, 1024: 0.018, 4096: 0.024}, load_s=0.001)
BOUNDS = {"plan_ms": 1.0, "choose_us": 20.0, "bytes_per_conversation": 2048, "bytes_per_block": 100}


class Watch:
    """Times every call of a method."""

    def __init__(self, owner: type, name: str) -> None:
        self.seconds: list[float] = []
        method = getattr(owner, name)

        def timed(*args: Any, **more: Any) -> Any:
            begun = time.thread_time()
            try:
                return method(*args, **more)
            finally:
                self.seconds.append(time.thread_time() - begun)

        setattr(owner, name, timed)


class Taken:
    """Counts what is taken from the ranking: blocks to be stored, and blocks to leave either tier."""

    def __init__(self) -> None:
        self.count = 0
        lowest = Ranking.lowest

        def counted(*args: Any) -> Iterator[Candidate]:
            for candidate in lowest(*args):
                self.count += 1
                yield candidate

        Ranking.lowest = counted  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2_000)
    chosen = parser.parse_args()
    figures = {
        "conversations": chosen.conversations,
        "running": chosen.running,
        **_speed(chosen.conversations, chosen.running, chosen.steps),
        **_memory(chosen.conversations),
        "bounds": BOUNDS,
    }
    print(figures)
    print(write_result("cache", figures))


def _core(num_idle: int, num_running: int) -> EngineCore:
    num_blocks = num_idle * IDLE_TOKENS // SIZE
    device = num_blocks // 4 + num_running * RUNNING_TOKENS // SIZE
    manager = KVCacheManager(
        BlockPool(device), SIZE, retention(COSTS), BlockPool(num_blocks // 2), COSTS, pipelined=True
    )
    scheduler = Scheduler(manager, max_step_tokens=8192, max_concurrent=num_running)
    return EngineCore(manager, scheduler, TimedRunner(), SystemClock(), frozenset(), 16_384, TimedTransfer())


def _speed(num_idle: int, num_running: int, num_steps: int) -> dict[str, Any]:
    core, rng = _core(num_idle, num_running), random.Random(1)
    idle = [_open(core, number, IDLE_TOKENS) for number in range(num_idle)]
    for conversation in idle:
        _say(core, conversation, 1)
        while core.scheduler.waiting:
            core.step()
    while core.scheduler.running:
        core.step()
    others = [_open(core, num_idle + number, RUNNING_TOKENS) for number in range(num_running)]
    for number, conversation in enumerate(others):
        _say(core, conversation, 1 + number % REPLY)  # so that they do not all end at once
    while any(turn.first_token_s is None for turn in (*core.scheduler.waiting, *core.scheduler.running)):
        core.step()
    before = core.manager.statistics()
    taken = Taken()
    choosing = [Watch(Tiers, "_make_room"), Watch(Tiers, "store_ahead")]
    plans, applies, decode_plans = [], [], []
    for _ in range(num_steps):
        while len(core.scheduler.running) + len(core.scheduler.waiting) < num_running:
            conversation = rng.choice(idle)
            if conversation.turn is None:
                _say(core, conversation, REPLY)
        begun = time.thread_time()
        step = core.plan()
        planned = time.thread_time()
        assert step is not None
        result = core.execute(step)
        executed = time.thread_time()
        core.apply(step, result)
        applies.append(time.thread_time() - executed)
        plans.append(planned - begun)
        if step.plan.num_tokens == len(step.plan.segments):
            decode_plans.append(planned - begun)
    core.manager.check()
    after = core.manager.statistics()
    chosen_s = sum(sum(watch.seconds) for watch in choosing)
    return {
        "plan_ms": _ms(median(plans)),
        "plan_p99_ms": _ms(percentile(plans, 0.99)),
        "decode_plan_ms": _ms(median(decode_plans)),
        "apply_ms": _ms(median(applies)),
        "blocks_chosen": taken.count,
        "blocks_stored": after.num_stored - before.num_stored,
        "blocks_loaded": after.num_loaded - before.num_loaded,
        "choose_us": round(1e6 * chosen_s / max(1, taken.count), 2),
    }


def _memory(num_idle: int) -> dict[str, Any]:
    """Conversations of one block and of many: the difference is the blocks'."""
    few, many = 2, IDLE_TOKENS // SIZE
    with_few = asyncio.run(_bytes(num_idle, few))
    with_many = asyncio.run(_bytes(num_idle, many))
    per_block = (with_many - with_few) / (num_idle * (many - few)) - SIZE * TOKEN_BYTES
    per_conversation = with_few / num_idle - few * (per_block + SIZE * TOKEN_BYTES)
    return {
        "bytes_per_block": round(per_block),
        "bytes_per_conversation": round(per_conversation),
    }


async def _bytes(num_idle: int, num_blocks: int) -> int:
    """What conversations with a turn of so many blocks take up."""
    core, log = _core(num_idle, 0), TokenLog.open(None, clock=SystemClock())
    registry = Registry(core, log, "model", num_idle)
    prompt = tuple(range(num_blocks * SIZE - 1))
    tracemalloc.start()
    for number in range(num_idle):
        id = ConversationId(f"conversation-{number:08}")
        record = ConversationRecord(id, TENANT, "model", None, SamplingParams())
        registry.keep(registry.new(record, [_turn(f"turn-{number:08}", (number, *prompt))]))
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    log.close()
    return taken


def _open(core: EngineCore, number: int, num_tokens: int) -> Conversation:
    tokens = [number + 2, *([7] * (num_tokens - 1))]
    return core.new_conversation(ConversationId(str(number)), TENANT, tokens)


def _say(core: EngineCore, conversation: Conversation, num_new: int) -> None:
    core.begin(conversation, TurnId("t"), [1] * 32, SamplingParams(max_tokens=num_new), seed=0)


def _turn(id: str, history: tuple[int, ...]) -> TurnRecord:
    return TurnRecord(
        turn_id=TurnId(id),
        number=0,
        first_token=0,
        prompt_ids=history,
        reply_ids=(),
        messages=(Message("user", ""),),
        reply_text="",
        finish_reason=FinishReason.LENGTH,
        matched_stop=None,
        usage=Usage(),
        timing=Timing(),
        created_at=0.0,
        done_seq=1,
        digest=bytes(32),
    )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


if __name__ == "__main__":
    main()
