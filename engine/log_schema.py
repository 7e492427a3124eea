"""How conversations and turns lie in the token log's SQLite file, and how older files become newer ones.

Erasing decides the shape.  `secure_delete` makes SQLite zero whatever it frees, but when it moves a row
within its tree it may leave a stale copy of the row's first bytes on the old page (seen after 4 of 3,300
random deletes).  Overflow pages never move.  So pages are small, and each row has a page of padding *before*
its content columns, which pushes all content onto overflow pages.  No column before the padding may hold
what a client wrote, except ids.  `ALTER TABLE` adds columns at the end of a row, where they are safe.
"""

import json
import sqlite3
import struct
from collections.abc import Sequence
from dataclasses import asdict, astuple
from typing import Any

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

PAGE_BYTES = 1024
Migration = Sequence[str]  # SQL statements that take a file from one schema version to the next

MIGRATIONS: Sequence[Migration] = (
    (
        """
        CREATE TABLE conversations (
            id TEXT PRIMARY KEY, tenant TEXT NOT NULL, fingerprint TEXT NOT NULL,
            created_at REAL NOT NULL, updated_at REAL NOT NULL, resume_token TEXT NOT NULL,
            num_turns INTEGER NOT NULL, num_tokens INTEGER NOT NULL, seq_mark INTEGER NOT NULL,
            padding BLOB NOT NULL DEFAULT (zeroblob(1024)),
            system TEXT, sampling TEXT NOT NULL, labels TEXT NOT NULL
        )
        """,
        "CREATE INDEX conversations_newest ON conversations (tenant, updated_at DESC, id DESC)",
        """
        CREATE TABLE turns (
            conversation_id TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
            number INTEGER NOT NULL, turn_id TEXT NOT NULL, first_token INTEGER NOT NULL,
            finish_reason INTEGER NOT NULL, usage TEXT NOT NULL, timing TEXT NOT NULL,
            created_at REAL NOT NULL, done_seq INTEGER NOT NULL, history_rewritten INTEGER NOT NULL,
            padding BLOB NOT NULL DEFAULT (zeroblob(1024)),
            digest BLOB NOT NULL, matched_stop TEXT, messages TEXT NOT NULL, reply_text TEXT NOT NULL,
            prompt_ids BLOB NOT NULL, reply_ids BLOB NOT NULL,
            PRIMARY KEY (conversation_id, number), UNIQUE (conversation_id, turn_id)
        )
        """,
    ),
    (
        "ALTER TABLE conversations ADD COLUMN tools TEXT NOT NULL DEFAULT '[]'",
        "ALTER TABLE conversations ADD COLUMN on_rewrite INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE conversations ADD COLUMN parent TEXT",
        "ALTER TABLE conversations ADD COLUMN forked_at INTEGER NOT NULL DEFAULT 0",
    ),
    (),  # usage and timing have more fields, which older versions would not know
)


def insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    """Write `row`, column by name.  sqlite3.IntegrityError if its key is taken."""
    names, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", row)


def conversation_row(record: ConversationRecord) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in ConversationRecord.__slots__}
    return row | {
        "sampling": json.dumps(asdict(record.sampling)),
        "labels": json.dumps(record.labels),
        "tools": json.dumps(record.tools),
        "on_rewrite": record.on_rewrite.value,
    }


def conversation_record(row: sqlite3.Row) -> ConversationRecord:
    sampling: dict[str, Any] = json.loads(row["sampling"])
    return ConversationRecord(
        id=ConversationId(row["id"]),
        tenant=Tenant(row["tenant"]),
        fingerprint=row["fingerprint"],
        system=row["system"],
        sampling=SamplingParams(**{name: _with_tuples(value) for name, value in sampling.items()}),
        labels=json.loads(row["labels"]),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        resume_token=row["resume_token"],
        num_turns=row["num_turns"],
        num_tokens=row["num_tokens"],
        seq_mark=row["seq_mark"],
        tools=tuple(json.loads(row["tools"])),
        on_rewrite=RewritePolicy(row["on_rewrite"]),
        parent=None if row["parent"] is None else ConversationId(row["parent"]),
        forked_at=row["forked_at"],
    )


def turn_row(conversation_id: ConversationId, turn: TurnRecord) -> dict[str, Any]:
    row = {name: getattr(turn, name) for name in TurnRecord.__slots__}
    return row | {
        "conversation_id": conversation_id,
        "prompt_ids": _pack(turn.prompt_ids),
        "reply_ids": _pack(turn.reply_ids),
        "messages": json.dumps([astuple(message) for message in turn.messages]),
        "finish_reason": turn.finish_reason.value,
        "usage": json.dumps(asdict(turn.usage)),
        "timing": json.dumps(asdict(turn.timing)),
    }


def turn_record(row: sqlite3.Row) -> TurnRecord:
    return TurnRecord(
        turn_id=TurnId(row["turn_id"]),
        number=row["number"],
        first_token=row["first_token"],
        prompt_ids=_unpack(row["prompt_ids"]),
        reply_ids=_unpack(row["reply_ids"]),
        messages=tuple(Message(*_with_tuples(fields)) for fields in json.loads(row["messages"])),
        reply_text=row["reply_text"],
        finish_reason=FinishReason(row["finish_reason"]),
        matched_stop=row["matched_stop"],
        usage=Usage(**json.loads(row["usage"])),
        timing=Timing(**json.loads(row["timing"])),
        created_at=row["created_at"],
        done_seq=row["done_seq"],
        digest=row["digest"],
        history_rewritten=bool(row["history_rewritten"]),
    )


def _with_tuples(value: Any) -> Any:
    """What JSON made of `value`, with tuples for its lists, as records have them."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _pack(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}i", *ids)  # little-endian int32


def _unpack(blob: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(blob) // 4}i", blob)
