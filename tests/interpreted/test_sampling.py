"""Tokens chosen by the Triton kernels are those that the CPU chooses, whatever a row asks for and holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch
from torch import Tensor

import kernels.sampling
from engine.cuda.sampler import DeviceSampler
from engine.sampler import Sampler, sampling_rows
from kernels import dispatch
from kernels.sampling import SamplingRows, greedy, sample
from tests.cuda.test_device_sampler import EOS, KINDS, VOCAB, some_rows
from tests.cuda.virtual_device import VirtualDevice

EDGE = 1e-6  # how close to one a number may be for rounding to decide


def some_parameters(num: int) -> SamplingRows:
    """Rows of all kinds, every few of them with another mix of filters."""

    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat(num)[:num]

    return SamplingRows(
        temperature=column([0.7, 1.0, 3.0, 0.0, 1.0, 0.1, 1.5], torch.float32),
        top_k=column([0, 5, 0, 40, 300, 0, 1, 2000, 0, 2, 7], torch.int64),
        top_p=column([1.0, 0.9, 0.05, 0.95, 1.0], torch.float32),
        min_p=column([0.0, 0.0, 0.02, 0.0, 0.0, 0.5, 0.0, 0.0], torch.float32),
        seed=torch.randint(-(2**63), 2**63 - 1, (num,)),
        position=torch.randint(2**20, (num,)),
    )


def some_logits(num: int, vocab: int) -> Tensor:
    """Peaked, flat, full of equals, mostly -inf.  [num, vocab]"""
    logits = 3 * torch.randn(num, vocab)
    logits[1::4] *= 0.02
    logits[2::4] = logits[2::4].round()
    logits[3::8] = 0.0
    logits[4::9, : vocab - vocab // 3] = -torch.inf
    logits[5::7, ::3] = -0.0
    return logits


@contextmanager
def nudged(by: float) -> Iterator[None]:
    """The CPU's uniform numbers are off by so much."""
    uniform = kernels.sampling._uniform
    with pytest.MonkeyPatch.context() as patch, dispatch.use("torch"):
        patch.setattr(kernels.sampling, "_uniform", lambda bits: (uniform(bits) + by).clamp(0, 1 - 2.0**-53))
        yield


def near_edges(logits: Tensor, rows: SamplingRows) -> list[list[int]]:
    """What the CPU would choose were its numbers a little different, in several ways."""
    found = []
    for by in (-EDGE, EDGE):
        for share in (1 - EDGE, 1.0, 1 + EDGE):
            columns = {field.name: getattr(rows, field.name) for field in fields(rows)}
            cut = columns["top_p"] < 1
            columns["top_p"] = torch.where(cut, columns["top_p"] * share, columns["top_p"])
            columns["min_p"] = columns["min_p"] * share
            with nudged(by):
                found.append(sample(logits, SamplingRows(**columns)).tolist())
    return found


def assert_chosen_as_on_the_cpu(logits: Tensor, rows: SamplingRows) -> Tensor:
    before, chosen = logits.clone(), sample(logits, rows)
    with nudged(0.0):
        expected = sample(logits, rows)
    assert torch.equal(logits, before)
    different = (chosen != expected).nonzero()[:, 0].tolist()
    assert len(different) <= 1, (different, chosen[different], expected[different])
    for row in different:
        assert chosen[row] in [ids[row] for ids in near_edges(logits, rows)], row
    return chosen


@pytest.mark.parametrize(
    ("vocab", "num"),
    [
        *((1, 2), (50, 14), (129, 7), (1000, 22), (5000, 16)),
        pytest.param(1000, 120, marks=pytest.mark.heavy),
        pytest.param(20_011, 40, marks=pytest.mark.heavy),
        pytest.param(151_936, 14, marks=pytest.mark.heavy),
    ],
)
def test_tokens_are_those_of_the_cpu(vocab: int, num: int) -> None:
    chosen = assert_chosen_as_on_the_cpu(some_logits(num, vocab), some_parameters(num))
    assert len(set(chosen.tolist())) > min(num, vocab) // 3


def test_a_flat_row_is_drawn_from_until_top_p_allows_it() -> None:
    rows = some_parameters(6)
    rows.temperature[:], rows.top_k[:], rows.min_p[:], rows.top_p[:] = 5.0, 0, 0.0, 0.002
    chosen = assert_chosen_as_on_the_cpu(torch.randn(6, 3000), rows)
    assert len(set(chosen.tolist())) > 1


def test_a_row_gets_the_same_alone_and_among_any_others() -> None:
    logits, rows = some_logits(9, 1000), some_parameters(9)
    together = sample(logits, rows)
    shuffled = torch.randperm(9)
    assert torch.equal(sample(logits[shuffled], rows.select(shuffled)), together[shuffled])
    for n in range(0, 9, 4):
        assert sample(logits[n : n + 1].clone(), rows.select(torch.tensor([n]))) == together[n]


def test_the_uniform_numbers_are_splitmix64_of_seed_and_position() -> None:
    mask, vocab = 2**64 - 1, 2**14

    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
        return bits ^ bits >> 31

    pairs = [(0, 0), (1, 0), (0, 1), (12345, 678), (2**63 - 1, 131_071), (-1, 5)]
    rows = some_parameters(len(pairs))
    rows.temperature[:], rows.top_k[:], rows.top_p[:], rows.min_p[:] = 1.0, 0, 1.0, 0.0
    rows.seed[:], rows.position[:] = (torch.tensor(column) for column in zip(*pairs, strict=True))
    expected = [
        int((mix(mix(seed & mask) + (position + 1) * 0x9E3779B97F4A7C15 & mask) >> 11) / 2**53 * vocab)
        for seed, position in pairs
    ]
    assert sample(torch.zeros(len(pairs), vocab), rows).tolist() == expected


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.35, 0.15, 0.4])
    num = 100
    rows = some_parameters(num)
    rows.temperature[:], rows.top_k[:], rows.top_p[:], rows.min_p[:] = 1.0, 0, 1.0, 0.0
    counts = torch.bincount(sample(probabilities.log().expand(num, -1).contiguous(), rows), minlength=5)
    expected = num * probabilities
    assert counts[1] == 0
    likely = expected > 0
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() < 21  # one in 3,000 by chance


@pytest.mark.parametrize("vocab", [5, 128, 1000, 9001])
def test_greedy_ties_go_to_the_lowest_id(vocab: int) -> None:
    logits = torch.randint(0, 3, (4, vocab)).float()
    logits[:, -3:] = 3.0
    logits[2] = -torch.inf
    logits[2, vocab - 2 :] = torch.tensor([-0.0, 0.0])
    expected = [vocab - 3, vocab - 3, vocab - 2, vocab - 3]
    out = torch.full((4,), -1)
    assert greedy(logits, out) is out
    assert greedy(logits).tolist() == out.tolist() == expected
    rows = some_parameters(4)
    rows.temperature[:], rows.top_k[:] = torch.tensor([0.0, 2.0, 0.0, 2.0]), 1
    assert sample(logits, rows, out=out.fill_(-1)) is out
    assert out.tolist() == expected


@pytest.mark.filterwarnings("ignore:overflow encountered")  # which NumPy says, for the interpreter
def test_extreme_temperatures_stay_finite() -> None:
    logits = 50 * torch.randn(4, 300)
    rows = some_parameters(4)
    rows.top_k[:] = torch.tensor([0, 7]).repeat(2)
    for coldness in (1e-6, 1e-42):
        rows.temperature[:] = coldness
        assert torch.equal(sample(logits, rows), logits.argmax(-1))
    rows.temperature[:] = 1e30
    assert_chosen_as_on_the_cpu(logits, rows)


@pytest.mark.filterwarnings("ignore:All-NaN", "ignore:invalid value", "ignore:overflow encountered")
def test_rows_of_garbage_end_and_harm_no_other() -> None:
    """A graph samples rows of idle segments too, and a failed load leaves NaN."""
    logits, rows = some_logits(22, 300), some_parameters(22)
    rows.temperature[:], rows.top_p[:] = 1.0, 0.6
    rows.top_k[::2] = torch.tensor([0, 0, 4]).repeat(4)[:11]
    good = torch.arange(0, 22, 4)
    before = sample(logits[good], rows.select(good))
    logits[1] = logits[3] = torch.nan
    logits[5] = logits[7] = -torch.inf
    logits[9, 8] = logits[11, 200] = torch.inf
    logits[13, ::2] = torch.nan
    rows.temperature[[15, 17, 19]] = torch.tensor([torch.nan, torch.inf, -3.0])
    rows.top_k[1::2] = torch.tensor([0, 5, 0, 5, 0, 5, 5, -9, 2**62, 0, 5])
    rows.top_p[[1, 15, 21]] = torch.tensor([torch.nan, -1.0, 0.0])
    rows.min_p[[3, 9, 17, 21]] = torch.tensor([torch.nan, 2.0, torch.inf, -1.0])
    rows.position[21] = 2**63 - 1
    chosen = sample(logits, rows)
    assert torch.equal(chosen[good], before)
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < 300


def test_the_devices_sampler_tells_what_the_cpus_tells() -> None:
    """With edits and logprobs; the latter are sums of fp32 in another order."""
    params, logits = some_rows(KINDS), 3 * torch.randn(len(KINDS), VOCAB)
    same, facts = logits.clone(), sampling_rows(list(params.values()))
    with dispatch.use("torch"):
        ids, logprobs = Sampler(VOCAB, EOS).sample(same, params)
    choice = DeviceSampler(VirtualDevice(), VOCAB, EOS).choose(logits, params, facts)
    assert choice.ids.tolist() == list(ids.values())
    assert torch.equal(logits, same)
    found = choice.logprobs()
    assert list(found) == list(logprobs)
    for name, expected in logprobs.items():
        assert found[name].token_id == expected.token_id
        assert found[name].logprob == pytest.approx(expected.logprob, abs=1e-6)
        assert [id for id, _ in found[name].top] == [id for id, _ in expected.top]
        assert [v for _, v in found[name].top] == pytest.approx([v for _, v in expected.top], abs=1e-6)
