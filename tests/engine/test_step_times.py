"""The time of the next step, foreseen from those before it."""

import random

import numpy as np
import pytest

from engine.batch import Segment
from engine.step_times import StepTimes, Work

NO_SLOTS = np.empty(0, np.int32)
DEVICES = {  # seconds: fixed, per token of the linears but at least, per row, per token of context, per pair
    "small": (3e-3, 3e-4, 6e-3, 5e-4, 1e-6, 6e-8),
    "large": (1e-2, 1e-2, 3e-1, 1e-2, 1e-5, 1e-6),
    "gpu": (1e-3, 27e-6, 4e-3, 2e-6, 3e-8, 1e-9),
}


def took(device: str, work: Work) -> float:
    fixed_s, token_s, weights_s, row_s, context_s, pair_s = DEVICES[device]
    linears_s = max(weights_s, (work.num_rows + work.num_prompt) * token_s)
    return (
        fixed_s + linears_s + work.num_rows * row_s + work.row_context * context_s + work.num_pairs * pair_s
    )


def decoding(num_rows: int, context: int = 500) -> Work:
    return Work(num_rows, num_rows * context, 0, 0)


def with_prompt(work: Work, length: int, position: int = 200) -> Work:
    return work._replace(num_prompt=length, num_pairs=length * position)


def served(device: str, rng: random.Random, num_steps: int = 200) -> list[Work]:
    """As a server's steps come: a prompt alone, and then rows that decode, now and then beside a prompt."""
    works = [Work(0, 0, 512, 512 * 256)]
    for number in range(num_steps):
        rows = decoding(4 + number // 8 % 12, rng.randint(400, 600))
        works.append(with_prompt(rows, rng.randint(32, 128)) if number % 5 == 0 else rows)
    return works


def test_work_tells_rows_from_prompts() -> None:
    segments = [
        Segment(1, 10, None, NO_SLOTS, None),
        Segment(2, 0, (7,) * 4, NO_SLOTS, None),
        Segment(3, 100, (7,) * 2, NO_SLOTS, None),
    ]
    assert Work.of(segments) == Work(1, 10, 6, (0 + 1 + 2 + 3) + (100 + 101))


def test_nothing_is_known_before_the_first_step() -> None:
    times = StepTimes()
    assert not times.is_known
    times.observe(decoding(1), 0.01)
    assert times.is_known and times.seconds(decoding(1)) == pytest.approx(0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_are_foreseen_on_whatever_device(device: str) -> None:
    times, rng = StepTimes(), random.Random(0)
    for work in served(device, rng):
        times.observe(work, took(device, work) * rng.uniform(0.95, 1.05))
    for rows in (8, 16):
        alone, beside = decoding(rows), with_prompt(decoding(rows), 100)
        assert times.seconds(alone) == pytest.approx(took(device, alone), rel=0.2)
        assert times.seconds(beside) == pytest.approx(took(device, beside), rel=0.2)
        added_s = times.seconds(beside) - times.seconds(alone)
        assert times.prompt_token_s(200) * 100 == pytest.approx(added_s)


def test_ten_steps_are_enough_to_know_the_device_roughly() -> None:
    times, rng = StepTimes(), random.Random(0)
    for work in served("large", rng, 10):
        times.observe(work, took("large", work))
    beside = with_prompt(decoding(5), 100)
    assert times.seconds(beside) == pytest.approx(took("large", beside), rel=0.3)


def test_a_step_that_was_held_up_changes_little() -> None:
    times, rng = StepTimes(), random.Random(0)
    for work in served("small", rng):
        times.observe(work, took("small", work) * rng.uniform(0.95, 1.05))
    before = times.seconds(decoding(8))
    times.observe(decoding(8), 100 * before)
    assert times.seconds(decoding(8)) < 1.5 * before


def test_a_machine_that_becomes_slower_is_followed() -> None:
    times, rng = StepTimes(), random.Random(0)
    for slowness in (1, 3):
        for work in served("small", rng):
            times.observe(work, slowness * took("small", work))
    assert times.seconds(decoding(8)) == pytest.approx(3 * took("small", decoding(8)), rel=0.2)


def test_hours_of_decoding_leave_what_a_prompt_costs_as_it_was() -> None:
    times, rng = StepTimes(), random.Random(0)
    for work in served("small", rng):
        times.observe(work, took("small", work))
    before = times.prompt_token_s(0)
    for _ in range(20_000):
        times.observe(decoding(8), took("small", decoding(8)) * rng.uniform(0.9, 1.1))
    assert times.prompt_token_s(0) == pytest.approx(before, rel=0.5)
    assert times.seconds(decoding(8)) == pytest.approx(took("small", decoding(8)), rel=0.15)


def test_a_slow_first_step_and_two_rows_for_long_leave_room_to_learn_what_many_rows_cost() -> None:
    times, rng = StepTimes(), random.Random(0)

    def takes_s(work: Work) -> float:
        return 31e-3 + 1.3e-3 * (work.num_rows + work.num_prompt)

    times.observe(with_prompt(decoding(0), 200), 0.47)
    grows = [with_prompt(decoding(rows, 150), 48) for rows in range(5, 16)]
    errors = []
    for work in (*[decoding(2, 150)] * 63, with_prompt(decoding(0), 512), *grows, *grows):
        errors.append(times.seconds(work) / takes_s(work) - 1)
        times.observe(work, takes_s(work) * rng.uniform(0.92, 1.15))
    assert np.abs(errors[-len(grows) :]).max() < 0.3
