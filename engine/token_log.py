"""The token log: what survives a crash.  One SQLite file per data dir, written by one thread of its own.

A turn is reported done only after its `commit_turn` has resolved, so every turn a client was told about is
here after `kill -9`, and after a power cut if the disk honours fsync (`synchronous=FULL`).

Every operation returns a `concurrent.futures.Future`; from asyncio, `await
asyncio.wrap_future(log.load(id))`.  The writer takes all operations that wait, runs them in one transaction
(group commit: one fsync for all) with a savepoint around each, and delivers the outcomes after the commit.
A submitted operation is carried out even if nobody waits for it any more.  Besides the errors named at each
operation, any may end with `DataDirError` (disk full, I/O error, damaged file: it left no trace, later ones
are tried afresh), and raises `EngineStopped` after `close`.

`engine.log_file` opens the file, `engine.log_schema` says how records lie in it.
"""

import base64
import json
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import AlreadyExists, DataDirError, EngineStopped, InvalidRequest, InvariantError, NotFound
from engine.log_file import IN_MEMORY, TRUNCATE_WAL, claim, connect, storage_error
from engine.log_schema import (
    MIGRATIONS,
    Migration,
    conversation_record,
    conversation_row,
    insert,
    turn_record,
    turn_row,
)
from engine.types import Clock, ConversationId, ConversationRecord, Tenant, TurnRecord

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Page:
    """Conversations, newest first.  `next_token` continues after the last of them; empty = that was all."""

    records: tuple[ConversationRecord, ...]
    next_token: str


@dataclass(frozen=True, slots=True)
class _Operation:
    run: Callable[[sqlite3.Connection], Any]
    future: Future[Any]
    erases: bool


class TokenLog:
    """Conversations and their committed turns.  Callable from any thread; only `close` blocks."""

    def __init__(self, connection: sqlite3.Connection, path: str, lock: int | None, clock: Clock) -> None:
        """Use `open`."""
        self.num_commits = 0  # transactions, for those who watch how well commits group
        self._connection = connection
        self._path = path
        self._lock = lock  # descriptor of the locked file
        self._clock = clock
        self._must_truncate = False  # the WAL may hold bytes of something deleted
        self._operations: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._closed = False
        self._closing = threading.Lock()  # nothing may be queued behind the None that ends the writer
        self._writer = threading.Thread(target=self._write, name="token-log", daemon=True)
        self._writer.start()

    @classmethod
    def open(
        cls, data_dir: Path | None, *, clock: Clock, migrations: Sequence[Migration] = MIGRATIONS
    ) -> "TokenLog":
        """The log in `data_dir`, made if it is not there; None keeps it in memory.  Blocks, for start-up.

        DataDirError if the folder cannot be used, another server holds it, or the file is newer or damaged.
        """
        if data_dir is None:
            return cls(connect(IN_MEMORY, migrations), IN_MEMORY, None, clock)
        lock = claim(data_dir, clock)
        path = str(data_dir / "conversations.db")
        try:
            return cls(connect(path, migrations), path, lock, clock)
        except BaseException:
            os.close(lock)
            raise

    def create(self, record: ConversationRecord) -> Future[None]:
        """Store a new conversation.  AlreadyExists if its id is taken, by any tenant."""

        def run(connection: sqlite3.Connection) -> None:
            try:
                insert(connection, "conversations", conversation_row(record))
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"conversation id {record.id} is taken; choose another or none") from None

        return self._submit(run)

    def commit_turn(self, conversation_id: ConversationId, turn: TurnRecord, seq_mark: int) -> Future[None]:
        """Append `turn` and count it in, both or neither.

        NotFound if the conversation is not here (any more); AlreadyExists if it has a turn of that id;
        InvariantError if the turn does not begin where the history ends.
        """
        now = self._clock.wall()

        def run(connection: sqlite3.Connection) -> None:
            end = connection.execute(
                "SELECT num_turns, num_tokens FROM conversations WHERE id = ?", (conversation_id,)
            ).fetchone()
            if end is None:
                raise NotFound(f"conversation {conversation_id} is not in the token log")
            same_id = "SELECT number FROM turns WHERE conversation_id = ? AND turn_id = ?"
            if taken := connection.execute(same_id, (conversation_id, turn.turn_id)).fetchone():
                raise AlreadyExists(
                    f"turn id {turn.turn_id} was used for turn {taken['number']} of {conversation_id}"
                )
            if (turn.number, turn.first_token) != tuple(end):
                raise InvariantError(
                    f"turn {turn.number} at token {turn.first_token} was to follow {end['num_turns']} turns "
                    f"of {end['num_tokens']} tokens in {conversation_id}"
                )
            insert(connection, "turns", turn_row(conversation_id, turn))
            num_tokens = len(turn.prompt_ids) + len(turn.reply_ids)
            connection.execute(
                "UPDATE conversations SET num_turns = num_turns + 1, num_tokens = num_tokens + ?, "
                "seq_mark = ?, updated_at = ? WHERE id = ?",
                (num_tokens, seq_mark, now, conversation_id),
            )

        return self._submit(run)

    def set_seq_mark(self, conversation_id: ConversationId, seq_mark: int) -> Future[None]:
        """Events up to `seq_mark` may have been sent; a later life begins behind it.  NotFound."""

        def run(connection: sqlite3.Connection) -> None:
            update = "UPDATE conversations SET seq_mark = ? WHERE id = ?"
            if connection.execute(update, (seq_mark, conversation_id)).rowcount == 0:
                raise NotFound(f"conversation {conversation_id} is not in the token log")

        return self._submit(run)

    def load(
        self, conversation_id: ConversationId
    ) -> Future[tuple[ConversationRecord, list[TurnRecord]] | None]:
        """The conversation and its turns in order, or None.  Tenants are for the caller to compare."""

        def run(connection: sqlite3.Connection) -> tuple[ConversationRecord, list[TurnRecord]] | None:
            row = connection.execute(
                "SELECT * FROM conversations WHERE id = ?", (conversation_id,)
            ).fetchone()
            if row is None:
                return None
            turns = "SELECT * FROM turns WHERE conversation_id = ? ORDER BY number"
            return conversation_record(row), [
                turn_record(t) for t in connection.execute(turns, (conversation_id,))
            ]

        return self._submit(run)

    def list_conversations(
        self, tenant: Tenant, *, labels: Mapping[str, str], page_size: int, page_token: str = ""
    ) -> Future[Page]:
        """Conversations of `tenant` that carry all of `labels`, last used first.  `page_token` "" starts.

        Pages neither repeat nor skip a conversation that stays as it is; one used meanwhile moves to the
        front.  InvalidRequest for a page size below 1 or a token that is not a `next_token`.
        """

        def run(connection: sqlite3.Connection) -> Page:
            if page_size < 1:
                raise InvalidRequest(f"page size is {page_size}; it must be at least 1")
            where: list[str] = ["tenant = ?"]
            values: list[object] = [tenant, *chain.from_iterable(labels.items())]
            where += ["EXISTS (SELECT 1 FROM json_each(labels) WHERE key = ? AND value = ?)"] * len(labels)
            if page_token:
                where.append("(updated_at, id) < (?, ?)")
                values += _parse_page_token(page_token)
            rows = connection.execute(
                f"SELECT * FROM conversations WHERE {' AND '.join(where)} "
                "ORDER BY updated_at DESC, id DESC LIMIT ?",
                (*values, page_size + 1),
            ).fetchall()
            records = tuple(conversation_record(row) for row in rows[:page_size])
            return Page(records, _page_token(records[-1]) if len(rows) > page_size else "")

        return self._submit(run)

    def delete(self, conversation_id: ConversationId) -> Future[None]:
        """Erase the conversation: when this resolves, nothing it said is in the files any more.  NotFound."""

        def run(connection: sqlite3.Connection) -> None:
            delete = "DELETE FROM conversations WHERE id = ?"  # its turns go by foreign key
            if connection.execute(delete, (conversation_id,)).rowcount == 0:
                raise NotFound(f"conversation {conversation_id} is not in the token log")
            self._must_truncate = True

        return self._submit(run, erases=True)

    def close(self) -> None:
        """Carry out what was submitted, then release the data dir.  Blocks; closing twice is harmless."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._operations.put(None)
        self._writer.join()

    def _submit(self, run: Callable[[sqlite3.Connection], R], erases: bool = False) -> Future[R]:
        future: Future[R] = Future()
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        with self._closing:
            if self._closed:
                raise EngineStopped("the token log is closed; the server is shutting down")
            self._operations.put(_Operation(run, future, erases))
        return future

    def _write(self) -> None:
        """The writer thread: one transaction per group of waiting operations, until None arrives."""
        try:
            ending = False
            while not ending:
                waiting = [self._operations.get()]
                with suppress(queue.Empty):
                    while True:
                        waiting.append(self._operations.get_nowait())
                ending = waiting[-1] is None
                self._commit([operation for operation in waiting if operation is not None])
        finally:
            self._connection.close()
            if self._lock is not None:
                os.close(self._lock)

    def _commit(self, group: Sequence[_Operation]) -> None:
        """Run `group` in one transaction and tell each of its operations what came of it."""
        results: dict[int, Any] = {}
        errors: dict[int, Exception] = {}
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for index, operation in enumerate(group):
                self._connection.execute("SAVEPOINT operation")
                try:
                    results[index] = operation.run(self._connection)
                except Exception as error:
                    errors[index] = (
                        storage_error(self._path, error) if isinstance(error, sqlite3.Error) else error
                    )
                    self._connection.execute("ROLLBACK TO operation")
                self._connection.execute("RELEASE operation")
            self._connection.execute("COMMIT")
            self.num_commits += 1
        except sqlite3.Error as error:  # the transaction itself failed, and with it everybody in it
            with suppress(sqlite3.Error):
                self._connection.rollback()
            errors = {index: storage_error(self._path, error) for index in range(len(group))} | errors
        if self._must_truncate and (left_over := self._truncate_wal()):
            errors = {index: left_over for index, operation in enumerate(group) if operation.erases} | errors
        for index, operation in enumerate(group):
            if index in errors:
                operation.future.set_exception(errors[index])
            else:
                operation.future.set_result(results[index])

    def _truncate_wal(self) -> DataDirError | None:
        """Finish what deletes began: freed pages are zeroed, but what they held may still be in the WAL."""
        try:
            (busy, _, _) = self._connection.execute(TRUNCATE_WAL).fetchone()
        except sqlite3.Error as error:
            return storage_error(self._path, error)
        if busy:
            return DataDirError(
                f"deleted, but another program reads {self._path}, so its write-ahead log keeps the content; "
                "end that program, and the next operation erases it"
            )
        self._must_truncate = False
        return None


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
