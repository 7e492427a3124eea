"""What a caller is told when something goes wrong: one table from engine errors to gRPC status.

The same `Error` message travels as an event where the stream goes on, and in the trailer `continuo-error-bin`
where the call ends; there the standard google.rpc details stand beside it, for tools that know those.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from engine import errors
from rpc._generated import continuo_pb2 as pb

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
Details = grpc.HandlerCallDetails
Continuation = Callable[[Details], Awaitable[Handler]]
MAX_TEXT = 1000  # characters: a status travels in headers, which clients bound
Status = tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]  # code, message, trailing metadata

STATUS: dict[type[errors.EngineError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Conflict: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ContextOverflow: grpc.StatusCode.OUT_OF_RANGE,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.AttachmentTaken: grpc.StatusCode.ABORTED,
    errors.TurnCancelled: grpc.StatusCode.CANCELLED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.EngineStopped: grpc.StatusCode.UNAVAILABLE,
    errors.DataDirError: grpc.StatusCode.UNAVAILABLE,
}


def error_message(error: Exception, *, turn_id: str | None = None, client_seq: int | None = None) -> pb.Error:
    """What the caller is told.  Only what stands in the table was written for callers; the rest is a bug of
    ours.
    """
    code = STATUS.get(type(error))  # type: ignore[arg-type]
    if not isinstance(error, errors.EngineError) or code is None:
        log.error("a bug: the caller hears INTERNAL", exc_info=error)
        code, reason, message, retry_after_s = grpc.StatusCode.INTERNAL, "INTERNAL", _INTERNAL, None
    else:
        reason, retry_after_s = errors.reason_of(error), error.retry_after_s
        message = str(error)[:MAX_TEXT]
    return pb.Error(
        code=code.value[0],
        reason=reason,
        message=message,
        retryable=retry_after_s is not None,
        retry_after_s=retry_after_s,
        turn_id=turn_id,
        client_seq=client_seq,
    )


def status_of(error: Exception) -> Status:
    """The status that ends a call, for `context.abort`."""
    told = error_message(error)
    rich = status_pb2.Status(code=told.code, message=told.message)
    rich.details.add().Pack(error_details_pb2.ErrorInfo(reason=told.reason, domain="continuo"))
    if told.HasField("retry_after_s"):
        delay = Duration()
        delay.FromMicroseconds(round(told.retry_after_s * 1e6))
        rich.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    trailers = (
        ("grpc-status-details-bin", rich.SerializeToString()),
        ("continuo-error-bin", told.SerializeToString()),
    )
    return _CODES[told.code], told.message, trailers


class Answering:
    """`async with Answering(context):` ends the call with the right status if anything inside raises."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, grpc.aio.InternalError):
            # A write failed: the client is gone.  A handler that waits is cancelled then; so is this one.
            raise asyncio.CancelledError from error
        if isinstance(error, DecodeError):
            error = errors.InvalidRequest(f"the message does not follow continuo.proto: {error}")
        if isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
            await self._context.abort(*status_of(error))


class AnswerMalformed(grpc.aio.ServerInterceptor):
    """Answers an unreadable unary request with INVALID_ARGUMENT; gRPC itself would say UNKNOWN."""

    async def intercept_service(self, continuation: Continuation, details: Details) -> Handler:
        handler = await continuation(details)
        if not details.method.startswith("/continuo.v1.") or handler is None or handler.request_streaming:
            return handler
        decode: Any = handler.request_deserializer
        kind = "unary_stream" if handler.response_streaming else "unary_unary"
        behaviour = getattr(handler, kind)

        def decode_or_error(raw: bytes) -> Any:
            try:
                return decode(raw)
            except DecodeError as error:
                return error

        async def checked(request: Any, context: Context) -> Any:
            if isinstance(request, DecodeError):
                async with Answering(context):
                    raise request
            return await behaviour(request, context)

        return handler._replace(request_deserializer=decode_or_error, **{kind: checked})


_INTERNAL = "internal error; the server's log has the details"
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
