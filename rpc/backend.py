"""What the server asks of an engine.  `engine.AsyncEngine` is one; the tests bring a scripted one.

All methods are called on the event loop.  Where a caller is to be told something, they raise `EngineError`.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol

from engine.load import Load
from engine.types import (
    ConversationEvent,
    ConversationId,
    ConversationRecord,
    Delta,
    ForkRequest,
    GenerateRequest,
    ModelInfo,
    OpenRequest,
    Point,
    RegenerateRequest,
    ResumeRequest,
    Standing,
    Tenant,
    TurnAccepted,
    TurnDone,
    TurnId,
    TurnRecord,
    TurnRequest,
    UpdateRequest,
)


class Attachment(Protocol):
    """One stream's hold on one conversation.  Another stream may take it over."""

    @property
    def conversation_id(self) -> ConversationId: ...
    @property
    def resume_token(self) -> str: ...
    @property
    def committed_tokens(self) -> int: ...
    @property
    def committed_turns(self) -> int: ...
    @property
    def last_seq(self) -> int: ...
    @property
    def context_left(self) -> int: ...

    def events(self) -> AsyncIterator[ConversationEvent]:
        """In order of seq, beginning with the replay that was asked for.  Deltas not yet taken are merged.
        What has happened is yielded without waiting for anything.

        Ends once the attachment is closed and all that came before has been taken.  Raises `AttachmentTaken`,
        `Draining`, `EngineStopped`, or `NotFound` when somebody deleted the conversation.
        """
        ...

    async def turn(self, request: TurnRequest) -> None:
        """Returns when the turn is accepted or its outcome will be replayed; raises if it is refused."""
        ...

    async def regenerate(self, request: RegenerateRequest) -> None:
        """As `turn`, for another reply to what a committed turn said."""
        ...

    async def rewind(self, to: Point) -> Standing:
        """Returns when the history behind `to` is gone from the disk; raises `Conflict` while a turn is in
        flight.
        """
        ...

    async def update(self, request: UpdateRequest) -> None:
        """Returns when the change is on disk."""
        ...

    async def cancel(self, turn_id: TurnId, keep: bool) -> None: ...

    async def close(self, delete: bool) -> None:
        """Retaining waits for the running turn to end; deleting cancels it and erases the conversation."""
        ...

    def detach(self) -> None:
        """The stream is gone: after a grace period the engine cancels the running turn, and keeps all."""
        ...


class Backend(Protocol):
    async def open(self, tenant: Tenant, request: OpenRequest) -> Attachment: ...

    async def resume(self, tenant: Tenant, request: ResumeRequest) -> Attachment: ...

    async def fork(self, tenant: Tenant, request: ForkRequest) -> ConversationRecord:
        """Returns the new conversation once it is on disk, or the same one if this was asked for before."""
        ...

    async def get(
        self, tenant: Tenant, conversation_id: ConversationId
    ) -> tuple[ConversationRecord, Sequence[TurnRecord]]: ...

    async def list(
        self, tenant: Tenant, labels: dict[str, str], page_size: int, page_token: str | None
    ) -> tuple[Sequence[ConversationRecord], str | None]: ...

    async def delete(self, tenant: Tenant, conversation_id: ConversationId) -> None: ...

    def generate(
        self, tenant: Tenant, request: GenerateRequest
    ) -> AsyncGenerator[TurnAccepted | Delta | TurnDone, None]:
        """Closing the generator cancels the generation."""
        ...

    async def tokenize(self, text: str, allow_special: bool) -> Sequence[int]: ...

    async def detokenize(self, token_ids: Sequence[int], skip_special: bool) -> str: ...

    def model_info(self) -> ModelInfo: ...

    def load(self) -> Load: ...

    async def drain(self, grace_s: float) -> None:
        """Refuses new turns; running ones may end until `grace_s`, then are cancelled, their text kept."""
        ...

    async def wait_failed(self) -> Exception:
        """Returns when the engine makes no progress any more."""
        ...
