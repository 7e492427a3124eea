"""How `continuo bench` holds conversations with a server: in virtual time."""

import asyncio

import pytest

from rpc.client import ResourceExhausted, Unavailable
from tests.tools.virtual_server import VirtualServer, play
from tools.bench.driver import Driver, Manner
from tools.bench.population import Population, Recorded
from tools.bench.workload import CHATS, Exchange, Script, chat_pool, mean_life_s, mean_turns

POOL = chat_pool(CHATS["sharegpt"], 0, 0.05, 60.0)


def drive(people, server=None, duration_s=3600.0, **manner):
    """Holds the conversations of `people` with a virtual server; nothing is warmed up."""
    server = server or VirtualServer()

    async def held() -> Driver:
        loop = asyncio.get_running_loop()
        driver = Driver(server, people, Manner(0, 0.0, duration_s, **manner), 1000, clock=loop.time)
        await driver.fill(lambda done, of: None)
        await driver.run(can_sample=True)
        return driver

    return play(held())


def finished(driver):
    return [record for record in driver.records if record.done_s is not None]


def test_an_open_population_says_its_turns_at_the_rate_from_the_first_minute_on() -> None:
    driver = drive(Population(POOL, 1, rate=4.0), duration_s=1800.0)
    assert len(finished(driver)) / 1800 == pytest.approx(4.0, rel=0.1)
    assert sum(record.sent_s < 300 for record in driver.records) == pytest.approx(300 * 4.0, rel=0.15)
    living = [sample.live_tokens for sample in driver.samples]
    assert sum(living[:300]) / 300 == pytest.approx(sum(living) / len(living), rel=0.2)


def test_a_slow_server_gets_the_same_conversations_as_a_fast_one() -> None:
    def begun(token_s):
        driver = drive(Population(POOL, 1, rate=1.0), VirtualServer(token_s=token_s), duration_s=600.0)
        first = {record.conversation: record.due_s for record in driver.records if record.turn == 0}
        return dict(sorted(first.items()))

    fast = begun(0.01)
    assert len(fast) > 60 and begun(0.2) == pytest.approx(fast)


def test_a_turn_is_said_a_think_time_after_the_reply_before_it() -> None:
    script = Script((Exchange(5, 3), Exchange(5, 3, 40.0), Exchange(5, 3, 7.0)))
    driver = drive(Recorded([(10.0, script)]), VirtualServer(ttft_s=2.0, token_s=1.0), duration_s=100.0)
    assert [record.sent_s for record in driver.records] == pytest.approx([10.0, 54.0, 65.0])
    assert [record.done_s for record in driver.records] == pytest.approx([14.0, 58.0, 69.0])
    assert [record.history_tokens for record in driver.records] == [0, 8, 16]


def test_a_recorded_turn_is_said_at_its_time_or_when_the_reply_before_it_has_come() -> None:
    script = Script((Exchange(5, 3, at_s=0.0), Exchange(5, 3, at_s=1.0), Exchange(5, 3, at_s=20.0)))
    driver = drive(Recorded([(10.0, script)]), VirtualServer(ttft_s=2.0, token_s=1.0), duration_s=100.0)
    assert [record.due_s for record in driver.records] == pytest.approx([10.0, 14.0, 30.0])


def test_a_closed_population_keeps_its_number() -> None:
    driver = drive(Population(POOL, 2, 1.0, size=30), duration_s=1800.0)
    scripts = scripts_of(driver, Population(POOL, 2, 1.0, size=30))
    said = {(record.conversation, record.turn) for record in finished(driver)}
    ended = [number for number, script in scripts.items() if (number, len(script.exchanges) - 1) in said]
    assert len(ended) > 30 and len(scripts) == 30 + len(ended)
    expected = 30 * mean_turns(POOL) / mean_life_s(POOL)
    assert len(finished(driver)) / 1800 == pytest.approx(expected, rel=0.15)


def scripts_of(driver, people):
    """What every conversation that took part had to say, by its number."""
    scripts = {member.number: member.script for member in people.initial()}
    while len(scripts) < max(record.conversation for record in driver.records):
        newcomer = people.successor()
        scripts[newcomer.number] = newcomer.script
    return scripts


def test_histories_are_there_before_the_clock_starts() -> None:
    server = VirtualServer()
    driver = drive(Population(POOL, 0, 1.0, size=20), server, duration_s=1.0)
    initial = Population(POOL, 0, 1.0, size=20).initial()
    filled = {len(said["token_ids"]) for said in server.said if said["max_tokens"] == 1}
    assert {member.history_tokens - 1 for member in initial} <= filled
    assert driver.samples[0].live_tokens == sum(member.history_tokens for member in initial)


def test_a_dialogue_in_the_middle_brings_what_was_said_as_messages() -> None:
    words = Script(tuple(Exchange(2, 2, 60.0 * bool(n), f"say {n}", f"reply {n}") for n in range(3)))
    server = VirtualServer()
    people = Population([words], 0, 1.0, size=8)
    drive(people, server, duration_s=1.0)
    opened = [chat.opened_with.get("history") for chat in server._chats.values()]
    told = [{"role": "user", "content": "say 0"}, {"role": "assistant", "content": "reply 0"}]
    assert told in opened and None in opened
    assert {said["text"] for said in server.said} >= {"say 0", "say 1"}


def test_conversations_of_a_trace_share_their_beginning() -> None:
    script, server = Script((Exchange(30, 1),), shared_tokens=20), VirtualServer()
    drive(Recorded([(0.0, script), (1.0, script)]), server, duration_s=10.0)
    first, second = (said["token_ids"] for said in server.said)
    assert first[:20] == second[:20] and first[20:] != second[20:]


def test_turns_are_cancelled_midway() -> None:
    driver = drive(Population(POOL, 0, 1.0, size=10), duration_s=600.0, cancel_rate=0.5)
    cancelled = [record for record in finished(driver) if record.cancelled]
    assert len(cancelled) / len(finished(driver)) == pytest.approx(0.5, abs=0.15)
    scripts = scripts_of(driver, Population(POOL, 0, 1.0, size=10))
    for record in cancelled:
        wanted = scripts[record.conversation].exchanges[record.turn].reply_tokens
        assert record.reply_tokens == -(-wanted // 2)


def test_conversations_are_resumed_by_id() -> None:
    server = VirtualServer()
    driver = drive(Population(POOL, 0, 1.0, size=10), server, duration_s=600.0, resume_rate=1.0)
    resumed = [record for record in finished(driver) if record.resumed_s is not None]
    assert server.num_resumed >= len(resumed) > 0
    assert {record.turn for record in finished(driver) if record.resumed_s is None} <= {0}
    for record in resumed:
        assert record.sent_s - record.resumed_s == pytest.approx(0.2)


def test_a_refused_turn_is_noted_and_its_conversation_goes_on() -> None:
    script, server = Script((Exchange(5, 3), Exchange(5, 3, 10.0))), VirtualServer()
    server.failures[1] = ResourceExhausted("too many", "QUEUE_FULL")
    driver = drive(Recorded([(0.0, script)]), server, duration_s=30.0)
    assert [record.failure for record in driver.records] == ["RESOURCE_EXHAUSTED QUEUE_FULL", ""]


def test_a_server_that_opens_nothing_is_not_flooded() -> None:
    class Closed(VirtualServer):
        async def open(self, **arguments):
            if self.num_turns:
                raise ResourceExhausted("too many", "TOO_MANY_CONVERSATIONS")
            return await super().open(**arguments)

    single = [Script((Exchange(5, 3),))]
    driver = drive(Population(single, 0, 1.0, size=1), Closed(), duration_s=60.0)
    assert 50 < len(driver.records) < 70
    assert {record.failure for record in finished(driver)[1:]} == {
        "RESOURCE_EXHAUSTED TOO_MANY_CONVERSATIONS"
    }


def test_what_was_seen_before_the_server_was_lost_stands() -> None:
    server = VirtualServer()
    server.failures[50] = Unavailable("gone")
    people = Population(POOL, 0, rate=1.0)
    seen = []

    async def held() -> None:
        driver = Driver(server, people, Manner(0, 0.0, 600.0), 1000, clock=asyncio.get_running_loop().time)
        seen.append(driver)
        await driver.run(can_sample=False)

    with pytest.raises(Unavailable, match="gone"):
        play(held())
    assert 0 < len(finished(seen[0])) < 50
