"""Angles of rotary embedding: the published formulas, at every position, however the table has grown."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import InvariantError
from engine.models.fields import Fields
from engine.models.layer_attention import Rope
from engine.models.rope import RopeTable, inverse_frequencies
from engine.models.rope_scaling import LinearScaling, Llama3Scaling, Scaling, read_scaling

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "described",
    [
        {"rope_type": "linear", "factor": 8.0},
        {"rope_type": "dynamic", "factor": 8.0},
        {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        YARN,
        YARN | {"beta_fast": 20.0, "beta_slow": 3.0, "truncate": False},
        YARN | {"attention_factor": 1.25},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.4},
        YARN | {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    ],
    ids=["linear", "dynamic", "llama3", "yarn", "yarn blend", "yarn growth", "yarn mscale", "yarn step"],
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_scaled_angles_are_those_of_transformers(described: dict[str, Any], theta: float) -> None:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        head_dim=128,
        max_position_embeddings=32768,
        rope_parameters={**described, "rope_theta": theta},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[described["rope_type"]](config)
    rope = Rope(theta, read_scaling(Fields(Path("config.json"), described), 32768))
    torch.testing.assert_close(inverse_frequencies(128, rope), frequencies, rtol=1e-6, atol=0)

    angles = torch.arange(300.0)[:, None] * inverse_frequencies(128, rope)
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
    assert torch.equal(RopeTable(128, rope, 300).upto(300), expected)


@pytest.mark.parametrize(
    "scaling",
    [
        Llama3Scaling(32.0, 1.0, 4.0, 8192),
        read_scaling(Fields(Path("config.json"), YARN | {"factor": 32.0}), 4096),
    ],
    ids=["llama3", "yarn"],
)
def test_blended_scalings_have_all_three_bands(scaling: Scaling) -> None:
    slowed = inverse_frequencies(128, Rope(10000.0)) / inverse_frequencies(128, Rope(10000.0, scaling))
    assert slowed[0] == 1 and slowed[-1] == 32 and ((slowed > 2) & (slowed < 31)).any()


def test_a_table_grown_on_demand_holds_what_one_made_at_once_does() -> None:
    rope = Rope(10000.0, LinearScaling(2.0))
    grown, at_once = RopeTable(64, rope, 10000), RopeTable(64, rope, 10000)
    assert len(grown.upto(1)) < 10000
    for needed in (4096, 4097, 9000, 10000):
        assert needed <= len(grown.upto(needed)) <= 10000
    assert torch.equal(grown.upto(10000), at_once.upto(10000))
    angle = 9999.0 * inverse_frequencies(64, rope)
    assert torch.equal(grown.upto(10000)[9999], torch.cat((angle.cos(), angle.sin())))


def test_a_position_beyond_the_model_is_never_looked_up() -> None:
    table = RopeTable(64, Rope(10000.0), 100)
    with pytest.raises(InvariantError, match="position 100 asked of a model of 100"):
        table.upto(101)
