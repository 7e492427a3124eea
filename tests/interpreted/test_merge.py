"""Joining partial attention in the Triton kernels: identity, empties, order, and untouched rows."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.gpu.merge import merge_partials
from kernels.gpu.plan import Bounds, WorkPlan
from kernels.merge_state import merge_state
from tests.kernels.cases import assert_within_noise

EMPTY = -torch.inf


def attention(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """scores [T, H, N], values [N, D] -> out [T, H, D], lse [T, H]."""
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("size", [8, 40, 64])
def test_two_parts_of_the_keys_join_into_all_of_them(size: int) -> None:
    scores, values = 8 * torch.randn(70, 3, 40), torch.randn(40, size)
    left, right = attention(scores[..., :7], values[:7]), attention(scores[..., 7:], values[7:])
    joined = merge_state(*left, *right)
    for which in (0, 1):
        assert_within_noise(joined[which], lambda s, v, w=which: attention(s, v)[w], scores, values)


def test_the_empty_state_is_the_identity_on_both_sides() -> None:
    out, lse = torch.randn(4, 2, 8), 300 * torch.randn(4, 2)
    nothing = torch.zeros_like(out), torch.full_like(lse, EMPTY)
    for merged in (merge_state(out, lse, *nothing), merge_state(*nothing, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)


def test_two_empty_states_stay_empty_without_nan() -> None:
    out, lse = torch.zeros(3, 2, 8), torch.full((3, 2), EMPTY)
    merged_out, merged_lse = merge_state(out, lse, out, lse)
    assert torch.equal(merged_out, out) and torch.equal(merged_lse, lse)
    assert merge_state(out[:0], lse[:0], out[:0], lse[:0])[0].shape == (0, 2, 8)


def test_far_apart_weights_neither_overflow_nor_vanish() -> None:
    out_a, out_b = torch.ones(1, 1, 8), torch.full((1, 1, 8), 2.0)
    out, lse = merge_state(out_a, torch.tensor([[-9e4]]), out_b, torch.tensor([[9e4]]))
    assert torch.equal(out, out_b) and lse.item() == 9e4


def test_a_joined_row_has_the_same_bits_alone_and_among_others() -> None:
    parts = torch.randn(37, 4, 20), torch.randn(37, 4), torch.randn(37, 4, 20), torch.randn(37, 4)
    together = merge_state(*parts)
    for begin, end in ((0, 1), (36, 37), (5, 13)):
        alone = merge_state(*(part[begin:end] for part in parts))
        for whole, some in zip(together, alone, strict=True):
            assert torch.equal(whole[begin:end], some)


def test_results_that_do_not_fit_the_kernel_are_refused() -> None:
    out, lse = torch.zeros(4, 2, 8), torch.zeros(4, 2)
    refused = [
        ((out.mT.contiguous().mT, lse, out, lse), "out_a must be contiguous"),
        ((out, lse, out, lse.double()), "lse_b must be float32"),
        ((out, lse, out.double(), lse), "out_b must be float32, bfloat16 or float16 on a GPU"),
        ((out, lse, torch.zeros(65)[1:].view(4, 2, 8), lse), "out_b must begin at a multiple of 16 bytes"),
        ((out[:3], lse, out, lse), r"lse_a must be float32 \[3, 2\]"),
    ]
    for args, message in refused:
        with pytest.raises(ValueError, match=message):
            merge_state(*args)


def split_rows(rows: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """merges and limits for rows (row, chunks, first chunk), whose slots follow each other."""
    bases = np.cumsum([0, *(count for _, count, _ in rows)])
    merges = [[row, base, count, first] for (row, count, first), base in zip(rows, bases[:-1], strict=True)]
    return torch.tensor(merges, dtype=torch.int32), torch.tensor([0, 0, 0, 0, len(rows)], dtype=torch.int32)


def merged(part_out: Tensor, part_lse: Tensor, rows: list[tuple[int, int, int]], num_rows: int):
    """out and lse with NaN where nothing was written."""
    merges, limits = split_rows(rows)
    # As in a captured graph, there may be fewer merges than room for them.
    bounds = Bounds((0, 0, 0), len(part_out) + 3, len(rows) + 2)
    out = torch.full((num_rows, *part_out.shape[1:]), torch.nan)
    lse = torch.full((num_rows, part_out.shape[1]), torch.nan)
    merge_partials(WorkPlan(torch.empty(0, 8), limits, merges, bounds), part_out, part_lse, out, lse, 2)
    return out, lse


ROWS = [(3, 2, 0), (0, 40, 5), (6, 17, 15), (4, 1, 16)]


def partials(size: int) -> tuple[Tensor, Tensor]:
    count = sum(chunks for _, chunks, _ in ROWS)
    return torch.randn(count, 3, size), 5 * torch.randn(count, 3)


def joined(part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """[N, H, D] and [N, H] in base 2 -> [H, D], [H] natural."""
    natural = part_lse * np.log(2)
    return (natural.softmax(0)[..., None] * part_out).sum(0), natural.logsumexp(0)


@pytest.mark.parametrize("size", [16, 40])
def test_split_rows_are_joined_and_others_left_alone(size: int) -> None:
    part_out, part_lse = partials(size)
    out, lse = merged(part_out, part_lse, ROWS, 8)
    begin = 0
    for row, chunks, _ in ROWS:
        some = slice(begin, begin + chunks)
        for which, found in enumerate((out, lse)):
            assert_within_noise(
                found[row], lambda o, s, w=which: joined(o, s)[w], part_out[some], part_lse[some]
            )
        begin += chunks
    others = [1, 2, 5, 7]
    assert out[others].isnan().all() and lse[others].isnan().all()


def test_empty_partial_results_count_for_nothing_and_all_empty_stays_empty() -> None:
    part_out, part_lse = partials(16)
    part_out[:2], part_lse[:2] = 0.0, EMPTY  # all of row 3
    part_out[2:30], part_lse[2:30] = 0.0, EMPTY  # whole groups of row 0, and more
    out, lse = merged(part_out, part_lse, ROWS, 8)
    assert (out[3] == 0).all() and (lse[3] == EMPTY).all()
    for which, found in enumerate((out, lse)):
        expected = part_out[30:42], part_lse[30:42]
        assert_within_noise(found[0], lambda o, s, w=which: joined(o, s)[w], *expected)


def test_the_order_of_additions_follows_from_absolute_chunks_alone() -> None:
    """Chunks that saw nothing, before and behind, change no bit; nor do other rows."""
    part_out, part_lse = torch.randn(20, 3, 16), torch.randn(20, 3)
    alone = merged(part_out, part_lse, [(0, 20, 21)], 1)
    wide_out, wide_lse = torch.zeros(60, 3, 16), torch.full((60, 3), EMPTY)
    wide_out[21:41], wide_lse[21:41] = part_out, part_lse
    wide = merged(wide_out, wide_lse, [(0, 60, 0)], 1)
    company = merged(
        torch.cat((wide_out[:7], part_out)), torch.cat((wide_lse[:7], part_lse)), [(1, 7, 0), (0, 20, 21)], 2
    )
    for a, b, c in zip(alone, wide, company, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[0], c[0])
