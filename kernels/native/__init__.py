"""The C kernels, loaded by ctypes.  The calls take raw addresses: whoever calls has checked shapes and dtypes."""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

from kernels.native.build import InstructionSet, build


class AttentionArgs(ctypes.Structure):
    """struct attention of attention.c, where the fields are explained."""

    _fields_ = (
        ("q_indptr", c_void_p),
        ("first_pos", c_void_p),
        ("block_tables", c_void_p),
        ("segments", c_int64),
        ("table_width", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("size", c_int64),
        ("slots", c_int64),
        ("block_stride", c_int64),
        ("window", c_int64),
        ("is_bf16", c_int64),
        ("threads", c_int64),
        ("scale", c_float),
    )


@dataclass(frozen=True, eq=False)
class Library:
    """One loaded build."""

    isa: InstructionSet
    paged_attention: Any  # (AttentionArgs, q, kv, out, lse) -> 0, or -1 when memory runs out


def load(isa: InstructionSet) -> Library:
    """Builds if need be.  Raises BuildError or OSError."""
    functions = ctypes.CDLL(str(build(isa)))
    if not functions.permitted():
        raise OSError(f"the kernel refuses {isa.title} registers to this process")
    paged_attention = functions.paged_attention
    paged_attention.argtypes, paged_attention.restype = [POINTER(AttentionArgs), *[c_void_p] * 4], c_int
    return Library(isa, paged_attention)
