"""What is sent of each step, applied to the device's tables, makes them what the plan says."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import RowParams, Segment
from engine.cuda.rows import Rows, facts_of
from engine.errors import InvariantError
from engine.types import SamplingParams
from kernels.prepare import StepTensors, prepare, prepare_ref
from tests.cuda.steps import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    NUM_ROWS,
    VOCAB,
    WIDTH,
    RandomSteps,
    new_rows,
    packed,
    step_tensors,
)

GREEDY = SamplingParams(temperature=0.0)


def segment(
    row: int,
    slots: Sequence[int],
    first: int = 0,
    token_ids: tuple[int, ...] | None = (1,),
    draw: SamplingParams | None = GREEDY,
    seed: int = 0,
) -> Segment:
    length = 1 if token_ids is None else len(token_ids)
    params = None if draw is None else RowParams(draw, seed, first + length, 0)
    return Segment(row, first, token_ids, np.array(slots, np.int32), params)


@given(st.randoms(use_true_random=False), st.integers(0, 3))
def test_random_histories_reach_the_device_whole(rng: random.Random, num_pads: int) -> None:
    steps, rows = RandomSteps(rng), new_rows()
    device = step_tensors(rows)
    last: dict[int, int] = {}
    for number in range(8):
        segments = steps.next()
        struct = rows.struct(segments, num_pads)
        prepare_ref(packed(struct), device, struct.num_segments, BLOCK_SIZE)
        check_segments(device, segments, last)
        check_draws(device, segments)
        check_pads(device, rows, len(segments), num_pads)
        draws = [segment for segment in segments if segment.draw is not None]
        assert device.draw_rows[len(draws) :][:num_pads].tolist() == [rows.holes] * num_pads
        for at, drawn in enumerate(draws):
            last[drawn.row] = number * 10 + at
            device.last[device.draw_rows[at]] = last[drawn.row]


def check_segments(device: StepTensors, segments: Sequence[Segment], last: dict[int, int]) -> None:
    begin = 0
    for at, one in enumerate(segments):
        end = begin + one.length
        assert device.q_indptr[at : at + 2].tolist() == [begin, end]
        assert device.first_pos[at] == one.first
        table = device.tables[device.table_rows[at]]
        assert table[: len(one.slots)].tolist() == one.slots.tolist()
        ids = (last[one.row],) if one.token_ids is None else one.token_ids
        assert device.ids[begin:end].tolist() == list(ids)
        positions = range(one.first, one.first + one.length)
        assert device.positions[begin:end].tolist() == list(positions)
        assert device.slots[begin:end].tolist() == [place(one, position) for position in positions]
        begin = end


def place(one: Segment, position: int) -> int:
    slot = int(one.slots[position // BLOCK_SIZE])
    return -1 if slot < 0 else slot * BLOCK_SIZE + position % BLOCK_SIZE


def check_draws(device: StepTensors, segments: Sequence[Segment]) -> None:
    draws = [(at, one.draw) for at, one in enumerate(segments) if one.draw is not None]
    for at, (number, draw) in enumerate(draws):
        sampling = draw.sampling
        assert device.logits_rows[at] == device.q_indptr[number + 1] - 1
        assert device.draw_rows[at] == device.table_rows[number]
        wanted = sampling.temperature or 0.0, sampling.top_p or 1.0, sampling.min_p or 0.0
        floats = device.sampling.temperature, device.sampling.top_p, device.sampling.min_p
        assert [values[at].item() for values in floats] == [np.float32(value) for value in wanted]
        assert device.sampling.top_k[at] == (sampling.top_k or 0)
        assert device.sampling.seed[at] == draw.seed
        assert device.sampling.position[at] == draw.position


def check_pads(device: StepTensors, rows: Rows, num_segments: int, num_pads: int) -> None:
    at = slice(num_segments, num_segments + num_pads)
    assert (device.table_rows[at] == rows.holes).all() and (device.tables[rows.holes] == -1).all()
    end = int(device.q_indptr[num_segments])
    assert device.q_indptr[num_segments + 1 :][:num_pads].tolist() == [end + n + 1 for n in range(num_pads)]
    for values, wanted in ((device.ids, 0), (device.positions, 0), (device.slots, -1)):
        assert (values[end : end + num_pads] == wanted).all()


def test_only_what_changed_is_sent() -> None:
    rows = new_rows()
    first = rows.struct([segment(1, [3, 4, 5], first=8), segment(2, [6])])
    assert first.changes.T.tolist() == [[0, 0, 3], [0, 1, 4], [0, 2, 5], [1, 0, 6]]
    assert len(first.facts) == 2
    again = rows.struct([segment(1, [3, 4, 5], first=9), segment(2, [6], first=1)])
    assert again.changes.size == 0 and len(again.facts) == 0
    moved = rows.struct([segment(1, [3, -1, 5, 9], first=12)])
    assert moved.changes.T.tolist() == [[0, 1, -1], [0, 3, 9]]
    warm = SamplingParams(temperature=0.5)
    for seed in (0, 1):
        changed = rows.struct([segment(1, [3, -1, 5, 9], first=13, draw=warm, seed=seed)])
        assert changed.facts.tolist() == [facts_of(warm, seed).tolist()]


def test_the_row_used_least_recently_is_taken_but_none_of_the_step() -> None:
    rows = Rows(2, WIDTH, NUM_BLOCKS, BLOCK_SIZE, VOCAB)

    def rows_of(*names: int) -> list[int]:
        return rows.struct([segment(name, [name]) for name in names]).segments[0].tolist()

    assert rows_of(1, 2) == [0, 1]
    assert rows_of(1) == [0]
    assert rows_of(3) == [1]
    assert rows_of(4, 1) == [1, 0]
    assert rows_of(4) == [1]
    assert rows_of(2) == [0]


def test_a_row_that_is_taken_over_keeps_nothing_of_the_one_before() -> None:
    rows = Rows(1, WIDTH, NUM_BLOCKS, BLOCK_SIZE, VOCAB)
    rows.struct([segment(1, [3])])
    struct = rows.struct([segment(2, [3])])  # which is in the same place by chance
    assert struct.changes.size == 0 and len(struct.facts) == 1
    with pytest.raises(InvariantError, match="row 3 goes on from a token that no step has sampled"):
        rows.struct([segment(3, [3], token_ids=None)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (segment(1, [0, NUM_BLOCKS]), f"row 1: block 1 in slot {NUM_BLOCKS} of {NUM_BLOCKS}"),
        (segment(1, [-2]), f"row 1: block 0 in slot -2 of {NUM_BLOCKS}"),
        (segment(1, [0], first=BLOCK_SIZE), "row 1: 1 tokens from position 4 with 1 blocks of 4"),
        (segment(1, [0], first=-1), "row 1: 1 tokens from position -1"),
        (segment(1, [0], token_ids=()), "row 1: 0 tokens from position 0"),
        (segment(1, [0] * (WIDTH + 1)), f"with {WIDTH + 1} blocks of 4, of which a table holds {WIDTH}"),
        (segment(1, [0], token_ids=(3, VOCAB)), f"token ids 1 .. {VOCAB} of {VOCAB}"),
        (segment(1, [0], token_ids=(-1, 3)), f"token ids -1 .. 3 of {VOCAB}"),
    ],
)
def test_what_is_out_of_range_is_refused_and_changes_nothing(wrong: Segment, message: str) -> None:
    rows = new_rows()
    with pytest.raises(InvariantError, match=message):
        rows.struct([segment(2, [7]), wrong])
    assert rows.struct([segment(2, [7])]).changes.T.tolist() == [[0, 0, 7]]


def test_more_requests_than_rows_are_refused() -> None:
    with pytest.raises(InvariantError, match=f"a step of {NUM_ROWS + 1} requests, but there are rows for"):
        new_rows().struct([segment(name, [0]) for name in range(NUM_ROWS + 1)])


def test_the_largest_step_fits_the_capacity_and_no_larger_one() -> None:
    rows = new_rows()
    num_tokens = WIDTH * BLOCK_SIZE
    full = [segment(name, range(WIDTH), token_ids=(1,) * num_tokens) for name in range(NUM_ROWS)]
    struct = rows.struct(full)
    memory = np.empty(rows.capacity(NUM_ROWS * num_tokens, NUM_ROWS), np.int32)
    struct.pack(memory)
    with pytest.raises(ValueError, match="does not fit into a struct of 100"):
        struct.pack(memory[:100])


@pytest.mark.parametrize(
    ("memory", "num_segments", "message"),
    [
        (torch.zeros(64), 1, r"packed must be contiguous int32 \[N\] on the host"),
        (torch.zeros(64, dtype=torch.int32)[::2], 1, "packed must be contiguous"),
        (
            torch.zeros(64, dtype=torch.int32),
            257,
            "num_segments must be 1 to 256",
        ),
    ],
)
def test_structs_that_cannot_be_are_refused(memory: torch.Tensor, num_segments: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(memory, step_tensors(new_rows()), num_segments, BLOCK_SIZE)


def test_step_tensors_of_another_dtype_are_refused() -> None:
    rows = new_rows()
    whole = step_tensors(rows)
    fields = {name: getattr(whole, name) for name in StepTensors.__dataclass_fields__}
    with pytest.raises(ValueError, match=r"last must be contiguous torch.int64 \[6\], got torch.int32"):
        StepTensors(**fields | {"last": whole.last.int()})
