"""The decoder against the Hugging Face modules, family by family, over paged KV in ragged steps."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.models import load_model
from engine.models.decoder import Decoder
from kernels.dispatch import implementation, use
from tests.kernels.cases import needs_native
from tests.models.harness import PagedHarness, Run, converse, speak
from tests.models.tiny_models import FAMILIES, tiny_checkpoint

REPLY_LENGTH = 64
ROUNDING = 1e-4  # float32 logits of these models, of spread 1 or more, summed in another order
TURN_LENGTHS = (45, 9, 70)  # a block and a bit; inside a block; more than two


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Decoder]:
    """The Hugging Face module and our decoder, both in float32, from one folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_checkpoint(request.param, folder, torch.float32), load_model(folder, torch.float32)


def turns_of(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(320) for _ in range(length)] for length in TURN_LENGTHS]


def assert_same(ours: Tensor, expected: Tensor) -> None:
    """Bit for bit with the native kernels, whose float32 rows are independent; else to rounding."""
    tolerance = 0.0 if implementation() == "native" else ROUNDING
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@torch.inference_mode()
def logits_by_reference(model: PreTrainedModel, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0]


@torch.inference_mode()
def replies_by_reference(model: PreTrainedModel, turns: list[list[int]]) -> list[list[int]]:
    """Every turn from nothing: the whole history is read again, then decoded greedily."""
    history: list[int] = []
    replies = []
    for turn in turns:
        history = history + turn
        output = model(torch.tensor([history]), use_cache=True)
        reply = [int(output.logits[0, -1].argmax())]
        while len(reply) < REPLY_LENGTH:
            output = model(torch.tensor([reply[-1:]]), past_key_values=output.past_key_values, use_cache=True)
            reply.append(int(output.logits[0, -1].argmax()))
        history = history + reply
        replies.append(reply)
    return replies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_close_to_exact_as_the_reference(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_checkpoint(family, tmp_path, dtype)
    ids = turns_of(1)[2] * 3
    ours = PagedHarness(load_model(tmp_path, dtype)).step(Run(0, 0, ids), rows=torch.arange(len(ids)))

    reference = logits_by_reference(model, ids)
    exact = logits_by_reference(model.double(), ids)
    noise = (reference.double() - exact).abs().max()
    error = (ours.double() - exact).abs().max()
    assert exact.std() > 0.5, "logits that hardly differ would prove nothing"
    assert error <= 2 * noise + 1e-5, f"{error=:.2e} {noise=:.2e}"


def test_kept_kv_gives_the_tokens_of_a_full_re_read_at_every_turn(
    pair: tuple[PreTrainedModel, Decoder],
) -> None:
    model, decoder = pair
    expected = replies_by_reference(model, turns_of(2))
    assert all(len(set(reply)) > 16 for reply in expected), "a reply that repeats itself would prove little"
    assert converse(PagedHarness(decoder), speak(0, turns_of(2), [REPLY_LENGTH] * 3)) == [expected]


def test_batch_mates_and_chunked_prompts_change_no_token(pair: tuple[PreTrainedModel, Decoder]) -> None:
    model, decoder = pair
    chunks = {3: 7, 4: 33, 5: 10**9}  # seed of the conversation -> most tokens of it in one step
    speakers = [speak(seed, turns_of(seed), [REPLY_LENGTH] * 3, chunk) for seed, chunk in chunks.items()]
    expected = [replies_by_reference(model, turns_of(seed)) for seed in chunks]
    assert converse(PagedHarness(decoder), *speakers) == expected


def test_a_dropped_prefix_recomputed_in_the_step_of_new_tokens_restores_the_logits(
    pair: tuple[PreTrainedModel, Decoder],
) -> None:
    _, decoder = pair
    ids = turns_of(6)[2]
    whole = PagedHarness(decoder)
    whole.step(Run(0, 0, ids[:64]))
    expected = whole.step(Run(0, 64, ids[64:]))

    harness = PagedHarness(decoder)
    harness.step(Run(0, 0, ids[:64]))
    harness.drop_block(0, 0)
    assert harness.step(Run(0, 64, ids[64:])).isnan().any(), "the dropped block must matter"
    recomputed = harness.step(Run(0, 0, ids[:32]), Run(0, 64, ids[64:]))
    assert_same(recomputed[1:], expected)


@needs_native
def test_the_torch_kernels_compute_what_the_native_ones_do(pair: tuple[PreTrainedModel, Decoder]) -> None:
    _, decoder = pair
    ids = turns_of(10)
    runs = Run(0, 0, ids[0]), Run(1, 0, ids[2])
    rows = torch.arange(len(ids[0]) + len(ids[2]))
    assert implementation() == "native"
    native = PagedHarness(decoder).step(*runs, rows=rows)
    with use("torch"):
        by_torch = PagedHarness(decoder).step(*runs, rows=rows)
    torch.testing.assert_close(by_torch, native, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("pair", ["mistral"], indirect=True)
def test_what_lies_before_every_window_is_not_missed(pair: tuple[PreTrainedModel, Decoder]) -> None:
    _, decoder = pair
    ids = turns_of(9)[2] * 2
    position = 3 * 32 + 7
    windows = {attention.window for attention in decoder.config.layers}
    assert windows == {41}, "the row sees positions 63 to 103: a part of block 1, none of block 0"
    whole, harness = PagedHarness(decoder), PagedHarness(decoder)
    for each in (whole, harness):
        each.step(Run(0, 0, ids[:position]))
    harness.drop_block(0, 0)
    expected = whole.step(Run(0, position, ids[position : position + 1]))
    assert_same(harness.step(Run(0, position, ids[position : position + 1])), expected)
    harness.drop_block(0, 1)
    assert harness.step(Run(0, position, ids[position : position + 1])).isnan().any()


def test_logits_come_for_the_rows_asked_and_only_those(pair: tuple[PreTrainedModel, Decoder]) -> None:
    _, decoder = pair
    ids, runs = turns_of(7), PagedHarness(decoder)
    num_rows = len(ids[0]) + len(ids[1])
    every = runs.step(Run(0, 0, ids[0]), Run(1, 0, ids[1]), rows=torch.arange(num_rows))
    assert every.shape == (num_rows, decoder.config.vocab_size)
    assert every.dtype == torch.float32
    last = PagedHarness(decoder).step(Run(0, 0, ids[0]), Run(1, 0, ids[1]))
    assert_same(last, every[[len(ids[0]) - 1, -1]])
    alone = PagedHarness(decoder).step(Run(1, 0, ids[1]))
    assert_same(alone, last[1:])


def test_a_step_that_samples_nothing_still_writes_its_kv(pair: tuple[PreTrainedModel, Decoder]) -> None:
    _, decoder = pair
    ids = turns_of(8)[0]
    harness, silent = PagedHarness(decoder), PagedHarness(decoder)
    harness.step(Run(0, 0, ids))
    nothing = silent.step(Run(0, 0, ids), rows=torch.arange(0))
    assert nothing.shape == (0, decoder.config.vocab_size)
    next_run = Run(0, len(ids), [5])
    assert_same(silent.step(next_run), harness.step(next_run))


def test_marks_name_every_kernel_and_change_nothing(pair: tuple[PreTrainedModel, Decoder]) -> None:
    _, decoder = pair
    marks: list[str] = []
    waits: list[int] = []
    run, num_layers = Run(0, 0, [1, 2, 3, 4]), decoder.config.num_layers
    logits = PagedHarness(decoder).step(run, mark=marks.append)
    assert marks.count("attention") == num_layers and marks.count("linears") == 4 * num_layers + 1
    assert marks[-1] == "rest" and set(marks) == {"linears", "attention", "rest"}
    marks.clear()
    PagedHarness(decoder).step(run, mark=marks.append, wait_for=waits.append)
    assert marks.count("copies") == len(waits) == num_layers
    assert_same(PagedHarness(decoder).step(run), logits)
