"""The tensors of a step from the packed struct of its integers, whose contract and reference are in
kernels/prepare.py.
"""

import functools
from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.arguments import require_aligned, require_device
from kernels.gpu.launch import Launch, pointer, require_gpu
from kernels.prepare import HEADER, NUM_FACTS, StepTensors


@triton.jit
def _fact(new, row, is_new, AT: tl.constexpr):
    """One of a row's facts: a new one, which the row keeps, or what it kept."""
    sent = tl.load(new + AT, mask=is_new, other=0)
    kept = tl.load(row + AT, mask=is_new == 0, other=0)
    tl.store(row + AT, sent, mask=is_new)
    return tl.where(is_new, sent, kept)


@triton.jit
def _prepare(
    packed,
    tables,
    last,
    facts,
    ids,
    positions,
    slots,
    q_indptr,
    first_pos,
    table_rows,
    logits_rows,
    draw_rows,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    TABLE_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADER: tl.constexpr,
    NUM_FACTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program s: segment s, draw s, and its share of the tables' changes.  No program reads what another one
    writes: see Struct.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, WIDTH)

    num_changes = tl.load(packed)
    for first_change in range(program * WIDTH, num_changes, tl.num_programs(0) * WIDTH):
        at = first_change + lane
        inside = at < num_changes
        changed = tl.load(packed + HEADER + at, mask=inside, other=0).to(tl.int64)
        index = tl.load(packed + HEADER + num_changes + at, mask=inside, other=0)
        slot = tl.load(packed + HEADER + 2 * num_changes + at, mask=inside, other=0)
        tl.store(tables + changed * TABLE_WIDTH + index, slot, mask=inside)

    num_segments = tl.load(packed + 1)
    segment = packed + tl.load(packed + 4) + program
    row = tl.load(segment)
    first = tl.load(segment + num_segments)
    begin = tl.load(segment + 2 * num_segments)
    length = tl.load(segment + 3 * num_segments)
    first_block = tl.load(segment + 4 * num_segments)
    tl.store(q_indptr, 0, mask=program == 0)
    tl.store(q_indptr + program + 1, begin + length)
    tl.store(first_pos + program, first)
    tl.store(table_rows + program, row)
    sent_ids = packed + tl.load(packed + 5) + begin
    blocks = packed + tl.load(packed + 6) + first_block - first // BLOCK_SIZE
    sampled = tl.load(last + row)
    for first_token in range(0, length, WIDTH):
        token = first_token + lane
        inside = token < length
        known = tl.load(sent_ids + token, mask=inside, other=0).to(tl.int64)
        tl.store(ids + begin + token, tl.where(known < 0, sampled, known), mask=inside)
        at = first + token
        tl.store(positions + begin + token, at.to(tl.int64), mask=inside)
        block = tl.load(blocks + at // BLOCK_SIZE, mask=inside, other=-1).to(tl.int64)
        slot = tl.where(block < 0, -1, block * BLOCK_SIZE + at % BLOCK_SIZE)
        tl.store(slots + begin + token, slot, mask=inside)

    num_draws = tl.load(packed + 2)
    if program < num_draws:
        draw = packed + tl.load(packed + 7) + program
        drawn = tl.load(draw + num_draws).to(tl.int64)
        tl.store(logits_rows + program, tl.load(draw).to(tl.int64))
        tl.store(draw_rows + program, drawn)
        tl.store(position + program, tl.load(draw + 2 * num_draws).to(tl.int64))
        new_at = tl.load(draw + 3 * num_draws)
        new = packed + tl.load(packed + 8) + new_at * NUM_FACTS
        kept = facts + drawn * NUM_FACTS
        is_new = new_at >= 0
        tl.store(temperature + program, _fact(new, kept, is_new, 0).to(tl.float32, bitcast=True))
        tl.store(top_k + program, _fact(new, kept, is_new, 1).to(tl.int64))
        tl.store(top_p + program, _fact(new, kept, is_new, 2).to(tl.float32, bitcast=True))
        tl.store(min_p + program, _fact(new, kept, is_new, 3).to(tl.float32, bitcast=True))
        low = _fact(new, kept, is_new, 4).to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(seed + program, (_fact(new, kept, is_new, 5).to(tl.int64) << 32) | low)


def prepare(packed: Tensor, step: StepTensors, num_segments: int, block_size: int) -> None:
    """One launch, of a program for each segment."""
    sampling = {
        f"sampling.{field.name}": getattr(step.sampling, field.name) for field in fields(step.sampling)
    }
    own = {field.name: getattr(step, field.name) for field in fields(step) if field.name != "sampling"}
    require_aligned("packed", packed)
    for name, tensor in (own | sampling).items():
        require_aligned(name, tensor)
        require_device(name, tensor, step.ids.device)
    launch = _launch(step.ids.device, step.tables.shape[1], block_size)
    launch((num_segments,), packed, *own.values(), *sampling.values())


@functools.cache
def _launch(device: torch.device, table_width: int, block_size: int) -> Launch:
    require_gpu(device)
    return _form(table_width, block_size)


def _form(table_width: int, block_size: int) -> Launch:
    i32, i64, fp32 = (pointer(dtype) for dtype in (torch.int32, torch.int64, torch.float32))
    types = {
        i32: ("packed", "tables", "facts", "q_indptr", "first_pos", "table_rows"),
        i64: ("last", "ids", "positions", "slots", "logits_rows", "draw_rows", "top_k", "seed", "position"),
        fp32: ("temperature", "top_p", "min_p"),
    }
    of = {name: type for type, names in types.items() for name in names}
    order = ("packed", *(field.name for field in fields(StepTensors) if field.name != "sampling"))
    order += ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    return Launch(
        _prepare,
        {name: of[name] for name in order},
        {
            "TABLE_WIDTH": table_width,
            "BLOCK_SIZE": block_size,
            "HEADER": HEADER,
            "NUM_FACTS": NUM_FACTS,
            "WIDTH": 512,  # 4 elements a thread: unmeasured
        },
        num_warps=4,
        num_stages=1,
        name=f"prepare P={block_size} tables of {table_width}",
    )


def shipped() -> list[Launch]:
    """For contexts of 32,768 and 131,072 tokens."""
    return [_form(1024, 32), _form(4096, 32), _form(8192, 16), _form(2048, 64)]
