"""Conversations through the CUDA engine's runner, all kernels in Triton's interpreter, are told what the CPU
engine tells.
"""

import dataclasses

import pytest
import torch

from engine.models import load_model
from engine.models.decoder import Decoder
from engine.types import SamplingParams
from kernels import dispatch
from tests.cuda.engines import cpu_core, cuda_core, replies
from tests.engine.tiny_model import write_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
WARM = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, max_tokens=2)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder)
    return load_model(folder, torch.float32)


@pytest.mark.parametrize(
    ("sampling", "run_ahead", "warm"),
    [
        (GREEDY, 0, False),
        (WARM, 1, False),
        pytest.param(GREEDY, 1, True, marks=pytest.mark.heavy),
        pytest.param(WARM, 0, True, marks=pytest.mark.heavy),
    ],
)
def test_conversations_are_told_what_the_cpu_engine_tells(
    decoder: Decoder, sampling: SamplingParams, run_ahead: int, warm: bool
) -> None:
    with dispatch.use("torch"):
        wanted = replies(cpu_core(decoder), 0, 2, 2, sampling)
    core = cuda_core(decoder, warm=warm)
    assert replies(core, run_ahead, 2, 2, sampling) == wanted


def test_three_conversations_suspend_each_other(decoder: Decoder) -> None:
    sampling = dataclasses.replace(GREEDY, max_tokens=3)
    with dispatch.use("torch"):
        wanted = replies(cpu_core(decoder), 0, 3, 1, sampling)
    core = cuda_core(decoder, num_blocks=6)
    assert replies(core, 1, 3, 1, sampling) == wanted
