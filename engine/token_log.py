"""The token log: what survives a crash.  One SQLite file per data dir, written by one thread of its own.

A turn is reported done only after its `commit_turn` has resolved, so every turn a client was told about is
here after `kill -9`, and after a power cut if the disk honours fsync (`synchronous=FULL`).

Every operation returns a `concurrent.futures.Future`; from asyncio, `await
asyncio.wrap_future(log.load(id))`.  The writer takes all operations that wait, runs them in one transaction
(group commit: one fsync for all) with a savepoint around each, and delivers the outcomes after the commit.
A submitted operation is carried out even if nobody waits for it any more.  Besides the errors named at each
operation, any may end with `DataDirError` (disk full, I/O error, damaged file: it left no trace, later ones
are tried afresh), and raises `EngineStopped` after `close`.

`engine.log_file` opens the file, `engine.log_schema` says how records lie in it, `engine.log_statements` what
each operation does to them.
"""

import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from engine import log_statements
from engine.errors import DataDirError, EngineStopped
from engine.history import Decode, Rewound
from engine.log_file import IN_MEMORY, TRUNCATE_WAL, claim, connect, storage_error
from engine.log_schema import MIGRATIONS, Migration
from engine.log_statements import Page
from engine.types import (
    Clock,
    ConversationId,
    ConversationRecord,
    Point,
    SamplingParams,
    Tenant,
    TurnRecord,
)

R = TypeVar("R")


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

    def create(self, record: ConversationRecord, first: TurnRecord | None = None) -> Future[None]:
        """Store a new conversation, with its first turn if it has one already, both or neither.

        AlreadyExists if its id is taken, by any tenant.
        """
        return self._submit(partial(log_statements.create, record=record, first=first))

    def commit_turn(self, conversation_id: ConversationId, turn: TurnRecord, seq_mark: int) -> Future[None]:
        """Store `turn` in place of those of its number and above, and count it in, all or nothing.

        NotFound if the conversation is not here (any more); AlreadyExists if an earlier turn has that id;
        InvariantError if the turn begins behind the end of the one before it.
        """
        now = self._clock.wall()
        return self._submit(
            partial(log_statements.commit_turn, id=conversation_id, turn=turn, seq_mark=seq_mark, now=now)
        )

    def set_seq_mark(self, conversation_id: ConversationId, seq_mark: int) -> Future[None]:
        """Events up to `seq_mark` may have been sent; a later life begins behind it.  NotFound."""
        return self._submit(partial(log_statements.set_seq_mark, id=conversation_id, seq_mark=seq_mark))

    def rewind(self, conversation_id: ConversationId, point: Point, decode: Decode) -> Future[Rewound]:
        """Cut the history at `point`.  A reply that is cut short gets its text from `decode`, on the log's
        thread.  NotFound; InvalidRequest for a point where it cannot be cut.
        """
        now = self._clock.wall()
        return self._submit(
            partial(log_statements.rewind, id=conversation_id, point=point, decode=decode, now=now)
        )

    def fork(
        self, record: ConversationRecord, point: Point | None, decode: Decode
    ) -> Future[ConversationRecord]:
        """Store a conversation with the turns of `record.parent` up to `point`, or find it stored.

        NotFound; InvalidRequest as for `rewind`; AlreadyExists if its id is taken by any conversation but the
        tenant's fork of the same parent at the same token.
        """
        return self._submit(partial(log_statements.fork, record=record, point=point, decode=decode))

    def update(
        self,
        conversation_id: ConversationId,
        sampling: SamplingParams | None,
        labels: Mapping[str, str] | None,
    ) -> Future[ConversationRecord]:
        """Set what is set in `sampling`, and put `labels`, unless None, in place of the old.  NotFound."""
        now = self._clock.wall()
        return self._submit(
            partial(log_statements.update, id=conversation_id, sampling=sampling, labels=labels, now=now)
        )

    def load(
        self, conversation_id: ConversationId
    ) -> Future[tuple[ConversationRecord, list[TurnRecord]] | None]:
        """The conversation and its turns in order, or None.  Tenants are for the caller to compare."""
        return self._submit(partial(log_statements.load, id=conversation_id))

    def list_conversations(
        self, tenant: Tenant, *, labels: Mapping[str, str], page_size: int, page_token: str = ""
    ) -> Future[Page]:
        """Conversations of `tenant` that carry all of `labels`, last used first.  `page_token` "" starts.

        Pages neither repeat nor skip a conversation that stays as it is; one used meanwhile moves to the
        front.  InvalidRequest for a page size below 1 or a token that is not a `next_token`.
        """
        listing = partial(log_statements.list_conversations, tenant=tenant, labels=labels)
        return self._submit(partial(listing, page_size=page_size, page_token=page_token))

    def delete(self, conversation_id: ConversationId) -> Future[None]:
        """Erase the conversation: when this resolves, nothing it said is in the files any more, nor what was
        cut from it or replaced before.  NotFound.
        """

        def run(connection: sqlite3.Connection) -> None:
            log_statements.delete(connection, conversation_id)
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
            if len(group) > 1:  # whoever needs no room need not fail with those who do
                for operation in group:
                    self._commit([operation])
                return
            errors = {0: storage_error(self._path, error)} | errors
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
