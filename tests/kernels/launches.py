"""What launches would compile on a GPU, told without one; and a call of every launcher of kernels.gpu."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from kernels import dispatch
from kernels.gpu import gather, merge, sampling
from kernels.gpu.launch import Launch
from kernels.paged_attention import AttnMeta, paged_attention
from kernels.prepare import NUM_FACTS, StepTensors, prepare
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import HeadNorms, rope_kv_write
from kernels.sampling import SamplingRows
from kernels.silu_mul import gelu_mul, silu_mul
from tests.kernels.cases import paged

HEADS, KV_HEADS, SIZE, SLOTS, BLOCKS = 4, 2, 16, 16, 40


def specialised(launch: Launch, *args: Any) -> dict[str, tuple[str, str | None]]:
    """What a kernel is specialised on, argument by argument: the type, and "D" where the code will rely on a
    multiple of 16.
    """
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, found, _ = bind(*args, **launch.constants)
    told = dict(zip(bound, found, strict=True))
    return {name: told[name] for name in bound if name not in launch.constants}


def compiled_for(launch: Launch) -> dict[str, tuple[str, str | None]]:
    """The same of what is compiled ahead of time."""
    relied_upon = {
        parameter.name: "" if parameter.do_not_specialize_on_alignment else "D"
        for parameter in launch.kernel.params
    }
    return {
        name: (kind, relied_upon[name] if kind.startswith("*") else None)
        for name, kind in launch.signature.items()
    }


@contextmanager
def instead_of_launching(called: Callable[[Launch, tuple[Any, ...]], None]) -> Iterator[None]:
    """Launchers take tensors in the host's memory, and what they would launch goes to `called`, with its
    arguments.  What they return holds nothing.
    """
    with pytest.MonkeyPatch.context() as patch, dispatch.use("triton"):
        patch.setattr(Launch, "__call__", lambda launch, grid, *args: called(launch, args))
        yield


def attend(rows: int, *, window: int | None = None, softcap: float | None = None, **changes: Tensor) -> None:
    """Segments of so many rows and of one row; more than one chunk of keys."""
    case = paged([rows, 1], [2000, 5], heads=HEADS, kv_heads=KV_HEADS, size=SIZE, slots=SLOTS)
    q, kv = changes.pop("q", case.q), changes.pop("kv", case.kv)
    names = ("q_indptr", "first_pos", "block_tables", "positions", "slots")
    meta = AttnMeta(**({name: getattr(case.meta, name) for name in names} | changes))
    paged_attention(q, kv, meta, 0.25, window, softcap)


def rotate(rows: int, *, norms: HeadNorms | None = None, **changes: Any) -> None:
    meta = paged([rows], [30], slots=SLOTS).meta
    slots = changes.pop("slots", torch.arange(rows))
    given = {
        "q": torch.ones(rows, HEADS, SIZE),
        "k": torch.ones(rows, KV_HEADS, SIZE),
        "v": torch.ones(rows, KV_HEADS, SIZE),
        "cos_sin": torch.ones(30 + rows, SIZE),
        "kv": torch.zeros(BLOCKS, 2, KV_HEADS, SLOTS, SIZE),
    } | changes
    rope_kv_write(**given, meta=replace(meta, slots=slots), norms=norms)


def norm(rows: int, **changes: Tensor) -> None:
    rms_norm(**({"x": torch.ones(rows, 64), "weight": torch.ones(64)} | changes), eps=1e-6)


def add_norm(rows: int, **changes: Tensor) -> None:
    x = torch.ones(rows, 64)
    add_rms_norm(**({"x": x, "residual": x, "weight": torch.ones(64)} | changes), eps=1e-6)


def silu(rows: int, x: Tensor | None = None) -> None:
    silu_mul(torch.ones(rows, 64) if x is None else x)


def gelu(rows: int, x: Tensor | None = None) -> None:
    gelu_mul(torch.ones(rows, 64) if x is None else x)


def merge_two(rows: int, **changes: Tensor) -> None:
    out, lse = torch.ones(rows, HEADS, SIZE), torch.ones(rows, HEADS)
    merge.merge_state(**({"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse} | changes))


def draw(rows: int, **changes: Tensor) -> None:
    columns = {name: torch.ones(rows) for name in ("temperature", "top_p", "min_p")}
    columns |= {name: torch.ones(rows, dtype=torch.int64) for name in ("top_k", "seed", "position")}
    logits, out = changes.pop("logits", torch.ones(rows, 1000)), changes.pop("out", None)
    sampling.sample(logits, SamplingRows(**(columns | changes)), out)


def take_highest(rows: int, **changes: Tensor) -> None:
    sampling.greedy(**({"logits": torch.ones(rows, 1000)} | changes))


def copy(rows: int, *, piece_bytes: int = 64, num_programs: int = 12, **changes: Tensor) -> None:
    memory, offsets = torch.zeros(64 * 64, dtype=torch.uint8), 64 * torch.arange(rows)
    given = {
        "to": memory,
        "source": memory.clone(),
        "to_offsets": offsets,
        "source_offsets": offsets,
    } | changes
    gather.copy_pieces(**given, piece_bytes=piece_bytes, num_programs=num_programs)


def write_step(rows: int, packed: Tensor | None = None, **changes: Tensor) -> None:
    """A step of so many segments."""
    integers = {"tables": (64, 8), "facts": (64, NUM_FACTS), "q_indptr": (65,), "first_pos": (64,)}
    integers |= {"table_rows": (64,)}
    columns = {name: torch.ones(64) for name in ("temperature", "top_p", "min_p")}
    columns |= {name: torch.ones(64, dtype=torch.int64) for name in ("top_k", "seed", "position")}
    given = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in integers.items()}
    for name in ("last", "ids", "positions", "slots", "logits_rows", "draw_rows"):
        given[name] = torch.zeros(64, dtype=torch.int64)
    tensors = StepTensors(**(given | changes), sampling=SamplingRows(**columns))
    prepare(torch.zeros(1024, dtype=torch.int32) if packed is None else packed, tensors, rows, SLOTS)


LAUNCHERS: dict[str, Callable[[int], None]] = {
    "attention": attend,
    "attention, window": lambda rows: attend(rows, window=100),
    "attention, softcap": lambda rows: attend(rows, softcap=30.0),
    "merge": merge_two,
    "rope": rotate,
    "rope, norms": lambda rows: rotate(rows, norms=HeadNorms(torch.ones(SIZE), torch.ones(SIZE), 1e-6)),
    "rope, unrotated": lambda rows: rotate(rows, cos_sin=None),
    "norm": norm,
    "add_norm": add_norm,
    "silu": silu,
    "gelu": gelu,
    "sampling": draw,
    "greedy": take_highest,
    "gather": copy,
    "prepare": write_step,
}
"""A valid call of each, of so many rows."""
