"""What the chat says about turns and conversations, in words."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.json_format import MessageToDict

from rpc._generated import continuo_pb2 as pb
from rpc.client import FinishReason, Turn

_ENDINGS = {
    FinishReason.CANCELLED: "cancelled",
    FinishReason.LENGTH: "at the length limit",
    FinishReason.CONTEXT_FULL: "the context is full: /rewind makes room, /new begins anew",
    FinishReason.DEADLINE: "out of time",
}


def status_line(turn: Turn) -> str:
    """What of the history was still there and in which tier, what it cost, and what is left."""
    usage, timing = turn.usage, turn.timing
    parts = [
        *reuse(usage),
        f"a reply of {usage.completion_tokens:,} in {timing.total_s:.1f} s, "
        f"first after {1000 * timing.ttft_s:.0f} ms",
        f"{turn.context_left:,} left",
    ]
    if turn.rewritten_from is not None:
        parts.append(f"the template would now write the past differently from token {turn.rewritten_from:,}")
    if turn.finish_reason in _ENDINGS:
        parts.append(_ENDINGS[turn.finish_reason])
    return " · ".join(parts)


def reuse(usage: pb.Usage) -> list[str]:
    """Where the prompt's tokens came from, and why some were computed again."""
    tiers = {"device": usage.cached_device_tokens, "host": usage.cached_host_tokens}
    reasons = {
        "evicted": usage.evicted_tokens,
        "restart": usage.restart_tokens,
        "rewritten": usage.rewritten_tokens,
        "cut": usage.cut_tokens,
    }
    again, given = usage.recomputed_tokens, usage.never_computed_tokens
    return [
        f"reused {sum(tiers.values()):,}{_split(tiers)}",
        *([f"computed again {again:,}{_split(reasons)}"] if again else []),
        f"new {usage.new_tokens:,}" + (f" ({given:,} of the history)" if given else ""),
    ]


def _split(counts: Mapping[str, int]) -> str:
    found = {name: count for name, count in counts.items() if count}
    if len(found) < 2:
        return "".join(f" ({name})" for name in found)
    return f" ({', '.join(f'{name} {count:,}' for name, count in found.items())})"


def statistics(conversation: pb.Conversation, turns: Sequence[pb.CommittedTurn]) -> str:
    """The whole conversation so far."""
    names = [field.name for field in pb.Usage.DESCRIPTOR.fields]
    total = pb.Usage(**{name: sum(getattr(turn.usage, name) for turn in turns) for name in names})
    answered = [turn.timing for turn in turns if turn.reply_token_ids]
    lines = [
        f"{conversation.conversation_id}: {count(conversation.num_turns, 'turn')}, "
        f"{count(conversation.num_tokens, 'token')} of history",
        " · ".join(reuse(total)),
    ]
    if answered:
        first = sorted(timing.ttft_s for timing in answered)[len(answered) // 2]
        seconds = sum(timing.total_s - timing.ttft_s for timing in answered)
        lines.append(
            f"{total.completion_tokens:,} tokens of replies · median time to the first {1000 * first:.0f} ms"
            + (f" · then {total.completion_tokens / seconds:,.0f} tokens/s" if seconds else "")
        )
    if conversation.HasField("parent_id"):
        lines.append(f"forked from {conversation.parent_id} at token {conversation.forked_at:,}")
    return "\n".join(lines)


def listing(conversations: Iterable[pb.Conversation], current: str) -> str:
    """A line for each, numbered from 1."""
    now = time.time()
    lines = [
        f"{'*' if it.conversation_id == current else ' '}{number:3}  {it.conversation_id}  "
        f"{_ago(now - it.updated_at):>9}  {count(it.num_turns, 'turn'):>9}  "
        f"{count(it.num_tokens, 'token'):>13}  {it.labels.get('title', '')}".rstrip()
        for number, it in enumerate(conversations, 1)
    ]
    return "\n".join(lines) or "no conversation is kept at this server"


def transcript(turn: pb.CommittedTurn) -> str:
    """What was said and answered in a turn."""
    said = [message_line(message) for message in turn.messages] or [
        f"› {count(len(turn.prompt_token_ids), 'token')}"
    ]
    return "\n".join([*said, *([turn.reply] if turn.reply else [])])


def message_line(message: pb.Message) -> str:
    match message.role:
        case "user":
            return f"› {message.content}"
        case "assistant":
            return "\n".join([message.content, *message.tool_calls]).strip()
    return f"{message.role}: {message.content}"


def settings(sampling: pb.Sampling) -> str:
    """As /set takes them."""
    set_ones = [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in MessageToDict(sampling, preserving_proto_field_name=True).items()
    ]
    return " ".join(set_ones) or "nothing is set: replies are as the model's makers recommend"


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
