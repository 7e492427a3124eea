"""The token log's file on disk: who may open it, how it is opened, and what its failures mean to people.

The data dir has mode 0700 when made here, its files 0600.  One server holds it at a time: a locked file in
it names the holder.
"""

import fcntl
import os
import socket
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from engine.errors import DataDirError
from engine.log_schema import PAGE_BYTES, Migration
from engine.types import Clock

IN_MEMORY = ":memory:"
TRUNCATE_WAL = "PRAGMA wal_checkpoint(TRUNCATE)"
_IOERR_OF_WRITES = {  # a quota or a limit of file sizes; a full disk where it was not told apart
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
}
_SETTINGS = (
    f"page_size = {PAGE_BYTES}",
    "secure_delete = ON",
    "foreign_keys = ON",
    "journal_mode = WAL",
    "synchronous = FULL",
)


def claim(data_dir: Path, clock: Clock) -> int:
    """Make the data dir if need be and take it for this process, until the returned descriptor is closed.

    The lock is `flock` and not `lockf`, whose locks are lost when anything in the process closes the file.
    DataDirError if the folder cannot be used or another server holds it; it then names the holder.
    """
    descriptor = None
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        problem = (
            f"cannot use data dir {data_dir}: {error}; give --data-dir a folder that this user can write to"
        )
        if descriptor is not None:
            if isinstance(error, BlockingIOError):
                holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
                problem = (
                    f"data dir {data_dir} is in use by {holder}; stop it or give --data-dir another folder"
                )
            os.close(descriptor)
        raise DataDirError(problem) from error
    since = datetime.fromtimestamp(clock.wall(), UTC).isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on host {socket.gethostname()} since {since}".encode())
    return descriptor


def connect(path: str, migrations: Sequence[Migration]) -> sqlite3.Connection:
    """Open the file, made if it is not there, as version `len(migrations)` of the schema.

    DataDirError if it is newer than that, damaged or unreadable; a damaged file is left as it is.
    """
    connection = None
    try:
        if path != IN_MEMORY:
            os.close(os.open(path, os.O_CREAT, 0o600))  # SQLite gives its -wal and -shm files the same mode
        connection = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        for setting in _SETTINGS:
            connection.execute(f"PRAGMA {setting}")
        _migrate(connection, path, migrations)
        connection.execute(TRUNCATE_WAL)  # a crash may have come between a delete and its erasing
        return connection
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.Error | OSError):
            raise storage_error(path, error) from error
        raise


def storage_error(path: str, error: sqlite3.Error | OSError) -> DataDirError:
    """What to tell people about a failure of the file at `path`."""
    code = getattr(error, "sqlite_errorcode", 0)
    match code & 0xFF:  # the low byte is the kind, the rest its details
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            advice = (
                "is damaged and was left as it is: restore it from a backup, or move it away to begin anew"
            )
        case sqlite3.SQLITE_FULL:
            advice = "cannot grow: free space on its disk and try again"
        case sqlite3.SQLITE_IOERR if code in _IOERR_OF_WRITES:
            advice = (
                "cannot be written: free space on its disk, or raise what limits this user, and try again"
            )
        case _:
            advice = "cannot be read or written: check its disk and permissions and try again"
    return DataDirError(f"token log {path} {advice} ({error})")


def _migrate(connection: sqlite3.Connection, path: str, migrations: Sequence[Migration]) -> None:
    """Bring the file to schema version `len(migrations)`, one transaction each; an empty file has version 0.

    DataDirError if the file is newer than that.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise DataDirError(
            f"token log {path} has schema version {version} and this program knows up to {len(migrations)}; "
            "run the newer program that wrote it, or give --data-dir another folder"
        )
    for number, statements in enumerate(migrations[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        for statement in (*statements, f"PRAGMA user_version = {number}"):
            connection.execute(statement)
        connection.execute("COMMIT")
