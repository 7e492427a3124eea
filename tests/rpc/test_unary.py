"""The unary calls and `Generate`."""

import asyncio

import grpc
import pytest

from engine import errors
from rpc._generated import continuo_pb2 as pb
from rpc._generated import continuo_pb2_grpc as pb_grpc
from rpc.client import (
    DeadlineExceeded,
    FinishReason,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from rpc.failure import error_of_call
from tests.rpc.conftest import running
from tests.rpc.fakes import FakeEngine


async def test_get_shows_what_was_said_and_counted(client):
    chat = await client.open(system="Be brief.", labels={"team": "a"}, temperature=0.0)
    turn = await chat.say("Hi")
    conversation, (record,) = await client.get(chat.id)
    assert (conversation.system, dict(conversation.labels)) == ("Be brief.", {"team": "a"})
    assert conversation.sampling == pb.Sampling(temperature=0.0)
    assert (conversation.num_turns, conversation.num_tokens, conversation.fingerprint) == (1, 14, "fake")
    assert (conversation.created_at, record.created_at) == (1000.0, 1000.0)
    assert [(m.role, m.content) for m in record.messages] == [("user", "Hi")]
    assert (record.turn_id, record.number, record.reply) == (turn.id, 0, "You said: Hi")
    assert tuple(record.prompt_token_ids) == (72, 105) and tuple(record.reply_token_ids) == turn.token_ids
    assert record.usage == turn.usage and record.timing == turn.timing
    assert record.finish_reason == pb.FINISH_REASON_STOP_TOKEN


async def test_get_pages_through_the_turns_in_order(client, conversations):
    chat = await client.open()
    for n in range(5):
        await chat.say(str(n))
    page = await conversations.Get(pb.GetRequest(conversation_id=chat.id, page_size=2))
    assert [turn.number for turn in page.turns] == [0, 1] and page.next_page_token
    _, turns = await client.get(chat.id, page_size=2)
    assert [turn.messages[0].content for turn in turns] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.GetRequest(), "conversation_id is empty; set it"),
        (
            pb.GetRequest(conversation_id="c-1", page_size=-1),
            "page_size is -1; it must be 0 (the server's choice) or positive",
        ),
        (
            pb.GetRequest(conversation_id="c-1", page_token="-3"),
            "page_token '-3' did not come from this server; begin again without it",
        ),
    ],
)
async def test_a_wrong_get_hears_what_is_wrong(conversations, request_, message):
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await conversations.Get(request_)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT and failure.value.details() == message


async def test_a_page_is_never_larger_than_the_server_allows(client, engine, conversations, monkeypatch):
    monkeypatch.setattr("rpc.servicer.MAX_PAGE", 2)
    for _ in range(3):
        await client.open()
    page = await conversations.List(pb.ListRequest(page_size=1_000_000))
    assert len(page.conversations) == 2 and page.next_page_token
    assert len([c async for c in client.list()]) == 3


async def test_list_filters_by_every_label(client):
    await client.open(id="both", labels={"a": "1", "b": "2"})
    await client.open(id="one", labels={"a": "1"})
    assert [c.conversation_id async for c in client.list({"a": "1"})] == ["both", "one"]
    assert [c.conversation_id async for c in client.list({"a": "1", "b": "2"})] == ["both"]
    assert [c.conversation_id async for c in client.list({"a": "2"})] == []


async def test_delete_erases_and_a_second_delete_finds_nothing(client):
    chat = await client.open()
    await client.delete(chat.id)
    with pytest.raises(NotFound, match=f"there is no conversation {chat.id}"):
        await client.delete(chat.id)
    with pytest.raises(NotFound):
        await client.get(chat.id)


async def test_generate_streams_deltas_and_ends_with_a_turn(client):
    reply = client.generate("hello", temperature=0.0)
    assert "".join([delta.text async for delta in reply]) == "hello"
    turn = await reply
    assert (turn.text, turn.token_ids) == ("hello", tuple(b"hello"))
    assert turn.finish_reason is FinishReason.STOP_TOKEN and turn.usage.completion_tokens == 5


@pytest.mark.parametrize(
    "prompt", [{"token_ids": [104, 105]}, {"messages": [{"role": "user", "content": "hi"}]}, {"prompt": "hi"}]
)
async def test_generate_takes_text_messages_or_ids(client, prompt):
    assert (await client.generate(**prompt)).text == "hi"


async def test_the_deadline_of_generate_reaches_the_engine(client, engine):
    await client.generate("hi", timeout=30.0)
    assert 29.0 < engine.seen[-1].timeout_s < 31.0  # gRPC rounds up
    await client.generate("hi")
    assert engine.seen[-1].timeout_s is None


async def test_generate_past_its_deadline_fails_and_ends_the_generation(client, engine):
    engine.hold(2)
    with pytest.raises(DeadlineExceeded):
        await client.generate("hello", timeout=0.2)
    await asyncio.wait_for(engine.generation_ended.wait(), 5)


async def test_generate_without_a_prompt_is_refused(channel):
    call = pb_grpc.EngineStub(channel).Generate(pb.GenerateRequest())
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.read()
    assert failure.value.details() == "the request has no prompt; set text, messages or token_ids"


async def test_a_full_queue_says_when_to_come_back(client, engine):
    engine.refuse = errors.QueueFull("256 turns wait already; try again in a second")
    with pytest.raises(ResourceExhausted, match="256 turns wait already") as failure:
        await client.generate("hi")
    assert (failure.value.reason, failure.value.retry_after_s) == ("QUEUE_FULL", 1.0)


async def test_tokenize_and_detokenize_are_each_others_inverse(client):
    ids = await client.tokenize("Miso")
    assert ids == (77, 105, 115, 111) and await client.detokenize(ids) == "Miso"
    with pytest.raises(InvalidArgument, match="token id -1 is outside the vocabulary of 128"):
        await client.detokenize([-1])


async def test_model_info_names_model_and_limits(client):
    info = await client.model_info()
    assert (info.name, info.vocab_size, list(info.eos_token_ids), info.has_chat_template) == (
        "fake",
        128,
        [0],
        True,
    )
    assert (info.limits.context_tokens, info.limits.max_queue, info.limits.max_message_bytes) == (
        4096,
        256,
        64 * 2**20,
    )


@pytest.mark.parametrize("method", ["Conversations/Get", "Engine/Tokenize", "Engine/Generate"])
async def test_a_malformed_unary_request_is_called_malformed(channel, method):
    call = channel.unary_stream(f"/continuo.v1.{method}", lambda data: data)(b"\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.read()
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details().startswith("the message does not follow continuo.proto")


async def test_an_oversized_unary_request_is_refused_with_both_sizes():
    async with FakeEngine() as engine, running(engine, max_message_bytes=1000) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await pb_grpc.EngineStub(channel).Tokenize(pb.TokenizeRequest(text="x" * 2000))
    assert isinstance(error_of_call(failure.value), ResourceExhausted)
    assert "larger than max (2003 vs. 1000)" in str(error_of_call(failure.value))


async def test_an_unknown_method_is_unimplemented(channel):
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await channel.unary_unary("/continuo.v1.Engine/Fly")(b"")
    assert isinstance(error_of_call(failure.value), Unimplemented)
