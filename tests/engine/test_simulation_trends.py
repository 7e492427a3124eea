"""What Pensieve's evaluation found (its sections 6.2 to 6.7), as trends of the simulated engine.

The machine is an H200 made slower, so that minutes need few turns; tiers are sized to the load.  Seeds are
fixed, and bounds leave room for another draw of conversations.
"""

from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest

from engine.simulation.profiles import Profile, gpu_profiles
from engine.simulation.simulated_engine import CoreSizes
from tools.bench.population import Population
from tools.bench.workload import CHATS, Lengths, chat_pool
from tools.simulated_load import Setting, SimulatedLoad

CHAT = CHATS["sharegpt"]
GIB = 2**30


def slower(name: str, factor: float) -> Profile:
    profile = gpu_profiles()[name]
    times = {
        field.name: factor * getattr(profile.costs, field.name)
        for field in fields(profile.costs)
        if field.name.endswith("_s")
    }
    return replace(profile, costs=replace(profile.costs, **times))


@cache
def played(
    profile: Profile,
    rate: float,
    device_gib: float,
    host_gib: float = 0.0,
    *,
    lengths: Lengths = CHAT,
    think_s: float = 60.0,
    stateless: bool = False,
    policy: str = "retention",
    seconds: float = 60.0,
    seed: int = 1,
) -> dict[str, Any]:
    """The figures of `seconds` after a warm-up of half as many."""
    context = 40_000
    pool = [
        script
        for each in chat_pool(lengths, seed, 1.0, think_s)
        if (script := each.within(context)).exchanges
    ]
    blocks, host_blocks = (
        int(gib * GIB / profile.kv_bytes_per_token) // 32 for gib in (device_gib, host_gib)
    )
    sizes = CoreSizes(blocks, host_blocks, 32, policy, 2048, 64, run_ahead=1)
    load = SimulatedLoad(Setting(profile, sizes, context, stateless), Population(pool, seed, rate))
    return load.run(seconds / 2, seconds)


def gain(profile: Profile, rate: float, device_gib: float, host_gib: float, **settings: Any) -> float:
    """Turns per second with both tiers over stateless, where more is offered than can be served."""
    both = played(profile, rate, device_gib, host_gib, **settings)
    none = played(profile, rate, device_gib, stateless=True, **settings)
    return both["turns_per_s"] / none["turns_per_s"]


def test_the_gain_over_stateless_rises_with_turns_per_conversation() -> None:
    profile = slower("h200-8b", 10)
    gains = [
        gain(
            profile, 5.0, 7.3, 200.0, lengths=Lengths(turns, CHAT.new_tokens, CHAT.reply_tokens), seconds=90.0
        )
        for turns in (2.0, 4.0, 8.0)
    ]
    assert gains[0] > 1.0 and gains[1] > 1.1 * gains[0] and gains[2] > 1.1 * gains[1], gains


def test_the_gain_rises_with_grouped_queries_whose_kv_is_smaller() -> None:
    grouped, full = (gain(slower(name, 10), 6.0, 7.3, 36.0) for name in ("h200-8b", "h200-8b-mha"))
    assert grouped > 1.15 * full > 1.15 * 0.95, (grouped, full)


def test_the_gain_rises_with_shorter_think_time() -> None:
    gains = [gain(slower("h200-8b", 10), 6.0, 7.3, 18.0, think_s=think_s) for think_s in (240.0, 60.0, 20.0)]
    assert gains[2] > 1.15 * gains[1] > 1.15 * gains[0] > 1.15 * 0.95, gains


def test_the_device_tier_alone_collapses_at_a_load_that_two_tiers_hold() -> None:
    profile = slower("h200-8b", 10)

    def latencies(rate: float) -> tuple[float, float]:
        alone, both = played(profile, rate, 7.3), played(profile, rate, 7.3, 73.0)
        return alone["normalised_ms_mean"], both["normalised_ms_mean"]

    low_alone, low_both = latencies(0.5)
    high_alone, high_both = latencies(3.0)
    assert low_alone < 1.15 * low_both, "at low load the device holds nearly all of it"
    assert high_both < 1.6 * low_both, "both tiers hold"
    assert high_alone > 2.0 * high_both, (high_alone, high_both)
    assert played(profile, 3.0, 7.3)["recomputed_share"] > 0.8
    assert played(profile, 3.0, 7.3, 73.0)["recomputed_share"] < 0.05


def test_at_long_contexts_retention_answers_sooner_than_lru_though_it_recomputes_as_much() -> None:
    """It gives up the beginnings, which cost less to compute than what stands at 16K and behind."""
    profile, lengths = gpu_profiles()["h200-8b"], Lengths(turns=8.0, new_tokens=3000.0, reply_tokens=60.0)

    def total(policy: str, figure: str) -> float:
        """Over a few draws of conversations, the same for every policy."""
        runs = (
            played(profile, 0.5, 18.3, 18.3, lengths=lengths, policy=policy, seed=seed, seconds=200.0)
            for seed in (1, 2, 3)
        )
        return sum(run[figure] for run in runs)

    assert total("lru", "history_tokens") > 10_000 * total("lru", "turns")
    assert total("lru", "recomputed_share") > 3 * 0.3, "both tiers are under pressure"
    assert total("retention", "recomputed_tokens") < 1.1 * total("lru", "recomputed_tokens")
    assert total("retention", "ttft_ms_mean") < total("lru", "ttft_ms_mean")


def test_the_copies_of_two_tiers_cost_nothing_while_the_device_holds_everything() -> None:
    profile = slower("h200-8b", 10)
    alone, both = played(profile, 0.5, 36.0), played(profile, 0.5, 36.0, 73.0)
    assert both["stored_blocks"] == both["loaded_blocks"] == 0
    assert both["normalised_ms_mean"] == pytest.approx(alone["normalised_ms_mean"], rel=1e-9)
