"""A load whose every number is another one, so that none can stand in for a second."""

from dataclasses import replace

from engine.load import ConversationCounts, Histogram, Load, Tier

BOUNDS = (0.01, 0.1, 1.0)


def a_load(**changes: object) -> Load:
    load = Load(
        uptime_s=100.0,
        running_turns=3,
        waiting_turns=5,
        suspended_turns=1,
        conversations=ConversationCounts(running=2, waiting=4, attached=12, idle=2034),
        device=Tier(total_tokens=1000, in_use_tokens=250, idle_tokens=500, free_tokens=250),
        host=Tier(total_tokens=4000, in_use_tokens=40, idle_tokens=3000, free_tokens=960),
        accepted_turns=70,
        finished_turns={"STOP_TOKEN": 40, "LENGTH": 20},
        failed_turns={"TURN_CANCELLED": 5},
        refused_turns={"QUEUE_FULL": 9},
        reattached_streams=7,
        suspensions=6,
        prompt_tokens=8000,
        cached_device_tokens=6000,
        cached_host_tokens=350,
        recomputed_tokens=450,
        new_tokens=1200,
        evicted_tokens=260,
        restart_tokens=110,
        rewritten_tokens=67,
        cut_tokens=13,
        never_computed_tokens=180,
        completion_tokens=3500,
        computed_tokens=5500,
        steps=400,
        step_s=16.0,
        reload_s=0.75,
        recompute_s=1.5,
        evicted_blocks=11,
        stored_blocks=31,
        loaded_blocks=23,
        failed_copies=2,
        queue_s=Histogram(BOUNDS, (60, 0, 0, 0), 0.3),
        ttft_s=Histogram(BOUNDS, (0, 60, 0, 0), 3.1),
        inter_token_s=Histogram(BOUNDS, (3000, 400, 30, 0), 70.5),
        total_s=Histogram(BOUNDS, (0, 0, 50, 10), 90.25),
    )
    return replace(load, **changes)  # type: ignore[arg-type]
