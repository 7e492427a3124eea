"""The wire over the real engine and a tiny random model: what only both together can show."""

import asyncio
import json
import shutil
from concurrent.futures import Future
from dataclasses import replace

import pytest

from engine import EngineConfig, load_engine
from engine.errors import DataDirError
from rpc._generated import continuo_pb2 as pb
from rpc.client import (
    AlreadyExists,
    Cancelled,
    ContinuoClient,
    FailedPrecondition,
    FinishReason,
    InvalidArgument,
    NotFound,
    OutOfRange,
    RunState,
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
            states = []
            turn = await chat.say("And now?", max_tokens=4, on_state=states.append, **GREEDY)
            assert chat.committed_turns == 2
            assert turn.usage.restart_tokens == turn.usage.recomputed_tokens == first.committed_tokens - 1
            timing = turn.timing
            assert timing.recompute_s > 0 < timing.prefill_s and timing.reload_s == 0
            assert timing.queue_s + timing.recompute_s + timing.prefill_s <= timing.ttft_s
            (state,) = states
            assert state.state is RunState.RUNNING
            state.found.completion_tokens = turn.usage.completion_tokens
            assert state.found == turn.usage


async def test_what_is_brought_back_from_the_host_is_told_with_its_time(config):
    two_tiers = replace(config, device_kv_tokens=512, host_kv_tokens=1024)
    async with load_engine(two_tiers) as engine, running(engine) as server:
        async with ContinuoClient(server.address) as client:
            chats = [await client.open() for _ in range(3)]
            for chat in chats:
                await chat.say(token_ids=[chats.index(chat) + 1] * 240, max_tokens=4, **GREEDY)
            turn = await chats[0].say("And now?", max_tokens=4, **GREEDY)
            load = await client.load()
    usage, timing = turn.usage, turn.timing
    assert usage.cached_host_tokens + usage.recomputed_tokens > 100
    assert (timing.reload_s > 0) is (usage.cached_host_tokens > 0)
    assert (timing.recompute_s > 0) is (usage.recomputed_tokens > 0)
    assert (load.reload_s, load.recompute_s) == (timing.reload_s, timing.recompute_s)


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


async def said(client, *texts, **fields):
    """A chat in which `texts` were said, as turns t-1, t-2, ..."""
    chat = await client.open("Be brief.", **fields)
    for n, text in enumerate(texts, 1):
        await chat.say(text, turn_id=f"t-{n}", max_tokens=8, **GREEDY)
    return chat


async def history_of(client, chat):
    """The tokens of a conversation, and its turns."""
    turns = (await client.get(chat.id))[1]
    tokens: list[int] = []
    for turn in turns:
        del tokens[turn.first_token :]
        tokens += [*turn.prompt_token_ids, *turn.reply_token_ids]
    assert len(tokens) == chat.committed_tokens and len(turns) == chat.committed_turns
    return tokens, turns


async def assert_goes_on_as_if_it_had_always_been_so(client, chat):
    """The next reply is the one that a stateless generation over the history gives."""
    before, _ = await history_of(client, chat)
    turn = await chat.say("And now?", max_tokens=8, **GREEDY)
    _, turns = await history_of(client, chat)
    prompt = [*before, *turns[-1].prompt_token_ids]
    stateless = await client.generate(token_ids=prompt, max_tokens=8, **GREEDY)
    assert turn.token_ids == stateless.token_ids


async def test_an_append_joins_the_history_without_a_reply(client):
    chat = await said(client, "My cat is called Miso.")
    turn = await chat.append("Miso is five years old.", turn_id="a-1")
    assert (turn.finish_reason, turn.text, turn.token_ids) == (FinishReason.APPENDED, "", ())
    assert await chat.append("Miso is five years old.", turn_id="a-1") == turn
    with pytest.raises(AlreadyExists, match="turn id a-1 was used"):
        await chat.append("other", turn_id="a-1")
    await assert_goes_on_as_if_it_had_always_been_so(client, chat)


@pytest.mark.parametrize("replaces", [None, "t-2"])
async def test_regenerate_says_the_same_again_and_answers_anew(client, replaces):
    chat = await said(client, "one", "two", "three")
    _, before = await history_of(client, chat)
    turn = await chat.regenerate(replaces=replaces, turn_id="r", temperature=1.0, seed=5, max_tokens=8)
    _, after = await history_of(client, chat)
    replaced = before[-1] if replaces is None else before[1]
    assert [t.turn_id for t in after] == [*(t.turn_id for t in before[: replaced.number]), "r"]
    assert list(after[-1].prompt_token_ids) == list(replaced.prompt_token_ids)
    assert list(after[-1].messages) == list(replaced.messages) and after[-1].reply == turn.text
    again = await chat.regenerate(replaces=replaces, turn_id="r", temperature=1.0, seed=5, max_tokens=8)
    assert again.token_ids == turn.token_ids and again.committed_tokens == chat.committed_tokens
    await assert_goes_on_as_if_it_had_always_been_so(client, chat)


async def test_rewind_cuts_behind_a_turn_or_inside_a_reply_but_in_no_message(client):
    chat = await said(client, "one", "two", "three")
    await chat.rewind(turns=2)
    _, turns = await history_of(client, chat)
    assert [turn.turn_id for turn in turns] == ["t-1", "t-2"]
    await chat.rewind(tokens=chat.committed_tokens - 3)
    _, turns = await history_of(client, chat)
    assert len(turns[-1].reply_token_ids) == 5 and turns[-1].finish_reason == pb.FINISH_REASON_CANCELLED
    with pytest.raises(InvalidArgument, match="inside") as refused:
        await chat.rewind(tokens=turns[-1].first_token + 1)
    assert str(turns[-1].first_token) in str(refused.value)
    with pytest.raises(InvalidArgument, match="has 2 turns; give a number from 0 to that, not 3"):
        await chat.rewind(turns=3)
    await assert_goes_on_as_if_it_had_always_been_so(client, chat)


async def test_a_fork_shares_the_past_and_nothing_else(client):
    chat = await said(client, "one", "two", labels={"side": "a"})
    fork = await chat.fork(turns=1, labels={"side": "b"})
    _, mine = await history_of(client, chat)
    _, forked = await history_of(client, fork)
    assert forked == mine[:1]
    conversation, _ = await client.get(fork.id)
    assert (conversation.parent_id, conversation.forked_at) == (chat.id, fork.committed_tokens)
    assert (dict(conversation.labels), conversation.system) == ({"side": "b"}, "Be brief.")
    await assert_goes_on_as_if_it_had_always_been_so(client, fork)
    await assert_goes_on_as_if_it_had_always_been_so(client, chat)
    again = await client.fork(chat.id, new_id=fork.id, turns=1)
    assert again.conversation_id == fork.id
    with pytest.raises(AlreadyExists, match=fork.id):
        await client.fork(chat.id, new_id=fork.id)


async def test_update_holds_from_the_next_turn_on_and_after_a_restart(config):
    async with load_engine(config) as engine, running(engine) as server:
        async with ContinuoClient(server.address) as client:
            chat = await client.open(max_tokens=5, **GREEDY)
            assert len((await chat.say("one")).token_ids) == 5
            await chat.update(labels={"a": "1"}, max_tokens=3)
            assert len((await chat.say("two")).token_ids) == 3
    async with load_engine(config) as engine, running(engine) as server:
        async with ContinuoClient(server.address) as client:
            assert len((await (await client.resume(chat.id)).say("three")).token_ids) == 3
            assert dict((await client.get(chat.id))[0].labels) == {"a": "1"}


async def test_a_history_from_elsewhere_is_turn_0(client):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    chat = await client.open("Be brief.", history=history)
    _, (turn,) = await history_of(client, chat)
    assert (turn.turn_id, turn.finish_reason, turn.reply) == ("history", pb.FINISH_REASON_APPENDED, "")
    assert [(m.role, m.content) for m in turn.messages] == [("user", "Hi"), ("assistant", "Hello.")]
    await assert_goes_on_as_if_it_had_always_been_so(client, chat)


@pytest.mark.parametrize("strip", [False, True])
async def test_a_rewritten_past_is_told_and_kept_or_stripped(folder, config, tmp_path, strip):
    """The template writes a dash before what the assistant said, but not while that is the last message."""
    dashing = shutil.copytree(folder, tmp_path / "dashing")
    settings = json.loads((dashing / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ '' if m.role != 'assistant' or loop.last else '-' }}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (dashing / "tokenizer_config.json").write_text(json.dumps(settings))
    async with (
        load_engine(replace(config, model=dashing)) as engine,
        running(engine) as server,
        ContinuoClient(server.address) as client,
    ):
        chat = await client.open(strip_rewritten=strip)
        first = await chat.say("one", max_tokens=8, **GREEDY)
        second = await chat.say("two", max_tokens=8, **GREEDY)
        assert first.rewritten_from is None and not first.history_rewritten
        assert second.rewritten_from is not None and second.rewritten_from < first.committed_tokens
        tokens, _ = await history_of(client, chat)
        text = await client.detokenize(tokens)
        kept = f"-{first.text}" if strip else first.text
        assert text == f"<user>one\n<assistant>{kept}\n<user>two\n<assistant>{second.text}"
        stateless = await client.generate(token_ids=tokens[:-8], max_tokens=8, **GREEDY)
        assert second.token_ids == stateless.token_ids


async def test_logprobs_are_told_for_every_token_and_fit_a_greedy_reply(client):
    chat = await client.open()
    turn = await chat.say("Hi", logprobs=2, max_tokens=6, **GREEDY)
    assert [each.token_id for each in turn.logprobs] == list(turn.token_ids)
    for each in turn.logprobs:
        assert each.top[0].token_id == each.token_id and each.top[0].logprob == each.logprob <= 0
        assert len(each.top) == 2 and each.top[1].logprob <= each.top[0].logprob
    assert (await chat.say("Hi", max_tokens=6, **GREEDY)).logprobs == ()


async def test_operations_that_cannot_be_are_refused_with_values_and_the_chat_lives_on(client):
    chat = await client.open()
    with pytest.raises(InvalidArgument, match=f"{chat.id} has no turn yet, so there is no reply to regen"):
        await chat.regenerate()
    with pytest.raises(InvalidArgument, match="token id 320 is outside the vocabulary of 320"):
        await chat.append(token_ids=[320])
    await chat.append(token_ids=[5, 6], turn_id="a-1")
    with pytest.raises(InvalidArgument, match=f"turn a-1 of {chat.id} was appended and has no reply"):
        await chat.regenerate()
    with pytest.raises(NotFound, match=f"turn t-9 is not in {chat.id}; nothing was regenerated"):
        await chat.regenerate(replaces="t-9")
    with pytest.raises(InvalidArgument, match=f"{chat.id} has 2 tokens; give a number from 0 to that, not 5"):
        await chat.rewind(tokens=5)
    with pytest.raises(NotFound, match="there is no conversation c-404"):
        await client.fork("c-404")
    with pytest.raises(InvalidArgument, match="tool_calls"):
        await chat.append(messages=[{"role": "assistant", "content": "", "tool_calls": ["no object"]}])
    assert (await chat.say("Hi", max_tokens=2, **GREEDY)).finish_reason is FinishReason.LENGTH
