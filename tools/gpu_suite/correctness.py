"""Every kernel on random inputs against float64, and each row's bits alone against those in a batch.

A dry run compiles all that ships, and does the small ones of these comparisons in fp32 in Triton's
interpreter, in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from kernels import dispatch
from kernels.merge_state import merge_state
from kernels.paged_attention import paged_attention, paged_attention_ref
from tools.gpu_suite.accuracy import Wrong, compare, poisoned, require_equal
from tools.gpu_suite.inputs import PagedStep, make_meta, paged_step
from tools.gpu_suite.row_checks import row_checks
from tools.gpu_suite.sections import FAILED, PASSED, SKIPPED, Context

Check = tuple[str, bool, Callable[[], dict[str, Any] | None]]  # name, whether it is small, what to do
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_LLAMA, _QWEN = (32, 8, 128), (14, 2, 64)
_BEYOND = 2**31  # elements: more than 32 bits count


@dataclass(frozen=True)
class Form:
    """Attention to be compared; `is_small`: in the interpreter too."""

    name: str
    new: tuple[int, ...]
    cached: tuple[int, ...]
    heads: tuple[int, int, int]
    dtype: torch.dtype = BF16
    slots: int = 32
    window: int | None = None
    softcap: float | None = None
    holes: float = 0.0
    are_alike: bool = False
    is_small: bool = False


_RAGGED = {"new": (1, 5, 33, 129, 1, 2), "cached": (2000, 700, 65, 0, 0, 31)}
_SMALL = {"new": (1, 5, 33, 1), "cached": (150, 70, 40, 0), "dtype": FP32, "is_small": True}
FORMS = (
    Form("ragged", **_RAGGED, heads=_LLAMA),
    Form("ragged", **_RAGGED, heads=_QWEN),
    Form("ragged", **_RAGGED, heads=_LLAMA, dtype=FP16),
    Form("ragged", **_RAGGED, heads=_QWEN, dtype=FP32),
    Form("ragged, blocks of 16", **_RAGGED, heads=_LLAMA, slots=16),
    Form("ragged, blocks of 64", **_RAGGED, heads=_QWEN, slots=64),
    Form("ragged, a window of 41", **_RAGGED, heads=_LLAMA, window=41),
    Form("ragged, a window of 700", **_RAGGED, heads=_QWEN, window=700),
    Form("ragged, a soft cap", **_RAGGED, heads=(8, 4, 256), softcap=5.0),
    Form("ragged, a third lost", **_RAGGED, heads=_LLAMA, holes=0.3),
    Form("ragged, one cache", **_RAGGED, heads=_LLAMA, are_alike=True),
    Form("odd head size", **_RAGGED, heads=(8, 8, 80)),
    Form("odd head size", **_RAGGED, heads=(12, 4, 96)),
    Form("tiny heads", **_RAGGED, heads=(4, 2, 16)),
    Form("many heads to one", **_RAGGED, heads=(16, 1, 128)),
    Form("decode", (1,) * 9, (1, 15, 31, 32, 511, 512, 513, 1024, 3000), _LLAMA),
    Form("prefill", (1500,), (0,), _LLAMA),
    Form("prefill", (1500,), (0,), _QWEN, dtype=FP16),
    Form("extend", (64, 300), (2000, 700), _LLAMA),
    Form("small", **_SMALL, heads=(4, 2, 16), slots=16),
    Form("small, odd head size", **_SMALL, heads=(4, 1, 24), window=20),
    Form("small, some lost", **_SMALL, heads=(2, 2, 64), holes=0.3, softcap=5.0),
    Form("small, one cache", **_SMALL, heads=(4, 2, 16), are_alike=True),
)


def run(context: Context) -> dict[str, Any]:
    for name, _, check in checks(torch.device("cuda")):
        context.case(name, check)
    return {}


def dry_run(context: Context) -> dict[str, Any]:
    from tools.gpu_suite import compiling

    comparing = interpreting(context)
    for module in compiling.modules():
        name = module.__name__.rpartition(".")[2]
        context.case(
            f"compiles: {name}",
            lambda module=module: compiling.compile_all(module.shipped(), lambda: context.left_s),
        )
    if comparing is not None:
        _compared(context, comparing)
    return {}


def interpreting(context: Context) -> "subprocess.Popen[str] | None":
    """The small comparisons, begun in a process in which Triton interprets, if it can."""
    if not _can_interpret():
        context.write({"case": "interpreted", "status": SKIPPED, "reason": "Triton 3.6 needs numpy < 2.4"})
        return None
    command = [sys.executable, "-m", "tools.gpu_suite.correctness"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _compared(context: Context, comparing: "subprocess.Popen[str]") -> None:
    said, errors = comparing.communicate(timeout=max(1.0, context.left_s))
    for line in said.splitlines():
        name, status, figures = json.loads(line)
        context.write({"case": f"interpreted: {name}", "status": status, **figures})
    if comparing.returncode:
        context.write({"case": "interpreted", "status": FAILED, "error": errors.splitlines()[-4:]})


def _can_interpret() -> bool:
    """Whether Triton's interpreter works with this numpy: that of 3.6 takes no array of one number for it."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    return triton >= (3, 7) or numpy < (2, 4)


def checks(device: torch.device) -> Iterator[Check]:
    for form in FORMS:
        shape = "{}/{} x {}".format(*form.heads)
        name = f"attention {form.name}, {shape} {str(form.dtype).removeprefix('torch.')}"
        yield name, form.is_small, lambda form=form: attention(form, device)
    yield "attention beyond 2^31 elements", False, lambda: far_attention(device)
    for dtype in (BF16, FP16, FP32):
        name = f"merge of two halves {str(dtype).removeprefix('torch.')}"
        yield name, dtype == FP32, lambda dtype=dtype: merge_of_halves(dtype, device)
    yield from row_checks(device)


def attention(form: Form, device: torch.device) -> dict[str, Any]:
    arguments = form.new, form.cached, form.heads, form.slots, form.dtype, device
    step = paged_step(*arguments, holes=form.holes, are_alike=form.are_alike)
    return attend(step, form.window, form.softcap)


def attend(step: PagedStep, window: int | None = None, softcap: float | None = None) -> dict[str, Any]:
    """The whole step against float64, and every segment of it alone against its rows of the whole."""
    with poisoned():
        out, lse = paged_attention(step.q, step.kv, step.meta, step.scale, window, softcap)
    on_host = step.on_host()

    def ref(q: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with dispatch.use("torch"):
            return paged_attention_ref(q, kv, on_host.meta, step.scale, window, softcap)

    figures = compare((out, lse), ref, on_host.q, on_host.kv)
    bounds = step.meta.q_indptr.tolist()
    for index, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        alone = step.segment(index)
        with poisoned():
            one, one_lse = paged_attention(alone.q, alone.kv, alone.meta, alone.scale, window, softcap)
        require_equal(one, out[begin:end], f"segment {index} alone")
        require_equal(one_lse, lse[begin:end], f"lse of segment {index} alone")
    return figures


def far_attention(device: torch.device) -> dict[str, Any]:
    """The same step, near the beginning of a cache and in blocks behind its 2^31st element."""
    heads, slots = _LLAMA, 32
    near = paged_step((1, 40), (100, 60), heads, slots, BF16, device)
    first = _BEYOND // near.kv[0].numel() + 1
    far_kv = torch.empty((first + len(near.kv), *near.kv.shape[1:]), dtype=BF16, device=device)
    far_kv[first:] = near.kv
    tables = near.meta.block_tables
    tables = torch.where(tables < 0, tables, tables + first)
    meta = make_meta((1, 40), (100, 60), tables.cpu(), slots, device)
    out, lse = paged_attention(near.q, near.kv, near.meta, near.scale)
    far_out, far_lse = paged_attention(near.q, far_kv, meta, near.scale)
    require_equal(far_out, out, "behind 2^31 elements")
    require_equal(far_lse, lse, "lse behind 2^31 elements")
    return {}


def merge_of_halves(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Attention over the even blocks and over the odd ones, joined, is attention over all; some rows see keys
    of one kind only, or none.
    """
    step = paged_step((1, 5, 20), (90, 0, 40), (4, 2, 64), 16, dtype, device, holes=0.2)
    meta = step.meta
    halves = []
    for parity in (0, 1):
        tables = meta.block_tables.clone()
        tables[:, parity::2] = -1
        half = step.with_tables(tables)
        halves += [*paged_attention(step.q, step.kv, half.meta, step.scale)]
    with poisoned():
        out, lse = merge_state(*halves)
    whole, whole_lse = paged_attention(step.q, step.kv, meta, step.scale)
    # A half is rounded to the dtype once before it is joined, the result once more.
    bound = 4 * torch.finfo(dtype).eps
    for name, a, b in (("out", out, whole), ("lse", lse, whole_lse)):
        a, b = a.double(), b.double()
        if not torch.equal(a.isinf(), b.isinf()) or a.isnan().any():
            raise Wrong(f"{name} is infinite or NaN where it should not be")
        error = float((a - b).masked_fill(b.isinf(), 0.0).norm() / b.masked_fill(b.isinf(), 0.0).norm())
        if error > bound:
            raise Wrong(f"{name} of two halves is off by {error:.2e}; {bound:.2e} would be rounding")
    return {"error": float(f"{error:.3g}")}


def _interpret() -> int:
    """What `interpreted` starts: a line of JSON for each comparison."""
    with dispatch.use("triton"):
        for name, is_small, check in checks(torch.device("cpu")):
            if not is_small:
                continue
            try:
                line = [name, PASSED, check() or {}]
            except Exception as error:
                line = [name, FAILED, {"error": [f"{type(error).__name__}: {error}"[:300]]}]
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(_interpret())
