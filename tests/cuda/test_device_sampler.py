"""The CUDA engine's sampler tells what the CPU's tells, and asks the device for nothing on the way."""

import random
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.batch import RowParams
from engine.cuda import sampler as cuda_sampler
from engine.cuda.sampler import DeviceSampler, is_plain
from engine.errors import InvalidRequest
from engine.sampler import Sampler, sampling_rows
from engine.types import SamplingParams, TokenLogprobs
from kernels import dispatch, pinned
from kernels.highest import highest
from kernels.logprobs import logprobs
from kernels.penalties import TokenLists, penalize_repetition_
from tests.cuda.virtual_device import VirtualDevice

EOS = frozenset({0, 7})
VOCAB = 300
PENALTIES = SamplingParams(
    temperature=0.0, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.4, logprobs=20
)
KINDS = [
    PENALTIES,
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_k=9, logprobs=0),
    SamplingParams(temperature=0.8, top_p=0.7, min_tokens=90, stop_token_ids=(5, 6)),
    SamplingParams(temperature=1.2, min_p=0.02, logit_bias=((3, 4.0), (200, -100.0)), logprobs=3),
    SamplingParams(temperature=1.2, repetition_penalty=0.6),
    SamplingParams(temperature=0.0, bad_words=("any",), logprobs=20),
]


def some_rows(kinds: list[SamplingParams], seed: int = 0) -> dict[int, RowParams]:
    """By name, each with a history."""
    chance = random.Random(seed)
    rows = {}
    for name, sampling in enumerate(kinds, start=100):
        history = array("i", (chance.randrange(VOCAB) for _ in range(chance.randrange(5, 60))))
        words = ((11,), (history[-1], 12)) if sampling.bad_words else ()
        rows[name] = RowParams(sampling, name, len(history), len(history) - 3, history, 3, words)
    return rows


def chosen_by(
    sampler: DeviceSampler, logits: Tensor, params: Mapping[int, RowParams]
) -> tuple[dict[int, int], dict[int, TokenLogprobs]]:
    choice = sampler.choose(logits, params, sampling_rows(list(params.values())))
    return dict(zip(params, choice.ids.tolist(), strict=True)), choice.logprobs()


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:1], KINDS[1:2], KINDS[2:4], [PENALTIES] * 3])
def test_rows_of_all_kinds_get_what_they_get_on_the_cpu(kinds: list[SamplingParams]) -> None:
    ours, theirs = DeviceSampler(VirtualDevice(), VOCAB, EOS), Sampler(VOCAB, EOS)
    for step in range(4):
        params, logits = some_rows(kinds, step), 3 * torch.randn(len(kinds), VOCAB)
        same = logits.clone()
        assert chosen_by(ours, logits, params) == theirs.sample(same, params)
        assert torch.equal(logits, same)


def test_rows_beyond_those_that_are_known_are_sampled_by_the_devices_facts_alone() -> None:
    """So are graphs captured: with no row known, and none of them greedy for that."""
    logits = torch.randn(64, VOCAB)
    rows = sampling_rows(list(some_rows([SamplingParams(temperature=2.0)] * 64).values()))
    sampler = DeviceSampler(VirtualDevice(), VOCAB, EOS)
    ids = sampler.choose(logits, {}, rows).ids
    assert (ids != logits.argmax(-1)).sum() > 20
    first = some_rows([SamplingParams(temperature=0.0)])
    assert torch.equal(sampler.choose(logits, first, rows).ids, ids)


def test_logprobs_wait_for_their_step() -> None:
    device = VirtualDevice()
    choice = DeviceSampler(device, VOCAB, EOS).choose(
        torch.randn(2, VOCAB), some_rows(KINDS[:2]), sampling_rows(list(some_rows(KINDS[:2]).values()))
    )
    assert [entry.what for entry in device.trace] == ["copy"] * 4
    assert {entry.stream for entry in device.trace} == {"compute"}
    assert list(choice.logprobs()) == [100]


@pytest.mark.parametrize(
    ("sampling", "num_generated", "plain"),
    [
        (SamplingParams(), 0, True),
        (SamplingParams(temperature=0.5, top_k=3, top_p=0.3, min_p=0.2, seed=5, max_tokens=3), 0, True),
        (SamplingParams(repetition_penalty=1.0, presence_penalty=0.0, logit_bias=()), 0, True),
        (SamplingParams(min_tokens=4), 4, True),
        (SamplingParams(min_tokens=4), 3, False),
        (SamplingParams(logprobs=0), 0, False),
        (SamplingParams(logit_bias=((3, 1.0),)), 0, False),
        (SamplingParams(repetition_penalty=1.1), 0, False),
        (SamplingParams(frequency_penalty=0.1), 0, False),
    ],
)
def test_a_plain_row_takes_no_more_than_logits_and_facts(
    sampling: SamplingParams, num_generated: int, plain: bool
) -> None:
    assert is_plain(RowParams(sampling, 0, 9, num_generated)) is plain
    assert not is_plain(RowParams(SamplingParams(bad_words=("no",)), 0, 9, 0, None, 0, ((3,),)))


def test_parameters_that_cannot_work_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="stop_token_ids holds 300; this model's tokens are 0 to 299"):
        DeviceSampler(VirtualDevice(), VOCAB, EOS).check(SamplingParams(stop_token_ids=(VOCAB,)))


# The operations of the device, on the CPU.


@pytest.mark.parametrize("vocab", [21, 3000])
@pytest.mark.parametrize("num", [0, 1, 20])
def test_logprobs_of_the_device_are_those_of_the_cpu(vocab: int, num: int) -> None:
    logits = (5 * torch.randn(9, vocab)).round(decimals=1)
    logits[1] += 1000
    logits[2, 3:] = -torch.inf
    logits[3] = 0.0
    logits[4, ::2] = -0.0
    chosen = torch.tensor([0, 1, 2] * 3)
    expected = logprobs(logits, chosen, num, highest(logits, max(num, 1)))
    with dispatch.use("triton"):
        found = logprobs(logits, chosen, num)
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=0)
    finite = expected[1] > -torch.inf
    assert torch.equal(found[2][finite], expected[2][finite])


@pytest.mark.parametrize("penalty", [1.3, 0.4, 1e30])
def test_the_repetition_penalty_of_the_device_has_the_cpus_bits(penalty: float) -> None:
    logits = 4 * torch.randn(3, VOCAB)
    logits[0, :5] = torch.tensor([0.0, -0.0, -torch.inf, 1e-30, -1e30])
    lists = TokenLists(torch.tensor([2, 0]), torch.tensor([3, 5]), torch.tensor([9, 1, 250, 0, 1, 2, 3, 4]))
    expected = logits.clone()
    penalize_repetition_(expected, lists, torch.tensor([penalty, penalty / 2]))
    with dispatch.use("triton"):
        penalize_repetition_(logits, lists, torch.tensor([penalty, penalty / 2]))
    assert torch.equal(logits.view(torch.int32), expected.view(torch.int32))


class _NoWaiting(TorchDispatchMode):
    """Tensors of the device "meta" have no data, so that what depends on it fails.  Beyond that, the host's
    and the device's tensors only meet in copies for which nobody waits.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        to = (kwargs or {}).get("device")
        is_copy = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        crosses = len(devices) > 1 or (is_copy and to is not None and {torch.device(to).type} != devices)
        if crosses:
            assert is_copy and (kwargs or {}).get("non_blocking"), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.max().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64, device=x.device)),
    ],
)
def test_what_waits_is_noticed(waits: Callable[[Tensor], object]) -> None:
    x = torch.empty(3, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError, TypeError)), _NoWaiting():
        waits(x)


class _Nowhere:
    """Copies to the host have no data there either."""

    compute = "compute"

    def __init__(self) -> None:
        self.num_copies = 0

    def copy(self, to: Tensor, source: Tensor, stream: object) -> None:
        assert (to.device.type, source.device.type, stream) == ("cpu", "meta", self.compute)
        self.num_copies += 1


def test_nothing_that_depends_on_the_host_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def ids(logits: Tensor, *_: object) -> Tensor:
        return torch.empty(len(logits), dtype=torch.int64, device=logits.device)

    pinned_bytes = []
    monkeypatch.setattr(cuda_sampler, "sample", ids)
    monkeypatch.setattr(cuda_sampler, "greedy", ids)
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned_bytes.append(x.nbytes) or x)
    device: Any = _Nowhere()
    sampler = DeviceSampler(device, VOCAB, EOS)
    params = some_rows(KINDS)
    logits = torch.empty(len(params), VOCAB, device="meta")
    with dispatch.use("triton"), _NoWaiting():
        sampler.choose(logits, params, sampling_rows(list(params.values())))
        assert pinned.sent(torch.ones(3), logits.device).device == logits.device
    assert device.num_copies == 4
    assert len(pinned_bytes) > 8
