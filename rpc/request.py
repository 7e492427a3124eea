"""What the client may ask for: sampling, and one of three kinds of input."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from rpc._generated import continuo_pb2 as pb
from rpc.failure import InvalidArgument

_INPUTS = ("text", "messages", "token_ids")


class Sampling(TypedDict, total=False):
    """Keyword arguments that choose the next token.  What is left out comes from the conversation, then the
    model.
    """

    temperature: float  # 0 = greedy
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    logprobs: int
    include_stop: bool
    bad_words: list[str]


def set_input(
    message: pb.Turn | pb.GenerateRequest,
    text: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    token_ids: Sequence[int] | None,
) -> None:
    """Raises `InvalidArgument` unless exactly one input is given."""
    given = [
        name for name, value in zip(_INPUTS, (text, messages, token_ids), strict=True) if value is not None
    ]
    if len(given) != 1:
        raise InvalidArgument(f"give one of {', '.join(_INPUTS)}; got {' and '.join(given) or 'none'}")
    if text is not None:
        message.text = text
    elif messages is not None:
        message.messages.CopyFrom(pb.Messages(messages=[pb.Message(**m) for m in messages]))
    else:
        message.token_ids.CopyFrom(pb.TokenIds(token_ids=token_ids))
