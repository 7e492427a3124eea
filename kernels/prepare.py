"""The tensors of a step, written on the device from one packed struct of integers that the host filled.

What outlives a step stays on the device: every request has a row of the block tables, its last token, and how
its tokens are chosen.  A step sends only what changed of that, and its own segments.  The struct lies in
pinned memory, which the kernel reads through its own address, so that no copy queues behind those of KV.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import dispatch
from kernels.sampling import SamplingRows

HEADER = 16
"""Integers before all else: how many changes, segments, draws and tokens there are; where segments, ids,
blocks, draws and facts begin.
"""
NUM_CHANGES, NUM_SEGMENTS, NUM_DRAWS, NUM_TOKENS, SEGMENTS, IDS, BLOCKS, DRAWS, FACTS = range(9)
NUM_FACTS = 8  # integers of one row's facts, of which FACT_NAMES are used: bits of fp32, and halves of int64
FACT_NAMES = ("temperature", "top_k", "top_p", "min_p", "seed_low", "seed_high")
PLAIN_FACTS = np.array([0, 0, np.float32(1).view(np.int32), 0, 0, 0, 0, 0], np.int32)  # greedy


@dataclass(frozen=True, slots=True)
class Struct:
    """A packed step, as arrays; they are copied into the pinned struct behind each other, after the header.

    The order in which the kernel's programs do their parts is open, so no part reads what another one writes:
    the blocks that a step writes to come once more beside the changes of the tables, and a row's facts
    together with the first draw that they are for.
    """

    changes: NDArray[np.int32]  # [3, N]: table row, index of the block, its slot; no entry occurs twice
    segments: NDArray[np.int32]  # [5, S]: table row, first position, first row of the step, length, in blocks
    ids: NDArray[np.int32]  # [T], -1 = the last token that was sampled for the segment's table row
    blocks: NDArray[np.int32]  # slots of the blocks that hold each segment's positions, -1 = nowhere
    draws: NDArray[np.int32]  # [4, D], D <= S: row of the step, table row, position to choose, facts or -1
    facts: NDArray[np.int32]  # [F, NUM_FACTS]

    @property
    def num_segments(self) -> int:
        return int(self.segments.shape[1])

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_draws(self) -> int:
        return int(self.draws.shape[1])

    def pack(self, into: NDArray[np.int32]) -> None:
        """ValueError if there is no room for it."""
        parts = (self.changes, self.segments, self.ids, self.blocks, self.draws, self.facts)
        ends = np.cumsum([HEADER, *(part.size for part in parts)])
        if ends[-1] > len(into):
            raise ValueError(f"a step of {ends[-1]} integers does not fit into a struct of {len(into)}")
        into[NUM_CHANGES] = self.changes.shape[1]
        into[NUM_SEGMENTS : NUM_TOKENS + 1] = self.num_segments, self.num_draws, self.num_tokens
        into[SEGMENTS : FACTS + 1] = ends[1:-1]
        for part, begin, end in zip(parts, ends, ends[1:], strict=False):
            into[begin:end] = part.ravel()


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What lives on the device, at fixed addresses: for R rows, and steps of up to T tokens and D draws.

    The first three outlive a step.  Of the others a step of S segments writes the beginnings.  Raises
    ValueError for a tensor of another dtype, shape or layout.
    """

    tables: Tensor  # [R, maxB] int32, as AttnMeta's block_tables
    last: Tensor  # [R] int64, the last sampled token; read here, written by who samples
    facts: Tensor  # [R, NUM_FACTS] int32
    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    q_indptr: Tensor  # [T + 1] int32
    first_pos: Tensor  # [T] int32
    table_rows: Tensor  # [T] int32
    logits_rows: Tensor  # [D] int64, the rows of the step whose logits choose a token
    draw_rows: Tensor  # [D] int64, their table rows
    sampling: SamplingRows  # of [D]

    def __post_init__(self) -> None:
        rows, tokens, draws = len(self.tables), len(self.ids), len(self.logits_rows)
        expected = {
            "tables": (torch.int32, (rows, self.tables.shape[-1])),
            "last": (torch.int64, (rows,)),
            "facts": (torch.int32, (rows, NUM_FACTS)),
            "ids": (torch.int64, (tokens,)),
            "positions": (torch.int64, (tokens,)),
            "slots": (torch.int64, (tokens,)),
            "q_indptr": (torch.int32, (tokens + 1,)),
            "first_pos": (torch.int32, (tokens,)),
            "table_rows": (torch.int32, (tokens,)),
            "logits_rows": (torch.int64, (draws,)),
            "draw_rows": (torch.int64, (draws,)),
        }
        given: dict[str, Tensor] = {name: getattr(self, name) for name in expected}
        for field in fields(self.sampling):
            name = f"sampling.{field.name}"
            given[name] = getattr(self.sampling, field.name)
            is_whole = field.name in ("top_k", "seed", "position")
            expected[name] = (torch.int64 if is_whole else torch.float32, (draws,))
        for name, (dtype, shape) in expected.items():
            tensor = given[name]
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{name} must be contiguous {dtype} {list(shape)}, got {found}")


def prepare(packed: Tensor, step: StepTensors, num_segments: int, block_size: int) -> None:
    """Write what `packed`, the struct of a step of so many segments, says into the step's tensors.

    packed: [N] int32, on the host and pinned.  Does not wait for the device, which reads `packed` when the
    stream comes to it: the struct stays as it is until then.  What it says is not checked here.  ValueError
    for another dtype or layout.
    """
    if packed.dtype != torch.int32 or packed.dim() != 1 or not packed.is_contiguous() or packed.is_cuda:
        given = f"{packed.dtype} {list(packed.shape)} on {packed.device}"
        raise ValueError(f"packed must be contiguous int32 [N] on the host, got {given}")
    if not 1 <= num_segments <= len(step.ids):
        raise ValueError(f"num_segments must be 1 to {len(step.ids)}, as many as tokens, got {num_segments}")
    if dispatch.is_triton(step.ids):
        from kernels.gpu import prepare

        prepare.prepare(packed, step, num_segments, block_size)
    else:
        prepare_ref(packed, step, num_segments, block_size)


def prepare_ref(packed: Tensor, step: StepTensors, num_segments: int, block_size: int) -> None:
    """The same in numpy."""
    struct = packed.numpy()
    num_changes, _, num_draws, num_tokens, *starts = (int(value) for value in struct[: FACTS + 1])
    at_segments, at_ids, at_blocks, at_draws, at_facts = starts
    row, index, slot = struct[HEADER : HEADER + 3 * num_changes].reshape(3, -1)
    step.tables.numpy()[row, index] = slot

    segments = struct[at_segments : at_segments + 5 * num_segments].reshape(5, -1)
    rows, first, begin, length, first_block = segments
    owner = np.repeat(np.arange(num_segments), length)
    positions = np.arange(num_tokens) - begin[owner] + first[owner]
    known = struct[at_ids : at_ids + num_tokens]
    step.ids.numpy()[:num_tokens] = np.where(known < 0, step.last.numpy()[rows[owner]], known)
    step.positions.numpy()[:num_tokens] = positions
    block = positions // block_size - first[owner] // block_size + first_block[owner]
    written = struct[at_blocks:][block].astype(np.int64)
    in_block = positions % block_size
    step.slots.numpy()[:num_tokens] = np.where(written < 0, -1, written * block_size + in_block)
    step.q_indptr.numpy()[: num_segments + 1] = np.append(begin, num_tokens)
    step.first_pos.numpy()[:num_segments] = first
    step.table_rows.numpy()[:num_segments] = rows

    draws = struct[at_draws : at_draws + 4 * num_draws].reshape(4, -1)
    logits_rows, draw_rows, position, new = draws
    facts = step.facts.numpy()
    facts[draw_rows[new >= 0]] = struct[at_facts:].reshape(-1)[_facts_at(new[new >= 0])]
    step.logits_rows.numpy()[:num_draws] = logits_rows
    step.draw_rows.numpy()[:num_draws] = draw_rows
    _choose(step.sampling, facts[draw_rows], position)


def _facts_at(index: NDArray[np.int32]) -> NDArray[np.int64]:
    """[F] -> [F, NUM_FACTS]: where each one's integers lie."""
    return index[:, None].astype(np.int64) * NUM_FACTS + np.arange(NUM_FACTS)


def _choose(sampling: SamplingRows, facts: NDArray[np.int32], position: NDArray[np.int32]) -> None:
    temperature, top_k, top_p, min_p, low, high = facts.T[: len(FACT_NAMES)]
    some = slice(len(position))
    for to, bits in (
        (sampling.temperature, temperature),
        (sampling.top_p, top_p),
        (sampling.min_p, min_p),
    ):
        to.numpy()[some] = np.ascontiguousarray(bits).view(np.float32)
    sampling.top_k.numpy()[some] = top_k
    sampling.seed.numpy()[some] = (high.astype(np.int64) << 32) | (low.astype(np.int64) & 0xFFFFFFFF)
    sampling.position.numpy()[some] = position
