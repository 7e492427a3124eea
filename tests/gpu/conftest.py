"""The device that the tests run on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import loader
from tests.engine.tiny_model import COSTS, write_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--on", choices=("gpu", "virtual"), default="gpu", help="where the engine under test runs"
    )


@pytest.fixture(scope="session")
def is_virtual(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--on", default="gpu") == "virtual")


@pytest.fixture(scope="session", autouse=True)
def device(is_virtual: bool) -> Iterator[str]:
    """`cuda`, which may be a virtual one.  Reloading is the cheaper way, as for larger models."""
    if not is_virtual and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "_costs", lambda *_: (COSTS, "as told"))
        if is_virtual:
            _make_virtual(patch)
        yield "cuda"


def _make_virtual(patch: pytest.MonkeyPatch) -> None:
    from engine.cuda import parts
    from tests.cuda.virtual_device import VirtualDevice

    patch.setattr(loader, "with_device", lambda config: config)
    patch.setattr(parts, "TorchDevice", lambda torch_device: VirtualDevice(free_bytes=8 << 30))
    patch.setattr(parts, "gpu_machine", lambda: "a virtual GPU")
    patch.setattr(parts, "gpu_kernels", lambda: "stand-ins")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float32, whose attention decides what it says."""
    made = tmp_path_factory.mktemp("tiny")
    write_model(made)
    return made
