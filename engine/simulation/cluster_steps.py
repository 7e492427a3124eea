"""What a step of one rank takes when some of the KV that it attends to lies on other ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.simulation.cluster_profiles import Instance
from engine.simulation.network import Link, partial_bytes, query_bytes


@dataclass(slots=True)
class Part:
    """One request's share of a step: `num_new` tokens that end at position `end`."""

    num_new: int
    end: int
    remote: Mapping[int, int]  # tokens of its KV on each other rank


@dataclass(slots=True)
class StepTime:
    seconds: float = 0.0
    service_s: dict[int, float] = field(default_factory=dict)  # of attention, for each rank that is asked
    messages: int = 0
    wire_bytes: int = 0


def step_time(instance: Instance, parts: Sequence[Part], links: Mapping[int, Link]) -> StepTime:
    """DistAttention: in each layer queries go out, each holder attends to what it keeps while the home
    attends to the rest, and one partial comes back from each; all rows of a step share the messages.

    `links`: from the home to each rank that is asked.
    """
    costs, shape = instance.costs, instance.shape
    num_layers, per_token = costs.num_layers, query_bytes(shape) + partial_bytes(shape)
    local_s, num_tokens = 0.0, 0
    service_s: dict[int, float] = {}
    num_bytes: dict[int, int] = {}
    for part in parts:
        num_tokens += part.num_new
        reading = part.end * costs.kv_token_s
        computing = part.num_new * (part.end - (part.num_new - 1) / 2) * costs.pair_s
        attention_s = max(reading, computing)
        if part.remote:
            for rank, tokens in part.remote.items():
                remote_s = attention_s * tokens / part.end
                service_s[rank] = service_s.get(rank, 0.0) + remote_s
                num_bytes[rank] = num_bytes.get(rank, 0) + part.num_new * per_token
                local_s -= remote_s
        local_s += attention_s
    linear_s = max(costs.weights_s, num_tokens * costs.token_s) + len(parts) * costs.row_s
    # Holders work side by side; what goes to and comes from all of them shares the home's own way out.
    wire_s, waited_s = 0.0, 0.0
    for rank, layer_bytes in num_bytes.items():
        link = links[rank]
        wire_s += layer_bytes / link.bytes_per_s
        waited_s = max(waited_s, 2 * link.message_s + service_s[rank] / num_layers)
    attention_s = max(local_s, num_layers * (waited_s + wire_s))
    return StepTime(
        costs.fixed_s + linear_s + attention_s,
        service_s,
        2 * num_layers * len(num_bytes),
        num_layers * sum(num_bytes.values()),
    )
