"""What every test gets: its own seeds, repeatable hypothesis runs, and the way to the large real data."""

import os
import random
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import settings

# Derandomised: a test that passed here passes in CI. No deadline: these machines are shared.
settings.register_profile("continuo", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("continuo")


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of the CPU, and so are the servers that they start, unless those for GPUs are asked for."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def seeds(request: pytest.FixtureRequest) -> None:
    """Seed each test from its own name, so that the outcome depends neither on order nor on selection."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    if "numpy" in sys.modules:  # tests of integers alone need not wait for numpy and torch
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real traces, conversations, tokenizers and weights that CONTINUO_TEST_DATA names."""
    named = os.environ.get("CONTINUO_TEST_DATA")
    if not named:
        pytest.skip("CONTINUO_TEST_DATA names no folder of test data")
    folder = Path(named)
    assert (folder / "statistics.json").exists(), f"CONTINUO_TEST_DATA is {named}, which is not the test data"
    return folder
