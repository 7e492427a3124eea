"""Models: a folder in Hugging Face format becomes a `Decoder`.

    config.py      config.json -> ModelConfig: the switches this model sets; families.py has what an
                   architecture decides by itself, layer_attention.py and rope_scaling.py what each layer
                   does for itself; fields.py reads JSON with checks
    checkpoint.py  safetensors files: every tensor by name, mapped, checked against what the model needs
    weights.py     the names; fusing and packing -> Decoder
    decoder.py     the forward pass of a ragged step over paged KV; rope.py its angles; opt.py that of OPT
    dtype.py       the number format when nobody has said, and those that a device has

Light on import: reading a config needs no torch, and `load_model` brings it in when called.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from engine.models.decoder import Decoder


def load_model(folder: Path, dtype: "torch.dtype", device: "torch.device | None" = None) -> "Decoder":
    """On `device`, or else the CPU.  Raises ModelFolderError (what is wrong with the folder) or ConfigError
    (a dtype of no use there, or too little memory).
    """
    import torch

    from engine.models.weights import load_decoder

    return load_decoder(folder, dtype, device or torch.device("cpu"))
