"""The token log keeps what it is given, fails one operation at a time, and pages through what it has."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engine.errors import (
    AlreadyExists,
    EngineStopped,
    InvalidRequest,
    InvariantError,
    NotFound,
)
from engine.token_log import TokenLog
from engine.types import (
    ConversationId,
    SamplingParams,
    Tenant,
    TurnId,
)
from tests.engine.log_records import conversation, hold, stored, turn
from tests.fakes import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=["disk", "memory"])
def log(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> Iterator[TokenLog]:
    with closing(TokenLog.open(tmp_path if request.param == "disk" else None, clock=clock)) as log:
        yield log


def test_a_conversation_comes_back_as_it_was_committed(log: TokenLog, clock: FakeClock) -> None:
    turns = [turn(0, 0), turn(1, 5, prompt=0, reply=1), turn(2, 6, matched_stop=None, messages=())]
    log.create(conversation("c-1")).result()
    log.create(conversation("c-2", system=None, labels={}, sampling=SamplingParams())).result()
    for seq, record in enumerate(turns):
        clock.now += 1
        log.commit_turn(ConversationId("c-1"), record, seq_mark=seq + 100).result()
    log.set_seq_mark(ConversationId("c-1"), 500).result()

    expected = conversation("c-1", num_turns=3, num_tokens=11, seq_mark=500, updated_at=clock.wall())
    assert stored(log, "c-1") == (expected, turns)
    assert stored(log, "c-2") == (
        conversation("c-2", system=None, labels={}, sampling=SamplingParams()),
        [],
    )
    assert log.load(ConversationId("c-3")).result() is None


def test_a_long_conversation_keeps_every_token(log: TokenLog) -> None:
    long = turn(0, 0, prompt=100_000, reply=1_000)
    log.create(conversation("c-1"))
    log.commit_turn(ConversationId("c-1"), long, 1).result()
    assert stored(log, "c-1")[1] == [long]


def test_what_was_closed_is_there_when_opened_again(tmp_path: Path, clock: FakeClock) -> None:
    log = TokenLog.open(tmp_path, clock=clock)
    released = hold(log)
    log.create(conversation("c-1"))
    log.commit_turn(ConversationId("c-1"), turn(0, 0), 7)
    threading.Timer(0.05, released.set).start()
    log.close()
    log.close()
    with pytest.raises(EngineStopped, match="the token log is closed"):
        log.load(ConversationId("c-1"))
    with closing(TokenLog.open(tmp_path, clock=clock)) as again:
        assert stored(again, "c-1")[1] == [turn(0, 0)]


def test_an_id_is_taken_once(log: TokenLog) -> None:
    log.create(conversation("c-1")).result()
    with pytest.raises(AlreadyExists, match="conversation id c-1 is taken; choose another or none"):
        log.create(conversation("c-1", tenant=Tenant("other"))).result()
    log.commit_turn(ConversationId("c-1"), turn(0, 0), 1).result()
    with pytest.raises(AlreadyExists, match="turn id t-0 was used for turn 0 of c-1"):
        log.commit_turn(ConversationId("c-1"), turn(1, 5, turn_id=TurnId("t-0")), 1).result()
    log.create(conversation("c-2")).result()
    log.commit_turn(ConversationId("c-2"), turn(0, 0), 1).result()  # turn ids are a conversation's own


def test_a_turn_that_does_not_continue_the_history_is_refused(log: TokenLog) -> None:
    log.create(conversation("c-1")).result()
    log.commit_turn(ConversationId("c-1"), turn(0, 0), 1).result()
    before = stored(log, "c-1")
    for wrong, has in ((turn(2, 5), "1 turns and 0 tokens"), (turn(1, 6), "1 turns and 5 tokens")):
        expected = f"does not continue c-1, which has {has} before that one"
        with pytest.raises(InvariantError, match=expected):
            log.commit_turn(ConversationId("c-1"), wrong, 2).result()
    assert stored(log, "c-1") == before


def test_what_is_not_there_cannot_be_changed(log: TokenLog) -> None:
    gone = ConversationId("c-9")
    for operation in (
        log.commit_turn(gone, turn(0, 0), 1),
        log.set_seq_mark(gone, 1),
        log.delete(gone),
    ):
        with pytest.raises(NotFound, match="conversation c-9 is not in the token log"):
            operation.result()


def test_waiting_operations_share_one_transaction_and_fail_alone(log: TokenLog) -> None:
    def fail_half_way(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM conversations")
        raise OSError("half-way")

    released = hold(log)
    before = log.num_commits
    operations = [log.create(conversation(f"c-{n}")) for n in range(30)]
    duplicate = log.create(conversation("c-3"))
    unencodable = log.create(conversation("c-x", system="\ud800"))
    half_done = log._submit(fail_half_way)
    operations += [log.commit_turn(ConversationId(f"c-{n}"), turn(0, 0), n) for n in range(30)]
    released.set()
    for operation in operations:
        operation.result()
    assert isinstance(duplicate.exception(), AlreadyExists)
    assert isinstance(unencodable.exception(), UnicodeEncodeError)
    assert isinstance(half_done.exception(), OSError)
    assert log.num_commits == before + 2  # the one that was held, and everything else
    assert stored(log, "c-29")[1] == [turn(0, 0)]
    assert log.load(ConversationId("c-x")).result() is None


def test_a_submitted_operation_cannot_be_cancelled(log: TokenLog) -> None:
    released = hold(log)
    created = log.create(conversation("c-1"))
    assert not created.cancel()
    released.set()
    created.result()
    assert stored(log, "c-1")[0] == conversation("c-1")


def test_pages_show_each_conversation_of_the_tenant_once_newest_first(log: TokenLog) -> None:
    times = [5.0, 1.0, 5.0, 3.0, 5.0, 2.0, 1.0]
    for n, time in enumerate(times):
        log.create(conversation(f"c-{n}", updated_at=time))
    log.create(conversation("c-foreign", tenant=Tenant("other")))

    seen, token, sizes = [], "", []
    while True:
        page = log.list_conversations(Tenant("local"), labels={}, page_size=3, page_token=token).result()
        seen += [record.id for record in page.records]
        sizes.append(len(page.records))
        token = page.next_token
        if not token:
            break
        log.create(conversation(f"c-new{len(sizes)}", updated_at=9.0))  # newer than any page to come
    assert seen == ["c-4", "c-2", "c-0", "c-3", "c-5", "c-6", "c-1"]
    assert sizes == [3, 3, 1]


def test_a_last_page_that_is_full_is_known_to_be_the_last(log: TokenLog) -> None:
    for n in range(2):
        log.create(conversation(f"c-{n}"))
    page = log.list_conversations(Tenant("local"), labels={}, page_size=2).result()
    assert (len(page.records), page.next_token) == (2, "")


def test_labels_must_all_match(log: TokenLog) -> None:
    log.create(conversation("c-1", labels={"app": "a", "x.y": "1"}))
    log.create(conversation("c-2", labels={"app": "a", "x.y": "2"}))
    log.create(conversation("c-3", labels={"a": "app"}))

    def ids(labels: dict[str, str]) -> list[str]:
        page = log.list_conversations(Tenant("local"), labels=labels, page_size=9).result()
        return sorted(record.id for record in page.records)

    assert ids({"app": "a"}) == ["c-1", "c-2"]
    assert ids({"app": "a", "x.y": "2"}) == ["c-2"]
    assert ids({"app": "b"}) == []
    assert ids({}) == ["c-1", "c-2", "c-3"]


@pytest.mark.parametrize("token", ["nonsense", "e30=", "WzFd", "bnVsbA==", "ü"])
def test_a_page_token_of_somebody_else_is_refused(log: TokenLog, token: str) -> None:
    page = log.list_conversations(Tenant("local"), labels={}, page_size=3, page_token=token)
    with pytest.raises(InvalidRequest, match="is not one that this server gave"):
        page.result()
    with pytest.raises(InvalidRequest, match="page size is 0; it must be at least 1"):
        log.list_conversations(Tenant("local"), labels={}, page_size=0).result()
