"""Whole layers in one native call give the bits that the kernels give one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.decoder_layers import DecoderLayers, Layer, LayerShape
from kernels.linear import PackedLinear
from kernels.marks import Part
from kernels.native.build import supported
from kernels.paged_attention import AttnMeta
from kernels.silu_mul import gelu_mul, silu_mul
from tests.kernels.cases import Paged, paged, threads

pytestmark = pytest.mark.skipif(
    not supported() or "avx512_bf16" not in supported()[0].cpu_flags,
    reason="no native linears on this CPU: layers are always computed one kernel at a time",
)
HIDDEN, FFN = 96, 160
SHAPE = LayerShape(
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    norm_eps=1e-6,
    attention_scale=32**-0.5,
    attention_softcap=None,
    gate=silu_mul,
)


@dataclass(frozen=True)
class Model:
    """What a family adds to the plain layer, as `DecoderLayers` sees it."""

    shape: LayerShape = SHAPE
    has_biases: bool = False
    has_head_norms: bool = False
    has_post_norms: bool = False
    norm_dtype: torch.dtype = torch.bfloat16
    windows: tuple[int | None, ...] = (None, None, None)
    angles: tuple[int, ...] = (0, 0, 0)  # of each layer

    def layers(self) -> DecoderLayers:
        shape, size = self.shape, self.shape.head_dim
        q_size, kv_size = shape.num_heads * size, shape.num_kv_heads * size

        def linear(outputs: int, inputs: int) -> PackedLinear:
            bias = torch.randn(outputs).bfloat16() if self.has_biases else None
            return PackedLinear((torch.randn(outputs, inputs) * inputs**-0.5).bfloat16(), bias)

        def norm(size: int, exists: bool = True) -> Tensor | None:
            return (1 + 0.1 * torch.randn(size)).to(self.norm_dtype) if exists else None

        layers = [
            Layer(
                attention_norm=norm(HIDDEN),
                qkv=linear(q_size + 2 * kv_size, HIDDEN),
                q_norm=norm(size, self.has_head_norms),
                k_norm=norm(size, self.has_head_norms),
                attention_out=linear(HIDDEN, q_size),
                attention_post_norm=norm(HIDDEN, self.has_post_norms),
                mlp_norm=norm(HIDDEN),
                gate_up=linear(2 * FFN, HIDDEN),
                down=linear(HIDDEN, FFN),
                mlp_post_norm=norm(HIDDEN, self.has_post_norms),
                angles=angles,
                window=window,
            )
            for angles, window in zip(self.angles, self.windows, strict=True)
        ]
        return DecoderLayers(shape, layers, norm(HIDDEN))


MODELS = {
    "llama": Model(),
    "qwen2": Model(has_biases=True, shape=replace(SHAPE, num_heads=6)),
    "qwen3": Model(has_head_norms=True),
    "gemma": Model(
        has_head_norms=True,
        has_post_norms=True,
        norm_dtype=torch.float32,
        windows=(40, None, 40),
        angles=(0, 1, 0),
        shape=replace(SHAPE, gate=gelu_mul, attention_softcap=20.0),
    ),
    "unrotated": Model(angles=(2, 2, 2)),
}


@dataclass
class Step:
    """Three segments over a cache with holes, whose last block is half full, and the rows that go on."""

    meta: AttnMeta
    kv: list[Tensor]
    residual: Tensor
    angles: list[Tensor | None]
    rows: Tensor

    @classmethod
    def of(
        cls, shape: LayerShape, new: list[int], cached: list[int], rows: list[int] | None = None
    ) -> "Step":
        heads, kv_heads, size = shape.num_heads, shape.num_kv_heads, shape.head_dim
        case: Paged = paged(new, cached, heads=heads, kv_heads=kv_heads, size=size, holes=0.1)
        meta, slots = case.meta, case.kv.shape[3]
        owner = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
        blocks = meta.block_tables[owner, meta.positions // slots].long()
        places = torch.where(blocks < 0, -1, blocks * slots + meta.positions % slots)
        meta = AttnMeta(meta.q_indptr, meta.first_pos, meta.block_tables, meta.positions, places)
        kv = torch.where(case.kv.isnan(), torch.nan, case.kv).bfloat16()
        ends = (meta.q_indptr[1:] - 1).long()
        return cls(
            meta,
            [kv * (1 + i) for i in range(3)],
            torch.randn(sum(new), HIDDEN).bfloat16(),
            [torch.randn(400, size), torch.randn(300, size), None],
            ends if rows is None else torch.tensor(rows, dtype=torch.int64),
        )

    def run(self, layers: DecoderLayers, **options: object) -> tuple[Tensor, list[Tensor]]:
        """What comes out, and the caches as they are then."""
        kv = [layer.clone() for layer in self.kv]
        residual, meta = self.residual.clone(), self.meta
        fresh = AttnMeta(meta.q_indptr, meta.first_pos, meta.block_tables, meta.positions, meta.slots)
        out = layers(residual, fresh, kv, self.angles, self.rows, **options)
        return out.clone(), kv


@contextmanager
def one_by_one(layers: DecoderLayers) -> Iterator[None]:
    were = layers._are_native
    layers._are_native = False
    try:
        yield
    finally:
        layers._are_native = were


def assert_same(left: tuple[Tensor, list[Tensor]], right: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(left[0], right[0])
    for a, b in zip(left[1], right[1], strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))  # NaN included


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    ("new", "cached"), [([1], [90]), ([1, 1, 1, 1, 1], [3, 50, 17, 120, 0]), ([70, 1, 33], [0, 100, 41])]
)
def test_the_bits_are_those_of_the_kernels_one_by_one(
    model: Model, new: list[int], cached: list[int]
) -> None:
    layers, step = model.layers(), Step.of(model.shape, new, cached)
    with one_by_one(layers):
        expected = step.run(layers)
    assert expected[0].isfinite().all() and expected[0].shape == (len(new), HIDDEN)
    assert_same(step.run(layers), expected)
    assert_same(step.run(layers), expected)  # in buffers that are no longer empty


@pytest.mark.parametrize("rows", [[], [0], [3, 7, 8], [33, 34]])
def test_any_rows_of_the_step_can_go_on(rows: list[int]) -> None:
    layers, step = Model().layers(), Step.of(SHAPE, [10, 25], [5, 64], rows)
    with one_by_one(layers):
        expected = step.run(layers)
    assert expected[0].shape == (len(rows), HIDDEN)
    assert_same(step.run(layers), expected)


def test_threads_do_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.decoder_layers._WORTH_THREADS", 0)
    model = MODELS["gemma"]
    step, layers = Step.of(model.shape, [70, 1, 33], [0, 100, 41]), model.layers()
    with threads(1):
        alone = step.run(layers)
    for count in (2, 3):
        with threads(count):
            for _ in range(5):
                assert_same(step.run(layers), alone)


def test_a_layer_waits_for_its_cache_and_only_for_that() -> None:
    """What a layer has waited for may arrive in the wait, and what later ones wait for after it."""
    layers, step = Model().layers(), Step.of(SHAPE, [1, 9], [64, 30])
    expected = step.run(layers)
    arriving = [layer.clone() for layer in step.kv]
    for layer in step.kv:
        layer.fill_(torch.nan)
    kv = [layer.clone() for layer in step.kv]
    waited: list[int] = []

    def wait_for(number: int) -> None:
        waited.append(number)
        kv[number].copy_(arriving[number])

    out = layers(step.residual.clone(), step.meta, kv, step.angles, step.rows, wait_for)
    assert waited == [0, 1, 2]
    assert_same((out, kv), expected)


def test_the_time_is_told_by_parts() -> None:
    layers, step = Model().layers(), Step.of(SHAPE, [300], [0])
    told: list[tuple[Part, float | None]] = []
    step.run(layers, mark=lambda part, seconds=None: told.append((part, seconds)))
    assert [part for part, _ in told] == ["rest", "linears", "attention", "rest"]
    seconds = [seconds for _, seconds in told]
    assert seconds[0] is None and seconds[3] is None
    assert 0 < seconds[1] < 1 and 0 < seconds[2] < 1


def test_torch_alone_computes_the_same_function() -> None:
    layers, step = Model().layers(), Step.of(SHAPE, [5, 20], [40, 3])
    out, kv = step.run(layers)
    with dispatch.use("torch"):
        by_torch, kv_by_torch = step.run(layers)
    torch.testing.assert_close(out, by_torch, rtol=0.1, atol=0.05)
    for a, b in zip(kv, kv_by_torch, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1, equal_nan=True)


def test_wrong_arguments_are_named_before_anything_is_written() -> None:
    layers, step = Model().layers(), Step.of(SHAPE, [5, 20], [40, 3])
    for changed, message in (
        ({"kv": step.kv[:2]}, "kv must be of 3 layers, got 2"),
        ({"kv": [step.kv[0][:, :, :1], *step.kv[1:]]}, "each layer of kv must"),
        ({"kv": [*step.kv[:2], step.kv[2][:3]]}, "in layer 2"),
        (
            {"rows": torch.tensor([4, 3])},
            r"rows must be int64 ascending indices into 25 rows, got torch.int64 \[4, 3\]",
        ),
        ({"rows": torch.tensor([4, 25])}, r"\[4, 25\]"),
        ({"rows": torch.tensor([-1])}, r"\[-1\]"),
        ({"angles": [torch.randn(8, 32), *step.angles[1:]]}, "not all in the 8 rows of cos_sin"),
        ({"angles": [torch.randn(400, 16), *step.angles[1:]]}, r"must be contiguous float32 \[M, 32\]"),
        ({"residual": step.residual[:7], "rows": torch.tensor([6])}, "q has 7 rows, meta has 25"),
        ({"residual": step.residual.T.contiguous().T}, "residual must be contiguous"),
        ({"residual": step.residual.float()}, "residual must be contiguous torch.bfloat16"),
        ({"residual": torch.randn(25, 64).bfloat16()}, "residual must be contiguous torch.bfloat16"),
    ):
        before = [layer.clone() for layer in step.kv]
        with pytest.raises(ValueError, match=message):
            replace(step, **changed).run(layers)
        for layer, was in zip(step.kv, before, strict=True):
            assert torch.equal(layer.view(torch.int16), was.view(torch.int16))
