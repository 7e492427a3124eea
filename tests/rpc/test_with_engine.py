"""The wire over the real engine and a tiny random model: what only both together can show."""

import asyncio
from concurrent.futures import Future

import pytest

from engine import EngineConfig, load_engine
from engine.errors import DataDirError
from rpc.client import (
    Cancelled,
    ContinuoClient,
    FailedPrecondition,
    FinishReason,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
)
from tests.rpc.conftest import running
from tools.random_model import write_random_model

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random_model(folder, TINY)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    return EngineConfig(folder, dtype="float32", device_kv_tokens=1024, data_dir=tmp_path / "state")


@pytest.fixture
async def client(config):
    async with (
        load_engine(config) as engine,
        running(engine) as server,
        ContinuoClient(server.address) as client,
    ):
        yield client


async def test_a_conversation_gives_what_a_stateless_generation_over_its_history_gives(client):
    chat = await client.open(system="Be brief.")
    history: list[int] = []
    for n in range(4):
        turn = await chat.say(f"My cat number {n} is called Miso.", max_tokens=12, **GREEDY)
        prompt = (await client.get(chat.id))[1][-1].prompt_token_ids
        stateless = await client.generate(token_ids=[*history, *prompt], max_tokens=12, **GREEDY)
        assert turn.token_ids == stateless.token_ids and len(turn.token_ids) == 12
        assert turn.usage.cached_device_tokens + turn.usage.recomputed_tokens >= len(history) - 1
        history += [*prompt, *turn.token_ids]
    assert chat.committed_tokens == len(history)


async def test_a_conversation_outlives_its_server(config):
    async with load_engine(config) as engine, running(engine) as server:
        async with ContinuoClient(server.address) as client:
            chat = await client.open()
            first = await chat.say("Hello", max_tokens=8, turn_id="t-1", **GREEDY)
            id = chat.id
    async with load_engine(config) as engine, running(engine) as server:
        async with ContinuoClient(server.address) as client:
            chat = await client.resume(id, expect_committed_tokens=first.committed_tokens)
            again = await chat.say("Hello", max_tokens=8, turn_id="t-1", **GREEDY)
            assert (again.text, again.token_ids) == (first.text, first.token_ids)
            await chat.say("And now?", max_tokens=4, **GREEDY)
            assert chat.committed_turns == 2


async def test_cancel_keeps_or_discards_and_the_conversation_goes_on(client):
    chat = await client.open()
    reply = chat.say("Tell me a long story.", max_tokens=300, **GREEDY)
    async for _ in reply:
        await chat.cancel()
        break
    kept = await reply
    assert kept.finish_reason is FinishReason.CANCELLED and 0 < len(kept.token_ids) < 300
    reply = chat.say("Another one.", max_tokens=300, **GREEDY)
    async for _ in reply:
        await chat.cancel(discard=True)
        break
    with pytest.raises(Cancelled):
        await reply
    assert [turn.reply for turn in (await client.get(chat.id))[1]] == [kept.text]
    assert (await chat.say("Go on.", max_tokens=4, **GREEDY)).finish_reason is FinishReason.LENGTH


async def test_a_reader_that_gives_up_leaves_a_usable_conversation(client):
    chat = await client.open()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await chat.say("Tell me a long story.", max_tokens=400, **GREEDY)
    assert (await chat.say("Go on.", max_tokens=4, **GREEDY)).finish_reason is FinishReason.LENGTH


async def test_bad_input_is_refused_with_values_and_the_chat_lives_on(client):
    chat = await client.open()
    with pytest.raises(InvalidArgument, match="token id 320 is outside the vocabulary of 320"):
        await chat.say(token_ids=[5, 320])
    with pytest.raises(OutOfRange, match=f"turn needs 701 tokens but 512 of 512 are left in {chat.id}"):
        await chat.say(token_ids=[5] * 700)
    with pytest.raises(InvalidArgument, match="top_p is 1.5; it must be above 0 and at most 1"):
        await chat.say("x", top_p=1.5)
    with pytest.raises(FailedPrecondition, match="has 0 committed tokens, not 7"):
        await client.resume(chat.id, expect_committed_tokens=7)
    with pytest.raises(NotFound, match="there is no conversation c-404"):
        await client.resume("c-404")
    assert (await (await client.resume(chat.id)).say("Hi", max_tokens=2, **GREEDY)).committed_tokens > 2


async def test_a_slow_reader_pauses_its_own_turn_and_nobody_elses(client):
    slow, quick = await client.open(), await client.open()
    reply = slow.say("Tell me a long story.", max_tokens=400, **GREEDY)
    async for _ in reply:
        break
    assert len((await quick.say("Hi", max_tokens=50, **GREEDY)).token_ids) == 50
    assert len((await reply).token_ids) == 400


async def test_a_timeout_ends_the_reply_with_what_it_has(client):
    chat = await client.open()
    turn = await chat.say("Tell me a long story.", max_tokens=450, timeout=0.05, **GREEDY)
    assert turn.finish_reason is FinishReason.DEADLINE and len(turn.token_ids) < 450


async def test_a_disk_that_is_full_is_heard_of_in_the_turn_and_when_opening(config, monkeypatch):
    async with (
        load_engine(config) as engine,
        running(engine) as server,
        ContinuoClient(server.address, retry=False) as client,
    ):
        assert engine.model_info().device == "cpu", "that is what device auto means here"
        chat = await client.open()
        full = Future()
        full.set_exception(DataDirError("the disk of the data dir is full; make room"))
        with monkeypatch.context() as patch:
            patch.setattr(engine._log, "commit_turn", lambda *_: full)
            patch.setattr(engine._log, "create", lambda *_: full)
            with pytest.raises(Unavailable, match="the disk of the data dir is full; make room"):
                await chat.say("Hello", max_tokens=3, **GREEDY)
            with pytest.raises(Unavailable, match="the disk of the data dir is full; make room"):
                await client.open()
        turn = await (await client.resume(chat.id)).say("Hello", max_tokens=3, **GREEDY)
        assert len(turn.token_ids) == 3
