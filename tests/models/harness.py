"""What the model tests stand on: a small owner of paged KV, and conversations that run over it.

The paged cache hands out its blocks in shuffled order and begins full of NaN: a row that attends to a slot
nobody wrote, or to another conversation's, cannot go unnoticed.
"""

import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.models.decoder import Decoder
from kernels.paged_attention import AttnMeta, Extents

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one conversation, from position `first` on."""

    conversation: int
    first: int
    ids: list[int]


class PagedHarness:
    """Owns the KV blocks of several conversations and turns runs of tokens into steps of a decoder."""

    def __init__(
        self, decoder: Decoder, num_blocks: int = 128, block_size: int = 32, device: torch.device = CPU
    ) -> None:
        config = decoder.config
        shape = (num_blocks, 2, config.num_kv_heads, block_size, config.head_dim)
        self.decoder, self.block_size, self.device = decoder, block_size, device
        layers = range(config.num_layers)
        self.kv = [torch.full(shape, torch.nan, dtype=decoder.dtype, device=device) for _ in layers]
        self._free = random.Random(0).sample(range(num_blocks), num_blocks)
        self._tables: dict[int, list[int]] = {}

    def step(self, *runs: Run, rows: Tensor | None = None, **more: Any) -> Tensor:
        """Logits [R, V] of `rows`: [R] int64, each run's last row if not given; `more` is the decoder's."""
        return self.decoder.forward(*self.inputs(*runs, rows=rows), **more)

    def inputs(self, *runs: Run, rows: Tensor | None = None) -> tuple[Tensor, AttnMeta, list[Tensor], Tensor]:
        """What the decoder takes for that step, on the device."""
        ends = torch.tensor([0, *(len(run.ids) for run in runs)]).cumsum(0)
        ids = torch.tensor([token for run in runs for token in run.ids])
        rows = ends[1:] - 1 if rows is None else rows
        return ids.to(self.device), self._meta(runs, ends), self.kv, rows.to(self.device)

    def drop_block(self, conversation: int, index: int) -> None:
        """Forget what a block held; the conversation keeps its place."""
        for layer in self.kv:
            layer[self._tables[conversation][index]] = torch.nan

    def _meta(self, runs: tuple[Run, ...], ends: Tensor) -> AttnMeta:
        tables, positions, slots = [], [], []
        for run in runs:
            table = self._tables.setdefault(run.conversation, [])
            where = torch.arange(run.first, run.first + len(run.ids))
            while len(table) * self.block_size <= int(where[-1]):
                table.append(self._free.pop())
            tables.append(torch.tensor(table, dtype=torch.int32))
            positions.append(where)
            slots.append(
                tables[-1].long()[where // self.block_size] * self.block_size + where % self.block_size
            )
        lengths = np.array([len(run.ids) for run in runs])
        extents = Extents(lengths, np.array([run.first for run in runs]) + lengths)
        return AttnMeta(
            q_indptr=ends.int().to(self.device),
            first_pos=torch.tensor([run.first for run in runs], dtype=torch.int32, device=self.device),
            block_tables=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=-1).to(
                self.device
            ),
            positions=torch.cat(positions).to(self.device),
            slots=torch.cat(slots).to(self.device),
            extents=None if self.device == CPU else extents,
        )


Speaker = Generator[Run, int, list[list[int]]]


def speak(conversation: int, turns: list[list[int]], lengths: list[int], chunk: int = 10**9) -> Speaker:
    """A conversation as a generator: yields the next run of at most `chunk` tokens, is sent the token chosen
    after it, returns the replies.  The last token of a reply is computed together with the next turn."""
    replies: list[list[int]] = []
    position, pending = 0, list[int]()
    for turn, length in zip(turns, lengths, strict=True):
        pending, reply = pending + turn, list[int]()
        while len(reply) < length:
            run, pending = Run(conversation, position, pending[:chunk]), pending[chunk:]
            position += len(run.ids)
            token = yield run
            if not pending:
                reply.append(token)
                pending = [token]
        replies.append(reply)
    return replies


def converse(harness: PagedHarness, *speakers: Speaker, stagger: int = 3) -> list[list[list[int]]]:
    """Runs all conversations in common steps, each joining `stagger` steps after the one before."""
    replies: dict[int, list[list[int]]] = {}
    running: dict[int, Run] = {}
    step = 0
    while len(replies) < len(speakers):
        for index in range(min(len(speakers), step // stagger + 1)):
            if index not in replies and index not in running:
                running[index] = next(speakers[index])
        chosen = harness.step(*running.values()).argmax(dim=-1).tolist() if running else []
        for index, token in zip(list(running), chosen, strict=True):
            try:
                running[index] = speakers[index].send(token)
            except StopIteration as end:
                replies[index] = end.value
                del running[index]
        step += 1
    return [replies[index] for index in range(len(speakers))]
