"""Whole decoders on the Triton kernels: ragged steps over a paged cache, against the same decoder in torch,
in its dtype and in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.decoder import RotaryDecoder
from engine.models.layer_attention import LayerAttention, Rope
from engine.types import SamplingParams
from kernels import dispatch
from kernels.decoder_layers import Layer
from kernels.gpu.launch import Launch
from kernels.linear import PackedLinear
from tests.models.harness import PagedHarness, Run

HIDDEN, FFN, VOCABULARY, LAYERS, HEADS = 64, 96, 50, 2, 4
ROPE = Rope(10000.0)


@dataclass(frozen=True)
class Family:
    """What a family adds to the plain decoder."""

    kv_heads: int = 2
    size: int = 16
    has_biases: bool = False
    has_head_norms: bool = False
    is_gemma: bool = (
        False  # norms of what attention and mlp give, gelu, soft caps, windows, a scaled embedding
    )
    ropes: tuple[Rope | None, ...] = (ROPE, ROPE)

    def config(self) -> ModelConfig:
        windows = (11, None) if self.is_gemma else (None, None)
        return ModelConfig(
            architecture="Gemma2ForCausalLM" if self.is_gemma else "Qwen3ForCausalLM",
            vocab_size=VOCABULARY,
            embedding_size=HIDDEN,
            hidden_size=HIDDEN,
            ffn_size=FFN,
            layers=tuple(LayerAttention(*pair) for pair in zip(windows, self.ropes, strict=True)),
            num_heads=HEADS,
            num_kv_heads=self.kv_heads,
            head_dim=self.size,
            activation="gelu_pytorch_tanh" if self.is_gemma else "silu",
            norm_eps=1e-6,
            norm_offset=0.0,
            max_positions=256,
            embedding_scale=HIDDEN**0.5 if self.is_gemma else 1.0,
            attention_scale=self.size**-0.5,
            attention_softcap=5.0 if self.is_gemma else None,
            logit_softcap=10.0 if self.is_gemma else None,
            qkv_bias=self.has_biases,
            attention_out_bias=self.has_biases,
            mlp_bias=self.has_biases,
            qk_norm=self.has_head_norms,
            post_norms=self.is_gemma,
            norm_first=True,
            fused_weights=False,
            tied_embeddings=False,
            eos_ids=frozenset(),
            sampling=SamplingParams(),
        )

    def decoder(self, dtype: torch.dtype) -> RotaryDecoder:
        """The same random weights in any dtype, spread widely: what is computed wrongly matters."""
        random = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        def linear(outputs: int, inputs: int, has_bias: bool = self.has_biases) -> PackedLinear:
            weight = (2 * draw(outputs, inputs) * inputs**-0.5).to(dtype)
            return PackedLinear(weight, draw(outputs).to(dtype) if has_bias else None)

        def norm(size: int, exists: bool = True) -> Tensor | None:
            return (1 + 0.3 * draw(size)).to(dtype) if exists else None

        config = self.config()
        layers = [
            Layer(
                attention_norm=norm(HIDDEN),
                qkv=linear((HEADS + 2 * self.kv_heads) * self.size, HIDDEN),
                q_norm=norm(self.size, self.has_head_norms),
                k_norm=norm(self.size, self.has_head_norms),
                attention_out=linear(HIDDEN, HEADS * self.size),
                attention_post_norm=norm(HIDDEN, self.is_gemma),
                mlp_norm=norm(HIDDEN),
                gate_up=linear(2 * FFN, HIDDEN),
                down=linear(HIDDEN, FFN),
                mlp_post_norm=norm(HIDDEN, self.is_gemma),
                angles=config.ropes.index(attention.rope),
                window=attention.window,
            )
            for attention in config.layers
        ]
        embedding = draw(VOCABULARY, HIDDEN).to(dtype)
        return RotaryDecoder(config, embedding, layers, norm(HIDDEN), linear(VOCABULARY, HIDDEN, False))


FAMILIES = {
    "llama": Family(),
    "one kv head per head": Family(kv_heads=4, size=24),
    "qwen3": Family(has_head_norms=True, has_biases=True, size=32),
    "gemma": Family(is_gemma=True, has_head_norms=True, kv_heads=1),
    "partly rotated": Family(ropes=(ROPE, None)),
}


def ids_of(conversation: int, begin: int, end: int) -> list[int]:
    return [(7 * conversation + 11 * i * i + i) % VOCABULARY for i in range(begin, end)]


def run(conversation: int, begin: int, end: int) -> Run:
    return Run(conversation, begin, ids_of(conversation, begin, end))


def all_rows(harness: PagedHarness, *runs: Run) -> Tensor:
    return harness.step(*runs, rows=torch.arange(sum(len(one.ids) for one in runs)))


def two_steps(decoder: RotaryDecoder) -> Tensor:
    """A ragged prefill; then decodes beside a new conversation, and beside the prefix that one has lost."""
    harness = PagedHarness(decoder, num_blocks=20, block_size=16)
    first = all_rows(harness, run(0, 0, 5), run(1, 0, 1), run(2, 0, 37))
    harness.drop_block(2, 0)
    second = run(0, 5, 6), run(1, 1, 2), run(2, 0, 16), run(2, 37, 40), run(3, 0, 18)
    return torch.cat((first, all_rows(harness, *second)))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The modules of kernels.gpu whose kernels were launched."""
    names: set[str] = set()
    launch = Launch.__call__

    def record(self: Launch, grid: tuple[int, ...], *args: object) -> None:
        names.add(self.kernel.fn.__module__.removeprefix("kernels.gpu."))
        launch(self, grid, *args)

    monkeypatch.setattr(Launch, "__call__", record)
    yield names


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_logits_are_as_close_to_exact_as_those_of_torch(family: Family, launched: set[str]) -> None:
    decoder = family.decoder(torch.float32)
    by_triton = two_steps(decoder)
    assert {"norm", "gate", "rope", "attention"} <= launched
    with dispatch.use("torch"):
        by_torch, exact = two_steps(decoder), two_steps(family.decoder(torch.float64))
    assert exact.std() > 0.5, "logits that hardly differ would prove nothing"
    noise, error = ((x - exact).abs().max() for x in (by_torch, by_triton))
    assert error <= 2 * noise + 1e-5, f"{error=:.2e} {noise=:.2e}"


def test_a_conversation_has_the_same_bits_alone_and_among_others() -> None:
    decoder = FAMILIES["qwen3"].decoder(torch.float32)
    together, alone = (PagedHarness(decoder, num_blocks=20, block_size=16) for _ in range(2))
    logits = all_rows(together, run(0, 0, 5), run(2, 0, 37), run(1, 0, 1))
    assert torch.equal(logits[5:42], all_rows(alone, run(2, 0, 37)))
    logits = all_rows(together, run(1, 1, 2), run(2, 37, 38), run(0, 5, 30))
    assert torch.equal(logits[1:2], all_rows(alone, run(2, 37, 38)))
