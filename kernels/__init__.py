"""The operations a decoder is made of, each with its contract, its torch reference and its fast form.

    paged_attention   ragged rows over a paged KV cache -> (out, lse)      AttnMeta, paged_attention
    merge_state       join attention over disjoint parts of a cache        merge_state
    rope              rotate q and k, write k and v into their slots       rope_kv_write
    rms_norm          RMSNorm, alone or after a residual addition          rms_norm, add_rms_norm
    silu_mul          gated activation over one fused tensor               silu_mul
    linear            weights packed once for many small products          PackedLinear
    decoder_layers    the layers of a decoder, in one native call          DecoderLayers
    prepare           a step's tensors from one packed struct             prepare, StepTensors, Struct
    sampling          seeded draws that do not depend on batch mates       sample, SamplingRows
    dispatch          which implementation runs, and why                   implementation, describe, use

`native/` has the C sources, `gpu/` the Triton kernels.  `marks` names what a step's time goes to.

Axis letters: T rows (tokens) of a step, S segments, H query heads, G KV heads, D head size, B device blocks,
P slots per block.  Import the modules themselves: this one stays light, because libraries that look for
another distribution of the same name import it to read its version.
"""

__version__ = "0.1.0"
