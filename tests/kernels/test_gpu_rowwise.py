"""Steps of any number of rows launch forms of the row kernels that were compiled for other steps: nothing is
compiled while serving.
"""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which is for Linux on x86-64", exc_type=ImportError)

from kernels import dispatch  # noqa: E402
from kernels.gpu import gather  # noqa: E402
from kernels.gpu.launch import Launch  # noqa: E402
from kernels.paged_attention import AttnMeta  # noqa: E402
from kernels.rms_norm import add_rms_norm, rms_norm  # noqa: E402
from kernels.rope import HeadNorms, rope_kv_write  # noqa: E402
from kernels.silu_mul import gelu_mul, silu_mul  # noqa: E402
from tests.kernels.launches import compiled_for, specialised  # noqa: E402

HIDDEN, HEADS, KV_HEADS, SIZE = 896, 14, 2, 64
Recorded = list[tuple[Launch, tuple[int, ...], tuple[object, ...]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """What would have been launched."""
    launches: Recorded = []
    monkeypatch.setattr(Launch, "__call__", lambda self, grid, *args: launches.append((self, grid, args)))
    return launches


def compute(rows: int) -> None:
    """All that a step of so many rows asks of the row kernels, its places anywhere in their memory."""
    x = torch.zeros(rows, HIDDEN, dtype=torch.bfloat16)
    for weight in (x.new_ones(HIDDEN), x.new_ones(HIDDEN, dtype=torch.float32)):
        rms_norm(x, weight, 1e-6)
        add_rms_norm(x, x, weight, 1e-6)
    silu_mul(x)
    gelu_mul(x)
    fused = torch.zeros(rows, HEADS + 2 * KV_HEADS, SIZE, dtype=torch.bfloat16)
    q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    kv = torch.zeros(3, 2, KV_HEADS, 32, SIZE, dtype=torch.bfloat16)
    zeros = torch.zeros(rows + 1, dtype=torch.int64)[1:]
    bounds, table = torch.tensor([0, rows], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    meta = AttnMeta(bounds, bounds[:1], table, zeros, zeros)
    for norms in (None, HeadNorms(kv.new_ones(SIZE), kv.new_ones(SIZE), 1e-6)):
        for cos_sin in (None, torch.zeros(7, SIZE)):
            rope_kv_write(q, k, v, cos_sin, kv, meta, norms)
    slab = torch.zeros(4096, dtype=torch.uint8)
    gather.copy_pieces(slab, slab, zeros, zeros, 256)


def test_any_number_of_rows_launches_the_same_forms(recorded: Recorded) -> None:
    with dispatch.use("triton"):
        compute(1)
        forms = [launch for launch, _, _ in recorded]
        for rows in (2, 16, 17, 1000):
            recorded.clear()
            compute(rows)
            assert all(launch is form for (launch, _, _), form in zip(recorded, forms, strict=True))
            for launch, _, args in recorded:
                assert specialised(launch, *args) == compiled_for(launch), launch.name
    assert len(forms) == 11 and len({form.name for form in forms}) == 11


def test_a_step_without_rows_launches_no_program(recorded: Recorded) -> None:
    with dispatch.use("triton"):
        compute(0)
    assert all(0 in grid for _, grid, _ in recorded) and len(recorded) == 11
