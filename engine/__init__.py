"""The engine: conversations whose KV cache lives on between turns.

A turn, hop by hop.  `AsyncEngine` (async_engine.py) receives an operation from the gRPC servicer, tokenises
in a small pool and hands ids to a `Conversation`.  Each step is three calls:

    plan     on the event loop   `Scheduler` picks segments, `KVCacheManager` finds or frees blocks
    execute  on the step thread  `ModelRunner` runs the frozen `StepPlan`, one ragged batch, no phases; each
                                 layer waits for its part of what `TransferEngine` brings from the host
    apply    on the event loop   tokens are appended, stop conditions checked, text and events go out

Who owns what: `BlockPool` the slots of a tier, `KVCacheManager` the blocks of conversations and, through its
`Tiers`, where their data is (nobody else writes it), `KVStore` and `HostStore` the tensors, `Conversation`
tokens and turns, `Scheduler` queues and the token budget, `TokenLog` what survives a crash. Scheduler,
manager and policies know neither torch nor asyncio nor the clock: the same code runs in `engine.simulation`,
under virtual time, on a model that is arithmetic.

On a GPU (engine/cuda) the step thread launches a step without waiting for it, then the next one, and collects
the first one's tokens while that runs; copies between the tiers are other streams'.  Which parts compute is
decided in loader.py, and nothing above knows.

Names are resolved on first use, so that importing an integer-only module does not load torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "AsyncEngine": "engine.async_engine",
    "EngineConfig": "engine.config",
    "load_engine": "engine.loader",
}

__all__ = ["AsyncEngine", "EngineConfig", "load_engine"]  # noqa: F822  (resolved below)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
