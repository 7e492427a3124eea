"""Append, regenerate, rewind, fork, update and open with a history, over the fake model."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from engine.attachment import Attachment
from engine.errors import (
    AlreadyExists,
    AttachmentTaken,
    Conflict,
    ContextOverflow,
    DataDirError,
    Draining,
    InvalidRequest,
    NotFound,
    TurnCancelled,
)
from engine.types import (
    ConversationId,
    Delta,
    FinishReason,
    ForkRequest,
    OpenRequest,
    Point,
    RegenerateRequest,
    ResumeRequest,
    SamplingParams,
    Standing,
    Tenant,
    TurnAccepted,
    TurnDone,
    TurnId,
    TurnRequest,
    UpdateRequest,
    Usage,
)
from tests.engine.harness import (
    BLOCK_SIZE,
    LOCAL,
    VOCAB,
    fake_engine,
    ids_turn,
    read,
    say,
    text_turn,
    until,
    until_done,
)
from tests.fakes import stateless_reply

SAMPLED = SamplingParams(max_tokens=12, ignore_eos=True)


def append(id: str, ids: list[int]) -> TurnRequest:
    return TurnRequest(TurnId(id), token_ids=tuple(ids), wants_reply=False)


def again(id: str, replaces: str | None = None, max_tokens: int = 12) -> RegenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return RegenerateRequest(TurnId(id), None if replaces is None else TurnId(replaces), sampling)


def expected(history: list[int], num_tokens: int = 12) -> list[int]:
    return stateless_reply(history, num_tokens, frozenset(), VOCAB)


async def regenerated(chat: Attachment, request: RegenerateRequest) -> tuple[list[int], TurnDone]:
    await chat.regenerate(request)
    return await until_done(chat)


# -- append


async def test_an_appended_turn_is_done_at_once_and_read_by_the_next() -> None:
    engine, runner, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(append("1", [1, 2, 3]))
        accepted, done = await read(chat, 2)
        assert isinstance(accepted, TurnAccepted) and isinstance(done, TurnDone)
        assert done.finish_reason is FinishReason.APPENDED and done.committed_tokens == 3
        assert done.usage == Usage() and done.seq == accepted.seq + 1
        ids, done = await say(chat, ids_turn("2", [4]))
        assert ids == expected([1, 2, 3, 4])


async def test_what_was_appended_is_computed_before_anybody_asks() -> None:
    engine, runner, manager = fake_engine(max_step_tokens=16)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(append("1", list(range(100))))
        await read(chat, 2)
        await until(lambda: runner.num_computed == 100)
        _, done = await say(chat, ids_turn("2", [4]))
        usage = done.usage
        assert (usage.cached_device_tokens, usage.recomputed_tokens, usage.new_tokens) == (100, 0, 1)
        manager.check()


async def test_an_append_is_replayed_when_it_is_repeated_and_survives_a_restart(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await chat.turn(append("1", [1, 2, 3]))
        told = await read(chat, 2)
        await chat.turn(append("1", [1, 2, 3]))
        assert await read(chat, 2) == told
        with pytest.raises(AlreadyExists, match="turn id 1 was used in c-.* with other content"):
            await chat.turn(ids_turn("1", [1, 2, 3]))
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id, after_seq=0))
        assert await read(chat, 2) == told
        assert (chat.committed_tokens, chat.committed_turns) == (3, 1)
        assert (await say(chat, ids_turn("2", [4])))[0] == expected([1, 2, 3, 4])


async def test_an_append_may_fill_the_context_and_no_more() -> None:
    engine, _, _ = fake_engine(num_slots=4)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await chat.turn(append("1", [1] * 48))
        (_, done) = await read(chat, 2)
        assert isinstance(done, TurnDone) and done.context_left == 0
        with pytest.raises(ContextOverflow, match="turn needs 1 tokens but 0 of 48 are left in mine"):
            await chat.turn(append("2", [1]))


# -- regenerate


@pytest.mark.parametrize("replaces", ["2", None])
async def test_regenerating_replaces_the_turn_and_all_behind_it(replaces: str | None) -> None:
    engine, _, manager = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        first, _ = await say(chat, ids_turn("1", [1, 2]))
        _, done = await say(chat, ids_turn("2", [3, 4], max_tokens=5))
        if replaces:
            await say(chat, ids_turn("3", [9]))
        history = [1, 2, *first, 3, 4]
        ids, done = await regenerated(chat, again("2b", replaces))
        assert ids == expected(history)
        assert done.committed_tokens == len(history) + 12
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        assert [turn.turn_id for turn in turns] == ["1", "2b"]
        assert turns[1].prompt_ids == (3, 4) and turns[1].first_token == 14
        ids, _ = await say(chat, ids_turn("2", [7]))  # its id is free again
        assert ids == expected([*history, *expected(history), 7])
        manager.check()
        assert len(manager._tables) == 1, "what was replaced is forgotten"


async def test_regenerating_a_long_prompt_computes_one_block_at_most() -> None:
    engine, runner, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        prompt = [n % 250 for n in range(300)]
        await say(chat, ids_turn("1", prompt, max_tokens=100))
        before = runner.num_computed
        ids, done = await regenerated(chat, again("2"))
        assert ids == expected(prompt)
        assert runner.num_computed - before <= BLOCK_SIZE + 11
        usage = done.usage
        assert usage.new_tokens == 0 and 0 < usage.recomputed_tokens <= BLOCK_SIZE
        assert usage.cached_device_tokens + usage.recomputed_tokens == usage.prompt_tokens == 300


@pytest.mark.parametrize("how", ["discarded", "not committed"])
async def test_a_regeneration_that_comes_to_nothing_leaves_the_reply_and_its_kv(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner, manager = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        first, done = await say(chat, ids_turn("1", [1, 2], max_tokens=60))
        if how == "discarded":
            await chat.regenerate(again("2", max_tokens=900))
            await read(chat, 3)
            assert engine._registry.get(chat.conversation_id).committed_tokens == 62  # type: ignore[union-attr]
            await chat.cancel(TurnId("2"), keep=False)
            with pytest.raises(TurnCancelled, match="turn 2 was cancelled and discarded"):
                await until_done(chat)
        else:
            with monkeypatch.context() as patch:
                lost = engine._log.commit_turn
                patch.setattr(
                    engine._log, "commit_turn", lambda id, *rest: lost(ConversationId("nobody"), *rest)
                )
                with pytest.raises(NotFound, match="nobody is not in the token log"):
                    await regenerated(chat, again("2"))
        manager.check()
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        assert [turn.turn_id for turn in turns] == ["1"]
        assert len(manager._tables) == 1
        before = runner.num_computed
        ids, done = await say(chat, ids_turn("3", [5]))
        assert ids == expected([1, 2, *first, 5])
        assert runner.num_computed - before <= 2 * BLOCK_SIZE + 11
        assert done.usage.new_tokens == 2, "the last token was sampled only; nothing else is new"


async def test_a_reply_that_stands_counts_as_computed_although_it_was_set_aside() -> None:
    engine, _, manager = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1, 2], max_tokens=60))
        await chat.regenerate(again("2", max_tokens=900))
        await read(chat, 3)
        await chat.cancel(TurnId("2"), keep=False)
        with pytest.raises(TurnCancelled):
            await until_done(chat)
        await until(lambda: manager.statistics().num_evictable + manager.pool.num_free == 64)
        manager.drop(chat._live.core.table)
        _, done = await say(chat, ids_turn("3", [5]))
        usage = done.usage
        assert (usage.cached_device_tokens, usage.recomputed_tokens, usage.new_tokens) == (0, 61, 2)


async def test_a_cancelled_regeneration_that_is_kept_has_replaced_the_reply() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1, 2]))
        await chat.regenerate(again("2", max_tokens=900))
        await read(chat, 4)
        await chat.cancel(TurnId("2"), keep=True)
        _, done = await until_done(chat)
        assert done.finish_reason is FinishReason.CANCELLED
        _, (turn,) = await engine.get(LOCAL, chat.conversation_id)
        assert turn.turn_id == "2"
        assert list(turn.reply_ids) == expected([1, 2], len(turn.reply_ids))


async def test_a_repeated_regeneration_is_replayed() -> None:
    engine, runner, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", [1, 2]))
        told = await regenerated(chat, again("2", "1"))
        computed = runner.num_computed
        assert await regenerated(chat, again("2", "1")) == told and runner.num_computed == computed
        with pytest.raises(AlreadyExists, match="turn id 2 was used in c-.* with other content"):
            await chat.regenerate(again("2"))


async def test_what_cannot_be_regenerated_is_said() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        with pytest.raises(InvalidRequest, match="mine has no turn yet, so there is no reply to regenerate"):
            await chat.regenerate(again("1"))
        await chat.turn(append("1", [1]))
        await read(chat, 2)
        with pytest.raises(InvalidRequest, match="turn 1 of mine was appended and has no reply to regenerat"):
            await chat.regenerate(again("2"))
        with pytest.raises(NotFound, match="turn 7 is not in mine; nothing was regenerated"):
            await chat.regenerate(again("2", "7"))


# -- rewind


async def talked(chat: Attachment, times: int = 3) -> list[int]:
    """That many turns of 10 tokens and a reply of 12; the whole history."""
    history: list[int] = []
    for number in range(times):
        prompt = [number * 10 + n for n in range(10)]
        reply, _ = await say(chat, ids_turn(str(number), prompt))
        history += [*prompt, *reply]
    return history


@pytest.mark.parametrize("place", range(0, 67, 3))
async def test_a_conversation_goes_on_from_any_token_it_is_rewound_to(place: int, tmp_path: Path) -> None:
    engine, runner, manager = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        history = (await talked(chat))[:place]
        for _ in range(2):
            standing = await chat.rewind(Point(num_tokens=place))
            assert standing == Standing(place, -(-place // 22), 63 * BLOCK_SIZE - place)
        manager.check()
        before = runner.num_computed
        ids, done = await say(chat, ids_turn("next", [7, 8]))
        assert ids == expected([*history, 7, 8])
        assert runner.num_computed - before <= BLOCK_SIZE - 1 + 2 + 11
        assert done.usage.new_tokens <= 3
        assert done.committed_tokens == place + 14
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        assert chat.committed_tokens == place + 14
        assert (await say(chat, ids_turn("more", [9])))[0] == expected([*history, 7, 8, *ids, 9])


async def test_a_reply_that_is_cut_keeps_the_text_of_what_is_left() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        history = await talked(chat, 2)
        await chat.rewind(Point(num_tokens=22 + 10 + 5))
        _, (_, turn) = await engine.get(LOCAL, chat.conversation_id)
        assert list(turn.reply_ids) == history[32:37]
        assert turn.reply_text == await engine.detokenize(turn.reply_ids, True)
        assert (turn.finish_reason, turn.matched_stop) == (FinishReason.CANCELLED, None)
        await chat.rewind(Point(num_tokens=22 + 4))
        _, (_, turn) = await engine.get(LOCAL, chat.conversation_id)
        assert (list(turn.prompt_ids), turn.reply_ids, turn.reply_text) == (history[22:26], (), "")
        assert turn.finish_reason is FinishReason.APPENDED


async def test_rewinding_by_turns_frees_their_ids() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        history = await talked(chat)
        assert (await chat.rewind(Point(num_turns=1))).committed_tokens == 22
        ids, _ = await say(chat, ids_turn("2", [5]))
        assert ids == expected([*history[:22], 5])
        assert (await chat.rewind(Point(num_turns=0))).committed_tokens == 0
        ids, _ = await say(chat, ids_turn("0", [6]))
        assert ids == expected([6])


async def test_a_text_turn_after_a_rewind_says_nothing_of_what_was_forgotten() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(system="Be brief."))
        for number, text in enumerate(("one", "two", "three")):
            await say(chat, text_turn(str(number), text))
        await chat.rewind(Point(num_turns=1))
        _, done = await say(chat, text_turn("next", "four"))
        assert not done.history_rewritten
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        assert "four" in await engine.detokenize(turns[1].prompt_ids, False)
        await chat.rewind(Point(num_turns=0))
        await say(chat, text_turn("anew", "five"))
        _, (turn,) = await engine.get(LOCAL, chat.conversation_id)
        assert (await engine.detokenize(turn.prompt_ids, False)).startswith("<|im_start|>system\nBe brief.")


async def test_what_cannot_be_rewound_is_said_with_values() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await say(chat, ids_turn("0", [1, 2, 3], max_tokens=2))
        await say(chat, text_turn("1", "hello"))
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        behind = 5 + len(turns[1].prompt_ids)
        end = behind + 12
        refusals = [
            (
                Point(num_tokens=end + 1),
                f"mine has {end} tokens; give a number from 0 to that, not {end + 1}",
            ),
            (Point(num_tokens=-1), f"mine has {end} tokens; give a number from 0 to that, not -1"),
            (Point(num_turns=3), "mine has 2 turns; give a number from 0 to that, not 3"),
            (Point(), "a point is a number of turns or of tokens; neither was given for mine"),
            (Point(1, 1), "a point is a number of turns or of tokens; both was given for mine"),
            (
                Point(num_tokens=7),
                "token 7 of mine lies inside the messages of turn number 1; "
                f"the nearest points are tokens 5 and {behind}",
            ),
        ]
        for point, text in refusals:
            for operation in (
                chat.rewind(point),
                engine.fork(LOCAL, ForkRequest(ConversationId("mine"), at=point)),
            ):
                with pytest.raises(InvalidRequest) as refused:
                    await operation
                assert str(refused.value) == text
        await chat.turn(ids_turn("2", [1], max_tokens=500))
        with pytest.raises(
            Conflict, match="turn 2 is in flight in mine; wait for its turn_done or cancel it"
        ):
            await chat.rewind(Point(num_turns=0))
        await chat.cancel(TurnId("2"), keep=False)
        assert (await chat.rewind(Point(num_turns=0))).committed_turns == 0


async def test_nothing_else_happens_to_a_conversation_while_it_is_rewound() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await talked(chat)
        rewinding = asyncio.create_task(chat.rewind(Point(num_turns=1)))
        await asyncio.sleep(0)
        for operation in (chat.turn(ids_turn("x", [1])), chat.rewind(Point(num_turns=0))):
            with pytest.raises(Conflict, match="mine is being rewound; try again when that is answered"):
                await operation
        rewinding.cancel()  # its stream is gone: what the log does, memory follows
        with pytest.raises(asyncio.CancelledError):
            await rewinding
        await until(lambda: chat._live.idle.is_set())
        assert chat._live.committed_tokens == 22
        record, turns = await engine.get(LOCAL, chat.conversation_id)
        assert (record.num_turns, record.num_tokens, len(turns)) == (1, 22, 1)


async def test_a_rewind_that_the_log_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        history = await talked(chat)

        def full(*_: object) -> None:
            raise DataDirError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr("engine.log_statements._cut", full)
            with pytest.raises(DataDirError, match="the disk is full"):
                await chat.rewind(Point(num_turns=1))
        assert (await say(chat, ids_turn("x", [1])))[0] == expected([*history, 1])


# -- fork


@pytest.mark.parametrize("place", [None, 0, 9, 16, 22, 27, 32, 33, 66])
async def test_a_fork_shares_every_full_block_and_goes_its_own_way(place: int | None, tmp_path: Path) -> None:
    engine, runner, manager = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(labels={"app": "test"}))
        whole = await talked(chat)
        history = whole[:place]
        before, free = runner.num_computed, manager.pool.num_free
        at = None if place is None else Point(num_tokens=place)
        record = await engine.fork(LOCAL, ForkRequest(chat.conversation_id, at=at))
        assert (record.parent, record.forked_at, record.num_tokens) == (
            chat.conversation_id,
            len(history),
            len(history),
        )
        assert record.labels == {"app": "test"}
        fork = await engine.resume(LOCAL, ResumeRequest(record.id, record.resume_token))
        assert (fork.committed_tokens, fork.committed_turns) == (len(history), -(-len(history) // 22))
        assert (runner.num_computed, manager.pool.num_free) == (before, free), "no KV is made or copied"
        ids, done = await say(fork, ids_turn("x", [7, 8]))
        assert ids == expected([*history, 7, 8])
        assert runner.num_computed - before <= BLOCK_SIZE - 1 + 2 + 11
        assert done.usage.recomputed_tokens <= BLOCK_SIZE - 1
        ids, _ = await say(chat, ids_turn("x", [9]))
        assert ids == expected([*whole, 9])
        manager.check()
        await engine.delete(LOCAL, chat.conversation_id)
        assert (await engine.get(LOCAL, record.id))[0].num_tokens == len(history) + 14
        more, _ = await say(fork, ids_turn("y", [3]))
        assert more == expected([*history, 7, 8, *expected([*history, 7, 8]), 3])


async def test_a_fork_with_an_id_of_ones_own_is_safe_to_repeat() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await talked(chat)
        request = ForkRequest(
            chat.conversation_id, ConversationId("other"), Point(num_turns=2), labels={"a": "b"}
        )
        first = await engine.fork(LOCAL, request)
        assert first.labels == {"a": "b"}
        assert await engine.fork(LOCAL, request) == first
        for changed in (replace(request, at=None), replace(request, new_id=ConversationId("mine"))):
            with pytest.raises(AlreadyExists, match="conversation id .* is taken; choose another or none"):
                await engine.fork(LOCAL, changed)
        with pytest.raises(InvalidRequest, match="conversation id '' has 0 characters; use 1 to 128 print"):
            await engine.fork(LOCAL, replace(request, new_id=ConversationId("")))
        for tenant, id in ((Tenant("stranger"), "mine"), (LOCAL, "nobody")):
            with pytest.raises(
                NotFound, match=f"there is no conversation {id}; open a new one or list yours"
            ):
                await engine.fork(tenant, ForkRequest(ConversationId(id)))
        await engine.drain(0)
        with pytest.raises(Draining):
            await engine.fork(LOCAL, request)


async def test_a_fork_is_of_what_is_committed_while_a_turn_is_in_flight() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        history = await talked(chat)
        await chat.regenerate(again("x", "1", max_tokens=900))
        await read(chat, 3)
        record = await engine.fork(LOCAL, ForkRequest(chat.conversation_id))
        await chat.cancel(TurnId("x"), keep=True)
        fork = await engine.resume(LOCAL, ResumeRequest(record.id))
        assert (await say(fork, ids_turn("x", [1])))[0] == expected([*history, 1])


async def test_numbers_of_events_go_on_behind_those_of_the_turns_a_fork_began_with() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        first, told = await say(chat, ids_turn("0", [1, 2]))
        record = await engine.fork(LOCAL, ForkRequest(chat.conversation_id))
        fork = await engine.resume(LOCAL, ResumeRequest(record.id, after_seq=0))
        assert await until_done(fork) == (first, told)
        _, done = await say(fork, ids_turn("1", [3]))
        assert done.seq > told.seq


# -- update


async def test_updated_defaults_and_labels_hold_from_the_next_turn_on(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(sampling=SAMPLED, labels={"a": "1"}))
        turn = TurnRequest(TurnId("1"), token_ids=(1,))
        assert len((await say(chat, turn))[0]) == 12
        await chat.update(UpdateRequest(sampling=SamplingParams(max_tokens=3, ignore_eos=True)))
        assert len((await say(chat, replace(turn, turn_id=TurnId("2"))))[0]) == 3
        await chat.update(UpdateRequest(labels={"b": "2"}))
        assert len((await say(chat, replace(turn, turn_id=TurnId("3"))))[0]) == 3
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        records, _ = await engine.list(LOCAL, {"b": "2"}, 10, None)
        assert [record.labels for record in records] == [{"b": "2"}]
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        assert len((await say(chat, replace(turn, turn_id=TurnId("4"))))[0]) == 3
        await engine.delete(LOCAL, chat.conversation_id)
        with pytest.raises(NotFound):
            await chat._operations.update(chat._live, UpdateRequest(labels={}))


# -- all of them


async def test_operations_need_the_attachment_to_be_held() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        old = await engine.open(LOCAL, OpenRequest(ConversationId("mine")))
        await engine.resume(LOCAL, ResumeRequest(ConversationId("mine")))
        for operation in (
            old.regenerate(again("1")),
            old.rewind(Point(num_turns=0)),
            old.update(UpdateRequest(labels={})),
        ):
            with pytest.raises(
                AttachmentTaken, match="another stream has attached to mine; resume it to take"
            ):
                await operation


async def test_a_regeneration_in_flight_survives_a_change_of_streams() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("0", [1, 2]))
        await chat.regenerate(again("1", max_tokens=60))
        seen = await read(chat, 3)
        chat.detach()
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id, after_seq=seen[-1].seq))
        first = [id for event in seen if isinstance(event, Delta) for id in event.token_ids]
        await chat.regenerate(again("1", max_tokens=60))
        assert (await until_done(chat, first))[0] == expected([1, 2], 60)
