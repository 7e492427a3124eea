"""The small vocabulary that every floor above shares: ids, sampling parameters, events of a conversation."""

import math
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import NewType, Protocol

from engine.errors import InvalidRequest

ConversationId = NewType("ConversationId", str)
TurnId = NewType("TurnId", str)
Tenant = NewType("Tenant", str)


class Clock(Protocol):
    """Seconds.  `monotonic` orders and measures; `wall` is Unix time for people and logs."""

    def monotonic(self) -> float: ...

    def wall(self) -> float: ...


class FinishReason(Enum):
    """Why a reply ended.  Values are stored in the token log: never renumber."""

    STOP_TOKEN = 1
    STOP_STRING = 2
    LENGTH = 3
    CONTEXT_FULL = 4
    CANCELLED = 5
    DEADLINE = 6
    APPENDED = 7  # nothing was to be generated


class ReplyKind(Enum):
    """What a stretch of a reply is, where the model's chat template marks it."""

    TEXT = 0
    REASONING = 1
    TOOL_CALL = 2


class RewritePolicy(Enum):
    """What happens when the chat template would now render the past differently.  Stored: never renumber."""

    KEEP = 0  # the tokens stand as they are
    STRIP = 1  # from where the render departs, its tokens take their place


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the chat history."""

    role: str
    content: str
    name: str | None = None  # of the speaker, or of the tool whose result this is
    tool_call_id: str | None = None  # which call this is the result of
    tool_calls: tuple[str, ...] = ()  # of an assistant message that comes from elsewhere; JSON objects


class RunState(Enum):
    """What becomes of a turn between its acceptance and its end."""

    RUNNING = 1  # it is computed, or goes on being computed
    SUSPENDED = 2  # other turns need its memory; it goes on by itself
    PAUSED = 3  # other turns run while its reader is behind


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen.  `None` means not set: `over` fills it from the next default in line."""

    temperature: float | None = None  # 0 = greedy; ties go to the lowest id
    top_k: int | None = None  # 0 = off
    top_p: float | None = None  # 1 = off
    min_p: float | None = None  # 0 = off
    seed: int | None = None  # a draw depends on seed and position only
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None  # 0 = off; subtracted once from tokens that the reply holds
    frequency_penalty: float | None = None  # 0 = off; subtracted for each time that the reply holds a token
    repetition_penalty: float | None = None  # 1 = off; divides what prompt or reply hold (CTRL, 1909.05858)
    logit_bias: tuple[tuple[int, float], ...] | None = None  # (token id, added to its logit)
    logprobs: int | None = None  # report the chosen token's, and that many of the likeliest; None = none
    include_stop: bool | None = None  # the matched stop string stays in the text
    bad_words: tuple[str, ...] | None = None  # texts that the reply must not contain

    def __post_init__(self) -> None:
        def check(name: str, low: float, high: float, what: str) -> None:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise InvalidRequest(f"{name} is {value}; it must be {what}")

        check("temperature", 0.0, 100.0, "between 0 (greedy) and 100")
        check("top_k", 0, 2**31 - 1, "0 (off) or a positive number of tokens")
        check("top_p", 1e-9, 1.0, "above 0 and at most 1 (off)")
        check("min_p", 0.0, 1.0, "between 0 (off) and 1")
        check("seed", 0, 2**63 - 1, "between 0 and 2^63 - 1")
        check("max_tokens", 1, 2**31 - 1, "at least 1")
        check("min_tokens", 0, 2**31 - 1, "0 or more")
        check("presence_penalty", -100.0, 100.0, "between -100 and 100; 0 = off")
        check("frequency_penalty", -100.0, 100.0, "between -100 and 100; 0 = off")
        check("repetition_penalty", 0.01, 100.0, "between 0.01 and 100; 1 = off")
        check("logprobs", 0, 20, "between 0 (of the chosen token alone) and 20")
        if self.stop is not None and any(not text for text in self.stop):
            raise InvalidRequest("a stop string is empty; leave it out or give it text")
        if self.stop is not None and len(self.stop) > 16:
            raise InvalidRequest(f"{len(self.stop)} stop strings were given; at most 16 are taken")
        if self.bad_words is not None and any(not text for text in self.bad_words):
            raise InvalidRequest("a bad word is empty; leave it out or give it text")
        if self.bad_words is not None and len(self.bad_words) > 64:
            raise InvalidRequest(f"{len(self.bad_words)} bad words were given; at most 64 are taken")
        for token_id, bias in self.logit_bias or ():
            if not -100.0 <= bias <= 100.0:  # NaN is not between them either
                raise InvalidRequest(
                    f"logit_bias of token {token_id} is {bias}; it must be between -100 and 100"
                )
        if self.logit_bias is not None and len(self.logit_bias) > 1024:
            raise InvalidRequest(f"logit_bias names {len(self.logit_bias)} tokens; at most 1024 are taken")

    def over(self, defaults: "SamplingParams") -> "SamplingParams":
        """These parameters, with what is not set taken from `defaults`."""
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(defaults, **{name: value for name, value in mine.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Usage:
    """Where the tokens of one turn's prompt came from.  `prompt` = `cached_device` + `cached_host`
    + `recomputed` + `new`, and `recomputed` = `evicted` + `restart` + `rewritten` + `cut`.

    Of an appended turn only what it added counts, as new: nothing has attended to the history yet.  Turns
    that were logged before there were reasons have none.
    """

    prompt_tokens: int = 0  # everything the reply attended to when it began: history + new
    completion_tokens: int = 0
    cached_device_tokens: int = 0  # found in the device tier
    cached_host_tokens: int = 0  # copied back from the host tier
    recomputed_tokens: int = 0  # history that had to be computed again
    new_tokens: int = 0  # never computed before
    evicted_tokens: int = 0  # recomputed: given up for others since they were computed, or a copy failed
    restart_tokens: int = 0  # recomputed: computed before the conversation came (back) into memory
    rewritten_tokens: int = 0  # recomputed: history that stands in other words now
    cut_tokens: int = 0  # recomputed: of a block cut by rewinding or by another reply; and its last token
    never_computed_tokens: int = 0  # new: history that was given or appended, and no turn attended to
    unseen_tokens: int = 0  # cached_device: beyond every sliding window, without KV there, and none is needed


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds.  `ttft` is from acceptance to the first sampled token, measured at the server.

    It is `queue` + `reload` + `recompute` + `prefill` + what the turn waited for besides: what its steps did
    for others, and suspensions.  Copies that are made while it is in the queue are part of `queue` as well.
    A step's seconds are shared out among the positions that it computes.
    """

    queue_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0
    reload_s: float = 0.0  # copies of its blocks from the host
    recompute_s: float = 0.0  # history that was computed again
    prefill_s: float = 0.0  # what was new


@dataclass(frozen=True, slots=True)
class ConversationEvent:
    """Base of what a conversation tells its client.  `seq` grows by one per event, over the conversation's
    whole life.
    """

    seq: int


@dataclass(frozen=True, slots=True)
class TurnAccepted(ConversationEvent):
    turn_id: TurnId
    queue_position: int  # 0 = runs at once
    restarted: bool = False  # discard what was shown of an earlier attempt at this turn


@dataclass(frozen=True, slots=True)
class StateChanged(ConversationEvent):
    """Told as it happens, and not again once the turn is done."""

    turn_id: TurnId
    state: RunState
    found: "Usage | None" = (
        None  # with RUNNING: where the KV of all it holds by now, reply included, was found
    )


@dataclass(frozen=True, slots=True)
class Delta(ConversationEvent):
    """More of the reply.  `offset` counts the reply's tokens before this delta: 0 replaces whatever was
    shown.
    """

    turn_id: TurnId
    offset: int
    token_ids: tuple[int, ...]
    text: str
    kind: ReplyKind = ReplyKind.TEXT
    logprobs: tuple["TokenLogprobs", ...] = ()  # one per token, if asked for; not kept in the token log


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities after penalties, before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True)
class HistoryRewritten(ConversationEvent):
    """The chat template renders the past differently from token `first_token` on, for this turn.

    `num_tokens` of the history lie behind it: what STRIP replaces, and what following the template would
    cost under KEEP.
    """

    turn_id: TurnId
    first_token: int
    num_tokens: int
    policy: RewritePolicy


@dataclass(frozen=True, slots=True)
class TurnDone(ConversationEvent):
    """The turn is in the token log."""

    turn_id: TurnId
    finish_reason: FinishReason
    matched_stop: str | None
    usage: Usage
    timing: Timing
    context_left: int  # tokens
    committed_tokens: int
    history_rewritten: bool = False  # the template would now render the past differently; the kept ids stand


@dataclass(frozen=True, slots=True)
class TurnFailed(ConversationEvent):
    """The turn was not committed; the conversation stands as before it and the stream lives on."""

    turn_id: TurnId
    error: Exception


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """A committed turn: what the token log holds and `Get` shows."""

    turn_id: TurnId
    number: int  # from 0
    first_token: int  # position in the history
    prompt_ids: tuple[int, ...]  # what this turn appended before the reply, template included
    reply_ids: tuple[int, ...]
    messages: tuple[Message, ...]  # what the client sent; empty if it sent token ids
    reply_text: str
    finish_reason: FinishReason
    matched_stop: str | None
    usage: Usage
    timing: Timing
    created_at: float  # Unix seconds
    done_seq: int  # seq of its TurnDone
    digest: bytes  # of the request, to recognise a repeated turn id
    history_rewritten: bool = False


@dataclass(frozen=True, slots=True)
class ConversationRecord:
    """What identifies a conversation on disk, without its turns."""

    id: ConversationId
    tenant: Tenant
    fingerprint: str  # of model and tokenizer
    system: str | None
    sampling: SamplingParams
    labels: dict[str, str] = field(default_factory=dict)
    created_at: float = 0.0
    updated_at: float = 0.0
    resume_token: str = ""
    num_turns: int = 0
    num_tokens: int = 0
    seq_mark: int = 0  # the last seq known to be used
    tools: tuple[str, ...] = ()  # JSON objects, as chat templates take them
    on_rewrite: RewritePolicy = RewritePolicy.KEEP
    parent: ConversationId | None = None  # it was forked from there,
    forked_at: int = 0  # with so many tokens


@dataclass(frozen=True, slots=True)
class OpenRequest:
    conversation_id: ConversationId | None = None  # None: the server chooses
    system: str | None = None
    sampling: SamplingParams = SamplingParams()  # defaults of the conversation's turns
    labels: dict[str, str] = field(default_factory=dict)
    history: tuple[Message, ...] = ()  # what was said before, somewhere else
    tools: tuple[str, ...] = ()  # JSON objects, as chat templates take them
    on_rewrite: RewritePolicy = RewritePolicy.KEEP


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    conversation_id: ConversationId
    resume_token: str | None = None  # if sent it must be right
    after_seq: int | None = None  # replay what came after; None: only the turn in flight
    expect_committed_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """Either messages (rendered by the model's chat template) or token ids (appended as they are)."""

    turn_id: TurnId
    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()
    sampling: SamplingParams = SamplingParams()
    timeout_s: float | None = None  # the turn ends with DEADLINE and keeps what it has
    wants_reply: bool = True  # False: the input joins the history, and nothing is generated


@dataclass(frozen=True, slots=True)
class RegenerateRequest:
    """Another reply to what turn `replaces` said.  It and all turns behind it give way once this one is
    committed, not before.
    """

    turn_id: TurnId  # of the new turn
    replaces: TurnId | None = None  # None: the last turn
    sampling: SamplingParams = SamplingParams()
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A place in a committed history: behind so many turns, or behind so many tokens; one of them is set."""

    num_turns: int | None = None
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """A new conversation with the history of another up to a point.  With an id of the caller's it is safe to
    repeat.
    """

    conversation_id: ConversationId
    new_id: ConversationId | None = None  # None: the server chooses
    at: Point | None = None  # None: all of it
    labels: dict[str, str] | None = None  # None: those of the other


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    """Changes of what a conversation has."""

    sampling: SamplingParams | None = None  # what is set in it becomes the default; other defaults stay
    labels: dict[str, str] | None = None  # all of them, in place of the old


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a conversation stands."""

    committed_tokens: int
    committed_turns: int
    context_left: int  # tokens that still fit


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One stateless generation: a prompt in text (as it is, no template), messages, or token ids."""

    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()
    sampling: SamplingParams = SamplingParams()
    timeout_s: float | None = None
    tools: tuple[str, ...] = ()  # JSON objects, as chat templates take them


@dataclass(frozen=True, slots=True)
class Limits:
    context_tokens: int  # of one conversation: prompt and reply together
    max_concurrent: int  # turns computed at once
    max_queue: int  # turns that may wait
    max_message_bytes: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    version: str  # of this server
    fingerprint: str  # of model and tokenizer; a conversation is bound to it
    architecture: str
    dtype: str
    device: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    limits: Limits
