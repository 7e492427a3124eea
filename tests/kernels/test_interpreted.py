"""The Triton kernels give what their references give, in Triton's interpreter."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests" / "interpreted").glob("test_*.py"))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is for Linux on x86-64")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("marked", ["not heavy", pytest.param("heavy", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file: Path, marked: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), "-m", marked],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if ended.returncode == 5 and marked == "heavy":
        pytest.skip(f"nothing in {file.name} is heavy")
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    assert re.search(r"\d+ passed", ended.stdout), ended.stdout
