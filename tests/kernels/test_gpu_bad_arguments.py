"""Arguments that the kernels for GPUs are not made for: refused by name, with what was expected and came,
before anything is launched.  What the contracts refuse anywhere is in test_bad_arguments.py.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, which is for Linux on x86-64", exc_type=ImportError)

import kernels.gpu  # noqa: E402
from kernels.gpu.launch import Launch, require_gpu  # noqa: E402
from kernels.rope import HeadNorms  # noqa: E402
from tests.kernels.launches import (  # noqa: E402
    BLOCKS,
    HEADS,
    KV_HEADS,
    LAUNCHERS,
    SIZE,
    SLOTS,
    add_norm,
    attend,
    copy,
    draw,
    gelu,
    instead_of_launching,
    merge_two,
    norm,
    rotate,
    silu,
    take_highest,
    write_step,
)

ROWS = 3
MODULES = [import_module(f"kernels.gpu.{found.name}") for found in pkgutil.iter_modules(kernels.gpu.__path__)]


def shifted(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Contiguous ones that begin one element behind a multiple of 16 bytes."""
    return torch.ones(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)


def heads(
    count: int = HEADS, size: int = SIZE, dtype: torch.dtype = torch.float32, rows: int = ROWS
) -> Tensor:
    return torch.ones(rows, count, size, dtype=dtype)


def blocks(
    slots: int = SLOTS, size: int = SIZE, dtype: torch.dtype = torch.float32, kv_heads: int = KV_HEADS
) -> Tensor:
    return torch.zeros(200, 2, kv_heads, slots, size, dtype=dtype)


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def attends(q: Tensor | None = None, kv: Tensor | None = None, **changes: Any) -> Callable[[], None]:
    """Two segments, of three rows and of one."""
    q = heads(rows=ROWS + 1) if q is None else q
    kv = blocks(size=q.shape[-1], dtype=q.dtype) if kv is None else kv
    return lambda: attend(ROWS, q=q, kv=kv, **changes)


def rotates(size: int = SIZE, dtype: torch.dtype = torch.float32, **changes: Any) -> Callable[[], None]:
    given = {
        "q": heads(size=size, dtype=dtype),
        "k": heads(KV_HEADS, size, dtype),
        "v": heads(KV_HEADS, size, dtype),
        "kv": blocks(size=size, dtype=dtype),
        "cos_sin": torch.ones(40, size),
    }
    return lambda: rotate(ROWS, **(given | changes))


DOUBLE = torch.float64
MISALIGNED = "must begin at a multiple of 16 bytes, got .* at 0x"
REFUSED: list[tuple[str, Callable[[], None]]] = [
    # attention
    (f"q {MISALIGNED}", attends(shifted(ROWS + 1, HEADS, SIZE))),
    (f"kv {MISALIGNED}", attends(kv=shifted(200, 2, KV_HEADS, SLOTS, SIZE))),
    (
        r"q must be contiguous, got float32 \[4, 4, 16\] with strides",
        attends(heads(2 * HEADS, rows=4)[:, ::2]),
    ),
    ("q must be float32, bfloat16 or float16 on a GPU, got float64", attends(heads(rows=4, dtype=DOUBLE))),
    (r"q must have heads of 8 to 256 elements, got float32 \[4, 4, 6\]", attends(heads(size=6, rows=4))),
    (r"q must have heads of 8 to 256 elements, got float32 \[4, 4, 264\]", attends(heads(size=264, rows=4))),
    ("kv must have blocks of 16, 32 or 64 positions on a GPU, got 48", attends(kv=blocks(slots=48))),
    ("kv must have blocks of 16, 32 or 64 positions on a GPU, got 128", attends(kv=blocks(slots=128))),
    (
        "q must have at most 128 heads per KV head, got 129 / 1",
        attends(heads(129, rows=4), blocks(kv_heads=1)),
    ),
    ("kv must have q's dtype torch.float32, got torch.bfloat16", attends(kv=blocks(dtype=torch.bfloat16))),
    ("window must be at least 1 or None, got 0", attends(window=0)),
    ("softcap must be a positive number or None, got -1.0", attends(softcap=-1.0)),
    ("block_tables names block .*, kv has 2", attends(kv=blocks()[:2])),
    (
        "block_tables must be 126 wide for position 2002, got 1",
        attends(block_tables=ints(0, 0, dtype=torch.int32)[:, None]),
    ),
    # rope
    ("q must be .* a multiple of 8 up to 256, got float32 .*, 12", rotates(12)),
    ("q must be .* a multiple of 8 up to 256, got float32 .*, 264", rotates(264)),
    ("q must be float32, bfloat16 or float16 on a GPU, got float64", rotates(dtype=DOUBLE)),
    (f"q {MISALIGNED}", rotates(q=shifted(ROWS, HEADS, SIZE))),
    (f"k {MISALIGNED}", rotates(k=shifted(ROWS, KV_HEADS, SIZE))),
    (f"v {MISALIGNED}", rotates(v=shifted(ROWS, KV_HEADS, SIZE))),
    (f"kv {MISALIGNED}", rotates(kv=shifted(BLOCKS, 2, KV_HEADS, SLOTS, SIZE))),
    (f"cos_sin {MISALIGNED}", rotates(cos_sin=shifted(40, SIZE))),
    (
        f"q_weight {MISALIGNED}",
        rotates(norms=HeadNorms(shifted(SIZE), torch.ones(SIZE), 1e-6)),
    ),
    (
        r"k_weight must be contiguous \[16\] in float32 or q's dtype, both alike, got bfloat16",
        rotates(norms=HeadNorms(torch.ones(SIZE), torch.ones(SIZE).bfloat16(), 1e-6)),
    ),
    ("q must be .* with strides", rotates(q=heads(2 * HEADS)[:, ::2])),
    ("each block of kv must be contiguous", rotates(kv=blocks(size=2 * SIZE)[..., :SIZE])),
    ("slot 640 is beyond the 40 blocks", rotates(kv=blocks()[:BLOCKS], slots=ints(5, -1, 640))),
    (r"positions 30 \.\. 32 are not all in the 31 rows of cos_sin", rotates(cos_sin=torch.ones(31, SIZE))),
    # norms and gates
    *(
        case
        for call in (norm, add_norm)
        for case in (
            (f"x {MISALIGNED}", lambda call=call: call(ROWS, x=shifted(ROWS, 64))),
            (f"weight {MISALIGNED}", lambda call=call: call(ROWS, weight=shifted(64))),
            (
                "x must be float32, bfloat16 or float16 on a GPU, got float64",
                lambda call=call: call(
                    ROWS,
                    x=torch.ones(ROWS, 64).double(),
                    weight=torch.ones(64).double(),
                    **({"residual": torch.ones(ROWS, 64).double()} if call is add_norm else {}),
                ),
            ),
            (
                r"x must have rows of 1 to 16384 elements, got float32 \[3, 16385\]",
                lambda call=call: call(
                    ROWS,
                    x=torch.ones(ROWS, 16385),
                    weight=torch.ones(16385),
                    **({"residual": torch.ones(ROWS, 16385)} if call is add_norm else {}),
                ),
            ),
        )
    ),
    (
        "x must have the elements of a row side by side, got .* with strides",
        lambda: norm(ROWS, x=torch.ones(ROWS, 128)[:, ::2]),
    ),
    (f"residual {MISALIGNED}", lambda: add_norm(ROWS, residual=shifted(ROWS, 64))),
    (
        "residual must have the elements of a row side by side, got .* with strides",
        lambda: add_norm(ROWS, residual=torch.ones(ROWS, 128)[:, ::2]),
    ),
    *(
        case
        for call in (silu, gelu)
        for case in (
            (f"x {MISALIGNED}", lambda call=call: call(ROWS, shifted(ROWS, 64))),
            (
                "x must be float32, bfloat16 or float16 on a GPU, got float64",
                lambda call=call: call(ROWS, torch.ones(ROWS, 64).double()),
            ),
            (
                "x must have the elements of a row side by side, got .* with strides",
                lambda call=call: call(ROWS, torch.ones(ROWS, 128)[:, ::2]),
            ),
        )
    ),
    # merge
    (f"out_a {MISALIGNED}", lambda: merge_two(ROWS, out_a=shifted(ROWS, HEADS, SIZE))),
    (f"lse_b {MISALIGNED}", lambda: merge_two(ROWS, lse_b=shifted(ROWS, HEADS))),
    (
        r"out_b must be contiguous, got float32 \[3, 4, 16\] with strides",
        lambda: merge_two(ROWS, out_b=heads(2 * HEADS)[:, ::2]),
    ),
    (
        "out_a must be float32, bfloat16 or float16 on a GPU, got float64",
        lambda: merge_two(ROWS, out_a=heads().double()),
    ),
    (
        "lse_a must be float32 on a GPU, got bfloat16",
        lambda: merge_two(ROWS, lse_a=torch.ones(ROWS, HEADS).bfloat16()),
    ),
    # sampling
    *(
        case
        for call in (draw, take_highest)
        for case in (
            (
                r"logits must be contiguous float32 \[S, V\] with V > 0, got bfloat16",
                lambda call=call: call(ROWS, logits=torch.ones(ROWS, 1000).bfloat16()),
            ),
            (
                "logits must be contiguous .* with strides",
                lambda call=call: call(ROWS, logits=torch.ones(ROWS, 2000)[:, ::2]),
            ),
            (
                r"logits must be .* with V > 0, got float32 \[3, 0\]",
                lambda call=call: call(ROWS, logits=torch.ones(ROWS, 0)),
            ),
            (
                r"out must be contiguous int64 \[3\] .*, got int32",
                lambda call=call: call(ROWS, out=torch.ones(ROWS, dtype=torch.int32)),
            ),
        )
    ),
    (
        r"rows.temperature must be contiguous float32 \[3\] .*, got float32 \[2\]",
        lambda: draw(ROWS, temperature=torch.ones(2)),
    ),
    (r"rows.seed must be contiguous int64 \[3\] .*, got float32", lambda: draw(ROWS, seed=torch.ones(ROWS))),
    # gather
    ("piece_bytes must be a positive multiple of 16, got 0", lambda: copy(ROWS, piece_bytes=0)),
    ("piece_bytes must be a positive multiple of 16, got 24", lambda: copy(ROWS, piece_bytes=24)),
    ("num_programs must be at least 1, got 0", lambda: copy(ROWS, num_programs=0)),
    (
        "to must be flat uint8 of a multiple of 16 bytes, got float32",
        lambda: copy(ROWS, to=torch.zeros(4096)),
    ),
    (
        r"source must be flat uint8 of a multiple of 16 bytes, got uint8 \[40\]",
        lambda: copy(ROWS, source=torch.zeros(40, dtype=torch.uint8)),
    ),
    (f"to {MISALIGNED}", lambda: copy(ROWS, to=shifted(4096, dtype=torch.uint8))),
    (
        "source_offsets must be as many as to_offsets, 3, got 2",
        lambda: copy(ROWS, source_offsets=ints(0, 64)),
    ),
    (
        r"to_offsets must be contiguous int64 \[N\], got int32",
        lambda: copy(ROWS, to_offsets=ints(0, 64, 128, dtype=torch.int32)),
    ),
    (
        r"to_offsets must lie in 0 \.\. 4032, got 0 \.\. 4048",
        lambda: copy(ROWS, to_offsets=ints(0, 64, 4048)),
    ),
    (r"source_offsets must lie in 0 \.\. 4032, got -16", lambda: copy(ROWS, source_offsets=ints(0, -16, 64))),
    ("source_offsets must be multiples of 16, got 8", lambda: copy(ROWS, source_offsets=ints(0, 8, 64))),
    # prepare
    (f"packed {MISALIGNED}", lambda: write_step(ROWS, packed=torch.zeros(1025, dtype=torch.int32)[1:])),
    (
        r"packed must be contiguous int32 \[N\] on the host, got torch.int64",
        lambda: write_step(ROWS, packed=ints(0, 0)),
    ),
    ("num_segments must be 1 to 64, as many as tokens, got 65", lambda: write_step(65)),
    ("num_segments must be 1 to 64, as many as tokens, got 0", lambda: write_step(0)),
    (f"ids {MISALIGNED}", lambda: write_step(ROWS, ids=torch.zeros(65, dtype=torch.int64)[1:])),
    (
        r"tables must be contiguous torch.int32 \[64, 8\], got torch.int64",
        lambda: write_step(ROWS, tables=torch.zeros(64, 8, dtype=torch.int64)),
    ),
]


def fail(launch: Launch, _: object) -> None:
    pytest.fail(f"{launch.name} was launched")


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_what_a_kernel_is_not_made_for_is_refused_by_name_before_any_launch(message, call):
    with instead_of_launching(fail), pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_asks_whether_it_is_made_for_the_gpu(name, monkeypatch):
    def refuse(device: torch.device) -> None:
        raise ValueError(f"not made for {device}")

    for module in MODULES:
        if hasattr(module, "require_gpu") and module.__name__ != "kernels.gpu.launch":
            monkeypatch.setattr(module, "require_gpu", refuse)
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):  # a device is looked at once
                value.cache_clear()
    with instead_of_launching(fail), pytest.raises(ValueError, match="not made for cpu"):
        LAUNCHERS[name](ROWS)


@pytest.mark.parametrize(
    ("found", "is_refused"), [((7, 5), True), ((8, 0), False), ((9, 0), False), ((12, 0), False)]
)
def test_gpus_before_ampere_are_refused(found, is_refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    if not is_refused:
        return require_gpu(torch.device("cuda:0"))
    with pytest.raises(
        ValueError, match=r"compute capability 8\.0 or more, got 7\.5 \(Tesla T4\); use --device cpu"
    ):
        require_gpu(torch.device("cuda:0"))
