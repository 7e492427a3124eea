"""Where a turn's tokens come from, and what a step does for it: what `Usage` and `Timing` tell."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from engine.cache.holdings import Holdings
from engine.cache.manager import Run
from engine.computed import Miss
from engine.conversation import Turn
from engine.types import Usage


@dataclass(frozen=True, slots=True)
class Share:
    """What a step does for a turn that has no token yet."""

    turn: Turn
    num_again: int  # positions that were computed before
    num_new: int  # and others
    num_loads: int  # blocks


def usage_of(turn: Turn, held: Holdings) -> Usage:
    """Where all that the turn holds by now is found.  The last token is computed in any case: its logits
    choose the next.
    """
    computed, table = turn.conversation.computed, turn.conversation.table
    num_tokens = len(turn.conversation.tokens)
    first = held.needed_from(table, num_tokens)

    def found(n: int) -> tuple[int, int, int]:
        return (
            held.num_cached(table, n),
            held.num_reloadable(table, n, first),
            held.num_unseen(table, n, first),
        )

    device, host, unseen = found(num_tokens - 1)
    misses = computed.misses(num_tokens, turn.first_token, lambda n: sum(found(n)))
    num_new = misses[Miss.NEW] + misses[Miss.NEVER_COMPUTED]
    return Usage(
        prompt_tokens=num_tokens,
        completion_tokens=turn.num_generated,
        cached_device_tokens=device + unseen,
        cached_host_tokens=host,
        recomputed_tokens=misses.total() - num_new,
        new_tokens=num_new,
        evicted_tokens=misses[Miss.EVICTED],
        restart_tokens=misses[Miss.RESTART],
        rewritten_tokens=misses[Miss.REWRITTEN],
        cut_tokens=misses[Miss.CUT],
        never_computed_tokens=misses[Miss.NEVER_COMPUTED],
        unseen_tokens=unseen,
    )


def less_what_was_lost(usage: Usage, num_tokens: int) -> Usage:
    """The KV of so many tokens was to come from the host, and did not arrive: they are computed."""
    num_lost = min(num_tokens, usage.cached_host_tokens)
    return replace(
        usage,
        cached_host_tokens=usage.cached_host_tokens - num_lost,
        recomputed_tokens=usage.recomputed_tokens + num_lost,
        evicted_tokens=usage.evicted_tokens + num_lost,
    )


def shares_of(
    turns: Iterable[Turn], runs: Mapping[Turn, Sequence[Run]], loaded: Collection[int]
) -> tuple[Share, ...]:
    """What a step does for those of `turns` that have no token yet: it computes `runs` and brings the blocks
    `loaded` from the host.
    """
    shares, wanted = [], set(loaded)
    for turn in turns:
        if turn.first_token_s is not None:
            continue
        num_loads = len(wanted.intersection(turn.conversation.table.blocks.tolist())) if wanted else 0
        own = runs.get(turn, ())
        again = sum(max(0, min(turn.num_known, run.first + run.length) - run.first) for run in own)
        num_tokens = sum(run.length for run in own)
        if num_tokens or num_loads:
            shares.append(Share(turn, again, num_tokens - again, num_loads))
    return tuple(shares)
