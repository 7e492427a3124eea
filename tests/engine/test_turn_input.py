"""What makes two requests the same."""

from dataclasses import replace

import pytest

from engine.turn_input import digest_of
from engine.types import Message, RegenerateRequest, SamplingParams, TurnId, TurnRequest

SAID = TurnRequest(TurnId("1"), (Message("user", "hello"),))
IDS = TurnRequest(TurnId("1"), token_ids=(1, 2, 3))
AGAIN = RegenerateRequest(TurnId("1"))


def said(**changes: object) -> TurnRequest:
    return replace(SAID, messages=(replace(SAID.messages[0], **changes),))  # type: ignore[arg-type]


DIFFERENT = [
    SAID,
    IDS,
    AGAIN,
    said(content="hullo"),
    said(role="tool"),
    said(name="Ada"),
    said(tool_call_id="Ada"),
    said(tool_calls=("{}",)),
    said(tool_calls=("{}", "{}")),
    replace(SAID, messages=SAID.messages * 2),
    replace(SAID, wants_reply=False),
    replace(SAID, sampling=SamplingParams(seed=0)),
    replace(SAID, sampling=SamplingParams(seed=1)),
    replace(SAID, sampling=SamplingParams(top_k=0)),
    replace(SAID, sampling=SamplingParams(logit_bias=((1, 0.5),))),
    replace(IDS, token_ids=(1, 2)),
    replace(IDS, token_ids=(1, 2, -1)),
    replace(IDS, wants_reply=False),
    replace(AGAIN, replaces=TurnId("0")),
    replace(AGAIN, sampling=SamplingParams(seed=1)),
]


def test_whatever_else_is_asked_for_has_another_digest() -> None:
    assert len({digest_of(request) for request in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.parametrize("request_", DIFFERENT)
def test_neither_the_name_of_a_turn_nor_its_patience_is_part_of_what_is_asked_for(
    request_: TurnRequest | RegenerateRequest,
) -> None:
    other = replace(request_, turn_id=TurnId("2"), timeout_s=3.0)
    assert digest_of(other) == digest_of(request_)


SET = SamplingParams(temperature=0.5, stop=("a", "\"b'"), stop_token_ids=(7,), ignore_eos=True)


@pytest.mark.parametrize(
    ("request_", "digest"),
    [
        (SAID, "eec8e93c73fca923200709d11e6d3201"),
        (IDS, "b5c9a2eb602e1005bb861a01e2621d88"),
        (
            TurnRequest(TurnId("1"), (Message("system", "it's"), Message("user", "hé\n")), sampling=SET),
            "ef9275a2ab7657c2bdd62c90177e232d",
        ),
    ],
)
def test_a_turn_that_the_first_version_stored_is_recognised(request_: TurnRequest, digest: str) -> None:
    assert digest_of(request_).hex() == digest


def test_digests_stay_as_they_are_once_stored() -> None:
    newer = replace(said(name="Ada"), sampling=SamplingParams(logprobs=0))
    assert [digest_of(request).hex() for request in (AGAIN, newer)] == [
        "ad4115a21b275741b6a2e7aa1ba4623e",
        "c7f6a1094a84cb05636d9a11dad5b9e0",
    ]
