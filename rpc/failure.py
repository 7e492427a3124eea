"""What the client raises: one class per gRPC status, all of them `ContinuoError`."""

from typing import ClassVar

import grpc
from google.protobuf.message import DecodeError

from rpc._generated import continuo_pb2 as pb


class ContinuoError(Exception):
    """`reason` says the same as the class, finer and for programs: QUEUE_FULL, CONTEXT_OVERFLOW, ..."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, reason: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class InvalidArgument(ContinuoError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(ContinuoError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(ContinuoError):
    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(ContinuoError):
    """The conversation is not in a state for this: a turn in flight, another model, another length."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class OutOfRange(ContinuoError):
    """The context window is too small for it."""

    code = grpc.StatusCode.OUT_OF_RANGE


class ResourceExhausted(ContinuoError):
    """Too many turns wait at the server (see `retry_after_s`), or the message is larger than it takes."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Aborted(ContinuoError):
    """Another stream has attached to the conversation."""

    code = grpc.StatusCode.ABORTED


class Unavailable(ContinuoError):
    """No connection, or the server is shutting down."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(ContinuoError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ContinuoError):
    code = grpc.StatusCode.CANCELLED


class Unauthenticated(ContinuoError):
    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ContinuoError):
    code = grpc.StatusCode.PERMISSION_DENIED


class Unimplemented(ContinuoError):
    """The server is older than this client."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(ContinuoError):
    code = grpc.StatusCode.INTERNAL


_CLASSES = {kind.code.value[0]: kind for kind in ContinuoError.__subclasses__()}


def error_of_message(told: pb.Error) -> ContinuoError:
    kind = _CLASSES.get(told.code, ContinuoError)
    return kind(told.message, told.reason, told.retry_after_s if told.HasField("retry_after_s") else None)


def error_of_call(error: grpc.aio.AioRpcError) -> ContinuoError:
    """From our own trailer where the server wrote the status; from the status itself where gRPC did."""
    for key, value in error.trailing_metadata() or ():
        if key == "continuo-error-bin" and isinstance(value, bytes):
            try:
                return error_of_message(pb.Error.FromString(value))
            except DecodeError:
                break
    kind = _CLASSES.get(error.code().value[0], ContinuoError)
    return kind(error.details() or error.code().name)
