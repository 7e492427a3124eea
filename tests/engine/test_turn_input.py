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


def test_digests_stay_as_they_are_once_stored() -> None:
    assert [digest_of(request).hex() for request in (SAID, IDS, AGAIN)] == [
        "d679d55865a9b44c000ca1f3f9098e21",
        "b6ce38ee77ff884b87730771dd3a6cff",
        "8982a2d1ede9d5a150bd7b023d362fa9",
    ]
