"""What can go wrong, one class per answer a caller could give.  `rpc.status` maps them to gRPC status in one
table.

Messages are written for the caller: what happened, with values, and what to do.  `InvariantError` is for
our own bugs.
"""

import re


class EngineError(Exception):
    """Base of everything a caller may see.  `retry_after_s` is a hint for errors that pass by themselves."""

    retry_after_s: float | None = None


class InvalidRequest(EngineError):
    """The request itself is wrong; sending it again cannot help."""


class NotFound(EngineError):
    """No such conversation for this caller: unknown, deleted and foreign ids look the same."""


class AlreadyExists(EngineError):
    """The id is taken: a conversation id in use, or a turn id that was used with other content."""


class Conflict(EngineError):
    """The conversation is not in a state that allows this: a turn in flight, another model, other lengths."""


class ContextOverflow(EngineError):
    """The turn does not fit into what is left of the context window."""


class QueueFull(EngineError):
    """Too many turns wait already; try again later."""

    retry_after_s = 1.0


class Draining(EngineError):
    """The server is shutting down; reconnect and resume."""

    retry_after_s = 2.0


class AttachmentTaken(EngineError):
    """Another stream has attached to this conversation."""


class TurnCancelled(EngineError):
    """The turn was cancelled and discarded; the conversation stands as before it."""


class Unauthenticated(EngineError):
    """No credentials, or wrong ones."""


class PermissionDenied(EngineError):
    """The caller is known but may not do this."""


class DeadlineExceeded(EngineError):
    """The caller's deadline passed before the work was done."""


class EngineStopped(EngineError):
    """The engine ended or failed; nothing committed is lost."""

    retry_after_s = 2.0


class ModelFolderError(EngineError):
    """A model folder lacks a file, is corrupt, or does not fit together."""


class ConfigError(EngineError):
    """A setting, or a combination of settings, cannot work on this machine."""


class DataDirError(EngineError):
    """The data directory is locked, newer than this program, damaged or full."""

    retry_after_s = 2.0


class InvariantError(AssertionError):
    """A bug of ours: internal state contradicts itself."""


def reason_of(error: BaseException) -> str:
    """The class as programs are told it: QUEUE_FULL, ...; INTERNAL for what was not written for callers."""
    if not isinstance(error, EngineError):
        return "INTERNAL"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).upper()
