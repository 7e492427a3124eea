"""Proto messages <-> engine types.  Fields, and names and numbers of enums, are the same on both sides."""

import math
from dataclasses import asdict
from typing import Any

from google.protobuf.message import Message as ProtoMessage

from engine import errors
from engine.load import Load
from engine.types import (
    ConversationEvent,
    ConversationId,
    ConversationRecord,
    Delta,
    FinishReason,
    ForkRequest,
    GenerateRequest,
    HistoryRewritten,
    Message,
    ModelInfo,
    OpenRequest,
    Point,
    RegenerateRequest,
    ResumeRequest,
    RewritePolicy,
    SamplingParams,
    Standing,
    StateChanged,
    TokenLogprobs,
    TurnAccepted,
    TurnDone,
    TurnFailed,
    TurnId,
    TurnRecord,
    TurnRequest,
    UpdateRequest,
)
from rpc._generated import continuo_pb2 as pb
from rpc.status import error_message

MAX_ID = 128  # characters of a conversation's or turn's id

# ------------------------------------------------------------------------------------------------ requests


def open_request(message: pb.Open) -> OpenRequest:
    chosen = _given(message, "conversation_id")
    return OpenRequest(
        conversation_id=None if chosen is None else conversation_id(chosen),
        system=_given(message, "system"),
        sampling=sampling_params(message.sampling),
        labels=dict(message.labels),
        history=_messages(message.history),
        tools=tuple(message.tools),
        on_rewrite=_rewrite_policy(message.on_rewrite),
    )


def resume_request(message: pb.Resume) -> ResumeRequest:
    return ResumeRequest(
        conversation_id=conversation_id(message.conversation_id),
        resume_token=_given(message, "resume_token"),
        after_seq=_given(message, "after_seq"),
        expect_committed_tokens=_given(message, "expect_committed_tokens"),
    )


def turn_request(message: pb.Turn) -> TurnRequest:
    return TurnRequest(
        turn_id=TurnId(_id(message.turn_id, "turn_id")),
        messages=_input_messages(message),
        token_ids=tuple(message.token_ids.token_ids),
        sampling=sampling_params(message.sampling),
        timeout_s=_seconds(message, "timeout_s"),
    )


def append_request(message: pb.Append) -> TurnRequest:
    return TurnRequest(
        turn_id=TurnId(_id(message.turn_id, "turn_id")),
        messages=_input_messages(message),
        token_ids=tuple(message.token_ids.token_ids),
        wants_reply=False,
    )


def regenerate_request(message: pb.Regenerate) -> RegenerateRequest:
    replaces = _given(message, "replaces")
    return RegenerateRequest(
        turn_id=TurnId(_id(message.turn_id, "turn_id")),
        replaces=None if replaces is None else TurnId(_id(replaces, "replaces")),
        sampling=sampling_params(message.sampling),
        timeout_s=_seconds(message, "timeout_s"),
    )


def rewind_point(message: pb.Rewind) -> Point:
    point = _point(message, message.WhichOneof("to"))
    if point is None:
        raise errors.InvalidRequest("the rewind does not say where to; set turns or tokens")
    return point


def update_request(message: pb.Update) -> UpdateRequest:
    sampling, labels = _given(message, "sampling"), _given(message, "labels")
    if sampling is None and labels is None:
        raise errors.InvalidRequest("the update changes nothing; set sampling or labels")
    return UpdateRequest(
        sampling=None if sampling is None else sampling_params(sampling),
        labels=None if labels is None else dict(labels.labels),
    )


def fork_request(message: pb.ForkRequest) -> ForkRequest:
    chosen, labels = _given(message, "new_conversation_id"), _given(message, "labels")
    return ForkRequest(
        conversation_id=conversation_id(message.conversation_id),
        new_id=None if chosen is None else ConversationId(_id(chosen, "new_conversation_id")),
        at=_point(message, message.WhichOneof("at")),
        labels=None if labels is None else dict(labels.labels),
    )


def generate_request(message: pb.GenerateRequest, timeout_s: float | None) -> GenerateRequest:
    """`timeout_s` is what is left of the call's deadline."""
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise errors.InvalidRequest("the request has no prompt; set text, messages or token_ids")
    return GenerateRequest(
        prompt=message.text if kind == "text" else None,
        messages=_messages(message.messages),
        token_ids=tuple(message.token_ids.token_ids),
        sampling=sampling_params(message.sampling),
        timeout_s=timeout_s,
        tools=tuple(message.tools),
    )


def drain_grace(message: pb.DrainRequest) -> float | None:
    return _seconds(message, "grace_s")


def sampling_params(message: pb.Sampling) -> SamplingParams:
    """Fields have the same names on both sides; an empty list means not set."""
    given: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    for name in given.keys() & {"stop", "stop_token_ids", "bad_words"}:
        given[name] = tuple(given[name])
    if "logit_bias" in given:
        given["logit_bias"] = tuple(sorted(given["logit_bias"].items()))
    return SamplingParams(**given)


def cancelled_turn(message: pb.Cancel) -> TurnId:
    return TurnId(_id(message.turn_id, "turn_id"))


def conversation_id(text: str) -> ConversationId:
    return ConversationId(_id(text, "conversation_id"))


# ------------------------------------------------------------------------------------------------ answers


def server_event(event: ConversationEvent) -> pb.ServerEvent:
    match event:
        case TurnAccepted():
            return pb.ServerEvent(seq=event.seq, turn_accepted=_turn_accepted(event))
        case Delta():
            return pb.ServerEvent(seq=event.seq, delta=_delta(event))
        case TurnDone():
            return pb.ServerEvent(seq=event.seq, turn_done=_turn_done(event))
        case TurnFailed():
            error = error_message(event.error, turn_id=event.turn_id)
            return pb.ServerEvent(
                seq=event.seq, turn_failed=pb.TurnFailed(turn_id=event.turn_id, error=error)
            )
        case HistoryRewritten():
            return pb.ServerEvent(seq=event.seq, history_rewritten=_history_rewritten(event))
        case StateChanged():
            return pb.ServerEvent(seq=event.seq, state_changed=_state_changed(event))
    raise errors.InvariantError(f"no message stands for {event!r}")


def rewound(client_seq: int, standing: Standing) -> pb.ServerEvent:
    return pb.ServerEvent(rewound=pb.Rewound(client_seq=client_seq, **asdict(standing)))


def generate_event(event: TurnAccepted | Delta | TurnDone) -> pb.GenerateEvent:
    match event:
        case TurnAccepted():
            return pb.GenerateEvent(accepted=_turn_accepted(event))
        case Delta():
            return pb.GenerateEvent(delta=_delta(event))
        case TurnDone():
            return pb.GenerateEvent(done=_turn_done(event))


def conversation(record: ConversationRecord) -> pb.Conversation:
    return pb.Conversation(
        conversation_id=record.id,
        system=record.system,
        sampling=_sampling(record.sampling),
        labels=record.labels,
        created_at=record.created_at,
        updated_at=record.updated_at,
        num_turns=record.num_turns,
        num_tokens=record.num_tokens,
        fingerprint=record.fingerprint,
        tools=record.tools,
        on_rewrite=pb.RewritePolicy.Name(record.on_rewrite.value),
        parent_id=record.parent,
        forked_at=record.forked_at,
    )


def committed_turn(record: TurnRecord) -> pb.CommittedTurn:
    return pb.CommittedTurn(
        turn_id=record.turn_id,
        number=record.number,
        first_token=record.first_token,
        messages=[pb.Message(**asdict(message)) for message in record.messages],
        prompt_token_ids=record.prompt_ids,
        reply=record.reply_text,
        reply_token_ids=record.reply_ids,
        finish_reason=_finish_reason(record.finish_reason),
        matched_stop=record.matched_stop,
        usage=pb.Usage(**asdict(record.usage)),
        timing=pb.Timing(**asdict(record.timing)),
        created_at=record.created_at,
        history_rewritten=record.history_rewritten,
    )


def model_info(info: ModelInfo) -> pb.GetModelInfoResponse:
    return pb.GetModelInfoResponse(
        name=info.name,
        version=info.version,
        fingerprint=info.fingerprint,
        architecture=info.architecture,
        dtype=info.dtype,
        device=info.device,
        vocab_size=info.vocab_size,
        eos_token_ids=info.eos_token_ids,
        has_chat_template=info.has_chat_template,
        limits=pb.Limits(**asdict(info.limits)),
    )


def load(load: Load) -> pb.GetLoadResponse:
    return pb.GetLoadResponse(**asdict(load))


# ------------------------------------------------------------------------------------------------ parts


def _given(message: ProtoMessage, field: str) -> Any:
    """The value of an `optional` field, or None where it is not set."""
    return getattr(message, field) if message.HasField(field) else None


def _id(text: str, field: str) -> str:
    if not text:
        raise errors.InvalidRequest(f"{field} is empty; set it")
    if len(text) > MAX_ID or not text.isprintable():
        raise errors.InvalidRequest(
            f"{field} must be at most {MAX_ID} printable characters; got {text[:MAX_ID]!r}"
        )
    return text


def _seconds(message: ProtoMessage, field: str) -> float | None:
    seconds: float | None = _given(message, field)
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise errors.InvalidRequest(f"{field} is {seconds:g}; it must be a positive number of seconds")
    return seconds


def _input_messages(message: pb.Turn | pb.Append) -> tuple[Message, ...]:
    """What a turn says, if it says it in messages.  Raises if it says nothing."""
    kind = message.WhichOneof("input")
    if kind is None:
        raise errors.InvalidRequest(f"turn {message.turn_id} says nothing; set text, messages or token_ids")
    return (Message("user", message.text),) if kind == "text" else _messages(message.messages)


def _messages(message: pb.Messages) -> tuple[Message, ...]:
    return tuple(
        Message(m.role, m.content, _given(m, "name"), _given(m, "tool_call_id"), tuple(m.tool_calls))
        for m in message.messages
    )


def _point(message: pb.Rewind | pb.ForkRequest, kind: str | None) -> Point | None:
    if kind is None:
        return None
    if (value := getattr(message, kind)) < 0:
        raise errors.InvalidRequest(f"{kind} is {value}; it must be 0 or more, so many {kind} stay")
    return Point(num_turns=value) if kind == "turns" else Point(num_tokens=value)


def _rewrite_policy(number: int) -> RewritePolicy:
    try:
        return RewritePolicy(number)
    except ValueError:
        known = " or ".join(f"{policy.name} ({policy.value})" for policy in RewritePolicy)
        raise errors.InvalidRequest(f"on_rewrite is {number}; it must be {known}") from None


def _sampling(params: SamplingParams) -> pb.Sampling:
    given = {name: value for name, value in asdict(params).items() if value is not None}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return pb.Sampling(**given)


def _turn_accepted(event: TurnAccepted) -> pb.TurnAccepted:
    return pb.TurnAccepted(
        turn_id=event.turn_id, queue_position=event.queue_position, restarted=event.restarted
    )


def _delta(event: Delta) -> pb.Delta:
    return pb.Delta(
        turn_id=event.turn_id,
        offset=event.offset,
        token_ids=event.token_ids,
        text=event.text,
        kind=pb.ReplyKind.Name(event.kind.value),
        logprobs=map(_logprobs, event.logprobs),
    )


def _logprobs(of_token: TokenLogprobs) -> pb.TokenLogprobs:
    top = [pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in of_token.top]
    return pb.TokenLogprobs(token_id=of_token.token_id, logprob=of_token.logprob, top=top)


def _history_rewritten(event: HistoryRewritten) -> pb.HistoryRewritten:
    return pb.HistoryRewritten(
        turn_id=event.turn_id,
        first_token=event.first_token,
        num_tokens=event.num_tokens,
        policy=pb.RewritePolicy.Name(event.policy.value),
    )


def _state_changed(event: StateChanged) -> pb.StateChanged:
    return pb.StateChanged(
        turn_id=event.turn_id,
        state=pb.RunState.Name(event.state.value),
        found=None if event.found is None else pb.Usage(**asdict(event.found)),
    )


def _turn_done(event: TurnDone) -> pb.TurnDone:
    return pb.TurnDone(
        turn_id=event.turn_id,
        finish_reason=_finish_reason(event.finish_reason),
        matched_stop=event.matched_stop,
        usage=pb.Usage(**asdict(event.usage)),
        timing=pb.Timing(**asdict(event.timing)),
        context_left=event.context_left,
        committed_tokens=event.committed_tokens,
        history_rewritten=event.history_rewritten,
    )


def _finish_reason(reason: FinishReason) -> pb.FinishReason:
    return pb.FinishReason.Value(f"FINISH_REASON_{reason.name}")  # type: ignore[return-value]
