"""What kernels.gpu.sampling does with one row of logits [VOCAB] in groups of GROUP tokens: lists groups, sums
weights, finds tokens.  All of it is called by every thread of the one program that has the row.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(128)  # tokens.  The sizes here are unmeasured
_SUMMED = tl.constexpr(64)  # groups read at a time where sums are taken,
_SEARCHED = tl.constexpr(32)  # and where logits are searched
_INCREMENT = tl.constexpr(0x9E3779B97F4A7C15)  # of splitmix64


@triton.jit
def read_maxima(maxima, VOCAB: tl.constexpr, WIDTH: tl.constexpr):
    """Groups and their highest logits.  [WIDTH]"""
    at = tl.arange(0, WIDTH)
    return at, tl.load(maxima + at, mask=at * GROUP < VOCAB, other=float("-inf"))


@triton.jit
def read_groups(logits, group, VOCAB: tl.constexpr):
    """Ids and logits of groups [N], -inf behind the last token.  [N, GROUP]"""
    tokens = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tokens, tl.load(logits + tokens, mask=tokens < VOCAB, other=float("-inf"))


@triton.jit
def read_group(logits, group, VOCAB: tl.constexpr):
    """The same of one group.  [GROUP]"""
    tokens = group * GROUP + tl.arange(0, GROUP)
    return tokens, tl.load(logits + tokens, mask=tokens < VOCAB, other=float("-inf"))


@triton.jit
def _listed(logits, groups, first, num, N: tl.constexpr, VOCAB: tl.constexpr):
    """The places first .. first+N-1 in the list, and ids and logits of the groups there."""
    places = first + tl.arange(0, N)
    tokens, x = read_groups(logits, tl.load(groups + places, mask=places < num, other=VOCAB), VOCAB)
    return places, tokens, x


@triton.jit
def list_groups(groups, is_in):
    """Lists groups in ascending order; their number."""
    tl.debug_barrier()  # all have read the list before
    place = tl.cumsum(is_in.to(tl.int32), 0)
    tl.store(groups + place - 1, tl.arange(0, is_in.shape[0]), mask=is_in)
    tl.debug_barrier()
    return tl.sum(is_in.to(tl.int32), 0)


@triton.jit
def exponent_scale(heat):
    """From logits to exponents of 2; finite, so that 0 times it is 0."""
    return 1.4426950408889634 / tl.maximum(heat, 1.2e-38)


@triton.jit
def weigh(x, top, scale):
    return tl.exp2((x - top) * scale)


@triton.jit
def weights_before(tokens, x, top, scale, least, value, token):
    """fp64, and 0 where a token is not in question."""
    weights = weigh(x, top, scale)
    is_before = (x > value) | ((x == value) & (tokens < token))
    return tl.where(is_before & (weights >= least), weights, 0.0).to(tl.float64)


@triton.jit
def sum_weights(logits, sums, groups, num, top, scale, least, value, token, VOCAB: tl.constexpr):
    """Sums of listed groups; the sum of all."""
    tl.debug_barrier()  # all have read the sums before
    mass = tl.full([], 0.0, tl.float64)
    for first in range(0, num, _SUMMED):
        places, tokens, x = _listed(logits, groups, first, num, _SUMMED, VOCAB)
        weights = weigh(x, top, scale)
        is_before = (x > value) | ((x == value) & (tokens < token))
        of_groups = tl.sum(tl.where(is_before & (weights >= least), weights, 0.0), 1)
        tl.store(sums + places, of_groups, mask=places < num)
        mass += tl.sum(of_groups.to(tl.float64), 0)
    tl.debug_barrier()
    return mass


@triton.jit
def count_equal(logits, sums, groups, num, value, VOCAB: tl.constexpr):
    """In `sums`, how many tokens of each listed group have this logit."""
    tl.debug_barrier()
    for first in range(0, num, _SUMMED):
        places, tokens, x = _listed(logits, groups, first, num, _SUMMED, VOCAB)
        tl.store(sums + places, tl.sum((x == value).to(tl.float32), 1), mask=places < num)
    tl.debug_barrier()


@triton.jit
def cumulate(sums, num, WIDTH: tl.constexpr):
    """Sums of listed groups, fp32, and what they and those before them sum up to, fp64."""
    at = tl.arange(0, WIDTH)
    of_groups = tl.load(sums + at, mask=at < num, other=0.0)
    return of_groups, tl.cumsum(of_groups.to(tl.float64), 0)


@triton.jit
def find_group(groups, of_groups, cumulative, target, VOCAB: tl.constexpr):
    """The group that the target falls in, and the part of it that lies before the target."""
    at = tl.arange(0, of_groups.shape[0])
    place = _find(at, of_groups, cumulative, target)
    is_found = at == place
    inside = tl.sum(tl.where(is_found, of_groups, 0.0), 0).to(tl.float64)
    before = tl.sum(tl.where(is_found, cumulative - of_groups, 0.0), 0)
    group = tl.load(groups + place)
    return tl.minimum(tl.maximum(group, 0), VOCAB // GROUP), (target - before) / inside


@triton.jit
def find_token(tokens, weights, rest, VOCAB: tl.constexpr):
    """The token of a group that such a part of its weights falls in."""
    place = _find(tl.arange(0, GROUP), weights, tl.cumsum(weights, 0), rest * tl.sum(weights, 0))
    return tl.minimum(tl.min(tokens, 0) + place, VOCAB - 1)


@triton.jit
def _find(at, weights, cumulative, target):
    """The first whose cumulative weight exceeds the target; it has weight.  If rounding leaves none, the last
    that has."""
    has_weight = weights > 0
    found = tl.min(tl.where(has_weight & (cumulative > target), at, at.shape[0]), 0)
    return tl.minimum(found, tl.max(tl.where(has_weight, at, 0), 0))


@triton.jit
def key(x):
    """uint32 that ascend as x does, -0 as 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _logit(key):
    """The inverse of `key`."""
    return tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def nth_highest(x, num):
    """The highest key that at least `num` of x [N] reach, if there are as many, else 0."""
    keys = key(x)
    ones = tl.full(x.shape, 1, tl.int32)
    found = tl.full([], 0, tl.uint32)
    unit = tl.full([], 1 << 30, tl.uint32)
    for _step in range(16):
        one, two, three = _reaching(keys, ones, found, unit)
        found += unit * _digit(one >= num, two >= num, three >= num)
        unit = unit >> 2
    return found


@triton.jit
def search(
    logits, groups, num, top, scale, bound, at_least, BY_MASS: tl.constexpr, EXCEEDS: tl.constexpr,
    VOCAB: tl.constexpr,
):  # fmt: skip
    """The highest logit, if it is above `at_least`, such that the listed tokens that reach it count or weigh
    as much as `bound`, or exceed it."""
    found = tl.full([], 0, tl.uint32)
    unit = tl.full([], 1 << 30, tl.uint32)
    for _step in range(16):
        one = tl.full([], 0.0, tl.float64)
        two = one
        three = one
        for first in range(0, num, _SEARCHED):
            places, tokens, x = _listed(logits, groups, first, num, _SEARCHED, VOCAB)
            if BY_MASS:
                weights = weigh(x, top, scale).to(tl.float64)
            else:
                weights = tl.full(x.shape, 1.0, tl.float64)
            more_one, more_two, more_three = _reaching(key(x), weights, found, unit)
            one += more_one
            two += more_two
            three += more_three
        if EXCEEDS:
            found += unit * _digit(one > bound, two > bound, three > bound)
        else:
            found += unit * _digit(one >= bound, two >= bound, three >= bound)
        unit = unit >> 2
    return _logit(tl.maximum(found, key(at_least)))


@triton.jit
def _reaching(keys, weights, found, unit):
    """What those weigh whose keys reach `found` and one, two or three units."""
    one = tl.sum(tl.where(keys >= found + unit, weights, 0))
    two = tl.sum(tl.where(keys >= found + 2 * unit, weights, 0))
    three = tl.sum(tl.where(keys >= found + 3 * unit, weights, 0))
    return one, two, three


@triton.jit
def _digit(is_one, is_two, is_three):
    return is_one.to(tl.uint32) + is_two.to(tl.uint32) + is_three.to(tl.uint32)


@triton.jit
def above(logits, groups, num, top, scale, value, least, VOCAB: tl.constexpr):
    """How many listed tokens are above a logit and weigh at least `least`, and what these weigh.  fp64"""
    count = tl.full([], 0.0, tl.float64)
    mass = tl.full([], 0.0, tl.float64)
    for first in range(0, num, _SEARCHED):
        places, tokens, x = _listed(logits, groups, first, num, _SEARCHED, VOCAB)
        weights = weigh(x, top, scale)
        is_in = (x > value) & (weights >= least)
        count += tl.sum(is_in.to(tl.int32)).to(tl.float64)
        mass += tl.sum(tl.where(is_in, weights, 0.0).to(tl.float64))
    return count, mass


@triton.jit
def random_bits(seed, position):
    """64 random bits for each pair: two rounds of splitmix64."""
    first = _mix(seed.to(tl.uint64, bitcast=True))
    return _mix(first + (position + 1).to(tl.uint64, bitcast=True) * _INCREMENT)


@triton.jit
def next_bits(bits):
    return _mix(bits + _INCREMENT)


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def uniform(bits):
    """fp64 of 53 bits, in [0, 1)."""
    return (bits >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
