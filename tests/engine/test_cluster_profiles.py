"""Constants of a simulated cluster: what follows from them agrees with what others measured."""

import pytest

from engine.simulation.cluster_profiles import A100, LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, SETUPS
from engine.simulation.network import (
    ETHERNET_1G,
    INFINIBAND_HDR,
    NVLINK_3,
    Network,
    networks,
    partial_bytes,
    query_bytes,
)

NETWORKS = networks(NVLINK_3, INFINIBAND_HDR)


def test_shapes_have_the_published_sizes() -> None:
    sizes = [
        (shape.body_values + 2 * shape.head_values) / 1e9 for shape in (LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B)
    ]
    assert sizes == pytest.approx([6.74, 13.02, 68.98], abs=0.02)
    assert [shape.kv_bytes_per_token >> 10 for shape in (LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B)] == [
        512,
        800,
        320,
    ]


def test_a_step_of_one_token_takes_about_as_long_as_is_published() -> None:
    """gpt-fast's README: 104.9 tokens/s on one A100, 328 on eight."""
    setup = SETUPS["a100-7b"]
    for num_gpus, tokens_per_s, tolerance in ((1, 104.9, 0.01), (8, 328.43, 0.25)):
        costs = setup.instance(NETWORKS["nvlink"], num_gpus).costs
        assert 1 / (costs.fixed_s + costs.weights_s) == pytest.approx(tokens_per_s, rel=tolerance)


def test_an_instance_holds_what_its_memory_leaves() -> None:
    one = SETUPS["a100-7b"].instance(NETWORKS["nvlink"])
    assert one.kv_tokens == pytest.approx(111_600, rel=0.01)
    assert SETUPS["a100-7b"].instance(NETWORKS["nvlink"], 32).kv_tokens > 32 * one.kv_tokens
    # Eight KV heads over 32 GPUs: each head is there four times.
    alone = SETUPS["a100-70b"].instance(NETWORKS["nvlink"], 32)
    assert alone.kv_tokens == pytest.approx((32 * 0.9 * A100_BYTES - 138e9) / (4 * 327_680), rel=0.01)


A100_BYTES = 80e9


def test_an_all_reduce_between_two_nodes_takes_about_as_long_as_is_published() -> None:
    """19 us with one GPU in each of two nodes (nccl-tests issue 150)."""
    seconds, rate = Network("pairs", NVLINK_3, INFINIBAND_HDR, 1).all_reduce(2)
    assert seconds == pytest.approx(19e-6, rel=0.15)
    assert rate == INFINIBAND_HDR.bytes_per_s
    assert NETWORKS["nvlink"].all_reduce(8)[0] == pytest.approx(A100.all_reduce_s, rel=0.01)
    assert NETWORKS["nvlink"].all_reduce(8)[1] == NVLINK_3.bytes_per_s


def test_what_travels_is_a_query_and_a_partial() -> None:
    """Sizes of papers on DistAttention: 8 KiB, 10 KiB and 16 KiB of queries in each layer."""
    assert [query_bytes(shape) for shape in (LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B)] == [8192, 10240, 16384]
    assert partial_bytes(LLAMA_2_7B) == 8192 + 32 * 4
    assert ETHERNET_1G.seconds(0, 2) == 2 * ETHERNET_1G.message_s
    assert NETWORKS["ethernet-1g"].link(0, 1) is ETHERNET_1G
