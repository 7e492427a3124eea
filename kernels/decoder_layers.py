"""The layers of a rotary decoder, between embedding and head: for the rows of one step over a paged KV cache.

Where all that a layer consists of is native, whole layers run in one call (native/decoder_layers.c): a
hundred small operations called one by one cost a decode step of a small model a tenth of its time.  Elsewhere
they are called like that; the bits are the same.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kernels import dispatch
from kernels.linear import PackedLinear
from kernels.marks import Mark, unmarked
from kernels.native.library import DecoderArgs, LayerArgs, Library, StepArgs
from kernels.paged_attention import AttnMeta, attention_plan, native_covers, paged_attention
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import HeadNorms, check_places, rope_kv_write
from kernels.silu_mul import gelu_mul

_ALIGNMENT = 64  # bytes, of each buffer
_WORTH_THREADS = 1 << 20  # weights of a layer: below this, threads wait for each other longer than they work


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer, N = hidden size, F = ffn size.  Norms in the model's dtype or fp32, all alike."""

    attention_norm: Tensor  # [N]
    qkv: PackedLinear  # N -> (H + 2G) * D: queries, keys, values
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    attention_out: PackedLinear  # H * D -> N
    attention_post_norm: Tensor | None  # [N], of what attention gives
    mlp_norm: Tensor  # [N]
    gate_up: PackedLinear  # N -> 2F, the gate first
    down: PackedLinear  # F -> N
    mlp_post_norm: Tensor | None  # [N], of what the mlp gives
    angles: int  # which of a step's angle tables turns its queries and keys
    window: int | None  # of its attention


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What is the same for all layers: H, G, D, the norms' epsilon, and attention's scale and soft cap."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    attention_scale: float
    attention_softcap: float | None
    gate: Callable[[Tensor], Tensor]  # silu_mul or gelu_mul


class DecoderLayers:
    def __init__(self, shape: LayerShape, layers: Sequence[Layer], final_norm: Tensor) -> None:
        self._shape, self._layers = shape, tuple(layers)
        # The norm behind each layer's residual addition belongs to the next one.
        self._next_norms = (*(layer.attention_norm for layer in self._layers[1:]), final_norm)
        self._heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        self._native: _NativeLayers | None = None
        first = self._layers[0]
        linears = first.qkv, first.attention_out, first.gate_up, first.down  # one like another in every layer
        self._are_native = all(linear.native_args is not None for linear in linears)

    def __call__(
        self,
        residual: Tensor,
        meta: AttnMeta,
        kv: Sequence[Tensor],
        angles: Sequence[Tensor | None],
        rows: Tensor,
        wait_for: Callable[[int], None] | None = None,
        mark: Mark = unmarked,
    ) -> Tensor:
        """residual: [T, N], the embedded ids; kv: [B, 2, G, P, D] of each layer, written to at meta.slots;
        angles: [M, D] fp32 each, cosines and sines as in rope.py, or None for layers that do not rotate.

        Returns [R, N], what the final norm gives for `rows`: [R] int64, ascending indices into the step.  All
        K and V of a layer are written before its attention, so segments of one conversation may attend to
        each other.  Before a layer touches its `kv` it calls `wait_for` with its number.  `residual` may be
        overwritten.  Raises ValueError for arguments that do not fit together.
        """
        self._check(residual, kv, rows)
        x = rms_norm(residual, self._layers[0].attention_norm, self._shape.norm_eps)
        mark("rest")
        library = None if dispatch.is_triton(x) else dispatch.library()
        if (
            library is not None
            and library.decoder_layers is not None
            and self._are_native
            and native_covers(x.dtype, self._shape.head_dim, kv[0].shape[3])
        ):
            if self._native is None or self._native.library is not library:
                self._native = _NativeLayers(library, self._shape, self._layers, self._next_norms)
            return self._native(x, residual, meta, kv, angles, rows, wait_for, mark)
        return self._one_by_one(x, residual, meta, kv, angles, rows, wait_for, mark)

    def _check(self, residual: Tensor, kv: Sequence[Tensor], rows: Tensor) -> None:
        """What native layers take for granted beyond what its kernels check."""
        first = self._layers[0].qkv
        fits = residual.dtype == first.dtype and residual.shape[1:] == (first.in_features,)
        if not fits or not residual.is_contiguous():
            given = f"{residual.dtype} {list(residual.shape)} with strides {residual.stride()}"
            wanted = f"contiguous {first.dtype} [T, {first.in_features}]"
            raise ValueError(f"residual must be {wanted}, got {given}")
        if len(kv) != len(self._layers):
            raise ValueError(f"kv must be of {len(self._layers)} layers, got {len(kv)}")
        for i, layer in enumerate(kv):
            if (layer.shape, layer.stride(), layer.dtype) != (kv[0].shape, kv[0].stride(), residual.dtype):
                wanted = f"{residual.dtype} {list(kv[0].shape)} with strides {kv[0].stride()}"
                given = f"{layer.dtype} {list(layer.shape)} with {layer.stride()}"
                raise ValueError(f"each layer of kv must be {wanted}, got {given} in layer {i}")
        if rows.device.type != "cpu":  # to read them here would be to wait for the device
            return
        chosen = rows.tolist()
        if rows.dtype != torch.int64 or any(b <= a for a, b in pairwise([-1, *chosen, len(residual)])):
            raise ValueError(
                f"rows must be int64 ascending indices into {len(residual)} rows, got {rows.dtype} {chosen}"
            )

    def _one_by_one(
        self,
        x: Tensor,
        residual: Tensor,
        meta: AttnMeta,
        kv: Sequence[Tensor],
        angles: Sequence[Tensor | None],
        rows: Tensor,
        wait_for: Callable[[int], None] | None,
        mark: Mark,
    ) -> Tensor:
        eps, last = self._shape.norm_eps, self._layers[-1]
        layers = zip(self._layers, kv, self._next_norms, strict=True)
        for i, (layer, layer_kv, next_norm) in enumerate(layers):
            if wait_for is not None:
                wait_for(i)
                mark("copies")
            x = self._attend(layer, x, layer_kv, meta, angles[layer.angles], mark)
            if layer is last:  # the other rows have left their K and V; nothing else of them is needed
                x, residual = x.index_select(0, rows), residual.index_select(0, rows)
            x = layer.attention_out(x)
            mark("linears")
            if layer.attention_post_norm is not None:
                x = rms_norm(x, layer.attention_post_norm, eps)
            x, residual = add_rms_norm(x, residual, layer.mlp_norm, eps)
            mark("rest")
            x = layer.gate_up(x)
            mark("linears")
            x = self._shape.gate(x)
            mark("rest")
            x = layer.down(x)
            mark("linears")
            if layer.mlp_post_norm is not None:
                x = rms_norm(x, layer.mlp_post_norm, eps)
            x, residual = add_rms_norm(x, residual, next_norm, eps)
            mark("rest")
        return x

    def _attend(
        self, layer: Layer, x: Tensor, kv: Tensor, meta: AttnMeta, cos_sin: Tensor | None, mark: Mark
    ) -> Tensor:
        """x: [T, N] -> [T, H * D]."""
        shape = self._shape
        fused = layer.qkv(x)
        mark("linears")
        heads = fused.view(x.shape[0], -1, shape.head_dim)
        q, k, v = heads.split_with_sizes(self._heads, dim=1)  # half the cost of torch.split
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = HeadNorms(layer.q_norm, layer.k_norm, shape.norm_eps)
        q = rope_kv_write(q, k, v, cos_sin, kv, meta, norms)
        mark("rest")
        scale, softcap = shape.attention_scale, shape.attention_softcap
        out, _ = paged_attention(q, kv, meta, scale, layer.window, softcap)
        mark("attention")
        return out.view(x.shape[0], -1)


class _NativeLayers:
    """The same in native code, many layers in one call."""

    def __init__(
        self, library: Library, shape: LayerShape, layers: Sequence[Layer], next_norms: Sequence[Tensor]
    ) -> None:
        self.library, self._shape = library, shape
        self._layers, self._next_norms = layers, next_norms  # C has their addresses
        self._windows = {layer.window for layer in layers}
        first = layers[0]
        self._hidden, self._ffn = first.qkv.in_features, first.down.in_features
        weights = (LayerArgs * len(layers))()
        for args, layer, next_norm in zip(weights, layers, next_norms, strict=True):
            for name in ("qkv", "attention_out", "gate_up", "down"):
                setattr(args, name, ctypes.addressof(getattr(layer, name).native_args))
            for name in ("q_norm", "k_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"):
                setattr(args, name, _address(getattr(layer, name)))
            args.next_norm = _address(next_norm)
        num_weights = sum(p.out_features * p.in_features for p in (first.qkv, first.gate_up, first.down))
        self._is_worth_threads = num_weights >= _WORTH_THREADS
        self._args = DecoderArgs(
            layers=ctypes.addressof(weights),
            num_layers=len(layers),
            heads=shape.num_heads,
            kv_heads=shape.num_kv_heads,
            size=shape.head_dim,
            hidden=self._hidden,
            ffn=self._ffn,
            norm_weights_are_bf16=first.attention_norm.dtype == torch.bfloat16,
            is_gelu=shape.gate is gelu_mul,
            eps=shape.norm_eps,
        )
        self._weights = weights
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        meta: AttnMeta,
        kv: Sequence[Tensor],
        angles: Sequence[Tensor | None],
        rows: Tensor,
        wait_for: Callable[[int], None] | None,
        mark: Mark,
    ) -> Tensor:
        shape, count = self._shape, len(self._layers)
        for cos_sin in angles:
            check_places(cos_sin, kv[0], meta, len(x), shape.head_dim)
        q_shape = len(x), shape.num_heads, shape.head_dim
        scale, softcap = shape.attention_scale, shape.attention_softcap
        plans = {
            window: attention_plan(self.library, q_shape, x.dtype, kv[0], meta, scale, window, softcap)
            for window in self._windows
        }
        pointers = [
            (ctypes.c_void_p * count)(*addresses)
            for addresses in (
                [ctypes.addressof(plans[layer.window].contents) for layer in self._layers],
                [_address(angles[layer.angles]) for layer in self._layers],
                [layer_kv.data_ptr() for layer_kv in kv],
            )
        ]
        seconds = (ctypes.c_double * 2)()
        step = StepArgs(
            *(len(x), kv[0].shape[3], kv[0].stride(0)),
            *(meta.positions.data_ptr(), meta.slots.data_ptr(), rows.data_ptr(), len(rows)),
            *map(ctypes.addressof, pointers),
            *(x.data_ptr(), residual.data_ptr(), *self._buffers(len(x))),
            ctypes.addressof(seconds),
        )
        threads = torch.get_num_threads()
        self._args.threads = threads if self._is_worth_threads else 1
        for begin, end in [(0, count)] if wait_for is None else pairwise(range(count + 1)):
            if wait_for is not None:
                wait_for(begin)
                mark("copies")
            self.library.decoder_layers(self._args, step, begin, end)
            mark("linears", seconds[0])
            mark("attention", seconds[1])
            mark("rest")
            seconds[0] = seconds[1] = 0.0
        return x[: len(rows)]

    def _buffers(self, rows: int) -> list[int]:
        """Addresses of the buffers at the end of StepArgs."""
        shape, q_size = self._shape, self._shape.num_heads * self._shape.head_dim
        wide = max(q_size + 2 * shape.num_kv_heads * shape.head_dim, 2 * self._ffn)
        sizes = [2 * rows * size for size in (wide, q_size, q_size, self._ffn, self._hidden)]
        sizes.append(4 * rows * shape.num_heads)
        starts = list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=_ALIGNMENT))
        if self._memory.numel() < starts[-1]:
            self._memory = torch.empty(starts[-1], dtype=torch.uint8)
        begin = self._memory.data_ptr() // _ALIGNMENT * _ALIGNMENT
        return [begin + start for start in starts[:-1]]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
