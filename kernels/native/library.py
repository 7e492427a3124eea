"""The C kernels, loaded by ctypes.  Calls take raw addresses: whoever calls has checked shapes and dtypes."""

import ctypes
from ctypes import POINTER, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

from kernels.native.build import InstructionSet, build


class AttentionArgs(ctypes.Structure):
    """struct attention of kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("q_indptr", "first_pos", "block_tables")),
        *((name, c_int64) for name in ("segments", "table_width", "heads", "kv_heads", "size", "slots")),
        *((name, c_int64) for name in ("block_stride", "window", "is_bf16", "threads")),
        ("scale", c_float),
        ("softcap", c_float),
        ("num_items", c_int64),
        *((name, c_void_p) for name in ("items", "first_state", "states")),
    )


class LinearArgs(ctypes.Structure):
    """struct linear of kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias")),
        *((name, c_int64) for name in ("outputs", "inputs")),
    )


class NormArgs(ctypes.Structure):
    """struct norm of kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "size", "x_stride", "residual_stride")),
        *((name, c_int64) for name in ("is_bf16", "weight_is_bf16", "threads")),
        ("eps", c_float),
    )


class RopeArgs(ctypes.Structure):
    """struct rope of kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("positions", "slots")),
        *(
            (name, c_int64)
            for name in ("rows", "heads", "kv_heads", "size", "slots_per_block", "block_stride")
        ),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride", "is_bf16", "threads")),
    )


class LayerArgs(ctypes.Structure):
    """struct layer of decoder_layers.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "attention_out", "gate_up", "down")),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "attention_post_norm", "mlp_norm")),
        *((name, c_void_p) for name in ("mlp_post_norm", "next_norm")),
    )


class DecoderArgs(ctypes.Structure):
    """struct decoder of decoder_layers.c."""

    _fields_ = (
        ("layers", c_void_p),
        *((name, c_int64) for name in ("num_layers", "heads", "kv_heads", "size", "hidden", "ffn")),
        *((name, c_int64) for name in ("norm_weights_are_bf16", "is_gelu", "threads")),
        ("eps", c_float),
    )


class StepArgs(ctypes.Structure):
    """struct step of decoder_layers.c."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "slots_per_block", "block_stride")),
        *((name, c_void_p) for name in ("positions", "slots", "chosen")),
        ("num_chosen", c_int64),
        *((name, c_void_p) for name in ("attention", "cos_sin", "kv", "x", "residual")),
        *((name, c_void_p) for name in ("wide", "q", "attended", "gated", "made", "lse", "seconds")),
    )


@dataclass(frozen=True, eq=False)
class Library:
    """One loaded build; tensors are passed as addresses."""

    isa: InstructionSet
    plan_attention: Any  # (AttentionArgs, memory | None) -> bytes of memory that the plan takes
    paged_attention: Any  # (AttentionArgs, q, kv, out, lse)
    rms_norm: Any  # (NormArgs, x, residual | None, weight, out, total | None)
    gate: Any  # (is_gelu, x, out, rows, size, stride, is_bf16, threads)
    rope_kv_write: Any  # (RopeArgs, q, k, v, cos_sin | None, kv, out)
    linear: Any  # (LinearArgs, x, out, rows, threads); None without dots of bf16, as are the next two
    pack_linear: Any  # (weight, packed, N, K, stride, threads)
    decoder_layers: Any  # (DecoderArgs, StepArgs, begin, end)


def load(isa: InstructionSet) -> Library:
    """Builds if need be.  Raises BuildError or OSError."""
    functions = ctypes.CDLL(str(build(isa)))
    if not functions.permitted():
        raise OSError(f"the operating system keeps the {isa.title} registers from this process")

    def function(name: str, result: Any, *arguments: Any) -> Any:
        found = functions[name]
        found.argtypes, found.restype = arguments, result
        return found

    def product(name: str, *arguments: Any) -> Any:
        return function(name, None, *arguments) if "avx512_bf16" in isa.cpu_flags else None

    return Library(
        isa,
        function("plan_attention", c_int64, POINTER(AttentionArgs), c_void_p),
        function("paged_attention", None, POINTER(AttentionArgs), *[c_void_p] * 4),
        function("rms_norm", None, POINTER(NormArgs), *[c_void_p] * 5),
        function("gate", None, c_int64, *[c_void_p] * 2, *[c_int64] * 5),
        function("rope_kv_write", None, POINTER(RopeArgs), *[c_void_p] * 6),
        product("linear", POINTER(LinearArgs), *[c_void_p] * 2, *[c_int64] * 2),
        product("pack_linear", *[c_void_p] * 2, *[c_int64] * 4),
        product("decoder_layers", POINTER(DecoderArgs), POINTER(StepArgs), *[c_int64] * 2),
    )
