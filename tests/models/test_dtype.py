"""The dtype that is chosen when nobody has said."""

from pathlib import Path

import pytest
import torch

from engine.models.dtype import default_dtype


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_bf16", torch.bfloat16),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile", torch.bfloat16),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512vl", torch.float32),
        ("Features\t: fp asimd bf16", torch.float32),
    ],
    ids=["AVX512_BF16", "AMX", "AVX-512 alone", "not x86"],
)
def test_bfloat16_is_chosen_where_the_cpu_multiplies_it(
    tmp_path: Path, flags: str, expected: torch.dtype
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\nbugs\t\t: spectre\n")
    assert default_dtype("cpu", tmp_path / "cpuinfo") == expected


def test_float32_is_chosen_where_nothing_is_known_of_the_cpu(tmp_path: Path) -> None:
    assert default_dtype("cpu", tmp_path / "absent") == torch.float32
