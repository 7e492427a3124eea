"""What a turn appends in the unusual cases: ids among messages, several rewrites, past replies not shown."""

import asyncio
import threading
from os.path import commonprefix

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidRequest, InvariantError
from engine.text.scene import common_length
from engine.text.tokenizer import Tokenizer
from engine.text_service import Past, PastTurn, TextService
from engine.types import RewritePolicy
from tests.text.chat import user
from tests.text.telling import END, Step, Story, assistant, result, say

pytestmark = pytest.mark.filterwarnings("default")  # what a foreign package warns of is not ours to judge
ASKED = "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
OTHER = "<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n"


# -- replies from elsewhere


async def test_reasoning_in_a_reply_from_elsewhere_is_marked_as_if_it_had_been_sampled(tell):
    telling = tell(Story("reasoning_kept"))
    said = assistant("<think>\nhm\n</think>\n\nHello <|im_start|>.")
    ids = await telling.service.history(None, [user("</think>"), said], (), 0.0)
    control = telling.service.tokenizer.control_tokens
    assert [ids.count(control[mark]) for mark in ("<think>", "</think>", "<|im_start|>")] == [1, 1, 2]
    assert telling.spell(ids).count("<|im_start|>") == 3 and telling.spell(ids).count("</think>") == 2


async def test_a_mark_that_a_model_spelled_out_does_not_stop_the_conversation(tell):
    telling = tell(Story("reasoning"))
    prompt = await telling.prompt(user("Hello."))
    spelled = telling.service.tokenizer.encode("a</think>b<|im_end|>", allow_special=False)
    turn = PastTurn((user("Hello."),), 0, tuple(prompt.ids), tuple(spelled), True)
    await telling.service.extend_past(telling.past, telling.story.system, [turn])
    telling.ids = [*prompt.ids, *spelled]
    assert telling.spell((await telling.prompt(user("And?"))).ids).endswith(ASKED + "<think>\n")


# -- appended messages


async def test_an_append_holds_only_what_stays_however_the_chat_goes_on(tell):
    for template, system, held in (
        ("always_asking", None, "<|im_start|>user\nHello.<|im_end|>\n"),
        ("tools_system", None, "<|im_start|>user\nHello.<|im_end|>\n"),
        ("trimming", None, "<s><|im_start|>user\nHello.<|im_end|>\n"),
    ):
        telling = tell(Story(template, system=system))
        prompt = await telling.prompt(user("Hello."), wants_reply=False)
        assert telling.spell(prompt.ids).startswith(held), template
    telling = tell(Story("tools_system", system=None))
    prompt = await telling.prompt(
        user("Find."),
        assistant("", '{"function": {"name": "f", "arguments": {}}}'),
        result("a"),
        wants_reply=False,
    )
    assert telling.spell(prompt.ids).endswith("\n<result>\na\n</result>")


async def test_an_append_ends_before_a_word_or_control_token_that_might_become_another(byte_level_dir):
    definition = (byte_level_dir / "tokenizer.json").read_text()
    for each, end, held in (
        ("{{ message.role }}: {{ message.content }}\n", "used:", "user: Hello.\n"),
        ("<|im_{{ 'start' if message.role == 'user' else 'end' }}|>{{ message.content }}\n", "<|im_end|>",
         "<|im_start|>Hello.\n"),
    ):  # fmt: skip
        source = "{% for message in messages %}" + each + "{% endfor %}" + end
        tokenizer = Tokenizer(definition, {}, source)
        service = TextService(tokenizer, num_threads=1)
        ids = await service.history(None, [user("Hello.")], (), 0.0)
        service.close()
        assert tokenizer.decode(ids, skip_special=False) == held


async def test_results_that_arrive_one_by_one_join_one_run_also_behind_a_rewritten_past(tell):
    for reply, is_rewritten in (("Hm.", False), (" Hm. ", True)):
        telling = tell(Story("tools_system"))
        await telling.take(say(reply, user("Find.")))
        first = await telling.take(Step((result("a"),)))
        second = await telling.take(say("So.", result("b"), user("And?")))
        assert [p.rewritten_from is not None for p in (first, second)] == [is_rewritten] * 2
        assert telling.spell(first.ids) == "\n<|im_start|>user\n<result>\na\n</result>"
        assert telling.spell(second.ids) == "\n<result>\nb\n</result><|im_end|>\n" + ASKED


async def test_a_message_that_is_said_again_behind_a_rewritten_past_is_not_taken_for_committed(tell):
    telling = tell(Story("tools_system"))
    await telling.take(say(" Hi. ", user("Hello.")))
    await telling.take(Step((user("And?"),)))
    prompt = await telling.prompt(user("And?"))
    assert prompt.rewritten_from is not None
    assert telling.spell(prompt.ids) == ASKED


# -- past replies that the template does not show


@pytest.mark.parametrize("template", ["forgetting", "replacing"])
async def test_keep_appends_the_new_turn_where_no_past_reply_is_shown(tell, template):
    telling = tell(Story(template))
    await telling.take(say("Hello, Miso!", user("My cat is called Miso.")))
    ended = await telling.take(say("one, tw", user("And?")), end="")
    cut_short = await telling.take(say("four", user("Well?")))
    assert telling.spell(ended.ids) == "\n" + ASKED
    assert telling.spell(cut_short.ids) == f"{END}\n{OTHER}"
    appended = await telling.take(Step((user("By the way."),)))
    assert telling.spell(appended.ids) == f"\n<|im_start|>user\nBy the way.{END}\n"
    behind = await telling.take(say("five", user("And?")))
    assert telling.spell(behind.ids) == ASKED


async def test_keep_appends_all_that_a_template_writes_that_shows_one_message(tell):
    telling = tell(Story("only_last", system=None))
    await telling.take(say("Hi.", user("Hello.")))
    prompt = await telling.prompt(user("And?"))
    assert prompt.rewritten_from is not None
    assert telling.spell(prompt.ids) == f"<|im_start|>And?{END}\n<|im_start|>assistant\n"


async def test_new_messages_that_the_template_does_not_show_are_refused_behind_a_rewritten_past(tell):
    telling = tell(Story("forgetting"))
    await telling.take(say("Hi.", user("Hello.")))
    with pytest.raises(InvalidRequest, match="leaves out the new messages.*send token_ids"):
        await telling.prompt(assistant("Noted."))


# -- strip


async def test_strip_begins_at_the_first_of_several_divergences(tell):
    telling = tell(Story("reasoning_kept", system=None))
    for reply in ("a", "<think>\nb\n</think>\n\nc", "<think>\nd\n</think>\n\ne", "f"):
        await telling.take(say(reply, user("And?")))
    kept = await telling.prompt(user("Well?"))
    telling.policy = RewritePolicy.STRIP
    stripped = await telling.prompt(user("Well?"))
    assert kept.rewritten_from == stripped.rewritten_from == stripped.first_token
    before = telling.spell(telling.ids[: stripped.first_token])
    assert before == f"{ASKED}a{END}\n{ASKED}"
    assert before + telling.spell(stripped.ids) == telling.full(user("Well?"))
    await telling.commit(stripped, say("g", user("Well?")))
    follows = await telling.prompt(user("And?"))
    assert follows.rewritten_from is None and follows.first_token == len(telling.ids)


async def test_what_was_given_as_ids_stands_under_every_policy(tell):
    for policy in RewritePolicy:
        telling = tell(Story("trimming", system=None), policy)
        await telling.take(say(" a ", user("Hello.")))
        given = telling.service.tokenizer.encode("\nraw <|im_start|>", allow_special=True)
        reply = telling.service.tokenizer.encode(" b <|im_end|>", allow_special=True)
        await telling.service.extend_past(
            telling.past, None, [PastTurn((), len(telling.ids), tuple(given), tuple(reply), True)]
        )
        telling.ids += [*given, *reply]
        prompt = await telling.prompt(user("And?"))
        assert prompt.rewritten_from == len(telling.ids) - len(reply), (
            "the reply is stripped, not what is before"
        )
        text = telling.spell([*telling.ids[: prompt.first_token], *prompt.ids])
        said = " b " if policy is RewritePolicy.KEEP else "b"
        assert text == f"<s><|im_start|>user\nHello.{END}\n<|im_start|>assistant\n a {END}" + (
            f"\nraw <|im_start|>{said}{END}\n{ASKED}"
        )


async def test_nothing_is_reported_behind_ids_that_were_appended(tell):
    telling = tell(Story("closing", system=None))
    given = telling.service.tokenizer.encode("<s>raw", allow_special=True)
    await telling.service.extend_past(telling.past, None, [PastTurn((), 0, tuple(given), (), False)])
    telling.ids += given
    prompt = await telling.prompt(user("And?"))
    assert prompt.rewritten_from is None
    assert telling.spell(prompt.ids) == "<|user|>\nAnd?<|end|>\n<|assistant|>\n"


# -- the past


async def test_the_past_is_the_same_whether_turns_join_it_one_by_one_or_at_once(tell):
    telling = tell(Story("trimming", system=None), RewritePolicy.STRIP)
    turns = []
    for number, reply in enumerate((" a ", "b", " c")):
        prompt = await telling.prompt(user(f"{number}"))
        step = say(reply, user(f"{number}"))
        before = telling.past.copy()
        await telling.commit(prompt, step)
        reply_ids = telling.ids[prompt.first_token + len(prompt.ids) :]
        turns.append(PastTurn(step.new, prompt.first_token, tuple(prompt.ids), tuple(reply_ids), True))
        assert before.num_tokens < telling.past.num_tokens
    assert any(
        turn.first_token < before.first_token + len(before.prompt_ids + before.reply_ids)
        for before, turn in zip(turns, turns[1:], strict=False)
    )
    at_once = Past()
    await telling.service.extend_past(at_once, None, turns)
    assert at_once == telling.past


async def test_a_turn_that_cannot_follow_leaves_the_past_as_it_was(tell):
    telling = tell(Story("ordinary"))
    await telling.take(say("Hi.", user("Hello.")))
    before = telling.past.copy()
    good, beyond = (
        PastTurn((user("a"),), len(telling.ids), (1,), (), False),
        PastTurn((), 1000, (1,), (), False),
    )
    with pytest.raises(InvariantError, match=f"begins at token 1000 of a past with {len(telling.ids) + 1}"):
        await telling.service.extend_past(telling.past, None, [good, beyond])
    assert telling.past == before
    telling.ids.append(1)
    with pytest.raises(InvariantError, match=f"knows {before.num_tokens} tokens of {len(telling.ids)}"):
        await telling.prompt(user("And?"))


async def test_a_caller_that_is_cancelled_leaves_the_past_as_it_was(tell):
    telling, others_are_done = tell(Story("ordinary")), threading.Event()
    busy = asyncio.create_task(telling.service._run(others_are_done.wait))
    turn = PastTurn((user("Hello."),), 0, (1, 2), (3,), True)
    extending = asyncio.create_task(telling.service.extend_past(telling.past, None, [turn]))
    await asyncio.sleep(0)
    extending.cancel()
    others_are_done.set()
    await busy
    with pytest.raises(asyncio.CancelledError):
        await extending
    assert telling.past == Past()
    await telling.service.extend_past(telling.past, None, [turn])
    assert telling.past.num_tokens == 3


async def test_without_a_template_messages_are_refused(byte_level_dir):
    service = TextService(Tokenizer.from_dir(byte_level_dir), num_threads=1)
    with pytest.raises(InvalidRequest, match="has no chat template; send token_ids instead of text"):
        await service.history(None, [user("Hello.")], (), 0.0)
    service.close()


async def test_a_malformed_call_is_named_by_its_place_in_the_request(tell):
    telling = tell(Story("tools_system"))
    await telling.take(say("Hi.", user("Hello.")))
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"tool_calls\[0\] of message 1 is not JSON"):
            await telling.prompt(user("And?"), assistant("", "{"))


@given(st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_the_common_length_is_that_of_the_common_prefix(one, other):
    assert common_length(one, other) == len(commonprefix([one, other]))
