"""The C kernels, loaded by ctypes.  Calls take raw addresses: whoever calls has checked shapes and dtypes."""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

from kernels.native.build import InstructionSet, build


class AttentionArgs(ctypes.Structure):
    """struct attention of attention.c, where the fields are explained."""

    _fields_ = (
        *((name, c_void_p) for name in ("q_indptr", "first_pos", "block_tables")),
        *((name, c_int64) for name in ("segments", "table_width", "heads", "kv_heads", "size", "slots")),
        *((name, c_int64) for name in ("block_stride", "window", "is_bf16", "threads")),
        ("scale", c_float),
        ("softcap", c_float),
    )


class LinearArgs(ctypes.Structure):
    """struct linear of linear.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias")),
        *((name, c_int64) for name in ("outputs", "inputs")),
    )


class NormArgs(ctypes.Structure):
    """struct norm of rowwise.c."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "size", "x_stride", "residual_stride")),
        *((name, c_int64) for name in ("is_bf16", "weight_is_bf16", "threads")),
        ("eps", c_float),
    )


class RopeArgs(ctypes.Structure):
    """struct rope of rowwise.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("positions", "slots")),
        *(
            (name, c_int64)
            for name in ("rows", "heads", "kv_heads", "size", "slots_per_block", "block_stride")
        ),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride", "is_bf16", "threads")),
    )


@dataclass(frozen=True, eq=False)
class Library:
    """One loaded build; tensors are passed as addresses."""

    isa: InstructionSet
    paged_attention: Any  # (AttentionArgs, q, kv, out, lse) -> 0, or -1 when memory runs out
    rms_norm: Any  # (NormArgs, x, residual | None, weight, out, total | None)
    silu_mul: Any  # (x, out, rows, size, stride, is_bf16, threads)
    gelu_mul: Any  # the same
    rope_kv_write: Any  # (RopeArgs, q, k, v, cos_sin | None, kv, out)
    linear: Any  # (LinearArgs, x, out, rows, threads); None without dots of bf16
    pack_linear: Any  # (weight, packed, N, K, stride, threads); the same


def load(isa: InstructionSet) -> Library:
    """Builds if need be.  Raises BuildError or OSError."""
    functions = ctypes.CDLL(str(build(isa)))
    if not functions.permitted():
        raise OSError(f"the operating system keeps the {isa.title} registers from this process")

    def function(name: str, result: Any, *arguments: Any) -> Any:
        found = functions[name]
        found.argtypes, found.restype = arguments, result
        return found

    has_dots = "avx512_bf16" in isa.cpu_flags
    return Library(
        isa,
        function("paged_attention", c_int, POINTER(AttentionArgs), *[c_void_p] * 4),
        function("rms_norm", None, POINTER(NormArgs), *[c_void_p] * 5),
        function("silu_mul", None, *[c_void_p] * 2, *[c_int64] * 5),
        function("gelu_mul", None, *[c_void_p] * 2, *[c_int64] * 5),
        function("rope_kv_write", None, POINTER(RopeArgs), *[c_void_p] * 6),
        function("linear", None, POINTER(LinearArgs), *[c_void_p] * 2, *[c_int64] * 2) if has_dots else None,
        function("pack_linear", None, *[c_void_p] * 2, *[c_int64] * 4) if has_dots else None,
    )
