"""Step costs of the simulated engine: what follows from their constants agrees with what others measured."""

import pytest

from engine.batch import RowParams, Segment, StepPlan
from engine.errors import ConfigError
from engine.profile import RUN
from engine.simulation.profiles import (
    H200,
    LLAMA_3_8B,
    LLAMA_3_70B,
    cpu_profile,
    gpu_costs,
    gpu_profiles,
)
from engine.simulation.step_costs import BLOCKS_TOGETHER, StepCosts, cost_table
from engine.types import SamplingParams

EIGHT = gpu_costs(LLAMA_3_8B, H200)
DRAW = RowParams(SamplingParams(), 0, 1, 0)


def plan(*segments: tuple[int, int]) -> StepPlan:
    """Of pairs of first position and length."""
    return StepPlan(0, tuple(Segment(0, first, (0,) * length, (), DRAW) for first, length in segments))


def test_shapes_have_the_published_sizes() -> None:
    assert (LLAMA_3_8B.body_values + 2 * LLAMA_3_8B.head_values) / 1e9 == pytest.approx(8.03, abs=0.01)
    assert (LLAMA_3_70B.body_values + 2 * LLAMA_3_70B.head_values) / 1e9 == pytest.approx(70.6, abs=0.1)
    assert LLAMA_3_8B.kv_bytes_per_token == 131_072
    assert LLAMA_3_70B.kv_bytes_per_token == 327_680


def test_computing_a_thousand_tokens_takes_about_as_long_as_is_published() -> None:
    assert EIGHT.compute_s(plan((0, 1000))) == pytest.approx(27e-3, rel=0.15)
    one_gpu = gpu_costs(LLAMA_3_70B, H200)
    assert one_gpu.compute_s(plan((0, 1000))) == pytest.approx(230e-3, rel=0.1)


def test_a_lone_decode_step_reads_the_weights_once() -> None:
    step_s = EIGHT.compute_s(plan((512, 1)))
    assert EIGHT.weights_s + EIGHT.fixed_s < step_s < 1.01 * (EIGHT.weights_s + EIGHT.fixed_s)
    assert EIGHT.compute_s(plan(*[(512, 1)] * 8)) < 1.05 * step_s, "rows share the reading of weights"


def test_decoding_grows_with_the_kv_that_is_read() -> None:
    short, long = (EIGHT.compute_s(plan((first, 1))) for first in (999, 100_999))
    assert long - short == pytest.approx(100_000 * 131_072 / 4.0e12)


def test_a_block_costs_more_the_later_it_stands_and_less_to_copy_than_to_compute() -> None:
    table = cost_table(EIGHT, 32, 16_384)
    assert table.compute_s(128) < table.compute_s(4096) < table.compute_s(16_384)
    assert table.compute_s(16_384) - table.compute_s(4096) == pytest.approx(32 * 12_288 * EIGHT.pair_s)
    assert table.load_s < table.compute_s(32) / 5


def test_blocks_are_profiled_as_a_server_profiles_them() -> None:
    assert BLOCKS_TOGETHER == RUN


def test_four_gpus_share_the_work_but_talk_to_each_other() -> None:
    one, four = (gpu_costs(LLAMA_3_70B, H200, n) for n in (1, 4))
    assert four.weights_s == pytest.approx(one.weights_s / 4)
    assert one.token_s / 4 < four.token_s < one.token_s / 3
    assert four.fixed_s == pytest.approx(one.fixed_s + 160 * H200.all_reduce_s)
    assert four.load_s == pytest.approx(one.load_s / 4)


def test_a_step_of_copies_alone_computes_nothing() -> None:
    assert EIGHT.compute_s(StepPlan(0, ())) == 0.0
    assert EIGHT.copies_s(0, 0) == (0.0, 0.0)
    stores_s, loads_s = EIGHT.copies_s(1, 3)
    assert loads_s - stores_s == pytest.approx(2 * EIGHT.load_s)


def test_every_profile_names_its_machine() -> None:
    assert {name: profile.num_gpus for name, profile in gpu_profiles().items()} == {
        "h200-8b": 1,
        "h200-8b-mha": 1,
        "h200-70b": 4,
    }


def test_measured_costs_that_lack_something_are_refused() -> None:
    costs = {name: 0.001 for name in StepCosts.__slots__ if name != "overlaps"}
    profile = cpu_profile({"costs": costs, "kv_bytes_per_token": 8, "model": "m", "threads": 2})
    assert not profile.costs.overlaps and profile.costs.token_s == 0.001
    with pytest.raises(ConfigError, match="measure them again"):
        cpu_profile({"costs": {"fixed_s": 1.0}, "kv_bytes_per_token": 8})
