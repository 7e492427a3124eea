"""Paged attention: the torch reference against a loop over keys, native builds against the reference."""

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.merge_state import merge_state
from kernels.paged_attention import AttnMeta, paged_attention, paged_attention_ref
from tests.kernels.cases import DTYPES, Paged, assert_within_noise, builds, needs_native, paged

# heads, kv heads, size, slots, window, soft cap, share of lost blocks: every value that matters occurs, not
# every pair
Shape = tuple[int, int, int, int, int | None, float | None, float]
SHAPES: list[Shape] = [
    (2, 2, 64, 32, None, None, 0.0),
    (4, 2, 16, 16, None, None, 0.2),
    (8, 2, 128, 64, None, None, 0.0),
    (14, 2, 64, 32, None, None, 0.1),
    (8, 1, 80, 32, None, None, 0.0),
    (4, 4, 8, 16, None, None, 0.3),
    (4, 2, 64, 32, 100, None, 0.0),
    (7, 1, 80, 16, 7, None, 0.2),
    (8, 1, 128, 64, 600, None, 0.3),
    (4, 4, 96, 32, 33, None, 0.1),
    (4, 2, 256, 32, None, 50.0, 0.0),
    (2, 1, 256, 16, 100, 2.0, 0.2),
    (6, 2, 24, 64, None, 0.5, 0.3),
]


@pytest.fixture
def poisoned_memory() -> object:
    """Fresh tensors are full of NaN, so an element a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def attend(case: Paged, window: int | None = None, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    return paged_attention(case.q, case.kv, case.meta, case.scale, window, softcap)


def one_by_one(case: Paged, window: int | None, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The contract read aloud, in float64: row by row, head by head, key by key."""
    q, kv, meta = case.q.double(), case.kv.double(), case.meta
    slots, group = kv.shape[3], q.shape[1] // kv.shape[2]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for segment, (begin, end) in enumerate(zip(meta.q_indptr[:-1], meta.q_indptr[1:], strict=True)):
        for row in range(begin, end):
            position = int(meta.positions[row])
            low = 0 if window is None else max(0, position - window + 1)
            table = meta.block_tables[segment]
            at = [(int(table[p // slots]), p % slots) for p in range(low, position + 1)]
            at = [(block, offset) for block, offset in at if block >= 0]
            for head in range(q.shape[1]) if at else ():
                keys, values = (
                    torch.stack([kv[b, which, head // group, o] for b, o in at]) for which in (0, 1)
                )
                scores = keys @ q[row, head] * case.scale
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                out[row, head], lse[row, head] = scores.softmax(0) @ values, scores.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 9])
def test_the_reference_does_what_the_contract_says(window: int | None, softcap: float | None) -> None:
    case = paged([5, 1, 20], [0, 40, 17], holes=0.3).to(torch.float64)
    out, lse = paged_attention_ref(case.q, case.kv, case.meta, case.scale, window, softcap)
    expected_out, expected_lse = one_by_one(case, window, softcap)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_build_agrees_with_float64(shape: Shape, dtype: torch.dtype, poisoned_memory: object) -> None:
    heads, kv_heads, size, slots, window, softcap, holes = shape
    case = paged(
        [5, 1, 33, 129, 1],
        [0, 700, 100, 470, 0],
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        slots=slots,
        holes=holes,
    ).to(dtype)
    for _ in builds():
        for which in (0, 1):
            assert_within_noise(
                attend(case, window, softcap)[which],
                lambda q, kv, which=which: paged_attention_ref(q, kv, case.meta, case.scale, window, softcap)[
                    which
                ],
                case.q,
                case.kv,
            )


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [2, 14])
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype, heads: int) -> None:
    case = paged([40, 1, 70], [0, 1100, 500], heads=heads, size=64, slots=32, holes=0.1).to(dtype)
    for _ in builds():
        for window, softcap in ((None, None), (90, None), (None, 3.0)):
            together = attend(case, window, softcap)
            for segment, begin, end in (
                (0, 39, 40),
                (0, 7, 30),
                (1, 0, 1),
                (2, 0, 1),
                (2, 69, 70),
                (2, 3, 68),
            ):
                alone = attend(case.rows(segment, begin, end), window, softcap)
                start = int(case.meta.q_indptr[segment])
                for whole, part in zip(together, alone, strict=True):
                    assert torch.equal(whole[start + begin : start + end], part), (segment, begin, end)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_that_share_one_row_do_not_change_its_bits(dtype: torch.dtype) -> None:
    case = paged([3], [2500], heads=2, kv_heads=1, size=64, slots=32).to(dtype)
    threads = torch.get_num_threads()
    for _ in builds():
        results = []
        for count in (
            1,
            2,
            3,
        ):  # one item and six chunks: with more than one thread each chunk is its own item
            torch.set_num_threads(count)
            try:
                results.append(attend(case.rows(0, 0, 3)))
            finally:
                torch.set_num_threads(threads)
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@needs_native
def test_segments_may_share_blocks() -> None:
    case = paged([1, 1], [90, 90], slots=32)
    shared = case.with_tables(case.meta.block_tables[:1].repeat(2, 1))
    shared.q[1] = shared.q[0]
    for _ in builds():
        for window in (None, 40):
            out, lse = attend(shared, window)
            assert torch.equal(out[0], out[1]) and torch.equal(lse[0], lse[1])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_before_every_window_may_be_lost_or_not_a_number(dtype: torch.dtype) -> None:
    case = paged([1, 40], [1100, 130], size=64, slots=32).to(dtype)
    window = 50
    lost = case.meta.block_tables.clone()
    for segment, cached in enumerate([1100, 130]):
        unseen = (cached - window + 1) // 32
        assert unseen > 1
        case.kv[lost[segment, 0]] = torch.nan
        lost[segment, 1:unseen] = -1
    for _ in builds():
        for whole, part in zip(attend(case, window), attend(case.with_tables(lost), window), strict=True):
            assert whole.isfinite().all() and torch.equal(whole, part)
    with dispatch.use("torch"):
        for whole, part in zip(attend(case, window), attend(case.with_tables(lost), window), strict=True):
            assert whole.isfinite().all() and torch.equal(whole, part)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_soft_cap_holds_for_scores_beyond_any_exponential(dtype: torch.dtype) -> None:
    case = paged([2], [300], size=64, slots=32).to(dtype)
    case.q.mul_(1e4)
    for _ in builds():
        assert_within_noise(
            attend(case, softcap=2.0)[0],
            lambda q, kv: paged_attention_ref(q, kv, case.meta, case.scale, None, 2.0)[0],
            case.q,
            case.kv,
        )


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_are_zero_and_minus_infinity(dtype: torch.dtype, poisoned_memory: object) -> None:
    case = paged([3, 0, 2], [600, 7, 30], holes=0.0).to(dtype)
    tables = case.meta.block_tables.clone()
    tables[0] = -1
    for _ in builds():
        out, lse = attend(case.with_tables(tables))
        assert (out[:3] == 0).all() and (lse[:3] == -torch.inf).all()
        assert out[3:].isfinite().all() and lse[3:].isfinite().all()


@needs_native
def test_a_step_without_rows_gives_nothing() -> None:
    case = paged([0], [20])
    for _ in builds():
        out, lse = attend(case)
        assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partial_results_over_any_split_merge_into_the_whole(dtype: torch.dtype) -> None:
    case = paged([4, 1], [150, 680], size=64, slots=32).to(dtype)
    tables = case.meta.block_tables
    owner = torch.randint(0, 3, tables.shape)
    for _ in builds():
        merged = torch.zeros_like(case.q), torch.full(case.q.shape[:2], -torch.inf)
        for rank in (2, 0, 1, 3):  # 3 owns nothing
            part = attend(case.with_tables(tables.where(owner == rank, -1)))
            merged = merge_state(*merged, *part)
        for which in (0, 1):
            assert_within_noise(
                merged[which],
                lambda q, kv, which=which: paged_attention_ref(q, kv, case.meta, case.scale)[which],
                case.q,
                case.kv,
            )


@needs_native
def test_not_a_number_in_a_key_that_is_seen_reaches_the_result() -> None:
    case = paged([2], [30], slots=32)
    case.kv[case.meta.block_tables[0, 0], 0, 0, 31] = (
        torch.nan
    )  # position 31, KV head 0: the second row sees it
    for _ in builds():
        out, lse = attend(case)
        assert out[0].isfinite().all() and lse[0].isfinite().all()
        assert out[1, :2].isnan().all() and lse[1, :2].isnan().all()
        assert out[1, 2:].isfinite().all()


@needs_native
def test_blocks_may_lie_apart_as_in_a_slab_of_all_layers() -> None:
    case = paged([6, 1], [50, 90])
    slab = torch.full((case.kv.shape[0], 3, *case.kv.shape[1:]), torch.nan)
    slab[:, 1] = case.kv
    apart = Paged(case.q, slab[:, 1], case.meta)
    for _ in builds():
        for a, b in zip(attend(case), attend(apart), strict=True):
            assert torch.equal(a, b)


@needs_native
def test_blocks_beyond_two_to_the_31_elements_are_reached() -> None:
    case = paged([1], [20]).to(torch.bfloat16)
    blocks = 2**31 // case.kv[0].numel() + 1
    far = torch.empty(
        blocks, *case.kv.shape[1:], dtype=torch.bfloat16
    )  # only the pages below are ever touched
    tables = case.meta.block_tables.clone()
    for index in (0, 1):
        far[blocks - 1 - index] = case.kv[tables[0, index]]
        tables[0, index] = blocks - 1 - index
    moved = Paged(case.q, far, case.with_tables(tables).meta)
    for _ in builds():
        for a, b in zip(attend(case), attend(moved), strict=True):
            assert torch.equal(a, b)


def tensor(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@needs_native
def test_arguments_that_do_not_fit_are_refused_with_their_values() -> None:
    case = paged([2], [30])
    q, kv, meta = case.q, case.kv, case.meta
    wide = tensor(*meta.block_tables[0].tolist())[None]

    def with_meta(**changes: Tensor) -> tuple[Tensor, Tensor, AttnMeta]:
        fields = {
            name: getattr(meta, name)
            for name in ("q_indptr", "first_pos", "block_tables", "positions", "slots")
        }
        return q, kv, AttnMeta(**(fields | changes))

    refused: list[tuple[tuple[Tensor, Tensor, AttnMeta], int | None, str]] = [
        ((q, kv.bfloat16(), meta), None, "kv must have q's dtype torch.float32, got torch.bfloat16"),
        ((q[:, :3].contiguous(), kv, meta), None, "a G that divides 3"),
        ((q, kv, meta), 0, "window must be at least 1 or None, got 0"),
        ((q, kv.mT.contiguous().mT, meta), None, "each block of kv must be contiguous"),
        (with_meta(q_indptr=tensor(0, 1)), None, r"q_indptr must ascend from 0 to 2 rows, got \[0, 1\]"),
        (with_meta(first_pos=tensor(29)), None, "positions must ascend by one from first_pos"),
        (with_meta(block_tables=wide[:, :1].contiguous()), None, "must be 2 wide for position 31, got 1"),
        (with_meta(block_tables=wide.clamp_min(99)), None, "block_tables names block 99, kv has 5"),
    ]
    for _ in builds():
        for args, window, message in refused:
            with pytest.raises(ValueError, match=message):
                paged_attention(*args, 0.25, window)
        with pytest.raises(ValueError, match=r"softcap must be a positive number or None, got 0\.0"):
            paged_attention(q, kv, meta, 0.25, softcap=0.0)


def test_meta_of_another_dtype_is_refused_by_name() -> None:
    meta = paged([2], [30]).meta
    with pytest.raises(ValueError, match="positions must be contiguous torch.int64"):
        AttnMeta(meta.q_indptr, meta.first_pos, meta.block_tables, meta.positions.int(), meta.slots)
