"""Real weights, where the test data is at hand: every recorded greedy generation comes back exactly."""

import json
from pathlib import Path

import pytest
import torch

from engine.models import load_model
from tests.models.harness import PagedHarness, converse, speak


@pytest.mark.parametrize("chunk", [10**9, 17], ids=["whole prompts", "17 tokens a step"])
def test_recorded_generations_come_back_token_for_token(test_data: Path, chunk: int) -> None:
    folder = test_data / "models" / "stories260k"
    cases = json.loads((folder / "reference_generations.json").read_text())["cases"]
    assert sum(len(case["turns"]) for case in cases) > len(cases), "some conversations have several turns"

    speakers = []
    for conversation, case in enumerate(cases):
        turns = [turn["append_ids"] for turn in case["turns"]]
        lengths = [len(turn["generated_ids"]) for turn in case["turns"]]
        speakers.append(speak(conversation, turns, lengths, chunk))
    replies = converse(PagedHarness(load_model(folder, torch.float32)), *speakers)
    for case, reply in zip(cases, replies, strict=True):
        assert reply == [turn["generated_ids"] for turn in case["turns"]], case["name"]
