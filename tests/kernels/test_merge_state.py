"""Joining partial attention: identity, empties, and bits that do not depend on how many rows are joined."""

import torch
from torch import Tensor

from kernels.merge_state import merge_state
from tests.kernels.cases import DTYPES, assert_within_noise

EMPTY = -torch.inf


def attention(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """scores [T, H, N], values [N, D] -> out [T, H, D], lse [T, H]."""
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def test_two_parts_of_the_keys_join_into_all_of_them() -> None:
    scores, values = 8 * torch.randn(5, 3, 40), torch.randn(40, 16)

    def joined(scores: Tensor, values: Tensor, which: int) -> Tensor:
        left, right = attention(scores[..., :7], values[:7]), attention(scores[..., 7:], values[7:])
        return merge_state(*left, *right)[which]

    for which in (0, 1):
        out = joined(scores, values, which)
        assert_within_noise(out, lambda s, v, w=which: attention(s, v)[w], scores, values)


def test_the_empty_state_is_the_identity_on_both_sides() -> None:
    for dtype in DTYPES:
        out, lse = torch.randn(4, 2, 8).to(dtype), 300 * torch.randn(4, 2)
        nothing = torch.zeros_like(out), torch.full_like(lse, EMPTY)
        for merged in (merge_state(out, lse, *nothing), merge_state(*nothing, out, lse)):
            assert merged[0].dtype == dtype
            assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)


def test_two_empty_states_stay_empty_without_nan() -> None:
    out, lse = torch.zeros(3, 2, 8), torch.full((3, 2), EMPTY)
    merged_out, merged_lse = merge_state(out, lse, out, lse)
    assert torch.equal(merged_out, out) and torch.equal(merged_lse, lse)


def test_far_apart_weights_neither_overflow_nor_vanish() -> None:
    out_a, out_b = torch.ones(1, 1, 4), torch.full((1, 1, 4), 2.0)
    out, lse = merge_state(out_a, torch.tensor([[-9e4]]), out_b, torch.tensor([[9e4]]))
    assert torch.equal(out, out_b) and lse.item() == 9e4


def test_a_joined_row_has_the_same_bits_alone_and_among_others() -> None:
    parts = torch.randn(37, 3, 20), torch.randn(37, 3), torch.randn(37, 3, 20), torch.randn(37, 3)
    together = merge_state(*parts)
    for begin, end in ((0, 1), (36, 37), (5, 13)):
        alone = merge_state(*(part[begin:end] for part in parts))
        for whole, some in zip(together, alone, strict=True):
            assert torch.equal(whole[begin:end], some)
