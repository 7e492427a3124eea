"""Steps of a rank whose KV lies on others: what they take, and what they send."""

import pytest

from engine.batch import RowParams, Segment, StepPlan
from engine.simulation.cluster_profiles import SETUPS
from engine.simulation.cluster_steps import Part, step_time
from engine.simulation.network import (
    ETHERNET_1G,
    INFINIBAND_HDR,
    NVLINK_3,
    networks,
    partial_bytes,
    query_bytes,
)
from engine.types import SamplingParams

SEVEN = SETUPS["a100-7b"].instance(networks(NVLINK_3, INFINIBAND_HDR)["nvlink"])
LAYERS = SEVEN.costs.num_layers


@pytest.mark.parametrize("rows", [[(1, 5000)], [(1, 900), (1, 40_000)], [(2048, 9000), (1, 77)]])
def test_a_step_without_remote_blocks_takes_what_its_costs_say(rows: list[tuple[int, int]]) -> None:
    draw = RowParams(SamplingParams(), 0, 1, 0)
    plan = StepPlan(0, tuple(Segment(0, end - new, (0,) * new, (), draw) for new, end in rows))
    time = step_time(SEVEN, [Part(new, end, {}) for new, end in rows], {})
    assert time.seconds == pytest.approx(SEVEN.costs.compute_s(plan))
    assert (time.messages, time.wire_bytes, time.service_s) == (0, 0, {})


def test_bytes_are_those_of_queries_and_partials_for_each_holder_whatever_the_context() -> None:
    per_layer = query_bytes(SEVEN.shape) + partial_bytes(SEVEN.shape)
    links = {1: NVLINK_3, 2: NVLINK_3}
    for scale in (1, 100):
        parts = [
            Part(1, 9000 * scale, {1: 3000 * scale, 2: 2000 * scale}),
            Part(1, 4000 * scale, {2: 64 * scale}),
            Part(1, 700 * scale, {}),
        ]
        time = step_time(SEVEN, parts, links)
        assert time.wire_bytes == LAYERS * 3 * per_layer
        assert time.messages == LAYERS * 2 * 2  # out and back, rows together, for each of two ranks


def test_attention_elsewhere_hides_behind_as_much_attention_here() -> None:
    alone = step_time(SEVEN, [Part(1, 40_000, {})], {})
    half = step_time(SEVEN, [Part(1, 80_000, {1: 40_000})], {1: NVLINK_3})
    waits_s = half.seconds - alone.seconds
    assert 0 < waits_s == pytest.approx(LAYERS * 2 * NVLINK_3.message_s, rel=0.1)
    assert half.service_s == {1: pytest.approx(40_000 * SEVEN.costs.kv_token_s)}
    quarter = step_time(SEVEN, [Part(1, 80_000, {1: 20_000})], {1: NVLINK_3})
    assert quarter.seconds == pytest.approx(step_time(SEVEN, [Part(1, 60_000, {})], {}).seconds)


def test_a_slow_network_is_waited_for_in_each_layer() -> None:
    near, far = (
        step_time(SEVEN, [Part(1, 2_000, {1: 1_000})], {1: link}).seconds for link in (NVLINK_3, ETHERNET_1G)
    )
    assert far - near > LAYERS * 2 * (ETHERNET_1G.message_s - NVLINK_3.message_s)
