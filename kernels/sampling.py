"""Choosing the next token of each row: greedy, or a seeded draw after temperature, top-k, top-p and min-p.

A draw depends on (seed, position, that row's logits and parameters) and on nothing else: its uniform numbers
are hashes of seed and position, and every sum is taken in a fixed order, so that batch mates change nothing.

The filters apply in the order temperature, top-k, top-p, min-p (as in Hugging Face transformers and vLLM).
Each keeps a prefix of the tokens sorted by descending logit, ties by ascending id.  But no vocabulary is
sorted: with top-k the highest k tokens are listed, and the draw is made among them; without, a token is drawn
from all, and kept if the mass of the tokens before it, summed in one pass, is less than top-p.  Otherwise the
draw is repeated among the tokens before it: all that are kept are among them, with their weights, so that in
the end each is chosen as often as it should be (as in FlashInfer, 2501.01005).

This is the CPU path and the reference; kernels.gpu.sampling chooses the same tokens, unless a number falls so
close to an edge that rounding decides.  Weights of whole rows are fp32, their sums by blocks fp32 and beyond
fp64; next to the listed tokens all is fp64.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.highest import Highest, highest

NUM_LISTED = 256  # a top-k beyond this has its own, longer list, so as to lengthen no other row's
_BLOCK = 256  # weights summed in one go
_NUM_CACHED = 2**20  # weights worked on at a time, so that they stay in the cache
_INCREMENT = -0x61C8864680B583EB  # of splitmix64
_LARGEST = 1 - 2**-53  # its product with any positive number is below that number


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each of S rows is sampled.  All tensors are [S]."""

    temperature: Tensor  # fp32; 0 = greedy
    top_k: Tensor  # int64; 0 = off
    top_p: Tensor  # fp32; 1 = off
    min_p: Tensor  # fp32, relative to the most probable token; 0 = off
    seed: Tensor  # int64
    position: Tensor  # int64, absolute position of the token to be chosen

    def select(self, chosen: Tensor | slice) -> "SamplingRows":
        """The rows at these indices, or under this mask."""
        return SamplingRows(*(getattr(self, field.name)[chosen] for field in fields(self)))


def sample(
    logits: Tensor, rows: SamplingRows, listed: Highest | None = None, out: Tensor | None = None
) -> Tensor:
    """Choose a token for each row, on the device of the logits and without waiting for it.

    logits: [S, V] fp32, not changed; rows, and out [S] int64, if given, on its device -> ids, in out.
    `listed`, of use on the CPU only: the highest tokens of each row, for every top-k up to NUM_LISTED enough.
    Tokens with logit -inf are never drawn; a row needs one finite logit, and no NaN or +inf, or gets just any
    token.  Among equal logits the lowest id comes first, greedily and in every filter.  ValueError for other
    shapes and dtypes.
    """
    if dispatch.is_triton(logits):
        from kernels.gpu import sampling as gpu

        return gpu.sample(logits, rows, out)
    ids = _sample(logits, rows, listed)
    return ids if out is None else out.copy_(ids)


def _sample(logits: Tensor, rows: SamplingRows, listed: Highest | None) -> Tensor:
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; they must be float32 [S, V]")
    for field in fields(rows):
        shape = getattr(rows, field.name).shape
        if shape != logits.shape[:1]:
            raise ValueError(
                f"rows.{field.name} is {list(shape)}; it must be [{logits.shape[0]}] like logits"
            )
    is_drawn = rows.temperature > 0
    is_cut = (rows.top_k > 0) & (rows.top_k < logits.shape[1])
    is_long = rows.top_k > NUM_LISTED
    ids = torch.empty(len(logits), dtype=torch.int64)
    for chosen, choose in (
        (~is_drawn, lambda logits, *_: greedy(logits)),
        (is_drawn & ~is_cut, lambda logits, rows, _: _draw_from_all(logits, rows)),
        (is_drawn & is_cut & ~is_long, _draw_from_listed),
        (is_drawn & is_cut & is_long, lambda logits, rows, _: _draw_from_listed(logits, rows, None)),
    ):
        if chosen.all():  # nothing to be copied, which is the common case
            return choose(logits, rows, listed)
        if chosen.any():
            ids[chosen] = choose(logits[chosen], rows.select(chosen), listed and listed.select(chosen))
    return ids


def greedy(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """The lowest id among the highest logits.  [S, V] fp32 -> [S] int64, in out, if given."""
    if dispatch.is_triton(logits):
        from kernels.gpu import sampling as gpu

        return gpu.greedy(logits, out)
    # NumPy's argmax promises the first of equals, torch's does not, and takes a tenth of its time.
    ids = torch.from_numpy(logits.numpy().argmax(-1))
    return ids if out is None else out.copy_(ids)


def _draw_from_listed(logits: Tensor, rows: SamplingRows, listed: Highest | None) -> Tensor:
    """Draws for rows with a top-k below V."""
    listed = listed or highest(logits, int(rows.top_k.max()))
    weights = (listed.values.double() - listed.values[:, :1]).div_(rows.temperature[:, None]).exp_()
    cumulative = weights.cumsum(-1)
    num_top_k = rows.top_k.clamp(max=weights.shape[1])  # beyond, and behind the end of a list, weights are 0
    mass = cumulative.gather(1, num_top_k[:, None] - 1)
    num_top_p = (cumulative < rows.top_p[:, None] * mass).sum(-1) + 1
    num_min_p = (weights >= rows.min_p[:, None]).sum(-1)
    num_kept = torch.minimum(torch.minimum(num_top_k, num_top_p), num_min_p).clamp_(min=1)  # of NaN none
    mass = cumulative.gather(1, num_kept[:, None] - 1)[:, 0]
    index = _find(_uniform(_bits(rows.seed, rows.position)) * mass, cumulative)
    return listed.ids.gather(1, index[:, None])[:, 0]


def _draw_from_all(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Draws for rows without top-k, some at a time."""
    size = max(1, _NUM_CACHED // logits.shape[1])
    parts = [slice(first, first + size) for first in range(0, len(logits), size)]
    return torch.cat([_draw_from_part(logits[some], rows.select(some)) for some in parts])


def _draw_from_part(logits: Tensor, rows: SamplingRows) -> Tensor:
    weights = (logits - logits.amax(-1, keepdim=True)).div_(rows.temperature[:, None]).exp_()
    cumulative = _cumulative(weights)
    limits = rows.top_p * cumulative[:, -1]
    if rows.min_p.any():
        is_kept = weights.numpy() >= rows.min_p.numpy()[:, None]
        np.multiply(weights.numpy(), is_kept, out=weights.numpy())
        cumulative = _cumulative(weights)
    bits = _bits(rows.seed, rows.position)
    at = torch.arange(len(weights))
    ids = _draw(weights, at, cumulative, _uniform(bits))
    at = at[rows.top_p < 1]  # rows whose token may be one that top-p excludes
    while len(at):
        cumulative = _keep_before_(ids[at], weights, logits, at)
        is_excluded = cumulative[:, -1] >= limits[at]
        at, cumulative = at[is_excluded], cumulative[is_excluded]
        bits = _mix(bits + _INCREMENT)
        ids[at] = _draw(weights, at, cumulative, _uniform(bits[at]))
    return ids


def _draw(weights: Tensor, at: Tensor, cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Tokens chosen by weight: first the block, then, by what is left of the number, the token in it.

    weights: [S, V] fp32, of which N rows, at: [N]; cumulative: [N, B] fp64, of their blocks; uniform: [N]
    fp64 in [0, 1) -> ids [N]
    """
    vocab = weights.shape[1]
    targets = uniform * cumulative[:, -1]
    block = _find(targets, cumulative)[:, None]
    before, behind = F.pad(cumulative, (1, 0)).gather(1, torch.cat([block, block + 1], 1)).unbind(1)
    rest = ((targets - before) / (behind - before)).clamp_(max=_LARGEST)
    ids = block * _BLOCK + torch.arange(_BLOCK)
    in_block = weights[at[:, None], ids.clamp(max=vocab - 1)].double().mul_(ids < vocab).cumsum(-1)
    found = block[:, 0] * _BLOCK + _find(rest * in_block[:, -1], in_block)
    return found.clamp_(max=vocab - 1)  # beyond are those of NaN only


def _cumulative(weights: Tensor) -> Tensor:
    """What a block of a row and those before it sum up to.  [S, V] fp32 -> [S, B] fp64

    NumPy's sum of a block has the same bits in any batch; torch's has not.
    """
    firsts = np.arange(0, weights.shape[1], _BLOCK)
    return torch.from_numpy(np.add.reduceat(weights.numpy(), firsts, axis=1)).double().cumsum(-1)


def _keep_before_(ids: Tensor, weights: Tensor, logits: Tensor, at: Tensor) -> Tensor:
    """Makes weights 0 that do not come before a token in sorted order.  ids: [N], of the N rows `at`.

    What is left, as `_cumulative` [N, B].  Row by row, so that it stays in the cache, and by NumPy, which
    takes a quarter of torch's time to multiply by truth.
    """
    cumulative = []
    is_before = np.empty(logits.shape[1], dtype=bool)
    for n, id in zip(at.tolist(), ids.tolist(), strict=True):
        row, kept = logits[n].numpy(), weights[n].numpy()
        np.greater_equal(row[:id], row[id], out=is_before[:id])
        np.greater(row[id:], row[id], out=is_before[id:])
        np.multiply(kept, is_before, out=kept)
        cumulative.append(_cumulative(weights[n : n + 1]))
    return torch.cat(cumulative)


def _find(targets: Tensor, cumulative: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds the target, [S], [S, N] -> [S].  It has weight.  Of NaN
    the last."""
    found = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]
    return found.clamp_(max=cumulative.shape[1] - 1)


def _bits(seed: Tensor, position: Tensor) -> Tensor:
    """64 random bits for each pair: two rounds of splitmix64, in wrapping int64."""
    return _mix(_mix(seed) + (position + 1) * _INCREMENT)


def _uniform(bits: Tensor) -> Tensor:
    """[S] int64 -> [S] fp64 of 53 bits, in [0, 1)."""
    return _shift_right(bits, 11).double() * 2.0**-53


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ _shift_right(bits, 27)) * -0x6B2FB644ECCEEE15
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)  # torch's own keeps the sign
