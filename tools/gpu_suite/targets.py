"""What is timed, and the times to beat on an H200 in bfloat16.

`accept` is what a kernel must reach, `good` what it should; both in microseconds, or in TFLOP/s of a causal
prefill, whose work grows with the square of its length.  They follow from what others were seen to reach: a
decode kernel of TileLang on that part (135 us at 32 x 4k), FlashAttention-3 within vLLM (41.6, 132.7 and
253.5 us at 8 x 4k, 16k and 32k; 27.2 and 43.5 us at 1 x 16k and 32k; 11 us at 1 x 1k), FlashAttention-3's own
602 and 460 TFLOP/s on an H100; and what moves bytes only is to reach four fifths of a copy's 4.3 TB/s.  Where
there is no such figure there is no time to beat.
"""

from dataclasses import dataclass

COPY_TBPS = 4.3  # reads and writes together, of a large copy on an H200
MATMUL_TFLOPS = 790.0  # bfloat16, random values, on an H200; measured again by the suite
SWAP_IN_GBPS = 45.0, 51.0  # accept, good: 256 pieces of 64 tokens of a layer, 8B shape, host to device
STEP_GAP_MS = 0.3, 0.1  # accept, good: the device idle between two steps, 0.5B shape, 64 decoding

LLAMA_8B = (32, 8, 128)  # query heads, KV heads, head size
QWEN_HALF_B = (14, 2, 64)
_EIGHTY_PERCENT_ACCEPT, _NINETY_PERCENT_GOOD = 0.8, 0.9  # of a copy's bandwidth


@dataclass(frozen=True)
class Attention:
    """Segments of `new` rows behind `cached` positions."""

    name: str
    new: tuple[int, ...]
    cached: tuple[int, ...]
    heads: tuple[int, int, int]
    accept_us: float
    good_us: float


@dataclass(frozen=True)
class RowWise:
    """`rows` of `width` (elements, or tokens of a vocabulary) for a kernel that works row by row."""

    name: str
    kernel: str
    rows: int
    width: int
    accept_us: float | None = None
    good_us: float | None = None


def _decode(
    batch: int, context: int, heads: tuple[int, int, int], accept_us: float, good_us: float
) -> Attention:
    length = f"{context // 1024}k"
    name = f"decode {batch} x {length}, {heads[0]}/{heads[1]} x {heads[2]}"
    return Attention(name, (1,) * batch, (context - 1,) * batch, heads, accept_us, good_us)


def _prefill(length: int, heads: tuple[int, int, int], accept: float, good: float) -> Attention:
    """`accept` and `good` in TFLOP/s."""
    flops = 2 * heads[0] * heads[2] * length * (length + 1)
    name = f"prefill 1 x {length // 1024}k, {heads[0]}/{heads[1]} x {heads[2]}"
    return Attention(name, (length,), (0,), heads, flops / accept / 1e6, flops / good / 1e6)


def _mixed() -> Attention:
    """The sum of its bytes at 3.6 TB/s, 1.5 and 1.2 times."""
    contexts = (32 * 1024, *[512] * 63)
    ideal_us = sum(contexts) * 2 * 8 * 128 * 2 / 3.6e6
    cached = tuple(context - 1 for context in contexts)
    name = "decode 1 x 32k + 63 x 512, 32/8 x 128"
    return Attention(name, (1,) * 64, cached, LLAMA_8B, 1.5 * ideal_us, 1.2 * ideal_us)


ATTENTION = (
    _decode(32, 4096, LLAMA_8B, 160, 140),
    _decode(8, 4096, LLAMA_8B, 55, 45),
    _decode(8, 16384, LLAMA_8B, 160, 140),
    _decode(8, 32768, LLAMA_8B, 300, 265),
    _decode(1, 16384, LLAMA_8B, 36, 28),
    _decode(1, 32768, LLAMA_8B, 56, 45),
    _decode(1, 1024, LLAMA_8B, 14, 10),
    _decode(1, 1024, (32, 4, 128), 14, 10),
    _mixed(),
    _decode(64, 2048, QWEN_HALF_B, 30, 22),
    Attention("extend 16 x 64 behind 8k, 32/8 x 128", (64,) * 16, (8192,) * 16, LLAMA_8B, 480, 390),
    _prefill(8192, LLAMA_8B, 350, 420),
    _prefill(8192, (32, 8, 64), 280, 340),
)

_ROPE_BYTES = 8192 * (32 + 2 * 8) * 128 * 2 * 2  # rows of q, k and v, read and written
ROWWISE = (
    RowWise(
        "rope_kv_write 8k rows, 32/8 x 128",
        *("rope_kv_write", 8192, 128),
        accept_us=_ROPE_BYTES / COPY_TBPS / _EIGHTY_PERCENT_ACCEPT / 1e6,
        good_us=_ROPE_BYTES / COPY_TBPS / _NINETY_PERCENT_GOOD / 1e6,
    ),
    RowWise("rope_kv_write 64 rows, 32/8 x 128", "rope_kv_write", 64, 128, accept_us=4.0, good_us=3.0),
    RowWise("add_rms_norm 8k rows of 4096", "add_rms_norm", 8192, 4096),
    RowWise("add_rms_norm 64 rows of 4096", "add_rms_norm", 64, 4096),
    RowWise("silu_mul 8k rows of 14336", "silu_mul", 8192, 14336),
    RowWise("silu_mul 64 rows of 14336", "silu_mul", 64, 14336),
    RowWise("sampling greedy 64 x 152k", "greedy", 64, 151936),
    RowWise("sampling top-k 50, top-p 0.9, 64 x 152k", "drawn", 64, 151936),
)
