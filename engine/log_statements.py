"""What the operations of the token log do to its file, each inside a transaction that the caller holds.

They leave no trace if they raise: `engine.token_log` rolls back to the savepoint before them.
"""

import base64
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain

from engine.errors import AlreadyExists, InvalidRequest, InvariantError, NotFound
from engine.history import Cut, Decode, Rewound, Span, cut_at, shortened, tokens_of
from engine.log_schema import conversation_record, conversation_row, insert, turn_record, turn_row
from engine.types import ConversationId, ConversationRecord, Point, SamplingParams, Tenant, TurnRecord

_COPIED = ", ".join(TurnRecord.__slots__)  # every column of a turn but whose it is


@dataclass(frozen=True, slots=True)
class Page:
    """Conversations, newest first.  `next_token` continues after the last of them; empty = that was all."""

    records: tuple[ConversationRecord, ...]
    next_token: str


def create(connection: sqlite3.Connection, record: ConversationRecord, first: TurnRecord | None) -> None:
    try:
        insert(connection, "conversations", conversation_row(record))
    except sqlite3.IntegrityError:
        raise AlreadyExists(f"conversation id {record.id} is taken; choose another or none") from None
    if first is not None:
        commit_turn(connection, record.id, first, record.seq_mark, record.updated_at)


def commit_turn(
    connection: sqlite3.Connection, id: ConversationId, turn: TurnRecord, seq_mark: int, now: float
) -> None:
    found = connection.execute("SELECT num_turns FROM conversations WHERE id = ?", (id,)).fetchone()
    if found is None:
        raise _not_here(id)
    before = connection.execute(
        "SELECT first_token + (length(prompt_ids) + length(reply_ids)) / 4 FROM turns "
        "WHERE conversation_id = ? AND number = ?",
        (id, turn.number - 1),
    ).fetchone()
    reached = before[0] if before is not None else 0
    if turn.number > found["num_turns"] or turn.first_token > reached:
        raise InvariantError(
            f"turn {turn.number} at token {turn.first_token} does not continue {id}, which has "
            f"{found['num_turns']} turns and {reached} tokens before that one"
        )
    connection.execute("DELETE FROM turns WHERE conversation_id = ? AND number >= ?", (id, turn.number))
    same_id = "SELECT number FROM turns WHERE conversation_id = ? AND turn_id = ?"
    if taken := connection.execute(same_id, (id, turn.turn_id)).fetchone():
        raise AlreadyExists(f"turn id {turn.turn_id} was used for turn {taken['number']} of {id}")
    insert(connection, "turns", turn_row(id, turn))
    end = turn.first_token + len(turn.prompt_ids) + len(turn.reply_ids)
    connection.execute(
        "UPDATE conversations SET num_turns = ?, num_tokens = ?, seq_mark = ?, updated_at = ? WHERE id = ?",
        (turn.number + 1, end, seq_mark, now, id),
    )


def set_seq_mark(connection: sqlite3.Connection, id: ConversationId, seq_mark: int) -> None:
    update = "UPDATE conversations SET seq_mark = ? WHERE id = ?"
    _expect_one(connection.execute(update, (seq_mark, id)), id)


def rewind(
    connection: sqlite3.Connection, id: ConversationId, point: Point, decode: Decode, now: float
) -> Rewound:
    spans = _spans(connection, id)
    cut = cut_at(id, spans, point)
    if cut.num_turns < len(spans) or cut.shortens:
        _cut(connection, id, cut, decode)
        connection.execute(
            "UPDATE conversations SET num_turns = ?, num_tokens = ?, updated_at = ? WHERE id = ?",
            (cut.num_turns, cut.num_tokens, now, id),
        )
    tokens = None
    if not cut.is_prefix:
        turns = connection.execute("SELECT * FROM turns WHERE conversation_id = ? ORDER BY number", (id,))
        tokens = tokens_of(turn_record(turn) for turn in turns)
    last = connection.execute(
        "SELECT history_rewritten FROM turns WHERE conversation_id = ? AND number = ?",
        (id, cut.num_turns - 1),
    ).fetchone()
    return Rewound(cut.num_turns, cut.num_tokens, tokens, last is not None and bool(last[0]))


def fork(
    connection: sqlite3.Connection, record: ConversationRecord, point: Point | None, decode: Decode
) -> ConversationRecord:
    assert record.parent is not None
    cut = cut_at(record.parent, _spans(connection, record.parent), point)
    record = replace(record, num_turns=cut.num_turns, num_tokens=cut.num_tokens, forked_at=cut.num_tokens)
    found = connection.execute("SELECT * FROM conversations WHERE id = ?", (record.id,)).fetchone()
    if found is not None:
        made = conversation_record(found)
        identity = (record.tenant, record.parent, record.forked_at)
        if (made.tenant, made.parent, made.forked_at) == identity:
            return made
    (seq_mark,) = connection.execute(
        "SELECT seq_mark FROM conversations WHERE id = ?", (record.parent,)
    ).fetchone()
    record = replace(record, seq_mark=seq_mark)  # its turns were told of under numbers up to this
    create(connection, record, None)
    connection.execute(
        f"INSERT INTO turns (conversation_id, {_COPIED}) "
        f"SELECT ?, {_COPIED} FROM turns WHERE conversation_id = ? AND number < ?",
        (record.id, record.parent, cut.num_turns),
    )
    _cut(connection, record.id, cut, decode)
    return record


def update(
    connection: sqlite3.Connection,
    id: ConversationId,
    sampling: SamplingParams | None,
    labels: Mapping[str, str] | None,
    now: float,
) -> ConversationRecord:
    row = connection.execute("SELECT * FROM conversations WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise _not_here(id)
    record = conversation_record(row)
    if sampling is not None:
        record = replace(record, sampling=sampling.over(record.sampling))
    if labels is not None:
        record = replace(record, labels=dict(labels))
    connection.execute(
        "UPDATE conversations SET sampling = ?, labels = ?, updated_at = ? WHERE id = ?",
        (json.dumps(asdict(record.sampling)), json.dumps(record.labels), now, id),
    )
    return record


def load(
    connection: sqlite3.Connection, id: ConversationId
) -> tuple[ConversationRecord, list[TurnRecord]] | None:
    row = connection.execute("SELECT * FROM conversations WHERE id = ?", (id,)).fetchone()
    if row is None:
        return None
    turns = connection.execute("SELECT * FROM turns WHERE conversation_id = ? ORDER BY number", (id,))
    return conversation_record(row), [turn_record(turn) for turn in turns]


def list_conversations(
    connection: sqlite3.Connection,
    tenant: Tenant,
    labels: Mapping[str, str],
    page_size: int,
    page_token: str,
) -> Page:
    if page_size < 1:
        raise InvalidRequest(f"page size is {page_size}; it must be at least 1")
    where: list[str] = ["tenant = ?"]
    values: list[object] = [tenant, *chain.from_iterable(labels.items())]
    where += ["EXISTS (SELECT 1 FROM json_each(labels) WHERE key = ? AND value = ?)"] * len(labels)
    if page_token:
        where.append("(updated_at, id) < (?, ?)")
        values += _parse_page_token(page_token)
    rows = connection.execute(
        f"SELECT * FROM conversations WHERE {' AND '.join(where)} ORDER BY updated_at DESC, id DESC LIMIT ?",
        (*values, page_size + 1),
    ).fetchall()
    records = tuple(conversation_record(row) for row in rows[:page_size])
    return Page(records, _page_token(records[-1]) if len(rows) > page_size else "")


def delete(connection: sqlite3.Connection, id: ConversationId) -> None:
    _expect_one(connection.execute("DELETE FROM conversations WHERE id = ?", (id,)), id)  # with its turns


def _spans(connection: sqlite3.Connection, id: ConversationId) -> list[Span]:
    if connection.execute("SELECT 1 FROM conversations WHERE id = ?", (id,)).fetchone() is None:
        raise _not_here(id)
    rows = connection.execute(
        "SELECT first_token, length(prompt_ids) / 4, length(reply_ids) / 4, messages <> '[]' FROM turns "
        "WHERE conversation_id = ? ORDER BY number",
        (id,),
    )
    return [
        Span(first, first + prompt, first + prompt + reply, bool(is_text))
        for first, prompt, reply, is_text in rows
    ]


def _cut(connection: sqlite3.Connection, id: ConversationId, cut: Cut, decode: Decode) -> None:
    """Leave what `cut` says of the turns of `id`."""
    num_whole = cut.num_turns - cut.shortens
    rows = "FROM turns WHERE conversation_id = ? AND number >= ?"
    last = connection.execute(f"SELECT * {rows} ORDER BY number", (id, num_whole)).fetchone()
    connection.execute(f"DELETE {rows}", (id, num_whole))
    if cut.shortens:
        insert(connection, "turns", turn_row(id, shortened(turn_record(last), cut.num_tokens, decode)))


def _expect_one(cursor: sqlite3.Cursor, id: ConversationId) -> None:
    if cursor.rowcount == 0:
        raise _not_here(id)


def _not_here(id: ConversationId) -> NotFound:
    return NotFound(f"conversation {id} is not in the token log")


def _page_token(last: ConversationRecord) -> str:
    return base64.urlsafe_b64encode(json.dumps([last.updated_at, last.id]).encode()).decode()


def _parse_page_token(token: str) -> tuple[float, str]:
    try:
        updated_at, last_id = json.loads(base64.urlsafe_b64decode(token))
        return float(updated_at), str(last_id)
    except (ValueError, TypeError):
        raise InvalidRequest(
            f"page token {token!r} is not one that this server gave; begin without one"
        ) from None
