"""Step costs of machines and models.  Those of a GPU follow from published constants, named below; those of a
CPU are measured (`python -m tools.simulate --measure`).
"""

from dataclasses import dataclass, fields
from typing import Any

from engine.errors import ConfigError
from engine.simulation.step_costs import StepCosts


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of the Llama kind; weights and KV take `bytes_per_value` each."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bytes_per_value: int = 2

    @property
    def body_values(self) -> int:
        """Weights that every token meets."""
        heads = self.hidden_size * (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return self.num_layers * (heads + 3 * self.hidden_size * self.ffn_size)

    @property
    def head_values(self) -> int:
        """Weights that only tokens meet whose logits are asked for."""
        return self.vocab_size * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_value


# Sizes of the models' published config.json.
LLAMA_3_8B = ModelShape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_3_70B = ModelShape("Llama-3-70B", 80, 8192, 28672, 64, 8, 128, 128256)
# The same without sharing of KV heads, which no such model has: shows what grouped queries are worth.
LLAMA_3_8B_MHA = ModelShape("Llama-3-8B with 32 KV heads", 32, 4096, 14336, 32, 32, 128, 128256)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU and its links.  Rates are what kernels reach, not what data sheets promise."""

    name: str
    matmul_flops_per_s: float
    attention_flops_per_s: float
    weight_bytes_per_s: float
    kv_bytes_per_s: float
    host_bytes_per_s: float  # each way, alone
    copy_descriptor_s: float  # to submit a copy of one block of one layer
    step_s: float  # of every step: launches, gaps, sampling
    all_reduce_s: float  # latency of one among a few GPUs
    link_bytes_per_s: float  # between GPUs, each way


H200 = Gpu(
    "H200",
    # Computing 1,000 tokens of Llama-3.1-8B takes about 27 ms and of Llama-3.3-70B about 230 ms at the
    # upper end of 400-600 TFLOP/s for dense bf16 linears; the peak is 132 SM x 1.83 GHz x 4096 = 989 TFLOP/s.
    matmul_flops_per_s=600e12,
    # Causal prefill, head size 128, in plain Triton: 353-378 TFLOP/s at 4K-16K on an H100 (FlashAttention-3's
    # paper); 350 is the least to expect of a paged kernel in Triton.
    attention_flops_per_s=350e12,
    # 1 GB of weights in 0.23 ms, 16 GB in 3.8 ms per decode step: 4.2-4.3 of the data sheet's 4.8 TB/s.
    weight_bytes_per_s=4.2e12,
    # Decode attention over long contexts: 3.98 TB/s (TileLang, batch 32 at 4K), 4.05 (FlashAttention-3 in
    # vLLM, batch 8 at 16K).
    kv_bytes_per_s=4.0e12,
    # PCIe Gen5 x16, pinned memory, pieces of 64 KiB and more: about 50 GB/s one way (vLLM, H100).
    # A block of 32 tokens of one layer is 128 KiB in both models.
    host_bytes_per_s=50e9,
    # Submission costs about 0.5 us per descriptor of a batched copy (vLLM, pull request 48434).
    copy_descriptor_s=0.5e-6,
    # A decode step of Llama-3.1-8B, batch 1, takes 6.44 ms + KV on an H100 (FlashAttention-3 in vLLM);
    # reading 16 GB of weights at 90 % of its 3.35 TB/s explains 5.3 of them.
    step_s=1.1e-3,
    # NCCL, 8-256 KiB, 8 x H100, called from PyTorch: 22-24 us; one-shot kernels 11-18.
    all_reduce_s=20e-6,
    # NVLink 4 of an H100 or H200: 450 GB/s each way.
    link_bytes_per_s=450e9,
)

COPIES_SLOW_EACH_OTHER = 1.19
"""Copies both ways at once take so much longer, each: 18-20 % (Pensieve, section 5)."""


def gpu_costs(shape: ModelShape, gpu: Gpu, num_gpus: int = 1, block_size: int = 32) -> StepCosts:
    """Of a model whose layers are split over `num_gpus`, each with its own link to the host (Megatron's
    tensor parallelism, as in Pensieve, section 4.4.2: two all-reduces of the hidden state in each layer).
    """
    bytes_per_value, n = shape.bytes_per_value, num_gpus
    matmul_flops_per_s = gpu.matmul_flops_per_s * n
    num_reduces = 2 * shape.num_layers if n > 1 else 0
    reduced_bytes = shape.hidden_size * bytes_per_value * 2 * (n - 1) / n  # of a token, through each link
    block_s = block_size * shape.kv_bytes_per_token / (gpu.host_bytes_per_s * n)
    return StepCosts(
        fixed_s=gpu.step_s + num_reduces * gpu.all_reduce_s,
        weights_s=(shape.body_values + shape.head_values) * bytes_per_value / (gpu.weight_bytes_per_s * n),
        token_s=2 * shape.body_values / matmul_flops_per_s
        + num_reduces * reduced_bytes / gpu.link_bytes_per_s,
        row_s=2 * shape.head_values / matmul_flops_per_s,
        kv_token_s=shape.kv_bytes_per_token / (gpu.kv_bytes_per_s * n),
        pair_s=4 * shape.num_layers * shape.num_heads * shape.head_dim / (gpu.attention_flops_per_s * n),
        load_s=block_s,
        store_s=block_s,
        copy_latency_s=shape.num_layers * gpu.copy_descriptor_s,
        num_layers=shape.num_layers,
        overlaps=True,
    )


@dataclass(frozen=True, slots=True)
class Profile:
    name: str
    costs: StepCosts
    kv_bytes_per_token: int
    num_gpus: int  # 0: none


def h200(shape: ModelShape, num_gpus: int, block_size: int = 32) -> Profile:
    name = f"{shape.name} on {num_gpus} H200"
    return Profile(name, gpu_costs(shape, H200, num_gpus, block_size), shape.kv_bytes_per_token, num_gpus)


def gpu_profiles(block_size: int = 32) -> dict[str, Profile]:
    """By name.  70B in bf16 takes 141 GB of weights, as much as one H200 has in all: four of them share it,
    as four A100 do in Pensieve's evaluation (table 1).
    """
    return {
        "h200-8b": h200(LLAMA_3_8B, 1, block_size),
        "h200-8b-mha": h200(LLAMA_3_8B_MHA, 1, block_size),
        "h200-70b": h200(LLAMA_3_70B, 4, block_size),
    }


def cpu_profile(measured: dict[str, Any]) -> Profile:
    """From what `tools.simulate --measure` wrote.  Raises ConfigError."""
    names = {field.name for field in fields(StepCosts)} - {"overlaps"}
    costs = measured.get("costs", {})
    if set(costs) != names or "kv_bytes_per_token" not in measured:
        raise ConfigError(
            f"the measured costs hold {sorted(costs)}, not {sorted(names)}; measure them again with "
            "python -m tools.simulate --measure MODEL"
        )
    name = f"{measured.get('model', 'a model')} on a CPU, {measured.get('threads', '?')} threads"
    return Profile(name, StepCosts(**costs, overlaps=False), measured["kv_bytes_per_token"], 0)
