"""The tiny real model, once per kind of kernels.  Imports wait until a test asks for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from engine.models.decoder import Decoder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.engine.tiny_model import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture(params=["native", "torch"])
def decoder(request: pytest.FixtureRequest, tiny_model_folder: Path) -> "Iterator[Decoder]":
    import torch

    from engine.models import load_model
    from kernels import dispatch
    from kernels.native.build import BuildError

    try:
        with dispatch.use(request.param):
            yield load_model(tiny_model_folder, torch.float32)
    except BuildError as error:
        pytest.skip(f"the native kernels cannot be built here: {error}")
