"""Records for the token log's tests, and two ways to look into it."""

import random
import sqlite3
import threading

from engine.token_log import TokenLog
from engine.types import (
    ConversationId,
    ConversationRecord,
    FinishReason,
    Message,
    RewritePolicy,
    SamplingParams,
    Tenant,
    Timing,
    TurnId,
    TurnRecord,
    Usage,
)


def conversation(name: str, **changes: object) -> ConversationRecord:
    fields: dict[str, object] = {
        "id": ConversationId(name),
        "tenant": Tenant("local"),
        "fingerprint": "f00d",
        "system": "Be brief.",
        "sampling": SamplingParams(
            temperature=0.7, stop=("END", "\n\n"), stop_token_ids=(5,), logit_bias=((5, -1.0), (6, 0.5))
        ),
        "labels": {"app": "test", "it's": 'a "label"'},
        "created_at": 1.5,
        "updated_at": 2.25,
        "resume_token": "secret",
        "tools": ('{"name": "look_up"}',),
        "on_rewrite": RewritePolicy.STRIP,
    }
    return ConversationRecord(**fields | changes)  # type: ignore[arg-type]


def turn(number: int, first_token: int, prompt: int = 3, reply: int = 2, **changes: object) -> TurnRecord:
    ids = random.Random(number)
    fields: dict[str, object] = {
        "turn_id": TurnId(f"t-{number}"),
        "number": number,
        "first_token": first_token,
        "prompt_ids": tuple(ids.randrange(2**31) for _ in range(prompt)),
        "reply_ids": tuple(ids.randrange(2**31) for _ in range(reply)),
        "messages": (
            Message("user", "Grüße 🙂\0", name="Ada"),
            Message("assistant", "", tool_calls=('{"name": "look_up"}', "{}")),
            Message("tool", "", tool_call_id="call-1"),
        ),
        "reply_text": "Ünd",
        "finish_reason": FinishReason.STOP_STRING,
        "matched_stop": "END",
        "usage": Usage(3, 2, 0, 1, 2),
        "timing": Timing(0.1, 0.2, 0.3),
        "created_at": 3.5,
        "done_seq": 10 * number,
        "digest": b"\x00\xff",
        "history_rewritten": number == 1,
    }
    return TurnRecord(**fields | changes)  # type: ignore[arg-type]


def stored(log: TokenLog, name: str) -> tuple[ConversationRecord, list[TurnRecord]]:
    found = log.load(ConversationId(name)).result()
    assert found is not None
    return found


def hold(log: TokenLog) -> threading.Event:
    """Keep the writer busy until the returned event is set: what is submitted meanwhile is one group."""
    entered, released = threading.Event(), threading.Event()

    def wait(_: sqlite3.Connection) -> None:
        entered.set()
        released.wait(30)

    log._submit(wait)
    assert entered.wait(30)
    return released
