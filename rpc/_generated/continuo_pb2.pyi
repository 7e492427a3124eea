from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RewritePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REWRITE_POLICY_KEEP: _ClassVar[RewritePolicy]
    REWRITE_POLICY_STRIP: _ClassVar[RewritePolicy]

class RunState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_STATE_UNSPECIFIED: _ClassVar[RunState]
    RUN_STATE_RUNNING: _ClassVar[RunState]
    RUN_STATE_SUSPENDED: _ClassVar[RunState]
    RUN_STATE_PAUSED: _ClassVar[RunState]

class ReplyKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLY_KIND_TEXT: _ClassVar[ReplyKind]
    REPLY_KIND_REASONING: _ClassVar[ReplyKind]
    REPLY_KIND_TOOL_CALL: _ClassVar[ReplyKind]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP_TOKEN: _ClassVar[FinishReason]
    FINISH_REASON_STOP_STRING: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CONTEXT_FULL: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_DEADLINE: _ClassVar[FinishReason]
    FINISH_REASON_APPENDED: _ClassVar[FinishReason]
REWRITE_POLICY_KEEP: RewritePolicy
REWRITE_POLICY_STRIP: RewritePolicy
RUN_STATE_UNSPECIFIED: RunState
RUN_STATE_RUNNING: RunState
RUN_STATE_SUSPENDED: RunState
RUN_STATE_PAUSED: RunState
REPLY_KIND_TEXT: ReplyKind
REPLY_KIND_REASONING: ReplyKind
REPLY_KIND_TOOL_CALL: ReplyKind
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP_TOKEN: FinishReason
FINISH_REASON_STOP_STRING: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CONTEXT_FULL: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_DEADLINE: FinishReason
FINISH_REASON_APPENDED: FinishReason

class ClientEvent(_message.Message):
    __slots__ = ("client_seq", "open", "resume", "turn", "cancel", "close", "append", "regenerate", "rewind", "update")
    CLIENT_SEQ_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    APPEND_FIELD_NUMBER: _ClassVar[int]
    REGENERATE_FIELD_NUMBER: _ClassVar[int]
    REWIND_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    client_seq: int
    open: Open
    resume: Resume
    turn: Turn
    cancel: Cancel
    close: Close
    append: Append
    regenerate: Regenerate
    rewind: Rewind
    update: Update
    def __init__(self, client_seq: _Optional[int] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., turn: _Optional[_Union[Turn, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., append: _Optional[_Union[Append, _Mapping]] = ..., regenerate: _Optional[_Union[Regenerate, _Mapping]] = ..., rewind: _Optional[_Union[Rewind, _Mapping]] = ..., update: _Optional[_Union[Update, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("conversation_id", "system", "sampling", "labels", "history", "tools", "on_rewrite")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    ON_REWRITE_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    system: str
    sampling: Sampling
    labels: _containers.ScalarMap[str, str]
    history: Messages
    tools: _containers.RepeatedScalarFieldContainer[str]
    on_rewrite: RewritePolicy
    def __init__(self, conversation_id: _Optional[str] = ..., system: _Optional[str] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., history: _Optional[_Union[Messages, _Mapping]] = ..., tools: _Optional[_Iterable[str]] = ..., on_rewrite: _Optional[_Union[RewritePolicy, str]] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("conversation_id", "resume_token", "after_seq", "expect_committed_tokens")
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    EXPECT_COMMITTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    resume_token: str
    after_seq: int
    expect_committed_tokens: int
    def __init__(self, conversation_id: _Optional[str] = ..., resume_token: _Optional[str] = ..., after_seq: _Optional[int] = ..., expect_committed_tokens: _Optional[int] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("turn_id", "text", "messages", "token_ids", "sampling", "timeout_s")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    text: str
    messages: Messages
    token_ids: TokenIds
    sampling: Sampling
    timeout_s: float
    def __init__(self, turn_id: _Optional[str] = ..., text: _Optional[str] = ..., messages: _Optional[_Union[Messages, _Mapping]] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("turn_id", "discard")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    DISCARD_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    discard: bool
    def __init__(self, turn_id: _Optional[str] = ..., discard: bool = ...) -> None: ...

class Append(_message.Message):
    __slots__ = ("turn_id", "text", "messages", "token_ids")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    text: str
    messages: Messages
    token_ids: TokenIds
    def __init__(self, turn_id: _Optional[str] = ..., text: _Optional[str] = ..., messages: _Optional[_Union[Messages, _Mapping]] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ...) -> None: ...

class Regenerate(_message.Message):
    __slots__ = ("turn_id", "replaces", "sampling", "timeout_s")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    REPLACES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    replaces: str
    sampling: Sampling
    timeout_s: float
    def __init__(self, turn_id: _Optional[str] = ..., replaces: _Optional[str] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class Rewind(_message.Message):
    __slots__ = ("turns", "tokens")
    TURNS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    turns: int
    tokens: int
    def __init__(self, turns: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("sampling", "labels")
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    sampling: Sampling
    labels: Labels
    def __init__(self, sampling: _Optional[_Union[Sampling, _Mapping]] = ..., labels: _Optional[_Union[Labels, _Mapping]] = ...) -> None: ...

class Labels(_message.Message):
    __slots__ = ("labels",)
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LABELS_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.ScalarMap[str, str]
    def __init__(self, labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("delete",)
    DELETE_FIELD_NUMBER: _ClassVar[int]
    delete: bool
    def __init__(self, delete: bool = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "include_stop", "bad_words")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    logprobs: int
    include_stop: bool
    bad_words: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., logprobs: _Optional[int] = ..., include_stop: bool = ..., bad_words: _Optional[_Iterable[str]] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "content", "name", "tool_call_id", "tool_calls")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_ID_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    name: str
    tool_call_id: str
    tool_calls: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ..., name: _Optional[str] = ..., tool_call_id: _Optional[str] = ..., tool_calls: _Optional[_Iterable[str]] = ...) -> None: ...

class Messages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ServerEvent(_message.Message):
    __slots__ = ("seq", "opened", "resumed", "turn_accepted", "delta", "turn_done", "turn_failed", "error", "draining", "closed", "rewound", "updated", "history_rewritten", "state_changed")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    TURN_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    TURN_DONE_FIELD_NUMBER: _ClassVar[int]
    TURN_FAILED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    REWOUND_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    HISTORY_REWRITTEN_FIELD_NUMBER: _ClassVar[int]
    STATE_CHANGED_FIELD_NUMBER: _ClassVar[int]
    seq: int
    opened: Attached
    resumed: Attached
    turn_accepted: TurnAccepted
    delta: Delta
    turn_done: TurnDone
    turn_failed: TurnFailed
    error: Error
    draining: Draining
    closed: Closed
    rewound: Rewound
    updated: Updated
    history_rewritten: HistoryRewritten
    state_changed: StateChanged
    def __init__(self, seq: _Optional[int] = ..., opened: _Optional[_Union[Attached, _Mapping]] = ..., resumed: _Optional[_Union[Attached, _Mapping]] = ..., turn_accepted: _Optional[_Union[TurnAccepted, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., turn_done: _Optional[_Union[TurnDone, _Mapping]] = ..., turn_failed: _Optional[_Union[TurnFailed, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., rewound: _Optional[_Union[Rewound, _Mapping]] = ..., updated: _Optional[_Union[Updated, _Mapping]] = ..., history_rewritten: _Optional[_Union[HistoryRewritten, _Mapping]] = ..., state_changed: _Optional[_Union[StateChanged, _Mapping]] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("conversation_id", "resume_token", "committed_tokens", "committed_turns", "context_left", "last_seq")
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TURNS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LEFT_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    resume_token: str
    committed_tokens: int
    committed_turns: int
    context_left: int
    last_seq: int
    def __init__(self, conversation_id: _Optional[str] = ..., resume_token: _Optional[str] = ..., committed_tokens: _Optional[int] = ..., committed_turns: _Optional[int] = ..., context_left: _Optional[int] = ..., last_seq: _Optional[int] = ...) -> None: ...

class TurnAccepted(_message.Message):
    __slots__ = ("turn_id", "queue_position", "restarted")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    RESTARTED_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    queue_position: int
    restarted: bool
    def __init__(self, turn_id: _Optional[str] = ..., queue_position: _Optional[int] = ..., restarted: bool = ...) -> None: ...

class StateChanged(_message.Message):
    __slots__ = ("turn_id", "state", "found")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    state: RunState
    found: Usage
    def __init__(self, turn_id: _Optional[str] = ..., state: _Optional[_Union[RunState, str]] = ..., found: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("turn_id", "offset", "token_ids", "text", "kind", "logprobs")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    offset: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    kind: ReplyKind
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, turn_id: _Optional[str] = ..., offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., kind: _Optional[_Union[ReplyKind, str]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("token_id", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Rewound(_message.Message):
    __slots__ = ("client_seq", "committed_tokens", "committed_turns", "context_left")
    CLIENT_SEQ_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TURNS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LEFT_FIELD_NUMBER: _ClassVar[int]
    client_seq: int
    committed_tokens: int
    committed_turns: int
    context_left: int
    def __init__(self, client_seq: _Optional[int] = ..., committed_tokens: _Optional[int] = ..., committed_turns: _Optional[int] = ..., context_left: _Optional[int] = ...) -> None: ...

class Updated(_message.Message):
    __slots__ = ("client_seq",)
    CLIENT_SEQ_FIELD_NUMBER: _ClassVar[int]
    client_seq: int
    def __init__(self, client_seq: _Optional[int] = ...) -> None: ...

class HistoryRewritten(_message.Message):
    __slots__ = ("turn_id", "first_token", "num_tokens", "policy")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    first_token: int
    num_tokens: int
    policy: RewritePolicy
    def __init__(self, turn_id: _Optional[str] = ..., first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., policy: _Optional[_Union[RewritePolicy, str]] = ...) -> None: ...

class TurnDone(_message.Message):
    __slots__ = ("turn_id", "finish_reason", "matched_stop", "usage", "timing", "context_left", "committed_tokens", "history_rewritten")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LEFT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_REWRITTEN_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    finish_reason: FinishReason
    matched_stop: str
    usage: Usage
    timing: Timing
    context_left: int
    committed_tokens: int
    history_rewritten: bool
    def __init__(self, turn_id: _Optional[str] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., matched_stop: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., context_left: _Optional[int] = ..., committed_tokens: _Optional[int] = ..., history_rewritten: bool = ...) -> None: ...

class TurnFailed(_message.Message):
    __slots__ = ("turn_id", "error")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    error: Error
    def __init__(self, turn_id: _Optional[str] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "reason", "message", "retryable", "retry_after_s", "turn_id", "client_seq")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_SEQ_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    retryable: bool
    retry_after_s: float
    turn_id: str
    client_seq: int
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., retryable: bool = ..., retry_after_s: _Optional[float] = ..., turn_id: _Optional[str] = ..., client_seq: _Optional[int] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("resume_token", "retry_after_s")
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    resume_token: str
    retry_after_s: float
    def __init__(self, resume_token: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: bool
    def __init__(self, deleted: bool = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_device_tokens", "cached_host_tokens", "recomputed_tokens", "new_tokens", "evicted_tokens", "restart_tokens", "rewritten_tokens", "cut_tokens", "never_computed_tokens", "unseen_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_DEVICE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_HOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTART_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REWRITTEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEVER_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNSEEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_device_tokens: int
    cached_host_tokens: int
    recomputed_tokens: int
    new_tokens: int
    evicted_tokens: int
    restart_tokens: int
    rewritten_tokens: int
    cut_tokens: int
    never_computed_tokens: int
    unseen_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_device_tokens: _Optional[int] = ..., cached_host_tokens: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ..., new_tokens: _Optional[int] = ..., evicted_tokens: _Optional[int] = ..., restart_tokens: _Optional[int] = ..., rewritten_tokens: _Optional[int] = ..., cut_tokens: _Optional[int] = ..., never_computed_tokens: _Optional[int] = ..., unseen_tokens: _Optional[int] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_s", "ttft_s", "total_s", "reload_s", "recompute_s", "prefill_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    RELOAD_S_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    ttft_s: float
    total_s: float
    reload_s: float
    recompute_s: float
    prefill_s: float
    def __init__(self, queue_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., total_s: _Optional[float] = ..., reload_s: _Optional[float] = ..., recompute_s: _Optional[float] = ..., prefill_s: _Optional[float] = ...) -> None: ...

class Conversation(_message.Message):
    __slots__ = ("conversation_id", "system", "sampling", "labels", "created_at", "updated_at", "num_turns", "num_tokens", "fingerprint", "tools", "on_rewrite", "parent_id", "forked_at")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    NUM_TURNS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    ON_REWRITE_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    FORKED_AT_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    system: str
    sampling: Sampling
    labels: _containers.ScalarMap[str, str]
    created_at: float
    updated_at: float
    num_turns: int
    num_tokens: int
    fingerprint: str
    tools: _containers.RepeatedScalarFieldContainer[str]
    on_rewrite: RewritePolicy
    parent_id: str
    forked_at: int
    def __init__(self, conversation_id: _Optional[str] = ..., system: _Optional[str] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., created_at: _Optional[float] = ..., updated_at: _Optional[float] = ..., num_turns: _Optional[int] = ..., num_tokens: _Optional[int] = ..., fingerprint: _Optional[str] = ..., tools: _Optional[_Iterable[str]] = ..., on_rewrite: _Optional[_Union[RewritePolicy, str]] = ..., parent_id: _Optional[str] = ..., forked_at: _Optional[int] = ...) -> None: ...

class CommittedTurn(_message.Message):
    __slots__ = ("turn_id", "number", "first_token", "messages", "prompt_token_ids", "reply", "reply_token_ids", "finish_reason", "matched_stop", "usage", "timing", "created_at", "history_rewritten")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    REPLY_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    HISTORY_REWRITTEN_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    number: int
    first_token: int
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    reply: str
    reply_token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: FinishReason
    matched_stop: str
    usage: Usage
    timing: Timing
    created_at: float
    history_rewritten: bool
    def __init__(self, turn_id: _Optional[str] = ..., number: _Optional[int] = ..., first_token: _Optional[int] = ..., messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., reply: _Optional[str] = ..., reply_token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., matched_stop: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., created_at: _Optional[float] = ..., history_rewritten: bool = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("conversation_id", "page_size", "page_token")
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    page_size: int
    page_token: str
    def __init__(self, conversation_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class GetResponse(_message.Message):
    __slots__ = ("conversation", "turns", "next_page_token")
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    conversation: Conversation
    turns: _containers.RepeatedCompositeFieldContainer[CommittedTurn]
    next_page_token: str
    def __init__(self, conversation: _Optional[_Union[Conversation, _Mapping]] = ..., turns: _Optional[_Iterable[_Union[CommittedTurn, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("labels", "page_size", "page_token")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.ScalarMap[str, str]
    page_size: int
    page_token: str
    def __init__(self, labels: _Optional[_Mapping[str, str]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("conversations", "next_page_token")
    CONVERSATIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    conversations: _containers.RepeatedCompositeFieldContainer[Conversation]
    next_page_token: str
    def __init__(self, conversations: _Optional[_Iterable[_Union[Conversation, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ForkRequest(_message.Message):
    __slots__ = ("conversation_id", "new_conversation_id", "turns", "tokens", "labels")
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    NEW_CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    new_conversation_id: str
    turns: int
    tokens: int
    labels: Labels
    def __init__(self, conversation_id: _Optional[str] = ..., new_conversation_id: _Optional[str] = ..., turns: _Optional[int] = ..., tokens: _Optional[int] = ..., labels: _Optional[_Union[Labels, _Mapping]] = ...) -> None: ...

class ForkResponse(_message.Message):
    __slots__ = ("conversation",)
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    conversation: Conversation
    def __init__(self, conversation: _Optional[_Union[Conversation, _Mapping]] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("conversation_id",)
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    def __init__(self, conversation_id: _Optional[str] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("text", "messages", "token_ids", "sampling", "tools")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    text: str
    messages: Messages
    token_ids: TokenIds
    sampling: Sampling
    tools: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, text: _Optional[str] = ..., messages: _Optional[_Union[Messages, _Mapping]] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., tools: _Optional[_Iterable[str]] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("accepted", "delta", "done")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    accepted: TurnAccepted
    delta: Delta
    done: TurnDone
    def __init__(self, accepted: _Optional[_Union[TurnAccepted, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., done: _Optional[_Union[TurnDone, _Mapping]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text", "allow_special")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ALLOW_SPECIAL_FIELD_NUMBER: _ClassVar[int]
    text: str
    allow_special: bool
    def __init__(self, text: _Optional[str] = ..., allow_special: bool = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("token_ids", "skip_special")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    skip_special: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., skip_special: bool = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("name", "version", "fingerprint", "architecture", "dtype", "device", "vocab_size", "eos_token_ids", "has_chat_template", "limits")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    fingerprint: str
    architecture: str
    dtype: str
    device: str
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    has_chat_template: bool
    limits: Limits
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., fingerprint: _Optional[str] = ..., architecture: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., has_chat_template: bool = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("context_tokens", "max_concurrent", "max_queue", "max_message_bytes")
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENT_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    context_tokens: int
    max_concurrent: int
    max_queue: int
    max_message_bytes: int
    def __init__(self, context_tokens: _Optional[int] = ..., max_concurrent: _Optional[int] = ..., max_queue: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("uptime_s", "running_turns", "waiting_turns", "suspended_turns", "conversations", "device", "host", "accepted_turns", "finished_turns", "failed_turns", "refused_turns", "reattached_streams", "suspensions", "prompt_tokens", "cached_device_tokens", "cached_host_tokens", "recomputed_tokens", "new_tokens", "evicted_tokens", "restart_tokens", "rewritten_tokens", "cut_tokens", "never_computed_tokens", "completion_tokens", "computed_tokens", "steps", "step_s", "reload_s", "recompute_s", "evicted_blocks", "stored_blocks", "loaded_blocks", "failed_copies", "queue_s", "ttft_s", "inter_token_s", "total_s")
    class FinishedTurnsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class FailedTurnsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class RefusedTurnsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    RUNNING_TURNS_FIELD_NUMBER: _ClassVar[int]
    WAITING_TURNS_FIELD_NUMBER: _ClassVar[int]
    SUSPENDED_TURNS_FIELD_NUMBER: _ClassVar[int]
    CONVERSATIONS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TURNS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_TURNS_FIELD_NUMBER: _ClassVar[int]
    FAILED_TURNS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_TURNS_FIELD_NUMBER: _ClassVar[int]
    REATTACHED_STREAMS_FIELD_NUMBER: _ClassVar[int]
    SUSPENSIONS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_DEVICE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_HOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTART_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REWRITTEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEVER_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    RELOAD_S_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LOADED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FAILED_COPIES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    INTER_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    uptime_s: float
    running_turns: int
    waiting_turns: int
    suspended_turns: int
    conversations: ConversationCounts
    device: Tier
    host: Tier
    accepted_turns: int
    finished_turns: _containers.ScalarMap[str, int]
    failed_turns: _containers.ScalarMap[str, int]
    refused_turns: _containers.ScalarMap[str, int]
    reattached_streams: int
    suspensions: int
    prompt_tokens: int
    cached_device_tokens: int
    cached_host_tokens: int
    recomputed_tokens: int
    new_tokens: int
    evicted_tokens: int
    restart_tokens: int
    rewritten_tokens: int
    cut_tokens: int
    never_computed_tokens: int
    completion_tokens: int
    computed_tokens: int
    steps: int
    step_s: float
    reload_s: float
    recompute_s: float
    evicted_blocks: int
    stored_blocks: int
    loaded_blocks: int
    failed_copies: int
    queue_s: Histogram
    ttft_s: Histogram
    inter_token_s: Histogram
    total_s: Histogram
    def __init__(self, uptime_s: _Optional[float] = ..., running_turns: _Optional[int] = ..., waiting_turns: _Optional[int] = ..., suspended_turns: _Optional[int] = ..., conversations: _Optional[_Union[ConversationCounts, _Mapping]] = ..., device: _Optional[_Union[Tier, _Mapping]] = ..., host: _Optional[_Union[Tier, _Mapping]] = ..., accepted_turns: _Optional[int] = ..., finished_turns: _Optional[_Mapping[str, int]] = ..., failed_turns: _Optional[_Mapping[str, int]] = ..., refused_turns: _Optional[_Mapping[str, int]] = ..., reattached_streams: _Optional[int] = ..., suspensions: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_device_tokens: _Optional[int] = ..., cached_host_tokens: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ..., new_tokens: _Optional[int] = ..., evicted_tokens: _Optional[int] = ..., restart_tokens: _Optional[int] = ..., rewritten_tokens: _Optional[int] = ..., cut_tokens: _Optional[int] = ..., never_computed_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., steps: _Optional[int] = ..., step_s: _Optional[float] = ..., reload_s: _Optional[float] = ..., recompute_s: _Optional[float] = ..., evicted_blocks: _Optional[int] = ..., stored_blocks: _Optional[int] = ..., loaded_blocks: _Optional[int] = ..., failed_copies: _Optional[int] = ..., queue_s: _Optional[_Union[Histogram, _Mapping]] = ..., ttft_s: _Optional[_Union[Histogram, _Mapping]] = ..., inter_token_s: _Optional[_Union[Histogram, _Mapping]] = ..., total_s: _Optional[_Union[Histogram, _Mapping]] = ...) -> None: ...

class ConversationCounts(_message.Message):
    __slots__ = ("running", "waiting", "attached", "idle")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    attached: int
    idle: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., attached: _Optional[int] = ..., idle: _Optional[int] = ...) -> None: ...

class Tier(_message.Message):
    __slots__ = ("total_tokens", "in_use_tokens", "idle_tokens", "free_tokens")
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IN_USE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IDLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    total_tokens: int
    in_use_tokens: int
    idle_tokens: int
    free_tokens: int
    def __init__(self, total_tokens: _Optional[int] = ..., in_use_tokens: _Optional[int] = ..., idle_tokens: _Optional[int] = ..., free_tokens: _Optional[int] = ...) -> None: ...

class Histogram(_message.Message):
    __slots__ = ("bounds", "counts", "sum")
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    bounds: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    sum: float
    def __init__(self, bounds: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ..., sum: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_s",)
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    def __init__(self, grace_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
