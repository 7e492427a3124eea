"""Runs plans on a GPU without ever waiting for it while a step is launched.

A step is packed into one struct, which a first kernel unpacks on the device; then the decoder and the sampler
follow on the same stream.  The tokens stay there for the next step, and a copy of them goes to the host on a
stream of its own, where `collect` waits for it.  Steps in which every segment is one token that draws another
are replayed from graphs, filled up with idle segments to the next number that there is a graph for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Collect, RowParams, Segment, StepPlan, StepResult
from engine.cache.kv_store import KVStore
from engine.cuda.device import Device
from engine.cuda.graphs import buckets, graphs_of
from engine.cuda.rows import Rows
from engine.cuda.sampler import Choice, DeviceSampler, is_plain
from engine.errors import InvariantError
from engine.models.decoder import Decoder
from engine.types import SamplingParams
from kernels.paged_attention import AttnMeta, Extents
from kernels.prepare import StepTensors, Struct, prepare
from kernels.sampling import SamplingRows

RING = 3  # steps that may be launched and not collected: one more than a run-ahead of one needs
ROWS_PER_REQUEST = 2  # so that what is suspended for a while is not sent anew when it comes back
_GREEDY = SamplingParams(temperature=0.0)  # which the sampler has a kernel for
_PAGE = 1024  # integers: structs begin at multiples of it


@dataclass(slots=True)
class _Slot:
    """What one step in flight has for itself.  The device reads and writes it until the step is collected;
    only then another step gets it.
    """

    struct: Tensor  # [N] int32, pinned
    ids: Tensor  # [D] int64 on the device
    host_ids: Tensor  # [D] int64, pinned
    is_free: bool = True


class CudaRunner:
    """Launches are made by one thread, and so are collects, each in the order of planning.

    `context_blocks`: of the longest conversation.  A name's token is kept for the step after the one that
    sampled it.
    """

    def __init__(
        self,
        device: Device,
        decoder: Decoder,
        store: KVStore,
        sampler: DeviceSampler,
        block_size: int,
        max_step_tokens: int,
        max_concurrent: int,
        context_blocks: int,
    ) -> None:
        self._device, self._decoder, self._store, self._sampler = device, decoder, store, sampler
        self._block_size = block_size
        config, num_blocks = decoder.config, store.slab.shape[1]
        self._context_tokens = min(context_blocks * block_size, config.max_positions)
        self._max_tokens = max(max_step_tokens, max_concurrent)
        self._max_concurrent = max_concurrent
        num_rows = ROWS_PER_REQUEST * max_concurrent
        self._rows = Rows(num_rows, context_blocks, num_blocks, block_size, config.vocab_size)
        with device.on(device.compute):
            self._step = _step_tensors(device, self._rows, self._max_tokens)
        size = self._rows.capacity(self._max_tokens, self._max_tokens)
        structs = device.pinned((RING, -(-size // _PAGE) * _PAGE), torch.int32)
        host_ids = device.pinned((RING, self._max_tokens), torch.int64)
        ids = device.empty((RING, self._max_tokens), torch.int64)
        self._ring = [_Slot(*tensors) for tensors in zip(structs, ids, host_ids, strict=True)]
        self._num_launched = 0
        self._graphs = graphs_of(device)
        self._buckets: tuple[int, ...] = ()  # that there are graphs for, ascending

    @torch.inference_mode()
    def launch(self, plan: StepPlan, wait_for: Callable[[int], None] | None = None) -> Collect:
        self._next_slot()  # before the rows take the device to know of this step
        segments = plan.segments
        draws = {segment.row: segment.draw for segment in segments if segment.draw is not None}
        bucket = None if wait_for is not None else self._bucket(segments)
        struct = self._rows.struct(segments, 0 if bucket is None else bucket - len(segments))
        extents = _extents(struct)

        def compute() -> Choice:
            if bucket is not None:
                return Choice(self._graphs.replay(bucket))
            return self._compute(struct.num_tokens, struct.num_draws, extents, draws, wait_for)

        return self._launch(struct, draws, compute)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every size of step once, so that all is compiled, and capture graphs; nothing of rows and KV is
        changed.  Waits for the device.  Before it, all steps are launched kernel by kernel.
        """
        device = self._device
        for bucket in reversed(buckets(self._max_concurrent)):
            self._try_decoding(bucket)
            with device.on(device.compute):
                self._graphs.capture(bucket, self._decode_work(bucket))
        self._buckets = buckets(self._max_concurrent)
        for num_tokens in _prompt_sizes(self._max_tokens):
            self._try_prompt(num_tokens)

    # -- private

    def _bucket(self, segments: Sequence[Segment]) -> int | None:
        """The graph for these segments; None if there is none."""
        if not self._buckets or len(segments) > self._buckets[-1]:
            return None
        if any(one.draw is None or one.length > 1 or not is_plain(one.draw) for one in segments):
            return None
        return next(bucket for bucket in self._buckets if bucket >= len(segments))

    def _launch(
        self, struct: Struct, draws: Mapping[int, RowParams], compute: Callable[[], Choice]
    ) -> Collect:
        """`compute` gives the device work, behind the kernel that unpacks the struct, and has the tokens of
        all draws, of which those of `draws` come first.
        """
        device, slot, num_draws = self._device, self._next_slot(), len(draws)
        self._num_launched += 1
        slot.is_free = False
        begun, ended, arrived = (device.event() for _ in range(3))
        struct.pack(slot.struct.numpy())
        device.record(begun, device.compute)
        with device.on(device.compute):
            prepare(slot.struct, self._step, struct.num_segments, self._block_size)
            choice = compute()
            slot.ids[:num_draws].copy_(choice.ids[:num_draws])  # a graph's are overwritten by the next replay
        device.record(ended, device.compute)
        device.wait(device.results, ended)
        device.copy(slot.host_ids[:num_draws], slot.ids[:num_draws], device.results)
        device.record(arrived, device.results)

        def collect() -> StepResult:
            device.synchronize(arrived)
            seconds = device.seconds_between(begun, ended)
            for event in (begun, ended, arrived):
                device.recycle(event)
            sampled = dict(zip(draws, slot.host_ids[:num_draws].tolist(), strict=True))
            slot.is_free = True
            return StepResult(sampled, seconds, choice.logprobs())

        return collect

    def _next_slot(self) -> _Slot:
        """InvariantError if its step was not collected."""
        slot = self._ring[self._num_launched % RING]
        if not slot.is_free:
            raise InvariantError(f"{RING} steps are launched and not collected; collect one first")
        return slot

    def _compute(
        self,
        num_tokens: int,
        num_draws: int,
        extents: Extents,
        draws: Mapping[int, RowParams],
        wait_for: Callable[[int], None] | None = None,
    ) -> Choice:
        """The decoder and the sampler, over what the struct was unpacked to."""
        step, num_segments = self._step, len(extents.lengths)
        meta = AttnMeta(
            q_indptr=step.q_indptr[: num_segments + 1],
            first_pos=step.first_pos[:num_segments],
            block_tables=step.tables,
            positions=step.positions[:num_tokens],
            slots=step.slots[:num_tokens],
            table_rows=step.table_rows[:num_segments],
            extents=extents,
        )
        ids, rows = step.ids[:num_tokens], step.logits_rows[:num_draws]
        logits = self._decoder.forward(ids, meta, self._store.layers, rows, wait_for)
        if not num_draws:
            return Choice(step.last[:0])
        choice = self._sampler.choose(logits, draws, step.sampling.select(slice(num_draws)))
        step.last.index_copy_(0, step.draw_rows[:num_draws], choice.ids)
        return choice

    def _decode_work(self, bucket: int) -> Callable[[], Tensor]:
        """A step of `bucket` segments of one token, wherever they stand."""
        ones = np.ones(bucket, np.int64)
        bounds = Extents(lengths=ones, ends=ones * self._context_tokens)
        return lambda: self._compute(bucket, bucket, bounds, {}).ids

    def _try_decoding(self, bucket: int) -> None:
        """What is to be captured: with its extents, for they tell which kernels run."""
        work = self._decode_work(bucket)
        self._launch(self._rows.idle([1] * bucket), {}, lambda: Choice(work()))()

    def _try_prompt(self, num_tokens: int) -> None:
        """A step of so many tokens in segments as long as may be, all of which draw greedily."""
        whole, rest = divmod(num_tokens, self._context_tokens)
        struct = self._rows.idle([self._context_tokens] * whole + [rest] * (rest > 0))
        extents = _extents(struct)
        draws = {name: RowParams(_GREEDY, 0, 0, 0) for name in range(struct.num_draws)}
        self._launch(
            struct, draws, lambda: self._compute(struct.num_tokens, struct.num_draws, extents, draws)
        )()


def _extents(struct: Struct) -> Extents:
    _, first, _, length, _ = struct.segments.astype(np.int64)
    return Extents(lengths=length, ends=first + length)


def _prompt_sizes(most: int) -> list[int]:
    """Tokens of a step: every power of two and the most."""
    return sorted({most, *(1 << n for n in range(1, most.bit_length()))})


def _step_tensors(device: Device, rows: Rows, num_tokens: int) -> StepTensors:
    """As the device begins with them."""

    def holding(values: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(values).to(device.torch_device)

    i32, i64, fp32 = torch.int32, torch.int64, torch.float32
    column = (num_tokens,)
    return StepTensors(
        tables=holding(rows.initial_tables()),
        last=torch.zeros(rows.num_rows + 1, dtype=i64, device=device.torch_device),
        facts=holding(rows.initial_facts()),
        **{name: device.empty(column, i64) for name in ("ids", "positions", "slots")},
        q_indptr=device.empty((num_tokens + 1,), i32),
        **{name: device.empty(column, i32) for name in ("first_pos", "table_rows")},
        **{name: device.empty(column, i64) for name in ("logits_rows", "draw_rows")},
        sampling=SamplingRows(
            **{name: device.empty(column, fp32) for name in ("temperature", "top_p", "min_p")},
            **{name: device.empty(column, i64) for name in ("top_k", "seed", "position")},
        ),
    )
