"""What the client may ask for: sampling, one of three kinds of input, and a point in the history."""

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from rpc._generated import continuo_pb2 as pb
from rpc.failure import InvalidArgument

_INPUTS = ("text", "messages", "token_ids")
_KEYS = ("role", "content", "name", "tool_call_id", "tool_calls")


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


def sampling_of(given: Sampling) -> pb.Sampling:
    """Raises `InvalidArgument` for a name that is not known, or a value of another kind."""
    message = pb.Sampling()
    values: dict[str, Any] = dict(given)
    for name, value in values.items():
        if name not in Sampling.__annotations__:
            raise InvalidArgument(
                f"{name} is no sampling parameter; there are {', '.join(Sampling.__annotations__)}"
            )
        try:
            message.MergeFrom(pb.Sampling(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"{name} is {value!r}: {error}; give it a value of its kind") from None
    return message


def new_id(kind: str) -> str:
    """A name that nobody else uses: asking again under it can be recognised as asking again."""
    return f"{kind}-{uuid.uuid4().hex[:16]}"


def set_input(
    message: pb.Turn | pb.Append | pb.GenerateRequest,
    text: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
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
        message.messages.CopyFrom(messages_of(messages))
    else:
        message.token_ids.CopyFrom(pb.TokenIds(token_ids=token_ids))


def messages_of(messages: Sequence[Mapping[str, Any]]) -> pb.Messages:
    """From mappings with role, content and, where it applies, name, tool_call_id, tool_calls (dicts)."""
    return pb.Messages(messages=[_message(n, message) for n, message in enumerate(messages)])


def json_objects(objects: Sequence[Mapping[str, Any]] | None, what: str) -> list[str]:
    """Tools or tool calls as the wire has them."""
    try:
        return [json.dumps(each, ensure_ascii=False, allow_nan=False) for each in objects or ()]
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{what} cannot be written as JSON: {error}") from None


def set_point(message: pb.Rewind | pb.ForkRequest, turns: int | None, tokens: int | None) -> None:
    if turns is not None and tokens is not None:
        raise InvalidArgument(f"give turns or tokens, not both; got turns={turns} and tokens={tokens}")
    if turns is not None:
        message.turns = turns
    elif tokens is not None:
        message.tokens = tokens


def fork_request(
    id: str,
    turns: int | None,
    tokens: int | None,
    new_conversation_id: str | None,
    labels: Mapping[str, str] | None,
) -> pb.ForkRequest:
    """With an id of its own, which makes it safe to repeat."""
    request = pb.ForkRequest(
        conversation_id=id,
        new_conversation_id=new_conversation_id or new_id("c"),
        labels=labels_of(labels),
    )
    set_point(request, turns, tokens)
    return request


def labels_of(labels: Mapping[str, str] | None) -> pb.Labels | None:
    return None if labels is None else pb.Labels(labels=labels)


def _message(n: int, message: Mapping[str, Any]) -> pb.Message:
    if unknown := [key for key in message if key not in _KEYS]:
        raise InvalidArgument(f"message {n} has {', '.join(unknown)}; a message takes {', '.join(_KEYS)}")
    fields = {key: value for key, value in message.items() if value is not None}
    fields["tool_calls"] = json_objects(fields.get("tool_calls"), f"tool_calls of message {n}")
    try:
        return pb.Message(**fields)
    except TypeError as error:
        raise InvalidArgument(f"message {n}: {error}") from None
