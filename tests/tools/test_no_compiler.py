"""`continuo serve` on a machine without a C compiler: it serves, and says what is missing."""

import os
import shutil
import subprocess
import sys

import pytest

from kernels.native.build import supported
from tests.tools.conftest import ROOT


@pytest.mark.skipif(not supported(), reason="no native kernels for this CPU and system")
def test_the_banner_tells_that_a_compiler_is_missing_and_how_to_get_one(tmp_path, environment, talking_model):
    ignored = shutil.ignore_patterns("_build", "__pycache__")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignored)  # nothing is built there
    for room in ("engine", "rpc", "tools"):
        os.symlink(ROOT / room, tmp_path / room)
    (tmp_path / "programs").mkdir()
    (tmp_path / "tmp").mkdir()
    served = subprocess.run(
        [sys.executable, "-m", "tools.cli", "serve", talking_model, "--listen", "127.0.0.1:0", "--until-eof"],
        cwd=tmp_path,
        env={**environment, "PATH": str(tmp_path / "programs"), "TMPDIR": str(tmp_path / "tmp")},
        input="",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert served.returncode == 0, served.stderr
    (line,) = (line for line in served.stderr.splitlines() if "attention: " in line)
    assert line.endswith(
        "attention: torch (no C compiler found; "
        "for native kernels: apt install gcc, or dnf, pacman, apk; then start again)"
    )
