"""The device that the tests run on."""

from pathlib import Path

import pytest
import torch

from tests.engine.tiny_model import write_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on", choices=("cuda", "cpu"), default="cuda", help="where the engine under test runs")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    chosen: str = request.config.getoption("--on", default="cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return chosen


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float32, whose attention decides what it says."""
    made = tmp_path_factory.mktemp("tiny")
    write_model(made)
    return made
