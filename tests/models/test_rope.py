"""Angles of rotary embedding: the published formulas, at every position, however the table has grown."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import InvariantError
from engine.models.config import Llama3Scaling
from engine.models.rope import RopeTable, inverse_frequencies


def test_llama3_scaling_is_that_of_transformers() -> None:
    named = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 8192, **named}
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, head_dim=128, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config)

    scaled = inverse_frequencies(128, 500000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192))
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=0)
    slowed = inverse_frequencies(128, 500000.0, None) / scaled
    assert slowed[0] == 1 and slowed[-1] == 32 and ((slowed > 2) & (slowed < 31)).any(), "all bands occur"


def test_a_table_grown_on_demand_holds_what_one_made_at_once_does() -> None:
    frequencies = inverse_frequencies(64, 10000.0, None)
    grown, at_once = RopeTable(frequencies, 10000), RopeTable(frequencies, 10000)
    assert len(grown.upto(1)) < 10000
    for needed in (4096, 4097, 9000, 10000):
        assert needed <= len(grown.upto(needed)) <= 10000
    assert torch.equal(grown.upto(10000), at_once.upto(10000))
    angle = 9999.0 * frequencies
    assert torch.equal(grown.upto(10000)[9999], torch.cat((angle.cos(), angle.sin())))


def test_a_position_beyond_the_model_is_never_looked_up() -> None:
    table = RopeTable(inverse_frequencies(64, 10000.0, None), 100)
    with pytest.raises(InvariantError, match="position 100 asked of a model of 100"):
        table.upto(101)
