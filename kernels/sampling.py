"""Choosing the next token of each row: greedy, or a seeded draw after temperature, top-k, top-p and min-p.

A draw depends on (seed, position, that row's logits and parameters) and on nothing else: its uniform number
is a hash of seed and position, and every sum is taken in a fixed order, so that batch mates change nothing.

The filters apply in the order temperature, top-k, top-p, min-p (as in Hugging Face transformers and vLLM).
Each keeps a prefix of the tokens sorted by descending logit, ties by ascending id; what is needed is the
length of the shortest prefix.  Only the highest tokens are sorted, as long as that prefix ends among them,
which it nearly always does.  A row without filters is not sorted at all.

This is the CPU path and the reference.  Probabilities are fp64: sums over 150K of them keep 13 digits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.highest import highest

_NUM_CACHED = 2**17  # logits worked on at a time, so that the fp64 copies of them stay in the cache


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


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Choose a token for each row.  logits: [S, V] fp32 on CPU, not changed -> ids [S] int64.

    Tokens with logit -inf are never drawn; a row needs one finite logit, and no NaN or +inf.  Among equal
    logits the lowest id comes first, greedily and in every filter.  ValueError for other shapes and dtypes.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; they must be float32 [S, V]")
    for field in fields(rows):
        shape = getattr(rows, field.name).shape
        if shape != logits.shape[:1]:
            raise ValueError(
                f"rows.{field.name} is {list(shape)}; it must be [{logits.shape[0]}] like logits"
            )
    is_drawn = rows.temperature > 0
    is_filtered = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
    ids = torch.empty(len(logits), dtype=torch.int64)
    for chosen, choose in (
        (~is_drawn, lambda logits, _: greedy(logits)),
        (is_drawn & is_filtered, _draw_filtered),
        (is_drawn & ~is_filtered, _draw_from_all),
    ):
        if chosen.all():  # nothing to be copied, which is the common case
            return choose(logits, rows)
        if chosen.any():
            ids[chosen] = choose(logits[chosen], rows.select(chosen))
    return ids


def greedy(logits: Tensor) -> Tensor:
    """The lowest id among the highest logits.  [S, V] fp32 on CPU -> [S] int64."""
    # NumPy's argmax promises the first of equals, torch's does not, and takes a tenth of its time.
    return torch.from_numpy(logits.numpy().argmax(-1))


def _draw_from_all(logits: Tensor, rows: SamplingRows) -> Tensor:
    drawn = []
    for part, part_rows in _parts(logits, rows):
        cumulative = _weights(part, part_rows.temperature).cumsum(-1)
        drawn.append(_find(_uniform(part_rows.seed, part_rows.position) * cumulative[:, -1], cumulative))
    return torch.cat(drawn)


def _draw_filtered(logits: Tensor, rows: SamplingRows, num_highest: int = 256) -> Tensor:
    """Draws for rows with a filter: among the highest tokens, then among more where these were too few."""
    vocab = logits.shape[1]
    ids, is_known = _draw_among_highest(num_highest if 4 * num_highest < vocab else vocab, logits, rows)
    if not is_known.all():
        rest = _parts(logits[~is_known], rows.select(~is_known))
        ids[~is_known] = torch.cat([_draw_filtered(*part, 16 * num_highest) for part in rest])
    return ids


def _draw_among_highest(num_highest: int, logits: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """(ids [S], is_known [S]).  Where filters keep more than the sorted tokens, the id is not known yet."""
    vocab = logits.shape[1]
    values, order, num_known = highest(logits, num_highest)
    weights = _weights(values, rows.temperature)
    cumulative = weights.cumsum(-1)

    is_cut = (rows.top_k > 0) & (rows.top_k < vocab)
    num_top_k = torch.where(is_cut, rows.top_k, vocab)
    total = cumulative.gather(1, num_top_k.clamp(max=values.shape[1])[:, None] - 1)[:, 0]
    if num_highest < vocab and not is_cut.all():
        total[~is_cut] = _sum_of_weights(logits[~is_cut], rows.select(~is_cut))
    num_top_p = (cumulative < (rows.top_p * total)[:, None]).sum(-1) + 1
    num_top_p = torch.where(rows.top_p < 1, num_top_p, vocab)
    num_min_p = (weights >= rows.min_p[:, None]).sum(-1)
    num_min_p = torch.where(rows.min_p > 0, num_min_p, vocab)

    num_kept = torch.minimum(torch.minimum(num_top_k, num_top_p), num_min_p)

    # A prefix as long as the list may go on behind it.
    is_known = ((num_kept < num_known) | (num_known == vocab)) & (~is_cut | (rows.top_k <= num_known))
    mass_kept = cumulative.gather(1, num_kept.clamp(max=values.shape[1])[:, None] - 1)[:, 0]
    index = _find(_uniform(rows.seed, rows.position) * mass_kept, cumulative)
    return order.gather(1, index[:, None])[:, 0], is_known


def _weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities up to a factor: [S, N] fp64, 1 for the highest logit of a row."""
    top = logits.amax(-1, keepdim=True)
    return logits.double().sub_(top).div_(temperature[:, None]).exp_()


def _sum_of_weights(logits: Tensor, rows: SamplingRows) -> Tensor:
    """[S] fp64.  NumPy's sum of a row has the same bits in any batch; torch's has not."""
    weights = (_weights(part, part_rows.temperature) for part, part_rows in _parts(logits, rows))
    return torch.cat([torch.from_numpy(some.numpy().sum(-1)) for some in weights])


def _parts(logits: Tensor, rows: SamplingRows) -> Iterator[tuple[Tensor, SamplingRows]]:
    """All rows in order, few at a time."""
    size = max(1, _NUM_CACHED // logits.shape[1])
    for first in range(0, len(logits), size):
        some = slice(first, first + size)
        yield logits[some], rows.select(some)


def _find(targets: Tensor, cumulative: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds the target, [S], [S, N] -> [S].  It has weight."""
    return torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]


def _uniform(seed: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1) for each pair, fp64 of 53 bits: two rounds of splitmix64, in wrapping int64."""
    bits = _mix(_mix(seed) + (position + 1) * -0x61C8864680B583EB)
    return _shift_right(bits, 11).double() * 2.0**-53


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ _shift_right(bits, 27)) * -0x6B2FB644ECCEEE15
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)  # torch's own keeps the sign
