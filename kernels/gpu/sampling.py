"""The next token of each row, chosen on the GPU: the same token as kernels.sampling chooses, without sorting
and without the host.

Two launches, whatever the rows ask for.  In the first, many programs share a row: of every group of 128
tokens they write the highest logit and the sum of weights relative to it.  In the second, one program ends
a row with these, and reads only groups that matter: those with a token at least as high as some value.

    greedy        the first group with the highest logit, the first token in it
    all tokens    a draw by the groups' sums.  With top-p, the mass of what comes before the drawn token is
                  summed over the groups that reach it; if that is too much, a draw among those again
    top-k         the groups that reach the k-th highest of the groups' maxima hold the k tokens.  Among them,
                  searches for a logit, two of its bits at a time: by the number of tokens that reach it
                  (top-k) and by their mass (top-p, and the draw itself).  Equal logits have one weight, so
                  counting settles ties

Weights and sums of groups are fp32, all other sums fp64, each in an order that the vocabulary fixes.  Every
loop ends whatever the numbers are, NaN included.
"""

import functools
from dataclasses import fields
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import described
from kernels.gpu.arguments import require_aligned
from kernels.gpu.groups import (
    GROUP,
    above,
    count_equal,
    cumulate,
    exponent_scale,
    find_group,
    find_token,
    key,
    list_groups,
    next_bits,
    nth_highest,
    random_bits,
    read_group,
    read_groups,
    read_maxima,
    search,
    sum_weights,
    uniform,
    weigh,
    weights_before,
)
from kernels.gpu.launch import Launch, pointer, require_gpu

_SPLIT = tl.constexpr(32)  # groups per program of the first launch; unmeasured
_MOST_DRAWS = tl.constexpr(64)  # for one token; a top-p of 1e-6 takes about 15
_COLUMNS = ["temperature", "top_k", "top_p", "min_p", "seed", "position", "ids"]  # begin anywhere
_NO_TOKEN = tl.constexpr(2**31 - 1)  # behind all tokens


def sample(logits: Tensor, rows: Any, out: Tensor | None = None) -> Tensor:
    """kernels.sampling.sample, of logits [S, V] fp32 and SamplingRows beside them; out: [S] int64.

    A row with NaN or senseless parameters gets some token of the vocabulary.
    """
    ids = _checked(logits, out)
    columns = {field.name: getattr(rows, field.name) for field in fields(rows)}
    for name, values in columns.items():
        is_integer = name in ("top_k", "seed", "position")
        _check_column(f"rows.{name}", values, torch.int64 if is_integer else torch.float32, logits)
    maxima = _per_group(logits)
    sums = torch.empty_like(maxima)
    groups = torch.empty_like(maxima, dtype=torch.int32)
    summarise, choose = launches(logits.shape[1], is_drawn=True)
    summarise(_split(logits), logits, maxima, columns["temperature"], sums)
    choose((len(logits),), logits, maxima, sums, groups, *columns.values(), ids)
    return ids


def greedy(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """kernels.sampling.greedy: what `sample` gives for rows of temperature 0."""
    ids = _checked(logits, out)
    maxima = _per_group(logits)
    summarise, choose = launches(logits.shape[1], is_drawn=False)
    summarise(_split(logits), logits, maxima, maxima, maxima)  # of which it reads no temperature
    choose((len(logits),), logits, maxima, ids)
    return ids


@functools.cache
def launches(vocab: int, is_drawn: bool) -> tuple[Launch, Launch]:
    """The two launches for a vocabulary, with draws or all greedy."""
    sizes = {"VOCAB": vocab, "WIDTH": _width(vocab)}
    f32, i32, i64 = pointer(torch.float32), pointer(torch.int32), pointer(torch.int64)
    kind = "drawn" if is_drawn else "greedy"
    first = Launch(
        _summarise,
        {"logits": f32, "maxima": f32, "temperature": f32, "sums": f32},
        {**sizes, "DRAWS": is_drawn},
        num_warps=4,
        name=f"sampling {kind} {vocab}, groups",
    )
    if is_drawn:
        signature = {"logits": f32, "maxima": f32, "sums": f32, "groups": i32, "temperature": f32}
        signature |= {"top_k": i64, "top_p": f32, "min_p": f32, "seed": i64, "position": i64, "ids": i64}
        second = Launch(_choose, signature, sizes, num_warps=16, name=f"sampling drawn {vocab}, tokens")
    else:
        signature = {"logits": f32, "maxima": f32, "ids": i64}
        second = Launch(
            _choose_highest, signature, sizes, num_warps=8, name=f"sampling greedy {vocab}, tokens"
        )
    return first, second


def shipped() -> list[Launch]:
    """For the vocabularies of OPT, Llama 3, Qwen 2.5 and Gemma 3."""
    return [
        launch
        for vocab in (50_272, 128_256, 151_936, 262_208)
        for is_drawn in (False, True)
        for launch in launches(vocab, is_drawn)
    ]


def _checked(logits: Tensor, out: Tensor | None) -> Tensor:
    """Where the ids go."""
    require_gpu(logits.device)
    is_right = logits.dim() == 2 and logits.dtype == torch.float32 and logits.is_contiguous()
    if not (is_right and logits.shape[1]):
        raise ValueError(f"logits must be contiguous float32 [S, V] with V > 0, got {described(logits)}")
    require_aligned("logits", logits)
    if out is None:
        return torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _check_column("out", out, torch.int64, logits)
    return out


def _check_column(name: str, x: Tensor, dtype: torch.dtype, logits: Tensor) -> None:
    is_right = x.shape == logits.shape[:1] and x.dtype == dtype and x.device == logits.device
    if not (is_right and x.is_contiguous()):
        wanted = f"contiguous {str(dtype).removeprefix('torch.')} [{len(logits)}] on {logits.device}"
        raise ValueError(f"{name} must be {wanted} like logits, got {described(x)}")


def _width(vocab: int) -> int:
    """Groups of a row, up to the next power of 2."""
    return int(triton.next_power_of_2(triton.cdiv(vocab, GROUP.value)))


def _per_group(logits: Tensor) -> Tensor:
    num_rows, vocab = logits.shape
    return torch.empty(num_rows, _width(vocab), dtype=torch.float32, device=logits.device)


def _split(logits: Tensor) -> tuple[int, int]:
    num_rows, vocab = logits.shape
    return num_rows, triton.cdiv(vocab, _SPLIT.value * GROUP.value)


@triton.jit(do_not_specialize_on_alignment=["temperature"])
def _summarise(
    logits, maxima, temperature, sums, VOCAB: tl.constexpr, WIDTH: tl.constexpr, DRAWS: tl.constexpr
):
    """Of each group of a row its maximum, and if the row is drawn, its sum of weights next to that."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * _SPLIT + tl.arange(0, _SPLIT)
    _, x = read_groups(logits + row * VOCAB, group, VOCAB)
    top = tl.max(x, 1)
    tl.store(maxima + row * WIDTH + group, top, mask=group * GROUP < VOCAB)
    if DRAWS:
        heat = tl.load(temperature + row)
        if heat > 0:
            finite = tl.where(top == float("-inf"), 0.0, top)
            sum = tl.sum(weigh(x, finite[:, None], exponent_scale(heat)), 1)
            tl.store(sums + row * WIDTH + group, sum, mask=group * GROUP < VOCAB)


@triton.jit(do_not_specialize_on_alignment=["ids"])
def _choose_highest(logits, maxima, ids, VOCAB: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = _highest(logits + row * VOCAB, maxima + row * WIDTH, VOCAB, WIDTH)
    tl.store(ids + row, token.to(tl.int64))


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _choose(
    logits, maxima, sums, groups, temperature, top_k, top_p, min_p, seed, position, ids,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """From here on `groups` [S, WIDTH] lists groups that matter, and `sums` is by place in that list."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCAB
    sums += row * WIDTH
    groups += row * WIDTH
    maxima += row * WIDTH
    heat = tl.load(temperature + row)
    if heat > 0:
        scale = exponent_scale(heat)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        least = tl.load(min_p + row)
        bits = random_bits(tl.load(seed + row), tl.load(position + row))
        if (k > 0) & (k < VOCAB):
            token = _draw_listed(logits, maxima, sums, groups, scale, k, p, least, bits, VOCAB, WIDTH)
        else:
            token = _draw_from_all(logits, maxima, sums, groups, scale, p, least, bits, VOCAB, WIDTH)
    else:
        token = _highest(logits, maxima, VOCAB, WIDTH)
    tl.store(ids + row, token.to(tl.int64))


@triton.jit
def _highest(logits, maxima, VOCAB: tl.constexpr, WIDTH: tl.constexpr):
    """The lowest token among the highest."""
    at, tops = read_maxima(maxima, VOCAB, WIDTH)
    top = tl.max(tops, 0)
    group = tl.min(tl.where(tops == top, at, WIDTH - 1), 0)
    tokens, x = read_group(logits, group, VOCAB)
    return tl.min(tl.where(x == top, tokens, VOCAB - 1), 0)


@triton.jit
def _draw_from_all(
    logits, maxima, sums, groups, scale, p, least, bits, VOCAB: tl.constexpr, WIDTH: tl.constexpr
):
    """A draw without top-k."""
    at, tops = read_maxima(maxima, VOCAB, WIDTH)
    is_real = at * GROUP < VOCAB
    top = tl.max(tops, 0)
    weights = weigh(tops, top, scale)
    of_all = tl.load(sums + at, mask=is_real, other=0.0) * weights
    limit = p.to(tl.float64) * tl.sum(of_all.to(tl.float64), 0)
    # In question are the tokens before (value, token) in sorted order, with a weight of at least `least`.
    value = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], _NO_TOKEN, tl.int32)
    if least > 0:
        num = list_groups(groups, is_real & (weights >= least))
        sum_weights(logits, sums, groups, num, top, scale, least, value, token, VOCAB)
    else:
        num = list_groups(groups, is_real)
        tl.store(sums + at, of_all, mask=is_real)
        tl.debug_barrier()
    num_draws = 0
    is_open = True
    while is_open:
        of_groups, cumulative = cumulate(sums, num, WIDTH)
        target = uniform(bits) * tl.sum(of_groups.to(tl.float64), 0)
        group, rest = find_group(groups, of_groups, cumulative, target, VOCAB)
        tokens, x = read_group(logits, group, VOCAB)
        inside = weights_before(tokens, x, top, scale, least, value, token)
        token = find_token(tokens, inside, rest, VOCAB)
        is_open = False
        if p < 1:
            value = tl.load(logits + token)
            at, tops = read_maxima(maxima, VOCAB, WIDTH)  # again, for they would take many registers
            num = list_groups(groups, (at * GROUP < VOCAB) & (tops >= value))
            mass = sum_weights(logits, sums, groups, num, top, scale, least, value, token, VOCAB)
            num_draws += 1
            is_open = (mass >= limit) & (num_draws < _MOST_DRAWS)
            bits = next_bits(bits)
    return token


@triton.jit
def _draw_listed(
    logits, maxima, sums, groups, scale, k, p, least, bits, VOCAB: tl.constexpr, WIDTH: tl.constexpr
):
    """A draw with top-k.  Kept are the tokens above a value, and the first few of those that equal it."""
    at, tops = read_maxima(maxima, VOCAB, WIDTH)
    top = tl.max(tops, 0)
    wanted = k.to(tl.float64)
    reached = nth_highest(tops, k)
    lowest = tl.full([], float("-inf"), tl.float32)
    num = list_groups(groups, (at * GROUP < VOCAB) & (key(tops) >= reached) & (tops > float("-inf")))
    value = search(logits, groups, num, top, scale, wanted, lowest, False, False, VOCAB)
    count, mass = above(logits, groups, num, top, scale, value, 0.0, VOCAB)
    num_equal = tl.maximum(wanted - count, 1.0)
    mass += num_equal * weigh(value, top, scale)
    if p < 1:
        limit = p.to(tl.float64) * mass
        cut = search(logits, groups, num, top, scale, limit, value, True, False, VOCAB)
        _, mass = above(logits, groups, num, top, scale, cut, 0.0, VOCAB)
        weight = weigh(cut, top, scale)
        num_cut = tl.maximum(tl.ceil((limit - mass) / weight), 1.0)
        num_equal = tl.where(cut == value, tl.minimum(num_cut, num_equal), num_cut)
        value = cut
        mass += num_equal * weight
    if weigh(value, top, scale) < least:  # then it excludes all that equal this value, and more
        _, mass = above(logits, groups, num, top, scale, value, least, VOCAB)
    target = uniform(bits) * mass
    drawn = search(logits, groups, num, top, scale, target, value, True, True, VOCAB)
    _, mass = above(logits, groups, num, top, scale, drawn, 0.0, VOCAB)
    place = tl.maximum(tl.floor((target - mass) / weigh(drawn, top, scale)), 0.0)  # among equals
    place = tl.where(drawn == value, tl.minimum(place, num_equal - 1), place)
    count_equal(logits, sums, groups, num, drawn, VOCAB)
    of_groups, cumulative = cumulate(sums, num, WIDTH)
    group, rest = find_group(groups, of_groups, cumulative, place + 0.5, VOCAB)
    tokens, x = read_group(logits, group, VOCAB)
    return find_token(tokens, (x == drawn).to(tl.float64), rest, VOCAB)
