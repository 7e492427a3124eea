"""Requests of a simulated cluster have the lengths that were asked for."""

import statistics

import pytest

from engine.simulation.cluster_workload import (
    LONG_MOST,
    SHORT_DEVIATIONS,
    SHORT_MEAN,
    SHORT_RANGE,
    TRACES,
    drawn_requests,
)


@pytest.mark.parametrize("number", range(len(SHORT_DEVIATIONS)))
def test_short_traces_have_one_mean_and_three_deviations(number: int) -> None:
    lengths = [request.tokens for request in drawn_requests(str(number), 20_000, 7)]
    assert statistics.mean(lengths) == pytest.approx(SHORT_MEAN, rel=0.03)
    assert statistics.stdev(lengths) == pytest.approx(SHORT_DEVIATIONS[number], rel=0.03)
    assert SHORT_RANGE[0] <= min(lengths) and max(lengths) <= SHORT_RANGE[1]


def test_long_traces_reach_as_far_as_they_say() -> None:
    for number, most in enumerate(LONG_MOST, len(SHORT_DEVIATIONS)):
        lengths = [request.tokens for request in drawn_requests(str(number), 5_000, 7)]
        assert min(lengths) < 1_100 and 0.9 * most < max(lengths) <= most
    assert len(TRACES) == 9


def test_a_seed_draws_the_same_requests_again() -> None:
    assert drawn_requests("3", 50, 1) == drawn_requests("3", 50, 1) != drawn_requests("3", 50, 2)
    assert all(request.prompt_tokens > 0 < request.reply_tokens for request in drawn_requests("8", 500, 1))
