"""What turns tell of themselves through the whole engine: reasons across restarts, forks and templates, and
their states among the other events.
"""

import time
from pathlib import Path

import pytest

from engine.attachment import Attachment
from engine.types import (
    ConversationEvent,
    Delta,
    ForkRequest,
    GenerateRequest,
    Message,
    OpenRequest,
    Point,
    ResumeRequest,
    RewritePolicy,
    RunState,
    SamplingParams,
    StateChanged,
    TurnAccepted,
    TurnDone,
    TurnRequest,
    Usage,
)
from tests.engine.harness import (
    BLOCK_SIZE,
    LOCAL,
    again,
    append_turn,
    check_sums,
    fake_engine,
    ids_turn,
    regenerated,
    say,
    text_turn,
    until,
)
from tests.fakes import RETELLING_TEMPLATE

PROMPT = [*range(40)]
NUM_KEPT = 40 + 12 - 1  # of a turn with that prompt and a reply of 12 tokens: the last is not attended to yet


async def usage_of(chat: Attachment, request: TurnRequest) -> Usage:
    _, done = await say(chat, request)
    check_sums(done.usage)
    return done.usage


def reasons(usage: Usage) -> dict[str, int]:
    names = ("evicted", "restart", "rewritten", "cut", "never_computed")
    return {name: count for name in names if (count := getattr(usage, f"{name}_tokens"))}


async def all_of_turn(chat: Attachment) -> list[ConversationEvent]:
    events: list[ConversationEvent] = []
    async for event in chat.events():
        events.append(event)
        if isinstance(event, TurnDone):
            break
    return events


# -- reasons


async def test_after_a_restart_history_is_computed_again_for_that(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", PROMPT))
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        usage = await usage_of(chat, ids_turn("2", [1, 2]))
        assert (usage.recomputed_tokens, usage.new_tokens) == (NUM_KEPT, 3)
        assert reasons(usage) == {"restart": NUM_KEPT}
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        assert turns[-1].usage == usage, "the log keeps the reasons"


async def test_a_conversation_that_had_left_memory_says_so() -> None:
    engine, _, _ = fake_engine(max_conversations=1)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", PROMPT))
        chat.detach()
        await engine.open(LOCAL, OpenRequest())
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        assert reasons(await usage_of(chat, ids_turn("2", [1]))) == {"restart": NUM_KEPT}


async def test_a_fork_finds_whole_blocks_and_computes_the_rest_of_one() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", PROMPT))
        fork = await engine.fork(LOCAL, ForkRequest(chat.conversation_id))
        usage = await usage_of(await engine.resume(LOCAL, ResumeRequest(fork.id)), ids_turn("2", [1]))
        num_found = NUM_KEPT // BLOCK_SIZE * BLOCK_SIZE
        assert usage.cached_device_tokens == num_found
        assert reasons(usage) == {"restart": NUM_KEPT - num_found}


async def test_what_the_stateless_mode_gives_up_was_evicted() -> None:
    engine, _, _ = fake_engine(stateless=True)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", PROMPT))
        assert reasons(await usage_of(chat, ids_turn("2", [1]))) == {"evicted": NUM_KEPT}


@pytest.mark.parametrize("where", ["here", "after a restart", "in a fork"])
async def test_history_that_no_reply_attended_to_stays_new(where: str, tmp_path: Path) -> None:
    """Stateless: otherwise it would be computed ahead."""
    engine, _, _ = fake_engine(tmp_path, stateless=True)
    async with engine:
        history = (Message("user", "What is up?"), Message("assistant", "The sky."))
        chat = await engine.open(LOCAL, OpenRequest(history=history))
        num_given, id = chat.committed_tokens, chat.conversation_id
        if where == "in a fork":
            id = (await engine.fork(LOCAL, ForkRequest(id))).id
            chat = await engine.resume(LOCAL, ResumeRequest(id))
        if where == "after a restart":
            await engine.__aexit__()
            engine, _, _ = fake_engine(tmp_path, stateless=True)
            await engine.__aenter__()
            chat = await engine.resume(LOCAL, ResumeRequest(id))
        usage = await usage_of(chat, ids_turn("1", [1, 2, 3]))
        assert (usage.recomputed_tokens, usage.new_tokens) == (0, num_given + 3)
        assert reasons(usage) == {"never_computed": num_given}
        await say(chat, append_turn("2", [5] * 20))
        usage = await usage_of(chat, ids_turn("3", [4]))
        assert reasons(usage) == {"evicted": num_given + 3 + 11, "never_computed": 20}
        await engine.__aexit__()


async def test_a_turn_that_was_cut_short_after_it_was_computed_was_computed(tmp_path: Path) -> None:
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", PROMPT))
        await chat.rewind(Point(num_tokens=30))
    engine, _, _ = fake_engine(tmp_path)
    async with engine:
        chat = await engine.resume(LOCAL, ResumeRequest(chat.conversation_id))
        assert reasons(await usage_of(chat, ids_turn("2", [1]))) == {"restart": 30}


async def test_a_template_that_rewrites_the_past_costs_the_past_in_its_new_words() -> None:
    engine, runner, _ = fake_engine(template=RETELLING_TEMPLATE)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest(on_rewrite=RewritePolicy.STRIP))
        first = await usage_of(chat, text_turn("1", "What is up, and what is down?"))
        before = runner.num_computed
        usage = await usage_of(chat, text_turn("2", "?"))
        _, turns = await engine.get(LOCAL, chat.conversation_id)
        text = "<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"  # closes the reply first
        said = await engine.tokenize(text, True)
        assert turns[1].prompt_ids[-len(said) :] == tuple(said)
        assert usage.new_tokens == len(said)
        num_retold = len(turns[1].prompt_ids) - len(said)  # a tilde and the reply
        assert num_retold >= 13 and usage.rewritten_tokens == num_retold
        assert set(reasons(usage)) <= {"rewritten", "cut"} and usage.cut_tokens < BLOCK_SIZE
        assert runner.num_computed - before == usage.recomputed_tokens + usage.new_tokens + 11
        assert first.new_tokens == first.prompt_tokens
        _, old = await regenerated(chat, again("3", "1"))
        check_sums(old.usage)
        assert old.usage.rewritten_tokens == old.usage.new_tokens == 0, "its prompt was never rewritten"


async def test_a_template_that_is_not_followed_costs_nothing() -> None:
    engine, _, _ = fake_engine(template=RETELLING_TEMPLATE)
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, text_turn("1", "What is up?"))
        _, done = await say(chat, text_turn("2", "And down?"))
        assert done.history_rewritten and reasons(done.usage) == {}


# -- states


async def test_a_turn_says_when_it_runs_and_what_it_found() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        chat = await engine.open(LOCAL, OpenRequest())
        await say(chat, ids_turn("1", PROMPT))
        await chat.turn(ids_turn("2", [1, 2]))
        accepted, state, *rest = await all_of_turn(chat)
        assert isinstance(accepted, TurnAccepted) and isinstance(state, StateChanged)
        found = Usage(prompt_tokens=54, cached_device_tokens=NUM_KEPT, new_tokens=3)
        assert (state.seq, state.turn_id) == (accepted.seq + 1, "2")
        assert (state.state, state.found) == (RunState.RUNNING, found)
        assert not any(isinstance(event, StateChanged) for event in rest)


async def test_a_client_that_resumes_gets_the_states_of_the_turn_in_flight_in_their_place() -> None:
    """Three turns whose replies do not fit side by side: the last is suspended in the middle of its own."""
    engine, runner, manager = fake_engine(num_slots=12)
    runner.before_step = lambda plan: time.sleep(0.002)
    async with engine:
        chats = [await engine.open(LOCAL, OpenRequest()) for _ in range(3)]
        for number, chat in enumerate(chats):
            await chat.turn(ids_turn("1", [number] * 30, max_tokens=60))
        last = chats[-1]
        live = last._live
        await until(lambda: sum(isinstance(event, StateChanged) for event in live.journal) >= 2)
        load = engine.load()
        assert load.suspensions >= 1 and load.suspended_turns <= load.waiting_turns
        resumed = await engine.resume(LOCAL, ResumeRequest(last.conversation_id, after_seq=0))
        events = await all_of_turn(resumed)
        assert [event.seq for event in events] == sorted({event.seq for event in events})
        states = [event for event in events if isinstance(event, StateChanged)]
        told = [event.state for event in states]
        assert told[:3] == [RunState.RUNNING, RunState.SUSPENDED, RunState.RUNNING]
        shown = 0
        for event in events:
            if isinstance(event, Delta):
                assert event.offset == shown
                shown += len(event.token_ids)
            if isinstance(event, StateChanged) and event.found is not None:
                check_sums(event.found)
                assert event.found.completion_tokens == shown, "it is told between the tokens it lies between"
        assert shown == 60
        manager.check()
        replayed = await engine.resume(LOCAL, ResumeRequest(last.conversation_id, after_seq=0))
        assert [type(event) for event in await all_of_turn(replayed)] == [TurnAccepted, Delta, TurnDone]
        missed = await engine.resume(LOCAL, ResumeRequest(last.conversation_id, after_seq=states[-1].seq))
        assert isinstance((await all_of_turn(missed))[-1], TurnDone)


async def test_a_generation_has_no_states() -> None:
    engine, _, _ = fake_engine()
    async with engine:
        sampling = SamplingParams(max_tokens=3, ignore_eos=True)
        request = GenerateRequest(token_ids=(1, 2), sampling=sampling)
        kinds = {type(event) async for event in engine.generate(LOCAL, request)}
        assert kinds == {TurnAccepted, Delta, TurnDone}
