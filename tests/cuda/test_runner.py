"""The runner of the CUDA engine, on a device of the test's own, says what the CPU's says."""

import dataclasses
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from engine.batch import Collect, RowParams, Segment, StepPlan, StepResult
from engine.cache.kv_store import KVStore
from engine.cuda import sampler
from engine.cuda.graphs import CalledGraphs, buckets
from engine.cuda.runner import RING, CudaRunner
from engine.cuda.sampler import DeviceSampler
from engine.errors import InvariantError
from engine.model_runner import ModelRunner
from engine.models import load_model
from engine.models.decoder import Decoder
from engine.sampler import Sampler
from engine.scheduler import Step
from engine.types import SamplingParams
from kernels.paged_attention import AttnMeta
from tests.cuda import engines
from tests.cuda.virtual_device import VirtualDevice
from tests.engine.tiny_model import BLOCK_SIZE, write_model

NUM_BLOCKS, CONTEXT_BLOCKS, MAX_TOKENS, MAX_CONCURRENT = 40, 8, 96, 5
GREEDY = SamplingParams(temperature=0.0)
WARM = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder)
    return load_model(folder, torch.float32)


def new_store(decoder: Decoder) -> KVStore:
    c = decoder.config
    store = KVStore(c.num_layers, NUM_BLOCKS, c.num_kv_heads, BLOCK_SIZE, c.head_dim, torch.float32)
    store.slab.fill_(torch.nan)
    return store


class Cuda:
    """A runner under test, with its device and its KV."""

    def __init__(self, decoder: Decoder, *, warm: bool = False, **device: object) -> None:
        self.store = new_store(decoder)
        self.device = VirtualDevice(**device)
        vocab = decoder.config.vocab_size
        self.runner = CudaRunner(
            self.device,
            decoder,
            self.store,
            DeviceSampler(self.device, vocab, frozenset()),
            BLOCK_SIZE,
            MAX_TOKENS,
            MAX_CONCURRENT,
            CONTEXT_BLOCKS,
        )
        if warm:
            self.runner.warm_up()

    def run(self, plan: StepPlan) -> StepResult:
        return self.runner.launch(plan)()


def cpu_runner(decoder: Decoder) -> ModelRunner:
    sampler = Sampler(decoder.config.vocab_size, frozenset())
    return ModelRunner(decoder, new_store(decoder), sampler, BLOCK_SIZE)


@dataclass
class Chat:
    """A conversation that owns its blocks, and what the scheduler would make of it."""

    row: int
    tokens: list[int]
    slots: Sequence[int]
    sampling: SamplingParams = GREEDY
    num_done: int = 0

    def segment(self, num: int | None = None, *, is_known: bool = True) -> Segment:
        """The next `num` tokens, by default all; a draw if they are all.  Not `is_known`: the one that the
        step before drew.
        """
        first = self.num_done
        end = len(self.tokens) + (not is_known) if num is None else first + num
        self.num_done = end
        ids = tuple(self.tokens[first:end]) if is_known else None
        draws = end >= len(self.tokens)
        draw = RowParams(self.sampling, 7 * self.row, end, 0) if draws else None
        slots = np.array(self.slots[: -(-end // BLOCK_SIZE)], np.int32)
        return Segment(self.row, first, ids, slots, draw)


def chats(num: int, sampling: SamplingParams = GREEDY, seed: int = 0) -> list[Chat]:
    rng = random.Random(seed)
    places = rng.sample(range(NUM_BLOCKS), num * CONTEXT_BLOCKS)
    lengths = [rng.randint(3, 40) for _ in range(num)]
    return [
        Chat(
            number + 1,
            [rng.randrange(320) for _ in range(length)],
            places[number * CONTEXT_BLOCKS :][:CONTEXT_BLOCKS],
            sampling,
        )
        for number, length in enumerate(lengths)
    ]


def step_of(number: int, every: Sequence[Chat]) -> StepPlan:
    """A chunk of up to 17 tokens of each that has any."""
    chunks = [(chat, min(17, len(chat.tokens) - chat.num_done)) for chat in every]
    return StepPlan(number, tuple(chat.segment(num) for chat, num in chunks if num))


def tell(every: Sequence[Chat], sampled: dict[int, int]) -> None:
    for chat in every:
        if chat.row in sampled:
            chat.tokens.append(sampled[chat.row])


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
@pytest.mark.parametrize("warm", [False, True])
def test_steps_choose_the_tokens_that_the_cpu_chooses(
    decoder: Decoder, sampling: SamplingParams, warm: bool
) -> None:
    ours, theirs, every = Cuda(decoder, warm=warm), cpu_runner(decoder), chats(4, sampling)
    for number in range(14):
        plan = step_of(number, every)
        found, wanted = ours.run(plan), theirs.run(plan)
        assert found.sampled == wanted.sampled and found.seconds > 0
        tell(every, wanted.sampled)
    assert all(len(chat.tokens) > chat.num_done - 1 > 3 for chat in every)
    assert ours.device.num_lent_events == 0


@pytest.mark.parametrize("warm", [False, True])
def test_a_step_goes_on_from_tokens_that_the_host_has_not_seen(decoder: Decoder, warm: bool) -> None:
    ours, theirs = Cuda(decoder, warm=warm), cpu_runner(decoder)
    collects: list[Collect] = []
    wanted: list[dict[int, int]] = []
    for number, plan in enumerate(run_ahead_plans(8)):
        collects.append(ours.runner.launch(plan))
        wanted.append(theirs.run(plan).sampled)
        if number:
            assert collects.pop(0)().sampled == wanted.pop(0)
    assert [collect().sampled for collect in collects] == wanted


def run_ahead_plans(num: int) -> Iterator[StepPlan]:
    """Two prompts in the first step; from then on each token is the one that the step before drew, and from
    the fifth step on there is one more, which begins with a prompt.
    """
    one, two, three = chats(3)
    yield StepPlan(0, (one.segment(), two.segment()))
    for number in range(1, num):
        every = [one, two] if number < 5 else [one, three, two]
        yield StepPlan(number, tuple(next_segment(chat) for chat in every))


def next_segment(chat: Chat) -> Segment:
    if not chat.num_done:
        return chat.segment()
    segment = chat.segment(is_known=False)
    chat.tokens.append(-1)  # unknown here
    return segment


def test_a_launch_does_not_wait_and_ids_are_copied_behind_the_step(decoder: Decoder) -> None:
    ours = Cuda(decoder, warm=True)
    chat, _ = chats(2)
    del ours.device.trace[:]
    collect = ours.runner.launch(StepPlan(0, (chat.segment(),)))
    begun, ended, waited, copied, arrived = ours.device.trace
    assert [entry.stream for entry in (begun, ended)] == ["compute"] * 2
    assert waited.stream == "results" and waited.what == "wait" and waited.subject is ended.subject
    assert (copied.stream, copied.what) == ("results", "copy") and arrived.stream == "results"
    collect()
    assert ours.device.trace[-1].stream == "host" and ours.device.trace[-1].subject is arrived.subject


def test_a_collect_that_does_not_wait_is_noticed(decoder: Decoder) -> None:
    ours = Cuda(decoder)
    ours.run(next(run_ahead_plans(1)))
    (site,) = (site for site in ours.device.sites if site.endswith(":host"))
    hasty = Cuda(decoder, ignored_site=site)
    assert hasty.run(next(run_ahead_plans(1))).sampled == {1: -1, 2: -1}  # what the device has not written


def test_a_ring_of_steps_is_in_flight_and_no_step_more(decoder: Decoder) -> None:
    ours, theirs = Cuda(decoder), cpu_runner(decoder)
    plans = list(run_ahead_plans(3 * RING))
    wanted = [theirs.run(plan).sampled for plan in plans]
    found = []
    for first in range(0, len(plans), RING):  # all slots are used again, and all at a time
        collects = [ours.runner.launch(plan) for plan in plans[first : first + RING]]
        with pytest.raises(InvariantError, match=f"{RING} steps are launched and not collected"):
            ours.runner.launch(StepPlan(99, ()))
        found += [collect().sampled for collect in collects]
    assert found == wanted


def test_a_step_filled_up_to_a_graph_writes_what_a_direct_launch_writes(
    decoder: Decoder, replayed: list[int]
) -> None:
    direct, by_graph, every = Cuda(decoder), Cuda(decoder, warm=True), chats(3)
    del replayed[:]
    for number in range(8):
        plan = step_of(number, every)
        sampled = direct.run(plan).sampled
        assert by_graph.run(plan).sampled == sampled
        tell(every, sampled)
    assert set(replayed) == {4}
    written = ~direct.store.slab.isnan()
    assert torch.equal(written, ~by_graph.store.slab.isnan())
    torch.testing.assert_close(by_graph.store.slab[written], direct.store.slab[written])


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The graphs that were replayed, by their buckets."""
    seen: list[int] = []
    replay = CalledGraphs.replay

    def watched(self: CalledGraphs, bucket: int) -> torch.Tensor:
        seen.append(bucket)
        return replay(self, bucket)

    monkeypatch.setattr(CalledGraphs, "replay", watched)
    return seen


def one_token(chat: Chat, **draw: object) -> Segment:
    """The chat's first token, which draws another."""
    segment = Chat(chat.row, chat.tokens[:1], chat.slots).segment()
    assert segment.draw is not None
    return segment._replace(draw=segment.draw._replace(**draw)) if draw else segment


def test_only_steps_of_plain_decoding_are_replayed(decoder: Decoder, replayed: list[int]) -> None:
    ours = Cuda(decoder, warm=True)
    del replayed[:]
    one, two, three = (one_token(chat) for chat in chats(3))
    ours.run(StepPlan(0, (one,)))
    ours.run(StepPlan(1, (one, two)))
    assert replayed == [1, 2]
    ours.runner.launch(StepPlan(2, (one,)), lambda layer: None)()
    ours.run(StepPlan(3, (one, two._replace(draw=None))))
    ours.run(StepPlan(4, (one, three._replace(token_ids=(5, 6)))))
    ours.run(StepPlan(5, (one_token(chats(1)[0], sampling=SamplingParams(temperature=0.0, logprobs=2)),)))
    assert replayed == [1, 2]


def test_edits_and_logprobs_are_those_of_the_cpu(decoder: Decoder, replayed: list[int]) -> None:
    ours, theirs, every = Cuda(decoder, warm=True), cpu_runner(decoder), chats(3)
    del replayed[:]
    every[0].sampling = SamplingParams(temperature=0.0, repetition_penalty=1.3, logprobs=3)
    every[1].sampling = SamplingParams(temperature=0.8, logit_bias=((7, 5.0), (9, -2.0)))
    told = 0
    for number in range(7):
        plan = with_histories(step_of(number, every), every)
        found, wanted = ours.run(plan), theirs.run(plan)
        assert found.sampled == wanted.sampled
        assert list(found.logprobs) == list(wanted.logprobs)
        for row, logprobs in wanted.logprobs.items():
            told += 1
            assert found.logprobs[row].token_id == logprobs.token_id
            assert found.logprobs[row].logprob == pytest.approx(logprobs.logprob, abs=1e-5)
            assert [id for id, _ in found.logprobs[row].top] == [id for id, _ in logprobs.top]
        tell(every, wanted.sampled)
    assert told > 3 and not replayed


def with_histories(plan: StepPlan, every: Sequence[Chat]) -> StepPlan:
    """As for rows whose edits take the tokens before."""
    tokens = {chat.row: array("i", chat.tokens) for chat in every}
    segments = (
        segment._replace(draw=segment.draw and segment.draw._replace(history=tokens[segment.row]))
        for segment in plan.segments
    )
    return dataclasses.replace(plan, segments=tuple(segments))


def test_every_layer_is_waited_for(decoder: Decoder) -> None:
    layers: list[int] = []
    chat, _ = chats(2)
    Cuda(decoder).runner.launch(StepPlan(0, (chat.segment(),)), layers.append)()
    assert layers == list(range(decoder.config.num_layers))


def test_a_step_that_draws_nothing_writes_kv(decoder: Decoder) -> None:
    ours = Cuda(decoder)
    chat, _ = chats(2)
    assert ours.run(StepPlan(0, (chat.segment(2),))).sampled == {}
    slot = chat.slots[0]
    assert (
        not ours.store.slab[:, slot, :, :, :2].isnan().any()
        and ours.store.slab[:, slot, :, :, 2:].isnan().all()
    )


def test_warming_up_changes_no_row_and_no_kv(decoder: Decoder) -> None:
    ours, cold, chat = Cuda(decoder), Cuda(decoder), chats(1)[0]
    first = StepPlan(0, (chat.segment(),))
    assert ours.run(first).sampled == cold.run(first).sampled
    before = ours.store.slab.clone()
    ours.runner.warm_up()
    torch.testing.assert_close(ours.store.slab, before, rtol=0, atol=0, equal_nan=True)
    then = StepPlan(1, (chat.segment(is_known=False),))
    assert ours.run(then).sampled == cold.run(then).sampled
    assert ours.device.num_lent_events == 0


def test_warming_up_takes_every_way_to_choose_and_every_size(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = dict[str, list[int]](greedy=[], sample=[])

    def watched(name: str) -> Callable[..., torch.Tensor]:
        choose = getattr(sampler, name)

        def watching(logits: torch.Tensor, *rest: object) -> torch.Tensor:
            chosen[name].append(len(logits))
            ids: torch.Tensor = choose(logits, *rest)
            return ids

        return watching

    for name in chosen:
        monkeypatch.setattr(sampler, name, watched(name))
    sizes: list[tuple[int, int]] = []
    forward = decoder.forward

    def forwarded(ids: torch.Tensor, meta: AttnMeta, *rest: object) -> torch.Tensor:
        sizes.append((len(ids), meta.num_positions))
        return forward(ids, meta, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "forward", forwarded)
    Cuda(decoder, warm=True)
    assert chosen == {"greedy": [1] * 7, "sample": [5, 4, 2, 1]}
    anywhere = CONTEXT_BLOCKS * BLOCK_SIZE
    decoding, prompts = [(num, anywhere) for num in (5, 4, 2, 1)], (2, 4, 8, 16, 32, 64, MAX_TOKENS)
    assert sizes == [*decoding, *((num, num) for num in prompts)]


def test_a_name_that_comes_back_under_another_number_is_new(decoder: Decoder) -> None:
    ours, theirs = Cuda(decoder), cpu_runner(decoder)
    (chat,) = chats(1)
    every = [chat]
    for number in range(30):  # more names than there are rows
        plan = step_of(number, every)
        wanted = theirs.run(plan).sampled
        assert ours.run(plan).sampled == wanted
        tell(every, wanted)
        chat.row += 1


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
@pytest.mark.parametrize(("run_ahead", "warm"), [(0, True), (1, False), (1, True)])
def test_conversations_are_told_what_the_cpu_engine_tells(
    decoder: Decoder, sampling: SamplingParams, run_ahead: int, warm: bool
) -> None:
    sampling = dataclasses.replace(sampling, max_tokens=9)
    wanted = engines.replies(engines.cpu_core(decoder), 0, 3, 3, sampling)
    core = engines.cuda_core(decoder, warm=warm)
    assert engines.replies(core, run_ahead, 3, 3, sampling) == wanted
    assert {len(reply) for reply in wanted} == {9}


def test_more_conversations_than_fit_are_told_what_the_cpu_engine_tells(decoder: Decoder) -> None:
    sampling = dataclasses.replace(GREEDY, max_tokens=12)
    wanted = engines.replies(engines.cpu_core(decoder), 0, 4, 2, sampling)
    core = engines.cuda_core(decoder, warm=True, num_blocks=9)
    assert engines.replies(core, 1, 4, 2, sampling) == wanted


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_histories_that_come_back_from_the_host_are_told_what_the_cpu_engine_tells(
    decoder: Decoder, run_ahead: int
) -> None:
    sampling = dataclasses.replace(GREEDY, max_tokens=5)
    wanted = engines.replies(engines.cpu_core(decoder), 0, 4, 3, sampling)
    core = engines.cuda_core(decoder, warm=True, num_blocks=9, num_host_blocks=20)
    loads: list[int] = []
    plan = core.plan

    def watched() -> Step | None:
        step = plan()
        loads.append(len(step.plan.loads) if step else 0)
        return step

    core.plan = watched  # type: ignore[method-assign]
    assert engines.replies(core, run_ahead, 4, 3, sampling) == wanted
    assert sum(loads) > 4


def test_a_token_past_a_stop_is_dropped(decoder: Decoder) -> None:
    sampling = dataclasses.replace(GREEDY, max_tokens=20)
    [[*reply]] = engines.replies(engines.cpu_core(decoder), 0, 1, 1, sampling)
    stop = next(token for at, token in enumerate(reply) if at > 3 and token not in reply[:at])
    stopping = dataclasses.replace(sampling, stop_token_ids=(stop,))
    core = engines.cuda_core(decoder, warm=True)
    [found] = engines.replies(core, 1, 1, 1, stopping)
    assert found == reply[: reply.index(stop) + 1]


def test_buckets_end_with_the_most() -> None:
    assert buckets(1) == (1,)
    assert buckets(8) == (1, 2, 4, 8)
    assert buckets(20) == (1, 2, 4, 8, 16, 20)
    assert buckets(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
