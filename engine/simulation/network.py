"""Networks between ranks: what messages and reductions take, and what attention sends over them."""

import math
from dataclasses import dataclass

from engine.simulation.profiles import ModelShape

LSE_BYTES = 4
"""Of a head's log-sum-exp, float32."""


@dataclass(frozen=True, slots=True)
class Link:
    """One way of going from one GPU to another; rates are of one direction."""

    bytes_per_s: float
    message_s: float  # of one message, whatever its size
    reduce_start_s: float  # of an all-reduce, once
    reduce_hop_s: float  # and for each hop of it

    def seconds(self, num_bytes: float, num_messages: int = 1) -> float:
        return num_messages * self.message_s + num_bytes / self.bytes_per_s


# NVLink 3 of an A100.  Effective rate: NCCL's maintainers on nccl-tests issue 149 ("~230 GB/s" of 300).
# A message: NCCL's table for its Simple protocol, which point-to-point uses, 8.4 + 3.4 us over NVLink
# (src/graph/tuning.cc).  All-reduces are small here and use its LL protocol: 6.8 us and 0.6 us a hop.
NVLINK_3 = Link(230e9, 11.8e-6, 6.8e-6, 0.6e-6)
# NVLink 4 of an H100 or H200: 376 GB/s one way from GPU to GPU (nccl issue 1264, p2pBandwidthLatencyTest).
NVLINK_4 = Link(376e9, 11.8e-6, 6.8e-6, 0.6e-6)
# HDR, an adapter for each GPU: 96 of 100 GB/s with four of them (nccl-tests issue 119).  A message of up to
# 8 KiB takes 31 us, host to host (nccl-tests issue 214, sendrecv_perf).  NCCL's table: 5 us a hop of a tree;
# it foresees 16.8 us of an all-reduce between two nodes with a GPU each, measured were 19 (issue 150).
INFINIBAND_HDR = Link(24e9, 31e-6, 6.8e-6, 5.0e-6)
# NDR, 400 Gbit/s: the same share of the line rate as HDR; latencies are taken to be the same.
INFINIBAND_NDR = Link(48e9, 31e-6, 6.8e-6, 5.0e-6)
# 125 MB/s between nodes, as in the evaluation of Infinite-LLM.  A message: half of 67 us, which is what a
# round trip through Gloo takes over loopback, and as much again for adapters and a switch: an assumption.
# A hop of an all-reduce is such a message.
ETHERNET_1G = Link(125e6, 67e-6, 6.8e-6, 67e-6)
# 100 Gbit/s of TCP at the share of its line rate that HDR reaches; latency of TCP as above.
ETHERNET_100G = Link(12e9, 67e-6, 6.8e-6, 67e-6)


@dataclass(frozen=True, slots=True)
class Network:
    """Nodes of some GPUs each."""

    name: str
    inside: Link
    between: Link
    gpus_per_node: int
    adapters_per_node: int = 1

    def link(self, node: int, other: int) -> Link:
        return self.inside if node == other else self.between

    def all_reduce(self, num_gpus: int) -> tuple[float, float]:
        """Seconds of one among so many GPUs, whatever its size, and the rate of its slowest link.

        NCCL's model of a tree: a chain through each node and a binary tree over nodes, up and down.  All
        adapters of a node carry it together (as in nccl-tests issue 119).
        """
        num_nodes = math.ceil(num_gpus / self.gpus_per_node)
        inside = min(num_gpus, self.gpus_per_node) - 1
        hops = inside * self.inside.reduce_hop_s + math.log2(num_nodes) * self.between.reduce_hop_s
        between = self.adapters_per_node * self.between.bytes_per_s
        slowest = min(self.inside.bytes_per_s, between if num_nodes > 1 else math.inf)
        return self.inside.reduce_start_s + 2 * hops, slowest


def networks(inside: Link, infiniband: Link) -> dict[str, Network]:
    """By name, around GPUs of one kind.  More than eight on NVLink alone is what NVL32 and NVL72 have.  Each
    GPU has its InfiniBand adapter; Ethernet is one for each node.
    """
    return {
        "nvlink": Network("NVLink among all", inside, inside, 1 << 20),
        "infiniband": Network("NVLink in nodes of 8, InfiniBand between", inside, infiniband, 8, 8),
        "ethernet-100g": Network(
            "NVLink in nodes of 8, 100 Gbit/s Ethernet between", inside, ETHERNET_100G, 8
        ),
        "ethernet-1g": Network("NVLink in nodes of 8, 1 Gbit/s Ethernet between", inside, ETHERNET_1G, 8),
    }


def query_bytes(shape: ModelShape) -> int:
    """Of one token in one layer, to each holder."""
    return shape.num_heads * shape.head_dim * shape.bytes_per_value


def partial_bytes(shape: ModelShape) -> int:
    """Of one token in one layer, from each holder: output and log-sum-exp."""
    return query_bytes(shape) + shape.num_heads * LSE_BYTES
