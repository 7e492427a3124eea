"""Arguments that a kernel cannot work with: refused by name, with what was expected and what came, before any
native code has seen them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.linear import PackedLinear
from kernels.merge_state import merge_state
from kernels.native.build import supported
from kernels.paged_attention import AttnMeta, paged_attention
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope_kv_write
from kernels.silu_mul import gelu_mul, silu_mul
from tests.kernels.cases import needs_native, paged

ROWS, HEADS, KV_HEADS, SIZE, SLOTS = 2, 4, 2, 16, 16
NATIVE = ("plan_attention", "paged_attention", "rms_norm", "gate", "rope_kv_write")


def off_by_a_byte(x: Tensor) -> Tensor:
    memory = torch.zeros(x.nbytes + 64, dtype=torch.uint8)
    shifted = torch.frombuffer(memory.numpy(), dtype=x.dtype, count=x.numel(), offset=1)
    return shifted.view(x.shape).copy_(x)


def attend(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], **options: Any) -> Callable[[], object]:
    case = paged([ROWS], [30], heads=HEADS, kv_heads=KV_HEADS, size=SIZE, slots=SLOTS)
    q, kv = change(case.q, case.kv)
    return lambda: paged_attention(q, kv, case.meta, 0.25, **options)


def attend_by(**changes: Tensor) -> Callable[[], object]:
    case = paged([ROWS], [30], heads=HEADS, kv_heads=KV_HEADS, size=SIZE, slots=SLOTS)
    return lambda: paged_attention(case.q, case.kv, meta_of(case.meta, **changes), 0.25)


def meta_of(meta: AttnMeta, **changes: Tensor) -> AttnMeta:
    names = ("q_indptr", "first_pos", "block_tables", "positions", "slots")
    return AttnMeta(**({name: getattr(meta, name) for name in names} | changes))


def rotate(slots: tuple[int, int] = (5, -1), **changes: Tensor) -> Callable[[], object]:
    given = {
        "q": torch.randn(ROWS, HEADS, SIZE),
        "k": torch.randn(ROWS, KV_HEADS, SIZE),
        "v": torch.randn(ROWS, KV_HEADS, SIZE),
        "cos_sin": torch.randn(40, SIZE),
        "kv": torch.zeros(3, 2, KV_HEADS, SLOTS, SIZE),
    } | changes
    meta = meta_of(paged([ROWS], [30]).meta, slots=torch.tensor(slots))
    return lambda: rope_kv_write(*(given[name] for name in ("q", "k", "v", "cos_sin", "kv")), meta)


def merge(**changes: Tensor) -> Callable[[], object]:
    out, lse = torch.randn(ROWS, HEADS, SIZE), torch.randn(ROWS, HEADS)
    return lambda: merge_state(**({"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse} | changes))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


X, WEIGHT = torch.randn(2, 8), torch.ones(8)
REFUSED: list[tuple[str, Callable[[], object]]] = [
    # paged_attention
    (r"q must be \[T, H, D\] .* got float32 \[2, 64\]", attend(lambda q, kv: (q.flatten(1), kv))),
    ("with an even D, got float32 .*2, 4, 15", attend(lambda q, kv: (q[..., :15], kv[..., :15]))),
    ("q must be .* a float dtype .* got int64", attend(lambda q, kv: (q.long(), kv.long()))),
    ("kv must have q's dtype torch.float32, got torch.bfloat16", attend(lambda q, kv: (q, kv.bfloat16()))),
    (r"kv must be \[B, 2, G, P, 16\] .* got \[5, 2, 2, 16\]", attend(lambda q, kv: (q, kv[..., 0]))),
    (r"kv must be \[B, 2, G, P, 16\] .* got \[5, 1, ", attend(lambda q, kv: (q, kv[:, :1]))),
    ("a G that divides 3", attend(lambda q, kv: (q[:, :3], kv))),
    ("each block of kv must be contiguous", attend(lambda q, kv: (q, kv.mT.contiguous().mT))),
    ("each block of kv must be contiguous", attend(lambda q, kv: (q[..., :8], kv[..., :8]))),
    ("kv must begin at a multiple of 4 bytes, got 0x", attend(lambda q, kv: (q, off_by_a_byte(kv)))),
    ("window must be at least 1 or None, got 0", attend(lambda q, kv: (q, kv), window=0)),
    (r"softcap must be a positive number or None, got 0\.0", attend(lambda q, kv: (q, kv), softcap=0.0)),
    (r"q_indptr must ascend from 0 to 2 rows, got \[0, 1\]", attend_by(q_indptr=int32(0, 1))),
    (
        r"q_indptr must be contiguous torch.int32 \[2\], got torch.int64",
        attend_by(q_indptr=torch.zeros(2).long()),
    ),
    ("positions must ascend by one from first_pos", attend_by(first_pos=int32(29))),
    ("block_tables must be 2 wide for position 31, got 1", attend_by(block_tables=int32(0)[None])),
    ("block_tables names block 99, kv has 5", attend_by(block_tables=int32(0, 99)[None])),
    ("block_tables must be contiguous", attend_by(block_tables=int32(0, 9, 1, 9)[None, ::2])),
    # rope_kv_write
    (r"q must be \[T, H, D\] .* got float32 \[2, 64\]", rotate(q=torch.randn(2, 64))),
    ("with an even D, got float32 .*2, 4, 15", rotate(q=torch.randn(2, 4, 15))),
    (r"k must be float32 \[2, 2, 16\] .* got float32 \[2, 1, 16\]", rotate(k=torch.randn(2, 1, 16))),
    (r"v must be float32 \[2, 2, 16\] .* got float64", rotate(v=torch.randn(2, 2, 16).double())),
    ("v must be .* with strides", rotate(v=torch.randn(2, 16, 2).mT)),
    ("k must be .* misaligned at 0x", rotate(k=off_by_a_byte(torch.randn(2, 2, 16)))),
    (r"kv must be \[B, 2, G, P, 16\] .* got float32 \[3, 2, 2, 16\]", rotate(kv=torch.zeros(3, 2, 2, 16))),
    (r"kv must be .* got float32 \[3, 2, 2, 16, 8\]", rotate(kv=torch.zeros(3, 2, 2, 16, 8))),
    ("each block of kv must be contiguous", rotate(kv=torch.zeros(3, 2, 2, 16, 32)[..., :16])),
    (
        r"cos_sin must be contiguous float32 \[M, 16\], got bfloat16",
        rotate(cos_sin=torch.ones(40, 16).bfloat16()),
    ),
    (
        r"cos_sin must be contiguous float32 \[M, 16\], got float32 \[40, 8\]",
        rotate(cos_sin=torch.ones(40, 8)),
    ),
    (r"positions 30 \.\. 31 are not all in the 31 rows of cos_sin", rotate(cos_sin=torch.ones(31, 16))),
    ("slot 48 is beyond the 3 blocks of 16 slots of kv", rotate(slots=(5, 48))),
    # norms
    (r"x must be \[\.\.\., N\] of a float dtype, got int64", lambda: rms_norm(X.long(), WEIGHT.long(), 1e-6)),
    ("x must be .* misaligned at 0x", lambda: rms_norm(off_by_a_byte(X), WEIGHT, 1e-6)),
    (
        r"weight must be contiguous \[8\] .* got float32 \[7\] for x float32",
        lambda: rms_norm(X, WEIGHT[:7], 1e-6),
    ),
    ("weight must be .* in float32 or x's dtype, got bfloat16", lambda: rms_norm(X, WEIGHT.bfloat16(), 1e-6)),
    ("weight must be contiguous .* with strides", lambda: rms_norm(X, torch.ones(16)[::2], 1e-6)),
    ("weight must be .* on meta", lambda: rms_norm(X, WEIGHT.to("meta"), 1e-6)),
    (r"residual must be .* got float32 \[1, 8\]", lambda: add_rms_norm(X, X[:1], WEIGHT, 1e-6)),
    ("residual must be .* got bfloat16", lambda: add_rms_norm(X, X.bfloat16(), WEIGHT, 1e-6)),
    (
        r"residual must be \[T, N\] like x float32 \[1, 2, 8\]",
        lambda: add_rms_norm(X[None], X[None], WEIGHT, 1e-6),
    ),
    # gates
    *(
        case
        for gate in (silu_mul, gelu_mul)
        for case in (
            (r"x must be \[T, 2F\] .* got float32 \[2, 7\]", lambda gate=gate: gate(torch.randn(2, 7))),
            (r"x must be \[T, 2F\] .* got float32 \[8\]", lambda gate=gate: gate(X[0])),
            ("of a float dtype, .* got int64", lambda gate=gate: gate(X.long())),
            ("x must be .* misaligned at 0x", lambda gate=gate: gate(off_by_a_byte(X))),
        )
    ),
    # merge_state
    (
        r"out_a and out_b must be \[T, H, D\], got out_b float32 \[2, 1, 16\]",
        merge(out_b=torch.ones(2, 1, 16)),
    ),
    (r"lse_a must be float32 \[2, 4\], got float32 \[2, 1\]", merge(lse_a=torch.ones(2, 1))),
    (r"lse_b must be float32 \[2, 4\], got bfloat16", merge(lse_b=torch.ones(2, 4).bfloat16())),
    # PackedLinear
    (r"weight must be \[N, K\]", lambda: PackedLinear(torch.randn(8))),
    (
        r"bias \[N\] of its dtype, .* torch.float64 \[8\]",
        lambda: PackedLinear(torch.randn(8, 8), WEIGHT.double()),
    ),
    (
        r"x must be torch.float32 \[T, 8\], got torch.bfloat16",
        lambda: PackedLinear(torch.randn(8, 8))(X.bfloat16()),
    ),
    (
        r"x must be torch.float32 \[T, 8\], got torch.float32 \[8\]",
        lambda: PackedLinear(torch.randn(8, 8))(X[0]),
    ),
]


IDS = [message for message, _ in REFUSED]


@contextmanager
def no_native_call() -> Iterator[None]:
    """The best build, of which no function may be called."""

    def called(*_: object) -> None:
        pytest.fail("native code was called")

    with dispatch.use("native", supported()[0]):
        choice = dispatch._override
        assert choice is not None and choice.library is not None
        guarded = replace(choice.library, **dict.fromkeys(NATIVE, called))
        before, dispatch._override = choice, replace(choice, library=guarded)
        try:
            yield
        finally:
            dispatch._override = before


@needs_native
@pytest.mark.parametrize(("message", "call"), REFUSED, ids=IDS)
def test_bad_arguments_are_refused_by_name_before_any_native_call(
    message: str, call: Callable[[], object]
) -> None:
    with no_native_call(), pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=IDS)
def test_torch_refuses_them_in_the_same_words(message: str, call: Callable[[], object]) -> None:
    with dispatch.use("torch"), pytest.raises(ValueError, match=message):
        call()


@needs_native
def test_a_layer_with_another_cache_is_looked_at_anew() -> None:
    """What is checked once per step holds for the layers that are alike, no others."""
    case = paged([ROWS], [30], heads=HEADS, kv_heads=KV_HEADS, size=SIZE, slots=SLOTS)
    paged_attention(case.q, case.kv, case.meta, 0.25)
    wide = torch.zeros(*case.kv.shape[:3], SLOTS, 2 * SIZE)[..., :SIZE]
    with no_native_call():
        for kv in (case.kv[:1], case.kv.bfloat16(), wide, off_by_a_byte(case.kv)):
            with pytest.raises(ValueError, match="kv"):
                paged_attention(case.q, kv, case.meta, 0.25)
