"""GPUs, models and instances of a simulated cluster, each constant with its source."""

from dataclasses import dataclass, replace

from engine.simulation.network import INFINIBAND_HDR, INFINIBAND_NDR, NVLINK_3, NVLINK_4, Link, Network
from engine.simulation.profiles import H200, LLAMA_3_8B, LLAMA_3_70B, Gpu, ModelShape, gpu_costs
from engine.simulation.step_costs import StepCosts

# Sizes of the models' published config.json.
LLAMA_2_7B = ModelShape("LLaMA2-7B", 32, 4096, 11008, 32, 32, 128, 32000)
LLAMA_2_13B = ModelShape("LLaMA2-13B", 40, 5120, 13824, 40, 40, 128, 32000)
LLAMA_2_70B = ModelShape("LLaMA2-70B", 80, 8192, 28672, 64, 8, 128, 32000)

A100 = Gpu(
    "A100-80GB",
    # FlashAttention-2's paper: GEMMs reach 80-90 % of the A100's 312 TFLOP/s.
    matmul_flops_per_s=250e12,
    # The same: its attention reaches 50-73 % of them, forward; 61 % is the middle.
    attention_flops_per_s=190e12,
    # gpt-fast's README, A100-80GB: "about 1700 GB/s" as the peak that is seen, of 2,039 on the data sheet.
    weight_bytes_per_s=1.7e12,
    # As much: on the H200, attention reads KV at 95 % of the rate that weights are read with.
    kv_bytes_per_s=1.6e12,
    # PCIe Gen4 x16: half of what is reached over Gen5.
    host_bytes_per_s=25e9,
    copy_descriptor_s=0.5e-6,  # as on the H200
    # gpt-fast, LLaMA2-7B, batch 1: 104.9 tokens/s, 9.53 ms each; 13.2 GB of weights at 1.7 TB/s explain 7.77.
    step_s=1.76e-3,
    # NCCL's model (see `network`) of eight on NVLink; a cluster's own network takes the place of both below.
    all_reduce_s=15.2e-6,
    link_bytes_per_s=NVLINK_3.bytes_per_s,
)

GPU_BYTES = {"A100-80GB": 80e9, "H200": 141e9}
"""Of the data sheets."""
USED_SHARE = 0.9
"""Of a GPU's memory, for weights and KV: vLLM's default (gpu_memory_utilization)."""


@dataclass(frozen=True, slots=True)
class Instance:
    """An engine on some GPUs: what its steps cost, and how many tokens of KV it holds."""

    name: str
    shape: ModelShape
    costs: StepCosts
    num_gpus: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Setup:
    """Which model runs on which GPUs, and on how many of them at least."""

    name: str
    shape: ModelShape
    gpu: Gpu
    gpus_per_instance: int
    nvlink: Link
    infiniband: Link

    def instance(self, network: Network, num_gpus: int | None = None) -> Instance:
        """Tensor parallel over `num_gpus`, otherwise over as many as an instance has.  With more GPUs than KV
        heads the heads are there several times; heads are split evenly even where that cannot be.
        """
        number = num_gpus or self.gpus_per_instance
        reduce_s, link_bytes_per_s = network.all_reduce(number)
        gpu = replace(self.gpu, all_reduce_s=reduce_s, link_bytes_per_s=link_bytes_per_s)
        shape = replace(self.shape, num_kv_heads=max(self.shape.num_kv_heads, number))
        weights = (self.shape.body_values + 2 * self.shape.head_values) * self.shape.bytes_per_value
        room = number * USED_SHARE * GPU_BYTES[self.gpu.name] - weights
        return Instance(
            f"{self.shape.name} on {number} {self.gpu.name}",
            self.shape,
            gpu_costs(shape, gpu, number),
            number,
            int(room / shape.kv_bytes_per_token),
        )


SETUPS = {
    setup.name: setup
    for setup in (
        Setup("a100-7b", LLAMA_2_7B, A100, 1, NVLINK_3, INFINIBAND_HDR),
        Setup("a100-13b", LLAMA_2_13B, A100, 1, NVLINK_3, INFINIBAND_HDR),
        # 138 GB of weights, of which two GPUs would leave 6 GB for KV.
        Setup("a100-70b", LLAMA_2_70B, A100, 4, NVLINK_3, INFINIBAND_HDR),
        Setup("h200-8b", LLAMA_3_8B, H200, 1, NVLINK_4, INFINIBAND_NDR),
        Setup("h200-70b", LLAMA_3_70B, H200, 4, NVLINK_4, INFINIBAND_NDR),
    )
}
