"""How each layer of a model attends: the positions a row sees, and the rotation that tells it where they are.

config.json says it in several spellings: one window and one RoPE for all layers, a list of layer types, a
RoPE for each type, the keys of transformers 4 and of 5.  All of them end as one `LayerAttention` per layer.
"""

from dataclasses import dataclass

from engine.errors import ModelFolderError
from engine.models.families import Family
from engine.models.fields import Fields
from engine.models.rope_scaling import Scaling, read_scaling

_FULL, _WINDOWED = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of halves: the angle of pair i grows with theta^(-2i / D) per position."""

    theta: float
    scaling: Scaling | None = None


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The row at position p sees p - window + 1 .. p, or with None every position up to p."""

    window: int | None
    rope: Rope | None  # None: queries and keys stay as they are


def read_layers(fields: Fields, family: Family) -> tuple[LayerAttention, ...]:
    """One for each layer.  Raises ModelFolderError for what is malformed, contradictory or unsupported."""
    window = _window(fields, family)
    types = _layer_types(fields, family, window)
    if window is not None and window >= fields.integer("max_position_embeddings"):
        window = None  # it reaches every position
    ropes = {kind: _rope(fields, family, kind) for kind in set(types)}
    return tuple(
        LayerAttention(
            window if kind == _WINDOWED else None, ropes[kind] if _is_rotated(fields, family, layer) else None
        )
        for layer, kind in enumerate(types)
    )


def reach(layers: tuple[LayerAttention, ...]) -> int | None:
    """The most positions that a row sees in any layer, itself included; None if some layer sees all."""
    windows = [layer.window for layer in layers]
    return None if None in windows else max(window for window in windows if window is not None)


def _window(fields: Fields, family: Family) -> int | None:
    switched_on = fields.flag("use_sliding_window")
    if family.windowed == "none":
        if switched_on:
            raise fields.wrong("use_sliding_window", "false: all layers of this architecture see everything")
        return None
    if family.switches_window and not switched_on:
        return None
    return fields.integer_or_none("sliding_window", family.window)


def _layer_types(fields: Fields, family: Family, window: int | None) -> list[str]:
    num_layers = fields.integer("num_hidden_layers")
    usual = [_FULL] * num_layers
    if window is not None:
        usual = [_WINDOWED if _is_windowed(fields, family, layer) else _FULL for layer in range(num_layers)]
    given = fields.value("layer_types")
    if given is None:
        return usual
    if not isinstance(given, list) or len(given) != num_layers or not set(given) <= {_FULL, _WINDOWED}:
        raise fields.wrong("layer_types", f"{num_layers} times {_FULL} or {_WINDOWED}")
    if family.windowed in ("none", "all") and given != usual:
        raise fields.wrong(
            "layer_types", f"{num_layers} times {usual[0]}: this architecture has no other layers here"
        )
    if window is None and _WINDOWED in given:
        size, switch = fields.value("sliding_window"), fields.value("use_sliding_window")
        raise ModelFolderError(
            f"{fields.path}: layer_types names {_WINDOWED}, but sliding_window is {size!r} and "
            f"use_sliding_window is {switch!r}: nothing says how much those layers see"
        )
    return given


def _is_windowed(fields: Fields, family: Family, layer: int) -> bool:
    if family.windowed == "upper":
        return layer >= fields.integer("max_window_layers", 28, at_least=0)
    if family.windowed == "unrotated":
        return not _is_rotated(fields, family, layer)
    if family.windowed == "cyclic":
        return (layer + 1) % fields.integer("sliding_window_pattern", family.window_cycle) != 0
    return True


def _is_rotated(fields: Fields, family: Family, layer: int) -> bool:
    """By a list of ones and zeros (zero: not rotated), or by a cycle."""
    if family.unrotated_cycle is None:
        return True
    listed = fields.value("no_rope_layers")
    if listed is None:
        return (layer + 1) % fields.integer("no_rope_layer_interval", family.unrotated_cycle) != 0
    if not isinstance(listed, list) or len(listed) <= layer or listed[layer] not in (0, 1):
        raise fields.wrong("no_rope_layers", "a list of a 1 (rotated) or a 0 (not rotated) for each layer")
    return bool(listed[layer])


def _rope(fields: Fields, family: Family, kind: str) -> Rope | None:
    """From `rope_scaling`, or from `rope_parameters`, where transformers 5 keeps it together with theta."""
    if family.rope_theta is None:
        return None
    rope = fields.group("rope_parameters" if fields.value("rope_parameters") else "rope_scaling")
    theta = fields.number("rope_theta", family.rope_theta)
    is_local = kind == _WINDOWED and family.local_rope_theta is not None
    if is_local:
        theta = fields.number("rope_local_base_freq", family.local_rope_theta)
    if is_local or rope.has(_FULL) or rope.has(_WINDOWED):
        rope = rope.group(kind)
    for holder in (fields, rope):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise holder.wrong("partial_rotary_factor", "1.0: partly rotated heads are not supported")
    return Rope(
        rope.number("rope_theta", theta), read_scaling(rope, fields.integer("max_position_embeddings"))
    )
