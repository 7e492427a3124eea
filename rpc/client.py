"""The Python client.

    async with ContinuoClient("localhost:50051") as client:
        chat = await client.open(system="Be brief.")
        async for delta in chat.say("My cat is called Miso."):
            print(delta.text, end="", flush=True)
        turn = await chat.say("What is my cat called?")
        print(turn.text, turn.usage.cached_device_tokens)
        chat = await client.resume(chat.id)

Every method raises `ContinuoError` or one of its subclasses, one per gRPC status.  What the server keeps is
shown as the messages of continuo.proto.  Needs grpcio and protobuf, no torch and no engine.
"""

import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from rpc._generated import continuo_pb2 as pb
from rpc._generated import continuo_pb2_grpc as pb_grpc
from rpc.chat import Chat
from rpc.converse_call import MAX_MESSAGE_BYTES, Call, wait
from rpc.failure import (
    Aborted,
    AlreadyExists,
    Cancelled,
    ContinuoError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    error_of_call,
)
from rpc.outcome import Delta, FinishReason, ReplyKind, RunState, Turn, TurnState
from rpc.reply import Reply, ReplyEvent
from rpc.request import Sampling, fork_request, json_objects, messages_of, new_id, sampling_of, set_input

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Cancelled",
    "Chat",
    "ContinuoClient",
    "ContinuoError",
    "DeadlineExceeded",
    "Delta",
    "FailedPrecondition",
    "FinishReason",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "Reply",
    "ReplyKind",
    "ResourceExhausted",
    "RunState",
    "Sampling",
    "Turn",
    "TurnState",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
]

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),  # a silent prefill may be long; the server permits a ping every 10 s
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # After a server restart the channel must be there sooner than gRPC's default of up to 120 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0)  # together long enough for a server to restart


class ContinuoClient:
    """One connection to one server, shared by any number of chats.

    `token` goes with every call as a bearer token.  `tls=True` trusts the system's authorities, a path the
    PEM file there.  With `retry`, a lost connection is resumed by itself; `jitter` gives a number in [0, 1)
    that spreads the attempts of many clients.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        token: str | None = None,
        tls: bool | str | Path = False,
        retry: bool = True,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._retry = retry
        self._jitter = jitter
        self._channel = _channel(target, tls)
        self._conversations: pb_grpc.ConversationsStub = pb_grpc.ConversationsStub(self._channel)
        self._engine: pb_grpc.EngineStub = pb_grpc.EngineStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every call.  Conversations stay; a turn in flight is cancelled by the server after a while."""
        await self._channel.close()

    async def open(
        self,
        system: str | None = None,
        *,
        id: str | None = None,
        labels: Mapping[str, str] | None = None,
        history: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        strip_rewritten: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Chat:
        """A new conversation.  `sampling` becomes the default of its turns.

        `history`: messages that were said elsewhere, as in `Chat.say`.  `tools`: as the model's chat template
        takes them.  `strip_rewritten`: where the template would now render the past differently, follow it
        and compute that again; otherwise the past stands as it was computed.
        """
        request = pb.Open(
            conversation_id=new_id("c") if id is None else id,
            system=system,
            labels=labels,
            sampling=sampling_of(sampling),
            history=None if history is None else messages_of(history),
            tools=json_objects(tools, "tools"),
            on_rewrite=pb.REWRITE_POLICY_STRIP if strip_rewritten else pb.REWRITE_POLICY_KEEP,
        )
        return await self._attach(pb.ClientEvent(open=request), id_is_new=id is None)

    async def resume(
        self, id: str, *, resume_token: str | None = None, expect_committed_tokens: int | None = None
    ) -> Chat:
        """An existing conversation, taken over from whoever is attached to it."""
        request = pb.Resume(
            conversation_id=id, resume_token=resume_token, expect_committed_tokens=expect_committed_tokens
        )
        return await self._attach(pb.ClientEvent(resume=request))

    async def fork(
        self,
        id: str,
        *,
        turns: int | None = None,
        tokens: int | None = None,
        new_id: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> pb.Conversation:
        """A new conversation with the history of another, or its first `turns` or `tokens`."""
        return await self._fork(fork_request(id, turns, tokens, new_id, labels))

    async def get(self, id: str, *, page_size: int = 0) -> tuple[pb.Conversation, list[pb.CommittedTurn]]:
        """A conversation and all its turns."""
        turns: list[pb.CommittedTurn] = []
        request = pb.GetRequest(conversation_id=id, page_size=page_size)
        while True:
            page: pb.GetResponse = await self._call(self._conversations.Get, request)
            turns.extend(page.turns)
            request.page_token = page.next_page_token
            if not request.page_token:
                return page.conversation, turns

    async def list(
        self, labels: Mapping[str, str] | None = None, *, page_size: int = 0
    ) -> AsyncIterator[pb.Conversation]:
        """The conversations that carry all `labels`; pages are fetched as they are needed."""
        request = pb.ListRequest(labels=labels, page_size=page_size)
        while True:
            page: pb.ListResponse = await self._call(self._conversations.List, request)
            for conversation in page.conversations:
                yield conversation
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    async def delete(self, id: str) -> None:
        """Erases a conversation and all its content."""
        await self._call(self._conversations.Delete, pb.DeleteRequest(conversation_id=id))

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        token_ids: Sequence[int] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Reply:
        """A reply that nothing is remembered of, to `prompt` as it is, or `messages`, or `token_ids`."""
        request = pb.GenerateRequest(sampling=sampling_of(sampling), tools=json_objects(tools, "tools"))
        set_input(request, prompt, messages, token_ids)
        reply = Reply()
        reply.events = self._generate(request, timeout)
        return reply

    async def tokenize(self, text: str, *, allow_special: bool = False) -> tuple[int, ...]:
        request = pb.TokenizeRequest(text=text, allow_special=allow_special)
        answer: pb.TokenizeResponse = await self._call(self._engine.Tokenize, request)
        return tuple(answer.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special=skip_special)
        answer: pb.DetokenizeResponse = await self._call(self._engine.Detokenize, request)
        return answer.text

    async def model_info(self) -> pb.GetModelInfoResponse:
        answer: pb.GetModelInfoResponse = await self._call(
            self._engine.GetModelInfo, pb.GetModelInfoRequest()
        )
        return answer

    async def load(self) -> pb.GetLoadResponse:
        """What the server does now, and what it has done since its start; needs an admin token."""
        answer: pb.GetLoadResponse = await self._call(self._engine.GetLoad, pb.GetLoadRequest())
        return answer

    async def drain(self, grace_s: float | None = None) -> None:
        """Begins to shut the server down; needs an admin token."""
        await self._call(self._engine.Drain, pb.DrainRequest(grace_s=grace_s))

    async def _attach(self, first: pb.ClientEvent, *, id_is_new: bool = False) -> Chat:
        def connect() -> Call:
            call: Call = self._conversations.Converse(metadata=self._metadata)
            return call

        chat = Chat(connect, self._pauses, self._fork_attached)
        await chat.attach(first, id_is_new=id_is_new)
        return chat

    async def _fork(self, request: pb.ForkRequest) -> pb.Conversation:
        pauses = self._pauses()
        while True:
            try:
                answer: pb.ForkResponse = await self._call(self._conversations.Fork, request)
                return answer.conversation
            except Unavailable as error:
                await wait(pauses, error)

    async def _fork_attached(self, request: pb.ForkRequest) -> Chat:
        return await self.resume((await self._fork(request)).conversation_id)

    def _pauses(self) -> Iterator[float]:
        return (pause * (0.5 + self._jitter() / 2) for pause in (PAUSES_S if self._retry else ()))

    async def _generate(
        self, request: pb.GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[ReplyEvent, None]:
        call = self._engine.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for event in call:
                yield getattr(event, event.WhichOneof("event"))
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error) from None
        finally:
            call.cancel()

    async def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return await method(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error) from None


def _channel(target: str, tls: bool | str | Path) -> grpc.aio.Channel:
    if not tls:
        return grpc.aio.insecure_channel(target, CHANNEL_OPTIONS)
    authorities = None if tls is True else Path(tls).read_bytes()
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(authorities), CHANNEL_OPTIONS)
