"""The dtype that is chosen when nobody has said."""

import pytest
import torch

from engine.models import dtype
from engine.models.dtype import default_dtype


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512f", "avx512_bf16"}, torch.bfloat16),
        ({"avx2", "avx512f", "amx_bf16", "amx_tile"}, torch.bfloat16),
        ({"avx2", "avx512f", "avx512vl"}, torch.float32),
        (set(), torch.float32),
    ],
    ids=["AVX512_BF16", "AMX", "AVX-512 alone", "nothing known"],
)
def test_bfloat16_is_chosen_where_the_cpu_multiplies_it(
    flags: set[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtype, "cpu_flags", lambda: frozenset(flags))
    assert default_dtype("cpu") == expected
    assert default_dtype("cuda") == torch.bfloat16
