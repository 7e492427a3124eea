"""What `continuo bench` says and when: workloads from seeds and files, and populations."""

import gzip
import json
import random
from collections import Counter

import pytest

from tools.bench import files
from tools.bench.files import FileError
from tools.bench.population import Population, resident_tokens, think_factor
from tools.bench.workload import (
    CHATS,
    Exchange,
    Script,
    agent_pool,
    chat_pool,
    mean_life_s,
    mean_think_s,
    mean_turns,
    token_ids,
)


def exchanges(pool):
    return [exchange for script in pool for exchange in script.exchanges]


def mean(values):
    return sum(values) / len(values)


def a_script(*think_s: float, new: int = 10, reply: int = 20) -> Script:
    return Script((Exchange(new, reply), *(Exchange(new, reply, each) for each in think_s)))


# -- from seeds


@pytest.mark.parametrize("name", ["sharegpt", "ultrachat"])
def test_a_chat_pool_has_the_means_of_its_data_set(name) -> None:
    pool, told = chat_pool(CHATS[name], 0, 1.0, 60.0), CHATS[name]
    assert mean_turns(pool) == pytest.approx(told.turns, rel=0.08)
    assert mean([each.new_tokens for each in exchanges(pool)]) == pytest.approx(told.new_tokens, rel=0.08)
    assert mean([each.reply_tokens for each in exchanges(pool)]) == pytest.approx(told.reply_tokens, rel=0.08)
    assert mean_think_s(pool) == pytest.approx(60.0, rel=0.08)
    assert all(script.exchanges[0].think_s == 0 for script in pool)


def test_an_agent_pool_has_the_shape_of_what_was_published() -> None:
    pool = agent_pool(0, 1.0)
    prompts = [
        script.tokens_before(turn) + exchange.new_tokens
        for script in pool
        for turn, exchange in enumerate(script.exchanges)
    ]
    pauses = sorted(each.think_s for script in pool for each in script.exchanges[1:])
    assert sorted(len(script.exchanges) for script in pool)[len(pool) // 2] == pytest.approx(33, rel=0.1)
    assert mean([script.exchanges[0].new_tokens for script in pool]) == pytest.approx(12_000, rel=0.1)
    assert sorted(script.tokens_before(99_999) for script in pool)[len(pool) // 2] == pytest.approx(
        80_000, rel=0.1
    )
    assert sum(prompts) / sum(each.reply_tokens for each in exchanges(pool)) == pytest.approx(131, rel=0.1)
    assert pauses[len(pauses) // 2] == pytest.approx(5.2, rel=0.1)
    assert pauses[len(pauses) * 99 // 100] == pytest.approx(81.4, rel=0.1)


def test_the_same_seed_says_the_same_and_another_does_not() -> None:
    assert chat_pool(CHATS["sharegpt"], 7, 1.0, 60.0) == chat_pool(CHATS["sharegpt"], 7, 1.0, 60.0)
    assert chat_pool(CHATS["sharegpt"], 7, 1.0, 60.0) != chat_pool(CHATS["sharegpt"], 8, 1.0, 60.0)
    assert agent_pool(7, 1.0) == agent_pool(7, 1.0)
    assert token_ids(7, 1, 2, 50, 1000) == token_ids(7, 1, 2, 50, 1000)
    assert len({tuple(token_ids(7, *which, 50, 1000)) for which in ((1, 2), (2, 1), (1, 3))}) == 3
    assert set(token_ids(0, 0, 0, 500, 20)) == set(range(10, 20))


def test_scaling_divides_all_lengths_and_leaves_at_least_a_token() -> None:
    whole, half, tiny = (chat_pool(CHATS["sharegpt"], 0, scale, 60.0) for scale in (1.0, 0.5, 0.0001))
    for before, after in zip(exchanges(whole), exchanges(half), strict=True):
        assert abs(before.reply_tokens / 2 - after.reply_tokens) <= 1
    assert {each.new_tokens for each in exchanges(tiny)} == {1}


def test_a_script_ends_before_the_turn_that_would_not_fit() -> None:
    script = a_script(1.0, 1.0)  # three turns of 30 tokens
    assert script.within(90) == script
    assert len(script.within(89).exchanges) == 2
    assert script.within(29).exchanges == ()


# -- from files


@pytest.fixture
def lines(tmp_path):
    """Writes objects, or lines as they are, to a file."""

    def write(*content, packed=False):
        path = tmp_path / "workload.jsonl"
        text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in content)
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        return path

    return write


def request(at_ms, prompt, reply, *ids):
    return {"timestamp": at_ms, "input_length": prompt, "output_length": reply, "hash_ids": list(ids)}


@pytest.mark.parametrize("packed", [False, True])
def test_requests_of_a_trace_that_continue_one_another_are_a_conversation(lines, packed) -> None:
    path = lines(
        request(0, 1100, 100, 0, 1, 2),  # two full blocks: 0 and 1
        request(1000, 600, 50, 0, 9),  # shares only the first block with it, and has only that one
        request(4000, 1300, 10, 0, 1, 3),
        packed=packed,
    )
    (first_s, first), (second_s, second) = files.trace(path, 1.0, 2.0)
    assert (first_s, second_s) == (0.0, 2.0)
    assert first.exchanges == (Exchange(1100, 100, at_s=0.0), Exchange(100, 10, at_s=8.0))
    assert second.exchanges == (Exchange(600, 50, at_s=0.0),)
    assert first.shared_tokens == 512
    (_, scaled), _ = files.trace(path, 0.1, 1.0)
    assert [each.new_tokens for each in scaled.exchanges] == [110, 10] and scaled.shared_tokens == 51


def test_a_coding_session_starts_anew_where_its_prompt_shrinks_and_helpers_are_apart(lines) -> None:
    def said(prompt, reply, **more):
        return {"type": "n", "in": prompt, "out": reply, **more}

    helper = {"type": "subagent", "requests": [said(70, 7)]}
    session = [said(1000, 10), said(1500, 20, think_time=4.0), helper, said(400, 5, think_time=9.0)]
    pool = files.trace(lines({"requests": session}), 1.0, 0.5)
    assert [script.exchanges for script in pool] == [
        (Exchange(70, 7),),
        (Exchange(1000, 10), Exchange(490, 20, 2.0)),
        (Exchange(400, 5),),
    ]


def test_dialogues_are_said_in_words(lines) -> None:
    words = ["Hello.", "Hi!", "Bye.", "See you.", "Wait"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words)]
    (script,) = files.dialogues(lines({"messages": messages}), seed=0, think_s=60.0)
    assert [(each.text, each.reply_text) for each in script.exchanges] == [
        ("Hello.", "Hi!"),
        ("Bye.", "See you."),
    ]
    assert script.exchanges[0].think_s == 0 < script.exchanges[1].think_s


MESSAGES = {"messages": [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Ho"}]}


@pytest.mark.parametrize(
    ("read", "content", "complaint"),
    [
        ("trace", ['{"timestamp": 0,'], "line 1: Expecting property name"),
        ("trace", [request(0, 5, 5, 1), [1]], "line 2: is no JSON object"),
        ("trace", [request(0, 5, 5, 1), {"timestamp": 1}], "line 2: has no 'input_length'"),
        ("trace", [request(0, -5, 5, 1)], "line 1: input_length is -5; it should be a number of at least 0"),
        ("trace", [request(0, "long", 5, 1)], "line 1: input_length is 'long'"),
        (
            "trace",
            [{"user": 1}],
            "line 1: an object with user is of no trace known here; a Mooncake trace has",
        ),
        ("trace", [{"requests": [{"type": "n", "in": 5}]}], "line 1: has no 'out'"),
        ("trace", [], "is empty"),
        ("dialogues", [MESSAGES], "line 1: user and assistant do not take turns, or there is no reply"),
        ("dialogues", [{"turns": ["Hi"]}], "line 1: has no 'messages'"),
    ],
)
def test_a_line_that_is_wrong_is_named(lines, read, content, complaint) -> None:
    path = lines(*content)
    with pytest.raises(FileError) as refused:
        files.trace(path, 1.0, 1.0) if read == "trace" else files.dialogues(path, 0, 60.0)
    assert str(refused.value).startswith(str(path)) and complaint in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(FileError, match="none.jsonl cannot be read: .*No such file"):
        files.trace(tmp_path / "none.jsonl", 1.0, 1.0)


def test_the_real_traces_and_dialogues_are_read(test_data) -> None:
    conversations = files.trace(test_data / "traces/mooncake_conversation.jsonl.gz", 1.0, 1.0)
    assert sum(len(script.exchanges) for _, script in conversations) == 12_031
    turns = Counter(len(script.exchanges) for _, script in conversations)
    assert (turns[1], turns[2]) == (pytest.approx(6000, rel=0.02), pytest.approx(1240, rel=0.02))
    sessions = files.trace(test_data / "traces/agentic_coding_sessions.jsonl.gz", 1.0, 1.0)
    assert sum(len(script.exchanges) for script in sessions) > 21_000
    for name in ("multiwoz21_val_test", "mt_bench_101", "mtrag_un"):
        pool = files.dialogues(test_data / f"conversations/{name}.jsonl.gz", 0, 60.0)
        assert len(pool) == 200 and all(each.text and each.reply_text for each in exchanges(pool))


# -- populations


POOL = [a_script(), a_script(30.0), a_script(10.0, 20.0, 60.0)]  # 7 turns, 4 pauses, 120 s


def test_as_many_are_there_at_the_beginning_as_littles_law_says() -> None:
    assert (mean_turns(POOL), mean_life_s(POOL)) == (7 / 3, 40.0)
    members = Population(POOL, 0, rate=7.0).initial()
    assert len(members) == 3 * 40
    assert members == Population(POOL, 0, rate=7.0).initial()
    assert [member.idle_s for member in members] == sorted((each.idle_s for each in members), reverse=True)


def test_those_at_the_beginning_are_in_the_middle_of_their_lives() -> None:
    members = Population(POOL, 0, 1.0, size=4000).initial()
    for member in members:
        pause = member.script.exchanges[member.turn].think_s
        assert member.turn > 0 and member.idle_s >= 0 and member.due_s >= 0
        assert member.idle_s + member.due_s == pytest.approx(pause)
        assert member.history_tokens == 30 * member.turn
    longest = sum(member.script is POOL[2] for member in members) / len(members)
    assert longest == pytest.approx(90 / 120, rel=0.05)  # by the length of life
    before_last = sum(member.script is POOL[2] and member.turn == 3 for member in members) / len(members)
    assert before_last == pytest.approx(60 / 120, rel=0.05)


def test_resident_tokens_are_weighed_by_pauses() -> None:
    assert resident_tokens(POOL, 10) == pytest.approx(10 * 30 * (30 * 1 + 10 * 1 + 20 * 2 + 60 * 3) / 120)
    assert resident_tokens([a_script()], 10) == 0.0


def test_few_conversations_hold_as_many_tokens_as_expected() -> None:
    pool = chat_pool(CHATS["sharegpt"], 0, 1.0, 60.0)
    for seed in range(20):
        members = Population(pool, seed, 1.0, size=30).initial()
        found = sum(member.history_tokens for member in members)
        assert found == pytest.approx(resident_tokens(pool, 30), rel=0.08)


def test_arrivals_are_poisson_and_their_turns_come_at_the_rate() -> None:
    arrivals = Population(POOL, 3, rate=7.0).arrivals()
    times, members = zip(*(next(arrivals) for _ in range(20_000)), strict=True)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert mean(gaps) == pytest.approx(1 / 3, rel=0.03)
    deviation = mean([(gap - mean(gaps)) ** 2 for gap in gaps]) ** 0.5
    assert deviation == pytest.approx(mean(gaps), rel=0.03)
    turns = sum(len(member.script.exchanges) for member in members)
    assert turns / times[-1] == pytest.approx(7.0, rel=0.03)
    assert len({member.number for member in members}) == 20_000


def test_a_closed_population_has_successors_and_no_arrivals() -> None:
    closed, opened = Population(POOL, 0, 1.0, size=5), Population(POOL, 0, 1.0)
    assert len(closed.initial()) == 5
    assert list(closed.arrivals()) == []
    assert (closed.successor().number, closed.successor().number) == (6, 7)
    assert opened.successor() is None


def test_think_times_are_stretched_until_the_law_holds() -> None:
    pool = [script.paced(think_factor(POOL, rate=2.0, size=60)) for script in POOL]
    assert len(Population(pool, 0, rate=2.0).initial()) == 60


def test_conversations_without_pauses_begin_with_their_first_turn() -> None:
    members = Population([a_script()], random.randrange(100), 1.0, size=3).initial()
    assert [(member.turn, member.due_s) for member in members] == [(0, 0.0)] * 3
