"""The token log on disk: it survives kill -9, erases what it was told to, and says who is in its way."""

import os
import random
import resource
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from engine.errors import DataDirError, NotFound
from engine.log_schema import MIGRATIONS, PAGE_BYTES
from engine.token_log import TokenLog
from engine.types import (
    ConversationId,
    ConversationRecord,
    FinishReason,
    Message,
    Point,
    SamplingParams,
    Tenant,
    Timing,
    TurnId,
    TurnRecord,
    Usage,
)
from tests.engine.log_records import conversation, hold, stored, turn
from tests.fakes import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def no_text(ids: Sequence[int], after: int) -> str:
    return ""


def test_delete_leaves_no_byte_of_the_content_in_any_file(tmp_path: Path, clock: FakeClock) -> None:
    """Rows move about in the trees as others come and go; no stale copy may stay behind."""
    rng = random.Random("erase")
    alive: dict[str, tuple[list[bytes], int, int]] = {}  # secrets, turns, tokens

    def on_disk() -> bytes:
        return b"".join(path.read_bytes() for path in tmp_path.iterdir())

    def secret() -> str:
        return f"{rng.getrandbits(80):020x}"

    with closing(TokenLog.open(tmp_path, clock=clock)) as log:
        num_seen = num_erased = 0
        for _ in range(500):
            action = rng.random()
            if action < 0.3 or not alive:
                name, system, label, stop = f"c-{rng.getrandbits(40):010x}", secret(), secret(), secret()
                tool = secret()
                opened = conversation(
                    name,
                    system=system,
                    labels={"k": label},
                    sampling=SamplingParams(stop=(stop,)),
                    tools=(tool,),
                )
                log.create(opened).result()
                alive[name] = ([text.encode() for text in (system, label, stop, tool)], 0, 0)
            elif action < 0.4:
                name, label = rng.choice(list(alive)), secret()
                log.update(ConversationId(name), SamplingParams(stop=(secret(),)), {"k": label}).result()
                alive[name][0].append(label.encode())
            elif action < 0.5:
                name = rng.choice(list(alive))
                cut = log.rewind(ConversationId(name), Point(num_turns=alive[name][1] // 2), no_text).result()
                alive[name] = (alive[name][0], cut.num_turns, cut.num_tokens)
            elif action < 0.8:
                name = rng.choice(list(alive))
                secrets, number, first = alive[name]
                if number and action > 0.75:  # in place of the last turn
                    number, first = number - 1, stored(log, name)[1][-1].first_token
                said, replied, matched = secret() + "s" * rng.choice([5, 500, 5000]), secret(), secret()
                record = turn(
                    number,
                    first,
                    prompt=rng.choice([4, 400]),
                    messages=(Message("user", said),),
                    reply_text=replied,
                    matched_stop=matched,
                    digest=rng.randbytes(16),
                    reply_ids=tuple(rng.randrange(2**31) for _ in range(4)),
                )
                record = replace(record, turn_id=TurnId(secret()))
                log.commit_turn(ConversationId(name), record, number).result()
                ids = b"".join(token.to_bytes(4, "little") for token in record.reply_ids)
                secrets += [said[:20].encode(), replied.encode(), matched.encode(), ids, record.digest]
                alive[name] = (secrets, number + 1, first + len(record.prompt_ids) + 4)
            else:
                name = rng.choice(list(alive))
                secrets, _, _ = alive.pop(name)
                before = on_disk()
                log.delete(ConversationId(name)).result()
                after = on_disk()
                assert not [content for content in secrets if content in after]
                num_seen += sum(content in before for content in secrets)  # not cut in two by a page's end
                num_erased += len(secrets)
        assert num_seen > 0.8 * num_erased > 300  # some of what was cut or replaced is gone by itself
        for name, (_, number, _) in alive.items():
            assert len(stored(log, name)[1]) == number


def test_content_lies_on_overflow_pages_only(tmp_path: Path, clock: FakeClock) -> None:
    """Pages of a tree leave stale copies when rows move; see engine.log_schema."""
    with closing(TokenLog.open(tmp_path, clock=clock)) as log:
        for n in range(50):
            name = ConversationId(f"c-{n}")
            sampling = SamplingParams(stop=("content",))
            system = "content" if n % 2 else None
            opened = conversation(name, system=system, labels={"content": "content"}, tools=("content",))
            log.create(replace(opened, sampling=sampling))
            said = (Message("user", "content" * (n % 3) + "s" * 200 * n),)
            log.commit_turn(
                name,
                turn(0, 0, messages=said, digest=b"content", reply_text="content", matched_stop="content"),
                seq_mark=2**40 if n % 5 else 0,
            ).result()
    file = (tmp_path / "conversations.db").read_bytes()
    pages = [file[start : start + PAGE_BYTES] for start in range(0, len(file), PAGE_BYTES)]
    with_content = [page for page in pages[1:] if b"content" in page]
    assert len(with_content) > 100
    assert {page[0] for page in with_content} == {
        0
    }  # an overflow page begins with a page number, a tree's not


def test_a_delete_that_another_reader_holds_up_says_so_and_erases_later(
    tmp_path: Path, clock: FakeClock
) -> None:
    with closing(TokenLog.open(tmp_path, clock=clock)) as log:
        log.create(conversation("c-1", system="the-secret-text")).result()
        with closing(sqlite3.connect(tmp_path / "conversations.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM turns").fetchone()
            with pytest.raises(DataDirError, match=r"deleted, but another program reads .*conversations\.db"):
                log.delete(ConversationId("c-1")).result()
        log.create(conversation("c-2")).result()
        assert b"the-secret-text" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


COMMIT_UNTIL_KILLED = """
import sys
from pathlib import Path
from engine.token_log import TokenLog
from tests.engine.log_records import conversation, turn
from tests.fakes import FakeClock
log = TokenLog.open(Path(sys.argv[1]), clock=FakeClock())
log.create(conversation("c-1")).result()
number = 0
while True:
    group = [log.commit_turn("c-1", turn(n, 5 * n), n) for n in range(number, number + 3)]
    for future in group:
        future.result()
        print(number, flush=True)
        number += 1
"""


def test_every_acknowledged_turn_survives_kill_9_token_for_token(tmp_path: Path, clock: FakeClock) -> None:
    command = [sys.executable, "-c", COMMIT_UNTIL_KILLED, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(25)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout]
    assert process.returncode == -signal.SIGKILL
    assert acknowledged == list(range(len(acknowledged)))

    with closing(TokenLog.open(tmp_path, clock=clock)) as log:
        record, turns = stored(log, "c-1")
        assert len(turns) >= len(acknowledged)
        assert turns == [turn(n, 5 * n) for n in range(len(turns))]
        assert (record.num_turns, record.num_tokens) == (len(turns), 5 * len(turns))
        log.commit_turn(ConversationId("c-1"), turn(len(turns), 5 * len(turns)), 1).result()


def pragma(name: str, connection: sqlite3.Connection) -> object:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_the_file_is_synced_at_every_commit(tmp_path: Path, clock: FakeClock) -> None:
    with closing(TokenLog.open(tmp_path, clock=clock)) as log:
        settings = {
            name: log._submit(partial(pragma, name)).result()
            for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}


def test_folder_and_files_are_for_their_owner_alone(tmp_path: Path, clock: FakeClock) -> None:
    folder = tmp_path / "state" / "continuo"
    with closing(TokenLog.open(folder, clock=clock)) as log:
        log.create(conversation("c-1")).result()
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    names = ("conversations.db", "conversations.db-wal", "conversations.db-shm", "lock")
    assert modes == {"continuo": 0o700} | dict.fromkeys(names, 0o600)


def test_a_second_server_is_told_who_holds_the_data_dir(tmp_path: Path, clock: FakeClock) -> None:
    with closing(TokenLog.open(tmp_path, clock=clock)):
        with pytest.raises(DataDirError) as refused:
            TokenLog.open(tmp_path, clock=clock)
        assert str(refused.value) == (
            f"data dir {tmp_path} is in use by pid {os.getpid()} on host {socket.gethostname()} "
            "since 2027-01-15T08:00:00+00:00; stop it or give --data-dir another folder"
        )
    TokenLog.open(tmp_path, clock=clock).close()


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        DataDirError, match=r"cannot use data dir .*; give --data-dir a folder that this user"
    ):
        TokenLog.open(tmp_path / "file", clock=clock)


def test_a_file_of_a_newer_program_is_refused_and_keeps_its_lock_free(
    tmp_path: Path, clock: FakeClock
) -> None:
    newer = (*MIGRATIONS, ("CREATE TABLE later (x)",))
    TokenLog.open(tmp_path, clock=clock, migrations=newer).close()
    for _ in range(2):
        with pytest.raises(
            DataDirError, match=r"schema version 4 and this program knows up to 3; run the newer"
        ):
            TokenLog.open(tmp_path, clock=clock)
    TokenLog.open(tmp_path, clock=clock, migrations=newer).close()


def test_an_older_file_is_migrated_once_and_keeps_its_conversations(tmp_path: Path, clock: FakeClock) -> None:
    with closing(TokenLog.open(tmp_path, clock=clock)) as log:
        log.create(conversation("c-1")).result()
    newer = (*MIGRATIONS, ("CREATE TABLE later (x)", "INSERT INTO later VALUES (7)"))
    for _ in range(2):
        with closing(TokenLog.open(tmp_path, clock=clock, migrations=newer)) as log:
            rows = log._submit(lambda c: [tuple(row) for row in c.execute("SELECT x FROM later")]).result()
            assert rows == [(7,)]
            assert stored(log, "c-1")[0] == conversation("c-1")


INSERT_CONVERSATION_1 = """
INSERT INTO conversations (id, tenant, fingerprint, created_at, updated_at, resume_token, num_turns,
                           num_tokens, seq_mark, system, sampling, labels)
VALUES ('c-1', 'local', 'f00d', 1.5, 2.25, 'secret', 1, 3, 7, 'Be brief.', '{"top_k": 20, "stop": ["END"]}',
        '{"app": "test"}')
"""
INSERT_TURN_1 = """
INSERT INTO turns (conversation_id, number, turn_id, first_token, finish_reason, usage, timing, created_at,
                   done_seq, history_rewritten, digest, matched_stop, messages, reply_text, prompt_ids,
                   reply_ids)
VALUES ('c-1', 0, 't-0', 0, 1, '{"prompt_tokens": 2}', '{"ttft_s": 0.5}', 3.5, 7, 1, x'00ff', NULL,
        '[["user", "hello"]]', 'hi', x'0100000002000000', x'03000000')
"""


def test_a_file_of_version_1_opens_with_all_it_has(tmp_path: Path, clock: FakeClock) -> None:
    with closing(TokenLog.open(tmp_path, clock=clock, migrations=MIGRATIONS[:1])) as old:
        for statement in (INSERT_CONVERSATION_1, INSERT_TURN_1):
            old._submit(lambda connection, sql=statement: connection.execute(sql)).result()
    for _ in range(2):
        with closing(TokenLog.open(tmp_path, clock=clock)) as log:
            record, turns = stored(log, "c-1")
            assert record == ConversationRecord(
                id=ConversationId("c-1"),
                tenant=Tenant("local"),
                fingerprint="f00d",
                system="Be brief.",
                sampling=SamplingParams(top_k=20, stop=("END",)),
                labels={"app": "test"},
                created_at=1.5,
                updated_at=2.25,
                resume_token="secret",
                num_turns=1,
                num_tokens=3,
                seq_mark=7,
            )
            assert turns == [
                TurnRecord(
                    turn_id=TurnId("t-0"),
                    number=0,
                    first_token=0,
                    prompt_ids=(1, 2),
                    reply_ids=(3,),
                    messages=(Message("user", "hello"),),
                    reply_text="hi",
                    finish_reason=FinishReason.STOP_TOKEN,
                    matched_stop=None,
                    usage=Usage(prompt_tokens=2),
                    timing=Timing(ttft_s=0.5),
                    created_at=3.5,
                    done_seq=7,
                    digest=b"\x00\xff",
                    history_rewritten=True,
                )
            ]
    with closing(TokenLog.open(tmp_path, clock=clock)) as log:
        log.commit_turn(ConversationId("c-1"), turn(1, 3), 8).result()
        log.create(conversation("c-2")).result()
        assert stored(log, "c-2")[0] == conversation("c-2")


def test_a_migration_that_fails_leaves_the_older_version(tmp_path: Path, clock: FakeClock) -> None:
    TokenLog.open(tmp_path, clock=clock).close()
    broken = (*MIGRATIONS, ("CREATE TABLE later (x)", "INSERT INTO nowhere VALUES (7)"))
    with pytest.raises(DataDirError, match="no such table: nowhere"):
        TokenLog.open(tmp_path, clock=clock, migrations=broken)
    TokenLog.open(tmp_path, clock=clock, migrations=(*MIGRATIONS, ("CREATE TABLE later (x)",))).close()


@pytest.mark.parametrize("offset", [0, 1024])
def test_a_damaged_file_is_reported_and_left_as_it_is(tmp_path: Path, clock: FakeClock, offset: int) -> None:
    path = tmp_path / "conversations.db"
    with closing(TokenLog.open(tmp_path, clock=clock)) as log:
        log.create(conversation("c-1")).result()
    damaged = bytearray(path.read_bytes())
    damaged[offset:] = b"\xa5" * (len(damaged) - offset)
    path.write_bytes(damaged)

    def use() -> None:
        with closing(TokenLog.open(tmp_path, clock=clock)) as log:
            log.load(ConversationId("c-1")).result()

    for _ in range(2):
        with pytest.raises(DataDirError, match="is damaged and was left as it is: restore it from a backup"):
            use()
        assert path.read_bytes() == damaged


def test_a_write_that_the_disk_refuses_fails_and_the_next_one_works(tmp_path: Path, clock: FakeClock) -> None:
    with closing(TokenLog.open(tmp_path, clock=clock)) as log:
        log.create(conversation("c-1")).result()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            too_long = log.commit_turn(ConversationId("c-1"), turn(0, 0, prompt=100_000), 1)
            error = too_long.exception()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert isinstance(error, DataDirError)
        assert "conversations.db cannot be written: free space on its disk, or raise what limits" in str(
            error
        )
        assert stored(log, "c-1")[0] == conversation("c-1")
        log.commit_turn(ConversationId("c-1"), turn(0, 0), 1).result()
    with closing(TokenLog.open(tmp_path, clock=clock)) as log:
        assert stored(log, "c-1")[1] == [turn(0, 0)]


def test_a_full_database_says_what_to_free(tmp_path: Path, clock: FakeClock) -> None:
    with closing(TokenLog.open(tmp_path, clock=clock)) as log:
        log.create(conversation("c-1")).result()
        log._submit(lambda connection: connection.execute("PRAGMA max_page_count = 60")).result()
        released = hold(log)
        too_long = log.commit_turn(ConversationId("c-1"), turn(0, 0, prompt=100_000), 1)
        reading = log.load(ConversationId("c-1"))
        missing = log.set_seq_mark(ConversationId("c-2"), 7)
        small = log.set_seq_mark(ConversationId("c-1"), 5)
        released.set()
        with pytest.raises(DataDirError, match=r"conversations\.db cannot grow: free space on its disk"):
            too_long.result()
        assert reading.result() == (conversation("c-1"), [])  # what came at the same time is not its victim
        with pytest.raises(NotFound):
            missing.result()
        assert small.result() is None and stored(log, "c-1")[0].seq_mark == 5
        log.commit_turn(ConversationId("c-1"), turn(0, 0), 1).result()
