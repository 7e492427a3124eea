"""What a decoding step is said to read, which its time is judged by."""

import pytest

from tests.models.config_files import SIZES, read
from tools.bench_decode import weight_bytes

HIDDEN, FFN, VOCAB, LAYERS = (
    SIZES[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gated_model_reads_three_matrices_per_mlp_and_its_head_once(tmp_path, tied):
    model = read(tmp_path, {"tie_word_embeddings": tied})
    assert weight_bytes(model) == 2 * (LAYERS * (4 * HIDDEN**2 + 3 * FFN * HIDDEN) + VOCAB * HIDDEN)


def test_an_opt_reads_two_and_the_projections_of_its_narrow_embedding_but_no_table_of_positions(tmp_path):
    model = read(tmp_path, {"ffn_dim": 32, "word_embed_proj_dim": 48}, "OPTForCausalLM")
    assert weight_bytes(model) == 2 * (
        LAYERS * (4 * HIDDEN**2 + 2 * 32 * HIDDEN) + VOCAB * 48 + 2 * 48 * HIDDEN
    )
