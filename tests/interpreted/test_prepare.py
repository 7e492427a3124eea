"""The kernel that prepares a step writes what its reference writes, and nothing else."""

import random
from dataclasses import fields

import pytest
import torch

from engine.cuda.rows import Rows
from kernels.gpu import prepare as gpu
from kernels.prepare import StepTensors, prepare, prepare_ref
from tests.cuda.steps import BLOCK_SIZE, RandomSteps, new_rows, packed, step_tensors

NUM_STEPS = 12


def both_alike(ours: StepTensors, theirs: StepTensors) -> None:
    for field in fields(StepTensors):
        if field.name != "sampling":
            assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name
    for field in fields(ours.sampling):
        at = zip(getattr(ours.sampling, field.name), getattr(theirs.sampling, field.name), strict=True)
        assert all(a == b or (a.isnan() and b.isnan()) for a, b in at), field.name  # NaN: not written yet


@pytest.mark.parametrize("seed", range(3))
def test_steps_are_written_as_by_the_reference(seed: int) -> None:
    steps, rows = RandomSteps(random.Random(seed)), new_rows()
    ours, theirs = step_tensors(rows), step_tensors(rows)
    for _ in range(NUM_STEPS):
        segments = steps.next()
        struct = rows.struct(segments, num_pads=steps.random.randrange(3))
        prepare(packed(struct), ours, struct.num_segments, BLOCK_SIZE)
        prepare_ref(packed(struct), theirs, struct.num_segments, BLOCK_SIZE)
        both_alike(ours, theirs)
        for tensors in (ours, theirs):  # as if each row had drawn the number of the step
            tensors.last[tensors.draw_rows[: struct.num_draws]] = steps.num_steps


def test_long_segments_and_many_changes_take_several_rounds() -> None:
    rows = Rows(2, 1200, 5000, 1, 1 << 20)
    steps = RandomSteps(random.Random(5), block_size=1, num_blocks=5000)
    segments = [steps.segment(1, 1100), steps.segment(2, 1030)]
    ours, theirs = (step_tensors(rows, 3000) for _ in range(2))
    struct = rows.struct(segments)
    assert struct.changes.shape[1] > 2048
    prepare(packed(struct), ours, 2, 1)
    prepare_ref(packed(struct), theirs, 2, 1)
    both_alike(ours, theirs)


def test_idle_steps_leave_tables_and_facts_alone() -> None:
    rows = new_rows()
    tensors = step_tensors(rows)
    before = tensors.tables.clone(), tensors.facts.clone()
    struct = rows.idle([1, 5, 40])
    prepare(packed(struct), tensors, 3, BLOCK_SIZE)
    assert torch.equal(tensors.tables, before[0]) and torch.equal(tensors.facts, before[1])
    assert (tensors.slots[: struct.num_tokens] == -1).all()
    assert tensors.draw_rows[:3].tolist() == [rows.holes] * 3


def test_misaligned_structs_are_refused() -> None:
    rows = new_rows()
    struct = rows.idle([1])
    with pytest.raises(ValueError, match="packed must begin at a multiple of 16 bytes"):
        prepare(packed(struct)[1:], step_tensors(rows), 1, BLOCK_SIZE)


def test_every_shipped_form_has_a_name_of_its_own() -> None:
    names = [launch.name for launch in gpu.shipped()]
    assert len(set(names)) == len(names)
