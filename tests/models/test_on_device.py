"""A model on another device than the CPU: where its weights are, and that a step does not wait for it.

Torch's `meta` device stands for it: tensors there have a shape and a dtype, and to ask one for a value, or
for a shape that depends on values, is an error.  Kernels are left out: the decoder's own work is tested.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.models import decoder as decoder_module
from engine.models import load_model, opt, weights
from engine.models.checkpoint import Checkpoint
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.layer_attention import Rope
from engine.models.rope import RopeTable
from engine.models.weights import expected_tensors
from kernels import decoder_layers
from kernels.dispatch import use
from kernels.paged_attention import AttnMeta, Extents
from tests.models.harness import PagedHarness, Run
from tests.models.tiny_models import FAMILIES, tiny_checkpoint

META = torch.device("meta")
KINDS = ["gemma2", "gemma3", "llama3", "opt", "opt 350m", "phi3", "qwen2", "qwen3", "smollm3"]


def tensors_of(thing: object) -> Iterator[Tensor]:
    """Every tensor that is reached from it, through attributes, collections and closures.  Of a table, what
    steps read of it.
    """
    if isinstance(thing, RopeTable):
        thing = thing.upto(1)
    if isinstance(thing, Tensor):
        yield thing
        return
    inner: list[Any] = []
    if isinstance(thing, list | tuple):
        inner = list(thing)
    elif isinstance(thing, dict):
        inner = list(thing.values())
    elif isinstance(thing, FunctionType):
        inner = [cell.cell_contents for cell in thing.__closure__ or ()]
    elif is_dataclass(thing):
        inner = [getattr(thing, field.name) for field in fields(thing)]
    elif type(thing).__module__.startswith(("engine.", "kernels.")):
        inner = list(getattr(thing, "__dict__", {}).values())
    for each in inner:
        yield from tensors_of(each)


@pytest.fixture
def on_meta(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Decoder]:
    """In float16: the CPU's linears would pack the other dtypes."""
    tiny_checkpoint(request.param, tmp_path, torch.bfloat16)
    with use("torch"):
        yield load_model(tmp_path, torch.float16, META)


@pytest.mark.parametrize("on_meta", FAMILIES, indirect=True)
def test_every_weight_lands_on_the_device_in_the_models_dtype(on_meta: Decoder, tmp_path: Path) -> None:
    found = {tensor.untyped_storage()._cdata: tensor for tensor in tensors_of(on_meta)}.values()
    assert {tensor.device for tensor in found} == {META}
    of_the_model = [tensor for tensor in found if tensor.dtype == torch.float16 and tensor.dim()]
    angles_and_gemmas_norms = [tensor for tensor in found if tensor.dtype != torch.float16]
    assert {tensor.dtype for tensor in angles_and_gemmas_norms} <= {torch.float32}
    expected = expected_tensors(ModelConfig.from_dir(tmp_path))
    matrices = {name: shape for name, shape in expected.items() if len(shape) == 2}
    loaded = sum(tensor.numel() for tensor in of_the_model if tensor.dim() == 2)
    assert loaded == sum(rows * columns for rows, columns in matrices.values()), (
        "a tied embedding is one tensor, and nothing is there twice"
    )


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "opt 350m"])
def test_weights_that_went_to_a_device_compute_what_those_of_the_cpu_do(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a device's weights, to a device that can compute here."""
    tiny_checkpoint(family, tmp_path, torch.bfloat16)
    run = Run(0, 0, list(range(5, 50)))
    expected = PagedHarness(load_model(tmp_path, torch.float32)).step(run)
    packer = weights._Packer

    class AsForADevice(packer):  # type: ignore[misc, valid-type]
        def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
            super().__init__(checkpoint, dtype, device)
            self._reads_file = False

    monkeypatch.setattr(weights, "_Packer", AsForADevice)
    decoder = load_model(tmp_path, torch.float32)
    assert decoder._embedding.dtype == torch.float32  # type: ignore[attr-defined]
    assert torch.equal(PagedHarness(decoder).step(run), expected)


def stand_in(*given: Any, **more: Any) -> Any:
    """A kernel's result by shape: as its first argument."""
    return torch.empty_like(given[0])


def stand_in_attention(q: Tensor, *given: Any, **more: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


def stand_in_gate(x: Tensor) -> Tensor:
    return x.new_empty(len(x), x.shape[1] // 2)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_layers, "rms_norm", stand_in)
    monkeypatch.setattr(decoder_layers, "add_rms_norm", lambda x, residual, *_: (stand_in(x), stand_in(x)))
    for module in (decoder_layers, opt):
        monkeypatch.setattr(module, "rope_kv_write", stand_in)
        monkeypatch.setattr(module, "paged_attention", stand_in_attention)
    for gate in ("silu_mul", "gelu_mul"):
        monkeypatch.setattr(decoder_module, gate, stand_in_gate)


@pytest.mark.parametrize("on_meta", KINDS, indirect=True)
def test_a_step_asks_the_device_for_nothing(without_kernels: None, on_meta: Decoder) -> None:
    config, waits = on_meta.config, list[int]()
    lengths = np.array([1, 6])
    meta = AttnMeta(
        *(torch.empty(size, dtype=torch.int32, device=META) for size in (3, 2, (2, 4))),
        *(torch.empty(7, dtype=torch.int64, device=META) for _ in range(2)),
        # A bound that is beyond what there is, as a graph's may be.
        extents=Extents(lengths, np.array([config.max_positions + 31, 6])),
    )
    shape = (8, 2, config.num_kv_heads, 32, config.head_dim)
    kv = [torch.empty(shape, dtype=torch.float16, device=META) for _ in range(config.num_layers)]
    rows = torch.empty(2, dtype=torch.int64, device=META)
    logits = on_meta.forward(meta.positions, meta, kv, rows, waits.append)
    assert (logits.shape, logits.dtype, logits.device) == ((2, config.vocab_size), torch.float32, META)
    assert waits == list(range(config.num_layers))


def test_the_stand_in_device_notices_what_would_wait_for_a_real_one() -> None:
    x = torch.empty(4, 4, device=META)
    for ask in (
        lambda: x[0, 0].item(),
        lambda: x.tolist(),
        lambda: bool((x > 0).any()),
        lambda: x.cpu(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: x.repeat_interleave(torch.empty(4, dtype=torch.int64, device=META), 0),
        lambda: x + torch.ones(4, 4),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


def test_angles_on_a_device_are_all_there_whatever_is_asked_for() -> None:
    rope = Rope(10000.0)
    table = RopeTable(64, rope, 9000, META)
    assert table.upto(1) is table.upto(9001)
    assert table.upto(1).shape == RopeTable(64, rope, 9000).upto(9000).shape and table.upto(1).is_meta


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_device_is_refused_what_its_kernels_do_not_compute_in(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not supported on a GPU; use bfloat16, float16 or float32"):
        load_model(tmp_path, dtype, META)


def test_weights_that_find_no_room_say_how_much_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint("llama2", tmp_path, torch.bfloat16)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(weights._Packer, "vector", full)
    monkeypatch.setattr(weights._Packer, "_stacked", full)
    complaint = (
        r"the weights of .* take 0\.0 GiB in float32, more than meta has free; in bfloat16 it takes half"
    )
    with pytest.raises(ConfigError, match=complaint):
        load_model(tmp_path, torch.float32, META)
    with pytest.raises(ConfigError, match="more than meta has free: end what else runs there"):
        load_model(tmp_path, torch.bfloat16, META)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_computes_what_the_cpu_does_and_is_not_waited_for(family: str, tmp_path: Path) -> None:
    """Three steps: a prompt beside another, one token each, and a second prompt over what was kept."""
    tiny_checkpoint(family, tmp_path, torch.float32)
    cuda = torch.device("cuda", 0)
    cpu = PagedHarness(load_model(tmp_path, torch.float32))
    gpu = PagedHarness(load_model(tmp_path, torch.float32, cuda), device=cuda)
    ids = [7 * i % 320 for i in range(150)]
    steps = [
        (Run(0, 0, ids[:45]), Run(1, 0, ids[:9])),
        (Run(0, 45, ids[45:46]), Run(1, 9, ids[9:10])),
        (Run(0, 46, ids[46:]), Run(1, 10, ids[10:11])),
    ]
    for runs in steps:
        inputs = gpu.inputs(*runs)
        gpu.decoder.forward(*inputs)  # kernels are compiled at their first call, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = gpu.decoder.forward(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # In float32 both are right to rounding, of logits whose spread is 1 or more.
        torch.testing.assert_close(logits.cpu(), cpu.step(*runs), rtol=0, atol=1e-3)
