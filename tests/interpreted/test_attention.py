"""Attention over paged caches, by the Triton kernels, in fp32: against float64, and against itself."""

import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.gpu import attention, attention_tiles
from kernels.merge_state import merge_state
from kernels.paged_attention import AttnMeta, Extents, paged_attention, paged_attention_ref
from tests.kernels.cases import Paged, assert_within_noise, paged

CHUNK = 64
# heads, kv heads, size, slots, window, soft cap, share of lost blocks: every value that matters occurs, not
# every pair
Shape = tuple[int, int, int, int, int | None, float | None, float]
SHAPES: list[Shape] = [
    (2, 2, 16, 16, None, None, 0.0),
    (4, 1, 64, 32, None, None, 0.2),
    (14, 2, 32, 32, None, None, 0.0),
    (8, 1, 8, 64, 100, None, 0.0),
    (2, 1, 40, 16, 7, None, 0.2),
    (2, 1, 80, 32, None, 0.5, 0.0),
    (2, 2, 128, 64, 65, 2.0, 0.3),
]
WIDER: list[Shape] = [
    (4, 4, 128, 32, None, None, 0.0),
    (14, 2, 64, 32, None, None, 0.1),
    (14, 2, 64, 16, 300, 3.0, 0.1),
    (20, 1, 24, 32, 90, None, 0.2),
    (128, 1, 16, 64, None, None, 0.2),
    (7, 1, 96, 64, 33, 50.0, 0.0),
    (2, 1, 256, 32, None, None, 0.1),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> object:
    """Fresh tensors are full of NaN, so an element a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def attend(
    case: Paged, window: int | None = None, softcap: float | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    return attention.paged_attention(case.q, case.kv, case.meta, case.scale, window, softcap, chunk)


def assert_right(
    case: Paged, found: tuple[Tensor, Tensor], window: int | None = None, softcap: float | None = None
) -> None:
    for which in (0, 1):
        assert_within_noise(
            found[which],
            lambda q, kv, which=which: paged_attention_ref(q, kv, case.meta, case.scale, window, softcap)[
                which
            ],
            case.q,
            case.kv,
        )


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def with_meta(case: Paged, **changes: object) -> Paged:
    names = ("q_indptr", "first_pos", "block_tables", "positions", "slots", "table_rows", "extents")
    return replace(case, meta=AttnMeta(**({name: getattr(case.meta, name) for name in names} | changes)))


def check(shape: Shape, new: list[int], cached: list[int], chunk: int = CHUNK) -> None:
    heads, kv_heads, size, slots, window, softcap, holes = shape
    case = paged(new, cached, heads=heads, kv_heads=kv_heads, size=size, slots=slots, holes=holes)
    assert_right(case, attend(case, window, softcap, chunk), window, softcap)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_steps_agree_with_float64(shape: Shape) -> None:
    check(shape, [5, 1, 33, 1], [0, 200, 100, 0])


@pytest.mark.heavy
@pytest.mark.parametrize("shape", SHAPES + WIDER, ids=str)
def test_wider_ragged_steps_agree_with_float64(shape: Shape) -> None:
    group = shape[0] // shape[1]
    longest = 129 if group <= 4 else 40 if group <= 32 else 3  # many heads make many tiles
    check(shape, [5, 1, 33, longest, 1, 0, 1], [0, 700, 100, 250, 0, 3, 90])


@pytest.mark.heavy
@pytest.mark.parametrize("new", [1, 5, 33, 129])
def test_long_caches_in_chunks_of_the_shipped_size_agree_with_float64(new: int) -> None:
    check((4, 2, 32, 32, None, None, 0.02), [new, 1], [2000, 1500], attention.CHUNK)


def test_chunks_that_grow_so_that_they_stay_few_agree_with_float64() -> None:
    case = paged([33, 1], [4200, 300], heads=2, kv_heads=1, size=16, slots=64, holes=0.1)
    assert_right(case, attend(case))
    (step,) = case.meta.plans.values()
    assert step.work.bounds.partials == 33 * 17 + 5, "not 33 * 34: 128 positions each would be more than 32"


def test_segments_too_long_for_chunks_agree_with_float64() -> None:
    check((1, 1, 16, 16, None, None, 0.0), [258, 1], [70, 3])
    check((1, 1, 16, 16, 150, None, 0.0), [258, 1], [70, 3])


def test_the_tiles_of_16_bit_elements_agree_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for (kind, width, itemsize), tile in list(attention_tiles._TABLE.items()):
        if itemsize == 2:
            monkeypatch.setitem(attention_tiles._TABLE, (kind, width, 4), tile)
    attention._launch.cache_clear()
    try:
        check((6, 2, 16, 32, None, None, 0.0), [5, 1, 60], [70, 200, 100])  # one of each kind
        check((6, 2, 16, 32, None, None, 0.2), [60], [100])
    finally:
        attention._launch.cache_clear()


def test_the_contracts_function_comes_here() -> None:
    case = paged([3, 1], [40, 10])
    assert_same(paged_attention(case.q, case.kv, case.meta, case.scale), attend(case, chunk=attention.CHUNK))


@pytest.mark.parametrize("window", [None, 90])
def test_a_segment_has_the_same_bits_alone_and_among_others(window: int | None) -> None:
    new = [40, 1, 5, 1]
    case = paged(new, [0, 300, 100, 64], heads=7, kv_heads=1, holes=0.1)
    together = attend(case, window)
    for segment, rows in enumerate(new):
        alone = attend(case.rows(segment, 0, rows), window)
        begin = int(case.meta.q_indptr[segment])
        assert_same(alone, (together[0][begin : begin + rows], together[1][begin : begin + rows]))


def test_segments_share_blocks_and_rows_of_tables() -> None:
    case = paged([1, 1, 3], [90, 90, 88], slots=32)
    tables = case.meta.block_tables
    expected = with_meta(case, block_tables=tables[:1].repeat(3, 1))
    shared = with_meta(case, block_tables=tables[[1, 0]], table_rows=torch.ones(3, dtype=torch.int32))
    assert_right(expected, attend(expected))
    assert_same(attend(shared), attend(expected))


def test_a_dropped_prefix_is_recomputed_in_the_same_step_as_the_new_prompt() -> None:
    whole = paged([100], [0], slots=16)
    rows = torch.cat((torch.arange(40), torch.arange(90, 100)))
    parts = AttnMeta(
        torch.tensor([0, 40, 50], dtype=torch.int32),
        torch.tensor([0, 90], dtype=torch.int32),
        whole.meta.block_tables,
        rows,
        torch.full((50,), -1),
        torch.zeros(2, dtype=torch.int32),
    )
    out, _ = attend(Paged(whole.q[rows], whole.kv, parts))
    expected = paged_attention_ref(whole.q, whole.kv, whole.meta, whole.scale)[0][rows]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_what_lies_before_every_window_may_be_lost_or_not_a_number() -> None:
    case = paged([1, 40], [300, 130], slots=32)
    window = 50
    lost = case.meta.block_tables.clone()
    for segment, cached in enumerate([300, 130]):
        unseen = (cached - window + 1) // 32
        assert unseen > 1
        for position in range(cached - window + 1):
            case.kv[lost[segment, position // 32], :, :, position % 32] = torch.nan
        lost[segment, 1:unseen] = -1
    whole = attend(case, window)
    assert whole[0].isfinite().all() and whole[1].isfinite().all()
    assert_same(attend(case.with_tables(lost), window), whole)


def test_rows_without_keys_are_zero_and_minus_infinity() -> None:
    case = paged([3, 0, 2, 70], [300, 7, 30, 10])
    tables = case.meta.block_tables.clone()
    tables[0] = tables[3] = -1
    out, lse = attend(case.with_tables(tables))
    for rows in (slice(3), slice(5, 75)):
        assert (out[rows] == 0).all() and (lse[rows] == -torch.inf).all()
    assert out[3:5].isfinite().all() and lse[3:5].isfinite().all()


def test_a_step_without_rows_gives_nothing() -> None:
    out, lse = attend(paged([0], [20]))
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_extents_may_be_more_than_comes_as_in_a_captured_graph() -> None:
    case = paged([1, 1, 1], [200, 9, 70], heads=4, kv_heads=2)
    meta = case.meta
    for window in (None, 70):
        graph = with_meta(
            case,
            q_indptr=torch.tensor([0, 1, 2, 3, 3, 3], dtype=torch.int32),
            first_pos=torch.tensor([200, 9, 70, 0, 0], dtype=torch.int32),
            block_tables=torch.cat((meta.block_tables, torch.full((2, 14), -1, dtype=torch.int32))),
            positions=torch.zeros(5, dtype=torch.int64),
            slots=torch.full((5,), -1),
            extents=Extents(np.ones(5, dtype=np.int64), np.full(5, 14 * 16)),
        )
        out, lse = attend(replace(graph, q=torch.cat((case.q, case.q[:2]))), window)
        assert_same((out[:3], lse[:3]), attend(case, window))
        assert out[3:].isnan().all() and lse[3:].isnan().all()  # nobody's rows


def test_partial_results_over_any_split_merge_into_the_whole() -> None:
    case = paged([4, 1], [150, 280], slots=32)
    tables = case.meta.block_tables
    owner = torch.randint(0, 3, tables.shape)
    merged = torch.zeros_like(case.q), torch.full(case.q.shape[:2], -torch.inf)
    for rank in (2, 0, 1, 3):  # 3 owns nothing
        merged = merge_state(*merged, *attend(case.with_tables(tables.where(owner == rank, -1))))
    assert_right(case, merged)


def test_queries_from_elsewhere_attend_the_blocks_held_here_in_a_closed_up_table() -> None:
    lengths, cached = [2, 1, 40], [190, 260, 100]
    case = paged(lengths, cached)
    tables = case.meta.block_tables
    lent = torch.rand(tables.shape) < 0.5
    held: list[Tensor] = []
    for segment, first in enumerate(cached):
        lent[segment, first // 16 :] = False  # the queries' own positions are not lent
        held.append(tables[segment][lent[segment]])
        assert len(held[-1])
    starts = [16 * len(blocks) for blocks in held]
    closed = torch.full((3, (max(starts) + 40) // 16 + 1), -1, dtype=torch.int32)
    for segment, blocks in enumerate(held):
        closed[segment, : len(blocks)] = blocks
    elsewhere = with_meta(
        case,
        block_tables=closed,
        first_pos=torch.tensor(starts, dtype=torch.int32),
        positions=torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]),
    )
    own = attend(case.with_tables(tables.where(~lent, -1)))
    assert_right(case, merge_state(*own, *attend(elsewhere)))


def test_not_a_number_in_a_key_that_is_seen_reaches_the_result() -> None:
    case = paged([2], [30], slots=32)
    case.kv[case.meta.block_tables[0, 0], 0, 0, 31] = torch.nan  # the second row sees it
    out, lse = attend(case)
    assert out[0].isfinite().all() and lse[0].isfinite().all()
    assert out[1, :2].isnan().all() and lse[1, :2].isnan().all()
    assert out[1, 2:].isfinite().all()


def test_a_soft_cap_holds_for_scores_beyond_any_exponential() -> None:
    case = paged([2], [100])
    case.q.mul_(1e4)
    assert_right(case, attend(case, softcap=2.0), softcap=2.0)


def test_blocks_may_lie_apart_as_in_a_slab_of_all_layers_beyond_two_to_the_31_elements() -> None:
    case = paged([6, 1, 70], [50, 90, 3])
    blocks = len(case.kv)
    step = 2**31 // (blocks - 1) // 64 * 64 + 64  # elements from block to block
    # Only the pages that are written take memory; MAP_NORESERVE has no name before Python 3.13.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    slab = torch.frombuffer(mmap.mmap(-1, 4 * step * blocks, flags=flags), dtype=torch.float32)
    apart = slab.as_strided(case.kv.shape, (step, *case.kv.stride()[1:]))
    assert (blocks - 1) * apart.stride(0) >= 2**31
    apart.copy_(case.kv)
    assert_same(attend(Paged(case.q, apart, case.meta)), attend(case))


def test_later_layers_of_a_step_use_the_first_ones_plan() -> None:
    case = paged([3, 1, 1], [40, 10, 200])
    first = attend(case)
    plans = dict(case.meta.plans)
    other = replace(case, q=case.q.clone(), kv=case.kv.clone())
    assert_same(attend(other), first)
    assert case.meta.plans == plans and len(plans) == 1
    attend(case, window=20)
    assert len(case.meta.plans) == 2


def test_arguments_that_do_not_fit_are_refused_with_their_values() -> None:
    case = paged([2], [30])
    q, kv, meta = case.q, case.kv, case.meta
    wide = torch.zeros(3 * q.numel() + 1)
    exact = Extents(np.array([2]), np.array([32]))
    known = with_meta(case, extents=exact).meta
    narrow = with_meta(case, extents=exact, block_tables=meta.block_tables[:, :1].contiguous()).meta
    refused = [
        ((q.mT.contiguous().mT, kv, meta, 0.25), "q must be contiguous"),
        ((wide[1 : q.numel() + 1].view_as(q), kv, meta, 0.25), "q must begin at a multiple of 16 bytes"),
        ((q.double(), kv.double(), meta, 0.25), "q must be float32, bfloat16 or float16"),
        ((q[..., :4].contiguous(), kv, meta, 0.25), "heads of 8 to 256 elements"),
        ((q, kv, meta, -1.0), r"scale must be a positive number, got -1\.0"),
        ((q, kv, meta, 0.25, 0), "window must be at least 1 or None, got 0"),
        ((q, kv, meta, 0.25, None, 0.0), r"softcap must be a positive number or None, got 0\.0"),
        ((q, kv.mT.contiguous().mT, meta, 0.25), "each block of kv must be contiguous"),
        ((q, kv.bfloat16(), known, 0.25), "kv must have q's dtype torch.float32, got torch.bfloat16"),
        ((q, kv.mT.contiguous().mT, known, 0.25), "each block of kv must be contiguous"),
        ((q[:, :3].contiguous(), kv, known, 0.25), "a G that divides 3"),
        ((q, kv, known, 0.25, 0), "window must be at least 1 or None, got 0"),
        ((q, kv, known, 0.25, None, -1.0), "softcap must be a positive number or None"),
        ((q, kv, narrow, 0.25), "block_tables must be wide enough for 32 positions, got 16"),
        ((q[:1], kv, known, 0.25), "must be of q's 1 rows"),
        ((q, torch.empty(5, 2, 2, 48, 16), known, 0.25), "16, 32 or 64 positions on a GPU, got 48"),
    ]
    for args, message in refused:
        with pytest.raises(ValueError, match=message):
            attention.paged_attention(*args)
    with pytest.raises(ValueError, match="at most 128 heads per KV head, got 129 / 1"):
        attend(paged([1], [3], heads=129, kv_heads=1))
    wrong = Extents(np.array([2, 1]), np.array([32, 1]))
    with pytest.raises(ValueError, match="extents must be lengths and ends of 1 segments"):
        attend(with_meta(case, extents=wrong))
