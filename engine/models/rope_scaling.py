"""How RoPE is stretched beyond the context a model was first trained on: the kinds, and how they are read."""

import math
from dataclasses import dataclass

from engine.errors import ModelFolderError
from engine.models.fields import Fields


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every rotation is slowed by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Of Llama 3.1: slow rotations are slowed further by `factor`, fast ones kept, others blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Blended too, but evenly over the indices of pairs; queries and keys grow by `attention_factor`."""

    factor: float
    original_max_positions: int
    beta_fast: float  # pairs that turn this often within the original context, or more, are kept
    beta_slow: float  # those that turn this rarely are slowed by `factor`
    truncate: bool  # the blend begins and ends at whole indices
    attention_factor: float


Scaling = LinearScaling | Llama3Scaling | YarnScaling


def read_scaling(rope: Fields, max_positions: int) -> Scaling | None:
    """From the object that describes RoPE.  Raises ModelFolderError naming what is unsupported or wrong."""
    kind = rope.value("rope_type") or rope.value("type") or "default"
    if rope.value("short_factor") is not None or kind == "longrope":
        raise ModelFolderError(
            f"{rope.path}: RoPE type {kind!r} with short_factor and long_factor is unsupported: all angles, "
            f"those of cached keys too, change when a conversation outgrows the original context"
        )
    match kind:
        case "default":
            return None
        case "dynamic":
            # Beyond max_position_embeddings the angles depend on the length of the sequence: with every token
            # all cached keys would have to be rotated anew.  The context ends there: nothing is stretched.
            rope.number("factor")
            return None
        case "linear":
            return LinearScaling(rope.number("factor"))
        case "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            if low >= high:
                raise rope.wrong("low_freq_factor", f"less than high_freq_factor, {high:g}")
            original = rope.integer("original_max_position_embeddings", max_positions)
            return Llama3Scaling(rope.number("factor"), low, high, original)
        case "yarn":
            return _yarn(rope, max_positions)
    raise ModelFolderError(
        f"{rope.path}: RoPE type {kind!r} is not supported; "
        f"supported are default, linear, dynamic, llama3 and yarn"
    )


def _yarn(rope: Fields, max_positions: int) -> YarnScaling:
    factor = rope.number("factor")
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if slow > fast:
        raise rope.wrong("beta_slow", f"at most beta_fast, {fast:g}")
    growth = _growth(factor, 1.0)
    if rope.value("mscale") and rope.value("mscale_all_dim"):
        growth = _growth(factor, rope.number("mscale")) / _growth(factor, rope.number("mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        original_max_positions=rope.integer("original_max_position_embeddings", max_positions),
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.flag("truncate", default=True),
        attention_factor=rope.number("attention_factor", growth),
    )


def _growth(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
