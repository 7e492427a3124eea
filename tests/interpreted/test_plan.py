"""The plan kernel against its twin in numpy, and what plans promise to attention and merge."""

from itertools import accumulate

import numpy as np
import pytest
import torch

from kernels.gpu import plan as plan_module
from kernels.gpu.plan import Tiling, bounds, plan, plan_ref
from kernels.paged_attention import AttnMeta, Extents

TILINGS = [Tiling(4, 16, 32, 64), Tiling(2, 9, 18, 128), Tiling(16, 64, 128), Tiling(1, 1, 2)]
Segments = list[tuple[int, int]]  # rows, positions before them


def meta_of(segments: Segments, *, tables: list[int] | None = None, spare: int = 0) -> AttnMeta:
    """`tables`: each segment's row of block tables; `spare`: rows at the end that belong to no segment."""
    lengths, first = [n for n, _ in segments], [c for _, c in segments]
    rows = sum(lengths) + spare
    return AttnMeta(
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        torch.tensor(first, dtype=torch.int32),
        torch.zeros(len(segments) if tables is None else max(tables) + 1, 4, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int64),
        torch.full((rows,), -1),
        None if tables is None else torch.tensor(tables, dtype=torch.int32),
        extents_of(segments),
    )


def extents_of(segments: Segments) -> Extents:
    return Extents(np.array([n for n, _ in segments]), np.array([n + c for n, c in segments]))


def twin(meta: AttnMeta, tiling: Tiling, window: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = None if meta.table_rows is None else meta.table_rows.numpy()
    return plan_ref(meta.q_indptr.numpy(), meta.first_pos.numpy(), rows, tiling, window)


def random_segments(draw: np.random.Generator, most: int) -> Segments:
    """Of every kind, also empty ones."""
    lengths = draw.choice([0, 1, 1, 1, 2, 4, 5, 17, 33, 70, 129, 257, 600], draw.integers(1, most + 1))
    return [(int(n), int(draw.choice([0, 1, 63, 64, 500, 1999, 40_000]) + draw.integers(3))) for n in lengths]


def assert_kernel_is_twin(meta: AttnMeta, tiling: Tiling, window: int | None) -> None:
    made, (items, limits, merges) = plan(meta, meta.extents, tiling, window), twin(meta, tiling, window)
    assert made.limits.tolist() == limits.tolist()
    np.testing.assert_array_equal(made.items[: limits[3]].numpy(), items)
    np.testing.assert_array_equal(made.merges[: limits[4]].numpy(), merges)


@pytest.mark.parametrize("window", [None, 1, 64, 700])
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_the_kernel_makes_the_twins_items(tiling: Tiling, window: int | None) -> None:
    draw = np.random.default_rng(tiling.chunk + (window or 0))
    for _ in range(4):
        segments = random_segments(draw, 9)
        tables = draw.integers(0, 3, len(segments)).tolist() if draw.integers(2) else None
        assert_kernel_is_twin(meta_of(segments, tables=tables, spare=2), tiling, window)


def test_sums_go_beyond_what_a_program_looks_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_BLOCK", 16)
    draw, tiling = np.random.default_rng(0), Tiling(2, 9, 18, 192)  # a tiling that no other test caches
    segments = random_segments(draw, 9) + random_segments(draw, 9) + [(1, 40)] * 16 + random_segments(draw, 9)
    assert_kernel_is_twin(meta_of(segments), tiling, None)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_items_see_every_key_of_every_row_once_and_slots_are_no_ones_else(tiling: Tiling) -> None:
    draw = np.random.default_rng(tiling.long)
    for window in (None, 1, 90, 1000):
        segments = [(n, c % 3000) for n, c in random_segments(draw, 6)]
        meta = meta_of(segments)
        items, limits, merges = twin(meta, tiling, window)
        covered = [np.zeros(n + c, dtype=np.int64) for n, c in segments for _ in range(n)]
        owner = {int(row): (int(base), int(base + count)) for row, base, count, _ in merges}
        slots: set[int] = set()
        for row, count, position, low, high, _, slot, stride in items.tolist():
            for at in range(count):
                covered[row + at][low : min(high, position + at + 1)] += 1
                if slot >= 0:
                    mine = slot + at * stride
                    assert mine not in slots and owner[row + at][0] <= mine < owner[row + at][1]
                    slots.add(mine)
                else:
                    assert row + at not in owner
        assert slots == set(range(len(slots))) and len(slots) == sum(merges[:, 2])
        for row, keys in enumerate(covered):
            segment = int(np.searchsorted(meta.q_indptr.numpy(), row, side="right")) - 1
            position = segments[segment][1] + row - int(meta.q_indptr[segment])
            first = 0 if window is None else max(0, position - window + 1)
            assert (keys[first : position + 1] == 1).all() and (keys <= 1).all()
        assert (np.diff(limits[:4]) >= 0).all()


def test_a_segments_items_are_the_same_alone_and_in_any_company() -> None:
    draw = np.random.default_rng(5)
    for tiling in TILINGS:
        segments = random_segments(draw, 8)
        meta = meta_of(segments)
        together = twin(meta, tiling, 300)[0]
        for index, segment in enumerate(segments):
            alone = twin(meta_of([segment]), tiling, 300)[0]
            mine = together[together[:, 5] == index]
            np.testing.assert_array_equal(mine[:, 1:5], alone[:, 1:5])
            np.testing.assert_array_equal(mine[:, 0] - int(meta.q_indptr[index]), alone[:, 0])
            np.testing.assert_array_equal(mine[:, 7], alone[:, 7])


@pytest.mark.parametrize("window", [None, 1, 100, 513])
def test_bounds_are_exact_but_for_a_chunk_of_a_window(window: int | None) -> None:
    draw = np.random.default_rng(window or 0)
    for tiling in TILINGS:
        for _ in range(20):
            segments = random_segments(draw, 8)
            _, limits, merges = twin(meta_of(segments), tiling, window)
            most = bounds(extents_of(segments), tiling, window)
            held = (*np.diff(limits[:4]).tolist(), int(merges[:, 2].sum()), int(limits[4]))
            least = (*most.items, most.partials, most.merges)
            if window is None:
                assert least == held
            else:
                assert all(a >= b for a, b in zip(least, held, strict=True))


def test_bounds_hold_for_short_segments_that_turn_out_shorter_empty_or_earlier() -> None:
    draw = np.random.default_rng(1)
    tiling = TILINGS[0]
    for window in (None, 40, 200):
        for _ in range(40):
            promised = [(int(n), 2000) for n in draw.integers(1, 5, 5)]
            most = bounds(extents_of(promised), tiling, window)
            came = [(int(draw.integers(0, n + 1)), int(draw.integers(0, c + 1))) for n, c in promised]
            _, limits, merges = twin(meta_of(came), tiling, window)
            assert limits[1] <= most.items[0] and limits[3] == limits[1]
            assert merges[:, 2].sum() <= most.partials and limits[4] <= most.merges


def test_long_segments_come_with_their_last_tile_first() -> None:
    items, _, _ = twin(meta_of([(600, 100)]), Tiling(4, 16, 32), None)
    assert items[:, 0].tolist() == list(range(0, 600, 32))[::-1]
    assert (items[:, 6] == -1).all() and (items[:, 3] == 0).all()


def test_tilings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="in ascending order"):
        Tiling(4, 2, 8)
    with pytest.raises(ValueError, match="multiple of 64, got 100"):
        Tiling(4, 8, 8, 100)
