"""The figures of `continuo bench`: from the events of turns that were made by hand."""

import pytest

from rpc._generated import continuo_pb2 as pb
from tools.bench import compare, metrics, report
from tools.bench.driver import Sample, TurnRecord
from tools.bench.generator import Observed
from tools.bench.metrics import Limits


def a_record(sent_s=10.0, deltas=((10.5, 1), (10.6, 1), (11.0, 2)), done_s=11.1, **more):
    record = TurnRecord(1, 1, sent_s, sent_s=sent_s, deltas=list(deltas), done_s=done_s, **more)
    return record


def observed(*records, samples=(), **more):
    return Observed(
        list(records), list(samples), measured_s=20.0, device_tokens=1000, server_cpu_s=3.0, **more
    )


def test_a_turn_is_measured_by_the_definitions() -> None:
    record = a_record()
    assert metrics.ttft_s(record) == pytest.approx(0.5)
    assert metrics.itl_s(record) == pytest.approx([0.1, 0.2, 0.2])
    assert metrics.tpot_s(record) == pytest.approx(0.6 / 3)
    assert metrics.tpot_s(a_record(deltas=[(10.5, 1)])) is None
    figures = metrics.summary(observed(record), 5.0, Limits())
    assert figures["ttst_ms_p50"] == pytest.approx(100)
    assert figures["e2e_ms_p50"] == pytest.approx(1100)
    assert figures["normalised_ms_mean"] == figures["normalised_ms_p90"] == pytest.approx(275)
    assert (figures["turns_per_s"], figures["output_tokens_per_s"]) == (1 / 20, 4 / 20)
    assert figures["server_cpu_s_per_turn"] == 3.0
    assert figures["goodput_turns_per_s"] is None and figures["resume_ms_p50"] is None


def test_only_what_was_done_in_the_measured_time_counts() -> None:
    early, late = a_record(done_s=4.9), a_record(done_s=25.1)
    unfinished = a_record(done_s=None)
    figures = metrics.summary(
        observed(early, a_record(sent_s=2.0, done_s=5.1), late, unfinished), 5.0, Limits()
    )
    assert (figures["turns"], figures["unfinished_turns"]) == (1, 1)


def test_percentiles_are_over_turns() -> None:
    turns = [a_record(deltas=[(10 + n / 1000, 1)], done_s=11.0) for n in range(1, 101)]
    figures = metrics.summary(observed(*turns), 5.0, Limits())
    assert figures["ttft_ms_mean"] == pytest.approx(50.5)
    assert (figures["ttft_ms_p50"], figures["ttft_ms_p90"], figures["ttft_ms_p99"]) == pytest.approx(
        (51, 91, 100)
    )


def test_hits_are_shares_of_the_history_of_all_turns() -> None:
    one = a_record(history_tokens=300, cached_device_tokens=100, cached_host_tokens=200)
    other = a_record(history_tokens=100, recomputed_tokens=100)
    figures = metrics.summary(observed(one, other, a_record()), 5.0, Limits())
    names = ("cached_device_share", "cached_host_share", "recomputed_share")
    assert [figures[name] for name in names] == [0.25, 0.5, 0.25]
    assert metrics.summary(observed(a_record()), 5.0, Limits())["recomputed_share"] is None


def test_goodput_counts_turns_that_meet_every_limit() -> None:
    slow = a_record(deltas=[(10.9, 1), (11.0, 3)])
    for limits, good in (
        (Limits(500.1), 1),
        (Limits(950, 199), 1),
        (Limits(950, 201), 2),
        (Limits(tpot_ms=1), 0),
    ):
        figures = metrics.summary(observed(a_record(), slow), 5.0, limits)
        assert figures["goodput_turns_per_s"] == pytest.approx(good / 20)


def test_what_the_server_says_of_its_time_is_told_as_well() -> None:
    timing = pb.Timing(queue_s=0.1, ttft_s=0.5, reload_s=0.05, recompute_s=0.2, prefill_s=0.15)
    figures = metrics.summary(observed(a_record(timing=timing), a_record()), 5.0, Limits())
    means = [
        figures[f"server_{name}_ms_mean"] for name in ("queue", "ttft", "reload", "recompute", "prefill")
    ]
    assert means == pytest.approx([50, 250, 25, 100, 75])


def test_the_slope_is_that_of_the_line_through_the_points() -> None:
    turns = [a_record(history_tokens=n, deltas=[(10.1 + 0.00002 * n, 1)]) for n in (0, 500, 1000, 4000)]
    assert metrics.summary(observed(*turns), 5.0, Limits())["ttft_slope_ms_per_1k"] == pytest.approx(20.0)
    assert metrics.slope([(1.0, 5.0), (1.0, 6.0)]) is None and metrics.slope([]) is None


def test_cancelled_and_failed_turns_are_told_apart() -> None:
    cancelled = a_record(cancelled=True)
    refused = a_record(deltas=(), failure="RESOURCE_EXHAUSTED QUEUE_FULL")
    figures = metrics.summary(observed(cancelled, refused, a_record()), 5.0, Limits())
    assert (figures["turns"], figures["cancelled_turns"]) == (1, 1)
    assert figures["failures"] == {"RESOURCE_EXHAUSTED QUEUE_FULL": 1}


def test_the_time_to_resume_begins_with_opening_by_id() -> None:
    figures = metrics.summary(observed(a_record(resumed_s=9.8)), 5.0, Limits())
    assert figures["resume_ms_p50"] == pytest.approx(700)


def test_the_working_set_is_compared_with_the_device_tier() -> None:
    samples = [Sample(at, live, pb.GetLoadResponse()) for at, live in ((1.0, 9000), (6.0, 2000), (7.0, 4000))]
    figures = metrics.summary(observed(a_record(), samples=samples), 5.0, Limits())
    assert (figures["working_set_tokens"], figures["working_set_device_tiers"]) == (3000, 3.0)


def test_a_series_tells_what_happened_in_each_second() -> None:
    loads = [
        pb.GetLoadResponse(cached_host_tokens=hits, device=pb.Tier(idle_tokens=idle))
        for hits, idle in ((5, 1), (8, 2), (8, 3))
    ]
    told = metrics.series([Sample(float(n), 100 * n, load) for n, load in enumerate(loads)])
    assert told["at_s"] == [1.0, 2.0] and told["cached_host_tokens"] == [3, 0]
    assert told["device_idle_tokens"] == [2, 3] and told["live_tokens"] == [100, 200]


# -- configurations against each other


def curve(*points):
    """A report of points: configuration, rate, repeat, turns/s, normalised latency."""
    return {
        "points": [
            {
                "configuration": configuration,
                "rate": rate,
                "conversations": None,
                "repeat": repeat,
                "figures": {
                    "turns_per_s": turns_per_s,
                    "normalised_ms_p90": latency_ms,
                    "normalised_ms_mean": latency_ms,
                    "server_cpu_s_per_turn": None,
                },
            }
            for configuration, rate, repeat, turns_per_s, latency_ms in points
        ]
    }


def test_turns_at_equal_latency_are_where_the_curve_crosses_it() -> None:
    told = curve(
        *(("device", rate, 0, rate, 10.0 * rate) for rate in (3.0, 1.0, 2.0)),
        *(("slow", rate, 0, rate, 100.0) for rate in (1.0, 2.0)),
        ("fast", 1.0, 0, 1.5, 5.0),
        *(("stuck", rate, 0, done, ms) for rate, done, ms in ((1.0, 1.0, 5.0), (2.0, 0.5, 45.0))),
        ("none", 1.0, 0, 0.0, None),
    )
    assert compare.at_equal_latency(told, 25.0).splitlines()[1:] == [
        "  device: 2.50",
        "  slow: not reached, 1.00 turns/s have 100 ms already",
        "  fast: 1.50 or more, the highest load stays below",
        "  stuck: 0.75",
        "  none: nothing was measured",
    ]


def test_repeats_are_compared_pair_by_pair() -> None:
    ratios = (1.5, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.1)
    points = [
        (name, 1.0, repeat, 1.0, 10.0 * (ratio if name == "two-tier" else 1.0) * (1 + repeat))
        for repeat, ratio in enumerate(ratios)
        for name in ("device", "two-tier")
    ]
    assert compare.pair_by_pair(curve(*points)) == (
        "1 turns/s offered: normalised_ms_mean of two-tier / device: median 0.935 of 10 pairs, "
        "95% interval 0.900 to 0.970"
    )
    assert "too few for an interval" in compare.pair_by_pair(curve(*points[:4]))
    assert compare.pair_by_pair(curve(*points[:2])) == ""


def test_repeats_become_one_column_of_medians() -> None:
    points = [
        {
            "rate": 1.0,
            "conversations": None,
            "configuration": "device",
            "figures": {"turns": n, "failures": {"X": n}},
        }
        for n in (1, 2, 9)
    ]
    (merged,) = report.merged(points)
    assert merged["figures"] == {"turns": 2, "failures": {"X": 12}}
