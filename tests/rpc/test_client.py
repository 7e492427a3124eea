"""The Python client: what people do with it."""

import asyncio
import subprocess
import sys

import pytest

from engine import errors
from engine.types import Message, SamplingParams
from rpc.client import (
    Aborted,
    Cancelled,
    ContinuoClient,
    FailedPrecondition,
    FinishReason,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
)
from tests.rpc.conftest import eventually


async def test_the_example_of_the_readme_runs(server, capsys):
    async with ContinuoClient(server.address) as client:
        chat = await client.open(system="Be brief.")
        async for delta in chat.say("My cat is called Miso."):
            print(delta.text, end="", flush=True)
        turn = await chat.say("What is my cat called?")
        print(turn.text, turn.usage.cached_device_tokens)
        chat = await client.resume(chat.id)
        assert chat.committed_turns == 2
    shown = capsys.readouterr().out
    assert shown == "You said: My cat is called Miso.You said: What is my cat called? 54\n"


def test_the_client_imports_neither_torch_nor_the_engine():
    code = "import sys, rpc.client; print(sorted({'torch', 'engine', 'google.rpc'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


async def test_a_turn_tells_all_about_itself(client):
    chat = await client.open()
    turn = await chat.say("Hi", turn_id="mine")
    assert (turn.id, turn.text, turn.token_ids) == ("mine", "You said: Hi", tuple(b"You said: Hi"))
    assert (turn.finish_reason, turn.matched_stop) == (FinishReason.STOP_TOKEN, None)
    assert (turn.context_left, turn.committed_tokens, turn.history_rewritten) == (4082, 14, False)
    assert (turn.usage.prompt_tokens, turn.timing.ttft_s) == (2, pytest.approx(0.002))
    assert (chat.committed_tokens, chat.committed_turns, chat.context_left) == (14, 1, 4082)


async def test_the_deltas_add_up_to_the_turn(client):
    chat = await client.open()
    reply = chat.say("Hi")
    deltas = [delta async for delta in reply]
    turn = await reply
    assert "".join(delta.text for delta in deltas) == turn.text
    assert sum((delta.token_ids for delta in deltas), ()) == turn.token_ids
    assert not any(delta.restarted for delta in deltas)


async def test_text_messages_and_ids_reach_the_engine_with_sampling(client, engine):
    chat = await client.open(temperature=0.5)
    await chat.say("Hi", temperature=0.0, stop=["\n"], timeout=9.5)
    asked = engine.seen[-1]
    assert asked.messages == (Message("user", "Hi"),) and asked.timeout_s == 9.5
    assert asked.sampling == SamplingParams(temperature=0.0, stop=("\n",))
    await chat.say(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    assert engine.seen[-1].messages == (Message("system", "s"), Message("user", "u"))
    await chat.say(token_ids=[72, 105])
    assert engine.seen[-1].token_ids == (72, 105) and engine.seen[-1].timeout_s is None
    assert engine.seen[0].sampling == SamplingParams(temperature=0.5)


@pytest.mark.parametrize(
    ("said", "got"),
    [({}, "none"), ({"text": "a", "token_ids": [1]}, "text and token_ids")],
)
async def test_a_turn_says_exactly_one_thing(client, said, got):
    chat = await client.open()
    with pytest.raises(InvalidArgument, match=f"give one of text, messages, token_ids; got {got}"):
        chat.say(**said)


async def test_an_event_that_is_too_large_to_send_is_refused_here(client):
    chat = await client.open()
    with pytest.raises(ResourceExhausted, match="the event has 68000017 bytes; at most 67108864 can be sent"):
        await chat.say("x" * 68_000_000, turn_id="t")
    assert (await chat.say("Hi")).text == "You said: Hi"


async def test_nothing_is_sent_before_the_reply_is_read(client, engine):
    chat = await client.open()
    chat.say("never read")
    assert (await chat.say("read")).text == "You said: read"
    assert len(engine.seen) == 2


async def test_cancel_keeps_what_was_said_and_the_chat_goes_on(client, engine):
    chat = await client.open()
    engine.hold(3)
    reply = chat.say("Hi")
    reading = asyncio.ensure_future(reply)
    await engine.holding.wait()
    await chat.cancel()
    turn = await reading
    assert (turn.text, turn.finish_reason) == ("You", FinishReason.CANCELLED)
    engine.release()
    assert (await chat.say("next")).text == "You said: next"
    assert chat.committed_turns == 2


async def test_a_discarded_turn_raises_cancelled_and_leaves_no_trace(client, engine):
    chat = await client.open()
    engine.hold(3)
    reading = asyncio.ensure_future(chat.say("Hi"))
    await engine.holding.wait()
    await chat.cancel(discard=True)
    with pytest.raises(Cancelled, match="was cancelled and discarded"):
        await reading
    engine.release()
    await chat.say("next")
    assert [turn.messages[0].content for turn in (await client.get(chat.id))[1]] == ["next"]


async def test_cancelling_when_nothing_is_in_flight_is_told(client):
    chat = await client.open()
    await chat.say("Hi")
    with pytest.raises(
        FailedPrecondition, match="no turn is in flight in this chat; there is nothing to cancel"
    ):
        await chat.cancel()


async def test_a_second_turn_meanwhile_is_refused_here_and_the_first_goes_on(client, engine):
    chat = await client.open()
    engine.hold(3)
    first = chat.say("one", turn_id="t-one")
    reading = asyncio.ensure_future(first)
    await engine.holding.wait()
    with pytest.raises(
        FailedPrecondition, match="turn t-one is still being answered; read its reply to the end"
    ):
        await chat.say("two")
    engine.release()
    assert (await reading).text == "You said: one"
    assert (await chat.say("two")).text == "You said: two"


async def test_a_reply_left_early_can_be_read_on(client):
    chat = await client.open()
    reply = chat.say("Hi")
    shown = ""
    async for delta in reply:
        shown += delta.text
        break
    async for delta in reply:
        shown += delta.text
    assert shown == (await reply).text == "You said: Hi"


async def test_a_reply_left_and_forgotten_is_cancelled_and_the_chat_goes_on(client, engine):
    chat = await client.open()
    engine.hold(3)
    async for _ in chat.say("one"):
        break
    await engine.holding.wait()
    engine.let_others_pass()
    assert (await chat.say("two")).text == "You said: two"
    one, two = (await client.get(chat.id))[1]
    assert (one.reply, two.reply) == ("You", "You said: two")


async def test_a_reader_that_times_out_cancels_its_turn_and_the_chat_goes_on(client, engine):
    chat = await client.open()
    engine.hold(3)
    engine.detach_grace_s = 60.0  # so that it is the client who cancels, when it is back
    reply = chat.say("one")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await reply
    with pytest.raises(Cancelled, match="reading this reply was cancelled"):
        await reply
    engine.let_others_pass()
    assert (await chat.say("two")).text == "You said: two"
    assert [turn.reply for turn in (await client.get(chat.id))[1]] == ["You", "You said: two"]


async def test_a_reader_that_times_out_before_the_turn_was_accepted_leaves_the_chat_usable(client, engine):
    chat = await client.open()
    engine.blocked = "turn"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await chat.say("one")
    engine.blocked = ""
    assert (await chat.say("two")).text == "You said: two"


async def test_two_tasks_may_wait_for_one_reply(client):
    chat = await client.open()
    reply = chat.say("Hi")

    async def wait():
        return await reply

    first, second = await asyncio.gather(wait(), wait())
    assert first is second


async def test_a_refused_turn_fails_the_same_way_however_often_it_is_asked(client, engine):
    chat = await client.open()
    engine.refuse = errors.QueueFull("256 turns wait already; try again in a second")
    reply = chat.say("Hi")
    for _ in range(2):
        with pytest.raises(ResourceExhausted, match="256 turns wait already") as refused:
            await reply
    assert (refused.value.reason, refused.value.retry_after_s) == ("QUEUE_FULL", 1.0)
    engine.refuse = None
    assert (await chat.say("Hi")).text == "You said: Hi"


async def test_a_turn_that_fails_raises_and_the_chat_goes_on(client, engine):
    chat = await client.open()
    engine.fail_with = errors.ContextOverflow("turn needs 812 tokens but 396 of 4096 are left in c-1")
    with pytest.raises(OutOfRange, match="turn needs 812 tokens but 396 of 4096 are left in c-1"):
        await chat.say("Hi")
    engine.fail_with = None
    assert (await chat.say("Hi")).text == "You said: Hi"


async def test_whoever_lost_the_conversation_to_another_hears_it_and_does_not_take_it_back(client, engine):
    chat = await client.open()
    taker = await client.resume(chat.id)
    with pytest.raises(Aborted, match="another stream has attached"):
        await chat.say("still mine?")
    assert (await taker.say("mine")).text == "You said: mine"


async def test_the_same_turn_id_from_another_chat_gives_the_same_turn(client, engine):
    chat = await client.open()
    first = await chat.say("Hi", turn_id="t")
    chat = await client.resume(chat.id)
    assert (await chat.say("Hi", turn_id="t")) == first


async def test_close_keeps_the_conversation_and_close_with_delete_erases_it(client, engine):
    chat = await client.open()
    await chat.say("Hi")
    await chat.close()
    chat = await client.resume(chat.id)
    assert chat.committed_turns == 1
    await chat.close(delete=True)
    with pytest.raises(NotFound):
        await client.resume(chat.id)


async def test_close_waits_for_the_turn_in_flight_and_its_reader(client, engine):
    chat = await client.open()
    engine.hold(3)
    reading = asyncio.ensure_future(chat.say("Hi"))
    await engine.holding.wait()
    closing = asyncio.ensure_future(chat.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    engine.release()
    assert (await reading).text == "You said: Hi"
    await closing
    assert len((await client.get(chat.id))[1]) == 1


async def test_close_with_delete_ends_the_turn_in_flight(client, engine):
    chat = await client.open()
    engine.hold(3)
    reading = asyncio.ensure_future(chat.say("Hi"))
    await engine.holding.wait()
    await chat.close(delete=True)
    with pytest.raises(Cancelled):
        await reading
    assert not engine.conversations


async def test_close_with_delete_ends_a_turn_that_nobody_reads(client, engine):
    chat = await client.open()
    engine.hold(3)
    async for _ in chat.say("Hi"):
        break
    await chat.close(delete=True)
    assert not engine.conversations


async def test_resume_may_demand_a_token_and_a_length(client):
    chat = await client.open()
    await chat.say("Hi")
    again = await client.resume(chat.id, resume_token=chat.resume_token, expect_committed_tokens=14)
    assert again.resume_token == chat.resume_token
    with pytest.raises(FailedPrecondition, match="holds 14 tokens, not 9 as expected"):
        await client.resume(chat.id, expect_committed_tokens=9)


async def test_closing_the_client_ends_a_read_with_cancelled(server, engine):
    client = ContinuoClient(server.address)
    chat = await client.open()
    engine.hold(3)
    reading = asyncio.ensure_future(chat.say("Hi"))
    await engine.holding.wait()
    await client.close()
    with pytest.raises(Cancelled, match="the client was closed while this was going on"):
        await reading
    await eventually(engine.detached.is_set)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tempreature": 1.0}, "tempreature is no sampling parameter; there are temperature, top_k"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 10**12}, "top_k is 1000000000000"),
        ({"stop": [1]}, r"stop is \[1\]"),
    ],
)
async def test_sampling_that_cannot_be_is_refused_by_its_name(client, given, told):
    chat = await client.open()
    with pytest.raises(InvalidArgument, match=told):
        await chat.say("Hi", **given)
    assert (await chat.say("Hi")).text == "You said: Hi"
