"""Draws follow their distribution, depend on nothing they should not, and ties go to the lowest id."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.highest import highest
from kernels.sampling import NUM_LISTED, SamplingRows, _cumulative, _draw, greedy, sample


def rows(
    num: int,
    temperature: float = 1.0,
    top_k: float = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor = 0,
    position: int | Tensor = 0,
) -> SamplingRows:
    def column(value: float | Tensor, dtype: torch.dtype) -> Tensor:
        return value if isinstance(value, Tensor) else torch.full((num,), value, dtype=dtype)

    return SamplingRows(
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int64),
        top_p=column(top_p, torch.float32),
        min_p=column(min_p, torch.float32),
        seed=column(seed, torch.int64),
        position=column(position, torch.int64),
    )


def draws(logits: Tensor, num: int, **parameters: float) -> Tensor:
    """`num` draws from one row of logits [V], at the positions 0 .. num-1.  [num]"""
    return sample(logits.expand(num, -1), rows(num, position=torch.arange(num), seed=5, **parameters))


def kept_by_definition(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The probabilities after all filters, one token at a time as the definitions read.  [V] fp64"""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token].item(), token))
    order = order[: top_k or len(order)]
    weight = {token: math.exp((logits[token] - logits.max()).item() / temperature) for token in order}
    total, mass, nucleus = sum(weight.values()), 0.0, []
    for token in order:
        if top_p < 1 and mass >= top_p * total:
            break
        nucleus.append(token)
        mass += weight[token]
    probabilities = torch.zeros(len(logits), dtype=torch.float64)
    for token in nucleus:
        if weight[token] >= min_p * weight[nucleus[0]]:
            probabilities[token] = weight[token]
    return probabilities / probabilities.sum()


FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.5, 5, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (6.0, 0, 0.3, 0.0),  # most first draws are excluded
    (1.0, 0, 1.0, 0.1),
    (0.9, 12, 0.85, 0.05),
    (1.3, 3, 0.999, 0.0),
    (1.0, 10_000, 0.7, 0.0),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("vocab", [40, 1100])  # one block of weights, and several
def test_draws_follow_the_filtered_distribution(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.full((vocab,), -30.0)
    logits[torch.randperm(vocab)[:40]] = 1.5 * torch.randn(40)
    expected = kept_by_definition(logits, temperature, top_k, top_p, min_p)
    num = 4000
    ids = draws(logits, num, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    counts = torch.bincount(ids, minlength=vocab).double()
    assert counts[expected == 0].sum() == 0
    likely = expected * num >= 5
    chi_square = ((counts - expected * num)[likely] ** 2 / (expected * num)[likely]).sum().item()
    degrees = int(likely.sum()) - 1
    assert degrees >= 2
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 4  # about one in 10^4 by chance


def test_a_draw_is_the_same_alone_and_among_any_batch_mates() -> None:
    num, vocab = 48, 4999
    logits = 4 * torch.randn(num, vocab)
    logits[1::3] *= 0.05  # flat rows, which are drawn from again and again
    mixed = SamplingRows(
        temperature=torch.tensor([0.0, 0.6, 1.0, 2.0]).repeat(12),
        top_k=torch.tensor([0, 0, 50, 0, 1000]).repeat(10)[:num],
        top_p=torch.tensor([1.0, 0.9, 0.95]).repeat(16),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.01, 0.2]).repeat(7)[:num],
        seed=torch.randint(2**62, (num,)),
        position=torch.randint(10**6, (num,)),
    )
    together = sample(logits, mixed)
    alone = [sample(logits[n : n + 1], mixed.select(torch.tensor([n]))).item() for n in range(num)]
    assert together.tolist() == alone
    shuffled = torch.randperm(num)
    assert torch.equal(sample(logits[shuffled], mixed.select(shuffled)), together[shuffled])
    assert len(set(alone)) > num // 2


def test_sums_and_exponentials_of_a_row_have_the_same_bits_in_any_batch() -> None:
    """What the test above relies on, of torch and NumPy: otherwise it could pass by luck."""
    for dtype in (torch.float64, torch.float32):
        weights = torch.randn(17, 4999, dtype=dtype)
        together = weights.exp()
        cumulative, of_blocks = together.cumsum(-1), _cumulative(together)
        for n in range(17):
            alone = weights[n : n + 1].clone().exp()
            assert torch.equal(alone[0], together[n])
            assert torch.equal(alone.cumsum(-1)[0], cumulative[n])
            assert torch.equal(_cumulative(alone)[0], of_blocks[n])


def test_a_draw_is_the_same_by_any_number_of_threads() -> None:
    logits = 2 * torch.randn(40, 20_011)
    parameters = rows(40, temperature=0.7, seed=torch.arange(40))
    parameters.top_p[::2] = 0.6
    parameters.top_k[::4] = 40
    parameters.min_p[::3] = 0.01
    num_threads = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            drawn.append(sample(logits, parameters).tolist())
    finally:
        torch.set_num_threads(num_threads)
    assert drawn[0] == drawn[1] == drawn[2]


@given(
    seed=st.integers(0, 2**32),
    vocab=st.integers(1, 700),
    scale=st.sampled_from([0.0, 0.3, 2.0, 20.0]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 7, 256, 257, 600, 10_000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_only_tokens_that_all_filters_keep_are_drawn(
    seed: int, vocab: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Ties lie everywhere.  By so much as fp32 errs, a filter may keep one token more than its definition."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(vocab, generator=generator)).round(decimals=1)
    logits[torch.rand(vocab, generator=generator) < 0.2] = -math.inf
    logits[seed % vocab] = scale
    more = top_p * (1 + 1e-5) if top_p < 1 else 1.0
    kept = kept_by_definition(logits, temperature, top_k, more, min_p * (1 - 1e-5))
    drawn = draws(logits, 20, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.all(kept[drawn] > 0)


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1024, 5001])
def test_a_draw_inverts_the_cumulative_distribution(vocab: int) -> None:
    """Up to what fp32 sums of blocks err by, and at both ends of [0, 1) to the very token."""
    ends = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    uniform = torch.cat([ends, torch.rand(200, dtype=torch.float64)])
    weights = torch.randn(vocab).mul_(3).exp_()
    weights[torch.rand(vocab) < 0.3] = 0
    weights[: vocab // 3] = weights[vocab - vocab // 4 :] = 0
    weights[vocab // 2] = 1.0
    repeated = weights.repeat(len(uniform), 1)
    ids = _draw(repeated, torch.arange(len(uniform)), _cumulative(repeated), uniform)
    exact = weights.double().cumsum(0) / weights.double().sum()
    assert torch.all(weights[ids] > 0)
    assert torch.all(exact[ids] >= uniform - 1e-6)
    assert torch.all(exact[ids] - weights[ids] / weights.double().sum() <= uniform + 1e-6)
    with_weight = weights.nonzero()[:, 0]
    assert ids[0] == with_weight[0]
    assert ids[2] == with_weight[-1]


@pytest.mark.parametrize("vocab", [300, 3000, 20_011])
def test_a_list_known_before_changes_no_draw(vocab: int) -> None:
    """Rounded logits, so that ties lie everywhere, also where lists end."""
    logits = (8 * torch.randn(64, vocab)).round() / 4
    logits[:20] = logits[:20].clamp(max=2)  # hundreds of equals at the top
    parameters = rows(64, temperature=0.9, seed=torch.arange(64))
    parameters.top_k[:] = torch.tensor([0, 1, 40, NUM_LISTED, NUM_LISTED + 1, 290, 0, 3]).repeat(8)
    parameters.top_p[::3] = 0.9
    parameters.min_p[::5] = 0.05
    parameters.temperature[::7] = 0
    drawn = sample(logits, parameters)
    for num in (NUM_LISTED, vocab):
        assert torch.equal(sample(logits, parameters, highest(logits, num)), drawn)


def test_a_draw_depends_on_seed_and_on_position() -> None:
    logits = torch.zeros(300, 20_011)
    every = torch.arange(300)
    by_position = sample(logits, rows(300, position=every)).tolist()
    by_seed = sample(logits, rows(300, seed=every)).tolist()
    assert len(set(by_position)) > 290
    assert len(set(by_seed)) > 290
    assert sum(a == b for a, b in zip(by_position, by_seed, strict=True)) < 5
    assert sample(logits[:9], rows(9, seed=every[:9])).tolist() == by_seed[:9]


def test_the_uniform_numbers_are_splitmix64_of_seed_and_position() -> None:
    """Written in plain integers: the numbers must never change, or a seed would no longer repeat a reply."""
    mask = 2**64 - 1

    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
        return bits ^ bits >> 31

    pairs = [(0, 0), (1, 0), (0, 1), (12345, 678), (2**63 - 1, 131_071)]
    vocab = 2**16
    for seed, position in pairs:
        uniform = (mix(mix(seed) + (position + 1) * 0x9E3779B97F4A7C15 & mask) >> 11) / 2**53
        drawn = sample(torch.zeros(1, vocab), rows(1, seed=seed, position=position))
        assert drawn.item() == int(uniform * vocab)


@pytest.mark.parametrize("vocab", [5, 64, 1000, 151_936])
def test_greedy_ties_go_to_the_lowest_id(vocab: int) -> None:
    logits = torch.randint(0, 3, (16, vocab)).float()
    logits[:, -3:] = 3.0
    expected = [vocab - 3] * 16
    assert greedy(logits).tolist() == expected
    assert sample(logits, rows(16, temperature=0.0, top_k=7, top_p=0.5)).tolist() == expected
    assert sample(logits, rows(16, temperature=2.0, top_k=1)).tolist() == expected
    assert sample(logits, rows(16, top_p=1e-9)).tolist() == expected


def test_filters_cut_ties_at_the_lowest_ids() -> None:
    for vocab in (20, 5000):
        assert set(draws(torch.zeros(vocab), 300, top_k=3).tolist()) == {0, 1, 2}
        assert set(draws(torch.zeros(vocab), 300, top_p=3 / vocab - 1e-6).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("parameters", [{}, {"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.01}])
def test_extreme_temperatures_stay_finite(parameters: dict[str, float]) -> None:
    logits = 50 * torch.randn(3000)
    cold = draws(logits, 50, temperature=1e-6, **parameters)
    assert set(cold.tolist()) == {int(logits.argmax())}
    hot = draws(logits, 50, temperature=100.0, **parameters)
    assert len(set(hot.tolist())) > 5
    assert 0 <= int(hot.min()) <= int(hot.max()) < 3000


@pytest.mark.parametrize(
    "parameters", [{}, {"top_p": 0.99}, {"top_k": 900}, {"min_p": 1e-6}, {"temperature": 0.0}]
)
def test_tokens_of_minus_infinity_are_never_drawn(parameters: dict[str, float]) -> None:
    for vocab in (50, 3000):
        logits = torch.full((vocab,), -math.inf)
        allowed = {3, vocab - 2}
        logits[list(allowed)] = torch.tensor([-1e30, -1e30])
        assert set(draws(logits, 60, **parameters).tolist()) <= allowed


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(4, 3000)
    before = logits.clone()
    sample(logits, rows(4, top_p=0.9))
    sample(logits, rows(4))
    assert torch.equal(logits, before)


def test_misshapen_input_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"logits are torch.bfloat16 \[2, 5\]; they must be float32 \[S, V\]"
    ):
        sample(torch.zeros(2, 5, dtype=torch.bfloat16), rows(2))
    with pytest.raises(ValueError, match=r"rows.temperature is \[3\]; it must be \[2\] like logits"):
        sample(torch.zeros(2, 5), rows(3))


@pytest.mark.parametrize("vocab", [5, 300, 3000])
@pytest.mark.parametrize(
    "parameters",
    [{}, {"top_k": 3}, {"top_k": 290}, {"top_p": 0.5}, {"min_p": 0.1, "top_k": 4}, {"temperature": 0.0}],
)
def test_a_row_without_meaning_gets_some_token_and_harms_no_other(
    vocab: int, parameters: dict[str, float]
) -> None:
    """As after KV that failed to load: the step is void, but that is known only later."""
    logits = torch.randn(5, vocab)
    expected = sample(logits, rows(5, **parameters))
    logits[1] = math.nan
    logits[3] = -math.inf
    logits[4, vocab // 2 :] = math.nan
    for listed in (None, highest(logits, 4)):
        ids = sample(logits, rows(5, **parameters), listed)
        assert torch.equal(ids[[0, 2]], expected[[0, 2]])
        assert 0 <= int(ids.min()) <= int(ids.max()) < vocab
        alone = sample(logits[1:2], rows(1, **parameters), listed and listed.select(slice(1, 2)))
        assert 0 <= alone.item() < vocab


def test_ids_go_where_they_are_wanted() -> None:
    logits = torch.randn(3, 50)
    for choose in (
        lambda out=None: sample(logits, rows(3), out=out),
        lambda out=None: greedy(logits, out),
    ):
        out = torch.full((3,), -1)
        assert choose(out) is out
        assert torch.equal(out, choose())
